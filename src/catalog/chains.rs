//! Chains: the layers that a container is made on, shown merged, as one directory.
//!
//! A chain is a list of live layers and variants, lowest first, each once (where it is topmost: all that it has below is hidden by
//! itself). Its image is made by [`crate::fs::Faces`], in the background, one at a time: as soon as the topmost layer of an image is live, and when
//! a container asked for a chain that has none. Nobody waits for it; who is faster stacks the layers.
//!
//! The database knows each chain by its digest before its image is made, so that no image is ever left without an owner. A chain goes when
//! one of its layers is released, and at the start those go that hold a layer that no snapshot refers to.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use super::Catalog;
use super::status::ChainStatus;
use crate::fs::{Face, Faces};
use crate::layer::Digest;
use crate::store::StoreError;

/// Tells the digest of a chain from digests of other things.
const DIGEST_DOMAIN: &[u8] = b"lazuli chain\0";

/// How long an image that could not be made is not tried again: what stands in the way (a full disk, say) may pass.
const RETRY: Duration = Duration::from_secs(300);

/// Directories that show layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lowers {
    /// One shows all of them.
    Merged(PathBuf),
    /// Each shows one, in the order in which they were asked for.
    Stacked(Vec<PathBuf>),
}

/// The chains that are known.
pub(super) struct Chains {
    known: Mutex<HashMap<Digest, Chain>>,
    /// Lets one image be made at a time.
    turn: Arc<Semaphore>,
}

struct Chain {
    layers: Vec<Digest>,
    /// Its slot, once an image was made or tried.
    slot: Option<u32>,
    state: State,
}

/// What there is of a chain's image.
#[derive(Debug, Clone)]
enum State {
    /// It is being made, or waits for that.
    Waiting,
    /// It was made, by this process or an earlier one.
    Stored,
    /// It could not be made.
    Failed { reason: String, at: Instant },
}

impl Chains {
    pub(super) fn new() -> Self {
        Chains {
            known: Mutex::default(),
            turn: Arc::new(Semaphore::new(1)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Digest, Chain>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Digest of the chain of `layers`, the lowest first.
fn digest_of(layers: &[Digest]) -> Digest {
    let mut bytes = DIGEST_DOMAIN.to_vec();
    for layer in layers {
        bytes.extend_from_slice(layer.as_bytes());
    }
    Digest::of(&bytes)
}

/// `layers`, topmost first, as a chain: the lowest first, each once.
fn chain_of(layers: &[Digest]) -> Vec<Digest> {
    let mut seen = HashSet::new();
    let mut chain: Vec<Digest> = layers.iter().copied().filter(|layer| seen.insert(*layer)).collect();
    chain.reverse();
    chain
}

impl Catalog {
    /// The directories that show `layers` (topmost first, each once). Mounts what is not mounted; waits for nothing else.
    ///
    /// # Errors
    /// The layer that is not live.
    pub(super) fn lowers(self: &Arc<Self>, layers: &[Digest]) -> Result<Lowers, Digest> {
        let Some(last) = layers.last() else {
            return Ok(Lowers::Stacked(Vec::new()));
        };
        let slots = self.slots(layers)?;
        let faces = self.faces();
        let faces = faces.as_ref().ok_or(*last)?;
        if let Some(path) = self.merged(faces, layers, &slots) {
            return Ok(Lowers::Merged(path));
        }
        let paths = layers.iter().zip(slots).map(|(layer, slot)| {
            faces.layer_path(slot).map_err(|error| {
                tracing::error!(%error, %layer, "a layer cannot be shown");
                *layer
            })
        });
        Ok(Lowers::Stacked(paths.collect::<Result<_, _>>()?))
    }

    /// Slots of live layers, or the one that is not live.
    fn slots(&self, layers: &[Digest]) -> Result<Vec<u32>, Digest> {
        let live = self.read_live();
        let slot = |layer: &Digest| live.get(layer).map(|live| live.slot).ok_or(*layer);
        layers.iter().map(slot).collect()
    }

    /// The directory of the chain of `layers`, topmost first as their `slots` are. If there is none, one is made for the next time.
    fn merged(self: &Arc<Self>, faces: &Faces, layers: &[Digest], slots: &[u32]) -> Option<PathBuf> {
        if layers.len() < 2 || faces.serving().face == Face::Tree {
            return None;
        }
        let chain = chain_of(layers);
        let stored = match self.chains.lock().get(&digest_of(&chain)) {
            Some(Chain {
                state: State::Stored,
                slot,
                ..
            }) => *slot,
            _ => None,
        };
        let lowest_first: Vec<u32> = slots.iter().rev().copied().collect();
        let path = stored.and_then(|slot| faces.chain_path(slot, &lowest_first));
        if path.is_none() {
            self.want_chain(chain);
        }
        path
    }

    /// Has the image of `layers` (topmost first) made, if it is not there.
    pub(super) fn expect(self: &Arc<Self>, layers: &[Digest]) {
        let chain = chain_of(layers);
        let serves = |faces: &Faces| faces.serving().face == Face::Image;
        if chain.len() < 2 || !self.faces().as_ref().is_some_and(serves) {
            return;
        }
        let stored = |chain: &Chain| matches!(chain.state, State::Stored);
        if self.chains.lock().get(&digest_of(&chain)).is_some_and(stored) {
            return;
        }
        self.want_chain(chain);
    }

    /// Begins to make the image of a chain, unless that is under way or was tried in vain just now.
    fn want_chain(self: &Arc<Self>, layers: Vec<Digest>) {
        let digest = digest_of(&layers);
        {
            let mut known = self.chains.lock();
            match known.get(&digest).map(|chain| &chain.state) {
                Some(State::Waiting) => return,
                Some(State::Failed { at, .. }) if at.elapsed() < RETRY => return,
                _ => {}
            }
            // A slot that it had stays: something may still be mounted there.
            let slot = known.get(&digest).and_then(|chain| chain.slot);
            let chain = Chain {
                layers: layers.clone(),
                slot,
                state: State::Waiting,
            };
            known.insert(digest, chain);
        }
        let catalog = Arc::clone(self);
        self.runtime.spawn(async move {
            // The semaphore is never closed.
            let turn = Arc::clone(&catalog.chains.turn).acquire_owned().await;
            let work = move || {
                catalog.make_chain(digest, &layers);
                drop(turn);
            };
            if let Err(error) = tokio::task::spawn_blocking(work).await {
                tracing::error!(%error, chain = %digest, "merging layers was interrupted");
            }
        });
    }

    fn make_chain(&self, digest: Digest, layers: &[Digest]) {
        let begun = Instant::now();
        let (slot, state) = match self.try_chain(digest, layers) {
            Ok(slot) => {
                let seconds = begun.elapsed().as_secs_f64();
                tracing::info!(chain = %digest, layers = layers.len(), seconds, "layers are merged into one image");
                (Some(slot), State::Stored)
            }
            Err(reason) => {
                tracing::warn!(chain = %digest, layers = layers.len(), %reason, "layers cannot be merged, and are stacked");
                let at = Instant::now();
                (None, State::Failed { reason, at })
            }
        };
        let mut known = self.chains.lock();
        if let Some(chain) = known.get_mut(&digest) {
            chain.slot = slot.or(chain.slot);
            chain.state = state;
        }
        drop(known);
        // A release may have come meanwhile.
        if self.slots(layers).is_err() {
            self.forget_chain(&digest);
        }
    }

    /// Slot of the chain whose image was made.
    fn try_chain(&self, digest: Digest, layers: &[Digest]) -> Result<u32, String> {
        let slots = self
            .slots(layers)
            .map_err(|layer| format!("layer {layer} was released"))?;
        let recorded = self.store.record_chain(digest, layers.to_vec());
        let slot = recorded.map_err(|error| error.to_string())?;
        match &*self.faces() {
            Some(faces) => faces.build_chain(slot, &slots).map_err(|error| error.to_string())?,
            None => return Err("the daemon ends".to_owned()),
        }
        Ok(slot)
    }

    /// Knows the chains of an earlier process again; those that hold a layer that is not in `referenced` are removed.
    pub(super) fn restore_chains(&self, referenced: &HashSet<Digest>) -> Result<(), StoreError> {
        for (digest, record) in self.store.chains()? {
            match record {
                Ok(record) if record.layers.iter().all(|layer| referenced.contains(layer)) => {
                    let chain = Chain {
                        layers: record.layers,
                        slot: Some(record.slot),
                        state: State::Stored,
                    };
                    self.chains.lock().insert(digest, chain);
                }
                Ok(record) => self.remove_chain(&digest, Some(record.slot)),
                Err(error) => {
                    tracing::warn!(%error, "a chain is made again when it is needed");
                    self.remove_chain(&digest, self.store.slot(&digest).ok().flatten());
                }
            }
        }
        Ok(())
    }

    /// Removes the chains of which any layer is neither live nor in `keep`.
    pub(super) fn release_chains(&self, keep: &HashSet<Digest>) {
        let gone: Vec<Digest> = {
            let (known, live) = (self.chains.lock(), self.read_live());
            let stays = |layer: &Digest| keep.contains(layer) || live.contains_key(layer);
            known
                .iter()
                // One that is being made is looked at again when it is.
                .filter(|(_, chain)| !matches!(chain.state, State::Waiting))
                .filter(|(_, chain)| !chain.layers.iter().all(stays))
                .map(|(digest, _)| *digest)
                .collect()
        };
        for digest in gone {
            self.forget_chain(&digest);
        }
    }

    fn forget_chain(&self, digest: &Digest) {
        self.chains.lock().remove(digest);
        // A failed one may have a slot and a record as well.
        self.remove_chain(digest, self.store.slot(digest).ok().flatten());
    }

    /// Removes what is stored of a chain: the image first, because without a record nobody would look for it.
    fn remove_chain(&self, digest: &Digest, slot: Option<u32>) {
        if let (Some(slot), Some(faces)) = (slot, &*self.faces()) {
            faces.forget_chain(slot);
        }
        match self.store.remove_chain(digest) {
            Ok(_) => tracing::debug!(chain = %digest, "a chain is forgotten"),
            Err(error) => tracing::warn!(%error, chain = %digest, "a chain's record cannot be removed"),
        }
    }

    /// Slots of everything that shows `bases`, which are lists of layers, topmost first: of the layers, and of their chains.
    pub(super) fn slots_of_bases(&self, bases: &[Vec<Digest>]) -> HashSet<u32> {
        let (known, live) = (self.chains.lock(), self.read_live());
        let mut slots = HashSet::new();
        for base in bases {
            slots.extend(base.iter().filter_map(|layer| live.get(layer)).map(|live| live.slot));
            slots.extend(known.get(&digest_of(&chain_of(base))).and_then(|chain| chain.slot));
        }
        slots
    }

    /// What the status document says of chains.
    pub(super) fn chains_status(&self, faces: &Faces) -> Vec<ChainStatus> {
        let known = self.chains.lock();
        let mut chains: Vec<_> = known
            .iter()
            .map(|(digest, chain)| {
                let mut status = ChainStatus {
                    digest: digest.to_string(),
                    layers: chain.layers.iter().map(Digest::to_string).collect(),
                    ..ChainStatus::default()
                };
                match &chain.state {
                    State::Waiting => "waiting".clone_into(&mut status.state),
                    State::Failed { reason, .. } => {
                        "failed".clone_into(&mut status.state);
                        status.reason = Some(reason.clone());
                    }
                    State::Stored => "stored".clone_into(&mut status.state),
                }
                if let (Some(slot), State::Stored) = (chain.slot, &chain.state) {
                    let shown = faces.shown(slot);
                    status.bytes = faces.chain_bytes(slot);
                    status.mounted = shown.mounted;
                    status.reason = shown.reason;
                    shown.word.clone_into(&mut status.face);
                }
                status
            })
            .collect();
        chains.sort_by(|a, b| a.digest.cmp(&b.digest));
        chains
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_has_each_layer_once_where_it_is_topmost() {
        let [a, b, c] = ["a", "b", "c"].map(|text| Digest::of(text.as_bytes()));
        assert_eq!(chain_of(&[a, b, a, c, b]), [c, b, a]);
        assert!(chain_of(&[]).is_empty());
    }

    #[test]
    fn digests_tell_orders_and_lengths_apart() {
        let [a, b] = ["a", "b"].map(|text| Digest::of(text.as_bytes()));
        let all = [vec![a, b], vec![b, a], vec![a], vec![a, b, b], vec![]];
        let digests: HashSet<_> = all.iter().map(|layers| digest_of(layers)).collect();
        assert_eq!(digests.len(), all.len());
    }
}
