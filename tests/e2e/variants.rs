//! Layers that look different on their parents ([`trees`](crate::trees) compares how): what becomes of them at a restart and after
//! their image.

use std::fs;

use crate::stage::{Stage, subject};
use crate::support::containerd::{Generation, REFERENCE};
use crate::support::lazuli::{self, SNAPSHOTTER};
use crate::support::sandbox::{PATIENCE, run, wait_until};
use crate::support::torture;
use crate::support::tree::{Options, compare};

fn files(stage: &mut Stage) -> usize {
    fs::read_dir(stage.lazuli().root().join("variants")).unwrap().count()
}

/// Kills the daemon and starts it again; containerd pauses between attempts to connect to it, and fails all calls meanwhile.
fn restart(stage: &mut Stage) {
    stage.lazuli().kill();
    stage.lazuli().restart();
    let probe = stage.containerd.new_id();
    let snapshots = ["snapshots", "--snapshotter", SNAPSHOTTER];
    let mut prepare = stage.containerd.ctr(&[&snapshots[..], &["prepare", &probe]].concat());
    wait_until(PATIENCE, || run(&mut prepare, PATIENCE).success().then_some(()))
        .expect("the daemon is not found again");
    stage.containerd.ctr_ok(&[&snapshots[..], &["rm", &probe]].concat());
}

/// What follows from other things is made again, without the network.
#[test]
fn a_variant_whose_file_is_lost_is_made_again() {
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    let mut stage = Stage::new("a_variant_whose_file_is_lost_is_made_again", Generation::One);
    let case = torture::implied();
    let options = Options {
        implied_dirs: case.implied_dirs.clone(),
        ..Options::default()
    };
    let reference = stage.push(&case.image, "variants/lost:1");
    stage.compare(&reference, &options).expect_equal();
    stage.registry.stop();
    let directory = stage.lazuli().root().join("variants");
    let lose: [fn(&std::path::Path); 3] = [
        |file| fs::remove_file(file).unwrap(),
        |file| fs::write(file, "").unwrap(),
        |file| fs::write(file, "no index").unwrap(),
    ];
    for lose in lose {
        let file = fs::read_dir(&directory).unwrap().next().unwrap().unwrap().path();
        let before = fs::read(&file).unwrap();
        lose(&file);
        restart(&mut stage);
        assert!(fs::read(&file).unwrap() == before, "it is what it was");
        let expected = stage.containerd.view(&reference, REFERENCE);
        let found = stage.containerd.view(&reference, SNAPSHOTTER);
        compare(&expected.path, &found.path, &options).expect_equal();
    }
    assert!(
        stage
            .lazuli()
            .log()
            .contains("its file cannot be used, and is made again")
    );
}

#[test]
fn variants_live_as_long_as_their_snapshots() {
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    let mut stage = Stage::new("variants", Generation::One);
    let case = torture::implied();
    let options = Options {
        implied_dirs: case.implied_dirs.clone(),
        ..Options::default()
    };
    let reference = stage.push(&case.image, "variants/implied:1");
    stage.compare(&reference, &options).expect_equal();
    assert_eq!(files(&mut stage), 1, "the upper layer alone has one");
    let status = stage.lazuli().status();
    let manifest = stage.containerd.manifest(&reference);
    let digests = |layers: &serde_json::Value| {
        let mut digests: Vec<_> = layers.as_array().unwrap().iter().map(|l| l["digest"].clone()).collect();
        digests.sort_by_key(ToString::to_string);
        digests
    };
    assert_eq!(digests(&status["layers"]), digests(&manifest["layers"]), "{status}");
    let of_image = status["images"][0]["layers"].as_array().unwrap();
    assert!(of_image.iter().all(|layer| layer["live"] == true), "{status}");

    // A file that a crash left behind goes, the others come back without the network.
    fs::write(stage.lazuli().root().join("variants/.tmp"), "cut off").unwrap();
    stage.registry.stop();
    stage.proxy.take();
    restart(&mut stage);
    assert_eq!(files(&mut stage), 1);
    let expected = stage.containerd.view(&reference, REFERENCE);
    let found = stage.containerd.view(&reference, SNAPSHOTTER);
    compare(&expected.path, &found.path, &options).expect_equal();
    assert_eq!(stage.proxy.take().len(), 0, "it asked the network for what it had");
    drop((expected, found));

    stage.containerd.remove_image(&reference);
    assert_eq!(stage.containerd.snapshots(SNAPSHOTTER), [""; 0]);
    restart(&mut stage);
    assert_eq!(files(&mut stage), 0, "nobody needs it");
}
