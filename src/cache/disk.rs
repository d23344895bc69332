//! What the cache takes of the disk: every block of every file, whoever reads it and whether it still has its layer.
//!
//! A layer counts with all its files: data, index, map, windows and marks. Beside layers count what stages have written, files that have
//! lost their layer while they were mounted, and directories of others that live from this disk ([`Cache::also_count`]).
//!
//! # Files that have lost their layer
//! A data file that is mounted takes its space until the last mount has gone, whether it has a name or not. So it keeps one, in
//! `.replaced/`, and counts, until nobody has it open any more, as far as the file system can tell ([`crate::sys::lease`]); where it cannot,
//! such a file is deleted at once, and the marks (marks.rs) see what it takes in how full the disk is.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::dir::DIR_MODE;
use super::hold::is_exposed;
use super::layer::BLOCK;
use super::{Cache, CachedLayer};
use crate::layer::Digest;
use crate::sync::primitives::{Mutex, MutexGuard};
use crate::sys::lease::is_open_elsewhere;

/// Directory of files that have lost their layer.
const REPLACED: &str = ".replaced";
/// Name of a layer's data space in its directory.
pub(super) const DATA: &str = "data";

/// Bytes of all files in the directory of a layer.
pub(super) fn disk_use(dir: &Path) -> u64 {
    sum(dir, |_| true)
}

/// Bytes of a layer's files without its data.
pub(super) fn small_files(dir: &Path) -> u64 {
    sum(dir, |name| name != DATA)
}

/// Bytes that the files in `dir` take on disk. Nothing else is looked at: a mount point may be that of a dead server.
fn sum(dir: &Path, counts: impl Fn(&str) -> bool) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_str().is_some_and(&counts))
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()))
        .filter_map(|entry| entry.metadata().ok())
        .map(|metadata| metadata.blocks().saturating_mul(BLOCK))
        .sum()
}

/// What counts without being a layer.
#[derive(Default)]
pub(super) struct Beside {
    /// Directories of others, and what their files took when they were looked at.
    others: Mutex<Vec<(PathBuf, u64)>>,
    /// Files that have lost their layer, and what they take.
    replaced: Mutex<Vec<(PathBuf, u64)>>,
}

impl Beside {
    fn replaced(&self) -> MutexGuard<'_, Vec<(PathBuf, u64)>> {
        self.replaced.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Cache {
    /// Counts the files in `dirs` too, which are no layers, but bytes of layers' names and attributes: what they take is found out now, and
    /// again whenever the cache is tidied.
    pub fn also_count(&self, dirs: impl IntoIterator<Item = PathBuf>) {
        let mut others = self.beside.others.lock().unwrap_or_else(PoisonError::into_inner);
        others.extend(dirs.into_iter().map(|dir| (dir, 0)));
        drop(others);
        self.recount();
    }

    /// Looks again at what may have changed without having been told of: directories of others, and files of layers whose blocks the file
    /// system has arranged differently since.
    pub(super) fn recount(&self) {
        let mut others = self.beside.others.lock().unwrap_or_else(PoisonError::into_inner);
        for (dir, bytes) in others.iter_mut() {
            let now = disk_use(dir);
            self.settle(std::mem::replace(bytes, now), now);
        }
        drop(others);
        let open: Vec<_> = self.known().iter().filter_map(|(_, e)| e.open.upgrade()).collect();
        for layer in open {
            // Who writes just now counts by itself.
            if let Ok(_exclusive) = layer.mutation.try_write() {
                layer.account();
            }
        }
    }

    /// Bytes of files that have lost their layer and are still mounted.
    pub fn replaced_bytes(&self) -> u64 {
        self.beside.replaced().iter().map(|(_, bytes)| bytes).sum()
    }

    /// Whether others than this process have the data of a layer open; `None`: it cannot be told.
    pub(super) fn is_in_use(&self, data: &File) -> Option<bool> {
        #[cfg(test)]
        let data = Some(data).filter(|_| !self.blind.load(Ordering::Relaxed))?;
        is_open_elsewhere(data)
    }

    /// Whether the data of a layer that nobody has open is mounted: it gives no room if it goes.
    pub(super) fn is_mounted(&self, layer: &Digest) -> bool {
        let dir = self.layer_dir(layer);
        is_exposed(&dir, self.boot_id())
            && File::open(dir.join(DATA)).is_ok_and(|data| self.is_in_use(&data) == Some(true))
    }

    /// Takes the data of a layer that is about to be deleted out of `dir` and keeps it in sight, if it is mounted; its bytes.
    pub(super) fn keep_mounted(&self, dir: &Path) -> u64 {
        if !is_exposed(dir, self.boot_id()) {
            return 0;
        }
        let name = dir.join(DATA);
        let Some(bytes) = File::open(&name).ok().and_then(|data| self.keep_if_mounted(dir, &data)) else {
            return 0;
        };
        // The rest is deleted later. As long as the data had its name there, it would pass for a layer's.
        if let Err(error) = fs::remove_file(&name) {
            tracing::warn!("a mounted file keeps its name {}: {error}", name.display());
        }
        bytes
    }

    /// Gives the data in `dir` a second name, under which it stays in sight, if it is mounted; its bytes then.
    pub(super) fn keep_if_mounted(&self, dir: &Path, data: &File) -> Option<u64> {
        if self.is_in_use(data) != Some(true) {
            return None;
        }
        let parent = self.layers().join(REPLACED);
        let keep = || -> io::Result<(PathBuf, u64)> {
            DirBuilder::new().recursive(true).mode(DIR_MODE).create(&parent)?;
            let inode = data.metadata()?;
            let path = parent.join(inode.ino().to_string());
            match fs::hard_link(dir.join(DATA), &path) {
                // It is the same file: no other has its inode while that one is mounted.
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
                _ => Ok((path, inode.blocks().saturating_mul(BLOCK))),
            }
        };
        match keep() {
            Ok((path, bytes)) => {
                self.occupy(bytes);
                self.beside.replaced().push((path, bytes));
                self.show_replaced();
                Some(bytes)
            }
            // It is deleted then as if it were not mounted, which harms nobody.
            Err(error) => {
                tracing::warn!("a mounted file loses its name in {}: {error}", parent.display());
                None
            }
        }
    }

    /// Finds the files of an earlier process that have lost their layer.
    pub(super) fn find_replaced(&self) {
        let entries = fs::read_dir(self.layers().join(REPLACED))
            .into_iter()
            .flatten()
            .flatten();
        let found: Vec<_> = entries
            .filter_map(|entry| Some((entry.path(), entry.metadata().ok()?.blocks().saturating_mul(BLOCK))))
            .collect();
        self.occupy(found.iter().map(|(_, bytes)| bytes).sum());
        *self.beside.replaced() = found;
        self.sweep();
    }

    /// Deletes files that have lost their layer and that nobody has open any more.
    pub(super) fn sweep(&self) {
        self.beside.replaced().retain(|(path, bytes)| {
            // What a crash has left with two names is a layer's data still.
            let is_needed = |file: File| {
                file.metadata().is_ok_and(|metadata| metadata.nlink() == 1) && self.is_in_use(&file) == Some(true)
            };
            if File::open(path).is_ok_and(is_needed) {
                return true;
            }
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::error!("cannot delete {}: {error}", path.display());
                    true
                }
                _ => {
                    self.release(*bytes);
                    false
                }
            }
        });
        self.show_replaced();
    }

    fn show_replaced(&self) {
        let bytes = i64::try_from(self.replaced_bytes()).unwrap_or(i64::MAX);
        self.metrics().cache_replaced_bytes.set(bytes);
    }
}

impl CachedLayer {
    /// Whether the file is mounted though nobody holds it: an overlay keeps the file systems that it was made of.
    pub(super) fn is_mounted(&self) -> bool {
        self.is_exposed() && self.cache.is_in_use(&self.data.load()) == Some(true)
    }

    /// Brings the count of bytes on disk up to date; the bytes that are less than before. The caller holds `mutation` exclusively.
    pub(super) fn account(&self) -> u64 {
        let Ok(metadata) = self.data.load().metadata() else {
            return 0;
        };
        let small = small_files(&self.dir);
        self.small.store(small, Ordering::Relaxed);
        let now = metadata.blocks().saturating_mul(BLOCK).saturating_add(small);
        let before = self.allocated.swap(now, Ordering::Relaxed);
        self.cache.settle(before, now);
        before.saturating_sub(now)
    }

    /// Counts what was written, in place of the `reserved` bytes that were counted for it. The caller shares `mutation`, so that the file can
    /// only have grown.
    pub(super) fn account_growth(&self, reserved: u64) {
        let blocks = self.data.load().metadata().map_or(0, |metadata| metadata.blocks());
        let now = blocks.saturating_mul(BLOCK) + self.small.load(Ordering::Relaxed);
        let before = self.allocated.fetch_max(now, Ordering::Relaxed);
        self.cache.settle(reserved, now.saturating_sub(before));
    }
}
