//! Wiring: builds every room in order, runs them, and takes them down again.
//!
//! The daemon is two processes: a supervisor ([`supervise`]), which holds what must not be lost, and a worker ([`work`]), which is the rest.
//!
//! Order of a worker's start: lock the root directory, open the cache and the database, mount FUSE and try the faces (or take over both from the
//! worker before), bring the layers back, begin to answer, and only then accept: containerd never meets a daemon that does not know its
//! snapshots yet. Order of the end: stop accepting, answer what is under way; then either leave everything as it is to the next worker, by
//! ending without another word, or unmount and close the cache (which marks it clean).

use std::collections::HashMap;
use std::fs::{DirBuilder, Permissions};
use std::io;
use std::os::fd::{AsFd as _, RawFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tower::util::MapResultLayer;

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
use crate::proto::control::control_server::ControlServer;
use crate::registry::{Registry, RegistryError};
use crate::snapshots::{Again, Differ, Service, SnapshotsError};
use crate::store::{self, Store, StoreError};
use crate::sync::{Budget, blocking};
use crate::sys::{descriptors, signals};

mod control;
mod legacy;
mod link;
mod manager;
mod resume;
mod root;
#[cfg(test)]
mod simulation;
mod stop;
mod supervisor;
mod upgrade;
mod worker;

use control::ControlService;
use legacy::Found;
use link::{Link, Message};

pub use resume::RESUME_OPTION;
pub use stop::{Stop, StopSignal, stop_signal};
pub use supervisor::{Supervision, supervise};
pub use upgrade::upgrade;
pub use worker::WORKER_OPTION;

/// What the processes of the daemon are called in the list of processes, however they were started.
const PROCESS_NAME: &str = "lazuli";

/// Longest time that the kernel may take for one mount; more, and something is broken. It takes a millisecond.
pub const MOUNT_DEADLINE: Duration = Duration::from_secs(10);

/// The metadata database, in the root directory.
const DATABASE: &str = "metadata.redb";

/// Directory of the faces' mount points and metadata, below the root directory.
const FACES_DIRECTORY: &str = "faces";

/// Longest wait for calls under way when the daemon is told to end. Reads are answered meanwhile.
const DRAIN: Duration = Duration::from_secs(3);
/// The same when another worker goes on: containerd's questions take up to 8 s, and nobody is in a hurry.
const HAND_OVER_DRAIN: Duration = Duration::from_secs(10);
/// Longest wait for unmounting, and for the cache to be marked clean.
const CLOSE: Duration = Duration::from_secs(5);
/// Longest wait for tasks when everything is closed.
const TASKS: Duration = Duration::from_millis(500);
/// How often in the time that the service manager gives it is told that all is well.
const WATCHDOG_SHARE: u32 = 3;
/// How long a start may take that goes on with what another process has left; the unit gives the first one as long.
const START: Duration = Duration::from_secs(300);

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
    /// There is no database, and there are snapshots. One that is begun anew would know nothing of them: what containers have written would be
    /// cleaned up, and slots would be given again that the kernel knows as those of other layers.
    #[error(
        "metadata database {path} is lost: it is missing or empty, and there are {snapshots} snapshots in {directory}; \
         restore a copy of it, or begin anew as docs/OPERATIONS.md says (\"The database is lost\")"
    )]
    DatabaseLost {
        /// The file.
        path: PathBuf,
        /// Directory of the snapshots.
        directory: PathBuf,
        /// How many there are.
        snapshots: usize,
    },
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

/// Works for the supervisor that has started this process, and has the other end of the descriptor `link`, until a signal ends it.
///
/// # Errors
/// [`DaemonError`] when it cannot start, or its socket fails.
pub fn work(config: Config, link: RawFd) -> Result<(), DaemonError> {
    crate::sys::malloc::give_back_what_is_freed();
    init_logs(&config.log);
    let no_supervisor = || io_error("hearing from the supervisor");
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(|error| no_supervisor()(error.into()))?;
    // Fails if the supervisor ended before that call.
    let (link, held) = descriptors::inherited(link)
        .and_then(Link::open)
        .map_err(no_supervisor())?;
    // Started as /proc/self/exe, it would be called "exe".
    let _ = rustix::thread::set_name(&std::ffi::CString::new(PROCESS_NAME).unwrap_or_default());
    if let Err(error) = crate::sys::limits::raise_open_files() {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
    let found = Found::new(held, &config.address);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("lazuli")
        .build()
        .map_err(io_error("starting threads"))?;
    let result = runtime.block_on(run(config, Arc::new(link), found));
    // A blocking task may hang on a dead file system; the process ends regardless.
    runtime.shutdown_timeout(TASKS);
    result
}

/// Ends this process at once, and leaves everything that is mounted and open to the next one. No destructor runs: one would unmount, and another
/// would answer reads with errors that the next process answers with bytes.
fn leave_it(code: i32) -> ! {
    std::process::exit(code)
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

async fn run(config: Config, link: Arc<Link>, found: Found) -> Result<(), DaemonError> {
    tracing::info!(version = env!("CARGO_PKG_VERSION"), root = %config.root.display(), "starting");
    let stop = stop::workers_stop_signal().map_err(io_error("listening to signals"))?;
    // The supervisor had blocked them.
    signals::unblock_all();
    let mountpoint = config.root.join("fuse");
    let (root, at) = (config.root.clone(), mountpoint.clone());
    let (lock, found) = blocking(move || {
        let session = found.fuse.as_ref().map(|legacy| legacy.device.as_fd());
        (root::lock(&root, session, &at), found)
    })
    .await;
    let _lock = lock?;
    let starting = tokio::spawn(starts(Arc::clone(&link)));
    let metrics = Arc::new(Metrics::new());
    let registry = Registry::new(&config.registry, Arc::clone(&metrics))?;
    let (root, limits, counts) = (config.root.clone(), config.cache.clone(), Arc::clone(&metrics));
    let opened = blocking(move || -> Result<_, DaemonError> {
        // The database first: it knows what was believed of the layers of an older cache.
        let store = open_store(&root, &counts)?;
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
    let options = SessionOptions {
        threads: config.fuse.threads,
        read_deadline: config.fetch.read_deadline,
        source_name: "lazuli".to_owned(),
    };
    let Found { fuse, socket } = found;
    let adopted = match fuse {
        Some(legacy) => Session::adopt(&mountpoint, legacy, &options, runtime.clone(), Arc::clone(&metrics))?,
        None => None,
    };
    let session = match adopted {
        Some(session) => session,
        None => {
            link.forget_all();
            Session::mount(&mountpoint, options, runtime, Arc::clone(&metrics))?
        }
    };
    let goes_on = session.is_adopted();
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
        trace: config.trace.clone(),
        index: config.index.clone(),
        lends: config.content.lend,
        address: config.address.clone(),
    });
    let worker = Worker {
        config,
        link,
        starting,
        goes_on,
        socket,
        catalog: Arc::clone(&catalog),
        cache: Arc::clone(&tended),
        store,
        metrics,
        mountpoint,
        stop,
    };
    let result = worker.serve().await;
    match &result {
        Ok(signal) if *signal == stop::HAND_OVER => {
            tracing::info!("ended; the next process goes on");
            leave_it(0);
        }
        Err(error) if goes_on => {
            // Containers may use what is mounted. The next worker may have more luck.
            tracing::error!("{error}");
            leave_it(1);
        }
        _ => {}
    }
    drop(tended);
    let closing = Arc::clone(&catalog);
    if tokio::time::timeout(CLOSE, tokio::task::spawn_blocking(move || closing.close()))
        .await
        .is_err()
    {
        tracing::warn!("not all could be closed in time; the next start will clear what is left");
    }
    tracing::info!("ended");
    result.map(drop)
}

/// What serves when all rooms are built.
struct Worker {
    config: Config,
    link: Arc<Link>,
    /// Tells the service manager that the start goes on.
    starting: tokio::task::JoinHandle<()>,
    /// Whether it goes on with what an earlier worker has mounted.
    goes_on: bool,
    /// The earlier worker's socket.
    socket: Option<StdUnixListener>,
    catalog: Arc<Catalog>,
    cache: Arc<Cache>,
    store: Arc<Store>,
    metrics: Arc<Metrics>,
    mountpoint: PathBuf,
    stop: Stop,
}

impl Worker {
    /// Serves until a signal arrives, and tells which.
    async fn serve(self) -> Result<StopSignal, DaemonError> {
        let Some(service) = self.restore().await? else {
            return Ok(self.stop.await);
        };
        if self.goes_on {
            self.note_takeover();
        }
        let Worker {
            config,
            link,
            starting,
            goes_on,
            socket,
            catalog,
            metrics,
            mountpoint,
            stop,
            ..
        } = self;
        // Before the socket: who can connect finds everything there.
        let admin = Admin::new(metrics, Arc::clone(&catalog), mountpoint);
        serve_admin(&config, &admin, &stop).await;
        let listener = match socket {
            // All that is held goes on as it is.
            Some(socket) if goes_on => socket,
            other => {
                let listener = match other {
                    Some(socket) => socket,
                    None => listen(&config.address).await?,
                };
                let kept = catalog.with_faces(|faces| legacy::leave(&link, faces, &listener, &config.address));
                if let Some(Err(error)) = kept {
                    tracing::error!(%error, "if this process dies, containers lose their files");
                }
                listener
            }
        };
        starting.abort();
        watch(&link, &admin, &catalog);
        listener.set_nonblocking(true).map_err(io_error("socket"))?;
        let listener = UnixListener::from_std(listener).map_err(io_error("socket"))?;
        catalog.work_while_idle(config.content.complete, config.fetch.fill);
        let again = Again::after(handed_over(stop.clone()));
        let differ = Differ::new(service.clone(), Containerd::new(&config.containerd_address), again);
        let control = ControlServer::new(ControlService(catalog)).max_encoding_message_size(MAX_MESSAGE);
        admin.set_ready(true);
        tracing::info!(address = %config.address.display(), "serving");
        link.say(&Message::Ready, None);
        let serving = tonic::transport::Server::builder()
            .layer(MapResultLayer::new(Again::refuse))
            .add_service(differ.into_server())
            .add_service(service.into_server())
            .add_service(control)
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop.clone().map(drop));
        let drained = async {
            let stop = stop.clone().await;
            tracing::info!(signal = stop.name, "ending");
            admin.set_ready(false);
            let drain = if stop == stop::HAND_OVER {
                HAND_OVER_DRAIN
            } else {
                DRAIN
            };
            tokio::time::sleep(drain).await;
        };
        tokio::select! {
            result = serving => result.map_err(|source| DaemonError::Serve { address: config.address.clone(), source })?,
            () = drained => {}
        }
        let stop = stop.await;
        if stop != stop::HAND_OVER {
            // Somebody else's socket by now, or gone already: either way not ours to mind.
            let _ = std::fs::remove_file(&config.address);
        }
        Ok(stop)
    }

    /// Brings back what snapshots refer to, and begins to answer. `None`: a signal came before that was done.
    async fn restore(&self) -> Result<Option<Service>, DaemonError> {
        let (root, restored, store) = (
            self.config.root.clone(),
            Arc::clone(&self.catalog),
            Arc::clone(&self.store),
        );
        let (cache, metrics) = (Arc::clone(&self.cache), Arc::clone(&self.metrics));
        let service = blocking(move || -> Result<_, DaemonError> {
            restored.restore(&referenced_layers(&store)?)?;
            restored.with_faces(Faces::begin).transpose()?;
            // Not before: what snapshots refer to is pinned by now.
            cache
                .tend()
                .map_err(io_error("starting the thread that keeps the cache"))?;
            let layers = Arc::new(Handle(restored));
            Ok(Service::new(&root, store, layers, metrics)?)
        });
        let late = async {
            self.stop.clone().await;
            tokio::time::sleep(DRAIN).await;
        };
        tokio::select! {
            service = service => service.map(Some),
            () = late => {
                tracing::warn!("ended while layers were brought back; the next start will do it");
                Ok(None)
            }
        }
    }

    /// Counts that this process goes on with an earlier one's work.
    fn note_takeover(&self) {
        let hello = &self.link.hello;
        self.metrics.takeovers_total.inc_by(hello.before);
        let stall = hello.died.map(|died| link::now().saturating_sub(died));
        let seconds = stall.unwrap_or_default().as_secs_f64();
        self.metrics.takeover_stall_seconds.set(seconds);
        tracing::info!(
            seconds,
            takeovers = hello.before,
            "this process goes on where another ended"
        );
    }
}

/// Ends when another process is to go on, and never if none is.
async fn handed_over(stop: Stop) {
    if stop.await != stop::HAND_OVER {
        std::future::pending::<()>().await;
    }
}

/// Serves metrics and health, if an address for them is configured.
async fn serve_admin(config: &Config, admin: &Arc<Admin>, stop: &Stop) {
    let Some(address) = config.admin_address else { return };
    let (admin, stop) = (Arc::clone(admin), stop.clone());
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

/// Tells the service manager that all is well while the process starts: to it, the service has been up since the first start.
async fn starts(link: Arc<Link>) {
    let Some(limit) = link.hello.watchdog else { return };
    let begun = std::time::Instant::now();
    while begun.elapsed() < START {
        link.say(&Message::Watchdog, None);
        tokio::time::sleep(limit / WATCHDOG_SHARE).await;
    }
}

/// Tells the service manager that all is well, as long as it is; and notices when the FUSE session ends on its own, which is the end of all that
/// the next process could go on with.
fn watch(link: &Arc<Link>, admin: &Arc<Admin>, catalog: &Arc<Catalog>) {
    if let Some(over) = catalog.with_faces(|faces| faces.session().over()) {
        let (link, catalog) = (Arc::clone(link), Arc::clone(catalog));
        tokio::spawn(async move {
            over.await;
            if catalog.is_open() {
                tracing::error!(
                    "the FUSE connection has ended: somebody unmounted it, or aborted it; Lazuli has to be restarted"
                );
                link.forget_all();
            }
        });
    }
    let Some(limit) = link.hello.watchdog else { return };
    let (link, admin) = (Arc::clone(link), Arc::clone(admin));
    tokio::spawn(async move {
        loop {
            if admin.answers().await {
                link.say(&Message::Watchdog, None);
            }
            tokio::time::sleep(limit / WATCHDOG_SHARE).await;
        }
    });
}

/// Opens the database in the root directory, or makes one where there is nothing yet that it should know.
fn open_store(root: &Path, metrics: &Arc<Metrics>) -> Result<Store, DaemonError> {
    let (path, directory) = (root.join(DATABASE), root.join("snapshots"));
    let looking = |at: &Path| io_error(format!("looking at {}", at.display()));
    if store::is_blank(&path).map_err(looking(&path))? {
        let is_snapshot = |name: &str| name.parse::<u64>().is_ok();
        let snapshots = match std::fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            listed => listed
                .and_then(|listed| listed.collect::<io::Result<Vec<_>>>())
                .map_err(looking(&directory))?
                .iter()
                .filter(|entry| entry.file_name().to_str().is_some_and(is_snapshot))
                .count(),
        };
        if snapshots > 0 {
            return Err(DaemonError::DatabaseLost {
                path,
                directory,
                snapshots,
            });
        }
    }
    Ok(Store::open_counted(&path, Arc::clone(metrics))?)
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

/// Listens on a unix socket that only root may use, replacing one that a dead daemon left.
async fn listen(address: &Path) -> Result<StdUnixListener, DaemonError> {
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
    let listener = StdUnixListener::bind(&hidden).map_err(io_error(what()))?;
    std::fs::set_permissions(&hidden, Permissions::from_mode(0o600)).map_err(io_error(what()))?;
    std::fs::rename(&hidden, address).map_err(io_error(what()))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A database that begins anew where snapshots are would have them cleaned up.
    #[test]
    fn a_lost_database_is_not_begun_anew_over_snapshots() {
        let dir = tempfile::tempdir().unwrap();
        let (root, metrics) = (dir.path(), Arc::new(Metrics::new()));
        let database = root.join(DATABASE);
        drop(open_store(root, &metrics).unwrap());
        let good = std::fs::read(&database).unwrap();
        std::fs::create_dir_all(root.join("snapshots/7/fs")).unwrap();
        drop(open_store(root, &metrics).unwrap());
        let lose: [fn(&Path); 3] = [
            |path| std::fs::remove_file(path).unwrap(),
            |path| std::fs::write(path, "").unwrap(),
            |path| std::fs::write(path, [0; 8192]).unwrap(),
        ];
        for lose in lose {
            lose(&database);
            let before = std::fs::read(&database).ok();
            let error = open_store(root, &metrics).unwrap_err();
            assert!(
                matches!(error, DaemonError::DatabaseLost { snapshots: 1, .. }),
                "{error}"
            );
            assert_eq!(std::fs::read(&database).ok(), before, "it is left as it was found");
        }
        // What is no database is no empty one either.
        std::fs::write(&database, "something else").unwrap();
        assert!(matches!(
            open_store(root, &metrics),
            Err(DaemonError::Store(StoreError::Open { .. }))
        ));
        std::fs::write(&database, good).unwrap();
        drop(open_store(root, &metrics).unwrap());
        // Nothing to lose.
        std::fs::remove_dir_all(root.join("snapshots")).unwrap();
        std::fs::write(&database, [0; 8192]).unwrap();
        drop(open_store(root, &metrics).unwrap());
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
