//! containerd's face: the snapshots gRPC service.
//!
//! This room owns what containerd sees: names, kinds, labels, filters, mounts, error classes; and the directories of
//! local snapshots (`snapshots/dirs.rs` tells their layout). Which layers can be shown, and where, it asks of
//! [`Layers`]. It never touches the bytes of a layer.
//!
//! # Remote snapshots
//! A Prepare that names a chain id in the label `containerd.io/snapshot.ref` asks whether the snapshotter has, or can
//! make, the committed snapshot of that layer by itself. If so it is recorded, durably, and the answer is
//! AlreadyExists; containerd then lists the snapshots with that label and that parent, and takes the one it finds.
//! Otherwise the Prepare is an ordinary one, and containerd downloads and unpacks the layer. The committed snapshot has
//! no files of its own: its lower directory is a link to what shows the layer, made when something is made on it, because
//! only then is the layer mounted. The remote snapshots at the lower end of a chain are one directory if there is a
//! merged image of them.
//!
//! What an image may be shown of a layer depends on what it vouches for (`crate::catalog::belief`), so that the same chain id on the same parent
//! may stand for different things: one snapshot for each (rules.rs), and containerd finds the right one (handover.rs). A snapshot also knows what its
//! image believes of the layers below it where that is something else than these show: containerd asks for no layer that it has. And what
//! is made on a snapshot is shown only what all images say that have its layers (`crate::catalog::agree`).
//!
//! No lock is held while a layer is being resolved, which may take seconds. Layers are released with
//! [`Layers::retain`], and between "it is live" and "a snapshot refers to it" such a release could come. So a release waits for snapshots that
//! were being made when it began: what they refer to, and what was mounted for them, is needed only once they are recorded. Nobody waits for
//! a release: a layer that was asked for just now stays in any case, what is mounted meanwhile bears a later mark, by which it is left alone,
//! and unmounting comes after all decisions.
//!
//! # Layers that containerd fetches
//! What Lazuli leaves to containerd comes back, if containerd uses Lazuli as its differ: then it is not unpacked, but applied (differ.rs), and the
//! snapshot that containerd commits shows a layer as a remote one does.
//!
//! # Durability
//! Records are on disk before an RPC is answered, and so is the name of the directory of a committed snapshot. The
//! directories of the others, which hold nothing yet, and links to layers are made again at start if they are missing
//! (after a power cut, on a file system that does not keep the order of changes).
//!
//! Contents of files are not synced by Commit, as they are not by containerd's overlay snapshotter: Commit runs within a
//! write transaction of containerd's own, and syncing a whole file system there would stall every client. CRI's
//! `image_pull_with_sync_fs` does it where it is wanted.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::catalog::Layers;
use crate::metrics::Metrics;
use crate::proto::snapshots::v1::snapshots_server::SnapshotsServer;
use crate::store::Store;
use crate::sync::Epochs;

mod again;
mod applied;
mod chain;
mod core;
pub mod differ;
mod dirs;
mod error;
mod filters;
mod handover;
mod info;
mod limits;
mod making;
mod mapped;
#[cfg(test)]
mod model;
mod mounts;
mod rpc;
mod rules;
mod showing;
mod usage;
mod users;

pub use again::Again;
pub use differ::Differ;
pub use error::SnapshotsError;
pub use filters::{Fields, FilterError, Filters};

use self::core::Core;
use self::handover::Handover;

/// Largest message, in bytes: containerd's own limit for a proxy snapshotter.
const MAX_MESSAGE: usize = 16 << 20;

/// Active snapshots measured at once. CRI asks for all of them every ten seconds, and may not take all blocking
/// threads.
const MAX_MEASURED: usize = 4;

/// Threads that wait for commits of snapshots at once. The runtime has 512 threads that may block, and readers of layers need some of them;
/// more changes than this still share a commit with those that are queued.
const MAX_WRITERS: usize = 128;

/// The snapshots service.
#[derive(Clone)]
pub struct Service {
    core: Arc<Core>,
    layers: Arc<dyn Layers>,
    metrics: Arc<Metrics>,
    /// Inside is who has seen a layer live or mounts something for a snapshot, until that is recorded. A release waits for those who came
    /// before it.
    making: Arc<Epochs>,
    /// Held by a release, until all is let go of.
    letting_go: Arc<tokio::sync::Mutex<()>>,
    /// Whether a release of layers is due; more than one at a time would do the same.
    release_due: Arc<std::sync::atomic::AtomicBool>,
    /// What Prepares have answered, for the lists that follow.
    handover: Arc<Handover>,
    /// Permits to wait for a commit.
    writers: Arc<tokio::sync::Semaphore>,
    /// Permits to measure active snapshots.
    measuring: Arc<tokio::sync::Semaphore>,
}

impl Service {
    /// The service over the directories below `root`. It brings directories and records in step, and lets go of layers
    /// that no snapshot refers to; `layers` must have brought back its own before. It blocks: call it on a runtime's thread that may.
    ///
    /// # Errors
    /// [`SnapshotsError`] if `root` cannot be used, or the database cannot be read.
    pub fn new(
        root: &Path,
        store: Arc<Store>,
        layers: Arc<dyn Layers>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, SnapshotsError> {
        let service = Service {
            core: Arc::new(Core::open(root, store, Arc::clone(&layers), &metrics)?),
            layers,
            metrics,
            making: Epochs::new(),
            letting_go: Arc::default(),
            release_due: Arc::default(),
            handover: Arc::default(),
            writers: Arc::new(tokio::sync::Semaphore::new(MAX_WRITERS)),
            measuring: Arc::new(tokio::sync::Semaphore::new(MAX_MEASURED)),
        };
        service.release_layers(Duration::ZERO);
        Ok(service)
    }

    /// The tonic service, to be added to a server.
    pub fn into_server(self) -> SnapshotsServer<Self> {
        SnapshotsServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }
}
