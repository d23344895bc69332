//! An inode of the index as the attributes FUSE wants.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo};

use crate::layer::Inode;
use crate::layer::index::mode;

/// Unit of `st_blocks`, in bytes (fixed by stat(2)).
pub(super) const BLOCK: u64 = 512;
/// Preferred size of reads as stat(2) tells it, in bytes: what ext4 says, so that programs behave as they do there.
pub(super) const IO_SIZE: u32 = 4096;
/// Size of a directory as stat(2) tells it, in bytes; what ext4 says for a small one.
pub(super) const DIR_SIZE: u64 = 4096;
/// Largest major and minor device number that the kernel, and the 32 bits of a FUSE attribute, can hold.
const MAJOR_MAX: u32 = (1 << 12) - 1;
const MINOR_MAX: u32 = (1 << 20) - 1;
const PERMISSIONS: u32 = 0o7777;

/// Attributes of `inode` under the number `number`.
pub(super) fn of(number: u64, inode: &Inode) -> FileAttr {
    let time = time(inode.mtime, inode.mtime_nsec);
    let size = if inode.is_dir() { DIR_SIZE } else { inode.size };
    // A symlink's target is kept within its inode, as ext4 does with most.
    let blocks = if inode.is_symlink() { 0 } else { size.div_ceil(BLOCK) };
    FileAttr {
        ino: INodeNo(number),
        size,
        blocks,
        // A layer states one time. A change time in the past is what an unpacked layer cannot have, and nothing depends on.
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: kind(inode),
        perm: (inode.mode & PERMISSIONS) as u16,
        nlink: inode.nlink,
        uid: inode.uid,
        gid: inode.gid,
        rdev: device(inode.rdev_major, inode.rdev_minor),
        blksize: IO_SIZE,
        flags: 0,
    }
}

/// Type of `inode`.
pub(super) fn kind(inode: &Inode) -> FileType {
    match inode.file_type() {
        mode::DIR => FileType::Directory,
        mode::LNK => FileType::Symlink,
        mode::CHR => FileType::CharDevice,
        mode::BLK => FileType::BlockDevice,
        mode::FIFO => FileType::NamedPipe,
        mode::SOCK => FileType::Socket,
        // An index has no other type than these and regular files.
        _ => FileType::RegularFile,
    }
}

/// Answer for a name that does not exist, which the kernel may remember: an entry with inode number 0.
pub(super) fn absent() -> FileAttr {
    of(0, &Inode::default())
}

/// A time in the form that `fuser` takes, before 1970 as well. What the form cannot hold becomes 1970.
pub(super) fn time(seconds: i64, nanoseconds: u32) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let base = if seconds < 0 {
        UNIX_EPOCH.checked_sub(whole)
    } else {
        UNIX_EPOCH.checked_add(whole)
    };
    base.and_then(|base| base.checked_add(Duration::from_nanos(nanoseconds.into())))
        .unwrap_or(UNIX_EPOCH)
}

/// A device number as FUSE carries it: `new_encode_dev` of the kernel. Numbers that Linux cannot have become the largest it can, never
/// 0:0, which would make a device a whiteout.
fn device(major: u32, minor: u32) -> u32 {
    let (major, minor) = (major.min(MAJOR_MAX), minor.min(MINOR_MAX));
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn device_numbers_are_encoded_as_the_kernel_does() {
        assert_eq!(device(0, 0), 0);
        assert_eq!(device(1, 3), 0x103);
        assert_eq!(device(8, 0x12345), 0x1230_0845);
        assert_eq!(device(4096, 0), device(4095, 0));
        assert_eq!(device(u32::MAX, u32::MAX), u32::MAX);
    }

    #[test]
    fn sizes_and_blocks() {
        let file = Inode {
            mode: mode::REG | 0o4755,
            size: 513,
            nlink: 2,
            ..Inode::default()
        };
        let attr = of(5, &file);
        assert_eq!(
            (attr.ino.0, attr.size, attr.blocks, attr.perm, attr.nlink),
            (5, 513, 2, 0o4755, 2)
        );
        let dir = Inode {
            mode: mode::DIR | 0o755,
            ..Inode::default()
        };
        assert_eq!((of(1, &dir).size, of(1, &dir).blocks), (4096, 8));
        assert_eq!(absent().ino.0, 0);
    }

    proptest! {
        #[test]
        fn times_lie_where_stat_says(seconds in -(1i64 << 40)..(1i64 << 40), nanoseconds in 0u32..1_000_000_000) {
            let exact = i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
            let time = time(seconds, nanoseconds);
            let back = match time.duration_since(UNIX_EPOCH) {
                Ok(after) => after.as_nanos() as i128,
                Err(before) => -(before.duration().as_nanos() as i128),
            };
            prop_assert_eq!(back, exact);
        }

        #[test]
        fn no_time_panics(seconds in any::<i64>(), nanoseconds in 0u32..1_000_000_000) {
            time(seconds, nanoseconds);
        }

        #[test]
        fn only_a_whiteout_is_0_0(major in any::<u32>(), minor in any::<u32>()) {
            prop_assert_eq!(device(major, minor) == 0, major == 0 && minor == 0);
        }
    }
}
