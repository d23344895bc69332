//! How many reads wait for bytes that have to be fetched, and whose they are.
//!
//! All images share one FUSE connection. The kernel sends [`face::MAX_BACKGROUND`](super::face) asynchronous reads and then no more, whoever wants
//! them, until some are answered; so the readers of one image whose registry hangs must never be as many. What waits is bounded here, well below
//! that, and shared like the memory of a switch between its ports: an owner may have as many places as are still free. One that hangs alone
//! takes half of all, the next one half of the rest, and so on: whoever comes last still finds some. A read that finds none fails at once;
//! reads of bytes that are in the cache never need a place.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus::IntGauge;

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
}

/// A read that waits; dropped, it does not any more.
pub(super) struct Place {
    waiting: Arc<Waiting>,
    owner: Arc<str>,
}

impl Waiting {
    pub(super) fn new(gauge: IntGauge) -> Arc<Self> {
        Arc::new(Waiting {
            state: Mutex::default(),
            gauge,
        })
    }

    /// A place for a read of `owner`'s; `None`: too many of its reads wait already.
    pub(super) fn enter(self: &Arc<Self>, owner: &str) -> Option<Place> {
        let mut state = self.lock();
        let owner = match state.owners.get_key_value(owner) {
            Some((owner, own)) if *own < PLACES - state.total => Arc::clone(owner),
            None if state.total < PLACES => Arc::from(owner),
            _ => return None,
        };
        *state.owners.entry(Arc::clone(&owner)).or_default() += 1;
        state.total += 1;
        self.gauge.set(state.total as i64);
        drop(state);
        Some(Place {
            waiting: Arc::clone(self),
            owner,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.waiting.lock();
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
        std::iter::from_fn(|| waiting.enter(owner)).collect()
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
        assert!(waiting.enter("e").is_some());
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
    }
}
