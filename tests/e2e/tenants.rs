//! Two tenants of one node: a hostile image is pulled first, over the very layers of an honest one, with an index in which two files have each
//! other's name; the honest image's containers read their own files all the same.
//!
//! Namespaces stand for how the images come together: `evil` has the hostile ones alone, `own` the honest ones alone, `both` has first the one and then
//! the other with the same chain of layers, and in `base` the honest image has layers of its own on those of the hostile one.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;

use lazuli::catalog::shared::publish::{Target, push};
use lazuli::catalog::soci::manifest::{INDEX_DIGEST, entry, index as soci_index};
use lazuli::config::RegistryConfig;
use lazuli::layer::soci::ZtocBuilder;
use lazuli::layer::{Compression as Codec, Digest};
use lazuli::registry::Registry as Client;
use lazuli::registry::image::MANIFEST_TYPE;
use lazuli::store::LayerSource;
use serde_json::{Value, json};

use crate::shared::{Ground, Machine, false_index, keys};
use crate::stage::subject;
use crate::support::containerd::Generation;
use crate::support::fault_registry::FaultRegistry;
use crate::support::image::{Blob, Compression, Flavour, Image, Layer, base_entries};
use crate::support::lazuli::SNAPSHOTTER;
use crate::support::registry::{client, push_blob};
use crate::support::sandbox::{PATIENCE, run, wait_until};
use crate::support::tar::{Entry, noise};

/// The label that containerd makes of an annotation.
const LABEL: &str = "containerd.io/snapshot/remote/soci.index.digest";
/// Bytes of each of the two files: enough that a layer is worth an index.
const SIZE: usize = 300_000;

/// A way to have a false index believed.
struct Case {
    name: &'static str,
    honest: Image,
    /// The same layers, and something more in the manifest.
    hostile: Image,
    /// Where the hostile image is.
    hostile_at: String,
    /// Whether its own containers read false files: by default, and where signatures are required.
    fools_itself: [bool; 2],
}

fn content(word: &str, case: &str) -> Vec<u8> {
    let mut bytes = format!("{word} of {case}\n").into_bytes();
    bytes.extend(noise(u64::from(word.as_bytes()[0]), SIZE - bytes.len()));
    bytes
}

/// The layer of a case, or with the two files' names exchanged.
fn entries(case: &str, swapped: bool) -> Vec<Entry> {
    let names = if swapped { ["two", "one"] } else { ["one", "two"] };
    let file = |name: &str, word: &str| Entry::file(format!("{case}/{name}"), content(word, case));
    vec![Entry::dir(case), file(names[0], "one"), file(names[1], "two")]
}

fn image(layers: &[&Layer]) -> Image {
    Image::new(Flavour::Oci, layers.iter().map(|layer| (*layer).clone()).collect())
}

/// The image with these annotations of its manifest.
fn annotated(mut image: Image, annotations: &[(&str, String)]) -> Image {
    let mut manifest: Value = serde_json::from_slice(&image.manifest.bytes).unwrap();
    manifest["annotations"] = annotations
        .iter()
        .map(|(key, value)| (*key, value.clone()))
        .collect::<BTreeMap<_, _>>()
        .into_iter()
        .collect();
    image.manifest = Blob::new(manifest.to_string().into_bytes());
    image
}

fn with_annotations(layer: &Layer, annotations: &[(&str, String)]) -> Layer {
    let mut layer = layer.clone();
    layer.annotations.extend(
        annotations
            .iter()
            .map(|(key, value)| ((*key).to_owned(), value.clone())),
    );
    layer
}

/// A SOCI index of the layer with exchanged names, in a repository; its digest.
fn false_soci(ground: &Ground, repository: &str, layer: &Layer, case: &str) -> String {
    let mut builder = ZtocBuilder::new(Codec::Gzip, 1 << 18, "a test").unwrap();
    builder.push(&layer.blob.bytes).unwrap();
    let mut ztoc = builder.finish().unwrap();
    let names = ["one", "two"].map(|name| format!("{case}/{name}").into_bytes());
    let places = names.each_ref().map(|name| {
        let mut at = ztoc
            .windows(name.len())
            .enumerate()
            .filter(|(_, bytes)| bytes == name)
            .map(|(at, _)| at);
        (at.next().unwrap(), at.next())
    });
    assert_eq!((places[0].1, places[1].1), (None, None), "each name is there once");
    for (at, name) in [(places[0].0, &names[1]), (places[1].0, &names[0])] {
        ztoc[at..at + name.len()].copy_from_slice(name);
    }
    let digest: Digest = layer.blob.digest.parse().unwrap();
    let entry = entry(&ztoc, &digest, "application/vnd.oci.image.layer.v1.tar+gzip", 1 << 18);
    let document = soci_index(&[entry], None, "a test");
    let index = Digest::of(&document).to_string();
    // As the layers of an image, so that the registry has them.
    let ztoc = Layer {
        blob: Blob::new(ztoc),
        ..layer.clone()
    };
    ground
        .registry
        .push(&image(&[&ztoc]), &format!("{repository}:ztoc-{case}"));
    let url = format!("http://{}/v2/{repository}/manifests/{index}", ground.registry.address);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        // The config of every such document.
        push_blob(
            &client(),
            ground.registry.address,
            repository,
            &Blob::new(b"{}".to_vec()),
        )
        .await;
        let put = client()
            .put(&url)
            .header("content-type", MANIFEST_TYPE)
            .body(document.to_vec());
        let answer = put.send().await.unwrap();
        assert!(answer.status().is_success(), "{}", answer.text().await.unwrap());
    });
    index
}

/// Puts a portable index with exchanged names beside an image, or only its blob.
fn false_portable(ground: &Ground, repository: &str, manifest: Option<&Blob>, layer: &Layer, case: &str) -> Vec<u8> {
    let swapped = Layer::of(Compression::None, entries(case, true));
    let bytes = false_index(&layer.blob.bytes, &swapped.blob.bytes);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let registry = Client::new(&RegistryConfig::default(), Default::default()).unwrap();
        let place = LayerSource {
            host: ground.registry.host(),
            repository: repository.to_owned(),
        };
        let target = match manifest {
            Some(manifest) => Target::image(&registry, place, &manifest.digest.parse().unwrap())
                .await
                .unwrap(),
            None => Target::Repository(place),
        };
        let indexes = [(layer.blob.digest.parse().unwrap(), bytes.clone().into())];
        push(&registry, &target, None, &indexes).await.unwrap();
    });
    bytes
}

/// An eStargz blob with the two files' contents exchanged, filled up in front, and the digest of its table.
fn false_estargz(case: &str, fill: usize) -> (Vec<u8>, String) {
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let mut blob = gzip(&noise(1, fill));
    let mut entries = vec![json!({"name": format!("{case}/"), "type": "dir", "mode": 0o755})];
    for (name, word) in [("one", "two"), ("two", "one")] {
        let bytes = content(word, case);
        let digest = Digest::of(&bytes).to_string();
        entries.push(json!({
            "name": format!("{case}/{name}"), "type": "reg", "size": bytes.len(), "mode": 0o644, "offset": blob.len(),
            "digest": digest, "chunkDigest": digest,
        }));
        blob.extend(gzip(&bytes));
    }
    let table = json!({"version": 1, "entries": entries}).to_string().into_bytes();
    let place = blob.len();
    let digest = Digest::of(&table).to_string();
    let tar = Layer::of(Compression::None, [Entry::file("stargz.index.json", table)]);
    blob.extend(gzip(&tar.blob.bytes));
    let mut footer = vec![0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 26, 0, b'S', b'G', 22, 0];
    footer.extend(format!("{place:016x}STARGZ").into_bytes());
    footer.extend([1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    blob.extend(footer);
    (blob, digest)
}

/// A gzip layer whose blob has exactly `len` bytes, which is a little more than it needs.
fn padded(case: &str, len: usize) -> Layer {
    let tar = Layer::of(Compression::None, entries(case, false));
    let make = |extra: usize| {
        let builder = flate2::GzBuilder::new().extra(vec![0; extra]);
        let mut encoder = builder.write(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&tar.blob.bytes).unwrap();
        encoder.finish().unwrap()
    };
    let layer = Layer::from_blob(Compression::Gzip, make(len - make(0).len()));
    assert_eq!(layer.blob.bytes.len(), len);
    layer
}

/// All cases, pushed.
fn cases(ground: &Ground, liar: &FaultRegistry, base: &Layer) -> Vec<Case> {
    let ours = ground.proxy.host();
    let mut cases = Vec::new();
    let gzip = |case| Layer::of(Compression::Gzip, entries(case, false));
    let mut add = |name: &'static str, honest: &Layer, hostile: Image, repository: &str, fools_itself| {
        ground.registry.push(&hostile, &format!("{repository}:{name}"));
        cases.push(Case {
            name,
            honest: image(&[base, honest]),
            hostile,
            hostile_at: format!("{ours}/{repository}:{name}"),
            fools_itself,
        });
    };

    let layer = gzip("soci");
    let index = false_soci(ground, "evil/app", &layer, "soci");
    let hostile = annotated(image(&[base, &layer]), &[(INDEX_DIGEST, index)]);
    add("soci", &layer, hostile, "evil/app", [true, true]);

    let layer = gzip("label");
    let index = false_soci(ground, "evil/app", &layer, "label");
    let hostile = image(&[base, &with_annotations(&layer, &[(LABEL, index)])]);
    add("label", &layer, hostile, "evil/app", [true, true]);

    let layer = Layer::of(Compression::None, entries("portable", false));
    let bytes = false_portable(ground, "evil/app", None, &layer, "portable");
    let named = [
        ("dev.lazuli.index.digest", Digest::of(&bytes).to_string()),
        ("dev.lazuli.index.size", bytes.len().to_string()),
    ];
    let hostile = image(&[base, &with_annotations(&layer, &named)]);
    add("portable", &layer, hostile, "evil/app", [true, true]);

    // The tenant's own repository is trusted, as far as its own images go.
    let layer = Layer::of(Compression::None, entries("beside", false));
    let hostile = annotated(image(&[base, &layer]), &[("of", "a tenant".to_owned())]);
    add("beside", &layer, hostile.clone(), "trusted/app", [true, false]);
    false_portable(ground, "trusted/app", Some(&hostile.manifest), &layer, "beside");

    // A registry that serves other bytes as the blob.
    let plain = gzip("table").blob.bytes.len();
    let (blob, digest) = false_estargz("table", 10_000);
    assert!(
        blob.len() > plain && blob.len() < plain + 60_000,
        "{} and {plain}",
        blob.len()
    );
    let layer = padded("table", blob.len());
    let annotation = [("containerd.io/snapshot/stargz/toc.digest", digest)];
    let hostile = image(&[base, &with_annotations(&layer, &annotation)]);
    for blob in hostile.blobs() {
        liar.add_blob(blob.bytes.as_slice().to_vec());
    }
    liar.add_false_blob(layer.blob.digest.parse().unwrap(), blob);
    let manifest = liar.add_manifest(hostile.media_type, hostile.manifest.bytes.as_slice().to_vec());
    liar.tag("evil/app", "table", manifest);
    cases.push(Case {
        name: "table",
        honest: image(&[base, &layer]),
        hostile,
        hostile_at: format!("{}/evil/app:table", liar.host()),
        fools_itself: [true, true],
    });
    for case in &cases {
        ground.registry.push(&case.honest, &format!("demo/app:{}", case.name));
        let upper = Layer::of(Compression::Gzip, [Entry::file("upper", case.name.as_bytes())]);
        let stacked = Image::new(Flavour::Oci, [case.honest.layers.clone(), vec![upper]].concat());
        ground.registry.push(&stacked, &format!("demo/stacked:{}", case.name));
        assert_ne!(case.honest.manifest.digest, case.hostile.manifest.digest);
    }
    cases
}

/// What a container of an image reads.
fn reads(machine: &Machine, namespace: &str, reference: &str, case: &str) -> String {
    let containerd = machine.containerd.in_namespace(namespace);
    containerd.sh(
        reference,
        SNAPSHOTTER,
        &format!("head -n 1 /{case}/one; head -n 1 /{case}/two"),
    )
}

fn pull(machine: &Machine, namespace: &str, reference: &str) {
    let containerd = machine.containerd.in_namespace(namespace);
    containerd.pull(reference, SNAPSHOTTER).expect_success();
}

fn right(case: &str) -> String {
    format!("one of {case}\ntwo of {case}\n")
}

fn wrong(case: &str) -> String {
    format!("two of {case}\none of {case}\n")
}

/// Every honest image reads its own files, wherever it is.
fn expect_honest(ground: &Ground, machine: &Machine, cases: &[Case], when: &str) {
    for case in cases {
        for (namespace, repository) in [("own", "app"), ("both", "app"), ("base", "stacked")] {
            let reference = format!("{}/demo/{repository}:{}", ground.proxy.host(), case.name);
            let read = reads(machine, namespace, &reference, case.name);
            assert_eq!(
                read,
                right(case.name),
                "{} in {namespace}, {when}: {}",
                case.name,
                machine.lazuli.log()
            );
        }
    }
}

/// Waits until containerd has found the daemon again.
fn restart(machine: &mut Machine, between: impl FnOnce(&Path)) {
    machine.lazuli.stop();
    between(&machine.lazuli.root());
    machine.lazuli.restart();
    let snapshots = ["snapshots", "--snapshotter", SNAPSHOTTER];
    let probe = machine.containerd.new_id();
    let mut prepare = machine.containerd.ctr(&[&snapshots[..], &["prepare", &probe]].concat());
    wait_until(PATIENCE, || run(&mut prepare, PATIENCE).success().then_some(())).expect("the daemon is found again");
    machine.containerd.ctr_ok(&[&snapshots[..], &["rm", &probe]].concat());
}

fn check(require_signature: bool) {
    if subject() != SNAPSHOTTER || Generation::two().is_none() {
        return;
    }
    let ground = Ground::new("tenants");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let liar = runtime.block_on(FaultRegistry::start());
    let base = Layer::of(Compression::Gzip, base_entries());
    let cases = cases(&ground, &liar, &base);
    let (_, public) = keys(&ground.sandbox.dir("keys"), "a");
    let config = format!(
        "trusted_repositories = [\"REGISTRY/trusted/*\"]\npublic_keys = [{public:?}]\nrequire_signature = {require_signature}"
    );
    let mut machine = ground.machine_with("a", &config, &[liar.host()]);
    for case in &cases {
        let name = case.name;
        let honest = format!("{}/demo/app:{name}", ground.proxy.host());
        let stacked = format!("{}/demo/stacked:{name}", ground.proxy.host());
        // The hostile image first, everywhere.
        for namespace in ["evil", "both", "base"] {
            pull(&machine, namespace, &case.hostile_at);
        }
        let fooled = case.fools_itself[usize::from(require_signature)];
        let expected = if fooled { wrong(name) } else { right(name) };
        assert_eq!(
            reads(&machine, "evil", &case.hostile_at, name),
            expected,
            "{name}: {}",
            machine.lazuli.log()
        );
        pull(&machine, "own", &honest);
        pull(&machine, "both", &honest);
        pull(&machine, "base", &stacked);
        // It still is what it says it is, for itself.
        assert_eq!(reads(&machine, "evil", &case.hostile_at, name), expected, "{name}");
    }
    expect_honest(&ground, &machine, &cases, "fresh");
    restart(&mut machine, |_| {});
    expect_honest(&ground, &machine, &cases, "after a restart");
    // What is on disk of every layer is lost, as if all of it had been evicted.
    restart(&mut machine, |root| {
        for entry in std::fs::read_dir(root.join("layers")).unwrap() {
            let map = entry.unwrap().path().join("map");
            if map.exists() {
                std::fs::remove_file(map).unwrap();
            }
        }
    });
    expect_honest(&ground, &machine, &cases, "with an empty cache");
}

#[test]
fn an_honest_image_shows_its_own_bytes() {
    check(false);
}

#[test]
fn an_honest_image_shows_its_own_bytes_where_signatures_are_required() {
    check(true);
}
