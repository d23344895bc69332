//! The last bytes of a zstd:chunked blob: a skippable frame that says where the table of contents is.
//!
//! ```text
//! stargz                50 2a 4d 18 | 28 00 00 00 | offset, length, raw length, kind: u64 each                         | "GnUlInUx"
//! containers/storage    50 2a 4d 18 | 40 00 00 00 | offset, length, raw length, kind, 3 of the tar-split: u64 each     | "GNUlInUx"
//! ```
//!
//! All numbers are little-endian. Writers of containers/storage before 2024 use the first form. Either magic number is accepted in either.

use super::{FRAME_HEADER_LEN, TocPlace};
use crate::layer::LayerError;

const FORMAT: &str = "zstd:chunked footer";
/// Length of the longest footer with its frame's header, in bytes: how much of a blob's end [`find_toc`] wants to see.
pub const FOOTER_LEN_MAX: usize = FRAME_HEADER_LEN as usize + 64;
/// Lengths of what is in the frame, in bytes.
const LENGTHS: [usize; 2] = [40, 64];
const FRAME_MAGIC: [u8; 4] = [0x50, 0x2a, 0x4d, 0x18];
const MAGICS: [&[u8; 8]; 2] = [b"GnUlInUx", b"GNUlInUx"];

/// Finds the table of contents from the end of a blob: `tail` is its last [`FOOTER_LEN_MAX`] bytes, or more, or all of a shorter blob.
/// `None`: the blob has no footer of zstd:chunked. Nothing vouches for the answer, apart from its being inside the blob.
///
/// # Errors
/// [`LayerError`] when a footer points outside the blob, or to a table that is too long or of a kind that is not known.
pub fn find_toc(tail: &[u8], blob_size: u64) -> Result<Option<TocPlace>, LayerError> {
    for len in LENGTHS {
        let whole = FRAME_HEADER_LEN as usize + len;
        let footer = tail.len().checked_sub(whole).and_then(|at| tail.get(at..));
        let content = footer
            .and_then(|footer| footer.strip_prefix(&FRAME_MAGIC))
            .and_then(|rest| rest.strip_prefix(&(len as u32).to_le_bytes()));
        let Some(content) = content else { continue };
        if !MAGICS.iter().any(|magic| content.ends_with(*magic)) {
            continue;
        }
        let mut numbers = [0; 4];
        for (number, bytes) in numbers.iter_mut().zip(content.chunks_exact(8)) {
            *number = bytes.try_into().map_or(0, u64::from_le_bytes);
        }
        let contents = blob_size.saturating_sub(whole as u64);
        return TocPlace::checked(FORMAT, numbers, contents).map(Some);
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn footer(numbers: &[u64], magic: &[u8]) -> Vec<u8> {
        let mut bytes = FRAME_MAGIC.to_vec();
        bytes.extend((numbers.len() as u32 * 8 + 8).to_le_bytes());
        bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        bytes.extend(magic);
        bytes
    }

    #[test]
    fn the_footers() {
        let found = TocPlace {
            offset: 1000,
            len: 500,
            raw_len: 7000,
        };
        // The end of a blob that skopeo 1.9 wrote, with its numbers.
        let stargz = footer(&[1000, 500, 7000, 1], b"GnUlInUx");
        assert_eq!(stargz.len(), 48);
        assert_eq!(find_toc(&stargz, 2000), Ok(Some(found)));
        let storage = footer(&[1000, 500, 7000, 1, 1600, 20, 30], b"GNUlInUx");
        assert_eq!(storage.len(), FOOTER_LEN_MAX);
        assert_eq!(find_toc(&storage, 2000), Ok(Some(found)));
        assert_eq!(find_toc(&[&[9; 100][..], &storage].concat(), 2000), Ok(Some(found)));
        for bytes in [&stargz, &storage] {
            for len in 0..bytes.len() {
                assert_eq!(find_toc(&bytes[..len], 2000), Ok(None));
                assert_eq!(find_toc(&bytes[bytes.len() - len..], 2000), Ok(None));
            }
        }
        assert_eq!(find_toc(&footer(&[1000, 500, 7000, 1], b"GNULINUX"), 2000), Ok(None));
    }

    #[test]
    fn footers_that_cannot_be_true() {
        for numbers in [
            [1000, 953, 1, 1],
            [u64::MAX, 1, 1, 1],
            [1000, u64::MAX, 1, 1],
            [7, 1, 1, 1],
            [1000, 0, 1, 1],
            [1000, 1, 0, 1],
        ] {
            let error = find_toc(&footer(&numbers, b"GnUlInUx"), 2000).unwrap_err();
            assert!(matches!(error, LayerError::Malformed { .. }), "{numbers:?}: {error}");
        }
        for (numbers, size) in [([8, 1 << 40, 1, 1], 1 << 41), ([8, 8, 1 << 40, 1], 2000)] {
            let error = find_toc(&footer(&numbers, b"GnUlInUx"), size).unwrap_err();
            assert!(matches!(error, LayerError::TooLarge { .. }), "{error}");
        }
        let error = find_toc(&footer(&[1000, 500, 1, 2], b"GnUlInUx"), 2000).unwrap_err();
        assert!(matches!(error, LayerError::Unsupported { .. }), "{error}");
    }
}
