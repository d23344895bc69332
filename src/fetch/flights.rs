//! Streams under way, and who waits for them.
//!
//! Whoever asks for a layer that is being streamed waits for that stream. A stream whose last waiter has left ends: its connection, its place
//! and what it had written are free at once. Who comes with another source than those that are at work does not depend on them: if they make no
//! progress for [`STALL`], or fail, his own stream begins. The first one to finish answers all who wait for the layer, and ends the others.

use std::sync::{Arc, OnceLock, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use futures::future::select_all;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{FetchError, Fetcher, StreamRequest};
use crate::cache::{CachedLayer, Spool};
use crate::layer::Digest;
use crate::registry::Origin;
use crate::sync::primitives::{AtomicBool, AtomicU64, Mutex, MutexGuard, Ordering, spawn_on};

/// Longest time that a stream may bring nothing before somebody who has another source begins his own.
pub const STALL: Duration = Duration::from_secs(1);

type Outcome = Result<Arc<CachedLayer>, FetchError>;

/// How far a stream is, in bytes of the blob; and what makes it wait.
pub struct Progress {
    pub(super) done: AtomicU64,
    /// The same, with those that come before it is their turn.
    pub(super) arrived: AtomicU64,
    pub(super) total: u64,
    /// Whether more connections may yet make it faster.
    pub(super) grows: AtomicBool,
    /// The blob as it came, if that is kept.
    pub(super) spool: OnceLock<Arc<Spool>>,
    blob_only: AtomicBool,
    /// Shared by all streams of a layer.
    wishes: Arc<watch::Sender<Wishes>>,
}

impl Progress {
    pub(super) fn new(total: u64, wishes: Arc<watch::Sender<Wishes>>) -> Arc<Self> {
        Arc::new(Progress {
            done: AtomicU64::new(0),
            arrived: AtomicU64::new(0),
            total,
            grows: AtomicBool::new(false),
            spool: OnceLock::new(),
            blob_only: AtomicBool::new(false),
            wishes,
        })
    }

    /// Bytes that have arrived, from the beginning of the blob to the first one that is missing.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Bytes that have arrived, those included that come before it is their turn: what the source delivers.
    pub fn arrived(&self) -> u64 {
        self.arrived.load(Ordering::Relaxed).max(self.done())
    }

    /// Bytes of the blob.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Whether it is being tried if more connections make it faster: its pace says little then.
    pub fn grows(&self) -> bool {
        self.grows.load(Ordering::Relaxed)
    }

    /// The blob as it came, if that is kept.
    pub fn spool(&self) -> Option<Arc<Spool>> {
        self.spool.get().cloned()
    }

    /// Nobody needs the layer, but somebody the blob: the stream goes on for its [spool](Progress::spool), makes nothing else of what comes, and
    /// fails in the end.
    pub fn blob_only(&self) {
        self.blob_only.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_blob_only(&self) -> bool {
        self.blob_only.load(Ordering::Relaxed)
    }

    /// Whether it waits for others.
    pub fn is_paused(&self) -> bool {
        self.wishes.borrow().pauses()
    }

    pub(super) fn wishes(&self) -> watch::Receiver<Wishes> {
        self.wishes.subscribe()
    }
}

/// How many want the streams of a layer to pause, and how many wait for them.
#[derive(Debug, Default)]
pub(super) struct Wishes {
    pub(super) pauses: usize,
    pub(super) waits: usize,
}

impl Wishes {
    /// Whether the streams pause: not while anybody waits for them.
    pub(super) fn pauses(&self) -> bool {
        self.pauses > 0 && self.waits == 0
    }
}

/// A layer whose streams pause for another one, as long as this lives and nobody [waits](Hurried) for them: the download waits before it takes
/// its next piece. While it waits, its source may be silent as long as it likes.
pub struct Paused(Arc<Progress>);

impl Paused {
    /// Has the streams of the layer of `stream` pause.
    pub fn new(stream: Arc<Progress>) -> Self {
        stream.wishes.send_modify(|wishes| wishes.pauses += 1);
        Paused(stream)
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        self.0.wishes.send_modify(|wishes| wishes.pauses -= 1);
    }
}

/// A layer whose streams somebody waits for, as long as this lives: they pause for nobody.
pub struct Hurried(Arc<Progress>);

impl Hurried {
    /// Has the streams of the layer of `stream` go on.
    pub fn new(stream: Arc<Progress>) -> Self {
        stream.wishes.send_modify(|wishes| wishes.waits += 1);
        Hurried(stream)
    }
}

impl Drop for Hurried {
    fn drop(&mut self) {
        self.0.wishes.send_modify(|wishes| wishes.waits -= 1);
    }
}

/// The streams under way.
#[derive(Default)]
pub(super) struct Streams(Mutex<Vec<Arc<Flight>>>);

/// What somebody wants to be streamed.
#[derive(Clone)]
pub(super) struct Asked {
    pub(super) layer: Digest,
    /// What its tar is promised to be: a false promise fails nobody else's.
    pub(super) promise: Option<Digest>,
    pub(super) source: Origin,
    /// Bytes of the blob.
    pub(super) total: u64,
    /// What it is, for messages.
    pub(super) what: String,
}

/// A stream under way.
struct Flight {
    asked: Asked,
    progress: Arc<Progress>,
    outcome: watch::Sender<Option<Outcome>>,
    /// Ends it.
    cancel: CancellationToken,
    /// How many wait for it. Changes only under the lock of the list.
    waiters: AtomicU64,
}

impl Flight {
    /// Tells it to all who wait, unless they were told something else.
    fn settle(&self, outcome: &Outcome) {
        self.outcome.send_if_modified(|settled| {
            let first = settled.is_none();
            if first {
                *settled = Some(outcome.clone());
            }
            first
        });
    }

    fn is_of(&self, asked: &Asked) -> bool {
        self.asked.layer == asked.layer && self.asked.promise == asked.promise
    }
}

/// One who waits for a stream.
struct Seat {
    streams: Arc<Streams>,
    flight: Arc<Flight>,
}

impl Seat {
    async fn outcome(&self) -> Outcome {
        let mut outcome = self.flight.outcome.subscribe();
        let settled = outcome.wait_for(Option::is_some).await;
        let settled = settled.ok().and_then(|settled| settled.clone());
        // The flight lives as long as this seat, and its sender with it.
        settled.unwrap_or(Err(FetchError::Closed {
            layer: self.flight.asked.layer,
        }))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut flights = self.streams.lock();
        if self.flight.waiters.fetch_sub(1, Ordering::Relaxed) == 1 {
            // Not joined any more from now on.
            flights.retain(|flight| !Arc::ptr_eq(flight, &self.flight));
            self.flight.cancel.cancel();
        }
    }
}

/// Takes a flight that has come to its end out of the list, also when it panicked.
struct Landing(Arc<Streams>, Arc<Flight>);

impl Drop for Landing {
    fn drop(&mut self) {
        self.0.lock().retain(|flight| !Arc::ptr_eq(flight, &self.1));
        let early = std::io::Error::other("the stream ended early");
        self.1.settle(&Err(FetchError::Disk {
            layer: self.1.asked.layer,
            source: Arc::new(early),
        }));
    }
}

impl Streams {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Flight>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(all(test, feature = "shuttle"))]
    pub(super) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Waits for the streams under way of what is asked for; `stream` begins one if there is none, or if those from other sources bring nothing.
    /// It runs as a task of its own, and ends when the last one who waits for it drops this future.
    ///
    /// # Errors
    /// Those of the last stream.
    pub(super) async fn share<S>(
        self: &Arc<Self>,
        runtime: &Handle,
        asked: Asked,
        stream: impl FnOnce(Arc<Progress>) -> S,
    ) -> Outcome
    where
        S: Future<Output = Outcome> + Send + 'static,
    {
        let (mut seats, mut stream) = self.join(runtime, &asked, stream);
        loop {
            let (landed, at) = {
                let landings = seats.iter().map(|seat| seat.outcome().boxed());
                let streams: Vec<_> = seats.iter().map(|seat| Arc::clone(&seat.flight.progress)).collect();
                tokio::select! {
                    (outcome, at, _) = select_all(landings) => (Some(outcome), at),
                    () = stalled(&streams), if stream.is_some() => (None, 0),
                }
            };
            let error = match landed {
                Some(Ok(cached)) => return Ok(cached),
                Some(Err(error)) => {
                    drop(seats.swap_remove(at));
                    Some(error)
                }
                None => None,
            };
            // What another source did wrong, this one may do right; what is wrong with the layer itself, or the disk, stays.
            let helps = error.as_ref().is_none_or(|error| match error {
                FetchError::Source { .. } | FetchError::Deadline { .. } | FetchError::Closed { .. } => true,
                // He is to have it from where the blob has gone.
                FetchError::BlobOnly { .. } => false,
                FetchError::Corrupt { source, .. } => source.retry_helps(),
                FetchError::Disk { .. } => false,
            });
            if let Some(stream) = stream.take_if(|_| helps) {
                tracing::info!(layer = %asked.layer, what = asked.what, "streams from its own source: another one brings nothing");
                seats.push(self.launch(self.lock(), runtime, asked.clone(), stream));
            }
            if let (Some(error), true) = (error, seats.is_empty()) {
                return Err(error);
            }
        }
    }

    /// Takes a seat in each stream of what is asked for, and begins one if there is none. What begins one comes back if all of them are from other
    /// sources.
    fn join<S, F>(self: &Arc<Self>, runtime: &Handle, asked: &Asked, stream: F) -> (Vec<Seat>, Option<F>)
    where
        S: Future<Output = Outcome> + Send + 'static,
        F: FnOnce(Arc<Progress>) -> S,
    {
        let flights = self.lock();
        let seat = |flight: &Arc<Flight>| {
            flight.waiters.fetch_add(1, Ordering::Relaxed);
            Seat {
                streams: Arc::clone(self),
                flight: Arc::clone(flight),
            }
        };
        let seats: Vec<Seat> = flights.iter().filter(|flight| flight.is_of(asked)).map(seat).collect();
        if seats.is_empty() {
            return (vec![self.launch(flights, runtime, asked.clone(), stream)], None);
        }
        let own = seats.iter().any(|seat| seat.flight.asked.source == asked.source);
        // Seats lock the list when they are given up.
        drop(flights);
        (seats, (!own).then_some(stream))
    }

    fn launch<S>(
        self: &Arc<Self>,
        mut flights: MutexGuard<'_, Vec<Arc<Flight>>>,
        runtime: &Handle,
        asked: Asked,
        stream: impl FnOnce(Arc<Progress>) -> S,
    ) -> Seat
    where
        S: Future<Output = Outcome> + Send + 'static,
    {
        let other = flights.iter().find(|flight| flight.asked.layer == asked.layer);
        let wishes = other.map_or_else(Arc::default, |other| Arc::clone(&other.progress.wishes));
        let flight = Arc::new(Flight {
            progress: Progress::new(asked.total, wishes),
            asked,
            outcome: watch::Sender::new(None),
            cancel: CancellationToken::new(),
            waiters: AtomicU64::new(1),
        });
        flights.push(Arc::clone(&flight));
        drop(flights);
        let seat = Seat {
            streams: Arc::clone(self),
            flight: Arc::clone(&flight),
        };
        let landing = Landing(Arc::clone(self), Arc::clone(&flight));
        let me = Arc::clone(self);
        let stream = stream(Arc::clone(&flight.progress));
        spawn_on(runtime, async move {
            let outcome = tokio::select! {
                outcome = stream => outcome,
                () = flight.cancel.cancelled() => Err(FetchError::Closed { layer: flight.asked.layer }),
            };
            let mut flights = me.lock();
            // First the end of the stream, then its result: who has the result and asks again gets a new one.
            flights.retain(|other| !Arc::ptr_eq(other, &flight));
            if outcome.is_ok() {
                flights.retain(|other| {
                    let same = other.is_of(&flight.asked);
                    if same {
                        other.settle(&outcome);
                        other.cancel.cancel();
                    }
                    !same
                });
            }
            drop(flights);
            flight.settle(&outcome);
            drop(landing);
        });
        seat
    }
}

impl Fetcher {
    /// Downloads, verifies, indexes and stores a whole layer. If it is in the cache already, that one is returned, though some of its bytes
    /// may have been evicted; [`CachedLayer::diff_id`] tells then whether it is known to be the tar that the request promises. Whoever asks
    /// for a layer that is being streamed with the same promise waits for the same stream, as long as that brings something. A stream ends
    /// when the last one who waits for it drops this future.
    ///
    /// # Errors
    /// [`FetchError`]; nothing is left behind then.
    pub async fn stream(self: &Arc<Self>, request: StreamRequest) -> Result<Arc<CachedLayer>, FetchError> {
        let asked = Asked {
            layer: request.digest,
            promise: request.diff_id,
            source: request.blob.origin(),
            total: request.blob.size(),
            what: request.what.clone(),
        };
        let me = Arc::clone(self);
        let stream = move |progress| async move { me.stream_once(request, &progress).await };
        self.streams.share(&self.runtime, asked, stream).await
    }

    /// How far the stream of a layer is, if it is being streamed: the stream that is farthest.
    pub fn progress(&self, layer: &Digest) -> Option<Arc<Progress>> {
        let flights = self.streams.lock();
        let of_layer = flights.iter().filter(|flight| flight.asked.layer == *layer);
        let farthest = of_layer.max_by_key(|flight| flight.progress.done());
        farthest.map(|flight| Arc::clone(&flight.progress))
    }

    /// The streams under way: layer, bytes of the blob that have arrived, and bytes of the blob.
    pub fn streams_under_way(&self) -> Vec<(Digest, u64, u64)> {
        let mut layers: Vec<Digest> = self.streams.lock().iter().map(|flight| flight.asked.layer).collect();
        layers.sort_unstable();
        layers.dedup();
        let shown = layers.into_iter().filter_map(|layer| {
            let progress = self.progress(&layer)?;
            Some((layer, progress.done(), progress.total()))
        });
        shown.collect()
    }
}

/// Ends when none of the streams of a layer has brought anything for [`STALL`]. What waits for its place brings nothing either; what is paused,
/// or has all its bytes, is no stall, and after a pause the source has the whole time again.
async fn stalled(streams: &[Arc<Progress>]) {
    let Some(mut wishes) = streams.first().map(|stream| stream.wishes()) else {
        return;
    };
    let done = || streams.iter().map(|stream| stream.done()).sum::<u64>();
    loop {
        // The streams, and so what they share, live as long as their seats.
        let _ = wishes.wait_for(|wishes| !wishes.pauses()).await;
        let before = done();
        tokio::select! {
            () = tokio::time::sleep(STALL) => {}
            _ = wishes.wait_for(Wishes::pauses) => continue,
        }
        let complete = |stream: &Arc<Progress>| stream.done() >= stream.total();
        if done() == before && !streams.iter().any(complete) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In time that stands still until everybody waits for it.
    #[tokio::test(start_paused = true)]
    async fn after_a_pause_a_source_has_its_whole_time_again() {
        let stream = Progress::new(100, Arc::default());
        let streams = [Arc::clone(&stream)];
        let mut stall = Box::pin(stalled(&streams));
        let within = async |stall: &mut _, time| tokio::time::timeout(time, stall).await.is_ok();
        assert!(!within(&mut stall, STALL / 2).await);
        let paused = Paused::new(Arc::clone(&stream));
        assert!(!within(&mut stall, STALL * 100).await, "a pause is no stall");
        drop(paused);
        assert!(
            !within(&mut stall, STALL * 3 / 4).await,
            "it has just been told to go on"
        );
        stream.done.store(1, Ordering::Relaxed);
        assert!(!within(&mut stall, STALL).await, "it moves");
        assert!(within(&mut stall, STALL * 2).await, "it has stopped");
        stream.done.store(100, Ordering::Relaxed);
        assert!(
            !within(&mut Box::pin(stalled(&streams)), STALL * 100).await,
            "it has all its bytes"
        );
    }
}
