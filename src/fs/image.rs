//! The image face's part of the FUSE root: beside the directory of a layer, the files that an EROFS mount is made of.
//!
//! - `<slot>.data`: the data space of the layer in the slot, a device of the image. It is cold where the layer is, and read as the layer's
//!   files are.
//! - `<slot>.meta`: metadata that lies in a local file. It is shown here only for nodes where the kernel does not take that file, since
//!   it lies on a stacked file system.
//!
//! The numbers of both are behind those of all inodes that an index may have. They, the sizes and all other attributes follow from the
//! slot and what is in it, so that a later process shows the same.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::time::UNIX_EPOCH;

use fuser::{FileAttr, FileType, INodeNo};

use super::attr::{BLOCK, IO_SIZE};
use crate::layer::index::MAX_INODES;
use crate::layer::{BlobIndex, Ino, ROOT_INO};

/// Number of the data file within its slot.
pub(super) const DATA_INO: Ino = u32::MAX;
/// Number of the metadata file within its slot.
pub(super) const METADATA_INO: Ino = u32::MAX - 1;
const _: () = assert!(
    MAX_INODES < METADATA_INO as usize,
    "no inode of a layer has these numbers"
);

/// Only root mounts images; the bytes are of files that not everybody may read.
const PERMISSIONS: u16 = 0o400;
/// The kernel reads devices in pages: what it is shown ends with one, in bytes.
const PAGE: u64 = 4096;

/// What stands in the FUSE root for a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Entry {
    /// The directory of the tree face.
    Tree,
    /// The data space.
    Data,
    /// The metadata.
    Metadata,
}

impl Entry {
    pub(super) const ALL: [Entry; 3] = [Entry::Tree, Entry::Data, Entry::Metadata];

    /// Its number within the slot.
    pub(super) fn ino(self) -> Ino {
        match self {
            Entry::Tree => ROOT_INO,
            Entry::Data => DATA_INO,
            Entry::Metadata => METADATA_INO,
        }
    }

    /// Its name in the FUSE root.
    pub(super) fn name(self, slot: u32) -> String {
        match self {
            Entry::Tree => slot.to_string(),
            Entry::Data => format!("{slot}.data"),
            Entry::Metadata => format!("{slot}.meta"),
        }
    }

    /// The slot and entry that `name` stands for: each has one name, and nothing that means the same.
    pub(super) fn parse(name: &[u8]) -> Option<(u32, Entry)> {
        let text = std::str::from_utf8(name).ok()?;
        let (digits, entry) = match text.split_once('.') {
            None => (text, Entry::Tree),
            Some((digits, "data")) => (digits, Entry::Data),
            Some((digits, "meta")) => (digits, Entry::Metadata),
            Some(_) => return None,
        };
        let slot = digits.parse::<u32>().ok()?;
        (slot.to_string() == digits).then_some((slot, entry))
    }
}

/// Size of the data file, in bytes: the data space, and zeros up to the end of a page.
pub(super) fn data_size(index: &BlobIndex) -> u64 {
    // No overflow: a data space is much smaller.
    index.data_size().next_multiple_of(PAGE)
}

/// Attributes of a file of `size` bytes with the inode number `number` in FUSE.
pub(super) fn attr(number: u64, size: u64, owner: (u32, u32)) -> FileAttr {
    FileAttr {
        ino: INodeNo(number),
        size,
        blocks: size.div_ceil(BLOCK),
        // Nobody goes by the times of a device; these are the same in every process.
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: PERMISSIONS,
        nlink: 1,
        uid: owner.0,
        gid: owner.1,
        rdev: 0,
        blksize: IO_SIZE,
        flags: 0,
    }
}

/// A local file with the metadata of an image.
pub(super) struct Metadata {
    file: File,
    size: u64,
}

impl Metadata {
    /// Takes a regular file as it is now: nobody may change it any more.
    pub(super) fn new(file: File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        Ok(Metadata {
            size: metadata.size(),
            file,
        })
    }

    /// Size in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Fills `buf` from `offset`. Fails where the file has become shorter.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_has_one_name() {
        for slot in [1, 7, u32::MAX] {
            for entry in Entry::ALL {
                assert_eq!(Entry::parse(entry.name(slot).as_bytes()), Some((slot, entry)));
            }
        }
        for name in [
            "",
            "07",
            "+7",
            "-7",
            "7 ",
            "4294967296",
            "x",
            ".",
            "7.",
            "7.x",
            ".data",
            "07.data",
            "7.data.data",
            "7.meta ",
            "7.DATA",
        ] {
            assert_eq!(Entry::parse(name.as_bytes()), None, "{name:?}");
        }
        assert_eq!(Entry::parse(b"\xff"), None);
    }

    #[test]
    fn metadata_is_a_regular_file() {
        let dir = File::open("/").expect("the root directory can be opened");
        assert!(Metadata::new(dir).is_err());
        let file = tempfile::tempfile().expect("there is a temporary directory");
        file.write_all_at(b"metadata", 0).expect("it can be written");
        let metadata = Metadata::new(file).expect("it is a regular file");
        let mut bytes = [0; 4];
        assert_eq!(metadata.size(), 8);
        assert!(metadata.read(4, &mut bytes).is_ok());
        assert_eq!(&bytes, b"data");
        assert!(metadata.read(5, &mut bytes).is_err());
    }
}
