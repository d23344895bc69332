//! Completing images: what was pulled lazily gets the blobs of its layers in containerd's content store, exactly as the registry has them. Then an
//! image can be exported, pushed, converted and scanned as any other, and is independent of its registry.
//!
//! Blobs are written one after the other, in pieces of a few MiB, each of which waits for a place behind everything that somebody wants
//! ([`Class::Background`]). containerd verifies them. What is interrupted goes on where it was, also after a restart: containerd keeps the
//! parts, held by a lease. Once a blob is written, the labels of its manifest keep it as long as the image is there, and what is still missing
//! of the layer in the cache comes from it ([`super::content`]).
//!
//! It is asked for by `lazuli complete`, or done by itself as `[content] complete` says ([`super::idle`]). Nothing of it runs within a request of containerd's.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use tokio::time::sleep;

use super::Catalog;
use super::containerd::{CONTENT_LABEL, ContainerdError, Ingest, IngestError, Ingested, layer_label, source_label};
use super::content::ContentStore;
use super::loader::LayerSpec;
use super::status::Status;
use crate::fetch::Fetcher;
use crate::fetch::schedule::Class;
use crate::layer::{Digest, compression};
use crate::registry::image::{Document, LayerDescriptor, Manifest};
use crate::registry::{Blob, Body, Reference, RegistryError};
use crate::store::LayerSource;
use crate::sync::blocking;

/// Bytes of a blob that are asked for at once: after so many, others come first again.
const PIECE: u64 = 8 << 20;
/// How long containerd keeps what was written of an image whose completion does not go on, in hours.
const LEASE_HOURS: u64 = 24;
/// Downloads of one blob whose bytes turn out wrong: the next one is asked of another source, if there is one.
const ATTEMPTS: u32 = 2;
/// Longest wait for containerd to tell what it has, before a status says that this is not known.
const LOOK_DEADLINE: Duration = Duration::from_secs(2);
/// How long it is waited for a reference that somebody else has, and how often it is asked for: a call that was interrupted keeps it for a moment
/// (140 ms were seen).
const GIVEN_BACK: Duration = Duration::from_secs(5);
const ASK_EVERY: Duration = Duration::from_millis(100);

/// Why an image is not complete.
#[derive(Debug, thiserror::Error)]
pub enum CompleteError {
    /// containerd has no such image.
    #[error("containerd has no image {name:?} in namespace {namespace:?}")]
    NoImage {
        /// Its name.
        name: String,
        /// The namespace.
        namespace: String,
    },
    /// Its manifest cannot be used.
    #[error("{0}")]
    Manifest(RegistryError),
    /// containerd failed.
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    /// A layer could not be written.
    #[error("layer {layer}: {source}")]
    Layer {
        /// Digest of its blob.
        layer: Digest,
        /// The cause.
        source: IngestError,
    },
}

/// How far the completion of an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Another image is being completed first.
    Waits,
    /// A blob is being written.
    Writes {
        /// The blob.
        layer: Digest,
        /// Bytes that containerd has of it.
        done: u64,
        /// Bytes of it.
        total: u64,
    },
}

/// What the completion of an image has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Completed {
    /// Layers of the image.
    pub layers: u32,
    /// Blobs that were written.
    pub written: u32,
    /// Bytes of them that were read for it.
    pub bytes: u64,
}

/// Which images are complete: by namespace and manifest.
pub(super) type Completeness = HashMap<(String, Digest), bool>;

impl Catalog {
    /// Completes an image by its name: all its manifests that containerd has. `told` hears of every piece.
    ///
    /// # Errors
    /// [`CompleteError`]; what was written stays.
    pub async fn complete(
        self: &Arc<Self>,
        namespace: &str,
        name: &str,
        told: &(dyn Fn(Step) + Send + Sync),
    ) -> Result<Completed, CompleteError> {
        let containerd = self.content.containerd();
        let target = containerd.image(namespace, name).await?;
        let mut digests = vec![target.ok_or_else(|| CompleteError::NoImage {
            name: name.to_owned(),
            namespace: namespace.to_owned(),
        })?];
        let mut seen = HashSet::new();
        let mut all = Completed::default();
        let mut found = false;
        while let Some(digest) = digests.pop() {
            if !seen.insert(digest) {
                continue;
            }
            // Of an index, containerd has the manifests of the platforms that were pulled.
            if seen.len() > 1 && containerd.info(namespace, &digest).await?.is_none() {
                continue;
            }
            let bytes = containerd.read(namespace, &digest).await?;
            match Document::parse(&bytes).map_err(CompleteError::Manifest)? {
                Document::Index(index) => {
                    digests.extend(index.manifests.iter().map(|entry| entry.descriptor.digest));
                }
                Document::Manifest(manifest) => {
                    found = true;
                    let done = self
                        .complete_manifest(namespace, Some(name), &digest, &manifest, told)
                        .await?;
                    all.layers += done.layers;
                    all.written += done.written;
                    all.bytes += done.bytes;
                }
            }
        }
        match found {
            true => Ok(all),
            false => Err(CompleteError::NoImage {
                name: name.to_owned(),
                namespace: namespace.to_owned(),
            }),
        }
    }

    async fn complete_manifest(
        self: &Arc<Self>,
        namespace: &str,
        name: Option<&str>,
        digest: &Digest,
        manifest: &Manifest,
        told: &(dyn Fn(Step) + Send + Sync),
    ) -> Result<Completed, CompleteError> {
        // Two completions of one image would wait for each other's writers.
        let _turn = match self.completing.try_lock() {
            Ok(turn) => turn,
            Err(_) => {
                told(Step::Waits);
                self.completing.lock().await
            }
        };
        let containerd = self.content.containerd();
        let info = containerd.info(namespace, digest).await?;
        let labels = info.map(|info| info.labels).unwrap_or_default();
        let mut sources: Vec<LayerSource> = Vec::new();
        if let Some(reference) = name.and_then(|name| Reference::parse(name).ok()) {
            sources.push(LayerSource {
                host: reference.host,
                repository: reference.repository,
            });
        }
        for source in self.images.sources_of(namespace, &labels).await {
            if !sources.contains(&source) {
                sources.push(source);
            }
        }
        let lease = format!("lazuli-complete-{digest}");
        containerd.create_lease(namespace, &lease, LEASE_HOURS).await?;
        let mut done = Completed::default();
        for (at, layer) in manifest.layers.iter().enumerate() {
            if !is_distributed(&layer.media_type) {
                continue;
            }
            done.layers += 1;
            let failed = |source| CompleteError::Layer {
                layer: layer.digest,
                source,
            };
            if let Some(bytes) = self
                .complete_layer(namespace, &lease, &sources, layer, told)
                .await
                .map_err(failed)?
            {
                done.written += 1;
                done.bytes += bytes;
            }
            // What nothing refers to would be gone with the lease.
            let text = layer.digest.to_string();
            let refers = |(key, value): (&String, &String)| key.starts_with(CONTENT_LABEL) && *value == text;
            if !labels.iter().any(refers) {
                containerd.label(namespace, digest, &layer_label(at), &text).await?;
            }
        }
        containerd.delete_lease(namespace, &lease, false).await?;
        self.note_complete(namespace, *digest, true);
        Ok(done)
    }

    /// Bytes that were read for the blob of a layer; `None` if it was there.
    async fn complete_layer(
        self: &Arc<Self>,
        namespace: &str,
        lease: &str,
        sources: &[LayerSource],
        layer: &LayerDescriptor,
        told: &(dyn Fn(Step) + Send + Sync),
    ) -> Result<Option<u64>, IngestError> {
        let containerd = self.content.containerd();
        if let Some(info) = containerd.info(namespace, &layer.digest).await?
            && info.size == layer.size
        {
            return Ok(None);
        }
        let spec = LayerSpec {
            digest: layer.digest,
            size: layer.size,
            media_type: layer.media_type.clone(),
            annotations: layer.annotations.clone(),
            foreign: false,
            diff_id: None,
        };
        let blob = self.blob(&spec, sources);
        let from = sources.first();
        let labels: HashMap<String, String> = from
            .map(|source| source_label(&source.host, &source.repository))
            .into_iter()
            .collect();
        let mut attempt = 1;
        let mut taken = None;
        loop {
            let read = |range: Range<u64>| {
                let blob = Arc::clone(&blob);
                let scheduled = self.loader.fetcher().scheduled(Arc::clone(&blob), Class::Background);
                let fetcher = Arc::clone(self.loader.fetcher());
                async move { Ok(in_pieces(fetcher, scheduled, range)) }
            };
            let arrived = |done| {
                told(Step::Writes {
                    layer: layer.digest,
                    done,
                    total: layer.size,
                });
            };
            let ingest = Ingest {
                namespace,
                lease,
                reference: format!("lazuli-{}", layer.digest),
                digest: layer.digest,
                size: layer.size,
                labels: labels.clone(),
            };
            match containerd.ingest(ingest, read, arrived).await {
                Ok(Ingested::Present) => return Ok(None),
                Ok(Ingested::Written { from }) => {
                    blob.verified();
                    self.standings.delivered(&layer.digest, &ContentStore::origin());
                    let bytes = layer.size.saturating_sub(from);
                    self.metrics.completed_bytes_total.inc_by(bytes);
                    tracing::info!(layer = %layer.digest, namespace, bytes, "is in containerd's content store now");
                    return Ok(Some(bytes));
                }
                Err(IngestError::Corrupt { digest }) if attempt < ATTEMPTS => {
                    self.metrics.verify_failures_total.with_label_values(&["source"]).inc();
                    tracing::warn!(layer = %digest, source = blob.describe(), "the source sent bytes that are not the layer's");
                    blob.distrust();
                    attempt += 1;
                }
                // Who was interrupted a moment ago and asks again would be in his own way.
                Err(IngestError::Taken { .. }) if taken.get_or_insert_with(Instant::now).elapsed() < GIVEN_BACK => {
                    sleep(ASK_EVERY).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    pub(super) async fn complete_digest(
        self: &Arc<Self>,
        namespace: &str,
        digest: &Digest,
    ) -> Result<Completed, CompleteError> {
        let bytes = self.content.containerd().read(namespace, digest).await?;
        let manifest = Manifest::parse(&bytes).map_err(CompleteError::Manifest)?;
        let (catalog, of) = (Arc::clone(self), *digest);
        let images = blocking(move || catalog.images()).await.unwrap_or_default();
        let name = images.into_iter().find(|image| image.manifest == of);
        let name = name.and_then(|image| image.names.first().cloned());
        self.complete_manifest(namespace, name.as_deref(), digest, &manifest, &|_| ())
            .await
    }

    /// Asks containerd which of the images that are known are complete. Where it does not answer in time, nothing is known.
    pub async fn look_at_completeness(self: &Arc<Self>) {
        let looked = tokio::time::timeout(LOOK_DEADLINE, self.completeness_now()).await;
        let known = match looked {
            Ok(Ok(known)) => known,
            Ok(Err(error)) => {
                tracing::debug!(%error, "it is not known which images are complete");
                Completeness::new()
            }
            Err(_) => Completeness::new(),
        };
        *self.completeness() = known;
    }

    async fn completeness_now(self: &Arc<Self>) -> Result<Completeness, ContainerdError> {
        let catalog = Arc::clone(self);
        let images = blocking(move || catalog.images()).await.unwrap_or_default();
        let mut known = Completeness::new();
        let mut stores: HashMap<String, HashSet<String>> = HashMap::new();
        for image in images {
            if !stores.contains_key(&image.namespace) {
                let digests = self.content.containerd().digests(&image.namespace).await?;
                stores.insert(image.namespace.clone(), digests);
            }
            let store = &stores[&image.namespace];
            // One that is gone is neither.
            if store.contains(&image.manifest.to_string()) {
                let mut layers = image.layers.iter().filter(|layer| is_distributed(&layer.media_type));
                let complete = layers.all(|layer| store.contains(&layer.digest));
                known.insert((image.namespace, image.manifest), complete);
            }
        }
        Ok(known)
    }

    fn note_complete(&self, namespace: &str, manifest: Digest, complete: bool) {
        self.completeness().insert((namespace.to_owned(), manifest), complete);
    }

    pub(super) fn completeness(&self) -> std::sync::MutexGuard<'_, Completeness> {
        self.completeness.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether registries have layers of this type. Others stay where they are, and nobody pushes them.
fn is_distributed(media_type: &str) -> bool {
    !compression::media_type(media_type).is_ok_and(|media| media.nondistributable)
}

/// A range of a blob, asked for piece by piece; from a host that has no ranges, as a whole.
fn in_pieces(fetcher: Arc<Fetcher>, blob: Arc<dyn Blob>, range: Range<u64>) -> Body {
    let pieces = stream::try_unfold((fetcher, blob, range), |(fetcher, blob, range)| async move {
        if range.is_empty() {
            return Ok::<Option<(Body, _)>, RegistryError>(None);
        }
        let end = range.end.min(range.start.saturating_add(PIECE));
        fetcher.background().pass(end - range.start).await;
        match blob.read_part(range.start..end).await {
            Ok(body) => Ok(Some((body, (fetcher, blob, end..range.end)))),
            Err(RegistryError::NoRanges { .. }) => {
                let whole = blob.read(0..blob.size()).await?;
                Ok(Some((after(whole, range.start), (fetcher, blob, range.end..range.end))))
            }
            Err(error) => Err(error),
        }
    });
    pieces.try_flatten().boxed()
}

/// A body without its first bytes.
fn after(body: Body, first: u64) -> Body {
    let mut left = first;
    let rest = body.map_ok(move |mut bytes: Bytes| {
        let skipped = left.min(bytes.len() as u64);
        left -= skipped;
        bytes.split_off(usize::try_from(skipped).unwrap_or(usize::MAX))
    });
    rest.boxed()
}

impl Status {
    /// Notes which images are complete.
    pub(super) fn note_completeness(&mut self, known: &Completeness) {
        for image in &mut self.images {
            let manifest = image.manifest.parse().ok();
            image.complete = manifest.and_then(|digest| known.get(&(image.namespace.clone(), digest)).copied());
        }
    }
}
