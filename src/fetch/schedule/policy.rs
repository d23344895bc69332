//! Who gets the next place. Pure: events come in as calls, time as a number.
//!
//! # Rules
//! 1. Each host has places of its own, so that one that hangs, drips or throttles keeps nobody else waiting. A number over all hosts bounds
//!    the whole; of what is left of it, a host never takes more than half, so that a newcomer finds some, and one that holds no place gets
//!    one in any case. How many requests a host has places for follows its link ([`super::depth`]): [`START`] at first, then more or fewer, up
//!    to [`Limits::requests`]. Where they are fewer than [`START`], that is so for what nobody waits for. Demand has [`START`] in any case: whoever waits
//!    must not do so for a measure that may be wrong. Parts of streams have as well, since it is measured elsewhere (`fetch::width`) how
//!    many of them help.
//! 2. Within a host, one repository leaves some places to others, also while there are none: those who come later find them free.
//! 3. Prefetch and read-ahead leave some places to demand, background leaves half of those to prefetch; within the host as within each
//!    repository.
//! 4. What is free goes to the most urgent class; in a class to the host that was served longest ago; in a host to the repository that was
//!    served least (start-time fair queueing over bytes, a request counting as [`REQUEST_COST`] more); there, to the earliest deadline.
//! 5. Memory is shared as places are: a host takes at most half of what is left, and a repository half of what its host might still take. A
//!    wish that does not fit keeps its place in the queue, and nothing that comes after it at its host, or in its repository, takes the
//!    memory that it waits for. Wishes for much memory ([`LARGE_PART`]) have half of it to themselves, and the others the other half:
//!    neither kind waits for the other.
//! 6. A part of a stream, which that only asks for to be quicker, is not granted while somebody waits for other bytes of its host, unless
//!    somebody waits for it as well. It takes no memory here (streams have their own), and counts with its bytes in rule 4.
//!
//! Every wish is in one place of the books, waiting or running, until [`Policy::end`]; whatever may run is running after [`Policy::grant`]
//! has answered `None`.

mod places;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

pub use self::places::{Limits, START};
use self::places::{Of, POOLS, Places, Pool};
use crate::registry::Origin;

/// A wish for more than this part of the memory is a large one.
pub const LARGE_PART: u64 = 16;
/// What a request costs besides its bytes, in bytes: the round trip.
pub const REQUEST_COST: u64 = 100 << 10;
/// Memory is counted in these units, in bytes, as [`crate::sync::Budget`] counts it: what fits here fits there.
const UNIT: u64 = 4096;

/// How urgent a wish is, the most urgent first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Somebody waits.
    Demand,
    /// Somebody is known to ask for it soon: what an image's author or an earlier start says, and pulls.
    Prefetch,
    /// Somebody may ask for it next, as he asked for what lies beside it.
    ReadAhead,
    /// Nobody is known to ask for it.
    Background,
}

impl Class {
    /// All of them, in order.
    pub const ALL: [Class; 4] = [Class::Demand, Class::Prefetch, Class::ReadAhead, Class::Background];

    /// Its word in metrics.
    pub fn word(self) -> &'static str {
        match self {
            Class::Demand => "demand",
            Class::Prefetch => "prefetch",
            Class::ReadAhead => "readahead",
            Class::Background => "background",
        }
    }
}

/// What a wish is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A ranged request.
    Request,
    /// A whole blob. Streams have places of their own.
    Stream,
    /// A range of a blob that is being streamed, beside what its stream reads anyway: takes the places of requests, and `bytes` are only
    /// what it will bring.
    Part,
    /// A table of contents, or another document that a layer needs: takes the places of requests.
    Table,
}

/// Something that is wanted of a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// Whose it is: the host that it is asked of, and the repository for which.
    pub owner: Origin,
    /// How urgent it is.
    pub class: Class,
    /// What for.
    pub kind: Kind,
    /// Memory that it takes while it runs, in bytes; 0 if that is accounted elsewhere.
    pub bytes: u64,
    /// When it should be granted at the latest, counted from any beginning: the order among wishes of one class and repository.
    pub deadline: Duration,
}

/// The number of a wish.
pub type Id = u64;

/// What a host has under way.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Requests and streams that run.
    pub running: usize,
    /// Whether a wish for a request waits because the host, or its repository, has no place for it.
    pub waits: bool,
}

/// Size of a wish: which half of the memory it takes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Size {
    Small,
    Large,
}

#[derive(Debug)]
struct Entry {
    wish: Wish,
    pool: Pool,
    size: Size,
    /// Bytes that it counts for.
    cost: u64,
    running: bool,
}

#[derive(Debug)]
struct Host {
    /// Requests that may be under way at once.
    depth: usize,
    places: Places,
    memory: [u64; 2],
    repositories: BTreeMap<Arc<str>, Repository>,
    /// When it was served last.
    turn: u64,
    /// Start tag of what was served last.
    clock: u64,
    /// Wishes that wait, by pool and class.
    waiting: [[usize; 4]; 2],
    /// Of those, parts of streams.
    parts: [usize; 4],
}

impl Host {
    fn new(depth: usize) -> Self {
        Host {
            depth,
            places: Places::default(),
            memory: [0; 2],
            repositories: BTreeMap::new(),
            turn: 0,
            clock: 0,
            waiting: Default::default(),
            parts: [0; 4],
        }
    }

    /// Whether somebody waits for bytes of it.
    fn is_wanted(&self) -> bool {
        let demand = Class::Demand;
        self.waiting[Pool::Requests as usize][demand as usize] > 0 || self.places.requests(demand) > 0
    }

    /// Whether it has a place for a wish of one of its repositories.
    fn admits(&self, limits: &Limits, repository: &Repository, wish: &Wish) -> bool {
        let admits = |places: &Places, of| places.admits(of, limits, self.depth, wish.kind, wish.class);
        admits(&self.places, Of::Host) && admits(&repository.places, Of::Repository)
    }
}

#[derive(Debug, Default)]
struct Repository {
    places: Places,
    memory: [u64; 2],
    waiting: [[BTreeSet<(Duration, Id)>; 4]; 2],
    /// Finish tag of what was served last.
    served: u64,
}

impl Repository {
    fn is_idle(&self) -> bool {
        POOLS.iter().all(|&pool| self.places.total(pool) == 0) && self.waiting.iter().flatten().all(BTreeSet::is_empty)
    }
}

/// Where at a host somebody waits for memory of a size already: nobody who comes after him may take any.
#[derive(Debug, Default)]
struct Short<'a> {
    host: [bool; 2],
    repositories: HashMap<&'a str, [bool; 2]>,
}

/// The books: who waits, and who holds what.
#[derive(Debug)]
pub struct Policy {
    limits: Limits,
    wishes: HashMap<Id, Entry>,
    hosts: BTreeMap<Arc<str>, Host>,
    last: Id,
    turn: u64,
    places: [usize; 2],
    memory: [u64; 2],
}

impl Policy {
    /// Nobody has asked for anything.
    pub fn new(limits: Limits) -> Self {
        Policy {
            limits,
            wishes: HashMap::new(),
            hosts: BTreeMap::new(),
            last: 0,
            turn: 0,
            places: [0; 2],
            memory: [0; 2],
        }
    }

    /// Takes a wish into the queue. More memory than there is for one is taken as all of that.
    pub fn ask(&mut self, mut wish: Wish) -> Id {
        self.last += 1;
        let id = self.last;
        let pool = wish.kind.pool();
        let is_part = wish.kind == Kind::Part;
        let part = std::mem::take(&mut wish.bytes);
        wish.bytes = if is_part { 0 } else { part };
        let size = match wish.bytes > self.limits.memory / LARGE_PART {
            true => Size::Large,
            false => Size::Small,
        };
        wish.bytes = wish.bytes.next_multiple_of(UNIT).min(self.limits.half());
        let start = self.limits.start();
        let host = self.hosts.entry(Arc::clone(&wish.owner.host));
        let host = host.or_insert_with(|| Host::new(start));
        let repository = host.repositories.entry(Arc::clone(&wish.owner.repository));
        let repository = repository.or_default();
        repository.waiting[pool as usize][wish.class as usize].insert((wish.deadline, id));
        host.waiting[pool as usize][wish.class as usize] += 1;
        host.parts[wish.class as usize] += usize::from(is_part);
        let entry = Entry {
            cost: if is_part { part } else { wish.bytes },
            wish,
            pool,
            size,
            running: false,
        };
        self.wishes.insert(id, entry);
        id
    }

    /// The next wish that may run; it runs from now on. `None`: nobody else may now.
    pub fn grant(&mut self) -> Option<Id> {
        let next = self.next()?;
        self.start(next);
        Some(next)
    }

    /// Ends a wish, whether it runs or waits. One that is not known has ended already.
    pub fn end(&mut self, id: Id) {
        let Some(entry) = self.wishes.remove(&id) else { return };
        let (wish, pool) = (&entry.wish, entry.pool as usize);
        let Some(host) = self.hosts.get_mut(&wish.owner.host) else {
            return;
        };
        let Some(repository) = host.repositories.get_mut(&wish.owner.repository) else {
            return;
        };
        let class = wish.class as usize;
        if entry.running {
            repository.places.give_back(wish.kind, wish.class);
            host.places.give_back(wish.kind, wish.class);
            self.places[pool] -= 1;
            repository.memory[entry.size as usize] -= wish.bytes;
            host.memory[entry.size as usize] -= wish.bytes;
            self.memory[entry.size as usize] -= wish.bytes;
        } else {
            repository.waiting[pool][class].remove(&(wish.deadline, id));
            host.waiting[pool][class] -= 1;
            host.parts[class] -= usize::from(wish.kind == Kind::Part);
        }
        // Who was served no more than the others are by now begins where they are when he comes back: he need not be remembered.
        let clock = host.clock;
        host.repositories
            .retain(|_, repository| !repository.is_idle() || repository.served > clock);
        if host.repositories.values().all(Repository::is_idle) {
            self.hosts.remove(&wish.owner.host);
        }
    }

    /// Ranks a wish anew, whether it waits or runs.
    pub fn rank(&mut self, id: Id, class: Class) {
        let Some(entry) = self.wishes.get_mut(&id) else { return };
        let before = std::mem::replace(&mut entry.wish.class, class);
        let (old, new) = (before as usize, class as usize);
        if old == new {
            return;
        }
        let pool = entry.pool as usize;
        let Some(host) = self.hosts.get_mut(&entry.wish.owner.host) else {
            return;
        };
        let Some(repository) = host.repositories.get_mut(&entry.wish.owner.repository) else {
            return;
        };
        if entry.running {
            for places in [&mut host.places, &mut repository.places] {
                places.give_back(entry.wish.kind, before);
                places.take(entry.wish.kind, class);
            }
        } else {
            let key = (entry.wish.deadline, id);
            repository.waiting[pool][old].remove(&key);
            repository.waiting[pool][new].insert(key);
            host.waiting[pool][old] -= 1;
            host.waiting[pool][new] += 1;
            let part = usize::from(entry.wish.kind == Kind::Part);
            host.parts[old] -= part;
            host.parts[new] += part;
        }
    }

    /// Gives back memory of a running wish, down to `bytes`; how much it has then.
    pub fn shrink(&mut self, id: Id, bytes: u64) -> u64 {
        let Some(entry) = self.wishes.get_mut(&id).filter(|entry| entry.running) else {
            return 0;
        };
        let less = entry.wish.bytes.saturating_sub(bytes.next_multiple_of(UNIT));
        entry.wish.bytes -= less;
        self.memory[entry.size as usize] -= less;
        let owner = &entry.wish.owner;
        if let Some(host) = self.hosts.get_mut(&owner.host) {
            host.memory[entry.size as usize] -= less;
            if let Some(repository) = host.repositories.get_mut(&owner.repository) {
                repository.memory[entry.size as usize] -= less;
            }
        }
        entry.wish.bytes
    }

    /// The memory that a wish has, in bytes.
    pub fn bytes(&self, id: Id) -> u64 {
        self.wishes.get(&id).map_or(0, |entry| entry.wish.bytes)
    }

    /// Whether anything that is more urgent than read-ahead waits for a place like this one at its host. Parts of streams can wait.
    pub fn is_contended(&self, id: Id) -> bool {
        let Some(entry) = self.wishes.get(&id) else {
            return false;
        };
        let Some(host) = self.hosts.get(&entry.wish.owner.host) else {
            return false;
        };
        let parts = if entry.pool == Pool::Requests {
            host.parts
        } else {
            [0; 4]
        };
        let waiting = host.waiting[entry.pool as usize].iter().zip(parts);
        waiting.take(Class::ReadAhead as usize).any(|(&all, parts)| all > parts)
    }

    /// Whether there is any wish for more than background work, but for those left out.
    pub fn is_stirred(&self, but: &HashSet<Id>) -> bool {
        let urgent = |(id, entry): (&Id, &Entry)| entry.wish.class < Class::Background && !but.contains(id);
        self.wishes.iter().any(urgent)
    }

    /// Lets so many requests run at a host from now on; those that run already do so to their end. Whether that is new.
    pub fn allow(&mut self, host: &str, depth: usize) -> bool {
        let depth = depth.clamp(1, self.limits.most());
        let host = self.hosts.get_mut(host);
        host.is_some_and(|host| std::mem::replace(&mut host.depth, depth) != depth)
    }

    /// What a host has under way.
    pub fn load(&self, host: &str) -> Load {
        let Some(host) = self.hosts.get(host) else {
            return Load::default();
        };
        // Within a class, wishes of one repository are alike, as far as places are concerned.
        let waiting = |repository: &Repository| {
            let first = repository.waiting[Pool::Requests as usize].iter().map(BTreeSet::first);
            let mut first = first.flatten().filter_map(|(_, id)| self.wishes.get(id));
            first.any(|entry| !host.admits(&self.limits, repository, &entry.wish))
        };
        Load {
            running: POOLS.iter().map(|&pool| host.places.total(pool)).sum(),
            waits: host.repositories.values().any(waiting),
        }
    }

    /// The hosts that something is asked of: their names, how many requests each may have at once, and has.
    pub fn hosts(&self) -> impl Iterator<Item = (&str, usize, usize)> {
        let hosts = self.hosts.iter();
        hosts.map(|(name, host)| (&**name, host.depth, host.places.total(Pool::Requests)))
    }

    /// Of which host a wish is asked.
    pub fn host_of(&self, id: Id) -> Option<Arc<str>> {
        self.wishes.get(&id).map(|entry| Arc::clone(&entry.wish.owner.host))
    }

    /// Wishes that wait, and wishes that run.
    pub fn counts(&self) -> (usize, usize) {
        let running = self.wishes.values().filter(|entry| entry.running).count();
        (self.wishes.len() - running, running)
    }

    fn next(&self) -> Option<Id> {
        for pool in POOLS {
            let mut short: HashMap<&str, Short<'_>> = HashMap::new();
            for class in Class::ALL {
                let waits = |host: &Host| host.waiting[pool as usize][class as usize] > 0;
                let mut hosts: Vec<_> = self.hosts.iter().filter(|(_, host)| waits(host)).collect();
                hosts.sort_by_key(|(_, host)| host.turn);
                for (name, host) in hosts {
                    let found = self.next_at(host, pool, class, short.entry(&**name).or_default());
                    if found.is_some() {
                        return found;
                    }
                }
            }
        }
        None
    }

    fn next_at<'a>(&'a self, host: &'a Host, pool: Pool, class: Class, short: &mut Short<'a>) -> Option<Id> {
        let held = host.places.total(pool);
        let left = self.limits.all(pool).saturating_sub(self.places[pool as usize]);
        if held > 0 && held >= left {
            return None;
        }
        let mut repositories: Vec<(&str, &Repository)> = host
            .repositories
            .iter()
            .map(|(name, repository)| (&**name, repository))
            .filter(|(_, repository)| !repository.waiting[pool as usize][class as usize].is_empty())
            .collect();
        repositories.sort_by_key(|(_, repository)| repository.served.max(host.clock));
        for (name, repository) in repositories {
            let here = short.repositories.entry(name).or_default();
            for (_, id) in &repository.waiting[pool as usize][class as usize] {
                let Some(entry) = self.wishes.get(id) else { continue };
                if !host.admits(&self.limits, repository, &entry.wish) {
                    continue;
                }
                if entry.wish.kind == Kind::Part && class > Class::Demand && host.is_wanted() {
                    continue;
                }
                let (bytes, size) = (entry.wish.bytes, entry.size as usize);
                if bytes == 0 {
                    return Some(*id);
                }
                if short.host[size] || here[size] {
                    continue;
                }
                let left = self.limits.half().saturating_sub(self.memory[size]);
                short.host[size] = host.memory[size].saturating_add(bytes) > left;
                here[size] = repository.memory[size].saturating_add(bytes) > left.saturating_sub(host.memory[size]);
                if !short.host[size] && !here[size] {
                    return Some(*id);
                }
            }
        }
        None
    }

    fn start(&mut self, id: Id) {
        let Some(entry) = self.wishes.get_mut(&id) else { return };
        let (wish, pool) = (&entry.wish, entry.pool as usize);
        entry.running = true;
        self.turn += 1;
        self.places[pool] += 1;
        self.memory[entry.size as usize] += wish.bytes;
        let Some(host) = self.hosts.get_mut(&wish.owner.host) else {
            return;
        };
        let class = wish.class as usize;
        host.turn = self.turn;
        host.places.take(wish.kind, wish.class);
        host.waiting[pool][class] -= 1;
        host.parts[class] -= usize::from(wish.kind == Kind::Part);
        host.memory[entry.size as usize] += wish.bytes;
        let Some(repository) = host.repositories.get_mut(&wish.owner.repository) else {
            return;
        };
        repository.places.take(wish.kind, wish.class);
        repository.memory[entry.size as usize] += wish.bytes;
        repository.waiting[pool][class].remove(&(wish.deadline, id));
        let start = repository.served.max(host.clock);
        repository.served = start.saturating_add(REQUEST_COST).saturating_add(entry.cost);
        host.clock = start;
    }
}

#[cfg(test)]
mod tests;
