//! What the faces show without FUSE: what is in which slot, and what an inode number or a name means.
//!
//! Readers never lock, and count nothing that all of them share: the table of slots is replaced as a whole when a layer comes or goes, and
//! a request looks at the table that was there when it began ([`View`]).

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::{ArcSwap, Guard};
use fuser::{Errno, FileAttr, FileType, Generation, INodeNo};

use super::FsError;
use super::attr::{self, DIR_SIZE, IO_SIZE};
use super::image::{self, DATA_INO, Entry, METADATA_INO, Metadata};
use crate::fetch::LayerData;
use crate::layer::{Digest, Ino, Inode, LayerIndex, ROOT_INO};

/// Inode number of the FUSE root directory.
pub(super) const FUSE_ROOT: u64 = 1;
/// Permissions of the FUSE root directory: layers are reached through overlay mounts, which root makes, and by nobody else.
const FUSE_ROOT_PERMISSIONS: u16 = 0o700;
/// How far the slot is shifted in an inode number; below it is the inode's number within its layer.
const SLOT_SHIFT: u32 = 32;
/// What overlayfs calls an opaque directory with `trusted.` and, when mounted with `userxattr`, with `user.`.
const OPAQUE_TRUSTED: &[u8] = b"trusted.overlay.opaque";
const OPAQUE_USER: &[u8] = b"user.overlay.opaque";

/// A layer in a slot.
pub(super) struct Attached {
    pub(super) slot: u32,
    pub(super) layer: Arc<dyn LayerData>,
    /// Tells the inodes of layers apart that were in the same slot at different times.
    pub(super) generation: Generation,
}

impl Attached {
    /// Inode number in FUSE of the layer's inode `ino`.
    pub(super) fn number(&self, ino: Ino) -> u64 {
        number(self.slot, ino)
    }

    /// The layer's names, which may have to be read from the disk.
    pub(super) fn names(&self) -> Result<Arc<LayerIndex>, Errno> {
        // The cause is in the log of the cache.
        self.layer.names().map_err(|_| Errno::EIO)
    }

    pub(super) fn inode(&self, ino: Ino) -> Result<Inode, Errno> {
        self.names()?.inode(ino).copied().ok_or(Errno::ESTALE)
    }

    pub(super) fn attr(&self, ino: Ino) -> Result<FileAttr, Errno> {
        Ok(attr::of(self.number(ino), &self.inode(ino)?))
    }

    /// Inode number in FUSE of the directory that holds the directory `dir`.
    pub(super) fn parent_number(&self, ino: Ino, dir: &Inode) -> u64 {
        match ino {
            ROOT_INO => FUSE_ROOT,
            _ => self.number(dir.parent),
        }
    }
}

/// What is in a slot.
#[derive(Clone, Default)]
pub(super) struct Slot {
    pub(super) layer: Option<Arc<Attached>>,
    pub(super) metadata: Option<Arc<Metadata>>,
}

impl Slot {
    fn is_empty(&self) -> bool {
        self.layer.is_none() && self.metadata.is_none()
    }
}

/// What an inode number stands for.
pub(super) enum Place<'a> {
    /// The FUSE root directory.
    Root,
    /// An inode of a layer. The layer may not have it.
    Inode(&'a Attached, Ino),
    /// The data space of a layer.
    Data(&'a Attached),
    /// Metadata of the slot with this number.
    Metadata(u32, &'a Metadata),
}

/// Answer to a look-up.
pub(super) struct Found {
    pub(super) attr: FileAttr,
    pub(super) generation: Generation,
    /// Whether the name may mean something else later: the slots in the FUSE root.
    pub(super) volatile: bool,
}

/// Totals for statfs.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Totals {
    /// Blocks of [`IO_SIZE`] bytes.
    pub(super) blocks: u64,
    pub(super) inodes: u64,
}

pub(super) type Slots = BTreeMap<u32, Slot>;

/// The slots and what is in them.
pub(super) struct Tree {
    slots: ArcSwap<Slots>,
    owner: (u32, u32),
    /// Times of the FUSE root directory.
    since: SystemTime,
}

impl Tree {
    pub(super) fn new() -> Self {
        Tree {
            slots: ArcSwap::default(),
            owner: (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()),
            since: SystemTime::now(),
        }
    }

    /// Puts a layer into a slot. The same layer (by its id) may be put there again, and replaces its reader.
    pub(super) fn attach(&self, slot: u32, layer: Arc<dyn LayerData>) -> Result<(), FsError> {
        let digest = *layer.id();
        if slot == 0 {
            return Err(FsError::SlotZero { layer: digest });
        }
        let attached = Arc::new(Attached {
            slot,
            layer,
            generation: generation(&digest),
        });
        let holder = |slots: &Slots| Some(*slots.get(&slot)?.layer.as_ref()?.layer.id());
        let previous = self.slots.rcu(|slots| {
            let mut slots = Slots::clone(slots);
            if holder(&slots).is_none_or(|there| there == digest) {
                slots.entry(slot).or_default().layer = Some(Arc::clone(&attached));
            }
            slots
        });
        match holder(&previous) {
            Some(holder) if holder != digest => Err(FsError::SlotTaken {
                slot,
                layer: digest,
                holder,
            }),
            _ => Ok(()),
        }
    }

    /// Takes the layer out of a slot; tells whether there was one.
    pub(super) fn detach(&self, slot: u32) -> bool {
        self.take(slot, |slot| slot.layer.take().is_some())
    }

    /// Puts metadata into a slot, in place of what was there.
    pub(super) fn attach_metadata(&self, slot: u32, file: File) -> Result<(), FsError> {
        let fail = |source| FsError::Metadata { slot, source };
        if slot == 0 {
            return Err(fail(io::Error::from(io::ErrorKind::InvalidInput)));
        }
        let metadata = Arc::new(Metadata::new(file).map_err(fail)?);
        self.slots.rcu(|slots| {
            let mut slots = Slots::clone(slots);
            slots.entry(slot).or_default().metadata = Some(Arc::clone(&metadata));
            slots
        });
        Ok(())
    }

    /// Takes the metadata out of a slot; tells whether there was any.
    pub(super) fn detach_metadata(&self, slot: u32) -> bool {
        self.take(slot, |slot| slot.metadata.take().is_some())
    }

    fn take(&self, slot: u32, take: impl Fn(&mut Slot) -> bool) -> bool {
        let mut taken = false;
        self.slots.rcu(|slots| {
            let mut slots = Slots::clone(slots);
            taken = slots.get_mut(&slot).is_some_and(&take);
            slots.retain(|_, slot| !slot.is_empty());
            slots
        });
        taken
    }

    /// What is in the slots now.
    pub(super) fn view(&self) -> View<'_> {
        View {
            slots: self.slots.load(),
            tree: self,
        }
    }
}

/// The slots as they were at one moment.
pub(super) struct View<'a> {
    slots: Guard<Arc<Slots>>,
    tree: &'a Tree,
}

impl View<'_> {
    /// All slots in their order.
    pub(super) fn slots(&self) -> &Slots {
        &self.slots
    }

    /// What `number` stands for; ESTALE if that is gone.
    pub(super) fn place(&self, number: INodeNo) -> Result<Place<'_>, Errno> {
        if number.0 == FUSE_ROOT {
            return Ok(Place::Root);
        }
        let (number, ino) = ((number.0 >> SLOT_SHIFT) as u32, number.0 as u32);
        let slot = self.slots.get(&number).ok_or(Errno::ESTALE)?;
        let layer = || slot.layer.as_deref().ok_or(Errno::ESTALE);
        match ino {
            DATA_INO => layer().map(Place::Data),
            METADATA_INO => {
                let metadata = slot.metadata.as_deref().ok_or(Errno::ESTALE)?;
                Ok(Place::Metadata(number, metadata))
            }
            ino => layer().map(|layer| Place::Inode(layer, ino)),
        }
    }

    pub(super) fn attr(&self, number: INodeNo) -> Result<FileAttr, Errno> {
        match self.place(number)? {
            Place::Root => Ok(self.root_attr()),
            Place::Inode(attached, ino) => attached.attr(ino),
            Place::Data(attached) => {
                let size = image::data_size(attached.layer.index());
                Ok(image::attr(number.0, size, self.tree.owner))
            }
            Place::Metadata(_, metadata) => Ok(image::attr(number.0, metadata.size(), self.tree.owner)),
        }
    }

    /// Attributes of the FUSE root directory.
    pub(super) fn root_attr(&self) -> FileAttr {
        let layers = self.slots.values().filter(|slot| slot.layer.is_some()).count();
        let subdirectories = u32::try_from(layers).unwrap_or(u32::MAX);
        FileAttr {
            ino: INodeNo(FUSE_ROOT),
            size: DIR_SIZE,
            blocks: DIR_SIZE / 512,
            atime: self.tree.since,
            mtime: self.tree.since,
            ctime: self.tree.since,
            crtime: self.tree.since,
            kind: FileType::Directory,
            perm: FUSE_ROOT_PERMISSIONS,
            nlink: subdirectories.saturating_add(2),
            uid: self.tree.owner.0,
            gid: self.tree.owner.1,
            rdev: 0,
            blksize: IO_SIZE,
            flags: 0,
        }
    }

    /// Looks `name` up in the directory `parent`. `Ok(None)`: there is no such name, and there never will be.
    ///
    /// The names `.` and `..` come from a kernel that has only a file handle (export support), and then `.` of anything.
    pub(super) fn lookup(&self, parent: INodeNo, name: &[u8]) -> Result<Option<Found>, Errno> {
        let (attached, ino) = match self.place(parent)? {
            Place::Root => return self.lookup_slot(name).map(Some),
            Place::Inode(attached, ino) => (attached, ino),
            // `.` of a file: the kernel has a handle of it.
            Place::Data(_) | Place::Metadata(..) if name == b"." => return self.found(parent).map(Some),
            Place::Data(_) | Place::Metadata(..) => return Err(Errno::ENOTDIR),
        };
        let inode = attached.inode(ino)?;
        let found = match name {
            b"." => Some(ino),
            _ if !inode.is_dir() => return Err(Errno::ENOTDIR),
            b".." if ino == ROOT_INO => return self.lookup_slot(b".").map(Some),
            b".." => Some(inode.parent),
            name => attached.names()?.lookup(&inode, name),
        };
        let Some(ino) = found else {
            return Ok(None);
        };
        Ok(Some(Found {
            attr: attached.attr(ino)?,
            generation: attached.generation,
            volatile: false,
        }))
    }

    fn lookup_slot(&self, name: &[u8]) -> Result<Found, Errno> {
        if matches!(name, b"." | b"..") {
            return Ok(Found {
                attr: self.root_attr(),
                generation: Generation(0),
                volatile: true,
            });
        }
        let (slot, entry) = Entry::parse(name).ok_or(Errno::ENOENT)?;
        self.found(INodeNo(number(slot, entry.ino())))
            .map_err(|_| Errno::ENOENT)
    }

    /// What is known of something in the FUSE root.
    fn found(&self, number: INodeNo) -> Result<Found, Errno> {
        Ok(Found {
            attr: self.attr(number)?,
            generation: match self.place(number)? {
                Place::Inode(attached, _) | Place::Data(attached) => attached.generation,
                // The same slot has the same metadata for ever.
                Place::Root | Place::Metadata(..) => Generation(0),
            },
            volatile: true,
        })
    }

    pub(super) fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        for attached in self.slots.values().filter_map(|slot| slot.layer.as_deref()) {
            let index = attached.layer.index();
            let blocks = index.data_size().div_ceil(IO_SIZE.into());
            totals.blocks = totals.blocks.saturating_add(blocks);
            totals.inodes = totals.inodes.saturating_add(index.inodes());
        }
        totals
    }
}

/// Value of an extended attribute. An opaque directory is one under both names that overlayfs knows.
pub(super) fn xattr(attached: &Attached, inode: &Inode, name: &[u8]) -> Result<Option<Vec<u8>>, Errno> {
    // Overlayfs asks for several attributes of every directory it meets; nearly none has any.
    if inode.xattr_count == 0 {
        return Ok(None);
    }
    let index = attached.names()?;
    let alias = || (name == OPAQUE_USER && inode.is_dir()).then(|| index.xattr(inode, OPAQUE_TRUSTED))?;
    Ok(index.xattr(inode, name).or_else(alias).map(<[u8]>::to_vec))
}

/// Names of an inode's extended attributes, each with a NUL behind it.
pub(super) fn xattr_names(attached: &Attached, inode: &Inode) -> Result<Vec<u8>, Errno> {
    let mut names = Vec::new();
    for (name, _) in attached.names()?.xattrs(inode) {
        names.extend_from_slice(name);
        names.push(0);
    }
    Ok(names)
}

/// The kernel keeps 32 bits of a generation.
fn generation(digest: &Digest) -> Generation {
    let [a, b, c, d, ..] = *digest.as_bytes();
    Generation(u32::from_le_bytes([a, b, c, d]).into())
}

/// The slot that an inode of FUSE belongs to; `None`: it is the root directory.
pub(super) fn slot_of(number: INodeNo) -> Option<u32> {
    (number.0 != FUSE_ROOT).then_some((number.0 >> SLOT_SHIFT) as u32)
}

/// Inode number in FUSE of what has the number `ino` in the slot `slot`.
pub(super) fn number(slot: u32, ino: Ino) -> u64 {
    u64::from(slot) << SLOT_SHIFT | u64::from(ino)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_fits_into_what_the_kernel_keeps() {
        let digest = Digest::from_bytes([0xff; Digest::LEN]);
        assert_eq!(generation(&digest), Generation(u64::from(u32::MAX)));
        assert_ne!(generation(&Digest::of(b"a")), generation(&Digest::of(b"b")));
    }

    #[test]
    fn an_empty_tree_has_only_its_root() {
        let empty = Tree::new();
        let tree = empty.view();
        assert_eq!(tree.attr(INodeNo(FUSE_ROOT)).map(|attr| attr.perm), Ok(0o700));
        assert_eq!(tree.attr(INodeNo(1 << SLOT_SHIFT | 1)).err(), Some(Errno::ESTALE));
        // Number 0 and the numbers of slot 0 mean nothing.
        assert_eq!(tree.attr(INodeNo(0)).err(), Some(Errno::ESTALE));
        assert_eq!(tree.attr(INodeNo(2)).err(), Some(Errno::ESTALE));
        assert_eq!(tree.lookup(INodeNo(FUSE_ROOT), b"1").err(), Some(Errno::ENOENT));
        assert_eq!(tree.totals(), Totals::default());
        assert!(!empty.detach(1));
        assert!(!empty.detach_metadata(1));
    }
}
