//! A snapshot's ancestors, and the directories that they are shown by.

use std::collections::HashSet;

use crate::layer::Digest;
use crate::store::{Ancestor, shown};

/// A snapshot with its key or name.
pub(super) type Entry = (String, Ancestor);

/// A committed snapshot and its ancestors, nearest first.
pub(super) type Chain = Vec<Entry>;

/// A part of a chain that is shown in one way.
pub(super) enum Part<'a> {
    /// The directory of the local snapshot with this id.
    Local(u64),
    /// Layers, topmost first: all of the lowest remote snapshots, which may be shown merged, or a single one that has a local one below it:
    /// merged layers have no whiteouts any more, and would not hide anything.
    Remote(Vec<(&'a Entry, Digest)>),
}

/// What a chain is made of, topmost first. `shown` are the layers in the places of its snapshots, the lowest first.
///
/// A layer that occurs twice (empty layers often do) is shown once, where it is topmost: all that it has below is hidden by itself, and
/// overlayfs refuses the same directory twice.
pub(super) fn parts<'a>(chain: &'a Chain, shown: &[Option<Digest>]) -> Vec<Part<'a>> {
    let base = chain.len()
        - chain
            .iter()
            .rev()
            .take_while(|(_, record)| record.layer.is_some())
            .count();
    let mut seen = HashSet::new();
    let mut parts = Vec::new();
    let mut lowest = Vec::new();
    for (position, entry) in chain.iter().enumerate() {
        let layer = entry.1.layer.map(|own| {
            let said = shown.get(chain.len() - 1 - position).copied().flatten();
            said.unwrap_or(own)
        });
        match layer {
            None => parts.push(Part::Local(entry.1.id)),
            Some(layer) if !seen.insert(layer) => {}
            Some(layer) if position < base => parts.push(Part::Remote(vec![(entry, layer)])),
            Some(layer) => lowest.push((entry, layer)),
        }
    }
    if !lowest.is_empty() {
        parts.push(Part::Remote(lowest));
    }
    parts
}

/// What a snapshot that says `own` is shown of its ancestors: what it says itself, or what they say.
pub(super) fn shown_by(own: &[Option<Digest>], chain: &Chain) -> Vec<Option<Digest>> {
    match own {
        [] => shown(chain),
        own => own.to_vec(),
    }
}
