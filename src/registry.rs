//! Where blobs come from: OCI distribution registries, and OCI-layout directories.
//!
//! This room moves bytes: it finds the hosts of a repository (containerd's hosts.toml), authenticates, asks for ranges, follows
//! and remembers redirects, resumes, retries and changes mirrors. It never interprets layers and verifies no layer bytes: what it
//! hands out is untrusted until `layer` and `cache` have checked its digest. (Manifests and configs, which it parses, it does
//! verify.)

use std::ops::Range;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;

pub mod error;

pub use error::RegistryError;

/// A body that arrives in pieces. An `Err` ends it; the source has then already resumed and retried as often as it may.
pub type Body = BoxStream<'static, Result<Bytes, RegistryError>>;

/// One blob at one source: a handle that can be asked for its bytes, for as long as a layer lives.
///
/// An implementation retries, resumes, re-authenticates and changes hosts by itself; an error means that the attempts are used up.
pub trait Blob: Send + Sync {
    /// Bytes `range` of the blob, in order, exactly `range.end - range.start` of them unless the body ends with an error.
    /// `0..size` is asked for as a whole (no Range header).
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>>;

    /// Size of the blob in bytes, as its descriptor states.
    fn size(&self) -> u64;

    /// Name for logs and errors: `registry.example/repo@sha256:...`.
    fn describe(&self) -> String;
}
