//! The status document: what `lazuli status`, `GET /status` and the end of `lazuli pull` tell.

use serde::{Deserialize, Serialize};

use super::Live;
use crate::fetch::LayerData as _;
use crate::layer::{Access, Digest};
use crate::store::{ImageRecord, IndexRecord};

/// Everything the daemon serves now.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    /// Its root directory.
    pub root: String,
    /// Bytes of layer data on disk.
    pub cache_bytes: u64,
    /// Most bytes it may keep; 0 means as many as the disk allows.
    pub cache_max_bytes: u64,
    /// Images that were pulled through Lazuli.
    pub images: Vec<ImageStatus>,
    /// Layers that are live.
    pub layers: Vec<LayerStatus>,
    /// Layers that are being made live at this moment.
    pub loading: Vec<LoadingStatus>,
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
    /// `estargz`, or `stream` with its compression: how its bytes are had.
    pub format: String,
    /// Whether single ranges of it can be fetched.
    pub lazy: bool,
    /// Where its index came from.
    #[serde(default)]
    pub index: IndexStatus,
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
}

/// Where the index of a layer came from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexStatus {
    /// `image` (it is part of the image), `built` (here), `shared` (by others).
    pub source: String,
    /// Of a shared one: the repository it was found in.
    pub from: Option<String>,
    /// Of a shared one: why it was believed.
    pub trust: Option<String>,
    /// Of a shared one: whether it was found to describe the whole layer, once that was here.
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
                published: None,
            },
            Some(IndexRecord::Soci { from, trust, .. }) => IndexStatus {
                source: "soci".to_owned(),
                from: Some(from),
                trust: Some(trust),
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
pub(super) fn of_layer(digest: &Digest, live: &Live, from: Option<IndexRecord>) -> LayerStatus {
    let index = live.layer.index();
    let stats = live.layer.stats();
    LayerStatus {
        digest: digest.to_string(),
        format: live.format.clone(),
        lazy: index.access() == Access::Ranges,
        index: from.into(),
        blob_bytes: index.blob_size(),
        total_bytes: stats.total_bytes,
        present_bytes: stats.present_bytes,
        requests: stats.requests,
        fetched_bytes: stats.fetched_bytes,
    }
}

/// What the document says of an image; `is_live` tells of the digest of a layer whether Lazuli serves it.
pub(super) fn of_image(image: ImageRecord, is_live: impl Fn(&str) -> bool) -> ImageStatus {
    let name = image
        .names
        .first()
        .cloned()
        .unwrap_or_else(|| format!("{}/{}", image.host, image.repository));
    let layers = image.layers.into_iter().map(|layer| ImageLayerStatus {
        live: is_live(&layer.digest),
        digest: layer.digest,
        refused: layer.refused,
    });
    ImageStatus {
        name,
        namespace: image.namespace,
        manifest: image.manifest.to_string(),
        layers: layers.collect(),
    }
}
