//! A zTOC of a layer, made while the blob is read once: as SOCI's own tool makes it.
//!
//! A span ends at the first block of the stream behind more than the span size of output, over the ends of gzip members as well; windows
//! go over them, too. What SOCI does not read is refused: global PAX headers, contiguous and sparse files, zstd.

use std::borrow::Cow;
use std::collections::BTreeMap;

use time::OffsetDateTime;

use super::write;
use super::zinfo::{self, Point};
use super::ztoc::{Algorithm, File, Ztoc};
use super::{BLOCK, SPARSE_PREFIX, malformed};
use crate::layer::digest::Hasher;
use crate::layer::index::{MAX_CHUNKS, MAX_INODES};
use crate::layer::tar::header::{self, Header};
use crate::layer::tar::pax::{self, Pax};
use crate::layer::tree::quoted;
use crate::layer::{Compression, LayerError};
use crate::sys::inflate::{At, Framing, Inflate, InflateError, WINDOW};

/// Bytes of output of a span at least, as SOCI's tool takes them unless it is told otherwise.
pub const SPAN_SIZE: u64 = 4 << 20;
/// Smallest span size: below, the windows are larger than what they are for.
pub const SPAN_SIZE_MIN: u64 = 32 << 10;
/// Largest: a span is held in memory, and ends some time after its size.
pub const SPAN_SIZE_MAX: u64 = 32 << 20;
/// Bytes decoded at a time.
const OUTPUT: usize = 128 << 10;
/// Calls of the decoder in a row that may do nothing although there is input and room for output.
const IDLE_CALLS: u32 = 2;
/// Longest extended header, in bytes, as in Go's reader.
const MAX_EXTENDED: u64 = 1 << 20;
/// Most bytes of windows: 16384 spans of an export, 64 GiB of tar with 4 MiB each.
const MAX_WINDOWS: usize = 512 << 20;

/// Reads a blob in pieces, and makes its zTOC.
pub struct ZtocBuilder {
    span_size: u64,
    tool: String,
    blob_size: u64,
    walker: Walker,
    stream: Stream,
    /// Digest of the span at hand.
    hasher: Hasher,
    digests: Vec<String>,
}

/// What the blob is.
enum Stream {
    None,
    Gzip(Box<Gzip>),
}

struct Gzip {
    inflate: Inflate,
    place: Place,
    out: Vec<u8>,
    /// The last bytes of output, [`WINDOW`] at most.
    history: Vec<u8>,
    produced: u64,
    taken: u64,
    last: u8,
    idle: u32,
    /// Checkpoints: where in the blob and in the tar, and bits.
    points: Vec<(u64, u64, u8)>,
    windows: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Between,
    Member,
    Padding,
}

impl ZtocBuilder {
    /// At the beginning of a blob that is compressed like this. `tool` is the name that the zTOC gives as its maker's.
    ///
    /// # Errors
    /// [`LayerError`] when SOCI has no such layers or spans.
    pub fn new(compression: Compression, span_size: u64, tool: &str) -> Result<Self, LayerError> {
        if !(SPAN_SIZE_MIN..=SPAN_SIZE_MAX).contains(&span_size) {
            let what = format!("spans of {span_size} bytes: they have {SPAN_SIZE_MIN} to {SPAN_SIZE_MAX}");
            return Err(malformed(0, what));
        }
        Ok(ZtocBuilder {
            span_size,
            tool: tool.to_owned(),
            blob_size: 0,
            walker: Walker::default(),
            stream: match compression {
                Compression::None => Stream::None,
                Compression::Gzip => Stream::Gzip(Box::new(Gzip::new()?)),
                Compression::Zstd => {
                    return Err(LayerError::Unsupported {
                        what: "zstd in SOCI".to_owned(),
                    });
                }
            },
            hasher: Hasher::new(),
            digests: Vec::new(),
        })
    }

    /// Takes in the next bytes of the blob.
    ///
    /// # Errors
    /// [`LayerError`] when they cannot be decoded, or SOCI does not read such a tar.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<(), LayerError> {
        self.blob_size += bytes.len() as u64;
        let ZtocBuilder {
            stream,
            walker,
            hasher,
            digests,
            span_size,
            ..
        } = self;
        match stream {
            Stream::None => {
                let mut at = self.blob_size - bytes.len() as u64;
                walker.push(bytes)?;
                while !bytes.is_empty() {
                    if at > 0 && at.is_multiple_of(*span_size) {
                        digests.push(std::mem::replace(hasher, Hasher::new()).finish().to_string());
                    }
                    let room = *span_size - at % *span_size;
                    let (head, rest) = bytes.split_at(bytes.len().min(usize::try_from(room).unwrap_or(usize::MAX)));
                    hasher.update(head);
                    at += head.len() as u64;
                    bytes = rest;
                }
                Ok(())
            }
            Stream::Gzip(gzip) => gzip.push(bytes, *span_size, walker, hasher, digests),
        }
    }

    /// At the end of the blob: the zTOC.
    ///
    /// # Errors
    /// [`LayerError::Truncated`] when something is missing.
    pub fn finish(mut self) -> Result<Vec<u8>, LayerError> {
        let (files, end) = self.walker.finish()?;
        self.digests.push(self.hasher.finish().to_string());
        let (algorithm, zinfo) = match self.stream {
            Stream::None => (Algorithm::Uncompressed, zinfo::put_tar(self.span_size, self.blob_size)),
            Stream::Gzip(gzip) => (Algorithm::Gzip, gzip.finish(self.span_size)?),
        };
        Ok(write::encode(&Ztoc {
            tool: Cow::Borrowed(self.tool.as_bytes()),
            compressed_size: self.blob_size,
            uncompressed_size: end,
            files,
            algorithm,
            last_span: self.digests.len() as i32 - 1,
            digests: self
                .digests
                .iter()
                .map(|digest| Cow::Borrowed(digest.as_bytes()))
                .collect(),
            zinfo: Cow::Owned(zinfo),
        }))
    }
}

impl Gzip {
    fn new() -> Result<Self, LayerError> {
        Ok(Gzip {
            inflate: Inflate::new(Framing::Gzip).map_err(|error| broken(error, 0))?,
            place: Place::Between,
            out: vec![0; OUTPUT],
            history: Vec::with_capacity(2 * WINDOW),
            produced: 0,
            taken: 0,
            last: 0,
            idle: 0,
            points: Vec::new(),
            windows: Vec::new(),
        })
    }

    fn push(
        &mut self,
        mut bytes: &[u8],
        span_size: u64,
        walker: &mut Walker,
        hasher: &mut Hasher,
        digests: &mut Vec<String>,
    ) -> Result<(), LayerError> {
        loop {
            match (self.place, bytes.first()) {
                (Place::Between, Some(0)) if self.taken > 0 => self.place = Place::Padding,
                (Place::Between, Some(_)) => {
                    let reset = self.inflate.reset(Framing::Gzip);
                    reset.map_err(|error| broken(error, self.taken))?;
                    self.place = Place::Member;
                }
                (Place::Between, None) => return Ok(()),
                _ => {}
            }
            if self.place == Place::Padding {
                if bytes.iter().any(|&byte| byte != 0) {
                    return Err(broken(InflateError::Data, self.taken));
                }
                hasher.update(bytes);
                self.taken += bytes.len() as u64;
                return Ok(());
            }
            let step = self.inflate.step(bytes, &mut self.out, true);
            let step = step.map_err(|error| broken(error, self.taken))?;
            let (head, rest) = bytes.split_at(step.consumed);
            hasher.update(head);
            bytes = rest;
            self.taken += head.len() as u64;
            self.last = head.last().copied().unwrap_or(self.last);
            let output = self.out.get(..step.produced).unwrap_or_default();
            walker.push(output)?;
            self.produced += output.len() as u64;
            remember(&mut self.history, output);
            match step.at {
                At::End => self.place = Place::Between,
                At::Boundary { bits } => {
                    let since = self.points.last().map(|(_, data, _)| self.produced - data);
                    if since.is_none_or(|since| since > span_size) {
                        let span = std::mem::replace(hasher, Hasher::new());
                        // What is before the first span, a header, is in none.
                        if since.is_some() {
                            digests.push(span.finish().to_string());
                        }
                        if bits > 0 {
                            hasher.update(&[self.last]);
                        }
                        self.checkpoint(bits)?;
                    }
                }
                At::Inside => {}
            }
            if step.consumed + step.produced > 0 {
                self.idle = 0;
            } else if bytes.is_empty() {
                return Ok(());
            } else {
                self.idle += 1;
                if self.idle > IDLE_CALLS {
                    return Err(broken(InflateError::Data, self.taken));
                }
            }
        }
    }

    fn checkpoint(&mut self, bits: u8) -> Result<(), LayerError> {
        if self.points.len() >= MAX_CHUNKS || self.windows.len() > MAX_WINDOWS {
            return Err(LayerError::TooLarge {
                what: "number of spans",
                value: self.points.len() as u64,
                limit: (MAX_WINDOWS / WINDOW) as u64,
            });
        }
        self.points.push((self.taken, self.produced, bits));
        let padding = WINDOW - self.history.len();
        self.windows.resize(self.windows.len() + padding, 0);
        self.windows.extend_from_slice(&self.history);
        Ok(())
    }

    fn finish(self, span_size: u64) -> Result<Vec<u8>, LayerError> {
        if self.place == Place::Member || self.points.is_empty() {
            return Err(LayerError::Truncated {
                format: "gzip",
                length: self.taken,
                what: "its compressed data".to_owned(),
            });
        }
        let points: Vec<Point<'_>> = self
            .points
            .iter()
            .zip(self.windows.chunks_exact(WINDOW))
            .map(|(&(blob_offset, data_offset, bits), window)| Point {
                blob_offset,
                data_offset,
                bits,
                window,
            })
            .collect();
        Ok(zinfo::put_gzip(span_size, &points))
    }
}

fn broken(error: InflateError, at: u64) -> LayerError {
    LayerError::malformed("gzip", at, error.to_string())
}

/// Keeps the end of the output.
fn remember(history: &mut Vec<u8>, output: &[u8]) {
    let new = output.get(output.len().saturating_sub(WINDOW)..).unwrap_or_default();
    let kept = history.len().min(WINDOW - new.len());
    history.drain(..history.len() - kept);
    history.extend_from_slice(new);
}

/// Reads the headers of a tar, as Go's reader does.
#[derive(Default)]
struct Walker {
    offset: u64,
    block: Vec<u8>,
    state: State,
    body: Vec<u8>,
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    pax: Pax,
    /// Its records, read as they are.
    records: BTreeMap<Vec<u8>, Vec<u8>>,
    files: Vec<File<'static>>,
}

#[derive(Default, Clone, Copy)]
enum State {
    #[default]
    Header,
    SecondZero,
    Extended {
        kind: u8,
        left: u64,
        padding: u64,
    },
    Skip {
        left: u64,
    },
    /// With the offset of the archive's end.
    End(u64),
}

impl Walker {
    fn push(&mut self, mut bytes: &[u8]) -> Result<(), LayerError> {
        while !bytes.is_empty() {
            let limit = match self.state {
                State::End(_) => bytes.len() as u64,
                State::Skip { left } | State::Extended { left, .. } => left,
                State::Header | State::SecondZero => BLOCK - self.block.len() as u64,
            };
            let (head, rest) = bytes.split_at(bytes.len().min(usize::try_from(limit).unwrap_or(usize::MAX)));
            bytes = rest;
            self.offset += head.len() as u64;
            match &mut self.state {
                State::End(_) => {}
                State::Skip { left } => *left -= head.len() as u64,
                State::Extended { left, .. } => {
                    *left -= head.len() as u64;
                    self.body.extend_from_slice(head);
                }
                State::Header | State::SecondZero => self.block.extend_from_slice(head),
            }
            if self.block.len() as u64 == BLOCK {
                self.block_complete()?;
            }
            if let State::Extended { kind, left: 0, padding } = self.state {
                self.extended(kind)?;
                self.state = State::Skip { left: padding };
            }
            if let State::Skip { left: 0 } = self.state {
                self.state = State::Header;
            }
        }
        Ok(())
    }

    fn block_complete(&mut self) -> Result<(), LayerError> {
        let block = std::mem::take(&mut self.block);
        let block: &[u8; 512] = block.first_chunk().ok_or_else(|| self.wrong("a header is short"))?;
        let zero = block.iter().all(|&byte| byte == 0);
        match (self.state, zero) {
            (State::SecondZero, true) => self.state = State::End(self.offset),
            (State::SecondZero, false) => return Err(self.wrong("a single block of zeros is in the middle")),
            (_, true) => self.state = State::SecondZero,
            (_, false) => {
                let header = header::parse(block).map_err(|what| self.wrong(what))?;
                self.header(block, header)?;
            }
        }
        Ok(())
    }

    fn header(&mut self, block: &[u8; 512], header: Header) -> Result<(), LayerError> {
        let size = u64::try_from(header.size).map_err(|_| self.wrong("a size is negative"))?;
        if matches!(header.kind, b'x' | b'L' | b'K') {
            if size > MAX_EXTENDED {
                return Err(LayerError::TooLarge {
                    what: "length of an extended tar header",
                    value: size,
                    limit: MAX_EXTENDED,
                });
            }
            self.body.clear();
            self.state = State::Extended {
                kind: header.kind,
                left: size,
                padding: size.next_multiple_of(BLOCK) - size,
            };
            return Ok(());
        }
        let records = std::mem::take(&mut self.records);
        let pax = std::mem::take(&mut self.pax);
        let name = self.name.take().or(pax.path).unwrap_or(header.name);
        let link = self.link.take().or(pax.link).unwrap_or(header.link);
        let kind: &[u8] = match header.kind {
            0 | b'0' if name.ends_with(b"/") => b"dir",
            0 | b'0' => b"reg",
            b'1' => b"hardlink",
            b'2' => b"symlink",
            b'3' => b"char",
            b'4' => b"block",
            b'5' => b"dir",
            b'6' => b"fifo",
            other => {
                return Err(LayerError::Unsupported {
                    what: format!(
                        "type '{}' of the tar entry {} in SOCI",
                        other.escape_ascii(),
                        quoted(&name)
                    ),
                });
            }
        };
        if records.keys().any(|key| key.starts_with(SPARSE_PREFIX)) {
            return Err(LayerError::Unsupported {
                what: format!("the sparse file {} in SOCI", quoted(&name)),
            });
        }
        let size = pax.size.unwrap_or(size);
        let stored = if matches!(header.kind, 0 | b'0') { size } else { 0 };
        let padded = stored
            .checked_next_multiple_of(BLOCK)
            .ok_or_else(|| self.wrong("a size is impossible"))?;
        let id = |id: i64| u32::try_from(id).map_err(|_| self.wrong(format!("no user or group has the number {id}")));
        let owners = block[257..262] == *b"ustar";
        let owner = |from: usize| {
            let text = if owners {
                header::text(&block[from..from + 32])
            } else {
                b""
            };
            text.to_vec()
        };
        let record = |key: &[u8], from: usize| {
            records
                .get(key)
                .filter(|text| !text.is_empty())
                .cloned()
                .unwrap_or_else(|| owner(from))
        };
        let (user, group) = (record(b"uname", 265), record(b"gname", 297));
        let (seconds, nanos) = pax.mtime.unwrap_or((header.mtime, 0));
        if self.files.len() >= MAX_INODES {
            return Err(LayerError::TooLarge {
                what: "number of files",
                value: self.files.len() as u64,
                limit: MAX_INODES as u64,
            });
        }
        let file = File {
            kind: Cow::Borrowed(kind),
            offset: self.offset,
            size,
            link: Cow::Owned(link),
            mode: header.mode,
            uid: id(pax.uid.unwrap_or(header.uid))?,
            gid: id(pax.gid.unwrap_or(header.gid))?,
            user: Cow::Owned(user),
            group: Cow::Owned(group),
            time: Cow::Owned(time_text(seconds, nanos).into_bytes()),
            major: header.major,
            minor: header.minor,
            records: records
                .into_iter()
                .map(|(key, value)| (Cow::Owned(key), Cow::Owned(value)))
                .collect(),
            name: Cow::Owned(name),
        };
        self.files.push(file);
        self.state = State::Skip { left: padded };
        Ok(())
    }

    fn extended(&mut self, kind: u8) -> Result<(), LayerError> {
        let body = std::mem::take(&mut self.body);
        let given = |text: &[u8]| Some(text.to_vec()).filter(|text| !text.is_empty());
        match kind {
            b'L' => self.name = given(header::text(&body)),
            b'K' => self.link = given(header::text(&body)),
            _ => {
                self.pax = pax::parse(&body).map_err(|(_, what)| self.wrong(what))?;
                self.records.clear();
                let mut at = 0;
                while let Some(rest) = body.get(at..).filter(|rest| !rest.is_empty()) {
                    let (key, value, len) = pax::record(rest).map_err(|what| self.wrong(what))?;
                    self.records.insert(key.to_vec(), value.to_vec());
                    at += len;
                }
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<(Vec<File<'static>>, u64), LayerError> {
        match self.state {
            State::End(end) => Ok((self.files, end)),
            State::Header | State::SecondZero if self.block.is_empty() => Ok((self.files, self.offset)),
            _ => Err(LayerError::Truncated {
                format: "tar",
                length: self.offset,
                what: "an entry".to_owned(),
            }),
        }
    }

    fn wrong(&self, what: impl Into<String>) -> LayerError {
        LayerError::malformed("tar", self.offset, what)
    }
}

/// A time as Go writes it: RFC 3339 in UTC, nanoseconds without zeros at their end. Empty for years without four digits.
fn time_text(seconds: i64, nanos: u32) -> String {
    let Ok(time) = OffsetDateTime::from_unix_timestamp(seconds) else {
        return String::new();
    };
    if !(0..=9999).contains(&time.year()) {
        return String::new();
    }
    let fraction = match nanos {
        0 => String::new(),
        nanos => format!(".{nanos:09}").trim_end_matches('0').to_owned(),
    };
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}{fraction}Z",
        time.year(),
        u8::from(time.month()),
        time.day(),
        time.hour(),
        time.minute(),
        time.second()
    )
}
