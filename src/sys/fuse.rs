//! FUSE connections: opening and mounting one, handing one on, and what sysfs lets a privileged process do to it.
//!
//! A connection lives as long as any process has its descriptor. Who takes it over must not read INIT from it, which its first process has
//! answered, and has to have requests sent once more that were read and not answered.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
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

/// Least buffer that the kernel reads a request into (`FUSE_MIN_READ_BUFFER` of linux/fuse.h), in bytes.
const READ_BUFFER: usize = 8192;
/// The same once INIT is answered: the kernel wants room for the largest write that was agreed on, whatever it sends.
const ANY_REQUEST: usize = (1 << 20) + READ_BUFFER;
/// Bytes of `struct fuse_in_header` and `struct fuse_out_header`.
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
/// Where a request's number, inode and thread stand in its header, in bytes.
const UNIQUE_AT: usize = 8;
const NODE_AT: usize = 16;
const THREAD_AT: usize = 32;
/// `FUSE_INIT` and `FUSE_FORGET`, `FUSE_BATCH_FORGET`: what they are in `linux/fuse.h`.
const INIT: u32 = 26;
const NO_ANSWER: [u32; 2] = [2, 42];
/// Notification that makes the kernel send all requests once more that were read and not answered (Linux 6.9).
const NOTIFY_RESEND: i32 = 7;
/// Inode number of a file system's root directory.
const ROOT: u64 = 1;
/// Where INIT says in its second 32 flags what the kernel can do, in bytes; and that it can send requests once more.
const FLAGS2_AT: usize = IN_HEADER + 16;
const HAS_RESEND: u32 = 1 << (39 - 32);

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

/// Reads the kernel's INIT request from a connection that was opened just now.
///
/// # Errors
/// [`SysError`] when the connection has ended, or somebody else has read it.
pub fn read_init(device: impl AsFd) -> Result<Vec<u8>, SysError> {
    let fail = |error| SysError::new("read of INIT", Path::new(DEVICE), error);
    let mut request = vec![0; READ_BUFFER];
    let len = rustix::io::read(device, &mut request).map_err(fail)?;
    request.truncate(len);
    match word(&request, 4) == Some(INIT) {
        true => Ok(request),
        false => Err(fail(rustix::io::Errno::PROTO)),
    }
}

/// Whether the kernel that has sent this INIT can send requests once more.
pub fn can_resend(init: &[u8]) -> bool {
    word(init, FLAGS2_AT).is_some_and(|flags| flags & HAS_RESEND != 0)
}

/// Makes the descriptor `target` another name of what `source` is, at once and for all threads that use it from now on.
///
/// # Errors
/// [`SysError`], never for two descriptors that are open.
pub fn replace(target: impl AsFd, source: impl AsFd) -> Result<(), SysError> {
    let (target, source) = (target.as_fd().as_raw_fd(), source.as_fd().as_raw_fd());
    // SAFETY: both are open as long as they are borrowed. Who owns `target` goes on owning it: the number stays open.
    match unsafe { libc::dup3(source, target, libc::O_CLOEXEC) } {
        -1 => Err(SysError::new("dup3", Path::new(DEVICE), io::Error::last_os_error())),
        _ => Ok(()),
    }
}

/// Has the kernel send all requests of a connection once more that were read and not answered. Nobody else may answer any of them now.
///
/// # Errors
/// [`SysError`], with EINVAL from kernels that cannot do it: see [`can_resend`].
pub fn resend(device: impl AsFd) -> Result<(), SysError> {
    answer(device, 0, NOTIFY_RESEND).map_err(|error| SysError::new("FUSE_NOTIFY_RESEND", Path::new(DEVICE), error))
}

/// Whether the connection has not ended.
pub fn is_connected(device: impl AsFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut fds = [PollFd::new(&device, PollFlags::IN)];
    poll(&mut fds, Some(&now)).is_ok() && !fds[0].revents().intersects(PollFlags::ERR | PollFlags::NVAL)
}

/// Answers, with an error, the requests of these threads, which have to end and cannot while they wait here, and of those who look into the
/// root directory. All others are left for whoever takes the connection over: he has to have them sent once more. Nobody else may read or
/// answer meanwhile. Tells how many were answered.
///
/// # Errors
/// [`SysError`] when the kernel cannot send requests once more.
pub fn let_out(device: impl AsFd, threads: &[u32]) -> Result<usize, SysError> {
    resend(&device)?;
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut request = vec![0; ANY_REQUEST];
    let mut answered = 0;
    loop {
        let mut fds = [PollFd::new(&device, PollFlags::IN)];
        if poll(&mut fds, Some(&now)).is_err() || fds[0].revents() != PollFlags::IN {
            return Ok(answered);
        }
        let len = rustix::io::read(&device, &mut request)
            .map_err(|error| SysError::new("read of a request", Path::new(DEVICE), error))?;
        let request = &request[..len];
        let (Some(kind), Some(unique), Some(node), Some(thread)) = (
            word(request, 4),
            long(request, UNIQUE_AT),
            long(request, NODE_AT),
            word(request, THREAD_AT),
        ) else {
            return Ok(answered);
        };
        // Not ENOENT, which would be remembered as a name that is not there.
        if !NO_ANSWER.contains(&kind)
            && (threads.contains(&thread) || node == ROOT)
            && answer(&device, unique, -libc::EINTR).is_ok()
        {
            answered += 1;
        }
    }
}

fn answer(device: impl AsFd, unique: u64, error: i32) -> rustix::io::Result<()> {
    let mut header = [0; OUT_HEADER];
    header[..4].copy_from_slice(&(OUT_HEADER as u32).to_ne_bytes());
    header[4..8].copy_from_slice(&error.to_ne_bytes());
    header[8..].copy_from_slice(&unique.to_ne_bytes());
    rustix::io::write(device, &header).map(drop)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|bytes| u64::from_ne_bytes(*bytes))
}

/// Requests of the connection with the device number `major`:`minor` that are not answered.
///
/// # Errors
/// [`SysError`], with ENOENT when there is no such connection (any more).
pub fn waiting(major: u32, minor: u32) -> Result<u64, SysError> {
    let file = control(major, minor, "waiting", OFlags::RDONLY)?;
    let mut text = [0; 32];
    let len = rustix::io::read(&file, &mut text).map_err(|error| SysError::new("read", Path::new("waiting"), error))?;
    let text = std::str::from_utf8(&text[..len]).unwrap_or_default();
    let odd = |_| SysError::new("read", Path::new("waiting"), rustix::io::Errno::INVAL);
    text.trim().parse().map_err(odd)
}

/// Ends the connection of the FUSE file system with the device number `major`:`minor`: every request under way or to come fails with
/// ENOTCONN, and its server is told that the file system is gone.
///
/// # Errors
/// [`SysError`], with ENOENT when there is no such connection (any more).
pub fn abort(major: u32, minor: u32) -> Result<(), SysError> {
    let file = control(major, minor, "abort", OFlags::WRONLY)?;
    rustix::io::write(file, b"1")
        .map(drop)
        .map_err(|error| SysError::new("abort of a FUSE connection", Path::new("abort"), error))
}

/// Opens what the kernel has of a connection under this name.
fn control(major: u32, minor: u32, name: &str, how: OFlags) -> Result<OwnedFd, SysError> {
    // The kernel names a connection by its internal device number.
    let connection = u64::from(major) << 20 | u64::from(minor);
    let path = PathBuf::from(format!("{connection}/{name}"));
    // A mount of our own that nobody sees: /sys/fs/fuse/connections is missing in containers and on machines without systemd.
    let control = Context::open("fusectl", &path)?.mount(MountAttrFlags::empty())?;
    rustix::fs::openat(control.as_fd(), &path, how | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| SysError::new("open of a FUSE connection", &path, error))
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
