//! SOCI-indexed images: exported by `lazuli index export --soci`, pulled by stock `ctr`.

use serde_json::Value;

use crate::shared::{Ground, image};
use crate::stage::subject;
use crate::support::containerd::REFERENCE;
use crate::support::lazuli;
use crate::support::tree::{Options, compare};

/// Uncompressed bytes of a span: small ones for a small image.
const SPAN: &str = "262144";

#[test]
fn an_image_with_a_soci_index_is_lazy() {
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    let trusting = "trusted_repositories = [\"REGISTRY/demo/*\"]";
    for (version, tag, settings, lazy) in [
        ("v1", "1", trusting, true),
        // Anybody who may push could have put it there.
        ("v1", "1", "", false),
        ("v2", "2", "", true),
        ("v2", "2", "soci = false", false),
    ] {
        let what = format!("{version} with {settings:?}");
        let ground = Ground::new("soci");
        let image = image();
        let plain = ground.push(&image, "demo/app:1");
        let large = &image.layers[1].blob;
        let reference = format!("{}/demo/app:{tag}", ground.proxy.host());
        let one = ground.machine("a", settings);
        let rows = one.index_json(&[
            "export",
            &plain,
            "--soci",
            version,
            "--push",
            &reference,
            "--span-size",
            SPAN,
            "--min-layer-size",
            "0",
        ]);
        let row = rows.iter().find(|row| row["layer"] == large.digest).unwrap();
        assert_eq!(row["note"], "exported", "{what}: {row}");
        ground.proxy.take();
        one.pull(&reference);
        let listed = one.sh(
            &reference,
            "cat /app/lib/p3/m8.txt | head -n 1; find /app -type f | wc -l",
        );
        assert_eq!(listed, "module 3008\n325\n", "{what}");
        let fetched = ground.blob_bytes();
        let whole = image
            .layers
            .iter()
            .map(|layer| layer.blob.bytes.len() as u64)
            .sum::<u64>();
        let status = one.layer(&large.digest);
        if !lazy {
            assert_eq!(status["index"]["source"], "built", "{what}: {status}");
            continue;
        }
        assert_eq!(
            (&status["index"]["source"], &status["lazy"]),
            (&Value::from("soci"), &Value::from(true)),
            "{what}: {status}"
        );
        assert!(fetched < whole / 3, "{what}: {fetched} of {whole} bytes were fetched");

        one.containerd.pull(&reference, REFERENCE).expect_success();
        let expected = one.containerd.view(&reference, REFERENCE);
        let found = one.containerd.view(&reference, lazuli::SNAPSHOTTER);
        compare(&expected.path, &found.path, &Options::default()).expect_equal();
    }
}

#[test]
fn a_python_with_numpy_starts_with_less_than_half_of_its_bytes() {
    let Some(ground) = Ground::with_demo_images("soci_numpy") else {
        return;
    };
    let plain = format!("{}/demo/python:plain", ground.proxy.host());
    let reference = format!("{}/demo/python:soci", ground.proxy.host());
    let one = ground.machine("a", "");
    let rows = one.index_json(&["export", &plain, "--soci", "v2", "--push", &reference]);
    let exported = rows.iter().filter(|row| row["note"] == "exported");
    let indexes: u64 = exported.filter_map(|row| row["index_bytes"].as_u64()).sum();
    ground.proxy.take();
    one.pull(&reference);
    let said = one.sh(
        &reference,
        "python3 -c 'import numpy; print(int(numpy.arange(1000).sum()))'",
    );
    assert_eq!(said, "499500\n");
    let manifest = one.containerd.manifest(&reference);
    let layers = manifest["layers"].as_array().unwrap().iter();
    let (fetched, whole) = (
        ground.blob_bytes(),
        layers.map(|layer| layer["size"].as_u64().unwrap()).sum::<u64>(),
    );
    eprintln!(
        "python with numpy, SOCI: {fetched} of {whole} bytes, {:.1} %, {indexes} of them its index",
        fetched as f64 * 100.0 / whole as f64
    );
    assert!(fetched < whole / 2, "{fetched} of {whole} bytes were fetched");
}
