//! Any bytes as a compressed stream: the decoders end, and a chunk is what the stream has at its place.

#![no_main]

use std::io::{Cursor, Read};

use lazuli::layer::{Codec, Compression, decode_member, decoder};
use libfuzzer_sys::fuzz_target;

/// Most uncompressed bytes that are looked at.
const LIMIT: u64 = 1 << 20;

fuzz_target!(|input: (u16, u16, &[u8])| {
    let (skip, len, bytes) = input;
    let _ = Compression::sniff(bytes);
    for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
        let mut stream = Vec::new();
        let read = decoder(compression, Cursor::new(bytes.to_vec()))
            .take(LIMIT)
            .read_to_end(&mut stream);
        if let Ok(chunk) = decode_member(Codec::from(compression), bytes, skip.into(), len.into()) {
            // A stream that is damaged somewhere may end earlier for who reads more of it at once.
            let there = stream.get(usize::from(skip)..).unwrap_or_default();
            let both = there.len().min(chunk.len());
            assert_eq!(chunk[..both], there[..both]);
            assert!(both == chunk.len() || read.is_err(), "it has more than there is");
        }
    }
});
