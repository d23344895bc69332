//! Any bytes as a zTOC. An index that comes out has a span for each byte of a file, and decoding of a span ends.

#![no_main]

use lazuli::layer::checkpoint::decode;
use lazuli::layer::soci::index_from_ztoc_within;
use libfuzzer_sys::fuzz_target;

/// Bytes of memory that reading a zTOC may take.
const MEMORY: u64 = 32 << 20;

fuzz_target!(|bytes: &[u8]| {
    // The size of the blob, which the zTOC has to state as well, are the last bytes.
    let blob_size = bytes.last_chunk().map_or(0, |size| u64::from_le_bytes(*size));
    if let Ok((index, windows)) = index_from_ztoc_within(bytes, blob_size, bytes.len() % 2 == 0, MEMORY) {
        assert_eq!(index.blob_size(), blob_size);
        for inode in index.inodes().iter().filter(|inode| inode.is_reg() && inode.size > 0) {
            let chunks = &index.chunks()[index.chunks_at(inode.data, inode.size)];
            let first = chunks.first().expect("a byte that is in no span");
            let last = chunks.last().expect("a byte that is in no span");
            assert!(first.data_offset <= inode.data && last.data_end() >= inode.data + inode.size);
            assert!(chunks.windows(2).all(|pair| pair[0].data_end() == pair[1].data_offset));
        }
        for (at, checkpoint) in index.checkpoints().iter().enumerate().take(4) {
            let window = windows.window(at, checkpoint).expect("it was just made");
            let _ = decode(checkpoint.entry, bytes, &window, 0, checkpoint.data_len.min(1 << 16));
        }
    }
});
