//! zstd:chunked: a tar.zst of many frames with a table of contents (TOC), in both dialects.
//!
//! A blob is: zstd frames with the entries of a tar (a frame begins where a file's content or a chunk of it begins), and skippable frames
//! with the table (JSON, compressed with zstd by itself), with what containers/storage needs to make the same tar again ("tar-split",
//! ignored here), and with a footer. What the JSON means is told in [`super::toc`].
//!
//! | | stargz | containers/storage before 2024 | containers/storage |
//! |---|---|---|---|
//! | annotations | `io.containers.zstd-chunked.*` and eStargz' [`TOC_DIGEST_ANNOTATION`] | `io.containers.zstd-chunked.*` | `io.github.containers.zstd-chunked.*` |
//! | footer | 40 bytes | 40 bytes | 64 bytes |
//! | chunks | fixed size | content-defined, zeros | content-defined, zeros |
//!
//! The digests of the table, compressed or not, are trusted because they are in the image's manifest. Its place is in the manifest as well
//! (`manifest-position`), or is told by the footer, for which nothing vouches: what is there has to have the digest.

mod footer;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io::Read;

use super::compression::{ZSTD_WINDOW_LOG_MAX, zstd_frames_within};
use super::estargz::TOC_DIGEST_ANNOTATION;
use super::toc::{self, Dialect, TocIndex};
use super::{Codec, Digest, LayerError};
pub use footer::{FOOTER_LEN_MAX, find_toc};

const FORMAT: &str = "TOC";
/// Prefixes of the annotations of a layer's descriptor, in the order in which they are looked at.
const PREFIXES: [&str; 2] = ["io.github.containers.zstd-chunked.", "io.containers.zstd-chunked."];
/// Annotation with the digest of the compressed table.
const CHECKSUM: &str = "manifest-checksum";
/// Annotation with its place: offset, length, length uncompressed, and kind, separated by colons.
const POSITION: &str = "manifest-position";
/// The kind of table that there is: entries as in stargz.
const KIND: u64 = 1;
/// Window that the frame of any table may have, as a power of two: 32 MiB, the largest of the encoder that containers/storage uses, which
/// does not know how much will come. Of the decoder's window only what is written takes memory.
const WINDOW_LOG: u32 = 25;
/// Bytes of the header of a skippable frame: magic number and length.
const FRAME_HEADER_LEN: u64 = 8;

/// Where the table is, and how long it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TocPlace {
    /// Its first byte in the blob, after the header of the skippable frame that holds it.
    pub offset: u64,
    /// Its compressed length in bytes.
    pub len: u64,
    /// Its uncompressed length in bytes.
    pub raw_len: u64,
}

impl TocPlace {
    /// Checks what a footer or an annotation says: offset, length, uncompressed length, and kind.
    fn checked(format: &'static str, numbers: [u64; 4], blob_size: u64) -> Result<TocPlace, LayerError> {
        let [offset, len, raw_len, kind] = numbers;
        if kind != KIND {
            return Err(LayerError::Unsupported {
                what: format!("a zstd:chunked table of contents of kind {kind}"),
            });
        }
        let end = offset.checked_add(len).filter(|end| *end <= blob_size);
        if end.is_none() || offset < FRAME_HEADER_LEN || len == 0 || raw_len == 0 {
            let what = format!("a table of {len} bytes at {offset} in a blob of {blob_size} bytes");
            return Err(LayerError::malformed(format, 0, what));
        }
        toc::check_len("compressed size of the zstd:chunked table of contents", len)?;
        toc::check_len("size of the zstd:chunked table of contents", raw_len)?;
        Ok(TocPlace { offset, len, raw_len })
    }
}

/// What a manifest promises of a layer's table of contents. At least one of the digests is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Promise {
    /// Where it is; `None`: the footer tells.
    pub place: Option<TocPlace>,
    /// Digest of the compressed table.
    pub compressed: Option<Digest>,
    /// Digest of the table's JSON. Only stargz says it.
    pub raw: Option<Digest>,
}

/// What the annotations of a layer's descriptor promise, for a blob of `blob_size` bytes; `None` if they are not those of a zstd:chunked
/// layer.
///
/// # Errors
/// [`LayerError`] when they cannot be true.
pub fn promise(annotations: &BTreeMap<String, String>, blob_size: u64) -> Result<Option<Promise>, LayerError> {
    let find = |name: &str| {
        let mut keys = PREFIXES.iter().map(|prefix| format!("{prefix}{name}"));
        keys.find_map(|key| annotations.get(&key))
    };
    let Some(checksum) = find(CHECKSUM) else {
        return Ok(None);
    };
    let digest = |text: &String| {
        text.parse::<Digest>()
            .map_err(|error| LayerError::malformed("zstd:chunked annotation", 0, error.to_string()))
    };
    Ok(Some(Promise {
        place: find(POSITION).map(|text| position(text, blob_size)).transpose()?,
        compressed: Some(digest(checksum)?),
        raw: annotations.get(TOC_DIGEST_ANNOTATION).map(digest).transpose()?,
    }))
}

/// Reads a `manifest-position`.
fn position(text: &str, blob_size: u64) -> Result<TocPlace, LayerError> {
    const FORMAT: &str = "zstd:chunked annotation";
    let mut fields = text
        .split(':')
        .map(|field| match field.bytes().all(|c| c.is_ascii_digit()) {
            true => field.parse().ok(),
            false => None,
        });
    let mut numbers = [0; 4];
    for number in &mut numbers {
        let field = fields.next().flatten();
        *number = field.ok_or_else(|| {
            let text: String = text.chars().take(100).collect();
            LayerError::malformed(FORMAT, 0, format!("{text:?} is no position"))
        })?;
    }
    TocPlace::checked(FORMAT, numbers, blob_size)
}

/// The index of a zstd:chunked layer of `blob_size` bytes, from the bytes of its blob at `place`.
///
/// # Errors
/// [`LayerError::DigestMismatch`] when the table is not the promised one; another [`LayerError`] when it cannot be used: then the layer
/// can still be read as a tar. A promise without a digest is kept by nothing, so that it is an error too.
pub fn index_from_toc(
    table: &[u8],
    place: &TocPlace,
    blob_size: u64,
    promise: &Promise,
) -> Result<TocIndex, LayerError> {
    index_from_toc_within(table, place, blob_size, promise, u64::MAX)
}

/// The same, with no more than `memory` bytes besides the compressed table.
///
/// # Errors
/// As [`index_from_toc`], and [`LayerError::TooLarge`] when it takes more.
pub fn index_from_toc_within(
    table: &[u8],
    place: &TocPlace,
    blob_size: u64,
    promise: &Promise,
    memory: u64,
) -> Result<TocIndex, LayerError> {
    if promise.compressed.is_none() && promise.raw.is_none() {
        return Err(LayerError::Unsupported {
            what: "a zstd:chunked table of contents of which the manifest has no digest".to_owned(),
        });
    }
    if let Some(expected) = &promise.compressed {
        toc::check_digest("the compressed zstd:chunked table of contents", table, expected)?;
    }
    // The window is no longer than what was written to it.
    let memory = toc::memory_beside(place.raw_len, memory.saturating_sub(place.raw_len))?;
    let json = unpack(table, place.raw_len)?;
    if let Some(expected) = &promise.raw {
        toc::check_digest("the zstd:chunked table of contents", &json, expected)?;
    }
    let dialect = Dialect {
        codec: Codec::Zstd,
        stargz: promise.raw.is_some(),
    };
    toc::index(
        &json,
        &dialect,
        place.offset - FRAME_HEADER_LEN.min(place.offset),
        blob_size,
        memory,
    )
}

impl TocPlace {
    /// Bytes of memory that [`index_from_toc`] takes besides the compressed table.
    pub fn memory(&self) -> u64 {
        toc::memory_for(self.raw_len) + self.raw_len
    }
}

/// The JSON, whose length has been checked.
fn unpack(table: &[u8], raw_len: u64) -> Result<Vec<u8>, LayerError> {
    let mut json = Vec::with_capacity(raw_len as usize + 1);
    // The window is address space, and never larger than what it is for, or than encoders make it.
    let window = raw_len.next_power_of_two().ilog2().max(WINDOW_LOG);
    let read = zstd_frames_within(table, window.min(ZSTD_WINDOW_LOG_MAX))
        .and_then(|frames| frames.take(raw_len.saturating_add(1)).read_to_end(&mut json));
    match read {
        Ok(_) if json.len() as u64 == raw_len => Ok(json),
        Ok(_) => {
            let what = format!("it has not the {raw_len} bytes that are promised");
            Err(LayerError::malformed(FORMAT, 0, what))
        }
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Err(LayerError::Truncated {
            format: FORMAT,
            length: table.len() as u64,
            what: "its zstd frame".to_owned(),
        }),
        Err(error) => Err(LayerError::malformed(FORMAT, 0, error.to_string())),
    }
}
