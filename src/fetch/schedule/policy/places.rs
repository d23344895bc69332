//! How many places there are, and who holds them: of a host, or of one of its repositories.

use super::{Class, Kind};

/// Places over all hosts, in numbers of places of one host: five hosts that hang leave others all they want.
pub(super) const HOSTS: usize = 8;
/// Of a host's places for requests, this part is kept for demand, and this part one repository leaves to others.
const KEPT_PART: usize = 4;
/// Places for streams that a host has on top of what pulls of one repository may take: one for other repositories, one for demand. Streams
/// are few and long: taken out of them, these would make the pull of a single image slower.
const KEPT_STREAMS: usize = 1;
/// Requests to one host at once, before anything is known of its link; and those that demand has whatever is known.
pub const START: usize = 16;

/// Bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Requests to one host at once, at most.
    pub requests: usize,
    /// Streams that one repository's pulls may have at once.
    pub streams: usize,
    /// Bytes that all requests may take together.
    pub memory: u64,
}

/// Places that are counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pool {
    Requests,
    Streams,
}

pub(super) const POOLS: [Pool; 2] = [Pool::Requests, Pool::Streams];

impl Kind {
    pub(super) fn pool(self) -> Pool {
        match self {
            Kind::Request | Kind::Part | Kind::Table => Pool::Requests,
            Kind::Stream => Pool::Streams,
        }
    }
}

/// Whose places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Of {
    Host,
    Repository,
}

/// Numbers of places.
#[derive(Debug, Clone, Copy)]
struct Room {
    host: usize,
    repository: usize,
    kept: usize,
}

impl Room {
    fn requests(host: usize) -> Room {
        let kept = host / KEPT_PART;
        Room {
            host,
            repository: host - kept,
            kept,
        }
    }

    fn streams(limits: &Limits) -> Room {
        let repository = limits.streams.max(1) + KEPT_STREAMS;
        Room {
            host: repository + KEPT_STREAMS,
            repository,
            kept: KEPT_STREAMS,
        }
    }

    /// Whether who holds these may have another one for `class`.
    fn admits(&self, of: Of, held: &Held, class: Class) -> bool {
        let places = match of {
            Of::Host => self.host,
            Of::Repository => self.repository,
        };
        // A more urgent class is counted with the less urgent ones that are under way: they are in the places already.
        (0..=class as usize).all(|upper| {
            let class = Class::ALL[upper];
            held.0[upper..].iter().sum::<usize>() < allowed(places, self.kept, class)
        })
    }
}

impl Limits {
    /// Requests that a host may be asked at once, at most.
    pub fn most(&self) -> usize {
        self.requests.max(1)
    }

    /// Requests that a host may be asked at once of which nothing is known.
    pub fn start(&self) -> usize {
        START.min(self.most())
    }

    /// Places over all hosts.
    pub(super) fn all(&self, pool: Pool) -> usize {
        let host = match pool {
            Pool::Requests => self.most(),
            Pool::Streams => Room::streams(self).host,
        };
        host.saturating_mul(HOSTS)
    }

    /// Bytes of the half that a wish takes its memory from.
    pub(super) fn half(&self) -> u64 {
        self.memory / 2
    }
}

/// Of `places` with `kept` ones, those that a class may hold together with all less urgent ones.
fn allowed(places: usize, kept: usize, class: Class) -> usize {
    let kept = kept.min(places.saturating_sub(1));
    match class {
        Class::Demand => places,
        Class::Prefetch | Class::ReadAhead => places - kept,
        Class::Background => ((places - kept) / 2).max(1),
    }
}

/// Places that are held, by class.
#[derive(Debug, Default, Clone, Copy)]
struct Held([usize; 4]);

impl Held {
    fn total(&self) -> usize {
        self.0.iter().sum()
    }
}

/// Places that are held of a host, or of one of its repositories.
#[derive(Debug, Default)]
pub(super) struct Places {
    requests: Held,
    /// Those of them that parts of streams have.
    parts: Held,
    streams: Held,
}

impl Places {
    fn of(&mut self, pool: Pool) -> &mut Held {
        match pool {
            Pool::Requests => &mut self.requests,
            Pool::Streams => &mut self.streams,
        }
    }

    /// Those that are held of a pool.
    pub fn total(&self, pool: Pool) -> usize {
        match pool {
            Pool::Requests => self.requests.total(),
            Pool::Streams => self.streams.total(),
        }
    }

    /// Those that a class holds for requests.
    pub fn requests(&self, class: Class) -> usize {
        self.requests.0[class as usize]
    }

    /// Another one is held.
    pub fn take(&mut self, kind: Kind, class: Class) {
        self.of(kind.pool()).0[class as usize] += 1;
        self.parts.0[class as usize] += usize::from(kind == Kind::Part);
    }

    /// One is held no more.
    pub fn give_back(&mut self, kind: Kind, class: Class) {
        self.of(kind.pool()).0[class as usize] -= 1;
        self.parts.0[class as usize] -= usize::from(kind == Kind::Part);
    }

    /// Whether who holds these may have another one, at a host that may be asked for `depth` requests.
    pub fn admits(&self, of: Of, limits: &Limits, depth: usize, kind: Kind, class: Class) -> bool {
        if kind.pool() == Pool::Streams {
            return Room::streams(limits).admits(of, &self.streams, class);
        }
        let has_start = kind == Kind::Part || class == Class::Demand;
        let room = Room::requests(depth.max(limits.start()));
        room.admits(of, &self.requests, class)
            && (has_start || depth >= limits.start() || Room::requests(depth).admits(of, &self.unhurried(), class))
    }

    /// Places for requests, but for those that have [`START`] of them in any case.
    fn unhurried(&self) -> Held {
        let mut rest = self.requests;
        for (held, parts) in rest.0.iter_mut().zip(self.parts.0) {
            *held -= parts;
        }
        rest.0[Class::Demand as usize] = 0;
        rest
    }
}
