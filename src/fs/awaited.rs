//! Requests for layers that are known and not there yet.
//!
//! A process that takes a session over knows which layers are in use before it has all of them: the index of one may have to be fetched.
//! The kernel asks for them all the same, on behalf of containers that run. Such a request waits here until its layer is attached, at most
//! as long as any read may wait, and is answered as if it had come then.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Most requests that wait at once. More are answered at once, with an error.
const WAITING_MAX: usize = super::waiting::PLACES;

/// What answers a request.
pub(super) type Answering = Box<dyn FnOnce() + Send>;

/// The slots whose layers are awaited.
#[derive(Default)]
pub(super) struct Awaited {
    /// Whether there are any: nearly always there are none, and no request should take a lock to learn that.
    any: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    slots: HashMap<u32, Vec<(Instant, Answering)>>,
    waiting: usize,
}

impl Awaited {
    /// From now on requests for `slot` wait.
    pub(super) fn expect(&self, slot: u32) {
        let mut state = self.lock();
        state.slots.entry(slot).or_default();
        self.any.store(true, Ordering::SeqCst);
    }

    /// The layer of `slot` is there, or will not come: gives the requests that wait for it.
    #[must_use]
    pub(super) fn settle(&self, slot: u32) -> Vec<Answering> {
        if !self.any.load(Ordering::SeqCst) {
            return Vec::new();
        }
        let mut state = self.lock();
        let requests = state.slots.remove(&slot).unwrap_or_default();
        state.waiting -= requests.len();
        self.any.store(!state.slots.is_empty(), Ordering::SeqCst);
        requests.into_iter().map(|(_, answering)| answering).collect()
    }

    /// Keeps a request until `slot` is settled; gives it back if it is not awaited.
    pub(super) fn keep(&self, slot: u32, answering: Answering) -> Result<(), Answering> {
        if !self.any.load(Ordering::SeqCst) {
            return Err(answering);
        }
        let mut state = self.lock();
        if state.waiting >= WAITING_MAX {
            return Err(answering);
        }
        match state.slots.get_mut(&slot) {
            Some(requests) => requests.push((Instant::now(), answering)),
            None => return Err(answering),
        }
        state.waiting += 1;
        Ok(())
    }

    /// Whether anything is awaited.
    pub(super) fn is_any(&self) -> bool {
        self.any.load(Ordering::SeqCst)
    }

    /// Gives the requests that have waited for `limit`.
    #[must_use]
    pub(super) fn overdue(&self, limit: Duration) -> Vec<Answering> {
        let mut state = self.lock();
        let mut overdue = Vec::new();
        for requests in state.slots.values_mut() {
            overdue.extend(requests.extract_if(.., |(since, _)| since.elapsed() >= limit));
        }
        state.waiting -= overdue.len();
        overdue.into_iter().map(|(_, answering)| answering).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn a_request_waits_for_its_slot_alone() {
        let (awaited, answered) = (Awaited::default(), Arc::new(AtomicUsize::new(0)));
        let request = || {
            let answered = Arc::clone(&answered);
            Box::new(move || {
                answered.fetch_add(1, Ordering::SeqCst);
            }) as Answering
        };
        assert!(awaited.keep(7, request()).is_err(), "nothing is awaited");
        awaited.expect(7);
        awaited.expect(8);
        assert!(awaited.keep(9, request()).is_err());
        assert!(awaited.keep(7, request()).is_ok() && awaited.keep(7, request()).is_ok());
        assert!(awaited.keep(8, request()).is_ok());
        assert_eq!(awaited.overdue(Duration::MAX).len(), 0);
        assert_eq!(awaited.settle(9).len(), 0);
        let requests = awaited.settle(7);
        assert_eq!((requests.len(), answered.load(Ordering::SeqCst)), (2, 0));
        requests.into_iter().for_each(|request| request());
        assert_eq!(answered.load(Ordering::SeqCst), 2);
        assert!(awaited.keep(7, request()).is_err() && awaited.is_any());
        assert_eq!(awaited.overdue(Duration::ZERO).len(), 1);
        assert_eq!(awaited.settle(8).len(), 0, "it is still awaited, and nobody waits");
        assert!(!awaited.is_any());
    }
}
