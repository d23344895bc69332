//! A blob as it comes, kept for as long as it may be wanted by somebody else as well: whoever reads it here does not fetch it once more.
//!
//! It is a file without a name, so that nothing is left of it when the process ends, and it takes room that is there:
//! before anything is evicted or refused, all spools go. What its one reader has read is given back to the disk. While the reader keeps up, what
//! comes is handed to it from memory, and no file is written:
//! ```text
//!   given back | in the file | in memory |  still to come
//!              ^ the reader goes on from here, or behind the file
//! ```
//! Nothing depends on it: where a byte cannot be written or read, the spool has failed, and the stream that fills it goes on.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, PoisonError, Weak};

use bytes::{Buf, Bytes};
use rustix::fs::FallocateFlags;
use tokio::sync::watch;

use super::Cache;
use crate::sync::may_block;
use crate::sync::primitives::{AtomicU64, Mutex, MutexGuard, Ordering};

/// Bytes that were read are given back in pieces of so many: a hole costs the file system a transaction.
const GIVE_BACK: u64 = 64 << 20;
/// Bytes that wait in memory for a reader who keeps up: he may be late by what comes in some ten milliseconds.
const IN_MEMORY: u64 = 4 << 20;
/// Pieces that wait there at most: a registry may send single bytes, and what names a piece takes more.
const PIECES: usize = 1024;
/// Whose next byte lies so little before the end of the file keeps up: he will have read that before more than [`IN_MEMORY`] has come.
const NEAR: u64 = 2 << 20;
/// After how many bytes at the latest whoever watches a spool is told of more; and when it ends.
const TOLD_EVERY: u64 = 128 << 10;

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
    /// Held while bytes are written, and while all of them go.
    kept: Mutex<Kept>,
}

/// What is kept of a download, and where.
#[derive(Default)]
struct Kept {
    file: Range<u64>,
    /// What follows it, unless the reader was behind that already.
    pieces: VecDeque<Bytes>,
    /// Bytes of them.
    in_memory: u64,
    /// The next byte that is read. `None`: nobody reads.
    reader: Option<u64>,
}

impl Kept {
    /// Where what is in memory begins, if `there` bytes have come.
    fn memory_at(&self, there: u64) -> u64 {
        there.saturating_sub(self.in_memory)
    }

    /// Whether the next `len` bytes may wait in memory.
    fn has_room(&self, len: u64) -> bool {
        let keeps_up = self.reader.is_some_and(|reader| reader + NEAR >= self.file.end);
        keeps_up && self.in_memory + len <= IN_MEMORY && self.pieces.len() < PIECES
    }

    /// What is in memory before `offset` goes.
    fn forget(&mut self, offset: u64, there: u64) {
        while let Some(first) = self.pieces.front_mut() {
            let before = offset.saturating_sub(there - self.in_memory);
            let count = before.min(first.len() as u64);
            first.advance(count as usize);
            self.in_memory -= count;
            if !first.is_empty() {
                break;
            }
            self.pieces.pop_front();
        }
    }

    /// Up to `most` of the bytes in memory.
    fn first(&self, most: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(most.min(self.in_memory as usize));
        for piece in &self.pieces {
            let count = piece.len().min(most - bytes.len());
            bytes.extend_from_slice(&piece[..count]);
        }
        bytes
    }
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
            kept: Mutex::default(),
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

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A download begins, from the blob's first byte.
    pub fn begin(&self) {
        let mut kept = self.kept();
        self.state.send_modify(|state| {
            if state.there > 0 {
                state.download += 1;
                state.there = 0;
                // What is in the file is written over.
                *kept = Kept::default();
            }
        });
    }

    /// The next bytes.
    pub fn push(&self, bytes: &Bytes) {
        let mut kept = self.kept();
        let state = *self.state.borrow();
        if state.end.is_some() {
            return;
        }
        let len = bytes.len() as u64;
        if kept.has_room(len) {
            kept.pieces.push_back(bytes.clone());
            kept.in_memory += len;
        } else if let Err(error) = self.write(&mut kept, bytes, state.there) {
            tracing::debug!(%error, "a blob is no longer kept while it comes");
            self.settle(SpoolEnd::Failed);
            return;
        }
        let there = state.there + len;
        self.state.send_if_modified(|state| {
            state.there = there;
            // Whoever waits for a message's worth of it is woken when there is one, not for each piece.
            there / TOLD_EVERY != (there - len) / TOLD_EVERY
        });
    }

    /// Writes what is in memory, and the next bytes, which begin at `there`.
    fn write(&self, kept: &mut Kept, bytes: &Bytes, there: u64) -> io::Result<()> {
        let mut at = kept.memory_at(there);
        if kept.file.end != at {
            // The reader was behind it.
            self.punch(kept.file.clone())?;
            kept.file = at..at;
        }
        // Where one of them cannot be written, what is in memory is still there to be read.
        for piece in &kept.pieces {
            self.file.write_all_at(piece, at)?;
            at += piece.len() as u64;
        }
        self.file.write_all_at(bytes, at)?;
        kept.pieces.clear();
        kept.in_memory = 0;
        kept.file.end = at + bytes.len() as u64;
        self.account(kept);
        Ok(())
    }

    /// All of it goes, whether somebody reads it or not; the bytes that it took.
    fn give_way(&self) -> u64 {
        let _kept = self.kept();
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

    /// Up to `most` bytes of a download from `offset` on, of those that are there; none if another download has begun. Its one reader needs nothing before
    /// `offset` any more.
    ///
    /// # Errors
    /// The disk's, also when a new download has begun meanwhile and the bytes are not there yet.
    pub fn read(&self, download: u32, offset: u64, most: usize) -> io::Result<Vec<u8>> {
        may_block();
        let mut kept = self.kept();
        let state = *self.state.borrow();
        if state.download != download {
            return Ok(Vec::new());
        }
        kept.reader = Some(offset);
        kept.forget(offset, state.there);
        self.give_back(&mut kept, offset);
        let memory_at = kept.memory_at(state.there);
        if offset >= memory_at {
            return Ok(kept.first(most));
        }
        drop(kept);
        let len = usize::try_from(memory_at - offset).unwrap_or(usize::MAX).min(most);
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    fn give_back(&self, kept: &mut Kept, offset: u64) {
        let done = kept.file.start..offset.min(kept.file.end);
        // A file that has gone has nothing to give back.
        let is_much = done.end.saturating_sub(done.start) >= GIVE_BACK;
        if !is_much || self.occupied.load(Ordering::Relaxed) == 0 {
            return;
        }
        // What cannot be given back goes with the file.
        if self.punch(done.clone()).is_ok() {
            kept.file.start = done.end;
            self.account(kept);
        }
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if !range.is_empty() {
            rustix::fs::fallocate(&self.file, flags, range.start, range.end - range.start)?;
        }
        Ok(())
    }

    /// Counts what is on the disk.
    fn account(&self, kept: &Kept) {
        let now = kept.file.end - kept.file.start;
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
    use crate::sync::random::Random;

    #[test]
    fn what_comes_is_read_and_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path(), 1 << 30);
        let spool = cache.spool(200 << 20).unwrap();
        let seen = spool.watch();
        spool.begin();
        let piece = Bytes::from(vec![7; 1 << 20]);
        for _ in 0..130 {
            spool.push(&piece);
        }
        assert_eq!(cache.used_bytes(), 130 << 20);
        assert_eq!(spool.read(0, (64 << 20) - 1, 100).unwrap(), [7; 100]);
        assert_eq!(cache.used_bytes(), 130 << 20);
        assert_eq!(spool.read(0, 100 << 20, 3).unwrap(), [7; 3]);
        assert_eq!(cache.used_bytes(), 30 << 20);
        assert_eq!(spool.read(0, (130 << 20) - 5, 100).unwrap(), [7; 5]);
        // Damaged: another download, of which an earlier reader gives nothing back.
        spool.begin();
        spool.push(&Bytes::from_static(&[1, 2, 3]));
        assert!(spool.read(0, 130 << 20, 100).unwrap().is_empty());
        let begun = Spooled {
            download: 1,
            there: 3,
            end: None,
        };
        assert_eq!(*seen.borrow(), begun);
        assert_eq!(spool.read(1, 0, 100).unwrap(), [1, 2, 3]);
        assert_eq!(cache.used_bytes(), 3);
        spool.settle(SpoolEnd::Verified);
        spool.settle(SpoolEnd::Failed);
        spool.push(&Bytes::from_static(&[4]));
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
        spool.push(&Bytes::from_static(&[0; 1000]));
        assert!(cache.spool(1 << 20).is_none(), "what is taken is taken");
        // It gives way to whoever needs the room.
        cache.reserve(1 << 20, None).unwrap();
        assert_eq!(cache.used_bytes(), 1 << 20);
        assert_eq!(spool.watch().borrow().end, Some(SpoolEnd::Failed));
        assert!(spool.read(0, 0, 1000).is_err());
        spool.push(&Bytes::from_static(&[0; 1000]));
        drop(spool);
        assert_eq!(cache.used_bytes(), 1 << 20);
    }

    /// A reader who is late, catches up, and is late again, gets what came, once; and what he has from memory was never on the disk.
    #[test]
    fn who_keeps_up_reads_from_memory() {
        const PIECE: u64 = 48 << 10;
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path(), 1 << 30);
        let spool = cache.spool(300 << 20).unwrap();
        spool.begin();
        let mut random = Random::new(7);
        let (mut came, mut read) = (Vec::new(), Vec::new());
        let mut push = |spool: &Spool, bytes: u64| {
            for _ in 0..bytes / PIECE {
                let piece = Bytes::from(random.bytes(PIECE as usize));
                came.extend_from_slice(&piece);
                spool.push(&piece);
            }
        };
        let mut read_all = |spool: &Spool| {
            loop {
                let bytes = spool.read(0, read.len() as u64, 100_000).unwrap();
                if bytes.is_empty() {
                    return;
                }
                read.extend_from_slice(&bytes);
            }
        };
        push(&spool, 70 << 20);
        let on_disk = cache.used_bytes();
        assert!(on_disk > 69 << 20);
        for _ in 0..30 {
            read_all(&spool);
            push(&spool, 3 << 20);
            assert!(cache.used_bytes() <= on_disk, "not in step");
        }
        // What waits in memory goes to the disk with what there is no room for, and the hole before it counts no more.
        push(&spool, 10 << 20);
        assert!(
            (12 << 20..14 << 20).contains(&cache.used_bytes()),
            "{}",
            cache.used_bytes()
        );
        push(&spool, 70 << 20);
        read_all(&spool);
        push(&spool, 2 << 20);
        read_all(&spool);
        assert!(cache.used_bytes() < 64 << 20, "{}", cache.used_bytes());
        assert_eq!(read.len(), came.len());
        assert!(read == came);
        drop(spool);
        assert_eq!(cache.used_bytes(), 0);
    }

    /// What is in memory when the disk is full can still be read.
    #[test]
    fn a_full_disk_loses_nothing_that_came_before() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path(), 1 << 30);
        let mut spool = Arc::try_unwrap(cache.spool(8 << 20).unwrap()).ok().unwrap();
        spool.file = File::options().write(true).open("/dev/full").unwrap();
        assert!(spool.read(0, 0, 1).unwrap().is_empty());
        let piece = Bytes::from(vec![8; 1 << 20]);
        for _ in 0..5 {
            spool.push(&piece);
        }
        let state = *spool.watch().borrow();
        assert_eq!((state.there, state.end), (4 << 20, Some(SpoolEnd::Failed)));
        assert_eq!(spool.read(0, 0, 8 << 20).unwrap(), vec![8; 4 << 20]);
    }

    /// A registry that drips, with a reader who is as slow: names of pieces are memory as well.
    #[test]
    fn few_pieces_wait_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path(), 1 << 30);
        let spool = cache.spool(1 << 20).unwrap();
        assert!(spool.read(0, 0, 1).unwrap().is_empty());
        for _ in 0..PIECES {
            spool.push(&Bytes::from_static(&[5]));
        }
        assert_eq!(cache.used_bytes(), 0, "in memory");
        spool.push(&Bytes::from_static(&[6]));
        assert_eq!(cache.used_bytes(), PIECES as u64 + 1);
        let all = [vec![5; PIECES], vec![6]].concat();
        assert_eq!(spool.read(0, 0, 1 << 20).unwrap(), all);
    }
}
