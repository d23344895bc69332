//! Locks, atomics and tasks, for what has a protocol of its own between threads.
//!
//! They are those of the standard library and of tokio. In unit tests that are built with the feature `shuttle` they are shuttle's, which runs
//! one thread at a time, chooses at each of these operations which one goes on, and so tries many orders in which the same code may run (tests
//! called `interleaved`; no others can be run then). All locks that such a test meets have to come from here: a thread that waits for another
//! lock stops all of them.

pub use std::sync::atomic::Ordering;

#[cfg(not(all(test, feature = "shuttle")))]
pub use real::*;
#[cfg(all(test, feature = "shuttle"))]
pub use shuttled::*;

#[cfg(not(all(test, feature = "shuttle")))]
mod real {
    pub use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, fence};
    pub use std::sync::{Mutex, MutexGuard, RwLock};

    use tokio::runtime::Handle;
    pub use tokio::task::{JoinHandle, spawn_blocking};

    /// Waits for a task; its panic goes on here.
    pub async fn joined<T>(task: JoinHandle<T>) -> T {
        match task.await {
            Ok(value) => value,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime ends, and this task with it.
                Err(_) => std::future::pending().await,
            },
        }
    }

    /// Starts a task on a runtime.
    #[track_caller]
    pub fn spawn_on<F>(runtime: &Handle, task: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        runtime.spawn(task)
    }

    /// Starts work that blocks on a thread of a runtime.
    #[track_caller]
    pub fn spawn_blocking_on<T: Send + 'static>(
        runtime: &Handle,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        runtime.spawn_blocking(work)
    }
}

#[cfg(all(test, feature = "shuttle"))]
mod shuttled {
    pub use shuttle::future::JoinHandle;
    use shuttle::scheduler::{PctScheduler, RandomScheduler};
    pub use shuttle::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, fence};
    pub use shuttle::sync::{Mutex, MutexGuard, RwLock};
    use tokio::runtime::Handle;

    /// Waits for a task. If one panics, the test has failed.
    pub async fn joined<T>(task: JoinHandle<T>) -> T {
        match task.await {
            Ok(value) => value,
            Err(_) => std::future::pending().await,
        }
    }

    /// Starts a task, which shuttle runs.
    pub fn spawn_on<F>(_: &Handle, task: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        shuttle::future::spawn(task)
    }

    /// Work that blocks is a task as well: shuttle interrupts it anywhere.
    pub fn spawn_blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        shuttle::future::spawn(async { work() })
    }

    /// The same.
    pub fn spawn_blocking_on<T: Send + 'static>(
        _: &Handle,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        spawn_blocking(work)
    }

    /// Orders that are tried of each test, if nothing else is said (`LAZULI_ORDERS`).
    const ORDERS: usize = 100;
    /// Bytes of a thread's stack: what is tested decompresses.
    const STACK: usize = 1 << 20;
    /// Operations after which a test does not come to its end.
    const OPERATIONS: usize = 500_000;
    /// Threads that are held back for long at the same time, in half of the orders.
    const HELD_BACK: usize = 3;

    /// Runs `test` in many orders, half of them quite at random, half of them such that few threads are held back for long.
    ///
    /// tokio's clock stands still: no deadline passes.
    pub fn explore(test: impl Fn() + Send + Sync + 'static) {
        let number = |name, default| std::env::var(name).map_or(default, |text| text.parse().expect(name));
        let orders = number("LAZULI_ORDERS", ORDERS as u64) as usize;
        let seed = number("LAZULI_SEED", std::process::id().into());
        println!("LAZULI_SEED={seed} LAZULI_ORDERS={orders}");
        let clock = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a clock");
        let _inside = clock.enter();
        let mut config = shuttle::Config::new();
        config.stack_size = STACK;
        config.max_steps = shuttle::MaxSteps::FailAfter(OPERATIONS);
        let test = std::sync::Arc::new(test);
        let random = RandomScheduler::new_from_seed(seed, orders.div_ceil(2));
        let again = std::sync::Arc::clone(&test);
        shuttle::Runner::new(random, config.clone()).run(move || again());
        let held_back = PctScheduler::new_from_seed(seed, HELD_BACK, orders / 2);
        shuttle::Runner::new(held_back, config).run(move || test());
    }
}
