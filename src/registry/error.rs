//! What can go wrong between Lazuli and a source of blobs.

use std::fmt;
use std::time::Duration;

/// What to do about a refusal that is not known better.
pub(super) const CHECK_CREDENTIALS: &str = "check the credentials for this registry";

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
    /// A file of an OCI layout cannot be read, or its disk fails.
    #[error("cannot read {path}: {what}")]
    Unreadable {
        /// The file.
        path: String,
        /// The cause.
        what: String,
    },
    /// Authentication is missing or was refused.
    #[error("{host} refuses access to {what} (HTTP {status}); {remedy}")]
    Denied {
        /// Host and port.
        host: String,
        /// What was asked for.
        what: String,
        /// 400, 401 or 403.
        status: u16,
        /// What to do about it.
        remedy: Box<Remedy>,
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

/// What to do about a refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remedy {
    /// For people, with what is wrong with the sources of credentials.
    pub text: String,
    /// Access was granted before, and may be again: how long to wait before it is asked for.
    pub again: Option<Duration>,
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl RegistryError {
    /// A refusal for good, about which `remedy` can be done.
    pub fn denied(host: String, what: String, status: u16, remedy: impl Into<String>) -> Self {
        let remedy = Remedy {
            text: remedy.into(),
            again: None,
        };
        RegistryError::Denied {
            host,
            what,
            status,
            remedy: Box::new(remedy),
        }
    }

    /// The same refusal, with how long to wait before access is asked for again.
    pub(super) fn waiting(mut self, wait: Option<Duration>) -> Self {
        if let RegistryError::Denied { remedy, .. } = &mut self {
            remedy.again = wait;
        }
        self
    }

    /// How long to wait before access is asked for that was granted before, if this refuses it.
    pub(super) fn access_again(&self) -> Option<Duration> {
        match self {
            RegistryError::Denied { remedy, .. } => remedy.again,
            _ => None,
        }
    }

    /// The remedy of a refusal.
    pub(super) fn remedy(&self) -> &str {
        match self {
            RegistryError::Denied { remedy, .. } => &remedy.text,
            _ => "",
        }
    }

    /// The same refusal, with a remedy made from the one that it has.
    pub(super) fn explained(mut self, explain: impl FnOnce(&str) -> String) -> Self {
        if let RegistryError::Denied { remedy, .. } = &mut self {
            remedy.text = explain(&remedy.text);
        }
        self
    }

    /// Whether the same request may succeed later or elsewhere.
    pub fn retry_helps(&self) -> bool {
        match self {
            RegistryError::Unreachable { .. }
            | RegistryError::Unreadable { .. }
            | RegistryError::Busy { .. }
            | RegistryError::Protocol { .. }
            | RegistryError::NoRanges { .. } => true,
            RegistryError::Status { status, .. } => *status >= 500,
            RegistryError::Denied { remedy, .. } => remedy.again.is_some(),
            RegistryError::InvalidReference { .. }
            | RegistryError::NotFound { .. }
            | RegistryError::Refused { .. }
            | RegistryError::Image { .. }
            | RegistryError::Config { .. } => false,
        }
    }
}
