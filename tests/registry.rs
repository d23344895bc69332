//! The registry client against a registry that fails on demand, and against Debian's docker-registry.
//!
//! Reads succeed where they can; where they cannot, the error says why. What was sent is checked in the fault registry's log.

mod support;

#[path = "registry/access.rs"]
mod access;
#[path = "registry/artifacts.rs"]
mod artifacts;
#[path = "registry/downgrades.rs"]
mod downgrades;
#[path = "registry/elsewhere.rs"]
mod elsewhere;
#[path = "registry/encodings.rs"]
mod encodings;
#[path = "registry/files.rs"]
mod files;
#[path = "registry/json.rs"]
mod json;
#[path = "registry/mirrors.rs"]
mod mirrors;
#[path = "registry/proxies.rs"]
mod proxies;
#[path = "registry/ranges.rs"]
mod ranges;
#[path = "registry/real.rs"]
mod real;
#[path = "registry/secrets.rs"]
mod secrets;
#[path = "registry/sources.rs"]
mod sources;
#[path = "registry/tls.rs"]
mod tls;
#[path = "registry/tokens.rs"]
mod tokens;

use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::TryStreamExt;
use lazuli::config::RegistryConfig;
use lazuli::layer::Digest;
use lazuli::metrics::Metrics;
use lazuli::registry::{Blob, Registry, RegistryError, Source, image};
use serde_json::json;
use support::fault_registry::{Auth, Fault, FaultRegistry, On};

const REPOSITORY: &str = "demo/app";

fn config() -> RegistryConfig {
    RegistryConfig {
        config_path: Vec::new(),
        docker_config: Some("/nonexistent/config.json".into()),
        connect_timeout: Duration::from_secs(5),
        idle_timeout: Duration::from_secs(5),
        attempts: 3,
        ..RegistryConfig::default()
    }
}

fn source(config: &RegistryConfig, host: &str) -> Arc<dyn Source> {
    let registry = Registry::new(config, Arc::new(Metrics::new())).unwrap();
    registry.repository(host, REPOSITORY)
}

/// Bytes without a pattern that a mistake in an offset could hide behind.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

async fn read(blob: &Arc<dyn Blob>, range: std::ops::Range<u64>) -> Result<Vec<u8>, RegistryError> {
    let pieces: Vec<Bytes> = blob.read(range).await?.try_collect().await?;
    Ok(pieces.concat())
}

/// A registry with one blob, and a handle on it.
struct Fixture {
    registry: FaultRegistry,
    source: Arc<dyn Source>,
    blob: Arc<dyn Blob>,
    bytes: Vec<u8>,
}

impl Fixture {
    async fn new() -> Self {
        Self::with(config()).await
    }

    async fn with(config: RegistryConfig) -> Self {
        let registry = FaultRegistry::start().await;
        let source = source(&config, &registry.host());
        let bytes = noise(300_000);
        let digest = registry.add_blob(bytes.clone());
        let blob = source.blob(digest, bytes.len() as u64);
        Fixture {
            registry,
            source,
            blob,
            bytes,
        }
    }

    /// Reads a range, and checks its bytes.
    async fn good(&self, start: usize, end: usize) {
        let read = read(&self.blob, start as u64..end as u64).await.unwrap();
        assert!(read == self.bytes[start..end], "bytes {start}..{end} differ");
    }

    async fn error(&self, start: usize, end: usize) -> RegistryError {
        read(&self.blob, start as u64..end as u64).await.unwrap_err()
    }

    fn ranges(&self, on: On) -> Vec<Option<String>> {
        let seen = self.registry.seen(on);
        seen.iter().map(|seen| seen.range().map(str::to_owned)).collect()
    }
}

fn range(text: &str) -> Option<String> {
    Some(format!("bytes={text}"))
}

#[tokio::test]
async fn ranges_and_wholes() {
    let f = Fixture::new().await;
    f.good(0, 300_000).await;
    f.good(0, 1).await;
    f.good(299_999, 300_000).await;
    f.good(1000, 200_000).await;
    f.good(5, 5).await;
    assert_eq!(
        f.ranges(On::Blob),
        [None, range("0-0"), range("299999-299999"), range("1000-199999")]
    );
    for seen in f.registry.seen(On::Blob) {
        assert_eq!(seen.header("accept-encoding"), Some("identity"));
        assert!(seen.header("user-agent").unwrap().starts_with("lazuli/"));
        assert_eq!(seen.ns(), None);
    }
    assert!(matches!(f.error(0, 300_001).await, RegistryError::Image { .. }));
    let stats = f.source.stats();
    assert_eq!((stats.requests, stats.bytes), (4, 300_000 + 1 + 1 + 199_000));
}

#[tokio::test]
async fn one_connection_serves_reads_one_after_another() {
    let f = Fixture::new().await;
    for n in 0..10 {
        f.good(n * 1000, n * 1000 + 40_000).await;
    }
    let mut peers: Vec<_> = f.registry.log().iter().map(|seen| seen.peer).collect();
    peers.dedup();
    assert_eq!(peers.len(), 1, "{peers:?}");
}

#[tokio::test]
async fn server_errors_are_repeated_until_the_attempts_are_used_up() {
    let f = Fixture::new().await;
    f.registry.fail(On::Blob, 2, Fault::Status(500));
    f.good(10, 20).await;
    assert_eq!(f.registry.seen(On::Blob).len(), 3);
    f.registry.fail(On::Blob, 9, Fault::Status(502));
    let error = f.error(10, 20).await;
    assert!(matches!(error, RegistryError::Status { status: 502, .. }), "{error}");
    assert!(error.to_string().contains(&f.registry.host()), "{error}");
    assert!(error.to_string().contains("bytes 10-19"), "{error}");
    assert_eq!(f.registry.seen(On::Blob).len(), 6);
}

#[tokio::test]
async fn a_busy_registry_is_left_alone_as_long_as_it_asks() {
    let f = Fixture::new().await;
    f.registry.fail(On::Blob, 1, Fault::RetryAfter(429, "1".to_owned()));
    let begun = Instant::now();
    f.good(0, 100).await;
    // A lower bound holds on any machine.
    assert!(begun.elapsed() >= Duration::from_secs(1));
    let past = "Sun, 06 Nov 1994 08:49:37 GMT".to_owned();
    f.registry.fail(On::Blob, 1, Fault::RetryAfter(503, past));
    f.good(0, 100).await;
    f.registry.fail(On::Blob, 9, Fault::RetryAfter(429, "0".to_owned()));
    let error = f.error(0, 100).await;
    assert!(matches!(error, RegistryError::Busy { status: 429, .. }), "{error}");
    assert_eq!(
        f.blob.refusals(&f.registry.host()),
        Some(2 + u64::from(config().attempts))
    );
}

#[tokio::test]
async fn whoever_asks_a_registry_knows_that_it_is_asked_too_much() {
    let f = Fixture::new().await;
    let registry = Registry::new(&config(), Arc::new(Metrics::new())).unwrap();
    let (host, bytes) = (f.registry.host(), noise(1000));
    let digest = f.registry.add_blob(bytes.clone());
    let blob = |host: &str, repository| registry.repository(host, repository).blob(digest, 1000);
    let (asked, beside) = (blob(&host, REPOSITORY), blob(&host, "another"));
    f.registry.fail(On::Blob, 1, Fault::RetryAfter(429, "0".to_owned()));
    f.registry.fail(On::Blob, 1, Fault::Status(502));
    assert_eq!(read(&asked, 10..20).await.unwrap(), bytes[10..20]);
    let refusals = (asked.refusals(&host), beside.refusals(&host));
    assert_eq!(refusals, (Some(1), Some(1)), "a fault is no refusal");
    assert_eq!(asked.refusals("elsewhere.example"), None);
    let elsewhere = blob("elsewhere.example", REPOSITORY);
    assert_eq!(elsewhere.refusals("elsewhere.example"), Some(0));
}

#[tokio::test]
async fn definite_answers_are_not_repeated() {
    let f = Fixture::new().await;
    for (status, matches) in [
        (
            404,
            (|e| matches!(e, RegistryError::NotFound { .. })) as fn(&RegistryError) -> bool,
        ),
        (403, |e| matches!(e, RegistryError::Denied { status: 403, .. })),
        (400, |e| matches!(e, RegistryError::Status { status: 400, .. })),
    ] {
        let before = f.registry.seen(On::Blob).len();
        f.registry.fail(On::Blob, 9, Fault::Status(status));
        let error = f.error(0, 9).await;
        assert!(matches(&error) && !error.retry_helps(), "{error}");
        assert_eq!(f.registry.seen(On::Blob).len(), before + 1);
        f.registry.heal();
    }
    let missing = f.source.blob(Digest::of(b"missing"), 9);
    assert!(matches!(
        read(&missing, 0..9).await.unwrap_err(),
        RegistryError::NotFound { .. }
    ));
}

#[tokio::test]
async fn a_cut_body_is_resumed_where_it_broke() {
    let f = Fixture::with(RegistryConfig {
        attempts: 4,
        ..config()
    })
    .await;
    f.registry.fail(On::Blob, 1, Fault::Cut(100_000));
    f.registry.fail(On::Blob, 1, Fault::Cut(50_000));
    f.registry.fail(On::Blob, 1, Fault::Short(20_000));
    f.good(1000, 250_000).await;
    assert_eq!(
        f.ranges(On::Blob),
        [
            range("1000-249999"),
            range("101000-249999"),
            range("151000-249999"),
            range("171000-249999")
        ]
    );
}

#[tokio::test]
async fn a_whole_blob_is_resumed_with_a_range() {
    let f = Fixture::new().await;
    f.registry.fail(On::Blob, 1, Fault::Cut(200_000));
    f.good(0, 300_000).await;
    assert_eq!(f.ranges(On::Blob), [None, range("200000-299999")]);
}

#[tokio::test]
async fn a_body_that_never_gets_anywhere_ends() {
    let f = Fixture::new().await;
    f.registry.fail(On::Blob, 99, Fault::Cut(1000));
    let error = f.error(0, 300_000).await;
    assert!(matches!(error, RegistryError::Unreachable { .. }), "{error}");
    assert_eq!(f.registry.seen(On::Blob).len(), 3);
}

#[tokio::test]
async fn a_body_that_gets_on_may_break_more_often_than_there_are_attempts() {
    let registry = FaultRegistry::start().await;
    let bytes = noise(4 << 20);
    let digest = registry.add_blob(bytes.clone());
    registry.fail(On::Blob, 6, Fault::Cut(500_000));
    let blob = source(&config(), &registry.host()).blob(digest, bytes.len() as u64);
    assert!(read(&blob, 0..blob.size()).await.unwrap() == bytes);
    assert_eq!(registry.seen(On::Blob).len(), 7);
}

#[tokio::test]
async fn a_silent_host_is_given_up_and_the_rest_is_asked_for() {
    let f = Fixture::with(RegistryConfig {
        idle_timeout: Duration::from_millis(300),
        ..config()
    })
    .await;
    f.registry.fail(On::Blob, 1, Fault::Stall(120_000));
    f.registry.fail(On::Blob, 1, Fault::Delay(Duration::from_secs(30)));
    f.good(0, 300_000).await;
    assert_eq!(
        f.ranges(On::Blob).last().unwrap(),
        &range("120000-299999"),
        "{:?}",
        f.ranges(On::Blob)
    );
}

/// Longer than any silence is borne: `idle_timeout` below, and the time after which a body is asked for over another connection (4 s).
const PAUSE: Duration = Duration::from_secs(5);

/// Whoever reads may pause in the middle of waiting, and find then what has come meanwhile.
#[tokio::test]
async fn a_pause_of_who_reads_is_no_silence_of_the_host() {
    let registry = FaultRegistry::start().await;
    // More than the buffers between the two hold.
    let bytes = noise(32 << 20);
    let digest = registry.add_blob(bytes.clone());
    let impatient = RegistryConfig {
        idle_timeout: Duration::from_secs(1),
        ..config()
    };
    let blob = source(&impatient, &registry.host()).blob(digest, bytes.len() as u64);
    // Several, since which of two things that are both so is seen first may be a matter of chance.
    let readers = (0..4u64).map(async |start| {
        let mut body = blob.read(start..bytes.len() as u64).await.unwrap();
        let mut got = body.try_next().await.unwrap().unwrap().to_vec();
        while let Poll::Ready(piece) = futures::poll!(body.try_next()) {
            got.extend_from_slice(&piece.unwrap().expect("not all of it is here yet"));
        }
        tokio::time::sleep(PAUSE).await;
        while let Some(piece) = body.try_next().await.unwrap() {
            got.extend_from_slice(&piece);
        }
        assert!(got == bytes[start as usize..]);
    });
    futures::future::join_all(readers).await;
    assert_eq!(registry.seen(On::Blob).len(), 4, "nothing is asked for twice");
}

#[tokio::test]
async fn more_than_was_asked_for_is_cut_off() {
    let f = Fixture::new().await;
    f.registry.fail(On::Blob, 1, Fault::Long(5000));
    f.good(100, 2000).await;
    assert_eq!(f.registry.seen(On::Blob).len(), 1);
}

#[tokio::test]
async fn a_host_that_ignores_ranges_still_serves_them() {
    let f = Fixture::new().await;
    assert!(!f.source.stats().ignores_ranges);
    f.registry.fail(On::Blob, 1, Fault::IgnoreRange);
    f.good(150_000, 150_100).await;
    assert!(f.source.stats().ignores_ranges);
    assert_eq!(f.registry.seen(On::Blob).len(), 1);
}

#[tokio::test]
async fn a_wrong_content_range_is_not_believed() {
    let f = Fixture::new().await;
    for stated in [
        "bytes 0-9/300000",
        "bytes 100-198/300000",
        "bytes 100-199/400000",
        "nonsense",
    ] {
        f.registry.fail(On::Blob, 1, Fault::ContentRange(stated.to_owned()));
        f.good(100, 200).await;
    }
    f.registry.fail(On::Blob, 1, Fault::NoContentRange);
    f.good(100, 200).await;
    // Of the first the whole is asked for, and of the second its last byte; the others are what was asked for, whatever else they say.
    assert_eq!(f.registry.seen(On::Blob).len(), 7);
    f.registry
        .fail(On::Blob, 9, Fault::ContentRange("bytes 0-99/300000".to_owned()));
    f.good(100, 200).await;
    assert_eq!(f.registry.seen(On::Blob).len(), 9);
}

#[tokio::test]
async fn a_blob_of_another_size_is_an_error() {
    let f = Fixture::new().await;
    let digest = Digest::of(&f.bytes);
    for size in [299_999, 300_001] {
        let blob = f.source.blob(digest, size);
        let error = read(&blob, 0..size).await.unwrap_err();
        assert!(matches!(error, RegistryError::Protocol { .. }), "{error}");
        assert!(error.to_string().contains("300000 bytes"), "{error}");
    }
    // Beyond its end: 416.
    let blob = f.source.blob(digest, 500_000);
    let error = read(&blob, 400_000..500_000).await.unwrap_err();
    assert!(matches!(error, RegistryError::Protocol { .. }), "{error}");
}

#[tokio::test]
async fn an_absent_host_is_unreachable() {
    // A port that was free a moment ago.
    let host = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let blob = source(&config(), &host.to_string()).blob(Digest::of(b"x"), 1);
    let error = read(&blob, 0..1).await.unwrap_err();
    assert!(matches!(error, RegistryError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains(&host.to_string()), "{error}");
}

#[tokio::test]
async fn small_blobs_are_verified() {
    let f = Fixture::new().await;
    let small = f.registry.add_blob(&b"a small blob"[..]);
    f.registry.fail(On::Blob, 1, Fault::Corrupt(3));
    assert_eq!(f.source.read_small(small, 12, 100).await.unwrap(), "a small blob");
    f.registry.fail(On::Blob, 9, Fault::Corrupt(3));
    let error = f.source.read_small(small, 12, 100).await.unwrap_err();
    assert!(matches!(error, RegistryError::Protocol { .. }), "{error}");
    assert!(error.to_string().contains("digest"), "{error}");
    let error = f.source.read_small(small, 101, 100).await.unwrap_err();
    assert!(matches!(error, RegistryError::Image { .. }), "{error}");
}

/// Puts an image of one layer into a registry, behind an index, with the tag `1`.
fn add_image(registry: &FaultRegistry, layer: &[u8]) -> Digest {
    let platform = image::Platform::host();
    let config = json!({
        "os": "linux", "architecture": platform.architecture,
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(layer).to_string()]},
    })
    .to_string();
    let descriptor = |bytes: &[u8], kind: &str| json!({"digest": registry.add_blob(bytes.to_vec()), "size": bytes.len(), "mediaType": kind});
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor(config.as_bytes(), "application/vnd.oci.image.config.v1+json"),
        "layers": [descriptor(layer, "application/vnd.oci.image.layer.v1.tar")],
    })
    .to_string();
    let digest = registry.add_manifest("application/vnd.oci.image.manifest.v1+json", manifest.clone());
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [
            {"digest": Digest::of(b"other"), "size": 1, "platform": {"os": "plan9", "architecture": "mips"}},
            {"digest": digest, "size": manifest.len(), "platform": {"os": "linux", "architecture": platform.architecture}},
        ],
    })
    .to_string();
    let index = registry.add_manifest("application/vnd.oci.image.index.v1+json; charset=utf-8", index);
    registry.tag(REPOSITORY, "1", index);
    digest
}

#[tokio::test]
async fn an_image_is_resolved_through_its_index() {
    let f = Fixture::new().await;
    let manifest = add_image(&f.registry, b"layer");
    f.registry.fail(On::Manifest, 1, Fault::Corrupt(40));
    let image = image::resolve(&*f.source, "1").await.unwrap();
    assert_eq!(image.manifest_digest, manifest);
    assert_eq!(image.manifest_media_type, "application/vnd.oci.image.manifest.v1+json");
    assert_eq!(image.layers[0].digest, Digest::of(b"layer"));
    assert_eq!(image.chain_ids, [Digest::of(b"layer")]);
    let by_digest = image::resolve(&*f.source, &manifest.to_string()).await.unwrap();
    assert_eq!(by_digest.manifest_bytes, image.manifest_bytes);
    let error = image::resolve(&*f.source, "2").await.unwrap_err();
    assert!(matches!(error, RegistryError::NotFound { .. }), "{error}");
    assert!(error.to_string().contains("manifest 2 of demo/app"), "{error}");
    let error = f.source.manifest("sha512:abc").await.unwrap_err();
    assert!(matches!(error, RegistryError::InvalidReference { .. }), "{error}");
    // A manifest that is not what its digest says never gets through.
    f.registry.fail(On::Manifest, 9, Fault::Corrupt(40));
    let error = f.source.manifest(&manifest.to_string()).await.unwrap_err();
    assert!(matches!(error, RegistryError::Protocol { .. }), "{error}");
}

#[tokio::test]
async fn what_was_asked_and_repeated_is_counted() {
    let registry = FaultRegistry::start().await;
    let digest = registry.add_blob(noise(1000));
    let metrics = Arc::new(Metrics::new());
    let client = Registry::new(
        &RegistryConfig {
            attempts: 4,
            ..config()
        },
        metrics.clone(),
    )
    .unwrap();
    let blob = client.repository(&registry.host(), REPOSITORY).blob(digest, 1000);
    registry.set_auth(Auth::AnonymousToken);
    registry.fail(On::Blob, 1, Fault::Status(500));
    registry.fail(On::Blob, 1, Fault::Cut(500));
    registry.fail(On::Blob, 1, Fault::ContentRange("bytes 0-0/1".to_owned()));
    read(&blob, 0..1000).await.unwrap();
    let text = metrics.text();
    for (name, value) in [
        // The token, the cut one, the wrong one, the good one.
        ("lazuli_registry_requests_total{class=\"2xx\"}", 4),
        ("lazuli_registry_requests_total{class=\"4xx\"}", 1),
        ("lazuli_registry_requests_total{class=\"5xx\"}", 1),
        ("lazuli_registry_retries_total{cause=\"cut\"}", 1),
        ("lazuli_registry_retries_total{cause=\"protocol\"}", 1),
        ("lazuli_registry_retries_total{cause=\"status\"}", 1),
        ("lazuli_registry_retries_total{cause=\"auth\"}", 1),
    ] {
        assert!(
            text.contains(&format!("{name} {value}")),
            "{name} is not {value}:\n{text}"
        );
    }
}
