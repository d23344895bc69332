//! The [`Policy`] for tokio: wishes wait as futures, and places are given back by dropping them. Whoever holds a place says what comes over
//! it ([`Place::begun`], [`Place::traffic`]); how many there are at a host follows that.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, OnceLock, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::depths::{Depths, Traffic};
use super::policy::{Class, Id, Limits, Policy, Wish};
use crate::metrics::Metrics;
use crate::registry::Blob;
use crate::sync::primitives::{Mutex, MutexGuard};

/// Grants places to wishes. There is one per daemon.
pub struct Scheduler {
    state: Mutex<State>,
    begin: Instant,
    most: usize,
}

struct State {
    policy: Policy,
    depths: Depths,
    begin: Instant,
    metrics: Option<Arc<Metrics>>,
    /// Who waits to be told that his wish is granted.
    asking: HashMap<Id, oneshot::Sender<()>>,
    /// Wishes that ask once more for what a host that is away has not delivered, and has not yet.
    vain: HashSet<Id>,
    /// When there was last a wish for more than background work, those in vain left out.
    stirred: Instant,
}

/// A wish that waits; dropped, it is withdrawn.
#[derive(Debug)]
pub struct Ticket {
    place: Place,
    granted: oneshot::Receiver<()>,
}

/// The right to talk to a source; dropped, it goes to the next.
pub struct Place {
    scheduler: Arc<Scheduler>,
    id: Id,
    host: Arc<str>,
    traffic: Arc<Traffic>,
    /// When the first byte came.
    begun: OnceLock<Instant>,
}

/// A host that something is asked of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostLoad {
    /// Its name.
    pub host: String,
    /// Ranged requests that it is asked at once now, at most.
    pub limit: usize,
    /// Those that are under way.
    pub running: usize,
}

/// Ranks a wish anew, from wherever; of one that has ended, nothing happens.
#[derive(Debug, Clone)]
pub struct Remote {
    scheduler: Weak<Scheduler>,
    id: Id,
}

impl Scheduler {
    /// A scheduler within these bounds.
    pub fn new(limits: Limits) -> Arc<Self> {
        Scheduler::make(limits, None)
    }

    /// The same, which tells how many requests hosts may be asked.
    pub fn measured(limits: Limits, metrics: Arc<Metrics>) -> Arc<Self> {
        Scheduler::make(limits, Some(metrics))
    }

    fn make(limits: Limits, metrics: Option<Arc<Metrics>>) -> Arc<Self> {
        let begin = Instant::now();
        Arc::new(Scheduler {
            state: Mutex::new(State {
                policy: Policy::new(limits),
                depths: Depths::new(&limits),
                begin,
                metrics,
                asking: HashMap::new(),
                vain: HashSet::new(),
                stirred: begin,
            }),
            begin,
            most: limits.most(),
        })
    }

    /// Ranged requests that any host is asked at once, at most.
    pub fn most(&self) -> usize {
        self.most
    }

    /// The hosts that something is asked of now.
    pub fn hosts(&self) -> Vec<HostLoad> {
        let state = self.lock();
        let hosts = state.policy.hosts().map(|(host, limit, running)| HostLoad {
            host: host.to_owned(),
            limit,
            running,
        });
        hosts.collect()
    }

    /// The deadline of a wish that should be granted within `patience`.
    pub fn deadline(&self, patience: Duration) -> Duration {
        self.begin.elapsed().saturating_add(patience)
    }

    /// Puts a wish into the queue.
    pub fn ask(self: &Arc<Self>, wish: Wish) -> Ticket {
        self.ask_as(wish, false)
    }

    fn ask_as(self: &Arc<Self>, wish: Wish, in_vain: bool) -> Ticket {
        let (sender, granted) = oneshot::channel();
        let host = Arc::clone(&wish.owner.host);
        let mut state = self.lock();
        let now = state.now();
        let traffic = state.depths.traffic(now, &host);
        let id = state.policy.ask(wish);
        if in_vain {
            state.vain.insert(id);
        }
        state.asking.insert(id, sender);
        state.stir();
        state.settle(&host);
        drop(state);
        Ticket {
            place: Place {
                scheduler: Arc::clone(self),
                id,
                host,
                traffic,
                begun: OnceLock::new(),
            },
            granted,
        }
    }

    /// Counts what comes from a host.
    pub fn traffic(&self, host: &Arc<str>) -> Arc<Traffic> {
        let mut state = self.lock();
        let now = state.now();
        state.depths.traffic(now, host)
    }

    /// Waits for a place. Dropping the future withdraws the wish.
    pub async fn enter(self: &Arc<Self>, wish: Wish) -> Place {
        self.ask(wish).place().await
    }

    /// The same for what is asked once more of a host that is away. Who waits for that wants nothing that could be had, and disturbs nobody: it is
    /// [calm](Scheduler::calm) for all that, until the host [delivers](Remote::delivers).
    pub async fn enter_in_vain(self: &Arc<Self>, wish: Wish) -> Place {
        self.ask_as(wish, true).place().await
    }

    /// Wishes that wait, and wishes that are granted.
    pub fn counts(&self) -> (usize, usize) {
        self.lock().policy.counts()
    }

    /// How long there has been no wish for anything but background work, neither waiting nor running, that could be had.
    pub fn calm(&self) -> Duration {
        let mut state = self.lock();
        state.stir();
        state.stirred.elapsed()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Notes the time if there is a wish for more than background work.
    fn stir(&mut self) {
        if self.policy.is_stirred(&self.vain) {
            self.stirred = Instant::now();
        }
    }

    /// Time since the scheduler began.
    fn now(&self) -> Duration {
        self.begin.elapsed()
    }

    /// Grants what may be granted, after something has happened at a host.
    fn settle(&mut self, host: &Arc<str>) {
        let before = self.depths.depth(host);
        for id in self.depths.settle(self.now(), host, &mut self.policy) {
            // Who has gone gives it back when his ticket is dropped, which comes right after.
            if let Some(sender) = self.asking.remove(&id) {
                let _ = sender.send(());
            }
        }
        let after = self.depths.depth(host);
        if after != before {
            self.tell(if after > before { "more" } else { "fewer" });
        }
    }

    /// Another number of requests is asked of a host.
    fn tell(&self, change: &str) {
        let (Some(metrics), Some((least, most))) = (&self.metrics, self.depths.range()) else {
            return;
        };
        metrics.request_limit_changes_total.with_label_values(&[change]).inc();
        for (of, limit) in [("lowest", least), ("highest", most)] {
            metrics.request_limit.with_label_values(&[of]).set(limit as i64);
        }
    }
}

impl Ticket {
    /// Waits for the place.
    pub async fn place(self) -> Place {
        // The sender is dropped only after sending, or with the ticket.
        let _ = self.granted.await;
        self.place
    }

    /// What ranks the wish anew, or the place once it is granted.
    pub fn remote(&self) -> Remote {
        self.place.remote()
    }
}

impl Place {
    /// What ranks the place anew.
    pub fn remote(&self) -> Remote {
        Remote {
            scheduler: Arc::downgrade(&self.scheduler),
            id: self.id,
        }
    }

    /// Whether somebody waits for a place like this one at the same host, for whom it is more urgent than reading ahead.
    pub fn contended(&self) -> bool {
        self.scheduler.lock().policy.is_contended(self.id)
    }

    /// Memory that comes with the place, in bytes.
    pub fn bytes(&self) -> u64 {
        self.scheduler.lock().policy.bytes(self.id)
    }

    /// Gives back all but `bytes` of the memory; how much it is then.
    pub fn shrink(&self, bytes: u64) -> u64 {
        let mut state = self.scheduler.lock();
        let left = state.policy.shrink(self.id, bytes);
        state.settle(&self.host);
        left
    }

    /// Counts what comes from the host.
    pub fn traffic(&self) -> &Arc<Traffic> {
        &self.traffic
    }

    /// The first byte of the answer has come, so long after it was asked for.
    pub fn begun(&self, took: Duration) {
        if self.begun.set(Instant::now()).is_ok() {
            let mut state = self.scheduler.lock();
            let now = state.now();
            state.depths.first(now, &self.host, took);
            state.settle(&self.host);
        }
    }

    /// Learns whether the host says that it is asked too much: to be called before the blob is read, and as that goes on.
    pub fn heed(&self, blob: &dyn Blob) {
        if let Some(count) = blob.refusals(&self.host) {
            self.refused(count);
        }
    }

    /// The host has said so often that it is asked too much, since any beginning.
    fn refused(&self, count: u64) {
        let mut state = self.scheduler.lock();
        let now = state.now();
        if state.depths.refusals(now, &self.host, count) {
            state.tell("refused");
            state.settle(&self.host);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.scheduler.lock();
        state.asking.remove(&self.id);
        state.stir();
        state.vain.remove(&self.id);
        state.policy.end(self.id);
        if let Some(begun) = self.begun.get() {
            let now = state.now();
            state.depths.ended(now, &self.host, begun.elapsed());
        }
        state.settle(&self.host);
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Place").field("id", &self.id).finish_non_exhaustive()
    }
}

impl fmt::Debug for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scheduler").field("counts", &self.counts()).finish()
    }
}

impl Remote {
    /// What was asked for once more comes after all.
    pub fn delivers(&self) {
        if let Some(scheduler) = self.scheduler.upgrade() {
            let mut state = scheduler.lock();
            if state.vain.remove(&self.id) {
                state.stir();
            }
        }
    }

    /// Gives the wish another class.
    pub fn rank(&self, class: Class) {
        if let Some(scheduler) = self.scheduler.upgrade() {
            let mut state = scheduler.lock();
            state.stir();
            state.policy.rank(self.id, class);
            state.stir();
            if let Some(host) = state.policy.host_of(self.id) {
                state.settle(&host);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt, StreamExt};

    use super::*;
    use crate::fetch::schedule::Kind;
    use crate::registry::Origin;

    fn scheduler(requests: usize) -> Arc<Scheduler> {
        Scheduler::new(Limits {
            requests,
            streams: 1,
            memory: 1 << 30,
        })
    }

    fn wish(class: Class) -> Wish {
        Wish {
            owner: Origin::new("host", "image"),
            class,
            kind: Kind::Request,
            bytes: 0,
            deadline: Duration::ZERO,
        }
    }

    #[tokio::test]
    async fn demand_comes_first_and_who_leaves_takes_no_place() {
        let scheduler = scheduler(1);
        let held = scheduler.enter(wish(Class::Demand)).await;
        assert!(!held.contended());
        let mut background = scheduler.enter(wish(Class::Background)).boxed();
        assert!(futures::poll!(&mut background).is_pending());
        assert!(!held.contended(), "background can wait for read-ahead");
        let mut gone = scheduler.enter(wish(Class::Demand)).boxed();
        let mut demand = scheduler.enter(wish(Class::Demand)).boxed();
        assert!(futures::poll!(&mut gone).is_pending() && futures::poll!(&mut demand).is_pending());
        assert!(held.contended());
        drop(gone);
        drop(held);
        let place = demand.await;
        assert!(futures::poll!(&mut background).is_pending(), "one at a time");
        drop(place);
        drop(background.await);
        assert_eq!(scheduler.counts(), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_calm_while_nobody_wants_more_than_background_work() {
        const SECOND: Duration = Duration::from_secs(1);
        let scheduler = scheduler(4);
        tokio::time::advance(SECOND).await;
        let background = scheduler.enter(wish(Class::Background)).await;
        assert_eq!(scheduler.calm(), SECOND, "background work does not count");
        let ahead = scheduler.enter(wish(Class::ReadAhead)).await;
        tokio::time::advance(SECOND).await;
        assert_eq!(scheduler.calm(), Duration::ZERO, "as long as it is under way");
        tokio::time::advance(SECOND).await;
        drop(ahead);
        tokio::time::advance(SECOND).await;
        assert_eq!(scheduler.calm(), SECOND, "from its end on");
        // Somebody begins to wait for what was fetched in the background, and gets it.
        background.remote().rank(Class::Demand);
        tokio::time::advance(SECOND).await;
        assert_eq!(scheduler.calm(), Duration::ZERO);
        background.remote().rank(Class::Background);
        tokio::time::advance(SECOND).await;
        assert_eq!(scheduler.calm(), SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_brings_more_when_it_is_asked_for_more_is_asked_for_more() {
        let scheduler = scheduler(64);
        let most = std::cell::Cell::new(0);
        let mut clients = futures::stream::FuturesUnordered::new();
        for _ in 0..1000 {
            clients.push(async {
                let place = scheduler.enter(wish(Class::Demand)).await;
                most.set(most.get().max(scheduler.counts().1));
                let asked = Instant::now();
                tokio::time::sleep(Duration::from_millis(100)).await;
                place.begun(asked.elapsed());
                place.traffic().arrived(50_000);
            });
        }
        while clients.next().await.is_some() {}
        // All but what a repository leaves to others.
        assert_eq!(most.get(), 48);
        assert!(scheduler.hosts().is_empty(), "nothing is asked of it any more");
        let place = scheduler.enter(wish(Class::Demand)).await;
        let expected = HostLoad {
            host: "host".to_owned(),
            limit: 64,
            running: 1,
        };
        assert_eq!(scheduler.hosts(), [expected], "it is remembered");
        // Refusals that there were before are no news.
        place.refused(2);
        assert_eq!(scheduler.hosts()[0].limit, 64);
        place.refused(3);
        assert_eq!(scheduler.hosts()[0].limit, 32);
        // Who had looked before tells it later.
        tokio::time::sleep(Duration::from_secs(2)).await;
        place.refused(2);
        place.refused(3);
        assert_eq!(scheduler.hosts()[0].limit, 32);
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_a_host_that_is_away_disturbs_nobody_until_it_delivers() {
        const SECOND: Duration = Duration::from_secs(1);
        let scheduler = scheduler(4);
        tokio::time::advance(SECOND).await;
        let vain = scheduler.enter_in_vain(wish(Class::Demand)).await;
        tokio::time::advance(SECOND).await;
        assert_eq!(scheduler.calm(), 2 * SECOND);
        vain.remote().delivers();
        tokio::time::advance(SECOND).await;
        assert_eq!(scheduler.calm(), Duration::ZERO);
        drop(vain);
        tokio::time::advance(SECOND).await;
        let again = scheduler.enter_in_vain(wish(Class::Demand)).await;
        drop(again);
        assert_eq!(scheduler.calm(), SECOND);
        let demand = scheduler.enter(wish(Class::Demand)).await;
        assert_eq!(scheduler.calm(), Duration::ZERO, "others count");
        drop(demand);
    }

    #[tokio::test]
    async fn a_wish_that_waits_can_be_promoted_and_one_granted_to_nobody_is_given_back() {
        let scheduler = scheduler(1);
        let held = scheduler.enter(wish(Class::Demand)).await;
        let first = scheduler.ask(wish(Class::Prefetch));
        let second = scheduler.ask(wish(Class::Background));
        let remote = second.remote();
        remote.rank(Class::Demand);
        let (mut first, second) = (first.place().boxed(), second.place().boxed());
        drop(held);
        assert!(futures::poll!(&mut first).is_pending());
        // Granted, and never looked at.
        assert_eq!(scheduler.counts(), (1, 1));
        drop(second);
        drop(first.await);
        remote.rank(Class::Demand);
        assert_eq!(scheduler.counts(), (0, 0));
    }
}
