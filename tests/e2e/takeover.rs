//! Containers go on: whatever ends the process that serves their files, and whoever comes after it.
//!
//! Real containers read all the time (`takeover/reader.c`, compiled here): ranges, mappings, small files and listings, warm and cold, each byte
//! compared. Meanwhile workers are killed, programs replaced, and the whole service restarted. No read may fail, no byte be wrong, and no
//! container be started anew. The longest stall is printed, not judged: it belongs to the machine.
//!
//! The tests that are not ignored are short. `make test-takeover` runs the long ones: `LAZULI_TAKEOVERS` says how often (200), `LAZULI_SEED` which
//! moments. The fd store is a stand-in for systemd that speaks its protocol (`service`), since a test cannot restart the machine's own.

pub mod harness;
mod service;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use harness::{Kitchen, Readers, Seed, alive, kill_worker, repeats};
use service::Service;

use crate::stage::{Stage, subject};
use crate::support::lazuli::{self, SNAPSHOTTER};
use crate::support::sandbox::{COMMAND_TIMEOUT, PATIENCE, mounts_below, run, run_ok, wait_until};

/// Longest time between two faults.
const BETWEEN: Duration = Duration::from_millis(1500);

/// Kills the worker `times` times under `containers` reading ones.
fn kills(name: &str, times: u32, containers: usize) {
    if subject() != SNAPSHOTTER {
        return;
    }
    let kitchen = Kitchen::new(name);
    let readers = Readers::start(&kitchen, containers);
    let mut seed = Seed::new(name);
    let lazuli = kitchen.stage.lazuli.as_ref().unwrap();
    let mut worker = lazuli.worker().unwrap();
    for _ in 0..times {
        std::thread::sleep(seed.below(BETWEEN));
        worker = kill_worker(lazuli, worker);
    }
    readers.end();
    kitchen.still_works();
    assert_eq!(
        lazuli.log().matches("this process goes on where another ended").count() as u32,
        times
    );
}

#[test]
fn workers_are_killed() {
    kills("workers_are_killed", 8, 2);
}

#[test]
#[ignore = "minutes: make test-takeover"]
fn workers_are_killed_very_often() {
    kills("workers_are_killed_very_often", repeats(200), 8);
}

/// `lazuli upgrade` to a copy of the program, again and again.
fn upgrades(name: &str, times: u32, containers: usize) {
    if subject() != SNAPSHOTTER {
        return;
    }
    let kitchen = Kitchen::new(name);
    let readers = Readers::start(&kitchen, containers);
    let mut seed = Seed::new(name);
    let lazuli = kitchen.stage.lazuli.as_ref().unwrap();
    let supervisor = lazuli.supervisor();
    // The second has a name that a protocol of lines would cut.
    let copies = ["one", "t\nwo"].map(|name| kitchen.stage.sandbox.path(format!("lazuli-{name}")));
    for copy in &copies {
        std::fs::copy(lazuli::program(), copy).unwrap();
    }
    for time in 0..times {
        std::thread::sleep(seed.below(BETWEEN));
        let worker = lazuli.worker();
        let copy = &copies[time as usize % 2];
        let binary = copy.display().to_string();
        let text = run(&mut lazuli.command("upgrade", &["--binary", &binary]), COMMAND_TIMEOUT)
            .expect_success()
            .text();
        assert!(text.contains("serves"), "{text}");
        assert_ne!(lazuli.worker(), worker);
        for process in [supervisor, lazuli.worker().unwrap()] {
            assert_eq!(std::fs::read_link(format!("/proc/{process}/exe")).unwrap(), *copy);
        }
    }
    // The new supervisor does what the old one did.
    kill_worker(lazuli, lazuli.worker().unwrap());
    readers.end();
    kitchen.still_works();
}

#[test]
fn programs_are_replaced() {
    upgrades("programs_are_replaced", 2, 2);
}

#[test]
#[ignore = "minutes: make test-takeover"]
fn programs_are_replaced_often() {
    upgrades("programs_are_replaced_often", repeats(200).div_ceil(10), 8);
}

/// The whole service is restarted, while a service manager keeps the descriptors; every other time its supervisor is killed.
fn restarts(name: &str, times: u32, containers: usize) {
    if subject() != SNAPSHOTTER {
        return;
    }
    let mut kitchen = Kitchen::new(name);
    let mut service = Service::start(&mut kitchen.stage);
    let readers = Readers::start(&kitchen, containers);
    let mut seed = Seed::new(name);
    for time in 0..times {
        std::thread::sleep(seed.below(BETWEEN));
        match time % 2 {
            0 => assert_eq!(service.stop(), Some(0), "SIGTERM does not end it well"),
            _ => service.kill(),
        }
        assert_eq!(service.stored(), ["lazuli-fuse", "lazuli-socket", "lazuli-state"]);
        service.restart();
    }
    readers.end();
    kitchen.still_works();
    // Ctrl-C is the end, fd store or not.
    assert_eq!(service.interrupt(), Some(0));
    assert_eq!(mounts_below(&kitchen.root()), Vec::<std::path::PathBuf>::new());
}

#[test]
fn the_service_is_restarted() {
    restarts("the_service_is_restarted", 2, 2);
}

#[test]
#[ignore = "minutes: make test-takeover"]
fn the_service_is_restarted_often() {
    restarts("the_service_is_restarted_often", repeats(200).div_ceil(10), 8);
}

/// A program that does not serve: the old one goes on, and whoever asked is told.
#[test]
fn a_program_that_does_not_start_changes_nothing() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let kitchen = Kitchen::new("a_program_that_does_not_start_changes_nothing");
    let readers = Readers::start(&kitchen, 1);
    let lazuli = kitchen.stage.lazuli.as_ref().unwrap();
    let program = |name: &str, script: &str| {
        let path = kitchen.stage.sandbox.path(name);
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        run_ok(Command::new("chmod").arg("755").arg(&path));
        path.display().to_string()
    };
    let upgrade = |binary: &str| run(&mut lazuli.command("upgrade", &["--binary", binary]), COMMAND_TIMEOUT);
    let broken = program(
        "broken",
        "test \"$1\" = --version && echo lazuli 9.9.9 && exit\necho on purpose >&2\nexit 7",
    );
    let worker = lazuli.worker();
    let answer = upgrade(&broken);
    assert_eq!(answer.status.and_then(|status| status.code()), Some(1));
    assert!(
        answer.stderr.contains("exit code 7") && answer.stderr.contains("goes on"),
        "{}",
        answer.describe()
    );
    // The old one was ended for it, and started again.
    wait_until(PATIENCE, || lazuli.worker().filter(|new| Some(*new) != worker)).expect("nothing serves");
    let worker = lazuli.worker();
    for (binary, word) in [
        (program("other", "echo busybox"), "not Lazuli"),
        (
            kitchen.stage.sandbox.path("missing").display().to_string(),
            "No such file",
        ),
    ] {
        let answer = upgrade(&binary);
        assert_eq!(answer.status.and_then(|status| status.code()), Some(1));
        assert!(answer.stderr.contains(word), "{}", answer.describe());
    }
    assert_eq!(lazuli.worker(), worker);
    readers.end();
    kitchen.still_works();
    let nobody = run(
        Command::new(lazuli::program())
            .args(["upgrade", "--root"])
            .arg(kitchen.stage.sandbox.dir("empty")),
        PATIENCE,
    );
    assert_eq!(
        nobody.status.and_then(|status| status.code()),
        Some(3),
        "{}",
        nobody.describe()
    );
}

/// Nobody keeps the descriptors of a supervisor that is killed. Its worker goes with it, containers get errors at once and wait for nothing, and
/// the next daemon begins anew.
#[test]
fn a_killed_supervisor_leaves_no_traps() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let mut kitchen = Kitchen::new("a_killed_supervisor_leaves_no_traps");
    let readers = Readers::start(&kitchen, 2);
    let lazuli = kitchen.stage.lazuli.as_ref().unwrap();
    let worker = lazuli.worker().unwrap();
    lazuli.kill_shared();
    wait_until(PATIENCE, || (!alive(worker)).then_some(())).expect("the worker survives its supervisor");
    // Whatever they get, they end.
    readers.end_anyhow();
    drop(readers);
    kitchen.stage.restart_daemon();
    kitchen.still_works();
}

/// A signal that is not meant to hand over leaves nothing.
#[test]
fn without_an_fd_store_the_end_is_the_end() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let mut kitchen = Kitchen::new("without_an_fd_store_the_end_is_the_end");
    let readers = Readers::start(&kitchen, 1);
    let lazuli = kitchen.stage.lazuli.as_ref().unwrap();
    run_ok(Command::new("kill").arg(lazuli.supervisor().to_string()));
    wait_until(PATIENCE, || lazuli.worker().is_none().then_some(())).expect("the worker does not end");
    readers.end_anyhow();
    drop(readers);
    assert!(kitchen.stage.lazuli().stop(), "SIGTERM does not end it with 0");
    assert_eq!(mounts_below(&kitchen.root()), Vec::<std::path::PathBuf>::new());
    kitchen.stage.restart_daemon();
    kitchen.still_works();
}

/// With `--drain`, SIGTERM takes everything away although it could stay.
#[test]
fn draining_is_a_choice() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let mut kitchen = Kitchen::new("draining_is_a_choice");
    let mut service = Service::with(&mut kitchen.stage, &["--drain"]);
    kitchen.still_works();
    assert_eq!(service.stop(), Some(0));
    assert_eq!(mounts_below(&kitchen.root()), Vec::<std::path::PathBuf>::new());
    assert!(!Path::new(&lazuli::address_in(&kitchen.stage.sandbox)).exists());
}

/// The index of a layer is lost, and its registry is away: who reads waits, and goes on when the registry is back.
#[test]
fn readers_wait_for_an_index_that_is_lost() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let mut stage = Stage::new(
        "readers_wait_for_an_index_that_is_lost",
        crate::support::containerd::Generation::One,
    );
    let image = harness::image();
    let reference = stage.push_converted(&image, "demo/lost:1", &["--estargz"]);
    stage.pull(&reference);
    let id = stage.containerd.start_container(&reference, &subject());
    stage.registry.stop();
    let (registry, containerd) = (&mut stage.registry, &stage.containerd);
    let lazuli = stage.lazuli.as_ref().unwrap();
    for layer in std::fs::read_dir(lazuli.root().join("layers")).unwrap() {
        let _ = std::fs::remove_file(layer.unwrap().path().join("index"));
    }
    let worker = kill_worker(lazuli, lazuli.worker().unwrap());
    assert_eq!(lazuli.worker(), Some(worker));
    std::thread::scope(|scope| {
        let read = scope.spawn(|| containerd.exec(&id, "cat /data/small/7"));
        std::thread::sleep(Duration::from_secs(2));
        assert!(!read.is_finished(), "it did not wait");
        registry.restart();
        assert_eq!(read.join().unwrap().expect_success().text(), "7");
    });
    assert!(stage.lazuli().log().contains("requests waited for this layer"));
}

/// The worker dies, and its configuration has been broken meanwhile: who reads waits until one can start again, or until the daemon is ended.
#[test]
fn readers_wait_while_no_worker_can_start() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let name = "readers_wait_while_no_worker_can_start";
    let mut stage = Stage::new(name, crate::support::containerd::Generation::One);
    let reference = stage.push_converted(&harness::image(), "demo/broken:1", &["--estargz"]);
    stage.pull(&reference);
    let id = stage.containerd.start_container(&reference, &subject());
    let config = stage.lazuli().config();
    let good = std::fs::read_to_string(&config).unwrap();
    for is_mended in [true, false] {
        let lazuli = stage.lazuli.as_ref().unwrap();
        let worker = wait_until(PATIENCE, || lazuli.worker()).unwrap();
        let broken = |log: &str| log.matches("this is no configuration").count();
        let before = broken(&lazuli.log());
        std::fs::write(&config, format!("{good}\n[this is no configuration\n")).unwrap();
        run_ok(Command::new("kill").args(["-s", "KILL", &worker.to_string()]));
        wait_until(PATIENCE, || (broken(&lazuli.log()) > before + 1).then_some(())).expect("it is tried once only");
        // Nothing of it is here.
        let file = if is_mended { 7 } else { 8 };
        let containerd = &stage.containerd;
        std::thread::scope(|scope| {
            let read = scope.spawn(|| containerd.exec(&id, &format!("cat /data/small/{file}")));
            std::thread::sleep(Duration::from_secs(2));
            assert!(!read.is_finished(), "it did not wait");
            let log = lazuli.log();
            let paused = |line: &str| line.contains("the worker has ended") && !line.contains("pause_seconds=0.0");
            assert!(
                log.lines().any(paused),
                "started again and again without a pause:\n{log}"
            );
            std::fs::write(&config, &good).unwrap();
            if is_mended {
                assert_eq!(read.join().unwrap().expect_success().text(), file.to_string());
            } else {
                let supervisor = lazuli.supervisor().to_string();
                std::fs::write(&config, format!("{good}\n[this is no configuration\n")).unwrap();
                run_ok(Command::new("kill").args(["-s", "TERM", &supervisor]));
                read.join().unwrap();
            }
        });
    }
    std::fs::write(&config, &good).unwrap();
    stage.containerd.remove_container(&id);
    stage.restart_daemon();
    assert_eq!(stage.sh(&reference, "cat /data/small/9"), "9");
}
