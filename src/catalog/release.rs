//! Letting go: of layers that no snapshot refers to, of their chains, of mounts that no container needs, and of what is recorded of all that.

use std::collections::HashSet;
use std::sync::Arc;

use super::{Catalog, GRACE, Live, Needed, access_label};
use crate::fetch::LayerData as _;
use crate::layer::Digest;
use crate::store::StoreError;

impl Catalog {
    /// Lets go of everything that is not needed. Blocks for unmount calls.
    ///
    /// # Errors
    /// [`StoreError`] if records cannot be forgotten; everything else is let go then.
    pub(super) fn release(self: &Arc<Self>, needed: Needed) -> Result<(), StoreError> {
        let mut keep: HashSet<Digest> = needed.layers.into_iter().collect();
        self.release_layers(&mut keep);
        self.release_chains(&keep);
        let slots = self.slots_of_bases(&needed.bases);
        if let Some(faces) = &*self.faces() {
            faces.retain(&slots);
        }
        self.forget_records(keep)
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
}
