//! What all layers share: the gate, the limits, and the streams under way.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use super::{FetchError, Layer, Progress};
use crate::cache::{Cache, CachedLayer};
use crate::config::FetchConfig;
use crate::layer::Digest;
use crate::metrics::Metrics;
use crate::registry::Blob;
use crate::sync::{Gate, SingleFlight};

/// A blob, and the digest that its tar is promised to have.
type Promised = (Digest, Option<Digest>);

/// The scheduler. There is one per daemon.
pub struct Fetcher {
    pub(super) cache: Arc<Cache>,
    pub(super) runtime: Handle,
    pub(super) metrics: Arc<Metrics>,
    /// Limits the streams under way: those that readers wait for before those of pulls.
    pub(super) streams: Arc<Gate>,
    /// Bytes of streams between download and decompression.
    pub(super) memory: Arc<Semaphore>,
    pub(super) memory_size: usize,
    /// First passes under way, by blob and by what its tar is promised to be: a false promise fails nobody else's.
    pub(super) streaming: Arc<SingleFlight<Promised, Result<Arc<CachedLayer>, FetchError>>>,
    progress: Mutex<HashMap<Digest, Arc<Progress>>>,
    /// Limits the requests under way.
    pub(super) gate: Arc<Gate>,
    /// Lets one layer be verified at a time.
    pub(super) verifications: Arc<Semaphore>,
    /// Largest ranged request, in bytes.
    pub(super) max_request: u64,
    /// Longest time without any progress before a request is given up: it must not keep its place at the gate for ever.
    pub(super) patience: Duration,
}

impl Fetcher {
    /// A scheduler whose work is done on `runtime`.
    pub fn new(config: &FetchConfig, cache: Arc<Cache>, runtime: Handle, metrics: Arc<Metrics>) -> Arc<Fetcher> {
        let memory = usize::try_from(config.stream_memory.0).unwrap_or(usize::MAX);
        // Permits are taken as u32.
        let memory = memory.clamp(1, Semaphore::MAX_PERMITS.min(u32::MAX as usize));
        Arc::new(Fetcher {
            streams: Gate::new(config.max_concurrent_streams),
            memory: Arc::new(Semaphore::new(memory)),
            memory_size: memory,
            streaming: SingleFlight::new(),
            progress: Mutex::default(),
            cache,
            runtime,
            metrics,
            gate: Gate::new(config.max_concurrent_requests),
            verifications: Arc::new(Semaphore::new(1)),
            max_request: config.max_request.0,
            patience: config.read_deadline,
        })
    }

    /// Makes a layer in the cache readable; `blob` is where its missing bytes come from.
    pub fn open(self: &Arc<Self>, layer: Arc<CachedLayer>, blob: Arc<dyn Blob>) -> Arc<Layer> {
        Layer::new(Arc::clone(self), layer, blob)
    }

    pub(super) fn progresses(&self) -> MutexGuard<'_, HashMap<Digest, Arc<Progress>>> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
