//! Connection pools: one `reqwest::Client` per TLS identity.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, Once};
use std::time::Duration;

use super::{HostSpec, config_error, read_file};
use crate::layer::Digest;
use crate::layer::digest::Hasher;
use crate::registry::{RegistryError, lock};

/// Bytes a server may send ahead on one HTTP/2 stream: 1 Gbit/s at 30 ms.
const STREAM_WINDOW: u32 = 4 << 20;
/// Bytes a server may send ahead on one HTTP/2 connection: four streams at full speed.
const CONNECTION_WINDOW: u32 = 16 << 20;
/// Silence after which an HTTP/2 connection in use is asked whether it still lives.
const PING_INTERVAL: Duration = Duration::from_secs(15);

/// The pools of a daemon, by identity.
pub(super) struct Clients {
    connect_timeout: Duration,
    idle_timeout: Duration,
    pools: Mutex<HashMap<Identity, reqwest::Client>>,
}

/// What makes a connection differ from another to the same address.
#[derive(PartialEq, Eq, Hash)]
struct Identity {
    /// Digest over the certificates and keys.
    files: Digest,
    skip_verify: bool,
    dial_timeout: Option<Duration>,
    loopback: bool,
}

impl Clients {
    pub(super) fn new(connect_timeout: Duration, idle_timeout: Duration) -> Self {
        Clients {
            connect_timeout,
            idle_timeout,
            pools: Mutex::new(HashMap::new()),
        }
    }

    /// The pool for a host. `loopback` hosts are never asked through a proxy.
    ///
    /// # Errors
    /// [`RegistryError::Config`] names the certificate that cannot be used.
    pub(super) fn client(&self, spec: &HostSpec, loopback: bool) -> Result<reqwest::Client, RegistryError> {
        let mut files = Hasher::new();
        let mut read = |path: &Path| {
            let bytes = read_file(path).map_err(|error| config_error(path, &error))?;
            files.update(&(bytes.len() as u64).to_le_bytes());
            files.update(&bytes);
            Ok::<_, RegistryError>(bytes)
        };
        let mut authorities = Vec::new();
        for path in &spec.ca {
            let certificates = reqwest::Certificate::from_pem_bundle(&read(path)?)
                .map_err(|error| unusable(path, &format!("it holds no PEM certificates: {error}")))?;
            authorities.extend(certificates);
        }
        let mut identity = None;
        for (cert, key) in &spec.client {
            let mut pem = read(cert)?;
            if let Some(key) = key {
                pem.push(b'\n');
                pem.extend(read(key)?);
            }
            let parsed = reqwest::Identity::from_pem(&pem)
                .map_err(|error| unusable(cert, &format!("it is not a client certificate with its key: {error}")))?;
            // The TLS library takes one identity for a connection; containerd's choice among several is the first that fits.
            if identity.is_none() {
                identity = Some(parsed);
            } else {
                tracing::warn!(certificate = %cert.display(), "only the first client certificate of a host is used");
            }
        }
        let key = Identity {
            files: files.finish(),
            skip_verify: spec.skip_verify == Some(true),
            dial_timeout: spec.dial_timeout,
            loopback,
        };
        if let Some(client) = lock(&self.pools).get(&key) {
            return Ok(client.clone());
        }
        let build = |system_roots: bool| {
            let mut builder = self.builder(&key).tls_certs_merge(authorities.clone());
            if !system_roots {
                builder = builder.tls_certs_only(authorities.clone());
            }
            if let Some(identity) = identity.clone() {
                builder = builder.identity(identity);
            }
            builder.build()
        };
        // A machine without any CA certificates can still use plain HTTP.
        let client = build(true)
            .or_else(|error| {
                tracing::warn!(cause = %chain(&error), "the system's CA certificates cannot be used (install ca-certificates)");
                build(false)
            })
            .map_err(|error| unusable(Path::new("TLS configuration"), &chain(&error)))?;
        lock(&self.pools).insert(key, client.clone());
        Ok(client)
    }

    fn builder(&self, key: &Identity) -> reqwest::ClientBuilder {
        static PROVIDER: Once = Once::new();
        // An error means that the process has chosen a provider already: then that one serves.
        PROVIDER.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("lazuli/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .connect_timeout(
                key.dial_timeout
                    .filter(|t| !t.is_zero())
                    .unwrap_or(self.connect_timeout),
            )
            .read_timeout(self.idle_timeout)
            .http2_initial_stream_window_size(STREAM_WINDOW)
            .http2_initial_connection_window_size(CONNECTION_WINDOW)
            .http2_keep_alive_interval(PING_INTERVAL)
            .http2_keep_alive_timeout(PING_INTERVAL)
            .tls_danger_accept_invalid_certs(key.skip_verify);
        if key.loopback {
            builder = builder.no_proxy();
        }
        builder
    }

    /// Number of pools.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        lock(&self.pools).len()
    }
}

fn unusable(path: &Path, problem: &str) -> RegistryError {
    RegistryError::Config {
        path: path.display().to_string(),
        problem: problem.to_owned(),
    }
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Wrappers often repeat what they wrap.
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
