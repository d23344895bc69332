//! A system call that failed.

use std::io;
use std::path::{Path, PathBuf};

/// Which call failed, on what, and why. Whether a retry helps is for the caller to tell from the kind of [`SysError::source`].
#[derive(Debug, thiserror::Error)]
#[error("{call} {}: {source}{}", path.display(), detail(message))]
pub struct SysError {
    /// The system call, with the argument that tells it from others: `fsconfig(lowerdir+)`.
    pub call: &'static str,
    /// The path it was about.
    pub path: PathBuf,
    /// The cause.
    pub source: io::Error,
    /// What the kernel says about it beyond the error number; usually empty.
    pub message: String,
}

fn detail(message: &str) -> String {
    match message {
        "" => String::new(),
        message => format!(" ({message})"),
    }
}

impl SysError {
    /// `call` failed on `path` because of `source`.
    pub fn new(call: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        SysError {
            call,
            path: path.to_owned(),
            source: source.into(),
            message: String::new(),
        }
    }
}
