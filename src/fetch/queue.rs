//! The chunks of one layer that are asked for: who waits for each, which of them a request has, and which come next.
//!
//! Every chunk in `chunks` is either queued (its rank is in `demand` or `background`) or flying (one request has it). It leaves
//! with [`Queue::take`], by which its waiters are answered; so a waiter is lost only with the queue itself.

use std::collections::{BTreeSet, HashMap};

use bytes::Bytes;
use tokio::sync::oneshot;

use super::FetchError;
use super::window::{Chunks, Owner, Plan, State, Window};
use crate::layer::{LayerIndex, ROOT_INO};
use crate::sync::Class;

/// What a waiter gets: the bytes of the chunk.
pub(super) type Answer = Result<Bytes, FetchError>;
/// Who waits for a chunk.
pub(super) type Waiter = oneshot::Sender<Answer>;

/// Where a chunk is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Queued(Class),
    /// In the request with this number.
    Flying(u64),
}

struct Pending {
    place: Place,
    /// Times that the chunk arrived damaged.
    damaged: u32,
    waiters: Vec<Waiter>,
}

/// Chunks asked for.
#[derive(Default)]
pub(super) struct Queue {
    chunks: HashMap<usize, Pending>,
    demand: BTreeSet<usize>,
    background: BTreeSet<usize>,
    window: Window,
    /// Whether a dispatcher waits at the gate, by class.
    dispatching: [bool; 2],
    requests: u64,
    pub closed: bool,
    /// Whether the layer is being streamed again.
    pub refilling: bool,
}

/// The order of a layer's chunks in the blob.
pub(super) struct Ranks {
    /// Chunk by rank, and rank by chunk; `None` if both are the same, as they are in nearly all layers.
    orders: Option<(Vec<u32>, Vec<u32>)>,
}

impl Ranks {
    pub fn new(chunks: &[crate::layer::Chunk]) -> Self {
        if chunks.is_sorted_by_key(|chunk| chunk.blob_offset) {
            return Ranks { orders: None };
        }
        // An index has at most 8 Mi chunks.
        let mut by_rank: Vec<u32> = (0..chunks.len() as u32).collect();
        by_rank.sort_by_key(|&at| chunks[at as usize].blob_offset);
        let mut by_chunk = vec![0; chunks.len()];
        for (rank, &chunk) in by_rank.iter().enumerate() {
            by_chunk[chunk as usize] = rank as u32;
        }
        Ranks {
            orders: Some((by_rank, by_chunk)),
        }
    }

    pub fn chunk(&self, rank: usize) -> usize {
        match &self.orders {
            Some((by_rank, _)) => by_rank.get(rank).map_or(usize::MAX, |&chunk| chunk as usize),
            None => rank,
        }
    }

    pub fn rank(&self, chunk: usize) -> usize {
        match &self.orders {
            Some((_, by_chunk)) => by_chunk.get(chunk).map_or(usize::MAX, |&rank| rank as usize),
            None => chunk,
        }
    }
}

/// The owner of each chunk: a file whose content is in it, and that file's directory.
pub(super) fn owners(index: &LayerIndex) -> Vec<Owner> {
    let chunks = index.chunks();
    let mut owners = vec![Owner::default(); chunks.len()];
    for (dir, inode) in (ROOT_INO..).zip(index.inodes()) {
        for entry in index.entries(inode) {
            let Some(file) = index.inode(entry.ino).filter(|inode| inode.is_reg()) else {
                continue;
            };
            let places = owners.get_mut(index.chunks_at(file.data, file.size));
            places
                .into_iter()
                .for_each(|places| places.fill(Owner { dir, file: entry.ino }));
        }
    }
    owners
}

/// A request that is to be made.
pub(super) struct Job {
    /// Number of the request within the layer.
    pub id: u64,
    pub plan: Plan,
}

impl Queue {
    /// Asks for a chunk.
    pub fn want(&mut self, chunk: usize, rank: usize, class: Class, waiter: Option<Waiter>) {
        let pending = self.chunks.entry(chunk).or_insert_with(|| {
            self.background.insert(rank);
            Pending {
                place: Place::Queued(Class::Background),
                damaged: 0,
                waiters: Vec::new(),
            }
        });
        pending.waiters.extend(waiter);
        // Also promotes a chunk that was queued without a reader.
        if class == Class::Demand && pending.place == Place::Queued(Class::Background) {
            pending.place = Place::Queued(Class::Demand);
            self.background.remove(&rank);
            self.demand.insert(rank);
        }
    }

    /// Asks for a chunk that a stream under way, or about to begin, will deliver.
    pub fn want_streamed(&mut self, chunk: usize, waiter: Waiter) {
        let pending = self.chunks.entry(chunk).or_insert_with(|| Pending {
            place: Place::Flying(0),
            damaged: 0,
            waiters: Vec::new(),
        });
        pending.waiters.push(waiter);
    }

    /// Whether a dispatcher of this class has to be started; it is taken to be started then.
    pub fn needs_dispatcher(&mut self, class: Class) -> bool {
        let queue = match class {
            Class::Demand => &self.demand,
            Class::Background => &self.background,
        };
        let flag = &mut self.dispatching[class as usize];
        let needed = !*flag && !queue.is_empty() && !self.closed;
        *flag |= needed;
        needed
    }

    /// A dispatcher has been let in: the request it makes, if anything is still to be fetched. `blob` tells a rank's place in the
    /// blob, `ready` whether it is there.
    pub fn next<V: View>(&mut self, class: Class, ranks: &Ranks, view: &V, max_request: u64) -> Option<Job> {
        self.dispatching[class as usize] = false;
        let seed = match class {
            Class::Demand => self.demand.first(),
            Class::Background => self.background.first(),
        };
        let seed = *seed?;
        let alone = class == Class::Background || self.chunks.get(&ranks.chunk(seed)).is_some_and(|p| p.damaged > 0);
        let asked = Asked {
            chunks: &self.chunks,
            ranks,
            view,
        };
        let plan = self.window.plan(&asked, seed, max_request, alone);
        self.requests += 1;
        let id = self.requests;
        for &rank in &plan.ranks {
            self.demand.remove(&rank);
            self.background.remove(&rank);
            let pending = self.chunks.entry(ranks.chunk(rank)).or_insert_with(|| Pending {
                place: Place::Flying(id),
                damaged: 0,
                waiters: Vec::new(),
            });
            pending.place = Place::Flying(id);
        }
        Some(Job { id, plan })
    }

    /// Whether the chunk is in the request with number `id`.
    pub fn is_flying(&self, chunk: usize, id: u64) -> bool {
        self.chunks.get(&chunk).is_some_and(|p| p.place == Place::Flying(id))
    }

    /// Whether anyone waits for the chunk.
    pub fn is_awaited(&self, chunk: usize) -> bool {
        self.chunks
            .get(&chunk)
            .is_some_and(|p| p.waiters.iter().any(|w| !w.is_closed()))
    }

    /// Ends the way of a chunk: those who wait for it have to be answered by the caller.
    pub fn take(&mut self, chunk: usize, rank: usize) -> Vec<Waiter> {
        self.demand.remove(&rank);
        self.background.remove(&rank);
        self.chunks.remove(&chunk).map_or_else(Vec::new, |p| p.waiters)
    }

    /// Leaves a chunk to a stream, if anyone waits for it; otherwise it is given up.
    pub fn leave_to_stream(&mut self, chunk: usize) {
        if self.is_awaited(chunk) {
            if let Some(pending) = self.chunks.get_mut(&chunk) {
                pending.place = Place::Flying(0);
            }
        } else {
            self.chunks.remove(&chunk);
        }
    }

    /// Puts a chunk that arrived damaged back into the queue, if it has been damaged less than `limit` times and anyone waits for it.
    pub fn again(&mut self, chunk: usize, rank: usize, limit: u32) -> bool {
        let awaited = self.is_awaited(chunk);
        let Some(pending) = self.chunks.get_mut(&chunk) else {
            return false;
        };
        pending.damaged += 1;
        let again = awaited && pending.damaged < limit;
        if again {
            pending.place = Place::Queued(Class::Demand);
            self.demand.insert(rank);
        }
        again
    }

    /// Everyone who waits for anything; the queue is empty then.
    pub fn drain(&mut self) -> Vec<Waiter> {
        self.demand.clear();
        self.background.clear();
        self.chunks.drain().flat_map(|(_, pending)| pending.waiters).collect()
    }

    /// Whether any chunk is asked for.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }
}

/// The layer as the queue needs to see it.
pub(super) trait View {
    /// Number of chunks.
    fn len(&self) -> usize;
    /// Bytes of the blob that hold a chunk.
    fn blob(&self, chunk: usize) -> std::ops::Range<u64>;
    /// The file that a chunk belongs to.
    fn owner(&self, chunk: usize) -> Owner;
    /// Whether a chunk is on disk.
    fn is_ready(&self, chunk: usize) -> bool;
}

struct Asked<'a, V> {
    chunks: &'a HashMap<usize, Pending>,
    ranks: &'a Ranks,
    view: &'a V,
}

impl<V: View> Chunks for Asked<'_, V> {
    fn len(&self) -> usize {
        self.view.len()
    }

    fn blob(&self, rank: usize) -> std::ops::Range<u64> {
        self.view.blob(self.ranks.chunk(rank))
    }

    fn owner(&self, rank: usize) -> Owner {
        self.view.owner(self.ranks.chunk(rank))
    }

    fn state(&self, rank: usize) -> State {
        let chunk = self.ranks.chunk(rank);
        match self.chunks.get(&chunk).map(|pending| pending.place) {
            Some(Place::Queued(_)) => State::Wanted,
            Some(Place::Flying(_)) => State::Busy,
            None if self.view.is_ready(chunk) => State::Busy,
            None => State::Absent,
        }
    }
}
