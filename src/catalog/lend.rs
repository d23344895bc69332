//! Streams that containerd is lent: a layer that will not be there within Prepare's bound is left to containerd, which would fetch it once more, over one
//! connection, while it is half here already. Instead it gets the bytes that come here.
//!
//! Before containerd hears that it has to fetch a layer, Lazuli opens the very writer that containerd will want to open in its content store: one
//! writer has a reference at a time, and containerd waits for it as it waits for another pull of the same blob. The stream goes on, over as many
//! connections as help, and what it has kept of the blob ([`crate::cache::Spool`]) is written there. When both digests are right and the layer
//! is live, the blob is committed; containerd finds it there, and has it applied, for which nothing is left to do where Lazuli is the differ. So
//! the layer comes once, and at the pace of a stream.
//!
//! Where Lazuli is no differ, containerd unpacks the layer whatever else there is of it: so nothing is made of the blob then, but for others who pull
//! the same layer at that time. It is no differ too if containerd knows it and has not asked it for the last layer that it was left. Who comes to want it later waits until containerd has the blob, and has it from there.
//!
//! It holds for all streams of the image from that layer on, because containerd fetches all these at once. It costs nobody anything if it
//! ends early: the reference is let go with the connection, also if this process dies, and containerd goes on behind the last byte that was
//! written. Bytes that were found to be wrong are taken back before. It ends too when containerd unpacks nothing of the image any more: then
//! the pull was given up.
//!
//! What will be shown lazily above such a layer, containerd would fetch as well, for nothing. So these references are held too, with nothing written,
//! until the pull is over: containerd asks for these layers meanwhile, hears that they exist, and ends its fetches with the pull. They are let go
//! when it unpacks a layer above them, since they would take the places in which it has to fetch that one; and after two minutes, because whoever
//! pulls the same layer for another snapshotter waits as well.
//!
//! These are calls that write. They may be made while containerd waits in Prepare, which it asks outside of its transactions.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures::StreamExt;
use futures::future::join_all;
use futures::stream::FuturesUnordered;
use tokio::sync::watch;
use tokio::time::{sleep, timeout, timeout_at};

use super::containerd::{Ingest, IngestError, IngestWriter, layer_reference, source_label};
use super::content::ContentStore;
use super::images::{ImagePlan, PlannedLayer};
use super::loads::{Load, PullKey};
use super::question::Begun;
use super::{Catalog, LoadedId, pace};
use crate::cache::{Spool, SpoolEnd, Spooled};
use crate::fetch::{Hurried, Progress};
use crate::layer::Digest;
use crate::sync::blocking;

/// What is smaller, in bytes, is fetched again within a moment.
const LEAST: u64 = 1 << 20;
/// After how many hours a lease ends that nobody could end: no pull takes longer that is lent anything.
const LEASE_HOURS: u64 = 1;
/// How long references are held with nothing written. Whoever pulls the same layer for another snapshotter waits for them.
const HELD_FOR: Duration = Duration::from_secs(120);
/// Longest pull that is lent anything.
const LONGEST: Duration = Duration::from_secs(3600);
/// Longest wait for a layer to be live whose blob is written: its files are made durable.
const LIVE_DEADLINE: Duration = Duration::from_secs(60);
/// Bytes of one message: as many as the caches of a processor hold on their way through both programs.
const PIECE: usize = 256 << 10;
/// How often it is looked whether containerd still unpacks the image, and how many times it must not, since there is a moment between two layers.
const LOOK: Duration = Duration::from_secs(2);
const GONE: u32 = 4;

/// A stream that can be lent.
struct Stream {
    layer: PlannedLayer,
    /// Keeps it going.
    load: Arc<Load<LoadedId>>,
    progress: Arc<Progress>,
    spool: Arc<Spool>,
}

/// Blobs of which nothing is made here, while containerd is lent them.
#[derive(Default)]
pub(super) struct BlobsAlone(Mutex<HashMap<Digest, watch::Receiver<()>>>);

/// One of them, until it is dropped.
struct BlobAlone {
    catalog: Arc<Catalog>,
    layer: Digest,
    ended: watch::Sender<()>,
}

impl BlobsAlone {
    fn lock(&self) -> MutexGuard<'_, HashMap<Digest, watch::Receiver<()>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until containerd has the blob, or will not have it from here.
    pub(super) async fn ended(&self, layer: &Digest) {
        let ended = self.lock().get(layer).cloned();
        if let Some(mut ended) = ended {
            // Nothing is ever sent.
            let _ = ended.changed().await;
        }
    }
}

impl BlobAlone {
    fn new(catalog: &Arc<Catalog>, layer: Digest) -> Self {
        let (ended, seen) = watch::channel(());
        catalog.alone.lock().insert(layer, seen);
        BlobAlone {
            catalog: Arc::clone(catalog),
            layer,
            ended,
        }
    }
}

impl Drop for BlobAlone {
    fn drop(&mut self) {
        let mut all = self.catalog.alone.lock();
        // Another namespace may be lent the same.
        let is_it = |seen: &watch::Receiver<()>| seen.same_channel(&self.ended.subscribe());
        if all.get(&self.layer).is_some_and(is_it) {
            all.remove(&self.layer);
        }
    }
}

/// References that are held, by the position of the layer.
pub(super) type Held = BTreeMap<usize, IngestWriter>;

/// Why a blob was not lent to its end.
#[derive(Debug, thiserror::Error)]
enum LendError {
    #[error(transparent)]
    Ingest(#[from] IngestError),
    #[error("what came of it cannot be read again: {0}")]
    Spool(io::Error),
    #[error("the stream ended after {0} bytes")]
    Ended(u64),
    #[error("the stream ended after {0} bytes, which are wrong")]
    Wrong(u64),
}

impl Catalog {
    /// Lends containerd what is being streamed of an image from the layer at `position` on, keeps it from fetching what will be shown lazily, and
    /// comes back when containerd has to wait for all of that, at `deadline` or a moment later at the latest.
    pub(super) async fn lend(self: &Arc<Self>, plan: &ImagePlan, position: usize, begun: &[Begun], deadline: Instant) {
        if !self.lends {
            return;
        }
        let (me, plan, begun) = (Arc::clone(self), plan.clone(), begun.to_vec());
        // Whoever asked may go away, and what was opened by then has to be let go of.
        let begins = async move { me.begin_to_lend(&plan, position, &begun, deadline).await };
        if let Err(error) = self.runtime.spawn(begins).await {
            tracing::error!(%error, "lending failed because of a bug in Lazuli");
        }
    }

    async fn begin_to_lend(self: &Arc<Self>, plan: &ImagePlan, position: usize, begun: &[Begun], deadline: Instant) {
        let pull = (plan.namespace.clone(), plan.manifest);
        // Those below have been answered. They would take the places in which containerd has to fetch this one, if it is not lent.
        let mut held = self.held().remove(&pull).unwrap_or_default();
        held = held.split_off(&position);
        let mut seen = HashSet::new();
        let layers = plan.layers.iter().zip(begun).enumerate().skip(position);
        let layers = layers.filter(|(_, (layer, _))| layer.spec.size >= LEAST && seen.insert(layer.spec.digest));
        let mut wanted = Vec::new();
        for (at, (layer, begun)) in layers {
            let stream = self.stream_of(layer, begun);
            if stream.is_some() || (at > position && may_be_lazy(begun)) {
                wanted.push((at, layer.clone(), stream));
            }
        }
        if wanted.is_empty() {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let lease = format!("lazuli-lend-{}-{}", plan.manifest, now.as_nanos());
        let deadline = pace::local_deadline(deadline, Instant::now());
        let opened = timeout_at(deadline.into(), self.open_writers(plan, &lease, wanted, held)).await;
        let opened = opened.unwrap_or_else(|_| {
            tracing::warn!(manifest = %plan.manifest, "containerd does not take what it could be lent in time");
            Vec::new()
        });
        let (mut lent, mut held) = (Vec::new(), BTreeMap::new());
        for (at, stream, writer) in opened {
            match stream {
                Some(stream) => lent.push((stream, writer, None)),
                None => drop(held.insert(at, writer)),
            }
        }
        if !held.is_empty() {
            tracing::debug!(manifest = %plan.manifest, layers = held.len(), "containerd does not fetch what is lazy");
            self.held().insert(pull.clone(), held);
        }
        let asked = timeout_at(deadline.into(), self.content.containerd().has_differ(&self.address));
        // Where that cannot be told, it may.
        let unpacks = self.unused_differ.load(Ordering::Relaxed) || matches!(asked.await, Ok(Ok(false)));
        if !lent.is_empty() && unpacks {
            for (stream, _, alone) in &mut lent {
                if !self.loads.is_wanted_beside(&pull, &stream.load) {
                    *alone = Some(BlobAlone::new(self, stream.layer.spec.digest));
                    tracing::debug!(layer = %stream.layer.spec.digest, "comes for containerd alone, which unpacks it");
                    stream.progress.blob_only();
                }
            }
        }
        let layers = plan.layers.iter().enumerate().skip(position);
        let layers: Vec<_> = layers.map(|(at, layer)| (at, layer.chain_id.clone())).collect();
        let me = Arc::clone(self);
        self.runtime.spawn(async move {
            let mut left = lent.len();
            if left > 0 || me.held().contains_key(&pull) {
                let lends = lent.into_iter().map(|(stream, writer, alone)| {
                    let lending = me.lend_one(stream, writer);
                    async move {
                        lending.await;
                        drop(alone);
                    }
                });
                let mut lends: FuturesUnordered<_> = lends.collect();
                let all = async {
                    while lends.next().await.is_some() {
                        left -= 1;
                    }
                    std::future::pending::<()>().await;
                };
                tokio::select! {
                    () = all => {}
                    _ = timeout(LONGEST, me.is_over(&pull, &layers)) => {}
                }
                if left > 0 {
                    me.metrics
                        .lent_layers_total
                        .with_label_values(&["given_up"])
                        .inc_by(left as u64);
                    tracing::info!(
                        layers = left,
                        "a pull was given up, and with it what containerd was lent"
                    );
                }
                let held = me.held().remove(&pull);
                drop(held);
            }
            if let Err(error) = me.content.containerd().delete_lease(&pull.0, &lease, false).await {
                tracing::debug!(%error, lease, "a lease ends by itself");
            }
        });
    }

    fn held(&self) -> MutexGuard<'_, HashMap<PullKey, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stream_of(&self, layer: &PlannedLayer, begun: &Begun) -> Option<Stream> {
        let Begun::Load(load) = begun else { return None };
        let progress = self.loader.fetcher().progress(&layer.spec.digest)?;
        let spool = progress.spool()?;
        let may_come = spool.watch().borrow().end != Some(SpoolEnd::Failed);
        may_come.then(|| Stream {
            layer: layer.clone(),
            load: Arc::clone(load),
            progress,
            spool,
        })
    }

    /// The layers for which containerd has given the references, those that were given before included.
    async fn open_writers(
        &self,
        plan: &ImagePlan,
        lease: &str,
        wanted: Vec<(usize, PlannedLayer, Option<Stream>)>,
        mut held: Held,
    ) -> Vec<(usize, Option<Stream>, IngestWriter)> {
        let containerd = self.content.containerd();
        let leased = containerd.create_lease(&plan.namespace, lease, LEASE_HOURS).await;
        if let Err(error) = leased {
            tracing::debug!(%error, "containerd gives no lease for what it could be lent");
            return Vec::new();
        }
        let from = plan.sources.first();
        let labels = from.map(|source| source_label(&source.host, &source.repository));
        let opened = join_all(wanted.into_iter().map(|(at, layer, stream)| {
            let spec = layer.spec;
            let ingest = Ingest {
                namespace: &plan.namespace,
                lease,
                reference: layer_reference(&spec.digest, &spec.annotations),
                digest: spec.digest,
                size: spec.size,
                labels: labels.clone().into_iter().collect(),
            };
            let held = held.remove(&at);
            async move {
                let writer = match held {
                    Some(writer) => Ok(Some(writer)),
                    None => containerd.open_ingest(ingest).await,
                };
                match writer {
                    Ok(writer) => Some((at, stream, writer?)),
                    Err(error) => {
                        tracing::debug!(%error, layer = %spec.digest, "cannot be lent");
                        None
                    }
                }
            }
        }));
        opened.await.into_iter().flatten().collect()
    }

    /// Lends one stream to its end.
    async fn lend_one(&self, stream: Stream, mut writer: IngestWriter) {
        let digest = stream.layer.spec.digest;
        let lent = &self.metrics.lent_layers_total;
        // containerd waits for it.
        let _hurried = Hurried::new(Arc::clone(&stream.progress));
        let written = self.copy(&stream, &mut writer).await;
        let came = match written {
            Ok(is_whole) => {
                // What is applied then is there already. If it does not become live, containerd unpacks it: where nothing is made of it, at once.
                if is_whole {
                    let _ = timeout(LIVE_DEADLINE, stream.load.wait()).await;
                }
                writer.commit().await.map(drop).map_err(LendError::from)
            }
            Err(error @ LendError::Wrong(_)) => {
                writer.take_back().await;
                Err(error)
            }
            Err(error) => Err(error),
        };
        match came {
            Ok(()) => {
                self.standings.delivered(&digest, &ContentStore::origin());
                lent.with_label_values(&["whole"]).inc();
                tracing::info!(layer = %digest, bytes = stream.layer.spec.size, "containerd was lent what was streamed");
            }
            Err(error) => {
                lent.with_label_values(&["part"]).inc();
                tracing::warn!(layer = %digest, %error, "containerd goes on by itself with a layer that it was lent");
            }
        }
    }

    /// Writes what comes of a stream, until all of it is there and right; false if the call has ended, as the commit will tell.
    async fn copy(&self, stream: &Stream, writer: &mut IngestWriter) -> Result<bool, LendError> {
        let mut seen = stream.spool.watch();
        let mut at = writer.from();
        let mut download = seen.borrow().download;
        loop {
            let step = |state: &Spooled| step(state, download, at, stream.layer.spec.size);
            // The spool lives as long as this stream.
            let state = seen.wait_for(|state| step(state) != Step::Wait).await;
            let state = *state.map_err(|_| LendError::Ended(at))?;
            match step(&state) {
                Step::Wait => {}
                Step::BeginAnew => {
                    download = state.download;
                    at = 0;
                    writer.begin_anew().await;
                }
                Step::Whole => return Ok(true),
                Step::Wrong => return Err(LendError::Wrong(at)),
                Step::Ended => return Err(LendError::Ended(at)),
                Step::Copy => {
                    let spool = Arc::clone(&stream.spool);
                    let bytes = blocking(move || spool.read(download, at, PIECE)).await;
                    let bytes = bytes.map_err(LendError::Spool)?;
                    // If another download has begun meanwhile, they may be of either.
                    if seen.borrow().download != download {
                        continue;
                    }
                    let len = bytes.len() as u64;
                    at += len;
                    self.metrics.lent_bytes_total.inc_by(len);
                    if !writer.write(bytes).await {
                        return Ok(false);
                    }
                }
            }
        }
    }

    /// Comes back when containerd unpacks none of these layers any more. While it unpacks one, what is held below that is let go, and all of it
    /// after [`HELD_FOR`].
    async fn is_over(&self, pull: &PullKey, layers: &[(usize, String)]) {
        let begun = Instant::now();
        let mut gone = 0;
        while gone < GONE {
            sleep(LOOK).await;
            if begun.elapsed() >= HELD_FOR {
                let held = self.held().remove(pull);
                drop(held);
            }
            let unpacking = self.store.unpacking();
            let unpacked = layers.iter().filter(|(_, chain_id)| unpacking.contains(chain_id));
            match unpacked.map(|(at, _)| *at).max() {
                None => gone += 1,
                Some(at) => {
                    gone = 0;
                    let mut all = self.held();
                    let below = all.get_mut(pull).map(|held| {
                        let above = held.split_off(&at);
                        std::mem::replace(held, above)
                    });
                    drop(all);
                    // Outside of the lock: ends calls.
                    drop(below);
                }
            }
        }
    }
}

/// What is next for whoever copies a stream.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Until more has come.
    Wait,
    /// Another download has begun.
    BeginAnew,
    Copy,
    /// All was copied, and is right.
    Whole,
    /// What was copied is wrong.
    Wrong,
    /// No more will come.
    Ended,
}

/// The step of whoever has copied `at` bytes of `download`, of a blob of `size` bytes. What is copied are whole messages, but for the last one: what a
/// small one costs on either side is more than its bytes do.
fn step(state: &Spooled, download: u32, at: u64, size: u64) -> Step {
    if state.download != download {
        return Step::BeginAnew;
    }
    let (ready, whole) = (
        state.there.saturating_sub(at),
        size.saturating_sub(at).min(PIECE as u64),
    );
    if ready > 0 && (ready >= whole || state.end.is_some()) {
        return Step::Copy;
    }
    match state.end {
        None => Step::Wait,
        Some(SpoolEnd::Verified) => Step::Whole,
        // All of it, and not right; or the one before was not.
        Some(SpoolEnd::Failed) if download > 0 || state.there == size => Step::Wrong,
        Some(SpoolEnd::Failed) => Step::Ended,
    }
}

/// Whether the layer is live, or will be without being left to containerd, as far as is known.
fn may_be_lazy(begun: &Begun) -> bool {
    match begun {
        Begun::Live(_) => true,
        Begun::Load(_) => !matches!(begun.outcome(), Some(Err(_))),
        Begun::Left(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_copied_in_whole_messages_and_to_its_end() {
        const MESSAGE: u64 = PIECE as u64;
        let size = 3 * MESSAGE + 10;
        let spooled = |download, there, end| Spooled { download, there, end };
        let (verified, failed) = (Some(SpoolEnd::Verified), Some(SpoolEnd::Failed));
        let steps = [
            (spooled(0, 0, None), 0, Step::Wait),
            (spooled(0, MESSAGE - 1, None), 0, Step::Wait),
            (spooled(0, MESSAGE, None), 0, Step::Copy),
            (spooled(0, 2 * MESSAGE, None), MESSAGE + 1, Step::Wait),
            // The last message is as long as what is left.
            (spooled(0, size - 1, None), 3 * MESSAGE, Step::Wait),
            (spooled(0, size, None), 3 * MESSAGE, Step::Copy),
            // All has come, and nobody knows yet whether it is right.
            (spooled(0, size, None), size, Step::Wait),
            (spooled(0, size, verified), size, Step::Whole),
            (spooled(0, size, failed), size, Step::Wrong),
            // What there is of a stream that has ended is copied before it is said.
            (spooled(0, MESSAGE + 5, failed), MESSAGE, Step::Copy),
            (spooled(0, MESSAGE + 5, failed), MESSAGE + 5, Step::Ended),
            (spooled(1, 5, None), MESSAGE, Step::BeginAnew),
        ];
        for (state, at, expected) in steps {
            assert_eq!(step(&state, 0, at, size), expected, "{state:?} at {at}");
        }
        // The download before was damaged: what is copied of this one is not known to be right either.
        assert_eq!(step(&spooled(1, 5, failed), 1, 5, size), Step::Wrong);
        // containerd had all of it.
        assert_eq!(step(&spooled(0, size, verified), 0, size, size), Step::Whole);
        assert_eq!(step(&spooled(0, 0, None), 0, 0, 0), Step::Wait);
    }
}
