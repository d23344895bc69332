//! A disk that cannot read what it has, takes nothing, or is full.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lazuli::cache::{Cache, CachedLayer, Stored};
use lazuli::config::{ByteSize, CacheConfig};
use lazuli::layer::index::{IndexParts, Inode, mode};
use lazuli::layer::{Access, Chunk, Codec, Digest, LayerIndex, Verify};
use lazuli::metrics::Metrics;
use lazuli::store::{Kind, SnapshotRecord, Store, StoreError, Usage};

use super::Disk;
use super::device::Device;

/// Bytes of a chunk.
const CHUNK: usize = 4096;
/// Chunks of a layer: so many that its index is mapped, instead of being in memory.
const CHUNKS: usize = 1200;
/// MiB of a disk.
const SIZE: usize = 48;

pub fn open(root: &Path) -> Arc<Cache> {
    open_within(root, 0)
}

/// A cache of so many bytes; 0: of any number.
pub fn open_within(root: &Path, bytes: u64) -> Arc<Cache> {
    let config = CacheConfig {
        max_size: ByteSize(bytes),
        high_percent: 100,
        min_free: ByteSize(0),
        ..CacheConfig::default()
    };
    Cache::open(root, &config, Arc::new(Metrics::new())).unwrap()
}

/// The bytes of a chunk: no two alike.
pub fn bytes(layer: &str, chunk: usize) -> Vec<u8> {
    let seed = Digest::of(format!("{layer} {chunk}").as_bytes());
    seed.as_bytes().iter().copied().cycle().take(CHUNK).collect()
}

pub fn digest(layer: &str) -> Digest {
    Digest::of(layer.as_bytes())
}

/// The index of a layer of so many chunks.
pub fn index(layer: &str, chunks: usize) -> LayerIndex {
    let chunk = |at: usize| Chunk {
        data_offset: (at * CHUNK) as u64,
        data_len: CHUNK as u32,
        blob_offset: (at * CHUNK) as u64,
        blob_len: CHUNK as u32,
        skip: 0,
        digest: Digest::of(&bytes(layer, at)),
    };
    let root = Inode {
        mode: mode::DIR | 0o755,
        nlink: 2,
        parent: 1,
        ..Inode::default()
    };
    LayerIndex::new(IndexParts {
        access: Access::Ranges,
        codec: Codec::None,
        data_size: (chunks * CHUNK) as u64,
        blob_size: (chunks * CHUNK) as u64,
        inodes: vec![root],
        dirents: Vec::new(),
        xattrs: Vec::new(),
        chunks: (0..chunks).map(chunk).collect(),
        verify: Verify::Content,
        checkpoints: Vec::new(),
        strings: Vec::new(),
    })
    .unwrap()
}

/// Whether a chunk is there, after it was verified; its bytes are right then.
pub fn has(cached: &CachedLayer, layer: &str, chunk: usize) -> bool {
    let mut buf = vec![0; CHUNK];
    let missing = cached.read_present((chunk * CHUNK) as u64, &mut buf, &BTreeMap::new());
    assert!(
        !missing.is_empty() || buf == bytes(layer, chunk),
        "chunk {chunk} of {layer} is wrong"
    );
    missing.is_empty()
}

fn fill(cache: &Arc<Cache>, layer: &str) -> Arc<CachedLayer> {
    let cached = cache.insert(&digest(layer), index(layer, CHUNKS)).unwrap();
    for chunk in 0..CHUNKS {
        assert_eq!(cached.store(chunk, &bytes(layer, chunk)).unwrap(), Stored::Cached);
    }
    cached
}

pub fn snapshot(id: u64, label: usize) -> SnapshotRecord {
    SnapshotRecord {
        id,
        kind: Kind::Committed,
        parent: None,
        labels: [("text".to_owned(), "x".repeat(label))].into(),
        created: 0,
        updated: 0,
        layer: None,
        chain: Vec::new(),
        vouched: false,
        remapped: false,
        usage: Usage { bytes: 0, inodes: 0 },
    }
}

pub fn put(store: &Store, key: &str, label: usize) -> Result<(), StoreError> {
    let key = key.to_owned();
    store.write_snapshots(move |snapshots| {
        let id = snapshots.allocate_id()?;
        snapshots.put(&key, &snapshot(id, label))
    })
}

/// Of each file of a layer: when the disk cannot read it any more, the layer is made anew, or its bytes are fetched again, and all is well
/// from then on, on the same disk.
#[test]
fn what_the_disk_cannot_read_is_made_anew() {
    for name in ["index", "map"] {
        let device = Device::new(SIZE);
        let cache = open(&device.root());
        let cached = fill(&cache, "a");
        cache.close();
        drop((cached, cache));
        let path = device.root().join("layers").join(digest("a").hex()).join(name);
        assert!(device.lose(&path) > 0, "{name} is on the disk");
        assert!(fs::read(&path).is_err(), "{name} cannot be read");

        let cache = open(&device.root());
        let found = cache
            .get(&digest("a"))
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        match found {
            None => {
                assert_eq!(name, "index");
                assert!(!path.exists(), "it is moved away");
            }
            Some(cached) => {
                assert_eq!(name, "map");
                assert!(
                    (0..CHUNKS).all(|chunk| !has(&cached, "a", chunk)),
                    "nobody knows what is there"
                );
            }
        }
        let cached = fill(&cache, "a");
        assert!((0..CHUNKS).all(|chunk| has(&cached, "a", chunk)), "{name}");
        cache.close();
        drop((cached, cache));
        let cache = open(&device.root());
        let cached = cache.get(&digest("a")).unwrap().unwrap();
        assert!(cached.is_complete(), "{name}: nothing is verified or fetched again");
    }
}

/// A layer whose bytes cannot be read: those are fetched again, and the others stay.
#[test]
fn bytes_that_the_disk_cannot_read_are_fetched_again() {
    let device = Device::new(SIZE);
    let cache = open(&device.root());
    let cached = fill(&cache, "a");
    cache.close();
    drop((cached, cache));
    let data = device.root().join("layers").join(digest("a").hex()).join("data");
    let part = device.root().join("part");
    fs::write(&part, bytes("a", 7)).unwrap();
    assert!(device.lose(&part) > 0);
    device.forget_pages(&data);
    let cache = open(&device.root());
    let cached = cache.get(&digest("a")).unwrap().unwrap();
    let lost: Vec<usize> = (0..CHUNKS).filter(|chunk| !has(&cached, "a", *chunk)).collect();
    assert!(lost.contains(&7), "{lost:?}");
    for chunk in 0..CHUNKS {
        // The disk may take it elsewhere, or not at all; it is never wrong.
        let _ = cached.store(chunk, &bytes("a", chunk));
        has(&cached, "a", chunk);
    }
    assert!(has(&cached, "a", 0), "what could be read is there");
    let is_back = |chunk: &usize| has(&cached, "a", *chunk);
    assert!(
        lost.iter().all(is_back),
        "what came again is kept, instead of being taken for what the disk has"
    );
}

/// A disk that takes nothing more: what is there is served, what is new is an error or goes past the disk, and what was answered is there after
/// the next start.
#[test]
fn a_disk_that_takes_nothing_loses_nothing() {
    let device = Device::new(SIZE);
    let cache = open(&device.root());
    let store = Store::open(&device.root().join("metadata.redb")).unwrap();
    put(&store, "before", 100).unwrap();
    let cached = fill(&cache, "a");
    cache.close();
    let before = device.record();
    device.refuse_writes(true);
    let mut answered = vec!["before".to_owned()];
    for round in 0..20 {
        let key = format!("key {round}");
        if put(&store, &key, 2000).is_ok() {
            answered.push(key);
        }
        // The kernel may take it, and never bring it to the disk.
        let layer = format!("layer {round}");
        if let Ok(cached) = cache.insert(&digest(&layer), index(&layer, 8)) {
            for chunk in 0..8 {
                let _ = cached.store(chunk, &bytes(&layer, chunk));
                has(&cached, &layer, chunk);
            }
        }
        assert!(has(&cached, "a", round), "what is there is served");
        assert!(
            store.snapshot("before").is_ok_and(|found| found.is_some()),
            "and so are snapshots"
        );
    }
    assert_eq!(answered, ["before"], "nothing is answered that is not on the disk");
    drop((cached, cache, store));
    drop(device);
    let device = Device::of(before);
    let store = Store::open(&device.root().join("metadata.redb")).unwrap();
    assert!(store.snapshot("before").unwrap().is_some());
    let cache = open(&device.root());
    let cached = cache.get(&digest("a")).unwrap().unwrap();
    assert!((0..CHUNKS).all(|chunk| has(&cached, "a", chunk)));
}

/// Fills a disk to its last byte.
pub fn fill_up(root: &Path) {
    let mut file = File::create(root.join("somebody-elses")).unwrap();
    for len in [1 << 20, 64 << 10, 4096, 512] {
        while file.write_all(&vec![1; len]).is_ok() && file.sync_all().is_ok() {}
    }
}

/// A disk without a free byte: everything opens, what is there is served, what is new is served past the disk, snapshots can be removed; and
/// when there is room again, the same process goes on as if nothing had been.
#[test]
fn a_full_disk_is_served_and_passes() {
    /// Bytes of a record: a few of them, and the file has to grow.
    const LARGE: usize = 50_000;
    for kind in ["tmpfs", "ext4"] {
        let disk = Disk::new(kind, SIZE as u64);
        let root = disk.root();
        let database = root.join("metadata.redb");
        let store = Store::open(&database).unwrap();
        put(&store, "before", 100).unwrap();
        let cache = open(&root);
        let cached = fill(&cache, "a");
        cache.close();
        drop((store, cached, cache));
        fill_up(&root);

        let store = Store::open(&database).unwrap_or_else(|error| panic!("{kind}: {error}"));
        let cache = open(&root);
        let cached = cache.get(&digest("a")).unwrap().unwrap();
        let _used = cached.pin();
        assert!((0..CHUNKS).all(|chunk| has(&cached, "a", chunk)), "{kind}");
        let (mut answered, mut refused) = (Vec::new(), 0);
        for round in 0..60 {
            let key = format!("key {round}");
            match put(&store, &key, LARGE) {
                Ok(()) => answered.push(key),
                Err(_) => refused += 1,
            }
            for key in &answered {
                let found = store.snapshot(key).unwrap_or_else(|error| panic!("{kind}: {error}"));
                assert!(found.is_some(), "{kind}: {key} was answered");
            }
        }
        assert!(refused > 0, "{kind}: the database had to grow");
        let begun = std::time::Instant::now();
        let key = answered.pop().expect("there is room for some in the file");
        while store
            .write_snapshots({
                let key = key.clone();
                move |snapshots| snapshots.remove(&key)
            })
            .is_err()
        {
            assert!(
                begun.elapsed() < Duration::from_secs(30),
                "{kind}: nothing can be removed"
            );
            std::thread::sleep(Duration::from_millis(100));
        }

        fs::remove_file(root.join("somebody-elses")).unwrap();
        let mut last = None;
        super::until("the database does not go on", || {
            last = put(&store, "after", LARGE).err();
            last.is_none()
        });
        for key in &answered {
            assert!(store.snapshot(key).unwrap().is_some(), "{kind}: {key}");
        }
        let other = fill(&cache, "b");
        assert!((0..CHUNKS).all(|chunk| has(&other, "b", chunk)), "{kind}");
        drop((store, cached, other, cache));
        let store = Store::open(&database).unwrap();
        assert!(store.snapshot("after").unwrap().is_some() && store.snapshot(&key).unwrap().is_none());
    }
}
