//! One layer on disk: the hit path and stores. (Verification: check.rs; eviction: evict.rs; mounting its file: hold.rs.)

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, MetadataExt};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use rustix::fs::Advice;
use rustix::io::ReadWriteFlags;

use super::bitmap::{Bitmap, WORD};
use super::error::is_full;
use super::faults::Point;
use super::map::MapFile;
use super::names::Names;
use super::pins::Pins;
use super::places::Places;
use super::windows::WindowFile;
use super::{Cache, CacheError, Key};
use crate::layer::{BlobIndex, Chunk, Digest, LayerError, LayerIndex, Verify, Windows, portable};
use crate::sync::primitives::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Mutex, MutexGuard, Ordering, RwLock};
use crate::sys::map::Mapping;

/// Unit in which the use of a layer is noted and in which parts of it are evicted, in bytes of the data space: large enough that a
/// hole is worth its system call, small enough that the hot part of a large layer survives.
pub(super) const GROUP: u64 = 4 << 20;
/// What comes along from the disk with a small chunk that is not in the page cache, in bytes: as much as the kernel reads ahead by
/// default. A disk gives it in nearly the same time as one page.
const NEIGHBOURS: u64 = 128 << 10;
/// Largest small chunk, in bytes: a small file, which is likely to be read together with those beside it.
const SMALL: u32 = 64 << 10;
/// Bytes of a layer that are made durable without a thought: a second of a slow disk.
const SEALED_AT_ONCE: u64 = 64 << 20;
/// After this time the kernel has written back what was stored (`vm.dirty_expire_centisecs`, 30 s, and a round of its writer, 5 s).
const WRITTEN_BACK_AFTER: Duration = Duration::from_secs(35);

/// What became of the bytes given to [`CachedLayer::store`]. They are verified in either case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// They are on disk.
    Cached,
    /// There is no room for them: they can be served, but not found again.
    Bypassed,
}

/// A layer in the cache. All offsets are bytes of its data space.
pub struct CachedLayer {
    /// By what the cache knows it: its id. The layer's blob has another digest, unless the index was built from it.
    pub(super) digest: Digest,
    blob: Digest,
    /// Digest of its tar, once this process has seen all of it.
    diff_id: OnceLock<Digest>,
    /// Where its bytes are.
    pub(super) index: BlobIndex,
    /// The file that its chunks are read from, if they are not in memory.
    pub(super) index_map: Option<Arc<Mapping>>,
    /// What it is known by to the cache's list of chunks: see twins.rs.
    pub(super) number: u32,
    /// The rest of the index.
    pub(super) names: Names,
    /// Directory of the layer.
    pub(super) dir: PathBuf,
    /// The data space. Another file takes its place when one that was mounted is evicted.
    pub(super) data: ArcSwap<File>,
    map: Mutex<MapFile>,
    /// Chunks whose bytes are on disk and have been verified, by this process or before the last orderly end.
    pub(super) ready: Bitmap,
    /// `None`: the index has no checkpoints.
    windows: Option<WindowFile>,
    /// Digest of the index on disk.
    pub(super) id: Digest,
    /// Chunks whose bytes may be on disk, and have to be verified before they are ready.
    pub(super) suspect: Bitmap,
    /// Chunks whose bytes this process has verified: those that may be mounted.
    pub(super) checked: Bitmap,
    /// Whether bytes of the file that no chunk covers are known to be zeros.
    pub(super) clean: AtomicBool,
    /// Chunks that are not ready. 0 saves the hit path from looking at the chunks.
    pub(super) unready: AtomicUsize,
    /// Bytes of the chunks that are ready or suspect.
    pub(super) present: AtomicU64,
    /// Times that chunks were evicted; see the readers' protocol in `cache`.
    pub(super) evictions: AtomicU64,
    /// Shared by stores, verifications, locked reads and new holds; exclusive for evictions and seals.
    pub(super) mutation: RwLock<()>,
    /// When each group was used last, in ticks of the cache's clock.
    used: Box<[AtomicU64]>,
    /// Who uses it; see pins.rs.
    pub(super) pins: Pins,
    /// Holds on the file; see hold.rs.
    pub(super) holds: AtomicU32,
    /// Whether the file may be mounted somewhere, also after the last hold on it has gone.
    pub(super) exposed: AtomicBool,
    /// Whether the next process will know that.
    pub(super) marked: Mutex<bool>,
    /// Bytes on disk, shared with the cache's list of layers.
    pub(super) allocated: Arc<AtomicU64>,
    /// How many of them are in files beside the data.
    pub(super) small: AtomicU64,
    pub(super) cache: Arc<Cache>,
}

/// The files of a layer that is being opened.
pub(super) struct Files {
    pub dir: PathBuf,
    pub index: File,
    pub data: File,
    pub map: MapFile,
    /// Bits of the chunks that are there.
    pub words: Vec<u64>,
    /// Whether this process made them, so that nothing but verified bytes is in them.
    pub fresh: bool,
    /// Whether the data may be mounted.
    pub exposed: bool,
    pub windows: Option<WindowFile>,
    /// Digest of the index file.
    pub id: Digest,
    pub allocated: Arc<AtomicU64>,
    /// Bytes on disk beside the data.
    pub small: u64,
}

impl CachedLayer {
    pub(super) fn new(cache: Arc<Cache>, key: Key, index: LayerIndex, files: Files) -> Self {
        let chunks = index.chunks();
        let (known, empty) = (
            Bitmap::from_words(chunks.len(), &files.words),
            Bitmap::new(chunks.len()),
        );
        let (count, present) = known.ones().fold((0, 0), |(count, bytes), at| {
            (count + 1, bytes + u64::from(chunks[at].data_len))
        });
        let (ready, suspect, unready) = if files.map.is_sealed() {
            (known, empty, chunks.len() - count)
        } else {
            (empty, known, chunks.len())
        };
        let checked = Bitmap::new(chunks.len());
        for chunk in ready.ones().filter(|_| files.fresh) {
            checked.set(chunk);
        }
        let groups = index.data_size().div_ceil(GROUP);
        let Places { blob, mapping } = Places::of(&index, &files.index);
        CachedLayer {
            digest: key.id,
            blob: key.blob,
            diff_id: OnceLock::new(),
            dir: files.dir,
            data: ArcSwap::from_pointee(files.data),
            map: Mutex::new(files.map),
            windows: files.windows,
            id: files.id,
            ready,
            suspect,
            checked,
            clean: AtomicBool::new(files.fresh),
            index_map: mapping,
            number: cache.twins.number(),
            unready: AtomicUsize::new(unready),
            present: AtomicU64::new(present),
            evictions: AtomicU64::new(0),
            mutation: RwLock::new(()),
            used: (0..groups).map(|_| AtomicU64::new(0)).collect(),
            pins: Pins::new(),
            holds: AtomicU32::new(0),
            exposed: AtomicBool::new(files.exposed),
            marked: Mutex::new(files.exposed),
            allocated: files.allocated,
            small: AtomicU64::new(files.small),
            index: blob,
            names: Names::new(&cache.residents, index),
            cache,
        }
    }

    /// Digest of the layer's blob.
    #[expect(
        clippy::misnamed_getters,
        reason = "within the cache a layer is known by its id, to others by its blob"
    )]
    pub fn digest(&self) -> &Digest {
        &self.blob
    }

    /// What the layer's index is known by: see [`Key`].
    #[expect(
        clippy::misnamed_getters,
        reason = "within the cache a layer is known by its id, to others by its blob"
    )]
    pub fn id(&self) -> &Digest {
        &self.digest
    }

    /// Digest of the layer's tar, if this process has seen all of it, and that the index is the tar's.
    pub fn diff_id(&self) -> Option<Digest> {
        self.diff_id.get().copied()
    }

    /// Notes that all of the layer was seen: what its index gives is the tar with this digest.
    pub fn is_tar(&self, diff_id: Digest) {
        // The first word stands: there is but one tar.
        let _ = self.diff_id.set(diff_id);
    }

    /// Where its bytes are. (Names and attributes: [`CachedLayer::names`].)
    pub fn index(&self) -> &BlobIndex {
        &self.index
    }

    /// The window that decoding from a checkpoint needs, from the disk. `checkpoint` is a position in the index.
    ///
    /// # Errors
    /// [`CacheError::Io`] when it cannot be read or is damaged. The layer's spans cannot all be decoded any more then, and the layer is
    /// made again when it is opened the next time.
    pub fn window(&self, checkpoint: usize) -> Result<Bytes, CacheError> {
        let (Some(windows), Some(of)) = (&self.windows, self.index.checkpoints().get(checkpoint)) else {
            return Ok(Bytes::new());
        };
        let window = windows.window(self.digest, checkpoint, of, &self.cache.windows);
        window.map_err(|source| {
            windows.condemn();
            CacheError::io("read the windows in", &self.dir)(source)
        })
    }

    /// The index and its windows as one file that others can use ([`portable`]). It takes memory for all windows.
    ///
    /// # Errors
    /// [`CacheError::Io`] when the windows cannot be read, or it would be too large.
    pub fn portable(&self) -> Result<Vec<u8>, CacheError> {
        let names = self.names()?;
        let pack = || {
            let windows = match &self.windows {
                Some(windows) => windows.all(self.index.checkpoints(), &self.id)?,
                None => Windows::new(),
            };
            portable::pack(&self.blob, &names, &windows).map_err(io::Error::other)
        };
        pack().map_err(CacheError::io("pack the index in", &self.dir))
    }

    /// Bytes of the data space that are on disk.
    pub fn present_bytes(&self) -> u64 {
        self.present.load(Ordering::Relaxed)
    }

    /// Bytes of the disk that the layer's files take.
    pub fn allocated_bytes(&self) -> u64 {
        self.allocated.load(Ordering::Relaxed)
    }

    /// Whether every byte is on disk and verified.
    pub fn is_complete(&self) -> bool {
        self.unready.load(Ordering::SeqCst) == 0
    }

    /// Whether the chunk at position `chunk` is on disk and verified.
    pub fn is_chunk_ready(&self, chunk: usize) -> bool {
        self.ready.get(chunk)
    }

    /// Whether all of the `len` bytes at `offset` are on disk and verified.
    pub fn is_ready(&self, offset: u64, len: u64) -> bool {
        self.is_complete() || self.missing(offset, len).next().is_none()
    }

    /// Positions of the chunks among the `len` bytes at `offset` that are not ready: not there, or not verified since a crash.
    pub fn missing(&self, offset: u64, len: u64) -> impl Iterator<Item = usize> {
        self.positions(offset, len).filter(|&at| !self.ready.get(at))
    }

    /// Positions of the chunks that hold any of the `len` bytes at `offset`.
    fn positions(&self, offset: u64, len: u64) -> impl Iterator<Item = usize> {
        let chunks = self.index.chunks();
        // No bytes are in no chunk, also within one.
        let end = if len == 0 { 0 } else { offset.saturating_add(len) };
        let first = chunks.partition_point(|chunk| chunk.data_end() <= offset);
        // One chunk or two, nearly always: walking is faster than a second search.
        let within = move |at: &usize| chunks.get(*at).is_some_and(|chunk| chunk.data_offset < end);
        (first..chunks.len()).take_while(within)
    }

    /// Fills `buf` from `offset` if all those bytes are ready; bytes that no chunk holds are zeros, and so are bytes after the end of the
    /// data space. `None`: some are not ready, were evicted meanwhile, or cannot be read from the disk (which makes them absent).
    ///
    /// This is the hit path: it takes no lock, allocates nothing, and waits for nothing but the disk.
    pub fn read_ready(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        let len = buf.len() as u64;
        let evictions = self.evictions.load(Ordering::SeqCst);
        if !self.is_ready(offset, len) {
            return None;
        }
        self.note_use(offset, len);
        if let Err(error) = self.pread(offset, buf) {
            self.distrust(offset, len, &error);
            return None;
        }
        // The pread has to be over before the count is loaded again.
        crate::sync::primitives::fence(Ordering::SeqCst);
        (self.evictions.load(Ordering::SeqCst) == evictions).then_some(Ok(()))
    }

    /// Whether the bytes of a chunk may be on disk, and have to be verified before anyone gets them.
    pub fn is_suspect(&self, chunk: usize) -> bool {
        self.suspect.get(chunk)
    }

    /// Like [`CachedLayer::read_ready`], but takes the chunks in `arrived` from there, waits for evictions to pass, verifies chunks that
    /// were written before a crash, and takes those that other layers have. Returns the positions of the chunks that are missing; if there are
    /// any, `buf` is not filled.
    ///
    /// It takes as long as hashing the suspect chunks does: not for threads that must not wait.
    pub fn read_present(&self, offset: u64, buf: &mut [u8], arrived: &BTreeMap<usize, Bytes>) -> Vec<usize> {
        let len = buf.len() as u64;
        buf.fill(0);
        for at in self.missing(offset, len) {
            if !self.suspect.get(at) && !arrived.contains_key(&at) {
                self.take_from_elsewhere(at);
            }
        }
        let mut missing = Vec::new();
        let mut failed = None;
        let shared = self.mutation.read().unwrap_or_else(PoisonError::into_inner);
        for at in self.positions(offset, len) {
            let Some(record) = self.index.chunks().get(at) else {
                break;
            };
            let (from, to) = (
                record.data_offset.max(offset),
                record.data_end().min(offset.saturating_add(len)),
            );
            let (skip, count) = ((from - record.data_offset) as usize, (to - from) as usize);
            let Some(place) = buf.get_mut((from - offset) as usize..).and_then(|b| b.get_mut(..count)) else {
                continue;
            };
            if let Some(bytes) = arrived.get(&at).and_then(|b| b.get(skip..skip + count)) {
                place.copy_from_slice(bytes);
            } else if !self.verify(at) {
                missing.push(at);
            } else if let Err(error) = self.cache.faults.read(&self.data.load(), place, from) {
                missing.push(at);
                failed = Some(error);
            }
        }
        drop(shared);
        self.note_use(offset, len);
        if let Some(error) = failed {
            self.distrust(offset, len, &error);
        }
        missing
    }

    /// Stores the bytes of the chunk at position `chunk`, after verifying them; with [`Verify::Span`] the caller has verified the span that
    /// they were decoded from. If there is no room, others are evicted; if that does not
    /// help, the bytes are bypassed. It blocks for as long as the disk does.
    ///
    /// # Errors
    /// [`CacheError::Corrupt`] if they are not the chunk's bytes, [`CacheError::Io`] if the disk fails.
    pub fn store(&self, chunk: usize, bytes: &[u8]) -> Result<Stored, CacheError> {
        let stored = self.store_unused(chunk, bytes)?;
        if stored == Stored::Cached
            && let Some(record) = self.index.chunks().get(chunk)
        {
            self.note_use(record.data_offset, record.data_len.into());
        }
        Ok(stored)
    }

    /// The same for bytes that nobody has asked for: among those in use, they are the first to give way.
    ///
    /// # Errors
    /// Those of [`CachedLayer::store`].
    pub fn store_unused(&self, chunk: usize, bytes: &[u8]) -> Result<Stored, CacheError> {
        let record = self.check_bytes(chunk, bytes)?;
        if self.ready.get(chunk) {
            return Ok(Stored::Cached);
        }
        let len = bytes.len() as u64;
        // Once more after making room: the disk may be full although the budget is not.
        for attempt in 0..2 {
            if self.cache.reserve(len, Some(&self.digest)).is_err() {
                break;
            }
            match self.write(chunk, &record, bytes) {
                // What it takes of the disk is counted now.
                Ok(true) => {
                    self.cache.hot().remove(self.digest, chunk);
                    return Ok(Stored::Cached);
                }
                Ok(false) => {
                    self.cache.release(len);
                    return Ok(Stored::Cached);
                }
                Err(source) => {
                    self.cache.release(len);
                    if !is_full(&source) {
                        return Err(CacheError::Io {
                            action: "write the data of",
                            path: self.dir.clone(),
                            source,
                        });
                    }
                    if attempt == 0 {
                        self.cache.make_room_now(len, Some(&self.digest));
                    }
                }
            }
        }
        self.cache.metrics().cache_bypassed_bytes_total.inc_by(len);
        Ok(Stored::Bypassed)
    }

    /// Keeps verified bytes that could not be stored in memory for a while.
    pub fn keep_hot(&self, chunk: usize, bytes: Bytes) {
        self.cache.hot().put(self.digest, chunk, bytes);
    }

    /// Bytes of a chunk that [`CachedLayer::keep_hot`] was given, if they are still there.
    pub fn hot(&self, chunk: usize) -> Option<Bytes> {
        self.cache.hot().get(self.digest, chunk)
    }

    /// Checks bytes against the digest of a chunk.
    fn check_bytes(&self, chunk: usize, bytes: &[u8]) -> Result<Chunk, CacheError> {
        let corrupt = |error| CacheError::Corrupt {
            layer: self.digest,
            chunk,
            source: Box::new(error),
        };
        let Some(record) = self.index.chunks().get(chunk) else {
            return Err(corrupt(LayerError::malformed(
                "layer index",
                chunk as u64,
                "there is no such chunk",
            )));
        };
        if bytes.len() as u64 != u64::from(record.data_len) {
            return Err(corrupt(LayerError::Truncated {
                format: "chunk",
                length: bytes.len() as u64,
                what: format!("{} bytes", record.data_len),
            }));
        }
        if self.index.verify() == Verify::Span {
            return Ok(record);
        }
        let actual = Digest::of(bytes);
        if actual != record.digest {
            return Err(corrupt(LayerError::DigestMismatch {
                what: "chunk",
                expected: record.digest,
                actual,
            }));
        }
        Ok(record)
    }

    /// Writes a chunk, then sets its bit; the bytes reserved for it are settled. `false`: another thread was faster.
    fn write(&self, chunk: usize, record: &Chunk, bytes: &[u8]) -> io::Result<bool> {
        let _shared = self.mutation.read().unwrap_or_else(PoisonError::into_inner);
        if self.ready.get(chunk) {
            return Ok(false);
        }
        self.unseal()?;
        self.cache.faults.write(&self.data.load(), bytes, record.data_offset)?;
        let was_suspect = self.suspect.clear(chunk);
        self.checked.set(chunk);
        if !self.ready.set(chunk) {
            return Ok(false);
        }
        self.unready.fetch_sub(1, Ordering::SeqCst);
        if !was_suspect {
            self.present.fetch_add(u64::from(record.data_len), Ordering::Relaxed);
        }
        self.account_growth(bytes.len() as u64);
        self.offer(chunk, record);
        self.cache.tick();
        if let Err(error) = self.write_map(chunk..chunk + 1) {
            // The chunk is there; after a crash it is fetched again.
            tracing::warn!(layer = %self.digest, chunk, "cannot write the map in {}: {error}", self.dir.display());
        }
        Ok(true)
    }

    /// After an error of the disk: what it should have read has to be verified before it is used.
    fn distrust(&self, offset: u64, len: u64, error: &io::Error) {
        tracing::error!(layer = %self.digest, offset, len, "cannot read {}: {error}", self.dir.display());
        let _exclusive = self.mutation.write().unwrap_or_else(PoisonError::into_inner);
        for chunk in self.positions(offset, len) {
            if self.ready.clear(chunk) {
                self.unready.fetch_add(1, Ordering::SeqCst);
                self.suspect.set(chunk);
                self.checked.clear(chunk);
            }
        }
    }

    /// When a group was used last.
    pub(super) fn group_used(&self, group: u64) -> u64 {
        let used = usize::try_from(group).ok().and_then(|group| self.used.get(group));
        used.map_or(0, |time| time.load(Ordering::Relaxed))
    }

    /// Whether much of it may be in memory alone, so that making it durable takes long.
    pub(super) fn is_dirty(&self) -> bool {
        let Ok(file) = self.data.load().metadata() else {
            return false;
        };
        let written = file.modified().ok().and_then(|at| at.elapsed().ok());
        file.blocks() * BLOCK > SEALED_AT_ONCE && written.is_none_or(|since| since < WRITTEN_BACK_AFTER)
    }

    /// Makes everything durable and believed after the next start.
    pub(super) fn seal(&self) -> Result<(), CacheError> {
        let _exclusive = self.mutation.write().unwrap_or_else(PoisonError::into_inner);
        // Chunks that nobody asked for since a crash are still suspect, and under a seal they would not be.
        if self.map().is_sealed() || self.suspect.ones().next().is_some() {
            return Ok(());
        }
        // Without a bit there is nothing to believe.
        if self.ready.ones().next().is_none() {
            return Ok(());
        }
        let synced = self.cache.faults.at(Point::Sync);
        synced
            .and_then(|()| self.data.load().sync_all())
            // Also that it is this file that has the name: another one may have had it when the directory was last written (evict.rs).
            .and_then(|()| File::open(&self.dir)?.sync_all())
            .and_then(|()| self.map().seal(&self.ready))
            .map_err(CacheError::io("write", &self.dir))
    }

    pub(super) fn allocated_handle(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.allocated)
    }

    pub(super) fn touch(&self) {
        // Only the order of eviction after the next start depends on it.
        let _ = self.map().touch();
    }

    pub(super) fn map(&self) -> MutexGuard<'_, MapFile> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Breaks the seal of the map, before the first change of what is under it.
    pub(super) fn unseal(&self) -> io::Result<()> {
        self.cache.faults.at(Point::Map)?;
        self.map().unseal()
    }

    /// Writes the bits of `chunks` to the map. The words are loaded under the lock, so that an older one never replaces a newer one.
    pub(super) fn write_map(&self, chunks: Range<usize>) -> io::Result<()> {
        self.cache.faults.at(Point::Map)?;
        let map = self.map();
        for word in chunks.start / WORD..chunks.end.div_ceil(WORD) {
            map.write_word(word, self.ready.word(word) | self.suspect.word(word))?;
        }
        Ok(())
    }

    fn note_use(&self, offset: u64, len: u64) {
        let now = self.cache.now();
        let (first, last) = (offset / GROUP, offset.saturating_add(len.saturating_sub(1)) / GROUP);
        for group in first..=last {
            match self.used.get(group as usize) {
                // Most of the time it is the same: no write, no cache line taken from other readers.
                Some(used) if used.load(Ordering::Relaxed) != now => used.store(now, Ordering::Relaxed),
                Some(_) => {}
                None => break,
            }
        }
    }

    fn pread(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let inside = self.index.data_size().saturating_sub(offset).min(buf.len() as u64) as usize;
        let (inside, outside) = buf.split_at_mut(inside);
        outside.fill(0);
        let data = self.data.load();
        self.cache.faults.at(Point::Read)?;
        if (inside.len() as u64) < NEIGHBOURS {
            let part = &mut [IoSliceMut::new(inside)];
            match rustix::io::preadv2(&**data, part, offset, ReadWriteFlags::NOWAIT) {
                Ok(count) if count == inside.len() => return Ok(()),
                // Where the file system cannot tell, all reads would look as if they missed.
                Err(rustix::io::Errno::OPNOTSUPP) => {}
                // Not all of it is in the page cache. If there is more to say, the second read says it.
                _ => self.advise_neighbours(&data, offset, inside.len() as u64),
            }
        }
        data.read_exact_at(inside, offset)
    }

    /// Has the kernel read what lies around small chunks together with them.
    fn advise_neighbours(&self, data: &File, offset: u64, len: u64) {
        let small = |at: usize| self.index.chunks().get(at).is_some_and(|chunk| chunk.data_len <= SMALL);
        if self.positions(offset, len).all(small) {
            let start = offset - offset % NEIGHBOURS;
            // It is only faster with it.
            let _ = rustix::fs::fadvise(data, start, NonZeroU64::new(NEIGHBOURS), Advice::WillNeed);
        }
    }
}

/// Bytes of the unit in which `st_blocks` counts.
pub(super) const BLOCK: u64 = 512;

impl std::fmt::Debug for CachedLayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CachedLayer")
            .field("digest", &self.digest)
            .field("present", &self.present_bytes())
            .finish_non_exhaustive()
    }
}

impl Drop for CachedLayer {
    fn drop(&mut self) {
        self.names.close(&self.cache.residents);
        self.delist();
        // Nobody has it open any more: it may vanish.
        self.cache.wake();
    }
}
