//! What is left below a root, and its end: mounts, shims of containerds and their containers, whole roots of killed test runs.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::{OWNER, PREFIX, run};

/// Longest wait for a polite umount before the lazy one, and for other commands that clear up.
pub(super) const UMOUNT_TIMEOUT: Duration = Duration::from_secs(10);

/// What tells a process from a later one with the same id: the id and its time of start, in clock ticks since boot.
pub(super) fn identity(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The 22nd field; the second, in parentheses, may hold blanks.
    let started = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?;
    Some(format!("{pid} {started}"))
}

/// Clears sandboxes of test runs that were killed.
pub(super) fn sweep(base: &Path) {
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        let root = entry.path();
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let Ok(owner) = fs::read_to_string(root.join(OWNER)) else {
            continue;
        };
        let pid = owner.split(' ').next().and_then(|pid| pid.parse().ok());
        if pid.and_then(identity).as_ref() != Some(&owner) {
            clear(&root);
        }
    }
}

/// Ends what runs below a root, unmounts what is mounted there, and removes it.
pub(super) fn clear(root: &Path) {
    end_shims(root);
    unmount_below(root);
    let left = mounts_below(root);
    if !left.is_empty() {
        eprintln!("sandbox {}: still mounted, and left alone: {left:?}", root.display());
    } else if let Err(error) = fs::remove_dir_all(root) {
        eprintln!("sandbox {}: cannot be removed: {error}", root.display());
    }
}

/// Mount points at or below `root`, longest first.
pub fn mounts_below(root: &Path) -> Vec<PathBuf> {
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let mut found: Vec<PathBuf> = table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(|field| PathBuf::from(OsStr::from_bytes(&unescape(field))))
        .filter(|path| path.starts_with(root))
        .collect();
    found.sort_by_key(|path| std::cmp::Reverse(path.as_os_str().len()));
    found
}

/// mountinfo writes blanks, tabs, line ends and backslashes as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let code = after
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match code {
            Some(code) => {
                bytes.push(code);
                rest = &after[3..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    bytes
}

/// Unmounts everything at or below `root`.
pub fn unmount_below(root: &Path) {
    for path in mounts_below(root) {
        let polite = run(Command::new("umount").arg(&path), UMOUNT_TIMEOUT);
        if !polite.success() {
            let lazy = run(Command::new("umount").arg("-l").arg(&path), UMOUNT_TIMEOUT);
            if !lazy.success() && mounts_below(root).contains(&path) {
                eprintln!("{}", lazy.describe());
            }
        }
    }
}

/// A process as `/proc` shows it.
struct Running {
    pid: u32,
    parent: u32,
    arguments: Vec<String>,
}

fn processes() -> Vec<Running> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let status = fs::read_to_string(entry.path().join("stat")).ok()?;
            // The name, in parentheses, may hold anything; the state and the parent follow its last one.
            let parent = status.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
            let arguments = String::from_utf8_lossy(&fs::read(entry.path().join("cmdline")).ok()?)
                .split('\0')
                .map(str::to_owned)
                .collect();
            Some(Running { pid, parent, arguments })
        })
        .collect()
}

/// Ends the shims whose containerd has its socket below `root`, their containers, and what runc remembers of them.
pub(super) fn end_shims(root: &Path) {
    let all = processes();
    let argument = |process: &Running, flag: &str| -> Option<String> {
        let at = process.arguments.iter().position(|argument| argument == flag)?;
        process.arguments.get(at + 1).cloned()
    };
    let shims: Vec<&Running> = all
        .iter()
        .filter(|process| {
            process
                .arguments
                .first()
                .is_some_and(|program| program.contains("containerd-shim"))
        })
        .filter(|process| argument(process, "-address").is_some_and(|address| Path::new(&address).starts_with(root)))
        .collect();
    for shim in shims {
        let mut family = vec![shim.pid];
        // Children before they lose their parent.
        let mut next = 0;
        while let Some(&parent) = family.get(next) {
            family.extend(
                all.iter()
                    .filter(|process| process.parent == parent)
                    .map(|process| process.pid),
            );
            next += 1;
        }
        for pid in family.iter().rev() {
            signal(*pid, rustix::process::Signal::KILL);
        }
        if let (Some(namespace), Some(id)) = (argument(shim, "-namespace"), argument(shim, "-id")) {
            let mut delete = Command::new("runc");
            delete
                .arg("--root")
                .arg(Path::new("/run/containerd/runc").join(namespace));
            run(delete.args(["delete", "--force", &id]), UMOUNT_TIMEOUT);
        }
    }
    // A shim listens in a directory that all containerds share, and its bundle says where.
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let tasks = entry.path().join("state/io.containerd.runtime.v2.task");
        for bundle in fs::read_dir(tasks)
            .into_iter()
            .flatten()
            .flatten()
            .flat_map(|namespace| fs::read_dir(namespace.path()).into_iter().flatten().flatten())
        {
            // 1.x writes the bare address, 2.x a JSON document with it.
            for name in ["address", "bootstrap.json"] {
                let text = fs::read_to_string(bundle.path().join(name)).unwrap_or_default();
                if let Some((_, path)) = text.split_once("unix://") {
                    let _ = fs::remove_file(path.split(['"', '\n']).next().unwrap_or(path));
                }
            }
        }
    }
}

/// Sends a signal to a process that is ours.
pub(super) fn signal(pid: u32, signal: rustix::process::Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// Kills a process and all of its group.
pub(super) fn kill_group(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
    }
}
