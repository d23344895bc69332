//! The status document: what `lazuli status`, `GET /status` and the end of `lazuli pull` tell.

use serde::{Deserialize, Serialize};

use std::collections::HashMap;

use super::belief::Belief;
use super::{Catalog, Live};
use crate::fetch::LayerData as _;
use crate::fs::{Deadlines, Face, Faces, Serving, Shown};
use crate::layer::{Access, Digest};
use crate::store::{ImageRecord, IndexRecord};
use crate::sys::quota;

/// Everything the daemon serves now.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    /// Its root directory.
    pub root: String,
    /// Takeovers by a new worker since the supervisor was started.
    #[serde(default)]
    pub takeovers: u64,
    /// Bytes that layers take on disk, all files counted.
    pub cache_bytes: u64,
    /// Most bytes it may keep; 0 means as many as the disk allows.
    pub cache_max_bytes: u64,
    /// How many of them cannot be evicted now, because their files are mounted.
    #[serde(default)]
    pub cache_held_bytes: u64,
    /// How many of them belong to files that have lost their layer and are still mounted.
    #[serde(default)]
    pub cache_replaced_bytes: u64,
    /// What is wrong on this machine and has to be mended by somebody; each names the file or place, and the remedy. Empty if all is well.
    #[serde(default)]
    pub problems: Vec<String>,
    /// Why the size of a container cannot be limited (label `containerd.io/snapshot/max-size`), and what would help; null if it can be.
    #[serde(default)]
    pub no_size_limits: Option<String>,
    /// By which face layers are shown.
    #[serde(default)]
    pub face: FaceStatus,
    /// How long reads wait.
    #[serde(default)]
    pub reads: ReadsStatus,
    /// Registries that something is asked of now.
    #[serde(default)]
    pub hosts: Vec<HostStatus>,
    /// Images that were pulled through Lazuli.
    pub images: Vec<ImageStatus>,
    /// Layers that are live.
    pub layers: Vec<LayerStatus>,
    /// Layers that are shown merged.
    #[serde(default)]
    pub chains: Vec<ChainStatus>,
    /// Layers that are being made live at this moment.
    pub loading: Vec<LoadingStatus>,
}

/// The face that serves.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaceStatus {
    /// `image` or `tree`.
    pub face: String,
    /// Why.
    pub reason: String,
    /// Whether EROFS metadata come through FUSE, because the kernel mounts no EROFS file from the root directory's file system.
    pub metadata_through_fuse: bool,
    /// Why layers cannot be shown with mapped owners, to containers in user namespaces; null if they can.
    #[serde(default)]
    pub no_mapped_owners: Option<String>,
}

/// How long reads wait for bytes that have to be fetched.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadsStatus {
    /// Reads that wait now, of all images.
    pub waiting: u64,
    /// Seconds after which a reader gets an error.
    pub deadline_seconds: u64,
    /// Seconds after which the kernel would abort the FUSE connection of all images; null if it has no such limit.
    pub kernel_limit_seconds: Option<u64>,
}

/// A registry that something is asked of.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostStatus {
    /// Its name.
    pub host: String,
    /// Ranged requests that are under way.
    pub requests: usize,
    /// How many it is asked at once at most, by what its link has shown to bear.
    pub request_limit: usize,
    /// How many that may become (`fetch.max_concurrent_requests`).
    pub request_limit_max: usize,
}

/// One chain: layers that are shown merged, as one directory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChainStatus {
    /// Digest of the chain.
    pub digest: String,
    /// Digests of its layers and variants, the lowest first.
    pub layers: Vec<String>,
    /// Whether it lies on others: it is a segment of longer ones, and not the lowest.
    #[serde(default)]
    pub is_upper: bool,
    /// `waiting` while its image is made, `stored`, or `failed`.
    pub state: String,
    /// By what it is shown, or would be now: `file`, `image`, or `stack` if its layers are stacked. Empty if it is not stored.
    pub face: String,
    /// Why its layers are stacked, if they are.
    pub reason: Option<String>,
    /// Whether it is mounted.
    pub mounted: bool,
    /// Bytes of its image on disk, which hold names and attributes only.
    pub bytes: u64,
}

/// One image.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ImageStatus {
    /// Name under which it was pulled, where containerd told it.
    pub name: String,
    /// containerd namespace.
    pub namespace: String,
    /// Digest of its manifest.
    pub manifest: String,
    /// Whether containerd's content store has all its layers, so that it can be exported and pushed; null if containerd has not told.
    #[serde(default)]
    pub complete: Option<bool>,
    /// Its layers from the lowest up.
    pub layers: Vec<ImageLayerStatus>,
}

/// One layer of an image.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ImageLayerStatus {
    /// Digest of its blob.
    pub digest: String,
    /// Whether Lazuli serves it.
    pub live: bool,
    /// Why Lazuli does not serve it, if that was tried.
    pub refused: Option<String>,
}

/// One live layer.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct LayerStatus {
    /// Digest of its blob.
    pub digest: String,
    /// What it is known by: the digest of its blob if its index was built from that. Layers with the same blob and different ids are shown to
    /// different images.
    #[serde(default)]
    pub id: String,
    /// `estargz`, `zstd:chunked`, `tar`, `tar+gzip` or `tar+zstd`.
    pub format: String,
    /// Whether single ranges of it can be fetched.
    pub lazy: bool,
    /// Where its index came from.
    #[serde(default)]
    pub index: IndexStatus,
    /// Why not.
    #[serde(default)]
    pub not_lazy: Option<String>,
    /// Bytes of its blob in the registry.
    pub blob_bytes: u64,
    /// Uncompressed bytes that it stores.
    pub total_bytes: u64,
    /// How many of them are on the local disk.
    pub present_bytes: u64,
    /// Requests made for its content since the daemon started.
    pub requests: u64,
    /// Bytes fetched for its content since the daemon started.
    pub fetched_bytes: u64,
    /// By what it is shown, or would be now: `file` (EROFS over its file in the cache), `image` (EROFS over FUSE) or `tree`.
    #[serde(default)]
    pub face: String,
    /// Why it is shown as a tree although the image face serves.
    #[serde(default)]
    pub face_reason: Option<String>,
    /// Whether it is mounted by itself. (A container may see it as a part of a chain.)
    #[serde(default)]
    pub mounted: bool,
}

/// Where the index of a layer came from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexStatus {
    /// `image` (its manifest states a table of contents), `built` (here), `shared` (by others), `soci`.
    pub source: String,
    /// Of one from elsewhere: the repository it was found in.
    pub from: Option<String>,
    /// Of one that was not built here: why it was believed.
    pub trust: Option<String>,
    /// Whether the layer was found to be the tar that its image promises: every image that promises the same is shown it.
    #[serde(default)]
    pub proven: bool,
    /// Of one from elsewhere: whether it was found to describe the whole layer, once that was here.
    pub verified: Option<bool>,
    /// Of one that was built here: the repository it was published in.
    pub published: Option<String>,
}

impl From<Option<IndexRecord>> for IndexStatus {
    fn from(record: Option<IndexRecord>) -> Self {
        match record {
            None => IndexStatus {
                source: "image".to_owned(),
                ..IndexStatus::default()
            },
            Some(IndexRecord::Table { .. }) => IndexStatus {
                source: "image".to_owned(),
                trust: Some("named by the manifest".to_owned()),
                ..IndexStatus::default()
            },
            Some(IndexRecord::Built { published }) => IndexStatus {
                source: "built".to_owned(),
                published,
                ..IndexStatus::default()
            },
            Some(IndexRecord::Shared {
                from, trust, verified, ..
            }) => IndexStatus {
                source: "shared".to_owned(),
                from: Some(from),
                trust: Some(trust),
                verified,
                ..IndexStatus::default()
            },
            Some(IndexRecord::Soci {
                from, trust, verified, ..
            }) => IndexStatus {
                source: "soci".to_owned(),
                from: Some(from),
                trust: Some(trust),
                verified,
                ..IndexStatus::default()
            },
        }
    }
}

/// One layer on its way.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct LoadingStatus {
    /// Digest of its blob.
    pub digest: String,
    /// Bytes of its blob.
    pub blob_bytes: u64,
    /// How many of them have arrived.
    pub received_bytes: u64,
}

/// What the document says of a live layer.
fn of_layer(id: &Digest, live: &Live, shown: Shown, belief: Option<Belief>) -> LayerStatus {
    let index = live.layer.index();
    let stats = live.layer.stats();
    let proven = belief
        .as_ref()
        .is_some_and(|belief| belief.proof.is_some() && !belief.is_false());
    LayerStatus {
        digest: live.layer.digest().to_string(),
        id: id.to_string(),
        format: live.format.clone(),
        lazy: index.access() == Access::Ranges,
        index: IndexStatus {
            proven,
            ..belief.and_then(|belief| belief.index).into()
        },
        not_lazy: live.not_lazy.clone(),
        blob_bytes: index.blob_size(),
        total_bytes: stats.total_bytes,
        present_bytes: stats.present_bytes,
        requests: stats.requests,
        fetched_bytes: stats.fetched_bytes,
        face: shown.word.to_owned(),
        face_reason: shown.reason,
        mounted: shown.mounted,
    }
}

/// What the document says of an image; `is_live` tells of the digest of a layer whether Lazuli serves it.
fn of_image(image: ImageRecord, is_live: impl Fn(&str) -> bool) -> ImageStatus {
    let name = match image.names.first() {
        Some(name) => name.clone(),
        // Out of a file: containerd names it once it is unpacked.
        None if image.host.is_empty() => image.manifest.to_string(),
        None => format!("{}/{}", image.host, image.repository),
    };
    let layers = image.layers.into_iter().map(|layer| ImageLayerStatus {
        live: is_live(&layer.digest),
        digest: layer.digest,
        refused: layer.refused,
    });
    ImageStatus {
        name,
        namespace: image.namespace,
        manifest: image.manifest.to_string(),
        complete: None,
        layers: layers.collect(),
    }
}

impl From<&Serving> for FaceStatus {
    fn from(serving: &Serving) -> Self {
        FaceStatus {
            face: serving.face.word().to_owned(),
            reason: serving.reason.clone(),
            metadata_through_fuse: serving.metadata_through_fuse,
            no_mapped_owners: serving.no_mapped_owners.clone(),
        }
    }
}

impl ReadsStatus {
    fn new(waiting: i64, deadlines: Deadlines, face: Face) -> Self {
        ReadsStatus {
            waiting: u64::try_from(waiting).unwrap_or_default(),
            deadline_seconds: deadlines.of(face).as_secs(),
            kernel_limit_seconds: deadlines.kernel.map(|limit| limit.as_secs()),
        }
    }
}

impl Catalog {
    /// The status document as JSON. It blocks: the database is read.
    pub fn status_json(&self) -> String {
        // Serialising plain structs with text keys cannot fail.
        serde_json::to_string_pretty(&self.status()).unwrap_or_default()
    }

    /// The status document. It blocks: the database is read.
    pub fn status(&self) -> Status {
        let faces = self.faces();
        let faces = faces.as_ref();
        let mut layers = self.layers_status(faces);
        layers.sort_by(|a, b| (&a.digest, &a.id).cmp(&(&b.digest, &b.id)));
        let images = self.images().unwrap_or_else(|error| {
            tracing::error!(%error, "images cannot be listed");
            Vec::new()
        });
        let is_live = |digest: &str| layers.iter().any(|layer| layer.digest == digest);
        let images = images.into_iter().map(|image| of_image(image, is_live)).collect();
        let loading = self.loader.fetcher().streams_under_way().into_iter();
        let loading = loading.map(|(digest, received_bytes, blob_bytes)| LoadingStatus {
            digest: digest.to_string(),
            blob_bytes,
            received_bytes,
        });
        let scheduler = self.loader.fetcher().scheduler();
        let hosts = scheduler.hosts().into_iter().map(|load| HostStatus {
            host: load.host,
            requests: load.running,
            request_limit: load.limit,
            request_limit_max: scheduler.most(),
        });
        let mut status = Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            root: self.root.display().to_string(),
            takeovers: self.metrics.takeovers_total.get(),
            cache_bytes: self.loader.cache().used_bytes(),
            cache_max_bytes: self.cache_max_bytes,
            cache_held_bytes: self.loader.cache().held_bytes(),
            cache_replaced_bytes: self.loader.cache().replaced_bytes(),
            problems: self.problems(),
            no_size_limits: quota::missing(&self.root),
            face: faces.map(|faces| faces.serving().into()).unwrap_or_default(),
            reads: faces
                .map(|faces| {
                    ReadsStatus::new(
                        self.metrics.waiting_reads.get(),
                        faces.session().deadlines(),
                        faces.serving().face,
                    )
                })
                .unwrap_or_default(),
            hosts: hosts.collect(),
            images,
            loading: loading.collect(),
            layers,
            chains: faces.map(|faces| self.chains_status(faces)).unwrap_or_default(),
        };
        status.note_completeness(&self.completeness());
        status
    }

    /// What has to be mended by somebody: for [`Status::problems`].
    fn problems(&self) -> Vec<String> {
        self.mount_problem()
            .into_iter()
            .chain(self.registry.problems())
            .collect()
    }

    /// What is wrong with the FUSE mount; `None` if it is where it should be, and served. It does not wait for the mount's answer.
    pub fn mount_problem(&self) -> Option<String> {
        self.faces().as_ref().and_then(|faces| faces.session().problem())
    }

    fn layers_status(&self, faces: Option<&Faces>) -> Vec<LayerStatus> {
        let live = self.read_live();
        let shown = |slot| match faces {
            Some(faces) => faces.shown(slot),
            None => Shown {
                word: "",
                reason: None,
                mounted: false,
            },
        };
        // A layer that looks different on its parents is mounted as it looks there.
        let variants: HashMap<&Digest, Shown> = live
            .values()
            .filter(|live| live.is_variant)
            .map(|live| (&live.of, shown(live.slot)))
            .filter(|(_, shown)| shown.mounted || shown.reason.is_some())
            .collect();
        let from = |live: &Live| self.beliefs.get(live.layer.id());
        live.iter()
            .filter(|(_, live)| !live.is_variant)
            .map(|(digest, live)| {
                let own = shown(live.slot);
                match variants.get(digest) {
                    Some(variant) if !own.mounted => of_layer(digest, live, variant.clone(), from(live)),
                    _ => of_layer(digest, live, own, from(live)),
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_called_by_the_best_name_that_is_known() {
        let manifest = Digest::of(b"manifest");
        let record = |names: &[&str], host: &str, repository: &str| ImageRecord {
            manifest,
            namespace: "default".to_owned(),
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            host: host.to_owned(),
            repository: repository.to_owned(),
            layers: Vec::new(),
        };
        let name = |record| of_image(record, |_| true).name;
        assert_eq!(name(record(&["r.test/a:1", "r.test/a:2"], "r.test", "a")), "r.test/a:1");
        assert_eq!(name(record(&[], "r.test", "a")), "r.test/a");
        assert_eq!(name(record(&[], "", "")), manifest.to_string());
    }
}
