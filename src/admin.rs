//! The daemon's HTTP face: `/metrics` (Prometheus), `/healthz`, `/readyz` and `/status` (the JSON of `lazuli status`).
//!
//! Health is asked of the FUSE session itself, with a deadline: a daemon whose mount hangs is not healthy, whatever else works.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;

use crate::catalog::Catalog;
use crate::metrics::Metrics;
use crate::sync::blocking;

/// Longest wait for an answer of our own FUSE mount.
const PROBE_DEADLINE: Duration = Duration::from_secs(2);

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
    /// Whether a health probe is under way; a stuck one must not be followed by a thousand others.
    probing: AtomicBool,
}

impl Admin {
    /// A face that says «not ready» until [`Admin::set_ready`].
    pub fn new(metrics: Arc<Metrics>, catalog: Arc<Catalog>, mountpoint: PathBuf) -> Arc<Self> {
        let (ready, probing) = (AtomicBool::new(false), AtomicBool::new(false));
        Arc::new(Admin {
            metrics,
            catalog,
            mountpoint,
            ready,
            probing,
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

    async fn mount_answers(self: &Arc<Self>) -> bool {
        if self.probing.swap(true, Ordering::AcqRel) {
            return false;
        }
        let admin = Arc::clone(self);
        let probe = tokio::task::spawn_blocking(move || {
            let answer = rustix::fs::statfs(&admin.mountpoint);
            admin.probing.store(false, Ordering::Release);
            answer.is_ok()
        });
        matches!(tokio::time::timeout(PROBE_DEADLINE, probe).await, Ok(Ok(true)))
    }
}

async fn metrics(State(admin): State<Arc<Admin>>) -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4")],
        admin.metrics.text(),
    )
}

async fn healthz(State(admin): State<Arc<Admin>>) -> impl IntoResponse {
    if admin.mount_answers().await {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the FUSE mount does not answer\n")
    }
}

async fn readyz(State(admin): State<Arc<Admin>>) -> impl IntoResponse {
    if admin.ready.load(Ordering::Relaxed) {
        (StatusCode::OK, "ready\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "starting or stopping\n")
    }
}

async fn status(State(admin): State<Arc<Admin>>) -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, "application/json")],
        blocking(move || admin.catalog.status_json()).await,
    )
}
