//! Every lazy format passes the same tests: the same tree as overlayfs, for an ordinary image and for odd layers, and laziness.
//!
//! A format is one line: how an image is published in it, what its trees may differ in, and which odd layers its own tools take. Plain
//! layers count as formats too, once they have an index: it is published beside the image, so that nothing is streamed.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::process::Command;

use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;
use serde_json::Value;

use crate::stage::Stage;
use crate::support::containerd::Generation;
use crate::support::image::{Compression, Flavour, Image, Layer, base_entries, digest_of, ordinary};
use crate::support::lazuli::SNAPSHOTTER;
use crate::support::proxy::Exchange;
use crate::support::sandbox::{COMMAND_TIMEOUT, PATIENCE, require_program, run, run_ok, wait_until};
use crate::support::tar::{Entry, Tar, noise};
use crate::support::torture::{self, Case};
use crate::support::tree::Options;

/// Entries that the ordinary image has at least; a comparison of less compared nothing.
const ORDINARY_ENTRIES: usize = 360;
/// Files of the layer that shows laziness, and bytes of each: 200 MB that do not compress.
const FILES: u64 = 100;
const FILE_LEN: usize = 2_000_000;
/// Of the layer's blob, the part that one small file may cost, in percent.
const MOST_PERCENT: u64 = 2;
/// Layers with a table of contents whose blobs are smaller than this (bytes) are streamed.
const STREAM_BELOW: u64 = 256 << 10;
/// The daemon believes what lies beside the images of these tests.
const TRUSTING: &str = "[index]\ntrusted_repositories = [\"REGISTRY/formats/*\", \"REGISTRY/torture/*\"]\n";
/// Bytes that every plain layer is made larger by: those below 256 KiB are not worth an index.
const BALLAST: usize = 300_000;
/// Uncompressed bytes of a SOCI span: its own tool's 4 MiB are more than the part that is allowed here.
const SPAN: &str = "1048576";
/// Bytes of the tar in each gzip member, as bgzip cuts it, and in each zstd frame.
const MEMBER: usize = 65_280;
const FRAME: usize = 1 << 20;

/// A lazy format.
struct Format {
    /// Publishes an image in this format, with everything that makes it lazy, and returns its reference.
    publish: fn(&Stage, &Image, &str) -> String,
    /// What its trees may differ in.
    options: fn() -> Options,
    /// Where the daemon has the index of each layer from: `image`, or what else the status names.
    source: &'static str,
    /// Odd layers that the format can express and its tools take.
    torture: &'static [fn() -> Case],
}

impl Format {
    fn same_tree(&self, name: &str) {
        let stage = Stage::with(name, Generation::One, TRUSTING, |_| {});
        let reference = (self.publish)(&stage, &ordinary(Flavour::Oci, Compression::Gzip), "formats/ordinary:1");
        let comparison = stage.compare(&reference, &(self.options)()).expect_equal();
        self.check_sources(&stage, &reference);
        assert!(comparison.entries > ORDINARY_ENTRIES, "{comparison:?}");
        assert!(comparison.bytes > 5_000_000, "{comparison:?}");
    }

    /// Whether the index of each layer of an image comes from where it should: what was streamed shows nothing about a format.
    fn check_sources(&self, stage: &Stage, reference: &str) {
        let Some(lazuli) = &stage.lazuli else { return };
        let status = lazuli.status();
        let manifest = stage.containerd.manifest(reference);
        for layer in manifest["layers"].as_array().unwrap() {
            // A table of contents is not worth a request where all of the layer takes one.
            if self.source == "image" && layer["size"].as_u64().unwrap() < STREAM_BELOW {
                continue;
            }
            let mut live = status["layers"].as_array().unwrap().iter();
            let live = live.find(|live| live["digest"] == layer["digest"]);
            let live = live.unwrap_or_else(|| panic!("{} is not served: {status:#}", layer["digest"]));
            let found = (&live["index"]["source"], &live["lazy"]);
            assert_eq!(found, (&self.source.into(), &true.into()), "{reference}: {live:#}");
        }
    }

    fn torture(&self, name: &str) {
        let stage = Stage::with(name, Generation::One, TRUSTING, |_| {});
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
            self.check_sources(&stage, &reference);
        }
    }

    /// Pulled by stock `ctr` of containerd 2.x if that is here, by `lazuli pull` otherwise, the image is there before its bytes, and a
    /// small file costs little more than itself.
    fn lazy(&self, name: &str) {
        let generation = Generation::two().unwrap_or(Generation::One);
        let stage = Stage::with(name, generation, TRUSTING, |_| {});
        if stage.lazuli.is_none() {
            return;
        }
        let mut entries = vec![Entry::dir("data"), Entry::file("data/small", "a small file\n")];
        let files: BTreeMap<String, Vec<u8>> = (0..FILES)
            .map(|i| (format!("data/f{i}"), noise(i + 1, FILE_LEN)))
            .collect();
        let whole = digest_of(&files.values().flatten().copied().collect::<Vec<u8>>());
        entries.extend(files.into_iter().map(|(name, bytes)| Entry::file(name, bytes)));
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
        assert_eq!(live["index"]["source"], self.source, "{live}");
        // And all the rest is right as well: names come in the order of the map.
        let sum = stage.sh(&reference, "cat /data/f* | sha256sum");
        assert_eq!(sum.split_whitespace().next(), whole.strip_prefix("sha256:"));
    }
}

macro_rules! formats {
    ($($name:ident: $publish:expr, $options:expr, $source:literal, [$($torture:ident)*];)*) => {
        $(
            mod $name {
                use super::*;

                const FORMAT: Format = Format {
                    publish: $publish,
                    options: $options,
                    source: $source,
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

/// Pushes an image with its layers compressed anew, each with something in front that makes it worth an index.
fn push_plain(stage: &Stage, image: &Image, name: &str, ballast: usize, compress: impl Fn(&[u8]) -> Layer) -> String {
    let layers = image.layers.iter().enumerate().map(|(number, layer)| {
        let mut tar = Vec::new();
        let ballast = Entry::file(format!("ballast-{number}"), noise(number as u64 + 1, ballast));
        Tar::new(&mut tar).add(ballast).unwrap();
        let blob = layer.blob.bytes.as_slice();
        match layer.compression {
            Compression::None => tar.extend_from_slice(blob),
            Compression::Gzip => drop(MultiGzDecoder::new(blob).read_to_end(&mut tar).unwrap()),
            Compression::Zstd => zstd::stream::copy_decode(blob, &mut tar).unwrap(),
        }
        compress(&tar)
    });
    stage.push(&Image::new(Flavour::Oci, layers.collect()), name)
}

/// Has an index published beside an image.
fn index(stage: &Stage, reference: String) -> String {
    if let Some(lazuli) = &stage.lazuli {
        run(&mut lazuli.command("index", &["push", &reference]), 5 * COMMAND_TIMEOUT).expect_success();
    }
    reference
}

fn plain_gzip(stage: &Stage, image: &Image, name: &str) -> String {
    let compress = |tar: &[u8]| Layer::from_tar(Compression::Gzip, tar);
    index(stage, push_plain(stage, image, name, BALLAST, compress))
}

/// Many small gzip members, as bgzip and `pigz --independent` make them.
fn gzip_members(stage: &Stage, image: &Image, name: &str) -> String {
    let compress = |tar: &[u8]| {
        let mut blob = Vec::new();
        for part in tar.chunks(MEMBER) {
            let mut member = GzEncoder::new(&mut blob, flate2::Compression::fast());
            member.write_all(part).and_then(|()| member.finish().map(drop)).unwrap();
        }
        Layer::from_blob(Compression::Gzip, blob)
    };
    index(stage, push_plain(stage, image, name, BALLAST, compress))
}

fn plain_tar(stage: &Stage, image: &Image, name: &str) -> String {
    let compress = |tar: &[u8]| Layer::from_tar(Compression::None, tar);
    index(stage, push_plain(stage, image, name, BALLAST, compress))
}

/// Several zstd frames, as pzstd makes them.
fn zstd_frames(stage: &Stage, image: &Image, name: &str) -> String {
    let compress = |tar: &[u8]| {
        let frames = tar.chunks(FRAME).map(|part| zstd::encode_all(part, 1).unwrap());
        Layer::from_blob(Compression::Zstd, frames.flatten().collect())
    };
    index(stage, push_plain(stage, image, name, 3 * FRAME, compress))
}

/// Has a SOCI index of an image exported to `to`.
fn soci(stage: &Stage, image: String, version: &str, to: String) -> String {
    if let Some(lazuli) = &stage.lazuli {
        let options = ["--span-size", SPAN, "--min-layer-size", "0", "--push", &to];
        let arguments = [&["export", &image, "--soci", version][..], &options].concat();
        run(&mut lazuli.command("index", &arguments), 5 * COMMAND_TIMEOUT).expect_success();
    }
    to
}

fn soci_v1(stage: &Stage, image: &Image, name: &str) -> String {
    let plain = push_plain(stage, image, name, BALLAST, |tar| {
        Layer::from_tar(Compression::Gzip, tar)
    });
    soci(stage, plain.clone(), "v1", plain)
}

/// The first layer is not compressed, so that both kinds of zTOCs are there.
fn soci_v2(stage: &Stage, image: &Image, name: &str) -> String {
    let first = std::cell::Cell::new(true);
    let compress = |tar: &[u8]| match first.take() {
        true => Layer::from_tar(Compression::None, tar),
        false => Layer::from_tar(Compression::Gzip, tar),
    };
    let plain = push_plain(stage, image, &format!("{name}-plain"), BALLAST, compress);
    soci(stage, plain, "v2", format!("{}/{name}", stage.proxy.host()))
}

formats! {
    estargz: estargz, stargz_options, "image", [xattrs sizes whiteouts base_whiteouts devices];
    estargz_external: estargz_external, stargz_options, "image", [xattrs sizes whiteouts base_whiteouts devices];
    zstd_chunked_stargz: stargz_zstd, stargz_options, "image", [xattrs sizes whiteouts base_whiteouts devices];
    zstd_chunked_skopeo: skopeo, Options::default, "image", [links metadata xattrs sizes whiteouts base_whiteouts devices];
    zstd_chunked_containers_storage: containers_storage, Options::default, "image", [links metadata xattrs sizes whiteouts devices];
    gzip: plain_gzip, Options::default, "shared",
        [names links duplicates metadata xattrs sizes sparse devices whiteouts base_whiteouts implied];
    gzip_of_members: gzip_members, Options::default, "shared", [names links sizes sparse whiteouts implied];
    tar: plain_tar, Options::default, "shared", [names links sizes sparse whiteouts implied];
    zstd_of_frames: zstd_frames, Options::default, "shared", [names links sizes sparse whiteouts implied];
    soci_of_version_1: soci_v1, Options::default, "soci",
        [names links duplicates metadata xattrs sizes devices whiteouts base_whiteouts implied];
    soci_of_version_2: soci_v2, Options::default, "soci", [names links sizes whiteouts];
}

/// What a plain gzip layer lost to others after it was streamed comes back in ranges, and its container does not notice.
#[test]
fn evicted_bytes_of_a_streamed_layer_come_back_in_ranges() {
    const LENGTH: usize = 1_000_000;
    const COUNT: u64 = 24;
    /// Files of the image that takes the place of the first.
    const OTHERS: u64 = 36;
    let config = "[cache]\nmax_size = \"40MiB\"\nmin_free = 0\nhigh_percent = 100\n";
    let stage = Stage::with("formats::evicted_bytes", Generation::One, config, |_| {});
    let Some(lazuli) = &stage.lazuli else { return };
    let files = |seed: u64, count: u64| {
        let dirs = [Entry::dir("data")].into_iter();
        let files = (0..count).map(|i| Entry::file(format!("data/f{i}"), noise(seed + i, LENGTH)));
        Layer::of(Compression::Gzip, dirs.chain(files))
    };
    let image = |seed, count| {
        let base = Layer::of(Compression::Gzip, base_entries());
        Image::new(Flavour::Docker, vec![base, files(seed, count)])
    };
    let (first, second) = (image(1, COUNT), image(1000, OTHERS));
    let layer = &first.layers[1].blob;
    let (reference, other) = (
        stage.push(&first, "evicted/first:1"),
        stage.push(&second, "evicted/second:1"),
    );
    stage.pull(&reference);
    let present = || {
        let status = lazuli.status();
        let mut layers = status["layers"].as_array().unwrap().iter();
        let live = layers.find(|live| live["digest"] == *layer.digest).unwrap();
        assert_eq!(
            (&live["lazy"], &live["index"]["source"]),
            (&true.into(), &"built".into()),
            "{live}"
        );
        live["present_bytes"].as_u64().unwrap()
    };
    let all = present();
    assert!(all > COUNT * LENGTH as u64, "{all} bytes");
    stage.pull(&other);
    let evicted = wait_until(PATIENCE, || (present() < all / 2).then_some(()));
    evicted.unwrap_or_else(|| panic!("{} of {all} bytes are still there", present()));
    stage.proxy.take();
    let of_layer = || {
        let exchanges = stage.blob_requests().into_iter();
        exchanges
            .filter(|exchange| exchange.path.contains(&layer.digest))
            .collect::<Vec<_>>()
    };
    let sum = |i: u64| digest_of(&noise(1 + i, LENGTH)).replace("sha256:", "");
    let text = stage.sh(&reference, "sha256sum < /data/f11");
    assert!(text.starts_with(&sum(11)), "{text}");
    let asked = of_layer();
    let fetched: u64 = asked.iter().map(|exchange| exchange.bytes).sum();
    let whole = layer.bytes.len() as u64;
    assert!(
        !asked.is_empty() && asked.iter().all(|exchange| exchange.range.is_some()),
        "{asked:#?}"
    );
    assert!(
        fetched < whole / 4,
        "{fetched} of {whole} bytes for {LENGTH}: {asked:#?}"
    );
    let text = stage.sh(&reference, "for f in /data/f*; do sha256sum $f; done");
    for i in 0..COUNT {
        assert!(text.contains(&format!("{}  /data/f{i}\n", sum(i))), "f{i}: {text}");
    }
    assert!(
        of_layer().iter().all(|exchange| exchange.range.is_some()),
        "it was streamed again"
    );
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

/// Every layer that is not lazy has a reason in `lazuli status`, in both forms, and in what `lazuli pull` says. A gzip layer is, from its
/// stream on; why it was streamed is in the log.
#[test]
fn what_is_not_lazy_says_why() {
    let stage = Stage::new("formats::what_is_not_lazy_says_why", Generation::One);
    let Some(lazuli) = &stage.lazuli else { return };
    let file = |name: &str| [Entry::file(name, noise(9, 400_000))];
    let mut nydus = Layer::of(Compression::Gzip, file("nydus"));
    nydus
        .annotations
        .insert("containerd.io/snapshot/nydus-blob".into(), "true".into());
    let mut damaged = Layer::of(Compression::Zstd, file("damaged"));
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
        for (layer, reason) in image.layers.iter().zip(reasons).skip(1) {
            let short = &layer.blob.digest["sha256:".len()..][..12];
            let line = text.lines().find(|line| line.contains(short));
            assert!(
                line.is_some_and(|line| line.contains(reason)),
                "{short}: {reason}\n{text}"
            );
        }
    }
    let status = lazuli.status();
    for (number, (layer, reason)) in image.layers.iter().zip(reasons).take(3).enumerate() {
        let mut layers = status["layers"].as_array().unwrap().iter();
        let live = layers.find(|live| live["digest"] == *layer.blob.digest).unwrap();
        if number == 0 {
            assert_eq!(
                (&live["lazy"], &live["not_lazy"]),
                (&true.into(), &Value::Null),
                "{live}"
            );
            continue;
        }
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
