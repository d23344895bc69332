//! A second, simple merge to compare with: layers are laid over a tree of maps one after the other, from the lowest up, recursively.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use crate::layer::index::mode;
use crate::layer::{Ino, Inode, LayerIndex, ROOT_INO};

/// What a name stands for.
enum Node {
    Dir(Dir),
    /// Layer and inode.
    Other(usize, Ino),
}

/// A directory: the layer and inode that it looks like, and its names.
struct Dir {
    looks: (usize, Ino),
    names: BTreeMap<Vec<u8>, Node>,
}

/// Lays the directory `ino` of a layer over what is there.
fn lay(layer: (usize, &LayerIndex), ino: Ino, under: Option<Dir>) -> Dir {
    let (at, index) = layer;
    let inode = index.inode(ino).unwrap();
    let opaque = ino != ROOT_INO && index.xattr(inode, b"trusted.overlay.opaque") == Some(b"y");
    let mut names = match under {
        Some(under) if !opaque => under.names,
        _ => BTreeMap::new(),
    };
    for entry in index.entries(inode) {
        let name = index.name(entry).to_vec();
        let found = index.inode(entry.ino).unwrap();
        if found.file_type() == mode::CHR && (found.rdev_major, found.rdev_minor) == (0, 0) {
            names.remove(&name);
        } else if found.is_dir() {
            let under = match names.remove(&name) {
                Some(Node::Dir(dir)) => Some(dir),
                _ => None,
            };
            names.insert(name, Node::Dir(lay(layer, entry.ino, under)));
        } else {
            names.insert(name, Node::Other(at, entry.ino));
        }
    }
    Dir {
        looks: (at, ino),
        names,
    }
}

/// What the merged tree has to be: a line for each path, in their order, except for the bytes of files, of which the place is told.
pub(super) fn expected(layers: &[&LayerIndex]) -> Vec<String> {
    let mut tree = None;
    for (at, index) in layers.iter().enumerate() {
        tree = Some(lay((at, index), ROOT_INO, tree.take()));
    }
    let (mut lines, mut names) = (Vec::new(), BTreeMap::new());
    show(layers, &tree.unwrap(), "", &mut lines, &mut names);
    lines
}

fn show(
    layers: &[&LayerIndex],
    dir: &Dir,
    path: &str,
    lines: &mut Vec<String>,
    first_names: &mut BTreeMap<(usize, Ino), String>,
) {
    let subdirs = dir.names.values().filter(|node| matches!(node, Node::Dir(_))).count();
    let (layer, ino) = dir.looks;
    let inode = layers[layer].inode(ino).unwrap();
    lines.push(line(layers[layer], inode, path, 2 + subdirs as u32, 0, path));
    for (name, node) in &dir.names {
        let path = format!("{path}/{}", name.escape_ascii());
        match node {
            Node::Dir(dir) => show(layers, dir, &path, lines, first_names),
            Node::Other(layer, ino) => {
                let first = match first_names.entry((*layer, *ino)) {
                    Entry::Occupied(first) => first.into_mut(),
                    Entry::Vacant(free) => free.insert(path.clone()),
                };
                let below = layers[..*layer].iter();
                let start: u64 = below.map(|index| index.data_size().div_ceil(512) * 512).sum();
                let inode = layers[*layer].inode(*ino).unwrap();
                lines.push(line(layers[*layer], inode, &path, inode.nlink, start, first));
            }
        }
    }
}

/// What the merged tree is, in the same form.
pub(super) fn picture(index: &LayerIndex) -> Vec<String> {
    let (mut lines, mut names) = (Vec::new(), BTreeMap::new());
    walk(index, ROOT_INO, "", &mut lines, &mut names);
    assert_eq!(names.len(), index.inodes().len(), "an inode has no name");
    lines
}

fn walk(index: &LayerIndex, ino: Ino, path: &str, lines: &mut Vec<String>, first_names: &mut BTreeMap<Ino, String>) {
    let inode = index.inode(ino).unwrap();
    let first = first_names.entry(ino).or_insert_with(|| path.to_owned());
    lines.push(line(index, inode, path, inode.nlink, 0, first));
    for entry in index.entries(inode) {
        let path = format!("{path}/{}", index.name(entry).escape_ascii());
        walk(index, entry.ino, &path, lines, first_names);
    }
}

fn line(index: &LayerIndex, inode: &Inode, path: &str, nlink: u32, start: u64, first: &str) -> String {
    let mut xattrs: Vec<_> = index.xattrs(inode).collect();
    xattrs.retain(|(name, _)| *name != b"trusted.overlay.opaque");
    xattrs.sort();
    let xattrs: Vec<_> = xattrs
        .iter()
        .map(|(name, value)| format!("{}={}", name.escape_ascii(), value.escape_ascii()))
        .collect();
    let place = if inode.is_reg() { inode.data + start } else { 0 };
    format!(
        "{path} {:o} {}:{} x{nlink} {}.{:09} dev {}:{} {}@{place} -> {} = {first} {}",
        inode.mode,
        inode.uid,
        inode.gid,
        inode.mtime,
        inode.mtime_nsec,
        inode.rdev_major,
        inode.rdev_minor,
        inode.size,
        index.target(inode).escape_ascii(),
        xattrs.join(" ")
    )
}
