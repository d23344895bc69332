//! containerd's content store as a place to get a layer from.
//!
//! A blob that containerd has (it was pulled for another snapshotter, imported, pre-baked into the node's image, or containerd has just fetched
//! it with credentials that Lazuli never sees) need not come over the network. So every layer has one more source, behind its repositories;
//! where containerd is known to have the blob it comes first ([`Standings`](super::Standings)). What it has goes when its images go: then the source fails like any
//! other, and the next one goes on, in the middle of a body too.
//!
//! A content store has namespaces, each with its own list of what is one store of files. A blob is looked for in all of them: its bytes are
//! verified by digest, whoever had them fetched.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, stream};
use tonic::{Code, Streaming};

use super::containerd::{CALL_DEADLINE, Containerd, ContainerdError};
use crate::layer::Digest;
use crate::proto::content::v1::ReadContentResponse;
use crate::registry::{Blob, Body, Origin, RegistryError};

/// What this source is called where others are called by their hosts: no registry has a name without a dot or a port, but for `localhost`.
pub(super) const HOST: &str = "containerd";

/// Longest wait for containerd to tell whether it has a blob, where there are other ways: it answers within a millisecond.
const LOCATE_DEADLINE: Duration = Duration::from_secs(2);

/// The content store of one containerd. Cheap to clone.
#[derive(Clone)]
pub(super) struct ContentStore(Containerd);

/// A blob that containerd has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Located {
    /// A namespace in which it is.
    pub namespace: String,
    /// What containerd says of it there, such as where it came from.
    pub labels: HashMap<String, String>,
}

impl ContentStore {
    pub(super) fn new(containerd: Containerd) -> Self {
        ContentStore(containerd)
    }

    /// The containerd whose store it is.
    pub(super) fn containerd(&self) -> &Containerd {
        &self.0
    }

    /// The origin of all its blobs.
    pub(super) fn origin() -> Origin {
        Origin::new(HOST, "")
    }

    /// A handle on a blob, whether it is there or not; `alone` if it can be had nowhere else. Asks nobody yet.
    pub(super) fn blob(&self, digest: Digest, size: u64, alone: bool) -> Arc<dyn Blob> {
        Arc::new(ContentBlob {
            store: self.clone(),
            digest,
            size,
            alone,
            namespace: Mutex::default(),
        })
    }

    /// Where a blob is, if it is there and has `size` bytes; that containerd does not answer in time is no error.
    pub(super) async fn locate(&self, digest: &Digest, size: u64) -> Option<Located> {
        let found = tokio::time::timeout(LOCATE_DEADLINE, self.find(digest, size)).await;
        match found {
            Ok(Ok(located)) => located,
            Ok(Err(error)) => {
                tracing::debug!(%digest, %error, "it is not known whether containerd has it");
                None
            }
            Err(_) => None,
        }
    }

    async fn find(&self, digest: &Digest, size: u64) -> Result<Option<Located>, ContainerdError> {
        for namespace in self.0.namespaces().await? {
            if let Some(info) = self.0.info(&namespace, digest).await?
                && info.size == size
            {
                let labels = info.labels;
                return Ok(Some(Located { namespace, labels }));
            }
        }
        Ok(None)
    }
}

/// One blob, whether it is there or not.
struct ContentBlob {
    store: ContentStore,
    digest: Digest,
    size: u64,
    /// Whether no other place is known.
    alone: bool,
    /// Where it was seen last.
    namespace: Mutex<Option<String>>,
}

impl ContentBlob {
    fn seen_in(&self) -> Option<String> {
        self.namespace.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note(&self, namespace: Option<String>) {
        *self.namespace.lock().unwrap_or_else(PoisonError::into_inner) = namespace;
    }

    async fn open(&self, range: Range<u64>) -> Result<Body, RegistryError> {
        if let Some(namespace) = self.seen_in() {
            match self.read_in(&namespace, range.clone()).await {
                // It may be in another one still.
                Err(RegistryError::NotFound { .. }) => self.note(None),
                opened => return opened,
            }
        }
        let found = match self.store.find(&self.digest, self.size).await {
            Ok(found) => found,
            Err(error) if self.alone => return Err(of_containerd(&error, &self.digest)),
            // Nobody says that it is there. Others are not to be waited for because of that.
            Err(error) => {
                tracing::debug!(digest = %self.digest, %error, "it is not known whether containerd has it");
                None
            }
        };
        let Some(located) = found else {
            return Err(not_found(&self.digest));
        };
        self.note(Some(located.namespace.clone()));
        self.read_in(&located.namespace, range).await
    }

    async fn read_in(&self, namespace: &str, range: Range<u64>) -> Result<Body, RegistryError> {
        let wanted = range.end.saturating_sub(range.start);
        let open = async {
            let opened = self.store.0.blob(namespace, &self.digest, range.start, wanted).await;
            let messages = opened.map_err(|error| of_containerd(&error, &self.digest))?;
            let mut arriving = Arriving {
                containerd: self.store.0.clone(),
                digest: self.digest,
                messages,
                left: wanted,
            };
            // containerd looks for the blob when its first bytes are asked for.
            let first = arriving.next().await.transpose()?;
            Ok((arriving, first))
        };
        let opened = tokio::time::timeout(CALL_DEADLINE, open).await;
        let (arriving, first) = opened.unwrap_or_else(|_| {
            Err(RegistryError::Unreachable {
                host: HOST.to_owned(),
                what: format!("no answer within {} s", CALL_DEADLINE.as_secs()),
            })
        })?;
        let rest = stream::unfold(Some(arriving), |arriving| async move {
            let mut arriving = arriving?;
            let piece = arriving.next().await?;
            let goes_on = piece.is_ok();
            Some((piece, goes_on.then_some(arriving)))
        });
        Ok(stream::iter(first.map(Ok)).chain(rest).boxed())
    }
}

/// What is being read of a blob.
struct Arriving {
    containerd: Containerd,
    digest: Digest,
    messages: Streaming<ReadContentResponse>,
    /// Bytes that are still to come.
    left: u64,
}

impl Arriving {
    async fn next(&mut self) -> Option<Result<Bytes, RegistryError>> {
        match self.messages.message().await {
            Ok(Some(message)) => {
                let mut bytes = Bytes::from(message.data);
                // Never more than was asked for.
                bytes.truncate(usize::try_from(self.left).unwrap_or(usize::MAX));
                self.left -= bytes.len() as u64;
                Some(Ok(bytes))
            }
            Ok(None) if self.left == 0 => None,
            Ok(None) => Some(Err(RegistryError::Protocol {
                host: HOST.to_owned(),
                what: self.digest.to_string(),
                problem: format!("its copy ended {} bytes too early", self.left),
            })),
            Err(status) => {
                let error = self.containerd.error(format!("read {}", self.digest), status);
                Some(Err(of_containerd(&error, &self.digest)))
            }
        }
    }
}

impl Blob for ContentBlob {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        self.open(range).boxed()
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn describe(&self) -> String {
        format!("containerd's content store ({})", self.digest)
    }

    fn origin(&self) -> Origin {
        ContentStore::origin()
    }
}

fn not_found(digest: &Digest) -> RegistryError {
    RegistryError::NotFound {
        host: HOST.to_owned(),
        what: digest.to_string(),
    }
}

fn of_containerd(error: &ContainerdError, digest: &Digest) -> RegistryError {
    match error.code() {
        Some(Code::NotFound) => not_found(digest),
        _ => RegistryError::Unreachable {
            host: HOST.to_owned(),
            what: error.to_string(),
        },
    }
}
