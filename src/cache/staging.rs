//! A layer in the making, in a directory of its own: nobody sees it before it is complete and durable.

use std::fs::{File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use tempfile::TempDir;

use super::bitmap::Bitmap;
use super::budget::full;
use super::dir::DIR_MODE;
use super::error::is_full;
use super::hold::file_size;
use super::layer::{BLOCK, Files};
use super::map::{self, MapFile};
use super::windows::{self, WindowFile};
use super::{Cache, CacheError, CachedLayer};
use crate::layer::{Digest, LayerIndex, Windows};

/// A layer in the making. Dropped without [`Staging::commit`], it vanishes.
pub struct Staging {
    cache: Arc<Cache>,
    digest: Digest,
    dir: TempDir,
    data: File,
    /// Bytes counted in the cache's budget.
    reserved: u64,
}

impl Staging {
    pub(super) fn new(cache: Arc<Cache>, digest: Digest) -> Result<Self, CacheError> {
        let parent = cache.incoming();
        let dir = tempfile::Builder::new()
            .prefix(&format!("{}-", digest.hex()))
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
            digest,
            dir,
            data,
            reserved: 0,
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
        let mut written = self.data.write_all_at(bytes, offset);
        if written.as_ref().is_err_and(is_full) {
            self.cache.make_room_now(len, Some(&self.digest));
            written = self.data.write_all_at(bytes, offset);
        }
        written.map_err(|source| {
            if is_full(&source) {
                full(&self.digest, len, source.to_string())
            } else {
                CacheError::io("write", self.dir.path())(source)
            }
        })
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
        let dir = self.dir.path();
        let data_path = dir.join("data");
        self.data
            .set_len(index.data_size())
            // In two steps, so that nothing that was written behind the end shows up again.
            .and_then(|()| self.data.set_len(file_size(&index)))
            .and_then(|()| self.data.sync_all())
            .map_err(CacheError::io("write", &data_path))?;
        write_durably(&dir.join("index"), &encoded)?;
        // Where nothing is there yet, a seal would be broken by the first store, and its reader would wait for the disk.
        let map = write_durably(&dir.join("map"), &map::encode(complete, chunks, &id, &words))?;
        let windows = if index.checkpoints().is_empty() {
            None
        } else {
            let file = write_durably(&dir.join(windows::FILE), &windows.encode(&id))?;
            let path = self.cache.layer_dir(&self.digest).join(windows::FILE);
            let opened = WindowFile::read(file, path, &index, &id);
            Some(opened.map_err(CacheError::io("use the windows in", dir))?)
        };
        sync_dir(dir)?;
        let blocks = self
            .data
            .metadata()
            .map_err(CacheError::io("read", &data_path))?
            .blocks();
        let allocated = Arc::new(AtomicU64::new(blocks.saturating_mul(BLOCK)));
        let files = Files {
            dir: self.cache.layer_dir(&self.digest),
            data: self.data.try_clone().map_err(CacheError::io("open", &data_path))?,
            map: MapFile::new(map, chunks, id, complete),
            words,
            fresh: true,
            exposed: false,
            windows,
            id,
            allocated,
        };
        let layer = CachedLayer::new(Arc::clone(&self.cache), self.digest, index, files);
        let layer = self.cache.publish(layer, dir)?;
        // From here on the layer's own bytes count.
        self.cache.occupy(layer.allocated_bytes());
        self.cache.release(std::mem::take(&mut self.reserved));
        Ok(layer)
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
