//! One member of an archive: a header with the extended headers before it applied.

use std::borrow::Cow;

use super::header::Header;
use super::pax::{Pax, SparseRecords};
use super::sparse::{BadMap, Segment};
use super::{FORMAT, malformed};
use crate::layer::LayerError;
use crate::layer::index::MAX_DATA_SIZE;
use crate::layer::tree::{Entry, EntryKind, quoted};

/// What extended headers say of the member to come.
#[derive(Debug, Default)]
pub(super) struct Pending {
    pub pax: Pax,
    pub name: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    /// The name that a global header has itself.
    pub global: Vec<u8>,
}

#[derive(Debug)]
pub(super) struct Member {
    /// Offset of its header.
    pub at: u64,
    pub kind: u8,
    pub name: Vec<u8>,
    /// Bytes that follow its header, without padding. 0 for types that have no content, whatever their header says.
    pub stored: u64,
    link: Vec<u8>,
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: i64,
    mtime_nsec: u32,
    major: i64,
    minor: i64,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Pending {
    /// The member whose `header` is at offset `at`, and what is said of its being sparse.
    pub(super) fn apply(self, at: u64, header: Header) -> Result<(Member, SparseRecords), LayerError> {
        let pax = self.pax;
        let name = self.name.or(pax.path).unwrap_or(header.name);
        let kind = match header.kind {
            // v7 has no type for directories.
            0 if name.ends_with(b"/") => b'5',
            kind => kind,
        };
        let stored = match pax.size {
            _ if matches!(kind, b'1'..=b'6') => 0,
            Some(size) => checked_size(at, &name, size.try_into().unwrap_or(i64::MAX))?,
            None => checked_size(at, &name, header.size)?,
        };
        let (mtime, mtime_nsec) = pax.mtime.unwrap_or((header.mtime, 0));
        let id = |what: &str, id: i64| {
            u32::try_from(id)
                .map_err(|_| malformed(at, format!("entry {}: no {what} has the number {id}", quoted(&name))))
        };
        let member = Member {
            at,
            kind,
            stored,
            link: self.link.or(pax.link).unwrap_or(header.link),
            // Only permissions are looked at.
            mode: header.mode as u32,
            uid: id("user", pax.uid.unwrap_or(header.uid))?,
            gid: id("group", pax.gid.unwrap_or(header.gid))?,
            mtime,
            mtime_nsec,
            major: header.major,
            minor: header.minor,
            xattrs: pax.xattrs,
            name,
        };
        Ok((member, pax.sparse))
    }
}

impl Member {
    /// What a member without content is.
    pub(super) fn special(&self) -> Result<EntryKind<'_>, LayerError> {
        let device = || {
            let number = |number: i64| {
                u32::try_from(number).map_err(|_| self.error(format!("no device has the number {number}")))
            };
            Ok::<_, LayerError>((number(self.major)?, number(self.minor)?))
        };
        match self.kind {
            b'1' => Ok(EntryKind::Hardlink(&self.link)),
            b'2' => Ok(EntryKind::Symlink(&self.link)),
            b'3' => device().map(|(major, minor)| EntryKind::Char { major, minor }),
            b'4' => device().map(|(major, minor)| EntryKind::Block { major, minor }),
            b'5' => Ok(EntryKind::Dir),
            b'6' => Ok(EntryKind::Fifo),
            kind => Err(LayerError::Unsupported {
                what: format!("type '{}' of the tar entry {}", kind.escape_ascii(), quoted(&self.name)),
            }),
        }
    }

    /// The member as an entry of a tree.
    pub(super) fn entry<'a>(&'a self, kind: EntryKind<'a>) -> Entry<'a> {
        let borrowed = |(name, value): &'a (Vec<u8>, Vec<u8>)| (Cow::Borrowed(&name[..]), Cow::Borrowed(&value[..]));
        Entry {
            path: &self.name,
            kind,
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            mtime: self.mtime,
            mtime_nsec: self.mtime_nsec,
            xattrs: self.xattrs.iter().map(borrowed).collect(),
        }
    }

    /// An error that names the member.
    pub(super) fn error(&self, what: impl AsRef<str>) -> LayerError {
        let what = format!("entry {}: {}", quoted(&self.name), what.as_ref());
        LayerError::malformed(FORMAT, self.at, what)
    }
}

/// A sparse file, perhaps with a part of its map still to come.
#[derive(Debug)]
pub(super) struct SparseFile {
    /// What is stored of it includes a map in front of the data.
    pub member: Member,
    /// Size with holes.
    pub size: u64,
    pub map: Vec<Segment>,
}

impl SparseFile {
    /// An error in its map.
    pub(super) fn error(&self, problem: BadMap) -> LayerError {
        match problem {
            BadMap::Wrong(what) => self.member.error(what),
            BadMap::Limit(error) => error,
        }
    }
}

/// Where PAX records say that the map of a sparse file is.
#[derive(PartialEq, Eq)]
pub(super) enum Sparseness {
    None,
    MapInRecords,
    MapInData,
}

impl Sparseness {
    pub(super) fn of(records: &SparseRecords) -> Self {
        match (&records.major[..], &records.minor[..]) {
            (b"0", b"0" | b"1") => Sparseness::MapInRecords,
            (b"1", b"0") => Sparseness::MapInData,
            // Version 0.0 does not say that it is one.
            (b"", b"") if !records.map.is_empty() => Sparseness::MapInRecords,
            _ => Sparseness::None,
        }
    }
}

/// The size in the header at offset `at`, if it can be one.
pub(super) fn checked_size(at: u64, name: &[u8], size: i64) -> Result<u64, LayerError> {
    let size = u64::try_from(size).map_err(|_| malformed(at, format!("entry {} has a negative size", quoted(name))))?;
    if size > MAX_DATA_SIZE {
        return Err(LayerError::TooLarge {
            what: "size of a file",
            value: size,
            limit: MAX_DATA_SIZE,
        });
    }
    Ok(size)
}
