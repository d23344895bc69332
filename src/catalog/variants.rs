//! Layers as they look on their parents, where that differs from how they look by themselves ([`crate::layer::variant`]).
//!
//! A variant is another index over the bytes of a layer: it shares the layer's chunks in the cache and its fetches, and has its own
//! slot in the FUSE tree. Its digest is the SHA-256 of [`DIGEST_DOMAIN`], the layer's id, and its encoded index; so
//! the same layer on parents that make the same of it is the same variant, before and after a restart.
//!
//! # On disk
//! `<root>/variants/<hex of the variant's digest>` holds the index in its own on-disk form ([`crate::layer::index`]). It is written
//! under a temporary name, synced and renamed, before the database has the variant's record. A file without a record is removed at
//! start, and so are file and record of a variant that no snapshot refers to. A record whose file is lost has it made again (rebuild.rs).

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::BoxFuture;
use lru::LruCache;

use super::images::ImagePlan;
use super::loader::{self, Refusal};
use super::question::Begun;
use super::rebuild::MAX_BELOW;
use super::{Catalog, GRACE, Live, of_store, released, spec_of};
use crate::fetch::{FetchError, Layer, LayerData, LocalFile};
use crate::layer::variant::depends_on_below;
use crate::layer::{BlobIndex, Digest, LayerError, LayerIndex};
use crate::store::LayerRecord;

mod stacks;

use stacks::{Stacks, stack, stacks};

/// Where variants are, below the daemon's root directory.
pub const DIRECTORY: &str = "variants";
/// Tells the digest of a variant from digests of other things.
const DIGEST_DOMAIN: &[u8] = b"lazuli variant\0";

/// Stacks of which it is remembered what their topmost layer looks like, of 64 bytes each: a pull asks again for all below with every layer.
const SEEN: NonZeroUsize = NonZeroUsize::new(8192).unwrap();
/// A layer with another index.
pub struct Variant {
    layer: Arc<Layer>,
    index: BlobIndex,
    names: Arc<LayerIndex>,
}

impl Variant {
    fn new(layer: Arc<Layer>, names: Arc<LayerIndex>) -> Self {
        Variant {
            index: layer.index().with_names_of(&names),
            names,
            layer,
        }
    }
}

impl LayerData for Variant {
    fn digest(&self) -> &Digest {
        self.layer.digest()
    }

    fn owner(&self) -> String {
        self.layer.owner()
    }

    fn id(&self) -> &Digest {
        self.layer.id()
    }

    fn index(&self) -> &BlobIndex {
        &self.index
    }

    fn names(&self) -> Result<Arc<LayerIndex>, FetchError> {
        Ok(Arc::clone(&self.names))
    }

    fn read_ready(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        self.layer.read_ready(offset, buf)
    }

    fn read(&self, offset: u64, len: u32, deadline: Duration) -> BoxFuture<'static, Result<Bytes, FetchError>> {
        self.layer.read(offset, len, deadline)
    }

    fn present_bytes(&self) -> u64 {
        self.layer.present_bytes()
    }

    fn local_file(&self) -> Option<LocalFile> {
        self.layer.local_file()
    }
}

/// All layers of an image, from the lowest up, each as it looks on those below it.
///
/// # Errors
/// [`Refusal`] when a limit is exceeded, or an index cannot be read.
pub fn on_each_other(layers: &[Arc<Layer>]) -> Result<Vec<Arc<dyn LayerData>>, Refusal> {
    let names = layers.iter().map(|layer| names_of(layer).map(Some));
    let names = names.collect::<Result<Vec<_>, _>>()?;
    let indexes: Vec<_> = names.iter().map(|names| names.as_deref()).collect();
    let mut changed = Vec::new();
    stack(&mut changed, &indexes).map_err(|error| of_limit(&error))?;
    let layers = layers.iter().map(Arc::clone).zip(changed);
    Ok(layers
        .map(|(layer, changed)| match changed {
            Some(index) => Arc::new(Variant::new(layer, index)) as Arc<dyn LayerData>,
            None => layer,
        })
        .collect())
}

pub(super) fn digest_of(layer: &Digest, encoded: &[u8]) -> Digest {
    Digest::of(&[DIGEST_DOMAIN, layer.as_bytes(), Digest::of(encoded).as_bytes()].concat())
}

/// Whether two indexes are of the same bytes in the same places, so that one may stand for the other.
fn same_space(a: &LayerIndex, b: &BlobIndex) -> bool {
    let shape = (a.access(), a.codec(), a.data_size(), a.blob_size());
    shape == (b.access(), b.codec(), b.data_size(), b.blob_size()) && *b.chunks() == *a.chunks()
}

/// Layers of an image on each other, the lowest first; `None` for those that are not served.
pub(super) struct OnEachOther {
    /// Their ids.
    pub bases: Vec<Option<Digest>>,
    /// Their ids, or those of their variants.
    pub ids: Vec<Option<Digest>>,
}

/// The directory of variants.
pub(super) struct Shelf {
    /// What topmost layers of stacks look like, by the digest of the ids of the stack.
    seen: Mutex<LruCache<Digest, Digest>>,
    dir: PathBuf,
    /// Held while a variant comes or goes, with its file and its record: it must not go while it comes back.
    changing: Mutex<()>,
    stacks: Stacks<Layer>,
}

impl Shelf {
    pub(super) fn new(dir: PathBuf) -> Self {
        Shelf {
            seen: Mutex::new(LruCache::new(SEEN)),
            dir,
            changing: Mutex::default(),
            stacks: Stacks::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn seen(&self) -> MutexGuard<'_, LruCache<Digest, Digest>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a file the name that its variant has now.
    fn take_over(&self, formerly: &Digest, variant: &Digest) -> io::Result<()> {
        match fs::rename(self.path(formerly), self.path(variant)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn path(&self, variant: &Digest) -> PathBuf {
        self.dir.join(variant.hex())
    }

    fn write(&self, variant: &Digest, encoded: &[u8]) -> io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        let mut file = tempfile::NamedTempFile::new_in(&self.dir)?;
        file.write_all(encoded)?;
        file.as_file().sync_all()?;
        file.persist(self.path(variant))?;
        File::open(&self.dir)?.sync_all()
    }

    pub(super) fn read(&self, variant: &Digest) -> io::Result<LayerIndex> {
        LayerIndex::decode(&fs::read(self.path(variant))?).map_err(io::Error::other)
    }

    fn remove(&self, variant: &Digest) -> io::Result<()> {
        match fs::remove_file(self.path(variant)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Removes all files but those of `variants`: what a crash has left behind.
    fn keep_only(&self, variants: &HashSet<String>) -> io::Result<()> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            if !entry.file_name().to_str().is_some_and(|name| variants.contains(name)) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

impl Catalog {
    /// The layers of an image up to the one at `position`, as the image sees them. That one is live then, or its variant is; of those below, the
    /// ones that are waited for: all if it takes something over from them, else those in whose place a layer is shown (`below`).
    pub(super) async fn on_its_parents(
        self: &Arc<Self>,
        plan: &ImagePlan,
        position: usize,
        begun: &[Begun],
        below: &[bool],
    ) -> Result<OnEachOther, Refusal> {
        let Some((own, lower)) = begun.get(..=position).and_then(<[Begun]>::split_last) else {
            return Err(Refusal::unresolved("the image has no such layer", false));
        };
        let own = own.wait().await?;
        let layer = self.live_layer(&own).ok_or_else(|| released(&own))?;
        // Its names may have to be read from the disk.
        let looked = tokio::task::spawn_blocking(move || names_of(&layer).map(|names| depends_on_below(&names)));
        let takes_over = looked.await.unwrap_or_else(|_| Err(released(&own)))?;
        let mut bases = Vec::with_capacity(begun.len());
        for (at, lower) in lower.iter().enumerate() {
            let id = match takes_over || below.get(at).copied().unwrap_or(false) {
                true => Some(lower.wait().await),
                false => lower.outcome(),
            };
            let id = id.and_then(Result::ok).filter(|id| self.read_live().contains_key(id));
            if id.is_none() && takes_over {
                // Why it is not served is told to whoever asks for it.
                tracing::debug!(layer = %own, at, "is on a layer that Lazuli does not serve, and takes nothing over from it");
            }
            bases.push(id);
        }
        bases.push(Some(own));
        self.on_each_other(plan, bases).await
    }

    /// Live layers of an image, from the lowest up, as they look on each other; their variants are live then.
    pub(super) async fn on_each_other(
        self: &Arc<Self>,
        plan: &ImagePlan,
        bases: Vec<Option<Digest>>,
    ) -> Result<OnEachOther, Refusal> {
        let (catalog, plan) = (Arc::clone(self), plan.clone());
        let looked = tokio::task::spawn_blocking(move || {
            let ids = catalog.look(&plan, &bases)?;
            Ok(OnEachOther { bases, ids })
        });
        looked.await.unwrap_or_else(|error| {
            Err(Refusal {
                word: "closed",
                text: format!("putting layers on each other was interrupted: {error}"),
                retry_helps: true,
            })
        })
    }

    fn look(&self, plan: &ImagePlan, bases: &[Option<Digest>]) -> Result<Vec<Option<Digest>>, Refusal> {
        let mut layers = Vec::with_capacity(bases.len());
        for base in bases {
            layers.push(
                base.map(|id| self.live_layer(&id).ok_or_else(|| released(&id)))
                    .transpose()?,
            );
        }
        let mut ids = bases.to_vec();
        let mut unknown = Vec::new();
        for (at, stack) in stacks(bases).into_iter().enumerate() {
            let (Some(layer), Some(id)) = (layers.get(at).and_then(Option::as_ref), ids.get_mut(at)) else {
                continue;
            };
            let seen = self.shelf.seen().get(&stack).copied();
            match seen.filter(|seen| self.still_wanted(seen)) {
                Some(seen) => *id = Some(seen),
                None if at > 0 && !depends_on_below(&*names_of(layer)?) => {
                    self.shelf.seen().put(stack, *layer.id());
                }
                None => unknown.push((at, stack)),
            }
        }
        let Some((top, _)) = unknown.last() else { return Ok(ids) };
        let last = top + 1 == plan.layers.len();
        let looked_at = layers.get(..=*top).unwrap_or_default();
        let names = looked_at.iter().map(|layer| layer.as_deref().map(names_of).transpose());
        let names = names.collect::<Result<Vec<_>, _>>()?;
        let indexes: Vec<_> = names.iter().map(|names| names.as_deref()).collect();
        let changed = self.shelf.stacks.changed(looked_at, &indexes, last);
        let mut changed = changed.map_err(|error| of_limit(&error))?;
        for (at, stack) in unknown {
            let (Some(Some(base)), Some(Some(layer)), Some(planned)) =
                (bases.get(at), layers.get(at), plan.layers.get(at))
            else {
                continue;
            };
            let id = match changed.get_mut(at).and_then(Option::take) {
                None => *base,
                Some(index) => {
                    let spec = &planned.spec;
                    let record = LayerRecord {
                        digest: *base,
                        blob: (*base != spec.digest).then_some(spec.digest),
                        proof: None,
                        formerly: None,
                        variant_of: Some(*base),
                        diff_id: spec.diff_id,
                        media_type: spec.media_type.clone(),
                        size: spec.size,
                        annotations: spec.annotations.clone(),
                        slot: 0,
                        sources: plan.sources.clone(),
                        images: plan.name.iter().cloned().collect(),
                        streamed: None,
                    };
                    self.publish_variant(record, Arc::clone(layer), index)?
                }
            };
            self.shelf.seen().put(stack, id);
            if let Some(place) = ids.get_mut(at) {
                *place = Some(id);
            }
        }
        Ok(ids)
    }

    /// Whether a layer or variant is live; it is wanted from now on.
    fn still_wanted(&self, id: &Digest) -> bool {
        let mut live = self.write_live();
        let live = live.get_mut(id);
        live.map(|live| {
            live.wanted = Instant::now();
            live.in_use.wanted();
        })
        .is_some()
    }

    pub(super) fn live_layer(&self, layer: &Digest) -> Option<Arc<Layer>> {
        self.read_live().get(layer).map(|live| Arc::clone(&live.layer))
    }

    /// Makes a variant live, and remembers it. `record` lacks only the variant's digest and slot.
    fn publish_variant(
        &self,
        record: LayerRecord,
        layer: Arc<Layer>,
        index: Arc<LayerIndex>,
    ) -> Result<Digest, Refusal> {
        let encoded = index.encode();
        let (base, variant) = (record.digest, digest_of(&record.digest, &encoded));
        let _changing = self.shelf.lock();
        if let Some(live) = self.write_live().get_mut(&variant) {
            live.wanted = Instant::now();
            live.in_use.wanted();
            return Ok(variant);
        }
        self.shelf.write(&variant, &encoded).map_err(|error| Refusal {
            word: "disk",
            text: format!("{}: {error}", self.shelf.path(&variant).display()),
            retry_helps: true,
        })?;
        let record = LayerRecord {
            digest: variant,
            ..record
        };
        let recorded = self.store.record_layer(record.clone(), None);
        let slot = recorded.map_err(|error| of_store(&error))?;
        let record = LayerRecord { slot, ..record };
        self.beliefs.note(&record);
        self.attach_variant(&record, layer, index)?;
        tracing::info!(layer = %base, %variant, "looks different on its parents, and is live as it looks there");
        Ok(variant)
    }

    fn attach_variant(&self, record: &LayerRecord, layer: Arc<Layer>, index: Arc<LayerIndex>) -> Result<(), Refusal> {
        let live = Live {
            slot: record.slot,
            format: loader::format_name(&spec_of(record), layer.index()),
            not_lazy: None,
            of: record.variant_of.unwrap_or(record.digest),
            diff_ids: Vec::new(),
            is_variant: true,
            in_use: layer.cached().pin(),
            layer: Arc::clone(&layer),
            wanted: Instant::now(),
        };
        self.show(record.slot, Arc::new(Variant::new(layer, index)))?;
        self.write_live().insert(record.digest, live);
        Ok(())
    }

    /// Brings variants back whose layers are live, and gives those whose layers are absent.
    pub(super) fn restore_variants(
        &self,
        records: Vec<LayerRecord>,
        is_absent: impl Fn(&LayerRecord) -> bool,
    ) -> Vec<LayerRecord> {
        for record in &records {
            if let Some(formerly) = &record.formerly
                && let Err(error) = self.shelf.take_over(formerly, &record.digest)
            {
                tracing::error!(%error, variant = %record.digest, "its file cannot be renamed");
            }
        }
        let names = records.iter().map(|record| record.digest.hex()).collect();
        if let Err(error) = self.shelf.keep_only(&names) {
            tracing::warn!(%error, "{} cannot be tidied up", self.shelf.dir.display());
        }
        let (later, now): (Vec<_>, Vec<_>) = records.into_iter().partition(is_absent);
        for record in &now {
            self.restore_variant(record);
        }
        later
    }

    pub(super) fn restore_variant(&self, record: &LayerRecord) {
        let lost = |reason: &dyn std::fmt::Display| {
            tracing::error!(variant = %record.digest, layer = ?record.variant_of, %reason,
                "cannot be brought back; remove its image and pull it again");
        };
        let _changing = self.shelf.lock();
        let Some(layer) = record.variant_of.and_then(|base| self.live_layer(&base)) else {
            return lost(&"its layer is not live");
        };
        let index = match self.shelf.read(&record.digest) {
            Ok(index) => index,
            Err(error) => {
                let Some(index) = self.rebuild_variant(record, MAX_BELOW) else {
                    return lost(&error);
                };
                tracing::warn!(variant = %record.digest, "its file cannot be used, and is made again: {error}");
                if let Err(error) = self.shelf.write(&record.digest, &index.encode()) {
                    tracing::warn!(%error, variant = %record.digest, "cannot be written; the next start makes it again");
                }
                index
            }
        };
        if !same_space(&index, layer.index()) {
            return lost(&"its layer has been indexed in another way");
        }
        if let Err(refusal) = self.attach_variant(record, layer, Arc::new(index)) {
            lost(&refusal);
        }
    }

    /// Takes the variants that are not to be kept out of those that are live, and gives the layers of the others.
    pub(super) fn release_variants(&self, keep: &HashSet<Digest>) -> (Vec<(Digest, Live)>, Vec<Digest>) {
        let _changing = self.shelf.lock();
        let mut live = self.write_live();
        let goes = |digest: &Digest, live: &mut Live| {
            live.is_variant && !keep.contains(digest) && live.wanted.elapsed() > GRACE
        };
        let gone: Vec<(Digest, Live)> = live.extract_if(goes).collect();
        let stay = live.values().filter(|live| live.is_variant);
        let bases = stay.map(|live| live.of).collect();
        (gone, bases)
    }

    /// Lets go of a variant that is not live any more, unless it has come back.
    pub(super) fn let_variant_go(&self, variant: &Digest, live: Live) {
        let _changing = self.shelf.lock();
        if self.read_live().contains_key(variant) {
            return;
        }
        if let Some(faces) = &*self.faces() {
            faces.detach(live.slot);
        }
        self.forget_variant(variant);
        tracing::info!(layer = %live.layer.digest(), %variant, "is released as it looked on its parents");
    }

    /// Removes what is stored of a variant. Always `false`: it is not there any more.
    pub(super) fn forget_variant(&self, variant: &Digest) -> bool {
        // The record first: a record without a file would be an error at the next start.
        self.beliefs.forget_variant(variant);
        let removed = self.store.remove_layer(variant).map_err(io::Error::other);
        if let Err(error) = removed.and_then(|_| self.shelf.remove(variant)) {
            tracing::warn!(%error, %variant, "what is stored of it cannot be removed");
        }
        false
    }
}

/// The names of a layer.
pub(super) fn names_of(layer: &Layer) -> Result<Arc<LayerIndex>, Refusal> {
    layer.names().map_err(|error| Refusal {
        word: "disk",
        text: error.to_string(),
        retry_helps: true,
    })
}

/// The answer for layers that are too much together.
fn of_limit(error: &LayerError) -> Refusal {
    Refusal {
        word: "format",
        text: error.to_string(),
        retry_helps: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_variants_come_and_go() {
        let root = tempfile::tempdir().unwrap();
        let shelf = Shelf::new(root.path().join(DIRECTORY));
        let [a, b] = ["a", "b"].map(|text| Digest::of(text.as_bytes()));
        shelf.keep_only(&HashSet::new()).unwrap();
        shelf.remove(&a).unwrap();
        for digest in [&a, &b] {
            shelf.write(digest, b"not an index").unwrap();
        }
        assert!(shelf.read(&a).is_err());
        File::create(shelf.dir.join(".tmp")).unwrap();
        shelf.keep_only(&HashSet::from([b.hex()])).unwrap();
        let left: Vec<_> = fs::read_dir(&shelf.dir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        assert_eq!(left, [shelf.path(&b)]);
        // What a variant was called in an older database, once and no more.
        shelf.take_over(&b, &a).unwrap();
        assert!(shelf.path(&a).exists() && !shelf.path(&b).exists());
        shelf.take_over(&b, &a).unwrap();
        shelf.remove(&a).unwrap();
        assert!(!shelf.path(&a).exists());
    }

    #[test]
    fn digests_tell_layers_and_indexes_apart() {
        let [a, b] = ["a", "b"].map(|text| Digest::of(text.as_bytes()));
        assert_eq!(digest_of(&a, b"x"), digest_of(&a, b"x"));
        assert_ne!(digest_of(&a, b"x"), digest_of(&b, b"x"));
        assert_ne!(digest_of(&a, b"x"), digest_of(&a, b"y"));
    }
}
