//! A blob as it comes, kept for as long as it may be wanted by somebody else as well: whoever reads it here does not fetch it once more.
//!
//! It is a file without a name, so that nothing is left of it when the process ends, and it takes room that is there:
//! before anything is evicted or refused, all spools go. What its one reader has read is given back to the disk. Nothing depends on it: where a
//! byte cannot be written or read, the spool has failed, and the stream that fills it goes on.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, PoisonError, Weak};

use rustix::fs::FallocateFlags;
use tokio::sync::watch;

use super::Cache;
use crate::sync::may_block;
use crate::sync::primitives::{AtomicU64, Mutex, MutexGuard, Ordering};

/// Bytes that were read are given back in pieces of so many: a hole costs the file system a transaction.
const GIVE_BACK: u64 = 64 << 20;

/// How far a spool is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spooled {
    /// Which download of the blob it is: what came before was damaged.
    pub download: u32,
    /// Bytes of this download that are there, from the blob's beginning.
    pub there: u64,
    /// What became of it.
    pub end: Option<SpoolEnd>,
}

/// What became of a download.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpoolEnd {
    /// It has the digest of the blob, and all of it is there.
    Verified,
    /// There will be no more of it.
    Failed,
}

/// A blob as it comes.
pub struct Spool {
    cache: Arc<Cache>,
    file: File,
    state: watch::Sender<Spooled>,
    /// Bytes that count as taken of the disk.
    occupied: AtomicU64,
    /// Up to where bytes were given back.
    given_back: AtomicU64,
    /// Held while bytes are written, and while all of them go.
    writing: Mutex<()>,
}

impl Cache {
    /// A spool for a blob of `size` bytes, if there is room for it.
    pub fn spool(self: &Arc<Self>, size: u64) -> Option<Arc<Spool>> {
        may_block();
        if self.room_bytes() < size {
            return None;
        }
        let made = tempfile::tempfile_in(self.incoming());
        let file = made
            .inspect_err(|error| tracing::debug!(%error, "a blob is not kept while it comes"))
            .ok()?;
        let begun = Spooled {
            download: 0,
            there: 0,
            end: None,
        };
        let spool = Arc::new(Spool {
            cache: Arc::clone(self),
            file,
            state: watch::Sender::new(begun),
            occupied: AtomicU64::new(0),
            given_back: AtomicU64::new(0),
            writing: Mutex::default(),
        });
        let mut spools = self.spools();
        spools.retain(|spool| spool.strong_count() > 0);
        spools.push(Arc::downgrade(&spool));
        drop(spools);
        Some(spool)
    }

    /// Takes all spools off the disk; the bytes that are free by that.
    pub(super) fn end_spools(&self) -> u64 {
        let spools = std::mem::take(&mut *self.spools());
        let spools: Vec<_> = spools.iter().filter_map(Weak::upgrade).collect();
        spools.iter().map(|spool| spool.give_way()).sum()
    }

    fn spools(&self) -> MutexGuard<'_, Vec<Weak<Spool>>> {
        self.spools.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Spool {
    /// How far it is, now and later.
    pub fn watch(&self) -> watch::Receiver<Spooled> {
        self.state.subscribe()
    }

    /// A download begins, from the blob's first byte.
    pub fn begin(&self) {
        self.state.send_modify(|state| {
            if state.there > 0 {
                state.download += 1;
                state.there = 0;
                self.given_back.store(0, Ordering::Relaxed);
            }
        });
    }

    /// The next bytes.
    pub fn push(&self, bytes: &[u8]) {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let state = *self.state.borrow();
        if state.end.is_some() {
            return;
        }
        if let Err(error) = self.file.write_all_at(bytes, state.there) {
            tracing::debug!(%error, "a blob is no longer kept while it comes");
            self.settle(SpoolEnd::Failed);
            return;
        }
        let there = state.there + bytes.len() as u64;
        self.account(there);
        self.state.send_modify(|state| state.there = there);
    }

    /// All of it goes, whether somebody reads it or not; the bytes that it took.
    fn give_way(&self) -> u64 {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.state.send_modify(|state| state.end = Some(SpoolEnd::Failed));
        if let Err(error) = self.file.set_len(0) {
            tracing::warn!(%error, "a blob that was kept while it came stays on the disk until its reader has ended");
            return 0;
        }
        let freed = self.occupied.swap(0, Ordering::Relaxed);
        self.cache.release(freed);
        freed
    }

    /// It is over, unless it was before.
    pub fn settle(&self, end: SpoolEnd) {
        self.state.send_if_modified(|state| {
            let first = state.end.is_none();
            if first {
                state.end = Some(end);
            }
            first
        });
    }

    /// Up to `most` bytes from `offset` on, of those that are there.
    ///
    /// # Errors
    /// The disk's, also when a new download has begun meanwhile and the bytes are not there yet.
    pub fn read(&self, offset: u64, most: usize) -> io::Result<Vec<u8>> {
        may_block();
        let there = self.state.borrow().there.saturating_sub(offset);
        let mut bytes = vec![0; most.min(usize::try_from(there).unwrap_or(usize::MAX))];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// Its reader needs nothing before `offset` of this download.
    pub fn give_back(&self, download: u32, offset: u64) {
        may_block();
        // Held meanwhile: another download would write where this makes a hole.
        let state = self.state.borrow();
        let done = self.given_back.load(Ordering::Relaxed);
        if state.download != download
            || self.occupied.load(Ordering::Relaxed) == 0
            || offset.saturating_sub(done) < GIVE_BACK
        {
            return;
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // What cannot be given back goes with the file.
        if rustix::fs::fallocate(&self.file, flags, done, offset - done).is_ok() {
            self.given_back.store(offset, Ordering::Relaxed);
            self.account(state.there);
        }
    }

    /// Counts what is on the disk if `there` bytes were written.
    fn account(&self, there: u64) {
        let now = there.saturating_sub(self.given_back.load(Ordering::Relaxed));
        let before = self.occupied.swap(now, Ordering::Relaxed);
        self.cache.settle(before, now);
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        self.cache.release(self.occupied.load(Ordering::Relaxed));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::tests::open;

    #[test]
    fn what_comes_is_read_and_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path(), 1 << 30);
        let spool = cache.spool(200 << 20).unwrap();
        let seen = spool.watch();
        spool.begin();
        let piece = vec![7; 1 << 20];
        for _ in 0..130 {
            spool.push(&piece);
        }
        assert_eq!(cache.used_bytes(), 130 << 20);
        assert_eq!(spool.read((130 << 20) - 5, 100).unwrap(), [7; 5]);
        spool.give_back(0, (64 << 20) - 1);
        assert_eq!(cache.used_bytes(), 130 << 20);
        spool.give_back(0, 100 << 20);
        assert_eq!(cache.used_bytes(), 30 << 20);
        assert_eq!(spool.read(100 << 20, 3).unwrap(), [7; 3]);
        // Damaged: another download, of which an earlier reader gives nothing back.
        spool.begin();
        spool.push(&[1, 2, 3]);
        spool.give_back(0, 130 << 20);
        let begun = Spooled {
            download: 1,
            there: 3,
            end: None,
        };
        assert_eq!(*seen.borrow(), begun);
        assert_eq!(spool.read(0, 100).unwrap(), [1, 2, 3]);
        assert_eq!(cache.used_bytes(), 3);
        spool.settle(SpoolEnd::Verified);
        spool.settle(SpoolEnd::Failed);
        spool.push(&[4]);
        let end = Some(SpoolEnd::Verified);
        assert_eq!(*seen.borrow(), Spooled { end, ..begun });
        let left = std::fs::read_dir(cache.incoming()).unwrap().count();
        assert_eq!(left, 0, "it has no name");
        drop(spool);
        assert_eq!(cache.used_bytes(), 0);
    }

    #[test]
    fn it_takes_no_room_that_somebody_needs() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path(), 1 << 20);
        assert!(cache.spool(2 << 20).is_none());
        let spool = cache.spool(1 << 20).unwrap();
        spool.push(&[0; 1000]);
        assert!(cache.spool(1 << 20).is_none(), "what is taken is taken");
        // It gives way to whoever needs the room.
        cache.reserve(1 << 20, None).unwrap();
        assert_eq!(cache.used_bytes(), 1 << 20);
        assert_eq!(spool.watch().borrow().end, Some(SpoolEnd::Failed));
        assert!(spool.read(0, 1000).is_err());
        spool.push(&[0; 1000]);
        drop(spool);
        assert_eq!(cache.used_bytes(), 1 << 20);
    }
}
