//! What counts of the disk, and what gives way when it is full.

use proptest::prelude::*;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::*;
use crate::cache::marks::Fullness;

/// Bytes between the beginnings of chunks, so that they begin and end within blocks.
const STRIDE: u64 = CHUNK as u64 + 1000;
/// Chunks of a layer.
const CHUNKS: usize = 4;

/// A directory where blocks are what was written, at once: others put that off, or give more than is needed.
fn directory() -> tempfile::TempDir {
    match Path::new("/dev/shm").is_dir() {
        true => tempfile::tempdir_in("/dev/shm").unwrap(),
        false => tempfile::tempdir().unwrap(),
    }
}

/// What `du` says of all files of layers below `dir`: not of those that are being deleted, and not of the mark of the whole cache.
fn du(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries
        .filter(|entry| entry.file_name() != ".trash" && entry.file_name() != ".ids")
        .map(|entry| match entry.metadata().unwrap() {
            meta if meta.is_dir() => du(&entry.path()),
            meta => meta.blocks() * 512,
        })
        .sum()
}

fn layers(root: &Path) -> PathBuf {
    root.join("layers")
}

fn with_gaps(name: &str) -> LayerIndex {
    index(name, CHUNKS, STRIDE, Access::Ranges)
}

#[derive(Debug, Clone)]
enum Op {
    /// Streams a layer as a whole, or gives up in between.
    Stage {
        layer: u8,
        complete: bool,
    },
    Insert {
        layer: u8,
    },
    Store {
        layer: u8,
        chunk: usize,
    },
    Evict {
        layer: u8,
    },
    EvictGroup {
        layer: u8,
    },
    /// Fills a layer, and mounts its file.
    Mount {
        layer: u8,
    },
    Unmount,
    /// Lets go of a layer.
    Drop {
        layer: u8,
    },
    Forget {
        layer: u8,
    },
    MakeRoom {
        bytes: u64,
    },
    GiveWay,
    /// The daemon ends, and starts again.
    Restart,
    /// A map is damaged while nobody looks.
    Damage {
        layer: u8,
    },
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let layer = 0..3_u8;
    let op = prop_oneof![
        2 => (layer.clone(), any::<bool>()).prop_map(|(layer, complete)| Op::Stage { layer, complete }),
        2 => layer.clone().prop_map(|layer| Op::Insert { layer }),
        6 => (layer.clone(), 0..CHUNKS).prop_map(|(layer, chunk)| Op::Store { layer, chunk }),
        1 => layer.clone().prop_map(|layer| Op::Evict { layer }),
        1 => layer.clone().prop_map(|layer| Op::EvictGroup { layer }),
        2 => layer.clone().prop_map(|layer| Op::Mount { layer }),
        1 => Just(Op::Unmount),
        2 => layer.clone().prop_map(|layer| Op::Drop { layer }),
        2 => layer.clone().prop_map(|layer| Op::Forget { layer }),
        1 => (0..400_000_u64).prop_map(|bytes| Op::MakeRoom { bytes }),
        1 => Just(Op::GiveWay),
        1 => Just(Op::Restart),
        1 => layer.prop_map(|layer| Op::Damage { layer }),
    ];
    proptest::collection::vec(op, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Whatever happens, what is counted is what is there.
    #[test]
    fn every_block_of_every_file_counts(ops in ops()) {
        let dir = directory();
        let mut cache = with_marks(dir.path());
        let mut open_layers: HashMap<u8, Arc<CachedLayer>> = HashMap::new();
        let mut mounts = Vec::new();
        for op in ops {
            let name = |layer: u8| format!("layer {layer}");
            let told = format!("{op:?}");
            match op {
                Op::Stage { layer, complete } => {
                    let mut staged = cache.stage(&digest(&name(layer))).unwrap();
                    for chunk in 0..if complete { CHUNKS } else { 2 } {
                        staged.write(chunk as u64 * STRIDE, &bytes(&name(layer), chunk)).unwrap();
                    }
                    if complete {
                        open_layers.insert(layer, staged.commit(with_gaps(&name(layer)), true).unwrap());
                    }
                }
                Op::Insert { layer } => {
                    let cached = cache.insert(&digest(&name(layer)), with_gaps(&name(layer))).unwrap();
                    open_layers.insert(layer, cached);
                }
                Op::Store { layer, chunk } => if let Some(cached) = open_layers.get(&layer) {
                    prop_assert_eq!(cached.store(chunk, &bytes(&name(layer), chunk)).unwrap(), Stored::Cached);
                },
                Op::Evict { layer } => if let Some(cached) = open_layers.get(&layer) {
                    cached.evict_all();
                },
                Op::EvictGroup { layer } => if let Some(cached) = open_layers.get(&layer) {
                    cached.evict_group(0);
                },
                Op::Mount { layer } => if let Some(cached) = open_layers.get(&layer) {
                    fill(cached, &name(layer));
                    cached.check_all(|| false);
                    // Whatever is missing is damage that the check has just found.
                    fill(cached, &name(layer));
                    let (path, _hold) = cached.hold().unwrap();
                    mounts.push((layer, fs::File::open(path).unwrap()));
                },
                Op::Unmount => drop(mounts.pop()),
                Op::Drop { layer } => drop(open_layers.remove(&layer)),
                Op::Forget { layer } => {
                    let gone = cache.forget(&digest(&name(layer)));
                    prop_assert_eq!(gone, !open_layers.contains_key(&layer));
                }
                Op::MakeRoom { bytes } => cache.make_room(bytes, None),
                Op::GiveWay => {
                    cache.give_way(Fullness { total: u64::MAX, available: 0 });
                }
                Op::Restart => {
                    open_layers.clear();
                    drop(cache);
                    cache = with_marks(dir.path());
                }
                Op::Damage { layer } => if let Entry::Vacant(place) = open_layers.entry(layer) {
                    drop(fs::write(layers(dir.path()).join(digest(&name(layer)).hex()).join("map"), "damage"));
                    if let Some(cached) = cache.get(&digest(&name(layer))).unwrap() {
                        place.insert(cached);
                    }
                },
            }
            cache.sweep();
            prop_assert_eq!(cache.used_bytes(), du(&layers(dir.path())), "after {}", told);
            for (layer, mount) in &mounts {
                let mut seen = vec![0; CHUNK];
                mount.read_exact_at(&mut seen, STRIDE).unwrap();
                prop_assert!(seen == bytes(&name(*layer), 1), "a mount reads other bytes after {}", told);
            }
        }
        drop((open_layers, mounts));
        cache.sweep();
        cache.make_room(u64::MAX, None);
        prop_assert_eq!((cache.used_bytes(), cache.replaced_bytes()), (0, 0));
    }
}

#[test]
fn stages_count_while_they_are_made() {
    let dir = directory();
    let cache = open(dir.path(), 0);
    let mut staged = cache.stage(&digest("a")).unwrap();
    staged.write(0, &bytes("a", 0)).unwrap();
    assert_eq!(cache.used_bytes(), CHUNK as u64);
    drop(staged);
    assert_eq!(cache.used_bytes(), 0);
}

#[test]
fn whatever_lies_beside_the_data_counts() {
    let dir = directory();
    let cache = open(dir.path(), 0);
    drop(insert(&cache, "a", 1));
    let before = cache.used_bytes();
    drop(cache);
    let windows = layers(dir.path()).join(digest("a").hex()).join("windows");
    fs::write(windows, [1; 100_000]).unwrap();
    let cache = open(dir.path(), 0);
    assert!(cache.used_bytes() >= before + 100_000);
    assert_eq!(cache.used_bytes(), du(&layers(dir.path())));
    let opened = cache.get(&digest("a")).unwrap().unwrap();
    assert_eq!(cache.used_bytes(), opened.allocated_bytes());
}

#[test]
fn what_others_keep_on_this_disk_counts_too() {
    let (dir, others) = (directory(), directory());
    fs::write(others.path().join("a"), [1; 10_000]).unwrap();
    // As a mount point: what is in it is not looked at.
    fs::create_dir(others.path().join("1.image")).unwrap();
    fs::write(others.path().join("1.image/file"), [1; 50_000]).unwrap();
    let cache = open(dir.path(), TEN);
    cache.also_count([others.path().to_owned(), "/nowhere".into()]);
    assert_eq!(cache.used_bytes(), 12_288);
    fs::write(others.path().join("b"), [1; 5_000]).unwrap();
    cache.tidy();
    assert_eq!(cache.used_bytes(), 20_480);
    fs::remove_file(others.path().join("a")).unwrap();
    cache.tidy();
    assert_eq!(cache.used_bytes(), 8_192);
    // It takes room that layers do not have then.
    fs::write(others.path().join("c"), vec![1; 10 * CHUNK]).unwrap();
    cache.tidy();
    let cached = insert(&cache, "a", 2);
    assert_eq!(cached.store(0, &bytes("a", 0)).unwrap(), Stored::Bypassed);
}

/// A layer as an overlay has it: mounted, and held by nobody.
fn mounted(cache: &Arc<Cache>, name: &str) -> (Arc<CachedLayer>, fs::File) {
    let cached = insert(cache, name, 3);
    fill(&cached, name);
    let (path, _hold) = cached.hold().unwrap();
    (cached, fs::File::open(path).unwrap())
}

#[test]
fn what_is_mounted_is_not_evicted_though_nobody_holds_it() {
    let dir = directory();
    let cache = open(dir.path(), TEN);
    let (cached, mount) = mounted(&cache, "a");
    assert_eq!((cached.evict_all(), cached.evict_group(0)), (0, 0));
    assert_eq!(cache.held_bytes(), cached.allocated_bytes());
    let wants = insert(&cache, "wants", 10);
    let stored = (0..10).map(|chunk| wants.store(chunk, &bytes("wants", chunk)).unwrap());
    assert!(stored.into_iter().any(|stored| stored == Stored::Cached));
    assert!((0..3).all(|chunk| holds(&cached, "a", chunk)), "it would free nothing");
    // Nor does it go when nobody has the layer open.
    drop(cached);
    cache.make_room(u64::MAX, None);
    let cached = cache.get(&digest("a")).unwrap().unwrap();
    assert_eq!(cached.present_bytes(), 3 * CHUNK as u64);
    drop(mount);
    assert_eq!(cache.held_bytes(), 0);
    assert!(cached.evict_all() >= 3 * CHUNK as u64);
}

#[test]
fn a_mounted_file_without_its_layer_counts_until_it_is_unmounted() {
    let dir = directory();
    let cache = open(dir.path(), 0);
    let (cached, mount) = mounted(&cache, "a");
    drop(cached);
    assert!(cache.forget(&digest("a")));
    assert!(cache.get(&digest("a")).unwrap().is_none());
    let all = 3 * CHUNK as u64;
    assert_eq!(
        (cache.used_bytes(), cache.replaced_bytes(), cache.held_bytes()),
        (all, all, all)
    );
    assert_eq!(cache.metrics().cache_replaced_bytes.get(), all as i64);
    // The same layer again is another file.
    let again = insert(&cache, "a", 3);
    fill(&again, "a");
    drop((again, cache));
    let cache = open(dir.path(), 0);
    assert_eq!(cache.replaced_bytes(), all, "after a restart");
    cache.tidy();
    assert_eq!(cache.replaced_bytes(), all);
    let mut seen = vec![0; CHUNK];
    mount.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(seen, bytes("a", 0));
    drop(mount);
    cache.tidy();
    assert_eq!(
        (cache.replaced_bytes(), cache.metrics().cache_replaced_bytes.get()),
        (0, 0)
    );
    assert_eq!(cache.used_bytes(), du(&layers(dir.path())));
}

#[test]
fn where_nobody_can_tell_a_mounted_file_loses_its_name() {
    let dir = directory();
    let cache = open(dir.path(), 0);
    cache.blind.store(true, Ordering::Relaxed);
    let (cached, mount) = mounted(&cache, "a");
    assert_eq!(cache.held_bytes(), 0);
    drop(cached);
    assert!(cache.forget(&digest("a")));
    assert_eq!((cache.used_bytes(), cache.replaced_bytes()), (0, 0));
    let mut seen = vec![0; CHUNK];
    mount.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(seen, bytes("a", 0));
}

/// A cache with marks at 80 and 75 percent.
fn with_marks(root: &Path) -> Arc<Cache> {
    let config = CacheConfig {
        high_percent: 80,
        low_percent: 75,
        ..NO_MARKS
    };
    Cache::open(root, &config, Arc::new(Metrics::new())).unwrap()
}

/// A disk that is full by so many bytes more than 75 percent.
fn over_low(bytes: u64) -> Fullness {
    let total = 1 << 40;
    Fullness {
        total,
        available: total / 4 - bytes,
    }
}

/// A disk that is full by more than the high mark, and has as much to give as is there.
fn full() -> Fullness {
    over_low(1 << 37)
}

#[test]
fn what_nothing_refers_to_gives_way_the_oldest_first_down_to_the_low_mark() {
    let dir = tempfile::tempdir().unwrap();
    let cache = with_marks(dir.path());
    for name in ["oldest", "older", "newer"] {
        fill(&insert(&cache, name, 4), name);
    }
    let each = cache.used_bytes() / 3;
    // Four percent over the low mark is one below the high one.
    let total = 100 * each;
    let at = |available: u64| Fullness { total, available };
    assert_eq!(cache.give_way(at(21 * each)), 0);
    assert_eq!(cache.give_way(at(20 * each)), 0, "at the mark");
    let names = || ["oldest", "older", "newer"].map(|name| cache.known().contains(&digest(name)));
    assert_eq!(names(), [true, true, true]);
    // Below 80 percent, not just below 85.
    let disk = Fullness {
        total: 20 * each,
        available: 4 * each - each / 2,
    };
    assert_eq!(cache.give_way(disk), 2 * each);
    assert_eq!(names(), [false, false, true]);
    assert_eq!(cache.used_bytes(), each);
    assert_eq!(cache.metrics().cache_evicted_bytes_total.get(), 2 * each);
    assert_eq!(cache.give_way(full()), each, "as much as there is");
    assert_eq!(cache.give_way(full()), 0);
}

#[test]
fn pages_of_a_file_are_given_back_and_its_bytes_stay() {
    use rustix::io::{ReadWriteFlags, preadv2};

    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 0);
    let cached = insert(&cache, "layer", 4);
    fill(&cached, "layer");
    let file = fs::File::open(cached.dir.join("data")).unwrap();
    file.sync_all().unwrap();
    let is_in_memory = || {
        let mut byte = [0];
        preadv2(
            &file,
            &mut [std::io::IoSliceMut::new(&mut byte)],
            0,
            ReadWriteFlags::NOWAIT,
        )
    };
    if let Err(error @ rustix::io::Errno::OPNOTSUPP) = is_in_memory() {
        eprintln!("skipped: this file system does not tell what is in memory: {error}");
        return;
    }
    assert!((0..4).all(|chunk| holds(&cached, "layer", chunk)));
    assert_eq!(is_in_memory(), Ok(1));
    cached.give_pages_back();
    assert_eq!(is_in_memory(), Err(rustix::io::Errno::AGAIN));
    assert!((0..4).all(|chunk| holds(&cached, "layer", chunk)));
}

#[test]
fn layers_in_use_give_nothing_to_the_mark() {
    let dir = tempfile::tempdir().unwrap();
    let cache = with_marks(dir.path());
    let [used, idle, young] = ["used", "idle", "young"].map(|name| {
        let cached = insert(&cache, name, 2);
        fill(&cached, name);
        cached
    });
    let (in_use, was_used) = (used.pin(), idle.pin());
    was_used.idle_from(Instant::now() + Duration::from_secs(3600));
    assert_eq!(cache.give_way(full()), 0, "not idle yet, and just made");
    was_used.idle_from(Instant::now());
    assert!(cache.give_way(full()) >= 2 * CHUNK as u64);
    assert_eq!((idle.present_bytes(), young.present_bytes()), (0, 2 * CHUNK as u64));
    assert!(used.is_complete());
    // It is live, and its bytes come back.
    fill(&idle, "idle");
    was_used.wanted();
    assert_eq!(cache.give_way(full()), 0);
    // Whoever else uses it keeps it.
    let second = idle.pin();
    was_used.idle_from(Instant::now());
    assert!(idle.is_pinned());
    assert_eq!(cache.give_way(full()), 0);
    drop(second);
    assert!(!idle.is_pinned());
    assert!(cache.give_way(full()) > 0);
    drop(in_use);
    drop(used);
    assert!(cache.give_way(full()) > 0, "let go");
    assert!(cache.get(&digest("used")).unwrap().is_none());
}

#[test]
fn nothing_gives_way_when_the_daemon_ends_and_pins_go() {
    let dir = tempfile::tempdir().unwrap();
    let cache = with_marks(dir.path());
    for name in ["closed", "open"] {
        fill(&insert(&cache, name, 4), name);
    }
    let open = insert(&cache, "open", 4);
    let before = cache.used_bytes();
    drop([open.pin(), insert(&cache, "closed", 4).pin()]);
    cache.keep_all();
    assert_eq!(cache.give_way(full()), 0);
    cache.make_room(before, None);
    assert_eq!(cache.used_bytes(), before);
    let closed = insert(&cache, "closed", 4);
    assert!((0..4).all(|chunk| restores(&open, "open", chunk) && restores(&closed, "closed", chunk)));
}

#[test]
fn without_a_mark_nothing_gives_way() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 0);
    fill(&insert(&cache, "a", 2), "a");
    let full = Fullness {
        total: 1 << 40,
        available: 0,
    };
    assert_eq!(cache.give_way(full), 0);
}

#[test]
fn what_is_idle_goes_before_anything_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), TEN);
    let [used, idle] = ["used", "idle"].map(|name| insert(&cache, name, 4));
    let (_in_use, was_used) = (used.pin(), idle.pin());
    fill(&used, "used");
    fill(&idle, "idle");
    was_used.idle_from(Instant::now());
    let wants = insert(&cache, "wants", 4);
    let _wanted = wants.pin();
    fill(&wants, "wants");
    assert_eq!(idle.present_bytes(), 0);
    assert!(used.is_complete());
}
