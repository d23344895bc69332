//! Whether an index that came from elsewhere describes its layer, once all of the layer is here.
//!
//! Chunks are verified against the index, so that bytes cannot be told from false ones if the index itself is false. But the image
//! promises the digest of the whole tar (the diff id), and the tar says what the names are: with all bytes at hand both can be compared
//! without the network. It takes as long as hashing and parsing the tar once.

use crate::cache::CachedLayer;
use crate::layer::digest::Hasher;
use crate::layer::index::{Inode, mode};
use crate::layer::tar::TarIndexer;
use crate::layer::{Access, Checkpoint, Codec, Digest, LayerError, LayerIndex, Verify};

/// Bytes looked at at a time.
const PIECE: usize = 1 << 20;
/// Unit of a tar, in bytes.
const BLOCK: usize = 512;
/// Most zeros after the end of an archive that are tried where an index does not say how many there are, in bytes. GNU tar fills up to a
/// multiple of its blocking factor, which is 20 blocks, and can be told to use more.
const PADDING_MAX: usize = 1 << 20;

/// Why an index is not found to describe its layer.
#[derive(Debug, thiserror::Error)]
pub enum Mismatch {
    /// Not all of the layer is here, or it cannot be told which part of it is the tar.
    #[error("not all of it can be compared")]
    Absent,
    /// The tar is not the one that the image promises.
    #[error("the tar that it gives has digest {actual}, and images say that their diff id is {expected:?}")]
    Tar {
        /// From the images' configurations.
        expected: Vec<Digest>,
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

/// Compares a layer that is wholly in the cache with its index; the digest of its tar, which is one of those that images promise.
///
/// # Errors
/// [`Mismatch`]; only [`Mismatch::Absent`] says nothing about the index.
pub fn describes(cached: &CachedLayer, promised: &[Digest]) -> Result<Digest, Mismatch> {
    let index = cached.names().map_err(|_| Mismatch::Absent)?;
    let index = &*index;
    let tar_size = tar_size(index)
        .filter(|_| !promised.is_empty())
        .ok_or(Mismatch::Absent)?;
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
    // A SOCI index ends where the archive does, and the tar goes on with zeros: nobody says how many. (A layer that goes on with anything else, which
    // no tool writes, cannot be told from one whose index is false.)
    let padding = match index.verify() {
        Verify::Span => PADDING_MAX,
        Verify::Content => 0,
    };
    let actual = hash.clone().finish();
    let proof = promised_digest(hash, promised, padding).ok_or_else(|| Mismatch::Tar {
        expected: promised.to_vec(),
        actual,
    })?;
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
        Ok(own) if same_tree(&own, index) => Ok(proof),
        Ok(_) | Err(_) => Err(Mismatch::Tree),
    }
}

/// The promised digest that the tar has, perhaps with up to `padding` zeros after it.
fn promised_digest(mut hash: Hasher, promised: &[Digest], padding: usize) -> Option<Digest> {
    for _ in 0..=padding / BLOCK {
        let digest = hash.clone().finish();
        if promised.contains(&digest) {
            return Some(digest);
        }
        hash.update(&[0; BLOCK]);
    }
    None
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
/// that even the numbers of inodes are the same; but extended attributes come in any order from SOCI's tool.
fn same_tree(a: &LayerIndex, b: &LayerIndex) -> bool {
    a.inodes().len() == b.inodes().len()
        && a.inodes().iter().zip(b.inodes()).all(|(one, other)| {
            fn names<'i>(index: &'i LayerIndex, inode: &Inode) -> Vec<(&'i [u8], u32)> {
                let entries = index.entries(inode).iter();
                entries.map(|entry| (index.name(entry), entry.ino)).collect()
            }
            fn xattrs<'i>(index: &'i LayerIndex, inode: &Inode) -> Vec<(&'i [u8], &'i [u8])> {
                let mut xattrs: Vec<_> = index.xattrs(inode).collect();
                xattrs.sort_unstable();
                xattrs
            }
            without_places(one) == without_places(other)
                && a.target(one) == b.target(other)
                && names(a, one) == names(b, other)
                && xattrs(a, one) == xattrs(b, other)
        })
}

/// An inode without places within its index. The place of a file's content is none of these.
fn without_places(inode: &Inode) -> Inode {
    let mut inode = *inode;
    if inode.file_type() != mode::REG || inode.size == 0 {
        inode.data = 0;
    }
    inode.xattr_first = 0;
    inode
}

/// Bytes of the data space that are the tar, if that can be told.
fn tar_size(index: &LayerIndex) -> Option<u64> {
    if index.verify() == Verify::Span {
        return Some(index.data_size());
    }
    match index.codec() {
        Codec::None => Some(index.blob_size()),
        Codec::GzipSpans => index.checkpoints().last().map(Checkpoint::data_end),
        // Without sparse files the tar is all there is. With them the tar indexed here has another data space, which tells nothing.
        Codec::Gzip | Codec::Zstd => Some(index.data_size()),
    }
    .filter(|size| *size <= index.data_size())
}
