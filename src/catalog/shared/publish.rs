//! Publishing indexes that were built here, in the background: nobody waits for it, and nothing that goes wrong with it is more
//! than a line in the log and a count.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::Semaphore;

use super::trust::{IndexError, Policy, SigningKey};
use super::{
    ARTIFACT_TYPE, INDEX_TYPE, LAYER_ANNOTATION, Origin, SIGNATURE_ANNOTATION, SharedIndexes, form, name_of, tag_of,
};
use crate::cache::CachedLayer;
use crate::config::IndexConfig;
use crate::layer::Digest;
use crate::metrics::Metrics;
use crate::registry::artifact::Descriptor;
use crate::registry::image::MANIFEST_TYPE;
use crate::registry::{Registry, RegistryError};
use crate::store::LayerSource;

/// Longest publication of one index.
const DEADLINE: Duration = Duration::from_secs(600);
/// When a publication that failed for a reason that may pass is tried again.
const AGAIN_AFTER: [Duration; 2] = [Duration::from_secs(60), Duration::from_secs(900)];
/// How long a repository that refused an index is offered none.
const REFUSED_FOR: Duration = Duration::from_secs(3600);
/// Repositories that are remembered as refusing.
const MAX_REFUSING: usize = 256;

/// Where indexes are put.
#[derive(Debug, Clone)]
pub enum Target {
    /// Into an index repository.
    Repository(LayerSource),
    /// Beside an image.
    Image {
        /// Repository of the image.
        place: LayerSource,
        /// Its manifest.
        manifest: Descriptor,
    },
}

impl Target {
    /// The repository.
    pub fn place(&self) -> &LayerSource {
        match self {
            Target::Repository(place) | Target::Image { place, .. } => place,
        }
    }

    /// An image in a repository as a target. Asks for its manifest.
    ///
    /// # Errors
    /// [`RegistryError`] if it is not there.
    pub async fn image(registry: &Registry, place: LayerSource, manifest: &Digest) -> Result<Self, RegistryError> {
        let source = registry.repository(&place.host, &place.repository);
        let document = source.manifest(&manifest.to_string()).await?;
        let media_type = match document.media_type.is_empty() {
            true => MANIFEST_TYPE.to_owned(),
            false => document.media_type,
        };
        Ok(Target::Image {
            place,
            manifest: Descriptor {
                media_type,
                digest: document.digest,
                size: document.bytes.len() as u64,
                annotations: BTreeMap::new(),
            },
        })
    }
}

/// Puts portable indexes, each with the layer it is of, where they can be found: one artifact per layer in an index repository, one for
/// all of them beside an image. The digests of the artifacts.
///
/// # Errors
/// [`RegistryError`].
pub async fn push(
    registry: &Registry,
    target: &Target,
    key: Option<&SigningKey>,
    indexes: &[(Digest, Bytes)],
) -> Result<Vec<Digest>, RegistryError> {
    let place = target.place();
    let pusher = registry.pusher(&place.host, &place.repository);
    let mut blobs = Vec::with_capacity(indexes.len());
    for (layer, bytes) in indexes {
        let digest = pusher.put_blob(bytes.clone()).await?;
        let mut annotations = BTreeMap::from([(LAYER_ANNOTATION.to_owned(), layer.to_string())]);
        if let Some(key) = key {
            annotations.insert(SIGNATURE_ANNOTATION.to_owned(), key.sign(layer, &digest));
        }
        blobs.push(Descriptor {
            media_type: INDEX_TYPE.to_owned(),
            digest,
            size: bytes.len() as u64,
            annotations,
        });
    }
    let named = |layer: &Digest| BTreeMap::from([(LAYER_ANNOTATION.to_owned(), layer.to_string())]);
    let mut artifacts = Vec::new();
    match target {
        Target::Repository(_) => {
            for (blob, (layer, _)) in blobs.iter().zip(indexes) {
                let blob = std::slice::from_ref(blob);
                let (tag, annotations) = (tag_of(layer), named(layer));
                let stored = pusher.put_artifact(ARTIFACT_TYPE, blob, None, &annotations, Some(&tag));
                artifacts.push(stored.await?);
            }
        }
        Target::Image { manifest, .. } => {
            let annotations = match indexes {
                [(layer, _)] => named(layer),
                _ => BTreeMap::new(),
            };
            let stored = pusher.put_artifact(ARTIFACT_TYPE, &blobs, Some(manifest), &annotations, None);
            artifacts.push(stored.await?);
        }
    }
    Ok(artifacts)
}

/// Publishes what was built here.
pub struct Publisher {
    registry: Arc<Registry>,
    shared: Arc<SharedIndexes>,
    key: Option<SigningKey>,
    metrics: Arc<Metrics>,
    /// One at a time: nobody waits for it, and pulls need the line.
    turn: Semaphore,
    refusing: Mutex<HashMap<LayerSource, Instant>>,
}

impl Publisher {
    /// A publisher as `config` wants it, or `None` if nothing is to be published. Reads the signing key.
    ///
    /// # Errors
    /// [`IndexError`] if the key cannot be used.
    pub fn new(
        config: &IndexConfig,
        registry: Arc<Registry>,
        shared: Arc<SharedIndexes>,
        metrics: Arc<Metrics>,
    ) -> Result<Option<Arc<Self>>, IndexError> {
        if !config.publish {
            return Ok(None);
        }
        Ok(Some(Arc::new(Publisher {
            registry,
            shared,
            key: config.signing_key.as_deref().map(SigningKey::load).transpose()?,
            metrics,
            turn: Semaphore::new(1),
            refusing: Mutex::default(),
        })))
    }

    /// Publishes the index of a layer, unless one that is believed here is there already; where it is then. Waits, and tries again, for
    /// as long as that may help. `None`: there is nothing to publish, or it could not be.
    pub async fn publish(&self, cached: &Arc<CachedLayer>, origin: &Origin) -> Option<String> {
        let layer = *cached.digest();
        // What others said of a layer is not this node's to pass on.
        if cached.index().blob_size() < super::WORTH_FROM || cached.id() != cached.digest() {
            return None;
        }
        let mut waits = AGAIN_AFTER.into_iter();
        loop {
            let place = self.place(origin)?;
            if self.refuses(&place) {
                tracing::debug!(%layer, to = name_of(&place), "the index is not published: the repository refused others");
                return self.count("failed", None);
            }
            let tried = {
                let _turn = self.turn.acquire().await;
                tokio::time::timeout(DEADLINE, self.try_once(cached, place.clone(), origin)).await
            };
            let error = match tried {
                Ok(Ok(None)) => return None,
                Ok(Ok(Some(word))) => {
                    tracing::info!(%layer, to = name_of(&place), result = word, "index is shared");
                    return self.count(word, Some(name_of(&place)));
                }
                Ok(Err(error)) => error,
                Err(_) => RegistryError::Unreachable {
                    host: place.host.clone(),
                    what: format!("publishing took more than {} s", DEADLINE.as_secs()),
                },
            };
            let wait = waits.next().filter(|_| error.retry_helps());
            let again_seconds = wait.map(|wait| wait.as_secs());
            tracing::warn!(%layer, to = name_of(&place), %error, ?again_seconds, "the index cannot be published");
            match wait {
                Some(wait) => tokio::time::sleep(wait).await,
                None => {
                    if !error.retry_helps() {
                        self.note_refusal(&place);
                    }
                    return self.count("failed", None);
                }
            }
        }
    }

    fn count(&self, word: &str, place: Option<String>) -> Option<String> {
        self.metrics.index_publications_total.with_label_values(&[word]).inc();
        place
    }

    /// Where an index goes: into the cluster's repository, else beside its image.
    fn place(&self, origin: &Origin) -> Option<LayerSource> {
        match self.policy().repository() {
            Some(place) => Some(place.clone()),
            None => origin.manifest.and(origin.sources.first().cloned()),
        }
    }

    fn policy(&self) -> &Policy {
        self.shared.policy()
    }

    /// `published` or `present`; `None` if the layer has no index that is of use elsewhere.
    async fn try_once(
        &self,
        cached: &Arc<CachedLayer>,
        place: LayerSource,
        origin: &Origin,
    ) -> Result<Option<&'static str>, RegistryError> {
        let layer = *cached.digest();
        let (there, target) = match (self.policy().repository(), origin.manifest) {
            (Some(_), _) => {
                let there = self.shared.in_repository(&place, &layer).await;
                (there, Target::Repository(place))
            }
            (None, Some(manifest)) => {
                let there = self.shared.beside_image(&place, manifest, &layer).await;
                (there, Target::image(&self.registry, place, &manifest).await?)
            }
            (None, None) => return Ok(None),
        };
        let there = match there {
            Ok(there) => there,
            // Something else has that name: it is replaced.
            Err(RegistryError::Image { .. }) => Vec::new(),
            Err(error) => return Err(error),
        };
        let believed = |candidate: &super::Candidate| {
            let signature = candidate.signature.as_deref();
            self.policy()
                .judge(&candidate.place, &layer, &candidate.digest, signature, false)
                .is_some()
        };
        if there.iter().any(believed) {
            return Ok(Some("present"));
        }
        let of = Arc::clone(cached);
        let packed = tokio::task::spawn_blocking(move || form::pack(&of)).await;
        let bytes = match packed {
            Ok(Ok(Some(bytes))) => bytes,
            Ok(Ok(None)) => return Ok(None),
            Ok(Err(error)) => {
                tracing::error!(%layer, %error, "the index cannot be read");
                return Ok(None);
            }
            Err(panic) => {
                tracing::error!(%layer, %panic, "the index cannot be packed");
                return Ok(None);
            }
        };
        push(&self.registry, &target, self.key.as_ref(), &[(layer, bytes.into())]).await?;
        Ok(Some("published"))
    }

    fn refuses(&self, place: &LayerSource) -> bool {
        let refusing = self.refusing.lock().unwrap_or_else(PoisonError::into_inner);
        refusing.get(place).is_some_and(|until| *until > Instant::now())
    }

    fn note_refusal(&self, place: &LayerSource) {
        let now = Instant::now();
        let mut refusing = self.refusing.lock().unwrap_or_else(PoisonError::into_inner);
        if refusing.len() >= MAX_REFUSING {
            refusing.retain(|_, until| *until > now);
        }
        if refusing.len() < MAX_REFUSING {
            refusing.insert(place.clone(), now + REFUSED_FOR);
        }
    }
}
