//! What a layer looks like on the layers below it, where that is not what it looks like by itself.
//!
//! containerd unpacks a layer with a view to its parents, and overlayfs then shows what was unpacked. In two cases this matters:
//!
//! - *Directories without an entry.* A layer may hold `tmp/x` and say nothing of `tmp`. The unpacker makes such a directory look like
//!   that of the same path in the nearest layer below that has one: mode, owner, time, extended attributes (but for `trusted.*`).
//!   Each layer is asked by itself: what lies between hides nothing, and symlinks on the path are followed within the layer that has
//!   them. Where the nearest layer that has the path has something else there (a whiteout, say), or none has it, the directory is
//!   0755 root:root, with the group of its parent if that hands its group on (setgid). Without this a layer that mentions `tmp/x`
//!   would take the sticky bit from everybody's `/tmp`.
//! - *Whiteouts in the lowest layer.* There is nothing below to hide, and the lowest layer is unpacked without overlayfs: whiteouts
//!   leave no device, opaque markers no attribute. (What they hid of their own layer is gone from the index already, except that an
//!   opaque marker leaves alone what the unpacker would remove: the contents of directories without an entry.)
//!
//! Whoever stacks layers goes from the lowest up, and gives as layers below what this module made of them.

use std::collections::HashMap;
use std::rc::Rc;

use super::index::{MAX_STRINGS, Xattr, flags};
use super::tree::OPAQUE_XATTR;
use super::{Dirent, IndexParts, Ino, Inode, LayerError, LayerIndex, ROOT_INO};

/// Most symlinks on the way to one directory (MAXSYMLINKS of Linux).
const MAX_LINKS: u32 = 40;
/// Most steps into directories that may be taken for one layer, so that few bytes of symlinks cannot cost hours. An image of a hundred
/// layers whose last one has a million directories without an entry takes that many.
const MAX_STEPS: u64 = 100 << 20;
/// Attributes with this prefix belong to one layer alone.
const TRUSTED_PREFIX: &[u8] = b"trusted.";
/// The bit by which a directory hands its group on to what is made in it.
const SETGID: u32 = 0o2000;

/// The index of a layer as it looks on the layers `below`, of which the topmost comes first; `None` if that is how it looks anyway,
/// which is found out in one pass over its inodes. Of a layer below that is `None` nothing is known: it is passed over.
///
/// The result has the same data space and the same chunks. Inodes have other numbers where whiteouts were removed.
///
/// # Errors
/// [`LayerError::TooLarge`] when a limit is exceeded.
pub fn on_top_of(index: &LayerIndex, below: &[Option<&LayerIndex>]) -> Result<Option<LayerIndex>, LayerError> {
    if below.is_empty() {
        return without_whiteouts(index);
    }
    if !depends_on_below(index) {
        return Ok(None);
    }
    let below: Vec<&LayerIndex> = below.iter().copied().flatten().collect();
    let looks = looks_on(index, &below)?;
    let differing: Vec<_> = looks
        .into_iter()
        .filter(|(ino, look)| !look.is_of(index, *ino))
        .collect();
    if differing.is_empty() {
        return Ok(None);
    }
    let mut patch = Patch::of(index.parts().clone());
    for (ino, look) in differing {
        patch.apply(index, ino, look)?;
    }
    LayerIndex::new(patch.parts).map(Some)
}

/// Whether the layers below a layer make a difference to it, as long as there are any.
pub fn depends_on_below(index: &LayerIndex) -> bool {
    index.inodes().iter().any(Inode::is_implied)
}

/// Where a path of the layer leads in one layer below.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Dir(Ino),
    /// Something else than a directory: the layers below it are not asked.
    Other,
    Missing,
}

/// How a directory without an entry has to look.
#[derive(Clone, Copy)]
enum Look<'a> {
    /// As this directory of a layer below.
    Of(&'a LayerIndex, Inode),
    /// As by itself, with this group.
    Group(u32),
}

impl Look<'_> {
    /// The group that the directory hands on, if it does.
    fn hands_on(&self) -> Option<u32> {
        match self {
            Look::Of(_, described) if described.mode & SETGID != 0 => Some(described.gid),
            // The unpacker sets the permissions of what it makes, and so takes the bit away.
            _ => None,
        }
    }

    /// Whether a directory looks like this already.
    fn is_of(&self, index: &LayerIndex, ino: Ino) -> bool {
        let attributes = |inode: &Inode| (inode.mode, inode.uid, inode.gid, inode.mtime, inode.mtime_nsec);
        index.inode(ino).is_some_and(|inode| match self {
            Look::Of(below, described) => {
                attributes(inode) == attributes(described) && inherited(index, inode).eq(inherited(below, described))
            }
            Look::Group(gid) => inode.gid == *gid,
        })
    }
}

/// A directory to look into, with its places in the layers below, and the group that it hands on.
type Pending = (Ino, Rc<[Place]>, Option<u32>);

/// The looks of all directories without an entry that do not look as by themselves.
fn looks_on<'a>(index: &LayerIndex, below: &[&'a LayerIndex]) -> Result<Vec<(Ino, Look<'a>)>, LayerError> {
    let on_the_way = ways_to_implied(index);
    let mut steps = 0;
    let mut found = Vec::new();
    let mut pending: Vec<Pending> = vec![(ROOT_INO, below.iter().map(|_| Place::Dir(ROOT_INO)).collect(), None)];
    while let Some((ino, places, group)) = pending.pop() {
        let Some(dir) = index.inode(ino) else { continue };
        for entry in index.entries(dir) {
            if !on_the_way.get(entry.ino as usize).is_some_and(|&wanted| wanted) {
                continue;
            }
            let name = index.name(entry);
            let mut own = Vec::with_capacity(below.len());
            for (layer, place) in below.iter().zip(places.iter()) {
                own.push(match *place {
                    Place::Dir(dir) => step(layer, dir, name, &mut steps)?,
                    other => other,
                });
            }
            let mut look = None;
            if index.inode(entry.ino).is_some_and(Inode::is_implied) {
                let nearest = own.iter().zip(below).find(|(place, _)| **place != Place::Missing);
                look = match nearest {
                    Some((Place::Dir(ino), layer)) => layer.inode(*ino).map(|inode| Look::Of(layer, *inode)),
                    _ => group.map(Look::Group),
                };
                found.extend(look.map(|look| (entry.ino, look)));
            }
            pending.push((entry.ino, own.into(), look.and_then(|look| look.hands_on())));
        }
    }
    Ok(found)
}

/// For every inode number: whether it is a directory without an entry, or on the way to one.
fn ways_to_implied(index: &LayerIndex) -> Vec<bool> {
    let mut marked = vec![false; index.inodes().len() + 1];
    for (at, _) in index
        .inodes()
        .iter()
        .enumerate()
        .filter(|(_, inode)| inode.is_implied())
    {
        let mut ino = at + 1;
        while let Some(mark @ false) = marked.get_mut(ino) {
            *mark = true;
            let inode = ino.checked_sub(1).and_then(|at| index.inodes().get(at));
            ino = inode.map_or(0, |inode| inode.parent as usize);
        }
    }
    marked
}

/// Where `name` in the directory `dir` leads, over symlinks that stay inside the layer.
fn step(layer: &LayerIndex, dir: Ino, name: &[u8], steps: &mut u64) -> Result<Place, LayerError> {
    let mut dir = dir;
    let mut links = 0;
    // Components still to go, the next one last.
    let mut todo = vec![name];
    while let Some(part) = todo.pop() {
        *steps += 1;
        if *steps > MAX_STEPS {
            return Err(LayerError::TooLarge {
                what: "number of steps to directories in the layers below",
                value: *steps,
                limit: MAX_STEPS,
            });
        }
        let Some(here) = layer.inode(dir) else {
            return Ok(Place::Missing);
        };
        match part {
            b"" | b"." => continue,
            b".." => {
                dir = here.parent;
                continue;
            }
            _ => {}
        }
        let Some(ino) = layer.lookup(here, part) else {
            return Ok(Place::Missing);
        };
        match layer.inode(ino) {
            Some(inode) if inode.is_dir() => dir = ino,
            Some(inode) if inode.is_symlink() => {
                links += 1;
                if links > MAX_LINKS {
                    return Ok(Place::Other);
                }
                let target = layer.target(inode);
                if target.first() == Some(&b'/') {
                    dir = ROOT_INO;
                }
                todo.extend(target.rsplit(|&c| c == b'/'));
            }
            _ => return Ok(Place::Other),
        }
    }
    Ok(Place::Dir(dir))
}

/// The attributes of a directory that one above it takes over.
fn inherited<'a>(layer: &'a LayerIndex, dir: &Inode) -> impl Iterator<Item = (&'a [u8], &'a [u8])> {
    layer.xattrs(dir).filter(|(name, _)| !name.starts_with(TRUSTED_PREFIX))
}

/// An index being changed.
struct Patch {
    parts: IndexParts,
    /// Where texts that were added are.
    added: HashMap<Vec<u8>, u32>,
}

impl Patch {
    fn of(parts: IndexParts) -> Self {
        Patch {
            parts,
            added: HashMap::new(),
        }
    }

    /// Gives the directory `ino` of the index a look.
    fn apply(&mut self, index: &LayerIndex, ino: Ino, look: Look<'_>) -> Result<(), LayerError> {
        let first = self.parts.xattrs.len();
        let Some(old) = index.inode(ino) else { return Ok(()) };
        let (below, described) = match look {
            Look::Of(below, described) => (below, described),
            Look::Group(gid) => {
                if let Some(inode) = self.parts.inodes.get_mut(ino as usize - 1) {
                    inode.gid = gid;
                }
                return Ok(());
            }
        };
        // A marker may have made it opaque, which is no matter of the layers below.
        let own = index.xattrs(old).filter(|(name, _)| name.starts_with(TRUSTED_PREFIX));
        for (name, value) in own.chain(inherited(below, &described)) {
            let xattr = Xattr {
                name: self.text(name)?,
                name_len: name.len() as u32,
                value: self.text(value)?,
                value_len: value.len() as u32,
            };
            self.parts.xattrs.push(xattr);
        }
        let count = self.parts.xattrs.len() - first;
        let Some(inode) = self.parts.inodes.get_mut(ino as usize - 1) else {
            return Ok(());
        };
        (inode.mode, inode.uid, inode.gid) = (described.mode, described.uid, described.gid);
        (inode.mtime, inode.mtime_nsec) = (described.mtime, described.mtime_nsec);
        // Numbers over the limits are told by the check of the whole index.
        (inode.xattr_first, inode.xattr_count) = (first as u32, count as u32);
        Ok(())
    }

    fn text(&mut self, text: &[u8]) -> Result<u32, LayerError> {
        if let Some(&at) = self.added.get(text) {
            return Ok(at);
        }
        let strings = &mut self.parts.strings;
        if strings.len() + text.len() > MAX_STRINGS {
            return Err(LayerError::TooLarge {
                what: "length of names and attributes",
                value: (strings.len() + text.len()) as u64,
                limit: MAX_STRINGS as u64,
            });
        }
        let at = strings.len() as u32;
        strings.extend_from_slice(text);
        self.added.insert(text.to_vec(), at);
        Ok(at)
    }
}

/// The index without devices and attributes that came from whiteouts; `None` if there are none.
fn without_whiteouts(index: &LayerIndex) -> Result<Option<LayerIndex>, LayerError> {
    let is_whiteout = |inode: &Inode| inode.flags & flags::WHITEOUT != 0;
    let is_opaque = |inode: &Inode| index.xattr(inode, OPAQUE_XATTR.0).is_some();
    if !index
        .inodes()
        .iter()
        .any(|inode| is_whiteout(inode) || is_opaque(inode))
    {
        return Ok(None);
    }
    let old = index.parts();
    // New numbers by old ones; 0 for what is removed.
    let mut numbers: Vec<Ino> = Vec::with_capacity(old.inodes.len());
    let mut kept = 0;
    for inode in &old.inodes {
        kept += Ino::from(!is_whiteout(inode));
        numbers.push(if is_whiteout(inode) { 0 } else { kept });
    }
    let number = |ino: Ino| {
        let at = (ino as usize).checked_sub(1);
        at.and_then(|at| numbers.get(at)).copied().unwrap_or(0)
    };
    let mut inodes = Vec::with_capacity(kept as usize);
    let mut dirents: Vec<Dirent> = Vec::with_capacity(old.dirents.len());
    let mut xattrs: Vec<Xattr> = Vec::with_capacity(old.xattrs.len());
    for inode in old.inodes.iter().filter(|inode| !is_whiteout(inode)) {
        let mut new = Inode {
            parent: number(inode.parent),
            ..*inode
        };
        if inode.is_dir() {
            let first = dirents.len();
            let entries = index.entries(inode).iter().map(|entry| Dirent {
                ino: number(entry.ino),
                ..*entry
            });
            dirents.extend(entries.filter(|entry| entry.ino != 0));
            (new.data, new.count) = (first as u64, (dirents.len() - first) as u32);
        }
        let first = xattrs.len();
        let own = inode.xattr_first as usize..inode.xattr_first as usize + inode.xattr_count as usize;
        let records = old.xattrs.get(own).unwrap_or_default().iter();
        let named = records.zip(index.xattrs(inode));
        xattrs.extend(
            named
                .filter(|(_, (name, _))| *name != OPAQUE_XATTR.0)
                .map(|(record, _)| *record),
        );
        (new.xattr_first, new.xattr_count) = (first as u32, (xattrs.len() - first) as u32);
        inodes.push(new);
    }
    let parts = IndexParts {
        inodes,
        dirents,
        xattrs,
        chunks: old.chunks.clone(),
        checkpoints: old.checkpoints.clone(),
        strings: old.strings.clone(),
        ..*old
    };
    LayerIndex::new(parts).map(Some)
}

#[cfg(test)]
mod tests;
