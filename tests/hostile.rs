//! Input that was made to take memory or time. Each case is read in a process of its own, of which the kernel limits address space and
//! processor time; besides, its peak of resident memory is looked at. The bounds are those that `docs/OPERATIONS.md` states.
//!
//! A case is prepared first, which may take what it likes; then the limits are set, and the parser runs.

#[path = "hostile/inputs.rs"]
mod inputs;

use std::process::Command;

use inputs::CASES;
use lazuli::layer::LayerError;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Environment of a child: the case that it is.
const CASE: &str = "LAZULI_HOSTILE_CASE";
/// Bytes of address space beyond the bound: what the allocator takes in advance.
const SLACK: u64 = 4 << 20;
/// Seconds of processor of one case. No case takes one second in a release build; this one is not optimised.
const SECONDS: u64 = 40;
const MIB: u64 = 1 << 20;

/// The second half of a case: what is measured.
pub type Work = Box<dyn FnOnce() -> Result<(), LayerError>>;

pub struct Case {
    pub name: &'static str,
    /// MiB that it may take, besides its input.
    pub mib: u64,
    /// What the error says; empty if the input is read.
    pub error: &'static str,
    pub prepare: fn() -> Work,
}

/// A number of KiB in `/proc/self/status`, as bytes.
fn status(key: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    let number = line.trim_start_matches(':').trim().trim_end_matches(" kB");
    number.parse::<u64>().unwrap() * 1024
}

/// Runs one case, if this process was started for one.
#[test]
fn child() {
    let Ok(name) = std::env::var(CASE) else { return };
    let case = CASES.iter().find(|case| case.name == name).unwrap();
    let work = (case.prepare)();
    let limit = |resource, most| {
        let old = getrlimit(resource);
        let new = Rlimit {
            current: Some(most),
            ..old
        };
        setrlimit(resource, new).unwrap();
    };
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = status("VmRSS");
    limit(Resource::As, status("VmSize") + case.mib * MIB + SLACK);
    limit(Resource::Cpu, SECONDS);
    let result = work();
    let peak = status("VmHWM").saturating_sub(before);
    limit(Resource::As, u64::MAX);
    let said = result.map_or_else(|error| error.to_string(), |()| String::new());
    assert!(
        said.contains(case.error) && said.is_empty() == case.error.is_empty(),
        "{said}"
    );
    assert!(peak <= case.mib * MIB + SLACK, "it took {} KiB", peak >> 10);
    println!("{name}: {} KiB, {said}", peak >> 10);
}

/// Whether the case was well in a process of its own, and what that said.
fn run(name: &str) -> (bool, String) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture", "--test-threads=1"])
        .env(CASE, name)
        // One arena: others would reserve address space by themselves.
        .env("MALLOC_ARENA_MAX", "1")
        // What was freed before is not there to be used again.
        .env("MALLOC_MMAP_THRESHOLD_", "131072")
        .env("MALLOC_TRIM_THRESHOLD_", "131072")
        .env("RUST_BACKTRACE", "0")
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    (output.status.success(), text.concat())
}

#[test]
fn no_input_takes_more_than_it_may() {
    let bad: Vec<String> = CASES
        .iter()
        .filter(|case| !case.name.starts_with("self-test"))
        .map(|case| (case.name, run(case.name)))
        .inspect(|(name, (good, said))| {
            let line = said
                .lines()
                .find_map(|line| line.find(name).map(|at| &line[at..]))
                .unwrap_or_default();
            println!("{} {line}", if *good { "ok" } else { "BAD" });
        })
        .filter(|(_, (good, _))| !good)
        .map(|(name, (_, said))| format!("{name}:\n{said}"))
        .collect();
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}

/// The measure itself: who takes more than he may does not come through.
#[test]
fn the_limit_is_one() {
    for name in ["self-test address space", "self-test resident"] {
        let (good, said) = run(name);
        assert!(!good, "{said}");
    }
    assert!(run("self-test modest").0);
}
