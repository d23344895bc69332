//! What cannot be mounted is shown as a tree, and what mounts metadata from an overlay goes another way.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lazuli::config::FaceChoice;
use lazuli::fs::{Face, FsError};
use lazuli::sys::mount::{Unmount, unmount};

use crate::chains;
use crate::fake::{Layout, content};
use crate::harness::read_file;
use crate::rig::{Rig, Whole, mounts_below, temporary};
use crate::single::torture;
use crate::tree::{Options, compare};

#[test]
fn metadata_on_an_overlay_go_through_fuse() {
    let (dir, root) = temporary();
    for name in ["lower", "upper", "work", "root"] {
        fs::create_dir(root.join(name)).unwrap();
    }
    let below = root.join("root");
    let options = format!(
        "lowerdir={0}/lower,upperdir={0}/upper,workdir={0}/work",
        root.to_str().unwrap()
    );
    let options = std::ffi::CString::new(options).unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("overlay", &below, "overlay", flags, options.as_c_str()).unwrap();
    struct Unmounted(std::path::PathBuf);
    impl Drop for Unmounted {
        fn drop(&mut self) {
            let _ = unmount(&self.0, Unmount::Detach);
        }
    }
    let mounted = Unmounted(below.clone());

    let Some(rig) = Rig::open(&below) else { return };
    assert!(rig.faces.serving().metadata_through_fuse, "{:?}", rig.faces.serving());
    assert!(rig.faces.serving().reason.contains("through FUSE"));
    // An overlay cannot be mapped, so neither can what containerd unpacks there.
    let reason = rig.faces.serving().no_mapped_owners.clone().unwrap_or_default();
    assert!(
        reason.contains("the file system of the root directory cannot be mapped"),
        "{reason}"
    );
    let layers = chains::layers();
    let slots = chains::attach(&rig, &layers);
    // Names would need this process in any case, so a whole layer stays on FUSE.
    layers[0].complete(&below);
    let image = rig.layer_path(1);
    assert_eq!((rig.word(1), layers[0].holds()), ("image", 0));
    let tree = rig.faces.session().path(1);
    rig.within(move || compare(&tree, &image, &Options::default()))
        .expect_equal();
    rig.faces.build_chain(100, &slots, &[]).unwrap();
    let path = rig.chain_path(100, &slots).unwrap();
    let again = path.join("many/again");
    assert_eq!(rig.within(move || read_file(&again)).unwrap(), content(100_000, 3));
    rig.retain(&[]);
    rig.layer_path(1);
    assert_eq!(rig.chain_path(100, &slots), Some(path));
    let Rig { faces, .. } = rig;
    let session = faces.session().mountpoint().to_owned();
    let faces = Arc::into_inner(faces).unwrap();
    crate::harness::within(&session, move || faces.close()).unwrap();
    assert_eq!(mounts_below(&below).len(), 1, "only the overlay itself");
    drop(mounted);
    drop(dir);
}

#[test]
fn a_mount_that_fails_is_a_tree_with_its_reason() {
    let (_dir, root) = temporary();
    let Some(rig) = Rig::open(&root) else { return };
    rig.faces.attach(1, torture("in the way")).unwrap();
    // What stands at the mount point is no directory.
    let place = root.join("faces/1.image");
    fs::write(&place, "in the way").unwrap();
    let tree = rig.faces.session().path(1);
    assert_eq!(rig.layer_path(1), tree);
    let shown = rig.faces.shown(1);
    assert_eq!((shown.word, shown.mounted), ("tree", false));
    assert!(shown.reason.unwrap().contains("move_mount"));
    assert_eq!(rig.failures("mount"), 1);
    // It is not tried again at once; the next container does not wait for the same failure.
    fs::remove_file(&place).unwrap();
    assert_eq!(rig.layer_path(1), tree);
    assert_eq!(rig.failures("mount"), 1);
    // A new reader is a new beginning.
    rig.faces.attach(1, torture("in the way")).unwrap();
    assert_eq!(rig.layer_path(1), place);
    assert_eq!(rig.faces.shown(1).reason, None);
    rig.close();
}

#[test]
fn a_whole_layer_whose_file_cannot_be_mounted_goes_through_fuse() {
    let (_dir, root) = temporary();
    let Some(rig) = Rig::open(&root) else { return };
    let layer = Whole::new(torture("file in the way"));
    layer.complete(&root);
    rig.faces.attach(1, Arc::clone(&layer) as _).unwrap();
    fs::write(root.join("faces/1.file"), "in the way").unwrap();
    let path = rig.layer_path(1);
    assert_eq!(path, root.join("faces/1.image"));
    assert_eq!((rig.word(1), layer.holds(), rig.failures("mount")), ("image", 0, 1));
    assert_eq!(rig.layer_path(1), path);
    assert_eq!(rig.failures("mount"), 1, "the file is not tried again at once");
    let large = path.join("tmp/a/large");
    assert_eq!(rig.within(move || read_file(&large)).unwrap(), content(3_000_001, 4));
    rig.close();
}

#[test]
fn a_layer_that_erofs_cannot_express_is_a_tree() {
    let (_dir, root) = temporary();
    let Some(rig) = Rig::open(&root) else { return };
    let mut layout = Layout::new();
    // No block of 512 bytes begins where this file does.
    layout.file("file", 0o644, &content(600, 1)).set("file", |inode| {
        inode.data += 1;
        inode.size -= 1;
    });
    rig.faces.attach(1, layout.build("not aligned")).unwrap();
    rig.faces.attach(2, torture("aligned")).unwrap();
    let path = rig.layer_path(1);
    assert_eq!(path, rig.faces.session().path(1));
    let file = path.join("file");
    assert_eq!(rig.within(move || read_file(&file)).unwrap(), content(600, 1)[1..]);
    assert_eq!((rig.word(1), rig.failures("index")), ("tree", 1));
    assert!(rig.faces.shown(1).reason.unwrap().contains("block"));
    rig.layer_path(1);
    assert_eq!(rig.failures("index"), 1, "it would be the same for ever");
    // A chain with it is stacked.
    assert!(matches!(
        rig.faces.build_chain(3, &[1, 2], &[]),
        Err(FsError::Chain { slot: 3, .. })
    ));
    assert_eq!(rig.chain_path(3, &[1, 2]), None);
    assert_eq!((rig.word(3), rig.word(2)), ("stack", "image"));
    rig.close();
}

#[test]
fn extended_attributes_that_erofs_does_not_know_are_counted() {
    let (_dir, root) = temporary();
    let Some(rig) = Rig::open(&root) else { return };
    let mut layout = Layout::new();
    layout
        .file("file", 0o644, b"")
        .xattr("file", "btrfs.compression", b"zstd");
    rig.faces.attach(1, layout.build("xattr")).unwrap();
    rig.layer_path(1);
    assert_eq!(rig.metrics.face_dropped_xattrs_total.get(), 1);
    rig.close();
}

#[test]
fn a_kernel_that_does_not_answer_leaves_the_tree() {
    let (_dir, root) = temporary();
    // No call is that fast.
    let rig = Rig::with(&root, FaceChoice::Auto, Duration::ZERO).unwrap();
    assert_eq!(rig.faces.serving().face, Face::Tree);
    let reason = &rig.faces.serving().reason;
    assert!(
        reason.contains("did not answer") || reason.contains("EROFS"),
        "{reason}"
    );
    rig.faces.attach(1, torture("late")).unwrap();
    let path = rig.layer_path(1);
    assert_eq!(path, rig.faces.session().path(1));
    // What comes back late unmounts what it mounted.
    let begun = Instant::now();
    while rig.metrics.face_calls_left_behind.get() > 0 {
        assert!(begun.elapsed() < Duration::from_secs(60), "a call never came back");
        std::thread::sleep(Duration::from_millis(1));
    }
    rig.close();

    match Rig::with(&root, FaceChoice::Image, Duration::ZERO) {
        Err(FsError::NoImage { reason }) => assert!(!reason.is_empty()),
        other => panic!(
            "forced and impossible, yet {:?}",
            other.map(|rig| rig.faces.serving().clone())
        ),
    }
    let begun = Instant::now();
    while !mounts_below(&root).is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", mounts_below(&root));
        std::thread::sleep(Duration::from_millis(1));
    }
}
