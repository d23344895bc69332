//! Chain records: layers that are shown merged.

use redb::{ReadableTable as _, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

use super::{Store, StoreError, decode, encode};
use crate::layer::Digest;

const TABLE: &str = "chains";
pub(super) const CHAINS: TableDefinition<&[u8; Digest::LEN], &[u8]> = TableDefinition::new(TABLE);

/// Layers on each other of which one merged image is, or will be, stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChainRecord {
    /// Digest of the chain.
    pub digest: Digest,
    /// The chain's own number, as [`Store::allocate_slot`] gave it.
    pub slot: u32,
    /// Its layers and variants, the lowest first.
    pub layers: Vec<Digest>,
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

    /// Writes a chain's record, in the place of the one it had.
    ///
    /// # Errors
    /// An error of the database.
    pub fn put_chain(&self, record: &ChainRecord) -> Result<(), StoreError> {
        let bytes = encode(TABLE, &record.digest, record)?;
        self.write(|transaction| {
            let mut table = transaction.open_table(CHAINS)?;
            table.insert(record.digest.as_bytes(), bytes.as_slice())?;
            Ok(())
        })
    }

    /// Takes a chain's record away (its slot stays its own). Whether there was one, readable or not.
    ///
    /// # Errors
    /// An error of the database.
    pub fn remove_chain(&self, digest: &Digest) -> Result<bool, StoreError> {
        self.write(|transaction| {
            let mut table = transaction.open_table(CHAINS)?;
            let removed = table.remove(digest.as_bytes())?.is_some();
            Ok(removed)
        })
    }
}
