//! What a layer looks like on the layers below it, where that is not what it looks like by itself.
//!
//! containerd unpacks a layer with a view to its parents, and overlayfs then shows what was unpacked. In two cases this matters:
//!
//! - *Directories without an entry.* A layer may hold `tmp/x` and say nothing of `tmp`. The unpacker makes such a directory look like
//!   that of the same path in the nearest layer below that has one: mode, owner, time, extended attributes (but for `trusted.*`).
//!   Each layer is asked by itself: what lies between hides nothing, and symlinks on the path are followed within the layer that has
//!   them. Where the nearest layer that has the path has something else there (a whiteout, say), or none has it, the directory is
//!   0755 root:root, with the group of its parent if that hands its group on (setgid). Without this a layer that mentions `tmp/x`
//!   would take the sticky bit from everybody's `/tmp`. A directory whose entry comes after things in it was made in the same way, and keeps
//!   the extended attributes that its entry does not give. What is made in a directory that takes over a default ACL gets it too.
//! - *Whiteouts in the lowest layer.* There is nothing below to hide, and the lowest layer is unpacked without overlayfs: whiteouts
//!   leave no device, opaque markers no attribute. (What they hid of their own layer is gone from the index already, except that an
//!   opaque marker leaves alone what the unpacker would remove: the contents of directories without an entry.)
//!
//! Whoever stacks layers goes from the lowest up, and gives as layers below what this module made of them.
//!
//! Memory: a changed layer is as large as the layer, and for each directory that it takes over, a few attributes more; while it is
//! made, 1 byte for each inode, 32 for each directory that changes, and 8 for each directory on one path in each layer below that has it.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use super::acl::{self, Acl};
use super::index::{MAX_STRINGS, Xattr, flags};
use super::tree::{MAX_LINKS, OPAQUE_XATTR, lexical};
use super::{Dirent, IndexParts, Ino, Inode, LayerError, LayerIndex, ROOT_INO};

/// Most steps into directories that may be taken for one layer, so that few bytes of symlinks cannot cost hours. An image of a hundred
/// layers whose last one has a million directories without an entry takes that many.
const MAX_STEPS: u64 = 100 << 20;
/// Of those any layer may take so many ...
const STEPS_BASE: u64 = 100 << 10;
/// ... and so many more for each directory and each layer below: one that is no symlink takes one or two.
const STEPS_PER_PLACE: u64 = 4;
/// Most places in layers below that are in memory, 8 bytes each: those of the deepest path in 500 layers, twice.
const MAX_PLACES: u64 = 2 << 20;
/// Most attributes that any layer may take over from those below ...
const INHERITED_BASE: u64 = 64 << 10;
/// ... and so many more for each directory that takes some.
const INHERITED_PER_DIR: u64 = 16;
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
    if looks.is_empty() {
        return Ok(None);
    }
    let parts = dress(index, &looks)?;
    LayerIndex::new(parts).map(Some)
}

/// Whether the layers below a layer make a difference to it, as long as there are any.
pub fn depends_on_below(index: &LayerIndex) -> bool {
    index.inodes().iter().any(Inode::takes_over)
}

/// Where a path of the layer leads in one layer below.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Dir(Ino),
    /// Something else than a directory: the layers below it are not asked.
    Other,
    Missing,
}

/// How a directory that takes over something has to look.
#[derive(Clone, Copy)]
enum Look<'a> {
    /// As this directory of a layer below.
    Of(&'a LayerIndex, Ino),
    /// As by itself, with this group.
    Group(u32),
}

impl Look<'_> {
    /// The group that the directory hands on, if it does.
    fn hands_on(&self) -> Option<u32> {
        match self {
            Look::Of(layer, ino) => {
                let described = layer.inode(*ino)?;
                (described.mode & SETGID != 0).then_some(described.gid)
            }
            // The unpacker sets the permissions of what it makes, and so takes the bit away.
            Look::Group(_) => None,
        }
    }

    /// Whether a directory looks like this already.
    fn is_of(&self, index: &LayerIndex, ino: Ino) -> bool {
        index.inode(ino).is_some_and(|inode| match self {
            Look::Of(below, ino) => below.inode(*ino).is_some_and(|described| {
                let own: Attributes<'_> = attributes(index, inode);
                head(&look_of(inode, described)) == head(inode)
                    && taken_over(inode, own.clone(), below, described) == own
            }),
            Look::Group(gid) => inode.gid == *gid,
        })
    }
}

/// Extended attributes by their names.
type Attributes<'a> = BTreeMap<&'a [u8], Cow<'a, [u8]>>;

fn attributes<'a>(layer: &'a LayerIndex, inode: &Inode) -> Attributes<'a> {
    layer
        .xattrs(inode)
        .map(|(name, value)| (name, Cow::Borrowed(value)))
        .collect()
}

/// What an inode says besides its extended attributes.
fn head(inode: &Inode) -> (u32, u32, u32, i64, u32) {
    (inode.mode, inode.uid, inode.gid, inode.mtime, inode.mtime_nsec)
}

/// A directory as it looks with `described` below it.
fn look_of(inode: &Inode, described: &Inode) -> Inode {
    match inode.is_implied() {
        true => Inode {
            mode: described.mode,
            uid: described.uid,
            gid: described.gid,
            ..match (inode.mtime, inode.mtime_nsec) {
                (0, 0) => Inode {
                    mtime: described.mtime,
                    mtime_nsec: described.mtime_nsec,
                    ..*inode
                },
                // It has the time of a directory that was replaced in its own layer.
                _ => *inode,
            }
        },
        false => *inode,
    }
}

/// The attributes of a directory that has its `own` and takes over those of `described` below it.
fn taken_over<'a>(inode: &Inode, mut own: Attributes<'a>, below: &'a LayerIndex, described: &Inode) -> Attributes<'a> {
    // What its entry gave stays; ACLs that its directory handed on do not.
    let given = |name: &[u8], own: &Attributes<'_>| match name {
        acl::ACCESS => inode.flags & flags::OWN_ACL != 0,
        acl::DEFAULT => inode.flags & flags::OWN_DEFAULT_ACL != 0,
        _ => !inode.is_implied() && own.contains_key(name),
    };
    for (name, value) in below.xattrs(described) {
        // A marker may have made either opaque, which is no matter of the other.
        if !name.starts_with(TRUSTED_PREFIX) && !given(name, &own) {
            own.insert(name, Cow::Borrowed(value));
        }
    }
    fit_acl(&mut own, look_of(inode, described).mode);
    own
}

/// Makes the access list fit the mode.
fn fit_acl(own: &mut Attributes<'_>, mode: u32) {
    let Some(list) = own.remove(acl::ACCESS) else { return };
    let list = Acl::of(&list);
    if !list.is_minimal() {
        own.insert(acl::ACCESS, Cow::Owned(list.with_mode(mode).value().to_vec()));
    }
}

/// A directory that is looked into.
struct Frame {
    dir: Ino,
    /// Where it is in the layers below, the topmost first: positions of the layers that have it, and the directories there. Where a layer has
    /// something else, those below it do not count any more.
    places: Vec<(u32, Ino)>,
    /// How many of its entries have not been gone into.
    left: usize,
}

/// An inode is a directory without an entry, or on the way to one.
const WANTED: u8 = 1;
/// There are such directories below it.
const INNER: u8 = 2;

/// Steps into directories of layers below, of which there may be only so many.
struct Steps {
    taken: u64,
    limit: u64,
}

impl Steps {
    fn take(&mut self) -> Result<(), LayerError> {
        self.taken += 1;
        limit(
            "number of steps to directories in the layers below",
            self.taken,
            self.limit,
        )
    }
}

/// The looks of all directories without an entry that have to look in another way than they do. In depth: only the places of the
/// directories on the way to the one at hand are in memory.
fn looks_on<'a>(index: &LayerIndex, below: &[&'a LayerIndex]) -> Result<Vec<(Ino, Look<'a>)>, LayerError> {
    let marks = ways_to_implied(index);
    let mark = |ino: Ino| marks.get(ino as usize).copied().unwrap_or(0);
    let wanted = marks.iter().filter(|mark| **mark != 0).count() as u64;
    let mut steps = Steps {
        taken: 0,
        limit: (STEPS_BASE + STEPS_PER_PLACE * wanted * (below.len() as u64 + 1)).min(MAX_STEPS),
    };
    let mut found = Vec::new();
    let root: Vec<(u32, Ino)> = (0..below.len() as u32).map(|layer| (layer, ROOT_INO)).collect();
    let mut frames: Vec<Frame> = Vec::new();
    let (mut held, mut next) = (0, Some((ROOT_INO, root, None)));
    loop {
        if let Some((ino, places, group)) = next.take() {
            let Some(dir) = index.inode(ino) else { continue };
            for entry in index.entries(dir) {
                let Some(inode) = index.inode(entry.ino).filter(|inode| inode.takes_over()) else {
                    continue;
                };
                debug_assert!(mark(entry.ino) & WANTED != 0 && inode.is_dir());
                let nearest = nearest(below, &places, index.name(entry), &mut steps)?;
                let look = nearest.map(|(layer, ino)| Look::Of(layer, ino));
                if let Some(look) = look.or(group.filter(|_| inode.is_implied()).map(Look::Group))
                    && !look.is_of(index, entry.ino)
                {
                    found.push((entry.ino, look));
                }
            }
            held += places.len();
            limit("number of places in the layers below", held as u64, MAX_PLACES)?;
            let left = index.entries(dir).len();
            frames.push(Frame { dir: ino, places, left });
        }
        // The last of them first.
        let Some(frame) = frames.last_mut() else {
            return Ok(found);
        };
        let entries = index.inode(frame.dir).map_or(&[][..], |dir| index.entries(dir));
        let Some(at) = entries[..frame.left]
            .iter()
            .rposition(|entry| mark(entry.ino) & INNER != 0)
        else {
            held -= frame.places.len();
            frames.pop();
            continue;
        };
        frame.left = at;
        let child = &entries[at];
        let places = places_of(below, &frame.places, index.name(child), &mut steps)?;
        let takes_over = index.inode(child.ino).is_some_and(Inode::takes_over);
        let look = places.first().filter(|_| takes_over).and_then(|&(layer, ino)| {
            let layer = below.get(layer as usize)?;
            Some(Look::Of(layer, ino))
        });
        next = Some((child.ino, places, look.and_then(|look| look.hands_on())));
    }
}

/// The directory `name` in the nearest layer that has it, `places` being those of the directory it is in; `None` if no layer has it, or the
/// nearest that has such a name has something else there.
fn nearest<'a>(
    below: &[&'a LayerIndex],
    places: &[(u32, Ino)],
    name: &[u8],
    steps: &mut Steps,
) -> Result<Option<(&'a LayerIndex, Ino)>, LayerError> {
    for &(at, dir) in places {
        let Some(layer) = below.get(at as usize) else { break };
        match step(layer, dir, name, steps)? {
            Place::Missing => {}
            Place::Dir(ino) => return Ok(Some((layer, ino))),
            Place::Other => break,
        }
    }
    Ok(None)
}

/// Where the directory `name` is, `places` being those of the directory it is in.
fn places_of(
    below: &[&LayerIndex],
    places: &[(u32, Ino)],
    name: &[u8],
    steps: &mut Steps,
) -> Result<Vec<(u32, Ino)>, LayerError> {
    let mut own = Vec::new();
    for &(at, dir) in places {
        let Some(layer) = below.get(at as usize) else { break };
        match step(layer, dir, name, steps)? {
            Place::Missing => {}
            Place::Dir(ino) => own.push((at, ino)),
            Place::Other => break,
        }
    }
    own.shrink_to_fit();
    Ok(own)
}

/// For every inode number: whether it is a directory that takes something over, or on the way to one.
fn ways_to_implied(index: &LayerIndex) -> Vec<u8> {
    let mut marks = vec![0; index.inodes().len() + 1];
    for (at, inode) in index.inodes().iter().enumerate() {
        if !inode.takes_over() {
            continue;
        }
        if let Some(mark) = marks.get_mut(at + 1) {
            *mark |= WANTED;
        }
        let mut ino = inode.parent;
        while let Some(mark) = marks.get_mut(ino as usize).filter(|mark| **mark & INNER == 0) {
            *mark = WANTED | INNER;
            ino = index.inode(ino).map_or(0, |inode| inode.parent);
        }
    }
    marks
}

/// Where `name` in the directory `dir` leads, over symlinks that stay inside the layer.
fn step(layer: &LayerIndex, dir: Ino, name: &[u8], steps: &mut Steps) -> Result<Place, LayerError> {
    steps.take()?;
    let found = layer.inode(dir).and_then(|here| layer.lookup(here, name));
    let Some((ino, inode)) = found.and_then(|ino| Some((ino, layer.inode(ino)?))) else {
        return Ok(Place::Missing);
    };
    if inode.is_dir() {
        return Ok(Place::Dir(ino));
    }
    if !inode.is_symlink() {
        return Ok(Place::Other);
    }
    let mut dir = dir;
    let mut links = 0;
    // Components still to go, the next one last.
    let mut todo = vec![Cow::Borrowed(name)];
    while let Some(part) = todo.pop() {
        steps.take()?;
        let Some(here) = layer.inode(dir) else {
            return Ok(Place::Missing);
        };
        match &part[..] {
            b"" => continue,
            b".." => {
                dir = here.parent;
                continue;
            }
            _ => {}
        }
        let Some(ino) = layer.lookup(here, &part) else {
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
                let absolute = target.first() == Some(&b'/');
                if absolute {
                    dir = ROOT_INO;
                }
                // As the unpacker does it: what a `..` takes away need not be there.
                let before = todo.len();
                match lexical(target, !absolute).0 {
                    Cow::Borrowed(target) => todo.extend(target.rsplit(is_slash).map(Cow::Borrowed)),
                    Cow::Owned(target) => todo.extend(target.rsplit(is_slash).map(|part| Cow::Owned(part.to_vec()))),
                }
                // What was cleaned away took its time too.
                for _ in todo.len() - before..target.split(is_slash).count() {
                    steps.take()?;
                }
            }
            _ => return Ok(Place::Other),
        }
    }
    Ok(Place::Dir(dir))
}

fn is_slash(c: &u8) -> bool {
    *c == b'/'
}

/// The parts of the index with these looks, and with what directories hand on that take over a default ACL.
fn dress(index: &LayerIndex, looks: &[(Ino, Look<'_>)]) -> Result<IndexParts, LayerError> {
    let by_ino: HashMap<Ino, Look<'_>> = looks.iter().copied().collect();
    let marks = ways_to_implied(index);
    let mut patch = Patch::of(index.parts().clone());
    // Directories to go into, and a default ACL that such a one has now and had not before.
    let mut dirs: Vec<(Ino, Option<Vec<u8>>)> = vec![(ROOT_INO, None)];
    while let Some((dir, handed_on)) = dirs.pop() {
        let entries = index.inode(dir).map_or(&[][..], |dir| index.entries(dir));
        for entry in entries {
            let ino = entry.ino;
            let Some(inode) = index.inode(ino) else { continue };
            let way = marks.get(ino as usize).is_some_and(|mark| mark & INNER != 0);
            let look = by_ino.get(&ino);
            if handed_on.is_none() && look.is_none() {
                if way {
                    dirs.push((ino, None));
                }
                continue;
            }
            let old = attributes(index, inode);
            let (mut new, mut own) = (*inode, old.clone());
            if let Some(list) = &handed_on
                && !inode.is_symlink()
                && inode.flags & flags::WHITEOUT == 0
            {
                if inode.flags & flags::OWN_ACL == 0 {
                    own.insert(acl::ACCESS, Cow::Owned(list.clone()));
                }
                if inode.is_dir() && inode.flags & flags::OWN_DEFAULT_ACL == 0 {
                    own.insert(acl::DEFAULT, Cow::Owned(list.clone()));
                }
                fit_acl(&mut own, inode.mode);
            }
            match look {
                Some(Look::Of(below, described)) => {
                    if let Some(described) = below.inode(*described) {
                        new = look_of(inode, described);
                        own = taken_over(inode, own, below, described);
                        patch.took_over(inode, described)?;
                    }
                }
                Some(Look::Group(gid)) => new.gid = *gid,
                None => {}
            }
            let default = own.get(acl::DEFAULT);
            let changed = default != old.get(acl::DEFAULT);
            if inode.is_dir() && (way || changed) {
                let handed_on = default.filter(|_| changed).map(|list| list.to_vec());
                dirs.push((ino, handed_on));
            }
            patch.apply(ino, new, (own != old).then_some(own))?;
        }
    }
    Ok(patch.parts)
}

/// An index being changed.
struct Patch {
    parts: IndexParts,
    /// Where texts that were added are.
    added: HashMap<Vec<u8>, u32>,
    /// Directories that were given a look, and the attributes that those took.
    dirs: u64,
    attributes: u64,
}

impl Patch {
    fn of(parts: IndexParts) -> Self {
        Patch {
            parts,
            added: HashMap::new(),
            dirs: 0,
            attributes: 0,
        }
    }

    /// Counts what a directory takes over.
    fn took_over(&mut self, inode: &Inode, described: &Inode) -> Result<(), LayerError> {
        self.dirs += 1;
        self.attributes += u64::from(inode.xattr_count) + u64::from(described.xattr_count);
        limit(
            "number of attributes taken over from the layers below",
            self.attributes,
            INHERITED_BASE + INHERITED_PER_DIR * self.dirs,
        )
    }

    /// Gives the inode `ino` the attributes of `new`, and these extended ones if they changed.
    fn apply(&mut self, ino: Ino, new: Inode, xattrs: Option<Attributes<'_>>) -> Result<(), LayerError> {
        let first = self.parts.xattrs.len();
        for (name, value) in xattrs.iter().flatten() {
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
        (inode.mode, inode.uid, inode.gid) = (new.mode, new.uid, new.gid);
        (inode.mtime, inode.mtime_nsec) = (new.mtime, new.mtime_nsec);
        if xattrs.is_some() {
            // Numbers over the limits are told by the check of the whole index.
            (inode.xattr_first, inode.xattr_count) = (first as u32, count as u32);
        }
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

fn limit(what: &'static str, value: u64, limit: u64) -> Result<(), LayerError> {
    match value > limit {
        true => Err(LayerError::TooLarge { what, value, limit }),
        false => Ok(()),
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
