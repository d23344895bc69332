//! The windows of a layer's checkpoints on disk: loaded one at a time, when a span has to be decoded.
//!
//! The file is written with the layer, and never changed. Its table is checked when the layer is opened, and each window when it is
//! read. A damaged one cannot be made good without streaming the layer: the file is removed then, so that the layer is made again
//! when it is opened the next time.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use bytes::Bytes;
use lru::LruCache;

use crate::layer::checkpoint::WindowTable;
use crate::layer::{Checkpoint, Digest, LayerError, Windows};
use crate::sync::primitives::Mutex;

/// Name of the file in the layer's directory.
pub(super) const FILE: &str = "windows";
/// Windows that are kept in memory, over all layers: 2 MiB. Spans are decoded once, mostly; again are those that arrive damaged, or are
/// larger than what is asked for at a time.
const KEPT: NonZeroUsize = NonZeroUsize::new(64).expect("a constant that is not zero");

/// The windows used last, of all layers.
pub(super) struct RecentWindows(Mutex<LruCache<(Digest, usize), Bytes>>);

impl RecentWindows {
    pub fn new() -> Self {
        RecentWindows(Mutex::new(LruCache::new(KEPT)))
    }

    fn get(&self, key: (Digest, usize)) -> Option<Bytes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&key).cloned()
    }

    fn put(&self, key: (Digest, usize), window: Bytes) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).put(key, window);
    }
}

/// The windows of one layer.
pub(super) struct WindowFile {
    file: File,
    table: WindowTable,
    /// Where the file will be when the layer is visible.
    path: PathBuf,
}

impl WindowFile {
    /// Opens the file in `dir`, for the index whose digest is `id`. `None`: the index needs none.
    pub fn open(dir: &Path, checkpoints: &[Checkpoint], id: &Digest) -> io::Result<Option<Self>> {
        if checkpoints.is_empty() {
            return Ok(None);
        }
        let path = dir.join(FILE);
        Self::read(File::open(&path)?, path, checkpoints, id).map(Some)
    }

    /// The windows in `file`, which is at `path`, or will be.
    pub fn read(file: File, path: PathBuf, checkpoints: &[Checkpoint], id: &Digest) -> io::Result<Self> {
        // The index has limited the number of checkpoints.
        let len = usize::try_from(WindowTable::encoded_len(checkpoints.len())).unwrap_or(usize::MAX);
        let mut head = vec![0; len];
        file.read_exact_at(&mut head, 0)?;
        let table = WindowTable::decode(&head, id, checkpoints).map_err(invalid)?;
        if file.metadata()?.len() != len as u64 + table.windows_len() {
            return Err(invalid("it has the wrong length"));
        }
        Ok(WindowFile { file, table, path })
    }

    /// The window of the checkpoint at position `at`.
    pub fn window(&self, layer: Digest, at: usize, of: &Checkpoint, recent: &RecentWindows) -> io::Result<Bytes> {
        if of.window_len() == 0 {
            return Ok(Bytes::new());
        }
        if let Some(window) = recent.get((layer, at)) {
            return Ok(window);
        }
        let (offset, len) = self.table.place(at).ok_or_else(|| invalid("there is no such window"))?;
        let mut compressed = vec![0; len as usize];
        self.file.read_exact_at(&mut compressed, offset)?;
        let window = Bytes::from(self.table.open(at, &compressed, of).map_err(invalid)?);
        recent.put((layer, at), window.clone());
        Ok(window)
    }

    /// All windows.
    pub fn all(&self, checkpoints: &[Checkpoint], id: &Digest) -> io::Result<Windows> {
        let len = WindowTable::encoded_len(checkpoints.len()) + self.table.windows_len();
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        self.file.read_exact_at(&mut bytes, 0)?;
        Windows::decode(&bytes, id, checkpoints).map_err(invalid)
    }

    /// Has the layer made again when it is opened the next time.
    pub fn condemn(&self) {
        if let Err(error) = std::fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::error!("cannot delete {}: {error}", self.path.display());
        }
    }
}

fn invalid(error: impl Into<InvalidWindows>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.into().0)
}

/// What is wrong, as text.
struct InvalidWindows(String);

impl From<LayerError> for InvalidWindows {
    fn from(error: LayerError) -> Self {
        InvalidWindows(error.to_string())
    }
}

impl From<&str> for InvalidWindows {
    fn from(text: &str) -> Self {
        InvalidWindows(text.to_owned())
    }
}
