//! Writing blobs into containerd's content store, and going on where an earlier attempt was ended.
//!
//! containerd keeps what was written of a blob under the *reference* of its writer, verifies the digest when it is committed, and refuses it if it
//! is another: so nothing wrong is ever in the store. One writer has a reference at a time; another one waits, or gives up, as it likes.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Request, Status};

use super::{CALL_DEADLINE, Containerd, ContainerdError, LEASE_HEADER, NAMESPACE_HEADER, content, header};
use crate::layer::Digest;
use crate::registry::{Body, RegistryError};

/// Pieces of a blob that may wait for containerd to take them, of at most [`MESSAGE`] bytes.
const WRITES_AHEAD: usize = 4;
/// Bytes in one message, well below what containerd takes.
const MESSAGE: usize = 1 << 20;
/// Longest wait for containerd to take a piece, which it writes to its disk.
const TAKE_DEADLINE: Duration = Duration::from_secs(60);
/// Longest wait for containerd after its last piece: it reads all of the blob once more if it was written in several attempts.
const COMMIT_DEADLINE: Duration = Duration::from_secs(600);

/// Annotation of a descriptor that names it within an image.
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// What containerd says of a reference that another writer has.
const LOCKED: &str = "locked";

/// A blob that is to be written.
#[derive(Debug, Clone)]
pub struct Ingest<'a> {
    /// The namespace.
    pub namespace: &'a str,
    /// A lease, which keeps what was written until something else refers to it.
    pub lease: &'a str,
    /// What its writer is called.
    pub reference: String,
    /// Digest of the blob.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Labels that it gets.
    pub labels: HashMap<String, String>,
}

/// What containerd calls its own writer of a layer's blob.
/// Source: `MakeRefKey` in core/remotes/handlers.go of containerd.
pub fn layer_reference(digest: &Digest, annotations: &BTreeMap<String, String>) -> String {
    match annotations.get(REF_NAME) {
        Some(name) => format!("layer-{name}@{digest}"),
        None => format!("layer-{digest}"),
    }
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
    /// Another writer has its reference.
    #[error("somebody else is writing {digest}")]
    Taken {
        /// Digest of the blob.
        digest: Digest,
    },
    /// The source sent other bytes.
    #[error("the bytes that came are not those of {digest}")]
    Corrupt {
        /// Digest that they should have.
        digest: Digest,
    },
}

/// A blob that is being written: its reference is this writer's until it is dropped, and what was written stays.
pub struct IngestWriter {
    containerd: Containerd,
    namespace: String,
    digest: Digest,
    from: u64,
    messages: BlobWriter,
    sender: mpsc::Sender<content::WriteContentRequest>,
    /// What comes of the call.
    ended: AbortOnDropHandle<Result<(), Status>>,
}

impl Containerd {
    /// Has a blob's reference given to us; `None` if the blob is there.
    ///
    /// # Errors
    /// [`IngestError::Taken`] while somebody else has it, and [`IngestError::Containerd`].
    pub async fn open_ingest(&self, ingest: Ingest<'_>) -> Result<Option<IngestWriter>, IngestError> {
        let Ingest {
            namespace,
            lease,
            reference,
            digest,
            size,
            labels,
        } = ingest;
        let messages = BlobWriter::new(reference, &digest, size, labels);
        let (sender, requests) = mpsc::channel(WRITES_AHEAD);
        // containerd answers when it knows the writer.
        let _ = sender.send(messages.status()).await;
        let mut request = Request::new(ReceiverStream::new(requests));
        request.metadata_mut().insert(NAMESPACE_HEADER, header(namespace)?);
        request.metadata_mut().insert(LEASE_HEADER, header(lease)?);
        let open = async {
            let mut answers = self.content().write(request).await?.into_inner();
            let first = answers.message().await?;
            Ok((answers, first))
        };
        let late = |_| Err(Status::deadline_exceeded("containerd does not answer"));
        let opened = tokio::time::timeout(CALL_DEADLINE, open).await;
        let (mut answers, first) = match opened.unwrap_or_else(late) {
            Ok(opened) => opened,
            Err(status) if status.code() == Code::AlreadyExists => return Ok(None),
            // A containerd that is not there has no word for it.
            Err(status) if status.code() == Code::Unavailable && status.message().contains(LOCKED) => {
                return Err(IngestError::Taken { digest });
            }
            Err(status) => return Err(self.error(format!("store {digest}"), status).into()),
        };
        let from = first.map_or(0, |first| u64::try_from(first.offset).unwrap_or(0));
        // There is an answer to each piece.
        let ended = tokio::spawn(async move { answers.by_ref().try_for_each(|_| async { Ok(()) }).await });
        let mut writer = IngestWriter {
            containerd: self.clone(),
            namespace: namespace.to_owned(),
            digest,
            from: from.min(size),
            messages,
            sender,
            ended: AbortOnDropHandle::new(ended),
        };
        writer.messages.go_on_at(writer.from);
        Ok(Some(writer))
    }

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
        let size = ingest.size;
        let Some(mut writer) = self.open_ingest(ingest).await? else {
            return Ok(Ingested::Present);
        };
        let mut there = writer.from();
        if there < size {
            let mut body = read(there..size).await?;
            'body: while let Some(mut bytes) = body.try_next().await? {
                while !bytes.is_empty() {
                    let piece: Bytes = bytes.split_to(bytes.len().min(MESSAGE));
                    there += piece.len() as u64;
                    arrived(there);
                    if !writer.write(piece).await {
                        break 'body;
                    }
                }
            }
        }
        writer.commit().await
    }

    /// Forgets what was written of a blob.
    async fn abort(&self, namespace: &str, reference: String, digest: &Digest) -> Result<(), ContainerdError> {
        let request = self.request(namespace, content::AbortRequest { r#ref: reference })?;
        match self.content().abort(request).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::NotFound => Ok(()),
            Err(status) => Err(self.error(format!("forget what it has of {digest}"), status)),
        }
    }
}

impl IngestWriter {
    /// The first byte that is missing: an earlier attempt has left those before it.
    pub fn from(&self) -> u64 {
        self.from
    }

    /// The next bytes, at most [`MESSAGE`] of them; false if the call has ended, whose own answer says why ([`IngestWriter::commit`]). A containerd that takes
    /// nothing for long is no better.
    pub async fn write(&mut self, bytes: impl Into<Vec<u8>>) -> bool {
        let piece = self.messages.piece(bytes);
        self.sender.send_timeout(piece, TAKE_DEADLINE).await.is_ok()
    }

    /// What was written is wrong: the next bytes are the first ones.
    pub async fn begin_anew(&mut self) -> bool {
        self.from = 0;
        self.messages.go_on_at(0);
        // containerd empties what it has where something comes at 0, though it be nothing.
        self.write(Vec::new()).await
    }

    /// What was written is wrong, and nothing better comes: comes back when containerd has nothing of it any more.
    pub async fn take_back(mut self) {
        self.begin_anew().await;
        let IngestWriter { sender, ended, .. } = self;
        // The call ends by itself behind that. Dropped before, it would take the message along, and whoever writes next goes on behind what is wrong.
        drop(sender);
        let _ = tokio::time::timeout(TAKE_DEADLINE, ended).await;
    }

    /// The end: containerd compares the digest.
    ///
    /// # Errors
    /// [`IngestError`].
    pub async fn commit(self) -> Result<Ingested, IngestError> {
        let IngestWriter {
            containerd,
            namespace,
            digest,
            from,
            messages,
            sender,
            ended,
        } = self;
        let reference = messages.reference.clone();
        let _ = sender.send_timeout(messages.commit(), TAKE_DEADLINE).await;
        drop(sender);
        let late = || Status::deadline_exceeded("the blob was not committed in time");
        let ended = tokio::time::timeout(COMMIT_DEADLINE, ended).await;
        match ended.unwrap_or_else(|_| Ok(Err(late()))) {
            Ok(Ok(())) => Ok(Ingested::Written { from }),
            Ok(Err(status)) if status.code() == Code::AlreadyExists => Ok(Ingested::Present),
            // What came is not the blob, or not as long.
            Ok(Err(status)) if status.code() == Code::FailedPrecondition => {
                containerd.abort(&namespace, reference, &digest).await?;
                Err(IngestError::Corrupt { digest })
            }
            Ok(Err(status)) => Err(containerd.error(format!("store {digest}"), status).into()),
            Err(_) => {
                let ended = Status::internal("writing it was interrupted");
                Err(containerd.error(format!("store {digest}"), ended).into())
            }
        }
    }
}

/// Makes the messages of one `Content.Write` call: pieces in order, then the commit.
pub struct BlobWriter {
    reference: String,
    expected: String,
    total: i64,
    offset: i64,
    labels: HashMap<String, String>,
}

impl BlobWriter {
    /// Messages for the blob `expected` of `size` bytes, which gets `labels`. `reference` tells writers of the same blob apart.
    pub fn new(reference: String, expected: &Digest, size: u64, labels: HashMap<String, String>) -> Self {
        BlobWriter {
            reference,
            expected: expected.to_string(),
            total: i64::try_from(size).unwrap_or(i64::MAX),
            offset: 0,
            labels,
        }
    }

    /// Asks how much of the blob is there.
    fn status(&self) -> content::WriteContentRequest {
        self.message(content::WriteAction::Stat, Vec::new(), HashMap::new())
    }

    /// The next piece is that at `offset`.
    fn go_on_at(&mut self, offset: u64) {
        self.offset = i64::try_from(offset).unwrap_or(i64::MAX);
    }

    /// The next bytes, well below [`MAX_MESSAGE`] of them.
    pub fn piece(&mut self, bytes: impl Into<Vec<u8>>) -> content::WriteContentRequest {
        let bytes = bytes.into();
        let len = bytes.len() as i64;
        let message = self.message(content::WriteAction::Write, bytes, HashMap::new());
        self.offset += len;
        message
    }

    /// The end: containerd compares the digest.
    pub fn commit(mut self) -> content::WriteContentRequest {
        let labels = std::mem::take(&mut self.labels);
        self.message(content::WriteAction::Commit, Vec::new(), labels)
    }

    fn message(
        &self,
        action: content::WriteAction,
        data: Vec<u8>,
        labels: HashMap<String, String>,
    ) -> content::WriteContentRequest {
        content::WriteContentRequest {
            action: action.into(),
            r#ref: self.reference.clone(),
            total: self.total,
            expected: self.expected.clone(),
            offset: self.offset,
            data,
            labels,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writer_of_a_layer_is_called_what_containerd_calls_it() {
        let digest = Digest::of(b"layer");
        let named = BTreeMap::from([(REF_NAME.to_owned(), "a:1".to_owned())]);
        assert_eq!(layer_reference(&digest, &BTreeMap::new()), format!("layer-{digest}"));
        assert_eq!(layer_reference(&digest, &named), format!("layer-a:1@{digest}"));
    }

    #[test]
    fn a_blob_is_written_in_order_and_labelled_at_the_end() {
        let labels = HashMap::from([("a".to_owned(), "b".to_owned())]);
        let digest = Digest::of(b"hello");
        let mut writer = BlobWriter::new("me".to_owned(), &digest, 5, labels.clone());
        let messages = [
            writer.piece(b"hel".to_vec()),
            writer.piece(b"lo".to_vec()),
            writer.commit(),
        ];
        assert_eq!(messages.each_ref().map(|m| m.offset), [0, 3, 5]);
        assert!(
            messages
                .iter()
                .all(|m| m.total == 5 && m.expected == digest.to_string())
        );
        assert_eq!(messages[2].action(), content::WriteAction::Commit);
        assert_eq!((&messages[0].labels, &messages[2].labels), (&HashMap::new(), &labels));
    }
}
