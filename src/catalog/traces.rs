//! What starts of containers teach: what they read is recorded ([`record`]), kept by repository, image and entry point
//! ([`crate::store`]), asked for ahead ([`play`]) when the image is pulled again, or the next one of its repository, and shared with other
//! machines ([`share`]).
//!
//! # A start
//! begins when `snapshots` makes the snapshot of a container, and ends when the container has read nothing new for a while (`trace.settle`), when
//! its snapshot goes, or after [`LONGEST`]. What it runs is told by containerd, which is asked a moment later, off every path that anybody waits
//! on. Without an answer nothing is recorded: a trace that belongs to nobody would be played for everybody.
//!
//! # What a start proves
//! A layer is seen *clearly* if all that is read of it comes through Lazuli, and for this container alone: it is not wholly in the cache when
//! the container is made (the kernel reads such a layer by itself), and no other container was made on it since it was last unmounted
//! (the kernel has its pages then) nor is made on it meanwhile. What is not read of a layer that was seen clearly counts as missed; of others
//! nothing is concluded. So containers that start side by side, or one after the other, do not take anything from each other's
//! traces, and what they seem to have read is forgotten by the first clear start that does not.
//!
//! # When nothing is known
//! it is guessed from what the image says it runs ([`walk`]).
//!
//! # Whose traces are played
//! Those of the repository that an image is pulled from: what was recorded of one tenant's image decides nothing for another's. Of an image with
//! several entry points the one is played that was started most often, because nobody tells a pull what will be run; when it turns
//! out to be another, what is still asked for is taken back, and the right one is played.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::Semaphore;

use super::{Catalog, Live};
use crate::config::{IndexConfig, TraceConfig};
use crate::fs::Face;
use crate::layer::Digest;
use crate::layer::trace::Trace;
use crate::store::StoreError;

pub mod play;
pub mod record;
pub mod share;
pub mod show;
mod walk;
mod waves;

use play::Played;
use record::Running;

/// Longest start that is recorded: what is read later is a program's work, not its start.
const LONGEST: Duration = Duration::from_secs(120);
/// Starts that are recorded at once: each may take megabytes. A node that starts more has other things to do.
const RUNNING_MAX: usize = 64;
/// How long a layer counts as used after a container was made on it: its snapshot may not be listed yet.
const FRESH: Duration = Duration::from_secs(60);
/// Images of which is remembered what was played, until a container is made on them.
const PLAYED_MAX: usize = 256;
/// How long that is.
const PLAYED_FOR: Duration = Duration::from_secs(600);

/// How often traces that nobody needs are taken away: all of them are looked at for it.
const FORGET_EVERY: Duration = Duration::from_secs(600);

/// Seconds since the epoch.
fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

/// What a repository is called in traces.
pub(super) fn repository(host: &str, repository: &str) -> String {
    match (host, repository) {
        ("", _) | (_, "") => String::new(),
        (host, repository) => format!("{host}/{repository}"),
    }
}

/// What is known of starts that go on, and of images that are about to be started.
pub(super) struct Traces {
    config: TraceConfig,
    share: ShareConfig,
    state: Mutex<State>,
    /// Places for images that are walked.
    walks: Semaphore,
}

/// How traces are shared: as indexes are.
struct ShareConfig {
    /// Whether others are asked for theirs.
    enabled: bool,
    /// Whether what is recorded here is published.
    publish: bool,
    /// Longest search.
    deadline: Duration,
    /// File of the key that signs what is published.
    signing_key: Option<PathBuf>,
}

#[derive(Default)]
struct State {
    /// Starts that are recorded, by the keys of their snapshots.
    running: HashMap<String, Arc<Running>>,
    /// Layers of which the kernel may have pages, and when a container was last made on them.
    used: HashMap<Digest, Instant>,
    /// What was played, by manifest.
    played: HashMap<Digest, Arc<Played>>,
    /// When traces that nobody needs were last taken away.
    forgot: Option<Instant>,
}

impl Traces {
    pub(super) fn new(config: TraceConfig, index: &IndexConfig) -> Self {
        Traces {
            config,
            share: ShareConfig {
                enabled: index.enabled,
                publish: index.publish,
                deadline: index.lookup_deadline,
                signing_key: index.signing_key.clone(),
            },
            state: Mutex::default(),
            walks: Semaphore::new(walk::WALKS),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a trace fits an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fit {
    /// It is of this image.
    Same,
    /// It is of this image, and was recorded elsewhere.
    Shared,
    /// It is of another image of the repository.
    Repository,
}

impl Fit {
    fn word(self) -> &'static str {
        match self {
            Fit::Same => "same",
            Fit::Shared => "shared",
            Fit::Repository => "repository",
        }
    }
}

/// What is looked at of a trace to choose it: traces may take megabytes each.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Head {
    repository: String,
    manifest: Digest,
    entry: Digest,
    starts: u32,
    recorded: u64,
    is_empty: bool,
}

impl From<&Trace> for Head {
    fn from(trace: &Trace) -> Self {
        Head {
            repository: trace.repository.clone(),
            manifest: trace.manifest,
            entry: trace.entry.id,
            starts: trace.starts,
            recorded: trace.recorded,
            is_empty: trace.wishes.is_empty(),
        }
    }
}

/// The best of these traces for an image: of itself, or else of the image of the repository that was started last; and of that the entry point
/// that was started most often, or `entry` alone.
fn best<'a>(heads: &'a [Head], manifest: &Digest, entry: Option<&Digest>) -> Option<(Fit, &'a Head)> {
    let fits = |head: &&Head| entry.is_none_or(|entry| head.entry == *entry) && !head.is_empty;
    let fitting = || heads.iter().filter(fits);
    let (fit, of) = match fitting().any(|head| head.manifest == *manifest) {
        true => (Fit::Same, *manifest),
        false => (Fit::Repository, fitting().max_by_key(|head| head.recorded)?.manifest),
    };
    let of_it = fitting().filter(|head| head.manifest == of);
    Some((fit, of_it.max_by_key(|head| (head.starts, head.recorded))?))
}

impl Catalog {
    /// The trace to be played for an image from one of these repositories.
    fn best_trace(&self, repositories: &[String], manifest: &Digest, entry: Option<&Digest>) -> Option<(Fit, Trace)> {
        let mut heads = Vec::new();
        let failed = |repository: &str, error: StoreError| {
            tracing::warn!(%error, repository, "what was learned of it cannot be read");
        };
        for repository in repositories {
            let looked = self
                .store
                .each_trace(Some(repository), |trace| heads.push(Head::from(&trace)));
            looked.unwrap_or_else(|error| failed(repository, error));
        }
        let (fit, head) = best(&heads, manifest, entry)?;
        match self.store.trace(&head.repository, &head.manifest, &head.entry) {
            Ok(trace) => Some((fit, trace?)),
            Err(error) => {
                failed(&head.repository, error);
                None
            }
        }
    }

    /// Takes away traces that nobody needs, now and then; how many.
    pub(super) fn forget_traces(&self) -> Result<usize, StoreError> {
        {
            let mut state = self.traces.state();
            if state.forgot.is_some_and(|at| at.elapsed() < FORGET_EVERY) {
                return Ok(0);
            }
            state.forgot = Some(Instant::now());
        }
        self.store.forget_traces(now())
    }

    /// Knows what containers are made on: of everything else the kernel has no pages any more.
    pub(super) fn note_used(&self, bases: &[Vec<Digest>]) {
        let ids = self.layer_ids(bases.iter().flatten());
        // Directories of the session keep their pages whether they are mounted or not.
        let forgets = self.with_faces(|faces| faces.serving().face) == Some(Face::Image);
        let mut state = self.traces.state();
        if forgets {
            state
                .used
                .retain(|layer, at| ids.contains(layer) || at.elapsed() < FRESH);
        }
        for id in ids {
            state.used.entry(id).or_insert_with(Instant::now);
        }
    }

    /// Ids of the layers that are shown as these layers and variants.
    fn layer_ids<'a>(&self, shown: impl Iterator<Item = &'a Digest>) -> Vec<Digest> {
        let lives = self.read_live();
        let id = |live: &Live| *live.layer.cached().id();
        shown.filter_map(|shown| lives.get(shown).map(id)).collect()
    }

    /// Ends all recordings: what they have is not enough, and the next start makes another.
    pub(super) fn end_recordings(&self) {
        let running: Vec<_> = self.traces.state().running.drain().collect();
        running.iter().for_each(|(_, running)| running.stop());
        let played: Vec<_> = self.traces.state().played.drain().collect();
        played.iter().for_each(|(_, played)| played.stop());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::trace::Entry;

    fn head(manifest: &str, program: &str, starts: u32, recorded: u64) -> Head {
        Head {
            repository: "r/app".to_owned(),
            manifest: Digest::of(manifest.as_bytes()),
            entry: Entry::of(&[program.to_owned()]).id,
            starts,
            recorded,
            is_empty: false,
        }
    }

    #[test]
    fn the_best_trace_is_the_images_own_and_started_most() {
        let all = [
            head("1", "app", 9, 10),
            head("2", "app", 5, 20),
            head("2", "debug", 1, 30),
            head("3", "app", 1, 25),
        ];
        let chosen = |manifest: &str, entry: Option<&str>| {
            let entry = entry.map(|program| Entry::of(&[program.to_owned()]).id);
            let (fit, head) = best(&all, &Digest::of(manifest.as_bytes()), entry.as_ref())?;
            Some((fit, head.recorded))
        };
        assert_eq!(chosen("2", None), Some((Fit::Same, 20)));
        assert_eq!(chosen("2", Some("debug")), Some((Fit::Same, 30)));
        // Of the repository, the image that was started last.
        assert_eq!(chosen("4", None), Some((Fit::Repository, 20)));
        assert_eq!(chosen("4", Some("app")), Some((Fit::Repository, 25)));
        assert_eq!(chosen("1", Some("debug")), Some((Fit::Repository, 30)));
        assert_eq!(chosen("1", Some("else")), None);
        let mut empty = head("1", "app", 1, 1);
        empty.is_empty = true;
        assert_eq!(best(&[empty], &Digest::of(b"1"), None), None);
    }

    #[test]
    fn an_image_from_nowhere_has_no_repository() {
        assert_eq!(repository("r.example:5000", "team/app"), "r.example:5000/team/app");
        assert_eq!(repository("", "app"), "");
    }
}
