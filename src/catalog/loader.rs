//! From a layer's descriptor to a layer that can be read: the index that is stored already, or the table of contents of an eStargz or
//! zstd:chunked layer ([`super::toc`]), or an index that others share ([`super::shared`]), or one streaming pass over the whole blob.
//! `Catalog` uses it for containerd's layers, and `lazuli mount` for its own.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use super::belief::{self, Belief, Ground};
use super::toc::{self, TocError, TocImage};
use crate::cache::{Cache, CacheError, Key};
use crate::config::FormatsConfig;
use crate::fetch::schedule::Class;
use crate::fetch::{FetchError, Fetcher, Layer, StreamRequest};
use crate::layer::compression::{self, Compression};
use crate::layer::{Access, BlobIndex, Codec, Digest};
use crate::registry::{Blob, RegistryError};
use crate::store::IndexRecord;
use crate::sync::blocking;

use super::pace::{self, Hopeless, Hosts};
use super::question;
use super::shared::trust::Policy;
use super::shared::{self, Found, Origin, SharedIndexes};
use super::soci::{self, SociIndexes};

/// What the image says of one layer.
#[derive(Debug, Clone)]
pub struct LayerSpec {
    /// Digest of the blob.
    pub digest: Digest,
    /// Bytes of the blob.
    pub size: u64,
    /// Media type.
    pub media_type: String,
    /// Annotations of the descriptor.
    pub annotations: BTreeMap<String, String>,
    /// Whether the descriptor points to other places (`urls`), as foreign layers do.
    pub foreign: bool,
    /// Digest of the uncompressed layer, from the image's configuration.
    pub diff_id: Option<Digest>,
}

/// The word for a layer of which nothing was made, because containerd unpacks it and was lent its blob.
pub(super) const BLOB_ONLY: &str = "lent";

/// Why a layer is not served by Lazuli.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{text}")]
pub struct Refusal {
    /// One word of a fixed set, for metrics: `encrypted`, `foreign`, `nydus`, `media-type`, `format`, `corrupt`, `source`, `silent`, `slow`,
    /// `disk`, `unresolved`, `closed`; and `lent`, which is not counted.
    pub word: &'static str,
    /// The whole reason, for people.
    pub text: String,
    /// Whether trying again later may help.
    pub retry_helps: bool,
}

impl Refusal {
    /// An image or layer that could not even be identified.
    pub fn unresolved(text: impl Into<String>, retry_helps: bool) -> Self {
        Refusal {
            word: "unresolved",
            text: text.into(),
            retry_helps,
        }
    }

    /// Whether nothing was made of the layer because its blob was for containerd alone: there it can be had.
    pub(super) fn is_blob_only(&self) -> bool {
        self.word == BLOB_ONLY
    }

    fn of_registry(error: &RegistryError) -> Self {
        Refusal {
            word: "source",
            text: error.to_string(),
            retry_helps: error.retry_helps(),
        }
    }

    fn of_cache(error: &CacheError) -> Self {
        Refusal {
            word: "disk",
            text: error.to_string(),
            retry_helps: true,
        }
    }

    fn of_fetch(error: &FetchError) -> Self {
        let (word, retry_helps) = match error {
            FetchError::Source { source, .. } => ("source", source.retry_helps()),
            FetchError::Corrupt { source, .. } if source.retry_helps() => ("corrupt", true),
            FetchError::Corrupt { .. } => ("format", false),
            FetchError::Disk { .. } => ("disk", true),
            FetchError::Deadline { .. } => ("source", true),
            FetchError::BlobOnly { .. } => (BLOB_ONLY, true),
            FetchError::Closed { .. } => ("closed", true),
        };
        Refusal {
            word,
            text: error.to_string(),
            retry_helps,
        }
    }
}

/// Why a layer that Lazuli serves is streamed as a whole, instead of being read where it is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotLazy {
    /// One word of a fixed set, for metrics: `small`, `plain`, `zstd`, `toc`, `legacy`, `external`, `ranges`, `applied`.
    pub word: &'static str,
    /// The whole reason, for people; it completes "streamed, as ...".
    pub text: String,
}

impl NotLazy {
    /// Why a layer is streamed, as far as its descriptor tells; `None` if nothing of it is a reason.
    pub fn of_spec(spec: &LayerSpec) -> Option<Self> {
        let because = |word, text: &str| {
            Some(NotLazy {
                word,
                text: text.to_owned(),
            })
        };
        match toc::kind(spec) {
            Err(error) => because("toc", &format!("its annotations cannot be true: {error}")),
            Ok(Some(_)) if spec.size < toc::STREAM_BELOW => {
                because("small", "it is so small that one request brings all of it")
            }
            Ok(Some(_)) => None,
            Ok(None) => match supported(spec) {
                Ok(Compression::Zstd) => because("zstd", "its zstd frame can only be read from the beginning"),
                _ => because("plain", "its manifest names no table of contents"),
            },
        }
    }

    /// Of a layer that containerd has fetched and has applied.
    pub(super) fn applied() -> Self {
        NotLazy {
            word: "applied",
            text: "containerd had fetched it".to_owned(),
        }
    }

    fn of_toc(error: &TocError) -> Self {
        let (word, text) = match error {
            TocError::Legacy => ("legacy", error.to_string()),
            TocError::Elsewhere(_) => ("external", error.to_string()),
            error => ("toc", format!("its table of contents cannot be used: {error}")),
        };
        NotLazy { word, text }
    }
}

/// A layer that was loaded.
pub struct Loaded {
    /// The layer.
    pub layer: Arc<Layer>,
    /// Bytes at the beginning of its data space that the image's author wants to be fetched ahead; they are not asked for yet.
    pub prefetch: u64,
    /// Why it was streamed, if it was just now.
    pub streamed: Option<NotLazy>,
    /// Where its index came from, if that was found out now.
    pub index: Option<IndexRecord>,
}

impl Loaded {
    /// One that nothing is to be remembered of.
    fn plain(layer: Arc<Layer>) -> Self {
        Loaded {
            layer,
            prefetch: 0,
            streamed: None,
            index: None,
        }
    }
}

/// How a layer is asked for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Asked<'a> {
    /// Where to look for shared indexes; without it none is looked for.
    pub origin: Option<&'a Origin>,
    /// Where its blob comes from, empty if that is not known.
    pub host: &'a str,
    /// Whether containerd may be lent the blob as it comes: that it will not be there in time is no reason not to begin then.
    pub lendable: bool,
}

/// What is known of a layer, as one image may see it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Judged {
    /// Ids that may be shown to it, and why, the best first.
    pub usable: Vec<(Ground, Digest)>,
    /// Ids that may not, though they may be found on the way: false ones, and those of others.
    pub refused: Vec<Digest>,
    /// Digest of the blob's tar, if it was found out.
    pub proof: Option<Digest>,
}

/// Makes layers readable.
#[derive(Clone)]
pub struct Loader {
    cache: Arc<Cache>,
    fetcher: Arc<Fetcher>,
    formats: FormatsConfig,
    shared: Option<Arc<SharedIndexes>>,
    soci: Option<Arc<SociIndexes>>,
    hosts: Arc<Hosts>,
}

impl Loader {
    /// A loader that keeps indexes and bytes in `cache`, and takes what it needs besides out of the memory of `fetcher`.
    pub fn new(cache: Arc<Cache>, fetcher: Arc<Fetcher>, formats: FormatsConfig) -> Self {
        Loader {
            cache,
            fetcher,
            formats,
            shared: None,
            soci: None,
            hosts: Arc::default(),
        }
    }

    /// The same, which looks for shared indexes before it streams.
    pub fn with_shared(self, shared: Arc<SharedIndexes>) -> Self {
        Loader {
            shared: Some(shared),
            ..self
        }
    }

    /// The same, which looks for SOCI indexes before it looks for others.
    pub fn with_soci(self, soci: Arc<SociIndexes>) -> Self {
        Loader {
            soci: Some(soci),
            ..self
        }
    }

    /// The same, which asks what is known of hosts before it asks them.
    pub(super) fn with_hosts(self, hosts: Arc<Hosts>) -> Self {
        Loader { hosts, ..self }
    }

    /// The cache it works with.
    pub fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// The fetcher it works with.
    pub fn fetcher(&self) -> &Arc<Fetcher> {
        &self.fetcher
    }

    /// The layer with this id whose index is stored, without asking the network; `None` if it has to be loaded. It blocks, and may decode a
    /// large index.
    ///
    /// # Errors
    /// [`Refusal`] when the disk fails.
    pub fn stored(&self, key: Key, blob: Arc<dyn Blob>) -> Result<Option<Arc<Layer>>, Refusal> {
        let cached = self.cache.get(key).map_err(|error| Refusal::of_cache(&error))?;
        Ok(cached.map(|cached| self.fetcher.open(cached, blob)))
    }

    /// Ids of the layer that the image itself vouches for (or its client, or the configuration for its manifest), in the order in which they are
    /// tried when it is loaded.
    pub fn vouched(&self, spec: &LayerSpec, origin: &Origin) -> Vec<Digest> {
        let table = match (NotLazy::of_spec(spec), toc::kind(spec)) {
            (None, Ok(Some(kind))) => Some(belief::Kind::Table.id(&spec.digest, &kind.digest())),
            _ => None,
        };
        let soci = self.soci.as_ref().and_then(|soci| soci.vouched(spec, origin));
        let shared = self.shared.as_ref().and_then(|shared| shared.vouched(spec, origin));
        [table, soci, shared].into_iter().flatten().collect()
    }

    /// Whether what is found for the layer depends on the image's manifest and where it comes from, because indexes beside it may be believed.
    pub fn may_find_beside(&self, spec: &LayerSpec, origin: &Origin) -> bool {
        let soci = self.soci.as_ref().is_some_and(|soci| soci.may_find(spec, origin));
        soci || self.shared.as_ref().is_some_and(|shared| shared.may_find(spec, origin))
    }

    /// Whose indexes are believed; `None` if no shared ones are looked for.
    pub fn policy(&self) -> Option<&Policy> {
        self.shared.as_ref().map(|shared| shared.policy())
    }

    /// What of `known` may be shown to the image, the best first, and what was found to be false.
    pub fn judge(&self, known: Vec<Belief>, spec: &LayerSpec, origin: &Origin) -> Judged {
        let vouched = self.vouched(spec, origin);
        let mut judged = Judged::default();
        // What the image vouches for may be in the cache though nothing is recorded of it.
        let is_known = |id: &Digest| known.iter().any(|belief| belief.id == *id);
        let unknown = vouched.iter().filter(|id| !is_known(id));
        judged.usable.extend(unknown.map(|id| (Ground::Image, *id)));
        for belief in &known {
            match belief.ground(spec, origin, &vouched, self.policy()) {
                Some(ground) => judged.usable.push((ground, belief.id)),
                None => judged.refused.push(belief.id),
            }
            if belief.id == spec.digest {
                judged.proof = belief.proof;
            }
        }
        let rank = |id: &Digest| vouched.iter().position(|vouched| vouched == id);
        judged.usable.sort_by_key(|(ground, id)| (*ground, rank(id)));
        judged
    }

    /// What one image alone says of a layer, where nothing else is known.
    pub fn alone(&self, spec: &LayerSpec) -> Judged {
        let vouched = self.vouched(spec, &Origin::default()).into_iter();
        let mut usable = vec![(Ground::Built, spec.digest)];
        usable.extend(vouched.map(|id| (Ground::Image, id)));
        Judged {
            usable,
            ..Judged::default()
        }
    }

    /// A readable layer: from a stored index that may be shown to the image, as `judged` says; else from its table of contents, else from an index
    /// that others share, else streamed. Waits for the network. If the table is in another image, it is looked for in `images`.
    ///
    /// # Errors
    /// [`Refusal`] says why Lazuli cannot serve it.
    pub async fn load(
        &self,
        spec: &LayerSpec,
        blob: Arc<dyn Blob>,
        images: &[TocImage],
        asked: Asked<'_>,
        judged: &Judged,
    ) -> Result<Loaded, Refusal> {
        let Asked { origin, host, lendable } = asked;
        if let Some(proof) = judged.proof {
            keeps_its_promise(spec, proof)?;
        }
        let (loader, usable, blob_of_it, digest) =
            (self.clone(), judged.usable.clone(), Arc::clone(&blob), spec.digest);
        let stored = blocking(move || {
            let stored = |(_, id): (Ground, Digest)| {
                let key = Key { id, blob: digest };
                loader.stored(key, Arc::clone(&blob_of_it)).transpose()
            };
            usable.into_iter().find_map(stored).transpose()
        });
        if let Some(layer) = stored.await? {
            return Ok(Loaded::plain(layer));
        }
        supported(spec)?;
        if self.hosts.is_silent(host, Instant::now()) {
            return Err(silent(host));
        }
        let not_lazy = match (NotLazy::of_spec(spec), toc::kind(spec)) {
            // Never so, unless somebody has compared a table with its layer.
            (None, Ok(Some(kind)))
                if judged
                    .refused
                    .contains(&belief::Kind::Table.id(&spec.digest, &kind.digest())) =>
            {
                Some(NotLazy {
                    word: "toc",
                    text: "its table of contents was found not to describe it".to_owned(),
                })
            }
            (None, Ok(Some(kind))) => match self.load_lazily(spec, &blob, kind, images).await? {
                Ok(loaded) => return Ok(loaded),
                Err(not_lazy) => Some(not_lazy),
            },
            (not_lazy, _) => not_lazy,
        };
        if let (Some(soci), Some(origin)) = (&self.soci, origin)
            && let Some(found) = soci.find(spec, origin).await
            && !judged.refused.contains(&found.id)
        {
            return self.take_soci(spec, blob, found).await;
        }
        if let (Some(shared), Some(origin)) = (&self.shared, origin)
            && let Some(found) = shared.find(spec, origin).await
            && !judged.refused.contains(&found.id())
        {
            return self.take(spec, blob, found).await;
        }
        match self.hosts.hopeless(host, spec.size, pace::BOUND, Instant::now()) {
            Some(Hopeless::Silent) => return Err(silent(host)),
            Some(Hopeless::Slow(pace)) if !lendable => {
                return Err(Refusal {
                    word: "slow",
                    text: question::too_slow(host, spec.size, pace),
                    retry_helps: true,
                });
            }
            _ => {}
        }
        if let Some(NotLazy { word, text }) = &not_lazy {
            tracing::info!(layer = %spec.digest, word, reason = text, "is streamed");
        }
        let loaded = self.build(spec, blob, lendable).await?;
        Ok(Loaded {
            streamed: not_lazy,
            ..loaded
        })
    }

    /// The layer as its blob says, whatever anybody else says of it: the index is built by streaming all of it, and the blob is kept as it comes
    /// if it is `lendable`.
    ///
    /// # Errors
    /// [`Refusal`] says why Lazuli cannot serve it.
    pub async fn build(&self, spec: &LayerSpec, blob: Arc<dyn Blob>, lendable: bool) -> Result<Loaded, Refusal> {
        let compression = supported(spec)?;
        let request = StreamRequest {
            digest: spec.digest,
            blob: Arc::clone(&blob),
            compression,
            diff_id: spec.diff_id,
            what: blob.describe(),
            keep: lendable,
        };
        let cached = self
            .fetcher
            .stream(request)
            .await
            .map_err(|error| Refusal::of_fetch(&error))?;
        // Another image's stream may have made it.
        if let Some(actual) = cached.diff_id() {
            keeps_its_promise(spec, actual)?;
        }
        let layer = self.fetcher.open(cached, blob);
        layer.count(1, spec.size);
        Ok(Loaded {
            index: Some(IndexRecord::Built { published: None }),
            ..Loaded::plain(layer)
        })
    }

    /// Puts a layer into the cache whose index others share.
    async fn take(&self, spec: &LayerSpec, blob: Arc<dyn Blob>, found: Found) -> Result<Loaded, Refusal> {
        let (cache, size) = (Arc::clone(&self.cache), found.candidate.size);
        let key = Key {
            id: found.id(),
            blob: spec.digest,
        };
        let index = IndexRecord::Shared {
            from: shared::name_of(&found.candidate.place),
            trust: found.trust.to_string(),
            digest: found.candidate.digest,
            verified: None,
            place: Some(found.candidate.place),
            signature: found.candidate.signature,
        };
        let portable = found.portable;
        let inserted = tokio::task::spawn_blocking(move || portable.insert(&cache, key)).await;
        let cached = match inserted {
            Ok(inserted) => inserted.map_err(|error| Refusal::of_cache(&error))?,
            Err(_) => return Err(Refusal::unresolved("storing its index was interrupted", true)),
        };
        let layer = self.fetcher.open(cached, blob);
        layer.count(1, size);
        Ok(Loaded {
            index: Some(index),
            ..Loaded::plain(layer)
        })
    }

    /// Puts a layer into the cache that has a SOCI index, and has fetched ahead what that asks for.
    async fn take_soci(&self, spec: &LayerSpec, blob: Arc<dyn Blob>, found: soci::Found) -> Result<Loaded, Refusal> {
        let cache = Arc::clone(&self.cache);
        let key = Key {
            id: found.id,
            blob: spec.digest,
        };
        let (index, windows) = (found.index, found.windows);
        let inserted = tokio::task::spawn_blocking(move || cache.insert_with_windows(key, index, &windows)).await;
        let cached = match inserted {
            Ok(inserted) => inserted.map_err(|error| Refusal::of_cache(&error))?,
            Err(_) => return Err(Refusal::unresolved("storing its index was interrupted", true)),
        };
        let layer = self.fetcher.open(cached, blob);
        layer.count(1, found.bytes);
        for (offset, len) in found.prefetch {
            layer.prefetch(offset, len);
        }
        Ok(Loaded {
            index: Some(found.record),
            ..Loaded::plain(layer)
        })
    }

    /// The layer by its table of contents, or why that cannot be.
    async fn load_lazily(
        &self,
        spec: &LayerSpec,
        blob: &Arc<dyn Blob>,
        kind: toc::Kind,
        images: &[TocImage],
    ) -> Result<Result<Loaded, NotLazy>, Refusal> {
        let stated = kind.digest();
        let key = Key {
            id: belief::Kind::Table.id(&spec.digest, &stated),
            blob: spec.digest,
        };
        let scheduled = self.fetcher.scheduled(Arc::clone(blob), Class::Demand);
        let read = toc::read(spec, &scheduled, kind, &self.formats, images, self.fetcher.memory());
        let table = match tokio::time::timeout(toc::DEADLINE, read).await {
            Ok(Ok(table)) => table,
            Ok(Err(TocError::Registry(error @ RegistryError::NoRanges { .. }))) => {
                return Ok(Err(NotLazy {
                    word: "ranges",
                    text: error.to_string(),
                }));
            }
            // The registry cannot deliver; streaming would ask the same registry for more.
            Ok(Err(TocError::Registry(error))) => return Err(Refusal::of_registry(&error)),
            Ok(Err(error)) => return Ok(Err(NotLazy::of_toc(&error))),
            Err(_) => {
                let text = format!(
                    "its table of contents did not arrive within {} s",
                    toc::DEADLINE.as_secs()
                );
                return Err(Refusal {
                    word: "source",
                    text,
                    retry_helps: true,
                });
            }
        };
        let (cache, index) = (Arc::clone(&self.cache), table.toc.index);
        let inserted = tokio::task::spawn_blocking(move || cache.insert(key, index)).await;
        let cached = match inserted {
            Ok(inserted) => inserted.map_err(|error| Refusal::of_cache(&error))?,
            Err(_) => return Err(Refusal::unresolved("storing its index was interrupted", true)),
        };
        let layer = self.fetcher.open(cached, Arc::clone(blob));
        layer.count(table.requests, table.bytes);
        Ok(Ok(Loaded {
            prefetch: table.toc.prefetch,
            index: Some(IndexRecord::Table { digest: stated }),
            ..Loaded::plain(layer)
        }))
    }
}

fn silent(host: &str) -> Refusal {
    Refusal {
        word: "silent",
        text: format!("{host} did not answer a moment ago, and is not waited for"),
        retry_helps: true,
    }
}

/// Refuses a layer whose image promises another tar than its blob, which is right, holds.
fn keeps_its_promise(spec: &LayerSpec, actual: Digest) -> Result<(), Refusal> {
    match spec.diff_id {
        Some(promised) if promised != actual => Err(Refusal {
            word: "format",
            text: format!("the tar has digest {actual}, and the image says its diff id is {promised}"),
            retry_helps: false,
        }),
        _ => Ok(()),
    }
}

/// How the layer says it is compressed (its first bytes decide), or why it is of no kind that Lazuli reads.
fn supported(spec: &LayerSpec) -> Result<Compression, Refusal> {
    let annotated = compression::annotations_refusal(spec.annotations.keys().map(String::as_str));
    let refused = |refusal: compression::Refusal| Refusal {
        word: refusal.word(),
        text: format!("{refusal} ({}) is not supported", spec.media_type),
        retry_helps: false,
    };
    if let Some(refusal) = annotated.or_else(|| compression::refusal(&spec.media_type)) {
        return Err(refused(refusal));
    }
    match compression::media_type(&spec.media_type) {
        Ok(media) if media.nondistributable && spec.foreign => Err(refused(compression::Refusal::Foreign)),
        Ok(media) => Ok(media.compression.unwrap_or(Compression::None)),
        Err(error) => Err(Refusal {
            word: "media-type",
            text: error.to_string(),
            retry_helps: false,
        }),
    }
}

/// The name of a layer's format, as `status` shows it.
pub fn format_name(spec: &LayerSpec, index: &BlobIndex) -> String {
    let plain = match supported(spec) {
        Ok(Compression::None) => "tar",
        Ok(Compression::Zstd) => "tar+zstd",
        Ok(Compression::Gzip) | Err(_) => "tar+gzip",
    };
    let has_table = matches!(toc::kind(spec), Ok(Some(_)));
    let name = match (index.access(), index.codec()) {
        (Access::Ranges, Codec::Gzip) if has_table => "estargz",
        (Access::Ranges, Codec::Zstd) if has_table => "zstd:chunked",
        _ => plain,
    };
    name.to_owned()
}
