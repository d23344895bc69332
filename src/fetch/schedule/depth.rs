//! How many ranged requests a host is asked at once: as many as bring something.
//!
//! On a long way, and where each connection is held back, a link is full only with many of them. Where it is full, more only stand in it: what
//! somebody begins to wait for then stands behind them. Which it is shows when it is tried. A [`Depth`] measures, while wishes wait for
//! places, what all connections to the host bring together; lets twice as many requests run, and measures again. What grew by at least
//! [`WORTH`] of what it would have grown by if each request brought the same is kept, and tried further. Otherwise it is as before, and
//! fewer are tried next: what loses no more than [`LOSS`] of what it would lose by then is kept, and tried further as well. What did not help
//! is tried again after a while, longer each time, and at once if what comes has become much more or much less: the link is another one then.
//!
//! What waits in the network shows sooner: the first byte of an answer stands behind it. Where it takes much longer than the quickest of the
//! last seconds did (that is about a round trip), fewer requests are tried at once: as many as would be under way without the queue (the
//! product of bandwidth and delay, counted in requests), and some more. That, too, is only kept if it costs nothing. So neither a slow server nor a
//! way that has become longer is taken for a queue for long.
//!
//! A host that answers that it is asked too much gets half, at once (or what it had before more was tried), and no more than that for a while. One that brings nothing proves nothing, and no more are asked
//! of one that drips.
//!
//! A [`Depth`] has no clock and does no I/O. Whom it lets in, and what is let in whatever it says, is a matter of [`super::policy`].

use std::time::Duration;

/// Fewest requests: of these, [`super::policy`] leaves two to read ahead of one image and one for the background.
const FLOOR: usize = 4;
/// Part of its proportional gain that a greater depth must have to be kept: twice as many requests for a quarter more would be paid for by whoever
/// begins to wait.
const WORTH: f64 = 0.3;
/// Part of its proportional loss that a smaller depth may have to be kept: half of the requests must bring nine tenths.
const LOSS: f64 = 0.2;
/// Share of the time in which wishes must have waited for places, for a measure to say anything.
const LIMITED: f64 = 0.5;
/// How much more, or fewer, connections must have been in use for a trial to be one.
const DIFFERENT: f64 = 1.1;
/// How many times the quickest first byte all of them must take to tell of a queue, and how much longer at least: below that it is jitter.
const QUEUED: u32 = 2;
const JITTER: Duration = Duration::from_millis(10);
/// Of the requests that would do without a queue, so many times as many are tried: they are not alike, and the link must not run dry.
const HEADROOM: f64 = 1.5;
/// How long the quickest first byte counts: once to twice this.
const QUICKEST: Duration = Duration::from_secs(10);
/// How long is measured, at least; and in round trips, since answers come in bursts of one.
const MEASURE: Duration = Duration::from_millis(150);
const ROUND_TRIPS: u32 = 3;
/// How often all that is under way must have ended meanwhile, on average: in less time, it is chance whether few large requests bring much.
const GENERATIONS: f64 = 2.0;
/// How long is waited for these at most, and for a change to show.
const LONGEST: Duration = Duration::from_secs(3);
/// First wait after a trial that did not help; doubles each time.
const FIRST_WAIT: Duration = Duration::from_secs(2);
/// The longest of these.
const LONGEST_WAIT: Duration = Duration::from_secs(15);
/// A rate so many times as high or low as the last one is that of another link, or of other requests.
const ANOTHER: f64 = 1.3;
/// Bytes per second of a connection below which more of them are not tried: of a link, sixteen such make 2 Mbit/s; and a host that drips is not to
/// have ever more.
const DRIPS: f64 = 16384.0;
/// How long refusals count as one: all that are under way get one.
const REFUSED: Duration = Duration::from_secs(1);
/// How long no more is asked of a host than it did not refuse; doubles with each refusal. Hosts count what they are asked in a minute, or an hour.
const FIRST_HUMBLE: Duration = Duration::from_secs(30);
/// The longest of these.
const LONGEST_HUMBLE: Duration = Duration::from_secs(600);

/// What is seen of a host at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    /// Time, from any beginning.
    pub now: Duration,
    /// Bytes that all connections to the host have brought, from any beginning.
    pub bytes: u64,
    /// Requests and streams that run.
    pub running: usize,
    /// Whether some wish for a request waits for a place, and for nothing else.
    pub waits: bool,
}

/// What so many connections bring.
#[derive(Debug, Clone, Copy)]
struct Sample {
    /// Their number, on average.
    running: f64,
    /// Bytes per second.
    rate: f64,
    /// The quickest first byte.
    first: Option<Duration>,
    /// From the first byte to the last, on average.
    body: Duration,
    /// Whether wishes waited.
    limited: bool,
}

/// A measure under way.
#[derive(Debug)]
struct Measure {
    since: Duration,
    bytes: u64,
    /// Connections times seconds.
    running: f64,
    /// Time in which wishes waited.
    waited: Duration,
    first: Option<Duration>,
    bodies: Duration,
    ends: u32,
}

/// The quickest first byte of the last seconds.
#[derive(Debug, Default)]
struct Quickest {
    since: Duration,
    now: Option<Duration>,
    before: Option<Duration>,
}

impl Quickest {
    fn add(&mut self, now: Duration, took: Duration) {
        if now.saturating_sub(self.since) > QUICKEST {
            self.before = self.now.take();
            self.since = now;
        }
        self.now = Some(self.now.map_or(took, |least| least.min(took)));
    }

    fn get(&self) -> Option<Duration> {
        [self.now, self.before].into_iter().flatten().min()
    }
}

/// How many requests to one host may run at once.
#[derive(Debug)]
pub struct Depth {
    depth: usize,
    most: usize,
    quickest: Quickest,
    last: Option<Seen>,
    /// When the depth was changed last, or a measure was ended.
    since: Duration,
    /// When the first byte came of a request that was made after that.
    shows: Option<Duration>,
    /// `None`: what was changed does not show yet.
    measure: Option<Measure>,
    /// What was before the trial that is under way.
    before: Option<(usize, Sample)>,
    not_before: Duration,
    wait: Duration,
    /// Whether fewer are tried next.
    fewer: bool,
    /// What came last, when nothing was tried.
    rate: Option<f64>,
    /// When the host said last that it is asked too much.
    refused: Option<Duration>,
    /// No more than so many are tried, until then.
    ceiling: Option<(usize, Duration)>,
    /// For how long, the next time.
    humble: Duration,
}

impl Depth {
    /// Nothing is known of the host: `start` requests, and `most` at most.
    pub fn new(start: usize, most: usize) -> Self {
        Depth {
            depth: start.min(most),
            most,
            quickest: Quickest::default(),
            last: None,
            since: Duration::ZERO,
            shows: None,
            measure: None,
            before: None,
            not_before: Duration::ZERO,
            wait: FIRST_WAIT,
            fewer: false,
            rate: None,
            refused: None,
            ceiling: None,
            humble: FIRST_HUMBLE,
        }
    }

    /// How many may run.
    pub fn get(&self) -> usize {
        self.depth
    }

    /// The first byte of an answer came, so long after it was asked for.
    pub fn first(&mut self, now: Duration, took: Duration) {
        self.quickest.add(now, took);
        if now.saturating_sub(took) >= self.since {
            self.shows.get_or_insert(now);
        }
        if let Some(measure) = &mut self.measure {
            measure.first = Some(measure.first.map_or(took, |least| least.min(took)));
        }
    }

    /// A request has ended, so long after its first byte.
    pub fn ended(&mut self, body: Duration) {
        if let Some(measure) = &mut self.measure {
            measure.bodies += body;
            measure.ends += 1;
        }
    }

    /// The host says that it is asked too much.
    pub fn refused(&mut self, now: Duration) {
        if self.refused.is_some_and(|at| now.saturating_sub(at) < REFUSED) {
            return;
        }
        self.refused = Some(now);
        self.depth = match self.before.take() {
            Some((old, _)) if old < self.depth => old,
            _ => self.at_least(self.depth / 2),
        };
        self.ceiling = Some((self.depth, now + self.humble));
        self.humble = (self.humble * 2).min(LONGEST_HUMBLE);
        self.failed(now);
        self.fewer = false;
        self.begin(now);
    }

    /// Takes note of what is seen, and decides.
    pub fn see(&mut self, seen: &Seen) {
        let last = self.last.replace(*seen);
        if seen.running == 0 {
            // What comes next begins with an empty link.
            self.undo();
            return self.begin(seen.now);
        }
        let Some(measure) = &mut self.measure else {
            if self.is_settled(seen.now) {
                self.measure = Some(Measure {
                    since: seen.now,
                    bytes: seen.bytes,
                    running: 0.0,
                    waited: Duration::ZERO,
                    first: None,
                    bodies: Duration::ZERO,
                    ends: 0,
                });
            }
            return;
        };
        if let Some(last) = last {
            let time = seen.now.saturating_sub(last.now);
            measure.running += last.running as f64 * time.as_secs_f64();
            measure.waited += if last.waits { time } else { Duration::ZERO };
        }
        let time = seen.now.saturating_sub(measure.since);
        let bytes = seen.bytes.saturating_sub(measure.bytes);
        let least = self
            .quickest
            .get()
            .map_or(MEASURE, |quickest| MEASURE.max(quickest * ROUND_TRIPS));
        let seconds = time.as_secs_f64();
        let enough = f64::from(measure.ends) * seconds >= GENERATIONS * measure.running;
        if time < least.min(LONGEST) || (!enough && time < LONGEST) {
            return;
        }
        let sample = Sample {
            running: measure.running / seconds,
            rate: bytes as f64 / seconds,
            first: measure.first,
            body: measure.bodies.checked_div(measure.ends).unwrap_or_default(),
            limited: measure.waited.as_secs_f64() >= LIMITED * seconds,
        };
        match self.before.take() {
            Some((old, _)) if !sample.limited => self.depth = old,
            Some((old, before)) => self.judge(old, before, sample, seen.now),
            None => self.try_another(sample, seen.now),
        }
        self.begin(seen.now);
    }

    fn is_settled(&self, now: Duration) -> bool {
        // The connections find their pace in one more round trip.
        let shows = self.shows.map(|at| at + self.quickest.get().unwrap_or_default());
        now >= shows.unwrap_or(self.since + LONGEST).min(self.since + LONGEST)
    }

    /// Measures anew, once what is changed now shows.
    fn begin(&mut self, now: Duration) {
        self.since = now;
        self.shows = None;
        self.measure = None;
    }

    fn undo(&mut self) {
        if let Some((old, _)) = self.before.take() {
            self.depth = old;
        }
    }

    fn at_least(&self, depth: usize) -> usize {
        depth.max(FLOOR).min(self.most)
    }

    fn judge(&mut self, old: usize, before: Sample, after: Sample, now: Duration) {
        let more = self.depth > old;
        let ratio = after.running / before.running.max(1.0);
        let helps = match more {
            true => ratio >= DIFFERENT && after.rate >= before.rate * (1.0 + WORTH * (ratio - 1.0)),
            false => ratio <= 1.0 / DIFFERENT && after.rate >= before.rate * (1.0 - LOSS * (1.0 - ratio)),
        };
        if helps {
            self.wait = FIRST_WAIT;
            self.not_before = now;
            self.rate = Some(after.rate);
        } else {
            self.depth = old;
            self.failed(now);
        }
        // On in the direction that helped, or the other one.
        self.fewer = more != helps;
    }

    /// What was tried does not help: the next trial waits.
    fn failed(&mut self, now: Duration) {
        self.not_before = now + self.wait;
        self.wait = (self.wait * 2).min(LONGEST_WAIT);
    }

    fn try_another(&mut self, sample: Sample, now: Duration) {
        if !sample.limited {
            return;
        }
        let old = self.rate.replace(sample.rate).unwrap_or(sample.rate);
        let (faster, slower) = (sample.rate > old * ANOTHER, sample.rate * ANOTHER < old);
        if faster || slower {
            self.wait = FIRST_WAIT;
            self.not_before = now;
            self.fewer = slower;
        }
        if now < self.not_before {
            return;
        }
        let most = self.ceiling.map_or(self.most, |(most, until)| match now < until {
            true => most,
            false => self.most,
        });
        let can = (
            self.depth > self.at_least(0),
            self.depth < most && sample.rate >= DRIPS * sample.running,
        );
        let next = match (self.without_queue(&sample), can) {
            (Some(next), _) => self.at_least(next.min(self.depth)),
            (None, (true, more)) if self.fewer || !more => self.at_least(self.depth / 2),
            // More than what is let in whatever is said here.
            (None, (_, true)) => self.depth.max(sample.running as usize).saturating_mul(2).min(most),
            (None, _) => self.depth,
        };
        self.fewer = false;
        if next != self.depth {
            self.before = Some((self.depth, sample));
            self.depth = next;
        }
    }

    /// If there is a queue in the network: the depth that does without.
    fn without_queue(&self, sample: &Sample) -> Option<usize> {
        let (first, quickest) = (sample.first?, self.quickest.get()?);
        if first <= quickest * QUEUED + JITTER {
            return None;
        }
        let (without, with) = (quickest + sample.body, first + sample.body);
        let part = HEADROOM * without.as_secs_f64() / with.as_secs_f64();
        // Not all at once: the measure may be one of a bad moment.
        Some((self.depth as f64 * part.clamp(0.25, 1.0)) as usize)
    }
}
