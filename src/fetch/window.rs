//! The read-ahead policy: which chunks one ranged request takes. Pure, so that it can be tested and tuned without a network.
//!
//! A request starts at a chunk that someone waits for. It takes further wanted chunks that follow in the blob, bridging small gaps;
//! then it goes on for a little, speculatively: files that are used together (the modules of a package) lie beside each other in
//! the blob, and a round trip costs as much as a hundred kilobytes. Each speculative byte counts, though: an image is started with a
//! tenth of its bytes, and most of the neighbours are not in it. So the window is small at first, and doubles only where
//! reads follow each other in the blob.
//!
//! Chunks are named by their *rank*: their position in the order of the blob.

use std::ops::Range;

/// Compressed bytes that are taken speculatively after a wanted chunk that follows no earlier request.
pub const AHEAD_START: u64 = 96 << 10;
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
    /// The end of recent requests in the blob, and what may be taken ahead after it. The latest last.
    trails: Vec<(u64, u64)>,
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
        let ahead = self.ahead(first.start, max_request);
        if !alone {
            extend(&mut plan, chunks, ahead, max_request);
        }
        self.remember(plan.range.end, ahead);
        plan
    }

    /// What may be taken ahead by a request that begins at `start`.
    fn ahead(&mut self, start: u64, max_request: u64) -> u64 {
        let follows = |&(end, _): &(u64, u64)| start >= end && start - end <= NEAR;
        let trail = self.trails.iter().rposition(follows).map(|at| self.trails.remove(at));
        let ahead = trail.map_or(AHEAD_START, |(_, ahead)| ahead.saturating_mul(2));
        ahead.min(AHEAD_MAX).min(max_request)
    }

    fn remember(&mut self, end: u64, ahead: u64) {
        if self.trails.len() >= TRAILS {
            self.trails.remove(0);
        }
        self.trails.push((end, ahead));
    }
}

/// Whether a request for `range` may also take `blob`.
fn fits(range: &Range<u64>, blob: &Range<u64>, max_request: u64) -> bool {
    range.end.max(blob.end) - range.start <= max_request
}

/// Takes absent chunks that follow directly, up to `ahead` bytes.
fn extend(plan: &mut Plan, chunks: &impl Chunks, ahead: u64, max_request: u64) {
    let limit = plan.range.end.saturating_add(ahead);
    let next = plan.ranks.last().map_or(0, |last| last + 1);
    for rank in next..chunks.len() {
        let blob = chunks.blob(rank);
        let direct = blob.start <= plan.range.end;
        if !direct || blob.end > limit || !fits(&plan.range, &blob, max_request) || chunks.state(rank) != State::Absent
        {
            break;
        }
        plan.ranks.push(rank);
        plan.range.end = plan.range.end.max(blob.end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Chunks of given sizes one after the other.
    struct Fake {
        blobs: Vec<Range<u64>>,
        states: Vec<State>,
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
            Fake { blobs, states }
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
        fn state(&self, rank: usize) -> State {
            self.states[rank]
        }
    }

    const K: u64 = 1 << 10;
    const MAX: u64 = 4 << 20;

    #[test]
    fn a_miss_takes_its_small_neighbours() {
        let chunks = Fake::new(vec![32 * K; 20]).want(&[5]);
        let plan = Window::default().plan(&chunks, 5, MAX, false);
        assert_eq!(plan.ranks, [5, 6, 7, 8]);
        assert_eq!(plan.range, 160 * K..288 * K);
    }

    #[test]
    fn a_large_neighbour_is_left() {
        let chunks = Fake::new([10 * K, 10 * K, 900 * K, 10 * K]).want(&[0]);
        assert_eq!(Window::default().plan(&chunks, 0, MAX, false).ranks, [0, 1]);
    }

    #[test]
    fn a_busy_neighbour_ends_the_window() {
        let mut chunks = Fake::new(vec![8 * K; 9]).want(&[0]);
        chunks.states[3] = State::Busy;
        assert_eq!(Window::default().plan(&chunks, 0, MAX, false).ranks, [0, 1, 2]);
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
    }

    #[test]
    fn sequential_reads_grow_the_window_and_others_do_not() {
        let mut chunks = Fake::new(vec![16 * K; 4000]);
        let mut window = Window::default();
        let mut sizes = Vec::new();
        let mut next = 0;
        for _ in 0..8 {
            chunks.states[next] = State::Wanted;
            let plan = window.plan(&chunks, next, MAX, false);
            sizes.push(plan.range.end - plan.range.start - 16 * K);
            for rank in plan.ranks {
                chunks.states[rank] = State::Busy;
                next = rank + 1;
            }
        }
        assert_eq!(sizes[0], AHEAD_START);
        assert!(sizes.is_sorted(), "{sizes:?}");
        assert_eq!(*sizes.last().unwrap(), AHEAD_MAX);
        let plan = window.plan(&chunks, 3500, MAX, false);
        assert_eq!(
            plan.range.end - plan.range.start,
            16 * K + AHEAD_START,
            "elsewhere it starts small"
        );
    }

    #[test]
    fn the_last_chunk_has_no_neighbour() {
        let chunks = Fake::new([K]).want(&[0]);
        assert_eq!(Window::default().plan(&chunks, 0, MAX, false).ranks, [0]);
    }
}
