//! Traces that machines share: what a start has read anywhere in the cluster is fetched ahead everywhere.
//!
//! # Where a trace lies
//! In an OCI artifact (type [`ARTIFACT_TYPE`], empty config) whose blobs (type [`TRACE_TYPE`]) are traces as [`crate::layer::trace`] writes them, each
//! with the digest of its image's manifest, that of its entry point, and, if signed, its signature in annotations. It lies in the cluster's index
//! repository, one artifact per image, under the tag `sha256-<hex of the manifest>.trace`; without such a repository beside the image, as a
//! referrer of its manifest.
//!
//! # Whom it may hurt
//! A trace only has bytes fetched that belong to the image. Who may have a node do that is decided as it is for indexes
//! ([`super::super::shared::trust`]): nobody is asked where no answer could be believed, and what is found is believed because of where it lies or who
//! has signed it. Its repository is that of the pull, whatever it says itself. Searching has a short deadline, and whatever goes
//! wrong, the image starts without it.
//!
//! # Who publishes
//! With `index.publish`, whoever was first to record a start of an image, in the background, unless one of the same entry point is there already; and
//! `lazuli trace push`, for the daemon that it asks.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::ShareConfig;
use crate::catalog::Catalog;
use crate::catalog::shared::publish::Target;
use crate::catalog::shared::trust::{IndexError, Policy, SigningKey};
use crate::catalog::shared::{SIGNATURE_ANNOTATION, artifacts_about, name_of};
use crate::layer::Digest;
use crate::layer::trace::{MAX_LEN, Trace};
use crate::registry::RegistryError;
use crate::registry::artifact::{Artifact, Descriptor};
use crate::store::{ENTRIES_MAX, LayerSource, StoreError};
use crate::sync::blocking;

/// Type of the artifacts.
pub const ARTIFACT_TYPE: &str = "application/vnd.lazuli.trace.v1+json";
/// Media type of a trace.
pub const TRACE_TYPE: &str = "application/vnd.lazuli.trace.v1";
/// Annotation of a trace: the digest of the image's manifest.
const IMAGE_ANNOTATION: &str = "dev.lazuli.image.digest";
/// Annotation of a trace: the digest of its entry point.
const ENTRY_ANNOTATION: &str = "dev.lazuli.entry.digest";
/// Repositories of an image that are looked in.
const PLACES_MAX: usize = 2;
/// Artifacts of one image that are opened.
const ARTIFACTS_MAX: usize = 4;
/// Starts that a trace of others counts for at most, when it is chosen among several: what starts here counts more soon.
const STARTS_MAX: u32 = 3;

/// Why traces are not published.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// There are none.
    #[error("nothing is known of starts of {what}")]
    Nothing {
        /// Of what.
        what: String,
    },
    /// The image came from no registry, and there is no index repository.
    #[error("{repository:?} is no repository of a registry")]
    NoPlace {
        /// What was named.
        repository: String,
    },
    /// The key cannot be used.
    #[error(transparent)]
    Key(#[from] IndexError),
    /// The database cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The registry refuses.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

/// A trace that is on offer.
struct Offer {
    place: LayerSource,
    blob: Descriptor,
}

impl Offer {
    fn is_believed(&self, policy: &Policy, manifest: &Digest) -> bool {
        let signature = self.blob.annotations.get(SIGNATURE_ANNOTATION);
        policy.judges_trace(&self.place, manifest, &self.blob.digest, signature.map(String::as_str))
    }
}

/// The tag of an image in an index repository.
fn tag_of(manifest: &Digest) -> String {
    format!("sha256-{}.trace", manifest.hex())
}

/// The traces of an image in an artifact.
fn offers(place: &LayerSource, manifest: &Digest, artifact: &Artifact) -> Vec<Offer> {
    if artifact.artifact_type != ARTIFACT_TYPE {
        return Vec::new();
    }
    let text = manifest.to_string();
    let of_image = artifact
        .layers
        .iter()
        .filter(|blob| blob.media_type == TRACE_TYPE && blob.annotations.get(IMAGE_ANNOTATION) == Some(&text));
    of_image
        .take(ENTRIES_MAX)
        .map(|blob| Offer {
            place: place.clone(),
            blob: Descriptor {
                media_type: blob.media_type.clone(),
                digest: blob.digest,
                size: blob.size,
                annotations: blob.annotations.clone(),
            },
        })
        .collect()
}

/// A repository by the name that it has in traces.
fn place_of(repository: &str) -> Option<LayerSource> {
    let (host, repository) = repository.split_once('/')?;
    Some(LayerSource {
        host: host.to_owned(),
        repository: repository.to_owned(),
    })
}

impl Catalog {
    /// Traces of an image that others have published and that are believed, as those of `repository`.
    pub(super) async fn shared_traces(
        self: &Arc<Self>,
        places: &[LayerSource],
        manifest: Digest,
        repository: &str,
    ) -> Vec<Trace> {
        let Some(policy) = self.loader.policy().filter(|_| self.traces.share.enabled) else {
            return Vec::new();
        };
        let search = async {
            let mut offers = Vec::new();
            if let Some(place) = policy.repository() {
                offers.extend(self.offered_in(place, &manifest).await?);
            }
            for place in places.iter().take(PLACES_MAX).filter(|place| policy.may_trust(place)) {
                offers.extend(self.offered_beside(place, &manifest).await?);
            }
            let mut traces: Vec<Trace> = Vec::new();
            for offer in offers {
                if !offer.is_believed(policy, &manifest) {
                    tracing::warn!(%manifest, from = name_of(&offer.place), "a shared trace is not believed: no configured key has signed it");
                    continue;
                }
                let source = self.images.repositories().at(&offer.place);
                let bytes = source
                    .read_small(offer.blob.digest, offer.blob.size, MAX_LEN as u64)
                    .await?;
                match blocking(move || Trace::decode(&bytes)).await {
                    Ok(trace) if trace.manifest == manifest => {
                        if traces.len() < ENTRIES_MAX && !traces.iter().any(|other| other.entry.id == trace.entry.id) {
                            traces.push(Trace {
                                repository: repository.to_owned(),
                                starts: trace.starts.min(STARTS_MAX),
                                recorded: super::now(),
                                ..trace
                            });
                        }
                    }
                    Ok(_) => {
                        tracing::warn!(%manifest, from = name_of(&offer.place), "a shared trace is of another image")
                    }
                    Err(error) => {
                        tracing::warn!(%manifest, from = name_of(&offer.place), %error, "a shared trace cannot be used")
                    }
                }
            }
            Ok::<_, RegistryError>(traces)
        };
        match tokio::time::timeout(self.traces.share.deadline, search).await {
            Ok(Ok(traces)) => traces,
            Ok(Err(error)) => {
                tracing::warn!(%manifest, %error, "cannot be searched for a shared trace");
                Vec::new()
            }
            Err(_) => {
                tracing::warn!(%manifest, "a shared trace was not found in time");
                Vec::new()
            }
        }
    }

    /// What an index repository has of an image.
    async fn offered_in(&self, place: &LayerSource, manifest: &Digest) -> Result<Vec<Offer>, RegistryError> {
        let source = self.images.repositories().at(place);
        match source.manifest(&tag_of(manifest)).await {
            Ok(found) => Ok(offers(place, manifest, &Artifact::parse(&found.bytes)?)),
            Err(RegistryError::NotFound { .. }) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// What lies beside an image.
    async fn offered_beside(&self, place: &LayerSource, manifest: &Digest) -> Result<Vec<Offer>, RegistryError> {
        let source = self.images.repositories().at(place);
        let listed = source.referrers(*manifest, ARTIFACT_TYPE).await?;
        let listed = listed.iter().map(|entry| entry.digest).take(ARTIFACTS_MAX);
        let artifacts = artifacts_about(source.as_ref(), manifest, listed).await?;
        let offered = artifacts
            .iter()
            .flat_map(|(_, artifact)| offers(place, manifest, artifact));
        Ok(offered.collect())
    }

    /// Publishes what is known of a repository, or of one image of it, where indexes are published; how many traces that were.
    ///
    /// # Errors
    /// [`PushError`]; what was published before stays.
    pub async fn push_traces(self: &Arc<Self>, repository: &str, manifest: Option<Digest>) -> Result<usize, PushError> {
        let (catalog, name) = (Arc::clone(self), repository.to_owned());
        let listed = blocking(move || {
            let mut images: BTreeSet<Digest> = BTreeSet::new();
            let listed = catalog.store.each_trace(Some(&name), |trace| {
                if manifest.is_none_or(|manifest| manifest == trace.manifest) && !trace.wishes.is_empty() {
                    images.insert(trace.manifest);
                }
            });
            listed.map(|()| images)
        });
        let images = listed.await?;
        if images.is_empty() {
            let of = manifest.map(|manifest| format!("@{manifest}")).unwrap_or_default();
            let what = format!("{repository}{of}");
            return Err(PushError::Nothing { what });
        }
        let file = self.traces.share.signing_key.clone();
        let key = blocking(move || file.as_deref().map(SigningKey::load).transpose()).await?;
        let mut pushed = 0;
        for manifest in images {
            let (catalog, name) = (Arc::clone(self), repository.to_owned());
            // Those of one image at a time: each may take megabytes.
            let known = blocking(move || {
                let mut traces: Vec<Trace> = Vec::new();
                let known = catalog.store.each_trace(Some(&name), |trace| {
                    if trace.manifest == manifest && !trace.wishes.is_empty() && traces.len() < ENTRIES_MAX {
                        traces.push(trace);
                    }
                });
                known.map(|()| traces)
            });
            let traces = known.await?;
            pushed += self.push_image(repository, manifest, traces, key.as_ref()).await?;
        }
        Ok(pushed)
    }

    /// Publishes what is known of one image.
    async fn push_image(
        &self,
        repository: &str,
        manifest: Digest,
        traces: Vec<Trace>,
        key: Option<&SigningKey>,
    ) -> Result<usize, PushError> {
        let index = self.loader.policy().and_then(|policy| policy.repository());
        let target = match (index, place_of(repository)) {
            (Some(place), _) => Target::Repository(place.clone()),
            (None, Some(place)) => Target::image(&self.registry, place, &manifest).await?,
            (None, None) => {
                let repository = repository.to_owned();
                return Err(PushError::NoPlace { repository });
            }
        };
        let place = target.place();
        let pusher = self.registry.pusher(&place.host, &place.repository);
        let mut blobs = Vec::with_capacity(traces.len());
        for trace in &traces {
            let bytes = trace.encode();
            let size = bytes.len() as u64;
            let digest = pusher.put_blob(bytes.into()).await?;
            let mut annotations = BTreeMap::from([
                (IMAGE_ANNOTATION.to_owned(), manifest.to_string()),
                (ENTRY_ANNOTATION.to_owned(), trace.entry.id.to_string()),
            ]);
            if let Some(key) = key {
                annotations.insert(SIGNATURE_ANNOTATION.to_owned(), key.sign_trace(&manifest, &digest));
            }
            blobs.push(Descriptor {
                media_type: TRACE_TYPE.to_owned(),
                digest,
                size,
                annotations,
            });
        }
        let pushed = blobs.len();
        let named = BTreeMap::from([(IMAGE_ANNOTATION.to_owned(), manifest.to_string())]);
        match &target {
            Target::Repository(place) => {
                // Other entry points of the image stay as they are, as far as there is room.
                let there = match self.offered_in(place, &manifest).await {
                    Ok(there) => there,
                    // Something else has that name: it is replaced.
                    Err(RegistryError::Image { .. }) => Vec::new(),
                    Err(error) => return Err(error.into()),
                };
                let entry = |blob: &Descriptor| blob.annotations.get(ENTRY_ANNOTATION).cloned();
                let ours: Vec<_> = blobs.iter().map(entry).collect();
                let others = there.into_iter().map(|offer| offer.blob);
                blobs.extend(others.filter(|blob| !ours.contains(&entry(blob))));
                blobs.truncate(ENTRIES_MAX);
                let tag = tag_of(&manifest);
                pusher
                    .put_artifact(ARTIFACT_TYPE, &blobs, None, &named, Some(&tag))
                    .await?;
            }
            Target::Image { manifest: about, .. } => {
                pusher
                    .put_artifact(ARTIFACT_TYPE, &blobs, Some(about), &named, None)
                    .await?;
            }
        }
        tracing::info!(%manifest, to = name_of(place), traces = pushed, "what is known of its starts is shared");
        Ok(pushed)
    }

    /// Publishes what was recorded of an image for the first time, in the background, if that is wanted and nobody has done so yet.
    pub(super) fn share(self: &Arc<Self>, trace: &Trace) {
        let ShareConfig { publish, enabled, .. } = self.traces.share;
        if !publish || !enabled || trace.starts != 1 {
            return;
        }
        let (repository, manifest, entry) = (trace.repository.clone(), trace.manifest, trace.entry.id);
        let catalog = Arc::clone(self);
        self.runtime.spawn(async move {
            let places: Vec<LayerSource> = place_of(&repository).into_iter().collect();
            let there = catalog.shared_traces(&places, manifest, &repository).await;
            if there.iter().any(|trace| trace.entry.id == entry) {
                return;
            }
            if let Err(error) = catalog.push_traces(&repository, Some(manifest)).await {
                tracing::warn!(%manifest, %error, "what is known of its starts cannot be shared");
            }
        });
    }
}
