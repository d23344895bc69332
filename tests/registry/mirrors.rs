//! Several hosts of one registry, as `hosts.toml` describes them.

use std::sync::Arc;
use std::time::Duration;

use lazuli::config::RegistryConfig;
use lazuli::layer::Digest;
use lazuli::metrics::Metrics;
use lazuli::registry::{Registry, RegistryError, Source, image};

use crate::support::fault_registry::{Fault, FaultRegistry, On};
use crate::{REPOSITORY, add_image, config, noise, read, source};

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
async fn a_bad_copy_at_a_mirror_does_not_hide_a_good_one() {
    let m = Mirrored::new().await;
    let source = m.source();
    let size = m.bytes.len() as u64;
    m.mirror.fail(On::Blob, 99, Fault::Corrupt(20));
    assert!(source.read_small(m.digest, size, size).await.unwrap() == m.bytes);
    assert_eq!(m.asked(), (1, 1));
    // Who verifies on his own says so, too.
    let m = Mirrored::new().await;
    m.mirror.fail(On::Blob, 99, Fault::Corrupt(20));
    let blob = m.source().blob(m.digest, size);
    assert!(read(&blob, 0..100).await.unwrap() != m.bytes[..100]);
    blob.distrust();
    assert!(read(&blob, 0..100).await.unwrap() == m.bytes[..100]);
    assert_eq!(m.asked(), (1, 1));
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
    // Who reads goes on; a new pull is told.
    m.good(&source).await;
    assert_eq!(m.asked(), (1, 2));
    let error = source.manifest("1").await.unwrap_err();
    assert!(matches!(error, RegistryError::Config { .. }), "{error}");
    assert!(error.to_string().contains("line 3"), "{error}");
}

/// A host that takes connections and never says anything.
struct Silent {
    listener: std::net::TcpListener,
}

impl Silent {
    fn start() -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        Silent { listener }
    }

    fn host(&self) -> String {
        self.listener.local_addr().unwrap().to_string()
    }

    /// Connections since the last call.
    fn connections(&self) -> usize {
        std::iter::from_fn(|| self.listener.accept().ok()).count()
    }
}

/// No test waits for these: what passes has not waited for a silent host.
fn endless() -> RegistryConfig {
    RegistryConfig {
        connect_timeout: Duration::from_secs(3600),
        idle_timeout: Duration::from_secs(3600),
        ..config()
    }
}

#[tokio::test]
async fn a_silent_mirror_costs_one_wait_and_is_left_alone_then() {
    let m = Mirrored::new().await;
    let silent = Silent::start();
    let dir = m.dir.path().join("registry.test");
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\n",
        m.origin.host(),
        silent.host()
    );
    std::fs::write(dir.join("hosts.toml"), text).unwrap();
    let config = RegistryConfig {
        config_path: vec![m.dir.path().to_owned()],
        ..endless()
    };
    let source = source(&config, "registry.test");
    // Many readers at once meet it at once.
    let (a, b) = (m.good(&source), m.good(&source));
    tokio::time::timeout(Duration::from_secs(60), async { tokio::join!(a, b) })
        .await
        .expect("the registry itself is asked");
    assert_eq!(silent.connections(), 2);
    for _ in 0..20 {
        m.good(&source).await;
    }
    assert_eq!(silent.connections(), 0, "it is left alone");
    assert_eq!(m.asked(), (0, 22));
}

#[tokio::test]
async fn what_a_slow_mirror_owes_is_asked_of_the_next_host() {
    let m = Mirrored::new().await;
    m.mirror.fail(On::Blob, 1, Fault::Delay(Duration::from_secs(3600)));
    let config = RegistryConfig {
        config_path: vec![m.dir.path().to_owned()],
        ..endless()
    };
    let source = source(&config, "registry.test");
    tokio::time::timeout(Duration::from_secs(60), m.good(&source))
        .await
        .expect("the registry itself is asked");
    assert_eq!(m.asked(), (1, 1));
}

#[tokio::test]
async fn a_body_that_stalls_goes_on_at_the_next_host() {
    let m = Mirrored::new().await;
    m.mirror.fail(On::Blob, 1, Fault::Stall(20_000));
    let config = RegistryConfig {
        config_path: vec![m.dir.path().to_owned()],
        ..endless()
    };
    let source = source(&config, "registry.test");
    tokio::time::timeout(Duration::from_secs(60), m.good(&source))
        .await
        .expect("the rest is asked of the registry itself");
    assert_eq!(m.asked(), (1, 1));
    assert_eq!(m.origin.seen(On::Blob)[0].range(), Some("bytes=20010-89999"));
}

/// A connection that drips, while others to the same host do not.
#[tokio::test]
async fn a_connection_that_drips_beside_others_is_not_waited_for() {
    let registry = FaultRegistry::start().await;
    let bytes = noise(400_000);
    let digest = registry.add_blob(bytes.clone());
    registry.fail(On::Blob, 1, Fault::Drip(1000, Duration::from_millis(100)));
    let source = source(&endless(), &registry.host());
    let blob = source.blob(digest, bytes.len() as u64);
    let dripping = tokio::time::timeout(Duration::from_secs(30), read(&blob, 10..390_000));
    let others = async {
        while registry.seen(On::Blob).is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // They bring twenty times as much meanwhile.
        loop {
            registry.fail(On::Blob, 1, Fault::Drip(20_000, Duration::from_millis(100)));
            read(&blob, 0..200_000).await.unwrap();
        }
    };
    let dripping = tokio::select! {
        dripping = dripping => dripping,
        () = others => unreachable!(),
    };
    let read = dripping.expect("the rest is asked for over another connection");
    assert!(read.unwrap() == bytes[10..390_000]);
    let asked = registry.seen(On::Blob);
    let asked = asked
        .iter()
        .filter(|seen| seen.range().is_some_and(|range| range.ends_with("-389999")));
    assert_eq!(asked.count(), 2);
}

/// A single host, and a connection to it that is forgotten by something on the way: before the answer, and in the middle of one.
#[tokio::test]
async fn a_connection_that_says_nothing_is_not_waited_for() {
    for fault in [Fault::Delay(Duration::from_secs(3600)), Fault::Stall(20_000)] {
        let registry = FaultRegistry::start().await;
        let bytes = noise(100_000);
        let digest = registry.add_blob(bytes.clone());
        registry.fail(On::Blob, 1, fault);
        let blob = source(&endless(), &registry.host()).blob(digest, bytes.len() as u64);
        let read = tokio::time::timeout(Duration::from_secs(60), read(&blob, 10..90_000));
        let read = read.await.expect("it is asked for over another connection");
        assert!(read.unwrap() == bytes[10..90_000]);
        assert_eq!(registry.seen(On::Blob).len(), 2);
    }
}

/// Where nobody listens, that is known at once: whoever waits in a pull is not to wait for more.
#[tokio::test]
async fn hosts_that_refuse_connections_are_asked_twice() {
    // Ports that were free a moment ago.
    let closed = || {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("registry.test")).unwrap();
    let text = format!("server = \"http://{}\"\n[host.\"http://{}\"]\n", closed(), closed());
    std::fs::write(dir.path().join("registry.test/hosts.toml"), text).unwrap();
    let config = RegistryConfig {
        config_path: vec![dir.path().to_owned()],
        attempts: 9,
        ..config()
    };
    let metrics = Arc::new(Metrics::new());
    let source = Registry::new(&config, Arc::clone(&metrics))
        .unwrap()
        .repository("registry.test", REPOSITORY);
    let retries = |cause| metrics.registry_retries_total.with_label_values(&[cause]).get();
    for operations in 1..=3 {
        let error = read(&source.blob(Digest::of(b"x"), 1), 0..1).await.unwrap_err();
        assert!(error.retry_helps() && error.to_string().contains("refused"), "{error}");
        // Each of two hosts twice, of which the last time is no repetition of anything.
        assert_eq!((retries("refused"), retries("connection")), (operations * 3, 0));
    }
}
