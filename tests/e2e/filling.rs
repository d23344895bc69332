//! Images that are read lazily become whole by themselves, when nobody waits for anything: containers that are made then read files that the kernel
//! knows, and need neither the daemon nor the registry.

use std::time::Duration;

use crate::faces::of_kind;
use crate::stage::{Stage, generations, subject};
use crate::support::image::{Compression, Flavour, Image, Layer, base_entries};
use crate::support::lazuli::{Lazuli, SNAPSHOTTER};
use crate::support::sandbox::wait_until;
use crate::support::tar::{Entry, noise};

/// Bytes of each of the large files.
const LARGE: usize = 6 << 20;
/// Longest time until an image is whole: ten seconds of rest, and a few megabytes.
const WHOLE: Duration = Duration::from_secs(90);
/// What a test's configuration says to have it.
const FILL: &str = "[fetch]\nfill = \"idle\"\n";

fn image() -> Image {
    let large = |seed| {
        Layer::of(
            Compression::Gzip,
            [Entry::file(format!("large-{seed}"), noise(seed, LARGE))],
        )
    };
    let base = Layer::of(Compression::Gzip, base_entries());
    Image::new(Flavour::Oci, vec![base, large(1), large(2)])
}

/// Bytes of an image's layers that are missing, over all layers that are live.
fn missing(lazuli: &Lazuli) -> u64 {
    let status = lazuli.status();
    let layers = status["layers"].as_array().unwrap().iter();
    let bytes = |layer: &serde_json::Value, name: &str| layer[name].as_u64().unwrap();
    layers
        .map(|layer| bytes(layer, "total_bytes") - bytes(layer, "present_bytes"))
        .sum()
}

#[test]
fn an_idle_image_becomes_whole_and_leaves_its_registry() {
    if subject() != SNAPSHOTTER {
        return;
    }
    for generation in generations() {
        let stage = Stage::with("an_idle_image_becomes_whole", generation, FILL, |_| ());
        let lazuli = stage.lazuli.as_ref().unwrap();
        let reference = stage.push_converted(&image(), "filling/this:1", &["--estargz"]);
        stage.pull(&reference);
        let first = stage.containerd.start_container(&reference, SNAPSHOTTER);
        assert!(missing(lazuli) > LARGE as u64, "nothing is lazy");
        wait_until(WHOLE, || (missing(lazuli) == 0).then_some(())).expect("the image does not become whole");

        stage.hide_registry("127.0.0.1:1");
        stage.proxy.take();
        let script = "cat /large-1 /large-2 | wc -c";
        let files = of_kind(lazuli, ".file");
        let second = stage.containerd.start_container(&reference, SNAPSHOTTER);
        for container in [&first, &second] {
            let read = stage.containerd.exec(container, script).expect_success().text();
            assert_eq!(read.trim(), (2 * LARGE).to_string());
        }
        assert!(stage.blob_requests().is_empty(), "{:?}", stage.blob_requests());
        if lazuli.status()["face"]["face"] == "image" {
            assert!(
                of_kind(lazuli, ".file") > files,
                "the second container still reads through the daemon"
            );
        }
    }
}
