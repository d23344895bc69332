//! Sources that are away for a while, and readers that wait for them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::FutureExt;
use futures::future::join_all;

use super::fake::{Bench, FakeBlob, Fault, ranged};
use super::flights::until;
use super::spans::frames;
use super::streams::{LONG, request, tar};
use crate::fetch::{FetchError, LayerData};
use crate::registry::Origin;

/// What all answers of a source are.
fn always(blob: &FakeBlob, fault: Option<Fault>) {
    *blob.always.lock().unwrap() = fault;
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_wait_for_a_source_that_is_away_and_go_on_when_it_is_back() {
    let (index, data, bytes) = ranged(&[5000, 200_000]);
    for fault in [Fault::Refused, Fault::Broken(100)] {
        let (bench, blob) = (Bench::new(), FakeBlob::new(bytes.clone()));
        let (_, layer) = bench.open("layer", index.clone(), &blob);
        always(&blob, Some(fault));
        let mut reads = join_all([(0, 5000), (10_000, 5000)].map(|(at, len)| layer.read(at, len, LONG))).boxed();
        assert!(futures::poll!(&mut reads).is_pending());
        until(|| blob.requests() >= 3).await;
        assert_eq!(bench.metrics.outages.get(), 1);
        assert!(futures::poll!(&mut reads).is_pending());
        always(&blob, None);
        let reads: Vec<_> = reads.await.into_iter().map(Result::unwrap).collect();
        assert!(reads[0][..] == data[..5000] && reads[1][..] == data[10_000..15_000]);
        until(|| bench.metrics.outages.get() == 0).await;
        assert!(bench.metrics.outage_retries_total.get() >= 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_too_long_gets_an_error_and_leaves_no_outage() {
    let (index, _, bytes) = ranged(&[5000]);
    let (bench, blob) = (Bench::new(), FakeBlob::new(bytes));
    let (_, layer) = bench.open("layer", index, &blob);
    always(&blob, Some(Fault::Refused));
    let error = layer.read(0, 10, Duration::from_millis(300)).await.unwrap_err();
    assert!(matches!(error, FetchError::Deadline { .. }), "{error}");
    until(|| bench.metrics.outages.get() == 0).await;
    until(|| bench.fetcher.scheduler().counts() == (0, 0)).await;
    // Nobody asks any more.
    let asked = blob.requests();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(blob.requests(), asked);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_is_away_is_asked_by_one_at_a_time_and_by_none_who_has_another() {
    const LAYERS: usize = 12;
    let (index, data, bytes) = ranged(&[5000]);
    let bench = Bench::new();
    let layers: Vec<_> = (0..LAYERS)
        .map(|at| {
            let blob = FakeBlob::at(Origin::new("away.example", &format!("repo{at}")), bytes.clone());
            always(&blob, Some(Fault::Refused));
            let (_, layer) = bench.open(&format!("layer {at}"), index.clone(), &blob);
            (blob, layer)
        })
        .collect();
    let mut reads = join_all(layers.iter().map(|(_, layer)| layer.read(0, 10, LONG))).boxed();
    assert!(futures::poll!(&mut reads).is_pending());
    let requests = || layers.iter().map(|(blob, _)| blob.requests()).sum::<usize>();
    until(|| requests() >= LAYERS + 2).await;
    // Every layer has found out for itself, and from then on one asks for all. (Asking at once they would be thousands by now.)
    let most = layers.iter().map(|(blob, _)| blob.requests()).max().unwrap();
    assert!(requests() <= LAYERS + 4 && most <= 3, "{} {most}", requests());
    // A layer that gets another source does not wait for this one.
    let good = FakeBlob::new(bytes.clone());
    layers[LAYERS - 1].1.set_blob(good.clone());
    until(|| good.requests() == 1).await;
    // One answer of the host is enough for all.
    let before = requests();
    for (blob, _) in &layers {
        always(blob, None);
    }
    for read in reads.await {
        assert!(read.unwrap()[..] == data[..10]);
    }
    assert_eq!(requests(), before + LAYERS - 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn trouble_with_one_blob_is_no_trouble_of_others() {
    let (index, data, bytes) = ranged(&[5000]);
    let bench = Bench::new();
    let (bad, good) = (FakeBlob::new(bytes.clone()), FakeBlob::new(bytes));
    always(&bad, Some(Fault::Silent));
    let (_, first) = bench.open("first", index.clone(), &bad);
    let mut stuck = first.read(0, 10, LONG);
    assert!(futures::poll!(&mut stuck).is_pending());
    until(|| bad.requests() == 1).await;
    // It has failed before, and holds the turn now.
    let away = FetchError::Deadline {
        layer: *first.digest(),
        after: LONG,
    };
    let outage = bench
        .fetcher
        .outages
        .failed(&crate::registry::Blob::origin(&*bad), &away);
    let _turn = outage.turn().await.unwrap();
    let (_, second) = bench.open("second", index, &good);
    assert!(second.read(0, 10, LONG).await.unwrap()[..] == data[..10]);
    until(|| outage.is_over()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_of_a_layer_that_is_streamed_again_wait_too() {
    let tar = tar(&[3 << 20]);
    let bytes = zstd::encode_all(&tar[..], 1).unwrap();
    for rangeless in [false, true] {
        let bytes = if rangeless { frames(&tar) } else { bytes.clone() };
        let (bench, blob) = (Bench::new(), FakeBlob::new(bytes.clone()));
        let cached = bench.fetcher.stream(request(&blob, &bytes, &tar)).await.unwrap();
        let layer = bench.fetcher.open(Arc::clone(&cached), blob.clone());
        cached.evict_all();
        blob.rangeless.store(rangeless, Ordering::Relaxed);
        always(&blob, Some(Fault::Refused));
        let before = blob.requests();
        let mut read = layer.read(3 << 20, 10, LONG);
        assert!(futures::poll!(&mut read).is_pending());
        until(|| blob.requests() >= before + 2).await;
        assert!(futures::poll!(&mut read).is_pending());
        always(&blob, None);
        assert!(read.await.unwrap()[..] == tar[3 << 20..(3 << 20) + 10], "{rangeless}");
        // What nobody waits for any more is not streamed for.
        cached.evict_all();
        always(&blob, Some(Fault::Refused));
        let error = layer.read(0, 10, Duration::from_millis(300)).await.unwrap_err();
        assert!(matches!(error, FetchError::Deadline { .. }), "{error}");
        until(|| bench.metrics.outages.get() == 0).await;
    }
}
