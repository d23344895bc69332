//! Letting go: of layers that no snapshot refers to, of their chains, of mounts that no container needs, and of what is recorded of all that.
//!
//! In two steps. What goes is decided at once, while nobody may come to refer to it: it is no longer live then. Unmounting, closing and
//! forgetting come after, while pulls and containers go on; a layer that comes back meanwhile is left alone.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use super::{Catalog, GRACE, Live, Needed, access_label};
use crate::fetch::LayerData;
use crate::layer::Digest;

/// How long after it was last asked for a live layer that no snapshot refers to keeps its bytes on a full disk: its pull has not come to
/// commit it yet. (It stays live for much longer, and its bytes come back if they are needed.)
const IDLE_AFTER: Duration = Duration::from_secs(30);

/// What has been decided to go.
pub(super) struct Going {
    layers: Vec<(Digest, Live)>,
    variants: Vec<(Digest, Live)>,
    /// What stays.
    keep: HashSet<Digest>,
    /// What containers are made on, and the slots of that.
    bases: Vec<Vec<Digest>>,
    slots: HashSet<u32>,
}

impl Catalog {
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

    /// Decides what goes: what is not needed, and was not asked for just now.
    pub(super) fn release(&self, needed: Needed) -> Going {
        self.tell_idle(needed.layers.iter().chain(needed.bases.iter().flatten()));
        self.note_used(&needed.bases);
        let mut keep: HashSet<Digest> = needed.layers.into_iter().collect();
        let (variants, bases_of_variants) = self.release_variants(&keep);
        keep.extend(bases_of_variants);
        let layers = self
            .write_live()
            .extract_if(|digest, live| !live.is_variant && !keep.contains(digest) && live.wanted.elapsed() > GRACE)
            .collect();
        Going {
            layers,
            variants,
            slots: self.slots_of_bases(&needed.bases),
            bases: needed.bases,
            keep,
        }
    }

    /// Lets go of it. What was given out after `mark` is not unmounted. Blocks for unmount calls and the database.
    pub(super) fn let_go(self: &Arc<Self>, going: Going, mark: u64) {
        for (variant, live) in going.variants {
            self.let_variant_go(&variant, live);
        }
        for (digest, live) in going.layers {
            self.let_layer_go(&digest, live);
        }
        self.release_chains(&going.keep, &going.bases);
        if let Some(faces) = &*self.faces() {
            faces.retain(&going.slots, mark);
        }
        if let Err(error) = self.forget_records(going.keep) {
            tracing::error!(%error, "records of what is gone cannot be forgotten");
        }
    }

    fn let_layer_go(&self, digest: &Digest, live: Live) {
        live.layer.close();
        let access = access_label(live.layer.index().access());
        self.metrics.layers_live.with_label_values(&[access]).dec();
        // It may be there again, in the same slot, with a new reader.
        let layer: Arc<dyn LayerData> = live.layer;
        if let Some(faces) = &*self.faces() {
            faces.detach_layer(live.slot, &layer);
        }
        tracing::info!(layer = %digest, "layer is released; its bytes stay in the cache while there is room");
    }
}
