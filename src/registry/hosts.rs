//! The hosts of a registry: containerd's `hosts.toml` directories.
//!
//! For the registry `host:port` the directories of `config_path` are searched in order for `host_port_`, `host:port` and
//! `_default`; the first that exists is taken. Its `hosts.toml` gives the endpoints in the order in which they are asked; without
//! one, docker's certificate files there (`*.crt`, `*.cert` with `*.key`) apply to the registry itself. Endpoints with the same TLS identity
//! share one connection pool.
//!
//! Files are read again when they change, so nothing has to be restarted. They may be in the middle of being written then: running
//! containers go on with what was read last ([`For::Content`]), until the files can be used again, and pulls are told what is wrong
//! ([`For::Names`]). What has become empty, or has vanished, is believed after [`REWRITTEN`] only.
//!
//! Two differences from containerd: a broken `hosts.toml` is an error instead of being passed over, and a loopback registry without
//! certificates is asked with plain HTTP only, not with TLS first.

use std::collections::{BTreeMap, HashMap};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue};
use url::Url;

use super::{RegistryError, lock};
use crate::config::RegistryConfig;

pub mod parse;
pub mod proxy;
#[cfg(test)]
mod tests;
mod tls;
pub(super) mod transport;
pub(super) mod wire;

pub use parse::{HostSpec, parse_hosts_toml};
use transport::{Clients, Pool};
use wire::Wire;

/// How long an answer about files on disk is taken as still true.
const RECHECK: Duration = Duration::from_secs(1);
/// How long a file that has become empty, or has vanished, is taken to be about to be written again: editors and configuration management need
/// less, and who means it waits no longer than that.
const REWRITTEN: Duration = Duration::from_secs(10);
/// Largest `hosts.toml` or certificate that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// File of a host's directory.
const HOSTS_TOML: &str = "hosts.toml";

/// One address at which a repository can be asked for.
#[derive(Debug)]
pub struct Endpoint {
    /// `host:port`, for logs, errors and credentials.
    pub name: String,
    /// Scheme, host and path, `/v2` included.
    pub base: Url,
    /// May be asked for content by digest.
    pub pull: bool,
    /// May be asked for tags.
    pub resolve: bool,
    /// May be given manifests and blobs.
    pub push: bool,
    /// Value of the `ns` parameter: the registry that this endpoint stands in for.
    pub namespace: Option<String>,
    /// Headers from `hosts.toml`. Never sent to another host.
    pub headers: HeaderMap,
    /// The connection pool.
    pub client: Wire,
    /// Another one to the same, in which every request has a connection of its own: HTTP/1.1, whatever the host offers.
    pub beside: Wire,
}

/// Finds endpoints, and remembers them while their files stay the same.
pub struct HostTable {
    config_path: Vec<PathBuf>,
    plain_http: Vec<String>,
    known: BTreeMap<String, Vec<String>>,
    clients: Clients,
    cached: Mutex<HashMap<String, Cached>>,
    /// Held by the one caller that looks at files, so that many first readers do not build a connection pool each.
    looking: Mutex<()>,
}

/// What endpoints are wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum For {
    /// Content with a digest, for somebody who reads it now: what was known last is better than nothing.
    Content,
    /// Names, and whatever can be tried again: as the files say now.
    Names,
}

/// What the files said when they last made sense.
#[derive(Clone)]
struct Cached {
    checked: Instant,
    stamps: Vec<Stamp>,
    endpoints: Arc<Vec<Arc<Endpoint>>>,
    /// The file or directory that says it; `None` if there is none, and the registry itself is asked.
    said_by: Option<PathBuf>,
    /// Why they are not what the files say now.
    problem: Option<Problem>,
}

/// What is wrong with the files now.
#[derive(Clone)]
struct Problem {
    error: RegistryError,
    since: Instant,
    /// Nothing, but that there is nothing left: that may be meant.
    vanished: bool,
}

/// What the files say.
struct Read {
    endpoints: Vec<Arc<Endpoint>>,
    said_by: Option<PathBuf>,
}

/// A file or directory that an answer depends on, and how it looked; `None` while it does not exist.
#[derive(Clone, PartialEq, Eq)]
struct Stamp {
    path: PathBuf,
    state: Option<(SystemTime, u64, u64)>,
}

impl Stamp {
    fn of(path: PathBuf) -> Self {
        let state = std::fs::metadata(&path).ok().map(|meta| {
            (
                meta.modified().unwrap_or(SystemTime::UNIX_EPOCH),
                meta.len(),
                meta.ino(),
            )
        });
        Stamp { path, state }
    }
}

impl HostTable {
    /// A table over the directories of `config`. Hosts are asked through `proxies`.
    pub fn new(config: &RegistryConfig, proxies: proxy::Proxies) -> Self {
        HostTable {
            config_path: config.config_path.clone(),
            plain_http: config.plain_http.clone(),
            known: config.hosts.clone(),
            clients: Clients::new(config.connect_timeout, config.idle_timeout, proxies),
            cached: Mutex::new(HashMap::new()),
            looking: Mutex::new(()),
        }
    }

    /// The endpoints of `host` as of at most a second ago; otherwise as [`HostTable::endpoints`].
    ///
    /// # Errors
    /// As [`HostTable::endpoints`].
    pub fn fresh(&self, host: &str, wanted: For) -> Result<Arc<Vec<Arc<Endpoint>>>, RegistryError> {
        let _looking = lock(&self.looking);
        match self.recent(host, wanted) {
            Some(endpoints) => Ok(endpoints),
            None => self.endpoints(host, wanted),
        }
    }

    /// The endpoints of the registry `host`, in the order in which they are asked. Reads small local files: call it off the async
    /// workers unless [`HostTable::recent`] answered.
    ///
    /// # Errors
    /// [`RegistryError::Config`] for a file that cannot be used, [`RegistryError::InvalidReference`] for an impossible host.
    pub fn endpoints(&self, host: &str, wanted: For) -> Result<Arc<Vec<Arc<Endpoint>>>, RegistryError> {
        let now = Instant::now();
        let known = lock(&self.cached).get(host).cloned();
        if let Some(known) = &known
            && known.problem.is_none()
            && known.stamps.iter().all(|stamp| Stamp::of(stamp.path.clone()) == *stamp)
        {
            return self.keep(host, known.clone(), now, wanted);
        }
        let mut stamps = Vec::new();
        let read = self.load(host, &mut stamps);
        let cached = match (read, known) {
            (Err(error), None) => return Err(error),
            (Err(error), Some(known)) => known.with_problem(host, error, false, now),
            (Ok(read), Some(known)) if known.said_by.is_some() && read.said_by.is_none() && known.is_rewritten(now) => {
                let said_by = known.said_by.clone().unwrap_or_default();
                let error = RegistryError::Config {
                    path: said_by.display().to_string(),
                    problem: format!(
                        "it says nothing any more; that is believed after {} s",
                        REWRITTEN.as_secs()
                    ),
                };
                known.with_problem(host, error, true, now)
            }
            (Ok(read), _) => Cached {
                checked: now,
                stamps,
                endpoints: Arc::new(read.endpoints),
                said_by: read.said_by,
                problem: None,
            },
        };
        self.keep(host, cached, now, wanted)
    }

    /// Remembers what is known of `host`, and answers with it.
    fn keep(
        &self,
        host: &str,
        mut cached: Cached,
        now: Instant,
        wanted: For,
    ) -> Result<Arc<Vec<Arc<Endpoint>>>, RegistryError> {
        cached.checked = now;
        let answer = cached.answer(wanted);
        lock(&self.cached).insert(host.to_owned(), cached);
        answer
    }

    /// The endpoints of `host` if they were looked up within the last second.
    pub fn recent(&self, host: &str, wanted: For) -> Option<Arc<Vec<Arc<Endpoint>>>> {
        let cached = lock(&self.cached);
        let cached = cached.get(host)?;
        let fresh = cached.checked.elapsed() < RECHECK;
        cached.answer(wanted).ok().filter(|_| fresh)
    }

    /// Files that cannot be used, while what was read of them before is: for people.
    pub fn problems(&self) -> Vec<String> {
        let cached = lock(&self.cached);
        let problems = cached.iter().filter_map(|(host, cached)| {
            let problem = cached.problem.as_ref()?;
            Some(format!("{}; {host} is asked as before", problem.error))
        });
        let mut problems: Vec<String> = problems.collect();
        problems.sort();
        problems
    }

    /// The proxy that is asked for an address, as it may be shown; `None` if none is.
    pub fn proxy(&self, url: &Url) -> Option<String> {
        self.clients.proxy(url)
    }

    /// Names with a port that `hostname` may stand for: containerd's labels drop the port. From the configuration's table, from
    /// the names of `hosts.toml` directories, then the name itself.
    pub fn resolve_ports(&self, hostname: &str) -> Vec<String> {
        let mut names: Vec<String> = self.known.get(hostname).cloned().unwrap_or_default();
        for root in &self.config_path {
            let Ok(entries) = std::fs::read_dir(root) else { continue };
            let mut found: Vec<String> = entries
                .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
                .filter_map(|name| port_of(&name, hostname).map(|port| format!("{hostname}:{port}")))
                .collect();
            found.sort();
            names.extend(found);
        }
        names.push(hostname.to_owned());
        let mut seen = std::collections::HashSet::new();
        names.retain(|name| seen.insert(name.clone()));
        names
    }

    fn load(&self, host: &str, stamps: &mut Vec<Stamp>) -> Result<Read, RegistryError> {
        let (specs, said_by) = match self.directory(host, stamps) {
            Some(dir) => read_directory(&dir, stamps)?,
            None => (vec![all_capabilities()], None),
        };
        let mut endpoints = Vec::with_capacity(specs.len());
        for mut spec in specs {
            let base = match spec.base.take() {
                Some(base) => base,
                None => {
                    // As containerd does: what is said of capabilities does not hold for the registry itself.
                    (spec.pull, spec.resolve, spec.push) = (true, true, true);
                    // Who gives certificates means TLS, even on loopback.
                    let tls = !spec.ca.is_empty() || !spec.client.is_empty();
                    self.own_address(host, tls)?
                }
            };
            endpoints.push(Arc::new(self.endpoint(host, base, spec, stamps)?));
        }
        Ok(Read { endpoints, said_by })
    }

    /// The first directory that exists for `host`.
    fn directory(&self, host: &str, stamps: &mut Vec<Stamp>) -> Option<PathBuf> {
        // The name becomes a path below: nothing that could lead elsewhere.
        if host.is_empty() || host.starts_with('.') || host.contains(['/', '\0']) {
            return None;
        }
        for root in &self.config_path {
            for name in directory_names(host) {
                let stamp = Stamp::of(root.join(name));
                let exists = stamp.state.is_some();
                stamps.push(stamp.clone());
                if exists {
                    return Some(stamp.path);
                }
            }
        }
        None
    }

    fn own_address(&self, host: &str, tls: bool) -> Result<Url, RegistryError> {
        let address = match host {
            "docker.io" => "registry-1.docker.io",
            other => other,
        };
        let plain = (is_loopback(address) && !tls) || self.plain_http.iter().any(|name| name == host);
        let scheme = if plain { "http" } else { "https" };
        Url::parse(&format!("{scheme}://{address}/v2"))
            .ok()
            .filter(|url| url.username().is_empty() && url.path() == "/v2")
            .ok_or_else(|| RegistryError::InvalidReference {
                reference: host.to_owned(),
                what: "it is not a host name".to_owned(),
            })
    }

    fn endpoint(
        &self,
        host: &str,
        base: Url,
        spec: HostSpec,
        stamps: &mut Vec<Stamp>,
    ) -> Result<Endpoint, RegistryError> {
        let name = authority(&base);
        let stands_in = name != host && !(host == "docker.io" && name == "registry-1.docker.io");
        let mut headers = HeaderMap::new();
        for (key, value) in &spec.headers {
            let problem = || RegistryError::Config {
                path: format!("{HOSTS_TOML} of {host}"),
                problem: format!("the header {key:?} or its value cannot be sent"),
            };
            let key_name = HeaderName::from_bytes(key.as_bytes()).map_err(|_| problem())?;
            let mut value = HeaderValue::from_str(value).map_err(|_| problem())?;
            value.set_sensitive(true);
            headers.append(key_name, value);
        }
        stamps.extend(
            spec.ca
                .iter()
                .chain(spec.client.iter().map(|(cert, _)| cert))
                .chain(spec.client.iter().filter_map(|(_, key)| key.as_ref()))
                .map(|path| Stamp::of(path.clone())),
        );
        let Pool { client, beside } = self.clients.pool(&spec)?;
        Ok(Endpoint {
            client,
            beside,
            name,
            base,
            pull: spec.pull,
            resolve: spec.resolve,
            push: spec.push,
            namespace: stands_in.then(|| host.to_owned()),
            headers,
        })
    }
}

/// `host:port` of an address, the port only if it is not the scheme's own.
pub(super) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

fn all_capabilities() -> HostSpec {
    HostSpec {
        pull: true,
        resolve: true,
        push: true,
        ..HostSpec::default()
    }
}

/// Names of a host's directory, best first.
fn directory_names(host: &str) -> Vec<String> {
    let mut names = Vec::with_capacity(3);
    if let Some((name, port)) = host.rsplit_once(':')
        && !name.is_empty()
    {
        names.push(format!("{name}_{port}_"));
    }
    names.push(host.to_owned());
    names.push("_default".to_owned());
    names
}

/// The port in the directory name `name`, if that is `host:port` or `host_port_`.
fn port_of<'a>(name: &'a str, host: &str) -> Option<&'a str> {
    let rest = name.strip_prefix(host)?;
    let port = match rest.strip_prefix(':') {
        Some(port) => port,
        None => rest.strip_prefix('_')?.strip_suffix('_')?,
    };
    port.parse::<u16>().ok().map(|_| port)
}

/// Whether a registry name means this machine, as containerd sees it.
pub(super) fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map_or(rest, |(address, _)| address),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name == "localhost"
        || name
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

impl Cached {
    fn answer(&self, wanted: For) -> Result<Arc<Vec<Arc<Endpoint>>>, RegistryError> {
        match &self.problem {
            Some(problem) if wanted == For::Names && !problem.vanished => Err(problem.error.clone()),
            _ => Ok(Arc::clone(&self.endpoints)),
        }
    }

    /// Whether what has vanished may be on its way back.
    fn is_rewritten(&self, now: Instant) -> bool {
        let since = self.problem.as_ref().map(|problem| problem.since);
        since.is_none_or(|since| now.saturating_duration_since(since) < REWRITTEN)
    }

    /// The same, with what is wrong now; it is said once.
    fn with_problem(self, host: &str, error: RegistryError, vanished: bool, now: Instant) -> Self {
        let before = self.problem.as_ref().map(|problem| problem.error.to_string());
        if before.as_ref() != Some(&error.to_string()) {
            tracing::error!(%host, %error, "what was read of this file before is used");
        }
        let since = self.problem.as_ref().map_or(now, |problem| problem.since);
        Cached {
            problem: Some(Problem { error, since, vanished }),
            ..self
        }
    }
}

/// What a host's directory says, and the file or directory that says it.
fn read_directory(dir: &Path, stamps: &mut Vec<Stamp>) -> Result<(Vec<HostSpec>, Option<PathBuf>), RegistryError> {
    let file = dir.join(HOSTS_TOML);
    stamps.push(Stamp::of(file.clone()));
    match read_file(&file) {
        Ok(bytes) if !bytes.is_empty() => {
            let problem = |problem| RegistryError::Config {
                path: file.display().to_string(),
                problem,
            };
            let text = std::str::from_utf8(&bytes).map_err(|_| problem("it is not UTF-8 text".to_owned()))?;
            let specs = parse_hosts_toml(text, dir).map_err(problem)?;
            // What holds comments only is as good as empty.
            let says = specs.len() > 1 || specs.iter().any(|spec| *spec != all_capabilities());
            Ok((specs, says.then_some(file)))
        }
        Ok(_) => certificate_files(dir),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => certificate_files(dir),
        Err(error) => Err(config_error(&file, &error)),
    }
}

/// Docker's form of a host's directory: certificates only.
fn certificate_files(dir: &Path) -> Result<(Vec<HostSpec>, Option<PathBuf>), RegistryError> {
    let mut spec = all_capabilities();
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) => return Err(config_error(dir, &error)),
    };
    let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.sort();
    for file in files {
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => spec.ca.push(file),
            Some("cert") => {
                let key = file.with_extension("key");
                spec.client.push((file, Some(key)));
            }
            _ => {}
        }
    }
    let says = !spec.ca.is_empty() || !spec.client.is_empty();
    Ok((vec![spec], says.then(|| dir.to_owned())))
}

fn read_file(path: &Path) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(std::io::Error::other(format!("it has more than {MAX_FILE} bytes")));
    }
    Ok(bytes)
}

fn config_error(path: &Path, error: &std::io::Error) -> RegistryError {
    RegistryError::Config {
        path: path.display().to_string(),
        problem: format!("cannot be read: {error}"),
    }
}
