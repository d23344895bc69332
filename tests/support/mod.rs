//! What the end-to-end tests, the benches and the demo share: a sandbox for real programs, images made byte by byte, a registry,
//! two generations of containerd, and a comparison of whole trees.
//!
//! ```text
//! sandbox     a temporary root, the processes and mounts below it, and their end
//! containerd  containerd 1.6 of the system, or 2.x of a directory, with `ctr`
//! lazuli      the program under test
//! registry    Debian's docker-registry, and pushing to it
//! fault_registry  a registry that fails on demand
//! nginx       nginx before a registry, and certificates made with openssl
//! openssl     certificates and servers of the openssl command
//! tls_front   one port that speaks TLS and plain HTTP, each for another server
//! skip        what a test needs and a machine may lack: said, counted, and not believed
//! proxy       an HTTP proxy before the registry that counts, delays and limits
//! tar         tar headers with every field under control
//! image       layers, configs, manifests, OCI layouts, eStargz
//! lazy        eStargz and zstd:chunked layers made byte by byte
//! torture     layers as odd as containerd itself still unpacks
//! tree        two trees compared name by name and byte by byte
//! ```
//!
//! Everything blocks: a test reads as a list of steps. Nothing has a fixed name or port, so tests run side by side.

// Each user of this directory needs a part of it only.
#![allow(dead_code, unused_imports)]

pub mod containerd;
pub mod fault_registry;
pub mod image;
pub mod lazuli;
pub mod lazy;
pub mod nginx;
pub mod openssl;
pub mod proxy;
pub mod registry;
pub mod sandbox;
pub mod skip;
pub mod tar;
pub mod tls_front;
pub mod torture;
pub mod tree;
