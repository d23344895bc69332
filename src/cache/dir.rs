//! The directory of all layers: opening, finding, adding, closing.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::{self, Read as _};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, OnceLock, PoisonError, TryLockError as TryLock, Weak};
use std::time::{Instant, SystemTime};

use lru::LruCache;

use super::adopt;
use super::disk::{Beside, disk_use, small_files};
use super::error::{is_damage, is_full};
use super::faults::{Faults, Point};
use super::hold::{boot_id, file_size, is_exposed, unmark};
use super::hot::HotChunks;
use super::layer::Files;
use super::map::{self, MapFile};
use super::names::Residents;
use super::spool::Spool;
use super::staging::{Staging, sync_dir};
use super::twins::Twins;
use super::windows::{RecentWindows, WindowFile};
use super::{CacheError, CachedLayer, Key};
use crate::config::CacheConfig;
use crate::layer::{Digest, LayerIndex, Windows};
use crate::metrics::Metrics;
use crate::sync::primitives::{AtomicBool, AtomicU64, Mutex, MutexGuard, Ordering};
use crate::sync::{Trash, may_block};

/// Mode of the cache's directories: for nobody else.
pub(super) const DIR_MODE: u32 = 0o700;

/// The cache on disk. There is one per root; it is open as long as anything of it is.
pub struct Cache {
    /// `<root>/layers`.
    layers: PathBuf,
    pub(super) config: CacheConfig,
    metrics: Arc<Metrics>,
    /// The lock file, locked.
    pub(super) lock: File,
    /// All layers on disk, most recently used first.
    known: Mutex<LruCache<Digest, Entry>>,
    /// Bytes on disk and reserved.
    pub(super) used: AtomicU64,
    /// Bytes ever freed by evictions.
    pub(super) freed: AtomicU64,
    /// Held while something is evicted.
    pub(super) evicting: Mutex<()>,
    /// Blobs that are kept while they come.
    pub(super) spools: Mutex<Vec<Weak<Spool>>>,
    /// Whether the daemon ends: see [`Cache::keep_all`].
    pub(super) keeps_all: AtomicBool,
    /// Counts up with every store: the time by which uses are ordered.
    clock: AtomicU64,
    hot: HotChunks,
    /// This boot of the machine: see hold.rs.
    boot_id: String,
    /// When it was last told that the budget cannot be met.
    pub(super) told: Mutex<Option<Instant>>,
    pub(super) windows: RecentWindows,
    /// Chunks that other layers can have: see twins.rs.
    pub(super) twins: Twins,
    /// Names of layers in memory: see names.rs.
    pub(super) residents: Residents,
    /// What counts without being a layer: see disk.rs.
    pub(super) beside: Beside,
    /// Wakes the thread that looks at the marks, if there is one: see marks.rs.
    pub(super) bell: OnceLock<SyncSender<()>>,
    /// Where a test has the disk fail.
    pub(super) faults: Faults,
    /// Whether it cannot be told who has a file open, as on a file system without leases.
    #[cfg(test)]
    pub(super) blind: AtomicBool,
    /// What is removed, until it is deleted.
    pub(super) trash: Arc<Trash>,
    me: Weak<Cache>,
}

/// A layer on disk.
pub(super) struct Entry {
    /// Bytes of its files.
    pub allocated: Arc<AtomicU64>,
    /// The layer, while someone has it.
    pub open: Weak<CachedLayer>,
}

impl Cache {
    /// Opens the cache under `root`, or makes one there. What an earlier run left unfinished is deleted in the background.
    ///
    /// # Errors
    /// [`CacheError::InUse`] if another process has it, [`CacheError::Io`] if the directory cannot be used.
    pub fn open(root: &Path, config: &CacheConfig, metrics: Arc<Metrics>) -> Result<Arc<Cache>, CacheError> {
        let layers = root.join("layers");
        let mut builder = DirBuilder::new();
        builder
            .recursive(true)
            .mode(DIR_MODE)
            .create(&layers)
            .and_then(|()| fs::set_permissions(&layers, fs::Permissions::from_mode(DIR_MODE)))
            .map_err(CacheError::io("create", &layers))?;
        let lock = lock(&layers.join(".lock"))?;
        let trash = layers.join(".trash");
        let entries = metrics.trash_entries.with_label_values(&["layers"]);
        let trash = Trash::open(&trash, entries).map_err(CacheError::io("open", &trash))?;
        let incoming = layers.join(".incoming");
        builder
            .create(&incoming)
            .and_then(|()| empty(&incoming, &trash))
            .map_err(CacheError::io("empty", &incoming))?;
        let mut known = LruCache::unbounded();
        let mut used = 0;
        adopt::keyed(&layers)?;
        for (_, digest, bytes) in scan(&layers, &trash)? {
            used += bytes;
            let entry = Entry {
                allocated: Arc::new(AtomicU64::new(bytes)),
                open: Weak::new(),
            };
            known.put(digest, entry);
        }
        tracing::info!(
            layers = known.len(),
            bytes = used,
            "opened the cache {}",
            layers.display()
        );
        let cache = Arc::new_cyclic(|me| Cache {
            layers,
            config: config.clone(),
            metrics,
            lock,
            known: Mutex::new(known),
            used: AtomicU64::new(0),
            freed: AtomicU64::new(0),
            evicting: Mutex::new(()),
            spools: Mutex::default(),
            keeps_all: AtomicBool::new(false),
            clock: AtomicU64::new(1),
            hot: HotChunks::new(),
            boot_id: boot_id(),
            told: Mutex::default(),
            windows: RecentWindows::new(),
            twins: Twins::new(),
            residents: Residents::new(),
            beside: Beside::default(),
            bell: OnceLock::new(),
            faults: Faults::default(),
            #[cfg(test)]
            blind: AtomicBool::new(false),
            trash,
            me: me.clone(),
        });
        cache.occupy(used);
        cache.find_replaced();
        Ok(cache)
    }

    /// The layer with this key, if its index is here; always the same one while anyone has it. A layer that is damaged, or that the disk cannot
    /// read any more, is removed, and is not here: it is to be made anew.
    ///
    /// # Errors
    /// [`CacheError::Io`] if it cannot be told whether the layer is here.
    pub fn get(&self, key: impl Into<Key>) -> Result<Option<Arc<CachedLayer>>, CacheError> {
        let key = key.into();
        let digest = &key.id;
        let mut known = self.known();
        let Some(entry) = known.get_mut(digest) else {
            return Ok(None);
        };
        if let Some(layer) = entry.open.upgrade() {
            return Ok(Some(layer));
        }
        // Its index may take long to decode.
        may_block();
        let allocated = Arc::clone(&entry.allocated);
        if let Some(layer) = self.load(&key, allocated)? {
            layer.touch();
            let layer = Arc::new(layer);
            entry.open = Arc::downgrade(&layer);
            drop(known);
            layer.enlist();
            self.bound_names();
            return Ok(Some(layer));
        }
        let bytes = known
            .pop(digest)
            .map_or(0, |entry| entry.allocated.load(Ordering::Relaxed));
        self.discard(digest, bytes);
        Ok(None)
    }

    /// Adds a layer of which no byte is here yet. If it is already here, that one is returned.
    ///
    /// # Errors
    /// [`CacheError`] if it cannot be written.
    pub fn insert(&self, key: impl Into<Key>, index: LayerIndex) -> Result<Arc<CachedLayer>, CacheError> {
        self.insert_with_windows(key, index, &Windows::new())
    }

    /// Like [`Cache::insert`], for an index with checkpoints and their windows.
    ///
    /// # Errors
    /// [`CacheError`] if it cannot be written, or the windows are not those of the index.
    pub fn insert_with_windows(
        &self,
        key: impl Into<Key>,
        index: LayerIndex,
        windows: &Windows,
    ) -> Result<Arc<CachedLayer>, CacheError> {
        let key = key.into();
        match self.get(key)? {
            Some(layer) => Ok(layer),
            None => self.stage(key)?.commit_with_windows(index, windows, false),
        }
    }

    /// Removes the layer with this id that nobody has open, with all that is kept of it, and does not wait until that is deleted. Whether it
    /// is not here any more.
    pub fn forget(&self, digest: &Digest) -> bool {
        let mut known = self.known();
        match known.peek(digest) {
            None => return true,
            Some(entry) if entry.open.strong_count() > 0 => return false,
            Some(_) => {}
        }
        // Moved away under the lock, so that nobody opens it any more.
        let bytes = known
            .pop(digest)
            .map_or(0, |entry| entry.allocated.load(Ordering::Relaxed));
        self.discard(digest, bytes);
        true
    }

    /// Whether a layer is here; `None` if that cannot be told without waiting.
    pub fn contains_now(&self, digest: &Digest) -> Option<bool> {
        match self.known.try_lock() {
            Ok(known) => Some(known.contains(digest)),
            Err(TryLock::Poisoned(known)) => Some(known.get_ref().contains(digest)),
            Err(TryLock::WouldBlock) => None,
        }
    }

    /// Begins a layer that becomes visible when it is complete.
    ///
    /// # Errors
    /// [`CacheError::Io`].
    pub fn stage(&self, key: impl Into<Key>) -> Result<Staging, CacheError> {
        let me = self.me.upgrade().ok_or_else(|| CacheError::InUse {
            path: self.layers.clone(),
        })?;
        Staging::new(me, key.into())
    }

    /// Has the disk fail as `decide` says.
    #[cfg(test)]
    pub(crate) fn fail_with(&self, decide: super::Decide) {
        self.faults.set(decide);
    }

    /// From now on nothing gives way to anything, whatever the limits say: the daemon ends, and pins go without anybody having stopped needing
    /// the layers. Without this, an end on a disk above its mark would empty the cache of a node whose registry may be away.
    pub fn keep_all(&self) {
        // Under the lock: what is being evicted was chosen while the pins were there.
        let _one = self.evicting.lock().unwrap_or_else(PoisonError::into_inner);
        self.keeps_all.store(true, Ordering::SeqCst);
    }

    /// Makes everything durable, so that the next start need not verify anything. Called at the end of the daemon, when nothing is
    /// stored any more. A layer that cannot be sealed is only verified again later; one is left out of which so much was written just now
    /// that whoever stops the daemon would wait for the disk.
    pub fn close(&self) {
        let open: Vec<_> = self.known().iter().filter_map(|(_, e)| e.open.upgrade()).collect();
        for layer in open.into_iter().filter(|layer| !layer.is_dirty()) {
            if let Err(error) = layer.seal() {
                tracing::error!("{error}");
            }
        }
    }

    pub(super) fn known(&self) -> MutexGuard<'_, LruCache<Digest, Entry>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    pub(super) fn hot(&self) -> &HotChunks {
        &self.hot
    }

    pub(super) fn boot_id(&self) -> &str {
        &self.boot_id
    }

    pub(super) fn now(&self) -> u64 {
        self.clock.load(Ordering::Relaxed)
    }

    pub(super) fn tick(&self) {
        self.clock.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn used_now(&self, digest: &Digest) {
        self.known().promote(digest);
    }

    pub(super) fn layer_dir(&self, digest: &Digest) -> PathBuf {
        self.layers.join(digest.hex())
    }

    pub(super) fn layers(&self) -> &Path {
        &self.layers
    }

    pub(super) fn incoming(&self) -> PathBuf {
        self.layers.join(".incoming")
    }

    /// Moves a layer of so many bytes out of sight, to be deleted; they count as free from now on. The caller holds the list of layers.
    pub(super) fn discard(&self, digest: &Digest, bytes: u64) {
        let dir = self.layer_dir(digest);
        let kept = self.keep_mounted(&dir);
        if let Err(error) = self.trash.discard(&dir, &digest.hex(), bytes.saturating_sub(kept)) {
            tracing::error!(layer = %digest, "cannot move the layer out of the cache: {error}");
        }
        self.release(bytes);
    }

    /// Makes a new layer visible, whose files are in `from`. If the same layer has become visible meanwhile, that one is returned.
    pub(super) fn publish(&self, layer: CachedLayer, from: &Path) -> Result<Arc<CachedLayer>, CacheError> {
        let digest = *layer.id();
        let target = self.layer_dir(&digest);
        let mut known = self.known();
        if let Some(open) = known.get(&digest).and_then(|entry| entry.open.upgrade()) {
            return Ok(open);
        }
        // An old one that nobody has open gives way.
        if let Some(old) = known.pop(&digest) {
            self.discard(&digest, old.allocated.load(Ordering::Relaxed));
        }
        let mut placed = self.faults.at(Point::Sync).and_then(|()| fs::rename(from, &target));
        if placed
            .as_ref()
            .is_err_and(|error| error.kind() == io::ErrorKind::DirectoryNotEmpty)
        {
            // One that was given up, and could not be moved away then.
            self.discard(&digest, 0);
            placed = fs::rename(from, &target);
        }
        placed.map_err(CacheError::io("create", &target))?;
        let layer = Arc::new(layer);
        let entry = Entry {
            allocated: layer.allocated_handle(),
            open: Arc::downgrade(&layer),
        };
        known.put(digest, entry);
        layer.enlist();
        // Others need not wait for the disk: what is in the directory is durable already, and its name may be lost until this returns.
        drop(known);
        sync_dir(&self.layers)?;
        Ok(layer)
    }

    /// Opens a layer from the disk. `None`: it is damaged.
    ///
    /// Everything that is read here is read by system calls, of which a failing disk makes errors. So the index is whole when it is mapped
    /// (places.rs): a worker that has died because the disk could not read a page of it is followed by one that notices.
    fn load(&self, key: &Key, allocated: Arc<AtomicU64>) -> Result<Option<CachedLayer>, CacheError> {
        let Some(me) = self.me.upgrade() else { return Ok(None) };
        let digest = &key.id;
        let dir = self.layer_dir(digest);
        let path = dir.join("index");
        let read = File::open(&path).and_then(|mut file| {
            self.faults.at(Point::Open)?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).map(|_| (file, bytes))
        });
        let Some((index_file, encoded)) = readable(digest, "index", &path, read)? else {
            return Ok(None);
        };
        let decoded = LayerIndex::decode(&encoded).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error));
        let Some(index) = readable(digest, "index", &path, decoded)? else {
            return Ok(None);
        };
        let (id, chunks) = (Digest::of(&encoded), index.chunks());
        let windows = self.faults.at(Point::Open);
        let windows = windows.and_then(|()| WindowFile::open(&dir, index.checkpoints(), &id));
        let Some(windows) = readable(digest, "windows", &dir, windows)? else {
            return Ok(None);
        };
        let (path, map_path) = (dir.join("data"), dir.join("map"));
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let opened = options.open(&path).and_then(|data| {
            let len = data.metadata()?.len();
            Ok((data, len))
        });
        let Some((mut data, len)) = readable(digest, "data", &path, opened)? else {
            return Ok(None);
        };
        let saved = match self.faults.at(Point::Open).and_then(|()| fs::read(&map_path)) {
            Ok(saved) => map::decode(&saved, chunks.len(), &id).map_err(str::to_owned),
            Err(error) if is_damage(&error) => Err(error.to_string()),
            Err(error) => return Err(CacheError::io("read", &map_path)(error)),
        };
        let open_map = || options.open(&map_path).map_err(CacheError::io("open", &map_path));
        let mut exposed = is_exposed(&dir, &self.boot_id);
        let (map, sealed, words) = match saved {
            // The first versions did not fill the last page.
            Ok(saved) if len == index.data_size() || len == file_size(index.data_size()) => {
                data.set_len(file_size(index.data_size()))
                    .map_err(CacheError::io("resize", &path))?;
                (open_map()?, saved.sealed, saved.words)
            }
            Ok(saved) => {
                tracing::warn!(layer = %digest, len, "the data in the cache has the wrong length, its chunks are verified again");
                let map = open_map()?;
                // Before the length is right: nobody could tell any more that what is under the seal is not true.
                write_map(&map, &map_path, chunks.len(), &id, &saved.words)?;
                data.set_len(file_size(index.data_size()))
                    .map_err(CacheError::io("resize", &path))?;
                (map, false, saved.words)
            }
            Err(what) => {
                tracing::warn!(layer = %digest, "the data in the cache is dropped, its map cannot be used: {what}");
                // Another file, not an empty one: the old one may be mounted.
                if exposed {
                    self.keep_if_mounted(&dir, &data);
                }
                fs::remove_file(&path).map_err(CacheError::io("delete", &path))?;
                unmark(&dir).map_err(CacheError::io("delete", &dir))?;
                data = options.open(&path).map_err(CacheError::io("open", &path))?;
                data.set_len(file_size(index.data_size()))
                    .map_err(CacheError::io("resize", &path))?;
                exposed = false;
                let words = vec![0; chunks.len().div_ceil(64)];
                // Where the old one lies, the disk may be unable to keep anything.
                match fs::remove_file(&map_path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(CacheError::io("delete", &map_path)(error));
                    }
                    _ => {}
                }
                let map = open_map()?;
                match write_map(&map, &map_path, chunks.len(), &id, &words) {
                    // Without a head it is no map: the next start drops once more what will have come.
                    Err(CacheError::Io { source, .. }) if is_full(&source) => {
                        tracing::warn!(layer = %digest, "its map cannot be written: {source}");
                    }
                    written => written?,
                }
                (map, false, words)
            }
        };
        let now = disk_use(&dir);
        self.settle(allocated.swap(now, Ordering::Relaxed), now);
        let files = Files {
            small: small_files(&dir),
            dir,
            index: index_file,
            data,
            map: MapFile::new(map, chunks.len(), id, sealed),
            words,
            fresh: false,
            exposed,
            windows,
            id,
            allocated,
        };
        Ok(Some(CachedLayer::new(me, *key, index, files)))
    }
}

/// What was read of a layer; `None` if it is damaged or lost, which is told.
fn readable<T>(layer: &Digest, what: &str, path: &Path, read: io::Result<T>) -> Result<Option<T>, CacheError> {
    match read {
        Ok(read) => Ok(Some(read)),
        Err(error) if is_damage(&error) => {
            tracing::warn!(
                %layer,
                "the layer is removed from the cache, and made anew when it is wanted: its {what} cannot be used: {error}"
            );
            Ok(None)
        }
        Err(error) => Err(CacheError::io("read", path)(error)),
    }
}

/// Moves what an earlier run left in a directory to the trash. It stays itself: on a full disk there may be no room for another one.
fn empty(dir: &Path, trash: &Arc<Trash>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        trash.discard(&entry?.path(), "incoming", 0)?;
    }
    Ok(())
}

fn write_map(file: &File, path: &Path, chunks: usize, index: &Digest, words: &[u64]) -> Result<(), CacheError> {
    use std::os::unix::fs::FileExt;
    let bytes = map::encode(false, chunks, index, words);
    file.set_len(bytes.len() as u64)
        .and_then(|()| file.write_all_at(&bytes, 0))
        .and_then(|()| file.sync_data())
        .map_err(CacheError::io("write", path))
}

fn lock(path: &Path) -> Result<File, CacheError> {
    let mut options = File::options();
    let file = options
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(CacheError::io("open", path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(CacheError::InUse { path: path.to_owned() }),
        Err(TryLockError::Error(error)) => Err(CacheError::io("lock", path)(error)),
    }
}

/// All layers on disk with the time of their last use and their bytes, oldest first. Directories without an index are removed.
fn scan(layers: &Path, trash: &Arc<Trash>) -> Result<Vec<(SystemTime, Digest, u64)>, CacheError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(layers).map_err(CacheError::io("list", layers))? {
        let entry = match entry {
            Ok(entry) => entry,
            // What is not seen now gives way to what takes its name.
            Err(error) => {
                tracing::error!("not all of {} can be listed: {error}", layers.display());
                break;
            }
        };
        let name = entry.file_name();
        let Some(digest) = name.to_str().and_then(Digest::from_hex) else {
            continue;
        };
        let path = entry.path();
        if !path.join("index").exists() {
            tracing::warn!("{} has no index and is removed", path.display());
            trash
                .discard(&path, &digest.hex(), 0)
                .map_err(CacheError::io("remove", &path))?;
            continue;
        }
        let used = fs::metadata(path.join("map")).and_then(|m| m.modified());
        let used = used.unwrap_or(SystemTime::UNIX_EPOCH);
        found.push((used, digest, disk_use(&path)));
    }
    found.sort_unstable();
    Ok(found)
}
