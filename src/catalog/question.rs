//! A question of containerd for one layer: the image's layers are loaded, and the layer is waited for, but never longer than
//! [`pace::BOUND`].
//!
//! What is not there by then, or will not be, is left to containerd: it fetches and unpacks that layer itself, and downloads the layers
//! above it with it. What comes for containerd alone is waited for, and had from its content store then. Streams that have begun are lent to it ([`super::lend`]), or else end. Layers that are lazy go on: containerd asks for them later, and need not unpack
//! them then.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::time::timeout_at;

use super::images::{ImagePlan, PlannedLayer};
use super::loader::Refusal;
use super::loads::{Asking, Load};
use super::pace::{self, Verdict, Watch};
use super::{Catalog, How, LayerRequest, LoadKey, LoadedId, Wanted};
use crate::config::ByteSize;
use crate::fetch::{Hurried, Paused};
use crate::layer::Digest;

/// A layer that is wanted.
#[derive(Clone)]
pub(super) enum Begun {
    /// It is live already, under this id.
    Live(Digest),
    /// It is being loaded.
    Load(Arc<Load<LoadedId>>),
    /// It is not loaded, for this pull.
    Left(Refusal),
}

impl Begun {
    /// Its id, once it is live.
    pub(super) async fn wait(&self) -> Result<LoadedId, Refusal> {
        match self {
            Begun::Live(id) => Ok(*id),
            Begun::Load(load) => load.wait().await,
            Begun::Left(refusal) => Err(refusal.clone()),
        }
    }

    /// The same, without wanting it: if nobody does, it ends.
    pub(super) fn later(&self) -> BoxFuture<'static, Result<LoadedId, Refusal>> {
        match self {
            Begun::Live(id) => std::future::ready(Ok(*id)).boxed(),
            Begun::Load(load) => load.later(),
            Begun::Left(refusal) => std::future::ready(Err(refusal.clone())).boxed(),
        }
    }

    /// The same, if it has come to an end.
    pub(super) fn outcome(&self) -> Option<Result<LoadedId, Refusal>> {
        match self {
            Begun::Live(id) => Some(Ok(*id)),
            Begun::Load(load) => load.outcome().cloned(),
            Begun::Left(refusal) => Some(Err(refusal.clone())),
        }
    }
}

/// A layer of an image, as it is wanted by a pull.
fn wanted(plan: &ImagePlan, planned: &PlannedLayer) -> Wanted {
    Wanted {
        spec: planned.spec.clone(),
        origin: plan.origin(),
        names: plan.name.iter().cloned().collect(),
        how: How::AsImageSays,
        lendable: false,
    }
}

impl Catalog {
    /// Begins to load every layer of an image that is not live in a form that may be shown to it, for a question for the layer at `position`,
    /// but for those that containerd has (`request.below`) or is fetching by itself (`request.unpacking`).
    pub(super) fn begin_image(
        self: &Arc<Self>,
        plan: &ImagePlan,
        position: usize,
        asking: &Asking<LoadKey, LoadedId>,
        request: &LayerRequest,
    ) -> Vec<Begun> {
        let begin = |(at, planned): (usize, &PlannedLayer)| {
            if let Some(id) = self.live_for(&wanted(plan, planned)) {
                return Begun::Live(id);
            }
            // The one that is asked for is not being unpacked, or containerd would not ask.
            let left = match at.cmp(&position) {
                Ordering::Less => request.below.get(at) == Some(&false),
                Ordering::Equal => false,
                Ordering::Greater => request.unpacking.contains(&planned.chain_id),
            };
            if left {
                return Begun::Left(Refusal {
                    word: "slow",
                    text: "containerd has it, or is fetching it".to_owned(),
                    retry_helps: true,
                });
            }
            self.ask_for(plan, planned, asking)
        };
        plan.layers.iter().enumerate().map(begin).collect()
    }

    /// Loads a layer of an image for a question.
    fn ask_for(
        self: &Arc<Self>,
        plan: &ImagePlan,
        planned: &PlannedLayer,
        asking: &Asking<LoadKey, LoadedId>,
    ) -> Begun {
        let wanted = Wanted {
            lendable: self.lends,
            ..wanted(plan, planned)
        };
        let (key, catalog) = (self.load_key(&wanted), Arc::clone(self));
        match asking.load(&key, || catalog.loading(wanted).boxed()) {
            Ok(load) => Begun::Load(load),
            Err(refusal) => Begun::Left(refusal),
        }
    }

    /// Waits for the layer at `position`, until `deadline` at the latest.
    pub(super) async fn wait_for(
        self: &Arc<Self>,
        plan: &ImagePlan,
        position: usize,
        asking: &Asking<LoadKey, LoadedId>,
        begun: &mut [Begun],
        deadline: Instant,
    ) -> Result<LoadedId, Refusal> {
        let Some(planned) = plan.layers.get(position) else {
            return Err(Refusal::unresolved("the image has no such layer", false));
        };
        let digest = planned.spec.digest;
        let verdict = loop {
            let load = match begun.get(position) {
                Some(Begun::Load(load)) => Arc::clone(load),
                Some(begun) => return begun.wait().await,
                None => return Err(Refusal::unresolved("the image has no such layer", false)),
            };
            match self.watch(plan, &digest, &load, deadline).await {
                Ok(Err(refusal)) if refusal.is_blob_only() => {
                    let ended = async {
                        self.alone.ended(&digest).await;
                        // Its stream may go on a little longer than lending, and refuse whoever asks until it ends.
                        tokio::time::sleep(pace::LOOK_EVERY).await;
                    };
                    if timeout_at(deadline.into(), ended).await.is_err() {
                        break Verdict::Over;
                    }
                    tracing::debug!(layer = %digest, "what came for containerd alone is had from its content store");
                    let again = self.ask_for(plan, planned, asking);
                    begun
                        .iter_mut()
                        .skip(position)
                        .take(1)
                        .for_each(|begun| *begun = again.clone());
                }
                Ok(loaded) => return loaded,
                Err(verdict) => break verdict,
            }
        };
        let all = &*begun;
        let host = self.contacts.host(&digest).or_else(|| first_host(plan));
        let host = host.unwrap_or_else(|| "its registry".to_owned());
        let refusal = too_late(&host, planned.spec.size, verdict);
        if verdict != Verdict::Silent {
            self.lend(plan, position, all, deadline).await;
        }
        for (at, planned) in plan.layers.iter().enumerate().skip(position) {
            if at == position || self.loader.fetcher().progress(&planned.spec.digest).is_some() {
                asking.leave(&self.load_key(&wanted(plan, planned)), &refusal);
            }
        }
        self.count_refusal(&refusal);
        tracing::warn!(layer = %digest, reason = %refusal, "is left to containerd, which waits for an answer");
        Err(refusal)
    }

    /// What came of the load, or why it is not waited for any longer.
    async fn watch(
        &self,
        plan: &ImagePlan,
        digest: &Digest,
        load: &Load<LoadedId>,
        deadline: Instant,
    ) -> Result<Result<LoadedId, Refusal>, Verdict> {
        let fetcher = self.loader.fetcher();
        let mut host = first_host(plan).unwrap_or_default();
        let mut watch = Watch::new(Instant::now(), deadline);
        let mut arrived: HashMap<Digest, u64> = HashMap::new();
        let mut paused = Vec::new();
        let mut hurried = None;
        loop {
            let look = tokio::time::sleep(pace::LOOK_EVERY);
            tokio::select! {
                biased;
                outcome = load.wait() => {
                    if let Some(pace) = watch.pace() {
                        self.hosts.delivered(&host, pace, Instant::now());
                    }
                    return Ok(outcome);
                }
                () = look => {}
            }
            // Where it really comes from is known once it is asked for.
            if let Some(asked) = self.contacts.host(digest) {
                host = asked;
            }
            for planned in plan.layers.iter() {
                if let Some(progress) = fetcher.progress(&planned.spec.digest) {
                    arrived.insert(planned.spec.digest, progress.arrived());
                }
            }
            let stream = fetcher.progress(digest);
            if let Some(stream) = &stream
                && hurried.is_none()
            {
                hurried = Some(Hurried::new(Arc::clone(stream)));
            }
            let grows = stream.as_ref().is_some_and(|stream| stream.grows());
            let stream = stream.map(|progress| (progress.arrived(), progress.total()));
            if stream.is_some_and(|(done, total)| done >= total) {
                // What is left to do is no matter of the link.
                paused.clear();
            }
            let silent = self.contacts.silent_since(digest);
            match watch.look(Instant::now(), silent, stream, grows, arrived.values().sum()) {
                Verdict::Wait => {}
                Verdict::Favour => {
                    let others = plan.layers.iter().map(|planned| planned.spec.digest);
                    let others = others.filter(|other| other != digest);
                    paused = others
                        .filter_map(|other| fetcher.progress(&other))
                        .map(Paused::new)
                        .collect();
                    tracing::debug!(layer = %digest, others = paused.len(), "streams pause for the one that is waited for");
                }
                verdict => {
                    match verdict {
                        Verdict::Silent => self.hosts.silent(&host, Instant::now()),
                        Verdict::Slow(pace) if watch.pace().is_none_or(|best| best < pace) => {
                            self.hosts.delivered(&host, pace, Instant::now());
                        }
                        _ => {
                            if let Some(pace) = watch.pace() {
                                self.hosts.delivered(&host, pace, Instant::now());
                            }
                        }
                    }
                    drop(paused);
                    return Err(verdict);
                }
            }
        }
    }
}

/// The host that an image's layers are asked of first.
fn first_host(plan: &ImagePlan) -> Option<String> {
    plan.sources.first().map(|source| source.host.clone())
}

/// Why a layer is not waited for any longer.
fn too_late(host: &str, size: u64, verdict: Verdict) -> Refusal {
    let bound = pace::BOUND.as_secs();
    let (word, text) = match verdict {
        Verdict::Silent => (
            "silent",
            format!("{host} did not answer within {} s", pace::SILENCE.as_secs()),
        ),
        Verdict::Slow(pace) => ("slow", too_slow(host, size, pace)),
        Verdict::Wait | Verdict::Favour | Verdict::Over => (
            "slow",
            format!("it was not there within {bound} s, for which Prepare may wait"),
        ),
    };
    Refusal {
        word,
        text,
        retry_helps: true,
    }
}

/// Why a layer of `size` bytes is not streamed from a host that delivers `pace` bytes per second.
pub(super) fn too_slow(host: &str, size: u64, pace: f64) -> String {
    format!(
        "its {} would take about {:.0} s at the {}/s that {host} delivers, and Prepare may wait for {} s",
        ByteSize(size),
        size as f64 / pace.max(1.0),
        ByteSize(pace as u64),
        pace::BOUND.as_secs()
    )
}
