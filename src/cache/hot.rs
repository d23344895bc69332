//! Chunks in memory, for reads that had to go past a full disk: without them, every small read of such a chunk would fetch it again.

use std::sync::PoisonError;

use bytes::Bytes;
use lru::LruCache;

use crate::layer::Digest;
use crate::sync::primitives::{Mutex, MutexGuard};

/// Most bytes of chunks kept in memory. A few chunks of every container that starts while the disk is full.
const MAX_BYTES: usize = 64 << 20;

/// The most recently used chunks that could not be stored.
pub(super) struct HotChunks(Mutex<State>);

struct State {
    chunks: LruCache<(Digest, usize), Bytes>,
    /// Bytes of all of them.
    size: usize,
}

impl HotChunks {
    pub fn new() -> Self {
        HotChunks(Mutex::new(State {
            chunks: LruCache::unbounded(),
            size: 0,
        }))
    }

    /// Keeps a verified chunk, and forgets the least recently used ones if it is too much.
    pub fn put(&self, layer: Digest, chunk: usize, bytes: Bytes) {
        let mut state = self.lock();
        state.size += bytes.len();
        if let Some(old) = state.chunks.put((layer, chunk), bytes) {
            state.size -= old.len();
        }
        while state.size > MAX_BYTES {
            let Some((_, old)) = state.chunks.pop_lru() else { break };
            state.size -= old.len();
        }
    }

    /// The bytes of a chunk, if they are here.
    pub fn get(&self, layer: Digest, chunk: usize) -> Option<Bytes> {
        self.lock().chunks.get(&(layer, chunk)).cloned()
    }

    /// Forgets a chunk that is on disk now.
    pub fn remove(&self, layer: Digest, chunk: usize) {
        let mut state = self.lock();
        if let Some(old) = state.chunks.pop(&(layer, chunk)) {
            state.size -= old.len();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_chunk_goes_first() {
        let (hot, layer) = (HotChunks::new(), Digest::of(b"layer"));
        let half = Bytes::from(vec![7; MAX_BYTES / 2]);
        hot.put(layer, 1, half.clone());
        hot.put(layer, 2, half.clone());
        assert!(hot.get(layer, 1).is_some(), "used last");
        hot.put(layer, 3, half.clone());
        assert!(hot.get(layer, 2).is_none());
        assert!(hot.get(layer, 1).is_some() && hot.get(layer, 3).is_some());
        hot.remove(layer, 1);
        hot.put(layer, 4, half);
        assert!(hot.get(layer, 3).is_some(), "removed bytes are not counted");
    }
}
