//! How fast the pure formats are: building, writing and loading an index, merging a chain, writing EROFS metadata, and streaming a layer.
//! With `LAZULI_BENCH_LAYER`, the path of a layer (a tar, gzip or zstd), that one is streamed into a cache as well.

use std::hint::black_box;
use std::io::{Cursor, Read, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use futures::StreamExt;
use futures::future::BoxFuture;
use lazuli::cache::Cache;
use lazuli::config::{ByteSize, CacheConfig, FetchConfig};
use lazuli::fetch::{Fetcher, StreamRequest};
use lazuli::layer::digest::Hasher;
use lazuli::layer::erofs::{self, Addressing, Device};
use lazuli::layer::merge::merge;
use lazuli::layer::{Access, Chunk, Codec, Compression, Digest, LayerIndex, TarIndexer, decoder};
use lazuli::metrics::Metrics;
use lazuli::registry::{Blob, Body, RegistryError};
use lazuli::sync::Budget;

/// Entries of the layer whose index is built: a large image.
const ENTRIES: u64 = 100_000;
/// Bytes of each file of that layer. Content costs the indexer next to nothing.
const SMALL: usize = 100;
/// Layers of the chain that is merged, and the files of all of them together: an ordinary image.
const LAYERS: u64 = 10;
const CHAIN_ENTRIES: u64 = 17_000;
/// Files of the layer that is streamed, and their size in bytes: 64 MiB together.
const FILES: u64 = 256;
const LARGE: usize = 256 << 10;
/// What a download hands over at a time, in bytes.
const PIECE: usize = 64 << 10;
/// Bytes of data space per chunk of the benchmarked index.
const CHUNK: u64 = 1 << 20;

fn header(name: &str, size: usize) -> [u8; 512] {
    let mut block = [0; 512];
    let mut put = |at: usize, text: &str| block[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, name);
    put(100, "0000644\0");
    put(108, "0001750\0");
    put(116, "0001750\0");
    put(124, &format!("{size:011o}\0"));
    put(136, "14500000000\0");
    put(148, "        ");
    put(156, "0");
    put(257, "ustar\x0000");
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

/// A tar of `count` files of `size` bytes in directories of 50. Its content compresses about as well as programs do.
fn tar(count: u64, size: usize) -> Vec<u8> {
    let mut tar = Vec::new();
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    for i in 0..count {
        tar.extend(header(
            &format!("usr/lib/package-{:05}/module/file-{i}.py", i / 50),
            size,
        ));
        let end = tar.len() + size;
        while tar.len() < end {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            tar.extend(random.to_le_bytes());
            tar.extend([0x48, 0x8b, 0x05, 0, 0, 0, 0, 0xe8]);
        }
        tar.truncate(end);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }
    tar.resize(tar.len() + 1024, 0);
    tar
}

fn index(tar: &[u8]) -> LayerIndex {
    let mut indexer = TarIndexer::new();
    for piece in tar.chunks(PIECE) {
        indexer.push(piece).unwrap();
    }
    let layout = indexer.finish().unwrap();
    let size = layout.data_size;
    let chunks = (0..size.div_ceil(CHUNK)).map(|i| Chunk {
        data_offset: i * CHUNK,
        data_len: CHUNK.min(size - i * CHUNK) as u32,
        blob_offset: 0,
        blob_len: 0,
        skip: 0,
        digest: Digest::from_bytes([0; 32]),
    });
    let chunks = chunks.collect();
    layout.into_index(Access::Stream, Codec::Gzip, chunks, size).unwrap()
}

fn indexes(c: &mut Criterion) {
    let tar = tar(ENTRIES, SMALL);
    let built = index(&tar);
    let encoded = built.encode();
    let mut group = c.benchmark_group("index of 100,000 files");
    group.sample_size(20);
    group.throughput(Throughput::Elements(ENTRIES));
    group.bench_function("build from a tar", |b| b.iter(|| index(black_box(&tar))));
    group.bench_function("encode", |b| b.iter(|| black_box(&built).encode()));
    group.bench_function("load", |b| b.iter(|| LayerIndex::decode(black_box(&encoded)).unwrap()));
    let root = *built.inode(lazuli::layer::ROOT_INO).unwrap();
    group.throughput(Throughput::Elements(1));
    group.bench_function("look one path up", |b| {
        b.iter(|| {
            built
                .lookup_path(black_box(b"usr/lib/package-01000/module/file-50007.py"))
                .unwrap()
        });
    });
    assert!(built.lookup(&root, b"usr").is_some());
}

/// Merging. What a layer does to the others is what its directories have in common with theirs.
fn chains(c: &mut Criterion) {
    let each = CHAIN_ENTRIES / LAYERS;
    let chain = |path: fn(u64, u64) -> String| -> Vec<LayerIndex> {
        let layer = |at| {
            let files = (0..each).flat_map(|i| header(&path(at, i), 0));
            let tar: Vec<u8> = files.chain([0; 1024]).collect();
            index(&tar)
        };
        (0..LAYERS).map(layer).collect()
    };
    let mut group = c.benchmark_group("merge 10 layers with 17,000 files");
    group.throughput(Throughput::Elements(CHAIN_ENTRIES));
    for (name, path) in [
        (
            "each with directories of its own",
            (|at, i| format!("usr/lib/{at}-{}/module/file-{i}.py", i / 50)) as fn(u64, u64) -> String,
        ),
        ("all in the same directories", |at, i| {
            format!("usr/lib/package-{:05}/module/{at}-{i}.py", i / 5)
        }),
        ("each replaces the one below", |_, i| {
            format!("usr/lib/package-{:05}/module/file-{i}.py", i / 50)
        }),
    ] {
        let layers = chain(path);
        let layers: Vec<&LayerIndex> = layers.iter().collect();
        group.bench_function(name, |b| b.iter(|| merge(black_box(&layers), None).unwrap()));
    }
}

/// EROFS metadata: writing it, from an index that is there. Its memory is that of the image and 20 bytes for an inode.
fn images(c: &mut Criterion) {
    let mut group = c.benchmark_group("EROFS metadata");
    group.sample_size(10);
    for (name, count) in [("100,000 files", ENTRIES), ("1,000,000 files", 10 * ENTRIES)] {
        let built = index(&tar(count, 0));
        let devices = [Device {
            tag: Digest::from_bytes([0; 32]),
            size: built.data_size(),
        }];
        let image = erofs::write(&built, &devices, Addressing::Chunks).unwrap();
        println!("{name}: {} inodes in {} bytes", image.inodes, image.bytes.len());
        group.throughput(Throughput::Elements(count));
        group.bench_function(name, |b| {
            b.iter(|| erofs::write(black_box(&built), &devices, Addressing::Chunks).unwrap())
        });
    }
}

/// One pass over a layer, as a plain gzip layer takes it: blob digest, decompression, diff id, tar.
fn stream(compression: Compression, blob: Vec<u8>) -> (Digest, u64) {
    let mut stream = decoder(compression, Cursor::new(blob));
    let (mut hasher, mut indexer) = (Hasher::new(), TarIndexer::new());
    let mut piece = vec![0; PIECE];
    loop {
        match stream.read(&mut piece).unwrap() {
            0 => break,
            len => {
                hasher.update(&piece[..len]);
                indexer.push(&piece[..len]).unwrap();
            }
        }
    }
    (hasher.finish(), indexer.finish().unwrap().data_size)
}

fn streams(c: &mut Criterion) {
    let tar = tar(FILES, LARGE);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    gzip.write_all(&tar).unwrap();
    let gzip = gzip.finish().unwrap();
    let zstd = zstd::encode_all(&tar[..], 3).unwrap();
    let mut group = c.benchmark_group("stream of uncompressed bytes");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(tar.len() as u64));
    for (name, compression, blob) in [
        ("gzip, sha256, tar", Compression::Gzip, gzip),
        ("zstd, sha256, tar", Compression::Zstd, zstd),
        ("sha256, tar", Compression::None, tar.clone()),
    ] {
        group.bench_function(name, |b| {
            b.iter_batched(|| blob.clone(), |blob| stream(compression, blob), BatchSize::LargeInput);
        });
    }
    group.bench_function("tar alone", |b| b.iter(|| index(black_box(&tar))));
}

/// Memory of a fetcher, in bytes: the default.
const MEMORY: u64 = 512 << 20;

/// A blob in memory, which arrives as fast as it is taken.
struct Memory(Bytes);

impl Blob for Memory {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        let bytes = self.0.slice(range.start as usize..range.end as usize);
        let pieces = (0..bytes.len()).step_by(PIECE);
        let pieces = pieces.map(move |at| Ok(bytes.slice(at..bytes.len().min(at + PIECE))));
        Box::pin(async move { Ok(futures::stream::iter(pieces).boxed()) })
    }

    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn origin(&self) -> lazuli::registry::Origin {
        lazuli::registry::Origin::default()
    }

    fn describe(&self) -> String {
        "memory".to_owned()
    }
}

/// The whole first pass, with everything that makes it durable.
fn passes(c: &mut Criterion) {
    let mut layers = vec![("gzip".to_owned(), {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
        gzip.write_all(&tar(FILES, LARGE)).unwrap();
        gzip.finish().unwrap()
    })];
    if let Some(path) = std::env::var_os("LAZULI_BENCH_LAYER") {
        layers.push(("given layer".to_owned(), std::fs::read(path).unwrap()));
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let open = |dir: &Path| {
        let config = CacheConfig {
            max_size: ByteSize(0),
            min_free: ByteSize(0),
            ..CacheConfig::default()
        };
        let metrics = Arc::new(Metrics::new());
        let cache = Cache::open(dir, &config, Arc::clone(&metrics)).unwrap();
        (cache, metrics)
    };
    let request = |digest, blob: &Bytes| StreamRequest {
        digest,
        blob: Arc::new(Memory(blob.clone())),
        compression: Compression::Gzip,
        diff_id: None,
        what: "bench".to_owned(),
        keep: false,
    };
    let fetcher = |(cache, metrics)| {
        let memory = Budget::new(MEMORY);
        Fetcher::new(
            &FetchConfig::default(),
            memory,
            cache,
            runtime.handle().clone(),
            metrics,
        )
    };
    let mut group = c.benchmark_group("stream into the cache");
    group.sample_size(10);
    for (name, blob) in layers {
        let (digest, blob) = (Digest::of(&blob), Bytes::from(blob));
        group.throughput(Throughput::Bytes(blob.len() as u64));
        group.bench_function(&name, |b| {
            b.iter_batched(
                || {
                    let dir = tempfile::tempdir().unwrap();
                    let fetcher = fetcher(open(dir.path()));
                    (dir, fetcher)
                },
                |(dir, fetcher)| (dir, runtime.block_on(fetcher.stream(request(digest, &blob))).unwrap()),
                BatchSize::PerIteration,
            );
        });
        // As after a restart: all that is needed to show the layer is read from the disk, and checked.
        let dir = tempfile::tempdir().unwrap();
        let streamed = runtime.block_on(fetcher(open(dir.path())).stream(request(digest, &blob)));
        println!("{name}: {} inodes", streamed.unwrap().index().inodes());
        group.bench_function(format!("{name}, loaded from it"), |b| {
            b.iter_batched(
                || open(dir.path()).0,
                |cache| (cache.get(&digest).unwrap().unwrap(), cache),
                BatchSize::PerIteration,
            );
        });
    }
}

criterion_group!(benches, indexes, chains, images, streams, passes);
criterion_main!(benches);
