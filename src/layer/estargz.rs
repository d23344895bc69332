//! eStargz: a tar.gz of many gzip members with a table of contents (TOC), from which single files can be had.
//!
//! A blob is: gzip members with the entries of a tar (a member begins where a file's content or a chunk of it begins), the member with
//! the TOC (a tar of one file, `stargz.index.json`), and a footer that says where the TOC is ([`find_toc`]). The digest of
//! the TOC's JSON is in the image's manifest, and the digest of each chunk in the TOC: nothing of the TOC is looked at before its own
//! digest is right.
//!
//! The TOC does not say where contents are in the tar, so the data space ([`super::index`]) holds them one after the other in the order
//! of the blob, each 4096-aligned, or 512-aligned if it is smaller than 4096 bytes. Every byte of them belongs to a verified chunk.
//!
//! What the TOC cannot tell: fractions of seconds, and names that are not UTF-8 (then it is refused, and the layer has to be read
//! as a tar).

mod footer;
mod toc;

#[cfg(test)]
mod tests;

use std::io::Read;

use super::compression::gzip_members;
use super::index::{MAX_CHUNK_LEN, MAX_CHUNKS, MAX_DATA_SIZE};
use super::tree::{TreeBuilder, quoted};
use super::{Access, Chunk, Codec, Digest, LayerError, LayerIndex, tar};
pub use footer::{FOOTER_LEN_MAX, find_toc};
use toc::{Toc, TocEntry};

const FORMAT: &str = "eStargz TOC";
/// Largest TOC, in bytes, compressed or not: about 400,000 files. What containers/storage accepts, too.
const MAX_TOC_LEN: u64 = 150 << 20;
/// Version of the TOC that is read here, the only one there is.
const VERSION: u64 = 1;
/// Name of the TOC in its tar.
const TOC_NAME: &[u8] = b"stargz.index.json";
/// Files in the root that are there for snapshotters, and that no container sees: they say how far to prefetch, and hold the TOC.
const HIDDEN: [&[u8]; 3] = [b".prefetch.landmark", b".no.prefetch.landmark", TOC_NAME];
/// Alignment of contents in the data space, in bytes: of those that fill a page, and of others.
const PAGE: u64 = 4096;
const SECTOR: u64 = 512;

/// Where the member with the table of contents is in the blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TocLocation {
    /// Its first byte.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// The index of an eStargz layer, from the `member` of its blob that holds the table of contents. The member is at `toc_offset` of a blob
/// of `blob_size` bytes. `expected` is the digest of the table's JSON, as the image's manifest has it.
///
/// # Errors
/// [`LayerError::DigestMismatch`] when the table is not the expected one, [`LayerError::Truncated`] when the member ends early;
/// another [`LayerError`] when the table cannot be used: then the layer can still be read as a tar.
pub fn index_from_toc(
    member: &[u8],
    toc_offset: u64,
    blob_size: u64,
    expected: &Digest,
) -> Result<LayerIndex, LayerError> {
    let json = unpack(member)?;
    let actual = Digest::of(&json);
    if actual != *expected {
        return Err(LayerError::DigestMismatch {
            what: "the eStargz table of contents",
            expected: *expected,
            actual,
        });
    }
    let toc: Toc<'_> =
        serde_json::from_slice(&json).map_err(|error| LayerError::malformed(FORMAT, 0, error.to_string()))?;
    if toc.version != VERSION {
        return Err(LayerError::Unsupported {
            what: format!("version {} of the eStargz table of contents", toc.version),
        });
    }
    let layout = Layout::of(&toc.entries, toc_offset.min(blob_size))?;
    let mut tree = TreeBuilder::new(FORMAT);
    let mut files = layout.files.iter();
    for (at, entry) in toc.entries.iter().enumerate() {
        if entry.kind == "chunk" {
            continue;
        }
        let data = match &*entry.kind {
            "reg" => files.next().map_or(0, |file| file.data),
            _ => 0,
        };
        if !is_hidden(&entry.name) {
            tree.add(at as u64, &entry.entry(at, data)?)?;
        }
    }
    let mut parts = tree.finish().into_parts(Access::Ranges, Codec::Gzip);
    parts.data_size = layout.data_size;
    parts.blob_size = blob_size;
    parts.chunks = layout.chunks;
    LayerIndex::new(parts)
}

/// The JSON in the member. It is not to be trusted yet.
fn unpack(member: &[u8]) -> Result<Vec<u8>, LayerError> {
    let failed = |what: &str, error: std::io::Error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => LayerError::Truncated {
            format: FORMAT,
            length: member.len() as u64,
            what: what.to_owned(),
        },
        _ => LayerError::malformed(FORMAT, 0, format!("{what}: {error}")),
    };
    let mut tar = gzip_members(member);
    let mut header = [0; 512];
    tar.read_exact(&mut header)
        .map_err(|error| failed("the header of its tar", error))?;
    let (name, size) = tar::file_header(&header).map_err(|what| LayerError::malformed(FORMAT, 0, what))?;
    if name != TOC_NAME {
        let what = format!("its tar holds {}, not {}", quoted(&name), quoted(TOC_NAME));
        return Err(LayerError::malformed(FORMAT, 0, what));
    }
    if size > MAX_TOC_LEN {
        return Err(LayerError::TooLarge {
            what: "size of the eStargz table of contents",
            value: size,
            limit: MAX_TOC_LEN,
        });
    }
    let mut json = Vec::new();
    tar.take(size)
        .read_to_end(&mut json)
        .map_err(|error| failed("its JSON", error))?;
    if (json.len() as u64) < size {
        return Err(failed("its JSON", std::io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(json)
}

fn is_hidden(name: &str) -> bool {
    let mut parts = name.split('/').filter(|part| !matches!(*part, "" | "."));
    let first = parts.next().unwrap_or_default();
    parts.next().is_none() && HIDDEN.contains(&first.as_bytes())
}

/// Where contents are, in the blob and in the data space.
struct Layout {
    /// Regular files in the order of the table.
    files: Vec<File>,
    chunks: Vec<Chunk>,
    data_size: u64,
}

/// A regular file.
struct File {
    /// Position of its entry in the table.
    at: usize,
    /// Its parts, side by side in the list of all parts.
    parts: std::ops::Range<usize>,
    /// Where its content begins in the data space.
    data: u64,
}

/// A chunk as the table has it.
struct Part {
    /// Its entry's position in the table.
    at: usize,
    /// Where it begins in its file, and its length in bytes.
    offset: u64,
    len: u64,
    /// Where its gzip member begins in the blob.
    member: u64,
    /// Uncompressed bytes of the member before it.
    inner: u64,
}

impl Layout {
    /// `end` is where the last member with contents ends at the latest.
    fn of(entries: &[TocEntry<'_>], end: u64) -> Result<Layout, LayerError> {
        let (mut files, mut parts) = files_and_parts(entries)?;
        let mut members: Vec<u64> = parts.iter().map(|part| part.member).collect();
        members.sort_unstable();
        members.dedup();
        // In the order of the blob, so that neighbours there are neighbours in the data space.
        let mut order: Vec<usize> = (0..files.len()).filter(|&file| !files[file].parts.is_empty()).collect();
        for &file in &order {
            let file = &files[file];
            check_coverage(entries, file, &mut parts[file.parts.clone()])?;
        }
        order.sort_by_key(|&file| {
            let first = &parts[files[file].parts.start];
            (first.member, first.inner)
        });
        let mut chunks = Vec::with_capacity(parts.len());
        let mut data_size = 0u64;
        for file in order {
            let file = &mut files[file];
            let size = entries[file.at].size;
            let data = data_size.next_multiple_of(if size < PAGE { SECTOR } else { PAGE });
            file.data = data;
            data_size = data
                .checked_add(size)
                .filter(|end| *end <= MAX_DATA_SIZE)
                .ok_or(LayerError::TooLarge {
                    what: "uncompressed size of the layer",
                    value: data.saturating_add(size),
                    limit: MAX_DATA_SIZE,
                })?;
            let whole = file.parts.len() == 1;
            for part in &parts[file.parts.clone()] {
                let next = members.partition_point(|member| *member <= part.member);
                let next = members.get(next).copied().unwrap_or(end);
                let entry = &entries[part.at];
                let blob_len = next
                    .checked_sub(part.member)
                    .filter(|len| *len > 0 && next <= end)
                    .ok_or_else(|| {
                        entry.wrong(
                            part.at,
                            format!("it is at {} of the blob, behind what it can hold", part.member),
                        )
                    })?;
                chunks.push(Chunk {
                    data_offset: data + part.offset,
                    data_len: chunk_len("length of a chunk", part.len)?,
                    blob_offset: part.member,
                    blob_len: chunk_len("compressed length of a chunk", blob_len)?,
                    skip: chunk_len("bytes in front of a chunk", part.inner)?,
                    digest: entry.vouched(part.at, whole)?,
                });
            }
        }
        Ok(Layout {
            files,
            chunks,
            data_size,
        })
    }
}

/// All regular files, and their parts in the order of the table.
fn files_and_parts(entries: &[TocEntry<'_>]) -> Result<(Vec<File>, Vec<Part>), LayerError> {
    let (mut files, mut parts): (Vec<File>, Vec<Part>) = (Vec::new(), Vec::new());
    // The file whose chunks may follow.
    let mut open = false;
    for (at, entry) in entries.iter().enumerate() {
        match &*entry.kind {
            "reg" => {
                let parts = parts.len()..parts.len();
                files.push(File { at, parts, data: 0 });
                open = true;
                if entry.size == 0 {
                    continue;
                }
            }
            "chunk" => {}
            _ => {
                open = false;
                continue;
            }
        }
        let Some(file) = files.last_mut().filter(|_| open) else {
            return Err(entry.wrong(at, "a chunk comes after something that is no regular file"));
        };
        let len = match entry.chunk_size {
            0 => entries[file.at].size.checked_sub(entry.chunk_offset),
            len => Some(len),
        };
        parts.push(Part {
            at,
            offset: entry.chunk_offset,
            len: len.ok_or_else(|| entry.wrong(at, "a chunk begins behind its file's end"))?,
            member: entry.offset,
            inner: entry.inner_offset,
        });
        file.parts.end = parts.len();
        if parts.len() > MAX_CHUNKS {
            return Err(LayerError::TooLarge {
                what: "number of chunks",
                value: parts.len() as u64,
                limit: MAX_CHUNKS as u64,
            });
        }
    }
    Ok((files, parts))
}

/// Puts the parts of a file in order, and checks that each byte of the file is in one of them.
fn check_coverage(entries: &[TocEntry<'_>], file: &File, parts: &mut [Part]) -> Result<(), LayerError> {
    parts.sort_by_key(|part| part.offset);
    let mut end = 0u64;
    for part in parts.iter() {
        if part.offset != end || part.len == 0 {
            let what = format!(
                "a chunk of {} bytes is at {}, where {end} is due",
                part.len, part.offset
            );
            return Err(entries[file.at].wrong(part.at, what));
        }
        end = end.saturating_add(part.len);
    }
    let size = entries[file.at].size;
    if end != size {
        let what = format!("its chunks have {end} of its {size} bytes");
        return Err(entries[file.at].wrong(file.at, what));
    }
    Ok(())
}

fn chunk_len(what: &'static str, len: u64) -> Result<u32, LayerError> {
    match u32::try_from(len) {
        Ok(len) if len <= MAX_CHUNK_LEN => Ok(len),
        _ => Err(LayerError::TooLarge {
            what,
            value: len,
            limit: MAX_CHUNK_LEN.into(),
        }),
    }
}
