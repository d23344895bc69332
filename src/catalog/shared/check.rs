//! Whether an index that came from elsewhere describes its layer, once all of the layer is here.
//!
//! Chunks are verified against the index, so that bytes cannot be told from false ones if the index itself is false. But the image
//! promises the digest of the whole tar (the diff id), and the tar says what the names are: with all bytes at hand both can be compared
//! without the network. It takes as long as hashing and parsing the tar once.

use crate::cache::CachedLayer;
use crate::layer::digest::Hasher;
use crate::layer::tar::TarIndexer;
use crate::layer::{Access, Checkpoint, Codec, Digest, LayerError, LayerIndex, Verify};

/// Bytes looked at at a time.
const PIECE: usize = 1 << 20;

/// Why an index is not found to describe its layer.
#[derive(Debug, thiserror::Error)]
pub enum Mismatch {
    /// Not all of the layer is here, or it cannot be told which part of it is the tar.
    #[error("not all of it can be compared")]
    Absent,
    /// The tar is not the one that the image promises.
    #[error("the tar that it gives has digest {actual}, and the image says its diff id is {expected}")]
    Tar {
        /// From the image's configuration.
        expected: Digest,
        /// Of what was decoded with the index.
        actual: Digest,
    },
    /// What it gives is no tar.
    #[error("what it gives is no tar: {0}")]
    Malformed(LayerError),
    /// The tar's names and attributes are others.
    #[error("its names, attributes or places of files are not the tar's")]
    Tree,
}

/// Compares a layer that is wholly in the cache with its index.
///
/// # Errors
/// [`Mismatch`]; only [`Mismatch::Absent`] says nothing about the index.
pub fn describes(cached: &CachedLayer, diff_id: Option<Digest>) -> Result<(), Mismatch> {
    let index = cached.names().map_err(|_| Mismatch::Absent)?;
    let tar_size = tar_size(&index).ok_or(Mismatch::Absent)?;
    let (mut hash, mut indexer) = (Hasher::new(), TarIndexer::new());
    let mut buf = vec![0; PIECE];
    let mut offset = 0;
    // The digest first of all: a tar that is another one need not be one at all.
    let mut malformed = None;
    while offset < tar_size {
        let count = (tar_size - offset).min(PIECE as u64) as usize;
        let piece = buf.get_mut(..count).ok_or(Mismatch::Absent)?;
        match cached.read_ready(offset, piece) {
            Some(Ok(())) => {}
            Some(Err(_)) | None => return Err(Mismatch::Absent),
        }
        hash.update(piece);
        if malformed.is_none() {
            malformed = indexer.push(piece).err();
        }
        offset += count as u64;
    }
    let actual = hash.finish();
    if let Some(expected) = diff_id.filter(|expected| *expected != actual) {
        return Err(Mismatch::Tar { expected, actual });
    }
    let layout = match malformed {
        Some(error) => return Err(Mismatch::Malformed(error)),
        None => indexer.finish().map_err(Mismatch::Malformed)?,
    };
    if layout.tar_size != tar_size || layout.data_size != index.data_size() {
        return Err(Mismatch::Tree);
    }
    for copy in &layout.copies {
        same_bytes(cached, copy.from, copy.to, copy.len)?;
    }
    // How the bytes come out of the blob is no part of the comparison: that they are right has been seen.
    let own = layout.into_index(Access::Stream, Codec::None, Vec::new(), index.blob_size());
    match own {
        Ok(own) if same_tree(&own, &index) => Ok(()),
        Ok(_) | Err(_) => Err(Mismatch::Tree),
    }
}

/// Compares two ranges of the data space.
fn same_bytes(cached: &CachedLayer, a: u64, b: u64, len: u64) -> Result<(), Mismatch> {
    let (mut left, mut right) = (vec![0; PIECE], vec![0; PIECE]);
    let mut done = 0;
    while done < len {
        let count = (len - done).min(PIECE as u64) as usize;
        for (from, buf) in [(a, &mut left), (b, &mut right)] {
            let buf = buf.get_mut(..count).ok_or(Mismatch::Absent)?;
            match cached.read_ready(from.saturating_add(done), buf) {
                Some(Ok(())) => {}
                Some(Err(_)) | None => return Err(Mismatch::Absent),
            }
        }
        if left.get(..count) != right.get(..count) {
            return Err(Mismatch::Tree);
        }
        done += count as u64;
    }
    Ok(())
}

/// Whether two indexes show the same names, attributes and places of files. Both were made by the same rules if both are honest, so
/// that even their numbers are the same.
fn same_tree(a: &LayerIndex, b: &LayerIndex) -> bool {
    a.inodes() == b.inodes()
        && a.inodes().iter().all(|inode| {
            let names = |index: &LayerIndex| -> Vec<(Vec<u8>, u32)> {
                let entries = index.entries(inode).iter();
                entries.map(|entry| (index.name(entry).to_vec(), entry.ino)).collect()
            };
            a.target(inode) == b.target(inode) && names(a) == names(b) && a.xattrs(inode).eq(b.xattrs(inode))
        })
}

/// Bytes of the data space that are the tar, if that can be told.
fn tar_size(index: &LayerIndex) -> Option<u64> {
    // It ends where the archive does, and a tar usually goes on with zeros: its diff id cannot be computed.
    if index.verify() == Verify::Span {
        return None;
    }
    match index.codec() {
        Codec::None => Some(index.blob_size()),
        Codec::GzipSpans => index.checkpoints().last().map(Checkpoint::data_end),
        // Without sparse files the tar is all there is. With them the tar indexed here has another data space, which tells nothing.
        Codec::Gzip | Codec::Zstd => Some(index.data_size()),
    }
    .filter(|size| *size <= index.data_size())
}
