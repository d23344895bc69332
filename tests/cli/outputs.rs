//! What commands write is there as a whole or not at all, and where they cannot write is found out first.

use std::fs;

use lazuli::layer::Digest;

use crate::rig::{Rig, tree};
use crate::support::fault_registry::{Fault, On};

#[test]
fn places_that_cannot_be_written_are_found_before_anything_is_downloaded() {
    let rig = Rig::new();
    fs::write(rig.path("file"), "x").unwrap();
    for line in [
        "index build REF -o DIR/none",
        "index build REF -o DIR/file",
        "index build REF -o /proc",
        "index pull REF -o DIR/none",
        "index pull REF -o /proc",
        "index export REF --soci v1 -o DIR/file",
        "index export REF --soci v2 -o DIR/file/below",
        "index export REF --soci v2 -o /proc/below",
        "mount REF DIR/none",
        "mount REF DIR/file",
        "mount REF DIR/mountpoint --cache DIR/file",
        "mount REF DIR/mountpoint --cache /proc",
    ] {
        let finished = rig.run(line);
        let place = line.split_whitespace().next_back().unwrap();
        let place = place.replace("DIR", rig.path("").display().to_string().trim_end_matches('/'));
        assert_eq!(
            finished.status.and_then(|s| s.code()),
            Some(1),
            "{line}: {}",
            finished.describe()
        );
        assert!(finished.stderr.contains(&place), "{line}: {}", finished.describe());
    }
    assert_eq!(rig.registry.log().len(), 0);
    assert_eq!(rig.left(), Vec::<String>::new());
}

#[test]
fn a_layout_that_cannot_be_finished_is_left_as_it_was() {
    let rig = Rig::new();
    let line = "index export REF --soci v2 --min-layer-size 0 -o DIR/out";
    rig.run(line).expect_success();
    let before = tree(&rig.path("out"));
    assert!(before.len() > 5, "{:?}", before.keys());
    let layer: Digest = rig.image.layers[0].blob.digest.parse().unwrap();
    for fault in [Fault::Corrupt(1000), Fault::Short(1000), Fault::Status(404)] {
        rig.registry.fail(On::Blob, 1_000_000, fault.clone());
        let failed = rig.run(line);
        assert!(!failed.success(), "{fault:?}: {}", failed.describe());
        assert!(tree(&rig.path("out")) == before, "{fault:?} has changed the layout");
        // Nor is anything left of a new one.
        let failed = rig.run(&line.replace("DIR/out", "DIR/new/layout"));
        assert!(!failed.success(), "{fault:?}: {}", failed.describe());
        assert!(!rig.path("new").exists(), "{fault:?}");
        rig.registry.heal();
    }
    // A blob that was damaged on the disk is replaced.
    let path = rig.path("out/blobs/sha256").join(layer.hex());
    fs::write(&path, "damaged").unwrap();
    rig.run(line).expect_success();
    assert!(tree(&rig.path("out")) == before);
}

#[test]
fn files_of_indexes_appear_when_all_are_whole() {
    let rig = Rig::new();
    let upper = &rig.image.layers[1].blob;
    rig.registry.remove_blob(upper.digest.parse().unwrap());
    assert!(!rig.run("index build REF -o DIR/out").success());
    assert_eq!(
        tree(&rig.path("out")).len(),
        0,
        "the index of the lower layer is there alone"
    );
    rig.registry.add_blob(upper.bytes.as_slice().to_vec());
    rig.run("index build REF -o DIR/out").expect_success();
    let files = tree(&rig.path("out"));
    assert_eq!(files.len(), 2);
    let file = files.keys().next().unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(file).unwrap().permissions());
    assert_eq!(mode & 0o444, 0o444, "others may read it");
}

#[test]
fn a_push_of_nothing_is_no_success() {
    let rig = Rig::new();
    let pushed = rig.run("index push REF --from DIR/out");
    assert_eq!(pushed.status.and_then(|s| s.code()), Some(1), "{}", pushed.describe());
    assert!(pushed.stderr.contains("nothing was pushed"), "{}", pushed.describe());
    assert!(pushed.text().contains("there is no file"), "{}", pushed.describe());
    assert_eq!(
        (rig.registry.seen(On::Upload).len(), rig.registry.seen(On::Write).len()),
        (0, 0)
    );
    let pulled = rig.run("index pull REF -o DIR/out");
    assert_eq!(pulled.status.and_then(|s| s.code()), Some(1), "{}", pulled.describe());
    assert!(pulled.stderr.contains("nothing was written"), "{}", pulled.describe());
    // What is to be gone is gone.
    let removed = rig.run("index rm REF").expect_success();
    assert!(
        removed.stderr.contains("nothing had to be removed"),
        "{}",
        removed.describe()
    );
    rig.run("index build REF -o DIR/out").expect_success();
    rig.run("index push REF --from DIR/out").expect_success();
    rig.run("index pull REF -o DIR/out").expect_success();
}

#[test]
fn a_registry_without_the_layers_is_found_before_they_are_downloaded() {
    let rig = Rig::new();
    let other = Rig::new();
    other
        .registry
        .remove_blob(other.image.layers[0].blob.digest.parse().unwrap());
    let line = format!(
        "index export REF --soci v2 --min-layer-size 0 --push {}",
        other.reference
    );
    let failed = rig.run(&line);
    assert!(
        !failed.success() && failed.stderr.contains("push the image there first"),
        "{}",
        failed.describe()
    );
    let layer = &rig.image.layers[0].blob.digest;
    assert!(
        rig.registry
            .seen(On::Blob)
            .iter()
            .all(|seen| !seen.path.contains(layer.as_str()))
    );
}
