//! Extended attributes of the inodes of a tree that is being built, access control lists among them.
//!
//! What is made in a directory with a default ACL gets it as its access ACL, and a directory also as its default ACL; then the mode of the
//! entry is set, which changes the access ACL ([`Acl::with_mode`]). Attributes of the entry replace these, and are marked
//! ([`flags::OWN_ACL`], [`flags::OWN_DEFAULT_ACL`]), because a directory of a layer below may have another default ACL to hand on.

use std::hash::BuildHasher;

use super::path::quoted;
use super::{EntryXattr, Fault, INTERNED_COST, TreeBuilder, XATTR_COST, bad, limit, text_at};
use crate::layer::acl::{self, Acl, Parsed};
use crate::layer::index::{Ino, MAX_INODES, MAX_NAME_LEN, Xattr, flags, mode};

/// The attribute by which overlayfs knows an opaque directory, and its value.
pub(in crate::layer) const OPAQUE_XATTR: (&[u8], &[u8]) = (b"trusted.overlay.opaque", b"y");
/// Most extended attributes of one inode. File systems have room for far fewer.
pub(in crate::layer) const MAX_XATTRS: usize = 1024;
/// Longest value of an extended attribute, in bytes (XATTR_SIZE_MAX of Linux).
pub(in crate::layer) const MAX_XATTR_VALUE: usize = 65536;

impl TreeBuilder {
    /// Sets the attributes of an entry, as far as a file takes them.
    pub(super) fn set_xattrs(&mut self, ino: Ino, xattrs: &[EntryXattr<'_>]) -> Result<(), Fault> {
        let file_type = self.inode(ino).file_type();
        for (name, value) in xattrs {
            if !takes_xattr(file_type, name) {
                continue;
            }
            if name.len() > MAX_NAME_LEN || name.contains(&0) || matches!(&name[..], b"user." | b"security.") {
                return bad(format!("no extended attribute can be called {}", quoted(name)));
            }
            if value.len() > MAX_XATTR_VALUE {
                return bad(format!(
                    "extended attribute {} has {} bytes, over the limit of {MAX_XATTR_VALUE}",
                    quoted(name),
                    value.len()
                ));
            }
            let given = match &name[..] {
                acl::ACCESS => flags::OWN_ACL,
                acl::DEFAULT => flags::OWN_DEFAULT_ACL,
                _ => {
                    self.set_xattr(ino, name, value)?;
                    continue;
                }
            };
            match Acl::parse(value) {
                Parsed::List(list) => self.set_xattr(ino, name, list.value())?,
                Parsed::Empty => self.drop_xattr(ino, name),
                Parsed::Ignored => continue,
                Parsed::Invalid => return bad(format!("{} is no access control list", quoted(name))),
            }
            self.inode_mut(ino).flags |= given;
        }
        Ok(())
    }

    /// Gives what was made in `dir` the lists that this hands on.
    pub(super) fn hand_on_acl(&mut self, dir: Ino, ino: Ino) -> Result<(), Fault> {
        if self.inode(ino).is_symlink() || self.inode(dir).xattr_count == 0 {
            return Ok(());
        }
        let Some(list) = self.own_xattr(dir, acl::DEFAULT).map(<[u8]>::to_vec) else {
            return Ok(());
        };
        if self.is_dir(ino) {
            self.set_xattr(ino, acl::DEFAULT, &list)?;
        }
        self.set_xattr(ino, acl::ACCESS, &list)
    }

    /// Makes the access list of an inode fit its mode.
    pub(super) fn fit_acl(&mut self, ino: Ino) -> Result<(), Fault> {
        let inode = *self.inode(ino);
        if inode.xattr_count == 0 {
            return Ok(());
        }
        let Some(list) = self.own_xattr(ino, acl::ACCESS) else {
            return Ok(());
        };
        let list = Acl::of(list);
        if list.is_minimal() {
            self.drop_xattr(ino, acl::ACCESS);
            return Ok(());
        }
        let fit = list.with_mode(inode.mode).value().to_vec();
        self.set_xattr(ino, acl::ACCESS, &fit)
    }

    fn own_xattr(&self, ino: Ino, name: &[u8]) -> Option<&[u8]> {
        let own = self.xattrs.get(self.own_xattrs(ino))?;
        let same = own
            .iter()
            .find(|x| text_at(&self.strings, x.name, x.name_len) == name)?;
        Some(text_at(&self.strings, same.value, same.value_len))
    }

    pub(super) fn set_opaque(&mut self, dir: Ino) -> Result<(), Fault> {
        self.set_xattr(dir, OPAQUE_XATTR.0, OPAQUE_XATTR.1)
    }

    fn set_xattr(&mut self, ino: Ino, name: &[u8], value: &[u8]) -> Result<(), Fault> {
        self.allowance.xattr();
        let (name, name_len) = self.intern(name)?;
        let (value, value_len) = self.intern(value)?;
        let xattr = Xattr {
            name,
            name_len,
            value,
            value_len,
        };
        let own = self.own_xattrs(ino);
        // Interned, so that equal names are at equal places.
        if let Some(same) = self.xattrs[own.clone()].iter_mut().find(|x| x.name == name) {
            *same = xattr;
            return Ok(());
        }
        if own.len() >= MAX_XATTRS {
            return bad(format!("it has more than {MAX_XATTRS} extended attributes"));
        }
        let moves = own.end != self.xattrs.len();
        let more = if moves { own.len() + 1 } else { 1 };
        limit(
            "number of extended attributes",
            self.xattrs.len() + more,
            2 * MAX_INODES,
        )?;
        self.allowance.xattrs(self.xattrs.len() + more)?;
        self.allowance.take(XATTR_COST * more as u64)?;
        let first = if !moves {
            own.start
        } else {
            // The inode's attributes have to stay side by side: they move to the end.
            let first = self.xattrs.len();
            self.xattrs.extend_from_within(own.clone());
            first
        };
        self.xattrs.push(xattr);
        let inode = self.inode_mut(ino);
        inode.xattr_first = first as u32;
        inode.xattr_count = own.len() as u32 + 1;
        Ok(())
    }

    pub(super) fn drop_xattr(&mut self, ino: Ino, name: &[u8]) {
        let own = self.own_xattrs(ino);
        let same = |x: &Xattr| text_at(&self.strings, x.name, x.name_len) == name;
        if let Some(at) = self.xattrs[own.clone()].iter().position(same) {
            self.xattrs.copy_within(own.start + at + 1..own.end, own.start + at);
            self.inode_mut(ino).xattr_count -= 1;
        }
    }

    pub(super) fn own_xattrs(&self, ino: Ino) -> std::ops::Range<usize> {
        let inode = self.inode(ino);
        let first = inode.xattr_first as usize;
        first..first + inode.xattr_count as usize
    }

    fn intern(&mut self, text: &[u8]) -> Result<(u32, u32), Fault> {
        let hash = self.hasher.hash_one(text);
        let strings = &self.strings;
        let known = self
            .interned
            .find(hash, |&(at, len)| text_at(strings, at, len) == text)
            .copied();
        if let Some(known) = known {
            return Ok(known);
        }
        self.allowance.take(INTERNED_COST)?;
        let place = (self.store(text)?, text.len() as u32);
        let (strings, hasher) = (&self.strings, &self.hasher);
        self.interned
            .insert_unique(hash, place, |&(at, len)| hasher.hash_one(text_at(strings, at, len)));
        Ok(place)
    }
}

/// Whether a file of this type would take an extended attribute of this name from an unpacker; the others are ignored.
fn takes_xattr(file_type: u32, name: &[u8]) -> bool {
    match name {
        acl::ACCESS => file_type != mode::LNK,
        acl::DEFAULT => file_type == mode::DIR,
        _ if name.starts_with(b"user.") => matches!(file_type, mode::REG | mode::DIR),
        _ => name.starts_with(b"security."),
    }
}
