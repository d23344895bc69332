//! The form in which an index travels ([`crate::layer::portable`]), as far as sharing needs it.

use std::sync::Arc;

use crate::cache::{Cache, CacheError, CachedLayer, Key};
use crate::layer::portable;
use crate::layer::{Access, Digest, LayerError, LayerIndex, Verify, Windows};

/// An index that has arrived: checked, but not yet compared with the layer's bytes.
pub struct Portable {
    index: LayerIndex,
    windows: Windows,
}

impl Portable {
    /// Reads the portable form of the index of `layer`, whose blob has `blob_size` bytes. Takes as long as decompressing it does.
    ///
    /// # Errors
    /// [`LayerError`] when it is damaged, of another version, or another layer's.
    pub fn unpack(layer: &Digest, blob_size: u64, bytes: &[u8]) -> Result<Self, LayerError> {
        Self::unpack_within(layer, blob_size, bytes, u64::MAX)
    }

    /// The same, with no more than `memory` bytes besides those of the form.
    ///
    /// # Errors
    /// As [`Portable::unpack`], and [`LayerError::TooLarge`] when it takes more.
    pub fn unpack_within(layer: &Digest, blob_size: u64, bytes: &[u8], memory: u64) -> Result<Self, LayerError> {
        let (index, windows) = portable::unpack_within(layer, bytes, memory)?;
        let wrong = |what: String| Err(LayerError::malformed("portable index", 0, what));
        if index.blob_size() != blob_size {
            return wrong(format!(
                "it describes a blob of {} bytes instead of {blob_size}",
                index.blob_size()
            ));
        }
        if index.access() != Access::Ranges {
            return wrong("it gives no ranges".to_owned());
        }
        if index.verify() != Verify::Content {
            return wrong("it does not verify what is decoded with it".to_owned());
        }
        Ok(Portable { index, windows })
    }

    /// Bytes of memory.
    pub fn memory(&self) -> u64 {
        self.index.memory() + self.windows.memory()
    }

    /// Puts the layer into the cache, without any of its bytes.
    ///
    /// # Errors
    /// [`CacheError`] when the disk fails.
    pub fn insert(self, cache: &Cache, key: Key) -> Result<Arc<CachedLayer>, CacheError> {
        cache.insert_with_windows(key, self.index, &self.windows)
    }
}

/// The portable form of the index of a layer in the cache; `None` if it has none that is of use elsewhere.
///
/// # Errors
/// [`CacheError`] when the disk fails.
pub fn pack(cached: &CachedLayer) -> Result<Option<Vec<u8>>, CacheError> {
    // What SOCI's spans decode to is not verified: nobody would take such an index.
    if cached.index().access() != Access::Ranges || cached.index().verify() != Verify::Content {
        return Ok(None);
    }
    cached.portable().map(Some)
}

/// What a portable index is of, and facts about it for people.
///
/// # Errors
/// [`LayerError`] when it is damaged or of another version.
pub fn describe(bytes: &[u8]) -> Result<(Digest, String), LayerError> {
    let facts = portable::inspect(bytes)?;
    // The header says what it likes; what is shown is of a file that can be used.
    portable::unpack(&facts.layer, bytes)?;
    let text = format!(
        "blob of {} bytes, {} uncompressed; {} names, {} chunks, {} checkpoints; index {} bytes ({} unpacked), windows {} bytes",
        facts.blob_size,
        facts.data_size,
        facts.inodes,
        facts.chunks,
        facts.checkpoints,
        facts.index_len,
        facts.raw_len,
        facts.windows_len
    );
    Ok((facts.layer, text))
}
