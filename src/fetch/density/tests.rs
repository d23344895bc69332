use std::cell::{Cell, RefCell};

use proptest::prelude::*;

use super::*;
use crate::fetch::window::Owner;
use crate::sync::random::Random;

/// Bytes of the blob per chunk.
const CHUNK: u64 = 20_000;
/// Files of a directory.
const DIR: usize = 40;

/// A layer of which what is asked for comes at once.
struct Fake {
    ranks: Ranks,
    /// The file of each chunk.
    files: Vec<u32>,
    ready: RefCell<Vec<bool>>,
    density: Density,
    /// Whether anything may be asked for ahead.
    may: Cell<bool>,
    /// Chunks that were asked for ahead, and those that somebody waited for.
    asked: RefCell<Vec<usize>>,
    waited: RefCell<Vec<usize>>,
}

impl Fake {
    /// Files with so many chunks each, in the order of the blob.
    fn new(chunks: &[usize]) -> Self {
        let files = chunks.iter().enumerate();
        let files: Vec<u32> = files.flat_map(|(at, &chunks)| vec![at as u32 + 1; chunks]).collect();
        Fake {
            ranks: Ranks::in_order(),
            density: Density::new(files.len()),
            may: Cell::new(true),
            ready: vec![false; files.len()].into(),
            files,
            asked: RefCell::default(),
            waited: RefCell::default(),
        }
    }

    /// All of the file at position `at` is read.
    fn read(&self, at: usize) {
        let first = self.files.partition_point(|&file| (file as usize) < at + 1);
        let end = self.files.partition_point(|&file| file as usize <= at + 1);
        for chunk in first..end {
            let is_here = self.is_ready(chunk);
            let next = self
                .density
                .note(&self.ranks, self, chunk..chunk + 1, is_here, || self.may.get());
            assert_eq!(next.bytes, next.chunks.len() as u64 * CHUNK);
            let mut ready = self.ready.borrow_mut();
            if !is_here {
                self.waited.borrow_mut().push(chunk);
                ready[chunk] = true;
            }
            for &chunk in &next.chunks {
                assert!(!ready[chunk], "what is here is not asked for");
                ready[chunk] = true;
            }
            self.asked.borrow_mut().extend(next.chunks);
        }
    }

    fn waits(&self) -> usize {
        self.waited.borrow().len()
    }

    fn asked(&self) -> usize {
        self.asked.borrow().len()
    }
}

impl View for Fake {
    fn len(&self) -> usize {
        self.files.len()
    }

    fn blob(&self, chunk: usize) -> Range<u64> {
        chunk as u64 * CHUNK..(chunk as u64 + 1) * CHUNK
    }

    fn owner(&self, chunk: usize) -> Owner {
        let file = self.files[chunk];
        Owner {
            dir: file / DIR as u32,
            file,
            part: 0,
        }
    }

    fn is_ready(&self, chunk: usize) -> bool {
        self.ready.borrow()[chunk]
    }

    fn decoded(&self, _: usize) -> u64 {
        CHUNK
    }
}

/// How `readers` come to read `0..files`, who take `batch` files at a time and take turns.
fn beside_each_other(files: usize, readers: usize, batch: usize) -> Vec<usize> {
    let files: Vec<usize> = (0..files).collect();
    let mut order = Vec::new();
    for turn in files.chunks(readers * batch) {
        let mut turn: Vec<_> = turn.chunks(batch).map(|batch| batch.iter()).collect();
        for _ in 0..batch {
            order.extend(turn.iter_mut().filter_map(Iterator::next));
        }
    }
    order
}

#[test]
fn whoever_leaves_nothing_out_waits_no_more() {
    let files = 2000;
    let mut orders = vec![(0..files).collect::<Vec<_>>(), (0..files).rev().collect()];
    orders.extend([(2, 256), (8, 10), (16, 1)].map(|(readers, batch)| beside_each_other(files, readers, batch)));
    for order in orders {
        let layer = Fake::new(&vec![1; files]);
        order.iter().for_each(|&file| layer.read(file));
        // The first files tell; later ones wait where a reader goes to another place.
        assert!(
            layer.waits() < 200,
            "waited {} times: {:?}",
            layer.waits(),
            &order[..40]
        );
        assert_eq!(layer.waits() + layer.asked(), files);
    }
}

#[test]
fn directories_in_any_order_are_read_densely_as_well() {
    let mut dirs: Vec<usize> = (0..50).collect();
    Random::new(1).shuffle(&mut dirs);
    let layer = Fake::new(&vec![1; 50 * DIR]);
    for dir in dirs {
        (dir * DIR..(dir + 1) * DIR).for_each(|file| layer.read(file));
    }
    assert!(layer.waits() < 1000, "waited {} times", layer.waits());
}

#[test]
fn a_start_gets_nothing_ahead() {
    for seed in 0..50 {
        let mut random = Random::new(seed);
        let layer = Fake::new(&vec![1; 200 * DIR]);
        // Some directories, and of each two thirds at most, in its order or in any.
        for _ in 0..60 {
            let dir = random.below(200) as usize;
            let part = 5 + random.below(62);
            let mut files: Vec<usize> = (dir * DIR..(dir + 1) * DIR)
                .filter(|_| random.below(100) < part)
                .collect();
            if random.below(2) == 0 {
                random.shuffle(&mut files);
            }
            files.iter().for_each(|&file| layer.read(file));
        }
        assert_eq!(layer.asked(), 0, "seed {seed}");
    }
}

#[test]
fn large_files_are_no_sign_of_what_lies_beside_them() {
    // Five programs of two hundred chunks each, among others that nobody wants; and one of which nobody looks for the beginning.
    let mut chunks = vec![1; 1000];
    for at in [100, 300, 500, 700, 900] {
        chunks[at] = 200;
    }
    chunks[950] = 4 * LOOK;
    let layer = Fake::new(&chunks);
    for at in [100, 300, 500, 700, 900, 950] {
        layer.read(at);
    }
    assert_eq!(layer.asked(), 0);
}

#[test]
fn it_ends_when_files_are_left_out_and_begins_anew() {
    let layer = Fake::new(&vec![1; 4000]);
    (0..100).for_each(|file| layer.read(file));
    let asked = layer.asked();
    assert!(asked > 0);
    (1000..1500).step_by(5).for_each(|file| layer.read(file));
    let wasted = layer.asked();
    (1500..2000).step_by(5).for_each(|file| layer.read(file));
    assert_eq!(layer.asked(), wasted, "nothing more once it is known");
    (2000..2200).for_each(|file| layer.read(file));
    assert!(layer.asked() > wasted);
}

#[test]
fn what_may_not_be_asked_for_yet_is_asked_for_later() {
    let layer = Fake::new(&vec![1; 400]);
    layer.may.set(false);
    (0..100).for_each(|file| layer.read(file));
    assert_eq!((layer.asked(), layer.waits()), (0, 100));
    layer.may.set(true);
    (100..400).for_each(|file| layer.read(file));
    assert_eq!((layer.asked(), layer.waits()), (299, 101));
}

proptest! {
    /// Whatever is read: what was asked for in vain is no more than what was read.
    #[test]
    fn no_more_in_vain_than_was_of_use(seed: u64, runs in 1usize..30) {
        let mut random = Random::new(seed);
        let sizes: Vec<usize> = (0..1500).map(|_| 1 + random.below(3) as usize).collect();
        let layer = Fake::new(&sizes);
        let mut read = vec![false; sizes.len()];
        for _ in 0..runs {
            let (from, len) = (random.below(1500) as usize, 1 + random.below(300) as usize);
            let step = random.of(&[1, 1, 1, 2, 5]);
            for file in (from..sizes.len().min(from + len)).step_by(step) {
                layer.read(file);
                read[file] = true;
            }
            let of_use: usize = sizes.iter().zip(&read).filter(|(_, read)| **read).map(|(size, _)| size).sum();
            let asked = layer.asked.borrow();
            let in_vain = asked.iter().filter(|&&chunk| !read[layer.files[chunk] as usize - 1]).count();
            prop_assert!(in_vain <= of_use, "{} in vain, {} of use", in_vain, of_use);
        }
    }
}
