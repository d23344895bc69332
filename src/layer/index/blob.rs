//! The part of an index that says where bytes are: what is needed of a layer whose names nobody asks for.

use std::ops::Range;
use std::sync::Arc;

use super::chunks::{ChunkTable, IndexBytes};
use super::disk::first_chunk;
use super::{Access, Chunk, Codec, LayerIndex, Verify};
use crate::layer::{Checkpoint, Digest};

/// A [`LayerIndex`] without its names and attributes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobIndex {
    access: Access,
    codec: Codec,
    verify: Verify,
    data_size: u64,
    blob_size: u64,
    stored_size: u64,
    chunks: ChunkTable,
    checkpoints: Arc<[Checkpoint]>,
    inodes: u64,
    fingerprint: Digest,
}

impl BlobIndex {
    pub(super) fn of(index: &LayerIndex) -> Self {
        Self::of_with(index, ChunkTable::here(index.chunks()))
    }

    fn of_with(index: &LayerIndex, chunks: ChunkTable) -> Self {
        BlobIndex {
            access: index.access(),
            codec: index.codec(),
            verify: index.verify(),
            data_size: index.data_size(),
            blob_size: index.blob_size(),
            stored_size: index.stored_size(),
            chunks,
            checkpoints: index.checkpoints().into(),
            inodes: index.inodes().len() as u64,
            fingerprint: index.fingerprint(),
        }
    }

    /// As [`LayerIndex::blob`] has it, with chunks that are read from the index on disk when they are needed. `None`: these bytes are not those of
    /// that index, as far as their length tells.
    pub(super) fn stored(index: &LayerIndex, bytes: IndexBytes) -> Option<Self> {
        let first = first_chunk(index.parts(), (*bytes).as_ref())?;
        let count = index.chunks().len();
        Some(Self::of_with(index, ChunkTable::there(bytes, first, count)))
    }

    /// The same bytes with the names of another index.
    #[must_use]
    pub fn with_names_of(&self, index: &LayerIndex) -> Self {
        BlobIndex {
            inodes: index.inodes().len() as u64,
            fingerprint: index.fingerprint(),
            ..self.clone()
        }
    }

    /// How its bytes can be had.
    pub fn access(&self) -> Access {
        self.access
    }

    /// How its chunks are compressed.
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// How the chunks are verified.
    pub fn verify(&self) -> Verify {
        self.verify
    }

    /// Bytes of the data space.
    pub fn data_size(&self) -> u64 {
        self.data_size
    }

    /// Bytes of the blob in the registry.
    pub fn blob_size(&self) -> u64 {
        self.blob_size
    }

    /// Bytes of the data space that are stored in the blob, i.e. that have to be fetched.
    pub fn stored_size(&self) -> u64 {
        self.stored_size
    }

    /// All chunks in order of their data offset.
    pub fn chunks(&self) -> &ChunkTable {
        &self.chunks
    }

    /// Positions of the chunks that hold any of the `len` bytes at `offset` of the data space.
    pub fn chunks_at(&self, offset: u64, len: u64) -> Range<usize> {
        self.chunks.holding(offset, len)
    }

    /// All checkpoints in order of their offset; only [`Codec::GzipSpans`] has any.
    pub fn checkpoints(&self) -> &[Checkpoint] {
        &self.checkpoints
    }

    /// The checkpoint from which a chunk is decoded, and its position.
    pub fn checkpoint(&self, chunk: &Chunk) -> Option<(usize, &Checkpoint)> {
        checkpoint(&self.checkpoints, chunk)
    }

    /// How many inodes the whole index has.
    pub fn inodes(&self) -> u64 {
        self.inodes
    }

    /// The fingerprint of the whole index.
    pub fn fingerprint(&self) -> Digest {
        self.fingerprint
    }
}

pub(super) fn chunks_at(chunks: &[Chunk], offset: u64, len: u64) -> Range<usize> {
    let end = offset.saturating_add(len);
    let first = chunks.partition_point(|chunk| chunk.data_end() <= offset);
    let rest = chunks.get(first..).unwrap_or_default();
    first..first + rest.partition_point(|chunk| chunk.data_offset < end)
}

pub(super) fn checkpoint<'a>(checkpoints: &'a [Checkpoint], chunk: &Chunk) -> Option<(usize, &'a Checkpoint)> {
    let at = checkpoints
        .binary_search_by_key(&chunk.blob_offset, Checkpoint::start)
        .ok()?;
    Some((at, checkpoints.get(at)?))
}
