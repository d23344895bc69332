//! The read-ahead policy: which chunks one ranged request takes. Pure, so that it can be tested and tuned without a network.
//!
//! A request starts at a chunk that someone waits for. It takes further wanted chunks that follow in the blob, bridging small gaps;
//! then it goes on for a little, speculatively: files that are used together (the modules of a package) lie beside each other in
//! the blob, and a round trip costs as much as a hundred kilobytes. Each speculative byte counts, though: an image is started with a
//! tenth of its bytes, and most of the neighbours are not in it. So a request takes
//! - the rest of its file, if that is not much: programs and libraries are read from their start, and then all over;
//! - small files of the same directory, on both sides, and twice as much with each request that begins in that directory: of a
//!   directory that is asked for again and again, more is needed;
//! - tiny files of other directories, where they are in between;
//! - where reads go on from one file to the next, whatever follows, and twice as much each time.
//!
//! The numbers were chosen by replaying the reads of `python3 -c 'import numpy'` in Debian's packages (five eStargz layers, 167 MB, of
//! which the reads need 16.0 MB) against the chunks of those layers. With the numbers below it takes 44 requests and 20.4 MB; without
//! growth by directory 56 requests and 20.5 MB; with half the reach 53 and 20.5 MB; with twice the neighbours 45 and 21.8 MB; without
//! tiny files of other directories 46 and 19.3 MB.
//!
//! The same files shall cost the same in every format. Chunks of some dialects are small and content-defined, others as large as 4 MiB; so
//! what is taken or left is never a chunk, but all of the same *part* ([`PART`]) of a file. And where members have headers and paddings of
//! the tar between them, these are bridged ([`GAP`]): they take a hundred bytes, and would end each request after one file.
//! Measured over 240 MB of Python's, Perl's and a compiler's files: a seventh of the directories take 77 requests and 11.5 MB as skopeo's
//! zstd:chunked, 75 and 12.2 MB as eStargz; all of them 24 requests, and 26.
//!
//! A plan tells what is wanted ([`Plan::core`]) from what is only taken ahead on both sides of it, since that can be left out, or asked for
//! later, where others wait.
//!
//! Chunks are named by their *rank*: their position in the order of the blob.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::ops::Range;

/// Compressed bytes that are taken speculatively after a wanted chunk, and as many before it.
pub const REACH: u64 = 160 << 10;
/// The same for what is only guessed: both sides together cost less than the request that they may save, and so they are taken also where others
/// wait. In replays of walks, 48 KiB take the modules of Node and express with 30 requests and 5.3 MB, instead of 83 and 3.4, and numpy's with 26
/// and 10.2 MB, instead of 34 and 9.0; 16 KiB with 41 and 4.4, and 29 and 9.5; 128 KiB with 20 and 6.5, and 21 and 11.3.
pub const LITTLE: u64 = 48 << 10;
/// Doublings of that by requests that began in one directory.
const LITTLE_HEAT_MAX: u32 = 2;
/// Most of them where a directory is asked for again.
pub const REACH_MAX: u64 = 640 << 10;
/// Largest chunk, in compressed bytes, that is taken because a chunk of the same directory is wanted: larger files are rarely read
/// because their neighbours are.
pub const NEIGHBOUR: u64 = 48 << 10;
/// The largest of them where a directory is asked for again.
pub const NEIGHBOUR_MAX: u64 = 96 << 10;
/// Largest chunk of another directory, in compressed bytes, that does not end the reach.
pub const TINY: u64 = 8 << 10;
/// A wanted chunk that is larger than this, in compressed bytes, says nothing of its neighbours, however often the directory is asked for.
const LARGE: u64 = 256 << 10;
/// Doublings of the reach by requests that began in one directory.
const HEAT_MAX: u32 = 3;
/// Compressed bytes of the rest of a file that are taken with a chunk of it.
pub const REST: u64 = 2 << 20;
/// Most compressed bytes that are taken speculatively, reached after a few requests that follow each other: as much as a request
/// carries by default.
pub const AHEAD_MAX: u64 = 4 << 20;
/// Compressed bytes between two wanted chunks that are rather fetched than paid for with another request.
pub const BRIDGE: u64 = 64 << 10;
/// Compressed bytes between the end of an earlier request and a wanted chunk up to which it is taken to follow that request.
pub const NEAR: u64 = 64 << 10;
/// Bytes of a file that are taken together: what stargz puts into a chunk. By that, dialects with smaller chunks make the same requests.
pub const PART: u64 = 4 << 20;
/// Chunks of a part that are looked at; the smallest on average have 64 KiB.
const PART_CHUNKS: usize = 512;
/// Compressed bytes between two chunks that do not end the reach: headers and paddings of a few dozen entries without content.
pub const GAP: u64 = 8 << 10;
/// Places in the blob that are remembered as being read onwards: as many as files that are read sequentially side by side.
const TRAILS: usize = 16;
/// Chunks behind a request that are looked at for being there already.
const SKIP: usize = 256;

/// What is known of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Neither there nor asked for.
    Absent,
    /// Someone asked for it, and no request has it.
    Wanted,
    /// It is there, or a request under way has it.
    Busy,
}

/// The file that a chunk belongs to, and that file's directory, as any numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Owner {
    /// The directory.
    pub dir: u32,
    /// The file.
    pub file: u32,
    /// The part of the file.
    pub part: u32,
}

impl Owner {
    fn is_same_file(self, other: Owner) -> bool {
        (self.dir, self.file) == (other.dir, other.file)
    }
}

/// The chunks of a layer in the order of the blob.
pub trait Chunks {
    /// How many there are.
    fn len(&self) -> usize;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Bytes of the blob that hold the chunk at `rank`. Their starts do not decrease with the rank.
    fn blob(&self, rank: usize) -> Range<u64>;
    /// The file it belongs to.
    fn owner(&self, rank: usize) -> Owner;
    /// What is known of it.
    fn state(&self, rank: usize) -> State;
    /// Bytes of memory that decoding it takes.
    fn decoded(&self, rank: usize) -> u64;
}

/// What one request may take. The chunk that it begins with may take more by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Bytes of the blob.
    pub bytes: u64,
    /// Bytes of memory to decode one of its chunks.
    pub decoded: u64,
}

/// One ranged request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Chunks that it shall deliver, in order.
    pub ranks: Vec<usize>,
    /// Bytes of the blob.
    pub range: Range<u64>,
    /// Those of them that are wanted, or belong to a part that is; what is before and behind is taken ahead.
    pub core: Range<u64>,
}

impl Plan {
    /// Takes away what is only taken ahead; its ranks.
    pub fn split_ahead(&mut self, chunks: &impl Chunks) -> Vec<usize> {
        let (core, range) = (self.core.clone(), std::mem::replace(&mut self.range, self.core.clone()));
        if core == range {
            return Vec::new();
        }
        let is_core = |rank: &usize| {
            let blob = chunks.blob(*rank);
            core.start <= blob.start && blob.end <= core.end
        };
        let (kept, ahead) = std::mem::take(&mut self.ranks).into_iter().partition(is_core);
        self.ranks = kept;
        ahead
    }
}

/// Where a layer was read lately.
#[derive(Debug, Default)]
pub struct Window {
    /// The latest last.
    trails: Vec<Trail>,
    /// How many requests began in a directory; never more entries than directories.
    heat: HashMap<u32, u32>,
}

/// A request made lately.
#[derive(Debug)]
struct Trail {
    /// Its end in the blob, or that of what was there already behind it.
    end: u64,
    /// The file at its end.
    file: Owner,
    /// Whether the requests so far went on from one file to another.
    onward: bool,
    /// Bytes that the next request may take ahead if it follows this one.
    next: u64,
}

/// What a request may take of what nobody asked for.
#[derive(Debug, Clone, Copy)]
struct Reach {
    /// Bytes on either side.
    bytes: u64,
    /// Largest chunk of the same directory.
    neighbour: u64,
    /// Whether anything may be taken that follows.
    any: bool,
}

impl Window {
    /// Plans a request within `bounds` that begins with a chunk of which it is guessed that what is beside it will be read too, though nobody waits for
    /// it: a little of that belongs to what is wanted.
    pub fn plan_guess(&mut self, chunks: &impl Chunks, seed: usize, bounds: Bounds) -> Plan {
        let first = chunks.blob(seed);
        let mut plan = Plan {
            ranks: vec![seed],
            range: first.clone(),
            core: first,
        };
        take_wanted(&mut plan, chunks, bounds);
        let heat = self.heat.entry(chunks.owner(seed).dir).or_default();
        let little = LITTLE << (*heat).min(LITTLE_HEAT_MAX);
        *heat = (*heat + 1).min(HEAT_MAX);
        let reach = Reach {
            bytes: little,
            neighbour: little,
            any: false,
        };
        extend(&mut plan, chunks, reach, bounds);
        extend_back(&mut plan, chunks, reach, bounds);
        plan.core = plan.range.clone();
        plan
    }

    /// Plans a request within `bounds` that begins with the chunk at rank `seed`. With `alone`, only wanted chunks are taken.
    pub fn plan(&mut self, chunks: &impl Chunks, seed: usize, bounds: Bounds, alone: bool) -> Plan {
        let first = chunks.blob(seed);
        let mut plan = Plan {
            ranks: vec![seed],
            range: first.clone(),
            core: first.clone(),
        };
        take_wanted(&mut plan, chunks, bounds);
        if !alone {
            take_parts(&mut plan, chunks, bounds);
        }
        plan.core = plan.range.clone();
        let owner = chunks.owner(seed);
        let trail = self.follow(plan.core.start);
        // The rest of a large file does not show that what is behind the file will be read.
        let onward = trail
            .as_ref()
            .is_some_and(|trail| trail.onward || !trail.file.is_same_file(owner));
        let next = trail.map_or(REACH, |trail| trail.next);
        let near = self.reach(owner, size(chunks, &(part_start(chunks, seed)..part_end(chunks, seed))));
        if !alone {
            let reach = match onward {
                true => Reach {
                    bytes: next,
                    any: true,
                    ..near
                },
                false => near,
            };
            let last = plan.ranks.last().copied().unwrap_or(seed);
            let ahead = reach.bytes.max(rest(chunks, last, plan.range.end));
            extend(&mut plan, chunks, Reach { bytes: ahead, ..reach }, bounds);
            if !onward {
                extend_back(&mut plan, chunks, near, bounds);
            }
        }
        let last = plan.ranks.last().copied().unwrap_or(seed);
        // Reads pass unseen over what is there already.
        let there = (last + 1..chunks.len())
            .take(SKIP)
            .take_while(|&rank| chunks.state(rank) == State::Busy)
            .last();
        // At least as much as was wanted now: large chunks would never be taken ahead otherwise.
        let taken = plan.range.end.saturating_sub(plan.range.start);
        self.remember(Trail {
            end: there.map_or(plan.range.end, |rank| plan.range.end.max(chunks.blob(rank).end)),
            file: chunks.owner(last),
            onward,
            next: next.saturating_mul(2).max(taken).min(AHEAD_MAX),
        });
        plan
    }

    /// What a request may take on both sides of a part of `size` bytes that belongs to `owner`; counts the request.
    fn reach(&mut self, owner: Owner, size: u64) -> Reach {
        let heat = self.heat.entry(owner.dir).or_default();
        let doublings = if size > LARGE { 0 } else { *heat };
        *heat = (*heat + 1).min(HEAT_MAX);
        Reach {
            bytes: (REACH << doublings).min(REACH_MAX),
            neighbour: (NEIGHBOUR << doublings).min(NEIGHBOUR_MAX),
            any: false,
        }
    }

    /// The request that one which begins at `start` follows.
    fn follow(&mut self, start: u64) -> Option<Trail> {
        // Spans that share a byte follow each other too.
        let follows = |trail: &Trail| start.saturating_add(1) >= trail.end && start.saturating_sub(trail.end) <= NEAR;
        let at = self.trails.iter().rposition(follows)?;
        Some(self.trails.remove(at))
    }

    fn remember(&mut self, trail: Trail) {
        if self.trails.len() >= TRAILS {
            self.trails.remove(0);
        }
        self.trails.push(trail);
    }
}

/// Whether a request for `range` may also take what is at `blob`.
fn fits(range: &Range<u64>, blob: &Range<u64>, bounds: Bounds) -> bool {
    range.end.max(blob.end).saturating_sub(range.start.min(blob.start)) <= bounds.bytes
}

/// Wanted chunks that follow, over gaps that are not worth a request.
fn take_wanted(plan: &mut Plan, chunks: &impl Chunks, bounds: Bounds) {
    let Some(&seed) = plan.ranks.last() else { return };
    for rank in seed + 1..chunks.len() {
        let blob = chunks.blob(rank);
        if blob.start > plan.range.end.saturating_add(BRIDGE) || !fits(&plan.range, &blob, bounds) {
            break;
        }
        if chunks.state(rank) == State::Wanted {
            if chunks.decoded(rank) > bounds.decoded {
                break;
            }
            // What is bridged is fetched anyway: it may as well be kept.
            let bridged = plan.ranks.last().map_or(rank, |last| last + 1);
            let kept = |r: &usize| chunks.state(*r) == State::Absent && chunks.decoded(*r) <= bounds.decoded;
            plan.ranks.extend((bridged..rank).filter(kept));
            plan.ranks.push(rank);
            plan.range.end = plan.range.end.max(blob.end);
        }
    }
}

/// What else belongs to the parts at both ends of the plan.
fn take_parts(plan: &mut Plan, chunks: &impl Chunks, bounds: Bounds) {
    let (Some(&first), Some(&last)) = (plan.ranks.first(), plan.ranks.last()) else {
        return;
    };
    let may = |range: &Range<u64>, rank: usize| {
        let usable = chunks.state(rank) != State::Busy && chunks.decoded(rank) <= bounds.decoded;
        usable && fits(range, &chunks.blob(rank), bounds)
    };
    for rank in last + 1..part_end(chunks, last) {
        if !may(&plan.range, rank) {
            break;
        }
        plan.ranks.push(rank);
        plan.range.end = plan.range.end.max(chunks.blob(rank).end);
    }
    let mut before = Vec::new();
    for rank in (part_start(chunks, first)..first).rev() {
        if !may(&plan.range, rank) {
            break;
        }
        before.push(rank);
        plan.range.start = plan.range.start.min(chunks.blob(rank).start);
        plan.range.end = plan.range.end.max(chunks.blob(rank).end);
    }
    plan.ranks.splice(0..0, before.into_iter().rev());
}

/// The rank behind the last chunk of the part that the chunk at `rank` is of.
fn part_end(chunks: &impl Chunks, rank: usize) -> usize {
    let owner = chunks.owner(rank);
    let mut end = rank + 1;
    while end < chunks.len().min(rank + PART_CHUNKS) && chunks.owner(end) == owner && is_near(chunks, end - 1, end) {
        end += 1;
    }
    end
}

/// The rank of the first chunk of the part that the chunk at `rank` is of.
fn part_start(chunks: &impl Chunks, rank: usize) -> usize {
    let owner = chunks.owner(rank);
    let mut start = rank;
    while start > rank.saturating_sub(PART_CHUNKS)
        && chunks.owner(start - 1) == owner
        && is_near(chunks, start - 1, start)
    {
        start -= 1;
    }
    start
}

fn is_near(chunks: &impl Chunks, before: usize, after: usize) -> bool {
    chunks.blob(after).start <= chunks.blob(before).end.saturating_add(GAP)
}

/// Bytes of the blob from the beginning of the first chunk to the end of the last one.
fn size(chunks: &impl Chunks, ranks: &Range<usize>) -> u64 {
    let end = ranks.end.checked_sub(1).map_or(0, |last| chunks.blob(last).end);
    end.saturating_sub(chunks.blob(ranks.start).start)
}

/// Whether a part looks as if it were used together with the chunk at rank `with`.
fn related(chunks: &impl Chunks, part: &Range<usize>, with: usize, reach: Reach) -> bool {
    let (this, other) = (chunks.owner(part.start), chunks.owner(with));
    let limit = if this.dir == other.dir { reach.neighbour } else { TINY };
    reach.any || this.is_same_file(other) || size(chunks, part) <= limit
}

/// Whether nothing of a part is there or asked for, and all of it can be decoded.
fn is_absent(chunks: &impl Chunks, part: &Range<usize>, bounds: Bounds) -> bool {
    part.clone()
        .all(|rank| chunks.state(rank) == State::Absent && chunks.decoded(rank) <= bounds.decoded)
}

/// Bytes of the blob from `end` to the end of the file that the chunk at `rank` belongs to; 0 if they are more than [`REST`].
fn rest(chunks: &impl Chunks, rank: usize, end: u64) -> u64 {
    let owner = chunks.owner(rank);
    let mut rest = 0;
    for rank in rank + 1..chunks.len() {
        if !chunks.owner(rank).is_same_file(owner) {
            break;
        }
        rest = chunks.blob(rank).end.saturating_sub(end);
        if rest > REST {
            return 0;
        }
    }
    rest
}

/// Takes absent parts that follow.
fn extend(plan: &mut Plan, chunks: &impl Chunks, reach: Reach, bounds: Bounds) {
    let Some(&last) = plan.ranks.last() else { return };
    let limit = plan.range.end.saturating_add(reach.bytes);
    let mut rank = last + 1;
    while rank < chunks.len() {
        let part = rank..part_end(chunks, rank);
        let blob = chunks.blob(rank).start..chunks.blob(part.end - 1).end;
        let near = blob.start <= plan.range.end.saturating_add(GAP) && blob.end <= limit;
        let taken = near && fits(&plan.range, &blob, bounds) && is_absent(chunks, &part, bounds);
        if !taken || !related(chunks, &part, last, reach) {
            break;
        }
        plan.range.end = plan.range.end.max(blob.end);
        rank = part.end;
        plan.ranks.extend(part);
    }
}

/// Takes absent parts that are before.
fn extend_back(plan: &mut Plan, chunks: &impl Chunks, reach: Reach, bounds: Bounds) {
    let limit = plan.range.start.saturating_sub(reach.bytes);
    let Some(&first) = plan.ranks.first() else { return };
    let mut before = first;
    while before > 0 {
        let part = part_start(chunks, before - 1)..before;
        let blob = chunks.blob(part.start).start..chunks.blob(before - 1).end;
        let near = blob.end.saturating_add(GAP) >= plan.range.start && blob.start >= limit;
        let taken = near && fits(&plan.range, &blob, bounds) && is_absent(chunks, &part, bounds);
        if !taken || !related(chunks, &part, first, reach) {
            break;
        }
        plan.range.start = plan.range.start.min(blob.start);
        plan.range.end = plan.range.end.max(blob.end);
        before = part.start;
    }
    plan.ranks.splice(0..0, before..first);
}
