//! Deflate streams that can be entered in the middle: zlib's `inflate` with its block boundaries, `inflatePrime` and
//! `inflateSetDictionary`, by the implementation in Rust that flate2 uses as well, which hides these calls.
//!
//! What is decoded must be written to memory that holds nothing else: the decoder writes beyond the bytes that it reports, anywhere in
//! the output it was given. So that output must never be the place where somebody keeps the bytes before (the circular window of
//! zlib's own example of random access loses bytes that way).

use std::ffi::{c_int, c_uint};
use std::fmt;

use libz_rs_sys as zlib;

/// Most bytes that a deflate stream refers back to.
pub const WINDOW: usize = 32 << 10;

/// What encloses the deflate stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// Nothing: the next bit is the first of a block.
    Raw,
    /// The header and the trailer of a gzip member, which are checked.
    Gzip,
}

impl Framing {
    /// As `inflateInit2` takes it: the largest window (15 bits) without framing, or with gzip's.
    fn window_bits(self) -> c_int {
        match self {
            Framing::Raw => -15,
            Framing::Gzip => 15 + 16,
        }
    }
}

/// What one call did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Bytes of the input that it took.
    pub consumed: usize,
    /// Bytes of the output that it filled.
    pub produced: usize,
    /// Where it stopped.
    pub at: At,
}

/// Where a call stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// Where the input ended or the output was full.
    Inside,
    /// In front of a block: decoding can be entered here, with the last `bits` (0 to 7) bits of the last byte that was taken.
    Boundary {
        /// Bits of the last byte taken that belong to the block.
        bits: u8,
    },
    /// At the end of the stream, behind the framing's trailer.
    End,
}

/// Why a stream cannot be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InflateError {
    /// The bytes are no such stream.
    Data,
    /// There is no memory for the decoder.
    Memory,
    /// The call makes no sense at this place, such as a dictionary in the middle of a block.
    Misuse,
}

impl fmt::Display for InflateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            InflateError::Data => "the deflate stream is damaged",
            InflateError::Memory => "there is no memory for a decoder",
            InflateError::Misuse => "the decoder is not at a place where this is possible",
        })
    }
}

/// A decoder of deflate streams.
pub struct Inflate {
    /// In a box: the decoder may keep its address.
    stream: Box<zlib::z_stream>,
}

// SAFETY: the pointers in the stream point to memory that the decoder allocated for itself alone; those to input and output are set anew by
// each call of `step`, and used only within it.
unsafe impl Send for Inflate {}

impl Inflate {
    /// A decoder at the beginning of a stream.
    ///
    /// # Errors
    /// [`InflateError::Memory`].
    pub fn new(framing: Framing) -> Result<Self, InflateError> {
        let mut stream = Box::new(zlib::z_stream::default());
        // SAFETY: the stream is the one of the version and size stated, with the allocator that its default has.
        let code = unsafe {
            zlib::inflateInit2_(
                &raw mut *stream,
                framing.window_bits(),
                zlib::zlibVersion(),
                size_of::<zlib::z_stream>() as c_int,
            )
        };
        checked(code)?;
        Ok(Inflate { stream })
    }

    /// Goes on as at the beginning of another stream.
    ///
    /// # Errors
    /// [`InflateError::Memory`].
    pub fn reset(&mut self, framing: Framing) -> Result<(), InflateError> {
        // SAFETY: the stream was initialised by `new`, which is the only way to get one.
        checked(unsafe { zlib::inflateReset2(&raw mut *self.stream, framing.window_bits()) })
    }

    /// Puts the lowest `bits` (up to 16) bits of `value` in front of the input.
    ///
    /// # Errors
    /// [`InflateError::Misuse`].
    pub fn prime(&mut self, bits: u8, value: u8) -> Result<(), InflateError> {
        // SAFETY: the stream was initialised by `new`.
        checked(unsafe { zlib::inflatePrime(&raw mut *self.stream, bits.into(), value.into()) })
    }

    /// Has the stream refer back to `window`, as if these bytes had just been decoded. Of more than [`WINDOW`] bytes the last count.
    ///
    /// # Errors
    /// [`InflateError::Misuse`] unless the framing is [`Framing::Raw`].
    pub fn set_window(&mut self, window: &[u8]) -> Result<(), InflateError> {
        let window = &window[window.len().saturating_sub(WINDOW)..];
        // SAFETY: the stream was initialised by `new`; pointer and length are those of a slice, which is only read, and only in this call.
        checked(unsafe { zlib::inflateSetDictionary(&raw mut *self.stream, window.as_ptr(), window.len() as c_uint) })
    }

    /// Decodes until the input is used up or the output is full, and with `stop_at_blocks` no further than to the next boundary. A
    /// call that neither takes nor fills anything needs more of one of them. All of `output` may be overwritten.
    ///
    /// # Errors
    /// [`InflateError::Data`] when the input is no such stream.
    pub fn step(&mut self, input: &[u8], output: &mut [u8], stop_at_blocks: bool) -> Result<Step, InflateError> {
        let (available, room) = (input.len().min(PART), output.len().min(PART));
        self.stream.next_in = input.as_ptr();
        self.stream.avail_in = available as c_uint;
        self.stream.next_out = output.as_mut_ptr();
        self.stream.avail_out = room as c_uint;
        let flush = if stop_at_blocks {
            zlib::Z_BLOCK
        } else {
            zlib::Z_NO_FLUSH
        };
        // SAFETY: the stream was initialised by `new`; input and output are slices of at least the stated lengths, borrowed for the whole
        // call, and the output is borrowed exclusively.
        let code = unsafe { zlib::inflate(&raw mut *self.stream, flush) };
        let (consumed, produced) = (
            available.saturating_sub(self.stream.avail_in as usize),
            room.saturating_sub(self.stream.avail_out as usize),
        );
        // Nothing points to the caller's memory any more.
        self.stream.next_in = std::ptr::null();
        self.stream.next_out = std::ptr::null_mut();
        (self.stream.avail_in, self.stream.avail_out) = (0, 0);
        let at = match code {
            zlib::Z_STREAM_END => At::End,
            // No progress is no error: the caller gives more.
            zlib::Z_OK | zlib::Z_BUF_ERROR => self.place(),
            other => return Err(error(other)),
        };
        Ok(Step { consumed, produced, at })
    }

    /// What the stream says of the place where it stopped: bits 0 to 5 are the unused bits of the last byte, bit 6 is set in the last block,
    /// and bit 7 in front of a block.
    fn place(&self) -> At {
        let state = self.stream.data_type;
        if state & BEFORE_BLOCK != 0 && state & LAST_BLOCK == 0 && state & UNUSED_BITS < 8 {
            At::Boundary {
                bits: (state & UNUSED_BITS) as u8,
            }
        } else {
            At::Inside
        }
    }
}

/// Bytes of input or output that one call deals with: lengths are 32 bits wide.
const PART: usize = 1 << 30;
/// Bits of `data_type`.
const BEFORE_BLOCK: c_int = 128;
const LAST_BLOCK: c_int = 64;
const UNUSED_BITS: c_int = 63;

impl Drop for Inflate {
    fn drop(&mut self) {
        // SAFETY: the stream was initialised by `new`, and is not used after.
        unsafe { zlib::inflateEnd(&raw mut *self.stream) };
    }
}

impl fmt::Debug for Inflate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inflate").finish_non_exhaustive()
    }
}

fn checked(code: c_int) -> Result<(), InflateError> {
    match code {
        zlib::Z_OK => Ok(()),
        other => Err(error(other)),
    }
}

fn error(code: c_int) -> InflateError {
    match code {
        // A gzip stream never asks for a dictionary.
        zlib::Z_DATA_ERROR | zlib::Z_NEED_DICT => InflateError::Data,
        zlib::Z_MEM_ERROR => InflateError::Memory,
        _ => InflateError::Misuse,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    /// Text in which most comes from a little before.
    fn text(len: usize) -> Vec<u8> {
        let mut seed = 7u32;
        let mut data = Vec::new();
        while data.len() < len {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if seed >> 30 == 0 || data.len() < 100 {
                data.extend(seed.to_be_bytes());
            } else {
                let from = data.len() - 1 - (seed >> 8) as usize % data.len().min(30_000);
                data.extend_from_within(from..(from + 40).min(data.len()));
            }
        }
        data.truncate(len);
        data
    }

    /// Decodes everything with small buffers; the boundaries as (input, output, bits).
    fn boundaries(blob: &[u8]) -> (Vec<u8>, Vec<(usize, usize, u8)>) {
        let mut inflate = Inflate::new(Framing::Gzip).unwrap();
        let (mut at, mut out, mut found) = (0, Vec::new(), Vec::new());
        loop {
            let filled = out.len();
            out.resize(filled + 10_000, 0);
            let input = &blob[at..blob.len().min(at + 5000)];
            let step = inflate.step(input, &mut out[filled..], true).unwrap();
            at += step.consumed;
            out.truncate(filled + step.produced);
            match step.at {
                At::Boundary { bits } if found.last() != Some(&(at, out.len(), bits)) => {
                    found.push((at, out.len(), bits))
                }
                At::End => return (out, found),
                _ => {}
            }
        }
    }

    #[test]
    fn a_stream_can_be_entered_at_every_boundary() {
        let data = text(1 << 20);
        let blob = gzip(&data);
        let (decoded, found) = boundaries(&blob);
        assert_eq!(decoded, data);
        assert!(found.len() > 2, "{}", found.len());
        assert!(found.iter().any(|(.., bits)| *bits > 0));
        for (from, offset, bits) in found {
            let mut inflate = Inflate::new(Framing::Raw).unwrap();
            if bits > 0 {
                inflate.prime(bits, blob[from - 1] >> (8 - bits)).unwrap();
            }
            inflate.set_window(&data[..offset]).unwrap();
            let mut out = vec![0; data.len() - offset];
            let step = inflate.step(&blob[from..], &mut out, false).unwrap();
            assert_eq!(step.produced, out.len());
            assert!(out == data[offset..], "{from} {offset} {bits}");
        }
    }

    #[test]
    fn other_bytes_are_an_error_and_none_are_not() {
        let mut inflate = Inflate::new(Framing::Gzip).unwrap();
        let nothing = inflate.step(&[], &mut [0; 10], true).unwrap();
        assert_eq!((nothing.consumed, nothing.produced), (0, 0));
        assert_eq!(
            inflate.step(b"no gzip at all", &mut [0; 10], true),
            Err(InflateError::Data)
        );
        inflate.reset(Framing::Gzip).unwrap();
        let (blob, mut out) = (gzip(b"text"), [0; 10]);
        let step = inflate.step(&blob, &mut out, false).unwrap();
        assert_eq!((step.consumed, step.produced, step.at), (blob.len(), 4, At::End));
        assert_eq!(&out[..4], b"text");
        assert_eq!(inflate.set_window(b"text"), Err(InflateError::Misuse));
    }
}
