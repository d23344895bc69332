//! From a layer's descriptor to a layer that can be read: the index that is stored already, or the eStargz table of contents, or an
//! index that others share, or one streaming pass over the whole blob. `Catalog` uses it for containerd's layers, and `lazuli mount` for its own.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;

use crate::cache::{Cache, CacheError};
use crate::fetch::{FetchError, Fetcher, Layer, StreamRequest};
use crate::layer::compression::{self, Compression};
use crate::layer::estargz;
use crate::layer::{Access, Codec, Digest, LayerError, LayerIndex};
use crate::registry::{Blob, RegistryError};
use crate::store::IndexRecord;

use super::shared::{self, Found, Origin, SharedIndexes};
use super::soci::{self, SociIndexes};

/// Annotation (and label) with the digest of an eStargz layer's table of contents.
pub const TOC_DIGEST_ANNOTATION: &str = "containerd.io/snapshot/stargz/toc.digest";
/// An eStargz layer whose blob is smaller than this (bytes) is streamed: one request brings all of it, where its table of contents
/// alone would take one or two.
const STREAM_BELOW: u64 = 256 << 10;
/// The end of the blob that is read in the hope that the whole table of contents lies in it: this share of the blob (tables of Debian's
/// packages take between 1/207 and 1/167) ...
const TAIL_SHARE: u64 = 128;
/// ... but at least so many bytes ...
const TAIL_MIN: u64 = 32 << 10;
/// ... and at most so many.
const TAIL_MAX: u64 = 1 << 20;
/// Longest wait for a table of contents: a source that drips must not hold up a pull for ever. 1 MiB takes 84 s at 100 kbit/s.
const TOC_DEADLINE: Duration = Duration::from_secs(300);
/// Largest compressed table of contents, in bytes. A million files take about 60 MiB.
const TOC_MAX: u64 = 128 << 20;

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

/// Why a layer is not served by Lazuli.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{text}")]
pub struct Refusal {
    /// One word of a fixed set, for metrics: `encrypted`, `foreign`, `nydus`, `media-type`, `format`, `corrupt`, `source`, `disk`,
    /// `unresolved`, `closed`.
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
            FetchError::Closed { .. } => ("closed", true),
        };
        Refusal {
            word,
            text: error.to_string(),
            retry_helps,
        }
    }
}

/// Makes layers readable.
#[derive(Clone)]
pub struct Loader {
    cache: Arc<Cache>,
    fetcher: Arc<Fetcher>,
    shared: Option<Arc<SharedIndexes>>,
    soci: Option<Arc<SociIndexes>>,
}

/// A layer that can be read, and what is to be remembered of its index.
pub struct Loaded {
    /// The layer.
    pub layer: Arc<Layer>,
    /// Where its index came from, if that was found out now.
    pub index: Option<IndexRecord>,
}

impl Loader {
    /// A loader that keeps indexes and bytes in `cache`.
    pub fn new(cache: Arc<Cache>, fetcher: Arc<Fetcher>) -> Self {
        Loader {
            cache,
            fetcher,
            shared: None,
            soci: None,
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

    /// The cache it works with.
    pub fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// The fetcher it works with.
    pub fn fetcher(&self) -> &Arc<Fetcher> {
        &self.fetcher
    }

    /// A layer whose index is stored, without asking the network; `None` if it has to be loaded.
    ///
    /// # Errors
    /// [`Refusal`] when the disk fails.
    pub fn stored(&self, spec: &LayerSpec, blob: Arc<dyn Blob>) -> Result<Option<Arc<Layer>>, Refusal> {
        let cached = self
            .cache
            .get(&spec.digest)
            .map_err(|error| Refusal::of_cache(&error))?;
        Ok(cached.map(|cached| self.fetcher.open(cached, blob)))
    }

    /// A readable layer: from the stored index, else from its eStargz table of contents, else from an index that others share, else
    /// streamed. Waits for the network. `origin` says where to look for shared indexes; without it none is looked for.
    ///
    /// # Errors
    /// [`Refusal`] says why Lazuli cannot serve it.
    pub async fn load(
        &self,
        spec: &LayerSpec,
        blob: Arc<dyn Blob>,
        origin: Option<&Origin>,
    ) -> Result<Loaded, Refusal> {
        if let Some(layer) = self.stored(spec, Arc::clone(&blob))? {
            return Ok(Loaded { layer, index: None });
        }
        let compression = supported(spec)?;
        if let Some(toc_digest) = toc_digest(spec) {
            let toc = tokio::time::timeout(TOC_DEADLINE, self.estargz(spec, &blob, &toc_digest?)).await;
            match toc.unwrap_or(Err(TocError::Slow)) {
                Ok(toc) => {
                    let (cache, digest) = (Arc::clone(&self.cache), spec.digest);
                    let inserted = tokio::task::spawn_blocking(move || cache.insert(&digest, toc.index)).await;
                    let cached = match inserted {
                        Ok(inserted) => inserted.map_err(|error| Refusal::of_cache(&error))?,
                        Err(_) => return Err(Refusal::unresolved("storing its index was interrupted", true)),
                    };
                    let layer = self.fetcher.open(cached, blob);
                    layer.count(toc.requests, toc.bytes);
                    return Ok(Loaded { layer, index: None });
                }
                // The registry cannot deliver; streaming would ask the same registry for more.
                Err(TocError::Registry(error)) => return Err(Refusal::of_registry(&error)),
                Err(TocError::Slow) => {
                    let text = format!(
                        "its table of contents did not arrive within {} s",
                        TOC_DEADLINE.as_secs()
                    );
                    return Err(Refusal {
                        word: "source",
                        text,
                        retry_helps: true,
                    });
                }
                Err(TocError::Layer(error)) => {
                    tracing::warn!(layer = %spec.digest, %error, "cannot be read as eStargz, will be streamed");
                }
            }
        }
        if let (Some(soci), Some(origin)) = (&self.soci, origin)
            && let Some(found) = soci.find(spec, origin).await
        {
            return self.take_soci(spec, blob, found).await;
        }
        if let (Some(shared), Some(origin)) = (&self.shared, origin)
            && let Some(found) = shared.find(spec, origin).await
        {
            return self.take(spec, blob, found).await;
        }
        let request = StreamRequest {
            digest: spec.digest,
            blob: Arc::clone(&blob),
            compression,
            diff_id: spec.diff_id,
            what: blob.describe(),
        };
        let cached = self
            .fetcher
            .stream(request)
            .await
            .map_err(|error| Refusal::of_fetch(&error))?;
        let layer = self.fetcher.open(cached, blob);
        layer.count(1, spec.size);
        let index = Some(IndexRecord::Built { published: None });
        Ok(Loaded { layer, index })
    }

    /// Puts a layer into the cache whose index others share.
    async fn take(&self, spec: &LayerSpec, blob: Arc<dyn Blob>, found: Found) -> Result<Loaded, Refusal> {
        let (cache, digest, size) = (Arc::clone(&self.cache), spec.digest, found.candidate.size);
        let index = IndexRecord::Shared {
            from: shared::name_of(&found.candidate.place),
            trust: found.trust.to_string(),
            digest: found.candidate.digest,
            verified: None,
        };
        let inserted = tokio::task::spawn_blocking(move || found.portable.insert(&cache, &digest)).await;
        let cached = match inserted {
            Ok(inserted) => inserted.map_err(|error| Refusal::of_cache(&error))?,
            Err(_) => return Err(Refusal::unresolved("storing its index was interrupted", true)),
        };
        let layer = self.fetcher.open(cached, blob);
        layer.count(1, size);
        let index = Some(index);
        Ok(Loaded { layer, index })
    }

    /// Puts a layer into the cache that has a SOCI index, and has fetched ahead what that asks for.
    async fn take_soci(&self, spec: &LayerSpec, blob: Arc<dyn Blob>, found: soci::Found) -> Result<Loaded, Refusal> {
        let (cache, digest) = (Arc::clone(&self.cache), spec.digest);
        let (index, windows) = (found.index, found.windows);
        let inserted = tokio::task::spawn_blocking(move || cache.insert_with_windows(&digest, index, &windows)).await;
        let cached = match inserted {
            Ok(inserted) => inserted.map_err(|error| Refusal::of_cache(&error))?,
            Err(_) => return Err(Refusal::unresolved("storing its index was interrupted", true)),
        };
        let layer = self.fetcher.open(cached, blob);
        layer.count(1, found.bytes);
        for (offset, len) in found.prefetch {
            layer.prefetch(offset, len);
        }
        let index = Some(found.record);
        Ok(Loaded { layer, index })
    }

    async fn estargz(&self, spec: &LayerSpec, blob: &Arc<dyn Blob>, expected: &Digest) -> Result<Toc, TocError> {
        let tail_len = (spec.size / TAIL_SHARE).clamp(TAIL_MIN, TAIL_MAX).min(spec.size);
        let tail_start = spec.size - tail_len;
        let tail = read(blob, tail_start, spec.size).await?;
        let footer = &tail[tail.len().saturating_sub(estargz::FOOTER_LEN_MAX)..];
        let location = estargz::find_toc(footer, spec.size, false)?
            .ok_or_else(|| LayerError::malformed("eStargz footer", tail_start, "there is none"))?;
        if location.len > TOC_MAX {
            let what = "compressed size of the eStargz TOC";
            return Err(LayerError::TooLarge {
                what,
                value: location.len,
                limit: TOC_MAX,
            }
            .into());
        }
        // `find_toc` has checked that the table lies within the blob.
        let (start, end) = (location.offset, location.offset + location.len);
        let (mut requests, mut bytes) = (1, tail_len);
        let member = if start >= tail_start {
            tail.slice((start - tail_start) as usize..(end - tail_start) as usize)
        } else {
            let head = read(blob, start, tail_start.min(end)).await?;
            requests += 1;
            bytes += head.len() as u64;
            let rest = &tail[..end.saturating_sub(tail_start) as usize];
            Bytes::from([&head[..], rest].concat())
        };
        let (blob_size, expected) = (spec.size, *expected);
        let parsed =
            tokio::task::spawn_blocking(move || estargz::index_from_toc(&member, start, blob_size, &expected)).await;
        let index =
            parsed.unwrap_or_else(|panic| Err(LayerError::malformed("eStargz TOC", start, panic.to_string())))?;
        Ok(Toc { index, requests, bytes })
    }
}

/// An index made of a table of contents, and what it took.
struct Toc {
    index: LayerIndex,
    requests: u64,
    bytes: u64,
}

/// Why a table of contents could not be had.
#[derive(Debug, thiserror::Error)]
enum TocError {
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(transparent)]
    Layer(#[from] LayerError),
    #[error("it did not arrive in time")]
    Slow,
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

/// The promised digest of the layer's table of contents, if it has one and is worth being lazy.
fn toc_digest(spec: &LayerSpec) -> Option<Result<Digest, Refusal>> {
    let text = spec.annotations.get(TOC_DIGEST_ANNOTATION)?;
    if spec.size < STREAM_BELOW {
        return None;
    }
    Some(text.parse().map_err(|error| Refusal {
        word: "format",
        text: format!("annotation {TOC_DIGEST_ANNOTATION}: {error}"),
        retry_helps: false,
    }))
}

/// Bytes `start..end` of a blob, all of them.
async fn read(blob: &Arc<dyn Blob>, start: u64, end: u64) -> Result<Bytes, RegistryError> {
    let body = blob.read(start..end).await?;
    let parts: Vec<Bytes> = body.try_collect().await?;
    let bytes = Bytes::from(parts.concat());
    if bytes.len() as u64 != end - start {
        let problem = format!("{} bytes instead of {}", bytes.len(), end - start);
        return Err(RegistryError::Protocol {
            host: blob.describe(),
            what: format!("bytes {start}-{end}"),
            problem,
        });
    }
    Ok(bytes)
}

/// The name of a layer's format, as `status` shows it.
pub fn format_name(spec: &LayerSpec, index: &LayerIndex) -> String {
    let plain = || match supported(spec) {
        Ok(Compression::None) => "tar",
        Ok(Compression::Zstd) => "tar+zstd",
        Ok(Compression::Gzip) | Err(_) => "tar+gzip",
    };
    let name = match (index.access(), index.codec()) {
        (Access::Ranges, Codec::Gzip) => "estargz",
        (Access::Ranges, Codec::None) => "tar",
        (Access::Ranges, Codec::GzipSpans) => "tar+gzip",
        (Access::Ranges, Codec::Zstd) => "tar+zstd",
        (Access::Stream, _) => plain(),
    };
    name.to_owned()
}
