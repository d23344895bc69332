//! Hosts behind links: what they bring depends on how much is asked of them at once. In virtual time, a millisecond after the other.
//!
//! A link has a bandwidth, a round trip, perhaps a bound for each connection, and divides itself fairly or sends what was asked first
//! first (a long queue in the network). Each test compares with the number of requests that was fixed: it fails if nothing adapts.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::super::depths::{Depths, Traffic};
use super::super::policy::{Id, Limits, Policy, START, Wish};
use super::super::{Class, Kind};
use super::MIB;
use crate::registry::Origin;
use crate::sync::random::Random;

const LIMITS: Limits = Limits {
    requests: 64,
    streams: 4,
    memory: 256 * MIB,
};
const MILLISECOND: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
/// Seeds tried for each property.
const SEEDS: u64 = 3;
/// Wishes of a load that wait at once: as many as dispatchers of an image's layers.
const WAITING: usize = 4;
/// How long a client waits that was refused.
const RETRY_AFTER: Duration = SECOND;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Queue {
    /// All connections get the same.
    Fair,
    /// What was asked first comes first.
    First,
}

const QUEUES: [Queue; 2] = [Queue::Fair, Queue::First];

#[derive(Debug, Clone, Copy)]
struct Link {
    /// Bytes per second.
    bandwidth: u64,
    round_trip: Duration,
    /// Bytes per second of a connection.
    cap: u64,
    queue: Queue,
    /// Requests in a second above which it refuses.
    bears: u32,
}

impl Link {
    fn new(megabits: u64, round_trip: u64, queue: Queue) -> Link {
        Link {
            bandwidth: megabits * 125_000,
            round_trip: Duration::from_millis(round_trip),
            cap: u64::MAX,
            queue,
            bears: u32::MAX,
        }
    }
}

/// Something of which there is always more to ask for.
struct Load {
    class: Class,
    image: &'static str,
    /// Bytes of a request: from, to.
    bytes: (u64, u64),
    left: usize,
    waiting: usize,
}

struct Flight {
    id: Id,
    asked: Duration,
    granted: Duration,
    /// When its first byte can be here.
    comes: Duration,
    begun: Option<Duration>,
    left: u64,
    /// Whether the host has taken it.
    taken: bool,
    /// Which load it is of; none if somebody waits for it.
    load: Option<usize>,
}

struct Net {
    policy: Policy,
    depths: Depths,
    host: Arc<str>,
    traffic: Arc<Traffic>,
    link: Link,
    random: Random,
    loads: Vec<Load>,
    /// When somebody asks for so many bytes, and waits.
    demand: VecDeque<(Duration, u64)>,
    waiting: Vec<Flight>,
    flights: Vec<Flight>,
    now: Duration,
    /// How long those waited who asked since the last look.
    waits: Vec<Duration>,
    bytes: u64,
    refusals: u64,
    /// Requests that the host takes now, in thousandths.
    takes: u64,
    /// Requests that might run at once times milliseconds, since the last look.
    depth_time: usize,
    looked: Duration,
    deepest: usize,
}

impl Net {
    fn new(link: Link, adapts: bool, seed: u64) -> Net {
        let host: Arc<str> = "host".into();
        let mut depths = Depths::new(&LIMITS);
        depths.fixed = !adapts;
        Net {
            policy: Policy::new(LIMITS),
            traffic: depths.traffic(Duration::ZERO, &host),
            depths,
            host,
            link,
            random: Random::new(seed),
            loads: Vec::new(),
            demand: VecDeque::new(),
            waiting: Vec::new(),
            flights: Vec::new(),
            now: Duration::ZERO,
            waits: Vec::new(),
            bytes: 0,
            refusals: 0,
            takes: 0,
            depth_time: 0,
            looked: Duration::ZERO,
            deepest: 0,
        }
    }

    fn load(&mut self, class: Class, image: &'static str, bytes: (u64, u64), count: usize) {
        self.loads.push(Load {
            class,
            image,
            bytes,
            left: count,
            waiting: 0,
        });
    }

    /// Somebody asks for something every so often, from now on.
    fn reads(&mut self, every: Duration, bytes: u64, count: u32) {
        let now = self.now;
        self.demand.extend((1..=count).map(|at| (now + every * at, bytes)));
    }

    fn depth(&self) -> usize {
        self.depths.depth(&self.host)
    }

    /// The same on average, in the last run: trials come and go.
    fn usual(&self) -> usize {
        self.depth_time / (self.now - self.looked).as_millis().max(1) as usize
    }

    fn ask(&mut self, class: Class, image: &str, bytes: u64, load: Option<usize>) {
        let wish = Wish {
            owner: Origin::new(&self.host, image),
            class,
            kind: Kind::Request,
            // As a request takes it: a copy of some, and what is decoded.
            bytes: bytes * 2,
            deadline: self.now,
        };
        let id = self.policy.ask(wish);
        self.waiting.push(Flight {
            id,
            asked: self.now,
            granted: self.now,
            comes: self.now,
            begun: None,
            left: bytes,
            taken: false,
            load,
        });
        self.settle();
    }

    fn settle(&mut self) {
        for id in self.depths.settle(self.now, &self.host, &mut self.policy) {
            let at = self
                .waiting
                .iter()
                .position(|flight| flight.id == id)
                .expect("it waits");
            let mut flight = self.waiting.remove(at);
            flight.granted = self.now;
            flight.comes = self.now + self.link.round_trip;
            if let Some(load) = flight.load {
                self.loads[load].waiting -= 1;
            }
            self.flights.push(flight);
        }
        self.deepest = self.deepest.max(self.depth());
    }

    fn is_done(&self) -> bool {
        self.flights.is_empty()
            && self.waiting.is_empty()
            && self.demand.is_empty()
            && self.loads.iter().all(|load| load.left == 0)
    }

    /// Until everything is here; how long that took.
    fn finish(&mut self) -> Duration {
        let begin = self.now;
        while !self.is_done() {
            self.tick();
        }
        self.now - begin
    }

    /// For so long; how many bytes per second came.
    fn run(&mut self, time: Duration) -> u64 {
        let (end, before) = (self.now + time, self.bytes);
        self.waits.clear();
        self.depth_time = 0;
        self.looked = self.now;
        while self.now < end {
            self.tick();
        }
        (self.bytes - before) * 1000 / time.as_millis() as u64
    }

    /// How much longer readers waited in the last run than at a link of their own, on average, for so many bytes each.
    fn wait(&self, bytes: u64) -> Duration {
        let mean = self.waits.iter().sum::<Duration>() / u32::try_from(self.waits.len().max(1)).unwrap();
        mean - self.link.round_trip - Duration::from_millis(bytes * 1000 / self.link.bandwidth)
    }

    fn tick(&mut self) {
        self.now += MILLISECOND;
        while let Some((_, bytes)) = self.demand.pop_front_if(|(time, _)| *time <= self.now) {
            self.ask(Class::Demand, "read", bytes, None);
        }
        for at in 0..self.loads.len() {
            while self.loads[at].left > 0 && self.loads[at].waiting < WAITING {
                let Load {
                    class, image, bytes, ..
                } = self.loads[at];
                self.loads[at].left -= 1;
                self.loads[at].waiting += 1;
                let bytes = bytes.0 + self.random.below(bytes.1 - bytes.0 + 1);
                self.ask(class, image, bytes, Some(at));
            }
        }
        self.refuse();
        self.bring();
        self.depth_time += self.depth();
    }

    /// Takes the requests that come in, or refuses them.
    fn refuse(&mut self) {
        // What is not used in a tenth of a second is lost.
        let most = u64::from(self.link.bears) * 100;
        self.takes = (self.takes + u64::from(self.link.bears)).min(most);
        for flight in &mut self.flights {
            if flight.comes > self.now || flight.taken {
                continue;
            }
            flight.taken = self.takes >= 1000;
            if flight.taken {
                self.takes -= 1000;
            } else {
                flight.comes = self.now + RETRY_AFTER;
                self.refusals += 1;
            }
        }
    }

    /// A millisecond of the link.
    fn bring(&mut self) {
        let active: Vec<usize> = (0..self.flights.len())
            .filter(|&at| self.flights[at].comes <= self.now)
            .collect();
        let mut left = self.link.bandwidth / 1000;
        for (turn, &at) in active.iter().enumerate() {
            let share = match self.link.queue {
                Queue::Fair => left / (active.len() - turn) as u64,
                Queue::First => left,
            };
            let flight = &mut self.flights[at];
            let bytes = share.min(self.link.cap / 1000).min(flight.left);
            left -= bytes;
            self.bytes += bytes;
            self.traffic.arrived(bytes);
            flight.left -= bytes;
            if bytes > 0 && flight.begun.is_none() {
                flight.begun = Some(self.now);
                let took = self.now - flight.granted;
                self.depths.first(self.now, &self.host, took);
                self.depths.refusals(self.now, &self.host, self.refusals);
                self.settle();
            }
        }
        while let Some(at) = self.flights.iter().position(|flight| flight.left == 0) {
            let flight = self.flights.remove(at);
            self.policy.end(flight.id);
            let body = self.now - flight.begun.expect("it has come");
            self.depths.ended(self.now, &self.host, body);
            if flight.load.is_none() {
                self.waits.push(self.now - flight.asked);
            }
            self.settle();
        }
    }
}

/// The same with as many requests as help, and with the fixed number.
fn both<T>(link: Link, seed: u64, run: impl Fn(&mut Net) -> T) -> [(T, Net); 2] {
    [true, false].map(|adapts| {
        let mut net = Net::new(link, adapts, seed);
        let result = run(&mut net);
        (result, net)
    })
}

#[test]
fn a_long_fat_link_is_asked_for_more_at_once() {
    for (seed, class) in (0..SEEDS).zip([Class::Demand, Class::Prefetch].into_iter().cycle()) {
        for queue in QUEUES {
            let [(adapts, net), (fixed, _)] = both(Link::new(1000, 100, queue), seed, |net| {
                net.load(class, "image", (10_000, 100_000), 1500);
                net.finish()
            });
            assert!(net.deepest > START && net.deepest <= LIMITS.requests);
            assert!(
                adapts * 2 < fixed,
                "{adapts:?} instead of {fixed:?}, {queue:?}, seed {seed}"
            );
        }
    }
}

#[test]
fn who_begins_to_wait_does_not_stand_behind_what_nobody_waits_for() {
    for seed in 0..SEEDS {
        for (queue, class) in QUEUES
            .into_iter()
            .flat_map(|queue| [Class::Prefetch, Class::Background].map(|class| (queue, class)))
        {
            let [(adapts, net), (fixed, _)] = both(Link::new(100, 50, queue), seed, |net| {
                net.load(class, "image", (MIB / 2, 2 * MIB), 100_000);
                net.run(40 * SECOND);
                net.reads(SECOND / 2, 100_000, 80);
                let rate = net.run(41 * SECOND);
                (rate, net.wait(100_000))
            });
            assert!(net.usual() < START);
            assert!(
                adapts.1 * 3 < fixed.1 * 2,
                "{adapts:?} instead of {fixed:?}, {class:?}, {queue:?}, seed {seed}"
            );
            assert!(
                adapts.0 * 10 > fixed.0 * 8,
                "the link is full all the same: {adapts:?} {fixed:?}"
            );
        }
    }
}

#[test]
fn a_link_that_holds_each_connection_back_is_filled() {
    for seed in 0..SEEDS {
        for queue in QUEUES {
            let link = Link {
                cap: 250 * 125_000,
                ..Link::new(2000, 20, queue)
            };
            let [(adapts, _), (fixed, _)] = both(link, seed, |net| {
                net.load(Class::Background, "image", (MIB / 2, MIB), 100_000);
                net.run(5 * SECOND);
                net.run(20 * SECOND)
            });
            assert!(adapts * 10 > link.bandwidth * 8, "{adapts} of {} B/s", link.bandwidth);
            assert!(fixed * 2 < adapts, "{adapts} instead of {fixed} B/s, seed {seed}");
        }
    }
}

#[test]
fn a_host_that_hangs_or_drips_is_not_asked_for_more() {
    for seed in 0..SEEDS {
        let hangs = Link {
            bandwidth: 0,
            ..Link::new(1000, 20, Queue::Fair)
        };
        let drips = Link {
            cap: 10_000,
            ..Link::new(1000, 20, Queue::Fair)
        };
        for link in [hangs, drips] {
            let mut net = Net::new(link, true, seed);
            net.load(Class::Demand, "image", (20_000, 100_000), 100_000);
            net.run(60 * SECOND);
            assert!(net.deepest <= START, "{} at {link:?}", net.deepest);
        }
    }
}

#[test]
fn a_host_that_refuses_is_asked_less() {
    for seed in 0..SEEDS {
        let link = Link {
            bears: 400,
            ..Link::new(1000, 20, Queue::Fair)
        };
        let [(adapts, net), (fixed, other)] = both(link, seed, |net| {
            net.load(Class::Prefetch, "one", (20_000, 100_000), 100_000);
            net.load(Class::Prefetch, "another", (20_000, 100_000), 100_000);
            net.run(60 * SECOND)
        });
        assert!(net.deepest <= 2 * START && net.usual() < START);
        let (few, many) = (net.refusals, other.refusals);
        assert!(few * 4 < many, "{few} refusals instead of {many}, seed {seed}");
        assert!(adapts * 2 > fixed, "{adapts} instead of {fixed} B/s, seed {seed}");
    }
}

#[test]
fn it_follows_a_link_that_changes() {
    for seed in 0..SEEDS {
        for queue in QUEUES {
            let (fat, slow) = (Link::new(1000, 100, queue), Link::new(10, 30, queue));
            let mut net = Net::new(fat, true, seed);
            net.load(Class::Prefetch, "image", (10_000, 100_000), 1_000_000);
            for _ in 0..2 {
                net.link = fat;
                net.run(40 * SECOND);
                net.run(10 * SECOND);
                assert!(
                    net.usual() > START,
                    "{} at a fat link, {queue:?}, seed {seed}",
                    net.usual()
                );
                net.link = slow;
                net.run(40 * SECOND);
                net.run(10 * SECOND);
                assert!(
                    net.usual() < START,
                    "{} at a slow link, {queue:?}, seed {seed}",
                    net.usual()
                );
            }
        }
    }
}
