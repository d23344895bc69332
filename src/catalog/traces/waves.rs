//! Wishes in waves.
//!
//! A layer's queue makes large requests of what is asked for at once, in the order of the blob. So wishes are given to it in waves: the first has
//! what a program reads before it does anything else, and a later one follows when all of the one before has its request, and is twice as large. What has its place
//! before something that was asked for already, since its layer came later, does not wait for that. What a
//! reader waits for overtakes all of it, and a wish that a reader waits for is a reader's.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::play::Played;
use crate::fetch::{Layer, LayerData as _, Wished};

/// Bytes of the first wave: the order within it is that of the blob, and what all commands of a program read comes before what some read. With 32 MiB, another command
/// took longer over a narrow link, and with 4 MiB nothing took less.
const FIRST_WAVE: u64 = 8 << 20;
/// Bytes of the largest wave: the order within it is that of the blob.
const LARGEST_WAVE: u64 = 256 << 20;
/// Part of the cache that all of them may be, if that is limited: one in so many.
pub(super) const CACHE_PART: u64 = 4;

/// Ranges of a data space: offsets and lengths.
type Ranges = Vec<(u64, u64)>;

/// Ranges of data spaces, by their place in the order and the number of the layer.
type Places = BTreeMap<(usize, usize), (u64, u64)>;

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
    order: Order,
    /// What was asked for last.
    wave: Vec<(Arc<Layer>, Wished)>,
}

/// What waits to be asked for.
struct Order {
    waiting: Places,
    /// What was taken since the last wave began, with that.
    taken: Places,
    /// All places before this one may have been asked for.
    reached: usize,
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

    /// So much is asked for.
    fn spend(&mut self, bytes: u64) {
        self.left = self.left.saturating_sub(bytes);
    }

    /// So much of that was asked for in vain.
    fn give_back(&mut self, bytes: u64) {
        self.left = self.left.saturating_add(bytes);
    }

    /// A wave has taken so much; the next one may take twice as much as this one might.
    fn take(&mut self, bytes: u64) {
        self.spend(bytes);
        self.wave = self.wave.saturating_mul(2).min(LARGEST_WAVE);
    }
}

impl Order {
    fn new(left: u64) -> Self {
        Order {
            waiting: Places::new(),
            taken: Places::new(),
            reached: 0,
            allowance: Allowance { wave: FIRST_WAVE, left },
        }
    }

    /// Adds ranges of a layer with their places.
    fn add(&mut self, layer: usize, ranges: impl Iterator<Item = (usize, (u64, u64))>) {
        if self.allowance.left > 0 {
            self.waiting
                .extend(ranges.map(|(place, range)| ((place, layer), range)));
        }
    }

    /// The next wave, by layer.
    fn wave(&mut self) -> BTreeMap<usize, Ranges> {
        self.taken.clear();
        let (asked, bytes) = self.until(usize::MAX);
        if bytes > 0 {
            self.allowance.take(bytes);
        }
        self.end_with_allowance();
        asked
    }

    /// What has its place before something that was asked for already.
    fn late(&mut self) -> BTreeMap<usize, Ranges> {
        let (asked, bytes) = self.until(self.reached);
        self.allowance.spend(bytes);
        self.end_with_allowance();
        asked
    }

    /// As much as a wave may be of what has its place before `end`, and bytes of it.
    fn until(&mut self, end: usize) -> (BTreeMap<usize, Ranges>, u64) {
        let mut asked: BTreeMap<usize, Ranges> = BTreeMap::new();
        let (room, mut taken) = (self.allowance.next(), 0_u64);
        while taken < room
            && let Some(first) = self.waiting.first_entry().filter(|first| first.key().0 < end)
        {
            let ((place, layer), range) = first.remove_entry();
            asked.entry(layer).or_default().push(range);
            taken = taken.saturating_add(range.1);
            self.taken.insert((place, layer), range);
            self.reached = self.reached.max(place + 1);
        }
        (asked, taken)
    }

    /// What was taken last is to be taken again, unless it has come.
    fn put_back(&mut self, has_come: impl Fn(usize, (u64, u64)) -> bool) {
        let taken = std::mem::take(&mut self.taken).into_iter();
        for ((place, layer), range) in taken.filter(|((_, layer), range)| !has_come(*layer, *range)) {
            self.allowance.give_back(range.1);
            self.waiting.insert((place, layer), range);
            self.reached = self.reached.min(place);
        }
    }

    fn end_with_allowance(&mut self) {
        if self.allowance.left == 0 {
            self.waiting.clear();
        }
    }
}

impl Waves {
    /// None yet, of `left` bytes in all.
    pub(super) fn new(played: Arc<Played>, left: u64) -> Self {
        Waves {
            played,
            layers: Vec::new(),
            order: Order::new(left),
            wave: Vec::new(),
        }
    }

    /// Adds what is wished of a layer: its place in the order, offset and length.
    pub(super) fn add(&mut self, layer: Arc<Layer>, ranges: impl Iterator<Item = (usize, (u64, u64))>) {
        let known = self.layers.iter().position(|known| Arc::ptr_eq(known, &layer));
        let number = known.unwrap_or(self.layers.len());
        if known.is_none() {
            self.layers.push(layer);
        }
        self.order.add(number, ranges);
    }

    /// Asks for the next wave if the one before has its requests, and else for what should have come before that; bytes of it that were not here.
    pub(super) fn go_on(&mut self) -> u64 {
        if self.order.waiting.is_empty() {
            return 0;
        }
        if !self.is_open() {
            self.wave.clear();
            return self.go_on_with(Vec::new());
        }
        let late = self.order.late();
        let late = self.of_layers(late);
        let count = late.len();
        self.ask(late, count)
    }

    /// Asks for the next wave whatever has become of the one before, and for what cannot wait; of each layer together.
    pub(super) fn go_on_with(&mut self, at_once: Vec<AtOnce>) -> u64 {
        let wave = self.order.wave();
        let mut due = self.of_layers(wave);
        let is_wave = due.len();
        for AtOnce {
            layer,
            mut ranges,
            guessed,
        } in at_once
        {
            match due.iter_mut().find(|due| Arc::ptr_eq(&due.layer, &layer)) {
                Some(due) => {
                    due.ranges.append(&mut ranges);
                    due.guessed.extend(guessed);
                }
                None => due.push(AtOnce { layer, ranges, guessed }),
            }
        }
        self.ask(due, is_wave)
    }

    fn of_layers(&self, asked: BTreeMap<usize, Ranges>) -> Vec<AtOnce> {
        let asked = asked.into_iter().map(|(number, ranges)| AtOnce {
            layer: Arc::clone(&self.layers[number]),
            ranges,
            guessed: Vec::new(),
        });
        asked.collect()
    }

    /// Asks for what is due, of which the first `is_wave` are of a wave; bytes that were not here.
    fn ask(&mut self, due: Vec<AtOnce>, is_wave: usize) -> u64 {
        let mut bytes = 0;
        for (at, due) in due.into_iter().enumerate() {
            let wished = due.layer.wish_and_guess(&due.ranges, &due.guessed);
            bytes += self.played.note(due.layer.id(), &wished);
            if at < is_wave {
                self.wave.push((due.layer, wished));
            }
        }
        bytes
    }

    /// Whether all is under way.
    pub(super) fn are_over(&self) -> bool {
        self.order.waiting.is_empty() && !self.is_open()
    }

    /// Takes back what nobody waits for and no request has.
    pub(super) fn take_back(&self) {
        self.wave.iter().for_each(|(layer, wished)| layer.unwish(wished));
    }

    /// Takes it back for a while: it is asked for again when this goes on.
    pub(super) fn hold(&mut self) {
        self.take_back();
        self.wave.clear();
        let layers = &self.layers;
        self.order
            .put_back(|layer, (offset, len)| layers[layer].cached().is_ready(offset, len));
    }

    fn is_open(&self) -> bool {
        self.wave.iter().any(|(layer, _)| layer.has_wishes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The most urgent may be in the layer that comes last.
    #[test]
    fn what_comes_late_does_not_wait_for_what_has_its_place_behind_it() {
        const LEN: u64 = FIRST_WAVE / 4;
        let at = |places: &[usize]| {
            places
                .iter()
                .map(|&place| (place, (place as u64, LEN)))
                .collect::<Vec<_>>()
        };
        let mut order = Order::new(u64::MAX);
        order.add(0, at(&[2, 3, 5, 7, 9]).into_iter());
        assert_eq!(order.wave()[&0].len(), 4);
        assert!(order.late().is_empty());
        order.add(1, at(&[0, 1, 4, 8]).into_iter());
        let places: Vec<_> = order.late()[&1].iter().map(|(place, _)| *place).collect();
        assert_eq!(places, [0, 1, 4]);
        assert!(order.late().is_empty(), "those behind wait for their wave");
        let rest = BTreeMap::from([(0, vec![(9, LEN)]), (1, vec![(8, LEN)])]);
        assert_eq!(order.wave(), rest);
    }

    /// What has come is not asked for again; the rest is, in its order.
    #[test]
    fn what_is_put_back_is_the_next_wave() {
        let wishes = |places: std::ops::Range<usize>| places.map(|place| (place, (place as u64, 4 << 20)));
        let mut order = Order::new(FIRST_WAVE + (5 << 20));
        order.add(0, wishes(0..4));
        assert_eq!(order.wave()[&0].len(), 2);
        order.put_back(|_, (offset, _)| offset == 0);
        assert_eq!(order.reached, 1, "nothing behind it was asked for");
        // Less is left than a wave might take, by what has come.
        let again: Vec<_> = order.wave()[&0].iter().map(|(place, _)| *place).collect();
        assert_eq!(again, [1, 2, 3]);
        order.put_back(|_, _| true);
        assert!(order.waiting.is_empty() && order.wave().is_empty());
    }

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
