//! Times of change, as the unpacker sets them: within limits, and those of directories at the end.

use super::path::{MAX_PATH_LEN, split};
use super::{Entry, Fault, LAST_SECOND, NO_INO, TreeBuilder, text_at};
use crate::layer::index::Ino;

/// The time of a directory that was described, and then replaced.
pub(super) struct Late {
    /// Number of the entry.
    entry: u32,
    path: Vec<u8>,
    mtime: i64,
    mtime_nsec: u32,
}

impl TreeBuilder {
    /// Remembers the times of a directory that is to be replaced, and of those in it: the unpacker sets those of all directories at the end,
    /// on whatever then has their names.
    pub(super) fn keep_times(&mut self, ino: Ino, path: &[u8]) -> Result<(), Fault> {
        if !self.is_dir(ino) {
            return Ok(());
        }
        let mut dirs = vec![(ino, path.to_vec())];
        while let Some((dir, path)) = dirs.pop() {
            let node = &self.nodes[dir as usize - 1];
            let mut at = node.last_name;
            while let Some(name) = self.names.get(at as usize) {
                at = name.next;
                let len = path.len() + 1 + name.len as usize;
                // Longer ones cannot be found by their names.
                if name.ino == NO_INO || len > MAX_PATH_LEN || !self.is_dir(name.ino) {
                    continue;
                }
                self.allowance.take((size_of::<Late>() * 2 + len) as u64)?;
                let text = text_at(&self.strings, name.text, name.len);
                dirs.push((name.ino, [&path, &b"/"[..], text].concat()));
            }
            if node.described != 0 {
                self.late.push(Late {
                    entry: node.described,
                    path,
                    mtime: node.inode.mtime,
                    mtime_nsec: node.inode.mtime_nsec,
                });
            }
        }
        Ok(())
    }

    /// Sets the times of directories that were replaced, in the order of their entries.
    pub(super) fn set_late_times(&mut self) {
        let mut late = std::mem::take(&mut self.late);
        late.sort_by_key(|late| late.entry);
        for Late {
            entry,
            path,
            mtime,
            mtime_nsec,
        } in late
        {
            let (parents, base) = split(&path);
            // What is not there any more, the unpacker fails at.
            let Ok(Some(dir)) = self.walk(parents, false) else {
                continue;
            };
            let Some(name) = self.find(dir, base) else { continue };
            let mut ino = self.names[name as usize].ino;
            if self.inode(ino).is_symlink() {
                match self.walk(&path, false) {
                    Ok(Some(target)) => ino = target,
                    _ => continue,
                }
            }
            let node = &mut self.nodes[ino as usize - 1];
            if node.described < entry {
                (node.inode.mtime, node.inode.mtime_nsec) = (mtime, mtime_nsec);
                if node.inode.is_dir() {
                    node.described = entry;
                }
            }
        }
    }
}

/// An entry's time within what the unpacker sets; the epoch if it is outside.
pub(super) fn bounded_time(entry: &Entry<'_>) -> (i64, u32) {
    match (entry.mtime, entry.mtime_nsec) {
        (0..LAST_SECOND, nsec @ 0..1_000_000_000) => (entry.mtime, nsec),
        _ => (0, 0),
    }
}
