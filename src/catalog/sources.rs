//! One layer, several places to get it from.
//!
//! containerd's content labels name a registry without its port, and an image may have been pulled from several repositories. A
//! [`Failover`] asks the place that worked last, and goes on to the others when that one cannot deliver.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::FutureExt;
use futures::future::BoxFuture;

use crate::registry::{Blob, Body, Origin, RegistryError};

/// The same blob at several sources.
pub struct Failover {
    blobs: Vec<Arc<dyn Blob>>,
    /// Position of the source that answered last.
    preferred: AtomicUsize,
}

impl Failover {
    /// A blob that is asked for at `blobs` in that order; `None` if there are none.
    pub fn over(mut blobs: Vec<Arc<dyn Blob>>) -> Option<Arc<dyn Blob>> {
        match blobs.len() {
            0 => None,
            1 => blobs.pop(),
            _ => Some(Arc::new(Failover {
                blobs,
                preferred: AtomicUsize::new(0),
            })),
        }
    }
}

impl Blob for Failover {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        async move {
            let first = self.preferred.load(Ordering::Relaxed);
            let mut worst = None;
            for step in 0..self.blobs.len() {
                let at = (first + step) % self.blobs.len();
                match self.blobs[at].read(range.clone()).await {
                    Ok(body) => {
                        self.preferred.store(at, Ordering::Relaxed);
                        return Ok(body);
                    }
                    Err(error) => {
                        tracing::debug!(source = self.blobs[at].describe(), %error, "source cannot deliver");
                        worst = Some(more_telling(worst, error));
                    }
                }
            }
            Err(worst.unwrap_or_else(|| RegistryError::NotFound {
                host: "no source".to_owned(),
                what: self.describe(),
            }))
        }
        .boxed()
    }

    fn size(&self) -> u64 {
        self.blobs.first().map_or(0, |blob| blob.size())
    }

    fn distrust(&self) {
        let at = self.preferred.load(Ordering::Relaxed);
        if let Some(blob) = self.blobs.get(at) {
            blob.distrust();
        }
        self.preferred
            .store((at + 1) % self.blobs.len().max(1), Ordering::Relaxed);
    }

    fn describe(&self) -> String {
        let at = self.preferred.load(Ordering::Relaxed);
        self.blobs.get(at).map(|blob| blob.describe()).unwrap_or_default()
    }

    /// That of the source which is asked first.
    fn origin(&self) -> Origin {
        let at = self.preferred.load(Ordering::Relaxed);
        self.blobs.get(at).map(|blob| blob.origin()).unwrap_or_default()
    }
}

/// Of two failures, the one to report: a host that answered says more than one that could not be reached.
fn more_telling(a: Option<RegistryError>, b: RegistryError) -> RegistryError {
    match a {
        Some(a) if !matches!(a, RegistryError::Unreachable { .. }) => a,
        _ => b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use futures::{StreamExt, TryStreamExt, stream};

    struct Fixed(Result<&'static [u8], RegistryError>);

    impl Blob for Fixed {
        fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
            let answer = self.0.clone().map(|bytes| {
                let part = Bytes::from_static(&bytes[range.start as usize..range.end as usize]);
                stream::iter([Ok(part)]).boxed() as Body
            });
            async move { answer }.boxed()
        }
        fn size(&self) -> u64 {
            3
        }
        fn describe(&self) -> String {
            format!("fixed {}", self.0.is_ok())
        }
        fn origin(&self) -> Origin {
            Origin::new("host", &self.describe())
        }
    }

    fn unreachable_host() -> Arc<dyn Blob> {
        Arc::new(Fixed(Err(RegistryError::Unreachable {
            host: "a".into(),
            what: "refused".into(),
        })))
    }

    fn missing() -> Arc<dyn Blob> {
        Arc::new(Fixed(Err(RegistryError::NotFound {
            host: "b".into(),
            what: "blob".into(),
        })))
    }

    #[tokio::test]
    async fn the_source_that_works_is_found_and_remembered() {
        let blob = Failover::over(vec![unreachable_host(), missing(), Arc::new(Fixed(Ok(b"abc")))]).unwrap();
        for _ in 0..2 {
            let parts: Vec<Bytes> = blob.read(1..3).await.unwrap().try_collect().await.unwrap();
            assert_eq!(parts.concat(), b"bc");
            assert_eq!(blob.describe(), "fixed true");
            assert_eq!(blob.origin(), Origin::new("host", "fixed true"));
        }
    }

    #[tokio::test]
    async fn the_more_telling_failure_is_reported() {
        for blobs in [vec![unreachable_host(), missing()], vec![missing(), unreachable_host()]] {
            let Err(error) = Failover::over(blobs).unwrap().read(0..1).await else {
                panic!("no source can deliver")
            };
            assert!(matches!(error, RegistryError::NotFound { .. }), "{error}");
        }
    }

    #[tokio::test]
    async fn a_source_that_sent_damaged_bytes_is_asked_last() {
        let blob = Failover::over(vec![Arc::new(Fixed(Ok(b"xyz"))), Arc::new(Fixed(Ok(b"abc")))]).unwrap();
        for expected in [b"xyz", b"abc", b"xyz"] {
            let parts: Vec<Bytes> = blob.read(0..3).await.unwrap().try_collect().await.unwrap();
            assert_eq!(parts.concat(), expected);
            blob.distrust();
        }
    }

    #[test]
    fn no_sources_no_blob() {
        assert!(Failover::over(Vec::new()).is_none());
    }
}
