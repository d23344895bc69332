//! The snapshots service as containerd drives it: over a unix socket, with real mounts. Needs root and overlayfs.

mod applied;
mod beliefs;
mod garbage;
mod gone;
mod limits;
mod local;
mod remote;
#[allow(dead_code)]
#[path = "../support/skip.rs"]
mod skip;
mod support;
mod users;
