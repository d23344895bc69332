//! From a tree that is being built to the parts of an index.

use super::{NO_INO, Tree, TreeBuilder, text_at};
use crate::layer::index::{Dirent, Ino};

impl TreeBuilder {
    /// The finished tree. Inodes are numbered in the order in which the archive first held them.
    pub fn finish(mut self) -> Tree {
        self.set_late_times();
        // Nobody looks anything up any more, and memory is needed.
        drop(std::mem::take(&mut self.table));
        drop(std::mem::take(&mut self.interned));
        let mut numbers = vec![NO_INO; self.nodes.len() + 1];
        let mut inodes = Vec::with_capacity(self.nodes.len());
        let mut xattrs = Vec::with_capacity(self.xattrs.len());
        for (node, number) in self.nodes.iter().zip(&mut numbers[1..]) {
            let mut inode = node.inode;
            if inode.nlink == 0 {
                continue;
            }
            let own = inode.xattr_first as usize..(inode.xattr_first + inode.xattr_count) as usize;
            inode.xattr_first = xattrs.len() as u32;
            xattrs.extend_from_slice(&self.xattrs[own]);
            inodes.push(inode);
            *number = inodes.len() as Ino;
        }
        drop(std::mem::take(&mut self.nodes));
        for inode in &mut inodes {
            // A parent is never younger than its child, but it may be replaced and come back: the map has all.
            inode.parent = numbers[inode.parent as usize];
        }
        let strings = self.strings;
        let mut names: Vec<(Ino, Dirent)> = Vec::with_capacity(self.names.len());
        for name in self.names.iter().filter(|name| name.ino != NO_INO) {
            let entry = Dirent {
                name: name.text,
                name_len: name.len,
                ino: numbers[name.ino as usize],
            };
            names.push((numbers[name.dir as usize], entry));
        }
        let text = |entry: &Dirent| text_at(&strings, entry.name, entry.name_len);
        names.sort_unstable_by(|(dir, name), (other_dir, other)| {
            dir.cmp(other_dir).then_with(|| text(name).cmp(text(other)))
        });
        for (at, (dir, _)) in names.iter().enumerate() {
            let inode = &mut inodes[*dir as usize - 1];
            if inode.count == 0 {
                inode.data = at as u64;
            }
            inode.count += 1;
        }
        Tree {
            inodes,
            dirents: names.into_iter().map(|(_, entry)| entry).collect(),
            xattrs,
            strings,
        }
    }
}
