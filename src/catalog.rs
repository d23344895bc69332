//! Which layers are live: from the labels or chain id of a pull to an image, its layers, their indexes and their place in the FUSE
//! tree; brought back at start, released when no snapshot needs them. It never blocks a reader.
//!
//! # A pull
//! containerd asks for layers one after the other, lowest first. The first question makes the whole image known ([`images`]), and
//! all its layers are loaded at once, side by side ([`loader`]): one task per layer, which every later question for that layer
//! joins. A layer that is loaded gets a *slot*, its directory in the FUSE tree, for ever the same number for the same digest.
//!
//! A layer may look different on its parents than by itself ([`crate::layer::variant`]): then it is a *variant* of the layer that is
//! live for the snapshot ([`variants`]), with a digest and a slot of its own. Snapshots know it by that digest as they know layers.
//!
//! # What containers are made on
//! Layers are mounted when a container needs them, and unmounted when none does ([`crate::fs::Faces`]). A container over several layers is made on
//! their *chain* ([`chains`]) if that has been merged by then.
//!
//! # A restart
//! The database knows every layer that a committed snapshot refers to. Those whose index is in the cache are live again before the
//! daemon says it is ready, without a question to the network; the others are loaded again in the background.
//!
//! # Indexes
//! Before a layer is streamed, an index of it is looked for that another machine has built ([`shared`]); one that is built here is
//! published ([`indexes`]).
//!
//! # Release
//! [`Layers::retain`] names the layers that snapshots refer to, and those that containers are made on. Any other is taken out of the FUSE
//! tree, unless it was loaded just now: its snapshot may be about to be committed. Its bytes stay in the cache until the budget needs the
//! room. What no container is made on is unmounted.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};

use crate::cache::InUse;
use crate::fetch::{Layer, LayerData};
use crate::fs::Faces;
use crate::layer::{Access, Digest};
use crate::metrics::Metrics;
use crate::registry::{Blob, Reference, Registry};
use crate::store::{LayerRecord, LayerSource, Store, StoreError};
use crate::sync::blocking;

mod chains;
pub mod containerd;
mod handle;
pub mod images;
mod indexes;
pub mod loader;
mod records;
mod release;
pub mod shared;
pub mod soci;
pub mod sources;
pub mod status;
pub mod toc;
pub mod variants;

pub use chains::Lowers;
pub use handle::Handle;

use chains::Chains;
use containerd::Containerd;
use images::{ImagePlan, Images};
use loader::{LayerSpec, Loader, NotLazy, Refusal};
use shared::Origin;
use shared::publish::Publisher;
use sources::Failover;
use toc::TocImage;
use variants::Shelf;

/// How long a layer stays live without a snapshot that refers to it. A pull loads all layers of an image at once and commits them
/// one by one, each after those below it; a slow layer may hold up the ones above for minutes.
const GRACE: Duration = Duration::from_secs(900);

/// Most sources of one layer that are remembered.
const SOURCES_MAX: usize = 8;

/// A layer that containerd asks for: one `Prepare` with `containerd.io/snapshot.ref`.
#[derive(Debug, Clone)]
pub struct LayerRequest {
    /// containerd namespace, from the snapshot key.
    pub namespace: String,
    /// Chain id of the layer (`containerd.io/snapshot.ref`).
    pub chain_id: String,
    /// All labels of the request.
    pub labels: HashMap<String, String>,
}

/// What became of a [`LayerRequest`].
#[derive(Debug, Clone)]
pub enum Resolution {
    /// Lazuli serves the layer.
    Live {
        /// Its digest, or that of a variant of it.
        layer: Digest,
        /// Whether it is the topmost one of its image: containers will be made on it.
        is_top: bool,
    },
    /// containerd has to unpack it; the text says why Lazuli does not.
    Refused(String),
}

/// What `snapshots` needs to know of layers. ([`Catalog`] implements it; tests use a fake.)
pub trait Layers: Send + Sync + 'static {
    /// Makes the layer live if it can be, waiting for its index (and for its bytes, where it has to be streamed). The layer stays
    /// live at least until the next [`Layers::retain`] that does not name it.
    fn resolve(&self, request: LayerRequest) -> BoxFuture<'_, Resolution>;

    /// Whether Lazuli shows the layer.
    fn is_live(&self, layer: &Digest) -> bool;

    /// The directories that show live layers, topmost first and each once; mounted now if they are not. They stay until a
    /// [`Layers::retain`] that does not name these layers as a base. Never waits for the network; blocks for mount calls.
    ///
    /// # Errors
    /// The layer that is not live.
    fn lowers(&self, layers: &[Digest]) -> Result<Lowers, Digest>;

    /// Tells that containers will be made on these layers, topmost first. Waits for nothing.
    fn expect(&self, layers: &[Digest]);

    /// Bytes and inodes that a live layer uses on the local disk now.
    fn usage(&self, layer: &Digest) -> Option<(u64, u64)>;

    /// Tells what is needed; layers that are not may be released, and unmounted. Called after removals, and at start.
    fn retain(&self, needed: Needed) -> BoxFuture<'_, ()>;
}

/// What snapshots need of layers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needed {
    /// Layers that committed snapshots refer to.
    pub layers: Vec<Digest>,
    /// Of each active snapshot and each view on remote ones, the layers that it was made on, as they were given to [`Layers::lowers`].
    pub bases: Vec<Vec<Digest>>,
}

/// A layer that is being loaded; everybody who needs it waits for the same task.
type Flight = Shared<BoxFuture<'static, Result<(), Refusal>>>;

struct Live {
    slot: u32,
    layer: Arc<Layer>,
    format: String,
    /// Why it is streamed, if it is.
    not_lazy: Option<String>,
    /// Whether it is the layer as it looks on certain parents. Such a layer is live by itself as well.
    is_variant: bool,
    /// Keeps its bytes in the cache as long as there is anything else to remove.
    _in_use: InUse,
    /// When a pull last asked for it.
    wanted: Instant,
}

/// All live layers of this daemon.
pub struct Catalog {
    images: Images,
    loader: Loader,
    registry: Arc<Registry>,
    /// What layers are shown by, until the daemon ends.
    faces: RwLock<Option<Faces>>,
    store: Arc<Store>,
    metrics: Arc<Metrics>,
    /// Publishes indexes that are built here, if that is wanted.
    publisher: Option<Arc<Publisher>>,
    root: PathBuf,
    cache_max_bytes: u64,
    live: RwLock<HashMap<Digest, Live>>,
    /// The variants on disk.
    shelf: Shelf,
    chains: Chains,
    /// Where work in the background runs.
    runtime: tokio::runtime::Handle,
    flights: Mutex<HashMap<Digest, Flight>>,
    /// Images of which layers were asked for lately, and when that was: their snapshots may be about to come.
    asked: Mutex<HashMap<Digest, Instant>>,
}

/// What a [`Catalog`] is made of.
pub struct Parts {
    /// containerd, to look chain ids up in.
    pub containerd: Containerd,
    /// Registries.
    pub registry: Arc<Registry>,
    /// The loader with its cache and fetcher.
    pub loader: Loader,
    /// What layers are shown by.
    pub faces: Faces,
    /// The database.
    pub store: Arc<Store>,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Publishes indexes that are built here, if that is wanted.
    pub publisher: Option<Arc<Publisher>>,
    /// The daemon's root directory, for the status document.
    pub root: PathBuf,
    /// The cache's budget, for the status document.
    pub cache_max_bytes: u64,
}

impl Catalog {
    /// A catalog in which nothing is live yet. Call it on a tokio runtime.
    pub fn new(parts: Parts) -> Arc<Self> {
        let Parts {
            containerd,
            registry,
            loader,
            faces,
            store,
            metrics,
            publisher,
            root,
            cache_max_bytes,
        } = parts;
        Arc::new(Catalog {
            images: Images::new(containerd, Arc::clone(&registry)),
            loader,
            registry,
            faces: RwLock::new(Some(faces)),
            store,
            metrics,
            publisher,
            shelf: Shelf::new(root.join(variants::DIRECTORY)),
            root,
            cache_max_bytes,
            chains: Chains::new(),
            runtime: tokio::runtime::Handle::current(),
            live: RwLock::default(),
            flights: Mutex::default(),
            asked: Mutex::default(),
        })
    }

    /// Brings back the layers that committed snapshots refer to. Those whose index is stored are live when this returns; the
    /// others are loaded again in the background, for which the network is needed. It blocks: call it on a runtime's thread that may.
    ///
    /// # Errors
    /// [`StoreError`] when the database cannot be read.
    pub fn restore(self: &Arc<Self>, referenced: &[Digest]) -> Result<(), StoreError> {
        let mut referenced: HashSet<_> = referenced.iter().copied().collect();
        let (mut restored, mut missing) = (0_usize, 0_usize);
        let (mut layers, mut variants) = (Vec::new(), Vec::new());
        for (digest, record) in self.store.layers()? {
            match record {
                Ok(record) if record.variant_of.is_some() => variants.push(record),
                Ok(record) => layers.push(record),
                Err(error) => tracing::error!(%error, layer = %digest, "its record is lost; pull its image again"),
            }
        }
        variants.retain(|record| referenced.contains(&record.digest) || self.forget_variant(&record.digest));
        referenced.extend(variants.iter().filter_map(|record| record.variant_of));
        for record in layers.into_iter().filter(|record| referenced.contains(&record.digest)) {
            let digest = record.digest;
            let spec = spec_of(&record);
            let Some(blob) = self.blob(&spec, &record.sources) else {
                tracing::error!(layer = %record.digest, "no source is recorded; pull its image again");
                continue;
            };
            self.forget_if_false(&digest);
            match self.loader.stored(&spec, Arc::clone(&blob)) {
                Ok(Some(layer)) => match self.attach(&spec, record.slot, layer, record.streamed) {
                    Ok(_) => restored += 1,
                    Err(refusal) => tracing::error!(layer = %digest, reason = %refusal, "cannot be brought back"),
                },
                Ok(None) => {
                    missing += 1;
                    tracing::warn!(layer = %record.digest, "its index is not in the cache, will be loaded again");
                    // Nobody waits: who needs the layer joins the task.
                    drop(self.begin(spec, record.sources, record.images, None));
                }
                Err(refusal) => tracing::error!(layer = %record.digest, reason = %refusal, "cannot be brought back"),
            }
        }
        self.restore_variants(variants);
        self.restore_chains(&referenced)?;
        self.publish_the_rest();
        self.check_shared();
        tracing::info!(restored, missing, "layers of committed snapshots are back");
        Ok(())
    }

    /// Ends everything: waiters get errors, the cache is marked clean, the FUSE mount is taken away.
    pub fn close(&self) {
        for (_, live) in self.write_live().drain() {
            live.layer.close();
        }
        self.loader.cache().close();
        let faces = self.faces.write().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Err(error)) = faces.map(Faces::close) {
            tracing::error!(%error, "the FUSE mount is left behind; the next start takes it away");
        }
    }

    fn faces(&self) -> RwLockReadGuard<'_, Option<Faces>> {
        self.faces.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The layer that shows what is asked for, and whether it is the topmost of its image.
    async fn resolve_layer(self: Arc<Self>, request: LayerRequest) -> Result<(Digest, bool), Refusal> {
        let mut plan = match self.images.find(&request).await {
            Ok(plan) => plan,
            Err(refusal) => {
                self.count_refusal(&refusal);
                return Err(refusal);
            }
        };
        if let Some(index) = request.labels.get(soci::LABEL) {
            let mut layers = plan.layers.to_vec();
            for layer in &mut layers {
                layer.spec.annotations.insert(soci::LABEL.to_owned(), index.clone());
            }
            plan.layers = layers.into();
        }
        let Some(position) = plan.position(&request.chain_id) else {
            let (manifest, chain_id) = (plan.manifest, &request.chain_id);
            return Err(Refusal::unresolved(
                format!("manifest {manifest} has no layer with chain id {chain_id}"),
                false,
            ));
        };
        let digest = plan.layers[position].spec.digest;
        let catalog = Arc::clone(&self);
        let may_share = blocking(move || catalog.may_share(&digest)).await;
        if !may_share && self.read_live().contains_key(&digest) {
            let text = "its shared index has turned out to be false; it is read anew once no container uses it";
            return Err(Refusal {
                word: "corrupt",
                text: text.to_owned(),
                retry_helps: true,
            });
        }
        if let Err(error) = self.record_plan(&plan).await {
            tracing::error!(%error, manifest = %plan.manifest, "the image cannot be recorded");
        }
        let flights = self.begin_image(&plan);
        let result = match flights.get(&digest) {
            Some(flight) => flight.clone().await,
            // Already live: `begin_image` starts flights for all others.
            None => Ok(()),
        };
        let result = match result {
            Ok(()) => self.on_its_parents(&plan, position, &flights).await,
            Err(refusal) => Err(refusal),
        };
        if let Err(error) = self.record_image(&plan, &digest, result.as_ref().err()).await {
            tracing::error!(%error, manifest = %plan.manifest, "what became of the image cannot be recorded");
        }
        Ok((result?, position + 1 == plan.layers.len()))
    }

    /// Begins to load every layer of an image that is not live, and gives the tasks of those that are being loaded.
    fn begin_image(self: &Arc<Self>, plan: &ImagePlan) -> HashMap<Digest, Flight> {
        let mut flights = HashMap::new();
        for planned in plan.layers.iter() {
            let digest = planned.spec.digest;
            if let Some(live) = self.write_live().get_mut(&digest) {
                live.wanted = Instant::now();
                let (catalog, sources) = (Arc::clone(self), plan.sources.clone());
                tokio::task::spawn_blocking(move || catalog.learn_sources(&digest, sources));
                continue;
            }
            let names = plan.name.iter().cloned().collect();
            let (spec, sources) = (planned.spec.clone(), plan.sources.clone());
            flights.insert(digest, self.begin(spec, sources, names, Some(plan.manifest)));
        }
        flights
    }

    /// Notes that a live layer can be had from `sources` as well. They come first, as credentials for them were just used; the ones
    /// known before stay, or an image that names a repository without the blob would cut off containers that run.
    fn learn_sources(&self, digest: &Digest, mut sources: Vec<LayerSource>) {
        let learned = self.store.layer(digest).and_then(|record| {
            let Some(mut record) = record else { return Ok(()) };
            let known = record
                .sources
                .iter()
                .filter(|source| !sources.contains(source))
                .cloned();
            let known: Vec<_> = known.collect();
            sources.extend(known);
            sources.truncate(SOURCES_MAX);
            if sources == record.sources {
                return Ok(());
            }
            record.sources = sources;
            self.store.put_layer(&record)?;
            let blob = self.blob(&spec_of(&record), &record.sources);
            if let (Some(blob), Some(live)) = (blob, self.read_live().get(digest)) {
                live.layer.set_blob(blob);
            }
            Ok(())
        });
        if let Err(error) = learned {
            tracing::warn!(%error, layer = %digest, "another source of the layer cannot be recorded");
        }
    }

    /// Begins to load a layer, or joins the task that does.
    fn begin(
        self: &Arc<Self>,
        spec: LayerSpec,
        sources: Vec<LayerSource>,
        names: Vec<String>,
        manifest: Option<Digest>,
    ) -> Flight {
        let mut flights = self.lock_flights();
        if let Some(flight) = flights.get(&spec.digest) {
            return flight.clone();
        }
        // A task that has just ended has made its layer live before it left the list of flights.
        if self.read_live().contains_key(&spec.digest) {
            return futures::future::ready(Ok(())).boxed().shared();
        }
        let digest = spec.digest;
        let catalog = Arc::clone(self);
        let task = tokio::spawn(async move {
            let result = catalog.load(&spec, sources, names, manifest).await;
            // Success is found in `live` from now on, and a failure may be tried again by the next pull.
            catalog.lock_flights().remove(&digest);
            if let Err(refusal) = &result {
                catalog.count_refusal(refusal);
                tracing::warn!(layer = %digest, reason = %refusal, "not served by Lazuli");
                if let Err(error) = catalog.record_refusal(&digest, refusal).await {
                    tracing::error!(%error, layer = %digest, "why it is not served cannot be recorded");
                }
            }
            result
        });
        let flight = async move {
            task.await.unwrap_or_else(|_| {
                Err(Refusal {
                    word: "closed",
                    text: "loading it was interrupted".to_owned(),
                    retry_helps: true,
                })
            })
        };
        let flight = flight.boxed().shared();
        flights.insert(digest, flight.clone());
        flight
    }

    async fn load(
        self: &Arc<Self>,
        spec: &LayerSpec,
        sources: Vec<LayerSource>,
        images: Vec<String>,
        manifest: Option<Digest>,
    ) -> Result<(), Refusal> {
        let began = Instant::now();
        let blob = self
            .blob(spec, &sources)
            .ok_or_else(|| Refusal::unresolved("no source is known", false))?;
        let origin = Origin {
            sources: sources.clone(),
            manifest,
        };
        let (catalog, digest) = (Arc::clone(self), spec.digest);
        let may_share = blocking(move || {
            catalog.forget_if_false(&digest);
            catalog.may_share(&digest)
        });
        let may_share = may_share.await;
        let toc_images = self.toc_images(&images);
        let loaded = self
            .loader
            .load(spec, blob, &toc_images, may_share.then_some(&origin))
            .await?;
        let layer = loaded.layer;
        let streamed = match loaded.streamed {
            Some(NotLazy { word, text }) => {
                self.metrics.layers_streamed_total.with_label_values(&[word]).inc();
                Some(text)
            }
            // It was stored already. Whoever streamed it then has noted why, if that record is still there.
            None => {
                let store = Arc::clone(&self.store);
                let known = blocking(move || store.layer(&digest)).await;
                let known = known.map_err(|error| of_store(&error))?;
                known.and_then(|record| record.streamed)
            }
        };
        let record = LayerRecord {
            digest: spec.digest,
            variant_of: None,
            diff_id: spec.diff_id,
            media_type: spec.media_type.clone(),
            size: spec.size,
            annotations: spec.annotations.clone(),
            slot: 0,
            sources,
            images,
            streamed: streamed.clone(),
        };
        let index = loaded.index.clone();
        let recorded = self
            .store
            .change(move |draft| draft.record_layer(record, index.as_ref()));
        let slot = recorded.await.map_err(|error: StoreError| of_store(&error))?;
        let format = self.attach(spec, slot, Arc::clone(&layer), streamed)?;
        if let Some(index) = loaded.index {
            self.index_is_known(layer.cached(), index, origin);
        }
        let seconds = began.elapsed().as_secs_f64();
        tracing::info!(layer = %spec.digest, format, bytes = spec.size, seconds, "layer is live");
        if loaded.prefetch > 0 {
            tracing::debug!(layer = %spec.digest, bytes = loaded.prefetch, "its author wants these bytes ahead");
            layer.prefetch(0, loaded.prefetch);
        }
        Ok(())
    }

    /// Images that may hold tables of contents of the layers of the images with these names.
    fn toc_images(&self, names: &[String]) -> Vec<TocImage> {
        let references = names.iter().filter_map(|name| Reference::parse(name).ok());
        references
            .filter_map(|reference| {
                let source = self.registry.repository(&reference.host, &reference.repository);
                Some(TocImage::beside(source, TocImage::tag_of(&reference)?))
            })
            .collect()
    }

    fn count_refusal(&self, refusal: &Refusal) {
        let reasons = &self.metrics.layers_refused_total;
        reasons.with_label_values(&[refusal.word]).inc();
    }

    /// Puts a layer into the FUSE tree and the list of live layers.
    fn attach(
        &self,
        spec: &LayerSpec,
        slot: u32,
        layer: Arc<Layer>,
        streamed: Option<String>,
    ) -> Result<String, Refusal> {
        let format = loader::format_name(spec, layer.index());
        let in_use = layer.cached().pin();
        self.show(slot, Arc::clone(&layer) as Arc<dyn LayerData>)?;
        let access = access_label(layer.index().access());
        let because = || streamed.or_else(|| NotLazy::of_spec(spec).map(|reason| reason.text));
        let live = Live {
            slot,
            not_lazy: match layer.index().access() {
                Access::Stream => because(),
                Access::Ranges => None,
            },
            layer,
            format: format.clone(),
            is_variant: false,
            _in_use: in_use,
            wanted: Instant::now(),
        };
        if self.write_live().insert(spec.digest, live).is_none() {
            self.metrics.layers_live.with_label_values(&[access]).inc();
        }
        Ok(format)
    }

    /// Puts a layer or a variant into the FUSE tree.
    fn show(&self, slot: u32, layer: Arc<dyn LayerData>) -> Result<(), Refusal> {
        match &*self.faces() {
            Some(faces) => faces.attach(slot, layer).map_err(|error| Refusal {
                word: "closed",
                text: error.to_string(),
                retry_helps: false,
            }),
            None => Err(Refusal {
                word: "closed",
                text: "the daemon ends".to_owned(),
                retry_helps: true,
            }),
        }
    }

    /// A handle on the blob at all its sources. Asks nobody yet.
    fn blob(&self, spec: &LayerSpec, sources: &[LayerSource]) -> Option<Arc<dyn Blob>> {
        let at = |source: &LayerSource| {
            self.registry
                .repository(&source.host, &source.repository)
                .blob(spec.digest, spec.size)
        };
        Failover::over(sources.iter().map(at).collect())
    }

    fn read_live(&self) -> RwLockReadGuard<'_, HashMap<Digest, Live>> {
        self.live.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_live(&self) -> RwLockWriteGuard<'_, HashMap<Digest, Live>> {
        self.live.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_flights(&self) -> MutexGuard<'_, HashMap<Digest, Flight>> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn access_label(access: Access) -> &'static str {
    match access {
        Access::Ranges => "ranges",
        Access::Stream => "stream",
    }
}

fn spec_of(record: &LayerRecord) -> LayerSpec {
    LayerSpec {
        digest: record.digest,
        size: record.size,
        media_type: record.media_type.clone(),
        annotations: record.annotations.clone(),
        foreign: false,
        diff_id: record.diff_id,
    }
}

fn of_store(error: &StoreError) -> Refusal {
    Refusal {
        word: "disk",
        text: error.to_string(),
        retry_helps: true,
    }
}
