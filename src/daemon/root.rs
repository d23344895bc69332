//! The root directory: made, and locked against a second daemon.
//!
//! The lock's file names the process that holds it. A process that was killed keeps the lock until all of its threads have ended, and they may
//! not be able to: one that waits for an answer of the FUSE session that the process itself served waits for ever. Whoever comes next answers
//! it, if he has the session, or ends the session.

use std::fs::{DirBuilder, File, Permissions};
use std::io::Write as _;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::Path;
use std::time::{Duration, Instant};

use super::worker::{is_gone, is_half_dead, threads};
use super::{DaemonError, io_error};
use crate::sys;
use crate::sys::mountinfo::mount_at;

/// How long a lock is waited for: its holder may be a worker whose supervisor was killed just now.
const WAIT: Duration = Duration::from_secs(3);
/// The same where the holder is dying.
const WAIT_FOR_DYING: Duration = Duration::from_secs(60);
/// Pause between two tries.
const POLL: Duration = Duration::from_millis(5);
/// How long a process may be dying before its threads are helped: nearly all are gone by themselves in a few milliseconds.
const HELP_AFTER: Duration = Duration::from_millis(100);

/// Makes the root directory, which nobody but root may look into, and locks it. `session` is the FUSE connection of the daemon before, if this
/// one has it; else it is taken to be mounted at `mountpoint`. Blocks.
pub(super) fn lock(root: &Path, session: Option<BorrowedFd<'_>>, mountpoint: &Path) -> Result<File, DaemonError> {
    let failed = || format!("root directory {}", root.display());
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(root)
        .map_err(io_error(failed()))?;
    std::fs::set_permissions(root, Permissions::from_mode(0o700)).map_err(io_error(failed()))?;
    let path = root.join("lock");
    let options = || {
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
    };
    let mut lock = options().map_err(io_error(failed()))?;
    let begun = Instant::now();
    let mut dying_since: Option<Instant> = None;
    loop {
        let holder = holder(&path);
        let got = match lock.try_lock() {
            Ok(()) => true,
            Err(std::fs::TryLockError::WouldBlock) => false,
            Err(std::fs::TryLockError::Error(source)) => return Err(DaemonError::Io { what: failed(), source }),
        };
        // The kernel closes a dead process's files one after the other: the database may still be locked.
        let is_free = holder.is_none_or(|pid| is_gone(pid) || !is_dying_or_ours(pid));
        if got && (is_free || begun.elapsed() > WAIT) {
            lock.set_len(0)
                .and_then(|()| write!(lock, "{}", std::process::id()))
                .map_err(io_error(failed()))?;
            return Ok(lock);
        }
        let dying = holder.filter(|pid| is_half_dead(*pid));
        let wait = match dying {
            Some(pid) => {
                let since = *dying_since.get_or_insert_with(Instant::now);
                if since.elapsed() > HELP_AFTER {
                    help(pid, session, mountpoint);
                }
                WAIT_FOR_DYING
            }
            None => WAIT,
        };
        if begun.elapsed() > wait {
            return Err(DaemonError::InUse {
                what: root.to_owned(),
                option: "root",
            });
        }
        std::thread::sleep(POLL);
    }
}

/// The process that says it holds the lock.
fn holder(path: &Path) -> Option<u32> {
    let pid = std::fs::read_to_string(path).ok()?.trim().parse().ok()?;
    (pid != std::process::id()).then_some(pid)
}

/// Whether a process that held the lock may still have files open: its number may be somebody else's by now.
fn is_dying_or_ours(pid: u32) -> bool {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    is_half_dead(pid) || name.trim_end() == super::PROCESS_NAME
}

/// Lets a dying process's threads end.
fn help(pid: u32, session: Option<BorrowedFd<'_>>, mountpoint: &Path) {
    let helped = match session {
        Some(session) => sys::fuse::let_out(session, &threads(pid)).map(|answered| answered > 0),
        None => match mount_at(mountpoint) {
            Ok(Some(mount)) if mount.fs_type == "fuse.lazuli" => {
                sys::fuse::abort(mount.major, mount.minor).map(|()| true)
            }
            Ok(_) => Ok(false),
            Err(error) => Err(error),
        },
    };
    match helped {
        Ok(true) => tracing::warn!(pid, "threads of a process before this one waited for its own answers"),
        Ok(false) => {}
        Err(error) => tracing::debug!(pid, %error, "a dying process cannot be helped"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_has_one_daemon_and_no_other_reader() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("a/b");
        let mountpoint = root.join("fuse");
        let held = lock(&root, None, &mountpoint).unwrap();
        assert_eq!(std::fs::metadata(&root).unwrap().permissions().mode() & 0o777, 0o700);
        let text = std::fs::read_to_string(root.join("lock")).unwrap();
        assert_eq!(text, std::process::id().to_string());
        let error = lock(&root, None, &mountpoint).unwrap_err().to_string();
        assert!(error.contains("in use by another lazuli"), "{error}");
        drop(held);
        lock(&root, None, &mountpoint).unwrap();
        // Of a process that is no more.
        std::fs::write(root.join("lock"), "999999999").unwrap();
        lock(&root, None, &mountpoint).unwrap();
    }
}
