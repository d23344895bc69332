//! What a reference means on this machine: index -> manifest -> config -> layers and chain ids.
//!
//! Documents are parsed from bytes alone ([`Manifest::parse`], [`ImageConfig::parse`]), since they also come from containerd's
//! content store; only the fields that Lazuli needs are read, as Go would ([`json`]). OCI and Docker media types mean the same here.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::Deserialize;

use super::{ManifestBytes, RegistryError, Source, json};
use crate::layer::Digest;

mod platform;

pub use platform::Platform;

/// Largest image config that is read, in bytes.
pub const MAX_CONFIG: u64 = 8 << 20;
/// Indexes within indexes that are followed.
const MAX_INDEX_DEPTH: u32 = 3;
/// Characters of a JSON error that are repeated.
const MAX_PROBLEM: usize = 300;

/// Media type of an OCI image manifest.
pub const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an OCI index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// Docker's first manifest form, which has neither config nor diff ids.
const DOCKER_V1: &str = "application/vnd.docker.distribution.manifest.v1";

/// An image of one platform, resolved and verified.
#[derive(Debug, Clone)]
pub struct Image {
    /// Digest of the manifest (not of an index above it).
    pub manifest_digest: Digest,
    /// The manifest as served.
    pub manifest_bytes: Bytes,
    /// Its media type.
    pub manifest_media_type: String,
    /// Descriptor of the config.
    pub config: LayerDescriptor,
    /// The config as served.
    pub config_bytes: Bytes,
    /// The layers, the lowest first.
    pub layers: Vec<LayerDescriptor>,
    /// Digest of each layer's uncompressed tar.
    pub diff_ids: Vec<Digest>,
    /// Chain id of each layer: what containerd calls the snapshot that has it on top.
    pub chain_ids: Vec<Digest>,
}

/// A descriptor: of a layer, or of a config.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LayerDescriptor {
    /// Digest of the blob.
    pub digest: Digest,
    /// Size of the blob in bytes.
    pub size: u64,
    /// Media type of the blob.
    #[serde(default)]
    pub media_type: String,
    /// Annotations: where lazy formats say what they are.
    #[serde(default, deserialize_with = "json::texts")]
    pub annotations: BTreeMap<String, String>,
    /// Other places to get the blob from, for layers that may not be distributed. Lazuli does not follow them.
    #[serde(default, deserialize_with = "json::loose")]
    pub urls: Vec<String>,
}

/// The manifest of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Media type it states of itself, or an empty text.
    pub media_type: String,
    /// Descriptor of the config.
    pub config: LayerDescriptor,
    /// The layers, the lowest first.
    pub layers: Vec<LayerDescriptor>,
    /// Annotations of the whole.
    pub annotations: BTreeMap<String, String>,
}

/// An index: manifests by platform.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Index {
    /// Its entries, as far as they can be used.
    pub manifests: Vec<IndexEntry>,
    /// The others: for which platform, and what is wrong. They count only for who needs them.
    pub unusable: Vec<(Option<Platform>, String)>,
}

/// One entry of an [`Index`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexEntry {
    /// Digest, size, media type and annotations.
    pub descriptor: LayerDescriptor,
    /// The platform it is for, if stated.
    pub platform: Option<Platform>,
}

/// The part of an image's config that says what its layers are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageConfig {
    /// The platform it is for.
    pub platform: Platform,
    /// Digest of each layer's uncompressed tar, the lowest first.
    pub diff_ids: Vec<Digest>,
}

/// What an image runs unless it is told otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Command {
    /// The program and its arguments: the entry point, and what follows it.
    pub args: Vec<String>,
    /// The environment: `NAME=value`.
    pub env: Vec<String>,
    /// The directory that it begins in; empty: the root.
    pub directory: String,
}

impl Command {
    /// What the config of an image says; nothing, if that is nothing that can be run.
    pub fn parse(config: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Document {
            #[serde(default, deserialize_with = "json::loose")]
            config: Option<Parts>,
        }
        #[derive(Deserialize, Default)]
        #[serde(rename_all = "PascalCase")]
        struct Parts {
            #[serde(default, deserialize_with = "json::loose")]
            entrypoint: Vec<String>,
            #[serde(default, deserialize_with = "json::loose")]
            cmd: Vec<String>,
            #[serde(default, deserialize_with = "json::loose")]
            env: Vec<String>,
            #[serde(default, deserialize_with = "json::loose")]
            working_dir: String,
        }
        let parts = json::from_slice::<Document>(config).ok()?.config?;
        let command = Command {
            args: [parts.entrypoint, parts.cmd].concat(),
            env: parts.env,
            directory: parts.working_dir,
        };
        (!command.args.is_empty()).then_some(command)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "a manifest or an index")]
struct RawDocument {
    #[serde(default, deserialize_with = "json::loose")]
    schema_version: Option<u64>,
    #[serde(default, deserialize_with = "json::loose")]
    media_type: String,
    config: Option<LayerDescriptor>,
    layers: Option<Vec<LayerDescriptor>>,
    manifests: Option<Vec<RawEntry>>,
    #[serde(default, deserialize_with = "json::texts")]
    annotations: BTreeMap<String, String>,
}

/// An entry of an index, not judged yet: it is read once for its platform, and once for the rest.
struct RawEntry {
    platform: Option<Platform>,
    descriptor: Result<LayerDescriptor, String>,
}

impl<'de> Deserialize<'de> for RawEntry {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize, Default)]
        #[serde(rename_all = "camelCase")]
        struct Parts {
            #[serde(default, deserialize_with = "json::loose")]
            platform: Option<Platform>,
            digest: Option<json::Loose<Digest>>,
            size: Option<json::Loose<u64>>,
            #[serde(default, deserialize_with = "json::loose")]
            media_type: String,
            #[serde(default, deserialize_with = "json::texts")]
            annotations: BTreeMap<String, String>,
            #[serde(default, deserialize_with = "json::loose")]
            urls: Vec<String>,
        }
        let parts = match json::Loose::<Parts>::deserialize(deserializer)?.0 {
            Ok(parts) => parts,
            Err(problem) => {
                return Ok(RawEntry {
                    platform: None,
                    descriptor: Err(problem),
                });
            }
        };
        let digest = parts
            .digest
            .map_or(Err("it has no digest".to_owned()), |digest| digest.0);
        let size = parts.size.map_or(Err("it has no size".to_owned()), |size| size.0);
        let descriptor = digest.and_then(|digest| {
            Ok(LayerDescriptor {
                digest,
                size: size?,
                media_type: parts.media_type,
                annotations: parts.annotations,
                urls: parts.urls,
            })
        });
        Ok(RawEntry {
            platform: parts.platform,
            descriptor,
        })
    }
}

impl From<Vec<RawEntry>> for Index {
    fn from(entries: Vec<RawEntry>) -> Self {
        let mut index = Index::default();
        for entry in entries {
            match entry.descriptor {
                Ok(descriptor) => index.manifests.push(IndexEntry {
                    descriptor,
                    platform: entry.platform,
                }),
                Err(problem) => index.unusable.push((entry.platform, problem)),
            }
        }
        index
    }
}

#[derive(Deserialize)]
#[serde(expecting = "an image config")]
struct RawConfig {
    #[serde(default, deserialize_with = "json::loose")]
    os: String,
    #[serde(default, deserialize_with = "json::loose")]
    architecture: String,
    #[serde(default, deserialize_with = "json::loose")]
    variant: String,
    rootfs: RawRootfs,
}

#[derive(Deserialize)]
struct RawRootfs {
    #[serde(default)]
    diff_ids: Vec<Digest>,
}

fn unusable(kind: &str, bytes: &[u8], problem: impl Into<String>) -> RegistryError {
    RegistryError::Image {
        what: format!("{kind} {}", Digest::of(bytes)),
        problem: problem.into(),
    }
}

pub(super) fn json_problem(error: &serde_json::Error) -> String {
    error.to_string().chars().take(MAX_PROBLEM).collect()
}

impl Manifest {
    /// Parses an image manifest.
    ///
    /// # Errors
    /// [`RegistryError::Image`] says what is wrong, and for what else the document is taken.
    pub fn parse(bytes: &[u8]) -> Result<Self, RegistryError> {
        match Document::parse(bytes)? {
            Document::Manifest(manifest) => Ok(manifest),
            Document::Index(_) => Err(unusable("manifest", bytes, "it is an index of manifests")),
        }
    }
}

/// A manifest or an index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// Of one image.
    Manifest(Manifest),
    /// Of several.
    Index(Index),
}

impl Document {
    /// Parses a document of either kind; which one it is shows in its fields, since media types are optional in OCI.
    ///
    /// # Errors
    /// [`RegistryError::Image`] says what is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self, RegistryError> {
        let fail = |problem: String| unusable("manifest", bytes, problem);
        let raw: RawDocument = json::from_slice(bytes).map_err(|error| fail(json_problem(&error)))?;
        if raw.media_type.starts_with(DOCKER_V1) || raw.schema_version == Some(1) {
            return Err(fail(
                "it is of docker's first form, which has no layer digests to verify; push the image anew".to_owned(),
            ));
        }
        // Go's types have all lists, and write those that are empty.
        let manifests = raw.manifests.filter(|list| !list.is_empty() || raw.config.is_none());
        match (raw.config, raw.layers, manifests) {
            (Some(_), _, Some(_)) => Err(fail("it is both a manifest and an index".to_owned())),
            (_, _, Some(_)) if !matches!(raw.media_type.as_str(), "" | OCI_INDEX | DOCKER_INDEX) => Err(fail(format!(
                "it lists manifests, and says that it is {}",
                raw.media_type
            ))),
            (None, _, Some(manifests)) => Ok(Document::Index(manifests.into())),
            (Some(config), layers, None) => Ok(Document::Manifest(Manifest {
                media_type: raw.media_type,
                config,
                layers: layers.unwrap_or_default(),
                annotations: raw.annotations,
            })),
            (None, _, None) => Err(fail("it has neither a config nor manifests".to_owned())),
        }
    }
}

impl ImageConfig {
    /// Parses an image config.
    ///
    /// # Errors
    /// [`RegistryError::Image`] says what is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self, RegistryError> {
        let raw: RawConfig =
            json::from_slice(bytes).map_err(|error| unusable("config", bytes, json_problem(&error)))?;
        Ok(ImageConfig {
            platform: Platform {
                os: raw.os,
                architecture: raw.architecture,
                variant: raw.variant,
            },
            diff_ids: raw.rootfs.diff_ids,
        })
    }

    /// Chain id of each layer.
    pub fn chain_ids(&self) -> Vec<Digest> {
        chain_ids(&self.diff_ids)
    }
}

/// Chain ids as the OCI image specification defines them: the first is the diff id, each other is the digest of the text
/// `<chain id below> <diff id>`.
pub fn chain_ids(diff_ids: &[Digest]) -> Vec<Digest> {
    let mut chain: Option<Digest> = None;
    diff_ids
        .iter()
        .map(|diff_id| {
            let id = match chain {
                Some(below) => Digest::of(format!("{below} {diff_id}").as_bytes()),
                None => *diff_id,
            };
            chain = Some(id);
            id
        })
        .collect()
}

impl Image {
    /// Puts an image together from its documents.
    ///
    /// # Errors
    /// [`RegistryError::Image`] if one of them is malformed, or they disagree.
    pub fn assemble(manifest: ManifestBytes, config_bytes: Bytes) -> Result<Self, RegistryError> {
        let parsed = Manifest::parse(&manifest.bytes)?;
        let config = ImageConfig::parse(&config_bytes)?;
        if parsed.layers.len() != config.diff_ids.len() {
            return Err(unusable(
                "manifest",
                &manifest.bytes,
                format!(
                    "it has {} layers, its config {} diff ids",
                    parsed.layers.len(),
                    config.diff_ids.len()
                ),
            ));
        }
        Ok(Image {
            manifest_digest: manifest.digest,
            manifest_bytes: manifest.bytes,
            manifest_media_type: manifest.media_type,
            config: parsed.config,
            config_bytes,
            layers: parsed.layers,
            chain_ids: config.chain_ids(),
            diff_ids: config.diff_ids,
        })
    }
}

/// Resolves `reference` (a tag or a digest) to the image for the machine Lazuli runs on.
///
/// # Errors
/// [`RegistryError`] of the source; [`RegistryError::Image`] if there is no image for this platform or a document is malformed.
pub async fn resolve(source: &dyn Source, reference: &str) -> Result<Image, RegistryError> {
    resolve_for(source, reference, &Platform::host()).await
}

/// Resolves `reference` to the image for `platform`.
///
/// # Errors
/// As [`resolve`].
pub async fn resolve_for(source: &dyn Source, reference: &str, platform: &Platform) -> Result<Image, RegistryError> {
    let mut document = source.manifest(reference).await?;
    for _ in 0..=MAX_INDEX_DEPTH {
        let manifest = match Document::parse(&document.bytes)? {
            Document::Manifest(manifest) => manifest,
            Document::Index(index) => {
                let entry = index
                    .choose(platform)
                    .map_err(|problem| unusable("index", &document.bytes, problem))?;
                document = source.manifest(&entry.descriptor.digest.to_string()).await?;
                continue;
            }
        };
        let config = &manifest.config;
        if !matches!(config.media_type.as_str(), "" | OCI_CONFIG | DOCKER_CONFIG) {
            return Err(unusable(
                "manifest",
                &document.bytes,
                format!("it is not an image: its config is {}", config.media_type),
            ));
        }
        let config_bytes = source.read_small(config.digest, config.size, MAX_CONFIG).await?;
        return Image::assemble(document, config_bytes);
    }
    Err(unusable(
        "index",
        &document.bytes,
        format!("more than {MAX_INDEX_DEPTH} indexes lie within each other"),
    ))
}

impl Index {
    /// The entry that fits `platform` best: the most capable variant, and the first of equals.
    pub fn best(&self, platform: &Platform) -> Option<&IndexEntry> {
        let mut best: Option<(u32, &IndexEntry)> = None;
        for entry in &self.manifests {
            let Some(rank) = rank(entry.platform.as_ref(), platform) else {
                continue;
            };
            if best.is_none_or(|(other, _)| rank > other) {
                best = Some((rank, entry));
            }
        }
        best.map(|(_, entry)| entry)
    }

    /// The entry for `platform`, or why there is none.
    fn choose(&self, platform: &Platform) -> Result<&IndexEntry, String> {
        let best = self.best(platform);
        let best_rank = best.and_then(|entry| rank(entry.platform.as_ref(), platform));
        // Something else than what was meant for this platform is not taken in its stead.
        let spoiled = self
            .unusable
            .iter()
            .find(|(stated, _)| stated.is_some() && rank(stated.as_ref(), platform) > best_rank);
        match (spoiled, best) {
            (Some((_, problem)), _) => Err(format!("its entry for {platform} cannot be used: {problem}")),
            (None, Some(entry)) => Ok(entry),
            (None, None) => Err(format!("it has no image for {platform}; it has {}", self.platforms())),
        }
    }

    fn platforms(&self) -> String {
        const SHOWN: usize = 12;
        let mut names: Vec<String> = self
            .manifests
            .iter()
            .filter_map(|entry| entry.platform.as_ref())
            .map(Platform::to_string)
            .collect();
        names.dedup();
        let more = names.len().saturating_sub(SHOWN);
        names.truncate(SHOWN);
        match (names.is_empty(), more) {
            (true, _) => "none".to_owned(),
            (false, 0) => names.join(", "),
            (false, more) => format!("{} and {more} more", names.join(", ")),
        }
    }
}

/// How well an entry with the platform `stated` fits `platform`; `None` if it does not.
fn rank(stated: Option<&Platform>, platform: &Platform) -> Option<u32> {
    match stated {
        Some(stated) => platform.runs(stated),
        // An index may leave it out (nested indexes, single images): better than nothing.
        None => Some(0),
    }
}

#[cfg(test)]
mod tests;
