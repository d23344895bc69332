//! The index of a layer: its names and attributes, and where its bytes are.
//!
//! Every layer has a *data space*: one linear range of bytes that holds the contents of all its regular files, each contiguous
//! and 512-aligned. For a layer that was read as a tar, it is the tar itself, byte for byte, followed by an area for files that
//! tar stores in pieces; for a format that gives no tar offsets (eStargz) it is the files one after the other. The index maps
//! inodes to extents of the data space, and *chunks* of the blob in the registry to ranges of it. Bytes of the data space that
//! no chunk covers (padding, holes) are zero; a parser must not leave a byte of a file uncovered that the layer stores.
//!
//! # On disk
//! All integers are little-endian. Records have a fixed size, so that an index of 100,000 files loads in milliseconds.
//!
//! ```text
//! 0   magic     8   "LZLINDEX"
//! 8   version   4   2
//! 12  access    1   0 = stream, 1 = ranges
//! 13  codec     1   0 = none, 1 = gzip, 2 = zstd
//! 14  zero      2
//! 16  data_size 8   bytes of the data space
//! 24  blob_size 8   bytes of the layer's blob in the registry
//! 32  counts    16  inodes, directory entries, xattrs, chunks: u32 each
//! 48  strings   8   bytes of the string area
//! 56  inodes    76 each: the fields of [`Inode`] in their order, `flags` last, 4 zero bytes
//!     entries   12 each: name offset u32, name length u32, inode u32
//!     xattrs    16 each: name offset, name length, value offset, value length: u32 each
//!     chunks    60 each
//!     strings
//!     sha256    32  of everything before it
//! ```

use super::{Digest, LayerError};

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

/// Bits of [`Inode::flags`]. Nobody who reads the layer sees them; [`on_top_of`](super::variant::on_top_of) goes by them.
pub mod flags {
    /// A directory that no entry describes: what it looks like depends on the layers below.
    pub const IMPLIED: u32 = 1;
    /// Made of an entry `.wh.NAME`, not of one for a device 0:0.
    pub const WHITEOUT: u32 = 2;
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

    /// Whether its flags are known, and go with its type.
    fn has_valid_flags(&self) -> bool {
        match self.flags {
            0 => true,
            flags::IMPLIED => self.is_dir(),
            flags::WHITEOUT => self.is_whiteout(),
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
    /// Digest of the uncompressed chunk.
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
    /// Names, symlink targets, xattr names and values.
    pub strings: Vec<u8>,
}

/// A checked index: every reference in it points at something that exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerIndex {
    parts: IndexParts,
}

const MAGIC: &[u8; 8] = b"LZLINDEX";
/// Version of the on-disk form. A file with another version is discarded and made again.
const VERSION: u32 = 2;
const HEADER_LEN: usize = 56;
const INODE_LEN: usize = 76;
const DIRENT_LEN: usize = 12;
const XATTR_LEN: usize = 16;
const CHUNK_LEN: usize = 60;
const FORMAT: &str = "layer index";

impl LayerIndex {
    /// Checks `parts` and makes an index of them.
    ///
    /// # Errors
    /// [`LayerError`] when a limit is exceeded or a reference points nowhere.
    pub fn new(parts: IndexParts) -> Result<Self, LayerError> {
        check(&parts)?;
        Ok(LayerIndex { parts })
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
    pub(super) fn parts(&self) -> &IndexParts {
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

    /// Positions of the chunks that hold any of the `len` bytes at `offset` of the data space.
    pub fn chunks_at(&self, offset: u64, len: u64) -> std::ops::Range<usize> {
        let end = offset.saturating_add(len);
        let chunks = &self.parts.chunks;
        let first = chunks.partition_point(|chunk| chunk.data_end() <= offset);
        let count = chunks[first..].partition_point(|chunk| chunk.data_offset < end);
        first..first + count
    }

    /// Bytes of the data space that are stored in the blob, i.e. that have to be fetched.
    pub fn stored_size(&self) -> u64 {
        self.parts.chunks.iter().map(|chunk| u64::from(chunk.data_len)).sum()
    }

    fn string(&self, offset: u32, len: u32) -> &[u8] {
        let offset = offset as usize;
        self.parts.strings.get(offset..offset + len as usize).unwrap_or(&[])
    }

    /// The on-disk form; the same index always gives the same bytes.
    pub fn encode(&self) -> Vec<u8> {
        let p = &self.parts;
        let mut out = Vec::with_capacity(encoded_len(p));
        out.extend_from_slice(MAGIC);
        put32(&mut out, VERSION);
        out.push(match p.access {
            Access::Stream => 0,
            Access::Ranges => 1,
        });
        out.push(match p.codec {
            Codec::None => 0,
            Codec::Gzip => 1,
            Codec::Zstd => 2,
        });
        out.extend_from_slice(&[0; 2]);
        put64(&mut out, p.data_size);
        put64(&mut out, p.blob_size);
        for count in [p.inodes.len(), p.dirents.len(), p.xattrs.len(), p.chunks.len()] {
            put32(&mut out, count as u32);
        }
        put64(&mut out, p.strings.len() as u64);
        for i in &p.inodes {
            for word in [i.mode, i.uid, i.gid, i.nlink, i.rdev_major, i.rdev_minor] {
                put32(&mut out, word);
            }
            put64(&mut out, i.size);
            put64(&mut out, i.mtime as u64);
            put32(&mut out, i.mtime_nsec);
            put32(&mut out, i.parent);
            put64(&mut out, i.data);
            for word in [i.count, i.xattr_first, i.xattr_count, i.flags, 0] {
                put32(&mut out, word);
            }
        }
        for e in &p.dirents {
            for word in [e.name, e.name_len, e.ino] {
                put32(&mut out, word);
            }
        }
        for x in &p.xattrs {
            for word in [x.name, x.name_len, x.value, x.value_len] {
                put32(&mut out, word);
            }
        }
        for c in &p.chunks {
            put64(&mut out, c.data_offset);
            put64(&mut out, c.blob_offset);
            for word in [c.data_len, c.blob_len, c.skip] {
                put32(&mut out, word);
            }
            out.extend_from_slice(c.digest.as_bytes());
        }
        out.extend_from_slice(&p.strings);
        let digest = Digest::of(&out);
        out.extend_from_slice(digest.as_bytes());
        out
    }

    /// Reads the on-disk form.
    ///
    /// # Errors
    /// [`LayerError`] when the bytes are not an index of this version, are damaged, or break a rule of [`LayerIndex::new`].
    pub fn decode(bytes: &[u8]) -> Result<Self, LayerError> {
        let truncated = |what: &str| LayerError::Truncated {
            format: FORMAT,
            length: bytes.len() as u64,
            what: what.to_owned(),
        };
        let body_len = bytes
            .len()
            .checked_sub(Digest::LEN)
            .ok_or_else(|| truncated("its checksum"))?;
        let (body, checksum) = bytes.split_at(body_len);
        let mut r = Reader { bytes: body };
        let header = r.take(HEADER_LEN).ok_or_else(|| truncated("its header"))?;
        let mut h = Reader { bytes: header };
        if h.array::<8>() != *MAGIC {
            return Err(LayerError::malformed(FORMAT, 0, "the magic number is missing"));
        }
        let version = h.u32();
        if version != VERSION {
            return Err(LayerError::Unsupported {
                what: format!("version {version} of the layer index"),
            });
        }
        if Digest::of(body).as_bytes() != checksum {
            return Err(LayerError::malformed(
                FORMAT,
                body_len as u64,
                "the checksum does not match",
            ));
        }
        let [access, codec, _, _] = h.array::<4>();
        let access = match access {
            0 => Access::Stream,
            1 => Access::Ranges,
            other => {
                return Err(LayerError::malformed(
                    FORMAT,
                    12,
                    format!("unknown access kind {other}"),
                ));
            }
        };
        let codec = match codec {
            0 => Codec::None,
            1 => Codec::Gzip,
            2 => Codec::Zstd,
            other => return Err(LayerError::malformed(FORMAT, 13, format!("unknown codec {other}"))),
        };
        let (data_size, blob_size) = (h.u64(), h.u64());
        let [inodes, dirents, xattrs, chunks] = std::array::from_fn(|_| h.u32() as usize);
        let strings = h.u64() as usize;
        let mut section = |count: usize, record: usize, what: &str| {
            count
                .checked_mul(record)
                .and_then(|len| r.take(len))
                .ok_or_else(|| truncated(what))
        };
        let inodes = section(inodes, INODE_LEN, "its inodes")?;
        let dirents = section(dirents, DIRENT_LEN, "its directory entries")?;
        let xattrs = section(xattrs, XATTR_LEN, "its extended attributes")?;
        let chunks = section(chunks, CHUNK_LEN, "its chunks")?;
        let strings = section(strings, 1, "its strings")?;
        if !r.bytes.is_empty() {
            return Err(LayerError::malformed(
                FORMAT,
                body_len as u64,
                "there are bytes after its strings",
            ));
        }
        LayerIndex::new(IndexParts {
            access,
            codec,
            data_size,
            blob_size,
            inodes: inodes
                .chunks_exact(INODE_LEN)
                .map(|b| decode_inode(Reader { bytes: b }))
                .collect(),
            dirents: dirents
                .chunks_exact(DIRENT_LEN)
                .map(|b| decode_dirent(Reader { bytes: b }))
                .collect(),
            xattrs: xattrs
                .chunks_exact(XATTR_LEN)
                .map(|b| decode_xattr(Reader { bytes: b }))
                .collect(),
            chunks: chunks
                .chunks_exact(CHUNK_LEN)
                .map(|b| decode_chunk(Reader { bytes: b }))
                .collect(),
            strings: strings.to_vec(),
        })
    }
}

fn encoded_len(p: &IndexParts) -> usize {
    HEADER_LEN
        + p.inodes.len() * INODE_LEN
        + p.dirents.len() * DIRENT_LEN
        + p.xattrs.len() * XATTR_LEN
        + p.chunks.len() * CHUNK_LEN
        + p.strings.len()
        + Digest::LEN
}

fn put32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// Reads fixed-size records. Where the bytes run out, the numbers are zero: callers take a record of the right length first.
struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.bytes.split_at_checked(len)?;
        self.bytes = tail;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        self.take(N).and_then(|b| b.try_into().ok()).unwrap_or([0; N])
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }
}

fn decode_inode(mut r: Reader<'_>) -> Inode {
    let [mode, uid, gid, nlink, rdev_major, rdev_minor] = std::array::from_fn(|_| r.u32());
    let (size, mtime) = (r.u64(), r.u64() as i64);
    let (mtime_nsec, parent, data) = (r.u32(), r.u32(), r.u64());
    let [count, xattr_first, xattr_count, flags] = std::array::from_fn(|_| r.u32());
    Inode {
        mode,
        uid,
        gid,
        nlink,
        rdev_major,
        rdev_minor,
        size,
        mtime,
        mtime_nsec,
        parent,
        data,
        count,
        xattr_first,
        xattr_count,
        flags,
    }
}

fn decode_dirent(mut r: Reader<'_>) -> Dirent {
    Dirent {
        name: r.u32(),
        name_len: r.u32(),
        ino: r.u32(),
    }
}

fn decode_xattr(mut r: Reader<'_>) -> Xattr {
    Xattr {
        name: r.u32(),
        name_len: r.u32(),
        value: r.u32(),
        value_len: r.u32(),
    }
}

fn decode_chunk(mut r: Reader<'_>) -> Chunk {
    let (data_offset, blob_offset) = (r.u64(), r.u64());
    let (data_len, blob_len, skip) = (r.u32(), r.u32(), r.u32());
    Chunk {
        data_offset,
        data_len,
        blob_offset,
        blob_len,
        skip,
        digest: Digest::from_bytes(r.array()),
    }
}

fn check(p: &IndexParts) -> Result<(), LayerError> {
    let bad = |at: usize, what: &str| Err(LayerError::malformed(FORMAT, at as u64, what));
    let limit = |what, value: u64, limit: u64| {
        if value > limit {
            Err(LayerError::TooLarge { what, value, limit })
        } else {
            Ok(())
        }
    };
    limit("number of inodes", p.inodes.len() as u64, MAX_INODES as u64)?;
    limit(
        "number of directory entries",
        p.dirents.len() as u64,
        2 * MAX_INODES as u64,
    )?;
    limit(
        "number of extended attributes",
        p.xattrs.len() as u64,
        2 * MAX_INODES as u64,
    )?;
    limit("number of chunks", p.chunks.len() as u64, MAX_CHUNKS as u64)?;
    limit(
        "length of names and attributes",
        p.strings.len() as u64,
        MAX_STRINGS as u64,
    )?;
    limit("uncompressed size of the layer", p.data_size, MAX_DATA_SIZE)?;

    let string = |offset: u32, len: u32| {
        p.strings
            .get(offset as usize..(offset as usize).checked_add(len as usize)?)
    };
    let range_ok = |first: u64, count: u64, len: usize| first.checked_add(count).is_some_and(|end| end <= len as u64);
    let mut references = vec![0u32; p.inodes.len()];
    match p.inodes.first() {
        Some(root) if root.is_dir() && root.parent == ROOT_INO => references[0] = 1,
        _ => return bad(0, "the first inode is not a root directory"),
    }
    for (i, inode) in p.inodes.iter().enumerate() {
        if !range_ok(inode.xattr_first.into(), inode.xattr_count.into(), p.xattrs.len()) {
            return bad(i, "an inode's extended attributes lie outside");
        }
        if inode.mtime_nsec >= 1_000_000_000 {
            return bad(i, "an inode's nanoseconds are a second or more");
        }
        if !inode.has_valid_flags() {
            return bad(i, "an inode's flags are unknown or do not go with its type");
        }
        match inode.file_type() {
            mode::DIR => {
                if !range_ok(inode.data, inode.count.into(), p.dirents.len()) {
                    return bad(i, "a directory's entries lie outside");
                }
                let first = inode.data as usize;
                let mut previous: &[u8] = b"";
                for entry in &p.dirents[first..first + inode.count as usize] {
                    let Some(name) = string(entry.name, entry.name_len) else {
                        return bad(i, "a name lies outside");
                    };
                    if !valid_name(name) {
                        return bad(i, "a directory entry has a name that no file can have");
                    }
                    if name <= previous {
                        return bad(i, "a directory's names are not in order");
                    }
                    previous = name;
                    let Some(target) = (entry.ino as usize).checked_sub(1).and_then(|at| p.inodes.get(at)) else {
                        return bad(i, "a directory entry names no inode");
                    };
                    let count = &mut references[entry.ino as usize - 1];
                    if target.is_dir() && (*count > 0 || target.parent as usize != i + 1) {
                        return bad(i, "a directory has two parents");
                    }
                    *count += 1;
                }
            }
            mode::REG => {
                if inode.data.checked_add(inode.size).is_none_or(|end| end > p.data_size) {
                    return bad(i, "a file's content lies outside the data space");
                }
            }
            mode::LNK => {
                let fits = u32::try_from(inode.data).ok().zip(u32::try_from(inode.size).ok());
                match fits.and_then(|(offset, len)| string(offset, len)) {
                    Some(target) if !target.is_empty() && target.len() <= MAX_TARGET_LEN && !target.contains(&0) => {}
                    _ => return bad(i, "a symlink has no valid target"),
                }
            }
            mode::CHR | mode::BLK | mode::FIFO | mode::SOCK => {}
            _ => return bad(i, "an inode has no file type"),
        }
    }
    if references.contains(&0) {
        return bad(0, "an inode has no name");
    }
    for (i, x) in p.xattrs.iter().enumerate() {
        match (string(x.name, x.name_len), string(x.value, x.value_len)) {
            (Some(name), Some(_)) if !name.is_empty() && name.len() <= MAX_NAME_LEN && !name.contains(&0) => {}
            _ => return bad(i, "an extended attribute has no valid name or value"),
        }
    }
    let mut end = 0;
    for (i, chunk) in p.chunks.iter().enumerate() {
        if chunk.data_len == 0 || chunk.data_len > MAX_CHUNK_LEN || chunk.blob_len > MAX_CHUNK_LEN {
            return bad(i, "a chunk's length is 0 or over the limit");
        }
        if chunk.data_offset < end {
            return bad(i, "chunks overlap or are not in order");
        }
        match chunk.data_offset.checked_add(chunk.data_len.into()) {
            Some(e) if e <= p.data_size => end = e,
            _ => return bad(i, "a chunk lies outside the data space"),
        }
        if chunk
            .blob_offset
            .checked_add(chunk.blob_len.into())
            .is_none_or(|e| e > p.blob_size)
        {
            return bad(i, "a chunk lies outside the blob");
        }
        if (p.access == Access::Ranges) == (chunk.blob_len == 0) {
            return bad(
                i,
                "a chunk's place in the blob does not fit the way the layer is accessed",
            );
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests;
