//! Layers below overlayfs.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;

use crate::fake::{Layout, content};
use crate::harness::{Mounted, Overlay, getxattr, names};

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
fn overlayfs_takes_more_lower_directories_than_fit_into_a_page() {
    const LAYERS: u32 = 60;
    // Paths of about 180 bytes go to the kernel as text, those of about 330 as descriptors.
    for levels in [1, 2] {
        let mounted = Mounted::below(&vec!["x".repeat(150); levels].join("/"));
        for slot in 1..=LAYERS {
            let mut layout = Layout::new();
            layout
                .file("top", 0o644, slot.to_string().as_bytes())
                .file(format!("only-{slot}"), 0o644, b"");
            mounted
                .session
                .attach(slot, layout.build(&format!("many-{slot}")))
                .unwrap();
        }
        let slots: Vec<u32> = (1..=LAYERS).rev().collect();
        let overlay = mounted.overlay(&slots);
        let merged = overlay.0.clone();
        mounted.within(move || {
            assert_eq!(names(&merged).unwrap().len(), LAYERS as usize + 1);
            assert_eq!(fs::read(merged.join("top")).unwrap(), LAYERS.to_string().as_bytes());
        });
    }
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
