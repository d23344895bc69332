//! The read-ahead policy over layers of numbers, and the same files in two dialects.

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
                part: at as u32,
            })
            .collect();
        Fake { blobs, states, owners }
    }

    /// All chunks are of one file, each a part of it.
    fn one_file(mut self) -> Self {
        self.owners.iter_mut().for_each(|owner| owner.file = 1);
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
    fn decoded(&self, rank: usize) -> u64 {
        self.blobs[rank].end - self.blobs[rank].start
    }
}

const K: u64 = 1 << 10;
const MAX: Bounds = Bounds {
    bytes: 4 << 20,
    decoded: 4 << 20,
};

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
    chunks.owners[1].file = chunks.owners[0].file;
    let mut window = Window::default();
    assert_eq!(
        window.plan(&chunks, 0, Bounds { bytes: 2000 * K, ..MAX }, false).ranks,
        [0]
    );
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
    let chunks = Fake::new(vec![MAX.bytes / 2; 5]).want(&[0, 1, 2, 3, 4]);
    assert_eq!(Window::default().plan(&chunks, 0, MAX, false).ranks, [0, 1]);
    let chunks = Fake::new(vec![2 * MAX.bytes; 2]).want(&[0, 1]);
    assert_eq!(Window::default().plan(&chunks, 0, MAX, false).ranks, [0]);
    let chunks = Fake::new(vec![10 * K; 30]).want(&[15]);
    let plan = Window::default().plan(&chunks, 15, Bounds { bytes: 64 * K, ..MAX }, false);
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

/// The same files in a dialect, and what has been fetched of them.
struct Dialect {
    blobs: Vec<Range<u64>>,
    owners: Vec<Owner>,
    /// Bytes of its file that each chunk holds.
    data: Vec<Range<u64>>,
    /// The chunks of each file.
    files: Vec<Range<usize>>,
    states: Vec<State>,
}

/// Bytes of a tar header or padding, compressed.
const HEADER: u64 = 150;
/// Compressed bytes of three.
const RATIO: u64 = 3;

fn random(state: &mut u64, bound: u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 16) % bound
}

impl Dialect {
    fn new(files: &[(u32, u64)], podman: bool) -> Self {
        let mut dialect = Dialect {
            blobs: Vec::new(),
            owners: Vec::new(),
            data: Vec::new(),
            files: Vec::new(),
            states: Vec::new(),
        };
        let (mut end, mut state) = (4096, 99);
        for (file, &(dir, size)) in files.iter().enumerate() {
            // Entries without content come before some files: directories, links.
            let entries = if file % 7 == 0 { 1 + random(&mut state, 20) } else { 1 };
            let first = dialect.blobs.len();
            // They are in the member of the file before, or in one of their own.
            if let (false, Some(blob)) = (podman, dialect.blobs.last_mut()) {
                blob.end += HEADER * entries;
            }
            end += HEADER * entries;
            let mut done = 0;
            while done < size {
                let mut len = 4 << 20;
                if podman {
                    // Content-defined, and in between some that hold nothing but zeros.
                    len = 1 + random(&mut state, 128 << 10);
                    if random(&mut state, 50) == 0 {
                        (done, end) = (done + (64 << 10), end + 40);
                        continue;
                    }
                }
                let len = len.min(size - done);
                let taken = len / RATIO + 20;
                dialect.blobs.push(end..end + taken);
                dialect.data.push(done..done + len);
                let part = (done / PART) as u32;
                let file = file as u32;
                dialect.owners.push(Owner { dir, file, part });
                (done, end) = (done + len, end + taken);
            }
            dialect.files.push(first..dialect.blobs.len());
        }
        dialect.states = vec![State::Absent; dialect.blobs.len()];
        dialect
    }

    /// Reads bytes of a file; adds to the requests and bytes that it takes.
    fn read(&mut self, window: &mut Window, file: usize, data: Range<u64>, cost: &mut (u64, u64)) {
        let wanted: Vec<usize> = self.files[file]
            .clone()
            .filter(|&rank| self.data[rank].start < data.end && data.start < self.data[rank].end)
            .filter(|&rank| self.states[rank] == State::Absent)
            .collect();
        wanted.iter().for_each(|&rank| self.states[rank] = State::Wanted);
        for rank in wanted {
            if self.states[rank] == State::Wanted {
                let plan = window.plan(self, rank, MAX, false);
                assert!(plan.ranks.is_sorted() && plan.ranks.contains(&rank));
                cost.0 += 1;
                cost.1 += plan.range.end - plan.range.start;
                for rank in plan.ranks {
                    assert!(plan.range.start <= self.blobs[rank].start && self.blobs[rank].end <= plan.range.end);
                    self.states[rank] = State::Busy;
                }
            }
        }
    }
}

impl Chunks for Dialect {
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
    fn decoded(&self, rank: usize) -> u64 {
        self.data[rank].end - self.data[rank].start
    }
}

/// Bytes that the kernel asks for at once.
const READ: u64 = 128 << 10;

/// Requests and bytes of a program's start, and of reading everything, in stargz' dialect and in podman's.
fn replay(seed: u64, whole: bool) -> [(u64, u64); 2] {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let files: Vec<(u32, u64)> = (0..1200)
        .map(|file| {
            let size = match random(&mut state, 40) {
                0 => random(&mut state, 12 << 20),
                1..5 => random(&mut state, 600 << 10),
                _ => random(&mut state, 40 << 10),
            };
            (file / 25, size + 1)
        })
        .collect();
    // Modules of some packages one after the other, and pages of programs here and there.
    let mut reads = Vec::new();
    for (file, &(dir, size)) in files.iter().enumerate() {
        if whole {
            reads.extend(
                (0..size)
                    .step_by(READ as usize)
                    .map(|at| (file, at..(at + READ).min(size))),
            );
        } else if dir % 5 == 0 && random(&mut state, 3) > 0 {
            let count = size.div_ceil(READ).min(40);
            reads.extend((0..count).map(|_| {
                let at = random(&mut state, size) / READ * READ;
                (file, at..(at + READ).min(size))
            }));
        }
    }
    [false, true].map(|podman| {
        let (mut dialect, mut window, mut cost) = (Dialect::new(&files, podman), Window::default(), (0, 0));
        for (file, data) in &reads {
            dialect.read(&mut window, *file, data.clone(), &mut cost);
        }
        cost
    })
}

#[test]
fn the_same_files_cost_the_same_in_every_dialect() {
    for whole in [false, true] {
        let mut sums = [(0, 0); 2];
        for seed in 1..=10 {
            for (sum, cost) in sums.iter_mut().zip(replay(seed, whole)) {
                *sum = (sum.0 + cost.0, sum.1 + cost.1);
            }
        }
        let [stargz, podman] = sums;
        assert!(stargz.0 > 50);
        assert!(
            podman.0 * 100 <= stargz.0 * 115,
            "requests: {podman:?}, stargz {stargz:?}, whole: {whole}"
        );
        assert!(
            podman.1 * 100 <= stargz.1 * 115,
            "bytes: {podman:?}, stargz {stargz:?}, whole: {whole}"
        );
    }
}

#[test]
fn small_gaps_do_not_end_the_reach_and_large_ones_do() {
    let mut chunks = Fake::new(vec![10 * K; 9]);
    let mut shift = 0;
    for (rank, blob) in chunks.blobs.iter_mut().enumerate() {
        shift += match rank {
            2 | 7 => GAP + 1,
            _ => GAP,
        };
        *blob = blob.start + shift..blob.end + shift;
    }
    let mut plan = Window::default().plan(&chunks, 4, MAX, false);
    assert_eq!(plan.ranks, [2, 3, 4, 5, 6]);
    assert_eq!(plan.core, chunks.blobs[4]);
    assert_eq!(plan.split_ahead(&chunks), [2, 3, 5, 6]);
    assert_eq!((plan.ranks, plan.range), (vec![4], chunks.blobs[4].clone()));
}

#[test]
fn what_takes_much_to_decode_is_not_taken_along() {
    struct Bomb(Fake);
    impl Chunks for Bomb {
        fn len(&self) -> usize {
            self.0.len()
        }
        fn blob(&self, rank: usize) -> Range<u64> {
            self.0.blob(rank)
        }
        fn owner(&self, rank: usize) -> Owner {
            self.0.owner(rank)
        }
        fn state(&self, rank: usize) -> State {
            self.0.state(rank)
        }
        fn decoded(&self, rank: usize) -> u64 {
            if rank == 2 { 64 << 20 } else { K }
        }
    }
    for wanted in [&[1][..], &[1, 2, 3], &[1, 3]] {
        let chunks = Bomb(Fake::new(vec![K; 5]).want(wanted));
        let plan = Window::default().plan(&chunks, 1, MAX, false);
        assert!(!plan.ranks.contains(&2), "{plan:?}");
    }
    // By itself it is.
    let chunks = Bomb(Fake::new(vec![K; 5]).want(&[2]));
    assert!(Window::default().plan(&chunks, 2, MAX, false).ranks.contains(&2));
}
