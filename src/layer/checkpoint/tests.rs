//! Spans of many compressors, each decoded by itself.

use std::io::{self, Cursor, Read, Write};

use flate2::{Compression as Level, GzBuilder, write::GzEncoder};
use proptest::prelude::*;

use super::scan::{SPAN, SPAN_MAX};
use super::windows::compress;
use super::*;
use crate::layer::Codec;
use crate::layer::compression::{Compression, decode_member, decoder};

/// Content as of programs: noise, repetitions from near and far, zeros.
pub(crate) fn content(len: usize, mut seed: u64) -> Vec<u8> {
    let mut data = Vec::with_capacity(len + 4096);
    while data.len() < len {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        match seed % 8 {
            0 => data.extend(
                (0..seed >> 8 & 255).flat_map(|i| (seed ^ i).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()),
            ),
            1 => data.resize(data.len() + (seed >> 8 & 1023) as usize, 0),
            _ if data.is_empty() => data.push(1),
            _ => {
                let back = 1 + (seed >> 8) as usize % data.len().min(32_000);
                let from = data.len() - back;
                data.extend_from_within(from..(from + (seed >> 40 & 127) as usize + 1).min(data.len()));
            }
        }
    }
    data.truncate(len);
    data
}

pub(crate) fn gzip(data: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Level::new(level));
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// Members of `size` bytes each, with names, comments and an extra field.
pub(crate) fn members(data: &[u8], size: usize) -> Vec<u8> {
    let mut blob = Vec::new();
    for (i, part) in data.chunks(size).enumerate() {
        let builder = GzBuilder::new().extra(&b"BC\x02\0\0\0"[..]);
        let builder = if i % 2 == 0 {
            builder.filename("layer.tar")
        } else {
            builder.comment("no name")
        };
        let mut encoder = builder.write(Vec::new(), Level::new(6));
        encoder.write_all(part).unwrap();
        blob.extend(encoder.finish().unwrap());
    }
    blob
}

/// One member, flushed now and then, which leaves empty stored blocks.
fn flushed(data: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Level::new(6));
    for part in data.chunks(100_000) {
        encoder.write_all(part).unwrap();
        encoder.flush().unwrap();
    }
    encoder.finish().unwrap()
}

fn frames(data: &[u8], size: usize) -> Vec<u8> {
    data.chunks(size)
        .flat_map(|part| zstd::encode_all(part, 1).unwrap())
        .collect()
}

/// Gives bytes in pieces of odd sizes.
struct Pieces(Cursor<Vec<u8>>, usize);

impl Read for Pieces {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.1 = self.1 * 7 % 9973 + 1;
        let len = buf.len().min(self.1);
        self.0.read(&mut buf[..len])
    }
}

pub(crate) fn scan(compression: Compression, blob: &[u8]) -> io::Result<(Vec<u8>, Vec<Scanned>)> {
    let mut scanner = Scanner::new(compression, Pieces(Cursor::new(blob.to_vec()), 1))?;
    let (mut all, mut spans, mut buf) = (Vec::new(), Vec::new(), Vec::new());
    loop {
        scanner.read(&mut buf, 77_777)?;
        spans.extend(scanner.spans());
        if buf.is_empty() {
            return Ok((all, spans));
        }
        all.extend_from_slice(&buf);
    }
}

/// Scans, and checks that each span makes its bytes out of nothing else; how many there are.
fn check(compression: Compression, blob: &[u8], data: &[u8]) -> usize {
    let (scanned, spans) = scan(compression, blob).unwrap();
    assert!(scanned == data);
    let mut end = 0;
    for span in &spans {
        assert_eq!(span.data_offset, end);
        end = span.data_end;
        let partial = u64::from(matches!(span.entry, Entry::Block { bits: 1.., .. }));
        let start = (span.blob_offset - partial) as usize;
        assert_eq!(span.compressed, blob[start..start + span.compressed.len()]);
        let wanted = &data[span.data_offset as usize..end as usize];
        let len = wanted.len() as u32;
        let decode = |skip, len| match compression {
            Compression::Gzip => decode(span.entry, &span.compressed, &span.window, skip, len),
            _ => decode_member(Codec::Zstd, &span.compressed, skip, len),
        };
        assert!(decode(0, len).unwrap() == wanted);
        assert!(decode(len / 3, len / 2).unwrap() == wanted[len as usize / 3..][..len as usize / 2]);
        assert!(decode(len, 1).is_err());
    }
    assert!(spans.is_empty() || end == data.len() as u64);
    spans.len()
}

#[test]
fn spans_of_every_compressor_stand_for_themselves() {
    let data = content(9 << 20, 42);
    // At its first level zlib-rs makes blocks of many megabytes.
    assert!(check(Compression::Gzip, &gzip(&data, 1), &data) >= 1);
    for level in [0, 3, 6, 9] {
        let spans = check(Compression::Gzip, &gzip(&data, level), &data);
        assert!((6..=9).contains(&spans), "level {level}: {spans}");
    }
    assert!(check(Compression::Gzip, &flushed(&data), &data) >= 6);
    // Small members give a checkpoint each half of a span.
    assert!(check(Compression::Gzip, &members(&data, 65_280), &data) >= 15);
    assert!(check(Compression::Gzip, &members(&data, 3 << 20), &data) >= 6);
    assert!(check(Compression::Zstd, &frames(&data, 300_000), &data) >= 6);
    assert_eq!(check(Compression::Zstd, &frames(&data, 10 << 20), &data), 1);
    assert_eq!(check(Compression::None, &data, &data), 0);
    let padded = [&gzip(&data, 3)[..], &[0; 3000]].concat();
    assert!(check(Compression::Gzip, &padded, &data) >= 6);
}

#[test]
fn members_need_no_window_and_blocks_do() {
    let data = content(5 << 20, 1);
    let (_, spans) = scan(Compression::Gzip, &members(&data, 100_000)).unwrap();
    assert!(
        spans
            .iter()
            .all(|span| span.entry == Entry::Member && span.window.is_empty())
    );
    let (_, spans) = scan(Compression::Gzip, &gzip(&data, 6)).unwrap();
    let is_block = |span: &Scanned| matches!(span.entry, Entry::Block { window: 32_768, .. });
    assert!(spans[1..].iter().all(is_block));
    assert!(
        spans
            .iter()
            .any(|span| matches!(span.entry, Entry::Block { bits: 1.., .. }))
    );
    // The member has begun after its span: there is less to refer back to.
    let blob = [gzip(&data[..SPAN as usize - 20_000], 6), gzip(&data, 0)].concat();
    let (_, spans) = scan(Compression::Gzip, &blob).unwrap();
    assert_eq!(spans[1].entry, Entry::Member);
}

#[test]
fn long_zeros_are_cut_and_endless_frames_are_not() {
    let zeros = vec![0; 40 << 20];
    assert!(check(Compression::Gzip, &gzip(&zeros, 6), &zeros) >= 4);
    let data = content(SPAN_MAX as usize + 1, 3);
    assert_eq!(
        check(Compression::Zstd, &zstd::encode_all(&data[..], 1).unwrap(), &data),
        0
    );
}

#[test]
fn a_scan_fails_as_decompression_does() {
    let data = content(300_000, 5);
    let (gz, frame) = (gzip(&data, 6), zstd::encode_all(&data[..], 1).unwrap());
    let outcome = |compression, blob: &[u8]| {
        let mut out = Vec::new();
        let plain = decoder(compression, Cursor::new(blob.to_vec())).read_to_end(&mut out);
        let plain = plain
            .map(|_| out)
            .map_err(|error| error.kind() == io::ErrorKind::UnexpectedEof);
        let scanned = scan(compression, blob).map(|(out, _)| out);
        let scanned = scanned.map_err(|error| error.kind() == io::ErrorKind::UnexpectedEof);
        assert!(plain == scanned, "{compression:?} of {} bytes", blob.len());
        scanned
    };
    for len in [0, 1, 9, 10, 11, 5000, gz.len() - 8, gz.len() - 1] {
        assert_eq!(outcome(Compression::Gzip, &gz[..len]), Err(true), "{len}");
    }
    for len in [1, 5000, frame.len() - 1] {
        let _ = outcome(Compression::Zstd, &frame[..len]);
    }
    for at in [0, 1, 12, 6000, gz.len() - 8, gz.len() - 1] {
        let mut bad = gz.clone();
        bad[at] ^= 0x55;
        assert!(outcome(Compression::Gzip, &bad).is_err(), "{at}");
    }
    for tail in [&b"x"[..], b"\0\0x", b"\x1f\x8b\x08\0"] {
        assert!(outcome(Compression::Gzip, &[&gz, tail].concat()).is_err());
        assert!(outcome(Compression::Zstd, &[&frame, tail].concat()).is_err());
    }
    assert!(outcome(Compression::Gzip, &[&gz[..], &[0; 200_000], b"x"].concat()).is_err());
}

#[test]
fn a_wrong_entry_is_an_error_or_gives_other_bytes() {
    let data = content(3 << 20, 9);
    let (_, spans) = scan(Compression::Gzip, &gzip(&data, 6)).unwrap();
    let span = &spans[1];
    let len = (span.data_end - span.data_offset) as u32;
    let good = decode(span.entry, &span.compressed, &span.window, 0, len).unwrap();
    let mut swapped = span.window.clone();
    swapped.rotate_left(1);
    assert!(decode(span.entry, &span.compressed, &swapped, 0, len) != Ok(good));
    let short = decode(span.entry, &span.compressed, &span.window[1..], 0, len).unwrap_err();
    assert!(short.to_string().contains("instead of 32768"), "{short}");
    let cut = decode(span.entry, &span.compressed[..1000], &span.window, 0, len).unwrap_err();
    assert!(matches!(cut, LayerError::Truncated { .. }), "{cut}");
    let nothing = decode(span.entry, &[], &span.window, 0, len).unwrap_err();
    assert!(matches!(nothing, LayerError::Truncated { .. }), "{nothing}");
    assert!(decode(Entry::Member, &span.compressed, &[], 0, len).is_err());
    let large = decode(Entry::Member, &[], &[], 0, MAX_CHUNK_LEN + 1).unwrap_err();
    assert!(matches!(large, LayerError::TooLarge { .. }), "{large}");
    let entry = Entry::Block { bits: 8, window: 0 };
    assert!(decode(entry, &span.compressed, &[], 0, len).is_err());
}

fn checkpoint(at: u64, window: u32) -> Checkpoint {
    Checkpoint {
        data_offset: at * 1000,
        data_len: 1000,
        blob_offset: at * 100 + 1,
        blob_len: 50,
        entry: Entry::Block { bits: 3, window },
        digest: Digest::of(b"span"),
    }
}

#[test]
fn windows_are_read_back_and_damage_is_noticed() {
    let index = Digest::of(b"index");
    let (a, b) = (content(MAX_WINDOW, 1), content(100, 2));
    let parts = [&a[..], b"", &b];
    let checkpoints = [checkpoint(0, a.len() as u32), checkpoint(1, 0), checkpoint(2, 100)];
    let windows = Windows::of(parts).unwrap();
    let encoded = windows.encode(&index);
    assert_eq!(Windows::decode(&encoded, &index, &checkpoints).unwrap(), windows);
    let head = &encoded[..WindowTable::encoded_len(3) as usize];
    let table = WindowTable::decode(head, &index, &checkpoints).unwrap();
    for (at, part) in parts.iter().enumerate() {
        assert_eq!(windows.window(at, &checkpoints[at]).unwrap(), *part);
        let (offset, len) = table.place(at).unwrap();
        let compressed = &encoded[offset as usize..][..len as usize];
        assert_eq!(table.open(at, compressed, &checkpoints[at]).unwrap(), *part);
    }
    for at in 0..encoded.len() {
        let mut bad = encoded.clone();
        bad[at] ^= 4;
        assert!(Windows::decode(&bad, &index, &checkpoints).is_err(), "byte {at}");
        assert!(
            Windows::decode(&encoded[..at], &index, &checkpoints).is_err(),
            "length {at}"
        );
    }
    assert!(Windows::decode(&encoded, &Digest::of(b"other"), &checkpoints).is_err());
    assert!(Windows::decode(&encoded, &index, &checkpoints[..2]).is_err());
    assert!(windows.window(3, &checkpoints[0]).is_err());
    // A window that is longer than the checkpoint says is not decompressed.
    assert!(windows.window(0, &checkpoint(0, 5)).is_err());
    assert!(compress(&vec![0; MAX_WINDOW + 1]).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn random_layers_are_cut_right(seed in 1u64.., len in 0usize..6_000_000, level in 0u32..=9, size in 1000usize..3_000_000, how in 0..4) {
        let data = content(len, seed);
        let (compression, blob) = match how {
            0 => (Compression::Gzip, gzip(&data, level)),
            1 if len > 0 => (Compression::Gzip, members(&data, size)),
            2 => (Compression::Gzip, flushed(&data)),
            _ => (Compression::Zstd, frames(&data, size)),
        };
        let spans = check(compression, &blob, &data);
        prop_assert!(spans > 0 || len == 0);
    }

    #[test]
    fn any_bytes_are_harmless(bytes in proptest::collection::vec(any::<u8>(), 0..3000), bits in 0u8..8, window in 0usize..=300) {
        let entry = Entry::Block { bits, window: window as u32 };
        let _ = decode(entry, &bytes, &vec![7; window], 0, 100_000);
        let _ = decode(Entry::Member, &bytes, &[], 5, 100_000);
        for compression in [Compression::Gzip, Compression::Zstd] {
            let _ = scan(compression, &bytes);
        }
    }
}
