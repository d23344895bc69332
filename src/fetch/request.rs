//! One ranged request: body in, chunks out, while it arrives.
//!
//! Before it is sent, it has a share of the memory for what it will hold: its bytes, a copy of some of them, and the largest of its chunks
//! decoded. A copy is made of members that are complete while others are still arriving; the last ones are taken out of the body as
//! they are.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use tokio::time::{Instant, timeout};

use super::layer::DAMAGE_LIMIT;
use super::outage::Turn;
use super::queue::{COPIED, Job, View};
use super::schedule::{Class, Place};
use super::{FetchError, Layer};
use crate::layer::checkpoint;
use crate::layer::compression::decode_member;
use crate::layer::index::MAX_CHUNK_LEN;
use crate::layer::{Chunk, Codec, LayerError, Verify};
use crate::registry::RegistryError;
use crate::sync::caught;
use crate::sync::primitives::{JoinHandle, spawn_blocking, spawn_on};

/// Decodes so many bytes after so many others.
type Decode<'a> = Box<dyn Fn(u32, u32) -> Result<Bytes, LayerError> + 'a>;

/// A compressed member of the blob, with the chunks of the request that are in it.
pub(super) struct Member {
    pub(super) blob: Range<u64>,
    pub(super) chunks: Vec<usize>,
}

/// Members whose compressed bytes are complete.
pub(super) type Batch = Vec<(Member, Bytes)>;

/// A chunk whose bytes are not what they should be.
pub(super) struct Damage {
    pub(super) chunk: usize,
    pub(super) error: LayerError,
}

/// Why a body ended before it should.
enum Cut {
    /// The source gave up, or the layer is closed: whoever waits is told so.
    Failed(FetchError),
    /// The source has the blob, but no ranges of it.
    NoRanges,
    /// It just ended: the same as damage.
    Short(u64),
}

impl Layer {
    /// Makes a request, and sees to it that each of its chunks is answered or queued again.
    /// With the `turn` that it is made in, if its source has an outage.
    pub(super) async fn request(self: &Arc<Self>, job: Job, class: Class, place: Place, turn: Option<Turn>) {
        // The place brings the right to that much, so that there is nothing to wait for.
        let share = self.fetcher.requests.take(place.bytes()).await;
        let kind = class.word();
        self.fetcher.metrics.fetches_total.with_label_values(&[kind]).inc();
        self.requests.fetch_add(1, Ordering::Relaxed);
        let chunks: Vec<usize> = job.plan.ranks.iter().map(|&rank| self.ranks.chunk(rank)).collect();
        let members = self.members(&chunks);
        tracing::debug!(layer = %self.cached.digest(), range = ?job.plan.range, chunks = chunks.len(), kind, "fetch");
        let blob = self.blob();
        let origin = blob.origin();
        place.heed(&*blob);
        let transferred = caught(self.transfer(&*blob, &job, members, kind, &place)).await;
        place.heed(&*blob);
        let (cut, mut damaged) = transferred.unwrap_or_else(|bug| (Some(Cut::Failed(self.disk(bug))), Vec::new()));
        drop(share);
        drop(place);
        if let Some(Cut::Short(length)) = cut {
            let seen: Vec<usize> = damaged.iter().map(|d| d.chunk).collect();
            let lost = chunks
                .iter()
                .filter(|c| self.queue().is_flying(**c, job.id) && !seen.contains(c));
            let lost: Vec<Damage> = lost
                .map(|&chunk| Damage {
                    chunk,
                    error: short(length, &job),
                })
                .collect();
            damaged.extend(lost);
        }
        let settled = !matches!(cut, Some(Cut::Failed(_)));
        let no_ranges = matches!(cut, Some(Cut::NoRanges));
        let error = match cut {
            Some(Cut::Failed(error)) => error,
            // Nothing should be left then; a panic in a decoder could leave something.
            _ => self.disk(std::io::Error::other("the request ended without its bytes")),
        };
        if settled && !no_ranges && damaged.is_empty() {
            blob.verified();
        }
        self.settle_damage(&damaged, &blob.describe());
        self.queue().landed(job.id);
        if settled {
            self.fetcher.outages.delivered(&origin);
        }
        // A request that failed for good fails its readers, also those that a stream could help; but not if the blob can be had as a whole.
        let to_stream = no_ranges || (self.is_streamed() && settled);
        let later = !settled && error.may_pass();
        let mut waits = false;
        for chunk in chunks {
            let mut queue = self.queue();
            if !queue.is_flying(chunk, job.id) {
                continue;
            }
            if to_stream {
                queue.leave_to_stream(chunk);
            } else if later {
                waits |= queue.later(chunk, self.ranks.rank(chunk));
            } else {
                drop(queue);
                self.answer(chunk, Err(error.clone()));
            }
        }
        match to_stream {
            true if self.is_streamed() => self.refill(),
            true => self.sweep(class),
            false => {}
        }
        self.landed.notify_waiters();
        self.ended(&origin, waits.then_some(&error), turn).await;
        self.dispatch(Class::Demand);
    }

    /// Chunks by the members that hold them, in order of the members' ends: the order in which they become complete.
    pub(super) fn members(&self, chunks: &[usize]) -> Vec<Member> {
        let mut members: Vec<Member> = Vec::new();
        for &chunk in chunks {
            let blob = View::blob(self, chunk);
            match members.last_mut() {
                Some(member) if member.blob == blob => member.chunks.push(chunk),
                _ => members.push(Member {
                    blob,
                    chunks: vec![chunk],
                }),
            }
        }
        members.sort_by_key(|member| member.blob.end);
        members
    }

    /// Counts bytes of the body that arrived: those that are only taken ahead by themselves.
    fn count_arrived(&self, job: &Job, arrived: Range<u64>, kind: &str) {
        let core = &job.plan.core;
        let all = arrived.end.saturating_sub(arrived.start);
        let wanted = arrived.end.min(core.end).saturating_sub(arrived.start.max(core.start));
        self.fetched.fetch_add(all, Ordering::Relaxed);
        let counter = &self.fetcher.metrics.fetched_bytes_total;
        for (kind, count) in [(kind, wanted), (Class::ReadAhead.word(), all - wanted)] {
            if count > 0 {
                counter.with_label_values(&[kind]).inc_by(count);
            }
        }
    }

    /// Moves the body; how it was cut, and which chunks were damaged.
    async fn transfer(
        self: &Arc<Self>,
        blob: &dyn crate::registry::Blob,
        job: &Job,
        members: Vec<Member>,
        kind: &str,
        place: &Place,
    ) -> (Option<Cut>, Vec<Damage>) {
        let range = job.plan.range.clone();
        let len = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX);
        // The plan is bounded by `max_request`, or is one chunk, which is bounded by the index.
        let mut buf = BytesMut::with_capacity(len.min(MAX_CHUNK_LEN as usize));
        let mut members = members.into_iter().peekable();
        let mut worker: Option<JoinHandle<Vec<Damage>>> = None;
        let mut damaged = Vec::new();
        let patience = self.fetcher.patience;
        let asked = Instant::now();
        let cut = async {
            let fail = |source| match source {
                RegistryError::NoRanges { .. } => Some(Cut::NoRanges),
                source => Some(Cut::Failed(FetchError::Source {
                    layer: *self.cached.digest(),
                    source,
                })),
            };
            let silence = || {
                Some(Cut::Failed(FetchError::Deadline {
                    layer: *self.cached.digest(),
                    after: patience,
                }))
            };
            let mut body = match timeout(patience, blob.read_part(range.clone())).await {
                Ok(Ok(body)) => body,
                Ok(Err(source)) => return fail(source),
                Err(_) => return silence(),
            };
            while buf.len() < len {
                let piece = match timeout(patience, body.next()).await {
                    Ok(Some(Ok(piece))) => piece,
                    Ok(Some(Err(source))) => return fail(source),
                    Ok(None) => return Some(Cut::Short(buf.len() as u64)),
                    Err(_) => return silence(),
                };
                let piece = piece.get(..len - buf.len()).unwrap_or(&piece);
                if buf.is_empty() {
                    place.begun(asked.elapsed());
                    // Others may have been refused meanwhile, who wait.
                    place.heed(blob);
                }
                place.traffic().arrived(piece.len() as u64);
                let arrived = range.start + buf.len() as u64;
                self.count_arrived(job, arrived..arrived + piece.len() as u64, kind);
                buf.extend_from_slice(piece);
                // One blocking job at a time: what completes meanwhile goes into the next one.
                if worker.as_ref().is_none_or(JoinHandle::is_finished) {
                    let batch = complete(&mut members, &buf, range.start);
                    if !batch.is_empty() {
                        collect(worker.take(), &mut damaged).await;
                        worker = Some(self.decode_for(batch, job));
                    }
                }
            }
            None
        };
        let cut = tokio::select! {
            cut = cut => cut,
            () = self.closing.cancelled() => Some(Cut::Failed(self.closed())),
        };
        collect(worker.take(), &mut damaged).await;
        let batch = take_out(&mut members, buf.freeze(), range.start);
        if !batch.is_empty() {
            collect(Some(self.decode_for(batch, job)), &mut damaged).await;
        }
        (cut, damaged)
    }

    /// Decodes a batch of a request.
    fn decode_for(self: &Arc<Self>, batch: Batch, job: &Job) -> JoinHandle<Vec<Damage>> {
        let id = job.id;
        // Somebody may have joined since the request was made.
        self.decode(batch, move |me| me.queue().class_of(id), job.decoded)
    }

    /// Decodes, verifies and delivers a batch on a blocking thread, when it is its turn; `most` are the bytes that may be decoded at once.
    pub(super) fn decode(
        self: &Arc<Self>,
        batch: Batch,
        class: impl FnOnce(&Layer) -> Class + Send + 'static,
        most: u64,
    ) -> JoinHandle<Vec<Damage>> {
        let me = Arc::clone(self);
        spawn_on(&self.fetcher.runtime, async move {
            let class = class(&me);
            let turn = me.fetcher.decodes.take(class).await;
            let work = move || {
                let _turn = turn;
                let mut damaged = Vec::new();
                for (member, compressed) in batch {
                    me.deliver_member(&member.chunks, &compressed, most, &mut damaged);
                }
                damaged
            };
            match spawn_blocking(work).await {
                Ok(damaged) => damaged,
                Err(error) => {
                    tracing::error!("decoding of chunks ended early: {error}");
                    Vec::new()
                }
            }
        })
    }

    /// `most` are the bytes that may be decoded at once.
    fn deliver_member(&self, chunks: &[usize], compressed: &[u8], most: u64, damaged: &mut Vec<Damage>) {
        let index = self.cached.index();
        let record = |chunk: &usize| index.chunks().get(*chunk);
        let records: Vec<(usize, Chunk)> = chunks.iter().filter_map(|c| Some((*c, record(c)?))).collect();
        let decode = match self.decoder(&records, compressed) {
            Ok(Some(decode)) => decode,
            // The chunks are left to the stream.
            Ok(None) => return,
            Err(error) => {
                let error = |chunk| Damage {
                    chunk,
                    error: error.clone(),
                };
                damaged.extend(chunks.iter().copied().map(error));
                return;
            }
        };
        // A member with several chunks is decoded once, if that is not too much at once.
        let skips = records.iter().map(|(_, r)| r.skip);
        let ends = records.iter().map(|(_, r)| r.skip.saturating_add(r.data_len));
        let (from, to) = (skips.min().unwrap_or(0), ends.max().unwrap_or(0));
        let whole = (records.len() > 1 && u64::from(to - from) <= most.min(MAX_CHUNK_LEN.into()))
            .then(|| decode(from, to - from).ok())
            .flatten();
        for (chunk, record) in records {
            let bytes = match &whole {
                Some(whole) => {
                    let at = (record.skip - from) as usize;
                    Ok(whole.slice(at..at + record.data_len as usize))
                }
                None => decode(record.skip, record.data_len),
            };
            if let Err(error) = bytes.and_then(|bytes| self.deliver(chunk, bytes)) {
                damaged.push(Damage { chunk, error });
            }
        }
    }

    /// What decodes the member that holds these chunks. `None`: it cannot be decoded any more, and the layer is streamed from now on.
    ///
    /// # Errors
    /// When the compressed bytes are not those of the span.
    fn decoder<'a>(&self, records: &[(usize, Chunk)], compressed: &'a [u8]) -> Result<Option<Decode<'a>>, LayerError> {
        let index = self.cached.index();
        let codec = index.codec();
        if codec != Codec::GzipSpans {
            let decode = move |skip, len| decode_member(codec, compressed, skip, len).map(Bytes::from);
            return Ok(Some(Box::new(decode)));
        }
        // A checked index has a checkpoint for every chunk.
        let Some((at, checkpoint)) = records.first().and_then(|(_, record)| index.checkpoint(record)) else {
            return Ok(None);
        };
        if index.verify() == Verify::Span {
            checkpoint::verify(checkpoint, compressed)?;
        }
        let (entry, window) = (checkpoint.entry, self.cached.window(at));
        match window {
            Ok(window) => Ok(Some(Box::new(move |skip, len| {
                checkpoint::decode(entry, compressed, &window, skip, len).map(Bytes::from)
            }))),
            // A stream can be verified chunk by chunk only with digests of chunks.
            Err(error) if index.verify() == Verify::Content => {
                tracing::error!(layer = %self.cached.digest(), "the layer is streamed from now on: {error}");
                self.fall_back();
                Ok(None)
            }
            Err(error) => Err(LayerError::malformed("windows", at as u64, error.to_string())),
        }
    }

    /// Has damaged chunks fetched again, or tells their readers.
    pub(super) fn settle_damage(&self, damaged: &[Damage], from: &str) {
        let (Some(first), Some(lowest), Some(highest)) = (
            damaged.first(),
            damaged.iter().map(|d| d.chunk).min(),
            damaged.iter().map(|d| d.chunk).max(),
        ) else {
            return;
        };
        self.fetcher
            .metrics
            .verify_failures_total
            .with_label_values(&["source"])
            .inc_by(damaged.len() as u64);
        tracing::warn!(
            layer = %self.cached.digest(),
            source = from,
            chunks = %format_args!("{lowest}..={highest}"),
            damaged = damaged.len(),
            "the source sent bytes that are not the layer's: {}",
            first.error
        );
        self.blob().distrust();
        for Damage { chunk, error } in damaged {
            let again = self.queue().again(*chunk, self.ranks.rank(*chunk), DAMAGE_LIMIT);
            if !again {
                let error = FetchError::Corrupt {
                    layer: *self.cached.digest(),
                    from: from.to_owned(),
                    source: Box::new(error.clone()),
                };
                self.answer(*chunk, Err(error));
            }
        }
    }
}

/// Copies of some members that are complete in `buf`, which begins at `start` of the blob: no more than may be copied. The last member is
/// left to [`take_out`].
fn complete(members: &mut std::iter::Peekable<std::vec::IntoIter<Member>>, buf: &[u8], start: u64) -> Batch {
    let end = start + buf.len() as u64;
    let mut batch = Vec::new();
    let mut copied = 0;
    while members.len() > 1 {
        let size = |member: &Member| member.blob.end.saturating_sub(member.blob.start);
        let taken = members.next_if(|member| member.blob.end <= end && copied + size(member) <= COPIED);
        let Some(member) = taken else { break };
        copied += size(&member);
        // Never outside, as a plan covers its chunks; and if it were, the digest would tell.
        let compressed = Bytes::copy_from_slice(buf.get(inside(&member, start)).unwrap_or_default());
        batch.push((member, compressed));
    }
    batch
}

/// All members that are complete in `buf`, without copying them.
fn take_out(members: &mut std::iter::Peekable<std::vec::IntoIter<Member>>, buf: Bytes, start: u64) -> Batch {
    let end = start + buf.len() as u64;
    let mut batch = Vec::new();
    while let Some(member) = members.next_if(|member| member.blob.end <= end) {
        let range = inside(&member, start);
        let compressed = if range.end <= buf.len() && range.start <= range.end {
            buf.slice(range)
        } else {
            Bytes::new()
        };
        batch.push((member, compressed));
    }
    batch
}

/// Where a member is in a body that begins at `start`.
fn inside(member: &Member, start: u64) -> Range<usize> {
    member.blob.start.saturating_sub(start) as usize..member.blob.end.saturating_sub(start) as usize
}

pub(super) async fn collect(worker: Option<JoinHandle<Vec<Damage>>>, damaged: &mut Vec<Damage>) {
    if let Some(worker) = worker {
        match worker.await {
            Ok(found) => damaged.extend(found),
            Err(error) => tracing::error!("decoding of chunks ended early: {error}"),
        }
    }
}

fn short(length: u64, job: &Job) -> LayerError {
    LayerError::Truncated {
        format: "body",
        length,
        what: format!("the {} bytes asked for", job.plan.range.end - job.plan.range.start),
    }
}
