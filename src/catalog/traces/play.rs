//! Asking ahead for what earlier starts have read: as soon as layers are live, in the order of the first read, in waves.
//!
//! A layer's queue makes large requests of what is asked for at once, in the order of the blob. So wishes are given to it in waves: the first is
//! large enough for most starts, and a later one follows when all of the one before has its request, and is twice as large. What a
//! reader waits for overtakes all of it, and a wish that a reader waits for is a reader's.
//!
//! Nobody waits for a playback, and none can fail: a layer that does not become live is not asked for anything.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use tokio_util::sync::CancellationToken;

use super::{Fit, Head, PLAYED_FOR, PLAYED_MAX};
use crate::catalog::Catalog;
use crate::catalog::images::ImagePlan;
use crate::catalog::question::Begun;
use crate::fetch::{Layer, LayerData as _, Wished};
use crate::layer::Digest;
use crate::layer::trace::{Entry, Placed, Trace};
use crate::store::{LayerSource, StoreError};
use crate::sync::blocking;

/// Bytes of the first wave: more than most programs read to start.
const FIRST_WAVE: u64 = 32 << 20;
/// Bytes of the largest wave: the order within it is that of the blob.
const LARGEST_WAVE: u64 = 256 << 20;
/// Most bytes that are played for one image. Who reads more than this has started long before.
const PLAYED_BYTES: u64 = 1 << 30;
/// Part of the cache that they may be, if that is limited: one in so many.
const CACHE_PART: u64 = 4;
/// How often it is looked whether a wave has its requests.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// How long after a playback began the image is not played again: a pull asks for one layer after the other.
const AGAIN: Duration = Duration::from_secs(30);
/// Longest playback: layers that are not live by then are streamed.
const LONGEST: Duration = Duration::from_secs(60);

/// A layer that will be live: the digest of its blob, and itself.
type Coming = BoxFuture<'static, Option<(Digest, Arc<Layer>)>>;

/// What is played, or was.
pub(super) struct Played {
    /// When that began.
    at: Instant,
    /// What was expected to be started.
    pub(super) entry: Entry,
    /// Ends it.
    pub(super) end: CancellationToken,
    manifest: Digest,
    state: Mutex<PlayedState>,
}

#[derive(Default)]
struct PlayedState {
    trace: Option<Trace>,
    found: Vec<(Digest, Vec<Placed>)>,
    wished: HashMap<Digest, Vec<(u64, u64)>>,
}

impl Played {
    fn state(&self) -> MutexGuard<'_, PlayedState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The trace as it is for the image that it was played for.
    pub(super) fn moved(&self) -> Option<Trace> {
        let state = self.state();
        Some(state.trace.as_ref()?.moved(self.manifest, &state.found))
    }

    /// What was fetched for it of the layer with this id: ranges of its data space.
    pub(super) fn wished(&self, layer: &Digest) -> Vec<(u64, u64)> {
        self.state().wished.get(layer).cloned().unwrap_or_default()
    }
}

impl Catalog {
    /// Plays what is known of an image whose layers are being made live, unless that is done already.
    pub(in crate::catalog) fn play_for(self: &Arc<Self>, plan: &ImagePlan, begun: &[Begun]) {
        if !self.traces.config.enabled {
            return;
        }
        {
            let mut state = self.traces.state();
            state.played.retain(|_, played| played.at.elapsed() < PLAYED_FOR);
            let known = state.played.get(&plan.manifest);
            if known.is_some_and(|played| played.at.elapsed() < AGAIN) || state.played.len() >= PLAYED_MAX {
                return;
            }
        }
        let sources = plan.sources.clone();
        let names = sources.iter();
        let repositories = names.map(|source| super::repository(&source.host, &source.repository));
        let repositories: Vec<String> = repositories.filter(|name| !name.is_empty()).collect();
        if repositories.is_empty() {
            return;
        }
        let mut seen = HashSet::new();
        let layers = plan.layers.iter().zip(begun);
        let coming = layers
            .filter(|(planned, _)| seen.insert(planned.spec.digest))
            .map(|(planned, begun)| {
                // It does not keep alive what it waits for: the pull may be given up.
                let (catalog, digest, outcome) = (Arc::clone(self), planned.spec.digest, begun.later());
                async move { Some((digest, catalog.live_layer(&outcome.await.ok()?)?)) }.boxed()
            });
        let coming: Vec<Coming> = coming.collect();
        let image = plan.layers.iter().map(|planned| planned.spec.digest).collect();
        let (catalog, manifest) = (Arc::clone(self), plan.manifest);
        tokio::spawn(async move {
            let finder = Arc::clone(&catalog);
            let names = repositories.clone();
            let mut found = blocking(move || finder.best_trace(&names, &manifest, None)).await;
            if !matches!(found, Some((Fit::Same, _))) {
                let shared = catalog.take_shared(&sources, manifest, &repositories[0]).await;
                found = shared.map(|trace| (Fit::Shared, trace)).or(found);
            }
            match found {
                Some((fit, trace)) => catalog.play(manifest, image, coming, fit, trace).await,
                None => catalog.metrics.trace_plays_total.with_label_values(&["none"]).inc(),
            }
        });
    }

    /// Takes over what others have published of an image; the trace of it to be played.
    async fn take_shared(
        self: &Arc<Self>,
        places: &[LayerSource],
        manifest: Digest,
        repository: &str,
    ) -> Option<Trace> {
        let traces = self.shared_traces(places, manifest, repository).await;
        let known = traces.clone();
        let kept = self.store.change(move |draft| {
            for trace in &known {
                draft.put_trace(trace)?;
            }
            Ok::<_, StoreError>(())
        });
        if let Err(error) = kept.await {
            tracing::warn!(%error, %manifest, "what others know of its starts cannot be kept");
        }
        let heads: Vec<Head> = traces.iter().map(Head::from).collect();
        let (_, chosen) = super::best(&heads, &manifest, None)?;
        traces.into_iter().find(|trace| trace.entry.id == chosen.entry)
    }

    /// Plays a trace for an image with these layers.
    pub(super) async fn play(
        self: Arc<Self>,
        manifest: Digest,
        image: HashSet<Digest>,
        coming: Vec<Coming>,
        fit: Fit,
        trace: Trace,
    ) {
        let played = Arc::new(Played {
            at: Instant::now(),
            entry: trace.entry.clone(),
            end: CancellationToken::new(),
            manifest,
            state: Mutex::default(),
        });
        {
            let mut state = self.traces.state();
            let is_played = |other: &Arc<Played>| {
                other.entry == played.entry && !other.end.is_cancelled() && other.at.elapsed() < AGAIN
            };
            if state.played.get(&manifest).is_some_and(is_played) {
                return;
            }
            if let Some(other) = state.played.insert(manifest, Arc::clone(&played)) {
                other.end.cancel();
            }
        }
        let metrics = Arc::clone(&self.metrics);
        metrics.trace_plays_total.with_label_values(&[fit.word()]).inc();
        tracing::info!(%manifest, program = trace.entry.program, fit = fit.word(), bytes = trace.bytes(), "what it read before is fetched ahead");
        let mut limit = PLAYED_BYTES;
        if self.cache_max_bytes > 0 {
            limit = limit.min(self.cache_max_bytes / CACHE_PART);
        }
        let trace = Arc::new(trace);
        played.state().trace = Some((*trace).clone());
        let player = Player {
            played: Arc::clone(&played),
            trace,
            image: Arc::new(image),
            waiting: BTreeMap::new(),
            layers: Vec::new(),
            wave: Vec::new(),
            size: FIRST_WAVE,
            left: limit,
        };
        let bytes = player.run(coming).await;
        metrics.trace_wished_bytes_total.inc_by(bytes);
        tracing::debug!(%manifest, bytes, "what was to be fetched ahead is under way");
    }
}

/// A playback under way.
struct Player {
    played: Arc<Played>,
    trace: Arc<Trace>,
    image: Arc<HashSet<Digest>>,
    layers: Vec<Arc<Layer>>,
    /// What is to be asked for, by its place in the trace and the layer.
    waiting: BTreeMap<(usize, usize), Placed>,
    /// What was asked for last.
    wave: Vec<(Arc<Layer>, Wished)>,
    /// Bytes of the next wave.
    size: u64,
    /// Bytes that may still be asked for.
    left: u64,
}

impl Player {
    /// Plays until all is under way; bytes of data spaces that were asked for and were not here.
    async fn run(mut self, coming: Vec<Coming>) -> u64 {
        let end = self.played.end.clone();
        let over = tokio::time::sleep(LONGEST);
        tokio::pin!(over);
        let (trace, image) = (Arc::clone(&self.trace), Arc::clone(&self.image));
        let placed = coming.into_iter().map(|coming| {
            let (trace, image) = (Arc::clone(&trace), Arc::clone(&image));
            async move {
                let (digest, layer) = coming.await?;
                // Of what is here nothing is asked for, and the names are not needed.
                if layer.cached().is_complete()
                    && let Some(known) = trace.known(&digest)
                {
                    return Some((digest, None, known));
                }
                blocking(move || {
                    // Without names nothing can be found.
                    let names = layer.names().ok()?;
                    let placed = trace.placed(&digest, &names, &image);
                    Some((digest, Some(layer), placed))
                })
                .await
            }
        });
        let mut placed: FuturesUnordered<_> = placed.collect();
        let mut bytes = 0;
        loop {
            let is_open = self.wave.iter().any(|(layer, _)| layer.has_wishes());
            if !is_open && !self.waiting.is_empty() {
                bytes += self.next_wave();
            }
            if placed.is_empty() && self.waiting.is_empty() && !is_open {
                return bytes;
            }
            tokio::select! {
                biased;
                () = end.cancelled() => {
                    self.wave.iter().for_each(|(layer, wished)| layer.unwish(wished));
                    return bytes;
                }
                () = &mut over => return bytes,
                Some(found) = placed.next(), if !placed.is_empty() => {
                    if let Some((digest, layer, places)) = found {
                        if let Some(layer) = layer {
                            let number = self.layers.len();
                            self.waiting.extend(places.iter().map(|place| ((place.wish, number), *place)));
                            self.layers.push(layer);
                        }
                        self.played.state().found.push((digest, places));
                    }
                }
                () = tokio::time::sleep(LOOK_EVERY), if is_open || !self.waiting.is_empty() => {}
            }
        }
    }

    /// Asks for the next wave; bytes of it that were not here.
    fn next_wave(&mut self) -> u64 {
        let mut asked: BTreeMap<usize, Vec<(u64, u64)>> = BTreeMap::new();
        let mut room = self.size.min(self.left);
        while room > 0
            && let Some(((_, layer), place)) = self.waiting.pop_first()
        {
            asked.entry(layer).or_default().push((place.data, place.len));
            room = room.saturating_sub(place.len);
        }
        self.left = self.left.saturating_sub(self.size - room.min(self.size));
        if self.left == 0 {
            self.waiting.clear();
        }
        self.size = self.size.saturating_mul(2).min(LARGEST_WAVE);
        self.wave.clear();
        let mut bytes = 0;
        for (layer, ranges) in asked {
            let layer = Arc::clone(&self.layers[layer]);
            let wished = layer.wish(&ranges);
            bytes += wished.ranges.iter().map(|(_, len)| len).sum::<u64>();
            let mut state = self.played.state();
            let known = state.wished.entry(*layer.id()).or_default();
            known.extend(&wished.ranges);
            drop(state);
            self.wave.push((layer, wished));
        }
        bytes
    }
}
