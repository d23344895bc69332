//! Debian's docker-registry on a port of its own, and a client that pushes images to any registry over plain HTTP.

use std::net::SocketAddr;
use std::process::Command;

use super::image::{Blob, Image};
use super::sandbox::{PATIENCE, Process, Sandbox, listens_tcp, require_program};

/// Bytes of its log that are shown when a test fails: a few requests.
const SHOWN_LOG: u64 = 1500;

/// A registry of this test alone.
pub struct Registry {
    /// Where it listens.
    pub address: SocketAddr,
    sandbox: Sandbox,
    process: Option<Process>,
}

impl Registry {
    /// Starts it with empty storage below the sandbox.
    pub fn start(sandbox: &Sandbox) -> Self {
        let mut registry = Registry {
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            sandbox: sandbox.clone(),
            process: None,
        };
        registry.launch();
        registry
    }

    fn launch(&mut self) {
        let dir = self.sandbox.dir("registry");
        let config = dir.join("config.yml");
        let text = format!(
            "version: 0.1\nlog:\n  level: info\n  accesslog:\n    disabled: false\n\
             storage:\n  filesystem:\n    rootdirectory: {}/data\n  maintenance:\n    uploadpurging:\n      enabled: false\n\
             validation:\n  manifests:\n    urls:\n      allow: ['^http://127[.]0[.]0[.]1:']\n\
             http:\n  addr: {}\n  secret: test\n",
            dir.display(),
            self.address
        );
        std::fs::write(&config, text).unwrap();
        let mut command = Command::new(require_program("docker-registry"));
        command.arg("serve").arg(&config);
        let mut process = self.sandbox.spawn("registry", &mut command);
        // With port 0 it says which port it got; a restart is on the port that images are named by.
        let known = (self.address.port() != 0).then_some(self.address);
        self.address = process.wait_ready("its port", PATIENCE, |process| {
            let address = known.or_else(|| port_in(&process.log()))?;
            listens_tcp(address).map(|()| address)
        });
        process.show(SHOWN_LOG);
        self.process = Some(process);
    }

    /// `127.0.0.1:PORT`.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// Stops it: connections are refused from now on.
    pub fn stop(&mut self) {
        self.process = None;
    }

    /// Starts it again on the same port with the same storage.
    pub fn restart(&mut self) {
        self.stop();
        self.launch();
    }

    /// Pushes an image as `name` (`repository:tag`) and returns its full reference.
    pub fn push(&self, image: &Image, name: &str) -> String {
        push(self.address, image, name);
        format!("{}/{name}", self.address)
    }

    /// Requests in its access log so far, as `METHOD PATH STATUS`.
    pub fn requests(&self) -> Vec<String> {
        let log = self.process.as_ref().map(Process::log).unwrap_or_default();
        // Combined log format: 127.0.0.1 - - [time] "GET /v2/... HTTP/1.1" 200 1234 "" "agent"
        log.lines()
            .filter_map(|line| {
                let mut quoted = line.split('"');
                let request = quoted.nth(1).filter(|request| request.contains(" /v2/"))?;
                let status = quoted.next()?.split_whitespace().next()?;
                Some(format!("{} {status}", request.rsplit_once(' ')?.0))
            })
            .collect()
    }
}

/// The address in the line that docker-registry logs when it listens: `msg="listening on 127.0.0.1:45229"`.
fn port_in(log: &str) -> Option<SocketAddr> {
    let (_, after) = log.rsplit_once("listening on ")?;
    after.split(['"', ' ', ',']).next()?.parse().ok()
}

/// Pushes an image to the registry at `address` as `name` (`repository:tag`).
pub fn push(address: SocketAddr, image: &Image, name: &str) {
    let (repository, tag) = name.rsplit_once(':').unwrap_or((name, "latest"));
    runtime().block_on(async {
        let client = client();
        for blob in image.blobs() {
            push_blob(&client, address, repository, blob).await;
        }
        let url = format!("http://{address}/v2/{repository}/manifests/{tag}");
        let answer = client
            .put(&url)
            .header("content-type", image.media_type)
            .body(image.manifest.bytes.as_slice().to_vec())
            .send()
            .await
            .unwrap_or_else(|error| panic!("PUT {url}: {error}"));
        let status = answer.status();
        assert!(
            status.is_success(),
            "PUT {url}: {status} {}",
            answer.text().await.unwrap_or_default()
        );
    });
}

/// Pushes a blob into a repository of the registry at `address`.
pub async fn push_blob(client: &reqwest::Client, address: SocketAddr, repository: &str, blob: &Blob) {
    let base = format!("http://{address}/v2/{repository}/blobs/");
    let present = client.head(format!("{base}{}", blob.digest)).send().await;
    if present.is_ok_and(|answer| answer.status().is_success()) {
        return;
    }
    let url = format!("{base}uploads/");
    let answer = client
        .post(&url)
        .send()
        .await
        .unwrap_or_else(|error| panic!("POST {url}: {error}"));
    assert_eq!(answer.status(), 202, "POST {url}");
    let location = answer.headers()["location"].to_str().unwrap();
    let mut upload = answer.url().join(location).unwrap();
    upload.query_pairs_mut().append_pair("digest", &blob.digest);
    let answer = client
        .put(upload.clone())
        .header("content-type", "application/octet-stream")
        .body(blob.bytes.as_slice().to_vec())
        .send()
        .await
        .unwrap_or_else(|error| panic!("PUT {upload}: {error}"));
    let status = answer.status();
    assert_eq!(status, 201, "PUT {upload}: {}", answer.text().await.unwrap_or_default());
}

/// An HTTP client that follows no redirect and asks no proxy of the environment.
pub fn client() -> reqwest::Client {
    // reqwest is built without a provider of its own; the first caller of a process installs ring.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .expect("an HTTP client without options can be built")
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime can be built")
}
