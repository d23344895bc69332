//! Whether anybody else has a file open: another process, a mount, the kernel for itself.
//!
//! The kernel gives a write lease (fcntl(2), `F_SETLEASE`) to nobody but the only one who has a file open, whoever the others are and in
//! whatever mount namespace: also a file system that was unmounted lazily, or that only an overlay still has. The lease is given back at once.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

/// `fcntl` command that chooses the signal for who holds a lease that somebody else wants to break (asm-generic/fcntl.h).
const F_SETSIG: libc::c_int = 10;

/// Whether the file is open anywhere but by `file` (and its duplicates). `None`: its file system, or the machine, cannot tell.
pub fn is_open_elsewhere(file: &File) -> Option<bool> {
    let fd = file.as_raw_fd();
    // Who opens the file in the moment of the lease makes the kernel send us a signal. SIGIO, the default, would end the process; this one
    // is ignored unless somebody handles it.
    // SAFETY: the descriptor is open as long as `file` is borrowed, and this command takes a plain number.
    if unsafe { libc::fcntl(fd, F_SETSIG, libc::SIGURG) } < 0 {
        return None;
    }
    // SAFETY: as above.
    if unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_WRLCK) } < 0 {
        let busy = io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock;
        return busy.then_some(true);
    }
    // It cannot fail for a lease that was just given.
    // SAFETY: as above.
    unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_UNLCK) };
    Some(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_has_it_open_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "bytes").unwrap();
        for write in [false, true] {
            let file = File::options().read(true).write(write).open(&path).unwrap();
            assert_eq!(is_open_elsewhere(&file), Some(false));
            let duplicate = file.try_clone().unwrap();
            assert_eq!(is_open_elsewhere(&file), Some(false), "it is the same open file");
            drop(duplicate);
            for write in [false, true] {
                let other = File::options().read(true).write(write).open(&path).unwrap();
                assert_eq!(is_open_elsewhere(&file), Some(true));
                drop(other);
                assert_eq!(is_open_elsewhere(&file), Some(false));
            }
        }
    }

    #[test]
    fn what_has_no_leases_cannot_tell() {
        assert_eq!(is_open_elsewhere(&File::open("/dev/null").unwrap()), None);
    }

    #[test]
    fn a_file_without_a_name_is_asked_as_well() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(is_open_elsewhere(&file), Some(false));
    }
}
