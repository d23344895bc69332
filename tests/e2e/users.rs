//! Containers in user namespaces: they see the owners that their mapping gives, of every kind of layer, and nothing is copied or fetched for it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::stage::{Stage, generations, subject};
use crate::support::containerd::{Generation, REFERENCE};
use crate::support::image::{Compression, Flavour, Image, Layer, application_entries, base_entries, ordinary};
use crate::support::lazuli::SNAPSHOTTER;
use crate::support::proxy::total_bytes;
use crate::support::sandbox::{PATIENCE, mounts_below, run, unmount_below, wait_until};
use crate::support::tar::{Entry, noise};
use crate::support::torture::{self, Case};
use crate::support::tree::{Comparison, Options, compare};

/// Where the ids of a container begin on the host.
const FIRST: u32 = 100_000;
/// Bytes that a container may have of its own before it writes anything.
const COPIED_MAX: u64 = 1 << 20;

/// The root of a container in a user namespace, mounted as containerd says.
struct Mapped<'a> {
    stage: &'a Stage,
    id: String,
    path: PathBuf,
}

impl<'a> Mapped<'a> {
    fn new(stage: &'a Stage, reference: &str, first: u32) -> Self {
        let id = stage.containerd.create_mapped(reference, SNAPSHOTTER, first);
        let path = stage.sandbox.dir(format!("mapped/{id}"));
        let mapped = Mapped { stage, id, path };
        mapped.mount();
        mapped
    }

    fn mount(&self) {
        self.stage.containerd.mount_snapshot(SNAPSHOTTER, &self.id, &self.path);
    }

    /// Bytes of its own.
    fn copied(&self) -> u64 {
        usage(self.stage, &self.id)
    }

    fn end(self) {
        unmount_below(&self.path);
        self.stage.containerd.ctr_ok(&["containers", "rm", &self.id]);
        until_unmounted(self.stage);
    }
}

/// Bytes that a snapshot has of its own.
fn usage(stage: &Stage, key: &str) -> u64 {
    let listed = stage
        .containerd
        .ctr_ok(&["snapshots", "--snapshotter", SNAPSHOTTER, "usage", "-b", key]);
    let text = listed.text();
    let line = text
        .lines()
        .nth(1)
        .unwrap_or_else(|| panic!("no usage of {key}: {text}"));
    line.split_whitespace()
        .nth(1)
        .and_then(|bytes| bytes.parse().ok())
        .unwrap()
}

/// containerd 2.x, whose configuration declares the capability; 1.6 does not know it.
fn stage(name: &str) -> Option<Stage> {
    let generation = Generation::two().filter(|_| subject() == SNAPSHOTTER)?;
    Some(Stage::new(name, generation))
}

/// Mounts of the daemon's containers in user namespaces.
fn mapped_mounts(stage: &Stage) -> Vec<PathBuf> {
    let root = stage.lazuli.as_ref().unwrap().root();
    let mounts = mounts_below(&root.join("snapshots")).into_iter();
    let mut places: Vec<_> = mounts
        .filter(|path| path.parent().is_some_and(|parent| parent.ends_with("lower")))
        .collect();
    places.sort();
    places
}

/// Has containerd remove the snapshots of containers that are gone, and waits until nothing is mounted for any.
fn until_unmounted(stage: &Stage) {
    // It collects garbage when an image is removed.
    let (image, other) = (&stage.containerd.images()[0], "example.invalid/other:1");
    stage.containerd.ctr_ok(&["images", "tag", image, other]);
    stage.containerd.remove_image(other);
    let gone = wait_until(PATIENCE, || mapped_mounts(stage).is_empty().then_some(()));
    assert!(gone.is_some(), "still mounted: {:?}", mapped_mounts(stage));
}

fn compare_mapped(stage: &Stage, reference: &str, options: Options) -> Comparison {
    stage.pull(reference);
    stage.containerd.pull(reference, REFERENCE).expect_success();
    let expected = stage.containerd.view(reference, REFERENCE);
    let mapped = Mapped::new(stage, reference, FIRST);
    assert!(!mapped_mounts(stage).is_empty());
    let options = Options {
        mapped_to: Some(FIRST),
        ..options
    };
    let comparison = compare(&expected.path, &mapped.path, &options).expect_equal();
    assert!(mapped.copied() < COPIED_MAX, "{} bytes were copied", mapped.copied());
    mapped.end();
    comparison
}

/// `ctr run` with a mapping, on every containerd: with the capability nothing is copied; 1.6 changes owners by itself, and is let.
#[test]
fn a_container_is_root_of_its_files_and_of_nothing_else() {
    if subject() != SNAPSHOTTER {
        return;
    }
    for generation in generations() {
        let stage = Stage::new("a_container_is_root_of_its_files", generation);
        let mut layers = ordinary(Flavour::Oci, Compression::Gzip).layers;
        let owners = [
            Entry::dir("owners"),
            Entry::file("owners/user", "user").owner(1000, 50),
            Entry::file("owners/beyond", "beyond").owner(70_000, 65_536),
        ];
        layers.push(Layer::of(Compression::Gzip, owners));
        let reference = stage.push(&Image::new(Flavour::Oci, layers), "users/run:1");
        stage.pull(&reference);
        let script = "cat /proc/self/uid_map; stat -c '%u %g %n' / /bin/busybox /owners/*; \
                      echo mine >/owners/mine; echo more >>/app/lib/p0/m1.txt; stat -c '%u %g %n' /owners/mine /app/lib/p0/m1.txt; \
                      cat /owners/user; echo; sha256sum /app/data/large.bin; (echo no >/owners/beyond) 2>/dev/null || echo refused";
        let told = stage
            .containerd
            .run_mapped(&reference, SNAPSHOTTER, FIRST, script)
            .expect_success();
        let text = told.text();
        let lines: Vec<String> = text
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        let large = "28de41db3d3faa1f05c6c7d2dbdd7e33337037e4f38ceaa9c775bbd630fce013 /app/data/large.bin";
        let expected = [
            "0 100000 65536",
            "0 0 /",
            "0 0 /bin/busybox",
            "65534 65534 /owners/beyond",
            "1000 50 /owners/user",
            "0 0 /owners/mine",
            "0 0 /app/lib/p0/m1.txt",
            "user",
            large,
            "refused",
        ];
        assert_eq!(lines, expected, "{}", told.describe());
        // It is gone with all its mounts.
        until_unmounted(&stage);
        // And containers without a namespace see what they always saw.
        let plain = stage.sh(&reference, "stat -c '%u %g %n' /bin/busybox /owners/*");
        let plain: Vec<&str> = plain.lines().collect();
        assert_eq!(
            plain,
            ["0 0 /bin/busybox", "70000 65536 /owners/beyond", "1000 50 /owners/user"]
        );
    }
}

#[test]
fn plain_layers() {
    let Some(stage) = stage("users_plain_layers") else {
        return;
    };
    let reference = stage.push(&ordinary(Flavour::Oci, Compression::Gzip), "users/plain:1");
    let comparison = compare_mapped(&stage, &reference, Options::default());
    assert!(
        comparison.entries > 360 && comparison.bytes > 5_000_000,
        "{comparison:?}"
    );
}

#[test]
fn estargz_layers() {
    let Some(stage) = stage("users_estargz_layers") else {
        return;
    };
    let image = ordinary(Flavour::Oci, Compression::Gzip);
    let reference = stage.push_converted(&image, "users/estargz:1", &["--estargz"]);
    let options = Options {
        ignored_root_names: ["stargz.index.json", ".no.prefetch.landmark", ".prefetch.landmark"]
            .map(str::to_owned)
            .into(),
        whole_seconds: true,
        ..Options::default()
    };
    let comparison = compare_mapped(&stage, &reference, options);
    assert!(comparison.entries > 360, "{comparison:?}");
}

/// Layers that containerd has unpacked itself, because Lazuli was not asked for them.
#[test]
fn unpacked_layers() {
    let Some(stage) = stage("users_unpacked_layers") else {
        return;
    };
    let reference = stage.push(&ordinary(Flavour::Oci, Compression::Gzip), "users/unpacked:1");
    // A local pull of 2.x names no chain ids.
    let local = [
        "images",
        "pull",
        "--local",
        "--plain-http",
        "--snapshotter",
        SNAPSHOTTER,
        &reference,
    ];
    stage.containerd.ctr_ok(&local);
    let layers = stage.lazuli.as_ref().unwrap().status()["layers"]
        .as_array()
        .map_or(0, Vec::len);
    assert_eq!(layers, 0, "this test is about layers that containerd unpacks");
    stage.containerd.pull(&reference, REFERENCE).expect_success();
    let expected = stage.containerd.view(&reference, REFERENCE);
    let mapped = Mapped::new(&stage, &reference, FIRST);
    let options = Options {
        mapped_to: Some(FIRST),
        ..Options::default()
    };
    let comparison = compare(&expected.path, &mapped.path, &options).expect_equal();
    assert!(comparison.entries > 360, "{comparison:?}");
    mapped.end();
}

fn check_torture(case: &Case) {
    let Some(stage) = stage(case.name) else { return };
    let reference = stage.push(&case.image, &format!("users/{}:1", case.name));
    let options = Options {
        implied_dirs: case.implied_dirs.clone(),
        ..Options::default()
    };
    let comparison = compare_mapped(&stage, &reference, options);
    assert!(comparison.entries > 4, "{comparison:?}");
}

/// The odd layers, in which owners, access lists, capabilities and whiteouts are.
mod torture_layers {
    use super::*;

    #[test]
    fn metadata() {
        check_torture(&torture::metadata());
    }

    #[test]
    fn xattrs() {
        check_torture(&torture::xattrs());
    }

    #[test]
    fn links() {
        check_torture(&torture::links());
    }

    #[test]
    fn devices() {
        check_torture(&torture::devices());
    }

    #[test]
    fn whiteouts() {
        check_torture(&torture::whiteouts());
    }
}

/// A container in a user namespace fetches what it reads and not more, and copies nothing.
#[test]
fn nothing_is_copied_and_only_what_is_read_is_fetched() {
    let Some(stage) = stage("users_nothing_is_copied") else {
        return;
    };
    let files = [Entry::dir("data")];
    let many = (0..16).map(|number| Entry::file(format!("data/{number}"), noise(number, 2 << 20)));
    let image = Image::new(
        Flavour::Oci,
        vec![
            Layer::of(Compression::Gzip, base_entries()),
            Layer::of(Compression::Gzip, files.into_iter().chain(many)),
        ],
    );
    let reference = stage.push_converted(&image, "users/lazy:1", &["--estargz"]);
    stage.pull(&reference);
    stage.proxy.take();
    let mapped = Mapped::new(&stage, &reference, FIRST);
    let made = total_bytes(&stage.proxy.take());
    assert!(made < COPIED_MAX, "{made} bytes were fetched to make a container");
    let read = fs::read(mapped.path.join("data/7")).unwrap();
    assert_eq!(read, noise(7, 2 << 20));
    let fetched = total_bytes(&stage.proxy.take());
    // One file, with what is read ahead of it and what else its requests carry.
    assert!(
        (2 << 20..12 << 20).contains(&fetched),
        "{fetched} bytes were fetched for a file of 2 MiB"
    );
    assert!(mapped.copied() < COPIED_MAX, "{} bytes were copied", mapped.copied());
    mapped.end();
}

/// Containers with mapped owners, of one lazy image, read on while workers are killed.
#[test]
fn readers_do_not_notice_a_killed_worker() {
    use std::os::unix::fs::MetadataExt as _;
    const KILLS: u64 = 5;
    let Some(stage) = stage("users_readers_do_not_notice") else {
        return;
    };
    let files = (0..KILLS).map(|number| Entry::file(format!("data/{number}"), noise(number, 1 << 20)).owner(7, 8));
    let image = Image::new(
        Flavour::Oci,
        vec![
            Layer::of(Compression::Gzip, base_entries()),
            Layer::of(Compression::Gzip, std::iter::once(Entry::dir("data")).chain(files)),
        ],
    );
    let reference = stage.push_converted(&image, "users/killed:1", &["--estargz"]);
    stage.pull(&reference);
    let firsts = [FIRST, FIRST + 65_536];
    let containers = firsts.map(|first| Mapped::new(&stage, &reference, first));
    let mounts = mapped_mounts(&stage);
    let lazuli = stage.lazuli.as_ref().unwrap();
    for number in 0..KILLS {
        let worker = wait_until(PATIENCE, || lazuli.worker()).expect("a worker serves");
        let worker = rustix::process::Pid::from_raw(worker as i32).unwrap();
        rustix::process::kill_process(worker, rustix::process::Signal::KILL).unwrap();
        // What nobody has read before: it waits for the next worker. In a process of its own, which can be given up.
        for (container, first) in containers.iter().zip(firsts) {
            let path = container.path.join(format!("data/{number}"));
            let read = run(Command::new("cat").arg(&path), PATIENCE).expect_success();
            assert!(read.stdout == noise(number, 1 << 20), "{number}");
            let seen = fs::metadata(&path).unwrap();
            assert_eq!((seen.uid(), seen.gid()), (first + 7, first + 8));
        }
    }
    assert_eq!(mapped_mounts(&stage), mounts);
    let log = lazuli.log();
    assert_eq!(
        log.matches("this process goes on where another ended").count() as u64,
        KILLS,
        "{log}"
    );
    for container in &containers {
        unmount_below(&container.path);
        stage.containerd.ctr_ok(&["containers", "rm", &container.id]);
    }
    until_unmounted(&stage);
}

/// A dense node dies and comes back: fifty containers of two images on one base go on, their mounts are found again, and nothing is left of
/// them in the end.
#[test]
fn killed_with_fifty_containers() {
    const CONTAINERS: u32 = 50;
    let Some(mut stage) = stage("users_killed_with_fifty") else {
        return;
    };
    let base = vec![
        Layer::of(Compression::Gzip, base_entries()),
        Layer::of(Compression::Gzip, application_entries()),
        Layer::of(
            Compression::Gzip,
            [Entry::dir("base"), Entry::file("base/large", noise(1, 3_000_000))],
        ),
    ];
    let references = ["one", "two"].map(|name| {
        let mut layers = base.clone();
        let own = [
            Entry::dir("own"),
            Entry::file("own/large", noise(2, 2_000_000)),
            Entry::file("own/name", name),
        ];
        layers.push(Layer::of(Compression::Gzip, own));
        layers.push(Layer::of(
            Compression::Gzip,
            [Entry::dir("own"), Entry::file("own/user", name).owner(1000, 1000)],
        ));
        let reference = stage.push(&Image::new(Flavour::Oci, layers), &format!("users/{name}:1"));
        stage.pull(&reference);
        reference
    });
    let settled = |stage: &Stage| {
        let status = stage.lazuli.as_ref().unwrap().status();
        let chains = status["chains"].as_array().cloned().unwrap_or_default();
        chains.iter().all(|chain| chain["state"] == "stored").then_some(())
    };
    wait_until(PATIENCE, || settled(&stage)).expect("layers are merged");
    let root = stage.lazuli.as_ref().unwrap().root();
    let is_image = stage.lazuli.as_ref().unwrap().status()["face"]["face"] == "image";
    let before = mounts_below(&root);
    let containers: Vec<(String, PathBuf, u32)> = (0..CONTAINERS)
        .map(|number| {
            let first = FIRST + number * 65_536;
            let mapped = Mapped::new(&stage, &references[(number % 2) as usize], first);
            (mapped.id, mapped.path, first)
        })
        .collect();
    let check = |path: &Path, first: u32| {
        use std::os::unix::fs::MetadataExt as _;
        assert_eq!(fs::metadata(path.join("own/user")).unwrap().uid(), first + 1000);
        assert_eq!(fs::read(path.join("base/large")).unwrap(), noise(1, 3_000_000));
    };
    containers.iter().for_each(|(_, path, first)| check(path, *first));
    let of_containers = mapped_mounts(&stage);
    assert!(of_containers.len() >= 2 * CONTAINERS as usize, "{of_containers:?}");

    stage.lazuli().kill();
    stage.restart_daemon();
    assert_eq!(mapped_mounts(&stage), of_containers, "all are there, and none twice");
    if is_image {
        // Their layers are whole: no process is needed to read them.
        containers.iter().for_each(|(_, path, first)| check(path, *first));
    }
    for (id, path, first) in &containers {
        unmount_below(path);
        stage.containerd.mount_snapshot(SNAPSHOTTER, id, path);
        check(path, *first);
    }
    // The first ones may have been made before their layers were seen to be whole, and have got other mounts beside theirs.
    let now = mapped_mounts(&stage);
    assert!(of_containers.iter().all(|place| now.contains(place)), "{now:?}");
    if is_image {
        let places: std::collections::BTreeSet<_> = now.iter().collect();
        assert_eq!(
            places.len(),
            now.len(),
            "none was mounted over another: all were adopted"
        );
    }
    for (id, path, _) in &containers {
        unmount_below(path);
        stage.containerd.ctr_ok(&["containers", "rm", id]);
    }
    until_unmounted(&stage);
    let back = wait_until(PATIENCE, || (mounts_below(&root) == before).then_some(()));
    assert!(
        back.is_some(),
        "{:?} are mounted, and were not: {before:?}",
        mounts_below(&root)
    );
}
