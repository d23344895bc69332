//! Pulling and running: by `lazuli pull` on containerd 1.x, by stock `ctr` on 2.x.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use crate::stage::{Stage, generations, subject};
use crate::support::containerd::Generation;
use crate::support::image::{Compression, Flavour, Image, Layer, ordinary};
use crate::support::lazuli::{self, SNAPSHOTTER};
use crate::support::proxy::total_bytes;
use crate::support::sandbox::{PATIENCE, run, unmount_below};
use crate::support::tar::{Entry, noise};

/// `sha256sum`'s line for a file of the ordinary image that was made with [`noise`].
fn expected_line(path: &str, length: usize) -> String {
    let hash = Sha256::digest(noise(length as u64, length));
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{hex}  {path}\n")
}

fn expected_sums() -> String {
    [
        ("/app/data/again.bin", 70_000),
        ("/app/data/large.bin", 9_000_001),
        ("/app/data/middle.bin", 1_500_000),
        ("/app/data/small.bin", 70_000),
    ]
    .map(|(path, length)| expected_line(path, length))
    .concat()
}

#[test]
fn containers_read_the_right_bytes() {
    for generation in generations() {
        let stage = Stage::new("containers_read_the_right_bytes", generation);
        let image = ordinary(Flavour::Docker, Compression::Gzip);
        let reference = stage.push(&image, "demo/app:1");
        let pulled = stage.pull(&reference);
        if stage.lazuli.is_some() && stage.containerd.generation == Generation::One {
            for layer in &image.layers {
                let short = &layer.blob.digest["sha256:".len()..][..12];
                assert!(
                    pulled.text().contains(short),
                    "lazuli pull does not name layer {short}: {}",
                    pulled.describe()
                );
            }
        }
        assert_eq!(stage.containerd.images(), [reference.as_str()]);
        assert_eq!(stage.sh(&reference, "sha256sum /app/data/*"), expected_sums());
        let listed = stage.sh(
            &reference,
            "find /app -type f | wc -l; readlink /app/current; stat -c %h /app/data/again.bin",
        );
        assert_eq!(listed, "324\ndata/large.bin\n2\n");
    }
}

#[test]
fn containers_write_to_their_own_layer() {
    for generation in generations() {
        let stage = Stage::new("containers_write_to_their_own_layer", generation);
        let reference = stage.push(&ordinary(Flavour::Oci, Compression::Zstd), "demo/app:1");
        stage.pull(&reference);
        let id = stage.containerd.start_container(&reference, &subject());
        let script =
            "set -e; echo new > /app/new; echo more >> /app/lib/p1/m1.txt; rm /app/lib/p2/m2.txt; rm -r /app/lib/p3
            chmod 600 /app/data/small.bin; mkdir -p /app/lib/p3/again; ln /app/data/middle.bin /app/linked; sync
            cat /app/new; tail=$(wc -l < /app/lib/p1/m1.txt); echo $tail; ls /app/lib/p3; ls /app/lib/p2 | wc -l
            stat -c %a /app/data/small.bin; sha256sum /app/linked";
        let written = stage.containerd.exec(&id, script).expect_success().text();
        let sum = expected_line("/app/linked", 1_500_000);
        assert_eq!(written, format!("new\n32\nagain\n39\n600\n{sum}"));
        let other = stage.sh(
            &reference,
            "ls /app | head -n 3; ls /app/lib/p2 /app/lib/p3 | wc -l; stat -c %a /app/data/small.bin",
        );
        assert_eq!(other, "current\ndata\nlib\n83\n644\n");
        stage.containerd.remove_container(&id);
    }
}

/// What `nerdctl commit` and BuildKit do: a snapshot on top of an image, changed, committed, and used as a parent again.
#[test]
fn snapshots_are_committed_and_stacked() {
    for generation in generations() {
        let stage = Stage::new("snapshots_are_committed_and_stacked", generation);
        let reference = stage.push(&ordinary(Flavour::Oci, Compression::Gzip), "demo/app:1");
        stage.pull(&reference);
        let mut parent = stage.containerd.chain_ids(&reference).pop().unwrap();
        let target = stage.sandbox.dir("stacked");
        for round in 0..3 {
            let active = stage.containerd.marked_snapshot("prepare", &subject(), &parent);
            stage.containerd.mount_snapshot(&subject(), &active, &target);
            for earlier in 0..round {
                assert_eq!(
                    fs::read_to_string(target.join(format!("app/round{earlier}"))).unwrap(),
                    earlier.to_string()
                );
                assert!(
                    !target.join(format!("app/lib/p{earlier}")).exists(),
                    "deleted in round {earlier}"
                );
            }
            assert_eq!(
                fs::read(target.join("app/data/small.bin")).unwrap(),
                noise(70_000, 70_000)
            );
            fs::write(target.join(format!("app/round{round}")), round.to_string()).unwrap();
            fs::remove_dir_all(target.join(format!("app/lib/p{round}"))).unwrap();
            unmount_below(&target);
            let name = stage.containerd.new_id();
            let snapshotter = subject();
            let snapshots = ["snapshots", "--snapshotter", &snapshotter];
            stage
                .containerd
                .ctr_ok(&[&snapshots[..], &["commit", &name, &active]].concat());
            stage.containerd.mark_snapshot(&snapshotter, &name);
            parent = name;
        }
        let info = stage
            .containerd
            .ctr_ok(&["snapshots", "--snapshotter", &subject(), "info", &parent])
            .text();
        assert!(info.contains("\"Committed\""), "{info}");
    }
}

/// With stock `ctr` of 2.x, an eStargz image is there before its bytes are.
#[test]
fn estargz_is_lazy() {
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    for generation in generations() {
        // What it runs is not fetched ahead.
        let stage = Stage::with("estargz_is_lazy", generation, "[trace]\nwalk = false\n", |_| ());
        let image = ordinary(Flavour::Oci, Compression::Gzip);
        let reference = stage.push_converted(&image, "demo/app:esgz", &["--estargz"]);
        stage.pull(&reference);
        let manifest = stage.containerd.manifest(&reference);
        let layers = manifest["layers"].as_array().unwrap();
        let size: u64 = layers.iter().map(|layer| layer["size"].as_u64().unwrap()).sum();
        let content = stage.containerd.content();
        for layer in layers {
            let digest = layer["digest"].as_str().unwrap();
            assert!(
                !content.iter().any(|present| present == digest),
                "containerd downloaded {digest}"
            );
        }
        let exchanges = stage.proxy.exchanges();
        for layer in layers {
            let digest = layer["digest"].as_str().unwrap();
            let asked = exchanges.iter().filter(|exchange| exchange.path.contains(digest));
            // Footer, table of contents, and that there are ranges, all in one.
            assert_eq!(
                asked.count(),
                1,
                "requests for {digest} before it is there: {exchanges:?}"
            );
        }
        let pulled = total_bytes(&stage.blob_requests());
        assert!(pulled < size / 4, "the pull fetched {pulled} of {size} bytes");
        assert_eq!(
            stage.sh(&reference, "sha256sum /app/data/small.bin"),
            expected_line("/app/data/small.bin", 70_000)
        );
        let started = total_bytes(&stage.blob_requests());
        assert!(
            started < size / 2,
            "the first container fetched {started} of {size} bytes"
        );
        assert_eq!(stage.sh(&reference, "sha256sum /app/data/*"), expected_sums());
    }
}

/// Removing an image removes its snapshots, and pulling it again needs no layer again.
#[test]
fn removed_images_leave_no_snapshots() {
    for generation in generations() {
        let stage = Stage::new("removed_images_leave_no_snapshots", generation);
        let reference = stage.push(&ordinary(Flavour::Oci, Compression::Gzip), "demo/app:1");
        stage.pull(&reference);
        let chain = stage.containerd.chain_ids(&reference);
        let mut snapshots = stage.containerd.snapshots(&subject());
        snapshots.sort();
        let mut expected = chain.clone();
        expected.sort();
        assert_eq!(snapshots, expected);
        assert_eq!(
            stage.sh(&reference, "cat /app/lib/p1/m1.txt"),
            "module 1001\n".repeat(1001 % 97)
        );
        stage.containerd.remove_image(&reference);
        assert_eq!(stage.containerd.snapshots(&subject()), [""; 0]);
        stage.proxy.take();
        stage.pull(&reference);
        assert_eq!(stage.sh(&reference, "sha256sum /app/data/*"), expected_sums());
        if stage.lazuli.is_some() {
            let again = total_bytes(&stage.blob_requests());
            assert!(
                again < 100_000,
                "layers that were in the cache were fetched again: {again} bytes"
            );
        }
    }
}

/// Two namespaces of one containerd, and two images that share their lower layer.
#[test]
fn layers_are_shared() {
    let stage = Stage::new("layers_are_shared", Generation::One);
    let image = ordinary(Flavour::Oci, Compression::Gzip);
    let first = stage.push(&image, "demo/first:1");
    let second = stage.push(&image, "demo/second:2");
    stage.pull(&first);
    stage.proxy.take();
    stage.pull(&second);
    assert_eq!(stage.containerd.snapshots(&subject()).len(), 2);
    assert_eq!(stage.sh(&second, "sha256sum /app/data/*"), expected_sums());
    stage.containerd.remove_image(&first);
    assert_eq!(stage.sh(&second, "sha256sum /app/data/*"), expected_sums());
    if stage.lazuli.is_some() {
        let again = total_bytes(&stage.blob_requests());
        assert!(again < 100_000, "the shared layers were fetched again: {again} bytes");
    }
}

/// An image is pulled whose layers are there still, and in the same moment lose the last that referred to them: either they stay, or the pull
/// brings them anew; it never ends with an image without layers.
#[test]
fn a_pull_keeps_what_it_finds() {
    /// Without what this tests, one of the first few fails.
    const ROUNDS: usize = 20;
    if subject() != SNAPSHOTTER {
        return;
    }
    let stage = Stage::new("a_pull_keeps_what_it_finds", Generation::One);
    let layers = (0..12_u64).map(|seed| {
        Layer::of(
            Compression::Gzip,
            [Entry::file(format!("file-{seed}"), noise(seed, 1000))],
        )
    });
    let reference = stage.push(&Image::new(Flavour::Oci, layers.collect()), "demo/found:1");
    let other = stage.push(&ordinary(Flavour::Oci, Compression::Gzip), "demo/other:1");
    stage.pull(&reference);
    stage.containerd.fetch(&other);
    let top = stage.containerd.chain_ids(&reference).pop().unwrap();
    /// Also when the test fails.
    struct End<'a>(&'a AtomicBool);
    impl Drop for End<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _end = End(&ended);
        // Garbage is collected all the time.
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                let alias = format!("{other}-alias");
                run(&mut stage.containerd.ctr(&["images", "tag", &other, &alias]), PATIENCE);
                run(&mut stage.containerd.ctr(&["images", "rm", "--sync", &alias]), PATIENCE);
            }
        });
        for round in 0..ROUNDS {
            let holder = stage.containerd.new_id();
            let create = [
                "containers",
                "create",
                "--snapshotter",
                SNAPSHOTTER,
                &reference,
                &holder,
                "sh",
            ];
            stage.containerd.ctr_ok(&create);
            stage.containerd.ctr_ok(&["images", "rm", &reference]);
            let pull = scope.spawn(|| stage.try_pull(&reference));
            std::thread::sleep(Duration::from_millis(6 * round as u64));
            stage.containerd.ctr_ok(&["containers", "rm", &holder]);
            pull.join().unwrap().expect_success();
            let there = stage.containerd.snapshots(SNAPSHOTTER);
            assert!(
                there.contains(&top),
                "round {round}: the image has its name, and no layers: {there:?}"
            );
        }
    });
}
