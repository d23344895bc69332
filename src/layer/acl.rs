//! POSIX access control lists, as far as an unpacker has the kernel change them.
//!
//! A list comes as the value of an extended attribute: the version 2 in 4 bytes, then for each entry its tag and its permissions in 2 bytes
//! each, and the number of its user or group in 4, all little-endian. Three things happen to lists while a layer is unpacked, and
//! they are done here as Linux does them:
//!
//! - What is set is checked, and written back in one form ([`Acl::parse`]). An access list that says no more than a mode is not kept.
//! - chmod(2), which the unpacker calls last, changes the entries that mirror the mode ([`Acl::with_mode`]).
//! - A directory with a default list hands it on to what is made in it: as access list, and to directories as default list too.

use std::borrow::Cow;

/// Attribute with the list by which access is decided.
pub(super) const ACCESS: &[u8] = b"system.posix_acl_access";
/// Attribute of a directory with the list that is handed on.
pub(super) const DEFAULT: &[u8] = b"system.posix_acl_default";

/// The only version there is.
const VERSION: [u8; 4] = [2, 0, 0, 0];
/// Bytes of an entry.
const ENTRY: usize = 8;
/// Tags, in the order in which they have to come.
const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;
/// Permissions of an entry: read, write, execute.
const PERMISSIONS: u16 = 0o7;
/// What stands where an entry has no user or group; also a number that none has.
const NOBODY: u32 = u32::MAX;

/// A list that Linux takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Acl<'a>(Cow<'a, [u8]>);

/// What the value of an attribute is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Parsed<'a> {
    /// A list.
    List(Acl<'a>),
    /// No entries: the attribute is removed.
    Empty,
    /// A version that the kernel does not know: the unpacker ignores it.
    Ignored,
    /// Nothing that can be set.
    Invalid,
}

impl<'a> Acl<'a> {
    /// Checks a value.
    pub fn parse(value: &'a [u8]) -> Parsed<'a> {
        if value.is_empty() {
            return Parsed::Empty;
        }
        let Some((version, entries)) = value.split_first_chunk::<4>() else {
            return Parsed::Invalid;
        };
        if *version != VERSION {
            return Parsed::Ignored;
        }
        if entries.is_empty() {
            return Parsed::Empty;
        }
        let (records, rest) = entries.as_chunks::<ENTRY>();
        // The tag that came last; each of those without a number comes once.
        let (mut last, mut named, mut canonical) = (0, false, true);
        for record in records {
            let (tag, permissions, id) = fields(record);
            let follows = match tag {
                USER_OBJ => last == 0,
                USER => matches!(last, USER_OBJ | USER),
                GROUP_OBJ => matches!(last, USER_OBJ | USER),
                GROUP => matches!(last, GROUP_OBJ | GROUP),
                MASK => matches!(last, GROUP_OBJ | GROUP),
                OTHER => last == MASK || !named && last == GROUP_OBJ,
                _ => false,
            };
            let numbered = matches!(tag, USER | GROUP);
            if !follows || permissions & !PERMISSIONS != 0 || numbered && id == NOBODY {
                return Parsed::Invalid;
            }
            (last, named) = (tag, named || numbered);
            canonical &= numbered || id == NOBODY;
        }
        if last != OTHER || !rest.is_empty() {
            return Parsed::Invalid;
        }
        if canonical {
            return Parsed::List(Acl(Cow::Borrowed(value)));
        }
        let mut value = value.to_vec();
        for record in entries_mut(&mut value) {
            if !matches!(fields(record).0, USER | GROUP) {
                record[4..].copy_from_slice(&NOBODY.to_le_bytes());
            }
        }
        Parsed::List(Acl(Cow::Owned(value)))
    }

    /// The list of a value that was checked before; an invalid one is left as it is by all that follows.
    pub fn of(value: &'a [u8]) -> Self {
        Acl(Cow::Borrowed(value))
    }

    /// The value of the attribute.
    pub fn value(&self) -> &[u8] {
        &self.0
    }

    /// Whether a mode says the same.
    pub fn is_minimal(&self) -> bool {
        self.0.len() <= VERSION.len() + 3 * ENTRY
    }

    /// As chmod(2) leaves it: owner, others, and the mask, or the group where there is no mask, are those of the mode.
    pub fn with_mode(mut self, mode: u32) -> Self {
        let masked = self
            .0
            .get(VERSION.len()..)
            .unwrap_or_default()
            .as_chunks::<ENTRY>()
            .0
            .iter()
            .any(|record| fields(record).0 == MASK);
        let wanted = |tag: u16| match tag {
            USER_OBJ => Some(mode >> 6),
            GROUP_OBJ if !masked => Some(mode >> 3),
            MASK => Some(mode >> 3),
            OTHER => Some(mode),
            _ => None,
        };
        for record in entries_mut(self.0.to_mut()) {
            if let Some(bits) = wanted(fields(record).0) {
                record[2..4].copy_from_slice(&(bits as u16 & PERMISSIONS).to_le_bytes());
            }
        }
        self
    }
}

fn entries_mut(value: &mut [u8]) -> &mut [[u8; ENTRY]] {
    value.get_mut(VERSION.len()..).unwrap_or_default().as_chunks_mut().0
}

fn fields(record: &[u8; ENTRY]) -> (u16, u16, u32) {
    let [t0, t1, p0, p1, i0, i1, i2, i3] = *record;
    (
        u16::from_le_bytes([t0, t1]),
        u16::from_le_bytes([p0, p1]),
        u32::from_le_bytes([i0, i1, i2, i3]),
    )
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A value of these tags, permissions and numbers.
    pub fn list(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let mut value = VERSION.to_vec();
        for (tag, permissions, id) in entries {
            value.extend(tag.to_le_bytes());
            value.extend(permissions.to_le_bytes());
            value.extend(id.to_le_bytes());
        }
        value
    }

    /// user::rwx, user:1001:r-x, group::r-x, mask::r-x, other::---
    pub fn named() -> Vec<u8> {
        list(&[
            (USER_OBJ, 7, NOBODY),
            (USER, 5, 1001),
            (GROUP_OBJ, 5, NOBODY),
            (MASK, 5, NOBODY),
            (OTHER, 0, NOBODY),
        ])
    }

    #[test]
    fn what_linux_takes_is_taken_in_one_form() {
        let value = named();
        assert_eq!(Acl::parse(&value), Parsed::List(Acl::of(&value)));
        let mut odd = value.clone();
        odd[4 + 4..4 + 8].fill(0);
        assert_eq!(Acl::parse(&odd), Parsed::List(Acl(Cow::Owned(value.clone()))));
        assert_eq!([&VERSION[..], b""].map(Acl::parse), [Parsed::Empty, Parsed::Empty]);
        assert_eq!(Acl::parse(&[1, 0, 0, 0, 9]), Parsed::Ignored);
        let minimal = [(USER_OBJ, 7, NOBODY), (GROUP_OBJ, 5, NOBODY), (OTHER, 0, NOBODY)];
        let Parsed::List(minimal) = Acl::parse(&list(&minimal)).owned() else {
            panic!("a list of three entries is one")
        };
        assert!(minimal.is_minimal() && !Acl::of(&value).is_minimal());
    }

    #[test]
    fn what_linux_refuses_is_refused() {
        let (user, group, other) = ((USER_OBJ, 7, NOBODY), (GROUP_OBJ, 5, NOBODY), (OTHER, 0, NOBODY));
        let wrong: [&[(u16, u16, u32)]; 10] = [
            &[user],
            &[group, user, other],
            &[user, other],
            &[user, group, other, other],
            // Whoever is named needs a mask.
            &[user, (USER, 7, 1), group, other],
            &[user, (USER, 7, NOBODY), group, (MASK, 7, NOBODY), other],
            &[user, group, (GROUP, 7, NOBODY), (MASK, 7, NOBODY), other],
            &[user, group, (MASK, 7, NOBODY), (MASK, 7, NOBODY), other],
            &[(USER_OBJ, 8, NOBODY), group, other],
            &[user, (3, 0, NOBODY), group, other],
        ];
        for entries in wrong {
            assert_eq!(Acl::parse(&list(entries)), Parsed::Invalid, "{entries:?}");
        }
        let mut cut = named();
        cut.pop();
        for value in [&cut[..], b"\x02"] {
            assert_eq!(Acl::parse(value), Parsed::Invalid);
        }
    }

    #[test]
    fn a_mode_changes_what_mirrors_it() {
        let value = named();
        let changed = list(&[
            (USER_OBJ, 6, NOBODY),
            (USER, 5, 1001),
            (GROUP_OBJ, 5, NOBODY),
            (MASK, 4, NOBODY),
            (OTHER, 1, NOBODY),
        ]);
        assert_eq!(Acl::of(&value).with_mode(0o4641).value(), changed);
        let minimal = list(&[(USER_OBJ, 7, NOBODY), (GROUP_OBJ, 5, NOBODY), (OTHER, 0, NOBODY)]);
        let changed = list(&[(USER_OBJ, 1, NOBODY), (GROUP_OBJ, 2, NOBODY), (OTHER, 3, NOBODY)]);
        assert_eq!(Acl::of(&minimal).with_mode(0o123).value(), changed);
    }

    impl Parsed<'_> {
        fn owned(self) -> Parsed<'static> {
            match self {
                Parsed::List(Acl(value)) => Parsed::List(Acl(Cow::Owned(value.into_owned()))),
                Parsed::Empty => Parsed::Empty,
                Parsed::Ignored => Parsed::Ignored,
                Parsed::Invalid => Parsed::Invalid,
            }
        }
    }
}
