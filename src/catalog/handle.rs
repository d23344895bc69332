//! The catalog as `snapshots` sees it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures::FutureExt;
use futures::future::BoxFuture;

use super::loader::Refusal;
use super::{
    Agreement, Application, Applied, Catalog, LayerRequest, Layers, Lowers, Needed, Question, Released, Resolution,
    Start,
};
use crate::fetch::LayerData;
use crate::fs::Faces;
use crate::layer::Digest;

/// The catalog as `snapshots` sees it: a handle that can start tasks of its own.
pub struct Handle(pub Arc<Catalog>);

impl Layers for Handle {
    fn resolve(&self, request: LayerRequest) -> BoxFuture<'_, Resolution> {
        let catalog = Arc::clone(&self.0);
        async move {
            let resolved = catalog.resolve_layer(request).await;
            resolved.unwrap_or_else(|refusal| Resolution::Refused(refusal.text))
        }
        .boxed()
    }

    fn apply(&self, application: Application) -> BoxFuture<'_, Result<Applied, Refusal>> {
        Arc::clone(&self.0).apply(application).boxed()
    }

    fn agree(&self, question: Question) -> BoxFuture<'_, Agreement> {
        Arc::clone(&self.0).agree(question).boxed()
    }

    fn is_live(&self, layer: &Digest) -> bool {
        self.0.read_live().contains_key(layer)
    }

    fn lowers(&self, layers: &[Digest], merged: bool) -> Result<Lowers, Digest> {
        self.0.lowers(layers, merged)
    }

    fn expect(&self, layers: &[Digest]) {
        self.0.expect(layers);
    }

    fn starting(&self, start: Start) {
        self.0.record_start(start);
    }

    fn removed(&self, key: &str) {
        self.0.end_recording(key);
    }

    fn differ_was_asked(&self, was_asked: bool) {
        self.0.unused_differ.store(!was_asked, Ordering::Relaxed);
    }

    fn no_mapped_owners(&self) -> Option<String> {
        self.0
            .faces()
            .as_ref()
            .and_then(|faces| faces.serving().no_mapped_owners.clone())
    }

    fn usage(&self, layer: &Digest) -> Option<(u64, u64)> {
        let live = self.0.read_live();
        let layer = &live.get(layer)?.layer;
        Some((layer.present_bytes(), layer.index().inodes()))
    }

    fn mark(&self) -> u64 {
        self.0.faces().as_ref().map_or(0, Faces::mark)
    }

    fn retain(&self, needed: Needed, mark: u64) -> BoxFuture<'_, Released> {
        let catalog = Arc::clone(&self.0);
        async move {
            let decide = move || {
                let released = catalog.release(needed);
                Box::new(move || catalog.let_go(released, mark)) as Released
            };
            match tokio::task::spawn_blocking(decide).await {
                Ok(released) => released,
                Err(error) => {
                    tracing::error!(%error, "releasing layers was interrupted");
                    Box::new(|| ())
                }
            }
        }
        .boxed()
    }
}
