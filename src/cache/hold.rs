//! A whole layer as a file that others mount.
//!
//! A layer is *whole* when each of its chunks is on disk and was verified by this process, and all else in its file is zeros. Its file may
//! then be mounted without the cache in between: the kernel reads it as it is. A [`Hold`] is the promise to whoever mounts it that it stays
//! as it is: nothing is evicted or punched, and no other file takes its place, whatever the budget says.
//!
//! The promise ends with the last hold, but a mount may not: an overlay keeps the file systems that it was made of, and after a `kill -9`
//! nobody holds what is still mounted. So a file that was held once is *exposed* until it is replaced: it is never changed in
//! place, nor evicted while the kernel still has it open (evict.rs). The file `mounted` beside it, which names the boot of the machine,
//! tells the next process so.

use std::any::Any;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::CachedLayer;
use super::disk::small_files;

/// Unit in which the kernel reads a file: the data file is as long as a whole number of them.
const PAGE: u64 = 4096;
/// Name of the file that says that the data was mounted.
pub(super) const MARKER: &str = "mounted";
/// The kernel's name of this boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Length of a layer's data file in bytes: its data space of `size` bytes, and zeros up to the end of a page.
pub(super) fn file_size(size: u64) -> u64 {
    size.checked_next_multiple_of(PAGE).unwrap_or(size)
}

/// What this boot of the machine is called; no mount outlives it.
pub(super) fn boot_id() -> String {
    // Where it cannot be read, every file that was ever mounted counts as mounted.
    fs::read_to_string(BOOT_ID).unwrap_or_default().trim().to_owned()
}

/// Whether the data of the layer in `dir` was mounted since the machine was booted, as far as is known.
pub(super) fn is_exposed(dir: &Path, boot_id: &str) -> bool {
    match fs::read_to_string(dir.join(MARKER)) {
        Ok(marked) => marked == boot_id,
        // A mark that cannot be read is one: nothing is to be taken from under a mount because the disk has lost a few bytes.
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

/// Notes that the data of the layer in `dir` is another file now, which was never mounted.
pub(super) fn unmark(dir: &Path) -> io::Result<()> {
    match fs::remove_file(dir.join(MARKER)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Why a layer's file cannot be mounted now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotWhole {
    /// Some of its bytes are not on disk.
    Missing,
    /// All bytes are there, but not all were verified by this process: [`CachedLayer::check_all`] does that.
    Unchecked,
    /// The disk fails; it is logged.
    Disk,
}

impl CachedLayer {
    /// Holds the file as it is, if the layer is whole, and tells where it is: the data space, with zeros up to the end of a page. It waits
    /// for evictions under way, and for nothing else.
    ///
    /// # Errors
    /// [`NotWhole`] says what is missing.
    pub fn hold(self: &Arc<Self>) -> Result<(PathBuf, Hold), NotWhole> {
        // Evictions are exclusive, so that none is under way now, and the next sees the hold.
        let _shared = self.mutation.read().unwrap_or_else(PoisonError::into_inner);
        let all = self.index.chunks().len();
        if !self.is_complete() {
            return match self.is_all_there() {
                true => Err(NotWhole::Unchecked),
                false => Err(NotWhole::Missing),
            };
        }
        if !self.clean.load(Ordering::SeqCst) || self.checked.count() < all {
            return Err(NotWhole::Unchecked);
        }
        // On disk before anyone can mount it. It need not survive more than this process: a power cut ends all mounts.
        if let Err(error) = self.mark_exposed() {
            tracing::error!(layer = %self.digest, "cannot write in {}: {error}", self.dir.display());
            return Err(NotWhole::Disk);
        }
        self.holds.fetch_add(1, Ordering::SeqCst);
        let held = Held(Arc::clone(self));
        Ok((self.dir.join("data"), Hold::new(held)))
    }

    /// Notes that the file may be mounted though nobody holds it: from now on it is never changed in place.
    pub fn expose(&self) {
        let _shared = self.mutation.read().unwrap_or_else(PoisonError::into_inner);
        // This process leaves it alone also when the next one cannot be told.
        self.exposed.store(true, Ordering::SeqCst);
        if let Err(error) = self.mark_exposed() {
            tracing::error!(layer = %self.digest, "cannot write in {}: {error}", self.dir.display());
        }
    }

    /// The caller holds `mutation`. It counts as marked only once it is: what could not be written is written by the next who wants it.
    fn mark_exposed(&self) -> io::Result<()> {
        let mut marked = self.marked.lock().unwrap_or_else(PoisonError::into_inner);
        if !*marked {
            fs::write(self.dir.join(MARKER), self.cache.boot_id())?;
            *marked = true;
            self.small.store(small_files(&self.dir), Ordering::Relaxed);
            self.account_growth(0);
        }
        self.exposed.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Notes that the data is another file now, which was never mounted. The caller holds `mutation` exclusively.
    pub(super) fn unmark_exposed(&self) -> io::Result<()> {
        self.exposed.store(false, Ordering::SeqCst);
        *self.marked.lock().unwrap_or_else(PoisonError::into_inner) = false;
        unmark(&self.dir)
    }

    /// Whether somebody holds the file.
    pub fn is_held(&self) -> bool {
        self.holds.load(Ordering::SeqCst) > 0
    }

    /// Whether the file may be mounted somewhere, though nobody may hold it.
    pub(super) fn is_exposed(&self) -> bool {
        self.exposed.load(Ordering::SeqCst)
    }

    /// Whether every byte is on disk, verified or not.
    fn is_all_there(&self) -> bool {
        (0..self.ready.words())
            .map(|at| (self.ready.word(at) | self.suspect.word(at)).count_ones() as usize)
            .sum::<usize>()
            == self.index.chunks().len()
    }
}

/// Keeps every byte of a layer's data file in place as long as it lives: see [`CachedLayer::hold`].
pub struct Hold {
    /// What ends the hold when it is dropped.
    _guard: Box<dyn Any + Send + Sync>,
}

impl Hold {
    /// A hold that ends when `guard` is dropped.
    pub fn new(guard: impl Any + Send + Sync) -> Self {
        Hold {
            _guard: Box::new(guard),
        }
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hold")
    }
}

/// A layer whose file is held.
struct Held(Arc<CachedLayer>);

impl Drop for Held {
    fn drop(&mut self) {
        if self.0.holds.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.cache.wake();
        }
    }
}
