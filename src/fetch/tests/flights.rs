//! Streams that somebody gives up, whose source brings nothing, or that are told to wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;

use super::fake::{Bench, FakeBlob, Fault};
use super::streams::{LONG, assert_clean, request, tar};
use crate::fetch::flights::Wishes;
use crate::fetch::pipeline::{self, Resources, Sink};
use crate::fetch::schedule::Class;
use crate::fetch::{FetchError, Paused, STALL};
use crate::layer::Digest;
use crate::registry::{Blob, Origin};

/// Waits until something is so.
pub(super) async fn until(mut so: impl FnMut() -> bool) {
    let wait = async {
        while !so() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(LONG, wait).await.expect("it comes to that");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_nobody_waits_for_ends_and_leaves_nothing() {
    let tar = tar(&[900_000]);
    let (bench, blob) = (Bench::new(), FakeBlob::new(tar.clone()));
    blob.flowing.send_replace(false);
    let asks = || {
        let (fetcher, request) = (Arc::clone(&bench.fetcher), request(&blob, &tar, &tar));
        Box::pin(async move { fetcher.stream(request).await })
    };
    let first = tokio::spawn(asks());
    until(|| blob.requests() == 1).await;
    let mut second = asks();
    assert!(futures::poll!(&mut second).is_pending(), "it joins the first one");
    first.abort();
    let _ = first.await;
    assert!(bench.fetcher.progress(&Digest::of(&tar)).is_some(), "one still waits");
    drop(second);
    assert!(
        bench.fetcher.progress(&Digest::of(&tar)).is_none(),
        "nobody joins it any more"
    );
    until(|| blob.underway.load(Ordering::Relaxed) == 0).await;
    until(|| bench.fetcher.scheduler().counts() == (0, 0)).await;
    let incoming = bench.dir.path().join("layers/.incoming");
    until(|| std::fs::read_dir(&incoming).unwrap().count() == 0).await;
    until(|| bench.fetcher.memory().held() + bench.fetcher.pieces.held() == 0).await;
    assert_clean(&bench);
    // Who asks later gets a new one. (Where it is slow, it may try further connections.)
    let before = blob.requests();
    blob.flowing.send_replace(true);
    asks().await.unwrap();
    assert!(blob.requests() > before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_brings_nothing_does_not_hold_those_who_have_another() {
    let tar = tar(&[900_000]);
    let bench = Bench::new();
    let hung = FakeBlob::at(Origin::new("hung.example", "repo"), tar.clone());
    let good = FakeBlob::new(tar.clone());
    hung.flowing.send_replace(false);
    let ask = |blob: &Arc<FakeBlob>| {
        let (fetcher, request) = (Arc::clone(&bench.fetcher), request(blob, &tar, &tar));
        tokio::spawn(async move { fetcher.stream(request).await })
    };
    let first = ask(&hung);
    until(|| hung.requests() == 1).await;
    let second = ask(&good).await.unwrap().unwrap();
    let first = first.await.unwrap().unwrap();
    assert!(Arc::ptr_eq(&first, &second), "the first to finish answers all");
    until(|| hung.underway.load(Ordering::Relaxed) == 0).await;
    until(|| bench.fetcher.scheduler().counts() == (0, 0)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_moves_or_is_paused_is_not_passed_by() {
    let tar = tar(&[900_000]);
    let bench = Bench::new();
    let slow = FakeBlob::at(Origin::new("slow.example", "repo"), tar.clone());
    let other = FakeBlob::new(tar.clone());
    slow.flowing.send_replace(false);
    let ask = |blob: &Arc<FakeBlob>| {
        let (fetcher, request) = (Arc::clone(&bench.fetcher), request(blob, &tar, &tar));
        tokio::spawn(async move { fetcher.stream(request).await })
    };
    let first = ask(&slow);
    until(|| slow.requests() == 1).await;
    let progress = bench.fetcher.progress(&Digest::of(&tar)).unwrap();
    let paused = Paused::new(progress);
    let second = ask(&other);
    tokio::time::sleep(STALL * 2).await;
    assert_eq!(other.requests(), 0);
    slow.flowing.send_replace(true);
    drop(paused);
    let (first, second) = (first.await.unwrap().unwrap(), second.await.unwrap().unwrap());
    assert!(Arc::ptr_eq(&first, &second));
}

#[tokio::test(flavor = "multi_thread")]
async fn when_a_source_fails_those_who_have_another_use_it() {
    let tar = tar(&[900_000]);
    let bench = Bench::new();
    let bad = FakeBlob::at(Origin::new("bad.example", "repo"), tar.clone());
    let good = FakeBlob::new(tar.clone());
    bad.fail([Fault::Broken(300_000)]);
    bad.flowing.send_replace(false);
    let (fetcher, first) = (Arc::clone(&bench.fetcher), request(&bad, &tar, &tar));
    let first = tokio::spawn(async move { fetcher.stream(first).await });
    until(|| bad.requests() == 1).await;
    let mut second = Box::pin(bench.fetcher.stream(request(&good, &tar, &tar)));
    assert!(futures::poll!(&mut second).is_pending());
    assert_eq!(good.requests(), 0);
    bad.flowing.send_replace(true);
    second.await.unwrap();
    // It was told of its own source, or of the other if that was faster.
    let first = first.await.unwrap();
    assert!(matches!(first, Ok(_) | Err(FetchError::Source { .. })));
    assert_eq!(good.requests(), 1);
}

struct Nothing;

impl Sink for Nothing {
    fn push(&mut self, _: &[u8]) -> Result<(), pipeline::Fault> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_stream_takes_nothing_and_its_source_may_be_silent() {
    let tar = tar(&[900_000]);
    let blob = FakeBlob::new(tar.clone());
    blob.flowing.send_replace(false);
    let arrived = Arc::new(AtomicU64::new(0));
    let (switch, wishes) = watch::channel(Wishes { pauses: 1, waits: 0 });
    let patience = Duration::from_millis(50);
    let count = Arc::clone(&arrived);
    let bench = Bench::new();
    let counted = move |bytes| {
        count.fetch_add(bytes, Ordering::Relaxed);
    };
    let resources = Resources {
        patience,
        ..bench
            .fetcher
            .resources(blob.origin.clone(), Class::Prefetch, wishes, counted)
    };
    let (source, digest): (Arc<dyn Blob>, _) = (blob.clone(), Digest::of(&tar));
    let stream = tokio::spawn(async move { pipeline::run(&source, digest, Nothing, resources).await.map(|_| ()) });
    tokio::time::sleep(patience * 5).await;
    blob.flowing.send_replace(true);
    tokio::time::sleep(patience).await;
    assert_eq!(arrived.load(Ordering::Relaxed), 0);
    switch.send_replace(Wishes::default());
    stream.await.unwrap().unwrap();
    assert_eq!(arrived.load(Ordering::Relaxed), tar.len() as u64);
}
