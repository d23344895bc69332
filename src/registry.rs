//! Where blobs come from: OCI distribution registries, and OCI-layout directories.
//!
//! This room moves bytes: it finds the hosts of a repository (containerd's hosts.toml), authenticates, asks for ranges, follows
//! and remembers redirects, resumes, retries and changes mirrors. It never interprets layers and verifies no layer bytes: what it
//! hands out is untrusted until `layer` and `cache` have checked its digest. (Manifests and configs, which it parses, it does
//! verify.)
//!
//! ```text
//! reference   "host:port/repo:tag@digest" -> Reference
//! image       Reference + Source -> manifest, config, layers, chain ids of this platform
//! artifact    manifests that are about another manifest, and how they are found
//! client      Registry -> Source of one repository -> Blob        (HTTP); Pusher writes
//!   hosts       hosts.toml -> endpoints in order, one connection pool per TLS identity
//!   auth        challenges, tokens, credentials
//!   attempts    which host next, after how long, and when to give up
//!   health      which hosts fail or say nothing, and are asked last
//!   location    redirect targets that are still good
//! layout      directory -> Source -> Blob                          (OCI layout)
//! json        documents, read as Go reads them
//! ```

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;

use crate::layer::Digest;
use crate::metrics::Metrics;

pub mod artifact;
pub mod attempts;
pub mod auth;
pub mod client;
pub mod error;
pub mod health;
pub mod hosts;
pub mod image;
mod json;
pub mod layout;
pub mod location;
pub mod peers;
pub mod range;
pub mod reference;

pub use artifact::Referrer;
pub use client::{Pusher, Registry};
pub use error::RegistryError;
pub(crate) use hosts::transport::chain as causes;
pub use image::{Image, ImageConfig, LayerDescriptor, Manifest, Platform};
pub use layout::OciLayout;
pub use reference::Reference;

/// A body that arrives in pieces. An `Err` ends it; the source has then already resumed and retried as often as it may.
pub type Body = BoxStream<'static, Result<Bytes, RegistryError>>;

/// Largest manifest or index that is read, in bytes: containerd's own limit.
pub const MAX_MANIFEST: u64 = 8 << 20;

/// One blob at one source: a handle that can be asked for its bytes, for as long as a layer lives.
///
/// An implementation retries, resumes, re-authenticates and changes hosts by itself; an error means that the attempts are used up.
pub trait Blob: Send + Sync {
    /// Bytes `range` of the blob, in order, exactly `range.end - range.start` of them unless the body ends with an error, or they are not the
    /// blob's: then they may be fewer.
    /// `0..size` is asked for as a whole (no Range header).
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>>;

    /// As [`Blob::read`], for who can do with all of the blob: where hosts have no ranges, what comes before the range is not downloaded.
    ///
    /// # Errors
    /// [`RegistryError::NoRanges`], also in the middle of the body: read `0..size` then, soon, which goes on with what has begun to arrive.
    fn read_part(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        self.read(range)
    }

    /// As [`Blob::read_part`], over another connection than what is read of it at the same time, for who reads several parts side by side: what
    /// holds back one connection does not hold back the others.
    ///
    /// # Errors
    /// As [`Blob::read_part`].
    fn read_beside(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        self.read_part(range)
    }

    /// Size of the blob in bytes, as its descriptor states.
    fn size(&self) -> u64;

    /// Name for logs and errors: `registry.example/repo@sha256:...`.
    fn describe(&self) -> String;

    /// What was read last did not have its digest: ask another host next, if there is one.
    fn distrust(&self) {}

    /// What was read last had its digest: whoever sent it can be relied on.
    fn verified(&self) {}

    /// How often a registry that it may be had from, by the name in its [origin](Blob::origin), said that it is asked too much (429, 503), since any
    /// beginning; `None` if it is not had from there. Whoever reads waits as long as the host asks for; this is for who decides how much is asked at once.
    fn refusals(&self, _host: &str) -> Option<u64> {
        None
    }

    /// Whose places it takes when it is read.
    fn origin(&self) -> Origin;
}

/// Where a blob comes from, as far as sharing a source with others is concerned: a host that may be slow, and a repository on it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Origin {
    /// The registry, as a reference names it.
    pub host: Arc<str>,
    /// The repository there.
    pub repository: Arc<str>,
}

impl Origin {
    /// An origin by its names.
    pub fn new(host: &str, repository: &str) -> Self {
        Origin {
            host: host.into(),
            repository: repository.into(),
        }
    }
}

/// One repository: manifests and blobs by name and digest.
pub trait Source: Send + Sync {
    /// The manifest or index named by `reference`, a tag or a digest. Its bytes are verified if a digest was asked for.
    ///
    /// # Errors
    /// [`RegistryError`], when the attempts are used up or waiting does not help.
    fn manifest<'a>(&'a self, reference: &'a str) -> BoxFuture<'a, Result<ManifestBytes, RegistryError>>;

    /// A handle on the blob `digest` of `size` bytes. No I/O; whether the blob exists shows when it is read.
    fn blob(&self, digest: Digest, size: u64) -> Arc<dyn Blob>;

    /// The whole of a small blob, verified: an image config for instance.
    ///
    /// # Errors
    /// [`RegistryError`]; [`RegistryError::Image`] if `size` is over `limit` (both in bytes).
    fn read_small(&self, digest: Digest, size: u64, limit: u64) -> BoxFuture<'_, Result<Bytes, RegistryError>>;

    /// Artifacts that say they are about the manifest `subject`, through the referrers API, or by its tag where that is missing; of
    /// the type `artifact_type`, or of none that the list tells. Anybody who may write there can have added to them.
    ///
    /// # Errors
    /// [`RegistryError`], when the attempts are used up or waiting does not help. None of them is no error.
    fn referrers<'a>(
        &'a self,
        subject: Digest,
        artifact_type: &'a str,
    ) -> BoxFuture<'a, Result<Vec<Referrer>, RegistryError>> {
        let _ = (subject, artifact_type);
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    /// The tags there are, as many as are read of such a list.
    ///
    /// # Errors
    /// As [`Source::referrers`].
    fn tags(&self) -> BoxFuture<'_, Result<Vec<String>, RegistryError>> {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    /// Name for logs and errors: `registry.example/repo`, or a path.
    fn describe(&self) -> String;

    /// What was asked of this source until now.
    fn stats(&self) -> SourceStats;
}

/// A manifest or index as it came, and what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestBytes {
    /// Media type: what the answer says, or what the document says of itself, without parameters.
    pub media_type: String,
    /// Digest of `bytes`.
    pub digest: Digest,
    /// The document, exactly as served.
    pub bytes: Bytes,
}

/// Counters of one [`Source`], for `lazuli status`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SourceStats {
    /// HTTP requests sent (redirects and repetitions included, tokens not: several sources may share one), or files read.
    pub requests: u64,
    /// Bytes of answers that were received.
    pub bytes: u64,
    /// Some host answers ranged requests with the whole blob.
    pub ignores_ranges: bool,
}

/// Locks a mutex whose data stays valid even if a holder panicked.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts a request in the metrics, by the class of its answer.
fn count_request(metrics: &Metrics, status: Option<http::StatusCode>) {
    let class = match status.map(|status| status.as_u16() / 100) {
        Some(1) => "1xx",
        Some(2) => "2xx",
        Some(3) => "3xx",
        Some(4) => "4xx",
        Some(_) => "5xx",
        None => "error",
    };
    metrics.registry_requests_total.with_label_values(&[class]).inc();
}
