//! Any bytes as the end of a zstd:chunked blob, any texts as its annotations, and any bytes as its table of contents, compressed or not.

#![no_main]

use std::collections::BTreeMap;

use lazuli::layer::Digest;
use lazuli::layer::zchunked::{Promise, TocPlace, find_toc, index_from_toc_within, promise};
use libfuzzer_sys::fuzz_target;

/// Size of the blob that the table is said to be in, in bytes, and where.
const BLOB_SIZE: u64 = 1 << 20;
const TOC_OFFSET: u64 = BLOB_SIZE / 2;
/// Bytes of memory that reading a table may take.
const MEMORY: u64 = 16 << 20;

fn index(table: &[u8], raw_len: u64, stargz: Option<Digest>) {
    let place = TocPlace {
        offset: TOC_OFFSET,
        len: table.len() as u64,
        raw_len,
    };
    let promise = Promise {
        place: Some(place),
        compressed: Some(Digest::of(table)),
        raw: stargz,
    };
    let Ok(toc) = index_from_toc_within(table, &place, BLOB_SIZE, &promise, MEMORY) else {
        return;
    };
    assert!(toc.prefetch <= toc.index.data_size());
    for chunk in toc.index.chunks() {
        assert!(chunk.blob_end() <= TOC_OFFSET - 8);
    }
}

fuzz_target!(|input: (u64, u16, &[u8])| {
    let (blob_size, raw_len, bytes) = input;
    // Two lines of text, and the rest.
    let mut parts = bytes.splitn(3, |byte| *byte == b'\n');
    let mut text = || String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
    let (checksum, position) = (text(), text());
    let bytes = parts.next().unwrap_or_default();
    if let Ok(Some(place)) = find_toc(bytes, blob_size) {
        assert!(place.len > 0 && place.offset + place.len <= blob_size);
    }
    for prefix in ["io.github.containers.zstd-chunked", "io.containers.zstd-chunked"] {
        let checksums = [checksum.clone(), Digest::of(checksum.as_bytes()).to_string()];
        for checksum in checksums {
            let annotations = BTreeMap::from([
                (format!("{prefix}.manifest-checksum"), checksum),
                (format!("{prefix}.manifest-position"), position.clone()),
            ]);
            if let Ok(Some(promise)) = promise(&annotations, blob_size) {
                assert!(promise.place.is_some_and(|place| place.offset + place.len <= blob_size));
            }
        }
    }
    index(bytes, raw_len.into(), None);
    let table = zstd::encode_all(bytes, 1).expect("a Vec takes all");
    index(&table, bytes.len() as u64, None);
    index(&table, bytes.len() as u64, Some(Digest::of(bytes)));
});
