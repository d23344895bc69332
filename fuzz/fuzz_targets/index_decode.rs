//! Any bytes as a layer index on disk, with the magic number and the checksum made right. What decodes encodes to the same again.

#![no_main]

use lazuli::layer::LayerIndex;
use libfuzzer_sys::fuzz_target;

#[path = "../sealed.rs"]
#[allow(dead_code)]
mod sealed;

fuzz_target!(|bytes: &[u8]| {
    let _ = LayerIndex::decode(bytes);
    if let Ok(index) = LayerIndex::decode(&sealed::index(bytes)) {
        for inode in index.inodes() {
            for entry in index.entries(inode) {
                assert_eq!(index.lookup(inode, index.name(entry)), Some(entry.ino));
            }
            assert_eq!(index.xattrs(inode).count(), inode.xattr_count as usize);
        }
        assert_eq!(LayerIndex::decode(&index.encode()).as_ref(), Ok(&index));
    }
});
