//! What a directory tree takes of the disk.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, openat, statat};
use rustix::io::Errno;

use super::SnapshotsError;
use crate::store::Usage;

/// Unit of `st_blocks`, in bytes.
const BLOCK: u64 = 512;

/// Deepest directory that is looked into: each level holds a file descriptor while the ones below it are counted.
const MAX_DEPTH: usize = 512;

/// Allocated bytes and inodes of the tree at `root`: hard links once, and no other file system. Its files may change
/// meanwhile.
pub(super) fn usage(root: &Path) -> Result<Usage, SnapshotsError> {
    walk(root).map_err(|error| SnapshotsError::io("measure", root)(error.into()))
}

fn walk(root: &Path) -> Result<Usage, Errno> {
    let root = openat(CWD, root, directory_flags(), Mode::empty())?;
    let stat = rustix::fs::fstat(&root)?;
    let device = stat.st_dev;
    let mut total = Usage::default();
    total.add(&stat);
    let mut hard_links = HashSet::new();
    // A directory is counted when its name is found, and listed when it is on top.
    let mut open = vec![Dir::new(root)?];
    while let Some(dir) = open.last_mut() {
        let Some(entry) = dir.next() else {
            open.pop();
            continue;
        };
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let stat = match statat(dir.fd()?, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            // Removed since it was listed.
            Err(Errno::NOENT) => continue,
            Err(error) => return Err(error),
        };
        if stat.st_dev != device {
            continue;
        }
        let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if !is_directory && stat.st_nlink > 1 && !hard_links.insert(stat.st_ino) {
            continue;
        }
        total.add(&stat);
        if is_directory && open.len() < MAX_DEPTH {
            // `dir` ends its borrow of `open` here.
            let child = open.last().map(|dir| open_child(dir, name)).transpose()?.flatten();
            if let Some(child) = child {
                open.push(Dir::new(child)?);
            }
        }
    }
    Ok(total)
}

/// Opens a directory; `None` if it is no longer there.
fn open_child(parent: &Dir, name: &std::ffi::CStr) -> Result<Option<OwnedFd>, Errno> {
    match openat(parent.fd()?, name, directory_flags(), Mode::empty()) {
        Ok(child) => Ok(Some(child)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Never through a symlink: a container may put one in the place of a directory at any time.
fn directory_flags() -> OFlags {
    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC
}

impl Usage {
    fn add(&mut self, stat: &rustix::fs::Stat) {
        let blocks = u64::try_from(stat.st_blocks).unwrap_or(0);
        self.bytes = self.bytes.saturating_add(blocks.saturating_mul(BLOCK));
        self.inodes = self.inodes.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, symlink};

    use super::*;

    #[test]
    fn counts_blocks_and_inodes_and_hard_links_once() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        fs::create_dir_all(at("a/b")).unwrap();
        fs::write(at("a/file"), vec![1; 100_000]).unwrap();
        fs::hard_link(at("a/file"), at("a/b/link")).unwrap();
        symlink("/usr", at("a/outside")).unwrap();
        fs::File::create(at("sparse")).unwrap().set_len(1 << 40).unwrap();
        let counted = usage(root.path()).unwrap();
        let paths = ["", "a", "a/b", "a/file", "a/outside", "sparse"];
        let blocks: u64 = paths
            .iter()
            .map(|path| at(path).symlink_metadata().unwrap().blocks())
            .sum();
        assert_eq!(counted.inodes, paths.len() as u64);
        assert_eq!(counted.bytes, blocks * BLOCK);
    }

    #[test]
    fn very_deep_trees_are_measured_without_running_out_of_descriptors() {
        let root = tempfile::tempdir().unwrap();
        let mut path = root.path().to_owned();
        for _ in 0..MAX_DEPTH + 50 {
            path.push("d");
        }
        fs::create_dir_all(&path).unwrap();
        assert_eq!(usage(root.path()).unwrap().inodes, MAX_DEPTH as u64 + 1);
    }

    #[test]
    fn a_missing_tree_is_an_error_that_names_it() {
        let error = usage(Path::new("/does/not/exist")).unwrap_err();
        assert!(error.to_string().contains("/does/not/exist"), "{error}");
    }
}
