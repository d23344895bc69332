//! The registry client against a registry that fails on demand, and against Debian's docker-registry.
//!
//! Reads succeed where they can; where they cannot, the error says why. What was sent is checked in the fault registry's log.

mod support;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::TryStreamExt;
use lazuli::config::{Credential, RegistryConfig};
use lazuli::layer::Digest;
use lazuli::metrics::Metrics;
use lazuli::registry::{Blob, Reference, Registry, RegistryError, Source, image};
use serde_json::json;
use support::fault_registry::{Auth, Fault, FaultRegistry, On, Seen};

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
    assert_eq!(f.registry.seen(On::Blob).len(), 10);
    f.registry
        .fail(On::Blob, 9, Fault::ContentRange("bytes 0-99/300000".to_owned()));
    let error = f.error(100, 200).await;
    assert!(matches!(error, RegistryError::Protocol { .. }), "{error}");
    assert!(error.to_string().contains("Content-Range"), "{error}");
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
async fn a_compressed_body_is_refused() {
    let f = Fixture::new().await;
    f.registry.fail(On::Blob, 9, Fault::Encoding("gzip"));
    let error = f.error(0, 10).await;
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
async fn readers_share_one_token() {
    let f = Fixture::new().await;
    f.registry.set_auth(Auth::AnonymousToken);
    futures::future::join_all((0..16).map(|n| f.good(n * 100, n * 100 + 5000))).await;
    assert_eq!(f.registry.seen(On::Token).len(), 1);
    let token = &f.registry.seen(On::Token)[0];
    assert_eq!(
        token.query.get("scope").map(String::as_str),
        Some("repository:demo/app:pull")
    );
    assert_eq!(token.query.get("service").map(String::as_str), Some("fault registry"));
    assert!(!token.authorized());
    f.good(0, 300_000).await;
    assert_eq!(f.registry.seen(On::Token).len(), 1);
}

#[tokio::test]
async fn an_ended_token_is_renewed_in_the_middle_of_a_body() {
    let f = Fixture::new().await;
    f.registry.set_auth(Auth::AnonymousToken);
    f.good(0, 10).await;
    f.registry.fail(On::Blob, 1, Fault::Cut(100_000));
    f.registry.fail(On::Blob, 1, Fault::Unauthorized);
    f.good(0, 300_000).await;
    assert_eq!(f.registry.seen(On::Token).len(), 2);
    f.registry.expire_tokens();
    futures::future::join_all((0..8).map(|n| f.good(n * 100, n * 100 + 5000))).await;
    assert_eq!(f.registry.seen(On::Token).len(), 3);
}

#[tokio::test]
async fn a_token_is_renewed_before_it_ends() {
    let f = Fixture::new().await;
    f.registry.set_auth(Auth::AnonymousToken);
    f.registry.set_token_lifetime(Duration::from_secs(1));
    f.good(0, 10).await;
    let refused = |seen: Vec<Seen>| seen.iter().filter(|seen| seen.status == 401).count();
    assert_eq!(refused(f.registry.seen(On::Blob)), 1);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    f.good(0, 10).await;
    assert_eq!(refused(f.registry.seen(On::Blob)), 1, "the client knew when it ended");
    assert_eq!(f.registry.seen(On::Token).len(), 2);
}

#[tokio::test]
async fn a_failing_token_service_is_asked_again() {
    let f = Fixture::new().await;
    f.registry.set_auth(Auth::AnonymousToken);
    f.registry.fail(On::Token, 1, Fault::Status(500));
    f.registry.fail(On::Token, 1, Fault::RetryAfter(429, "0".to_owned()));
    f.good(0, 10).await;
    assert_eq!(f.registry.seen(On::Token).len(), 3);
}

/// A `config.json` in a directory of its own.
fn docker_config(entry: serde_json::Value) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    std::fs::write(&path, entry.to_string()).unwrap();
    (dir, path)
}

#[tokio::test]
async fn credentials_come_from_the_table_or_from_docker() {
    let f = Fixture::new().await;
    let host = f.registry.host();
    let size = f.bytes.len() as u64;
    let digest = Digest::of(&f.bytes);
    let table = RegistryConfig {
        credentials: [(
            host.clone(),
            Credential {
                username: "alice".to_owned(),
                password: "s3cret".to_owned(),
            },
        )]
        .into(),
        ..config()
    };
    // alice:s3cret
    let (_dir, path) = docker_config(json!({"auths": {&host: {"auth": "YWxpY2U6czNjcmV0"}}}));
    let docker = RegistryConfig {
        docker_config: Some(path),
        ..config()
    };
    let (alice, secret) = ("alice".to_owned(), "s3cret".to_owned());
    for auth in [
        Auth::Basic(alice.clone(), secret.clone()),
        Auth::Token(alice.clone(), secret.clone()),
    ] {
        f.registry.set_auth(auth);
        for config in [&table, &docker] {
            let source = source(config, &host);
            let blob = source.blob(digest, size);
            assert!(read(&blob, 7..77).await.unwrap() == f.bytes[7..77]);
        }
        // Nobody in particular is refused.
        let error = f.error(0, 10).await;
        assert!(matches!(error, RegistryError::Denied { status: 401, .. }), "{error}");
    }
    f.registry
        .set_auth(Auth::Basic("alice".to_owned(), "changed".to_owned()));
    let blob = source(&table, &host).blob(digest, size);
    let before = f.registry.seen(On::Blob).len();
    let error = read(&blob, 0..10).await.unwrap_err();
    assert!(matches!(error, RegistryError::Denied { .. }), "{error}");
    assert!(!error.to_string().contains("s3cret") && !format!("{error:?}").contains("s3cret"));
    assert_eq!(
        f.registry.seen(On::Blob).len(),
        before + 2,
        "without, then once with the password"
    );
}

#[tokio::test]
async fn an_identity_token_is_exchanged() {
    let f = Fixture::new().await;
    f.registry.set_auth(Auth::IdentityToken("refresh-me".to_owned()));
    let host = f.registry.host();
    let (_dir, path) = docker_config(json!({"auths": {&host: {"identitytoken": "refresh-me"}}}));
    let config = RegistryConfig {
        docker_config: Some(path),
        ..config()
    };
    let blob = source(&config, &host).blob(Digest::of(&f.bytes), f.bytes.len() as u64);
    assert!(read(&blob, 0..10).await.unwrap() == f.bytes[..10]);
    let token = &f.registry.seen(On::Token)[0];
    assert_eq!(token.method, http::Method::POST);
    assert!(token.query.is_empty(), "secrets are not put into addresses");
}

#[tokio::test]
async fn a_redirect_is_remembered_and_gets_no_credentials() {
    let f = Fixture::new().await;
    f.registry.set_auth(Auth::AnonymousToken);
    f.registry.set_redirects(true, None);
    f.good(0, 1000).await;
    let asked = f.registry.seen(On::Blob).len();
    for n in 1..5 {
        f.good(n * 1000, n * 1000 + 500).await;
    }
    assert_eq!(f.registry.seen(On::Blob).len(), asked, "only the CDN was asked");
    let at_cdn = f.registry.seen(On::Cdn);
    assert_eq!(at_cdn.len(), 5);
    assert!(at_cdn.iter().all(|seen| !seen.authorized()));
    // Another handle on the same blob knows it too.
    let again = f.source.blob(Digest::of(&f.bytes), f.bytes.len() as u64);
    read(&again, 0..10).await.unwrap();
    assert_eq!(f.registry.seen(On::Blob).len(), asked);
}

#[tokio::test]
async fn an_ended_redirect_is_asked_for_anew() {
    let f = Fixture::new().await;
    f.registry.set_redirects(true, None);
    f.good(0, 1000).await;
    f.registry.expire_redirects();
    f.good(1000, 2000).await;
    assert_eq!(
        (f.registry.seen(On::Blob).len(), f.registry.seen(On::Cdn).len()),
        (2, 3)
    );
    // In the middle of a body, too.
    f.registry.fail(On::Cdn, 1, Fault::Cut(100_000));
    f.registry.fail(On::Cdn, 1, Fault::Status(500));
    f.good(0, 300_000).await;
    assert_eq!(f.ranges(On::Cdn).last().unwrap(), &range("100000-299999"));
    // A refusal of a fresh address is not the registry's last word.
    f.registry.expire_redirects();
    f.registry.fail(On::Cdn, 2, Fault::Status(403));
    f.good(0, 10).await;
}

#[tokio::test]
async fn a_redirect_that_says_when_it_ends_is_not_used_longer() {
    let f = Fixture::new().await;
    f.registry.set_redirects(true, Some(Duration::from_secs(5)));
    f.good(0, 1000).await;
    f.good(1000, 2000).await;
    assert_eq!(f.registry.seen(On::Blob).len(), 2, "too short to be worth remembering");
    f.registry.set_redirects(true, Some(Duration::from_secs(600)));
    f.good(0, 1000).await;
    f.good(1000, 2000).await;
    assert_eq!(f.registry.seen(On::Blob).len(), 3);
}

#[tokio::test]
async fn redirects_in_a_circle_end() {
    let f = Fixture::new().await;
    let itself = format!("/v2/{REPOSITORY}/blobs/{}", Digest::of(&f.bytes));
    f.registry.fail(On::Blob, 99, Fault::Redirect(itself));
    let error = f.error(0, 10).await;
    assert!(error.to_string().contains("redirects"), "{error}");
    f.registry.heal();
    f.registry
        .fail(On::Blob, 9, Fault::Redirect("file:///etc/passwd".to_owned()));
    let error = f.error(0, 10).await;
    assert!(matches!(error, RegistryError::Protocol { .. }), "{error}");
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

/// The registry `registry.test`, as a `hosts.toml` describes it.
struct Mirrored {
    mirror: FaultRegistry,
    origin: FaultRegistry,
    bytes: Vec<u8>,
    digest: Digest,
    dir: tempfile::TempDir,
}

impl Mirrored {
    async fn new() -> Self {
        let (mirror, origin) = (FaultRegistry::start().await, FaultRegistry::start().await);
        let bytes = noise(100_000);
        let digest = mirror.add_blob(bytes.clone());
        origin.add_blob(bytes.clone());
        let this = Mirrored {
            mirror,
            origin,
            bytes,
            digest,
            dir: tempfile::tempdir().unwrap(),
        };
        this.write("");
        this
    }

    /// Writes the file, with `options` for the mirror.
    fn write(&self, options: &str) {
        let dir = self.dir.path().join("registry.test");
        std::fs::create_dir_all(&dir).unwrap();
        let text = format!(
            "server = \"http://{}\"\n[host.\"http://{}\"]\n{options}\n",
            self.origin.host(),
            self.mirror.host()
        );
        std::fs::write(dir.join("hosts.toml"), text).unwrap();
    }

    fn source(&self) -> Arc<dyn Source> {
        let config = RegistryConfig {
            config_path: vec![self.dir.path().to_owned()],
            ..config()
        };
        source(&config, "registry.test")
    }

    async fn good(&self, source: &Arc<dyn Source>) {
        let blob = source.blob(self.digest, self.bytes.len() as u64);
        assert!(read(&blob, 10..90_000).await.unwrap() == self.bytes[10..90_000]);
    }

    fn asked(&self) -> (usize, usize) {
        (self.mirror.seen(On::Blob).len(), self.origin.seen(On::Blob).len())
    }
}

#[tokio::test]
async fn a_mirror_is_asked_first_and_told_for_whom() {
    let m = Mirrored::new().await;
    let source = m.source();
    m.good(&source).await;
    assert_eq!(m.asked(), (1, 0));
    assert_eq!(m.mirror.seen(On::Blob)[0].ns(), Some("registry.test"));
    assert_eq!(
        m.mirror.seen(On::Blob)[0].path,
        format!("/v2/{REPOSITORY}/blobs/{}", m.digest)
    );
    // What it does not have, the next host may.
    m.mirror.lose(m.digest);
    m.good(&source).await;
    assert_eq!(m.asked(), (2, 1));
    assert_eq!(m.origin.seen(On::Blob)[0].ns(), Some("registry.test"));
    m.origin.lose(m.digest);
    let blob = source.blob(m.digest, m.bytes.len() as u64);
    let error = read(&blob, 0..10).await.unwrap_err();
    assert!(
        matches!(&error, RegistryError::NotFound { host, .. } if *host == m.origin.host()),
        "{error}"
    );
}

#[tokio::test]
async fn a_body_goes_on_at_the_next_host() {
    let m = Mirrored::new().await;
    m.mirror.fail(On::Blob, 1, Fault::Cut(50_000));
    m.good(&m.source()).await;
    assert_eq!(m.asked(), (1, 1));
    assert_eq!(m.origin.seen(On::Blob)[0].range(), Some("bytes=50010-89999"));
}

#[tokio::test]
async fn a_failing_mirror_is_asked_last_for_a_while() {
    let m = Mirrored::new().await;
    let source = m.source();
    m.mirror.fail(On::Blob, 1, Fault::Status(500));
    m.good(&source).await;
    assert_eq!(m.asked(), (1, 1));
    m.good(&source).await;
    assert_eq!(m.asked(), (1, 2));
    m.origin.fail(On::Blob, 1, Fault::Status(500));
    m.good(&source).await;
    assert_eq!(m.asked(), (2, 3));
}

#[tokio::test]
async fn a_mirror_behind_a_dead_port_costs_nothing_but_time() {
    let mut m = Mirrored::new().await;
    let dead = FaultRegistry::start().await;
    let gone = std::mem::replace(&mut m.mirror, dead);
    m.write("");
    drop(gone);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\ndial_timeout = \"200ms\"\n",
        m.origin.host(),
        listener.local_addr().unwrap()
    );
    drop(listener);
    std::fs::write(m.dir.path().join("registry.test/hosts.toml"), text).unwrap();
    m.good(&m.source()).await;
    assert_eq!(m.asked(), (0, 1));
}

#[tokio::test]
async fn options_of_a_mirror_count() {
    let m = Mirrored::new().await;
    m.write("capabilities = [\"pull\"]\n[host.\"http://MIRROR\".header]\nx-mirror = [\"a\", \"b\"]\n");
    let path = m.dir.path().join("registry.test/hosts.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("MIRROR", &m.mirror.host())).unwrap();
    m.mirror.set_redirects(true, None);
    add_image(&m.origin, b"layer");
    add_image(&m.mirror, b"layer");
    let source = m.source();
    // Tags are the origin's, digests the mirror's.
    image::resolve(&*source, "1").await.unwrap();
    assert_eq!(m.origin.seen(On::Manifest).len(), 1);
    assert_eq!(m.mirror.seen(On::Manifest).len(), 1);
    m.good(&source).await;
    let seen = m.mirror.seen(On::Blob);
    let values: Vec<_> = seen[0].headers.get_all("x-mirror").iter().collect();
    assert_eq!(values, ["a", "b"]);
    for at_cdn in m.mirror.seen(On::Cdn) {
        assert_eq!(at_cdn.header("x-mirror"), None, "headers are for the mirror only");
    }
    assert!(!m.mirror.seen(On::Cdn).is_empty());
    assert!(m.origin.log().iter().all(|seen| seen.header("x-mirror").is_none()));
}

#[tokio::test]
async fn a_changed_hosts_toml_counts_without_a_restart() {
    let m = Mirrored::new().await;
    let source = m.source();
    m.good(&source).await;
    assert_eq!(m.asked(), (1, 0));
    std::fs::write(
        m.dir.path().join("registry.test/hosts.toml"),
        format!("server = \"http://{}\"", m.origin.host()),
    )
    .unwrap();
    // Files are looked at once a second.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    m.good(&source).await;
    assert_eq!(m.asked(), (1, 1));
    std::fs::write(m.dir.path().join("registry.test/hosts.toml"), "\n\nserver = 1").unwrap();
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let blob = source.blob(m.digest, 9);
    let error = read(&blob, 0..9).await.unwrap_err();
    assert!(matches!(error, RegistryError::Config { .. }), "{error}");
    assert!(error.to_string().contains("line 3"), "{error}");
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

// ---- Debian's docker-registry ----

/// A real registry in a directory of its own, or `None` (said aloud) where none is installed.
struct DockerRegistry {
    process: Child,
    host: String,
    _dir: tempfile::TempDir,
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Certificate authority, certificate and key in `dir`, made by openssl.
fn certificates(dir: &Path) -> bool {
    let run = |arguments: &str| {
        Command::new("openssl")
            .args(arguments.split(' '))
            .current_dir(dir)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    };
    std::fs::write(
        dir.join("san"),
        "subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n",
    )
    .unwrap();
    run("req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -days 2 -subj /CN=lazuli-test-ca")
        && run("req -newkey rsa:2048 -nodes -keyout tls.key -out tls.csr -subj /CN=127.0.0.1")
        && run("x509 -req -in tls.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out tls.crt -days 2 -extfile san")
}

impl DockerRegistry {
    async fn start(tls: Option<&Path>) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        // It cannot be told to choose a port, so one that was free is offered; another process may be quicker, hence several times.
        for _ in 0..5 {
            let port = {
                let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
                listener.local_addr().unwrap().port()
            };
            let host = format!("127.0.0.1:{port}");
            let mut text = format!(
                "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {host}\n",
                dir.path().join("data").display()
            );
            if let Some(certs) = tls {
                let certs = certs.display();
                text.push_str(&format!(
                    "  tls:\n    certificate: {certs}/tls.crt\n    key: {certs}/tls.key\n"
                ));
            }
            let config = dir.path().join("config.yml");
            std::fs::write(&config, text).unwrap();
            let process = Command::new("docker-registry")
                .arg("serve")
                .arg(&config)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn();
            let process = match process {
                Ok(process) => process,
                Err(error) => {
                    eprintln!("SKIPPED: docker-registry is not installed ({error}); apt install docker-registry");
                    return None;
                }
            };
            let mut this = DockerRegistry {
                process,
                host,
                _dir: dir,
            };
            for _ in 0..200 {
                if tokio::net::TcpStream::connect(&this.host).await.is_ok() {
                    return Some(this);
                }
                if this.process.try_wait().unwrap().is_some() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            panic!("docker-registry does not start on {}", this.host);
        }
        None
    }

    /// Pushes a blob through the registry's own interface.
    async fn push_blob(&self, client: &reqwest::Client, scheme: &str, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        let begin = format!("{scheme}://{}/v2/{REPOSITORY}/blobs/uploads/", self.host);
        let begun = client.post(begin).send().await.unwrap();
        assert_eq!(begun.status(), 202);
        let mut place = begun.url().join(begun.headers()["location"].to_str().unwrap()).unwrap();
        place.query_pairs_mut().append_pair("digest", &digest.to_string());
        let put = client
            .put(place)
            .header("content-type", "application/octet-stream")
            .body(bytes.to_vec())
            .send()
            .await
            .unwrap();
        assert_eq!(put.status(), 201);
        digest
    }

    /// Pushes an image of these layers (plain tars, as far as a registry cares).
    async fn push_image(&self, client: &reqwest::Client, scheme: &str, tag: &str, layers: &[&[u8]]) {
        let ids: Vec<_> = layers.iter().map(|layer| Digest::of(layer)).collect();
        let config = json!({
            "os": "linux", "architecture": image::Platform::host().architecture,
            "rootfs": {"type": "layers", "diff_ids": ids},
        })
        .to_string();
        let mut descriptors = Vec::new();
        for layer in layers {
            let digest = self.push_blob(client, scheme, layer).await;
            descriptors.push(json!({
                "digest": digest, "size": layer.len(), "mediaType": "application/vnd.docker.image.rootfs.diff.tar",
            }));
        }
        let digest = self.push_blob(client, scheme, config.as_bytes()).await;
        let kind = "application/vnd.docker.distribution.manifest.v2+json";
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": kind,
            "config": {
                "digest": digest, "size": config.len(), "mediaType": "application/vnd.docker.container.image.v1+json",
            },
            "layers": descriptors,
        });
        let put = client
            .put(format!("{scheme}://{}/v2/{REPOSITORY}/manifests/{tag}", self.host))
            .header("content-type", kind)
            .body(manifest.to_string())
            .send()
            .await
            .unwrap();
        assert_eq!(put.status(), 201);
    }
}

/// What every registry has to give.
async fn check_image(source: Arc<dyn Source>, layers: &[&[u8]]) {
    let image = image::resolve(&*source, "1").await.unwrap();
    assert_eq!(image.layers.len(), layers.len());
    for (descriptor, bytes) in image.layers.iter().zip(layers) {
        assert_eq!(descriptor.digest, Digest::of(bytes));
        let blob = source.blob(descriptor.digest, descriptor.size);
        let size = blob.size();
        for range in [0..size, 0..1, size - 1..size, size / 3..size / 2] {
            let (start, end) = (range.start as usize, range.end as usize);
            assert!(read(&blob, range).await.unwrap() == bytes[start..end]);
        }
    }
    let error = image::resolve(&*source, "absent").await.unwrap_err();
    assert!(matches!(error, RegistryError::NotFound { .. }), "{error}");
    let error = read(&source.blob(Digest::of(b"absent"), 6), 0..6).await.unwrap_err();
    assert!(matches!(error, RegistryError::NotFound { .. }), "{error}");
}

#[tokio::test]
async fn a_real_registry() {
    let Some(registry) = DockerRegistry::start(None).await else {
        return;
    };
    // Building a client here needs the process-wide TLS provider, which the first client of the library installs.
    let reference = Reference::parse(&format!("{}/{REPOSITORY}:1", registry.host)).unwrap();
    let client = Registry::new(&config(), Arc::new(Metrics::new())).unwrap();
    let source = client.repository(&reference.host, &reference.repository);
    assert!(source.manifest("1").await.is_err());
    let layers = [noise(3_000_000), noise(100), b"third".to_vec()];
    let layers: Vec<&[u8]> = layers.iter().map(Vec::as_slice).collect();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    registry.push_image(&http, "http", "1", &layers).await;
    check_image(source, &layers).await;
}

#[tokio::test]
async fn a_real_registry_behind_tls() {
    let certs = tempfile::tempdir().unwrap();
    if !certificates(certs.path()) {
        eprintln!("SKIPPED: openssl is not installed, so there is no certificate to test TLS with");
        return;
    }
    let Some(registry) = DockerRegistry::start(Some(certs.path())).await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let hosts = dir.path().join(format!("{}_", registry.host.replace(':', "_")));
    std::fs::create_dir(&hosts).unwrap();
    let write = |options: &str| {
        let text = format!("server = \"https://{}\"\n{options}", registry.host);
        std::fs::write(hosts.join("hosts.toml"), text).unwrap();
    };
    let tls_source = || {
        let config = RegistryConfig {
            config_path: vec![dir.path().to_owned()],
            attempts: 1,
            ..config()
        };
        source(&config, &registry.host)
    };
    // An unknown authority is not trusted.
    write("");
    let error = tls_source().manifest("1").await.unwrap_err();
    assert!(matches!(error, RegistryError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("certificate"), "{error}");
    let http = reqwest::Client::builder()
        .no_proxy()
        .tls_danger_accept_invalid_certs(true)
        .build()
        .unwrap();
    let layers = [noise(2_000_000), noise(70_000)];
    let layers: Vec<&[u8]> = layers.iter().map(Vec::as_slice).collect();
    registry.push_image(&http, "https", "1", &layers).await;
    std::fs::copy(certs.path().join("ca.crt"), hosts.join("ca.pem")).unwrap();
    for options in ["ca = \"ca.pem\"\n", "skip_verify = true\n"] {
        write(options);
        check_image(tls_source(), &layers).await;
    }
    // Docker's form: certificates beside a name, and no hosts.toml. The registry is on loopback, so https has to be said; it is not.
    std::fs::remove_file(hosts.join("hosts.toml")).unwrap();
    assert!(tls_source().manifest("1").await.is_err());
}
