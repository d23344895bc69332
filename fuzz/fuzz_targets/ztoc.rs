//! Any bytes as a zTOC, as they are and behind the head of one. An index that comes out has a span for each byte of a file, and each
//! span that is decoded ends.

#![no_main]

use lazuli::layer::checkpoint::decode;
use lazuli::layer::soci::index_from_ztoc;
use libfuzzer_sys::fuzz_target;

/// Size of the blob that the zTOC is said to be of, in bytes: that of the corpus.
const BLOB_SIZE: u64 = 3;

fuzz_target!(|bytes: &[u8]| {
    // Where the size of the blob is in a zTOC is up to its writer: sizes of the corpus, and one that is in the input itself.
    let stated = bytes.last_chunk().map_or(0, |size| u64::from_le_bytes(*size));
    for blob_size in [BLOB_SIZE, 2560, stated] {
        let Ok((index, windows)) = index_from_ztoc(bytes, blob_size, bytes.len() % 2 == 0) else {
            continue;
        };
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
