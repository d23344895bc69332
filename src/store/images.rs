//! Image records: what was pulled, and what became of its layers.

use redb::{ReadableTable as _, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

use super::draft::{Draft, table};
use super::layers::digest_key;
use super::{Store, StoreError, decode, encode};
use crate::layer::Digest;

const TABLE: &str = "images";
const IMAGES: TableDefinition<&[u8; Digest::LEN], &[u8]> = TableDefinition::new(TABLE);

table!(Images, IMAGES, digest_key, Some, <[u8]>::to_vec);

/// An image (one platform's manifest) of which Lazuli was asked for layers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Digest of the manifest.
    pub manifest: Digest,
    /// containerd namespace that asked first.
    pub namespace: String,
    /// References it was pulled by.
    pub names: Vec<String>,
    /// Registry, with its port.
    pub host: String,
    /// Repository.
    pub repository: String,
    /// Its layers, bottom first.
    pub layers: Vec<ImageLayer>,
}

/// A layer of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageLayer {
    /// Digest of the blob, of any algorithm.
    pub digest: String,
    /// Size of the blob in bytes.
    pub size: u64,
    /// Media type of the blob.
    pub media_type: String,
    /// Digest of the uncompressed tar.
    pub diff_id: String,
    /// Digest of the chain of diff ids up to this one.
    pub chain_id: String,
    /// Why Lazuli does not serve it.
    #[serde(default)]
    pub refused: Option<String>,
}

pub(super) fn create_tables(transaction: &WriteTransaction) -> Result<(), StoreError> {
    transaction.open_table(IMAGES)?;
    Ok(())
}

impl Store {
    /// The image with this manifest.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if its record cannot be decoded, or an error of the database.
    pub fn image(&self, manifest: &Digest) -> Result<Option<ImageRecord>, StoreError> {
        let transaction = self.read()?;
        let table = transaction.open_table(IMAGES)?;
        let bytes = table.get(manifest.as_bytes())?;
        bytes.map(|bytes| decode(TABLE, manifest, bytes.value())).transpose()
    }

    /// All images, ordered by manifest.
    ///
    /// # Errors
    /// An error of the database. A record that cannot be decoded is an error in its place in the list.
    #[allow(clippy::type_complexity)]
    pub fn images(&self) -> Result<Vec<(Digest, Result<ImageRecord, StoreError>)>, StoreError> {
        let transaction = self.read()?;
        let table = transaction.open_table(IMAGES)?;
        let mut list = Vec::new();
        for entry in table.iter()? {
            let (key, bytes) = entry?;
            let manifest = Digest::from_bytes(*key.value());
            list.push((manifest, decode(TABLE, &manifest, bytes.value())));
        }
        Ok(list)
    }

    /// Writes an image's record, in the place of the one it had.
    ///
    /// # Errors
    /// An error of the database.
    pub fn put_image(&self, record: &ImageRecord) -> Result<(), StoreError> {
        let record = record.clone();
        self.write(move |draft| draft.put_image(&record))
    }

    /// Takes an image's record away. Whether there was one, readable or not.
    ///
    /// # Errors
    /// An error of the database.
    pub fn remove_image(&self, manifest: &Digest) -> Result<bool, StoreError> {
        let manifest = *manifest;
        self.write(move |draft| draft.remove_image(&manifest))
    }
}

impl Draft<'_> {
    /// As [`Store::image`].
    ///
    /// # Errors
    /// As [`Store::image`].
    pub fn image(&self, manifest: &Digest) -> Result<Option<ImageRecord>, StoreError> {
        let bytes = self.read::<Images>(manifest.as_bytes())?;
        bytes.map(|bytes| decode(TABLE, manifest, &bytes)).transpose()
    }

    /// As [`Store::put_image`].
    ///
    /// # Errors
    /// An error of the database.
    pub fn put_image(&self, record: &ImageRecord) -> Result<(), StoreError> {
        let bytes = encode(TABLE, &record.manifest, record)?;
        self.write::<Images>(record.manifest.as_bytes(), Some(bytes)).map(drop)
    }

    /// As [`Store::remove_image`].
    ///
    /// # Errors
    /// An error of the database.
    pub fn remove_image(&self, manifest: &Digest) -> Result<bool, StoreError> {
        self.write::<Images>(manifest.as_bytes(), None)
    }
}
