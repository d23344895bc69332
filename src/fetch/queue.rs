//! The chunks of one layer that are asked for: who waits for each, which of them a request has, and which come next.
//!
//! Every chunk in `chunks` is either queued (its rank is in `queued`, under its class) or flying (one request has it). It leaves
//! with [`Queue::take`], by which its waiters are answered; so a waiter is lost only with the queue itself. What somebody begins to wait
//! for moves to the class of that, and so does the place of a request that has it; what all have left sinks to the background.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::FetchError;
use super::onward::Runs;
use super::schedule::{Class, Remote};
use super::window::{Bounds, Chunks, Owner, PART, Plan, State, Window};
use crate::layer::{ChunkTable, Codec, LayerIndex, ROOT_INO};

/// Chunks of one layer that are queued to be read ahead: enough for a few requests. What was to be read ahead while so many wait is
/// dropped.
const AHEAD_QUEUED: usize = 1024;
/// Bytes of memory that any request may take to decode a chunk: as much as a chunk holds in all formats, if nothing else was asked for.
const DECODED: u64 = 4 << 20;
/// Bytes of a body that are copied out of it at most, to be decoded while the rest arrives; a larger chunk is decoded when all is here. It is memory that
/// each request has: with four times as much, fewer large ones fit side by side, and all of an image was read in 1.08 of the time where a
/// round trip takes 100 ms.
pub(super) const COPIED: u64 = 1 << 20;

/// What a waiter gets: the part of the chunk that it asked for.
pub(super) type Answer = Result<Bytes, FetchError>;

/// Who waits for a chunk.
pub(super) struct Waiter {
    sender: oneshot::Sender<Answer>,
    /// The bytes of the chunk that it wants. It gets a copy of them: a chunk may be a thousand times as large as a read.
    part: Range<usize>,
}

impl Waiter {
    /// One that wants these bytes of a chunk; and where they arrive.
    pub fn new(part: Range<usize>) -> (Waiter, oneshot::Receiver<Answer>) {
        let (sender, wait) = oneshot::channel();
        (Waiter { sender, part }, wait)
    }

    /// Answers it with its part of the chunk.
    pub fn send(self, answer: &Answer) {
        let answer = answer.as_ref().map_err(Clone::clone);
        // A chunk has all its bytes when it is verified.
        let part = answer.map(|chunk| Bytes::copy_from_slice(chunk.get(self.part).unwrap_or_default()));
        let _ = self.sender.send(part);
    }
}

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
    /// Whether what is beside it may come with it, although nobody waits for it.
    with_neighbours: bool,
    waiters: Vec<Waiter>,
}

/// Chunks asked for.
#[derive(Default)]
pub(super) struct Queue {
    chunks: HashMap<usize, Pending>,
    /// Ranks by class.
    queued: [BTreeSet<usize>; 4],
    window: Window,
    /// Files that are read from one end to the other.
    runs: Runs,
    /// Whether a dispatcher waits for a place, by class.
    dispatching: [bool; 4],
    /// Requests under way, by their number.
    flights: HashMap<u64, Flight>,
    requests: u64,
    pub closed: bool,
    /// Whether the layer is being streamed again.
    pub refilling: bool,
    /// Whether it is known what will be read, and it is asked for ahead: until all of that has its request, nothing else is taken ahead.
    pub is_known: bool,
}

/// A request under way.
struct Flight {
    class: Class,
    place: Remote,
    chunks: Vec<usize>,
}

impl Flight {
    fn rank(&mut self, class: Class) {
        if class != self.class {
            self.class = class;
            self.place.rank(class);
        }
    }
}

/// The order of a layer's chunks in the blob.
pub(super) struct Ranks {
    /// Chunk by rank, and rank by chunk; `None` if both are the same, as they are in nearly all layers.
    orders: Option<(Vec<u32>, Vec<u32>)>,
}

impl Ranks {
    pub fn new(chunks: &ChunkTable) -> Self {
        if chunks.iter().is_sorted_by_key(|chunk| chunk.blob_offset) {
            return Ranks { orders: None };
        }
        // An index has at most 8 Mi chunks.
        let offsets: Vec<u64> = chunks.iter().map(|chunk| chunk.blob_offset).collect();
        let mut by_rank: Vec<u32> = (0..offsets.len() as u32).collect();
        by_rank.sort_by_key(|&at| offsets[at as usize]);
        let mut by_chunk = vec![0; offsets.len()];
        for (rank, &chunk) in by_rank.iter().enumerate() {
            by_chunk[chunk as usize] = rank as u32;
        }
        Ranks {
            orders: Some((by_rank, by_chunk)),
        }
    }

    /// The order of chunks that are in order.
    #[cfg(test)]
    pub fn in_order() -> Self {
        Ranks { orders: None }
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
    let alone = |at: usize| Owner {
        part: at as u32,
        ..Owner::default()
    };
    let mut owners: Vec<Owner> = (0..chunks.len()).map(alone).collect();
    // Where a chunk can hold several files, and a file is in few of them, each chunk is a part of its own.
    let parts = matches!(index.codec(), Codec::Gzip | Codec::Zstd);
    for (dir, inode) in (ROOT_INO..).zip(index.inodes()) {
        for entry in index.entries(inode) {
            let Some(file) = index.inode(entry.ino).filter(|inode| inode.is_reg()) else {
                continue;
            };
            let range = index.chunks_at(file.data, file.size);
            let places = owners.get_mut(range.clone()).into_iter().flatten();
            let chunks = chunks.get(range).unwrap_or_default();
            // A streamed layer has other things in a file's first chunk.
            let parts = parts && chunks.first().is_some_and(|chunk| chunk.data_offset >= file.data);
            for (owner, chunk) in places.zip(chunks) {
                (owner.dir, owner.file) = (dir, entry.ino);
                if parts {
                    owner.part = (chunk.data_offset.saturating_sub(file.data) / PART) as u32;
                }
            }
        }
    }
    owners
}

/// A request that is to be made.
pub(super) struct Job {
    /// Number of the request within the layer.
    pub id: u64,
    pub plan: Plan,
    /// Bytes of memory that it takes.
    pub memory: u64,
    /// Those of them that decoding may take at once.
    pub decoded: u64,
}

/// What a dispatcher that has a place is to do.
pub(super) enum Next {
    /// Nothing is asked for any more.
    Nothing,
    /// Ask again, for so much memory.
    More(u64),
    Request(Job),
}

/// What is known of the place that a request has.
pub(super) struct Terms<'a> {
    pub class: Class,
    pub place: &'a Remote,
    /// Memory that was asked for.
    pub memory: u64,
    /// Whether others wait for places like it.
    pub contended: bool,
    /// Largest ranged request, in bytes.
    pub max_request: u64,
}

/// Bounds of a request that begins with a chunk, and the memory that it may take.
fn bounds<V: View>(view: &V, chunk: usize, max_request: u64) -> (Bounds, u64) {
    let blob = view.blob(chunk);
    let bounds = Bounds {
        bytes: max_request.max(blob.end.saturating_sub(blob.start)),
        decoded: DECODED.max(view.decoded(chunk)),
    };
    let memory = bounds.bytes.saturating_add(COPIED).saturating_add(bounds.decoded);
    (bounds, memory)
}

impl Queue {
    /// Asks for a chunk. Whether a request that reads ahead has it, and is waited for from now on.
    pub fn want(&mut self, chunk: usize, rank: usize, class: Class, waiter: Option<Waiter>) -> bool {
        let queued = &mut self.queued;
        let pending = self.chunks.entry(chunk).or_insert_with(|| {
            queued[class as usize].insert(rank);
            Pending {
                place: Place::Queued(class),
                damaged: 0,
                with_neighbours: false,
                waiters: Vec::new(),
            }
        });
        pending.waiters.extend(waiter);
        match pending.place {
            // Promotes what was queued, or is under way, for less.
            Place::Queued(old) if class < old => {
                pending.place = Place::Queued(class);
                queued[old as usize].remove(&rank);
                queued[class as usize].insert(rank);
            }
            Place::Flying(id) => {
                if let Some(flight) = self.flights.get_mut(&id).filter(|flight| class < flight.class) {
                    let ahead = flight.class == Class::ReadAhead && class == Class::Demand;
                    flight.rank(class);
                    return ahead;
                }
            }
            Place::Queued(_) => {}
        }
        false
    }

    /// Somebody waits for the chunk at `rank`, with which comes what is before `end` in the blob: if it is of a file that is read from one end to
    /// the other, what comes next is asked for too.
    pub fn go_on<V: View>(&mut self, ranks: &Ranks, view: &V, rank: usize, end: u64) {
        let chunk = ranks.chunk(rank);
        let (owner, blob) = (view.owner(chunk), view.blob(chunk));
        if owner.file == 0 {
            return;
        }
        let comes = blob.start..blob.end.max(end);
        let Some(end) = self.runs.wait(owner, &comes) else {
            return;
        };
        for rank in rank + 1..view.len() {
            let chunk = ranks.chunk(rank);
            let next = view.owner(chunk);
            let is_same = (next.dir, next.file) == (owner.dir, owner.file);
            let is_full = self.queued[Class::ReadAhead as usize].len() >= AHEAD_QUEUED;
            if !is_same || is_full || view.blob(chunk).start >= end {
                break;
            }
            if !self.chunks.contains_key(&chunk) && !view.is_ready(chunk) {
                self.want(chunk, rank, Class::ReadAhead, None);
            }
        }
    }

    /// What is beside a chunk that is asked for may come with it, as with what somebody waits for.
    pub fn take_neighbours(&mut self, chunk: usize) {
        if let Some(pending) = self.chunks.get_mut(&chunk) {
            pending.with_neighbours = true;
        }
    }

    /// Asks for a chunk that a stream under way, or about to begin, will deliver.
    pub fn want_streamed(&mut self, chunk: usize, waiter: Waiter) {
        let pending = self.chunks.entry(chunk).or_insert_with(|| Pending {
            place: Place::Flying(0),
            damaged: 0,
            with_neighbours: false,
            waiters: Vec::new(),
        });
        pending.waiters.push(waiter);
    }

    /// Somebody waits for a chunk no more. If nobody else does, it sinks to the background; whether it is queued there now.
    pub fn left(&mut self, chunk: usize, rank: usize) -> bool {
        if self.is_awaited(chunk) {
            return false;
        }
        let Some(pending) = self.chunks.get_mut(&chunk) else {
            return false;
        };
        pending.waiters.clear();
        match pending.place {
            Place::Queued(class) => {
                pending.place = Place::Queued(Class::Background);
                self.queued[class as usize].remove(&rank);
                self.queued[Class::Background as usize].insert(rank);
                true
            }
            Place::Flying(id) => {
                let awaited = |flight: &Flight| flight.chunks.iter().any(|&chunk| self.is_awaited(chunk));
                if self.flights.get(&id).is_some_and(|flight| !awaited(flight))
                    && let Some(flight) = self.flights.get_mut(&id)
                {
                    flight.rank(Class::Background);
                }
                false
            }
        }
    }

    /// The memory to ask for, if a dispatcher of this class has to be started; it is taken to be started then.
    pub fn needs_dispatcher<V: View>(
        &mut self,
        class: Class,
        ranks: &Ranks,
        view: &V,
        max_request: u64,
    ) -> Option<u64> {
        if self.dispatching[class as usize] || self.closed {
            return None;
        }
        let seed = *self.queued[class as usize].first()?;
        self.dispatching[class as usize] = true;
        Some(bounds(view, ranks.chunk(seed), max_request).1)
    }

    /// A dispatcher has been let in: the request it makes, if anything is still to be fetched.
    pub fn next<V: View>(&mut self, ranks: &Ranks, view: &V, terms: &Terms<'_>) -> Next {
        let class = terms.class;
        let Some(&seed) = self.queued[class as usize].first() else {
            self.dispatching[class as usize] = false;
            return Next::Nothing;
        };
        let (bounds, memory) = bounds(view, ranks.chunk(seed), terms.max_request);
        if memory > terms.memory {
            return Next::More(memory);
        }
        self.dispatching[class as usize] = false;
        let damaged = self.chunks.get(&ranks.chunk(seed)).is_some_and(|p| p.damaged > 0);
        let asked = Asked {
            chunks: &self.chunks,
            ranks,
            view,
            // Where others wait, what is less urgent does not travel along.
            least: if terms.contended { class } else { Class::Background },
        };
        let is_known = self.is_known && !self.queued[Class::Prefetch as usize].is_empty();
        let is_guess = self
            .chunks
            .get(&ranks.chunk(seed))
            .is_some_and(|pending| pending.with_neighbours);
        let mut plan = match class {
            Class::Prefetch if is_guess && !damaged => self.window.plan_guess(&asked, seed, bounds),
            _ => {
                let is_alone = class != Class::Demand || damaged || is_known;
                self.window.plan(&asked, seed, bounds, is_alone)
            }
        };
        self.is_known = is_known;
        let ahead = match terms.contended {
            true => plan.split_ahead(&asked),
            false => Vec::new(),
        };
        self.requests += 1;
        let id = self.requests;
        for &rank in &plan.ranks {
            self.dequeue(rank);
            let pending = self.chunks.entry(ranks.chunk(rank)).or_insert_with(|| Pending {
                place: Place::Flying(id),
                damaged: 0,
                with_neighbours: false,
                waiters: Vec::new(),
            });
            pending.place = Place::Flying(id);
        }
        for rank in ahead {
            if self.queued[Class::ReadAhead as usize].len() < AHEAD_QUEUED {
                self.want(ranks.chunk(rank), rank, Class::ReadAhead, None);
            }
        }
        if class == Class::Demand && !damaged && !terms.contended {
            self.go_on(ranks, view, seed, plan.range.end);
        }
        let chunks: Vec<usize> = plan.ranks.iter().map(|&rank| ranks.chunk(rank)).collect();
        let decoded = chunks.iter().map(|&chunk| view.decoded(chunk)).max().unwrap_or(0);
        let bytes = plan.range.end.saturating_sub(plan.range.start);
        let copied = if chunks.len() > 1 { bytes.min(COPIED) } else { 0 };
        self.flights.insert(
            id,
            Flight {
                class,
                place: terms.place.clone(),
                chunks,
            },
        );
        Next::Request(Job {
            id,
            plan,
            memory: bytes.saturating_add(copied).saturating_add(decoded),
            decoded,
        })
    }

    fn dequeue(&mut self, rank: usize) {
        for queued in &mut self.queued {
            queued.remove(&rank);
        }
    }

    /// Whether anything of this class waits for its request.
    pub fn is_queued(&self, class: Class) -> bool {
        !self.queued[class as usize].is_empty()
    }

    /// Takes a chunk back that was asked for ahead, unless somebody waits for it or a request has it.
    pub fn forgo(&mut self, chunk: usize, rank: usize) {
        let is_forgone = |pending: &Pending| pending.place == Place::Queued(Class::Prefetch);
        if self.chunks.get(&chunk).is_some_and(is_forgone) && !self.is_awaited(chunk) {
            self.take(chunk, rank);
        }
    }

    /// A request has come to its end.
    pub fn landed(&mut self, id: u64) {
        self.flights.remove(&id);
    }

    /// The class of a request under way.
    pub fn class_of(&self, id: u64) -> Class {
        self.flights.get(&id).map_or(Class::Background, |flight| flight.class)
    }

    /// Whether the chunk is in the request with number `id`.
    pub fn is_flying(&self, chunk: usize, id: u64) -> bool {
        self.chunks.get(&chunk).is_some_and(|p| p.place == Place::Flying(id))
    }

    /// Whether anyone waits for the chunk.
    pub fn is_awaited(&self, chunk: usize) -> bool {
        self.chunks
            .get(&chunk)
            .is_some_and(|p| p.waiters.iter().any(|w| !w.sender.is_closed()))
    }

    /// Ends the way of a chunk: those who wait for it have to be answered by the caller.
    pub fn take(&mut self, chunk: usize, rank: usize) -> Vec<Waiter> {
        self.dequeue(rank);
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

    /// The chunks that are left to a stream.
    pub fn left_to_stream(&self) -> Vec<usize> {
        let left = self
            .chunks
            .iter()
            .filter(|(_, pending)| pending.place == Place::Flying(0));
        left.map(|(&chunk, _)| chunk).collect()
    }

    /// Puts the chunks that were left to a stream back into the queue, if anyone waits for them.
    pub fn requeue_streamed(&mut self, ranks: &Ranks) {
        for chunk in self.left_to_stream() {
            if !self.is_awaited(chunk) {
                self.chunks.remove(&chunk);
            } else if let Some(pending) = self.chunks.get_mut(&chunk) {
                pending.place = Place::Queued(Class::Demand);
                self.queued[Class::Demand as usize].insert(ranks.rank(chunk));
            }
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
            self.queued[Class::Demand as usize].insert(rank);
        }
        again
    }

    /// Puts a chunk of a request that failed for now back into the queue, if anyone waits for it; otherwise it is given up.
    pub fn later(&mut self, chunk: usize, rank: usize) -> bool {
        let awaited = self.is_awaited(chunk);
        match self.chunks.get_mut(&chunk) {
            Some(pending) if awaited => {
                pending.place = Place::Queued(Class::Demand);
                self.queued[Class::Demand as usize].insert(rank);
            }
            _ => {
                self.chunks.remove(&chunk);
            }
        }
        awaited
    }

    /// Gives up what was left to a stream and nobody waits for; whether anything is left to it still.
    pub fn keep_awaited(&mut self) -> bool {
        let (awaited, alone): (Vec<usize>, Vec<usize>) = self
            .left_to_stream()
            .into_iter()
            .partition(|&chunk| self.is_awaited(chunk));
        for chunk in alone {
            self.chunks.remove(&chunk);
        }
        !awaited.is_empty()
    }

    /// Everyone who waits for anything; the queue is empty then.
    pub fn drain(&mut self) -> Vec<Waiter> {
        self.queued.iter_mut().for_each(BTreeSet::clear);
        self.chunks.drain().flat_map(|(_, pending)| pending.waiters).collect()
    }

    /// Whether a chunk that is asked for is wanted by nobody but background work.
    pub fn is_unwanted(&self, chunk: usize) -> bool {
        let class = |pending: &Pending| match pending.place {
            Place::Queued(class) => class,
            Place::Flying(id) => self.class_of(id),
        };
        let pending = self.chunks.get(&chunk);
        pending.is_some_and(|p| p.waiters.is_empty() && class(p) == Class::Background)
    }

    /// Whether any of these chunks is asked for.
    pub fn asks_for_any(&self, chunks: &[usize]) -> bool {
        chunks.iter().any(|chunk| self.chunks.contains_key(chunk))
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
    fn blob(&self, chunk: usize) -> Range<u64>;
    /// The file that a chunk belongs to.
    fn owner(&self, chunk: usize) -> Owner;
    /// Whether a chunk is on disk.
    fn is_ready(&self, chunk: usize) -> bool;
    /// Bytes of a chunk when it is decoded.
    fn decoded(&self, chunk: usize) -> u64;
}

struct Asked<'a, V> {
    chunks: &'a HashMap<usize, Pending>,
    ranks: &'a Ranks,
    view: &'a V,
    /// What is queued in a less urgent class than this counts as not asked for.
    least: Class,
}

impl<V: View> Chunks for Asked<'_, V> {
    fn len(&self) -> usize {
        self.view.len()
    }

    fn blob(&self, rank: usize) -> Range<u64> {
        self.view.blob(self.ranks.chunk(rank))
    }

    fn owner(&self, rank: usize) -> Owner {
        self.view.owner(self.ranks.chunk(rank))
    }

    fn state(&self, rank: usize) -> State {
        let chunk = self.ranks.chunk(rank);
        match self.chunks.get(&chunk).map(|pending| pending.place) {
            Some(Place::Queued(class)) if class <= self.least => State::Wanted,
            Some(Place::Queued(_)) => State::Absent,
            Some(Place::Flying(_)) => State::Busy,
            None if self.view.is_ready(chunk) => State::Busy,
            None => State::Absent,
        }
    }

    fn decoded(&self, rank: usize) -> u64 {
        self.view.decoded(self.ranks.chunk(rank))
    }
}
