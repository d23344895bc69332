//! How a layer that is wanted becomes live: which of what is there may be shown, what is loaded otherwise, and what is recorded of it.

use std::sync::{Arc, PoisonError};
use std::time::Instant;

use futures::FutureExt;

use super::contact::Contact;
use super::content::{self, ContentStore};
use super::loader::{self, Asked, LayerSpec, Loaded, NotLazy, Refusal};
use super::question::Begun;
use super::shared::Origin;
use super::toc::TocImage;
use super::{Catalog, How, LoadKey, LoadedId, SOURCES_MAX, Wanted, of_store, released, spec_of};
use crate::fetch::Layer;
use crate::layer::Digest;
use crate::registry::Reference;
use crate::store::{LayerRecord, LayerSource, StoreError};
use crate::sync::blocking;

/// Bytes of a blob that containerd has from which on an index of it is looked for elsewhere, before all of it is read: so many take about a
/// second.
const INDEX_ABOVE: u64 = 64 << 20;

impl Catalog {
    /// What an image may be shown of a layer.
    fn judge(&self, spec: &LayerSpec, origin: &Origin) -> loader::Judged {
        self.loader.judge(self.beliefs.of_blob(&spec.digest), spec, origin)
    }

    /// Whether a layer was found to be the tar that an image promises.
    pub(super) fn is_proven(&self, id: &Digest, promised: Option<Digest>) -> bool {
        let belief = self.beliefs.get(id).filter(|belief| !belief.is_false());
        promised.is_some() && belief.is_some_and(|belief| belief.proof == promised)
    }

    /// The live layer that serves what is wanted, if there is one; it is wanted from now on.
    pub(super) fn live_for(self: &Arc<Self>, wanted: &Wanted) -> Option<Digest> {
        let ids: Vec<Digest> = match wanted.how {
            How::AsImageSays => {
                let usable = self.judge(&wanted.spec, &wanted.origin).usable;
                usable.into_iter().map(|(_, id)| id).collect()
            }
            How::Built | How::Applied => vec![wanted.spec.digest],
            How::Again(id) => vec![id],
        };
        let mut lives = self.write_live();
        let id = ids.into_iter().find(|id| lives.contains_key(id))?;
        let live = lives.get_mut(&id)?;
        live.wanted = Instant::now();
        live.in_use.wanted();
        live.note_diff_id(wanted.spec.diff_id);
        let (catalog, sources) = (Arc::clone(self), wanted.origin.sources.clone());
        tokio::spawn(async move { catalog.learn_sources(id, sources).await });
        Some(id)
    }

    /// What loads are told apart by: everything that decides what comes of them, and where they ask for it. So nobody waits for, or gets, what
    /// another image believes, nor waits for a registry that only another image names.
    pub(super) fn load_key(&self, wanted: &Wanted) -> LoadKey {
        let Wanted { spec, origin, how, .. } = wanted;
        let mut text = format!("{how:?} {} {:?} {:?}", spec.digest, spec.diff_id, origin.sources);
        for id in self.loader.vouched(spec, origin) {
            text.push_str(&id.hex());
        }
        if self.loader.may_find_beside(spec, origin) {
            text.push_str(&format!("{:?}", origin.manifest));
        }
        Digest::of(text.as_bytes())
    }

    /// Notes that a live layer can be had from `sources` as well: behind those that have delivered, or an image that names a repository
    /// without the blob would cut off containers that run.
    async fn learn_sources(&self, digest: Digest, sources: Vec<LayerSource>) {
        let standings = Arc::clone(&self.standings);
        // In one change: a proof that is noted meanwhile would be lost otherwise.
        let learned = self.store.change(move |draft| {
            let Some(mut record) = draft.layer(&digest)? else {
                return Ok(None);
            };
            let sources = standings.arrange(&record.blob(), &record.sources, &sources, SOURCES_MAX);
            if sources == record.sources {
                return Ok(None);
            }
            record.sources = sources;
            draft.put_layer(&record)?;
            Ok(Some(record))
        });
        match learned.await {
            Ok(Some(record)) => {
                let blob = self.blob(&spec_of(&record), &record.sources);
                if let Some(live) = self.read_live().get(&digest) {
                    live.layer.set_blob(blob);
                }
            }
            Ok(None) => {}
            Err::<_, StoreError>(error) => {
                tracing::warn!(%error, layer = %digest, "another source of the layer cannot be recorded");
            }
        }
    }

    /// Begins to load a layer, whoever waits for it; ends at once if what is wanted is live.
    pub(super) fn begin(self: &Arc<Self>, wanted: Wanted) -> Begun {
        if let Some(id) = self.live_for(&wanted) {
            return Begun::Live(id);
        }
        let (key, catalog) = (self.load_key(&wanted), Arc::clone(self));
        Begun::Load(self.loads.keep(key, || catalog.loading(wanted).boxed()))
    }

    /// Loads a layer; tells in log, metrics and records if that fails.
    pub(super) async fn loading(self: Arc<Self>, wanted: Wanted) -> Result<LoadedId, Refusal> {
        // A load of the same that has just ended, or one from elsewhere, has made it live.
        if let Some(id) = self.live_for(&wanted) {
            return Ok(id);
        }
        let digest = wanted.spec.digest;
        let result = self.load(wanted).await;
        // Of what was for containerd alone, whoever left it to containerd has told.
        if let Some(refusal) = result.as_ref().err().filter(|refusal| !refusal.is_blob_only()) {
            self.count_refusal(refusal);
            tracing::warn!(layer = %digest, reason = %refusal, "not served by Lazuli");
            if let Err(error) = self.record_refusal(&digest, refusal).await {
                tracing::error!(%error, layer = %digest, "why it is not served cannot be recorded");
            }
        }
        result
    }

    /// Loads a layer, and tells its id.
    async fn load(self: &Arc<Self>, wanted: Wanted) -> Result<Digest, Refusal> {
        let began = Instant::now();
        let Wanted {
            spec,
            origin,
            names: images,
            how,
            lendable,
        } = wanted;
        let (spec, sources) = (&spec, origin.sources.clone());
        let is_here = self.is_in_content(spec).await;
        if sources.is_empty() && !is_here {
            let text = "containerd neither has its blob nor tells which registry its manifest came from";
            return Err(Refusal::unresolved(text, false));
        }
        let blob = self.blob(spec, &sources);
        let judged = self.judge(spec, &origin);
        if !judged.refused.is_empty() {
            let (catalog, refused) = (Arc::clone(self), judged.refused.clone());
            blocking(move || {
                refused.iter().for_each(|id| {
                    catalog.forget_if_false(id);
                });
            })
            .await;
        }
        let host = match (is_here, sources.first()) {
            (true, _) => content::HOST.to_owned(),
            (false, source) => source.map(|source| source.host.clone()).unwrap_or_default(),
        };
        let contact = Contact::new(Arc::clone(&blob), host.clone(), Arc::clone(&self.hosts));
        let _noted = self.contacts.note(spec.digest, &contact);
        let loaded = match how {
            How::Built => self.loader.build(spec, contact, false).await?,
            How::Applied => Loaded {
                streamed: Some(NotLazy::applied()),
                ..self.loader.build(spec, contact, false).await?
            },
            How::AsImageSays | How::Again(_) => {
                let toc_images = self.toc_images(&images);
                // What is read within a moment needs no index, and nobody else need be asked for one.
                let asked = Asked {
                    origin: (!is_here || spec.size > INDEX_ABOVE).then_some(&origin),
                    host: &host,
                    lendable: lendable && !is_here,
                };
                self.loader.load(spec, contact, &toc_images, asked, &judged).await?
            }
        };
        let layer = loaded.layer;
        // Whoever made it live has delivered.
        blob.verified();
        layer.set_blob(blob);
        let id = *layer.cached().id();
        let streamed = match loaded.streamed {
            Some(NotLazy { word, text }) => {
                self.metrics.layers_streamed_total.with_label_values(&[word]).inc();
                Some(text)
            }
            // It was stored already. Whoever streamed it then has noted why, if that record is still there.
            None => {
                let store = Arc::clone(&self.store);
                let known = blocking(move || store.layer(&id)).await;
                let known = known.map_err(|error| of_store(&error))?;
                known.and_then(|record| record.streamed)
            }
        };
        let proof = match id == spec.digest {
            true => layer.cached().diff_id(),
            false => None,
        };
        let record = LayerRecord {
            digest: id,
            blob: (id != spec.digest).then_some(spec.digest),
            proof: proof.or_else(|| self.beliefs.get(&id).and_then(|belief| belief.proof)),
            formerly: None,
            variant_of: None,
            diff_id: spec.diff_id.or(proof),
            media_type: spec.media_type.clone(),
            size: spec.size,
            annotations: spec.annotations.clone(),
            slot: 0,
            sources,
            images,
            streamed: streamed.clone(),
        };
        let settling = Settling::new(self, id);
        let (index, recorded) = (loaded.index.clone(), record.clone());
        let written = self
            .store
            .change(move |draft| draft.record_layer(recorded, index.as_ref()));
        let slot = written.await.map_err(|error: StoreError| of_store(&error))?;
        self.beliefs.note(&LayerRecord { slot, ..record });
        let format = self.attach(spec, id, slot, Arc::clone(&layer), streamed)?;
        drop(settling);
        if let Some(index) = loaded.index {
            self.index_is_known(layer.cached(), index, origin);
        }
        let seconds = began.elapsed().as_secs_f64();
        tracing::info!(layer = %spec.digest, %id, format, bytes = spec.size, seconds, "layer is live");
        if loaded.prefetch > 0 {
            tracing::debug!(layer = %spec.digest, bytes = loaded.prefetch, "its author wants these bytes ahead");
            layer.prefetch(0, loaded.prefetch);
        }
        match how {
            How::Again(before) if before != id => self.again(spec, before, &layer).await,
            _ => Ok(id),
        }
    }

    /// Whether containerd has the blob of a layer: then it is asked first.
    async fn is_in_content(&self, spec: &LayerSpec) -> bool {
        let is_here = self.content.locate(&spec.digest, spec.size).await.is_some();
        if is_here {
            self.standings.delivered(&spec.digest, &ContentStore::origin());
        }
        is_here
    }

    /// Makes a layer live under an id that snapshots know it by, whose index is lost or false: with the index that was found in its place for the
    /// same image.
    async fn again(&self, spec: &LayerSpec, before: Digest, found: &Arc<Layer>) -> Result<Digest, Refusal> {
        let store = Arc::clone(&self.store);
        let known = blocking(move || store.layer(&before)).await;
        let record = known
            .map_err(|error| of_store(&error))?
            .ok_or_else(|| released(&before))?;
        // A reader of its own: it is closed when this id is released.
        let layer = self.loader.fetcher().open(Arc::clone(found.cached()), found.blob());
        self.attach(spec, before, record.slot, layer, record.streamed)?;
        tracing::warn!(layer = %spec.digest, id = %before, now = %found.cached().id(), "the index that it had is gone, it is shown by another");
        Ok(before)
    }

    /// Images that may hold tables of contents of the layers of the images with these names.
    fn toc_images(&self, names: &[String]) -> Vec<TocImage> {
        let references = names.iter().filter_map(|name| Reference::parse(name).ok());
        references
            .filter_map(|reference| {
                let source = self.images.repositories().of(&reference);
                Some(TocImage::beside(source, TocImage::tag_of(&reference)?))
            })
            .collect()
    }

    pub(super) fn count_refusal(&self, refusal: &Refusal) {
        let reasons = &self.metrics.layers_refused_total;
        reasons.with_label_values(&[refusal.word]).inc();
    }
}

/// A layer whose record is being written: it is not forgotten before it is live.
struct Settling<'a> {
    catalog: &'a Catalog,
    id: Digest,
}

impl<'a> Settling<'a> {
    fn new(catalog: &'a Catalog, id: Digest) -> Self {
        catalog
            .settling
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(id);
        Settling { catalog, id }
    }
}

impl Drop for Settling<'_> {
    fn drop(&mut self) {
        let mut settling = self.catalog.settling.lock().unwrap_or_else(PoisonError::into_inner);
        settling.remove(&self.id);
    }
}
