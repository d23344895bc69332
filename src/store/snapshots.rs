//! Snapshot records, and the index of children.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

use redb::{
    Database, MultimapTableDefinition, ReadableDatabase as _, ReadableMultimapTable as _, ReadableTable as _,
    TableDefinition, WriteTransaction,
};
use serde::{Deserialize, Serialize};

use super::lineage::{Change, Lineage};
use super::schema::next_number;
use super::{Store, StoreError, decode, encode};
use crate::layer::Digest;

const TABLE: &str = "snapshots";
pub(super) const SNAPSHOTS: TableDefinition<&str, &[u8]> = TableDefinition::new(TABLE);
const CHILDREN: MultimapTableDefinition<&str, &str> = MultimapTableDefinition::new("children");
const NEXT_ID: &str = "next_snapshot_id";

/// Longest chain of parents that is followed. overlayfs takes 500 layers; more than this is a circle.
const MAX_CHAIN: usize = 10_000;

/// What a snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Read-only, under a key.
    View,
    /// Writable, under a key.
    Active,
    /// Unchangeable, under a name; may have children.
    Committed,
}

/// What a snapshot itself, without its parents, takes of the disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Allocated bytes.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// Number of the snapshot, of which its directory is named; never used again for another.
    pub id: u64,
    /// What it is.
    pub kind: Kind,
    /// Name of the committed snapshot below it.
    pub parent: Option<String>,
    /// Labels, as the client gave them.
    pub labels: BTreeMap<String, String>,
    /// When it came to be what it is, in nanoseconds since 1970 (UTC).
    pub created: i64,
    /// Last change of its labels, in nanoseconds since 1970 (UTC).
    pub updated: i64,
    /// The layer that Lazuli shows in its place: only of a committed remote snapshot, which has no bytes of its own.
    #[serde(default)]
    pub layer: Option<Digest>,
    /// What is shown in the places of its ancestors and, if it is committed, of itself, the lowest first, where that is something else than they
    /// show for themselves: the image that it was made for believes something else of the layers below. Empty where it is not. Places of
    /// local snapshots are `None`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub chain: Vec<Option<Digest>>,
    /// Of a remote snapshot: something that it shows rests on the word of an image or of the configuration.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub vouched: bool,
    /// Size at the time of its commit.
    #[serde(default)]
    pub usage: Usage,
}

/// What of a snapshot decides how those on it are mounted: a small part of the record, of which the labels of a pull, which name every layer
/// of the image, may be most.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Ancestor {
    /// [`SnapshotRecord::id`].
    pub id: u64,
    /// [`SnapshotRecord::kind`].
    pub kind: Kind,
    /// [`SnapshotRecord::parent`].
    pub parent: Option<String>,
    /// [`SnapshotRecord::layer`].
    #[serde(default)]
    pub layer: Option<Digest>,
    /// [`SnapshotRecord::chain`].
    #[serde(default)]
    pub chain: Vec<Option<Digest>>,
    /// [`SnapshotRecord::vouched`].
    #[serde(default)]
    pub vouched: bool,
}

impl From<&SnapshotRecord> for Ancestor {
    fn from(record: &SnapshotRecord) -> Self {
        Ancestor {
            id: record.id,
            kind: record.kind,
            parent: record.parent.clone(),
            layer: record.layer,
            chain: record.chain.clone(),
            vouched: record.vouched,
        }
    }
}

/// What is shown of a snapshot and its ancestors, which come nearest first: the ids of layers, the lowest first, `None` for local ones.
/// The nearest snapshot that says what is shown below it is believed; above it each shows its own layer.
pub fn shown(chain: &[(String, Ancestor)]) -> Vec<Option<Digest>> {
    let mut ids: Vec<Option<Digest>> = chain.iter().rev().map(|(_, ancestor)| ancestor.layer).collect();
    let said = chain.iter().find(|(_, ancestor)| !ancestor.chain.is_empty());
    if let Some((_, ancestor)) = said {
        for (id, other) in ids.iter_mut().zip(&ancestor.chain) {
            // What is local stays local.
            if let (Some(id), Some(other)) = (id, other) {
                *id = *other;
            }
        }
    }
    ids
}

/// Records with their keys; the error of one does not hide the others.
pub(super) type Listed = Vec<(String, Result<SnapshotRecord, StoreError>)>;

pub(super) fn create_tables(transaction: &WriteTransaction) -> Result<(), StoreError> {
    transaction.open_table(SNAPSHOTS)?;
    transaction.open_multimap_table(CHILDREN)?;
    Ok(())
}

/// The snapshots of the database, but for those whose records cannot be decoded.
pub(super) fn lineage(db: &Database) -> Result<Lineage, StoreError> {
    let table = db.begin_read()?.open_table(SNAPSHOTS)?;
    let mut known = HashMap::new();
    for entry in table.iter()? {
        let (key, bytes) = entry?;
        if let Ok(ancestor) = decode(TABLE, &key.value(), bytes.value()) {
            known.insert(key.value().to_owned(), ancestor);
        }
    }
    Ok(Lineage::new(known))
}

impl Store {
    /// The snapshot with this key or name.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if its record cannot be decoded, or an error of the database.
    pub fn snapshot(&self, key: &str) -> Result<Option<SnapshotRecord>, StoreError> {
        let transaction = self.read()?;
        let table = transaction.open_table(SNAPSHOTS)?;
        let bytes = table.get(key)?;
        bytes.map(|bytes| decode(TABLE, &key, bytes.value())).transpose()
    }

    /// All snapshots at one moment, ordered by key.
    ///
    /// # Errors
    /// An error of the database. A record that cannot be decoded is an error in its place in the list.
    pub fn snapshots(&self) -> Result<Listed, StoreError> {
        let transaction = self.read()?;
        let table = transaction.open_table(SNAPSHOTS)?;
        let mut list = Vec::new();
        for entry in table.iter()? {
            let (key, bytes) = entry?;
            list.push((key.value().to_owned(), decode(TABLE, &key.value(), bytes.value())));
        }
        Ok(list)
    }

    /// All snapshots at one moment, without their labels, ordered by key.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if a record cannot be decoded, or an error of the database.
    pub fn ancestors(&self) -> Result<Vec<(String, Ancestor)>, StoreError> {
        let transaction = self.read()?;
        let table = transaction.open_table(SNAPSHOTS)?;
        let mut list = Vec::new();
        for entry in table.iter()? {
            let (key, bytes) = entry?;
            list.push((key.value().to_owned(), decode(TABLE, &key.value(), bytes.value())?));
        }
        Ok(list)
    }

    /// The snapshots whose parent is `parent` (empty: those without one) at one moment, ordered by key.
    ///
    /// # Errors
    /// As [`Store::snapshots`].
    pub fn children(&self, parent: &str) -> Result<Listed, StoreError> {
        let transaction = self.read()?;
        let table = transaction.open_table(SNAPSHOTS)?;
        let children = transaction.open_multimap_table(CHILDREN)?;
        let mut list = Vec::new();
        for key in children.get(parent)? {
            let key = key?;
            let key = key.value();
            let record = match table.get(key)? {
                Some(bytes) => decode(TABLE, &key, bytes.value()),
                None => Err(StoreError::damaged(TABLE, &key, "it is indexed, but not there")),
            };
            list.push((key.to_owned(), record));
        }
        Ok(list)
    }

    /// The snapshot `key` and all its ancestors at one moment, nearest first; empty if there is no such snapshot.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if a record cannot be decoded or an ancestor is missing, or an error of the database.
    pub fn chain(&self, key: &str) -> Result<Vec<(String, Ancestor)>, StoreError> {
        let known = self.lineage.read();
        let mut chain: Vec<(String, Ancestor)> = Vec::new();
        let mut next = Some(key.to_owned());
        while let Some(key) = next {
            let Some(ancestor) = known.get(&key) else {
                // It may be there, and damaged. Nobody waits meanwhile.
                drop(known);
                self.snapshot(&key)?;
                return match chain.last() {
                    None => Ok(chain),
                    Some((child, _)) => Err(StoreError::damaged(TABLE, child, "its parent is missing")),
                };
            };
            if chain.len() == MAX_CHAIN {
                return Err(StoreError::damaged(TABLE, &key, "its parents form a circle"));
            }
            next = ancestor.parent.clone();
            chain.push((key, ancestor.clone()));
        }
        Ok(chain)
    }

    /// Keys of the snapshots that are such, in no order.
    pub fn keys(&self, is_such: impl Fn(&Ancestor) -> bool) -> Vec<String> {
        let known = self.lineage.read();
        let such = known.iter().filter(|(_, ancestor)| is_such(ancestor));
        such.map(|(key, _)| key.clone()).collect()
    }

    /// Runs `change` on the snapshots in one transaction. An error of `change`, or of the commit, changes nothing.
    /// Other writers wait meanwhile, so `change` must be short.
    ///
    /// # Errors
    /// What `change` answers, or an error of the database.
    pub fn write_snapshots<T, E: From<StoreError>>(
        &self,
        change: impl FnOnce(&SnapshotsWrite<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        let turn = self.lineage.turn();
        let (value, changes) = self.write(|transaction| {
            let snapshots = SnapshotsWrite {
                transaction,
                changes: RefCell::default(),
            };
            let value = change(&snapshots)?;
            Ok::<_, E>((value, snapshots.changes.into_inner()))
        })?;
        self.lineage.apply(turn, changes);
        Ok(value)
    }
}

/// The snapshots within a write transaction.
pub struct SnapshotsWrite<'t> {
    transaction: &'t WriteTransaction,
    changes: RefCell<Vec<Change>>,
}

impl SnapshotsWrite<'_> {
    /// The snapshot with this key or name.
    ///
    /// # Errors
    /// As [`Store::snapshot`].
    pub fn get(&self, key: &str) -> Result<Option<SnapshotRecord>, StoreError> {
        let table = self.transaction.open_table(SNAPSHOTS)?;
        let bytes = table.get(key)?;
        bytes.map(|bytes| decode(TABLE, &key, bytes.value())).transpose()
    }

    /// Writes a record, in the place of the one that has the key.
    ///
    /// # Errors
    /// [`StoreError`]; the transaction has to be given up then.
    pub fn put(&self, key: &str, record: &SnapshotRecord) -> Result<(), StoreError> {
        let before = self.get(key)?;
        let mut children = self.transaction.open_multimap_table(CHILDREN)?;
        if let Some(before) = before {
            children.remove(before.parent.as_deref().unwrap_or(""), key)?;
        }
        children.insert(record.parent.as_deref().unwrap_or(""), key)?;
        let bytes = encode(TABLE, &key, record)?;
        self.transaction.open_table(SNAPSHOTS)?.insert(key, bytes.as_slice())?;
        self.changes.borrow_mut().push((key.to_owned(), Some(record.into())));
        Ok(())
    }

    /// Takes a record away, and returns it.
    ///
    /// # Errors
    /// As [`Store::snapshot`]; a damaged record stays.
    pub fn remove(&self, key: &str) -> Result<Option<SnapshotRecord>, StoreError> {
        let Some(record) = self.get(key)? else { return Ok(None) };
        let mut children = self.transaction.open_multimap_table(CHILDREN)?;
        children.remove(record.parent.as_deref().unwrap_or(""), key)?;
        self.transaction.open_table(SNAPSHOTS)?.remove(key)?;
        self.changes.borrow_mut().push((key.to_owned(), None));
        Ok(Some(record))
    }

    /// Whether a snapshot has `name` as its parent.
    ///
    /// # Errors
    /// An error of the database.
    pub fn has_children(&self, name: &str) -> Result<bool, StoreError> {
        let children = self.transaction.open_multimap_table(CHILDREN)?;
        Ok(children.get(name)?.next().transpose()?.is_some())
    }

    /// Ids of all snapshots.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if any record cannot be decoded: the set would be incomplete.
    pub fn ids(&self) -> Result<std::collections::HashSet<u64>, StoreError> {
        let table = self.transaction.open_table(SNAPSHOTS)?;
        let mut ids = std::collections::HashSet::new();
        for entry in table.iter()? {
            let (key, bytes) = entry?;
            ids.insert(decode::<SnapshotRecord>(TABLE, &key.value(), bytes.value())?.id);
        }
        Ok(ids)
    }

    /// A number that no snapshot has, or ever had (in a committed transaction).
    ///
    /// # Errors
    /// An error of the database.
    pub fn allocate_id(&self) -> Result<u64, StoreError> {
        next_number(self.transaction, NEXT_ID, "snapshot id")
    }
}
