//! Wishes in waves.
//!
//! A layer's queue makes large requests of what is asked for at once, in the order of the blob. So wishes are given to it in waves: the first is
//! large enough for most starts, and a later one follows when all of the one before has its request, and is twice as large. What a
//! reader waits for overtakes all of it, and a wish that a reader waits for is a reader's.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::play::Played;
use crate::fetch::{Layer, LayerData as _, Wished};

/// Bytes of the first wave: more than most programs read to start.
const FIRST_WAVE: u64 = 32 << 20;
/// Bytes of the largest wave: the order within it is that of the blob.
const LARGEST_WAVE: u64 = 256 << 20;
/// Part of the cache that all of them may be, if that is limited: one in so many.
pub(super) const CACHE_PART: u64 = 4;

/// Ranges of a data space: offsets and lengths.
type Ranges = Vec<(u64, u64)>;

/// What is asked for of a layer, whatever waits.
pub(super) struct AtOnce {
    pub(super) layer: Arc<Layer>,
    /// What will be read.
    pub(super) ranges: Ranges,
    /// What will be read together with what is beside it.
    pub(super) guessed: Ranges,
}

/// What is wished for an image.
pub(super) struct Waves {
    played: Arc<Played>,
    layers: Vec<Arc<Layer>>,
    /// Ranges of data spaces that are to be asked for, by their place in the order and the layer.
    waiting: BTreeMap<(usize, usize), (u64, u64)>,
    /// What was asked for last.
    wave: Vec<(Arc<Layer>, Wished)>,
    allowance: Allowance,
}

/// How much may be asked for.
struct Allowance {
    /// Bytes of the next wave.
    wave: u64,
    /// Bytes of all that follow.
    left: u64,
}

impl Allowance {
    /// Bytes of the next wave.
    fn next(&self) -> u64 {
        self.wave.min(self.left)
    }

    /// A wave has taken so much; the next one may take twice as much as this one might.
    fn take(&mut self, bytes: u64) {
        self.left = self.left.saturating_sub(bytes);
        self.wave = self.wave.saturating_mul(2).min(LARGEST_WAVE);
    }
}

impl Waves {
    /// None yet, of `left` bytes in all.
    pub(super) fn new(played: Arc<Played>, left: u64) -> Self {
        Waves {
            played,
            layers: Vec::new(),
            waiting: BTreeMap::new(),
            wave: Vec::new(),
            allowance: Allowance { wave: FIRST_WAVE, left },
        }
    }

    /// Adds what is wished of a layer: its place in the order, offset and length.
    pub(super) fn add(&mut self, layer: Arc<Layer>, ranges: impl Iterator<Item = (usize, (u64, u64))>) {
        let known = self.layers.iter().position(|known| Arc::ptr_eq(known, &layer));
        let number = known.unwrap_or(self.layers.len());
        if known.is_none() {
            self.layers.push(layer);
        }
        if self.allowance.left > 0 {
            self.waiting
                .extend(ranges.map(|(place, range)| ((place, number), range)));
        }
    }

    /// Asks for the next wave if the one before has its requests; bytes of it that were not here.
    pub(super) fn go_on(&mut self) -> u64 {
        if self.waiting.is_empty() || self.is_open() {
            return 0;
        }
        self.wave.clear();
        self.go_on_with(Vec::new())
    }

    /// Asks for the next wave whatever has become of the one before, and for what cannot wait; of each layer together.
    pub(super) fn go_on_with(&mut self, at_once: Vec<AtOnce>) -> u64 {
        let mut due = self.next();
        let is_wave = due.len();
        for AtOnce {
            layer,
            mut ranges,
            guessed,
        } in at_once
        {
            match due.iter_mut().find(|(known, ..)| Arc::ptr_eq(known, &layer)) {
                Some((_, known, guesses)) => {
                    known.append(&mut ranges);
                    guesses.extend(guessed);
                }
                None => due.push((layer, ranges, guessed)),
            }
        }
        let mut bytes = 0;
        for (at, (layer, ranges, guessed)) in due.into_iter().enumerate() {
            let wished = layer.wish_and_guess(&ranges, &guessed);
            bytes += self.played.note(layer.id(), &wished);
            if at < is_wave {
                self.wave.push((layer, wished));
            }
        }
        bytes
    }

    /// Whether all is under way.
    pub(super) fn are_over(&self) -> bool {
        self.waiting.is_empty() && !self.is_open()
    }

    /// Takes back what nobody waits for and no request has.
    pub(super) fn take_back(&self) {
        self.wave.iter().for_each(|(layer, wished)| layer.unwish(wished));
    }

    fn is_open(&self) -> bool {
        self.wave.iter().any(|(layer, _)| layer.has_wishes())
    }

    /// The next wave.
    fn next(&mut self) -> Vec<(Arc<Layer>, Ranges, Ranges)> {
        let mut asked: BTreeMap<usize, Ranges> = BTreeMap::new();
        let (room, mut taken) = (self.allowance.next(), 0_u64);
        while taken < room
            && let Some(((_, layer), range)) = self.waiting.pop_first()
        {
            asked.entry(layer).or_default().push(range);
            taken = taken.saturating_add(range.1);
        }
        if taken > 0 {
            self.allowance.take(taken);
        }
        if self.allowance.left == 0 {
            self.waiting.clear();
        }
        let asked = asked.into_iter();
        asked
            .map(|(layer, ranges)| (Arc::clone(&self.layers[layer]), ranges, Vec::new()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Waves may become larger than what is left.
    #[test]
    fn what_is_asked_for_in_many_small_waves_is_no_more_than_it_is() {
        let mut allowance = Allowance {
            wave: FIRST_WAVE,
            left: 4 * FIRST_WAVE,
        };
        for _ in 0..100 {
            allowance.take(1000);
        }
        assert_eq!(allowance.left, 4 * FIRST_WAVE - 100_000);
        assert_eq!(allowance.next(), allowance.left);
        allowance.take(LARGEST_WAVE);
        assert_eq!(allowance.next(), 0);
    }
}
