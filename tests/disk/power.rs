//! Power cuts under the cache and the database, on a real file system.
//!
//! A program works on a disk that records every write and flush that ext4 makes ([`super::device`]). Then the power is cut, at many points of the
//! recording, with what was not flushed there, lost, or torn; the file system is mounted, which replays its journal, and the next start is made.
//! It never fails, no byte is wrong, and all is there that was answered.
//!
//! `LAZULI_SEED=n` repeats one program; `LAZULI_FAULT_MINUTES=n` goes on with others for so long.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lazuli::cache::Stored;
use lazuli::store::Store;

use super::bad::{bytes, digest, has, index, open, open_within, put};
use super::device::{CUTS, Device, after_power_cut};

/// MiB of the disk.
const SIZE: usize = 24;
/// Steps of a program.
const STEPS: usize = 40;
/// Power cuts for each program.
const CUTS_EACH: usize = 30;
/// The programs that every run of the tests looks at: so many that a flush which is left out anywhere is found.
const SEEDS: [u64; 4] = [1, 2, 3, 4];
/// Bytes of a cache that is too small for all layers, for every other program.
const SMALL: u64 = 160 << 10;
/// Layers that come and go, and chunks of each.
const LAYERS: usize = 4;
const CHUNKS: usize = 16;

/// Numbers without a pattern, the same for the same seed.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 16) % limit as u64) as usize
    }
}

/// What is known of a layer from some operation of the disk on, until the next that is known of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    /// It is there.
    There,
    /// It is there with all its bytes.
    Complete,
    /// It may be there or not.
    Unsure,
}

/// What was answered, and after how many operations of the disk.
#[derive(Default)]
struct Answers {
    snapshots: Vec<(usize, String)>,
    layers: Vec<(usize, usize, Known)>,
}

fn name(layer: usize) -> String {
    format!("layer {layer}")
}

/// Whether the cache of a program is too small.
fn is_small(seed: u64) -> bool {
    seed.is_multiple_of(2)
}

/// Works for a while, as the daemon would.
fn work(device: &Device, random: &mut Random, is_small: bool) -> Answers {
    let root = device.root();
    let store = Store::open(&root.join("metadata.redb")).unwrap();
    let open = |root: &Path| open_within(root, if is_small { SMALL } else { 0 });
    let mut cache = open(&root);
    let mut answers = Answers::default();
    // What somebody has open gives way chunk by chunk, and what nobody has as a whole.
    let mut used = Vec::new();
    for step in 0..STEPS {
        let at = random.below(LAYERS);
        let layer = name(at);
        if random.below(6) == 0 {
            // As the kernel does after a while, whether anybody wants it or not: what is written may come to the disk in any order.
            rustix::fs::syncfs(std::fs::File::open(&root).unwrap()).unwrap();
        }
        match random.below(8) {
            0 | 1 => {
                put(&store, &format!("snapshot {step}"), random.below(3000)).unwrap();
                answers.snapshots.push((device.recorded(), format!("snapshot {step}")));
            }
            2..=4 => {
                let cached = cache.insert(&digest(&layer), index(&layer, CHUNKS)).unwrap();
                let known = answers.layers.iter().rev().find(|(_, of, _)| *of == at);
                if known.is_none_or(|(_, _, known)| *known == Known::Unsure) {
                    answers.layers.push((device.recorded(), at, Known::There));
                }
                for _ in 0..random.below(CHUNKS) {
                    let chunk = random.below(CHUNKS);
                    let stored = cached.store(chunk, &bytes(&layer, chunk)).unwrap();
                    assert!(is_small || stored == Stored::Cached);
                }
                if is_small {
                    used.push(cached);
                }
            }
            5 => {
                answers.layers.push((device.recorded(), at, Known::Unsure));
                cache.forget(&digest(&layer));
                // As a stream makes one.
                let mut staging = cache.stage(&digest(&layer)).unwrap();
                for chunk in 0..CHUNKS {
                    staging
                        .write((chunk * bytes(&layer, 0).len()) as u64, &bytes(&layer, chunk))
                        .unwrap();
                }
                drop(staging.commit(index(&layer, CHUNKS), true).unwrap());
                answers.layers.push((device.recorded(), at, Known::Complete));
            }
            6 => {
                answers.layers.push((device.recorded(), at, Known::Unsure));
                cache.forget(&digest(&layer));
            }
            _ => {
                // A container runs on it, and the daemon ends in order.
                let cached = cache.get(&digest(&layer)).unwrap();
                if let Some(cached) = &cached {
                    for chunk in 0..CHUNKS {
                        cached.store(chunk, &bytes(&layer, chunk)).unwrap();
                    }
                    cached.check_all(|| false);
                    drop(cached.hold());
                }
                if random.below(2) == 0 {
                    cache.close();
                    used.clear();
                    drop((cached, cache));
                    cache = open(&root);
                } else if is_small {
                    used.extend(cached);
                }
            }
        }
    }
    cache.close();
    if is_small {
        // Any layer may have given way to another one; what is there is right.
        answers.layers.clear();
    }
    answers
}

/// Starts on what a power cut has left, and looks at everything.
fn look(bytes: Vec<u8>, done: usize, answers: &Answers, what: &str) {
    let device = Device::of(bytes);
    let root = device.root();
    let store = Store::open(&root.join("metadata.redb")).unwrap_or_else(|error| panic!("{what}: {error}"));
    for (at, key) in &answers.snapshots {
        let found = store.snapshot(key).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(found.is_some() || *at > done, "{what}: {key} was answered");
    }
    let cache = open(&root);
    let mut known = BTreeMap::new();
    for (_, layer, state) in answers.layers.iter().filter(|(at, ..)| *at <= done) {
        known.insert(*layer, *state);
    }
    for layer in 0..LAYERS {
        let state = known.get(&layer).copied().unwrap_or(Known::Unsure);
        let found = cache
            .get(&digest(&name(layer)))
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        let Some(cached) = found else {
            // What comes after it may be under way.
            let later = answers
                .layers
                .iter()
                .any(|(at, of, state)| *at == done && *of == layer && *state == Known::Unsure);
            assert!(state == Known::Unsure || later, "{what}: layer {layer} was answered");
            continue;
        };
        let there = (0..CHUNKS).filter(|chunk| has(&cached, &name(layer), *chunk)).count();
        assert!(
            state != Known::Complete || there == CHUNKS,
            "{what}: of layer {layer} {there} chunks are there"
        );
        // It can be used as if nothing had been.
        for chunk in 0..CHUNKS {
            assert_eq!(
                cached.store(chunk, &super::bad::bytes(&name(layer), chunk)).unwrap(),
                Stored::Cached
            );
            assert!(has(&cached, &name(layer), chunk), "{what}");
        }
    }
    put(&store, "afterwards", 10).unwrap_or_else(|error| panic!("{what}: {error}"));
}

fn cut(seed: u64, cuts: usize) {
    let mut random = Random::new(seed);
    let device = Device::new(SIZE);
    let before = device.record();
    let answers = work(&device, &mut random, is_small(seed));
    let tape = device.tape();
    drop(device);
    assert!(tape.len() > 2 * STEPS, "only {} operations", tape.len());
    for _ in 0..cuts {
        let done = random.below(tape.len() + 1);
        let cut = CUTS[random.below(CUTS.len())];
        let what = format!("LAZULI_SEED={seed}, after {done} of {} operations, {cut:?}", tape.len());
        let bytes = after_power_cut(&before, &tape, done, cut, &mut |limit| random.below(limit));
        look(bytes, done, &answers, &what);
    }
}

#[test]
fn a_power_cut_loses_nothing_that_was_answered() {
    let seed = std::env::var("LAZULI_SEED")
        .ok()
        .map(|seed| seed.parse().expect("a number"));
    match seed {
        Some(seed) => cut(seed, CUTS_EACH),
        None => SEEDS.iter().for_each(|seed| cut(*seed, CUTS_EACH)),
    }
    let minutes = std::env::var("LAZULI_FAULT_MINUTES").ok().filter(|_| seed.is_none());
    let Some(minutes) = minutes else { return };
    let minutes = Duration::from_secs(60 * minutes.parse::<u64>().expect("a number"));
    let (begun, mut programs) = (Instant::now(), 0);
    while begun.elapsed() < minutes {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        cut(now.as_nanos() as u64 % 1_000_000_000_000, CUTS_EACH);
        programs += 1;
    }
    eprintln!("{programs} random programs");
}
