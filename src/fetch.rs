//! The scheduler between readers and registries: one fetch per chunk however many wait for it.
//!
//! A [`LayerData`] is a live layer: its index and its bytes. Ready bytes are read on the caller's thread; missing ones are fetched
//! (coalesced into requests of about a megabyte, the most urgent first, fair between hosts and images), verified by `cache`, and then all waiters are
//! answered. No waiter is ever lost: every read ends by its deadline, with bytes or with an error.
//!
//! # How a read that misses travels
//! [`Layer::read`] (read.rs) puts the missing chunks into the layer's queue (queue.rs) and waits for their bytes. A *dispatcher* asks the
//! scheduler ([`schedule`]) for a place at the host, and plans a request only when it has one (window.rs): what was asked for meanwhile goes
//! into the same request, and what may be read next as well, unless others wait for places; of a file that is read from one end to the other,
//! what comes after that is asked for in further requests (onward.rs). The request (request.rs) hands members of the
//! body to a blocking thread as they are complete, which decodes, verifies and stores their chunks and answers who waits for each, while
//! the body still arrives.
//!
//! Streams (flights.rs, stream.rs, pipeline.rs) are for layers that have no index: one pass over the whole blob, over as many connections as
//! help (lanes.rs, width.rs), makes index and data. It also finds
//! the places where decoding can begin (spans.rs), so that evicted bytes come back in ranges. Where there are none (a single zstd
//! frame), the first read that misses an evicted byte streams the layer again (refill.rs), chunk by chunk against its index. Where a source has
//! no ranges, one pass over the blob brings all chunks that are missing (sweep.rs).
//!
//! # Outages
//! What cannot be had now, but later, fails no reader: its chunks go back into the queue, and hosts that deliver nothing are asked again
//! and again, in turns (outage.rs), until they do or nobody waits any more.
//!
//! # What is learned
//! What is read of a layer while a container starts is recorded for the next start (recording.rs). A layer of which that is known fetches
//! nothing on its own account while wishes are open ([`Layer::wish`]).
//!
//! # Whole layers
//! While nobody waits for anything, layers that are read lazily are filled (filling.rs). A layer that is complete is given to the kernel as a file ([`LayerData::local_file`]). What an earlier process left of it is verified
//! before, in the background (verify.rs).

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;

use crate::cache::Hold;
use crate::layer::{BlobIndex, Digest, LayerIndex};

mod density;
pub mod error;
mod fetcher;
mod filling;
mod flights;
mod lanes;
mod layer;
pub mod onward;
mod outage;
mod pieces;
mod pipeline;
mod queue;
mod read;
mod recording;
mod refill;
mod request;
pub mod schedule;
mod spans;
mod stream;
mod sweep;
#[cfg(test)]
mod tests;
mod verify;
mod width;
pub mod window;

pub use error::FetchError;
pub use fetcher::Fetcher;
pub use filling::{Filled, Rate};
pub use flights::{Hurried, Paused, Progress, STALL};
pub use layer::{Layer, LayerStats, Wished};
pub use recording::Recording;
pub use stream::StreamRequest;

/// A layer's data space as a file.
#[derive(Debug)]
pub struct LocalFile {
    /// Where it is. It is as long as the data space, rounded up to 4096 bytes.
    pub path: PathBuf,
    /// Keeps every byte of it in its place for as long as this lives.
    pub hold: Hold,
}

/// A layer that can be read: what the faces in `fs` serve from.
///
/// All offsets and lengths are bytes of the layer's data space ([`crate::layer::index`]).
pub trait LayerData: Send + Sync + 'static {
    /// Digest of the layer's blob.
    fn digest(&self) -> &Digest;

    /// Whose reads they are when many wait: layers of one image have one owner.
    fn owner(&self) -> String {
        self.digest().to_string()
    }

    /// What the layer's index is known by ([`crate::cache::Key`]): what tells it from other layers, also from those with the same blob.
    fn id(&self) -> &Digest {
        self.digest()
    }

    /// Where its bytes are.
    fn index(&self) -> &BlobIndex;

    /// The whole index: names and attributes too. They may have to be read from the local disk.
    ///
    /// # Errors
    /// [`FetchError::Disk`].
    fn names(&self) -> Result<Arc<LayerIndex>, FetchError>;

    /// Fills `buf` from offset `offset` if all those bytes are in the cache (holes are zeros), without waiting for anything but the
    /// local disk. `None`: some byte is missing, or must be verified first; ask [`LayerData::read`].
    fn read_ready(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>>;

    /// The `len` bytes at `offset`, fetched where they are missing.
    ///
    /// # Errors
    /// [`FetchError`] when they cannot be had, at the latest after `deadline`.
    fn read(&self, offset: u64, len: u32, deadline: Duration) -> BoxFuture<'static, Result<Bytes, FetchError>>;

    /// Bytes of the data space that are on the local disk (for statfs and Usage).
    fn present_bytes(&self) -> u64;

    /// Whether nothing has to be fetched: every chunk is on the local disk, though it may have to be verified yet.
    fn is_local(&self) -> bool {
        self.present_bytes() >= self.index().stored_size()
    }

    /// The whole data space as a local file, if all of it is there and was verified by this process. If it only has to be verified, that
    /// begins in the background, and a later call finds it. Waits for nothing but the local disk.
    fn local_file(&self) -> Option<LocalFile> {
        None
    }
}
