//! Lazuli: a FUSE-backed lazy-pull remote snapshotter for containerd.
//!
//! The crate is a house of rooms, and a room may use only the rooms to its right:
//!
//! ```text
//! snapshots -> catalog -> {fs, store} -> fetch -> {cache, registry} -> layer -> sys
//! beside all: config, metrics, sync;  above all: cli, daemon (wiring), admin (HTTP)
//! ```
//!
//! `tests/architecture.rs` enforces that order. `docs/ARCHITECTURE.md` tells how a pull and a read travel through it.

#![deny(unsafe_code)]
// They panic where nobody reads: see cli/output.rs.
#![deny(clippy::print_stdout, clippy::print_stderr)]
#![warn(missing_docs)]

pub mod admin;
pub mod cache;
pub mod catalog;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod fetch;
pub mod fs;
pub mod layer;
pub mod metrics;
pub mod proto;
pub mod registry;
#[cfg(test)]
#[allow(dead_code)]
#[path = "../tests/support/skip.rs"]
mod skip;
pub mod snapshots;
pub mod store;
pub mod sync;
pub mod sys;
