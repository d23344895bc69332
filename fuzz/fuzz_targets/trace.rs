//! Any bytes as a trace: as they are, and as the document of one whose header and checksum are right. What is read can be written again, and is
//! merged with itself and with nothing without becoming what is none.

#![no_main]

use std::collections::HashSet;

use lazuli::layer::Digest;
use lazuli::layer::trace::Trace;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|document: &[u8]| {
    let _ = Trace::decode(document);
    let mut bytes = b"LZLTRACE\x01\0\0\0".to_vec();
    bytes.extend_from_slice(&(document.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&zstd::bulk::compress(document, 1).unwrap());
    let sum = Digest::of(&bytes);
    bytes.extend_from_slice(sum.as_bytes());
    let Ok(trace) = Trace::decode(&bytes) else { return };
    let clear: HashSet<Digest> = trace.layers.iter().copied().collect();
    for trace in [trace.merged(&trace, &clear), trace] {
        let again = Trace::decode(&trace.encode()).unwrap();
        assert!(again.wishes.len() <= trace.wishes.len());
    }
});
