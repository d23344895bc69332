//! What every target needs that makes indexes of any bytes.

use std::sync::LazyLock;

use lazuli::layer::{Access, Codec, Digest, TarIndexer};

/// Magic number and version of an index, as they are now.
static HEAD: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let layout = TarIndexer::new().finish().expect("an empty tar is one");
    let index = layout.into_index(Access::Stream, Codec::None, Vec::new(), 0);
    index.expect("an empty layer is one").encode()[..12].to_vec()
});

/// The bytes with a checksum after them.
pub fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let digest = Digest::of(&bytes);
    bytes.extend_from_slice(digest.as_bytes());
    bytes
}

/// The bytes as a layer index on disk, with magic number, version and checksum made right.
pub fn index(body: &[u8]) -> Vec<u8> {
    sealed([&HEAD[..], body].concat())
}
