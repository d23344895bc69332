//! The last bytes of an eStargz blob: an empty gzip member whose extra field says where the table of contents is.
//!
//! ```text
//! eStargz, 51 bytes       1f 8b 08 04, time 4, XFL, OS | 1a 00 | "SG" 16 00 | 16 hex digits, "STARGZ"    | empty deflate 5 | crc, len 8
//! stargz (legacy), 47     1f 8b 08 04, time 4, XFL, OS | 16 00 |            | 16 hex digits, "STARGZ"    | empty deflate 5 | crc, len 8
//! TOC elsewhere, 46       1f 8b 08 04, time 4, XFL, OS | 15 00 | "SG" 11 00 | "STARGZEXTERNALTOC"        | empty deflate 5 | crc, len 8
//! ```

use super::{MAX_TOC_LEN, TocLocation};
use crate::layer::LayerError;

const FORMAT: &str = "eStargz footer";
/// Length of the longest footer, in bytes: how much of a blob's end [`find_toc`] wants to see.
pub const FOOTER_LEN_MAX: usize = 51;
/// Length of the footer of a blob whose table of contents is elsewhere, in bytes.
pub const EXTERNAL_FOOTER_LEN: usize = 46;
const LEGACY_FOOTER_LEN: usize = 47;

const GZIP_WITH_EXTRA: &[u8] = &[0x1f, 0x8b, 0x08, 0x04];
/// Bytes of a gzip header before the extra field: magic, method, flags, time, XFL, OS.
const GZIP_HEADER_LEN: usize = 10;
/// Bytes of an empty deflate stream, a CRC and a length.
const GZIP_REST_LEN: usize = 13;
const MAGIC: &[u8] = b"STARGZ";
const MAGIC_EXTERNAL: &[u8] = b"STARGZEXTERNALTOC";
const OFFSET_DIGITS: usize = 16;

/// What the end of a blob says of its table of contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Footer {
    /// It is there.
    Inside(TocLocation),
    /// It is there, says a footer of the stargz format that came before eStargz. That is no valid gzip extra field, and most of the
    /// tables that it points to have no digests of chunks.
    Legacy(TocLocation),
    /// It is in another image.
    Elsewhere,
}

/// Finds the table of contents from the end of a blob.
///
/// `tail` is the end of the blob: its last [`FOOTER_LEN_MAX`] bytes, or all of a shorter blob; more does no harm. `None`: the blob has
/// no footer of eStargz.
///
/// Nothing vouches for the answer, apart from its being inside the blob: the digest of what is there has to be checked.
///
/// # Errors
/// [`LayerError::Malformed`] when a footer points outside the blob, and [`LayerError::TooLarge`] when the table would be too long.
pub fn find_toc(tail: &[u8], blob_size: u64) -> Result<Option<Footer>, LayerError> {
    if extra(tail, subfield(MAGIC_EXTERNAL.len())) == Some(MAGIC_EXTERNAL) {
        return Ok(Some(Footer::Elsewhere));
    }
    if let Some(field) = extra(tail, subfield(OFFSET_DIGITS + MAGIC.len())) {
        return Ok(locate(field, FOOTER_LEN_MAX, blob_size)?.map(Footer::Inside));
    }
    let frame = Frame {
        prefix: None,
        len: OFFSET_DIGITS + MAGIC.len(),
    };
    match extra(tail, frame) {
        Some(field) => Ok(locate(field, LEGACY_FOOTER_LEN, blob_size)?.map(Footer::Legacy)),
        None => Ok(None),
    }
}

/// Where the table is, as the content of the extra field has it.
fn locate(field: &[u8], footer_len: usize, blob_size: u64) -> Result<Option<TocLocation>, LayerError> {
    let Some(digits) = field.strip_suffix(MAGIC) else {
        return Ok(None);
    };
    let footer_at = blob_size.saturating_sub(footer_len as u64);
    let malformed = |what: String| LayerError::malformed(FORMAT, footer_at, what);
    let offset = std::str::from_utf8(digits)
        .ok()
        .filter(|digits| digits.bytes().all(|c| c.is_ascii_hexdigit()))
        .and_then(|digits| u64::from_str_radix(digits, 16).ok())
        .ok_or_else(|| malformed(format!("the offset is \"{}\"", digits.escape_ascii())))?;
    let len = footer_at.checked_sub(offset).filter(|len| *len > 0);
    let len = len.ok_or_else(|| {
        malformed(format!(
            "the table of contents begins at {offset} in a blob of {blob_size} bytes"
        ))
    })?;
    if len > MAX_TOC_LEN {
        return Err(LayerError::TooLarge {
            what: "compressed size of the eStargz table of contents",
            value: len,
            limit: MAX_TOC_LEN,
        });
    }
    Ok(Some(TocLocation { offset, len }))
}

/// What the extra field of a gzip header looks like.
struct Frame {
    /// Identifier and length of a subfield, or `None` if its content stands alone.
    prefix: Option<[u8; 4]>,
    /// Length of the content.
    len: usize,
}

fn subfield(len: usize) -> Frame {
    Frame {
        prefix: Some([b'S', b'G', len as u8, 0]),
        len,
    }
}

/// The content of the extra field, if the tail ends with a gzip member that has one of this form and nothing else.
fn extra(tail: &[u8], frame: Frame) -> Option<&[u8]> {
    let prefix = frame.prefix.as_ref().map_or(&[][..], |prefix| &prefix[..]);
    let extra_len = prefix.len() + frame.len;
    let footer_len = GZIP_HEADER_LEN + 2 + extra_len + GZIP_REST_LEN;
    let footer = tail.get(tail.len().checked_sub(footer_len)?..)?;
    let (header, rest) = footer.split_at_checked(GZIP_HEADER_LEN)?;
    let rest = rest
        .strip_prefix(&(extra_len as u16).to_le_bytes())?
        .strip_prefix(prefix)?;
    header.starts_with(GZIP_WITH_EXTRA).then_some(rest.get(..frame.len)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn footer(extra: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff];
        bytes.extend_from_slice(&(extra.len() as u16).to_le_bytes());
        bytes.extend_from_slice(extra);
        bytes.extend_from_slice(&[1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
        bytes
    }

    fn current(digits: &str) -> Vec<u8> {
        footer(&[b"SG\x16\0", digits.as_bytes(), MAGIC].concat())
    }

    #[test]
    fn the_three_footers() {
        let bytes = current("00000000000003e8");
        assert_eq!(bytes.len(), 51);
        let found = Footer::Inside(TocLocation { offset: 1000, len: 949 });
        assert_eq!(find_toc(&bytes, 2000), Ok(Some(found)));
        let longer = [&[0x1f; 900][..], &bytes].concat();
        assert_eq!(find_toc(&longer, 2000), Ok(Some(found)));

        let legacy = footer(b"00000000000003e8STARGZ");
        assert_eq!(legacy.len(), 47);
        let found = Footer::Legacy(TocLocation { offset: 1000, len: 953 });
        assert_eq!(find_toc(&legacy, 2000), Ok(Some(found)));

        let external = footer(b"SG\x11\0STARGZEXTERNALTOC");
        assert_eq!(external.len(), EXTERNAL_FOOTER_LEN);
        assert_eq!(find_toc(&external, 2000), Ok(Some(Footer::Elsewhere)));
    }

    #[test]
    fn what_is_no_footer() {
        assert_eq!(find_toc(b"", 0), Ok(None));
        assert_eq!(find_toc(&[0; 51], 51), Ok(None));
        let mut bytes = current("00000000000003e8");
        for at in [0, 1, 2, 3, 10, 11, 12, 13, 14, 15, 32, 37] {
            bytes[at] ^= 1;
            assert_eq!(find_toc(&bytes, 2000), Ok(None), "{at}");
            bytes[at] ^= 1;
        }
        for len in 0..bytes.len() {
            assert_eq!(find_toc(&bytes[..len], 2000), Ok(None), "{len}");
            assert_eq!(find_toc(&bytes[bytes.len() - len..], 2000), Ok(None), "{len}");
        }
    }

    #[test]
    fn a_footer_that_points_nowhere_is_an_error() {
        for (digits, size) in [
            ("00000000000003e8", 1051),
            ("00000000000003e8", 51),
            ("00000000000003e8", 0),
            ("ffffffffffffffff", 2000),
            ("+0000000000003e8", 2000),
            ("0000000000000 e8", 2000),
        ] {
            let error = find_toc(&current(digits), size).unwrap_err();
            assert!(
                matches!(error, LayerError::Malformed { .. }),
                "{digits} in {size}: {error}"
            );
        }
        let error = find_toc(&current("0000000000000000"), 1 << 40).unwrap_err();
        assert!(matches!(error, LayerError::TooLarge { .. }), "{error}");
    }
}
