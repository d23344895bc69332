//! What all layers share: the scheduler, the memory, and the streams under way.
//!
//! # Memory
//! The one budget (`memory.budget`) is divided, so that nobody who needs memory stands behind somebody who waits for something else:
//! - half of it is for ranged requests. A wish says how much it takes, and is not granted before there is room ([`super::schedule::policy`]);
//! - `fetch.stream_memory`, at most a quarter, is for bytes of streams between download and decompression; half of it for what is next in
//!   order, for which streams wait, and half for what comes over further connections before it is its turn (lanes.rs);
//! - the rest ([`Fetcher::memory`]) is for what is read as a whole and parsed, and for what streams need besides: some
//!   for each, taken before it begins, and more only if there is some at once (spans.rs).
//!
//! Nobody waits for a share while holding another one of the same part.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::Layer;
use super::filling::Rate;
use super::flights::Streams;
use super::lanes::Shape;
use super::outage::Outages;
use super::schedule::{Class, Kind, Limits, Place, Scheduler, Turns, Wish};
use super::width::Links;
use crate::cache::{Cache, CachedLayer};
use crate::config::FetchConfig;
use crate::layer::Digest;
use crate::metrics::Metrics;
use crate::registry::{Blob, Body, ManifestBytes, Origin, Referrer, RegistryError, Source, SourceStats};
use crate::sync::Budget;

/// Part of the memory for ranged requests: one in so many.
const REQUESTS_PART: u64 = 2;
/// Most of the memory for bytes of streams that are downloaded and not yet decompressed: one in so many.
const PIECES_PART: u64 = 4;
/// Of that, what may come before it is its turn: one in so many.
const AHEAD_PART: u64 = 2;
/// Chunks decoded at once for each processor: they also write to the disk, and wait for it.
const DECODES_PER_PROCESSOR: usize = 4;

/// Longest time without any progress before a request is given up, whatever readers wait: their next request may find another connection.
const SILENCE: Duration = Duration::from_secs(60);

/// The scheduler of everything that is fetched, and what it is fetched with. There is one per daemon.
pub struct Fetcher {
    pub(super) cache: Arc<Cache>,
    pub(super) runtime: Handle,
    pub(super) metrics: Arc<Metrics>,
    pub(super) scheduler: Arc<Scheduler>,
    /// Limits what is decoded at once.
    pub(super) decodes: Arc<Turns>,
    /// Memory of ranged requests.
    pub(super) requests: Arc<Budget>,
    /// Bytes of streams between download and decompression.
    pub(super) pieces: Arc<Budget>,
    /// Those of them that come before it is their turn.
    pub(super) ahead: Arc<Budget>,
    /// How many connections help streams at each host.
    pub(super) links: Arc<Links>,
    /// How long the ranges of a stream are.
    pub(super) shape: Shape,
    /// Memory for everything else.
    memory: Arc<Budget>,
    /// First passes under way.
    pub(super) streams: Arc<Streams>,
    /// Hosts that deliver nothing while readers wait.
    pub(super) outages: Arc<Outages>,
    /// Lets one layer be verified at a time.
    pub(super) verifications: Arc<Semaphore>,
    /// How fast work is for which nobody waits.
    pub(super) background: Rate,
    /// Largest ranged request, in bytes.
    pub(super) max_request: u64,
    /// Longest time without any progress before a request is given up: it must not keep its place for ever.
    pub(super) patience: Duration,
}

impl Fetcher {
    /// A fetcher whose work is done on `runtime`, and which takes its parts out of `memory`.
    pub fn new(
        config: &FetchConfig,
        memory: Arc<Budget>,
        cache: Arc<Cache>,
        runtime: Handle,
        metrics: Arc<Metrics>,
    ) -> Arc<Fetcher> {
        let total = memory.total();
        let requests = memory.split_off(total / REQUESTS_PART);
        let pieces = memory.split_off(config.stream_memory.0.min(total / PIECES_PART));
        let ahead = pieces.split_off(pieces.total() / AHEAD_PART);
        let limits = Limits {
            requests: config.max_concurrent_requests,
            streams: config.max_concurrent_streams,
            memory: requests.total(),
        };
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Arc::new(Fetcher {
            scheduler: Scheduler::measured(limits, Arc::clone(&metrics)),
            decodes: Turns::new(processors * DECODES_PER_PROCESSOR),
            requests,
            pieces,
            ahead,
            links: Arc::new(Links::new(config.max_stream_connections.saturating_sub(1))),
            shape: Shape::default(),
            memory,
            streams: Arc::default(),
            outages: Outages::new(metrics.outages.clone()),
            cache,
            runtime,
            metrics,
            verifications: Arc::new(Semaphore::new(1)),
            background: Rate::new(config.background_rate.0),
            max_request: config.max_request.0,
            patience: config.read_deadline.min(SILENCE),
        })
    }

    /// Makes a layer in the cache readable; `blob` is where its missing bytes come from.
    pub fn open(self: &Arc<Self>, layer: Arc<CachedLayer>, blob: Arc<dyn Blob>) -> Arc<Layer> {
        Layer::new(Arc::clone(self), layer, blob)
    }

    /// Memory for what is read as a whole and parsed. Who takes a share of it must hold none.
    pub fn memory(&self) -> &Arc<Budget> {
        &self.memory
    }

    /// What decides who may ask sources for something.
    pub fn scheduler(&self) -> &Arc<Scheduler> {
        &self.scheduler
    }

    /// How fast work may be for which nobody waits.
    pub fn background(&self) -> &Rate {
        &self.background
    }

    /// The same blob, each read of which waits for a place first and keeps it to the end of the body: for tables of contents and
    /// other documents that are no content of layers.
    pub fn scheduled(&self, blob: Arc<dyn Blob>, class: Class) -> Arc<dyn Blob> {
        Arc::new(Scheduled {
            blob,
            class,
            scheduler: Arc::clone(&self.scheduler),
            patience: self.patience,
        })
    }

    /// The same repository, whose documents (manifests, lists, small blobs) are read when the scheduler lets it. Its blobs are not scheduled.
    pub fn scheduled_source(&self, source: Arc<dyn Source>, owner: Origin, class: Class) -> Arc<dyn Source> {
        Arc::new(ScheduledSource {
            source,
            owner,
            class,
            scheduler: Arc::clone(&self.scheduler),
            patience: self.patience,
        })
    }

    /// Waits for a place for a stream.
    pub(super) async fn enter_stream(&self, owner: Origin, class: Class) -> Place {
        self.scheduler.enter(self.stream_wish(owner, class)).await
    }

    /// The same for one that is asked for once more, of a host that is away.
    pub(super) async fn enter_stream_in_vain(&self, owner: Origin, class: Class) -> Place {
        self.scheduler.enter_in_vain(self.stream_wish(owner, class)).await
    }

    fn stream_wish(&self, owner: Origin, class: Class) -> Wish {
        let deadline = self.scheduler.deadline(self.patience);
        Wish {
            owner,
            class,
            kind: Kind::Stream,
            bytes: 0,
            deadline,
        }
    }
}

/// The wish to read a document.
fn document(scheduler: &Scheduler, owner: Origin, class: Class, patience: Duration) -> Wish {
    Wish {
        owner,
        class,
        kind: Kind::Table,
        // Whoever asks for a document accounts for it: it outlives the request.
        bytes: 0,
        deadline: scheduler.deadline(patience),
    }
}

/// A blob that is read when the scheduler lets it.
struct Scheduled {
    blob: Arc<dyn Blob>,
    class: Class,
    scheduler: Arc<Scheduler>,
    patience: Duration,
}

impl Scheduled {
    async fn place(&self) -> Place {
        let wish = document(&self.scheduler, self.blob.origin(), self.class, self.patience);
        self.scheduler.enter(wish).await
    }
}

/// A body that keeps its place until it is dropped, asked for at that time.
fn holding(place: Place, asked: Instant, body: Body) -> Body {
    let held = body.inspect(move |piece| {
        if let Ok(piece) = piece {
            place.begun(asked.elapsed());
            place.traffic().arrived(piece.len() as u64);
        }
    });
    held.boxed()
}

impl Blob for Scheduled {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        Box::pin(async move {
            let place = self.place().await;
            let asked = Instant::now();
            Ok(holding(place, asked, self.blob.read(range).await?))
        })
    }

    fn read_part(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        Box::pin(async move {
            let place = self.place().await;
            let asked = Instant::now();
            Ok(holding(place, asked, self.blob.read_part(range).await?))
        })
    }

    fn read_beside(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        Box::pin(async move {
            let place = self.place().await;
            let asked = Instant::now();
            Ok(holding(place, asked, self.blob.read_beside(range).await?))
        })
    }

    fn size(&self) -> u64 {
        self.blob.size()
    }

    fn describe(&self) -> String {
        self.blob.describe()
    }

    fn distrust(&self) {
        self.blob.distrust();
    }

    fn verified(&self) {
        self.blob.verified();
    }

    fn refusals(&self, host: &str) -> Option<u64> {
        self.blob.refusals(host)
    }

    fn origin(&self) -> Origin {
        self.blob.origin()
    }
}

/// A repository whose documents are read when the scheduler lets it.
struct ScheduledSource {
    source: Arc<dyn Source>,
    owner: Origin,
    class: Class,
    scheduler: Arc<Scheduler>,
    patience: Duration,
}

impl ScheduledSource {
    async fn enter(&self) -> Place {
        let wish = document(&self.scheduler, self.owner.clone(), self.class, self.patience);
        self.scheduler.enter(wish).await
    }
}

impl Source for ScheduledSource {
    fn manifest<'a>(&'a self, reference: &'a str) -> BoxFuture<'a, Result<ManifestBytes, RegistryError>> {
        Box::pin(async move {
            let _place = self.enter().await;
            self.source.manifest(reference).await
        })
    }

    fn blob(&self, digest: Digest, size: u64) -> Arc<dyn Blob> {
        self.source.blob(digest, size)
    }

    fn read_small(&self, digest: Digest, size: u64, limit: u64) -> BoxFuture<'_, Result<Bytes, RegistryError>> {
        Box::pin(async move {
            let _place = self.enter().await;
            self.source.read_small(digest, size, limit).await
        })
    }

    fn referrers<'a>(
        &'a self,
        subject: Digest,
        artifact_type: &'a str,
    ) -> BoxFuture<'a, Result<Vec<Referrer>, RegistryError>> {
        Box::pin(async move {
            let _place = self.enter().await;
            self.source.referrers(subject, artifact_type).await
        })
    }

    fn tags(&self) -> BoxFuture<'_, Result<Vec<String>, RegistryError>> {
        Box::pin(async move {
            let _place = self.enter().await;
            self.source.tags().await
        })
    }

    fn describe(&self) -> String {
        self.source.describe()
    }

    fn stats(&self) -> SourceStats {
        self.source.stats()
    }
}
