//! From the entries of an archive to the inodes and names of a layer.
//!
//! [`TreeBuilder`] is fed with entries in archive order, and does to a tree in memory what containerd's unpacker, with its overlay
//! conversion of whiteouts, does to an upper directory. What it leaves is what a container sees under the overlayfs snapshotter:
//!
//! - Names, and targets of hard links and symlinks on the way, are bytes, cleaned lexically; `..` stops at the root. Symlinks among an
//!   entry's *parents* are followed, inside the root; its last component never is.
//! - Missing parents become directories 0755 root:root of the epoch (containerd leaves the time of the unpacking there), and are marked:
//!   on top of other layers they look as in those ([`super::variant`]).
//! - A directory over a directory keeps the children and the extended attributes, and takes the new attributes. Anything else replaces
//!   what had the name, with its whole subtree. The content of an inode lives as long as one of its names. A directory that got its entry after
//!   it was made for something in it is marked: it keeps extended attributes of the layers below.
//! - A hard link's own attributes go to the inode it links to, and take its `security.capability` away, as chown(2) does.
//! - The entry of the root itself sets only the root's time: the unpacker leaves a root it did not make alone.
//! - `.wh.NAME` becomes a character device 0:0 of mode 0; `.wh..wh..opq` marks its directory with `trusted.overlay.opaque`; other AUFS
//!   names (`.wh..wh.plnk`) are whiteouts of `.wh.plnk`. Of a whiteout and an entry for the same name the later one counts: so does the
//!   unpacker in a lowest layer, and in others it gives up.
//! - A global PAX header makes the parents of its own name, and removes what has that name: the unpacker takes it for an entry, and only
//!   then ignores it.
//!   Where something is to be made below a whiteout, a directory takes its place that hides what is below; the unpacker does so in a lowest
//!   layer, and in others gives up.
//! - Extended attributes: `user.*` on files and directories, `security.*`, and POSIX ACLs. `trusted.*` and names that no Linux file system
//!   takes are ignored, as the unpacker ignores them. What a directory's default ACL makes of its new files is in `tree/xattrs.rs`.
//! - No owner has the number 4294967295: chown(2) takes it as "leave it", and what had it could never be changed.
//! - Times before 1970 or after 2262 become the epoch. That of a directory which is replaced later goes to what then has its name.
//!
//! Memory is arenas: about 150 bytes for an entry and its name, and no allocation of its own. What an archive may make of few bytes is
//! limited in `tree/allowance.rs`.

mod allowance;
mod finish;
mod path;
mod times;
mod walk;
mod xattrs;

#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::hash::{BuildHasher, RandomState};

use hashbrown::HashTable;

use super::index::{
    Dirent, Ino, Inode, MAX_INODES, MAX_STRINGS, MAX_TARGET_LEN, NO_OWNER, ROOT_INO, Xattr, flags, mode,
};
use super::{IndexParts, LayerError};
pub use allowance::memory_for_blob;
use allowance::{Allowance, INTERNED_COST, NAME_COST, NODE_COST, TEXT_COST, XATTR_COST};
use path::{clean, split};
pub(super) use path::{lexical, quoted};
use times::{Late, bounded_time};
pub(super) use xattrs::{MAX_XATTR_VALUE, MAX_XATTRS, OPAQUE_XATTR};

/// Prefix of a name that deletes the rest of the name from the layers below.
const WHITEOUT_PREFIX: &[u8] = b".wh.";
/// Name that hides everything that the layers below have in its directory.
const OPAQUE_NAME: &[u8] = b".wh..wh..opq";
/// The attribute that a change of owner removes.
const CAPABILITY_XATTR: &[u8] = b"security.capability";
/// Permissions of a directory that the archive implies but does not list.
const IMPLIED_DIR_MODE: u32 = mode::DIR | 0o755;
/// Permissions of every symlink on Linux.
const SYMLINK_MODE: u32 = mode::LNK | 0o777;
/// The bit by which a directory hands its group on to directories made in it.
const SETGID: u32 = 0o2000;
/// Permission, setuid, setgid and sticky bits.
const PERMISSIONS: u32 = 0o7777;
/// Most symlinks on the way to one name, as the unpacker counts them.
pub(super) const MAX_LINKS: u32 = 255;
/// Largest device major and minor numbers of Linux.
const MAX_MAJOR: u32 = (1 << 12) - 1;
const MAX_MINOR: u32 = (1 << 20) - 1;
/// Last second of which every nanosecond fits into a signed 64-bit number.
const LAST_SECOND: i64 = i64::MAX / 1_000_000_000;
/// "No name" in the lists of [`Name`]s.
const NO_NAME: u32 = u32::MAX;
/// "No inode" in a [`Name`].
const NO_INO: Ino = 0;

/// An extended attribute of an [`Entry`]: its full name and its value.
pub type EntryXattr<'a> = (Cow<'a, [u8]>, Cow<'a, [u8]>);

/// One entry of an archive.
#[derive(Debug, Clone)]
pub struct Entry<'a> {
    /// Its name as the archive has it.
    pub path: &'a [u8],
    /// What it is.
    pub kind: EntryKind<'a>,
    /// Permission, setuid, setgid and sticky bits; others are ignored.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time: seconds since the epoch.
    pub mtime: i64,
    /// Modification time: nanoseconds after `mtime`, less than a second.
    pub mtime_nsec: u32,
    /// Extended attributes: full names and values. Of two with one name the last counts.
    pub xattrs: Vec<EntryXattr<'a>>,
}

/// What an [`Entry`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind<'a> {
    /// A directory.
    Dir,
    /// A regular file: its size, and where its content begins in the data space.
    File {
        /// Bytes of content.
        size: u64,
        /// Offset of the content in the data space.
        data: u64,
    },
    /// A symbolic link, and its target.
    Symlink(&'a [u8]),
    /// Another name of the file with this path.
    Hardlink(&'a [u8]),
    /// A character device.
    Char {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    Block {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// A global PAX header: nothing with a name.
    Nothing,
}

/// Inodes and names of a layer: those parts of [`IndexParts`] that do not depend on where the bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    /// See [`IndexParts::inodes`].
    pub inodes: Vec<Inode>,
    /// See [`IndexParts::dirents`].
    pub dirents: Vec<Dirent>,
    /// See [`IndexParts::xattrs`].
    pub xattrs: Vec<Xattr>,
    /// See [`IndexParts::strings`].
    pub strings: Vec<u8>,
}

/// A name in a directory, while the tree is built.
struct Name {
    dir: Ino,
    text: u32,
    len: u32,
    /// What it names, or [`NO_INO`] if it was removed.
    ino: Ino,
    /// The name that was added to the directory before this one.
    next: u32,
}

/// An inode while the tree is built. Inodes keep the numbers by which they were added until the end; of those that lost their last
/// name, `nlink` is 0.
struct Node {
    inode: Inode,
    /// Of a directory: the name added last.
    last_name: u32,
    /// Of a directory: the number of the entry that described it last; 0 without one.
    described: u32,
}

/// Why an entry cannot be applied: a text that completes "entry NAME: ...", or a limit.
enum Fault {
    Bad(String),
    Limit(LayerError),
}

impl From<LayerError> for Fault {
    fn from(error: LayerError) -> Self {
        Fault::Limit(error)
    }
}

fn bad<T>(what: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::Bad(what.into()))
}

/// Builds a [`Tree`].
pub struct TreeBuilder {
    format: &'static str,
    nodes: Vec<Node>,
    names: Vec<Name>,
    /// Positions in `names` by (directory, text). Names stay here when they are removed, so that they are found when they come back.
    table: HashTable<u32>,
    xattrs: Vec<Xattr>,
    /// (offset, length) of texts of `xattrs` in `strings`: the same few names and labels come again and again.
    interned: HashTable<(u32, u32)>,
    strings: Vec<u8>,
    hasher: RandomState,
    allowance: Allowance,
    /// Number of the entry at hand, from 1.
    entry: u32,
    late: Vec<Late>,
}

impl TreeBuilder {
    /// An empty tree. `format` is the format whose entries will come, for errors.
    pub fn new(format: &'static str) -> Self {
        Self::with_memory(format, u64::MAX)
    }

    /// An empty tree that may take so many bytes ([`TreeBuilder::memory`]).
    pub fn with_memory(format: &'static str, limit: u64) -> Self {
        let root = Inode {
            mode: IMPLIED_DIR_MODE,
            nlink: 2,
            parent: ROOT_INO,
            ..Inode::default()
        };
        TreeBuilder {
            format,
            nodes: vec![Node {
                inode: root,
                last_name: NO_NAME,
                described: 0,
            }],
            names: Vec::new(),
            table: HashTable::new(),
            xattrs: Vec::new(),
            interned: HashTable::new(),
            strings: Vec::new(),
            hasher: RandomState::new(),
            allowance: Allowance::new(limit),
            entry: 0,
            late: Vec::new(),
        }
    }

    /// Applies the next entry. `offset` says where it is in the archive, for errors. After an error the tree is not the archive's.
    ///
    /// # Errors
    /// [`LayerError::Malformed`] naming the entry when it could not be unpacked, [`LayerError::TooLarge`] when a limit is exceeded.
    pub fn add(&mut self, offset: u64, entry: &Entry<'_>) -> Result<(), LayerError> {
        self.apply(entry).map_err(|fault| match fault {
            Fault::Bad(what) => {
                LayerError::malformed(self.format, offset, format!("entry {}: {what}", quoted(entry.path)))
            }
            Fault::Limit(error) => error,
        })
    }

    fn apply(&mut self, entry: &Entry<'_>) -> Result<(), Fault> {
        self.allowance.entry();
        self.entry = self.entry.saturating_add(1);
        let path = clean(entry.path)?;
        let (parents, base) = split(&path);
        if base.is_empty() {
            if entry.kind == EntryKind::Nothing {
                return Ok(());
            }
            let (mtime, nsec) = bounded_time(entry);
            let root = self.inode_mut(ROOT_INO);
            (root.mtime, root.mtime_nsec) = (mtime, nsec);
            return Ok(());
        }
        for (what, id) in [("user", entry.uid), ("group", entry.gid)] {
            if id == NO_OWNER {
                return bad(format!("no {what} has the number {id}"));
            }
        }
        let Some(dir) = self.walk(parents, true)? else {
            return bad("its parent directory cannot be made");
        };
        if base == OPAQUE_NAME {
            return self.set_opaque(dir);
        }
        if let Some(hidden) = base.strip_prefix(WHITEOUT_PREFIX) {
            if let Some(old) = self.find(dir, hidden) {
                self.keep_times(self.names[old as usize].ino, &[parents, &b"/"[..], hidden].concat())?;
            }
            return self.whiteout(dir, hidden, entry);
        }
        let old = self.find(dir, base);
        if let Some(old) = old {
            let ino = self.names[old as usize].ino;
            if entry.kind == EntryKind::Dir && self.is_dir(ino) {
                return self.set_attributes(ino, entry);
            }
            self.keep_times(ino, &path)?;
            self.remove(old);
        }
        let ino = match entry.kind {
            EntryKind::Nothing => return Ok(()),
            EntryKind::Hardlink(target) => {
                let ino = self.hardlink_target(target)?;
                self.drop_xattr(ino, CAPABILITY_XATTR);
                ino
            }
            kind => {
                let ino = self.make_node(dir, kind)?;
                self.hand_on_acl(dir, ino)?;
                ino
            }
        };
        self.set_attributes(ino, entry)?;
        self.link(dir, base, ino)
    }

    /// Adds an inode without a name.
    fn make_node(&mut self, dir: Ino, kind: EntryKind<'_>) -> Result<Ino, Fault> {
        let mut inode = Inode::default();
        match kind {
            EntryKind::Dir => {
                inode.mode = mode::DIR;
                inode.parent = dir;
                inode.nlink = 1; // "."; its name in the parent comes with `link`.
            }
            EntryKind::File { size, data } => {
                inode.mode = mode::REG;
                (inode.size, inode.data) = (size, data);
            }
            EntryKind::Symlink(target) => {
                if target.is_empty() || target.len() > MAX_TARGET_LEN || target.contains(&0) {
                    return bad(format!(
                        "a symlink's target has {} bytes (1 to {MAX_TARGET_LEN} are possible) or holds a NUL",
                        target.len()
                    ));
                }
                inode.mode = SYMLINK_MODE;
                inode.size = target.len() as u64;
                inode.data = self.store(target)?.into();
            }
            EntryKind::Char { major, minor } | EntryKind::Block { major, minor } => {
                if major > MAX_MAJOR || minor > MAX_MINOR {
                    return bad(format!("no device can have the number {major}:{minor}"));
                }
                inode.mode = match kind {
                    EntryKind::Char { .. } => mode::CHR,
                    _ => mode::BLK,
                };
                (inode.rdev_major, inode.rdev_minor) = (major, minor);
            }
            EntryKind::Fifo => inode.mode = mode::FIFO,
            EntryKind::Hardlink(_) | EntryKind::Nothing => return bad("it has no inode of its own"),
        }
        limit("number of inodes", self.nodes.len() + 1, MAX_INODES)?;
        self.allowance.take(NODE_COST)?;
        self.nodes.push(Node {
            inode,
            last_name: NO_NAME,
            described: 0,
        });
        Ok(self.nodes.len() as Ino)
    }

    fn whiteout(&mut self, dir: Ino, hidden: &[u8], entry: &Entry<'_>) -> Result<(), Fault> {
        if matches!(hidden, b"" | b"." | b"..") {
            return bad("it is a whiteout of no name");
        }
        if let Some(old) = self.find(dir, hidden) {
            self.remove(old);
        }
        let ino = self.make_node(dir, EntryKind::Char { major: 0, minor: 0 })?;
        self.link(dir, hidden, ino)?;
        let (mtime, nsec) = bounded_time(entry);
        let inode = self.inode_mut(ino);
        inode.flags = flags::WHITEOUT;
        (inode.uid, inode.gid) = (entry.uid, entry.gid);
        (inode.mtime, inode.mtime_nsec) = (mtime, nsec);
        Ok(())
    }

    /// Gives `ino` a name that is free in `dir`.
    fn link(&mut self, dir: Ino, text: &[u8], ino: Ino) -> Result<(), Fault> {
        if !super::index::valid_name(text) {
            return bad(format!("no file can be called {}", quoted(text)));
        }
        let hash = self.hasher.hash_one((dir, text));
        let removed = self.table.find(hash, |&at| self.is_name(at, dir, text)).copied();
        match removed {
            Some(at) => self.names[at as usize].ino = ino,
            None => {
                limit("number of names", self.names.len() + 1, 2 * MAX_INODES)?;
                self.allowance.take(NAME_COST)?;
                let at = self.names.len() as u32;
                let offset = self.store(text)?;
                let node = &mut self.nodes[dir as usize - 1];
                self.names.push(Name {
                    dir,
                    text: offset,
                    len: text.len() as u32,
                    ino,
                    next: std::mem::replace(&mut node.last_name, at),
                });
                let TreeBuilder {
                    table,
                    names,
                    strings,
                    hasher,
                    ..
                } = self;
                table.insert_unique(hash, at, |&at| {
                    let name = &names[at as usize];
                    hasher.hash_one((name.dir, text_at(strings, name.text, name.len)))
                });
            }
        }
        self.inode_mut(ino).nlink += 1;
        if self.is_dir(ino) {
            self.inode_mut(dir).nlink += 1;
        }
        Ok(())
    }

    /// Removes a name, and all that is below it.
    fn remove(&mut self, name: u32) {
        let ino = std::mem::replace(&mut self.names[name as usize].ino, NO_INO);
        if !self.is_dir(ino) {
            self.inode_mut(ino).nlink -= 1;
            return;
        }
        let parent = self.inode(ino).parent;
        self.inode_mut(parent).nlink -= 1;
        let mut dirs = vec![ino];
        while let Some(dir) = dirs.pop() {
            self.inode_mut(dir).nlink = 0;
            let mut at = self.nodes[dir as usize - 1].last_name;
            while let Some(name) = self.names.get_mut(at as usize) {
                at = name.next;
                let ino = std::mem::replace(&mut name.ino, NO_INO);
                if ino == NO_INO {
                    continue;
                }
                if self.is_dir(ino) {
                    dirs.push(ino);
                } else {
                    self.inode_mut(ino).nlink -= 1;
                }
            }
        }
    }

    fn set_attributes(&mut self, ino: Ino, entry: &Entry<'_>) -> Result<(), Fault> {
        let (mtime, nsec) = bounded_time(entry);
        let inode = self.inode_mut(ino);
        if !inode.is_symlink() {
            inode.mode = inode.file_type() | (entry.mode & PERMISSIONS);
        }
        if inode.is_implied() {
            inode.flags = flags::LATE;
        }
        inode.flags &= !flags::WHITEOUT;
        if inode.is_dir() {
            self.nodes[ino as usize - 1].described = self.entry;
        }
        let inode = self.inode_mut(ino);
        (inode.uid, inode.gid) = (entry.uid, entry.gid);
        (inode.mtime, inode.mtime_nsec) = (mtime, nsec);
        self.set_xattrs(ino, &entry.xattrs)?;
        self.fit_acl(ino)
    }

    fn store(&mut self, text: &[u8]) -> Result<u32, Fault> {
        limit(
            "length of names and attributes",
            self.strings.len() + text.len(),
            MAX_STRINGS,
        )?;
        self.allowance.take(TEXT_COST * text.len() as u64)?;
        let at = self.strings.len() as u32;
        self.strings.extend_from_slice(text);
        Ok(at)
    }

    /// The name `text` in `dir`, unless it was removed.
    fn find(&self, dir: Ino, text: &[u8]) -> Option<u32> {
        let hash = self.hasher.hash_one((dir, text));
        let at = *self.table.find(hash, |&at| self.is_name(at, dir, text))?;
        (self.names[at as usize].ino != NO_INO).then_some(at)
    }

    fn is_name(&self, at: u32, dir: Ino, text: &[u8]) -> bool {
        let name = &self.names[at as usize];
        name.dir == dir && text_at(&self.strings, name.text, name.len) == text
    }

    fn inode(&self, ino: Ino) -> &Inode {
        &self.nodes[ino as usize - 1].inode
    }

    fn inode_mut(&mut self, ino: Ino) -> &mut Inode {
        &mut self.nodes[ino as usize - 1].inode
    }

    fn is_dir(&self, ino: Ino) -> bool {
        self.inode(ino).is_dir()
    }

    fn target(&self, ino: Ino) -> &[u8] {
        let inode = self.inode(ino);
        text_at(&self.strings, inode.data as u32, inode.size as u32)
    }
}

impl Tree {
    /// The parts of an index, with everything about bytes still to be filled in by the caller.
    pub(super) fn into_parts(self, access: super::Access, codec: super::Codec) -> IndexParts {
        IndexParts {
            access,
            codec,
            data_size: 0,
            blob_size: 0,
            inodes: self.inodes,
            dirents: self.dirents,
            xattrs: self.xattrs,
            chunks: Vec::new(),
            verify: super::Verify::Content,
            checkpoints: Vec::new(),
            strings: self.strings,
        }
    }
}

fn text_at(strings: &[u8], at: u32, len: u32) -> &[u8] {
    &strings[at as usize..at as usize + len as usize]
}

fn limit(what: &'static str, value: usize, limit: usize) -> Result<(), LayerError> {
    if value > limit {
        return Err(LayerError::TooLarge {
            what,
            value: value as u64,
            limit: limit as u64,
        });
    }
    Ok(())
}
