//! One job for many, and waiting for those inside, in many orders.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use shuttle::future::{block_on, spawn, yield_now};
use shuttle::rand::{Rng, thread_rng};
use tokio::runtime::Handle;

use super::primitives::explore;
use super::{Epochs, SingleFlight};

/// Who has a result and asks again gets that of another job; no two jobs of a key run at once; who leaves ends nothing.
#[test]
fn interleaved_askers_share_one_job() {
    explore(|| {
        block_on(async {
            let flights: Arc<SingleFlight<u8, usize>> = SingleFlight::new();
            let (running, begun, ended): (Arc<AtomicUsize>, Arc<AtomicUsize>, Arc<AtomicUsize>) = Default::default();
            let asks = (0..4).map(|_| {
                let (flights, running) = (Arc::clone(&flights), Arc::clone(&running));
                let (begun, ended) = (Arc::clone(&begun), Arc::clone(&ended));
                spawn(async move {
                    let ask = || {
                        let (running, begun, ended) = (Arc::clone(&running), Arc::clone(&begun), Arc::clone(&ended));
                        let job = async move {
                            assert_eq!(running.fetch_add(1, Ordering::SeqCst), 0, "two jobs at once");
                            let number = begun.fetch_add(1, Ordering::SeqCst) + 1;
                            yield_now().await;
                            running.fetch_sub(1, Ordering::SeqCst);
                            ended.store(number, Ordering::SeqCst);
                            number
                        };
                        let flights = Arc::clone(&flights);
                        async move { flights.run(&Handle::current(), 7, job).await.expect("no job panics") }
                    };
                    if thread_rng().gen_bool(0.3) {
                        // One that has asked, and leaves.
                        let mut asks = Box::pin(ask());
                        let _ = futures::poll!(&mut asks);
                        return;
                    }
                    let first = ask().await;
                    assert!(ask().await > first, "the same again");
                })
            });
            for ask in asks.collect::<Vec<_>>() {
                ask.await.unwrap();
            }
            let all = begun.load(Ordering::SeqCst);
            while ended.load(Ordering::SeqCst) < all {
                yield_now().await;
            }
        });
    });
}

/// Who takes away meets nobody of an earlier epoch inside, and is not forgotten.
#[test]
fn interleaved_epochs_wait_for_those_before_them_and_end() {
    explore(|| {
        block_on(async {
            let epochs = Epochs::new();
            // By epoch, who is inside.
            let inside: Arc<[AtomicUsize; 4]> = Arc::default();
            let mut tasks = Vec::new();
            for _ in 0..3 {
                let (epochs, inside) = (Arc::clone(&epochs), Arc::clone(&inside));
                tasks.push(spawn(async move {
                    let passage = epochs.enter();
                    let epoch = passage.epoch() as usize;
                    inside[epoch].fetch_add(1, Ordering::SeqCst);
                    yield_now().await;
                    inside[epoch].fetch_sub(1, Ordering::SeqCst);
                    drop(passage);
                }));
            }
            for _ in 0..2 {
                let (epochs, inside) = (Arc::clone(&epochs), Arc::clone(&inside));
                tasks.push(spawn(async move {
                    let epoch = epochs.advance().await as usize;
                    let before = inside[..epoch].iter().map(|count| count.load(Ordering::SeqCst));
                    assert_eq!(before.sum::<usize>(), 0, "somebody of before is inside");
                }));
            }
            for task in tasks {
                task.await.unwrap();
            }
        });
    });
}
