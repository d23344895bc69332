//! Listing a directory.
//!
//! The cookie of an entry is its position plus one: what a listing that goes on behind it has to skip. `.` and `..` come first, then
//! the index's entries in their order, so a cookie means the same for ever, without a handle.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::time::Duration;

use fuser::{Errno, FileAttr, Generation, INodeNo, ReplyDirectory, ReplyDirectoryPlus};

use super::attr;
use super::face::{FOREVER, NEVER};
use super::tree::{Attached, FUSE_ROOT, Place, Tree};
use crate::layer::ROOT_INO;

/// Entries before those of the index: `.` and `..`.
const DOTS: u64 = 2;

/// One line of a listing.
pub(super) struct Line<'a> {
    pub(super) number: u64,
    pub(super) kind: fuser::FileType,
    pub(super) name: &'a OsStr,
    /// Where the listing goes on after this line.
    pub(super) cookie: u64,
    /// How long name and attributes may be kept.
    pub(super) ttl: Duration,
    pub(super) generation: Generation,
}

/// Calls `line` for each entry of the directory `number` behind `cookie`, with a function that gives the entry's attributes, until it
/// says that there is no more room.
pub(super) fn list(
    tree: &Tree,
    number: INodeNo,
    cookie: u64,
    mut line: impl FnMut(Line<'_>, &dyn Fn() -> Result<FileAttr, Errno>) -> Result<bool, Errno>,
) -> Result<(), Errno> {
    match tree.place(number)? {
        Place::Root => list_slots(tree, cookie, &mut line),
        Place::Inode(attached, ino) => {
            let dir = attached.inode(ino)?;
            if !dir.is_dir() {
                return Err(Errno::ENOTDIR);
            }
            let parent = attached.parent_number(ino, dir);
            let numbers = [number.0, parent];
            if dots(tree, numbers, attached.generation, cookie, &mut line)? {
                return Ok(());
            }
            let index = attached.layer.index();
            let skip = usize::try_from(cookie.saturating_sub(DOTS)).unwrap_or(usize::MAX);
            let entries = index.entries(dir).iter().enumerate().skip(skip);
            for (position, entry) in entries {
                let child = attached.inode(entry.ino)?;
                let full = line(
                    Line {
                        number: attached.number(entry.ino),
                        kind: attr::kind(child),
                        name: OsStr::from_bytes(index.name(entry)),
                        cookie: position as u64 + DOTS + 1,
                        ttl: FOREVER,
                        generation: attached.generation,
                    },
                    &|| attached.attr(entry.ino),
                )?;
                if full {
                    break;
                }
            }
            Ok(())
        }
    }
}

fn list_slots(
    tree: &Tree,
    cookie: u64,
    line: &mut impl FnMut(Line<'_>, &dyn Fn() -> Result<FileAttr, Errno>) -> Result<bool, Errno>,
) -> Result<(), Errno> {
    if dots(tree, [FUSE_ROOT, FUSE_ROOT], Generation(0), cookie, line)? {
        return Ok(());
    }
    // Slots come and go between two calls: the cookie is the slot itself, so that no other one is left out or seen twice.
    let slots = tree.slots();
    let first = u32::try_from(cookie.saturating_sub(DOTS))
        .unwrap_or(u32::MAX)
        .saturating_add(1);
    for (slot, attached) in slots.range(first..) {
        let attached: &Attached = attached;
        let name = slot.to_string();
        let full = line(
            Line {
                number: attached.number(ROOT_INO),
                kind: fuser::FileType::Directory,
                name: OsStr::new(&name),
                cookie: u64::from(*slot) + DOTS,
                ttl: NEVER,
                generation: attached.generation,
            },
            &|| attached.attr(ROOT_INO),
        )?;
        if full {
            break;
        }
    }
    Ok(())
}

/// Lists `.` and `..`, whose inode numbers are given; tells whether there is no more room.
fn dots(
    tree: &Tree,
    numbers: [u64; 2],
    generation: Generation,
    cookie: u64,
    line: &mut impl FnMut(Line<'_>, &dyn Fn() -> Result<FileAttr, Errno>) -> Result<bool, Errno>,
) -> Result<bool, Errno> {
    for (position, (number, name)) in numbers.into_iter().zip([".", ".."]).enumerate() {
        let position = position as u64;
        if position < cookie {
            continue;
        }
        let full = line(
            Line {
                number,
                kind: fuser::FileType::Directory,
                name: OsStr::new(name),
                cookie: position + 1,
                ttl: NEVER,
                generation,
            },
            &|| tree.attr(INodeNo(number)),
        )?;
        if full {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Answers READDIR: names, types and inode numbers.
pub(super) fn names(
    tree: &Tree,
    number: INodeNo,
    cookie: u64,
    mut reply: ReplyDirectory,
) -> Result<(), (Errno, ReplyDirectory)> {
    let listed = list(tree, number, cookie, |line, _| {
        Ok(reply.add(INodeNo(line.number), line.cookie, line.kind, line.name))
    });
    match listed {
        Ok(()) => {
            reply.ok();
            Ok(())
        }
        Err(errno) => Err((errno, reply)),
    }
}

/// Answers READDIRPLUS: all that a look-up of each name would give as well.
pub(super) fn entries(
    tree: &Tree,
    number: INodeNo,
    cookie: u64,
    mut reply: ReplyDirectoryPlus,
) -> Result<(), (Errno, ReplyDirectoryPlus)> {
    let listed = list(tree, number, cookie, |line, attr| {
        Ok(reply.add(
            INodeNo(line.number),
            line.cookie,
            line.name,
            &line.ttl,
            &attr()?,
            line.generation,
        ))
    });
    match listed {
        Ok(()) => {
            reply.ok();
            Ok(())
        }
        Err(errno) => Err((errno, reply)),
    }
}
