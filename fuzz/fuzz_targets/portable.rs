//! Any bytes as a portable index: as they are, and with checksums and lengths made right, so that the parts are read. What is read can be
//! written again, and every window of it is one or an error.

#![no_main]

use lazuli::layer::portable::{self, HEADER_LEN};
use lazuli::layer::{Digest, Windows};
use libfuzzer_sys::fuzz_target;

#[path = "../sealed.rs"]
#[allow(dead_code)]
mod sealed;

/// Bytes of memory that reading an index may take, whatever its header says.
const MEMORY: u64 = 32 << 20;

/// A part that its length comes before.
fn part<'a>(bytes: &mut &'a [u8]) -> &'a [u8] {
    let Some((len, rest)) = bytes.split_first_chunk() else {
        return std::mem::take(bytes);
    };
    let (part, rest) = rest.split_at(rest.len().min(u16::from_le_bytes(*len).into()));
    *bytes = rest;
    part
}

fuzz_target!(|input: ([u8; 36], u32, u32, &[u8])| {
    let (header, count, raw_len, mut compressed) = input;
    let layer = Digest::of(b"layer");
    let _ = portable::inspect(compressed);
    let _ = portable::unpack_within(&layer, compressed, MEMORY);
    let (index, table) = (part(&mut compressed), part(&mut compressed));
    let raw = sealed::index(index);
    let packed = if raw_len == 0 {
        zstd::bulk::compress(&raw, 1).unwrap()
    } else {
        index.to_vec()
    };
    let raw_len = if raw_len == 0 { raw.len() as u64 } else { raw_len.into() };
    let mut windows = b"LZLWINDS\x01\0\0\0".to_vec();
    windows.extend_from_slice(&count.to_le_bytes());
    windows.extend_from_slice(Digest::of(&raw).as_bytes());
    windows.extend_from_slice(table);
    let windows = [&sealed::sealed(windows), compressed].concat();
    let mut head = b"LZLSHARE\x01\0\0\0".to_vec();
    head.extend_from_slice(&header[..4]);
    head.extend_from_slice(layer.as_bytes());
    head.extend_from_slice(&header[4..]);
    head.extend_from_slice(&raw_len.to_le_bytes());
    for part in [&packed, &windows] {
        head.extend_from_slice(&(part.len() as u64).to_le_bytes());
        head.extend_from_slice(Digest::of(part).as_bytes());
    }
    let file = [sealed::sealed(head), packed, windows].concat();
    assert!(file.len() > HEADER_LEN);
    let Ok((index, windows)) = portable::unpack_within(&layer, &file, MEMORY) else {
        return;
    };
    for (at, checkpoint) in index.checkpoints().iter().enumerate() {
        if let Ok(window) = windows.window(at, checkpoint) {
            assert_eq!(window.len(), checkpoint.window_len() as usize);
        }
    }
    let again = portable::pack(&layer, &index, &windows).unwrap();
    assert!(portable::unpack_within(&layer, &again, MEMORY) == Ok((index, windows)));
    let _ = Windows::decode(table, &layer, &[]);
});
