//! Chains: one image of several layers.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lazuli::fs::FsError;

use crate::fake::{Layout, content};
use crate::harness::read_file;
use crate::rig::{Rig, Whole, mounts_below, temporary};
use crate::single::torture;
use crate::tree::{Options, compare};

/// Slot of the chain in these tests.
const CHAIN: u32 = 100;

/// Four layers that do to each other what layers do, in slots 1 to 4.
pub fn layers() -> Vec<Arc<Whole>> {
    let mut second = Layout::new();
    second
        .set("", |inode| inode.mode = inode.mode & !0o777 | 0o755)
        .dir("bin", 0o711)
        .whiteout("bin/dash")
        .file("bin/new", 0o755, &content(9000, 7))
        .hard_link("bin/new-too", "bin/new")
        .whiteout("pipe")
        .whiteout("never-there")
        .dir("tmp", 0o1777)
        .dir("tmp/a", 0o700)
        .xattr("tmp/a", "trusted.overlay.opaque", b"y")
        .file("tmp/a/only", 0o644, b"only")
        .file("many", 0o644, b"a file over a directory");
    let mut third = Layout::new();
    third
        .set("", |inode| inode.mode = inode.mode & !0o777 | 0o755)
        .dir("empty", 0o755)
        .file("empty/now-a-directory", 0o644, &content(5, 5))
        .whiteout("many")
        .symlink("bin", "tmp");
    let mut fourth = Layout::new();
    fourth
        .dir("many", 0o755)
        .file("many/again", 0o644, &content(100_000, 3))
        .dir("tmp", 0o1777)
        .dir("tmp/a", 0o755)
        .file("tmp/a/second", 0o640, b"second")
        .xattr("tmp/a/second", "user.note", b"kept");
    vec![
        Whole::new(torture("chain-1")),
        Whole::new(second.build("chain-2")),
        Whole::new(third.build("chain-3")),
        Whole::new(fourth.build("chain-4")),
    ]
}

pub fn attach(rig: &Rig, layers: &[Arc<Whole>]) -> Vec<u32> {
    (1..)
        .zip(layers)
        .map(|(slot, layer)| {
            rig.faces.attach(slot, Arc::clone(layer) as _).unwrap();
            slot
        })
        .collect()
}

/// Compares the overlay of all layers, as trees, with the one directory `merged` under an overlay.
fn same_as_stacked(rig: &Rig, name: &str, slots: &[u32], merged: &Path) {
    let lower: Vec<PathBuf> = slots.iter().rev().map(|slot| rig.faces.session().path(*slot)).collect();
    let stacked = rig.overlay(&format!("{name}-stacked"), &lower);
    let merged = rig.overlay(&format!("{name}-merged"), &[merged.to_owned()]);
    let (left, right) = (stacked.0.clone(), merged.0.clone());
    rig.within(move || compare(&left, &right, &Options::default()))
        .expect_equal();
}

#[test]
fn a_chain_shows_what_its_stack_shows() {
    let (_dir, root) = temporary();
    let Some(rig) = Rig::open(&root) else { return };
    let layers = layers();
    let slots = attach(&rig, &layers);
    assert_eq!(rig.chain_path(CHAIN, &slots), None);
    assert_eq!(rig.word(CHAIN), "image", "it can be made");
    rig.faces.build_chain(CHAIN, &slots, &[]).unwrap();
    rig.faces.build_chain(CHAIN, &slots, &[]).unwrap();
    assert_eq!((rig.chains("built"), rig.chains("failed")), (1, 0));
    let image = rig.chain_path(CHAIN, &slots).unwrap();
    assert_eq!((rig.word(CHAIN), rig.faces.shown(CHAIN).mounted), ("image", true));
    same_as_stacked(&rig, "fuse", &slots, &image);

    // Some layers whole: no other mount. All: one without FUSE.
    layers[0].complete(&root);
    layers[2].complete(&root);
    assert_eq!(rig.chain_path(CHAIN, &slots).as_ref(), Some(&image));
    assert_eq!(layers[0].holds(), 0);
    for layer in &layers {
        layer.complete(&root);
    }
    let file = rig.chain_path(CHAIN, &slots).unwrap();
    assert_ne!(file, image);
    assert_eq!((rig.word(CHAIN), rig.counted("file")), ("file", 1));
    assert!(layers.iter().all(|layer| layer.holds() == 1));
    same_as_stacked(&rig, "file", &slots, &file);
    assert_eq!((rig.counted("image"), rig.counted("file")), (1, 1));

    rig.retain(&[]);
    assert!(mounts_below(&root.join("faces")).is_empty());
    assert!(layers.iter().all(|layer| layer.holds() == 0));
    assert_eq!(
        rig.chain_path(CHAIN, &slots),
        Some(file),
        "it is stored, and mounted again"
    );
    let faces = Arc::clone(&rig.faces);
    rig.within(move || faces.forget_chain(CHAIN));
    assert_eq!(rig.chain_path(CHAIN, &slots), None);
    assert!(!root.join(format!("faces/{CHAIN}.chain")).exists());
    rig.close();
}

#[test]
fn whole_layers_and_others_go_into_one_mount() {
    let (_dir, root) = temporary();
    let Some(rig) = Rig::open(&root) else { return };
    let layers = layers();
    let slots = attach(&rig, &layers);
    let path = layers[0].complete(&root);
    layers[3].complete(&root);
    rig.faces.build_chain(CHAIN, &slots, &[]).unwrap();
    let mixed = rig.chain_path(CHAIN, &slots).unwrap();
    assert_eq!(rig.word(CHAIN), "image");
    assert_eq!(
        layers.iter().map(|layer| layer.holds()).collect::<Vec<_>>(),
        [1, 0, 0, 1]
    );
    // The kernel reads that very file.
    let index = lazuli::fetch::LayerData::names(&*layers[0]).unwrap();
    let large = index.inode(index.lookup_path(b"empty").unwrap()).unwrap();
    assert_eq!(large.size, 0);
    let name = "n".repeat(255);
    let inode = index.inode(index.lookup_path(name.as_bytes()).unwrap()).unwrap();
    let changed = fs::File::options().write(true).open(path).unwrap();
    changed.write_all_at(b"CHANGED", inode.data).unwrap();
    let shown = mixed.join(name);
    let bytes = rig.within(move || read_file(&shown)).unwrap();
    assert_eq!((&bytes[..7], bytes.len()), (&b"CHANGED"[..], 70_000));
    let other = mixed.join("many/again");
    assert_eq!(rig.within(move || read_file(&other)).unwrap(), content(100_000, 3));
    rig.retain(&[]);
    assert!(layers.iter().all(|layer| layer.holds() == 0));
    rig.close();
}

#[test]
fn five_hundred_layers_are_one_mount() {
    const LAYERS: u32 = 500;
    let (_dir, root) = temporary();
    let Some(rig) = Rig::open(&root) else { return };
    let mut slots = Vec::new();
    for slot in 1..=LAYERS {
        let mut layout = Layout::new();
        layout
            .dir("shared", 0o755)
            .file(format!("shared/{slot}"), 0o644, &content(700, slot))
            .file("last", 0o644, &content(100, slot));
        let layer = Whole::new(layout.build(&format!("of-many-{slot}")));
        if slot % 2 == 0 {
            layer.complete(&root);
        }
        rig.faces.attach(slot, layer).unwrap();
        slots.push(slot);
    }
    let chain = LAYERS + 1;
    rig.faces.build_chain(chain, &slots, &[]).unwrap();
    let path = rig.chain_path(chain, &slots).unwrap();
    assert_eq!(mounts_below(&root.join("faces")).len(), 1);
    rig.within(move || {
        assert_eq!(read_file(&path.join("last")).unwrap(), content(100, LAYERS));
        for slot in 1..=LAYERS {
            assert_eq!(
                read_file(&path.join(format!("shared/{slot}"))).unwrap(),
                content(700, slot)
            );
        }
    });

    // One more is more than overlayfs would take.
    rig.faces.attach(1000, Layout::new().build("one too many")).unwrap();
    slots.push(1000);
    let error = rig.faces.build_chain(2000, &slots, &[]).unwrap_err();
    assert!(matches!(error, FsError::Chain { slot: 2000, .. }), "{error}");
    assert_eq!(rig.chain_path(2000, &slots), None);
    let shown = rig.faces.shown(2000);
    assert_eq!(shown.word, "stack");
    assert!(shown.reason.unwrap().contains("501"));
    assert_eq!(rig.chains("failed"), 1);
    rig.close();
}

#[test]
fn a_stored_chain_is_verified_before_it_is_used_again() {
    let (_dir, root) = temporary();
    let layers = layers();
    let stored = root.join(format!("faces/{CHAIN}.chain"));
    let Some(rig) = Rig::open(&root) else { return };
    let slots = attach(&rig, &layers);
    rig.faces.build_chain(CHAIN, &slots, &[]).unwrap();
    rig.close();

    // As it was left.
    let rig = Rig::open(&root).unwrap();
    attach(&rig, &layers);
    let path = rig.chain_path(CHAIN, &slots).unwrap();
    assert_eq!((rig.chains("loaded"), rig.chains("built")), (1, 0));
    same_as_stacked(&rig, "loaded", &slots, &path);
    rig.close();

    // Damaged where the kernel would look, and nowhere near the end.
    let good = fs::read(&stored).unwrap();
    let mut damaged = good.clone();
    damaged[1500] ^= 1;
    fs::write(&stored, &damaged).unwrap();
    let rig = Rig::open(&root).unwrap();
    attach(&rig, &layers);
    assert_eq!(rig.chain_path(CHAIN, &slots), None);
    assert!(!stored.exists());
    rig.faces.build_chain(CHAIN, &slots, &[]).unwrap();
    assert_eq!((rig.chains("loaded"), rig.chains("built")), (0, 1));
    assert_eq!(
        fs::read(&stored).unwrap(),
        good,
        "the same layers always give the same image"
    );
    rig.chain_path(CHAIN, &slots).unwrap();
    rig.close();

    // Good, but of other indexes.
    let rig = Rig::open(&root).unwrap();
    let mut others = layers.clone();
    others[1] = Whole::new(Layout::new().build("chain-2"));
    attach(&rig, &others);
    assert_eq!(rig.chain_path(CHAIN, &slots), None);
    rig.faces.build_chain(CHAIN, &slots, &[]).unwrap();
    let path = rig.chain_path(CHAIN, &slots).unwrap();
    same_as_stacked(&rig, "others", &slots, &path);
    // An index that changes while the chain is mounted.
    rig.faces.attach(2, Arc::clone(&layers[1]) as _).unwrap();
    assert_eq!(rig.chain_path(CHAIN, &slots), None);
    rig.faces.build_chain(CHAIN, &slots, &[]).unwrap();
    let path = rig.chain_path(CHAIN, &slots).unwrap();
    assert!(path.join("tmp/a/only").exists() && !path.join("pipe").exists());
    // And one that goes.
    let faces = Arc::clone(&rig.faces);
    rig.within(move || faces.detach(3));
    assert_eq!(rig.chain_path(CHAIN, &slots), None);
    assert!(matches!(
        rig.faces.build_chain(CHAIN, &slots, &[]),
        Err(FsError::NotAttached { slot: 3 })
    ));
    rig.close();
}
