//! Plain layers whose evicted bytes come back in ranges.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::fake::{Bench, FakeBlob, Fault, noise};
use super::streams::{LONG, request, sparse, tar};
use crate::cache::CachedLayer;
use crate::fetch::{FetchError, Layer, LayerData};
use crate::layer::{Access, Codec, Digest, IndexParts, LayerIndex, Verify, Windows, portable};

/// Files of a layer of about 7 MB, most of which can be compressed.
fn files() -> Vec<u8> {
    let mut tar = tar(&[10, 3 << 20, 0, 700_000]);
    // Noise becomes text that refers back, over the borders of spans too.
    for at in (4000..3 << 20).step_by(700) {
        let from = at - 3000;
        tar.copy_within(from..from + 350, at);
    }
    tar
}

pub(super) fn gzip(tar: &[u8], member: usize) -> Vec<u8> {
    let mut blob = Vec::new();
    for part in tar.chunks(member) {
        let builder = flate2::GzBuilder::new().filename("layer.tar");
        let mut encoder = builder.write(Vec::new(), flate2::Compression::new(6));
        encoder.write_all(part).unwrap();
        blob.extend(encoder.finish().unwrap());
    }
    blob
}

pub(super) fn frames(tar: &[u8]) -> Vec<u8> {
    tar.chunks(400_000)
        .flat_map(|part| zstd::encode_all(part, 1).unwrap())
        .collect()
}

pub(super) async fn streamed(bench: &Bench, bytes: &[u8], tar: &[u8]) -> (Arc<FakeBlob>, Arc<CachedLayer>, Arc<Layer>) {
    let blob = FakeBlob::new(bytes.to_vec());
    let cached = bench.fetcher.stream(request(&blob, bytes, tar)).await.unwrap();
    let layer = bench.fetcher.open(Arc::clone(&cached), blob.clone());
    (blob, cached, layer)
}

/// Reads everywhere, with evictions in between, and compares with the tar.
async fn check_ranges(cached: &CachedLayer, layer: &Layer, tar: &[u8], count: usize) {
    let random = noise(7, count * 8);
    for (i, random) in random.chunks(8).enumerate() {
        if i % 50 == 0 {
            cached.evict_all();
        }
        let number = |at: usize| u32::from_le_bytes(random[at..at + 4].try_into().unwrap()) as usize;
        let offset = number(0) % tar.len();
        let len = (number(4) % 100_000).min(tar.len() - offset);
        let bytes = layer.read(offset as u64, len as u32, LONG).await.unwrap();
        assert!(bytes[..] == tar[offset..offset + len], "{len} bytes at {offset}");
    }
    let inode = *layer
        .names()
        .unwrap()
        .inode(layer.names().unwrap().lookup_path(b"sparse").unwrap())
        .unwrap();
    cached.evict_all();
    let bytes = layer.read(inode.data, inode.size as u32, LONG).await.unwrap();
    assert!(bytes[..] == sparse());
}

#[tokio::test(flavor = "multi_thread")]
async fn evicted_bytes_come_back_in_ranges() {
    let tar = files();
    for (name, bytes, codec) in [
        ("one member", gzip(&tar, usize::MAX), Codec::GzipSpans),
        ("members", gzip(&tar, 65_280), Codec::GzipSpans),
        ("frames", frames(&tar), Codec::Zstd),
        ("tar", tar.clone(), Codec::None),
    ] {
        let bench = Bench::new();
        let (blob, cached, layer) = streamed(&bench, &bytes, &tar).await;
        assert_eq!(
            (cached.index().access(), cached.index().codec()),
            (Access::Ranges, codec),
            "{name}"
        );
        assert!(cached.is_complete() && layer.is_local());
        assert!(cached.evict_all() > 3 << 20);
        assert!(!layer.is_local());
        let byte = layer.read(2_000_000, 1, LONG).await.unwrap();
        assert_eq!(byte[..], tar[2_000_000..2_000_001], "{name}");
        let fetched = layer.stats().fetched_bytes;
        assert!(fetched * 2 < bytes.len() as u64, "{name}: {fetched} bytes for one");
        check_ranges(&cached, &layer, &tar, 500).await;
        let whole = 0..bytes.len() as u64;
        assert!(!blob.asked.lock().unwrap()[1..].contains(&whole), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_from_elsewhere_needs_no_stream() {
    let tar = files();
    let bytes = gzip(&tar, usize::MAX);
    let here = Bench::new();
    let (_, cached, _) = streamed(&here, &bytes, &tar).await;
    let packed = cached.portable().unwrap();
    let there = Bench::new();
    let (index, windows) = portable::unpack(&Digest::of(&bytes), &packed).unwrap();
    assert!(
        windows.compressed_size() * 20 < bytes.len() as u64,
        "{}",
        windows.compressed_size()
    );
    let cached = there
        .cache
        .insert_with_windows(&Digest::of(&bytes), index, &windows)
        .unwrap();
    let blob = FakeBlob::new(bytes.clone());
    let layer = there.fetcher.open(Arc::clone(&cached), blob);
    check_ranges(&cached, &layer, &tar, 50).await;
    assert!(cached.portable().unwrap() == packed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_span_is_fetched_again() {
    let tar = files();
    let bytes = gzip(&tar, usize::MAX);
    let bench = Bench::new();
    let (blob, cached, layer) = streamed(&bench, &bytes, &tar).await;
    cached.evict_all();
    blob.fail([Fault::Flipped(70_000), Fault::Short(1000)]);
    let part = layer.read(2_500_000, 4096, LONG).await.unwrap();
    assert!(part[..] == tar[2_500_000..][..4096]);
    assert_eq!(blob.requests(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn windows_that_are_damaged_or_gone_cost_a_stream() {
    let tar = files();
    let bytes = gzip(&tar, usize::MAX);
    let bench = Bench::new();
    let (blob, cached, layer) = streamed(&bench, &bytes, &tar).await;
    let digest = Digest::of(&bytes);
    let path = bench.dir.path().join("layers").join(digest.hex()).join("windows");
    let mut windows = std::fs::read(&path).unwrap();
    let last = windows.len() - 1;
    windows[last] ^= 1;
    std::fs::write(&path, &windows).unwrap();
    cached.evict_all();
    // The window of the last span that has one: reads of it, and of others, get their bytes.
    check_ranges(&cached, &layer, &tar, 20).await;
    assert!(blob.asked.lock().unwrap()[1..].contains(&(0..bytes.len() as u64)));
    assert!(!path.exists());
    drop((cached, layer));
    while Arc::strong_count(&bench.cache) > 2 {
        tokio::task::yield_now().await;
    }
    let found = tokio::task::block_in_place(|| bench.cache.get(&digest));
    assert!(found.unwrap().is_none(), "it is made again");
    let (_, cached, layer) = streamed(&bench, &bytes, &tar).await;
    check_ranges(&cached, &layer, &tar, 20).await;
    assert!(path.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn windows_of_other_spans_are_errors_and_never_bytes() {
    let tar = files();
    let bytes = gzip(&tar, usize::MAX);
    let here = Bench::new();
    let (_, cached, _) = streamed(&here, &bytes, &tar).await;
    let (index, windows) = portable::unpack(&Digest::of(&bytes), &cached.portable().unwrap()).unwrap();
    let checkpoints = index.checkpoints();
    let mut wrong: Vec<Vec<u8>> = (0..windows.len())
        .map(|at| windows.window(at, &checkpoints[at]).unwrap())
        .collect();
    for window in &mut wrong {
        window.iter_mut().for_each(|byte| *byte ^= 1);
    }
    let wrong = Windows::of(wrong.iter().map(Vec::as_slice)).unwrap();
    let there = Bench::new();
    let digest = Digest::of(&bytes);
    let cached = there.cache.insert_with_windows(&digest, index.clone(), &wrong).unwrap();
    let layer = there.fetcher.open(cached, FakeBlob::new(bytes.clone()));
    let second = &index.chunks()[1];
    let result = layer.read(second.data_offset, 10, LONG).await;
    assert!(matches!(result, Err(FetchError::Corrupt { .. })), "{result:?}");
    // The first span needs none.
    assert_eq!(layer.read(0, 10, LONG).await.unwrap()[..], tar[..10]);
    // Windows for another number of checkpoints are no windows of this layer.
    let few = Windows::of([&b""[..]]).unwrap();
    assert!(Bench::new().cache.insert_with_windows(&digest, index, &few).is_err());
}

/// The same index as one that knows digests of compressed spans only.
fn foreign(index: &LayerIndex) -> LayerIndex {
    LayerIndex::new(IndexParts {
        verify: Verify::Span,
        chunks: index
            .chunks()
            .iter()
            .map(|chunk| crate::layer::Chunk {
                digest: Digest::from_bytes([0; Digest::LEN]),
                ..*chunk
            })
            .collect(),
        ..index.parts().clone()
    })
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_are_verified_before_they_are_decoded() {
    let tar = files();
    let bytes = gzip(&tar, usize::MAX);
    let here = Bench::new();
    let (_, cached, _) = streamed(&here, &bytes, &tar).await;
    let (index, windows) = portable::unpack(&Digest::of(&bytes), &cached.portable().unwrap()).unwrap();
    let there = Bench::new();
    let digest = Digest::of(&bytes);
    let cached = there
        .cache
        .insert_with_windows(&digest, foreign(&index), &windows)
        .unwrap();
    let blob = FakeBlob::new(bytes.clone());
    let layer = there.fetcher.open(Arc::clone(&cached), blob.clone());
    blob.fail([Fault::Flipped(50_000)]);
    check_ranges(&cached, &layer, &tar, 50).await;
    *blob.always.lock().unwrap() = Some(Fault::Flipped(50_000));
    cached.evict_all();
    let result = layer.read(2_500_000, 10, LONG).await;
    assert!(matches!(result, Err(FetchError::Corrupt { .. })), "{result:?}");
}

/// Bytes that are evicted while the layer is streamed again reach those who wait for them all the same, those of sparse files too.
#[tokio::test(flavor = "multi_thread")]
async fn evictions_during_a_second_stream_harm_nobody() {
    let tar = files();
    let bytes = zstd::encode_all(&tar[..], 1).unwrap();
    let bench = Bench::new();
    let (blob, cached, layer) = streamed(&bench, &bytes, &tar).await;
    let inode = *layer
        .names()
        .unwrap()
        .inode(layer.names().unwrap().lookup_path(b"sparse").unwrap())
        .unwrap();
    cached.evict_all();
    let done = Arc::new(AtomicBool::new(false));
    let evicting = {
        let (cached, done) = (Arc::clone(&cached), Arc::clone(&done));
        std::thread::spawn(move || {
            while !done.load(Ordering::Relaxed) {
                cached.evict_all();
                std::thread::yield_now();
            }
        })
    };
    // One chunk at a time: what a read of several waits for may be evicted again before it has all of them.
    let chunks = layer.index().chunks();
    let place = layer.index().chunks_at(inode.data, inode.size);
    for chunk in chunks.range(1..2).chain(chunks.range(place)) {
        let read = layer.read(chunk.data_offset, chunk.data_len, LONG).await;
        assert_eq!(Digest::of(&read.unwrap()), chunk.digest);
        // Whether the thread has come to it or not.
        cached.evict_all();
    }
    done.store(true, Ordering::Relaxed);
    evicting.join().unwrap();
    assert!(blob.requests() > 2);
    let read = layer.read(inode.data, inode.size as u32, LONG).await.unwrap();
    assert!(read[..] == sparse());
}
