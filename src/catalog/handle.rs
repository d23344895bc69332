//! The catalog as `snapshots` sees it.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;

use super::{Catalog, LayerRequest, Layers, Resolution};
use crate::fetch::LayerData;
use crate::layer::Digest;

/// The catalog as `snapshots` sees it: a handle that can start tasks of its own.
pub struct Handle(pub Arc<Catalog>);

impl Layers for Handle {
    fn resolve(&self, request: LayerRequest) -> BoxFuture<'_, Resolution> {
        let catalog = Arc::clone(&self.0);
        async move {
            match catalog.resolve_layer(request).await {
                Ok(digest) => Resolution::Live(digest),
                Err(refusal) => Resolution::Refused(refusal.text),
            }
        }
        .boxed()
    }

    fn path(&self, layer: &Digest) -> Option<PathBuf> {
        let slot = self.0.read_live().get(layer)?.slot;
        self.0.session().as_ref().map(|session| session.path(slot))
    }

    fn usage(&self, layer: &Digest) -> Option<(u64, u64)> {
        let live = self.0.read_live();
        let layer = &live.get(layer)?.layer;
        Some((layer.present_bytes(), layer.index().inodes().len() as u64))
    }

    fn retain(&self, layers: Vec<Digest>) -> BoxFuture<'_, ()> {
        let catalog = Arc::clone(&self.0);
        async move {
            let done = tokio::task::spawn_blocking(move || {
                let mut keep: HashSet<Digest> = layers.into_iter().collect();
                catalog.release(&mut keep);
                catalog.forget_images(&keep)
            });
            match done.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::error!(%error, "images cannot be forgotten"),
                Err(error) => tracing::error!(%error, "releasing layers was interrupted"),
            }
        }
        .boxed()
    }
}
