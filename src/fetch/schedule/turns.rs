//! Turns at what this machine has to do itself: decoding, of which more at once than there are processors helps nobody, and which shares
//! the threads for blocking work with everything else.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};

use tokio::sync::oneshot;

use super::Class;
use crate::sync::primitives::{Mutex, MutexGuard};

/// A fixed number of turns at once; the most urgent class first, within a class in order of arrival.
#[derive(Debug)]
pub struct Turns(Mutex<State>);

#[derive(Debug)]
struct State {
    free: usize,
    waiting: [VecDeque<oneshot::Sender<Turn>>; 4],
}

/// A turn; dropped, it is over.
#[derive(Debug)]
pub struct Turn(Option<Arc<Turns>>);

impl Turns {
    /// That many at once, at least one.
    pub fn new(count: usize) -> Arc<Self> {
        Arc::new(Turns(Mutex::new(State {
            free: count.max(1),
            waiting: Default::default(),
        })))
    }

    /// Waits for a turn. Dropping the future gives up the place in the queue.
    pub async fn take(self: &Arc<Self>, class: Class) -> Turn {
        loop {
            let turn = {
                let mut state = self.lock();
                if state.free > 0 {
                    state.free -= 1;
                    return Turn(Some(Arc::clone(self)));
                }
                let (sender, turn) = oneshot::channel();
                state.waiting[class as usize].push_back(sender);
                turn
            };
            // A sender is dropped only after sending; asking again would be right in any case.
            if let Ok(turn) = turn.await {
                return turn;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let Some(turns) = self.0.take() else { return };
        loop {
            let next = {
                let mut state = turns.lock();
                let next = state.waiting.iter_mut().find_map(VecDeque::pop_front);
                if next.is_none() {
                    state.free += 1;
                }
                next
            };
            let Some(next) = next else { return };
            match next.send(Turn(Some(Arc::clone(&turns)))) {
                Ok(()) => return,
                // That one waits no more. The turn must not come back here through its own drop.
                Err(mut turn) => turn.0 = None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn demand_has_its_turn_before_background() {
        let turns = Turns::new(1);
        let held = turns.take(Class::Demand).await;
        let mut background = turns.take(Class::Background).boxed();
        let mut gone = turns.take(Class::Demand).boxed();
        let mut demand = turns.take(Class::Demand).boxed();
        assert!(futures::poll!(&mut background).is_pending());
        assert!(futures::poll!(&mut gone).is_pending());
        assert!(futures::poll!(&mut demand).is_pending());
        drop(gone);
        drop(held);
        let turn = demand.await;
        assert!(futures::poll!(&mut background).is_pending(), "one at a time");
        drop(turn);
        drop(background.await);
        assert_eq!(turns.lock().free, 1);
    }
}
