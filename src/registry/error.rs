//! What can go wrong between Lazuli and a source of blobs.

use std::time::Duration;

/// An error of a registry or an OCI layout. It names the host or the path; it never holds credentials.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RegistryError {
    /// The reference cannot be parsed.
    #[error("{reference:?} is not an image reference: {what}")]
    InvalidReference {
        /// The text given.
        reference: String,
        /// What is wrong with it.
        what: String,
    },
    /// The host or path could not be reached, or the connection broke.
    #[error("cannot reach {host}: {what}")]
    Unreachable {
        /// Host and port, or path.
        host: String,
        /// The cause.
        what: String,
    },
    /// Authentication is missing or was refused.
    #[error("{host} refuses access to {what} (HTTP {status}); check the credentials for this registry")]
    Denied {
        /// Host and port.
        host: String,
        /// What was asked for.
        what: String,
        /// 401 or 403.
        status: u16,
    },
    /// There is no such manifest or blob.
    #[error("{host} has no {what}")]
    NotFound {
        /// Host and port, or path.
        host: String,
        /// What was asked for.
        what: String,
    },
    /// The registry asks to be left alone for a while.
    #[error("{host} asks to wait before {what} is requested again (HTTP {status})")]
    Busy {
        /// Host and port.
        host: String,
        /// What was asked for.
        what: String,
        /// 429 or 503.
        status: u16,
        /// How long, if it said so.
        retry_after: Option<Duration>,
    },
    /// The registry does not take what is written to it.
    #[error("{host} does not take {what} (HTTP {status}): {problem}")]
    Refused {
        /// Host and port.
        host: String,
        /// What was written or deleted.
        what: String,
        /// HTTP status.
        status: u16,
        /// Why, as far as it can be told, and what the registry says.
        problem: String,
    },
    /// Any other answer that is not a success.
    #[error("{host} answers {status} to {what}")]
    Status {
        /// Host and port.
        host: String,
        /// What was asked for.
        what: String,
        /// HTTP status.
        status: u16,
    },
    /// The answer is not what the protocol promises: a wrong Content-Range, a body too short or too long, a bad digest.
    #[error("{host} sent a wrong answer to {what}: {problem}")]
    Protocol {
        /// Host and port, or path.
        host: String,
        /// What was asked for.
        what: String,
        /// What is wrong.
        problem: String,
    },
    /// The host has the blob, but no parts of it: read as a whole, it can be had.
    #[error("{host} has no ranges of what was asked for ({what}); the blob has to be read as a whole")]
    NoRanges {
        /// Host and port.
        host: String,
        /// What was asked for.
        what: String,
    },
    /// The source delivered, and what it delivered is not an image that Lazuli can use.
    #[error("{what} cannot be used: {problem}")]
    Image {
        /// Which manifest, index or config.
        what: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A configuration file (hosts.toml, config.json, a certificate) cannot be used.
    #[error("{path}: {problem}")]
    Config {
        /// The file.
        path: String,
        /// What is wrong, and what to do.
        problem: String,
    },
}

impl RegistryError {
    /// Whether the same request may succeed later or elsewhere.
    pub fn retry_helps(&self) -> bool {
        match self {
            RegistryError::Unreachable { .. }
            | RegistryError::Busy { .. }
            | RegistryError::Protocol { .. }
            | RegistryError::NoRanges { .. } => true,
            RegistryError::Status { status, .. } => *status >= 500,
            RegistryError::InvalidReference { .. }
            | RegistryError::Denied { .. }
            | RegistryError::NotFound { .. }
            | RegistryError::Refused { .. }
            | RegistryError::Image { .. }
            | RegistryError::Config { .. } => false,
        }
    }
}
