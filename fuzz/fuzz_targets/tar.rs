//! Any bytes as a tar. However they are cut the result is the same, and a tree that comes out is a valid index.
//!
//! Checksums and lengths of records are made right before, or the fuzzer would have to guess them.

#![no_main]

use lazuli::layer::{Access, Codec, LayerError, TarIndexer, TarLayout};
use libfuzzer_sys::fuzz_target;

#[path = "../repair.rs"]
mod repair;

/// Bytes of memory that names and attributes may take: far more than 64 KiB of tar make.
const MEMORY: u64 = 32 << 20;

fn layout(bytes: &[u8], piece: usize) -> Result<TarLayout, LayerError> {
    let mut indexer = TarIndexer::with_memory(MEMORY);
    for piece in bytes.chunks(piece) {
        indexer.push(piece)?;
    }
    indexer.finish()
}

fuzz_target!(|input: (u16, &[u8])| {
    let (piece, tar) = input;
    let mut tar = tar.to_vec();
    repair::tar(&mut tar);
    let whole = layout(&tar, tar.len().max(1));
    assert_eq!(whole, layout(&tar, usize::from(piece) + 1));
    if let Ok(layout) = whole {
        let (tar_size, data_size) = (layout.tar_size, layout.data_size);
        for copy in &layout.copies {
            assert!(copy.from + copy.len <= tar_size && copy.to >= tar_size && copy.to + copy.len <= data_size);
        }
        layout
            .into_index(Access::Stream, Codec::None, Vec::new(), 0)
            .expect("a tree holds together");
    }
});
