//! Records of images: which layers they are made of, under which names they were pulled, and why Lazuli does not serve some of them. And the
//! end of records, of images and of layers, when nothing refers to them any more.
//!
//! Each change is read, made and written in one transaction; what stays as it was is not written, so that a second pull of an image costs no
//! commit.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, MutexGuard, PoisonError, TryLockError};
use std::time::Instant;

use super::images::ImagePlan;
use super::loader::Refusal;
use super::{Catalog, GRACE};
use crate::layer::Digest;
use crate::store::{ImageLayer, ImageRecord, StoreError};
use crate::sync::blocking;

/// Most names of one image that are remembered.
const NAMES_MAX: usize = 16;

impl Catalog {
    /// All images whose records can be read.
    pub(super) fn images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        let damaged =
            |digest: Digest, error: StoreError| tracing::warn!(%error, manifest = %digest, "image is passed over");
        let images = self.store.images()?.into_iter();
        Ok(images
            .filter_map(|(digest, image)| image.map_err(|error| damaged(digest, error)).ok())
            .collect())
    }

    /// Records an image, so that what becomes of its layers can be noted.
    pub(super) async fn record_plan(&self, plan: &ImagePlan) -> Result<(), StoreError> {
        // Before it is written: who forgets images asks this first.
        self.lock_asked().insert(plan.manifest, Instant::now());
        let new = new_image_record(plan);
        let recorded = self.store.change(move |draft| {
            // A damaged record is replaced.
            let Some(mut record) = draft.image(&new.manifest).ok().flatten() else {
                return draft.put_image(&new);
            };
            for name in new.names {
                if !record.names.contains(&name) {
                    record.names.truncate(NAMES_MAX - 1);
                    record.names.push(name);
                }
            }
            draft.put_image(&record)
        });
        recorded.await
    }

    /// Notes why a layer is not served in all images that have it: containerd may never ask for it, because it unpacks one below.
    pub(super) async fn record_refusal(self: &Arc<Self>, digest: &Digest, refusal: &Refusal) -> Result<(), StoreError> {
        let (catalog, text, reason) = (Arc::clone(self), digest.to_string(), refusal.text.clone());
        let of_it = text.clone();
        let manifests = blocking(move || -> Result<Vec<Digest>, StoreError> {
            let images = catalog.images()?.into_iter();
            let with_it = images.filter(|image| image.layers.iter().any(|layer| layer.digest == of_it));
            Ok(with_it.map(|image| image.manifest).collect())
        });
        let manifests = manifests.await?;
        let recorded = self.store.change(move |draft| {
            for manifest in manifests {
                // Forgotten, or damaged, meanwhile.
                let Some(mut image) = draft.image(&manifest).ok().flatten() else {
                    continue;
                };
                for layer in image.layers.iter_mut().filter(|layer| layer.digest == text) {
                    layer.refused = Some(reason.clone());
                }
                draft.put_image(&image)?;
            }
            Ok::<_, StoreError>(())
        });
        recorded.await
    }

    /// Notes what became of a layer of an image.
    pub(super) async fn record_image(
        &self,
        plan: &ImagePlan,
        digest: &Digest,
        refusal: Option<&Refusal>,
    ) -> Result<(), StoreError> {
        let (new, text) = (new_image_record(plan), digest.to_string());
        let refused = refusal.map(|refusal| refusal.text.clone());
        let recorded = self.store.change(move |draft| {
            let mut record = draft.image(&new.manifest).ok().flatten().unwrap_or(new);
            for layer in record.layers.iter_mut().filter(|layer| layer.digest == text) {
                layer.refused.clone_from(&refused);
            }
            draft.put_image(&record)
        });
        recorded.await
    }

    /// Forgets images whose topmost layer no snapshot shows, and layers that no snapshot needs (`keep`), that are not live, not being loaded,
    /// and not in the cache: what is in the cache may come back without the network, for which its record is needed. What was found to be
    /// false is remembered, so that it is not believed once more.
    pub(super) fn forget_records(self: &Arc<Self>, mut keep: HashSet<Digest>) -> Result<(), StoreError> {
        // The layer of a variant is needed also while neither is live.
        for (variant, base) in self.store.variants()? {
            if keep.contains(&variant) {
                keep.insert(base);
            }
        }
        keep.extend(self.beliefs.false_ids());
        self.lock_asked().retain(|_, asked| asked.elapsed() <= GRACE);
        // Both are asked on the writer's thread too, which waits for no lock: what cannot be told is kept until the next time.
        let catalog = Arc::downgrade(self);
        let needed = move |digest: &Digest| {
            keep.contains(digest) || catalog.upgrade().is_none_or(|catalog| catalog.may_be_in_use(digest))
        };
        let catalog = Arc::downgrade(self);
        let gone = move |digest: &Digest| {
            if let Some(catalog) = catalog.upgrade() {
                catalog.beliefs.forget(digest);
            }
        };
        let layers = self.store.forget_layers(needed, gone)?;
        let catalog = Arc::downgrade(self);
        let young = move |manifest: &Digest| {
            catalog.upgrade().is_none_or(|catalog| match catalog.asked.try_lock() {
                Ok(asked) => asked.contains_key(manifest),
                Err(TryLockError::Poisoned(asked)) => asked.get_ref().contains_key(manifest),
                Err(TryLockError::WouldBlock) => true,
            })
        };
        let images = self.store.forget_images(young)?;
        let traces = self.forget_traces()?;
        if layers + images + traces > 0 {
            tracing::info!(layers, images, traces, "records of what is gone are forgotten");
        }
        Ok(())
    }

    /// Whether a layer is being loaded, live, or in the cache, as far as can be told without waiting.
    fn may_be_in_use(&self, digest: &Digest) -> bool {
        // In this order: a layer has settled after it has become live.
        let loading = match self.settling.try_lock() {
            Ok(settling) => settling.contains(digest),
            Err(TryLockError::Poisoned(settling)) => settling.get_ref().contains(digest),
            Err(TryLockError::WouldBlock) => true,
        };
        let is_live = || match self.live.try_read() {
            Ok(live) => live.contains_key(digest),
            Err(TryLockError::Poisoned(live)) => live.get_ref().contains_key(digest),
            Err(TryLockError::WouldBlock) => true,
        };
        loading || is_live() || self.loader.cache().contains_now(digest).unwrap_or(true)
    }

    fn lock_asked(&self) -> MutexGuard<'_, HashMap<Digest, Instant>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn new_image_record(plan: &ImagePlan) -> ImageRecord {
    let source = plan.sources.first();
    ImageRecord {
        manifest: plan.manifest,
        namespace: plan.namespace.clone(),
        names: plan.name.iter().cloned().collect(),
        host: source.map(|s| s.host.clone()).unwrap_or_default(),
        repository: source.map(|s| s.repository.clone()).unwrap_or_default(),
        layers: plan
            .layers
            .iter()
            .map(|layer| ImageLayer {
                digest: layer.spec.digest.to_string(),
                size: layer.spec.size,
                media_type: layer.spec.media_type.clone(),
                diff_id: layer.spec.diff_id.map(|id| id.to_string()).unwrap_or_default(),
                chain_id: layer.chain_id.clone(),
                refused: None,
            })
            .collect(),
    }
}
