//! Why the metadata database did not do what it was asked.

use std::fmt::Display;
use std::path::PathBuf;
use std::sync::Arc;

/// Longest part of a key that an error repeats, in characters.
const QUOTED_LEN: usize = 200;

/// An error of the metadata database.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file or its directory cannot be used.
    #[error("metadata database {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// Another process has the database open.
    #[error(
        "metadata database {path} is in use by another process: stop the other daemon, or give this one another root"
    )]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The file is not a database, or it is damaged beyond redb's repair.
    #[error(
        "metadata database {path} cannot be opened: {source}; restore a copy of it, or begin anew as docs/OPERATIONS.md says \
         (\"The database is lost\")"
    )]
    Open {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: Box<redb::DatabaseError>,
    },
    /// A newer Lazuli wrote the database.
    #[error(
        "metadata database {path} has schema {found}, and this version knows schemas up to {known}: \
         install the newer version again, or move the root directory away to begin anew"
    )]
    NewerSchema {
        /// The file.
        path: PathBuf,
        /// The schema in the file.
        found: u64,
        /// The newest schema that this program knows.
        known: u64,
    },
    /// A record cannot be decoded. Other records are not affected; asking again does not help.
    #[error("damaged record {key:?} in table {table}: {problem}")]
    Damaged {
        /// The table.
        table: &'static str,
        /// The record's key.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A layer's record names another slot than the one the layer has.
    #[error("layer {layer} has slot {actual}, not {claimed}")]
    WrongSlot {
        /// The layer's digest.
        layer: String,
        /// The slot in the record.
        claimed: u32,
        /// The layer's slot; 0 if it has none yet.
        actual: u32,
    },
    /// All numbers of a kind have been given out.
    #[error("no {what} is left: move the root directory away to begin anew")]
    Exhausted {
        /// What there is no more of.
        what: &'static str,
    },
    /// The transaction failed of which the change was a part: nothing of it is there.
    #[error("nothing was changed: {0}")]
    GivenUp(Arc<StoreError>),
    /// The change panicked; nothing of it is there.
    #[error("metadata database: a change was abandoned, because it panicked")]
    Panicked,
    /// The disk has failed, and the database could not be opened anew yet. That is tried again when something is asked next.
    #[error("metadata database {path} cannot be used, since the disk has failed: {source}")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What came of the last try.
        source: Arc<StoreError>,
    },
    /// The database is being closed.
    #[error("metadata database: it is being closed")]
    Closed,
    /// redb failed. After an error of the disk the file is opened anew when something is asked next.
    #[error("metadata database: {0}")]
    Database(Box<redb::Error>),
}

impl StoreError {
    /// A [`StoreError::Damaged`].
    pub(super) fn damaged(table: &'static str, key: &dyn Display, problem: impl Display) -> Self {
        StoreError::Damaged {
            table,
            key: key.to_string().chars().take(QUOTED_LEN).collect(),
            problem: problem.to_string(),
        }
    }
}

macro_rules! from_redb {
    ($($error:ident),*) => {
        $(impl From<redb::$error> for StoreError {
            fn from(error: redb::$error) -> Self {
                StoreError::Database(Box::new(error.into()))
            }
        })*
    };
}

from_redb!(TransactionError, TableError, StorageError, CommitError);
