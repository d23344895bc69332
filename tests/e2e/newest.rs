//! containerd 2.4 and later, which unpacks layers side by side and knows layers that are staged in an active snapshot. Lazuli answers as it answers the others
//! (docs/BENCHMARKS.md has why), and is not misled by what others than it may tell that containerd.

use crate::stage::{Stage, subject};
use crate::support::containerd::Generation;
use crate::support::image::{Compression, Flavour, Image, Layer, base_entries};
use crate::support::lazuli::SNAPSHOTTER;
use crate::support::tar::{Entry, noise};

/// Unpacking side by side.
const PARALLEL: &str = "[plugins.\"io.containerd.transfer.v1.local\"]\n  max_concurrent_unpacks = 3\n";
/// What the configuration declares of Lazuli, and what it must not.
const CAPABILITIES: &str = "capabilities = [\"remap-ids\"]";
const REBASE: &str = "capabilities = [\"remap-ids\", \"rebase\"]";

/// Lazy layers, and a plain one among them.
fn push(stage: &Stage) -> (String, Image) {
    let mut layers = vec![Layer::of(Compression::Gzip, base_entries())];
    layers.extend((0..4_u64).map(|at| {
        Layer::of(
            Compression::Gzip,
            [Entry::file(format!("file-{at}"), noise(at, 1_000_000))],
        )
    }));
    let lazy = stage.converted(&Image::new(Flavour::Oci, layers), &["--estargz"]);
    let mut layers = lazy.layers.clone();
    layers.insert(
        3,
        Layer::of(Compression::Zstd, [Entry::file("plain", noise(9, 500_000))]),
    );
    let image = Image::new(Flavour::Oci, layers);
    let reference = stage.push(&image, "newest/mixed:1");
    stage.proxy.take();
    (reference, image)
}

/// Snapshots of Lazuli's in containerd that have no parent.
fn roots(stage: &Stage) -> usize {
    let listed = stage
        .containerd
        .ctr_ok(&["snapshots", "--snapshotter", SNAPSHOTTER, "ls"])
        .text();
    let lines = listed.lines().skip(1).filter(|line| !line.trim().is_empty());
    lines.filter(|line| line.split_whitespace().count() < 3).count()
}

fn check_content(stage: &Stage, reference: &str) {
    let seen = stage.sh(reference, "cat /file-* /plain | sha256sum; ls / | grep -c file-");
    let mut expected: Vec<u8> = (0..4_u64).flat_map(|at| noise(at, 1_000_000)).collect();
    expected.extend(noise(9, 500_000));
    let sum = ::lazuli::layer::Digest::of(&expected).hex();
    assert_eq!(seen, format!("{sum}  -\n4\n"));
}

/// A pull is lazy, and unpacking side by side changes nothing.
#[test]
fn the_newest_containerd_pulls_lazily() {
    let Some(generation) = Generation::two_four() else {
        return;
    };
    if subject() != SNAPSHOTTER {
        return;
    }
    let stage = Stage::applying("the_newest_containerd", generation, PARALLEL);
    let (reference, image) = push(&stage);
    stage.pull(&reference);
    let content = stage.containerd.content();
    for layer in &image.layers {
        assert!(
            !content.contains(&layer.blob.digest),
            "{} was fetched",
            layer.blob.digest
        );
    }
    assert_eq!(stage.containerd.snapshots(SNAPSHOTTER).len(), image.layers.len());
    assert_eq!(roots(&stage), 1);
    check_content(&stage, &reference);
    stage.containerd.remove_image(&reference);
    assert_eq!(stage.containerd.snapshots(SNAPSHOTTER), Vec::<String>::new());
    stage.pull(&reference);
    check_content(&stage, &reference);
}

/// A capability that Lazuli does not have: the pull fails and says what is wrong, instead of losing all layers below each.
#[test]
fn a_pull_with_rebase_fails_and_tells_why() {
    let Some(generation) = Generation::two_four() else {
        return;
    };
    if subject() != SNAPSHOTTER {
        return;
    }
    let mut stage = Stage::applying("a_pull_with_rebase", generation, PARALLEL);
    let (reference, _) = push(&stage);
    stage.containerd.reconfigure(CAPABILITIES, REBASE);
    let failed = stage.try_pull(&reference);
    assert!(
        !failed.success(),
        "layers were lost: {} without a parent",
        roots(&stage)
    );
    let said = failed.describe();
    assert!(said.contains("rebase") && said.contains("capabilities"), "{said}");
    assert!(roots(&stage) <= 1, "a layer has lost what is below it");
    stage.containerd.reconfigure(REBASE, CAPABILITIES);
    stage.pull(&reference);
    check_content(&stage, &reference);
}
