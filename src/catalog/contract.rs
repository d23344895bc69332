//! What `snapshots` may ask of layers, and what it is answered. [`Catalog`](super::Catalog) answers; tests do without one.

use std::collections::{HashMap, HashSet};

use futures::future::BoxFuture;

use super::chains::Lowers;
use super::loader::{LayerSpec, Refusal};
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
    /// Of the snapshots below, the lowest first: whether Lazuli shows a layer in its place.
    pub below: Vec<bool>,
    /// Chain ids of layers that containerd is fetching and unpacking by itself.
    pub unpacking: HashSet<String>,
}

/// A layer that containerd has fetched, and has applied to a snapshot.
#[derive(Debug, Clone)]
pub struct Application {
    /// containerd namespace of the snapshot.
    pub namespace: String,
    /// Chain id that the snapshot will have.
    pub chain_id: String,
    /// What containerd says of the blob; not what the tar's digest is: containerd compares that itself.
    pub spec: LayerSpec,
    /// What the snapshots below show, the lowest first: layers or variants; `None` for what containerd has unpacked.
    pub below: Vec<Option<Digest>>,
}

/// What came of an [`Application`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// The layer to be shown, or a variant of it.
    pub layer: Digest,
    /// Digest of its tar.
    pub tar: Digest,
    /// Bytes of its tar, and of what its sparse files are expanded to.
    pub tar_size: u64,
    /// Whether it and all below it were found to be certain tars, so that it is the same for everybody.
    pub proven: bool,
    /// Whether it is the topmost one of an image: containers will be made on it.
    pub is_top: bool,
}

/// What became of a [`LayerRequest`].
#[derive(Debug, Clone)]
pub enum Resolution {
    /// Lazuli serves the layer.
    Live {
        /// Its id, or the digest of a variant of it.
        layer: Digest,
        /// The layers below it as its image sees them, the lowest first, in the same way; `None` for what Lazuli does not serve.
        below: Vec<Option<Digest>>,
        /// Whether all of them were found to be what the image promises, so that every image that promises the same may share them.
        proven: bool,
        /// Whether it is the topmost one of its image: containers will be made on it.
        is_top: bool,
    },
    /// containerd has to unpack it; the text says why Lazuli does not.
    Refused(String),
}

/// A container that is being made on layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Start {
    /// Key of its snapshot, as containerd gave it: `<namespace>/<number>/<key>`.
    pub key: String,
    /// Chain id of the topmost layer.
    pub chain_id: String,
    /// What is shown of it, the lowest first, without what containerd has unpacked.
    pub layers: Vec<Digest>,
}

/// What `snapshots` needs to know of layers. ([`Catalog`] implements it; tests use a fake.)
pub trait Layers: Send + Sync + 'static {
    /// Makes the layer live if it can be, waiting for its index (and for its bytes, where it has to be streamed), but for a few seconds at
    /// the most: what is not there by then is refused. The layer stays live at least until the next [`Layers::retain`] that does not name it.
    fn resolve(&self, request: LayerRequest) -> BoxFuture<'_, Resolution>;

    /// Makes a layer live whose blob containerd has, from that blob alone. It stays live as after [`Layers::resolve`].
    ///
    /// # Errors
    /// Why it cannot be shown: containerd has to unpack it.
    fn apply(&self, application: Application) -> BoxFuture<'_, Result<Applied, Refusal>>;

    /// What may be shown to a container if several images of its namespace have the same chain of layers, and do not believe the same of them.
    /// Asks containerd, and may wait for a layer, both for a few seconds.
    fn agree(&self, question: Question) -> BoxFuture<'_, Agreement>;

    /// Whether Lazuli shows the layer.
    fn is_live(&self, layer: &Digest) -> bool;

    /// The directories that show live layers, topmost first and each once; mounted now if they are not. They stay until a
    /// [`Layers::retain`] with a later [mark](Layers::mark) that does not name these layers as a base. Never waits for the network; blocks
    /// for mount calls. `merged`: as few of them as there are for these layers, and more are made for the next time; otherwise one for each.
    ///
    /// # Errors
    /// The layer that is not live.
    fn lowers(&self, layers: &[Digest], merged: bool) -> Result<Lowers, Digest>;

    /// Tells that containers will be made on these layers, topmost first. Waits for nothing.
    fn expect(&self, layers: &[Digest]);

    /// Tells that a container is being made, so that it can be learned what it reads. Waits for nothing.
    fn starting(&self, _: Start) {}

    /// Tells that the snapshot with this key is gone. Waits for nothing.
    fn removed(&self, _: &str) {}

    /// Tells who has unpacked, or is to unpack, the last layer that was left to containerd: whether Lazuli's differ was asked, or containerd did it by
    /// itself. Waits for nothing.
    fn differ_was_asked(&self, _: bool) {}

    /// Why directories that [`Layers::lowers`] gives cannot be mounted with mapped owners, if they cannot.
    fn no_mapped_owners(&self) -> Option<String>;

    /// Bytes and inodes that a live layer uses on the local disk now.
    fn usage(&self, layer: &Digest) -> Option<(u64, u64)>;

    /// A mark in time: what [`Layers::lowers`] gives out from now on is later.
    fn mark(&self) -> u64;

    /// Tells what is needed; layers that are not may be released, and what was last given out before `mark` may be unmounted. Called after
    /// removals, and at start. Decides quickly; what takes long is left to the answer.
    fn retain(&self, needed: Needed, mark: u64) -> BoxFuture<'_, Released>;
}

/// What a release has decided and not done yet. It blocks for unmount calls and for the disk.
pub type Released = Box<dyn FnOnce() + Send>;

/// What containers are about to be made on.
#[derive(Debug, Clone)]
pub struct Question {
    /// containerd namespace of the container.
    pub namespace: String,
    /// Chain id of the topmost layer.
    pub chain_id: String,
    /// The layers that would be shown, the lowest first; `None` for those that containerd has unpacked.
    pub shown: Vec<Option<Digest>>,
}

/// What the images say that hold a chain of layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Agreement {
    /// Nobody objects to what would be shown.
    Shown,
    /// They agree on this alone.
    Instead(Vec<Option<Digest>>),
    /// Not yet on anything; the text says who says what.
    Open(String),
}

/// What snapshots need of layers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needed {
    /// Layers that committed snapshots refer to.
    pub layers: Vec<Digest>,
    /// Of each active snapshot and each view on remote ones, the layers that it was made on, as they were given to [`Layers::lowers`].
    pub bases: Vec<Vec<Digest>>,
}
