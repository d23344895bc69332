//! The catalog as `snapshots` sees it.

use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;

use super::{Catalog, LayerRequest, Layers, Lowers, Needed, Resolution};
use crate::fetch::LayerData;
use crate::layer::Digest;

/// The catalog as `snapshots` sees it: a handle that can start tasks of its own.
pub struct Handle(pub Arc<Catalog>);

impl Layers for Handle {
    fn resolve(&self, request: LayerRequest) -> BoxFuture<'_, Resolution> {
        let catalog = Arc::clone(&self.0);
        async move {
            match catalog.resolve_layer(request).await {
                Ok((layer, is_top)) => Resolution::Live { layer, is_top },
                Err(refusal) => Resolution::Refused(refusal.text),
            }
        }
        .boxed()
    }

    fn is_live(&self, layer: &Digest) -> bool {
        self.0.read_live().contains_key(layer)
    }

    fn lowers(&self, layers: &[Digest]) -> Result<Lowers, Digest> {
        self.0.lowers(layers)
    }

    fn expect(&self, layers: &[Digest]) {
        self.0.expect(layers);
    }

    fn usage(&self, layer: &Digest) -> Option<(u64, u64)> {
        let live = self.0.read_live();
        let layer = &live.get(layer)?.layer;
        Some((layer.present_bytes(), layer.index().inodes().len() as u64))
    }

    fn retain(&self, needed: Needed) -> BoxFuture<'_, ()> {
        let catalog = Arc::clone(&self.0);
        async move {
            match tokio::task::spawn_blocking(move || catalog.release(needed)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::error!(%error, "records of what is gone cannot be forgotten"),
                Err(error) => tracing::error!(%error, "releasing layers was interrupted"),
            }
        }
        .boxed()
    }
}
