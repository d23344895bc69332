//! Why the cache on disk cannot be used.

use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

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

/// Errors of a disk or file system that has lost what it was given: what was stored there will be no better when it is asked for once more.
const LOST: [Errno; 8] = [
    Errno::IO,
    // The file system has found itself wrong (EFSCORRUPTED), or a checksum of its own (EFSBADCRC).
    Errno::UCLEAN,
    Errno::BADMSG,
    Errno::NODATA,
    Errno::REMOTEIO,
    Errno::ILSEQ,
    // Something else has the name.
    Errno::ISDIR,
    Errno::NOTDIR,
];

/// Whether an error of a read says that what should be there is lost: it is not there, cannot be read, or is something else. Then it is fetched
/// again. Other errors (no more open files, no memory, no right) say nothing of what is on the disk.
pub(super) fn is_damage(error: &io::Error) -> bool {
    let kinds = [
        io::ErrorKind::NotFound,
        io::ErrorKind::UnexpectedEof,
        io::ErrorKind::InvalidData,
    ];
    kinds.contains(&error.kind()) || Errno::from_io_error(error).is_some_and(|errno| LOST.contains(&errno))
}

/// Whether an error of a write says that there is no room, which is no reason to fail a read.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    )
}
