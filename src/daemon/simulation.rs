//! A node in one thread and in virtual time, with everything going wrong that can: cache, database, fetcher and loader are the real ones; the
//! registry, the disk's errors, the deaths of the daemon and the clock are this module's. Everything follows from a *seed*.
//!
//! A node lives through a program of random steps: layers are loaded, read in random ranges, evicted, verified, removed; snapshots are recorded; the
//! weather changes: sources refuse, are silent, slow, cut off or lie; the disk is full, fails to read or to write, or writes half of what it is
//! told; hours pass; and now and then the node dies, in the middle of whatever is under way, or ends in order. What a power cut would have
//! taken of files that were not made durable is taken then, and files are damaged. The next life begins on what is left.
//!
//! What always holds: no byte is wrong. What was answered is there. Nothing but the weather is a reason for an error: with good sources, a disk
//! that fails makes no read of a layer that can be read in ranges fail. Every life can begin. When the weather is good, everything is.
//!
//! `LAZULI_SEED=n cargo test --lib simulation` repeats a program, `LAZULI_FAULT_MINUTES=n` goes on with random ones for so long. (Work that blocks
//! has threads of its own, so that the same seed is the same program, and nearly, but not always, the same order of events.)

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::future::{BoxFuture, join_all};
use futures::{FutureExt as _, StreamExt as _};
use rustix::io::Errno;

use crate::cache::{Cache, Fault, InUse, Key, Point};
use crate::catalog::loader::{Asked, LayerSpec, Loader};
use crate::config::{ByteSize, CacheConfig, FetchConfig, FormatsConfig};
use crate::fetch::{Fetcher, Layer, LayerData as _};
use crate::layer::index::{IndexParts, Inode, mode};
use crate::layer::{Access, Chunk, Codec, Digest, LayerIndex, Verify};
use crate::metrics::Metrics;
use crate::registry::{Blob, Body, Origin, RegistryError};
use crate::store::{Kind, SnapshotRecord, Store, Usage};
use crate::sync::random::Random;
use crate::sync::{Budget, blocking};

/// Seeds that every run of the tests goes through.
const SEEDS: Range<u64> = 1..13;
/// Steps of a program.
const STEPS: usize = 120;
/// Longest time that a program may take, really: then something hangs.
const PATIENCE: Duration = Duration::from_secs(180);
/// After this time in good weather nothing of the bad one is under way any more.
const CLEARED: Duration = Duration::from_secs(3600);
/// How long a silent source says nothing: longer than anybody waits.
const SILENCE: Duration = Duration::from_secs(7200);
/// Deadline of a read.
const DEADLINE: Duration = Duration::from_secs(120);
/// The database is not tried again for so long (really) after the disk has failed.
const DATABASE_REST: Duration = Duration::from_millis(10);
/// Layers of each kind.
const LAYERS: u64 = 3;
/// A budget that not all of them fit into, in bytes.
const TIGHT: u64 = 700_000;
/// Block of a file system, in bytes.
const BLOCK: usize = 4096;

/// The weather.
struct World {
    random: Random,
    /// Of a thousand answers of sources, how many are bad.
    sources: u64,
    /// Of a thousand operations of the disk, how many fail.
    disk: u64,
    /// And how.
    errno: Errno,
}

type Shared = Arc<Mutex<World>>;

fn lock(world: &Shared) -> MutexGuard<'_, World> {
    world.lock().unwrap()
}

/// What the disk does at some point.
fn disk(world: &Shared, point: Point) -> Option<Fault> {
    let mut world = lock(world);
    if world.disk == 0 || world.random.below(1000) >= world.disk {
        return None;
    }
    match (point, world.random.below(3)) {
        (Point::Write, 0) => Some(Fault::Short),
        // What is full can be read.
        (Point::Read | Point::Open, _) if world.errno == Errno::NOSPC => None,
        _ => Some(Fault::Error(world.errno)),
    }
}

/// A blob at the registry.
struct SimBlob {
    data: Bytes,
    name: String,
    world: Shared,
}

impl SimBlob {
    fn away(&self) -> RegistryError {
        RegistryError::Unreachable {
            host: "registry.example".to_owned(),
            what: self.name.clone(),
        }
    }
}

impl Blob for SimBlob {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        let whole = range == (0..self.size());
        let mut data = self.data[range.start as usize..range.end as usize].to_vec();
        let (how, number) = {
            let mut world = lock(&self.world);
            let bad = world.sources > 0 && world.random.below(1000) < world.sources;
            (bad.then(|| world.random.below(6)), world.random.below(1 << 40))
        };
        let at = number as usize % data.len().max(1);
        async move {
            let mut end = None;
            match how {
                // Of a stream threads are waiting already, and while they do virtual time stands still.
                Some(0) if !whole => tokio::time::sleep(SILENCE).await,
                Some(1) if !whole => tokio::time::sleep(Duration::from_millis(number % 30_000)).await,
                Some(0 | 1) => return Err(self.away()),
                Some(2) => {
                    return Err(RegistryError::NotFound {
                        host: "registry.example".to_owned(),
                        what: self.name.clone(),
                    });
                }
                Some(3) => data.truncate(at),
                Some(4) => {
                    data.truncate(at);
                    end = Some(Err(self.away()));
                }
                Some(_) => data.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 0x55),
                None => {}
            }
            let pieces: Vec<_> = data
                .chunks(10_000)
                .map(|piece| Ok(Bytes::copy_from_slice(piece)))
                .collect();
            Ok(futures::stream::iter(pieces.into_iter().chain(end)).boxed())
        }
        .boxed()
    }

    fn size(&self) -> u64 {
        self.data.len() as u64
    }

    fn describe(&self) -> String {
        self.name.clone()
    }

    fn origin(&self) -> Origin {
        Origin::new("registry.example", "app")
    }
}

/// A layer as it is.
struct Truth {
    spec: LayerSpec,
    blob: Arc<SimBlob>,
    /// Its data space.
    data: Vec<u8>,
    /// What says where its bytes are, if nobody has to stream it for that.
    index: Option<LayerIndex>,
}

impl Truth {
    fn new(name: String, blob: Vec<u8>, data: Vec<u8>, index: Option<LayerIndex>, world: &Shared) -> Self {
        let spec = LayerSpec {
            digest: Digest::of(&blob),
            size: blob.len() as u64,
            media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
            annotations: BTreeMap::new(),
            foreign: false,
            diff_id: index.is_none().then(|| Digest::of(&data)),
        };
        let blob = Arc::new(SimBlob {
            data: blob.into(),
            name,
            world: Arc::clone(world),
        });
        Truth {
            spec,
            blob,
            data,
            index,
        }
    }

    /// One whose chunks can be fetched one by one.
    fn ranged(number: u64, random: &mut Random, world: &Shared) -> Self {
        let (mut data, mut blob, mut chunks) = (Vec::new(), b"head".to_vec(), Vec::new());
        for _ in 0..4 + random.below(12) {
            let len = 1 + random.below(40_000) as usize;
            let bytes = random.bytes(len);
            let member = gzip(&bytes);
            chunks.push(Chunk {
                data_offset: data.len() as u64,
                data_len: bytes.len() as u32,
                blob_offset: blob.len() as u64,
                blob_len: member.len() as u32,
                skip: 0,
                digest: Digest::of(&bytes),
            });
            data.extend(bytes);
            data.resize(data.len() + random.below(600) as usize, 0);
            blob.extend(member);
        }
        let root = Inode {
            mode: mode::DIR | 0o755,
            nlink: 2,
            parent: 1,
            ..Inode::default()
        };
        let index = LayerIndex::new(IndexParts {
            access: Access::Ranges,
            codec: Codec::Gzip,
            data_size: data.len() as u64,
            blob_size: blob.len() as u64,
            inodes: vec![root],
            dirents: Vec::new(),
            xattrs: Vec::new(),
            chunks,
            verify: Verify::Content,
            checkpoints: Vec::new(),
            strings: Vec::new(),
        });
        Self::new(format!("ranged {number}"), blob, data, Some(index.unwrap()), world)
    }

    /// A tar of some files, which has to be streamed once.
    fn streamed(number: u64, random: &mut Random, world: &Shared) -> Self {
        let mut tar = Vec::new();
        for file in 0..1 + random.below(6) {
            let len = random.below(60_000) as usize;
            let mut header = [0; 512];
            let name = format!("file{file}");
            header[..name.len()].copy_from_slice(name.as_bytes());
            header[100..107].copy_from_slice(b"0000644");
            header[108..115].copy_from_slice(b"0000000");
            header[116..123].copy_from_slice(b"0000000");
            header[124..135].copy_from_slice(format!("{len:011o}").as_bytes());
            header[136..147].copy_from_slice(b"00000000000");
            header[156] = b'0';
            header[257..265].copy_from_slice(b"ustar  \0");
            header[148..156].fill(b' ');
            let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
            header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
            tar.extend(header);
            tar.extend(random.bytes(len));
            tar.resize(tar.len().next_multiple_of(512), 0);
        }
        tar.resize(tar.len() + 1024, 0);
        Self::new(format!("streamed {number}"), gzip(&tar), tar, None, world)
    }

    fn key(&self) -> Key {
        Key::from(&self.spec.digest)
    }

    /// What a read gives.
    fn expected(&self, offset: u64, len: u32) -> Vec<u8> {
        let start = (offset as usize).min(self.data.len());
        let mut bytes = self.data[start..(start + len as usize).min(self.data.len())].to_vec();
        bytes.resize(len as usize, 0);
        bytes
    }
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// What is open during one life.
struct Node {
    cache: Arc<Cache>,
    store: Arc<Store>,
    fetcher: Arc<Fetcher>,
    loader: Loader,
    /// Layers that containers use, by their number.
    layers: BTreeMap<usize, (Arc<Layer>, InUse)>,
}

/// How a life ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// In the middle of everything.
    Killed,
    Orderly,
    /// The program is over.
    Over,
}

/// A program under way.
struct Simulation {
    seed: u64,
    random: Random,
    world: Shared,
    root: tempfile::TempDir,
    layers: Vec<Truth>,
    /// Whether not everything has room.
    tight: bool,
    /// Snapshots: `true` are there, `false` are not; those of which nobody can know are in neither state.
    snapshots: BTreeMap<String, bool>,
    steps: usize,
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let world = Arc::new(Mutex::new(World {
            random: Random::new(seed ^ 0x5EED),
            sources: 0,
            disk: 0,
            errno: Errno::IO,
        }));
        let layers = (0..2 * LAYERS).map(|number| match number % 2 {
            0 => Truth::ranged(number, &mut random, &world),
            _ => Truth::streamed(number, &mut random, &world),
        });
        let layers = layers.collect();
        Simulation {
            seed,
            tight: random.below(3) == 0,
            random,
            world,
            root: tempfile::tempdir().unwrap(),
            layers,
            snapshots: BTreeMap::new(),
            steps: 0,
        }
    }

    fn what(&self) -> String {
        let world = lock(&self.world);
        format!(
            "seed {}, step {}, {} of 1000 answers are bad, {} of 1000 operations of the disk fail with {}",
            self.seed, self.steps, world.sources, world.disk, world.errno
        )
    }

    /// From birth to death.
    fn live(&mut self) -> End {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        let (end, node) = runtime.block_on(async {
            let mut node = self.begin().await;
            self.find_snapshots(&node).await;
            let end = loop {
                self.steps += 1;
                if self.steps > STEPS {
                    break End::Over;
                }
                if let Some(end) = self.step(&mut node).await {
                    break end;
                }
            };
            if end != End::Killed {
                self.clear().await;
                self.look_at_everything(&mut node).await;
                for (layer, _) in node.layers.values() {
                    layer.close();
                }
                let cache = Arc::clone(&node.cache);
                blocking(move || cache.close()).await;
            }
            (end, node)
        });
        // First, so that nothing of this life goes on: what blocks is waited for, as the kernel waits for calls under way.
        drop(runtime);
        drop(node);
        end
    }

    /// Opens everything on what the life before has left.
    async fn begin(&mut self) -> Node {
        let config = CacheConfig {
            max_size: ByteSize(if self.tight { TIGHT } else { 0 }),
            min_free: ByteSize(0),
            high_percent: 100,
            ..CacheConfig::default()
        };
        let (root, metrics, world) = (
            self.root.path().to_owned(),
            Arc::new(Metrics::new()),
            Arc::clone(&self.world),
        );
        let opened = blocking(move || {
            let failing = Arc::clone(&world);
            let fails = move || match disk(&failing, Point::Sync) {
                Some(_) => Err(io::Error::from(Errno::IO)),
                None => Ok(()),
            };
            let path = root.join(super::database::DATABASE);
            let store = match Store::open_failing(&path, fails.clone()) {
                Ok(store) => store,
                // The supervisor tries again, until the disk lets it.
                Err(_) if lock(&world).disk > 0 => {
                    lock(&world).disk = 0;
                    Store::open_failing(&path, fails)?
                }
                Err(error) => return Err(error.into()),
            };
            let cache = Cache::open(&root, &config, Arc::clone(&metrics))?;
            cache.fail_with(Box::new(move |point| disk(&world, point)));
            Ok::<_, super::DaemonError>((cache, Arc::new(store), metrics))
        });
        let (cache, store, metrics) = opened.await.unwrap_or_else(|error| panic!("{}: {error}", self.what()));
        let runtime = tokio::runtime::Handle::current();
        let fetcher = Fetcher::new(
            &FetchConfig::default(),
            Budget::new(64 << 20),
            Arc::clone(&cache),
            runtime,
            metrics,
        );
        Node {
            loader: Loader::new(Arc::clone(&cache), Arc::clone(&fetcher), FormatsConfig::default()),
            cache,
            store,
            fetcher,
            layers: BTreeMap::new(),
        }
    }

    async fn step(&mut self, node: &mut Node) -> Option<End> {
        match self.random.below(100) {
            0..=44 => self.read(node).await,
            45..=54 => self.record(node).await,
            55..=64 => self.forget(node).await,
            65..=75 => self.change_weather().await,
            76..=79 => {
                let seconds = self.random.below(4000);
                tokio::time::advance(Duration::from_secs(seconds)).await;
            }
            80..=86 => self.keep_house(node).await,
            87..=95 => {
                self.begin_to_read(node);
                // Somewhere in the middle of it.
                for _ in 0..self.random.below(30) {
                    tokio::task::yield_now().await;
                }
                return Some(End::Killed);
            }
            _ => return Some(End::Orderly),
        }
        None
    }

    async fn change_weather(&mut self) {
        {
            let mut world = lock(&self.world);
            world.sources = self.random.of(&[0, 0, 100, 500, 1000]);
            world.disk = self.random.of(&[0, 0, 20, 300, 1000]);
            world.errno = self.random.of(&[Errno::NOSPC, Errno::IO, Errno::ROFS, Errno::MFILE]);
        }
        if lock(&self.world).sources == 0 {
            tokio::time::sleep(CLEARED).await;
        }
        std::thread::sleep(DATABASE_REST);
    }

    async fn clear(&mut self) {
        {
            let mut world = lock(&self.world);
            (world.sources, world.disk) = (0, 0);
        }
        tokio::time::sleep(CLEARED).await;
        std::thread::sleep(DATABASE_REST);
    }

    fn is_stormy(&self) -> bool {
        lock(&self.world).sources > 0
    }

    fn is_disk_bad(&self) -> bool {
        lock(&self.world).disk > 0
    }

    /// The layer, brought into use if it is not; `None` if the weather does not let it.
    async fn open(&mut self, node: &mut Node, number: usize) -> Option<Arc<Layer>> {
        if let Some((layer, _)) = node.layers.get(&number) {
            return Some(Arc::clone(layer));
        }
        let truth = &self.layers[number];
        let blob: Arc<dyn Blob> = truth.blob.clone();
        let opened = match &truth.index {
            Some(index) => {
                let (loader, cache) = (node.loader.clone(), Arc::clone(&node.cache));
                let (fetcher, key, index) = (Arc::clone(&node.fetcher), truth.key(), index.clone());
                let load = move || match loader.stored(key, Arc::clone(&blob)) {
                    Ok(Some(layer)) => Ok(layer),
                    Ok(None) => match cache.insert(key, index) {
                        Ok(cached) => Ok(fetcher.open(cached, blob)),
                        Err(error) => Err(error.to_string()),
                    },
                    Err(refusal) => Err(refusal.to_string()),
                };
                blocking(load).await
            }
            None => {
                let judged = node.loader.alone(&truth.spec);
                let loaded = node
                    .loader
                    .load(&truth.spec, blob, &[], Asked::default(), &judged)
                    .await;
                loaded.map(|loaded| loaded.layer).map_err(|refusal| refusal.to_string())
            }
        };
        match opened {
            Ok(layer) => {
                let in_use = layer.cached().pin();
                node.layers.insert(number, (Arc::clone(&layer), in_use));
                Some(layer)
            }
            Err(error) => {
                let weather = self.is_disk_bad() || (truth.index.is_none() && (self.is_stormy() || self.tight));
                assert!(weather, "{}: {} is not opened: {error}", self.what(), truth.blob.name);
                None
            }
        }
    }

    /// A part of a layer that may be read.
    fn part(&mut self, number: usize) -> (u64, u32) {
        let size = self.layers[number].data.len() as u64;
        let offset = self.random.below(size);
        let len = 1 + self.random.below((size - offset).min(150_000));
        (offset, len as u32)
    }

    async fn read(&mut self, node: &mut Node) {
        let mut reads = Vec::new();
        for _ in 0..1 + self.random.below(3) {
            let number = self.random.below(self.layers.len() as u64) as usize;
            if let Some(layer) = self.open(node, number).await {
                let (offset, len) = self.part(number);
                reads.push(async move { (number, offset, len, layer.read(offset, len, DEADLINE).await) });
            }
        }
        for (number, offset, len, result) in join_all(reads).await {
            let truth = &self.layers[number];
            let place = || format!("{}: {len} bytes at {offset} of {}", self.what(), truth.blob.name);
            match result {
                Ok(bytes) => assert!(bytes == truth.expected(offset, len), "WRONG BYTES: {}", place()),
                Err(error) => {
                    let streamed = truth.index.is_none() && (self.is_disk_bad() || self.tight);
                    assert!(self.is_stormy() || streamed, "{}: {error}", place());
                }
            }
        }
    }

    /// Reads of which nobody will see the end.
    fn begin_to_read(&mut self, node: &Node) {
        let open: Vec<_> = node
            .layers
            .iter()
            .map(|(number, (layer, _))| (*number, Arc::clone(layer)))
            .collect();
        for (number, layer) in open {
            let (offset, len) = self.part(number);
            drop(tokio::spawn(async move { layer.read(offset, len, DEADLINE).await }));
        }
    }

    /// A snapshot of a layer is committed.
    async fn record(&mut self, node: &mut Node) {
        let number = self.random.below(self.layers.len() as u64) as usize;
        if self.open(node, number).await.is_none() {
            return;
        }
        let key = format!("snapshot {}", self.random.below(20));
        let record = SnapshotRecord {
            id: 0,
            kind: Kind::Committed,
            parent: None,
            labels: BTreeMap::new(),
            created: 0,
            updated: 0,
            layer: Some(self.layers[number].spec.digest),
            chain: Vec::new(),
            vouched: false,
            remapped: false,
            usage: Usage::default(),
        };
        let (store, name) = (Arc::clone(&node.store), key.clone());
        let put = move || {
            store.write_snapshots(move |snapshots| {
                let id = snapshots.allocate_id()?;
                snapshots.put(&name, &SnapshotRecord { id, ..record })
            })
        };
        let put = blocking(put).await.map_err(|error| error.to_string());
        self.note(key, true, put);
    }

    /// A snapshot and a layer are removed.
    async fn forget(&mut self, node: &mut Node) {
        let key = format!("snapshot {}", self.random.below(20));
        let (store, name) = (Arc::clone(&node.store), key.clone());
        let remove = move || store.write_snapshots(move |snapshots| snapshots.remove(&name).map(drop));
        let removed = blocking(remove).await.map_err(|error| error.to_string());
        self.note(key, false, removed);
        let number = self.random.below(self.layers.len() as u64) as usize;
        if let Some((layer, in_use)) = node.layers.remove(&number) {
            layer.close();
            drop((layer, in_use));
        }
        if self.random.below(2) == 0 {
            let (cache, digest) = (Arc::clone(&node.cache), self.layers[number].spec.digest);
            blocking(move || cache.forget(&digest)).await;
        }
    }

    /// Notes what was answered.
    fn note(&mut self, key: String, there: bool, answer: Result<(), String>) {
        match answer {
            Ok(()) => drop(self.snapshots.insert(key, there)),
            Err(error) => {
                assert!(self.is_disk_bad(), "{}: {key}: {error}", self.what());
                self.snapshots.remove(&key);
            }
        }
    }

    /// What was answered is there.
    async fn find_snapshots(&mut self, node: &Node) {
        if self.is_disk_bad() {
            return;
        }
        let store = Arc::clone(&node.store);
        let listed = blocking(move || store.snapshots()).await;
        let listed = listed.unwrap_or_else(|error| panic!("{}: {error}", self.what()));
        let found: BTreeSet<String> = listed
            .into_iter()
            .map(|(key, record)| record.map(|_| key).unwrap())
            .collect();
        for (key, there) in &self.snapshots {
            assert_eq!(found.contains(key), *there, "{}: {key}", self.what());
        }
    }

    /// What the daemon does by itself.
    async fn keep_house(&mut self, node: &mut Node) {
        let number = self.random.below(self.layers.len() as u64) as usize;
        let what = self.random.below(4);
        let (cache, open) = (Arc::clone(&node.cache), node.layers.get(&number));
        let cached = open.map(|(layer, _)| Arc::clone(layer.cached()));
        let work = move || match (cached, what) {
            (Some(cached), 0) => drop(cached.check_all(|| false)),
            (Some(cached), 1) => drop(cached.evict_all()),
            // A container has its file mounted for a while.
            (Some(cached), 2) => drop(cached.hold()),
            _ => drop(cache.tidy()),
        };
        blocking(work).await;
    }

    /// In good weather, all is well.
    async fn look_at_everything(&mut self, node: &mut Node) {
        self.find_snapshots(node).await;
        for number in 0..self.layers.len() {
            let Some(layer) = self.open(node, number).await else {
                continue;
            };
            let len = self.layers[number].data.len() as u32;
            match layer.read(0, len, DEADLINE).await {
                Ok(bytes) => assert!(
                    bytes == self.layers[number].data,
                    "WRONG BYTES: {}: all of {}",
                    self.what(),
                    self.layers[number].blob.name
                ),
                Err(error) => assert!(self.tight, "{}: {error}", self.what()),
            }
        }
    }

    /// What is left of the files when the node died, or its power was cut.
    fn die(&mut self) {
        let cut = self.random.below(2) == 0;
        let mut dirs: Vec<PathBuf> = fs::read_dir(self.root.path().join("layers"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| {
                path.file_name()
                    .is_some_and(|name| !name.to_string_lossy().starts_with('.'))
            })
            .collect();
        dirs.sort();
        for dir in &dirs {
            let sealed = fs::read(dir.join("map")).is_ok_and(|map| map.get(12) == Some(&1));
            // Under a seal all is durable.
            if cut && !sealed {
                self.lose_writes(&dir.join("data"), 0);
                self.lose_writes(&dir.join("map"), 64);
            }
        }
        if self.random.below(4) == 0 && !dirs.is_empty() {
            let dir = &dirs[self.random.below(dirs.len() as u64) as usize];
            let file = dir.join(self.random.of(&["index", "map", "windows", "data"]));
            self.damage(&file);
        }
    }

    /// Blocks that have not come to the disk.
    fn lose_writes(&mut self, file: &Path, from: usize) {
        let Ok(mut bytes) = fs::read(file) else { return };
        for block in bytes.get_mut(from..).unwrap_or_default().chunks_mut(BLOCK) {
            if self.random.below(3) == 0 {
                block.fill(0);
            }
        }
        fs::write(file, bytes).unwrap();
    }

    /// A file is not what it was.
    fn damage(&mut self, file: &Path) {
        let Ok(mut bytes) = fs::read(file) else { return };
        let at = self.random.below(bytes.len().max(1) as u64) as usize;
        match self.random.below(4) {
            0 => fs::remove_file(file).unwrap(),
            1 => fs::write(file, &bytes[..at]).unwrap(),
            // Bytes under a seal are trusted: that the disk keeps them, or says that it does not.
            _ if file.ends_with("data") => {}
            2 => fs::write(file, "").unwrap(),
            _ => {
                bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1);
                fs::write(file, bytes).unwrap();
            }
        }
    }

    fn run(mut self) -> usize {
        let mut lives = 1;
        loop {
            match self.live() {
                End::Over => return lives,
                End::Killed => self.die(),
                End::Orderly => {}
            }
            lives += 1;
        }
    }
}

/// Tells how a failure is repeated.
struct Told(u64);

impl Drop for Told {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("LAZULI_SEED={} cargo test --lib simulation repeats it", self.0);
        }
    }
}

/// Runs the program of a seed; how many lives it had.
fn simulate(seed: u64) -> usize {
    let (_told, ended) = (Told(seed), Arc::new(AtomicBool::new(false)));
    let over = Arc::clone(&ended);
    let watch = std::thread::spawn(move || {
        let begun = Instant::now();
        while !over.load(Ordering::SeqCst) {
            if begun.elapsed() > PATIENCE {
                eprintln!("LAZULI_SEED={seed}: it hangs");
                std::process::abort();
            }
            std::thread::park_timeout(Duration::from_secs(1));
        }
    });
    let lives = Simulation::new(seed).run();
    ended.store(true, Ordering::SeqCst);
    watch.thread().unpark();
    watch.join().unwrap();
    lives
}

#[test]
fn a_node_in_any_weather() {
    if let Ok(seed) = std::env::var("LAZULI_SEED") {
        simulate(seed.parse().expect("a number"));
        return;
    }
    let lives: usize = SEEDS.map(simulate).sum();
    assert!(lives > 2 * SEEDS.count(), "{lives} lives are too few to tell anything");
    let Ok(minutes) = std::env::var("LAZULI_FAULT_MINUTES") else {
        return;
    };
    let minutes = Duration::from_secs(60 * minutes.parse::<u64>().expect("a number"));
    let (begun, mut programs) = (Instant::now(), 0);
    while begun.elapsed() < minutes {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        simulate(now.as_nanos() as u64 % 1_000_000_000_000);
        programs += 1;
    }
    eprintln!("{programs} random programs");
}
