//! Eviction of a layer's chunks.
//!
//! Bytes are taken off the disk by punching a hole, or by emptying the file when all of them go. Neither is done to a file that is
//! held (hold.rs), nor to one that is still mounted though nobody holds it, as in an overlay that has kept the mount: that one would read
//! zeros. Such files are not evicted at all, as what the kernel needs stays on the disk, with a name or without.
//!
//! A file that was mounted once, and as far as the file system can tell is no more, is not changed in place even so: the layer gets a
//! new, empty file. Where the file system cannot tell, the old one may live on without a name for as long as the kernel needs it.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use rustix::fs::FallocateFlags;

use super::CachedLayer;
use super::hold::file_size;
use super::layer::GROUP;

/// Name of a data file before it takes the place of the one that was mounted.
const NEXT: &str = "data.next";

impl CachedLayer {
    /// Removes the chunks at `chunks` from the disk (all of them, where the file was mounted); the bytes that were freed.
    fn evict(&self, chunks: Range<usize>) -> u64 {
        let records = self.index.chunks();
        let _exclusive = self.mutation.write().unwrap_or_else(PoisonError::into_inner);
        if self.is_held() {
            return 0;
        }
        if self.is_mounted() {
            return 0;
        }
        let exposed = self.exposed.load(Ordering::SeqCst);
        let chunks = if exposed { 0..records.len() } else { chunks };
        let (Some(first), Some(last)) = (records.get(chunks.start), records.get(chunks.end.wrapping_sub(1))) else {
            return 0;
        };
        let failed = |error: io::Error| {
            tracing::error!(layer = %self.digest, "cannot evict from {}: {error}", self.dir.display());
        };
        // Made first: once the bits are cleared, there has to be a place for the bytes that come.
        let next = match exposed.then(|| self.next_file()).transpose() {
            Ok(next) => next,
            Err(error) => {
                failed(error);
                return 0;
            }
        };
        if let Err(error) = self.unseal() {
            // Bits under a seal must not outlive their bytes.
            tracing::error!(layer = %self.digest, "cannot write the map in {}: {error}", self.dir.display());
            return 0;
        }
        for chunk in chunks.clone() {
            let was_ready = self.ready.clear(chunk);
            if was_ready {
                self.unready.fetch_add(1, Ordering::SeqCst);
            }
            if self.suspect.clear(chunk) || was_ready {
                self.present.fetch_sub(
                    records.get(chunk).map_or(0, |record| record.data_len.into()),
                    Ordering::Relaxed,
                );
            }
            self.checked.clear(chunk);
        }
        self.evictions.fetch_add(1, Ordering::SeqCst);
        let whole = chunks.len() == records.len();
        let result = self.write_map(chunks).and_then(|()| {
            if let Some(next) = next {
                return self.replace(next);
            }
            let data = self.data.load();
            if whole {
                // Also frees what no bit tells of, and works where holes do not.
                data.set_len(0)?;
                data.set_len(file_size(self.index.data_size()))?;
                self.clean.store(true, Ordering::SeqCst);
                return Ok(());
            }
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let len = last.data_end() - first.data_offset;
            Ok(rustix::fs::fallocate(&**data, flags, first.data_offset, len)?)
        });
        if let Err(error) = result {
            failed(error);
        }
        self.account()
    }

    fn next_file(&self) -> io::Result<File> {
        // One that a crash has left behind was never in place, and so never mounted.
        let mut options = File::options();
        let file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(self.dir.join(NEXT))?;
        file.set_len(file_size(self.index.data_size()))?;
        Ok(file)
    }

    /// Puts an empty file in the place of one that was mounted. The caller holds `mutation` exclusively, and has cleared all bits.
    fn replace(&self, next: File) -> io::Result<()> {
        fs::rename(self.dir.join(NEXT), self.dir.join("data"))?;
        self.data.store(Arc::new(next));
        self.clean.store(true, Ordering::SeqCst);
        self.unmark_exposed()
    }

    /// Removes everything but the index from the disk; the bytes that were freed.
    pub(crate) fn evict_all(&self) -> u64 {
        self.evict(0..self.index.chunks().len())
    }

    /// Removes the chunks that begin in a group; the bytes that were freed.
    pub(super) fn evict_group(&self, group: u64) -> u64 {
        self.evict(self.group_chunks(group))
    }

    /// Groups that hold any bytes, and when they were used last.
    pub(super) fn groups(&self) -> Vec<(u64, u64)> {
        let chunks = self.index.chunks();
        let mut groups: Vec<u64> = self
            .ready
            .ones()
            .chain(self.suspect.ones())
            .filter_map(|at| Some(chunks.get(at)?.data_offset / GROUP))
            .collect();
        groups.sort_unstable();
        groups.dedup();
        groups.iter().map(|&group| (self.group_used(group), group)).collect()
    }

    fn group_chunks(&self, group: u64) -> Range<usize> {
        let chunks = self.index.chunks();
        let start = chunks.partition_point(|chunk| chunk.data_offset < group.saturating_mul(GROUP));
        let end = chunks.partition_point(|chunk| chunk.data_offset < group.saturating_add(1).saturating_mul(GROUP));
        start..end
    }
}
