//! SOCI: a table of contents (zTOC) beside an unchanged layer, with checkpoints of its gzip stream.
//!
//! A zTOC ([`ztoc`]) lists the entries of the tar, and has checkpoints with windows ([`zinfo`]) and the digest of each *compressed* span.
//! [`index_from_ztoc`] makes an index of it: chunks are spans, and each is verified by that digest before it is decoded
//! ([`Verify::Span`]); the bytes of a tar without compression are what the digests are of, so that those chunks are verified like any.
//! The entries go through the same tree builder as a tar's. [`build`] makes a zTOC of a layer, byte for byte as SOCI's own tool does.
//!
//! A zTOC says whatever its writer wants it to: it describes the layer if it comes from somebody who is trusted. What is checked is
//! that it can be used at all, and does no harm: bounds, order, alignment, that every byte of a file lies in a span.
//!
//! Memory ([`memory_for`]): a file takes at least 64 bytes of a zTOC, and up to 1.3 KiB while it is read; windows take as much as they do in
//! the zTOC. A part that is referred to twice is charged twice, and what is charged is no more than there is.
//!
//! Layers with sparse files are refused: a zTOC has the place of what is stored of such a file, and not the map.

mod build;
mod flat;
mod write;
mod zinfo;
mod ztoc;

#[cfg(test)]
mod tests;

use std::borrow::Cow;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::checkpoint::Entry as SpanEntry;
use super::index::{MAX_CHUNK_LEN, MAX_DATA_SIZE};
use super::tree::{Entry, EntryKind, TreeBuilder, memory_for_blob, quoted};
use super::{Access, Checkpoint, Chunk, Codec, Digest, LayerError, LayerIndex, Verify, Windows};
use crate::sys::inflate::WINDOW;
pub use build::{SPAN_SIZE, SPAN_SIZE_MAX, SPAN_SIZE_MIN, ZtocBuilder};
use ztoc::{Algorithm, File, Ztoc};

const FORMAT: &str = "zTOC";
/// Prefix of the PAX records that are extended attributes.
const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";
/// Prefix of the PAX records of sparse files.
const SPARSE_PREFIX: &[u8] = b"GNU.sparse.";
/// Bytes of memory that a file of a zTOC takes as it stands, with the reference by which files are sorted.
const FILE_MEMORY: u64 = size_of::<File<'static>>() as u64 + 8;
/// Bytes of memory for the names of any zTOC, and for each file besides its texts: two directories that it implies are among it.
const NAMES_BASE: u64 = 4 << 20;
const NAME_MEMORY: u64 = 1024;
/// Unit of a tar, in bytes: contents begin at its multiples.
const BLOCK: u64 = 512;

fn malformed(at: usize, what: impl Into<String>) -> LayerError {
    LayerError::malformed(FORMAT, at as u64, what)
}

/// The index of a layer whose blob has `blob_size` bytes, and its windows, from its zTOC. Without `xattrs` no file gets extended
/// attributes.
///
/// # Errors
/// [`LayerError`] when the zTOC is damaged, of another layer or version, or cannot be used: then the layer can still be read as a tar.
pub fn index_from_ztoc(bytes: &[u8], blob_size: u64, xattrs: bool) -> Result<(LayerIndex, Windows), LayerError> {
    index_from_ztoc_within(bytes, blob_size, xattrs, u64::MAX)
}

/// Bytes of memory that [`index_from_ztoc`] takes besides the zTOC: its files as they stand and as they are in the index, and its windows.
///
/// # Errors
/// [`LayerError`] when it is no zTOC, or has more files than it has room for.
pub fn memory_for(bytes: &[u8]) -> Result<u64, LayerError> {
    let files = ztoc::files(bytes)? as u64;
    Ok(files * FILE_MEMORY + names_memory(bytes, files) + bytes.len() as u64)
}

/// Bytes that names and attributes may take.
fn names_memory(bytes: &[u8], files: u64) -> u64 {
    NAMES_BASE + 2 * bytes.len() as u64 + files * NAME_MEMORY
}

/// The same, with no more than `memory` bytes besides the zTOC.
///
/// # Errors
/// As [`index_from_ztoc`], and [`LayerError::TooLarge`] when it takes more.
pub fn index_from_ztoc_within(
    bytes: &[u8],
    blob_size: u64,
    xattrs: bool,
    memory: u64,
) -> Result<(LayerIndex, Windows), LayerError> {
    let needed = memory_for(bytes)?;
    if needed > memory {
        return Err(LayerError::TooLarge {
            what: "memory for the zTOC in bytes",
            value: needed,
            limit: memory,
        });
    }
    let ztoc = Ztoc::parse(bytes)?;
    let names = names_memory(bytes, ztoc.files.len() as u64).min(memory_for_blob(blob_size));
    if ztoc.compressed_size != blob_size {
        let what = format!("it is of a blob of {} bytes, not of {blob_size}", ztoc.compressed_size);
        return Err(malformed(0, what));
    }
    if ztoc.uncompressed_size > MAX_DATA_SIZE {
        return Err(LayerError::TooLarge {
            what: "uncompressed size of the layer",
            value: ztoc.uncompressed_size,
            limit: MAX_DATA_SIZE,
        });
    }
    if usize::try_from(ztoc.last_span)
        .ok()
        .and_then(|last| last.checked_add(1))
        != Some(ztoc.digests.len())
    {
        let what = format!(
            "its last span has the number {}, of {}",
            ztoc.last_span,
            ztoc.digests.len()
        );
        return Err(malformed(0, what));
    }
    let tree = tree(&ztoc, xattrs, names)?;
    let codec = match ztoc.algorithm {
        Algorithm::Gzip => Codec::GzipSpans,
        Algorithm::Uncompressed => Codec::None,
    };
    let mut parts = tree.finish().into_parts(Access::Ranges, codec);
    parts.blob_size = blob_size;
    let mut windows = Windows::new();
    match ztoc.algorithm {
        Algorithm::Gzip => {
            (parts.checkpoints, windows) = spans(&ztoc)?;
            parts.verify = Verify::Span;
            parts.data_size = ztoc.uncompressed_size;
            parts.chunks = parts.checkpoints.iter().map(chunk_of).collect();
        }
        Algorithm::Uncompressed => {
            // What comes after the end of the archive is a part of the tar, too.
            parts.data_size = blob_size;
            parts.chunks = slices(&ztoc)?;
        }
    }
    Ok((LayerIndex::new(parts)?, windows))
}

/// Positions of the chunks of an index that the spans `first` to `last` (both included) of its zTOC are, for prefetching.
pub fn chunks_of_spans(index: &LayerIndex, first: u64, last: u64) -> std::ops::Range<usize> {
    let bound = |span: u64| usize::try_from(span).unwrap_or(usize::MAX).min(index.chunks().len());
    bound(first)..bound(last.saturating_add(1)).max(bound(first))
}

fn chunk_of(checkpoint: &Checkpoint) -> Chunk {
    Chunk {
        data_offset: checkpoint.data_offset,
        data_len: checkpoint.data_len,
        blob_offset: checkpoint.start(),
        blob_len: checkpoint.blob_len,
        skip: 0,
        digest: Digest::from_bytes([0; Digest::LEN]),
    }
}

/// The spans of a gzip layer. Those without output, and those behind the end of the archive, are left out.
fn spans(ztoc: &Ztoc<'_>) -> Result<(Vec<Checkpoint>, Windows), LayerError> {
    let points = zinfo::gzip(&ztoc.zinfo)?;
    if points.len() != ztoc.digests.len() {
        let what = format!(
            "it has {} checkpoints, and digests of {} spans",
            points.len(),
            ztoc.digests.len()
        );
        return Err(malformed(0, what));
    }
    if points.first().is_none_or(|first| first.data_offset != 0) {
        return Err(malformed(0, "no span holds the beginning of the tar"));
    }
    let (mut checkpoints, mut windows) = (Vec::with_capacity(points.len()), Vec::with_capacity(points.len()));
    for (at, (point, digest)) in points.iter().zip(&ztoc.digests).enumerate() {
        let next = points.get(at + 1);
        let blob_end = next.map_or(ztoc.compressed_size, |next| next.blob_offset);
        let data_end = next.map_or(ztoc.uncompressed_size, |next| next.data_offset);
        let data_end = data_end.min(ztoc.uncompressed_size);
        if next.is_some_and(|next| next.data_offset < point.data_offset) {
            return Err(malformed(at, "its checkpoints are not in order"));
        }
        if data_end <= point.data_offset {
            continue;
        }
        let start = point.blob_offset.checked_sub(u64::from(point.bits > 0));
        let blob_len = start.and_then(|start| blob_end.checked_sub(start));
        // A stream refers back to what there is, the rest of the window is padding.
        let known = usize::try_from(point.data_offset).unwrap_or(usize::MAX).min(WINDOW);
        let window = point
            .window
            .get(point.window.len().saturating_sub(known)..)
            .unwrap_or_default();
        checkpoints.push(Checkpoint {
            data_offset: point.data_offset,
            data_len: span_len(data_end - point.data_offset)?,
            blob_offset: point.blob_offset,
            blob_len: span_len(blob_len.ok_or_else(|| malformed(at, "its checkpoints are not in order"))?)?,
            entry: SpanEntry::Block {
                bits: point.bits,
                window: window.len() as u32,
            },
            digest: digest_of(at, digest)?,
        });
        windows.push(window);
    }
    Ok((checkpoints, Windows::of(windows)?))
}

/// The spans of a layer without compression.
fn slices(ztoc: &Ztoc<'_>) -> Result<Vec<Chunk>, LayerError> {
    let (span, size) = zinfo::tar(&ztoc.zinfo)?;
    let count = size.div_ceil(span.into());
    if size != ztoc.compressed_size || count != ztoc.digests.len() as u64 {
        let what = format!(
            "{} spans of {span} bytes do not make a tar of {size}",
            ztoc.digests.len()
        );
        return Err(malformed(0, what));
    }
    let slice = |(at, digest): (usize, &Cow<'_, [u8]>)| {
        let offset = at as u64 * u64::from(span);
        let len = span_len((size - offset).min(span.into()))?;
        Ok(Chunk {
            data_offset: offset,
            data_len: len,
            blob_offset: offset,
            blob_len: len,
            skip: 0,
            digest: digest_of(at, digest)?,
        })
    };
    ztoc.digests.iter().enumerate().map(slice).collect()
}

fn span_len(len: u64) -> Result<u32, LayerError> {
    match u32::try_from(len) {
        Ok(len) if len <= MAX_CHUNK_LEN => Ok(len),
        _ => Err(LayerError::TooLarge {
            what: "length of a span",
            value: len,
            limit: MAX_CHUNK_LEN.into(),
        }),
    }
}

fn digest_of(at: usize, text: &[u8]) -> Result<Digest, LayerError> {
    let digest = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
    digest.ok_or_else(|| malformed(at, format!("the digest of a span is {}", quoted(text))))
}

/// Names and attributes.
fn tree(ztoc: &Ztoc<'_>, xattrs: bool, memory: u64) -> Result<TreeBuilder, LayerError> {
    let mut tree = TreeBuilder::with_memory(FORMAT, memory);
    // In the order of the tar, which decides what replaces what.
    let mut files: Vec<&File<'_>> = ztoc.files.iter().collect();
    files.sort_by_key(|file| file.offset);
    for file in files {
        let end = file.offset.checked_add(file.size);
        if end.is_none_or(|end| end > ztoc.uncompressed_size) || !file.offset.is_multiple_of(BLOCK) {
            return Err(file.wrong("its content lies outside, or at no block"));
        }
        tree.add(file.offset, &file.entry(xattrs)?)?;
    }
    Ok(tree)
}

impl File<'_> {
    fn entry(&self, xattrs: bool) -> Result<Entry<'_>, LayerError> {
        let device = || {
            let number = |number: i64| {
                u32::try_from(number).map_err(|_| self.wrong(format!("no device has the number {number}")))
            };
            Ok::<_, LayerError>((number(self.major)?, number(self.minor)?))
        };
        let kind = match &*self.kind {
            b"reg" => EntryKind::File {
                size: self.size,
                data: self.offset,
            },
            b"dir" => EntryKind::Dir,
            b"symlink" => EntryKind::Symlink(&self.link),
            b"hardlink" => EntryKind::Hardlink(&self.link),
            b"char" => device().map(|(major, minor)| EntryKind::Char { major, minor })?,
            b"block" => device().map(|(major, minor)| EntryKind::Block { major, minor })?,
            b"fifo" => EntryKind::Fifo,
            other => return Err(self.wrong(format!("it is of the unknown type {}", quoted(other)))),
        };
        if self.records.iter().any(|(key, _)| key.starts_with(SPARSE_PREFIX)) {
            return Err(self.wrong("it is sparse, and its map is not known"));
        }
        let (mtime, mtime_nsec) = self.time()?;
        let xattr = |(key, value): &'_ (Cow<'_, [u8]>, Cow<'_, [u8]>)| {
            let name = key.strip_prefix(XATTR_PREFIX)?;
            Some((Cow::Owned(name.to_vec()), Cow::Owned(value.to_vec())))
        };
        Ok(Entry {
            path: &self.name,
            kind,
            // Only permissions are looked at.
            mode: self.mode as u32,
            uid: self.uid,
            gid: self.gid,
            mtime,
            mtime_nsec,
            xattrs: match xattrs {
                true => self.records.iter().filter_map(xattr).collect(),
                false => Vec::new(),
            },
        })
    }

    /// Seconds since the epoch, and nanoseconds after them. Without a time, as for years that it cannot write, it is the epoch.
    fn time(&self) -> Result<(i64, u32), LayerError> {
        if self.time.is_empty() {
            return Ok((0, 0));
        }
        let text = std::str::from_utf8(&self.time).ok();
        let time = text.and_then(|text| OffsetDateTime::parse(text, &Rfc3339).ok());
        let time = time.ok_or_else(|| self.wrong(format!("its time is {}", quoted(&self.time))))?;
        Ok((time.unix_timestamp(), time.nanosecond()))
    }

    fn wrong(&self, what: impl AsRef<str>) -> LayerError {
        let what = format!("entry {}: {}", quoted(&self.name), what.as_ref());
        LayerError::malformed(FORMAT, self.offset, what)
    }
}
