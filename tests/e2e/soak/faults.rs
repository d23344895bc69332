//! What is broken meanwhile: the registry in one thread, the node in another, each of them with a deck of faults that is shuffled anew when it is
//! used up. So every kind comes as often as any other, and coincides with all of the other thread's.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::program::{Soak, await_worker, pause};
use crate::support::fault_registry::{Fault, On};
use crate::support::lazuli::program;
use crate::support::sandbox::{COMMAND_TIMEOUT, run};
use crate::takeover::harness::Seed;

/// More requests than come in any outage.
const ALL: usize = 1_000_000;
/// Longest pause between two faults of the registry, and of the node.
const REGISTRY_PAUSE: Duration = Duration::from_secs(3);
const NODE_PAUSE: Duration = Duration::from_secs(6);
/// Longest outage of the registry, and longest time that the disk is full.
const OUTAGE: Duration = Duration::from_secs(6);
const FULL: Duration = Duration::from_secs(4);
/// How long a fault that meets a few requests may wait for them.
const FEW: Duration = Duration::from_secs(2);

const SILENT: &str = "the registry was silent";
const AWAY: &str = "the registry answered 503 to everything";
const CUT: &str = "connections were cut";
const THROTTLED: &str = "requests were throttled (429)";
const SLOW: &str = "answers were slow";
const LIED: &str = "an answer was wrong";
pub const KILLED: &str = "the worker was killed";
const UPGRADED: &str = "the program was replaced";
const FILLED: &str = "the disk was filled";

const REGISTRY: [&str; 6] = [SILENT, AWAY, CUT, THROTTLED, SLOW, LIED];
/// Killing is what happens most.
const NODE: [&str; 4] = [KILLED, UPGRADED, FILLED, KILLED];

/// All kinds.
pub fn kinds() -> impl Iterator<Item = &'static str> {
    REGISTRY.into_iter().chain(NODE)
}

/// Deals one deck after the other until the end.
fn deal(
    mut seed: Seed,
    ended: &AtomicBool,
    deck: &[&'static str],
    most: Duration,
    act: impl Fn(&'static str, &mut Seed),
) {
    loop {
        for kind in seed.shuffled(deck) {
            pause(seed.below(most), ended);
            if ended.load(Ordering::Relaxed) {
                return;
            }
            act(kind, &mut seed);
        }
    }
}

/// Breaks the registry.
pub fn registry(soak: &Soak, seed: Seed, ended: &AtomicBool) {
    let registry = &soak.registry;
    deal(seed, ended, &REGISTRY, REGISTRY_PAUSE, |kind, seed| {
        soak.counts.broken(kind, || {
            let few = 1 + seed.number(4) as usize;
            let offset = seed.number(3_000_000) as usize;
            let (time, fault, times) = match kind {
                // Not for ever: containerd 2.x waits for what it fetches by itself as long as the connection lasts.
                SILENT => (OUTAGE, registry.silent(), ALL),
                AWAY => (OUTAGE, Fault::Status(503), ALL),
                CUT => (FEW, Fault::Cut(offset % 60_000), few),
                THROTTLED => (FEW, Fault::RetryAfter(429, "1".to_owned()), few),
                SLOW => (FEW, Fault::Delay(Duration::from_millis(offset as u64 % 1_500)), 2 * few),
                _ => {
                    let lies = [
                        Fault::Corrupt(offset),
                        Fault::Short(offset % 50_000),
                        Fault::Long(offset % 50_000),
                        Fault::ContentRange("bytes 0-9/10".to_owned()),
                        Fault::NoContentRange,
                        Fault::IgnoreRange,
                    ];
                    (FEW, lies[seed.number(lies.len() as u64) as usize].clone(), 1)
                }
            };
            if times == ALL {
                registry.fail(On::Manifest, ALL, fault.clone());
            }
            registry.fail(On::Blob, times, fault);
            pause(seed.below(time), ended);
            registry.heal();
        });
    });
}

/// Breaks the node.
pub fn node(soak: &Soak, seed: Seed, ended: &AtomicBool) {
    let lazuli = &soak.lazuli;
    // A program that replaces itself would not be seen.
    let copies = ["one", "two"].map(|name| soak.sandbox.path(format!("lazuli-{name}")));
    for copy in &copies {
        std::fs::copy(program(), copy).unwrap();
    }
    deal(seed, ended, &NODE, NODE_PAUSE, |kind, seed| {
        soak.counts.broken(kind, || match kind {
            KILLED => {
                let Some(worker) = lazuli.worker() else {
                    return soak.counts.fail("there is no worker".to_owned());
                };
                let pid = rustix::process::Pid::from_raw(worker as i32).unwrap();
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
                if !await_worker(lazuli, Some(worker)) {
                    soak.counts.fail(format!("no worker came after {worker}"));
                }
            }
            UPGRADED => {
                let binary = copies[seed.number(2) as usize].display().to_string();
                let finished = run(&mut lazuli.command("upgrade", &["--binary", &binary]), COMMAND_TIMEOUT);
                if !finished.success() {
                    soak.counts.fail(finished.describe());
                }
            }
            _ => {
                soak.disk.fill();
                pause(seed.below(FULL), ended);
                soak.disk.free();
            }
        });
    });
}
