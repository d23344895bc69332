//! Files that are being edited: a running container reads on with what was read last, a new pull is told what is wrong.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lazuli::config::RegistryConfig;
use lazuli::layer::Digest;
use lazuli::metrics::Metrics;
use lazuli::registry::{Blob, Registry, RegistryError, Source};

use crate::support::fault_registry::{FaultRegistry, On};
use crate::support::openssl::Pki;
use crate::{REPOSITORY, add_image, config, noise, read};

/// Longer than an answer about files is taken as still true.
const LATER: Duration = Duration::from_millis(1100);
/// Longer than what has vanished is waited for.
const BELIEVED: Duration = Duration::from_secs(20);

/// The registry `registry.test`, which a hosts.toml leads to, with a blob that somebody reads.
struct Edited {
    registry: FaultRegistry,
    client: Arc<Registry>,
    source: Arc<dyn Source>,
    blob: Arc<dyn Blob>,
    bytes: Vec<u8>,
    root: tempfile::TempDir,
}

impl Edited {
    async fn new() -> Self {
        let registry = FaultRegistry::start().await;
        add_image(&registry, b"layer");
        let bytes = noise(300_000);
        let digest = registry.add_blob(bytes.clone());
        let root = tempfile::tempdir().unwrap();
        let config = RegistryConfig {
            config_path: vec![root.path().to_owned()],
            ..config()
        };
        let client = Registry::new(&config, Arc::new(Metrics::new())).unwrap();
        let source = client.repository("registry.test", REPOSITORY);
        let this = Edited {
            blob: source.blob(digest, bytes.len() as u64),
            registry,
            client,
            source,
            bytes,
            root,
        };
        this.write(&this.good_text());
        this.reads().await;
        this
    }

    fn good_text(&self) -> String {
        format!("server = \"http://{}\"\n", self.registry.host())
    }

    fn file(&self) -> PathBuf {
        self.root.path().join("registry.test/hosts.toml")
    }

    fn write(&self, text: &str) {
        std::fs::create_dir_all(self.file().parent().unwrap()).unwrap();
        std::fs::write(self.file(), text).unwrap();
    }

    /// Somebody reads.
    async fn reads(&self) {
        let read = read(&self.blob, 1000..200_000).await.unwrap();
        assert!(read == self.bytes[1000..200_000]);
    }

    /// A new pull.
    async fn pull(&self) -> Result<(), RegistryError> {
        self.source.manifest("1").await.map(drop)
    }
}

#[tokio::test]
async fn a_broken_hosts_toml_fails_pulls_and_no_reads() {
    let f = Edited::new().await;
    let certificate = "ca = \"not-there.crt\"\n";
    for (text, word) in [
        ("server = \"htt".to_owned(), "line 1"),
        ("\n[host.\"http".to_owned(), "line 2"),
        (format!("{}{certificate}", f.good_text()), "not-there.crt"),
        ("server = 5".to_owned(), "line 1"),
    ] {
        f.write(&text);
        tokio::time::sleep(LATER).await;
        f.reads().await;
        let error = f.pull().await.unwrap_err();
        assert!(
            matches!(error, RegistryError::Config { .. }) && error.to_string().contains(word),
            "{text}: {error}"
        );
        f.reads().await;
        let problems = f.client.problems().join("\n");
        assert!(
            problems.contains("registry.test") && problems.contains(word),
            "{problems}"
        );
        // Also for who was never read before.
        assert!(
            f.client
                .repository("registry.test", "other/app")
                .manifest("1")
                .await
                .is_err()
        );
    }
    f.write(&f.good_text());
    tokio::time::sleep(LATER).await;
    f.reads().await;
    f.pull().await.unwrap();
    assert_eq!(f.client.problems(), Vec::<String>::new());
}

#[tokio::test]
async fn a_hosts_toml_that_is_empty_for_a_while_is_about_to_be_written() {
    let f = Edited::new().await;
    // Truncated for five seconds, while somebody reads.
    f.write("");
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(5) {
        f.reads().await;
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    f.pull().await.unwrap();
    assert!(
        f.client.problems()[0].contains("hosts.toml"),
        "{:?}",
        f.client.problems()
    );
    f.write(&f.good_text());
    tokio::time::sleep(LATER).await;
    f.reads().await;
    assert_eq!(f.client.problems(), Vec::<String>::new());
}

#[tokio::test]
async fn a_directory_that_is_written_anew_is_not_missed() {
    let f = Edited::new().await;
    let dir = f.file().parent().unwrap().to_owned();
    std::fs::remove_dir_all(&dir).unwrap();
    tokio::time::sleep(LATER).await;
    f.reads().await;
    // Below another name that stands for the same, and is looked at first: it is believed at once.
    let registry = FaultRegistry::start().await;
    registry.add_blob(f.bytes.clone());
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(f.file(), format!("server = \"http://{}\"", registry.host())).unwrap();
    tokio::time::sleep(LATER).await;
    f.reads().await;
    assert_eq!(registry.seen(On::Blob).len(), 1);
}

#[tokio::test]
async fn what_has_vanished_for_good_is_believed() {
    let f = Edited::new().await;
    // `registry.test` itself cannot be reached: that shows when the file is not believed in any more.
    f.write("# nothing\n");
    let begun = Instant::now();
    loop {
        match read(&f.blob, 0..1000).await {
            Ok(_) => assert!(begun.elapsed() < BELIEVED, "the file is gone for {:?}", begun.elapsed()),
            Err(RegistryError::Unreachable { host, .. }) => {
                assert_eq!(host, "registry.test");
                break;
            }
            Err(error) => panic!("{error}"),
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    assert_eq!(f.client.problems(), Vec::<String>::new());
}

#[tokio::test]
async fn a_certificate_that_is_half_written_fails_no_read() {
    let (f, pki) = (Edited::new().await, Pki::default());
    pki.self_signed("ca", "P-256", &[]);
    let (ca, whole) = (f.file().with_file_name("ca.crt"), pki.read("ca.crt"));
    std::fs::write(&ca, &whole).unwrap();
    f.write(&format!("{}ca = \"ca.crt\"\n", f.good_text()));
    tokio::time::sleep(LATER).await;
    f.pull().await.unwrap();
    for state in [Some(""), Some(&whole[..whole.len() / 2]), None] {
        match state {
            Some(text) => std::fs::write(&ca, text).unwrap(),
            None => std::fs::remove_file(&ca).unwrap(),
        }
        tokio::time::sleep(LATER).await;
        f.reads().await;
        assert!(f.pull().await.unwrap_err().to_string().contains("ca.crt"));
        assert!(f.client.problems()[0].contains("ca.crt"));
    }
    std::fs::write(&ca, &whole).unwrap();
    tokio::time::sleep(LATER).await;
    f.pull().await.unwrap();
}

#[tokio::test]
async fn a_broken_file_is_an_error_for_who_was_never_asked() {
    let f = Edited::new().await;
    let dir = f.root.path().join("new.test");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("hosts.toml"), "server = [").unwrap();
    let blob = f.client.repository("new.test", REPOSITORY).blob(Digest::of(b"x"), 1);
    let error = read(&blob, 0..1).await.unwrap_err();
    assert!(matches!(error, RegistryError::Config { .. }), "{error}");
    f.reads().await;
}
