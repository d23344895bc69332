//! Debian's docker-registry, with and without TLS: that the fault registry did not teach the client habits of its own.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use lazuli::config::RegistryConfig;
use lazuli::layer::Digest;
use lazuli::metrics::Metrics;
use lazuli::registry::{Reference, Registry, RegistryError, Source, image};
use serde_json::json;

use crate::{REPOSITORY, config, noise, read, source};

/// A real registry in a directory of its own, or `None` (said aloud) where none is installed.
pub(crate) struct DockerRegistry {
    process: Child,
    pub(crate) host: String,
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
    pub(crate) async fn start(tls: Option<&Path>) -> Option<Self> {
        Self::start_with(tls, "").await
    }

    /// As [`DockerRegistry::start`]; `storage` are more lines of the table of that name.
    pub(crate) async fn start_with(tls: Option<&Path>, storage: &str) -> Option<Self> {
        // It cannot be told to choose a port, so one that was free is offered; another process may be quicker, hence several times.
        for _ in 0..5 {
            let dir = tempfile::tempdir().unwrap();
            let port = {
                let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
                listener.local_addr().unwrap().port()
            };
            let host = format!("127.0.0.1:{port}");
            let mut text = format!(
                "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\n{storage}http:\n  addr: {host}\n",
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
            if this.wait().await {
                return Some(this);
            }
        }
        panic!("docker-registry does not start");
    }

    /// Waits until it accepts connections; `false` if it ends instead.
    async fn wait(&mut self) -> bool {
        for _ in 0..200 {
            if self.process.try_wait().unwrap().is_some() {
                return false;
            }
            if tokio::net::TcpStream::connect(&self.host).await.is_ok() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        false
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

/// One behind TLS, and the directory of its certificates; `None` (said aloud) where that cannot be had.
async fn start_behind_tls() -> Option<(DockerRegistry, tempfile::TempDir)> {
    let certs = tempfile::tempdir().unwrap();
    if !certificates(certs.path()) {
        eprintln!("SKIPPED: openssl is not installed, so there is no certificate to test TLS with");
        return None;
    }
    Some((DockerRegistry::start(Some(certs.path())).await?, certs))
}

/// Layers that are streamed from a host at once, and more.
const STREAMS: u8 = 8;

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
    let Some((registry, certs)) = start_behind_tls().await else {
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
    // Docker's form: certificates beside each other, and no hosts.toml.
    std::fs::remove_file(hosts.join("hosts.toml")).unwrap();
    std::fs::rename(hosts.join("ca.pem"), hosts.join("ca.crt")).unwrap();
    check_image(tls_source(), &layers).await;
}

/// Over HTTP/2 all of a host's answers share a connection, and what it may send ahead.
#[tokio::test(flavor = "multi_thread")]
async fn answers_that_nobody_reads_leave_room_for_others_on_their_connection() {
    let Some((registry, _certs)) = start_behind_tls().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    crate::support::openssl::write_hosts(dir.path(), &registry.host, "skip_verify = true");
    let config = RegistryConfig {
        config_path: vec![dir.path().to_owned()],
        ..config()
    };
    let source = source(&config, &registry.host);
    // It installs what the client below needs.
    assert!(source.manifest("absent").await.is_err());
    let http = reqwest::Client::builder()
        .no_proxy()
        .tls_danger_accept_invalid_certs(true)
        .build()
        .unwrap();
    let version = http
        .get(format!("https://{}/v2/", registry.host))
        .send()
        .await
        .unwrap()
        .version();
    assert_eq!(version, reqwest::Version::HTTP_2, "it shows nothing otherwise");
    let mut bytes = noise(6_000_000);
    let mut standing = Vec::new();
    for number in 0..STREAMS {
        bytes[0] = number;
        let digest = registry.push_blob(&http, "https", &bytes).await;
        let mut body = source
            .blob(digest, bytes.len() as u64)
            .read(0..6_000_000)
            .await
            .unwrap();
        assert!(body.try_next().await.unwrap().is_some());
        standing.push(body);
    }
    // Until the buffers are full.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let digest = registry.push_blob(&http, "https", b"small").await;
    let small = source.blob(digest, 5);
    let read = tokio::time::timeout(Duration::from_secs(20), read(&small, 0..5)).await;
    assert_eq!(read.expect("there is room for it").unwrap(), b"small");
}
