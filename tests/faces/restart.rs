//! A process that is killed, and the next one in its place.

use std::io::{self, BufRead as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use lazuli::sys::mount::{Unmount, unmount};

use crate::chains::{attach, layers};
use crate::fake::{Layout, content};
use crate::harness::{Overlay, read_file};
use crate::rig::{Rig, Whole, device, mounts_below, temporary};
use crate::single::torture;
use crate::skip::{Ability, skipped};

/// Tells a child process of these tests where to show faces until it is killed.
const SERVE_AT: &str = "LAZULI_TEST_FACES_AT";
/// Slots beside those of [`layers`], which are 1 to 4: a layer through FUSE, a whole layer, a chain of whole layers, one of mixed ones.
pub const THROUGH: u32 = 10;
pub const WHOLE: u32 = 11;
pub const CHAIN: u32 = 12;
pub const MIXED: u32 = 13;
/// One that nobody attaches again.
pub const GONE: u32 = 14;

pub fn whole_layer() -> Arc<Whole> {
    Whole::new(torture("whole"))
}

fn set_up(root: &Path) -> Option<Rig> {
    let rig = Rig::open(root)?;
    let layers = layers();
    let slots = attach(&rig, &layers);
    let (through, whole, gone) = (
        Whole::new(torture("through")),
        whole_layer(),
        Whole::new(torture("gone")),
    );
    for layer in layers.iter().chain([&whole, &gone]) {
        layer.complete(root);
    }
    rig.faces.attach(THROUGH, through).unwrap();
    rig.faces.attach(WHOLE, whole).unwrap();
    rig.faces.attach(GONE, gone).unwrap();
    rig.layer_path(THROUGH);
    rig.layer_path(WHOLE);
    rig.layer_path(GONE);
    rig.faces.build_chain(CHAIN, &slots, &[]).unwrap();
    rig.chain_path(CHAIN, &slots).unwrap();
    let mixed = [slots[0], THROUGH];
    rig.faces.build_chain(MIXED, &mixed, &[]).unwrap();
    rig.chain_path(MIXED, &mixed).unwrap();
    Some(rig)
}

/// Not a test but the child process of the next one.
#[test]
fn serving_process() {
    let Some(root) = std::env::var_os(SERVE_AT).map(PathBuf::from) else {
        return;
    };
    let rig = set_up(&root);
    if let Some((device, carried)) = rig.as_ref().and_then(|rig| rig.faces.carry()) {
        // Somebody who waits for it there (takeover.rs); else it is no socket.
        let text = serde_json::to_vec(&carried).unwrap();
        let _ = lazuli::sys::descriptors::send(std::io::stdin(), &text, &[device]);
    }
    println!("{}", if rig.is_some() { "mounted" } else { "impossible" });
    loop {
        std::thread::park();
    }
}

/// Starts a process that serves below `root`. Without the process: the kernel has no image face.
pub fn serving(root: &Path, stdin: Stdio) -> Option<Child> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "restart::serving_process", "--nocapture"])
        .env(SERVE_AT, root)
        .stdin(stdin)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = io::BufReader::new(child.stdout.take().unwrap()).lines();
    let said = lines
        .map(Result::unwrap)
        .find(|line| line.contains("mounted") || line.contains("impossible"));
    if said.expect("the child says how it went").contains("mounted") {
        return Some(child);
    }
    child.kill().unwrap();
    child.wait().unwrap();
    skipped(
        Ability::ErofsFiles,
        "the process that was to be killed has no image face",
    );
    None
}

/// Leaves the mounts of a killed process below `root`. `false`: the kernel has no image face.
fn killed(root: &Path) -> bool {
    let Some(mut child) = serving(root, Stdio::null()) else {
        return false;
    };
    child.kill().unwrap();
    child.wait().unwrap();
    true
}

#[test]
fn mounts_that_need_no_process_go_on() {
    let (_dir, root) = temporary();
    if !killed(&root) {
        return;
    }
    let at = |name: &str| root.join("faces").join(name);
    let (whole, chain) = (at(&format!("{WHOLE}.file")), at(&format!("{CHAIN}.file")));
    let before = (device(&whole), device(&chain));
    let overlay = Overlay(root.join("container"));
    std::fs::create_dir(&overlay.0).unwrap();
    std::fs::create_dir(root.join("empty")).unwrap();
    lazuli::sys::mount::overlay(&[chain.clone(), root.join("empty")], &overlay.0).unwrap();

    let rig = Rig::open(&root).unwrap();
    let mut left: Vec<_> = mounts_below(&root.join("faces"))
        .into_iter()
        .map(|mount| mount.mount_point.file_name().unwrap().to_string_lossy().into_owned())
        .collect();
    left.sort();
    assert_eq!(
        left,
        [format!("{WHOLE}.file"), format!("{CHAIN}.file"), format!("{GONE}.file")]
    );
    assert!(!at(&format!("{THROUGH}.image")).exists());

    // Whole and verified: the very same mounts, and what they show is held from the beginning.
    let (layers, whole_layer) = (layers(), whole_layer());
    for layer in layers.iter().chain([&whole_layer]) {
        layer.complete(&root);
    }
    let slots = attach(&rig, &layers);
    rig.faces.attach(WHOLE, Arc::clone(&whole_layer) as _).unwrap();
    assert_eq!(whole_layer.holds(), 1);
    assert_eq!(rig.layer_path(WHOLE), whole);
    assert_eq!(rig.chain_path(CHAIN, &slots), Some(chain.clone()));
    assert_eq!((device(&whole), device(&chain)), before);
    assert!(whole_layer.holds() >= 1 && layers.iter().all(|layer| layer.holds() == 1));
    assert_eq!(
        (rig.word(WHOLE), rig.counted("file"), rig.chains("loaded")),
        ("file", 2, 1)
    );
    for path in [
        whole.join("tmp/a/large"),
        overlay.0.join("many/again"),
        chain.join("many/again"),
    ] {
        let expected = if path.ends_with("large") {
            content(3_000_001, 4)
        } else {
            content(100_000, 3)
        };
        assert_eq!(rig.within(move || read_file(&path)).unwrap(), expected);
    }
    // Through FUSE again, under a new session.
    rig.faces.attach(THROUGH, Whole::new(torture("through"))).unwrap();
    let large = rig.layer_path(THROUGH).join("tmp/a/large");
    assert_eq!(rig.within(move || read_file(&large)).unwrap(), content(3_000_001, 4));

    // What nobody needs goes, whoever mounted it.
    rig.retain(&[CHAIN]);
    let left = mounts_below(&root.join("faces"));
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!((device(&chain), whole_layer.holds()), (before.1, 0));
    drop(overlay);
    rig.close();
}

#[test]
fn a_mount_that_shows_something_else_is_not_taken_over() {
    let (_dir, root) = temporary();
    if !killed(&root) {
        return;
    }
    let whole = root.join(format!("faces/{WHOLE}.file"));
    let before = device(&whole);
    let rig = Rig::open(&root).unwrap();
    // Not whole yet: through FUSE meanwhile. The old mount stays, as a container may use it.
    let changed = {
        let mut layout = Layout::new();
        layout.file("new", 0o644, &content(10_000, 9));
        Whole::new(layout.build("whole"))
    };
    rig.faces.attach(WHOLE, Arc::clone(&changed) as _).unwrap();
    let image = rig.layer_path(WHOLE);
    assert_eq!(rig.word(WHOLE), "image");
    assert_eq!(device(&whole), before);
    // Whole: a mount of its own, on top of the one that shows another image.
    std::fs::remove_file(root.join(lazuli::fetch::LayerData::digest(&*changed).hex())).unwrap();
    changed.complete(&root);
    assert_eq!(rig.layer_path(WHOLE), whole);
    assert_ne!(device(&whole), before);
    for path in [&image, &whole] {
        let new = path.join("new");
        assert_eq!(rig.within(move || read_file(&new)).unwrap(), content(10_000, 9));
    }
    rig.retain(&[]);
    assert!(mounts_below(&root.join("faces")).is_empty());
    rig.close();
}

#[test]
fn the_end_takes_away_what_was_never_asked_for() {
    let (_dir, root) = temporary();
    if !killed(&root) {
        return;
    }
    // Something of somebody else in there stays out of the way as well.
    let strange = root.join("faces/strange");
    std::fs::create_dir_all(&strange).unwrap();
    lazuli::sys::mount::bind(&root.join("faces"), &strange).unwrap();
    let rig = Rig::open(&root).unwrap();
    assert!(unmount(&strange, Unmount::Detach).is_err(), "it was taken away");
    rig.close();
    let stored = std::fs::read_dir(root.join("faces")).unwrap();
    let mut names: Vec<_> = stored
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, [format!("{CHAIN}.chain"), format!("{MIXED}.chain")]);
}
