//! Recording a start: from the making of a container's snapshot until it has settled.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures::FutureExt;
use tokio_util::sync::CancellationToken;

use super::{LONGEST, RUNNING_MAX};
use crate::catalog::containerd::Started;
use crate::catalog::{Catalog, Start};
use crate::fetch::{Layer, LayerData as _, Recording};
use crate::layer::Digest;
use crate::layer::trace::{Entry, Looked, Sight, Trace, observe};
use crate::registry::image::Command;
use crate::store::{ImageRecord, StoreError};
use crate::sync::blocking;

/// When containerd is asked what the container runs, after its snapshot was asked for: its record is made in the moment after, and a short
/// program is soon gone.
const ASK_AFTER: [Duration; 7] = [
    Duration::from_millis(30),
    Duration::from_millis(100),
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(3),
    Duration::from_secs(10),
];
/// How often it is looked whether the container has settled.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// A start that is recorded.
pub(super) struct Running {
    start: Start,
    recording: Arc<Recording>,
    layers: Vec<Watched>,
    /// Its snapshot is gone.
    removed: CancellationToken,
    /// It is given up.
    stopped: CancellationToken,
}

/// A layer that is watched.
struct Watched {
    layer: Arc<Layer>,
    /// Whether others may have read it as well, or something was read without Lazuli.
    blurred: AtomicBool,
}

impl Running {
    /// Gives it up.
    pub(super) fn stop(&self) {
        self.stopped.cancel();
        self.unwatch();
    }

    fn unwatch(&self) {
        for watched in &self.layers {
            watched.layer.unwatch(&self.recording);
        }
    }

    /// Notes that another container is made on one of its layers.
    fn blur(&self, id: &Digest) {
        for watched in &self.layers {
            if watched.layer.id() == id {
                watched.blurred.store(true, Ordering::Relaxed);
            }
        }
    }
}

/// The namespace of a snapshot, and its key there.
fn own_key(key: &str) -> Option<(&str, &str)> {
    let mut parts = key.splitn(3, '/');
    let (namespace, number, key) = (parts.next()?, parts.next()?, parts.next()?);
    (!namespace.is_empty() && number.parse::<u64>().is_ok()).then_some((namespace, key))
}

/// The image that a container was made of, of those that have its layers.
fn image_of(images: Vec<ImageRecord>, started: &Started) -> Option<ImageRecord> {
    let named = images.iter().position(|image| image.names.contains(&started.image));
    // Its name, without a tag, is that of its repository.
    let in_repository = || {
        let of = |image: &ImageRecord| {
            let repository = super::repository(&image.host, &image.repository);
            let rest = started.image.strip_prefix(&repository);
            !repository.is_empty() && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with([':', '@']))
        };
        images.iter().position(of)
    };
    // One alone can be no other's.
    let alone = || (images.len() == 1).then_some(0);
    let at = named.or_else(in_repository).or_else(alone)?;
    images.into_iter().nth(at)
}

impl Catalog {
    /// Begins to record what a container reads that is being made.
    pub(in crate::catalog) fn record_start(self: &Arc<Self>, start: Start) {
        if !self.traces.config.enabled || own_key(&start.key).is_none() {
            return;
        }
        let mut layers: Vec<Arc<Layer>> = Vec::new();
        {
            let lives = self.read_live();
            for live in start.layers.iter().filter_map(|id| lives.get(id)) {
                if !layers.iter().any(|layer| Arc::ptr_eq(layer, &live.layer)) {
                    layers.push(Arc::clone(&live.layer));
                }
            }
        }
        let running = {
            let mut state = self.traces.state();
            let now = Instant::now();
            let mut watched = Vec::with_capacity(layers.len());
            for layer in layers {
                let id = *layer.id();
                let was_used = state.used.insert(id, now).is_some();
                state.running.values().for_each(|other| other.blur(&id));
                watched.push(Watched {
                    blurred: AtomicBool::new(was_used || layer.cached().is_complete()),
                    layer,
                });
            }
            if watched.is_empty() || state.running.len() >= RUNNING_MAX {
                return;
            }
            let running = Arc::new(Running {
                recording: Recording::new(watched.len()),
                layers: watched,
                removed: CancellationToken::new(),
                stopped: CancellationToken::new(),
                start,
            });
            for (position, watched) in running.layers.iter().enumerate() {
                watched.layer.watch(&running.recording, position);
            }
            let key = running.start.key.clone();
            if let Some(other) = state.running.insert(key, Arc::clone(&running)) {
                other.stop();
            }
            running
        };
        let catalog = Arc::clone(self);
        self.runtime.spawn(async move {
            catalog.follow(&running).await;
            running.unwatch();
            let mut state = catalog.traces.state();
            if state
                .running
                .get(&running.start.key)
                .is_some_and(|other| Arc::ptr_eq(other, &running))
            {
                state.running.remove(&running.start.key);
            }
        });
    }

    /// The snapshot of a container is gone: its start is over.
    pub(in crate::catalog) fn end_recording(&self, key: &str) {
        if let Some(running) = self.traces.state().running.get(key) {
            running.removed.cancel();
        }
    }

    /// Follows a start to its end, and keeps what it has shown.
    async fn follow(self: &Arc<Self>, running: &Arc<Running>) {
        let settled = async {
            loop {
                tokio::time::sleep(LOOK_EVERY).await;
                let recording = &running.recording;
                if recording.quiet() >= self.traces.config.settle || recording.age() >= LONGEST || recording.is_full() {
                    return;
                }
            }
        };
        tokio::pin!(settled);
        let mut over = false;
        let started = {
            let asked = self.ask_what_runs(running);
            tokio::pin!(asked);
            tokio::select! {
                () = running.stopped.cancelled() => return,
                started = &mut asked => started,
                // If it is known by then; containerd has forgotten the container soon.
                () = running.removed.cancelled() => {
                    over = true;
                    asked.now_or_never().flatten()
                }
            }
        };
        let Some(started) = started else {
            tracing::debug!(
                key = running.start.key,
                "containerd does not tell what it runs: nothing is learned"
            );
            return self.count_start("unknown");
        };
        let image = match self.started_image(running, &started).await {
            Ok(Some(image)) => image,
            Ok(None) => return self.count_start("unknown"),
            Err(error) => {
                tracing::warn!(%error, "nothing is learned of a start");
                return self.count_start("failed");
            }
        };
        let entry = Entry::of(&started.args);
        if !over {
            self.expect_entry(running, &image, &entry, started.command());
            tokio::select! {
                () = running.stopped.cancelled() => return,
                () = running.removed.cancelled() => {}
                () = settled => {}
            }
        }
        running.unwatch();
        let (catalog, running) = (Arc::clone(self), Arc::clone(running));
        let (outcome, trace) = match blocking(move || catalog.learn(&running, &image, entry)).await {
            Ok(Some(trace)) => ("recorded", Some(trace)),
            Ok(None) => ("empty", None),
            Err(error) => {
                tracing::warn!(%error, "nothing is learned of a start");
                ("failed", None)
            }
        };
        if let Some(trace) = trace {
            let (manifest, program, starts) = (trace.manifest, trace.entry.program.clone(), trace.starts);
            let (ranges, bytes) = (trace.wishes.len(), trace.bytes());
            let recorded = trace.clone();
            let kept = self.store.change(move |draft| draft.put_trace(&recorded)).await;
            match kept {
                Ok(()) => {
                    tracing::info!(%manifest, program, starts, ranges, bytes, "it is known what this reads when it starts");
                    self.share(&trace);
                }
                Err::<(), StoreError>(error) => {
                    tracing::warn!(%error, %manifest, "what was learned of a start cannot be kept");
                    return self.count_start("failed");
                }
            }
        }
        self.count_start(outcome);
    }

    fn count_start(&self, outcome: &str) {
        self.metrics.trace_starts_total.with_label_values(&[outcome]).inc();
    }

    /// Asks containerd what the container runs; `None` if it does not tell.
    async fn ask_what_runs(&self, running: &Running) -> Option<Started> {
        let (namespace, key) = own_key(&running.start.key)?;
        for after in ASK_AFTER {
            tokio::time::sleep(after.saturating_sub(running.recording.age())).await;
            // Clients that take another key for the snapshot than for the container are not understood.
            match self.content.containerd().container(namespace, key).await {
                Ok(Some(started)) if started.snapshot_key == key => return Some(started),
                Ok(_) => {}
                Err(error) => tracing::debug!(%error, key, "what runs is not known yet"),
            }
        }
        None
    }

    /// The image that was started.
    async fn started_image(
        self: &Arc<Self>,
        running: &Running,
        started: &Started,
    ) -> Result<Option<ImageRecord>, StoreError> {
        let (catalog, chain_id) = (Arc::clone(self), running.start.chain_id.clone());
        let images = blocking(move || catalog.images()).await?.into_iter();
        let with_it = images.filter(|image| image.layers.last().is_some_and(|layer| layer.chain_id == chain_id));
        Ok(image_of(with_it.collect(), started))
    }

    /// It is known what is started: if something else is being played, that ends, and the right trace is played.
    fn expect_entry(self: &Arc<Self>, running: &Arc<Running>, image: &ImageRecord, entry: &Entry, command: Command) {
        let played = self.traces.state().played.get(&image.manifest).cloned();
        if let Some(played) = played {
            if played.entry == *entry {
                return;
            }
            // Of the same program, what is played helps: it goes on, unless something is known of this one, which is found out below.
            if !played.entry.resembles(entry) {
                played.stop();
            }
        }
        let layers: Vec<_> = running
            .layers
            .iter()
            .map(|watched| Arc::clone(&watched.layer))
            .collect();
        if layers.iter().all(|layer| layer.cached().is_complete()) {
            return;
        }
        let coming = layers
            .into_iter()
            .map(|layer| async move { Some((*layer.digest(), layer)) }.boxed());
        let coming: Vec<_> = coming.collect();
        let digests = image.layers.iter().filter_map(|layer| layer.digest.parse().ok());
        let (digests, manifest, entry) = (digests.collect(), image.manifest, entry.id);
        let repository = super::repository(&image.host, &image.repository);
        let catalog = Arc::clone(self);
        self.runtime.spawn(async move {
            let finder = Arc::clone(&catalog);
            let found = blocking(move || finder.best_trace(&[repository], &manifest, Some(&entry))).await;
            match found {
                Some((fit, trace)) => catalog.play(manifest, digests, coming, fit, trace).await,
                None => catalog.walk(manifest, Some(command), coming).await,
            }
        });
    }

    /// What is known of the image and entry point after this start; `None` if that is nothing.
    fn learn(&self, running: &Running, image: &ImageRecord, entry: Entry) -> Result<Option<Trace>, StoreError> {
        let seen = running.recording.reads();
        let mut clear = HashSet::new();
        let mut names = Vec::with_capacity(running.layers.len());
        for (position, watched) in running.layers.iter().enumerate() {
            if !watched.blurred.load(Ordering::Relaxed) {
                clear.insert(*watched.layer.digest());
            }
            let is_read = seen.iter().any(|read| read.layer == position);
            // Of a layer whose names cannot be read nothing is learned.
            names.push(is_read.then(|| watched.layer.names().ok()).flatten());
        }
        self.measure(running, image, &entry);
        if seen.is_empty() && clear.is_empty() {
            return Ok(None);
        }
        let looked: Vec<Looked<'_>> = running
            .layers
            .iter()
            .zip(&names)
            .map(|(watched, names)| Looked {
                digest: *watched.layer.digest(),
                sight: match watched.blurred.load(Ordering::Relaxed) {
                    true => Sight::Blurred,
                    false => Sight::Clear,
                },
                names: names.as_deref(),
            })
            .collect();
        let repository = super::repository(&image.host, &image.repository);
        let new = observe((&repository, image.manifest, entry), super::now(), &looked, &seen);
        let known = self.store.trace(&repository, &image.manifest, &new.entry.id)?;
        let known = known.or_else(|| {
            // The first start of an image that was fetched by what is known of another one.
            let played = self.traces.state().played.get(&image.manifest).cloned();
            played.filter(|played| played.entry == new.entry)?.moved()
        });
        self.traces.state().played.remove(&image.manifest);
        let merged = match known {
            Some(known) => known.merged(&new, &clear),
            None => new,
        };
        Ok((!merged.wishes.is_empty()).then_some(merged))
    }

    /// Counts what was fetched ahead for nothing, of layers of which all reads were seen.
    fn measure(&self, running: &Running, image: &ImageRecord, entry: &Entry) {
        let played = self.traces.state().played.get(&image.manifest).cloned();
        let Some(played) = played.filter(|played| played.entry == *entry) else {
            return;
        };
        let mut wasted = 0;
        for (position, watched) in running.layers.iter().enumerate() {
            if watched.blurred.load(Ordering::Relaxed) {
                continue;
            }
            for (offset, len) in played.wished(watched.layer.id()) {
                if !running.recording.has_read(position, offset, len) {
                    wasted += len;
                }
            }
        }
        let total = match played.is_guess {
            true => &self.metrics.walk_wasted_bytes_total,
            false => &self.metrics.trace_wasted_bytes_total,
        };
        total.inc_by(wasted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(name: &str, repository: &str) -> ImageRecord {
        ImageRecord {
            manifest: Digest::of(name.as_bytes()),
            namespace: "k8s.io".to_owned(),
            names: vec![name.to_owned()],
            host: "r.example".to_owned(),
            repository: repository.to_owned(),
            layers: Vec::new(),
        }
    }

    #[test]
    fn keys_are_containerds() {
        assert_eq!(own_key("k8s.io/12/a/b"), Some(("k8s.io", "a/b")));
        assert_eq!(own_key("k8s.io/x/a"), None);
        assert_eq!(own_key("/1/a"), None);
        assert_eq!(own_key("a"), None);
    }

    /// The same layers may be in several repositories, of different owners.
    #[test]
    fn the_image_is_the_one_that_the_container_names() {
        let images = || vec![image("r.example/a:1", "a"), image("r.example/b:1", "b")];
        let of = |name: &str| {
            let started = Started {
                image: name.to_owned(),
                snapshot_key: String::new(),
                args: Vec::new(),
                env: Vec::new(),
                directory: String::new(),
            };
            image_of(images(), &started).map(|image| image.repository)
        };
        assert_eq!(of("r.example/b:1").as_deref(), Some("b"));
        assert_eq!(of("r.example/b:2").as_deref(), Some("b"));
        assert_eq!(of("r.example/b@sha256:0").as_deref(), Some("b"));
        assert_eq!(of("r.example/bc:1"), None);
    }
}
