//! Id-mapped mounts: a directory that is seen with other owners than it is stored with.
//!
//! The kernel takes the mapping from a user namespace, which only a process can make. The one that is made here lives for no longer than its
//! first instruction: as a zombie it still has its namespace, cannot hold anything open, and cannot outlive this process by accident. The kernel
//! copies the mapping into the mount, so that the namespace is not needed afterwards.

use std::ffi::c_void;
use std::fs::{self, File};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::ptr;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{OpenTreeFlags, open_tree};

use super::SysError;
use super::mount::DetachedMount;

/// Most ranges of one mapping that the kernel takes (`UID_GID_MAP_MAX_EXTENTS` of its `user_namespace.h`).
pub const RANGES_MAX: usize = 340;

/// `MOUNT_ATTR_RDONLY` of `linux/mount.h`.
const MOUNT_ATTR_RDONLY: u64 = 0x1;
/// `MOUNT_ATTR_IDMAP` of `linux/mount.h`.
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

/// Bytes of the stack on which the process of a namespace calls `_exit`: a few pages, since signals are blocked there.
const STACK: usize = 64 << 10;
/// What a stack pointer has to be a multiple of on every machine.
const STACK_ALIGN: usize = 16;

/// Ids that follow each other, and those that they are seen as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct IdRange {
    /// The first one as it is stored: what a container calls it.
    pub inside: u32,
    /// What that one is seen as.
    pub outside: u32,
    /// How many.
    pub count: u32,
}

/// A user namespace, for its mapping.
#[derive(Debug)]
pub struct UserNamespace(OwnedFd);

/// A process that has ended and was not waited for yet.
struct Zombie(libc::pid_t);

impl UserNamespace {
    /// A namespace with these mappings.
    ///
    /// # Errors
    /// [`SysError`]: EPERM or ENOSPC where the machine does not let user namespaces be made (`user.max_user_namespaces`), EINVAL of a
    /// write for mappings that the kernel does not take.
    pub fn new(users: &[IdRange], groups: &[IdRange]) -> Result<Self, SysError> {
        let zombie = Zombie::new()?;
        let dir = PathBuf::from(format!("/proc/{}", zombie.0));
        for (name, ranges) in [("uid_map", users), ("gid_map", groups)] {
            let path = dir.join(name);
            // In one write: the kernel takes no second one.
            fs::write(&path, lines(ranges)).map_err(|error| SysError::new("write", &path, error))?;
        }
        let path = dir.join("ns/user");
        let file = File::open(&path).map_err(|error| SysError::new("open", &path, error))?;
        Ok(UserNamespace(file.into()))
    }
}

/// A mapping as the kernel reads it.
fn lines(ranges: &[IdRange]) -> String {
    let line = |range: &IdRange| format!("{} {} {}\n", range.inside, range.outside, range.count);
    ranges.iter().map(line).collect()
}

impl Zombie {
    #[allow(unsafe_code)]
    fn new() -> Result<Self, SysError> {
        extern "C" fn end(_: *mut c_void) -> libc::c_int {
            // SAFETY: it only ends the calling process.
            unsafe { libc::_exit(0) }
        }
        let mut stack = vec![0_u8; STACK];
        let room = stack.as_mut_ptr_range();
        let top = room.end.wrapping_sub(room.end.addr() % STACK_ALIGN);
        // Whoever sends this process a signal must not have its handlers run in the other one, which shares its memory.
        let mut before = MaybeUninit::<libc::sigset_t>::uninit();
        let mut all = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: both sets have the type that the calls write; `all` is initialised by the first one.
        unsafe {
            libc::sigfillset(all.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
        }
        // No signal at its end (the last byte of the flags is 0): nobody else who waits for children is told of it.
        // Nor is anything closed at its end, which might wait for whoever serves it: the descriptors are shared.
        let flags = libc::CLONE_NEWUSER | libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES;
        // SAFETY: the function runs on a stack of its own, which outlives it since this thread sleeps until the process has ended (VFORK); it
        // touches no memory, and calls nothing but `_exit`.
        let pid = unsafe { libc::clone(end, top.cast(), flags, ptr::null_mut()) };
        let error = io::Error::last_os_error();
        // SAFETY: `before` was initialised by the first call, which cannot fail with these arguments.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), ptr::null_mut()) };
        match pid {
            -1 => Err(SysError::new("clone(CLONE_NEWUSER)", Path::new("/proc/self"), error)),
            pid => Ok(Zombie(pid)),
        }
    }
}

impl Drop for Zombie {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // Children without a signal are only waited for with `__WALL`. It has ended: this returns at once.
        // SAFETY: the call writes nothing, and the process is a child of this one that nobody else waits for.
        while unsafe { libc::waitpid(self.0, ptr::null_mut(), libc::__WALL) } == -1
            && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
        {}
    }
}

/// The directory `source` as a read-only mount of its own, whose owners are seen through the mapping of `users`: ids that it does not have as
/// the overflow id. It shares nothing with other mounts of the same file system but that.
///
/// # Errors
/// [`SysError`]: EINVAL or EPERM for a file system that cannot be mapped, or that is mapped already; ENOSYS before Linux 5.12.
#[allow(unsafe_code)]
pub fn id_mapped(source: &Path, users: &UserNamespace) -> Result<DetachedMount, SysError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let fd = open_tree(CWD, source, flags).map_err(|error| SysError::new("open_tree", source, error))?;
    let attributes = libc::mount_attr {
        attr_set: MOUNT_ATTR_IDMAP | MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: users.0.as_raw_fd().unsigned_abs().into(),
    };
    // SAFETY: the path is an empty text with its terminator, the structure is of the size that is given, and both outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    match result {
        0 => Ok(DetachedMount::from(fd)),
        _ => Err(SysError::new(
            "mount_setattr(idmap)",
            source,
            io::Error::last_os_error(),
        )),
    }
}

/// Which directory is seen at `path`, whoever owns it: the numbers of its file system and of its inode.
///
/// # Errors
/// [`SysError`], for instance of a file system whose server is gone.
pub fn identity(path: &Path) -> Result<(u64, u64), SysError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| SysError::new("open", path, error))?;
    let stat = rustix::fs::fstat(dir).map_err(|error| SysError::new("fstat", path, error))?;
    Ok((stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, chown};

    use super::*;
    use crate::sys::mount::{Unmount, unmount};

    const MAP: [IdRange; 2] = [
        IdRange {
            inside: 0,
            outside: 100_000,
            count: 1000,
        },
        IdRange {
            inside: 2000,
            outside: 300_000,
            count: 10,
        },
    ];

    #[test]
    fn a_mapping_is_written_as_the_kernel_reads_it() {
        assert_eq!(lines(&MAP), "0 100000 1000\n2000 300000 10\n");
        assert_eq!(lines(&[]), "");
    }

    /// Children of this process, zombies among them.
    fn children() -> Vec<u32> {
        let tasks = fs::read_dir("/proc/self/task").unwrap();
        let of = |task: io::Result<fs::DirEntry>| fs::read_to_string(task.unwrap().path().join("children")).unwrap();
        let text: String = tasks.map(of).collect();
        text.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
    }

    #[test]
    fn a_mapped_mount_shows_other_owners_and_leaves_the_files_alone() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let users = UserNamespace::new(&MAP, &MAP).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let [source, target] = ["source", "target"].map(|name| dir.path().join(name));
        fs::create_dir(&source).unwrap();
        fs::create_dir(&target).unwrap();
        for (name, uid, gid) in [("low", 0, 999), ("high", 2009, 2000), ("outside", 1000, 2010)] {
            fs::write(source.join(name), name).unwrap();
            chown(source.join(name), Some(uid), Some(gid)).unwrap();
        }
        id_mapped(&source, &users).unwrap().attach(&target).unwrap();
        // The mapping stays without the namespace.
        drop(users);
        let owners = |dir: &Path, name: &str| {
            let metadata = dir.join(name).metadata().unwrap();
            (metadata.uid(), metadata.gid())
        };
        let seen = ["low", "high", "outside"].map(|name| owners(&target, name));
        let stored = ["low", "high", "outside"].map(|name| owners(&source, name));
        let same = identity(&target).unwrap() == identity(&source).unwrap();
        let written = fs::write(target.join("new"), "").is_ok();
        unmount(&target, Unmount::Detach).unwrap();
        assert_eq!(seen, [(100_000, 100_999), (300_009, 300_000), (65_534, 65_534)]);
        assert_eq!(stored, [(0, 999), (2009, 2000), (1000, 2010)]);
        assert!(same && !written);
        assert_ne!(identity(&target).unwrap(), identity(&source).unwrap());
    }

    #[test]
    fn namespaces_leave_no_processes() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let before = children();
        let many: Vec<_> = (0..64).map(|_| UserNamespace::new(&MAP, &MAP).unwrap()).collect();
        // Mappings that overlap are refused by the kernel: the process goes all the same.
        UserNamespace::new(&[MAP[0], MAP[0]], &MAP).unwrap_err();
        assert_eq!(many.len(), 64);
        let left = children().into_iter().filter(|pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            !before.contains(pid) && status.contains("State:\tZ")
        });
        assert_eq!(left.count(), 0);
    }
}
