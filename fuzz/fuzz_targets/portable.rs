//! Any bytes as a portable index: as they are, and with checksums and lengths made right, so that the parts are read. What is read can be
//! written again, and every window of it is one or an error.

#![no_main]

use lazuli::layer::portable::{self, HEADER_LEN};
use lazuli::layer::{Digest, Windows};
use libfuzzer_sys::fuzz_target;

/// The bytes with a checksum after them.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let digest = Digest::of(&bytes);
    bytes.extend_from_slice(digest.as_bytes());
    bytes
}

fuzz_target!(|input: ([u8; 32], u32, u32, Vec<u8>, Vec<u8>, Vec<u8>)| {
    let (header, count, raw_len, index, table, compressed) = input;
    let layer = Digest::of(b"layer");
    for bytes in [&index, &table] {
        let _ = portable::inspect(bytes);
        let _ = portable::unpack(&layer, bytes);
    }
    let raw = sealed([&b"LZLINDEX\x03\0\0\0"[..], &index].concat());
    let packed = if raw_len == 0 {
        zstd::bulk::compress(&raw, 1).unwrap()
    } else {
        index
    };
    let raw_len = if raw_len == 0 { raw.len() as u64 } else { raw_len.into() };
    let mut windows = b"LZLWINDS\x01\0\0\0".to_vec();
    windows.extend_from_slice(&count.to_le_bytes());
    windows.extend_from_slice(Digest::of(&raw).as_bytes());
    windows.extend_from_slice(&table);
    let windows = [sealed(windows), compressed].concat();
    let mut head = b"LZLSHARE\x01\0\0\0".to_vec();
    head.extend_from_slice(&header[..4]);
    head.extend_from_slice(layer.as_bytes());
    head.extend_from_slice(&header);
    head.extend_from_slice(&raw_len.to_le_bytes());
    for part in [&packed, &windows] {
        head.extend_from_slice(&(part.len() as u64).to_le_bytes());
        head.extend_from_slice(Digest::of(part).as_bytes());
    }
    let file = [sealed(head), packed, windows].concat();
    assert!(file.len() > HEADER_LEN);
    let Ok((index, windows)) = portable::unpack(&layer, &file) else {
        return;
    };
    for (at, checkpoint) in index.checkpoints().iter().enumerate() {
        if let Ok(window) = windows.window(at, checkpoint) {
            assert_eq!(window.len(), checkpoint.window_len() as usize);
        }
    }
    let again = portable::pack(&layer, &index, &windows).unwrap();
    assert!(portable::unpack(&layer, &again) == Ok((index, windows)));
    let _ = Windows::decode(&table, &layer, &[]);
});
