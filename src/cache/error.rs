//! Why the cache on disk cannot be used.

use std::io;
use std::path::{Path, PathBuf};

use crate::layer::{Digest, LayerError};

/// An error of the cache on disk.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// A file operation failed. Trying again does not help until someone has looked at the disk.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried, as in "cannot ...".
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// There is no room: the disk or a quota is full, or the cache's own budget is, and nothing is left to evict.
    #[error("no room for {bytes} more bytes of layer {layer}: {reason}")]
    Full {
        /// The layer.
        layer: Digest,
        /// Bytes that were to be written.
        bytes: u64,
        /// Which limit was hit, and what to change.
        reason: String,
    },
    /// Another process uses this cache.
    #[error("the cache {path} is in use by another process; stop it, or choose another root")]
    InUse {
        /// The lock file.
        path: PathBuf,
    },
    /// The bytes offered are not the chunk's. They were not stored.
    #[error("chunk {chunk} of layer {layer}: {source}")]
    Corrupt {
        /// The layer.
        layer: Digest,
        /// Position of the chunk in the index.
        chunk: usize,
        /// What is wrong.
        source: Box<LayerError>,
    },
}

impl CacheError {
    /// A [`CacheError::Io`], for `map_err`.
    pub(super) fn io<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> CacheError + use<'a> {
        move |source| CacheError::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }

    /// The error number of the disk that comes closest, for those who can only pass on such a one.
    pub fn into_io(self) -> io::Error {
        let kind = match &self {
            CacheError::Io { source, .. } => source.kind(),
            CacheError::Full { .. } => io::ErrorKind::StorageFull,
            CacheError::InUse { .. } => io::ErrorKind::ResourceBusy,
            CacheError::Corrupt { .. } => io::ErrorKind::InvalidData,
        };
        io::Error::new(kind, self)
    }
}

/// Whether an error of a write says that there is no room, which is no reason to fail a read.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    )
}
