//! What each change of the snapshots' records may do, within a transaction: containerd's semantics, without file
//! systems.
//!
//! One space of names holds keys and names. A parent has to be committed; only an active snapshot can be committed; one
//! with children cannot be removed. Labels with empty values are not kept: that is how containerd deletes a label.

use std::collections::{BTreeMap, HashMap};

use sha2::{Digest as _, Sha256};

use super::SnapshotsError;
use super::error::quoted;
use super::{limits, users};
use crate::layer::Digest;
use crate::store::{Kind, SnapshotRecord, SnapshotsWrite, Usage};

/// Label of the chain id that a snapshot holds, or is asked for.
pub(super) const REF_LABEL: &str = "containerd.io/snapshot.ref";

/// Label of the chain id below the one that is asked for; containerd 2.3 and later.
const PARENT_LABEL: &str = "containerd.io/snapshot/parent-chain-id";

/// Prefix of the names of remote snapshots. containerd's own keys have three parts, so that they never look like this.
const REMOTE_PREFIX: &str = "lazuli/";

/// The chain id of a snapshot that containerd has unpacked: it is a part of the name, after namespace and number.
pub(super) fn chain_id_of(name: &str) -> Option<String> {
    let id = name.splitn(3, '/').nth(2)?;
    id.parse::<Digest>().is_ok().then(|| id.to_owned())
}

/// Labels as they are kept.
pub(super) fn kept_labels(labels: HashMap<String, String>) -> BTreeMap<String, String> {
    labels.into_iter().filter(|(_, value)| !value.is_empty()).collect()
}

/// Refuses the empty text as a key or name.
pub(super) fn check_key(what: &str, key: &str) -> Result<(), SnapshotsError> {
    if key.is_empty() {
        return Err(SnapshotsError::invalid(format!("the {what} is empty")));
    }
    Ok(())
}

/// Refuses a parent that is not there or not committed.
pub(super) fn check_parent(parent: &str, kind: Option<Kind>) -> Result<(), SnapshotsError> {
    match kind {
        None => Err(SnapshotsError::parent_not_found(parent)),
        Some(Kind::Committed) => Ok(()),
        Some(_) => Err(SnapshotsError::parent_not_committed(parent)),
    }
}

/// Refuses what is asked for a layer on nothing, though there are layers below it: so does a containerd that wants to state the parent when it commits
/// (`rebase`, 2.2 and later). It would not do that for a snapshot that exists already, and take it as it is, without what is below.
pub(super) fn check_not_rebased(
    chain_id: &str,
    parent: &str,
    labels: &HashMap<String, String>,
    below: usize,
) -> Result<(), SnapshotsError> {
    let is_lowest = below == 0 && labels.get(PARENT_LABEL).is_none_or(String::is_empty);
    if parent.is_empty() && !is_lowest {
        return Err(SnapshotsError::Rebase {
            chain_id: quoted(chain_id),
        });
    }
    Ok(())
}

/// A snapshot that is to be.
pub(super) struct NewSnapshot<'a> {
    pub kind: Kind,
    pub key: &'a str,
    /// Empty for none.
    pub parent: &'a str,
    pub labels: BTreeMap<String, String>,
    pub layer: Option<Digest>,
    /// See [`SnapshotRecord::chain`].
    pub chain: Vec<Option<Digest>>,
    /// See [`SnapshotRecord::vouched`].
    pub vouched: bool,
}

/// Adds a snapshot.
pub(super) fn create(
    snapshots: &SnapshotsWrite<'_>,
    new: NewSnapshot<'_>,
    now: i64,
) -> Result<SnapshotRecord, SnapshotsError> {
    if !new.parent.is_empty() {
        check_parent(new.parent, snapshots.get(new.parent)?.map(|record| record.kind))?;
    }
    if snapshots.get(new.key)?.is_some() {
        return Err(SnapshotsError::already_exists(new.key));
    }
    let record = SnapshotRecord {
        id: snapshots.allocate_id()?,
        kind: new.kind,
        parent: (!new.parent.is_empty()).then(|| new.parent.to_owned()),
        labels: new.labels,
        created: now,
        updated: now,
        layer: new.layer,
        chain: new.chain,
        vouched: new.vouched,
        remapped: false,
        usage: Usage::default(),
    };
    snapshots.put(new.key, &record)?;
    Ok(record)
}

/// Name of the remote snapshot with `chain_id` on `parent`: one for each pair, because containerd looks for it with
/// that very parent, and the same chain id may stand on the parent of another namespace too.
pub(super) fn remote_name(parent: &str, chain_id: &str) -> String {
    let mut hash = Sha256::new();
    hash.update(parent);
    // Not part of any key.
    hash.update([0]);
    hash.update(chain_id);
    format!("{REMOTE_PREFIX}{}", Digest::from_bytes(hash.finalize().into()).hex())
}

/// Name of the remote snapshot with `chain_id` on `parent` that shows these layers, the lowest first. Only what is proven may share the plain name:
/// that is the same for everybody.
fn remote_name_of(parent: &str, chain_id: &str, shown: &[Option<Digest>]) -> String {
    let mut hash = Sha256::new();
    hash.update(remote_name(parent, chain_id));
    for id in shown {
        hash.update([u8::from(id.is_some())]);
        hash.update(
            id.as_ref()
                .map(Digest::as_bytes)
                .map(<[u8; Digest::LEN]>::as_slice)
                .unwrap_or_default(),
        );
    }
    format!("{REMOTE_PREFIX}{}", Digest::from_bytes(hash.finalize().into()).hex())
}

/// A remote snapshot that is wanted.
#[derive(Debug, Clone)]
pub(super) struct Wish<'a> {
    pub chain_id: &'a str,
    /// What it and its ancestors are to show, the lowest first; its own layer is the last.
    pub shown: Vec<Option<Digest>>,
    /// Whether its ancestors show that by themselves.
    pub is_plain: bool,
    pub vouched: bool,
}

/// What became of a wish for a remote snapshot.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Published {
    /// It is new; its directory has to be placed.
    New(SnapshotRecord),
    /// It was there, and shows this layer.
    Present(SnapshotRecord),
}

/// Makes sure that there is a remote snapshot that shows what is wished on `parent`. If there is one under the plain name already,
/// `present_is_live` tells whether its layer can be shown.
pub(super) fn publish(
    snapshots: &SnapshotsWrite<'_>,
    parent: &str,
    mut labels: BTreeMap<String, String>,
    wish: Wish<'_>,
    present_is_live: bool,
    now: i64,
) -> Result<(String, Published), SnapshotsError> {
    let Wish {
        chain_id,
        shown,
        is_plain,
        vouched,
    } = wish;
    let layer = shown.last().copied().flatten();
    let (plain, own) = (remote_name(parent, chain_id), remote_name_of(parent, chain_id, &shown));
    let chain = if is_plain { Vec::new() } else { shown };
    let is_it = |record: &SnapshotRecord| record.layer == layer && record.chain == chain;
    // What is proven on both sides is the same, though the blobs may be others.
    let shared = |record: &SnapshotRecord| is_it(record) || (!vouched && !record.vouched);
    let name = match snapshots.get(&plain)? {
        Some(present) if shared(&present) => plain,
        None if !vouched && snapshots.get(&own)?.is_none() => plain,
        _ => own,
    };
    labels.insert(REF_LABEL.to_owned(), chain_id.to_owned());
    let Some(mut record) = snapshots.get(&name)? else {
        let new = NewSnapshot {
            kind: Kind::Committed,
            key: &name,
            parent,
            labels,
            layer,
            chain,
            vouched,
        };
        let record = create(snapshots, new, now)?;
        return Ok((name, Published::New(record)));
    };
    if record.layer.is_none() || record.parent.as_deref().unwrap_or("") != parent {
        return Err(SnapshotsError::already_exists(&name));
    }
    // One that can be shown is as good as another.
    let replaced = !is_it(&record) && !present_is_live;
    // Without its label containerd would not find it.
    let labelled = record.labels.get(REF_LABEL).is_some_and(|label| label == chain_id);
    if replaced || !labelled {
        if replaced {
            (record.layer, record.chain) = (layer, chain);
        }
        record.labels.insert(REF_LABEL.to_owned(), chain_id.to_owned());
        record.updated = now;
        snapshots.put(&name, &record)?;
    }
    Ok((name, Published::Present(record)))
}

/// Checks that `key` can be committed as a child of `parent` (empty: of the parent it has).
pub(super) fn check_commit(key: &str, record: Option<&SnapshotRecord>, parent: &str) -> Result<(), SnapshotsError> {
    let Some(record) = record else {
        return Err(SnapshotsError::not_found(key));
    };
    if record.kind != Kind::Active {
        return Err(SnapshotsError::precondition(format!(
            "snapshot {:?} is not active, and only an active one can be committed",
            quoted(key)
        )));
    }
    let present = record.parent.as_deref().unwrap_or("");
    if !parent.is_empty() && parent != present {
        return Err(SnapshotsError::precondition(format!(
            "snapshot {:?} has parent {:?} and cannot be committed on {:?}: this snapshotter does not rebase",
            quoted(key),
            quoted(present),
            quoted(parent),
        )));
    }
    Ok(())
}

/// Turns the active snapshot `key` into the committed `name`.
pub(super) fn commit(
    snapshots: &SnapshotsWrite<'_>,
    (name, key, parent): (&str, &str, &str),
    labels: BTreeMap<String, String>,
    usage: Usage,
    now: i64,
) -> Result<(), SnapshotsError> {
    if snapshots.get(name)?.is_some() {
        return Err(SnapshotsError::already_exists(name));
    }
    check_commit(key, snapshots.get(key)?.as_ref(), parent)?;
    let record = snapshots.remove(key)?.ok_or_else(|| SnapshotsError::not_found(key))?;
    // Its labels are those of the commit; the active snapshot's own are not inherited.
    let record = SnapshotRecord {
        kind: Kind::Committed,
        labels,
        created: now,
        updated: now,
        remapped: users::is_remap(key, name),
        usage,
        ..record
    };
    Ok(snapshots.put(name, &record)?)
}

/// Takes a snapshot away.
pub(super) fn remove(snapshots: &SnapshotsWrite<'_>, key: &str) -> Result<SnapshotRecord, SnapshotsError> {
    if snapshots.has_children(key)? {
        return Err(SnapshotsError::precondition(format!(
            "cannot remove snapshot {:?}: it has children",
            quoted(key)
        )));
    }
    snapshots.remove(key)?.ok_or_else(|| SnapshotsError::not_found(key))
}

/// Changes the labels of a snapshot: all of them, or those that `paths` (a field mask) names. Whether its limit of size is another now, too.
pub(super) fn update(
    snapshots: &SnapshotsWrite<'_>,
    key: &str,
    labels: HashMap<String, String>,
    paths: &[String],
    now: i64,
) -> Result<(SnapshotRecord, bool), SnapshotsError> {
    let mut record = snapshots.get(key)?.ok_or_else(|| SnapshotsError::not_found(key))?;
    let before = record.labels.clone();
    if paths.is_empty() {
        record.labels = kept_labels(labels);
    } else {
        for path in paths {
            if path == "labels" {
                record.labels = kept_labels(labels.clone());
            } else if let Some(label) = path.strip_prefix("labels.") {
                match labels.get(label).filter(|value| !value.is_empty()) {
                    Some(value) => record.labels.insert(label.to_owned(), value.clone()),
                    None => record.labels.remove(label),
                };
            } else {
                return Err(SnapshotsError::invalid(format!(
                    "cannot update field {:?} of snapshot {:?}, only labels",
                    quoted(path),
                    quoted(key)
                )));
            }
        }
    }
    // What it shows, and what was written into it, is of these owners.
    if record.kind != Kind::Committed && !users::same_owners(&before, &record.labels) {
        return Err(SnapshotsError::invalid(format!(
            "the labels that say which owners snapshot {:?} sees cannot be changed after it was made",
            quoted(key)
        )));
    }
    // What it was made with has been looked at.
    let is_limit = limits::label(&before) != limits::label(&record.labels);
    if is_limit {
        limits::size(record.kind, &record.labels)?;
    }
    record.updated = now;
    snapshots.put(key, &record)?;
    Ok((record, is_limit))
}
