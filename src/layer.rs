//! Pure layer formats: bytes in, [`LayerIndex`] out.
//!
//! This room knows what the bytes of a layer mean: tar headers, gzip members, zstd frames, tables of contents (eStargz, zstd:chunked),
//! indexes (SOCI's, ours), what overlayfs makes of whiteouts and of a chain of layers, and what a layer takes over from those below
//! it. It never does I/O, never panics on any input, and never allocates more than its input (or a stated limit) justifies:
//! everything here is fed with bytes that an image author chose.

mod acl;
pub mod checkpoint;
pub mod compression;
pub mod digest;
pub mod entry;
pub mod erofs;
pub mod error;
pub mod estargz;
pub mod index;
pub mod merge;
pub mod portable;
pub mod soci;
pub mod tar;
#[cfg(test)]
mod testing;
pub mod toc;
pub mod trace;
pub mod tree;
pub mod variant;
pub mod zchunked;

pub use checkpoint::{Checkpoint, Windows};
pub use compression::{Compression, decode_member, decoder};
pub use digest::Digest;
pub use error::LayerError;
pub use index::{
    Access, BlobIndex, Chunk, ChunkTable, Codec, Dirent, IndexParts, Ino, Inode, LayerIndex, ROOT_INO, Verify,
};
pub use tar::{Copy, TarIndexer, TarLayout};
pub use toc::TocIndex;
