//! Resource limits of the process.

use std::io;
use std::time::Duration;

use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};

/// The kernel's setting for tasks that hang; missing where it does not look for them.
const HUNG_TASK_TIMEOUT: &str = "/proc/sys/kernel/hung_task_timeout_secs";

/// Raises the number of files the process may have open as far as it may without privileges (to its hard limit), and returns that
/// number; `u64::MAX` means without limit.
///
/// # Errors
/// The error of `setrlimit`; the limit is then what it was.
pub fn raise_open_files() -> io::Result<u64> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        setrlimit(
            Resource::Nofile,
            Rlimit {
                current: limit.maximum,
                maximum: limit.maximum,
            },
        )?;
    }
    Ok(limit.maximum.unwrap_or(u64::MAX))
}

/// Keeps the memory of this process out of core dumps, whoever would write them, and from processes of the same user without privileges: it
/// holds passwords and tokens, in buffers of libraries too, so that single pages cannot be excepted. A limit of core files would not do: the
/// kernel does not ask it where dumps go to a program. Programs that this one starts are dumped as ever.
///
/// # Errors
/// The error of `prctl`.
pub fn forbid_core_dumps() -> io::Result<()> {
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// How long a task may wait where nothing interrupts it before the kernel takes it for hung, if it looks for such tasks: it logs them, and
/// panics where it is told to.
pub fn hung_task_timeout() -> Option<Duration> {
    let text = std::fs::read_to_string(HUNG_TASK_TIMEOUT).ok()?;
    let seconds = text.trim().parse().ok().filter(|seconds| *seconds > 0);
    seconds.map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn core_dumps_are_forbidden() {
        forbid_core_dumps().unwrap();
        let now = rustix::process::dumpable_behavior().unwrap();
        assert_eq!(now, DumpableBehavior::NotDumpable);
        // Others of this process may depend on it.
        set_dumpable_behavior(DumpableBehavior::Dumpable).unwrap();
    }

    #[test]
    fn the_soft_limit_becomes_the_hard_limit() {
        let raised = raise_open_files().unwrap();
        assert_eq!(getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX), raised);
    }
}
