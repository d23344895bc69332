//! How many reads wait for bytes that have to be fetched, and whose they are.
//!
//! All images share one FUSE connection. The kernel sends [`face::MAX_BACKGROUND`](super::face) asynchronous reads and then no more, whoever wants
//! them, until some are answered; so the readers of one image whose registry hangs must never be as many. What waits is bounded here, well below
//! that, and shared like the memory of a switch between its ports: an owner may have as many places as are still free. One that hangs alone
//! takes half of all, the next one half of the rest, and so on: whoever comes last still finds some. A read that finds none fails at once;
//! reads of bytes that are in the cache never need a place.
//!
//! # Reads that nobody waits for any more
//! Who is killed while EROFS reads for him goes at once, and the read stays: its pages are locked until it is answered, and the kernel
//! waits for that, in a way that nothing interrupts, when the file system goes. So the reads of a layer end before the last mount goes that
//! shows it through the session: what shows layers says so ([`Waiting::show`]). While there are mounts of which the layers are not known,
//! since an earlier process has made them, no read ends so.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus::IntGauge;
use tokio_util::sync::CancellationToken;

use crate::layer::Digest;

/// Reads that may wait at once. A read that waits takes about 2 KiB here, and up to 1 MiB of page cache that the kernel has set aside
/// for its bytes.
pub(super) const PLACES: usize = 16_384;

/// The reads that wait.
pub(super) struct Waiting {
    state: Mutex<State>,
    gauge: IntGauge,
}

#[derive(Default)]
struct State {
    total: usize,
    /// Owners with any.
    owners: HashMap<Arc<str>, usize>,
    /// Reads that wait, of layers by their ids.
    layers: HashMap<Digest, Reads>,
    /// How many mounts show a layer.
    shown: HashMap<Digest, usize>,
    /// Mounts of unknown layers.
    unknown: usize,
}

/// The reads of one layer that wait.
struct Reads {
    count: usize,
    end: CancellationToken,
}

/// A read that waits; dropped, it does not any more.
pub(super) struct Place {
    waiting: Arc<Waiting>,
    owner: Arc<str>,
    layer: Digest,
    end: CancellationToken,
}

impl Place {
    /// Comes back when nobody can be there any more who wants the bytes.
    pub(super) async fn ended(&self) {
        self.end.cancelled().await;
    }
}

/// A mount that reads layers through the session; dropped *before* it is unmounted, it ends the reads of those that no other mount shows.
pub(super) struct Showing {
    waiting: Arc<Waiting>,
    /// `None`: nobody knows.
    layers: Option<Vec<Digest>>,
}

impl Waiting {
    pub(super) fn new(gauge: IntGauge) -> Arc<Self> {
        Arc::new(Waiting {
            state: Mutex::default(),
            gauge,
        })
    }

    /// A place for a read of `layer`, which is `owner`'s; `None`: too many of its reads wait already.
    pub(super) fn enter(self: &Arc<Self>, owner: &str, layer: &Digest) -> Option<Place> {
        let mut state = self.lock();
        let owner = match state.owners.get_key_value(owner) {
            Some((owner, own)) if *own < PLACES - state.total => Arc::clone(owner),
            None if state.total < PLACES => Arc::from(owner),
            _ => return None,
        };
        *state.owners.entry(Arc::clone(&owner)).or_default() += 1;
        state.total += 1;
        self.gauge.set(state.total as i64);
        let reads = state.layers.entry(*layer).or_insert_with(|| Reads {
            count: 0,
            end: CancellationToken::new(),
        });
        reads.count += 1;
        let end = reads.end.clone();
        drop(state);
        Some(Place {
            waiting: Arc::clone(self),
            owner,
            layer: *layer,
            end,
        })
    }

    /// A mount shows `layers` from now on.
    pub(super) fn show(self: &Arc<Self>, layers: Vec<Digest>) -> Showing {
        let mut state = self.lock();
        for layer in &layers {
            *state.shown.entry(*layer).or_default() += 1;
        }
        drop(state);
        Showing {
            waiting: Arc::clone(self),
            layers: Some(layers),
        }
    }

    /// There is a mount that shows nobody knows which layers.
    pub(super) fn show_unknown(self: &Arc<Self>) -> Showing {
        self.lock().unknown += 1;
        Showing {
            waiting: Arc::clone(self),
            layers: None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Showing {
    fn drop(&mut self) {
        let mut guard = self.waiting.lock();
        let state = &mut *guard;
        let Some(layers) = &self.layers else {
            state.unknown -= 1;
            return;
        };
        let mut ended = 0;
        for layer in layers {
            let Entry::Occupied(mut shown) = state.shown.entry(*layer) else {
                continue;
            };
            *shown.get_mut() -= 1;
            if *shown.get() > 0 {
                continue;
            }
            shown.remove();
            if state.unknown == 0
                && let Some(reads) = state.layers.get_mut(layer)
            {
                // Who comes after is not meant.
                std::mem::take(&mut reads.end).cancel();
                ended += reads.count;
            }
        }
        drop(guard);
        if ended > 0 {
            tracing::info!(
                reads = ended,
                "reads end, since no container can wait for them any more"
            );
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.waiting.lock();
        if let Some(reads) = state.layers.get_mut(&self.layer) {
            reads.count -= 1;
            if reads.count == 0 {
                state.layers.remove(&self.layer);
            }
        }
        state.total -= 1;
        self.waiting.gauge.set(state.total as i64);
        if let Some(own) = state.owners.get_mut(&self.owner) {
            *own -= 1;
            if *own == 0 {
                state.owners.remove(&self.owner);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting() -> Arc<Waiting> {
        Waiting::new(IntGauge::new("waiting", "waiting").unwrap())
    }

    /// As many places as `owner` gets.
    fn take_all(waiting: &Arc<Waiting>, owner: &str) -> Vec<Place> {
        std::iter::from_fn(|| waiting.enter(owner, &Digest::of(b"layer"))).collect()
    }

    #[test]
    fn whoever_hangs_leaves_places_to_the_others() {
        let waiting = waiting();
        let mut held = Vec::new();
        let mut expected = PLACES / 2;
        for owner in ["a", "b", "c", "d"] {
            let places = take_all(&waiting, owner);
            assert_eq!(places.len(), expected, "{owner}");
            held.push(places);
            expected /= 2;
        }
        assert!(waiting.enter("e", &Digest::of(b"layer")).is_some());
        assert_eq!(waiting.gauge.get(), waiting.lock().total as i64);
    }

    #[test]
    fn places_come_back() {
        let waiting = waiting();
        for _ in 0..2 {
            let places = take_all(&waiting, "a");
            assert_eq!(places.len(), PLACES / 2);
        }
        let state = waiting.lock();
        assert_eq!((state.total, state.owners.len(), waiting.gauge.get()), (0, 0, 0));
        assert!(state.layers.is_empty());
    }

    #[test]
    fn reads_end_with_the_last_mount_that_shows_their_layer() {
        let waiting = waiting();
        let [a, b] = ["a", "b"].map(|name| Digest::of(name.as_bytes()));
        let [both, only_a] = [vec![a, b], vec![a]].map(|layers| waiting.show(layers));
        let [of_a, of_b] = [a, b].map(|layer| waiting.enter("owner", &layer).unwrap());
        let ended = |place: &Place| place.end.is_cancelled();
        drop(both);
        assert_eq!((ended(&of_a), ended(&of_b)), (false, true), "another mount shows a");
        let later = waiting.enter("owner", &b).unwrap();
        assert!(!ended(&later));
        drop(of_b);
        let earlier = waiting.show_unknown();
        drop(only_a);
        assert!(!ended(&of_a), "the unknown mount may show it");
        drop(earlier);
        drop(waiting.show(vec![a, b]));
        assert!(ended(&of_a) && ended(&later));
        drop((of_a, later));
        let state = waiting.lock();
        assert!(state.layers.is_empty() && state.shown.is_empty() && state.unknown == 0);
    }
}
