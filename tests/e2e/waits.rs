//! Reads that wait for a registry which says nothing: for how long, and what becomes of a container that is killed meanwhile.
//!
//! The registry takes every request for a blob and never answers. In a container, one process each (`waits/waiter.c`) waits in every way in
//! which the kernel can wait for bytes of a file. The deadline is the default of 15 minutes, so whatever ends within a test was not ended by it.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::faults::{ALWAYS, Failing};
use crate::stage::{Stage, subject};
use crate::support::containerd::Generation;
use crate::support::fault_registry::{Auth, Fault, On};
use crate::support::image::{Compression, Flavour, Image, Layer, base_entries, digest_of};
use crate::support::lazuli::SNAPSHOTTER;
use crate::support::sandbox::{PATIENCE, run, run_ok, wait_until};
use crate::support::tar::{Entry, noise};

/// How a process waits: the words of waiter.c.
const WAYS: [&str; 6] = ["read", "random", "map", "map-random", "direct", "exec"];
/// Those in which a process of the tree face waits for an answer to a request of its own, which the kernel does not let it leave.
const TREE_HOLDS: [&str; 2] = ["map-random", "direct"];
/// Bytes of each file that is waited for: more than what is fetched of a layer's end to find its index.
const LENGTH: usize = 1_500_000;
/// How long a killed process and what is below it may take to go: much less than any deadline here, and more than a busy machine needs.
const GONE: Duration = Duration::from_secs(20);
/// The deadline in the tree face, in seconds; longer than [`GONE`].
const TREE_DEADLINE: u64 = 30;

fn is_tree() -> bool {
    std::env::var("LAZULI_E2E_FACE").is_ok_and(|face| face == "tree")
}

fn waiter() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let (source, program) = (dir.path().join("waiter.c"), dir.path().join("waiter"));
    fs::write(&source, include_str!("waits/waiter.c")).unwrap();
    let mut gcc = Command::new("gcc");
    run_ok(gcc.args(["-O1", "-static", "-o"]).arg(&program).arg(&source));
    fs::read(program).unwrap()
}

/// An image with the waiter, and a file for each way in a layer of its own, so that the read-ahead of one does not fetch another.
fn image() -> Image {
    let program = Entry::file("waiter", waiter()).mode(0o755);
    let mut layers = vec![base_entries(), vec![program]];
    for (seed, way) in WAYS.iter().enumerate() {
        let file = Entry::file(format!("data/{way}"), noise(9_000 + seed as u64, LENGTH)).mode(0o755);
        layers.push(vec![Entry::dir("data"), file]);
    }
    let layers = layers
        .into_iter()
        .map(|entries| Layer::of(Compression::Gzip, entries))
        .collect();
    let plain = Image::new(Flavour::Oci, layers);
    let stage = Stage::new("waits: conversion", Generation::One);
    stage.converted(&plain, &["--estargz", "--estargz-chunk-size", "100000"])
}

/// State of a process, as `ps` shows it; `None` if it is gone, or dead and not collected yet.
fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let state = stat.rsplit_once(") ")?.1.chars().next()?;
    (!"ZX".contains(state)).then_some(state)
}

/// A container whose processes wait in every way, by way; and another one, of which none does.
fn waiting_container(stage: &Failing) -> (String, BTreeMap<&'static str, u32>, String) {
    let reference = stage.reference();
    stage.lazuli.pull(&reference).expect_success();
    let [id, other] = [(), ()].map(|()| stage.containerd.start_container(&reference, SNAPSHOTTER));
    // All that the waiting itself needs is there.
    let warm = "cat /waiter /bin/busybox >/dev/null; /waiter read /bin/busybox; mkdir -p /run/out/pids";
    stage.containerd.exec(&id, warm).expect_success();
    stage.registry.fail(On::Blob, ALWAYS, Fault::Stall(0));
    for way in WAYS {
        let script = format!("/waiter {way} /data/{way} >/dev/null 2>&1 &");
        stage.containerd.exec(&id, &script).expect_success();
    }
    let listed = stage.containerd.ctr_ok(&["tasks", "ps", &id]).text();
    let pids = listed.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    let mut by_way = BTreeMap::new();
    for pid in pids.filter_map(|pid| pid.parse::<u32>().ok()) {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = line.split(|byte| *byte == 0).map(String::from_utf8_lossy);
        if words.next().as_deref() == Some("/waiter") {
            let way = words.next().unwrap_or_default().into_owned();
            by_way.extend(WAYS.iter().find(|known| **known == way).map(|known| (*known, pid)));
        }
    }
    assert_eq!(by_way.len(), WAYS.len(), "not all of them run: {by_way:?}\n{listed}");
    // Each of them asks for bytes of its own.
    let waiting = || {
        stage.lazuli.status()["reads"]["waiting"]
            .as_u64()
            .filter(|reads| *reads >= WAYS.len() as u64)
    };
    wait_until(PATIENCE, waiting).unwrap_or_else(|| panic!("they do not wait: {:#}", stage.lazuli.status()["reads"]));
    (id, by_way, other)
}

/// Threads of a process that wait where nothing interrupts them.
fn stuck_threads(pid: u32) -> usize {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten();
    let stuck = tasks.filter(|task| {
        let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('D'))
    });
    stuck.count()
}

/// A container that waits in every way is killed: its processes go at once (but for those that a FUSE request of their own holds, in the tree
/// face, until its deadline), and then its mounts, and its reads.
#[test]
fn a_container_that_waits_can_be_killed() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let config = match is_tree() {
        true => format!("[fetch]\nread_deadline = {TREE_DEADLINE}\n"),
        false => String::new(),
    };
    let stage = Failing::with("a_container_that_waits_can_be_killed", &image(), Auth::None, &config);
    let (id, pids, other) = waiting_container(&stage);
    stage.containerd.remove_container(&other);
    std::thread::sleep(Duration::from_secs(1));
    for (way, pid) in &pids {
        let wchan = fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default();
        eprintln!("{way}: {:?} in {wchan}", state(*pid));
        assert!(state(*pid).is_some(), "{way} does not wait");
    }
    let begun = Instant::now();
    stage
        .containerd
        .ctr_ok(&["tasks", "kill", "--signal", "KILL", "--all", &id]);
    let mut held = Vec::new();
    for (way, pid) in &pids {
        match wait_until(GONE, || state(*pid).is_none().then_some(())) {
            Some(()) => eprintln!("{way}: gone after {:.1} s at most", begun.elapsed().as_secs_f64()),
            None => held.push(*way),
        }
    }
    eprintln!("held: {held:?}");
    match is_tree() {
        false => assert_eq!(held, [""; 0], "they cannot be killed"),
        true => {
            assert!(
                held.iter().all(|way| TREE_HOLDS.contains(way)),
                "{held:?} cannot be killed"
            );
            let deadline = Duration::from_secs(TREE_DEADLINE) + GONE;
            let all_gone = || pids.values().all(|pid| state(*pid).is_none()).then_some(());
            wait_until(deadline, all_gone).expect("the deadline does not end them");
        }
    }
    let status = wait_until(PATIENCE, || {
        let removed = run(&mut stage.containerd.ctr(&["tasks", "rm", "--force", &id]), PATIENCE);
        let gone = removed.success() || removed.stderr.contains("not found");
        gone.then_some(())
    });
    status.expect("the task cannot be removed");
    stage.containerd.ctr_ok(&["containers", "rm", &id]);
    let idle = || {
        let waiting = stage.lazuli.status()["reads"]["waiting"].as_u64()?;
        let stuck = stage.lazuli.worker().map_or(0, stuck_threads);
        (waiting == 0 && stuck == 0).then_some(())
    };
    let limit = match is_tree() {
        true => Duration::from_secs(TREE_DEADLINE) + GONE,
        false => GONE + PATIENCE,
    };
    wait_until(limit, idle).unwrap_or_else(|| panic!("reads are left: {:#}", stage.lazuli.status()["reads"]));
    if !is_tree() {
        let faces = stage.lazuli.root().canonicalize().unwrap().join("faces");
        let unmounted = || crate::support::sandbox::mounts_below(&faces).is_empty().then_some(());
        wait_until(PATIENCE, unmounted).expect("its layers stay mounted");
        assert!(stage.lazuli.log().contains("no container can wait for them any more"));
        assert!(!stage.lazuli.log().contains("cannot unmount"), "an unmount had to wait");
    }
}

/// Killing who waits takes nothing from another container that waits for bytes of the same layers: it gets them when the registry answers.
#[test]
fn a_killed_container_takes_no_read_from_another() {
    // In the tree face no read is ended, and the killed container does not go before its deadline.
    if subject() != SNAPSHOTTER || is_tree() {
        return;
    }
    let config = "idle_timeout = 2\n";
    let stage = Failing::with(
        "a_killed_container_takes_no_read_from_another",
        &image(),
        Auth::None,
        config,
    );
    let (id, _, other) = waiting_container(&stage);
    let ways = ["read", "map", "direct"];
    let ends = format!(
        "for way in {}; do dd if=/data/$way bs=1000 skip=1499 2>/dev/null | sha256sum; done",
        ways.join(" ")
    );
    std::thread::scope(|scope| {
        let read = scope.spawn(|| stage.containerd.exec(&other, &ends));
        std::thread::sleep(Duration::from_secs(2));
        stage.containerd.remove_container(&id);
        // Longer than it takes until mounts that nobody needs are gone.
        std::thread::sleep(Duration::from_secs(4));
        assert!(!read.is_finished(), "it did not wait");
        stage.registry.heal();
        let read = read.join().unwrap().expect_success();
        let expected = ways.map(|way| {
            let seed = WAYS.iter().position(|known| *known == way).unwrap();
            let content = noise(9_000 + seed as u64, LENGTH);
            format!("{}  -\n", &digest_of(&content[LENGTH - 1000..])["sha256:".len()..])
        });
        assert_eq!(read.text(), expected.concat());
    });
    stage.containerd.remove_container(&other);
}
