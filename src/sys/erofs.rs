//! EROFS: mounting an image that lies in files, and telling which image a mount shows.
//!
//! Through `fsopen` and its kin: one page of options for `mount(2)` would hold the devices of a few dozen layers, not of 500.

use std::fs;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::fs::{Mode, OFlags};
use rustix::mount::MountAttrFlags;

use super::mount::{Context, DetachedMount, FSCONFIG_STRING_MAX};
use super::{SysError, fuse};

/// Type of the mount in the list of mounts.
pub const FS_TYPE: &str = "erofs";
/// `FS_IOC_GETFSUUID` of `linux/fs.h`: `_IOR(0x15, 0, struct fsuuid2)`, and that struct is 17 bytes long.
const FS_IOC_GETFSUUID: u32 = 0x8011_1500;

/// How an image is mounted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ErofsOptions {
    /// Whether the kernel reads metadata and devices past their own page cache, so that each byte is cached once (since Linux 6.15).
    pub direct_io: bool,
    /// How far the kernel reads ahead within a file of the image, in KiB; `None`: its default (128 KiB).
    pub read_ahead_kib: Option<u32>,
}

/// Where the kernel lists what file systems read through, EROFS mounts as `erofs-<number>`: the number is counted up by mounts, and nothing tells
/// which mount has which.
const BACKING_DEVICES: &str = "/sys/class/bdi";
/// Held while a mount is made whose number is of interest.
static NUMBERED: Mutex<()> = Mutex::new(());

/// Mounts the image in the file `metadata`, whose devices are the files `devices` in their order: read-only; set-id bits and device nodes
/// are in force, as they are in the layers below a container anywhere else.
///
/// The kernel opens the files, and reads the first blocks of the metadata: it waits for who serves them.
///
/// # Errors
/// [`SysError`]: ENODEV when the kernel has no EROFS; ENOTBLK when it takes no file as an image, or not one that lies there.
pub fn mount(metadata: &Path, devices: &[PathBuf], options: ErofsOptions) -> Result<DetachedMount, SysError> {
    let context = Context::open(FS_TYPE, metadata)?;
    // Until the mount is made: the descriptors behind the short names of long paths.
    let mut open = Vec::new();
    context.string("source", short(metadata, &mut open)?.as_os_str())?;
    for device in devices {
        context.string("device", short(device, &mut open)?.as_os_str())?;
    }
    if options.direct_io {
        context.flag("directio")?;
    }
    // Never waited for: a mount may hang.
    let (Some(kib), Ok(_turn)) = (options.read_ahead_kib, NUMBERED.try_lock()) else {
        return context.mount(MountAttrFlags::MOUNT_ATTR_RDONLY);
    };
    let before = backing_devices();
    let mount = context.mount(MountAttrFlags::MOUNT_ATTR_RDONLY)?;
    let mut new = backing_devices();
    new.retain(|name| !before.contains(name));
    // If somebody else has made one at the same moment, neither is touched.
    if let [name] = new.as_slice() {
        // It is only slower without.
        let _ = fuse::write_read_ahead(name, kib);
    }
    Ok(mount)
}

/// Names of what EROFS mounts read through.
fn backing_devices() -> Vec<String> {
    let names = fs::read_dir(BACKING_DEVICES).into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.starts_with("erofs-")).collect()
}

/// How far the kernel reads ahead in files of the file system that holds `path`, in KiB; `None` if it does not tell.
pub fn read_ahead_at(path: &Path) -> Option<u32> {
    let device = device(path).ok()?;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let text = fs::read_to_string(format!("{BACKING_DEVICES}/{major}:{minor}/read_ahead_kb")).ok()?;
    text.trim().parse().ok()
}

/// A name of `path` that fits into a string of `fsconfig`: itself, or that of a descriptor which is put into `open`.
fn short(path: &Path, open: &mut Vec<OwnedFd>) -> Result<PathBuf, SysError> {
    if path.as_os_str().len() < FSCONFIG_STRING_MAX {
        return Ok(path.to_owned());
    }
    let fd = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| SysError::new("open", path, error))?;
    let name = format!("/proc/self/fd/{}", fd.as_raw_fd());
    open.push(fd);
    Ok(name.into())
}

/// The UUID of the file system that is seen at the directory `path`; for EROFS, that of the image. `None`: it has none, or the kernel
/// does not tell (before 6.9).
///
/// # Errors
/// [`SysError`] when the directory cannot be opened.
#[allow(unsafe_code)]
pub fn uuid(path: &Path) -> Result<Option<[u8; 16]>, SysError> {
    /// `struct fsuuid2`.
    #[repr(C)]
    struct FsUuid {
        len: u8,
        uuid: [u8; 16],
    }
    let dir = rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|error| SysError::new("open", path, error))?;
    let mut answer = FsUuid { len: 0, uuid: [0; 16] };
    // SAFETY: the request makes the kernel write one `struct fsuuid2`, which `FsUuid` is laid out as, and which outlives the call.
    let result = unsafe { libc::ioctl(dir.as_raw_fd(), FS_IOC_GETFSUUID as _, &raw mut answer) };
    Ok((result == 0 && usize::from(answer.len) == answer.uuid.len()).then_some(answer.uuid))
}

/// Device number of the file system that is seen at the directory `path`: of what is mounted there, if anything is. EROFS answers from
/// memory.
///
/// # Errors
/// [`SysError`].
pub fn device(path: &Path) -> Result<u64, SysError> {
    rustix::fs::lstat(path)
        .map(|stat| stat.st_dev)
        .map_err(|error| SysError::new("lstat", path, error))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    #[test]
    fn a_long_path_gets_a_short_name() {
        let dir = tempfile::tempdir().unwrap();
        let mut open = Vec::new();
        let path = dir.path().join("x");
        assert_eq!(short(&path, &mut open).unwrap(), path);
        assert!(open.is_empty());

        let long = dir.path().join("d".repeat(200));
        std::fs::create_dir(&long).unwrap();
        let long = long.join("f".repeat(200));
        std::fs::write(&long, "here").unwrap();
        let name = short(&long, &mut open).unwrap();
        assert!(
            name.as_os_str() < OsStr::new("/proc/self/fd/\u{7f}"),
            "{}",
            name.display()
        );
        assert_eq!(std::fs::read(name).unwrap(), b"here");
        assert!(short(&long.with_file_name("g".repeat(200)), &mut open).is_err());
    }

    /// An image of an empty root: a superblock, and as inode 40 a directory (compact, tail inline).
    fn smallest() -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        let mut put = |at: usize, text: &[u8]| bytes[at..at + text.len()].copy_from_slice(text);
        put(1024, &0xe0f5_e1e2_u32.to_le_bytes());
        put(1036, &[12]);
        put(1038, &40_u16.to_le_bytes());
        put(1060, &1_u32.to_le_bytes());
        put(1280, &[4, 0, 0, 0, 0xed, 0x41, 2, 0, 27]);
        put(
            1312,
            &[
                40, 0, 0, 0, 0, 0, 0, 0, 24, 0, 2, 0, 40, 0, 0, 0, 0, 0, 0, 0, 25, 0, 2, 0, b'.', b'.', b'.',
            ],
        );
        bytes
    }

    #[test]
    fn what_is_no_image_is_not_mounted() {
        let dir = tempfile::tempdir().unwrap();
        let [file, image] = ["zeros", "image"].map(|name| dir.path().join(name));
        std::fs::write(&file, [0; 8192]).unwrap();
        // What is an image is mounted: else the other failed for another reason.
        std::fs::write(&image, smallest()).unwrap();
        match mount(&image, &[], ErofsOptions::default()) {
            Ok(_) => {
                let error = mount(&file, &[], ErofsOptions::default()).unwrap_err();
                assert!(error.to_string().contains("Invalid argument"), "{error}");
            }
            Err(error) => crate::skip::skipped(crate::skip::Ability::ErofsFiles, error),
        }
        // The file system that holds the temporary directory may have a UUID or not; asking is no error.
        uuid(dir.path()).unwrap();
        assert_eq!(device(dir.path()).unwrap(), device(&file).unwrap());
    }
}
