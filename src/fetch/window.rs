//! The read-ahead policy: which chunks one ranged request takes. Pure, so that it can be tested and tuned without a network.
//!
//! A request starts at a chunk that someone waits for. It takes further wanted chunks that follow in the blob, bridging small gaps;
//! then it goes on for a little, speculatively: files that are used together (the modules of a package) lie beside each other in
//! the blob, and a round trip costs as much as a hundred kilobytes. Each speculative byte counts, though: an image is started with a
//! tenth of its bytes, and most of the neighbours are not in it. So at first only small files of the same directory are taken,
//! on both sides; where reads follow each other in the blob, whatever follows, and more each time.
//!
//! The numbers were chosen in a simulation, of the files that `python3 -c 'import numpy'` opens, one after the other and each read whole, in
//! a made-up image of 146 MB (three layers, files sorted by name). Without read-ahead: 190 requests for 23.2 MB. Only forwards,
//! without regard to directories and sizes: 99 requests and 5.4 MB more with 96 KiB, 92 and 7.3 MB with 128 KiB. With the numbers
//! below: 94 requests and 3.9 MB more. That simulation took neighbours on both sides also where reads follow each other, and only
//! doubled the window; this code has not been measured against a real image yet.
//!
//! Chunks are named by their *rank*: their position in the order of the blob.

use std::ops::Range;

/// Compressed bytes that are taken speculatively after a wanted chunk that follows no earlier request.
pub const AHEAD_START: u64 = 80 << 10;
/// Compressed bytes that are taken speculatively before such a chunk.
pub const BEHIND: u64 = 64 << 10;
/// Largest chunk, in compressed bytes, that is taken speculatively where nothing shows that reads follow each other: larger files are
/// rarely read because their neighbours are.
pub const NEIGHBOUR_MAX: u64 = 24 << 10;
/// Most compressed bytes that are taken speculatively, reached after a few requests that follow each other.
pub const AHEAD_MAX: u64 = 2 << 20;
/// Compressed bytes between two wanted chunks that are rather fetched than paid for with another request.
pub const BRIDGE: u64 = 64 << 10;
/// Compressed bytes between the end of an earlier request and a wanted chunk up to which it is taken to follow that request.
pub const NEAR: u64 = 64 << 10;
/// Places in the blob that are remembered as being read onwards: as many as files that are read sequentially side by side.
const TRAILS: usize = 16;

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
    /// The directory it belongs to, as any number.
    fn family(&self, rank: usize) -> u32;
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
}

/// A request made lately.
#[derive(Debug)]
struct Trail {
    /// Its end in the blob.
    end: u64,
    /// What the next request may take ahead if it follows this one.
    next: u64,
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
        let trail = self.follow(first.start);
        let ahead = trail.unwrap_or(AHEAD_START).min(max_request);
        if !alone {
            extend(&mut plan, chunks, ahead, trail.is_some(), max_request);
            if trail.is_none() {
                extend_back(&mut plan, chunks, max_request);
            }
        }
        // At least as much as was wanted now: large chunks would never be taken ahead otherwise.
        let next = ahead.saturating_mul(2).max(plan.range.end - plan.range.start);
        self.remember(plan.range.end, next.min(AHEAD_MAX));
        plan
    }

    /// What may be taken ahead by a request that begins at `start`, if it follows another.
    fn follow(&mut self, start: u64) -> Option<u64> {
        let follows = |trail: &Trail| start >= trail.end && start - trail.end <= NEAR;
        let at = self.trails.iter().rposition(follows)?;
        Some(self.trails.remove(at).next)
    }

    fn remember(&mut self, end: u64, next: u64) {
        if self.trails.len() >= TRAILS {
            self.trails.remove(0);
        }
        self.trails.push(Trail { end, next });
    }
}

/// Whether a request for `range` may also take `blob`.
fn fits(range: &Range<u64>, blob: &Range<u64>, max_request: u64) -> bool {
    range.end.max(blob.end) - range.start <= max_request
}

/// Whether the chunk at `rank` looks as if it were used together with the one at `with`.
fn related(chunks: &impl Chunks, rank: usize, with: usize) -> bool {
    let blob = chunks.blob(rank);
    blob.end.saturating_sub(blob.start) <= NEIGHBOUR_MAX && chunks.family(rank) == chunks.family(with)
}

/// Takes absent chunks that follow directly, up to `ahead` bytes; any of them, if reads follow each other here.
fn extend(plan: &mut Plan, chunks: &impl Chunks, ahead: u64, any: bool, max_request: u64) {
    let limit = plan.range.end.saturating_add(ahead);
    let Some(&last) = plan.ranks.last() else { return };
    for rank in last + 1..chunks.len() {
        let blob = chunks.blob(rank);
        let near = blob.start <= plan.range.end && blob.end <= limit && fits(&plan.range, &blob, max_request);
        if !near || chunks.state(rank) != State::Absent || !(any || related(chunks, rank, last)) {
            break;
        }
        plan.ranks.push(rank);
        plan.range.end = plan.range.end.max(blob.end);
    }
}

/// Takes absent chunks that are directly before.
fn extend_back(plan: &mut Plan, chunks: &impl Chunks, max_request: u64) {
    let limit = plan.range.start.saturating_sub(BEHIND);
    let Some(&first) = plan.ranks.first() else { return };
    let mut before = Vec::new();
    for rank in (0..first).rev() {
        let blob = chunks.blob(rank);
        let near = blob.end >= plan.range.start && blob.start >= limit;
        let small = plan.range.end.saturating_sub(blob.start) <= max_request;
        if !near || !small || chunks.state(rank) != State::Absent || !related(chunks, rank, first) {
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
        families: Vec<u32>,
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
            let families = vec![7; blobs.len()];
            Fake {
                blobs,
                states,
                families,
            }
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
        fn family(&self, rank: usize) -> u32 {
            self.families[rank]
        }
        fn state(&self, rank: usize) -> State {
            self.states[rank]
        }
    }

    const K: u64 = 1 << 10;
    const MAX: u64 = 4 << 20;

    #[test]
    fn a_miss_takes_its_small_neighbours() {
        let chunks = Fake::new(vec![20 * K; 20]).want(&[8]);
        let plan = Window::default().plan(&chunks, 8, MAX, false);
        assert_eq!(plan.ranks, [5, 6, 7, 8, 9, 10, 11, 12]);
        assert_eq!(plan.range, 100 * K..260 * K);
    }

    #[test]
    fn a_large_neighbour_is_left() {
        let chunks = Fake::new([10 * K, 10 * K, 30 * K, 10 * K, 10 * K, 25 * K, 10 * K]).want(&[3]);
        assert_eq!(Window::default().plan(&chunks, 3, MAX, false).ranks, [3, 4]);
    }

    #[test]
    fn a_neighbour_of_another_directory_is_left() {
        let mut chunks = Fake::new(vec![10 * K; 6]).want(&[3]);
        chunks.families = vec![1, 1, 2, 2, 2, 3];
        assert_eq!(Window::default().plan(&chunks, 3, MAX, false).ranks, [2, 3, 4]);
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
        assert_eq!(ahead[0], AHEAD_START);
        ahead.pop();
        assert!(ahead.is_sorted(), "{ahead:?}");
        assert_eq!(*ahead.last().unwrap(), AHEAD_MAX);
        chunks.states.fill(State::Absent);
        let plan = window.plan(&chunks, 500, MAX, false);
        let expected = BEHIND + 16 * K + AHEAD_START;
        assert_eq!(plan.range.end - plan.range.start, expected, "elsewhere it starts small");
    }

    #[test]
    fn a_large_file_is_read_ahead_from_its_second_chunk_on() {
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
