//! What is done meanwhile: containers that read, images that come and go.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, RwLock};
use std::time::{Duration, Instant};

use super::faults;
use super::watch::{Held, Watch};
use crate::stage::Stage;
use crate::support::containerd::{Containerd, Generation};
use crate::support::fault_registry::FaultRegistry;
use crate::support::image::{Compression, Image};
use crate::support::lazuli::{self, Lazuli, SNAPSHOTTER};
use crate::support::sandbox::{
    COMMAND_TIMEOUT, Finished, PATIENCE, Sandbox, mounts_below, run, run_ok, unmount_below, wait_until,
};
use crate::takeover::harness::{Seed, image_of};

/// Large files of each image: bytes. All images together are several times as large as the cache.
const FILES: [usize; 4] = [7_000_000, 2_000_003, 900_001, 70_000];
/// Containers at once.
const CONTAINERS: u64 = 3;
/// How long a container reads, at most, and at least.
const READS: Duration = Duration::from_secs(6);
const READS_LEAST: Duration = Duration::from_secs(1);
/// Longest pause between two images that are pulled anew.
const PULLS: Duration = Duration::from_secs(6);
/// Bytes of the file system with the daemon's root: more than it needs, and soon filled.
const DISK: &str = "160M";
/// Longest time after something was mended in which calls may still fail of it: containerd pauses for 3 s between attempts to reach a daemon.
const AFTERWARDS: Duration = Duration::from_secs(8);
/// Longest time in which something that is tried again must succeed.
const TRIES: Duration = Duration::from_secs(120);
/// Longest time in which what containers had must be gone after the last of them.
const SETTLE: Duration = Duration::from_secs(60);

/// The daemon's configuration. Requests that hang are given up soon, or every silence would be one for a whole test.
const CONFIG: &str = "connect_timeout = 2\nidle_timeout = 2\n[log]\nlevel = \"info\"\n\
    [cache]\nmax_size = \"24MiB\"\nmin_free = 0\nhigh_percent = 100\n";

/// An image; who holds the lock for writing takes it away and brings it back.
pub struct Subject {
    reference: String,
    there: RwLock<()>,
}

/// What happened so far.
#[derive(Default)]
pub struct Counts {
    counts: Mutex<BTreeMap<&'static str, u64>>,
    /// What must not have happened.
    failures: Mutex<Vec<String>>,
    /// What is broken now, since when and until when.
    broken: Mutex<Vec<(Instant, Option<Instant>)>>,
}

impl Counts {
    pub fn add(&self, what: &'static str, count: u64) {
        *self.counts.lock().unwrap().entry(what).or_default() += count;
    }

    pub fn fail(&self, what: String) {
        eprintln!("FAILED: {what}");
        self.failures.lock().unwrap().push(what);
    }

    /// Does `body` while something is broken on purpose.
    pub fn broken<T>(&self, what: &'static str, body: impl FnOnce() -> T) -> T {
        self.add(what, 1);
        let at = {
            let mut broken = self.broken.lock().unwrap();
            broken.push((Instant::now(), None));
            broken.len() - 1
        };
        let result = body();
        self.broken.lock().unwrap()[at].1 = Some(Instant::now());
        result
    }

    /// Whether anything was broken at any time since `begun`, or a moment before.
    fn was_broken_since(&self, begun: Instant) -> bool {
        let broken = self.broken.lock().unwrap();
        let mut spans = broken.iter();
        spans.any(|(_, until)| until.is_none_or(|until| until + AFTERWARDS > begun))
    }

    /// Tries until it succeeds. A failure is one of the daemon's unless something was broken.
    fn attempt(&self, what: &'static str, mut act: impl FnMut() -> Finished) -> bool {
        let until = Instant::now() + TRIES;
        loop {
            let begun = Instant::now();
            let finished = act();
            if finished.success() {
                self.add(what, 1);
                return true;
            }
            if !self.was_broken_since(begun) || Instant::now() > until {
                self.fail(format!("{what}: {}", finished.describe()));
                return false;
            }
            eprintln!("{what} is tried again: {}", finished.describe());
            self.add("tried again while something was broken", 1);
            std::thread::sleep(Duration::from_millis(300));
        }
    }
}

/// A file system of its own for the daemon, in a file.
pub struct Disk(PathBuf);

impl Disk {
    fn new(sandbox: &Sandbox) -> Self {
        let (image, at) = (sandbox.path("disk.img"), sandbox.dir("lazuli"));
        run_ok(Command::new("truncate").args(["--size", DISK]).arg(&image));
        run_ok(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(&image));
        run_ok(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&at));
        Disk(at)
    }

    /// Fills it to the last block.
    pub fn fill(&self) {
        // `dd` ends with an error, which is what is wanted.
        let mut dd = Command::new("dd");
        dd.args(["if=/dev/zero", "bs=64k"]);
        run(dd.arg(format!("of={}", self.filler().display())), COMMAND_TIMEOUT);
    }

    pub fn free(&self) {
        let _ = fs::remove_file(self.filler());
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        unmount_below(&self.0);
    }
}

/// All that takes part. Fields are dropped in this order: users before what they use.
pub struct Soak {
    pub containerd: Containerd,
    pub lazuli: Lazuli,
    pub registry: FaultRegistry,
    pub disk: Disk,
    pub counts: Counts,
    subjects: Vec<Subject>,
    seed: Seed,
    /// Where the registry runs.
    _runtime: tokio::runtime::Runtime,
    pub sandbox: Sandbox,
}

/// Images of several formats; each with content of its own.
fn images(generation: &Generation) -> Vec<Image> {
    let stage = Stage::new("soak: conversion", generation.clone());
    let plain = |number: u64, compression| {
        let files: Vec<(u64, usize)> = (number * 10..).zip(FILES).collect();
        image_of(compression, &files)
    };
    vec![
        stage.converted(&plain(1, Compression::Gzip), &["--estargz"]),
        stage.converted(
            &plain(2, Compression::Gzip),
            &["--estargz", "--estargz-chunk-size", "50000"],
        ),
        plain(3, Compression::Gzip),
        plain(4, Compression::Zstd),
    ]
}

impl Soak {
    pub fn new(name: &str, generation: Generation) -> Self {
        let images = images(&generation);
        let sandbox = Sandbox::new(name);
        let disk = Disk::new(&sandbox);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let registry = runtime.block_on(FaultRegistry::start());
        let mut subjects = Vec::new();
        for (number, image) in images.iter().enumerate() {
            for blob in image.blobs() {
                registry.add_blob(blob.bytes.as_slice().to_vec());
            }
            let manifest = registry.add_manifest(image.media_type, image.manifest.bytes.as_slice().to_vec());
            let repository = format!("soak/image-{number}");
            registry.tag(&repository, "1", manifest);
            subjects.push(Subject {
                reference: format!("{}/{repository}:1", registry.host()),
                there: RwLock::new(()),
            });
        }
        let containerd = Containerd::start(&sandbox, generation, &lazuli::address_in(&sandbox));
        let lazuli = Lazuli::start(&sandbox, &containerd.address, &[registry.host()], CONFIG);
        Soak {
            containerd,
            lazuli,
            registry,
            disk,
            counts: Counts::default(),
            subjects,
            seed: Seed::new(name),
            _runtime: runtime,
            sandbox,
        }
    }

    fn pull(&self, subject: &Subject) -> Finished {
        match self.containerd.generation {
            Generation::One => self.lazuli.pull(&subject.reference),
            Generation::Two(_) => self.containerd.pull(&subject.reference, SNAPSHOTTER),
        }
    }

    /// Runs for so long, tells how it went, and panics if it did not go well.
    pub fn run(self, time: Duration) {
        let generation = match self.containerd.generation {
            Generation::One => "containerd 1.x",
            Generation::Two(_) => "containerd 2.x",
        };
        let before = self.held_at_first();
        for subject in &self.subjects {
            self.pull(subject).expect_success();
        }
        let ended = AtomicBool::new(false);
        let mut watch = Watch::new();
        std::thread::scope(|scope| {
            let (soak, ended) = (&self, &ended);
            let mut threads = Vec::new();
            for number in 0..CONTAINERS {
                threads.push(scope.spawn(move || soak.containers(soak.seed.part(number), ended)));
            }
            threads.push(scope.spawn(move || soak.images(soak.seed.part(100), ended)));
            threads.push(scope.spawn(move || faults::registry(soak, soak.seed.part(101), ended)));
            threads.push(scope.spawn(move || faults::node(soak, soak.seed.part(102), ended)));
            let until = Instant::now() + time;
            while Instant::now() < until && threads.iter().all(|thread| !thread.is_finished()) {
                std::thread::sleep(Duration::from_secs(1));
                watch.sample(&self.lazuli, self.sandbox.root());
                self.registry.take_log();
            }
            ended.store(true, Ordering::Relaxed);
        });
        self.settle(&before);
        let counts = self.counts.counts.lock().unwrap().clone();
        let failures = self.counts.failures.lock().unwrap().clone();
        eprintln!("\n{generation}, {} s:", time.as_secs());
        for (what, count) in &counts {
            eprintln!("{count:>10}  {what}");
        }
        eprintln!("{:>10}  bytes of blobs that the registry sent", self.registry.sent());
        eprintln!("{:>10}  things that must not happen", failures.len());
        eprint!("{}", watch.report());
        for what in ["containers", "image pulled", "image removed", "reads", faults::KILLED] {
            assert!(counts.contains_key(what), "nothing of this was done: {what}");
        }
        for kind in faults::kinds() {
            assert!(counts.contains_key(kind), "this has never happened: {kind}");
        }
        assert_eq!(counts.get("wrong bytes").copied().unwrap_or_default(), 0);
        assert_eq!(failures, [""; 0]);
        if let Some(growth) = watch.growth() {
            panic!("{growth}");
        }
    }

    /// Starts containers one after the other, each of which reads for a while.
    fn containers(&self, mut seed: Seed, ended: &AtomicBool) {
        while !ended.load(Ordering::Relaxed) {
            let subject = &self.subjects[seed.number(self.subjects.len() as u64) as usize];
            let time = READS_LEAST + seed.below(READS);
            let Some(id) = self.start(subject) else { return };
            let begun = Instant::now();
            let output = self.containerd.output(&id);
            while begun.elapsed() < time && !ended.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(50));
            }
            fs::write(output.join("stop"), "").unwrap();
            let report = || {
                let text = fs::read_to_string(output.join("report")).ok()?;
                text.contains("operations=").then_some(text)
            };
            match wait_until(TRIES, report) {
                Some(report) => self.note(&id, &report),
                None => {
                    let text = fs::read_to_string(output.join("report"));
                    self.counts.fail(format!("the reader of {id} does not end: {text:?}"));
                }
            }
            self.remove(&id);
            let _ = fs::remove_dir_all(output);
        }
    }

    fn note(&self, id: &str, report: &str) {
        let field = |name: &str| {
            let value = report.split_once(name).map_or("", |(_, rest)| rest);
            let digits: String = value.chars().take_while(char::is_ascii_digit).collect();
            digits.parse::<u64>().unwrap_or(u64::MAX)
        };
        self.counts.add("reads", field("operations="));
        self.counts.add("failed reads", field("failures="));
        self.counts.add("wrong bytes", field("wrong="));
        if field("failures=") > 0 || field("wrong=") > 0 || report.contains("failed") {
            self.counts.fail(format!("{id} read: {report}"));
        }
    }

    /// A container with a reader in it.
    fn start(&self, subject: &Subject) -> Option<String> {
        let _there = subject.there.read().unwrap();
        let mut started = String::new();
        let begun = self.counts.attempt("containers", || {
            let (id, finished) = self.containerd.try_start_container(&subject.reference, SNAPSHOTTER);
            started.clone_from(&id);
            if !finished.success() {
                if finished.stderr.contains("failed to get reader from content store") {
                    // Trying again would not help: containerd has an image without its layers.
                    self.counts.fail(format!("{} has lost its layers", subject.reference));
                    self.tell();
                }
                self.remove(&id);
                return finished;
            }
            let script = "/reader /data /run/out/stop >/run/out/report 2>&1 &";
            let finished = self.containerd.exec(&id, script);
            if !finished.success() {
                self.remove(&id);
            }
            finished
        });
        begun.then_some(started)
    }

    /// What containerd and the daemon know, of an image of which something is missing, or of what is left.
    fn tell(&self) {
        for arguments in [
            &["images", "ls"][..],
            &["content", "ls"],
            &["snapshots", "--snapshotter", SNAPSHOTTER, "ls"],
            &["leases", "ls"],
            &["containers", "ls"],
        ] {
            eprintln!(
                "{}",
                run(&mut self.containerd.ctr(arguments), COMMAND_TIMEOUT).describe()
            );
        }
        eprintln!("STATE: {:#}", self.lazuli.status());
    }

    /// Takes away a container, or what is there of one that could not be started.
    fn remove(&self, id: &str) {
        for arguments in [&["tasks", "rm", "--force", id][..], &["containers", "rm", id]] {
            self.counts.attempt("container calls", || {
                let mut finished = run(&mut self.containerd.ctr(arguments), COMMAND_TIMEOUT);
                // An attempt before may have had its effect and lost its answer.
                if finished.stderr.contains("not found") {
                    finished = run(&mut Command::new("true"), COMMAND_TIMEOUT);
                }
                finished
            });
        }
    }

    /// Takes images away and pulls them again.
    fn images(&self, mut seed: Seed, ended: &AtomicBool) {
        while !ended.load(Ordering::Relaxed) {
            pause(seed.below(PULLS), ended);
            let subject = &self.subjects[seed.number(self.subjects.len() as u64) as usize];
            let _away = subject.there.write().unwrap();
            self.counts.attempt("image removed", || {
                let remove = ["images", "rm", "--sync", &subject.reference];
                run(&mut self.containerd.ctr(&remove), COMMAND_TIMEOUT)
            });
            self.counts.attempt("image pulled", || self.pull(subject));
        }
    }

    /// What the daemon and the containers have.
    fn held(&self) -> Held {
        Held {
            mounts: mounts_below(&self.root()).len(),
            shims: shims(&self.containerd.address),
            supervisor_files: files(self.lazuli.supervisor()),
            worker_files: self.lazuli.worker().map_or(0, files),
        }
    }

    /// The same, before anything is done. The supervisor is given what it keeps after the daemon can be reached, and opens its door then.
    fn held_at_first(&self) -> Held {
        let door = self.root().join("supervisor.sock");
        wait_until(PATIENCE, || door.exists().then_some(())).expect("the supervisor has no door");
        self.held()
    }

    fn root(&self) -> PathBuf {
        self.sandbox.path("lazuli").canonicalize().unwrap()
    }

    /// When all containers are gone, all that they had is.
    fn settle(&self, before: &Held) {
        self.registry.heal();
        self.disk.free();
        // Of a snapshot whose making was not answered, containerd knows nothing until it collects its garbage.
        let lease = ["leases", "create", "--id", "settle"];
        self.counts.attempt("garbage collections", || {
            let _ = run(&mut self.containerd.ctr(&lease), COMMAND_TIMEOUT);
            run(
                &mut self.containerd.ctr(&["leases", "rm", "--sync", "settle"]),
                COMMAND_TIMEOUT,
            )
        });
        let waiting = || self.lazuli.status()["reads"]["waiting"].as_u64();
        let settled = || (self.held().is_within(before) && waiting() == Some(0)).then_some(());
        if wait_until(SETTLE, settled).is_none() {
            let mounts: Vec<_> = mounts_below(&self.root());
            self.counts.fail(format!(
                "something is left: {:?}, before: {before:?}, {:?} reads wait, mounts: {mounts:?}",
                self.held(),
                waiting()
            ));
            self.tell();
        }
    }
}

/// Sleeps, unless the end comes first.
pub fn pause(time: Duration, ended: &AtomicBool) {
    let until = Instant::now() + time;
    while Instant::now() < until && !ended.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Open files of a process.
pub fn files(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Shims of a containerd.
fn shims(address: &Path) -> usize {
    let address = address.display().to_string();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let command = |path: &Path| fs::read(path.join("cmdline")).unwrap_or_default();
    let lines = processes.map(|process| String::from_utf8_lossy(&command(&process.path())).into_owned());
    lines
        .filter(|line| line.contains("containerd-shim") && line.contains(&address))
        .count()
}

/// Waits until another worker than `worker` serves.
pub fn await_worker(lazuli: &Lazuli, worker: Option<u32>) -> bool {
    let next = || {
        lazuli.worker().filter(|new| Some(*new) != worker)?;
        run(&mut lazuli.command("status", &["--json"]), PATIENCE)
            .success()
            .then_some(())
    };
    wait_until(PATIENCE, next).is_some()
}
