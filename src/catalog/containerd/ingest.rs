//! Writing blobs into containerd's content store, and going on where an earlier attempt was ended.
//!
//! containerd keeps what was written of a blob under the *reference* of its writer, verifies the digest when it is committed, and refuses it if it
//! is another: so nothing wrong is ever in the store. One writer has a reference at a time.

use std::collections::HashMap;
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request};

use super::{BlobWriter, CALL_DEADLINE, Containerd, ContainerdError, LEASE_HEADER, NAMESPACE_HEADER, content, header};
use crate::layer::Digest;
use crate::registry::{Body, RegistryError};

/// Pieces of a blob that may wait for containerd to take them.
const WRITES_AHEAD: usize = 8;
/// Bytes in one message, well below what containerd takes.
const MESSAGE: usize = 1 << 20;
/// Longest wait for containerd to take a piece, which it writes to its disk.
const TAKE_DEADLINE: Duration = Duration::from_secs(60);
/// Longest wait for containerd after its last piece: it reads all of the blob once more if it was written in several attempts.
const COMMIT_DEADLINE: Duration = Duration::from_secs(600);

/// A blob that is to be written.
#[derive(Debug, Clone)]
pub struct Ingest<'a> {
    /// The namespace.
    pub namespace: &'a str,
    /// A lease, which keeps what was written until something else refers to it.
    pub lease: &'a str,
    /// Digest of the blob.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Labels that it gets.
    pub labels: HashMap<String, String>,
}

/// What came of an [`Ingest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ingested {
    /// It is written; from which byte on was found out from what an earlier attempt has left.
    Written {
        /// The first byte that was asked for.
        from: u64,
    },
    /// It was there.
    Present,
}

/// Why a blob was not written. What was written of it stays, but for [`IngestError::Corrupt`].
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// containerd failed.
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    /// The source failed.
    #[error(transparent)]
    Source(#[from] RegistryError),
    /// The source sent other bytes.
    #[error("the bytes that came are not those of {digest}")]
    Corrupt {
        /// Digest that they should have.
        digest: Digest,
    },
}

impl Containerd {
    /// Writes a blob whose bytes `read` gives from a range of it on. `arrived` is told how many bytes are there in all.
    ///
    /// # Errors
    /// [`IngestError`].
    pub async fn ingest<F>(
        &self,
        ingest: Ingest<'_>,
        read: impl FnOnce(Range<u64>) -> F,
        arrived: impl Fn(u64),
    ) -> Result<Ingested, IngestError>
    where
        F: Future<Output = Result<Body, RegistryError>>,
    {
        let Ingest {
            namespace,
            lease,
            digest,
            size,
            labels,
        } = ingest;
        let mut writer = BlobWriter::new("lazuli", &digest, size, labels);
        let (sender, messages) = mpsc::channel(WRITES_AHEAD);
        // containerd answers when it knows the writer.
        let _ = sender.send(writer.status()).await;
        let mut request = Request::new(ReceiverStream::new(messages));
        request.metadata_mut().insert(NAMESPACE_HEADER, header(namespace)?);
        request.metadata_mut().insert(LEASE_HEADER, header(lease)?);
        let failed = |status: tonic::Status| self.error(format!("store {digest}"), status);
        let open = async {
            let mut answers = self.content().write(request).await?.into_inner();
            let first = answers.message().await?;
            Ok((answers, first))
        };
        let late = |_| Err(tonic::Status::deadline_exceeded("containerd does not answer"));
        let opened = tokio::time::timeout(CALL_DEADLINE, open).await;
        let (mut answers, from) = match opened.unwrap_or_else(late) {
            Ok((answers, first)) => (
                answers,
                first.map_or(0, |first| u64::try_from(first.offset).unwrap_or(0)),
            ),
            Err(status) if status.code() == Code::AlreadyExists => return Ok(Ingested::Present),
            Err(status) => return Err(failed(status).into()),
        };
        let from = from.min(size);
        writer.go_on_at(from);
        let (arrived, mut there) = (&arrived, from);
        let feed = async move {
            if from < size {
                let mut body = read(from..size).await?;
                while let Some(mut bytes) = body.try_next().await? {
                    while !bytes.is_empty() {
                        let piece: Bytes = bytes.split_to(bytes.len().min(MESSAGE));
                        there += piece.len() as u64;
                        arrived(there);
                        // Without a receiver the call has ended, and its own answer says why. One that takes nothing is no better.
                        let taken = sender.send_timeout(writer.piece(&piece), TAKE_DEADLINE).await;
                        if taken.is_err() {
                            return Ok(());
                        }
                    }
                }
            }
            let _ = sender.send_timeout(writer.commit(), TAKE_DEADLINE).await;
            Ok::<_, RegistryError>(())
        };
        let (fed, ended) = tokio::sync::oneshot::channel::<()>();
        let feed = async move {
            let result = feed.await;
            drop(fed);
            result
        };
        let late = async {
            let _ = ended.await;
            tokio::time::sleep(COMMIT_DEADLINE).await;
        };
        let drain = async {
            tokio::select! {
                drained = answers.by_ref().try_for_each(|_| async { Ok(()) }) => drained,
                () = late => Err(tonic::Status::deadline_exceeded("the blob was not committed in time")),
            }
        };
        let (fed, drained) = tokio::join!(feed, drain);
        fed?;
        match drained {
            Ok(()) => Ok(Ingested::Written { from }),
            Err(status) if status.code() == Code::AlreadyExists => Ok(Ingested::Present),
            // What came is not the blob, or not as long.
            Err(status) if status.code() == Code::FailedPrecondition => {
                self.abort(namespace, &digest).await?;
                Err(IngestError::Corrupt { digest })
            }
            Err(status) => Err(failed(status).into()),
        }
    }

    /// Forgets what was written of a blob.
    async fn abort(&self, namespace: &str, digest: &Digest) -> Result<(), ContainerdError> {
        let reference = BlobWriter::reference("lazuli", digest);
        let request = self.request(namespace, content::AbortRequest { r#ref: reference })?;
        match self.content().abort(request).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::NotFound => Ok(()),
            Err(status) => Err(self.error(format!("forget what it has of {digest}"), status)),
        }
    }
}
