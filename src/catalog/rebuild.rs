//! Variants whose files are lost or cannot be read, made again.
//!
//! A variant follows from its layer and from what lies below it ([`crate::layer::variant`]), and snapshots know what that is. Its digest tells
//! whether what was made is what it was.

use std::sync::Arc;

use super::Catalog;
use super::variants::{digest_of, names_of};
use crate::layer::variant::on_top_of;
use crate::layer::{Digest, LayerIndex};
use crate::store::{LayerRecord, shown};

/// Most variants below each other that have to be made again for one. Each is in memory meanwhile.
pub(super) const MAX_BELOW: usize = 64;

impl Catalog {
    /// The index of a variant, from what is live and recorded; `None` if nothing gives that very index. Of variants below, at most `below` may be
    /// lost as well.
    pub(super) fn rebuild_variant(&self, record: &LayerRecord, below: usize) -> Option<LayerIndex> {
        let (variant, base) = (Some(record.digest), record.variant_of?);
        let own = names_of(&*self.live_layer(&base)?).ok()?;
        let keys = self
            .store
            .keys(|snapshot| snapshot.layer == variant || snapshot.chain.contains(&variant));
        keys.iter().find_map(|key| {
            let shown = shown(&self.store.chain(key).ok()?);
            let at = shown.iter().position(|id| *id == variant)?;
            // Nothing is known of what is not served here, which is passed over as it was then.
            let names = shown.iter().take(at).rev();
            let names: Vec<_> = names.map(|id| self.names_shown(id.as_ref()?, below)).collect();
            let lower: Vec<_> = names.iter().map(Option::as_deref).collect();
            let index = on_top_of(&own, &lower).ok()??;
            (digest_of(&base, &index.encode()) == record.digest).then_some(index)
        })
    }

    /// The names of a layer, or of a variant.
    fn names_shown(&self, id: &Digest, below: usize) -> Option<Arc<LayerIndex>> {
        let record = self.store.layer(id).ok()??;
        if record.variant_of.is_none() {
            return names_of(&*self.live_layer(id)?).ok();
        }
        let stored = self.shelf.read(id).ok();
        let index = stored.or_else(|| self.rebuild_variant(&record, below.checked_sub(1)?))?;
        Some(Arc::new(index))
    }
}
