//! What the session shows, through the real kernel: a FUSE mount of layers in memory, the tree face with overlayfs on top of it, and the
//! files of the image face.
//!
//! Needs root, /dev/fuse and overlayfs, as Lazuli does.

#[path = "tree_face/fake.rs"]
mod fake;
#[path = "tree_face/harness.rs"]
mod harness;
#[path = "tree_face/image.rs"]
mod image;
#[path = "tree_face/lifecycle.rs"]
mod lifecycle;
#[path = "tree_face/looks.rs"]
mod looks;
#[path = "tree_face/overlay.rs"]
mod overlay;
#[path = "tree_face/reads.rs"]
mod reads;
