//! From ranges of data spaces to files and ranges of them, and back.

use std::collections::{HashMap, HashSet};

use super::{Entry, FORGET_AFTER, File, MAX_PATH_LEN, Trace, Wish};
use crate::layer::{Digest, Ino, LayerIndex, ROOT_INO};

/// Where another image has another version of a file, all of it is wished for if so many percent of it were.
const WHOLE_PERCENT: u64 = 90;

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

/// Where a wish lies in a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// Position of the wish in the trace: they are to be had in this order.
    pub wish: usize,
    /// First byte of the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Bytes of the file here.
    pub size: u64,
    /// First byte in the data space.
    pub data: u64,
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
    let maps: Vec<Option<Map<'_>>> = layers.iter().map(|layer| layer.names.map(Map::of)).collect();
    let mut numbers: HashMap<(usize, Ino), Option<u32>> = HashMap::new();
    for read in seen {
        let (Some(Some(map)), Some(layer)) = (maps.get(read.layer), layers.get(read.layer)) else {
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
        Map { names, files, holders }
    }

    /// Files with any of these bytes, and which of theirs.
    fn files_in(&self, offset: u64, len: u64) -> impl Iterator<Item = (Ino, u64, u64)> {
        let end = offset.saturating_add(len);
        let first = self.files.partition_point(|&(_, until, _)| until <= offset);
        let within = self.files[first..].iter().take_while(move |(from, _, _)| *from < end);
        within.map(move |&(from, until, ino)| {
            let (begin, until) = (from.max(offset), until.min(end));
            (ino, begin - from, until - begin)
        })
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

impl Trace {
    /// Where its wishes lie in the layer with this digest, one of an image with the layers `image`. A layer that it does not know is searched for
    /// the files of those that the image does not have.
    pub fn placed(&self, layer: &Digest, names: &LayerIndex, image: &HashSet<Digest>) -> Vec<Placed> {
        let known = self.layers.contains(layer);
        let concerned = |at: u32| match self.layers.get(at as usize) {
            Some(digest) if known => digest == layer,
            Some(digest) => !image.contains(digest),
            None => false,
        };
        // How much of a file is wished for.
        let mut wished: HashMap<u32, u64> = HashMap::new();
        for wish in &self.wishes {
            *wished.entry(wish.file).or_default() += wish.len;
        }
        let mut found: HashMap<u32, Option<(u64, u64)>> = HashMap::new();
        let mut placed = Vec::new();
        let mut whole = HashSet::new();
        for (at, wish) in self.wishes.iter().enumerate() {
            let Some(file) = self.files.get(wish.file as usize).filter(|file| concerned(file.layer)) else {
                continue;
            };
            let place = *found.entry(wish.file).or_insert_with(|| {
                let inode = names.inode(names.lookup_path(file.path.as_bytes())?)?;
                (inode.is_reg() && inode.size > 0).then_some((inode.data, inode.size))
            });
            let Some((data, size)) = place else { continue };
            let all = wished.get(&wish.file).copied().unwrap_or(0);
            let (offset, len) = if size != file.size && all.saturating_mul(100) >= file.size * WHOLE_PERCENT {
                if !whole.insert(wish.file) {
                    continue;
                }
                (0, size)
            } else {
                (wish.offset, wish.len.min(size.saturating_sub(wish.offset)))
            };
            if len > 0 {
                placed.push(Placed {
                    wish: at,
                    offset,
                    len,
                    size,
                    data: data.saturating_add(offset),
                });
            }
        }
        placed
    }

    /// Its wishes of a layer that it knows, where nobody needs to know where they lie: the layer is the same.
    pub fn known(&self, layer: &Digest) -> Option<Vec<Placed>> {
        let number = self.layers.iter().position(|digest| digest == layer)?;
        let place = |(wish, of): (usize, &Wish)| {
            let file = self.files.get(of.file as usize)?;
            (file.layer as usize == number).then_some(Placed {
                wish,
                offset: of.offset,
                len: of.len,
                size: file.size,
                data: 0,
            })
        };
        Some(self.wishes.iter().enumerate().filter_map(place).collect())
    }

    /// The same for another image, of what was found in its layers.
    pub fn moved(&self, manifest: Digest, found: &[(Digest, Vec<Placed>)]) -> Trace {
        let mut moved = Trace {
            manifest,
            layers: Vec::new(),
            files: Vec::new(),
            wishes: Vec::new(),
            ..self.clone()
        };
        for (digest, placed) in found {
            let mut numbers: HashMap<u32, u32> = HashMap::new();
            for place in placed {
                let Some((wish, file)) = self
                    .wishes
                    .get(place.wish)
                    .and_then(|wish| Some((wish, self.files.get(wish.file as usize)?)))
                else {
                    continue;
                };
                let number = *numbers.entry(wish.file).or_insert_with(|| {
                    moved.files.push(File {
                        layer: moved.layers.len() as u32,
                        path: file.path.clone(),
                        size: place.size,
                    });
                    moved.files.len() as u32 - 1
                });
                moved.wishes.push(Wish {
                    file: number,
                    offset: place.offset,
                    len: place.len,
                    ..*wish
                });
            }
            moved.layers.push(*digest);
        }
        moved.tidy();
        moved
    }
}
