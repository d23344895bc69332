//! Another pass over a streamed layer whose bytes were evicted. Its index is known, so each chunk is verified, stored and handed to who
//! waits for it as it passes.
//!
//! Expanded sparse files come last: they are copied from the chunks that the pass has just stored, because only its end tells where they
//! belong. Where those are not there any more (evicted meanwhile, or the disk took none), one more pass, which knows the places, collects
//! the pieces as they come by, one chunk at a time.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use tokio::sync::watch;

use super::Layer;
use super::flights::Wishes;
use super::pipeline::{self, Fault, Resources, Sink};
use super::schedule::Class;
use super::stream::PASSES;
use crate::layer::tar::{Copy, TarIndexer, TarLayout};
use crate::layer::{Chunk, ChunkTable, LayerError};
use crate::sync::caught;
use crate::sync::primitives::{spawn_blocking, spawn_on};

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
        spawn_on(&self.fetcher.runtime, async move {
            let mut pass = 1;
            let mut known = None;
            loop {
                let turn = tokio::select! {
                    turn = me.turn() => turn,
                    () = me.closing.cancelled() => None,
                };
                let blob = me.blob();
                let origin = blob.origin();
                let result = tokio::select! {
                    result = caught(me.refill_pass(known.take(), pass == 1, turn.is_some())) => result.unwrap_or_else(|bug| Err(Fault::Disk(bug))),
                    () = me.closing.cancelled() => Err(Fault::Closed),
                };
                if result.is_ok() {
                    me.fetcher.outages.delivered(&origin);
                }
                let from = blob.describe();
                let error = match result {
                    Ok(Some(pieces)) if !me.queue().is_empty() => {
                        known = Some(pieces);
                        continue;
                    }
                    Ok(_) => None,
                    Err(fault) if me.fetcher.damaged(&fault, *me.cached.digest(), &*blob) && pass < PASSES => {
                        pass += 1;
                        continue;
                    }
                    Err(fault) => {
                        let error = fault.into_error(*me.cached.digest(), from);
                        let waits = error.may_pass() && me.queue().keep_awaited();
                        me.ended(&origin, waits.then_some(&error), turn).await;
                        if waits {
                            continue;
                        }
                        Some(error)
                    }
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
                    waiter.send(&Err(error.clone().unwrap_or_else(|| me.closed())));
                }
                return;
            }
        });
    }

    /// One pass. What it learned is returned if another has to follow, which never is so if it knew that already.
    async fn refill_pass(
        self: &Arc<Self>,
        known: Option<Pieces>,
        wide: bool,
        in_vain: bool,
    ) -> Result<Option<Pieces>, Fault> {
        // Readers wait for it, so that it comes before the streams of pulls.
        let blob = self.blob();
        let origin = blob.origin();
        let place = match in_vain {
            true => self.fetcher.enter_stream_in_vain(origin.clone(), Class::Demand).await,
            false => self.fetcher.enter_stream(origin.clone(), Class::Demand).await,
        };
        let delivers = place.remote();
        self.requests.fetch_add(1, Ordering::Relaxed);
        tracing::info!(layer = %self.cached.digest(), "streaming the layer again, its bytes were evicted");
        let me = Arc::clone(self);
        let (_none, wishes) = watch::channel(Wishes::default());
        let resources = self.fetcher.resources(origin, Class::Demand, wishes, move |bytes| {
            me.fetched.fetch_add(bytes, Ordering::Relaxed);
            delivers.delivers();
        });
        let resources = Resources { wide, ..resources };
        let sink = Refill {
            layer: Arc::clone(self),
            indexer: TarIndexer::new(),
            next: 0,
            partial: Vec::new(),
            offset: 0,
            late: known.map(|pieces| Late::new(pieces, self.cached.index().chunks())),
        };
        let (sink, _) = pipeline::run(&blob, *self.cached.digest(), sink, resources).await?;
        let finish = spawn_blocking(move || sink.finish());
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
    /// Expanded sparse files, if their places are known.
    late: Option<Late>,
}

/// Where the pieces of sparse files belong.
struct Pieces {
    /// In order of `from` and of `to`.
    copies: Vec<Copy>,
    tar_size: u64,
}

/// Puts expanded sparse files together as their pieces pass.
struct Late {
    pieces: Pieces,
    /// The piece that is passing, or to come.
    at: usize,
    /// Chunks that have some of their pieces, and are not delivered: the last one, and the one that the end of the tar lies in.
    open: BTreeMap<usize, Vec<u8>>,
    /// The first chunk behind the tar that is not delivered.
    next: usize,
}

impl Late {
    fn new(pieces: Pieces, chunks: &ChunkTable) -> Self {
        Late {
            at: 0,
            open: BTreeMap::new(),
            next: chunks.partition_point(|chunk| chunk.data_offset < pieces.tar_size),
            pieces,
        }
    }

    /// Takes what it needs of the next bytes of the tar, which begin at `offset`.
    fn push(&mut self, layer: &Layer, offset: u64, bytes: &[u8]) -> Result<(), Fault> {
        let end = offset + bytes.len() as u64;
        while let Some(&copy) = self.pieces.copies.get(self.at) {
            let (from, to) = (copy.from.max(offset), copy.from.saturating_add(copy.len).min(end));
            if from < to {
                let piece = &bytes[(from - offset) as usize..(to - offset) as usize];
                self.put(layer, copy.to + (from - copy.from), piece)?;
            }
            if copy.from.saturating_add(copy.len) > end {
                break;
            }
            self.at += 1;
        }
        Ok(())
    }

    fn put(&mut self, layer: &Layer, place: u64, piece: &[u8]) -> Result<(), Fault> {
        let chunks = layer.cached.index().chunks();
        let positions = chunks.holding(place, piece.len() as u64);
        for (at, chunk) in positions.clone().zip(chunks.range(positions)) {
            // Places only grow: what lies before has all its pieces.
            self.deliver(layer, at)?;
            let buffer = self.open.entry(at).or_insert_with(|| vec![0; chunk.data_len as usize]);
            let (from, to) = (
                place.max(chunk.data_offset),
                (place + piece.len() as u64).min(chunk.data_end()),
            );
            let target = &mut buffer[(from - chunk.data_offset) as usize..(to - chunk.data_offset) as usize];
            target.copy_from_slice(&piece[(from - place) as usize..(to - place) as usize]);
        }
        Ok(())
    }

    /// Delivers what lies behind the tar and before a chunk.
    fn deliver(&mut self, layer: &Layer, before: usize) -> Result<(), Fault> {
        let chunks = layer.cached.index().chunks();
        while self.next < before.min(chunks.len()) {
            let zeros = || vec![0; chunks.get(self.next).map_or(0, |chunk| chunk.data_len as usize)];
            let bytes = self.open.remove(&self.next).unwrap_or_else(zeros);
            layer.deliver(self.next, bytes.into())?;
            self.next += 1;
        }
        Ok(())
    }
}

impl Sink for Refill {
    fn push(&mut self, mut bytes: &[u8]) -> Result<(), Fault> {
        self.indexer.push(bytes)?;
        let layer = Arc::clone(&self.layer);
        if let Some(late) = &mut self.late {
            late.push(&layer, self.offset, bytes)?;
        }
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

    /// The chunks that are not wholly in the tar: its end, and expanded sparse files. Where these belong is returned if their bytes are
    /// not on disk.
    fn finish(mut self) -> Result<Option<Pieces>, Fault> {
        let indexer = std::mem::take(&mut self.indexer);
        let TarLayout { copies, tar_size, .. } = indexer.finish()?;
        let layer = Arc::clone(&self.layer);
        let chunks = layer.cached.index().chunks();
        if let Some(mut late) = self.late.take() {
            if let Some(chunk) = chunks.get(self.next).filter(|chunk| chunk.data_offset < tar_size) {
                let here = self.partial.len();
                let rest = late.open.remove(&self.next).unwrap_or_default();
                self.partial.extend(rest.get(here..).unwrap_or_default());
                self.partial.resize(chunk.data_len as usize, 0);
                self.deliver()?;
            }
            late.deliver(&layer, chunks.len())?;
            return Ok(None);
        }
        while let Some(chunk) = chunks.get(self.next) {
            self.partial.resize(chunk.data_len as usize, 0);
            let first = copies.partition_point(|copy| copy.to.saturating_add(copy.len) <= chunk.data_offset);
            for copy in copies.get(first..).unwrap_or_default() {
                if copy.to >= chunk.data_end() {
                    break;
                }
                if !self.expand(&chunk, copy)? {
                    tracing::debug!(layer = %layer.cached.digest(), "once more, for its sparse files");
                    return Ok(Some(Pieces { copies, tar_size }));
                }
            }
            self.deliver()?;
        }
        Ok(None)
    }

    /// Copies what a chunk holds of a piece of a sparse file. The piece is taken from the chunks that have just been stored, and from
    /// this one, in which the tar may end. `false`: they are not on disk.
    fn expand(&mut self, chunk: &Chunk, copy: &Copy) -> Result<bool, Fault> {
        let from = copy.to.max(chunk.data_offset);
        let to = copy.to.saturating_add(copy.len).min(chunk.data_end());
        let source = copy.from.saturating_add(from - copy.to);
        let mut bytes = vec![0; (to - from) as usize];
        let (stored, here) = bytes.split_at_mut(chunk.data_offset.saturating_sub(source).min(to - from) as usize);
        let missing = self.layer.cached.read_present(source, stored, &BTreeMap::new());
        if !missing.is_empty() {
            return Ok(false);
        }
        let outside = || LayerError::malformed("tar", copy.from, "a piece of a sparse file lies outside");
        if !here.is_empty() {
            let at = source.saturating_add(stored.len() as u64) - chunk.data_offset;
            let there = self.partial.get(at as usize..).and_then(|b| b.get(..here.len()));
            here.copy_from_slice(there.ok_or_else(outside)?);
        }
        let place = (from - chunk.data_offset) as usize..(to - chunk.data_offset) as usize;
        self.partial.get_mut(place).ok_or_else(outside)?.copy_from_slice(&bytes);
        Ok(true)
    }
}
