//! Everything at once, for as long as one likes: containers start, read and go, images are pulled and removed, the cache is too small for them, and
//! meanwhile workers are killed, programs replaced, the disk filled, and the registry silent, away, slow, wrong and overloaded.
//!
//! Every byte that a container reads is compared (`takeover/reader.c`). No byte may be wrong and no read fail, since every outage here is shorter
//! than a read waits. What people and kubelet try again (starts, pulls, removals) may fail while something is broken on purpose, and must succeed
//! when it is tried again; a failure at another time fails the test, as does everything that is left at the end.
//!
//! ```text
//! program   what is done, to what, and the moments in which something is broken
//! faults    what is broken, in an order that follows from the seed
//! watch     what the processes have: sampled, compared, drawn
//! ```
//!
//! `a_minute_of_everything` is always run; `make test-soak` runs the long one with every containerd there is (`LAZULI_SOAK_MINUTES`, 30 in all).
//! `LAZULI_SEED` chooses the order and the pauses; what coincides is not the same twice.

mod faults;
mod program;
mod watch;

use std::time::Duration;

use program::Soak;

use crate::stage::{generations, subject};
use crate::support::containerd::Generation;
use crate::support::lazuli::SNAPSHOTTER;

/// Minutes of the long run, if nothing else is said.
const MINUTES: u64 = 30;
/// The short run. Each kind of fault comes once at least.
const SHORT: Duration = Duration::from_secs(75);

#[test]
fn a_minute_of_everything() {
    if subject() != SNAPSHOTTER {
        return;
    }
    Soak::new("a_minute_of_everything", Generation::One).run(SHORT);
}

#[test]
#[ignore = "half an hour: make test-soak"]
fn everything_for_long() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let given = std::env::var("LAZULI_SOAK_MINUTES").ok();
    let minutes = given.map_or(MINUTES, |text| {
        text.parse().expect("LAZULI_SOAK_MINUTES is a number of minutes")
    });
    let generations = generations();
    let each = Duration::from_secs(minutes * 60) / generations.len() as u32;
    for generation in generations {
        Soak::new("everything_for_long", generation).run(each);
    }
}
