//! The names and attributes of layers, which leave memory when nobody asks for them.
//!
//! Most of an index are names, and with the image face they are needed to write the layer's metadata, and when something is made of
//! several layers; after that the kernel has them. So a layer keeps in memory where its bytes are ([`crate::layer::index::BlobIndex`]), and of
//! the rest what was used last: it goes after [`IDLE`], and earlier, least recently used first, when all layers' names together take more than
//! [`MAX_BYTES`]; never while somebody has it. It is read again from the file `index`, which never changes while the layer is there: if it is
//! another file than it was, or cannot be read, that is an error for who asks, and the layer is made again when it is opened the next time.

use std::fs;
use std::io;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;

use super::{Cache, CacheError, CachedLayer};
use crate::layer::{Digest, LayerIndex};
use crate::sync::primitives::{AtomicBool, AtomicU64, Mutex, Ordering};
use crate::sys::malloc;

/// How long names stay that nobody asks for: longer than the pauses in what a tree face is asked.
const IDLE: Duration = Duration::from_secs(120);
/// Most bytes of names that nobody has in use, over all layers: those of a dozen large ones.
const MAX_BYTES: u64 = 64 << 20;

/// The names of one layer.
pub(super) struct Names {
    index: ArcSwapOption<LayerIndex>,
    /// Held while the names come or go.
    changing: Mutex<()>,
    /// When they were asked for last, in milliseconds of the cache's time.
    asked: AtomicU64,
}

/// All names in memory.
pub(super) struct Residents {
    since: Instant,
    bytes: AtomicU64,
    max: AtomicU64,
    /// Whether any came or went since memory was given back.
    stirred: AtomicBool,
}

impl Residents {
    pub fn new() -> Self {
        Residents {
            since: Instant::now(),
            bytes: AtomicU64::new(0),
            max: AtomicU64::new(MAX_BYTES),
            stirred: AtomicBool::new(false),
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn come(&self, index: &LayerIndex) {
        self.bytes.fetch_add(index.memory(), Ordering::Relaxed);
        self.stirred.store(true, Ordering::Relaxed);
    }

    fn go(&self, index: &LayerIndex) {
        self.bytes.fetch_sub(index.memory(), Ordering::Relaxed);
        self.stirred.store(true, Ordering::Relaxed);
    }

    fn is_over(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) > self.max.load(Ordering::Relaxed)
    }

    #[cfg(test)]
    pub fn set_max(&self, bytes: u64) {
        self.max.store(bytes, Ordering::Relaxed);
    }
}

impl Names {
    pub fn new(residents: &Residents, index: LayerIndex) -> Self {
        residents.come(&index);
        Names {
            index: ArcSwapOption::from_pointee(index),
            changing: Mutex::default(),
            asked: AtomicU64::new(residents.now()),
        }
    }

    /// Forgets them, unless somebody has them in use.
    fn drop_idle(&self, residents: &Residents) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(index) = self.index.swap(None) else { return };
        match Arc::try_unwrap(index) {
            Ok(index) => residents.go(&index),
            Err(used) => self.index.store(Some(used)),
        }
    }

    /// The layer goes, and they with it.
    pub fn close(&self, residents: &Residents) {
        if let Some(index) = self.index.swap(None) {
            residents.go(&index);
        }
    }
}

impl CachedLayer {
    /// The whole index: names, attributes, and where bytes are. From memory, or else from the disk, for which it takes as long as reading
    /// and checking it does.
    ///
    /// # Errors
    /// [`CacheError::Io`] if it cannot be read any more.
    pub fn names(&self) -> Result<Arc<LayerIndex>, CacheError> {
        let residents = &self.cache.residents;
        self.names.asked.store(residents.now(), Ordering::Relaxed);
        if let Some(index) = self.names.index.load_full() {
            return Ok(index);
        }
        let changing = self.names.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = self.names.index.load_full() {
            return Ok(index);
        }
        let index = Arc::new(self.read_index().inspect_err(|error| {
            tracing::error!(layer = %self.digest, "its names cannot be read any more: {error}");
        })?);
        residents.come(&index);
        self.names.index.store(Some(Arc::clone(&index)));
        drop(changing);
        self.cache.bound_names();
        Ok(index)
    }

    fn read_index(&self) -> Result<LayerIndex, CacheError> {
        let path = self.dir.join("index");
        let read = || {
            let encoded = fs::read(&path)?;
            if Digest::of(&encoded) != self.id {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "it is another file than it was",
                ));
            }
            LayerIndex::decode(&encoded).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
        };
        read().map_err(CacheError::io("read", &path))
    }

    #[cfg(test)]
    pub(super) fn has_names(&self) -> bool {
        self.names.index.load().is_some()
    }
}

impl Cache {
    /// Forgets names that were used least recently, if there are too many. The caller must not hold the list of layers.
    pub(super) fn bound_names(&self) {
        if !self.residents.is_over() {
            return;
        }
        let mut layers = self.open_layers();
        layers.sort_by_cached_key(|layer| layer.names.asked.load(Ordering::Relaxed));
        for layer in layers.iter().take_while(|_| self.residents.is_over()) {
            layer.names.drop_idle(&self.residents);
        }
    }

    /// Forgets names that nobody has asked for in a while, and gives memory back if any came or went since the last time.
    pub(super) fn forget_idle_names(&self) {
        self.forget_names_idle_for(IDLE);
        for layer in self.open_layers() {
            layer.release_index();
        }
        // What is freed of an index, and of what it was made of, lies between what stays.
        if self.residents.stirred.swap(false, Ordering::Relaxed) {
            malloc::trim();
        }
        let bytes = i64::try_from(self.names_bytes()).unwrap_or(i64::MAX);
        self.metrics().names_memory_bytes.set(bytes);
    }

    pub(super) fn forget_names_idle_for(&self, idle: Duration) {
        let idle = u64::try_from(idle.as_millis()).unwrap_or(u64::MAX);
        let now = self.residents.now();
        for layer in self.open_layers() {
            if now.saturating_sub(layer.names.asked.load(Ordering::Relaxed)) >= idle {
                layer.names.drop_idle(&self.residents);
            }
        }
    }

    /// Bytes of names and attributes in memory.
    pub fn names_bytes(&self) -> u64 {
        self.residents.bytes.load(Ordering::Relaxed)
    }
}
