//! Chains: the layers that containers are made on, shown as few merged directories.
//!
//! A list of live layers and variants that containers are made on, each once (where it is topmost: all that it has below is hidden by itself),
//! is cut into segments ([`segments`]): where lists branch, so that images with the same beginning mount the same segments and cache them
//! once. A segment of several layers has an image, a *chain* to the faces. It is made by [`crate::fs::Faces`], in the background, one at a time:
//! as soon as the topmost layer of an image is live, for other lists when a new one branches off from them, and when a container asked for
//! one that is missing. Nobody waits for it; who is faster gets an earlier image of all its layers if there is one, or stacks the layers.
//!
//! The database knows lists, and each chain by its digest before its image is made, so that no image is ever left without an owner. A list goes
//! when one of its layers is released, and at the start those go that hold a layer that no snapshot refers to. A chain goes with its
//! layers, and when neither a list is cut so any more nor a container is made on it.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use super::status::ChainStatus;
use super::{Catalog, segments};
use crate::fetch::LayerData;
use crate::fs::{Face, Faces};
use crate::layer::Digest;
use crate::store::{ChainRole, StoreError};

/// Tells the digest of a chain of the lowest layers from digests of other things.
const LOWEST_DOMAIN: &[u8] = b"lazuli chain\0";
/// The same for a chain that lies on other layers.
const UPPER_DOMAIN: &[u8] = b"lazuli upper chain\0";
/// The same for a list of layers.
const LIST_DOMAIN: &[u8] = b"lazuli list\0";

/// How long an image that could not be made is not tried again: what stands in the way (a full disk, say) may pass.
const RETRY: Duration = Duration::from_secs(300);

/// Lists that are known at once: each new one is compared with all of them. What comes later is cut where those branch.
const LISTS_MAX: usize = 4096;

/// Directories that show layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lowers {
    /// Each shows a run of them, topmost first; and the position of the topmost layer of each among those that were asked for.
    Segments(Vec<(usize, PathBuf)>),
    /// Each shows one, in the order in which they were asked for.
    Stacked(Vec<PathBuf>),
}

/// The chains that are known.
pub(super) struct Chains {
    known: Mutex<HashMap<Digest, Chain>>,
    /// What containers are made on: lists of layers, the lowest first.
    lists: Mutex<HashMap<Digest, Vec<Digest>>>,
    /// Lets one image be made at a time.
    turn: Arc<Semaphore>,
}

struct Chain {
    layers: Vec<Digest>,
    /// Whether it lies on others.
    is_upper: bool,
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
            lists: Mutex::default(),
            turn: Arc::new(Semaphore::new(1)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Digest, Chain>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lists(&self) -> MutexGuard<'_, HashMap<Digest, Vec<Digest>>> {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Digest of the chain or list of `layers`, the lowest first.
fn digest_of(layers: &[Digest], role: ChainRole) -> Digest {
    let domain = match role {
        ChainRole::Lowest => LOWEST_DOMAIN,
        ChainRole::Upper => UPPER_DOMAIN,
        ChainRole::List => LIST_DOMAIN,
    };
    let mut bytes = domain.to_vec();
    for layer in layers {
        bytes.extend_from_slice(layer.as_bytes());
    }
    Digest::of(&bytes)
}

/// Digest of a segment of `list` as a chain: of its layers, and of those that it lies on, as far as what it hides depends on them.
fn segment_of(list: &[Digest], at: &Range<usize>) -> Digest {
    match at.start {
        0 => digest_of(&list[..at.end], ChainRole::Lowest),
        start => {
            let below = digest_of(&list[..start], ChainRole::Lowest);
            digest_of(&[&[below], &list[at.clone()]].concat(), ChainRole::Upper)
        }
    }
}

/// Whether `run` is somewhere in `list` as it is.
fn is_within(run: &[Digest], list: &[Digest]) -> bool {
    list.windows(run.len().max(1)).any(|window| window == run)
}

/// `layers`, topmost first, as a chain: the lowest first, each once.
fn chain_of(layers: &[Digest]) -> Vec<Digest> {
    let mut seen = HashSet::new();
    let mut chain: Vec<Digest> = layers.iter().copied().filter(|layer| seen.insert(*layer)).collect();
    chain.reverse();
    chain
}

impl Catalog {
    /// The directories that show `layers` (topmost first, each once), `merged` where they are. Mounts what is not mounted; waits for nothing else.
    ///
    /// # Errors
    /// The layer that is not live.
    pub(super) fn lowers(self: &Arc<Self>, layers: &[Digest], merged: bool) -> Result<Lowers, Digest> {
        let Some(last) = layers.last() else {
            return Ok(Lowers::Stacked(Vec::new()));
        };
        let slots = self.slots(layers)?;
        let faces = self.faces();
        let faces = faces.as_ref().ok_or(*last)?;
        if merged && let Some(segments) = self.segmented(faces, layers, &slots) {
            return Ok(Lowers::Segments(segments));
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

    /// The directories of the segments of `layers`, topmost first as their `slots` are: those that are right now, or else the one that shows all
    /// of them. What is missing is made for the next time.
    fn segmented(self: &Arc<Self>, faces: &Faces, layers: &[Digest], slots: &[u32]) -> Option<Vec<(usize, PathBuf)>> {
        let list = chain_of(layers);
        if list.len() < 2 || list.len() != layers.len() || faces.serving().face == Face::Tree {
            return None;
        }
        let slots: Vec<u32> = slots.iter().rev().copied().collect();
        let plan = self.cut(&list);
        let shown: Vec<Option<PathBuf>> = plan
            .iter()
            .map(|at| self.segment_path(faces, &list, &slots, at))
            .collect();
        for (at, _) in plan.iter().zip(&shown).filter(|(_, path)| path.is_none()) {
            self.want_segment(&list, at);
        }
        let top = |at: &Range<usize>| list.len() - at.end;
        match shown.into_iter().collect::<Option<Vec<_>>>() {
            Some(paths) => Some(plan.iter().map(top).zip(paths).rev().collect()),
            None => {
                let all = 0..list.len();
                Some(vec![(top(&all), self.segment_path(faces, &list, &slots, &all)?)])
            }
        }
    }

    /// The directory of a segment, if it has one.
    fn segment_path(&self, faces: &Faces, list: &[Digest], slots: &[u32], at: &Range<usize>) -> Option<PathBuf> {
        if at.len() == 1 {
            return faces.layer_path(slots[at.start]).ok();
        }
        let digest = segment_of(list, at);
        let stored = match self.chains.lock().get(&digest) {
            Some(Chain {
                state: State::Stored,
                slot,
                ..
            }) => *slot,
            _ => None,
        };
        faces.chain_path(stored?, &slots[at.clone()])
    }

    /// Where `list` is cut now.
    fn cut(&self, list: &[Digest]) -> Vec<Range<usize>> {
        let live = self.read_live();
        let bytes = |layer: &Digest| live.get(layer).map_or(0, |live| live.layer.index().data_size());
        let lists = self.chains.lists();
        segments::plan(list, lists.values().map(Vec::as_slice), bytes)
    }

    /// Knows that containers are made on `list`. Others that it branches off from are cut there from now on.
    fn note_list(self: &Arc<Self>, list: &[Digest]) {
        let digest = digest_of(list, ChainRole::List);
        let cut: Vec<Vec<Digest>> = {
            let mut lists = self.chains.lists();
            if lists.contains_key(&digest) || lists.len() >= LISTS_MAX {
                return;
            }
            lists.insert(digest, list.to_vec());
            let branches = |other: &&Vec<Digest>| segments::common(list, other) > 0 && other.as_slice() != list;
            lists.values().filter(branches).cloned().collect()
        };
        let (catalog, layers) = (Arc::clone(self), list.to_vec());
        self.runtime.spawn_blocking(move || {
            if let Err(error) = catalog.store.record_chain(digest, layers, ChainRole::List) {
                tracing::warn!(%error, list = %digest, "which layers are used together cannot be recorded");
            }
            for other in cut {
                catalog.want_segments(&other);
            }
        });
    }

    /// Has those images for a list made of which nothing is known yet.
    fn want_segments(self: &Arc<Self>, list: &[Digest]) {
        let plan = self.cut(list);
        let missing: Vec<Range<usize>> = {
            let known = self.chains.lock();
            let is_stored = |at: &Range<usize>| {
                let chain = known.get(&segment_of(list, at));
                chain.is_some_and(|chain| matches!(chain.state, State::Stored))
            };
            plan.into_iter().filter(|at| !is_stored(at)).collect()
        };
        for at in missing {
            self.want_segment(list, &at);
        }
    }

    /// Has the image of a segment made, if it needs one that is not there.
    fn want_segment(self: &Arc<Self>, list: &[Digest], at: &Range<usize>) {
        if at.len() > 1 {
            let (below, layers) = list[..at.end].split_at(at.start);
            self.want_chain(segment_of(list, at), layers.to_vec(), below.to_vec());
        }
    }

    /// Has the images for `layers` (topmost first) made, as far as they are not there.
    pub(super) fn expect(self: &Arc<Self>, layers: &[Digest]) {
        let list = chain_of(layers);
        let serves = |faces: &Faces| faces.serving().face == Face::Image;
        if list.is_empty() || !self.faces().as_ref().is_some_and(serves) {
            return;
        }
        self.note_list(&list);
        self.want_segments(&list);
    }

    /// Begins to make the image of a chain, unless that is under way or was tried in vain just now.
    fn want_chain(self: &Arc<Self>, digest: Digest, layers: Vec<Digest>, below: Vec<Digest>) {
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
                is_upper: !below.is_empty(),
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
                catalog.make_chain(digest, &layers, &below);
                drop(turn);
            };
            if let Err(error) = tokio::task::spawn_blocking(work).await {
                tracing::error!(%error, chain = %digest, "merging layers was interrupted");
            }
        });
    }

    fn make_chain(&self, digest: Digest, layers: &[Digest], below: &[Digest]) {
        let begun = Instant::now();
        let (slot, state) = match self.try_chain(digest, layers, below) {
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
    fn try_chain(&self, digest: Digest, layers: &[Digest], below: &[Digest]) -> Result<u32, String> {
        let slots = |layers| {
            self.slots(layers)
                .map_err(|layer| format!("layer {layer} was released"))
        };
        let (slots, below) = (slots(layers)?, slots(below)?);
        let role = match below.is_empty() {
            true => ChainRole::Lowest,
            false => ChainRole::Upper,
        };
        let recorded = self.store.record_chain(digest, layers.to_vec(), role);
        let slot = recorded.map_err(|error| error.to_string())?;
        match &*self.faces() {
            Some(faces) => faces
                .build_chain(slot, &slots, &below)
                .map_err(|error| error.to_string())?,
            None => return Err("the daemon ends".to_owned()),
        }
        Ok(slot)
    }

    /// Knows the lists and chains of an earlier process again; those that hold a layer that is not in `referenced` are removed.
    pub(super) fn restore_chains(&self, referenced: &HashSet<Digest>) -> Result<(), StoreError> {
        let (mut has_lists, mut whole) = (false, Vec::new());
        for (digest, record) in self.store.chains()? {
            match record {
                Ok(record) if !record.layers.iter().all(|layer| referenced.contains(layer)) => {
                    self.remove_chain(&digest, Some(record.slot));
                }
                Ok(record) => {
                    if record.role == ChainRole::List {
                        has_lists = true;
                        self.chains.lists().insert(digest, record.layers);
                        continue;
                    }
                    let is_upper = record.role == ChainRole::Upper;
                    whole.extend((!is_upper).then(|| record.layers.clone()));
                    let chain = Chain {
                        layers: record.layers,
                        is_upper,
                        slot: Some(record.slot),
                        state: State::Stored,
                    };
                    self.chains.lock().insert(digest, chain);
                }
                Err(error) => {
                    tracing::warn!(%error, "a chain is made again when it is needed");
                    self.remove_chain(&digest, self.store.slot(&digest).ok().flatten());
                }
            }
        }
        if !has_lists {
            // Written before there were lists: then each chain was all that a container is made on.
            let lists = whole
                .into_iter()
                .map(|layers| (digest_of(&layers, ChainRole::List), layers));
            self.chains.lists().extend(lists);
        }
        Ok(())
    }

    /// Removes the lists and chains of which any layer is neither live nor in `keep`, and chains that no list is cut into any more, unless a
    /// container is made on one of `bases` (topmost first), in which they are.
    pub(super) fn release_chains(&self, keep: &HashSet<Digest>, bases: &[Vec<Digest>]) {
        let stays = {
            let live: HashSet<Digest> = self.read_live().keys().copied().collect();
            move |layer: &Digest| keep.contains(layer) || live.contains(layer)
        };
        let lists: Vec<Vec<Digest>> = {
            let mut lists = self.chains.lists();
            let left: Vec<Digest> = lists
                .extract_if(|_, layers| !layers.iter().all(&stays))
                .map(|(digest, _)| digest)
                .collect();
            let stay = lists.values().cloned().collect();
            drop(lists);
            for list in left {
                self.remove_chain(&list, None);
            }
            stay
        };
        let needed: HashSet<Digest> = lists
            .iter()
            .flat_map(|list| self.cut(list).into_iter().map(|at| segment_of(list, &at)))
            .collect();
        let bases: Vec<Vec<Digest>> = bases.iter().map(|base| chain_of(base)).collect();
        let in_use = |chain: &Chain| bases.iter().any(|base| is_within(&chain.layers, base));
        let gone: Vec<Digest> = {
            let known = self.chains.lock();
            known
                .iter()
                // One that is being made is looked at again when it is.
                .filter(|(_, chain)| !matches!(chain.state, State::Waiting))
                .filter(|(digest, chain)| {
                    let is_needed = needed.contains(digest) || in_use(chain);
                    !is_needed || !chain.layers.iter().all(&stays)
                })
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
            let list = chain_of(base);
            // Also those that it is not cut into any more: containers that were made then still have them.
            let within = known.values().filter(|chain| is_within(&chain.layers, &list));
            slots.extend(within.filter_map(|chain| chain.slot));
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
                    is_upper: chain.is_upper,
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
        let roles = [ChainRole::Lowest, ChainRole::Upper, ChainRole::List];
        let digests: HashSet<_> = all
            .iter()
            .flat_map(|layers| roles.map(|role| digest_of(layers, role)))
            .collect();
        assert_eq!(digests.len(), all.len() * roles.len());
    }
}
