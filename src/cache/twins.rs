//! The same bytes in other layers.
//!
//! Images of one organisation have many files in common that lie in different layers: each installs the same packages for itself. A chunk that
//! is missing is taken from another layer that has it, instead of from a registry: found by its digest, and verified against it like bytes
//! that come over the network, so that it makes no difference what either layer's image is believed to be. Only the way over the network is saved:
//! each layer has its own bytes on disk.
//!
//! What is known of the chunks that are there is bounded, and only a hint: where the bytes were evicted meanwhile, or are others, the chunk is
//! fetched. Nothing of it is on disk; a layer that is opened brings its chunks along. Small chunks are not worth it: one request brings many.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, PoisonError, Weak};

use lru::LruCache;

use super::{CachedLayer, Stored};
use crate::layer::{Access, Chunk, Codec, Digest, Verify};
use crate::sync::primitives::{Mutex, MutexGuard};

/// Smallest chunk that is looked for, in bytes. Of the bytes that twelve images of Python services have in common, 92 % are in files of this size
/// or more, and those are 22 % of the files.
const LEAST: u32 = 16 << 10;
/// Largest chunk that is copied, in bytes: what stargz makes at most. Larger ones would be much memory for one read.
const MOST: u32 = 4 << 20;
/// Chunks that are known, the latest ones: 5 MiB of memory. They stand for a gigabyte at least.
const KNOWN: NonZeroUsize = NonZeroUsize::new(64 << 10).expect("a constant that is not zero");

/// Where a chunk is.
#[derive(Clone, Copy)]
struct Place {
    layer: u32,
    chunk: u32,
}

/// Chunks that are in the cache, by the beginning of their digest.
pub(super) struct Twins(Mutex<State>);

struct State {
    places: LruCache<u64, Place>,
    /// Layers that are open, by a number of their own.
    layers: HashMap<u32, Weak<CachedLayer>>,
    next: u32,
}

impl Twins {
    pub fn new() -> Self {
        Twins(Mutex::new(State {
            // Not all of it at once: most nodes never have so many.
            places: LruCache::unbounded(),
            layers: HashMap::new(),
            next: 0,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number for a layer that is being opened.
    pub fn number(&self) -> u32 {
        let mut state = self.lock();
        state.next = state.next.wrapping_add(1);
        state.next
    }

    fn note(&self, digest: &Digest, place: Place) {
        let mut state = self.lock();
        state.places.put(key(digest), place);
        while state.places.len() > KNOWN.get() {
            state.places.pop_lru();
        }
    }

    fn find(&self, digest: &Digest) -> Option<(Arc<CachedLayer>, usize)> {
        let (layer, chunk) = {
            let state = self.lock();
            let place = state.places.peek(&key(digest))?;
            (state.layers.get(&place.layer).cloned(), place.chunk as usize)
        };
        // Not under the lock: whoever drops a layer last takes it.
        let layer = layer.and_then(|layer| layer.upgrade());
        let there = |layer: &Arc<CachedLayer>| layer.ready.get(chunk) || layer.suspect.get(chunk);
        let found = layer.filter(there).map(|layer| (layer, chunk));
        if found.is_none() {
            self.forget(digest);
        }
        found
    }

    fn forget(&self, digest: &Digest) {
        self.lock().places.pop(&key(digest));
    }
}

/// Two digests with the same key are told apart when the bytes are verified.
fn key(digest: &Digest) -> u64 {
    let bytes = digest.as_bytes().first_chunk().copied();
    u64::from_le_bytes(bytes.unwrap_or_default())
}

impl CachedLayer {
    /// Whether a chunk can be one that other layers have: of a layer that was streamed, chunks are pieces of a tar, which are in no other.
    fn has_twins(&self, record: &Chunk) -> bool {
        self.index.access() == Access::Ranges
            && self.index.codec() != Codec::GzipSpans
            && self.index.verify() == Verify::Content
            && (LEAST..=MOST).contains(&record.data_len)
    }

    /// Notes that other layers can have a chunk from here.
    pub(super) fn offer(&self, chunk: usize, record: &Chunk) {
        if let Ok(at) = u32::try_from(chunk)
            && self.has_twins(record)
        {
            let place = Place {
                layer: self.number,
                chunk: at,
            };
            self.cache.twins.note(&record.digest, place);
        }
    }

    /// Notes that the layer is open, and what it has.
    pub(super) fn enlist(self: &Arc<Self>) {
        let twins = &self.cache.twins;
        twins.lock().layers.insert(self.number, Arc::downgrade(self));
        for chunk in self.ready.ones().chain(self.suspect.ones()) {
            if let Some(record) = self.index.chunks().get(chunk) {
                self.offer(chunk, &record);
            }
        }
    }

    pub(super) fn delist(&self) {
        self.cache.twins.lock().layers.remove(&self.number);
    }

    /// Whether the bytes of a chunk that is missing are in the cache nevertheless, as far as is known: a read finds them there.
    pub fn is_elsewhere(&self, chunk: usize) -> bool {
        let Some(record) = self.index.chunks().get(chunk) else {
            return false;
        };
        self.has_twins(&record) && self.cache.twins.find(&record.digest).is_some()
    }

    /// Takes a chunk from another layer that has it; whether it is ready then. Blocks for the disk.
    pub fn take_from_elsewhere(&self, chunk: usize) -> bool {
        let Some(record) = self.index.chunks().get(chunk).filter(|record| self.has_twins(record)) else {
            return false;
        };
        let twins = &self.cache.twins;
        let Some((other, at)) = twins.find(&record.digest) else {
            return false;
        };
        let place = other.index.chunks().get(at);
        let Some(place) = place.filter(|place| place.data_len == record.data_len) else {
            twins.forget(&record.digest);
            return false;
        };
        if other.is_suspect(at) {
            // As if somebody had read it there.
            let _shared = other.mutation.read().unwrap_or_else(PoisonError::into_inner);
            other.verify(at);
        }
        let mut bytes = vec![0; record.data_len as usize];
        // It may be evicted at this moment, which this notices.
        let read = other.read_ready(place.data_offset, &mut bytes);
        if !matches!(read, Some(Ok(()))) {
            twins.forget(&record.digest);
            return false;
        }
        match self.store(chunk, &bytes) {
            Ok(Stored::Cached) => {
                self.cache.metrics().cache_shared_bytes_total.inc_by(bytes.len() as u64);
                true
            }
            // Where nothing can be stored, a read that brings the bytes along does better.
            Ok(Stored::Bypassed) => false,
            Err(error) => {
                // Damage on the disk, or another chunk whose digest begins alike.
                tracing::debug!(layer = %self.digest, chunk, "another layer does not have it: {error}");
                twins.forget(&record.digest);
                false
            }
        }
    }
}
