//! Images as the kernel shows them, and as `fsck.erofs` sees them.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use lazuli::layer::erofs::{self, Addressing};
use lazuli::layer::index::mode;
use lazuli::layer::{Ino, Inode, LayerIndex, ROOT_INO};
use proptest::prelude::*;
use rustix::fs::{AtFlags, CWD, Mode, makedev};
use rustix::mount::{MountFlags, UnmountFlags};

use super::pure::ADDRESSINGS;
use super::skip::{Ability, skipped};
use super::trees::{self, Made, Trees};

/// An image in files, mounted until dropped.
struct Mounted {
    dir: tempfile::TempDir,
}

impl Mounted {
    fn tree(&self) -> PathBuf {
        self.dir.path().join("tree")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.tree(), UnmountFlags::DETACH);
    }
}

/// Mounts what was made, in the way that Lazuli does here; `None`, with a message, where that is impossible.
fn mount(made: &Made) -> Option<Mounted> {
    mount_with(made, Addressing::Chunks)
}

fn mount_with(made: &Made, addressing: Addressing) -> Option<Mounted> {
    let mounted = Mounted {
        dir: tempfile::tempdir().unwrap(),
    };
    let path = |name: &str| mounted.dir.path().join(name);
    let image = erofs::write(&made.index, &made.devices, addressing).unwrap();
    fs::create_dir(mounted.tree()).unwrap();
    fs::write(path("meta"), &image.bytes).unwrap();
    let mut options = Vec::new();
    for (number, data) in made.data.iter().enumerate() {
        let file = path(&format!("data{number}"));
        fs::write(&file, data).unwrap();
        options.push(format!("device={}", file.display()));
    }
    fsck(&path("meta"), made.data.len(), mounted.dir.path());
    let options = std::ffi::CString::new(options.join(",")).unwrap();
    match rustix::mount::mount(
        path("meta"),
        mounted.tree(),
        "erofs",
        MountFlags::RDONLY,
        options.as_c_str(),
    ) {
        Ok(()) => Some(mounted),
        Err(error) if can_mount() => panic!("the kernel does not mount the image: {error}"),
        Err(error) => {
            skipped(Ability::ErofsFiles, error);
            None
        }
    }
}

/// Whether an image that another program once wrote, the simplest there is, can be mounted here.
fn can_mount() -> bool {
    let dir = tempfile::tempdir().unwrap();
    let (image, tree) = (dir.path().join("image"), dir.path().join("tree"));
    fs::create_dir(&tree).unwrap();
    // A superblock, and as number 40 an empty directory (compact, tail inline).
    let mut bytes = vec![0; 4096];
    let mut put = |at: usize, text: &[u8]| bytes[at..at + text.len()].copy_from_slice(text);
    put(1024, &0xe0f5_e1e2u32.to_le_bytes());
    put(1036, &[12]);
    put(1038, &40u16.to_le_bytes());
    put(1060, &1u32.to_le_bytes());
    put(1280, &[4, 0, 0, 0, 0xed, 0x41, 2, 0, 27]);
    put(
        1312,
        &[
            40, 0, 0, 0, 0, 0, 0, 0, 24, 0, 2, 0, 40, 0, 0, 0, 0, 0, 0, 0, 25, 0, 2, 0, b'.', b'.', b'.',
        ],
    );
    fs::write(&image, &bytes).unwrap();
    let possible = rustix::mount::mount(&image, &tree, "erofs", MountFlags::RDONLY, c"").is_ok();
    if possible {
        rustix::mount::unmount(&tree, UnmountFlags::DETACH).unwrap();
    }
    possible
}

/// Lets `fsck.erofs` check an image, if there is one that is new enough.
fn fsck(image: &Path, devices: usize, dir: &Path) {
    static SAID: std::sync::Once = std::sync::Once::new();
    let Some(program) = std::env::var_os("LAZULI_FSCK_EROFS") else {
        SAID.call_once(|| {
            skipped(
                Ability::FsckErofs,
                "set LAZULI_FSCK_EROFS to one of erofs-utils 1.8 or newer",
            )
        });
        return;
    };
    let mut command = Command::new(program);
    for number in 0..devices {
        command.arg(format!("--device={}", dir.join(format!("data{number}")).display()));
    }
    let output = command.arg(image).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    assert!(
        output.status.success(),
        "fsck.erofs: {}",
        String::from_utf8_lossy(&text)
    );
}

/// Compares a whole mounted tree with its index.
fn compare(made: &Made, tree: &Path) {
    let index = &made.index;
    let data = made.data.concat();
    let mut numbers: HashMap<u64, Ino> = HashMap::new();
    let mut dirs = vec![(tree.to_owned(), ROOT_INO)];
    while let Some((path, ino)) = dirs.pop() {
        let dir = index.inode(ino).unwrap();
        look(index, &path, dir, &data);
        let listed: BTreeSet<_> = fs::read_dir(&path)
            .unwrap()
            .map(|entry| {
                entry
                    .map(|entry| (entry.file_name().into_vec(), entry.metadata().unwrap().ino()))
                    .unwrap()
            })
            .collect();
        let expected: BTreeSet<_> = index
            .entries(dir)
            .iter()
            .map(|entry| index.name(entry).to_vec())
            .collect();
        assert!(listed.iter().map(|(name, _)| name).eq(&expected), "{}", path.display());
        assert_eq!(
            fs::symlink_metadata(path.join("no such name")).unwrap_err().kind(),
            std::io::ErrorKind::NotFound
        );
        for entry in index.entries(dir) {
            let path = path.join(std::ffi::OsStr::from_bytes(index.name(entry)));
            let inode = index.inode(entry.ino).unwrap();
            let known = numbers.insert(fs::symlink_metadata(&path).unwrap().ino(), entry.ino);
            assert_eq!(known.unwrap_or(entry.ino), entry.ino, "two inodes have one number");
            if inode.is_dir() {
                dirs.push((path, entry.ino));
            } else if known.is_none() {
                look(index, &path, inode, &data);
            }
        }
    }
    assert_eq!(numbers.len() + 1, index.inodes().len());
}

/// Compares one file with its inode.
fn look(index: &LayerIndex, path: &Path, inode: &Inode, data: &[u8]) {
    let context = path.display();
    let there = fs::symlink_metadata(path).unwrap_or_else(|error| panic!("{context}: {error}"));
    let numbers = (there.mode(), there.uid(), there.gid(), there.nlink());
    assert_eq!(
        numbers,
        (inode.mode, inode.uid, inode.gid, inode.nlink.into()),
        "{context}"
    );
    assert_eq!(
        (there.mtime(), there.mtime_nsec()),
        (inode.mtime, inode.mtime_nsec.into()),
        "{context}"
    );
    assert_eq!(
        (there.ctime(), there.ctime_nsec()),
        (inode.mtime, inode.mtime_nsec.into()),
        "{context}"
    );
    let kind = there.file_type();
    match inode.file_type() {
        mode::REG => {
            let expected = &data[inode.data as usize..(inode.data + inode.size) as usize];
            assert!(fs::read(path).unwrap() == expected, "{context} has other content");
        }
        mode::LNK => assert_eq!(
            fs::read_link(path).unwrap().as_os_str().as_bytes(),
            index.target(inode),
            "{context}"
        ),
        mode::CHR | mode::BLK => {
            assert_eq!(kind.is_char_device(), inode.file_type() == mode::CHR, "{context}");
            assert_eq!(there.rdev(), makedev(inode.rdev_major, inode.rdev_minor), "{context}");
        }
        mode::FIFO => assert!(kind.is_fifo(), "{context}"),
        mode::SOCK => assert!(kind.is_socket(), "{context}"),
        _ => assert!(kind.is_dir(), "{context}"),
    }
    let mut list = vec![0; 65536];
    let len = rustix::fs::llistxattr(path, &mut list[..]).unwrap();
    let mut names: Vec<_> = list[..len]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .collect();
    names.sort_unstable();
    let mut expected: Vec<_> = index.xattrs(inode).map(|(name, _)| name).collect();
    expected.sort_unstable();
    assert_eq!(names, expected, "{context}");
    for (name, expected) in index.xattrs(inode) {
        let mut value = vec![0; 65536];
        let len = rustix::fs::lgetxattr(path, std::ffi::OsStr::from_bytes(name), &mut value[..])
            .unwrap_or_else(|error| panic!("{context}: {}: {error}", name.escape_ascii()));
        assert!(&value[..len] == expected, "{context}: {}", name.escape_ascii());
    }
}

#[test]
fn the_kernel_shows_everything_odd() {
    let made = trees::torture();
    for addressing in ADDRESSINGS {
        let Some(mounted) = mount_with(&made, addressing) else {
            return;
        };
        compare(&made, &mounted.tree());
    }
}

#[test]
fn the_kernel_finds_each_of_a_hundred_thousand_names() {
    let mut t = Trees::new(1);
    let dir = t.dir(ROOT_INO, b"many", 0o755);
    for at in 0..100_000usize {
        t.file(dir, format!("{at:x}").as_bytes(), usize::from(at % 1000 == 0), 0, 0);
    }
    let made = t.finish();
    let Some(mounted) = mount(&made) else { return };
    compare(&made, &mounted.tree());
}

#[test]
fn an_acl_counts() {
    let mut t = Trees::new(1);
    let file = t.file(ROOT_INO, b"file", 3, 0, 0);
    t.inode(file).mode = mode::REG | 0o640;
    t.xattr(file, b"system.posix_acl_access", &trees::acl());
    // What the kernel would not understand is left out: it would refuse every access.
    let other = t.file(ROOT_INO, b"other", 3, 0, 0);
    t.xattr(other, b"system.posix_acl_access", b"\x02\0\0\0nonsense");
    t.xattr(other, b"btrfs.compression", b"zstd");
    let made = t.finish();
    assert_eq!(
        erofs::write(&made.index, &made.devices, Addressing::Chunks)
            .unwrap()
            .dropped_xattrs,
        2
    );
    let Some(mounted) = mount(&made) else { return };
    let mut all = Command::new("setpriv");
    rustix::fs::chmodat(CWD, mounted.dir.path(), Mode::from_raw_mode(0o755), AtFlags::empty()).unwrap();
    all.args(["--reuid=1234", "--regid=1234", "--clear-groups", "cat"])
        .arg(mounted.tree().join("file"));
    assert!(
        all.output().unwrap().status.success(),
        "the user that the ACL names cannot read the file"
    );
    assert_eq!(fs::read(mounted.tree().join("other")).unwrap().len(), 3);
}

#[test]
fn overlayfs_takes_whiteouts_and_opaque_directories() {
    let mut lower = Trees::new(1);
    for name in [&b"gone"[..], b"stays"] {
        lower.file(ROOT_INO, name, 10, 0, 0);
    }
    let dir = lower.dir(ROOT_INO, b"dir", 0o755);
    lower.file(dir, b"hidden", 1, 0, 0);
    let mut upper = Trees::new(1);
    upper.special(ROOT_INO, b"gone", mode::CHR, 0, 0);
    let dir = upper.dir(ROOT_INO, b"dir", 0o700);
    upper.xattr(dir, b"trusted.overlay.opaque", b"y");
    upper.file(dir, b"new", 2000, 0, 0);
    let (lower, upper) = (lower.finish(), upper.finish());
    let (Some(lower), Some(upper)) = (mount(&lower), mount(&upper)) else {
        return;
    };
    let merged = tempfile::tempdir().unwrap();
    let options = format!("lowerdir={}:{}", upper.tree().display(), lower.tree().display());
    let options = std::ffi::CString::new(options).unwrap();
    rustix::mount::mount(
        "overlay",
        merged.path(),
        "overlay",
        MountFlags::empty(),
        options.as_c_str(),
    )
    .unwrap();
    let names = |dir: &Path| -> BTreeSet<_> {
        fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect()
    };
    let (all, inner) = (names(merged.path()), names(&merged.path().join("dir")));
    rustix::mount::unmount(merged.path(), UnmountFlags::DETACH).unwrap();
    assert!(
        all.iter().eq(["dir", "stays"]) && inner.iter().eq(["new"]),
        "{all:?} {inner:?}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn the_kernel_shows_random_trees(devices in 1..4usize, steps in trees::steps()) {
        let made = trees::random(devices, &steps);
        for addressing in ADDRESSINGS {
            if let Some(mounted) = mount_with(&made, addressing) {
                compare(&made, &mounted.tree());
            }
        }
    }
}
