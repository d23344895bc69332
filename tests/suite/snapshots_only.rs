//! The snapshots service alone, with no lazy layers: a plain overlay snapshotter. containerd's own test suite runs
//! against it.
//!
//! `snapshots_only ROOT SOCKET`

use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use lazuli::catalog::{LayerRequest, Layers, Resolution};
use lazuli::layer::Digest;
use lazuli::metrics::Metrics;
use lazuli::snapshots::Service;
use lazuli::store::Store;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;

/// No layer at all.
struct NoLayers;

impl Layers for NoLayers {
    fn resolve(&self, _: LayerRequest) -> BoxFuture<'_, Resolution> {
        async { Resolution::Refused("this server has no layers".to_owned()) }.boxed()
    }

    fn path(&self, _: &Digest) -> Option<PathBuf> {
        None
    }

    fn usage(&self, _: &Digest) -> Option<(u64, u64)> {
        None
    }

    fn retain(&self, _: Vec<Digest>) -> BoxFuture<'_, ()> {
        async {}.boxed()
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(root), Some(socket), None) = (arguments.next(), arguments.next(), arguments.next()) else {
        anyhow::bail!("usage: snapshots_only ROOT SOCKET");
    };
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let root = Path::new(&root);
    std::fs::create_dir_all(root)?;
    let store = Arc::new(Store::open(&root.join("metadata.redb"))?);
    let service = Service::new(root, store, Arc::new(NoLayers), Arc::new(Metrics::new()))?;
    let listener = UnixListener::bind(socket)?;
    tonic::transport::Server::builder()
        .add_service(service.into_server())
        .serve_with_incoming(UnixListenerStream::new(listener))
        .await?;
    Ok(())
}
