//! Budget, eviction under readers, crashes and damage.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::layer::GROUP;
use super::{Cache, CacheError, CachedLayer, Staging, Stored};
use crate::config::{ByteSize, CacheConfig};
use crate::layer::index::{IndexParts, Inode, mode};
use crate::layer::{Access, Chunk, Codec, Digest, LayerIndex};
use crate::metrics::Metrics;

mod damage;
mod disk;
#[cfg(feature = "shuttle")]
mod interleaved;
mod names;
mod twins;
mod whole;

/// Bytes of a test's chunks.
const CHUNK: usize = 64 << 10;

/// Limits alone: how full the disk of a test is, is not its business.
const NO_MARKS: CacheConfig = CacheConfig {
    max_size: ByteSize(0),
    min_free: ByteSize(0),
    high_percent: 100,
    low_percent: 99,
};

pub(super) fn open(root: &Path, max_size: u64) -> Arc<Cache> {
    let config = CacheConfig {
        max_size: ByteSize(max_size),
        min_free: ByteSize(0),
        ..NO_MARKS
    };
    Cache::open(root, &config, Arc::new(Metrics::new())).unwrap()
}

/// The bytes of a chunk: no two alike, none of them zero.
fn bytes(layer: &str, chunk: usize) -> Vec<u8> {
    let seed = Digest::of(format!("{layer} {chunk}").as_bytes());
    seed.as_bytes().iter().map(|b| b | 1).cycle().take(CHUNK).collect()
}

/// A layer of `count` chunks, `stride` bytes apart.
fn index(layer: &str, count: usize, stride: u64, access: Access) -> LayerIndex {
    let ranged = access == Access::Ranges;
    let chunks = (0..count)
        .map(|i| Chunk {
            data_offset: i as u64 * stride,
            data_len: CHUNK as u32,
            blob_offset: 0,
            blob_len: u32::from(ranged),
            skip: 0,
            digest: Digest::of(&bytes(layer, i)),
        })
        .collect();
    let root = Inode {
        mode: mode::DIR | 0o755,
        nlink: 2,
        parent: 1,
        ..Inode::default()
    };
    LayerIndex::new(IndexParts {
        access,
        codec: Codec::None,
        data_size: count as u64 * stride,
        blob_size: 1,
        inodes: vec![root],
        dirents: Vec::new(),
        xattrs: Vec::new(),
        chunks,
        verify: crate::layer::Verify::Content,
        checkpoints: Vec::new(),
        strings: Vec::new(),
    })
    .unwrap()
}

fn digest(layer: &str) -> Digest {
    Digest::of(layer.as_bytes())
}

fn insert(cache: &Arc<Cache>, layer: &str, count: usize) -> Arc<CachedLayer> {
    let index = index(layer, count, CHUNK as u64, Access::Ranges);
    cache.insert(&digest(layer), index).unwrap()
}

fn fill(cached: &CachedLayer, layer: &str) {
    for chunk in 0..cached.index().chunks().len() {
        assert_eq!(cached.store(chunk, &bytes(layer, chunk)).unwrap(), Stored::Cached);
    }
}

/// Whether a chunk is ready; its bytes are right then.
fn holds(cached: &CachedLayer, layer: &str, chunk: usize) -> bool {
    let mut buf = vec![0; CHUNK];
    let offset = cached.index().chunks().get(chunk).unwrap().data_offset;
    let ready = cached.read_ready(offset, &mut buf).map(Result::unwrap).is_some();
    assert!(!ready || buf == bytes(layer, chunk), "chunk {chunk} is wrong");
    ready
}

/// Whether a chunk is there on the slow way, which verifies.
fn restores(cached: &CachedLayer, layer: &str, chunk: usize) -> bool {
    let mut buf = vec![0; CHUNK];
    let offset = cached.index().chunks().get(chunk).unwrap().data_offset;
    let missing = cached.read_present(offset, &mut buf, &BTreeMap::new());
    assert!(
        !missing.is_empty() || buf == bytes(layer, chunk),
        "chunk {chunk} is wrong"
    );
    missing.is_empty()
}

#[test]
fn only_the_right_bytes_are_stored() {
    let dir = tempfile::tempdir().unwrap();
    let cached = insert(&open(dir.path(), 0), "a", 3);
    assert!(matches!(
        cached.store(0, &bytes("a", 1)),
        Err(CacheError::Corrupt { .. })
    ));
    assert!(matches!(
        cached.store(0, &bytes("a", 0)[1..]),
        Err(CacheError::Corrupt { .. })
    ));
    assert!(matches!(
        cached.store(9, &bytes("a", 0)),
        Err(CacheError::Corrupt { .. })
    ));
    assert!(!holds(&cached, "a", 0));
    cached.store(0, &bytes("a", 0)).unwrap();
    assert!(holds(&cached, "a", 0));
    assert_eq!(cached.missing(0, 3 * CHUNK as u64).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(cached.missing(CHUNK as u64 - 1, 1).count(), 0);
    assert!(!cached.is_complete());
    assert_eq!(cached.present_bytes(), CHUNK as u64);
}

#[test]
fn a_layer_is_the_same_for_everyone_and_stays() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 0);
    assert!(cache.get(&digest("a")).unwrap().is_none());
    let first = insert(&cache, "a", 2);
    fill(&first, "a");
    assert!(Arc::ptr_eq(&first, &cache.get(&digest("a")).unwrap().unwrap()));
    drop(first);
    let again = cache.get(&digest("a")).unwrap().unwrap();
    assert!(restores(&again, "a", 1), "verified again, as nobody sealed it");
    assert!(holds(&again, "a", 1) && !holds(&again, "a", 0));
}

#[test]
fn nobody_else_can_reach_the_data_or_use_the_cache() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 0);
    insert(&cache, "a", 1);
    for path in ["layers", "layers/.incoming", &format!("layers/{}", digest("a").hex())] {
        let mode = fs::metadata(dir.path().join(path)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700, "{path}");
    }
    let second = Cache::open(dir.path(), &CacheConfig::default(), Arc::new(Metrics::new()));
    assert!(matches!(second, Err(CacheError::InUse { .. })));
}

#[test]
fn an_orderly_end_saves_the_verification() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 0);
    let cached = insert(&cache, "a", 3);
    cached.store(1, &bytes("a", 1)).unwrap();
    cache.close();
    drop((cache, cached));
    let cache = open(dir.path(), 0);
    assert!(cache.used_bytes() >= CHUNK as u64);
    let cached = cache.get(&digest("a")).unwrap().unwrap();
    assert!(holds(&cached, "a", 1) && !holds(&cached, "a", 0));
}

/// A seal is broken by the first store, which waits for the disk: a reader of a layer that is new has none to wait for.
#[test]
fn a_new_layer_has_no_seal_to_break() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 0);
    let cached = insert(&cache, "a", 2);
    let map = dir.path().join("layers").join(digest("a").hex()).join("map");
    let sealed = || fs::read(&map).unwrap()[12];
    assert_eq!(sealed(), 0);
    cache.close();
    assert_eq!(sealed(), 0, "there is nothing to believe");
    fill(&cached, "a");
    cache.close();
    assert_eq!(sealed(), 1);
}

/// Who removes a layer does not wait until it is deleted, and its bytes count as free.
#[test]
fn a_removed_layer_is_out_of_sight_at_once_and_deleted_by_a_thread() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 0);
    fill(&insert(&cache, "a", 8), "a");
    assert!(cache.used_bytes() > 0);
    let layer = dir.path().join("layers").join(digest("a").hex());
    assert!(layer.exists() && cache.forget(&digest("a")));
    assert!(!layer.exists());
    assert_eq!((cache.used_bytes(), cache.contains_now(&digest("a"))), (0, Some(false)));
    assert!(cache.trash.empty(std::time::Duration::from_secs(60)));
    assert_eq!(cache.trash.bytes(), 0);
    assert_eq!(fs::read_dir(dir.path().join("layers/.trash")).unwrap().count(), 0);
    // It can come again.
    assert!(!insert(&cache, "a", 8).is_complete());
}

/// Copies the layers as they are at this moment: what a kill leaves.
fn kill(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let (entry, target) = (entry.unwrap(), to);
        let target = target.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            fs::create_dir(&target).unwrap();
            kill(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn after_a_kill_what_was_written_is_verified_before_it_is_used() {
    let (dir, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let cache = open(dir.path(), 0);
    let cached = insert(&cache, "a", 5);
    fill(&cached, "a");
    let staged = cache.stage(&digest("b")).unwrap();
    fs::create_dir(dir.path().join("layers").join(digest("c").hex())).unwrap();
    kill(dir.path(), copy.path());
    drop(staged);
    // A chunk that the disk lost, and one that it mixed up.
    let data = copy.path().join("layers").join(digest("a").hex()).join("data");
    let data = fs::File::options().write(true).open(data).unwrap();
    data.write_all_at(&vec![0; CHUNK], 2 * CHUNK as u64).unwrap();
    data.write_all_at(b"x", 4 * CHUNK as u64 + 7).unwrap();

    let metrics = Arc::new(Metrics::new());
    let cache = Cache::open(copy.path(), &CacheConfig::default(), Arc::clone(&metrics)).unwrap();
    let names = fs::read_dir(copy.path().join("layers")).unwrap().count();
    assert_eq!(names, 5, "the lock, .ids, .incoming, .trash, and the one whole layer");
    assert_eq!(fs::read_dir(copy.path().join("layers/.incoming")).unwrap().count(), 0);
    let cached = cache.get(&digest("a")).unwrap().unwrap();
    for (chunk, there) in [true, true, false, true, false].into_iter().enumerate() {
        assert!(!holds(&cached, "a", chunk), "chunk {chunk} before its verification");
        assert_eq!(restores(&cached, "a", chunk), there);
        assert_eq!(holds(&cached, "a", chunk), there);
    }
    assert_eq!(metrics.verify_failures_total.with_label_values(&["disk"]).get(), 2);
    fill(&cached, "a");
    assert!(cached.is_complete());
    assert_eq!(cached.present_bytes(), 5 * CHUNK as u64);
}

#[test]
fn a_seal_is_broken_by_the_first_change() {
    let (dir, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let cache = open(dir.path(), 0);
    let cached = insert(&cache, "a", 2);
    fill(&cached, "a");
    cache.close();
    drop((cache, cached));
    let cache = open(dir.path(), 0);
    let cached = cache.get(&digest("a")).unwrap().unwrap();
    assert!(cached.is_complete());
    cached.evict_group(0);
    kill(dir.path(), copy.path());
    let cache = open(copy.path(), 0);
    let cached = cache.get(&digest("a")).unwrap().unwrap();
    assert!(!holds(&cached, "a", 0) && !restores(&cached, "a", 0));
}

#[test]
fn damage_makes_absent() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage, bool, bool); 7] = [
        ("index flipped", |dir| flip(&dir.join("index"), 70), false, false),
        ("index cut", |dir| cut(&dir.join("index"), 90), false, false),
        ("map flipped", |dir| flip(&dir.join("map"), 20), true, false),
        ("map gone", |dir| fs::remove_file(dir.join("map")).unwrap(), true, false),
        ("bits flipped", |dir| flip(&dir.join("map"), 64), true, false),
        ("data cut", |dir| cut(&dir.join("data"), CHUNK as u64), true, true),
        (
            "data gone",
            |dir| fs::remove_file(dir.join("data")).unwrap(),
            true,
            false,
        ),
    ];
    for (what, damage, layer_there, first_there) in damages {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path(), 0);
        let cached = insert(&cache, "a", 2);
        fill(&cached, "a");
        cache.close();
        drop((cache, cached));
        damage(&dir.path().join("layers").join(digest("a").hex()));
        let cache = open(dir.path(), 0);
        let cached = cache.get(&digest("a")).unwrap();
        assert_eq!(cached.is_some(), layer_there, "{what}");
        let cached = cached.unwrap_or_else(|| insert(&cache, "a", 2));
        assert_eq!(restores(&cached, "a", 0), first_there, "{what}");
        assert!(!restores(&cached, "a", 1), "{what}");
        fill(&cached, "a");
        assert!(holds(&cached, "a", 0) && holds(&cached, "a", 1), "{what}");
    }
}

fn flip(path: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 8], at).unwrap();
}

fn cut(path: &Path, len: u64) {
    fs::File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_len(len)
        .unwrap();
}

/// Room for ten chunks, and for the other files of a few layers: less than one chunk more.
const TEN: u64 = 11 * CHUNK as u64 - 4096;

#[test]
fn layers_that_nobody_uses_go_first_the_oldest_before_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), TEN);
    for name in ["old", "kept", "new"] {
        let cached = insert(&cache, name, 3);
        fill(&cached, name);
    }
    let kept = cache.get(&digest("kept")).unwrap().unwrap();
    let _used = kept.pin();
    let wants = insert(&cache, "wants", 4);
    fill(&wants, "wants");
    assert!(cache.get(&digest("old")).unwrap().is_none(), "gone as a whole");
    assert!(cache.get(&digest("new")).unwrap().is_some());
    assert!(wants.is_complete());
    assert!((0..3).all(|chunk| restores(&kept, "kept", chunk)));
    assert!(cache.used_bytes() <= TEN);
}

#[test]
fn an_open_layer_that_nobody_uses_keeps_its_index() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), TEN);
    let open = insert(&cache, "open", 8);
    fill(&open, "open");
    let wants = insert(&cache, "wants", 8);
    let _used = wants.pin();
    fill(&wants, "wants");
    assert_eq!(open.present_bytes(), 0);
    drop(open);
    let open = cache.get(&digest("open")).unwrap().unwrap();
    assert!(!restores(&open, "open", 0));
}

#[test]
fn of_layers_in_use_the_least_recently_used_groups_go() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), TEN);
    // One chunk in each group.
    let sparse = index("a", 10, super::layer::GROUP, Access::Ranges);
    let a = cache.insert(&digest("a"), sparse).unwrap();
    let _used = a.pin();
    fill(&a, "a");
    let b = insert(&cache, "b", 2);
    let _used = b.pin();
    // Time goes on with every store only.
    assert!(holds(&a, "a", 0));
    fill(&b, "b");
    assert!(holds(&a, "a", 0), "used last");
    assert!(!holds(&a, "a", 1), "used first");
    assert!(holds(&a, "a", 9));
    assert!(b.is_complete());
    assert!(cache.metrics().cache_evicted_bytes_total.get() >= 2 * CHUNK as u64);
}

#[test]
fn a_streamed_layer_in_use_never_goes() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), TEN);
    let mut staged = cache.stage(&digest("streamed")).unwrap();
    for chunk in 0..6 {
        staged.write((chunk * CHUNK) as u64, &bytes("streamed", chunk)).unwrap();
    }
    let streamed = index("streamed", 6, CHUNK as u64, Access::Stream);
    let streamed = staged.commit(streamed, true).unwrap();
    let used = streamed.pin();
    let ranged = cache
        .insert(&digest("r"), index("r", 4, super::layer::GROUP, Access::Ranges))
        .unwrap();
    let _ranged_used = ranged.pin();
    fill(&ranged, "r");
    // No room: the ranged layer gives way to itself.
    let other = insert(&cache, "other", 4);
    let _other_used = other.pin();
    fill(&other, "other");
    assert!(streamed.is_complete());
    assert_eq!(ranged.present_bytes(), 0);
    // Whoever wants more than the others can give is served past the disk, or streams elsewhere.
    let mut another = cache.stage(&digest("another")).unwrap();
    let write = |staging: &mut Staging, chunk| staging.write((chunk * CHUNK) as u64, &bytes("another", chunk));
    let staged = (0..8).take_while(|&chunk| write(&mut another, chunk).is_ok()).count();
    assert!(staged < 8, "there was room for all");
    assert_eq!(other.present_bytes(), 0);
    assert_eq!(ranged.store(0, &bytes("r", 0)).unwrap(), Stored::Bypassed);
    assert!(streamed.is_complete());
    assert!(cache.used_bytes() <= TEN);
    drop(used);
    assert!(
        (staged..8).all(|chunk| write(&mut another, chunk).is_ok()),
        "in use no more, it goes"
    );
    assert_eq!(streamed.present_bytes(), 0);
}

#[test]
fn among_what_is_used_bytes_that_nobody_has_read_go_first() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 4 * GROUP + GROUP / 2);
    let chunks = GROUP as usize / CHUNK;
    let cached = insert(&cache, "a", 5 * chunks);
    let _used = cached.pin();
    for chunk in 0..chunks {
        cached.store(chunk, &bytes("a", chunk)).unwrap();
    }
    // Filled up to the last of what there is room for, later than that was read.
    for chunk in chunks..4 * chunks {
        cached.store_unused(chunk, &bytes("a", chunk)).unwrap();
    }
    for chunk in 4 * chunks..5 * chunks {
        cached.store(chunk, &bytes("a", chunk)).unwrap();
    }
    assert!(
        (0..chunks).all(|chunk| holds(&cached, "a", chunk)),
        "what was read gave way"
    );
    assert!((4 * chunks..5 * chunks).all(|chunk| holds(&cached, "a", chunk)));
    assert!(cached.present_bytes() < 5 * GROUP, "nothing gave way");
}

#[test]
fn what_never_fits_is_bypassed() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), CHUNK as u64 - 1);
    let cached = insert(&cache, "a", 1);
    assert_eq!(cached.store(0, &bytes("a", 0)).unwrap(), Stored::Bypassed);
    assert!(!holds(&cached, "a", 0));
    assert_eq!(cache.metrics().cache_bypassed_bytes_total.get(), CHUNK as u64);
    assert_eq!(
        (cached.present_bytes(), cache.used_bytes()),
        (0, cached.allocated_bytes())
    );
}

#[test]
fn what_has_to_stay_free_stays_free() {
    let dir = tempfile::tempdir().unwrap();
    let config = CacheConfig {
        max_size: ByteSize(0),
        min_free: ByteSize(u64::MAX),
        ..NO_MARKS
    };
    let cache = Cache::open(dir.path(), &config, Arc::new(Metrics::new())).unwrap();
    let cached = insert(&cache, "a", 1);
    assert_eq!(cached.store(0, &bytes("a", 0)).unwrap(), Stored::Bypassed);
    let mut staged = cache.stage(&digest("b")).unwrap();
    let error = staged.write(0, b"x").unwrap_err();
    assert!(error.to_string().contains("cache.min_free"), "{error}");
}

/// Readers, writers and evictions of one layer at once: no reader ever sees a byte of a hole.
#[test]
fn readers_never_see_a_hole() {
    const CHUNKS: usize = 12;
    /// Reads that have to succeed while chunks come and go.
    const READS: u64 = 5_000;
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 0);
    // Half of the chunks begin in the first group, half in the second.
    let index = index("a", CHUNKS, super::layer::GROUP / 6, Access::Ranges);
    let cached = cache.insert(&digest("a"), index).unwrap();
    let expected: Vec<Vec<u8>> = (0..CHUNKS).map(|chunk| bytes("a", chunk)).collect();
    let (done, hits, wrong) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for reader in 0..3 {
            let (cached, expected, done, hits, wrong) = (&cached, &expected, &done, &hits, &wrong);
            scope.spawn(move || {
                let mut buf = vec![0; CHUNK];
                let mut chunk = reader;
                while !done.load(Ordering::Relaxed) {
                    chunk = (chunk + 5) % CHUNKS;
                    let offset = cached.index().chunks().get(chunk).unwrap().data_offset;
                    let locked = reader == 2;
                    let there = if locked {
                        cached.read_present(offset, &mut buf, &BTreeMap::new()).is_empty()
                    } else {
                        cached.read_ready(offset, &mut buf).is_some()
                    };
                    if there {
                        hits.fetch_add(1, Ordering::Relaxed);
                        wrong.fetch_add(u64::from(buf != expected[chunk]), Ordering::Relaxed);
                    }
                }
            });
        }
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    for (chunk, bytes) in expected.iter().enumerate() {
                        cached.store(chunk, bytes).unwrap();
                    }
                }
            });
        }
        scope.spawn(|| {
            while hits.load(Ordering::Relaxed) < READS {
                cached.evict_group(0);
                cached.evict_group(1);
                cached.evict_all();
            }
            done.store(true, Ordering::Relaxed);
        });
    });
    assert_eq!(wrong.into_inner(), 0);
    fill(&cached, "a");
    assert!(cached.is_complete());
    assert_eq!(cached.present_bytes(), (CHUNKS * CHUNK) as u64);
    assert!((0..CHUNKS).all(|chunk| holds(&cached, "a", chunk)));
}
