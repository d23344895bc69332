//! Calls on files of images: what each answers in a container over overlayfs' directories, and over Lazuli's layers.
//!
//! What differs stands in one table in docs/OPERATIONS.md, and nothing else may differ.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;

use rustix::fs::{Advice, FlockOperation, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use crate::stage::{Stage, subject};
use crate::support::containerd::{Generation, REFERENCE};
use crate::support::image::{Compression, Flavour, ordinary};
use crate::support::lazuli::SNAPSHOTTER;
use crate::support::sandbox::run_ok;

/// A file of the image, of this many bytes.
const FILE: &str = "app/data/middle.bin";
const LENGTH: u64 = 1_500_000;
/// Alignment that suits every disk.
const BLOCK: usize = 4096;
/// Calls that answer differently, as the table in the documentation names them.
const DIFFER: [&str; 3] = ["open with O_DIRECT", "stat: st_blksize", "ioctl FS_IOC_GETFLAGS"];

fn open(root: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::open(root.join(FILE), flags | OFlags::CLOEXEC, Mode::empty())
}

fn told<T: std::fmt::Debug>(answer: Result<T, Errno>) -> String {
    match answer {
        Ok(answer) => format!("{answer:?}"),
        Err(error) => format!("error: {error}"),
    }
}

/// What each call answers below `root`.
fn answers(root: &Path) -> Vec<(&'static str, String)> {
    let path = root.join(FILE);
    let file = open(root, OFlags::RDONLY).unwrap();
    let stat = rustix::fs::stat(&path).unwrap();
    let mut buffer = vec![0_u8; 2 * BLOCK];
    let aligned = buffer.as_ptr().align_offset(BLOCK);
    let direct = open(root, OFlags::RDONLY | OFlags::DIRECT)
        .and_then(|file| rustix::io::pread(&file, &mut buffer[aligned..aligned + BLOCK], 0));
    let copied = || -> Result<usize, Errno> {
        let target = tempfile::tempfile().unwrap();
        rustix::fs::copy_file_range(&file, Some(&mut 0), &target, None, BLOCK)
    };
    let sent = || -> Result<usize, Errno> {
        let target = tempfile::tempfile().unwrap();
        rustix::fs::sendfile(&target, &file, Some(&mut 0), BLOCK)
    };
    vec![
        ("read", told(rustix::io::pread(&file, &mut [0; 100], LENGTH - 50))),
        ("read at the end", told(rustix::io::pread(&file, &mut [0; 100], LENGTH))),
        ("open with O_DIRECT", told(direct)),
        (
            "open with O_NOATIME",
            told(open(root, OFlags::RDONLY | OFlags::NOATIME).map(drop)),
        ),
        (
            "open of a file as a directory",
            told(open(root, OFlags::RDONLY | OFlags::DIRECTORY).map(drop)),
        ),
        ("lseek SEEK_DATA", told(rustix::fs::seek(&file, SeekFrom::Data(0)))),
        ("lseek SEEK_HOLE", told(rustix::fs::seek(&file, SeekFrom::Hole(0)))),
        (
            "lseek SEEK_DATA at the end",
            told(rustix::fs::seek(&file, SeekFrom::Data(LENGTH))),
        ),
        ("copy_file_range", told(copied())),
        ("sendfile", told(sent())),
        (
            "posix_fadvise",
            told(rustix::fs::fadvise(&file, 0, None, Advice::WillNeed)),
        ),
        (
            "flock",
            told(rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)),
        ),
        ("fsync", told(rustix::fs::fsync(&file))),
        (
            "stat: size, links, type",
            told(Ok((stat.st_size, stat.st_nlink, stat.st_mode))),
        ),
        ("stat: st_blksize", told(Ok(stat.st_blksize))),
        (
            "statfs: f_bsize",
            told(rustix::fs::fstatfs(&file).map(|stat| stat.f_bsize)),
        ),
        (
            "statfs: f_type",
            told(rustix::fs::fstatfs(&file).map(|stat| stat.f_type)),
        ),
        (
            "statfs: f_namelen",
            told(rustix::fs::fstatfs(&file).map(|stat| stat.f_namelen)),
        ),
        (
            "ioctl FS_IOC_GETFLAGS",
            told(rustix::fs::ioctl_getflags(&file).map(drop)),
        ),
        (
            "getxattr of what is not there",
            told(rustix::fs::fgetxattr(&file, c"user.none", &mut [0_u8; 10][..])),
        ),
        (
            "access W_OK",
            told(rustix::fs::access(&path, rustix::fs::Access::WRITE_OK)),
        ),
        (
            "readlink of a file",
            told(rustix::fs::readlink(&path, Vec::new()).map(drop)),
        ),
        ("unlink of a directory", told(rustix::fs::unlink(root.join("app")))),
    ]
}

#[test]
fn calls_answer_as_on_overlayfs_but_for_those_that_are_documented() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let stage = Stage::new(
        "calls_answer_as_on_overlayfs_but_for_those_that_are_documented",
        Generation::One,
    );
    let reference = stage.push(&ordinary(Flavour::Oci, Compression::Gzip), "calls/app:1");
    stage.pull(&reference);
    stage.containerd.pull(&reference, REFERENCE).expect_success();
    if stage.lazuli.as_ref().unwrap().status()["face"]["face"] != "image" {
        eprintln!("the table is about the image face, and the tree serves");
        return;
    }
    let top = stage.containerd.chain_ids(&reference).pop().unwrap();
    // As a container has it: with an upper directory.
    let [expected, found] = [REFERENCE, SNAPSHOTTER].map(|snapshotter| {
        let key = stage.containerd.marked_snapshot("prepare", snapshotter, &top);
        let root = stage.sandbox.dir(format!("roots/{snapshotter}"));
        stage.containerd.mount_snapshot(snapshotter, &key, &root);
        let answers = answers(&root);
        run_ok(Command::new("umount").arg(&root));
        answers
    });
    let docs = include_str!("../../docs/OPERATIONS.md");
    let mut wrong = Vec::new();
    for ((call, expected), (_, found)) in expected.iter().zip(&found) {
        println!("{call}: {expected} with overlayfs, {found} with Lazuli");
        match DIFFER.contains(call) {
            true if !docs.contains(&format!("| {call} |")) => {
                wrong.push(format!("{call} is not in docs/OPERATIONS.md"))
            }
            false if found != expected => wrong.push(format!("{call}: {found}, not {expected}")),
            _ => {}
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
