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

    /// Where the process below keeps its root directory; without it that test is none.
    const HALF_DEAD_AT: &str = "LAZULI_TEST_HALF_DEAD_AT";
    const TAKEN: &str = "a request is taken";

    /// The other process of the next test: serves a mount, reads in it by a thread of its own, and does not answer.
    #[test]
    fn waits_for_its_own_answer() {
        let Some(root) = std::env::var_os(HALF_DEAD_AT).map(std::path::PathBuf::from) else {
            return;
        };
        let mountpoint = root.join("fuse");
        let _lock = lock(&root, None, &mountpoint).unwrap();
        std::fs::create_dir(&mountpoint).unwrap();
        let options = sys::fuse::FuseOptions {
            source: "half-dead",
            subtype: "lazuli",
        };
        let opened = sys::fuse::open(options).and_then(|(device, mount)| mount.attach(&mountpoint).map(|()| device));
        let device = match opened {
            Ok(device) => device,
            Err(error) => return println!("\nimpossible: {error}"),
        };
        let init = sys::fuse::read_init(&device).unwrap();
        // fuse_out_header and fuse_init_out: 7.31, as <linux/fuse.h> has them, and nothing else.
        let mut answer = [0; 16 + 64];
        answer[..4].copy_from_slice(&80_u32.to_ne_bytes());
        answer[8..16].copy_from_slice(&init[8..16]);
        answer[16..20].copy_from_slice(&7_u32.to_ne_bytes());
        answer[20..24].copy_from_slice(&31_u32.to_ne_bytes());
        answer[36..40].copy_from_slice(&4096_u32.to_ne_bytes());
        rustix::io::write(&device, &answer).unwrap();
        std::thread::spawn(move || std::fs::metadata(mountpoint.join("name")));
        let mut request = vec![0; 1 << 20];
        assert!(rustix::io::read(&device, &mut request).unwrap() > 0);
        println!("\n{TAKEN}");
        loop {
            std::thread::park();
        }
    }

    /// A process that is killed, of which a thread waits for an answer that only the process could have given, and which so keeps the lock.
    #[test]
    fn a_process_that_cannot_end_by_itself_is_let_out() {
        use std::io::BufRead as _;
        use std::process::{Command, Stdio};

        /// Whatever becomes of the test, nobody waits on.
        struct Ends(std::path::PathBuf);
        impl Drop for Ends {
            fn drop(&mut self) {
                if let Ok(Some(mount)) = mount_at(&self.0) {
                    let _ = sys::fuse::abort(mount.major, mount.minor);
                    let _ = sys::mount::unmount(&self.0, sys::mount::Unmount::Detach);
                }
            }
        }

        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        let ends = Ends(root.join("fuse"));
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "daemon::root::tests::waits_for_its_own_answer",
                "--nocapture",
            ])
            .env(HALF_DEAD_AT, &root)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
        let mut lines = lines.map_while(Result::ok);
        let said = lines.find(|line| line == TAKEN || line.starts_with("impossible"));
        if let Some(why) = said.as_deref().and_then(|line| line.strip_prefix("impossible: ")) {
            child.wait().unwrap();
            return crate::skip::skipped(crate::skip::Ability::ErofsFiles, why);
        }
        assert_eq!(said.as_deref(), Some(TAKEN), "it does not serve");
        child.kill().unwrap();
        let pid = child.id();
        while !is_half_dead(pid) {
            assert!(!is_gone(pid), "it can end: this shows nothing");
            std::thread::sleep(POLL);
        }
        let locked = lock(&root, None, &ends.0);
        assert!(locked.is_ok(), "{:?}", locked.err());
        child.wait().unwrap();
    }
}
