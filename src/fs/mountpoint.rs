//! Where a session is mounted: the directory, and what earlier processes left there.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use super::FsError;
use crate::sys::mount::{Unmount, unmount};
use crate::sys::mountinfo::mount_at;
use crate::sys::{self, SysError};

/// Type of the mount in the list of mounts: `fuse.lazuli`. By it a stale mount is known as ours.
pub(super) const SUBTYPE: &str = "lazuli";
/// Most stale mounts that are removed from one mount point; more can only mean that something makes new ones.
const STALE_MAX: usize = 64;

/// The path of a mount point without symbolic links.
pub(super) fn place_of(mountpoint: &Path) -> Result<PathBuf, FsError> {
    let fail = |source| FsError::Mountpoint {
        mountpoint: mountpoint.to_owned(),
        source,
    };
    let (parent, name) = mountpoint
        .parent()
        .zip(mountpoint.file_name())
        .ok_or_else(|| fail(io::Error::from(io::ErrorKind::InvalidInput)))?;
    let parent = match parent.as_os_str().is_empty() {
        true => Path::new("."),
        false => parent,
    };
    // The parent, not the mount point itself: a dead server's mount answers no question about itself.
    Ok(parent.canonicalize().map_err(fail)?.join(name))
}

/// Makes the mount point if it is missing.
pub(super) fn make(mountpoint: &Path) -> Result<(), FsError> {
    let fail = |source| FsError::Mountpoint {
        mountpoint: mountpoint.to_owned(),
        source,
    };
    match DirBuilder::new().mode(0o700).create(mountpoint) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(fail(error)),
        _ if !mountpoint.symlink_metadata().map_err(fail)?.is_dir() => {
            Err(fail(io::Error::from(io::ErrorKind::NotADirectory)))
        }
        _ => Ok(()),
    }
}

/// Takes away the mounts that processes before this one left at `mountpoint`.
pub(super) fn clear(mountpoint: &Path) -> Result<(), FsError> {
    let stale = |source| FsError::Stale {
        mountpoint: mountpoint.to_owned(),
        source,
    };
    let fs_type = format!("fuse.{SUBTYPE}");
    for _ in 0..STALE_MAX {
        let Some(mount) = mount_at(mountpoint).map_err(stale)? else {
            return Ok(());
        };
        if mount.fs_type != *fs_type {
            return Ok(());
        }
        tracing::info!(mountpoint = %mountpoint.display(), "removing the stale mount of an earlier process");
        // First the connection, so that nobody is left waiting in it. It is gone if the server is.
        if let Err(error) = sys::fuse::abort(mount.major, mount.minor) {
            tracing::debug!("{error}");
        }
        unmount(mountpoint, Unmount::Detach).map_err(stale)?;
    }
    Ok(())
}

/// Unmounts, and if somebody uses the mount, out of sight of everybody else.
pub(super) fn remove(mountpoint: &Path) -> Result<(), SysError> {
    match unmount(mountpoint, Unmount::IfIdle) {
        Err(error) if error.source.kind() == io::ErrorKind::ResourceBusy => unmount(mountpoint, Unmount::Detach),
        result => result,
    }
}
