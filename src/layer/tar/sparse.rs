//! Maps of sparse files: which parts of a file a tar stores.
//!
//! GNU tar has four ways to say it: in the header and extension blocks of 21 entries (type `S`), in PAX records (versions 0.0 and
//! 0.1), and as text in front of the data (1.0: decimal numbers, a newline after each, the number of entries first).

use super::header::{BLOCK, Block, number, text};
use crate::layer::LayerError;

/// A part of a sparse file that is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    /// Where it is in the file.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// Most parts that one sparse file may have.
const MAX_SEGMENTS: usize = 1 << 20;
/// Longest map in front of the data, in bytes.
const MAX_TEXT: usize = 1 << 20;
/// Bytes of one entry in a GNU header.
const ENTRY: usize = 24;

/// Why a map cannot be read.
#[derive(Debug)]
pub(super) enum BadMap {
    /// What is wrong with it.
    Wrong(String),
    /// It exceeds a limit.
    Limit(LayerError),
}

impl From<&str> for BadMap {
    fn from(what: &str) -> Self {
        BadMap::Wrong(what.to_owned())
    }
}

fn push(map: &mut Vec<Segment>, offset: Option<u64>, len: Option<u64>) -> Result<(), BadMap> {
    let (Some(offset), Some(len)) = (offset, len) else {
        return Err("the map of a sparse file holds something that is not a number".into());
    };
    if map.len() >= MAX_SEGMENTS {
        return Err(BadMap::Limit(LayerError::TooLarge {
            what: "number of parts of a sparse file",
            value: map.len() as u64 + 1,
            limit: MAX_SEGMENTS as u64,
        }));
    }
    map.push(Segment { offset, len });
    Ok(())
}

/// The map in a header of the old GNU form, the size of the file, and whether an extension block follows.
pub(super) fn from_header(block: &Block) -> Result<(Vec<Segment>, u64, bool), BadMap> {
    let size = number(&block[483..495]).and_then(|size| size.try_into().ok());
    let size = size.ok_or("the real size of a sparse file is not a number")?;
    let mut map = Vec::new();
    entries(&block[386..482], &mut map)?;
    Ok((map, size, block[482] != 0))
}

/// Adds the entries of an extension block; tells whether another follows.
pub(super) fn from_extension(block: &Block, map: &mut Vec<Segment>) -> Result<bool, BadMap> {
    entries(&block[..504], map)?;
    Ok(block[504] != 0)
}

fn entries(fields: &[u8], map: &mut Vec<Segment>) -> Result<(), BadMap> {
    let value = |field: &[u8]| number(field).and_then(|value| value.try_into().ok());
    for entry in fields.chunks_exact(ENTRY) {
        if entry[0] == 0 {
            break;
        }
        push(map, value(&entry[..12]), value(&entry[12..]))?;
    }
    Ok(())
}

/// The map in PAX records: `count` pairs of decimal numbers with commas between all of them.
pub(super) fn from_records(count: &[u8], records: &[u8]) -> Result<Vec<Segment>, BadMap> {
    let count = decimal(count).ok_or("the number of parts of a sparse file is not a number")?;
    let mut map = Vec::new();
    if !records.is_empty() {
        let mut numbers = records.split(|&c| c == b',').map(decimal);
        while let Some(offset) = numbers.next() {
            push(&mut map, offset, numbers.next().flatten())?;
        }
    }
    if map.len() as u64 != count {
        return Err(BadMap::Wrong(format!(
            "a sparse file has a map of {} parts, and its header says {count}",
            map.len()
        )));
    }
    Ok(map)
}

/// The map in front of the data, read block by block.
#[derive(Debug, Default)]
pub(super) struct TextMap {
    text: Vec<u8>,
    newlines: usize,
    /// Numbers there will be, once the first is known: itself and two for each part.
    expected: Option<usize>,
}

impl TextMap {
    /// Takes the next block in. The map, if it ends in this block.
    pub(super) fn push(&mut self, block: &Block) -> Result<Option<Vec<Segment>>, BadMap> {
        if self.text.len() + BLOCK > MAX_TEXT {
            return Err(BadMap::Limit(LayerError::TooLarge {
                what: "length of the map of a sparse file",
                value: (self.text.len() + BLOCK) as u64,
                limit: MAX_TEXT as u64,
            }));
        }
        self.text.extend_from_slice(block);
        self.newlines += block.iter().filter(|&&c| c == b'\n').count();
        if self.newlines == 0 {
            return Ok(None);
        }
        let expected = match self.expected {
            Some(expected) => expected,
            None => {
                let parts = self.text.split(|&c| c == b'\n').next().and_then(decimal);
                let parts = parts.ok_or("the number of parts of a sparse file is not a number")?;
                // Each number takes two bytes: a map that can end within the limit has fewer.
                if parts > MAX_TEXT as u64 {
                    return Err(BadMap::Limit(LayerError::TooLarge {
                        what: "number of parts of a sparse file",
                        value: parts,
                        limit: MAX_TEXT as u64,
                    }));
                }
                *self.expected.insert(1 + 2 * parts as usize)
            }
        };
        if self.newlines < expected {
            return Ok(None);
        }
        let mut numbers = self.text.split(|&c| c == b'\n').map(decimal).take(expected).skip(1);
        let mut map = Vec::with_capacity(expected / 2);
        while let Some(offset) = numbers.next() {
            push(&mut map, offset, numbers.next().flatten())?;
        }
        Ok(Some(map))
    }
}

/// Checks that the parts are in order, inside a file of `size` bytes, and as long together as what is `stored`. Empty parts (GNU tar
/// ends a map with one) are left out.
pub(super) fn check(map: &mut Vec<Segment>, size: u64, stored: u64) -> Result<(), BadMap> {
    let (mut end, mut total) = (0u64, 0u64);
    for segment in map.iter() {
        let next = segment.offset.checked_add(segment.len).filter(|next| *next <= size);
        let Some(next) = next.filter(|_| segment.offset >= end) else {
            return Err(BadMap::Wrong(format!(
                "part {}+{} of a sparse file of {size} bytes lies outside, or before another",
                segment.offset, segment.len
            )));
        };
        end = next;
        total += segment.len; // At most `size`: the parts do not overlap.
    }
    if total != stored {
        return Err(BadMap::Wrong(format!(
            "the parts of a sparse file have {total} bytes, and {stored} are stored"
        )));
    }
    map.retain(|segment| segment.len > 0);
    Ok(())
}

/// An unsigned decimal number.
pub(super) fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text(digits)).ok()?.parse().ok()
}
