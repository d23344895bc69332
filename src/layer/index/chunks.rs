//! The chunks of a layer as whoever reads the layer has them: in memory, or in the index's form on disk, wherever its owner keeps that. They
//! are most of what is left of an index without its names; read from a file that is mapped, they cost no memory of the process.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::Chunk;
use super::disk::{CHUNK_LEN, decode_chunk};

/// Bytes of an index on disk, as [`LayerIndex::encode`](super::LayerIndex::encode) gives them.
pub type IndexBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// All chunks of a layer in order of their data offset.
#[derive(Clone)]
pub struct ChunkTable(Kept);

#[derive(Clone)]
enum Kept {
    Here(Arc<[Chunk]>),
    There {
        bytes: IndexBytes,
        first: usize,
        count: usize,
    },
}

impl ChunkTable {
    pub(super) fn here(chunks: &[Chunk]) -> Self {
        ChunkTable(Kept::Here(chunks.into()))
    }

    /// Those in `bytes`, of which the records begin at `first`.
    pub(super) fn there(bytes: IndexBytes, first: usize, count: usize) -> Self {
        ChunkTable(Kept::There { bytes, first, count })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        match &self.0 {
            Kept::Here(chunks) => chunks.len(),
            Kept::There { count, .. } => *count,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The chunk at a position.
    pub fn get(&self, at: usize) -> Option<Chunk> {
        match &self.0 {
            Kept::Here(chunks) => chunks.get(at).copied(),
            Kept::There { bytes, first, count } => {
                let from = first + (at < *count).then_some(at)? * CHUNK_LEN;
                (**bytes).as_ref().get(from..from + CHUNK_LEN).map(decode_chunk)
            }
        }
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = Chunk> {
        self.range(0..self.len())
    }

    /// Those at these positions, as far as they exist.
    pub fn range(&self, at: Range<usize>) -> impl Iterator<Item = Chunk> {
        at.map_while(|at| self.get(at))
    }

    /// The position of the first of which `before` is not true, if it is true of none behind one of which it is not.
    pub fn partition_point(&self, before: impl Fn(&Chunk) -> bool) -> usize {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = low + (high - low) / 2;
            match self.get(middle).is_some_and(|chunk| before(&chunk)) {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        low
    }

    /// Positions of those that hold any of the `len` bytes at `offset` of the data space.
    pub fn holding(&self, offset: u64, len: u64) -> Range<usize> {
        let end = offset.saturating_add(len);
        let first = self.partition_point(|chunk| chunk.data_end() <= offset);
        // One or two, nearly always: walking is faster than a second search.
        let count = self
            .range(first..self.len())
            .take_while(|chunk| chunk.data_offset < end);
        first..first + count.count()
    }
}

impl PartialEq for ChunkTable {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len() && self.iter().eq(other.iter())
    }
}

impl Eq for ChunkTable {}

impl PartialEq<[Chunk]> for ChunkTable {
    fn eq(&self, other: &[Chunk]) -> bool {
        self.len() == other.len() && self.iter().eq(other.iter().copied())
    }
}

impl fmt::Debug for ChunkTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}
