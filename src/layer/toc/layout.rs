//! Where the contents of a table's files are: in the blob, and in the data space.

use std::borrow::Cow;
use std::ops::Range;

use super::entry::{TocEntry, wrong};
use crate::layer::digest::InvalidDigest;
use crate::layer::index::{MAX_CHUNK_LEN, MAX_CHUNKS, MAX_DATA_SIZE};
use crate::layer::tree::quoted;
use crate::layer::{Chunk, Digest, LayerError};

/// Alignment of contents in the data space, in bytes: of those that fill a page, and of others.
const PAGE: u64 = 4096;
const SECTOR: u64 = 512;
/// Type of a chunk that holds nothing but zeros, for which nothing need be fetched.
const ZEROS: &str = "zeros";
/// Bytes of memory that a file takes, while the list of them grows; and a part, with its chunk and its place in two lists.
const FILE_COST: u64 = 2 * size_of::<File<'static>>() as u64;
const PART_COST: u64 = 2 * size_of::<Part<'static>>() as u64 + size_of::<Chunk>() as u64 + 32;

/// Files and their parts, in the order of the table.
#[derive(Default)]
pub(super) struct Contents<'a> {
    files: Vec<File<'a>>,
    parts: Vec<Part<'a>>,
    /// Whether chunks of the last file may follow.
    open: bool,
    /// Bytes of texts that are not in the table itself.
    texts: u64,
}

/// Where contents are, in the blob and in the data space.
pub(super) struct Layout {
    /// Where each file's content begins in the data space.
    pub files: Vec<u64>,
    pub chunks: Vec<Chunk>,
    pub data_size: u64,
}

/// A regular file.
struct File<'a> {
    /// Position of its entry in the table.
    at: u32,
    /// Its parts, side by side in the list of all parts.
    parts: Range<u32>,
    size: u64,
    /// Where its last member ends in the blob; 0 if that is not said.
    end: u64,
    name: Cow<'a, str>,
    /// Digest of the whole file.
    digest: Cow<'a, str>,
}

impl File<'_> {
    fn parts(&self) -> Range<usize> {
        self.parts.start as usize..self.parts.end as usize
    }

    /// An error about its entry, or that of a chunk of it, at this position in the table.
    fn wrong(&self, at: u32, what: impl AsRef<str>) -> LayerError {
        wrong(&self.name, at as usize, what)
    }

    /// The digest that vouches for a part: its own, or, if the part is the whole file, the file's.
    fn vouched(&self, part: &Part<'_>) -> Result<Digest, LayerError> {
        let text = match part.digest.is_empty() && self.parts.len() == 1 {
            true => &self.digest,
            false => &part.digest,
        };
        if text.is_empty() {
            return Err(self.wrong(part.at, "a chunk of it has no digest"));
        }
        text.parse()
            .map_err(|error: InvalidDigest| self.wrong(part.at, error.to_string()))
    }
}

/// A chunk as the table has it.
struct Part<'a> {
    /// Its entry's position in the table.
    at: u32,
    /// Whether it holds nothing but zeros: then its bytes are not fetched, and its digest is not looked at.
    zeros: bool,
    /// Where it begins in its file, and its length in bytes.
    offset: u64,
    len: u64,
    /// Where its gzip member or zstd frame begins in the blob.
    member: u64,
    /// Uncompressed bytes of the member before it.
    inner: u64,
    digest: Cow<'a, str>,
}

impl<'a> Contents<'a> {
    /// Takes in the entry at position `at` of the table; the number of the file that it is, if it is a regular one.
    pub fn push(&mut self, at: usize, entry: &TocEntry<'a>) -> Result<Option<u64>, LayerError> {
        // The number of entries has a limit.
        let position = at as u32;
        let number = match &*entry.kind {
            "reg" => {
                let first = self.parts.len() as u32;
                let number = self.files.len() as u64;
                let (name, digest) = (self.text(&entry.name), self.text(&entry.digest));
                self.files.push(File {
                    at: position,
                    parts: first..first,
                    size: entry.size,
                    end: entry.end_offset,
                    name,
                    digest,
                });
                self.open = true;
                if entry.size == 0 {
                    return Ok(Some(number));
                }
                Some(number)
            }
            "chunk" => None,
            _ => {
                self.open = false;
                return Ok(None);
            }
        };
        if !matches!(&*entry.chunk_type, "" | ZEROS) {
            let what = format!("its chunk is of type {}", quoted(entry.chunk_type.as_bytes()));
            return Err(entry.wrong(at, what));
        }
        let digest = self.text(&entry.chunk_digest);
        let Some(file) = self.files.last_mut().filter(|_| self.open) else {
            return Err(entry.wrong(at, "a chunk comes after something that is no regular file"));
        };
        let len = match entry.chunk_size {
            0 => file.size.checked_sub(entry.chunk_offset),
            len => Some(len),
        };
        self.parts.push(Part {
            at: position,
            offset: entry.chunk_offset,
            len: len.ok_or_else(|| entry.wrong(at, "a chunk begins behind its file's end"))?,
            member: entry.offset,
            inner: entry.inner_offset,
            zeros: entry.chunk_type == ZEROS,
            digest,
        });
        file.parts.end = self.parts.len() as u32;
        if self.parts.len() > MAX_CHUNKS {
            return Err(LayerError::TooLarge {
                what: "number of chunks",
                value: self.parts.len() as u64,
                limit: MAX_CHUNKS as u64,
            });
        }
        Ok(number)
    }

    /// Bytes of memory that it takes, and will take when it is laid out.
    pub fn memory(&self) -> u64 {
        FILE_COST * self.files.len() as u64 + PART_COST * self.parts.len() as u64 + self.texts
    }

    fn text(&mut self, text: &Cow<'a, str>) -> Cow<'a, str> {
        if let Cow::Owned(text) = text {
            self.texts += text.len() as u64;
        }
        text.clone()
    }

    /// Gives everything its place. `end` is where the last member with contents ends at the latest.
    pub fn lay_out(mut self, end: u64) -> Result<Layout, LayerError> {
        let mut members: Vec<u64> = self.parts.iter().map(|part| part.member).collect();
        members.sort_unstable();
        members.dedup();
        // In the order of the blob, so that neighbours there are neighbours in the data space.
        let numbers = 0..self.files.len() as u32;
        let mut order: Vec<u32> = numbers
            .filter(|&file| !self.files[file as usize].parts.is_empty())
            .collect();
        for &file in &order {
            let file = &self.files[file as usize];
            check_coverage(file, &mut self.parts[file.parts()])?;
        }
        order.sort_by_key(|&file| {
            let first = &self.parts[self.files[file as usize].parts().start];
            (first.member, first.inner)
        });
        let mut files = vec![0; self.files.len()];
        let mut chunks = Vec::with_capacity(self.parts.len());
        let mut data_size = 0u64;
        for number in order {
            let file = &self.files[number as usize];
            let data = data_size.next_multiple_of(if file.size < PAGE { SECTOR } else { PAGE });
            files[number as usize] = data;
            data_size =
                data.checked_add(file.size)
                    .filter(|end| *end <= MAX_DATA_SIZE)
                    .ok_or(LayerError::TooLarge {
                        what: "uncompressed size of the layer",
                        value: data.saturating_add(file.size),
                        limit: MAX_DATA_SIZE,
                    })?;
            for part in self.parts[file.parts()].iter().filter(|part| !part.zeros) {
                let next = members.partition_point(|member| *member <= part.member);
                let mut next = members.get(next).copied().unwrap_or(end);
                // Between the end of a file and the next one's content may be a member with nothing but headers.
                if part.member < file.end {
                    next = next.min(file.end);
                }
                let blob_len = next
                    .checked_sub(part.member)
                    .filter(|len| *len > 0 && next <= end)
                    .ok_or_else(|| {
                        file.wrong(
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
                    digest: file.vouched(part)?,
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

/// Puts the parts of a file in order, and checks that each byte of the file is in one of them.
fn check_coverage(file: &File<'_>, parts: &mut [Part<'_>]) -> Result<(), LayerError> {
    parts.sort_by_key(|part| part.offset);
    let mut end = 0u64;
    for part in parts.iter() {
        if part.offset != end || part.len == 0 {
            let what = format!(
                "a chunk of {} bytes is at {}, where {end} is due",
                part.len, part.offset
            );
            return Err(file.wrong(part.at, what));
        }
        end = end.saturating_add(part.len);
    }
    if end != file.size {
        let what = format!("its chunks have {end} of its {} bytes", file.size);
        return Err(file.wrong(file.at, what));
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
