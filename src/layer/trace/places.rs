//! From ranges of data spaces to files and ranges of them.

use std::collections::HashMap;

use super::content::{Content, Contents};
use super::{Entry, FORGET_AFTER, File, MAX_PATH_LEN, Trace, Wish};
use crate::layer::{Digest, Ino, LayerIndex, ROOT_INO};

/// How well the reads of a layer were seen in one start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sight {
    /// All that the container read was seen, and nothing else.
    Clear,
    /// Some of it may have been read without Lazuli, or something by others.
    Blurred,
}

/// A range of a layer's data space that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Position of the layer.
    pub layer: usize,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Milliseconds from the beginning.
    pub at: u32,
}

/// A layer that was looked at.
pub struct Looked<'a> {
    /// Digest of its blob.
    pub digest: Digest,
    /// How well.
    pub sight: Sight,
    /// Its names; `None`: nothing of it was read.
    pub names: Option<&'a LayerIndex>,
}

/// What one start has read, as a trace: `seen` are ranges of the data spaces of `layers`.
pub fn observe(
    (repository, manifest, entry): (&str, Digest, Entry),
    recorded: u64,
    layers: &[Looked<'_>],
    seen: &[Seen],
) -> Trace {
    let mut trace = Trace {
        repository: repository.to_owned(),
        manifest,
        entry,
        starts: 1,
        recorded,
        layers: layers.iter().map(|layer| layer.digest).collect(),
        files: Vec::new(),
        wishes: Vec::new(),
    };
    let mut maps: Vec<Option<Map<'_>>> = layers.iter().map(|layer| layer.names.map(Map::of)).collect();
    let mut numbers: HashMap<(usize, Ino), Option<u32>> = HashMap::new();
    for read in seen {
        let (Some(Some(map)), Some(layer)) = (maps.get_mut(read.layer), layers.get(read.layer)) else {
            continue;
        };
        for (ino, offset, len) in map.files_in(read.offset, read.len) {
            let number = *numbers.entry((read.layer, ino)).or_insert_with(|| {
                // What a text cannot name is not wished for.
                let path = map.path(ino)?;
                trace.files.push(File {
                    layer: read.layer as u32,
                    path,
                    size: map.size(ino),
                    content: map.content(ino),
                });
                Some(trace.files.len() as u32 - 1)
            });
            if let Some(file) = number {
                trace.wishes.push(Wish {
                    file,
                    offset,
                    len,
                    at: read.at,
                    missed: match layer.sight {
                        Sight::Clear => 0,
                        Sight::Blurred => FORGET_AFTER - 1,
                    },
                });
            }
        }
    }
    trace.tidy();
    trace
}

/// Files of a layer by where they are, and their paths.
struct Map<'a> {
    names: &'a LayerIndex,
    contents: Contents<'a>,
    /// Regular files with content, by its place in the data space.
    files: Vec<(u64, u64, Ino)>,
    /// The directory and name of an inode.
    holders: HashMap<Ino, (Ino, &'a [u8])>,
}

impl<'a> Map<'a> {
    fn of(names: &'a LayerIndex) -> Self {
        let inodes = || (ROOT_INO..).zip(names.inodes());
        let regular = inodes().filter(|(_, inode)| inode.is_reg() && inode.size > 0);
        let mut files: Vec<_> = regular
            .map(|(ino, inode)| (inode.data, inode.data.saturating_add(inode.size), ino))
            .collect();
        files.sort_unstable();
        let mut holders = HashMap::new();
        for (dir, inode) in inodes() {
            for entry in names.entries(inode) {
                holders.entry(entry.ino).or_insert((dir, names.name(entry)));
            }
        }
        Map {
            names,
            contents: Contents::of(names),
            files,
            holders,
        }
    }

    /// Files with any of these bytes, and which of theirs.
    fn files_in(&self, offset: u64, len: u64) -> Vec<(Ino, u64, u64)> {
        let end = offset.saturating_add(len);
        let first = self.files.partition_point(|&(_, until, _)| until <= offset);
        let within = self.files[first..].iter().take_while(|(from, _, _)| *from < end);
        let part = |&(from, until, ino): &(u64, u64, Ino)| {
            let (begin, until) = (from.max(offset), until.min(end));
            (ino, begin - from, until - begin)
        };
        within.map(part).collect()
    }

    fn content(&mut self, ino: Ino) -> Option<Content> {
        self.contents.get(self.names.inode(ino)?)
    }

    fn size(&self, ino: Ino) -> u64 {
        self.names.inode(ino).map_or(0, |inode| inode.size)
    }

    fn path(&self, ino: Ino) -> Option<String> {
        let (mut at, mut parts, mut len) = (ino, Vec::new(), 0);
        while at != ROOT_INO {
            let (dir, name) = self.holders.get(&at)?;
            let name = std::str::from_utf8(name).ok()?;
            len += name.len() + 1;
            if len > MAX_PATH_LEN {
                return None;
            }
            parts.push(name);
            at = *dir;
        }
        parts.reverse();
        Some(parts.join("/"))
    }
}
