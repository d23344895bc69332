//! Bringing back, at the start, what snapshots refer to.
//!
//! What is on disk is live before anybody is answered. A layer whose index is not there, or cannot be read, has to be loaded again, and the
//! registry may be away:
//! it is tried until it is there, or is gone for good, or nothing refers to it any more. Containers may run on it, of a session that this process
//! has taken over, so that requests for it wait ([`crate::fs::Session::expect`]).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use super::shared::Origin;
use super::{Catalog, How, Wanted, spec_of};
use crate::cache::Key;
use crate::layer::Digest;
use crate::store::{LayerRecord, StoreError};

/// Pause before a layer that containers may wait for is loaded once more: at first, and at most.
const AGAIN: Duration = Duration::from_secs(1);
const AGAIN_MAX: Duration = Duration::from_secs(15);

impl Catalog {
    /// Brings back the layers that committed snapshots refer to. Those whose index is stored are live when this returns; the
    /// others are loaded again in the background, for which the network is needed, and their readers wait meanwhile. It blocks: call it on a
    /// runtime's thread that may.
    ///
    /// # Errors
    /// [`StoreError`] when the database cannot be read.
    pub fn restore(self: &Arc<Self>, referenced: &[Digest]) -> Result<(), StoreError> {
        self.beliefs.load(&self.store)?;
        let mut referenced: HashSet<_> = referenced.iter().copied().collect();
        let (mut restored, mut missing) = (0_usize, 0_usize);
        let (mut layers, mut variants) = (Vec::new(), Vec::new());
        let mut absent: HashMap<Digest, (Wanted, u32)> = HashMap::new();
        for (digest, record) in self.store.layers()? {
            match record {
                Ok(record) if record.variant_of.is_some() => variants.push(record),
                Ok(record) => layers.push(record),
                Err(error) => tracing::error!(%error, layer = %digest, "its record is lost; pull its image again"),
            }
        }
        variants.retain(|record| referenced.contains(&record.digest) || self.forget_variant(&record.digest));
        referenced.extend(variants.iter().filter_map(|record| record.variant_of));
        for record in layers.into_iter().filter(|record| referenced.contains(&record.digest)) {
            let digest = record.digest;
            let spec = spec_of(&record);
            let blob = self.blob(&spec, &record.sources);
            let key = Key {
                id: digest,
                blob: spec.digest,
            };
            let stored = match self.forget_if_false(&digest) {
                true => Ok(None),
                false => self.loader.stored(key, Arc::clone(&blob)),
            };
            // The order in the record is what is left of what was known: who comes first there came first for a reason.
            blob.verified();
            let stored = stored.unwrap_or_else(|refusal| {
                // It may be there the next time.
                tracing::error!(layer = %digest, reason = %refusal, "cannot be read from the cache now");
                None
            });
            match stored {
                Some(layer) => match self.attach(&spec, digest, record.slot, layer, record.streamed) {
                    Ok(_) => restored += 1,
                    Err(refusal) => tracing::error!(layer = %digest, reason = %refusal, "cannot be brought back"),
                },
                None => {
                    missing += 1;
                    tracing::warn!(layer = %record.digest, "its index is not to be had from the cache, it will be loaded again");
                    let origin = Origin {
                        sources: record.sources,
                        manifest: None,
                    };
                    let wanted = Wanted {
                        spec,
                        origin,
                        names: record.images,
                        how: How::Again(digest),
                        lendable: false,
                    };
                    absent.insert(digest, (wanted, record.slot));
                }
            }
        }
        let is_absent = |record: &LayerRecord| record.variant_of.is_some_and(|base| absent.contains_key(&base));
        let mut later = self.restore_variants(variants, is_absent);
        for (digest, (wanted, slot)) in absent {
            let (own, others) = later.into_iter().partition(|record| record.variant_of == Some(digest));
            later = others;
            self.load_again(digest, wanted, slot, own);
        }
        self.restore_chains(&referenced)?;
        self.publish_the_rest();
        self.check_shared();
        self.look_in_content();
        tracing::info!(restored, missing, "layers of committed snapshots are back");
        Ok(())
    }

    /// Loads a layer that a snapshot refers to until it is there, and then the variants of it. Requests for them wait.
    fn load_again(self: &Arc<Self>, digest: Digest, wanted: Wanted, slot: u32, variants: Vec<LayerRecord>) {
        let slots: Vec<u32> = variants.iter().map(|record| record.slot).chain([slot]).collect();
        self.with_faces(|faces| slots.iter().for_each(|slot| faces.session().expect(*slot)));
        let catalog = Arc::clone(self);
        self.runtime.spawn(async move {
            if catalog.loaded_again(digest, wanted).await {
                let (catalog, variants) = (Arc::clone(&catalog), variants);
                let restore = move || variants.iter().for_each(|record| catalog.restore_variant(record));
                // It only fails if it panics.
                let _ = tokio::task::spawn_blocking(restore).await;
            }
            // Those that are there have been settled.
            catalog.with_faces(|faces| slots.iter().for_each(|slot| faces.session().give_up(*slot)));
        });
    }

    /// Tells whether the layer is there in the end.
    async fn loaded_again(self: &Arc<Self>, digest: Digest, wanted: Wanted) -> bool {
        let mut pause = AGAIN;
        loop {
            match self.begin(wanted.clone()).wait().await {
                Ok(_) => return true,
                Err(refusal) if !refusal.retry_helps || !self.is_open() => return false,
                // Why is told where it happens.
                Err(_) => {}
            }
            let catalog = Arc::clone(self);
            let recorded = crate::sync::blocking(move || catalog.store.slot(&digest)).await;
            if matches!(recorded, Ok(None)) {
                // Nothing refers to it any more.
                return false;
            }
            tokio::time::sleep(pause).await;
            pause = AGAIN_MAX.min(pause * 2);
        }
    }
}
