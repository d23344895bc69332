//! Mounting and unmounting: overlay, bind, detach.
//!
//! File systems are mounted with `fsopen` and its kin rather than `mount(2)`: that has no limit of one page for the options, and the
//! mount exists before it is seen anywhere.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_fd, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
};

use super::SysError;

/// Longest value that `fsconfig` takes as a string, in bytes, its terminator included.
pub(super) const FSCONFIG_STRING_MAX: usize = 256;
/// Longest options of `mount(2)`, in bytes, the terminator included: one page.
const MOUNT_OPTIONS_MAX: usize = 4096;
/// Most that the kernel writes about one failure into a file system context, in bytes.
const LOG_MESSAGE_MAX: usize = 1024;

/// A file system that is mounted, and not yet seen anywhere. Dropped, it is gone.
#[derive(Debug)]
pub struct DetachedMount {
    fd: OwnedFd,
}

impl AsFd for DetachedMount {
    /// The mount's root directory.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<OwnedFd> for DetachedMount {
    fn from(fd: OwnedFd) -> Self {
        DetachedMount { fd }
    }
}

impl DetachedMount {
    /// Shows the mount at the directory `target`.
    ///
    /// # Errors
    /// [`SysError`] names the call and the path.
    pub fn attach(self, target: &Path) -> Result<(), SysError> {
        move_mount(
            self.fd.as_fd(),
            "",
            CWD,
            target,
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )
        .map_err(|error| SysError::new("move_mount", target, error))
    }
}

/// A file system that is being configured (`fsopen`).
pub(super) struct Context {
    fd: OwnedFd,
    /// What errors name.
    subject: PathBuf,
}

impl Context {
    pub(super) fn open(fs_type: &str, subject: &Path) -> Result<Self, SysError> {
        let fd = fsopen(fs_type, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|e| SysError::new("fsopen", subject, e))?;
        Ok(Context {
            fd,
            subject: subject.to_owned(),
        })
    }

    pub(super) fn flag(&self, key: &str) -> Result<(), SysError> {
        fsconfig_set_flag(self.fd.as_fd(), key).map_err(|error| self.error("fsconfig(flag)", error))
    }

    pub(super) fn string(&self, key: &str, value: &OsStr) -> Result<(), SysError> {
        fsconfig_set_string(self.fd.as_fd(), key, value).map_err(|error| self.error("fsconfig(string)", error))
    }

    pub(super) fn mount(self, attributes: MountAttrFlags) -> Result<DetachedMount, SysError> {
        fsconfig_create(self.fd.as_fd()).map_err(|error| self.error("fsconfig(create)", error))?;
        let fd = fsmount(self.fd.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
            .map_err(|error| self.error("fsmount", error))?;
        Ok(DetachedMount { fd })
    }

    fn error(&self, call: &'static str, error: rustix::io::Errno) -> SysError {
        let mut error = SysError::new(call, &self.subject, error);
        // The kernel explains itself in lines like "e overlay: ...", one per read; the last one is the closest to the failure.
        let mut line = [0; LOG_MESSAGE_MAX];
        while let Ok(len @ 1..) = rustix::io::read(&self.fd, &mut line) {
            let text = String::from_utf8_lossy(line.get(..len).unwrap_or(&line));
            error.message = text.trim_end().trim_start_matches("e ").to_owned();
        }
        error
    }
}

/// Mounts a read-only overlay of the directories `lower`, the topmost first, at the directory `target`.
///
/// # Errors
/// [`SysError`]. On kernels before 6.8 the paths together must fit into one page.
pub fn overlay(lower: &[PathBuf], target: &Path) -> Result<(), SysError> {
    overlay_from(OsStr::new("overlay"), lower, target)
}

/// The same, with a source of its own in the list of mounts, by which it can be found again.
///
/// # Errors
/// As [`overlay`].
pub fn overlay_from(source: &OsStr, lower: &[PathBuf], target: &Path) -> Result<(), SysError> {
    match overlay_context(source, lower, target) {
        Ok(mount) => mount.attach(target),
        // EINVAL: the kernel does not know `lowerdir+`, or the option is wrong for a reason that mount(2) will repeat.
        Err(error) if error.source.raw_os_error() == Some(libc::EINVAL) => overlay_options(source, lower, target),
        Err(error) => Err(error),
    }
}

fn overlay_context(source: &OsStr, lower: &[PathBuf], target: &Path) -> Result<DetachedMount, SysError> {
    let context = Context::open("overlay", target)?;
    context.string("source", source)?;
    context.flag("ro")?;
    for path in lower {
        if path.as_os_str().len() < FSCONFIG_STRING_MAX {
            context.string("lowerdir+", path.as_os_str())?;
            continue;
        }
        let dir = rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| SysError::new("open", path, error))?;
        fsconfig_set_fd(context.fd.as_fd(), "lowerdir+", dir.as_fd())
            .map_err(|error| context.error("fsconfig(lowerdir+)", error))?;
    }
    context.mount(MountAttrFlags::MOUNT_ATTR_RDONLY)
}

fn overlay_options(source: &OsStr, lower: &[PathBuf], target: &Path) -> Result<(), SysError> {
    let too_long = || {
        SysError::new(
            "mount(overlay)",
            target,
            io::Error::from(io::ErrorKind::ArgumentListTooLong),
        )
    };
    let mut options = b"lowerdir=".to_vec();
    for (i, path) in lower.iter().enumerate() {
        if i > 0 {
            options.push(b':');
        }
        for &byte in path.as_os_str().as_bytes() {
            // The options end at a comma, a directory at a colon.
            if matches!(byte, b'\\' | b':' | b',') {
                options.push(b'\\');
            }
            options.push(byte);
        }
    }
    if options.len() >= MOUNT_OPTIONS_MAX {
        return Err(too_long());
    }
    let options = CString::new(options).map_err(|_| too_long())?;
    rustix::mount::mount(source, target, "overlay", MountFlags::RDONLY, options.as_c_str())
        .map_err(|error| SysError::new("mount(overlay)", target, error))
}

/// Shows the directory or file `source` at `target` as well, not what is mounted below it.
///
/// # Errors
/// [`SysError`].
pub fn bind(source: &Path, target: &Path) -> Result<(), SysError> {
    rustix::mount::mount_bind(source, target).map_err(|error| SysError::new("mount(bind)", target, error))
}

/// How to unmount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmount {
    /// Only if nobody uses the mount.
    IfIdle,
    /// Now, out of everybody's sight; who uses it goes on using it (MNT_DETACH).
    Detach,
}

/// Removes the topmost mount at `target`. Never asks the file system that is mounted there, and so does not wait for its server.
///
/// # Errors
/// [`SysError`] with EBUSY when the mount is in use, EINVAL when nothing is mounted there.
pub fn unmount(target: &Path, how: Unmount) -> Result<(), SysError> {
    let flags = match how {
        Unmount::IfIdle => UnmountFlags::NOFOLLOW,
        Unmount::Detach => UnmountFlags::NOFOLLOW | UnmountFlags::DETACH,
    };
    rustix::mount::unmount(target, flags).map_err(|error| SysError::new("umount2", target, error))
}
