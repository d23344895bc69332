//! Any bytes as a layer index on disk, with the magic number and the checksum made right. What decodes encodes to the same again.

#![no_main]

use lazuli::layer::{Digest, LayerIndex};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = LayerIndex::decode(bytes);
    let mut body = b"LZLINDEX\x03\0\0\0".to_vec();
    body.extend_from_slice(bytes);
    let digest = Digest::of(&body);
    body.extend_from_slice(digest.as_bytes());
    if let Ok(index) = LayerIndex::decode(&body) {
        for inode in index.inodes() {
            for entry in index.entries(inode) {
                assert_eq!(index.lookup(inode, index.name(entry)), Some(entry.ino));
            }
            assert_eq!(index.xattrs(inode).count(), inode.xattr_count as usize);
        }
        assert_eq!(LayerIndex::decode(&index.encode()).as_ref(), Ok(&index));
    }
});
