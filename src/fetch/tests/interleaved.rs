//! Readers, some of whom leave, what is read ahead, faults, evictions and the end, in many orders: see [`crate::sync::primitives`].
//!
//! In all of them every reader gets the right bytes, or the error that there is; nobody waits for ever, which shuttle calls a deadlock; no chunk
//! is fetched twice for nothing; and in the end nothing is asked for, and no place and no memory is taken.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::future::{BoxFuture, Either, select};
use futures::{FutureExt, StreamExt};
use shuttle::future::{block_on, spawn, yield_now};
use shuttle::rand::{Rng, thread_rng};
use tokio::runtime::Handle;

use super::fake::{Bench, FakeBlob, Fault, ranged};
use crate::cache::CachedLayer;
use crate::config::{ByteSize, FetchConfig};
use crate::fetch::flights::{Asked, Streams};
use crate::fetch::{FetchError, Layer, LayerData};
use crate::layer::Digest;
use crate::registry::{Blob, Body, Origin, RegistryError};
use crate::sync::primitives::explore;

/// Bytes of a chunk, and how many the layer has.
const CHUNK: usize = 300;
const CHUNKS: usize = 4;
/// No deadline of a reader passes.
const LONG: Duration = Duration::from_secs(600);
/// Operations that one who leaves waits at most.
const PATIENCE: usize = 40;

/// A blob between whose pieces others have their turn.
struct Slow(Arc<FakeBlob>);

impl Blob for Slow {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        async move {
            yield_now().await;
            let body = self.0.read(range).await?;
            let body = body.then(|piece| async {
                yield_now().await;
                piece
            });
            Ok(body.boxed())
        }
        .boxed()
    }

    fn size(&self) -> u64 {
        self.0.size()
    }

    fn describe(&self) -> String {
        self.0.describe()
    }

    fn origin(&self) -> Origin {
        self.0.origin()
    }
}

/// A layer of which nothing is there.
struct Scene {
    bench: Bench,
    blob: Arc<FakeBlob>,
    cached: Arc<CachedLayer>,
    layer: Arc<Layer>,
    data: Vec<u8>,
}

impl Scene {
    /// With so many places for requests, of so many bytes each at most.
    fn new(places: usize, max_request: u64) -> Arc<Self> {
        let (index, data, bytes) = ranged(&[CHUNK; CHUNKS]);
        let config = FetchConfig {
            max_concurrent_requests: places,
            max_request: ByteSize(max_request),
            ..FetchConfig::default()
        };
        let bench = Bench::with(0, config);
        let blob = FakeBlob::new(bytes);
        let cached = bench.cache.insert(&Digest::of(b"layer"), index).unwrap();
        let layer = bench
            .fetcher
            .open(Arc::clone(&cached), Arc::new(Slow(Arc::clone(&blob))));
        Arc::new(Scene {
            bench,
            blob,
            cached,
            layer,
            data,
        })
    }

    /// Anything of the layer.
    fn anywhere(&self) -> Range<usize> {
        let from = thread_rng().gen_range(0..self.data.len() - 1);
        from..thread_rng().gen_range(from + 1..=self.data.len())
    }

    /// Reads a part of it; whether it came.
    async fn read(&self, range: Range<usize>) -> Result<(), FetchError> {
        let (offset, len) = (range.start as u64, range.len() as u32);
        let mut buf = vec![0; range.len()];
        if let Some(read) = self.layer.read_ready(offset, &mut buf) {
            read.unwrap();
            assert!(buf == self.data[range], "what is ready is wrong");
            return Ok(());
        }
        let bytes = self.layer.read(offset, len, LONG).await?;
        assert!(bytes == self.data[range], "what was fetched is wrong");
        Ok(())
    }

    /// Reads a part of it, or goes away.
    async fn read_a_while(&self, range: Range<usize>) -> Option<Result<(), FetchError>> {
        let patience = thread_rng().gen_range(0..PATIENCE);
        let leaves = async {
            for _ in 0..patience {
                yield_now().await;
            }
        };
        match select(self.read(range).boxed(), leaves.boxed()).await {
            Either::Left((read, _)) => Some(read),
            Either::Right(_) => None,
        }
    }

    /// How often each chunk was asked for.
    fn asked(&self) -> Vec<usize> {
        let asked = self.blob.asked.lock().unwrap();
        let chunks = self.cached.index().chunks();
        let has = |range: &Range<u64>, at: u64| range.contains(&at);
        let times = |at: u64| asked.iter().filter(|range| has(range, at)).count();
        chunks.iter().map(|chunk| times(chunk.blob_offset)).collect()
    }

    /// Waits until nobody is at work any more, and looks what is left.
    async fn ends(&self) {
        while !self.layer.queue().is_empty()
            || self.bench.fetcher.scheduler().counts() != (0, 0)
            || self.bench.fetcher.requests.held() != 0
        {
            yield_now().await;
        }
    }
}

/// Runs `count` of a scene's readers at once.
fn readers<F>(scene: &Arc<Scene>, count: usize, one: impl Fn(Arc<Scene>) -> F) -> Vec<shuttle::future::JoinHandle<()>>
where
    F: Future<Output = ()> + Send + 'static,
{
    (0..count).map(|_| spawn(one(Arc::clone(scene)))).collect()
}

async fn all(tasks: Vec<shuttle::future::JoinHandle<()>>) {
    for task in tasks {
        task.await.unwrap();
    }
}

#[test]
fn interleaved_readers_share_one_fetch_of_each_chunk() {
    explore(|| {
        block_on(async {
            // No two chunks in one request, so that nothing comes along twice.
            let scene = Scene::new(3, 1);
            let mut tasks = readers(&scene, 3, |scene| async move {
                scene.read(scene.anywhere()).await.unwrap();
            });
            tasks.extend(readers(&scene, 2, |scene| async move {
                if let Some(read) = scene.read_a_while(scene.anywhere()).await {
                    read.unwrap();
                }
            }));
            tasks.extend(readers(&scene, 1, |scene| async move {
                scene.layer.prefetch(0, scene.data.len() as u64);
            }));
            all(tasks).await;
            scene.ends().await;
            assert!(scene.cached.is_complete(), "what was asked for ahead came");
            assert_eq!(scene.asked(), [1; CHUNKS]);
        });
    });
}

#[test]
fn interleaved_faults_are_met_by_nobody_or_by_all() {
    explore(|| {
        block_on(async {
            let scene = Scene::new(2, 64 << 10);
            scene
                .blob
                .fail([Fault::Flipped(40), Fault::Short(500), Fault::Panic, Fault::Missing]);
            let outcomes: Arc<Mutex<Vec<bool>>> = Arc::default();
            let tasks = readers(&scene, 4, |scene| {
                let outcomes = Arc::clone(&outcomes);
                async move {
                    let read = scene.read_a_while(scene.anywhere()).await;
                    outcomes.lock().unwrap().extend(read.map(|read| read.is_ok()));
                }
            });
            all(tasks).await;
            scene.ends().await;
            // The last fault is over: it is read as if nothing had been.
            scene.blob.faults.lock().unwrap().clear();
            scene.read(0..scene.data.len()).await.unwrap();
            scene.ends().await;
        });
    });
}

#[test]
fn interleaved_evictions_cost_no_reader_a_byte() {
    explore(|| {
        block_on(async {
            let scene = Scene::new(2, 64 << 10);
            let mut tasks = readers(&scene, 3, |scene| async move {
                for _ in 0..2 {
                    scene.read(scene.anywhere()).await.unwrap();
                }
            });
            tasks.extend(readers(&scene, 1, |scene| async move {
                for _ in 0..3 {
                    scene.cached.evict_all();
                    yield_now().await;
                }
            }));
            all(tasks).await;
            scene.ends().await;
        });
    });
}

#[test]
fn interleaved_ends_answer_everybody() {
    explore(|| {
        block_on(async {
            let scene = Scene::new(2, 600);
            let mut tasks = readers(&scene, 4, |scene| async move {
                match scene.read_a_while(scene.anywhere()).await {
                    None | Some(Ok(()) | Err(FetchError::Closed { .. })) => {}
                    Some(Err(error)) => panic!("{error}"),
                }
            });
            tasks.extend(readers(&scene, 1, |scene| async move {
                for _ in 0..thread_rng().gen_range(0..PATIENCE) {
                    yield_now().await;
                }
                scene.layer.close();
            }));
            all(tasks).await;
            scene.ends().await;
            let asked = scene.layer.read(0, 1, LONG).await;
            assert!(matches!(asked, Ok(_) | Err(FetchError::Closed { .. })));
            let _: Option<Bytes> = asked.ok();
        });
    });
}

/// What is streamed.
fn asked(source: &str) -> Asked {
    Asked {
        layer: Digest::of(b"streamed"),
        promise: None,
        source: Origin::new(source, "repo"),
        total: 100,
        what: "a test".to_owned(),
    }
}

/// Who asks while a stream is under way waits for that one; it is ended when the last who waits has left, and never before; whoever stays is
/// answered; and in the end there is none.
#[test]
fn interleaved_streams_end_with_the_last_who_waits() {
    explore(|| {
        block_on(async {
            let streams: Arc<Streams> = Arc::default();
            let (running, begun): (Arc<AtomicUsize>, Arc<AtomicUsize>) = Default::default();
            let cached = {
                let (index, ..) = ranged(&[CHUNK]);
                let bench = Bench::new();
                bench.cache.insert(&Digest::of(b"streamed"), index).unwrap()
            };
            let tasks = (0..4).map(|_| {
                let (streams, cached) = (Arc::clone(&streams), Arc::clone(&cached));
                let (running, begun) = (Arc::clone(&running), Arc::clone(&begun));
                spawn(async move {
                    let stream = move |_| {
                        struct Runs(Arc<AtomicUsize>);
                        impl Drop for Runs {
                            fn drop(&mut self) {
                                self.0.fetch_sub(1, Ordering::SeqCst);
                            }
                        }
                        begun.fetch_add(1, Ordering::SeqCst);
                        async move {
                            // One that was cancelled may still be on its way out.
                            running.fetch_add(1, Ordering::SeqCst);
                            let _runs = Runs(running);
                            for _ in 0..5 {
                                yield_now().await;
                            }
                            Ok(cached)
                        }
                    };
                    let runtime = Handle::current();
                    let share = streams.share(&runtime, asked("one"), stream).boxed();
                    let patience = thread_rng().gen_range(0..PATIENCE);
                    let leaves = async {
                        for _ in 0..patience {
                            yield_now().await;
                        }
                    };
                    if let Either::Left((outcome, _)) = select(share, leaves.boxed()).await {
                        outcome.expect("nobody who stays meets the end that others have made");
                    }
                })
            });
            for task in tasks.collect::<Vec<_>>() {
                task.await.unwrap();
            }
            assert!(streams.is_empty(), "nobody waits");
            while running.load(Ordering::SeqCst) > 0 {
                yield_now().await;
            }
            assert!(begun.load(Ordering::SeqCst) >= 1);
        });
    });
}
