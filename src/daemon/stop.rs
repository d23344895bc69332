//! The signals that ask a process to end in order: SIGTERM, SIGINT (Ctrl-C), and SIGHUP (the terminal is gone).
//!
//! The daemon and every command end in the same way: whoever does not look at [`Stop`] goes on, and no destructor is skipped. SIGHUP is
//! left alone where it was ignored from the beginning: that is what `nohup` is for.
//!
//! The daemon's worker has one more, from its supervisor: SIGUSR1 asks it to end and to leave everything to its successor.

use std::io;

use futures::FutureExt;
use futures::future::{BoxFuture, Shared, select_all};
use tokio::signal::unix::{SignalKind, signal};

/// Ends when the first signal has arrived, and tells which; can be waited for in many places, also afterwards.
pub type Stop = Shared<BoxFuture<'static, StopSignal>>;

/// Where the kernel says which signals this process ignores.
const PROCESS_STATUS: &str = "/proc/self/status";

/// A signal that asks for the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StopSignal {
    /// `SIGTERM`.
    pub name: &'static str,
    /// Its number.
    pub number: u8,
}

const HANGUP: StopSignal = StopSignal {
    name: "SIGHUP",
    number: libc::SIGHUP as u8,
};
const INTERRUPT: StopSignal = StopSignal {
    name: "SIGINT",
    number: libc::SIGINT as u8,
};
const TERMINATE: StopSignal = StopSignal {
    name: "SIGTERM",
    number: libc::SIGTERM as u8,
};

/// What a supervisor asks for when another process goes on.
pub(super) const HAND_OVER: StopSignal = StopSignal {
    name: "SIGUSR1",
    number: libc::SIGUSR1 as u8,
};

/// Listens from now on. Must be called within a tokio runtime, before anything is made that has to be taken away again.
///
/// # Errors
/// When the process may not listen to signals.
pub fn stop_signal() -> io::Result<Stop> {
    listen(&[TERMINATE, INTERRUPT, HANGUP])
}

/// The same for a worker.
pub(super) fn workers_stop_signal() -> io::Result<Stop> {
    listen(&[TERMINATE, INTERRUPT, HANGUP, HAND_OVER])
}

/// Whether SIGHUP was ignored when this process was started.
pub(super) fn is_hangup_ignored() -> bool {
    is_ignored(HANGUP)
}

fn listen(stops: &[StopSignal]) -> io::Result<Stop> {
    let mut listening: Vec<BoxFuture<'static, StopSignal>> = Vec::new();
    for &stop in stops {
        if stop == HANGUP && is_ignored(stop) {
            continue;
        }
        let mut arrivals = signal(SignalKind::from_raw(i32::from(stop.number)))?;
        let wait = async move {
            arrivals.recv().await;
            stop
        };
        listening.push(wait.boxed());
    }
    Ok(select_all(listening).map(|(stop, ..)| stop).boxed().shared())
}

/// Whether this process was started with the signal ignored. Where that cannot be told, it was not.
fn is_ignored(stop: StopSignal) -> bool {
    let status = std::fs::read_to_string(PROCESS_STATUS).unwrap_or_default();
    ignored(&status).is_some_and(|mask| mask >> (stop.number - 1) & 1 == 1)
}

/// The mask of ignored signals in the text of `/proc/<pid>/status`.
fn ignored(status: &str) -> Option<u64> {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"))?;
    u64::from_str_radix(mask.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_of_ignored_signals_is_found() {
        let status = "Name:\tcat\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000000002\n";
        assert_eq!(ignored(status), Some(0x1001));
        assert_eq!(ignored("Name:\tcat\n"), None);
        // Rust ignores SIGPIPE at the start of every program.
        let own = std::fs::read_to_string(PROCESS_STATUS).unwrap();
        assert_eq!(ignored(&own).unwrap() >> (libc::SIGPIPE - 1) & 1, 1);
    }
}
