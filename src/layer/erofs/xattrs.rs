//! Extended attributes as EROFS has them: which it can express, and their bytes.

use super::format::{MAX_XATTRS, XATTR_ENTRY, XATTR_HEAD};
use crate::layer::tree::OPAQUE_XATTR;
use crate::layer::{Inode, LayerIndex};

/// Name spaces, and the numbers that stand for them.
const PREFIXES: [(&[u8], u8); 3] = [(b"user.", 1), (b"trusted.", 4), (b"security.", 6)];
/// POSIX ACLs: full names.
const ACLS: [(&[u8], u8); 2] = [(b"system.posix_acl_access", 2), (b"system.posix_acl_default", 3)];

/// First bytes of an ACL: its version.
const ACL_VERSION: [u8; 4] = 2u32.to_le_bytes();
/// Tags of an ACL's entries.
const OWNER: u16 = 1;
const USER: u16 = 2;
const GROUP_OWNER: u16 = 4;
const GROUP: u16 = 8;
const MASK: u16 = 16;
const OTHER: u16 = 32;

/// An extended attribute that the format can express.
struct Entry<'a> {
    prefix: u8,
    name: &'a [u8],
    value: &'a [u8],
}

impl Entry<'_> {
    fn len(&self) -> u64 {
        (XATTR_ENTRY + self.name.len() as u64 + self.value.len() as u64).next_multiple_of(XATTR_ENTRY)
    }
}

/// Size of an inode's xattrs in bytes, 0 without any, and how many are left out.
pub(super) fn measure(index: &LayerIndex, inode: &Inode) -> (u64, u64) {
    if inode.xattr_count == 0 {
        return (0, 0);
    }
    let (mut size, mut kept) = (0, 0);
    for entry in entries(index, inode) {
        size += entry.len();
        kept += 1;
    }
    let size = if size == 0 { 0 } else { XATTR_HEAD + size };
    (size, u64::from(inode.xattr_count) - kept)
}

/// Writes an inode's xattrs to `to`, which is zero and has their size; gives the count that its inode states.
pub(super) fn put(index: &LayerIndex, inode: &Inode, to: &mut [u8]) -> u16 {
    if to.is_empty() {
        return 0;
    }
    let mut at = XATTR_HEAD as usize;
    for entry in entries(index, inode) {
        let value = at + XATTR_ENTRY as usize + entry.name.len();
        to[at] = entry.name.len() as u8;
        to[at + 1] = entry.prefix;
        to[at + 2..at + 4].copy_from_slice(&(entry.value.len() as u16).to_le_bytes());
        to[at + 4..value].copy_from_slice(entry.name);
        to[value..value + entry.value.len()].copy_from_slice(entry.value);
        at += entry.len() as usize;
    }
    ((at as u64 - XATTR_HEAD) / XATTR_ENTRY + 1) as u16
}

/// The xattrs of an inode that the image has, the mark of an opaque directory first: as many of the expressible ones, in their order, as
/// there is room for.
fn entries<'a>(index: &'a LayerIndex, inode: &'a Inode) -> impl Iterator<Item = Entry<'a>> {
    let is_opaque = |(name, _): &(&[u8], &[u8])| *name == OPAQUE_XATTR.0;
    let first = index.xattrs(inode).filter(is_opaque);
    let others = index.xattrs(inode).filter(move |xattr| !is_opaque(xattr));
    let mut room = MAX_XATTRS - XATTR_HEAD;
    first.chain(others).filter_map(move |(name, value)| {
        let entry = express(name, value)?;
        room = room.checked_sub(entry.len())?;
        Some(entry)
    })
}

fn express<'a>(name: &'a [u8], value: &'a [u8]) -> Option<Entry<'a>> {
    if value.len() > usize::from(u16::MAX) {
        return None;
    }
    if let Some((_, prefix)) = ACLS.iter().find(|(full, _)| *full == name) {
        let prefix = *prefix;
        return is_acl(value).then_some(Entry {
            prefix,
            name: b"",
            value,
        });
    }
    PREFIXES.iter().find_map(|(text, prefix)| {
        let name = name.strip_prefix(*text)?;
        let prefix = *prefix;
        // A name without anything behind the dot can be listed, but never asked for.
        (!name.is_empty() && name.len() <= usize::from(u8::MAX)).then_some(Entry { prefix, name, value })
    })
}

/// Whether `value` is an ACL that the kernel takes: a version, and entries of 8 bytes (tag, permissions, id) in their order, with a mask
/// if it names anybody.
fn is_acl(value: &[u8]) -> bool {
    let Some(entries) = value.strip_prefix(&ACL_VERSION) else {
        return false;
    };
    if entries.len() % 8 != 0 {
        return false;
    }
    let (mut last, mut needs_mask, mut has_mask) = (0, false, false);
    for entry in entries.chunks_exact(8) {
        let tag = u16::from_le_bytes([entry[0], entry[1]]);
        let permissions = u16::from_le_bytes([entry[2], entry[3]]);
        let id = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
        let in_order = match tag {
            OWNER => last == 0,
            USER => matches!(last, OWNER | USER),
            GROUP_OWNER => matches!(last, OWNER | USER),
            GROUP => matches!(last, GROUP_OWNER | GROUP),
            MASK => matches!(last, GROUP_OWNER | GROUP),
            OTHER => matches!(last, GROUP_OWNER | GROUP | MASK),
            _ => false,
        };
        let named = matches!(tag, USER | GROUP);
        if !in_order || permissions > 7 || (named && id == u32::MAX) {
            return false;
        }
        needs_mask |= named;
        has_mask |= tag == MASK;
        last = tag;
    }
    last == OTHER && (has_mask || !needs_mask)
}
