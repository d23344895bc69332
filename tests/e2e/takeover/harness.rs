//! What these tests are made of: images of which every byte is known, containers that read them, and moments at random.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::stage::{Stage, subject};
use crate::support::containerd::Generation;
use crate::support::image::{Compression, Flavour, Image, Layer, base_entries};
use crate::support::lazuli::Lazuli;
use crate::support::proxy::Link;
use crate::support::sandbox::{COMMAND_TIMEOUT, PATIENCE, run_ok, wait_until};
use crate::support::tar::Entry;

/// Large files of an image: seed and bytes. One is as long as a container reads it in a test of minutes and still finds cold parts.
const FILES: [(u64, usize); 4] = [(11, 24_000_000), (12, 6_000_007), (13, 900_001), (14, 70_000)];
/// Small files of an image.
const SMALL: usize = 400;
/// A registry that is not next door: some reads wait for it at every moment.
const LINK: Link = Link {
    latency: Duration::from_millis(5),
    bytes_per_second: Some(30_000_000),
};

/// The reader, of which each container runs one.
const SOURCE: &str = include_str!("reader.c");

/// Eight bytes of a file: number `index` of the file with this seed. reader.c has the same.
fn word(seed: u64, index: u64) -> u64 {
    let mut z = seed
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(index.wrapping_mul(0xbf58_476d_1ce4_e5b9));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn content(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 8);
    for index in 0..length.div_ceil(8) as u64 {
        bytes.extend_from_slice(&word(seed, index).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// The compiled reader.
fn reader() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let (source, program) = (dir.path().join("reader.c"), dir.path().join("reader"));
    fs::write(&source, SOURCE).unwrap();
    run_ok(
        Command::new("gcc")
            .args(["-O2", "-static", "-o"])
            .arg(&program)
            .arg(&source),
    );
    fs::read(program).unwrap()
}

/// An image with the reader and what it reads.
pub fn image() -> Image {
    image_of(Compression::Gzip, &FILES)
}

/// An image with the reader and these files: seed and bytes.
pub fn image_of(compression: Compression, large: &[(u64, usize)]) -> Image {
    let mut files = vec![Entry::dir("data"), Entry::dir("data/small")];
    for &(seed, length) in large {
        files.push(Entry::file(format!("data/{seed}-{length}"), content(seed, length)));
    }
    for number in 0..SMALL {
        files.push(Entry::file(format!("data/small/{number}"), number.to_string()));
    }
    let program = Entry::file("reader", reader()).mode(0o755);
    let layers = [base_entries(), vec![program], files];
    Image::new(
        Flavour::Oci,
        layers.map(|entries| Layer::of(compression, entries)).into(),
    )
}

/// A stage with two images: one that is lazy, and one that was streamed and is local.
pub struct Kitchen {
    pub stage: Stage,
    pub references: [String; 2],
}

impl Kitchen {
    pub fn new(name: &str) -> Self {
        let stage = Stage::new(name, Generation::One);
        let image = image();
        let lazy = stage.push_converted(&image, "demo/lazy:1", &["--estargz"]);
        let local = stage.push(&image, "demo/local:1");
        for reference in [&lazy, &local] {
            stage.pull(reference);
        }
        stage.proxy.set_link(LINK);
        Kitchen {
            stage,
            references: [lazy, local],
        }
    }

    /// Lazuli's root directory as the kernel calls it.
    pub fn root(&self) -> PathBuf {
        self.stage.sandbox.path("lazuli").canonicalize().unwrap()
    }

    /// A new container can be started, and reads what it should. (containerd needs a moment to find a daemon again.)
    pub fn still_works(&self) {
        for reference in &self.references {
            let script = "cat /data/small/17 && ls /data/small | wc -l";
            let works = || {
                let finished = self.stage.containerd.run(reference, &subject(), script);
                (finished.success() && finished.text() == format!("17{SMALL}\n")).then_some(())
            };
            wait_until(PATIENCE, works).unwrap_or_else(|| panic!("no container on {reference} can be started"));
        }
    }
}

/// Containers that read.
pub struct Readers<'a> {
    stage: &'a Stage,
    containers: Vec<(String, u32)>,
    ended: AtomicBool,
}

impl<'a> Readers<'a> {
    /// Starts `count` of them, on both images in turn.
    pub fn start(kitchen: &'a Kitchen, count: usize) -> Self {
        let containerd = &kitchen.stage.containerd;
        let containers = kitchen.references.iter().cycle().take(count).map(|reference| {
            let id = containerd.start_container(reference, &subject());
            let pid = containerd.pid(&id).expect("it runs");
            containerd
                .exec(&id, "/reader /data /run/out/stop >/run/out/report 2>&1 &")
                .expect_success();
            (id, pid)
        });
        let containers = containers.collect();
        let readers = Readers {
            stage: &kitchen.stage,
            containers,
            ended: AtomicBool::new(false),
        };
        // All of them read something before anything happens.
        std::thread::sleep(Duration::from_millis(500));
        readers
    }

    /// Ends them: none has failed, none was started anew.
    pub fn end(&self) {
        for report in self.reports() {
            assert!(
                report.contains(" failures=0 wrong=0 ") && !report.contains("failed"),
                "{report}"
            );
            let operations = report.split(['=', ' ']).nth(1).unwrap().parse::<u64>().unwrap();
            assert!(operations > 0, "{report}");
            eprintln!("{}", report.trim());
        }
        for (id, pid) in &self.containers {
            assert_eq!(
                self.stage.containerd.pid(id),
                Some(*pid),
                "{id} is not what was started"
            );
        }
    }

    /// Ends them, whatever they have met (their own program is among what they cannot read any more): no process of them stays.
    pub fn end_anyhow(&self) {
        self.ended.store(true, Ordering::Relaxed);
        for (id, _) in &self.containers {
            self.stage.containerd.remove_container(id);
        }
    }

    fn reports(&self) -> Vec<String> {
        self.ended.store(true, Ordering::Relaxed);
        let outputs = self.containers.iter().map(|(id, _)| self.stage.containerd.output(id));
        let outputs: Vec<PathBuf> = outputs.collect();
        for output in &outputs {
            fs::write(output.join("stop"), "").unwrap();
        }
        let report = |output: &PathBuf| {
            let read = || fs::read_to_string(output.join("report")).ok();
            let ended = || read().filter(|text| text.contains("operations="));
            wait_until(COMMAND_TIMEOUT, ended).unwrap_or_else(|| panic!("a reader does not end: {:?}", read()))
        };
        outputs.iter().map(report).collect()
    }
}

impl Drop for Readers<'_> {
    fn drop(&mut self) {
        if !self.ended.load(Ordering::Relaxed) {
            for (id, _) in &self.containers {
                let _ = fs::write(self.stage.containerd.output(id).join("stop"), "");
            }
        }
    }
}

/// Kills the worker, and waits for the next one; gives that.
pub fn kill_worker(lazuli: &Lazuli, worker: u32) -> u32 {
    let before = lazuli.log().len();
    let begun = Instant::now();
    let pid = rustix::process::Pid::from_raw(worker as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let next = || {
        let log = lazuli.log();
        let serves = log.get(before..).is_some_and(|new| new.contains("serving address="));
        lazuli.worker().filter(|new| serves && *new != worker)
    };
    let next = wait_until(PATIENCE, next).expect("no next worker serves");
    eprintln!("the next worker serves after {} ms", begun.elapsed().as_millis());
    next
}

/// Whether a process is there.
pub fn alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}/exe")).read_link().is_ok()
}

/// How often something is done in the long tests, at most.
pub fn repeats(most: u32) -> u32 {
    let wanted = std::env::var("LAZULI_TAKEOVERS").ok();
    wanted.map_or(most, |text| text.parse().expect("LAZULI_TAKEOVERS is a number"))
}

/// Moments at random, the same for the same seed.
pub struct Seed(u64);

impl Seed {
    /// That of `LAZULI_SEED`, or another one each day; it is printed.
    pub fn new(name: &str) -> Self {
        let given = std::env::var("LAZULI_SEED").ok();
        let seed = given.map_or_else(
            || {
                std::time::UNIX_EPOCH
                    .elapsed()
                    .map_or(1, |since| since.as_secs() / 86_400)
            },
            |text| text.parse().expect("LAZULI_SEED is a number"),
        );
        eprintln!("{name}: LAZULI_SEED={seed}");
        Seed(seed)
    }

    /// Another one that follows from this one.
    pub fn part(&self, number: u64) -> Self {
        Seed(word(self.0, number))
    }

    /// A number below `limit`.
    pub fn number(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(1);
        word(7, self.0) % limit
    }

    /// All of `items`, in another order.
    pub fn shuffled<T: Clone>(&mut self, items: &[T]) -> Vec<T> {
        let mut items = items.to_vec();
        for at in (1..items.len()).rev() {
            items.swap(at, self.number(at as u64 + 1) as usize);
        }
        items
    }

    /// A time below `limit`.
    pub fn below(&mut self, limit: Duration) -> Duration {
        self.0 = self.0.wrapping_add(1);
        limit.mul_f64(word(7, self.0) as f64 / u64::MAX as f64)
    }
}
