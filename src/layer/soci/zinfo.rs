//! A zinfo: where the spans of a layer are, as one blob in a zTOC. All integers are little-endian.
//!
//! ```text
//! gzip: 0 have i32 | 4 span size i64 | 12 checkpoints, 32785 bytes each:
//!       0 in i64: first whole byte in the blob | 8 out i64: place in the tar | 16 bits u8 | 17 window 32768, zeros in front
//! tar:  0 version i32 | 4 span size i64 | 12 bytes of the tar i64
//! ```
//! Version 1 of the first leaves out the first checkpoint, and only the length tells: it is at 10, behind a header without options.
//! Both say the *least* bytes of a gzip span: it ends at a block of the stream.

use super::malformed;
use crate::layer::LayerError;
use crate::layer::index::{MAX_CHUNK_LEN, MAX_CHUNKS};
use crate::sys::inflate::WINDOW;

const HEADER_LEN: usize = 12;
/// Bytes of a checkpoint in front of its window.
const FIXED_LEN: usize = 17;
const CHECKPOINT_LEN: usize = FIXED_LEN + WINDOW;
/// Where the first checkpoint of version 1 is: behind a gzip header without options.
const FIRST_IN: u64 = 10;
/// Version that a tar's zinfo states.
const TAR_VERSION: i32 = 2;

/// A checkpoint of a gzip stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Point<'a> {
    /// First byte of the blob that belongs to the span wholly.
    pub blob_offset: u64,
    /// First byte of the tar in the span.
    pub data_offset: u64,
    /// Bits of the byte before that belong to the span.
    pub bits: u8,
    /// The last bytes of the tar before it, [`WINDOW`] of them, or none.
    pub window: &'a [u8],
}

/// Reads the zinfo of a gzip layer.
pub(super) fn gzip(bytes: &[u8]) -> Result<Vec<Point<'_>>, LayerError> {
    let head: &[u8; HEADER_LEN] = bytes
        .first_chunk()
        .ok_or_else(|| malformed(0, "its zinfo has no header"))?;
    let [a, b, c, d, ..] = *head;
    let have = i32::from_le_bytes([a, b, c, d]);
    let have = usize::try_from(have)
        .ok()
        .filter(|have| (1..=MAX_CHUNKS).contains(have));
    let have = have.ok_or_else(|| malformed(0, "its zinfo has no checkpoints, or too many"))?;
    let body = &bytes[HEADER_LEN..];
    let stored = body.len() / CHECKPOINT_LEN;
    if !body.len().is_multiple_of(CHECKPOINT_LEN) || !(stored == have || stored + 1 == have) {
        let what = format!(
            "its zinfo has {} bytes, and says it has {have} checkpoints",
            bytes.len()
        );
        return Err(malformed(0, what));
    }
    let mut points = Vec::with_capacity(have);
    if stored < have {
        points.push(Point {
            blob_offset: FIRST_IN,
            data_offset: 0,
            bits: 0,
            window: &[],
        });
    }
    for (at, bytes) in body.chunks_exact(CHECKPOINT_LEN).enumerate() {
        let wrong = || malformed(at, "a checkpoint of its zinfo lies nowhere");
        let (blob_offset, rest) = bytes.split_first_chunk().ok_or_else(wrong)?;
        let (data_offset, rest) = rest.split_first_chunk().ok_or_else(wrong)?;
        let (bits, window) = rest.split_first().ok_or_else(wrong)?;
        points.push(Point {
            blob_offset: i64::from_le_bytes(*blob_offset).try_into().map_err(|_| wrong())?,
            data_offset: i64::from_le_bytes(*data_offset).try_into().map_err(|_| wrong())?,
            bits: *bits,
            window,
        });
    }
    Ok(points)
}

/// Writes the zinfo of a gzip layer, in version 2. Each window has [`WINDOW`] bytes.
pub(super) fn put_gzip(span_size: u64, points: &[Point<'_>]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_LEN + points.len() * CHECKPOINT_LEN);
    out.extend_from_slice(&(points.len() as i32).to_le_bytes());
    out.extend_from_slice(&span_size.to_le_bytes());
    for point in points {
        out.extend_from_slice(&point.blob_offset.to_le_bytes());
        out.extend_from_slice(&point.data_offset.to_le_bytes());
        out.push(point.bits);
        out.extend_from_slice(point.window);
    }
    out
}

/// Reads the zinfo of a tar: the size of spans, and of the tar.
pub(super) fn tar(bytes: &[u8]) -> Result<(u32, u64), LayerError> {
    let parts = bytes.split_first_chunk::<4>().and_then(|(version, rest)| {
        let (span, rest) = rest.split_first_chunk::<8>()?;
        let size: &[u8; 8] = rest.try_into().ok()?;
        Some((
            i32::from_le_bytes(*version),
            i64::from_le_bytes(*span),
            i64::from_le_bytes(*size),
        ))
    });
    let (version, span, size) = parts.ok_or_else(|| malformed(0, "its zinfo has another length than a tar's"))?;
    if version != TAR_VERSION {
        return Err(LayerError::Unsupported {
            what: format!("version {version} of a tar's zinfo"),
        });
    }
    let span = u32::try_from(span)
        .ok()
        .filter(|span| (1..=MAX_CHUNK_LEN).contains(span));
    let size = u64::try_from(size).ok();
    span.zip(size)
        .ok_or_else(|| malformed(0, "its zinfo has spans, or a tar, of an impossible size"))
}

/// Writes the zinfo of a tar.
pub(super) fn put_tar(span_size: u64, size: u64) -> Vec<u8> {
    let mut out = TAR_VERSION.to_le_bytes().to_vec();
    out.extend_from_slice(&span_size.to_le_bytes());
    out.extend_from_slice(&size.to_le_bytes());
    out
}
