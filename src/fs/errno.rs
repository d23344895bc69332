//! What a reader is told: the one place where an error of another room becomes an errno.

use std::io;
use std::time::Duration;

use fuser::Errno;

use crate::fetch::FetchError;

/// Why a read gave no bytes.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The bytes could not be had.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The bytes are said to be ready, and the disk does not give them.
    #[error("the cache on disk fails: {0}")]
    Disk(#[from] io::Error),
    /// There were fewer bytes than the layer's index says.
    #[error("{got} bytes came instead of {wanted}")]
    Short {
        /// Bytes that came.
        got: usize,
        /// Bytes that the index promises.
        wanted: usize,
    },
    /// Too many reads of the same image wait already.
    #[error("too many reads of this image wait for its registry; this one is not tried")]
    Crowded,
    /// Nothing is mounted any more through which anybody could read it.
    #[error("nobody can wait for it any more")]
    Ended,
    /// No answer came, not even that the deadline has passed.
    #[error("no answer within {} s", after.as_secs())]
    Overdue {
        /// How long the read was waited for.
        after: Duration,
    },
}

/// The errno of a failed read.
///
/// All of these are EIO: the one errno that every reader of a file is prepared for, and that none takes as an answer about the file
/// (ESTALE makes the kernel look names up again, EAGAIN and EINTR make programs spin, ETIMEDOUT they have never seen from a file).
pub fn of(error: &ReadError) -> Errno {
    match error {
        ReadError::Fetch(
            FetchError::Source { .. }
            | FetchError::Corrupt { .. }
            | FetchError::Disk { .. }
            | FetchError::Deadline { .. }
            | FetchError::BlobOnly { .. }
            | FetchError::Closed { .. },
        )
        | ReadError::Disk(_)
        | ReadError::Short { .. }
        | ReadError::Crowded
        | ReadError::Ended
        | ReadError::Overdue { .. } => Errno::EIO,
    }
}

/// Name of an errno that this room answers with, for the metric `fuse_errors_total`; `other` for all others.
pub(super) fn name(errno: Errno) -> &'static str {
    match errno {
        Errno::EIO => "EIO",
        Errno::EINVAL => "EINVAL",
        Errno::EISDIR => "EISDIR",
        Errno::ENOSYS => "ENOSYS",
        Errno::ENOTDIR => "ENOTDIR",
        Errno::ENOTTY => "ENOTTY",
        Errno::ERANGE => "ERANGE",
        Errno::EROFS => "EROFS",
        Errno::ESTALE => "ESTALE",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::Digest;

    #[test]
    fn every_failed_read_is_an_io_error() {
        let layer = Digest::of(b"layer");
        for error in [
            ReadError::Fetch(FetchError::Closed { layer }),
            ReadError::Fetch(FetchError::Deadline {
                layer,
                after: Duration::from_secs(3),
            }),
            ReadError::Disk(io::Error::from(io::ErrorKind::StorageFull)),
            ReadError::Short { got: 1, wanted: 2 },
            ReadError::Ended,
            ReadError::Overdue {
                after: Duration::from_secs(3),
            },
        ] {
            assert_eq!(of(&error), Errno::EIO, "{error}");
            assert_eq!(name(of(&error)), "EIO");
        }
    }
}
