//! The metadata database: snapshots, layers, images, chains, where indexes came from, traces. One [redb] file, `metadata.redb`, mode 0600.
//!
//! # Layout
//! | table | key | value |
//! |---|---|---|
//! | `meta` | `schema`, `next_snapshot_id`, `next_slot` | `u64` |
//! | `snapshots` | key or name of the snapshot | [`SnapshotRecord`] as JSON |
//! | `children` (multimap) | name of the parent, empty for none | keys of the snapshots on it |
//! | `layers` | id of the layer or digest of the variant, 32 bytes | [`LayerRecord`] as JSON |
//! | `slots` | id of the layer, digest of the variant or of the chain, 32 bytes | `u32`; goes with the record, and is never given again |
//! | `images` | SHA-256 of the manifest, 32 bytes | [`ImageRecord`] as JSON |
//! | `chains` | digest of the chain, 32 bytes | [`ChainRecord`] as JSON |
//! | `indexes` | id of the layer, 32 bytes | [`IndexRecord`] as JSON |
//! | `traces` | repository, manifest, entry point: digests of 32 bytes each | time and trace (traces.rs) |
//!
//! The id of a layer is the SHA-256 of its blob if its index was built from that, and another one for each thing that somebody else said of it
//! (`crate::catalog::belief`).
//!
//! JSON, because a record is small, read rarely, and has to be readable by the next version: fields may be added with a
//! default, and tables whose records may be lost; anything else raises [`SCHEMA`] and adds a step to the migrations. (`chains` and `traces` are such
//! tables: a version that does not know it leaves records behind, which the next one that does removes.)
//!
//! # Rules
//! Every change is on disk (fsync) before the call returns, as a whole or not at all. One thread writes (writer.rs): what is
//! queued while it waits for the disk is committed together. Readers see the last committed state and never wait for the writer
//! (MVCC). Each call may wait for the disk: call it where blocking is allowed, which a debug build checks; tasks use
//! [`Store::change`]. Chains of snapshots are walked in memory (lineage.rs).
//!
//! The writer's thread waits for nobody: a change must not take a lock under which somebody waits for the store.
//!
//! Nothing only grows: [`Store::forget_layers`], [`Store::forget_images`] and [`Store::forget_traces`] take away what nothing refers to (forget.rs), and a
//! file that is mostly free pages is made smaller when it is opened.
//!
//! A record that cannot be decoded is an error that names it; all others stay readable. redb itself checks its pages'
//! checksums and repairs an unclean stop when the file is opened. After the disk has failed, the file is opened anew (backend.rs).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::{Database, ReadTransaction, ReadableDatabase as _, StorageBackend};
use serde::Serialize;
use serde::de::DeserializeOwned;

mod backend;
mod chains;
mod draft;
mod error;
mod forget;
mod ids;
mod images;
mod indexes;
mod layers;
mod lineage;
mod schema;
mod snapshots;
mod traces;
mod writer;

use self::backend::{Access, Opened, Opener, Opening};
use self::lineage::Lineage;
use self::writer::Writer;
use crate::metrics::Metrics;
use crate::sync::{may_block, wait};

pub use backend::is_blank;
pub use chains::{ChainRecord, ChainRole};
pub use draft::Draft;
pub use error::StoreError;
pub use images::{ImageLayer, ImageRecord};
pub use indexes::{IndexRecord, Voucher};
pub use layers::{LayerRecord, LayerSource};
pub use schema::SCHEMA;
pub use snapshots::{Ancestor, EXTRACTION, Kind, SnapshotRecord, SnapshotsWrite, Usage, shown};
pub use traces::ENTRIES_MAX;

/// A file of at least this size, in bytes, is looked at when it is opened: whether most of it is free.
const COMPACT_FROM: u64 = 4 << 20;
/// It is compacted if less than one in so many bytes of it is in use: that takes as long as writing what is in use, and several commits.
const COMPACT_PART: u64 = 4;

/// The open database. The file is locked: only one process can have it open. Dropped, it first writes what is queued.
pub struct Store {
    inner: Arc<Inner>,
    writer: Writer,
    path: PathBuf,
}

/// What readers and the writer share.
struct Inner {
    access: Access,
    lineage: Lineage,
    metrics: Arc<Metrics>,
}

impl Inner {
    /// Opens the database anew if the disk has failed. The caller must not be writing.
    fn renew(&self) -> Result<(), StoreError> {
        self.access.renew(&|db| {
            // What was in it may have come to the disk although its commit failed.
            self.lineage.replace(snapshots::known(db)?);
            Ok(())
        })
    }

    fn begin_read(&self) -> Result<ReadTransaction, StoreError> {
        // If that does not work, what is in memory may be enough.
        let renewed = self.renew();
        match self.access.with(Database::begin_read)? {
            Ok(transaction) => Ok(transaction),
            Err(error) => renewed.and(Err(error.into())),
        }
    }
}

impl Store {
    /// Opens the database at `path`, creating or migrating it as needed; nobody sees its metrics.
    ///
    /// # Errors
    /// [`StoreError`] if another process has it open, a newer Lazuli wrote it, or it cannot be read.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_counted(path, Arc::new(Metrics::new()))
    }

    /// Opens the database at `path`, creating, migrating or compacting it as needed.
    ///
    /// # Errors
    /// [`StoreError`] if another process has it open, a newer Lazuli wrote it, or it cannot be read.
    pub fn open_counted(path: &Path, metrics: Arc<Metrics>) -> Result<Self, StoreError> {
        let file = path.to_owned();
        Self::open_on(move || backend::file(&file), path, metrics)
    }

    /// Opens the database in what `backend` opens, now and after each failure of the disk. `path` is for errors.
    fn open_on<B: StorageBackend>(
        backend: impl Fn() -> Result<B, StoreError> + Send + Sync + 'static,
        path: &Path,
        metrics: Arc<Metrics>,
    ) -> Result<Self, StoreError> {
        may_block();
        let name = path.to_owned();
        let opener: Opener = Box::new(move || {
            let (backend, name) = (backend()?, name.clone());
            Ok(Box::new(move || Opened::on(backend, &name)) as Opening)
        });
        let mut opened = opener()?()?;
        schema::prepare(&opened.db, path)?;
        compact(&mut opened.db, path);
        let lineage = Lineage::new(snapshots::known(&opened.db)?);
        let access = Access::new(opener, opened, path);
        let inner = Arc::new(Inner {
            access,
            lineage,
            metrics,
        });
        let writer = Writer::start(Arc::clone(&inner)).map_err(|source| StoreError::Io {
            path: path.to_owned(),
            source,
        })?;
        Ok(Store {
            inner,
            writer,
            path: path.to_owned(),
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn read(&self) -> Result<ReadTransaction, StoreError> {
        may_block();
        self.inner.begin_read()
    }

    /// Makes `work` happen in one transaction, or not at all, and waits until it is on disk. It runs on the writer's thread, so that it must be
    /// short and take no lock under which somebody waits for the store. What it finds unchanged is not written. Once it is queued it
    /// is run, also if this future is dropped.
    ///
    /// # Errors
    /// What `work` answers, or an error of the database.
    pub async fn change<T, E, W>(&self, work: W) -> Result<T, E>
    where
        W: FnOnce(&Draft<'_>) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
    {
        self.writer.change(work).await
    }

    /// [`Store::change`] on a thread that may block.
    fn write<T, E, W>(&self, work: W) -> Result<T, E>
    where
        W: FnOnce(&Draft<'_>) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
    {
        wait(self.change(work))
    }
}

/// Makes a file smaller that is mostly free pages. That it cannot be done is no reason not to use it.
fn compact(db: &mut Database, path: &Path) {
    let size = || path.metadata().map_or(0, |metadata| metadata.len());
    let before = size();
    if before < COMPACT_FROM {
        return;
    }
    let used = || {
        let transaction = db.begin_write().ok()?;
        let stats = transaction.stats().ok()?;
        let bytes = stats.stored_bytes().saturating_add(stats.metadata_bytes());
        transaction.abort().ok().map(|()| bytes)
    };
    if used().is_none_or(|used| used.saturating_mul(COMPACT_PART) > before) {
        return;
    }
    match db.compact() {
        Ok(_) => tracing::info!(path = %path.display(), before, now = size(), "the metadata database is compacted"),
        Err(error) => tracing::warn!(%error, path = %path.display(), "the metadata database cannot be compacted"),
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
