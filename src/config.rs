//! The configuration file: every option, its default and its meaning. No file at all means good defaults.
//!
//! An unknown key is an error, with its line: a misspelt option that is silently ignored is worse than a daemon that does not
//! start. `docs/CONFIGURATION.md` lists the same options in prose.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

#[cfg(test)]
mod tests;
mod values;

pub use values::ByteSize;
use values::{address_text, optional_address, seconds};

/// Where the configuration is read from unless `--config` names another file.
pub const DEFAULT_PATH: &str = "/etc/lazuli/config.toml";

/// Everything that can be configured.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Directory of everything Lazuli keeps. The default is where kubelet's disk accounting looks on every containerd version.
    pub root: PathBuf,
    /// Unix socket on which containerd finds the snapshots service.
    pub address: PathBuf,
    /// Unix socket of containerd itself, for looking chain ids up in its content store.
    pub containerd_address: PathBuf,
    /// Address of `/metrics`, `/healthz`, `/readyz` and `/status`; an empty text switches them off.
    #[serde(deserialize_with = "optional_address", serialize_with = "address_text")]
    pub admin_address: Option<SocketAddr>,
    /// Logs.
    pub log: LogConfig,
    /// Registries.
    pub registry: RegistryConfig,
    /// The cache on disk.
    pub cache: CacheConfig,
    /// Fetching.
    pub fetch: FetchConfig,
    /// Indexes of layers that machines share.
    pub index: IndexConfig,
    /// Formats of layers.
    pub formats: FormatsConfig,
    /// FUSE.
    pub fuse: FuseConfig,
    /// Memory.
    pub memory: MemoryConfig,
    /// containerd's content store.
    pub content: ContentConfig,
    /// What is learned of starts.
    pub trace: TraceConfig,
}

/// Logs.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// `error`, `warn`, `info`, `debug`, `trace`, or a filter like `info,lazuli::fetch=debug`.
    pub level: String,
    /// `text` or `json`.
    pub format: LogFormat,
}

/// Form of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Registries.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct RegistryConfig {
    /// Directories of containerd's `hosts.toml` files, searched in order.
    pub config_path: Vec<PathBuf>,
    /// docker's `config.json`; by default `$DOCKER_CONFIG/config.json`, then `~/.docker/config.json`, also where there is no `HOME`.
    pub docker_config: Option<PathBuf>,
    /// User names and passwords by registry host (`registry.example:5000`).
    pub credentials: BTreeMap<String, Credential>,
    /// Real addresses of hosts that containerd's content labels name without their port: `"127.0.0.1" = ["127.0.0.1:5000"]`.
    pub hosts: BTreeMap<String, Vec<String>>,
    /// Hosts spoken to with plain HTTP. Loopback addresses always are, unless a `hosts.toml` says https.
    pub plain_http: Vec<String>,
    /// Longest wait for a connection, in seconds.
    #[serde(with = "seconds")]
    pub connect_timeout: Duration,
    /// Longest silence within an answer, in seconds. There is no limit on the whole of an answer.
    #[serde(with = "seconds")]
    pub idle_timeout: Duration,
    /// Attempts at one request over all hosts, the first included.
    pub attempts: u32,
}

/// A static user name and password.
#[derive(Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Credential {
    /// User name.
    pub username: String,
    /// Password or token.
    #[serde(skip_serializing)]
    pub password: String,
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential")
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

/// The cache on disk.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct CacheConfig {
    /// Most bytes of layers kept on disk; 0 means no limit but `min_free`.
    pub max_size: ByteSize,
    /// Bytes of the file system that are left free, whatever it costs.
    pub min_free: ByteSize,
    /// How full the file system of the root may get, in percent, before layers that no snapshot refers to give way; 100 means never.
    pub high_percent: u8,
    /// How full it may still be after they gave way.
    pub low_percent: u8,
}

/// Fetching.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct FetchConfig {
    /// Largest ranged request, in bytes of the blob.
    pub max_request: ByteSize,
    /// Ranged requests to one host at once, at most: how many it is follows the link.
    pub max_concurrent_requests: usize,
    /// Layers of one repository that are streamed from one host at once.
    pub max_concurrent_streams: usize,
    /// Connections over which a layer is streamed at most, if one does not fill the link; 1: never more than one.
    pub max_stream_connections: usize,
    /// Memory for bytes that were downloaded and not yet written, over all streams; at most a quarter of `memory.budget`.
    pub stream_memory: ByteSize,
    /// Longest time a reader waits before it gets an I/O error, in seconds; less where the kernel has a limit of its own.
    #[serde(with = "seconds")]
    pub read_deadline: Duration,
    /// When layers that are read lazily are fetched as a whole.
    pub fill: Fill,
    /// Most bytes in a second for which nobody waits: of filling, and of completing images. 0 means as many as there are.
    pub background_rate: ByteSize,
}

/// When layers that are read lazily are fetched as a whole.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Fill {
    /// Never: only what is read, and what lies beside it, is fetched.
    Off,
    /// When nobody has waited for a byte for a while.
    #[default]
    Idle,
}

/// Indexes of layers that machines share: who has one need not stream the layer.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct IndexConfig {
    /// Look for a shared index before a layer is streamed. Nobody is asked where no answer could be trusted.
    pub enabled: bool,
    /// The cluster's index repository (`registry.example/lazuli/index`): looked in first, and published to. Empty: none.
    pub repository: String,
    /// Longest search for an index before its layer is streamed, in seconds.
    #[serde(with = "seconds")]
    pub lookup_deadline: Duration,
    /// Publish indexes that were built here: in `repository`, or without one beside the image.
    pub publish: bool,
    /// Repositories whose unsigned indexes are trusted, beside `repository`: `registry.example/team/app`, or all below a path with
    /// `registry.example/team/*`.
    pub trusted_repositories: Vec<String>,
    /// Files with ed25519 public keys (PEM): what one of them has signed is trusted wherever it lies.
    pub public_keys: Vec<PathBuf>,
    /// Believe only what the image's own manifest names and what a key has signed.
    pub require_signature: bool,
    /// File with the ed25519 private key (PEM, PKCS#8) that signs what is published.
    pub signing_key: Option<PathBuf>,
    /// Use SOCI indexes: those that an image's manifest names, and those about an image in the repositories that are trusted here.
    pub soci: bool,
    /// SOCI indexes to use, by the digest of the image's manifest: `"sha256:<manifest>" = "sha256:<index>"`.
    pub soci_indexes: BTreeMap<String, String>,
}

/// containerd's content store.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct ContentConfig {
    /// When the blobs of lazily pulled images are written into it.
    pub complete: Complete,
    /// Write a layer that is being streamed and left to containerd into it, instead of having containerd fetch it once more.
    pub lend: bool,
}

impl Default for ContentConfig {
    fn default() -> Self {
        ContentConfig {
            complete: Complete::default(),
            lend: true,
        }
    }
}

/// What is learned of starts.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct TraceConfig {
    /// Record what containers read while they start, and fetch that ahead when their image is pulled again.
    pub enabled: bool,
    /// How long a container must have read nothing new for its start to be over, in seconds.
    #[serde(with = "seconds")]
    pub settle: Duration,
    /// Fetch ahead what an image of which nothing is known will read to start, as far as what it runs tells.
    pub walk: bool,
}

/// When images are completed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Complete {
    /// When `lazuli complete` asks for it.
    #[default]
    Off,
    /// When nobody has waited for a byte for a while.
    Idle,
    /// As soon as they are pulled.
    Always,
}

/// Formats of layers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct FormatsConfig {
    /// Whether a layer with a footer of the stargz format that came before eStargz is read lazily, as far as its table of contents has
    /// the digests for that. Otherwise it is streamed.
    pub allow_legacy_estargz: bool,
}

/// FUSE.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct FuseConfig {
    /// Threads that answer the kernel; each holds a buffer of 16 MiB of address space. 0 means one per processor, at least 4 and at most 8.
    pub threads: usize,
    /// What the kernel is shown of a layer.
    pub face: FaceChoice,
}

/// Memory.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryConfig {
    /// Most bytes for what grows with what comes from outside: tables of contents, bodies, decoders, streams, indexes. Who needs more waits.
    pub budget: ByteSize,
}

/// Which face of a layer serves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FaceChoice {
    /// The image where the kernel can do it, else the tree.
    #[default]
    Auto,
    /// EROFS metadata over the layer's bytes. A kernel that cannot do it is an error at the start.
    Image,
    /// FUSE directories.
    Tree,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            root: "/var/lib/containerd/io.containerd.snapshotter.v1.lazuli".into(),
            address: "/run/lazuli/lazuli.sock".into(),
            containerd_address: "/run/containerd/containerd.sock".into(),
            admin_address: Some(SocketAddr::from(([127, 0, 0, 1], 8987))),
            log: LogConfig::default(),
            registry: RegistryConfig::default(),
            cache: CacheConfig::default(),
            fetch: FetchConfig::default(),
            index: IndexConfig::default(),
            formats: FormatsConfig::default(),
            fuse: FuseConfig::default(),
            memory: MemoryConfig::default(),
            content: ContentConfig::default(),
            trace: TraceConfig::default(),
        }
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        LogConfig {
            level: "info".to_owned(),
            format: LogFormat::Text,
        }
    }
}

impl Default for RegistryConfig {
    fn default() -> Self {
        RegistryConfig {
            config_path: vec!["/etc/containerd/certs.d".into(), "/etc/docker/certs.d".into()],
            docker_config: None,
            credentials: BTreeMap::new(),
            hosts: BTreeMap::new(),
            plain_http: Vec::new(),
            connect_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(30),
            attempts: 6,
        }
    }
}

impl Default for CacheConfig {
    fn default() -> Self {
        CacheConfig {
            max_size: ByteSize(0),
            min_free: ByteSize(1 << 30),
            // kubelet removes images at 85 and evicts pods when less than 15 percent are free (imageGCHighThresholdPercent, imagefs.available).
            // It rounds, and looks every few minutes: five points below it, there is time to give way before it looks. Five points more are
            // freed, so that the disk is below kubelet's own low mark (80) afterwards, and not full again with the next image.
            high_percent: 80,
            low_percent: 75,
        }
    }
}

impl CacheConfig {
    fn check(&self) -> Result<(), ConfigError> {
        let (high, low) = (self.high_percent, self.low_percent);
        let fail = |key, problem| Err(ConfigError::Value { key, problem });
        if !(2..=100).contains(&high) {
            return fail("cache.high_percent", format!("{high} is not between 2 and 100"));
        }
        if !(1..high).contains(&low) {
            let most = high - 1;
            return fail(
                "cache.low_percent",
                format!("{low} is not between 1 and {most}, one less than cache.high_percent"),
            );
        }
        Ok(())
    }
}

impl Default for FetchConfig {
    fn default() -> Self {
        FetchConfig {
            max_request: ByteSize(4 << 20),
            // Fewer than the streams that servers let an HTTP/2 connection have (100 to 250), so that none waits there; of 100 kB each, they
            // fill 500 Mbit/s over 100 ms.
            max_concurrent_requests: 64,
            max_concurrent_streams: 4,
            max_stream_connections: 12,
            stream_memory: ByteSize(64 << 20),
            read_deadline: Duration::from_secs(900),
            fill: Fill::Idle,
            background_rate: ByteSize(0),
        }
    }
}

impl Default for TraceConfig {
    fn default() -> Self {
        TraceConfig {
            enabled: true,
            // A program that waits for another one (a database, a lock) pauses for seconds and goes on reading.
            settle: Duration::from_secs(10),
            walk: true,
        }
    }
}

impl Default for MemoryConfig {
    fn default() -> Self {
        MemoryConfig {
            budget: ByteSize(512 << 20),
        }
    }
}

impl Default for IndexConfig {
    fn default() -> Self {
        IndexConfig {
            enabled: true,
            repository: String::new(),
            lookup_deadline: Duration::from_secs(2),
            publish: false,
            trusted_repositories: Vec::new(),
            public_keys: Vec::new(),
            require_signature: false,
            signing_key: None,
            soci: true,
            soci_indexes: BTreeMap::new(),
        }
    }
}

impl IndexConfig {
    fn check(&self) -> Result<(), ConfigError> {
        let fail = |key, problem: String| Err(ConfigError::Value { key, problem });
        let named = |name: &str| {
            let (host, path) = name.split_once('/').unwrap_or((name, ""));
            let plain = |text: &str| !text.is_empty() && !text.contains(['@', '*', ' ']) && !text.ends_with('/');
            plain(host) && plain(path) && !path.contains(':')
        };
        if !self.repository.is_empty() && !named(&self.repository) {
            let problem = format!(
                "{:?} is not a repository such as registry.example/lazuli/index, without a tag",
                self.repository
            );
            return fail("index.repository", problem);
        }
        for name in &self.trusted_repositories {
            let all_below = name.strip_suffix("/*").is_some_and(|path| named(&format!("{path}/x")));
            if !named(name) && !all_below {
                let problem = format!("{name:?} is neither registry.example/repository nor registry.example/path/*");
                return fail("index.trusted_repositories", problem);
            }
        }
        if self.require_signature && self.public_keys.is_empty() {
            let problem = "it needs a key in index.public_keys, or nothing can be trusted".to_owned();
            return fail("index.require_signature", problem);
        }
        Ok(())
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The file is not valid TOML, or has a key that does not exist, or a value of the wrong kind.
    #[error("{path}: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, column and cause.
        message: String,
    },
    /// A value is not possible.
    #[error("{key}: {problem}")]
    Value {
        /// The option.
        key: &'static str,
        /// What is wrong, and what is possible.
        problem: String,
    },
}

impl Config {
    /// Reads the file at `path`, or at [`DEFAULT_PATH`] if that exists, or gives the defaults.
    ///
    /// # Errors
    /// [`ConfigError`] if a named file is missing, or any file is not valid.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let (path, required) = match path {
            Some(path) => (path, true),
            None => (Path::new(DEFAULT_PATH), false),
        };
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !required => return Ok(Config::default()),
            Err(source) => {
                return Err(ConfigError::Read {
                    path: path.to_owned(),
                    source,
                });
            }
        };
        Self::parse(&text, path)
    }

    /// Parses and checks the text of a configuration file; `path` is for messages.
    ///
    /// # Errors
    /// [`ConfigError::Parse`] or [`ConfigError::Value`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Config = toml::from_str(text).map_err(|error| ConfigError::Parse {
            path: path.to_owned(),
            message: error.to_string().trim_end().to_owned(),
        })?;
        config.check()?;
        Ok(config)
    }

    /// Checks the values that have bounds.
    ///
    /// # Errors
    /// [`ConfigError::Value`] names the option.
    pub fn check(&self) -> Result<(), ConfigError> {
        let fail = |key, problem: String| Err(ConfigError::Value { key, problem });
        for (key, path) in [
            ("root", &self.root),
            ("address", &self.address),
            ("containerd_address", &self.containerd_address),
        ] {
            if !path.is_absolute() {
                return fail(key, format!("{} is not an absolute path", path.display()));
            }
        }
        // overlayfs splits its options at these characters.
        if self.root.to_string_lossy().contains([':', ',', '\\', '"']) {
            return fail(
                "root",
                format!("{} may not contain any of : , \\ \"", self.root.display()),
            );
        }
        // sockaddr_un holds 108 bytes with its terminator, and the socket is made under a name that is one byte longer.
        if self.address.as_os_str().len() > 106 {
            return fail("address", "a socket path has at most 106 bytes".to_owned());
        }
        if tracing_subscriber::EnvFilter::try_new(&self.log.level).is_err() {
            return fail(
                "log.level",
                format!("{:?} is not a log level or filter", self.log.level),
            );
        }
        let bounds: [(&'static str, u64, u64, u64); 12] = [
            (
                "registry.connect_timeout",
                self.registry.connect_timeout.as_secs(),
                1,
                3600,
            ),
            ("registry.idle_timeout", self.registry.idle_timeout.as_secs(), 1, 3600),
            ("registry.attempts", self.registry.attempts.into(), 1, 100),
            ("fetch.max_request", self.fetch.max_request.0, 64 << 10, 64 << 20),
            (
                "fetch.max_concurrent_requests",
                self.fetch.max_concurrent_requests as u64,
                1,
                1024,
            ),
            (
                "fetch.max_concurrent_streams",
                self.fetch.max_concurrent_streams as u64,
                1,
                64,
            ),
            (
                "fetch.max_stream_connections",
                self.fetch.max_stream_connections as u64,
                1,
                64,
            ),
            ("fetch.stream_memory", self.fetch.stream_memory.0, 4 << 20, 64 << 30),
            ("memory.budget", self.memory.budget.0, 64 << 20, 1 << 40),
            ("fetch.read_deadline", self.fetch.read_deadline.as_secs(), 1, 86_400),
            // Less than the longest start that is recorded.
            ("trace.settle", self.trace.settle.as_secs(), 1, 100),
            ("index.lookup_deadline", self.index.lookup_deadline.as_secs(), 1, 60),
        ];
        for (key, value, least, most) in bounds {
            if !(least..=most).contains(&value) {
                return fail(key, format!("{value} is not between {least} and {most}"));
            }
        }
        if self.fuse.threads > 64 {
            return fail("fuse.threads", format!("{} is more than 64", self.fuse.threads));
        }
        self.cache.check()?;
        self.index.check()
    }
}
