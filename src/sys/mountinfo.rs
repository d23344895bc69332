//! Which mounts there are: `/proc/self/mountinfo`.
//!
//! One line per mount, fields separated by spaces (proc(5)):
//!
//! ```text
//! 36 35 98:0 /root /mount/point rw,noatime master:1 - fstype source rw,options
//! id parent dev root point      options    any number "-"
//! ```
//!
//! Space, tab, newline and backslash in a field are written as a backslash and three octal digits.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use super::SysError;

const MOUNTINFO: &str = "/proc/self/mountinfo";

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Device number of its file system, major part (0 for FUSE and other file systems without a block device).
    pub major: u32,
    /// Device number of its file system, minor part.
    pub minor: u32,
    /// Which directory of the file system is shown.
    pub root: PathBuf,
    /// Where it is shown.
    pub mount_point: PathBuf,
    /// Type with subtype: `ext4`, `fuse.lazuli`.
    pub fs_type: OsString,
    /// Source: a device, a name, or `none`.
    pub source: OsString,
}

/// All mounts of the process's mount namespace, in the order in which they were made: of several at one mount point the last one is
/// seen.
///
/// # Errors
/// [`SysError`] when `/proc` cannot be read.
pub fn mounts() -> Result<Vec<Mount>, SysError> {
    let path = Path::new(MOUNTINFO);
    let text = std::fs::read(path).map_err(|source| SysError::new("read", path, source))?;
    Ok(parse(&text))
}

/// The mount that is seen at `mount_point`, which is an absolute path without symbolic links.
///
/// # Errors
/// [`SysError`] when `/proc` cannot be read.
pub fn mount_at(mount_point: &Path) -> Result<Option<Mount>, SysError> {
    Ok(mounts()?
        .into_iter()
        .rev()
        .find(|mount| mount.mount_point == mount_point))
}

/// Parses the text of a mountinfo file. A line that is not of its form is left out.
pub fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|&c| c == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&c| c == b' ');
    let mut device = fields.nth(2)?.split(|&c| c == b':');
    let (major, minor) = (number(device.next()?)?, number(device.next()?)?);
    let root = unescape(fields.next()?);
    let mount_point = unescape(fields.next()?);
    // Skips the options and the optional fields, of which there may be none.
    fields.find(|field| *field == b"-")?;
    let fs_type = unescape(fields.next()?);
    let source = unescape(fields.next()?);
    Some(Mount {
        major,
        minor,
        root: root.into(),
        mount_point: mount_point.into(),
        fs_type,
        source,
    })
}

fn number(digits: &[u8]) -> Option<u32> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) => {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => {
                out.push(first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt as _;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_line_is_taken_apart() {
        let text = b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue\n\
            40 36 0:51 / /a\\040b\\134\\011c rw - fuse.lazuli lazuli\\012x rw\nnot a mount\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].mount_point, Path::new("/mnt2"));
        assert_eq!(mounts[0].root, Path::new("/mnt1"));
        assert_eq!((mounts[0].major, mounts[0].minor), (98, 0));
        assert_eq!(mounts[0].fs_type, "ext3");
        assert_eq!(mounts[1].mount_point, Path::new("/a b\\\tc"));
        assert_eq!(mounts[1].fs_type, "fuse.lazuli");
        assert_eq!(mounts[1].source, "lazuli\nx");
        assert_eq!(mounts[1].minor, 51);
    }

    #[test]
    fn proc_is_mounted_on_every_machine_that_runs_this() {
        let proc = mount_at(Path::new("/proc")).unwrap().unwrap();
        assert_eq!(proc.fs_type, "proc");
        assert_eq!(mount_at(Path::new("/proc/self")).unwrap(), None);
    }

    /// What the kernel does to a path (`seq_path` with " \t\n\\").
    fn escape(path: &[u8]) -> Vec<u8> {
        path.iter()
            .flat_map(|&c| match c {
                b' ' | b'\t' | b'\n' | b'\\' => format!("\\{c:03o}").into_bytes(),
                c => vec![c],
            })
            .collect()
    }

    proptest! {
        #[test]
        fn any_path_comes_back(path in proptest::collection::vec(1u8.., 1..40)) {
            let mut line = b"1 2 0:9 / ".to_vec();
            line.extend(escape(&path));
            line.extend(b" rw - fuse x rw");
            let mounts = parse(&line);
            prop_assert_eq!(mounts.len(), 1);
            prop_assert_eq!(mounts[0].mount_point.as_os_str().as_bytes(), &path[..]);
        }

        #[test]
        fn no_text_panics(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            parse(&text);
        }
    }
}
