//! Where the indexes of layers came from: what the cache's own files do not tell.

use redb::{ReadableTable as _, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

use super::draft::{Draft, table};
use super::layers::digest_key;
use super::{Store, StoreError, decode, encode};
use crate::layer::Digest;

const TABLE: &str = "indexes";
const INDEXES: TableDefinition<&[u8; Digest::LEN], &[u8]> = TableDefinition::new(TABLE);

table!(Indexes, INDEXES, digest_key, Some, <[u8]>::to_vec);

/// Where the index of a layer came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum IndexRecord {
    /// Built here, from the whole layer.
    Built {
        /// Where it has been published.
        published: Option<String>,
    },
    /// Taken from elsewhere, before the layer was here.
    Shared {
        /// Repository it was found in.
        from: String,
        /// Why it was believed, for people.
        trust: String,
        /// Digest of its portable form.
        digest: Digest,
        /// Whether it was found to describe the whole layer, once that was here; `None`: not looked at yet.
        verified: Option<bool>,
    },
    /// Made of a zTOC, before the layer was here.
    Soci {
        /// Repository it was found in.
        from: String,
        /// Why it was believed, for people.
        trust: String,
        /// Digest of the SOCI index that lists it.
        digest: Digest,
    },
}

pub(super) fn create_tables(transaction: &WriteTransaction) -> Result<(), StoreError> {
    transaction.open_table(INDEXES)?;
    Ok(())
}

impl Store {
    /// What is known of the index of a layer.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if it cannot be decoded, or an error of the database.
    pub fn index(&self, layer: &Digest) -> Result<Option<IndexRecord>, StoreError> {
        let transaction = self.read()?;
        let table = transaction.open_table(INDEXES)?;
        let bytes = table.get(layer.as_bytes())?;
        bytes.map(|bytes| decode(TABLE, layer, bytes.value())).transpose()
    }

    /// Notes where the index of a layer came from.
    ///
    /// # Errors
    /// An error of the database.
    pub fn put_index(&self, layer: &Digest, record: &IndexRecord) -> Result<(), StoreError> {
        let (layer, record) = (*layer, record.clone());
        self.write(move |draft| draft.put_index(&layer, &record))
    }

    /// Layers of which it is recorded.
    pub(super) fn indexed(&self) -> Result<Vec<Digest>, StoreError> {
        let table = self.read()?.open_table(INDEXES)?;
        let keys = table.iter()?.map(|entry| Ok(Digest::from_bytes(*entry?.0.value())));
        keys.collect()
    }
}

impl Draft<'_> {
    /// As [`Store::put_index`].
    ///
    /// # Errors
    /// An error of the database.
    pub fn put_index(&self, layer: &Digest, record: &IndexRecord) -> Result<(), StoreError> {
        let bytes = encode(TABLE, layer, record)?;
        self.write::<Indexes>(layer.as_bytes(), Some(bytes)).map(drop)
    }

    /// Takes away what is known of the index of a layer.
    pub(super) fn remove_index(&self, layer: &Digest) -> Result<(), StoreError> {
        self.write::<Indexes>(layer.as_bytes(), None).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let layer = Digest::of(b"layer");
        let shared = IndexRecord::Shared {
            from: "r.example/index".to_owned(),
            trust: "trusted repository".to_owned(),
            digest: Digest::of(b"index"),
            verified: Some(true),
        };
        let store = Store::open(&path).unwrap();
        assert_eq!(store.index(&layer).unwrap(), None);
        store
            .put_index(&layer, &IndexRecord::Built { published: None })
            .unwrap();
        store.put_index(&layer, &shared).unwrap();
        drop(store);
        assert_eq!(Store::open(&path).unwrap().index(&layer).unwrap(), Some(shared));
    }
}
