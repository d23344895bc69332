//! One change while it is made: what it writes is put off until it has succeeded.
//!
//! Changes of several callers share a transaction ([`super::writer`]), and redb cannot take a part of a transaction back. So a change writes
//! into its draft; what it reads is the transaction with the draft over it. If it fails, the draft is dropped and no other change of the
//! transaction notices. What is written is compared with what is there: a record that stays as it was costs no commit.

use std::cell::RefCell;
use std::collections::BTreeMap;

use redb::{ReadableMultimapTable as _, WriteTransaction};

use super::StoreError;
use super::lineage::Change;
use super::snapshots::CHILDREN;

/// A table as a draft sees it: bytes by bytes.
pub(super) trait Table {
    /// Its name.
    const NAME: &'static str;

    /// The value of a key.
    fn get(transaction: &WriteTransaction, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError>;

    /// Gives a key a value, or takes it away.
    fn set(transaction: &WriteTransaction, key: &[u8], value: Option<&[u8]>) -> Result<(), StoreError>;
}

/// Makes a [`Table`] of a definition, given how keys and values become bytes.
macro_rules! table {
    ($name:ident, $definition:expr, $key:expr, $value:expr, $bytes:expr) => {
        /// The table as drafts see it.
        pub(super) struct $name;

        impl $crate::store::draft::Table for $name {
            const NAME: &'static str = TABLE;

            fn get(transaction: &WriteTransaction, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
                let table = transaction.open_table($definition)?;
                let Some(key) = $key(key) else { return Ok(None) };
                let value = table.get(key)?;
                Ok(value.map(|value| $bytes(value.value())))
            }

            fn set(transaction: &WriteTransaction, key: &[u8], value: Option<&[u8]>) -> Result<(), StoreError> {
                let mut table = transaction.open_table($definition)?;
                let Some(key) = $key(key) else { return Ok(()) };
                match value.map($value) {
                    Some(Some(value)) => drop(table.insert(key, value)?),
                    // Bytes of another length never come out of `get`.
                    Some(None) => {}
                    None => drop(table.remove(key)?),
                }
                Ok(())
            }
        }
    };
}
pub(super) use table;

type Set = fn(&WriteTransaction, &[u8], Option<&[u8]>) -> Result<(), StoreError>;

struct Write {
    value: Option<Vec<u8>>,
    set: Set,
}

/// A change that is being made.
pub struct Draft<'t> {
    pub(super) transaction: &'t WriteTransaction,
    writes: RefCell<BTreeMap<(&'static str, Vec<u8>), Write>>,
    /// Children that come (`true`) or go, by parent and key.
    children: RefCell<BTreeMap<(String, String), bool>>,
    lineage: RefCell<Vec<Change>>,
}

/// What a draft has become.
#[derive(Default)]
pub(super) struct Written {
    /// Whether anything has to be committed.
    pub dirty: bool,
    /// What became of snapshots.
    pub lineage: Vec<Change>,
}

impl<'t> Draft<'t> {
    pub(super) fn new(transaction: &'t WriteTransaction) -> Self {
        Draft {
            transaction,
            writes: RefCell::default(),
            children: RefCell::default(),
            lineage: RefCell::default(),
        }
    }

    pub(super) fn read<T: Table>(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        match self.writes.borrow().get(&(T::NAME, key.to_vec())) {
            Some(write) => Ok(write.value.clone()),
            None => T::get(self.transaction, key),
        }
    }

    /// Gives a key a value, or takes it away; whether that changes anything.
    pub(super) fn write<T: Table>(&self, key: &[u8], value: Option<Vec<u8>>) -> Result<bool, StoreError> {
        if self.read::<T>(key)? == value {
            return Ok(false);
        }
        let write = Write { value, set: T::set };
        self.writes.borrow_mut().insert((T::NAME, key.to_vec()), write);
        Ok(true)
    }

    /// Keys that the draft writes in a table, with what they get.
    pub(super) fn drafted<T: Table>(&self) -> Vec<(Vec<u8>, Option<Vec<u8>>)> {
        let writes = self.writes.borrow();
        let of_table = writes.iter().filter(|((name, _), _)| *name == T::NAME);
        of_table
            .map(|((_, key), write)| (key.clone(), write.value.clone()))
            .collect()
    }

    /// Notes that a snapshot comes to be, or is no more, the child of another (empty: of none).
    pub(super) fn set_child(&self, parent: &str, key: &str, is_child: bool) {
        let entry = (parent.to_owned(), key.to_owned());
        self.children.borrow_mut().insert(entry, is_child);
    }

    pub(super) fn has_children(&self, parent: &str) -> Result<bool, StoreError> {
        let drafted = self.children.borrow();
        let of_parent = || {
            let all = drafted.iter().filter(|((of, _), _)| of == parent);
            all.map(|((_, key), is_child)| (key.as_str(), *is_child))
        };
        if of_parent().any(|(_, is_child)| is_child) {
            return Ok(true);
        }
        let table = self.transaction.open_multimap_table(CHILDREN)?;
        for child in table.get(parent)? {
            let child = child?;
            if !of_parent().any(|(key, _)| key == child.value()) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Notes what became of a snapshot.
    pub(super) fn tell(&self, change: Change) {
        self.lineage.borrow_mut().push(change);
    }

    /// Writes all of it into the transaction, which has to be given up if that fails.
    pub(super) fn flush(self) -> Result<Written, StoreError> {
        let (writes, children) = (self.writes.into_inner(), self.children.into_inner());
        let dirty = !writes.is_empty() || !children.is_empty();
        for ((_, key), write) in writes {
            (write.set)(self.transaction, &key, write.value.as_deref())?;
        }
        if !children.is_empty() {
            let mut table = self.transaction.open_multimap_table(CHILDREN)?;
            for ((parent, key), is_child) in children {
                match is_child {
                    true => table.insert(parent.as_str(), key.as_str())?,
                    false => table.remove(parent.as_str(), key.as_str())?,
                };
            }
        }
        let lineage = self.lineage.into_inner();
        Ok(Written { dirty, lineage })
    }
}
