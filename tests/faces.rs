//! The faces of layers through the real kernel: EROFS images over FUSE and over files, merged chains, restarts, failures.
//!
//! Needs root, /dev/fuse, overlayfs, and EROFS that mounts files. Where the kernel cannot do it, each test says so and does nothing (`support/skip.rs`).

#[path = "faces/chains.rs"]
mod chains;
#[path = "faces/failures.rs"]
mod failures;
#[path = "tree_face/fake.rs"]
mod fake;
#[allow(dead_code)]
#[path = "tree_face/harness.rs"]
mod harness;
#[path = "faces/restart.rs"]
mod restart;
#[path = "faces/rig.rs"]
mod rig;
#[path = "faces/single.rs"]
mod single;
#[allow(dead_code)]
#[path = "support/skip.rs"]
mod skip;
#[path = "faces/takeover.rs"]
mod takeover;
#[allow(dead_code)]
#[path = "support/tree.rs"]
mod tree;
