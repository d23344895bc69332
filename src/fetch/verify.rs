//! Whole layers as files: verified once, in the background, when their bytes come from an earlier process.
//!
//! One layer at a time, and slowly ([`crate::cache::CachedLayer::check_all`]): nobody waits for it, as the layer is served through FUSE
//! meanwhile. It ends early when the layer is closed.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{Layer, LocalFile};
use crate::cache::NotWhole;
use crate::sync::caught;
use crate::sync::primitives::{spawn_blocking, spawn_on};

impl Layer {
    /// The file of a layer that is whole; begins to verify it if that is all that is missing.
    pub(super) fn whole_file(&self) -> Option<LocalFile> {
        match self.cached.hold() {
            Ok((path, hold)) => Some(LocalFile { path, hold }),
            Err(NotWhole::Unchecked) => {
                self.verify();
                None
            }
            Err(NotWhole::Missing | NotWhole::Disk) => None,
        }
    }

    fn verify(&self) {
        if self.closing.is_cancelled() || self.verifying.swap(true, Ordering::AcqRel) {
            return;
        }
        let Some(me) = self.me.upgrade() else { return };
        spawn_on(&self.fetcher.runtime, async move {
            let verified = tokio::select! {
                verified = caught(me.verify_in_turn()) => verified.ok().flatten(),
                () = me.closing.cancelled() => None,
            };
            me.verifying.store(false, Ordering::Release);
            // What has vanished is fetched again where single ranges can be, so that the layer is whole soon; otherwise by who reads it.
            for chunk in verified.unwrap_or_default() {
                if let Some(record) = me.cached.index().chunks().get(chunk) {
                    me.prefetch(record.data_offset, record.data_len.into());
                }
            }
        });
    }

    /// The chunks that were damaged; `None` if it did not come to the end.
    async fn verify_in_turn(self: &Arc<Self>) -> Option<Vec<usize>> {
        // The semaphore is never closed.
        let permit = Arc::clone(&self.fetcher.verifications).acquire_owned().await.ok();
        let me = Arc::clone(self);
        let work = move || {
            let begin = Instant::now();
            let checked = me.cached.check_all(|| me.closing.is_cancelled());
            drop(permit);
            if checked.finished {
                tracing::info!(
                    layer = %me.cached.digest(),
                    damaged = checked.damaged.len(),
                    seconds = begin.elapsed().as_secs_f64(),
                    "what the cache has of a complete layer is verified"
                );
            }
            checked
        };
        let checked = spawn_blocking(work).await.ok()?;
        checked.finished.then_some(checked.damaged)
    }
}
