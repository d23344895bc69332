//! The ten RPCs: messages in, messages out; what blocks goes to a thread where it may.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::stream::{self, BoxStream};
use prost::Message as _;
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Response, Status};

use super::core::{Core, Doubt, Outcome, Resolved};
use super::making::{Begun, Instead, Wanted};
use super::rules::{self, REF_LABEL};
use super::{Service, SnapshotsError};
use crate::catalog::{Agreement, LayerRequest, Question, Resolution};
use crate::layer::Digest;
use crate::proto::snapshots::v1::snapshots_server::Snapshots;
use crate::proto::snapshots::v1::{
    CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, ListSnapshotsResponse, MountsRequest,
    MountsResponse, PrepareSnapshotRequest, PrepareSnapshotResponse, RemoveSnapshotRequest, StatSnapshotRequest,
    StatSnapshotResponse, UpdateSnapshotRequest, UpdateSnapshotResponse, UsageRequest, UsageResponse,
    ViewSnapshotRequest, ViewSnapshotResponse,
};
use crate::proto::types::Mount;
use crate::store::Kind;
use crate::sync::caught;

/// Most snapshots in one message of a list, as containerd's own server does it.
const LIST_BATCH: usize = 100;

/// Size in bytes from which on a message of a list takes no more snapshots: labels may be large, and a message may have
/// 16 MiB.
const LIST_BATCH_BYTES: usize = 1 << 20;

/// How often a layer that was released right after it was resolved is resolved anew. Each time takes a release just in
/// between.
const PUBLISH_ATTEMPTS: usize = 3;

/// How long nothing is let go of after a removal: removals come in bursts, and a container that ended is often started again at once, on
/// what is mounted for it.
const RELEASE_DELAY: Duration = Duration::from_secs(3);

/// Header with the namespace, which not every client and version sends.
const NAMESPACE_HEADER: &str = "containerd-namespace";

/// containerd's own default.
const DEFAULT_NAMESPACE: &str = "default";

/// A snapshot of which its client has not been told. Dropped as it is, the snapshot is taken back.
struct Unanswered {
    service: Service,
    /// Its key and id; `None` once it is answered.
    snapshot: Option<(String, u64)>,
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        if let (Some((key, id)), Ok(runtime)) = (self.snapshot.take(), tokio::runtime::Handle::try_current()) {
            runtime.spawn(self.service.clone().take_back(key, id));
        }
    }
}

impl Service {
    /// Runs what blocks on a thread where it may. It is finished even if the client goes away.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Core) -> Result<T, SnapshotsError> + Send + 'static,
    ) -> Result<T, SnapshotsError> {
        let core = Arc::clone(&self.core);
        tokio::task::spawn_blocking(move || work(&core)).await?
    }

    /// The same for what may wait for a commit: on a slow disk it leaves threads for reads, of snapshots and of layers.
    pub(super) async fn writing<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Core) -> Result<T, SnapshotsError> + Send + 'static,
    ) -> Result<T, SnapshotsError> {
        // The semaphore is never closed. The permit goes with the work.
        let permit = Arc::clone(&self.writers).acquire_owned().await.ok();
        self.blocking(move |core| {
            let result = work(core);
            drop(permit);
            result
        })
        .await
    }

    /// Counts and times an RPC, and turns its error into a status; a panic in it is one too, or the client would wait for an answer on a stream
    /// that is reset without a reason.
    async fn answer<T>(
        &self,
        rpc: &'static str,
        work: impl Future<Output = Result<T, SnapshotsError>>,
    ) -> Result<Response<T>, Status> {
        let timer = self.metrics.rpc_seconds.with_label_values(&[rpc]).start_timer();
        let result = caught(work).await.unwrap_or(Err(SnapshotsError::Panicked { rpc }));
        timer.observe_duration();
        let code = result.as_ref().err().map_or(Code::Ok, SnapshotsError::code);
        self.metrics
            .rpc_total
            .with_label_values(&[rpc, &format!("{code:?}")])
            .inc();
        match &result {
            Err(error) if matches!(code, Code::Internal | Code::DataLoss | Code::ResourceExhausted) => {
                tracing::error!(rpc, %error, "a snapshots request failed");
            }
            Err(error) => tracing::debug!(rpc, %error, "a snapshots request was refused"),
            Ok(_) => tracing::trace!(rpc, "a snapshots request was answered"),
        }
        Ok(Response::new(result?))
    }

    async fn do_prepare(
        &self,
        metadata: MetadataMap,
        request: PrepareSnapshotRequest,
    ) -> Result<PrepareSnapshotResponse, SnapshotsError> {
        let chain_id = request.labels.get(REF_LABEL).filter(|chain_id| !chain_id.is_empty());
        let asked_for = chain_id.cloned();
        if let Some(chain_id) = asked_for.clone()
            && let Some(name) = self.prepare_remote(&metadata, &request, &chain_id).await?
        {
            self.handover.answer(&request.parent, &chain_id, &name).await;
            return Err(SnapshotsError::TargetExists { chain_id, name });
        }
        let PrepareSnapshotRequest {
            key, parent, labels, ..
        } = request;
        let namespace = namespace(&key, &metadata);
        let wanted = Wanted {
            kind: Kind::Active,
            key,
            parent,
            labels,
            // What containerd unpacks a layer on is shown to nobody.
            instead: match asked_for {
                Some(_) => Instead::Asked(None),
                None => Instead::Ask,
            },
        };
        let mounts = self.create(namespace, wanted).await?;
        Ok(PrepareSnapshotResponse { mounts })
    }

    /// What something is shown instead of what the snapshots below it show; `None` if it is that.
    async fn agreed(&self, namespace: String, doubt: Doubt) -> Result<Option<Vec<Option<Digest>>>, SnapshotsError> {
        let question = Question {
            namespace,
            chain_id: doubt.chain_id,
            shown: doubt.shown,
        };
        match self.layers.agree(question).await {
            Agreement::Shown => Ok(None),
            Agreement::Instead(mut shown) => {
                shown.extend(doubt.above);
                Ok(Some(shown))
            }
            Agreement::Open(problem) => Err(SnapshotsError::Disagreement { problem }),
        }
    }

    /// Makes a local snapshot.
    async fn create(&self, namespace: String, mut wanted: Wanted) -> Result<Vec<Mount>, SnapshotsError> {
        loop {
            // It goes with the work, which goes on if this future is dropped.
            let (making, again) = (self.making.enter(), wanted.clone());
            let (begun, making) = self.writing(move |core| Ok((core.begin(wanted)?, making))).await?;
            match begun {
                Begun::Made(made) => {
                    // It is finished even if the client goes away, and taken back then.
                    let service = self.clone();
                    let recording = tokio::spawn(async move {
                        let recorded = service.core.record(*made).await;
                        drop(making);
                        let (id, mounts) = recorded?;
                        let unanswered = Unanswered {
                            service,
                            snapshot: Some((again.key, id)),
                        };
                        Ok::<_, SnapshotsError>((mounts, unanswered))
                    });
                    let (mounts, mut unanswered) = recording.await??;
                    unanswered.snapshot = None;
                    return Ok(mounts);
                }
                Begun::Doubtful(doubt) => {
                    drop(making);
                    wanted = Wanted {
                        instead: Instead::Asked(self.agreed(namespace.clone(), doubt).await?),
                        ..again
                    };
                }
            }
        }
    }

    /// The name of the committed snapshot of a layer that Lazuli serves; `None` if containerd has to unpack it.
    async fn prepare_remote(
        &self,
        metadata: &MetadataMap,
        request: &PrepareSnapshotRequest,
        chain_id: &str,
    ) -> Result<Option<String>, SnapshotsError> {
        let (key, parent) = (request.key.clone(), request.parent.clone());
        rules::check_not_rebased(chain_id, &parent, &request.labels, 0)?;
        let known = self.blocking(move |core| {
            core.check_new(&key, &parent)?;
            Ok((core.remote_below(&parent)?, core.unpacking()))
        });
        let (below, unpacking) = known.await?;
        let mut refusal = "it was released again and again".to_owned();
        for _ in 0..PUBLISH_ATTEMPTS {
            let wish = LayerRequest {
                namespace: namespace(&request.key, metadata),
                chain_id: chain_id.to_owned(),
                labels: request.labels.clone(),
                below: below.clone(),
                unpacking: unpacking.clone(),
            };
            let (resolved, is_top) = match self.layers.resolve(wish).await {
                Resolution::Live {
                    layer,
                    below,
                    proven,
                    is_top,
                } => (Resolved { layer, below, proven }, is_top),
                Resolution::Refused(reason) => {
                    refusal = reason;
                    break;
                }
            };
            rules::check_not_rebased(chain_id, &request.parent, &request.labels, resolved.below.len())?;
            let (parent, chain_id, labels) = (request.parent.clone(), chain_id.to_owned(), request.labels.clone());
            // It goes with the work, which goes on if this future is dropped.
            let making = self.making.enter();
            let published = self.writing(move |core| {
                let published = core.publish(&parent, &chain_id, labels, resolved);
                drop(making);
                let published = published?;
                if let (Outcome::Named(name), true) = (&published, is_top)
                    && let Err(error) = core.expect(name)
                {
                    tracing::warn!(%error, name, "layers are not merged ahead");
                }
                Ok(published)
            });
            match published.await? {
                Outcome::Named(name) => return Ok(Some(name)),
                Outcome::Gone => {}
                Outcome::Refused(reason) => {
                    refusal = reason;
                    break;
                }
            }
        }
        let (parent, wanted) = (request.parent.clone(), chain_id.to_owned());
        if let Some(name) = self.blocking(move |core| core.published(&parent, &wanted)).await? {
            tracing::debug!(
                chain_id,
                reason = refusal,
                "a layer could not be resolved, but is live already"
            );
            return Ok(Some(name));
        }
        tracing::info!(
            key = request.key,
            chain_id,
            reason = refusal,
            "a layer is left to containerd"
        );
        Ok(None)
    }

    /// Lets go of layers and mounts that no snapshot needs, in the background, after a while.
    pub(super) fn release_layers(&self, after: Duration) {
        if self.release_due.swap(true, Ordering::AcqRel) {
            return;
        }
        let service = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            // One at a time; nobody else waits for it.
            let _turn = service.letting_go.lock().await;
            // What is removed from here on needs another release.
            service.release_due.store(false, Ordering::Release);
            // In this order: whatever is given out to those who are not waited for comes after the mark.
            let mark = service.layers.mark();
            service.making.advance().await;
            let released = match service.blocking(Core::needed).await {
                Ok(needed) => service.layers.retain(needed, mark).await,
                Err(error) => return tracing::error!(%error, "layers without snapshots are not released"),
            };
            if let Err(error) = tokio::task::spawn_blocking(released).await {
                tracing::error!(%error, "releasing layers was interrupted");
            }
        });
    }

    async fn do_remove(&self, key: String) -> Result<(), SnapshotsError> {
        // It is finished even if the client goes away: its directory would stay.
        let service = self.clone();
        let removing = tokio::spawn(async move {
            let record = service.core.remove_record(&key).await?;
            service.layers.removed(&key);
            service.writing(move |core| Ok(core.discard(&key, &record))).await
        });
        if removing.await?? {
            self.release_layers(RELEASE_DELAY);
        }
        Ok(())
    }

    /// Removes a snapshot whose client went away before it was told of it: containerd would find out with its next collection of garbage, and until
    /// then it looks as if a layer were being unpacked, or a container started.
    async fn take_back(self, key: String, id: u64) {
        let removed = match self.core.remove_record_of(&key, id).await {
            Ok(Some(record)) => {
                self.layers.removed(&key);
                let name = key.clone();
                let discarded = self.writing(move |core| Ok(core.discard(&name, &record)));
                discarded.await.map(Some)
            }
            Ok(None) => Ok(None),
            Err(error) => Err(error),
        };
        match removed {
            Ok(Some(releases)) => {
                tracing::info!(
                    key,
                    "a snapshot is taken back: its client went away before it was answered"
                );
                if releases {
                    self.release_layers(RELEASE_DELAY);
                }
            }
            // Somebody was quicker.
            Ok(None) => {}
            Err(error) => tracing::warn!(key, %error, "a snapshot that nobody was told of stays"),
        }
    }

    async fn do_usage(&self, key: String) -> Result<UsageResponse, SnapshotsError> {
        // The semaphore is never closed.
        let permit = Arc::clone(&self.measuring).acquire_owned().await.ok();
        let usage = self.blocking(move |core| {
            let usage = core.usage(&key);
            drop(permit);
            usage
        });
        let usage = usage.await?;
        Ok(UsageResponse {
            size: i64::try_from(usage.bytes).unwrap_or(i64::MAX),
            inodes: i64::try_from(usage.inodes).unwrap_or(i64::MAX),
        })
    }
}

/// The namespace of a request: keys come as `<namespace>/<number>/<key>`, and the header is missing on some paths.
pub(super) fn namespace(key: &str, metadata: &MetadataMap) -> String {
    let mut parts = key.splitn(3, '/');
    if let (Some(namespace), Some(number), Some(_)) = (parts.next(), parts.next(), parts.next())
        && !namespace.is_empty()
        && number.parse::<u64>().is_ok()
    {
        return namespace.to_owned();
    }
    let header = metadata.get(NAMESPACE_HEADER).and_then(|value| value.to_str().ok());
    header.unwrap_or(DEFAULT_NAMESPACE).to_owned()
}

/// Messages of a list.
fn batches(infos: Vec<Info>) -> impl Iterator<Item = ListSnapshotsResponse> {
    let mut infos = infos.into_iter().peekable();
    std::iter::from_fn(move || {
        let mut batch = Vec::new();
        let mut bytes = 0;
        while batch.len() < LIST_BATCH
            && bytes < LIST_BATCH_BYTES
            && let Some(info) = infos.next()
        {
            bytes += info.encoded_len();
            batch.push(info);
        }
        (!batch.is_empty()).then_some(ListSnapshotsResponse { info: batch })
    })
}

#[tonic::async_trait]
impl Snapshots for Service {
    type ListStream = BoxStream<'static, Result<ListSnapshotsResponse, Status>>;

    async fn prepare(
        &self,
        request: Request<PrepareSnapshotRequest>,
    ) -> Result<Response<PrepareSnapshotResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        self.answer("Prepare", self.do_prepare(metadata, request)).await
    }

    async fn view(&self, request: Request<ViewSnapshotRequest>) -> Result<Response<ViewSnapshotResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let ViewSnapshotRequest {
            key, parent, labels, ..
        } = request;
        let namespace = namespace(&key, &metadata);
        let wanted = Wanted {
            kind: Kind::View,
            key,
            parent,
            labels,
            instead: Instead::Ask,
        };
        let work = async {
            let mounts = self.create(namespace, wanted).await?;
            Ok(ViewSnapshotResponse { mounts })
        };
        self.answer("View", work).await
    }

    async fn mounts(&self, request: Request<MountsRequest>) -> Result<Response<MountsResponse>, Status> {
        let key = request.into_inner().key;
        let work = async {
            // Something may be mounted, of which a release under way does not know yet.
            let making = self.making.enter();
            self.blocking(move |core| {
                let mounts = core.mounts(&key);
                drop(making);
                Ok(MountsResponse { mounts: mounts? })
            })
            .await
        };
        self.answer("Mounts", work).await
    }

    async fn commit(&self, request: Request<CommitSnapshotRequest>) -> Result<Response<()>, Status> {
        let request = request.into_inner();
        let work = self.writing(move |core| core.commit(&request.name, &request.key, &request.parent, request.labels));
        self.answer("Commit", work).await
    }

    async fn remove(&self, request: Request<RemoveSnapshotRequest>) -> Result<Response<()>, Status> {
        self.answer("Remove", self.do_remove(request.into_inner().key)).await
    }

    async fn stat(&self, request: Request<StatSnapshotRequest>) -> Result<Response<StatSnapshotResponse>, Status> {
        let key = request.into_inner().key;
        let work = self.blocking(move |core| {
            let info = core.stat(&key)?;
            Ok(StatSnapshotResponse { info: Some(info) })
        });
        self.answer("Stat", work).await
    }

    async fn update(
        &self,
        request: Request<UpdateSnapshotRequest>,
    ) -> Result<Response<UpdateSnapshotResponse>, Status> {
        let UpdateSnapshotRequest { info, update_mask, .. } = request.into_inner();
        // Of the info only name and labels mean anything: containerd leaves junk in the other fields.
        let info = info.unwrap_or_default();
        let paths = update_mask.unwrap_or_default().paths;
        let work = self.writing(move |core| {
            let info = core.update(&info.name, info.labels, &paths)?;
            Ok(UpdateSnapshotResponse { info: Some(info) })
        });
        self.answer("Update", work).await
    }

    async fn list(&self, request: Request<ListSnapshotsRequest>) -> Result<Response<Self::ListStream>, Status> {
        let filters = request.into_inner().filters;
        // All matching snapshots of one moment; nothing is locked while the client reads them.
        let work = async {
            let handover = Arc::clone(&self.handover);
            let infos = self.blocking(move |core| core.list(&filters, &handover)).await?;
            let stream: Self::ListStream = Box::pin(stream::iter(batches(infos).map(Ok)));
            Ok(stream)
        };
        self.answer("List", work).await
    }

    async fn usage(&self, request: Request<UsageRequest>) -> Result<Response<UsageResponse>, Status> {
        self.answer("Usage", self.do_usage(request.into_inner().key)).await
    }

    async fn cleanup(&self, _: Request<CleanupRequest>) -> Result<Response<()>, Status> {
        self.answer("Cleanup", self.blocking(Core::cleanup)).await
    }
}
