//! One request of a lane: its bytes, in order, with the memory that they take, to whoever reads the lane.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::{Arrived, How, Room};
use crate::fetch::flights::Wishes;
use crate::fetch::pipeline::Fault;
use crate::fetch::schedule::{Place, Traffic};
use crate::fetch::width::{Extra, Link};
use crate::registry::{Blob, Body, RegistryError};
use crate::sync::caught;

/// What a lane's task tells.
#[derive(Debug)]
pub(super) struct Report {
    /// Where the next byte will be that it brings.
    pub(super) position: AtomicU64,
    /// Where it ends, if that is before the end of its range.
    pub(super) limit: AtomicU64,
    pub(super) begun: AtomicBool,
    pub(super) failed: AtomicBool,
    pub(super) ended: AtomicBool,
    /// How long it took, in milliseconds.
    pub(super) took: AtomicU64,
}

/// The bytes of a request, as its task brings them; dropped, the task ends.
pub(super) struct Run {
    pub(super) arrivals: mpsc::UnboundedReceiver<Result<Arrived, Fault>>,
    pub(super) report: Arc<Report>,
    pub(super) task: AbortOnDropHandle<()>,
}

impl Run {
    pub(super) fn has_begun(&self) -> bool {
        self.report.begun.load(Ordering::Acquire)
    }

    pub(super) fn has_ended(&self) -> bool {
        self.report.ended.load(Ordering::Acquire)
    }

    pub(super) fn has_failed(&self) -> bool {
        self.report.failed.load(Ordering::Acquire)
    }

    /// Where the next byte will be that it brings.
    pub(super) fn position(&self) -> u64 {
        self.report.position.load(Ordering::Acquire)
    }

    /// How long it took, once it has ended.
    pub(super) fn took(&self) -> Option<Duration> {
        let took = || Duration::from_millis(self.report.took.load(Ordering::Relaxed));
        self.has_ended().then(took)
    }

    /// Ends its request. What it has brought before can still be taken.
    pub(super) fn end(&self) {
        self.task.abort();
    }
}

/// Moves one request.
pub(super) struct Task {
    pub(super) blob: Arc<dyn Blob>,
    pub(super) range: Range<u64>,
    pub(super) how: How,
    pub(super) room: Room,
    pub(super) report: Arc<Report>,
    pub(super) pauses: Option<watch::Receiver<Wishes>>,
    pub(super) patience: Duration,
    pub(super) link: Arc<Link>,
    pub(super) traffic: Arc<Traffic>,
    pub(super) fetched: prometheus::IntCounter,
    pub(super) wake: Arc<Notify>,
}

impl Task {
    pub(super) async fn run(
        mut self,
        out: mpsc::UnboundedSender<Result<Arrived, Fault>>,
        held: Option<(Place, Extra)>,
    ) {
        let begin = Instant::now();
        let outcome = caught(self.bring(&out)).await;
        let outcome = outcome.unwrap_or_else(|bug| Err(Fault::Disk(bug)));
        let took = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.report.took.store(took, Ordering::Relaxed);
        if let Err(fault) = outcome {
            self.report.failed.store(true, Ordering::Release);
            // Nobody waits for it if that fails.
            let _ = out.send(Err(fault));
        }
        // Who is woken finds the place free.
        drop(held);
        self.report.ended.store(true, Ordering::Release);
        self.wake.notify_one();
    }

    async fn bring(&mut self, out: &mpsc::UnboundedSender<Result<Arrived, Fault>>) -> Result<(), Fault> {
        let patience = self.patience;
        let silence = |_| Fault::Silence(patience);
        let blob = Arc::clone(&self.blob);
        let body = match self.how {
            How::Plain => blob.read(self.range.clone()),
            How::Beside => blob.read_beside(self.range.clone()),
        };
        let body = timeout(patience, body).await.map_err(silence)?;
        let mut body = body.map_err(Fault::Source)?;
        let most = usize::try_from(self.room.most()).unwrap_or(usize::MAX);
        let mut at = self.range.start;
        loop {
            let piece = match &mut self.pauses {
                Some(wishes) => next(&mut body, wishes, patience).await?,
                None => timeout(patience, body.next()).await.map_err(silence)?,
            };
            let Some(piece) = piece else { return Ok(()) };
            let mut bytes = piece.map_err(Fault::Source)?;
            self.fetched.inc_by(bytes.len() as u64);
            self.link.arrived(bytes.len() as u64);
            self.traffic.arrived(bytes.len() as u64);
            while !bytes.is_empty() {
                let left = self.report.limit.load(Ordering::Acquire).saturating_sub(at);
                let count = bytes.len().min(most).min(usize::try_from(left).unwrap_or(usize::MAX));
                if count == 0 {
                    // Another lane goes on from here.
                    return Ok(());
                }
                let bytes = bytes.split_to(count);
                let memory = self.room.take(count as u64).await;
                if out.send(Ok(Arrived { at, bytes, memory })).is_err() {
                    return Ok(());
                }
                at += count as u64;
                self.report.position.store(at, Ordering::Release);
                if !self.report.begun.swap(true, Ordering::AcqRel) {
                    self.wake.notify_one();
                }
            }
        }
    }
}

/// The next piece of a body, once it is not paused. The source may be silent for `patience` outside of pauses.
async fn next(
    body: &mut Body,
    wishes: &mut watch::Receiver<Wishes>,
    patience: Duration,
) -> Result<Option<Result<Bytes, RegistryError>>, Fault> {
    loop {
        // Who could pause it is gone if this fails: then it is not paused.
        let _ = wishes.wait_for(|wishes| !wishes.pauses()).await;
        let pause = async {
            if wishes.wait_for(Wishes::pauses).await.is_err() {
                std::future::pending().await
            }
        };
        tokio::select! {
            piece = timeout(patience, body.next()) => return piece.map_err(|_| Fault::Silence(patience)),
            () = pause => {}
        }
    }
}
