//! The metadata database: snapshots, layers, images, chains, where indexes came from. One [redb] file, `metadata.redb`, mode 0600.
//!
//! # Layout
//! | table | key | value |
//! |---|---|---|
//! | `meta` | `schema`, `next_snapshot_id`, `next_slot` | `u64` |
//! | `snapshots` | key or name of the snapshot | [`SnapshotRecord`] as JSON |
//! | `children` (multimap) | name of the parent, empty for none | keys of the snapshots on it |
//! | `layers` | id of the layer or digest of the variant, 32 bytes | [`LayerRecord`] as JSON |
//! | `slots` | id of the layer, digest of the variant or of the chain, 32 bytes | `u32`, given once and never taken back |
//! | `images` | SHA-256 of the manifest, 32 bytes | [`ImageRecord`] as JSON |
//! | `chains` | digest of the chain, 32 bytes | [`ChainRecord`] as JSON |
//! | `indexes` | id of the layer, 32 bytes | [`IndexRecord`] as JSON |
//!
//! The id of a layer is the SHA-256 of its blob if its index was built from that, and another one for each thing that somebody else said of it
//! (`crate::catalog::belief`).
//!
//! JSON, because a record is small, read rarely, and has to be readable by the next version: fields may be added with a
//! default, and tables whose records may be lost; anything else raises [`SCHEMA`] and adds a step to the migrations. (`chains` is such a
//! table: a version that does not know it leaves records behind, which the next one that does removes.)
//!
//! # Rules
//! Every change is one transaction, on disk (fsync) before the call returns. Readers see the last committed state and
//! never wait for a writer (MVCC); writers queue. Each call is short, but may wait for the disk: call it where blocking
//! is allowed. Chains of snapshots are walked in memory (lineage.rs).
//!
//! A record that cannot be decoded is an error that names it; all others stay readable. redb itself checks its pages'
//! checksums and repairs an unclean stop when the file is opened.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use redb::{Builder, Database, DatabaseError, ReadTransaction, ReadableDatabase as _, WriteTransaction};
use serde::Serialize;
use serde::de::DeserializeOwned;

mod chains;
mod error;
mod ids;
mod images;
mod indexes;
mod layers;
mod lineage;
mod schema;
mod snapshots;

use self::lineage::Lineage;

pub use chains::ChainRecord;
pub use error::StoreError;
pub use images::{ImageLayer, ImageRecord};
pub use indexes::{IndexRecord, Voucher};
pub use layers::{LayerRecord, LayerSource};
pub use schema::SCHEMA;
pub use snapshots::{Ancestor, Kind, SnapshotRecord, SnapshotsWrite, Usage, shown};

/// Memory for pages of the database, in bytes. The whole database of a busy node is a few MiB; redb's default would be
/// 1 GiB.
const PAGE_CACHE: usize = 16 << 20;

/// The open database. The file is locked: only one process can have it open.
pub struct Store {
    db: Database,
    path: PathBuf,
    lineage: Lineage,
}

impl Store {
    /// Opens the database at `path`, creating or migrating it as needed.
    ///
    /// # Errors
    /// [`StoreError`] if another process has it open, a newer Lazuli wrote it, or it cannot be read.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let io = |source| StoreError::Io {
            path: path.to_owned(),
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(io)?;
        let db = Builder::new()
            .set_cache_size(PAGE_CACHE)
            .create_file(file)
            .map_err(|source| match source {
                DatabaseError::DatabaseAlreadyOpen => StoreError::InUse { path: path.to_owned() },
                source => StoreError::Open {
                    path: path.to_owned(),
                    source: Box::new(source),
                },
            })?;
        // The name of a new file is not durable until its directory is.
        if let Some(directory) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            File::open(directory)
                .and_then(|directory| directory.sync_all())
                .map_err(io)?;
        }
        schema::prepare(&db, path)?;
        let lineage = snapshots::lineage(&db)?;
        Ok(Store {
            db,
            path: path.to_owned(),
            lineage,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn read(&self) -> Result<ReadTransaction, StoreError> {
        Ok(self.db.begin_read()?)
    }

    /// Runs `change` in a transaction of its own; an error of it, or of the commit, leaves the database as it was.
    fn write<T, E: From<StoreError>>(&self, change: impl FnOnce(&WriteTransaction) -> Result<T, E>) -> Result<T, E> {
        let transaction = self.db.begin_write().map_err(StoreError::from)?;
        match change(&transaction) {
            Ok(value) => {
                transaction.commit().map_err(StoreError::from)?;
                Ok(value)
            }
            Err(error) => {
                // The change's own error says more than one of the abort, after which redb refuses to go on anyway.
                let _ = transaction.abort();
                Err(error)
            }
        }
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

/// A record as it is stored.
fn encode<T: Serialize>(table: &'static str, key: &dyn std::fmt::Display, record: &T) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(record).map_err(|error| StoreError::damaged(table, key, error))
}

/// A stored record.
fn decode<T: DeserializeOwned>(
    table: &'static str,
    key: &dyn std::fmt::Display,
    bytes: &[u8],
) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(|error| StoreError::damaged(table, key, error))
}

#[cfg(test)]
mod tests;
