//! Wiring: builds every room in order, runs them, and takes them down again.
//!
//! Order of the start: lock the root directory, open the cache and the database, mount FUSE, try the faces, bring the layers back, and only then
//! listen: containerd never meets a daemon that does not know its snapshots yet. Order of the end: stop listening, answer what is
//! under way, close the cache (which marks it clean), unmount.

use std::collections::HashMap;
use std::fs::{DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

use crate::admin::Admin;
use crate::cache::{self, Cache, CacheError};
use crate::catalog::containerd::{Containerd, MAX_MESSAGE};
use crate::catalog::loader::Loader;
use crate::catalog::shared::SharedIndexes;
use crate::catalog::shared::publish::Publisher;
use crate::catalog::shared::trust::IndexError;
use crate::catalog::soci::SociIndexes;
use crate::catalog::sources::Repositories;
use crate::catalog::variants::DIRECTORY as VARIANTS_DIRECTORY;
use crate::catalog::{Catalog, Handle, Parts};
use crate::config::{Config, LogConfig, LogFormat};
use crate::fetch::Fetcher;
use crate::fs::{Faces, FacesOptions, FsError, Session, SessionOptions};
use crate::layer::Digest;
use crate::metrics::Metrics;
use crate::proto::control::control_server::{Control, ControlServer};
use crate::proto::control::{StatusRequest, StatusResponse};
use crate::registry::{Registry, RegistryError};
use crate::snapshots::{Service, SnapshotsError};
use crate::store::{Store, StoreError};
use crate::sync::{Budget, blocking};

mod stop;

pub use stop::{Stop, StopSignal, stop_signal};

/// Longest time that the kernel may take for one mount; more, and something is broken. It takes a millisecond.
pub const MOUNT_DEADLINE: Duration = Duration::from_secs(10);

/// Directory of the faces' mount points and metadata, below the root directory.
const FACES_DIRECTORY: &str = "faces";

/// Longest wait for calls under way when the daemon is told to end.
const DRAIN: Duration = Duration::from_secs(10);

/// Why the daemon cannot run.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// A directory, socket or address that cannot be used.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, and to what.
        what: String,
        /// The cause.
        source: io::Error,
    },
    /// Another daemon works there.
    #[error("{what} is in use by another lazuli; end it first, or choose another {option}")]
    InUse {
        /// The directory or socket.
        what: PathBuf,
        /// The option that chooses it.
        option: &'static str,
    },
    /// The cache cannot be opened.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The database cannot be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// FUSE cannot be mounted.
    #[error(transparent)]
    Fs(#[from] FsError),
    /// The configuration of shared indexes cannot be used.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The configuration of registries cannot be used.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The snapshots service cannot start.
    #[error(transparent)]
    Snapshots(#[from] SnapshotsError),
    /// The listening socket failed.
    #[error("serving on {address}: {source}")]
    Serve {
        /// The socket.
        address: PathBuf,
        /// The cause.
        source: tonic::transport::Error,
    },
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> DaemonError {
    let what = what.into();
    move |source| DaemonError::Io { what, source }
}

/// Runs the daemon until SIGTERM, SIGINT or SIGHUP.
///
/// # Errors
/// [`DaemonError`] when it cannot start, or its socket fails.
pub fn serve(config: Config) -> Result<(), DaemonError> {
    crate::sys::malloc::give_back_what_is_freed();
    init_logs(&config.log);
    if let Err(error) = crate::sys::limits::raise_open_files() {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("lazuli")
        .build()
        .map_err(io_error("starting threads"))?;
    let result = runtime.block_on(run(config));
    // A blocking task may hang on a dead file system; the process ends regardless.
    runtime.shutdown_timeout(DRAIN);
    result
}

/// Sends logs to standard error, as configured.
pub fn init_logs(config: &LogConfig) {
    let filter = tracing_subscriber::EnvFilter::try_new(&config.level).unwrap_or_default();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // It would tell of a full disk behind the log by writing to the same place, and panic.
        .log_internal_errors(false)
        .with_writer(io::stderr);
    // A second initialisation in one process (tests) keeps the first.
    let _ = match config.format {
        LogFormat::Json => builder.json().try_init(),
        LogFormat::Text => builder.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).try_init(),
    };
}

async fn run(config: Config) -> Result<(), DaemonError> {
    tracing::info!(version = env!("CARGO_PKG_VERSION"), root = %config.root.display(), "starting");
    let stop = stop_signal().map_err(io_error("listening to signals"))?;
    let _lock = prepare_root(&config.root)?;
    let metrics = Arc::new(Metrics::new());
    let registry = Registry::new(&config.registry, Arc::clone(&metrics))?;
    let (root, limits, counts) = (config.root.clone(), config.cache.clone(), Arc::clone(&metrics));
    let opened = blocking(move || -> Result<_, DaemonError> {
        // The database first: it knows what was believed of the layers of an older cache.
        let store = Store::open_counted(&root.join("metadata.redb"), Arc::clone(&counts))?;
        cache::adopt::adopt(&root, &names_of_layers(&store)?)?;
        let cache = Cache::open(&root, &limits, counts)?;
        // Names and attributes of layers that are kept elsewhere are bytes of layers too.
        cache.also_count([VARIANTS_DIRECTORY, FACES_DIRECTORY].map(|dir| root.join(dir)));
        Ok((cache, Arc::new(store)))
    });
    let (cache, store) = opened.await?;
    let tended = Arc::clone(&cache);
    let runtime = tokio::runtime::Handle::current();
    let fetcher = Fetcher::new(
        &config.fetch,
        Budget::new(config.memory.budget.0),
        Arc::clone(&cache),
        runtime.clone(),
        Arc::clone(&metrics),
    );
    let repositories = Repositories::scheduled(Arc::clone(&registry), Arc::clone(&fetcher));
    let (places, budget, counts) = (repositories.clone(), Arc::clone(fetcher.memory()), Arc::clone(&metrics));
    let soci = SociIndexes::new(&config.index, places, budget, counts)?;
    let (budget, counts) = (Arc::clone(fetcher.memory()), Arc::clone(&metrics));
    let shared = SharedIndexes::new(&config.index, repositories, budget, counts)?;
    let (copy, finder, counts) = (Arc::clone(&registry), Arc::clone(&shared), Arc::clone(&metrics));
    let publisher = Publisher::new(&config.index, copy, finder, counts)?;
    let mountpoint = config.root.join("fuse");
    let options = SessionOptions {
        threads: config.fuse.threads,
        read_deadline: config.fetch.read_deadline,
        source_name: "lazuli".to_owned(),
    };
    let session = Session::mount(&mountpoint, options, runtime, Arc::clone(&metrics))?;
    let options = FacesOptions {
        choice: config.fuse.face,
        dir: config.root.join(FACES_DIRECTORY),
        deadline: MOUNT_DEADLINE,
    };
    let faces_metrics = Arc::clone(&metrics);
    let faces = tokio::task::spawn_blocking(move || Faces::open(session, options, faces_metrics)).await;
    let faces = faces.map_err(|error| io_error("looking for a face")(io::Error::other(error)))??;
    let catalog = Catalog::new(Parts {
        containerd: Containerd::new(&config.containerd_address),
        registry,
        loader: Loader::new(cache, fetcher, config.formats.clone())
            .with_shared(shared)
            .with_soci(soci),
        faces,
        store: Arc::clone(&store),
        metrics: Arc::clone(&metrics),
        publisher,
        root: config.root.clone(),
        cache_max_bytes: config.cache.max_size.0,
    });
    let result = serve_catalog(&config, &catalog, &tended, store, metrics, mountpoint, stop).await;
    drop(tended);
    let closing = Arc::clone(&catalog);
    if tokio::time::timeout(DRAIN, tokio::task::spawn_blocking(move || closing.close()))
        .await
        .is_err()
    {
        tracing::warn!("the FUSE mount could not be taken away in time; the next start will do it");
    }
    tracing::info!("ended");
    result
}

async fn serve_catalog(
    config: &Config,
    catalog: &Arc<Catalog>,
    cache: &Arc<Cache>,
    store: Arc<Store>,
    metrics: Arc<Metrics>,
    mountpoint: PathBuf,
    stop: Stop,
) -> Result<(), DaemonError> {
    let (root, restored, counts) = (config.root.clone(), Arc::clone(catalog), Arc::clone(&metrics));
    let cache = Arc::clone(cache);
    let service = blocking(move || -> Result<_, DaemonError> {
        restored.restore(&referenced_layers(&store)?)?;
        // Not before: what snapshots refer to is pinned by now.
        cache
            .tend()
            .map_err(io_error("starting the thread that keeps the cache"))?;
        let layers = Arc::new(Handle(restored));
        Ok(Service::new(&root, store, layers, counts)?)
    });
    let late = async {
        stop.clone().await;
        tokio::time::sleep(DRAIN).await;
    };
    let service = tokio::select! {
        service = service => service?,
        () = late => {
            tracing::warn!("ended while layers were brought back; the next start will do it");
            return Ok(());
        }
    };
    let listener = listen(&config.address).await?;
    let admin = Admin::new(metrics, Arc::clone(catalog), mountpoint);
    if let Some(address) = config.admin_address {
        let (admin, stop) = (Arc::clone(&admin), stop.clone());
        // A port that somebody else has is no reason to leave a node without its snapshots.
        match TcpListener::bind(address).await {
            Err(error) => tracing::error!(%error, %address, "no metrics and no health: admin_address cannot be used"),
            Ok(listener) => {
                // With port 0 this is how one learns which it is.
                let address = listener.local_addr().unwrap_or(address);
                tracing::info!(%address, "metrics and health");
                drop(tokio::spawn(async move {
                    if let Err(error) = admin.serve(listener, stop.map(drop)).await {
                        tracing::error!(%error, "the admin address serves no more");
                    }
                }));
            }
        }
    }
    let control = ControlServer::new(ControlService(Arc::clone(catalog))).max_encoding_message_size(MAX_MESSAGE);
    admin.set_ready(true);
    tracing::info!(address = %config.address.display(), "serving");
    // Absent outside systemd; then there is nobody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let told = stop.clone();
    let serving = tonic::transport::Server::builder()
        .add_service(service.into_server())
        .add_service(control)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop.map(drop));
    let drained = async {
        let signal = told.await.name;
        tracing::info!(signal, "ending");
        admin.set_ready(false);
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        tokio::time::sleep(DRAIN).await;
    };
    let result = tokio::select! {
        result = serving => result.map_err(|source| DaemonError::Serve { address: config.address.clone(), source }),
        () = drained => Ok(()),
    };
    // Somebody else's socket by now, or gone already: either way not ours to mind.
    let _ = std::fs::remove_file(&config.address);
    result
}

/// Layers that snapshots refer to. A snapshot whose record is damaged refers to none that is known; it is reported.
fn referenced_layers(store: &Store) -> Result<Vec<Digest>, StoreError> {
    let mut layers = Vec::new();
    for (name, record) in store.snapshots()? {
        match record {
            Ok(record) => {
                layers.extend(record.layer);
                layers.extend(record.chain.into_iter().flatten());
            }
            Err(error) => tracing::error!(%error, snapshot = name, "its record is damaged"),
        }
    }
    Ok(layers)
}

/// By what layers are known, and what they were known by in older caches.
fn names_of_layers(store: &Store) -> Result<HashMap<Digest, Digest>, StoreError> {
    let layers = store.layers()?.into_iter();
    let records = layers
        .filter_map(|(_, record)| record.ok())
        .filter(|record| record.variant_of.is_none());
    Ok(records
        .map(|record| (record.formerly.unwrap_or(record.digest), record.digest))
        .collect())
}

/// Makes the root directory, which nobody but root may look into, and locks it against a second daemon.
fn prepare_root(root: &Path) -> Result<File, DaemonError> {
    let failed = || format!("root directory {}", root.display());
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(root)
        .map_err(io_error(failed()))?;
    std::fs::set_permissions(root, Permissions::from_mode(0o700)).map_err(io_error(failed()))?;
    let lock = File::create(root.join("lock")).map_err(io_error(failed()))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(std::fs::TryLockError::WouldBlock) => Err(DaemonError::InUse {
            what: root.to_owned(),
            option: "root",
        }),
        Err(std::fs::TryLockError::Error(source)) => Err(DaemonError::Io { what: failed(), source }),
    }
}

/// Listens on a unix socket that only root may use, replacing one that a dead daemon left.
async fn listen(address: &Path) -> Result<UnixListener, DaemonError> {
    let what = || format!("socket {}", address.display());
    if let Some(parent) = address.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(parent)
            .map_err(io_error(what()))?;
    }
    if UnixStream::connect(address).await.is_ok() {
        return Err(DaemonError::InUse {
            what: address.to_owned(),
            option: "address",
        });
    }
    match std::fs::remove_file(address) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error(what())(error)),
        _ => {}
    }
    // Bound under another name and renamed once it has its mode: nobody can connect in between.
    let mut hidden = address.as_os_str().to_owned();
    hidden.push("~");
    let hidden = PathBuf::from(hidden);
    let _ = std::fs::remove_file(&hidden);
    let listener = UnixListener::bind(&hidden).map_err(io_error(what()))?;
    std::fs::set_permissions(&hidden, Permissions::from_mode(0o600)).map_err(io_error(what()))?;
    std::fs::rename(&hidden, address).map_err(io_error(what()))?;
    Ok(listener)
}

/// Lazuli's own service on containerd's socket.
struct ControlService(Arc<Catalog>);

#[tonic::async_trait]
impl Control for ControlService {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let catalog = Arc::clone(&self.0);
        let json = blocking(move || catalog.status_json()).await;
        Ok(Response::new(StatusResponse { json }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_has_one_daemon_and_no_other_reader() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("a/b");
        let lock = prepare_root(&root).unwrap();
        assert_eq!(std::fs::metadata(&root).unwrap().permissions().mode() & 0o777, 0o700);
        let error = prepare_root(&root).unwrap_err().to_string();
        assert!(error.contains("in use by another lazuli"), "{error}");
        drop(lock);
        prepare_root(&root).unwrap();
    }

    #[tokio::test]
    async fn the_socket_is_private_and_replaces_a_dead_one() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("run/lazuli.sock");
        let first = listen(&address).await.unwrap();
        assert_eq!(std::fs::metadata(&address).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(listen(&address).await, Err(DaemonError::InUse { .. })));
        drop(first);
        listen(&address).await.unwrap();
    }
}
