//! The form in which an index travels, as far as sharing needs it.

use std::path::Path;
use std::sync::Arc;

use crate::cache::{Cache, CacheError, CachedLayer};
use crate::layer::{Access, Digest, LayerError, LayerIndex};

/// An index that has arrived: checked, but not yet believed of the layer's bytes.
pub struct Portable {
    index: LayerIndex,
}

impl Portable {
    /// Reads the portable form of the index of `layer`, whose blob has `blob_size` bytes. Takes as long as decompressing it does.
    ///
    /// # Errors
    /// [`LayerError`] when it is damaged, of another version, or another layer's.
    pub fn unpack(layer: &Digest, blob_size: u64, bytes: &[u8]) -> Result<Self, LayerError> {
        let _ = layer;
        let index = LayerIndex::decode(bytes)?;
        if index.blob_size() != blob_size {
            let what = format!(
                "it describes a blob of {} bytes instead of {blob_size}",
                index.blob_size()
            );
            return Err(LayerError::malformed("portable index", 0, what));
        }
        if index.access() != Access::Ranges {
            return Err(LayerError::malformed("portable index", 0, "it gives no ranges"));
        }
        Ok(Portable { index })
    }

    /// Puts the layer into the cache, without any of its bytes.
    ///
    /// # Errors
    /// [`CacheError`] when the disk fails.
    pub fn insert(self, cache: &Cache, layer: &Digest) -> Result<Arc<CachedLayer>, CacheError> {
        cache.insert(layer, self.index)
    }
}

/// The portable form of the index of a layer in the cache; `None` if it has none that is of use elsewhere.
///
/// # Errors
/// [`CacheError`] when the disk fails.
pub fn pack(cached: &CachedLayer) -> Result<Option<Vec<u8>>, CacheError> {
    if cached.index().access() != Access::Ranges {
        return Ok(None);
    }
    Ok(Some(cached.index().encode()))
}

/// The portable form of the index of a layer in the cache of a daemon that may be running, from its files; `None` if it is not
/// there, or of no use elsewhere.
pub fn stored(root: &Path, layer: &Digest) -> Option<Vec<u8>> {
    let path = root.join("layers").join(layer.hex()).join("index");
    let bytes = std::fs::read(path).ok()?;
    let index = LayerIndex::decode(&bytes).ok()?;
    (index.access() == Access::Ranges).then_some(bytes)
}

/// What a portable index is of, and facts about it for people.
///
/// # Errors
/// [`LayerError`] when it is damaged or of another version.
pub fn describe(bytes: &[u8]) -> Result<(Option<Digest>, String), LayerError> {
    let index = LayerIndex::decode(bytes)?;
    let facts = format!("{} names, {} chunks", index.inodes().len(), index.chunks().len());
    Ok((None, facts))
}
