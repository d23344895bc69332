//! The index of a layer: its names and attributes, and where its bytes are.
//!
//! Every layer has a *data space*: one linear range of bytes that holds the contents of all its regular files, each contiguous
//! and 512-aligned. For a layer that was read as a tar, it is the tar itself, byte for byte, followed by an area for files that
//! tar stores in pieces; for a format that gives no tar offsets (eStargz) it is the files one after the other. The index maps
//! inodes to extents of the data space, and *chunks* of the blob in the registry to ranges of it. Bytes of the data space that
//! no chunk covers (padding, holes) are zero; a parser must not leave a byte of a file uncovered that the layer stores.
//!
//! Its form on disk is in `index/disk.rs`, the rules it keeps in `index/check.rs`.

mod blob;
mod check;
mod chunks;
mod disk;

#[cfg(test)]
mod tests;

use std::sync::OnceLock;

use super::{Checkpoint, Digest, LayerError};
pub use blob::BlobIndex;
pub use chunks::{ChunkTable, IndexBytes};
pub(super) use disk::{codec_byte, codec_of};

/// Number of an inode within its layer. The root directory is [`ROOT_INO`].
pub type Ino = u32;

/// The root directory of a layer.
pub const ROOT_INO: Ino = 1;

/// Most inodes a layer may have. The largest images known have about two million files in all their layers together.
pub const MAX_INODES: usize = 8 << 20;
/// Most chunks a layer may have.
pub const MAX_CHUNKS: usize = 8 << 20;
/// Most bytes of names, symlink targets and xattrs a layer may have.
pub const MAX_STRINGS: usize = 1 << 30;
/// Largest chunk, in bytes of the data space: the unit of fetching and verification has to fit into memory many times.
pub const MAX_CHUNK_LEN: u32 = 64 << 20;
/// Largest data space, in bytes: what 32-bit block numbers of 512 bytes can address.
pub const MAX_DATA_SIZE: u64 = 1 << 41;
/// Longest name, in bytes (NAME_MAX of Linux).
pub const MAX_NAME_LEN: usize = 255;
/// Longest symlink target, in bytes (PATH_MAX of Linux, less its terminator).
pub const MAX_TARGET_LEN: usize = 4095;

/// File type bits of a mode (`S_IFMT` and friends, which are the same on every Linux architecture).
pub mod mode {
    /// Mask of the file type.
    pub const TYPE: u32 = 0o170000;
    /// Directory.
    pub const DIR: u32 = 0o040000;
    /// Regular file.
    pub const REG: u32 = 0o100000;
    /// Symbolic link.
    pub const LNK: u32 = 0o120000;
    /// Character device.
    pub const CHR: u32 = 0o020000;
    /// Block device.
    pub const BLK: u32 = 0o060000;
    /// Named pipe.
    pub const FIFO: u32 = 0o010000;
    /// Socket.
    pub const SOCK: u32 = 0o140000;
}

/// How the bytes of a layer can be had from its blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Only from its beginning: one pass over the whole blob fills the whole data space.
    Stream,
    /// Chunk by chunk, with ranged requests.
    Ranges,
}

/// How a chunk is compressed in the blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// Not at all.
    None,
    /// As one or more gzip members.
    Gzip,
    /// As one or more zstd frames.
    Zstd,
    /// As a part of a gzip stream, which can be decoded from one of the index's checkpoints.
    GzipSpans,
}

/// How the bytes of a chunk are verified when they arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Verify {
    /// By the digest of the uncompressed chunk.
    #[default]
    Content,
    /// By the digest of the compressed span that holds it, before it is decoded; the chunk's own digest is not known, and zeros. For
    /// [`Codec::GzipSpans`] alone. Such a chunk cannot be verified again later.
    Span,
}

/// One file, directory, link, device, fifo or socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Inode {
    /// File type and permissions, as in `st_mode`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of names; for a directory 2 plus its subdirectories.
    pub nlink: u32,
    /// Device number of a character or block device, major part.
    pub rdev_major: u32,
    /// Device number of a character or block device, minor part.
    pub rdev_minor: u32,
    /// Bytes of a regular file's content or of a symlink's target; otherwise 0.
    pub size: u64,
    /// Modification time: seconds since the epoch; negative before 1970.
    pub mtime: i64,
    /// Modification time: nanoseconds after `mtime`.
    pub mtime_nsec: u32,
    /// The directory that holds this directory (itself for the root); 0 for everything else.
    pub parent: Ino,
    /// Regular file: where its content begins in the data space. Symlink: where its target begins in the strings. Directory:
    /// position of its first entry.
    pub data: u64,
    /// Directory: number of its entries. Otherwise 0.
    pub count: u32,
    /// Position of its first extended attribute.
    pub xattr_first: u32,
    /// Number of its extended attributes.
    pub xattr_count: u32,
    /// What the attributes do not say of where it comes from: bits of [`flags`].
    pub flags: u32,
}

/// The number that no owner has: chown(2) takes it as "leave it".
pub const NO_OWNER: u32 = u32::MAX;

/// Bits of [`Inode::flags`]. Nobody who reads the layer sees them; [`on_top_of`](super::variant::on_top_of) goes by them.
pub mod flags {
    /// A directory that no entry describes: what it looks like depends on the layers below.
    pub const IMPLIED: u32 = 1;
    /// Made of an entry `.wh.NAME`, not of one for a device 0:0.
    pub const WHITEOUT: u32 = 2;
    /// A directory whose entry came when it was there already, for something in it: it has extended attributes of the layers below.
    pub const LATE: u32 = 4;
    /// An entry gave its access ACL, which is not that of its directory's default ACL.
    pub const OWN_ACL: u32 = 8;
    /// An entry gave its default ACL.
    pub const OWN_DEFAULT_ACL: u32 = 16;
}

impl Inode {
    /// The file type bits of the mode.
    pub fn file_type(&self) -> u32 {
        self.mode & mode::TYPE
    }

    /// Whether it is a directory.
    pub fn is_dir(&self) -> bool {
        self.file_type() == mode::DIR
    }

    /// Whether it is a regular file.
    pub fn is_reg(&self) -> bool {
        self.file_type() == mode::REG
    }

    /// Whether it is a symbolic link.
    pub fn is_symlink(&self) -> bool {
        self.file_type() == mode::LNK
    }

    /// Whether it is what overlayfs takes as a deleted name: a character device 0:0.
    pub fn is_whiteout(&self) -> bool {
        self.file_type() == mode::CHR && self.rdev_major == 0 && self.rdev_minor == 0
    }

    /// Whether it is a directory that no entry describes.
    pub fn is_implied(&self) -> bool {
        self.flags & flags::IMPLIED != 0
    }

    /// Whether it is a directory that takes something over from the layers below.
    pub fn takes_over(&self) -> bool {
        self.flags & (flags::IMPLIED | flags::LATE) != 0
    }

    /// Whether its flags are known, and go with its type.
    fn has_valid_flags(&self) -> bool {
        const ACLS: u32 = flags::OWN_ACL | flags::OWN_DEFAULT_ACL;
        match self.flags & !ACLS {
            0 => self.flags & ACLS == 0 || self.is_dir() || self.flags == flags::OWN_ACL && !self.is_symlink(),
            // Without an entry there is none to give an ACL.
            flags::IMPLIED => self.is_dir() && self.flags & ACLS == 0,
            flags::LATE => self.is_dir(),
            flags::WHITEOUT => self.is_whiteout() && self.flags & ACLS == 0,
            _ => false,
        }
    }
}

/// One name in a directory. Entries of a directory are in byte order of their names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dirent {
    /// Where the name begins in the strings.
    pub name: u32,
    /// Length of the name in bytes.
    pub name_len: u32,
    /// The inode it names.
    pub ino: Ino,
}

/// One extended attribute: positions in the strings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Xattr {
    /// Where the full name (`user.mime`) begins.
    pub name: u32,
    /// Length of the name.
    pub name_len: u32,
    /// Where the value begins.
    pub value: u32,
    /// Length of the value.
    pub value_len: u32,
}

/// The unit in which bytes are fetched and verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// First byte in the data space.
    pub data_offset: u64,
    /// Bytes in the data space, never 0.
    pub data_len: u32,
    /// First byte in the blob of the compressed member that holds the chunk. 0 for [`Access::Stream`].
    pub blob_offset: u64,
    /// Compressed bytes of that member. 0 for [`Access::Stream`].
    pub blob_len: u32,
    /// Uncompressed bytes of the member that come before the chunk.
    pub skip: u32,
    /// Digest of the uncompressed chunk, unless [`Verify`] says otherwise.
    pub digest: Digest,
}

impl Chunk {
    /// First byte after the chunk in the data space.
    pub fn data_end(&self) -> u64 {
        self.data_offset + u64::from(self.data_len)
    }

    /// First byte after the compressed member in the blob.
    pub fn blob_end(&self) -> u64 {
        self.blob_offset + u64::from(self.blob_len)
    }
}

/// The parts of an index, as a parser hands them over. [`LayerIndex::new`] checks them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexParts {
    /// How its bytes can be had.
    pub access: Access,
    /// How its chunks are compressed.
    pub codec: Codec,
    /// Bytes of the data space.
    pub data_size: u64,
    /// Bytes of the blob.
    pub blob_size: u64,
    /// Inode `n` at position `n - 1`.
    pub inodes: Vec<Inode>,
    /// All directories' entries, those of one directory side by side.
    pub dirents: Vec<Dirent>,
    /// All extended attributes.
    pub xattrs: Vec<Xattr>,
    /// All chunks in order of their data offset.
    pub chunks: Vec<Chunk>,
    /// How the chunks are verified.
    pub verify: Verify,
    /// Where decoding can begin, in order; each chunk of [`Codec::GzipSpans`] lies in the span of one, wholly. Empty for other codecs.
    pub checkpoints: Vec<Checkpoint>,
    /// Names, symlink targets, xattr names and values.
    pub strings: Vec<u8>,
}

/// A checked index: every reference in it points at something that exists.
#[derive(Debug, Clone)]
pub struct LayerIndex {
    parts: IndexParts,
    /// See [`LayerIndex::fingerprint`].
    fingerprint: OnceLock<Digest>,
}

impl PartialEq for LayerIndex {
    fn eq(&self, other: &Self) -> bool {
        // Whether somebody asked for the fingerprint makes no difference.
        self.parts == other.parts
    }
}

impl Eq for LayerIndex {}

const FORMAT: &str = "layer index";

impl LayerIndex {
    /// Checks `parts` and makes an index of them.
    ///
    /// # Errors
    /// [`LayerError`] when a limit is exceeded or a reference points nowhere.
    pub fn new(parts: IndexParts) -> Result<Self, LayerError> {
        check::check(&parts)?;
        Ok(LayerIndex {
            parts,
            fingerprint: OnceLock::new(),
        })
    }

    /// How its bytes can be had.
    pub fn access(&self) -> Access {
        self.parts.access
    }

    /// How its chunks are compressed.
    pub fn codec(&self) -> Codec {
        self.parts.codec
    }

    /// Bytes of the data space.
    pub fn data_size(&self) -> u64 {
        self.parts.data_size
    }

    /// Bytes of the blob in the registry.
    pub fn blob_size(&self) -> u64 {
        self.parts.blob_size
    }

    /// All inodes; inode `n` is at position `n - 1`.
    pub fn inodes(&self) -> &[Inode] {
        &self.parts.inodes
    }

    /// The inode numbered `ino`.
    pub fn inode(&self, ino: Ino) -> Option<&Inode> {
        self.parts.inodes.get((ino as usize).checked_sub(1)?)
    }

    /// Entries of a directory in byte order of their names; empty for anything else.
    pub fn entries(&self, dir: &Inode) -> &[Dirent] {
        if !dir.is_dir() {
            return &[];
        }
        let first = dir.data as usize;
        self.parts.dirents.get(first..first + dir.count as usize).unwrap_or(&[])
    }

    /// Name of a directory entry.
    pub fn name(&self, entry: &Dirent) -> &[u8] {
        self.string(entry.name, entry.name_len)
    }

    /// The inode called `name` in `dir`.
    pub fn lookup(&self, dir: &Inode, name: &[u8]) -> Option<Ino> {
        let entries = self.entries(dir);
        let at = entries.binary_search_by(|entry| self.name(entry).cmp(name)).ok()?;
        Some(entries[at].ino)
    }

    /// The inode at `path` below the root, with components separated by `/`. Symlinks are not followed.
    pub fn lookup_path(&self, path: &[u8]) -> Option<Ino> {
        let mut ino = ROOT_INO;
        for name in path.split(|&c| c == b'/').filter(|name| !name.is_empty()) {
            ino = self.lookup(self.inode(ino)?, name)?;
        }
        Some(ino)
    }

    /// The parts, to make another index of them.
    pub fn parts(&self) -> &IndexParts {
        &self.parts
    }

    /// Target of a symlink; empty for anything else.
    pub fn target(&self, inode: &Inode) -> &[u8] {
        if !inode.is_symlink() {
            return &[];
        }
        self.string(inode.data as u32, inode.size as u32)
    }

    /// Extended attributes of an inode: full names and values.
    pub fn xattrs(&self, inode: &Inode) -> impl Iterator<Item = (&[u8], &[u8])> {
        let first = inode.xattr_first as usize;
        let xattrs = self
            .parts
            .xattrs
            .get(first..first + inode.xattr_count as usize)
            .unwrap_or(&[]);
        xattrs
            .iter()
            .map(|x| (self.string(x.name, x.name_len), self.string(x.value, x.value_len)))
    }

    /// Value of one extended attribute.
    pub fn xattr(&self, inode: &Inode, name: &[u8]) -> Option<&[u8]> {
        self.xattrs(inode).find(|(n, _)| *n == name).map(|(_, value)| value)
    }

    /// All chunks in order of their data offset.
    pub fn chunks(&self) -> &[Chunk] {
        &self.parts.chunks
    }

    /// How the chunks are verified.
    pub fn verify(&self) -> Verify {
        self.parts.verify
    }

    /// All checkpoints in order of their offset; only [`Codec::GzipSpans`] has any.
    pub fn checkpoints(&self) -> &[Checkpoint] {
        &self.parts.checkpoints
    }

    /// The checkpoint from which a chunk is decoded, and its position.
    pub fn checkpoint(&self, chunk: &Chunk) -> Option<(usize, &Checkpoint)> {
        blob::checkpoint(&self.parts.checkpoints, chunk)
    }

    /// Positions of the chunks that hold any of the `len` bytes at `offset` of the data space.
    pub fn chunks_at(&self, offset: u64, len: u64) -> std::ops::Range<usize> {
        blob::chunks_at(&self.parts.chunks, offset, len)
    }

    /// Bytes of memory that it takes.
    pub fn memory(&self) -> u64 {
        let p = &self.parts;
        let places = size_of_val(&p.chunks[..]) + size_of_val(&p.checkpoints[..]);
        (size_of::<Self>() + places) as u64 + self.names_memory()
    }

    /// Bytes of memory that its names and attributes take.
    pub fn names_memory(&self) -> u64 {
        let p = &self.parts;
        let records = size_of_val(&p.inodes[..]) + size_of_val(&p.dirents[..]) + size_of_val(&p.xattrs[..]);
        (records + p.strings.len()) as u64
    }

    /// Bytes of the data space that are stored in the blob, i.e. that have to be fetched.
    pub fn stored_size(&self) -> u64 {
        self.parts.chunks.iter().map(|chunk| u64::from(chunk.data_len)).sum()
    }

    /// The part of it that says where bytes are.
    pub fn blob(&self) -> BlobIndex {
        BlobIndex::of(self)
    }

    /// The same, with chunks that are read from `bytes`, the index on disk, when they are needed, so that they take no memory of their own.
    /// `None`: these are not the bytes of this index, as far as their length tells.
    pub fn blob_stored(&self, bytes: IndexBytes) -> Option<BlobIndex> {
        BlobIndex::stored(self, bytes)
    }

    fn string(&self, offset: u32, len: u32) -> &[u8] {
        let offset = offset as usize;
        self.parts.strings.get(offset..offset + len as usize).unwrap_or(&[])
    }
}

/// Whether a file can have this name.
pub fn valid_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME_LEN
        && name != b"."
        && name != b".."
        && !name.contains(&b'/')
        && !name.contains(&0)
}
