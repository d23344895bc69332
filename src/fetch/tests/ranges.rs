//! Reads of layers that are fetched in ranges.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use proptest::prelude::*;

use super::fake::{Bench, FakeBlob, Fault, noise, ranged};
use crate::config::FetchConfig;
use crate::fetch::{FetchError, Layer, LayerData};
use crate::layer::{Digest, LayerError};

const LONG: Duration = Duration::from_secs(60);

async fn read(layer: &Layer, offset: usize, len: usize) -> Result<Vec<u8>, FetchError> {
    layer.read(offset as u64, len as u32, LONG).await.map(Vec::from)
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_come_once_and_stay() {
    let (index, data, blob) = ranged(&[5000, 200_000, 1, 70_000]);
    let (bench, blob) = (Bench::new(), FakeBlob::new(blob));
    let (cached, layer) = bench.open("layer", index, &blob);
    let mut buf = vec![1; data.len()];
    assert!(layer.read_ready(0, &mut buf).is_none());
    assert_eq!(read(&layer, 0, data.len()).await.unwrap(), data);
    layer.read_ready(0, &mut buf).unwrap().unwrap();
    assert_eq!(buf, data);
    assert_eq!(blob.requests(), 1, "neighbours are one request");
    assert!(cached.is_complete());
    assert_eq!(layer.present_bytes(), 275_001);
    let stats = layer.stats();
    assert_eq!((stats.requests, stats.present_bytes), (1, stats.total_bytes));
    assert!(stats.fetched_bytes < blob_len(&blob));
}

fn blob_len(blob: &FakeBlob) -> u64 {
    crate::registry::Blob::size(blob)
}

#[tokio::test(flavor = "multi_thread")]
async fn gaps_and_what_is_after_the_end_are_zeros() {
    let (index, data, blob) = ranged(&[1000, 1000]);
    let (bench, blob) = (Bench::new(), FakeBlob::new(blob));
    let (_, layer) = bench.open("layer", index, &blob);
    let mut buf = [1; 50];
    layer.read_ready(1010, &mut buf).unwrap().unwrap();
    assert_eq!(buf, [0; 50], "a gap is ready at once");
    let mut expected = data[1500..].to_vec();
    expected.resize(1000, 0);
    assert_eq!(read(&layer, 1500, 1000).await.unwrap(), expected);
    assert_eq!(read(&layer, usize::MAX >> 1, 10).await.unwrap(), [0; 10]);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_readers_of_one_chunk_are_one_request() {
    let (index, data, blob) = ranged(&[300_000]);
    let (bench, blob) = (Bench::new(), FakeBlob::new(blob));
    let (_, layer) = bench.open("layer", index, &blob);
    blob.flowing.send_replace(false);
    let readers: Vec<_> = (0..100)
        .map(|i| {
            let layer = Arc::clone(&layer);
            tokio::spawn(async move { (i, read(&layer, i * 100, 4096).await) })
        })
        .collect();
    while blob.requests() == 0 {
        tokio::task::yield_now().await;
    }
    blob.flowing.send_replace(true);
    for reader in readers {
        let (i, bytes) = reader.await.unwrap();
        assert_eq!(bytes.unwrap(), data[i * 100..i * 100 + 4096]);
    }
    assert_eq!(blob.requests(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_is_answered_when_its_chunk_is_in() {
    let (index, data, blob) = ranged(&[9_000, 800_000]);
    let (bench, blob) = (Bench::new(), FakeBlob::new(blob));
    let (cached, layer) = bench.open("layer", index, &blob);
    // Two pieces of the body are let through, in which the first chunk is complete.
    blob.fail([Fault::Broken(20_000), Fault::Missing]);
    assert!(matches!(read(&layer, 0, 500_000).await, Err(FetchError::Source { .. })));
    assert!(
        cached.is_chunk_ready(0),
        "stored though the rest of the body never came"
    );
    assert_eq!(read(&layer, 10, 100).await.unwrap(), data[10..110]);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_at_once_are_limited() {
    let (index, data, blob) = ranged(&[150_000; 24]);
    let config = FetchConfig {
        max_concurrent_requests: 3,
        max_request: crate::config::ByteSize(160 << 10),
        ..FetchConfig::default()
    };
    let (bench, blob) = (Bench::with(0, config), FakeBlob::new(blob));
    let (_, layer) = bench.open("layer", index, &blob);
    assert_eq!(read(&layer, 0, data.len()).await.unwrap(), data);
    assert_eq!(blob.requests(), 24, "none is larger than the limit");
    assert!(blob.most_underway.load(Ordering::Relaxed) <= 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_host_brings_is_counted_and_what_it_refuses_halves_what_it_is_asked_at_once() {
    let changes = |bench: &Bench| {
        let changes = &bench.metrics.request_limit_changes_total;
        changes.with_label_values(&["refused"]).get()
    };
    let (index, data, bytes) = ranged(&[5000]);
    let (bench, blob) = (Bench::new(), FakeBlob::new(bytes));
    let (_, layer) = bench.open("layer", index, &blob);
    // It has refused somebody else before, which is no news.
    blob.refusals.store(3, Ordering::Relaxed);
    blob.flowing.send_replace(false);
    let mut reading = Box::pin(read(&layer, 0, 10));
    while blob.requests() < 1 {
        assert!(futures::poll!(&mut reading).is_pending());
        tokio::task::yield_now().await;
    }
    assert_eq!(changes(&bench), 0);
    blob.refusals.store(5, Ordering::Relaxed);
    blob.flowing.send_replace(true);
    assert_eq!(reading.await.unwrap(), data[..10]);
    assert_eq!(changes(&bench), 1);
    assert_eq!(bench.metrics.request_limit.with_label_values(&["lowest"]).get(), 8);
    let brought: u64 = blob
        .asked
        .lock()
        .unwrap()
        .iter()
        .map(|range| range.end - range.start)
        .sum();
    let traffic = bench.fetcher.scheduler().traffic(&blob.origin.host);
    assert_eq!(traffic.bytes(), brought);
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_fetched_again_and_never_shown() {
    for fault in [Fault::Flipped(3000), Fault::Short(1500), Fault::Short(0)] {
        let (index, data, blob) = ranged(&[5000, 5000]);
        let (bench, blob) = (Bench::new(), FakeBlob::new(blob));
        let (_, layer) = bench.open("layer", index, &blob);
        blob.fail([fault, fault]);
        assert_eq!(read(&layer, 0, 5000).await.unwrap(), data[..5000], "{fault:?}");
        assert_eq!(blob.requests(), 3);
        let failures = bench.metrics.verify_failures_total.with_label_values(&["source"]).get();
        assert!(failures >= 2, "{failures}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lasting_damage_is_an_error_for_its_readers_only() {
    let (index, data, mut blob) = ranged(&[5000, 5000, 5000]);
    let at = index.chunks()[1].blob_offset as usize + 2500;
    blob[at] ^= 1;
    let (bench, blob) = (Bench::new(), FakeBlob::new(blob));
    let (cached, layer) = bench.open("layer", index, &blob);
    match read(&layer, 5100, 10).await {
        Err(FetchError::Corrupt { from, .. }) => assert_eq!(from, "fake.example/repo@sha256:0"),
        other => panic!("{other:?}"),
    }
    assert_eq!(blob.requests(), 3);
    assert!(!cached.is_chunk_ready(1));
    assert_eq!(read(&layer, 0, 5000).await.unwrap(), data[..5000]);
    assert_eq!(read(&layer, 10_200, 5000).await.unwrap(), data[10_200..15_200]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_fails_for_good_is_an_error_and_may_be_replaced() {
    let (index, data, bytes) = ranged(&[5000]);
    let (bench, bad, good) = (Bench::new(), FakeBlob::new(bytes.clone()), FakeBlob::new(bytes));
    let (_, layer) = bench.open("layer", index, &bad);
    *bad.always.lock().unwrap() = Some(Fault::Missing);
    assert!(matches!(read(&layer, 0, 10).await, Err(FetchError::Source { .. })));
    layer.set_blob(good);
    assert_eq!(read(&layer, 0, 10).await.unwrap(), data[..10]);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_read_ends_by_its_deadline() {
    let (index, data, bytes) = ranged(&[5000]);
    let (bench, blob) = (Bench::new(), FakeBlob::new(bytes));
    let (_, layer) = bench.open("layer", index, &blob);
    blob.flowing.send_replace(false);
    let result = layer.read(0, 10, Duration::from_millis(20));
    // Without an end of its own it would wait for ever, and so would this test.
    let result = tokio::time::timeout(LONG, result).await.expect("it does not end");
    assert!(matches!(result, Err(FetchError::Deadline { .. })), "{result:?}");
    // The flight went on, and serves the next reader.
    blob.flowing.send_replace(true);
    assert_eq!(read(&layer, 0, 10).await.unwrap(), data[..10]);
    assert_eq!(blob.requests(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_source_gives_its_place_back() {
    let (index, data, bytes) = ranged(&[5000]);
    let config = FetchConfig {
        max_concurrent_requests: 1,
        read_deadline: Duration::from_millis(50),
        ..FetchConfig::default()
    };
    let (bench, blob) = (Bench::with(0, config), FakeBlob::new(bytes));
    let (_, layer) = bench.open("layer", index, &blob);
    blob.fail([Fault::Silent]);
    assert_eq!(read(&layer, 0, 10).await.unwrap(), data[..10]);
    assert_eq!(blob.requests(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_answers_everyone() {
    let (index, _, bytes) = ranged(&[5000]);
    let (bench, blob) = (Bench::new(), FakeBlob::new(bytes));
    let (_, layer) = bench.open("layer", index, &blob);
    blob.flowing.send_replace(false);
    let reader = tokio::spawn({
        let layer = Arc::clone(&layer);
        async move { read(&layer, 0, 10).await }
    });
    while blob.requests() == 0 {
        tokio::task::yield_now().await;
    }
    layer.close();
    assert!(matches!(reader.await.unwrap(), Err(FetchError::Closed { .. })));
    assert!(matches!(read(&layer, 0, 10).await, Err(FetchError::Closed { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_pass_before_prefetch_and_promote_it() {
    let (index, data, bytes) = ranged(&[150_000; 12]);
    let config = FetchConfig {
        max_concurrent_requests: 1,
        max_request: crate::config::ByteSize(64 << 10),
        ..FetchConfig::default()
    };
    let (bench, blob) = (Bench::with(0, config), FakeBlob::new(bytes));
    let (_, layer) = bench.open("layer", index, &blob);
    blob.flowing.send_replace(false);
    layer.prefetch(0, data.len() as u64);
    while blob.requests() == 0 {
        tokio::task::yield_now().await;
    }
    // The last chunk is wanted while the first is being fetched: it comes second.
    let mut reader = layer.read(data.len() as u64 - 1000, 10, LONG);
    assert!(futures::poll!(&mut reader).is_pending());
    // Both wait for the only place: who asks for the next chunk ahead, and for what is waited for.
    super::flights::until(|| bench.fetcher.scheduler().counts() == (2, 1)).await;
    blob.flowing.send_replace(true);
    reader.await.unwrap();
    let last = layer.index().chunks().get(11).unwrap().blob_offset;
    assert_eq!(blob.asked.lock().unwrap()[1].start, last);
    while !layer.cached().is_complete() {
        tokio::task::yield_now().await;
    }
    assert_eq!(blob.requests(), 12);
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_of_one_member_are_all_kept() {
    let bytes = noise(9, 30_000);
    let member = super::fake::gzip(&bytes);
    let chunk = |at: usize| crate::layer::Chunk {
        data_offset: at as u64,
        data_len: 10_000,
        blob_offset: 0,
        blob_len: member.len() as u32,
        skip: at as u32,
        digest: Digest::of(&bytes[at..at + 10_000]),
    };
    let chunks = vec![chunk(0), chunk(10_000), chunk(20_000)];
    let index = super::fake::index(chunks, 30_000, member.len() as u64, crate::layer::Access::Ranges);
    let (bench, blob) = (Bench::new(), FakeBlob::new(member.clone()));
    let (cached, layer) = bench.open("layer", index, &blob);
    assert_eq!(read(&layer, 15_000, 3).await.unwrap(), bytes[15_000..15_003]);
    assert_eq!(read(&layer, 0, 30_000).await.unwrap(), bytes);
    assert!(cached.is_complete());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_in_another_order_than_the_data_is_read() {
    let (index, data, blob) = ranged(&[5000, 6000, 7000]);
    // The same members, the last first.
    let (mut chunks, mut shuffled) = (index.chunks().to_vec(), Vec::new());
    for chunk in chunks.iter_mut().rev() {
        let from = chunk.blob_offset as usize;
        chunk.blob_offset = shuffled.len() as u64;
        shuffled.extend_from_slice(&blob[from..from + chunk.blob_len as usize]);
    }
    let index = super::fake::index(
        chunks,
        data.len() as u64,
        shuffled.len() as u64,
        crate::layer::Access::Ranges,
    );
    let (bench, blob) = (Bench::new(), FakeBlob::new(shuffled));
    let (_, layer) = bench.open("layer", index, &blob);
    assert_eq!(read(&layer, 0, data.len()).await.unwrap(), data);
    assert_eq!(blob.requests(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_room_reads_are_served_past_the_disk() {
    let (index, data, blob) = ranged(&[50_000, 50_000]);
    let (bench, blob) = (Bench::with(10_000, FetchConfig::default()), FakeBlob::new(blob));
    let (cached, layer) = bench.open("layer", index, &blob);
    for _ in 0..3 {
        assert_eq!(read(&layer, 0, 50_000).await.unwrap(), data[..50_000]);
    }
    assert!(!cached.is_chunk_ready(0));
    assert_eq!(blob.requests(), 1, "kept in memory");
    assert!(bench.metrics.cache_bypassed_bytes_total.get() >= 50_000);
    assert!(bench.cache.used_bytes() <= 10_000);
}

#[test]
fn error_of_a_short_body_says_so() {
    let error = LayerError::Truncated {
        format: "body",
        length: 3,
        what: "the 5 bytes asked for".to_owned(),
    };
    assert!(error.retry_helps());
}

#[derive(Debug, Clone)]
enum Op {
    Read { offset: usize, len: usize },
    Prefetch { offset: usize, len: usize },
    Fault(Fault),
    Crowd { layer: u8 },
    Reopen,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let place = || (0..140_000usize, 1..60_000usize);
    let fault = prop_oneof![
        (0..50_000usize).prop_map(Fault::Short),
        (0..50_000usize).prop_map(Fault::Broken),
        (0..50_000usize).prop_map(Fault::Flipped),
        Just(Fault::Refused),
    ];
    let op = prop_oneof![
        6 => place().prop_map(|(offset, len)| Op::Read { offset, len }),
        1 => place().prop_map(|(offset, len)| Op::Prefetch { offset, len }),
        2 => fault.prop_map(Op::Fault),
        2 => (0..4u8).prop_map(|layer| Op::Crowd { layer }),
        1 => Just(Op::Reopen),
    ];
    proptest::collection::vec(op, 1..25)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever happens, a read gives the right bytes or an error.
    #[test]
    fn reads_give_the_right_bytes_or_an_error(ops in ops()) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async move {
            let (index, data, blob) = ranged(&[3000, 1, 40_000, 512, 9000, 60_000, 20_000, 7]);
            let (bench, blob) = (Bench::with(200_000, FetchConfig::default()), FakeBlob::new(blob));
            let (_, mut layer) = bench.open("layer", index.clone(), &blob);
            for op in ops {
                match op {
                    Op::Read { offset, len } => {
                        let mut expected = data.get(offset..).unwrap_or_default().to_vec();
                        expected.resize(len, 0);
                        let mut buf = vec![1; len];
                        if let Some(result) = layer.read_ready(offset as u64, &mut buf) {
                            result.unwrap();
                            assert_eq!(buf, expected);
                        }
                        if let Ok(bytes) = read(&layer, offset, len).await {
                            assert_eq!(bytes, expected);
                        }
                    }
                    Op::Prefetch { offset, len } => layer.prefetch(offset as u64, len as u64),
                    Op::Fault(fault) => blob.fail([fault]),
                    Op::Crowd { layer } => {
                        // Another layer takes the room.
                        let (index, data, bytes) = ranged(&[30_000 + usize::from(layer); 4]);
                        let (_, other) = bench.open(&format!("other {layer}"), index, &FakeBlob::new(bytes));
                        assert_eq!(read(&other, 0, data.len()).await.unwrap(), data);
                    }
                    Op::Reopen => {
                        let (_, again) = bench.open("layer", index.clone(), &blob);
                        layer = again;
                    }
                }
                assert!(bench.cache.used_bytes() <= 200_000 + 8 * 4096, "{}", bench.cache.used_bytes());
            }
            blob.faults.lock().unwrap().clear();
            // Requests under way may still have a fault, but each at most one.
            let mut result = read(&layer, 0, data.len()).await;
            for _ in 0..blob.requests() {
                if result.is_err() {
                    result = read(&layer, 0, data.len()).await;
                }
            }
            assert_eq!(result.unwrap(), data);
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_complete_layer_is_a_file_once_it_is_verified() {
    use std::os::unix::fs::FileExt as _;
    let (index, data, blob) = ranged(&[5000, 200_000, 70_000]);
    let mut expected = data.clone();
    expected.resize(data.len().next_multiple_of(4096), 0);
    let (bench, blob) = (Bench::new(), FakeBlob::new(blob));
    let (cached, layer) = bench.open("layer", index, &blob);
    assert!(layer.local_file().is_none(), "nothing is there");
    read(&layer, 0, data.len()).await.unwrap();
    let file = layer.local_file().unwrap();
    assert_eq!(std::fs::read(&file.path).unwrap(), expected);
    let path = file.path.clone();
    drop(file);

    // As the next process finds it: not marked as believed, and with a damaged chunk.
    let digest = *cached.digest();
    let gone = Arc::downgrade(&cached);
    layer.close();
    drop((cached, layer));
    while gone.strong_count() > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let damaged = std::fs::File::options().write(true).open(&path).unwrap();
    damaged.write_all_at(b"damage", 10_000).unwrap();
    let cached = tokio::task::block_in_place(|| bench.cache.get(&digest));
    let cached = cached.unwrap().unwrap();
    let layer = bench.fetcher.open(cached, blob.clone());
    let requests = blob.requests();
    let whole = async {
        loop {
            match layer.local_file() {
                Some(file) => return file,
                None => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
    };
    let file = tokio::time::timeout(LONG, whole).await.unwrap();
    assert_eq!(std::fs::read(&file.path).unwrap(), expected);
    assert_eq!(blob.requests(), requests + 1, "for what was damaged");
    // Who closes a layer does not have to wait for its verification.
    layer.close();
}

/// What a reader who goes from one end of a large file to the other asks for beyond what he has read; and one who looks here and there.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_read_on_and_on_is_read_ahead_and_one_that_is_looked_into_is_not() {
    const FILE: usize = 40 << 20;
    const STEP: u64 = 128 << 10;
    let tar = super::streams::tar(&[FILE]);
    let fetched = async |places: &[u64]| {
        let bench = Bench::new();
        let blob = FakeBlob::new(tar.clone());
        let cached = bench
            .fetcher
            .stream(super::streams::request(&blob, &tar, &tar))
            .await
            .unwrap();
        let layer = bench.fetcher.open(Arc::clone(&cached), blob.clone());
        cached.evict_all();
        blob.asked.lock().unwrap().clear();
        for &place in places {
            let read = layer.read(place, STEP as u32, super::streams::LONG).await.unwrap();
            assert!(read[..] == tar[place as usize..(place + STEP) as usize]);
        }
        // Between two requests nobody has a place.
        super::flights::until(|| layer.queue().is_empty() && bench.fetcher.scheduler().counts() == (0, 0)).await;
        let asked = blob.asked.lock().unwrap().clone();
        assert!(
            asked.iter().all(|range| range.end - range.start <= 4 << 20),
            "{asked:?}"
        );
        let ahead = bench.metrics.fetches_total.with_label_values(&["readahead"]).get();
        (asked.iter().map(|range| range.end - range.start).sum::<u64>(), ahead)
    };
    let read = 12_u64 << 20;
    let onward: Vec<u64> = (0..read / STEP).map(|step| 1024 + step * STEP).collect();
    let (bytes, ahead) = fetched(&onward).await;
    // How far depends on how often he waits; that he does three times in the beginning is certain.
    assert!(ahead > 0);
    assert!(bytes <= 3 * read, "never more in vain than were of use: {bytes}");
    let around: Vec<u64> = [30_u64, 3, 24, 9, 36, 15].map(|at| (at << 20) + 1024).into();
    let (bytes, ahead) = fetched(&around).await;
    assert_eq!(ahead, 0);
    assert!(bytes <= 6 * (4 << 20), "{bytes}");
}
