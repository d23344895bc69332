//! Lazuli's own service beside containerd's: what its command line asks the daemon.

use std::sync::Arc;

use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::catalog::Catalog;
use crate::catalog::complete::{CompleteError, Step};
use crate::proto::control::control_server::Control;
use crate::proto::control::{CompleteRequest, CompleteResponse, StatusRequest, StatusResponse};
use crate::sync::blocking;

/// Messages about progress that may wait for a client.
const PROGRESS_AHEAD: usize = 64;

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

    type CompleteStream = ReceiverStream<Result<CompleteResponse, Status>>;

    /// The work ends with the stream: a client that goes away does not want it any more.
    async fn complete(&self, request: Request<CompleteRequest>) -> Result<Response<Self::CompleteStream>, Status> {
        let CompleteRequest { namespace, image } = request.into_inner();
        let catalog = Arc::clone(&self.0);
        let (sender, answers) = tokio::sync::mpsc::channel(PROGRESS_AHEAD);
        tokio::spawn(async move {
            let told = |step: Step| {
                // Who does not read them misses some.
                let _ = sender.try_send(Ok(CompleteResponse {
                    layer: step.layer.to_string(),
                    done: step.done,
                    total: step.total,
                    ..CompleteResponse::default()
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
