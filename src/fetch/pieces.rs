//! The chunks of a layer that can only be streamed: pieces of its data space.

use std::ops::Range;

use crate::layer::tar::Copy;
use crate::layer::{Chunk, Digest};

/// Bytes of the data space per chunk of a streamed layer: small enough to be verified on a read without being noticed, large enough that
/// the digests of a layer take a ten-thousandth of it.
pub(super) const PIECE: u64 = 1 << 20;

/// Digest of a piece, unless it is all zeros: such a piece is no chunk, as bytes that no chunk covers are zeros.
pub(super) fn digest(piece: &[u8]) -> Option<Digest> {
    (!is_zero(piece)).then(|| Digest::of(piece))
}

/// Whether all bytes are zeros.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    // Comparing with itself, shifted by one, is what the compiler turns into memcmp.
    bytes.first().is_none_or(|&first| first == 0) && bytes.get(1..).is_none_or(|tail| tail == &bytes[..tail.len()])
}

/// Pieces of a data space that hold anything of the area behind the tar, or the end of the tar next to it: those whose digests are known
/// only at the end. In order, without repetition.
pub(super) fn late_pieces(tar_size: u64, data_size: u64, copies: &[Copy]) -> Vec<u64> {
    let first = tar_size / PIECE;
    let mut pieces = Vec::new();
    if first * PIECE < data_size {
        pieces.push(first);
    }
    for copy in copies.iter().filter(|copy| copy.len > 0) {
        let last = copy.to.saturating_add(copy.len - 1) / PIECE;
        pieces.extend((copy.to / PIECE..=last).filter(|&piece| piece >= first));
    }
    pieces.sort_unstable();
    pieces.dedup();
    pieces
}

/// Bytes of the data space in a piece.
pub(super) fn span(piece: u64, data_size: u64) -> Range<u64> {
    let start = piece.saturating_mul(PIECE).min(data_size);
    start..start.saturating_add(PIECE).min(data_size)
}

/// The chunk of a layer that can only be streamed, with these bytes of the data space.
pub(super) fn chunk(span: &Range<u64>, digest: Digest) -> Chunk {
    Chunk {
        data_offset: span.start,
        data_len: (span.end - span.start) as u32,
        blob_offset: 0,
        blob_len: 0,
        skip: 0,
        digest,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_no_chunk() {
        assert_eq!(digest(&[0; 1000]), None);
        assert!(is_zero(&[]) && is_zero(&[0]) && !is_zero(&[1]) && !is_zero(&[0, 0, 1]) && !is_zero(&[1, 1]));
    }

    #[test]
    fn late_pieces_are_the_tail_and_what_is_copied() {
        let copy = |to, len| Copy { from: 0, to, len };
        let copies = [copy(PIECE + 600, 10), copy(5 * PIECE - 1, 2), copy(9 * PIECE, 0)];
        assert_eq!(late_pieces(PIECE + 512, 20 * PIECE, &copies), [1, 4, 5]);
        assert!(late_pieces(2 * PIECE, 2 * PIECE, &[]).is_empty());
        assert_eq!(late_pieces(10, 10, &[]), [0]);
        assert_eq!(span(1, PIECE + 3), PIECE..PIECE + 3);
    }
}
