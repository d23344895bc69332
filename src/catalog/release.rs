//! Letting go: of layers that no snapshot refers to, of their chains and images, and of mounts that no container needs.

use std::collections::HashSet;
use std::time::Duration;

use super::{Catalog, GRACE, Live, Needed, access_label};
use crate::fetch::LayerData as _;
use crate::layer::Digest;
use crate::store::{ImageLayer, StoreError};

/// How long after it was last asked for a live layer that no snapshot refers to keeps its bytes on a full disk: its pull has not come to
/// commit it yet. (It stays live for much longer, and its bytes come back if they are needed.)
const IDLE_AFTER: Duration = Duration::from_secs(30);

impl Catalog {
    /// Lets go of everything that is not needed. Blocks for unmount calls.
    ///
    /// # Errors
    /// [`StoreError`] if images cannot be forgotten; everything else is let go then.
    pub(super) fn release(&self, needed: Needed) -> Result<(), StoreError> {
        self.tell_idle(needed.layers.iter().chain(needed.bases.iter().flatten()));
        let mut keep: HashSet<Digest> = needed.layers.into_iter().collect();
        self.release_layers(&mut keep);
        self.release_chains(&keep);
        let slots = self.slots_of_bases(&needed.bases);
        if let Some(faces) = &*self.faces() {
            faces.retain(&slots);
        }
        self.forget_images(&keep)
    }

    /// Tells the cache which live layers snapshots refer to. (A layer and its variants have a pin each: any of them keeps the bytes.)
    fn tell_idle<'a>(&self, needed: impl Iterator<Item = &'a Digest>) {
        let needed: HashSet<&Digest> = needed.collect();
        for (digest, live) in self.read_live().iter() {
            match live.wanted.checked_add(IDLE_AFTER) {
                Some(from) if !needed.contains(digest) => live.in_use.idle_from(from),
                _ => live.in_use.wanted(),
            }
        }
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
        let kept = |layer: &ImageLayer| layer.digest.parse().is_ok_and(|digest| keep.contains(&digest));
        for image in self.images()? {
            let young = image
                .layers
                .iter()
                .any(|layer| layer.digest.parse().is_ok_and(|d| self.read_live().contains_key(&d)));
            if !young && !image.layers.iter().any(kept) {
                self.store.remove_image(&image.manifest)?;
            }
        }
        Ok(())
    }
}
