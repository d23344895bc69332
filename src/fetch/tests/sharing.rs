//! What the readers, images and hosts of one node have of each other.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;

use super::fake::{Bench, FakeBlob, MEMORY, ranged, ranged_from};
use super::flights::until;
use super::streams::LONG;
use crate::config::{ByteSize, FetchConfig};
use crate::fetch::LayerData;
use crate::layer::index::{IndexParts, MAX_CHUNK_LEN};
use crate::layer::{Chunk, Codec, Digest, LayerIndex};
use crate::registry::{Blob, Body, ManifestBytes, Origin, RegistryError, Source, SourceStats};

fn config(places: usize) -> FetchConfig {
    FetchConfig {
        max_concurrent_requests: places,
        // No two chunks in one request.
        max_request: ByteSize(64 << 10),
        ..FetchConfig::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn prefetch_leaves_a_place_to_demand_and_a_reader_who_joins_takes_none_of_its_own() {
    let (index, data, bytes) = ranged(&[40_000; 24]);
    let (bench, blob) = (Bench::with(0, config(4)), FakeBlob::new(bytes));
    let (cached, layer) = bench.open("layer", index, &blob);
    blob.flowing.send_replace(false);
    layer.prefetch(0, data.len() as u64);
    until(|| blob.requests() == 2).await;
    // Of a repository's three places, one is kept for demand.
    let mut reader = layer.read(data.len() as u64 - 1000, 10, LONG);
    assert!(futures::poll!(&mut reader).is_pending());
    until(|| blob.requests() == 3).await;
    assert_eq!(
        blob.asked.lock().unwrap()[2].start,
        layer.index().chunks().get(23).unwrap().blob_offset
    );
    // Somebody waits for the first chunk now: it is fetched for demand from now on, and prefetch has a place more.
    drop(reader);
    let mut joins = layer.read(0, 10, LONG);
    assert!(futures::poll!(&mut joins).is_pending());
    blob.flowing.send_replace(true);
    assert_eq!(joins.await.unwrap()[..], data[..10]);
    until(|| cached.is_complete()).await;
    assert_eq!(blob.requests(), 24);
    until(|| bench.fetcher.scheduler().counts() == (0, 0)).await;
    until(|| bench.fetcher.requests.held() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_somebody_joins_leaves_its_place_in_the_old_class() {
    let (index, data, bytes) = ranged(&[40_000; 24]);
    let (bench, blob) = (Bench::with(0, config(4)), FakeBlob::new(bytes));
    let (_, layer) = bench.open("layer", index, &blob);
    blob.flowing.send_replace(false);
    layer.prefetch(0, data.len() as u64);
    until(|| blob.requests() == 2).await;
    let mut joins = layer.read(0, 10, LONG);
    assert!(futures::poll!(&mut joins).is_pending());
    until(|| blob.requests() == 3).await;
    // Nobody waits any more: what is under way goes on.
    drop(joins);
    blob.flowing.send_replace(true);
    assert_eq!(layer.read(0, 10, LONG).await.unwrap()[..], data[..10]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_or_an_image_that_hangs_holds_only_its_own_places() {
    let bench = Bench::with(0, config(16));
    let origins = [
        Origin::new("hung.example", "image"),
        Origin::new("hung.example", "another"),
        Origin::new("good.example", "image"),
    ];
    let mut layers = Vec::new();
    for (at, origin) in origins.into_iter().enumerate() {
        let (index, data, bytes) = ranged(&[300_000; 24]);
        let blob = FakeBlob::at(origin, bytes);
        let (_, layer) = bench.open(&format!("layer {at}"), index, &blob);
        layers.push((layer, data, blob));
    }
    let (hung, data, blob) = &layers[0];
    blob.flowing.send_replace(false);
    let readers: Vec<_> = hung
        .index()
        .chunks()
        .iter()
        .map(|chunk| tokio::spawn(hung.read(chunk.data_offset, 10, LONG)))
        .collect();
    until(|| blob.requests() == 12).await;
    for (layer, data, _) in &layers[1..] {
        assert_eq!(
            layer.read(2_000_000, 10, LONG).await.unwrap()[..],
            data[2_000_000..2_000_010]
        );
    }
    blob.flowing.send_replace(true);
    for (reader, chunk) in readers.into_iter().zip(hung.index().chunks().iter()) {
        let at = chunk.data_offset as usize;
        assert_eq!(
            reader.await.unwrap().unwrap()[..],
            data[at..at + 10],
            "they go on when it answers again"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn read_ahead_is_accounted_apart_and_comes_later_where_others_wait() {
    let config = FetchConfig {
        max_concurrent_requests: 1,
        ..FetchConfig::default()
    };
    let bench = Bench::with(0, config);
    let open = |name: &str, seed: u64| {
        let (index, data, bytes) = ranged_from(seed, &[40_000; 10]);
        let blob = FakeBlob::new(bytes);
        let (cached, layer) = bench.open(name, index, &blob);
        (cached, layer, data, blob)
    };
    let count = |kind: &str| {
        let fetches = bench.metrics.fetches_total.with_label_values(&[kind]).get();
        (
            fetches,
            bench.metrics.fetched_bytes_total.with_label_values(&[kind]).get(),
        )
    };
    let first = open("first", 100);
    first.3.flowing.send_replace(false);
    let mut holds = first.1.read(0, 10, LONG);
    assert!(futures::poll!(&mut holds).is_pending());
    until(|| first.3.requests() == 1).await;
    let (second, third) = (open("second", 200), open("third", 300));
    let (mut waits, mut waits_too) = (second.1.read(0, 10, LONG), third.1.read(0, 10, LONG));
    assert!(futures::poll!(&mut waits).is_pending() && futures::poll!(&mut waits_too).is_pending());
    until(|| bench.fetcher.scheduler().counts() == (2, 1)).await;
    first.3.flowing.send_replace(true);
    holds.await.unwrap();
    assert_eq!(first.3.requests(), 1, "nobody waited: all of it travelled together");
    let (got, got_too) = tokio::join!(waits, waits_too);
    assert_eq!(
        (got.unwrap()[..].to_vec(), got_too.unwrap()[..].to_vec()),
        (second.2[..10].to_vec(), third.2[..10].to_vec())
    );
    until(|| [&first, &second, &third].iter().all(|layer| layer.0.is_complete())).await;
    // One of the two was let in while the other waited.
    let wanted = [&first, &second, &third].map(|layer| {
        let chunk = layer.1.index().chunks().get(0).unwrap();
        chunk.blob_offset..chunk.blob_end()
    });
    let asked = [
        second.3.asked.lock().unwrap().clone(),
        third.3.asked.lock().unwrap().clone(),
    ];
    assert!(
        (asked.iter().zip(&wanted[1..])).any(|(ranges, wanted)| ranges[0] == *wanted && ranges.len() == 2),
        "{asked:?}"
    );
    until(|| count("readahead").0 == 1).await;
    let (demand, ahead) = (count("demand"), count("readahead"));
    assert_eq!(
        (demand.0, demand.1),
        (3, wanted.iter().map(|wanted| wanted.end - wanted.start).sum())
    );
    assert!(ahead.1 > 20 * 40_000, "{ahead:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_reader_left_sinks_to_the_background() {
    let config = FetchConfig {
        max_concurrent_requests: 1,
        ..FetchConfig::default()
    };
    let bench = Bench::with(0, config);
    let open = |name: &str| {
        let (index, data, bytes) = ranged(&[40_000]);
        let blob = FakeBlob::new(bytes);
        let (cached, layer) = bench.open(name, index, &blob);
        (cached, layer, data, blob)
    };
    let (first, left, stays) = (open("first"), open("left"), open("stays"));
    first.3.flowing.send_replace(false);
    let mut holds = first.1.read(0, 10, LONG);
    assert!(futures::poll!(&mut holds).is_pending());
    until(|| first.3.requests() == 1).await;
    let result = left.1.read(0, 10, Duration::from_millis(1)).await;
    assert!(result.is_err());
    let mut waits = stays.1.read(0, 10, LONG);
    stays.3.flowing.send_replace(false);
    assert!(futures::poll!(&mut waits).is_pending());
    // What has gone has asked twice: while somebody waited, and behind everybody.
    until(|| bench.fetcher.scheduler().counts().0 >= 3).await;
    first.3.flowing.send_replace(true);
    until(|| stays.3.requests() == 1).await;
    assert_eq!(left.3.requests(), 0, "it asked first, and has gone");
    stays.3.flowing.send_replace(true);
    until(|| left.0.is_complete()).await;
    assert_eq!(bench.metrics.fetches_total.with_label_values(&["background"]).get(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_take_places_and_give_them_back() {
    let bench = Bench::with(0, config(1));
    let blob = FakeBlob::new(vec![7; 1000]);
    let scheduled = bench
        .fetcher
        .scheduled(blob.clone(), crate::fetch::schedule::Class::Demand);
    assert_eq!((scheduled.size(), scheduled.origin()), (1000, blob.origin.clone()));
    let body = scheduled.read(0..10).await.unwrap();
    assert_eq!(bench.fetcher.scheduler().counts(), (0, 1));
    let mut second = scheduled.read(0..10);
    assert!(futures::poll!(&mut second).is_pending());
    assert_eq!(blob.requests(), 1);
    drop(body);
    drop(second.await.unwrap());
    assert_eq!(bench.fetcher.scheduler().counts(), (0, 0));
}

/// A repository that has nothing.
struct Empty;

impl Source for Empty {
    fn manifest<'a>(&'a self, reference: &'a str) -> BoxFuture<'a, Result<ManifestBytes, RegistryError>> {
        let what = reference.to_owned();
        Box::pin(async move {
            Err(RegistryError::NotFound {
                host: "h".to_owned(),
                what,
            })
        })
    }
    fn blob(&self, _: Digest, size: u64) -> Arc<dyn Blob> {
        FakeBlob::new(vec![0; size as usize])
    }
    fn read_small(&self, digest: Digest, _: u64, _: u64) -> BoxFuture<'_, Result<Bytes, RegistryError>> {
        let what = digest.to_string();
        Box::pin(async move {
            Err(RegistryError::NotFound {
                host: "h".to_owned(),
                what,
            })
        })
    }
    fn describe(&self) -> String {
        "empty".to_owned()
    }
    fn stats(&self) -> SourceStats {
        SourceStats::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_of_repositories_wait_for_their_turn() {
    let bench = Bench::with(0, config(1));
    let class = crate::fetch::schedule::Class::Demand;
    let busy = bench.fetcher.scheduled(FakeBlob::new(vec![7; 1000]), class);
    let source = bench.fetcher.scheduled_source(Arc::new(Empty), busy.origin(), class);
    let digest = Digest::of(b"");
    let body = busy.read(0..10).await.unwrap();
    let (mut manifest, mut small) = (source.manifest("1"), source.read_small(digest, 0, 0));
    let (mut referrers, mut tags) = (source.referrers(digest, ""), source.tags());
    let waiting = [
        futures::poll!(&mut manifest).is_pending(),
        futures::poll!(&mut small).is_pending(),
        futures::poll!(&mut referrers).is_pending(),
        futures::poll!(&mut tags).is_pending(),
    ];
    assert_eq!(waiting, [true; 4]);
    drop(body);
    let (manifest, small, referrers, tags) = futures::join!(manifest, small, referrers, tags);
    assert!(manifest.is_err() && small.is_err() && referrers.unwrap().is_empty() && tags.unwrap().is_empty());
    assert_eq!(bench.fetcher.scheduler().counts(), (0, 0));
}

/// Bytes of the spans of [`Zeros`].
const SPAN: u64 = MAX_CHUNK_LEN as u64;

/// A blob of zeros as large as a chunk may be, which arrives in pieces when all who ask at once have asked.
struct Zeros {
    at: usize,
    underway: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
}

struct Leaves(Arc<AtomicUsize>);

impl Drop for Leaves {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Blob for Zeros {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        const PIECE: &[u8] = &[0; 1 << 20];
        let now = self.underway.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        let leaves = Leaves(Arc::clone(&self.underway));
        let pieces = (range.end - range.start) / PIECE.len() as u64;
        let body = futures::stream::iter(0..pieces).then(move |_| {
            let _held = &leaves;
            async {
                tokio::task::yield_now().await;
                Ok(Bytes::from_static(PIECE))
            }
        });
        Box::pin(async move { Ok(body.boxed()) })
    }

    fn size(&self) -> u64 {
        SPAN
    }

    fn describe(&self) -> String {
        "zeros".to_owned()
    }

    fn origin(&self) -> Origin {
        Origin::new(&format!("host{}", self.at % 4), &format!("image{}", self.at))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sixteen_spans_of_64_mib_stay_within_the_budget() {
    // The disk takes none of it.
    let bench = Bench::with_memory(1 << 20, FetchConfig::default(), MEMORY);
    let digest = Digest::of(&vec![0; SPAN as usize]);
    let (index, _, _) = ranged(&[1]);
    let (underway, most) = (Arc::default(), Arc::default());
    let layers: Vec<_> = (0..16)
        .map(|at| {
            let chunk = Chunk {
                data_offset: 0,
                data_len: SPAN as u32,
                blob_offset: 0,
                blob_len: SPAN as u32,
                skip: 0,
                digest,
            };
            let index = LayerIndex::new(IndexParts {
                codec: Codec::None,
                data_size: SPAN,
                blob_size: SPAN,
                chunks: vec![chunk],
                ..index.parts().clone()
            });
            let cached = bench
                .cache
                .insert(&Digest::of(format!("{at}").as_bytes()), index.unwrap());
            let blob = Zeros {
                at,
                underway: Arc::clone(&underway),
                most: Arc::clone(&most),
            };
            bench.fetcher.open(cached.unwrap(), Arc::new(blob))
        })
        .collect();
    let held = Arc::new(AtomicU64::new(0));
    let (fetcher, highest) = (Arc::clone(&bench.fetcher), Arc::clone(&held));
    let watch = tokio::spawn(async move {
        loop {
            highest.fetch_max(fetcher.requests.held(), Ordering::SeqCst);
            tokio::task::yield_now().await;
        }
    });
    let reads = layers.iter().map(|layer| layer.read(SPAN - 10, 10, LONG));
    for read in futures::future::join_all(reads).await {
        assert_eq!(read.unwrap()[..], [0; 10]);
    }
    watch.abort();
    // The span, and as much decoded.
    let each = 2 * SPAN;
    let most = most.load(Ordering::SeqCst) as u64;
    assert!(most * each <= MEMORY, "{most} at once");
    let held = held.load(Ordering::SeqCst);
    assert!(held >= each && held <= bench.fetcher.requests.total(), "{held} bytes");
    until(|| bench.fetcher.requests.held() == 0).await;
}

/// What another layer of the node has is not fetched: neither for a reader, nor ahead, nor with what lies around it.
#[tokio::test(flavor = "multi_thread")]
async fn what_another_layer_has_is_not_fetched_again() {
    let sizes = [40_000, 50_000, 60_000, 70_000];
    let bench = Bench::new();
    let open = |name: &str, changed: Option<usize>| {
        let (index, mut data, mut bytes) = ranged(&sizes);
        let Some(at) = changed else {
            let blob = FakeBlob::new(bytes);
            return (bench.open(name, index, &blob), blob, data);
        };
        // The same files but for one: no member moves, as this one is only compressed anew where it compresses no better.
        let mut parts = index.parts().clone();
        let chunk = &mut parts.chunks[at];
        let (start, len) = (chunk.data_offset as usize, chunk.data_len as usize);
        data[start..start + len].copy_from_slice(&super::fake::noise(99, len));
        let member = super::fake::gzip(&data[start..start + len]);
        let place = bytes.len() as u64;
        chunk.digest = Digest::of(&data[start..start + len]);
        (chunk.blob_offset, chunk.blob_len) = (place, member.len() as u32);
        bytes.extend_from_slice(&member);
        parts.blob_size = bytes.len() as u64;
        let blob = FakeBlob::new(bytes);
        (bench.open(name, LayerIndex::new(parts).unwrap(), &blob), blob, data)
    };
    let ((_, first), _, data) = open("first", None);
    first.read(0, data.len() as u32, LONG).await.unwrap();
    let ((cached, second), blob, data) = open("second", Some(1));
    let read = second.read(0, data.len() as u32, LONG).await.unwrap();
    assert_eq!(read[..], data[..]);
    assert_eq!(blob.requests(), 1);
    let (asked, own) = (
        blob.asked.lock().unwrap()[0].clone(),
        cached.index().chunks().get(1).unwrap(),
    );
    assert_eq!((asked.start, asked.end), (own.blob_offset, own.blob_end()));
    assert_eq!(bench.metrics.cache_shared_bytes_total.get(), 40_000 + 60_000 + 70_000);
    // Ahead of readers as well, to the end.
    let ((cached, third), blob, data) = open("third", None);
    third.prefetch(0, data.len() as u64);
    until(|| cached.is_complete()).await;
    assert_eq!(blob.requests(), 0);
}
