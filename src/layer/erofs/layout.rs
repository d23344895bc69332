//! Where everything goes in an image.
//!
//! The tree is walked in depth; for each directory come its own blocks, then the inodes of its entries that have no place yet. Blocks
//! lie at multiples of 512 bytes, inodes at multiples of 32. An unfinished block of inodes is filled on when the blocks of a directory
//! come between, so little is lost. What cannot be written is known here: sizes are checked before anything is allocated for the image.

use super::format::{BLOCK, CHUNK, DIRENT, INODE, MAX_IMAGE, SLOT};
use super::{Addressing, FORMAT, limit, xattrs};
use crate::layer::index::MAX_INODES;
use crate::layer::{Dirent, Ino, Inode, LayerError, LayerIndex, ROOT_INO};

/// Most references to names, and to xattrs, that all inodes of an index together may make. Those of a tree are its own: more than an
/// index can hold are inodes that share.
const MAX_REFERENCES: u64 = 2 * MAX_INODES as u64;

/// Bytes of xattrs in the image of any index ...
const XATTRS_BASE: u64 = 16 << 20;
/// ... and so many more for each inode, besides the texts that the index holds. An index holds a value once, and the image in each inode that
/// has it: without a limit a few large values would fill the memory.
const XATTRS_PER_INODE: u64 = 256;

/// Where an inode is. The default is nowhere.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Place {
    /// Its number: its address in slots of 32 bytes. 0: none.
    pub(super) nid: u32,
    /// First of its blocks of data in the image. 0: none.
    pub(super) block: u32,
    /// Bytes of its xattrs.
    pub(super) xattrs: u32,
    /// Whether the rest of its data that fills no block lies behind it; otherwise that has a block as well.
    pub(super) inline: bool,
    /// Whether the address of its one chunk lies behind it.
    pub(super) chunked: bool,
}

impl Place {
    /// How far behind its beginning the address of its chunk is, in bytes.
    pub(super) fn chunk(&self) -> u64 {
        chunk_at(u64::from(self.xattrs))
    }
}

/// How far behind the beginning of an inode with so many bytes of xattrs the address of its chunk is, in bytes.
fn chunk_at(xattrs: u64) -> u64 {
    (INODE + xattrs).next_multiple_of(CHUNK)
}

/// A finished plan.
pub(super) struct Plan {
    /// Place of inode `n` at position `n - 1`.
    places: Vec<Place>,
    /// The inodes that have a place, in the order of their places.
    pub(super) order: Vec<Ino>,
    /// Bytes of the image: whole blocks.
    pub(super) size: u64,
    /// Xattrs that are left out.
    pub(super) dropped_xattrs: u64,
}

impl Plan {
    pub(super) fn place(&self, ino: Ino) -> Place {
        let at = (ino as usize).checked_sub(1);
        at.and_then(|at| self.places.get(at)).copied().unwrap_or_default()
    }
}

/// Plans the image of `index`, whose first `used` bytes are taken.
pub(super) fn plan(index: &LayerIndex, addressing: Addressing, used: u64) -> Result<Plan, LayerError> {
    let mut names = 0u64;
    let mut attributes = 0u64;
    for inode in index.inodes() {
        names += u64::from(inode.count) * u64::from(inode.is_dir());
        attributes += u64::from(inode.xattr_count);
    }
    limit("number of names in all directories", names, MAX_REFERENCES)?;
    limit(
        "number of extended attributes of all inodes",
        attributes,
        MAX_REFERENCES,
    )?;

    let mut walk = Walk {
        index,
        xattrs: 0,
        addressing,
        space: Space::new(used),
        plan: Plan {
            places: vec![Place::default(); index.inodes().len()],
            order: Vec::with_capacity(index.inodes().len()),
            size: 0,
            dropped_xattrs: 0,
        },
    };
    walk.place(ROOT_INO)?;
    let mut dirs = vec![ROOT_INO];
    while let Some(dir) = dirs.pop() {
        walk.blocks(dir)?;
        let Some(inode) = index.inode(dir) else { continue };
        let first = dirs.len();
        for entry in index.entries(inode) {
            if walk.plan.place(entry.ino).nid == 0 && walk.place(entry.ino)? {
                dirs.push(entry.ino);
            }
        }
        dirs[first..].reverse();
    }
    walk.plan.size = walk.space.end;
    Ok(walk.plan)
}

struct Walk<'a> {
    index: &'a LayerIndex,
    /// Bytes of xattrs so far.
    xattrs: u64,
    addressing: Addressing,
    space: Space,
    plan: Plan,
}

impl Walk<'_> {
    /// Gives an inode its place; tells whether it is a directory. A directory gets its blocks later.
    fn place(&mut self, ino: Ino) -> Result<bool, LayerError> {
        let at = u64::from(ino) - 1;
        let Some(inode) = self.index.inode(ino) else {
            return Err(LayerError::malformed(FORMAT, at, "a name of no inode"));
        };
        if inode.nlink == 0 {
            return Err(LayerError::malformed(FORMAT, at, "an inode has a name and no link"));
        }
        let (xattrs, dropped) = xattrs::measure(self.index, inode);
        self.plan.dropped_xattrs += dropped;
        self.xattrs += xattrs;
        let parts = self.index.parts();
        limit(
            "length of the extended attributes of all inodes",
            self.xattrs,
            XATTRS_BASE + XATTRS_PER_INODE * parts.inodes.len() as u64 + parts.strings.len() as u64,
        )?;
        let tail = data_len(self.index, inode) % BLOCK;
        let chunked = self.addressing.is_chunked(inode);
        let len = if chunked {
            chunk_at(xattrs) + CHUNK
        } else {
            INODE + xattrs
        };
        let found = self.space.inode(len, tail)?;
        let mut place = Place {
            nid: (found.at / SLOT) as u32,
            block: 0,
            xattrs: xattrs as u32,
            inline: found.inline,
            chunked,
        };
        if !inode.is_dir() {
            place.block = self.data_blocks(inode, place.inline)?;
        }
        self.plan.places[at as usize] = place;
        self.plan.order.push(ino);
        Ok(inode.is_dir())
    }

    /// Gives a directory the blocks of its entries.
    fn blocks(&mut self, dir: Ino) -> Result<(), LayerError> {
        let Some(inode) = self.index.inode(dir) else {
            return Ok(());
        };
        let block = self.data_blocks(inode, self.plan.place(dir).inline)?;
        self.plan.places[dir as usize - 1].block = block;
        Ok(())
    }

    /// The first of the blocks that an inode's data takes in the image, 0 if it takes none.
    fn data_blocks(&mut self, inode: &Inode, inline: bool) -> Result<u32, LayerError> {
        let len = data_len(self.index, inode);
        let blocks = if inline { len / BLOCK } else { len.div_ceil(BLOCK) };
        if blocks == 0 {
            return Ok(0);
        }
        Ok((self.space.blocks(blocks)? / BLOCK) as u32)
    }
}

/// Bytes of data that an inode has in the image: entries or a target.
pub(super) fn data_len(index: &LayerIndex, inode: &Inode) -> u64 {
    if inode.is_symlink() {
        return inode.size;
    }
    if !inode.is_dir() {
        return 0;
    }
    let (mut full, mut used) = (0, 0);
    for (name, _) in names(index, inode) {
        let len = entry_len(name);
        if used + len > BLOCK {
            full += 1;
            used = 0;
        }
        used += len;
    }
    full * BLOCK + used
}

/// Bytes that an entry takes in a directory's block. The largest is a fraction of a block.
pub(super) fn entry_len(name: &[u8]) -> u64 {
    DIRENT + name.len() as u64
}

/// What a directory's entry names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// The directory itself.
    Own,
    /// The directory that holds it.
    Parent,
    /// An inode of the index.
    Inode(Ino),
}

/// All entries of a directory in byte order of their names, `.` and `..` among them.
pub(super) fn names<'a>(index: &'a LayerIndex, dir: &'a Inode) -> impl Iterator<Item = (&'a [u8], Target)> {
    let mut entries = index
        .entries(dir)
        .iter()
        .map(|entry: &Dirent| (index.name(entry), Target::Inode(entry.ino)))
        .peekable();
    let mut dots = [(&b"."[..], Target::Own), (&b".."[..], Target::Parent)]
        .into_iter()
        .peekable();
    std::iter::from_fn(move || match (dots.peek(), entries.peek()) {
        (Some(dot), Some(entry)) if entry.0 < dot.0 => entries.next(),
        (Some(_), _) => dots.next(),
        (None, _) => entries.next(),
    })
}

/// A place for an inode.
struct Found {
    at: u64,
    inline: bool,
}

/// What is taken of the image.
struct Space {
    /// Where the next inode could begin, and the end of the block or blocks it is in.
    next: u64,
    open: u64,
    /// End of what is taken: whole blocks.
    end: u64,
}

impl Space {
    fn new(used: u64) -> Self {
        let end = used.next_multiple_of(BLOCK);
        Space {
            next: used,
            open: end,
            end,
        }
    }

    /// Takes whole blocks.
    fn blocks(&mut self, count: u64) -> Result<u64, LayerError> {
        let at = self.end;
        self.grow(at + count * BLOCK)?;
        Ok(at)
    }

    /// Takes `len` bytes for an inode, and `tail` behind them in one block if that does not lose more than a block of its own would.
    fn inode(&mut self, len: u64, tail: u64) -> Result<Found, LayerError> {
        let from = self.next.next_multiple_of(SLOT);
        let inline = tail > 0;
        if inline && let Some(at) = self.fit(len, tail) {
            let lost = if at < self.end {
                at - from
            } else {
                self.open - from + at - self.end
            };
            if lost <= BLOCK - tail {
                return self.take(at, len + tail, true);
            }
        }
        let at = self.fit(len, 0).unwrap_or(self.end);
        self.take(at, len, false)
    }

    fn take(&mut self, at: u64, len: u64, inline: bool) -> Result<Found, LayerError> {
        self.next = at + len;
        if self.next > self.open {
            // Either on from the open block into the next one, or at the end.
            self.grow(self.next)?;
            self.open = self.end;
        }
        Ok(Found { at, inline })
    }

    /// The first place for `len` bytes and a tail that crosses no block.
    fn fit(&self, len: u64, tail: u64) -> Option<u64> {
        [self.next, self.end].into_iter().find_map(|from| {
            let mut at = from.next_multiple_of(SLOT);
            let rest = (at + len) % BLOCK;
            if tail > 0 && rest + tail > BLOCK {
                at += (BLOCK - rest).next_multiple_of(SLOT);
            }
            let clear = tail == 0 || (at + len) % BLOCK + tail <= BLOCK;
            let free = at + len + tail <= self.open || self.open == self.end || at >= self.end;
            (clear && free).then_some(at)
        })
    }

    fn grow(&mut self, to: u64) -> Result<(), LayerError> {
        limit("size of the metadata image in bytes", to, MAX_IMAGE)?;
        self.end = to.next_multiple_of(BLOCK);
        Ok(())
    }
}
