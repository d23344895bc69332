//! The snapshotter itself, without gRPC: records and directories kept in step. Every method blocks (disk, and the
//! database's turn).

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::SnapshotsError;
use super::chain::{Chain, Part, parts, shown_by};
use super::dirs::{Content, Dirs};
use super::filters::Filters;
use super::handover::Handover;
use super::info::{Named, info, now};
use super::limits;
use super::mounts::Overlay;
use super::rules::{self, Published, REF_LABEL, Wish, check_key, kept_labels};
use super::usage::usage;
use super::users::{Mapping, is_labelled};
use crate::catalog::{Layers, Needed};
use crate::layer::Digest;
use crate::metrics::Metrics;
use crate::proto::snapshots::v1::Info;
use crate::proto::types::Mount;
use crate::store::{Ancestor, EXTRACTION, Kind, SnapshotRecord, Store, StoreError, Usage, shown};

/// What a layer's image says of it and of those below, the lowest first, as [`Resolution::Live`](crate::catalog::Resolution) has it.
#[derive(Debug, Clone)]
pub(super) struct Resolved {
    pub layer: Digest,
    pub below: Vec<Option<Digest>>,
    pub proven: bool,
}

/// What became of a layer that was resolved.
pub(super) enum Outcome {
    /// There is a snapshot with this name.
    Named(String),
    /// It was released meanwhile.
    Gone,
    /// It cannot be shown on what its image says of a layer below it.
    Refused(String),
}

/// What is asked before something is made on a snapshot.
pub(super) struct Doubt {
    /// Chain id of the snapshot, or of the nearest below it that has one.
    pub chain_id: String,
    /// What is shown up to there.
    pub shown: Vec<Option<Digest>>,
    /// What is shown above it, all of which nobody doubts.
    pub above: Vec<Option<Digest>>,
}
/// Longest time that a cleanup waits for removed directories to be deleted. containerd calls it after each collection of garbage, so that the
/// space is free when `ctr images rm --sync` comes back; a mass removal on a slow disk may take longer, and goes on by itself.
const CLEANUP_PATIENCE: Duration = Duration::from_secs(30);

pub(super) struct Core {
    pub(super) dirs: Arc<Dirs>,
    pub(super) store: Arc<Store>,
    pub(super) layers: Arc<dyn Layers>,
    pub(super) overlay: Overlay,
    /// Ids of snapshots that are not committed yet and show the topmost layer of an image.
    tops: Mutex<HashSet<u64>>,
    /// Ids of those for whose layers the differ was asked.
    asked: Mutex<HashSet<u64>>,
    /// Held while mounts come or go that a snapshot has of its own.
    mapping: Mutex<()>,
}

impl Core {
    /// Opens the directories below `root`, and brings them in step with the records.
    pub fn open(
        root: &Path,
        store: Arc<Store>,
        layers: Arc<dyn Layers>,
        metrics: &Arc<Metrics>,
    ) -> Result<Self, SnapshotsError> {
        let core = Core {
            dirs: Arc::new(Dirs::open(root, metrics)?),
            store,
            layers,
            overlay: Overlay::detect(),
            tops: Mutex::default(),
            asked: Mutex::default(),
            mapping: Mutex::default(),
        };
        core.sweep()?;
        for (key, record) in core.store.snapshots()? {
            match record {
                Ok(record) => core.restore(&key, &record).unwrap_or_else(|error| {
                    tracing::error!(key, %error, "a snapshot cannot be restored");
                }),
                Err(error) => tracing::error!(%error, "a snapshot is lost"),
            }
        }
        Ok(core)
    }

    /// Makes the directory of a snapshot what its record says, as far as that is possible.
    fn restore(&self, key: &str, record: &SnapshotRecord) -> Result<(), SnapshotsError> {
        match record.layer {
            Some(layer) => {
                self.dirs.ensure(record.id)?;
                if !self.layers.is_live(&layer) {
                    tracing::warn!(key, %layer, "the layer of a snapshot is not available");
                }
            }
            None if self.dirs.own(record.id).is_dir() => self.restore_limit(record)?,
            // Made right before a power cut, and never written to.
            None if record.kind != Kind::Committed => {
                let chain = self.parents(record.parent.as_deref().unwrap_or_default())?;
                let shown = shown_by(&record.chain, &chain);
                let mapping = self.mapping(key, &record.labels, &chain)?;
                let size = limits::recorded(record.kind, &record.labels);
                let lowers = self.lowers(key, &chain, &shown)?;
                let built = self.build(record.kind, &lowers, mapping.as_ref(), size)?;
                self.dirs.place(built, record.id)?;
                tracing::warn!(
                    key,
                    id = record.id,
                    "the directory of a snapshot was missing and is empty now"
                );
            }
            None => tracing::error!(key, id = record.id, "the directory of a committed snapshot is missing"),
        }
        Ok(())
    }

    /// Makes the limit of a snapshot with files of its own what its record says, whatever a process that died had begun, or happened to the quotas.
    fn restore_limit(&self, record: &SnapshotRecord) -> Result<(), SnapshotsError> {
        let own = self.dirs.own(record.id);
        match record.kind {
            Kind::View => Ok(()),
            Kind::Committed => {
                self.dirs.limits.end(&own);
                Ok(())
            }
            Kind::Active => {
                let size = limits::recorded(record.kind, &record.labels);
                self.dirs.limits.set(&mut self.dirs.limits.turn(), &own, size)
            }
        }
    }

    /// Checks what a new snapshot needs, before a remote one is looked for.
    pub fn check_new(&self, key: &str, parent: &str) -> Result<(), SnapshotsError> {
        check_key("key", key)?;
        if self.store.snapshot(key)?.is_some() {
            return Err(SnapshotsError::already_exists(key));
        }
        if !parent.is_empty() {
            rules::check_parent(parent, self.store.snapshot(parent)?.map(|record| record.kind))?;
        }
        Ok(())
    }

    /// Of each snapshot in the chain of `parent`, the lowest first: whether a layer is shown in its place.
    pub fn remote_below(&self, parent: &str) -> Result<Vec<bool>, SnapshotsError> {
        let chain = self.parents(parent)?;
        Ok(chain.iter().rev().map(|(_, record)| record.layer.is_some()).collect())
    }

    /// Makes sure that there is a remote snapshot of a layer.
    pub fn publish(
        &self,
        parent: &str,
        chain_id: &str,
        labels: HashMap<String, String>,
        resolved: Resolved,
    ) -> Result<Outcome, SnapshotsError> {
        let Resolved { layer, below, proven } = resolved;
        let is_live = |id: &Digest| self.layers.is_live(id);
        if !is_live(&layer) || !below.iter().flatten().all(is_live) {
            return Ok(Outcome::Gone);
        }
        let chain = self.parents(parent)?;
        let theirs = shown(&chain);
        let mut shown = theirs.clone();
        // Otherwise it is on something else than its image: then it is on that.
        if below.len() == theirs.len() {
            for ((place, id), (name, record)) in shown.iter_mut().zip(below).zip(chain.iter().rev()) {
                match (record.layer, id) {
                    (None, _) => {}
                    (Some(_), Some(id)) => *place = Some(id),
                    // The same for everybody.
                    (Some(_), None) if !record.vouched => *place = record.layer,
                    (Some(_), None) => {
                        let name = super::error::quoted(name);
                        return Ok(Outcome::Refused(format!(
                            "its image's own layer in the place of {name:?} cannot be served"
                        )));
                    }
                }
            }
        }
        let is_plain = shown == theirs;
        shown.push(Some(layer));
        // Asked before the transaction: who answers may use the database too.
        let plain = self.store.snapshot(&rules::remote_name(parent, chain_id))?;
        let present_is_live = plain
            .and_then(|record| record.layer)
            .is_some_and(|layer| is_live(&layer));
        let built = self.dirs.build(&Content::Remote)?;
        let (dirs, parent, chain_id) = (Arc::clone(&self.dirs), parent.to_owned(), chain_id.to_owned());
        let (name, record) = self.store.write_snapshots(move |snapshots| {
            let wish = Wish {
                chain_id: &chain_id,
                shown,
                is_plain,
                vouched: !proven,
            };
            let (name, published) =
                rules::publish(snapshots, &parent, kept_labels(labels), wish, present_is_live, now())?;
            let record = match published {
                Published::New(record) => {
                    dirs.place(built, record.id)?;
                    record
                }
                Published::Present(record) => record,
            };
            Ok::<_, SnapshotsError>((name, record))
        })?;
        self.restore(&name, &record)?;
        Ok(Outcome::Named(name))
    }

    /// The name of the remote snapshot of `chain_id` on `parent`, if it is there, its layer is live, and it is the same for everybody.
    pub fn published(&self, parent: &str, chain_id: &str) -> Result<Option<String>, SnapshotsError> {
        let name = rules::remote_name(parent, chain_id);
        let layer = self
            .store
            .snapshot(&name)?
            .filter(|record| !record.vouched)
            .and_then(|record| record.layer);
        Ok(layer.filter(|layer| self.layers.is_live(layer)).map(|_| name))
    }

    /// What is to be asked before something is made on `parent`; `None` if all that is shown is the same for everybody, or nobody knows which chain
    /// it is.
    pub fn doubt(&self, parent: &str) -> Result<Option<Doubt>, SnapshotsError> {
        let chain = self.parents(parent)?;
        if !chain.iter().any(|(_, record)| record.vouched) {
            return Ok(None);
        }
        let mut shown = shown(&chain);
        for (at, (name, record)) in chain.iter().enumerate() {
            if let Some(chain_id) = self.chain_id(name, record)? {
                let above = shown.split_off(shown.len() - at);
                return Ok(Some(Doubt { chain_id, shown, above }));
            }
        }
        Ok(None)
    }

    /// Chain id of a committed snapshot, if it shows a layer of an image.
    pub(super) fn chain_id(&self, name: &str, record: &Ancestor) -> Result<Option<String>, SnapshotsError> {
        let labelled = match record.layer {
            Some(_) => self
                .store
                .snapshot(name)?
                .and_then(|mut record| record.labels.remove(REF_LABEL)),
            None => None,
        };
        Ok(labelled.or_else(|| rules::chain_id_of(name)))
    }

    /// The mounts of an active snapshot or a view.
    pub fn mounts(&self, key: &str) -> Result<Vec<Mount>, SnapshotsError> {
        let mut chain = self.store.chain(key)?;
        if chain.is_empty() {
            return Err(SnapshotsError::not_found(key));
        }
        let (_, record) = chain.remove(0);
        if record.kind == Kind::Committed {
            return Err(SnapshotsError::precondition(format!(
                "snapshot {:?} is committed; only an active one or a view has mounts",
                super::error::quoted(key)
            )));
        }
        let mut lowers = self.lowers(key, &chain, &shown_by(&record.chain, &chain))?;
        if let Some(mapping) = self.mapping_of(key, record.id, &chain)? {
            let _turn = self.turn();
            // Whoever removes or commits it from here on comes after this, and takes the mounts away.
            self.mapping_of(key, record.id, &chain)?;
            self.dirs.map(record.id, &lowers, &mapping)?;
            lowers = self.dirs.mapped(record.id, &lowers);
        }
        Ok(self.show(record.id, record.kind, &lowers))
    }

    /// How the owners in `chain` are mapped for a snapshot with these labels; `None`: they are not.
    pub(super) fn mapping(
        &self,
        key: &str,
        labels: &BTreeMap<String, String>,
        chain: &Chain,
    ) -> Result<Option<Mapping>, SnapshotsError> {
        let mapping = Mapping::of(labels)?;
        // If containerd has changed the owners by itself, they are what they should be.
        if mapping.is_none() || chain.iter().any(|(_, record)| record.remapped) {
            return Ok(None);
        }
        match self.layers.no_mapped_owners() {
            // With nothing below it, nothing has to be mounted.
            Some(reason) if !chain.is_empty() => Err(SnapshotsError::NoMappedOwners {
                key: super::error::quoted(key),
                reason,
            }),
            _ => Ok(mapping),
        }
    }

    /// The same for the snapshot `key`, if it still has this id and has mounts.
    fn mapping_of(&self, key: &str, id: u64, chain: &Chain) -> Result<Option<Mapping>, SnapshotsError> {
        let record = self.store.snapshot(key)?;
        match record.filter(|record| record.id == id && record.kind != Kind::Committed) {
            Some(record) => self.mapping(key, &record.labels, chain),
            None => Err(SnapshotsError::not_found(key)),
        }
    }

    pub(super) fn tops(&self) -> MutexGuard<'_, HashSet<u64>> {
        self.tops.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn asked(&self) -> MutexGuard<'_, HashSet<u64>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.mapping.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn commit(
        &self,
        name: &str,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
    ) -> Result<(), SnapshotsError> {
        check_key("name", name)?;
        check_key("key", key)?;
        let record = self.store.snapshot(key)?;
        rules::check_commit(key, record.as_ref(), parent)?;
        let was_asked = record.as_ref().is_some_and(|record| self.asked().remove(&record.id));
        if let Some((id, Some(layer))) = record.as_ref().map(|record| (record.id, record.layer)) {
            return self.commit_applied((name, key, parent), labels, (id, layer));
        }
        let (id, is_mapped, is_limited) = record
            .map(|record| {
                (
                    record.id,
                    is_labelled(&record.labels),
                    limits::label(&record.labels).is_some(),
                )
            })
            .unwrap_or_default();
        // Outside of the transaction, because it may take a while.
        let usage = usage(&self.dirs.own(id))?;
        self.dirs.sync()?;
        let key_extracts = key.contains(EXTRACTION);
        let [name, key, parent] = [name, key, parent].map(str::to_owned);
        self.store.write_snapshots(move |snapshots| {
            rules::commit(snapshots, (&name, &key, &parent), kept_labels(labels), usage, now())
        })?;
        if key_extracts && !was_asked {
            self.layers.differ_was_asked(false);
        }
        if is_limited {
            // A layer does not grow; and what is deleted of it must not make room for others.
            self.dirs.limits.end(&self.dirs.own(id));
        }
        if is_mapped {
            let _turn = self.turn();
            if let Err(error) = self.dirs.unmap(id) {
                tracing::warn!(%error, "what was mounted for a snapshot that is committed now stays until it is removed");
            }
        }
        Ok(())
    }

    /// Removes the record of a snapshot. No thread waits for the disk meanwhile, however many are removed at once.
    pub async fn remove_record(&self, key: &str) -> Result<SnapshotRecord, SnapshotsError> {
        let name = key.to_owned();
        let removed = self
            .store
            .change_snapshots(move |snapshots| rules::remove(snapshots, &name));
        removed.await
    }

    /// The same of the snapshot that has the key and this id, if it is still there.
    pub async fn remove_record_of(&self, key: &str, id: u64) -> Result<Option<SnapshotRecord>, SnapshotsError> {
        let name = key.to_owned();
        let removed = self.store.change_snapshots(move |snapshots| {
            match snapshots.get(&name)?.is_some_and(|record| record.id == id) {
                true => rules::remove(snapshots, &name).map(Some),
                false => Ok(None),
            }
        });
        removed.await
    }

    /// Takes away what is left of a snapshot without a record; its directory is deleted in the background. Whether something may be needed no
    /// more now: a layer, or a mount of it.
    pub fn discard(&self, key: &str, record: &SnapshotRecord) -> bool {
        self.tops().remove(&record.id);
        self.asked().remove(&record.id);
        let _turn = is_labelled(&record.labels).then(|| self.turn());
        // It is removed, whatever becomes of its directory: without a record, the next Cleanup finds it.
        if let Err(error) = self.dirs.discard(record.id) {
            tracing::warn!(key, %error, "a removed snapshot stays where it is until the next cleanup");
        }
        record.layer.is_some() || (record.kind != Kind::Committed && record.parent.is_some())
    }

    pub fn stat(&self, key: &str) -> Result<Info, SnapshotsError> {
        match self.store.snapshot(key)? {
            Some(record) => Ok(info(key.to_owned(), record)),
            None => Err(SnapshotsError::not_found(key)),
        }
    }

    pub fn update(&self, key: &str, labels: HashMap<String, String>, paths: &[String]) -> Result<Info, SnapshotsError> {
        let (name, paths) = (key.to_owned(), paths.to_vec());
        let (record, is_limit) = self
            .store
            .write_snapshots(move |snapshots| rules::update(snapshots, &name, labels, &paths, now()))?;
        if is_limit {
            let mut turn = self.dirs.limits.turn();
            // Whatever others have made of it meanwhile; who commits or removes it from here on comes after this.
            let present = self.store.snapshot(key)?.filter(|present| present.id == record.id);
            if let Some(present) = present.filter(|present| present.kind == Kind::Active) {
                let size = limits::size(present.kind, &present.labels)?;
                self.dirs.limits.set(&mut turn, &self.dirs.own(present.id), size)?;
            }
        }
        Ok(info(key.to_owned(), record))
    }

    /// All snapshots that match, at one moment, ordered by key; of those that a Prepare was about, the one that it was about.
    pub fn list(&self, filters: &[String], handover: &Handover) -> Result<Vec<Info>, SnapshotsError> {
        let filters = Filters::parse(filters)?;
        let meant = match filters.equal_exactly(&[&["parent"], &["labels", REF_LABEL]]).as_deref() {
            Some([parent, chain_id]) => handover.take(parent, chain_id),
            _ => None,
        };
        let listed = match filters.equals("parent") {
            Some(parent) => self.store.children(parent)?,
            None => self.store.snapshots()?,
        };
        let readable = listed.into_iter().filter_map(|(key, record)| match record {
            Ok(record) => Some((key, record)),
            Err(error) => {
                // containerd's collection of garbage walks this list; it must not stop at one bad record for ever.
                tracing::error!(%error, "a snapshot is left out of a list");
                None
            }
        });
        let matching = readable.filter(|(key, record)| filters.matches(&Named(key, record)));
        let mut matching: Vec<_> = matching.collect();
        // If it is gone, another may do.
        if let Some(meant) = meant.filter(|meant| matching.iter().any(|(key, _)| key == meant)) {
            matching.retain(|(key, _)| *key == meant);
        }
        Ok(matching.into_iter().map(|(key, record)| info(key, record)).collect())
    }

    /// What a snapshot takes of the disk without its parents.
    pub fn usage(&self, key: &str) -> Result<Usage, SnapshotsError> {
        let record = self
            .store
            .snapshot(key)?
            .ok_or_else(|| SnapshotsError::not_found(key))?;
        match (record.kind, record.layer) {
            (Kind::Active, _) => usage(&self.dirs.own(record.id)),
            (_, Some(layer)) => Ok(self
                .layers
                .usage(&layer)
                .map_or(record.usage, |(bytes, inodes)| Usage { bytes, inodes })),
            (_, None) => Ok(record.usage),
        }
    }

    /// Deletes everything that belongs to no snapshot, and waits for that, but not for ever.
    pub fn cleanup(&self) -> Result<(), SnapshotsError> {
        self.sweep()?;
        if !self.dirs.empty_trash(CLEANUP_PATIENCE) {
            tracing::info!("removed snapshots are still being deleted; the cleanup does not wait any longer");
        }
        Ok(())
    }

    /// Moves everything that belongs to no snapshot to the trash.
    fn sweep(&self) -> Result<(), SnapshotsError> {
        // Within a transaction no snapshot can come or go.
        let dirs = Arc::clone(&self.dirs);
        let swept = self.store.write_snapshots(move |snapshots| {
            let ids = snapshots.ids()?;
            dirs.discard_all_but(&ids)
        });
        match swept {
            // Better to keep too much than to delete a snapshot whose record someone may still repair.
            Err(SnapshotsError::Store(error @ StoreError::Damaged { .. })) => {
                tracing::error!(%error, "left-over directories are not cleaned up");
            }
            swept => swept?,
        }
        Ok(())
    }

    /// What snapshots need of layers.
    pub fn needed(&self) -> Result<Needed, SnapshotsError> {
        let (mut layers, mut users) = (BTreeSet::new(), BTreeSet::new());
        for (_, record) in self.store.ancestors()? {
            layers.extend(record.layer);
            layers.extend(record.chain.iter().flatten());
            if let (true, Some(parent)) = (record.kind != Kind::Committed, record.parent) {
                users.insert((parent, record.chain));
            }
        }
        let mut bases = BTreeSet::new();
        for (parent, own) in users {
            let chain = self.store.chain(&parent)?;
            let parts = parts(&chain, &shown_by(&own, &chain));
            bases.extend(parts.into_iter().filter_map(|part| match part {
                Part::Local(_) => None,
                Part::Remote(remote) => Some(remote.iter().map(|(_, layer)| *layer).collect::<Vec<_>>()),
            }));
        }
        Ok(Needed {
            layers: layers.into_iter().collect(),
            bases: bases.into_iter().collect(),
        })
    }

    /// Chain ids of layers that containerd is unpacking.
    pub fn unpacking(&self) -> HashSet<String> {
        self.store.unpacking()
    }
}
