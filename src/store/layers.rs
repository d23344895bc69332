//! Layer records, and the slots of layers.

use std::collections::BTreeMap;

use redb::{ReadableTable as _, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

use super::draft::{Draft, table};
use super::indexes::IndexRecord;
use super::schema::next_number;
use super::{Store, StoreError, decode, encode};
use crate::layer::Digest;

const TABLE: &str = "layers";
pub(super) const LAYERS: TableDefinition<&[u8; Digest::LEN], &[u8]> = TableDefinition::new(TABLE);
pub(super) const SLOTS: TableDefinition<&[u8; Digest::LEN], u32> = TableDefinition::new("slots");
pub(super) const NEXT_SLOT: &str = "next_slot";

table!(Layers, LAYERS, digest_key, Some, <[u8]>::to_vec);

/// The slots.
pub(super) mod slots {
    use redb::{ReadableTable as _, WriteTransaction};

    use super::{SLOTS, StoreError, digest_key};
    use crate::store::draft::table;

    const TABLE: &str = "slots";
    table!(Slots, SLOTS, digest_key, super::slot_of, |slot: u32| slot
        .to_le_bytes()
        .to_vec());
}
use slots::Slots;

/// A key that is a digest.
pub(super) fn digest_key(key: &[u8]) -> Option<&[u8; Digest::LEN]> {
    key.try_into().ok()
}

fn slot_of(bytes: &[u8]) -> Option<u32> {
    bytes.try_into().ok().map(u32::from_le_bytes)
}

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
        let record = record.clone();
        self.write(move |draft| draft.put_layer(&record))
    }

    /// Writes all that is recorded of a layer that becomes live, and gives its slot; that of `record` is not looked at.
    ///
    /// # Errors
    /// As [`Store::allocate_slot`].
    pub fn record_layer(&self, record: LayerRecord, index: Option<IndexRecord>) -> Result<u32, StoreError> {
        self.write(move |draft| draft.record_layer(record, index.as_ref()))
    }

    /// Takes a layer's record away, and its slot, which is never given again. Whether there was one, readable or not.
    ///
    /// # Errors
    /// An error of the database.
    pub fn remove_layer(&self, digest: &Digest) -> Result<bool, StoreError> {
        let digest = *digest;
        self.write(move |draft| draft.remove_layer(&digest))
    }

    /// The number of a layer: from 1 on, always the same as long as it is recorded, never the same for two.
    ///
    /// # Errors
    /// [`StoreError::Exhausted`] after four thousand million layers, or an error of the database.
    pub fn allocate_slot(&self, digest: &Digest) -> Result<u32, StoreError> {
        if let Some(slot) = self.slot(digest)? {
            return Ok(slot);
        }
        let digest = *digest;
        self.write(move |draft| draft.slot(&digest))
    }

    /// The number of a layer, a variant or a chain, if it has one.
    ///
    /// # Errors
    /// An error of the database.
    pub fn slot(&self, digest: &Digest) -> Result<Option<u32>, StoreError> {
        let table = self.read()?.open_table(SLOTS)?;
        Ok(table.get(digest.as_bytes())?.map(|slot| slot.value()))
    }

    /// Digests of all recorded layers.
    pub(super) fn recorded(&self) -> Result<Vec<Digest>, StoreError> {
        let table = self.read()?.open_table(LAYERS)?;
        let keys = table.iter()?.map(|entry| Ok(Digest::from_bytes(*entry?.0.value())));
        keys.collect()
    }

    /// All variants, each with the layer that it is a variant of. Records that cannot be decoded are passed over.
    ///
    /// # Errors
    /// An error of the database.
    pub fn variants(&self) -> Result<Vec<(Digest, Digest)>, StoreError> {
        /// The part of a record that is looked at: the annotations are most of it.
        #[derive(Deserialize)]
        struct OfVariant {
            #[serde(default)]
            variant_of: Option<Digest>,
        }
        let table = self.read()?.open_table(LAYERS)?;
        let mut variants = Vec::new();
        for entry in table.iter()? {
            let (key, bytes) = entry?;
            let digest = Digest::from_bytes(*key.value());
            let base = decode::<OfVariant>(TABLE, &digest, bytes.value()).ok();
            variants.extend(base.and_then(|of| of.variant_of).map(|base| (digest, base)));
        }
        Ok(variants)
    }

    /// Digests of everything that has a slot.
    pub(super) fn slotted(&self) -> Result<Vec<Digest>, StoreError> {
        let table = self.read()?.open_table(SLOTS)?;
        let keys = table.iter()?.map(|entry| Ok(Digest::from_bytes(*entry?.0.value())));
        keys.collect()
    }
}

impl Draft<'_> {
    /// The slot of a layer, a variant or a chain; given now if it has none.
    ///
    /// # Errors
    /// As [`Store::allocate_slot`].
    pub fn slot(&self, digest: &Digest) -> Result<u32, StoreError> {
        if let Some(slot) = self.read::<Slots>(digest.as_bytes())? {
            return Ok(slot_of(&slot).unwrap_or(0));
        }
        let what = "layer slot";
        let slot = next_number(self, NEXT_SLOT, what)?;
        let slot = u32::try_from(slot).map_err(|_| StoreError::Exhausted { what })?;
        self.write::<Slots>(digest.as_bytes(), Some(slot.to_le_bytes().to_vec()))?;
        Ok(slot)
    }

    /// Takes a slot away from what is recorded no more. The number is never given again: the kernel may know inodes that are built on it.
    pub(super) fn remove_slot(&self, digest: &Digest) -> Result<(), StoreError> {
        self.write::<Slots>(digest.as_bytes(), None).map(drop)
    }

    /// As [`Store::layer`].
    ///
    /// # Errors
    /// As [`Store::layer`].
    pub fn layer(&self, digest: &Digest) -> Result<Option<LayerRecord>, StoreError> {
        let bytes = self.read::<Layers>(digest.as_bytes())?;
        bytes.map(|bytes| decode(TABLE, digest, &bytes)).transpose()
    }

    /// As [`Store::put_layer`].
    ///
    /// # Errors
    /// As [`Store::put_layer`].
    pub fn put_layer(&self, record: &LayerRecord) -> Result<(), StoreError> {
        let key = record.digest.as_bytes();
        let actual = self.read::<Slots>(key)?.and_then(|slot| slot_of(&slot)).unwrap_or(0);
        if actual != record.slot {
            return Err(StoreError::WrongSlot {
                layer: record.digest.to_string(),
                claimed: record.slot,
                actual,
            });
        }
        let bytes = encode(TABLE, &record.digest, record)?;
        self.write::<Layers>(key, Some(bytes)).map(drop)
    }

    /// As [`Store::record_layer`].
    ///
    /// # Errors
    /// As [`Store::record_layer`].
    pub fn record_layer(&self, record: LayerRecord, index: Option<&IndexRecord>) -> Result<u32, StoreError> {
        let slot = self.slot(&record.digest)?;
        let record = LayerRecord { slot, ..record };
        self.put_layer(&record)?;
        if let Some(index) = index {
            self.put_index(&record.digest, index)?;
        }
        Ok(slot)
    }

    /// As [`Store::remove_layer`].
    ///
    /// # Errors
    /// An error of the database.
    pub fn remove_layer(&self, digest: &Digest) -> Result<bool, StoreError> {
        self.remove_slot(digest)?;
        self.write::<Layers>(digest.as_bytes(), None)
    }
}
