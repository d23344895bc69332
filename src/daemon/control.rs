//! Lazuli's own service beside containerd's: what its command line asks the daemon.

use std::sync::Arc;

use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::catalog::Catalog;
use crate::catalog::complete::{CompleteError, Step};
use crate::layer::Digest;
use crate::proto::control::control_server::Control;
use crate::proto::control::{
    CompleteRequest, CompleteResponse, PushTracesRequest, PushTracesResponse, RemoveTracesRequest,
    RemoveTracesResponse, StatusRequest, StatusResponse, TracesRequest, TracesResponse,
};
use crate::registry::causes;
use crate::sync::blocking;

/// Messages about progress that may wait for a client.
const PROGRESS_AHEAD: usize = 64;

/// A manifest that is meant; `None`: all.
fn manifest(text: &str) -> Result<Option<Digest>, Status> {
    match text {
        "" => Ok(None),
        text => text
            .parse()
            .map(Some)
            .map_err(|error| Status::invalid_argument(format!("{text:?}: {error}"))),
    }
}

/// Lazuli's own service on containerd's socket.
pub(super) struct ControlService(pub Arc<Catalog>);

#[tonic::async_trait]
impl Control for ControlService {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let catalog = Arc::clone(&self.0);
        catalog.look_at_completeness().await;
        let json = blocking(move || catalog.status_json()).await;
        Ok(Response::new(StatusResponse { json }))
    }

    async fn traces(&self, request: Request<TracesRequest>) -> Result<Response<TracesResponse>, Status> {
        let (catalog, request) = (Arc::clone(&self.0), request.into_inner());
        let manifest = manifest(&request.manifest)?;
        let learned = blocking(move || catalog.learned(&request.repository, manifest.as_ref(), request.reads)).await;
        let learned = learned.map_err(|error| Status::unavailable(error.to_string()))?;
        let json = serde_json::to_string(&learned).map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(TracesResponse { json }))
    }

    async fn push_traces(&self, request: Request<PushTracesRequest>) -> Result<Response<PushTracesResponse>, Status> {
        let request = request.into_inner();
        let manifest = manifest(&request.manifest)?;
        // It is finished even if the client goes away.
        let catalog = Arc::clone(&self.0);
        let pushed = tokio::spawn(async move { catalog.push_traces(&request.repository, manifest).await }).await;
        match pushed.map_err(|error| Status::internal(error.to_string()))? {
            Ok(pushed) => Ok(Response::new(PushTracesResponse { pushed: pushed as u64 })),
            Err(error) => Err(Status::failed_precondition(causes(&error))),
        }
    }

    async fn remove_traces(
        &self,
        request: Request<RemoveTracesRequest>,
    ) -> Result<Response<RemoveTracesResponse>, Status> {
        let (catalog, request) = (Arc::clone(&self.0), request.into_inner());
        let manifest = manifest(&request.manifest)?;
        let removed = blocking(move || catalog.forget_learned(&request.repository, manifest.as_ref())).await;
        let removed = removed.map_err(|error| Status::unavailable(error.to_string()))? as u64;
        Ok(Response::new(RemoveTracesResponse { removed }))
    }

    type CompleteStream = ReceiverStream<Result<CompleteResponse, Status>>;

    /// The work ends with the stream: a client that goes away does not want it any more.
    async fn complete(&self, request: Request<CompleteRequest>) -> Result<Response<Self::CompleteStream>, Status> {
        let CompleteRequest { namespace, image } = request.into_inner();
        let catalog = Arc::clone(&self.0);
        let (sender, answers) = tokio::sync::mpsc::channel(PROGRESS_AHEAD);
        tokio::spawn(async move {
            let told = |step: Step| {
                // Who does not read them misses some.
                let _ = sender.try_send(Ok(match step {
                    Step::Waits => CompleteResponse {
                        waits: true,
                        ..CompleteResponse::default()
                    },
                    Step::Writes { layer, done, total } => CompleteResponse {
                        layer: layer.to_string(),
                        done,
                        total,
                        ..CompleteResponse::default()
                    },
                }));
            };
            let ended = tokio::select! {
                ended = catalog.complete(&namespace, &image, &told) => ended,
                () = sender.closed() => return,
            };
            let answer = match ended {
                Ok(completed) => Ok(CompleteResponse {
                    layers: completed.layers,
                    written: completed.written,
                    bytes: completed.bytes,
                    is_complete: true,
                    ..CompleteResponse::default()
                }),
                Err(error @ CompleteError::NoImage { .. }) => Err(Status::not_found(error.to_string())),
                Err(error) => Err(Status::unavailable(error.to_string())),
            };
            let _ = sender.send(answer).await;
        });
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}
