//! Tables of contents: the JSON that eStargz and both dialects of zstd:chunked have in common.
//!
//! A table lists the entries of a tar, in its order, and says for each regular file in which gzip members or zstd frames of the blob its
//! content is. Large files come in chunks, each with a digest. Nothing of a table is looked at before its own digest is right, which is
//! in the image's manifest; that is the business of [`super::estargz`] and [`super::zchunked`].
//!
//! A table does not say where contents are in the tar, so the data space ([`super::index`]) holds them one after the other in the order
//! of the blob, each 4096-aligned, or 512-aligned if it is smaller than 4096 bytes. Every byte of them belongs to a verified chunk, or
//! to one that is said to hold only zeros.
//!
//! Memory: entries are read one by one, and only what the index needs of them stays. A table may take 8 bytes for each of its JSON, and 4 MiB;
//! a terse one that would take more is refused. Nor may it take more than [`memory_for_blob`] says.
//!
//! What a table cannot tell: names that are not UTF-8 (then it is refused, and the layer has to be read as a tar), and, where the
//! writer leaves them out, fractions of seconds.

mod entry;
mod layout;

use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::tree::{TreeBuilder, memory_for_blob};
use super::{Access, Codec, Digest, LayerError, LayerIndex};
use entry::TocEntry;
use layout::Contents;

const FORMAT: &str = "TOC";
/// Largest table, in bytes, compressed or not: about 400,000 files. What containers/storage accepts, too.
pub const MAX_TOC_LEN: u64 = 150 << 20;
/// Most entries of a table, those of chunks included: 128 GiB of files in chunks of 64 KiB, or all files of the largest images known.
const MAX_ENTRIES: usize = 2 << 20;
/// Bytes of memory that any table may take besides its JSON ...
const MEMORY_BASE: u64 = 4 << 20;
/// ... and so many for each byte of it. What stargz and containers/storage write takes less than three.
const MEMORY_PER_BYTE: u64 = 8;
/// Version of the table that is read here, the only one there is.
const VERSION: u64 = 1;
/// Name of an eStargz layer's table in its tar.
pub(super) const TOC_NAME: &[u8] = b"stargz.index.json";
/// A file in the root with this name ends what its author wants to be fetched ahead; what comes before it in the blob is that.
const PREFETCH_LANDMARK: &[u8] = b".prefetch.landmark";
/// A file in the root with this name says that nothing is to be fetched ahead.
const NO_PREFETCH_LANDMARK: &[u8] = b".no.prefetch.landmark";

/// A layer's index as its table of contents has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TocIndex {
    /// The index.
    pub index: LayerIndex,
    /// Bytes at the beginning of the data space that the image's author wants to be fetched ahead.
    pub prefetch: u64,
}

/// Where a table is in the blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TocLocation {
    /// Its first byte.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// What differs between tables.
pub(super) struct Dialect {
    /// How contents are compressed.
    pub codec: Codec,
    /// Whether stargz wrote it: then some files in the root are there for snapshotters, and no container sees them.
    pub stargz: bool,
}

/// Bytes of memory that a table takes besides its JSON of `raw_len` bytes, and with it.
fn names_memory(raw_len: u64) -> u64 {
    MEMORY_BASE + MEMORY_PER_BYTE * raw_len
}

/// Bytes of memory that [`index`] takes, with the JSON.
pub(super) fn memory_for(raw_len: u64) -> u64 {
    raw_len + names_memory(raw_len)
}

/// What is left of `memory` bytes beside a JSON of `raw_len` bytes, as far as such a table may use it.
pub(super) fn memory_beside(raw_len: u64, memory: u64) -> Result<u64, LayerError> {
    let left = memory.checked_sub(raw_len).ok_or(LayerError::TooLarge {
        what: "size of the table of contents, beside what is in memory,",
        value: raw_len,
        limit: memory,
    })?;
    Ok(left.min(names_memory(raw_len)))
}

/// The index that a table makes. Its digest has been checked. The contents end at `end` of a blob of `blob_size` bytes, or before.
pub(super) fn index(
    json: &[u8],
    dialect: &Dialect,
    end: u64,
    blob_size: u64,
    memory: u64,
) -> Result<TocIndex, LayerError> {
    let memory = memory.min(memory_for_blob(blob_size));
    let mut reader = Reader {
        dialect,
        memory,
        tree: TreeBuilder::with_memory(FORMAT, memory),
        contents: Contents::default(),
        at: 0,
        ahead: None,
        no_prefetch: false,
        fault: None,
    };
    let mut text = serde_json::Deserializer::from_slice(json);
    let read = Document(&mut reader).deserialize(&mut text).and_then(|()| text.end());
    if let Err(error) = read {
        let fault = reader.fault.take();
        return Err(fault.unwrap_or_else(|| LayerError::malformed(FORMAT, 0, error.to_string())));
    }
    let layout = reader.contents.lay_out(end.min(blob_size))?;
    let place = |file: u64| {
        let at = usize::try_from(file).ok();
        at.and_then(|at| layout.files.get(at)).copied().unwrap_or(0)
    };
    let mut tree = reader.tree.finish();
    for inode in tree.inodes.iter_mut().filter(|inode| inode.is_reg()) {
        inode.data = place(inode.data);
    }
    let prefetch = reader.ahead.filter(|_| !reader.no_prefetch).map_or(0, place);
    let mut parts = tree.into_parts(Access::Ranges, dialect.codec);
    parts.data_size = layout.data_size;
    parts.blob_size = blob_size;
    parts.chunks = layout.chunks;
    Ok(TocIndex {
        index: LayerIndex::new(parts)?,
        prefetch,
    })
}

/// Reads entry by entry: of what the table says, only what the index needs stays.
struct Reader<'t, 'd> {
    dialect: &'d Dialect,
    /// Bytes that it may take.
    memory: u64,
    /// In it, the content of a regular file is at the file's number, until there is a layout.
    tree: TreeBuilder,
    contents: Contents<'t>,
    /// Position of the entry to come.
    at: usize,
    /// Number of the file before which all is to be fetched ahead.
    ahead: Option<u64>,
    no_prefetch: bool,
    /// What an error of the JSON's reader stands for.
    fault: Option<LayerError>,
}

impl<'t> Reader<'t, '_> {
    fn entry(&mut self, entry: &TocEntry<'t>) -> Result<(), LayerError> {
        let at = self.at;
        self.at += 1;
        let number = self.contents.push(at, entry)?;
        let memory = self.contents.memory() + self.tree.memory();
        if memory > self.memory {
            return Err(LayerError::TooLarge {
                what: "memory of the table of contents in bytes",
                value: memory,
                limit: self.memory,
            });
        }
        if entry.kind == "chunk" {
            return Ok(());
        }
        match special(self.dialect, &entry.name) {
            None => self.tree.add(at as u64, &entry.entry(at, number.unwrap_or(0))?)?,
            // A landmark without content is nowhere in the blob.
            Some(Special::Landmark) if entry.size > 0 => self.ahead = number.or(self.ahead),
            Some(Special::NoPrefetch) => self.no_prefetch = true,
            Some(_) => {}
        }
        Ok(())
    }

    /// The error for the JSON's reader.
    fn failed<E: serde::de::Error>(&mut self, fault: LayerError) -> E {
        let error = E::custom(&fault);
        self.fault = Some(fault);
        error
    }
}

/// The whole table.
struct Document<'r, 't, 'd>(&'r mut Reader<'t, 'd>);

/// Its fields.
#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "lowercase")]
enum Field {
    Version,
    Entries,
    #[serde(other)]
    Other,
}

impl<'t> DeserializeSeed<'t> for Document<'_, 't, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'t>>(self, table: D) -> Result<(), D::Error> {
        table.deserialize_map(self)
    }
}

impl<'t> Visitor<'t> for Document<'_, 't, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table of contents")
    }

    fn visit_map<A: MapAccess<'t>>(self, mut table: A) -> Result<(), A::Error> {
        let (mut version, mut entries) = (None, false);
        while let Some(field) = table.next_key()? {
            match field {
                Field::Version if version.is_some() => return Err(A::Error::duplicate_field("version")),
                Field::Entries if entries => return Err(A::Error::duplicate_field("entries")),
                Field::Version => version = Some(table.next_value()?),
                Field::Entries => {
                    entries = true;
                    table.next_value_seed(Entries(&mut *self.0))?;
                }
                Field::Other => {
                    table.next_value::<IgnoredAny>()?;
                }
            }
        }
        match version.unwrap_or(0) {
            VERSION => Ok(()),
            other => Err(self.0.failed(LayerError::Unsupported {
                what: format!("version {other} of the table of contents"),
            })),
        }
    }
}

/// Its entries, of which no more than [`MAX_ENTRIES`] are read.
struct Entries<'r, 't, 'd>(&'r mut Reader<'t, 'd>);

impl<'t> DeserializeSeed<'t> for Entries<'_, 't, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'t>>(self, entries: D) -> Result<(), D::Error> {
        entries.deserialize_seq(self)
    }
}

impl<'t> Visitor<'t> for Entries<'_, 't, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of entries")
    }

    fn visit_seq<A: SeqAccess<'t>>(self, mut list: A) -> Result<(), A::Error> {
        while let Some(entry) = list.next_element::<TocEntry<'t>>()? {
            if self.0.at == MAX_ENTRIES {
                return Err(self.0.failed(LayerError::TooLarge {
                    what: "number of entries of the table of contents",
                    value: MAX_ENTRIES as u64 + 1,
                    limit: MAX_ENTRIES as u64,
                }));
            }
            if let Err(fault) = self.0.entry(&entry) {
                return Err(self.0.failed(fault));
            }
        }
        Ok(())
    }
}

/// Compares the digest of `bytes` with the one that the manifest has.
pub(super) fn check_digest(what: &'static str, bytes: &[u8], expected: &Digest) -> Result<(), LayerError> {
    let actual = Digest::of(bytes);
    if actual != *expected {
        return Err(LayerError::DigestMismatch {
            what,
            expected: *expected,
            actual,
        });
    }
    Ok(())
}

/// Checks the length of a table, compressed or not.
pub(super) fn check_len(what: &'static str, len: u64) -> Result<(), LayerError> {
    if len > MAX_TOC_LEN {
        return Err(LayerError::TooLarge {
            what,
            value: len,
            limit: MAX_TOC_LEN,
        });
    }
    Ok(())
}

/// A file that is there for snapshotters.
enum Special {
    Landmark,
    NoPrefetch,
    Table,
}

fn special(dialect: &Dialect, name: &str) -> Option<Special> {
    if !dialect.stargz {
        return None;
    }
    let mut parts = name.split('/').filter(|part| !matches!(*part, "" | "."));
    let first = parts.next()?.as_bytes();
    if parts.next().is_some() {
        return None;
    }
    match first {
        PREFETCH_LANDMARK => Some(Special::Landmark),
        NO_PREFETCH_LANDMARK => Some(Special::NoPrefetch),
        TOC_NAME => Some(Special::Table),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_of_tiny_entries_have_a_bound() {
        let dialect = Dialect {
            codec: Codec::Zstd,
            stargz: false,
        };
        let refused = |entry: &str, memory| {
            let mut json = br#"{"version":1,"entries":["#.to_vec();
            json.extend_from_slice(format!("{entry},").repeat(MAX_ENTRIES).as_bytes());
            json.extend_from_slice(format!("{entry}]}}").as_bytes());
            index(&json, &dialect, 0, 0, memory).unwrap_err().to_string()
        };
        let error = refused(r#"{"name":"","type":"dir"}"#, u64::MAX);
        assert!(
            error.contains("number of entries of the table of contents is 2097153, over the limit of 2097152"),
            "{error}"
        );
        let error = refused(r#"{"name":"","type":"reg"}"#, 1 << 20);
        assert!(error.contains("over the limit of 1048576"), "{error}");
    }

    #[test]
    fn fields_in_any_order_and_once() {
        let dialect = Dialect {
            codec: Codec::Gzip,
            stargz: true,
        };
        let read = |json: &str| index(json.as_bytes(), &dialect, 0, 0, u64::MAX).map(|toc| toc.index.inodes().len());
        let entries = r#""entries":[{"name":"d","type":"dir"}]"#;
        assert_eq!(read(&format!(r#"{{"version":1,"x":[{{}}],{entries}}}"#)), Ok(2));
        assert_eq!(read(&format!(r#"{{{entries},"version":1}}"#)), Ok(2));
        assert_eq!(read(r#"{"version":1}"#), Ok(1));
        for (json, what) in [
            (
                format!(r#"{{"version":1,{entries},{entries}}}"#),
                "duplicate field `entries`",
            ),
            (r#"{"version":1,"version":1}"#.to_owned(), "duplicate field `version`"),
            (format!(r#"{{"version":1,{entries}}} x"#), "trailing characters"),
            (format!(r#"{{{entries},"version":7}}"#), "version 7 of the table"),
            (format!("{{{entries}}}"), "version 0 of the table"),
        ] {
            let error = read(&json).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
    }
}
