//! What is believed of layers, and by whom.
//!
//! A blob's digest says what its bytes are, and nothing of the index that they are read by: where files are in it, and what they are called.
//! Such an index is *proven* if it was built here from the whole blob, or compared with the whole tar later: the digest of that tar is known then,
//! and every image that promises the tar may be shown the layer. Anything else is *vouched for*: by the image's manifest (a table of contents, a SOCI
//! index, a portable index), by the client, or by the configuration (a key, a repository). A hostile manifest vouches for what it likes; so
//! what is vouched for is shown to nobody but those images that vouch for the same, or for whom the configuration does.
//!
//! # Ids
//! What is believed has an *id*: the digest of the blob if its index was built from it, else the SHA-256 of [`DOMAIN`], the kind, the digest of the
//! blob and that of what is believed. Everything that follows from it is kept under that id: bytes in the cache, slots, snapshots, variants,
//! chains. Two ids of one blob share nothing.
//!
//! # What is remembered
//! The database has a record of every layer and of the origin of its index; [`Beliefs`] holds what of them decides, in memory, by blob.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

use super::loader::LayerSpec;
use super::shared::Origin;
use super::shared::trust::{Policy, Trust};
use crate::layer::Digest;
use crate::store::{IndexRecord, LayerRecord, Store, StoreError, Voucher};

/// Tells ids of what is vouched for from other digests.
const DOMAIN: &[u8] = b"lazuli vouched layer\0";

/// What kind of thing is believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A table of contents that the manifest states.
    Table,
    /// A SOCI index.
    Soci,
    /// A portable index.
    Portable,
}

impl Kind {
    fn word(self) -> &'static [u8] {
        match self {
            Kind::Table => b"table\0",
            Kind::Soci => b"soci\0",
            Kind::Portable => b"portable\0",
        }
    }

    /// The id of `blob` with the index that has this digest.
    pub fn id(self, blob: &Digest, what: &Digest) -> Digest {
        Digest::of(&[DOMAIN, self.word(), blob.as_bytes(), what.as_bytes()].concat())
    }
}

/// What is known of one id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Belief {
    /// The id.
    pub id: Digest,
    /// Digest of the blob.
    pub blob: Digest,
    /// Digest of the tar that the layer was found to be.
    pub proof: Option<Digest>,
    /// Where its index came from.
    pub index: Option<IndexRecord>,
}

/// Why a layer may be shown to an image; the earlier, the better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ground {
    /// It was found to be the tar that the image promises.
    Proven,
    /// Its index was built from the image's own blob. What the tar's digest is has not been noted.
    Built,
    /// The image vouches for the index itself.
    Image,
    /// A configured key has signed the index.
    Signed,
    /// The index comes from a place that the configuration trusts.
    Place,
}

impl Belief {
    /// Whether it was found not to be what was believed.
    pub fn is_false(&self) -> bool {
        self.index.as_ref().is_some_and(IndexRecord::is_false)
    }

    /// Why the layer may be shown to an image that says `spec` of it and vouches for `vouched`; `None` if it may not.
    pub fn ground(
        &self,
        spec: &LayerSpec,
        origin: &Origin,
        vouched: &[Digest],
        policy: Option<&Policy>,
    ) -> Option<Ground> {
        if self.is_false() {
            return None;
        }
        match (self.proof, spec.diff_id) {
            (Some(proof), Some(promised)) if proof == promised => return Some(Ground::Proven),
            // It is another tar than the image says. Whoever is right, they do not belong together.
            (Some(_), Some(_)) => return None,
            _ => {}
        }
        if self.blob != spec.digest {
            return None;
        }
        if self.id == spec.digest {
            return Some(Ground::Built);
        }
        if vouched.contains(&self.id) {
            return Some(Ground::Image);
        }
        let policy = policy?;
        match self.index.as_ref()? {
            IndexRecord::Shared {
                digest,
                place: Some(place),
                signature,
                ..
            } => match policy.judge(place, &self.blob, digest, signature.as_deref(), false)? {
                Trust::Signed(_) => Some(Ground::Signed),
                Trust::Repository => {
                    let is_near = policy.repository() == Some(place) || origin.sources.contains(place);
                    is_near.then_some(Ground::Place)
                }
                Trust::Manifest => None,
            },
            IndexRecord::Soci {
                by: Voucher::Place,
                place: Some(place),
                ..
            } => (policy.trusts_unsigned(place) && origin.sources.contains(place)).then_some(Ground::Place),
            _ => None,
        }
    }

    /// Whether the client that pulled the layer named the index, so that it counts for whatever is made on its snapshot.
    pub fn is_clients_word(&self, policy: Option<&Policy>) -> bool {
        let by_client = matches!(
            &self.index,
            Some(IndexRecord::Soci {
                by: Voucher::Client,
                ..
            })
        );
        by_client && !self.is_false() && policy.is_some_and(|policy| !policy.requires_signature())
    }
}

/// What is known of all ids.
#[derive(Default)]
pub struct Beliefs(RwLock<State>);

#[derive(Default)]
struct State {
    by_id: HashMap<Digest, Belief>,
    by_blob: HashMap<Digest, Vec<Digest>>,
    /// The layer that each variant is of.
    variants: HashMap<Digest, Digest>,
}

impl Beliefs {
    /// Reads what the database knows.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn load(&self, store: &Store) -> Result<(), StoreError> {
        let mut indexes: HashMap<Digest, IndexRecord> = store.indexes()?.into_iter().collect();
        for (_, record) in store.layers()? {
            if let Ok(record) = record {
                let index = indexes.remove(&record.digest);
                self.note(&record);
                if let Some(index) = index {
                    self.note_index(&record.digest, index);
                }
            }
        }
        Ok(())
    }

    /// Takes note of a layer's or variant's record.
    pub fn note(&self, record: &LayerRecord) {
        let mut state = self.write();
        if let Some(of) = record.variant_of {
            state.variants.insert(record.digest, of);
            return;
        }
        let blob = record.blob();
        if let Some(belief) = state.by_id.get_mut(&record.digest) {
            belief.proof = record.proof.or(belief.proof);
            return;
        }
        let belief = Belief {
            id: record.digest,
            blob,
            proof: record.proof,
            index: None,
        };
        state.by_id.insert(record.digest, belief);
        state.by_blob.entry(blob).or_default().push(record.digest);
    }

    /// Takes note of where an index came from, or of what came of it.
    pub fn note_index(&self, id: &Digest, index: IndexRecord) {
        if let Some(belief) = self.write().by_id.get_mut(id) {
            belief.index = Some(index);
        }
    }

    /// Forgets a layer, whose record is gone.
    pub fn forget(&self, id: &Digest) {
        let mut state = self.write();
        let Some(belief) = state.by_id.remove(id) else { return };
        if let Some(ids) = state.by_blob.get_mut(&belief.blob) {
            ids.retain(|other| other != id);
            if ids.is_empty() {
                state.by_blob.remove(&belief.blob);
            }
        }
    }

    /// Forgets a variant.
    pub fn forget_variant(&self, variant: &Digest) {
        self.write().variants.remove(variant);
    }

    /// What is known of an id.
    pub fn get(&self, id: &Digest) -> Option<Belief> {
        self.read().by_id.get(id).cloned()
    }

    /// What is known of a blob's ids.
    pub fn of_blob(&self, blob: &Digest) -> Vec<Belief> {
        let state = self.read();
        let ids = state.by_blob.get(blob).map(Vec::as_slice).unwrap_or_default();
        ids.iter().filter_map(|id| state.by_id.get(id)).cloned().collect()
    }

    /// The id of the layer that is shown under this id, which may be that of a variant.
    pub fn layer_of(&self, id: &Digest) -> Digest {
        self.read().variants.get(id).copied().unwrap_or(*id)
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, State> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
