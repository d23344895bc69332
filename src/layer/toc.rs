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
//! What a table cannot tell: names that are not UTF-8 (then it is refused, and the layer has to be read as a tar), and, where the
//! writer leaves them out, fractions of seconds.

mod entry;
mod layout;

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, SeqAccess, Visitor};

use super::tree::TreeBuilder;
use super::{Access, Codec, Digest, LayerError, LayerIndex};
use entry::TocEntry;
use layout::Layout;

const FORMAT: &str = "TOC";
/// Largest table, in bytes, compressed or not: about 400,000 files. What containers/storage accepts, too.
pub const MAX_TOC_LEN: u64 = 150 << 20;
/// Most entries of a table, those of chunks included: 128 GiB of files in chunks of 64 KiB, or all files of the largest images known.
const MAX_ENTRIES: usize = 2 << 20;
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

#[derive(Debug, Deserialize)]
struct Toc<'a> {
    #[serde(default)]
    version: u64,
    #[serde(borrow, default, deserialize_with = "bounded")]
    entries: Vec<TocEntry<'a>>,
}

/// Reads no more than [`MAX_ENTRIES`] entries: one that takes 22 bytes of JSON takes more than ten times as much memory.
fn bounded<'de: 'a, 'a, D: Deserializer<'de>>(entries: D) -> Result<Vec<TocEntry<'a>>, D::Error> {
    struct Bounded;

    impl<'de> Visitor<'de> for Bounded {
        type Value = Vec<TocEntry<'de>>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of entries")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut entries = Vec::new();
            while let Some(entry) = list.next_element()? {
                if entries.len() == MAX_ENTRIES {
                    return Err(A::Error::custom(format_args!("it has more than {MAX_ENTRIES} entries")));
                }
                entries.push(entry);
            }
            Ok(entries)
        }
    }

    entries.deserialize_seq(Bounded)
}

/// The index that a table makes. Its digest has been checked. The contents end at `end` of a blob of `blob_size` bytes, or before.
pub(super) fn index(json: &[u8], dialect: &Dialect, end: u64, blob_size: u64) -> Result<TocIndex, LayerError> {
    let toc: Toc<'_> =
        serde_json::from_slice(json).map_err(|error| LayerError::malformed(FORMAT, 0, error.to_string()))?;
    if toc.version != VERSION {
        return Err(LayerError::Unsupported {
            what: format!("version {} of the table of contents", toc.version),
        });
    }
    let layout = Layout::of(&toc.entries, end.min(blob_size))?;
    let mut tree = TreeBuilder::new(FORMAT);
    let mut files = layout.files.iter();
    let (mut ahead, mut no_prefetch) = (None, false);
    for (at, entry) in toc.entries.iter().enumerate() {
        if entry.kind == "chunk" {
            continue;
        }
        let data = match &*entry.kind {
            "reg" => files.next().map_or(0, |file| file.data),
            _ => 0,
        };
        match special(dialect, &entry.name) {
            None => tree.add(at as u64, &entry.entry(at, data)?)?,
            // A landmark without content is nowhere in the blob.
            Some(Special::Landmark) if entry.kind == "reg" && entry.size > 0 => ahead = Some(data),
            Some(Special::NoPrefetch) => no_prefetch = true,
            Some(_) => {}
        }
    }
    let mut parts = tree.finish().into_parts(Access::Ranges, dialect.codec);
    parts.data_size = layout.data_size;
    parts.blob_size = blob_size;
    parts.chunks = layout.chunks;
    Ok(TocIndex {
        index: LayerIndex::new(parts)?,
        prefetch: ahead.filter(|_| !no_prefetch).unwrap_or(0),
    })
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
        let mut json = br#"{"version":1,"entries":["#.to_vec();
        json.extend_from_slice(br#"{"name":"","type":"chunk"},"#.repeat(MAX_ENTRIES).as_slice());
        json.extend_from_slice(br#"{"name":"","type":"chunk"}]}"#);
        let dialect = Dialect {
            codec: Codec::Zstd,
            stargz: false,
        };
        let error = index(&json, &dialect, 0, 0).unwrap_err().to_string();
        assert!(error.contains("it has more than 2097152 entries"), "{error}");
    }
}
