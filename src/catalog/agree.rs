//! What a container is shown of layers that several images have.
//!
//! containerd asks for a layer once for each chain id of a namespace. An image whose layers are all there already is never asked for, though it may
//! believe something else of them than the image that was pulled first, which may be a hostile copy. So when a container is made, all images of its
//! namespace that have its chain of layers are looked at: what all of them vouch for is shown to it; where they do not agree, nothing but what was
//! found to be the tar that their chain id promises. If there is no such thing yet, the layer is built from its blob, and the container has to
//! wait. So it is with what an older version has left: nobody vouches for that any more, and the layer is loaded as its images say.
//!
//! Nothing is asked of containerd if everything that would be shown is proven: its chain id follows from the proofs.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::time::Instant;

use super::images::ImagePlan;
use super::loader::Refusal;
use super::{Agreement, Catalog, How, Question, Wanted};
use crate::layer::Digest;
use crate::registry::image::chain_ids;

/// Longest wait for containerd to tell what images there are. It takes milliseconds; without an answer containers are made as before.
const ASK_DEADLINE: Duration = Duration::from_secs(3);
/// Longest wait for layers on which images do not agree. containerd holds a lock meanwhile; they are loaded on after it, for the next try.
const BUILD_DEADLINE: Duration = Duration::from_secs(5);

/// A layer that not all images accept.
struct Dispute<'p> {
    /// Its position in the chain.
    at: usize,
    /// An image that does not accept what would be shown.
    objector: &'p ImagePlan,
    /// One that does, if any.
    voucher: Option<&'p ImagePlan>,
}

impl Catalog {
    /// See [`super::Layers::agree`].
    pub(super) async fn agree(self: Arc<Self>, question: Question) -> Agreement {
        let Question {
            namespace,
            chain_id,
            shown,
        } = question;
        let bases: Vec<Option<Digest>> = shown.iter().map(|id| id.map(|id| self.beliefs.layer_of(&id))).collect();
        if self.prove(&bases).is_some_and(|proven| proven == chain_id) {
            return Agreement::Shown;
        }
        let mut plans = Vec::new();
        let deadline = Instant::now() + ASK_DEADLINE;
        // First without their sources, which seldom matter, and cost another question.
        for sources in [false, true] {
            plans = match self.ask(&namespace, &chain_id, shown.len(), sources, deadline).await {
                Ok(plans) => plans,
                // By then it is known that they do not agree.
                Err(problem) if sources => return Agreement::Open(problem),
                Err(problem) => {
                    tracing::warn!(
                        namespace,
                        chain_id,
                        problem,
                        "it cannot be told what other images say of these layers"
                    );
                    return Agreement::Shown;
                }
            };
            if self.disputes(&plans, &bases).is_empty() {
                return Agreement::Shown;
            }
        }
        self.settle(&plans, bases).await
    }

    /// The chain id of layers that were found to be certain tars; `None` if that is not known of all of them.
    fn prove(&self, bases: &[Option<Digest>]) -> Option<String> {
        let proof = |base: &Option<Digest>| self.beliefs.get(&(*base)?).filter(|belief| !belief.is_false())?.proof;
        let proofs: Vec<Digest> = bases.iter().map(proof).collect::<Option<_>>()?;
        Some(chain_ids(&proofs).last()?.to_string())
    }

    /// The images that have the chain, of `len` layers.
    async fn ask(
        &self,
        namespace: &str,
        chain_id: &str,
        len: usize,
        sources: bool,
        deadline: Instant,
    ) -> Result<Vec<ImagePlan>, String> {
        let asked = tokio::time::timeout_at(deadline, self.images.with_chain(namespace, chain_id, sources)).await;
        let late = |_| format!("containerd did not answer within {} s", ASK_DEADLINE.as_secs());
        let mut plans = asked.map_err(late)?.map_err(|refusal| refusal.text)?;
        plans.retain(|plan| plan.position(chain_id).is_some_and(|position| position + 1 == len));
        Ok(plans)
    }

    fn disputes<'p>(&self, plans: &'p [ImagePlan], bases: &[Option<Digest>]) -> Vec<Dispute<'p>> {
        let dispute = |(at, base): (usize, &Option<Digest>)| {
            let base = (*base)?;
            let objector = plans.iter().find(|plan| !self.accepts(plan, at, &base))?;
            let voucher = plans.iter().find(|plan| self.accepts(plan, at, &base));
            Some(Dispute { at, objector, voucher })
        };
        bases.iter().enumerate().filter_map(dispute).collect()
    }

    /// Whether an image may be shown this layer in the place of its own one at this position.
    fn accepts(&self, plan: &ImagePlan, at: usize, base: &Digest) -> bool {
        let (Some(planned), Some(belief)) = (plan.layers.get(at), self.beliefs.get(base)) else {
            return false;
        };
        let (spec, origin) = (&planned.spec, plan.origin());
        let (vouched, policy) = (self.loader.vouched(spec, &origin), self.loader.policy());
        belief.ground(spec, &origin, &vouched, policy).is_some() || belief.is_clients_word(policy)
    }

    /// Finds what all accept, for every layer on which they do not agree.
    async fn settle(self: &Arc<Self>, plans: &[ImagePlan], mut bases: Vec<Option<Digest>>) -> Agreement {
        let disputes = self.disputes(plans, &bases);
        let Some(first) = disputes.first() else {
            return Agreement::Shown;
        };
        let open = |dispute: &Dispute<'_>, problem: &str| {
            let voucher = dispute
                .voucher
                .map_or_else(|| "another image".to_owned(), ImagePlan::title);
            let layer = dispute.objector.layers.get(dispute.at);
            Agreement::Open(format!(
                "{} has the same layers as {voucher}, and does not believe the same of layer {}: {problem}",
                dispute.objector.title(),
                layer.map(|layer| layer.spec.digest.to_string()).unwrap_or_default(),
            ))
        };
        tracing::info!(
            disputed = disputes.len(),
            "{:?}",
            open(first, "only what is proven is shown")
        );
        let deadline = Instant::now() + BUILD_DEADLINE;
        let found = disputes.iter().map(|dispute| self.undisputed(plans, dispute.at));
        let found = match tokio::time::timeout_at(deadline, join_all(found)).await {
            Ok(found) => found,
            Err(_) => return open(first, "it is being read as a whole; try again"),
        };
        for (dispute, found) in disputes.iter().zip(found) {
            match (found, bases.get_mut(dispute.at)) {
                (Ok(id), Some(base)) => *base = Some(id),
                (Err(refusal), _) => return open(dispute, &refusal.text),
                (Ok(_), None) => {}
            }
        }
        match self.on_each_other(first.objector, bases).await {
            Ok(stacked) => Agreement::Instead(stacked.ids),
            Err(refusal) => open(first, &refusal.text),
        }
    }

    /// A live layer that every image accepts at a position: one that is there, one that all of them vouch for, or one built from a blob
    /// that one of them has there.
    async fn undisputed(self: &Arc<Self>, plans: &[ImagePlan], at: usize) -> Result<Digest, Refusal> {
        let accepted = |id: &Digest| plans.iter().all(|plan| self.accepts(plan, at, id));
        let layers = || plans.iter().filter_map(|plan| Some((plan, plan.layers.get(at)?)));
        for (_, layer) in layers() {
            let known = self.beliefs.of_blob(&layer.spec.digest);
            let there = known
                .iter()
                .find(|belief| self.read_live().contains_key(&belief.id) && accepted(&belief.id));
            if let Some(belief) = there {
                return Ok(belief.id);
            }
        }
        // What was shown may come from an image that is gone, or from an older version: those that are there may well agree.
        let vouched = |plan: &ImagePlan, spec| self.loader.vouched(spec, &plan.origin());
        let first = layers().next().into_iter().filter(|(plan, layer)| {
            let of_first = vouched(plan, &layer.spec);
            let others = layers().map(|(plan, layer)| vouched(plan, &layer.spec));
            plans.len() == 1 || others.into_iter().all(|ids| of_first.iter().any(|id| ids.contains(id)))
        });
        let tries = first
            .map(|of| (of, How::AsImageSays))
            .chain(layers().map(|of| (of, How::Built)));
        let mut failed = Refusal::unresolved("no image has it", false);
        for ((plan, layer), how) in tries {
            let load = self.begin(Wanted {
                spec: layer.spec.clone(),
                origin: plan.origin(),
                names: plan.name.iter().cloned().collect(),
                how,
                lendable: false,
            });
            match load.wait().await {
                Ok(id) if accepted(&id) => return Ok(id),
                Ok(_) => {
                    failed = Refusal::unresolved("it cannot be told which tar it is; remove one of the images", false)
                }
                Err(refusal) => failed = refusal,
            }
        }
        Err(failed)
    }
}
