//! Log lines that a broken registry could otherwise write a million of.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time over which lines are counted.
const WINDOW: Duration = Duration::from_secs(10);
/// Most lines per [`WINDOW`]: enough to see what fails, few enough to read.
const LINES_PER_WINDOW: u32 = 10;

/// Lets through a bounded number of log lines per time, and counts the others.
#[derive(Debug, Default)]
pub(super) struct WarnLimit {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    window_start: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

impl WarnLimit {
    /// Whether a line may be written now; then also how many were suppressed since the last one.
    pub(super) fn admit(&self) -> Option<u64> {
        self.admit_at(Instant::now())
    }

    fn admit_at(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = state
            .window_start
            .is_none_or(|start| now.saturating_duration_since(start) >= WINDOW);
        if fresh {
            state.window_start = Some(now);
            state.lines = 0;
        }
        if state.lines >= LINES_PER_WINDOW {
            state.suppressed = state.suppressed.saturating_add(1);
            return None;
        }
        state.lines += 1;
        Some(std::mem::take(&mut state.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_beyond_the_limit_are_counted_and_told_later() {
        let limit = WarnLimit::default();
        let start = Instant::now();
        for _ in 0..LINES_PER_WINDOW {
            assert_eq!(limit.admit_at(start), Some(0));
        }
        for _ in 0..3 {
            assert_eq!(limit.admit_at(start + WINDOW / 2), None);
        }
        assert_eq!(limit.admit_at(start + WINDOW), Some(3));
        assert_eq!(limit.admit_at(start + WINDOW), Some(0));
    }
}
