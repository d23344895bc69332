//! The first pass over a layer that has no index: it makes index and data in one go.
//!
//! Nothing is visible before the blob's digest, the tar's digest (the diff id) and the tar itself have been found right, and everything
//! is durable. What fails leaves nothing behind.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::watch;

use super::flights::Wishes;
use super::pieces::{chunk, digest, is_zero, late_pieces, span};
use super::pipeline::{self, Fault, Resources, Sink, Sums};
use super::schedule::Class;
use super::spans::{Cut, Cutting, Ranges, STREAM};
use super::{FetchError, Fetcher, Progress};
use crate::cache::{CacheError, CachedLayer, Spool, SpoolEnd, Staging};
use crate::layer::checkpoint::Scanned;
use crate::layer::compression::Compression;
use crate::layer::digest::Hasher;
use crate::layer::tar::{TarIndexer, TarLayout};
use crate::layer::tree::memory_for_blob;
use crate::layer::{Access, Chunk, Digest, LayerError, Windows};
use crate::registry::{Blob, Origin};
use crate::sync::blocking;

/// Times that a whole blob is downloaded when it arrives damaged.
pub(super) const PASSES: u32 = 2;
/// Bytes copied at a time when sparse files are expanded.
const COPY_BUFFER: u64 = 1 << 20;

/// A layer to be streamed.
#[derive(Clone)]
pub struct StreamRequest {
    /// Digest of the blob.
    pub digest: Digest,
    /// Where the blob is.
    pub blob: Arc<dyn Blob>,
    /// What the media type says. The bytes decide, as they do for containerd.
    pub compression: Compression,
    /// Digest of the uncompressed tar, from the image's configuration.
    pub diff_id: Option<Digest>,
    /// Name for logs: the image and the position of the layer in it.
    pub what: String,
    /// Keep the blob as it comes, if there is room, until the stream has ended: somebody may want that as well ([`Progress::spool`]).
    pub keep: bool,
}

impl Fetcher {
    /// The layer, from the cache or by a stream of its own.
    pub(super) async fn stream_once(
        self: &Arc<Self>,
        request: StreamRequest,
        progress: &Arc<Progress>,
    ) -> Result<Arc<CachedLayer>, FetchError> {
        let (layer, from) = (request.digest, request.blob.describe());
        if let Some(cached) = self.cached(layer).await? {
            return Ok(cached);
        }
        if request.keep {
            let (cache, size) = (Arc::clone(&self.cache), request.blob.size());
            if let Some(spool) = blocking(move || cache.spool(size)).await {
                let _ = progress.spool.set(spool);
            }
        }
        let _ended = progress.spool().map(Ended);
        let _place = self.enter_stream(request.blob.origin(), Class::Prefetch).await;
        let begin = std::time::Instant::now();
        let mut pass = 1;
        loop {
            // What was damaged once is read over one connection, so that it is known who sent it.
            match self.pass(&request, progress, pass == 1).await {
                Ok(cached) => {
                    tracing::info!(
                        layer = %layer,
                        what = request.what,
                        bytes = request.blob.size(),
                        seconds = begin.elapsed().as_secs_f64(),
                        "streamed"
                    );
                    return Ok(cached);
                }
                Err(fault) => {
                    if self.damaged(&fault, layer, &*request.blob) && pass < PASSES {
                        pass += 1;
                        continue;
                    }
                    return Err(fault.into_error(layer, from));
                }
            }
        }
    }

    /// The layer in the cache. Loading an index takes a while.
    async fn cached(self: &Arc<Self>, layer: Digest) -> Result<Option<Arc<CachedLayer>>, FetchError> {
        let me = Arc::clone(self);
        let found = tokio::task::spawn_blocking(move || me.cache.get(&layer).map_err(CacheError::into_io));
        let found = found.await.unwrap_or_else(|error| Err(io::Error::other(error)));
        found.map_err(|source| FetchError::Disk {
            layer,
            source: Arc::new(source),
        })
    }

    /// One download of the blob.
    async fn pass(
        self: &Arc<Self>,
        request: &StreamRequest,
        progress: &Arc<Progress>,
        wide: bool,
    ) -> Result<Arc<CachedLayer>, Fault> {
        progress.done.store(0, Ordering::Relaxed);
        progress.arrived.store(0, Ordering::Relaxed);
        let share = self.memory().take(STREAM).await;
        let (cache, digest) = (Arc::clone(&self.cache), request.digest);
        let staging = blocking(move || cache.stage(&digest)).await.map_err(Fault::from)?;
        let sink = Indexing {
            staging,
            indexer: TarIndexer::with_memory(memory_for_blob(request.blob.size())),
            tar: Hasher::new(),
            progress: Arc::clone(progress),
            cutting: Cutting::new(|check| drop(tokio::task::spawn_blocking(check)), share),
            offset: 0,
        };
        let (shown, ahead, grown) = (Arc::clone(progress), Arc::clone(progress), Arc::clone(progress));
        let arrived = move |bytes| {
            shown.done.fetch_add(bytes, Ordering::Relaxed);
        };
        let resources = Resources {
            arrived: Box::new(move |bytes| {
                ahead.arrived.fetch_max(bytes, Ordering::Relaxed);
            }),
            grows: Box::new(move |grows| grown.grows.store(grows, Ordering::Relaxed)),
            wide,
            spool: progress.spool(),
            ..self.resources(request.blob.origin(), Class::Prefetch, progress.wishes(), arrived)
        };
        let (sink, sums) = pipeline::run(&request.blob, request.digest, sink, resources).await?;
        if sums.compression != request.compression {
            tracing::debug!(layer = %request.digest, "is {:?}, though its type says {:?}", sums.compression, request.compression);
        }
        let diff_id = request.diff_id;
        let finish = tokio::task::spawn_blocking(move || sink.finish(sums, diff_id));
        finish
            .await
            .unwrap_or_else(|error| Err(Fault::Disk(io::Error::other(error))))
    }

    /// What a stream from `origin` may use; `wishes` make it wait, `arrived` is told of bytes.
    pub(super) fn resources(
        &self,
        origin: Origin,
        class: Class,
        wishes: watch::Receiver<Wishes>,
        arrived: impl Fn(u64) + Send + Sync + 'static,
    ) -> Resources {
        self.metrics.fetches_total.with_label_values(&["stream"]).inc();
        Resources {
            memory: Arc::clone(&self.pieces),
            ahead: Arc::clone(&self.ahead),
            patience: self.patience,
            wishes,
            progress: Box::new(arrived),
            arrived: Box::new(|_| {}),
            grows: Box::new(|_| {}),
            fetched: self.metrics.fetched_bytes_total.with_label_values(&["stream"]),
            stream_ranges: self.metrics.stream_ranges_total.clone(),
            origin,
            class,
            scheduler: Arc::clone(&self.scheduler),
            links: Arc::clone(&self.links),
            wide: true,
            spool: None,
            shape: self.shape,
        }
    }

    /// Whether another download may help; notes that the source sent damaged bytes.
    pub(super) fn damaged(&self, fault: &Fault, layer: Digest, blob: &dyn Blob) -> bool {
        let Fault::Layer(error) = fault else { return false };
        if error.retry_helps() {
            self.metrics.verify_failures_total.with_label_values(&["source"]).inc();
            tracing::warn!(layer = %layer, source = blob.describe(), "the source sent bytes that are not the layer's: {error}");
            blob.distrust();
        }
        error.retry_helps()
    }
}

impl Fault {
    /// The fault as those who wait see it.
    pub(super) fn into_error(self, layer: Digest, from: String) -> FetchError {
        match self {
            Fault::Source(source) => FetchError::Source { layer, source },
            Fault::Layer(error) => FetchError::Corrupt {
                layer,
                from,
                source: Box::new(error),
            },
            Fault::Disk(source) => FetchError::Disk {
                layer,
                source: Arc::new(source),
            },
            Fault::Silence(after) => FetchError::Deadline { layer, after },
            Fault::Unwanted => FetchError::BlobOnly { layer },
            Fault::Closed => FetchError::Closed { layer },
        }
    }
}

impl From<CacheError> for Fault {
    fn from(error: CacheError) -> Fault {
        match error {
            CacheError::Corrupt { source, .. } => Fault::Layer(*source),
            other => Fault::Disk(other.into_io()),
        }
    }
}

impl From<LayerError> for Fault {
    fn from(error: LayerError) -> Fault {
        Fault::Layer(error)
    }
}

/// The end of a stream whose blob is kept: nothing more will come.
struct Ended(Arc<Spool>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.settle(SpoolEnd::Failed);
    }
}

/// Writes and indexes the tar.
struct Indexing {
    staging: Staging,
    indexer: TarIndexer,
    tar: Hasher,
    cutting: Cutting,
    offset: u64,
    progress: Arc<Progress>,
}

impl Sink for Indexing {
    const CUTS: bool = true;

    fn begin(&mut self, compression: Compression) {
        self.cutting.begin(compression.into());
    }

    fn span(&mut self, span: Scanned) {
        self.cutting.span(span);
    }

    fn push(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        if self.progress.is_blob_only() {
            return Err(Fault::Unwanted);
        }
        self.tar.update(bytes);
        self.indexer.push(bytes)?;
        self.cutting.push(bytes);
        if !is_zero(bytes) {
            self.staging.write(self.offset, bytes)?;
        }
        self.offset += bytes.len() as u64;
        Ok(())
    }
}

impl Indexing {
    /// Verifies the tar, expands sparse files, and makes the layer visible.
    fn finish(mut self, sums: Sums, diff_id: Option<Digest>) -> Result<Arc<CachedLayer>, Fault> {
        let actual = self.tar.finish();
        if let Some(expected) = diff_id.filter(|expected| *expected != actual) {
            // The blob was right: the image contradicts itself, and will the next time. Not a mismatch that a retry may heal.
            let what = format!("the tar has digest {actual}, and the image says its diff id is {expected}");
            return Err(LayerError::malformed("layer", 0, what).into());
        }
        let layout = self.indexer.finish()?;
        let mut buf = Vec::new();
        for copy in &layout.copies {
            let mut done = 0;
            while done < copy.len {
                let count = (copy.len - done).min(COPY_BUFFER);
                buf.resize(count as usize, 0);
                self.staging.read(copy.from.saturating_add(done), &mut buf)?;
                if !is_zero(&buf) {
                    self.staging.write(copy.to.saturating_add(done), &buf)?;
                }
                done += count;
            }
        }
        let early = || Fault::Disk(io::Error::other("the verification of spans ended early"));
        let mut cut = self.cutting.finish().ok_or_else(early)?;
        let (staging, mut chunks) = (&self.staging, cut.chunks());
        let copied = match cut.ranges {
            Some(_) => cut.copied(&layout.copies, |offset, buf| staging.read(offset, buf))?,
            None => None,
        };
        let (access, codec, checkpoints, windows) = match (copied, cut.ranges.take()) {
            (
                Some(copied),
                Some(Ranges {
                    codec,
                    checkpoints,
                    windows,
                }),
            ) => {
                chunks.extend(copied);
                (Access::Ranges, codec, checkpoints, windows)
            }
            _ => {
                chunks = streamed_chunks(&cut, &layout, staging)?;
                (Access::Stream, sums.compression.into(), Vec::new(), Windows::new())
            }
        };
        let index = layout.into_index_with(access, codec, chunks, checkpoints, sums.blob_size)?;
        let cached = self.staging.commit_with_windows(index, &windows, true)?;
        // Also of one that another stream has made meanwhile: it is the same blob's.
        cached.is_tar(actual);
        Ok(cached)
    }
}

/// The chunks of a layer that can only be streamed: those of the tar, and pieces of what is behind it.
fn streamed_chunks(cut: &Cut, layout: &TarLayout, staging: &Staging) -> Result<Vec<Chunk>, Fault> {
    let mut chunks = cut.chunks();
    let mut buf = Vec::new();
    for piece in late_pieces(layout.tar_size, layout.data_size, &layout.copies) {
        let mut span = span(piece, layout.data_size);
        span.start = span.start.max(layout.tar_size);
        buf.resize(span.end.saturating_sub(span.start) as usize, 0);
        staging.read(span.start, &mut buf)?;
        chunks.extend(digest(&buf).map(|digest| chunk(&span, digest)));
    }
    Ok(chunks)
}
