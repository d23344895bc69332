//! A process that is killed, and one that goes on with its session: nothing is mounted anew, and who reads waits.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::Duration;

use lazuli::fs::Legacy;
use lazuli::sys::descriptors;

use crate::chains::{attach, layers};
use crate::fake::content;
use crate::harness::{Overlay, options, read_file, runtime, within};
use crate::restart::{CHAIN, GONE, MIXED, THROUGH, WHOLE, serving, whole_layer};
use crate::rig::{Rig, Whole, device, mounts_below, temporary};
use crate::single::torture;

/// A serving process, and what it leaves to the next one.
fn serving_one(root: &Path) -> Option<(Child, Legacy)> {
    let (ours, theirs) = descriptors::pair().unwrap();
    let child = serving(root, Stdio::from(theirs))?;
    let (text, mut fds) = descriptors::receive(ours, true).unwrap();
    let legacy = Legacy {
        device: fds.pop().unwrap(),
        carried: serde_json::from_slice(&text).unwrap(),
    };
    Some((child, legacy))
}

fn copy(legacy: &Legacy) -> Legacy {
    Legacy {
        device: OwnedFd::try_clone(&legacy.device).unwrap(),
        carried: legacy.carried.clone(),
    }
}

#[test]
fn what_is_mounted_goes_on_and_readers_wait() {
    let (_dir, root) = temporary();
    let Some((mut child, legacy)) = serving_one(&root) else {
        return;
    };
    let at = |name: String| root.join("faces").join(name);
    let through = at(format!("{THROUGH}.image"));
    let mounted = [
        through.clone(),
        at(format!("{WHOLE}.file")),
        at(format!("{CHAIN}.file")),
        at(format!("{MIXED}.image")),
        at(format!("{GONE}.file")),
    ];
    let before: Vec<_> = mounted.iter().map(|path| device(path)).collect();
    let overlay = Overlay(root.join("container"));
    std::fs::create_dir(&overlay.0).unwrap();
    std::fs::create_dir(root.join("empty")).unwrap();
    lazuli::sys::mount::overlay(&[through.clone(), root.join("empty")], &overlay.0).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();

    // Two processes that cannot go on leave everything to the next one.
    for _ in 0..2 {
        let rig = Rig::adopt(&root, copy(&legacy));
        rig.faces.attach(THROUGH, Whole::new(torture("through"))).unwrap();
        drop(rig);
    }
    let rig = Rig::adopt(&root, legacy);
    assert_eq!(mounted.iter().map(|path| device(path)).collect::<Vec<_>>(), before);
    let large = overlay.0.join("tmp/a/large");
    let reader = std::thread::spawn(move || read_file(&large));
    let (layers, whole) = (layers(), whole_layer());
    for layer in layers.iter().chain([&whole]) {
        layer.complete(&root);
    }
    let slots = attach(&rig, &layers);
    rig.faces.attach(WHOLE, whole).unwrap();
    rig.faces.session().expect(THROUGH);
    rig.faces.begin().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(!reader.is_finished(), "it read a layer that is not there");
    rig.faces.attach(THROUGH, Whole::new(torture("through"))).unwrap();
    let read = within(&root.join("fuse"), move || reader.join().unwrap());
    assert_eq!(read.unwrap(), content(3_000_001, 4));

    // The very same mounts, now of this process.
    assert_eq!(rig.layer_path(THROUGH), through);
    assert_eq!(rig.layer_path(WHOLE), mounted[1]);
    assert_eq!(rig.chain_path(CHAIN, &slots), Some(mounted[2].clone()));
    assert_eq!(rig.chain_path(MIXED, &[slots[0], THROUGH]), Some(mounted[3].clone()));
    assert_eq!(mounted.iter().map(|path| device(path)).collect::<Vec<_>>(), before);
    assert_eq!((rig.counted("file"), rig.counted("image")), (2, 2));
    drop(overlay);
    rig.close();
    assert!(mounts_below(&root.join("faces")).is_empty());
}

/// A layer that does not come: who waited for it is told.
#[test]
fn what_does_not_come_is_an_error() {
    let (_dir, root) = temporary();
    let Some((mut child, legacy)) = serving_one(&root) else {
        return;
    };
    child.kill().unwrap();
    child.wait().unwrap();
    let rig = Rig::adopt(&root, legacy);
    rig.faces.session().expect(THROUGH);
    rig.faces.begin().unwrap();
    let path = rig.faces.session().path(THROUGH);
    let reader = std::thread::spawn(move || std::fs::metadata(path));
    std::thread::sleep(Duration::from_millis(200));
    assert!(!reader.is_finished());
    rig.faces.session().give_up(THROUGH);
    let looked = within(&root.join("fuse"), move || reader.join().unwrap());
    assert!(looked.is_err());
    rig.close();
}

/// A connection that has ended is not gone on with, and does not stand in the way.
#[test]
fn a_session_that_has_ended_is_given_up() {
    let (_dir, root) = temporary();
    let Some((mut child, legacy)) = serving_one(&root) else {
        return;
    };
    child.kill().unwrap();
    child.wait().unwrap();
    let mount = lazuli::sys::mountinfo::mount_at(&root.join("fuse")).unwrap().unwrap();
    lazuli::sys::fuse::abort(mount.major, mount.minor).unwrap();
    let runtime = runtime();
    let adopted = lazuli::fs::Session::adopt(
        &root.join("fuse"),
        legacy,
        &options(1, Duration::from_secs(30)),
        runtime.handle().clone(),
        Arc::default(),
    );
    assert!(adopted.unwrap().is_none());
    let rig = Rig::open(&root).unwrap();
    rig.close();
}

/// Threads of a dying process wait for its own answers: they alone are answered, and all others go on waiting for the next one.
#[test]
fn threads_that_have_to_end_are_let_out() {
    let (_dir, root) = temporary();
    let Some((mut child, legacy)) = serving_one(&root) else {
        return;
    };
    let dir = Arc::new(std::fs::File::open(root.join(format!("fuse/{THROUGH}"))).unwrap());
    child.kill().unwrap();
    child.wait().unwrap();
    let look = |name: &'static str| {
        let (dir, (say, heard)) = (Arc::clone(&dir), std::sync::mpsc::channel());
        let thread = std::thread::spawn(move || {
            say.send(rustix::thread::gettid().as_raw_nonzero().get() as u32)
                .unwrap();
            rustix::fs::statat(&*dir, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).map(drop)
        });
        (heard.recv().unwrap(), thread)
    };
    let ((dying, first), (_, second)) = (look("tmp"), look("bin"));
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(lazuli::sys::fuse::let_out(&legacy.device, &[dying]).unwrap(), 1);
    let answer = within(&root.join("fuse"), move || first.join().unwrap());
    assert_eq!(answer, Err(rustix::io::Errno::INTR));
    assert!(!second.is_finished());
    let rig = Rig::adopt(&root, legacy);
    rig.faces.attach(THROUGH, Whole::new(torture("through"))).unwrap();
    rig.faces.begin().unwrap();
    assert_eq!(within(&root.join("fuse"), move || second.join().unwrap()), Ok(()));
    drop(dir);
    rig.close();
}
