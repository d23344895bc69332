//! A layer that Lazuli does not read is containerd's to unpack; the log says why, and the container works.

use crate::stage::{Stage, generations, subject};
use crate::support::image::{Compression, Flavour, Image, Layer, application_entries, base_entries};
use crate::support::lazuli;
use crate::support::tar::Entry;

/// Makes a layer foreign: its bytes are to be had from a URL only, and not to be passed on.
fn foreign(stage: &Stage, mut layer: Layer) -> Layer {
    // The registry that the manifest is pushed to happens to have the blob as well, under another repository.
    stage.push(&Image::new(Flavour::Oci, vec![layer.clone()]), "elsewhere/layers:1");
    layer.media_type = Some("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip".to_owned());
    layer.urls = vec![format!(
        "http://{}/v2/elsewhere/layers/blobs/{}",
        stage.registry.host(),
        layer.blob.digest
    )];
    layer
}

fn check(stage: &Stage, layers: Vec<Layer>, refused: &str) {
    let reference = stage.push(&Image::new(Flavour::Oci, layers), "demo/foreign:1");
    let pulled = stage.pull(&reference);
    let seen = stage.sh(&reference, "cat /etc/group; cat /app/lib/p1/m1.txt | wc -l; cat /top");
    assert_eq!(seen, "root:x:0:\nnogroup:x:65534:\n31\ntop\n", "{}", pulled.describe());
    let Some(lazuli) = &stage.lazuli else { return };
    let log = lazuli.log();
    let reason = log
        .lines()
        .find(|line| line.contains(refused) && line.contains("foreign"));
    assert!(
        reason.is_some(),
        "the log does not say why {refused} is not served:\n{log}"
    );
    let status = lazuli.status().to_string();
    assert!(
        status.contains("foreign"),
        "the status does not say why {refused} is not served: {status}"
    );
}

#[test]
fn the_topmost_layer() {
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    for generation in generations() {
        let stage = Stage::new("refused::the_topmost_layer", generation);
        let top = foreign(&stage, Layer::of(Compression::Gzip, [Entry::file("top", "top\n")]));
        let digest = top.blob.digest.clone();
        let base = Layer::of(Compression::Gzip, base_entries());
        let application = Layer::of(Compression::Zstd, application_entries());
        check(&stage, vec![base, application, top], &digest);
    }
}

#[test]
fn the_lowest_layer() {
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    for generation in generations() {
        let stage = Stage::new("refused::the_lowest_layer", generation);
        let base = foreign(&stage, Layer::of(Compression::Gzip, base_entries()));
        let digest = base.blob.digest.clone();
        let application = Layer::of(Compression::Gzip, application_entries());
        let top = Layer::of(Compression::None, [Entry::file("top", "top\n")]);
        check(&stage, vec![base, application, top], &digest);
    }
}
