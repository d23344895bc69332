//! A disk that cannot read an index any more, under a running container: the worker that has the index mapped dies of it (SIGBUS), and the next one
//! finds out before it maps anything, takes the layer for damaged, and loads it anew, while readers wait.

#[allow(dead_code)]
#[path = "../support/device.rs"]
mod device;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use device::Device;

use crate::stage::{Stage, subject};
use crate::support::containerd::Generation;
use crate::support::image::{Compression, Flavour, Image, Layer};
use crate::support::lazuli::SNAPSHOTTER;
use crate::support::sandbox::{COMMAND_TIMEOUT, PATIENCE, Sandbox, run, run_ok, wait_until};
use crate::support::tar::{Entry, noise};

/// MiB of the disk.
const SIZE: usize = 128;
/// Files of the layer, each of which is a chunk: so many that the index is mapped, instead of being in memory.
const FILES: usize = 2000;
/// Bytes of a file.
const LENGTH: usize = 6000;
/// Pages that were touched are given back after this time.
const RELEASED: Duration = Duration::from_secs(12);

fn image() -> Image {
    let files = (0..FILES).map(|file| Entry::file(format!("data/{file}"), noise(file as u64 + 1, LENGTH)));
    let layer = Layer::of(Compression::Gzip, [Entry::dir("data")].into_iter().chain(files));
    Image::new(Flavour::Oci, vec![layer])
}

/// Puts the root directory of the daemon on another disk.
fn on_device(sandbox: &Sandbox, device: &Device) {
    let root = sandbox.dir("lazuli");
    run_ok(Command::new("mount").arg("--bind").arg(device.root()).arg(root));
}

fn reads(root: &Path, file: usize) {
    let read = run(
        Command::new("cat").arg(root.join(format!("data/{file}"))),
        COMMAND_TIMEOUT,
    );
    assert!(
        read.success() && read.stdout == noise(file as u64 + 1, LENGTH),
        "{file}: {}",
        read.describe()
    );
}

/// The index of the layer with many files.
fn index(root: &Path) -> PathBuf {
    let layers = fs::read_dir(root.join("layers")).unwrap();
    let indexes = layers.map(|layer| layer.unwrap().path().join("index"));
    let size = |path: &PathBuf| fs::metadata(path).map_or(0, |metadata| metadata.len());
    indexes.max_by_key(size).unwrap()
}

#[test]
fn an_index_that_the_disk_cannot_read_is_loaded_anew() {
    if subject() != SNAPSHOTTER {
        return;
    }
    // Ends after everything that is on it.
    let device = Device::new(SIZE);
    let name = "an_index_that_the_disk_cannot_read_is_loaded_anew";
    let stage = Stage::with(name, Generation::One, "", |sandbox| on_device(sandbox, &device));
    let reference = stage.push_converted(&image(), "demo/bad:1", &["--estargz"]);
    stage.pull(&reference);
    let view = stage.containerd.view(&reference, SNAPSHOTTER);
    reads(&view.path, 0);
    let lazuli = stage.lazuli.as_ref().unwrap();
    let (root, worker) = (lazuli.root(), lazuli.worker().unwrap());
    let index = index(&root);
    assert!(fs::metadata(&index).unwrap().len() > 64 << 10, "{}", index.display());
    std::thread::sleep(RELEASED);
    assert!(device.lose(&index) > 0);
    let lost = || {
        device.forget_pages(&index);
        fs::read(&index).is_err().then_some(())
    };
    wait_until(PATIENCE, lost).expect("the kernel keeps the index in memory");
    // The last file is far from what was read ahead; its reader meets the death of the worker.
    reads(&view.path, FILES - 1);
    let next = wait_until(PATIENCE, || lazuli.worker().filter(|next| *next != worker));
    assert!(next.is_some(), "the worker did not touch what cannot be read");
    for file in (0..FILES).step_by(100) {
        reads(&view.path, file);
    }
    let log = lazuli.log();
    assert!(log.contains("its index cannot be used"), "it says what is wrong");
    assert!(log.contains("requests waited for this layer"), "readers waited");
    assert_eq!(lazuli.worker(), next, "no worker after the next one dies");
    assert!(
        fs::read(&index).is_ok(),
        "the layer has an index again, on the same disk"
    );
    drop(view);
}
