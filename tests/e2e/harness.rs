//! The harness checked with harmless means: what it compares and writes is what it says.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

use crate::support::containerd::chain_ids;
use crate::support::sandbox::{run, run_ok};
use crate::support::tar::{Dialect, Entry, Tar};
use crate::support::tree::{Options, compare};

#[test]
fn gnu_tar_reads_what_is_written() {
    let mut bytes = Vec::new();
    let mut tar = Tar::new(&mut bytes);
    let long = "d/".repeat(90) + "file";
    tar.add(Entry::file(&long, "pax").mtime_ns(1_500_000_000, 250_000_000))
        .unwrap();
    tar.add(
        Entry::file(long.clone() + "2", "gnu")
            .dialect(Dialect::Gnu)
            .owner(1 << 30, 1),
    )
    .unwrap();
    tar.add(Entry::file(long.clone() + "3", "ustar").dialect(Dialect::Ustar))
        .unwrap();
    tar.add(Entry::file("v7", "v7").dialect(Dialect::V7).mtime(-5)).unwrap();
    tar.finish().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let archive = dir.path().join("a.tar");
    fs::write(&archive, bytes).unwrap();
    let mut list = Command::new("tar");
    list.env("TZ", "UTC")
        .args(["--list", "--verbose", "--full-time", "--numeric-owner", "--file"])
        .arg(&archive);
    let listed = run_ok(&mut list).text();
    let lines: Vec<String> = listed
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    let expected = [
        format!("-rw-r--r-- 0/0 3 2017-07-14 02:40:00.25 {long}"),
        format!("-rw-r--r-- 1073741824/1 3 2020-09-13 12:26:40 {long}2"),
        format!("-rw-r--r-- 0/0 5 2020-09-13 12:26:40 {long}3"),
        "-rw-r--r-- 0/0 2 1969-12-31 23:59:55 v7".to_owned(),
    ];
    assert_eq!(lines, expected);
}

#[test]
fn a_command_that_hangs_is_ended() {
    let finished = run(
        Command::new("sh").args(["-c", "echo said; sleep 1000"]),
        Duration::from_millis(200),
    );
    assert!(!finished.success());
    assert_eq!(finished.text(), "said\n");
    assert!(finished.describe().contains("killed: it took too long"));
}

#[test]
fn chain_ids_are_those_of_the_image_specification() {
    let diff_ids = [
        "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef",
        "sha256:b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1",
    ];
    let chain = chain_ids(diff_ids.into_iter());
    assert_eq!(chain[0], diff_ids[0]);
    let script = format!("printf '%s %s' {} {} | sha256sum", diff_ids[0], diff_ids[1]);
    let expected = run_ok(Command::new("sh").args(["-c", &script])).text();
    assert_eq!(
        chain[1],
        format!("sha256:{}", expected.split_whitespace().next().unwrap())
    );
}

fn two_trees() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let sides = ["a", "b"].map(|side| dir.path().join(side));
    let time = fs::FileTimes::new().set_modified(UNIX_EPOCH);
    for side in &sides {
        fs::create_dir_all(side.join("d")).unwrap();
        fs::write(side.join("d/f"), "same").unwrap();
        fs::hard_link(side.join("d/f"), side.join("d/g")).unwrap();
        for name in ["d/f", "d"] {
            File::open(side.join(name)).unwrap().set_times(time).unwrap();
        }
    }
    let [a, b] = sides;
    (dir, a, b)
}

fn differences(change: impl FnOnce(&Path)) -> Vec<String> {
    let (_dir, a, b) = two_trees();
    change(&b);
    compare(&a, &b, &Options::default()).differences
}

#[test]
fn equal_trees_are_equal() {
    let (_dir, a, b) = two_trees();
    let comparison = compare(&a, &b, &Options::default()).expect_equal();
    assert_eq!((comparison.entries, comparison.bytes), (4, 4));
}

#[test]
fn each_kind_of_difference_is_seen() {
    let keep_time = |path: PathBuf| {
        File::open(path)
            .unwrap()
            .set_times(fs::FileTimes::new().set_modified(UNIX_EPOCH))
            .unwrap();
    };
    let content = differences(|b| {
        fs::write(b.join("d/f"), "sane").unwrap();
        keep_time(b.join("d/f"));
    });
    assert_eq!(content, ["d/f: contents differ at byte 2 (read 4 and 4)"]);
    let time = differences(|b| {
        let later = UNIX_EPOCH + Duration::from_nanos(1);
        File::open(b.join("d/f"))
            .unwrap()
            .set_times(fs::FileTimes::new().set_modified(later))
            .unwrap();
    });
    assert_eq!(time, ["d/f: mtime (0, 0) != (0, 1)", "d/g: mtime (0, 0) != (0, 1)"]);
    let links = differences(|b| {
        fs::remove_file(b.join("d/g")).unwrap();
        fs::copy(b.join("d/f"), b.join("d/g")).unwrap();
        keep_time(b.join("d/g"));
        keep_time(b.join("d"));
    });
    assert!(links.contains(&"d/f: links 2 != 1".to_owned()), "{links:?}");
    assert!(links.contains(&"d/g: first name d/f != -".to_owned()), "{links:?}");
    let missing = differences(|b| {
        fs::remove_file(b.join("d/g")).unwrap();
    });
    assert!(
        missing.iter().any(|line| line.starts_with("d/g: only in ")),
        "{missing:?}"
    );
    let attribute = differences(|b| {
        rustix::fs::setxattr(b.join("d"), "user.k", b"v", rustix::fs::XattrFlags::empty()).unwrap();
    });
    assert_eq!(attribute, ["d: xattrs  != user.k=v"]);
}
