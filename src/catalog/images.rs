//! Which image a layer belongs to, and what else is in that image.
//!
//! containerd tells a snapshotter at least the chain id of the layer it wants. With `containerd.io/snapshot/cri.*` labels it also
//! tells the image and its manifest. Without them the chain id is looked up the other way round: every image manifest in
//! containerd's content store carries a label that names its config, the config lists the diff ids, and from those follow the
//! chain ids. Both need nothing but containerd, which has stored manifest and config before it asks for the first layer.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;

use crate::layer::Digest;
use crate::registry::image::MAX_CONFIG;
use crate::registry::image::{Command, ImageConfig, Manifest, chain_ids};
use crate::registry::{Reference, Registry};
use crate::store::LayerSource;

use super::LayerRequest;
use super::containerd::{CONFIG_LABEL, Containerd, ContainerdError, ContentInfo, SOURCE_LABEL};
use super::loader::{LayerSpec, Refusal};
use super::shared::Origin;
use super::sources::Repositories;

const LABEL_IMAGE_REF: &str = "containerd.io/snapshot/cri.image-ref";
const LABEL_MANIFEST_DIGEST: &str = "containerd.io/snapshot/cri.manifest-digest";
/// Manifests whose layers are remembered: several hundred bytes per layer each.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(1024).unwrap();
/// Manifests whose chain ids are remembered, of 32 bytes for each layer: as many as one look-up goes through.
const REMEMBERED_CHAINS: NonZeroUsize = NonZeroUsize::new(READ_AT_MOST).unwrap();
/// Manifests that one look-up may read from containerd; a node with more images than this is beyond kubelet's own limits.
const READ_AT_MOST: usize = 4096;

/// An image as far as pulling needs it.
#[derive(Debug, Clone)]
pub struct ImagePlan {
    /// containerd namespace it is pulled into.
    pub namespace: String,
    /// Its name, if containerd told it.
    pub name: Option<String>,
    /// Digest of its manifest.
    pub manifest: Digest,
    /// Where its blobs can be had, besides in containerd; none, if containerd was given it without a registry.
    pub sources: Vec<LayerSource>,
    /// Its layers from the lowest up.
    pub layers: Arc<Vec<PlannedLayer>>,
}

/// One layer of an image.
#[derive(Debug, Clone)]
pub struct PlannedLayer {
    /// Chain id: what containerd asks for.
    pub chain_id: String,
    /// What the manifest says of it.
    pub spec: LayerSpec,
}

impl ImagePlan {
    /// Where its layers come from.
    pub fn origin(&self) -> Origin {
        Origin {
            sources: self.sources.clone(),
            manifest: Some(self.manifest),
        }
    }

    /// What it is called in messages.
    pub fn title(&self) -> String {
        let manifest = &self.manifest;
        match (&self.name, self.sources.first()) {
            (Some(name), _) => format!("{name} ({manifest})"),
            (None, Some(place)) => format!("{}/{}@{manifest}", place.host, place.repository),
            (None, None) => manifest.to_string(),
        }
    }

    /// The layer with this chain id.
    pub fn layer(&self, chain_id: &str) -> Option<&PlannedLayer> {
        self.layers.get(self.position(chain_id)?)
    }

    /// How many layers are below the layer with this chain id.
    pub fn position(&self, chain_id: &str) -> Option<usize> {
        self.layers.iter().position(|layer| layer.chain_id == chain_id)
    }
}

/// The layers that a manifest and its config describe, from the lowest up.
///
/// # Errors
/// [`Refusal`] when they do not fit together.
pub fn plan_layers(manifest: &Manifest, config: &ImageConfig) -> Result<Vec<PlannedLayer>, Refusal> {
    if manifest.layers.len() != config.diff_ids.len() {
        let (layers, ids) = (manifest.layers.len(), config.diff_ids.len());
        return Err(Refusal::unresolved(
            format!("the manifest has {layers} layers and its config {ids} diff ids"),
            false,
        ));
    }
    let layers = manifest
        .layers
        .iter()
        .zip(&config.diff_ids)
        .zip(chain_ids(&config.diff_ids));
    Ok(layers
        .map(|((layer, diff_id), chain_id)| PlannedLayer {
            chain_id: chain_id.to_string(),
            spec: LayerSpec {
                digest: layer.digest,
                size: layer.size,
                media_type: layer.media_type.clone(),
                annotations: super::soci::annotated(layer, manifest),
                foreign: !layer.urls.is_empty(),
                diff_id: Some(*diff_id),
            },
        })
        .collect())
}

/// Finds images in containerd.
pub struct Images {
    containerd: Containerd,
    registry: Arc<Registry>,
    repositories: Repositories,
    /// Layers by manifest digest. Both are immutable, so nothing here is ever stale.
    known: Mutex<LruCache<Digest, Arc<Vec<PlannedLayer>>>>,
    /// Chain ids by manifest digest, of more manifests: all of a namespace are looked through for one.
    chains: Mutex<LruCache<Digest, Arc<[Digest]>>>,
}

impl Images {
    /// A finder over one containerd.
    /// `repositories` are those of `registry`.
    pub fn new(containerd: Containerd, registry: Arc<Registry>, repositories: Repositories) -> Self {
        Images {
            containerd,
            registry,
            repositories,
            known: Mutex::new(LruCache::new(REMEMBERED)),
            chains: Mutex::new(LruCache::new(REMEMBERED_CHAINS)),
        }
    }

    /// The repositories that documents are read from.
    pub fn repositories(&self) -> &Repositories {
        &self.repositories
    }

    /// The image that holds the layer of `request`.
    ///
    /// # Errors
    /// [`Refusal`] when it cannot be found; the text says where it was looked for.
    pub async fn find(&self, request: &LayerRequest) -> Result<ImagePlan, Refusal> {
        if let Some(plan) = self.find_labelled(request).await? {
            return Ok(plan);
        }
        self.reverse_lookup(request).await
    }

    async fn find_labelled(&self, request: &LayerRequest) -> Result<Option<ImagePlan>, Refusal> {
        let (Some(name), Some(manifest)) = (
            request.labels.get(LABEL_IMAGE_REF),
            request.labels.get(LABEL_MANIFEST_DIGEST),
        ) else {
            return Ok(None);
        };
        let malformed =
            |label, error: &dyn std::fmt::Display| Refusal::unresolved(format!("label {label}: {error}"), false);
        let reference = Reference::parse(name).map_err(|error| malformed(LABEL_IMAGE_REF, &error))?;
        let manifest: Digest = manifest
            .parse()
            .map_err(|error| malformed(LABEL_MANIFEST_DIGEST, &error))?;
        let layers = match self.read_layers(&request.namespace, &manifest).await {
            Ok(layers) => layers,
            // Some clients send the labels and keep the manifest to themselves.
            Err(_) => self.layers_from_registry(&reference, &manifest).await?,
        };
        if !layers.iter().any(|layer| layer.chain_id == request.chain_id) {
            return Ok(None);
        }
        let sources = vec![LayerSource {
            host: reference.host.clone(),
            repository: reference.repository.clone(),
        }];
        Ok(Some(ImagePlan {
            namespace: request.namespace.clone(),
            name: Some(name.clone()),
            manifest,
            sources,
            layers,
        }))
    }

    async fn reverse_lookup(&self, request: &LayerRequest) -> Result<ImagePlan, Refusal> {
        let mut manifests = self
            .containerd
            .manifests(&request.namespace)
            .await
            .map_err(|e| of_containerd(&e))?;
        // The same chain id may be in several images, in different compressions: the one just written is the one being pulled.
        manifests.sort_by_key(|info| std::cmp::Reverse(info.updated));
        for info in manifests.iter().take(READ_AT_MOST) {
            let Ok(digest) = info.digest.parse::<Digest>() else {
                continue;
            };
            let layers = match self.layers_of(&request.namespace, &digest, info).await {
                Ok(layers) => layers,
                Err(error) => {
                    // Another image's manifest may be unreadable, half pulled, or of another kind: that is not our layer's fault.
                    tracing::debug!(manifest = %digest, error = %error.text, "manifest is passed over");
                    continue;
                }
            };
            if layers.iter().any(|layer| layer.chain_id == request.chain_id) {
                let names = self.names(&request.namespace).await;
                let sources = self.sources(&names, &info.labels);
                let namespace = request.namespace.clone();
                return Ok(ImagePlan {
                    namespace,
                    name: None,
                    manifest: digest,
                    sources,
                    layers,
                });
            }
        }
        let text = format!(
            "none of the {} image manifests in containerd's namespace {:?} has a layer with chain id {}",
            manifests.len(),
            request.namespace,
            request.chain_id
        );
        Err(Refusal::unresolved(text, true))
    }

    async fn layers_of(
        &self,
        namespace: &str,
        manifest: &Digest,
        info: &ContentInfo,
    ) -> Result<Arc<Vec<PlannedLayer>>, Refusal> {
        if let Some(layers) = self.known(manifest) {
            return Ok(layers);
        }
        // The label is cheaper than the manifest: a config that is not there yet cannot be read anyway.
        let config = info
            .labels
            .get(CONFIG_LABEL)
            .and_then(|text| text.parse::<Digest>().ok());
        if config.is_none() {
            return Err(Refusal::unresolved("its label names no config", false));
        }
        self.read_layers(namespace, manifest).await
    }

    /// Reads manifest and config from containerd's content store.
    async fn read_layers(&self, namespace: &str, digest: &Digest) -> Result<Arc<Vec<PlannedLayer>>, Refusal> {
        if let Some(layers) = self.known(digest) {
            return Ok(layers);
        }
        let bytes = self
            .containerd
            .read(namespace, digest)
            .await
            .map_err(|error| of_containerd(&error))?;
        let manifest = Manifest::parse(&bytes).map_err(|error| Refusal::unresolved(error.to_string(), false))?;
        let config = self
            .containerd
            .read(namespace, &manifest.config.digest)
            .await
            .map_err(|e| of_containerd(&e))?;
        self.remember(digest, &manifest, &config)
    }

    /// What an image says that it runs, from containerd's content store, or where the image comes from; `None` if it says nothing, or it cannot be
    /// read.
    pub(super) async fn command(&self, plan: &ImagePlan) -> Option<Command> {
        let read = async |digest: &Digest| self.containerd.read(&plan.namespace, digest).await;
        let config = match read(&plan.manifest).await {
            Ok(bytes) => read(&Manifest::parse(&bytes).ok()?.config.digest).await.ok()?,
            // Some clients keep it to themselves.
            Err(_) => {
                let reference = Reference::parse(plan.name.as_deref()?).ok()?;
                self.config_from_registry(&reference, &plan.manifest).await.ok()?.1
            }
        };
        Command::parse(&config)
    }

    async fn layers_from_registry(
        &self,
        reference: &Reference,
        digest: &Digest,
    ) -> Result<Arc<Vec<PlannedLayer>>, Refusal> {
        let (manifest, config) = self.config_from_registry(reference, digest).await?;
        self.remember(digest, &manifest, &config)
    }

    async fn config_from_registry(
        &self,
        reference: &Reference,
        digest: &Digest,
    ) -> Result<(Manifest, Vec<u8>), Refusal> {
        let source = self.repositories.of(reference);
        let failed =
            |error: crate::registry::RegistryError| Refusal::unresolved(error.to_string(), error.retry_helps());
        let manifest = source.manifest(&digest.to_string()).await.map_err(failed)?;
        let manifest = Manifest::parse(&manifest.bytes).map_err(failed)?;
        let config = source
            .read_small(manifest.config.digest, manifest.config.size, MAX_CONFIG)
            .await
            .map_err(failed)?;
        Ok((manifest, config.to_vec()))
    }

    fn remember(&self, digest: &Digest, manifest: &Manifest, config: &[u8]) -> Result<Arc<Vec<PlannedLayer>>, Refusal> {
        let config = ImageConfig::parse(config).map_err(|error| Refusal::unresolved(error.to_string(), false))?;
        let layers = Arc::new(plan_layers(manifest, &config)?);
        self.chains().put(*digest, chain_ids(&config.diff_ids).into());
        self.known
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .put(*digest, Arc::clone(&layers));
        Ok(layers)
    }

    fn chains(&self) -> MutexGuard<'_, LruCache<Digest, Arc<[Digest]>>> {
        self.chains.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self, manifest: &Digest) -> Option<Arc<Vec<PlannedLayer>>> {
        self.known
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(manifest)
            .cloned()
    }

    /// All images of a namespace that have this chain id, as far as containerd's content store tells. Their sources are known with `sources` only:
    /// that takes another question.
    ///
    /// # Errors
    /// [`Refusal`] if containerd cannot be asked.
    pub async fn with_chain(&self, namespace: &str, chain_id: &str, sources: bool) -> Result<Vec<ImagePlan>, Refusal> {
        let manifests = self.containerd.manifests(namespace).await;
        let manifests = manifests.map_err(|error| of_containerd(&error))?;
        let mut found = Vec::new();
        if manifests.len() > READ_AT_MOST {
            let (all, most) = (manifests.len(), READ_AT_MOST);
            tracing::warn!(
                namespace,
                all,
                most,
                "not all images are looked at for a chain of layers"
            );
        }
        let other = |digest: &Digest| {
            let chains = self.chains().get(digest).cloned();
            chains.is_some_and(|chains| !chains.iter().any(|chain| chain.to_string() == chain_id))
        };
        for info in manifests.iter().take(READ_AT_MOST) {
            let Ok(digest) = info.digest.parse::<Digest>() else {
                continue;
            };
            if other(&digest) {
                continue;
            }
            match self.layers_of(namespace, &digest, info).await {
                Ok(layers) if layers.iter().any(|layer| layer.chain_id == chain_id) => {
                    found.push((digest, info, layers))
                }
                Ok(_) => {}
                Err(error) => tracing::debug!(manifest = %digest, error = %error.text, "manifest is passed over"),
            }
        }
        let names = match sources && !found.is_empty() {
            true => self.names(namespace).await,
            false => Vec::new(),
        };
        let plan = |(manifest, info, layers): (Digest, &ContentInfo, _)| ImagePlan {
            namespace: namespace.to_owned(),
            name: None,
            manifest,
            sources: match sources {
                true => self.sources(&names, &info.labels),
                false => Vec::new(),
            },
            layers,
        };
        Ok(found.into_iter().map(plan).collect())
    }

    /// What the images of a namespace are called.
    async fn names(&self, namespace: &str) -> Vec<String> {
        self.containerd.image_names(namespace).await.unwrap_or_default()
    }

    /// Where content with these labels may be, besides in containerd; none, if it was not pulled from anywhere.
    pub(super) async fn sources_of(&self, namespace: &str, labels: &HashMap<String, String>) -> Vec<LayerSource> {
        match source_labels(labels).is_empty() {
            true => Vec::new(),
            false => self.sources(&self.names(namespace).await, labels),
        }
    }

    /// Where the blobs of a manifest may be: its `distribution.source` labels, with the ports that they lack; `names` are those of all images.
    fn sources(&self, names: &[String], labels: &HashMap<String, String>) -> Vec<LayerSource> {
        let mut sources = Vec::new();
        for (host, repository) in source_labels(labels) {
            let pulled = names
                .iter()
                .filter_map(|name| Reference::parse(name).ok())
                .map(|r| r.host);
            let with_port = pulled.filter(|name| name.rsplit_once(':').is_some_and(|(bare, _)| bare == host));
            let mut hosts = self.registry.resolve_ports(host);
            // An explicit table or hosts.toml comes first; then what images are called; the bare name last.
            let bare = hosts.iter().position(|name| name == host).unwrap_or(hosts.len());
            hosts.splice(bare..bare, with_port);
            for host in hosts {
                let source = LayerSource {
                    host,
                    repository: repository.to_owned(),
                };
                if !sources.contains(&source) {
                    sources.push(source);
                }
            }
        }
        sources
    }
}

/// Hosts (without ports) and repositories in containerd's `distribution.source` labels.
fn source_labels(labels: &HashMap<String, String>) -> Vec<(&str, &str)> {
    let mut found: Vec<_> = labels
        .iter()
        .filter_map(|(key, value)| Some((key.strip_prefix(SOURCE_LABEL)?, value)))
        .flat_map(|(host, repositories)| repositories.split(',').map(move |repository| (host, repository.trim())))
        .filter(|(host, repository)| !host.is_empty() && !repository.is_empty())
        .collect();
    found.sort_unstable();
    found
}

fn of_containerd(error: &ContainerdError) -> Refusal {
    Refusal::unresolved(error.to_string(), !matches!(error, ContainerdError::Content { .. }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Snapshot labels carry only some annotations; the manifest has them all, wherever it is read.
    #[test]
    fn annotations_of_the_manifest_are_kept() {
        let digest = Digest::of(b"");
        let manifest = format!(
            r#"{{"schemaVersion": 2, "config": {{"digest": "{digest}", "size": 0}}, "layers": [{{"digest": "{digest}", "size": 7,
                "annotations": {{"io.github.containers.zstd-chunked.manifest-position": "1:2:3:1", "other": ""}}}}]}}"#
        );
        let config = format!(r#"{{"os": "linux", "architecture": "amd64", "rootfs": {{"diff_ids": ["{digest}"]}}}}"#);
        let manifest = Manifest::parse(manifest.as_bytes()).unwrap();
        let layers = plan_layers(&manifest, &ImageConfig::parse(config.as_bytes()).unwrap()).unwrap();
        let annotations: Vec<_> = layers[0].spec.annotations.iter().collect();
        assert_eq!(annotations.len(), 2);
        assert_eq!(annotations[0].1, "1:2:3:1");
    }

    #[test]
    fn source_labels_list_every_repository() {
        let labels = HashMap::from([
            (
                "containerd.io/distribution.source.r.example".to_owned(),
                "b/x, a/x".to_owned(),
            ),
            ("containerd.io/distribution.source.127.0.0.1".to_owned(), "c".to_owned()),
            ("containerd.io/distribution.source.".to_owned(), "none".to_owned()),
            ("containerd.io/gc.ref.content.config".to_owned(), "sha256:0".to_owned()),
        ]);
        assert_eq!(
            source_labels(&labels),
            [("127.0.0.1", "c"), ("r.example", "a/x"), ("r.example", "b/x")]
        );
    }
}
