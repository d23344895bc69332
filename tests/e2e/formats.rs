//! Every lazy format passes the same tests: the same tree as overlayfs, for an ordinary image and for odd layers, and laziness.
//!
//! A format is one line at the end of this file: how an image is published in it, what its trees may differ in, and which odd layers its
//! own tools take.

use std::fs;
use std::process::Command;

use serde_json::Value;

use crate::stage::Stage;
use crate::support::containerd::Generation;
use crate::support::image::{Compression, Flavour, Image, Layer, base_entries, ordinary};
use crate::support::lazuli::SNAPSHOTTER;
use crate::support::proxy::Exchange;
use crate::support::sandbox::{PATIENCE, require_program, run, run_ok, wait_until};
use crate::support::tar::{Entry, noise};
use crate::support::torture::{self, Case};
use crate::support::tree::Options;

/// Entries that the ordinary image has at least; a comparison of less compared nothing.
const ORDINARY_ENTRIES: usize = 360;
/// Files of the layer that shows laziness, and bytes of each: 200 MB that do not compress.
const FILES: u64 = 100;
const FILE_LEN: usize = 2_000_000;
/// Of the layer's blob, the part that one small file may cost, in percent.
const MOST_PERCENT: u64 = 2;

/// A lazy format.
struct Format {
    /// Publishes an image in this format, with everything that makes it lazy, and returns its reference.
    publish: fn(&Stage, &Image, &str) -> String,
    /// What its trees may differ in.
    options: fn() -> Options,
    /// Odd layers that the format can express and its tools take.
    torture: &'static [fn() -> Case],
}

impl Format {
    fn same_tree(&self, name: &str) {
        let stage = Stage::new(name, Generation::One);
        let reference = (self.publish)(&stage, &ordinary(Flavour::Oci, Compression::Gzip), "formats/ordinary:1");
        let comparison = stage.compare(&reference, &(self.options)()).expect_equal();
        assert!(comparison.entries > ORDINARY_ENTRIES, "{comparison:?}");
        assert!(comparison.bytes > 5_000_000, "{comparison:?}");
    }

    fn torture(&self, name: &str) {
        let stage = Stage::new(name, Generation::One);
        for case in self.torture {
            let case = case();
            let reference = (self.publish)(&stage, &case.image, &format!("torture/{}:1", case.name));
            let options = Options {
                implied_dirs: case.implied_dirs.clone(),
                ..(self.options)()
            };
            let comparison = stage.compare(&reference, &options);
            assert!(
                comparison.differences.is_empty(),
                "{}: {:#?}",
                case.name,
                comparison.differences
            );
        }
    }

    /// Pulled by stock `ctr` where that is lazy, the image is there before its bytes, and a small file costs little more than itself.
    fn lazy(&self, name: &str) {
        let stage = Stage::new(name, Generation::One);
        if stage.lazuli.is_none() {
            return;
        }
        let mut entries = vec![Entry::dir("data"), Entry::file("data/small", "a small file\n")];
        entries.extend((0..FILES).map(|i| Entry::file(format!("data/f{i}"), noise(i + 1, FILE_LEN))));
        let layers = vec![
            Layer::of(Compression::Gzip, base_entries()),
            Layer::of(Compression::None, entries),
        ];
        let reference = (self.publish)(&stage, &Image::new(Flavour::Oci, layers), "formats/large:1");
        stage.proxy.take();
        stage.pull(&reference);
        let manifest = stage.containerd.manifest(&reference);
        let layer = &manifest["layers"][1];
        let (digest, size) = (layer["digest"].as_str().unwrap(), layer["size"].as_u64().unwrap());
        assert!(size > 190_000_000, "the layer has only {size} bytes");
        assert_eq!(stage.sh(&reference, "cat /data/small"), "a small file\n");
        let of_layer = |exchange: &Exchange| exchange.is_blob() && exchange.path.contains(digest);
        let exchanges = stage.proxy.exchanges();
        let fetched: u64 = exchanges.iter().filter(|e| of_layer(e)).map(|e| e.bytes).sum();
        eprintln!("{name}: {fetched} of {size} bytes fetched");
        assert!(
            fetched > 0 && fetched * 100 < size * MOST_PERCENT,
            "a small file cost {fetched} of {size} bytes: {exchanges:#?}"
        );
        let status = stage.lazuli.as_ref().unwrap().status();
        let layers = status["layers"].as_array().unwrap();
        let live = layers.iter().find(|layer| layer["digest"] == digest).unwrap();
        assert_eq!(
            (&live["lazy"], &live["not_lazy"]),
            (&true.into(), &Value::Null),
            "{live}"
        );
        // And all the rest is right as well.
        let sum = "cat /data/f* | sha256sum; sha256sum < /data/small";
        assert_eq!(stage.sh(&reference, sum), stage_sum(&stage, &reference, sum));
    }
}

/// What a script says of an image on overlayfs.
fn stage_sum(stage: &Stage, reference: &str, script: &str) -> String {
    use crate::support::containerd::REFERENCE;
    stage.containerd.pull(reference, REFERENCE).expect_success();
    stage.containerd.sh(reference, REFERENCE, script)
}

macro_rules! formats {
    ($($name:ident: $publish:expr, $options:expr, [$($torture:ident)*];)*) => {
        $(
            mod $name {
                use super::*;

                const FORMAT: Format = Format {
                    publish: $publish,
                    options: $options,
                    torture: &[$(torture::$torture),*],
                };

                #[test]
                fn same_tree() {
                    FORMAT.same_tree(concat!("formats::", stringify!($name), "::same_tree"));
                }

                #[test]
                fn torture_layers() {
                    FORMAT.torture(concat!("formats::", stringify!($name), "::torture"));
                }

                #[test]
                fn lazy() {
                    FORMAT.lazy(concat!("formats::", stringify!($name), "::lazy"));
                }
            }
        )*
    };
}

/// What stargz' tables cannot say, or its layers say besides: whole seconds only, and files that are no part of the image.
fn stargz_options() -> Options {
    Options {
        ignored_root_names: ["stargz.index.json", ".no.prefetch.landmark", ".prefetch.landmark"]
            .map(str::to_owned)
            .into(),
        whole_seconds: true,
        ..Options::default()
    }
}

fn estargz(stage: &Stage, image: &Image, name: &str) -> String {
    stage.push_converted(image, name, &["--estargz"])
}

fn stargz_zstd(stage: &Stage, image: &Image, name: &str) -> String {
    stage.push_converted(image, name, &["--zstdchunked"])
}

/// eStargz with the tables of contents in an image of their own: what newer converters make, put together from what this one makes.
fn estargz_external(stage: &Stage, image: &Image, name: &str) -> String {
    let mut converted = stage.converted(image, &["--estargz"]).layers;
    let mut tables = Vec::new();
    for layer in &mut converted {
        let blob = &layer.blob.bytes;
        let footer = blob.len() - 51;
        let digits = std::str::from_utf8(&blob[footer + 16..footer + 32]).unwrap();
        let toc = usize::from_str_radix(digits, 16).unwrap();
        let mut contents = blob[..toc].to_vec();
        contents.extend([0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 21, 0, b'S', b'G', 17, 0]);
        contents.extend(b"STARGZEXTERNALTOC");
        contents.extend([1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
        let mut table = Layer::from_blob(Compression::Gzip, blob[toc..footer].to_vec());
        let annotations = std::mem::take(&mut layer.annotations);
        *layer = Layer::from_blob(Compression::Gzip, contents);
        layer.annotations = annotations;
        let key = "containerd.io/snapshot/stargz/layer.digest".to_owned();
        table.annotations.insert(key, layer.blob.digest.clone());
        tables.push(table);
    }
    stage.push(&Image::new(Flavour::Oci, tables), &format!("{name}-esgztoc"));
    stage.push(&Image::new(Flavour::Oci, converted), name)
}

/// Copies an image with skopeo, which compresses it as containers/storage does.
fn skopeo_copy(stage: &Stage, image: &Image, to: &str) {
    let layout = stage.sandbox.dir(format!("layout-{}", stage.containerd.new_id()));
    image.write_layout(&layout, "1");
    let mut skopeo = Command::new(require_program("skopeo"));
    skopeo
        .args(["--insecure-policy", "copy", "--dest-tls-verify=false"])
        .args(["--dest-compress-format", "zstd:chunked"])
        .arg(format!("oci:{}:1", layout.display()))
        .arg(to);
    run_ok(&mut skopeo);
    fs::remove_dir_all(&layout).unwrap();
}

/// zstd:chunked as Debian's skopeo writes it: the dialect of containers/storage before 2024.
fn skopeo(stage: &Stage, image: &Image, name: &str) -> String {
    skopeo_copy(stage, image, &format!("docker://{}/{name}", stage.registry.host()));
    format!("{}/{name}", stage.proxy.host())
}

/// The same with the annotations of today's containers/storage.
fn containers_storage(stage: &Stage, image: &Image, name: &str) -> String {
    let dir = stage.sandbox.dir(format!("chunked-{}", stage.containerd.new_id()));
    skopeo_copy(stage, image, &format!("oci:{}:1", dir.display()));
    let blob = |digest: &Value| {
        let hex = digest.as_str().unwrap().trim_start_matches("sha256:");
        fs::read(dir.join("blobs/sha256").join(hex)).unwrap()
    };
    let index: Value = serde_json::from_slice(&fs::read(dir.join("index.json")).unwrap()).unwrap();
    let manifest: Value = serde_json::from_slice(&blob(&index["manifests"][0]["digest"])).unwrap();
    let descriptors = manifest["layers"].as_array().unwrap().iter();
    let layers = descriptors.map(|descriptor| {
        let mut layer = Layer::from_blob(Compression::Zstd, blob(&descriptor["digest"]));
        for (key, value) in descriptor["annotations"].as_object().unwrap() {
            let key = key.replace("io.containers.", "io.github.containers.");
            layer.annotations.insert(key, value.as_str().unwrap().to_owned());
        }
        layer
    });
    let image = Image::new(Flavour::Oci, layers.collect());
    fs::remove_dir_all(&dir).unwrap();
    stage.push(&image, name)
}

formats! {
    estargz: estargz, stargz_options, [sizes whiteouts devices];
    estargz_external: estargz_external, stargz_options, [sizes whiteouts devices];
    zstd_chunked_stargz: stargz_zstd, stargz_options, [sizes whiteouts devices];
    zstd_chunked_skopeo: skopeo, Options::default, [links metadata xattrs sizes whiteouts devices];
    zstd_chunked_containers_storage: containers_storage, Options::default, [links sizes whiteouts];
}

/// What the author of an eStargz image wants ahead is fetched after the pull, without anybody asking for it.
#[test]
fn landmarks_are_prefetched() {
    let stage = Stage::new("formats::landmarks_are_prefetched", Generation::One);
    let Some(lazuli) = &stage.lazuli else { return };
    let mut entries = vec![Entry::dir("data")];
    entries.extend((0..20).map(|i| Entry::file(format!("data/f{i}"), noise(i + 1, 500_000))));
    let layers = vec![
        Layer::of(Compression::Gzip, base_entries()),
        Layer::of(Compression::Gzip, entries),
    ];
    let image = Image::new(Flavour::Oci, layers);
    let record = stage.sandbox.path("record.json");
    let lines = [17, 3].map(|i| {
        format!(
            "{{\"path\":\"data/f{i}\",\"manifestDigest\":\"{}\",\"layerIndex\":1}}\n",
            image.manifest.digest
        )
    });
    fs::write(&record, lines.concat()).unwrap();
    let record = record.display().to_string();
    let reference = stage.push_converted(
        &image,
        "formats/ahead:1",
        &["--estargz", "--estargz-record-in", &record],
    );
    stage.pull(&reference);
    let digest = stage.containerd.manifest(&reference)["layers"][1]["digest"].clone();
    let present = || {
        let status = lazuli.status();
        let mut layers = status["layers"].as_array().unwrap().iter();
        layers.find(|layer| layer["digest"] == digest).unwrap()["present_bytes"]
            .as_u64()
            .unwrap()
    };
    wait_until(PATIENCE, || (present() >= 1_000_000).then_some(())).expect("nothing is fetched ahead");
    assert!(present() < 5_000_000, "{} bytes were fetched ahead", present());
    stage.proxy.take();
    let sum = stage.sh(&reference, "cat /data/f17 /data/f3 | wc -c");
    assert_eq!(sum, "1000000\n");
    let path = digest.as_str().unwrap();
    let asked = stage
        .blob_requests()
        .into_iter()
        .filter(|exchange| exchange.path.contains(path));
    assert_eq!(asked.count(), 0, "what was fetched ahead is fetched again");
}

/// Every layer that is not lazy has a reason in `lazuli status`, in both forms, and in what `lazuli pull` says.
#[test]
fn what_is_not_lazy_says_why() {
    let stage = Stage::new("formats::what_is_not_lazy_says_why", Generation::One);
    let Some(lazuli) = &stage.lazuli else { return };
    let file = |name: &str| [Entry::file(name, noise(9, 400_000))];
    let mut nydus = Layer::of(Compression::Gzip, file("nydus"));
    nydus
        .annotations
        .insert("containerd.io/snapshot/nydus-blob".into(), "true".into());
    let mut damaged = Layer::of(Compression::Gzip, file("damaged"));
    let digest = format!("sha256:{}", "0".repeat(64));
    damaged
        .annotations
        .insert("containerd.io/snapshot/stargz/toc.digest".into(), digest);
    let layers = vec![
        Layer::of(Compression::Gzip, base_entries()),
        Layer::of(Compression::Zstd, file("zstd")),
        damaged,
        nydus,
    ];
    let reasons = [
        "its manifest names no table of contents",
        "its zstd frame can only be read from the beginning",
        "its table of contents cannot be used",
        "a layer in a format of nydus",
    ];
    let image = Image::new(Flavour::Oci, layers);
    let reference = stage.push(&image, "formats/reasons:1");
    let pulled = stage.pull(&reference).text();
    let table = run_ok(&mut lazuli.command("status", &[])).text();
    for text in [&pulled, &table] {
        for (layer, reason) in image.layers.iter().zip(reasons) {
            let short = &layer.blob.digest["sha256:".len()..][..12];
            let line = text.lines().find(|line| line.contains(short));
            assert!(
                line.is_some_and(|line| line.contains(reason)),
                "{short}: {reason}\n{text}"
            );
        }
    }
    let status = lazuli.status();
    for (layer, reason) in image.layers.iter().zip(reasons).take(3) {
        let mut layers = status["layers"].as_array().unwrap().iter();
        let live = layers.find(|live| live["digest"] == *layer.blob.digest).unwrap();
        assert!(live["not_lazy"].as_str().unwrap().contains(reason), "{live}");
    }
    let refused = status["images"][0]["layers"][3]["refused"].as_str().unwrap();
    assert!(refused.contains(reasons[3]), "{refused}");
    let log = lazuli.log();
    for reason in reasons {
        assert!(log.contains(reason), "the log does not say: {reason}");
    }
}

/// A layer that nobody can read, containerd neither, is named with its reason as well; so are the others of its image.
#[test]
fn what_nobody_reads_says_why() {
    let stage = Stage::new("formats::what_nobody_reads_says_why", Generation::One);
    let Some(lazuli) = &stage.lazuli else { return };
    let kinds = [
        (
            "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
            "an encrypted layer",
        ),
        ("application/vnd.example.layer.v9", "a layer of unknown type"),
        (
            "application/vnd.oci.image.layer.nydus.blob.v1",
            "a layer in a format of nydus",
        ),
    ];
    let layers = kinds.iter().enumerate().map(|(i, (kind, _))| {
        let mut layer = Layer::of(Compression::Gzip, [Entry::file(format!("f{i}"), "text")]);
        layer.media_type = Some((*kind).to_owned());
        layer
    });
    let image = Image::new(Flavour::Oci, layers.collect());
    let reference = stage.push(&image, "formats/unread:1");
    let pulled = run(&mut lazuli.command("pull", &[&reference]), PATIENCE);
    assert!(!pulled.success(), "{}", pulled.describe());
    // Asked for the first layer only, the daemon has looked at all of them.
    let reasons = || {
        let status = lazuli.status();
        let layers = status["images"][0]["layers"].as_array().cloned().unwrap_or_default();
        let texts = layers
            .iter()
            .map(|layer| layer["refused"].as_str().unwrap_or_default().to_owned());
        texts.collect::<Vec<_>>()
    };
    let complete = wait_until(PATIENCE, || {
        let reasons = reasons();
        (reasons.len() == kinds.len() && reasons.iter().all(|text| !text.is_empty())).then_some(reasons)
    });
    let complete = complete.unwrap_or_else(|| panic!("reasons are missing: {:?}", reasons()));
    for ((kind, reason), text) in kinds.iter().zip(complete) {
        assert!(text.contains(reason) && text.contains(kind), "{text}");
    }
    assert_eq!(
        lazuli.status()["layers"].as_array().map(Vec::len),
        Some(0),
        "{SNAPSHOTTER} serves one of them"
    );
}
