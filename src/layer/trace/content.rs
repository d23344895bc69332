//! What is known of a file's content without its bytes: from the digests of its chunks.
//!
//! A file that is one chunk has the beginning of its own SHA-256, whatever the format and whoever made the layer. One of several chunks has a
//! digest over theirs: the next image of a repository, made by the same builder, has the same (eStargz cuts at multiples of its chunk size,
//! zstd:chunked where the content says so), and for other layers it is no more than another content. Where a chunk holds more than the file (spans
//! of plain layers, SOCI), or its digest is that of compressed bytes, nothing is known.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::layer::digest::Hasher;
use crate::layer::{Digest, Inode, LayerIndex, Verify};

/// The beginning of a digest that tells the content of a file from others of the same size. Among a million files, sixty thousand that are looked
/// for meet one that only seems to be the same once in 2^28 images, and that costs the bytes of a needless wish; all of a digest would make up most
/// of a trace.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Content(u64);

impl Content {
    /// That of a file with this digest.
    pub fn of(digest: &Digest) -> Self {
        let beginning = digest.as_bytes().first_chunk().copied();
        Content(u64::from_be_bytes(beginning.unwrap_or_default()))
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Content {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        let is_hex = text.len() == 16 && text.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'));
        let number = is_hex.then(|| u64::from_str_radix(&text, 16).ok()).flatten();
        number
            .map(Content)
            .ok_or_else(|| serde::de::Error::custom("a content is not 16 hex digits"))
    }
}

/// Asks one layer for contents, and takes no longer than it has names and chunks: files may share their bytes, and names a file.
pub(super) struct Contents<'a> {
    names: &'a LayerIndex,
    /// Chunks that may still be looked at.
    left: usize,
}

impl<'a> Contents<'a> {
    pub(super) fn of(names: &'a LayerIndex) -> Self {
        let parts = names.parts();
        // Each file is asked for by its path and among the others; where nothing is shared, nobody is refused.
        let left = 2 * (parts.chunks.len() + parts.inodes.len() + parts.dirents.len());
        let left = if names.verify() == Verify::Content { left } else { 0 };
        Contents { names, left }
    }

    /// The content of a file; `None` if it is not known.
    pub(super) fn get(&mut self, inode: &Inode) -> Option<Content> {
        if !inode.is_reg() || inode.size == 0 {
            return None;
        }
        let at = self.names.chunks_at(inode.data, inode.size);
        self.left = self.left.checked_sub(1 + at.len())?;
        let chunks = self.names.chunks().get(at)?;
        let end = inode.data.checked_add(inode.size)?;
        // Of one that is all zeros nothing is ever fetched.
        let (first, last) = chunks.first().zip(chunks.last())?;
        if first.data_offset < inode.data || last.data_end() > end {
            return None;
        }
        if let [chunk] = chunks
            && u64::from(chunk.data_len) == inode.size
        {
            return Some(Content::of(&chunk.digest));
        }
        let mut hasher = Hasher::new();
        hasher.update(&inode.size.to_le_bytes());
        for chunk in chunks {
            // What lies between them is zeros.
            hasher.update(&(chunk.data_offset - inode.data).to_le_bytes());
            hasher.update(&chunk.data_len.to_le_bytes());
            hasher.update(chunk.digest.as_bytes());
        }
        Some(Content::of(&hasher.finish()))
    }
}
