//! Whole layers: verified, held, and never changed under a mount.

use super::*;
use std::path::PathBuf;

use crate::cache::{Checked, Hold, NotWhole};

/// Bytes between the beginnings of chunks in a layer with gaps.
const STRIDE: u64 = CHUNK as u64 + 10_000;

fn with_gaps(cache: &Arc<Cache>, name: &str, count: usize) -> Arc<CachedLayer> {
    cache
        .insert(&digest(name), index(name, count, STRIDE, Access::Ranges))
        .unwrap()
}

fn data(root: &Path, name: &str) -> std::path::PathBuf {
    root.join("layers").join(digest(name).hex()).join("data")
}

/// What the held file has to hold.
fn expected(name: &str, count: usize) -> Vec<u8> {
    let mut all = vec![0; (count as u64 * STRIDE).next_multiple_of(4096) as usize];
    for chunk in 0..count {
        let at = (chunk as u64 * STRIDE) as usize;
        all[at..at + CHUNK].copy_from_slice(&bytes(name, chunk));
    }
    all
}

fn check_all(cached: &CachedLayer) -> Vec<usize> {
    let checked = cached.check_all(|| false);
    assert!(checked.finished);
    checked.damaged
}

fn hold(cached: &Arc<CachedLayer>) -> (PathBuf, Hold) {
    cached.hold().unwrap()
}

/// All bytes of the file that is mounted.
fn held_bytes(cached: &Arc<CachedLayer>) -> Vec<u8> {
    fs::read(hold(cached).0).unwrap()
}

#[test]
fn what_this_process_stored_is_a_file_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 0);
    let cached = with_gaps(&cache, "a", 3);
    assert_eq!(cached.hold().err(), Some(NotWhole::Missing));
    fill(&cached, "a");
    assert_eq!(hold(&cached).0, data(dir.path(), "a"));
    assert_eq!(held_bytes(&cached), expected("a", 3));
    let empty = cache.insert(&digest("e"), index("e", 0, 0, Access::Ranges)).unwrap();
    assert_eq!(held_bytes(&empty), [] as [u8; 0]);
}

#[test]
fn nothing_is_mounted_of_which_the_next_process_would_not_know() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 0);
    let cached = with_gaps(&cache, "a", 3);
    fill(&cached, "a");
    let marker = data(dir.path(), "a").with_file_name(crate::cache::hold::MARKER);
    // A disk that is full, say; once is as bad as always.
    fs::create_dir(&marker).unwrap();
    for _ in 0..2 {
        assert_eq!(cached.hold().err(), Some(NotWhole::Disk));
    }
    fs::remove_dir(&marker).unwrap();
    let (path, hold) = hold(&cached);
    assert!(crate::cache::hold::is_exposed(path.parent().unwrap(), cache.boot_id()));
    drop(hold);
    // Another file takes its place when it is evicted; that one is marked when it is mounted.
    assert!(cached.evict_all() > 0);
    assert!(!marker.exists());
    fill(&cached, "a");
    let (path, _hold) = cached.hold().unwrap();
    assert!(crate::cache::hold::is_exposed(path.parent().unwrap(), cache.boot_id()));
}

#[test]
fn what_an_earlier_process_left_is_verified_before() {
    let dir = tempfile::tempdir().unwrap();
    for orderly in [true, false] {
        let cache = open(dir.path(), 0);
        let cached = with_gaps(&cache, "a", 4);
        fill(&cached, "a");
        if orderly {
            cache.close();
        }
        drop((cache, cached));
        // A byte of a chunk, a byte between chunks, and bytes behind the end, which a map with a seal knows nothing of.
        let file = fs::File::options().write(true).open(data(dir.path(), "a")).unwrap();
        file.write_all_at(b"x", STRIDE + 5).unwrap();
        file.write_all_at(b"stray", 2 * STRIDE + CHUNK as u64 + 100).unwrap();
        file.write_all_at(b"z", 4 * STRIDE + 1).unwrap();
        drop(file);

        let cache = open(dir.path(), 0);
        let cached = cache.get(&digest("a")).unwrap().unwrap();
        assert_eq!(cached.hold().err(), Some(NotWhole::Unchecked));
        let stopped = cached.check_all(|| true);
        assert_eq!(stopped, Checked::default());
        assert_eq!(check_all(&cached), [1], "orderly: {orderly}");
        assert_eq!(cached.hold().err(), Some(NotWhole::Missing));
        assert_eq!(cached.present_bytes(), 3 * CHUNK as u64);
        assert_eq!(
            cache.metrics().verify_failures_total.with_label_values(&["disk"]).get(),
            1
        );
        assert!(!holds(&cached, "a", 1) && holds(&cached, "a", 2));
        cached.store(1, &bytes("a", 1)).unwrap();
        assert_eq!(held_bytes(&cached), expected("a", 4));
        // Nothing is done twice.
        assert_eq!(check_all(&cached), [0; 0]);
    }
}

#[test]
fn damage_that_a_check_found_stays_known_after_a_kill() {
    let (dir, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let cache = open(dir.path(), 0);
    let cached = insert(&cache, "a", 2);
    fill(&cached, "a");
    cache.close();
    drop((cache, cached));
    flip(&data(dir.path(), "a"), 3);
    let cache = open(dir.path(), 0);
    let cached = cache.get(&digest("a")).unwrap().unwrap();
    assert!(cached.is_complete());
    assert_eq!(check_all(&cached), [0]);
    kill(dir.path(), copy.path());
    let cache = open(copy.path(), 0);
    let cached = cache.get(&digest("a")).unwrap().unwrap();
    assert!(!holds(&cached, "a", 0) && restores(&cached, "a", 1));
}

#[test]
fn what_is_held_is_never_evicted_and_counts() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), TEN);
    let held = insert(&cache, "held", 6);
    fill(&held, "held");
    let first = hold(&held);
    let second = hold(&held);
    drop(first);
    let used = held.pin();
    drop(used);
    assert_eq!(cache.held_bytes(), held.allocated_bytes());
    let wants = insert(&cache, "wants", 8);
    let stored: Vec<_> = (0..8)
        .map(|chunk| wants.store(chunk, &bytes("wants", chunk)).unwrap())
        .collect();
    // It gives way to itself, as it can be fetched in ranges; the one that is held does not.
    assert!(stored.contains(&Stored::Cached));
    assert_eq!((held.evict_all(), held.evict_group(0)), (0, 0));
    assert!((0..6).all(|chunk| holds(&held, "held", chunk)));
    assert!(cache.used_bytes() <= TEN && cache.used_bytes() >= held.allocated_bytes());
    drop(wants);
    drop(second);
    assert_eq!(cache.held_bytes(), 0);
    let wants = insert(&cache, "wants too", 8);
    fill(&wants, "wants too");
    assert_eq!(held.present_bytes(), 0, "a candidate again");
    assert!(cache.used_bytes() <= TEN);
}

#[test]
fn nothing_can_go_while_all_is_held() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), TEN);
    let held = insert(&cache, "held", 10);
    fill(&held, "held");
    let _hold = hold(&held);
    let wants = insert(&cache, "wants", 2);
    assert_eq!(wants.store(0, &bytes("wants", 0)).unwrap(), Stored::Bypassed);
    assert!(cache.told.lock().unwrap().is_some(), "somebody is told");
    assert!(cache.stage(&digest("b")).unwrap().write(0, &[1; CHUNK]).is_err());
}

#[test]
fn a_file_that_was_mounted_is_replaced_and_not_changed() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 0);
    cache.blind.store(true, Ordering::Relaxed);
    let cached = with_gaps(&cache, "a", 3);
    fill(&cached, "a");
    let before = hold(&cached);
    // As the kernel keeps it, whoever holds it.
    let mounted = fs::File::open(&before.0).unwrap();
    drop(before);
    assert!(cached.evict_group(0) >= 3 * CHUNK as u64);
    assert_eq!(cached.present_bytes(), 0);
    assert!(cached.allocated_bytes() < CHUNK as u64);
    let all = expected("a", 3);
    let mut seen = vec![0; all.len()];
    mounted.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(seen, all);
    assert!((0..3).all(|chunk| !holds(&cached, "a", chunk)));
    // The new file is another one, and works as the old one did.
    fill(&cached, "a");
    assert!((0..3).all(|chunk| holds(&cached, "a", chunk)));
    assert_eq!(held_bytes(&cached), all);
    mounted.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(seen, all);
    // Never mounted, it is changed in place, unless somebody says that it may be mounted.
    assert!(cached.evict_all() > 0);
    fill(&cached, "a");
    let told = fs::File::open(data(dir.path(), "a")).unwrap();
    cached.expose();
    cached.evict_all();
    told.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(seen, all);
    fill(&cached, "a");
    let in_place = fs::File::open(data(dir.path(), "a")).unwrap();
    cached.evict_all();
    in_place.read_exact_at(&mut seen, 0).unwrap();
    assert!(seen.iter().all(|&byte| byte == 0));
}

#[test]
fn the_next_process_knows_what_is_mounted() {
    let dir = tempfile::tempdir().unwrap();
    let blind = || {
        let cache = open(dir.path(), 0);
        cache.blind.store(true, Ordering::Relaxed);
        cache
    };
    let cache = blind();
    let cached = insert(&cache, "a", 2);
    fill(&cached, "a");
    let hold = hold(&cached);
    let mounted = fs::File::open(&hold.0).unwrap();
    // Without an end in order.
    drop((hold, cached, cache));
    let layer = dir.path().join("layers").join(digest("a").hex());
    for damage in [false, true] {
        if damage {
            fs::remove_file(layer.join("map")).unwrap();
        }
        let cache = blind();
        let cached = cache.get(&digest("a")).unwrap().unwrap();
        cached.evict_all();
        let mut seen = vec![0; CHUNK];
        mounted.read_exact_at(&mut seen, CHUNK as u64).unwrap();
        assert_eq!(seen, bytes("a", 1), "damage: {damage}");
        assert!(!layer.join("mounted").exists());
        fill(&cached, "a");
        drop(self::hold(&cached));
        assert!(layer.join("mounted").exists());
    }
    // After a boot nothing is mounted any more.
    fs::write(layer.join("mounted"), "another boot").unwrap();
    let in_place = fs::File::open(layer.join("data")).unwrap();
    let cache = open(dir.path(), 0);
    cache.get(&digest("a")).unwrap().unwrap().evict_all();
    let mut seen = vec![1; CHUNK];
    in_place.read_exact_at(&mut seen, 0).unwrap();
    assert!(seen.iter().all(|&byte| byte == 0));
}

#[test]
fn data_of_the_first_versions_gets_its_last_page() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 0);
    let cached = with_gaps(&cache, "a", 1);
    fill(&cached, "a");
    cache.close();
    drop((cache, cached));
    cut(&data(dir.path(), "a"), STRIDE);
    let cache = open(dir.path(), 0);
    let cached = cache.get(&digest("a")).unwrap().unwrap();
    assert!(cached.is_complete(), "it is believed as it was");
    check_all(&cached);
    assert_eq!(held_bytes(&cached), expected("a", 1));
}

/// Holds come and go while others try to evict: whoever holds the file sees all of it.
#[test]
fn a_hold_and_an_eviction_never_overlap() {
    const ROUNDS: usize = 200;
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 0);
    let cached = insert(&cache, "a", 3);
    let done = AtomicBool::new(false);
    let held = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                cached.evict_all();
                std::thread::yield_now();
            }
        });
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                fill(&cached, "a");
            }
        });
        scope.spawn(|| {
            let expected: Vec<u8> = (0..3).flat_map(|chunk| bytes("a", chunk)).collect();
            for _ in 0..ROUNDS {
                let (path, _hold) = loop {
                    if let Ok(held) = cached.hold() {
                        break held;
                    }
                };
                held.fetch_add(1, Ordering::Relaxed);
                let seen = fs::read(path).unwrap();
                assert!(seen == expected, "bytes were missing under a hold");
            }
            done.store(true, Ordering::Relaxed);
        });
    });
    assert_eq!(held.into_inner(), ROUNDS as u64);
}
