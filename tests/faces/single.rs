//! One layer: the same in every face, and mounts that come and go.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;

use lazuli::config::FaceChoice;
use lazuli::fs::{Face, FsError};
use lazuli::layer::index::mode;
use lazuli::sys::idmap::{IdRange, UserNamespace, id_mapped};
use lazuli::sys::mount::{Unmount, unmount};

use crate::fake::{FakeLayer, Layout, content};
use crate::harness::read_file;
use crate::rig::{Rig, Whole, device, mounts_below, temporary};
use crate::tree::{Options, compare};

/// A layer of everything a layer can have.
pub fn torture(name: &str) -> Arc<FakeLayer> {
    let mut layout = Layout::new();
    layout
        .set("", |inode| inode.mode = mode::DIR | 0o751)
        .dir("bin", 0o755)
        .file("bin/sh", 0o4755, b"#!/bin/true\n")
        .hard_link("bin/dash", "bin/sh")
        .set("bin/sh", |inode| {
            (inode.uid, inode.gid) = (1000, 4_000_000_000);
            (inode.mtime, inode.mtime_nsec) = (1_700_000_000, 123_456_789);
        })
        .xattr(
            "bin/sh",
            "security.capability",
            &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        )
        .xattr("bin/sh", "user.large", &content(3000, 2))
        .file("empty", 0o600, b"")
        .set("empty", |inode| (inode.mtime, inode.mtime_nsec) = (-2, 500_000_000))
        .symlink("link", "bin/sh")
        .symlink("long", "x/".repeat(2000))
        .symlink("dangling", b"nowhere/\xff")
        .special("null", mode::CHR | 0o666, 1, 3)
        .special("disk", mode::BLK | 0o660, 259, 300_000)
        .special("pipe", mode::FIFO | 0o644, 0, 0)
        .special("socket", mode::SOCK | 0o755, 0, 0)
        .dir("tmp", 0o1777)
        .dir("tmp/a", 0o2750)
        .file("tmp/a/large", 0o644, &content(3_000_001, 4))
        .file(b"odd \xff\xfe\n name", 0o644, b"odd")
        .file("n".repeat(255), 0o644, &content(70_000, 1))
        .dir("many", 0o755);
    for i in 0..2000 {
        layout.file(
            format!("many/file-{i}-with-a-name"),
            0o644,
            &content(i % 1500, i as u32),
        );
    }
    layout.build(name)
}

#[test]
fn every_face_shows_the_same() {
    let (dir, root) = temporary();
    let Some(rig) = Rig::open(&root) else { return };
    let (through, whole) = (Whole::new(torture("through")), Whole::new(torture("whole")));
    whole.complete(&root);
    rig.faces.attach(1, Arc::clone(&through) as _).unwrap();
    rig.faces.attach(2, Arc::clone(&whole) as _).unwrap();
    assert_eq!((rig.word(1), rig.faces.shown(1).mounted), ("image", false));
    let (image, file) = (rig.layer_path(1), rig.layer_path(2));
    assert_eq!((rig.word(1), rig.word(2)), ("image", "file"));
    assert!(rig.faces.shown(1).mounted && rig.faces.shown(2).mounted);
    assert_eq!(rig.faces.shown(1).reason, None);
    assert_eq!((rig.counted("image"), rig.counted("file")), (1, 1));
    assert_eq!((through.holds(), whole.holds()), (0, 1));
    assert_eq!(rig.metrics.face_mount_seconds.get_sample_count(), 2);
    let tree = rig.faces.session().path(1);
    for shown in [image.clone(), file.clone()] {
        let tree = tree.clone();
        let compared = rig
            .within(move || compare(&tree, &shown, &Options::default()))
            .expect_equal();
        assert_eq!(compared.entries, 2018);
        assert!(compared.bytes > 4_000_000, "{}", compared.bytes);
    }
    // Asked again, they are what they were.
    assert_eq!((rig.layer_path(1), rig.layer_path(2)), (image, file));
    assert_eq!((rig.counted("image"), rig.counted("file"), whole.holds()), (1, 1, 1));
    rig.close();
    assert_eq!(whole.holds(), 0);
    drop(dir);
}

#[test]
fn a_layer_that_becomes_whole_leaves_fuse() {
    let (_dir, root) = temporary();
    let Some(rig) = Rig::open(&root) else { return };
    let layer = Whole::new(torture("becomes whole"));
    rig.faces.attach(5, Arc::clone(&layer) as _).unwrap();
    let image = rig.layer_path(5);
    let overlay = rig.overlay("before", std::slice::from_ref(&image));
    layer.complete(&root);
    let file = rig.layer_path(5);
    assert_ne!(image, file);
    assert_eq!((rig.word(5), layer.holds()), ("file", 1));
    // What was handed out before goes on.
    let (before, old) = (overlay.0.join("tmp/a/large"), image.join("tmp/a/large"));
    assert_eq!(rig.within(move || read_file(&before)).unwrap(), content(3_000_001, 4));
    assert_eq!(rig.within(move || read_file(&old)).unwrap(), content(3_000_001, 4));

    // Needed by nobody, both go; the overlay goes on all the same.
    rig.retain(&[5]);
    assert!(mounts_below(&image).len() == 1 && mounts_below(&file).len() == 1);
    rig.retain(&[7]);
    assert!(mounts_below(&image).is_empty() && mounts_below(&file).is_empty());
    assert!(!image.exists() && !file.exists());
    assert_eq!((rig.counted("image"), rig.counted("file"), layer.holds()), (0, 0, 0));
    assert_eq!((rig.word(5), rig.faces.shown(5).mounted), ("image", false));
    let before = overlay.0.join("n".repeat(255));
    assert_eq!(rig.within(move || read_file(&before)).unwrap(), content(70_000, 1));
    drop(overlay);

    // And they come back when they are asked for.
    assert_eq!(rig.layer_path(5), file);
    let large = file.join("tmp/a/large");
    assert_eq!(rig.within(move || read_file(&large)).unwrap(), content(3_000_001, 4));
    rig.close();
}

#[test]
fn a_layer_is_detached_with_its_mounts() {
    let (_dir, root) = temporary();
    let Some(rig) = Rig::open(&root) else { return };
    assert!(matches!(rig.faces.layer_path(9), Err(FsError::NotAttached { slot: 9 })));
    let layer = Whole::new(torture("detached"));
    rig.faces.attach(9, Arc::clone(&layer) as _).unwrap();
    let image = rig.layer_path(9);
    layer.complete(&root);
    rig.layer_path(9);
    let faces = Arc::clone(&rig.faces);
    assert!(rig.within(move || faces.detach(9)));
    assert!(!rig.faces.detach(9));
    assert!(mounts_below(&root.join("faces")).is_empty() && !image.exists());
    assert_eq!(layer.holds(), 0);
    assert!(matches!(rig.faces.layer_path(9), Err(FsError::NotAttached { slot: 9 })));
    assert_eq!(
        fs::read_dir(root.join("faces")).unwrap().count(),
        0,
        "nothing is left on disk"
    );
    rig.close();
}

#[test]
fn an_index_that_is_another_one_gets_another_image() {
    let (_dir, root) = temporary();
    let Some(rig) = Rig::open(&root) else { return };
    let layer = |first: &str| {
        let mut layout = Layout::new();
        // The same digest, but the file lies elsewhere in the data space.
        layout
            .file(first, 0o644, &content(5000, 1))
            .file("b", 0o644, b"the same");
        Whole::new(layout.build("changed"))
    };
    let read = |path: &Path| {
        let path = path.join("b");
        rig.within(move || read_file(&path)).unwrap()
    };
    rig.faces.attach(1, layer("a")).unwrap();
    let path = rig.layer_path(1);
    let before = device(&path);
    assert_eq!(read(&path), b"the same");
    rig.faces.attach(1, layer("a")).unwrap();
    assert_eq!(device(&rig.layer_path(1)), before, "nothing is different");
    rig.faces.attach(1, layer("c")).unwrap();
    let path = rig.layer_path(1);
    assert_eq!(read(&path), b"the same");
    let names = rig.within(move || crate::harness::names(&path)).unwrap();
    assert_eq!(names, [b"b".to_vec(), b"c".to_vec()].into());
    rig.close();
}

#[test]
fn what_somebody_else_unmounts_is_mounted_again() {
    let (_dir, root) = temporary();
    let Some(rig) = Rig::open(&root) else { return };
    rig.faces.attach(1, torture("unmounted")).unwrap();
    let path = rig.layer_path(1);
    unmount(&path, Unmount::Detach).unwrap();
    assert_eq!(rig.layer_path(1), path);
    assert_eq!((mounts_below(&path).len(), rig.counted("image")), (1, 1));
    rig.close();
}

#[test]
fn many_ask_at_once_while_others_read() {
    const LAYERS: u32 = 12;
    let (_dir, root) = temporary();
    let Some(rig) = Rig::open(&root) else { return };
    for slot in 1..=LAYERS {
        let mut layout = Layout::new();
        layout.file("file", 0o644, &content(100_000, slot));
        rig.faces.attach(slot, layout.build(&format!("layer-{slot}"))).unwrap();
    }
    let threads: Vec<_> = (0..8)
        .map(|thread| {
            let faces = Arc::clone(&rig.faces);
            std::thread::spawn(move || {
                for i in 0..LAYERS {
                    let slot = (i + thread) % LAYERS + 1;
                    let path = faces.layer_path(slot).unwrap().join("file");
                    assert_eq!(read_file(&path).unwrap(), content(100_000, slot));
                }
            })
        })
        .collect();
    for thread in threads {
        rig.within(move || thread.join()).unwrap();
    }
    assert_eq!(rig.counted("image"), i64::from(LAYERS));
    rig.close();
}

#[test]
fn the_tree_serves_where_the_configuration_says_so() {
    let (_dir, root) = temporary();
    let rig = Rig::with(&root, FaceChoice::Tree, std::time::Duration::from_secs(30)).unwrap();
    assert_eq!(rig.faces.serving().face, Face::Tree);
    assert!(rig.faces.serving().reason.contains("configuration"));
    for slot in [1, 2] {
        let layer = Whole::new(torture(&format!("tree-{slot}")));
        layer.complete(&root);
        rig.faces.attach(slot, layer).unwrap();
        assert_eq!(rig.layer_path(slot), rig.faces.session().path(slot));
        assert_eq!((rig.word(slot), rig.faces.shown(slot).mounted), ("tree", false));
    }
    rig.faces.build_chain(3, &[1, 2], &[]).unwrap();
    assert_eq!(rig.chain_path(3, &[1, 2]), None);
    assert_eq!(rig.word(3), "stack");
    rig.close();
}

/// What [`Faces::serving`](lazuli::fs::Faces::serving) says of mapped owners is what the kernel does, with both faces.
#[test]
fn layers_are_shown_with_mapped_owners() {
    const RANGE: IdRange = IdRange {
        inside: 0,
        outside: 100_000,
        count: 65_536,
    };
    let users = UserNamespace::new(&[RANGE], &[RANGE]).unwrap();
    for choice in [FaceChoice::Auto, FaceChoice::Tree] {
        let (_dir, root) = temporary();
        let rig = Rig::with(&root, choice, std::time::Duration::from_secs(30)).unwrap();
        rig.faces.attach(1, torture("mapped")).unwrap();
        let path = rig.layer_path(1);
        let place = root.join("place");
        fs::create_dir(&place).unwrap();
        let mounted = id_mapped(&path, &users).and_then(|mount| mount.attach(&place));
        let serving = rig.faces.serving().clone();
        let word = serving.face.word();
        match serving.no_mapped_owners {
            Some(reason) => assert!(mounted.is_err(), "{word}: it says that it cannot, and can: {reason}"),
            None => {
                mounted.unwrap();
                let shell = place.join("bin/sh");
                let seen = rig.within(move || fs::metadata(shell)).unwrap();
                unmount(&place, Unmount::Detach).unwrap();
                // The group is none of the mapping.
                assert_eq!((seen.uid(), seen.gid()), (101_000, 65_534), "{word}");
            }
        }
        rig.close();
    }
}
