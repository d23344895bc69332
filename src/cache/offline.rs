//! A layer's index from a cache that another process may be using: the files of a layer never change while they are there.

use std::fs;
use std::io;
use std::path::Path;

use super::CacheError;
use super::adopt::is_keyed;
use super::windows::WindowFile;
use crate::layer::{Digest, LayerIndex, Windows, portable};

/// The index of a layer that was built from its blob, and its windows, as one file that others can use ([`portable`]), from the cache under
/// `root`; `None` if it is not there. It takes memory for all windows.
///
/// # Errors
/// [`CacheError::Io`] if they cannot be read, or are damaged.
pub fn portable_of(root: &Path, layer: &Digest) -> Result<Option<Vec<u8>>, CacheError> {
    let layers = root.join("layers");
    if !is_keyed(&layers) {
        return Ok(None);
    }
    let dir = layers.join(layer.hex());
    let pack = || {
        let encoded = match fs::read(dir.join("index")) {
            Ok(encoded) => encoded,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        let (index, id) = (LayerIndex::decode(&encoded).map_err(invalid)?, Digest::of(&encoded));
        let windows = match WindowFile::open(&dir, index.checkpoints(), &id)? {
            Some(windows) => windows.all(index.checkpoints(), &id)?,
            None => Windows::new(),
        };
        portable::pack(layer, &index, &windows).map(Some).map_err(invalid)
    };
    pack().map_err(CacheError::io("read the index in", &dir))
}
