//! FUSE: the session, and the faces of a layer.
//!
//! One [`Session`] serves the whole daemon. Its root directory holds one directory per attached layer, named by the layer's *slot* in
//! decimal; below it the *tree* face shows the layer's names, attributes and bytes as its index has them. Layers never change, so the
//! kernel is told to keep everything it has seen.
//!
//! ```text
//! <mountpoint>/           inode 1
//!     7/                  inode 7 << 32 | 1: root directory of the layer in slot 7
//!         bin/sh          inode 7 << 32 | n: inode n of that layer's index
//!     7.data              inode 7 << 32 | 0xffff_ffff: the data space of the layer in slot 7
//!     9.meta              inode 9 << 32 | 0xffff_fffe: metadata of an image, from a local file
//! ```
//!
//! Of the data files, which are read-only for root alone, the kernel's EROFS makes the *image* face.
//!
//! Inode numbers depend on the slot and the index alone, file handles are always 0, and the inode generation comes from the layer's
//! digest: a later process that attaches the same layers to the same slots takes the session over ([`Session::adopt`]).
//!
//! This room knows layers only as [`crate::fetch::LayerData`]. It never waits on a FUSE thread for anything but the local disk.

mod attr;
mod awaited;
mod carried;
mod counters;
pub mod deadlines;
pub mod errno;
pub mod error;
mod face;
pub mod faces;
mod failures;
mod image;
mod mountpoint;
pub mod read;
mod readdir;
pub mod session;
mod tree;
mod waiting;
mod warn;

pub use carried::Carried;
pub use deadlines::Deadlines;
pub use error::FsError;
pub use faces::{Face, Faces, FacesOptions, Serving, Shown};
pub use session::{Legacy, Session, SessionOptions};
