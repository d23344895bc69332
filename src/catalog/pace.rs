//! How long a question of containerd may wait for a layer, and what tells early that the layer will not be there by then.
//!
//! containerd holds its snapshotter's lock while Prepare runs: a collection of garbage waits for it, and everybody else for that. So Prepare
//! answers within [`BOUND`], whatever the layer, the registry and the disk do. What cannot be had by then is left to containerd, which
//! fetches and unpacks it outside of the lock; the sooner that is known, the better. It is known
//! - before anything is begun, from the size of the layer and what its host delivered lately, or because the host did not answer at all a
//!   moment ago ([`Hosts`]);
//! - while it streams, from its pace ([`Watch`]), once it is known how many connections it has (`fetch::width`). All layers of an image are streamed side by side; on a narrow link the one that is waited for
//!   would only get its part of it. If it could make it with the whole link, the others pause for it.
//!
//! On links where a layer streams within the bound, nothing changes: 90 MB take 7.5 s at 100 Mbit/s, 450 MB at 500 Mbit/s.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Longest wait for a layer in Prepare.
pub(super) const BOUND: Duration = Duration::from_secs(8);
/// How much longer it may wait for what is no matter of the network any more: what a layer looks like that has come, and that containerd takes
/// what it is lent. The disk may be busy with just that layer.
const BEYOND: Duration = Duration::from_secs(2);
/// Longest wait for a host that does not answer at all: connections, tokens and redirects take less than a second each, and a proxy that has
/// to fetch a blob itself begins to send within a few.
pub(super) const SILENCE: Duration = Duration::from_secs(5);
/// How often a stream is looked at.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Over how long the pace is measured.
const WINDOW: Duration = Duration::from_millis(500);
/// How long a connection takes to find its pace.
const SETTLE: Duration = Duration::from_millis(700);
/// How long a stream may take to find out how many connections make it faster, and how many times as fast it may become by that: in this time
/// they are doubled three times.
const GROWN: Duration = Duration::from_millis(2500);
const GROWTH: f64 = 8.0;
/// How long the others have to pause until the link is surely the stream's alone. Those that can give up their connections; what kernels take
/// for a connection that is kept and that nobody reads from still comes (6 MiB each here, and 4 MiB in a proxy on the way: tcp(7),
/// `tcp_rmem` and `tcp_wmem`).
const EMPTIED: Duration = Duration::from_secs(4);
/// By how much a stream may seem too slow before it is given up: paces vary.
const TOLERANCE: f64 = 1.3;
/// How long what a host delivered says something about its next layer.
const PACE_HOLDS: Duration = Duration::from_secs(60);
/// How long a host that did not answer is not waited for; doubles each time it does not answer again.
const SHUN_FIRST: Duration = Duration::from_secs(10);
/// The longest of these.
const SHUN_MOST: Duration = Duration::from_secs(60);
/// Hosts that are remembered.
const HOSTS_MAX: usize = 1024;

/// Until when what is no matter of the network is waited for, where everything ends at `deadline`.
pub(super) fn local_deadline(deadline: Instant, now: Instant) -> Instant {
    deadline.max(now + BEYOND)
}

/// What to do about a stream that is waited for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Verdict {
    /// Go on waiting.
    Wait,
    /// Let the other streams of the image pause for it.
    Favour,
    /// It will not be there in time: bytes per second that its host delivers.
    Slow(f64),
    /// Nothing has come of it.
    Silent,
    /// The time is over.
    Over,
}

/// Watches one stream that is waited for.
#[derive(Debug)]
pub(super) struct Watch {
    begun: Instant,
    deadline: Instant,
    /// When the stream was seen first.
    seen: Option<Instant>,
    favoured: Option<Instant>,
    /// Times, bytes of the stream and of all streams of the image.
    marks: VecDeque<(Instant, u64, u64)>,
    /// The most bytes per second that all streams of the image got.
    best: f64,
}

impl Watch {
    /// Begins now; `deadline` is the end.
    pub(super) fn new(now: Instant, deadline: Instant) -> Self {
        Watch {
            begun: now,
            deadline,
            seen: None,
            favoured: None,
            marks: VecDeque::new(),
            best: 0.0,
        }
    }

    /// Looks at the load: since when its host has said nothing at all, if that is so; bytes that have arrived and bytes of the layer (`None`: it
    /// does not stream, yet or any more); whether it is being tried if more connections make it faster; and bytes that have arrived of all
    /// streams of the image.
    pub(super) fn look(
        &mut self,
        now: Instant,
        silent: Option<Instant>,
        stream: Option<(u64, u64)>,
        grows: bool,
        all: u64,
    ) -> Verdict {
        if now >= self.deadline {
            return Verdict::Over;
        }
        // Not before the question waited: somebody else's may have begun the load.
        if silent.is_some_and(|since| now.saturating_duration_since(since.max(self.begun)) >= SILENCE) {
            return Verdict::Silent;
        }
        let Some((done, total)) = stream.filter(|(done, _)| *done > 0) else {
            return Verdict::Wait;
        };
        let seen = *self.seen.get_or_insert(now);
        if self.marks.back().is_some_and(|(_, before, _)| *before > done) {
            // It arrived damaged, and is downloaded again.
            self.marks.clear();
        }
        self.marks.push_back((now, done, all));
        while self.marks.get(1).is_some_and(|(at, ..)| now - *at >= WINDOW) {
            self.marks.pop_front();
        }
        let Some(&(since, before, all_before)) = self.marks.front() else {
            return Verdict::Wait;
        };
        if now - since < WINDOW / 2 {
            return Verdict::Wait;
        }
        let pace = |bytes: u64| bytes as f64 / (now - since).as_secs_f64();
        let (own, of_all) = (pace(done - before), pace(all.saturating_sub(all_before)));
        self.best = self.best.max(of_all);
        let settled = self.favoured.map_or(seen + SETTLE, |favoured| favoured + EMPTIED);
        if now < settled {
            return Verdict::Wait;
        }
        let left = total.saturating_sub(done) as f64;
        let room = (self.deadline - now).as_secs_f64();
        let takes = |pace: f64| if left == 0.0 { 0.0 } else { left / pace.max(1.0) };
        let may_grow = grows && now < seen + GROWN && takes(own * GROWTH) <= room;
        if takes(own) <= room * TOLERANCE || may_grow {
            return Verdict::Wait;
        }
        if self.favoured.is_none() && takes(of_all) <= room * TOLERANCE {
            self.favoured = Some(now);
            self.marks.clear();
            return Verdict::Favour;
        }
        Verdict::Slow(own.max(of_all))
    }

    /// The most bytes per second that all streams of the image got at a time: what the host delivers, since streams also wait for
    /// decoders, the disk, and each other.
    pub(super) fn pace(&self) -> Option<f64> {
        (self.best > 0.0).then_some(self.best)
    }
}

/// What is known of hosts.
#[derive(Debug, Default)]
pub(super) struct Hosts(Mutex<HashMap<String, Host>>);

#[derive(Debug, Default)]
struct Host {
    /// Bytes per second of a layer that it delivered, and when.
    pace: Option<(f64, Instant)>,
    /// When it answered last.
    answered: Option<Instant>,
    /// Until when it is not waited for, and for how long that was.
    shunned: Option<(Instant, Duration)>,
}

/// Why a layer is not worth beginning.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Hopeless {
    /// The host did not answer a moment ago.
    Silent,
    /// At this pace, in bytes per second, it would take too long.
    Slow(f64),
}

impl Hosts {
    /// Whether a layer of `bytes` that has to be streamed could be had from `host` within `within`, as far as is known.
    pub(super) fn hopeless(&self, host: &str, bytes: u64, within: Duration, now: Instant) -> Option<Hopeless> {
        if self.is_silent(host, now) {
            return Some(Hopeless::Silent);
        }
        let (pace, at) = self.lock().get(host)?.pace?;
        let slow = now.saturating_duration_since(at) < PACE_HOLDS
            && bytes as f64 / pace.max(1.0) > within.as_secs_f64() * TOLERANCE;
        slow.then_some(Hopeless::Slow(pace))
    }

    /// Whether `host` did not answer a moment ago.
    pub(super) fn is_silent(&self, host: &str, now: Instant) -> bool {
        let shunned = self.lock().get(host).and_then(|host| host.shunned);
        shunned.is_some_and(|(until, _)| now < until)
    }

    /// `host` delivered at this pace, in bytes per second.
    pub(super) fn delivered(&self, host: &str, pace: f64, now: Instant) {
        self.change(host, now, |host| {
            host.pace = Some((pace, now));
            host.shunned = None;
        });
    }

    /// `host` answers.
    pub(super) fn answered(&self, host: &str, now: Instant) {
        self.change(host, now, |host| {
            host.answered = Some(now);
            host.shunned = None;
        });
    }

    /// `host` did not answer for as long as could be waited. If it has answered somebody else meanwhile, it is only slow with this one.
    pub(super) fn silent(&self, host: &str, now: Instant) {
        self.change(host, now, |host| {
            let answers = |at: Instant| now.saturating_duration_since(at) < SILENCE;
            if host.answered.is_some_and(answers) {
                return;
            }
            let time = match host.shunned {
                // Others that waited at the same time say nothing new.
                Some((until, time)) if now < until => return host.shunned = Some((until, time)),
                Some((_, time)) => (time * 2).min(SHUN_MOST),
                None => SHUN_FIRST,
            };
            host.shunned = Some((now + time, time));
        });
    }

    fn change(&self, host: &str, now: Instant, change: impl FnOnce(&mut Host)) {
        let mut hosts = self.lock();
        if hosts.len() >= HOSTS_MAX && !hosts.contains_key(host) {
            let old = |at: Instant| now.saturating_duration_since(at) > PACE_HOLDS;
            hosts.retain(|_, host| {
                let times = [
                    host.pace.map(|(_, at)| at),
                    host.answered,
                    host.shunned.map(|(until, _)| until),
                ];
                times.into_iter().flatten().any(|at| !old(at))
            });
        }
        if hosts.len() < HOSTS_MAX || hosts.contains_key(host) {
            change(hosts.entry(host.to_owned()).or_default());
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Host>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;

    /// Streams of one image over a link of `link` bytes per second, which they share evenly; each gets `cap` at most. The first is waited for.
    /// What became of it, after how long.
    fn waited_for(sizes: &[u64], link: u64, cap: u64) -> (Verdict, Duration) {
        let begin = Instant::now();
        let mut watch = Watch::new(begin, begin + BOUND);
        let (mut done, mut alone) = (vec![0_u64; sizes.len()], false);
        // What kernels still take for a stream that pauses.
        let mut buffers = vec![10 * MB; sizes.len()];
        for step in 1.. {
            let now = begin + step * LOOK_EVERY;
            let pauses = |at: usize| at > 0 && alone;
            let runs: Vec<usize> = (0..sizes.len())
                .filter(|&at| done[at] < sizes[at] && (!pauses(at) || buffers[at] > 0))
                .collect();
            let share = (link / runs.len().max(1) as u64).min(cap) / 10;
            for at in runs {
                match pauses(at) {
                    true => buffers[at] = buffers[at].saturating_sub(share),
                    false => done[at] = (done[at] + share).min(sizes[at]),
                }
            }
            if done[0] == sizes[0] {
                return (Verdict::Wait, now - begin);
            }
            match watch.look(now, None, Some((done[0], sizes[0])), false, done.iter().sum()) {
                Verdict::Wait => {}
                Verdict::Favour => alone = true,
                verdict => return (verdict, now - begin),
            }
        }
        unreachable!("the time is over at some time")
    }

    #[test]
    fn what_can_be_had_in_time_is_waited_for() {
        // Four layers at 100 Mbit/s: the first has the link for itself.
        let (verdict, after) = waited_for(&[45 * MB, 20 * MB, 55 * MB, 30 * MB], 12 * MB, u64::MAX);
        assert_eq!(verdict, Verdict::Wait);
        assert!(after < BOUND, "{after:?}");
        assert_eq!(waited_for(&[60 * MB, 60 * MB], 62 * MB, u64::MAX).0, Verdict::Wait);
        assert_eq!(waited_for(&[MB], MB / 2, u64::MAX).0, Verdict::Wait);
    }

    #[test]
    fn what_cannot_be_had_is_known_within_about_a_second() {
        for (sizes, link, cap) in [
            (&[40 * MB][..], MB, u64::MAX),
            (&[40 * MB, 40 * MB], MB, u64::MAX),
            (&[400 * MB, MB], 12 * MB, u64::MAX),
        ] {
            let (verdict, after) = waited_for(sizes, link, cap);
            assert!(matches!(verdict, Verdict::Slow(_)), "{verdict:?}");
            assert!(after < Duration::from_millis(1500), "{after:?}");
        }
        // To have the link for itself does not help where each connection is held back: that takes another look.
        let (verdict, after) = waited_for(&[60 * MB; 4], 40 * MB, 5 * MB);
        assert!(matches!(verdict, Verdict::Slow(_)), "{verdict:?}");
        assert!(after < Duration::from_secs(6), "{after:?}");
    }

    #[test]
    fn a_stream_that_may_become_faster_is_waited_for_until_that_is_known() {
        let begin = Instant::now();
        let mut watch = Watch::new(begin, begin + BOUND);
        let mut look = |ms: u64, done: u64, grows| {
            let at = begin + Duration::from_millis(ms);
            watch.look(at, None, Some((done * MB, 900 * MB)), grows, done * MB)
        };
        for step in 1..20 {
            assert_eq!(look(step * 100, 3 * step, true), Verdict::Wait);
        }
        assert!(matches!(look(2000, 60, false), Verdict::Slow(_)));
        // Not for ever, and not where no number of connections would do.
        assert!(matches!(look(3000, 90, true), Verdict::Slow(_)));
        let mut watch = Watch::new(begin, begin + BOUND);
        let mut look = |ms: u64, done: u64| {
            let at = begin + Duration::from_millis(ms);
            watch.look(at, None, Some((done * MB, 9000 * MB)), true, done * MB)
        };
        let verdicts: Vec<_> = (1..12).map(|step| look(step * 100, 3 * step)).collect();
        assert!(matches!(verdicts.last(), Some(Verdict::Slow(_))), "{verdicts:?}");
    }

    #[test]
    fn what_has_come_is_looked_at_even_at_the_end() {
        let now = Instant::now();
        assert_eq!(
            local_deadline(now, now),
            now + BEYOND,
            "all the time went to the network"
        );
        assert_eq!(local_deadline(now + BOUND, now), now + BOUND);
    }

    #[test]
    fn silence_and_the_end_of_the_time_are_told_apart() {
        let begin = Instant::now();
        let mut watch = Watch::new(begin, begin + BOUND);
        let asked = Some(begin + SILENCE / 2);
        assert_eq!(watch.look(begin + SILENCE, asked, None, false, 0), Verdict::Wait);
        assert_eq!(watch.look(begin + SILENCE, None, None, false, 0), Verdict::Wait);
        assert_eq!(
            watch.look(begin + SILENCE * 3 / 2, asked, None, false, 0),
            Verdict::Silent
        );
        let mut watch = Watch::new(begin, begin + BOUND);
        assert_eq!(watch.look(begin + BOUND / 2, None, None, false, 0), Verdict::Wait);
        assert_eq!(watch.look(begin + BOUND, None, Some((1, 9)), false, 0), Verdict::Over);
    }

    #[test]
    fn a_download_that_begins_anew_is_measured_anew() {
        let begin = Instant::now();
        let mut watch = Watch::new(begin, begin + BOUND);
        watch.look(begin, None, Some((5 * MB, 10 * MB)), false, 5 * MB);
        let verdict = watch.look(begin + SETTLE, None, Some((MB, 10 * MB)), false, MB);
        assert_eq!(verdict, Verdict::Wait);
    }

    #[test]
    fn hosts_are_remembered_for_a_while() {
        let (hosts, now) = (Hosts::default(), Instant::now());
        let of = |bytes, now| hosts.hopeless("h", bytes, BOUND, now);
        assert_eq!(of(u64::MAX, now), None);
        hosts.delivered("h", 1e6, now);
        assert_eq!(of(5 * MB, now), None);
        assert_eq!(of(40 * MB, now), Some(Hopeless::Slow(1e6)));
        assert_eq!(of(40 * MB, now + PACE_HOLDS), None);
        hosts.silent("h", now);
        hosts.silent("h", now);
        assert_eq!(of(1, now), Some(Hopeless::Silent));
        assert_eq!(of(1, now + SHUN_FIRST), None);
        hosts.silent("h", now + SHUN_FIRST);
        assert!(
            hosts.is_silent("h", now + 2 * SHUN_FIRST),
            "longer, since it happened again"
        );
        hosts.answered("h", now);
        assert_eq!(of(1, now), None);
        hosts.silent("h", now + SILENCE / 2);
        assert_eq!(of(1, now + SILENCE / 2), None, "it answers somebody");
        hosts.silent("h", now + SILENCE);
        assert_eq!(of(1, now + SILENCE), Some(Hopeless::Silent));
        for number in 0..2 * HOSTS_MAX {
            hosts.silent(&number.to_string(), now);
        }
        assert!(hosts.lock().len() <= HOSTS_MAX);
    }
}
