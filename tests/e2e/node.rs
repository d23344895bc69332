//! A node that many share: what one pull or one registry does is nobody else's trouble.
//!
//! These are acceptance tests, and the only ones that look at the clock: what they bound took tens of seconds to minutes before.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::stage::{Stage, subject};
use crate::support::containerd::{Containerd, Generation, REFERENCE};
use crate::support::fault_registry::{Fault, FaultRegistry, On};
use crate::support::image::{Compression, Flavour, Image, Layer, base_entries, ordinary};
use crate::support::lazuli::{self, Lazuli, SNAPSHOTTER};
use crate::support::proxy::Link;
use crate::support::sandbox::{PATIENCE, Sandbox, run, wait_until};
use crate::support::tar::{Entry, noise};

/// The longest that Prepare waits for a layer, in seconds (docs/ARCHITECTURE.md).
const PREPARE_BOUND: Duration = Duration::from_secs(8);
/// What a busy test machine may add.
const LEEWAY: Duration = Duration::from_secs(4);

/// A containerd on which stock `ctr` pulls through Prepare.
fn generation() -> Generation {
    Generation::two().unwrap_or(Generation::One)
}

/// An image that can run `sh`, with one more layer: a file that does not compress.
fn image_with(seed: u64, length: usize) -> Image {
    let file = Entry::file(format!("data/{seed}"), noise(seed, length));
    let layers = vec![
        Layer::of(Compression::Gzip, base_entries()),
        Layer::of(Compression::Gzip, [Entry::dir("data"), file]),
    ];
    Image::new(Flavour::Oci, layers)
}

fn took<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let begin = Instant::now();
    let result = work();
    (result, begin.elapsed())
}

/// A layer that would take 40 s arrives while an image is removed and a third one is started.
#[test]
fn a_slow_pull_does_not_freeze_the_node() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let stage = Stage::new("a_slow_pull_does_not_freeze_the_node", generation());
    let present = stage.push(&ordinary(Flavour::Oci, Compression::Gzip), "demo/present:1");
    let removed = stage.push(&image_with(1, 1_000), "demo/removed:1");
    let slow = stage.push(&image_with(2, 40_000_000), "demo/slow:1");
    stage.pull(&present);
    stage.pull(&removed);
    stage.containerd.pull(&present, REFERENCE).expect_success();
    let (_, reference) = took(|| stage.containerd.sh(&present, REFERENCE, "true"));
    stage.proxy.set_link(Link {
        bytes_per_second: Some(1_000_000),
        ..Link::default()
    });
    thread::scope(|scope| {
        let pull = scope.spawn(|| stage.pull(&slow));
        thread::sleep(Duration::from_millis(1_500));
        let (_, removal) = took(|| stage.containerd.remove_image(&removed));
        let (_, start) = took(|| stage.sh(&present, "true"));
        assert!(
            removal + start < reference + LEEWAY,
            "with overlayfs {reference:?}; removed after {removal:?}, started after {start:?}"
        );
        stage.proxy.set_link(Link::default());
        pull.join().unwrap();
    });
    let sum = stage.sh(&slow, "sha256sum < /data/2");
    assert_eq!(
        sum.split_whitespace().next(),
        Some(sha256(&noise(2, 40_000_000)).as_str())
    );
    let refused = &stage.lazuli.as_ref().unwrap().log();
    assert!(
        refused.contains("Prepare may wait for"),
        "the pull was not slow:\n{refused}"
    );
}

fn sha256(bytes: &[u8]) -> String {
    let digest = crate::support::image::digest_of(bytes);
    digest["sha256:".len()..].to_owned()
}

/// A registry that works, until its blobs never come.
struct Silent {
    containerd: Containerd,
    lazuli: Lazuli,
    registry: FaultRegistry,
    _runtime: tokio::runtime::Runtime,
}

impl Silent {
    fn new(name: &str, config: &str) -> Self {
        let sandbox = Sandbox::new(name);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let registry = runtime.block_on(FaultRegistry::start());
        let containerd = Containerd::start(&sandbox, generation(), &lazuli::address_in(&sandbox));
        let lazuli = Lazuli::start(&sandbox, &containerd.address, &[registry.host()], config);
        Silent {
            containerd,
            lazuli,
            registry,
            _runtime: runtime,
        }
    }

    fn add(&self, image: &Image, name: &str) -> String {
        for blob in image.blobs() {
            self.registry.add_blob(blob.bytes.as_slice().to_vec());
        }
        let bytes = image.manifest.bytes.as_slice().to_vec();
        let manifest = self.registry.add_manifest(image.media_type, bytes);
        let (repository, tag) = name.split_once(':').unwrap();
        self.registry.tag(repository, tag, manifest);
        format!("{}/{name}", self.registry.host())
    }

    fn pull(&self, reference: &str) {
        match self.containerd.generation {
            Generation::One => self.lazuli.pull(reference),
            _ => self.containerd.pull(reference, SNAPSHOTTER),
        }
        .expect_success();
    }

    fn falls_silent(&self) {
        self.registry.fail(On::Blob, 1_000_000, Fault::Stall(0));
    }
}

/// Ten pulls at once from a registry that accepts and never answers; meanwhile containers of a present image start.
#[test]
fn pulls_from_a_silent_registry_end_within_the_bound() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let stage = Silent::new("pulls_from_a_silent_registry_end_within_the_bound", "");
    let present = stage.add(&ordinary(Flavour::Oci, Compression::Gzip), "demo/present:1");
    stage.pull(&present);
    let base = Layer::of(Compression::Gzip, base_entries());
    let images: Vec<String> = (0..10_usize)
        .map(|number| {
            let own = Entry::file(format!("own{number}"), noise(number as u64, 1_000_000));
            let layer = Layer::of(Compression::Gzip, [own]);
            let image = Image::new(Flavour::Oci, vec![layer, base.clone()]);
            stage.add(&image, &format!("demo/silent{number}:1"))
        })
        .collect();
    stage
        .registry
        .fail(On::Blob, 1_000_000, Fault::Delay(Duration::from_secs(3600)));
    thread::scope(|scope| {
        let pulls: Vec<_> = images
            .iter()
            .map(|image| {
                let mut command = match stage.containerd.generation {
                    Generation::One => stage.lazuli.command("pull", &[image]),
                    _ => {
                        let mut command = stage.containerd.ctr(&["images", "pull", "--plain-http", image]);
                        command.env("CONTAINERD_SNAPSHOTTER", SNAPSHOTTER);
                        command
                    }
                };
                scope.spawn(move || run(&mut command, Duration::from_secs(12)))
            })
            .collect();
        thread::sleep(Duration::from_millis(500));
        for _ in 0..3 {
            let (_, start) = took(|| stage.containerd.sh(&present, SNAPSHOTTER, "true"));
            assert!(
                start < PREPARE_BOUND + LEEWAY,
                "a present image started after {start:?}"
            );
        }
        for pull in pulls {
            pull.join().unwrap();
        }
    });
    stage.registry.heal();
}

/// A pull that is given up frees its connection within seconds.
#[test]
fn a_pull_that_is_given_up_ends_its_streams() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let stage = Stage::new("a_pull_that_is_given_up_ends_its_streams", generation());
    const LENGTH: usize = 36_000_000;
    let reference = stage.push(&image_with(3, LENGTH), "demo/slow:1");
    // Slow enough to be given up in between, and quick enough that Prepare would wait for it.
    stage.proxy.set_link(Link {
        bytes_per_second: Some(5_000_000),
        ..Link::default()
    });
    let mut pull = match stage.containerd.generation {
        Generation::One => stage.lazuli.as_ref().unwrap().command("pull", &[&reference]),
        _ => {
            let mut command = stage.containerd.ctr(&["images", "pull", "--plain-http", &reference]);
            command.env("CONTAINERD_SNAPSHOTTER", SNAPSHOTTER);
            command
        }
    };
    // The command is killed when its time is over, as Ctrl-C would end it.
    let given_up = run(&mut pull, Duration::from_millis(1_500));
    assert!(!given_up.success(), "it was not slow: {}", given_up.describe());
    let loading = |stage: &Stage| {
        let status = stage.lazuli.as_ref().unwrap().status();
        status["loading"].as_array().map_or(0, Vec::len)
    };
    wait_until(Duration::from_secs(12), || (loading(&stage) == 0).then_some(()))
        .expect("streams go on that nobody waits for");
    let sent = || -> u64 { stage.blob_requests().iter().map(|exchange| exchange.bytes).sum() };
    let before = sent();
    assert!(before < LENGTH as u64, "all of it has come");
    thread::sleep(Duration::from_secs(1));
    assert_eq!(sent(), before, "bytes still come");
    // The next pull begins anew and gets all of it.
    stage.proxy.set_link(Link::default());
    stage.pull(&reference);
    assert_eq!(stage.sh(&reference, "stat -c %s /data/3"), "36000000\n");
}

/// Readers of a lazy image whose registry hangs; a container of another image reads what is in the cache.
#[test]
fn readers_of_a_silent_registry_stop_nobody_else() {
    if subject() != SNAPSHOTTER {
        return;
    }
    const READERS: usize = 400;
    let lazy = {
        let stage = Stage::new("readers_of_a_silent_registry: conversion", Generation::One);
        let files = (0..READERS).map(|at| Entry::file(format!("data/{at}"), noise(at as u64, 40_000)));
        let layers = vec![
            Layer::of(Compression::Gzip, base_entries()),
            Layer::of(Compression::Gzip, [Entry::dir("data")].into_iter().chain(files)),
        ];
        stage.converted(&Image::new(Flavour::Oci, layers), &["--estargz"])
    };
    let config = "idle_timeout = 3\n[fetch]\nread_deadline = 90\n";
    let stage = Silent::new("readers_of_a_silent_registry_stop_nobody_else", config);
    let (hung, other) = (
        stage.add(&lazy, "demo/hung:1"),
        stage.add(&ordinary(Flavour::Oci, Compression::Gzip), "demo/other:1"),
    );
    stage.pull(&other);
    stage.pull(&hung);
    let read_other = "cat /app/data/* > /dev/null";
    let (_, before) = took(|| stage.containerd.sh(&other, SNAPSHOTTER, read_other));
    let id = stage.containerd.start_container(&hung, SNAPSHOTTER);
    // What the shell needs is here from now on.
    let warm = stage.containerd.exec(&id, "cat /etc/passwd > /dev/null");
    warm.expect_success();
    stage.falls_silent();
    thread::scope(|scope| {
        let script = format!(
            "i=0; while [ $i -lt {READERS} ]; do (cat /data/$i > /dev/null || echo $i) & i=$((i+1)); done; wait"
        );
        let (containerd, id) = (&stage.containerd, &id);
        let readers = scope.spawn(move || containerd.exec(id, &script));
        let waits = || {
            stage.lazuli.status()["reads"]["waiting"]
                .as_u64()
                .filter(|count| *count > 50)
        };
        wait_until(PATIENCE, waits).expect("nobody waits");
        for _ in 0..3 {
            let (_, meanwhile) = took(|| stage.containerd.sh(&other, SNAPSHOTTER, read_other));
            assert!(meanwhile < before + LEEWAY, "{before:?} before, {meanwhile:?} now");
        }
        stage.registry.heal();
        let failed = readers.join().unwrap().expect_success().text();
        assert_eq!(failed, "", "readers go on when the registry answers again");
    });
    stage.containerd.remove_container(&id);
}

/// Readers that wait, a pull that asks, a stream that has begun, and a call that has no bound of its own, all of a registry that says nothing: the
/// daemon ends within its bound, and so does everything that waited.
#[test]
fn the_daemon_ends_in_time_whatever_waits() {
    if subject() != SNAPSHOTTER {
        return;
    }
    /// What its steps may take together: 3 s for calls, 5 s for everything that has to be closed, 0.5 s for tasks that do not see it.
    const END: Duration = Duration::from_millis(8500);
    let lazy = {
        let stage = Stage::new("the_daemon_ends_in_time: conversion", Generation::One);
        let files = [Entry::dir("data"), Entry::file("data/file", noise(1, 3_000_000))];
        let layers = vec![
            Layer::of(Compression::Gzip, base_entries()),
            Layer::of(Compression::Gzip, files),
        ];
        stage.converted(&Image::new(Flavour::Oci, layers), &["--estargz"])
    };
    let mut stage = Silent::new("the_daemon_ends_in_time_whatever_waits", "idle_timeout = 600\n");
    let (hung, streamed) = (
        stage.add(&lazy, "demo/hung:1"),
        stage.add(&image_with(5, 2_000_000), "demo/streamed:1"),
    );
    stage.pull(&hung);
    let id = stage.containerd.start_container(&hung, SNAPSHOTTER);
    stage
        .containerd
        .exec(&id, "cat /etc/passwd > /dev/null")
        .expect_success();
    stage.falls_silent();
    let mut pull = stage.lazuli.command("pull", &[&streamed]);
    let mut complete = stage.lazuli.command("complete", &[&hung]);
    thread::scope(|scope| {
        let (containerd, id) = (&stage.containerd, &id);
        let complete = scope.spawn(move || run(&mut complete, PATIENCE));
        let reader = scope.spawn(move || containerd.exec(id, "cat /data/file > /dev/null"));
        let pull = scope.spawn(move || run(&mut pull, PATIENCE));
        let waits = || {
            let status = stage.lazuli.status();
            let waiting = status["reads"]["waiting"].as_u64();
            waiting.filter(|count| *count > 0)
        };
        wait_until(PATIENCE, waits).expect("nobody waits");
        thread::sleep(Duration::from_secs(1));
        assert!(!pull.is_finished() && !reader.is_finished() && !complete.is_finished());
        let begun = Instant::now();
        let supervisor = stage.lazuli.supervisor().to_string();
        run(Command::new("kill").args(["-s", "TERM", &supervisor]), PATIENCE).expect_success();
        wait_until(PATIENCE, || stage.lazuli.worker().is_none().then_some(())).expect("it does not end");
        let took = begun.elapsed();
        assert!(took < END + LEEWAY, "{took:?}");
        assert_ne!(reader.join().unwrap().status.and_then(|status| status.code()), Some(0));
        pull.join().unwrap();
        assert!(!complete.join().unwrap().success());
    });
    assert!(stage.lazuli.stop());
    stage.containerd.remove_container(&id);
}
