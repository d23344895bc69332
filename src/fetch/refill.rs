//! Another pass over a streamed layer whose bytes were evicted. Its index is known, so each chunk is verified, stored and handed to who
//! waits for it as it passes.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::Layer;
use super::pipeline::{self, Fault, Sink};
use super::stream::PASSES;
use crate::layer::tar::{Copy, TarIndexer, TarLayout};
use crate::layer::{Chunk, LayerError};
use crate::sync::Class;

impl Layer {
    /// Streams the layer again, unless that is happening already, or nobody waits.
    pub(super) fn refill(self: &Arc<Self>) {
        {
            let mut queue = self.queue();
            if queue.refilling || queue.closed || queue.is_empty() {
                return;
            }
            queue.refilling = true;
        }
        let me = Arc::clone(self);
        self.fetcher.runtime.spawn(async move {
            let mut pass = 1;
            loop {
                let result = tokio::select! {
                    result = me.refill_pass() => result,
                    () = me.closing.cancelled() => Err(Fault::Closed),
                };
                let blob = me.blob();
                let from = blob.describe();
                let error = match result {
                    Ok(()) => None,
                    Err(fault) if me.fetcher.damaged(&fault, *me.cached.digest(), &*blob) && pass < PASSES => {
                        pass += 1;
                        continue;
                    }
                    Err(fault) => Some(fault.into_error(*me.cached.digest(), from)),
                };
                let waiters = {
                    let mut queue = me.queue();
                    if error.is_none() && !queue.is_empty() && !queue.closed {
                        // Chunks that were evicted, or asked for, after they had passed.
                        pass = 1;
                        continue;
                    }
                    queue.refilling = false;
                    queue.drain()
                };
                for waiter in waiters {
                    let _ = waiter.send(Err(error.clone().unwrap_or_else(|| me.closed())));
                }
                return;
            }
        });
    }

    async fn refill_pass(self: &Arc<Self>) -> Result<(), Fault> {
        let _pass = self.fetcher.streams.enter(Class::Demand).await;
        self.requests.fetch_add(1, Ordering::Relaxed);
        tracing::info!(layer = %self.cached.digest(), "streaming the layer again, its bytes were evicted");
        let me = Arc::clone(self);
        let resources = self.fetcher.resources(move |bytes| {
            me.fetched.fetch_add(bytes, Ordering::Relaxed);
        });
        let sink = Refill {
            layer: Arc::clone(self),
            indexer: TarIndexer::new(),
            next: 0,
            partial: Vec::new(),
            offset: 0,
        };
        let blob = self.blob();
        let (sink, _) = pipeline::run(&*blob, *self.cached.digest(), sink, resources).await?;
        let finish = tokio::task::spawn_blocking(move || sink.finish());
        finish
            .await
            .unwrap_or_else(|error| Err(Fault::Disk(io::Error::other(error))))
    }
}

/// Cuts the tar into the chunks that the index names.
struct Refill {
    layer: Arc<Layer>,
    indexer: TarIndexer,
    /// The chunk being collected, or to come.
    next: usize,
    /// What there is of it.
    partial: Vec<u8>,
    /// Bytes of the tar seen.
    offset: u64,
}

impl Sink for Refill {
    fn push(&mut self, mut bytes: &[u8]) -> Result<(), Fault> {
        self.indexer.push(bytes)?;
        let layer = Arc::clone(&self.layer);
        while let Some(chunk) = layer.cached.index().chunks().get(self.next) {
            // What lies before the chunk is in no chunk, and zeros.
            let gap = chunk.data_offset.saturating_sub(self.offset).min(bytes.len() as u64);
            self.advance(&mut bytes, gap as usize);
            let room = (chunk.data_len as usize - self.partial.len()).min(bytes.len());
            let part = self.advance(&mut bytes, room);
            self.partial.extend_from_slice(part);
            if self.partial.len() < chunk.data_len as usize {
                return Ok(());
            }
            self.deliver()?;
        }
        self.offset += bytes.len() as u64;
        Ok(())
    }
}

impl Refill {
    fn advance<'a>(&mut self, bytes: &mut &'a [u8], count: usize) -> &'a [u8] {
        let (head, tail) = bytes.split_at(count);
        *bytes = tail;
        self.offset += count as u64;
        head
    }

    /// Hands over the chunk that has been collected.
    fn deliver(&mut self) -> Result<(), Fault> {
        let bytes = Bytes::from(std::mem::take(&mut self.partial));
        self.layer.deliver(self.next, bytes)?;
        self.next += 1;
        Ok(())
    }

    /// The chunks that are not wholly in the tar: its end, and expanded sparse files.
    fn finish(mut self) -> Result<(), Fault> {
        let indexer = std::mem::take(&mut self.indexer);
        let TarLayout { copies, .. } = indexer.finish()?;
        let layer = Arc::clone(&self.layer);
        while let Some(chunk) = layer.cached.index().chunks().get(self.next) {
            self.partial.resize(chunk.data_len as usize, 0);
            let first = copies.partition_point(|copy| copy.to.saturating_add(copy.len) <= chunk.data_offset);
            for copy in copies.get(first..).unwrap_or_default() {
                if copy.to >= chunk.data_end() {
                    break;
                }
                self.expand(chunk, copy)?;
            }
            self.deliver()?;
        }
        Ok(())
    }

    /// Copies what a chunk holds of a piece of a sparse file. The piece is taken from the chunks that have just been stored, and from
    /// this one, in which the tar may end.
    fn expand(&mut self, chunk: &Chunk, copy: &Copy) -> Result<(), Fault> {
        let from = copy.to.max(chunk.data_offset);
        let to = copy.to.saturating_add(copy.len).min(chunk.data_end());
        let source = copy.from.saturating_add(from - copy.to);
        let mut bytes = vec![0; (to - from) as usize];
        let (stored, here) = bytes.split_at_mut(chunk.data_offset.saturating_sub(source).min(to - from) as usize);
        if !self
            .layer
            .cached
            .read_present(source, stored, &BTreeMap::new())
            .is_empty()
        {
            let what = "the disk is full, and the sparse files of a layer cannot be restored without it";
            return Err(Fault::Disk(io::Error::new(io::ErrorKind::StorageFull, what)));
        }
        let outside = || LayerError::malformed("tar", copy.from, "a piece of a sparse file lies outside");
        if !here.is_empty() {
            let at = source.saturating_add(stored.len() as u64) - chunk.data_offset;
            let there = self.partial.get(at as usize..).and_then(|b| b.get(..here.len()));
            here.copy_from_slice(there.ok_or_else(outside)?);
        }
        let place = (from - chunk.data_offset) as usize..(to - chunk.data_offset) as usize;
        self.partial.get_mut(place).ok_or_else(outside)?.copy_from_slice(&bytes);
        Ok(())
    }
}
