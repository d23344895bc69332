//! What the processes have, once a second: memory, open files, mounts. The first half of a run is compared with the second.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Instant;

use super::program::files;
use crate::support::lazuli::Lazuli;
use crate::support::sandbox::mounts_below;

/// Samples of which the halves say something about growth: ten minutes.
const LONG: usize = 600;
/// How much more the second half's median may be than the first one's: what chance makes of it. Memory in KiB.
const MORE_MEMORY: u64 = 16 << 10;
const MORE_FILES: u64 = 24;
const MORE_MOUNTS: u64 = 8;
/// Columns of a plot.
const COLUMNS: usize = 64;
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// What is there of a daemon and its containers at one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    pub mounts: usize,
    pub shims: usize,
    pub supervisor_files: usize,
    pub worker_files: usize,
}

/// How many more files an idle worker may have open than another one: the database, connections that are kept.
const IDLE_FILES: usize = 40;

impl Held {
    /// Whether nothing is left that was not there `before`.
    pub fn is_within(&self, before: &Held) -> bool {
        self.mounts <= before.mounts
            && self.shims <= before.shims
            && self.supervisor_files <= before.supervisor_files
            && self.worker_files <= before.worker_files + IDLE_FILES
    }
}

/// One row: what is sampled.
struct Row {
    name: &'static str,
    unit: &'static str,
    /// Most that it may grow between the medians; `None`: it is only told.
    more: Option<u64>,
    values: Vec<u64>,
}

pub struct Watch {
    begun: Instant,
    rows: [Row; 5],
}

impl Watch {
    pub fn new() -> Self {
        let row = |name, unit, more| Row {
            name,
            unit,
            more,
            values: Vec::new(),
        };
        Watch {
            begun: Instant::now(),
            rows: [
                row("worker, RssAnon", "KiB", Some(MORE_MEMORY)),
                row("worker, files", "", Some(MORE_FILES)),
                row("supervisor, RssAnon", "KiB", Some(MORE_MEMORY)),
                row("supervisor, files", "", Some(MORE_FILES)),
                row("mounts", "", Some(MORE_MOUNTS)),
            ],
        }
    }

    pub fn sample(&mut self, lazuli: &Lazuli, root: &Path) {
        // Between two workers there is nothing to see.
        let Some(worker) = lazuli.worker() else { return };
        let supervisor = lazuli.supervisor();
        let values = [
            own_memory(worker),
            files(worker) as u64,
            own_memory(supervisor),
            files(supervisor) as u64,
            mounts_below(root).len() as u64,
        ];
        if values[0] == 0 {
            return;
        }
        for (row, value) in self.rows.iter_mut().zip(values) {
            row.values.push(value);
        }
    }

    /// A table of both halves, and a plot of each row.
    pub fn report(&self) -> String {
        let mut text = format!(
            "\n{:<22}{:>12}{:>12}{:>12}   over {} s\n",
            "",
            "first half",
            "second half",
            "most",
            self.begun.elapsed().as_secs()
        );
        for row in &self.rows {
            let (first, second) = row.medians();
            let most = row.values.iter().max().copied().unwrap_or_default();
            let name = format!("{} {}", row.name, row.unit);
            let _ = writeln!(
                text,
                "{name:<22}{first:>12}{second:>12}{most:>12}   {}",
                plot(&row.values)
            );
        }
        text
    }

    /// What has grown, if the run was long enough to tell.
    pub fn growth(&self) -> Option<String> {
        self.rows.iter().find_map(|row| {
            let (first, second) = row.medians();
            let more = row.more.filter(|_| row.values.len() >= LONG)?;
            (second > first + more).then(|| format!("{} grows: {first} and then {second} {}", row.name, row.unit))
        })
    }
}

impl Row {
    /// Of the halves of what was sampled.
    fn medians(&self) -> (u64, u64) {
        let (first, second) = self.values.split_at(self.values.len() / 2);
        (median(first), median(second))
    }
}

fn median(values: &[u64]) -> u64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

/// The highest of each part of the values, as bars.
fn plot(values: &[u64]) -> String {
    let most = values.iter().max().copied().unwrap_or_default().max(1);
    let part = values.len().div_ceil(COLUMNS).max(1);
    let bar = |values: &[u64]| {
        let highest = values.iter().max().copied().unwrap_or_default();
        BARS[(highest * (BARS.len() as u64 - 1) / most) as usize]
    };
    values.chunks(part).map(bar).collect()
}

/// `RssAnon` of a process, in KiB; 0 if it is gone.
fn own_memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.unwrap_or_default()
}

#[test]
fn growth_is_seen_and_chance_is_not() {
    let mut watch = Watch::new();
    let fill = |watch: &mut Watch, value: fn(u64) -> u64| {
        for row in &mut watch.rows {
            row.values = (0..LONG as u64).map(value).collect();
        }
    };
    fill(&mut watch, |at| 50_000 + at % 7);
    assert_eq!(watch.growth(), None);
    fill(&mut watch, |at| 50_000 + at * 100);
    assert!(watch.growth().unwrap().contains("worker, RssAnon grows"));
    assert!(watch.report().contains('█'));
}
