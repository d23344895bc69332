//! Chain records: layers that are shown merged.

use std::collections::HashSet;

use redb::{ReadableTable as _, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

use super::draft::{Draft, table};
use super::layers::digest_key;
use super::{Store, StoreError, decode, encode};
use crate::layer::Digest;

const TABLE: &str = "chains";
pub(super) const CHAINS: TableDefinition<&[u8; Digest::LEN], &[u8]> = TableDefinition::new(TABLE);

table!(Chains, CHAINS, digest_key, Some, <[u8]>::to_vec);

/// What a chain's record is about.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ChainRole {
    /// A merged image of layers that have nothing below them.
    #[default]
    Lowest,
    /// A merged image of layers that lie on others.
    Upper,
    /// All layers that containers are made on. There is no image of them as such.
    List,
}

/// Layers on each other of which one merged image is, or will be, stored; or that are known to be used together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChainRecord {
    /// Digest of the chain.
    pub digest: Digest,
    /// The chain's own number, as [`Store::allocate_slot`] gave it.
    pub slot: u32,
    /// Its layers and variants, the lowest first.
    pub layers: Vec<Digest>,
    /// What it is about.
    #[serde(default)]
    pub role: ChainRole,
}

pub(super) fn create_tables(transaction: &WriteTransaction) -> Result<(), StoreError> {
    transaction.open_table(CHAINS)?;
    Ok(())
}

impl Store {
    /// All chains, ordered by digest.
    ///
    /// # Errors
    /// An error of the database. A record that cannot be decoded is an error in its place in the list.
    #[allow(clippy::type_complexity)]
    pub fn chains(&self) -> Result<Vec<(Digest, Result<ChainRecord, StoreError>)>, StoreError> {
        let transaction = self.read()?;
        let table = transaction.open_table(CHAINS)?;
        let mut list = Vec::new();
        for entry in table.iter()? {
            let (key, bytes) = entry?;
            let digest = Digest::from_bytes(*key.value());
            list.push((digest, decode(TABLE, &digest, bytes.value())));
        }
        Ok(list)
    }

    /// Digests of all chains.
    pub(super) fn chained(&self) -> Result<HashSet<Digest>, StoreError> {
        let table = self.read()?.open_table(CHAINS)?;
        let keys = table.iter()?.map(|entry| Ok(Digest::from_bytes(*entry?.0.value())));
        keys.collect()
    }

    /// Writes a chain's record, in the place of the one it had.
    ///
    /// # Errors
    /// An error of the database.
    pub fn put_chain(&self, record: &ChainRecord) -> Result<(), StoreError> {
        let record = record.clone();
        self.write(move |draft| draft.put_chain(&record))
    }

    /// Writes the record of the chain of `layers`, the lowest first, and gives its slot.
    ///
    /// # Errors
    /// As [`Store::allocate_slot`].
    pub fn record_chain(&self, digest: Digest, layers: Vec<Digest>, role: ChainRole) -> Result<u32, StoreError> {
        self.write(move |draft| {
            let slot = draft.slot(&digest)?;
            draft.put_chain(&ChainRecord {
                digest,
                slot,
                layers,
                role,
            })?;
            Ok(slot)
        })
    }

    /// Takes a chain's record away, and its slot, which is never given again. Whether there was one, readable or not.
    ///
    /// # Errors
    /// An error of the database.
    pub fn remove_chain(&self, digest: &Digest) -> Result<bool, StoreError> {
        let digest = *digest;
        self.write(move |draft| {
            draft.remove_slot(&digest)?;
            draft.write::<Chains>(digest.as_bytes(), None)
        })
    }
}

impl Draft<'_> {
    fn put_chain(&self, record: &ChainRecord) -> Result<(), StoreError> {
        let bytes = encode(TABLE, &record.digest, record)?;
        self.write::<Chains>(record.digest.as_bytes(), Some(bytes)).map(drop)
    }

    pub(super) fn has_chain(&self, digest: &Digest) -> Result<bool, StoreError> {
        Ok(self.read::<Chains>(digest.as_bytes())?.is_some())
    }
}
