//! SOCI indexes of images: a layer that has a zTOC is lazy without a conversion of its blob.
//!
//! # Where an index is found
//! In this order, and the first that is named counts:
//! - the one that the operator names: the client that pulls, with the label [`LABEL`], or the configuration by the digest of the image's manifest;
//! - the one that the image's manifest names: for one layer in that layer's annotation [`LABEL`] (containerd makes a label of such an annotation,
//!   so that it looks as if a client had given it), or for all in its own annotation [`INDEX_DIGEST`] (SOCI v2);
//! - an artifact about the manifest (SOCI v1), by the referrers API or the tag that stands for it; of several the first.
//!
//! # Whom it may hurt
//! A zTOC decides what a layer's names are, and SOCI verifies nothing but *compressed* spans: who wrote it can show false files. An
//! index that the manifest names is as good as the image. One that merely says it is about the image can have been put there by
//! anybody who may push to its repository, after the image was signed: it is believed only in repositories that the configuration
//! trusts. Where signatures are required, only what the manifest names is believed, as SOCI has none. Searching has a deadline; whatever
//! goes wrong is logged, and the layer is had in another way. A layer that its index leaves out is none of SOCI's business.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;

use super::belief;
use super::loader::LayerSpec;
use super::memory;
use super::shared::trust::{IndexError, Policy};
use super::shared::{Origin, WORTH_FROM, name_of};
use super::sources::Repositories;
use crate::config::IndexConfig;
use crate::layer::{Digest, LayerError, LayerIndex, Windows, soci};
use crate::metrics::Metrics;
use crate::registry::artifact::Artifact;
use crate::registry::image::{LayerDescriptor, Manifest};
use crate::registry::{RegistryError, Source};
use crate::store::{IndexRecord, LayerSource, Voucher};
use crate::sync::{Budget, Share, SingleFlight};

pub mod manifest;

use manifest::{DISABLE_XATTRS, INDEX_DIGEST, LAYER_DIGEST, PREFETCH_TYPE, TYPE_V1, TYPE_V2, ZTOC_TYPE};

/// Label of a snapshot, and annotation of a [`LayerSpec`], with the digest of the index that the client wants to be used.
pub const LABEL: &str = "containerd.io/snapshot/remote/soci.index.digest";
/// Largest zTOC, in bytes. That of a layer of 2 GB has 35 MB.
const MAX_ZTOC: u64 = 256 << 20;
/// Largest list of spans to prefetch, in bytes.
const MAX_PREFETCH: u64 = 1 << 20;
/// Most ranges of spans to prefetch that are looked at.
const MAX_PREFETCH_RANGES: usize = 4096;
/// Most bytes of the data space that a list has fetched ahead: what an image needs at its start, and not all of it.
const PREFETCH_BYTES: u64 = 512 << 20;
/// Longest download of a zTOC that was found in time.
const FETCH_DEADLINE: Duration = Duration::from_secs(60);
/// Repositories of an image that are looked in.
const MAX_PLACES: usize = 2;
/// Artifacts about an image that are opened until one is an index.
const MAX_ARTIFACTS: usize = 4;

/// The annotations of a layer, with what the manifest of its image says of SOCI: layers are loaded one by one.
pub fn annotated(layer: &LayerDescriptor, manifest: &Manifest) -> BTreeMap<String, String> {
    let mut annotations = layer.annotations.clone();
    // In the annotations of a spec, LABEL is the client's.
    let own = annotations.remove(LABEL);
    match own.as_ref().or_else(|| manifest.annotations.get(INDEX_DIGEST)) {
        Some(digest) => annotations.insert(INDEX_DIGEST.to_owned(), digest.clone()),
        None => annotations.remove(INDEX_DIGEST),
    };
    annotations
}

/// An index of a layer, made of its zTOC.
pub struct Found {
    /// The index.
    pub index: LayerIndex,
    /// What its spans are decoded with.
    pub windows: Windows,
    /// Ranges of the data space to fetch ahead: offset and length.
    pub prefetch: Vec<(u64, u64)>,
    /// The layer's id with it.
    pub id: Digest,
    /// What is to be remembered of it.
    pub record: IndexRecord,
    /// Bytes that were fetched for it.
    pub bytes: u64,
    /// Memory for it until it is in the cache.
    pub share: Share,
}

/// Finds SOCI indexes.
pub struct SociIndexes {
    repositories: Repositories,
    policy: Policy,
    enabled: bool,
    /// Digests of indexes by those of manifests.
    named: BTreeMap<Digest, Digest>,
    deadline: Duration,
    metrics: Arc<Metrics>,
    /// Manifests of indexes that are being fetched: the layers of an image are loaded all at once.
    lists: Arc<SingleFlight<(LayerSource, Wanted), Listed>>,
    /// What zTOCs are downloaded to and read in.
    memory: Arc<Budget>,
}

/// Which index is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Wanted {
    /// The one with this digest.
    Index(Digest),
    /// One about the manifest with this digest.
    About(Digest),
}

/// An index and its digest; `None` if there is none.
type Listed = Result<Option<(Digest, Arc<Artifact>)>, RegistryError>;

/// Why no index came of a search: the word of the metric, and for people what went wrong, if something did.
struct Miss(&'static str, Option<String>);

fn failed(word: &'static str, problem: impl ToString) -> Miss {
    Miss(word, Some(problem.to_string()))
}

impl SociIndexes {
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
        if config.require_signature && !config.soci_indexes.is_empty() {
            tracing::warn!(
                "index.soci_indexes is NOT used: SOCI indexes cannot be signed, and index.require_signature wants signatures"
            );
        }
        Ok(Arc::new(SociIndexes {
            repositories: repositories.into(),
            policy: Policy::new(config)?,
            enabled: config.soci,
            named: config.soci_indexes.iter().map(named).collect::<Result<_, _>>()?,
            deadline: config.lookup_deadline,
            metrics,
            lists: SingleFlight::new(),
            memory,
        }))
    }

    /// An index of the layer that can be believed; `None` if there is none, or none in time. It never fails: the log and the metric
    /// tell what went wrong.
    pub async fn find(&self, spec: &LayerSpec, origin: &Origin) -> Option<Found> {
        let (wanted, by) = self.wanted(spec, origin)?;
        let result = self.search(spec, origin, wanted, by).await;
        let word = match &result {
            Ok(_) => "found",
            Err(Miss(word, problem)) => {
                if let Some(problem) = problem {
                    tracing::warn!(layer = %spec.digest, problem, "its SOCI index cannot be used");
                }
                word
            }
        };
        self.metrics.soci_lookups_total.with_label_values(&[word]).inc();
        result.ok()
    }

    /// The layer's id with the index that the image, its client, or the configuration names for it.
    pub fn vouched(&self, spec: &LayerSpec, origin: &Origin) -> Option<Digest> {
        match self.wanted(spec, origin)? {
            (Wanted::Index(digest), _) => Some(belief::Kind::Soci.id(&spec.digest, &digest)),
            (Wanted::About(_), _) => None,
        }
    }

    /// Whether an index of the layer may be found that nobody names, so that it depends on the place.
    pub fn may_find(&self, spec: &LayerSpec, origin: &Origin) -> bool {
        matches!(self.wanted(spec, origin), Some((Wanted::About(_), _)))
    }

    /// Which index to look for, and who says so; `None` if nobody names one, and none about the image would be believed.
    fn wanted(&self, spec: &LayerSpec, origin: &Origin) -> Option<(Wanted, Voucher)> {
        if !self.enabled || spec.size < WORTH_FROM {
            return None;
        }
        let parsed = |key: &str| {
            let text = spec.annotations.get(key)?;
            let digest = text.parse::<Digest>();
            digest
                .inspect_err(|error| tracing::warn!(layer = %spec.digest, key, %error, "names no SOCI index"))
                .ok()
        };
        // Of these the image's manifest, which may be signed, knows nothing.
        let beside = !self.policy.requires_signature();
        if let Some(digest) = parsed(LABEL).filter(|_| beside) {
            return Some((Wanted::Index(digest), Voucher::Client));
        }
        let configured = origin.manifest.and_then(|manifest| self.named.get(&manifest));
        if let Some(digest) = configured.filter(|_| beside) {
            return Some((Wanted::Index(*digest), Voucher::Configuration));
        }
        if let Some(digest) = parsed(INDEX_DIGEST) {
            return Some((Wanted::Index(digest), Voucher::Manifest));
        }
        let believed = origin.sources.iter().any(|place| self.believes(place));
        let manifest = origin.manifest.filter(|_| believed)?;
        Some((Wanted::About(manifest), Voucher::Place))
    }

    /// Whether an index is believed because of where it lies.
    fn believes(&self, place: &LayerSource) -> bool {
        self.policy.trusts_unsigned(place)
    }

    async fn search(&self, spec: &LayerSpec, origin: &Origin, wanted: Wanted, by: Voucher) -> Result<Found, Miss> {
        let trust = trust_of(by);
        let mut miss = Miss("none", None);
        let places = origin.sources.iter();
        let places = places.filter(|place| matches!(wanted, Wanted::Index(_)) || self.believes(place));
        for place in places.take(MAX_PLACES) {
            let listed = tokio::time::timeout(self.deadline, self.list(place, wanted)).await;
            let (digest, artifact) = match listed {
                Ok(Ok(Some(found))) => found,
                Ok(Ok(None)) => continue,
                Ok(Err(error)) => {
                    miss = failed("failed", error);
                    continue;
                }
                Err(_) => {
                    let problem = format!("{} did not tell within {} s", name_of(place), self.deadline.as_secs());
                    miss = failed("failed", problem);
                    continue;
                }
            };
            let of_layer = |blob: &&LayerDescriptor| {
                let of = blob.annotations.get(LAYER_DIGEST);
                of.is_some_and(|of| *of == spec.digest.to_string())
            };
            let mut blobs = artifact.layers.iter().filter(of_layer);
            let Some(ztoc) = blobs.clone().find(|blob| blob.media_type == ZTOC_TYPE) else {
                tracing::debug!(layer = %spec.digest, index = %digest, "its image's SOCI index leaves it out");
                return Err(Miss("left-out", None));
            };
            let source = self.repositories.at(place);
            let ((index, windows), share) = self.fetch(spec, source.as_ref(), ztoc).await?;
            let list = blobs.find(|blob| blob.media_type == PREFETCH_TYPE);
            let prefetch = match list {
                Some(list) => self.prefetch(&index, source.as_ref(), list).await,
                None => Vec::new(),
            };
            tracing::info!(
                layer = %spec.digest, from = name_of(place), trust, index = %digest, bytes = ztoc.size, prefetch = prefetch.len(),
                "has a SOCI index"
            );
            return Ok(Found {
                index,
                windows,
                prefetch,
                id: belief::Kind::Soci.id(&spec.digest, &digest),
                record: IndexRecord::Soci {
                    from: name_of(place),
                    trust: trust.to_owned(),
                    digest,
                    verified: None,
                    place: Some(place.clone()),
                    by,
                },
                bytes: ztoc.size,
                share,
            });
        }
        Err(miss)
    }

    /// The manifest of an index, fetched once for all who ask at the same time.
    async fn list(&self, place: &LayerSource, wanted: Wanted) -> Listed {
        let source = self.repositories.at(place);
        let job = async move {
            match wanted {
                Wanted::Index(digest) => open(source.as_ref(), digest, None).await,
                Wanted::About(manifest) => {
                    let listed = source.referrers(manifest, TYPE_V1).await?;
                    for entry in listed.iter().take(MAX_ARTIFACTS) {
                        if let Some(found) = open(source.as_ref(), entry.digest, Some(manifest)).await? {
                            return Ok(Some(found));
                        }
                    }
                    Ok(None)
                }
            }
        };
        let runtime = tokio::runtime::Handle::current();
        let listed = self.lists.run(&runtime, (place.clone(), wanted), job).await;
        listed.unwrap_or_else(|| {
            Err(RegistryError::Unreachable {
                host: place.host.clone(),
                what: "the search was interrupted".to_owned(),
            })
        })
    }

    /// Downloads and reads a zTOC.
    async fn fetch(
        &self,
        spec: &LayerSpec,
        source: &dyn Source,
        ztoc: &LayerDescriptor,
    ) -> Result<((LayerIndex, Windows), Share), Miss> {
        let limit = MAX_ZTOC.min(spec.size);
        if ztoc.size > limit {
            let problem = format!("it has {} bytes, and more than {limit} are not worth it", ztoc.size);
            return Err(failed("failed", problem));
        }
        let fetch = || async {
            let read = source.read_small(ztoc.digest, ztoc.size, limit);
            match tokio::time::timeout(FETCH_DEADLINE, read).await {
                Ok(bytes) => bytes.map_err(|error| failed("failed", error)),
                Err(_) => {
                    let problem = format!("it did not arrive within {} s", FETCH_DEADLINE.as_secs());
                    Err(failed("failed", problem))
                }
            }
        };
        let need = |bytes: &[u8]| soci::memory_for(bytes).map_err(|error| failed("damaged", error));
        let (bytes, share) = memory::download(&self.memory, ztoc.size, fetch, need).await?;
        let (size, xattrs) = (
            spec.size,
            ztoc.annotations.get(DISABLE_XATTRS).is_none_or(|text| text != "true"),
        );
        let read = memory::read(bytes, share, move |bytes, beside| {
            let (index, windows) = soci::index_from_ztoc_within(bytes, size, xattrs, beside)?;
            // As records, and as the bytes that are stored.
            let memory = 2 * (index.memory() + windows.memory());
            Ok::<_, LayerError>(((index, windows), memory))
        });
        let read = read
            .await
            .ok_or_else(|| failed("damaged", "reading it was interrupted"))?;
        read.map_err(|error| failed("damaged", error))
    }

    /// What the index's author wants to be fetched ahead. A list that cannot be used is none.
    async fn prefetch(&self, index: &LayerIndex, source: &dyn Source, list: &LayerDescriptor) -> Vec<(u64, u64)> {
        let read = source.read_small(list.digest, list.size, MAX_PREFETCH);
        let problem = match tokio::time::timeout(self.deadline, read).await {
            Ok(Ok(bytes)) => match ranges(index, &bytes) {
                Ok(ranges) => return ranges,
                Err(problem) => problem,
            },
            Ok(Err(error)) => error.to_string(),
            Err(_) => "it did not arrive in time".to_owned(),
        };
        tracing::warn!(list = %list.digest, problem, "a list of what to fetch ahead cannot be used");
        Vec::new()
    }
}

/// Why an index is believed, for people.
fn trust_of(by: Voucher) -> &'static str {
    match by {
        Voucher::Manifest => "named by the manifest",
        Voucher::Client => "named by the client",
        Voucher::Configuration => "named by the configuration",
        Voucher::Place => "trusted repository",
        Voucher::Unknown => "not known any more",
    }
}

/// An entry of the configuration's list of indexes.
fn named((manifest, index): (&String, &String)) -> Result<(Digest, Digest), IndexError> {
    let parse = |text: &String| {
        text.parse::<Digest>().map_err(|error| IndexError::Soci {
            name: text.clone(),
            problem: error.to_string(),
        })
    };
    Ok((parse(manifest)?, parse(index)?))
}

/// The index with this digest, if it is one, and about `subject` if that is given.
async fn open(source: &dyn Source, digest: Digest, subject: Option<Digest>) -> Listed {
    let bytes = match source.manifest(&digest.to_string()).await {
        Ok(manifest) => manifest.bytes,
        // Deleted since it was listed, or in another repository.
        Err(RegistryError::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    let artifact = Artifact::parse(&bytes)?;
    let about = artifact.subject.as_ref().map(|of| of.digest);
    let right = matches!(artifact.artifact_type.as_str(), TYPE_V1 | TYPE_V2) && (subject.is_none() || about == subject);
    if !right {
        tracing::debug!(artifact = %digest, "is no SOCI index, or about another image");
    }
    Ok(right.then(|| (digest, Arc::new(artifact))))
}

/// The ranges of the data space that a list of spans means, the most urgent first, within [`PREFETCH_BYTES`].
fn ranges(index: &LayerIndex, json: &[u8]) -> Result<Vec<(u64, u64)>, String> {
    #[derive(Deserialize)]
    struct List {
        version: String,
        prefetch_spans: Vec<Spans>,
    }
    #[derive(Deserialize)]
    struct Spans {
        start_span: u64,
        end_span: u64,
        #[serde(default)]
        priority: i64,
    }
    let mut list: List = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    if list.version != "1.0" {
        return Err("it is of an unknown version".to_owned());
    }
    list.prefetch_spans.sort_by_key(|spans| spans.priority);
    let mut left = PREFETCH_BYTES;
    let mut found = Vec::new();
    for spans in list.prefetch_spans.iter().take(MAX_PREFETCH_RANGES) {
        let chunks = soci::chunks_of_spans(index, spans.start_span, spans.end_span);
        let chunks = index.chunks().get(chunks).unwrap_or_default();
        if let (Some(first), Some(last)) = (chunks.first(), chunks.last()) {
            let len = (last.data_end() - first.data_offset).min(left);
            left -= len;
            if len > 0 {
                found.push((first.data_offset, len));
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_manifest_speaks_for_itself() {
        let descriptor = |annotations: &str| {
            let text = format!(
                r#"{{"digest":"{}","size":1,"annotations":{{{annotations}}}}}"#,
                Digest::of(b"")
            );
            serde_json::from_str::<LayerDescriptor>(&text).unwrap()
        };
        let mut manifest = Manifest {
            media_type: String::new(),
            config: descriptor(""),
            layers: Vec::new(),
            annotations: BTreeMap::new(),
        };
        // SOCI's own annotation is the manifest's to have, not a layer's.
        let layer = descriptor(&format!(r#""{INDEX_DIGEST}":"x","other":"z""#));
        assert_eq!(annotated(&layer, &manifest).into_keys().collect::<Vec<_>>(), ["other"]);
        manifest.annotations.insert(INDEX_DIGEST.to_owned(), "right".to_owned());
        assert_eq!(annotated(&layer, &manifest)[INDEX_DIGEST], "right");
        // What looks like a client's label is the image's word for this layer.
        let layer = descriptor(&format!(r#""{LABEL}":"y""#));
        let annotations = annotated(&layer, &manifest);
        assert_eq!(
            (annotations[INDEX_DIGEST].as_str(), annotations.get(LABEL)),
            ("y", None)
        );
    }

    #[test]
    fn spans_to_fetch_ahead() {
        let ztoc = include_bytes!(
            "../../tests/vectors/soci/v1/blobs/sha256/da691f31c9ac9004b0bb2ea85ed4ea80225913470dd4a0ab1ece1a726acbd7dd"
        );
        let (index, _) = soci::index_from_ztoc(ztoc, 993_607, true).unwrap();
        let chunks = index.chunks();
        let json = br#"{"version":"1.0","prefetch_spans":[{"start_span":3,"end_span":4,"priority":2},{"start_span":0,"end_span":0},
            {"start_span":5,"end_span":2},{"start_span":99999,"end_span":18446744073709551615}]}"#;
        let expected = [
            (0, u64::from(chunks[0].data_len)),
            (chunks[3].data_offset, chunks[4].data_end() - chunks[3].data_offset),
        ];
        assert_eq!(ranges(&index, json).unwrap(), expected);
        for bad in [&b"{}"[..], b"", br#"{"version":"2.0","prefetch_spans":[]}"#] {
            assert!(ranges(&index, bad).is_err());
        }
    }
}
