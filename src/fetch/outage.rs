//! Hosts that deliver nothing, while readers wait for them.
//!
//! A request that fails in a way that may pass fails no reader: its chunks go back into the queue, and their readers wait, up to their own
//! deadline. The host has an *outage* then, until it delivers anything to anybody. Layers whose request has failed take turns while it
//! lasts: one of them asks, with all the attempts and waits that the registry's client makes of it, rests for [`REST`], and the next one
//! does. So a host that comes back is not met by everybody who waits, and one that is away costs one request at a time, however many
//! layers and readers there are. The first good answer ends the outage, and all go on at once. A layer whose own request has not failed
//! asks without a turn: somebody else's trouble may be with one blob alone.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant};

use prometheus::IntGauge;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use super::FetchError;
use crate::registry::Origin;
use crate::sync::primitives::{Mutex, MutexGuard};

/// Time between the end of one turn and the next: what the client of the registry waits between its attempts is not counted. Readers hang
/// meanwhile, and a host that answers with errors at once is asked no more often than this.
const REST: Duration = Duration::from_millis(500);

/// The hosts that have one.
pub(super) struct Outages {
    hosts: Mutex<HashMap<Arc<str>, Weak<Outage>>>,
    gauge: IntGauge,
}

/// A time in which a host delivers nothing. It also ends when the last one who waits has let go of it.
pub(super) struct Outage {
    all: Arc<Outages>,
    host: Arc<str>,
    since: Instant,
    turns: Arc<Semaphore>,
    over: CancellationToken,
}

/// The right to ask a host that has an outage. It is to be kept until the request has ended, and then given up with [`Turn::rest`].
pub(super) struct Turn {
    permit: OwnedSemaphorePermit,
    outage: Arc<Outage>,
}

impl Outages {
    pub fn new(gauge: IntGauge) -> Arc<Self> {
        Arc::new(Outages {
            hosts: Mutex::default(),
            gauge,
        })
    }

    /// A request to `origin` failed for now, and readers wait for what it was to bring: the outage of the host.
    pub fn failed(self: &Arc<Self>, origin: &Origin, why: &FetchError) -> Arc<Outage> {
        let mut hosts = self.lock();
        if let Some(outage) = hosts.get(&origin.host).and_then(Weak::upgrade) {
            return outage;
        }
        tracing::warn!(host = %origin.host, error = %why, "readers wait for a host that delivers nothing; it is asked again and again");
        let outage = Arc::new(Outage {
            all: Arc::clone(self),
            host: Arc::clone(&origin.host),
            since: Instant::now(),
            turns: Arc::new(Semaphore::new(1)),
            over: CancellationToken::new(),
        });
        hosts.insert(Arc::clone(&origin.host), Arc::downgrade(&outage));
        self.gauge.set(hosts.len() as i64);
        outage
    }

    /// The host of `origin` delivered something.
    pub fn delivered(&self, origin: &Origin) {
        let mut hosts = self.lock();
        let outage = hosts.remove(&origin.host).and_then(|outage| outage.upgrade());
        self.gauge.set(hosts.len() as i64);
        drop(hosts);
        if let Some(outage) = outage {
            tracing::info!(host = %outage.host, seconds = outage.since.elapsed().as_secs(), "the host delivers again");
            outage.over.cancel();
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Arc<str>, Weak<Outage>>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Outage {
    /// Waits until it is over (`None`), or for a turn.
    pub async fn turn(self: &Arc<Self>) -> Option<Turn> {
        tokio::select! {
            biased;
            () = self.over.cancelled() => None,
            permit = Arc::clone(&self.turns).acquire_owned() => Some(Turn {
                // Never closed.
                permit: permit.ok()?,
                outage: Arc::clone(self),
            }),
        }
    }

    pub fn is_over(&self) -> bool {
        self.over.is_cancelled()
    }
}

impl Drop for Outage {
    fn drop(&mut self) {
        let mut hosts = self.all.lock();
        // There may be a new one by now.
        if !self.is_over() && hosts.get(&self.host).is_some_and(|outage| outage.strong_count() == 0) {
            hosts.remove(&self.host);
            self.all.gauge.set(hosts.len() as i64);
        }
    }
}

impl Turn {
    /// Gives it to the next, after a rest unless the outage is over.
    pub async fn rest(self) {
        tokio::select! {
            () = tokio::time::sleep(REST) => {}
            () = self.outage.over.cancelled() => {}
        }
        drop(self.permit);
    }
}

impl FetchError {
    /// Whether the bytes may be had later: then readers wait for them.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            FetchError::Source { source, .. } => source.retry_helps(),
            // A source that was silent.
            FetchError::Deadline { .. } => true,
            FetchError::Corrupt { .. }
            | FetchError::Disk { .. }
            | FetchError::BlobOnly { .. }
            | FetchError::Closed { .. } => false,
        }
    }
}
