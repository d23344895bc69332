//! Reads tables of contents out of registries: of eStargz, with the table in the layer or in an image of its own, and of zstd:chunked.
//!
//! What is read is trusted for one reason only: its digest is in the image's manifest; so it is trusted for that image alone, and for those that
//! state the same ([`super::belief`]). A layer of whose table the manifest has no digest
//! is not looked into, it is streamed.

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::TryStreamExt;

use super::loader::LayerSpec;
use super::memory;
use crate::config::FormatsConfig;
use crate::layer::estargz::{self, EXTERNAL_TOC_LAYER_ANNOTATION, EXTERNAL_TOC_SUFFIX, Footer, TOC_DIGEST_ANNOTATION};
use crate::layer::toc::TocLocation;
use crate::layer::zchunked::{self, Promise, TocPlace};
use crate::layer::{Digest, LayerError, TocIndex};
use crate::registry::image::{LayerDescriptor, Manifest};
use crate::registry::{Blob, Reference, RegistryError, Source};
use crate::sync::{Budget, Share};

/// A lazy layer whose blob is smaller than this (bytes) is streamed: one request brings all of it, where its table of contents
/// alone would take one or two.
pub(super) const STREAM_BELOW: u64 = 256 << 10;
/// Longest wait for a table of contents: a source that drips must not hold up a pull for ever. 1 MiB takes 84 s at 100 kbit/s.
pub(super) const DEADLINE: Duration = Duration::from_secs(300);
/// The end of the blob that is read in the hope that the whole table of contents lies in it: this share of the blob (tables of Debian's
/// packages take between 1/207 and 1/167) ...
const TAIL_SHARE: u64 = 128;
/// ... but at least so many bytes ...
const TAIL_MIN: u64 = 32 << 10;
/// ... and at most so many.
const TAIL_MAX: u64 = 1 << 20;
/// Largest compressed table of contents, in bytes. A million files take about 60 MiB.
const TOC_MAX: u64 = 128 << 20;

/// An image that may hold the tables of contents of another image's layers.
#[derive(Clone)]
pub struct TocImage {
    source: Arc<dyn Source>,
    tag: String,
}

impl TocImage {
    /// The image that belongs to the one with this `tag` at `source`. Nothing is asked yet.
    pub fn beside(source: Arc<dyn Source>, tag: &str) -> Self {
        TocImage {
            source,
            tag: format!("{tag}{EXTERNAL_TOC_SUFFIX}"),
        }
    }

    /// The tag of an image's name, if it has one: the digest of an image does not say where its tables are.
    pub fn tag_of(reference: &Reference) -> Option<&str> {
        reference.tag.as_deref()
    }

    /// Where the gzip member with the table of contents of a layer is; `None` if there is no such image, or no such table in it.
    async fn table(&self, layer: &Digest) -> Result<Option<LayerDescriptor>, TocError> {
        let document = match self.source.manifest(&self.tag).await {
            Err(RegistryError::NotFound { .. }) => return Ok(None),
            document => document?,
        };
        let manifest = Manifest::parse(&document.bytes)?;
        let layer = layer.to_string();
        let is_its = |annotation: Option<&String>| annotation.is_some_and(|text| *text == layer);
        let mut tables = manifest.layers.into_iter();
        Ok(tables.find(|table| is_its(table.annotations.get(EXTERNAL_TOC_LAYER_ANNOTATION))))
    }
}

/// An index made of a table of contents, and what it took.
pub(super) struct Table {
    pub toc: TocIndex,
    pub requests: u64,
    pub bytes: u64,
    /// Memory for the index until it is in the cache.
    _share: Share,
}

/// Why a table of contents could not be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum TocError {
    /// The registry cannot deliver.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// It cannot be used.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// It is in a form that has to be allowed.
    #[error("it is of the stargz format before eStargz, which formats.allow_legacy_estargz does not allow")]
    Legacy,
    /// It is in another image, which is not there or not known.
    #[error("its table of contents is in another image: {0}")]
    Elsewhere(String),
}

/// What the manifest promises of a layer's table of contents.
pub(super) enum Kind {
    /// That it has this digest. The layer may be eStargz or zstd:chunked.
    Digest(Digest),
    /// What stands in the annotations of zstd:chunked.
    Chunked(Promise),
}

/// What the annotations of a layer promise; `None` if it is of no lazy kind.
///
/// # Errors
/// [`LayerError`] when they cannot be true.
pub(super) fn kind(spec: &LayerSpec) -> Result<Option<Kind>, LayerError> {
    if let Some(promise) = zchunked::promise(&spec.annotations, spec.size)? {
        return Ok(Some(Kind::Chunked(promise)));
    }
    let Some(text) = spec.annotations.get(TOC_DIGEST_ANNOTATION) else {
        return Ok(None);
    };
    let digest = text.parse().map_err(|error: crate::layer::digest::InvalidDigest| {
        LayerError::malformed("annotation", 0, format!("{TOC_DIGEST_ANNOTATION}: {error}"))
    })?;
    Ok(Some(Kind::Digest(digest)))
}

impl Kind {
    /// Digest of everything that the manifest states, which decides what is read.
    pub fn digest(&self) -> Digest {
        // It becomes a part of ids, which outlive this version.
        let text = match self {
            Kind::Digest(digest) => format!("digest {digest}"),
            Kind::Chunked(Promise { place, compressed, raw }) => {
                let place = place.map(|place| format!("{} {} {}", place.offset, place.len, place.raw_len));
                let digest = |digest: &Option<Digest>| digest.map(|digest| digest.to_string()).unwrap_or_default();
                format!(
                    "chunked {}; {}; {}",
                    place.unwrap_or_default(),
                    digest(compressed),
                    digest(raw)
                )
            }
        };
        Digest::of(text.as_bytes())
    }
}

/// Reads a layer's table of contents. Its digest has been checked when this returns. What is held of it meanwhile comes out of `memory`.
pub(super) async fn read(
    spec: &LayerSpec,
    blob: &Arc<dyn Blob>,
    kind: Kind,
    formats: &FormatsConfig,
    images: &[TocImage],
    memory: &Arc<Budget>,
) -> Result<Table, TocError> {
    let mut reader = Reader {
        blob,
        memory,
        share: None,
        size: spec.size,
        tail: None,
        requests: 0,
        bytes: 0,
    };
    let size = spec.size;
    let (toc, share) = match kind {
        Kind::Chunked(promise) => reader.chunked(promise, promise.place).await?,
        Kind::Digest(digest) => {
            let tail = reader.tail().await?;
            match estargz::find_toc(&tail, size)? {
                Some(Footer::Inside(place)) => reader.estargz(place, digest).await?,
                Some(Footer::Legacy(place)) if formats.allow_legacy_estargz => reader.estargz(place, digest).await?,
                Some(Footer::Legacy(_)) => return Err(TocError::Legacy),
                Some(Footer::Elsewhere) => {
                    drop(tail);
                    let (member, share) = reader.elsewhere(&spec.digest, images).await?;
                    let end = size.saturating_sub(estargz::EXTERNAL_FOOTER_LEN as u64);
                    parse(member, share, move |member, memory| {
                        estargz::index_from_toc_within(member, end, size, &digest, memory)
                    })
                    .await?
                }
                None => {
                    let promise = Promise {
                        place: None,
                        compressed: None,
                        raw: Some(digest),
                    };
                    reader.chunked(promise, None).await?
                }
            }
        }
    };
    Ok(Table {
        toc,
        requests: reader.requests,
        bytes: reader.bytes,
        _share: share,
    })
}

/// Reads of one blob, and how many they were.
struct Reader<'a> {
    blob: &'a Arc<dyn Blob>,
    memory: &'a Arc<Budget>,
    /// For the tail, and the table.
    share: Option<Share>,
    size: u64,
    /// The end of the blob, once it was read.
    tail: Option<Bytes>,
    requests: u64,
    bytes: u64,
}

impl Reader<'_> {
    /// The end of the blob, probably with the whole table.
    async fn tail(&mut self) -> Result<Bytes, TocError> {
        let len = (self.size / TAIL_SHARE).clamp(TAIL_MIN, TAIL_MAX).min(self.size);
        self.share = Some(self.hold(len).await);
        let mut tail = BytesMut::with_capacity(len as usize);
        self.range(self.size - len, self.size, &mut tail).await?;
        let tail = tail.freeze();
        self.tail = Some(tail.clone());
        Ok(tail)
    }

    fn tail_len(&self) -> u64 {
        self.tail.as_ref().map_or(0, |tail| tail.len() as u64)
    }

    /// A share of so much memory: at once, or when it is there. Then the tail has gone.
    async fn hold(&mut self, bytes: u64) -> Share {
        let mut held = self.share.take();
        if let Some(share) = held.take_if(|share| share.grow(bytes)) {
            return share;
        }
        self.tail = None;
        drop(held);
        self.memory.take(bytes).await
    }

    /// The table, which is `len` bytes of the blob, and a share of the memory for it and what `need` says that reading it takes besides.
    async fn table(
        &mut self,
        start: u64,
        len: u64,
        need: impl Fn(&[u8]) -> Result<u64, LayerError>,
    ) -> Result<(Bytes, Share), TocError> {
        if len > TOC_MAX {
            let what = "compressed size of the table of contents";
            return Err(LayerError::TooLarge {
                what,
                value: len,
                limit: TOC_MAX,
            }
            .into());
        }
        let mut share = self.hold(self.tail_len() + len).await;
        let mut table = self.part(start, len).await?;
        let whole = (self.tail_len() + len).saturating_add(need(&table)?);
        if !share.grow(whole) {
            // Everything is given up before more is waited for.
            self.tail = None;
            drop((share, std::mem::take(&mut table)));
            share = self.memory.take(whole).await;
            table = self.part(start, len).await?;
        }
        if self.tail_len() > table.len() as u64 {
            table = Bytes::copy_from_slice(&table);
        }
        self.tail = None;
        Ok((table, share))
    }

    /// Bytes of the blob, as far as possible out of its tail.
    async fn part(&mut self, start: u64, len: u64) -> Result<Bytes, TocError> {
        // Whoever found the table has checked that it lies within the blob.
        let end = start.saturating_add(len);
        let tail = self.tail.clone().unwrap_or_default();
        let tail_start = self.size.saturating_sub(tail.len() as u64);
        if start >= tail_start {
            return Ok(tail.slice((start - tail_start) as usize..(end - tail_start) as usize));
        }
        let mut part = BytesMut::with_capacity(len as usize);
        self.range(start, tail_start.min(end), &mut part).await?;
        part.extend_from_slice(&tail[..end.saturating_sub(tail_start) as usize]);
        Ok(part.freeze())
    }

    /// Adds bytes `start..end` of the blob, all of them.
    async fn range(&mut self, start: u64, end: u64, to: &mut BytesMut) -> Result<(), RegistryError> {
        let mut body = self.blob.read_part(start..end).await?;
        let mut received = 0;
        while let Some(part) = body.try_next().await? {
            received += part.len() as u64;
            if received > end - start {
                break;
            }
            to.extend_from_slice(&part);
        }
        self.requests += 1;
        self.bytes += received;
        if received != end - start {
            let problem = format!("{received} bytes instead of {}", end - start);
            return Err(RegistryError::Protocol {
                host: self.blob.describe(),
                what: format!("bytes {start}-{end}"),
                problem,
            });
        }
        Ok(())
    }

    async fn estargz(&mut self, place: TocLocation, digest: Digest) -> Result<(TocIndex, Share), TocError> {
        let (member, share) = self.table(place.offset, place.len, estargz::memory_for).await?;
        let size = self.size;
        parse(member, share, move |member, memory| {
            estargz::index_from_toc_within(member, place.offset, size, &digest, memory)
        })
        .await
    }

    async fn chunked(&mut self, promise: Promise, place: Option<TocPlace>) -> Result<(TocIndex, Share), TocError> {
        let place = match place {
            Some(place) => place,
            None => {
                let tail = match &self.tail {
                    Some(tail) => tail.clone(),
                    None => self.tail().await?,
                };
                zchunked::find_toc(&tail, self.size)?
                    .ok_or_else(|| LayerError::malformed("footer", self.size, "there is none"))?
            }
        };
        let (table, share) = self.table(place.offset, place.len, |_| Ok(place.memory())).await?;
        let size = self.size;
        parse(table, share, move |table, memory| {
            zchunked::index_from_toc_within(table, &place, size, &promise, memory)
        })
        .await
    }

    /// The table of contents that is in another image, and a share of the memory for it and for reading it.
    async fn elsewhere(&mut self, layer: &Digest, images: &[TocImage]) -> Result<(Bytes, Share), TocError> {
        self.tail = None;
        self.share = None;
        let mut asked = Vec::new();
        for image in images {
            // The manifest, and the table.
            self.requests += 2;
            let found = match image.table(layer).await {
                Ok(Some(table)) if table.size <= TOC_MAX => {
                    let fetch = || async {
                        let read = image.source.read_small(table.digest, table.size, TOC_MAX);
                        Ok(read.await?)
                    };
                    let need = |member: &[u8]| Ok(estargz::memory_for(member)?);
                    memory::download(self.memory, table.size, fetch, need).await
                }
                Ok(Some(table)) => Err(TocError::Layer(LayerError::TooLarge {
                    what: "compressed size of the table of contents",
                    value: table.size,
                    limit: TOC_MAX,
                })),
                Ok(None) => {
                    asked.push(format!("{}:{} does not have it", image.source.describe(), image.tag));
                    continue;
                }
                Err(error) => Err(error),
            };
            match found {
                Ok((member, share)) => {
                    self.bytes += member.len() as u64;
                    return Ok((member, share));
                }
                Err(error) => asked.push(format!("{}:{}: {error}", image.source.describe(), image.tag)),
            }
        }
        Err(TocError::Elsewhere(match asked.is_empty() {
            true => "containerd did not tell the name of this one".to_owned(),
            false => asked.join("; "),
        }))
    }
}

/// Parses a table on a thread where that may take its time, within its share of the memory, of which the index's stays.
async fn parse(
    table: Bytes,
    share: Share,
    parse: impl FnOnce(&[u8], u64) -> Result<TocIndex, LayerError> + Send + 'static,
) -> Result<(TocIndex, Share), TocError> {
    let parsed = memory::read(table, share, |table, beside| {
        let toc = parse(table, beside)?;
        // As records, and as the bytes that are stored.
        let memory = 2 * toc.index.memory();
        Ok((toc, memory))
    });
    let parsed = parsed.await;
    let parsed = parsed.unwrap_or_else(|| Err(LayerError::malformed("TOC", 0, "reading it was interrupted")))?;
    Ok(parsed)
}
