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
//! Chunks are named by their *rank*: their position in the order of the blob.

use std::collections::HashMap;
use std::ops::Range;

/// Compressed bytes that are taken speculatively after a wanted chunk, and as many before it.
pub const REACH: u64 = 160 << 10;
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
}

/// One ranged request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Chunks that it shall deliver, in order.
    pub ranks: Vec<usize>,
    /// Bytes of the blob.
    pub range: Range<u64>,
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
    /// Plans a request of at most `max_request` bytes (more only if one chunk alone is larger) that begins with the chunk at rank
    /// `seed`. With `alone`, only wanted chunks are taken.
    pub fn plan(&mut self, chunks: &impl Chunks, seed: usize, max_request: u64, alone: bool) -> Plan {
        let first = chunks.blob(seed);
        let mut plan = Plan {
            ranks: vec![seed],
            range: first.clone(),
        };
        // Wanted chunks that follow, over gaps that are not worth a request.
        let mut rank = seed + 1;
        while rank < chunks.len() {
            let blob = chunks.blob(rank);
            if blob.start > plan.range.end.saturating_add(BRIDGE) || !fits(&plan.range, &blob, max_request) {
                break;
            }
            if chunks.state(rank) == State::Wanted {
                // What is bridged is fetched anyway: it may as well be kept.
                let bridged = plan.ranks.last().map_or(rank, |last| last + 1);
                plan.ranks
                    .extend((bridged..rank).filter(|&r| chunks.state(r) == State::Absent));
                plan.ranks.push(rank);
                plan.range.end = plan.range.end.max(blob.end);
            }
            rank += 1;
        }
        let owner = chunks.owner(seed);
        let trail = self.follow(first.start);
        // The rest of a large file does not show that what is behind the file will be read.
        let onward = trail.as_ref().is_some_and(|trail| trail.onward || trail.file != owner);
        let next = trail.map_or(REACH, |trail| trail.next);
        let near = self.reach(owner, first.end.saturating_sub(first.start));
        if !alone {
            let reach = match onward {
                true => Reach {
                    bytes: next,
                    any: true,
                    ..near
                },
                false => near,
            };
            extend(&mut plan, chunks, reach, max_request);
            if !onward {
                extend_back(&mut plan, chunks, near, max_request);
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

    /// What a request may take on both sides of a chunk of `size` bytes that belongs to `owner`; counts the request.
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

/// Whether a request for `range` may also take `blob`.
fn fits(range: &Range<u64>, blob: &Range<u64>, max_request: u64) -> bool {
    range.end.max(blob.end) - range.start <= max_request
}

/// Whether the chunk at `rank` looks as if it were used together with the one at `with`.
fn related(chunks: &impl Chunks, rank: usize, with: usize, reach: Reach) -> bool {
    let (this, other) = (chunks.owner(rank), chunks.owner(with));
    let blob = chunks.blob(rank);
    let size = blob.end.saturating_sub(blob.start);
    let limit = if this.dir == other.dir { reach.neighbour } else { TINY };
    reach.any || this == other || size <= limit
}

/// Bytes of the blob from `end` to the end of the file that the chunk at `rank` belongs to; 0 if they are more than [`REST`].
fn rest(chunks: &impl Chunks, rank: usize, end: u64) -> u64 {
    let owner = chunks.owner(rank);
    let mut rest = 0;
    for rank in rank + 1..chunks.len() {
        if chunks.owner(rank) != owner {
            break;
        }
        rest = chunks.blob(rank).end.saturating_sub(end);
        if rest > REST {
            return 0;
        }
    }
    rest
}

/// Takes absent chunks that follow directly.
fn extend(plan: &mut Plan, chunks: &impl Chunks, reach: Reach, max_request: u64) {
    let Some(&last) = plan.ranks.last() else { return };
    let ahead = reach.bytes.max(rest(chunks, last, plan.range.end));
    let limit = plan.range.end.saturating_add(ahead);
    for rank in last + 1..chunks.len() {
        let blob = chunks.blob(rank);
        let near = blob.start <= plan.range.end && blob.end <= limit && fits(&plan.range, &blob, max_request);
        if !near || chunks.state(rank) != State::Absent || !related(chunks, rank, last, reach) {
            break;
        }
        plan.ranks.push(rank);
        plan.range.end = plan.range.end.max(blob.end);
    }
}

/// Takes absent chunks that are directly before.
fn extend_back(plan: &mut Plan, chunks: &impl Chunks, reach: Reach, max_request: u64) {
    let limit = plan.range.start.saturating_sub(reach.bytes);
    let Some(&first) = plan.ranks.first() else { return };
    let mut before = Vec::new();
    for rank in (0..first).rev() {
        let blob = chunks.blob(rank);
        let near = blob.end >= plan.range.start && blob.start >= limit;
        let small = plan.range.end.saturating_sub(blob.start) <= max_request;
        if !near || !small || chunks.state(rank) != State::Absent || !related(chunks, rank, first, reach) {
            break;
        }
        before.push(rank);
        plan.range.start = plan.range.start.min(blob.start);
        plan.range.end = plan.range.end.max(blob.end);
    }
    plan.ranks.splice(0..0, before.into_iter().rev());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Chunks of given sizes one after the other.
    struct Fake {
        blobs: Vec<Range<u64>>,
        states: Vec<State>,
        owners: Vec<Owner>,
    }

    impl Fake {
        fn new(sizes: impl IntoIterator<Item = u64>) -> Self {
            let mut end = 0;
            let blobs: Vec<_> = sizes
                .into_iter()
                .map(|size| {
                    end += size;
                    end - size..end
                })
                .collect();
            let states = vec![State::Absent; blobs.len()];
            // Each is a file of the same directory.
            let owners = (0..blobs.len())
                .map(|at| Owner {
                    dir: 7,
                    file: at as u32,
                })
                .collect();
            Fake { blobs, states, owners }
        }

        /// All chunks are of one file.
        fn one_file(mut self) -> Self {
            self.owners.fill(Owner { dir: 7, file: 1 });
            self
        }

        fn want(mut self, ranks: &[usize]) -> Self {
            for &rank in ranks {
                self.states[rank] = State::Wanted;
            }
            self
        }
    }

    impl Chunks for Fake {
        fn len(&self) -> usize {
            self.blobs.len()
        }
        fn blob(&self, rank: usize) -> Range<u64> {
            self.blobs[rank].clone()
        }
        fn owner(&self, rank: usize) -> Owner {
            self.owners[rank]
        }
        fn state(&self, rank: usize) -> State {
            self.states[rank]
        }
    }

    const K: u64 = 1 << 10;
    const MAX: u64 = 4 << 20;

    #[test]
    fn a_miss_takes_its_small_neighbours() {
        let chunks = Fake::new(vec![40 * K; 20]).want(&[8]);
        let plan = Window::default().plan(&chunks, 8, MAX, false);
        assert_eq!(plan.ranks, [4, 5, 6, 7, 8, 9, 10, 11, 12]);
        assert_eq!(plan.range, 160 * K..520 * K);
    }

    #[test]
    fn a_large_neighbour_is_left() {
        let chunks = Fake::new([10 * K, 10 * K, 60 * K, 10 * K, 10 * K, 49 * K, 10 * K]).want(&[3]);
        assert_eq!(Window::default().plan(&chunks, 3, MAX, false).ranks, [3, 4]);
    }

    #[test]
    fn of_another_directory_only_tiny_files_are_taken() {
        let mut chunks = Fake::new([10 * K, 4 * K, 10 * K, 10 * K, 10 * K, 9 * K, 10 * K]).want(&[3]);
        for (owner, dir) in chunks.owners.iter_mut().zip([1, 1, 2, 2, 2, 3, 3]) {
            owner.dir = dir;
        }
        assert_eq!(Window::default().plan(&chunks, 3, MAX, false).ranks, [1, 2, 3, 4]);
    }

    #[test]
    fn a_directory_that_is_asked_for_again_gives_more_each_time() {
        let chunks = Fake::new(vec![10 * K; 1000]);
        let mut window = Window::default();
        let mut taken = |seed: usize| {
            let plan = window.plan(&chunks, seed, MAX, false);
            plan.range.end - plan.range.start - 10 * K
        };
        let by_request = [100, 300, 500, 700, 900].map(&mut taken);
        let most = 2 * REACH_MAX;
        assert_eq!(by_request, [2 * REACH, 4 * REACH, most, most, most]);
    }

    #[test]
    fn a_large_chunk_says_nothing_of_its_directory() {
        let mut sizes = vec![10 * K; 1000];
        sizes[500] = LARGE + 1;
        let chunks = Fake::new(sizes);
        let mut window = Window::default();
        window.plan(&chunks, 100, MAX, false);
        let plan = window.plan(&chunks, 500, MAX, false);
        assert_eq!(plan.range.end - plan.range.start, LARGE + 1 + 2 * REACH);
    }

    #[test]
    fn the_rest_of_a_file_is_taken_if_it_is_not_much() {
        let some = Fake::new([1000 * K, 1000 * K, 1000 * K]).one_file();
        assert_eq!(Window::default().plan(&some, 0, MAX, false).ranks, [0, 1, 2]);
        let much = Fake::new([1000 * K, 1000 * K, 1000 * K, 1000 * K]).one_file();
        assert_eq!(Window::default().plan(&much, 0, MAX, false).ranks, [0]);
    }

    #[test]
    fn a_file_read_to_its_end_does_not_pull_in_what_follows() {
        let mut chunks = Fake::new([2000 * K, 2000 * K, 500 * K, 500 * K]);
        chunks.owners[1] = chunks.owners[0];
        let mut window = Window::default();
        assert_eq!(window.plan(&chunks, 0, 2000 * K, false).ranks, [0]);
        chunks.states[0] = State::Busy;
        assert_eq!(window.plan(&chunks, 1, MAX, false).ranks, [1]);
    }

    #[test]
    fn reads_that_pass_over_what_is_there_follow() {
        let mut chunks = Fake::new([100 * K, 1000 * K, 100 * K, 100 * K, 100 * K]);
        chunks.states[1] = State::Busy;
        let mut window = Window::default();
        assert_eq!(window.plan(&chunks, 0, MAX, false).ranks, [0]);
        assert_eq!(window.plan(&chunks, 2, MAX, false).ranks, [2, 3, 4]);
    }

    #[test]
    fn a_busy_neighbour_ends_the_window() {
        let mut chunks = Fake::new(vec![8 * K; 9]).want(&[4]);
        chunks.states[2] = State::Busy;
        chunks.states[7] = State::Busy;
        assert_eq!(Window::default().plan(&chunks, 4, MAX, false).ranks, [3, 4, 5, 6]);
    }

    #[test]
    fn wanted_chunks_are_merged_over_small_gaps_only() {
        let chunks = Fake::new([300 * K, 60 * K, 300 * K, 80 * K, 300 * K]).want(&[0, 2, 4]);
        let plan = Window::default().plan(&chunks, 0, MAX, true);
        assert_eq!(
            plan.ranks,
            [0, 1, 2],
            "the gap of 60 KiB is bridged and kept, the one of 80 is not"
        );
        assert_eq!(plan.range, 0..660 * K);
    }

    #[test]
    fn bridged_chunks_that_are_there_are_not_delivered_again() {
        let mut chunks = Fake::new([300 * K, 10 * K, 300 * K]).want(&[0, 2]);
        chunks.states[1] = State::Busy;
        assert_eq!(Window::default().plan(&chunks, 0, MAX, true).ranks, [0, 2]);
    }

    #[test]
    fn a_request_has_a_limit_that_one_chunk_may_exceed() {
        let chunks = Fake::new(vec![MAX / 2; 5]).want(&[0, 1, 2, 3, 4]);
        assert_eq!(Window::default().plan(&chunks, 0, MAX, false).ranks, [0, 1]);
        let chunks = Fake::new(vec![2 * MAX; 2]).want(&[0, 1]);
        assert_eq!(Window::default().plan(&chunks, 0, MAX, false).ranks, [0]);
        let chunks = Fake::new(vec![10 * K; 30]).want(&[15]);
        let plan = Window::default().plan(&chunks, 15, 64 * K, false);
        assert!(plan.range.end - plan.range.start <= 64 * K, "{plan:?}");
    }

    /// Reads every chunk in turn; what each request took ahead.
    fn read_all(chunks: &mut Fake, window: &mut Window) -> Vec<u64> {
        let mut ahead = Vec::new();
        for rank in 0..chunks.len() {
            if chunks.states[rank] == State::Busy {
                continue;
            }
            chunks.states[rank] = State::Wanted;
            let plan = window.plan(chunks, rank, MAX, false);
            ahead.push(plan.range.end - chunks.blob(rank).end);
            for rank in plan.ranks {
                chunks.states[rank] = State::Busy;
            }
        }
        ahead
    }

    #[test]
    fn sequential_reads_grow_the_window_and_others_do_not() {
        let mut chunks = Fake::new(vec![16 * K; 1000]);
        let mut window = Window::default();
        let mut ahead = read_all(&mut chunks, &mut window);
        assert_eq!(ahead[0], REACH);
        ahead.pop();
        assert!(ahead.is_sorted(), "{ahead:?}");
        // A request never carries more, the wanted chunk included.
        assert_eq!(*ahead.last().unwrap(), AHEAD_MAX - 16 * K);
        chunks.states.fill(State::Absent);
        let plan = window.plan(&chunks, 500, MAX, false);
        assert!(
            plan.range.end - plan.range.start <= 16 * K + 2 * REACH_MAX,
            "elsewhere it starts small"
        );
    }

    #[test]
    fn a_row_of_large_files_is_read_ahead_from_its_second_file_on() {
        let mut chunks = Fake::new(vec![1000 * K; 6]);
        let ahead = read_all(&mut chunks, &mut Window::default());
        assert_eq!(ahead, [0, 1000 * K, 2000 * K]);
    }

    #[test]
    fn the_last_chunk_has_no_neighbour() {
        let chunks = Fake::new([K]).want(&[0]);
        assert_eq!(Window::default().plan(&chunks, 0, MAX, false).ranks, [0]);
    }
}
