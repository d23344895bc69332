//! The snapshotter itself, without gRPC: records and directories kept in step. Every method blocks (disk, and the
//! database's turn).

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::SnapshotsError;
use super::dirs::{Built, Content, Dirs, Link, RootAttributes};
use super::filters::Filters;
use super::info::{Named, info, now};
use super::mounts::Overlay;
use super::rules::{self, NewSnapshot, Published, check_key, kept_labels};
use super::usage::usage;
use crate::catalog::{Layers, Lowers, Needed};
use crate::layer::Digest;
use crate::metrics::Metrics;
use crate::proto::snapshots::v1::Info;
use crate::proto::types::Mount;
use crate::store::{Ancestor, Kind, SnapshotRecord, Store, StoreError, Usage};

/// A snapshot with its key or name.
type Entry = (String, Ancestor);

/// A committed snapshot and its ancestors, nearest first.
type Chain = Vec<Entry>;

/// A part of a chain that is shown in one way.
enum Part<'a> {
    /// The directory of the local snapshot with this id.
    Local(u64),
    /// Layers, topmost first: all of the lowest remote snapshots, which may be shown merged, or a single one that has a local one below it:
    /// merged layers have no whiteouts any more, and would not hide anything.
    Remote(Vec<(&'a Entry, Digest)>),
}

/// What a chain is made of, topmost first.
///
/// A layer that occurs twice (empty layers often do) is shown once, where it is topmost: all that it has below is hidden by itself, and
/// overlayfs refuses the same directory twice.
fn parts(chain: &Chain) -> Vec<Part<'_>> {
    let base = chain.len()
        - chain
            .iter()
            .rev()
            .take_while(|(_, record)| record.layer.is_some())
            .count();
    let mut seen = HashSet::new();
    let mut parts = Vec::new();
    let mut lowest = Vec::new();
    for (position, entry) in chain.iter().enumerate() {
        match entry.1.layer {
            None => parts.push(Part::Local(entry.1.id)),
            Some(layer) if !seen.insert(layer) => {}
            Some(layer) if position < base => parts.push(Part::Remote(vec![(entry, layer)])),
            Some(layer) => lowest.push((entry, layer)),
        }
    }
    if !lowest.is_empty() {
        parts.push(Part::Remote(lowest));
    }
    parts
}

/// Longest time that a cleanup waits for removed directories to be deleted. containerd calls it after each collection of garbage, so that the
/// space is free when `ctr images rm --sync` comes back; a mass removal on a slow disk may take longer, and goes on by itself.
const CLEANUP_PATIENCE: Duration = Duration::from_secs(30);

pub(super) struct Core {
    dirs: Arc<Dirs>,
    store: Arc<Store>,
    layers: Arc<dyn Layers>,
    overlay: Overlay,
}

impl Core {
    /// Opens the directories below `root`, and brings them in step with the records.
    pub fn open(
        root: &Path,
        store: Arc<Store>,
        layers: Arc<dyn Layers>,
        metrics: &Metrics,
    ) -> Result<Self, SnapshotsError> {
        let core = Core {
            dirs: Arc::new(Dirs::open(root, metrics)?),
            store,
            layers,
            overlay: Overlay::detect(),
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
            None if self.dirs.own(record.id).is_dir() => {}
            // Made right before a power cut, and never written to.
            None if record.kind != Kind::Committed => {
                let chain = self.parents(record.parent.as_deref().unwrap_or_default())?;
                let built = self.build(record.kind, &self.lowers(&chain)?)?;
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

    /// Prepare and View of a local snapshot.
    pub fn create(
        &self,
        kind: Kind,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
    ) -> Result<Vec<Mount>, SnapshotsError> {
        check_key("key", key)?;
        let chain = self.parents(parent)?;
        let lowers = self.lowers(&chain)?;
        // What takes time is done before the transaction.
        let built = self.build(kind, &lowers)?;
        let (dirs, key, parent) = (Arc::clone(&self.dirs), key.to_owned(), parent.to_owned());
        let record = self.store.write_snapshots(move |snapshots| {
            let new = NewSnapshot {
                kind,
                key: &key,
                parent: &parent,
                labels: kept_labels(labels),
                layer: None,
            };
            let record = rules::create(snapshots, new, now())?;
            dirs.place(built, record.id)?;
            Ok::<_, SnapshotsError>(record)
        })?;
        Ok(self.show(record.id, record.kind, &lowers))
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

    /// Makes sure that there is a remote snapshot of a layer, and returns its name; `None` if the layer is not live any
    /// more.
    pub fn publish(
        &self,
        parent: &str,
        chain_id: &str,
        labels: HashMap<String, String>,
        layer: Digest,
    ) -> Result<Option<String>, SnapshotsError> {
        if !self.layers.is_live(&layer) {
            return Ok(None);
        }
        // Asked before the transaction: who answers may use the database too.
        let present_is_live = self.published(parent, chain_id)?.is_some();
        let built = self.dirs.build(&Content::Remote)?;
        let (dirs, parent, chain_id) = (Arc::clone(&self.dirs), parent.to_owned(), chain_id.to_owned());
        let (name, record) = self.store.write_snapshots(move |snapshots| {
            let wish = (chain_id.as_str(), layer);
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
        Ok(Some(name))
    }

    /// The name of the remote snapshot of `chain_id` on `parent`, if it is there and its layer is live.
    pub fn published(&self, parent: &str, chain_id: &str) -> Result<Option<String>, SnapshotsError> {
        let name = rules::remote_name(parent, chain_id);
        let layer = self.store.snapshot(&name)?.and_then(|record| record.layer);
        Ok(layer.filter(|layer| self.layers.is_live(layer)).map(|_| name))
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
        let lowers = self.lowers(&chain)?;
        Ok(self.show(record.id, record.kind, &lowers))
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
        let id = record.map(|record| record.id).unwrap_or_default();
        // Outside of the transaction, because it may take a while.
        let usage = usage(&self.dirs.own(id))?;
        self.dirs.sync()?;
        let [name, key, parent] = [name, key, parent].map(str::to_owned);
        self.store.write_snapshots(move |snapshots| {
            rules::commit(snapshots, (&name, &key, &parent), kept_labels(labels), usage, now())
        })
    }

    /// Removes the record of a snapshot. No thread waits for the disk meanwhile, however many are removed at once.
    pub async fn remove_record(&self, key: &str) -> Result<SnapshotRecord, SnapshotsError> {
        let name = key.to_owned();
        let removed = self
            .store
            .change_snapshots(move |snapshots| rules::remove(snapshots, &name));
        removed.await
    }

    /// Takes away what is left of a snapshot without a record; its directory is deleted in the background. Whether something may be needed no
    /// more now: a layer, or a mount of it.
    pub fn discard(&self, key: &str, record: &SnapshotRecord) -> bool {
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
        let record = self
            .store
            .write_snapshots(move |snapshots| rules::update(snapshots, &name, labels, &paths, now()))?;
        Ok(info(key.to_owned(), record))
    }

    /// All snapshots that match, at one moment, ordered by key.
    pub fn list(&self, filters: &[String]) -> Result<Vec<Info>, SnapshotsError> {
        let filters = Filters::parse(filters)?;
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
        Ok(matching.map(|(key, record)| info(key, record)).collect())
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
            if record.kind != Kind::Committed {
                users.extend(record.parent);
            }
        }
        let mut bases = BTreeSet::new();
        for parent in users {
            let chain = self.store.chain(&parent)?;
            let parts = parts(&chain);
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

    /// Tells the layers that containers will be made on the snapshot `name`.
    pub fn expect(&self, name: &str) -> Result<(), SnapshotsError> {
        let chain = self.store.chain(name)?;
        if let Some(Part::Remote(base)) = parts(&chain).pop() {
            let layers: Vec<_> = base.iter().map(|(_, layer)| *layer).collect();
            self.layers.expect(&layers);
        }
        Ok(())
    }

    /// The directory of a new local snapshot over `lowers`.
    fn build(&self, kind: Kind, lowers: &[PathBuf]) -> Result<Built, SnapshotsError> {
        let attributes = lowers.first().map(|lower| RootAttributes::of(lower)).transpose()?;
        self.dirs.build(&Content::Local(kind, attributes))
    }

    /// The committed snapshot `parent` (empty for none) and its ancestors.
    fn parents(&self, parent: &str) -> Result<Chain, SnapshotsError> {
        if parent.is_empty() {
            return Ok(Vec::new());
        }
        let chain = self.store.chain(parent)?;
        rules::check_parent(parent, chain.first().map(|(_, record)| record.kind))?;
        Ok(chain)
    }

    /// The directories of a chain, topmost first.
    fn lowers(&self, chain: &Chain) -> Result<Vec<PathBuf>, SnapshotsError> {
        let mut lowers = Vec::with_capacity(chain.len());
        for part in parts(chain) {
            match part {
                Part::Local(id) => lowers.push(self.dirs.own(id)),
                Part::Remote(remote) => self.remote_lowers(&remote, &mut lowers)?,
            }
        }
        Ok(lowers)
    }

    /// The directories of layers, as paths in the tree of snapshots.
    fn remote_lowers(&self, remote: &[(&Entry, Digest)], lowers: &mut Vec<PathBuf>) -> Result<(), SnapshotsError> {
        let layers: Vec<Digest> = remote.iter().map(|(_, layer)| *layer).collect();
        let shown = self.layers.lowers(&layers).map_err(|missing| SnapshotsError::NotLive {
            layer: missing,
            key: remote
                .iter()
                .find(|(_, layer)| *layer == missing)
                .map_or_else(String::new, |((key, _), _)| super::error::quoted(key)),
        })?;
        match shown {
            Lowers::Merged(path) => {
                if let Some(((_, top), _)) = remote.first() {
                    lowers.push(self.dirs.link(top.id, Link::Chain, &path)?);
                }
            }
            Lowers::Stacked(paths) => {
                for (((_, record), _), path) in remote.iter().zip(&paths) {
                    lowers.push(self.dirs.link(record.id, Link::Layer, path)?);
                }
            }
        }
        Ok(())
    }

    fn show(&self, id: u64, kind: Kind, lowers: &[PathBuf]) -> Vec<Mount> {
        let (own, work) = (self.dirs.own(id), self.dirs.work(id));
        self.overlay.mounts(kind, &own, &work, lowers)
    }
}
