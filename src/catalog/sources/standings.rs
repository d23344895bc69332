//! What is known of the places that layers can be had from: who has delivered, and who failed lately.

use std::cmp::Reverse;
use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};

use lru::LruCache;
use tokio::time::Instant;

use super::origin;
use crate::layer::Digest;
use crate::registry::Origin;
use crate::registry::health::Shun;
use crate::store::LayerSource;

/// Layers and places of which something is known; the ones unused longest are forgotten.
const MAX_KNOWN: NonZeroUsize = NonZeroUsize::new(16_384).unwrap();

/// What is known of all places of all layers.
pub struct Standings(Mutex<Known>);

struct Known {
    places: LruCache<(Digest, Origin), Standing>,
    /// Counts deliveries.
    deliveries: u64,
}

/// What is known of one place of one layer.
#[derive(Debug, Clone, Copy, Default)]
struct Standing {
    /// Which delivery its last one was.
    delivered: Option<u64>,
    shun: Shun,
}

impl Default for Standings {
    fn default() -> Self {
        Standings(Mutex::new(Known {
            places: LruCache::new(MAX_KNOWN),
            deliveries: 0,
        }))
    }
}

impl Standings {
    /// The sources of a layer, of which those in `new` were just named by an image, and `known` were known before: in the order in which
    /// they are to be asked, and at most `most` of them. New ones come behind those that have delivered, and before others.
    pub fn arrange(&self, layer: &Digest, known: &[LayerSource], new: &[LayerSource], most: usize) -> Vec<LayerSource> {
        let now = Instant::now().into_std();
        let known_only = known.iter().filter(|source| !new.contains(source));
        let all: Vec<&LayerSource> = new.iter().chain(known_only).collect();
        let places = self.lock();
        let mut order: Vec<usize> = (0..all.len()).collect();
        order.sort_by_key(|at| {
            let standing = places.of(layer, &origin(all[*at]));
            // Who has delivered is kept, even if nobody can reach it now.
            let delivered = standing.delivered.map(Reverse);
            (delivered.is_none(), delivered, standing.shun.ends(now), *at)
        });
        order.into_iter().take(most).map(|at| all[at].clone()).collect()
    }

    /// The order in which `places` are asked for a layer.
    pub(super) fn order<'a>(&self, layer: &Digest, places: impl Iterator<Item = &'a Origin>) -> Vec<usize> {
        let now = Instant::now().into_std();
        let known = self.lock();
        let mut order: Vec<_> = places
            .enumerate()
            .map(|(at, place)| {
                let standing = known.of(layer, place);
                let delivered = standing.delivered.map(Reverse);
                (standing.shun.ends(now), delivered.is_none(), delivered, at)
            })
            .collect();
        order.sort();
        order.into_iter().map(|(.., at)| at).collect()
    }

    /// A place sent bytes that are the layer's.
    pub(in crate::catalog) fn delivered(&self, layer: &Digest, place: &Origin) {
        let mut known = self.lock();
        known.deliveries += 1;
        let delivered = Some(known.deliveries);
        let shun = Shun::default();
        known.places.put((*layer, place.clone()), Standing { delivered, shun });
    }

    /// A place could not deliver. What it delivered before still tells it from the others.
    pub(super) fn failed(&self, layer: &Digest, place: &Origin) {
        let now = Instant::now().into_std();
        let mut known = self.lock();
        let key = (*layer, place.clone());
        let mut standing = known.places.get(&key).copied().unwrap_or_default();
        standing.shun.failed(now);
        known.places.put(key, standing);
    }

    /// A place sent bytes that are not the layer's: what it delivered before counts no more.
    pub(super) fn lied(&self, layer: &Digest, place: &Origin) {
        self.failed(layer, place);
        if let Some(standing) = self.lock().places.get_mut(&(*layer, place.clone())) {
            standing.delivered = None;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn of(&self, layer: &Digest, place: &Origin) -> Standing {
        let known = self.places.peek(&(*layer, place.clone()));
        known.copied().unwrap_or_default()
    }
}
