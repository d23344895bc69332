//! Lazuli as containerd's differ, and containerd's content store as a source: what containerd has fetched with credentials of its own, or was given in
//! a file, is packed as everything else is, and looks as it does when containerd unpacks it.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Stdio;

use ::lazuli::proto::diff::v1::ApplyRequest;
use ::lazuli::proto::diff::v1::diff_client::DiffClient;
use ::lazuli::proto::types::{Descriptor, Mount};
use tonic::Code;

use crate::stage::{Stage, subject};
use crate::support::containerd::{Containerd, DIFFER, Generation, NAMESPACE, REFERENCE};
use crate::support::fault_registry::{Auth, FaultRegistry};
use crate::support::image::{Compression, Flavour, Image, Layer, application_entries, base_entries, ordinary};
use crate::support::lazuli;
use crate::support::sandbox::{PATIENCE, Sandbox, run, wait_until};
use crate::support::tar::{Entry, noise};
use crate::support::torture::{self, Case};
use crate::support::tree::{Options, compare};

/// Bytes of a layer that takes a while.
const LARGE: usize = 60_000_000;
/// Nobody listens there.
const NOWHERE: &str = "127.0.0.1:1";

/// A containerd 2.x whose differ is Lazuli, which does not reach the registry.
fn stage(name: &str) -> Option<Stage> {
    if subject() != lazuli::SNAPSHOTTER {
        return None;
    }
    let stage = Stage::applying(name, Generation::two()?, "");
    stage.hide_registry(NOWHERE);
    Some(stage)
}

/// How many layers were packed from what containerd has.
fn applied(stage: &Stage) -> usize {
    let log = stage.lazuli.as_ref().map(lazuli::Lazuli::log).unwrap_or_default();
    log.lines()
        .filter(|line| line.contains("streamed") && line.contains("content store"))
        .count()
}

/// All layers are Lazuli's own: none was unpacked into a directory.
fn assert_packed(stage: &Stage, image: &Image) {
    let log = stage.lazuli.as_ref().map(lazuli::Lazuli::log).unwrap_or_default();
    assert!(!log.contains("is unpacked by containerd's own differ"), "{log}");
    let status = stage.lazuli.as_ref().map(lazuli::Lazuli::status).unwrap_or_default();
    let live: Vec<&str> = status["layers"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|layer| layer["blob"].as_str().or(layer["digest"].as_str()))
        .collect();
    for layer in &image.layers {
        assert!(
            live.contains(&layer.blob.digest.as_str()),
            "{} is not live: {status:#}",
            layer.blob.digest
        );
    }
    assert!(
        applied(stage) > 0,
        "nothing came out of containerd's content store: {log}"
    );
}

fn check_torture(case: &Case) {
    let Some(stage) = stage(&format!("applied {}", case.name)) else {
        return;
    };
    let reference = stage.push(&case.image, &format!("torture/{}:1", case.name));
    let options = Options {
        implied_dirs: case.implied_dirs.clone(),
        ..Options::default()
    };
    let comparison = stage.compare(&reference, &options).expect_equal();
    assert!(comparison.entries > 4, "{comparison:?}");
    assert_packed(&stage, &case.image);
}

macro_rules! torture {
    ($($name:ident)*) => {
        mod applied_torture {
            use super::*;
            $(
                #[test]
                fn $name() {
                    check_torture(&torture::$name());
                }
            )*
        }
    };
}

torture! {
    names links duplicates metadata xattrs sizes sparse devices whiteouts base_whiteouts implied taken_over archives
}

/// Three layers in three compressions, which take over from each other, run as a container, and are there after a restart and for another
/// namespace, which reads nothing anew.
#[test]
fn an_image_that_only_containerd_can_fetch() {
    let Some(mut stage) = stage("an_image_that_only_containerd_can_fetch") else {
        return;
    };
    let image = Image::new(
        Flavour::Oci,
        vec![
            Layer::of(Compression::Gzip, base_entries()),
            Layer::of(Compression::Zstd, application_entries()),
            Layer::of(
                Compression::None,
                [
                    Entry::dir("app"),
                    Entry::dir("app/data"),
                    Entry::whiteout("app/data/middle.bin"),
                    Entry::file("app/data/large.bin", noise(77, 3_000_000)),
                ],
            ),
        ],
    );
    let reference = stage.push(&image, "applied/three:1");
    let comparison = stage.compare(&reference, &Options::default()).expect_equal();
    assert!(comparison.bytes > 5_000_000, "{comparison:?}");
    assert_packed(&stage, &image);
    let script = "sha256sum < /app/data/large.bin; ls /app/data; touch /app/data/new";
    let seen = stage.sh(&reference, script);
    stage.restart_daemon();
    assert_eq!(stage.sh(&reference, script), seen);
    let before = applied(&stage);
    let other = stage.containerd.in_namespace("other");
    other.pull(&reference, &subject()).expect_success();
    assert_eq!(other.sh(&reference, &subject(), script), seen);
    assert_eq!(applied(&stage), before, "what is packed already is not read once more");
    // They go with their images.
    for containerd in [&other, &stage.containerd] {
        containerd.remove_image(&reference);
    }
    let lazuli = stage.lazuli();
    wait_until(PATIENCE, || {
        let left = std::fs::read_dir(lazuli.root().join("snapshots")).unwrap().count();
        (left == 0).then_some(())
    })
    .expect("snapshots of removed images stay");
}

/// A registry with `private/app:1`, for which it wants the password "s3cret" of "someone"; it answers as long as the runtime is there.
pub fn private_registry(image: &Image) -> (tokio::runtime::Runtime, FaultRegistry) {
    let runtime = runtime();
    let registry = runtime.block_on(FaultRegistry::start());
    for blob in image.blobs() {
        registry.add_blob(blob.bytes.as_slice().to_vec());
    }
    let manifest = registry.add_manifest(image.media_type, image.manifest.bytes.as_slice().to_vec());
    registry.tag("private/app", "1", manifest);
    registry.set_auth(Auth::Basic("someone".to_owned(), "s3cret".to_owned()));
    (runtime, registry)
}

/// A registry that wants a password which the client of containerd has, and Lazuli has not.
#[test]
fn a_private_image_whose_password_only_its_client_has() {
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    let Some(generation) = Generation::two() else { return };
    let sandbox = Sandbox::new("a_private_image");
    let image = ordinary(Flavour::Oci, Compression::Gzip);
    let (_runtime, registry) = private_registry(&image);
    let address = lazuli::address_in(&sandbox);
    let containerd = Containerd::start_with(&sandbox, generation, &address, DIFFER, "");
    let lazuli = lazuli::Lazuli::start(&sandbox, &containerd.address, &[registry.host()], "");
    let reference = format!("{}/private/app:1", registry.host());
    let flags = [
        "images",
        "pull",
        "--plain-http",
        "--user",
        "someone:s3cret",
        "--snapshotter",
        lazuli::SNAPSHOTTER,
        &reference,
    ];
    run(&mut containerd.ctr(&flags), PATIENCE).expect_success();
    let sum = containerd.sh(&reference, lazuli::SNAPSHOTTER, "sha256sum < /app/data/large.bin");
    assert_eq!(sum.len(), 64 + "  -\n".len(), "{sum}");
    let log = lazuli.log();
    assert!(log.contains("refuses access"), "Lazuli had the password too: {log}");
    assert!(!log.contains("is unpacked by containerd's own differ"), "{log}");
    let layers = lazuli.status()["layers"].as_array().map_or(0, Vec::len);
    assert_eq!(layers, image.layers.len());
}

/// `ctr images import` of a file: no registry is asked for anything.
#[test]
fn an_image_out_of_a_file() {
    let Some(stage) = stage("an_image_out_of_a_file") else {
        return;
    };
    let image = ordinary(Flavour::Oci, Compression::Gzip);
    let reference = stage.push(&image, "applied/file:1");
    // The file is made by another containerd's content, which is gone then.
    stage.containerd.fetch(&reference);
    let file = stage.sandbox.path("image.tar");
    let file = file.to_str().unwrap();
    stage.containerd.ctr_ok(&["images", "export", file, &reference]);
    stage.containerd.remove_image(&reference);
    stage.proxy.take();
    let import = ["images", "import", "--snapshotter", &subject(), file];
    stage.containerd.ctr_ok(&import);
    let seen = stage.sh(&reference, "sha256sum /app/data/large.bin; find / -xdev | wc -l");
    assert_packed(&stage, &image);
    assert!(stage.blob_requests().is_empty(), "{:?}", stage.blob_requests());
    stage.containerd.pull(&reference, REFERENCE).expect_success();
    let unpacked = stage.containerd.sh(
        &reference,
        REFERENCE,
        "sha256sum /app/data/large.bin; find / -xdev | wc -l",
    );
    assert_eq!(seen, unpacked);
}

/// An image that is in the content store already, and a registry that takes connections and never says a word.
#[test]
fn an_image_that_is_there_needs_no_registry() {
    for generation in crate::stage::generations() {
        if subject() != lazuli::SNAPSHOTTER {
            return;
        }
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let stage = Stage::new("an_image_that_is_there_needs_no_registry", generation);
        stage.hide_registry(&silent.local_addr().unwrap().to_string());
        let image = ordinary(Flavour::Oci, Compression::Gzip);
        let reference = stage.push(&image, "applied/there:1");
        stage.containerd.fetch(&reference);
        stage.proxy.take();
        // Nobody but the content store: `lazuli pull` would ask the registry for the manifest.
        if stage.containerd.generation == Generation::One {
            continue;
        }
        stage.pull(&reference);
        stage.sh(&reference, "sha256sum /app/data/large.bin");
        assert_packed(&stage, &image);
        let asked = silent.set_nonblocking(true).and_then(|()| silent.accept());
        assert!(asked.is_err(), "the registry was asked");
    }
}

/// A lazy image whose blobs containerd has as well is read from there; when they go, from the registry; and when that is gone too, reads wait for it.
#[test]
fn chunks_come_from_the_content_store_while_it_has_them() {
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    let Some(generation) = Generation::two() else { return };
    let stage = Stage::new("chunks_come_from_the_content_store", generation);
    let mut layers = vec![Layer::of(Compression::Gzip, base_entries())];
    layers.extend((0..2_u64).map(|at| {
        let file = |name: u64| Entry::file(format!("file-{at}-{name}"), noise(at * 10 + name, 1_000_000));
        Layer::of(Compression::Gzip, [file(0), file(1)])
    }));
    let image = Image::new(Flavour::Oci, layers);
    let reference = stage.push_converted(&image, "applied/lazy:1", &["--estargz"]);
    stage.containerd.fetch(&reference);
    stage.proxy.take();
    stage.pull(&reference);
    let container = stage.containerd.start_container(&reference, &subject());
    let sum = |name: &str| {
        stage
            .containerd
            .exec(&container, &format!("sha256sum < /{name}"))
            .expect_success()
            .text()
    };
    let of = |seed: u64| format!("{}  -\n", hex_of(&noise(seed, 1_000_000)));
    assert_eq!(sum("file-0-0"), of(0));
    assert!(stage.blob_requests().is_empty(), "{:?}", stage.blob_requests());
    // The blob of one layer goes, as it does when its images are removed.
    let manifest = stage.containerd.manifest(&reference);
    let digest = manifest["layers"][1]["digest"].as_str().unwrap().to_owned();
    stage.containerd.ctr_ok(&["content", "rm", &digest]);
    assert_eq!(sum("file-0-1"), of(1));
    assert!(
        !stage.blob_requests().is_empty(),
        "it can only have come from the registry"
    );
    assert_eq!(sum("file-1-0"), of(10));
    stage.containerd.remove_container(&container);
}

fn hex_of(bytes: &[u8]) -> String {
    ::lazuli::layer::Digest::of(bytes).hex()
}

fn client(stage: &Stage, runtime: &tokio::runtime::Runtime) -> DiffClient<tonic::transport::Channel> {
    let _entered = runtime.enter();
    let address = lazuli::address_in(&stage.sandbox);
    DiffClient::new(::lazuli::catalog::containerd::unix_channel(&address))
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

/// What Lazuli cannot show is unpacked by containerd itself, into the same mounts; what is nobody's is declined.
#[test]
fn what_cannot_be_shown_is_unpacked_by_containerd() {
    let Some(stage) = stage("what_cannot_be_shown_is_unpacked") else {
        return;
    };
    let image = ordinary(Flavour::Oci, Compression::Gzip);
    let reference = stage.push(&image, "applied/given-back:1");
    stage.containerd.fetch(&reference);
    let layer = &image.layers[0];
    let descriptor = Descriptor {
        media_type: layer.media_type(Flavour::Oci),
        digest: layer.blob.digest.clone(),
        size: layer.blob.bytes.len() as i64,
        ..Descriptor::default()
    };
    let runtime = runtime();
    let apply = |mounts: Vec<Mount>| {
        let mut client = client(&stage, &runtime);
        let mut request = tonic::Request::new(ApplyRequest {
            diff: Some(descriptor.clone()),
            mounts,
            ..ApplyRequest::default()
        });
        request
            .metadata_mut()
            .insert("containerd-namespace", NAMESPACE.parse().unwrap());
        runtime.block_on(async move { client.apply(request).await })
    };
    // A container's own snapshot: what is applied to it has to be in it.
    let snapshots = ["snapshots", "--snapshotter", lazuli::SNAPSHOTTER];
    let key = stage.containerd.new_id();
    stage.containerd.ctr_ok(&[&snapshots[..], &["prepare", &key]].concat());
    let own: Vec<PathBuf> = std::fs::read_dir(stage.sandbox.path("lazuli/snapshots"))
        .unwrap()
        .map(|entry| entry.unwrap().path().join("fs"))
        .collect();
    let [own] = &own[..] else { panic!("{own:?}") };
    let mount = |source: &str| Mount {
        r#type: "bind".to_owned(),
        source: source.to_owned(),
        target: String::new(),
        options: vec!["rw".to_owned(), "rbind".to_owned()],
    };
    let answer = apply(vec![mount(own.to_str().unwrap())]).unwrap().into_inner();
    assert_eq!(answer.applied.unwrap().digest, layer.diff_id);
    assert!(
        own.join("bin/busybox").is_file(),
        "nothing was unpacked into {}",
        own.display()
    );
    // Somebody else's directory.
    let elsewhere = stage.sandbox.dir("elsewhere");
    let declined = apply(vec![mount(elsewhere.to_str().unwrap())]).unwrap_err();
    assert_eq!(declined.code(), Code::Unimplemented, "{declined}");
    assert_eq!(std::fs::read_dir(&elsewhere).unwrap().count(), 0);
    let none = apply(Vec::new()).unwrap_err();
    assert_eq!(none.code(), Code::Unimplemented, "{none}");
    stage.containerd.ctr_ok(&[&snapshots[..], &["rm", &key]].concat());
}

/// In a list before containerd's own differ it leaves other snapshotters alone. So it is used by 1.7, and by pulls that containerd's client does itself.
#[test]
fn other_snapshotters_have_their_own_differ() {
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    for generation in crate::stage::generations() {
        let list =
            format!("[plugins.\"io.containerd.service.v1.diff-service\"]\n  default = [\"{DIFFER}\", \"walking\"]\n");
        if generation == Generation::One && generation.version().contains(" 1.6.") {
            // It knows no differs but its own.
            continue;
        }
        let stage = Stage::applying("other_snapshotters", generation, &list);
        stage.hide_registry(NOWHERE);
        let image = ordinary(Flavour::Oci, Compression::Gzip);
        let reference = stage.push(&image, "applied/list:1");
        let pull = |snapshotter: &str| {
            let flags = [
                "images",
                "pull",
                "--local",
                "--plain-http",
                "--snapshotter",
                snapshotter,
                &reference,
            ];
            run(&mut stage.containerd.ctr(&flags), PATIENCE).expect_success();
        };
        pull(REFERENCE);
        pull(lazuli::SNAPSHOTTER);
        let [theirs, ours] =
            [REFERENCE, lazuli::SNAPSHOTTER].map(|snapshotter| stage.containerd.view(&reference, snapshotter));
        compare(&theirs.path, &ours.path, &Options::default()).expect_equal();
        assert_packed(&stage, &image);
    }
}

/// An image with a layer that takes a while, and its pull, which `meanwhile` meets while that layer is being packed.
fn while_it_packs(stage: &mut Stage, meanwhile: impl FnOnce(&mut Stage)) -> (Image, String) {
    let (image, reference, _) = while_it_packs_and(stage, meanwhile);
    (image, reference)
}

/// The same, and whether the pull succeeds.
fn while_it_packs_and(stage: &mut Stage, meanwhile: impl FnOnce(&mut Stage)) -> (Image, String, bool) {
    let large = Layer::of(Compression::Gzip, [Entry::file("large", noise(5, LARGE))]);
    let image = Image::new(Flavour::Oci, vec![Layer::of(Compression::Gzip, base_entries()), large]);
    let reference = stage.push(&image, "applied/killed:1");
    let mut pull = stage.containerd.ctr(&[
        "images",
        "pull",
        "--plain-http",
        "--snapshotter",
        &subject(),
        &reference,
    ]);
    let mut pulling = pull.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let incoming = stage.sandbox.path("lazuli/layers/.incoming");
    let staged = || {
        let layers = std::fs::read_dir(&incoming).ok()?;
        let written = layers
            .flatten()
            .filter_map(|layer| layer.path().join("data").metadata().ok());
        written
            .map(|data| data.len())
            .any(|bytes| bytes > LARGE as u64 / 8)
            .then_some(())
    };
    while staged().is_none() {
        assert!(
            pulling.try_wait().unwrap().is_none(),
            "the layer was packed before it was seen"
        );
    }
    meanwhile(stage);
    // containerd may go on with the next worker, or not; without containerd it fails.
    let pulled = pulling.wait().unwrap();
    (image, reference, pulled.success())
}

/// The pull is repeated, and ends right.
fn assert_pulled(stage: &mut Stage, image: &Image, reference: &str) {
    stage.await_containerd();
    stage.pull(reference);
    let sum = stage.sh(reference, "sha256sum < /large");
    assert_eq!(sum, format!("{}  -\n", hex_of(&noise(5, LARGE))));
    assert_packed(stage, image);
    let root = stage.lazuli().root();
    let left = || std::fs::read_dir(root.join("layers/.incoming")).unwrap().count();
    wait_until(PATIENCE, || (left() == 0).then_some(())).expect("a layer that nobody makes any more stays");
}

#[test]
fn killed_while_it_packs() {
    let Some(mut stage) = stage("killed_while_it_packs") else {
        return;
    };
    let (image, reference) = while_it_packs(&mut stage, |stage| {
        let worker = stage.lazuli().worker();
        kill(worker.expect("there is no worker"));
    });
    assert_pulled(&mut stage, &image, &reference);
}

/// The next process is asked by gRPC itself, and packs the layer from its beginning. However fast the machine is, the layer is not packed before:
/// containerd, from which its bytes come, stands still meanwhile.
#[test]
fn a_program_is_replaced_while_it_packs() {
    let Some(mut stage) = stage("a_program_is_replaced_while_it_packs") else {
        return;
    };
    let binary = stage.sandbox.path("lazuli-next");
    std::fs::copy(lazuli::program(), &binary).unwrap();
    let (image, reference, pulled) = while_it_packs_and(&mut stage, |stage| {
        stage.containerd.halt();
        let mut upgrade = stage
            .lazuli()
            .command("upgrade", &["--binary", &binary.display().to_string()]);
        let upgraded = run(&mut upgrade, PATIENCE);
        stage.containerd.go_on();
        upgraded.expect_success();
    });
    assert!(pulled, "the pull was lost: {}", stage.containerd.log());
    let log = stage.lazuli().log();
    assert!(
        log.contains("a layer is left to the next process"),
        "it was packed before: {log}"
    );
    assert_pulled(&mut stage, &image, &reference);
}

#[test]
fn containerd_is_killed_while_a_layer_is_packed() {
    let Some(mut stage) = stage("containerd_is_killed_while_a_layer_is_packed") else {
        return;
    };
    let (image, reference) = while_it_packs(&mut stage, |stage| stage.containerd.kill_and_restart());
    assert_pulled(&mut stage, &image, &reference);
}

pub fn kill(process: u32) {
    let process = rustix::process::Pid::from_raw(process.cast_signed()).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
}
