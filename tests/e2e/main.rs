//! End-to-end tests: the `lazuli` program with real containerds, a real registry, real containers and the real kernel.
//!
//! They need root and Debian's packages containerd, runc, docker-registry, stargz-snapshotter (its `ctr-remote`), skopeo, nginx, openssl, busybox-static, tar, gcc;
//! whatever is missing is a failure that names the package. containerd 2.x is found through `LAZULI_CONTAINERD2`
//! (`tests/support/get-containerd2`); without it the tests run with 1.x only, and say so.
//!
//! Those that need containerd 2.4 find it through `LAZULI_CONTAINERD24`; nerdctl, buildkitd and buildctl are looked for in `PATH`.
//!
//! Environment: `LAZULI_E2E_SNAPSHOTTER=overlayfs` tests the harness instead of Lazuli, `LAZULI_E2E_KEEP=1` keeps directories,
//! `LAZULI_E2E_FACE=tree|image` forces the face of layers, `LAZULI_BIN` names another program than the one that cargo built, `TMPDIR` must be on a file system that can hold upper directories.

#![deny(unsafe_code)]

#[path = "../support/mod.rs"]
mod support;

mod apply;
mod bad_disk;
mod builders;
mod callers;
mod calls;
mod commands;
mod complete;
mod content;
mod counts;
mod cri;
mod dense;
mod disk;
mod faces;
mod faults;
mod filling;
mod formats;
mod harness;
mod lend;
mod many;
mod messages;
mod newest;
mod node;
mod posix;
mod pull;
mod refused;
mod registries;
mod restart;
mod secrets;
mod shared;
mod slow_disk;
mod soak;
mod soci;
mod stage;
mod takeover;
mod tenants;
mod trace;
mod trees;
mod users;
mod variants;
mod waits;
mod walk;
