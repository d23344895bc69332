//! Running a command to its end, or to the signal that ends it.
//!
//! A signal drops what the command is doing, and with it everything that cleans up after itself. Threads that still write are waited for,
//! so that whoever owns a temporary directory removes it after them: it has to live outside of what is run here.

use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

use super::failure::Interrupted;
use crate::daemon::{Stop, stop_signal};

/// Longest wait for threads that still write when the command has ended. (One that waits for a name server takes longer, and writes nothing.)
const GRACE: Duration = Duration::from_secs(2);

/// A runtime that listens to signals.
pub(super) struct Worker {
    runtime: Option<Runtime>,
    stop: Stop,
    grace: Duration,
}

impl Worker {
    /// For commands that are clients: one thread is enough.
    pub(super) fn client() -> anyhow::Result<Self> {
        Self::new(&mut Builder::new_current_thread(), Duration::ZERO)
    }

    /// For commands that download and decompress.
    pub(super) fn threads() -> anyhow::Result<Self> {
        Self::new(&mut Builder::new_multi_thread(), GRACE)
    }

    fn new(builder: &mut Builder, grace: Duration) -> anyhow::Result<Self> {
        let runtime = builder.enable_all().build()?;
        let stop = runtime.block_on(async { stop_signal() })?;
        let runtime = Some(runtime);
        Ok(Worker { runtime, stop, grace })
    }

    /// Runs `work` to its end, or to the first signal.
    ///
    /// # Errors
    /// Those of `work`, and [`Interrupted`].
    pub(super) fn run<T>(&self, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
        let stop = self.stop.clone();
        self.block_on(async {
            tokio::select! {
                biased;
                signal = stop => Err(Interrupted(signal).into()),
                result = work => result,
            }
        })
    }

    /// Runs `work` to its end, whatever signal comes.
    pub(super) fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        match &self.runtime {
            Some(runtime) => runtime.block_on(work),
            None => unreachable!("the runtime is there until the worker is dropped"),
        }
    }

    /// Waits for a signal.
    pub(super) fn wait_for_signal(&self) {
        self.block_on(self.stop.clone());
    }

    /// Where tasks run.
    pub(super) fn handle(&self) -> tokio::runtime::Handle {
        self.block_on(async { tokio::runtime::Handle::current() })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(self.grace);
        }
    }
}
