//! First passes, and refills of layers that can only be streamed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::fake::{Bench, FakeBlob, Fault, gzip, noise};
use crate::config::{ByteSize, FetchConfig};
use crate::fetch::lanes::Shape;
use crate::fetch::width::Links;
use crate::fetch::{FetchError, LayerData, StreamRequest};
use crate::layer::compression::Compression;
use crate::layer::{Access, Codec, Digest};

pub(super) const LONG: Duration = Duration::from_secs(60);
const BLOCK: usize = 512;

/// A tar entry.
pub(super) fn entry(name: &str, kind: u8, size: usize, more: impl FnOnce(&mut [u8; BLOCK])) -> Vec<u8> {
    let mut header = [0; BLOCK];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..107].copy_from_slice(b"0000644");
    header[108..115].copy_from_slice(b"0000000");
    header[116..123].copy_from_slice(b"0000000");
    header[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    header[136..147].copy_from_slice(b"00000000000");
    header[156] = kind;
    header[257..265].copy_from_slice(b"ustar  \0");
    more(&mut header);
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&b| u32::from(b)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    header.to_vec()
}

/// A tar with files of these sizes, and one sparse file of 5 MiB with two pieces of data.
pub(super) fn tar(sizes: &[usize]) -> Vec<u8> {
    let mut out = Vec::new();
    for (i, &size) in sizes.iter().enumerate() {
        out.extend(entry(&format!("file{i}"), b'0', size, |_| {}));
        out.extend(noise(i as u64 + 50, size));
        out.resize(out.len().next_multiple_of(BLOCK), 0);
    }
    out.extend(entry("sparse", b'S', 1200, |header| {
        let mut number = |at: usize, value: usize| {
            header[at..at + 11].copy_from_slice(format!("{value:011o}").as_bytes());
        };
        number(386, 1000 * BLOCK);
        number(398, 1000);
        number(410, 8000 * BLOCK);
        number(422, 200);
        number(483, 5 << 20);
    }));
    out.extend(noise(99, 1200));
    out.resize(out.len().next_multiple_of(BLOCK) + 2 * BLOCK, 0);
    out
}

/// What the sparse file has to be.
pub(super) fn sparse() -> Vec<u8> {
    let (mut out, data) = (vec![0; 5 << 20], noise(99, 1200));
    out[1000 * BLOCK..][..1000].copy_from_slice(&data[..1000]);
    out[8000 * BLOCK..][..200].copy_from_slice(&data[1000..]);
    out
}

pub(super) fn request(blob: &Arc<FakeBlob>, bytes: &[u8], tar: &[u8]) -> StreamRequest {
    StreamRequest {
        digest: Digest::of(bytes),
        blob: blob.clone(),
        compression: Compression::None,
        diff_id: Some(Digest::of(tar)),
        what: "test".to_owned(),
        keep: false,
    }
}

fn small() -> FetchConfig {
    FetchConfig {
        stream_memory: ByteSize(64 << 10),
        ..FetchConfig::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_is_streamed_whatever_its_compression_is() {
    let tar = tar(&[10, 3 << 20, 0, 700_000]);
    let zstd = zstd::encode_all(&tar[..], 1).unwrap();
    for (bytes, access, codec) in [
        (tar.clone(), Access::Ranges, Codec::None),
        (gzip(&tar), Access::Ranges, Codec::GzipSpans),
        (zstd, Access::Stream, Codec::Zstd),
    ] {
        let (bench, blob) = (Bench::with(0, small()), FakeBlob::new(bytes.clone()));
        let cached = bench.fetcher.stream(request(&blob, &bytes, &tar)).await.unwrap();
        assert_eq!((cached.index().access(), cached.index().codec()), (access, codec));
        assert!(cached.is_complete());
        let mut buf = vec![1; tar.len()];
        cached.read_ready(0, &mut buf).unwrap().unwrap();
        assert!(buf == tar, "the data space begins with the tar");
        let ino = cached.names().unwrap().lookup_path(b"sparse").unwrap();
        let inode = *cached.names().unwrap().inode(ino).unwrap();
        let mut buf = vec![1; inode.size as usize];
        cached.read_ready(inode.data, &mut buf).unwrap().unwrap();
        assert!(buf == sparse());
        assert!(bench.fetcher.progress(cached.digest()).is_none());
        let memory = [&bench.fetcher.pieces, bench.fetcher.memory()].map(|budget| budget.held());
        assert_eq!(memory, [0, 0], "all memory is given back");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_who_ask_share_one_stream() {
    let tar = tar(&[100_000]);
    let (bench, blob) = (Bench::new(), FakeBlob::new(tar.clone()));
    blob.flowing.send_replace(false);
    let asked = Arc::new(AtomicUsize::new(0));
    let streams: Vec<_> = (0..5)
        .map(|_| {
            let (fetcher, request) = (Arc::clone(&bench.fetcher), request(&blob, &tar, &tar));
            let asked = Arc::clone(&asked);
            tokio::spawn(async move {
                // In this order: who has counted waits for the stream.
                let counted = async { asked.fetch_add(1, Ordering::SeqCst) };
                tokio::join!(biased; fetcher.stream(request), counted).0.unwrap()
            })
        })
        .collect();
    // If the first one gave up before the others have come, its stream would end.
    while blob.requests() == 0 || asked.load(Ordering::SeqCst) < streams.len() {
        tokio::task::yield_now().await;
    }
    let progress = bench.fetcher.progress(&Digest::of(&tar)).unwrap();
    assert_eq!((progress.done(), progress.total()), (0, tar.len() as u64));
    // One gives up; the others get the layer all the same.
    streams[0].abort();
    blob.flowing.send_replace(true);
    let mut layers = Vec::new();
    for stream in streams.into_iter().skip(1) {
        layers.push(stream.await.unwrap());
    }
    assert!(layers.iter().all(|layer| Arc::ptr_eq(layer, &layers[0])));
    let again = bench.fetcher.stream(request(&blob, &tar, &tar)).await.unwrap();
    assert!(Arc::ptr_eq(&again, &layers[0]));
    assert_eq!(blob.requests(), 1);
}

/// Nothing of a failed stream is left.
pub(super) fn assert_clean(bench: &Bench) {
    let layers = bench.dir.path().join("layers");
    let names: Vec<_> = std::fs::read_dir(&layers)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert!(
        names.iter().all(|name| [".lock", ".incoming", ".trash", ".ids"]
            .iter()
            .any(|known| name == known)),
        "{names:?}"
    );
    assert_eq!(std::fs::read_dir(layers.join(".incoming")).unwrap().count(), 0);
    assert_eq!(bench.cache.used_bytes(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_on_the_way_is_healed_by_another_pass() {
    let tar = tar(&[900_000]);
    let bytes = gzip(&tar);
    for fault in [
        Fault::Flipped(500_000),
        Fault::Flipped(3),
        Fault::Short(400_000),
        Fault::Short(2),
    ] {
        let (bench, blob) = (Bench::new(), FakeBlob::new(bytes.clone()));
        blob.fail([fault]);
        bench.fetcher.stream(request(&blob, &bytes, &tar)).await.unwrap();
        assert_eq!(blob.requests(), 2, "{fault:?}");
        blob.fail([fault]);
    }
}

/// A range among several that is not what it should be is found by the blob's digest, and the second pass has one connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_range_is_healed_by_a_pass_over_one_connection() {
    let tar = tar(&[6 << 20]);
    let bytes = gzip(&tar);
    let mut bench = Bench::new();
    let fetcher = Arc::get_mut(&mut bench.fetcher).unwrap();
    (fetcher.links, fetcher.shape) = (
        Arc::new(Links::fixed(3)),
        Shape {
            least: 256 << 10,
            most: 512 << 10,
        },
    );
    let blob = FakeBlob::new(bytes.clone());
    *blob.faults.lock().unwrap() = [None, None, Some(Fault::Flipped(70_000))].into();
    let cached = bench.fetcher.stream(request(&blob, &bytes, &tar)).await.unwrap();
    let mut buf = vec![1; tar.len()];
    cached.read_ready(0, &mut buf).unwrap().unwrap();
    assert!(buf == tar);
    let asked = blob.asked.lock().unwrap();
    let whole = 0..bytes.len() as u64;
    let wholes: Vec<usize> = (0..asked.len()).filter(|&at| asked[at] == whole).collect();
    assert_eq!(wholes.len(), 2, "{asked:?}");
    assert_eq!(asked.last(), Some(&whole), "nothing beside the second pass: {asked:?}");
    assert!(asked.len() > 3, "{asked:?}");
    let held = [&bench.fetcher.pieces, &bench.fetcher.ahead, bench.fetcher.memory()].map(|budget| budget.held());
    assert_eq!(held, [0, 0, 0], "all memory is given back");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_leaves_nothing() {
    let good = tar(&[900_000]);
    let bytes = gzip(&good);
    let bench = Bench::new();
    let blob = FakeBlob::new(bytes.clone());
    *blob.always.lock().unwrap() = Some(Fault::Flipped(5000));
    let result = bench.fetcher.stream(request(&blob, &bytes, &good)).await;
    assert!(matches!(result, Err(FetchError::Corrupt { .. })), "{result:?}");
    assert_eq!(blob.requests(), 2);
    assert_clean(&bench);

    *blob.always.lock().unwrap() = Some(Fault::Broken(5000));
    let result = bench.fetcher.stream(request(&blob, &bytes, &good)).await;
    assert!(matches!(result, Err(FetchError::Source { .. })), "{result:?}");
    assert_clean(&bench);

    // The blob is right, but not what the image's configuration says.
    let blob = FakeBlob::new(bytes.clone());
    let result = bench.fetcher.stream(request(&blob, &bytes, b"another")).await;
    assert!(
        result.as_ref().is_err_and(|e| e.to_string().contains("diff id")),
        "{result:?}"
    );
    assert_eq!(blob.requests(), 1, "another pass would not help");
    assert_clean(&bench);

    // The blob is right, and no layer.
    for bytes in [noise(3, 100_000), gzip(&noise(3, 100_000)), b"x".to_vec()] {
        let blob = FakeBlob::new(bytes.clone());
        let request = StreamRequest {
            diff_id: None,
            ..request(&blob, &bytes, b"")
        };
        let result = bench.fetcher.stream(request).await;
        assert!(matches!(result, Err(FetchError::Corrupt { .. })), "{result:?}");
        assert_clean(&bench);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_larger_than_the_budget_is_refused_by_name() {
    let tar = tar(&[3 << 20]);
    let (bench, blob) = (Bench::with(1 << 20, FetchConfig::default()), FakeBlob::new(tar.clone()));
    let error = bench.fetcher.stream(request(&blob, &tar, &tar)).await.unwrap_err();
    assert!(error.to_string().contains("cache.max_size"), "{error}");
    assert_eq!(blob.requests(), 1);
    assert_clean(&bench);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_evicted_layer_is_streamed_again_for_its_readers() {
    let tar = tar(&[3 << 20, 500_000]);
    let bytes = zstd::encode_all(&tar[..], 1).unwrap();
    let (bench, blob) = (Bench::new(), FakeBlob::new(bytes.clone()));
    let cached = bench.fetcher.stream(request(&blob, &bytes, &tar)).await.unwrap();
    let layer = bench.fetcher.open(Arc::clone(&cached), blob.clone());
    assert!(cached.evict_all() > 3 << 20);
    assert_eq!(cached.present_bytes(), 0);
    let mut buf = vec![0; 10];
    assert!(layer.read_ready(600, &mut buf).is_none());

    let inode = *layer
        .names()
        .unwrap()
        .inode(layer.names().unwrap().lookup_path(b"sparse").unwrap())
        .unwrap();
    let reads = [(600, 1000), (2 << 20, 4096), (inode.data, inode.size as u32)];
    let answers = reads.map(|(offset, len)| layer.read(offset, len, LONG));
    let answers = futures::future::join_all(answers).await;
    assert_eq!(answers[0].as_ref().unwrap()[..], tar[600..1600]);
    assert_eq!(answers[1].as_ref().unwrap()[..], tar[2 << 20..(2 << 20) + 4096]);
    assert!(answers[2].as_ref().unwrap()[..] == sparse());
    while !cached.is_complete() {
        tokio::task::yield_now().await;
    }
    assert_eq!(blob.requests(), 2, "one more pass for all of them");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refill_that_fails_tells_its_readers_and_can_be_tried_again() {
    let tar = tar(&[3 << 20]);
    let bytes = zstd::encode_all(&tar[..], 1).unwrap();
    let (bench, blob) = (Bench::new(), FakeBlob::new(bytes.clone()));
    let cached = bench.fetcher.stream(request(&blob, &bytes, &tar)).await.unwrap();
    let layer = bench.fetcher.open(Arc::clone(&cached), blob.clone());
    cached.evict_all();
    // A source that breaks is asked again; damage is what its readers are told of.
    blob.fail([Fault::Broken(1_500_000), Fault::Flipped(10), Fault::Flipped(2_500_000)]);
    blob.flowing.send_replace(false);
    let (mut early, mut late) = (layer.read(0, 10, LONG), layer.read(3 << 20, 10, LONG));
    assert!(futures::poll!(&mut early).is_pending() && futures::poll!(&mut late).is_pending());
    blob.flowing.send_replace(true);
    let (early, late) = tokio::join!(early, late);
    assert_eq!(early.unwrap()[..], tar[..10], "it had passed before the source broke");
    assert!(matches!(late, Err(FetchError::Corrupt { .. })), "{late:?}");
    blob.fail([Fault::Missing]);
    let late = layer.read(3 << 20, 10, LONG).await;
    assert!(matches!(late, Err(FetchError::Source { .. })), "{late:?}");
    assert_eq!(
        layer.read(3 << 20, 10, LONG).await.unwrap()[..],
        tar[3 << 20..(3 << 20) + 10]
    );
}
