//! Layers that come and go, sessions that end, and what earlier processes left behind.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufRead as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use lazuli::fs::{FsError, Session};
use lazuli::metrics::Metrics;
use lazuli::sys::mountinfo::mount_at;
use rustix::process::{Pid, Signal};
use tokio::sync::Semaphore;

use crate::fake::{Cold, Layout, content, slow_and_fast};
use crate::harness::{Mounted, names, options, read_file, runtime, within};

/// Tells a child process of these tests to mount there and wait to be killed.
const SERVE_AT: &str = "LAZULI_TEST_SERVE_AT";

#[test]
fn layers_come_and_go() {
    let layer = |name: &str| {
        let mut layout = Layout::new();
        layout.file(name, 0o644, name.as_bytes()).file("cold", 0o644, b"cold");
        layout.build(name)
    };
    let mounted = Mounted::new();
    let session = &mounted.session;
    let root = session.mountpoint().to_owned();
    let listed = || {
        let root = root.clone();
        mounted.within(move || names(&root).unwrap())
    };
    assert_eq!(listed(), BTreeSet::new());
    session.attach(7, layer("first")).unwrap();
    session.attach(12, layer("other")).unwrap();
    session.attach(7, layer("first")).unwrap();
    assert!(matches!(
        session.attach(7, layer("second")),
        Err(FsError::SlotTaken { slot: 7, .. })
    ));
    assert!(matches!(
        session.attach(0, layer("zero")),
        Err(FsError::SlotZero { .. })
    ));

    let path = session.path(7);
    let (open, number) = mounted.within(move || {
        let number = fs::metadata(path.join("first")).unwrap().ino();
        (File::open(path.join("cold")).unwrap(), number)
    });
    assert!(session.detach(7));
    assert!(!session.detach(7));
    let path = session.path(7);
    mounted.within(move || {
        let error = fs::read(path.join("first")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        // Nothing of the open file was read before, so the kernel has to ask.
        let error = open.read_at(&mut [0; 4], 0).unwrap_err();
        assert!(
            [libc::ESTALE, libc::EIO].contains(&error.raw_os_error().unwrap()),
            "{error}"
        );
    });

    // Another layer in the same slot has the same inode numbers, and nothing of the first one shows.
    session.attach(7, layer("second")).unwrap();
    let path = session.path(7);
    mounted.within(move || {
        assert_eq!(fs::metadata(path.join("second")).unwrap().ino(), number);
        assert_eq!(fs::read(path.join("second")).unwrap(), b"second");
        assert_eq!(
            fs::metadata(path.join("first")).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    });
}

#[test]
fn unmounting_ends_even_while_an_overlay_holds_the_mount() {
    let layer = slow_and_fast(1, &Cold::Gate(Arc::new(Semaphore::new(0))));
    let mounted = Mounted::with(2, Duration::from_secs(50));
    mounted.session.attach(1, layer).unwrap();
    let overlay = mounted.overlay(&[1]);
    let path = overlay.0.join("slow-0");
    let reader = std::thread::spawn(move || read_file(&path));
    let Mounted {
        session, dir, metrics, ..
    } = mounted;
    while metrics.fuse_requests_total.with_label_values(&["read"]).get() == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let mountpoint = session.mountpoint().to_owned();
    session.unmount().unwrap();
    assert_eq!(mount_at(&mountpoint).unwrap(), None);
    within(&mountpoint, move || reader.join()).unwrap().unwrap_err();
    drop(overlay);
    drop(dir);
}

/// Not a test but the child process of the next ones.
#[test]
fn server_process() {
    let Some(mountpoint) = std::env::var_os(SERVE_AT).map(PathBuf::from) else {
        return;
    };
    let runtime = runtime();
    let session = Session::mount(
        &mountpoint,
        options(1, Duration::from_secs(30)),
        runtime.handle().clone(),
        Arc::new(Metrics::new()),
    )
    .unwrap();
    session.attach(1, slow_and_fast(0, &Cold::Hang)).unwrap();
    println!("mounted");
    loop {
        std::thread::park();
    }
}

/// Mounts in a child process, stops it in the way of `stop`, and mounts at the same place.
fn replace_stale_mount(stop: Signal) {
    let dir = tempfile::tempdir().unwrap();
    let mountpoint = dir.path().join("layers");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "lifecycle::server_process", "--nocapture"])
        .env(SERVE_AT, &mountpoint)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = io::BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("mounted")));
    let file = mountpoint.join("1/fast");
    let path = file.clone();
    assert_eq!(within(&mountpoint, move || fs::read(path)).unwrap().len(), 200_000);
    rustix::process::kill_process(Pid::from_child(&child), stop).unwrap();
    if stop == Signal::KILL {
        child.wait().unwrap();
        let path = file.clone();
        let error = within(&mountpoint, move || fs::metadata(path)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTCONN));
    }

    let runtime = runtime();
    let session = Session::mount(
        &mountpoint,
        options(0, Duration::from_secs(30)),
        runtime.handle().clone(),
        Arc::new(Metrics::new()),
    );
    // Before anything can fail: nothing else ends the child.
    let _ = child.kill();
    let _ = child.wait();
    let session = session.unwrap();
    session.attach(1, slow_and_fast(0, &Cold::Hang)).unwrap();
    let path = file.clone();
    assert_eq!(
        within(&mountpoint, move || fs::read(path)).unwrap(),
        content(200_000, 5)
    );
    session.unmount().unwrap();
    assert_eq!(mount_at(&mountpoint).unwrap(), None);
}

#[test]
fn the_mount_of_a_killed_process_is_replaced() {
    replace_stale_mount(Signal::KILL);
}

#[test]
fn the_mount_of_a_process_that_does_not_answer_is_replaced() {
    replace_stale_mount(Signal::STOP);
}
