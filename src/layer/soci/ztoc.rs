//! A zTOC as it stands: SOCI's table of contents of one layer.
//!
//! It is a FlatBuffer (version 0.9, without file identifier). Fields by their slots:
//!
//! ```text
//! Ztoc             0 version  1 build tool  2 compressed size i64  3 uncompressed size i64  4 TOC  5 CompressionInfo
//! TOC              0 [FileMetadata]
//! FileMetadata     0 name  1 type  2 offset of the content i64  3 size i64  4 link  5 mode i64  6 uid u32  7 gid u32  8 user  9 group
//!                  10 time (RFC 3339)  11 major i64  12 minor i64  13 [Xattr]
//! Xattr            0 key  1 value: all records of the PAX header, not only extended attributes
//! CompressionInfo  0 algorithm u8 (1 gzip, 2 none)  1 last span i32  2 [digest]  3 zinfo
//! ```

use std::borrow::Cow;

use super::flat::{Flat, Table};
use super::malformed;
use crate::layer::LayerError;
use crate::layer::index::{MAX_CHUNKS, MAX_INODES};
use crate::layer::tree::quoted;

/// The only version there is.
pub(super) const VERSION: &[u8] = b"0.9";

/// A text: names need not be UTF-8.
pub(super) type Text<'a> = Cow<'a, [u8]>;

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Algorithm {
    Gzip,
    Uncompressed,
}

impl Algorithm {
    pub(super) fn byte(self) -> u8 {
        match self {
            Algorithm::Gzip => 1,
            Algorithm::Uncompressed => 2,
        }
    }
}

/// A zTOC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ztoc<'a> {
    pub tool: Text<'a>,
    /// Bytes of the blob.
    pub compressed_size: u64,
    /// Bytes of the tar up to where Go's reader stops: the end of the two blocks of zeros.
    pub uncompressed_size: u64,
    pub files: Vec<File<'a>>,
    pub algorithm: Algorithm,
    /// Number of the last span.
    pub last_span: i32,
    /// Digests of the compressed spans, as text.
    pub digests: Vec<Text<'a>>,
    pub zinfo: Text<'a>,
}

/// An entry of the tar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct File<'a> {
    pub name: Text<'a>,
    pub kind: Text<'a>,
    /// Where its content begins in the tar, also if it has none.
    pub offset: u64,
    pub size: u64,
    pub link: Text<'a>,
    pub mode: i64,
    pub uid: u32,
    pub gid: u32,
    pub user: Text<'a>,
    pub group: Text<'a>,
    pub time: Text<'a>,
    pub major: i64,
    pub minor: i64,
    /// Records of its PAX header, by key.
    pub records: Vec<(Text<'a>, Text<'a>)>,
}

/// Bytes of a zTOC for each file at least. A table without texts has 64, and each has a type and a time.
const FILE_BYTES: usize = 64;
/// For each record of a PAX header: a reference, a table of two, and two texts.
const RECORD_BYTES: usize = 24;

/// How many files a zTOC has.
pub(super) fn files(bytes: &[u8]) -> Result<usize, LayerError> {
    let flat = Flat::new(bytes);
    let files = match flat.root()?.table(4)? {
        Some(toc) => toc.tables(0)?.len(),
        None => 0,
    };
    bounded("number of files", files, MAX_INODES.min(bytes.len() / FILE_BYTES))?;
    Ok(files)
}

impl<'a> Ztoc<'a> {
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, LayerError> {
        files(bytes)?;
        let flat = Flat::new(bytes);
        let root = flat.root()?;
        let version = root.bytes(0)?;
        if version != VERSION {
            return Err(LayerError::Unsupported {
                what: format!("version {} of the zTOC", quoted(version)),
            });
        }
        let info = root.table(5)?.ok_or_else(|| malformed(0, "it says nothing of spans"))?;
        let digests = info.texts(2)?;
        bounded("number of spans", digests.len(), MAX_CHUNKS)?;
        let files = match root.table(4)? {
            Some(toc) => {
                let mut records = bytes.len() / RECORD_BYTES;
                let files = toc.tables(0)?;
                files
                    .map(|file| File::parse(&file?, &mut records))
                    .collect::<Result<_, _>>()?
            }
            None => Vec::new(),
        };
        Ok(Ztoc {
            tool: root.bytes(1)?.into(),
            compressed_size: size(&root, 2)?,
            uncompressed_size: size(&root, 3)?,
            files,
            algorithm: match info.u8(0, 1)? {
                1 => Algorithm::Gzip,
                2 => Algorithm::Uncompressed,
                other => {
                    return Err(LayerError::Unsupported {
                        what: format!("compression {other} in a zTOC"),
                    });
                }
            },
            last_span: info.i32(1)?,
            digests: digests.map(|text| text.map(Cow::Borrowed)).collect::<Result<_, _>>()?,
            zinfo: info.bytes(3)?.into(),
        })
    }
}

impl<'a> File<'a> {
    /// Reads a file with no more than so many records, which are counted down.
    fn parse(table: &Table<'_, 'a>, left: &mut usize) -> Result<Self, LayerError> {
        let records = table.tables(13)?;
        let known = left.checked_sub(records.len());
        *left = known.ok_or_else(|| malformed(0, "it has more records of PAX headers than there is room for"))?;
        let record = |record: Result<Table<'_, 'a>, LayerError>| {
            let record = record?;
            Ok((record.bytes(0)?.into(), record.bytes(1)?.into()))
        };
        Ok(File {
            name: table.bytes(0)?.into(),
            kind: table.bytes(1)?.into(),
            offset: size(table, 2)?,
            size: size(table, 3)?,
            link: table.bytes(4)?.into(),
            mode: table.i64(5)?,
            uid: table.u32(6)?,
            gid: table.u32(7)?,
            user: table.bytes(8)?.into(),
            group: table.bytes(9)?.into(),
            time: table.bytes(10)?.into(),
            major: table.i64(11)?,
            minor: table.i64(12)?,
            records: records.map(record).collect::<Result<_, LayerError>>()?,
        })
    }
}

fn size(table: &Table<'_, '_>, slot: usize) -> Result<u64, LayerError> {
    let size = table.i64(slot)?;
    u64::try_from(size).map_err(|_| malformed(0, format!("there is an offset or a size of {size}")))
}

fn bounded(what: &'static str, value: usize, limit: usize) -> Result<(), LayerError> {
    if value > limit {
        return Err(LayerError::TooLarge {
            what,
            value: value as u64,
            limit: limit as u64,
        });
    }
    Ok(())
}
