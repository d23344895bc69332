//! Running a command to its end, or to the signal that ends it.
//!
//! A signal drops what the command is doing, and with it everything that cleans up after itself. Threads that still write are waited for,
//! so that whoever owns a temporary directory removes it after them: it has to live outside of what is run here.
//!
//! Who sends a second signal does not want to wait for that, or the command hangs on a disk that does not answer: then it ends at once, and
//! what it leaves is cleared by the next one.

use std::io;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

use super::failure::{Interrupted, SIGNALLED};
use super::output;
use crate::daemon::{Stop, stop_signal};

/// Longest wait for threads that still write when the command has ended. (One that waits for a name server takes longer, and writes nothing.)
const GRACE: Duration = Duration::from_secs(2);

/// Signals that come so soon after the first are the same one: `timeout` and closing terminals send it to the process and to its group.
const ECHO: Duration = Duration::from_secs(1);

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
        end_at_second_signal()?;
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

/// Ends the process at the second signal, whatever it is doing.
fn end_at_second_signal() -> io::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let first = runtime.block_on(async { stop_signal() })?;
    let watch = move || {
        let second = runtime.block_on(async {
            first.await;
            tokio::time::sleep(ECHO).await;
            Some(stop_signal().ok()?.await)
        });
        if let Some(signal) = second {
            output::tell("ended at once by a second signal; what is left is cleared by the next command");
            std::process::exit(i32::from(SIGNALLED + signal.number));
        }
    };
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(watch)
        .map(drop)
}
