//! Which layers are live: from the labels or chain id of a pull to an image, its layers, their indexes and their place in the FUSE
//! tree; brought back at start, released when no snapshot needs them. It never blocks a reader.
//!
//! # A pull
//! containerd asks for layers one after the other, lowest first. The first question makes the whole image known ([`images`]), and
//! all its layers are loaded at once, side by side ([`loader`]): one task per layer, which every later question for that layer
//! joins, and which ends when nobody wants it any more ([`loads`]). A question waits for its layer for a few seconds ([`pace`]); what
//! cannot be had by then is left to containerd ([`question`]). A layer that is loaded gets a *slot*, its directory in the FUSE tree, for
//! ever the same number for the same id.
//!
//! Layers are known by what is believed of them ([`belief`]): an image is served with what it vouches for, the configuration vouches for, or is
//! proven, and never with what only another image vouches for. Tasks are told apart in the same way. What several images with the same layers
//! do not agree on is settled when a container is made ([`agree`]).
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
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::BoxFuture;

use crate::cache::{InUse, Key};
use crate::fetch::{Layer, LayerData};
use crate::fs::Faces;
use crate::layer::{Access, Digest};
use crate::metrics::Metrics;
use crate::registry::{Blob, Reference, Registry};
use crate::store::{LayerRecord, LayerSource, Store, StoreError};
use crate::sync::blocking;

mod agree;
pub mod belief;
mod chains;
mod contact;
pub mod containerd;
mod handle;
pub mod images;
mod indexes;
pub mod loader;
mod loads;
mod memory;
mod pace;
mod question;
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

use belief::Beliefs;
use chains::Chains;
use contact::{Contact, Contacts};
use containerd::Containerd;
use images::{ImagePlan, Images};
use loader::{LayerSpec, Loader, NotLazy, Refusal};
use loads::Loads;
use pace::Hosts;
use question::Begun;
use shared::Origin;
use shared::publish::Publisher;
use sources::Failover;
use toc::TocImage;
use variants::Shelf;

/// How long a layer stays live without a snapshot that refers to it. A pull loads all layers of an image at once and commits them
/// one by one, each after those below it; a slow layer may hold up the ones above for minutes.
const GRACE: Duration = Duration::from_secs(900);

/// Most promises of one layer's tar that are remembered: images that are right promise the same.
const DIFF_IDS_MAX: usize = 8;

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
    /// Of the snapshots below, the lowest first: whether Lazuli shows a layer in its place.
    pub below: Vec<bool>,
    /// Chain ids of layers that containerd is fetching and unpacking by itself.
    pub unpacking: HashSet<String>,
}

/// What became of a [`LayerRequest`].
#[derive(Debug, Clone)]
pub enum Resolution {
    /// Lazuli serves the layer.
    Live {
        /// Its id, or the digest of a variant of it.
        layer: Digest,
        /// The layers below it as its image sees them, the lowest first, in the same way; `None` for what Lazuli does not serve.
        below: Vec<Option<Digest>>,
        /// Whether all of them were found to be what the image promises, so that every image that promises the same may share them.
        proven: bool,
        /// Whether it is the topmost one of its image: containers will be made on it.
        is_top: bool,
    },
    /// containerd has to unpack it; the text says why Lazuli does not.
    Refused(String),
}

/// What `snapshots` needs to know of layers. ([`Catalog`] implements it; tests use a fake.)
pub trait Layers: Send + Sync + 'static {
    /// Makes the layer live if it can be, waiting for its index (and for its bytes, where it has to be streamed), but for a few seconds at
    /// the most: what is not there by then is refused. The layer stays
    /// live at least until the next [`Layers::retain`] that does not name it.
    fn resolve(&self, request: LayerRequest) -> BoxFuture<'_, Resolution>;

    /// What may be shown to a container if several images of its namespace have the same chain of layers, and do not believe the same of them.
    /// Asks containerd, and may wait for a layer, both for a few seconds.
    fn agree(&self, question: Question) -> BoxFuture<'_, Agreement>;

    /// Whether Lazuli shows the layer.
    fn is_live(&self, layer: &Digest) -> bool;

    /// The directories that show live layers, topmost first and each once; mounted now if they are not. They stay until a
    /// [`Layers::retain`] with a later [mark](Layers::mark) that does not name these layers as a base. Never waits for the network; blocks
    /// for mount calls.
    ///
    /// # Errors
    /// The layer that is not live.
    fn lowers(&self, layers: &[Digest]) -> Result<Lowers, Digest>;

    /// Tells that containers will be made on these layers, topmost first. Waits for nothing.
    fn expect(&self, layers: &[Digest]);

    /// Bytes and inodes that a live layer uses on the local disk now.
    fn usage(&self, layer: &Digest) -> Option<(u64, u64)>;

    /// A mark in time: what [`Layers::lowers`] gives out from now on is later.
    fn mark(&self) -> u64;

    /// Tells what is needed; layers that are not may be released, and what was last given out before `mark` may be unmounted. Called after
    /// removals, and at start. Decides quickly; what takes long is left to the answer.
    fn retain(&self, needed: Needed, mark: u64) -> BoxFuture<'_, Released>;
}

/// What a release has decided and not done yet. It blocks for unmount calls and for the disk.
pub type Released = Box<dyn FnOnce() + Send>;
/// What containers are about to be made on.
#[derive(Debug, Clone)]
pub struct Question {
    /// containerd namespace of the container.
    pub namespace: String,
    /// Chain id of the topmost layer.
    pub chain_id: String,
    /// The layers that would be shown, the lowest first; `None` for those that containerd has unpacked.
    pub shown: Vec<Option<Digest>>,
}

/// What the images say that hold a chain of layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Agreement {
    /// Nobody objects to what would be shown.
    Shown,
    /// They agree on this alone.
    Instead(Vec<Option<Digest>>),
    /// Not yet on anything; the text says who says what.
    Open(String),
}

/// What snapshots need of layers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needed {
    /// Layers that committed snapshots refer to.
    pub layers: Vec<Digest>,
    /// Of each active snapshot and each view on remote ones, the layers that it was made on, as they were given to [`Layers::lowers`].
    pub bases: Vec<Vec<Digest>>,
}

/// A layer that is to be loaded.
struct Wanted {
    spec: LayerSpec,
    /// Where its blob can be had, and for which image.
    origin: Origin,
    /// Names of the image.
    names: Vec<String>,
    /// What must be live in the end.
    how: How,
}

/// What is wanted of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// That it can be read, by any index that may be shown to the image.
    AsImageSays,
    /// That its index is built from the blob.
    Built,
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
    /// Ids of layers from before their record is written until they are live.
    settling: Mutex<HashSet<Digest>>,
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
        let hosts: Arc<Hosts> = Arc::default();
        Arc::new(Catalog {
            images: Images::new(containerd, Arc::clone(&registry)),
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
            hosts,
            settling: Mutex::default(),
            asked: Mutex::default(),
        })
    }

    /// Brings back the layers that committed snapshots refer to. Those whose index is stored are live when this returns; the
    /// others are loaded again in the background, for which the network is needed. It blocks: call it on a runtime's thread that may.
    ///
    /// # Errors
    /// [`StoreError`] when the database cannot be read.
    pub fn restore(self: &Arc<Self>, referenced: &[Digest]) -> Result<(), StoreError> {
        self.beliefs.load(&self.store)?;
        let mut referenced: HashSet<_> = referenced.iter().copied().collect();
        let (mut restored, mut missing) = (0_usize, 0_usize);
        let (mut layers, mut variants) = (Vec::new(), Vec::new());
        let mut begun = HashMap::new();
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
            let key = Key {
                id: digest,
                blob: spec.digest,
            };
            let stored = match self.forget_if_false(&digest) {
                true => Ok(None),
                false => self.loader.stored(key, Arc::clone(&blob)),
            };
            match stored {
                Ok(Some(layer)) => match self.attach(&spec, digest, record.slot, layer, record.streamed) {
                    Ok(_) => restored += 1,
                    Err(refusal) => tracing::error!(layer = %digest, reason = %refusal, "cannot be brought back"),
                },
                Ok(None) => {
                    missing += 1;
                    tracing::warn!(layer = %record.digest, "its index is not in the cache, will be loaded again");
                    // Nobody waits: who needs the layer joins the task.
                    let origin = Origin {
                        sources: record.sources,
                        manifest: None,
                    };
                    let load = self.begin(Wanted {
                        spec,
                        origin,
                        names: record.images,
                        how: How::Again(digest),
                    });
                    begun.insert(digest, load);
                }
                Err(refusal) => tracing::error!(layer = %record.digest, reason = %refusal, "cannot be brought back"),
            }
        }
        self.restore_variants(variants, &begun);
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
        let begun = self.begin_image(&plan, position, &asking, &request.unpacking);
        let result = match self.wait_for(&plan, position, &asking, &begun, deadline).await {
            Ok(_) => {
                let looks = self.on_its_parents(&plan, position, &begun, &request.below);
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

    /// What an image may be shown of a layer.
    fn judge(&self, spec: &LayerSpec, origin: &Origin) -> loader::Judged {
        self.loader.judge(self.beliefs.of_blob(&spec.digest), spec, origin)
    }

    /// Whether a layer was found to be the tar that an image promises.
    fn is_proven(&self, id: &Digest, promised: Option<Digest>) -> bool {
        let belief = self.beliefs.get(id).filter(|belief| !belief.is_false());
        promised.is_some() && belief.is_some_and(|belief| belief.proof == promised)
    }

    /// The live layer that serves what is wanted, if there is one; it is wanted from now on.
    fn live_for(self: &Arc<Self>, wanted: &Wanted) -> Option<Digest> {
        let ids: Vec<Digest> = match wanted.how {
            How::AsImageSays => {
                let usable = self.judge(&wanted.spec, &wanted.origin).usable;
                usable.into_iter().map(|(_, id)| id).collect()
            }
            How::Built => vec![wanted.spec.digest],
            How::Again(id) => vec![id],
        };
        let mut lives = self.write_live();
        let id = ids.into_iter().find(|id| lives.contains_key(id))?;
        let live = lives.get_mut(&id)?;
        live.wanted = Instant::now();
        live.in_use.wanted();
        live.note_diff_id(wanted.spec.diff_id);
        let (catalog, sources) = (Arc::clone(self), wanted.origin.sources.clone());
        tokio::task::spawn_blocking(move || catalog.learn_sources(&id, sources));
        Some(id)
    }

    /// What loads are told apart by: everything that decides what comes of them, and where they ask for it. So nobody waits for, or gets, what
    /// another image believes, nor waits for a registry that only another image names.
    fn load_key(&self, wanted: &Wanted) -> LoadKey {
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

    /// Begins to load a layer, whoever waits for it; ends at once if what is wanted is live.
    fn begin(self: &Arc<Self>, wanted: Wanted) -> Begun {
        if let Some(id) = self.live_for(&wanted) {
            return Begun::Live(id);
        }
        let (key, catalog) = (self.load_key(&wanted), Arc::clone(self));
        Begun::Load(self.loads.keep(key, || catalog.loading(wanted).boxed()))
    }

    /// Loads a layer; tells in log, metrics and records if that fails.
    async fn loading(self: Arc<Self>, wanted: Wanted) -> Result<LoadedId, Refusal> {
        // A load of the same that has just ended, or one from elsewhere, has made it live.
        if let Some(id) = self.live_for(&wanted) {
            return Ok(id);
        }
        let digest = wanted.spec.digest;
        let result = self.load(wanted).await;
        if let Err(refusal) = &result {
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
        } = wanted;
        let (spec, sources) = (&spec, origin.sources.clone());
        let blob = self
            .blob(spec, &sources)
            .ok_or_else(|| Refusal::unresolved("no source is known", false))?;
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
        let host = sources.first().map(|source| source.host.clone()).unwrap_or_default();
        let contact = Contact::new(Arc::clone(&blob), host, Arc::clone(&self.hosts));
        let _noted = self.contacts.note(spec.digest, &contact);
        let loaded = match how {
            How::Built => self.loader.build(spec, contact).await?,
            How::AsImageSays | How::Again(_) => {
                let toc_images = self.toc_images(&images);
                self.loader
                    .load(spec, contact, &toc_images, Some(&origin), &judged)
                    .await?
            }
        };
        let layer = loaded.layer;
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
            diff_id: spec.diff_id,
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
            How::Again(before) if before != id => self.again(spec, before, &layer),
            _ => Ok(id),
        }
    }

    /// Makes a layer live under an id that snapshots know it by, whose index is lost or false: with the index that was found in its place for the
    /// same image.
    fn again(&self, spec: &LayerSpec, before: Digest, found: &Arc<Layer>) -> Result<Digest, Refusal> {
        let known = self.store.layer(&before).map_err(|error| of_store(&error))?;
        let record = known.ok_or_else(|| released(&before))?;
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
