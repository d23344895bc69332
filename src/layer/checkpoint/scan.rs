//! Decompression of a whole layer that also cuts it into spans, each of which can be decoded by itself later.
//!
//! gzip is cut at deflate blocks and at members, zstd at frames, and a tar not at all, as any byte of it will do. A span that grows
//! over [`SPAN_MAX`] ends the cutting, as no chunk could be fetched from it at a reasonable price; decompression goes on.

use std::io::{self, Read};

use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

use super::{Entry, MAX_WINDOW};
use crate::layer::Compression;
use crate::layer::compression::ZSTD_WINDOW_LOG_MAX;
use crate::sys::inflate::{At, Framing, Inflate, InflateError};

/// Uncompressed bytes after which a span ends at the next opportunity: what a read of a few bytes has to fetch and decode. Half of it
/// would double the windows, which are most of an index.
pub const SPAN: u64 = 1 << 20;
/// Uncompressed bytes after which a span ends at the header of a gzip member: such a checkpoint needs no window.
const SPAN_AT_MEMBER: u64 = SPAN / 2;
/// Longest span, in bytes of either kind. Blocks of the compressors in use end after 8 MiB of zeros at the latest.
pub const SPAN_MAX: u64 = 16 << 20;
/// Compressed bytes that are read at a time.
const INPUT_BUFFER: usize = 128 << 10;
/// Calls of a decoder in a row that may do nothing although there is input and room for output.
const IDLE_CALLS: u32 = 2;

/// A span, as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scanned {
    /// First byte of the tar.
    pub data_offset: u64,
    /// First byte of the tar after it.
    pub data_end: u64,
    /// First byte of the blob that belongs to it wholly.
    pub blob_offset: u64,
    /// How it is entered; a zstd frame, like a member.
    pub entry: Entry,
    /// Bytes of the tar before it, in its member: as many as `entry` says.
    pub window: Vec<u8>,
    /// Its bytes in the blob, from the byte on that it begins in.
    pub compressed: Vec<u8>,
}

/// Decompresses a layer.
pub struct Scanner<R> {
    input: Input<R>,
    format: Format,
    cutter: Cutter,
    /// Bytes of output in all.
    produced: u64,
}

enum Format {
    None,
    Gzip(Box<Gzip>),
    Zstd { decoder: Decoder<'static>, inside: bool },
}

impl<R: Read> Scanner<R> {
    /// At the beginning of a layer. Nothing is read yet.
    ///
    /// # Errors
    /// When there is no memory for a decoder.
    pub fn new(compression: Compression, input: R) -> io::Result<Self> {
        let format = match compression {
            Compression::None => Format::None,
            Compression::Gzip => Format::Gzip(Box::new(Gzip::new()?)),
            Compression::Zstd => {
                let mut decoder = Decoder::new()?;
                decoder.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG_MAX))?;
                Format::Zstd { decoder, inside: false }
            }
        };
        Ok(Scanner {
            cutter: Cutter::new(compression != Compression::None),
            input: Input::new(input),
            format,
            produced: 0,
        })
    }

    /// Replaces `out` by the next uncompressed bytes, `limit` of them unless the layer ends; none at its end.
    ///
    /// # Errors
    /// As [`decoder`](crate::layer::compression::decoder).
    pub fn read(&mut self, out: &mut Vec<u8>, limit: usize) -> io::Result<()> {
        out.resize(limit, 0);
        let mut filled = 0;
        while filled < limit {
            let more = match &mut self.format {
                Format::None => {
                    let count = self.input.inner.read(&mut out[filled..]);
                    match count {
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                        count => Some(count?).filter(|count| *count > 0),
                    }
                }
                Format::Gzip(gzip) => gzip.step(&mut self.input, out, filled, self.produced, &mut self.cutter)?,
                Format::Zstd { decoder, inside } => zstd_step(
                    decoder,
                    inside,
                    &mut self.input,
                    &mut out[filled..],
                    self.produced,
                    &mut self.cutter,
                )?,
            };
            let Some(count) = more else { break };
            filled += count;
            self.produced += count as u64;
            self.cutter.check(self.produced);
        }
        out.truncate(filled);
        if let Format::Gzip(gzip) = &mut self.format {
            gzip.remember(out);
        }
        Ok(())
    }

    /// The spans that have ended since the last call. The last one ends with the layer.
    pub fn spans(&mut self) -> Vec<Scanned> {
        std::mem::take(&mut self.cutter.done)
    }
}

/// Compressed bytes.
struct Input<R> {
    inner: R,
    buf: Box<[u8]>,
    at: usize,
    len: usize,
    /// Bytes taken in all.
    taken: u64,
    /// The last of them.
    last: u8,
}

impl<R: Read> Input<R> {
    fn new(inner: R) -> Self {
        Input {
            inner,
            buf: vec![0; INPUT_BUFFER].into(),
            at: 0,
            len: 0,
            taken: 0,
            last: 0,
        }
    }

    /// What there is; empty at the end.
    fn fill(&mut self) -> io::Result<&[u8]> {
        while self.at == self.len {
            match self.inner.read(&mut self.buf) {
                Ok(len) => {
                    (self.at, self.len) = (0, len);
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(&self.buf[self.at..self.len])
    }

    fn take(&mut self, count: usize) -> &[u8] {
        let from = self.at;
        self.at = (from + count).min(self.len);
        let taken = &self.buf[from..self.at];
        self.taken += taken.len() as u64;
        self.last = taken.last().copied().unwrap_or(self.last);
        taken
    }
}

/// Collects spans.
struct Cutter {
    /// The span that has begun. `None`: nothing is cut (any more).
    open: Option<Scanned>,
    done: Vec<Scanned>,
}

impl Cutter {
    fn new(cut: bool) -> Self {
        Cutter {
            open: cut.then(|| Scanned {
                data_offset: 0,
                data_end: 0,
                blob_offset: 0,
                entry: Entry::Member,
                window: Vec::new(),
                compressed: Vec::new(),
            }),
            done: Vec::new(),
        }
    }

    /// Bytes of output in the open span; none if nothing is cut.
    fn len(&self, produced: u64) -> u64 {
        self.open.as_ref().map_or(0, |open| produced - open.data_offset)
    }

    fn compressed(&mut self, bytes: &[u8]) {
        if let Some(open) = &mut self.open {
            open.compressed.extend_from_slice(bytes);
        }
    }

    /// Ends the open span, and begins another.
    fn cut(&mut self, produced: u64, next: Scanned) {
        if let Some(open) = self.open.replace(next) {
            self.done.push(Scanned {
                data_end: produced,
                ..open
            });
        }
    }

    /// Ends the last span. One without output is left out.
    fn end(&mut self, produced: u64) {
        if let Some(open) = self.open.take().filter(|open| open.data_offset < produced) {
            self.done.push(Scanned {
                data_end: produced,
                ..open
            });
        }
    }

    /// Gives up when the open span is too long.
    fn check(&mut self, produced: u64) {
        let too_long =
            |open: &Scanned| produced - open.data_offset > SPAN_MAX || open.compressed.len() as u64 > SPAN_MAX;
        if self.open.as_ref().is_some_and(too_long) {
            self.open = None;
        }
    }
}

/// Any number of gzip members, but at least one; then zeros, or nothing.
struct Gzip {
    inflate: Inflate,
    place: Place,
    /// The last bytes of output before the buffer at hand.
    history: Vec<u8>,
    /// Where the output of the member begins.
    member: u64,
    idle: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Beginning,
    Member,
    /// The next byte belongs to another member, or to the padding.
    Between,
    End,
}

impl Gzip {
    fn new() -> io::Result<Self> {
        Ok(Gzip {
            inflate: Inflate::new(Framing::Gzip).map_err(failed)?,
            place: Place::Beginning,
            history: Vec::with_capacity(MAX_WINDOW),
            member: 0,
            idle: 0,
        })
    }

    /// Decodes into `out` from `filled` on; the bytes that were added, `None` at the end. `before` is the number of bytes of output up to
    /// there.
    fn step(
        &mut self,
        input: &mut Input<impl Read>,
        out: &mut [u8],
        filled: usize,
        before: u64,
        cutter: &mut Cutter,
    ) -> io::Result<Option<usize>> {
        match self.place {
            Place::End => return Ok(None),
            Place::Member => {}
            Place::Beginning | Place::Between => {
                if !self.next_member(input)? {
                    self.place = Place::End;
                    cutter.end(before);
                    return Ok(None);
                }
                self.place = Place::Member;
                self.inflate.reset(Framing::Gzip).map_err(failed)?;
                self.member = before;
                if cutter.len(before) >= SPAN_AT_MEMBER {
                    cutter.cut(before, begin(before, input.taken));
                }
            }
        }
        let bytes = input.fill()?;
        if bytes.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let step = self.inflate.step(bytes, &mut out[filled..], true).map_err(failed)?;
        self.idle = if step.consumed + step.produced > 0 {
            0
        } else {
            self.idle + 1
        };
        if self.idle > IDLE_CALLS {
            return Err(failed(InflateError::Data));
        }
        cutter.compressed(input.take(step.consumed));
        let produced = before + step.produced as u64;
        match step.at {
            At::End => self.place = Place::Between,
            At::Boundary { bits } if cutter.len(produced) >= SPAN => {
                let window = self.window(&out[..filled + step.produced], produced);
                let entry = Entry::Block {
                    bits,
                    window: window.len() as u32,
                };
                let compressed = if bits > 0 { vec![input.last] } else { Vec::new() };
                cutter.cut(
                    produced,
                    Scanned {
                        entry,
                        window,
                        compressed,
                        ..begin(produced, input.taken)
                    },
                );
            }
            At::Boundary { .. } | At::Inside => {}
        }
        Ok(Some(step.produced))
    }

    /// Whether there is another member. Reads padding up to its end.
    fn next_member(&self, input: &mut Input<impl Read>) -> io::Result<bool> {
        let begun = self.place != Place::Beginning;
        loop {
            let bytes = input.fill()?;
            match bytes.first() {
                None if begun => return Ok(false),
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
                Some(0) if begun => {
                    let len = bytes.len();
                    if bytes.iter().any(|&c| c != 0) {
                        let what = "there is something after the last gzip member that is neither a member nor zeros";
                        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
                    }
                    input.take(len);
                }
                Some(_) => return Ok(true),
            }
        }
    }

    /// What the stream can refer back to behind `out`, the buffer at hand: the last bytes of its member.
    fn window(&self, out: &[u8], produced: u64) -> Vec<u8> {
        let len = (produced - self.member).min(MAX_WINDOW as u64) as usize;
        let here = &out[out.len() - out.len().min(len)..];
        let before = self.history.len() - self.history.len().min(len - here.len());
        [&self.history[before..], here].concat()
    }

    /// Keeps the end of a buffer that will be given away.
    fn remember(&mut self, out: &[u8]) {
        let here = &out[out.len() - out.len().min(MAX_WINDOW)..];
        let kept = self.history.len().min(MAX_WINDOW - here.len());
        self.history.drain(..self.history.len() - kept);
        self.history.extend_from_slice(here);
    }
}

/// A span that begins where a decoder needs to know nothing.
fn begin(data_offset: u64, blob_offset: u64) -> Scanned {
    Scanned {
        data_offset,
        data_end: data_offset,
        blob_offset,
        entry: Entry::Member,
        window: Vec::new(),
        compressed: Vec::new(),
    }
}

fn zstd_step(
    decoder: &mut Decoder<'_>,
    inside: &mut bool,
    input: &mut Input<impl Read>,
    out: &mut [u8],
    before: u64,
    cutter: &mut Cutter,
) -> io::Result<Option<usize>> {
    let bytes = input.fill()?;
    let ended = bytes.is_empty();
    if ended && !*inside {
        cutter.end(before);
        return Ok(None);
    }
    if !*inside {
        decoder.reinit()?;
        if cutter.len(before) >= SPAN {
            cutter.cut(before, begin(before, input.taken));
        }
    }
    let (mut from, mut to) = (InBuffer::around(input.fill()?), OutBuffer::around(out));
    let hint = decoder.run(&mut from, &mut to)?;
    let (consumed, produced) = (from.pos(), to.pos());
    if ended && produced == 0 && hint != 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    *inside = hint != 0;
    cutter.compressed(input.take(consumed));
    Ok(Some(produced))
}

fn failed(error: InflateError) -> io::Error {
    let kind = match error {
        InflateError::Memory => io::ErrorKind::OutOfMemory,
        InflateError::Data | InflateError::Misuse => io::ErrorKind::InvalidData,
    };
    io::Error::new(kind, error)
}
