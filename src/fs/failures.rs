//! Reads of data files that failed a moment ago.
//!
//! EROFS asks for what a program wants to read in large requests, and when these fail, once more page by page. If each of them were
//! tried with all its repetitions, or waited for its whole deadline, one `read` of a program would take as long as all its pages
//! together. So bytes that could not be had, and took their time to fail, fail again at once, for a moment; after it they are tried anew.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fuser::Errno;

use crate::layer::Digest;

/// How long bytes are not tried again. The kernel comes back within milliseconds, and nobody else minds this.
const MOMENT: Duration = Duration::from_secs(2);

/// Most failures of one layer that are remembered: as many as there may be readers at once, and some.
const FAILURES_MAX: usize = 256;

/// A part of a data space that could not be read.
struct Failure {
    range: Range<u64>,
    errno: Errno,
    at: Instant,
}

/// Failures of all layers.
#[derive(Default)]
pub(super) struct Failures(Mutex<HashMap<Digest, Vec<Failure>>>);

impl Failures {
    /// The error of the bytes of `range`, if some of them failed a moment ago.
    pub(super) fn find(&self, layer: &Digest, range: &Range<u64>) -> Option<Errno> {
        let failures = self.lock();
        let of_layer = failures.get(layer)?;
        let fresh = |failure: &&Failure| {
            let overlaps = failure.range.start < range.end && range.start < failure.range.end;
            overlaps && failure.at.elapsed() < MOMENT
        };
        of_layer.iter().find(fresh).map(|failure| failure.errno)
    }

    /// Notes a failure. Whether it is the first of the layer for a moment: one line in the log says enough of all its pages.
    pub(super) fn note(&self, layer: Digest, range: Range<u64>, errno: Errno) -> bool {
        let mut failures = self.lock();
        failures.retain(|_, of_layer| {
            of_layer.retain(|failure| failure.at.elapsed() < MOMENT);
            !of_layer.is_empty()
        });
        let of_layer = failures.entry(layer).or_default();
        let is_first = of_layer.is_empty();
        if of_layer.len() < FAILURES_MAX {
            let at = Instant::now();
            of_layer.push(Failure { range, errno, at });
        }
        is_first
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Digest, Vec<Failure>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_overlaps_a_failure_of_the_same_layer_fails() {
        let [a, b] = ["a", "b"].map(|text| Digest::of(text.as_bytes()));
        let failures = Failures::default();
        assert!(failures.find(&a, &(0..1)).is_none());
        assert!(failures.note(a, 4096..8192, Errno::EIO));
        assert!(!failures.note(a, 4096..8192, Errno::EIO));
        for (layer, range, fails) in [
            (&a, 0..4096, false),
            (&a, 4095..4097, true),
            (&a, 8191..9000, true),
            (&a, 8192..9000, false),
            (&b, 4096..8192, false),
        ] {
            assert_eq!(failures.find(layer, &range).is_some(), fails, "{range:?}");
        }
        for _ in 0..2 * FAILURES_MAX {
            failures.note(b, 0..1, Errno::EIO);
        }
        assert_eq!(failures.lock()[&b].len(), FAILURES_MAX);
    }
}
