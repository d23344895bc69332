//! Layers that become whole while nobody waits for anything.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::FutureExt;

use super::fake::{Bench, FakeBlob, Fault, ranged};
use super::flights::until;
use super::streams::LONG;
use crate::config::FetchConfig;
use crate::fetch::LayerData;
use crate::fetch::schedule::{Class, Kind, Wish};
use crate::registry::{Blob, Origin};

/// Sizes of chunks that make several pieces.
const SIZES: [usize; 40] = [150_000; 40];

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_becomes_whole_and_nothing_is_fetched_twice() {
    let (index, data, bytes) = ranged(&SIZES);
    let (bench, blob) = (Bench::new(), FakeBlob::new(bytes.clone()));
    let (cached, layer) = bench.open("layer", index, &blob);
    layer.read(1_000_000, 10, LONG).await.unwrap();
    assert!(layer.can_be_filled());
    let filled = layer.fill_up().await;
    assert!(filled.whole && layer.is_local() && !layer.can_be_filled(), "{filled:?}");
    let mut asked = blob.asked.lock().unwrap().clone();
    assert!(asked.len() > 3, "in pieces: {asked:?}");
    asked.sort_by_key(|range| range.start);
    assert!(asked.windows(2).all(|pair| pair[0].end <= pair[1].start), "{asked:?}");
    let all: u64 = asked.iter().map(|range| range.end - range.start).sum();
    assert_eq!(all, (bytes.len() - "head".len() - "tail".len()) as u64);
    assert_eq!(bench.metrics.filled_bytes_total.get(), filled.bytes);
    let mut buf = vec![0; data.len()];
    cached.read_ready(0, &mut buf).unwrap().unwrap();
    assert!(buf == data);
    let again = layer.fill_up().await;
    assert!(again.whole && again.bytes == 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_does_not_deliver_is_left_alone() {
    let (index, _, bytes) = ranged(&SIZES);
    let (bench, blob) = (Bench::new(), FakeBlob::new(bytes));
    let (_, layer) = bench.open("layer", index, &blob);
    *blob.always.lock().unwrap() = Some(Fault::Missing);
    let filled = layer.fill_up().await;
    assert!(!filled.whole && filled.bytes == 0);
    assert!(blob.requests() <= 2, "the pieces that were under way, and no more");
    // What it has brought until it failed stays, and the rest comes the next time.
    *blob.always.lock().unwrap() = None;
    blob.fail([Fault::Broken(500_000)]);
    let mut filled = layer.fill_up().await;
    while !filled.whole {
        filled = layer.fill_up().await;
    }
    assert!(layer.is_local());
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_wants_anything_comes_first() {
    let (index, data, bytes) = ranged(&SIZES);
    let (bench, blob) = (Bench::new(), FakeBlob::new(bytes));
    let (_, layer) = bench.open("layer", index, &blob);
    let other = FakeBlob::new(vec![0; 10]);
    let wish = Wish {
        owner: other.origin(),
        class: Class::Demand,
        kind: Kind::Request,
        bytes: 0,
        deadline: Duration::ZERO,
    };
    let place = bench.fetcher.scheduler().enter(wish).await;
    let filling = tokio::spawn({
        let layer = Arc::clone(&layer);
        async move { layer.fill_up().await }
    });
    // A reader of the very layer has to wait for nothing, and what he waits for is all that is fetched.
    let read = layer.read(0, 1000, LONG).await.unwrap();
    assert!(read[..] == data[..1000]);
    // Time in which it would have begun.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(bench.metrics.filled_bytes_total.get() == 0 && !filling.is_finished());
    assert_eq!(blob.requests(), 1);
    drop(place);
    assert!(filling.await.unwrap().whole);
}

/// Its readers wait for a host that is away: that takes nothing from anybody else.
#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_a_host_that_is_away_keeps_no_other_layer_from_being_filled() {
    let (index, _, bytes) = ranged(&SIZES);
    let bench = Bench::new();
    let away = FakeBlob::at(Origin::new("away.example", "repo"), bytes.clone());
    // It is asked once more, and does not answer.
    away.fail([Fault::Refused]);
    *away.always.lock().unwrap() = Some(Fault::Silent);
    let (_, hanging) = bench.open("away", index.clone(), &away);
    let reader = tokio::spawn({
        let hanging = Arc::clone(&hanging);
        async move { hanging.read(0, 1000, LONG).await }
    });
    until(|| away.requests() >= 2).await;
    assert_eq!(bench.metrics.outages.get(), 1);
    let blob = FakeBlob::new(bytes);
    let (_, layer) = bench.open("layer", index, &blob);
    let filled = tokio::time::timeout(LONG / 4, layer.fill_up()).await;
    assert!(
        filled.is_ok_and(|filled| filled.whole),
        "a reader who can have nothing keeps the node busy"
    );
    assert!(!reader.is_finished());
    hanging.close();
    assert!(reader.await.unwrap().is_err());
}

/// Other layers come after it.
#[tokio::test(flavor = "multi_thread")]
async fn a_layer_for_which_there_is_no_place_is_given_up() {
    let (index, _, bytes) = ranged(&SIZES);
    let config = FetchConfig {
        read_deadline: Duration::from_secs(1),
        ..FetchConfig::default()
    };
    let (bench, blob) = (Bench::with(0, config), FakeBlob::new(bytes));
    let (_, layer) = bench.open("layer", index, &blob);
    // All places that background work has at this host.
    let mut held = Vec::new();
    loop {
        let wish = Wish {
            owner: blob.origin(),
            class: Class::Background,
            kind: Kind::Request,
            bytes: 0,
            deadline: Duration::ZERO,
        };
        match bench.fetcher.scheduler().enter(wish).now_or_never() {
            Some(place) => held.push(place),
            None => break,
        }
    }
    assert!(!layer.fill_up().await.whole);
    assert_eq!(blob.requests(), 0);
    held.clear();
    assert!(layer.fill_up().await.whole);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_closed_is_not_filled_any_more() {
    let (index, _, bytes) = ranged(&SIZES);
    let (bench, blob) = (Bench::new(), FakeBlob::new(bytes));
    let (_, layer) = bench.open("layer", index, &blob);
    blob.flowing.send_replace(false);
    let filling = tokio::spawn({
        let layer = Arc::clone(&layer);
        async move { layer.fill_up().await }
    });
    while blob.underway.load(Ordering::Relaxed) == 0 {
        tokio::task::yield_now().await;
    }
    layer.close();
    assert!(!filling.await.unwrap().whole);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_gives_way_to_it() {
    let (index, _, bytes) = ranged(&SIZES);
    let total = bytes.len() as u64;
    // Room for it and its files, but not while another layer that is used has its bytes.
    let (other, _, other_bytes) = ranged(&[400_000, 400_000]);
    let bench = Bench::with(total + (256 << 10), FetchConfig::default());
    let used = FakeBlob::new(other_bytes);
    let (other_cached, used) = bench.open("used", other, &used);
    let pin = other_cached.pin();
    used.read(0, 800_000, LONG).await.unwrap();
    let blob = FakeBlob::new(bytes);
    let (cached, layer) = bench.open("layer", index, &blob);
    let _pin = cached.pin();
    let filled = layer.fill_up().await;
    assert!(!filled.whole && filled.bytes > 0, "{filled:?}");
    assert!(used.is_local(), "bytes that a container uses gave way");
    assert_eq!(bench.metrics.cache_evicted_bytes_total.get(), 0);
    // What nobody uses does.
    drop((pin, used, other_cached));
    assert!(layer.fill_up().await.whole);
}
