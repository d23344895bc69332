//! Layers whose source has no ranges.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::fake::{Bench, FakeBlob, Fault, ranged};
use super::spans::{frames, gzip, streamed};
use super::streams::{LONG, tar};
use crate::fetch::{FetchError, LayerData};

#[tokio::test(flavor = "multi_thread")]
async fn evicted_bytes_of_every_codec_come_back_in_one_pass() {
    let tar = tar(&[10, 3 << 20, 0, 700_000]);
    for (name, bytes) in [
        ("one member", gzip(&tar, usize::MAX)),
        ("members", gzip(&tar, 65_280)),
        ("frames", frames(&tar)),
        ("tar", tar.clone()),
    ] {
        let bench = Bench::new();
        let (blob, cached, layer) = streamed(&bench, &bytes, &tar).await;
        cached.evict_all();
        blob.rangeless.store(true, Ordering::Relaxed);
        let before = blob.requests();
        let reads: Vec<_> = [0, 100_000, 1_000_000, 3_000_000, tar.len() - 4096]
            .into_iter()
            .map(|at| {
                let (layer, expected) = (Arc::clone(&layer), tar[at..at + 4096].to_vec());
                tokio::spawn(async move {
                    let bytes = layer.read(at as u64, 4096, LONG).await.unwrap();
                    assert!(bytes[..] == expected, "at {at}");
                })
            })
            .collect();
        for read in reads {
            read.await.unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        while !layer.is_local() {
            tokio::task::yield_now().await;
        }
        let asked = blob.asked.lock().unwrap()[before..].to_vec();
        let whole = 0..bytes.len() as u64;
        assert_eq!(
            asked,
            std::slice::from_ref(&whole),
            "{name}: it is read once, as a whole"
        );
        // It is given back once the pass has come to its end.
        while bench.fetcher.memory().held() > 0 {
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_pass_brings_damaged_comes_with_the_next_one() {
    let (index, data, bytes) = ranged(&[200_000, 200_000]);
    let (bench, blob) = (Bench::new(), FakeBlob::new(bytes));
    let (_, layer) = bench.open("layer", index, &blob);
    blob.rangeless.store(true, Ordering::Relaxed);
    // The first one lacks the end of the second chunk, the other one brings it wrong.
    blob.fail([Fault::Short(300_000), Fault::Flipped(300_000)]);
    let read = layer.read(0, data.len() as u32, LONG).await.unwrap();
    assert!(read[..] == data);
    assert_eq!(blob.requests(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pass_that_fails_is_told_to_its_readers_and_does_not_stay() {
    let (index, data, bytes) = ranged(&[200_000]);
    let (bench, blob) = (Bench::new(), FakeBlob::new(bytes));
    let (_, layer) = bench.open("layer", index, &blob);
    blob.rangeless.store(true, Ordering::Relaxed);
    blob.fail([Fault::Missing]);
    let error = layer.read(0, 10, LONG).await.unwrap_err();
    assert!(matches!(error, FetchError::Source { .. }), "{error}");
    // What may pass is waited for.
    blob.fail([Fault::Refused, Fault::Broken(50_000)]);
    assert_eq!(layer.read(0, 10, LONG).await.unwrap()[..], data[..10]);
    // Ranges are used again as soon as there are some.
    let (index, data, bytes) = ranged(&[5000, 3_000_000, 5000]);
    let blob = FakeBlob::new(bytes);
    let (_, layer) = bench.open("other", index, &blob);
    assert_eq!(layer.read(0, 10, LONG).await.unwrap()[..], data[..10]);
    assert!(layer.stats().fetched_bytes < 1 << 20);
}
