//! Every command ended in its middle: it ends at once, says by what, and leaves nothing.

use std::fs;
use std::io::BufRead as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::rig::{FILE, Rig, can_mount, end_of, send};
use crate::support::fault_registry::{Fault, On};
use crate::support::sandbox::{PATIENCE, mounts_below, wait_until};

/// Signals that end a command, with their numbers.
const SIGNALS: [(&str, i32); 3] = [("INT", 2), ("TERM", 15), ("HUP", 1)];
/// Longer than any test.
const NEVER: Fault = Fault::Delay(Duration::from_secs(3600));

/// Commands that speak with a registry, and what of it never comes.
fn commands() -> Vec<(&'static str, On, Fault)> {
    let half = Fault::Stall(FILE / 2);
    let mut commands = vec![
        ("pull REF", On::Manifest, NEVER),
        ("index build REF -o DIR/out", On::Blob, half.clone()),
        ("index push REF", On::Blob, half.clone()),
        (
            "index push REF --repository REPO/index --from DIR/out",
            On::Manifest,
            NEVER,
        ),
        ("index pull REF -o DIR/out", On::Manifest, NEVER),
        ("index ls REF", On::Manifest, NEVER),
        ("index rm REF", On::Manifest, NEVER),
        (
            "index export REF --soci v1 --min-layer-size 0 -o DIR/out/new",
            On::Blob,
            half.clone(),
        ),
        (
            "index export REF --soci v2 --min-layer-size 0 -o DIR/out/new",
            On::Blob,
            half.clone(),
        ),
    ];
    if can_mount() {
        commands.push(("mount REF DIR/mountpoint", On::Blob, half.clone()));
        commands.push(("mount REF DIR/mountpoint --cache DIR/cache", On::Blob, half));
    }
    commands
}

#[test]
fn every_command_that_is_ended_in_its_middle_leaves_nothing() {
    for (line, on, fault) in commands() {
        for (signal, number) in SIGNALS {
            let rig = Rig::new();
            let line = line.replace("REPO", &rig.registry.host());
            rig.registry.fail(on, 1_000_000, fault.clone());
            let child = rig.begin(&line, on);
            if on == On::Blob {
                wait_for_bytes(&rig, &line);
            }
            send(&child, signal);
            let (code, said) = end_of(child);
            assert_eq!(code, 128 + number, "{line}, SIG{signal}: {said}");
            assert!(said.contains(&format!("SIG{signal}")), "{line}: {said}");
            assert!(!said.contains("panicked"), "{line}: {said}");
            assert_eq!(rig.left(), Vec::<String>::new(), "{line}, SIG{signal}");
            let out: Vec<_> = fs::read_dir(rig.path("out")).unwrap().collect();
            assert!(out.is_empty(), "{line}, SIG{signal}: {out:?}");
        }
    }
}

/// Waits until a part of a layer has been written somewhere.
fn wait_for_bytes(rig: &Rig, line: &str) {
    let written = || {
        let dirs = ["tmp", "out", "cache"].map(|name| rig.path(name));
        let mut all = dirs.into_iter().flat_map(|dir| walk(&dir));
        all.any(|length| length > 0).then_some(())
    };
    // An export of version 1 writes nothing before its end.
    if !line.contains("v1") {
        wait_until(PATIENCE, written).unwrap_or_else(|| panic!("{line}: nothing is ever written"));
    }
}

/// Lengths of all files below a directory, in which files come and go, and mounts hang.
fn walk(dir: &Path) -> Vec<u64> {
    let mut lengths = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.metadata() {
            Ok(metadata) if metadata.is_file() && entry.file_name() != "claim" => lengths.push(metadata.len()),
            Ok(metadata) if metadata.is_dir() && entry.file_name() != "fuse" => lengths.extend(walk(&entry.path())),
            _ => {}
        }
    }
    lengths
}

/// A `lazuli mount` that shows the image.
fn mounted(rig: &Rig) -> Child {
    let mut child = rig
        .command("mount REF DIR/mountpoint")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    out.read_line(&mut said).unwrap();
    assert!(said.contains("is mounted on"), "{said}");
    assert!(rig.path("mountpoint/data/file").exists());
    child
}

#[test]
fn a_mount_that_is_shown_ends_well_at_every_signal() {
    if !can_mount() {
        return;
    }
    for (signal, _) in SIGNALS {
        let rig = Rig::new();
        let child = mounted(&rig);
        send(&child, signal);
        let (code, said) = end_of(child);
        assert_eq!((code, said.as_str()), (0, ""), "SIG{signal}");
        assert_eq!(rig.left(), Vec::<String>::new(), "SIG{signal}");
    }
}

#[test]
fn a_mount_that_somebody_has_taken_away_ends_well() {
    if !can_mount() {
        return;
    }
    let rig = Rig::new();
    let child = mounted(&rig);
    let mut umount = Command::new("umount");
    assert!(umount.arg(rig.path("mountpoint")).status().unwrap().success());
    // Somebody else's, at the same place.
    let mut mount = Command::new("mount");
    let mounted = mount.args(["-t", "tmpfs", "tmpfs"]).arg(rig.path("mountpoint"));
    assert!(mounted.status().unwrap().success());
    send(&child, "TERM");
    assert_eq!(end_of(child), (0, String::new()));
    assert_eq!(mounts_below(&rig.path("mountpoint")).len(), 1, "it is not ours");
}

#[test]
fn a_mount_that_nobody_can_be_told_of_is_taken_away() {
    if !can_mount() {
        return;
    }
    let rig = Rig::new();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = rig.command("mount REF DIR/mountpoint");
    let child = command.stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
    assert_eq!(end_of(child), (141, String::new()));
    assert_eq!(rig.left(), Vec::<String>::new());
}

#[test]
fn what_a_killed_command_has_left_is_cleared_by_the_next() {
    let rig = Rig::new();
    rig.registry.fail(On::Blob, 1, Fault::Stall(FILE / 2));
    let child = rig.begin("index build REF -o DIR/out", On::Blob);
    wait_for_bytes(&rig, "index build");
    send(&child, "KILL");
    assert_eq!(end_of(child).0, -9);
    assert_ne!(rig.left(), Vec::<String>::new(), "nobody can tidy up after SIGKILL");
    rig.run("index build REF -o DIR/out").expect_success();
    assert_eq!(rig.left(), Vec::<String>::new());
}

#[test]
fn half_files_of_a_killed_command_are_cleared_by_the_next() {
    let rig = Rig::new();
    rig.registry.fail(On::Blob, 1, Fault::Stall(FILE / 2));
    let line = "index export REF --soci v2 --min-layer-size 0 -o DIR/out";
    let child = rig.begin(line, On::Blob);
    wait_for_bytes(&rig, line);
    send(&child, "KILL");
    end_of(child);
    rig.run(line).expect_success();
    let files = crate::rig::tree(&rig.path("out"));
    let is_hidden = |path: &&PathBuf| path.file_name().unwrap().to_string_lossy().starts_with('.');
    assert_eq!(files.keys().find(is_hidden), None);
}

#[test]
fn mounts_of_a_killed_command_are_taken_away_by_the_next() {
    if !can_mount() {
        return;
    }
    let rig = Rig::new();
    let child = mounted(&rig);
    send(&child, "KILL");
    assert_eq!(end_of(child).0, -9);
    assert!(
        mounts_below(&rig.path("mountpoint")).len() == 1,
        "nobody can tidy up after SIGKILL"
    );
    let other = Rig::new();
    // Somebody else's mount, made at the same place, is not touched.
    let next = mounted(&other);
    assert!(
        mounts_below(&rig.path("mountpoint")).len() == 1,
        "it has another TMPDIR"
    );
    send(&next, "TERM");
    end_of(next);
    let next = mounted(&rig);
    assert_eq!(mounts_below(&rig.path("mountpoint")).len(), 1);
    send(&next, "TERM");
    assert_eq!(end_of(next).0, 0);
    assert_eq!(rig.left(), Vec::<String>::new());
}

#[test]
fn nohup_is_respected() {
    let rig = Rig::new();
    rig.registry.fail(On::Manifest, 1_000_000, NEVER);
    let command = rig.command("index ls REF");
    let mut nohup = Command::new("nohup");
    // Without that which sets signals to what they are by default.
    nohup.args(command.get_args().skip(1));
    let child = nohup.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until(PATIENCE, || (!rig.registry.seen(On::Manifest).is_empty()).then_some(())).unwrap();
    send(&child, "HUP");
    send(&child, "TERM");
    let (code, said) = end_of(child);
    assert_eq!(code, 143, "{said}");
}

/// `timeout`, and terminals that are closed, send the same signal to the process and to its group.
#[test]
fn a_signal_that_comes_twice_at_once_is_one() {
    if !can_mount() {
        return;
    }
    let rig = Rig::new();
    rig.registry.fail(On::Blob, 1_000_000, Fault::Stall(FILE / 2));
    let child = rig.begin("mount REF DIR/mountpoint", On::Blob);
    let pid = child.id().to_string();
    let twice = format!("kill -s TERM {pid}; kill -s TERM {pid}; kill -s HUP {pid}");
    // It may be too fast for the later ones.
    let _ = Command::new("sh").args(["-c", &twice]).stderr(Stdio::null()).status();
    let (code, said) = end_of(child);
    assert!(code == 143 || code == 129, "{code} {said}");
    assert!(!said.contains("second signal"), "{said}");
    assert_eq!(rig.left(), Vec::<String>::new());
}

/// A containerd that never answers, not even when what was begun is to be removed.
#[test]
fn a_second_signal_ends_what_does_not_end_by_itself() {
    let rig = Rig::new();
    let listener = std::os::unix::net::UnixListener::bind(rig.path("containerd.sock")).unwrap();
    let mut child = rig
        .command("pull REF")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let _connection = listener.accept().unwrap();
    let ended = wait_until(PATIENCE, || {
        let _ = Command::new("kill")
            .args(["-s", "INT", &child.id().to_string()])
            .stderr(Stdio::null())
            .status();
        child.try_wait().unwrap()
    });
    assert_eq!(ended.and_then(|status| status.code()), Some(130));
    let (_, said) = end_of(child);
    assert!(said.contains("second signal"), "{said}");
}

#[test]
fn a_question_to_a_daemon_that_is_stuck_can_be_ended() {
    let rig = Rig::new();
    let listener = std::os::unix::net::UnixListener::bind(rig.path("lazuli.sock")).unwrap();
    let child = rig
        .command("status")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let _connection = listener.accept().unwrap();
    send(&child, "INT");
    assert_eq!(end_of(child).0, 130);
}
