//! A run of layers as one tree: what overlayfs shows of them.
//!
//! The lowest run of a chain is a tree that stands by itself. One that lies on others keeps what it does to those below: its whiteouts, and the
//! mark of a directory under which nothing of them is seen; both only where there is something to hide. Overlayfs shows runs on each other as
//! it shows their layers on each other.
//!
//! The rules are the kernel's:
//!
//! - Of a name that several layers have, the topmost decides. A whiteout (a character device 0:0) means that there is nothing; anything
//!   else that is no directory hides whatever is below it.
//! - A directory is merged with those of the layers below, down to the first layer that has something else there (a whiteout, a file), or
//!   up to and including the first directory that is marked opaque. (In an upper run, a directory that ends so is marked opaque; one that
//!   does not may go on below.) Its attributes and extended attributes are those of the topmost.
//!   The root is merged of all layers: overlayfs does not ask whether a root is opaque.
//! - Names of one file of one layer stay names of one file, and its link count is the one of its layer, though names may be hidden.
//!   For a merged directory overlayfs says 1 ("not counted"); here it is 2 plus the subdirectories that are seen, since there is one
//!   directory now.
//! - `trusted.overlay.*` are overlayfs' own marks, and nobody sees them. No parser lets one through but the opaque mark, which has done
//!   its work here. Others (`redirect`, `metacopy`, ...) would make overlayfs do what is not done here: a chain in which one would count
//!   is refused. Escaped ones (`trusted.overlay.overlay.*`) are kept as they are: overlayfs takes the escape away from the merged tree
//!   as it does from a layer. `user.overlay.*` are ordinary attributes for an overlay mounted without `userxattr`, and kept.
//! - One thing is different on purpose: overlayfs *lists* a whiteout in a directory that only one layer has, and then finds nothing of
//!   that name. Here it is not listed.
//!
//! Nothing is recursive, and memory is linear: a directory that waits to be merged is remembered with the directories it is made of. What
//! is hidden is not copied. What is merged has no more of anything than all layers together, and as much again is needed while it is made.
//! Layers come as they look on their parents ([`super::variant`]).

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

use std::hash::{BuildHasher, RandomState};

use hashbrown::HashTable;

use super::index::{Access, Codec, Dirent, MAX_DATA_SIZE, MAX_INODES, MAX_STRINGS, Verify, Xattr};
use super::tree::{OPAQUE_XATTR, quoted};
use super::{IndexParts, Ino, Inode, LayerError, LayerIndex, ROOT_INO};

/// Most layers of a chain: overlayfs takes no more lower directories (OVL_MAX_STACK).
pub const MAX_LAYERS: usize = 500;
/// What the data space of each layer is rounded up to in that of the chain, in bytes: the alignment of files in a layer, and the block
/// of its image.
const ALIGNMENT: u64 = 512;
/// Most directory entries and most extended attributes of an index.
const MAX_RECORDS: usize = 2 * MAX_INODES;
/// Marks of overlayfs.
const MARK_PREFIX: &[u8] = b"trusted.overlay.";
/// Marks that overlayfs shows, with one `overlay.` less.
const ESCAPED_PREFIX: &[u8] = b"trusted.overlay.overlay.";
/// No inode: in a map of numbers, one that has none yet.
const NO_INO: Ino = 0;

/// A merged run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merged {
    /// Its tree; of the lowest run without whiteouts and opaque marks. Its data space is that of all layers one after the other, the lowest first, each
    /// rounded up to 512 bytes. It has no chunks: the layers have them.
    pub index: LayerIndex,
    /// Bytes of the data space of each layer, the lowest first, not rounded.
    pub devices: Vec<u64>,
}

/// The tree that overlayfs shows of `layers`, the lowest first; `below` is the tree of all that lies below them, if anything does. The same layers always give the same index.
///
/// # Errors
/// [`LayerError::TooLarge`] when the chain exceeds what one index may have, or has more than [`MAX_LAYERS`] layers;
/// [`LayerError::Unsupported`] for a chain of no layers, and where a mark of overlayfs would count that no parser lets through. Such a
/// chain can only be stacked.
pub fn merge(layers: &[&LayerIndex], below: Option<&LayerIndex>) -> Result<Merged, LayerError> {
    limit("number of layers", layers.len() as u64, MAX_LAYERS as u64)?;
    if layers.is_empty() {
        return Err(LayerError::Unsupported {
            what: "a chain of no layers".to_owned(),
        });
    }
    let mut starts = Vec::with_capacity(layers.len());
    let mut end = 0_u64;
    for layer in layers {
        starts.push(end);
        // Both are far from the end of 64 bits: every index was checked.
        end += layer.data_size().next_multiple_of(ALIGNMENT);
        limit("uncompressed size of all layers", end, MAX_DATA_SIZE)?;
    }
    let mut merger = Merger::new(layers, starts, below);
    merger.run()?;
    let index = LayerIndex::new(IndexParts {
        access: Access::Stream,
        codec: Codec::None,
        data_size: end,
        blob_size: 0,
        inodes: merger.inodes,
        dirents: merger.dirents,
        xattrs: merger.xattrs,
        chunks: Vec::new(),
        checkpoints: Vec::new(),
        verify: Verify::Content,
        strings: merger.strings.bytes,
    })?;
    Ok(Merged {
        index,
        devices: layers.iter().map(|layer| layer.data_size()).collect(),
    })
}

/// A directory of a layer: the layer's position in the chain, and the number of the inode.
type Source = (usize, Ino);

/// A directory that waits for its entries.
struct Pending {
    /// Its number in the merged tree.
    ino: Ino,
    /// Where the directories that it is made of begin in [`Merger::sources`]. They go on to the beginning of those of the one that waited
    /// before it, which is to say to the end when it is taken.
    first: usize,
    /// The directory below the run that is seen through it, if there is one.
    below: Option<Ino>,
}

/// A name in one of the directories that are merged.
struct Named<'a> {
    name: &'a [u8],
    layer: usize,
    ino: Ino,
}

/// What a name stands for in a layer.
enum Meaning {
    Whiteout,
    Dir { opaque: bool },
    Other,
}

/// The state of a merge.
struct Merger<'a> {
    layers: &'a [&'a LayerIndex],
    /// What lies below the run.
    below: Option<&'a LayerIndex>,
    /// Where the data space of each layer begins.
    starts: Vec<u64>,
    /// For each layer the merged numbers of its inodes that are no directories; empty for a layer that none was taken from.
    numbers: Vec<Vec<Ino>>,
    /// Directories to go, the next one last, and what they are made of, the topmost first.
    pending: Vec<Pending>,
    sources: Vec<Source>,
    inodes: Vec<Inode>,
    dirents: Vec<Dirent>,
    xattrs: Vec<Xattr>,
    strings: Strings,
}

impl<'a> Merger<'a> {
    fn new(layers: &'a [&'a LayerIndex], starts: Vec<u64>, below: Option<&'a LayerIndex>) -> Self {
        let strings: usize = layers.iter().map(|layer| layer.parts().strings.len()).sum();
        let mark = OPAQUE_XATTR.0.len() + OPAQUE_XATTR.1.len();
        Merger {
            layers,
            starts,
            numbers: vec![Vec::new(); layers.len()],
            pending: Vec::new(),
            sources: Vec::new(),
            inodes: Vec::new(),
            dirents: Vec::new(),
            xattrs: Vec::new(),
            below,
            strings: Strings::new(strings + mark),
        }
    }

    /// Merges everything, parents before their children and subtrees in the order of their names, which is the order in which most
    /// readers walk. The inodes of one directory have neighbouring numbers.
    fn run(&mut self) -> Result<(), LayerError> {
        self.sources = (0..self.layers.len()).rev().map(|layer| (layer, ROOT_INO)).collect();
        // An index has a root that is a directory. Its mark does not count, but others would.
        for (layer, root) in self.sources.clone() {
            self.meaning(layer, root)?;
        }
        self.add_dir(self.layers.len() - 1, ROOT_INO, ROOT_INO, false)?;
        self.pending.push(Pending {
            ino: ROOT_INO,
            first: 0,
            below: self.below.map(|_| ROOT_INO),
        });
        let mut here = Vec::new();
        let mut names = Vec::new();
        let mut below = Vec::new();
        let mut children = Vec::new();
        while let Some(Pending {
            ino,
            first,
            below: through,
        }) = self.pending.pop()
        {
            here.clear();
            here.extend(self.sources.drain(first..));
            self.collect(&here, &mut names);
            self.merge_names((ino, through), &names, &mut children, &mut below)?;
            // The first child is the next to go.
            let mut end = below.len();
            for child in children.drain(..).rev() {
                let first = child.first;
                self.pending.push(Pending {
                    first: self.sources.len(),
                    ..child
                });
                self.sources.extend_from_slice(&below[first..end]);
                end = first;
            }
            below.clear();
        }
        Ok(())
    }

    /// All names in the directories `sources`, in their order; of those that are equal, the one of the earlier directory comes first.
    fn collect(&self, sources: &[Source], names: &mut Vec<Named<'a>>) {
        names.clear();
        for &(layer, ino) in sources {
            let index = self.layers[layer];
            let Some(dir) = index.inode(ino) else { continue };
            names.extend(index.entries(dir).iter().map(|entry| Named {
                name: index.name(entry),
                layer,
                ino: entry.ino,
            }));
        }
        if sources.len() > 1 {
            // Stable, and fast on what is made of sorted runs.
            names.sort_by(|a, b| a.name.cmp(b.name));
        }
    }

    /// Gives the directory `dir`, through which one below the run may be seen, the entries that `names` come to. Its subdirectories are added to
    /// `children`, and what those are made of to `below`.
    fn merge_names(
        &mut self,
        (dir, through): (Ino, Option<Ino>),
        names: &[Named<'a>],
        children: &mut Vec<Pending>,
        below: &mut Vec<Source>,
    ) -> Result<(), LayerError> {
        let first = self.dirents.len();
        for same in names.chunk_by(|a, b| a.name == b.name) {
            let top = &same[0];
            let hidden = through.and_then(|dir| self.entry_below(dir, top.name));
            let ino = match self.meaning(top.layer, top.ino)? {
                // It has done its work where nothing is below; overlayfs would list it.
                Meaning::Whiteout if hidden.is_none() => continue,
                Meaning::Whiteout | Meaning::Other => self.add_other(top.layer, top.ino)?,
                Meaning::Dir { opaque } => {
                    let first = below.len();
                    below.push((top.layer, top.ino));
                    let mut ends = opaque;
                    for lower in &same[1..] {
                        if ends {
                            break;
                        }
                        ends = match self.meaning(lower.layer, lower.ino)? {
                            Meaning::Dir { opaque } => {
                                below.push((lower.layer, lower.ino));
                                opaque
                            }
                            Meaning::Whiteout | Meaning::Other => true,
                        };
                    }
                    let ino = self.add_dir(top.layer, top.ino, dir, ends && hidden.is_some())?;
                    let is_dir = |ino: &Ino| {
                        self.below
                            .and_then(|below| below.inode(*ino))
                            .is_some_and(Inode::is_dir)
                    };
                    children.push(Pending {
                        ino,
                        first,
                        below: hidden.filter(|ino| !ends && is_dir(ino)),
                    });
                    ino
                }
            };
            limit(
                "number of directory entries",
                self.dirents.len() as u64 + 1,
                MAX_RECORDS as u64,
            )?;
            let name = self.strings.add(top.name)?;
            self.dirents.push(Dirent {
                name,
                name_len: top.name.len() as u32,
                ino,
            });
        }
        let count = (self.dirents.len() - first) as u32;
        let merged = &mut self.inodes[dir as usize - 1];
        (merged.nlink, merged.data, merged.count) = (2 + children.len() as u32, first as u64, count);
        Ok(())
    }

    /// What a directory below the run has of that name.
    fn entry_below(&self, dir: Ino, name: &[u8]) -> Option<Ino> {
        let below = self.below?;
        below.lookup(below.inode(dir)?, name)
    }

    /// What an inode of a layer is to overlayfs.
    fn meaning(&self, layer: usize, ino: Ino) -> Result<Meaning, LayerError> {
        let inode = self.source(layer, ino);
        if inode.is_whiteout() {
            return Ok(Meaning::Whiteout);
        }
        let mut opaque = false;
        // Nearly nothing has any.
        if inode.xattr_count > 0 {
            for (name, value) in self.layers[layer].xattrs(&inode) {
                if !is_mark(name) {
                    continue;
                }
                if name != OPAQUE_XATTR.0 || (inode.is_dir() && value != OPAQUE_XATTR.1) {
                    return Err(LayerError::Unsupported {
                        what: format!("a layer with the mark {}={} of overlayfs", quoted(name), quoted(value)),
                    });
                }
                opaque = true;
            }
        }
        Ok(match inode.is_dir() {
            true => Meaning::Dir { opaque },
            false => Meaning::Other,
        })
    }

    /// Adds a directory of the merged directory `parent` that looks like `ino` of a layer, and may be marked opaque.
    fn add_dir(&mut self, layer: usize, ino: Ino, parent: Ino, opaque: bool) -> Result<Ino, LayerError> {
        let inode = Inode {
            parent,
            data: 0,
            count: 0,
            ..self.source(layer, ino)
        };
        self.add(layer, inode, opaque)
    }

    /// The merged number of something that is no directory, which is added if this is the first of its names.
    fn add_other(&mut self, layer: usize, ino: Ino) -> Result<Ino, LayerError> {
        let at = ino as usize - 1;
        if self.numbers[layer].is_empty() {
            self.numbers[layer] = vec![NO_INO; self.layers[layer].inodes().len()];
        }
        let known = self.numbers[layer][at];
        if known != NO_INO {
            return Ok(known);
        }
        let mut inode = self.source(layer, ino);
        if inode.is_reg() {
            inode.data += self.starts[layer];
        } else if inode.is_symlink() {
            inode.data = self.strings.add(self.layers[layer].target(&inode))?.into();
        }
        let number = self.add(layer, inode, false)?;
        self.numbers[layer][at] = number;
        Ok(number)
    }

    /// Adds an inode, with the extended attributes that it has in its layer, and the mark of an opaque directory if it is one.
    fn add(&mut self, layer: usize, inode: Inode, opaque: bool) -> Result<Ino, LayerError> {
        limit("number of inodes", self.inodes.len() as u64 + 1, MAX_INODES as u64)?;
        let first = self.xattrs.len();
        let index = self.layers[layer];
        let own = index.xattrs(&inode).filter(|(name, _)| !is_mark(name));
        for (name, value) in opaque.then_some(OPAQUE_XATTR).into_iter().chain(own) {
            limit(
                "number of extended attributes",
                self.xattrs.len() as u64 + 1,
                MAX_RECORDS as u64,
            )?;
            self.xattrs.push(Xattr {
                name: self.strings.intern(name)?,
                name_len: name.len() as u32,
                value: self.strings.intern(value)?,
                value_len: value.len() as u32,
            });
        }
        self.inodes.push(Inode {
            xattr_first: first as u32,
            xattr_count: (self.xattrs.len() - first) as u32,
            // Where it came from matters no more.
            flags: 0,
            ..inode
        });
        Ok(self.inodes.len() as Ino)
    }

    /// An inode of a layer. Every number in a checked index is of one.
    fn source(&self, layer: usize, ino: Ino) -> Inode {
        self.layers[layer].inode(ino).copied().unwrap_or_default()
    }
}

/// The texts of the merged index.
struct Strings {
    bytes: Vec<u8>,
    /// Most bytes that there may be: no more than what the layers have, of which each text comes from one.
    limit: usize,
    /// Names and values of extended attributes, of which many are the same: where they are.
    interned: HashTable<(u32, u32)>,
    hasher: RandomState,
}

impl Strings {
    fn new(limit: usize) -> Self {
        Strings {
            bytes: Vec::new(),
            limit: limit.min(MAX_STRINGS),
            interned: HashTable::new(),
            hasher: RandomState::new(),
        }
    }

    /// Adds a text; tells where it is.
    fn add(&mut self, text: &[u8]) -> Result<u32, LayerError> {
        limit(
            "length of names and attributes",
            (self.bytes.len() + text.len()) as u64,
            self.limit as u64,
        )?;
        let at = self.bytes.len() as u32;
        self.bytes.extend_from_slice(text);
        Ok(at)
    }

    /// Adds a text, unless one was added by this that is the same.
    fn intern(&mut self, text: &[u8]) -> Result<u32, LayerError> {
        let hash = self.hasher.hash_one(text);
        let bytes = &self.bytes;
        if let Some(&(at, _)) = self.interned.find(hash, |&place| text_at(bytes, place) == text) {
            return Ok(at);
        }
        let place = (self.add(text)?, text.len() as u32);
        let (bytes, hasher) = (&self.bytes, &self.hasher);
        self.interned
            .insert_unique(hash, place, |&place| hasher.hash_one(text_at(bytes, place)));
        Ok(place.0)
    }
}

fn text_at(bytes: &[u8], (at, len): (u32, u32)) -> &[u8] {
    &bytes[at as usize..at as usize + len as usize]
}

/// Whether an extended attribute is a mark of overlayfs, which it does not show.
fn is_mark(name: &[u8]) -> bool {
    name.starts_with(MARK_PREFIX) && !name.starts_with(ESCAPED_PREFIX)
}

fn limit(what: &'static str, value: u64, limit: u64) -> Result<(), LayerError> {
    match value > limit {
        true => Err(LayerError::TooLarge { what, value, limit }),
        false => Ok(()),
    }
}
