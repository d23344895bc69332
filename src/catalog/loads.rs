//! Loads under way, who wants them, and what came of them.
//!
//! A layer is loaded for *pulls*: all layers of an image at once, though containerd asks for one after the other. A pull lives while one of its
//! questions waits, and for [`LINGER`] after it, since the next question follows at once. When it has ended (a pull that was given up does so
//! within seconds), what it had begun ends with it, unless another pull wants the same: the task is dropped, and with it its connection and
//! its place.
//!
//! What failed is not begun anew by the same pull, and what was left to containerd is not either, since containerd fetches that layer itself,
//! however long that takes (up to [`LEFT_HOLDS`]). containerd asks from the lowest layer up: a question for a layer that this pull has passed already means that somebody pulls anew, and
//! that whatever failed may be tried again.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use tokio::runtime::Handle;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::loader::Refusal;
use crate::layer::Digest;

/// How long what a pull wants is kept after its last question was answered. containerd asks for the next layer within milliseconds, or a
/// second on a busy node.
const LINGER: Duration = Duration::from_secs(4);

/// How long after its last question a pull is remembered that has left something to containerd, which may have to fetch for long before it
/// asks again.
const LEFT_HOLDS: Duration = Duration::from_secs(600);

/// Which pull it is: containerd's namespace, and the digest of the manifest.
pub(super) type PullKey = (String, Digest);

/// What comes of a load.
type Outcome<T> = Result<T, Refusal>;

/// A load under way, or ended. It goes on for as long as somebody has it.
pub(super) struct Load<T> {
    number: u64,
    outcome: Shared<BoxFuture<'static, Outcome<T>>>,
    _end: DropGuard,
}

impl<T: Clone> Load<T> {
    /// What comes of it.
    pub(super) async fn wait(&self) -> Outcome<T> {
        self.outcome.clone().await
    }

    /// What comes of it, for who does not keep it going.
    pub(super) fn later(&self) -> BoxFuture<'static, Outcome<T>>
    where
        T: Send + Sync + 'static,
    {
        self.outcome.clone().boxed()
    }

    /// What came of it, if it has ended.
    pub(super) fn outcome(&self) -> Option<&Outcome<T>> {
        self.outcome.peek()
    }
}

/// All loads, by what they are of.
pub(super) struct Loads<K, T> {
    inner: Mutex<Inner<K, T>>,
    runtime: Handle,
}

struct Inner<K, T> {
    begun: u64,
    running: HashMap<K, Weak<Load<T>>>,
    pulls: HashMap<PullKey, Pull<K, T>>,
}

struct Pull<K, T> {
    /// Questions that wait.
    asking: usize,
    /// When the last one was answered.
    answered: Instant,
    /// The number of layers that were asked for already.
    reached: usize,
    loads: HashMap<K, Arc<Load<T>>>,
    /// What was left to containerd, and why.
    left: HashMap<K, Refusal>,
}

/// A question of a pull; dropped, it is answered.
pub(super) struct Asking<K: Eq + Hash + Clone + Send + 'static, T: Clone + Send + Sync + 'static> {
    loads: Arc<Loads<K, T>>,
    pull: PullKey,
}

impl<K, T> Loads<K, T>
where
    K: Eq + Hash + Clone + Send + 'static,
    T: Clone + Send + Sync + 'static,
{
    /// Nothing is loaded yet. Loads run on `runtime`.
    pub(super) fn new(runtime: Handle) -> Arc<Self> {
        let inner = Inner {
            begun: 0,
            running: HashMap::new(),
            pulls: HashMap::new(),
        };
        Arc::new(Loads {
            inner: Mutex::new(inner),
            runtime,
        })
    }

    /// A question for the layer that has `position` others below it.
    pub(super) fn ask(self: &Arc<Self>, pull: PullKey, position: usize) -> Asking<K, T> {
        let mut inner = self.lock();
        let state = inner.pulls.entry(pull.clone()).or_insert_with(|| Pull {
            asking: 0,
            answered: Instant::now(),
            reached: 0,
            loads: HashMap::new(),
            left: HashMap::new(),
        });
        if position < state.reached {
            state.loads.retain(|_, load| !matches!(load.outcome(), Some(Err(_))));
            state.left.clear();
        }
        state.reached = position + 1;
        state.asking += 1;
        drop(inner);
        Asking {
            loads: Arc::clone(self),
            pull,
        }
    }

    /// Begins a load that goes on whether anybody waits or not.
    pub(super) fn keep(self: &Arc<Self>, key: K, job: impl FnOnce() -> BoxFuture<'static, Outcome<T>>) -> Arc<Load<T>> {
        let load = self.begin(&mut self.lock(), key, job);
        let kept = Arc::clone(&load);
        self.runtime.spawn(async move {
            // What comes of it is told by the job itself.
            let _ = kept.wait().await;
        });
        load
    }

    /// Whether another pull than this one wants a load.
    pub(super) fn is_wanted_beside(&self, pull: &PullKey, load: &Load<T>) -> bool {
        let inner = self.lock();
        let mut others = inner.pulls.iter().filter(|(other, _)| *other != pull);
        others.any(|(_, other)| other.loads.values().any(|wanted| wanted.number == load.number))
    }

    /// A load under way whose key is such.
    #[cfg(test)]
    pub(super) fn find_by(&self, is_such: impl Fn(&K) -> bool) -> Option<Arc<Load<T>>> {
        let inner = self.lock();
        let mut such = inner.running.iter().filter(|(key, _)| is_such(key));
        such.find_map(|(_, load)| load.upgrade())
    }

    fn begin(
        self: &Arc<Self>,
        inner: &mut Inner<K, T>,
        key: K,
        job: impl FnOnce() -> BoxFuture<'static, Outcome<T>>,
    ) -> Arc<Load<T>> {
        if let Some(load) = inner.running.get(&key).and_then(Weak::upgrade) {
            return load;
        }
        inner.begun += 1;
        let (number, end, job) = (inner.begun, CancellationToken::new(), job());
        let (loads, task_key, ended) = (Arc::clone(self), key.clone(), end.clone());
        let task = self.runtime.spawn(async move {
            let outcome = tokio::select! {
                outcome = job => outcome,
                () = ended.cancelled() => Err(unwanted()),
            };
            loads.ended(&task_key, number);
            outcome
        });
        let outcome = async move { task.await.unwrap_or_else(|_| Err(interrupted())) };
        let load = Arc::new(Load {
            number,
            outcome: outcome.boxed().shared(),
            _end: end.drop_guard(),
        });
        inner.running.insert(key, Arc::downgrade(&load));
        load
    }

    /// The load with this number is no longer under way; whoever asks for the same begins anew, or finds what came of it.
    fn ended(&self, key: &K, number: u64) {
        let mut inner = self.lock();
        // The load itself may be gone, or another one may be in its place.
        let is_it = |load: &Weak<Load<T>>| load.upgrade().is_none_or(|load| load.number == number);
        if inner.running.get(key).is_some_and(is_it) {
            inner.running.remove(key);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner<K, T>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K, T> Asking<K, T>
where
    K: Eq + Hash + Clone + Send + 'static,
    T: Clone + Send + Sync + 'static,
{
    /// The load of `key`, begun with `job` if it is not under way. One that this pull saw fail stays failed, unless it was for containerd alone.
    ///
    /// # Errors
    /// Why this pull has left it to containerd.
    pub(super) fn load(
        &self,
        key: &K,
        job: impl FnOnce() -> BoxFuture<'static, Outcome<T>>,
    ) -> Result<Arc<Load<T>>, Refusal> {
        let mut inner = self.loads.lock();
        if let Some(pull) = inner.pulls.get(&self.pull) {
            if let Some(refusal) = pull.left.get(key) {
                return Err(refusal.clone());
            }
            // Of what came for containerd alone nothing has failed: it can be had where the blob is now.
            let is_over = |load: &Load<T>| matches!(load.outcome(), Some(Err(refusal)) if refusal.is_blob_only());
            if let Some(load) = pull.loads.get(key).filter(|load| !is_over(load)) {
                return Ok(Arc::clone(load));
            }
        }
        let load = self.loads.begin(&mut inner, key.clone(), job);
        // There as long as this question is.
        if let Some(pull) = inner.pulls.get_mut(&self.pull) {
            pull.loads.insert(key.clone(), Arc::clone(&load));
        }
        Ok(load)
    }

    /// Leaves `key` to containerd: this pull wants it no more, and does not begin it again.
    pub(super) fn leave(&self, key: &K, why: &Refusal) {
        let mut inner = self.loads.lock();
        let gone = inner.pulls.get_mut(&self.pull).and_then(|pull| {
            pull.left.insert(key.clone(), why.clone());
            pull.loads.remove(key)
        });
        drop(inner);
        drop(gone);
    }
}

impl<K, T> Drop for Asking<K, T>
where
    K: Eq + Hash + Clone + Send + 'static,
    T: Clone + Send + Sync + 'static,
{
    fn drop(&mut self) {
        if let Some(pull) = self.loads.lock().pulls.get_mut(&self.pull) {
            pull.asking -= 1;
            pull.answered = Instant::now();
        }
        let (loads, key) = (Arc::clone(&self.loads), self.pull.clone());
        self.loads.runtime.spawn(async move {
            for (rest, holds_left) in [(LINGER, true), (LEFT_HOLDS, false)] {
                tokio::time::sleep(rest).await;
                let mut inner = loads.lock();
                let Some(pull) = inner.pulls.get_mut(&key) else { return };
                if pull.asking > 0 || pull.answered.elapsed() < rest {
                    return;
                }
                let ended = std::mem::take(&mut pull.loads);
                let is_over = !holds_left || pull.left.is_empty();
                if is_over {
                    inner.pulls.remove(&key);
                }
                drop(inner);
                // Outside of the lock: ends loads.
                drop(ended);
                if is_over {
                    return;
                }
            }
        });
    }
}

fn unwanted() -> Refusal {
    Refusal {
        word: "closed",
        text: "nobody waits for it any more".to_owned(),
        retry_helps: true,
    }
}

fn interrupted() -> Refusal {
    Refusal {
        word: "closed",
        text: "loading it was interrupted".to_owned(),
        retry_helps: true,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::watch;

    use super::*;

    type Of = Loads<&'static str, u32>;

    fn pull(name: &str) -> PullKey {
        ("default".to_owned(), Digest::of(name.as_bytes()))
    }

    /// Jobs that end when they are told to, and tell when they are begun and dropped.
    struct Jobs {
        begun: Arc<AtomicUsize>,
        dropped: Arc<AtomicUsize>,
        end: watch::Sender<Option<Outcome<u32>>>,
    }

    struct Count(Arc<AtomicUsize>);

    impl Drop for Count {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    impl Jobs {
        fn new() -> Self {
            Jobs {
                begun: Arc::default(),
                dropped: Arc::default(),
                end: watch::Sender::new(None),
            }
        }

        fn job(&self) -> BoxFuture<'static, Outcome<u32>> {
            self.begun.fetch_add(1, Ordering::SeqCst);
            let (dropped, mut end) = (Count(Arc::clone(&self.dropped)), self.end.subscribe());
            async move {
                let _dropped = dropped;
                let outcome = end.wait_for(Option::is_some).await.unwrap().clone();
                outcome.unwrap()
            }
            .boxed()
        }

        fn counts(&self) -> (usize, usize) {
            (self.begun.load(Ordering::SeqCst), self.dropped.load(Ordering::SeqCst))
        }
    }

    fn failure() -> Refusal {
        Refusal::unresolved("on purpose", true)
    }

    /// Time passes, and tasks run.
    async fn pass(time: Duration) {
        tokio::time::sleep(time).await;
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn pulls_join_and_each_gets_the_outcome() {
        let (loads, jobs) = (Of::new(Handle::current()), Jobs::new());
        let (a, b) = (loads.ask(pull("a"), 0), loads.ask(pull("b"), 0));
        let first = a.load(&"layer", || jobs.job()).unwrap();
        let second = b.load(&"layer", || jobs.job()).unwrap();
        jobs.end.send_replace(Some(Ok(7)));
        assert_eq!((first.wait().await.unwrap(), second.wait().await.unwrap()), (7, 7));
        assert_eq!(jobs.counts().0, 1);
        assert!(loads.find_by(|_| true).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_pull_that_is_given_up_ends_its_loads_within_seconds() {
        let (loads, jobs) = (Of::new(Handle::current()), Jobs::new());
        let asking = loads.ask(pull("a"), 0);
        for layer in ["lower", "upper"] {
            drop(asking.load(&layer, || jobs.job()).unwrap());
        }
        pass(2 * LINGER).await;
        assert_eq!(jobs.counts(), (2, 0), "while it asks, all its layers are loaded");
        drop(asking);
        pass(LINGER / 2).await;
        assert_eq!(jobs.counts(), (2, 0), "the next question may come");
        pass(LINGER).await;
        assert_eq!(jobs.counts(), (2, 2));
        assert!(loads.lock().pulls.is_empty() && loads.lock().running.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn what_another_pull_wants_goes_on() {
        let (loads, jobs) = (Of::new(Handle::current()), Jobs::new());
        let (a, b) = (loads.ask(pull("a"), 0), loads.ask(pull("b"), 0));
        drop(a.load(&"layer", || jobs.job()).unwrap());
        let load = b.load(&"layer", || jobs.job()).unwrap();
        drop(a);
        pass(2 * LINGER).await;
        assert_eq!(jobs.counts(), (1, 0));
        jobs.end.send_replace(Some(Ok(1)));
        assert!(load.wait().await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_is_begun_anew_by_the_next_pull_alone() {
        let (loads, jobs) = (Of::new(Handle::current()), Jobs::new());
        jobs.end.send_replace(Some(Err(failure())));
        for position in 0..3 {
            let asking = loads.ask(pull("a"), position);
            let load = asking.load(&"layer", || jobs.job()).unwrap();
            assert!(load.wait().await.is_err());
        }
        assert_eq!(jobs.counts().0, 1);
        let again = loads.ask(pull("a"), 0);
        assert!(again.load(&"layer", || jobs.job()).unwrap().wait().await.is_err());
        assert_eq!(jobs.counts().0, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn what_came_for_containerd_alone_is_begun_anew_by_the_same_pull() {
        let (loads, jobs) = (Of::new(Handle::current()), Jobs::new());
        let asking = loads.ask(pull("a"), 0);
        let load = asking.load(&"layer", || jobs.job()).unwrap();
        let alone = Refusal {
            word: super::super::loader::BLOB_ONLY,
            ..failure()
        };
        jobs.end.send_replace(Some(Err(alone)));
        assert!(load.wait().await.is_err());
        jobs.end.send_replace(Some(Ok(7)));
        let again = asking.load(&"layer", || jobs.job()).unwrap();
        assert_eq!((again.wait().await.unwrap(), jobs.counts().0), (7, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_left_to_containerd_ends_and_is_not_begun_by_the_same_pull() {
        let (loads, jobs) = (Of::new(Handle::current()), Jobs::new());
        let asking = loads.ask(pull("a"), 0);
        drop(asking.load(&"layer", || jobs.job()).unwrap());
        asking.leave(&"layer", &failure());
        pass(Duration::ZERO).await;
        assert_eq!(jobs.counts(), (1, 1));
        let next = loads.ask(pull("a"), 1);
        let refusal = next.load(&"layer", || jobs.job()).err();
        assert_eq!(refusal.map(|refusal| refusal.text), Some("on purpose".to_owned()));
        let other = loads.ask(pull("b"), 0);
        assert!(other.load(&"layer", || jobs.job()).is_ok());
        assert_eq!(jobs.counts().0, 2);
    }

    /// containerd may take minutes for what it fetches itself, and for all above that, before it asks for the next layer.
    #[tokio::test(start_paused = true)]
    async fn what_is_left_is_remembered_while_containerd_may_be_fetching_it() {
        let (loads, jobs) = (Of::new(Handle::current()), Jobs::new());
        let asking = loads.ask(pull("a"), 0);
        drop(asking.load(&"above", || jobs.job()).unwrap());
        drop(asking.load(&"lazy", || jobs.job()).unwrap());
        asking.leave(&"above", &failure());
        drop(asking);
        pass(LEFT_HOLDS / 2).await;
        assert_eq!(jobs.counts(), (2, 2), "what it wanted ends all the same");
        let next = loads.ask(pull("a"), 1);
        assert!(next.load(&"above", || jobs.job()).is_err());
        drop(next);
        pass(LEFT_HOLDS + 2 * LINGER).await;
        assert!(loads.lock().pulls.is_empty());
        assert!(loads.ask(pull("a"), 1).load(&"above", || jobs.job()).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_kept_needs_nobody() {
        let (loads, jobs) = (Of::new(Handle::current()), Jobs::new());
        drop(loads.keep("layer", || jobs.job()));
        pass(10 * LINGER).await;
        assert_eq!(jobs.counts(), (1, 0));
        assert!(loads.find_by(|key| *key == "layer").is_some());
        jobs.end.send_replace(Some(Ok(1)));
        pass(Duration::ZERO).await;
        assert!(loads.find_by(|_| true).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_is_a_refusal() {
        let loads = Of::new(Handle::current());
        let asking = loads.ask(pull("a"), 0);
        let load = asking
            .load(&"layer", || async { panic!("on purpose") }.boxed())
            .unwrap();
        assert_eq!(load.wait().await.unwrap_err().word, "closed");
    }
}
