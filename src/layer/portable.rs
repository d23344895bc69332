//! The index of a layer as one file that can be given to others: what a node needs to read the layer in ranges without ever having
//! streamed it.
//!
//! # Form
//! All integers are little-endian.
//!
//! ```text
//! 0    magic     8   "LZLSHARE"
//! 8    version   4   1
//! 12   access    1   as in the index
//! 13   codec     1   as in the index
//! 14   zero      2
//! 16   layer     32  digest of the layer's blob
//! 48   blob_size 8   bytes of the blob
//! 56   data_size 8   bytes of the data space
//! 64   counts    12  inodes, chunks, checkpoints: u32 each
//! 76   zero      4
//! 80   raw_len   8   bytes of the index, uncompressed
//! 88   index_len 8   bytes of the index, compressed with zstd
//! 96   index_sum 32  SHA-256 of them
//! 128  windows_len 8 bytes of the windows
//! 136  windows_sum 32 SHA-256 of them
//! 168  head_sum  32  SHA-256 of bytes 0 to 167
//! 200  index         crate::layer::index, compressed with zstd
//!      windows       crate::layer::checkpoint::windows, each compressed by itself
//! ```
//! The index comes first: the names can be read of the beginning of the file alone ([`Summary::index_end`], [`unpack_index`]).
//!
//! Whoever made the file decides what the layer's names and attributes are; the bytes of files are verified against digests in it. So
//! it has to come from somebody who is trusted to have read the layer, and this module protects against accidents, and against files
//! that would do harm by being read.

use std::io::Read;

use super::compression::zstd_frames_within;
use super::index::{Access, Codec, MAX_CHUNKS, MAX_INODES, codec_byte, codec_of};
use super::tree::memory_for_blob;
use super::{Digest, LayerError, LayerIndex, Windows};

const MAGIC: &[u8; 8] = b"LZLSHARE";
const VERSION: u32 = 1;
const FORMAT: &str = "portable index";
/// Bytes that [`inspect`] needs.
pub const HEADER_LEN: usize = 200;
/// Bytes of the header that its own checksum covers.
const COVERED: usize = HEADER_LEN - Digest::LEN;
/// Largest index, uncompressed, in bytes: three million files. More would not be refused by the index itself, but this one comes from
/// elsewhere, and is decompressed into memory.
pub const MAX_INDEX_LEN: u64 = 512 << 20;
/// Largest file, in bytes: the windows of a layer of 100 GB take a tenth of that.
pub const MAX_LEN: u64 = 4 << 30;
/// Largest window of its frame, as a power of two: that of the level, and some more.
const WINDOW_LOG: u32 = 25;
/// Bytes of memory that any takes: a decoder.
const BASE: u64 = 1 << 20;
/// zstd's level: names and digests gain hardly anything from a higher one.
const LEVEL: i32 = 9;

/// What the header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Digest of the layer's blob.
    pub layer: Digest,
    /// How the layer's bytes can be had.
    pub access: Access,
    /// How they are compressed.
    pub codec: Codec,
    /// Bytes of the blob.
    pub blob_size: u64,
    /// Bytes of the data space.
    pub data_size: u64,
    /// Files, directories and so on.
    pub inodes: u32,
    /// Chunks.
    pub chunks: u32,
    /// Checkpoints.
    pub checkpoints: u32,
    /// Bytes of the index, uncompressed.
    pub raw_len: u64,
    /// Bytes of the index in the file.
    pub index_len: u64,
    /// Bytes of the windows in the file.
    pub windows_len: u64,
    index_sum: Digest,
    windows_sum: Digest,
}

impl Summary {
    /// Bytes at the beginning of the file that hold header and index.
    pub fn index_end(&self) -> u64 {
        HEADER_LEN as u64 + self.index_len
    }

    /// Bytes of the file.
    pub fn len(&self) -> u64 {
        self.index_end() + self.windows_len
    }

    /// Bytes of memory that [`unpack`] takes besides the file: the index as bytes and as records, which are little larger, and the windows.
    pub fn memory(&self) -> u64 {
        let window = (1 << WINDOW_LOG).min(self.raw_len);
        self.raw_len + self.raw_len * 5 / 4 + window + 2 * self.windows_len + BASE
    }

    /// Never.
    pub fn is_empty(&self) -> bool {
        false
    }
}

/// Makes the file.
///
/// # Errors
/// [`LayerError::TooLarge`] when it would be larger than what is read, and [`LayerError::Malformed`] when the windows are not the index's.
pub fn pack(layer: &Digest, index: &LayerIndex, windows: &Windows) -> Result<Vec<u8>, LayerError> {
    if windows.len() != index.checkpoints().len() {
        let what = format!(
            "{} windows for {} checkpoints",
            windows.len(),
            index.checkpoints().len()
        );
        return Err(LayerError::malformed(FORMAT, 0, what));
    }
    let raw = index.encode();
    limit("length of the index", raw.len() as u64, MAX_INDEX_LEN)?;
    let id = Digest::of(&raw);
    let packed =
        zstd::bulk::compress(&raw, LEVEL).map_err(|error| LayerError::malformed(FORMAT, 0, error.to_string()))?;
    let windows = windows.encode(&id);
    let len = (HEADER_LEN + packed.len() + windows.len()) as u64;
    limit("length of the portable index", len, MAX_LEN)?;
    let mut out = Vec::with_capacity(len as usize);
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.push(match index.access() {
        Access::Stream => 0,
        Access::Ranges => 1,
    });
    out.push(codec_byte(index.codec()));
    out.extend_from_slice(&[0; 2]);
    out.extend_from_slice(layer.as_bytes());
    out.extend_from_slice(&index.blob_size().to_le_bytes());
    out.extend_from_slice(&index.data_size().to_le_bytes());
    for count in [index.inodes().len(), index.chunks().len(), index.checkpoints().len()] {
        out.extend_from_slice(&(count as u32).to_le_bytes());
    }
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&(raw.len() as u64).to_le_bytes());
    for part in [&packed, &windows] {
        out.extend_from_slice(&(part.len() as u64).to_le_bytes());
        out.extend_from_slice(Digest::of(part).as_bytes());
    }
    let sum = Digest::of(&out);
    out.extend_from_slice(sum.as_bytes());
    out.extend_from_slice(&packed);
    out.extend_from_slice(&windows);
    Ok(out)
}

/// Reads the header; more bytes than that are not looked at.
///
/// # Errors
/// [`LayerError`] when it is not one of this version, is damaged, or promises more than is read.
pub fn inspect(bytes: &[u8]) -> Result<Summary, LayerError> {
    let header = bytes.get(..HEADER_LEN).ok_or_else(|| truncated(bytes, "its header"))?;
    let mut reader = Reader(header);
    if reader.array::<8>() != *MAGIC {
        return Err(LayerError::malformed(FORMAT, 0, "the magic number is missing"));
    }
    let version = reader.u32();
    if version != VERSION {
        return Err(LayerError::Unsupported {
            what: format!("version {version} of the portable index"),
        });
    }
    let (covered, sum) = header.split_at(COVERED);
    if Digest::of(covered).as_bytes() != sum {
        return Err(LayerError::malformed(
            FORMAT,
            COVERED as u64,
            "the checksum does not match",
        ));
    }
    let [access, codec, _, _] = reader.array::<4>();
    let unknown = |at: u64| LayerError::malformed(FORMAT, at, "an unknown kind of access or codec");
    let summary = Summary {
        access: match access {
            0 => Access::Stream,
            1 => Access::Ranges,
            _ => return Err(unknown(12)),
        },
        codec: codec_of(codec).ok_or_else(|| unknown(13))?,
        layer: reader.digest(),
        blob_size: reader.u64(),
        data_size: reader.u64(),
        inodes: reader.u32(),
        chunks: reader.u32(),
        checkpoints: {
            let count = reader.u32();
            reader.u32();
            count
        },
        raw_len: reader.u64(),
        index_len: reader.u64(),
        index_sum: reader.digest(),
        windows_len: reader.u64(),
        windows_sum: reader.digest(),
    };
    limit("number of inodes", summary.inodes.into(), MAX_INODES as u64)?;
    limit("number of chunks", summary.chunks.into(), MAX_CHUNKS as u64)?;
    limit("number of checkpoints", summary.checkpoints.into(), MAX_CHUNKS as u64)?;
    limit("length of the index", summary.raw_len, MAX_INDEX_LEN)?;
    limit("compressed length of the index", summary.index_len, MAX_INDEX_LEN)?;
    limit("length of the windows", summary.windows_len, MAX_LEN)?;
    Ok(summary)
}

/// Reads the index of the layer with digest `layer`. `bytes` is the beginning of the file, or all of it.
///
/// # Errors
/// [`LayerError`] when it is damaged, or that of another layer.
pub fn unpack_index(layer: &Digest, bytes: &[u8]) -> Result<LayerIndex, LayerError> {
    let summary = inspect(bytes)?;
    index(layer, bytes, &summary).map(|(index, _)| index)
}

/// Reads the whole file, of the layer with digest `layer`.
///
/// # Errors
/// As [`unpack_index`], and when windows are damaged or missing, or something follows them.
pub fn unpack(layer: &Digest, bytes: &[u8]) -> Result<(LayerIndex, Windows), LayerError> {
    unpack_within(layer, bytes, u64::MAX)
}

/// The same, with no more than `memory` bytes besides the file.
///
/// # Errors
/// As [`unpack`], and [`LayerError::TooLarge`] when it takes more.
pub fn unpack_within(layer: &Digest, bytes: &[u8], memory: u64) -> Result<(LayerIndex, Windows), LayerError> {
    let summary = inspect(bytes)?;
    limit("memory for the portable index in bytes", summary.memory(), memory)?;
    let (index, id) = index(layer, bytes, &summary)?;
    let windows = part(
        bytes,
        summary.index_end(),
        summary.windows_len,
        &summary.windows_sum,
        "its windows",
    )?;
    if bytes.len() as u64 != summary.len() {
        return Err(LayerError::malformed(
            FORMAT,
            summary.len(),
            "there are bytes after its windows",
        ));
    }
    let windows = Windows::decode(windows, &id, index.checkpoints())?;
    Ok((index, windows))
}

/// The index, and its digest.
fn index(layer: &Digest, bytes: &[u8], summary: &Summary) -> Result<(LayerIndex, Digest), LayerError> {
    if summary.layer != *layer {
        let what = format!("it belongs to the layer {}, not to {layer}", summary.layer);
        return Err(LayerError::malformed(FORMAT, 16, what));
    }
    let packed = part(
        bytes,
        HEADER_LEN as u64,
        summary.index_len,
        &summary.index_sum,
        "its index",
    )?;
    let broken = |error: std::io::Error| LayerError::malformed(FORMAT, HEADER_LEN as u64, error.to_string());
    let mut raw = Vec::with_capacity(summary.raw_len as usize + 1);
    let mut decoder = zstd_frames_within(packed, WINDOW_LOG).map_err(broken)?;
    decoder
        .by_ref()
        .take(summary.raw_len + 1)
        .read_to_end(&mut raw)
        .map_err(broken)?;
    if raw.len() as u64 != summary.raw_len {
        return Err(LayerError::malformed(
            FORMAT,
            80,
            "the index has another length than the header says",
        ));
    }
    let index = LayerIndex::decode(&raw)?;
    limit(
        "memory of names and attributes in bytes",
        index.names_memory(),
        memory_for_blob(summary.blob_size),
    )?;
    let counts = [index.inodes().len(), index.chunks().len(), index.checkpoints().len()];
    let same = (index.access(), index.codec()) == (summary.access, summary.codec)
        && (index.blob_size(), index.data_size()) == (summary.blob_size, summary.data_size)
        && counts == [summary.inodes, summary.chunks, summary.checkpoints].map(|count| count as usize);
    if !same {
        return Err(LayerError::malformed(FORMAT, 0, "the header is not that of its index"));
    }
    Ok((index, Digest::of(&raw)))
}

/// A part of the file, verified.
fn part<'a>(bytes: &'a [u8], offset: u64, len: u64, sum: &Digest, what: &str) -> Result<&'a [u8], LayerError> {
    let range = usize::try_from(offset).ok().zip(usize::try_from(len).ok());
    let part = range.and_then(|(offset, len)| bytes.get(offset..)?.get(..len));
    let part = part.ok_or_else(|| truncated(bytes, what))?;
    let actual = Digest::of(part);
    if actual != *sum {
        return Err(LayerError::DigestMismatch {
            what: "part of a portable index",
            expected: *sum,
            actual,
        });
    }
    Ok(part)
}

fn truncated(bytes: &[u8], what: &str) -> LayerError {
    LayerError::Truncated {
        format: FORMAT,
        length: bytes.len() as u64,
        what: what.to_owned(),
    }
}

fn limit(what: &'static str, value: u64, limit: u64) -> Result<(), LayerError> {
    if value > limit {
        return Err(LayerError::TooLarge { what, value, limit });
    }
    Ok(())
}

/// Reads numbers; zeros where the bytes run out, which those of a whole header never do.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> [u8; N] {
        let Some((head, tail)) = self.0.split_first_chunk() else {
            return [0; N];
        };
        self.0 = tail;
        *head
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    fn digest(&mut self) -> Digest {
        Digest::from_bytes(self.array())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::Chunk;
    use crate::layer::checkpoint::{Checkpoint, Entry};
    use crate::layer::testing::sample_parts;

    fn layer() -> Digest {
        Digest::of(b"layer")
    }

    /// An index of spans, with the windows of two of them.
    fn sample() -> (LayerIndex, Windows) {
        let mut parts = sample_parts();
        let whole = parts.chunks[0];
        let half = whole.data_len / 2;
        parts.access = Access::Ranges;
        parts.codec = Codec::GzipSpans;
        let checkpoint = |data_offset: u64, data_len, entry| Checkpoint {
            data_offset,
            data_len,
            blob_offset: data_offset / 1000 + 1,
            blob_len: 3,
            entry,
            digest: Digest::of(b"span"),
        };
        let entry = Entry::Block { bits: 3, window: 1000 };
        parts.checkpoints = vec![
            checkpoint(0, half, Entry::Member),
            checkpoint(half.into(), whole.data_len - half, entry),
        ];
        parts.chunks = parts
            .checkpoints
            .iter()
            .map(|checkpoint| Chunk {
                data_offset: checkpoint.data_offset,
                data_len: checkpoint.data_len,
                blob_offset: checkpoint.start(),
                blob_len: 3,
                ..whole
            })
            .collect();
        let window: Vec<u8> = (0..1000u32).map(|i| (i * i) as u8).collect();
        (
            LayerIndex::new(parts).unwrap(),
            Windows::of([&b""[..], &window]).unwrap(),
        )
    }

    #[test]
    fn an_index_travels() {
        let (index, windows) = sample();
        let bytes = pack(&layer(), &index, &windows).unwrap();
        assert_eq!(unpack(&layer(), &bytes).unwrap(), (index.clone(), windows));
        let summary = inspect(&bytes[..HEADER_LEN]).unwrap();
        assert_eq!((summary.layer, summary.len()), (layer(), bytes.len() as u64));
        assert_eq!((summary.checkpoints, summary.codec), (2, Codec::GzipSpans));
        let head = &bytes[..summary.index_end() as usize];
        assert_eq!(unpack_index(&layer(), head).unwrap(), index);
        assert!(unpack(&layer(), head).is_err());
    }

    #[test]
    fn anything_else_is_refused() {
        let (index, windows) = sample();
        let bytes = pack(&layer(), &index, &windows).unwrap();
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x10;
            assert!(unpack(&layer(), &bad).is_err(), "byte {at}");
            assert!(unpack(&layer(), &bytes[..at]).is_err(), "length {at}");
        }
        assert!(unpack(&layer(), &[&bytes[..], &[0]].concat()).is_err());
        let other = unpack(&Digest::of(b"other"), &bytes).unwrap_err();
        assert!(other.to_string().contains("belongs to the layer"), "{other}");
        assert!(pack(&layer(), &index, &Windows::new()).is_err());
    }

    /// Changes the header, and makes its checksum right.
    fn forged(bytes: &[u8], at: usize, value: &[u8]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        bytes[at..at + value.len()].copy_from_slice(value);
        let sum = Digest::of(&bytes[..COVERED]);
        bytes[COVERED..HEADER_LEN].copy_from_slice(sum.as_bytes());
        bytes
    }

    #[test]
    fn lies_in_the_header_are_refused() {
        let (index, windows) = sample();
        let bytes = pack(&layer(), &index, &windows).unwrap();
        let error = |at: usize, value: &[u8]| unpack(&layer(), &forged(&bytes, at, value)).unwrap_err();
        let huge = u64::MAX.to_le_bytes();
        for at in [80, 88, 128] {
            assert!(matches!(error(at, &huge), LayerError::TooLarge { .. }), "{at}");
        }
        for at in [64, 68, 72] {
            assert!(matches!(error(at, &huge[..4]), LayerError::TooLarge { .. }), "{at}");
        }
        for at in [12, 13, 48, 56, 64, 68, 72, 80] {
            assert!(matches!(error(at, &[7]), LayerError::Malformed { .. }), "{at}");
        }
        assert!(matches!(error(8, &[9]), LayerError::Unsupported { .. }));
        // A few kilobytes of zstd that make megabytes of zeros, were it not for the limit.
        let bomb = zstd::encode_all(std::io::repeat(0).take(64 << 20), 19).unwrap();
        let mut bad = forged(&bytes, 88, &(bomb.len() as u64).to_le_bytes());
        bad.splice(
            HEADER_LEN..HEADER_LEN + inspect(&bytes).unwrap().index_len as usize,
            bomb.iter().copied(),
        );
        let bad = forged(&bad, 96, Digest::of(&bomb).as_bytes());
        let error = unpack(&layer(), &bad).unwrap_err();
        assert!(error.to_string().contains("another length"), "{error}");
    }
}
