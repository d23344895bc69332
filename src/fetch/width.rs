//! How many connections streams use at a host: as many as bring something.
//!
//! One connection fills most links. Where each is held back (stores and CDNs do that, and so does a long way with a small window), several
//! bring several times as much; where the link itself is full, more of them only take from others. Which it is shows when it is tried: a
//! [`Width`] measures what all streams of a host get together, lets them use twice the connections, and measures again. What grew by at least
//! [`WORTH`] of what it would have grown by if each connection brought the same is kept, and tried further at once; if it grew by less, half as many
//! more are tried; else it is as before, and the next trial waits, longer each time. Now and then it tries the other way round, by the same measure: half of the connections are enough
//! if they bring more than that.
//!
//! It is counted over all streams of a host, so that one that takes from the others proves nothing. [`Width`] has no clock and does no I/O.
//! Every stream has a connection of its own, which is no matter of this file; what is counted here are those beside it ([`Extra`]).

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::sync::primitives::{AtomicU64, Mutex, MutexGuard, Ordering};

/// Part of its proportional gain that a wider (or narrower) choice must have to be kept. Ranges have gaps between them, a round trip each, so
/// that even connections that are held back bring less than each as much; and of a link on which somebody else has one connection,
/// two would take a third more than one, which is not to be worth it.
const WORTH: f64 = 0.4;
/// The same of a trial of half of the connections that were too many, which has less to prove by, and the least that all of them must have brought
/// for it: where each is held back and what reads them is not fast enough for twice as many, half of those are.
const WORTH_HALFWAY: f64 = 0.5;
const SOME_GAIN: f64 = 1.1;
/// How long connections take to be made and to find their pace, before anything is measured.
const SETTLE: Duration = Duration::from_millis(150);
/// How long it is waited for that all that are allowed are in use, at most.
const LATEST: Duration = Duration::from_millis(500);
/// How long is measured, at least.
const MEASURE: Duration = Duration::from_millis(250);
/// Bytes that a measure consists of: fewer say little.
const ENOUGH: u64 = 256 << 10;
/// How long is measured at most, though fewer bytes have come.
const LONGEST: Duration = Duration::from_secs(3);
/// First wait after a trial that did not help; doubles each time.
const FIRST_WAIT: Duration = Duration::from_secs(2);
/// The longest of these.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// How long a stream's need for more counts after it was seen last.
const HUNGER: Duration = Duration::from_millis(200);
/// How long what was found out about a host is kept when nothing is streamed from it.
const REMEMBERED: Duration = Duration::from_secs(60);
/// Hosts that something is remembered of; those that nothing is streamed from are forgotten first.
const MAX_HOSTS: usize = 256;

/// What is seen at one moment.
#[derive(Debug, Clone, Copy)]
struct Seen {
    /// Time, from any beginning.
    now: Duration,
    /// Bytes that all streams of the host have brought, from any beginning.
    bytes: u64,
    /// Streams that run: the connections of those that pause bring nothing.
    streams: usize,
    /// Connections beside those of the streams that are in use.
    used: usize,
    /// Whether some stream waits for its source, and for nothing else.
    hungry: bool,
}

/// What so many connections bring.
#[derive(Debug, Clone, Copy)]
struct Sample {
    extra: usize,
    connections: usize,
    /// Bytes per second.
    rate: f64,
}

/// How many connections are allowed beside one for each stream.
#[derive(Debug)]
struct Width {
    most: usize,
    extra: usize,
    streams: usize,
    /// What was before the trial that is under way.
    before: Option<Sample>,
    /// When the next measure may begin; `None` while one is under way.
    settles: Option<Duration>,
    /// When the measure began, and the bytes there were.
    mark: (Duration, u64),
    /// Most connections in use since.
    peak: usize,
    not_before: Duration,
    wait: Duration,
    /// Whether fewer are tried next.
    fewer: bool,
    /// Whether all that are allowed were in use since, and until when that is waited for.
    full: bool,
    latest: Duration,
    /// Whether the trial under way is of half of those that were too many.
    halfway: bool,
}

impl Width {
    fn new(most: usize) -> Self {
        Width {
            most,
            extra: 0,
            streams: 0,
            before: None,
            settles: Some(Duration::ZERO),
            mark: (Duration::ZERO, 0),
            peak: 0,
            not_before: Duration::ZERO,
            wait: FIRST_WAIT,
            fewer: false,
            full: false,
            latest: Duration::ZERO,
            halfway: false,
        }
    }

    /// Takes note of what is seen, and decides.
    fn see(&mut self, seen: &Seen) {
        if seen.streams != self.streams {
            // What is measured now says nothing about before.
            self.streams = seen.streams;
            if let Some(before) = self.before.take() {
                self.extra = before.extra;
            }
            self.halfway = false;
            return self.begin(seen);
        }
        if let Some(settled) = self.settles {
            if seen.used < self.extra && !self.full && seen.now < self.latest {
                // Who is to use them has to get memory first, which ranges of before have.
                self.settles = Some(seen.now + SETTLE);
                return;
            }
            self.full = true;
            if seen.now >= settled {
                self.settles = None;
                self.mark = (seen.now, seen.bytes);
                self.peak = seen.used;
            }
            return;
        }
        let (since, bytes) = self.mark;
        self.peak = self.peak.max(seen.used);
        let (time, got) = (seen.now.saturating_sub(since), seen.bytes.saturating_sub(bytes));
        if time < MEASURE || (got < ENOUGH && time < LONGEST) {
            return;
        }
        let sample = Sample {
            extra: self.extra,
            connections: seen.streams + self.peak,
            rate: got as f64 / time.as_secs_f64(),
        };
        match self.before.take() {
            Some(before) => self.judge(before, sample, seen),
            None => self.try_another(sample, seen),
        }
        self.begin(seen);
    }

    /// Measures anew, in a while.
    fn begin(&mut self, seen: &Seen) {
        self.settles = Some(seen.now + SETTLE);
        self.latest = seen.now + LATEST;
        self.full = false;
    }

    fn judge(&mut self, before: Sample, after: Sample, seen: &Seen) {
        let wider = self.extra > before.extra;
        let ratio = after.connections as f64 / before.connections.max(1) as f64;
        let gain = after.rate / before.rate.max(1.0);
        let worth = if self.halfway { WORTH_HALFWAY } else { WORTH };
        let helps = match wider {
            true => after.connections > before.connections,
            false => after.connections < before.connections,
        } && gain >= 1.0 + worth * (ratio - 1.0);
        let halfway = std::mem::take(&mut self.halfway);
        if helps {
            // Those that could not be had are not allowed for.
            self.extra = self.extra.min(after.connections.saturating_sub(seen.streams));
            self.wait = FIRST_WAIT;
        } else if wider && !halfway && gain >= SOME_GAIN && self.extra - before.extra >= 2 {
            // Not all of them bring something, but some do.
            self.extra = before.extra + (self.extra - before.extra) / 2;
            self.halfway = true;
            self.before = Some(before);
            return;
        } else {
            self.extra = before.extra;
        }
        self.not_before = match (helps, wider) {
            (true, true) => seen.now,
            (true, false) => seen.now + self.wait,
            (false, _) => {
                let wait = self.wait;
                self.wait = (wait * 2).min(LONGEST_WAIT);
                seen.now + wait
            }
        };
        // On in the direction that helped, or the other one.
        self.fewer = wider != helps;
        if helps && wider && !halfway {
            // What was measured of this choice is what the next one is compared with.
            self.try_another(
                Sample {
                    extra: self.extra,
                    ..after
                },
                seen,
            );
        }
    }

    fn try_another(&mut self, sample: Sample, seen: &Seen) {
        if !seen.hungry || seen.now < self.not_before || seen.streams == 0 {
            return;
        }
        if self.fewer && self.extra > 0 {
            self.before = Some(sample);
            self.extra /= 2;
        } else if self.extra < self.most && self.peak >= self.extra {
            self.before = Some(sample);
            self.extra = (self.extra + sample.connections).min(self.most);
        }
        self.fewer = false;
    }

    /// Whether more may come of it yet, for a stream that waits for its source.
    fn may_grow(&self, now: Duration) -> bool {
        let tries = self.before.is_some_and(|before| before.extra < self.extra);
        let next = self.extra < self.most && !self.fewer && now >= self.not_before;
        self.most > 0 && (tries || next)
    }
}

/// The hosts that something is streamed from.
pub(super) struct Links {
    most: usize,
    begin: Instant,
    /// A fixed number of connections instead of what helps, for tests.
    fixed: Option<usize>,
    links: Mutex<HashMap<Arc<str>, Arc<Link>>>,
}

/// One host.
pub(super) struct Link {
    begin: Instant,
    bytes: AtomicU64,
    state: Mutex<State>,
}

struct State {
    width: Width,
    fixed: Option<usize>,
    used: usize,
    joined: usize,
    /// Those of them that do not pause.
    running: usize,
    hungry: Option<Instant>,
    left: Instant,
}

/// A stream at its host.
pub(super) struct Stream {
    link: Arc<Link>,
    runs: bool,
}

/// The right to a connection beside that of the stream; dropped, somebody else has it.
pub(super) struct Extra(Arc<Link>);

impl Links {
    /// Of one host, streams use at most `most` connections beside one for each.
    pub(super) fn new(most: usize) -> Self {
        Links {
            most,
            begin: Instant::now(),
            fixed: None,
            links: Mutex::default(),
        }
    }

    /// Always so many beside one for each.
    #[cfg(test)]
    pub(super) fn fixed(extra: usize) -> Self {
        Links {
            fixed: Some(extra),
            ..Links::new(extra)
        }
    }

    /// A stream from `host` begins.
    pub(super) fn join(&self, host: &Arc<str>) -> Stream {
        let now = Instant::now();
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        let old = |link: &Link| {
            let state = link.lock();
            state.joined == 0 && now.saturating_duration_since(state.left) > REMEMBERED
        };
        links.retain(|_, link| !old(link));
        if links.len() >= MAX_HOSTS {
            links.retain(|_, link| link.lock().joined > 0);
        }
        let link = links.entry(Arc::clone(host)).or_insert_with(|| {
            Arc::new(Link {
                begin: self.begin,
                bytes: AtomicU64::new(0),
                state: Mutex::new(State {
                    width: Width::new(self.most),
                    fixed: self.fixed,
                    used: 0,
                    joined: 0,
                    running: 0,
                    hungry: None,
                    left: now,
                }),
            })
        });
        let link = Arc::clone(link);
        drop(links);
        let mut state = link.lock();
        state.joined += 1;
        state.running += 1;
        drop(state);
        Stream { link, runs: true }
    }
}

impl Link {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of a stream have come.
    pub(super) fn arrived(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl Stream {
    /// What counts the bytes that come.
    pub(super) fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Looks at the host: now and then, whether the stream is `hungry` or not, and runs or pauses. Whether more connections may come of it yet.
    pub(super) fn look(&mut self, hungry: bool, runs: bool) -> bool {
        let mut state = self.link.lock();
        match (self.runs, runs) {
            (true, false) => state.running -= 1,
            (false, true) => state.running += 1,
            _ => {}
        }
        self.runs = runs;
        // Under the lock: the streams of a host look side by side, and time goes on from one look to the next.
        let now = Instant::now();
        if hungry && runs {
            state.hungry = Some(now);
        }
        let seen = Seen {
            now: now.saturating_duration_since(self.link.begin),
            bytes: self.link.bytes.load(Ordering::Relaxed),
            streams: state.running,
            used: state.used,
            hungry: state
                .hungry
                .is_some_and(|at| now.saturating_duration_since(at) < HUNGER),
        };
        let before = state.width.extra;
        state.width.see(&seen);
        if state.width.extra != before {
            let (streams, extra) = (seen.streams, state.width.extra);
            tracing::debug!(
                streams,
                extra,
                before,
                bytes = seen.bytes,
                "connections of streams beside one for each"
            );
        }
        hungry && state.fixed.is_none() && state.width.may_grow(seen.now)
    }

    /// How many connections all streams of the host may use beside one for each.
    pub(super) fn allowed(&self) -> usize {
        let state = self.link.lock();
        state.fixed.unwrap_or(state.width.extra)
    }

    /// One of them, if it is free.
    pub(super) fn extra(&self) -> Option<Extra> {
        let mut state = self.link.lock();
        let allowed = state.fixed.unwrap_or(state.width.extra);
        (state.used < allowed).then(|| {
            state.used += 1;
            Extra(Arc::clone(&self.link))
        })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut state = self.link.lock();
        state.joined -= 1;
        state.running -= usize::from(self.runs);
        state.left = Instant::now();
    }
}

impl Drop for Extra {
    fn drop(&mut self) {
        self.0.lock().used -= 1;
    }
}

#[cfg(test)]
mod tests;
