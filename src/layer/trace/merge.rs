//! A trace and one more start.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::{Content, FORGET_AFTER, File, Trace, Wish};
use crate::layer::Digest;

/// What is known of one file.
#[derive(Default)]
struct Known {
    size: u64,
    content: Option<Content>,
    old: Vec<Wish>,
    new: Vec<Wish>,
}

impl Trace {
    /// The same after one more start, which has read `new` and seen the layers `clear` clearly.
    pub fn merged(&self, new: &Trace, clear: &HashSet<Digest>) -> Trace {
        let mut known: BTreeMap<(Digest, &str), Known> = BTreeMap::new();
        for wish in &self.wishes {
            if let Some((file, layer)) = self.file(wish) {
                let known = known.entry((layer, &file.path)).or_default();
                known.size = file.size;
                known.content = file.content;
                known.old.push(*wish);
            }
        }
        for wish in &new.wishes {
            if let Some((file, layer)) = new.file(wish) {
                let known = known.entry((layer, &file.path)).or_default();
                known.size = file.size;
                // An index that does not know it takes nothing from one that did.
                known.content = file.content.or(known.content);
                known.new.push(*wish);
            }
        }
        let mut merged = Trace {
            starts: self.starts.saturating_add(new.starts),
            layers: Vec::new(),
            files: Vec::new(),
            wishes: Vec::new(),
            ..new.clone()
        };
        let mut layers: HashMap<Digest, u32> = HashMap::new();
        for ((layer, path), known) in known {
            let wishes = known.merged(clear.contains(&layer));
            if wishes.is_empty() {
                continue;
            }
            let number = *layers.entry(layer).or_insert_with(|| {
                merged.layers.push(layer);
                merged.layers.len() as u32 - 1
            });
            let file = merged.files.len() as u32;
            merged.files.push(File {
                layer: number,
                path: path.to_owned(),
                size: known.size,
                content: known.content,
            });
            merged
                .wishes
                .extend(wishes.into_iter().map(|wish| Wish { file, ..wish }));
        }
        merged.tidy();
        merged
    }
}

impl Known {
    /// Its ranges after the start: what was read, and what may be read again.
    fn merged(&self, is_clear: bool) -> Vec<Wish> {
        let mut out = Vec::new();
        for wish in &self.new {
            if is_clear {
                out.push(Wish { missed: 0, ..*wish });
                continue;
            }
            // What others may have read changes nothing of what is known.
            let mut unknown = vec![*wish];
            for old in &self.old {
                out.extend(common(wish, old).map(|part| Wish {
                    missed: old.missed,
                    at: wish.at.min(old.at),
                    ..part
                }));
                unknown = unknown.iter().flat_map(|part| without(part, old)).collect();
            }
            out.extend(unknown.into_iter().map(|part| Wish {
                missed: FORGET_AFTER - 1,
                ..part
            }));
        }
        for old in &self.old {
            let mut unread = vec![*old];
            for wish in &self.new {
                unread = unread.iter().flat_map(|part| without(part, wish)).collect();
            }
            let missed = old.missed.saturating_add(u8::from(is_clear));
            if missed < FORGET_AFTER {
                out.extend(unread.into_iter().map(|part| Wish { missed, ..part }));
            }
        }
        joined(out)
    }
}

/// The part of `wish` that `other` has as well.
fn common(wish: &Wish, other: &Wish) -> Option<Wish> {
    let from = wish.offset.max(other.offset);
    let to = wish.end().min(other.end());
    (from < to).then(|| Wish {
        offset: from,
        len: to - from,
        ..*wish
    })
}

/// The parts of `wish` that `other` does not have.
fn without(wish: &Wish, other: &Wish) -> Vec<Wish> {
    let before = wish.offset..wish.end().min(other.offset);
    let after = wish.offset.max(other.end())..wish.end();
    let parts = [before, after].into_iter().filter(|range| range.start < range.end);
    parts
        .map(|range| Wish {
            offset: range.start,
            len: range.end - range.start,
            ..*wish
        })
        .collect()
}

/// Ranges of one file, those that touch each other and are missed alike as one.
fn joined(mut wishes: Vec<Wish>) -> Vec<Wish> {
    wishes.sort_by_key(|wish| wish.offset);
    let mut out: Vec<Wish> = Vec::with_capacity(wishes.len());
    for wish in wishes {
        match out.last_mut() {
            Some(last) if last.end() >= wish.offset && last.missed == wish.missed => {
                last.len = last.end().max(wish.end()) - last.offset;
                last.at = last.at.min(wish.at);
            }
            _ => out.push(wish),
        }
    }
    out
}
