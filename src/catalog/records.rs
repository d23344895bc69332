//! Records of images: which layers they are made of, under which names they were pulled, and why Lazuli does not serve some of them.

use std::sync::{MutexGuard, PoisonError};

use super::Catalog;
use super::images::ImagePlan;
use super::loader::Refusal;
use crate::layer::Digest;
use crate::store::{ImageLayer, ImageRecord, StoreError};

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
    pub(super) fn record_plan(&self, plan: &ImagePlan) -> Result<(), StoreError> {
        let _recording = self.lock_records();
        match self.store.image(&plan.manifest)? {
            Some(_) => Ok(()),
            None => self.store.put_image(&new_image_record(plan)),
        }
    }

    /// Notes why a layer is not served in all images that have it: containerd may never ask for it, because it unpacks one below.
    pub(super) fn record_refusal(&self, digest: &Digest, refusal: &Refusal) -> Result<(), StoreError> {
        let _recording = self.lock_records();
        let text = digest.to_string();
        for mut image in self.images()? {
            let mut changed = false;
            for layer in image.layers.iter_mut().filter(|layer| layer.digest == text) {
                layer.refused = Some(refusal.text.clone());
                changed = true;
            }
            if changed {
                self.store.put_image(&image)?;
            }
        }
        Ok(())
    }

    pub(super) fn record_image(
        &self,
        plan: &ImagePlan,
        digest: &Digest,
        refusal: Option<&Refusal>,
    ) -> Result<(), StoreError> {
        let _recording = self.lock_records();
        let mut record = match self.store.image(&plan.manifest)? {
            Some(record) => record,
            None => new_image_record(plan),
        };
        if let Some(name) = &plan.name
            && !record.names.contains(name)
        {
            record.names.push(name.clone());
        }
        let text = digest.to_string();
        for layer in record.layers.iter_mut().filter(|layer| layer.digest == text) {
            layer.refused = refusal.map(|refusal| refusal.text.clone());
        }
        self.store.put_image(&record)
    }

    fn lock_records(&self) -> MutexGuard<'_, ()> {
        self.recording.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn new_image_record(plan: &ImagePlan) -> ImageRecord {
    let source = plan.sources.first();
    ImageRecord {
        manifest: plan.manifest,
        namespace: plan.namespace.clone(),
        names: Vec::new(),
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
