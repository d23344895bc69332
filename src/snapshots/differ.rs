//! Lazuli as containerd's differ: the diff gRPC service, as far as `Apply` goes.
//!
//! containerd calls it for a layer that it has fetched into its content store, with the mounts of the snapshot that it has prepared for it. If
//! that is one of Lazuli's, the layer is packed and indexed in one pass over the blob, and the snapshot shows it (applied.rs): nothing is unpacked,
//! and the kernel serves it as it serves every other layer.
//!
//! containerd may have been told to use this differ for Lazuli's snapshots alone (`unpack_config`), or as one of a list (`default`). In a list,
//! who does not want a layer says that it is not implemented, and the next one is asked; so it is answered for mounts of others. Where it is
//! the only one, that answer would end the pull. So what belongs to a snapshot of Lazuli's and cannot be shown (an encrypted layer, a format that nobody
//! reads, a tar that Lazuli refuses, a full disk) is given back to containerd's own service, which unpacks it into the same mounts. If
//! its list has this differ too, the layer comes back once more, and then it is not implemented.
//!
//! `Diff` is containerd's own.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use super::again::Again;
use super::applied::{Aim, Target};
use super::rpc::namespace;
use super::{MAX_MESSAGE, Service, SnapshotsError};
use crate::catalog::containerd::Containerd;
use crate::catalog::loader::LayerSpec;
use crate::catalog::{Application, Applied};
use crate::layer::Digest;
use crate::proto::diff::v1::diff_server::{Diff, DiffServer};
use crate::proto::diff::v1::{ApplyRequest, ApplyResponse};
use crate::proto::types::Descriptor;
use crate::sync::caught;

/// Media type of what was applied: an uncompressed tar, as containerd's own differ says.
const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

/// The diff service.
#[derive(Clone)]
pub struct Differ {
    service: Service,
    containerd: Containerd,
    /// Ids of snapshots whose layers were given back to containerd and are being unpacked by it.
    given_back: Arc<Mutex<HashSet<u64>>>,
    /// When another process is to be asked.
    again: Again,
}

/// A snapshot in `given_back`, until it is dropped.
struct GivenBack<'a>(&'a Mutex<HashSet<u64>>, u64);

impl<'a> GivenBack<'a> {
    /// `None` if it is in there already.
    fn enter(all: &'a Mutex<HashSet<u64>>, id: u64) -> Option<Self> {
        let mut entered = all.lock().unwrap_or_else(PoisonError::into_inner);
        entered.insert(id).then(|| GivenBack(all, id))
    }
}

impl Drop for GivenBack<'_> {
    fn drop(&mut self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.1);
    }
}

impl Differ {
    /// The differ for the snapshots of `service`; `containerd` is the one that calls it, and `again` tells when it is to call the next process.
    pub fn new(service: Service, containerd: Containerd, again: Again) -> Self {
        Differ {
            service,
            containerd,
            given_back: Arc::default(),
            again,
        }
    }

    /// The tonic service, to be added to a server.
    pub fn into_server(self) -> DiffServer<Self> {
        DiffServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }

    /// Applies a layer, or has containerd do it; the word says which, for metrics.
    async fn do_apply(
        &self,
        metadata: MetadataMap,
        request: ApplyRequest,
    ) -> Result<(&'static str, ApplyResponse), Status> {
        let mounts = request.mounts.clone();
        let (id, reason, namespace) = match self.service.blocking(move |core| core.aim(&mounts)).await? {
            Aim::Foreign => return Err(not_implemented("these are no mounts of a snapshot of Lazuli's")),
            Aim::Unpack(id, reason) => (id, reason.to_owned(), namespace("", &metadata)),
            Aim::Show(target) => {
                let namespace = namespace(&target.key, &metadata);
                let id = target.id;
                if self.is_given_back(id) {
                    return Err(not_implemented("this layer has to be unpacked"));
                }
                // What containerd unpacks is there in part, and is not begun once more.
                match self.again.unless(self.apply(&namespace, target, &request)).await? {
                    Ok(applied) => return Ok(("packed", applied)),
                    Err(reason) => (id, reason, namespace),
                }
            }
        };
        let Some(_given_back) = GivenBack::enter(&self.given_back, id) else {
            return Err(not_implemented("this layer has to be unpacked"));
        };
        let digest = request
            .diff
            .as_ref()
            .map(|blob| blob.digest.clone())
            .unwrap_or_default();
        tracing::warn!(layer = digest, reason, "is unpacked by containerd's own differ");
        let unpacked = self.containerd.apply(&namespace, request).await?;
        Ok(("unpacked", unpacked))
    }

    fn is_given_back(&self, id: u64) -> bool {
        let given_back = self.given_back.lock().unwrap_or_else(PoisonError::into_inner);
        given_back.contains(&id)
    }

    /// Has the snapshot show the layer, or tells why that cannot be.
    async fn apply(&self, namespace: &str, target: Target, request: &ApplyRequest) -> Result<ApplyResponse, String> {
        let blob = request.diff.clone().unwrap_or_default();
        let spec = LayerSpec {
            digest: blob.digest.parse().map_err(|error| format!("its digest: {error}"))?,
            size: u64::try_from(blob.size).map_err(|_| format!("it has {} bytes", blob.size))?,
            media_type: blob.media_type,
            annotations: blob.annotations.into_iter().collect(),
            foreign: false,
            diff_id: None,
        };
        let application = Application {
            namespace: namespace.to_owned(),
            chain_id: target.chain_id.clone(),
            spec,
            below: target.below.clone(),
        };
        // A release under way does not know of the layer yet.
        let making = self.service.making.enter();
        let applied = self.service.layers.apply(application).await;
        let applied = applied.map_err(|refusal| refusal.text)?;
        let answer = answer(&applied);
        let shown = self.service.writing(move |core| {
            let shown = core.show_applied(&target, &applied);
            drop(making);
            shown
        });
        shown.await.map_err(|error| error.to_string())?;
        Ok(answer)
    }
}

fn answer(applied: &Applied) -> ApplyResponse {
    let tar: &Digest = &applied.tar;
    ApplyResponse {
        applied: Some(Descriptor {
            media_type: TAR.to_owned(),
            digest: tar.to_string(),
            size: i64::try_from(applied.tar_size).unwrap_or(i64::MAX),
            ..Descriptor::default()
        }),
    }
}

/// What containerd goes on to the next differ for; it knows the class by the code.
fn not_implemented(why: &str) -> Status {
    Status::unimplemented(format!("{why}: not implemented"))
}

#[tonic::async_trait]
impl Diff for Differ {
    async fn apply(&self, request: Request<ApplyRequest>) -> Result<Response<ApplyResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let timer = self.service.metrics.apply_seconds.start_timer();
        let result = caught(self.do_apply(metadata, request)).await;
        let result = result.unwrap_or_else(|_| Err(SnapshotsError::Panicked { rpc: "Apply" }.into()));
        let outcome = match &result {
            Ok((word, _)) => word,
            Err(status) if status.code() == tonic::Code::Unimplemented => "declined",
            Err(status) if Again::is_meant(status) => {
                tracing::info!("a layer is left to the next process, which containerd asks by itself");
                "again"
            }
            Err(status) => {
                tracing::error!(%status, "a layer was not applied");
                "failed"
            }
        };
        match outcome {
            "packed" => drop(timer.stop_and_record()),
            _ => drop(timer.stop_and_discard()),
        }
        self.service
            .metrics
            .applied_layers_total
            .with_label_values(&[outcome])
            .inc();
        result.map(|(_, answer)| Response::new(answer))
    }
}
