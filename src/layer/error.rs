//! Why a layer's bytes cannot be understood.

use super::Digest;

/// An error in the bytes of a layer: what is wrong, and where. None of these goes away by trying again, except where the bytes
/// were damaged on their way ([`LayerError::DigestMismatch`] and [`LayerError::Truncated`]).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayerError {
    /// The bytes break the rules of their format.
    #[error("malformed {format} at {offset}: {what}")]
    Malformed {
        /// Which format: `tar`, `gzip`, `zstd`, `eStargz footer`, `zstd:chunked footer`, `TOC`, `layer index`.
        format: &'static str,
        /// Where in that format's own byte stream, or which entry.
        offset: u64,
        /// What is wrong.
        what: String,
    },
    /// The bytes end too early.
    #[error("{format} ends after {length} bytes, in the middle of {what}")]
    Truncated {
        /// Which format.
        format: &'static str,
        /// Bytes there were.
        length: u64,
        /// What was being read.
        what: String,
    },
    /// A stated limit would be exceeded.
    #[error("{what} is {value}, over the limit of {limit}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The limit it exceeds.
        limit: u64,
    },
    /// The bytes are not the ones the image names.
    #[error("{what} has digest {actual}, expected {expected}")]
    DigestMismatch {
        /// Which bytes.
        what: &'static str,
        /// The digest that the manifest, config or TOC states.
        expected: Digest,
        /// The digest of the bytes received.
        actual: Digest,
    },
    /// The format is known, and Lazuli does not read it.
    #[error("{what} is not supported")]
    Unsupported {
        /// What is not supported.
        what: String,
    },
}

impl LayerError {
    /// A [`LayerError::Malformed`].
    pub fn malformed(format: &'static str, offset: u64, what: impl Into<String>) -> Self {
        LayerError::Malformed {
            format,
            offset,
            what: what.into(),
        }
    }

    /// Whether the same bytes, fetched again or from elsewhere, may be good.
    pub fn retry_helps(&self) -> bool {
        matches!(self, LayerError::DigestMismatch { .. } | LayerError::Truncated { .. })
    }
}
