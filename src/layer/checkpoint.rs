//! Places in a gzip stream where decoding can begin: what makes a plain layer readable in ranges.
//!
//! A *checkpoint* is a place in the blob together with what a decoder has to know there: either nothing, at the header of a gzip
//! member, or, in front of a deflate block, how many bits of the byte before belong to that block, and the *window*, the bytes
//! decoded before, as far as the stream refers back to them. The *span* of a checkpoint goes up to the next one: it is what has to
//! be fetched and decoded for any byte in it. Where a span begins within a byte, that byte is also the last one of the span before.
//!
//! Windows make up most of an index, and only one is needed at a time: they are kept apart from it ([`Windows`]).

pub mod scan;
pub mod windows;

#[cfg(test)]
pub(super) mod tests;

pub use scan::{Scanned, Scanner};
pub use windows::{WindowTable, Windows};

use super::index::MAX_CHUNK_LEN;
use super::{Digest, LayerError};
use crate::sys::inflate::{At, Framing, Inflate, InflateError};

/// Longest window, in bytes: as far as a deflate stream can refer back.
pub const MAX_WINDOW: usize = crate::sys::inflate::WINDOW;
/// Bytes behind the deflate stream of a gzip member: a checksum and a length.
const TRAILER: usize = 8;
const FORMAT: &str = "gzip span";

/// Where a decoder enters the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// At the header of a gzip member.
    Member,
    /// In front of a deflate block.
    Block {
        /// Bits of the byte before [`Checkpoint::blob_offset`] that belong to the block: its highest ones, 0 to 7.
        bits: u8,
        /// Bytes of the window; 0 if the stream does not refer back over this place.
        window: u32,
    },
}

/// A checkpoint and its span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpoint {
    /// First byte of the tar that is decoded from here.
    pub data_offset: u64,
    /// Bytes of the tar in the span, never 0.
    pub data_len: u32,
    /// First byte of the blob that belongs to the span wholly.
    pub blob_offset: u64,
    /// Compressed bytes of the span from [`Checkpoint::start`] on, never 0.
    pub blob_len: u32,
    /// How decoding begins.
    pub entry: Entry,
    /// Digest of the compressed bytes.
    pub digest: Digest,
}

impl Checkpoint {
    /// First byte of the blob that is needed: the one before [`Checkpoint::blob_offset`] if some of its bits are.
    pub fn start(&self) -> u64 {
        match self.entry {
            Entry::Block { bits: 1.., .. } => self.blob_offset.saturating_sub(1),
            _ => self.blob_offset,
        }
    }

    /// First byte of the blob after the span.
    pub fn end(&self) -> u64 {
        self.start().saturating_add(self.blob_len.into())
    }

    /// First byte of the tar after the span.
    pub fn data_end(&self) -> u64 {
        self.data_offset.saturating_add(self.data_len.into())
    }

    /// Bytes of the window that decoding needs.
    pub fn window_len(&self) -> u32 {
        match self.entry {
            Entry::Member => 0,
            Entry::Block { window, .. } => window,
        }
    }
}

/// Verifies the compressed bytes of a span.
///
/// # Errors
/// [`LayerError::DigestMismatch`].
pub fn verify(checkpoint: &Checkpoint, compressed: &[u8]) -> Result<(), LayerError> {
    let actual = Digest::of(compressed);
    if actual != checkpoint.digest {
        return Err(LayerError::DigestMismatch {
            what: "compressed span",
            expected: checkpoint.digest,
            actual,
        });
    }
    Ok(())
}

/// The `len` bytes of the tar after the first `skip` of a span. `compressed` is the span from its [`Checkpoint::start`] on, and may go
/// on behind its end, also over ends of gzip members; no more of it is decoded than needed.
///
/// # Errors
/// [`LayerError::TooLarge`] when `skip` or `len` is over [`MAX_CHUNK_LEN`], [`LayerError::Truncated`] when `compressed` holds fewer bytes,
/// and [`LayerError::Malformed`] when it cannot be decoded or the window has another length than the checkpoint says.
pub fn decode(entry: Entry, compressed: &[u8], window: &[u8], skip: u32, len: u32) -> Result<Vec<u8>, LayerError> {
    for (what, value) in [("length of a chunk", len), ("bytes in front of a chunk", skip)] {
        if value > MAX_CHUNK_LEN {
            return Err(LayerError::TooLarge {
                what,
                value: value.into(),
                limit: MAX_CHUNK_LEN.into(),
            });
        }
    }
    let wanted = skip as usize + len as usize;
    let mut bytes = vec![0; wanted];
    let mut cursor = Cursor::enter(entry, compressed, window)?;
    let mut filled = 0;
    while filled < wanted {
        filled += cursor.fill(&mut bytes[filled..])?;
    }
    bytes.drain(..skip as usize);
    Ok(bytes)
}

/// A decoder within a span.
struct Cursor<'a> {
    inflate: Inflate,
    framing: Framing,
    /// Whether the deflate stream has ended, and its trailer comes next.
    ended: bool,
    input: &'a [u8],
    len: usize,
}

impl<'a> Cursor<'a> {
    fn enter(entry: Entry, compressed: &'a [u8], window: &[u8]) -> Result<Self, LayerError> {
        let mut cursor = Cursor {
            framing: Framing::Raw,
            ended: false,
            inflate: Inflate::new(Framing::Raw).map_err(|error| broken(error, 0))?,
            input: compressed,
            len: compressed.len(),
        };
        match entry {
            Entry::Member => cursor.member()?,
            Entry::Block { bits, window: needed } => {
                if window.len() != needed as usize || window.len() > MAX_WINDOW {
                    let what = format!("a window of {} bytes instead of {needed}", window.len());
                    return Err(LayerError::malformed(FORMAT, 0, what));
                }
                if bits > 7 {
                    return Err(LayerError::malformed(FORMAT, 0, format!("{bits} bits of a byte")));
                }
                if bits > 0 {
                    let (first, rest) = compressed.split_first().ok_or_else(|| cursor.short())?;
                    cursor.prime(bits, *first)?;
                    cursor.input = rest;
                }
                if !window.is_empty() {
                    cursor.inflate.set_window(window).map_err(|error| broken(error, 0))?;
                }
            }
        }
        Ok(cursor)
    }

    fn prime(&mut self, bits: u8, byte: u8) -> Result<(), LayerError> {
        self.inflate
            .prime(bits, byte >> (8 - bits))
            .map_err(|error| broken(error, 0))
    }

    fn member(&mut self) -> Result<(), LayerError> {
        self.framing = Framing::Gzip;
        self.inflate
            .reset(Framing::Gzip)
            .map_err(|error| broken(error, self.at()))
    }

    /// Decodes some bytes, at least one.
    fn fill(&mut self, output: &mut [u8]) -> Result<usize, LayerError> {
        loop {
            if self.ended {
                // The decoder itself takes the trailer only with its framing.
                if self.framing == Framing::Raw {
                    self.input = self.input.get(TRAILER..).ok_or_else(|| self.short())?;
                }
                self.member()?;
                self.ended = false;
            }
            let step = self.inflate.step(self.input, output, false);
            let step = step.map_err(|error| broken(error, self.at()))?;
            self.input = self.input.get(step.consumed..).unwrap_or_default();
            self.ended = step.at == At::End;
            if step.produced > 0 {
                return Ok(step.produced);
            }
            if step.consumed == 0 && !self.ended {
                return Err(self.short());
            }
        }
    }

    /// Bytes taken from the input.
    fn at(&self) -> u64 {
        (self.len - self.input.len()) as u64
    }

    fn short(&self) -> LayerError {
        LayerError::Truncated {
            format: FORMAT,
            length: self.len as u64,
            what: "its compressed data".to_owned(),
        }
    }
}

fn broken(error: InflateError, at: u64) -> LayerError {
    LayerError::malformed(FORMAT, at, error.to_string())
}
