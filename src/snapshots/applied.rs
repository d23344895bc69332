//! Snapshots in which containerd would unpack a layer, and which show that layer as Lazuli has it instead.
//!
//! containerd prepares such a snapshot under a key of its own, has a differ apply the layer to its mounts, and commits it. If the differ is
//! Lazuli ([`super::differ`]), nothing is written into the snapshot: it is recorded which layer it shows, and its commit makes a remote snapshot of it,
//! under the name that containerd gives it. What was recorded and not committed goes with the snapshot, or survives a restart with it.

use std::collections::HashMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use super::SnapshotsError;
use super::chain::shown_by;
use super::core::Core;
use super::dirs::Content;
use super::error::quoted;
use super::info::now;
use super::rules::{self, kept_labels};
use crate::catalog::Applied;
use crate::layer::Digest;
use crate::proto::types::Mount;
use crate::store::{EXTRACTION, Kind, Usage};

/// A snapshot that a layer is to be applied to.
#[derive(Debug, Clone)]
pub(super) struct Target {
    pub key: String,
    pub id: u64,
    /// Chain id that it will have, as its key says.
    pub chain_id: String,
    /// What the snapshots below it show, the lowest first.
    pub below: Vec<Option<Digest>>,
}

/// What mounts are, as far as applying a layer to them is concerned.
#[derive(Debug, Clone)]
pub(super) enum Aim {
    /// Those of somebody else.
    Foreign,
    /// Those of a snapshot of Lazuli's in which the layer has to be unpacked: the id, and why.
    Unpack(u64, &'static str),
    /// Those of a snapshot that can show the layer.
    Show(Target),
}

impl Core {
    /// Whose mounts these are.
    pub fn aim(&self, mounts: &[Mount]) -> Result<Aim, SnapshotsError> {
        let Some(own) = written_to(mounts) else {
            return Ok(Aim::Foreign);
        };
        let Some(id) = self.dirs.id_of(Path::new(own)) else {
            return Ok(Aim::Foreign);
        };
        let keys = self
            .store
            .keys(|ancestor| ancestor.id == id && ancestor.kind == Kind::Active);
        let Some(key) = keys.into_iter().next() else {
            return Ok(Aim::Foreign);
        };
        let chain_id = match key.rsplit_once(' ') {
            Some((begin, chain_id)) if begin.contains(EXTRACTION) => chain_id.to_owned(),
            // A container's: it is not committed, and what is applied to it must be there at once.
            _ => return Ok(Aim::Unpack(id, "it is not one in which containerd unpacks an image")),
        };
        self.asked().insert(id);
        self.layers.differ_was_asked(true);
        if !is_empty(&self.dirs.own(id))? {
            return Ok(Aim::Unpack(id, "something has been written into it"));
        }
        let mut chain = self.store.chain(&key)?;
        if chain.is_empty() {
            return Ok(Aim::Foreign);
        }
        let (_, own) = chain.remove(0);
        let below = shown_by(&own.chain, &chain);
        Ok(Aim::Show(Target {
            key,
            id,
            chain_id,
            below,
        }))
    }

    /// Records that a snapshot shows a layer.
    pub fn show_applied(&self, target: &Target, applied: &Applied) -> Result<(), SnapshotsError> {
        let (key, id) = (target.key.clone(), target.id);
        let (layer, vouched) = (applied.layer, !applied.proven);
        self.store.write_snapshots(move |snapshots| {
            let record = snapshots.get(&key)?;
            let Some(mut record) = record.filter(|record| record.id == id && record.kind == Kind::Active) else {
                return Err(SnapshotsError::not_found(&key));
            };
            (record.layer, record.vouched) = (Some(layer), vouched);
            Ok(snapshots.put(&key, &record)?)
        })?;
        if applied.is_top {
            self.tops().insert(id);
        }
        Ok(())
    }

    /// Commits a snapshot that shows a layer.
    pub(super) fn commit_applied(
        &self,
        (name, key, parent): (&str, &str, &str),
        labels: HashMap<String, String>,
        (id, layer): (u64, Digest),
    ) -> Result<(), SnapshotsError> {
        if !is_empty(&self.dirs.own(id))? {
            return Err(SnapshotsError::precondition(format!(
                "snapshot {:?} shows a layer that was applied to it, and has files of its own beside it: remove it, and pull its image again",
                quoted(key)
            )));
        }
        if !self.layers.is_live(&layer) {
            let key = quoted(key);
            return Err(SnapshotsError::NotLive { layer, key });
        }
        let (bytes, inodes) = self.layers.usage(&layer).unwrap_or_default();
        let built = self.dirs.build(&Content::Remote)?;
        let (dirs, owned) = (Arc::clone(&self.dirs), [name, key, parent].map(str::to_owned));
        self.store.write_snapshots(move |snapshots| {
            let [name, key, parent] = &owned;
            let usage = Usage { bytes, inodes };
            rules::commit(snapshots, (name, key, parent), kept_labels(labels), usage, now())?;
            dirs.place(built, id)
        })?;
        self.dirs.sync()?;
        if self.tops().remove(&id)
            && let Err(error) = self.expect(name)
        {
            tracing::warn!(%error, name, "layers are not merged ahead");
        }
        Ok(())
    }
}

/// The directory that is written to through these mounts: those of one snapshot, as [`super::mounts`] makes them.
fn written_to(mounts: &[Mount]) -> Option<&str> {
    let [mount] = mounts else { return None };
    match mount.r#type.as_str() {
        "overlay" => mount.options.iter().find_map(|option| option.strip_prefix("upperdir=")),
        "bind" if !mount.options.iter().any(|option| option == "ro") => Some(&mount.source),
        _ => None,
    }
}

/// Whether there are no files in a directory. It may be gone: a commit that failed, or a power cut in it, may have put the remote snapshot's in its
/// place.
fn is_empty(dir: &Path) -> Result<bool, SnapshotsError> {
    match fs::read_dir(dir) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
        Err(error) => Err(SnapshotsError::io("list", dir)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
        Mount {
            r#type: kind.to_owned(),
            source: source.to_owned(),
            target: String::new(),
            options: options.iter().map(|&option| option.to_owned()).collect(),
        }
    }

    #[test]
    fn the_directory_that_is_written_to_is_found() {
        let overlay = mount(
            "overlay",
            "overlay",
            &["workdir=/r/work", "upperdir=/r/fs", "lowerdir=/a"],
        );
        let bind = mount("bind", "/r/fs", &["rw", "rbind"]);
        assert_eq!(written_to(std::slice::from_ref(&overlay)), Some("/r/fs"));
        assert_eq!(written_to(std::slice::from_ref(&bind)), Some("/r/fs"));
        for other in [
            vec![],
            vec![overlay, bind],
            vec![mount("bind", "/r/fs", &["ro", "rbind"])],
            vec![mount("overlay", "overlay", &["lowerdir=/a:/b"])],
            vec![mount("erofs", "/r/fs", &[])],
        ] {
            assert_eq!(written_to(&other), None, "{other:?}");
        }
    }
}
