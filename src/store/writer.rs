//! The one thread that writes.
//!
//! Changes come through a bounded queue. The thread begins a transaction with the first, takes in whatever else is queued, and commits all of
//! them together; what arrives while it waits for the disk goes into the next commit. So a slow disk makes commits larger, not the queue
//! longer, and nobody but this thread waits within a commit.
//!
//! A change that fails leaves the others alone ([`Draft`]). If the transaction itself fails, everyone in it gets the error, and nothing of it is
//! there; unless it was the disk that failed, which may have kept all of it all the same (backend.rs): that is found out when the file is opened
//! anew. Nobody is answered before the commit: a change that failed may have seen what another one of the same transaction wrote.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use redb::{Database, WriteTransaction};
use tokio::sync::{mpsc, oneshot};

use super::draft::{Draft, Written};
use super::{Inner, StoreError};
use crate::sync::may_block;

/// Most changes that wait for the thread; who brings more waits before.
const QUEUE: usize = 256;
/// Most changes of one transaction, so that the first need not wait for all that the others do.
const BATCH: usize = 256;
/// Name of the thread.
const THREAD: &str = "lazuli-store";

/// The queue's other end, and the thread.
pub(super) struct Writer {
    queue: Option<mpsc::Sender<Box<dyn Job>>>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    pub fn start(inner: Arc<Inner>) -> std::io::Result<Self> {
        let (queue, jobs) = mpsc::channel(QUEUE);
        let thread = thread::Builder::new()
            .name(THREAD.to_owned())
            .spawn(move || run(&inner, jobs))?;
        Ok(Writer {
            queue: Some(queue),
            thread: Some(thread),
        })
    }

    /// Runs `work` in a transaction, and waits until that is on disk. Once it is queued it is run, whether somebody waits or not.
    pub async fn change<T, E, W>(&self, work: W) -> Result<T, E>
    where
        W: FnOnce(&Draft<'_>) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let job = Change {
            work: Some(work),
            result: None,
            answer,
        };
        let Some(queue) = &self.queue else {
            return Err(StoreError::Closed.into());
        };
        if queue.send(Box::new(job)).await.is_err() {
            return Err(StoreError::Closed.into());
        }
        answered.await.unwrap_or_else(|_| Err(StoreError::Panicked.into()))
    }
}

impl Drop for Writer {
    /// What is queued is still written.
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take()
            // A change may own what owns the database.
            && thread.thread().id() != thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("the database's thread has panicked");
        }
    }
}

/// A change in the queue.
trait Job: Send {
    /// Makes the change. An error means that the transaction has to be given up.
    fn run(&mut self, transaction: &WriteTransaction) -> Result<Written, StoreError>;

    /// Tells what became of it.
    fn answer(self: Box<Self>, outcome: &Result<(), Arc<StoreError>>);
}

struct Change<W, T, E> {
    work: Option<W>,
    /// `None`: not run, or it panicked.
    result: Option<Result<T, E>>,
    answer: oneshot::Sender<Result<T, E>>,
}

impl<W, T, E> Job for Change<W, T, E>
where
    W: FnOnce(&Draft<'_>) -> Result<T, E> + Send,
    T: Send,
    E: From<StoreError> + Send,
{
    fn run(&mut self, transaction: &WriteTransaction) -> Result<Written, StoreError> {
        let Some(work) = self.work.take() else {
            return Ok(Written::default());
        };
        let draft = Draft::new(transaction);
        // A panic is the caller's alone: he gets no answer, and its draft is dropped.
        let result = catch_unwind(AssertUnwindSafe(|| work(&draft)));
        match result {
            Ok(Ok(value)) => {
                let written = draft.flush()?;
                self.result = Some(Ok(value));
                Ok(written)
            }
            Ok(Err(error)) => {
                self.result = Some(Err(error));
                Ok(Written::default())
            }
            Err(_) => Ok(Written::default()),
        }
    }

    fn answer(self: Box<Self>, outcome: &Result<(), Arc<StoreError>>) {
        let result = match outcome {
            Ok(()) => self.result,
            Err(error) => Some(Err(StoreError::GivenUp(Arc::clone(error)).into())),
        };
        if let Some(result) = result {
            // Nobody may wait any more.
            let _ = self.answer.send(result);
        }
    }
}

fn run(inner: &Inner, mut jobs: mpsc::Receiver<Box<dyn Job>>) {
    may_block();
    while let Some(first) = jobs.blocking_recv() {
        let mut batch = Vec::new();
        let outcome = inner.transact(first, &mut jobs, &mut batch).map_err(Arc::new);
        if let Err(error) = &outcome {
            tracing::error!(%error, changes = batch.len(), "the database could not be written");
        }
        inner.metrics.database_changes_total.inc_by(batch.len() as u64);
        for job in batch {
            job.answer(&outcome);
        }
    }
}

impl Inner {
    /// Runs and commits one batch.
    fn transact(
        &self,
        first: Box<dyn Job>,
        jobs: &mut mpsc::Receiver<Box<dyn Job>>,
        batch: &mut Vec<Box<dyn Job>>,
    ) -> Result<(), StoreError> {
        let mut next = Some(first);
        // Opened anew, if need be, and before anything is written.
        let begun = self.renew().and_then(|()| {
            let writing = self.access.writing();
            Ok((writing, self.access.with(Database::begin_write)??))
        });
        let (_writing, transaction) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                batch.extend(next);
                return Err(error);
            }
        };
        let mut all = Written::default();
        while let Some(mut job) = next {
            let written = job.run(&transaction);
            batch.push(job);
            // Dropped, the transaction is given up.
            let written = written?;
            all.dirty |= written.dirty;
            all.lineage.extend(written.lineage);
            next = if batch.len() < BATCH {
                jobs.try_recv().ok()
            } else {
                None
            };
        }
        if !all.dirty {
            return Ok(transaction.abort()?);
        }
        let timer = self.metrics.database_commit_seconds.start_timer();
        transaction.commit()?;
        timer.observe_duration();
        self.lineage.apply(all.lineage);
        Ok(())
    }
}
