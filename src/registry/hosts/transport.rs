//! Connection pools: two `reqwest::Client`s per TLS identity. One takes what the host offers best; over HTTP/2 that is a single connection for
//! everything. The other speaks HTTP/1.1 only, so that what is asked for at the same time has a connection each: what holds back a
//! connection (a store that does, loss, a small window) does not hold back the others then.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use url::Url;

use super::proxy::Proxies;
use super::tls::files::{certificates, identity};
use super::wire::Wire;
use super::{HostSpec, config_error, read_file, tls};
use crate::layer::Digest;
use crate::layer::digest::Hasher;
use crate::registry::{RegistryError, lock};

/// Bytes a server may send ahead on one HTTP/2 stream: 1 Gbit/s at 30 ms. So many are in memory of an answer that nobody reads, and the scheduler's
/// places bound how many answers there are.
const STREAM_WINDOW: u32 = 4 << 20;
/// Bytes a server may send ahead on one HTTP/2 connection: the most there can be. With less, a few answers that nobody reads at the moment (layers
/// whose decompression or disk is slow) had all of it, and whoever else asked the host waited for them.
const CONNECTION_WINDOW: u32 = (1 << 31) - 1;
/// Silence after which an HTTP/2 connection in use is asked whether it still lives.
const PING_INTERVAL: Duration = Duration::from_secs(15);

/// The pools of a daemon, by identity.
pub(super) struct Clients {
    connect_timeout: Duration,
    idle_timeout: Duration,
    proxies: Proxies,
    pools: Mutex<HashMap<Identity, Pool>>,
}

/// The two ways to ask one host.
#[derive(Debug, Clone)]
pub(super) struct Pool {
    pub(super) client: Wire,
    /// Every request has a connection of its own.
    pub(super) beside: Wire,
}

/// What makes a connection differ from another to the same address.
#[derive(PartialEq, Eq, Hash)]
struct Identity {
    /// Digest over the certificates and keys.
    files: Digest,
    skip_verify: bool,
    dial_timeout: Option<Duration>,
}

impl Clients {
    pub(super) fn new(connect_timeout: Duration, idle_timeout: Duration, proxies: Proxies) -> Self {
        Clients {
            connect_timeout,
            idle_timeout,
            proxies,
            pools: Mutex::new(HashMap::new()),
        }
    }

    /// The proxy that is asked for an address, as it may be shown.
    pub(super) fn proxy(&self, url: &Url) -> Option<String> {
        self.proxies.shown(url)
    }

    /// The pool for a host.
    ///
    /// # Errors
    /// [`RegistryError::Config`] names the certificate that cannot be used.
    pub(super) fn pool(&self, spec: &HostSpec) -> Result<Pool, RegistryError> {
        let mut files = Hasher::new();
        let mut read = |path: &Path| {
            let bytes = read_file(path).map_err(|error| config_error(path, &error))?;
            files.update(&(bytes.len() as u64).to_le_bytes());
            files.update(&bytes);
            Ok::<_, RegistryError>(bytes)
        };
        let mut authorities = Vec::new();
        for path in &spec.ca {
            authorities.extend(certificates(&read(path)?).map_err(|problem| unusable(path, &problem))?);
        }
        let mut identities = Vec::new();
        for (certificate, key) in &spec.client {
            let (bytes, key) = (read(certificate)?, key.as_ref().map(|key| read(key)).transpose()?);
            identities.push(identity(&bytes, key.as_deref()).map_err(|problem| unusable(certificate, &problem))?);
        }
        let key = Identity {
            files: files.finish(),
            skip_verify: spec.skip_verify == Some(true),
            dial_timeout: spec.dial_timeout,
        };
        if let Some(pool) = lock(&self.pools).get(&key) {
            return Ok(pool.clone());
        }
        let failed = |error: &dyn std::error::Error| unusable(Path::new("TLS configuration"), &chain(error));
        let best = tls::client_config(authorities, identities, key.skip_verify).map_err(|error| failed(&error))?;
        let single = tls::without_http2(&best);
        let client = self.builder(&key).tls_backend_preconfigured(best).build();
        let beside = self
            .builder(&key)
            .http1_only()
            .tls_backend_preconfigured(single)
            .build();
        let pool = Pool {
            client: Wire::new(client.map_err(|error| failed(&error))?, self.idle_timeout),
            beside: Wire::new(beside.map_err(|error| failed(&error))?, self.idle_timeout),
        };
        lock(&self.pools).insert(key, pool.clone());
        Ok(pool)
    }

    fn builder(&self, key: &Identity) -> reqwest::ClientBuilder {
        let proxies = self.proxies.clone();
        reqwest::Client::builder()
            .user_agent(concat!("lazuli/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            // The environment is read by `proxy`, not by reqwest, which understands some of it otherwise.
            .no_proxy()
            .proxy(reqwest::Proxy::custom(move |url| proxies.of(url)))
            .connect_timeout(
                key.dial_timeout
                    .filter(|t| !t.is_zero())
                    .unwrap_or(self.connect_timeout),
            )
            .http2_initial_stream_window_size(STREAM_WINDOW)
            .http2_initial_connection_window_size(CONNECTION_WINDOW)
            .http2_keep_alive_interval(PING_INTERVAL)
            .http2_keep_alive_timeout(PING_INTERVAL)
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
