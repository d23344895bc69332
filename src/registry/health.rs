//! What is remembered of hosts: which fail, since when nothing was heard of them, and how long they are asked last.
//!
//! A host that fails is asked after the others for a time that doubles with each failure after such a time ([`Shun`]); one good answer
//! ends that. So a black-holed mirror costs a reader one short wait now and then, not one after the other. A host that is asked and says
//! nothing is asked beside another ([`Health::patience`]): sooner if nothing at all was heard of it meanwhile, later if it is only slow
//! with this answer, as one is behind a full line.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lru::LruCache;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::lock;
use super::peers::{Peer, Peers};

/// How long a host that failed once is asked last.
const SHUNNED: Duration = Duration::from_secs(20);
/// Longest time for which a host that fails again and again is asked last: it may be mended any time.
const MAX_SHUNNED: Duration = Duration::from_secs(600);
/// Silence of a host after which another one is asked as well: well above a round trip around the world with a TLS handshake and a look-up
/// in a registry's database, well below what a reader takes for a hang.
pub const SILENT: Duration = Duration::from_secs(1);
/// Time after which another host is asked as well although this one answers other requests.
pub const SLOW: Duration = Duration::from_secs(4);
/// Requests that a host may be asked a second time while the first is unanswered: enough for connections that were forgotten, one after the other;
/// too few to make it harder for a host that is slow with everything.
const SECONDS: usize = 2;
/// Hosts that are remembered; the one not heard of longest is forgotten first.
const MAX_HOSTS: NonZeroUsize = NonZeroUsize::new(1024).unwrap();

/// A time of being asked last, which grows.
#[derive(Debug, Clone, Copy, Default)]
pub struct Shun {
    failures: u32,
    until: Option<Instant>,
}

impl Shun {
    /// A failure. Those of requests that were sent before the time began do not make it longer.
    pub fn failed(&mut self, now: Instant) {
        if self.ends(now).is_none() {
            let time = SHUNNED.saturating_mul(1 << self.failures.min(16)).min(MAX_SHUNNED);
            self.failures += 1;
            self.until = Some(now + time);
        }
    }

    /// Whether it failed after such a time again.
    pub fn is_lasting(&self) -> bool {
        self.failures > 1
    }

    /// When it ends, if it has not.
    pub fn ends(&self, now: Instant) -> Option<Instant> {
        self.until.filter(|until| *until > now)
    }
}

/// What is remembered of all hosts, by the addresses of their endpoints.
pub struct Health(Mutex<LruCache<String, Host>>);

struct Host {
    shun: Shun,
    /// When anything came from there last.
    heard: Option<Instant>,
    /// Requests that may be made a second time at once.
    seconds: Arc<Semaphore>,
    /// The connections that bring something.
    peers: Arc<Peers>,
}

impl Default for Host {
    fn default() -> Self {
        Host {
            shun: Shun::default(),
            heard: None,
            seconds: Arc::new(Semaphore::new(SECONDS)),
            peers: Arc::new(Peers::new(Instant::now())),
        }
    }
}

impl Default for Health {
    fn default() -> Self {
        Health(Mutex::new(LruCache::new(MAX_HOSTS)))
    }
}

impl Health {
    /// Places `0..hosts.len()`: those of failing hosts last, of these first the one whose time ends first.
    pub fn order<'a>(&self, hosts: impl Iterator<Item = &'a str>, now: Instant) -> Vec<usize> {
        let known = lock(&self.0);
        let mut order: Vec<(Option<Instant>, usize)> = hosts
            .enumerate()
            .map(|(place, host)| (known.peek(host).and_then(|host| host.shun.ends(now)), place))
            .collect();
        order.sort();
        order.into_iter().map(|(_, place)| place).collect()
    }

    /// `host` failed in a way that may pass, or another one was quicker.
    pub fn failed(&self, host: &str, now: Instant) {
        self.of(host, |host| host.shun.failed(now));
    }

    /// `host` delivered what was asked for.
    pub fn answered(&self, host: &str, now: Instant) {
        self.of(host, |host| {
            host.shun = Shun::default();
            host.heard = Some(now);
        });
    }

    /// Something came from `host`.
    pub fn heard(&self, host: &str, now: Instant) {
        self.of(host, |host| host.heard = Some(now));
    }

    /// How much longer an answer from `host`, asked `since`, is waited for before another host is asked as well.
    pub fn patience(&self, host: &str, since: Instant, now: Instant) -> Duration {
        let heard = lock(&self.0).peek(host).and_then(|host| host.heard);
        let silent = heard.map_or(since, |heard| heard.max(since)) + SILENT;
        silent.min(since + SLOW).saturating_duration_since(now)
    }

    /// Lets a request be made a second time, over another connection, while this is held; `None`: enough are at this host.
    pub fn second(&self, host: &str) -> Option<OwnedSemaphorePermit> {
        let mut seconds = None;
        self.of(host, |host| seconds = Some(Arc::clone(&host.seconds)));
        seconds?.try_acquire_owned().ok()
    }

    /// A connection to `host` begins to bring something.
    pub fn join(&self, host: &str, now: Instant) -> Peer {
        let mut known = lock(&self.0);
        known.get_or_insert_mut_ref(host, Host::default).peers.join(now)
    }

    /// Hosts that failed again and again, are asked last now, and how much longer.
    pub fn shunned(&self, now: Instant) -> Vec<(String, Duration)> {
        let known = lock(&self.0);
        let ends = |host: &Host| Some(host.shun.ends(now)?.saturating_duration_since(now));
        let mut shunned: Vec<_> = known
            .iter()
            .filter(|(_, host)| host.shun.is_lasting())
            .filter_map(|(name, host)| Some((name.clone(), ends(host)?)))
            .collect();
        shunned.sort();
        shunned
    }

    fn of(&self, host: &str, change: impl FnOnce(&mut Host)) {
        let mut known = lock(&self.0);
        match known.get_mut(host) {
            Some(host) => change(host),
            None => change(known.get_or_insert_mut(host.to_owned(), Host::default)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_host_is_asked_a_second_time_by_few() {
        let health = Health::default();
        let held: Vec<_> = (0..SECONDS).filter_map(|_| health.second("a")).collect();
        assert_eq!(held.len(), SECONDS);
        assert!(health.second("a").is_none() && health.second("b").is_some());
        // An answer ends none of them.
        health.answered("a", Instant::now());
        assert!(health.second("a").is_none());
        drop(held);
        assert!(health.second("a").is_some());
    }

    #[test]
    fn failing_hosts_come_last_for_a_while() {
        let health = Health::default();
        let now = Instant::now();
        let order = |now| health.order(["a", "b", "c"].into_iter(), now);
        health.failed("a", now);
        assert_eq!(order(now), [1, 2, 0]);
        health.failed("b", now + SECOND);
        assert_eq!(order(now + SECOND), [2, 0, 1]);
        assert_eq!(order(now + SHUNNED), [0, 2, 1]);
        health.answered("b", now);
        assert_eq!(order(now + SHUNNED), [0, 1, 2]);
    }

    #[test]
    fn a_host_that_goes_on_failing_is_left_alone_for_longer_and_longer() {
        let health = Health::default();
        let mut now = Instant::now();
        let mut times = Vec::new();
        for _ in 0..8 {
            // Many requests at once are one failure.
            for _ in 0..16 {
                health.failed("a", now);
            }
            let time = lock(&health.0).peek("a").unwrap().shun.ends(now).unwrap() - now;
            // A first failure may be an accident.
            let told = health.shunned(now);
            assert_eq!(
                told,
                Vec::from_iter((!times.is_empty()).then_some(("a".to_owned(), time)))
            );
            times.push(time.as_secs());
            now += time;
        }
        assert_eq!(times, [20, 40, 80, 160, 320, 600, 600, 600]);
        health.answered("a", now);
        assert!(health.shunned(now).is_empty());
        health.failed("a", now);
        assert_eq!(health.order(["a", "b"].into_iter(), now), [1, 0]);
        assert_eq!(health.order(["a", "b"].into_iter(), now + SHUNNED), [0, 1]);
    }

    #[test]
    fn silence_is_borne_for_less_time_than_slowness() {
        let health = Health::default();
        let asked = Instant::now();
        assert_eq!(health.patience("a", asked, asked), SILENT);
        health.heard("a", asked + SECOND / 2);
        assert_eq!(health.patience("a", asked, asked), SILENT + SECOND / 2);
        health.heard("a", asked + SLOW);
        assert_eq!(health.patience("a", asked, asked), SLOW);
        assert_eq!(health.patience("a", asked, asked + SLOW * 2), Duration::ZERO);
    }
}
