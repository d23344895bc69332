//! Where a layer's bytes are, with no more memory than it takes.
//!
//! A lazily read layer has a chunk for each file, and most layers of a node are asked for nothing for hours. So of a layer with many chunks these
//! are not in memory: they are read from the file `index`, which is mapped, and of which the pages that were touched are given back from
//! time to time. The cache owns that file, which is never changed and at most loses its name, so that a mapping is always right.

use std::fs::File;
use std::sync::Arc;

use super::CachedLayer;
use crate::layer::index::IndexBytes;
use crate::layer::{BlobIndex, LayerIndex};
use crate::sys::map::Mapping;

/// Chunks from which on they are read from the index file: in memory they would take 64 KiB, and a mapping costs a few hundred bytes.
const MAPPED: usize = 1024;

/// Where the bytes of one layer are.
pub(super) struct Places {
    pub blob: BlobIndex,
    /// The file that its chunks are read from, if they are not in memory.
    pub mapping: Option<Arc<Mapping>>,
}

impl Places {
    /// Those of `index`, of which `file` is the form on disk.
    pub fn of(index: &LayerIndex, file: &File) -> Self {
        Self::mapped(index, file).unwrap_or_else(|| Places {
            blob: index.blob(),
            mapping: None,
        })
    }

    /// `None`: it is not worth it, or does not work, and memory is all that this costs.
    fn mapped(index: &LayerIndex, file: &File) -> Option<Self> {
        if index.chunks().len() < MAPPED {
            return None;
        }
        let len = usize::try_from(file.metadata().ok()?.len()).ok()?;
        let mapping = Arc::new(Mapping::of(file, len).ok()?);
        let blob = index.blob_stored(Arc::clone(&mapping) as IndexBytes)?;
        Some(Places {
            blob,
            mapping: Some(mapping),
        })
    }
}

impl CachedLayer {
    /// Takes what was touched of the index file off this process' memory.
    pub(super) fn release_index(&self) {
        if let Some(mapping) = &self.index_map {
            mapping.release();
        }
    }

    #[cfg(test)]
    pub(super) fn has_mapped_index(&self) -> bool {
        self.index_map.is_some()
    }
}
