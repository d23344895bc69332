//! The status document: what `lazuli status`, `GET /status` and the end of `lazuli pull` tell.

use serde::{Deserialize, Serialize};

/// Everything the daemon serves now.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    /// Its root directory.
    pub root: String,
    /// Bytes of layer data on disk.
    pub cache_bytes: u64,
    /// Most bytes it may keep; 0 means as many as the disk allows.
    pub cache_max_bytes: u64,
    /// Images that were pulled through Lazuli.
    pub images: Vec<ImageStatus>,
    /// Layers that are live.
    pub layers: Vec<LayerStatus>,
    /// Layers that are being made live at this moment.
    pub loading: Vec<LoadingStatus>,
}

/// One image.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ImageStatus {
    /// Name under which it was pulled, where containerd told it.
    pub name: String,
    /// containerd namespace.
    pub namespace: String,
    /// Digest of its manifest.
    pub manifest: String,
    /// Its layers from the lowest up.
    pub layers: Vec<ImageLayerStatus>,
}

/// One layer of an image.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ImageLayerStatus {
    /// Digest of its blob.
    pub digest: String,
    /// Whether Lazuli serves it.
    pub live: bool,
    /// Why Lazuli does not serve it, if that was tried.
    pub refused: Option<String>,
}

/// One live layer.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct LayerStatus {
    /// Digest of its blob.
    pub digest: String,
    /// `estargz`, or `stream` with its compression: how its bytes are had.
    pub format: String,
    /// Whether single ranges of it can be fetched.
    pub lazy: bool,
    /// Bytes of its blob in the registry.
    pub blob_bytes: u64,
    /// Uncompressed bytes that it stores.
    pub total_bytes: u64,
    /// How many of them are on the local disk.
    pub present_bytes: u64,
    /// Requests made for its content since the daemon started.
    pub requests: u64,
    /// Bytes fetched for its content since the daemon started.
    pub fetched_bytes: u64,
}

/// One layer on its way.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct LoadingStatus {
    /// Digest of its blob.
    pub digest: String,
    /// Bytes of its blob.
    pub blob_bytes: u64,
    /// How many of them have arrived.
    pub received_bytes: u64,
}
