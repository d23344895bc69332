//! One layer, several places to get it from.
//!
//! containerd's content labels name a registry without its port, and an image may have been pulled from several repositories. What is
//! known of the places is kept by layer in [`Standings`]: which of them have delivered bytes that were the layer's, and which failed
//! lately. Those that delivered come first, the last one of them before all; then those that were never tried; and those that failed come
//! last, for a time that grows. A [`Failover`] asks them in that order, also in the middle of a body. One that says nothing is asked beside
//! the next one, if that is another host: a second question to the same would only add to its work.

use std::cmp::Reverse;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{self, FuturesUnordered};
use futures::{FutureExt, StreamExt};
use lru::LruCache;
use tokio::time::{Instant, sleep};

use crate::fetch::Fetcher;
use crate::fetch::schedule::Class;
use crate::layer::Digest;
use crate::registry::health::Shun;
use crate::registry::{Blob, Body, Origin, Reference, Registry, RegistryError, Source};
use crate::store::LayerSource;

/// Silence of a place after which another host is asked as well. It is longer than a client's own patience with one of several mirrors
/// ([`crate::registry::health::SILENT`]), which comes first.
const SILENT: Duration = Duration::from_secs(2);
/// Silence in the middle of a body after which the rest is asked for elsewhere.
const STALLED: Duration = Duration::from_secs(4);
/// Layers and places of which something is known; the ones unused longest are forgotten.
const MAX_KNOWN: NonZeroUsize = NonZeroUsize::new(16_384).unwrap();

/// What is known of all places of all layers.
pub struct Standings(Mutex<Known>);

struct Known {
    places: LruCache<(Digest, Origin), Standing>,
    /// Counts deliveries.
    deliveries: u64,
}

/// What is known of one place of one layer.
#[derive(Debug, Clone, Copy, Default)]
struct Standing {
    /// Which delivery its last one was.
    delivered: Option<u64>,
    shun: Shun,
}

impl Default for Standings {
    fn default() -> Self {
        Standings(Mutex::new(Known {
            places: LruCache::new(MAX_KNOWN),
            deliveries: 0,
        }))
    }
}

impl Standings {
    /// The sources of a layer, of which those in `new` were just named by an image, and `known` were known before: in the order in which
    /// they are to be asked, and at most `most` of them. New ones come behind those that have delivered, and before others.
    pub fn arrange(&self, layer: &Digest, known: &[LayerSource], new: &[LayerSource], most: usize) -> Vec<LayerSource> {
        let now = Instant::now().into_std();
        let known_only = known.iter().filter(|source| !new.contains(source));
        let all: Vec<&LayerSource> = new.iter().chain(known_only).collect();
        let places = self.lock();
        let mut order: Vec<usize> = (0..all.len()).collect();
        order.sort_by_key(|at| {
            let standing = places.of(layer, &origin(all[*at]));
            // Who has delivered is kept, even if nobody can reach it now.
            let delivered = standing.delivered.map(Reverse);
            (delivered.is_none(), delivered, standing.shun.ends(now), *at)
        });
        order.into_iter().take(most).map(|at| all[at].clone()).collect()
    }

    /// The order in which `places` are asked for a layer.
    fn order<'a>(&self, layer: &Digest, places: impl Iterator<Item = &'a Origin>) -> Vec<usize> {
        let now = Instant::now().into_std();
        let known = self.lock();
        let mut order: Vec<_> = places
            .enumerate()
            .map(|(at, place)| {
                let standing = known.of(layer, place);
                let delivered = standing.delivered.map(Reverse);
                (standing.shun.ends(now), delivered.is_none(), delivered, at)
            })
            .collect();
        order.sort();
        order.into_iter().map(|(.., at)| at).collect()
    }

    /// A place sent bytes that are the layer's.
    fn delivered(&self, layer: &Digest, place: &Origin) {
        let mut known = self.lock();
        known.deliveries += 1;
        let delivered = Some(known.deliveries);
        let shun = Shun::default();
        known.places.put((*layer, place.clone()), Standing { delivered, shun });
    }

    /// A place could not deliver. What it delivered before still tells it from the others.
    fn failed(&self, layer: &Digest, place: &Origin) {
        let now = Instant::now().into_std();
        let mut known = self.lock();
        let key = (*layer, place.clone());
        let mut standing = known.places.get(&key).copied().unwrap_or_default();
        standing.shun.failed(now);
        known.places.put(key, standing);
    }

    /// A place sent bytes that are not the layer's: what it delivered before counts no more.
    fn lied(&self, layer: &Digest, place: &Origin) {
        self.failed(layer, place);
        if let Some(standing) = self.lock().places.get_mut(&(*layer, place.clone())) {
            standing.delivered = None;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn of(&self, layer: &Digest, place: &Origin) -> Standing {
        let known = self.places.peek(&(*layer, place.clone()));
        known.copied().unwrap_or_default()
    }
}

/// The repositories that documents about layers are read from. In a daemon they are read when the scheduler lets it, as all else is.
#[derive(Clone)]
pub struct Repositories {
    registry: Arc<Registry>,
    fetcher: Option<Arc<Fetcher>>,
}

impl From<Arc<Registry>> for Repositories {
    /// For who reads nothing else meanwhile.
    fn from(registry: Arc<Registry>) -> Self {
        let fetcher = None;
        Repositories { registry, fetcher }
    }
}

impl Repositories {
    /// Those of `registry`, read when the scheduler of `fetcher` lets it.
    pub fn scheduled(registry: Arc<Registry>, fetcher: Arc<Fetcher>) -> Self {
        let fetcher = Some(fetcher);
        Repositories { registry, fetcher }
    }

    /// That of an image. Cheap; nothing is asked yet.
    pub fn of(&self, image: &Reference) -> Arc<dyn Source> {
        self.at(&LayerSource {
            host: image.host.clone(),
            repository: image.repository.clone(),
        })
    }

    /// One of them. Cheap; nothing is asked yet.
    pub fn at(&self, place: &LayerSource) -> Arc<dyn Source> {
        let source = self.registry.repository(&place.host, &place.repository);
        match &self.fetcher {
            Some(fetcher) => fetcher.scheduled_source(source, origin(place), Class::Demand),
            None => source,
        }
    }
}

fn origin(source: &LayerSource) -> Origin {
    Origin::new(&source.host, &source.repository)
}

/// The same blob at several places.
pub struct Failover(Arc<Places>);

struct Places {
    layer: Digest,
    blobs: Vec<Arc<dyn Blob>>,
    origins: Vec<Origin>,
    standings: Arc<Standings>,
    /// Position of the place that answered last.
    served: AtomicUsize,
}

impl Failover {
    /// The blob of `layer` that is asked for at `blobs`; `None` if there are none.
    pub fn over(layer: Digest, blobs: Vec<Arc<dyn Blob>>, standings: Arc<Standings>) -> Option<Arc<dyn Blob>> {
        let origins: Vec<Origin> = blobs.iter().map(|blob| blob.origin()).collect();
        let first = *standings.order(&layer, origins.iter()).first()?;
        Some(Arc::new(Failover(Arc::new(Places {
            layer,
            blobs,
            origins,
            standings,
            served: AtomicUsize::new(first),
        }))))
    }
}

impl Places {
    /// Asks for `range`, everywhere but at `except`, until one place answers. Gives its position. If `part`, it is no answer that a place has
    /// the blob, but no ranges of it; that is what is said at the end, if nobody else has any.
    async fn open(&self, range: Range<u64>, part: bool, except: Option<usize>) -> Result<(usize, Body), RegistryError> {
        let order = self.standings.order(&self.layer, self.origins.iter());
        let mut left: Vec<usize> = order.into_iter().filter(|at| Some(*at) != except).collect();
        let mut asked: FuturesUnordered<BoxFuture<'_, (usize, Result<Body, RegistryError>)>> = FuturesUnordered::new();
        let mut busy: Vec<usize> = Vec::new();
        let mut worst: Option<RegistryError> = None;
        let mut no_ranges: Option<(usize, RegistryError)> = None;
        loop {
            // Beside others, only a host that none of them is at.
            let is_free = |at: &usize| {
                busy.iter()
                    .all(|other| self.origins[*other].host != self.origins[*at].host)
            };
            let next = left.iter().position(is_free);
            if busy.is_empty() && next.is_none() {
                if let Some((at, error)) = no_ranges {
                    self.served.store(at, Ordering::Relaxed);
                    return Err(error);
                }
                return Err(worst.unwrap_or_else(|| RegistryError::NotFound {
                    host: "no other source".to_owned(),
                    what: self.blobs[except.unwrap_or_default()].describe(),
                }));
            }
            let patience = if busy.is_empty() { Duration::ZERO } else { SILENT };
            tokio::select! {
                Some((at, outcome)) = asked.next() => match outcome {
                    Ok(body) => {
                        self.served.store(at, Ordering::Relaxed);
                        // Those that were asked before it, and were not as quick.
                        let turn = busy.iter().position(|other| *other == at).unwrap_or_default();
                        busy[..turn].iter().for_each(|slow| self.failed(*slow, "another source was quicker"));
                        return Ok((at, body));
                    }
                    Err(error) => {
                        busy.retain(|other| *other != at);
                        if matches!(error, RegistryError::NoRanges { .. }) {
                            no_ranges.get_or_insert((at, error));
                            continue;
                        }
                        self.failed(at, &error.to_string());
                        worst = Some(more_telling(worst.take(), error));
                    }
                },
                () = sleep(patience), if next.is_some() => {
                    let at = left.remove(next.unwrap_or_default());
                    let range = range.clone();
                    let blob = &self.blobs[at];
                    asked.push(
                        async move {
                            match part {
                                true => (at, blob.read_part(range).await),
                                false => (at, blob.read(range).await),
                            }
                        }
                        .boxed(),
                    );
                    busy.push(at);
                }
            }
        }
    }

    fn failed(&self, at: usize, why: &str) {
        tracing::debug!(source = self.blobs[at].describe(), why, "source cannot deliver");
        self.standings.failed(&self.layer, &self.origins[at]);
    }

    /// The place that answered last.
    fn last(&self) -> usize {
        self.served.load(Ordering::Relaxed)
    }

    /// The place that is asked first.
    fn first(&self) -> usize {
        let order = self.standings.order(&self.layer, self.origins.iter());
        order.first().copied().unwrap_or_default()
    }

    fn is_at_several_hosts(&self) -> bool {
        self.origins.windows(2).any(|pair| pair[0].host != pair[1].host)
    }
}

/// A body that goes on from another place when the one that it comes from fails or stalls.
struct Going {
    places: Arc<Places>,
    body: Body,
    from: usize,
    rest: Range<u64>,
    /// Whether places without ranges are left alone.
    part: bool,
    can_stall: bool,
}

impl Going {
    async fn next(&mut self) -> Option<Result<bytes::Bytes, RegistryError>> {
        loop {
            let silence = async {
                match self.can_stall {
                    true => sleep(STALLED).await,
                    false => std::future::pending().await,
                }
            };
            let piece = tokio::select! {
                piece = self.body.next() => piece,
                () = silence => {
                    let elsewhere = self.places.open(self.rest.clone(), self.part, Some(self.from));
                    tokio::select! {
                        piece = self.body.next() => piece,
                        Ok((at, body)) = elsewhere => {
                            self.places.failed(self.from, "it stalled");
                            (self.from, self.body) = (at, body);
                            continue;
                        }
                        else => {
                            // Nobody else has it.
                            self.can_stall = false;
                            continue;
                        }
                    }
                }
            };
            match piece {
                Some(Ok(bytes)) => {
                    self.rest.start += bytes.len() as u64;
                    return Some(Ok(bytes));
                }
                Some(Err(error)) if self.places.blobs.len() > 1 && !self.rest.is_empty() => {
                    if !matches!(error, RegistryError::NoRanges { .. }) {
                        self.places.failed(self.from, &error.to_string());
                    }
                    match self.places.open(self.rest.clone(), self.part, Some(self.from)).await {
                        Ok((at, body)) => (self.from, self.body) = (at, body),
                        Err(_) => return Some(Err(error)),
                    }
                }
                end => return end,
            }
        }
    }
}

impl Failover {
    async fn body(&self, range: Range<u64>, part: bool) -> Result<Body, RegistryError> {
        let (from, body) = self.0.open(range.clone(), part, None).await?;
        if self.0.blobs.len() == 1 {
            return Ok(body);
        }
        let going = Going {
            places: Arc::clone(&self.0),
            body,
            from,
            rest: range,
            part,
            can_stall: self.0.is_at_several_hosts(),
        };
        let pieces = stream::unfold(going, |mut going| async move {
            let piece = going.next().await?;
            Some((piece, going))
        });
        Ok(pieces.boxed())
    }
}

impl Blob for Failover {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        self.body(range, false).boxed()
    }

    fn read_part(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        self.body(range, true).boxed()
    }

    fn size(&self) -> u64 {
        self.0.blobs.first().map_or(0, |blob| blob.size())
    }

    fn distrust(&self) {
        let at = self.0.last();
        self.0.blobs[at].distrust();
        self.0.standings.lied(&self.0.layer, &self.0.origins[at]);
    }

    fn verified(&self) {
        self.0
            .standings
            .delivered(&self.0.layer, &self.0.origins[self.0.last()]);
    }

    fn describe(&self) -> String {
        self.0.blobs[self.0.last()].describe()
    }

    /// That of the place which is asked first.
    fn origin(&self) -> Origin {
        self.0.origins[self.0.first()].clone()
    }
}

/// Of two failures, the one to report: a host that answered says more than one that could not be reached.
fn more_telling(a: Option<RegistryError>, b: RegistryError) -> RegistryError {
    match a {
        Some(a) if !matches!(a, RegistryError::Unreachable { .. }) => a,
        _ => b,
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures::TryStreamExt;

    use super::*;

    /// What a place does when it is asked.
    #[derive(Clone)]
    enum Does {
        Deliver(&'static [u8]),
        Fail(RegistryError),
        Hang,
        /// Delivers one byte, then ends with an error, or never.
        Break,
        Stall,
    }

    struct Place {
        does: Does,
        origin: Origin,
        asked: AtomicUsize,
    }

    impl Blob for Place {
        fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            let part = |bytes: &'static [u8]| Ok(Bytes::from_static(&bytes[range.start as usize..range.end as usize]));
            let first = Ok(Bytes::from_static(b"abcdef").slice(range.start as usize..range.start as usize + 1));
            let answer = match &self.does {
                Does::Deliver(bytes) => Ok(stream::iter([part(bytes)]).boxed()),
                Does::Fail(error) => Err(error.clone()),
                Does::Hang => return std::future::pending().boxed(),
                Does::Break => Ok(stream::iter([first, Err(unreachable_host())]).boxed()),
                Does::Stall => Ok(stream::iter([first]).chain(stream::pending()).boxed()),
            };
            async move { answer }.boxed()
        }
        fn size(&self) -> u64 {
            6
        }
        fn describe(&self) -> String {
            format!("{}/{}", self.origin.host, self.origin.repository)
        }
        fn origin(&self) -> Origin {
            self.origin.clone()
        }
    }

    fn unreachable_host() -> RegistryError {
        RegistryError::Unreachable {
            host: "a".into(),
            what: "refused".into(),
        }
    }

    fn missing() -> RegistryError {
        RegistryError::NotFound {
            host: "b".into(),
            what: "blob".into(),
        }
    }

    struct Rig {
        places: Vec<Arc<Place>>,
        blob: Arc<dyn Blob>,
        standings: Arc<Standings>,
        layer: Digest,
    }

    impl Rig {
        fn new(places: &[(&str, Does)]) -> Self {
            let places: Vec<_> = places
                .iter()
                .enumerate()
                .map(|(at, (host, does))| {
                    Arc::new(Place {
                        does: does.clone(),
                        origin: Origin::new(host, &format!("r{at}")),
                        asked: AtomicUsize::new(0),
                    })
                })
                .collect();
            let standings = Arc::<Standings>::default();
            let layer = Digest::of(b"layer");
            let blobs = places.iter().map(|place| Arc::clone(place) as Arc<dyn Blob>).collect();
            Rig {
                blob: Failover::over(layer, blobs, Arc::clone(&standings)).unwrap(),
                places,
                standings,
                layer,
            }
        }

        async fn read(&self, range: Range<u64>) -> Result<Vec<u8>, RegistryError> {
            let parts: Vec<Bytes> = self.blob.read(range).await?.try_collect().await?;
            Ok(parts.concat())
        }

        fn asked(&self) -> Vec<usize> {
            self.places
                .iter()
                .map(|place| place.asked.swap(0, Ordering::Relaxed))
                .collect()
        }
    }

    const GOOD: Does = Does::Deliver(b"abcdef");

    #[tokio::test(start_paused = true)]
    async fn the_place_that_works_is_found_and_remembered() {
        let rig = Rig::new(&[
            ("a", Does::Fail(unreachable_host())),
            ("b", Does::Fail(missing())),
            ("c", GOOD),
        ]);
        assert_eq!(rig.read(1..3).await.unwrap(), b"bc");
        rig.blob.verified();
        assert_eq!((rig.asked(), rig.blob.describe()), (vec![1, 1, 1], "c/r2".to_owned()));
        assert_eq!(rig.read(0..6).await.unwrap(), b"abcdef");
        assert_eq!(
            (rig.asked(), rig.blob.origin()),
            (vec![0, 0, 1], Origin::new("c", "r2"))
        );
    }

    #[tokio::test]
    async fn the_more_telling_failure_is_reported() {
        for errors in [[unreachable_host(), missing()], [missing(), unreachable_host()]] {
            let rig = Rig::new(&errors.map(|error| ("a", Does::Fail(error))));
            let error = rig.read(0..1).await.unwrap_err();
            assert!(matches!(error, RegistryError::NotFound { .. }), "{error}");
        }
    }

    #[tokio::test]
    async fn a_place_that_sent_damaged_bytes_is_asked_last() {
        let rig = Rig::new(&[("a", Does::Deliver(b"xxxxxx")), ("a", GOOD)]);
        assert_eq!(rig.read(0..3).await.unwrap(), b"xxx");
        rig.blob.verified();
        rig.blob.distrust();
        assert_eq!(rig.read(0..3).await.unwrap(), b"abc");
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_host_costs_one_wait_and_is_asked_again_later() {
        let rig = Rig::new(&[("a", Does::Hang), ("a", GOOD), ("b", GOOD)]);
        let began = Instant::now();
        assert_eq!(rig.read(0..6).await.unwrap(), b"abcdef");
        // The other repository of the silent host was not asked meanwhile.
        assert_eq!((rig.asked(), began.elapsed()), (vec![1, 0, 1], SILENT));
        rig.blob.verified();
        let began = Instant::now();
        for _ in 0..10 {
            rig.read(0..6).await.unwrap();
        }
        assert_eq!((rig.asked(), began.elapsed()), (vec![0, 0, 10], Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_breaks_or_stalls_goes_on_elsewhere() {
        for does in [Does::Break, Does::Stall] {
            let rig = Rig::new(&[("a", does), ("b", GOOD)]);
            assert_eq!(rig.read(1..6).await.unwrap(), b"bcdef");
            assert_eq!(rig.asked(), [1, 1]);
        }
        // Where nobody else has it, the error is that of the place that had it.
        let rig = Rig::new(&[("a", Does::Break), ("b", Does::Fail(missing()))]);
        assert!(matches!(rig.read(0..6).await, Err(RegistryError::Unreachable { .. })));
    }

    fn source(name: &str) -> LayerSource {
        LayerSource {
            host: "h".to_owned(),
            repository: name.to_owned(),
        }
    }

    #[test]
    fn what_has_delivered_stays_in_front_however_many_others_are_named() {
        let rig = Rig::new(&[("h", GOOD)]);
        let (standings, layer) = (&rig.standings, &rig.layer);
        standings.delivered(layer, &origin(&source("old")));
        standings.delivered(layer, &origin(&source("good")));
        let mut known = vec![source("good"), source("old")];
        for at in 0..20 {
            let new = source(&at.to_string());
            known = standings.arrange(layer, &known, std::slice::from_ref(&new), 8);
            assert_eq!(known[..3], [source("good"), source("old"), new]);
            assert!(known.len() <= 8);
        }
        // Even while it cannot be reached.
        standings.failed(layer, &origin(&source("good")));
        known = standings.arrange(layer, &known, &[source("x"), source("y")], 3);
        assert_eq!(known, [source("good"), source("old"), source("x")]);
        // What sent false bytes has not.
        standings.lied(layer, &origin(&source("good")));
        known = standings.arrange(layer, &known, &[source("x")], 3);
        assert_eq!(known, [source("old"), source("x"), source("good")]);
    }

    #[test]
    fn no_places_no_blob() {
        assert!(Failover::over(Digest::of(b""), Vec::new(), Arc::default()).is_none());
    }
}
