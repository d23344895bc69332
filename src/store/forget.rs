//! Taking away what nothing refers to, so that the database is as large as what a node has, not as what it ever had.
//!
//! What is needed is asked twice: to find what may go, and once more within the transaction, so that what has come to be needed in between
//! stays. Whoever makes something needed says so (in memory) before he writes its record; then one of both holds: the second question sees it,
//! or the record is written after it was taken away.

use std::collections::HashSet;
use std::sync::Arc;

use super::{Store, StoreError};
use crate::layer::Digest;

impl Store {
    /// Forgets layers and variants that are not needed: their records, where their indexes came from, and their slots. How many layers
    /// that were. `needed` is also asked on the writer's thread, and must not wait for any lock; `gone` is told there of each that goes, before
    /// anyone can write a record of it again.
    ///
    /// # Errors
    /// An error of the database; nothing is forgotten then.
    pub fn forget_layers(
        &self,
        needed: impl Fn(&Digest) -> bool + Send + 'static,
        gone: impl Fn(&Digest) + Send + 'static,
    ) -> Result<usize, StoreError> {
        let chains = self.chained()?;
        let mut unneeded: HashSet<Digest> = self.recorded()?.into_iter().collect();
        // Without a record of their own there may be leftovers of earlier versions.
        unneeded.extend(self.indexed()?);
        unneeded.extend(self.slotted()?.into_iter().filter(|digest| !chains.contains(digest)));
        unneeded.retain(|digest| !needed(digest));
        if unneeded.is_empty() {
            return Ok(0);
        }
        self.write(move |draft| {
            let mut forgotten = 0;
            for digest in unneeded.iter().filter(|digest| !needed(digest)) {
                // A slot may have become that of a chain.
                if !draft.has_chain(digest)? {
                    draft.remove_index(digest)?;
                    forgotten += usize::from(draft.remove_layer(digest)?);
                    gone(digest);
                }
            }
            Ok(forgotten)
        })
    }

    /// Forgets images of which no snapshot shows the topmost layer, unless they are `young`: then that may be about to come. How
    /// many that were. `young` is also asked on the writer's thread, and must not wait for any lock.
    ///
    /// # Errors
    /// An error of the database; nothing is forgotten then.
    pub fn forget_images(&self, young: impl Fn(&Digest) -> bool + Send + 'static) -> Result<usize, StoreError> {
        let images = self.images()?;
        let chain_ids = self.inner.lineage.chain_ids();
        let mut unneeded = Vec::new();
        for (manifest, image) in images {
            // One that cannot be read is of no use to anyone.
            let top = image
                .ok()
                .and_then(|image| image.layers.last().map(|layer| layer.chain_id.clone()));
            if !top.is_some_and(|top| chain_ids.contains(&top)) && !young(&manifest) {
                unneeded.push(manifest);
            }
        }
        if unneeded.is_empty() {
            return Ok(0);
        }
        let inner = Arc::downgrade(&self.inner);
        self.write(move |draft| {
            let chain_ids = inner
                .upgrade()
                .map(|inner| inner.lineage.chain_ids())
                .unwrap_or_default();
            let mut forgotten = 0;
            for manifest in unneeded.iter().filter(|manifest| !young(manifest)) {
                let top = draft
                    .image(manifest)
                    .ok()
                    .flatten()
                    .and_then(|image| image.layers.last().map(|layer| layer.chain_id.clone()));
                if !top.is_some_and(|top| chain_ids.contains(&top)) {
                    forgotten += usize::from(draft.remove_image(manifest)?);
                }
            }
            Ok(forgotten)
        })
    }
}
