//! Layers whose source has no ranges, or none at the moment: one pass over the whole blob brings every chunk that is missing.
//!
//! A ranged request that finds that out leaves its chunks to the pass, and so does every one after it; readers wait until their chunk
//! comes by. What passes is kept, also what nobody waits for: the blob is downloaded once, not once for each read. Chunks that
//! somebody still waits for at its end (evicted, or asked for too late) are asked for as ranges again, which may be had then.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::{Buf, Bytes, BytesMut};
use futures::StreamExt;
use tokio::time::timeout;

use super::queue::{COPIED, View};
use super::request::{Batch, Damage, Member, collect};
use super::schedule::{Class, Place};
use super::{FetchError, Layer};
use crate::layer::LayerError;
use crate::sync::caught;
use crate::sync::primitives::{JoinHandle, spawn_on};

impl Layer {
    /// Begins a pass, unless one is under way.
    pub(super) fn sweep(self: &Arc<Self>, class: Class) {
        {
            let mut queue = self.queue();
            if queue.refilling || queue.closed {
                return;
            }
            queue.refilling = true;
        }
        let me = Arc::clone(self);
        spawn_on(&self.fetcher.runtime, async move {
            let origin = me.blob().origin();
            let result = tokio::select! {
                result = caught(me.sweep_pass(class)) => result.unwrap_or_else(|bug| Err(me.disk(bug))),
                () = me.closing.cancelled() => Err(me.closed()),
            };
            let left = {
                let mut queue = me.queue();
                queue.refilling = false;
                match &result {
                    // Spans that cannot be decoded any more are the refill's.
                    Ok(()) if me.is_streamed() => Vec::new(),
                    Ok(()) => {
                        queue.requeue_streamed(&me.ranks);
                        Vec::new()
                    }
                    Err(_) => queue.left_to_stream(),
                }
            };
            match &result {
                Ok(()) => me.fetcher.outages.delivered(&origin),
                Err(error) => {
                    tracing::warn!(layer = %me.cached.digest(), %error, "reading the layer as a whole ended early");
                    let mut waits = false;
                    for chunk in left {
                        match error.may_pass() {
                            // As ranges, which may be had then.
                            true => waits |= me.queue().later(chunk, me.ranks.rank(chunk)),
                            false => me.answer(chunk, Err(error.clone())),
                        }
                    }
                    me.ended(&origin, waits.then_some(error), None).await;
                }
            }
            if me.is_streamed() {
                me.refill();
            }
            me.dispatch(Class::Demand);
        });
    }

    async fn sweep_pass(self: &Arc<Self>, class: Class) -> Result<(), FetchError> {
        let place = self.fetcher.enter_stream(self.blob().origin(), class).await;
        let mut missing: Vec<usize> = self
            .cached
            .missing(0, u64::MAX)
            .filter(|&chunk| !self.cached.is_suspect(chunk))
            .collect();
        missing.sort_unstable_by_key(|&chunk| self.ranks.rank(chunk));
        let members = self.members(&missing);
        let decoded = missing
            .iter()
            .map(|&chunk| View::decoded(&**self, chunk))
            .max()
            .unwrap_or(0);
        let longest = members.iter().map(|member| len(&member.blob)).max().unwrap_or(0);
        // One that arrives, those that are being decoded, and what comes out of one.
        let need = longest.saturating_add(longest.max(COPIED)).saturating_add(decoded);
        let _share = self.fetcher.memory().take(need).await;
        let blob = self.blob();
        tracing::info!(
            layer = %self.cached.digest(), source = blob.describe(), chunks = missing.len(),
            "the source has no ranges of this layer: it is read as a whole"
        );
        self.fetcher.metrics.fetches_total.with_label_values(&["stream"]).inc();
        self.requests.fetch_add(1, Ordering::Relaxed);
        let mut damaged = Vec::new();
        let end = self
            .receive(&*blob, Members::new(members), class, decoded, &mut damaged, &place)
            .await;
        if end.is_ok() && damaged.is_empty() {
            blob.verified();
        }
        self.settle_damage(&damaged, &blob.describe());
        end
    }

    /// Moves the body. Damage is added to `damaged`.
    async fn receive(
        self: &Arc<Self>,
        blob: &dyn crate::registry::Blob,
        mut members: Members,
        class: Class,
        decoded: u64,
        damaged: &mut Vec<Damage>,
        place: &Place,
    ) -> Result<(), FetchError> {
        let (layer, patience) = (*self.cached.digest(), self.fetcher.patience);
        let silence = |_| FetchError::Deadline { layer, after: patience };
        let failed = |source| FetchError::Source { layer, source };
        let counter = self.fetcher.metrics.fetched_bytes_total.with_label_values(&["stream"]);
        let body = timeout(patience, blob.read(0..blob.size())).await.map_err(silence)?;
        let mut body = body.map_err(failed)?;
        let mut worker: Option<JoinHandle<Vec<Damage>>> = None;
        let end = loop {
            let batch = members.complete();
            if !batch.is_empty() {
                // One batch at a time is decoded, while the next one arrives.
                collect(worker.take(), damaged).await;
                worker = Some(self.decode(batch, move |_| class, decoded));
                continue;
            }
            if members.is_empty() {
                break Ok(());
            }
            match timeout(patience, body.next()).await {
                Ok(Some(Ok(piece))) => {
                    counter.inc_by(piece.len() as u64);
                    place.traffic().arrived(piece.len() as u64);
                    self.fetched.fetch_add(piece.len() as u64, Ordering::Relaxed);
                    members.push(piece);
                }
                Ok(Some(Err(source))) => break Err(failed(source)),
                Ok(None) => {
                    let error = LayerError::Truncated {
                        format: "body",
                        length: members.arrived(),
                        what: "all of the blob".to_owned(),
                    };
                    damaged.extend(members.chunks().map(|chunk| Damage {
                        chunk,
                        error: error.clone(),
                    }));
                    break Ok(());
                }
                Err(elapsed) => break Err(silence(elapsed)),
            }
        };
        collect(worker.take(), damaged).await;
        end
    }
}

fn len(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

/// Members that are to come, and what has arrived of the blob as far as they need it.
struct Members {
    /// In the order of their ends, from the last to the next; and where the first byte is that it or a later one needs.
    rest: Vec<(Member, u64)>,
    buf: BytesMut,
    /// Offset in the blob of the first byte in the buffer.
    at: u64,
}

impl Members {
    /// `members` are in the order of their ends.
    fn new(members: Vec<Member>) -> Self {
        let mut first = u64::MAX;
        // Spans share a byte with their neighbours where they do not end with one.
        let rest = members.into_iter().rev().map(|member| {
            first = first.min(member.blob.start);
            (member, first)
        });
        Members {
            rest: rest.collect(),
            buf: BytesMut::new(),
            at: 0,
        }
    }

    fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// The chunks that are to come.
    fn chunks(&self) -> impl Iterator<Item = usize> {
        self.rest.iter().flat_map(|(member, _)| member.chunks.iter().copied())
    }

    /// Bytes of the blob that have come by.
    fn arrived(&self) -> u64 {
        self.at + self.buf.len() as u64
    }

    fn push(&mut self, mut piece: Bytes) {
        self.forget();
        if self.buf.is_empty() {
            let from = self.rest.last().map_or(u64::MAX, |(_, from)| *from);
            // At most the length of the piece, which is a `usize`.
            let skipped = from.saturating_sub(self.at).min(piece.len() as u64);
            piece.advance(skipped as usize);
            self.at += skipped;
        }
        self.buf.extend_from_slice(&piece);
    }

    /// Drops what no member needs any more.
    fn forget(&mut self) {
        let from = self.rest.last().map_or(u64::MAX, |(_, from)| *from);
        let passed = from.saturating_sub(self.at).min(self.buf.len() as u64);
        self.buf.advance(passed as usize);
        self.at += passed;
    }

    /// Members that are complete, at least one if there is any, and not more than may be copied.
    fn complete(&mut self) -> Batch {
        let (mut batch, mut copied) = (Batch::new(), 0);
        while let Some((member, _)) = self.rest.last() {
            let (range, arrived) = (member.blob.clone(), self.arrived());
            copied += len(&range);
            if range.end > arrived || (copied > COPIED && !batch.is_empty()) {
                break;
            }
            let inside = range.start.saturating_sub(self.at) as usize..range.end.saturating_sub(self.at) as usize;
            // Never outside, as nothing is dropped that a member needs; and if it were, the digest would tell.
            let compressed = Bytes::copy_from_slice(self.buf.get(inside).unwrap_or_default());
            if let Some((member, _)) = self.rest.pop() {
                batch.push((member, compressed));
            }
        }
        self.forget();
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_cut_out_of_what_passes() {
        let blob: Vec<u8> = (0..200).collect();
        // Two share a byte, one is empty, and there are gaps before, between and after.
        let ranges = [10..20u64, 19..40, 40..40, 90..150];
        for step in [1, 7, 200] {
            let member = |blob: Range<u64>| Member { blob, chunks: vec![] };
            let mut members = Members::new(ranges.clone().map(member).into());
            let mut found = Vec::new();
            for piece in blob.chunks(step) {
                members.push(Bytes::copy_from_slice(piece));
                found.extend(members.complete());
                assert!(members.buf.len() <= 60 + step, "no more is kept than is needed");
            }
            assert!(members.is_empty());
            assert_eq!(found.len(), ranges.len());
            for ((member, bytes), range) in found.iter().zip(&ranges) {
                assert_eq!(member.blob, *range);
                assert_eq!(
                    bytes[..],
                    blob[range.start as usize..range.end as usize],
                    "{range:?} by {step}"
                );
            }
        }
    }
}
