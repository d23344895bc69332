//! One layer, several places to get it from.
//!
//! containerd's content labels name a registry without its port, and an image may have been pulled from several repositories. What is
//! known of the places is kept by layer in [`Standings`]: which of them have delivered bytes that were the layer's, and which failed
//! lately. Those that delivered come first, the last one of them before all; then those that were never tried; and those that failed come
//! last, for a time that grows. A [`Failover`] asks them in that order, also in the middle of a body. One that says nothing is asked beside
//! the next one, if that is another host: a second question to the same would only add to its work.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{self, FuturesUnordered};
use futures::{FutureExt, StreamExt};
use tokio::time::{sleep, timeout};

use crate::layer::Digest;
use crate::registry::{Blob, Body, Origin, RegistryError};
use crate::store::LayerSource;

mod repositories;
mod standings;

pub use repositories::Repositories;
pub use standings::Standings;

/// Silence of a place after which another host is asked as well. It is longer than a client's own patience with one of several mirrors
/// ([`crate::registry::health::SILENT`]), which comes first.
const SILENT: Duration = Duration::from_secs(2);
/// Silence in the middle of a body after which the rest is asked for elsewhere.
const STALLED: Duration = Duration::from_secs(4);

fn origin(source: &LayerSource) -> Origin {
    Origin::new(&source.host, &source.repository)
}

/// The same blob at several places.
pub struct Failover(Arc<Places>);

/// How places are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// [`Blob::read`].
    All,
    /// [`Blob::read_part`].
    Part,
    /// [`Blob::read_beside`].
    Beside,
}

struct Places {
    layer: Digest,
    blobs: Vec<Arc<dyn Blob>>,
    origins: Vec<Origin>,
    standings: Arc<Standings>,
    /// Position of the place that answered last.
    served: AtomicUsize,
}

impl Failover {
    /// The blob of `layer` that is asked for at `blobs`; `None` if there are none.
    pub fn over(layer: Digest, blobs: Vec<Arc<dyn Blob>>, standings: Arc<Standings>) -> Option<Arc<dyn Blob>> {
        let origins: Vec<Origin> = blobs.iter().map(|blob| blob.origin()).collect();
        let first = *standings.order(&layer, origins.iter()).first()?;
        Some(Arc::new(Failover(Arc::new(Places {
            layer,
            blobs,
            origins,
            standings,
            served: AtomicUsize::new(first),
        }))))
    }
}

impl Places {
    /// Asks for `range`, everywhere but at `except`, until one place answers. Gives its position. If a part is asked for, it is no answer that a place
    /// has the blob, but no ranges of it; that is what is said at the end, if nobody else has any.
    async fn open(&self, range: Range<u64>, how: How, except: Option<usize>) -> Result<(usize, Body), RegistryError> {
        let order = self.standings.order(&self.layer, self.origins.iter());
        let mut left: Vec<usize> = order.into_iter().filter(|at| Some(*at) != except).collect();
        let mut asked: FuturesUnordered<BoxFuture<'_, (usize, Result<Body, RegistryError>)>> = FuturesUnordered::new();
        let mut busy: Vec<usize> = Vec::new();
        let mut worst: Option<RegistryError> = None;
        let mut no_ranges: Option<(usize, RegistryError)> = None;
        loop {
            // Beside others, only a host that none of them is at.
            let is_free = |at: &usize| {
                busy.iter()
                    .all(|other| self.origins[*other].host != self.origins[*at].host)
            };
            let next = left.iter().position(is_free);
            if busy.is_empty() && next.is_none() {
                if let Some((at, error)) = no_ranges {
                    self.served.store(at, Ordering::Relaxed);
                    return Err(error);
                }
                return Err(worst.unwrap_or_else(|| RegistryError::NotFound {
                    host: "no other source".to_owned(),
                    what: self.blobs[except.unwrap_or_default()].describe(),
                }));
            }
            let patience = if busy.is_empty() { Duration::ZERO } else { SILENT };
            tokio::select! {
                // Answers before the clock, which goes on while nobody listens.
                biased;
                Some((at, outcome)) = asked.next() => match outcome {
                    Ok(body) => {
                        self.served.store(at, Ordering::Relaxed);
                        // Those that were asked before it, and were not as quick.
                        let turn = busy.iter().position(|other| *other == at).unwrap_or_default();
                        busy[..turn].iter().for_each(|slow| self.failed(*slow, "another source was quicker"));
                        return Ok((at, body));
                    }
                    Err(error) => {
                        busy.retain(|other| *other != at);
                        if matches!(error, RegistryError::NoRanges { .. }) {
                            no_ranges.get_or_insert((at, error));
                            continue;
                        }
                        self.failed(at, &error.to_string());
                        worst = Some(more_telling(worst.take(), error));
                    }
                },
                () = sleep(patience), if next.is_some() => {
                    let at = left.remove(next.unwrap_or_default());
                    let range = range.clone();
                    let blob = &self.blobs[at];
                    asked.push(
                        async move {
                            let body = match how {
                                How::All => blob.read(range),
                                How::Part => blob.read_part(range),
                                How::Beside => blob.read_beside(range),
                            };
                            (at, body.await)
                        }
                        .boxed(),
                    );
                    busy.push(at);
                }
            }
        }
    }

    fn failed(&self, at: usize, why: &str) {
        tracing::debug!(source = self.blobs[at].describe(), why, "source cannot deliver");
        self.standings.failed(&self.layer, &self.origins[at]);
    }

    /// The place that answered last.
    fn last(&self) -> usize {
        self.served.load(Ordering::Relaxed)
    }

    /// The place that is asked first.
    fn first(&self) -> usize {
        let order = self.standings.order(&self.layer, self.origins.iter());
        order.first().copied().unwrap_or_default()
    }

    fn is_at_several_hosts(&self) -> bool {
        self.origins.windows(2).any(|pair| pair[0].host != pair[1].host)
    }
}

/// A body that goes on from another place when the one that it comes from fails or stalls.
struct Going {
    places: Arc<Places>,
    body: Body,
    from: usize,
    rest: Range<u64>,
    how: How,
    can_stall: bool,
}

impl Going {
    async fn next(&mut self) -> Option<Result<bytes::Bytes, RegistryError>> {
        loop {
            // What has arrived is looked at before the clock, which goes on while nobody asks for more.
            let piece = match self.can_stall {
                true => timeout(STALLED, self.body.next()).await.ok(),
                false => Some(self.body.next().await),
            };
            let piece = match piece {
                Some(piece) => piece,
                None => {
                    let elsewhere = self.places.open(self.rest.clone(), self.how, Some(self.from));
                    tokio::select! {
                        biased;
                        piece = self.body.next() => piece,
                        Ok((at, body)) = elsewhere => {
                            self.places.failed(self.from, "it stalled");
                            (self.from, self.body) = (at, body);
                            continue;
                        }
                        else => {
                            // Nobody else has it.
                            self.can_stall = false;
                            continue;
                        }
                    }
                }
            };
            match piece {
                Some(Ok(bytes)) => {
                    self.rest.start += bytes.len() as u64;
                    return Some(Ok(bytes));
                }
                Some(Err(error)) if self.places.blobs.len() > 1 && !self.rest.is_empty() => {
                    if !matches!(error, RegistryError::NoRanges { .. }) {
                        self.places.failed(self.from, &error.to_string());
                    }
                    match self.places.open(self.rest.clone(), self.how, Some(self.from)).await {
                        Ok((at, body)) => (self.from, self.body) = (at, body),
                        Err(_) => return Some(Err(error)),
                    }
                }
                end => return end,
            }
        }
    }
}

impl Failover {
    async fn body(&self, range: Range<u64>, how: How) -> Result<Body, RegistryError> {
        let (from, body) = self.0.open(range.clone(), how, None).await?;
        if self.0.blobs.len() == 1 {
            return Ok(body);
        }
        let going = Going {
            places: Arc::clone(&self.0),
            body,
            from,
            rest: range,
            how,
            can_stall: self.0.is_at_several_hosts(),
        };
        let pieces = stream::unfold(going, |mut going| async move {
            let piece = going.next().await?;
            Some((piece, going))
        });
        Ok(pieces.boxed())
    }
}

impl Blob for Failover {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        self.body(range, How::All).boxed()
    }

    fn read_part(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        self.body(range, How::Part).boxed()
    }

    fn read_beside(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        self.body(range, How::Beside).boxed()
    }

    fn size(&self) -> u64 {
        self.0.blobs.first().map_or(0, |blob| blob.size())
    }

    fn distrust(&self) {
        let at = self.0.last();
        self.0.blobs[at].distrust();
        self.0.standings.lied(&self.0.layer, &self.0.origins[at]);
    }

    fn verified(&self) {
        self.0
            .standings
            .delivered(&self.0.layer, &self.0.origins[self.0.last()]);
    }

    fn describe(&self) -> String {
        self.0.blobs[self.0.last()].describe()
    }

    /// That of the place with this name, whichever is asked first by now.
    fn refusals(&self, host: &str) -> Option<u64> {
        self.0.blobs.iter().find_map(|blob| blob.refusals(host))
    }

    /// That of the place which is asked first.
    fn origin(&self) -> Origin {
        self.0.origins[self.0.first()].clone()
    }
}

/// Of two failures, the one to report: one that may pass, since then it pays to wait for the bytes; and of two that may, a host that answered
/// says more than one that could not be reached.
fn more_telling(a: Option<RegistryError>, b: RegistryError) -> RegistryError {
    let telling = |error: &RegistryError| (error.retry_helps(), !matches!(error, RegistryError::Unreachable { .. }));
    match a {
        Some(a) if telling(&a) >= telling(&b) => a,
        _ => b,
    }
}

#[cfg(test)]
mod tests;
