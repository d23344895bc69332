//! FUSE connections: opening and mounting one, and what sysfs lets a privileged process do to it.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::mount::MountAttrFlags;
use rustix::process::{getegid, geteuid};

use super::SysError;
use super::mount::{Context, DetachedMount};

const DEVICE: &str = "/dev/fuse";
/// Mode of the root directory as FUSE wants it at mount: only its type is used.
const ROOT_MODE: &str = "40000";

/// The kernel's settings of FUSE.
const SYSCTLS: &str = "/proc/sys/fs/fuse";
/// Least time that the kernel lets a request take if it limits it, in seconds.
const LEAST_TIMEOUT: u64 = 15;

/// How a FUSE file system is mounted.
#[derive(Debug, Clone, Copy)]
pub struct FuseOptions<'a> {
    /// Source in the list of mounts.
    pub source: &'a str,
    /// The `x` of the type `fuse.x` in the list of mounts.
    pub subtype: &'a str,
}

/// Opens the FUSE device and mounts a read-only file system on it: every user may use it, the kernel checks permissions, set-id bits
/// and device nodes are in force. The kernel's INIT request waits to be read from the returned descriptor.
///
/// # Errors
/// [`SysError`] names the call.
pub fn open(options: FuseOptions<'_>) -> Result<(OwnedFd, DetachedMount), SysError> {
    let path = Path::new(DEVICE);
    let device = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| SysError::new("open", path, error))?;
    let context = Context::open("fuse", path)?;
    context.string("source", OsStr::new(options.source))?;
    context.string("subtype", OsStr::new(options.subtype))?;
    // As a string, since kernels before 6.13 take the descriptor as nothing else.
    context.string("fd", OsStr::new(&device.as_raw_fd().to_string()))?;
    context.string("rootmode", OsStr::new(ROOT_MODE))?;
    context.string("user_id", OsStr::new(&geteuid().as_raw().to_string()))?;
    context.string("group_id", OsStr::new(&getegid().as_raw().to_string()))?;
    context.flag("allow_other")?;
    context.flag("default_permissions")?;
    context.flag("ro")?;
    let mount = context.mount(MountAttrFlags::MOUNT_ATTR_RDONLY)?;
    Ok((device, mount))
}

/// Ends the connection of the FUSE file system with the device number `major`:`minor`: every request under way or to come fails with
/// ENOTCONN, and its server is told that the file system is gone.
///
/// # Errors
/// [`SysError`], with ENOENT when there is no such connection (any more).
pub fn abort(major: u32, minor: u32) -> Result<(), SysError> {
    // The kernel names a connection by its internal device number.
    let connection = u64::from(major) << 20 | u64::from(minor);
    let path = PathBuf::from(format!("{connection}/abort"));
    // A mount of our own that nobody sees: /sys/fs/fuse/connections is missing in containers and on machines without systemd.
    let control = Context::open("fusectl", &path)?.mount(MountAttrFlags::empty())?;
    rustix::fs::openat(control.as_fd(), &path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
        .and_then(|file| rustix::io::write(file, b"1"))
        .map(drop)
        .map_err(|error| SysError::new("abort of a FUSE connection", &path, error))
}

/// How long the kernel lets a request of a new connection take before it aborts the *whole connection*, where it has such a limit: Linux
/// 6.15 and later, `fs.fuse.default_request_timeout` and `max_request_timeout`. It is settled when the connection begins.
pub fn request_timeout() -> Option<Duration> {
    let seconds = |name: &str| {
        let text = std::fs::read_to_string(Path::new(SYSCTLS).join(name)).ok()?;
        text.trim().parse::<u64>().ok().filter(|seconds| *seconds > 0)
    };
    let (default, most) = (seconds("default_request_timeout"), seconds("max_request_timeout"));
    // We ask for none ourselves. The kernel looks every 15 s, and takes no less than that.
    let seconds = match (default, most) {
        (Some(default), Some(most)) => default.min(most),
        (default, most) => default.or(most)?,
    };
    Some(Duration::from_secs(seconds.max(LEAST_TIMEOUT)))
}

/// Sets how far the kernel reads ahead on the file system with the device number `major`:`minor`, in KiB.
///
/// # Errors
/// [`SysError`], for instance where sysfs is read-only.
pub fn set_read_ahead(major: u32, minor: u32, kib: u32) -> Result<(), SysError> {
    write_read_ahead(&format!("{major}:{minor}"), kib)
}

/// The same, for what is called `name` in `/sys/class/bdi`.
pub(super) fn write_read_ahead(name: &str, kib: u32) -> Result<(), SysError> {
    let path = PathBuf::from(format!("/sys/class/bdi/{name}/read_ahead_kb"));
    // Not `fs::write`: a file that is missing there must not be created.
    OpenOptions::new()
        .write(true)
        .open(&path)
        .and_then(|mut file| file.write_all(kib.to_string().as_bytes()))
        .map_err(|source| SysError::new("write", &path, source))
}
