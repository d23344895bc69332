//! A registry that fails: reads succeed where they can, fail with EIO and a log line where they cannot, and wrong bytes reach nobody.

use std::process::Command;
use std::time::Duration;

use crate::stage::{Stage, subject};
use crate::support::containerd::{Containerd, Generation};
use crate::support::fault_registry::{Auth, Fault, FaultRegistry, On};
use crate::support::image::{Compression, Flavour, Image, Layer, ordinary};
use crate::support::lazuli::{self, Lazuli, SNAPSHOTTER};
use crate::support::sandbox::{Finished, Sandbox, run, wait_until};
use crate::support::tar::{Entry, noise};

/// Bytes of each file of the image: more than what is read of the end of a layer to find its index.
const LENGTH: usize = 1_500_000;
/// Bytes of a chunk of the image, as an option of the converter.
const CHUNK: &str = "100000";
/// Files of the image. Each is in a layer of its own, so that the read-ahead of one does not fetch another.
const FILES: usize = 12;
/// More faults than any number of retries.
pub const ALWAYS: usize = 1_000_000;
/// The daemon's idle timeout and read deadline, and with them every test's, are short.
const CONFIG: &str = "attempts = 4\nidle_timeout = 2\n[fetch]\nread_deadline = 12\n";
/// Longest wait for a read that must end: the read deadline, and some.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

fn content(index: usize) -> Vec<u8> {
    noise(1_000 + index as u64, LENGTH)
}

fn path(index: usize) -> String {
    format!("data/d{index}/file")
}

/// The image: layers of one file that does not compress.
fn image() -> Image {
    let layer = |index| {
        let dir = Entry::dir(format!("data/d{index}"));
        Layer::of(
            Compression::Gzip,
            [Entry::dir("data"), dir, Entry::file(path(index), content(index))],
        )
    };
    Image::new(Flavour::Oci, (0..FILES).map(layer).collect())
}

/// A failing registry with an image, a containerd, and a daemon that knows them.
pub struct Failing {
    pub containerd: Containerd,
    pub lazuli: Lazuli,
    pub registry: FaultRegistry,
    /// Where the registry runs.
    _runtime: tokio::runtime::Runtime,
}

impl Failing {
    fn new(name: &str, image: &Image, auth: Auth) -> Self {
        Self::with(name, image, auth, CONFIG)
    }

    /// With this configuration: keys of `[registry]`, and whole tables.
    pub fn with(name: &str, image: &Image, auth: Auth, config: &str) -> Self {
        let sandbox = Sandbox::new(name);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let registry = runtime.block_on(FaultRegistry::start());
        for blob in image.blobs() {
            registry.add_blob(blob.bytes.as_slice().to_vec());
        }
        let manifest = registry.add_manifest(image.media_type, image.manifest.bytes.as_slice().to_vec());
        registry.tag("demo/app", "1", manifest);
        let mut config = config.to_owned();
        if let Auth::Basic(user, password) | Auth::Token(user, password) = &auth {
            config.push_str(&format!(
                "[registry.credentials.\"{}\"]\nusername = {user:?}\npassword = {password:?}\n",
                registry.host()
            ));
        }
        registry.set_auth(auth);
        let containerd = Containerd::start(&sandbox, Generation::One, &lazuli::address_in(&sandbox));
        let lazuli = Lazuli::start(&sandbox, &containerd.address, &[registry.host()], &config);
        Failing {
            containerd,
            lazuli,
            registry,
            _runtime: runtime,
        }
    }

    /// What its image is called.
    pub fn reference(&self) -> String {
        format!("{}/demo/app:1", self.registry.host())
    }

    /// Reads a file of the mounted image by another process, for a read that hangs must not hang the test.
    fn read(&self, root: &std::path::Path, index: usize) -> Finished {
        run(Command::new("cat").arg(root.join(path(index))), READ_TIMEOUT)
    }

    /// Blob requests so far.
    fn requests(&self) -> usize {
        self.registry.seen(On::Blob).len() + self.registry.seen(On::Cdn).len()
    }
}

/// The image as eStargz, made with a registry that works.
fn lazy_image() -> Image {
    let stage = Stage::new("faults: conversion", Generation::One);
    stage.converted(&image(), &["--estargz", "--estargz-chunk-size", CHUNK])
}

#[test]
fn lazy_reads_survive_passing_faults() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let stage = Failing::new("lazy_reads_survive_passing_faults", &lazy_image(), Auth::None);
    let reference = stage.reference();
    stage.lazuli.pull(&reference).expect_success();
    let view = stage.containerd.view(&reference, SNAPSHOTTER);
    let faults: [(usize, Fault); FILES] = [
        (2, Fault::Status(500)),
        (1, Fault::Status(503)),
        (1, Fault::RetryAfter(429, "1".to_owned())),
        (1, Fault::Unauthorized),
        (3, Fault::Cut(1_000)),
        (1, Fault::Short(20_000)),
        (1, Fault::Long(5_000)),
        (1, Fault::ContentRange("bytes 0-9/10".to_owned())),
        (1, Fault::NoContentRange),
        (1, Fault::Stall(1_000)),
        (1, Fault::Corrupt(LENGTH / 2)),
        // The last one, as it brings the whole layer.
        (1, Fault::IgnoreRange),
    ];
    for (index, (times, fault)) in faults.into_iter().enumerate() {
        let before = stage.requests();
        stage.registry.fail(On::Blob, times, fault.clone());
        let read = stage.read(&view.path, index);
        assert!(read.success(), "{fault:?}: {}", read.stderr);
        assert!(read.stdout == content(index), "{fault:?}: wrong bytes");
        assert!(stage.requests() > before, "{fault:?}: the read asked nobody");
        stage.registry.heal();
    }
}

#[test]
fn reads_that_cannot_succeed_fail_and_recover() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let stage = Failing::new("reads_that_cannot_succeed_fail_and_recover", &lazy_image(), Auth::None);
    let reference = stage.reference();
    stage.lazuli.pull(&reference).expect_success();
    let view = stage.containerd.view(&reference, SNAPSHOTTER);
    let faults = [
        Fault::Status(500),
        Fault::Status(404),
        Fault::Stall(100),
        Fault::Corrupt(LENGTH / 2),
    ];
    for (index, fault) in faults.into_iter().enumerate() {
        let log = stage.lazuli.log().len();
        stage.registry.fail(On::Blob, ALWAYS, fault.clone());
        let read = stage.read(&view.path, index);
        stage.registry.heal();
        assert!(read.status.is_some(), "{fault:?}: the read was never answered");
        assert!(!read.success(), "{fault:?}: the read met no fault");
        assert!(read.stderr.contains("Input/output error"), "{fault:?}: {}", read.stderr);
        assert!(
            content(index).starts_with(&read.stdout),
            "{fault:?}: wrong bytes before the error"
        );
        let said = stage.lazuli.log()[log..].lines().any(|line| {
            let level = line.contains("WARN") || line.contains("ERROR");
            level && line.contains("sha256:")
        });
        assert!(said, "{fault:?}: no log line names the layer");
        let again = wait_until(READ_TIMEOUT, || {
            let read = stage.read(&view.path, index);
            read.success().then_some(read.stdout)
        });
        assert!(
            again.as_ref() == Some(&content(index)),
            "{fault:?}: it does not recover"
        );
    }
}

/// Tokens end while an image is in use.
#[test]
fn tokens_are_renewed() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let auth = Auth::Token("someone".to_owned(), "s3cret-word".to_owned());
    let stage = Failing::new("tokens_are_renewed", &lazy_image(), auth);
    let reference = stage.reference();
    stage.lazuli.pull(&reference).expect_success();
    let view = stage.containerd.view(&reference, SNAPSHOTTER);
    for index in 0..6 {
        stage.registry.expire_tokens();
        stage.registry.set_redirects(index % 2 == 1, None);
        stage.registry.expire_redirects();
        let read = stage.read(&view.path, index);
        assert!(read.success() && read.stdout == content(index), "{}", read.stderr);
    }
    let log = stage.lazuli.log();
    assert!(
        !log.contains("s3cret-word") && !log.contains("token-"),
        "credentials are in the log"
    );
}

/// Plain layers are streamed while they are pulled: passing faults are passed over, lasting ones fail the pull and leave nothing.
#[test]
fn pulls_survive_passing_faults_and_report_lasting_ones() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let image = ordinary(Flavour::Oci, Compression::Gzip);
    let stage = Failing::new(
        "pulls_survive_passing_faults_and_report_lasting_ones",
        &image,
        Auth::AnonymousToken,
    );
    let reference = stage.reference();
    // The config is the first blob, and the layers follow; so each fault meets one of them.
    stage.registry.fail(On::Blob, ALWAYS, Fault::Corrupt(100_000));
    let pull = stage.lazuli.pull(&reference);
    if pull.success() {
        // containerd downloads what Lazuli cannot, and finds the same.
        panic!("a pull of corrupt layers succeeded: {}", pull.describe());
    }
    assert!(
        pull.stderr.contains("sha256:"),
        "the error names no layer: {}",
        pull.describe()
    );
    assert_eq!(stage.containerd.images(), [""; 0]);
    stage.registry.heal();

    for fault in [
        Fault::Status(500),
        Fault::RetryAfter(429, "1".to_owned()),
        Fault::Unauthorized,
        Fault::Cut(30_000),
        Fault::Cut(700_000),
        Fault::Stall(100_000),
    ] {
        stage.registry.fail(On::Blob, 1, fault);
    }
    let pulled = wait_until(2 * READ_TIMEOUT, || {
        let pull = stage.lazuli.pull(&reference);
        pull.success().then_some(pull)
    });
    assert!(pulled.is_some(), "{}", stage.lazuli.log());
    let lines = stage.containerd.sh(
        &reference,
        SNAPSHOTTER,
        "cat /app/data/*.bin | sha256sum; ls /app/lib/p7 | wc -l",
    );
    let mut expected = Vec::new();
    for length in [70_000, 9_000_001, 1_500_000, 70_000] {
        expected.extend(noise(length as u64, length));
    }
    let digest = crate::support::image::digest_of(&expected);
    assert_eq!(lines, format!("{}  -\n40\n", digest.trim_start_matches("sha256:")));
}
