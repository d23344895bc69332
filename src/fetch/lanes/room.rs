//! The memory that the bytes of lanes take, from when they arrive until they are read.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use crate::sync::{Budget, Share};

/// Bytes of the blob, with the memory they take.
pub(in crate::fetch) struct Piece {
    pub bytes: Bytes,
    pub(super) _memory: Memory,
    pub(super) _unread: Unread,
}

#[expect(dead_code, reason = "held for as long as the bytes are")]
pub(super) enum Memory {
    Own(Share, Share),
    Kept(Arc<[Share; 2]>),
}

/// Counts bytes that were handed on and not read yet.
pub(super) struct Unread(pub(super) Arc<AtomicU64>, pub(super) u64);

impl Drop for Unread {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}

/// Where a lane's memory comes from.
#[derive(Clone)]
pub(super) enum Room {
    /// Waits for it. The part is this stream's alone, and comes back as its decompression goes on: nobody else waits for it.
    Own { part: Arc<Budget>, all: Arc<Budget> },
    /// Has all it needs.
    Kept(Arc<[Share; 2]>),
}

impl Room {
    /// More at once could never be let in.
    pub(super) fn most(&self) -> u64 {
        match self {
            Room::Own { part, all } => part.total().min(all.total()),
            Room::Kept(_) => u64::MAX,
        }
    }

    pub(super) async fn take(&self, bytes: u64) -> Memory {
        match self {
            Room::Own { part, all } => Memory::Own(part.take(bytes).await, all.take(bytes).await),
            Room::Kept(kept) => Memory::Kept(Arc::clone(kept)),
        }
    }
}
