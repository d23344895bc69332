//! A fixed number of places, for which those in demand come before those in the background.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// How urgent it is to pass a [`Gate`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// Someone waits.
    Demand,
    /// Nobody waits yet.
    Background,
}

/// Lets a fixed number of holders through at once; those in demand before those in the background, within a class in order of arrival.
pub struct Gate {
    state: Mutex<GateState>,
}

struct GateState {
    free: usize,
    demand: VecDeque<oneshot::Sender<Pass>>,
    background: VecDeque<oneshot::Sender<Pass>>,
}

impl Gate {
    /// A gate for `width` holders at once, at least one.
    pub fn new(width: usize) -> Arc<Self> {
        Arc::new(Gate {
            state: Mutex::new(GateState {
                free: width.max(1),
                demand: VecDeque::new(),
                background: VecDeque::new(),
            }),
        })
    }

    /// Waits for a pass. Dropping the future gives up the place in the queue.
    pub async fn enter(self: &Arc<Self>, class: Class) -> Pass {
        loop {
            let turn = {
                let mut state = self.lock();
                if state.free > 0 {
                    state.free -= 1;
                    return Pass {
                        gate: Some(Arc::clone(self)),
                    };
                }
                let (sender, turn) = oneshot::channel();
                match class {
                    Class::Demand => state.demand.push_back(sender),
                    Class::Background => state.background.push_back(sender),
                }
                turn
            };
            // A sender is dropped only after sending; asking again would be right in any case.
            if let Ok(pass) = turn.await {
                return pass;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place within a [`Gate`]; dropping it lets the next one in.
pub struct Pass {
    gate: Option<Arc<Gate>>,
}

impl Drop for Pass {
    fn drop(&mut self) {
        let Some(gate) = self.gate.take() else { return };
        loop {
            let next = {
                let mut state = gate.lock();
                let next = state.demand.pop_front().or_else(|| state.background.pop_front());
                if next.is_none() {
                    state.free += 1;
                }
                next
            };
            let Some(next) = next else { return };
            let pass = Pass {
                gate: Some(Arc::clone(&gate)),
            };
            match next.send(pass) {
                Ok(()) => return,
                // That one waits no more. The pass must not come back here through its own drop.
                Err(mut pass) => pass.gate = None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn demand_passes_before_background() {
        let gate = Gate::new(1);
        let held = gate.enter(Class::Demand).await;
        let mut background = gate.enter(Class::Background).boxed();
        let mut gone = gate.enter(Class::Demand).boxed();
        let mut demand = gate.enter(Class::Demand).boxed();
        assert!(futures::poll!(&mut background).is_pending());
        assert!(futures::poll!(&mut gone).is_pending());
        assert!(futures::poll!(&mut demand).is_pending());
        drop(gone);
        drop(held);
        let pass = demand.await;
        assert!(futures::poll!(&mut background).is_pending(), "one at a time");
        drop(pass);
        drop(background.await);
        assert_eq!(gate.lock().free, 1);
    }
}
