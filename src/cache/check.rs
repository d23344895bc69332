//! Verification of bytes that are on disk already.
//!
//! Bytes of an earlier process are verified before their first use if it did not end in order, and all of them, whatever the map says,
//! before their file is mounted: from then on nobody stands between the disk and the reader. A chunk that is damaged becomes absent.
//! Bytes that no chunk covers are zeros by definition, and made so.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::CachedLayer;
use super::faults::Point;
use super::hold::file_size;
use crate::layer::digest::Hasher;
use crate::layer::{Chunk, Verify};

/// Bytes read at a time.
const BUFFER: u64 = 1 << 20;
/// Bytes after which [`CachedLayer::check_all`] rests for as long as they took: it never takes more than half of a processor and a disk.
const REST_AFTER: u64 = 8 << 20;

/// What [`CachedLayer::check_all`] found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checked {
    /// Positions of the chunks that were damaged, and are absent now.
    pub damaged: Vec<usize>,
    /// Whether it came to the end.
    pub finished: bool,
}

/// What a chunk is found to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    Ready,
    Absent,
    /// It was there, and its bytes were others.
    Damaged,
}

impl CachedLayer {
    /// Verifies every chunk on disk that this process has not verified yet, and makes everything between the chunks zeros; after it, a
    /// layer of which nothing is missing is whole. It goes slowly on purpose; when `stop` says so, it ends early.
    ///
    /// Blocks for as long as it takes to read the file twice.
    pub fn check_all(&self, stop: impl Fn() -> bool) -> Checked {
        let mut found = Checked::default();
        let (mut begin, mut bytes) = (Instant::now(), 0);
        let mut rest = |more: u64| {
            bytes += more;
            if bytes >= REST_AFTER {
                std::thread::sleep(begin.elapsed());
                (begin, bytes) = (Instant::now(), 0);
            }
        };
        for (at, record) in self.index.chunks().iter().enumerate() {
            if stop() {
                return found;
            }
            if self.checked.get(at) || !(self.ready.get(at) || self.suspect.get(at)) {
                continue;
            }
            if !self.check(at, &record) {
                found.damaged.push(at);
            }
            rest(record.data_len.into());
        }
        found.finished = match self.clear_gaps(&stop) {
            Ok(finished) => finished,
            Err(error) => {
                tracing::error!(layer = %self.digest, "cannot look for stray bytes in {}: {error}", self.dir.display());
                false
            }
        };
        found
    }

    /// Verifies a chunk that is ready or suspect. `false`: it was damaged, and is absent now.
    fn check(&self, at: usize, record: &Chunk) -> bool {
        {
            let _shared = self.mutation.read().unwrap_or_else(PoisonError::into_inner);
            if self.suspect.get(at) {
                return self.look_at(at) != Look::Damaged;
            }
            if !self.ready.get(at) || self.checked.get(at) {
                return true;
            }
            // It was verified before it came to the disk, and cannot be again: good to read, and not to be mounted.
            if self.index.verify() == Verify::Span {
                return true;
            }
            match self.is_intact(record) {
                Ok(true) => {
                    self.checked.set(at);
                    return true;
                }
                Ok(false) => self.tell_damage(at, "other bytes"),
                Err(error) => self.tell_damage(at, &error.to_string()),
            }
        }
        let _exclusive = self.mutation.write().unwrap_or_else(PoisonError::into_inner);
        // Stored anew in between: those bytes are good.
        if self.checked.get(at) {
            return true;
        }
        if let Err(error) = self.unseal() {
            tracing::error!(layer = %self.digest, "cannot write the map in {}: {error}", self.dir.display());
        }
        if self.ready.clear(at) {
            self.unready.fetch_add(1, Ordering::SeqCst);
            self.present.fetch_sub(record.data_len.into(), Ordering::Relaxed);
            // Whoever reads it at this moment reads again.
            self.evictions.fetch_add(1, Ordering::SeqCst);
        }
        if let Err(error) = self.write_map(at..at + 1) {
            tracing::warn!(layer = %self.digest, chunk = at, "cannot write the map in {}: {error}", self.dir.display());
        }
        false
    }

    /// Verifies a chunk that is suspect; whether it is ready then. The caller holds `mutation`.
    pub(super) fn verify(&self, chunk: usize) -> bool {
        self.look_at(chunk) == Look::Ready
    }

    /// The same, and why it is not ready: one that is stored at this moment is neither suspect nor ready, and not damaged.
    fn look_at(&self, chunk: usize) -> Look {
        let is_ready = || match self.ready.get(chunk) {
            true => Look::Ready,
            false => Look::Absent,
        };
        if !self.suspect.get(chunk) {
            return is_ready();
        }
        let Some(record) = self.index.chunks().get(chunk) else {
            return Look::Absent;
        };
        let intact = match self.index.verify() {
            Verify::Content => self.is_intact(&record),
            // A torn write cannot be told from a whole one.
            Verify::Span => Ok(false),
        };
        if matches!(intact, Ok(true)) {
            self.checked.set(chunk);
            if self.ready.set(chunk) {
                self.unready.fetch_sub(1, Ordering::SeqCst);
            }
            self.suspect.clear(chunk);
            return Look::Ready;
        }
        if self.suspect.clear(chunk) {
            self.present.fetch_sub(u64::from(record.data_len), Ordering::Relaxed);
            let why = intact.err().map_or_else(|| "other bytes".to_owned(), |e| e.to_string());
            self.tell_damage(chunk, &why);
            return Look::Damaged;
        }
        is_ready()
    }

    fn is_intact(&self, record: &Chunk) -> io::Result<bool> {
        self.cache.faults.at(Point::Read)?;
        is_intact(&self.data.load(), record)
    }

    fn tell_damage(&self, chunk: usize, why: &str) {
        let failures = &self.cache.metrics().verify_failures_total;
        failures.with_label_values(&["disk"]).inc();
        tracing::warn!(layer = %self.digest, chunk, "a chunk in the cache is damaged and will be fetched again: {why}");
    }

    /// Makes what lies between the chunks, and after them, zeros. `false`: it was stopped.
    fn clear_gaps(&self, stop: impl Fn() -> bool) -> io::Result<bool> {
        if self.clean.load(Ordering::SeqCst) {
            return Ok(true);
        }
        let ends = self.index.chunks().iter().map(|chunk| chunk.data_offset);
        let ends = ends.chain([file_size(self.index.data_size())]);
        let mut begin = 0;
        let mut starts = vec![0];
        starts.extend(self.index.chunks().iter().map(|chunk| chunk.data_end()));
        let evictions = self.evictions.load(Ordering::SeqCst);
        let mut stray = 0;
        for (start, end) in starts.into_iter().zip(ends) {
            begin = start.max(begin);
            if begin >= end {
                continue;
            }
            if stop() {
                return Ok(false);
            }
            let _shared = self.mutation.read().unwrap_or_else(PoisonError::into_inner);
            stray += clear(&self.data.load(), begin, end)?;
        }
        if stray > 0 {
            tracing::warn!(layer = %self.digest, bytes = stray, "the file in the cache held bytes that belong to no chunk; they are zeros now");
        }
        let _shared = self.mutation.read().unwrap_or_else(PoisonError::into_inner);
        // Another file may have taken its place; it is clean by itself, or looked at the next time.
        if self.evictions.load(Ordering::SeqCst) == evictions {
            self.clean.store(true, Ordering::SeqCst);
        }
        Ok(self.clean.load(Ordering::SeqCst))
    }
}

/// Whether a chunk on disk has the bytes that its digest promises.
fn is_intact(data: &File, record: &Chunk) -> io::Result<bool> {
    let mut hasher = Hasher::new();
    let mut buf = vec![0; u64::from(record.data_len).min(BUFFER) as usize];
    let mut at = record.data_offset;
    while at < record.data_end() {
        let count = (record.data_end() - at).min(BUFFER) as usize;
        data.read_exact_at(&mut buf[..count], at)?;
        hasher.update(&buf[..count]);
        at += count as u64;
    }
    Ok(hasher.finish() == record.digest)
}

/// Writes zeros over what is not zero from `start` to `end` of a file; the bytes in blocks that had any. Holes are not read.
fn clear(data: &File, start: u64, end: u64) -> io::Result<u64> {
    let mut cleared = 0;
    let mut at = start;
    let mut buf = Vec::new();
    while at < end {
        at = match seek(data, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => break,
            found => found?.max(at),
        };
        let hole = if at < end {
            seek(data, SeekFrom::Hole(at))?.min(end)
        } else {
            end
        };
        while at < hole {
            let count = (hole - at).min(BUFFER) as usize;
            buf.resize(count, 0);
            data.read_exact_at(&mut buf, at)?;
            if buf.iter().any(|&byte| byte != 0) {
                buf.fill(0);
                data.write_all_at(&buf, at)?;
                cleared += count as u64;
            }
            at += count as u64;
        }
    }
    Ok(cleared)
}
