//! Snapshot records, and the index of children.

use std::collections::{BTreeMap, HashMap, HashSet};

use redb::{
    Database, MultimapTableDefinition, ReadableDatabase as _, ReadableTable as _, TableDefinition, WriteTransaction,
};
use serde::{Deserialize, Serialize};

use super::draft::{Draft, table};
use super::schema::next_number;
use super::{Store, StoreError, decode, encode};
use crate::layer::Digest;

const TABLE: &str = "snapshots";
pub(super) const SNAPSHOTS: TableDefinition<&str, &[u8]> = TableDefinition::new(TABLE);
pub(super) const CHILDREN: MultimapTableDefinition<&str, &str> = MultimapTableDefinition::new("children");
const NEXT_ID: &str = "next_snapshot_id";
/// Label of the chain id that a remote snapshot holds.
const REF_LABEL: &str = "containerd.io/snapshot.ref";

table!(Snapshots, SNAPSHOTS, snapshot_key, Some, <[u8]>::to_vec);

fn snapshot_key(key: &[u8]) -> Option<&str> {
    std::str::from_utf8(key).ok()
}

/// In the keys of snapshots in which containerd unpacks a layer: `<namespace>/<number>/extract-<time>-<random> <chain id>`.
pub const EXTRACTION: &str = "/extract-";

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
    /// The layer that Lazuli shows in its place: of a committed remote snapshot, which has no bytes of its own, and of an active one that will be
    /// such a snapshot when it is committed.
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
    /// Whether containerd has changed the owners of all that is in it, for containers in a user namespace.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub remapped: bool,
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
    /// [`SnapshotRecord::remapped`].
    #[serde(default)]
    pub remapped: bool,
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
            remapped: record.remapped,
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

/// What is kept in memory of a snapshot.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Known {
    #[serde(flatten)]
    pub ancestor: Ancestor,
    /// The chain id in its labels.
    #[serde(default, rename = "labels", deserialize_with = "chain_id_of")]
    labelled: Option<Box<str>>,
}

impl Known {
    /// The chain id of a committed snapshot: remote ones have it in a label, and containerd names its own `namespace/number/chain id`.
    pub fn chain_id<'k>(&'k self, key: &'k str) -> Option<&'k str> {
        if self.ancestor.kind != Kind::Committed {
            return None;
        }
        self.labelled.as_deref().or_else(|| key.splitn(3, '/').nth(2))
    }
}

impl From<&SnapshotRecord> for Known {
    fn from(record: &SnapshotRecord) -> Self {
        Known {
            ancestor: record.into(),
            labelled: record.labels.get(REF_LABEL).map(|label| label.as_str().into()),
        }
    }
}

fn chain_id_of<'de, D: serde::Deserializer<'de>>(labels: D) -> Result<Option<Box<str>>, D::Error> {
    let mut labels: BTreeMap<String, String> = Deserialize::deserialize(labels)?;
    Ok(labels.remove(REF_LABEL).map(String::into_boxed_str))
}

/// Records with their keys; the error of one does not hide the others.
pub(super) type Listed = Vec<(String, Result<SnapshotRecord, StoreError>)>;

pub(super) fn create_tables(transaction: &WriteTransaction) -> Result<(), StoreError> {
    transaction.open_table(SNAPSHOTS)?;
    transaction.open_multimap_table(CHILDREN)?;
    Ok(())
}

/// The snapshots of the database, but for those whose records cannot be decoded.
pub(super) fn known(db: &Database) -> Result<HashMap<String, Known>, StoreError> {
    let table = db.begin_read()?.open_table(SNAPSHOTS)?;
    let mut known = HashMap::new();
    for entry in table.iter()? {
        let (key, bytes) = entry?;
        if let Ok(snapshot) = decode(TABLE, &key.value(), bytes.value()) {
            known.insert(key.value().to_owned(), snapshot);
        }
    }
    Ok(known)
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
        let known = self.inner.lineage.read();
        let mut chain: Vec<(String, Ancestor)> = Vec::new();
        let mut next = Some(key.to_owned());
        while let Some(key) = next {
            let Some(Known { ancestor, .. }) = known.get(&key) else {
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
        let known = self.inner.lineage.read();
        let such = known.iter().filter(|(_, known)| is_such(&known.ancestor));
        such.map(|(key, _)| key.clone()).collect()
    }

    /// Chain ids of layers that containerd is unpacking: the active snapshots that it makes for that are named so.
    pub fn unpacking(&self) -> HashSet<String> {
        let active = self.keys(|ancestor| ancestor.kind == Kind::Active);
        let chain_id = |key: &String| {
            let (begin, chain_id) = key.rsplit_once(' ')?;
            begin.contains(EXTRACTION).then(|| chain_id.to_owned())
        };
        active.iter().filter_map(chain_id).collect()
    }

    /// Runs `change` on the snapshots in one transaction. An error of `change`, or of the commit, changes nothing.
    /// All other writers wait meanwhile, so `change` must be short, and its effects outside of the database must be such that they
    /// can be left behind when the commit fails.
    ///
    /// # Errors
    /// What `change` answers, or an error of the database.
    pub fn write_snapshots<T, E>(
        &self,
        change: impl FnOnce(&SnapshotsWrite<'_>) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
    {
        self.write(move |draft| change(&SnapshotsWrite { draft }))
    }

    /// [`Store::write_snapshots`] for tasks: no thread waits.
    ///
    /// # Errors
    /// As [`Store::write_snapshots`].
    pub async fn change_snapshots<T, E>(
        &self,
        change: impl FnOnce(&SnapshotsWrite<'_>) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
    {
        self.change(move |draft| change(&SnapshotsWrite { draft })).await
    }

    /// Chain ids of all committed snapshots: of remote ones, and of those that containerd unpacked.
    pub fn chain_ids(&self) -> HashSet<String> {
        self.inner.lineage.chain_ids()
    }
}

/// The snapshots within a write transaction.
pub struct SnapshotsWrite<'d> {
    draft: &'d Draft<'d>,
}

impl SnapshotsWrite<'_> {
    /// The snapshot with this key or name.
    ///
    /// # Errors
    /// As [`Store::snapshot`].
    pub fn get(&self, key: &str) -> Result<Option<SnapshotRecord>, StoreError> {
        let bytes = self.draft.read::<Snapshots>(key.as_bytes())?;
        bytes.map(|bytes| decode(TABLE, &key, &bytes)).transpose()
    }

    /// Writes a record, in the place of the one that has the key.
    ///
    /// # Errors
    /// [`StoreError`]; the record that it has is damaged, or the database fails.
    pub fn put(&self, key: &str, record: &SnapshotRecord) -> Result<(), StoreError> {
        let before = self.get(key)?;
        if before.as_ref() == Some(record) {
            return Ok(());
        }
        let parent = record.parent.as_deref().unwrap_or("");
        match before {
            Some(before) if before.parent.as_deref().unwrap_or("") == parent => {}
            before => {
                if let Some(before) = before {
                    self.draft.set_child(before.parent.as_deref().unwrap_or(""), key, false);
                }
                self.draft.set_child(parent, key, true);
            }
        }
        let bytes = encode(TABLE, &key, record)?;
        self.draft.write::<Snapshots>(key.as_bytes(), Some(bytes))?;
        self.draft.tell((key.to_owned(), Some(record.into())));
        Ok(())
    }

    /// Takes a record away, and returns it.
    ///
    /// # Errors
    /// As [`Store::snapshot`]; a damaged record stays.
    pub fn remove(&self, key: &str) -> Result<Option<SnapshotRecord>, StoreError> {
        let Some(record) = self.get(key)? else { return Ok(None) };
        self.draft.set_child(record.parent.as_deref().unwrap_or(""), key, false);
        self.draft.write::<Snapshots>(key.as_bytes(), None)?;
        self.draft.tell((key.to_owned(), None));
        Ok(Some(record))
    }

    /// Whether a snapshot has `name` as its parent.
    ///
    /// # Errors
    /// An error of the database.
    pub fn has_children(&self, name: &str) -> Result<bool, StoreError> {
        self.draft.has_children(name)
    }

    /// Ids of all snapshots.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if any record cannot be decoded: the set would be incomplete.
    pub fn ids(&self) -> Result<HashSet<u64>, StoreError> {
        let mut drafted: HashMap<_, _> = self.draft.drafted::<Snapshots>().into_iter().collect();
        let table = self.draft.transaction.open_table(SNAPSHOTS)?;
        let mut ids = HashSet::new();
        let id = |key: &str, bytes: &[u8]| decode::<Ancestor>(TABLE, &key, bytes).map(|ancestor| ancestor.id);
        for entry in table.iter()? {
            let (key, bytes) = entry?;
            match drafted.remove(key.value().as_bytes()) {
                Some(None) => {}
                Some(Some(bytes)) => drop(ids.insert(id(key.value(), &bytes)?)),
                None => drop(ids.insert(id(key.value(), bytes.value())?)),
            }
        }
        for (key, bytes) in drafted {
            if let Some(bytes) = bytes {
                ids.insert(id(&String::from_utf8_lossy(&key), &bytes)?);
            }
        }
        Ok(ids)
    }

    /// A number that no snapshot has, or ever had (in a committed transaction).
    ///
    /// # Errors
    /// An error of the database.
    pub fn allocate_id(&self) -> Result<u64, StoreError> {
        next_number(self.draft, NEXT_ID, "snapshot id")
    }
}
