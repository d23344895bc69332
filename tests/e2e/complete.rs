//! Lazily pulled images that are completed: containerd has exactly the blobs that the registry has, keeps them as long as the image is there, and can do with them
//! what it can do with any image.

use std::collections::HashMap;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ::lazuli::catalog::containerd::{Containerd as Client, Ingest};
use ::lazuli::layer::Digest;
use serde_json::Value;

use crate::apply::kill;
use crate::stage::{Stage, generations, subject};
use crate::support::containerd::{Containerd, Generation};
use crate::support::fault_registry::{Fault, FaultRegistry, On};
use crate::support::image::{Compression, Flavour, Image, Layer, base_entries};
use crate::support::lazuli::{self, Lazuli};
use crate::support::proxy::{Link, total_bytes};
use crate::support::registry::Registry;
use crate::support::sandbox::{COMMAND_TIMEOUT, Finished, PATIENCE, Sandbox, run, run_ok, wait_until};
use crate::support::tar::{Entry, noise};

/// Times that a fault comes: for ever.
const ALWAYS: usize = 1_000_000;
/// Bytes of the one large file.
const LARGE: usize = 24 << 20;

fn image() -> Image {
    let files = Layer::of(
        Compression::Gzip,
        (0..4_u64).map(|at| Entry::file(format!("file-{at}"), noise(at, 500_000))),
    );
    let large = Layer::of(Compression::Gzip, [Entry::file("large", noise(9, LARGE))]);
    Image::new(
        Flavour::Oci,
        vec![Layer::of(Compression::Gzip, base_entries()), files, large],
    )
}

fn complete(lazuli: &Lazuli, reference: &str) -> Finished {
    run(&mut lazuli.command("complete", &[reference]), 2 * COMMAND_TIMEOUT)
}

/// Digests of an image's layers.
fn layers(containerd: &Containerd, reference: &str) -> Vec<String> {
    let manifest = containerd.manifest(reference);
    let layers = manifest["layers"].as_array().unwrap();
    layers
        .iter()
        .map(|layer| layer["digest"].as_str().unwrap().to_owned())
        .collect()
}

/// What of these containerd's content store has.
fn stored<'a>(containerd: &Containerd, digests: &'a [String]) -> Vec<&'a String> {
    let store = containerd.ctr_ok(&["content", "ls", "--quiet"]).text();
    digests
        .iter()
        .filter(|digest| store.lines().any(|line| line == digest.as_str()))
        .collect()
}

fn is_complete(lazuli: &Lazuli) -> Value {
    lazuli.status()["images"][0]["complete"].clone()
}

/// Digests of the files in an exported image.
fn exported(file: &std::path::Path) -> Vec<String> {
    let listed = run_ok(Command::new("tar").arg("-tf").arg(file)).text();
    let blobs = listed.lines().filter_map(|name| name.strip_prefix("blobs/sha256/"));
    blobs
        .filter(|hex| !hex.is_empty())
        .map(|hex| format!("sha256:{hex}"))
        .collect()
}

/// One image is completed at a time, and whoever waits is told.
#[test]
fn who_waits_for_another_completion_is_told() {
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    let Some(generation) = Generation::two() else { return };
    let stage = Stage::new("who_waits_for_another_completion_is_told", generation);
    let lazuli = stage.lazuli.as_ref().unwrap();
    let images = ["first", "second"];
    let [first, second] =
        images.map(|name| stage.push_converted(&image(), &format!("complete/{name}:1"), &["--estargz"]));
    for reference in [&first, &second] {
        stage.pull(reference);
    }
    // It takes 5 s.
    stage.proxy.set_link(Link {
        latency: Duration::from_millis(1),
        bytes_per_second: Some(LARGE as u64 / 5),
    });
    let mut completing = lazuli.command("complete", &[&first]);
    let mut completing = completing.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let begun = || (!stage.blob_requests().is_empty()).then_some(());
    stage.proxy.take();
    wait_until(PATIENCE, begun).expect("nothing is completed");
    let waited = complete(lazuli, &second).expect_success();
    assert!(completing.wait().unwrap().success());
    let told = format!("{second}: waits until another image is complete");
    assert!(waited.describe().contains(&told), "{}", waited.describe());
    let alone = complete(lazuli, &second).expect_success();
    assert!(!alone.describe().contains("waits"), "{}", alone.describe());
}

#[test]
fn a_completed_image_is_as_any_other() {
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    for generation in generations() {
        let stage = Stage::new("a_completed_image_is_as_any_other", generation);
        let lazuli = stage.lazuli.as_ref().unwrap();
        let reference = stage.push_converted(&image(), "complete/this:1", &["--estargz"]);
        stage.pull(&reference);
        let digests = layers(&stage.containerd, &reference);
        assert!(
            stored(&stage.containerd, &digests).len() < digests.len(),
            "nothing is lazy"
        );
        assert_eq!(is_complete(lazuli), false);
        let file = stage.sandbox.path("image.tar");
        let export = ["images", "export", file.to_str().unwrap(), &reference];
        let refused = run(&mut stage.containerd.ctr(&export), COMMAND_TIMEOUT);
        assert!(
            !refused.success() && refused.describe().contains("not found"),
            "{}",
            refused.describe()
        );

        let done = complete(lazuli, &reference).expect_success().text();
        assert!(done.contains(&format!("{reference} is complete: ")), "{done}");
        assert_eq!(stored(&stage.containerd, &digests).len(), digests.len());
        assert_eq!(is_complete(lazuli), true);
        let checked = stage.containerd.ctr_ok(&["images", "check"]).text();
        let line = checked.lines().find(|line| line.starts_with(&reference)).unwrap();
        assert!(line.contains(" complete ("), "{checked}");
        stage.containerd.ctr_ok(&export);
        let exported = exported(&file);
        assert!(digests.iter().all(|digest| exported.contains(digest)), "{exported:?}");

        // Another registry, which has nothing of it.
        let second = Registry::start(&stage.sandbox.machine("second"));
        let elsewhere = format!("{}/elsewhere/this:1", second.host());
        stage.containerd.ctr_ok(&["images", "tag", &reference, &elsewhere]);
        stage.containerd.push(&elsewhere);
        stage.containerd.remove_image(&elsewhere);
        // A collection of garbage keeps what the image has, once more nothing is read, and with the image everything goes.
        assert_eq!(stored(&stage.containerd, &digests).len(), digests.len());
        stage.proxy.take();
        let again = complete(lazuli, &reference).expect_success().text();
        assert!(again.contains("were there"), "{again}");
        assert!(stage.blob_requests().is_empty(), "{:?}", stage.blob_requests());
        // The registry is not needed any more.
        stage.hide_registry("127.0.0.1:1");
        std::thread::sleep(Duration::from_millis(1_500));
        assert_eq!(stage.sh(&reference, "wc -c < /large").trim(), LARGE.to_string());
        stage.containerd.remove_image(&reference);
        assert_eq!(stored(&stage.containerd, &digests), Vec::<&String>::new());
        let leases = stage.containerd.ctr_ok(&["leases", "ls", "--quiet"]).text();
        assert_eq!(leases.trim(), "");
    }
}

/// The command is ended, and the daemon is killed in the middle; asked again, it reads what is missing alone.
#[test]
fn killed_in_the_middle_it_goes_on() {
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    let Some(generation) = Generation::two() else { return };
    let mut stage = Stage::new("killed_in_the_middle_it_goes_on", generation);
    let reference = stage.push_converted(&image(), "complete/killed:1", &["--estargz"]);
    stage.pull(&reference);
    let digests = layers(&stage.containerd, &reference);
    stage.proxy.take();
    stage.proxy.set_link(Link {
        bytes_per_second: Some(8 << 20),
        ..Link::default()
    });
    let read = |bytes: u64| {
        let enough = || (total_bytes(&stage.proxy.exchanges()) > bytes).then_some(());
        wait_until(COMMAND_TIMEOUT, enough).expect("it does not read");
    };
    // First its client, politely: the daemon stops reading then.
    let mut command = stage.lazuli.as_ref().unwrap().command("complete", &[&reference]);
    let client = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    read(3 << 20);
    let process = rustix::process::Pid::from_raw(client.id().cast_signed()).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::INT).unwrap();
    let ended = client.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(
        ended.status.code() == Some(130) && said.contains("what was written stays"),
        "{said}"
    );
    std::thread::scope(|scope| {
        let lazuli = stage.lazuli.as_ref().unwrap();
        let completing = scope.spawn(|| complete(lazuli, &reference));
        read(12 << 20);
        kill(lazuli.worker().unwrap());
        let ended = completing.join().unwrap();
        let said = ended.describe();
        assert!(
            !ended.success() && said.contains("ask again, and it goes on where it was"),
            "{said}"
        );
    });
    let before = total_bytes(&stage.proxy.take());
    stage.proxy.set_link(Link::default());
    stage.await_containerd();
    complete(stage.lazuli(), &reference).expect_success();
    assert_eq!(stored(&stage.containerd, &digests).len(), digests.len());
    let after = total_bytes(&stage.proxy.take());
    // Pieces of 8 MiB are asked for, and what was on its way is lost, twice.
    assert!(
        after + before < (LARGE + LARGE * 3 / 4) as u64,
        "{before} and {after} bytes were read of {LARGE}"
    );
    let sum = format!("{}  -\n", ::lazuli::layer::Digest::of(&noise(9, LARGE)).hex());
    assert_eq!(stage.sh(&reference, "sha256sum < /large"), sum);
}

/// Another call has the reference of a layer, as one that was interrupted does for a moment.
#[test]
fn a_reference_that_is_given_back_soon_is_waited_for() {
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    let Some(generation) = Generation::two() else { return };
    let stage = Stage::new("a_reference_that_is_given_back_soon", generation);
    let reference = stage.push_converted(&image(), "complete/taken:1", &["--estargz"]);
    stage.pull(&reference);
    let digests = layers(&stage.containerd, &reference);
    let digest: Digest = digests[0].parse().unwrap();
    let size = stage.containerd.manifest(&reference)["layers"][0]["size"]
        .as_u64()
        .unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let held = runtime.block_on(async {
        let client = Client::new(&stage.containerd.address);
        client.create_lease("default", "holder", 1).await.unwrap();
        let ingest = Ingest {
            namespace: "default",
            lease: "holder",
            reference: format!("lazuli-{digest}"),
            digest,
            size,
            labels: HashMap::new(),
        };
        client.open_ingest(ingest).await.unwrap().expect("it is not there yet")
    });
    std::thread::scope(|scope| {
        let completing = scope.spawn(|| complete(stage.lazuli.as_ref().unwrap(), &reference));
        // Long enough to fail in; less would prove less, and nothing wrong.
        std::thread::sleep(Duration::from_secs(2));
        assert!(!completing.is_finished(), "it waits");
        let _entered = runtime.enter();
        drop(held);
        completing.join().unwrap().expect_success();
    });
    assert_eq!(stored(&stage.containerd, &digests).len(), digests.len());
}

/// A registry that sends other bytes than it should: nothing of them is kept, and when it is right again, neither is it in the way.
#[test]
fn wrong_bytes_are_not_written() {
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    let image = Stage::new("wrong bytes: conversion", Generation::One).converted(&image(), &["--estargz"]);
    let sandbox = Sandbox::new("wrong_bytes_are_not_written");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let registry = runtime.block_on(FaultRegistry::start());
    for blob in image.blobs() {
        registry.add_blob(blob.bytes.as_slice().to_vec());
    }
    let manifest = registry.add_manifest(image.media_type, image.manifest.bytes.as_slice().to_vec());
    registry.tag("demo/app", "1", manifest);
    let containerd = Containerd::start(&sandbox, Generation::One, &lazuli::address_in(&sandbox));
    let lazuli = Lazuli::start(&sandbox, &containerd.address, &[registry.host()], "");
    let reference = format!("{}/demo/app:1", registry.host());
    lazuli.pull(&reference).expect_success();
    let digests = layers(&containerd, &reference);
    let before = stored(&containerd, &digests).len();
    registry.fail(On::Blob, ALWAYS, Fault::Corrupt(100));
    let failed = complete(&lazuli, &reference);
    assert!(
        !failed.success() && failed.describe().contains("are not those of"),
        "{}",
        failed.describe()
    );
    assert_eq!(stored(&containerd, &digests).len(), before);
    registry.heal();
    // What is wrong once is asked for again.
    registry.fail(On::Blob, 1, Fault::Corrupt(100));
    complete(&lazuli, &reference).expect_success();
    assert_eq!(stored(&containerd, &digests).len(), digests.len());
}

/// `[content] complete = "always"`: nobody asks for it.
#[test]
fn images_are_completed_by_themselves() {
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    let config = "[content]\ncomplete = \"always\"\n";
    let stage = Stage::with("images_are_completed_by_themselves", Generation::One, config, |_| {});
    let reference = stage.push_converted(&image(), "complete/always:1", &["--estargz"]);
    stage.pull(&reference);
    let digests = layers(&stage.containerd, &reference);
    let begun = Instant::now();
    wait_until(2 * PATIENCE, || {
        (stored(&stage.containerd, &digests).len() == digests.len()).then_some(())
    })
    .unwrap_or_else(|| panic!("not complete after {:?}", begun.elapsed()));
}

/// What cannot be completed says why.
#[test]
fn what_is_not_there_is_said() {
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    let stage = Stage::new("what_is_not_there_is_said", Generation::One);
    let failed = complete(stage.lazuli.as_ref().unwrap(), "registry.example/no:1");
    assert!(!failed.success(), "{}", failed.describe());
    assert!(
        failed
            .describe()
            .contains("containerd has no image \"registry.example/no:1\" in namespace \"default\""),
        "{}",
        failed.describe()
    );
}
