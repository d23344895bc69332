//! One job for all who ask for the same thing at once.

use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::sync::{Arc, PoisonError};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::primitives::{Mutex, MutexGuard, spawn_on};

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
                    spawn_on(runtime, async move {
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
}
