//! What becomes of a layer's index after the layer is live: it is noted where it came from, published if it was built here, and, if it
//! came from elsewhere, compared with the layer once all of that is here.

use std::sync::Arc;
use std::time::Duration;

use super::Catalog;
use super::shared::publish::Publisher;
use super::shared::{Origin, check};
use crate::cache::CachedLayer;
use crate::fetch::LayerData as _;
use crate::layer::Digest;
use crate::store::{IndexRecord, LayerRecord, StoreError};
use crate::sync::blocking;

/// How long after the start what an earlier run did not publish is published: first come the pulls that wait.
const PUBLISH_AFTER: Duration = Duration::from_secs(60);
/// How often layers with shared indexes are looked at: whether all of them is here.
const CHECK_EVERY: Duration = Duration::from_secs(30);

impl Catalog {
    /// Publishes the index of a layer if it was built here. (Where it came from is recorded with the layer.)
    pub(super) fn index_is_known(self: &Arc<Self>, cached: &Arc<CachedLayer>, record: IndexRecord, origin: Origin) {
        if let IndexRecord::Built { published: None } = record {
            self.publish(Arc::clone(cached), origin, Duration::ZERO);
        }
    }

    /// Publishes an index in the background.
    fn publish(self: &Arc<Self>, cached: Arc<CachedLayer>, origin: Origin, after: Duration) {
        let Some(publisher) = self.publisher.clone() else {
            return;
        };
        // The daemon's end need not wait for it: the next start begins anew.
        let catalog = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            let layer = *cached.digest();
            let published = Publisher::publish(&publisher, &cached, &origin).await;
            drop(cached);
            if let (Some(place), Some(catalog)) = (published, catalog.upgrade()) {
                let record = IndexRecord::Built { published: Some(place) };
                let noted = catalog.store.change(move |draft| draft.put_index(&layer, &record));
                if let Err::<(), StoreError>(error) = noted.await {
                    tracing::warn!(%error, %layer, "that its index is published cannot be recorded");
                }
            }
        });
    }

    /// Publishes what an earlier run built and could not publish. Called at the start, when layers are back.
    pub(super) fn publish_the_rest(self: &Arc<Self>) {
        if self.publisher.is_none() {
            return;
        }
        for layer in self.live_digests() {
            let unpublished = matches!(
                self.store.index(&layer),
                Ok(Some(IndexRecord::Built { published: None }))
            );
            let live = self.read_live().get(&layer).map(|live| Arc::clone(live.layer.cached()));
            if let (true, Some(cached)) = (unpublished, live) {
                match self.origin_of(&layer) {
                    Ok(origin) => self.publish(cached, origin, PUBLISH_AFTER),
                    Err(error) => tracing::warn!(%error, %layer, "its index is not published"),
                }
            }
        }
    }

    /// Where a layer was pulled from, as the database tells.
    fn origin_of(&self, layer: &Digest) -> Result<Origin, StoreError> {
        let sources = self.store.layer(layer)?.map(|record: LayerRecord| record.sources);
        let text = layer.to_string();
        let holds = |image: &crate::store::ImageRecord| image.layers.iter().any(|layer| layer.digest == text);
        let image = self.images()?.into_iter().find(holds);
        Ok(Origin {
            sources: sources.unwrap_or_default(),
            manifest: image.map(|image| image.manifest),
        })
    }

    /// Whether a layer may be looked for among shared indexes: not if one has shown itself to be false.
    pub(super) fn may_share(&self, layer: &Digest) -> bool {
        !matches!(
            self.store.index(layer),
            Ok(Some(IndexRecord::Shared {
                verified: Some(false),
                ..
            }))
        )
    }

    /// Takes a layer whose shared index has shown itself to be false out of the cache, so that it is streamed.
    pub(super) fn forget_if_false(&self, layer: &Digest) {
        if self.may_share(layer) {
            return;
        }
        match self.loader.cache().forget(layer) {
            true => tracing::warn!(%layer, "its shared index was false; it is streamed"),
            false => tracing::error!(%layer, "its shared index is false, and it is still in use"),
        }
    }

    /// Compares layers whose index came from elsewhere with their bytes, one after the other, as soon as all of those are here. Runs as
    /// long as the catalog.
    pub(super) fn check_shared(self: &Arc<Self>) {
        let catalog = Arc::downgrade(self);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(CHECK_EVERY).await;
                let Some(catalog) = catalog.upgrade() else { return };
                for layer in catalog.live_digests() {
                    catalog.check_layer(layer).await;
                }
            }
        });
    }

    async fn check_layer(self: &Arc<Self>, layer: Digest) {
        let cached = self.read_live().get(&layer).map(|live| Arc::clone(live.layer.cached()));
        let Some(cached) = cached.filter(|cached| cached.is_complete()) else {
            return;
        };
        let store = Arc::clone(&self.store);
        let (index, recorded) = blocking(move || (store.index(&layer), store.layer(&layer))).await;
        let Ok(Some(IndexRecord::Shared {
            from,
            trust,
            digest,
            verified: None,
        })) = index
        else {
            return;
        };
        let diff_id = recorded.ok().flatten().and_then(|record| record.diff_id);
        let checked = tokio::task::spawn_blocking(move || check::describes(&cached, diff_id)).await;
        let verified = match checked {
            Ok(Ok(())) => {
                tracing::info!(%layer, from, "its shared index describes it");
                true
            }
            Ok(Err(check::Mismatch::Absent)) => return,
            Ok(Err(mismatch)) => {
                self.metrics.index_mismatches_total.inc();
                tracing::error!(
                    %layer, from, trust, index = %digest, %mismatch,
                    "its shared index is FALSE: containers may have seen wrong files. No pull gets this layer any more; remove its images, \
                     and find out who wrote the index"
                );
                false
            }
            Err(panic) => {
                tracing::error!(%layer, %panic, "its shared index cannot be compared with it");
                return;
            }
        };
        let record = IndexRecord::Shared {
            from,
            trust,
            digest,
            verified: Some(verified),
        };
        let noted = self.store.change(move |draft| draft.put_index(&layer, &record));
        if let Err::<(), StoreError>(error) = noted.await {
            tracing::error!(%error, %layer, "what its index is worth cannot be recorded");
        }
    }

    /// Layers that are live, without variants.
    fn live_digests(&self) -> Vec<Digest> {
        let live = self.read_live();
        let layers = live.iter().filter(|(_, live)| !live.is_variant);
        layers.map(|(_, live)| *live.layer.digest()).collect()
    }
}
