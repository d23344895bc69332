//! Layer records, and the slots of layers.

use std::collections::BTreeMap;

use redb::{ReadableTable as _, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

use super::schema::next_number;
use super::{Store, StoreError, decode, encode};
use crate::layer::Digest;

const TABLE: &str = "layers";
pub(super) const LAYERS: TableDefinition<&[u8; Digest::LEN], &[u8]> = TableDefinition::new(TABLE);
pub(super) const SLOTS: TableDefinition<&[u8; Digest::LEN], u32> = TableDefinition::new("slots");
pub(super) const NEXT_SLOT: &str = "next_slot";

/// A layer that was live once: everything that is needed to bring it back without the network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// Its id: digest of the blob if its index was built from that, of what was believed of it if not; of a variant, its own.
    pub digest: Digest,
    /// Digest of the blob, where the id is another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blob: Option<Digest>,
    /// Of a variant, which is a layer as it looks on its parents: id of that layer. All else is said of that layer.
    #[serde(default)]
    pub variant_of: Option<Digest>,
    /// Digest of the uncompressed tar, where it was found out from the bytes that the index gives, and that the index is that tar's. Whoever
    /// promises this tar is served with the layer, whatever was believed of it before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<Digest>,
    /// What it was known by in schema 1: its files may still have that name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub formerly: Option<Digest>,
    /// Digest of the uncompressed tar, where the image's config names it.
    pub diff_id: Option<Digest>,
    /// Media type of the blob.
    pub media_type: String,
    /// Size of the blob in bytes.
    pub size: u64,
    /// Annotations of the layer's descriptor.
    pub annotations: BTreeMap<String, String>,
    /// The layer's own number, as [`Store::allocate_slot`] gave it: inode numbers are built on it.
    pub slot: u32,
    /// Where the blob can be had.
    pub sources: Vec<LayerSource>,
    /// Names of the images it was pulled with, as far as containerd told them.
    pub images: Vec<String>,
    /// Why it was streamed as a whole, if it was.
    #[serde(default)]
    pub streamed: Option<String>,
}

impl LayerRecord {
    /// Digest of the layer's blob.
    pub fn blob(&self) -> Digest {
        self.blob.unwrap_or(self.digest)
    }
}

/// A repository that has a blob.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LayerSource {
    /// Registry, with its port: `registry.example:5000`.
    pub host: String,
    /// Repository: `library/debian`.
    pub repository: String,
}

pub(super) fn create_tables(transaction: &WriteTransaction) -> Result<(), StoreError> {
    transaction.open_table(LAYERS)?;
    transaction.open_table(SLOTS)?;
    Ok(())
}

impl Store {
    /// The record of a layer.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if it cannot be decoded, or an error of the database.
    pub fn layer(&self, digest: &Digest) -> Result<Option<LayerRecord>, StoreError> {
        let transaction = self.read()?;
        let table = transaction.open_table(LAYERS)?;
        let bytes = table.get(digest.as_bytes())?;
        bytes.map(|bytes| decode(TABLE, digest, bytes.value())).transpose()
    }

    /// All layers, ordered by digest.
    ///
    /// # Errors
    /// An error of the database. A record that cannot be decoded is an error in its place in the list.
    #[allow(clippy::type_complexity)]
    pub fn layers(&self) -> Result<Vec<(Digest, Result<LayerRecord, StoreError>)>, StoreError> {
        let transaction = self.read()?;
        let table = transaction.open_table(LAYERS)?;
        let mut list = Vec::new();
        for entry in table.iter()? {
            let (key, bytes) = entry?;
            let digest = Digest::from_bytes(*key.value());
            list.push((digest, decode(TABLE, &digest, bytes.value())));
        }
        Ok(list)
    }

    /// Writes a layer's record, in the place of the one it had.
    ///
    /// # Errors
    /// [`StoreError::WrongSlot`] if its slot is not the one that [`Store::allocate_slot`] gave, or an error of the
    /// database.
    pub fn put_layer(&self, record: &LayerRecord) -> Result<(), StoreError> {
        let key = record.digest.as_bytes();
        let bytes = encode(TABLE, &record.digest, record)?;
        self.write(|transaction| {
            let actual = transaction.open_table(SLOTS)?.get(key)?.map_or(0, |slot| slot.value());
            if actual != record.slot {
                return Err(StoreError::WrongSlot {
                    layer: record.digest.to_string(),
                    claimed: record.slot,
                    actual,
                });
            }
            transaction.open_table(LAYERS)?.insert(key, bytes.as_slice())?;
            Ok(())
        })
    }

    /// Takes a layer's record away (its slot stays its own). Whether there was one, readable or not.
    ///
    /// # Errors
    /// An error of the database.
    pub fn remove_layer(&self, digest: &Digest) -> Result<bool, StoreError> {
        self.write(|transaction| {
            let mut table = transaction.open_table(LAYERS)?;
            let removed = table.remove(digest.as_bytes())?.is_some();
            Ok(removed)
        })
    }

    /// The number of a layer: from 1 on, always the same for the same digest, never the same for two.
    ///
    /// # Errors
    /// [`StoreError::Exhausted`] after four thousand million layers, or an error of the database.
    pub fn allocate_slot(&self, digest: &Digest) -> Result<u32, StoreError> {
        let key = digest.as_bytes();
        let known = self.read()?.open_table(SLOTS)?.get(key)?.map(|slot| slot.value());
        if let Some(slot) = known {
            return Ok(slot);
        }
        self.write(|transaction| {
            let mut slots = transaction.open_table(SLOTS)?;
            // Another caller may have been faster.
            if let Some(slot) = slots.get(key)?.map(|slot| slot.value()) {
                return Ok(slot);
            }
            let what = "layer slot";
            let slot = next_number(transaction, NEXT_SLOT, what)?;
            let slot = u32::try_from(slot).map_err(|_| StoreError::Exhausted { what })?;
            slots.insert(key, slot)?;
            Ok(slot)
        })
    }
}
