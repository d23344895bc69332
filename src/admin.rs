//! The daemon's HTTP face: `/metrics` (Prometheus), `/healthz`, `/readyz` and `/status` (the JSON of `lazuli status`).
//!
//! Health is asked of the FUSE session itself, with a deadline: a daemon whose mount hangs, or is gone, is not healthy, whatever else works.
//! Nobody who asks begins a probe while one is under way: all wait for the same answer, and a mount that hangs costs one thread.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use tokio::net::TcpListener;

use crate::catalog::Catalog;
use crate::metrics::Metrics;
use crate::sync::blocking;

/// Longest wait for an answer of our own FUSE mount.
const PROBE_DEADLINE: Duration = Duration::from_secs(2);

/// A question to the mount that is under way: what is wrong with it, if anything.
type Probe = Shared<BoxFuture<'static, Option<String>>>;

/// What the HTTP face tells about.
pub struct Admin {
    /// Everything counted.
    pub metrics: Arc<Metrics>,
    /// Everything live.
    pub catalog: Arc<Catalog>,
    /// The FUSE mount.
    pub mountpoint: PathBuf,
    /// Whether the daemon has restored its layers and serves.
    pub ready: AtomicBool,
    /// The last probe; a stuck one must not be followed by a thousand others.
    probe: Mutex<Option<Probe>>,
}

impl Admin {
    /// A face that says «not ready» until [`Admin::set_ready`].
    pub fn new(metrics: Arc<Metrics>, catalog: Arc<Catalog>, mountpoint: PathBuf) -> Arc<Self> {
        Arc::new(Admin {
            metrics,
            catalog,
            mountpoint,
            ready: AtomicBool::new(false),
            probe: Mutex::default(),
        })
    }

    /// From now on `/readyz` says yes, or no again.
    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Relaxed);
    }

    /// Serves until `stop` ends.
    ///
    /// # Errors
    /// When the listener fails.
    pub async fn serve(
        self: Arc<Self>,
        listener: TcpListener,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> std::io::Result<()> {
        let router = Router::new()
            .route("/metrics", get(metrics))
            .route("/healthz", get(healthz))
            .route("/readyz", get(readyz))
            .route("/status", get(status))
            .with_state(self);
        axum::serve(listener, router).with_graceful_shutdown(stop).await
    }

    /// What is wrong with the mount; `None` if it is there and answers.
    async fn mount_problem(self: &Arc<Self>) -> Option<String> {
        let silent = |_| {
            let (at, seconds) = (self.mountpoint.display(), PROBE_DEADLINE.as_secs());
            Some(format!("the FUSE mount at {at} does not answer within {seconds} s"))
        };
        tokio::time::timeout(PROBE_DEADLINE, self.probe())
            .await
            .unwrap_or_else(silent)
    }

    /// Whether the session is there and the mount answers in time, wherever it is seen. For who restarts a daemon that is stuck: a mount that is out of
    /// sight is no reason, since containers may use it.
    pub async fn answers(self: &Arc<Self>) -> bool {
        let in_time = tokio::time::timeout(PROBE_DEADLINE, self.probe()).await.is_ok();
        in_time && self.catalog.with_faces(|faces| faces.session().is_alive()) == Some(true)
    }

    /// The probe that is under way, or a new one.
    fn probe(self: &Arc<Self>) -> Probe {
        let mut last = self.probe.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = last.as_ref().filter(|probe| probe.peek().is_none()) {
            return running.clone();
        }
        let admin = Arc::clone(self);
        let asked = tokio::task::spawn_blocking(move || {
            let gone = admin.catalog.mount_problem();
            gone.or_else(|| {
                // Only while it is there: below it is a directory that always answers.
                let answer = rustix::fs::statfs(&admin.mountpoint);
                let error = answer.err()?;
                // It may have gone meanwhile, which says more.
                let gone = admin.catalog.mount_problem();
                let at = admin.mountpoint.display();
                Some(gone.unwrap_or_else(|| format!("the FUSE mount at {at} answers: {error}")))
            })
        });
        let probe = asked.map(|asked| asked.unwrap_or_else(|error| Some(error.to_string())));
        let probe = probe.boxed().shared();
        *last = Some(probe.clone());
        probe
    }
}

async fn metrics(State(admin): State<Arc<Admin>>) -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4")],
        admin.metrics.text(),
    )
}

async fn healthz(State(admin): State<Arc<Admin>>) -> impl IntoResponse {
    match admin.mount_problem().await {
        None => (StatusCode::OK, "ok\n".to_owned()),
        Some(problem) => (StatusCode::SERVICE_UNAVAILABLE, format!("{problem}\n")),
    }
}

async fn readyz(State(admin): State<Arc<Admin>>) -> impl IntoResponse {
    let problem = match admin.ready.load(Ordering::Relaxed) {
        true => admin.mount_problem().await,
        false => Some("starting or stopping".to_owned()),
    };
    match problem {
        None => (StatusCode::OK, "ready\n".to_owned()),
        Some(problem) => (StatusCode::SERVICE_UNAVAILABLE, format!("{problem}\n")),
    }
}

async fn status(State(admin): State<Arc<Admin>>) -> impl IntoResponse {
    admin.catalog.look_at_completeness().await;
    (
        [(header::CONTENT_TYPE, "application/json")],
        blocking(move || admin.catalog.status_json()).await,
    )
}
