//! The JSON of a table of contents. Texts are borrowed from it where they hold no escapes.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::layer::LayerError;
use crate::layer::tree::{Entry, EntryKind, EntryXattr, MAX_XATTR_VALUE, MAX_XATTRS, quoted};

/// What Go's JSON encoder writes for bytes that are not UTF-8.
const REPLACEMENT: char = '\u{fffd}';
const FORMAT: &str = super::FORMAT;
/// Most bytes of the names of an entry's extended attributes (XATTR_LIST_MAX of Linux).
const MAX_XATTR_NAMES: usize = 64 << 10;
/// Most base64 of one value: of the longest that Linux takes.
const MAX_XATTR_TEXT: usize = MAX_XATTR_VALUE.div_ceil(3) * 4;
/// Most base64 of all values of an entry: as much as an extended header of a tar, and so a plain layer, could have.
const MAX_XATTR_TEXTS: usize = 1 << 20;

/// One entry. Absent numbers are 0 and absent texts empty, as the writer leaves them out.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct TocEntry<'a> {
    #[serde(borrow)]
    pub name: Cow<'a, str>,
    #[serde(rename = "type", borrow)]
    pub kind: Cow<'a, str>,
    #[serde(default)]
    pub size: u64,
    #[serde(rename = "modtime", borrow, default)]
    pub mtime: Cow<'a, str>,
    #[serde(borrow, default)]
    pub link_name: Cow<'a, str>,
    #[serde(default)]
    pub mode: i64,
    #[serde(default)]
    pub uid: i64,
    #[serde(default)]
    pub gid: i64,
    /// Where the gzip member or zstd frame with the chunk begins in the blob.
    #[serde(default)]
    pub offset: u64,
    /// Where the last one of the file ends; 0 if that is not said.
    #[serde(default)]
    pub end_offset: u64,
    /// Uncompressed bytes of that member before the chunk.
    #[serde(default)]
    pub inner_offset: u64,
    #[serde(default)]
    pub dev_major: i64,
    #[serde(default)]
    pub dev_minor: i64,
    /// Values are base64; `null` is an empty one.
    #[serde(default)]
    pub xattrs: Option<Xattrs>,
    /// Of the whole file.
    #[serde(borrow, default)]
    pub digest: Cow<'a, str>,
    #[serde(default)]
    pub chunk_offset: u64,
    /// 0: to the end of the file.
    #[serde(default)]
    pub chunk_size: u64,
    #[serde(borrow, default)]
    pub chunk_digest: Cow<'a, str>,
    /// Empty, or `zeros`.
    #[serde(borrow, default)]
    pub chunk_type: Cow<'a, str>,
}

/// Extended attributes: values by names. No more of them are taken in than a file could have.
#[derive(Debug)]
pub(super) struct Xattrs(BTreeMap<String, Option<String>>);

impl<'de> Deserialize<'de> for Xattrs {
    fn deserialize<D: Deserializer<'de>>(xattrs: D) -> Result<Self, D::Error> {
        struct Bounded;

        impl<'de> Visitor<'de> for Bounded {
            type Value = Xattrs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("extended attributes")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Xattrs, A::Error> {
                let too_many = |what: &str, limit: usize| {
                    Err(A::Error::custom(format_args!(
                        "an entry has {what} of extended attributes over the limit of {limit}"
                    )))
                };
                let mut xattrs = BTreeMap::new();
                let (mut names, mut values) = (0, 0);
                while let Some((name, value)) = map.next_entry::<String, Option<String>>()? {
                    let len = value.as_ref().map_or(0, String::len);
                    names += name.len();
                    values += len;
                    if len > MAX_XATTR_TEXT {
                        return too_many("base64", MAX_XATTR_TEXT);
                    }
                    if names > MAX_XATTR_NAMES {
                        return too_many("bytes of names", MAX_XATTR_NAMES);
                    }
                    if values > MAX_XATTR_TEXTS {
                        return too_many("base64 in all", MAX_XATTR_TEXTS);
                    }
                    if xattrs.len() == MAX_XATTRS {
                        return too_many("a number", MAX_XATTRS);
                    }
                    xattrs.insert(name, value);
                }
                Ok(Xattrs(xattrs))
            }
        }

        xattrs.deserialize_map(Bounded)
    }
}

impl TocEntry<'_> {
    /// The entry as one of a tree, with a regular file's content at `data`. `at` is its position in the table.
    pub(super) fn entry(&self, at: usize, data: u64) -> Result<Entry<'_>, LayerError> {
        for text in [&self.name, &self.link_name] {
            if text.contains(REPLACEMENT) {
                return Err(LayerError::Unsupported {
                    what: format!(
                        "a table of contents that has lost the bytes of a name ({})",
                        quoted(text.as_bytes())
                    ),
                });
            }
        }
        let device = || -> Result<(u32, u32), LayerError> {
            let number = |number: i64| {
                u32::try_from(number).map_err(|_| self.wrong(at, format!("no device has the number {number}")))
            };
            Ok((number(self.dev_major)?, number(self.dev_minor)?))
        };
        let kind = match &*self.kind {
            "dir" => EntryKind::Dir,
            "reg" => EntryKind::File { size: self.size, data },
            "symlink" => EntryKind::Symlink(self.link_name.as_bytes()),
            "hardlink" => EntryKind::Hardlink(self.link_name.as_bytes()),
            "char" => device().map(|(major, minor)| EntryKind::Char { major, minor })?,
            "block" => device().map(|(major, minor)| EntryKind::Block { major, minor })?,
            "fifo" => EntryKind::Fifo,
            other => return Err(self.wrong(at, format!("its type is {}", quoted(other.as_bytes())))),
        };
        let id = |what: &str, id: i64| {
            u32::try_from(id).map_err(|_| self.wrong(at, format!("no {what} has the number {id}")))
        };
        let (mtime, mtime_nsec) = self.time(at)?;
        Ok(Entry {
            path: self.name.as_bytes(),
            kind,
            mode: self.mode as u32,
            uid: id("user", self.uid)?,
            gid: id("group", self.gid)?,
            mtime,
            mtime_nsec,
            xattrs: self.decoded_xattrs(at)?,
        })
    }

    /// Seconds since the epoch, and nanoseconds after them. An absent time is the epoch: the writer leaves both out.
    fn time(&self, at: usize) -> Result<(i64, u32), LayerError> {
        if self.mtime.is_empty() {
            return Ok((0, 0));
        }
        let time = OffsetDateTime::parse(&self.mtime, &Rfc3339)
            .map_err(|error| self.wrong(at, format!("its time {}: {error}", quoted(self.mtime.as_bytes()))))?;
        Ok((time.unix_timestamp(), time.nanosecond()))
    }

    fn decoded_xattrs(&self, at: usize) -> Result<Vec<EntryXattr<'_>>, LayerError> {
        let decode = |(name, value): (&'_ String, &Option<String>)| {
            let value = STANDARD.decode(value.as_deref().unwrap_or_default());
            value.map(Cow::Owned).map_err(|error| {
                self.wrong(
                    at,
                    format!("its extended attribute {}: {error}", quoted(name.as_bytes())),
                )
            })
        };
        let Some(Xattrs(xattrs)) = &self.xattrs else {
            return Ok(Vec::new());
        };
        xattrs
            .iter()
            .map(|(name, value)| Ok((Cow::Borrowed(name.as_bytes()), decode((name, value))?)))
            .collect()
    }

    /// An error about this entry.
    pub(super) fn wrong(&self, at: usize, what: impl AsRef<str>) -> LayerError {
        wrong(&self.name, at, what)
    }
}

/// An error about the entry at position `at`.
pub(super) fn wrong(name: &str, at: usize, what: impl AsRef<str>) -> LayerError {
    let what = format!("entry {}: {}", quoted(name.as_bytes()), what.as_ref());
    LayerError::malformed(FORMAT, at as u64, what)
}
