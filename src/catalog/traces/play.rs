//! Asking ahead for what earlier starts have read: as soon as all layers are live, or a moment after the first one, in the order of the first read, in
//! waves ([`super::waves`]). Of an image of which nothing is known it is guessed ([`super::walk`]). If another command of the same program is
//! seen, what is known waits, and what has no request yet is taken back, until what that command reads is guessed and asked for.
//!
//! Nobody waits for a playback, and none can fail: a layer that does not become live is not asked for anything.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::waves::{CACHE_PART, Waves};
use super::{Fit, Head, PLAYED_FOR, PLAYED_MAX};
use crate::catalog::Catalog;
use crate::catalog::images::ImagePlan;
use crate::catalog::question::Begun;
use crate::fetch::{Layer, LayerData as _, Wished};
use crate::layer::Digest;
use crate::layer::trace::{Carried, Counts, Entry, Found, Placed, Trace};
use crate::store::{LayerSource, StoreError};
use crate::sync::blocking;

/// Most bytes that are played for one image. Who reads more than this has started long before.
const PLAYED_BYTES: u64 = 1 << 30;
/// How often it is looked whether a wave has its requests.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(10);
/// How long after a playback began the image is not played again: a pull asks for one layer after the other.
const AGAIN: Duration = Duration::from_secs(30);
/// How long the others are waited for when the first layer has come: indexes are asked for side by side, and come a round trip or two apart. What is
/// streamed takes longer.
const GATHERED: Duration = Duration::from_millis(100);
/// Longest playback: layers that are not live by then are streamed.
pub(super) const LONGEST: Duration = Duration::from_secs(60);

/// A layer that will be live: the digest of its blob, and itself.
pub(super) type Coming = BoxFuture<'static, Option<(Digest, Arc<Layer>)>>;

/// What is played, or was.
pub(super) struct Played {
    /// When that began.
    at: Instant,
    /// What was expected to be started.
    pub(super) entry: Entry,
    /// Cancelled when it has to end.
    pub(super) end: CancellationToken,
    /// What goes on beside it: what is known of a start that reads much of the same.
    beside: Option<Arc<Played>>,
    /// Whether it waits, with all of it that has no request yet, for what is guessed of another command.
    waits: watch::Sender<bool>,
    /// Whether it was guessed.
    pub(super) is_guess: bool,
    manifest: Digest,
    state: Mutex<PlayedState>,
}

/// While this lives, something waits.
pub(super) struct GoesFirst(Option<Arc<Played>>);

impl Drop for GoesFirst {
    fn drop(&mut self) {
        if let Some(other) = &self.0 {
            other.waits.send_replace(false);
        }
    }
}

#[derive(Default)]
struct PlayedState {
    trace: Option<Trace>,
    found: Vec<(Digest, Vec<Placed>)>,
    wished: HashMap<Digest, BTreeSet<(u64, u64)>>,
}

impl Played {
    /// Ends it, and what goes on beside it.
    pub(super) fn stop(&self) {
        self.end.cancel();
        if let Some(beside) = &self.beside {
            beside.stop();
        }
    }

    /// What goes on beside it waits for it until this is dropped.
    pub(super) fn goes_first(&self) -> GoesFirst {
        if let Some(other) = &self.beside {
            other.waits.send_replace(true);
        }
        GoesFirst(self.beside.clone())
    }

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
        let state = self.state();
        state.wished.get(layer).into_iter().flatten().copied().collect()
    }

    /// Notes what is fetched for it of a layer; bytes that were not noted before.
    pub(super) fn note(&self, layer: &Digest, wished: &Wished) -> u64 {
        let mut state = self.state();
        let known = state.wished.entry(*layer).or_default();
        let new = wished.ranges.iter().filter(|range| known.insert(**range));
        new.map(|(_, len)| len).sum()
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
        let layers = plan.layers.iter().zip(begun).map(|(planned, begun)| {
            // It does not keep alive what it waits for: the pull may be given up.
            let (catalog, digest, outcome) = (Arc::clone(self), planned.spec.digest, begun.later());
            let coming = async move { Some((digest, catalog.live_layer(&outcome.await.ok()?)?)) };
            (digest, coming.boxed())
        });
        let layers: Vec<(Digest, Coming)> = layers.collect();
        let plan = plan.clone();
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
                Some((fit, trace)) => {
                    let mut seen = HashSet::new();
                    let coming = layers.into_iter().filter(|(digest, _)| seen.insert(*digest));
                    let coming = coming.map(|(_, coming)| coming).collect();
                    catalog.play(manifest, image, coming, fit, trace).await;
                }
                None => {
                    catalog.metrics.trace_plays_total.with_label_values(&["none"]).inc();
                    let coming = layers.into_iter().map(|(_, coming)| coming).collect();
                    catalog.walk_for(&plan, coming).await;
                }
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
        let Some(played) = self.begin_play(manifest, trace.entry.clone(), false) else {
            return;
        };
        let metrics = Arc::clone(&self.metrics);
        metrics.trace_plays_total.with_label_values(&[fit.word()]).inc();
        tracing::info!(%manifest, program = trace.entry.program, fit = fit.word(), bytes = trace.bytes(), "what it read before is fetched ahead");
        let trace = Arc::new(trace);
        played.state().trace = Some((*trace).clone());
        let player = Player {
            played: Arc::clone(&played),
            trace,
            image: Arc::new(image),
            waves: self.waves(&played, PLAYED_BYTES),
            layers: HashMap::new(),
        };
        let (bytes, counts) = player.run(coming).await;
        let carried = [
            ("same", counts.same),
            ("changed", counts.changed),
            ("moved", counts.moved),
            ("gone", counts.gone),
        ];
        for (how, files) in carried {
            metrics
                .trace_carried_files_total
                .with_label_values(&[how])
                .inc_by(files);
        }
        metrics.trace_wished_bytes_total.inc_by(bytes);
        tracing::debug!(%manifest, bytes, ?counts, "what was to be fetched ahead is under way");
    }

    /// Something is to be fetched ahead for an image; `None` if that has begun already for the same entry point. What is played for another one
    /// ends, unless this is a guess, and that is known of a start that reads much of the same.
    pub(super) fn begin_play(&self, manifest: Digest, entry: Entry, is_guess: bool) -> Option<Arc<Played>> {
        let mut state = self.traces.state();
        let is_played = |other: &&Arc<Played>| {
            // What is known is better than a guess.
            let is_better = other.is_guess && !is_guess;
            other.entry == entry && !other.end.is_cancelled() && other.at.elapsed() < AGAIN && !is_better
        };
        if state.played.get(&manifest).filter(is_played).is_some() {
            return None;
        }
        let helps = |other: &Arc<Played>| is_guess && !other.is_guess && other.entry.resembles(&entry);
        let beside = match state.played.remove(&manifest) {
            Some(other) if helps(&other) => Some(other),
            Some(other) => {
                other.stop();
                None
            }
            None => None,
        };
        let played = Arc::new(Played {
            at: Instant::now(),
            entry,
            end: CancellationToken::new(),
            beside,
            waits: watch::Sender::new(false),
            is_guess,
            manifest,
            state: Mutex::default(),
        });
        state.played.insert(manifest, Arc::clone(&played));
        Some(played)
    }

    /// Waves of what is fetched ahead, of so many bytes at most.
    pub(super) fn waves(&self, played: &Arc<Played>, most: u64) -> Waves {
        let part = match self.cache_max_bytes {
            0 => u64::MAX,
            limited => limited / CACHE_PART,
        };
        Waves::new(Arc::clone(played), most.min(part))
    }
}

/// A playback under way.
struct Player {
    played: Arc<Played>,
    trace: Arc<Trace>,
    image: Arc<HashSet<Digest>>,
    waves: Waves,
    /// Layers that have come and are not here, by their position.
    layers: HashMap<usize, (Digest, Arc<Layer>)>,
}

impl Player {
    /// Plays until all is under way; bytes of data spaces that were asked for and were not here, and what was found of the trace.
    async fn run(mut self, coming: Vec<Coming>) -> (u64, Counts) {
        let end = self.played.end.clone();
        let mut waits = self.played.waits.subscribe();
        let over = tokio::time::sleep(LONGEST);
        tokio::pin!(over);
        let (trace, image) = (Arc::clone(&self.trace), Arc::clone(&self.image));
        let found = coming.into_iter().enumerate().map(|(position, coming)| {
            let (trace, image) = (Arc::clone(&trace), Arc::clone(&image));
            async move {
                let (digest, layer) = coming.await?;
                // Of what is here nothing is asked for, and the names are not needed.
                if layer.cached().is_complete()
                    && let Some(known) = trace.known(&digest)
                {
                    return Some((position, digest, None, Found::known(known)));
                }
                blocking(move || {
                    // Without names nothing can be found.
                    let names = layer.names().ok()?;
                    let found = trace.found_in(&digest, &names, &image);
                    Some((position, digest, Some(layer), found))
                })
                .await
            }
        });
        let mut found: FuturesUnordered<_> = found.collect();
        let mut carried = Some(Carried::new(trace, image));
        let (mut bytes, mut counts) = (0, Counts::default());
        let mut first = None;
        loop {
            if found.is_empty()
                && let Some(carried) = carried.take()
            {
                let rest;
                (rest, counts) = carried.rest();
                rest.into_iter()
                    .for_each(|(position, places)| self.wish(position, places));
            }
            // Of what is asked for before all layers are here, the most urgent may be missing, and the others' indexes come more slowly for it.
            let are_gathered = found.is_empty() || first.is_some_and(|at: Instant| at.elapsed() >= GATHERED);
            let has_to_wait = *waits.borrow_and_update();
            if has_to_wait {
                self.waves.hold();
            } else if are_gathered {
                bytes += self.waves.go_on();
            }
            let is_over = self.waves.are_over();
            if found.is_empty() && is_over {
                return (bytes, counts);
            }
            tokio::select! {
                biased;
                () = end.cancelled() => {
                    self.waves.take_back();
                    return (bytes, counts);
                }
                () = &mut over => return (bytes, counts),
                _ = waits.changed() => {}
                Some(layer) = found.next(), if !found.is_empty() => {
                    first.get_or_insert_with(Instant::now);
                    if let (Some((position, digest, layer, found)), Some(carried)) = (layer, &mut carried) {
                        let places = carried.take(position, found);
                        match layer {
                            Some(layer) => {
                                self.layers.insert(position, (digest, layer));
                                self.wish(position, places);
                            }
                            None => self.played.state().found.push((digest, places)),
                        }
                    }
                }
                () = tokio::time::sleep(LOOK_EVERY), if !is_over && !has_to_wait => {}
            }
        }
    }

    /// Wishes for what was found in a layer.
    fn wish(&mut self, position: usize, places: Vec<Placed>) {
        let Some((digest, layer)) = self.layers.get(&position) else {
            return;
        };
        let ranges = places.iter().map(|place| (place.wish, (place.data, place.len)));
        self.waves.add(Arc::clone(layer), ranges);
        self.played.state().found.push((*digest, places));
    }
}
