//! Registries behind an HTTP proxy, which forwards and tunnels, and may want a password.

use std::sync::{Arc, Mutex};

use base64::Engine as _;
use lazuli::config::RegistryConfig;
use lazuli::layer::Digest;
use lazuli::metrics::Metrics;
use lazuli::registry::hosts::proxy::Proxies;
use lazuli::registry::{Registry, Source};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};

use crate::support::fault_registry::FaultRegistry;
use crate::support::openssl::{Pki, Server, write_hosts};
use crate::{REPOSITORY, config, read};

/// A proxy that leads to one server, whatever is asked for.
struct Proxy {
    host: String,
    seen: Arc<Mutex<Vec<String>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Proxy {
    /// One before `to`, which wants this user and password.
    async fn start(to: String, secret: Option<&'static str>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let seen: Arc<Mutex<Vec<String>>> = Arc::default();
        let noted = seen.clone();
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (to, noted) = (to.clone(), noted.clone());
                tokio::spawn(async move { serve(client, to, secret, &noted).await });
            }
        });
        Proxy { host, seen, task }
    }

    fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }
}

async fn serve(mut client: TcpStream, to: String, secret: Option<&str>, seen: &Mutex<Vec<String>>) -> Option<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(client.read_u8().await.ok()?);
    }
    let text = String::from_utf8(head).unwrap();
    let line = text.lines().next().unwrap().to_owned();
    seen.lock().unwrap().push(line.clone());
    if let Some(secret) = secret {
        let wanted = format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(secret));
        let given = text.lines().find_map(|line| {
            let (name, value) = line.split_once(": ")?;
            name.eq_ignore_ascii_case("proxy-authorization").then_some(value)
        });
        if given != Some(&wanted) {
            let refusal =
                b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            client.write_all(refusal).await.ok()?;
            return None;
        }
    }
    let mut server = TcpStream::connect(&to).await.ok()?;
    match line.starts_with("CONNECT ") {
        true => client
            .write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")
            .await
            .ok()?,
        // Servers understand whole addresses.
        false => server
            .write_all(
                text.replacen("HTTP/1.1\r\n", "HTTP/1.1\r\nConnection: close\r\n", 1)
                    .as_bytes(),
            )
            .await
            .ok()?,
    }
    copy_bidirectional(&mut client, &mut server).await.ok()?;
    Some(())
}

/// A source of the registry `host`, in an environment with these variables.
fn source(variables: &[(&str, &str)], host: &str, config: &RegistryConfig) -> Arc<dyn Source> {
    let get = |name: &str| {
        variables
            .iter()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| (*value).to_owned())
    };
    let client = Registry::through(Proxies::new(get), config, Arc::new(Metrics::new())).unwrap();
    client.repository(host, REPOSITORY)
}

fn plain(host: &str) -> RegistryConfig {
    RegistryConfig {
        plain_http: vec![host.to_owned()],
        ..config()
    }
}

async fn reads(source: &Arc<dyn Source>, digest: Digest) -> Result<(), String> {
    let blob = source.blob(digest, 4);
    let bytes = read(&blob, 0..4).await.map_err(|error| error.to_string())?;
    assert_eq!(bytes, b"blob");
    Ok(())
}

#[tokio::test]
async fn a_registry_is_asked_through_the_proxy_unless_it_is_excepted() {
    let registry = FaultRegistry::start().await;
    let digest = registry.add_blob(&b"blob"[..]);
    let proxy = Proxy::start(registry.host(), None).await;
    let config = plain("registry.corp.test");
    for name in ["HTTP_PROXY", "http_proxy", "ALL_PROXY"] {
        let before = proxy.seen().len();
        let source = source(&[(name, &proxy.host)], "registry.corp.test", &config);
        reads(&source, digest).await.unwrap();
        let seen = &proxy.seen()[before..];
        assert_eq!(
            seen,
            [format!(
                "GET http://registry.corp.test/v2/{REPOSITORY}/blobs/{digest} HTTP/1.1"
            )],
            "{name}"
        );
    }
    let before = proxy.seen().len();
    // A name that nobody knows cannot be asked directly.
    for except in ["*.corp.test", ".corp.test", "corp.test", "registry.corp.test:80", "*"] {
        let variables = [("HTTP_PROXY", proxy.host.as_str()), ("NO_PROXY", except)];
        let error = reads(&source(&variables, "registry.corp.test", &config), digest)
            .await
            .unwrap_err();
        assert!(
            error.contains("registry.corp.test") && !error.contains("proxy"),
            "{except}: {error}"
        );
    }
    // This machine is.
    let variables = [
        ("HTTP_PROXY", proxy.host.as_str()),
        ("HTTPS_PROXY", proxy.host.as_str()),
    ];
    reads(&source(&variables, &registry.host(), &config), digest)
        .await
        .unwrap();
    assert_eq!(proxy.seen().len(), before);
}

#[tokio::test]
async fn a_proxy_that_wants_a_password_gets_it_and_errors_do_not_show_it() {
    let registry = FaultRegistry::start().await;
    let digest = registry.add_blob(&b"blob"[..]);
    let proxy = Proxy::start(registry.host(), Some("me:pass@word")).await;
    let config = plain("registry.test");
    let with = |user: &str| format!("http://{user}{}", proxy.host);
    let good = with("me:pass%40word@");
    reads(&source(&[("HTTP_PROXY", &good)], "registry.test", &config), digest)
        .await
        .unwrap();
    for bad in [with(""), with("me:wrong-word@")] {
        let error = reads(&source(&[("HTTP_PROXY", &bad)], "registry.test", &config), digest)
            .await
            .unwrap_err();
        assert!(error.contains(&proxy.host) && error.contains("407"), "{error}");
        assert!(!error.contains("wrong-word"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_goes_through_a_tunnel() {
    let pki = Pki::default();
    pki.self_signed("own", "P-256", &["-addext", "subjectAltName=DNS:registry.test"]);
    let server = Server::start(&pki, "own", &[]);
    let root = tempfile::tempdir().unwrap();
    let ca = pki.path("own.crt").display().to_string();
    write_hosts(root.path(), "registry.test", &format!("ca = {ca:?}"));
    let config = RegistryConfig {
        config_path: vec![root.path().to_owned()],
        attempts: 1,
        ..config()
    };
    let proxy = Proxy::start(server.host().to_owned(), Some("me:word")).await;
    let good = format!("me:word@{}", proxy.host);
    source(&[("HTTPS_PROXY", &good)], "registry.test", &config)
        .manifest("1")
        .await
        .unwrap();
    assert_eq!(proxy.seen(), ["CONNECT registry.test:443 HTTP/1.1"]);
    // A proxy that is not there, or refuses, is named; its password is not.
    let dead = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    for bad in [format!("me:wrong-word@{}", proxy.host), format!("me:wrong-word@{dead}")] {
        let error = source(&[("HTTPS_PROXY", &bad)], "registry.test", &config)
            .manifest("1")
            .await
            .unwrap_err();
        let (error, address) = (error.to_string(), bad.split_once('@').unwrap().1);
        assert!(
            error.contains(&format!("through the proxy http://{address}")),
            "{error}"
        );
        assert!(
            error.contains("registry.test") && !error.contains("wrong-word"),
            "{error}"
        );
    }
}
