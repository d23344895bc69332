//! One operation: an exchange that is repeated, over all endpoints that may serve it, until it succeeds or the attempts are used up.
//!
//! Endpoints are asked one after the other. One that says nothing for a while is asked beside the next one, and the first answer is taken:
//! whoever waits for a page of a file does not wait until a connection to a dead mirror is given up.
//!
//! Where no other is left, the silence may be that of a connection which something on the way has forgotten: once in an operation, what is missing of a
//! blob is asked for over a connection of its own. A host that is only slow is not asked twice for everything: [`Health::second`] bounds it. So it is
//! with a connection that brings much less than the others to its host do meanwhile ([`crate::registry::peers`]).
//!
//! [`Health::second`]: crate::registry::health::Health::second

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use url::Url;

use super::Repository;
use super::exchange::Ask;
use crate::layer::Digest;
use crate::registry::RegistryError;
use crate::registry::attempts::{Attempts, Failure};
use crate::registry::health::SLOW;
use crate::registry::hosts::wire::{Cut, Response};
use crate::registry::hosts::{Endpoint, For};
use crate::registry::peers::Peer;

/// An operation under way.
pub(super) struct Operation {
    pub repository: Arc<Repository>,
    pub ask: Ask,
    endpoints: Vec<Arc<Endpoint>>,
    attempts: Attempts,
    /// Whether a host that said nothing was asked over another connection.
    again: bool,
}

impl Operation {
    /// Looks up the endpoints; sends nothing.
    pub(super) async fn new(repository: Arc<Repository>, ask: Ask) -> Result<Self, RegistryError> {
        // A blob is read by somebody who is stopped by an error; its digest proves it, whoever is asked.
        let wanted = if ask.blob.is_some() { For::Content } else { For::Names };
        let all = match repository.shared.hosts.recent(&repository.host, wanted) {
            Some(endpoints) => endpoints,
            None => {
                let state = repository.clone();
                tokio::task::spawn_blocking(move || state.shared.hosts.fresh(&state.host, wanted))
                    .await
                    .map_err(|error| RegistryError::Unreachable {
                        host: repository.host.clone(),
                        what: format!("the look-up of its hosts ended: {error}"),
                    })?
                    .inspect_err(|error| tracing::warn!(%error, what = %ask.what, "giving up"))?
            }
        };
        let endpoints: Vec<_> = all
            .iter()
            .filter(|endpoint| match &ask.at {
                Some(place) => endpoint.base == place.base,
                None if ask.to_push => endpoint.push,
                None if ask.by_tag => endpoint.resolve,
                None => endpoint.pull,
            })
            // What was written to one host cannot be looked for at another: the first that takes it, as containerd does.
            .take(if ask.to_push { 1 } else { usize::MAX })
            .cloned()
            .collect();
        if endpoints.is_empty() {
            let capability = match (ask.to_push, ask.by_tag) {
                (true, _) => "push",
                (false, true) => "resolve",
                (false, false) => "pull",
            };
            return Err(RegistryError::Config {
                path: format!("hosts.toml of {}", repository.host),
                problem: format!("no host has the capability {capability:?}"),
            });
        }
        let names = endpoints.iter().map(|endpoint| endpoint.base.as_str());
        let mut order = repository.shared.health.order(names, Instant::now());
        if let (Some(_), Some(blob)) = (&ask.range, ask.blob) {
            // What lies before the range would have to be downloaded too.
            let now = Instant::now();
            let rangeless =
                |endpoint: &Arc<Endpoint>| repository.quirks.is_rangeless(endpoint.base.as_str(), blob, now);
            order.sort_by_key(|place| endpoints.get(*place).is_some_and(rangeless));
        }
        let attempts = Attempts::new(order, repository.shared.attempts);
        Ok(Operation {
            repository,
            ask,
            endpoints,
            attempts,
            again: false,
        })
    }

    /// The next successful answer, and the place of the endpoint that gave it. Waits as long as it has to.
    pub(super) async fn respond(&mut self) -> Result<(usize, Response), RegistryError> {
        let mut asked = FuturesUnordered::new();
        // The places that are being asked, and since when, the last one last.
        let mut busy: Vec<(usize, Instant)> = Vec::new();
        loop {
            let now = Instant::now();
            let places: Vec<usize> = busy.iter().map(|(place, _)| *place).collect();
            let next = match busy.last() {
                None => match self.attempts.next(now) {
                    None => return Err(self.give_up()),
                    next => next,
                },
                // What is written is written once.
                Some(_) if self.ask.writes() => None,
                Some((place, since)) => {
                    let patience = self.patience(*place, *since, now);
                    let next = self.attempts.next_beside(&places, now);
                    let other = next.map(|(place, wait)| (place, wait.max(patience)));
                    other.or_else(|| self.may_ask_again().then_some((*place, patience)))
                }
            };
            let wait = next.map(|(_, wait)| wait);
            tokio::select! {
                // Answers before the clock, which goes on while nobody listens.
                biased;
                Some((place, outcome)) = asked.next() => {
                    let turn = busy.iter().position(|(other, _)| *other == place).unwrap_or_default();
                    match outcome {
                        Ok(answer) => {
                            self.heard(place);
                            // Those that were asked before it, and were not as quick.
                            self.overtaken(&busy[..turn]);
                            return Ok((place, answer));
                        }
                        Err::<_, Failure>(failure) => {
                            busy.remove(turn);
                            // The other connection may bring it.
                            let is_asked = busy.iter().any(|(other, _)| *other == place);
                            if !is_asked || !failure.passing {
                                self.failed(place, failure);
                            }
                        }
                    }
                }
                () = tokio::time::sleep(wait.unwrap_or_default()), if wait.is_some() => {
                    let Some((place, _)) = next else { continue };
                    let Some(endpoint) = self.endpoints.get(place).cloned() else {
                        return Err(self.give_up());
                    };
                    let (repository, mut ask) = (Arc::clone(&self.repository), self.ask.clone());
                    let mut second = None;
                    if places.contains(&place) {
                        self.again = true;
                        second = repository.shared.health.second(endpoint.base.as_str());
                        if second.is_none() {
                            continue;
                        }
                        ask.beside = true;
                    }
                    if let Some((slow, _)) = busy.last() {
                        self.repository.retried("slow");
                        tracing::debug!(slow = %self.endpoint(*slow), now = %endpoint.name, what = %self.ask.what, "asking once more beside it");
                    }
                    asked.push(async move {
                        let outcome = repository.exchange(&endpoint, &ask).await;
                        drop(second);
                        (place, outcome)
                    });
                    busy.push((place, Instant::now()));
                }
            }
        }
    }

    /// How much longer the endpoint at `place`, asked `since`, may be silent before the next one is asked as well.
    fn patience(&self, place: usize, since: Instant, now: Instant) -> Duration {
        let address = self.address(place).unwrap_or_default();
        self.repository.shared.health.patience(&address, since, now)
    }

    /// Other hosts were quicker than those at `places`.
    fn overtaken(&self, places: &[(usize, Instant)]) {
        let now = Instant::now();
        for address in places.iter().filter_map(|(place, _)| self.address(*place)) {
            self.repository.shared.health.failed(&address, now);
        }
    }

    /// Whether a host that says nothing may be asked over another connection. The whole of a blob is asked for once: what comes of it in
    /// vain would be much, and all of it where the host has no ranges.
    fn may_ask_again(&self) -> bool {
        !self.again && self.ask.blob.is_some() && self.ask.range.is_some()
    }

    /// How long a body from the endpoint at `place` may bring nothing before it is given up for another one, if there is one that has not
    /// failed yet, or, once, for another connection. Otherwise the connection's own patience is all there is.
    pub(super) fn stall(&self, place: usize) -> Option<Duration> {
        (self.may_ask_again() || self.attempts.has_fresh_beside(place)).then_some(SLOW)
    }

    /// The body from the endpoint at `place` stalled: what is missing is asked for over another connection, whoever is asked.
    pub(super) fn stalled(&mut self, place: usize) {
        self.again |= !self.attempts.has_fresh_beside(place);
        self.ask.beside = true;
    }

    /// The connection of an answer from the endpoint at `place`, which begins to bring something.
    pub(super) fn peer(&self, place: usize) -> Option<Peer> {
        let endpoint = self.endpoints.get(place)?;
        let health = &self.repository.shared.health;
        Some(health.join(endpoint.base.as_str(), Instant::now()))
    }

    /// Something came from the endpoint at `place`.
    pub(super) fn heard(&self, place: usize) {
        if let Some(endpoint) = self.endpoints.get(place) {
            self.repository
                .shared
                .health
                .heard(endpoint.base.as_str(), Instant::now());
        }
    }

    /// The answer from `place` turned out to be good.
    pub(super) fn succeeded(&self, place: usize) {
        if let Some(endpoint) = self.endpoints.get(place) {
            self.repository
                .shared
                .health
                .answered(endpoint.base.as_str(), Instant::now());
        }
    }

    /// The endpoint at `place` failed, during the exchange or afterwards.
    pub(super) fn failed(&mut self, place: usize, failure: Failure) {
        let now = Instant::now();
        let error = &failure.error;
        tracing::debug!(%error, what = %self.ask.what, passing = failure.passing, "attempt failed");
        if let RegistryError::Busy { .. } = error {
            self.repository.refusals.fetch_add(1, Ordering::Relaxed);
        }
        if let Some(endpoint) = self.endpoints.get(place) {
            if failure.passing {
                self.repository.shared.health.failed(endpoint.base.as_str(), now);
            }
            if let Some(blob) = self.ask.blob {
                self.repository.locations.forget(endpoint.base.as_str(), blob);
            }
        }
        let cause = failure.cause;
        self.attempts.failed(place, failure, now);
        if self.attempts.next(now).is_some() {
            self.repository.retried(cause);
        }
    }

    /// `bytes` of a body arrived.
    pub(super) fn received(&self, bytes: usize) {
        self.repository.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Bytes that bring the operation forward arrived.
    pub(super) fn progressed(&mut self, bytes: usize) {
        self.attempts.progressed(bytes as u64);
    }

    /// Name of the endpoint at `place`.
    pub(super) fn endpoint(&self, place: usize) -> String {
        self.endpoints
            .get(place)
            .map_or_else(|| self.repository.host.clone(), |endpoint| endpoint.name.clone())
    }

    /// Address of the endpoint at `place`: its name in [`crate::registry::health::Health`].
    pub(super) fn address(&self, place: usize) -> Option<String> {
        self.endpoints.get(place).map(|endpoint| endpoint.base.to_string())
    }

    /// Place of the endpoint with this address.
    pub(super) fn place_of(&self, address: &str) -> Option<usize> {
        self.endpoints
            .iter()
            .position(|endpoint| endpoint.base.as_str() == address)
    }

    /// The registry itself, or what stands in for it, if all that may be asked are known to have no ranges of `blob`.
    pub(super) fn all_rangeless(&self, blob: Digest) -> Option<String> {
        let (quirks, now) = (&self.repository.quirks, Instant::now());
        let mut endpoints = self.endpoints.iter();
        let all = endpoints.all(|endpoint| quirks.is_rangeless(endpoint.base.as_str(), blob, now));
        self.endpoints
            .last()
            .filter(|_| all)
            .map(|endpoint| endpoint.name.clone())
    }

    /// Base of the endpoint at `place`.
    pub(super) fn base(&self, place: usize) -> Option<Url> {
        self.endpoints.get(place).map(|endpoint| endpoint.base.clone())
    }

    /// An error about what the endpoint at `place` sent.
    pub(super) fn protocol(&self, place: usize, problem: String) -> RegistryError {
        RegistryError::Protocol {
            host: self.endpoint(place),
            what: self.ask.what.clone(),
            problem,
        }
    }

    /// The body broke.
    pub(super) fn broken(&self, place: usize, cut: &Cut) -> Failure {
        let error = RegistryError::Unreachable {
            host: self.endpoint(place),
            what: format!("the answer broke off: {cut}"),
        };
        Failure::new(error, "cut")
    }

    fn give_up(&mut self) -> RegistryError {
        let attempts = std::mem::replace(&mut self.attempts, Attempts::new(Vec::new(), 0));
        let error = attempts
            .into_error(self.ask.blob.is_some())
            .unwrap_or_else(|| RegistryError::Unreachable {
                host: self.repository.host.clone(),
                what: "no host was left to ask".to_owned(),
            });
        if matches!(error, RegistryError::NotFound { .. }) && !self.ask.writes() {
            // Often a question rather than a fault: is there an index, is it in this repository?
            tracing::info!(%error, what = %self.ask.what, repository = %self.repository.describe(), "not found");
        } else {
            tracing::warn!(%error, what = %self.ask.what, repository = %self.repository.describe(), "giving up");
        }
        error
    }
}
