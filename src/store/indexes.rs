//! Where the indexes of layers came from: what the cache's own files do not tell.

use redb::{ReadableTable as _, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

use super::draft::{Draft, table};
use super::layers::digest_key;
use super::{LayerSource, Store, StoreError, decode, encode};
use crate::layer::Digest;

const TABLE: &str = "indexes";
pub(super) const INDEXES: TableDefinition<&[u8; Digest::LEN], &[u8]> = TableDefinition::new(TABLE);

table!(Indexes, INDEXES, digest_key, Some, <[u8]>::to_vec);

/// Who said that an index is a layer's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Voucher {
    /// Nobody knows any more: a record of an older version.
    #[default]
    Unknown,
    /// The image's manifest.
    Manifest,
    /// The client that pulled the image.
    Client,
    /// The configuration, for the image's manifest.
    Configuration,
    /// Nobody but the place it was found in.
    Place,
}

/// Where the index of a layer came from. The layer's id follows from it; here is what is needed to judge it again.
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
        /// The repository, again.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        place: Option<LayerSource>,
        /// Its signature.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        signature: Option<String>,
    },
    /// Made of a zTOC, before the layer was here.
    Soci {
        /// Repository it was found in.
        from: String,
        /// Why it was believed, for people.
        trust: String,
        /// Digest of the SOCI index that lists it.
        digest: Digest,
        /// Whether it was found to describe the whole layer, once that was here; `None`: not looked at yet.
        #[serde(default)]
        verified: Option<bool>,
        /// The repository, again.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        place: Option<LayerSource>,
        /// Who named it.
        #[serde(default)]
        by: Voucher,
    },
    /// Made of the table of contents that the image's manifest states.
    Table {
        /// Digest of all that the manifest states of it.
        digest: Digest,
    },
}

impl IndexRecord {
    /// Whether it was found not to describe its layer.
    pub fn is_false(&self) -> bool {
        matches!(
            self,
            IndexRecord::Shared {
                verified: Some(false),
                ..
            } | IndexRecord::Soci {
                verified: Some(false),
                ..
            }
        )
    }

    /// Notes what came of a comparison with the layer.
    pub fn set_verified(&mut self, found: bool) {
        if let IndexRecord::Shared { verified, .. } | IndexRecord::Soci { verified, .. } = self {
            *verified = Some(found);
        }
    }
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

    /// All index records that can be read, by the ids of their layers. The others are as good as none: what is not known is not believed.
    ///
    /// # Errors
    /// An error of the database.
    pub fn indexes(&self) -> Result<Vec<(Digest, IndexRecord)>, StoreError> {
        let transaction = self.read()?;
        let table = transaction.open_table(INDEXES)?;
        let mut list = Vec::new();
        for entry in table.iter()? {
            let (key, bytes) = entry?;
            let id = Digest::from_bytes(*key.value());
            match decode(TABLE, &id, bytes.value()) {
                Ok(record) => list.push((id, record)),
                Err(error) => tracing::warn!(%error, "an index is not believed any more"),
            }
        }
        Ok(list)
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
            place: None,
            signature: Some("text".to_owned()),
        };
        let store = Store::open(&path).unwrap();
        assert_eq!(store.index(&layer).unwrap(), None);
        store
            .put_index(&layer, &IndexRecord::Built { published: None })
            .unwrap();
        store.put_index(&layer, &shared).unwrap();
        drop(store);
        let store = Store::open(&path).unwrap();
        assert_eq!(store.index(&layer).unwrap(), Some(shared.clone()));
        assert_eq!(store.indexes().unwrap(), [(layer, shared)]);
    }
}
