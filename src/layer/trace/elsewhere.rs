//! Files that are no longer where they were: found in a layer by their content.
//!
//! A directory has a version in its name, a library has one, a file is in another directory: the path is gone, the bytes are the same. What is looked
//! for decides how much is remembered, never how many names the layer has; they are walked through once, and only files of a size that is looked
//! for are asked for their content.
//!
//! # The same content under many names
//! Licences, modules that are empty but for a line, hard links. Paths are compared from their last name backwards (`os.py/python3.11/lib/usr`): each
//! file of the layer is offered to the one that it has the longest beginning in common with, and that keeps the best of what it is offered. So the
//! same name comes before the same directory, a whole tree that was renamed is found file by file, no file is two others, and what more there
//! is of a content is left alone.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::content::{Content, Contents};
use super::{File, MAX_PATH_LEN};
use crate::layer::{LayerIndex, ROOT_INO};

/// Files of a layer, with a content that is looked for, of which the paths are compared: names of one content may be without end, and each costs a
/// path. A layer of the largest images known has no more files at all.
const COMPARED: usize = 1 << 20;

/// A file that is looked for: its path, backwards, and its position in the trace.
type Missing = (Vec<u8>, u32);

/// Where else the content of a file is.
#[derive(Debug)]
pub(super) struct Elsewhere {
    /// Position of the file in the trace.
    pub file: u32,
    /// Bytes that both paths have in common, from the last name backwards.
    pub common: usize,
    /// Whether it has the same name, in another directory.
    pub is_namesake: bool,
    /// Its path here.
    pub path: Arc<str>,
    /// Where its content begins in the data space.
    pub data: u64,
}

/// Looks for the contents of `missing` in a layer. What is at one of the places `taken` in its data space is wished for already.
pub(super) fn search<'t>(
    names: &LayerIndex,
    missing: impl Iterator<Item = (u32, &'t File)>,
    taken: &HashSet<u64>,
    contents: &mut Contents<'_>,
) -> Vec<Elsewhere> {
    let mut wanted: HashMap<(u64, Content), Vec<Missing>> = HashMap::new();
    for (number, file) in missing {
        if let Some(content) = file.content {
            let parts: Vec<&[u8]> = file.path.as_bytes().split(|&c| c == b'/').collect();
            let files = wanted.entry((file.size, content)).or_default();
            files.push((backwards(&parts), number));
        }
    }
    if wanted.is_empty() {
        return Vec::new();
    }
    wanted.values_mut().for_each(|files| files.sort_unstable());
    let sizes: HashSet<u64> = wanted.keys().map(|(size, _)| *size).collect();
    let mut best: HashMap<u32, Elsewhere> = HashMap::new();
    let mut left = COMPARED;
    // The path of the directory, and its length: what no program can name is not looked at, so that no path takes long.
    let (mut parts, mut len): (Vec<&[u8]>, usize) = (Vec::new(), 0);
    let mut dirs = vec![names.inode(ROOT_INO).map_or(&[][..], |root| names.entries(root)).iter()];
    while let Some(entries) = dirs.last_mut() {
        let Some(entry) = entries.next() else {
            dirs.pop();
            len -= parts.pop().map_or(0, |name| name.len() + 1);
            continue;
        };
        let Some(inode) = names.inode(entry.ino) else { continue };
        let name = names.name(entry);
        if len + name.len() > MAX_PATH_LEN {
            continue;
        }
        if inode.is_dir() {
            parts.push(name);
            len += name.len() + 1;
            dirs.push(names.entries(inode).iter());
            continue;
        }
        if !inode.is_reg() || !sizes.contains(&inode.size) || taken.contains(&inode.data) {
            continue;
        }
        let files = contents
            .get(inode)
            .and_then(|content| wanted.get(&(inode.size, content)));
        let Some(files) = files else { continue };
        if left == 0 {
            break;
        }
        left -= 1;
        parts.push(name);
        if let Some(place) = offer(files, &parts, inode.data)
            && best.get(&place.file).is_none_or(|known| place.common > known.common)
        {
            best.insert(place.file, place);
        }
        parts.pop();
    }
    // Of several names of one file, the best.
    let mut found: Vec<Elsewhere> = best.into_values().collect();
    found.sort_unstable_by_key(|place| (Reverse(place.common), place.file));
    let mut places = HashSet::new();
    found.retain(|place| places.insert(place.data));
    found
}

/// The one of `files`, which are in order, that the file at a path is nearest to.
fn offer(files: &[Missing], parts: &[&[u8]], data: u64) -> Option<Elsewhere> {
    let path = std::str::from_utf8(&parts.join(&b'/')).ok()?.into();
    let own = backwards(parts);
    let at = files.partition_point(|(other, _)| *other < own);
    // Nothing has more in common with it than its neighbours.
    let near = files[at.saturating_sub(1)..].iter().take(2);
    let (common, other, file) = near
        .map(|(other, file)| (common(other, &own), other, *file))
        .max_by_key(|(common, _, file)| (*common, Reverse(*file)))?;
    let name = |path: &[u8]| path.split(|&c| c == b'/').next().map(<[u8]>::len);
    Some(Elsewhere {
        file,
        common,
        is_namesake: name(&own) == name(other) && name(&own).is_some_and(|len| len <= common),
        path,
        data,
    })
}

/// A path from its last name on.
fn backwards(parts: &[&[u8]]) -> Vec<u8> {
    let mut parts = parts.to_vec();
    parts.reverse();
    parts.join(&b'/')
}

/// Bytes at the beginning that both have.
fn common(one: &[u8], other: &[u8]) -> usize {
    one.iter().zip(other).take_while(|(one, other)| one == other).count()
}
