//! Files that are read from one end to the other, and how far ahead of such a reader is asked for more.
//!
//! A request brings what its chunk's file needs next ([`super::window`]), but the next one begins only when the reader has come to its end: on
//! a link with a long way, or one that holds back each connection, most of the link is idle meanwhile. Whoever has read on and on is likely to go
//! on; so as much is asked for ahead of him, as wishes of read-ahead of their own, as he has read so far in one go: never more bytes
//! in vain than were of use. That is counted where he waits, which he does as long as the network is slower than he is: the window grows until it
//! covers bandwidth x delay, and no further. Of a file that is only looked into here and there, nothing is asked for ahead.

use std::ops::Range;

use super::window::Owner;

/// Most compressed bytes that are asked for ahead of a reader: 2 Gbit/s at a round trip of 100 ms, requests included.
pub const MOST: u64 = 32 << 20;
/// Waits in a row after which a file is taken to be read from one end to the other.
const WAITS: u32 = 3;
/// Compressed bytes between the end of what was waited for and the next that is: what came ahead without being waited for.
const REACHED: u64 = MOST;
/// Files that are remembered as being read: as many as are read side by side.
const RUNS: usize = 16;

/// Files that are being read.
#[derive(Debug, Default)]
pub struct Runs(Vec<Run>);

/// One of them.
#[derive(Debug)]
struct Run {
    file: (u32, u32),
    /// What was read of the blob.
    range: Range<u64>,
    /// How often somebody waited.
    waits: u32,
    /// How far was asked for.
    asked: u64,
}

impl Runs {
    /// Somebody waits for what a file has at the beginning of `blob`, all of which comes. Up to where in the blob more of the file should be on its way.
    pub fn wait(&mut self, owner: Owner, blob: &Range<u64>) -> Option<u64> {
        let file = (owner.dir, owner.file);
        let at = self.0.iter().position(|run| run.file == file);
        let mut run = match at {
            Some(at) => self.0.remove(at),
            None => {
                if self.0.len() >= RUNS {
                    self.0.remove(0);
                }
                Run {
                    file,
                    range: blob.clone(),
                    waits: 0,
                    asked: blob.end,
                }
            }
        };
        // What lies between was asked for ahead, or came with a request.
        let reach = run
            .asked
            .max(run.range.end)
            .saturating_add(REACHED.min(run.range.end - run.range.start));
        let follows = run.waits == 0 || (blob.start.saturating_add(1) >= run.range.end && blob.start <= reach);
        if follows {
            run.range.end = run.range.end.max(blob.end);
            run.waits += 1;
        } else {
            run = Run {
                file,
                range: blob.clone(),
                waits: 1,
                asked: blob.end,
            };
        }
        let ahead = (run.waits >= WAITS).then(|| {
            let read = run.range.end.saturating_sub(run.range.start);
            run.range.end.saturating_add(read.min(MOST))
        });
        run.asked = run.asked.max(ahead.unwrap_or(blob.end));
        self.0.push(run);
        ahead
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn file(file: u32) -> Owner {
        Owner { dir: 1, file, part: 0 }
    }

    #[test]
    fn as_much_is_asked_for_ahead_as_was_read_in_one_go() {
        let mut runs = Runs::default();
        let mut ahead = Vec::new();
        for at in 0..40 {
            ahead.push(runs.wait(file(1), &(at * 2 * MIB..(at + 1) * 2 * MIB)));
        }
        assert_eq!(ahead[..3], [None, None, Some(12 * MIB)]);
        assert_eq!(ahead[7], Some(32 * MIB));
        assert_eq!(ahead[39], Some(80 * MIB + MOST));
    }

    #[test]
    fn who_looks_here_and_there_or_goes_back_gets_nothing_ahead() {
        let mut runs = Runs::default();
        for at in [90, 10, 70, 30, 50, 20, 80, 0] {
            assert_eq!(runs.wait(file(1), &(at * MIB..(at + 1) * MIB)), None);
        }
        for at in (0..20).rev() {
            assert_eq!(runs.wait(file(2), &(at * MIB..(at + 1) * MIB)), None, "backwards");
        }
        // Jumps that are larger than all that was read.
        for at in 1..10 {
            assert_eq!(runs.wait(file(3), &(at * 20 * MIB..at * 20 * MIB + MIB)), None);
        }
    }

    #[test]
    fn files_are_told_apart_and_those_read_lately_remembered() {
        let mut runs = Runs::default();
        for at in 0..3 {
            for of in 0..RUNS as u32 {
                let ahead = runs.wait(file(of), &(at * MIB..(at + 1) * MIB));
                assert_eq!(ahead.is_some(), at == 2);
            }
        }
        runs.wait(file(99), &(0..MIB));
        assert_eq!(runs.wait(file(0), &(3 * MIB..4 * MIB)), None, "it had to go");
        assert!(runs.wait(file(5), &(3 * MIB..4 * MIB)).is_some());
        assert_eq!(runs.0.len(), RUNS);
    }
}
