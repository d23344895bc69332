//! A worker as its supervisor sees it: started, spoken to, and collected.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use super::link::{Held, Hello};
use super::manager::OWN_VARIABLES;
use crate::sys::descriptors;

/// The hidden option by which a worker knows that it is one: the number of its end of the link.
pub const WORKER_OPTION: &str = "--worker";
/// What is added to the number of a signal that ended a program, as shells do.
const SIGNALLED: u8 = 128;

/// A process that serves.
pub(super) struct Worker {
    pub(super) pid: Pid,
    pub(super) link: OwnedFd,
    /// Since when it serves.
    pub(super) ready: Option<Instant>,
}

/// How a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// By itself, with this code.
    Exit(u8),
    /// By this signal.
    Signal(i32),
    /// It cannot be told.
    Unknown,
}

impl End {
    /// The exit code that says the same.
    pub(super) fn code(self) -> u8 {
        match self {
            End::Exit(code) => code,
            End::Signal(number) => SIGNALLED.saturating_add(u8::try_from(number).unwrap_or(0)),
            End::Unknown => 1,
        }
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            End::Exit(code) => write!(f, "exit code {code}"),
            End::Signal(number) => write!(f, "signal {number}"),
            End::Unknown => f.write_str("no status"),
        }
    }
}

impl Worker {
    /// Starts `program` with these arguments as a worker, and gives it what is held.
    pub(super) fn start(program: &Path, args: &[OsString], hello: &Hello, held: &Held) -> io::Result<Self> {
        let (ours, theirs) = descriptors::pair()?;
        hello.send(&ours, held)?;
        let mut command = Command::new(program);
        if let Some(name) = std::env::args_os().next() {
            command.arg0(name);
        }
        command
            .args(args)
            .arg(WORKER_OPTION)
            .arg(theirs.as_raw_fd().to_string());
        for name in OWN_VARIABLES {
            command.env_remove(name);
        }
        // No other thread is there to start a program meanwhile.
        descriptors::inherit(&theirs, true)?;
        let child = command.spawn()?;
        // Collected by its number: after an upgrade it is another program that does so.
        let pid = Pid::from_child(&child);
        drop(child);
        Ok(Worker {
            pid,
            link: ours,
            ready: None,
        })
    }

    /// How it ended, if it has.
    pub(super) fn ended(&self) -> Option<End> {
        match waitpid(Some(self.pid), WaitOptions::NOHANG) {
            Ok(None) => None,
            Ok(Some((_, status))) => Some(match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => End::Exit(u8::try_from(code).unwrap_or(u8::MAX)),
                (None, Some(signal)) => End::Signal(signal),
                (None, None) => return None,
            }),
            Err(rustix::io::Errno::INTR) => None,
            Err(_) => Some(End::Unknown),
        }
    }

    /// Whether it is dead but for threads that the kernel does not let go, because they wait for what it should have answered itself.
    pub(super) fn is_half_dead(&self) -> bool {
        is_half_dead(self.pid.as_raw_nonzero().get().unsigned_abs())
    }

    pub(super) fn send(&self, signal: Signal) {
        // It fails only if it is gone, which will be seen.
        let _ = kill_process(self.pid, signal);
    }
}

/// Whether the first thread of the process has ended and others have not.
pub(super) fn is_half_dead(pid: u32) -> bool {
    is_zombie(pid) && threads(pid).iter().any(|thread| *thread != pid)
}

/// Whether the process is no more, or nothing of it but its number.
pub(super) fn is_gone(pid: u32) -> bool {
    !Path::new(&format!("/proc/{pid}")).exists() || (is_zombie(pid) && !is_half_dead(pid))
}

/// Numbers of the threads of a process.
pub(super) fn threads(pid: u32) -> Vec<u32> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/task"));
    let names = entries.into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.filter_map(|name| name.to_str()?.parse().ok()).collect()
}

fn is_zombie(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name is in parentheses, and may hold any.
    let state = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.trim_start().chars().next());
    matches!(state, Some('Z' | 'X'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_seen_to_live_and_to_be_gone() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        assert!(!is_gone(child.id()) && !is_half_dead(child.id()));
        assert_eq!(threads(child.id()), [child.id()]);
        child.kill().unwrap();
        let mut left = 1000;
        // Not collected yet: only its number is left.
        while !is_gone(child.id()) && left > 0 {
            std::thread::sleep(std::time::Duration::from_millis(5));
            left -= 1;
        }
        assert!(left > 0 && !is_half_dead(child.id()));
        child.wait().unwrap();
        assert!(is_gone(child.id()));
    }

    #[test]
    fn an_end_has_a_code() {
        assert_eq!([End::Exit(3), End::Signal(9), End::Unknown].map(End::code), [3, 137, 1]);
    }
}
