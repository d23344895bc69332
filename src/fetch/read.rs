//! Reads that have to wait: each for the chunks that it misses, of which it gets the bytes that it wants and no more. A reader that leaves
//! (its deadline is over, or its process is gone) takes nothing away from others; what it alone had asked for sinks to the background.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::queue::{Answer, Waiter};
use super::schedule::Class;
use super::{FetchError, Layer};
use crate::sync::primitives::spawn_blocking;

/// Chunks that a reader waits for.
struct Waits {
    layer: Arc<Layer>,
    chunks: VecDeque<(usize, oneshot::Receiver<Answer>)>,
}

impl Drop for Waits {
    fn drop(&mut self) {
        // First, so that they count as left.
        let left: Vec<usize> = self.chunks.drain(..).map(|(chunk, _)| chunk).collect();
        if !left.is_empty() {
            self.layer.leave(&left);
        }
    }
}

/// A part of a read.
enum Part {
    /// These bytes of the buffer are to be read from the cache.
    Cached(std::ops::Range<usize>),
    /// These arrived.
    Arrived(Bytes),
}

impl Layer {
    /// The bytes, without a deadline; what is missing is asked for as of this class.
    pub(super) async fn fill(self: Arc<Self>, offset: u64, len: u32, class: Class) -> Result<Bytes, FetchError> {
        // What arrived, by where it is in the read. It is kept until the end: an eviction in the meantime costs nothing, and every turn of
        // the loop adds some, so that it ends.
        let mut arrived: BTreeMap<usize, Bytes> = BTreeMap::new();
        let mut missing: Vec<usize> = self
            .cached
            .missing(offset, len.into())
            .filter(|&chunk| !self.cached.is_suspect(chunk) && !self.cached.is_elsewhere(chunk))
            .collect();
        loop {
            if !missing.is_empty() {
                let mut waits = self.want(&missing, offset, len, class)?;
                while let Some((chunk, wait)) = waits.chunks.front_mut() {
                    let (chunk, answer) = (*chunk, wait.await);
                    waits.chunks.pop_front();
                    let bytes = answer.unwrap_or_else(|_| Err(self.closed()))?;
                    arrived.insert(self.place(chunk, offset, len).0, bytes);
                }
            }
            let me = Arc::clone(&self);
            let assemble = move || {
                let mut buf = vec![0; len as usize];
                let mut missing = Vec::new();
                for part in parts(&arrived, buf.len()) {
                    match part {
                        (at, Part::Arrived(bytes)) => buf[at..at + bytes.len()].copy_from_slice(&bytes),
                        (at, Part::Cached(range)) => {
                            let place = offset.saturating_add(at as u64);
                            missing.extend(me.cached.read_present(place, &mut buf[range], &BTreeMap::new()));
                        }
                    }
                }
                (buf, missing, arrived)
            };
            let (buf, still, back) = spawn_blocking(assemble)
                .await
                .map_err(|error| self.disk(io::Error::other(error)))?;
            if still.is_empty() {
                return Ok(buf.into());
            }
            (missing, arrived) = (still, back);
        }
    }

    /// Where the bytes of a chunk that a read wants are in the read, and in the chunk.
    fn place(&self, chunk: usize, offset: u64, len: u32) -> (usize, std::ops::Range<usize>) {
        let Some(record) = self.cached.index().chunks().get(chunk) else {
            return (0, 0..0);
        };
        let from = record.data_offset.max(offset);
        let to = record.data_end().min(offset.saturating_add(len.into())).max(from);
        let inside = (from - record.data_offset) as usize..(to - record.data_offset) as usize;
        ((from - offset) as usize, inside)
    }

    /// Asks for chunks; where to wait for each. A chunk that has become ready meanwhile is left out.
    fn want(self: &Arc<Self>, chunks: &[usize], offset: u64, len: u32, class: Class) -> Result<Waits, FetchError> {
        let streamed = self.is_streamed();
        let mut waits = Waits {
            layer: Arc::clone(self),
            chunks: VecDeque::with_capacity(chunks.len()),
        };
        let mut caught_up = false;
        {
            let mut queue = self.queue();
            if queue.closed {
                return Err(self.closed());
            }
            for &chunk in chunks {
                // Under the lock: a chunk leaves the queue after it is ready (or hot).
                if self.cached.is_chunk_ready(chunk) {
                    continue;
                }
                let (waiter, wait) = Waiter::new(self.place(chunk, offset, len).1);
                waits.chunks.push_back((chunk, wait));
                if let Some(bytes) = self.cached.hot(chunk) {
                    waiter.send(&Ok(bytes));
                } else if streamed {
                    queue.want_streamed(chunk, waiter);
                } else {
                    let rank = self.ranks.rank(chunk);
                    if queue.want(chunk, rank, class, Some(waiter)) {
                        // He has come up with what is read ahead for him.
                        queue.go_on(&self.ranks, &**self, rank, 0);
                        caught_up = true;
                    }
                }
            }
        }
        if streamed {
            self.refill();
        } else {
            self.dispatch(class);
            if caught_up {
                self.dispatch(Class::ReadAhead);
            }
        }
        Ok(waits)
    }

    /// A reader waits for these chunks no more.
    fn leave(&self, chunks: &[usize]) {
        let sunk = {
            let mut queue = self.queue();
            let left = chunks
                .iter()
                .filter(|&&chunk| queue.left(chunk, self.ranks.rank(chunk)));
            left.count() > 0
        };
        if sunk {
            self.dispatch(Class::Background);
        }
    }
}

/// The parts of a read of `len` bytes, with where each begins.
fn parts(arrived: &BTreeMap<usize, Bytes>, len: usize) -> Vec<(usize, Part)> {
    let mut parts = Vec::with_capacity(2 * arrived.len() + 1);
    let mut done = 0;
    for (&at, bytes) in arrived {
        if done < at {
            parts.push((done, Part::Cached(done..at)));
        }
        parts.push((at, Part::Arrived(bytes.clone())));
        done = at + bytes.len();
    }
    if done < len || parts.is_empty() {
        parts.push((done, Part::Cached(done..len)));
    }
    parts
}
