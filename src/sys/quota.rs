//! Project quotas: how much the files of some directories may take of a file system together (quotactl(2), `FS_IOC_FSSETXATTR`).
//!
//! A directory that is in a project hands it on to what is made in it, and a project may have a limit. ext4 and xfs speak the same words here;
//! the file system is meant by a directory of it (`quotactl_fd`, Linux 5.14), so that nobody has to find its device.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::ioctl::{Getter, Opcode, Setter, ioctl, opcode};

use super::SysError;

/// Type of the quotas of projects (`linux/quota.h`).
const PRJQUOTA: u32 = 2;
/// Commands of quotactl(2).
const Q_GETQUOTA: u32 = 0x80_0007;
const Q_SETQUOTA: u32 = 0x80_0008;
/// Asks what is counted and what is enforced (`linux/dqblk_xfs.h`); every file system with quotas answers it.
const Q_XGETQSTATV: u32 = ((b'X' as u32) << 8) + 8;
/// Version of its answer, which the caller states.
const FS_QSTATV_VERSION1: u8 = 1;
/// Whether limits of projects are enforced, in the flags of that answer.
const FS_QUOTA_PDQ_ENFD: u16 = 1 << 5;
/// Unit of limits, in bytes.
const QIF_BLOCK: u64 = 1024;
/// What of a record is set: the limits of bytes alone.
const QIF_BLIMITS: u32 = 1;
/// Flag of a directory that hands its project on.
const FS_XFLAG_PROJINHERIT: u32 = 0x200;
/// Types of file systems that can have project quotas, as statfs(2) gives them, and what switches these on.
const ENABLED_BY: [(i64, &str); 2] = [
    (
        0xef53,
        "ext4 has them after `tune2fs -O project,quota -Q prjquota` on the unmounted device, mounted with `prjquota`",
    ),
    (0x5846_5342, "xfs has them if it is mounted with `prjquota`"),
];

/// `struct fsxattr` of `linux/fs.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct FsXattr {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    padding: [u8; 8],
}

const FS_IOC_FSGETXATTR: Opcode = opcode::read::<FsXattr>(b'X', 31);
const FS_IOC_FSSETXATTR: Opcode = opcode::write::<FsXattr>(b'X', 32);

/// `struct if_dqblk` of `linux/quota.h`.
#[repr(C)]
#[derive(Default)]
struct DqBlk {
    hard_blocks: u64,
    soft_blocks: u64,
    bytes: u64,
    hard_inodes: u64,
    soft_inodes: u64,
    inodes: u64,
    block_grace: u64,
    inode_grace: u64,
    valid: u32,
}

/// The beginning of `struct fs_quota_statv` of `linux/dqblk_xfs.h`, and room for the rest.
#[repr(C, align(8))]
struct QuotaState {
    version: u8,
    padding: u8,
    flags: u16,
    rest: [u8; 252],
}

/// What a file system knows of a project.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Project {
    /// Bytes that its files take.
    pub bytes: u64,
    /// Its files and directories.
    pub inodes: u64,
    /// Most bytes that they may take; 0: as many as there are.
    pub limit: u64,
}

/// Why the sizes of directories cannot be limited below `root`, and what would help; `None` if they can be.
pub fn missing(root: &Path) -> Option<String> {
    let on = match open(root).and_then(|dir| enforces(&dir, root)) {
        Ok(on) => on,
        Err(error) if is(&error, libc::ENOSYS) => false,
        Err(error) => return Some(error.to_string()),
    };
    if !on {
        let kind = rustix::fs::statfs(root).map(|stat| stat.f_type);
        let help = ENABLED_BY.iter().find(|(magic, _)| kind == Ok(*magic));
        let help = help.map_or("ext4 and xfs can have them", |(_, help)| help);
        return Some(format!(
            "the file system of {} has no project quotas that are enforced ({help}, with a kernel that has them)",
            root.display()
        ));
    }
    match project_of(root) {
        Ok(0) => None,
        // Its limit is somebody else's, and would not hold any more for what left it.
        Ok(id) => Some(format!("{} is in project {id} itself", root.display())),
        Err(error) => Some(error.to_string()),
    }
}

/// The project that a directory is in; 0 if it is in none. A link is not followed.
///
/// # Errors
/// [`SysError`]; ENOTTY or EOPNOTSUPP where there are no projects.
pub fn project_of(dir: &Path) -> Result<u32, SysError> {
    Ok(attributes(open(dir)?.as_fd(), dir)?.project)
}

/// Puts an empty directory into a project, and what will be made in it. 0 takes it out.
///
/// # Errors
/// [`SysError`].
#[allow(unsafe_code)]
pub fn set_project(dir: &Path, id: u32) -> Result<(), SysError> {
    let fd = open(dir)?;
    let mut attributes = attributes(fd.as_fd(), dir)?;
    attributes.project = id;
    match id {
        0 => attributes.flags &= !FS_XFLAG_PROJINHERIT,
        _ => attributes.flags |= FS_XFLAG_PROJINHERIT,
    }
    // SAFETY: with this request the kernel reads one `struct fsxattr`, which `FsXattr` is laid out as.
    let set = unsafe { ioctl(&fd, Setter::<FS_IOC_FSSETXATTR, FsXattr>::new(attributes)) };
    set.map_err(|error| SysError::new("ioctl(FS_IOC_FSSETXATTR)", dir, error))
}

/// What the file system of `dir` knows of a project.
///
/// # Errors
/// [`SysError`]; ESRCH where quotas are off.
pub fn project(dir: &Path, id: u32) -> Result<Project, SysError> {
    let mut record = DqBlk::default();
    match quotactl(&open(dir)?, Q_GETQUOTA, id, &mut record) {
        Ok(()) => Ok(Project {
            bytes: record.bytes,
            inodes: record.inodes,
            limit: record.hard_blocks.saturating_mul(QIF_BLOCK),
        }),
        // xfs, of a project that never was.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Project::default()),
        Err(error) => Err(SysError::new("quotactl_fd(Q_GETQUOTA)", dir, error)),
    }
}

/// Limits what the files of a project may take, in whole KiB and at least one; 0: no limit.
///
/// # Errors
/// [`SysError`].
pub fn set_limit(dir: &Path, id: u32, bytes: u64) -> Result<(), SysError> {
    let mut record = DqBlk {
        hard_blocks: match bytes {
            0 => 0,
            bytes => (bytes / QIF_BLOCK).max(1),
        },
        valid: QIF_BLIMITS,
        ..DqBlk::default()
    };
    quotactl(&open(dir)?, Q_SETQUOTA, id, &mut record)
        .map_err(|error| SysError::new("quotactl_fd(Q_SETQUOTA)", dir, error))
}

fn open(dir: &Path) -> Result<OwnedFd, SysError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(dir, flags, Mode::empty()).map_err(|error| SysError::new("open", dir, error))
}

fn enforces(fd: &OwnedFd, dir: &Path) -> Result<bool, SysError> {
    let mut state = QuotaState {
        version: FS_QSTATV_VERSION1,
        padding: 0,
        flags: 0,
        rest: [0; 252],
    };
    quotactl(fd, Q_XGETQSTATV, 0, &mut state)
        .map_err(|error| SysError::new("quotactl_fd(Q_XGETQSTATV)", dir, error))?;
    Ok(state.flags & FS_QUOTA_PDQ_ENFD != 0)
}

#[allow(unsafe_code)]
fn attributes(fd: BorrowedFd<'_>, dir: &Path) -> Result<FsXattr, SysError> {
    // SAFETY: with this request the kernel writes one `struct fsxattr`, which `FsXattr` is laid out as and for which any bytes are values.
    let got = unsafe { ioctl(fd, Getter::<FS_IOC_FSGETXATTR, FsXattr>::new()) };
    got.map_err(|error| SysError::new("ioctl(FS_IOC_FSGETXATTR)", dir, error))
}

/// What a command of quotactl(2) reads or writes.
trait Argument {}
impl Argument for DqBlk {}
impl Argument for QuotaState {}

#[allow(unsafe_code)]
fn quotactl(fd: &OwnedFd, command: u32, id: u32, argument: &mut impl Argument) -> io::Result<()> {
    let command = libc::c_long::from(command << 8 | PRJQUOTA);
    // SAFETY: each command here reads or writes one structure, no larger than its argument's type, which outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_quotactl_fd,
            libc::c_long::from(fd.as_raw_fd()),
            command,
            libc::c_long::from(id),
            std::ptr::from_mut(argument),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn is(error: &SysError, errno: i32) -> bool {
    error.source.raw_os_error() == Some(errno)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_are_those_of_the_kernel() {
        assert_eq!(size_of::<FsXattr>(), 28);
        assert_eq!(size_of::<DqBlk>(), 72);
        assert_eq!(std::mem::offset_of!(QuotaState, flags), 2);
        #[cfg(target_arch = "x86_64")]
        assert_eq!(
            (FS_IOC_FSGETXATTR as u64, FS_IOC_FSSETXATTR as u64),
            (0x801c_581f, 0x401c_5820)
        );
    }

    #[test]
    fn where_nothing_can_be_limited_it_is_said_why() {
        let missing = missing(Path::new("/proc")).unwrap();
        assert!(
            missing.contains("/proc") && missing.contains("project quotas"),
            "{missing}"
        );
        let error = project(Path::new("/proc"), 7).unwrap_err();
        assert!(error.to_string().contains("quotactl_fd"), "{error}");
        assert!(set_project(Path::new("/proc"), 7).is_err());
        // A link to a directory is none.
        assert!(
            project_of(Path::new("/proc/self"))
                .unwrap_err()
                .to_string()
                .contains("open")
        );
    }
}
