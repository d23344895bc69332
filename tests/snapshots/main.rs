//! The snapshots service as containerd drives it: over a unix socket, with real mounts. Needs root and overlayfs.

mod applied;
mod beliefs;
mod garbage;
mod local;
mod remote;
mod support;
mod users;
