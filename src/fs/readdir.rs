//! Listing a directory.
//!
//! The cookie of an entry is its position plus one: what a listing that goes on behind it has to skip. `.` and `..` come first, then
//! the index's entries in their order, so a cookie means the same for ever, without a handle.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::time::Duration;

use fuser::{Errno, FileAttr, FileType, Generation, INodeNo, ReplyDirectory, ReplyDirectoryPlus};

use super::attr;
use super::face::{FOREVER, NEVER};
use super::image::Entry;
use super::tree::{self, FUSE_ROOT, Place, View};

/// Entries before those of the index: `.` and `..`.
const DOTS: u64 = 2;

/// One line of a listing.
pub(super) struct Line<'a> {
    pub(super) number: u64,
    pub(super) kind: FileType,
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
    view: &View<'_>,
    number: INodeNo,
    cookie: u64,
    mut line: impl FnMut(Line<'_>, &dyn Fn() -> Result<FileAttr, Errno>) -> Result<bool, Errno>,
) -> Result<(), Errno> {
    match view.place(number)? {
        Place::Root => list_slots(view, cookie, &mut line),
        Place::Data(_) | Place::Metadata(..) => Err(Errno::ENOTDIR),
        Place::Inode(attached, ino) => {
            let index = attached.names()?;
            let inode = |ino| index.inode(ino).ok_or(Errno::ESTALE);
            let dir = inode(ino)?;
            if !dir.is_dir() {
                return Err(Errno::ENOTDIR);
            }
            let parent = attached.parent_number(ino, dir);
            let numbers = [number.0, parent];
            if dots(view, numbers, attached.generation, cookie, &mut line)? {
                return Ok(());
            }
            let skip = usize::try_from(cookie.saturating_sub(DOTS)).unwrap_or(usize::MAX);
            let entries = index.entries(dir).iter().enumerate().skip(skip);
            for (position, entry) in entries {
                let child = inode(entry.ino)?;
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
    view: &View<'_>,
    cookie: u64,
    line: &mut impl FnMut(Line<'_>, &dyn Fn() -> Result<FileAttr, Errno>) -> Result<bool, Errno>,
) -> Result<(), Errno> {
    if dots(view, [FUSE_ROOT, FUSE_ROOT], Generation(0), cookie, line)? {
        return Ok(());
    }
    // Slots come and go between two calls: the cookie is made of the slot and what it is of it, so that nothing else is left out or seen
    // twice.
    let kinds = Entry::ALL.len() as u64;
    let passed = cookie.saturating_sub(DOTS);
    let first = u32::try_from(passed / kinds).unwrap_or(u32::MAX);
    for (&slot, there) in view.slots().range(first..) {
        for (position, entry) in Entry::ALL.into_iter().enumerate() {
            let position = u64::from(slot) * kinds + position as u64;
            if position <= passed {
                continue;
            }
            let (kind, generation) = match (entry, &there.layer, &there.metadata) {
                (Entry::Tree, Some(layer), _) => (FileType::Directory, layer.generation),
                (Entry::Data, Some(layer), _) => (FileType::RegularFile, layer.generation),
                (Entry::Metadata, _, Some(_)) => (FileType::RegularFile, Generation(0)),
                _ => continue,
            };
            let number = tree::number(slot, entry.ino());
            let full = line(
                Line {
                    number,
                    kind,
                    name: OsStr::new(&entry.name(slot)),
                    cookie: position + DOTS,
                    ttl: NEVER,
                    generation,
                },
                &|| view.attr(INodeNo(number)),
            )?;
            if full {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Lists `.` and `..`, whose inode numbers are given; tells whether there is no more room.
fn dots(
    view: &View<'_>,
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
                kind: FileType::Directory,
                name: OsStr::new(name),
                cookie: position + 1,
                ttl: NEVER,
                generation,
            },
            &|| view.attr(INodeNo(number)),
        )?;
        if full {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Answers READDIR: names, types and inode numbers.
pub(super) fn names(
    view: &View<'_>,
    number: INodeNo,
    cookie: u64,
    mut reply: ReplyDirectory,
) -> Result<(), (Errno, ReplyDirectory)> {
    let listed = list(view, number, cookie, |line, _| {
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
    view: &View<'_>,
    number: INodeNo,
    cookie: u64,
    mut reply: ReplyDirectoryPlus,
) -> Result<(), (Errno, ReplyDirectoryPlus)> {
    let listed = list(view, number, cookie, |line, attr| {
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
