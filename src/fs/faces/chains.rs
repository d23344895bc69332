//! Chains: runs of layers merged into one image each, so that overlayfs has few lower directories however many layers there are.
//!
//! An image is made once, and stored (stored.rs): it costs time by the number of files, and nobody waits for it. It counts only together
//! with the indexes that it was made of. It has a device for each layer, which is the layer's file in the cache if that is whole, and
//! its data space in FUSE if it is not.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::mounts::{Cause, Metadata, State, Trouble};
use super::stored::{self, Part};
use super::{Device, Face, Faces, FsError};
use crate::layer::merge::merge;
use crate::layer::{LayerIndex, erofs};

/// What a chain is shown as where it has no image.
pub(super) const STACK: &str = "stack";

impl Faces {
    /// Makes and stores the image of a chain, whose `layers` are slots, the lowest first, unless it is stored already; they lie
    /// on those in `below`. Nothing is done where the tree serves.
    ///
    /// Takes a second for a few hundred thousand files, and as much memory as the image and the indexes together; one is made at a time.
    ///
    /// # Errors
    /// [`FsError::NotAttached`], [`FsError::Chain`], [`FsError::Names`], [`FsError::Files`]. Nothing is stored then, and the layers have to
    /// be stacked.
    pub fn build_chain(&self, slot: u32, layers: &[u32], below: &[u32]) -> Result<(), FsError> {
        if self.serving.face == Face::Tree {
            return Ok(());
        }
        let devices = self.devices(layers)?;
        let parts = parts_of(&devices);
        let _one = self.building.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = self.mounts.entry(slot);
        if self.load_chain(slot, &parts, &mut entry.lock()) {
            return Ok(());
        }
        // Not locked meanwhile: who asks for the chain stacks its layers.
        let built = self.make_chain(slot, &devices, parts, &self.devices(below)?);
        let outcome = if built.is_ok() { "built" } else { "failed" };
        self.metrics.face_chains_total.with_label_values(&[outcome]).inc();
        let mut state = entry.lock();
        let result = match built {
            Ok(metadata) => {
                // Mounts of another image.
                let _ = self.mounts.dismount(slot, &mut state);
                state.metadata = Some(metadata);
                state.trouble = None;
                Ok(())
            }
            Err(error) => {
                let reason = error.to_string();
                state.trouble = Some(match error {
                    FsError::Chain { .. } => Trouble::lasting(Cause::Index, reason),
                    _ => Trouble::passing(Cause::Disk, reason),
                });
                Err(error)
            }
        };
        entry.tell(&state, STACK);
        result
    }

    /// The directory that shows the chain in `slot`, mounted now if it is not. `None`: it has no image of these layers, or that cannot be
    /// mounted; its layers have to be stacked.
    pub fn chain_path(&self, slot: u32, layers: &[u32]) -> Option<PathBuf> {
        if self.serving.face == Face::Tree {
            return None;
        }
        let devices = self.devices(layers).ok()?;
        let parts = parts_of(&devices);
        let entry = self.mounts.entry(slot);
        let mut state = entry.lock();
        state.given = self.given.load(Ordering::SeqCst);
        let path = match self.load_chain(slot, &parts, &mut state) {
            true => self.show(slot, &mut state, &devices),
            false => None,
        };
        entry.tell(&state, STACK);
        path
    }

    /// Bytes that the image of the chain in `slot` takes on disk; 0 if there is none.
    pub fn chain_bytes(&self, slot: u32) -> u64 {
        std::fs::metadata(self.mounts.places.chain(slot)).map_or(0, |metadata| metadata.len())
    }

    /// Unmounts the chain in `slot`, and removes what is stored of it.
    pub fn forget_chain(&self, slot: u32) {
        if let Some(entry) = self.mounts.find(slot) {
            let mut state = entry.lock();
            let _ = self.mounts.dismount(slot, &mut state);
            state.metadata = None;
            self.mounts.remove(slot);
        }
        self.session.detach_metadata(slot);
        self.mounts.places.remove(&self.mounts.places.chain(slot));
    }

    /// Sees to it that `state` has the image that is stored of these layers; tells whether there is one.
    fn load_chain(&self, slot: u32, parts: &[Part], state: &mut State) -> bool {
        match &state.metadata {
            Some(metadata) if metadata.parts == parts => return true,
            Some(_) => {
                tracing::info!(slot, "a layer of the chain has another index now");
                let _ = self.mounts.dismount(slot, state);
                state.metadata = None;
            }
            None => {}
        }
        let path = self.mounts.places.chain(slot);
        let stored = match stored::load(&path, self.addressing) {
            Ok(None) => return false,
            Ok(Some(Ok(stored))) if stored.parts == parts => stored,
            Ok(Some(stored)) => {
                let reason = stored.err().unwrap_or("it was made of other indexes");
                tracing::info!("{} is discarded: {reason}", path.display());
                self.mounts.places.remove(&path);
                return false;
            }
            Err(error) => {
                tracing::warn!("{error}");
                return false;
            }
        };
        match self.source(slot, path) {
            Ok(source) => {
                self.metrics.face_chains_total.with_label_values(&["loaded"]).inc();
                state.metadata = Some(Metadata {
                    source,
                    uuid: stored.uuid,
                    parts: stored.parts,
                });
                true
            }
            Err(error) => {
                tracing::warn!("{error}");
                false
            }
        }
    }

    fn make_chain(
        &self,
        slot: u32,
        devices: &[Device],
        parts: Vec<Part>,
        below: &[Device],
    ) -> Result<Metadata, FsError> {
        let fail = |source| FsError::Chain { slot, source };
        let unread = |source| FsError::Names { slot, source };
        let names = |devices: &[Device]| {
            let names = devices.iter().map(|device| device.layer.names().map_err(unread));
            names.collect::<Result<Vec<_>, _>>()
        };
        let merge = |names: &[Arc<LayerIndex>], below: Option<&LayerIndex>| {
            let indexes: Vec<&LayerIndex> = names.iter().map(|names| &**names).collect();
            merge(&indexes, below).map_err(fail)
        };
        let below = match below.is_empty() {
            true => None,
            false => Some(merge(&names(below)?, None)?.index),
        };
        let names = names(devices)?;
        let merged = merge(&names, below.as_ref())?;
        drop(below);
        let spaces: Vec<erofs::Device> = devices
            .iter()
            .zip(&merged.devices)
            .map(|(device, size)| erofs::Device {
                tag: *device.layer.id(),
                size: *size,
            })
            .collect();
        let image = erofs::write(&merged.index, &spaces, self.addressing).map_err(fail)?;
        drop((merged, names));
        self.count_dropped(slot, image.dropped_xattrs);
        let path = self.mounts.places.chain(slot);
        let trailer = stored::trailer(&image, self.addressing, &parts);
        self.mounts.places.write(&path, &[&image.bytes, &trailer], true)?;
        tracing::debug!(
            slot,
            layers = devices.len(),
            inodes = image.inodes,
            "a chain was merged"
        );
        Ok(Metadata {
            source: self.source(slot, path)?,
            uuid: stored::uuid(&image.bytes),
            parts,
        })
    }

    /// The layers in `slots`.
    fn devices(&self, slots: &[u32]) -> Result<Vec<Device>, FsError> {
        slots
            .iter()
            .map(|slot| {
                self.layer(*slot)
                    .map(|layer| Device {
                        slot: *slot,
                        layer: Arc::clone(&layer),
                    })
                    .ok_or(FsError::NotAttached { slot: *slot })
            })
            .collect()
    }
}

fn parts_of(devices: &[Device]) -> Vec<Part> {
    devices.iter().map(|device| Part::of(device.layer.index())).collect()
}
