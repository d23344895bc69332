//! Wiring: builds every room in order, runs them, and takes them down again.
//!
//! The daemon is two processes: a supervisor ([`supervise`]), which holds what must not be lost, and a worker ([`work`]), which is the rest.
//!
//! Order of a worker's start: lock the root directory, open the cache and the database, mount FUSE and try the faces (or take over both from the
//! worker before), bring the layers back, begin to answer, and only then accept: containerd never meets a daemon that does not know its
//! snapshots yet. Order of the end: stop accepting, answer what is under way; then either leave everything as it is to the next worker, by
//! ending without another word, or unmount and close the cache (which marks it clean).

use std::io;
use std::os::fd::{AsFd as _, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::cache::{self, Cache, CacheError};
use crate::catalog::containerd::Containerd;
use crate::catalog::loader::Loader;
use crate::catalog::shared::SharedIndexes;
use crate::catalog::shared::publish::Publisher;
use crate::catalog::shared::trust::IndexError;
use crate::catalog::soci::SociIndexes;
use crate::catalog::sources::Repositories;
use crate::catalog::variants::DIRECTORY as VARIANTS_DIRECTORY;
use crate::catalog::{Catalog, Parts};
use crate::config::{Config, LogConfig, LogFormat};
use crate::fetch::Fetcher;
use crate::fs::{Faces, FacesOptions, FsError, Session, SessionOptions};
use crate::metrics::Metrics;
use crate::registry::{Registry, RegistryError};
use crate::snapshots::SnapshotsError;
use crate::store::StoreError;
use crate::sync::{Budget, blocking};
use crate::sys::{descriptors, signals};

mod control;
mod database;
mod legacy;
mod link;
mod manager;
mod resume;
mod root;
mod serving;
#[cfg(test)]
mod simulation;
mod stop;
mod supervisor;
mod upgrade;
mod worker;

use database::{names_of_layers, open_store};
use legacy::Found;
use link::Link;
use serving::Serving;

pub use resume::RESUME_OPTION;
pub use stop::{Stop, StopSignal, stop_signal};
pub use supervisor::{Supervision, supervise};
pub use upgrade::upgrade;
pub use worker::WORKER_OPTION;

/// What the processes of the daemon are called in the list of processes, however they were started.
const PROCESS_NAME: &str = "lazuli";

/// Longest time that the kernel may take for one mount; more, and something is broken. It takes a millisecond.
pub const MOUNT_DEADLINE: Duration = Duration::from_secs(10);

/// Directory of the faces' mount points and metadata, below the root directory.
const FACES_DIRECTORY: &str = "faces";

/// Longest wait for unmounting, and for the cache to be marked clean.
const CLOSE: Duration = Duration::from_secs(5);
/// Longest wait for tasks when everything is closed.
const TASKS: Duration = Duration::from_millis(500);

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
    let starting = tokio::spawn(serving::starts(Arc::clone(&link)));
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
    let serving = Serving {
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
    let result = serving.serve().await;
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
