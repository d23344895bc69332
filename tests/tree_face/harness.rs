//! A session mounted in a temporary directory, and a watchdog: a bug must make a test fail, not hang where even SIGKILL cannot reach.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use lazuli::fs::{Session, SessionOptions};
use lazuli::metrics::Metrics;
use lazuli::sys;
use lazuli::sys::mount::{Unmount, overlay, unmount};
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// Longest time that any access to files may take before the connection is aborted.
const WATCHDOG: Duration = Duration::from_secs(60);

/// A mounted session with everything it needs.
pub struct Mounted {
    pub session: Session,
    pub metrics: Arc<Metrics>,
    pub dir: TempDir,
    // Last: the session's tasks run on it.
    _runtime: Runtime,
}

impl Mounted {
    pub fn new() -> Self {
        Self::with(0, Duration::from_secs(30))
    }

    pub fn with(threads: usize, read_deadline: Duration) -> Self {
        Self::mount(tempfile::tempdir().unwrap(), "", threads, read_deadline)
    }

    /// Mounts below the directory `parent` of the temporary directory.
    pub fn below(parent: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join(parent)).unwrap();
        Self::mount(dir, parent, 0, Duration::from_secs(30))
    }

    fn mount(dir: TempDir, parent: &str, threads: usize, read_deadline: Duration) -> Self {
        let metrics = Arc::new(Metrics::new());
        let runtime = runtime();
        let session = Session::mount(
            &dir.path().join(parent).join("layers"),
            options(threads, read_deadline),
            runtime.handle().clone(),
            Arc::clone(&metrics),
        )
        .unwrap();
        Mounted {
            session,
            metrics,
            dir,
            _runtime: runtime,
        }
    }

    /// Runs `access` on a thread of its own, and aborts the connection if it takes too long.
    pub fn within<T: Send + 'static>(&self, access: impl FnOnce() -> T + Send + 'static) -> T {
        within(self.session.mountpoint(), access)
    }

    /// Requests that were answered so far.
    pub fn requests(&self, op: &str) -> u64 {
        self.metrics.fuse_requests_total.with_label_values(&[op]).get()
    }

    /// Mounts a read-only overlay of slots, the topmost first.
    pub fn overlay(&self, slots: &[u32]) -> Overlay {
        let target = self.dir.path().join(format!("merged-{}", slots.len()));
        std::fs::create_dir(&target).unwrap();
        let mut lower: Vec<PathBuf> = slots.iter().map(|slot| self.session.path(*slot)).collect();
        if lower.len() == 1 {
            // overlayfs wants two lower directories when there is no upper one.
            let empty = self.dir.path().join("empty");
            std::fs::create_dir_all(&empty).unwrap();
            lower.push(empty);
        }
        let path = target.clone();
        self.within(move || overlay(&lower, &path)).unwrap();
        Overlay(target)
    }
}

pub fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

pub fn options(threads: usize, read_deadline: Duration) -> SessionOptions {
    SessionOptions {
        threads,
        read_deadline,
        source_name: "lazuli-test".to_owned(),
    }
}

/// Runs `access` on a thread of its own; if it takes too long, aborts the connection of the mount at `mountpoint`, and panics.
pub fn within<T: Send + 'static>(mountpoint: &Path, access: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let _ = sender.send(access());
    });
    match receiver.recv_timeout(WATCHDOG) {
        Ok(value) => value,
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            std::panic::resume_unwind(thread.join().expect_err("a thread that sends nothing has panicked"))
        }
        Err(mpsc::RecvTimeoutError::Timeout) => {
            if let Ok(Some(mount)) = sys::mountinfo::mount_at(mountpoint) {
                let _ = sys::fuse::abort(mount.major, mount.minor);
            }
            panic!("an access to files did not end in {} s", WATCHDOG.as_secs());
        }
    }
}

/// An overlay mount, removed when dropped.
pub struct Overlay(pub PathBuf);

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = unmount(&self.0, Unmount::Detach);
    }
}

/// Names of a directory, as a set; fails if one comes twice.
pub fn names(dir: &Path) -> io::Result<BTreeSet<Vec<u8>>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name().as_bytes().to_vec();
        assert!(names.insert(name), "a name comes twice");
    }
    Ok(names)
}

/// Value of an extended attribute, of a symbolic link as of anything else.
pub fn getxattr(path: &Path, name: &str) -> io::Result<Vec<u8>> {
    let mut value = vec![0; 64 << 10];
    let len = rustix::fs::lgetxattr(path, name, &mut value[..])?;
    value.truncate(len);
    Ok(value)
}

/// Names of all extended attributes.
pub fn listxattr(path: &Path) -> io::Result<BTreeSet<String>> {
    let mut list = vec![0; 64 << 10];
    let len = rustix::fs::llistxattr(path, &mut list[..])?;
    let names = list[..len].split(|&c| c == 0).filter(|name| !name.is_empty());
    Ok(names.map(|name| String::from_utf8_lossy(name).into_owned()).collect())
}

/// All bytes of a file. The first time, the kernel has to ask the session for them.
pub fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}
