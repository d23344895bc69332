//! Why a snapshots RPC failed, and which gRPC status says so.
//!
//! containerd tells its error classes by the status code, and trims `": <class text>"` from the end of the message, so
//! every message ends with the text of its class.

use std::path::{Path, PathBuf};

use tonic::{Code, Status};

use super::filters::FilterError;
use crate::layer::Digest;
use crate::store::StoreError;
use crate::sys::SysError;

/// Longest part of a key that an error repeats, in characters: a message travels in an HTTP/2 header, and keys have no
/// limit.
const QUOTED_LEN: usize = 256;

/// An error of the snapshots service.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotsError {
    /// There is no such snapshot.
    #[error("snapshot {key:?} does not exist")]
    NotFound {
        /// Key or name.
        key: String,
    },
    /// The parent does not exist.
    #[error("parent snapshot {parent:?} does not exist")]
    ParentNotFound {
        /// Name.
        parent: String,
    },
    /// The key or name is taken.
    #[error("snapshot {key:?} exists")]
    AlreadyExists {
        /// Key or name.
        key: String,
    },
    /// The layer that was asked for is there: what containerd wants to hear of a remote snapshot.
    #[error("target snapshot {chain_id:?} is present as {name:?}")]
    TargetExists {
        /// Chain id.
        chain_id: String,
        /// Name of the committed snapshot.
        name: String,
    },
    /// The parent is not committed.
    #[error("parent snapshot {parent:?} is not committed")]
    ParentNotCommitted {
        /// Name.
        parent: String,
    },
    /// The request makes no sense.
    #[error("{problem}")]
    Invalid {
        /// What is wrong.
        problem: String,
    },
    /// A list filter cannot be parsed.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The snapshot is not in the state that the request needs.
    #[error("{problem}")]
    Precondition {
        /// What is the case, and what would have to be.
        problem: String,
    },
    /// The layer of a remote snapshot cannot be shown now. The daemon's log says why; a later try may succeed.
    #[error("layer {layer} of snapshot {key:?} is not available")]
    NotLive {
        /// Digest of the layer.
        layer: Digest,
        /// Name of the snapshot.
        key: String,
    },
    /// containerd has been told that this snapshotter can give a snapshot its parent when it is committed.
    #[error(
        "layer {chain_id:?} is asked for without those below it, which would be lost: take \"rebase\" out of the capabilities of this snapshotter \
         in containerd's configuration"
    )]
    Rebase {
        /// Its chain id.
        chain_id: String,
    },
    /// Images do not agree on what is to be shown. A later try may succeed.
    #[error("{problem}")]
    Disagreement {
        /// Who says what.
        problem: String,
    },
    /// The snapshot asks for mapped owners, which this machine cannot show.
    #[error(
        "owners cannot be mapped for snapshot {key:?}: {reason} (say capabilities = [\"only-remap-ids\"] for this snapshotter in \
         containerd's configuration)"
    )]
    NoMappedOwners {
        /// Key.
        key: String,
        /// Why.
        reason: String,
    },
    /// The kernel failed at what showing mapped owners takes.
    #[error("owners cannot be mapped: {0}")]
    Mapping(#[from] SysError),
    /// The file system failed at limiting the size of a snapshot, though it can.
    #[error("its size cannot be limited: {0}")]
    Limit(#[source] SysError),
    /// The root directory cannot be used.
    #[error("root directory {path}: {problem}")]
    Root {
        /// The directory.
        path: PathBuf,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// The file system failed.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The metadata database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The operation ended without a result: it panicked, or the daemon is stopping.
    #[error("the operation was abandoned: {0}")]
    Abandoned(#[from] tokio::task::JoinError),
    /// A bug: the log has where.
    #[error("{rpc} failed because of a bug in Lazuli")]
    Panicked {
        /// The request.
        rpc: &'static str,
    },
}

impl SnapshotsError {
    pub(super) fn not_found(key: &str) -> Self {
        SnapshotsError::NotFound { key: quoted(key) }
    }

    pub(super) fn already_exists(key: &str) -> Self {
        SnapshotsError::AlreadyExists { key: quoted(key) }
    }

    pub(super) fn parent_not_found(parent: &str) -> Self {
        SnapshotsError::ParentNotFound { parent: quoted(parent) }
    }

    pub(super) fn parent_not_committed(parent: &str) -> Self {
        SnapshotsError::ParentNotCommitted { parent: quoted(parent) }
    }

    pub(super) fn invalid(problem: impl Into<String>) -> Self {
        SnapshotsError::Invalid {
            problem: problem.into(),
        }
    }

    pub(super) fn precondition(problem: impl Into<String>) -> Self {
        SnapshotsError::Precondition {
            problem: problem.into(),
        }
    }

    /// For `map_err`: the failure of `action` on `path`.
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| SnapshotsError::Io { action, path, source }
    }

    /// The gRPC status code that containerd turns into its error class.
    pub fn code(&self) -> Code {
        match self {
            SnapshotsError::NotFound { .. } | SnapshotsError::ParentNotFound { .. } => Code::NotFound,
            SnapshotsError::AlreadyExists { .. } | SnapshotsError::TargetExists { .. } => Code::AlreadyExists,
            SnapshotsError::ParentNotCommitted { .. } | SnapshotsError::Invalid { .. } | SnapshotsError::Filter(_) => {
                Code::InvalidArgument
            }
            SnapshotsError::Precondition { .. }
            | SnapshotsError::NoMappedOwners { .. }
            | SnapshotsError::Rebase { .. } => Code::FailedPrecondition,
            SnapshotsError::NotLive { .. } | SnapshotsError::Disagreement { .. } => Code::Unavailable,
            SnapshotsError::Io { source, .. }
            | SnapshotsError::Mapping(SysError { source, .. })
            | SnapshotsError::Limit(SysError { source, .. })
                if is_full(source) =>
            {
                Code::ResourceExhausted
            }
            SnapshotsError::Store(StoreError::Damaged { .. }) => Code::DataLoss,
            SnapshotsError::Store(StoreError::Exhausted { .. }) => Code::ResourceExhausted,
            SnapshotsError::Root { .. }
            | SnapshotsError::Io { .. }
            | SnapshotsError::Mapping(_)
            | SnapshotsError::Limit(_)
            | SnapshotsError::Store(_)
            | SnapshotsError::Abandoned(_)
            | SnapshotsError::Panicked { .. } => Code::Internal,
        }
    }
}

impl From<SnapshotsError> for Status {
    fn from(error: SnapshotsError) -> Self {
        let code = error.code();
        Status::new(code, format!("{error}: {}", class_text(code)))
    }
}

/// A key as messages repeat it.
pub(super) fn quoted(key: &str) -> String {
    match key.char_indices().nth(QUOTED_LEN) {
        Some((end, _)) => format!("{}...", key.get(..end).unwrap_or_default()),
        None => key.to_owned(),
    }
}

fn is_full(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded
    )
}

/// containerd's text of an error class.
fn class_text(code: Code) -> &'static str {
    match code {
        Code::NotFound => "not found",
        Code::AlreadyExists => "already exists",
        Code::InvalidArgument => "invalid argument",
        Code::FailedPrecondition => "failed precondition",
        Code::Unavailable => "unavailable",
        Code::ResourceExhausted => "resource exhausted",
        Code::DataLoss => "data loss",
        Code::Internal => "internal",
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_end_with_containerds_text_of_their_class() {
        let cases = [
            (SnapshotsError::not_found("k"), Code::NotFound, "not found"),
            (
                SnapshotsError::already_exists("k"),
                Code::AlreadyExists,
                "already exists",
            ),
            (
                SnapshotsError::parent_not_committed("k"),
                Code::InvalidArgument,
                "invalid argument",
            ),
            (
                SnapshotsError::precondition("p"),
                Code::FailedPrecondition,
                "failed precondition",
            ),
            (
                SnapshotsError::NotLive {
                    layer: Digest::of(b""),
                    key: "k".to_owned(),
                },
                Code::Unavailable,
                "unavailable",
            ),
            (
                SnapshotsError::io("write", Path::new("/x"))(std::io::ErrorKind::StorageFull.into()),
                Code::ResourceExhausted,
                "resource exhausted",
            ),
        ];
        for (error, code, text) in cases {
            let status = Status::from(error);
            assert_eq!(status.code(), code);
            assert!(status.message().ends_with(&format!(": {text}")), "{status}");
        }
    }

    #[test]
    fn huge_keys_do_not_make_huge_messages() {
        let status = Status::from(SnapshotsError::not_found(&"é".repeat(1 << 20)));
        assert!(status.message().len() < 4 * QUOTED_LEN, "{}", status.message().len());
    }
}
