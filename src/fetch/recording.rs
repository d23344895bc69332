//! What is read of some layers for a while, in the order of the first read.
//!
//! A [`Recording`] watches layers ([`super::Layer::watch`]) from the making of a container on. Every read of their data spaces that reaches
//! Lazuli is noted, whether its bytes are here or not; what was noted before is not noted again. What Lazuli itself fetches ahead is no read.
//!
//! The kernel's read-ahead is: it cannot be told from a program's own reads, and it comes again in the next start, where bytes that are not
//! here would cost the same round trip. It ends with its file, begins with 16 KiB, and grows with what is really read (a page fault brings
//! 128 KiB around it at most), so that a look at a header does not become a wish for a file. What is fetched for a wish is never more
//! than a start without wishes has fetched: the chunks with these bytes.
//!
//! A layer that nobody watches pays one relaxed load for each read.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use crate::layer::trace::{MAX_BYTES, MAX_WISHES, Seen};
use crate::sync::primitives::{AtomicBool, Mutex, MutexGuard, Ordering};

/// What is read of several layers.
#[derive(Debug)]
pub struct Recording {
    began: Instant,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Of each layer, what was read: ends by beginnings, none of which touch each other.
    noted: Vec<BTreeMap<u64, u64>>,
    reads: Vec<Seen>,
    bytes: u64,
    /// When something was read for the first time, last.
    last: Option<Instant>,
    /// Whether anything was left out.
    is_full: bool,
}

impl Recording {
    /// One of so many layers, none of which was read yet.
    pub fn new(layers: usize) -> Arc<Self> {
        let state = State {
            noted: vec![BTreeMap::new(); layers],
            ..State::default()
        };
        Arc::new(Recording {
            began: Instant::now(),
            state: Mutex::new(state),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that `len` bytes at `offset` of a layer were read.
    fn note(&self, layer: usize, offset: u64, len: u64) {
        let now = Instant::now();
        let at = now.saturating_duration_since(self.began).as_millis();
        self.state()
            .note(layer, offset, len, u32::try_from(at).unwrap_or(u32::MAX), now);
    }

    /// How long ago anything was read that had not been read before, or the recording began.
    pub fn quiet(&self) -> Duration {
        self.state().last.unwrap_or(self.began).elapsed()
    }

    /// How long ago it began.
    pub fn age(&self) -> Duration {
        self.began.elapsed()
    }

    /// Whether it takes nothing any more.
    pub fn is_full(&self) -> bool {
        self.state().is_full
    }

    /// What was read, in the order of the first read.
    pub fn reads(&self) -> Vec<Seen> {
        self.state().reads.clone()
    }

    /// Whether any of these bytes was read.
    pub fn has_read(&self, layer: usize, offset: u64, len: u64) -> bool {
        let state = self.state();
        let Some(noted) = state.noted.get(layer) else {
            return false;
        };
        let before = noted.range(..offset.saturating_add(len)).next_back();
        before.is_some_and(|(_, end)| *end > offset)
    }
}

impl State {
    fn note(&mut self, layer: usize, offset: u64, len: u64, at: u32, now: Instant) {
        let Some(noted) = self.noted.get_mut(layer) else { return };
        let end = offset.saturating_add(len);
        if offset >= end || self.is_full {
            return;
        }
        // What touches it becomes one with it; what lies between was not read before.
        let mut whole = offset..end;
        let mut from = offset;
        let mut new = Vec::new();
        let first = noted.range(..offset).next_back();
        let first = first.filter(|(_, until)| **until >= offset).map(|(start, _)| *start);
        let touching: Vec<(u64, u64)> = noted
            .range(first.unwrap_or(offset)..=end)
            .map(|(start, until)| (*start, *until))
            .collect();
        for (start, until) in touching {
            if from < start {
                new.push(from..start.min(end));
            }
            from = from.max(until);
            whole = whole.start.min(start)..whole.end.max(until);
            noted.remove(&start);
        }
        if from < end {
            new.push(from..end);
        }
        noted.insert(whole.start, whole.end);
        for range in new {
            self.add(Seen {
                layer,
                offset: range.start,
                len: range.end - range.start,
                at,
            });
            self.last = Some(now);
        }
    }

    fn add(&mut self, read: Seen) {
        self.bytes = self.bytes.saturating_add(read.len);
        // A file that is read from its beginning is one range.
        if let Some(last) = self.reads.last_mut()
            && last.layer == read.layer
            && last.offset + last.len == read.offset
        {
            last.len += read.len;
        } else if self.reads.len() < MAX_WISHES {
            self.reads.push(read);
        } else {
            self.is_full = true;
        }
        self.is_full |= self.bytes >= MAX_BYTES;
    }
}

/// Recordings that watch one layer.
#[derive(Debug, Default)]
pub(super) struct Watchers {
    any: AtomicBool,
    list: Mutex<Vec<(Arc<Recording>, usize)>>,
}

impl Watchers {
    fn list(&self) -> MutexGuard<'_, Vec<(Arc<Recording>, usize)>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a recording told what is read, as of its layer at `position`.
    pub fn add(&self, recording: &Arc<Recording>, position: usize) {
        let mut list = self.list();
        list.push((Arc::clone(recording), position));
        self.any.store(true, Ordering::Relaxed);
    }

    /// Has it told nothing any more.
    pub fn remove(&self, recording: &Arc<Recording>) {
        let mut list = self.list();
        list.retain(|(other, _)| !Arc::ptr_eq(other, recording));
        self.any.store(!list.is_empty(), Ordering::Relaxed);
    }

    /// Tells that these bytes were read.
    pub fn note(&self, offset: u64, len: u64) {
        // A read that comes while a recording begins or ends may count or not.
        if self.any.load(Ordering::Relaxed) {
            for (recording, position) in self.list().iter() {
                recording.note(*position, offset, len);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn noted(reads: &[(usize, u64, u64)]) -> Vec<(usize, u64, u64)> {
        let recording = Recording::new(2);
        for &(layer, offset, len) in reads {
            recording.note(layer, offset, len);
        }
        let reads = recording.reads().into_iter();
        reads.map(|read| (read.layer, read.offset, read.len)).collect()
    }

    #[test]
    fn what_was_read_before_is_not_noted_again() {
        let reads = [(0, 100, 10), (0, 105, 10), (0, 100, 15), (1, 100, 10), (0, 90, 40)];
        // The second continues the first; the last brings what is on both sides.
        assert_eq!(noted(&reads), [(0, 100, 15), (1, 100, 10), (0, 90, 10), (0, 115, 15)]);
        assert_eq!(noted(&[(0, 5, 0), (7, 0, 1)]), []);
        assert_eq!(noted(&[(0, u64::MAX - 1, 9)]), [(0, u64::MAX - 1, 1)]);
    }

    #[test]
    fn a_recording_is_bounded() {
        let recording = Recording::new(1);
        for at in 0..MAX_WISHES as u64 + 2 {
            recording.note(0, at * 2, 1);
        }
        assert!(recording.is_full());
        assert_eq!(recording.reads().len(), MAX_WISHES);
        let recording = Recording::new(1);
        recording.note(0, 0, MAX_BYTES);
        assert!(recording.is_full());
        recording.note(0, MAX_BYTES, 1);
        assert_eq!(recording.reads().len(), 1);
    }

    #[test]
    fn only_what_watches_is_told() {
        let (watchers, recording) = (Watchers::default(), Recording::new(2));
        watchers.note(0, 10);
        watchers.add(&recording, 1);
        watchers.note(20, 10);
        assert!(recording.has_read(1, 0, 21) && recording.has_read(1, 29, 9));
        assert!(!recording.has_read(1, 0, 20) && !recording.has_read(1, 30, 9) && !recording.has_read(0, 20, 10));
        watchers.remove(&recording);
        watchers.note(40, 10);
        assert_eq!(recording.reads().len(), 1);
    }

    proptest! {
        /// Noted ranges never overlap, and are together what was read.
        #[test]
        fn each_byte_is_noted_once(reads in proptest::collection::vec((0usize..2, 0u64..60, 0u64..20), 0..40)) {
            let mut left = [[false; 80]; 2];
            for &(layer, offset, len) in &reads {
                left[layer][offset as usize..(offset + len) as usize].fill(true);
            }
            for (layer, offset, len) in noted(&reads) {
                for byte in &mut left[layer][offset as usize..(offset + len) as usize] {
                    prop_assert!(*byte);
                    *byte = false;
                }
            }
            prop_assert!(left.iter().flatten().all(|byte| !byte));
        }
    }
}
