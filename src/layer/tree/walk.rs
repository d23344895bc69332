//! The way to a name: through directories, over symlinks, and through what is made because it is missing.

use std::borrow::Cow;

use super::path::{clean, lexical, quoted, split};
use super::{EntryKind, Fault, IMPLIED_DIR_MODE, MAX_LINKS, SETGID, TreeBuilder, bad};
use crate::layer::index::{Ino, ROOT_INO, flags, valid_name};

impl TreeBuilder {
    /// The directory at `path`. Symlinks are followed inside the root. What is missing is made, or is the answer `None`.
    pub(super) fn walk(&mut self, path: &[u8], make: bool) -> Result<Option<Ino>, Fault> {
        let mut dir = ROOT_INO;
        let mut links = 0;
        let mut path = Cow::Borrowed(path);
        'path: loop {
            let mut end = 0;
            for part in path.split(|&c| c == b'/') {
                end += part.len() + 1;
                if matches!(part, b"" | b".") {
                    continue;
                }
                if part == b".." {
                    dir = self.inode(dir).parent;
                    continue;
                }
                let Some(name) = self.find(dir, part) else {
                    if !make {
                        return Ok(None);
                    }
                    dir = self.imply(dir, part)?;
                    continue;
                };
                let ino = self.names[name as usize].ino;
                if make && self.inode(ino).flags & flags::WHITEOUT != 0 {
                    self.remove(name);
                    dir = self.imply(dir, part)?;
                    self.set_opaque(dir)?;
                    continue;
                }
                if self.is_dir(ino) {
                    dir = ino;
                    continue;
                }
                if !self.inode(ino).is_symlink() {
                    return bad(format!("{} on the way to it is not a directory", quoted(part)));
                }
                links += 1;
                if links > MAX_LINKS {
                    return bad(format!("more than {MAX_LINKS} symlinks are on the way to it"));
                }
                let target_len = self.target(ino).len();
                self.allowance.walk(target_len + path.len() - path.len().min(end))?;
                let target = self.target(ino);
                // `dir` has no symlink on its way: what remains of `..` after cleaning goes up to true parents.
                let mut next = lexical(target, target.first() != Some(&b'/')).0.into_owned();
                if self.target(ino).first() == Some(&b'/') {
                    dir = ROOT_INO;
                }
                next.push(b'/');
                next.extend_from_slice(path.get(end..).unwrap_or_default());
                path = Cow::Owned(next);
                continue 'path;
            }
            return Ok(Some(dir));
        }
    }

    /// Makes a directory that no entry describes.
    pub(super) fn imply(&mut self, dir: Ino, name: &[u8]) -> Result<Ino, Fault> {
        if !valid_name(name) {
            return bad(format!("no directory can be called {}", quoted(name)));
        }
        self.allowance.imply()?;
        let made = self.make_node(dir, EntryKind::Dir)?;
        // As mkdir(2) does it in a directory that hands its group on.
        let parent = *self.inode(dir);
        let inode = self.inode_mut(made);
        (inode.mode, inode.flags) = (IMPLIED_DIR_MODE, flags::IMPLIED);
        inode.gid = if parent.mode & SETGID != 0 { parent.gid } else { 0 };
        self.hand_on_acl(dir, made)?;
        self.fit_acl(made)?;
        self.link(dir, name, made)?;
        Ok(made)
    }

    pub(super) fn hardlink_target(&mut self, target: &[u8]) -> Result<Ino, Fault> {
        let path = clean(target)?;
        let (parents, base) = split(&path);
        let dir = self.walk(parents, false)?;
        let name = dir.and_then(|dir| self.find(dir, base));
        let ino = match name {
            Some(name) => self.names[name as usize].ino,
            None if base.is_empty() => ROOT_INO,
            None => {
                return bad(format!(
                    "it is a hard link to {}, which no entry before it made",
                    quoted(target)
                ));
            }
        };
        if self.is_dir(ino) {
            return bad(format!("it is a hard link to {}, a directory", quoted(target)));
        }
        Ok(ino)
    }
}
