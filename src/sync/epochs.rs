//! Waiting for those who are inside, without keeping anybody out.
//!
//! Somebody who takes things away must not take what another one has just been given and has not written down yet. A lock would keep all
//! newcomers waiting for as long as the slowest of those inside takes. Here whoever enters belongs to the current epoch; who takes away
//! begins a new one, and waits for those of earlier epochs alone. Newcomers mark what they are given with their epoch, and what bears the
//! new one is left alone.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use tokio::sync::Notify;

use super::primitives::{Mutex, MutexGuard};

/// Epochs, and who is inside.
#[derive(Debug, Default)]
pub struct Epochs {
    state: Mutex<State>,
    left: Notify,
}

#[derive(Debug, Default)]
struct State {
    current: u64,
    inside: BTreeMap<u64, usize>,
}

/// One that is inside; dropped, it has left.
#[derive(Debug)]
pub struct Passage {
    epochs: Arc<Epochs>,
    epoch: u64,
}

impl Epochs {
    /// Nobody is inside.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Goes inside. Never waits.
    pub fn enter(self: &Arc<Self>) -> Passage {
        let mut state = self.lock();
        let epoch = state.current;
        *state.inside.entry(epoch).or_default() += 1;
        Passage {
            epochs: Arc::clone(self),
            epoch,
        }
    }

    /// Begins a new epoch, and waits until all of the earlier ones have left; the number of the new one.
    pub async fn advance(&self) -> u64 {
        let current = {
            let mut state = self.lock();
            state.current += 1;
            state.current
        };
        loop {
            // Before the look: who leaves right after it wakes us.
            let left = self.left.notified();
            if self.lock().inside.range(..current).next().is_none() {
                return current;
            }
            left.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Passage {
    /// The epoch in which it came.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        let mut state = self.epochs.lock();
        if let Some(count) = state.inside.get_mut(&self.epoch) {
            *count -= 1;
            if *count == 0 {
                state.inside.remove(&self.epoch);
            }
        }
        drop(state);
        self.epochs.left.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn only_those_who_came_before_are_waited_for() {
        let epochs = Epochs::new();
        let first = epochs.enter();
        let mut advance = epochs.advance().boxed();
        assert!(futures::poll!(&mut advance).is_pending());
        let second = epochs.enter();
        assert!(second.epoch() > first.epoch());
        drop(first);
        assert_eq!(advance.await, second.epoch(), "the second one is still inside");
        drop(second);
        assert_eq!(epochs.advance().await, 2);
    }
}
