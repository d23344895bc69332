//! What becomes of a layer's index after the layer is live: it is noted where it came from, published if it was built here, and, if it
//! came from elsewhere, compared with the layer once all of that is here.

use std::sync::Arc;
use std::time::Duration;

use super::Catalog;
use super::shared::publish::Publisher;
use super::shared::{Origin, check};
use crate::cache::CachedLayer;
use crate::layer::Digest;
use crate::store::{IndexRecord, LayerRecord, StoreError};

/// How long after the start what an earlier run did not publish is published: first come the pulls that wait.
const PUBLISH_AFTER: Duration = Duration::from_secs(60);
/// How often layers with indexes from elsewhere are looked at: whether all of them is here.
const CHECK_EVERY: Duration = Duration::from_secs(30);

impl Catalog {
    /// Publishes the index of a layer if it was built here. (Where it came from is recorded with the layer.)
    pub(super) fn index_is_known(self: &Arc<Self>, cached: &Arc<CachedLayer>, record: IndexRecord, origin: Origin) {
        self.beliefs.note_index(cached.id(), record.clone());
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
            // What is built here is known by its blob.
            let layer = *cached.digest();
            let published = Publisher::publish(&publisher, &cached, &origin).await;
            drop(cached);
            if let (Some(place), Some(catalog)) = (published, catalog.upgrade()) {
                let record = IndexRecord::Built { published: Some(place) };
                let published = record.clone();
                let noted = catalog.store.change(move |draft| draft.put_index(&layer, &published));
                if let Err::<(), StoreError>(error) = noted.await {
                    tracing::warn!(%error, %layer, "that its index is published cannot be recorded");
                }
                catalog.beliefs.note_index(&layer, record);
            }
        });
    }

    /// Publishes what an earlier run built and could not publish. Called at the start, when layers are back.
    pub(super) fn publish_the_rest(self: &Arc<Self>) {
        if self.publisher.is_none() {
            return;
        }
        for layer in self.live_ids() {
            let belief = self.beliefs.get(&layer);
            let unpublished = belief.is_some_and(|belief| {
                belief.id == belief.blob && belief.index == Some(IndexRecord::Built { published: None })
            });
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

    /// Takes a layer whose index has shown itself to be false out of the cache, so that it is not read by that index any more. Whether it has.
    pub(super) fn forget_if_false(&self, id: &Digest) -> bool {
        let belief = self.beliefs.get(id);
        if !belief.is_some_and(|belief| belief.is_false()) {
            return false;
        }
        match self.loader.cache().forget(id) {
            true => tracing::warn!(%id, "its index was false, and is gone"),
            false => tracing::error!(%id, "its index is false, and it is still in use"),
        }
        true
    }

    /// Compares layers whose index came from elsewhere with their bytes, one after the other, as soon as all of those are here. Runs as
    /// long as the catalog.
    pub(super) fn check_shared(self: &Arc<Self>) {
        let catalog = Arc::downgrade(self);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(CHECK_EVERY).await;
                let Some(catalog) = catalog.upgrade() else { return };
                for id in catalog.live_ids() {
                    catalog.check_layer(id).await;
                }
            }
        });
    }

    async fn check_layer(self: &Arc<Self>, id: Digest) {
        let live = self.whole(&id);
        let Some((cached, promised)) = live.filter(|(cached, _)| *cached.id() == id) else {
            return;
        };
        let belief = self.beliefs.get(&id);
        let Some(mut index) = belief
            .filter(|belief| belief.proof.is_none())
            .and_then(|belief| belief.index)
        else {
            return;
        };
        let (IndexRecord::Shared {
            from,
            trust,
            digest,
            verified: None,
            ..
        }
        | IndexRecord::Soci {
            from,
            trust,
            digest,
            verified: None,
            ..
        }) = index.clone()
        else {
            return;
        };
        let layer = *cached.digest();
        let checked = tokio::task::spawn_blocking(move || check::describes(&cached, &promised)).await;
        let proof = match checked {
            Ok(Ok(proof)) => {
                tracing::info!(%layer, %id, from, "its index describes it");
                Some(proof)
            }
            Ok(Err(check::Mismatch::Absent)) => return,
            Ok(Err(mismatch)) => {
                self.metrics.index_mismatches_total.inc();
                tracing::error!(
                    %layer, %id, from, trust, index = %digest, %mismatch,
                    "its shared index is FALSE: containers may have seen wrong files. No pull gets it any more; remove the images that \
                     use it, and find out who wrote the index"
                );
                None
            }
            Err(panic) => {
                tracing::error!(%layer, %panic, "its index cannot be compared with it");
                return;
            }
        };
        index.set_verified(proof.is_some());
        if let Err(error) = self.note_check(&id, index, proof).await {
            tracing::error!(%error, %layer, "what its index is worth cannot be recorded");
        }
    }

    /// A live layer all of which is here, and what images promise its tar to be.
    pub(super) fn whole(&self, id: &Digest) -> Option<(Arc<CachedLayer>, Vec<Digest>)> {
        let live = self.read_live();
        let live = live.get(id).filter(|live| live.layer.cached().is_complete())?;
        Some((Arc::clone(live.layer.cached()), live.diff_ids.clone()))
    }

    /// Notes what came of a comparison: in one transaction, so that no proof is left without what it proves.
    async fn note_check(&self, id: &Digest, index: IndexRecord, proof: Option<Digest>) -> Result<(), StoreError> {
        let (of, noted) = (*id, index.clone());
        let change = self.store.change(move |draft| {
            draft.put_index(&of, &noted)?;
            let (Some(proof), Some(mut record)) = (proof, draft.layer(&of)?) else {
                return Ok(None);
            };
            record.proof = Some(proof);
            draft.put_layer(&record)?;
            Ok(Some(record))
        });
        let record: Result<_, StoreError> = change.await;
        // What was found is so, whether or not it could be written.
        self.beliefs.note_index(id, index);
        if let Some(record) = record? {
            self.beliefs.note(&record);
        }
        Ok(())
    }

    /// Ids of layers that are live, without variants.
    pub(super) fn live_ids(&self) -> Vec<Digest> {
        let live = self.read_live();
        let layers = live.iter().filter(|(_, live)| !live.is_variant);
        layers.map(|(id, _)| *id).collect()
    }
}
