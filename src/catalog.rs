//! Which layers are live: from the labels or chain id of a pull to an image, its layers, their indexes and their place in the FUSE
//! tree; brought back at start, released when no snapshot needs them. It never blocks a reader.
//!
//! # A pull
//! containerd asks for layers one after the other, lowest first. The first question makes the whole image known ([`images`]), and
//! all its layers are loaded at once, side by side ([`loading`], [`loader`]): one task per layer, which every later question for that layer
//! joins, and which ends when nobody wants it any more ([`loads`]). A question waits for its layer for a few seconds ([`pace`]); what
//! cannot be had by then is left to containerd ([`question`]), which is lent what is coming already ([`lend`]). A layer that is loaded gets a *slot*, its directory in the FUSE tree, for
//! ever the same number for the same id.
//!
//! Layers are known by what is believed of them ([`belief`]): an image is served with what it vouches for, the configuration vouches for, or is
//! proven, and never with what only another image vouches for. Tasks are told apart in the same way. What several images with the same layers
//! do not agree on is settled when a container is made ([`agree`]).
//!
//! A layer may look different on its parents than by itself ([`crate::layer::variant`]): then it is a *variant* of the layer that is
//! live for the snapshot ([`variants`]), with a digest and a slot of its own. Snapshots know it by that digest as they know layers.
//!
//! # Layers that containerd has
//! containerd's content store is a source like any other ([`content`]), and asked first where it has the blob. What it has fetched by itself it
//! has Lazuli apply, instead of unpacking it ([`apply`]). What it lacks of a lazily pulled image is written into it where somebody wants that
//! ([`complete`]).
//!
//! # What containers are made on
//! Layers are mounted when a container needs them, and unmounted when none does ([`crate::fs::Faces`]). A container over several layers is made on
//! their *chain* ([`chains`]) if that has been merged by then.
//!
//! # A restart
//! The database knows every layer that a committed snapshot refers to. Those whose index is in the cache are live again before the
//! daemon says it is ready, without a question to the network; the others are loaded again in the background ([`restore`]).
//!
//! # Indexes
//! Before a layer is streamed, an index of it is looked for that another machine has built ([`shared`]); one that is built here is
//! published ([`indexes`]).
//!
//! # What is learned
//! What containers read while they start is recorded, and asked for when their image is pulled again ([`traces`]).
//!
//! # Release
//! [`Layers::retain`] names the layers that snapshots refer to, and those that containers are made on. Any other is taken out of the FUSE
//! tree, unless it was loaded just now: its snapshot may be about to be committed. Its bytes stay in the cache until the budget needs the
//! room. What no container is made on is unmounted.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use crate::cache::InUse;
use crate::config::{IndexConfig, TraceConfig};
use crate::fetch::{Layer, LayerData};
use crate::fs::Faces;
use crate::layer::{Access, Digest};
use crate::metrics::Metrics;
use crate::registry::{Blob, Registry};
use crate::store::{LayerRecord, LayerSource, Store, StoreError};

mod agree;
mod apply;
pub mod belief;
mod chains;
pub mod complete;
mod contact;
pub mod containerd;
mod content;
mod contract;
mod handle;
mod idle;
pub mod images;
mod indexes;
mod lend;
pub mod loader;
mod loading;
mod loads;
mod memory;
mod pace;
mod question;
mod rebuild;
mod records;
mod release;
mod restore;
mod segments;
pub mod shared;
pub mod soci;
pub mod sources;
pub mod status;
pub mod toc;
pub mod traces;
pub mod variants;

pub use chains::Lowers;
pub use contract::{
    Agreement, Application, Applied, LayerRequest, Layers, Needed, Question, Released, Resolution, Start,
};
pub use handle::Handle;

use belief::Beliefs;
use chains::Chains;
use contact::Contacts;
use containerd::Containerd;
use content::ContentStore;
use images::{ImagePlan, Images};
use loader::{LayerSpec, Loader, NotLazy, Refusal};
use loads::Loads;
use pace::Hosts;
use shared::Origin;
use shared::publish::Publisher;
use sources::{Failover, Repositories, Standings};
use traces::Traces;
use variants::Shelf;

/// How long a layer stays live without a snapshot that refers to it. A pull loads all layers of an image at once and commits them
/// one by one, each after those below it; a slow layer may hold up the ones above for minutes.
const GRACE: Duration = Duration::from_secs(900);

/// Most promises of one layer's tar that are remembered: images that are right promise the same.
const DIFF_IDS_MAX: usize = 8;

/// Most sources of one layer that are remembered.
const SOURCES_MAX: usize = 8;

/// A layer that is to be loaded.
#[derive(Clone)]
struct Wanted {
    spec: LayerSpec,
    /// Where its blob can be had, and for which image.
    origin: Origin,
    /// Names of the image.
    names: Vec<String>,
    /// What must be live in the end.
    how: How,
    /// Whether containerd may be lent its blob as it comes ([`lend`]).
    lendable: bool,
}

/// What is wanted of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// That it can be read, by any index that may be shown to the image.
    AsImageSays,
    /// That its index is built from the blob.
    Built,
    /// The same, from the blob that containerd has.
    Applied,
    /// That it is live under the id that it had before, as snapshots know it by that, whatever its index is now.
    Again(Digest),
}

/// What a load is known by: [`Catalog::load_key`].
type LoadKey = Digest;

/// What comes of a load: the id of the layer that is live then.
type LoadedId = Digest;

struct Live {
    slot: u32,
    layer: Arc<Layer>,
    /// Of a variant, the id of its layer; of a layer its own. It is not always that of `layer`: see [`How::Again`].
    of: Digest,
    /// What images that use it promise its tar to be.
    diff_ids: Vec<Digest>,
    format: String,
    /// Why it is streamed, if it is.
    not_lazy: Option<String>,
    /// Whether it is the layer as it looks on certain parents. Such a layer is live by itself as well.
    is_variant: bool,
    /// Keeps its bytes in the cache as long as there is anything else to remove, and snapshots refer to it.
    in_use: InUse,
    /// When a pull last asked for it.
    wanted: Instant,
}

/// All live layers of this daemon.
pub struct Catalog {
    images: Images,
    loader: Loader,
    registry: Arc<Registry>,
    /// What containerd has itself.
    content: ContentStore,
    /// What layers are shown by, until the daemon ends.
    faces: RwLock<Option<Faces>>,
    store: Arc<Store>,
    metrics: Arc<Metrics>,
    /// Publishes indexes that are built here, if that is wanted.
    publisher: Option<Arc<Publisher>>,
    root: PathBuf,
    cache_max_bytes: u64,
    /// By id.
    live: RwLock<HashMap<Digest, Live>>,
    /// What is known of the ids of layers.
    beliefs: Beliefs,
    /// The variants on disk.
    shelf: Shelf,
    chains: Chains,
    /// Where work in the background runs.
    runtime: tokio::runtime::Handle,
    loads: Arc<Loads<LoadKey, LoadedId>>,
    /// What is known of registries' hosts.
    hosts: Arc<Hosts>,
    /// Who was asked for layers that are being loaded, and whether he answers.
    contacts: Contacts,
    standings: Arc<Standings>,
    /// Ids of layers from before their record is written until they are live.
    settling: Mutex<HashSet<Digest>>,
    /// Held while an image is being completed: one at a time.
    completing: tokio::sync::Mutex<()>,
    /// What was last found out of images being complete.
    completeness: Mutex<complete::Completeness>,
    /// Images of which layers were asked for lately, and when that was: their snapshots may be about to come.
    asked: Mutex<HashMap<Digest, Instant>>,
    /// What is learned of starts.
    traces: Traces,
    /// Whether containerd is lent what does not come in time.
    lends: bool,
    /// Where Lazuli serves.
    address: PathBuf,
    /// What containerd is kept from fetching, by pull.
    held: Mutex<HashMap<loads::PullKey, lend::Held>>,
    /// What comes for containerd alone.
    alone: lend::BlobsAlone,
    /// Whether containerd has unpacked the last layer that was left to it without asking Lazuli's differ, though it may know it.
    unused_differ: AtomicBool,
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
    /// What is learned of starts.
    pub trace: TraceConfig,
    /// How that is shared: as indexes are.
    pub index: IndexConfig,
    /// Whether containerd is lent what does not come in time.
    pub lends: bool,
    /// Where Lazuli serves: by that, containerd's differs tell whether it is one of them.
    pub address: PathBuf,
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
            trace,
            index,
            lends,
            address,
        } = parts;
        let hosts: Arc<Hosts> = Arc::default();
        Arc::new(Catalog {
            content: ContentStore::new(containerd.clone()),
            images: Images::new(
                containerd,
                Arc::clone(&registry),
                Repositories::scheduled(Arc::clone(&registry), Arc::clone(loader.fetcher())),
            ),
            loader: loader.with_hosts(Arc::clone(&hosts)),
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
            beliefs: Beliefs::default(),
            loads: Loads::new(tokio::runtime::Handle::current()),
            contacts: Contacts::default(),
            standings: Arc::default(),
            hosts,
            settling: Mutex::default(),
            completing: tokio::sync::Mutex::default(),
            completeness: Mutex::default(),
            asked: Mutex::default(),
            traces: Traces::new(trace, &index),
            lends,
            address,
            held: Mutex::default(),
            alone: lend::BlobsAlone::default(),
            unused_differ: AtomicBool::new(false),
        })
    }

    /// Ends everything: waiters get errors, the FUSE mount is taken away, the cache is marked clean. In this order: who stops a daemon waits for
    /// the first two, and the last may take long after much was written.
    pub fn close(&self) {
        self.end_recordings();
        // Before the first pin goes.
        self.loader.cache().keep_all();
        for (_, live) in self.write_live().drain() {
            live.layer.close();
        }
        let faces = self.faces.write().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Err(error)) = faces.map(Faces::close) {
            tracing::error!(%error, "the FUSE mount is left behind; the next start takes it away");
        }
        self.loader.cache().close();
    }

    /// Whether it was not closed.
    pub fn is_open(&self) -> bool {
        self.faces().is_some()
    }

    /// What `use_it` makes of the faces; `None` when everything is closed.
    pub fn with_faces<T>(&self, use_it: impl FnOnce(&Faces) -> T) -> Option<T> {
        self.faces().as_ref().map(use_it)
    }

    fn faces(&self) -> RwLockReadGuard<'_, Option<Faces>> {
        self.faces.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The layer that shows what is asked for, within [`pace::BOUND`].
    async fn resolve_layer(self: Arc<Self>, request: LayerRequest) -> Result<Resolution, Refusal> {
        let deadline = Instant::now() + pace::BOUND;
        let late = |_| Refusal {
            word: "slow",
            text: format!("it was not found out within {} s what it is", pace::BOUND.as_secs()),
            retry_helps: true,
        };
        let found = tokio::time::timeout_at(deadline.into(), self.plan(&request)).await;
        let plan = match found.map_err(late).flatten() {
            Ok(plan) => plan,
            Err(refusal) => {
                self.count_refusal(&refusal);
                return Err(refusal);
            }
        };
        let Some(position) = plan.position(&request.chain_id) else {
            let (manifest, chain_id) = (plan.manifest, &request.chain_id);
            return Err(Refusal::unresolved(
                format!("manifest {manifest} has no layer with chain id {chain_id}"),
                false,
            ));
        };
        let digest = plan.layers[position].spec.digest;
        if let Err(error) = self.record_plan(&plan).await {
            tracing::error!(%error, manifest = %plan.manifest, "the image cannot be recorded");
        }
        let asking = self.loads.ask((plan.namespace.clone(), plan.manifest), position);
        let mut begun = self.begin_image(&plan, position, &asking, &request);
        self.play_for(&plan, &begun);
        let result = match self.wait_for(&plan, position, &asking, &mut begun, deadline).await {
            Ok(_) => {
                let looks = self.on_its_parents(&plan, position, &begun, &request.below);
                let deadline = pace::local_deadline(deadline, Instant::now());
                let looks = tokio::time::timeout_at(deadline.into(), looks).await;
                looks.map_err(late).flatten()
            }
            Err(refusal) => Err(refusal),
        };
        if let Err(error) = self.record_image(&plan, &digest, result.as_ref().err()).await {
            tracing::error!(%error, manifest = %plan.manifest, "what became of the image cannot be recorded");
        }
        let mut shown = result?;
        let bases = std::mem::take(&mut shown.bases);
        let proven = |(base, planned): (&Option<Digest>, &images::PlannedLayer)| {
            base.is_none_or(|base| self.is_proven(&base, planned.spec.diff_id))
        };
        let proven = bases.iter().zip(plan.layers.iter()).all(proven);
        match shown.ids.pop().flatten() {
            Some(layer) => Ok(Resolution::Live {
                layer,
                below: shown.ids,
                proven,
                is_top: position + 1 == plan.layers.len(),
            }),
            None => Err(released(&digest)),
        }
    }

    /// The image that holds the layer, with the SOCI index that the client names.
    async fn plan(&self, request: &LayerRequest) -> Result<ImagePlan, Refusal> {
        let mut plan = self.images.find(request).await?;
        if let Some(index) = self.clients_index(&plan, request).await {
            let mut layers = plan.layers.to_vec();
            for layer in &mut layers {
                layer.spec.annotations.insert(soci::LABEL.to_owned(), index.clone());
            }
            plan.layers = layers.into();
        }
        Ok(plan)
    }

    /// The SOCI index that the client names, if it does. A label that containerd has made of a layer's annotation is no client's word: it is in
    /// the manifest already, for that layer, or it comes from the manifest of another image with the same layers, which is then none of this one.
    async fn clients_index(&self, plan: &ImagePlan, request: &LayerRequest) -> Option<String> {
        let index = request.labels.get(soci::LABEL)?;
        let names = |plan: &ImagePlan| {
            let layer = plan.layer(&request.chain_id);
            layer.is_some_and(|layer| layer.spec.annotations.get(soci::manifest::INDEX_DIGEST) == Some(index))
        };
        if names(plan) {
            return None;
        }
        match self
            .images
            .with_chain(&request.namespace, &request.chain_id, false)
            .await
        {
            Ok(plans) if !plans.iter().any(names) => Some(index.clone()),
            Ok(_) => {
                tracing::warn!(
                    index,
                    chain_id = request.chain_id,
                    "another image names this SOCI index, and not the one that is pulled"
                );
                None
            }
            Err(refusal) => {
                tracing::warn!(index, %refusal, "it cannot be told whether the client names this SOCI index: it is not used");
                None
            }
        }
    }

    /// Puts a layer into the FUSE tree and the list of live layers.
    fn attach(
        &self,
        spec: &LayerSpec,
        id: Digest,
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
            of: id,
            diff_ids: spec.diff_id.into_iter().collect(),
            format: format.clone(),
            is_variant: false,
            in_use,
            wanted: Instant::now(),
        };
        if self.write_live().insert(id, live).is_none() {
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

    /// A handle on the blob at all its sources, of which containerd's own is the last one, unless it is known to have the blob. Asks nobody yet.
    fn blob(&self, spec: &LayerSpec, sources: &[LayerSource]) -> Arc<dyn Blob> {
        let at = |source: &LayerSource| {
            self.registry
                .repository(&source.host, &source.repository)
                .blob(spec.digest, spec.size)
        };
        let content = self.content.blob(spec.digest, spec.size, sources.is_empty());
        let places = sources.iter().map(at).chain([Arc::clone(&content)]).collect();
        Failover::over(spec.digest, places, Arc::clone(&self.standings)).unwrap_or(content)
    }

    fn read_live(&self) -> RwLockReadGuard<'_, HashMap<Digest, Live>> {
        self.live.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_live(&self) -> RwLockWriteGuard<'_, HashMap<Digest, Live>> {
        self.live.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Live {
    /// Notes what an image promises the layer's tar to be.
    fn note_diff_id(&mut self, diff_id: Option<Digest>) {
        if let Some(diff_id) = diff_id
            && self.diff_ids.len() < DIFF_IDS_MAX
            && !self.diff_ids.contains(&diff_id)
        {
            self.diff_ids.push(diff_id);
        }
    }
}

/// The answer for a layer that was live a moment ago.
fn released(layer: &Digest) -> Refusal {
    Refusal {
        word: "closed",
        text: format!("{layer} was released while it was asked for"),
        retry_helps: true,
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
        digest: record.blob(),
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
