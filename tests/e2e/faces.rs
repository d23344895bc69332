//! What containers are made on: mounts that come and go with them, merged layers, files of the cache; and what is there after a restart.
//!
//! Where the kernel cannot do the image face, or the tree is forced, these tests have nothing to look at and say so.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::stage::{Stage, subject};
use crate::support::containerd::{Generation, REFERENCE};
use crate::support::image::{Compression, Flavour, Image, Layer, ordinary};
use crate::support::lazuli::{self, Lazuli};
use crate::support::sandbox::{PATIENCE, run, run_ok, wait_until};
use crate::support::tar::{Entry, noise};
use crate::support::tree::{Options, compare};

/// Whether the image face serves in this daemon.
fn is_image(stage: &Stage) -> bool {
    let Some(lazuli) = &stage.lazuli else { return false };
    let status = lazuli.status();
    let image = status["face"]["face"] == "image";
    if !image {
        eprintln!(
            "nothing to look at: the tree face serves ({})",
            status["face"]["reason"]
        );
    }
    image
}

/// Ends of the names of EROFS mounts of this daemon: `7.file`, `9.image`; sorted.
pub fn mounted(lazuli: &Lazuli) -> Vec<String> {
    let faces = lazuli.root().join("faces");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let of_daemon = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ');
        let (target, kind) = (words.nth(1)?, words.next()?);
        let name = Path::new(target).strip_prefix(&faces).ok()?;
        (kind == "erofs").then(|| name.display().to_string())
    });
    let mut names: Vec<String> = of_daemon.collect();
    names.sort();
    names
}

pub fn of_kind(lazuli: &Lazuli, kind: &str) -> usize {
    mounted(lazuli).iter().filter(|name| name.ends_with(kind)).count()
}

/// Waits until the daemon says something.
fn until(lazuli: &Lazuli, what: &str, check: impl Fn(&Value) -> bool) -> Value {
    let found = wait_until(PATIENCE, || Some(lazuli.status()).filter(|status| check(status)));
    found.unwrap_or_else(|| panic!("{what}: {:#}", lazuli.status()))
}

fn until_merged(lazuli: &Lazuli) {
    until(lazuli, "layers are merged", |status| {
        status["chains"]
            .as_array()
            .is_some_and(|chains| chains.iter().any(|chain| chain["state"] == "stored"))
    });
}

fn until_unmounted(lazuli: &Lazuli) {
    let unmounted = wait_until(PATIENCE, || mounted(lazuli).is_empty().then_some(()));
    assert!(unmounted.is_some(), "still mounted: {:?}", mounted(lazuli));
}

/// Has containerd remove snapshots that are marked as removed: it does that when an image goes.
fn collect_garbage(stage: &Stage, reference: &str) {
    stage
        .containerd
        .ctr_ok(&["images", "tag", reference, "example.invalid/other:1"]);
    stage.containerd.remove_image("example.invalid/other:1");
}

/// Lower directories of the mount at `path`, if it is an overlay; a bind mount of one directory counts as one.
fn lowers(stage: &Stage, reference: &str) -> usize {
    let chain_ids = stage.containerd.chain_ids(reference);
    let key = stage.containerd.new_id();
    let snapshots = ["snapshots", "--snapshotter", lazuli::SNAPSHOTTER];
    let prepare = [
        &snapshots[..],
        &["prepare", "--mounts", &key, chain_ids.last().unwrap()],
    ]
    .concat();
    let text = stage.containerd.ctr_ok(&prepare).text();
    stage.containerd.ctr_ok(&[&snapshots[..], &["rm", &key]].concat());
    text.matches("/snapshots/").count() - text.matches("upperdir=").count() - text.matches("workdir=").count()
}

/// A pull mounts nothing; a container mounts its layers, merged, from their files; and its end unmounts them.
#[test]
fn mounts_come_and_go_with_containers() {
    let stage = Stage::new("mounts_come_and_go_with_containers", Generation::One);
    let image = ordinary(Flavour::Oci, Compression::Gzip);
    assert!(image.layers.len() > 1);
    let reference = stage.push(&image, "faces/one:1");
    stage.pull(&reference);
    if !is_image(&stage) {
        return;
    }
    let lazuli = stage.lazuli.as_ref().unwrap();
    until_merged(lazuli);
    assert_eq!(mounted(lazuli), [] as [String; 0], "nobody needs a mount yet");

    let view = stage.containerd.view(&reference, &subject());
    // Streamed layers are complete: no FUSE in between.
    assert_eq!(mounted(lazuli).len(), 1, "{:?}", mounted(lazuli));
    assert_eq!(of_kind(lazuli, ".file"), 1, "{:?}", mounted(lazuli));
    let status = lazuli.status();
    assert!(status["cache_held_bytes"].as_u64().unwrap() > 10_000_000, "{status:#}");
    assert_eq!(status["chains"][0]["face"], "file");
    assert_eq!(status["chains"][0]["mounted"], true);
    assert!(status["chains"][0]["bytes"].as_u64().unwrap() > 0, "{status:#}");
    let text = run(&mut lazuli.command("status", &[]), PATIENCE)
        .expect_success()
        .text();
    assert!(text.contains("image face") && text.contains("file, mounted"), "{text}");
    stage.containerd.pull(&reference, REFERENCE).expect_success();
    let reference_view = stage.containerd.view(&reference, REFERENCE);
    compare(&reference_view.path, &view.path, &Options::default()).expect_equal();
    assert_eq!(lowers(&stage, &reference), 1);
    drop(view);
    collect_garbage(&stage, &reference);
    until_unmounted(lazuli);
    assert_eq!(lazuli.status()["cache_held_bytes"], 0);
    // The chain goes with its layers.
    stage.containerd.remove_image(&reference);
    let faces = lazuli.root().join("faces");
    let gone = || {
        fs::read_dir(&faces)
            .unwrap()
            .all(|entry| !entry.unwrap().path().ends_with(".chain"))
            .then_some(())
    };
    wait_until(PATIENCE, gone).expect("the image of the chain is still stored");
}

/// Without the image of the chain, layers are stacked, and nobody waits; the next container has it. Also after `kill -9`.
#[test]
fn a_container_before_its_chain_and_one_after() {
    let mut stage = Stage::new("a_container_before_its_chain_and_one_after", Generation::One);
    let image = ordinary(Flavour::Oci, Compression::Zstd);
    let layers = image.layers.len();
    let reference = stage.push(&image, "faces/two:1");
    stage.pull(&reference);
    if !is_image(&stage) {
        return;
    }
    until_merged(stage.lazuli());
    let held = stage.containerd.view(&reference, &subject());
    assert_eq!(of_kind(stage.lazuli.as_ref().unwrap(), ".file"), 1);
    drop(held);
    let before = stage.sh(&reference, "find / -xdev -type f -exec sha256sum {} + | sort");

    let root = stage.lazuli().root();
    stage.lazuli().kill();
    for entry in fs::read_dir(root.join("faces")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "chain") {
            fs::remove_file(path).unwrap();
        }
    }
    stage.registry.stop();
    stage.restart_daemon();
    let lazuli = stage.lazuli.as_ref().unwrap();
    assert_eq!(of_kind(lazuli, ".image"), 0, "mounts over the dead session are gone");
    assert_eq!(lowers(&stage, &reference), layers, "stacked");
    until_merged(lazuli);
    let merged = wait_until(PATIENCE, || (lowers(&stage, &reference) == 1).then_some(()));
    assert!(merged.is_some(), "{:#}", lazuli.status());
    assert_eq!(
        stage.sh(&reference, "find / -xdev -type f -exec sha256sum {} + | sort"),
        before
    );
    // What the dead daemon left in the cache is verified, and then mounted from its files again.
    let again = wait_until(PATIENCE, || {
        let _view = stage.containerd.view(&reference, &subject());
        (of_kind(lazuli, ".file") > 0).then_some(())
    });
    assert!(again.is_some(), "{:?} {:#}", mounted(lazuli), lazuli.status());
}

/// A container on files of the cache outlives the daemon.
#[test]
fn a_complete_image_needs_no_daemon() {
    let mut stage = Stage::new("a_complete_image_needs_no_daemon", Generation::One);
    let reference = stage.push(&ordinary(Flavour::Oci, Compression::Gzip), "faces/three:1");
    stage.pull(&reference);
    if !is_image(&stage) {
        return;
    }
    until_merged(stage.lazuli());
    let id = stage.containerd.start_container(&reference, &subject());
    let sums = "find /app /bin -type f -exec sha256sum {} + | sort";
    let before = stage.containerd.exec(&id, sums).expect_success().text();
    stage.lazuli().kill();
    run_ok(Command::new("sh").args(["-c", "echo 3 > /proc/sys/vm/drop_caches"]));
    assert_eq!(stage.containerd.exec(&id, sums).expect_success().text(), before);
    stage.restart_daemon();
    assert_eq!(stage.containerd.exec(&id, sums).expect_success().text(), before);
    assert_eq!(stage.sh(&reference, sums), before, "a new one");
    stage.containerd.remove_container(&id);
    // A collection that came while containerd did not find the daemon is not made up for by itself.
    collect_garbage(&stage, &reference);
    until_unmounted(stage.lazuli.as_ref().unwrap());
}

/// Images that together do not fit into the budget: what is mounted stays, and what finds no room is served all the same.
#[test]
fn what_is_mounted_stays_under_pressure() {
    const LENGTH: usize = 6_000_000;
    let config = "[cache]\nmax_size = \"10MiB\"\nmin_free = 0\nhigh_percent = 100\n";
    let stage = Stage::with("what_is_mounted_stays_under_pressure", Generation::One, config, |_| {});
    if !is_image(&stage) {
        return;
    }
    let image = |number: u64| {
        let base = Layer::of(Compression::Gzip, [Entry::dir("data")]);
        let files = [Entry::dir("data"), Entry::file("data/file", noise(number, LENGTH))];
        Image::new(Flavour::Oci, vec![base, Layer::of(Compression::Gzip, files)])
    };
    let first = stage.push(&image(1), "faces/pressed:1");
    stage.pull(&first);
    let view = stage.containerd.view(&first, &subject());
    let lazuli = stage.lazuli.as_ref().unwrap();
    assert!(of_kind(lazuli, ".file") > 0, "{:?}", mounted(lazuli));
    // There is no room to stream the second one beside it: containerd unpacks it.
    let second = stage.push(&image(2), "faces/pressed:2");
    stage.pull(&second);
    let other = stage.containerd.view(&second, &subject());
    run_ok(Command::new("sh").args(["-c", "echo 3 > /proc/sys/vm/drop_caches"]));
    assert!(fs::read(view.path.join("data/file")).unwrap() == noise(1, LENGTH));
    assert!(fs::read(other.path.join("data/file")).unwrap() == noise(2, LENGTH));
    let status = lazuli.status();
    assert!(
        status["cache_held_bytes"].as_u64().unwrap() >= LENGTH as u64,
        "{status:#}"
    );
    assert!(status["cache_bytes"].as_u64().unwrap() <= 10 << 20, "{status:#}");
    assert!(
        lazuli.log().contains("the cache's budget cannot be met"),
        "nobody is told"
    );
    drop((view, other));
    collect_garbage(&stage, &first);
    until_unmounted(lazuli);
}

/// A root directory on an overlay, as in containers: EROFS takes no metadata from there.
#[test]
fn a_root_directory_on_an_overlay() {
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    let overlay = |sandbox: &crate::support::sandbox::Sandbox| {
        let [lower, upper, work] = ["o/lower", "o/upper", "o/work"].map(|name| sandbox.dir(name).display().to_string());
        let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "overlay", "overlay", "-o", &options])
            .arg(sandbox.dir("lazuli"));
        run_ok(&mut mount);
    };
    let stage = Stage::with("a_root_directory_on_an_overlay", Generation::One, "", overlay);
    let reference = stage.push(&ordinary(Flavour::Oci, Compression::Gzip), "faces/overlay:1");
    stage.pull(&reference);
    let lazuli = stage.lazuli.as_ref().unwrap();
    stage.containerd.pull(&reference, REFERENCE).expect_success();
    let reference_view = stage.containerd.view(&reference, REFERENCE);
    // The upper directory of a container could not be there either: a view.
    let view = stage.containerd.view(&reference, &subject());
    compare(&reference_view.path, &view.path, &Options::default()).expect_equal();
    if is_image(&stage) {
        let status = lazuli.status();
        assert_eq!(status["face"]["metadata_through_fuse"], true, "{status:#}");
        assert!(!mounted(lazuli).is_empty());
    }
}
