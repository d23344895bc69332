//! Why the FUSE session cannot do what it was asked to. (What a reader of a file gets is an errno: [`super::errno`].)

use std::io;
use std::path::PathBuf;

use crate::layer::Digest;
use crate::sys::SysError;

/// An error of the FUSE session.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The directory to mount at cannot be used.
    #[error("cannot use {mountpoint} as a mount point: {source}")]
    Mountpoint {
        /// The directory.
        mountpoint: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file system cannot be mounted. Without /dev/fuse or CAP_SYS_ADMIN a retry does not help.
    #[error("cannot mount FUSE at {mountpoint}: {source}; is the fuse module loaded, and does Lazuli run as root?")]
    Mount {
        /// The directory.
        mountpoint: PathBuf,
        /// The cause.
        source: SysError,
    },
    /// A mount that an earlier process left behind cannot be removed.
    #[error("cannot remove the stale mount at {mountpoint}: {source}; unmount it with umount -l")]
    Stale {
        /// The directory.
        mountpoint: PathBuf,
        /// The cause.
        source: SysError,
    },
    /// The kernel and the session do not agree, or there is no thread for it.
    #[error("cannot start the FUSE session at {mountpoint}: {source}")]
    Start {
        /// The directory.
        mountpoint: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file system cannot be unmounted.
    #[error("cannot unmount {mountpoint}: {source}")]
    Unmount {
        /// The directory.
        mountpoint: PathBuf,
        /// The cause.
        source: SysError,
    },
    /// The session's threads did not end, although the file system is unmounted and its connection is aborted.
    #[error("the FUSE session of {mountpoint} does not end")]
    Stuck {
        /// The directory.
        mountpoint: PathBuf,
    },
    /// What was given as the metadata of an image cannot be shown.
    #[error("cannot show the metadata of slot {slot}: {source}")]
    Metadata {
        /// The slot.
        slot: u32,
        /// The cause.
        source: io::Error,
    },
    /// Slot 0 cannot be used: it has the root directory's inode number.
    #[error("layer {layer} cannot be attached to slot 0")]
    SlotZero {
        /// The layer.
        layer: Digest,
    },
    /// The slot shows another layer.
    #[error("layer {layer} cannot be attached to slot {slot}, which holds {holder}")]
    SlotTaken {
        /// The slot.
        slot: u32,
        /// The layer that was to be attached.
        layer: Digest,
        /// The layer that is there.
        holder: Digest,
    },
}
