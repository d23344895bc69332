//! The index on disk.
//!
//! All integers are little-endian. Records have a fixed size, so that an index of 100,000 files loads in milliseconds.
//!
//! ```text
//! 0   magic     8   "LZLINDEX"
//! 8   version   4   3
//! 12  access    1   0 = stream, 1 = ranges
//! 13  codec     1   0 = none, 1 = gzip, 2 = zstd, 3 = spans of gzip
//! 14  verify    1   0 = digests of chunks, 1 = digests of spans
//! 15  zero      1
//! 16  data_size 8   bytes of the data space
//! 24  blob_size 8   bytes of the layer's blob in the registry
//! 32  counts    16  inodes, directory entries, xattrs, chunks: u32 each
//! 48  strings   8   bytes of the string area
//! 56  spans     4   checkpoints
//! 60  zero      4
//! 64  inodes    76 each: the fields of [`Inode`] in their order, `flags` last, 4 zero bytes
//!     entries   12 each: name offset u32, name length u32, inode u32
//!     xattrs    16 each: name offset, name length, value offset, value length: u32 each
//!     chunks    60 each
//!     spans     64 each: data offset u64, data length u32, blob offset u64, blob length u32, digest, window u32, bits u8 (255: a
//!               member), 3 zero bytes
//!     strings
//!     sha256    32  of everything before it
//! ```
//! Version 2 ended its header at byte 56, and had no spans; it is still read.

use super::{Access, Chunk, Codec, Dirent, FORMAT, IndexParts, Inode, LayerIndex, Verify, Xattr};
use crate::layer::checkpoint::Entry;
use crate::layer::{Checkpoint, Digest, LayerError};

const MAGIC: &[u8; 8] = b"LZLINDEX";
/// Version of the on-disk form. A file with another version, but for [`WITHOUT_SPANS`], is discarded and made again.
const VERSION: u32 = 3;
/// The version before, which is the same without spans: what is in the cache stays useful.
const WITHOUT_SPANS: u32 = 2;
/// Bytes of the header up to the spans.
const COMMON_LEN: usize = 56;
const HEADER_LEN: usize = 64;
const INODE_LEN: usize = 76;
const DIRENT_LEN: usize = 12;
const XATTR_LEN: usize = 16;
pub(super) const CHUNK_LEN: usize = 60;
const SPAN_LEN: usize = 64;
/// In the place of the bits: a checkpoint at the header of a member.
const AT_MEMBER: u8 = 255;

impl LayerIndex {
    /// The on-disk form; the same index always gives the same bytes.
    pub fn encode(&self) -> Vec<u8> {
        let p = &self.parts;
        let mut out = Vec::with_capacity(encoded_len(p));
        out.extend_from_slice(MAGIC);
        put32(&mut out, VERSION);
        out.push(match p.access {
            Access::Stream => 0,
            Access::Ranges => 1,
        });
        out.push(codec_byte(p.codec));
        out.push(match p.verify {
            Verify::Content => 0,
            Verify::Span => 1,
        });
        out.push(0);
        put64(&mut out, p.data_size);
        put64(&mut out, p.blob_size);
        for count in [p.inodes.len(), p.dirents.len(), p.xattrs.len(), p.chunks.len()] {
            put32(&mut out, count as u32);
        }
        put64(&mut out, p.strings.len() as u64);
        put32(&mut out, p.checkpoints.len() as u32);
        put32(&mut out, 0);
        for i in &p.inodes {
            for word in [i.mode, i.uid, i.gid, i.nlink, i.rdev_major, i.rdev_minor] {
                put32(&mut out, word);
            }
            put64(&mut out, i.size);
            put64(&mut out, i.mtime as u64);
            put32(&mut out, i.mtime_nsec);
            put32(&mut out, i.parent);
            put64(&mut out, i.data);
            for word in [i.count, i.xattr_first, i.xattr_count, i.flags, 0] {
                put32(&mut out, word);
            }
        }
        for e in &p.dirents {
            for word in [e.name, e.name_len, e.ino] {
                put32(&mut out, word);
            }
        }
        for x in &p.xattrs {
            for word in [x.name, x.name_len, x.value, x.value_len] {
                put32(&mut out, word);
            }
        }
        for c in &p.chunks {
            put64(&mut out, c.data_offset);
            put64(&mut out, c.blob_offset);
            for word in [c.data_len, c.blob_len, c.skip] {
                put32(&mut out, word);
            }
            out.extend_from_slice(c.digest.as_bytes());
        }
        for c in &p.checkpoints {
            put64(&mut out, c.data_offset);
            put32(&mut out, c.data_len);
            put64(&mut out, c.blob_offset);
            put32(&mut out, c.blob_len);
            out.extend_from_slice(c.digest.as_bytes());
            put32(&mut out, c.window_len());
            let bits = match c.entry {
                Entry::Member => AT_MEMBER,
                Entry::Block { bits, .. } => bits,
            };
            out.extend_from_slice(&[bits, 0, 0, 0]);
        }
        out.extend_from_slice(&p.strings);
        let digest = Digest::of(&out);
        let _ = self.fingerprint.set(digest);
        out.extend_from_slice(digest.as_bytes());
        out
    }

    /// Tells this index from every other one: the checksum of its on-disk form. Free for an index that was encoded or decoded before,
    /// as long as an encoding the first time for any other.
    pub fn fingerprint(&self) -> Digest {
        self.fingerprint.get().copied().unwrap_or_else(|| {
            let bytes = self.encode();
            // It ends with its checksum.
            let checksum = bytes.last_chunk::<{ Digest::LEN }>();
            checksum.map_or_else(|| Digest::of(&bytes), |checksum| Digest::from_bytes(*checksum))
        })
    }

    /// Reads the on-disk form.
    ///
    /// # Errors
    /// [`LayerError`] when the bytes are not an index of this version, are damaged, or break a rule of [`LayerIndex::new`].
    pub fn decode(bytes: &[u8]) -> Result<Self, LayerError> {
        let truncated = |what: &str| LayerError::Truncated {
            format: FORMAT,
            length: bytes.len() as u64,
            what: what.to_owned(),
        };
        let body_len = bytes
            .len()
            .checked_sub(Digest::LEN)
            .ok_or_else(|| truncated("its checksum"))?;
        let (body, checksum) = bytes.split_at(body_len);
        let mut r = Reader { bytes: body };
        let header = r.take(COMMON_LEN).ok_or_else(|| truncated("its header"))?;
        let mut h = Reader { bytes: header };
        if h.array::<8>() != *MAGIC {
            return Err(LayerError::malformed(FORMAT, 0, "the magic number is missing"));
        }
        let version = h.u32();
        if version != VERSION && version != WITHOUT_SPANS {
            return Err(LayerError::Unsupported {
                what: format!("version {version} of the layer index"),
            });
        }
        let fingerprint = Digest::of(body);
        if fingerprint.as_bytes() != checksum {
            return Err(LayerError::malformed(
                FORMAT,
                body_len as u64,
                "the checksum does not match",
            ));
        }
        let [access, codec, verify, _] = h.array::<4>();
        let access = match access {
            0 => Access::Stream,
            1 => Access::Ranges,
            other => {
                return Err(LayerError::malformed(
                    FORMAT,
                    12,
                    format!("unknown access kind {other}"),
                ));
            }
        };
        let codec =
            codec_of(codec).ok_or_else(|| LayerError::malformed(FORMAT, 13, format!("unknown codec {codec}")))?;
        let verify = match verify {
            0 => Verify::Content,
            1 => Verify::Span,
            other => {
                let what = format!("unknown way to verify {other}");
                return Err(LayerError::malformed(FORMAT, 14, what));
            }
        };
        let (data_size, blob_size) = (h.u64(), h.u64());
        let [inodes, dirents, xattrs, chunks] = std::array::from_fn(|_| h.u32() as usize);
        let strings = h.u64() as usize;
        let spans = match version {
            VERSION => {
                let more = r.take(HEADER_LEN - COMMON_LEN).ok_or_else(|| truncated("its header"))?;
                Reader { bytes: more }.u32() as usize
            }
            _ => 0,
        };
        let mut section = |count: usize, record: usize, what: &str| {
            count
                .checked_mul(record)
                .and_then(|len| r.take(len))
                .ok_or_else(|| truncated(what))
        };
        let inodes = section(inodes, INODE_LEN, "its inodes")?;
        let dirents = section(dirents, DIRENT_LEN, "its directory entries")?;
        let xattrs = section(xattrs, XATTR_LEN, "its extended attributes")?;
        let chunks = section(chunks, CHUNK_LEN, "its chunks")?;
        let spans = section(spans, SPAN_LEN, "its checkpoints")?;
        let strings = section(strings, 1, "its strings")?;
        if !r.bytes.is_empty() {
            return Err(LayerError::malformed(
                FORMAT,
                body_len as u64,
                "there are bytes after its strings",
            ));
        }
        let index = LayerIndex::new(IndexParts {
            access,
            codec,
            data_size,
            blob_size,
            inodes: inodes
                .chunks_exact(INODE_LEN)
                .map(|b| decode_inode(Reader { bytes: b }))
                .collect(),
            dirents: dirents
                .chunks_exact(DIRENT_LEN)
                .map(|b| decode_dirent(Reader { bytes: b }))
                .collect(),
            xattrs: xattrs
                .chunks_exact(XATTR_LEN)
                .map(|b| decode_xattr(Reader { bytes: b }))
                .collect(),
            chunks: chunks.chunks_exact(CHUNK_LEN).map(decode_chunk).collect(),
            verify,
            checkpoints: spans
                .chunks_exact(SPAN_LEN)
                .map(|b| decode_checkpoint(Reader { bytes: b }))
                .collect(),
            strings: strings.to_vec(),
        })?;
        let _ = index.fingerprint.set(fingerprint);
        Ok(index)
    }
}

/// Where the records of the chunks begin in the on-disk form of the index that has these parts.
pub(super) fn first_chunk(p: &IndexParts, bytes: &[u8]) -> Option<usize> {
    let version = Reader {
        bytes: bytes.get(8..12)?,
    }
    .u32();
    let header = match version {
        VERSION => HEADER_LEN,
        WITHOUT_SPANS => COMMON_LEN,
        _ => return None,
    };
    let names = p.inodes.len() * INODE_LEN + p.dirents.len() * DIRENT_LEN + p.xattrs.len() * XATTR_LEN;
    let behind = p.chunks.len() * CHUNK_LEN + p.checkpoints.len() * SPAN_LEN + p.strings.len() + Digest::LEN;
    (header + names + behind == bytes.len()).then_some(header + names)
}

/// The codec as a byte.
pub(in crate::layer) fn codec_byte(codec: Codec) -> u8 {
    match codec {
        Codec::None => 0,
        Codec::Gzip => 1,
        Codec::Zstd => 2,
        Codec::GzipSpans => 3,
    }
}

/// The codec that [`codec_byte`] made that byte of.
pub(in crate::layer) fn codec_of(byte: u8) -> Option<Codec> {
    [Codec::None, Codec::Gzip, Codec::Zstd, Codec::GzipSpans]
        .get(usize::from(byte))
        .copied()
}

fn encoded_len(p: &IndexParts) -> usize {
    HEADER_LEN
        + p.inodes.len() * INODE_LEN
        + p.dirents.len() * DIRENT_LEN
        + p.xattrs.len() * XATTR_LEN
        + p.chunks.len() * CHUNK_LEN
        + p.checkpoints.len() * SPAN_LEN
        + p.strings.len()
        + Digest::LEN
}

fn put32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// Reads fixed-size records. Where the bytes run out, the numbers are zero: callers take a record of the right length first.
struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.bytes.split_at_checked(len)?;
        self.bytes = tail;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        self.take(N).and_then(|b| b.try_into().ok()).unwrap_or([0; N])
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }
}

fn decode_inode(mut r: Reader<'_>) -> Inode {
    let [mode, uid, gid, nlink, rdev_major, rdev_minor] = std::array::from_fn(|_| r.u32());
    let (size, mtime) = (r.u64(), r.u64() as i64);
    let (mtime_nsec, parent, data) = (r.u32(), r.u32(), r.u64());
    let [count, xattr_first, xattr_count, flags] = std::array::from_fn(|_| r.u32());
    Inode {
        mode,
        uid,
        gid,
        nlink,
        rdev_major,
        rdev_minor,
        size,
        mtime,
        mtime_nsec,
        parent,
        data,
        count,
        xattr_first,
        xattr_count,
        flags,
    }
}

fn decode_dirent(mut r: Reader<'_>) -> Dirent {
    Dirent {
        name: r.u32(),
        name_len: r.u32(),
        ino: r.u32(),
    }
}

fn decode_xattr(mut r: Reader<'_>) -> Xattr {
    Xattr {
        name: r.u32(),
        name_len: r.u32(),
        value: r.u32(),
        value_len: r.u32(),
    }
}

/// Reads the record of a chunk, of [`CHUNK_LEN`] bytes.
pub(super) fn decode_chunk(bytes: &[u8]) -> Chunk {
    let mut r = Reader { bytes };
    let (data_offset, blob_offset) = (r.u64(), r.u64());
    let (data_len, blob_len, skip) = (r.u32(), r.u32(), r.u32());
    Chunk {
        data_offset,
        data_len,
        blob_offset,
        blob_len,
        skip,
        digest: Digest::from_bytes(r.array()),
    }
}

fn decode_checkpoint(mut r: Reader<'_>) -> Checkpoint {
    let (data_offset, data_len) = (r.u64(), r.u32());
    let (blob_offset, blob_len) = (r.u64(), r.u32());
    let digest = Digest::from_bytes(r.array());
    let window = r.u32();
    let [bits, ..] = r.array::<4>();
    Checkpoint {
        data_offset,
        data_len,
        blob_offset,
        blob_len,
        entry: match bits {
            AT_MEMBER => Entry::Member,
            bits => Entry::Block { bits, window },
        },
        digest,
    }
}
