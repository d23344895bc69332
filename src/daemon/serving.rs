//! Serving: from the moment when all rooms are built until a signal arrives.
//!
//! Layers are brought back first, then the socket listens (or goes on listening), and only then is the service manager told; what is served meanwhile
//! is watched, so that it is known when the FUSE connection ends on its own.

use std::fs::{DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tower::util::MapResultLayer;

use super::control::ControlService;
use super::database::referenced_layers;
use super::link::{self, Link, Message};
use super::stop::{self, Stop, StopSignal};
use super::{DaemonError, io_error, legacy};
use crate::admin::Admin;
use crate::cache::Cache;
use crate::catalog::containerd::{Containerd, MAX_MESSAGE};
use crate::catalog::{Catalog, Handle};
use crate::config::Config;
use crate::fs::Faces;
use crate::metrics::Metrics;
use crate::proto::control::control_server::ControlServer;
use crate::snapshots::{Again, Differ, Service};
use crate::store::Store;
use crate::sync::blocking;

/// Longest wait for calls under way when the daemon is told to end. Reads are answered meanwhile.
const DRAIN: Duration = Duration::from_secs(3);
/// The same when another worker goes on: containerd's questions take up to 8 s, and nobody is in a hurry.
const HAND_OVER_DRAIN: Duration = Duration::from_secs(10);
/// How often in the time that the service manager gives it is told that all is well.
const WATCHDOG_SHARE: u32 = 3;
/// How long a start may take that goes on with what another process has left; the unit gives the first one as long.
const START: Duration = Duration::from_secs(300);

/// What serves when all rooms are built.
pub(super) struct Serving {
    pub(super) config: Config,
    pub(super) link: Arc<Link>,
    /// Tells the service manager that the start goes on.
    pub(super) starting: tokio::task::JoinHandle<()>,
    /// Whether it goes on with what an earlier worker has mounted.
    pub(super) goes_on: bool,
    /// The earlier worker's socket.
    pub(super) socket: Option<StdUnixListener>,
    pub(super) catalog: Arc<Catalog>,
    pub(super) cache: Arc<Cache>,
    pub(super) store: Arc<Store>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) mountpoint: PathBuf,
    pub(super) stop: Stop,
}

impl Serving {
    /// Serves until a signal arrives, and tells which.
    pub(super) async fn serve(self) -> Result<StopSignal, DaemonError> {
        let Some(service) = self.restore().await? else {
            return Ok(self.stop.await);
        };
        if self.goes_on {
            self.note_takeover();
        }
        let Serving {
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
pub(super) async fn starts(link: Arc<Link>) {
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
