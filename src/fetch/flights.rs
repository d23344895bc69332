//! Streams under way, and who waits for them.
//!
//! Whoever asks for a layer that is being streamed waits for that stream. A stream whose last waiter has left ends: its connection, its place
//! and what it had written are free at once. Who comes with another source than those that are at work does not depend on them: if they make no
//! progress for [`STALL`], or fail, his own stream begins. The first one to finish answers all who wait for the layer, and ends the others.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use futures::future::select_all;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{FetchError, Fetcher, StreamRequest};
use crate::cache::{CachedLayer, Spool};
use crate::layer::Digest;
use crate::registry::Origin;

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

/// A stream under way.
struct Flight {
    layer: Digest,
    /// What its tar is promised to be: a false promise fails nobody else's.
    promise: Option<Digest>,
    source: Origin,
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
}

/// One who waits for a stream.
struct Seat {
    fetcher: Arc<Fetcher>,
    flight: Arc<Flight>,
}

impl Seat {
    async fn outcome(&self) -> Outcome {
        let mut outcome = self.flight.outcome.subscribe();
        let settled = outcome.wait_for(Option::is_some).await;
        let settled = settled.ok().and_then(|settled| settled.clone());
        // The flight lives as long as this seat, and its sender with it.
        settled.unwrap_or(Err(FetchError::Closed {
            layer: self.flight.layer,
        }))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut flights = self.fetcher.streams.lock();
        if self.flight.waiters.fetch_sub(1, Ordering::Relaxed) == 1 {
            // Not joined any more from now on.
            flights.retain(|flight| !Arc::ptr_eq(flight, &self.flight));
            self.flight.cancel.cancel();
        }
    }
}

/// Takes a flight that has come to its end out of the list, also when it panicked.
struct Landing(Arc<Fetcher>, Arc<Flight>);

impl Drop for Landing {
    fn drop(&mut self) {
        self.0.streams.lock().retain(|flight| !Arc::ptr_eq(flight, &self.1));
        let early = std::io::Error::other("the stream ended early");
        self.1.settle(&Err(FetchError::Disk {
            layer: self.1.layer,
            source: Arc::new(early),
        }));
    }
}

impl Streams {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Flight>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
        let source = request.blob.origin();
        let (mut seats, mut request) = self.join(request);
        loop {
            let (landed, at) = {
                let landings = seats.iter().map(|seat| seat.outcome().boxed());
                let streams: Vec<_> = seats.iter().map(|seat| Arc::clone(&seat.flight.progress)).collect();
                tokio::select! {
                    (outcome, at, _) = select_all(landings) => (Some(outcome), at),
                    () = stalled(&streams), if request.is_some() => (None, 0),
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
                FetchError::Corrupt { source, .. } => source.retry_helps(),
                FetchError::Disk { .. } => false,
            });
            if let Some(request) = request.take_if(|_| helps) {
                tracing::info!(layer = %request.digest, what = request.what, "streams from its own source: another one brings nothing");
                seats.push(self.begin(request, source.clone()));
            }
            if let (Some(error), true) = (error, seats.is_empty()) {
                return Err(error);
            }
        }
    }

    /// Takes a seat in each stream of the layer, and begins one if there is none. The request comes back if all of them are from other sources.
    fn join(self: &Arc<Self>, request: StreamRequest) -> (Vec<Seat>, Option<StreamRequest>) {
        let source = request.blob.origin();
        let flights = self.streams.lock();
        let there: Vec<Arc<Flight>> = flights
            .iter()
            .filter(|flight| flight.layer == request.digest && flight.promise == request.diff_id)
            .cloned()
            .collect();
        let seat = |flight: Arc<Flight>| {
            flight.waiters.fetch_add(1, Ordering::Relaxed);
            Seat {
                fetcher: Arc::clone(self),
                flight,
            }
        };
        let own = there.iter().any(|flight| flight.source == source);
        let seats: Vec<Seat> = there.into_iter().map(seat).collect();
        if !seats.is_empty() {
            return (seats, (!own).then_some(request));
        }
        (vec![self.launch(flights, request, source)], None)
    }

    fn begin(self: &Arc<Self>, request: StreamRequest, source: Origin) -> Seat {
        let flights = self.streams.lock();
        self.launch(flights, request, source)
    }

    fn launch(
        self: &Arc<Self>,
        mut flights: MutexGuard<'_, Vec<Arc<Flight>>>,
        request: StreamRequest,
        source: Origin,
    ) -> Seat {
        let other = flights.iter().find(|flight| flight.layer == request.digest);
        let wishes = other.map_or_else(Arc::default, |other| Arc::clone(&other.progress.wishes));
        let flight = Arc::new(Flight {
            layer: request.digest,
            promise: request.diff_id,
            source,
            progress: Progress::new(request.blob.size(), wishes),
            outcome: watch::Sender::new(None),
            cancel: CancellationToken::new(),
            waiters: AtomicU64::new(1),
        });
        flights.push(Arc::clone(&flight));
        drop(flights);
        let seat = Seat {
            fetcher: Arc::clone(self),
            flight: Arc::clone(&flight),
        };
        let landing = Landing(Arc::clone(self), Arc::clone(&flight));
        let me = Arc::clone(self);
        self.runtime.spawn(async move {
            let outcome = tokio::select! {
                outcome = me.stream_once(request, &flight.progress) => outcome,
                () = flight.cancel.cancelled() => Err(FetchError::Closed { layer: flight.layer }),
            };
            let mut flights = me.streams.lock();
            // First the end of the stream, then its result: who has the result and asks again gets a new one.
            flights.retain(|other| !Arc::ptr_eq(other, &flight));
            if outcome.is_ok() {
                flights.retain(|other| {
                    let same = other.layer == flight.layer && other.promise == flight.promise;
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

    /// How far the stream of a layer is, if it is being streamed: the stream that is farthest.
    pub fn progress(&self, layer: &Digest) -> Option<Arc<Progress>> {
        let flights = self.streams.lock();
        let of_layer = flights.iter().filter(|flight| flight.layer == *layer);
        let farthest = of_layer.max_by_key(|flight| flight.progress.done());
        farthest.map(|flight| Arc::clone(&flight.progress))
    }

    /// The streams under way: layer, bytes of the blob that have arrived, and bytes of the blob.
    pub fn streams_under_way(&self) -> Vec<(Digest, u64, u64)> {
        let mut layers: Vec<Digest> = self.streams.lock().iter().map(|flight| flight.layer).collect();
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
