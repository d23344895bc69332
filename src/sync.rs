//! Small concurrency tools that several rooms share.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

/// Runs one job per key however many ask for it at once; all of them get its result.
///
/// The job runs as a task of its own: it goes on when those who asked stop waiting. Results are not kept: who asks after the end of
/// the job starts a new one.
pub struct SingleFlight<K, V> {
    flights: Mutex<HashMap<K, Flight<V>>>,
}

/// The result to come; `None` if the job panicked.
type Flight<V> = Shared<BoxFuture<'static, Option<V>>>;

impl<K, V> SingleFlight<K, V>
where
    K: Clone + Eq + Hash + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// No job is running.
    pub fn new() -> Arc<Self> {
        Arc::new(SingleFlight {
            flights: Mutex::new(HashMap::new()),
        })
    }

    /// Waits for the job of `key`, and starts `job` on `runtime` if there is none. `None`: the job panicked.
    pub async fn run<F>(self: &Arc<Self>, runtime: &Handle, key: K, job: F) -> Option<V>
    where
        F: Future<Output = V> + Send + 'static,
    {
        let flight = {
            let mut flights = self.lock();
            match flights.get(&key) {
                Some(flight) => flight.clone(),
                None => {
                    let landing = Landing {
                        flights: Arc::clone(self),
                        key: key.clone(),
                    };
                    let (answer, result) = oneshot::channel();
                    runtime.spawn(async move {
                        let value = job.await;
                        // First the end of the job, then its result: who has the result and asks again gets a new job.
                        drop(landing);
                        let _ = answer.send(value);
                    });
                    let flight = result.map(Result::ok).boxed().shared();
                    flights.insert(key, flight.clone());
                    flight
                }
            }
        };
        flight.await
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<K, Flight<V>>> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends a flight, also when its job panics.
struct Landing<K: Eq + Hash, V> {
    flights: Arc<SingleFlight<K, V>>,
    key: K,
}

impl<K: Eq + Hash, V> Drop for Landing<K, V> {
    fn drop(&mut self) {
        let mut flights = self.flights.flights.lock().unwrap_or_else(PoisonError::into_inner);
        flights.remove(&self.key);
    }
}

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
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn one_job_serves_all_who_ask_meanwhile() {
        let flights = SingleFlight::new();
        let count = Arc::new(AtomicUsize::new(0));
        let (open, closed) = tokio::sync::watch::channel(false);
        let ask = || {
            let (flights, count, mut closed) = (Arc::clone(&flights), Arc::clone(&count), closed.clone());
            async move {
                let job = async move {
                    let _ = closed.wait_for(|open| *open).await;
                    count.fetch_add(1, Ordering::Relaxed) + 1
                };
                flights.run(&Handle::current(), "key", job).await
            }
        };
        let mut first: BoxFuture<'_, _> = ask().boxed();
        let mut second: BoxFuture<'_, _> = ask().boxed();
        assert!(futures::poll!(&mut first).is_pending());
        assert!(futures::poll!(&mut second).is_pending());
        drop(first);
        open.send_replace(true);
        assert_eq!(second.await, Some(1), "the first one's leaving did not end the job");
        assert_eq!(ask().await, Some(2), "a new job");
    }

    #[tokio::test]
    async fn a_panic_leaves_nobody_waiting() {
        let flights: Arc<SingleFlight<u8, u8>> = SingleFlight::new();
        let panics = async { panic!("on purpose") };
        assert_eq!(flights.run(&Handle::current(), 1, panics).await, None);
        assert_eq!(flights.run(&Handle::current(), 1, async { 7 }).await, Some(7));
    }

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
