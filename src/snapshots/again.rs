//! Calls that are to be made once more, of the process that goes on.
//!
//! While one process answers its last calls, the next one does not answer yet; so these calls have to end soon. Applying a layer may take
//! minutes, and for containerd an error is the end of the pull. But a call that its server refuses before it has worked on it is made once more by
//! gRPC itself (RST_STREAM with REFUSED_STREAM, RFC 9113, section 8.7), on the next connection, which waits in the listening socket until the next process
//! accepts it. A layer that is being applied may say so: nothing of it is to be seen before it is done, and the next process finds the snapshot and the
//! blob as this one did. The second time, gRPC gives the error to its caller: so whoever is refused twice has lost his pull.
//!
//! A handler answers with [`Again::status`], which [`Again::refuse`] finds on its way out.

use std::convert::Infallible;
use std::future;
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use http::Response;
use tonic::Status;
use tonic::metadata::MetadataValue;

/// Header by which the answer is known; it never leaves the process.
const MARK: &str = "lazuli-again";
/// How long what has begun may go on before it is refused: most layers need less, and everybody else waits meanwhile.
const GRACE: Duration = Duration::from_secs(1);

/// Tells when calls are to be made of the next process.
#[derive(Clone)]
pub struct Again(Shared<BoxFuture<'static, ()>>);

/// An answer that resets the stream.
#[derive(Debug, thiserror::Error)]
#[error("the next process is to be asked")]
pub struct Refused(#[source] h2::Error);

impl From<Infallible> for Refused {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

impl Again {
    /// Calls are to be made once more from a moment after `hand_over` on.
    pub fn after(hand_over: impl Future<Output = ()> + Send + 'static) -> Self {
        Again(hand_over.then(|()| tokio::time::sleep(GRACE)).boxed().shared())
    }

    /// They never are.
    pub fn never() -> Self {
        Again(future::pending().boxed().shared())
    }

    /// What `work` comes to, or [`Again::status`] if there is no time left for it.
    pub(super) async fn unless<T>(&self, work: impl Future<Output = T>) -> Result<T, Status> {
        tokio::select! {
            biased;
            done = work => Ok(done),
            () = self.0.clone() => Err(Self::status()),
        }
    }

    /// The answer of a call that is to be made once more.
    fn status() -> Status {
        let mut status = Status::unavailable("the next process is to be asked");
        status.metadata_mut().insert(MARK, MetadataValue::from_static("1"));
        status
    }

    /// Whether it is that answer.
    pub(super) fn is_meant(status: &Status) -> bool {
        status.metadata().contains_key(MARK)
    }

    /// Resets the stream of a call that is to be made once more, instead of answering it.
    ///
    /// # Errors
    /// [`Refused`], for such a call.
    pub fn refuse<B>(answer: Result<Response<B>, Infallible>) -> Result<Response<B>, Refused> {
        let answer = answer?;
        match answer.headers().contains_key(MARK) {
            true => Err(Refused(h2::Reason::REFUSED_STREAM.into())),
            false => Ok(answer),
        }
    }
}
