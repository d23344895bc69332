//! The distribution protocol's client: [`Registry`] for a daemon, a [`Source`] per repository.
//!
//! `exchange` sends one request to one endpoint, through authentication and redirects; `operation` repeats it over endpoints until
//! it succeeds or the attempts are used up; `blob` turns that into a body that resumes. What answers hold is told by [`super::range`] and
//! `encoding`, read by `answer`, and remembered of their hosts in `quirks`.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use futures::TryStreamExt;
use futures::future::BoxFuture;
use http::header;
use lru::LruCache;
use serde::Deserialize;

use super::attempts::Failure;
use super::auth::{Credentials, Gates};
use super::health::Health;
use super::hosts::HostTable;
use super::hosts::proxy::Proxies;
use super::hosts::wire::Response;
use super::location::Locations;
use super::{Blob, MAX_MANIFEST, ManifestBytes, Referrer, RegistryError, Source, SourceStats, json, lock};
use crate::config::RegistryConfig;
use crate::layer::Digest;
use crate::metrics::Metrics;

mod answer;
mod blob;
mod encoding;
mod exchange;
mod operation;
mod push;
mod quirks;
mod referrers;

use blob::RemoteBlob;
use encoding::Encodings;
use exchange::Ask;
use operation::Operation;
pub use push::Pusher;
use quirks::Quirks;

/// Repositories whose state is kept; the one unused longest is forgotten first (its handles go on working).
const MAX_REPOSITORIES: NonZeroUsize = NonZeroUsize::new(4096).unwrap();
/// Times that a small blob is read until its bytes are right: two mirrors with a bad copy do not hide a registry with a good one.
const MAX_UNVERIFIED: u32 = 3;
/// What is understood in answer to a request for a manifest.
const ACCEPT_MANIFEST: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
                               application/vnd.docker.distribution.manifest.list.v2+json, \
                               application/vnd.docker.distribution.manifest.v2+json, */*;q=0.1";

/// All registries, as one daemon sees them: endpoints, credentials, tokens, connections.
pub struct Registry {
    shared: Arc<Shared>,
    repositories: Mutex<LruCache<(String, String), Arc<Repository>>>,
}

/// What all repositories share.
struct Shared {
    attempts: u32,
    hosts: HostTable,
    gates: Gates,
    health: Health,
    /// How often registries said that they are asked too much, by their names.
    refusals: Mutex<LruCache<String, Arc<AtomicU64>>>,
    metrics: Arc<Metrics>,
}

/// One repository of one registry: what is remembered of it.
struct Repository {
    shared: Arc<Shared>,
    host: String,
    name: String,
    locations: Locations,
    /// What its hosts do with ranges and encodings.
    quirks: Arc<Quirks>,
    requests: AtomicU64,
    bytes: AtomicU64,
    /// How often one of its registry's hosts said that it is asked too much, whatever repository was asked for.
    refusals: Arc<AtomicU64>,
}

/// The handle that callers hold.
struct RepositorySource(Arc<Repository>);

impl Registry {
    /// A client configured by `config`, counting in `metrics`. Nothing is asked or read yet.
    ///
    /// # Errors
    /// None at present: files are read when they are needed, so that a mistake in one concerns its registry only.
    pub fn new(config: &RegistryConfig, metrics: Arc<Metrics>) -> Result<Arc<Self>, RegistryError> {
        Self::through(Proxies::from_environment(), config, metrics)
    }

    /// The same, which asks hosts through `proxies`, not those of the environment.
    ///
    /// # Errors
    /// As [`Registry::new`].
    pub fn through(
        proxies: Proxies,
        config: &RegistryConfig,
        metrics: Arc<Metrics>,
    ) -> Result<Arc<Self>, RegistryError> {
        Ok(Arc::new(Registry {
            shared: Arc::new(Shared {
                attempts: config.attempts.max(1),
                hosts: HostTable::new(config, proxies),
                gates: Gates::new(Credentials::new(config), metrics.clone()),
                health: Health::default(),
                refusals: Mutex::new(LruCache::new(MAX_REPOSITORIES)),
                metrics,
            }),
            repositories: Mutex::new(LruCache::new(MAX_REPOSITORIES)),
        }))
    }

    /// The repository `repository` of the registry `host` (as a reference names it: `docker.io`, `host:port`). Cheap; all sources
    /// of one repository share their state.
    pub fn repository(&self, host: &str, repository: &str) -> Arc<dyn Source> {
        Arc::new(RepositorySource(self.state(host, repository)))
    }

    fn state(&self, host: &str, repository: &str) -> Arc<Repository> {
        let key = (host.to_owned(), repository.to_owned());
        lock(&self.repositories)
            .get_or_insert(key, || {
                Arc::new(Repository {
                    shared: self.shared.clone(),
                    host: host.to_owned(),
                    name: repository.to_owned(),
                    locations: Locations::default(),
                    quirks: Arc::default(),
                    requests: AtomicU64::new(0),
                    bytes: AtomicU64::new(0),
                    refusals: Arc::clone(
                        lock(&self.shared.refusals).get_or_insert_mut_ref(host, Arc::<AtomicU64>::default),
                    ),
                })
            })
            .clone()
    }

    /// The same repository, to write to. Cheap.
    pub fn pusher(&self, host: &str, repository: &str) -> Pusher {
        Pusher(self.state(host, repository))
    }

    /// What is wrong with the files that say how registries are to be asked, as far as they were read: each with its path and what is used
    /// instead, without secrets. Empty if all is well.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = self.shared.gates.problems();
        problems.extend(self.shared.hosts.problems());
        let shunned = self.shared.health.shunned(Instant::now());
        problems.extend(shunned.into_iter().map(|(host, left)| {
            format!(
                "{host} has failed again and again, and is asked last for another {} s",
                left.as_secs().max(1)
            )
        }));
        problems
    }

    /// Names with a port that `hostname` may stand for, best first; see [`HostTable::resolve_ports`]. Reads directory names.
    pub fn resolve_ports(&self, hostname: &str) -> Vec<String> {
        self.shared.hosts.resolve_ports(hostname)
    }
}

impl Source for RepositorySource {
    fn manifest<'a>(&'a self, reference: &'a str) -> BoxFuture<'a, Result<ManifestBytes, RegistryError>> {
        Box::pin(self.0.clone().manifest(reference))
    }

    fn blob(&self, digest: Digest, size: u64) -> Arc<dyn Blob> {
        Arc::new(RemoteBlob::new(self.0.clone(), digest, size))
    }

    fn read_small(&self, digest: Digest, size: u64, limit: u64) -> BoxFuture<'_, Result<Bytes, RegistryError>> {
        Box::pin(self.0.clone().read_small(digest, size, limit))
    }

    fn referrers<'a>(
        &'a self,
        subject: Digest,
        artifact_type: &'a str,
    ) -> BoxFuture<'a, Result<Vec<Referrer>, RegistryError>> {
        Box::pin(self.0.clone().referrers(subject, artifact_type))
    }

    fn tags(&self) -> BoxFuture<'_, Result<Vec<String>, RegistryError>> {
        Box::pin(self.0.clone().tags())
    }

    fn describe(&self) -> String {
        self.0.describe()
    }

    fn stats(&self) -> SourceStats {
        SourceStats {
            requests: self.0.requests.load(Ordering::Relaxed),
            bytes: self.0.bytes.load(Ordering::Relaxed),
            ignores_ranges: self.0.quirks.any_rangeless(Instant::now()),
        }
    }
}

impl Repository {
    fn describe(&self) -> String {
        format!("{}/{}", self.host, self.name)
    }

    async fn manifest(self: Arc<Self>, reference: &str) -> Result<ManifestBytes, RegistryError> {
        let wanted = match reference.contains(':') {
            true => Some(
                reference
                    .parse::<Digest>()
                    .map_err(|error| RegistryError::InvalidReference {
                        reference: reference.to_owned(),
                        what: error.to_string(),
                    })?,
            ),
            false => None,
        };
        let what = format!("manifest {reference} of {}", self.name);
        let ask = Ask {
            accept: Some(ACCEPT_MANIFEST),
            by_tag: wanted.is_none(),
            ..Ask::get("manifests", reference.to_owned(), what)
        };
        let mut operation = Operation::new(self, ask).await?;
        loop {
            let (place, answer) = operation.respond().await?;
            match read_manifest(&operation, place, answer, wanted).await {
                Ok(manifest) => {
                    operation.succeeded(place);
                    return Ok(manifest);
                }
                Err(failure) => operation.failed(place, failure),
            }
        }
    }

    async fn read_small(self: Arc<Self>, digest: Digest, size: u64, limit: u64) -> Result<Bytes, RegistryError> {
        if size > limit {
            return Err(RegistryError::Image {
                what: format!("{digest} of {}", self.describe()),
                problem: format!("it has {size} bytes, more than the {limit} that are read of such a blob"),
            });
        }
        let host = self.host.clone();
        let attempts = self.shared.attempts.min(MAX_UNVERIFIED);
        let blob = RemoteBlob::new(self, digest, size);
        let mut attempt = 0;
        loop {
            let body = blob.read(0..size).await?;
            let bytes = body
                .try_fold(BytesMut::new(), |mut all, piece| async move {
                    all.extend_from_slice(&piece);
                    Ok(all)
                })
                .await?
                .freeze();
            let actual = Digest::of(&bytes);
            if actual == digest {
                return Ok(bytes);
            }
            // Damaged on its way, or a bad copy at one of several hosts.
            attempt += 1;
            blob.distrust();
            if attempt >= attempts {
                let error = RegistryError::Protocol {
                    host,
                    what: format!("blob {digest}"),
                    problem: format!("the bytes have digest {actual}"),
                };
                tracing::warn!(%error, "giving up");
                return Err(error);
            }
        }
    }
}

/// The body of a manifest or another document.
async fn read_document(operation: &Operation, place: usize, answer: &mut Response) -> Result<Bytes, Failure> {
    let mut body = BytesMut::new();
    loop {
        match answer.chunk().await {
            Ok(Some(piece)) => {
                operation.received(piece.len());
                if (body.len() + piece.len()) as u64 > MAX_MANIFEST {
                    let problem = format!("the document has more than {MAX_MANIFEST} bytes");
                    return Err(Failure {
                        passing: false,
                        ..Failure::new(operation.protocol(place, problem), "protocol")
                    });
                }
                body.extend_from_slice(&piece);
            }
            Ok(None) => return Ok(undo(body.freeze(), answer.headers())),
            Err(cut) => return Err(operation.broken(place, &cut)),
        }
    }
}

/// A document without the encoding that its answer claims, if it really has that: JSON begins like no encoding does.
fn undo(body: Bytes, headers: &http::HeaderMap) -> Bytes {
    match Encodings::of(headers).filter(|_| first(&body) != Some(b'{')) {
        Some(claimed) => claimed.decode(&body, MAX_MANIFEST).map_or(body, Bytes::from),
        None => body,
    }
}

/// The first byte of a document that counts.
fn first(body: &[u8]) -> Option<u8> {
    body.iter().copied().find(|c| !c.is_ascii_whitespace())
}

/// The body of a manifest, checked.
async fn read_manifest(
    operation: &Operation,
    place: usize,
    mut answer: Response,
    wanted: Option<Digest>,
) -> Result<ManifestBytes, Failure> {
    let wrong = |problem: String| Failure::new(operation.protocol(place, problem), "protocol");
    let header = |name: &str| {
        let value = answer.headers().get(name)?.to_str().ok()?;
        Some(value.to_owned())
    };
    let stated_type = header(header::CONTENT_TYPE.as_str())
        .map(|value| value.split(';').next().unwrap_or_default().trim().to_owned())
        .filter(|value| value.starts_with("application/vnd."));
    let stated_digest = header("docker-content-digest").and_then(|value| value.parse::<Digest>().ok());
    let bytes = read_document(operation, place, &mut answer).await?;
    if first(&bytes) == Some(b'<') {
        let problem = "it is a page of HTML: a proxy or a login page answers in the registry's stead";
        return Err(wrong(problem.to_owned()));
    }
    let digest = Digest::of(&bytes);
    if let Some(expected) = wanted.or(stated_digest)
        && digest != expected
    {
        return Err(wrong(format!("the manifest has digest {digest}, expected {expected}")));
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Typed {
        #[serde(default, deserialize_with = "json::loose")]
        media_type: Option<String>,
    }
    let media_type = match stated_type {
        Some(media_type) => media_type,
        None => json::from_slice::<Typed>(&bytes)
            .ok()
            .and_then(|typed| typed.media_type)
            .unwrap_or_default(),
    };
    Ok(ManifestBytes {
        media_type,
        digest,
        bytes,
    })
}
