//! A full disk: what images that were removed have left behind gives way. And a root directory on another file system than usual.

use std::fs::{self, File};
use std::process::Command;

use crate::stage::{Stage, subject};
use crate::support::containerd::Generation;
use crate::support::image::{Compression, Flavour, Image, Layer};
use crate::support::lazuli;
use crate::support::sandbox::{PATIENCE, run_ok, wait_until};
use crate::support::skip::{Ability, skipped};
use crate::support::tar::{Entry, noise};

/// Any disk is fuller than this mark. What a container uses stays; what a removed image had, which is still live since its pull was just
/// now, gives way, and comes back with another pull.
#[test]
fn removed_images_give_way() {
    const LENGTH: usize = 3_000_000;
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    let config = "[cache]\nmin_free = 0\nhigh_percent = 2\nlow_percent = 1\n";
    let stage = Stage::with("removed_images_give_way", Generation::One, config, |_| {});
    let lazuli = stage.lazuli.as_ref().unwrap();
    let image = |seed: u64| {
        let files = [Entry::dir("data"), Entry::file("data/file", noise(seed, LENGTH))];
        let base = Layer::of(Compression::Gzip, [Entry::dir("data")]);
        Image::new(Flavour::Oci, vec![base, Layer::of(Compression::Gzip, files)])
    };
    let [used, removed] = [1, 2].map(|seed| (image(seed), stage.push(&image(seed), &format!("disk/image:{seed}"))));
    stage.pull(&used.1);
    stage.pull(&removed.1);
    let present = |image: &Image| {
        let status = lazuli.status();
        let mut layers = status["layers"].as_array().unwrap().iter();
        let digest = &image.layers[1].blob.digest;
        layers
            .find(|live| live["digest"] == **digest)
            .map_or(0, |live| live["present_bytes"].as_u64().unwrap())
    };
    let cached = || lazuli.status()["cache_bytes"].as_u64().unwrap();
    assert!(present(&used.0) >= LENGTH as u64 && present(&removed.0) >= LENGTH as u64);
    let before = cached();
    stage.containerd.remove_image(&removed.1);
    wait_until(3 * PATIENCE, || (present(&removed.0) == 0).then_some(()))
        .unwrap_or_else(|| panic!("its bytes are kept: {:#}", lazuli.status()));
    assert!(present(&used.0) >= LENGTH as u64, "a snapshot refers to it");
    assert!(cached() <= before - LENGTH as u64 / 2, "{} of {before}", cached());
    stage.pull(&removed.1);
    let view = stage.containerd.view(&removed.1, &subject());
    assert!(fs::read(view.path.join("data/file")).unwrap() == noise(2, LENGTH));
}

/// A disk above its mark, and a daemon that ends and starts again in order: nothing of what snapshots refer to is gone, or a node whose registry
/// is away would have no containers any more.
#[test]
fn an_orderly_end_empties_nothing() {
    const LENGTH: usize = 1_000_000;
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    let config = "[cache]\nmin_free = 0\nhigh_percent = 2\nlow_percent = 1\n";
    let mut stage = Stage::with("an_orderly_end_empties_nothing", Generation::One, config, |_| {});
    let layers = (1..=8).map(|seed| {
        let files = [
            Entry::dir("data"),
            Entry::file(format!("data/{seed}"), noise(seed, LENGTH)),
        ];
        Layer::of(Compression::Gzip, files)
    });
    let image = Image::new(Flavour::Oci, layers.collect());
    let reference = stage.push(&image, "disk/kept:1");
    stage.pull(&reference);
    stage.proxy.take();
    for _ in 0..3 {
        assert!(stage.lazuli().stop());
        stage.restart_daemon();
    }
    let view = stage.containerd.view(&reference, &subject());
    for seed in 1..=8 {
        assert!(fs::read(view.path.join(format!("data/{seed}"))).unwrap() == noise(seed, LENGTH));
    }
    assert!(stage.blob_requests().is_empty(), "fetched again");
}

/// MiB of the file system: xfs is not made much smaller.
const XFS_SIZE: u64 = 512;

/// The root directory on xfs: layers come, are read, and survive a kill.
#[test]
fn a_root_on_xfs_serves_as_any_other() {
    const LENGTH: usize = 6_000_000;
    let name = "a_root_on_xfs_serves_as_any_other";
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    if Command::new("mkfs.xfs").arg("-V").output().is_err() {
        skipped(Ability::Xfs, "there is no mkfs.xfs");
        return;
    }
    // By default more than this disk has is left free, and nothing would be kept.
    let config = "[cache]\nmin_free = 0\nhigh_percent = 100\n";
    let mut stage = Stage::with(name, Generation::One, config, |sandbox| {
        let (image, dir) = (sandbox.path("xfs"), sandbox.dir("lazuli"));
        File::create(&image).unwrap().set_len(XFS_SIZE << 20).unwrap();
        run_ok(Command::new("mkfs.xfs").arg("-q").arg(&image));
        run_ok(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&dir));
    });
    let layer = |seed| {
        let file = Entry::file(format!("data/{seed}"), noise(seed, LENGTH));
        Layer::of(Compression::Gzip, [Entry::dir("data"), file])
    };
    let image = Image::new(Flavour::Oci, vec![layer(1), layer(2)]);
    let plain = stage.push(&image, "xfs/plain:1");
    let lazy = stage.push_converted(&image, "xfs/lazy:1", &["--estargz"]);
    for reference in [&plain, &lazy] {
        stage.pull(reference);
        let view = stage.containerd.view(reference, &subject());
        for seed in [1, 2] {
            assert!(fs::read(view.path.join(format!("data/{seed}"))).unwrap() == noise(seed, LENGTH));
        }
    }
    stage.lazuli().kill();
    stage.restart_daemon();
    stage.proxy.take();
    for reference in [&plain, &lazy] {
        let view = stage.containerd.view(reference, &subject());
        for seed in [1, 2] {
            assert!(fs::read(view.path.join(format!("data/{seed}"))).unwrap() == noise(seed, LENGTH));
        }
        drop(view);
        stage.containerd.remove_image(reference);
    }
    assert!(stage.blob_requests().is_empty(), "fetched again");
}
