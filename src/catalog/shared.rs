//! Indexes that machines share: a layer that was indexed anywhere in the cluster is lazy from its next pull on, everywhere.
//!
//! # Where an index lies
//! It is an OCI artifact (type [`ARTIFACT_TYPE`], empty config) whose blobs (type [`INDEX_TYPE`]) are portable indexes
//! ([`form`]), each with the digest of its layer in the annotation [`LAYER_ANNOTATION`] and, if signed, its signature in
//! [`SIGNATURE_ANNOTATION`]. It lies
//! - in the cluster's index repository, one artifact per layer, under the tag `sha256-<hex of the layer>.lazuli`; or
//! - beside an image, as a referrer of its manifest, with one blob or several. An artifact for one layer alone also names that layer
//!   in its own annotations, so that lists tell.
//!
//! An image may also name the index of a layer in its manifest: annotations [`NAMED_DIGEST`] and [`NAMED_SIZE`] of the layer's descriptor.
//!
//! # Whom it may hurt
//! What is found is believed only as [`trust`] says, is bounded in every dimension, and is checked like any index that comes from
//! outside; every chunk is verified against it. Searching has a short deadline of its own; whatever goes wrong, the layer is streamed.
//! Publishing ([`publish`]) runs in the background. [`check`] looks at a layer again when all of it is here.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, join_all};

use super::belief;
use super::loader::LayerSpec;
use super::memory;
use super::sources::Repositories;
use crate::config::IndexConfig;
use crate::layer::{Digest, LayerError, portable};
use crate::metrics::Metrics;
use crate::registry::artifact::Artifact;
use crate::registry::image::LayerDescriptor;
use crate::registry::{Referrer, RegistryError, Source};
use crate::store::LayerSource;
use crate::sync::{Budget, Share, SingleFlight};

pub mod check;
pub mod form;
pub mod publish;
pub mod trust;

use form::Portable;
use trust::{IndexError, Policy, Trust};

/// Type of the artifacts.
pub const ARTIFACT_TYPE: &str = "application/vnd.lazuli.index.v1+json";
/// Media type of a portable index.
pub const INDEX_TYPE: &str = "application/vnd.lazuli.layer-index.v1";
/// Annotation of a portable index: the digest of its layer.
pub const LAYER_ANNOTATION: &str = "dev.lazuli.layer.digest";
/// Annotation of a portable index: its signature.
pub const SIGNATURE_ANNOTATION: &str = "dev.lazuli.index.signature";
/// Annotation of a layer in an image's manifest: the digest of its portable index, which lies in the same repository.
pub const NAMED_DIGEST: &str = "dev.lazuli.index.digest";
/// Annotation of a layer in an image's manifest: the bytes of its portable index.
pub const NAMED_SIZE: &str = "dev.lazuli.index.size";

/// Layers whose blobs are smaller than this (bytes) are streamed: one request brings all of it.
pub const WORTH_FROM: u64 = 256 << 10;
/// Largest portable index that is fetched, in bytes. That of a layer of 10 GiB has about a hundred MiB.
pub const MAX_INDEX: u64 = 128 << 20;
/// An index that is larger than this part of its blob saves nothing over streaming.
const MAX_SHARE: u64 = 2;
/// Longest download of an index that was found in time: it is a hundredth of its layer, which would be streamed otherwise.
const FETCH_DEADLINE: Duration = Duration::from_secs(60);
/// Artifacts of one image that are opened for one layer.
const MAX_ARTIFACTS: usize = 16;
/// Indexes of one layer that are tried.
const MAX_TRIES: usize = 3;
/// Repositories of an image that are looked in.
const MAX_PLACES: usize = 2;
/// How long a place that did not answer is not asked again: every layer of every image would wait for it.
const QUIET: Duration = Duration::from_secs(30);
/// Places that are remembered as silent.
const MAX_QUIET: usize = 256;

/// Where a layer is pulled from.
#[derive(Debug, Clone, Default)]
pub struct Origin {
    /// Repositories that have its blob.
    pub sources: Vec<LayerSource>,
    /// Digest of the image's manifest, if known.
    pub manifest: Option<Digest>,
}

/// An index that is on offer.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Repository it lies in.
    pub place: LayerSource,
    /// Digest of its portable form.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Its signature, not verified.
    pub signature: Option<String>,
    /// The layer it is said to be of.
    pub layer: Digest,
    /// Digest of the artifact's manifest; `None` if the image's manifest names the index itself.
    pub artifact: Option<Digest>,
    /// The manifest that the artifact is about.
    pub subject: Option<Digest>,
}

/// An index that was found, believed and fetched.
pub struct Found {
    /// The index.
    pub portable: Portable,
    /// Which one it is.
    pub candidate: Candidate,
    /// Why it is believed.
    pub trust: Trust,
    /// Memory for it until it is in the cache.
    pub share: Share,
}

/// Finds shared indexes.
pub struct SharedIndexes {
    repositories: Repositories,
    policy: Policy,
    enabled: bool,
    deadline: Duration,
    metrics: Arc<Metrics>,
    /// Lists of artifacts that are being fetched: the layers of an image are loaded all at once.
    lists: Arc<SingleFlight<(LayerSource, Digest), Listed>>,
    quiet: Mutex<HashMap<LayerSource, Instant>>,
    /// What indexes are downloaded to and unpacked in.
    memory: Arc<Budget>,
}

type Listed = Result<Arc<Vec<Referrer>>, RegistryError>;

/// Why no index came of a search. The words are those of the metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Miss {
    None,
    Untrusted,
    Failed,
    Damaged,
}

impl Miss {
    fn word(self) -> &'static str {
        match self {
            Miss::None => "none",
            Miss::Untrusted => "untrusted",
            Miss::Failed => "failed",
            Miss::Damaged => "damaged",
        }
    }
}

/// The tag of a layer in an index repository.
pub fn tag_of(layer: &Digest) -> String {
    format!("sha256-{}.lazuli", layer.hex())
}

/// The layer that a tag of an index repository is of.
pub fn layer_of_tag(tag: &str) -> Option<Digest> {
    Digest::from_hex(tag.strip_prefix("sha256-")?.strip_suffix(".lazuli")?)
}

/// `registry.example/repository`.
pub fn name_of(place: &LayerSource) -> String {
    format!("{}/{}", place.host, place.repository)
}

impl Found {
    /// The layer's id with it.
    pub fn id(&self) -> Digest {
        belief::Kind::Portable.id(&self.candidate.layer, &self.candidate.digest)
    }
}

impl SharedIndexes {
    /// A finder as `config` wants it. Reads the files of keys.
    ///
    /// # Errors
    /// [`IndexError`] names what cannot be used.
    pub fn new(
        config: &IndexConfig,
        repositories: impl Into<Repositories>,
        memory: Arc<Budget>,
        metrics: Arc<Metrics>,
    ) -> Result<Arc<Self>, IndexError> {
        Ok(Arc::new(SharedIndexes {
            repositories: repositories.into(),
            policy: Policy::new(config)?,
            enabled: config.enabled,
            deadline: config.lookup_deadline,
            metrics,
            lists: SingleFlight::new(),
            quiet: Mutex::default(),
            memory,
        }))
    }

    /// The layer's id with the index that the image's manifest names for it.
    pub fn vouched(&self, spec: &LayerSpec, origin: &Origin) -> Option<Digest> {
        let named = named(spec, origin).filter(|_| self.looks_for(spec))?;
        Some(belief::Kind::Portable.id(&spec.digest, &named.digest))
    }

    /// Whether an index of the layer may be found beside the image, so that it depends on image and place.
    pub fn may_find(&self, spec: &LayerSpec, origin: &Origin) -> bool {
        let believed = |place: &LayerSource| self.policy.may_trust(place);
        self.looks_for(spec) && origin.manifest.is_some() && origin.sources.iter().any(believed)
    }

    fn looks_for(&self, spec: &LayerSpec) -> bool {
        self.enabled && spec.size >= WORTH_FROM
    }

    /// Whose indexes are believed.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// An index of the layer that can be believed; `None` if there is none, or none in time. It never fails: the log and the metric
    /// tell what went wrong.
    pub async fn find(&self, spec: &LayerSpec, origin: &Origin) -> Option<Found> {
        if !self.looks_for(spec) {
            return None;
        }
        let asks = self.asks(spec, origin);
        let named = named(spec, origin);
        if asks.is_empty() && named.is_none() {
            return None;
        }
        let result = match self.search(spec, asks, named).await {
            Ok(found) => {
                tracing::info!(
                    layer = %spec.digest, from = name_of(&found.candidate.place), trust = %found.trust, bytes = found.candidate.size,
                    "has a shared index"
                );
                Ok(found)
            }
            Err(miss) => Err(miss),
        };
        let word = result.as_ref().map_or_else(|miss| miss.word(), |_| "found");
        self.metrics.index_lookups_total.with_label_values(&[word]).inc();
        result.ok()
    }

    /// The places to ask; none where no answer could be believed.
    fn asks<'a>(&'a self, spec: &'a LayerSpec, origin: &'a Origin) -> Vec<Ask<'a>> {
        let mut asks = Vec::new();
        if let Some(place) = self.policy.repository().filter(|place| !self.is_quiet(place)) {
            let answer = self.in_repository(place, &spec.digest).boxed();
            asks.push(Ask { place, answer });
        }
        if let Some(manifest) = origin.manifest {
            for place in origin.sources.iter().take(MAX_PLACES) {
                if self.policy.may_trust(place) && !self.is_quiet(place) {
                    let answer = self.beside_image(place, manifest, &spec.digest).boxed();
                    asks.push(Ask { place, answer });
                }
            }
        }
        asks
    }

    async fn search(&self, spec: &LayerSpec, asks: Vec<Ask<'_>>, named: Option<Candidate>) -> Result<Found, Miss> {
        let mut miss = Miss::None;
        let mut candidates: Vec<(Candidate, bool)> = named.into_iter().map(|candidate| (candidate, true)).collect();
        let answers = asks.into_iter().map(|Ask { place, answer }| async move {
            let answer = tokio::time::timeout(self.deadline, answer).await;
            (place, answer)
        });
        for (place, answer) in join_all(answers).await {
            match answer {
                Ok(Ok(found)) => candidates.extend(found.into_iter().map(|candidate| (candidate, false))),
                Ok(Err(error)) => {
                    tracing::warn!(layer = %spec.digest, place = name_of(place), %error, "cannot be searched for a shared index");
                    if error.retry_helps() {
                        self.silence(place);
                    }
                    miss = miss.max(Miss::Failed);
                }
                Err(_) => {
                    let seconds = self.deadline.as_secs();
                    tracing::warn!(layer = %spec.digest, place = name_of(place), seconds, "did not tell of shared indexes in time");
                    self.silence(place);
                    miss = miss.max(Miss::Failed);
                }
            }
        }
        let mut tries = 0;
        for (candidate, named) in candidates {
            let signature = candidate.signature.as_deref();
            let trust = self
                .policy
                .judge(&candidate.place, &spec.digest, &candidate.digest, signature, named);
            let Some(trust) = trust else {
                tracing::warn!(
                    layer = %spec.digest, from = name_of(&candidate.place), index = %candidate.digest, signed = signature.is_some(),
                    "a shared index is not believed: no configured key has signed it"
                );
                miss = miss.max(Miss::Untrusted);
                continue;
            };
            if tries == MAX_TRIES {
                break;
            }
            tries += 1;
            match self.fetch(spec, &candidate).await {
                Ok((portable, share)) => {
                    return Ok(Found {
                        portable,
                        share,
                        candidate,
                        trust,
                    });
                }
                Err((problem, kind)) => {
                    tracing::warn!(
                        layer = %spec.digest, from = name_of(&candidate.place), index = %candidate.digest, problem,
                        "a shared index cannot be used"
                    );
                    miss = miss.max(kind);
                }
            }
        }
        Err(miss)
    }

    /// Downloads and checks an index.
    async fn fetch(&self, spec: &LayerSpec, candidate: &Candidate) -> Result<(Portable, Share), (String, Miss)> {
        let limit = MAX_INDEX.min(spec.size / MAX_SHARE);
        if candidate.size > limit {
            let problem = format!(
                "it has {} bytes, and more than {limit} are not worth it",
                candidate.size
            );
            return Err((problem, Miss::Failed));
        }
        let fetch = || async {
            match tokio::time::timeout(FETCH_DEADLINE, self.read(candidate)).await {
                Ok(bytes) => bytes.map_err(|error| (error.to_string(), Miss::Failed)),
                Err(_) => {
                    let problem = format!("it did not arrive within {} s", FETCH_DEADLINE.as_secs());
                    Err((problem, Miss::Failed))
                }
            }
        };
        let need = |bytes: &[u8]| match portable::inspect(bytes) {
            Ok(summary) => Ok(summary.memory()),
            Err(error) => Err((error.to_string(), Miss::Damaged)),
        };
        let (bytes, share) = memory::download(&self.memory, candidate.size, fetch, need).await?;
        let (layer, size) = (spec.digest, spec.size);
        let unpacked = memory::read(bytes, share, move |bytes, beside| {
            let portable = Portable::unpack_within(&layer, size, bytes, beside)?;
            // As records, and as the bytes that are stored.
            let memory = 2 * portable.memory();
            Ok::<_, LayerError>((portable, memory))
        });
        match unpacked.await {
            Some(Ok(unpacked)) => Ok(unpacked),
            Some(Err(error)) => Err((error.to_string(), Miss::Damaged)),
            None => Err(("reading it was interrupted".to_owned(), Miss::Damaged)),
        }
    }

    /// The bytes of an index, with the digest that it is offered under.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub async fn read(&self, candidate: &Candidate) -> Result<Bytes, RegistryError> {
        let place = &candidate.place;
        let source = self.repositories.at(place);
        source.read_small(candidate.digest, candidate.size, MAX_INDEX).await
    }

    /// Indexes of `layer` in an index repository.
    ///
    /// # Errors
    /// [`RegistryError`]; that there is none is no error.
    pub async fn in_repository(&self, place: &LayerSource, layer: &Digest) -> Result<Vec<Candidate>, RegistryError> {
        let source = self.repositories.at(place);
        match source.manifest(&tag_of(layer)).await {
            Ok(manifest) => {
                let artifact = Artifact::parse(&manifest.bytes)?;
                Ok(candidates(place, manifest.digest, &artifact, Some(layer)))
            }
            Err(RegistryError::NotFound { .. }) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Indexes of `layer` beside an image.
    ///
    /// # Errors
    /// [`RegistryError`]; that there is none is no error.
    pub async fn beside_image(
        &self,
        place: &LayerSource,
        manifest: Digest,
        layer: &Digest,
    ) -> Result<Vec<Candidate>, RegistryError> {
        let listed = self.list(place, manifest).await?;
        let text = layer.to_string();
        let worth = listed.iter().filter(|entry| {
            let of_other = |named: &String| *named != text;
            !entry.annotations.get(LAYER_ANNOTATION).is_some_and(of_other)
        });
        let source = self.repositories.at(place);
        let worth = worth.map(|entry| entry.digest).take(MAX_ARTIFACTS);
        let artifacts = artifacts_about(source.as_ref(), &manifest, worth).await?;
        let found = artifacts
            .iter()
            .flat_map(|(digest, artifact)| candidates(place, *digest, artifact, Some(layer)));
        Ok(found.collect())
    }

    /// Artifacts with indexes beside an image, listed once for all who ask at the same time.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub async fn list(&self, place: &LayerSource, manifest: Digest) -> Listed {
        let source = self.repositories.at(place);
        let job = async move {
            let listed = source.referrers(manifest, ARTIFACT_TYPE).await;
            listed.map(Arc::new)
        };
        let runtime = tokio::runtime::Handle::current();
        let listed = self.lists.run(&runtime, (place.clone(), manifest), job).await;
        listed.unwrap_or_else(|| {
            Err(RegistryError::Unreachable {
                host: place.host.clone(),
                what: "the search was interrupted".to_owned(),
            })
        })
    }

    fn is_quiet(&self, place: &LayerSource) -> bool {
        let quiet = self.quiet.lock().unwrap_or_else(PoisonError::into_inner);
        quiet.get(place).is_some_and(|until| *until > Instant::now())
    }

    fn silence(&self, place: &LayerSource) {
        let now = Instant::now();
        let mut quiet = self.quiet.lock().unwrap_or_else(PoisonError::into_inner);
        if quiet.len() >= MAX_QUIET {
            quiet.retain(|_, until| *until > now);
        }
        if quiet.len() < MAX_QUIET {
            quiet.insert(place.clone(), now + QUIET);
        }
    }
}

/// Those of the listed artifacts that are about an image, as they say themselves. What cannot be used is passed over.
///
/// # Errors
/// [`RegistryError`], where asking again may help.
pub(super) async fn artifacts_about(
    source: &dyn Source,
    manifest: &Digest,
    listed: impl Iterator<Item = Digest>,
) -> Result<Vec<(Digest, Artifact)>, RegistryError> {
    let mut found = Vec::new();
    for digest in listed {
        let artifact = match source.manifest(&digest.to_string()).await {
            Ok(artifact) => Artifact::parse(&artifact.bytes),
            // Deleted since it was listed, or never there: lists under tags are kept by clients.
            Err(RegistryError::NotFound { .. }) => continue,
            Err(error) => Err(error),
        };
        let is_about = |artifact: &Artifact| {
            artifact
                .subject
                .as_ref()
                .is_some_and(|subject| subject.digest == *manifest)
        };
        match artifact {
            Ok(artifact) if is_about(&artifact) => found.push((digest, artifact)),
            Ok(_) => tracing::debug!(artifact = %digest, "is not about the image it is listed for"),
            Err(error) if error.retry_helps() => return Err(error),
            Err(error) => tracing::debug!(artifact = %digest, %error, "is passed over"),
        }
    }
    Ok(found)
}

/// A place that is asked.
struct Ask<'a> {
    place: &'a LayerSource,
    answer: BoxFuture<'a, Result<Vec<Candidate>, RegistryError>>,
}

/// The index that the image's manifest names.
fn named(spec: &LayerSpec, origin: &Origin) -> Option<Candidate> {
    Some(Candidate {
        place: origin.sources.first()?.clone(),
        digest: spec.annotations.get(NAMED_DIGEST)?.parse().ok()?,
        size: spec.annotations.get(NAMED_SIZE)?.parse().ok()?,
        signature: None,
        layer: spec.digest,
        artifact: None,
        subject: None,
    })
}

/// The indexes in an artifact: those of `layer`, or all.
pub fn candidates(place: &LayerSource, digest: Digest, artifact: &Artifact, layer: Option<&Digest>) -> Vec<Candidate> {
    if artifact.artifact_type != ARTIFACT_TYPE {
        return Vec::new();
    }
    let candidate = |blob: &LayerDescriptor| {
        let of: Digest = blob.annotations.get(LAYER_ANNOTATION)?.parse().ok()?;
        let wanted = blob.media_type == INDEX_TYPE && layer.is_none_or(|layer| *layer == of);
        wanted.then(|| Candidate {
            place: place.clone(),
            digest: blob.digest,
            size: blob.size,
            signature: blob.annotations.get(SIGNATURE_ANNOTATION).cloned(),
            layer: of,
            artifact: Some(digest),
            subject: artifact.subject.as_ref().map(|subject| subject.digest),
        })
    };
    artifact.layers.iter().filter_map(candidate).collect()
}
