//! A layer in the making, in a directory of its own: nobody sees it before it is complete and durable.

use std::fs::{File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use tempfile::TempDir;

use super::bitmap::Bitmap;
use super::budget::full;
use super::dir::DIR_MODE;
use super::disk::{disk_use, small_files};
use super::error::is_full;
use super::faults::Point;
use super::hold::file_size;
use super::layer::Files;
use super::map::{self, MapFile};
use super::windows::{self, WindowFile};
use super::{Cache, CacheError, CachedLayer, Key};
use crate::layer::{Digest, LayerIndex, Windows};
use crate::sync::primitives::{AtomicU64, Ordering};
use crate::sys::writeback::begin_writeback;

/// Unit in which file systems give room to files, in bytes; nearly all have this one.
const FILE_BLOCK: u64 = 4096;

/// Bytes that are written before the disk is told to begin with them: many extents' worth, and a fraction of a second for any disk.
const WRITE_BACK: u64 = 32 << 20;

/// A layer in the making. Dropped without [`Staging::commit`], it vanishes.
pub struct Staging {
    cache: Arc<Cache>,
    /// By what the cache knows it: its id.
    digest: Digest,
    blob: Digest,
    dir: TempDir,
    data: File,
    /// Bytes counted in the cache's budget.
    reserved: u64,
    /// Up to where of the data space the kernel was told to write.
    on_its_way: u64,
}

impl Staging {
    pub(super) fn new(cache: Arc<Cache>, key: Key) -> Result<Self, CacheError> {
        let parent = cache.incoming();
        let dir = tempfile::Builder::new()
            .prefix(&format!("{}-", key.id.hex()))
            .permissions(Permissions::from_mode(DIR_MODE))
            .tempdir_in(&parent)
            .map_err(CacheError::io("create a directory in", &parent))?;
        let path = dir.path().join("data");
        let data = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(CacheError::io("create", &path))?;
        Ok(Staging {
            cache,
            digest: key.id,
            blob: key.blob,
            dir,
            data,
            reserved: 0,
            on_its_way: 0,
        })
    }

    /// Writes `bytes` at `offset` of the data space, evicting others if there is no room.
    ///
    /// # Errors
    /// [`CacheError::Full`] or [`CacheError::Io`].
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), CacheError> {
        let len = bytes.len() as u64;
        let reserve = |reason| full(&self.digest, len, reason);
        self.cache.reserve(len, Some(&self.digest)).map_err(reserve)?;
        self.reserved += len;
        let mut written = self.cache.faults.write(&self.data, bytes, offset);
        if written.as_ref().is_err_and(is_full) {
            self.cache.make_room_now(len, Some(&self.digest));
            written = self.cache.faults.write(&self.data, bytes, offset);
        }
        written.map_err(|source| {
            if is_full(&source) {
                full(&self.digest, len, source.to_string())
            } else {
                CacheError::io("write", self.dir.path())(source)
            }
        })?;
        self.write_back(offset + len);
        Ok(())
    }

    /// Has the disk begin with what was written up to `end`, so that the sync of a large layer has little left to wait for.
    fn write_back(&mut self, end: u64) {
        let len = end.saturating_sub(self.on_its_way);
        if len >= WRITE_BACK {
            if let Err(error) = begin_writeback(&self.data, self.on_its_way, len) {
                tracing::debug!(%error, "a layer's data are not written ahead of their sync");
            }
            self.on_its_way = end;
        }
    }

    /// Reads back what was written; bytes that never were are zeros.
    ///
    /// # Errors
    /// [`CacheError::Io`].
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), CacheError> {
        let mut filled = 0;
        while filled < buf.len() {
            match self
                .data
                .read_at(&mut buf[filled..], offset.saturating_add(filled as u64))
            {
                Ok(0) => {
                    buf[filled..].fill(0);
                    break;
                }
                Ok(n) => filled += n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(CacheError::io("read", self.dir.path())(error)),
            }
        }
        Ok(())
    }

    /// Makes the layer durable, then visible. With `complete`, all of its chunks are there; otherwise none is.
    ///
    /// The caller has verified every byte against the digests in `index`.
    ///
    /// # Errors
    /// [`CacheError`]; the layer vanishes then.
    pub fn commit(self, index: LayerIndex, complete: bool) -> Result<Arc<CachedLayer>, CacheError> {
        self.commit_with_windows(index, &Windows::new(), complete)
    }

    /// Like [`Staging::commit`], for an index with checkpoints and their windows.
    ///
    /// # Errors
    /// [`CacheError`], also when the windows are not those of the index.
    pub fn commit_with_windows(
        mut self,
        index: LayerIndex,
        windows: &Windows,
        complete: bool,
    ) -> Result<Arc<CachedLayer>, CacheError> {
        let chunks = index.chunks().len();
        let encoded = index.encode();
        let id = Digest::of(&encoded);
        let ready = Bitmap::new(chunks);
        for chunk in (0..chunks).filter(|_| complete) {
            ready.set(chunk);
        }
        let words: Vec<u64> = (0..ready.words()).map(|at| ready.word(at)).collect();
        let map = map::encode(complete, chunks, &id, &words);
        let windows = (!index.checkpoints().is_empty()).then(|| windows.encode(&id));
        let files = [encoded.len(), map.len(), windows.as_ref().map_or(0, Vec::len)];
        self.reserve_files(files.map(|len| len as u64));
        let dir = self.dir.path();
        let data_path = dir.join("data");
        let set = self.cache.faults.at(Point::Sync);
        set.and_then(|()| self.data.set_len(index.data_size()))
            // In two steps, so that nothing that was written behind the end shows up again.
            .and_then(|()| self.data.set_len(file_size(index.data_size())))
            .and_then(|()| self.data.sync_all())
            .map_err(CacheError::io("write", &data_path))?;
        let index_file = write_durably(&dir.join("index"), &encoded)?;
        drop(encoded);
        // Where nothing is there yet, a seal would be broken by the first store, and its reader would wait for the disk.
        let map = write_durably(&dir.join("map"), &map)?;
        let windows = match windows {
            None => None,
            Some(windows) => {
                let file = write_durably(&dir.join(windows::FILE), &windows)?;
                let path = self.cache.layer_dir(&self.digest).join(windows::FILE);
                let opened = WindowFile::read(file, path, index.checkpoints(), &id);
                Some(opened.map_err(CacheError::io("use the windows in", dir))?)
            }
        };
        sync_dir(dir)?;
        let allocated = Arc::new(AtomicU64::new(disk_use(dir)));
        let files = Files {
            dir: self.cache.layer_dir(&self.digest),
            index: index_file,
            data: self.data.try_clone().map_err(CacheError::io("open", &data_path))?,
            map: MapFile::new(map, chunks, id, complete),
            words,
            fresh: true,
            exposed: false,
            windows,
            id,
            small: small_files(dir),
            allocated: Arc::clone(&allocated),
        };
        let key = Key {
            id: self.digest,
            blob: self.blob,
        };
        let layer = CachedLayer::new(Arc::clone(&self.cache), key, index, files);
        // From here on the layer's own bytes count, unless it does not become visible.
        let own = allocated.load(Ordering::Relaxed);
        self.cache.settle(std::mem::replace(&mut self.reserved, own), own);
        let layer = self.cache.publish(layer, self.dir.path())?;
        if Arc::ptr_eq(&layer.allocated, &allocated) {
            self.reserved = 0;
        }
        self.cache.bound_names();
        Ok(layer)
    }

    /// Counts files of these lengths. Others are evicted for them, but they are written even if that gives no room: without its index, not
    /// a byte of the layer can be served, not even past the disk.
    fn reserve_files(&mut self, lens: [u64; 3]) {
        let bytes = lens.iter().map(|len| len.next_multiple_of(FILE_BLOCK)).sum();
        if self.cache.reserve(bytes, Some(&self.digest)).is_err() {
            self.cache.occupy(bytes);
        }
        self.reserved += bytes;
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // It may be large, and whoever gives it up may be a task. After a commit there is nothing.
        let dir = self.dir.path();
        if let Err(error) = self.cache.trash.discard(dir, &self.digest.hex(), self.reserved) {
            tracing::warn!(%error, path = %dir.display(), "a layer that was given up cannot be removed");
        }
        self.cache.release(self.reserved);
    }
}

fn write_durably(path: &Path, bytes: &[u8]) -> Result<File, CacheError> {
    let write = || {
        let file = File::options().read(true).write(true).create_new(true).open(path)?;
        file.write_all_at(bytes, 0)?;
        file.sync_all()?;
        Ok(file)
    };
    write().map_err(CacheError::io("write", path))
}

pub(super) fn sync_dir(path: &Path) -> Result<(), CacheError> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(CacheError::io("write", path))
}
