//! Lower directories with mapped owners, for containers in user namespaces: mount points below the directory of the snapshot.
//!
//! ```text
//! snapshots/<id>/lower/7.fs           mount point: snapshots/7/fs, read-only, with the owners that this snapshot is to see
//! snapshots/<id>/lower/9.chain.5.file mount point: the same of a segment
//! ```
//!
//! An id-mapped mount is a second mount of a directory that is there already: nothing is copied or read. overlayfs takes private copies of the
//! mounts that it is made of, so that these are needed only until a container's root is mounted; but nobody tells when that is, and it may be
//! mounted again. They stay as long as the snapshot has mounts to give. They need no process: a later one finds them where they are, and uses
//! them if they still show what it would mount. What they do not show any more (a layer of a FUSE session that has ended) is mounted over: a
//! path that was given out never shows nothing.

use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use super::SnapshotsError;
use super::users::Mapping;
use crate::sys::SysError;
use crate::sys::idmap::{id_mapped, identity};
use crate::sys::mount::{Unmount, unmount};

/// Directory of the mount points, in that of the snapshot.
const DIRECTORY: &str = "lower";
/// Mode of it and of mount points.
const PRIVATE: u32 = 0o700;
/// Most mounts that are taken away from one mount point; more can only mean that something makes new ones.
const STACKED_MAX: usize = 64;

/// Where `lower`, a path in the tree of snapshots, is shown with mapped owners to the snapshot in the directory `dir`.
pub(super) fn path(dir: &Path, lower: &Path) -> PathBuf {
    // `<id>/<name>`, which may end with `/.`: unlike names, such pairs are never the same for two.
    let mut parts = lower.components().rev().map(|part| part.as_os_str());
    let (name, id) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let mut joined = OsString::from(id);
    joined.push(".");
    joined.push(name);
    dir.join(DIRECTORY).join(joined)
}

/// Mounts each of `lowers` with mapped owners for the snapshot in `dir`, unless that is there.
pub(super) fn show(dir: &Path, lowers: &[PathBuf], mapping: &Mapping) -> Result<(), SnapshotsError> {
    if lowers.is_empty() {
        return Ok(());
    }
    make(&dir.join(DIRECTORY))?;
    let mut namespace = None;
    for lower in lowers {
        let target = path(dir, lower);
        make(&target)?;
        let shown = identity(lower)?;
        // A server that is gone has no answer.
        if identity(&target).is_ok_and(|present| present == shown) {
            continue;
        }
        let users = match namespace {
            Some(ref users) => users,
            None => namespace.insert(mapping.namespace()?),
        };
        id_mapped(lower, users)?.attach(&target)?;
    }
    Ok(())
}

/// Takes away all that [`show`] has mounted for the snapshot in `dir`. Who has mounted an overlay of it keeps that.
pub(super) fn take_away(dir: &Path) -> Result<(), SnapshotsError> {
    let lower = dir.join(DIRECTORY);
    let entries = match fs::read_dir(&lower) {
        Ok(entries) => entries,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(()),
        Err(error) => return Err(SnapshotsError::io("list", &lower)(error)),
    };
    for entry in entries {
        let target = entry.map_err(SnapshotsError::io("list", &lower))?.path();
        for _ in 0..STACKED_MAX {
            match unmount(&target, Unmount::Detach) {
                Ok(()) => {}
                // Nothing is mounted there (any more).
                Err(error) if is(&error, libc::EINVAL) || is(&error, libc::ENOENT) => break,
                Err(error) => return Err(error.into()),
            }
        }
        fs::remove_dir(&target).map_err(SnapshotsError::io("remove", &target))?;
    }
    fs::remove_dir(&lower).map_err(SnapshotsError::io("remove", &lower))
}

fn make(path: &Path) -> Result<(), SnapshotsError> {
    match fs::DirBuilder::new().mode(PRIVATE).create(path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(SnapshotsError::io("create", path)(error)),
        _ => Ok(()),
    }
}

fn is(error: &SysError, errno: i32) -> bool {
    error.source.raw_os_error() == Some(errno)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_lower_has_a_place_of_its_own() {
        let at = |lower: &str| path(Path::new("/r/snapshots/9"), Path::new(lower));
        assert_eq!(at("/r/snapshots/7/fs"), Path::new("/r/snapshots/9/lower/7.fs"));
        assert_eq!(at("/r/snapshots/7/fs/."), Path::new("/r/snapshots/9/lower/7.fs"));
        assert_eq!(
            at("/r/snapshots/7/chain.5.file/."),
            Path::new("/r/snapshots/9/lower/7.chain.5.file")
        );
        assert_ne!(at("/r/snapshots/7/fs.1/."), at("/r/snapshots/71/fs/."));
    }

    #[test]
    fn what_was_never_mounted_is_taken_away_at_once() {
        let dir = tempfile::tempdir().unwrap();
        take_away(dir.path()).unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        take_away(&file).unwrap();
        fs::remove_file(file).unwrap();
        // Left by a machine that was switched off.
        fs::create_dir_all(dir.path().join("lower/7.fs")).unwrap();
        take_away(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
