//! Answers to ranges as servers give them, and hosts that have none: what can be told is taken, and what cannot costs one blob, never an error.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use lazuli::cache::Cache;
use lazuli::catalog::loader::{Asked, LayerSpec, Loaded, Loader};
use lazuli::config::{ByteSize, CacheConfig, FetchConfig, FormatsConfig, MemoryConfig};
use lazuli::fetch::{Fetcher, LayerData};
use lazuli::layer::Digest;
use lazuli::metrics::Metrics;
use lazuli::registry::{Blob, RegistryError};
use lazuli::sync::Budget;

use crate::support::fault_registry::{Fault, FaultRegistry, Odd, OddBody, On};
use crate::support::lazy::{self, Lazy};
use crate::support::tar::noise;
use crate::{Fixture, config, read, source};

const ALWAYS: usize = usize::MAX;
/// Longest wait for a read.
const DEADLINE: Duration = Duration::from_secs(30);

/// The usual head of a part.
const RANGE: (&str, &str) = ("content-range", "bytes {start}-{last}/{size}");

fn with_range(odd: Odd) -> Odd {
    odd.with(RANGE.0, RANGE.1)
}

/// Answers each of which holds what was asked for, however it is said, and the number of requests that it takes.
fn tellable() -> Vec<(&'static str, Odd, usize)> {
    let part = || Odd::partial(OddBody::Asked);
    let mut answers = vec![
        ("no head", part(), 1),
        ("no head, no length", part().unsized_(), 1),
        ("no length", with_range(part().unsized_()), 1),
        ("200 with a head", with_range(Odd::full(OddBody::Asked)), 1),
        (
            "200 with a head, no length",
            with_range(Odd::full(OddBody::Asked).unsized_()),
            1,
        ),
        ("200 with the length asked for", Odd::full(OddBody::Asked), 1),
        (
            "206 with everything",
            Odd::partial(OddBody::Whole).with("content-range", "bytes 0-299999/{size}"),
            1,
        ),
        ("206 with everything, no head", Odd::partial(OddBody::Whole), 1),
        (
            "206 with everything, the head asked for",
            with_range(Odd::partial(OddBody::Whole)),
            1,
        ),
        (
            "206 that begins earlier",
            Odd::partial(OddBody::Earlier(100)).with("content-range", "bytes 900-{last}/{size}"),
            1,
        ),
        (
            "203 with everything",
            Odd {
                status: 203,
                ..Odd::full(OddBody::Whole)
            },
            1,
        ),
        (
            "200 with everything, no length",
            Odd::full(OddBody::Whole).unsized_(),
            1,
        ),
        (
            "200 with everything and its head",
            Odd::full(OddBody::Whole).with("content-range", "bytes 0-299999/{size}"),
            1,
        ),
        (
            "one part of several",
            Odd::partial(OddBody::Multipart).with("content-type", "multipart/byteranges; boundary=THE_BOUNDARY"),
            1,
        ),
        ("two heads", with_range(part().with("content-range", "what?")), 1),
        (
            "416",
            Odd {
                status: 416,
                ..Odd::full(OddBody::Empty)
            },
            2,
        ),
        (
            "416 with the size",
            Odd {
                status: 416,
                ..Odd::full(OddBody::Empty)
            }
            .with("content-range", "bytes */{size}"),
            2,
        ),
        ("another part", part().with("content-range", "bytes 0-99/{size}"), 2),
        ("too long for a part", Odd::partial(OddBody::Earlier(100)), 2),
        (
            "several parts that are none",
            Odd::partial(OddBody::Asked).with("content-type", "multipart/byteranges"),
            2,
        ),
    ];
    for spelling in [
        "Bytes {start}-{last}/{size}",
        "bytes={start}-{last}/{size}",
        "bytes: {start}-{last}/{size}",
        "{start}-{last}/{size}",
        "bytes {start}-{last}",
        "bytes {start} - {last} / {size}",
        "bytes {start}-{last}/*",
        "bytes {start}-{last}/999",
        "nonsense",
    ] {
        answers.push((spelling, part().with("content-range", spelling), 1));
    }
    answers
}

#[tokio::test]
async fn what_can_be_told_of_an_answer_to_a_range_is_taken() {
    for (name, odd, requests) in tellable() {
        let f = Fixture::new().await;
        f.registry.fail(On::Blob, 1, Fault::Odd(odd));
        let bytes = tokio::time::timeout(DEADLINE, read(&f.blob, 1000..200_000))
            .await
            .unwrap();
        let bytes = bytes.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(bytes == f.bytes[1000..200_000], "{name}: wrong bytes");
        assert_eq!(f.registry.seen(On::Blob).len(), requests, "{name}");
    }
}

#[tokio::test]
async fn an_answer_that_is_shorter_than_asked_costs_no_attempt() {
    for odd in [
        with_short(Odd::partial(OddBody::First(10_000))),
        // Not even a head: it is what was asked for, as far as it goes.
        Odd::partial(OddBody::First(10_000)),
    ] {
        let f = Fixture::new().await;
        f.registry.fail(On::Blob, ALWAYS, Fault::Odd(odd));
        // Far more answers than there are attempts.
        f.good(5, 100_005).await;
        let ranges = f.ranges(On::Blob);
        assert_eq!(ranges.len(), 10, "{ranges:?}");
        assert_eq!(ranges[9].as_deref(), Some("bytes=90005-100004"));
    }
}

/// A head that states more than comes, as its length shows.
fn with_short(odd: Odd) -> Odd {
    odd.with("content-range", "bytes {start}-{last}/{size}")
}

#[tokio::test]
async fn a_416_with_another_size_is_another_blob() {
    let f = Fixture::new().await;
    let odd = Odd {
        status: 416,
        ..Odd::full(OddBody::Empty)
    }
    .with("content-range", "bytes */77");
    f.registry.fail(On::Blob, ALWAYS, Fault::Odd(odd));
    let error = f.error(10, 20).await.to_string();
    assert!(
        error.contains("77 bytes") && error.contains(&f.registry.host()),
        "{error}"
    );
}

#[tokio::test]
async fn a_whole_blob_that_breaks_off_is_resumed_without_ranges() {
    let f = Fixture::new().await;
    f.registry.fail(On::Blob, 1, Fault::Cut(200_000));
    f.registry.fail(On::Blob, 1, Fault::IgnoreRange);
    f.good(0, 300_000).await;
    assert_eq!(f.registry.seen(On::Blob).len(), 2);
}

#[tokio::test]
async fn who_can_do_with_the_whole_is_told_so_and_goes_on_with_what_has_begun() {
    let registry = FaultRegistry::start().await;
    let bytes = noise(1, 4 << 20);
    let digest = registry.add_blob(bytes.clone());
    let source = source(&config(), &registry.host());
    let blob = source.blob(digest, bytes.len() as u64);
    registry.fail(On::Blob, 1, Fault::IgnoreRange);
    let error = blob.read_part(3_000_000..3_100_000).await.err().unwrap();
    assert!(
        matches!(&error, RegistryError::NoRanges { host, .. } if *host == registry.host()),
        "{error}"
    );
    assert!(source.stats().ignores_ranges);
    // It is remembered; and the answer that has begun serves the one who takes all.
    assert!(matches!(
        blob.read_part(0..1000).await.err(),
        Some(RegistryError::NoRanges { .. })
    ));
    assert!(read(&blob, 0..blob.size()).await.unwrap() == bytes);
    assert_eq!(
        (registry.seen(On::Blob).len(), registry.sent()),
        (1, bytes.len() as u64)
    );
    // Nothing is forgotten for good: other blobs have ranges.
    let other = registry.add_blob(noise(2, 1 << 20));
    let other = source.blob(other, 1 << 20);
    assert_eq!(read_part(&other, 5, 10).await.unwrap(), noise(2, 1 << 20)[5..10]);
}

async fn read_part(blob: &Arc<dyn Blob>, start: u64, end: u64) -> Result<Vec<u8>, RegistryError> {
    use futures::TryStreamExt as _;
    let pieces: Vec<bytes::Bytes> = blob.read_part(start..end).await?.try_collect().await?;
    Ok(pieces.concat())
}

/// A machine whose cache is empty.
pub struct Node {
    loader: Loader,
    _root: tempfile::TempDir,
}

impl Node {
    pub fn new() -> Self {
        let (metrics, root) = (Arc::new(Metrics::new()), tempfile::tempdir().unwrap());
        let cache = CacheConfig {
            min_free: ByteSize(0),
            high_percent: 100,
            ..CacheConfig::default()
        };
        let cache = Cache::open(root.path(), &cache, metrics.clone()).unwrap();
        let fetcher = Fetcher::new(
            &FetchConfig::default(),
            Budget::new(MemoryConfig::default().budget.0),
            cache.clone(),
            tokio::runtime::Handle::current(),
            metrics,
        );
        Node {
            loader: Loader::new(cache, fetcher, FormatsConfig::default()),
            _root: root,
        }
    }
}

/// Files of a layer that is large enough for a few requests.
pub fn files() -> Vec<(&'static str, Vec<u8>)> {
    ["one", "two", "three", "four", "five", "six"]
        .into_iter()
        .enumerate()
        .map(|(seed, name)| (name, noise(seed as u64 + 1, 1_000_000)))
        .collect()
}

fn plain() -> Lazy {
    let tar = lazy::estargz(&files()).tar;
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut gzip, &tar).unwrap();
    Lazy {
        blob: gzip.finish().unwrap(),
        tar,
        annotations: BTreeMap::new(),
        media_type: "application/vnd.oci.image.layer.v1.tar+gzip",
    }
}

fn dialects() -> Vec<(&'static str, Lazy)> {
    vec![
        ("plain", plain()),
        ("estargz", lazy::estargz(&files())),
        ("zstd:chunked", lazy::zstd_chunked(&files())),
    ]
}

pub async fn load(node: &Node, registry: &FaultRegistry, layer: &Lazy) -> Loaded {
    let spec = LayerSpec {
        digest: registry.add_blob(layer.blob.clone()),
        size: layer.blob.len() as u64,
        media_type: layer.media_type.to_owned(),
        annotations: layer.annotations.clone(),
        foreign: false,
        diff_id: Some(Digest::of(&layer.tar)),
    };
    let blob = source(&config(), &registry.host()).blob(spec.digest, spec.size);
    let judged = node.loader.alone(&spec);
    node.loader
        .load(&spec, blob, &[], Asked::default(), &judged)
        .await
        .unwrap()
}

/// Reads all files at once, by pieces, from the last to the first.
pub async fn read_all(name: &str, layer: &Arc<lazuli::fetch::Layer>) {
    let names = LayerData::names(&**layer).unwrap();
    let reads = files().into_iter().rev().map(|(file, content)| {
        let inode = *names.inode(names.lookup_path(file.as_bytes()).unwrap()).unwrap();
        assert_eq!(inode.size, content.len() as u64);
        let layer = Arc::clone(layer);
        tokio::spawn(async move {
            for at in (0..content.len()).step_by(250_000) {
                let read = layer.read(inode.data + at as u64, 250_000, DEADLINE).await;
                let read = read.unwrap_or_else(|error| panic!("{file} at {at}: {error}"));
                assert!(read[..] == content[at..at + 250_000], "{file} at {at}");
            }
        })
    });
    for read in reads.collect::<Vec<_>>() {
        read.await.unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

/// Bytes in the life of an image: of a blob, in hundredths.
fn share(registry: &FaultRegistry, layer: &Lazy) -> u64 {
    registry.sent() * 100 / layer.blob.len() as u64
}

/// A pull-through cache that has nothing yet answers every range with the whole.
#[tokio::test(flavor = "multi_thread")]
async fn a_cold_pull_through_cache_costs_one_blob_in_every_dialect() {
    for (name, layer) in dialects() {
        let (registry, node) = (FaultRegistry::start().await, Node::new());
        registry.fail(On::Blob, ALWAYS, Fault::IgnoreRange);
        let loaded = load(&node, &registry, &layer).await;
        if name != "plain" {
            let reason = loaded.streamed.unwrap();
            assert_eq!(reason.word, "ranges", "{name}");
            assert!(reason.text.contains(&registry.host()), "{name}: {}", reason.text);
        }
        read_all(name, &loaded.layer).await;
        let share = share(&registry, &layer);
        assert!(share <= 130, "{name}: {share} % of the blob");
    }
}

/// A cache that forgets a blob while a container reads it.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_loses_its_ranges_under_a_reader_costs_one_blob() {
    for (name, layer) in dialects().into_iter().skip(1) {
        let (registry, node) = (FaultRegistry::start().await, Node::new());
        let loaded = load(&node, &registry, &layer).await;
        assert!(loaded.streamed.is_none(), "{name}");
        registry.fail(On::Blob, ALWAYS, Fault::IgnoreRange);
        // As after a restart, or some seconds later: a blob that was just read in parts is not suspected.
        let loaded = load(&node, &registry, &layer).await;
        read_all(name, &loaded.layer).await;
        assert!(loaded.layer.is_local(), "{name}: what came by is kept");
        let share = share(&registry, &layer);
        assert!(share <= 130, "{name}: {share} % of the blob");
    }
}

/// Whatever a host answers to ranges, no reader of a layer that it has sees an error.
#[tokio::test(flavor = "multi_thread")]
async fn no_answer_to_a_range_is_an_error_for_a_reader() {
    let layer = lazy::estargz(&files());
    let mut answers = tellable();
    answers.push(("short", with_short(Odd::partial(OddBody::First(50_000))), 0));
    answers.push((
        "lies about the part",
        with_range(Odd::partial(OddBody::Bytes(noise(9, 300_000).into()))),
        0,
    ));
    for (answer, odd, _) in answers {
        let (registry, node) = (FaultRegistry::start().await, Node::new());
        let loaded = load(&node, &registry, &layer).await;
        registry.fail(On::Blob, ALWAYS, Fault::Odd(odd));
        read_all(answer, &loaded.layer).await;
    }
}
