//! Layers that containerd has fetched by itself and has Lazuli apply, as a differ does: not unpacked, but packed and indexed in one pass, as a
//! streamed layer is.
//!
//! No lock of containerd's is held meanwhile, and the bytes come out of its content store, whoever's credentials fetched them. The index is built
//! from the blob, so that it is the same for everybody. A layer that takes something over from layers below can only be shown so if Lazuli
//! shows those as well; otherwise it is containerd's own differ that has to unpack it.

use std::sync::Arc;

use futures::FutureExt;

use super::content::ContentStore;
use super::contract::{Application, Applied};
use super::images::{ImagePlan, PlannedLayer};
use super::loader::{LayerSpec, Refusal};
use super::shared::Origin;
use super::variants::names_of;
use super::{Catalog, How, Wanted, of_store, released, spec_of};
use crate::fetch::LayerData;
use crate::layer::Digest;
use crate::layer::variant::depends_on_below;
use crate::sync::blocking;

impl Catalog {
    /// See [`super::Layers::apply`].
    pub(super) async fn apply(self: Arc<Self>, application: Application) -> Result<Applied, Refusal> {
        let Application {
            namespace,
            chain_id,
            spec,
            below,
        } = application;
        let located = self.content.locate(&spec.digest, spec.size).await;
        let located =
            located.ok_or_else(|| Refusal::unresolved("containerd's content store does not have its blob", true))?;
        self.standings.delivered(&spec.digest, &ContentStore::origin());
        let sources = self.images.sources_of(&namespace, &located.labels).await;
        let wanted = Wanted {
            spec: spec.clone(),
            origin: Origin {
                sources: sources.clone(),
                manifest: None,
            },
            names: Vec::new(),
            how: How::Applied,
            lendable: false,
        };
        // A pull of its own: if containerd gives up, so does this, after a moment.
        let asking = self.loads.ask((namespace.clone(), spec.digest), 0);
        let (key, catalog) = (self.load_key(&wanted), Arc::clone(&self));
        let load = asking.load(&key, || catalog.loading(wanted).boxed())?;
        let own = load.wait().await?;
        let proof = self.beliefs.get(&own).and_then(|belief| belief.proof);
        let tar = proof
            .ok_or_else(|| Refusal::unresolved("its index is older than the record of its tar's digest", false))?;
        let layer = self.live_layer(&own).ok_or_else(|| released(&own))?;
        let tar_size = layer.index().data_size();

        let mut bases: Vec<Option<Digest>> = below.iter().map(|id| id.map(|id| self.beliefs.layer_of(&id))).collect();
        let takes_over = blocking(move || names_of(&layer).map(|names| depends_on_below(&names))).await?;
        if takes_over && bases.contains(&None) {
            return Err(Refusal::unresolved(
                "it takes something over from a layer that containerd has unpacked",
                false,
            ));
        }
        let plan = self.plan_of(&namespace, spec, &bases).await?;
        let plan = ImagePlan { sources, ..plan };
        bases.push(Some(own));
        let proven = bases.iter().flatten().all(|base| {
            let belief = self.beliefs.get(base);
            belief.is_some_and(|belief| !belief.is_false() && belief.proof.is_some())
        });
        let shown = self.on_each_other(&plan, bases).await?;
        let layer = shown.ids.last().copied().flatten().ok_or_else(|| released(&own))?;
        Ok(Applied {
            layer,
            tar,
            tar_size,
            proven,
            is_top: self.is_top(&namespace, &chain_id).await,
        })
    }

    /// The layers on each other as an image has them, of which nothing is known but its layers.
    async fn plan_of(
        self: &Arc<Self>,
        namespace: &str,
        spec: LayerSpec,
        bases: &[Option<Digest>],
    ) -> Result<ImagePlan, Refusal> {
        let (store, bases, manifest) = (Arc::clone(&self.store), bases.to_vec(), spec.digest);
        // Of what is not shown by Lazuli nothing is looked at.
        let stand_in = spec.clone();
        let lower = blocking(move || {
            let spec = |base: &Option<Digest>| {
                let Some(base) = base else { return Ok(stand_in.clone()) };
                let record = store.layer(base).map_err(|error| of_store(&error))?;
                record.as_ref().map(spec_of).ok_or_else(|| released(base))
            };
            bases.iter().map(spec).collect::<Result<Vec<LayerSpec>, Refusal>>()
        });
        let planned = |spec| PlannedLayer {
            chain_id: String::new(),
            spec,
        };
        Ok(ImagePlan {
            namespace: namespace.to_owned(),
            name: None,
            manifest,
            sources: Vec::new(),
            layers: Arc::new(lower.await?.into_iter().chain([spec]).map(planned).collect()),
        })
    }

    /// Whether containers will be made on the layer with this chain id, as far as containerd's images tell.
    async fn is_top(&self, namespace: &str, chain_id: &str) -> bool {
        let plans = self.images.with_chain(namespace, chain_id, false).await;
        let is_top = |plan: &ImagePlan| {
            let position = plan.position(chain_id);
            position.is_some_and(|position| position + 1 == plan.layers.len())
        };
        plans.is_ok_and(|plans| plans.iter().any(is_top))
    }

    /// Finds out which of the layers that are live and not wholly here containerd has, so that it is asked first. After a start nothing else
    /// would tell.
    pub(super) fn look_in_content(self: &Arc<Self>) {
        let catalog = Arc::clone(self);
        self.runtime.spawn(async move {
            for id in catalog.live_ids() {
                if catalog.whole(&id).is_some() {
                    continue;
                }
                let Some(layer) = catalog.live_layer(&id) else { continue };
                let digest = *layer.digest();
                if catalog.content.locate(&digest, layer.blob().size()).await.is_some() {
                    catalog.standings.delivered(&digest, &ContentStore::origin());
                }
            }
        });
    }
}
