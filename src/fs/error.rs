//! Why the FUSE session cannot do what it was asked to. (What a reader of a file gets is an errno: [`super::errno`].)

use std::io;
use std::path::PathBuf;

use crate::fetch::FetchError;
use crate::layer::{Digest, LayerError};
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
    /// The image face was asked for in the configuration, and cannot be had.
    #[error("fuse.face = \"image\" is not possible here: {reason}")]
    NoImage {
        /// Why.
        reason: String,
    },
    /// A directory or file of the faces cannot be read or written. A retry helps when the cause (a full disk, say) is gone.
    #[error("{path}: {source}")]
    Files {
        /// The directory or file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// No layer is attached to the slot.
    #[error("no layer is attached to slot {slot}")]
    NotAttached {
        /// The slot.
        slot: u32,
    },
    /// The layers of a chain cannot be shown as one image. Without another build of Lazuli a retry does not help.
    #[error("the chain in slot {slot} cannot be one image: {source}")]
    Chain {
        /// The chain's slot.
        slot: u32,
        /// The limit that it exceeds.
        source: LayerError,
    },
    /// The names of a layer cannot be read from the disk any more.
    #[error("the names for slot {slot} cannot be had: {source}")]
    Names {
        /// The slot that was to show them.
        slot: u32,
        /// The cause.
        source: FetchError,
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
