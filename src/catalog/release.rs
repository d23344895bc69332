//! Letting go: of layers that no snapshot refers to, of their chains and images, and of mounts that no container needs.

use std::collections::HashSet;

use super::{Catalog, GRACE, Live, Needed, access_label};
use crate::fetch::LayerData as _;
use crate::layer::Digest;
use crate::store::{ImageLayer, StoreError};

impl Catalog {
    /// Lets go of everything that is not needed. Blocks for unmount calls.
    ///
    /// # Errors
    /// [`StoreError`] if images cannot be forgotten; everything else is let go then.
    pub(super) fn release(&self, needed: Needed) -> Result<(), StoreError> {
        let mut keep: HashSet<Digest> = needed.layers.into_iter().collect();
        self.release_layers(&mut keep);
        self.release_chains(&keep);
        let slots = self.slots_of_bases(&needed.bases);
        if let Some(faces) = &*self.faces() {
            faces.retain(&slots);
        }
        self.forget_images(&keep)
    }

    /// Releases layers that are not to be kept. `keep` gets the layers whose variants are kept.
    fn release_layers(&self, keep: &mut HashSet<Digest>) {
        keep.extend(self.release_variants(keep));
        let released: Vec<(Digest, Live)> = self
            .write_live()
            .extract_if(|digest, live| !live.is_variant && !keep.contains(digest) && live.wanted.elapsed() > GRACE)
            .collect();
        for (digest, live) in released {
            if let Some(faces) = &*self.faces() {
                faces.detach(live.slot);
            }
            live.layer.close();
            let access = access_label(live.layer.index().access());
            self.metrics.layers_live.with_label_values(&[access]).dec();
            tracing::info!(layer = %digest, "layer is released; its bytes stay in the cache while there is room");
        }
    }

    /// Forgets images none of whose layers is referred to any more.
    fn forget_images(&self, keep: &HashSet<Digest>) -> Result<(), StoreError> {
        // Images know layers by their blobs.
        let blob = |id: &Digest| self.beliefs.get(id).map_or(*id, |belief| belief.blob);
        let mut blobs: HashSet<Digest> = keep.iter().map(|id| blob(&self.beliefs.layer_of(id))).collect();
        blobs.extend(self.read_live().values().map(|live| *live.layer.digest()));
        let kept = |layer: &ImageLayer| layer.digest.parse().is_ok_and(|digest| blobs.contains(&digest));
        for image in self.images()? {
            if !image.layers.iter().any(kept) {
                self.store.remove_image(&image.manifest)?;
            }
        }
        Ok(())
    }
}
