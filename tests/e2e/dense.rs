//! A dense node: many images on few bases, and one copy of what they have in common.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::faces;
use crate::stage::{Stage, generations, subject};
use crate::support::containerd::{Generation, REFERENCE};
use crate::support::image::{Compression, Flavour, Image, Layer, base_entries};
use crate::support::lazuli::{Lazuli, SNAPSHOTTER};
use crate::support::sandbox::{PATIENCE, run, run_ok, wait_until};
use crate::support::tar::{Entry, noise};
use crate::support::tree::{Options, compare};

/// Bytes of the large file of a layer: more than what is worth sharing.
const LARGE: usize = 3_000_000;

/// A layer with one large file of its own, and what it does to those below.
fn layer(name: &str, more: impl IntoIterator<Item = Entry>) -> Layer {
    let seed = name.bytes().map(u64::from).sum();
    let own = [
        Entry::dir("data"),
        Entry::file(format!("data/{name}"), noise(seed, LARGE)),
    ];
    Layer::of(Compression::Gzip, own.into_iter().chain(more))
}

/// The lower layers of all these images.
fn base() -> Vec<Layer> {
    let second = [
        Entry::dir("shared"),
        Entry::file("shared/kept", "kept"),
        Entry::file("shared/replaced", "as the base has it"),
        Entry::file("shared/removed", "gone above"),
        Entry::dir("cleared"),
        Entry::file("cleared/low", "gone above"),
    ];
    vec![Layer::of(Compression::Gzip, base_entries()), layer("base", second)]
}

fn image(layers: Vec<Layer>) -> Image {
    Image::new(Flavour::Oci, layers)
}

/// An application on `below`: two layers, of which the second changes what the first and the base have.
fn application(mut below: Vec<Layer>, name: &str) -> Image {
    let first = [
        Entry::dir("shared"),
        Entry::file("shared/replaced", format!("{name} has it")),
        Entry::file("shared/.wh.removed", ""),
        Entry::file("app-file", "replaced by a directory"),
    ];
    let second = [
        Entry::dir("cleared"),
        Entry::file("cleared/.wh..wh..opq", ""),
        Entry::file("cleared/high", name),
        Entry::dir("app-file"),
        Entry::file("app-file/inside", name),
    ];
    below.push(layer(&format!("{name}-1"), first));
    below.push(layer(&format!("{name}-2"), second));
    image(below)
}

/// Names of the images of segments that are stored.
fn stored(lazuli: &Lazuli) -> Vec<String> {
    let files = fs::read_dir(lazuli.root().join("faces")).unwrap();
    let names = files.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.ends_with(".chain")).collect()
}

/// Names of the EROFS mounts of the daemon.
fn mounted(lazuli: &Lazuli) -> BTreeSet<String> {
    faces::mounted(lazuli).into_iter().collect()
}

/// Waits until no segment is being made, and there are `count` of several layers.
fn until_merged(lazuli: &Lazuli, count: usize) {
    let settled = || {
        let status = lazuli.status();
        let chains = status["chains"].as_array()?.clone();
        let stored = chains.iter().filter(|chain| chain["state"] == "stored").count();
        (stored >= count && stored == chains.len()).then_some(())
    };
    wait_until(PATIENCE, settled).unwrap_or_else(|| panic!("{count} are expected: {:#}", lazuli.status()["chains"]));
}

fn is_image_face(lazuli: &Lazuli) -> bool {
    lazuli.status()["face"]["face"] == "image"
}

/// Containers in containers: an overlay over the whole of what a container sees.
fn nested(stage: &Stage, root: &Path) {
    let [upper, work, merged] = ["upper", "work", "merged"].map(|name| {
        let key = stage.containerd.new_id();
        stage.sandbox.dir(format!("nested/{key}-{name}"))
    });
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        root.display(),
        upper.display(),
        work.display()
    );
    run_ok(
        Command::new("mount")
            .args(["-t", "overlay", "overlay", "-o", &options])
            .arg(&merged),
    );
    assert_eq!(fs::read(merged.join("data/base")).unwrap().len(), LARGE);
    assert_eq!(fs::read_to_string(merged.join("shared/kept")).unwrap(), "kept");
    fs::write(merged.join("shared/kept"), "changed").unwrap();
    fs::remove_file(merged.join("data/base")).unwrap();
    assert!(!merged.join("data/base").exists() && root.join("data/base").exists());
    // A process that another test has just begun may have it open for a moment.
    let unmounted = || {
        run(Command::new("umount").arg(&merged), PATIENCE)
            .success()
            .then_some(())
    };
    wait_until(PATIENCE, unmounted).expect("an overlay that nobody uses cannot be unmounted");
    assert_eq!(fs::read_to_string(upper.join("shared/kept")).unwrap(), "changed");
}

/// Three images on one base mount the base once; a fourth that branches within the base splits it for those who come then; what is seen is
/// what overlayfs shows; and what nobody needs goes.
#[test]
fn images_on_one_base_mount_it_once() {
    if subject() != SNAPSHOTTER {
        return;
    }
    for generation in generations() {
        let stage = Stage::new("images_on_one_base_mount_it_once", generation);
        let lazuli = stage.lazuli.as_ref().unwrap();
        let names = ["one", "two", "three"];
        let references = names.map(|name| {
            let image = application(base(), name);
            let reference = stage.push(&image, &format!("dense/{name}:1"));
            stage.pull(&reference);
            stage.containerd.pull(&reference, REFERENCE).expect_success();
            reference
        });
        if !is_image_face(lazuli) {
            eprintln!("nothing to look at: the tree face serves");
            return;
        }
        // The base, and two layers of each image; the first image's own chain is there from when it was alone.
        until_merged(lazuli, 4);
        let same = |reference: &str| {
            let expected = stage.containerd.view(reference, REFERENCE);
            let view = stage.containerd.view(reference, SNAPSHOTTER);
            compare(&expected.path, &view.path, &Options::default()).expect_equal();
            view
        };
        let views = references.each_ref().map(|reference| same(reference));
        assert_eq!(
            mounted(lazuli).len(),
            4,
            "the base and three tops: {:?}",
            mounted(lazuli)
        );

        nested(&stage, &views[0].path);

        // It has the lower layer of the base, and another one above it.
        let mut other = base();
        let more = [
            Entry::dir("shared"),
            Entry::file("shared/removed", ""),
            Entry::dir("cleared"),
        ];
        other[1] = layer("other-base", more);
        let fourth = stage.push(&application(other, "four"), "dense/four:1");
        stage.pull(&fourth);
        stage.containerd.pull(&fourth, REFERENCE).expect_success();
        until_merged(lazuli, 4);
        let before = mounted(lazuli);
        let _others = (same(&fourth), same(&references[0]));
        // Those that run keep what they have.
        assert!(
            mounted(lazuli).is_superset(&before),
            "{before:?}, {:?}",
            mounted(lazuli)
        );
        for (view, name) in views.iter().zip(names) {
            let read = fs::read(view.path.join("data/base")).unwrap();
            assert!(read == noise("base".bytes().map(u64::from).sum(), LARGE));
            assert_eq!(fs::read_to_string(view.path.join("app-file/inside")).unwrap(), name);
        }
    }
}

/// It does not matter which of them came first: a base that is an image itself is cut off from what was on it before.
#[test]
fn a_base_that_comes_after_its_image_is_shared_too() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let stage = Stage::new(
        "a_base_that_comes_after_its_image_is_shared_too",
        generations().remove(0),
    );
    let lazuli = stage.lazuli.as_ref().unwrap();
    let references = [("app", application(base(), "app")), ("base", image(base()))].map(|(name, image)| {
        let reference = stage.push(&image, &format!("dense/{name}:1"));
        stage.pull(&reference);
        reference
    });
    if !is_image_face(lazuli) {
        eprintln!("nothing to look at: the tree face serves");
        return;
    }
    // A pull of what is there tells nobody; the first container does.
    drop(stage.containerd.view(&references[1], SNAPSHOTTER));
    // All of the application's, from when it was alone; the base; and what the application has above it.
    until_merged(lazuli, 3);
    let _application = stage.containerd.view(&references[0], SNAPSHOTTER);
    let status = lazuli.status();
    let is_top = |chain: &serde_json::Value| chain["is_upper"] == true && chain["mounted"] == true;
    assert!(
        status["chains"].as_array().unwrap().iter().any(is_top),
        "the application is not cut: {:#}",
        status["chains"]
    );
    let with_application = mounted(lazuli);
    let _base = stage.containerd.view(&references[1], SNAPSHOTTER);
    assert_eq!(mounted(lazuli), with_application, "the base is there");
}

/// After a restart, segments are what they were, without anything being made anew.
#[test]
fn segments_survive_a_restart_and_go_with_their_images() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let mut stage = Stage::new(
        "segments_survive_a_restart_and_go_with_their_images",
        generations().remove(0),
    );
    let references = ["one", "two"].map(|name| {
        let reference = stage.push(&application(base(), name), &format!("dense/{name}:1"));
        stage.pull(&reference);
        reference
    });
    let lazuli = stage.lazuli.as_ref().unwrap();
    if !is_image_face(lazuli) {
        eprintln!("nothing to look at: the tree face serves");
        return;
    }
    until_merged(lazuli, 3);
    let view = stage.containerd.view(&references[1], SNAPSHOTTER);
    let before = mounted(lazuli);
    assert_eq!(before.len(), 2, "{before:?}");
    let digests = |lazuli: &Lazuli| {
        let chains = lazuli.status()["chains"].as_array().unwrap().clone();
        chains
            .iter()
            .map(|chain| chain["digest"].as_str().unwrap().to_owned())
            .collect::<BTreeSet<_>>()
    };
    let known = digests(lazuli);
    drop(view);
    stage.restart_daemon();
    let lazuli = stage.lazuli.as_ref().unwrap();
    assert!(digests(lazuli).is_subset(&known), "{:#}", lazuli.status()["chains"]);
    let view = stage.containerd.view(&references[1], SNAPSHOTTER);
    // What was mounted from files may be read through the daemon until it is verified.
    let slots = |names: &BTreeSet<String>| {
        names
            .iter()
            .map(|name| name.split('.').next().unwrap().to_owned())
            .collect::<BTreeSet<_>>()
    };
    assert_eq!(slots(&mounted(lazuli)), slots(&before));
    drop(view);
    // Layers that nothing refers to stay for a while; a restart does not wait for that.
    for reference in &references {
        stage.containerd.remove_image(reference);
    }
    stage.restart_daemon();
    assert_eq!(stored(stage.lazuli.as_ref().unwrap()), [] as [String; 0]);
}

/// Two images that install the same package in layers of their own: the second fetches of it what only the second has, whoever is restarted.
#[test]
fn files_that_another_layer_has_are_not_fetched_again() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let mut stage = Stage::new("dense::same_files", Generation::One);
    let package = |dir: &str, own: u64| {
        let files = (0..10).map(|number| Entry::file(format!("{dir}/file-{number}"), noise(number, LARGE / 10)));
        let own = Entry::file(format!("{dir}/own"), noise(own, LARGE / 10));
        image(vec![Layer::of(
            Compression::Gzip,
            [Entry::dir(dir)].into_iter().chain(files).chain([own]),
        )])
    };
    let (first, second) = (package("opt", 1000), package("srv", 2000));
    let [first, second] = [("first", first), ("second", second)]
        .map(|(name, image)| stage.push_converted(&image, &format!("same/{name}:1"), &["--estargz"]));
    stage.pull(&first);
    let view = stage.containerd.view(&first, &subject());
    for number in 0..10 {
        assert!(fs::read(view.path.join(format!("opt/file-{number}"))).unwrap() == noise(number, LARGE / 10));
    }
    drop(view);
    assert!(stage.lazuli().stop());
    stage.restart_daemon();
    stage.pull(&second);
    stage.proxy.take();
    let view = stage.containerd.view(&second, &subject());
    for number in 0..10 {
        assert!(fs::read(view.path.join(format!("srv/file-{number}"))).unwrap() == noise(number, LARGE / 10));
    }
    let fetched: u64 = stage.blob_requests().iter().map(|exchange| exchange.bytes).sum();
    assert!(fetched < LARGE as u64 / 5, "{fetched} bytes were fetched");
    assert!(fs::read(view.path.join("srv/own")).unwrap() == noise(2000, LARGE / 10));
}
