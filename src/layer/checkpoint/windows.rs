//! The windows of a layer's checkpoints, each compressed by itself, so that one can be loaded without the others.
//!
//! # On disk
//! All integers are little-endian.
//!
//! ```text
//! 0   magic     8   "LZLWINDS"
//! 8   version   4   1
//! 12  count     4   windows, one for each checkpoint of the index, in its order
//! 16  index     32  digest of the index that they belong to
//! 48  table     44 each:
//!               8   offset of the compressed window, counted from the end of the table's checksum
//!               4   bytes of it; 0 for a checkpoint that needs no window
//!               32  digest of it
//!     sha256    32  of everything before it
//!     windows       compressed with zstd
//! ```
//! Windows follow each other without gaps.

use super::{Checkpoint, MAX_WINDOW};
use crate::layer::index::MAX_CHUNKS;
use crate::layer::{Digest, LayerError};

const MAGIC: &[u8; 8] = b"LZLWINDS";
const VERSION: u32 = 1;
const FORMAT: &str = "windows";
const HEADER_LEN: usize = 48;
const RECORD_LEN: usize = 44;
/// zstd's level: higher ones gain hardly anything on 32 KiB, and lower ones lose a tenth.
const LEVEL: i32 = 6;
/// Most bytes of a compressed window: what zstd makes of 32 KiB that cannot be compressed.
const MAX_COMPRESSED: u32 = MAX_WINDOW as u32 + 512;

/// Compresses a window, as [`Windows::push`] takes it.
///
/// # Errors
/// [`LayerError::TooLarge`] when it is longer than [`MAX_WINDOW`].
pub fn compress(window: &[u8]) -> Result<Vec<u8>, LayerError> {
    if window.len() > MAX_WINDOW {
        return Err(LayerError::TooLarge {
            what: "length of a window",
            value: window.len() as u64,
            limit: MAX_WINDOW as u64,
        });
    }
    if window.is_empty() {
        return Ok(Vec::new());
    }
    zstd::bulk::compress(window, LEVEL).map_err(|error| LayerError::malformed(FORMAT, 0, error.to_string()))
}

/// Where one compressed window is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Record {
    offset: u64,
    len: u32,
    digest: Digest,
}

/// All windows of a layer. The default is no window at all, as layers have that need none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Windows {
    records: Vec<Record>,
    compressed: Vec<u8>,
}

impl Windows {
    /// No window yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Windows, one for each checkpoint in their order; empty where a checkpoint needs none.
    ///
    /// # Errors
    /// As [`compress`].
    pub fn of<'a>(windows: impl IntoIterator<Item = &'a [u8]>) -> Result<Self, LayerError> {
        let mut all = Windows::new();
        for window in windows {
            all.push(&compress(window)?);
        }
        Ok(all)
    }

    /// Adds the window of the next checkpoint, made by [`compress`].
    pub fn push(&mut self, compressed: &[u8]) {
        self.records.push(Record {
            offset: self.compressed.len() as u64,
            len: compressed.len() as u32,
            digest: Digest::of(compressed),
        });
        self.compressed.extend_from_slice(compressed);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Bytes of all compressed windows.
    pub fn compressed_size(&self) -> u64 {
        self.compressed.len() as u64
    }

    /// Bytes of memory.
    pub fn memory(&self) -> u64 {
        (size_of_val(&self.records[..]) + self.compressed.len()) as u64
    }

    /// The window of the checkpoint at position `at`.
    ///
    /// # Errors
    /// [`LayerError`] when there is none, or it is damaged.
    pub fn window(&self, at: usize, checkpoint: &Checkpoint) -> Result<Vec<u8>, LayerError> {
        let record = self.records.get(at).ok_or_else(|| missing(at))?;
        let place = usize::try_from(record.offset).unwrap_or(usize::MAX);
        let bytes = self.compressed.get(place..).and_then(|b| b.get(..record.len as usize));
        decompress(at, record, bytes.ok_or_else(|| missing(at))?, checkpoint)
    }

    /// The on-disk form, for the index whose digest is `index`.
    pub fn encode(&self, index: &Digest) -> Vec<u8> {
        let mut out = self.encode_table(index);
        out.extend_from_slice(&self.compressed);
        out
    }

    fn encode_table(&self, index: &Digest) -> Vec<u8> {
        let mut out = Vec::with_capacity(table_len(self.records.len()) as usize + self.compressed.len());
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(self.records.len() as u32).to_le_bytes());
        out.extend_from_slice(index.as_bytes());
        for record in &self.records {
            out.extend_from_slice(&record.offset.to_le_bytes());
            out.extend_from_slice(&record.len.to_le_bytes());
            out.extend_from_slice(record.digest.as_bytes());
        }
        let checksum = Digest::of(&out);
        out.extend_from_slice(checksum.as_bytes());
        out
    }

    /// Reads the on-disk form, and verifies all of it but what the windows are for.
    ///
    /// # Errors
    /// [`LayerError`] as [`WindowTable::decode`], and when a window is damaged or missing.
    pub fn decode(bytes: &[u8], index: &Digest, checkpoints: &[Checkpoint]) -> Result<Self, LayerError> {
        let table = WindowTable::decode(bytes, index, checkpoints)?;
        let windows = bytes.get(table_len(table.records.len()) as usize..).unwrap_or_default();
        if windows.len() as u64 != table.windows_len() {
            return Err(LayerError::Truncated {
                format: FORMAT,
                length: bytes.len() as u64,
                what: "its windows".to_owned(),
            });
        }
        let windows = Windows {
            records: table.records,
            compressed: windows.to_vec(),
        };
        for (at, record) in windows.records.iter().enumerate() {
            let bytes = windows
                .compressed
                .get(record.offset as usize..)
                .and_then(|b| b.get(..record.len as usize));
            check_digest(record, bytes.ok_or_else(|| missing(at))?)?;
        }
        Ok(windows)
    }
}

/// Where the windows of a layer are in their file, without the windows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WindowTable {
    records: Vec<Record>,
}

impl WindowTable {
    /// Bytes at the beginning of the on-disk form that [`WindowTable::decode`] needs for `count` windows.
    pub fn encoded_len(count: usize) -> u64 {
        table_len(count)
    }

    /// Reads the beginning of the on-disk form.
    ///
    /// # Errors
    /// [`LayerError`] when the bytes are not of this version, damaged, or do not belong to the index with this digest and these
    /// checkpoints.
    pub fn decode(bytes: &[u8], index: &Digest, checkpoints: &[Checkpoint]) -> Result<Self, LayerError> {
        let truncated = || LayerError::Truncated {
            format: FORMAT,
            length: bytes.len() as u64,
            what: "its table".to_owned(),
        };
        let malformed = |at: u64, what: &str| Err(LayerError::malformed(FORMAT, at, what));
        let (magic, rest) = bytes.split_first_chunk::<8>().ok_or_else(truncated)?;
        let (version, rest) = rest.split_first_chunk::<4>().ok_or_else(truncated)?;
        let (count, rest) = rest.split_first_chunk::<4>().ok_or_else(truncated)?;
        let (of, rest) = rest.split_first_chunk::<32>().ok_or_else(truncated)?;
        if magic != MAGIC {
            return malformed(0, "the magic number is missing");
        }
        let version = u32::from_le_bytes(*version);
        if version != VERSION {
            return Err(LayerError::Unsupported {
                what: format!("version {version} of the windows"),
            });
        }
        if of != index.as_bytes() {
            return malformed(16, "they belong to another index");
        }
        let count = u32::from_le_bytes(*count) as usize;
        if count != checkpoints.len() || count > MAX_CHUNKS {
            return malformed(12, "there are not as many windows as checkpoints");
        }
        let table = rest.get(..count * RECORD_LEN).ok_or_else(truncated)?;
        let covered = HEADER_LEN + table.len();
        let checksum = bytes.get(covered..covered + Digest::LEN).ok_or_else(truncated)?;
        if Digest::of(&bytes[..covered]).as_bytes() != checksum {
            return malformed(covered as u64, "the checksum does not match");
        }
        let mut records = Vec::with_capacity(count);
        let mut end = 0;
        for (at, (bytes, checkpoint)) in table.chunks_exact(RECORD_LEN).zip(checkpoints).enumerate() {
            let record = record(bytes).ok_or_else(truncated)?;
            if record.offset != end || record.len > MAX_COMPRESSED {
                return malformed(at as u64, "a window is too long, or does not follow the one before");
            }
            if (record.len == 0) != (checkpoint.window_len() == 0) {
                return malformed(at as u64, "a window is missing, or is there and not needed");
            }
            end += u64::from(record.len);
            records.push(record);
        }
        Ok(WindowTable { records })
    }

    /// Bytes of all compressed windows.
    pub fn windows_len(&self) -> u64 {
        self.records.last().map_or(0, |last| last.offset + u64::from(last.len))
    }

    /// Where in the on-disk form the compressed window of the checkpoint at position `at` is, as offset and length.
    pub fn place(&self, at: usize) -> Option<(u64, u32)> {
        let record = self.records.get(at)?;
        Some((table_len(self.records.len()) + record.offset, record.len))
    }

    /// Verifies and decompresses the window of the checkpoint at position `at`.
    ///
    /// # Errors
    /// [`LayerError`] when it is damaged.
    pub fn open(&self, at: usize, compressed: &[u8], checkpoint: &Checkpoint) -> Result<Vec<u8>, LayerError> {
        let record = self.records.get(at).ok_or_else(|| missing(at))?;
        decompress(at, record, compressed, checkpoint)
    }
}

fn table_len(count: usize) -> u64 {
    (HEADER_LEN + Digest::LEN) as u64 + count as u64 * RECORD_LEN as u64
}

fn record(bytes: &[u8]) -> Option<Record> {
    let (offset, rest) = bytes.split_first_chunk()?;
    let (len, rest) = rest.split_first_chunk()?;
    Some(Record {
        offset: u64::from_le_bytes(*offset),
        len: u32::from_le_bytes(*len),
        digest: Digest::from_bytes(*rest.first_chunk()?),
    })
}

fn missing(at: usize) -> LayerError {
    LayerError::malformed(FORMAT, at as u64, "there is no such window")
}

fn check_digest(record: &Record, compressed: &[u8]) -> Result<(), LayerError> {
    let actual = Digest::of(compressed);
    if actual != record.digest {
        return Err(LayerError::DigestMismatch {
            what: "window",
            expected: record.digest,
            actual,
        });
    }
    Ok(())
}

fn decompress(at: usize, record: &Record, compressed: &[u8], checkpoint: &Checkpoint) -> Result<Vec<u8>, LayerError> {
    check_digest(record, compressed)?;
    let len = checkpoint.window_len() as usize;
    if len == 0 {
        return Ok(Vec::new());
    }
    // The limit is on what zstd may write, whatever its frame claims.
    let window = zstd::bulk::decompress(compressed, len.min(MAX_WINDOW))
        .map_err(|error| LayerError::malformed(FORMAT, at as u64, error.to_string()))?;
    if window.len() != len {
        return Err(LayerError::malformed(
            FORMAT,
            at as u64,
            "a window has the wrong length",
        ));
    }
    Ok(window)
}
