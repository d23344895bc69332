//! A blob in memory, with faults, and layers to put into it.

use std::collections::VecDeque;
use std::io::Write;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use flate2::write::GzEncoder;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use tokio::sync::watch;

use crate::cache::{Cache, CachedLayer};
use crate::config::{ByteSize, CacheConfig, FetchConfig};
use crate::fetch::{Fetcher, Layer};
use crate::layer::index::{IndexParts, Inode, mode};
use crate::layer::{Access, Chunk, Codec, Digest, LayerIndex};
use crate::metrics::Metrics;
use crate::registry::{Blob, Body, Origin, RegistryError};
use crate::sync::Budget;

/// What is wrong with one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It ends after that many bytes, as if it were complete.
    Short(usize),
    /// It breaks after that many bytes.
    Broken(usize),
    /// The byte at that place is another.
    Flipped(usize),
    /// There is none now.
    Refused,
    /// There is none, and will be none.
    Missing,
    /// It never comes.
    Silent,
    /// Asking for it is a bug.
    Panic,
}

/// Memory of a fetcher, in bytes.
pub const MEMORY: u64 = 512 << 20;
/// Bytes per piece of a body.
const PIECE: usize = 10_000;

/// A blob in memory.
pub struct FakeBlob {
    data: Bytes,
    /// The ranges asked for.
    pub asked: Mutex<Vec<Range<u64>>>,
    /// What is wrong with the next answers, in order.
    pub faults: Mutex<VecDeque<Option<Fault>>>,
    /// What is wrong with all other answers.
    pub always: Mutex<Option<Fault>>,
    /// Whether it has no ranges.
    pub rangeless: AtomicBool,
    /// Pieces of bodies wait while this is false.
    pub flowing: watch::Sender<bool>,
    /// Where it says that it comes from.
    pub origin: Origin,
    pub underway: Arc<AtomicUsize>,
    /// Most bodies that were under way at once.
    pub most_underway: AtomicUsize,
    /// How often it says that its host has refused.
    pub refusals: AtomicU64,
}

impl FakeBlob {
    pub fn new(data: impl Into<Bytes>) -> Arc<Self> {
        Self::at(Origin::new("fake.example", "repo"), data)
    }

    pub fn at(origin: Origin, data: impl Into<Bytes>) -> Arc<Self> {
        Arc::new(FakeBlob {
            origin,
            data: data.into(),
            asked: Mutex::default(),
            faults: Mutex::default(),
            always: Mutex::default(),
            rangeless: AtomicBool::new(false),
            flowing: watch::Sender::new(true),
            underway: Arc::default(),
            most_underway: AtomicUsize::new(0),
            refusals: AtomicU64::new(0),
        })
    }

    pub fn requests(&self) -> usize {
        self.asked.lock().unwrap().len()
    }

    pub fn fail(&self, faults: impl IntoIterator<Item = Fault>) {
        self.faults.lock().unwrap().extend(faults.into_iter().map(Some));
    }

    fn error(&self) -> RegistryError {
        RegistryError::Unreachable {
            host: "fake.example".to_owned(),
            what: "on purpose".to_owned(),
        }
    }
}

/// Counts a body while it lives.
struct Underway(Arc<AtomicUsize>);

impl Drop for Underway {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Blob for FakeBlob {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        self.asked.lock().unwrap().push(range.clone());
        let fault = self.faults.lock().unwrap().pop_front().flatten();
        let fault = fault.or(*self.always.lock().unwrap());
        let now = self.underway.fetch_add(1, Ordering::Relaxed) + 1;
        self.most_underway.fetch_max(now, Ordering::Relaxed);
        let guard = Underway(Arc::clone(&self.underway));
        async move {
            let mut data = self.data[range.start as usize..range.end as usize].to_vec();
            let mut broken = false;
            match fault {
                Some(Fault::Silent) => std::future::pending().await,
                Some(Fault::Panic) => panic!("a bug that the test wants"),
                Some(Fault::Refused) => return Err(self.error()),
                Some(Fault::Missing) => {
                    return Err(RegistryError::NotFound {
                        host: "fake.example".to_owned(),
                        what: "on purpose".to_owned(),
                    });
                }
                Some(Fault::Short(len)) => data.truncate(len),
                Some(Fault::Broken(len)) => {
                    data.truncate(len);
                    broken = true;
                }
                Some(Fault::Flipped(at)) => {
                    let at = at % data.len();
                    data[at] ^= 0x55;
                }
                None => {}
            }
            let mut pieces: Vec<Result<Bytes, RegistryError>> = data
                .chunks(PIECE)
                .map(|piece| Ok(Bytes::copy_from_slice(piece)))
                .collect();
            if broken {
                pieces.push(Err(self.error()));
            }
            let flowing = self.flowing.subscribe();
            let body = futures::stream::iter(pieces).then(move |piece| {
                let _held = &guard;
                let mut flowing = flowing.clone();
                async move {
                    let _ = flowing.wait_for(|flowing| *flowing).await;
                    piece
                }
            });
            Ok(body.boxed())
        }
        .boxed()
    }

    fn read_part(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        if !self.rangeless.load(Ordering::Relaxed) {
            return self.read(range);
        }
        let error = RegistryError::NoRanges {
            host: "fake.example".to_owned(),
            what: "on purpose".to_owned(),
        };
        futures::future::ready(Err(error)).boxed()
    }

    fn size(&self) -> u64 {
        self.data.len() as u64
    }

    fn describe(&self) -> String {
        format!("{}/{}@sha256:0", self.origin.host, self.origin.repository)
    }

    fn refusals(&self, host: &str) -> Option<u64> {
        (*self.origin.host == *host).then(|| self.refusals.load(Ordering::Relaxed))
    }

    fn origin(&self) -> Origin {
        self.origin.clone()
    }
}

/// Bytes that do not compress, the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

pub fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// A layer that is read in ranges: `sizes` are those of its chunks, between which the data space has gaps of 100 bytes.
pub fn ranged(sizes: &[usize]) -> (LayerIndex, Vec<u8>, Vec<u8>) {
    ranged_from(1, sizes)
}

/// The same with other bytes for each `seed`: what layers have in common, they have of each other.
pub fn ranged_from(seed: u64, sizes: &[usize]) -> (LayerIndex, Vec<u8>, Vec<u8>) {
    let (mut data, mut blob, mut chunks) = (Vec::new(), b"head".to_vec(), Vec::new());
    for (seed, &size) in (seed..).zip(sizes) {
        let bytes = noise(seed, size);
        let member = gzip(&bytes);
        chunks.push(Chunk {
            data_offset: data.len() as u64,
            data_len: size as u32,
            blob_offset: blob.len() as u64,
            blob_len: member.len() as u32,
            skip: 0,
            digest: Digest::of(&bytes),
        });
        data.extend(bytes);
        data.extend([0; 100]);
        blob.extend(member);
    }
    blob.extend(b"tail");
    (
        index(chunks, data.len() as u64, blob.len() as u64, Access::Ranges),
        data,
        blob,
    )
}

/// An index without files.
pub fn index(chunks: Vec<Chunk>, data_size: u64, blob_size: u64, access: Access) -> LayerIndex {
    let root = Inode {
        mode: mode::DIR | 0o755,
        nlink: 2,
        parent: 1,
        ..Inode::default()
    };
    LayerIndex::new(IndexParts {
        access,
        codec: Codec::Gzip,
        data_size,
        blob_size,
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

/// A cache and a fetcher in a directory that vanishes.
pub struct Bench {
    pub metrics: Arc<Metrics>,
    pub cache: Arc<Cache>,
    pub fetcher: Arc<Fetcher>,
    pub dir: tempfile::TempDir,
}

impl Bench {
    pub fn new() -> Self {
        Self::with(0, FetchConfig::default())
    }

    pub fn with(max_size: u64, config: FetchConfig) -> Self {
        Self::with_memory(max_size, config, MEMORY)
    }

    pub fn with_memory(max_size: u64, config: FetchConfig, memory: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let metrics = Arc::new(Metrics::new());
        let cache_config = CacheConfig {
            max_size: ByteSize(max_size),
            min_free: ByteSize(0),
            high_percent: 100,
            ..CacheConfig::default()
        };
        let cache = Cache::open(dir.path(), &cache_config, Arc::clone(&metrics)).unwrap();
        let runtime = tokio::runtime::Handle::current();
        let fetcher = Fetcher::new(
            &config,
            Budget::new(memory),
            Arc::clone(&cache),
            runtime,
            Arc::clone(&metrics),
        );
        Bench {
            metrics,
            cache,
            fetcher,
            dir,
        }
    }

    /// Puts a layer into the cache and opens it.
    pub fn open(&self, name: &str, index: LayerIndex, blob: &Arc<FakeBlob>) -> (Arc<CachedLayer>, Arc<Layer>) {
        let cached = tokio::task::block_in_place(|| self.cache.insert(&Digest::of(name.as_bytes()), index)).unwrap();
        let layer = self.fetcher.open(Arc::clone(&cached), blob.clone());
        (cached, layer)
    }
}
