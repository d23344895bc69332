//! The rules that every index keeps, so that its users need not check anything again.
//!
//! Records are not shared: directories have entries of their own, and entries, symlinks and inodes texts and attributes of their own (only
//! the texts of attributes are there once). What is made of an index, a merged chain or an image, is therefore no larger than it by more
//! than a factor, and what takes time for each entry ends.

use super::{
    Access, Chunk, Codec, FORMAT, IndexParts, MAX_CHUNK_LEN, MAX_CHUNKS, MAX_DATA_SIZE, MAX_INODES, MAX_NAME_LEN,
    MAX_STRINGS, MAX_TARGET_LEN, NO_OWNER, ROOT_INO, Verify, mode, valid_name,
};
use crate::layer::checkpoint::{Entry, MAX_WINDOW};
use crate::layer::tree::MAX_XATTR_VALUE;
use crate::layer::{Checkpoint, Digest, LayerError};

/// Checks the parts of an index: limits, and that every reference points at something.
pub(super) fn check(p: &IndexParts) -> Result<(), LayerError> {
    let bad = |at: usize, what: &str| Err(LayerError::malformed(FORMAT, at as u64, what));
    let limit = |what, value: u64, limit: u64| {
        if value > limit {
            Err(LayerError::TooLarge { what, value, limit })
        } else {
            Ok(())
        }
    };
    limit("number of inodes", p.inodes.len() as u64, MAX_INODES as u64)?;
    limit(
        "number of directory entries",
        p.dirents.len() as u64,
        2 * MAX_INODES as u64,
    )?;
    limit(
        "number of extended attributes",
        p.xattrs.len() as u64,
        2 * MAX_INODES as u64,
    )?;
    limit("number of chunks", p.chunks.len() as u64, MAX_CHUNKS as u64)?;
    limit(
        "length of names and attributes",
        p.strings.len() as u64,
        MAX_STRINGS as u64,
    )?;
    limit("uncompressed size of the layer", p.data_size, MAX_DATA_SIZE)?;

    let string = |offset: u32, len: u32| {
        p.strings
            .get(offset as usize..(offset as usize).checked_add(len as usize)?)
    };
    let range_ok = |first: u64, count: u64, len: usize| first.checked_add(count).is_some_and(|end| end <= len as u64);
    let mut references = vec![0u32; p.inodes.len()];
    // What all inodes together refer to.
    let (mut entries, mut attributes, mut texts) = (0u64, 0u64, 0u64);
    match p.inodes.first() {
        Some(root) if root.is_dir() && root.parent == ROOT_INO => references[0] = 1,
        _ => return bad(0, "the first inode is not a root directory"),
    }
    for (i, inode) in p.inodes.iter().enumerate() {
        if !range_ok(inode.xattr_first.into(), inode.xattr_count.into(), p.xattrs.len()) {
            return bad(i, "an inode's extended attributes lie outside");
        }
        attributes += u64::from(inode.xattr_count);
        if attributes > p.xattrs.len() as u64 {
            return bad(i, "inodes share extended attributes");
        }
        if inode.mtime_nsec >= 1_000_000_000 {
            return bad(i, "an inode's nanoseconds are a second or more");
        }
        if inode.uid == NO_OWNER || inode.gid == NO_OWNER {
            return bad(i, "an inode has an owner that nobody is");
        }
        if !inode.has_valid_flags() {
            return bad(i, "an inode's flags are unknown or do not go with its type");
        }
        match inode.file_type() {
            mode::DIR => {
                if !range_ok(inode.data, inode.count.into(), p.dirents.len()) {
                    return bad(i, "a directory's entries lie outside");
                }
                entries += u64::from(inode.count);
                if entries > p.dirents.len() as u64 {
                    return bad(i, "directories share entries");
                }
                let first = inode.data as usize;
                let mut previous: &[u8] = b"";
                for entry in &p.dirents[first..first + inode.count as usize] {
                    let Some(name) = string(entry.name, entry.name_len) else {
                        return bad(i, "a name lies outside");
                    };
                    if !valid_name(name) {
                        return bad(i, "a directory entry has a name that no file can have");
                    }
                    if name <= previous {
                        return bad(i, "a directory's names are not in order");
                    }
                    previous = name;
                    texts += u64::from(entry.name_len);
                    let Some(target) = (entry.ino as usize).checked_sub(1).and_then(|at| p.inodes.get(at)) else {
                        return bad(i, "a directory entry names no inode");
                    };
                    let count = &mut references[entry.ino as usize - 1];
                    if target.is_dir() && (*count > 0 || target.parent as usize != i + 1) {
                        return bad(i, "a directory has two parents");
                    }
                    *count += 1;
                }
            }
            mode::REG => {
                if inode.data.checked_add(inode.size).is_none_or(|end| end > p.data_size) {
                    return bad(i, "a file's content lies outside the data space");
                }
            }
            mode::LNK => {
                let fits = u32::try_from(inode.data).ok().zip(u32::try_from(inode.size).ok());
                match fits.and_then(|(offset, len)| string(offset, len)) {
                    Some(target) if !target.is_empty() && target.len() <= MAX_TARGET_LEN && !target.contains(&0) => {
                        texts += target.len() as u64;
                    }
                    _ => return bad(i, "a symlink has no valid target"),
                }
            }
            mode::CHR | mode::BLK | mode::FIFO | mode::SOCK => {}
            _ => return bad(i, "an inode has no file type"),
        }
    }
    if references.contains(&0) {
        return bad(0, "an inode has no name");
    }
    if texts > p.strings.len() as u64 {
        return bad(0, "names share their texts");
    }
    for (i, x) in p.xattrs.iter().enumerate() {
        match (string(x.name, x.name_len), string(x.value, x.value_len)) {
            (Some(name), Some(value))
                if !name.is_empty()
                    && name.len() <= MAX_NAME_LEN
                    && !name.contains(&0)
                    && value.len() <= MAX_XATTR_VALUE => {}
            _ => return bad(i, "an extended attribute has no valid name or value"),
        }
    }
    let mut end = 0;
    for (i, chunk) in p.chunks.iter().enumerate() {
        if chunk.data_len == 0 || chunk.data_len > MAX_CHUNK_LEN || chunk.blob_len > MAX_CHUNK_LEN {
            return bad(i, "a chunk's length is 0 or over the limit");
        }
        if chunk.data_offset < end {
            return bad(i, "chunks overlap or are not in order");
        }
        match chunk.data_offset.checked_add(chunk.data_len.into()) {
            Some(e) if e <= p.data_size => end = e,
            _ => return bad(i, "a chunk lies outside the data space"),
        }
        if chunk
            .blob_offset
            .checked_add(chunk.blob_len.into())
            .is_none_or(|e| e > p.blob_size)
        {
            return bad(i, "a chunk lies outside the blob");
        }
        if (p.access == Access::Ranges) == (chunk.blob_len == 0) {
            return bad(
                i,
                "a chunk's place in the blob does not fit the way the layer is accessed",
            );
        }
    }
    checkpoints(p)
}

/// Checks the checkpoints, and that every chunk lies in the span of one.
fn checkpoints(p: &IndexParts) -> Result<(), LayerError> {
    let bad = |at: usize, what: &str| Err(LayerError::malformed(FORMAT, at as u64, what));
    let spans = p.codec == Codec::GzipSpans;
    if !spans && (!p.checkpoints.is_empty() || p.verify != Verify::Content) {
        return bad(0, "there are checkpoints, or digests of spans, and no spans");
    }
    if spans && p.access != Access::Ranges {
        return bad(0, "there are spans in a layer without ranges");
    }
    if p.checkpoints.len() > MAX_CHUNKS {
        return Err(LayerError::TooLarge {
            what: "number of checkpoints",
            value: p.checkpoints.len() as u64,
            limit: MAX_CHUNKS as u64,
        });
    }
    let (mut data_end, mut blob_start) = (0, None);
    for (i, checkpoint) in p.checkpoints.iter().enumerate() {
        let Checkpoint { data_len, blob_len, .. } = *checkpoint;
        if data_len == 0 || data_len > MAX_CHUNK_LEN || blob_len == 0 || blob_len > MAX_CHUNK_LEN {
            return bad(i, "the length of a span is 0 or over the limit");
        }
        match checkpoint.entry {
            Entry::Block { bits: 8.., .. } => return bad(i, "a checkpoint has more bits than a byte"),
            Entry::Block { bits: 1.., .. } if checkpoint.blob_offset == 0 => {
                return bad(i, "a checkpoint begins before the blob");
            }
            Entry::Block { window, .. } if window as usize > MAX_WINDOW => {
                return bad(i, "a window is longer than a stream refers back");
            }
            Entry::Block { .. } | Entry::Member => {}
        }
        // What a checkpoint skips lies in no span, and is zeros.
        if checkpoint.data_offset < data_end || blob_start.is_some_and(|start| checkpoint.start() <= start) {
            return bad(i, "checkpoints overlap or are not in order");
        }
        let end = checkpoint.data_offset.checked_add(data_len.into());
        let blob_end = checkpoint.start().checked_add(blob_len.into());
        match (end, blob_end) {
            (Some(end), Some(blob_end)) if end <= p.data_size && blob_end <= p.blob_size => data_end = end,
            _ => return bad(i, "a span lies outside"),
        }
        blob_start = Some(checkpoint.start());
    }
    if !spans {
        return Ok(());
    }
    let fits = |chunk: &Chunk| {
        let found = p
            .checkpoints
            .binary_search_by_key(&chunk.blob_offset, Checkpoint::start);
        found
            .ok()
            .and_then(|at| p.checkpoints.get(at))
            .is_some_and(|checkpoint| {
                chunk.blob_len == checkpoint.blob_len
                    && u64::from(chunk.skip) + u64::from(chunk.data_len) <= checkpoint.data_len.into()
            })
    };
    let unknown = Digest::from_bytes([0; Digest::LEN]);
    for (i, chunk) in p.chunks.iter().enumerate() {
        if !fits(chunk) {
            return bad(i, "a chunk is not in the span of a checkpoint");
        }
        if (p.verify == Verify::Span) != (chunk.digest == unknown) {
            return bad(i, "a chunk has a digest that nobody knows, or none");
        }
    }
    Ok(())
}
