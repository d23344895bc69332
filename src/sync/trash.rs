//! Deleting what was removed, without anyone waiting for it.
//!
//! What is to go is moved into a directory of its own, the trash, by one rename; a thread deletes the entries one after the other. It is there
//! while there is something to do. There is no list in memory: the directory is the queue, so that it outlives the process, and what an
//! earlier process left is deleted as well.
//!
//! The thread gives way: it rests for as long as it has worked, so that at most half of what the disk can do goes into deleting, unless
//! somebody waits for it. Trees are deleted without recursion, and what lies very deep is first moved up into the trash: neither the depth
//! nor the width of a tree costs more than a fixed amount of memory and file descriptors. It never follows a link and never enters another
//! file system.
//!
//! An entry that cannot be deleted (an immutable file in it, say) is told once, stays, and is tried again by the next [`Trash::empty`].
//!
//! The name of an entry ends with `+` and the bytes that it frees, as far as whoever moved it there knows: [`Trash::bytes`] is their sum.

use std::collections::HashSet;
use std::ffi::{CStr, OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use prometheus::IntGauge;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::may_block;

/// Deepest directory that is looked into where it is; deeper ones are moved up. Each level holds a file descriptor and a buffer.
const MAX_DEPTH: usize = 32;
/// Names that are deleted before the thread may rest.
const BATCH: usize = 128;
/// Longest rest.
const MAX_REST: Duration = Duration::from_millis(500);
/// Times that a directory is listed anew because it is not empty: names that came while it was listed.
const MAX_LISTINGS: usize = 16;
/// Most entries that are remembered as those that cannot be deleted; more are tried again each time.
const MAX_STUCK: usize = 1024;
/// Mode of the directory.
const PRIVATE: u32 = 0o700;
/// What stands before the bytes in the name of an entry.
const BYTES: char = '+';

/// A directory whose entries are deleted.
pub struct Trash {
    path: PathBuf,
    entries: IntGauge,
    bytes: AtomicU64,
    /// Tells entries apart.
    next: AtomicU64,
    state: Mutex<State>,
    passed: Condvar,
}

#[derive(Default)]
struct State {
    /// Whether the thread is there.
    running: bool,
    /// Passes through the directory that were asked for, and those that are over.
    wanted: u64,
    passed: u64,
    /// How many wait for a pass.
    waiting: usize,
    /// Entries that cannot be deleted.
    stuck: HashSet<OsString>,
}

impl Trash {
    /// The trash at `path`, made if it is missing. What is in it is deleted from now on. `entries` counts what waits.
    ///
    /// # Errors
    /// If the directory cannot be made.
    pub fn open(path: &Path, entries: IntGauge) -> io::Result<Arc<Self>> {
        fs::DirBuilder::new().recursive(true).mode(PRIVATE).create(path)?;
        let (mut count, mut bytes) = (0_i64, 0_u64);
        // What cannot be listed cannot be deleted either, which is no reason not to go on.
        let listed = fs::read_dir(path).and_then(|listed| listed.collect::<io::Result<Vec<_>>>());
        let listed = listed.unwrap_or_else(|error| {
            tracing::error!(%error, path = %path.display(), "what was removed cannot be listed");
            Vec::new()
        });
        for entry in listed {
            count += 1;
            bytes = bytes.saturating_add(bytes_of(&entry.file_name()));
        }
        entries.add(count);
        let trash = Arc::new(Trash {
            path: path.to_owned(),
            entries,
            bytes: AtomicU64::new(bytes),
            next: AtomicU64::new(0),
            state: Mutex::default(),
            passed: Condvar::new(),
        });
        if count > 0 {
            tracing::info!(path = %path.display(), entries = count, "what an earlier run removed is deleted in the background");
            trash.want();
        }
        Ok(trash)
    }

    /// Moves `path`, which lies in the same file system, into the trash, under a name that begins with `name`; `bytes` is what its end will
    /// free. Whether it was there.
    ///
    /// # Errors
    /// If it cannot be moved.
    pub fn discard(self: &Arc<Self>, path: &Path, name: &str, bytes: u64) -> io::Result<bool> {
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let target = self.path.join(format!("{name}.{number}{BYTES}{bytes}"));
            // An earlier process counted from 0 too.
            match rustix::fs::renameat_with(CWD, path, CWD, &target, RenameFlags::NOREPLACE) {
                Ok(()) => break,
                Err(Errno::EXIST) => {}
                Err(Errno::NOENT) => return Ok(false),
                // A file system without such renames. Only a file or an empty directory could be replaced, and it is trash.
                Err(Errno::INVAL) => {
                    fs::rename(path, &target)?;
                    break;
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.entries.inc();
        self.want();
        Ok(true)
    }

    /// Bytes of the disk that will be free once all is deleted, as far as is known.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Waits until everything that is in the trash now is deleted, or cannot be, or the time is over; whether it is. Nothing rests meanwhile.
    pub fn empty(self: &Arc<Self>, patience: Duration) -> bool {
        may_block();
        let deadline = Instant::now() + patience;
        self.lock().stuck.clear();
        self.lock().waiting += 1;
        let pass = self.want();
        let mut state = self.lock();
        while state.passed < pass {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let woken = self.passed.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.waiting -= 1;
        state.passed >= pass
    }

    /// Asks for a pass that begins after this; its number.
    fn want(self: &Arc<Self>) -> u64 {
        let mut state = self.lock();
        state.wanted += 1;
        if !state.running {
            let trash = Arc::clone(self);
            let started = thread::Builder::new()
                .name("lazuli-trash".to_owned())
                .spawn(move || trash.run());
            match started {
                Ok(_) => state.running = true,
                Err(error) => {
                    tracing::error!(%error, "no thread to delete what was removed; the next removal tries again")
                }
            }
        }
        state.wanted
    }

    fn run(&self) {
        loop {
            let pass = {
                let mut state = self.lock();
                if state.passed == state.wanted {
                    state.running = false;
                    return;
                }
                state.wanted
            };
            if let Err(error) = self.pass() {
                tracing::error!(%error, path = %self.path.display(), "what was removed cannot be listed");
            }
            self.lock().passed = pass;
            self.passed.notify_all();
        }
    }

    /// Deletes every entry that there is, but for those that are known to stay.
    fn pass(&self) -> io::Result<()> {
        let trash = open_dir(CWD, &self.path)?;
        let mut pace = Pace::new(self);
        // Lists of what is there now: a directory that changes may be listed in any way.
        for _ in 0..MAX_LISTINGS {
            let mut deleted = false;
            for entry in fs::read_dir(&self.path)? {
                let name = entry?.file_name();
                if self.lock().stuck.contains(&name) {
                    continue;
                }
                match self.delete(&trash, &name, &mut pace) {
                    Ok(()) => {
                        deleted = true;
                        self.entries.dec();
                        let bytes = bytes_of(&name);
                        let less = |all: u64| Some(all.saturating_sub(bytes));
                        let _ = self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
                    }
                    Err(error) => {
                        tracing::warn!(%error, path = %self.path.join(&name).display(), "cannot be deleted; the next cleanup tries again");
                        let mut state = self.lock();
                        if state.stuck.len() < MAX_STUCK {
                            state.stuck.insert(name);
                        }
                    }
                }
            }
            if !deleted {
                break;
            }
        }
        Ok(())
    }

    /// Deletes one entry with all that is in it.
    fn delete(&self, trash: &OwnedFd, name: &OsStr, pace: &mut Pace<'_>) -> io::Result<()> {
        let name = std::ffi::CString::new(name.as_bytes())?;
        pace.step();
        match rustix::fs::unlinkat(trash, &name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
        let root = open_dir(trash, &name)?;
        let device = rustix::fs::fstat(&root)?.st_dev;
        let mut levels = vec![Level::new(name, root)?];
        while let Some(depth) = levels.len().checked_sub(1) {
            let level = &mut levels[depth];
            match level.next()? {
                Some((name, is_dir)) => {
                    pace.step();
                    if !is_dir {
                        unlink(&level.fd, &name, AtFlags::empty())?;
                    } else if depth < MAX_DEPTH {
                        let child = open_dir(&level.fd, &name)?;
                        if rustix::fs::fstat(&child)?.st_dev != device {
                            return Err(io::Error::other(format!("{name:?} in it is another file system")));
                        }
                        levels.push(Level::new(name, child)?);
                    } else {
                        self.move_up(trash, &level.fd, &name)?;
                    }
                }
                None => {
                    let Some(done) = levels.pop() else { break };
                    let parent = levels.last().map_or(trash, |level| &level.fd);
                    match rustix::fs::unlinkat(parent, &done.name, AtFlags::REMOVEDIR) {
                        Ok(()) | Err(Errno::NOENT) => {}
                        Err(Errno::NOTEMPTY | Errno::EXIST) if done.listings < MAX_LISTINGS => {
                            levels.push(done.again()?);
                        }
                        Err(error) => return Err(error.into()),
                    }
                }
            }
        }
        Ok(())
    }

    /// Makes a deep directory an entry of the trash itself.
    fn move_up(&self, trash: &OwnedFd, parent: &OwnedFd, name: &CStr) -> io::Result<()> {
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let target = format!("deep.{number}{BYTES}0");
            match rustix::fs::renameat(parent, name, trash, &target) {
                Ok(()) => break,
                Err(Errno::NOTEMPTY | Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.entries.inc();
        self.lock().wanted += 1;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A directory that is being emptied.
struct Level {
    name: std::ffi::CString,
    fd: OwnedFd,
    list: Dir,
    listings: usize,
}

impl Level {
    fn new(name: std::ffi::CString, fd: OwnedFd) -> io::Result<Self> {
        let list = Dir::read_from(&fd)?;
        Ok(Level {
            name,
            fd,
            list,
            listings: 1,
        })
    }

    /// The same directory, listed anew.
    fn again(self) -> io::Result<Self> {
        let list = Dir::read_from(&self.fd)?;
        let listings = self.listings + 1;
        Ok(Level { list, listings, ..self })
    }

    /// The next name, and whether it is a directory.
    fn next(&mut self) -> io::Result<Option<(std::ffi::CString, bool)>> {
        for entry in self.list.by_ref() {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let is_dir = match entry.file_type() {
                FileType::Unknown => {
                    let stat = rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW)?;
                    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
                }
                kind => kind == FileType::Directory,
            };
            return Ok(Some((name.to_owned(), is_dir)));
        }
        Ok(None)
    }
}

/// How fast names are deleted.
struct Pace<'a> {
    trash: &'a Trash,
    names: usize,
    begun: Instant,
}

impl<'a> Pace<'a> {
    fn new(trash: &'a Trash) -> Self {
        Pace {
            trash,
            names: 0,
            begun: Instant::now(),
        }
    }

    /// One more name.
    fn step(&mut self) {
        self.names += 1;
        if self.names < BATCH {
            return;
        }
        if self.trash.lock().waiting == 0 {
            thread::sleep(self.begun.elapsed().min(MAX_REST));
        }
        (self.names, self.begun) = (0, Instant::now());
    }
}

fn open_dir(parent: impl AsFd, name: impl rustix::path::Arg) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, name, flags, Mode::empty())?)
}

fn unlink(parent: &OwnedFd, name: &CStr, flags: AtFlags) -> io::Result<()> {
    match rustix::fs::unlinkat(parent, name, flags) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Bytes that an entry frees, by its name.
fn bytes_of(name: &OsStr) -> u64 {
    let bytes = name.to_str().and_then(|name| name.rsplit_once(BYTES));
    bytes.and_then(|(_, bytes)| bytes.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// Far longer than anything here takes.
    const PATIENCE: Duration = Duration::from_secs(60);

    fn gauge() -> IntGauge {
        IntGauge::new("entries", "entries").unwrap()
    }

    fn count(path: &Path) -> usize {
        fs::read_dir(path).unwrap().count()
    }

    #[test]
    fn what_is_discarded_is_deleted_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("tree/a/b")).unwrap();
        fs::create_dir_all(at("kept")).unwrap();
        fs::write(at("kept/file"), "kept").unwrap();
        fs::write(at("tree/a/b/file"), "gone").unwrap();
        symlink(at("kept"), at("tree/a/link")).unwrap();
        fs::write(at("file"), "gone").unwrap();
        let (path, entries) = (at("trash"), gauge());
        let trash = Trash::open(&path, entries.clone()).unwrap();
        assert!(trash.discard(&at("tree"), "tree", 5).unwrap());
        assert!(trash.discard(&at("file"), "file", 7).unwrap());
        assert!(!trash.discard(&at("missing"), "missing", 9).unwrap());
        assert!(!at("tree").exists() && !at("file").exists());
        assert!(trash.empty(PATIENCE));
        assert_eq!((count(&path), entries.get(), trash.bytes()), (0, 0, 0));
        assert_eq!(fs::read_to_string(at("kept/file")).unwrap(), "kept");
    }

    #[test]
    fn what_an_earlier_process_left_is_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trash");
        // As earlier versions named them, and as this one does.
        for name in ["7.0", "7.1+4096", "x/y"] {
            fs::create_dir_all(path.join(name)).unwrap();
        }
        let entries = gauge();
        let trash = Trash::open(&path, entries.clone()).unwrap();
        fs::create_dir(dir.path().join("new")).unwrap();
        assert!(trash.discard(&dir.path().join("new"), "7", 0).unwrap());
        assert!(trash.empty(PATIENCE));
        assert_eq!((count(&path), entries.get(), trash.bytes()), (0, 0, 0));
    }

    /// A container can make a tree that is deeper than any stack, and a directory wider than any list.
    #[test]
    fn depth_and_width_do_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trash");
        let trash = Trash::open(&path, gauge()).unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir(&tree).unwrap();
        let mut at = open_dir(CWD, &tree).unwrap();
        for _ in 0..5000 {
            rustix::fs::mkdirat(&at, "d", Mode::RWXU).unwrap();
            at = open_dir(&at, "d").unwrap();
        }
        for file in 0..2000 {
            fs::write(tree.join(file.to_string()), "").unwrap();
        }
        assert!(trash.discard(&tree, "tree", 0).unwrap());
        // Each time it moves up what lies deeper than it looks, and asks for one more pass.
        while count(&path) > 0 {
            assert!(trash.empty(PATIENCE));
        }
    }

    #[test]
    fn names_tell_bytes() {
        let bytes = |name: &str| bytes_of(OsStr::new(name));
        assert_eq!((bytes("a.1+17"), bytes("7.0"), bytes("x+y")), (17, 0, 0));
    }
}
