//! A live layer: what is asked for, and the dispatchers that make requests of it.

use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::density::Density;
use super::outage::{Outage, Turn};
use super::queue::{Answer, Next, Queue, Ranks, Terms, View, owners};
use super::recording::{Recording, Watchers};
use super::schedule::{Class, Kind, Wish};
use super::window::Owner;
use super::{FetchError, Fetcher, LayerData, LocalFile};
use crate::cache::{CacheError, CachedLayer};
use crate::layer::{Access, BlobIndex, Digest, LayerIndex};
use crate::registry::{Blob, Origin};
use crate::sync::blocking;
use crate::sync::primitives::{
    AtomicBool, AtomicU64, Mutex, MutexGuard, Ordering, RwLock, spawn_blocking_on, spawn_on,
};

/// Times that a damaged chunk is fetched before its readers get an error: damage on the way is rare, and damage at the source stays.
pub(super) const DAMAGE_LIMIT: u32 = 3;

/// A live layer.
pub struct Layer {
    pub(super) fetcher: Arc<Fetcher>,
    pub(super) cached: Arc<CachedLayer>,
    pub(super) ranks: Ranks,
    /// The file of each chunk, while requests are planned: from the first until everything is there.
    owners: ArcSwapOption<Vec<Owner>>,
    blob: RwLock<Arc<dyn Blob>>,
    queue: Mutex<Queue>,
    /// Whether missing bytes are had by streaming all of the layer again.
    streamed: AtomicBool,
    /// The outage that its last request met.
    outage: Mutex<Option<Arc<Outage>>>,
    /// Told what is read.
    pub(super) watchers: Watchers,
    /// Whether all of it is read.
    pub(super) density: Density,
    /// Told when the bytes come from another source.
    moved: Notify,
    /// Told when a request has come to its end, and each of its chunks was answered or is queued again.
    pub(super) landed: Notify,
    /// Ends the requests under way when the layer is closed.
    pub(super) closing: CancellationToken,
    pub(super) requests: AtomicU64,
    pub(super) fetched: AtomicU64,
    /// Whether its bytes are being verified, or wait for that.
    pub(super) verifying: AtomicBool,
    pub(super) me: Weak<Layer>,
}

/// Counts for `lazuli status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerStats {
    /// Requests made since the layer was opened.
    pub requests: u64,
    /// Bytes of the blob that arrived since the layer was opened.
    pub fetched_bytes: u64,
    /// Bytes of the data space that are on disk.
    pub present_bytes: u64,
    /// Bytes of the data space that would be on disk if all were.
    pub total_bytes: u64,
}

/// What a wish asked for: what of it was not here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wished {
    pub(super) chunks: Vec<usize>,
    /// Ranges of the data space: offsets and lengths.
    pub ranges: Vec<(u64, u64)>,
    /// Bytes of the blob.
    pub bytes: u64,
}

impl Layer {
    pub(super) fn new(fetcher: Arc<Fetcher>, cached: Arc<CachedLayer>, blob: Arc<dyn Blob>) -> Arc<Layer> {
        let streamed = cached.index().access() == Access::Stream;
        Arc::new_cyclic(|me| Layer {
            ranks: Ranks::new(cached.index().chunks()),
            density: Density::new(cached.index().chunks().len()),
            owners: ArcSwapOption::empty(),
            fetcher,
            cached,
            blob: RwLock::new(blob),
            queue: Mutex::default(),
            streamed: AtomicBool::new(streamed),
            outage: Mutex::default(),
            watchers: Watchers::default(),
            moved: Notify::new(),
            landed: Notify::new(),
            closing: CancellationToken::new(),
            requests: AtomicU64::new(0),
            fetched: AtomicU64::new(0),
            verifying: AtomicBool::new(false),
            me: me.clone(),
        })
    }

    /// Where the bytes come from now.
    pub fn blob(&self) -> Arc<dyn Blob> {
        Arc::clone(&self.blob.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes the bytes from another source from the next request on. Whoever waits for the old one to come back goes on at once.
    pub fn set_blob(&self, blob: Arc<dyn Blob>) {
        *self.blob.write().unwrap_or_else(PoisonError::into_inner) = blob;
        *self.outage() = None;
        self.moved.notify_waiters();
    }

    pub(super) fn outage(&self) -> MutexGuard<'_, Option<Arc<Outage>>> {
        self.outage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// If the last request met an outage, waits until it is over (`None`), or for a turn to ask in it.
    pub(super) async fn turn(&self) -> Option<Turn> {
        let moved = self.moved.notified();
        let outage = self.outage().clone()?;
        tokio::select! {
            turn = outage.turn() => turn,
            () = moved => None,
        }
    }

    /// A request to `origin` ended; `failed` says why, if it did so in a way that may pass and readers wait. `turn` is what it was made with.
    pub(super) async fn ended(&self, origin: &Origin, failed: Option<&FetchError>, turn: Option<Turn>) {
        let outages = &self.fetcher.outages;
        match failed {
            Some(error) => {
                self.fetcher.metrics.outage_retries_total.inc();
                *self.outage() = Some(outages.failed(origin, error));
                if let Some(turn) = turn {
                    turn.rest().await;
                }
            }
            None => *self.outage() = None,
        }
    }

    /// The layer in the cache.
    pub fn cached(&self) -> &Arc<CachedLayer> {
        &self.cached
    }

    /// Adds what it took to make the layer readable (its table of contents, or the stream) to its counts.
    pub fn count(&self, requests: u64, bytes: u64) {
        self.requests.fetch_add(requests, Ordering::Relaxed);
        self.fetched.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts since the layer was opened.
    pub fn stats(&self) -> LayerStats {
        LayerStats {
            requests: self.requests.load(Ordering::Relaxed),
            fetched_bytes: self.fetched.load(Ordering::Relaxed),
            present_bytes: self.cached.present_bytes(),
            total_bytes: self.cached.index().stored_size(),
        }
    }

    /// Ends all requests; everyone who waits gets [`FetchError::Closed`], and so does everyone who asks from now on. Bytes on disk can
    /// still be read.
    pub fn close(&self) {
        let waiters = {
            let mut queue = self.queue();
            queue.closed = true;
            queue.drain()
        };
        self.closing.cancel();
        for waiter in waiters {
            waiter.send(&Err(self.closed()));
        }
    }

    /// Has the chunks of `len` bytes at `offset` fetched after everything that someone waits for. Nobody is told of errors.
    pub fn prefetch(&self, offset: u64, len: u64) {
        self.ask(offset, len, Class::Prefetch);
    }

    /// Has a recording told what is read of the layer, as of its layer at `position`, until [`Layer::unwatch`].
    pub fn watch(&self, recording: &Arc<Recording>, position: usize) {
        self.watchers.add(recording, position);
    }

    /// Has it told nothing any more.
    pub fn unwatch(&self, recording: &Arc<Recording>) {
        self.watchers.remove(recording);
    }

    /// Has the chunks of these ranges (offset and length) fetched as [`Layer::prefetch`] does, because it is known that they will be read: while any
    /// of them is queued, requests for the layer take nothing else ahead. The bytes of the data space and of the blob that are fetched for
    /// it, and what chunks these are.
    pub fn wish(&self, ranges: &[(u64, u64)]) -> Wished {
        self.wish_and_guess(ranges, &[])
    }

    /// The same, and ranges of which it is only known that they are a part of what will be read: what is beside these in the blob comes with them as with what a
    /// reader waits for. All are asked for together: what lies close to each other is one request.
    pub fn wish_and_guess(&self, ranges: &[(u64, u64)], guessed: &[(u64, u64)]) -> Wished {
        let mut wished = Wished::default();
        if self.is_streamed() {
            return wished;
        }
        let absent = |&(offset, len): &(u64, u64)| {
            let missing = self.cached.missing(offset, len);
            missing.filter(|&chunk| !self.is_ready(chunk))
        };
        let guesses: Vec<usize> = guessed.iter().flat_map(absent).collect();
        wished.chunks.extend(ranges.iter().flat_map(absent));
        wished.chunks.extend(&guesses);
        wished.chunks.sort_unstable();
        wished.chunks.dedup();
        for &chunk in &wished.chunks {
            if let Some(record) = self.cached.index().chunks().get(chunk) {
                wished.ranges.push((record.data_offset, record.data_len.into()));
                wished.bytes = wished.bytes.saturating_add(record.blob_len.into());
            }
        }
        {
            // All of it before the first request is planned.
            let mut queue = self.queue();
            queue.is_known |= !ranges.is_empty();
            self.queue_up(&mut queue, &wished.chunks, Class::Prefetch);
            guesses.iter().for_each(|&chunk| queue.take_neighbours(chunk));
        }
        self.dispatch(Class::Prefetch);
        // What lies in other layers is copied.
        for &(offset, len) in ranges.iter().chain(guessed) {
            self.prefetch(offset, len);
        }
        wished
    }

    /// The bytes, for Lazuli's own eyes: what is missing is fetched as [`Layer::prefetch`] does, after everything that a container waits for, and no
    /// recording is told. A layer of which it would take a stream is not read.
    ///
    /// # Errors
    /// [`FetchError`] if they are not to be had within the deadline.
    pub async fn read_ahead(self: &Arc<Self>, offset: u64, len: u32, deadline: Duration) -> Result<Bytes, FetchError> {
        if self.is_streamed() && !self.cached.is_ready(offset, len.into()) {
            return Err(self.closed());
        }
        let reading = Arc::clone(self).fill(offset, len, Class::Prefetch);
        let late = |_| FetchError::Deadline {
            layer: *self.cached.digest(),
            after: deadline,
        };
        tokio::time::timeout(deadline, reading).await.map_err(late)?
    }

    /// Whether anything that was asked for ahead waits for its request.
    pub fn has_wishes(&self) -> bool {
        self.queue().is_queued(Class::Prefetch)
    }

    /// Takes back what of `wished` nobody waits for and no request has.
    pub fn unwish(&self, wished: &Wished) {
        let mut queue = self.queue();
        for &chunk in &wished.chunks {
            queue.forgo(chunk, self.ranks.rank(chunk));
        }
    }

    /// Has the chunks of `len` bytes at `offset` fetched when it is the turn of their class. What is asked for already, or under way, moves to
    /// this class if it is the more urgent one. Nobody is told of errors.
    pub fn ask(&self, offset: u64, len: u64, class: Class) {
        if self.is_streamed() {
            return;
        }
        let missing = self.cached.missing(offset, len);
        let (near, far): (Vec<usize>, Vec<usize>) = missing
            .filter(|&chunk| !self.cached.is_suspect(chunk))
            .partition(|&chunk| self.cached.is_elsewhere(chunk));
        self.ask_for(&far, class);
        let Some(me) = self.me.upgrade().filter(|_| !near.is_empty()) else {
            return;
        };
        spawn_blocking_on(&self.fetcher.runtime, move || {
            let mut left = near;
            left.retain(|&chunk| !me.closing.is_cancelled() && !me.cached.take_from_elsewhere(chunk));
            me.ask_for(&left, class);
        });
    }

    pub(super) fn ask_for(&self, chunks: &[usize], class: Class) {
        self.queue_up(&mut self.queue(), chunks, class);
        self.dispatch(class);
    }

    fn queue_up(&self, queue: &mut Queue, chunks: &[usize], class: Class) {
        if queue.closed {
            return;
        }
        for &chunk in chunks {
            // Under the lock: a chunk leaves the queue after it is ready, and so it is not asked for again.
            if !self.cached.is_chunk_ready(chunk) {
                queue.want(chunk, self.ranks.rank(chunk), class, None);
            }
        }
    }

    /// Whether missing bytes are had by streaming all of the layer again.
    pub(super) fn is_streamed(&self) -> bool {
        self.streamed.load(Ordering::SeqCst)
    }

    /// From now on, missing bytes are had by streaming the layer again, as not all of its spans can be decoded any more.
    pub(super) fn fall_back(&self) {
        self.streamed.store(true, Ordering::SeqCst);
    }

    pub(super) fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn closed(&self) -> FetchError {
        FetchError::Closed {
            layer: *self.cached.digest(),
        }
    }

    pub(super) fn disk(&self, error: io::Error) -> FetchError {
        FetchError::Disk {
            layer: *self.cached.digest(),
            source: Arc::new(error),
        }
    }

    /// Starts a dispatcher if one is needed: it waits for a place, makes one request, and hands over to the next.
    pub(super) fn dispatch(&self, class: Class) {
        let max_request = self.fetcher.max_request;
        let Some(mut memory) = self.queue().needs_dispatcher(class, &self.ranks, self, max_request) else {
            return;
        };
        let Some(me) = self.me.upgrade() else { return };
        spawn_on(&self.fetcher.runtime, async move {
            // Before it has a place: what waits for a host takes nothing from others.
            let turn = tokio::select! {
                turn = me.turn() => turn,
                () = me.closing.cancelled() => return,
            };
            loop {
                let wish = Wish {
                    owner: me.blob().origin(),
                    class,
                    kind: Kind::Request,
                    bytes: memory,
                    deadline: me.fetcher.scheduler.deadline(me.fetcher.patience),
                };
                let scheduler = &me.fetcher.scheduler;
                let enters = match turn {
                    Some(_) => scheduler.enter_in_vain(wish).boxed(),
                    None => scheduler.enter(wish).boxed(),
                };
                let place = tokio::select! {
                    place = enters => place,
                    () = me.closing.cancelled() => return,
                };
                let terms = Terms {
                    class,
                    place: &place.remote(),
                    memory,
                    contended: place.contended(),
                    max_request,
                };
                me.know_owners().await;
                let next = me.queue().next(&me.ranks, &*me, &terms);
                match next {
                    Next::Nothing => return,
                    // The next chunk is another one meanwhile, and larger.
                    Next::More(more) => memory = more,
                    Next::Request(job) => {
                        place.shrink(job.memory);
                        me.dispatch(class);
                        me.dispatch(Class::ReadAhead);
                        return me.request(job, class, place, turn).await;
                    }
                }
            }
        });
    }

    /// Finds out which files chunks belong to, for which it takes the names. A request that is about to cross a network waits for it; most layers
    /// of a node ask for nothing any more, and need not know.
    async fn know_owners(self: &Arc<Self>) {
        if self.owners.load().is_some() {
            return;
        }
        let me = Arc::clone(self);
        // Without names, files are only read ahead less well.
        let found = blocking(move || me.cached.names().map_or_else(|_| Vec::new(), |names| owners(&names)));
        self.owners.store(Some(Arc::new(found.await)));
    }

    /// Takes a chunk that has arrived, verifies and stores it, and answers who waits for it.
    ///
    /// # Errors
    /// What is wrong with the bytes; nobody is answered then.
    pub(super) fn deliver(&self, chunk: usize, bytes: Bytes) -> Result<(), crate::layer::LayerError> {
        let unwanted = self.queue().is_unwanted(chunk);
        let stored = match unwanted {
            true => self.cached.store_unused(chunk, &bytes),
            false => self.cached.store(chunk, &bytes),
        };
        match stored {
            Ok(crate::cache::Stored::Cached) => {
                if self.cached.is_complete() {
                    self.owners.store(None);
                }
            }
            Ok(crate::cache::Stored::Bypassed) => self.keep_hot(chunk, &bytes),
            Err(CacheError::Corrupt { source, .. }) => return Err(*source),
            Err(error) => {
                // The bytes are good: a failing disk is no reason to fail the reader.
                tracing::error!("{error}");
                self.keep_hot(chunk, &bytes);
            }
        }
        self.answer(chunk, Ok(bytes));
        Ok(())
    }

    fn keep_hot(&self, chunk: usize, bytes: &Bytes) {
        // What nobody waits for would push out what somebody did.
        if self.queue().is_awaited(chunk) {
            self.cached.keep_hot(chunk, bytes.clone());
        }
    }

    /// Answers everyone who waits for a chunk.
    pub(super) fn answer(&self, chunk: usize, answer: Answer) {
        let waiters = self.queue().take(chunk, self.ranks.rank(chunk));
        for waiter in waiters {
            waiter.send(&answer);
        }
    }
}

impl View for Layer {
    fn len(&self) -> usize {
        self.cached.index().chunks().len()
    }

    fn blob(&self, chunk: usize) -> Range<u64> {
        let record = self.cached.index().chunks().get(chunk);
        record.map_or(0..0, |record| record.blob_offset..record.blob_end())
    }

    fn owner(&self, chunk: usize) -> Owner {
        let owners = self.owners.load();
        let owner = owners.as_ref().and_then(|owners| owners.get(chunk).copied());
        owner.unwrap_or_default()
    }

    fn is_ready(&self, chunk: usize) -> bool {
        // What only has to be verified, or copied, is not fetched ahead either.
        self.cached.is_chunk_ready(chunk) || self.cached.is_suspect(chunk) || self.cached.is_elsewhere(chunk)
    }

    fn decoded(&self, chunk: usize) -> u64 {
        let record = self.cached.index().chunks().get(chunk);
        record.map_or(0, |record| record.data_len.into())
    }
}

impl LayerData for Layer {
    fn digest(&self) -> &Digest {
        self.cached.digest()
    }

    /// The repository it comes from.
    fn owner(&self) -> String {
        let mut name = Layer::blob(self).describe();
        let end = name.rfind('@').unwrap_or(name.len());
        name.truncate(end);
        name
    }

    fn id(&self) -> &Digest {
        self.cached.id()
    }

    fn index(&self) -> &BlobIndex {
        self.cached.index()
    }

    fn names(&self) -> Result<Arc<LayerIndex>, FetchError> {
        self.cached.names().map_err(|error| FetchError::Disk {
            layer: *self.cached.digest(),
            source: Arc::new(error.into_io()),
        })
    }

    fn read_ready(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        let read = self.cached.read_ready(offset, buf)?;
        self.note_read(offset, buf.len() as u64, true);
        Some(read)
    }

    fn read(&self, offset: u64, len: u32, deadline: Duration) -> BoxFuture<'static, Result<Bytes, FetchError>> {
        let Some(me) = self.me.upgrade() else {
            return futures::future::ready(Err(self.closed())).boxed();
        };
        self.note_read(offset, len.into(), false);
        async move {
            let (digest, metrics) = (*me.cached.digest(), Arc::clone(&me.fetcher.metrics));
            let begin = Instant::now();
            let result = tokio::time::timeout(deadline, me.fill(offset, len, Class::Demand)).await;
            metrics.cold_read_seconds.observe(begin.elapsed().as_secs_f64());
            result.unwrap_or(Err(FetchError::Deadline {
                layer: digest,
                after: deadline,
            }))
        }
        .boxed()
    }

    fn present_bytes(&self) -> u64 {
        self.cached.present_bytes()
    }

    fn local_file(&self) -> Option<LocalFile> {
        self.whole_file()
    }
}
