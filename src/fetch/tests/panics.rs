//! A bug on the way to some bytes is an error of those who wait for them, at once and not by their deadline; who asks again is served.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::fake::{Bench, FakeBlob, Fault, ranged};
use super::streams::{LONG, request, tar};
use crate::fetch::{FetchError, LayerData};

#[tokio::test(flavor = "multi_thread")]
async fn of_a_request() {
    let (index, data, bytes) = ranged(&[200_000, 70_000]);
    let (bench, blob) = (Bench::new(), FakeBlob::new(bytes));
    let (cached, layer) = bench.open("layer", index, &blob);
    blob.fail([Fault::Panic]);
    let read = layer.read(0, 4096, LONG).await;
    assert!(
        matches!(read, Err(FetchError::Disk { .. })),
        "{:?}",
        read.map(|_| "bytes")
    );
    // Each chunk of the same request may still be told, also when another one is under way.
    let mut all = layer.read(0, data.len() as u32, LONG).await;
    for _ in 0..cached.index().chunks().len() {
        if all.is_err() {
            all = layer.read(0, data.len() as u32, LONG).await;
        }
    }
    assert!(all.unwrap()[..] == data);
    while bench.fetcher.memory().held() > 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_stream() {
    let tar = tar(&[300_000]);
    let bytes = zstd::encode_all(&tar[..], 1).unwrap();
    let (bench, blob) = (Bench::new(), FakeBlob::new(bytes.clone()));
    blob.fail([Fault::Panic]);
    let streamed = bench.fetcher.stream(request(&blob, &bytes, &tar)).await;
    assert!(matches!(streamed, Err(FetchError::Disk { .. })));
    assert!(bench.fetcher.stream(request(&blob, &bytes, &tar)).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_refill() {
    let tar = tar(&[3 << 20]);
    let bytes = zstd::encode_all(&tar[..], 1).unwrap();
    let (bench, blob) = (Bench::new(), FakeBlob::new(bytes.clone()));
    let cached = bench.fetcher.stream(request(&blob, &bytes, &tar)).await.unwrap();
    let layer = bench.fetcher.open(Arc::clone(&cached), blob.clone());
    cached.evict_all();
    blob.fail([Fault::Panic]);
    let read = layer.read(600, 1000, LONG).await;
    assert!(matches!(read, Err(FetchError::Disk { .. })), "{read:?}");
    assert_eq!(layer.read(600, 1000, LONG).await.unwrap()[..], tar[600..1600]);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_pass_over_all() {
    let (index, data, bytes) = ranged(&[200_000]);
    let (bench, blob) = (Bench::new(), FakeBlob::new(bytes));
    let (_, layer) = bench.open("layer", index, &blob);
    blob.rangeless.store(true, Ordering::Relaxed);
    blob.fail([Fault::Panic]);
    let read = layer.read(0, 10, LONG).await;
    assert!(matches!(read, Err(FetchError::Disk { .. })), "{read:?}");
    assert_eq!(layer.read(0, 10, LONG).await.unwrap()[..], data[..10]);
}
