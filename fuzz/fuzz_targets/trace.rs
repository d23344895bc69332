//! Any bytes as a trace: as they are, and as the document of one whose header and checksum are right. What is read can be written again, and is
//! merged with itself, and carried to another image, without becoming what is none.

#![no_main]

use std::collections::HashSet;
use std::sync::Arc;

use lazuli::layer::Digest;
use lazuli::layer::trace::{Carried, Found, Trace};
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
    let mut carried = Carried::new(Arc::new(trace.clone()), Arc::new(clear.clone()));
    let found = trace.layers.iter().enumerate().map(|(at, layer)| {
        let known = trace.known(layer).unwrap();
        (*layer, carried.take(at, Found::known(known)))
    });
    let moved = trace.moved(Digest::of(document), &found.collect::<Vec<_>>());
    assert!(carried.rest().0.is_empty());
    for trace in [trace.merged(&trace, &clear), moved, trace] {
        let again = Trace::decode(&trace.encode()).unwrap();
        assert!(again.wishes.len() <= trace.wishes.len());
    }
});
