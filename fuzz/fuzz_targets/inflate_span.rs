//! Any bytes as a span, entered anywhere; and as a whole layer: if it can be read, each span of it gives its bytes by itself.

#![no_main]

use std::io::Cursor;

use lazuli::layer::checkpoint::{Entry, Scanner, decode};
use lazuli::layer::{Codec, Compression, decode_member};
use libfuzzer_sys::fuzz_target;

/// Most uncompressed bytes that are looked at.
const LIMIT: usize = 4 << 20;

fuzz_target!(|input: (u8, u16, u16, u16, &[u8])| {
    let (bits, window, skip, len, bytes) = input;
    let entry = Entry::Block {
        bits,
        window: window.into(),
    };
    let window: Vec<u8> = (0..window).map(|i| (i % 251) as u8).collect();
    for (entry, window) in [(entry, &window[..]), (Entry::Member, &[])] {
        let (skip, len) = (u32::from(skip), u32::from(len));
        if let Ok(decoded) = decode(entry, bytes, window, skip, len) {
            assert_eq!(decoded.len(), len as usize);
            let all = decode(entry, bytes, window, 0, skip + len).unwrap();
            assert_eq!(decoded, all[skip as usize..]);
        }
    }
    for compression in [Compression::Gzip, Compression::Zstd] {
        let mut scanner = Scanner::new(compression, Cursor::new(bytes.to_vec())).unwrap();
        let (mut data, mut spans, mut buf) = (Vec::new(), Vec::new(), Vec::new());
        while scanner.read(&mut buf, 70_000).is_ok() && data.len() < LIMIT {
            spans.extend(scanner.spans());
            if buf.is_empty() {
                break;
            }
            data.extend_from_slice(&buf);
        }
        for span in spans.iter().filter(|span| span.data_end <= data.len() as u64) {
            let wanted = &data[span.data_offset as usize..span.data_end as usize];
            let len = wanted.len() as u32;
            let decoded = match compression {
                Compression::Gzip => decode(span.entry, &span.compressed, &span.window, 0, len),
                _ => decode_member(Codec::Zstd, &span.compressed, 0, len),
            };
            assert!(decoded.unwrap() == wanted);
        }
    }
});
