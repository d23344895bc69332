//! What a tree may take for what the archive really held: few bytes must not become many names.
//!
//! An entry gives what it says, and little more. Three things multiply: a path implies a directory for every two of its bytes, and symlinks
//! on the way let the next entry imply as many again; an attribute that is added to an inode moves all that it has; and a path that leads
//! through symlinks is walked again and again. Each of them may happen so often for each entry that was read, beyond what any layer may do.
//!
//! Besides, what the tree takes is counted in bytes ([`TreeBuilder::memory`]), generously, with a limit that its owner sets: a share of the
//! daemon's memory, or what a table of contents justifies.

use super::{Fault, TreeBuilder};
use crate::layer::LayerError;

/// Directories without an entry that any layer may have: the longest path twice, of which every second byte is a directory.
const IMPLIED_BASE: u64 = 4096;
/// And so many more for each entry. Layers that list no directory (bazel, ko, nix) need as many as they have directories, of which most
/// have several files.
const IMPLIED_PER_ENTRY: u64 = 8;
/// Bytes of path that any layer may walk through symlinks.
const LINK_WALK_BASE: u64 = 8 << 20;
/// And so many more for each entry: a few links on the way of each, as `lib -> usr/lib` is one.
const LINK_WALK_PER_ENTRY: u64 = 1024;
/// Records of extended attributes that any layer may have, those included that were left behind by others that moved.
const XATTRS_BASE: u64 = 4096;
/// And so many for each attribute that an entry gives.
const XATTRS_PER_GIVEN: u64 = 4;

/// Bytes of memory that the names and attributes of any layer may take, as they are counted here ...
const MEMORY_BASE: u64 = 2 << 20;
/// ... and so many more for each byte of its blob. A header that says anything takes 30 bytes of a blob, of which 400 become here; the least that a
/// compressor makes of one, in a layer of nothing but empty files with numbers as names, is 2.7.
const MEMORY_PER_BLOB_BYTE: u64 = 192;

/// Bytes of memory that the names and attributes of a layer may take whose blob has so many bytes: what was compressed so well that it would
/// take more was made for it.
pub fn memory_for_blob(size: u64) -> u64 {
    MEMORY_PER_BLOB_BYTE.saturating_mul(size).saturating_add(MEMORY_BASE)
}

/// Bytes that an inode takes at most at a time: while its list grows, and once more when the tree is finished.
pub(super) const NODE_COST: u64 = 256;
/// A name, without its text.
pub(super) const NAME_COST: u64 = 96;
/// A record of an extended attribute.
pub(super) const XATTR_COST: u64 = 48;
/// The place of a text that is there once.
pub(super) const INTERNED_COST: u64 = 24;
/// A byte of text.
pub(super) const TEXT_COST: u64 = 2;

/// What was read, and what came of it.
pub(super) struct Allowance {
    entries: u64,
    implied: u64,
    link_walk: u64,
    given_xattrs: u64,
    memory: u64,
    limit: u64,
}

impl Allowance {
    /// With a limit of memory in bytes.
    pub(super) fn new(limit: u64) -> Self {
        Allowance {
            entries: 0,
            implied: 0,
            link_walk: 0,
            given_xattrs: 0,
            memory: 0,
            limit,
        }
    }

    /// Another entry was read.
    pub(super) fn entry(&mut self) {
        self.entries += 1;
    }

    /// An entry gives an extended attribute.
    pub(super) fn xattr(&mut self) {
        self.given_xattrs += 1;
    }

    /// Memory is taken.
    pub(super) fn take(&mut self, bytes: u64) -> Result<(), Fault> {
        self.memory += bytes;
        within("memory of names and attributes in bytes", self.memory, self.limit)
    }

    /// A directory is made that no entry describes.
    pub(super) fn imply(&mut self) -> Result<(), Fault> {
        self.implied += 1;
        within(
            "number of directories without an entry, for the entries so far,",
            self.implied,
            IMPLIED_BASE + IMPLIED_PER_ENTRY * self.entries,
        )
    }

    /// So many bytes of path are walked through a symlink.
    pub(super) fn walk(&mut self, bytes: usize) -> Result<(), Fault> {
        self.link_walk += bytes as u64;
        within(
            "length of all paths through symlinks, for the entries so far,",
            self.link_walk,
            LINK_WALK_BASE + LINK_WALK_PER_ENTRY * self.entries,
        )
    }

    /// There will be so many records of extended attributes.
    pub(super) fn xattrs(&mut self, records: usize) -> Result<(), Fault> {
        within(
            "number of extended attributes, for those given so far,",
            records as u64,
            XATTRS_BASE + XATTRS_PER_GIVEN * self.given_xattrs,
        )
    }
}

impl TreeBuilder {
    /// Bytes that the tree takes, or will take when it is finished: rather too many than too few.
    pub fn memory(&self) -> u64 {
        self.allowance.memory
    }
}

fn within(what: &'static str, value: u64, limit: u64) -> Result<(), Fault> {
    match value > limit {
        true => Err(Fault::Limit(LayerError::TooLarge { what, value, limit })),
        false => Ok(()),
    }
}
