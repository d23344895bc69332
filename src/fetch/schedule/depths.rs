//! The [`Depth`] of each host, and how it and the [`Policy`] go together. Pure, as both are: time is a number.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::depth::{Depth, Seen};
use super::policy::{Id, Limits, Policy};
use crate::sync::primitives::{AtomicU64, Ordering};

/// How long what was found out about a host is kept when nothing is asked of it: another start of the image, or of its neighbour.
const REMEMBERED: Duration = Duration::from_secs(300);
/// Hosts that something is remembered of; those that nothing is asked of are forgotten first.
const MAX_HOSTS: usize = 256;

/// Counts the bytes that come from a host, over whatever connection.
#[derive(Debug, Default)]
pub struct Traffic(AtomicU64);

impl Traffic {
    /// Bytes have come.
    pub fn arrived(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }

    /// How many that were.
    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug)]
struct Host {
    depth: Depth,
    traffic: Arc<Traffic>,
    /// How often it had said that it is asked too much, when that was looked at last.
    refusals: Option<u64>,
    /// When something was asked of it, or came, last.
    used: Duration,
}

/// The hosts that something is known of.
#[derive(Debug)]
pub struct Depths {
    start: usize,
    most: usize,
    hosts: HashMap<Arc<str>, Host>,
    /// Whether they stay what they are at the beginning, to compare with.
    #[cfg(test)]
    pub fixed: bool,
}

impl Depths {
    /// Nothing is known of any host.
    pub fn new(limits: &Limits) -> Self {
        Depths {
            start: limits.start(),
            most: limits.most(),
            hosts: HashMap::new(),
            #[cfg(test)]
            fixed: false,
        }
    }

    /// What counts the bytes of a host.
    pub fn traffic(&mut self, now: Duration, host: &Arc<str>) -> Arc<Traffic> {
        Arc::clone(&self.host(now, host).traffic)
    }

    /// The first byte of an answer came, so long after it was asked for.
    pub fn first(&mut self, now: Duration, host: &Arc<str>, took: Duration) {
        self.host(now, host).depth.first(now, took);
    }

    /// A request has ended, so long after its first byte.
    pub fn ended(&mut self, now: Duration, host: &Arc<str>, body: Duration) {
        self.host(now, host).depth.ended(body);
    }

    /// A host has said so often that it is asked too much, from any beginning. Whether that is news.
    pub fn refusals(&mut self, now: Duration, host: &Arc<str>, count: u64) -> bool {
        let known = self.host(now, host);
        // Who has looked earlier may be heard later.
        let before = known
            .refusals
            .replace(known.refusals.map_or(count, |before| before.max(count)));
        let news = before.is_some_and(|before| count > before);
        if news {
            known.depth.refused(now);
        }
        news
    }

    /// Grants what may be granted, after something has happened at a host.
    pub fn settle(&mut self, now: Duration, host: &Arc<str>, policy: &mut Policy) -> Vec<Id> {
        let mut granted = Vec::new();
        // What it was known to bear when it was idle, then what it bears.
        policy.allow(host, self.depth(host));
        loop {
            granted.extend(std::iter::from_fn(|| policy.grant()));
            let load = policy.load(host);
            let known = self.host(now, host);
            let seen = Seen {
                now,
                bytes: known.traffic.bytes(),
                running: load.running,
                waits: load.waits,
            };
            let before = known.depth.get();
            known.depth.see(&seen);
            let after = self.depth(host);
            if after == before || !policy.allow(host, after) {
                return granted;
            }
            tracing::debug!(%host, before, after, running = load.running, "requests at once");
        }
    }

    /// How many requests of a host may run.
    pub fn depth(&self, host: &str) -> usize {
        #[cfg(test)]
        if self.fixed {
            return self.start;
        }
        self.hosts.get(host).map_or(self.start, |host| host.depth.get())
    }

    /// The fewest and the most that any of the hosts may have.
    pub fn range(&self) -> Option<(usize, usize)> {
        let depths = || self.hosts.values().map(|host| host.depth.get());
        Some((depths().min()?, depths().max()?))
    }

    fn host(&mut self, now: Duration, host: &Arc<str>) -> &mut Host {
        if !self.hosts.contains_key(host) {
            self.forget(now);
        }
        let (start, most) = (self.start, self.most);
        let known = self.hosts.entry(Arc::clone(host)).or_insert_with(|| Host {
            depth: Depth::new(start, most),
            traffic: Arc::default(),
            refusals: None,
            used: now,
        });
        known.used = now;
        known
    }

    fn forget(&mut self, now: Duration) {
        let in_use = |host: &Host| Arc::strong_count(&host.traffic) > 1;
        self.hosts
            .retain(|_, host| in_use(host) || now.saturating_sub(host.used) <= REMEMBERED);
        if self.hosts.len() >= MAX_HOSTS {
            self.hosts.retain(|_, host| in_use(host));
        }
    }
}
