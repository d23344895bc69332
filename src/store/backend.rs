//! The file of the database, and what becomes of it when the disk fails.
//!
//! redb refuses everything once a read, a write or a sync of its file has failed: what it has in memory may not be what is on the disk. The disk
//! may be well again a moment later, as one that was full. So whoever wants the database then has it opened anew ([`Access`]), which finds out
//! what the disk has: the transaction that failed is there as a whole, or not at all, and everything that was answered before is.
//!
//! The file never has holes: when it grows, the file system gives it the room at once. Otherwise a full disk would fail any write of any page;
//! so it fails those transactions that need more pages than there are, and others, such as those that remove something, go on.
//!
//! A database whose process was killed is repaired when it is opened, which walks through all of it: of a node with a thousand layers (3.5 MB)
//! no difference to an orderly end could be measured. So redb's quick repair is not used, which would cost every commit a second sync.
//!
//! redb writes its magic number last when it makes a database. A file without it is one that was never finished, of which nobody was told
//! anything; it is begun anew. (That there was nothing to lose is for the daemon to know: [`is_blank`].)

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Bound;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use redb::backends::FileBackend;
use redb::{BackendError, Builder, Database, DatabaseError, StorageBackend, StorageError};
use rustix::fs::{Advice, FallocateFlags};
use rustix::io::Errno;

use super::StoreError;

/// Memory for pages of the database, in bytes. The whole database of a busy node is a few MiB; redb's default would be
/// 1 GiB.
const PAGE_CACHE: usize = 16 << 20;
/// Bytes at the beginning of every database.
const MAGIC_LEN: usize = 9;
/// How long it is not tried again to open a database that could not be: a disk that stays full is asked once a second. (Tests do not wait so long.)
pub(super) const AGAIN: Duration = Duration::from_millis(if cfg!(test) { 4 } else { 1000 });

/// An open database.
pub(super) struct Opened {
    pub db: Database,
    /// Whether the disk has failed since: redb refuses everything then.
    failed: Arc<AtomicBool>,
}

impl Opened {
    /// Opens the database in `backend`, or makes one there; `path` is for errors.
    pub fn on(backend: impl StorageBackend, path: &Path) -> Result<Self, StoreError> {
        let failed = Arc::new(AtomicBool::new(false));
        let watched = Watched {
            backend,
            failed: Arc::clone(&failed),
        };
        let open = || {
            if watched.is_unfinished()? {
                tracing::warn!(path = %path.display(), "the metadata database was never finished, and is begun anew");
                watched.set_len(0)?;
            }
            Builder::new().set_cache_size(PAGE_CACHE).create_with_backend(watched)
        };
        // Bytes that are no database can be anything, also something that redb did not think of.
        let opened = catch_unwind(AssertUnwindSafe(open)).unwrap_or_else(|_| {
            let what = "it made the database's library panic";
            Err(DatabaseError::Storage(StorageError::Corrupted(what.to_owned())))
        });
        let db = opened.map_err(|source| match source {
            DatabaseError::DatabaseAlreadyOpen => StoreError::InUse { path: path.to_owned() },
            // The disk's trouble is not the database's: with one that only has no room, nobody should think of beginning anew.
            DatabaseError::Storage(StorageError::Io(source)) if source.raw_os_error().is_some() => StoreError::Io {
                path: path.to_owned(),
                source,
            },
            source => StoreError::Open {
                path: path.to_owned(),
                source: Box::new(source),
            },
        })?;
        Ok(Opened { db, failed })
    }
}

/// Opens the file at `path` for a database.
pub(super) fn file(path: &Path) -> Result<Whole, StoreError> {
    let io = |source| StoreError::Io {
        path: path.to_owned(),
        source,
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(io)?;
    // What a disk has refused is still in memory, where it would pass for what is on the disk. What it has not been asked yet to take, it is now.
    file.sync_all().map_err(io)?;
    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).map_err(|error| io(error.into()))?;
    let backend = file
        .try_clone()
        .map_err(io)
        .and_then(|file| FileBackend::new(file).map_err(|error| io(io::Error::other(error))))?;
    // The name of a new file is not durable until its directory is.
    if let Some(directory) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(io)?;
    }
    Ok(Whole { backend, file })
}

/// Whether there is no database at `path`: no file, an empty one, or one that never became a database.
///
/// # Errors
/// If that cannot be found out.
pub fn is_blank(path: &Path) -> io::Result<bool> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        file => file?,
    };
    let mut magic = [0; MAGIC_LEN];
    match file.read_exact_at(&mut magic, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(file.metadata()?.len() == 0),
        read => read.map(|()| magic == [0; MAGIC_LEN]),
    }
}

/// A file without holes.
#[derive(Debug)]
pub(super) struct Whole {
    backend: FileBackend,
    /// The same file.
    file: File,
}

/// Passes on what is not worth a word.
macro_rules! forward {
    () => {
        fn len(&self) -> io::Result<u64> {
            self.told(self.backend.len())
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            self.told(self.backend.read(offset, out))
        }

        fn sync_data(&self) -> io::Result<()> {
            self.told(self.backend.sync_data())
        }

        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            self.told(self.backend.write(offset, data))
        }

        fn close(&self) -> io::Result<()> {
            self.backend.close()
        }

        fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
            self.backend.try_lock_range(start, end)
        }

        fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
            self.backend.try_lock_shared_range(start, end)
        }

        fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
            self.backend.lock_range(start, end)
        }

        fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
            self.backend.lock_shared_range(start, end)
        }

        fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
            self.backend.unlock_range(start, end)
        }

        fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
            self.backend.query_lock_range(start, end)
        }
    };
}

impl Whole {
    fn told<T>(&self, result: io::Result<T>) -> io::Result<T> {
        result
    }
}

impl StorageBackend for Whole {
    forward!();

    fn set_len(&self, len: u64) -> io::Result<()> {
        let now = self.backend.len()?;
        if len > now {
            match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), now, len - now) {
                // A file system that cannot do this gives room as ever.
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
                Err(error) => {
                    // A part of it may have been given.
                    let _ = self.backend.set_len(now);
                    return Err(error.into());
                }
            }
        }
        self.backend.set_len(len)
    }
}

/// A backend of which it is known whether it has failed.
#[derive(Debug)]
struct Watched<B> {
    backend: B,
    failed: Arc<AtomicBool>,
}

impl<B: StorageBackend> Watched<B> {
    fn told<T>(&self, result: io::Result<T>) -> io::Result<T> {
        if result.is_err() {
            self.failed.store(true, Ordering::SeqCst);
        }
        result
    }

    /// Whether there is a file, but not the number that is written last when a database is made.
    fn is_unfinished(&self) -> io::Result<bool> {
        let mut magic = [0; MAGIC_LEN];
        let len = self.backend.len()?;
        if len < MAGIC_LEN as u64 {
            return Ok(false);
        }
        self.backend.read(0, &mut magic)?;
        Ok(magic == [0; MAGIC_LEN])
    }
}

impl<B: StorageBackend> StorageBackend for Watched<B> {
    forward!();

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.told(self.backend.set_len(len))
    }
}

/// How the file is opened, and then the database in it.
pub(super) type Opener = Box<dyn Fn() -> Result<Opening, StoreError> + Send + Sync>;
/// The second step.
pub(super) type Opening = Box<dyn FnOnce() -> Result<Opened, StoreError>>;
/// What is done with a database that was opened anew, before anybody else has it.
type Renewed<'a> = &'a dyn Fn(&Database) -> Result<(), StoreError>;

/// The database, opened anew when the disk has failed.
pub(super) struct Access {
    opener: Opener,
    path: PathBuf,
    state: RwLock<State>,
    /// Held by whoever writes: nobody opens the database anew meanwhile.
    writing: Mutex<()>,
}

struct State {
    /// `None`: it could not be opened anew yet.
    opened: Option<Opened>,
    /// When that was tried last in vain, and what came of it.
    tried: Option<(Instant, Arc<StoreError>)>,
}

impl State {
    fn is_usable(&self) -> bool {
        let works = |opened: &Opened| !opened.failed.load(Ordering::SeqCst);
        self.opened.as_ref().is_some_and(works)
    }
}

impl Access {
    pub fn new(opener: Opener, opened: Opened, path: &Path) -> Self {
        Access {
            opener,
            path: path.to_owned(),
            state: RwLock::new(State {
                opened: Some(opened),
                tried: None,
            }),
            writing: Mutex::default(),
        }
    }

    /// Keeps others from writing, and from opening the database anew.
    pub fn writing(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Uses the database as it is, which must not take long: who opens it anew waits for it.
    pub fn with<T>(&self, work: impl FnOnce(&Database) -> T) -> Result<T, StoreError> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        match &state.opened {
            Some(opened) => Ok(work(&opened.db)),
            None => Err(self.unusable(&state)),
        }
    }

    /// Opens the database anew if the disk has failed. The caller must not be writing.
    pub fn renew(&self, renewed: Renewed<'_>) -> Result<(), StoreError> {
        if self.state.read().unwrap_or_else(PoisonError::into_inner).is_usable() {
            return Ok(());
        }
        let _writing = self.writing();
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if state.is_usable() {
            return Ok(());
        }
        if state.tried.as_ref().is_some_and(|(at, _)| at.elapsed() < AGAIN) {
            return Err(self.unusable(&state));
        }
        let open = |open: Opening| {
            // It has the file locked. Until the disk lets the file be opened, it stays: what it has in memory can be read.
            state.opened = None;
            open().and_then(|opened| renewed(&opened.db).map(|()| opened))
        };
        match (self.opener)().and_then(open) {
            Ok(opened) => {
                tracing::warn!(path = %self.path.display(), "the disk had failed; the metadata database was opened anew");
                *state = State {
                    opened: Some(opened),
                    tried: None,
                };
                Ok(())
            }
            Err(error) => {
                tracing::error!(%error, path = %self.path.display(), "the disk has failed, and the metadata database cannot be opened anew yet");
                state.tried = Some((Instant::now(), Arc::new(error)));
                Err(self.unusable(&state))
            }
        }
    }

    fn unusable(&self, state: &State) -> StoreError {
        match &state.tried {
            Some((_, error)) => StoreError::Unusable {
                path: self.path.clone(),
                source: Arc::clone(error),
            },
            None => StoreError::Closed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_became_a_database_is_told_from_what_was_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        assert!(is_blank(&path).unwrap(), "no file");
        for (bytes, blank) in [
            (&b""[..], true),
            (&[0; 4096], true),
            (b"redb", false),
            (&[1; 4096], false),
        ] {
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(is_blank(&path).unwrap(), blank, "{} bytes", bytes.len());
        }
        std::fs::remove_file(&path).unwrap();
        drop(Opened::on(file(&path).unwrap(), &path).unwrap());
        assert!(!is_blank(&path).unwrap());
    }

    #[test]
    fn the_file_has_no_holes() {
        use std::os::unix::fs::MetadataExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let opened = Opened::on(file(&path).unwrap(), &path).unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        assert!(metadata.len() > 0);
        assert!(
            metadata.blocks() * 512 >= metadata.len(),
            "{} blocks of {} bytes",
            metadata.blocks(),
            metadata.len()
        );
        drop(opened);
    }
}
