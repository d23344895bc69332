//! The policy in virtual time, against hosts that serve, hang, drip and throttle. Everything follows from a seed: nothing sleeps, and a
//! failure comes again.
//!
//! A request takes its host's latency, and its bytes at the rate that the host gives each request. At a host that hangs, it takes as long as
//! a client is patient. The books that the properties are checked against are kept here, from the grants alone.

mod links;
mod properties;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::Arc;
use std::time::Duration;

use super::policy::{Id, LARGE_PART, Limits, Policy, START, Wish};
use super::{Class, Kind};
use crate::registry::Origin;
use crate::sync::random::Random;

/// Seeds tried for the property that everything is checked for, and for each of the others.
const SEEDS_OF_ALL: u64 = 200;
const SEEDS: u64 = 8;
/// When a client gives up a request that brings nothing.
const PATIENCE: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
const LIMITS: Limits = Limits {
    requests: 16,
    streams: 4,
    memory: 256 * MIB,
};

/// How a host serves.
#[derive(Debug, Clone, Copy)]
enum Host {
    /// Latency, and bytes per second for each request.
    Serves(Duration, u64),
    Hangs,
}

const FAST: Host = Host::Serves(Duration::from_millis(20), 10 * MIB);
const DRIPS: Host = Host::Serves(Duration::from_millis(20), 10_000);
const THROTTLES: Host = Host::Serves(Duration::from_secs(2), 200_000);

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// The wish with this number is asked for.
    Ask(usize),
    /// It is ranked anew.
    Rank(usize, Class),
    /// Who asked for it has gone.
    Leave(usize),
    /// It has come to its end.
    Done(usize),
    /// So many requests may run at the host with this number.
    Allow(String, usize),
}

/// What became of a wish.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Fate {
    asked: Duration,
    granted: Option<Duration>,
    ended: Option<Duration>,
}

struct Simulation {
    policy: Policy,
    limits: Limits,
    hosts: BTreeMap<String, Host>,
    /// How many requests each may have, where that was said while something was asked of it.
    depths: BTreeMap<String, usize>,
    events: BinaryHeap<Reverse<(Duration, Event)>>,
    wishes: Vec<Wish>,
    ids: BTreeMap<Id, usize>,
    numbers: BTreeMap<usize, Id>,
    fates: Vec<Fate>,
    waiting: BTreeSet<usize>,
    running: BTreeSet<usize>,
    /// Number and class at each grant, in order.
    grants: Vec<usize>,
    now: Duration,
    /// Whether everything is checked after every event.
    checked: bool,
}

impl Simulation {
    fn new(limits: Limits) -> Self {
        Simulation {
            policy: Policy::new(limits),
            limits,
            hosts: BTreeMap::new(),
            depths: BTreeMap::new(),
            events: BinaryHeap::new(),
            wishes: Vec::new(),
            ids: BTreeMap::new(),
            numbers: BTreeMap::new(),
            fates: Vec::new(),
            waiting: BTreeSet::new(),
            running: BTreeSet::new(),
            grants: Vec::new(),
            now: Duration::ZERO,
            checked: false,
        }
    }

    /// A host, or one repository of it.
    fn host(&mut self, name: &str, host: Host) {
        self.hosts.insert(name.to_owned(), host);
    }

    /// Has a wish asked for at a time; its number.
    fn at(&mut self, time: Duration, host: &str, repository: &str, class: Class, bytes: u64) -> usize {
        let deadline = time + PATIENCE;
        self.wish(
            time,
            Wish {
                owner: Origin::new(host, repository),
                class,
                kind: Kind::Request,
                bytes,
                deadline,
            },
        )
    }

    fn wish(&mut self, time: Duration, wish: Wish) -> usize {
        self.wishes.push(wish);
        self.fates.push(Fate::default());
        self.event(time, Event::Ask(self.wishes.len() - 1));
        self.wishes.len() - 1
    }

    fn event(&mut self, time: Duration, event: Event) {
        self.events.push(Reverse((time, event)));
    }

    /// What happens to a wish takes that long at its host.
    fn length(&self, number: usize) -> Duration {
        let wish = &self.wishes[number];
        let Origin { host, repository } = &wish.owner;
        let own = self.hosts.get(&format!("{host}/{repository}"));
        match own.copied().unwrap_or(self.hosts[&**host]) {
            Host::Serves(latency, rate) => latency + Duration::from_millis(wish.bytes * 1000 / rate),
            Host::Hangs => PATIENCE,
        }
    }

    fn run(&mut self) {
        while let Some(Reverse((time, event))) = self.events.pop() {
            self.now = time;
            match event {
                Event::Ask(number) => {
                    let id = self.policy.ask(self.wishes[number].clone());
                    self.ids.insert(id, number);
                    self.numbers.insert(number, id);
                    self.fates[number].asked = time;
                    self.waiting.insert(number);
                }
                Event::Rank(number, class) => {
                    if let Some(&id) = self.numbers.get(&number) {
                        self.policy.rank(id, class);
                        if self.fates[number].ended.is_none() {
                            self.wishes[number].class = class;
                        }
                    }
                }
                Event::Leave(number) => {
                    // Bytes under way are never thrown away.
                    if self.waiting.remove(&number) {
                        self.policy.end(self.numbers[&number]);
                        self.fates[number].ended = Some(time);
                    }
                }
                Event::Done(number) => {
                    self.policy.end(self.numbers[&number]);
                    self.running.remove(&number);
                    self.fates[number].ended = Some(time);
                }
                Event::Allow(host, depth) => {
                    self.policy.allow(&host, depth);
                    self.depths.insert(host, depth);
                }
            }
            self.forget_depths();
            while let Some(id) = self.policy.grant() {
                let number = self.ids[&id];
                assert!(self.waiting.remove(&number), "granted twice, or not asked for");
                assert!(
                    !self.checked || !self.is_full(&self.books(), number),
                    "there was no place for it"
                );
                self.running.insert(number);
                self.fates[number].granted = Some(time);
                self.grants.push(number);
                self.event(time + self.length(number), Event::Done(number));
            }
            self.check();
        }
        assert_eq!(
            self.policy.counts(),
            (0, 0),
            "every wish is granted or dropped in the end"
        );
        assert!(self.fates.iter().all(|fate| fate.ended.is_some()));
    }

    fn wait(&self, number: usize) -> Duration {
        self.fates[number].granted.expect("it was granted") - self.fates[number].asked
    }

    fn longest(&self, numbers: &[usize]) -> Duration {
        numbers
            .iter()
            .map(|&number| self.wait(number))
            .max()
            .unwrap_or_default()
    }

    fn memory(&self, number: usize) -> u64 {
        self.bytes(number).next_multiple_of(4096).min(self.limits.memory / 2)
    }

    /// What it takes of the memory, before that is rounded.
    fn bytes(&self, number: usize) -> u64 {
        let wish = &self.wishes[number];
        if wish.kind == Kind::Part { 0 } else { wish.bytes }
    }

    fn is_large(&self, number: usize) -> bool {
        self.bytes(number) > self.limits.memory / LARGE_PART
    }

    /// A host that nothing is asked of is forgotten.
    fn forget_depths(&mut self) {
        let known = self.waiting.iter().chain(&self.running);
        let known: BTreeSet<_> = known
            .map(|&number| Arc::clone(&self.wishes[number].owner.host))
            .collect();
        self.depths.retain(|host, _| known.contains(&**host));
    }

    fn depth(&self, host: &str) -> usize {
        let start = START.min(self.limits.requests);
        self.depths
            .get(host)
            .map_or(start, |&depth| depth.min(self.limits.requests))
    }

    fn books(&self) -> Books<'_> {
        let mut books = Books::default();
        for &number in &self.running {
            let wish = &self.wishes[number];
            let (stream, large, host) = (wish.kind == Kind::Stream, self.is_large(number), &*wish.owner.host);
            for repository in ["", &*wish.owner.repository] {
                books.places.entry((host, repository, stream)).or_default()[wish.class as usize] += 1;
                let unhurried = usize::from(!stream && wish.kind != Kind::Part && wish.class > Class::Demand);
                books.unhurried.entry((host, repository)).or_default()[wish.class as usize] += unhurried;
            }
            books.all[usize::from(stream)] += 1;
            *books.memory.entry((host, "", large)).or_default() += self.memory(number);
            let own = (host, &*wish.owner.repository, large);
            *books.memory.entry(own).or_default() += self.memory(number);
            books.all_memory[usize::from(large)] += self.memory(number);
        }
        books
    }

    /// The bounds hold, and nobody waits without a reason. (That no place is given which there is not was seen when it was given: later there may be
    /// fewer.)
    fn check(&self) {
        let books = self.books();
        assert!(books.all_memory.iter().all(|&bytes| bytes <= self.limits.memory / 2));
        for (&(_, repository, stream), held) in &books.places {
            let most = match (stream, repository) {
                (true, "") => self.limits.streams + 2,
                (true, _) => self.limits.streams + 1,
                (false, "") => self.limits.requests,
                (false, _) => self.limits.requests - self.limits.requests / 4,
            };
            assert!(held.iter().sum::<usize>() <= most);
        }
        for &number in &self.waiting {
            let wish = &self.wishes[number];
            assert!(self.has_reason(&books, number), "{wish:?} may run at {:?}", self.now);
        }
    }

    /// Whether there is no place for a wish, by the rules as they are written down.
    fn is_full(&self, books: &Books<'_>, number: usize) -> bool {
        let wish = &self.wishes[number];
        let (stream, host) = (wish.kind == Kind::Stream, &*wish.owner.host);
        let (depth, start) = (self.depth(host), START.min(self.limits.requests));
        let of = |requests: usize| (requests, requests - requests / 4, requests / 4);
        let (of_host, of_one, kept) = match stream {
            true => (self.limits.streams + 2, self.limits.streams + 1, 1),
            false => of(depth.max(start)),
        };
        let held = |repository| {
            books
                .places
                .get(&(host, repository, stream))
                .copied()
                .unwrap_or_default()
        };
        let full = |places: usize, kept: usize, held: [usize; 4]| {
            let kept = kept.min(places - 1);
            let from = |class: Class| held[class as usize..].iter().sum::<usize>();
            from(Class::Demand) >= places
                || (wish.class >= Class::Prefetch && from(Class::Prefetch) >= places - kept)
                || (wish.class >= Class::ReadAhead && from(Class::ReadAhead) >= places - kept)
                || (wish.class == Class::Background && from(Class::Background) >= ((places - kept) / 2).max(1))
        };
        if full(of_host, kept, held("")) || full(of_one, kept, held(&wish.owner.repository)) {
            return true;
        }
        if !stream && depth < start && wish.kind != Kind::Part && wish.class > Class::Demand {
            let held = |repository| books.unhurried.get(&(host, repository)).copied().unwrap_or_default();
            let (of_host, of_one, kept) = of(depth);
            if full(of_host, kept, held("")) || full(of_one, kept, held(&wish.owner.repository)) {
                return true;
            }
        }
        let here: usize = held("").iter().sum();
        let of_any = if stream { of_host } else { self.limits.requests };
        here > 0 && here >= (of_any * 8).saturating_sub(books.all[usize::from(stream)])
    }

    /// Why a wish cannot run now.
    fn has_reason(&self, books: &Books<'_>, number: usize) -> bool {
        let wish = &self.wishes[number];
        let host = &*wish.owner.host;
        if self.is_full(books, number) {
            return true;
        }
        // A part of a stream leaves the host to those who wait.
        let is_wanted = || {
            let mut known = self.waiting.iter().chain(&self.running);
            known.any(|&other| {
                let other = &self.wishes[other];
                other.class == Class::Demand && other.kind != Kind::Stream && *other.owner.host == *host
            })
        };
        if wish.kind == Kind::Part && wish.class > Class::Demand && is_wanted() {
            return true;
        }
        // Memory: of its size, here and everywhere, and what others at the host wait for who come before.
        let large = self.is_large(number);
        let held = |repository| {
            books
                .memory
                .get(&(host, repository, large))
                .copied()
                .unwrap_or_default()
        };
        let (here, own) = (held(""), held(&wish.owner.repository));
        let left = self.limits.memory / 2 - books.all_memory[usize::from(large)];
        let at_host = |other: usize| here + self.memory(other) > left;
        let in_repository = |other: usize| own + self.memory(other) > left.saturating_sub(here);
        let before = || {
            self.waiting.iter().any(|&other| {
                let first = &self.wishes[other];
                let comes_first = first.class <= wish.class && self.bytes(other) > 0 && self.is_large(other) == large;
                let own = first.owner == wish.owner && in_repository(other);
                comes_first && first.owner.host == wish.owner.host && (own || at_host(other))
            })
        };
        self.bytes(number) > 0 && (at_host(number) || in_repository(number) || before())
    }
}

/// What runs, counted: by host (with no name of a repository) and by repository.
#[derive(Default)]
struct Books<'a> {
    places: BTreeMap<(&'a str, &'a str, bool), [usize; 4]>,
    /// Those of requests for which nobody waits, and which are no parts of streams.
    unhurried: BTreeMap<(&'a str, &'a str), [usize; 4]>,
    all: [usize; 2],
    memory: BTreeMap<(&'a str, &'a str, bool), u64>,
    all_memory: [u64; 2],
}

/// Something to do at each of several hosts, for several images, with people who join and leave.
fn anything(seed: u64) -> Simulation {
    let mut random = Random::new(seed);
    let limits = Limits {
        requests: random.of(&[1, 2, 3, 4, 16, 16, 40]),
        streams: random.of(&[1, 4]),
        memory: random.of(&[32, 256, 256, 1024]) * MIB,
    };
    let mut simulation = Simulation::new(limits);
    let hosts: Vec<String> = (0..=random.below(12)).map(|host| format!("host{host}")).collect();
    for name in &hosts {
        let host = random.of(&[FAST, FAST, THROTTLES, DRIPS, Host::Hangs]);
        simulation.host(name, host);
        for _ in 0..random.below(4) {
            let depth = random.of(&[1, 2, 4, 5, 8, 16, 32, 64]);
            simulation.event(
                Duration::from_millis(random.below(8000)),
                Event::Allow(name.clone(), depth),
            );
        }
    }
    for _ in 0..80 {
        let time = Duration::from_millis(random.below(8000));
        let host = hosts[random.below(hosts.len() as u64) as usize].clone();
        let repository = format!("image{}", random.below(4));
        let class = random.of(&Class::ALL);
        let kind = random.of(&[
            Kind::Request,
            Kind::Request,
            Kind::Request,
            Kind::Part,
            Kind::Table,
            Kind::Stream,
        ]);
        let bytes = match (kind, random.below(20)) {
            (Kind::Request, 0) => random.below(200 * MIB),
            (Kind::Request | Kind::Part, _) => random.below(12 * MIB) + 1,
            _ => 0,
        };
        let wish = Wish {
            owner: Origin::new(&host, &repository),
            class,
            kind,
            bytes,
            deadline: time + Duration::from_millis(random.below(1000)),
        };
        let number = simulation.wish(time, wish);
        let later = time + Duration::from_millis(random.below(30_000) + 1);
        match random.below(6) {
            0 => simulation.event(later, Event::Rank(number, random.of(&Class::ALL))),
            1 => simulation.event(later, Event::Leave(number)),
            _ => {}
        }
    }
    simulation
}
