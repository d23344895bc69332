//! What is in a layer is what is seen: names, attributes, extended attributes, listings.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use lazuli::layer::index::mode;
use rustix::fs::{Mode, OFlags};

use crate::fake::{Layout, content};
use crate::harness::{Mounted, getxattr, listxattr, names, read_file};

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
            assert!(listed.contains(b"file-9999-with-a-name-of-some-length".as_slice()));
            for entry in fs::read_dir(&dir).unwrap() {
                assert!(entry.unwrap().metadata().unwrap().is_file());
            }
        });
    }
}

#[test]
fn a_listing_goes_on_where_its_cookie_says() {
    let mut layout = Layout::new();
    for i in 0..300 {
        layout.file(format!("file-{i}"), 0o644, b"");
    }
    let mounted = Mounted::new();
    for slot in [1, 2, 30] {
        let layer = if slot == 2 {
            Layout::new()
        } else {
            std::mem::replace(&mut layout, Layout::new())
        };
        mounted
            .session
            .attach(slot, layer.build(&format!("cookies-{slot}")))
            .unwrap();
    }
    let root = mounted.session.mountpoint().to_owned();
    mounted.within(move || {
        for (path, expected) in [(root.join("1"), 302), (root.join("2"), 2), (root, 8)] {
            let fd = rustix::fs::open(&path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
            let mut dir = rustix::fs::Dir::read_from(fd).unwrap();
            let mut all = Vec::new();
            while let Some(entry) = dir.read() {
                let entry = entry.unwrap();
                all.push((entry.file_name().to_owned(), entry.offset()));
            }
            assert_eq!(all.len(), expected);
            assert_eq!((all[0].0.as_bytes(), all[1].0.as_bytes()), (&b"."[..], &b".."[..]));
            for (position, (_, cookie)) in all.iter().enumerate().rev() {
                dir.seek(*cookie).unwrap();
                let next = dir.read().map(|entry| entry.unwrap().file_name().to_owned());
                assert_eq!(next.as_ref(), all.get(position + 1).map(|(name, _)| name));
            }
        }
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
    let asked = || ops.map(|op| mounted.requests(op));
    pass();
    assert_eq!(mounted.metrics.read_bytes_total.get(), 50 * 9000);
    // A kernel may take back what it keeps, a page at a time; it does not do so each time.
    let mut passes = Vec::new();
    let keeps = (0..5).any(|_| {
        let before = asked();
        pass();
        passes.push(asked());
        asked() == before
    });
    assert!(keeps, "{ops:?}: {passes:?}");
    assert!(mounted.requests("open") <= 1, "the kernel opens files by itself");
    assert!(
        mounted.requests("opendir") <= 1,
        "the kernel opens directories by itself"
    );
    assert!(mounted.requests("read") >= 50);
}
