//! A disk that is slow or busy: what waits for it are those who asked for it, and not the readers of other containers.
//!
//! fsync and fdatasync are slowed by a library that is put before libc (`LD_PRELOAD`); a file says by how much.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ::lazuli::proto::snapshots::v1::snapshots_client::SnapshotsClient;
use ::lazuli::proto::snapshots::v1::{
    CleanupRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use crate::stage::{Stage, subject};
use crate::support::containerd::Generation;
use crate::support::image::{Compression, Flavour, Image, Layer};
use crate::support::lazuli::{self, SNAPSHOTTER};
use crate::support::sandbox::{COMMAND_TIMEOUT, Sandbox, require_program, run, run_ok};
use crate::support::tar::{Entry, noise};

/// Longest time that a read or a Stat may take meanwhile.
const BOUND: Duration = Duration::from_secs(1);
/// What an fsync takes, in milliseconds.
const FSYNC_MS: u64 = 500;
/// Layers of the image that is read, and files of each.
const LAYERS: usize = 3;
const FILES: usize = 40;
/// Bytes of a file.
const LENGTH: usize = 300_000;
/// Layers of the image that is pulled meanwhile.
const PULLED: usize = 50;

/// The library. It counts its calls in a file beside the one that says how long they take.
const SHIM: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static void be_slow(void) {
    const char *path = getenv("SLOW_FSYNC");
    char text[16] = {0}, count[4096];
    if (!path) return;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return;
    ssize_t length = read(file, text, sizeof text - 1);
    close(file);
    long ms = length > 0 ? atol(text) : 0;
    if (ms == 0) return;
    snprintf(count, sizeof count, "%s.count", path);
    file = open(count, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (file >= 0) {
        if (write(file, ".", 1) != 1) abort();
        close(file);
    }
    struct timespec time = {ms / 1000, ms % 1000 * 1000000L};
    nanosleep(&time, NULL);
}

int fsync(int fd) { be_slow(); return syscall(SYS_fsync, fd); }
int fdatasync(int fd) { be_slow(); return syscall(SYS_fdatasync, fd); }
"#;

/// A way to make fsync slow for a daemon.
struct SlowFsync {
    library: PathBuf,
    control: PathBuf,
}

impl SlowFsync {
    fn new(sandbox: &Sandbox) -> Self {
        let source = sandbox.path("fsync.c");
        fs::write(&source, SHIM).unwrap();
        let library = sandbox.path("fsync.so");
        let mut compiler = Command::new(require_program("cc"));
        run_ok(
            compiler
                .args(["-shared", "-fPIC", "-O2", "-o"])
                .arg(&library)
                .arg(&source),
        );
        SlowFsync {
            library,
            control: sandbox.path("fsync.ms"),
        }
    }

    fn set(&self, ms: u64) {
        fs::write(&self.control, ms.to_string()).unwrap();
    }

    /// Slow calls so far.
    fn count(&self) -> u64 {
        fs::metadata(self.control.with_extension("ms.count")).map_or(0, |file| file.len())
    }
}

/// Bytes of a file of the image that is read.
fn content(layer: usize, file: usize) -> Vec<u8> {
    noise((layer * FILES + file) as u64 + 1, LENGTH)
}

fn path(layer: usize, file: usize) -> String {
    format!("data/{layer}/{file}")
}

/// An image of files that do not compress.
fn large() -> Image {
    let layer = |layer: usize| {
        let dirs = [Entry::dir("data"), Entry::dir(format!("data/{layer}"))];
        let files = (0..FILES).map(|file| Entry::file(path(layer, file), content(layer, file)));
        Layer::of(Compression::Gzip, dirs.into_iter().chain(files))
    };
    Image::new(Flavour::Oci, (0..LAYERS).map(layer).collect())
}

/// An image of many small layers.
fn many() -> Image {
    let layer = |at: usize| Layer::of(Compression::Gzip, [Entry::file(format!("small{at}"), format!("{at}"))]);
    Image::new(Flavour::Oci, (0..PULLED).map(layer).collect())
}

/// Pause between two reads, so that they come all through what goes on meanwhile.
const PAUSE: Duration = Duration::from_millis(200);

/// Reads files that nobody has read, one after the other, until `enough`; how long each took.
fn read_cold(root: &Path, enough: impl Fn(usize) -> bool) -> Vec<Duration> {
    let mut taken = Vec::new();
    // From one layer to the next, and not in the order in which read-ahead would bring them.
    let order = (0..LAYERS * FILES).map(|at| (at % LAYERS, (at / LAYERS * 17) % FILES));
    for (layer, file) in order {
        if enough(taken.len()) {
            break;
        }
        let begun = Instant::now();
        let read = run(Command::new("cat").arg(root.join(path(layer, file))), COMMAND_TIMEOUT);
        taken.push(begun.elapsed());
        assert!(read.success() && read.stdout == content(layer, file), "{}", read.stderr);
        std::thread::sleep(PAUSE);
    }
    taken
}

/// The value that 99 of 100 do not exceed.
fn p99(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    let at = (times.len() * 99).div_ceil(100).max(1) - 1;
    times[at]
}

#[test]
fn cold_reads_do_not_wait_for_the_disk_of_a_pull() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let mut stage = Stage::new("cold_reads_do_not_wait_for_the_disk_of_a_pull", Generation::One);
    let read = stage.push_converted(
        &large(),
        "demo/read:1",
        &["--estargz", "--estargz-chunk-size", "100000"],
    );
    let pulled = stage.push(&many(), "demo/pulled:1");
    let slow = SlowFsync::new(&stage.sandbox);
    slow.set(0);
    let (library, control) = (slow.library.as_os_str(), slow.control.as_os_str());
    stage.lazuli().set_env("LD_PRELOAD", library);
    stage.lazuli().set_env("SLOW_FSYNC", control);
    assert!(stage.lazuli().stop());
    stage.restart_daemon();
    stage.pull(&read);
    let view = stage.containerd.view(&read, SNAPSHOTTER);
    stage.proxy.take();
    slow.set(FSYNC_MS);
    let ended = AtomicBool::new(false);
    let (finished, mut times) = std::thread::scope(|scope| {
        let pull = scope.spawn(|| {
            let finished = stage.lazuli.as_ref().unwrap().pull(&pulled);
            ended.store(true, Ordering::SeqCst);
            finished
        });
        let times = read_cold(&view.path, |_| ended.load(Ordering::SeqCst));
        (pull.join().unwrap(), times)
    });
    finished.expect_success();
    let (calls, requests) = (slow.count(), stage.blob_requests().len());
    slow.set(0);
    assert!(calls >= PULLED as u64, "only {calls} calls were slow");
    assert!(
        times.len() >= 30 && requests > PULLED + 20,
        "{} reads, {requests} requests",
        times.len()
    );
    let p99 = p99(&mut times);
    eprintln!(
        "{} cold reads during {calls} slow fsyncs: median {:?}, p99 {p99:?}",
        times.len(),
        times[times.len() / 2]
    );
    assert!(p99 < BOUND, "p99 of cold reads: {p99:?}");
}

async fn client(address: PathBuf) -> SnapshotsClient<Channel> {
    let connector = tower::service_fn(move |_| {
        let address = address.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(address).await?)) }
    });
    let endpoint = Endpoint::from_static("http://lazuli");
    SnapshotsClient::new(endpoint.connect_with_connector(connector).await.unwrap())
}

/// Makes `count` snapshots of `files` files, removes all of them at once, and reads and asks meanwhile.
fn remove_many(count: usize, files: usize) {
    if subject() != SNAPSHOTTER {
        return;
    }
    let mut stage = Stage::new("a mass removal", Generation::One);
    let read = stage.push_converted(
        &large(),
        "demo/read:1",
        &["--estargz", "--estargz-chunk-size", "100000"],
    );
    stage.pull(&read);
    let (root, address) = (stage.lazuli().root(), lazuli::address_in(&stage.sandbox));
    let view = stage.containerd.view(&read, SNAPSHOTTER);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let client = runtime.block_on(client(address));
    for at in 0..count {
        let request = PrepareSnapshotRequest {
            key: format!("default/{at}/removed"),
            ..PrepareSnapshotRequest::default()
        };
        let answer = runtime.block_on(client.clone().prepare(request)).unwrap();
        let options = &answer.into_inner().mounts[0];
        let own = match options.source.as_str() {
            source if source.starts_with('/') => PathBuf::from(source),
            other => panic!("{other} is no bind mount"),
        };
        for file in 0..files {
            fs::write(own.join(file.to_string()), "").unwrap();
        }
    }
    let kept = PrepareSnapshotRequest {
        key: "default/0/kept".to_owned(),
        ..PrepareSnapshotRequest::default()
    };
    runtime.block_on(client.clone().prepare(kept)).unwrap();

    let removed: Vec<_> = (0..count)
        .map(|at| {
            let mut client = client.clone();
            runtime.spawn(async move {
                let key = format!("default/{at}/removed");
                let request = RemoveSnapshotRequest {
                    key,
                    ..RemoveSnapshotRequest::default()
                };
                client.remove(request).await.unwrap();
            })
        })
        .collect();
    let trash = || fs::read_dir(root.join("trash")).unwrap().count();
    let mut times = read_cold(&view.path, |reads| {
        let begun = Instant::now();
        let request = StatSnapshotRequest {
            key: "default/0/kept".to_owned(),
            ..StatSnapshotRequest::default()
        };
        runtime.block_on(client.clone().stat(request)).unwrap();
        let taken = begun.elapsed();
        assert!(taken < BOUND, "a Stat took {taken:?}");
        let done = removed.iter().all(tokio::task::JoinHandle::is_finished) && trash() == 0;
        reads >= 5 && done
    });
    let slowest = times.iter().max().copied().unwrap();
    assert!(slowest < BOUND, "a cold read took {slowest:?} ({:?})", p99(&mut times));
    for remove in removed {
        runtime.block_on(remove).unwrap();
    }
    // What was removed is gone when a cleanup says so; it gives up after a while, and containerd comes again.
    let cleaned = (0..20).any(|_| {
        runtime
            .block_on(client.clone().cleanup(CleanupRequest::default()))
            .unwrap();
        trash() == 0
    });
    assert!(cleaned, "{} directories are left", trash());
    assert_eq!(fs::read_dir(root.join("snapshots")).unwrap().count(), LAYERS + 2);
}

#[test]
fn a_mass_removal_holds_nobody_up() {
    remove_many(100, 500);
}

/// As large as it gets.
#[test]
#[ignore = "it makes two million files"]
fn a_removal_of_two_million_files_holds_nobody_up() {
    remove_many(1000, 2000);
}
