//! Which layers are live: from the labels or chain id of a pull to an image, its layers, their indexes and their place in the FUSE
//! tree; brought back at start, released when no snapshot needs them. It never blocks a reader.

use std::collections::HashMap;
use std::path::PathBuf;

use futures::future::BoxFuture;

use crate::layer::Digest;

/// A layer that containerd asks for: one `Prepare` with `containerd.io/snapshot.ref`.
#[derive(Debug, Clone)]
pub struct LayerRequest {
    /// containerd namespace, from the snapshot key.
    pub namespace: String,
    /// Chain id of the layer (`containerd.io/snapshot.ref`).
    pub chain_id: String,
    /// All labels of the request.
    pub labels: HashMap<String, String>,
}

/// What became of a [`LayerRequest`].
#[derive(Debug, Clone)]
pub enum Resolution {
    /// Lazuli serves the layer.
    Live(Digest),
    /// containerd has to unpack it; the text says why Lazuli does not.
    Refused(String),
}

/// What `snapshots` needs to know of layers. (`catalog::Catalog` implements it; tests use a fake.)
pub trait Layers: Send + Sync + 'static {
    /// Makes the layer live if it can be, waiting for its index (and for its bytes, where it has to be streamed). The layer stays
    /// live at least until the next [`Layers::retain`] that does not name it.
    fn resolve(&self, request: LayerRequest) -> BoxFuture<'_, Resolution>;

    /// The directory that shows a live layer, or `None` if it is not live. Never waits for the network.
    fn path(&self, layer: &Digest) -> Option<PathBuf>;

    /// Bytes and inodes that a live layer uses on the local disk now.
    fn usage(&self, layer: &Digest) -> Option<(u64, u64)>;

    /// Tells which layers committed snapshots refer to; all others may be released. Called after removals, and at start.
    fn retain(&self, layers: Vec<Digest>) -> BoxFuture<'_, ()>;
}
