//! Where the contents of a table's files are: in the blob, and in the data space.

use super::entry::TocEntry;
use crate::layer::index::{MAX_CHUNK_LEN, MAX_CHUNKS, MAX_DATA_SIZE};
use crate::layer::tree::quoted;
use crate::layer::{Chunk, LayerError};

/// Alignment of contents in the data space, in bytes: of those that fill a page, and of others.
const PAGE: u64 = 4096;
const SECTOR: u64 = 512;
/// Type of a chunk that holds nothing but zeros, for which nothing need be fetched.
const ZEROS: &str = "zeros";

/// Where contents are, in the blob and in the data space.
pub(super) struct Layout {
    /// Regular files in the order of the table.
    pub files: Vec<File>,
    pub chunks: Vec<Chunk>,
    pub data_size: u64,
}

/// A regular file.
pub(super) struct File {
    /// Position of its entry in the table.
    at: usize,
    /// Its parts, side by side in the list of all parts.
    parts: std::ops::Range<usize>,
    /// Where its content begins in the data space.
    pub data: u64,
}

/// A chunk as the table has it.
struct Part {
    /// Its entry's position in the table.
    at: usize,
    /// Where it begins in its file, and its length in bytes.
    offset: u64,
    len: u64,
    /// Where its gzip member or zstd frame begins in the blob.
    member: u64,
    /// Uncompressed bytes of the member before it.
    inner: u64,
    /// Whether it holds nothing but zeros: then its bytes are not fetched, and its digest is not looked at.
    zeros: bool,
}

impl Layout {
    /// `end` is where the last member with contents ends at the latest.
    pub fn of(entries: &[TocEntry<'_>], end: u64) -> Result<Layout, LayerError> {
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
            // Between the end of a file and the next one's content may be a member with nothing but headers.
            let file_end = entries[file.at].end_offset;
            for part in parts[file.parts.clone()].iter().filter(|part| !part.zeros) {
                let next = members.partition_point(|member| *member <= part.member);
                let mut next = members.get(next).copied().unwrap_or(end);
                if part.member < file_end {
                    next = next.min(file_end);
                }
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
        if !matches!(&*entry.chunk_type, "" | ZEROS) {
            let what = format!("its chunk is of type {}", quoted(entry.chunk_type.as_bytes()));
            return Err(entry.wrong(at, what));
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
            zeros: entry.chunk_type == ZEROS,
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
