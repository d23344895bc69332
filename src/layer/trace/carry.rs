//! A trace and the layers of another image: what of it is found there.
//!
//! A layer that both images have is read as before. Of the files of the others
//! - what is at its path is wished for as soon as its layer is there. If it is the same, or nothing else is known, the same ranges of it; if it has
//!   another size or another content, all of it if nearly all was read, and otherwise the same ranges, as far as they go: what a program reads of
//!   a file it mostly finds by the same way in the next version of it.
//! - What is nowhere at its path as it was is looked for by its content ([`super::elsewhere`]), once all layers have come: until then another one may
//!   have it at its path. If there is another content at the path, that is what will be opened, and its old content is followed to a file of the
//!   same name alone.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use super::content::Contents;
use super::elsewhere::{Elsewhere, search};
use super::{Content, File, Trace, Wish};
use crate::layer::{Digest, LayerIndex};

#[cfg(test)]
mod tests;

/// Where another image has another version of a file, all of it is wished for if so many percent of it were.
const WHOLE_PERCENT: u64 = 90;

/// Where a wish lies in a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// Content of the file here, if it is known.
    pub content: Option<Content>,
    /// Path of the file here, if it is not that of the trace.
    pub path: Option<Arc<str>>,
}

/// What of a trace was found in one layer.
#[derive(Debug, Default)]
pub struct Found {
    /// Wishes of files that are at their paths.
    placed: Vec<Placed>,
    /// Those of these files whose layer the image does not have, and whether each has changed.
    at_path: Vec<(u32, bool)>,
    elsewhere: Vec<Elsewhere>,
}

impl Found {
    /// What was found without a look at names.
    pub fn known(placed: Vec<Placed>) -> Self {
        Found {
            placed,
            ..Found::default()
        }
    }
}

/// A file at its path in another image.
#[derive(Clone, Copy)]
struct Here {
    data: u64,
    size: u64,
    content: Option<Content>,
    is_changed: bool,
}

impl Trace {
    /// What of it is in the layer with this digest, one of an image with the layers `image`. A layer that it does not know is searched for
    /// the files of those that the image does not have.
    pub fn found_in(&self, layer: &Digest, names: &LayerIndex, image: &HashSet<Digest>) -> Found {
        let is_known = self.layers.contains(layer);
        let concerned = |file: &&File| match self.layers.get(file.layer as usize) {
            Some(digest) if is_known => digest == layer,
            Some(digest) => !image.contains(digest),
            None => false,
        };
        // How much of a file is wished for.
        let mut wished: HashMap<u32, u64> = HashMap::new();
        for wish in &self.wishes {
            *wished.entry(wish.file).or_default() += wish.len;
        }
        let mut contents = Contents::of(names);
        let mut here: HashMap<u32, Option<Here>> = HashMap::new();
        let mut found = Found::default();
        let mut whole = HashSet::new();
        for (at, wish) in self.wishes.iter().enumerate() {
            let Some(file) = self.files.get(wish.file as usize).filter(concerned) else {
                continue;
            };
            let place = *here.entry(wish.file).or_insert_with(|| {
                let inode = names.inode(names.lookup_path(file.path.as_bytes())?)?;
                if !inode.is_reg() || inode.size == 0 {
                    return None;
                }
                let content = contents.get(inode);
                let differs = content.zip(file.content).is_some_and(|(here, there)| here != there);
                Some(Here {
                    data: inode.data,
                    size: inode.size,
                    content,
                    is_changed: inode.size != file.size || differs,
                })
            });
            let Some(place) = place else { continue };
            let all = wished.get(&wish.file).copied().unwrap_or(0);
            let (offset, len) = if place.is_changed && all.saturating_mul(100) >= file.size * WHOLE_PERCENT {
                if !whole.insert(wish.file) {
                    continue;
                }
                (0, place.size)
            } else {
                (wish.offset, wish.len.min(place.size.saturating_sub(wish.offset)))
            };
            if len > 0 {
                found.placed.push(Placed {
                    wish: at,
                    offset,
                    len,
                    size: place.size,
                    data: place.data.saturating_add(offset),
                    content: place.content,
                    path: None,
                });
            }
        }
        if is_known {
            return found;
        }
        let there = here.iter().filter_map(|(number, place)| Some((*number, (*place)?)));
        found.at_path = there
            .clone()
            .map(|(number, place)| (number, place.is_changed))
            .collect();
        // Who finds something at its path needs no other name for it.
        let taken: HashSet<u64> = there.map(|(_, place)| place.data).collect();
        let missing = here
            .iter()
            .filter(|(_, place)| place.is_none_or(|place| place.is_changed));
        let missing = missing.filter_map(|(number, _)| Some((*number, self.files.get(*number as usize)?)));
        found.elsewhere = search(names, missing, &taken, &mut contents);
        found
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
                content: file.content,
                path: None,
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
        let mut layers: HashMap<Digest, u32> = HashMap::new();
        let mut numbers: HashMap<(u32, u32, Option<&str>), u32> = HashMap::new();
        for (digest, placed) in found {
            let layer = *layers.entry(*digest).or_insert_with(|| {
                moved.layers.push(*digest);
                moved.layers.len() as u32 - 1
            });
            for place in placed {
                let Some((wish, file)) = self
                    .wishes
                    .get(place.wish)
                    .and_then(|wish| Some((wish, self.files.get(wish.file as usize)?)))
                else {
                    continue;
                };
                let path = place.path.as_deref();
                let number = *numbers.entry((layer, wish.file, path)).or_insert_with(|| {
                    moved.files.push(File {
                        layer,
                        path: path.unwrap_or(&file.path).to_owned(),
                        size: place.size,
                        content: place.content,
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
        }
        moved.tidy();
        moved
    }
}

/// How many files of layers that the image does not have were found, and how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// At their path, as they were as far as is known.
    pub same: u64,
    /// At their path, with another size or content.
    pub changed: u64,
    /// Under another path.
    pub moved: u64,
    /// Not at all.
    pub gone: u64,
}

/// A trace that is being carried to an image: what was found in those of its layers that have come.
pub struct Carried {
    trace: Arc<Trace>,
    image: Arc<HashSet<Digest>>,
    /// Files that are at their path: in which layer, and whether they have changed.
    at_path: HashMap<u32, (usize, bool)>,
    /// Where else the content of files is: in which layer, and where there.
    elsewhere: HashMap<u32, (usize, Elsewhere)>,
}

impl Carried {
    /// Nothing has come yet of an image with the layers `image`.
    pub fn new(trace: Arc<Trace>, image: Arc<HashSet<Digest>>) -> Self {
        Carried {
            trace,
            image,
            at_path: HashMap::new(),
            elsewhere: HashMap::new(),
        }
    }

    /// Takes in what was found in a layer, the `layer`th from below; what of that is to be had at once.
    pub fn take(&mut self, layer: usize, found: Found) -> Vec<Placed> {
        let mut hidden = HashSet::new();
        for (file, is_changed) in found.at_path {
            match self.at_path.get(&file) {
                // A container sees what is above.
                Some((above, _)) if *above > layer => {
                    hidden.insert(file);
                }
                _ => {
                    self.at_path.insert(file, (layer, is_changed));
                }
            }
        }
        for place in found.elsewhere {
            let file = place.file;
            let better = |(other, known): &(usize, Elsewhere)| (place.common, layer) > (known.common, *other);
            if self.elsewhere.get(&file).is_none_or(better) {
                self.elsewhere.insert(file, (layer, place));
            }
        }
        let mut placed = found.placed;
        if !hidden.is_empty() {
            let file = |place: &Placed| self.trace.wishes.get(place.wish).map(|wish| wish.file);
            placed.retain(|place| file(place).is_none_or(|file| !hidden.contains(&file)));
        }
        placed
    }

    /// All layers have come, or will not: what is to be had of files that are not at their path as they were, by layer; and what was found in all.
    pub fn rest(mut self) -> (Vec<(usize, Vec<Placed>)>, Counts) {
        let at_path = &self.at_path;
        self.elsewhere.retain(|file, (_, place)| match at_path.get(file) {
            Some((_, is_changed)) => *is_changed && place.is_namesake,
            None => true,
        });
        let mut rest: BTreeMap<usize, Vec<Placed>> = BTreeMap::new();
        for (at, wish) in self.trace.wishes.iter().enumerate() {
            let Some(((layer, place), file)) = self
                .elsewhere
                .get(&wish.file)
                .zip(self.trace.files.get(wish.file as usize))
            else {
                continue;
            };
            rest.entry(*layer).or_default().push(Placed {
                wish: at,
                offset: wish.offset,
                len: wish.len,
                size: file.size,
                data: place.data.saturating_add(wish.offset),
                content: file.content,
                path: Some(Arc::clone(&place.path)),
            });
        }
        let counts = self.counts();
        (rest.into_iter().collect(), counts)
    }

    fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for (number, file) in (0u32..).zip(&self.trace.files) {
            let layer = self.trace.layers.get(file.layer as usize);
            if layer.is_none_or(|layer| self.image.contains(layer)) {
                continue;
            }
            match (self.at_path.get(&number), self.elsewhere.contains_key(&number)) {
                (_, true) => counts.moved += 1,
                (Some((_, true)), _) => counts.changed += 1,
                (Some((_, false)), _) => counts.same += 1,
                (None, _) => counts.gone += 1,
            }
        }
        counts
    }
}
