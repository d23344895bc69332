//! Numbers of the EROFS format, and where fields are. All fields are little-endian.

/// Bytes of a block.
pub const BLOCK: u64 = 512;
/// Binary logarithm of [`BLOCK`].
pub(super) const BLOCK_BITS: u8 = 9;
/// Largest image, in bytes: eight times that of a layer with a million entries, so that a hostile layer cannot take all memory.
pub const MAX_IMAGE: u64 = 1 << 30;
/// Most devices of an image. Overlayfs stacks 500 layers; the root's number (16 bits) would allow 16 times as many.
pub const MAX_DEVICES: u64 = 1024;
/// Largest block number that is an address: the next, all ones, means "none".
pub(super) const MAX_BLOCK: u64 = NO_BLOCK as u64 - 1;
/// "No block".
pub(super) const NO_BLOCK: u32 = u32::MAX;

/// Where the superblock begins.
pub(super) const SUPER: usize = 1024;
/// Bytes of the superblock.
pub(super) const SUPER_LEN: usize = 128;
/// Magic number of the superblock.
pub(super) const MAGIC: u32 = 0xe0f5_e1e2;
/// Compatible features: a checksum, and times that are those of modification.
pub(super) const COMPAT: u32 = 1 | 2;
/// Incompatible features: files in chunks, and a device table.
pub(super) const INCOMPAT_CHUNKS: u32 = 4;
pub(super) const INCOMPAT_DEVICES: u32 = 8;
/// Name of the volume.
pub(super) const VOLUME: &[u8] = b"lazuli";

/// Where the device table begins: right behind the superblock.
pub(super) const TABLE: u64 = (SUPER + SUPER_LEN) as u64;
/// Bytes of a device slot.
pub(super) const DEVICE: u64 = 128;

/// Unit of inode numbers, in bytes: an inode's number is its address in it.
pub(super) const SLOT: u64 = 32;
/// Bytes of an extended inode.
pub(super) const INODE: u64 = 64;
/// Formats of an extended inode: data in blocks, data with its tail behind the inode, and data in chunks.
pub(super) const PLAIN: u16 = 1;
pub(super) const INLINE: u16 = 1 | 2 << 1;
pub(super) const CHUNKED: u16 = 1 | 4 << 1;
/// Bytes of a chunk's address behind an inode, and what that is aligned to.
pub(super) const CHUNK: u64 = 8;
/// Chunks have addresses that name a device. Below it stands the binary logarithm of a chunk's blocks.
pub(super) const CHUNK_ADDRESSES: u32 = 0x20;
/// Largest size of a chunk that can be said, in bytes.
pub(super) const MAX_CHUNK: u64 = BLOCK << 31;

/// Bytes of a directory entry without its name.
pub(super) const DIRENT: u64 = 12;
/// Bytes of the head of an inode's xattrs.
pub(super) const XATTR_HEAD: u64 = 12;
/// Bytes of the head of one xattr, and what their sizes are rounded up to.
pub(super) const XATTR_ENTRY: u64 = 4;
/// Most bytes of an inode's xattrs: what its 16-bit count of units can say.
pub(super) const MAX_XATTRS: u64 = XATTR_HEAD + XATTR_ENTRY * (u16::MAX as u64 - 1);
