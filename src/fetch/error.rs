//! Why bytes of a layer could not be had.

use std::sync::Arc;
use std::time::Duration;

use crate::layer::{Digest, LayerError};
use crate::registry::RegistryError;

/// A read that failed. Shared by all who wait for one fetch, hence cloneable.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FetchError {
    /// The source could not deliver.
    #[error("layer {layer}: {source}")]
    Source {
        /// The layer.
        layer: Digest,
        /// The cause.
        source: RegistryError,
    },
    /// The source delivered bytes that are not the layer's.
    #[error("layer {layer} from {from}: {source}")]
    Corrupt {
        /// The layer.
        layer: Digest,
        /// Where the bytes came from.
        from: String,
        /// The cause.
        source: Box<LayerError>,
    },
    /// The local disk failed.
    #[error("layer {layer}: the cache on disk fails: {source}")]
    Disk {
        /// The layer.
        layer: Digest,
        /// The cause.
        source: Arc<std::io::Error>,
    },
    /// The deadline passed.
    #[error("layer {layer}: no answer within {} s", after.as_secs())]
    Deadline {
        /// The layer.
        layer: Digest,
        /// The deadline.
        after: Duration,
    },
    /// Nothing was made of what came of the layer: its blob was for somebody else alone.
    #[error("layer {layer} came for containerd alone")]
    BlobOnly {
        /// The layer.
        layer: Digest,
    },
    /// The layer was released, or the daemon ends.
    #[error("layer {layer} is closed")]
    Closed {
        /// The layer.
        layer: Digest,
    },
}
