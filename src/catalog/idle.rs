//! What the daemon does by itself while nobody waits for anything, one thing at a time: it completes images where that is wanted ([`super::complete`]),
//! and then fills the layers that are read lazily ([`crate::fetch`]), so that containers that come later read them without it, and do not depend on
//! their registry any more.
//!
//! It begins when nobody has wanted a byte for [`IDLE_FOR`], and from then on lets everybody go first who comes. The layers of the image that was
//! pulled last are the first to be filled.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Catalog, Live};
use crate::config::{Complete, Fill};
use crate::fetch::{Filled, Layer, LayerData};
use crate::layer::Digest;
use crate::registry::causes;
use crate::sync::caught;

/// How long nobody may have waited for a byte: longer than a container pauses that is about to start.
const IDLE_FOR: Duration = Duration::from_secs(10);
/// How often it is looked whether there is something to do.
const LOOK: Duration = Duration::from_secs(1);
/// How often containerd is asked which images are complete: by a machine that is idle, and where images are completed as soon as they are there.
const ASK_IDLE: Duration = Duration::from_secs(30);
const ASK_ALWAYS: Duration = Duration::from_secs(5);
/// When what failed is tried again.
const AGAIN: Duration = Duration::from_secs(600);

/// What failed lately.
struct Failed<K>(HashMap<K, Instant>);

impl<K: Eq + Hash> Failed<K> {
    fn new() -> Self {
        Failed(HashMap::new())
    }

    fn has(&mut self, what: &K) -> bool {
        self.0.retain(|_, at| at.elapsed() < AGAIN);
        self.0.contains_key(what)
    }

    fn add(&mut self, what: K) {
        self.0.insert(what, Instant::now());
    }
}

impl Catalog {
    /// Completes images and fills layers, as long as the catalog is there.
    pub fn work_while_idle(self: &Arc<Self>, complete: Complete, fill: Fill) {
        if complete == Complete::Off && fill == Fill::Off {
            return;
        }
        let catalog = Arc::downgrade(self);
        self.runtime.spawn(async move {
            let (mut images, mut layers) = (Failed::new(), Failed::new());
            let (mut asked, mut goes_on): (Option<Instant>, bool) = (None, false);
            loop {
                if !goes_on {
                    tokio::time::sleep(LOOK).await;
                }
                let Some(catalog) = catalog.upgrade().filter(|catalog| catalog.is_open()) else {
                    return;
                };
                let idle = catalog.is_idle();
                let every = match complete {
                    Complete::Off => None,
                    Complete::Idle => idle.then_some(ASK_IDLE),
                    Complete::Always => Some(ASK_ALWAYS),
                };
                if every.is_some_and(|every| asked.is_none_or(|asked| asked.elapsed() > every)) {
                    if catalog.complete_one(&mut images).await {
                        continue;
                    }
                    asked = Some(Instant::now());
                }
                // One after the other while it goes well, or an image of many small layers would take long. Each of them waits for its turn itself.
                goes_on = (idle || goes_on) && fill == Fill::Idle && catalog.fill_one(&mut layers).await;
            }
        });
    }

    /// Whether nobody has wanted a byte for a while. Who waits for a registry that is away wants nothing that could be had.
    fn is_idle(&self) -> bool {
        self.loader.fetcher().scheduler().calm() >= IDLE_FOR
    }

    /// Completes an image that is not, if there is one; whether there was.
    async fn complete_one(self: &Arc<Self>, failed: &mut Failed<(String, Digest)>) -> bool {
        self.look_at_completeness().await;
        let mut missing: Vec<(String, Digest)> = Vec::new();
        missing.extend(
            self.completeness()
                .iter()
                .filter(|(_, complete)| !**complete)
                .map(|(image, _)| image.clone()),
        );
        let Some((namespace, manifest)) = missing.into_iter().find(|image| !failed.has(image)) else {
            return false;
        };
        if let Err(error) = self.complete_digest(&namespace, &manifest).await {
            let reason = causes(&error);
            tracing::warn!(%manifest, namespace, reason, "an image cannot be completed; it is tried again later");
            failed.add((namespace, manifest));
        }
        true
    }

    /// Fills a layer that is not whole, if there is one; whether it is then.
    async fn fill_one(&self, failed: &mut Failed<Digest>) -> bool {
        let mut partial: Vec<(Instant, Arc<Layer>)> = {
            let live = self.read_live();
            let partial = live.values().filter(|live| is_to_be_filled(live));
            partial.map(|live| (live.wanted, Arc::clone(&live.layer))).collect()
        };
        partial.sort_by_key(|(wanted, _)| std::cmp::Reverse(*wanted));
        let Some(layer) = partial
            .into_iter()
            .map(|(_, layer)| layer)
            .find(|layer| !failed.has(layer.id()))
        else {
            return false;
        };
        let begun = Instant::now();
        // A bug in it must not end everything that is done while the machine is idle.
        let filled = caught(layer.fill_up()).await.unwrap_or_else(|bug| {
            tracing::error!(layer = %layer.digest(), %bug, "filling failed");
            Filled::default()
        });
        if filled.whole {
            let seconds = begun.elapsed().as_secs_f64();
            tracing::info!(layer = %layer.digest(), bytes = filled.bytes, seconds, "the layer is whole now");
        } else {
            tracing::debug!(layer = %layer.digest(), bytes = filled.bytes, "the layer could not be filled; it is tried again later");
            failed.add(*layer.id());
        }
        filled.whole
    }
}

/// Whether a layer is used, and something of it is missing. A variant has the bytes of its layer.
fn is_to_be_filled(live: &Live) -> bool {
    !live.is_variant && live.layer.cached().is_pinned() && live.layer.can_be_filled()
}
