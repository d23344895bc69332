//! The tree face through the real kernel: a FUSE mount of layers in memory, and overlayfs on top of it.
//!
//! Needs root, /dev/fuse and overlayfs, as Lazuli does.

#[path = "tree_face/fake.rs"]
mod fake;
#[path = "tree_face/harness.rs"]
mod harness;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufRead as _, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use fake::{Cold, FakeLayer, Layout};
use harness::{Mounted, Overlay, options, runtime, within};
use lazuli::fs::{FsError, Session};
use lazuli::layer::index::mode;
use lazuli::metrics::Metrics;
use lazuli::sys::mountinfo::mount_at;
use tokio::sync::Semaphore;

/// Tells a child process of these tests to mount there and wait to be killed.
const SERVE_AT: &str = "LAZULI_TEST_SERVE_AT";
const EIO: Option<i32> = Some(libc::EIO);

/// Names of a directory, as a set; fails if one comes twice.
fn names(dir: &Path) -> io::Result<BTreeSet<Vec<u8>>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name().as_bytes().to_vec();
        assert!(names.insert(name), "a name comes twice");
    }
    Ok(names)
}

fn getxattr(path: &Path, name: &str) -> io::Result<Vec<u8>> {
    let mut value = vec![0; 64 << 10];
    let len = rustix::fs::lgetxattr(path, name, &mut value[..])?;
    value.truncate(len);
    Ok(value)
}

fn listxattr(path: &Path) -> io::Result<BTreeSet<String>> {
    let mut list = vec![0; 64 << 10];
    let len = rustix::fs::llistxattr(path, &mut list[..])?;
    let names = list[..len].split(|&c| c == 0).filter(|name| !name.is_empty());
    Ok(names.map(|name| String::from_utf8_lossy(name).into_owned()).collect())
}

/// A file that is not in the page cache: what is read from it, is asked of the session.
fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn content(len: usize, seed: u32) -> Vec<u8> {
    (0..len as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8)
        .collect()
}

#[test]
fn every_kind_of_file_looks_as_its_layer_says() {
    let long = "n".repeat(255);
    let odd = b"odd \xff\xfe\n name".as_slice();
    let mut layout = Layout::new();
    layout
        .dir("bin", 0o755)
        .file("bin/sh", 0o4755, b"#!/bin/true\n")
        .hard_link("bin/dash", "bin/sh")
        .set("bin/sh", |inode| {
            (inode.uid, inode.gid) = (1000, 4_000_000_000);
            (inode.mtime, inode.mtime_nsec) = (1_700_000_000, 123_456_789);
        })
        .file("empty", 0o600, b"")
        .set("empty", |inode| (inode.mtime, inode.mtime_nsec) = (-2, 500_000_000))
        .symlink("link", "bin/sh")
        .symlink("dangling", b"nowhere/\xff")
        .special("null", mode::CHR | 0o666, 1, 3)
        .special("disk", mode::BLK | 0o660, 259, 300_000)
        .special("pipe", mode::FIFO | 0o644, 0, 0)
        .special("socket", mode::SOCK | 0o755, 0, 0)
        .dir("tmp", 0o1777)
        .dir("tmp/a", 0o700)
        .dir("tmp/a/b", 0o2750)
        .file(odd, 0o644, b"odd")
        .file(&long, 0o644, &content(70_000, 1));
    let mounted = Mounted::new();
    mounted.session.attach(3, layout.build("kinds")).unwrap();
    let root = mounted.session.path(3);
    mounted.within(move || {
        let stat = |name: &str| fs::symlink_metadata(root.join(name)).unwrap();
        let mut expected: BTreeSet<Vec<u8>> = [
            "bin", "empty", "link", "dangling", "null", "disk", "pipe", "socket", "tmp",
        ]
        .map(|name| name.as_bytes().to_vec())
        .into();
        expected.extend([odd.to_vec(), long.as_bytes().to_vec()]);
        assert_eq!(names(&root).unwrap(), expected);

        let sh = stat("bin/sh");
        assert_eq!(sh.mode(), mode::REG | 0o4755);
        assert_eq!((sh.uid(), sh.gid(), sh.nlink()), (1000, 4_000_000_000, 2));
        assert_eq!((sh.size(), sh.blocks(), sh.blksize()), (12, 1, 4096));
        assert_eq!((sh.mtime(), sh.mtime_nsec()), (1_700_000_000, 123_456_789));
        assert_eq!(sh.ino(), stat("bin/dash").ino());
        assert_eq!(sh.ino() >> 32, 3);

        let empty = stat("empty");
        assert_eq!((empty.mtime(), empty.mtime_nsec()), (-2, 500_000_000));
        assert_eq!((empty.size(), empty.blocks()), (0, 0));
        assert_eq!(read_file(&root.join("empty")).unwrap(), b"");

        assert_eq!(fs::read_link(root.join("link")).unwrap(), Path::new("bin/sh"));
        assert_eq!(fs::read(root.join("link")).unwrap(), b"#!/bin/true\n");
        let dangling = fs::read_link(root.join("dangling")).unwrap();
        assert_eq!(dangling.as_os_str().as_bytes(), b"nowhere/\xff");
        assert_eq!(stat("dangling").size(), 9);

        assert!(stat("null").file_type().is_char_device());
        assert_eq!(stat("null").rdev(), rustix::fs::makedev(1, 3));
        assert!(stat("disk").file_type().is_block_device());
        assert_eq!(stat("disk").rdev(), rustix::fs::makedev(259, 300_000));
        assert!(stat("pipe").file_type().is_fifo());
        assert!(stat("socket").file_type().is_socket());

        assert_eq!(stat("tmp").mode(), mode::DIR | 0o1777);
        assert_eq!((stat("tmp").nlink(), stat("tmp").size()), (3, 4096));
        assert_eq!(stat("tmp/a/b").mode(), mode::DIR | 0o2750);
        assert_eq!(stat("tmp/a/b/..").ino(), stat("tmp/a").ino());
        assert_eq!(stat("tmp/a/b").nlink(), 2);

        assert_eq!(fs::read(root.join(OsStr::from_bytes(odd))).unwrap(), b"odd");
        assert_eq!(fs::read(root.join(&long)).unwrap(), content(70_000, 1));
        for missing in ["nothing", "bin/nothing", "empty2"] {
            let error = fs::symlink_metadata(root.join(missing)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound, "{missing}");
        }
    });
}

#[test]
fn extended_attributes() {
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // Version 2; user::rwx, user:1000:r--, group::r-x, mask::r-x, other::---
    let mut acl = vec![2, 0, 0, 0];
    for (tag, permissions, id) in [
        (1u16, 7u16, u32::MAX),
        (2, 4, 1000),
        (4, 5, u32::MAX),
        (16, 5, u32::MAX),
        (32, 0, u32::MAX),
    ] {
        acl.extend(tag.to_le_bytes());
        acl.extend(permissions.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    let mut layout = Layout::new();
    layout
        .file("ping", 0o755, b"ping")
        .xattr("ping", "security.capability", &capability)
        .xattr("ping", "user.empty", b"")
        .xattr("ping", "user.large", &content(5000, 2))
        .xattr("ping", "trusted.secret", b"\0\x01\xff")
        .file("acl", 0o750, b"acl")
        .xattr("acl", "system.posix_acl_access", &acl)
        .dir("opaque", 0o755)
        .xattr("opaque", "trusted.overlay.opaque", b"y")
        .file("plain", 0o644, b"");
    let mounted = Mounted::new();
    mounted.session.attach(1, layout.build("xattrs")).unwrap();
    let root = mounted.session.path(1);
    mounted.within(move || {
        let ping = root.join("ping");
        let expected = ["security.capability", "user.empty", "user.large", "trusted.secret"];
        assert_eq!(listxattr(&ping).unwrap(), expected.map(str::to_owned).into());
        assert_eq!(getxattr(&ping, "security.capability").unwrap(), capability);
        assert_eq!(getxattr(&ping, "user.empty").unwrap(), b"");
        assert_eq!(getxattr(&ping, "user.large").unwrap(), content(5000, 2));
        assert_eq!(getxattr(&ping, "trusted.secret").unwrap(), b"\0\x01\xff");
        assert_eq!(getxattr(&root.join("acl"), "system.posix_acl_access").unwrap(), acl);

        let absent = getxattr(&ping, "user.absent").unwrap_err();
        assert_eq!(absent.raw_os_error(), Some(libc::ENODATA));
        let short = rustix::fs::lgetxattr(&ping, "user.large", &mut [0u8; 10][..]).unwrap_err();
        assert_eq!(short, rustix::io::Errno::RANGE);
        let size = rustix::fs::lgetxattr_query(&ping, "user.large").unwrap();
        assert_eq!(size, 5000);
        assert_eq!(listxattr(&root.join("plain")).unwrap(), BTreeSet::new());

        let opaque = root.join("opaque");
        assert_eq!(getxattr(&opaque, "trusted.overlay.opaque").unwrap(), b"y");
        assert_eq!(getxattr(&opaque, "user.overlay.opaque").unwrap(), b"y");
        assert_eq!(
            listxattr(&opaque).unwrap(),
            BTreeSet::from(["trusted.overlay.opaque".to_owned()])
        );
    });
}

#[test]
fn a_large_directory_is_listed_completely() {
    const FILES: usize = 10_000;
    let mut layout = Layout::new();
    layout.dir("many", 0o755);
    for i in 0..FILES {
        layout.file(format!("many/file-{i}-with-a-name-of-some-length"), 0o644, b"");
    }
    let mounted = Mounted::new();
    mounted.session.attach(1, layout.build("large")).unwrap();
    let overlay = mounted.overlay(&[1]);
    for dir in [mounted.session.path(1).join("many"), overlay.0.join("many")] {
        mounted.within(move || {
            let listed = names(&dir).unwrap();
            assert_eq!(listed.len(), FILES);
            assert!(listed.contains(&b"file-9999-with-a-name-of-some-length".to_vec()));
            for entry in fs::read_dir(&dir).unwrap() {
                assert!(entry.unwrap().metadata().unwrap().is_file());
            }
        });
    }
}

#[test]
fn overlayfs_merges_layers() {
    let mut lower = Layout::new();
    lower
        .dir("etc", 0o755)
        .file("etc/kept", 0o644, b"lower")
        .file("etc/deleted", 0o644, b"lower")
        .file("etc/replaced", 0o644, b"lower")
        .dir("cleared", 0o755)
        .file("cleared/old", 0o644, b"lower")
        .dir("gone", 0o755)
        .file("gone/file", 0o644, b"lower");
    let mut upper = Layout::new();
    upper
        .dir("etc", 0o755)
        .whiteout("etc/deleted")
        .whiteout("etc/never-was-there")
        .file("etc/replaced", 0o600, b"upper")
        .dir("cleared", 0o711)
        .xattr("cleared", "trusted.overlay.opaque", b"y")
        .file("cleared/new", 0o644, b"upper")
        .whiteout("gone");
    let mounted = Mounted::new();
    mounted.session.attach(1, lower.build("lower")).unwrap();
    mounted.session.attach(2, upper.build("upper")).unwrap();
    let overlay = mounted.overlay(&[2, 1]);
    let merged = overlay.0.clone();
    mounted.within(move || {
        let set = |names: &[&str]| {
            names
                .iter()
                .map(|name| name.as_bytes().to_vec())
                .collect::<BTreeSet<_>>()
        };
        assert_eq!(names(&merged).unwrap(), set(&["etc", "cleared"]));
        assert_eq!(names(&merged.join("etc")).unwrap(), set(&["kept", "replaced"]));
        assert_eq!(names(&merged.join("cleared")).unwrap(), set(&["new"]));
        for hidden in ["etc/deleted", "etc/never-was-there", "cleared/old", "gone", "gone/file"] {
            let error = fs::symlink_metadata(merged.join(hidden)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound, "{hidden}");
        }
        assert_eq!(fs::read(merged.join("etc/replaced")).unwrap(), b"upper");
        assert_eq!(fs::metadata(merged.join("etc/replaced")).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::read(merged.join("etc/kept")).unwrap(), b"lower");
        assert_eq!(fs::metadata(merged.join("cleared")).unwrap().mode() & 0o777, 0o711);
    });
}

#[test]
fn files_are_copied_up_with_everything_they_have() {
    let mut layout = Layout::new();
    layout
        .dir("dir", 0o750)
        .xattr("dir", "user.dir", b"d")
        .file("dir/file", 0o640, &content(300_000, 3))
        .xattr("dir/file", "user.file", b"f")
        .set("dir/file", |inode| {
            (inode.uid, inode.gid) = (12, 34);
            (inode.mtime, inode.mtime_nsec) = (1_000_000_000, 7);
        });
    let mounted = Mounted::new();
    mounted.session.attach(1, layout.build("copy-up")).unwrap();
    let base = mounted.dir.path().to_owned();
    // The upper directory needs a file system of its own kind: a temporary directory may itself be on an overlay.
    for name in ["rw", "merged"] {
        fs::create_dir(base.join(name)).unwrap();
    }
    rustix::mount::mount(
        "tmpfs",
        base.join("rw"),
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        None,
    )
    .unwrap();
    let _tmpfs = Overlay(base.join("rw"));
    for name in ["rw/upper", "rw/work"] {
        fs::create_dir(base.join(name)).unwrap();
    }
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        mounted.session.path(1).display(),
        base.join("rw/upper").display(),
        base.join("rw/work").display()
    );
    let options = std::ffi::CString::new(options).unwrap();
    let merged = base.join("merged");
    let target = merged.clone();
    mounted
        .within(move || {
            rustix::mount::mount(
                "overlay",
                &target,
                "overlay",
                rustix::mount::MountFlags::empty(),
                options.as_c_str(),
            )
        })
        .unwrap();
    let _overlay = Overlay(merged.clone());
    mounted.within(move || {
        let file = merged.join("dir/file");
        let before = fs::metadata(&file).unwrap();
        fs::rename(&file, merged.join("dir/moved")).unwrap();
        let moved = merged.join("dir/moved");
        let after = fs::metadata(&moved).unwrap();
        assert_eq!(
            (after.uid(), after.gid(), after.mode(), after.size()),
            (12, 34, before.mode(), before.size())
        );
        assert_eq!((after.mtime(), after.mtime_nsec()), (1_000_000_000, 7));
        assert_eq!(getxattr(&moved, "user.file").unwrap(), b"f");
        assert_eq!(getxattr(&merged.join("dir"), "user.dir").unwrap(), b"d");
        assert_eq!(fs::read(&moved).unwrap(), content(300_000, 3));
        fs::write(&moved, b"new").unwrap();
        assert_eq!(fs::read(&moved).unwrap(), b"new");
    });
}

#[test]
fn statfs_and_refused_writes() {
    let mut layout = Layout::new();
    layout.file("file", 0o666, &content(10_000, 4)).dir("dir", 0o777);
    let mounted = Mounted::new();
    mounted.session.attach(1, layout.build("statfs")).unwrap();
    let root = mounted.session.path(1);
    mounted.within(move || {
        let stat = rustix::fs::statvfs(&root).unwrap();
        assert_eq!((stat.f_bsize, stat.f_frsize, stat.f_namemax), (4096, 4096, 255));
        assert_eq!((stat.f_blocks, stat.f_bfree, stat.f_files, stat.f_ffree), (3, 0, 3, 0));
        let file = root.join("file");
        let refused: Vec<io::Result<()>> = vec![
            fs::OpenOptions::new().write(true).open(&file).map(drop),
            File::create(root.join("new")).map(drop),
            fs::remove_file(&file),
            fs::remove_dir(root.join("dir")),
            fs::create_dir(root.join("new")),
            fs::rename(&file, root.join("other")),
            fs::hard_link(&file, root.join("other")),
            std::os::unix::fs::symlink("x", root.join("other")),
            fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)),
            std::os::unix::fs::chown(&file, Some(1), None),
            rustix::fs::setxattr(&file, "user.x", b"", rustix::fs::XattrFlags::empty()).map_err(io::Error::from),
        ];
        for (i, result) in refused.into_iter().enumerate() {
            let error = result.expect_err("it is refused");
            assert_eq!(error.raw_os_error(), Some(libc::EROFS), "operation {i}");
        }
        // The FUSE root is for root alone, however it is reached.
        assert_eq!(fs::metadata(root.parent().unwrap()).unwrap().mode() & 0o7777, 0o700);
    });
}

#[test]
fn the_kernel_keeps_names_absence_attributes_and_listings() {
    let mut layout = Layout::new();
    layout.dir("dir", 0o755).symlink("link", "dir/file-1");
    for i in 0..50 {
        layout.file(format!("dir/file-{i}"), 0o644, &content(9000, i));
    }
    let mounted = Mounted::new();
    mounted.session.attach(1, layout.build("kept")).unwrap();
    let overlay = mounted.overlay(&[1]);
    let pass = || {
        let merged = overlay.0.clone();
        mounted.within(move || {
            for name in names(&merged.join("dir")).unwrap() {
                let path = merged.join("dir").join(OsStr::from_bytes(&name));
                assert_eq!(fs::read(&path).unwrap().len(), 9000);
                fs::metadata(merged.join("absent")).unwrap_err();
            }
            fs::read(merged.join("link")).unwrap();
        });
    };
    pass();
    let ops = [
        "lookup",
        "getattr",
        "readlink",
        "read",
        "readdir",
        "readdirplus",
        "open",
        "opendir",
    ];
    let first = ops.map(|op| mounted.requests(op));
    pass();
    assert_eq!(ops.map(|op| mounted.requests(op)), first, "{ops:?}");
    assert!(mounted.requests("open") <= 1, "the kernel opens files by itself");
    assert!(
        mounted.requests("opendir") <= 1,
        "the kernel opens directories by itself"
    );
    assert!(mounted.requests("read") >= 50);
    assert_eq!(mounted.metrics.read_bytes_total.get(), 50 * 9000);
}

/// A layer with a cold file `slow-<i>` for each `i` below `slow`, and a ready file `fast`.
fn slow_and_fast(slow: usize, cold: &Cold) -> Arc<FakeLayer> {
    let mut layout = Layout::new();
    layout.file("fast", 0o644, &content(200_000, 5));
    for i in 0..slow {
        layout.file(format!("slow-{i}"), 0o644, &content(5000, i as u32));
    }
    let layer = layout.build("slow");
    for i in 0..slow {
        layer.set_cold(&format!("slow-{i}"), Some(cold.clone()));
    }
    layer
}

#[test]
fn slow_reads_hold_no_thread() {
    const SLOW: usize = 40;
    let gate = Arc::new(Semaphore::new(0));
    let layer = slow_and_fast(SLOW, &Cold::Gate(Arc::clone(&gate)));
    let mounted = Mounted::with(2, Duration::from_secs(50));
    mounted.session.attach(1, layer).unwrap();
    let root = mounted.session.path(1);
    let readers: Vec<_> = (0..SLOW)
        .map(|i| {
            let path = root.join(format!("slow-{i}"));
            std::thread::spawn(move || read_file(&path))
        })
        .collect();
    // All slow reads are with the session before the fast one begins.
    mounted.within({
        let metrics = Arc::clone(&mounted.metrics);
        move || {
            while metrics.fuse_requests_total.with_label_values(&["read"]).get() < SLOW as u64 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
    let path = root.join("fast");
    assert_eq!(mounted.within(move || read_file(&path)).unwrap(), content(200_000, 5));
    assert!(readers.iter().all(|reader| !reader.is_finished()));

    gate.add_permits(1);
    for (i, reader) in readers.into_iter().enumerate() {
        let bytes = mounted.within(move || reader.join()).unwrap().unwrap();
        assert_eq!(bytes, content(5000, i as u32));
    }
    assert_eq!(mounted.metrics.cold_read_seconds.get_sample_count(), SLOW as u64);
}

#[test]
fn a_read_ends_by_its_deadline() {
    let layer = slow_and_fast(2, &Cold::Gate(Arc::new(Semaphore::new(0))));
    layer.set_cold("slow-1", Some(Cold::Hang));
    let mounted = Mounted::with(1, Duration::from_millis(50));
    mounted.session.attach(1, Arc::clone(&layer) as _).unwrap();
    for (name, seed) in [("slow-0", 0), ("slow-1", 1)] {
        let path = mounted.session.path(1).join(name);
        let cold = path.clone();
        let error = mounted.within(move || read_file(&cold)).unwrap_err();
        assert_eq!(error.raw_os_error(), EIO, "{name}");
        // The failure is not kept.
        layer.set_cold(name, None);
        assert_eq!(mounted.within(move || read_file(&path)).unwrap(), content(5000, seed));
    }
}

#[test]
fn a_read_that_failed_succeeds_when_the_bytes_can_be_had() {
    let layer = slow_and_fast(1, &Cold::Fail(1));
    let mounted = Mounted::new();
    mounted.session.attach(1, layer).unwrap();
    let overlay = mounted.overlay(&[1]);
    let path = overlay.0.join("slow-0");
    mounted.within(move || {
        let file = File::open(&path).unwrap();
        let mut bytes = vec![0; 5000];
        // The kernel asks again by itself when read-ahead fails, so that one failure may stay unseen.
        let first = file.read_exact_at(&mut bytes, 0);
        if let Err(error) = first {
            assert_eq!(error.raw_os_error(), EIO);
        }
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, content(5000, 0));
    });
}

#[test]
fn a_failing_disk_and_a_bug_are_survived() {
    let layer = slow_and_fast(2, &Cold::DiskError);
    layer.set_cold("slow-1", Some(Cold::Panic));
    let mounted = Mounted::with(1, Duration::from_secs(30));
    mounted.session.attach(1, Arc::clone(&layer) as _).unwrap();
    let root = mounted.session.path(1);
    mounted.within(move || {
        assert_eq!(read_file(&root.join("slow-0")).unwrap(), content(5000, 0));
        for _ in 0..3 {
            let error = read_file(&root.join("slow-1")).unwrap_err();
            assert_eq!(error.raw_os_error(), EIO);
        }
        // The one thread is still there.
        assert_eq!(read_file(&root.join("fast")).unwrap(), content(200_000, 5));
    });
    assert!(mounted.session.is_alive());
}

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

/// Not a test but the child process of the next one.
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

#[test]
fn a_stale_mount_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let mountpoint = dir.path().join("layers");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "server_process", "--nocapture"])
        .env(SERVE_AT, &mountpoint)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = io::BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("mounted")));
    let file = mountpoint.join("1/fast");
    let path = file.clone();
    assert_eq!(within(&mountpoint, move || fs::read(path)).unwrap().len(), 200_000);
    child.kill().unwrap();
    child.wait().unwrap();
    let path = file.clone();
    let error = within(&mountpoint, move || fs::metadata(path)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOTCONN));

    let runtime = runtime();
    let session = Session::mount(
        &mountpoint,
        options(0, Duration::from_secs(30)),
        runtime.handle().clone(),
        Arc::new(Metrics::new()),
    )
    .unwrap();
    session.attach(1, slow_and_fast(0, &Cold::Hang)).unwrap();
    let path = file.clone();
    assert_eq!(
        within(&mountpoint, move || fs::read(path)).unwrap(),
        content(200_000, 5)
    );
    session.unmount().unwrap();
    assert_eq!(mount_at(&mountpoint).unwrap(), None);
}
