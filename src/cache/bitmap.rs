//! A fixed number of bits that many threads set and test without a lock.

use crate::sync::primitives::{AtomicU64, Ordering};

/// Bits numbered from 0.
pub(crate) struct Bitmap {
    words: Box<[AtomicU64]>,
    len: usize,
}

/// Bits of a word.
pub(super) const WORD: usize = u64::BITS as usize;

impl Bitmap {
    /// `len` bits, all clear.
    pub fn new(len: usize) -> Self {
        Bitmap {
            words: (0..len.div_ceil(WORD)).map(|_| AtomicU64::new(0)).collect(),
            len,
        }
    }

    /// `len` bits from `words`; words that are missing are zero, bits past `len` are dropped.
    pub fn from_words(len: usize, words: &[u64]) -> Self {
        let map = Bitmap::new(len);
        for (word, value) in map.words.iter().zip(words) {
            word.store(*value, Ordering::Relaxed);
        }
        if let (Some(last), used @ 1..) = (map.words.last(), len % WORD) {
            last.fetch_and((1 << used) - 1, Ordering::Relaxed);
        }
        map
    }

    /// Whether bit `at` is set; bits past the end are clear.
    pub fn get(&self, at: usize) -> bool {
        // SeqCst: the readers' protocol in `cache` orders these loads against the count of evictions.
        at < self.len
            && self
                .words
                .get(at / WORD)
                .is_some_and(|word| word.load(Ordering::SeqCst) >> (at % WORD) & 1 == 1)
    }

    /// Sets bit `at`; whether that changed it.
    pub fn set(&self, at: usize) -> bool {
        self.change(at, |word, bit| word.fetch_or(bit, Ordering::SeqCst) & bit == 0)
    }

    /// Clears bit `at`; whether that changed it.
    pub fn clear(&self, at: usize) -> bool {
        self.change(at, |word, bit| word.fetch_and(!bit, Ordering::SeqCst) & bit != 0)
    }

    fn change(&self, at: usize, change: impl FnOnce(&AtomicU64, u64) -> bool) -> bool {
        match self.words.get(at / WORD) {
            Some(word) if at < self.len => change(word, 1 << (at % WORD)),
            _ => false,
        }
    }

    /// The word at position `at`.
    pub fn word(&self, at: usize) -> u64 {
        self.words.get(at).map_or(0, |word| word.load(Ordering::SeqCst))
    }

    /// Number of words.
    pub fn words(&self) -> usize {
        self.words.len()
    }

    /// How many bits are set.
    pub fn count(&self) -> usize {
        (0..self.words.len())
            .map(|at| self.word(at).count_ones() as usize)
            .sum()
    }

    /// Positions of the bits that are set.
    pub fn ones(&self) -> impl Iterator<Item = usize> {
        (0..self.words.len()).flat_map(|at| {
            let mut word = self.word(at);
            std::iter::from_fn(move || {
                let bit = (word != 0).then(|| word.trailing_zeros() as usize)?;
                word &= word - 1;
                Some(at * WORD + bit)
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_set_and_cleared_and_found() {
        let map = Bitmap::new(130);
        assert!(map.set(0) && map.set(64) && map.set(129));
        assert!(!map.set(64), "already set");
        assert!(!map.set(130), "outside");
        assert_eq!(map.ones().collect::<Vec<_>>(), [0, 64, 129]);
        assert_eq!(map.count(), 3);
        assert!(map.clear(64) && !map.clear(64));
        assert!(map.get(129) && !map.get(64) && !map.get(130) && !map.get(usize::MAX));
    }

    #[test]
    fn stray_bits_after_the_end_are_dropped() {
        let map = Bitmap::from_words(3, &[u64::MAX, u64::MAX]);
        assert_eq!(map.ones().collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(Bitmap::from_words(64, &[u64::MAX]).ones().count(), 64);
        assert_eq!(Bitmap::from_words(65, &[1]).ones().count(), 1);
    }
}
