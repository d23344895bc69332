//! What a snapshot shows of its ancestors: the directories of their layers, and those of its own, made and put together.

use std::path::PathBuf;

use super::SnapshotsError;
use super::chain::{Chain, Entry, Part, parts};
use super::core::Core;
use super::dirs::{Built, Content, RootAttributes};
use super::rules;
use super::users::Mapping;
use crate::catalog::{Lowers, Start};
use crate::layer::Digest;
use crate::proto::types::Mount;
use crate::store::{EXTRACTION, Kind, shown};

impl Core {
    /// Tells the layers that containers will be made on the snapshot `name`.
    pub fn expect(&self, name: &str) -> Result<(), SnapshotsError> {
        let chain = self.store.chain(name)?;
        self.expect_on(&chain, &shown(&chain));
        Ok(())
    }

    pub(super) fn expect_on(&self, chain: &Chain, shown: &[Option<Digest>]) {
        if let Some(Part::Remote(base)) = parts(chain, shown).pop() {
            let layers: Vec<_> = base.iter().map(|(_, layer)| *layer).collect();
            self.layers.expect(&layers);
        }
    }

    /// Tells that a container is being made on an image.
    pub(super) fn start_on(&self, key: &str, chain: &Chain, shown: &[Option<Digest>]) {
        let top = chain.first().map(|(name, record)| self.chain_id(name, record));
        let Some(Ok(Some(chain_id))) = top else { return };
        let mut layers: Vec<Digest> = Vec::new();
        for part in parts(chain, shown) {
            if let Part::Remote(remote) = part {
                layers.extend(remote.iter().map(|(_, layer)| *layer));
            }
        }
        layers.reverse();
        self.layers.starting(Start {
            key: key.to_owned(),
            chain_id,
            layers,
        });
    }

    /// The directory of a new local snapshot over `lowers`, which may take `size` bytes.
    pub(super) fn build(
        &self,
        kind: Kind,
        lowers: &[PathBuf],
        mapping: Option<&Mapping>,
        size: Option<u64>,
    ) -> Result<Built, SnapshotsError> {
        let mut built = match mapping {
            Some(mapping) => self.dirs.build_mapped(kind, lowers, mapping)?,
            None => {
                let attributes = lowers.first().map(|lower| RootAttributes::of(lower)).transpose()?;
                self.dirs.build(&Content::Local(kind, attributes))?
            }
        };
        if let Some(bytes) = size {
            self.dirs.limit(&mut built, bytes)?;
        }
        Ok(built)
    }

    /// The committed snapshot `parent` (empty for none) and its ancestors.
    pub(super) fn parents(&self, parent: &str) -> Result<Chain, SnapshotsError> {
        if parent.is_empty() {
            return Ok(Vec::new());
        }
        let chain = self.store.chain(parent)?;
        rules::check_parent(parent, chain.first().map(|(_, record)| record.kind))?;
        Ok(chain)
    }

    /// The directories of a chain that shows these layers, topmost first, for the snapshot `key` on it.
    pub(super) fn lowers(
        &self,
        key: &str,
        chain: &Chain,
        shown: &[Option<Digest>],
    ) -> Result<Vec<PathBuf>, SnapshotsError> {
        // What a layer is unpacked on is the base of no container: an image of it would be made for every layer of an image.
        let merged = !key.contains(EXTRACTION);
        let mut lowers = Vec::with_capacity(chain.len());
        for part in parts(chain, shown) {
            match part {
                Part::Local(id) => lowers.push(self.dirs.own(id)),
                Part::Remote(remote) => self.remote_lowers(&remote, merged, &mut lowers)?,
            }
        }
        Ok(lowers)
    }

    /// The directories of layers, as paths in the tree of snapshots.
    fn remote_lowers(
        &self,
        remote: &[(&Entry, Digest)],
        merged: bool,
        lowers: &mut Vec<PathBuf>,
    ) -> Result<(), SnapshotsError> {
        let layers: Vec<Digest> = remote.iter().map(|(_, layer)| *layer).collect();
        let shown = self
            .layers
            .lowers(&layers, merged)
            .map_err(|missing| SnapshotsError::NotLive {
                layer: missing,
                key: remote
                    .iter()
                    .find(|(_, layer)| *layer == missing)
                    .map_or_else(String::new, |((key, _), _)| super::error::quoted(key)),
            })?;
        match shown {
            Lowers::Segments(segments) => {
                for (at, path) in segments {
                    if let Some(((_, top), _)) = remote.get(at) {
                        lowers.push(self.dirs.segment(top.id, &path)?);
                    }
                }
            }
            Lowers::Stacked(paths) => {
                for (((_, record), layer), path) in remote.iter().zip(&paths) {
                    lowers.push(match record.layer == Some(*layer) {
                        true => self.dirs.link(record.id, path)?,
                        // Not the snapshot's own layer, but what the image of those who are made on it believes in its place.
                        false => self.dirs.other_link(record.id, path)?,
                    });
                }
            }
        }
        Ok(())
    }

    pub(super) fn show(&self, id: u64, kind: Kind, lowers: &[PathBuf]) -> Vec<Mount> {
        let (own, work) = (self.dirs.own(id), self.dirs.work(id));
        self.overlay.mounts(kind, &own, &work, lowers)
    }
}
