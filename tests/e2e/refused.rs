//! A layer that Lazuli does not read is containerd's to unpack; the log says why, and the container works.

use std::fs;
use std::net::TcpListener;

use crate::stage::{Stage, generations, subject};
use crate::support::containerd::Generation;
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

/// A registry in whose place nobody listens, for Lazuli alone: containerd is left its layers after two attempts at each, and not after all of them.
#[test]
fn layers_of_a_registry_that_takes_no_connections() {
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    // The one before asks with nothing but `lazuli pull`, which is refused its manifest.
    let Some(generation) = Generation::two() else { return };
    let stage = Stage::new("refused::layers_of_a_registry", generation);
    let layers = [base_entries(), application_entries(), vec![Entry::file("top", "top\n")]];
    let layers = layers.map(|entries| Layer::of(Compression::Gzip, entries)).to_vec();
    let count = layers.len();
    let reference = stage.push(&Image::new(Flavour::Oci, layers), "demo/refused:1");
    let host = reference.split('/').next().unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let certs = stage.sandbox.dir("certs.d").join(host);
    fs::create_dir_all(&certs).unwrap();
    fs::write(certs.join("hosts.toml"), format!("server = \"http://{closed}\"\n")).unwrap();
    let pulled = stage.containerd.pull(&reference, &subject());
    pulled.expect_success();
    let log = stage.lazuli.as_ref().unwrap().log();
    let attempts = |line: &&str| line.contains("attempt failed") && line.contains("refused");
    let attempts = log.lines().filter(attempts).count();
    assert!((1..=2 * count).contains(&attempts), "{attempts} attempts:\n{log}");
    let seen = stage.sh(&reference, "cat /etc/group; cat /app/lib/p1/m1.txt | wc -l; cat /top");
    assert_eq!(seen, "root:x:0:\nnogroup:x:65534:\n31\ntop\n");
}
