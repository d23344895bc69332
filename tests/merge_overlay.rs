//! Merged chains against the kernel: layers written as directories, overlayfs mounted over them, and everything that is seen there compared
//! with the merged index: names, types, modes, owners, times, devices, targets, extended attributes, contents, link counts, and which
//! names are one file.
//!
//! What overlayfs does that one would not expect, and is checked here:
//! - a directory merged of several has 1 as link count, which means "not counted": only others are compared;
//! - a whiteout in a directory that only one layer has is *listed*, and then not found;
//! - the opaque mark of a layer's root counts for nothing.
//!
//! Needs root and overlayfs, and a tmpfs with extended attributes of users (Linux 6.6); says so and does nothing without.

#[path = "tree_face/fake.rs"]
mod fake;
#[allow(dead_code)]
#[path = "support/skip.rs"]
mod skip;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fake::{FakeLayer, Layout};
use lazuli::fetch::LayerData as _;
use lazuli::layer::index::mode;
use lazuli::layer::merge::{MAX_LAYERS, Merged, merge};
use lazuli::layer::{Ino, LayerIndex, ROOT_INO};
use lazuli::sys::mount::{Unmount, overlay, unmount};
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};
use rustix::mount::MountFlags;
use skip::{Ability, skipped};
use tempfile::TempDir;

/// What the random chains begin with, so that each run tests the same ones.
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;
/// Largest value of an extended attribute that is read, in bytes.
const XATTR_MAX: usize = 4096;

/// A temporary file system; unmounted, and gone, when dropped.
struct Disk {
    dir: TempDir,
    mounts: Vec<PathBuf>,
}

impl Disk {
    /// `None` where the tests cannot run.
    fn new() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("disk");
        fs::create_dir(&root).unwrap();
        if let Err(error) = rustix::mount::mount("tmpfs", &root, "tmpfs", MountFlags::empty(), None) {
            skipped(Ability::TmpfsUserXattrs, format!("a tmpfs cannot be mounted: {error}"));
            return None;
        }
        let disk = Disk {
            dir,
            mounts: vec![root.clone()],
        };
        for name in [c"user.k", c"trusted.k"] {
            if let Err(error) = rustix::fs::lsetxattr(&root, name, b"v", XattrFlags::empty()) {
                skipped(
                    Ability::TmpfsUserXattrs,
                    format!("tmpfs takes no attribute {name:?}: {error}"),
                );
                return None;
            }
        }
        Some(disk)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("disk").join(name)
    }

    /// Mounts an overlay of directories, the topmost first.
    fn overlay(&mut self, lower: &[PathBuf]) -> PathBuf {
        let target = self.path("merged");
        fs::create_dir(&target).unwrap();
        overlay(lower, &target).unwrap();
        self.mounts.push(target.clone());
        target
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        while let Some(mount) = self.mounts.pop() {
            let _ = unmount(&mount, Unmount::Detach);
        }
    }
}

/// Writes a layer as a directory.
fn write(layer: &FakeLayer, root: &Path) {
    let index = layer.names().unwrap();
    let mut paths: HashMap<Ino, PathBuf> = HashMap::new();
    let mut written = Vec::new();
    let mut pending = vec![(root.to_owned(), ROOT_INO)];
    while let Some((path, ino)) = pending.pop() {
        if let Some(first) = paths.get(&ino) {
            fs::hard_link(first, &path).unwrap();
            continue;
        }
        let inode = index.inode(ino).unwrap();
        match inode.file_type() {
            mode::DIR => fs::create_dir(&path).unwrap(),
            mode::REG => fs::write(&path, content(layer, inode.data, inode.size)).unwrap(),
            mode::LNK => symlink(std::ffi::OsStr::from_bytes(index.target(inode)), &path).unwrap(),
            kind => {
                let device = rustix::fs::makedev(inode.rdev_major, inode.rdev_minor);
                let kind = FileType::from_raw_mode(kind);
                rustix::fs::mknodat(CWD, &path, kind, Mode::empty(), device).unwrap();
            }
        }
        for entry in index.entries(inode) {
            let name = std::ffi::OsStr::from_bytes(index.name(entry));
            pending.push((path.join(name), entry.ino));
        }
        paths.insert(ino, path.clone());
        written.push((path, ino));
    }
    // Children last: making them changes the time of their directory.
    for (path, ino) in written.into_iter().rev() {
        let inode = index.inode(ino).unwrap();
        std::os::unix::fs::lchown(&path, Some(inode.uid), Some(inode.gid)).unwrap();
        if !inode.is_symlink() {
            fs::set_permissions(&path, Permissions::from_mode(inode.mode & 0o7777)).unwrap();
        }
        for (name, value) in index.xattrs(inode) {
            rustix::fs::lsetxattr(&path, name, value, XattrFlags::empty()).unwrap();
        }
        let time = Timespec {
            tv_sec: inode.mtime,
            tv_nsec: inode.mtime_nsec.into(),
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        rustix::fs::utimensat(CWD, &path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

fn content(layer: &FakeLayer, offset: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    layer.read_ready(offset, &mut bytes).unwrap().unwrap();
    bytes
}

/// What is seen at one path.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    /// `None` where it is not counted.
    links: Option<u64>,
    device: (u32, u32),
    /// Content of a file, target of a symlink.
    bytes: Vec<u8>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// First of the paths of the same file.
    first_name: Vec<u8>,
}

type Tree = BTreeMap<Vec<u8>, Seen>;

/// What overlayfs shows, and how many names it lists but does not find.
fn kernel(root: &Path) -> (Tree, usize) {
    let (mut tree, mut ghosts) = (Tree::new(), 0);
    let mut first_names: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(relative) = pending.pop() {
        let path = root.join(&relative);
        let name = relative.as_os_str().as_bytes().to_vec();
        let metadata = match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                ghosts += 1;
                let links = fs::symlink_metadata(path.parent().unwrap()).unwrap().nlink();
                assert!(
                    links > 1,
                    "only a directory that is not merged lists whiteouts: {path:?}"
                );
                continue;
            }
            metadata => metadata.unwrap(),
        };
        let (is_dir, links) = (metadata.is_dir(), metadata.nlink());
        if is_dir {
            pending.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| relative.join(entry.unwrap().file_name())),
            );
        }
        let kind = metadata.mode() & mode::TYPE;
        let first = first_names
            .entry((metadata.dev(), metadata.ino()))
            .or_insert_with(|| name.clone());
        *first = name.clone().min(first.clone());
        let seen = Seen {
            mode: metadata.mode(),
            owner: (metadata.uid(), metadata.gid()),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            links: (!is_dir || links != 1).then_some(links),
            device: match kind {
                mode::CHR | mode::BLK => (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev())),
                _ => (0, 0),
            },
            bytes: match kind {
                mode::REG => fs::read(&path).unwrap(),
                mode::LNK => fs::read_link(&path).unwrap().into_os_string().into_vec(),
                _ => Vec::new(),
            },
            xattrs: xattrs(&path),
            first_name: Vec::new(),
        };
        tree.insert(name, seen);
    }
    for (name, seen) in &mut tree {
        let metadata = fs::symlink_metadata(root.join(std::ffi::OsStr::from_bytes(name))).unwrap();
        seen.first_name = first_names[&(metadata.dev(), metadata.ino())].clone();
    }
    (tree, ghosts)
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; XATTR_MAX];
    let len = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    let names = names[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    names
        .map(|name| {
            let mut value = vec![0; XATTR_MAX];
            let len = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
            (name.to_vec(), value[..len].to_vec())
        })
        .collect()
}

/// What the merged index says, as overlayfs shows it.
fn merged(merged: &Merged, layers: &[Arc<FakeLayer>]) -> Tree {
    let index = &merged.index;
    let mut tree = Tree::new();
    let mut first_names: HashMap<Ino, Vec<u8>> = HashMap::new();
    let mut inodes = Vec::new();
    let mut pending = vec![(Vec::new(), ROOT_INO)];
    while let Some((path, ino)) = pending.pop() {
        let inode = index.inode(ino).unwrap();
        for entry in index.entries(inode) {
            let separator: &[u8] = if path.is_empty() { b"" } else { b"/" };
            pending.push(([&path, separator, index.name(entry)].concat(), entry.ino));
        }
        let first = first_names.entry(ino).or_insert_with(|| path.clone());
        *first = path.clone().min(first.clone());
        inodes.push((path.clone(), ino));
        let seen = Seen {
            mode: inode.mode,
            owner: (inode.uid, inode.gid),
            mtime: (inode.mtime, inode.mtime_nsec.into()),
            links: Some(inode.nlink.into()),
            device: (inode.rdev_major, inode.rdev_minor),
            bytes: match inode.file_type() {
                mode::REG => bytes(merged, layers, inode.data, inode.size),
                _ => index.target(inode).to_vec(),
            },
            xattrs: index
                .xattrs(inode)
                .map(|(name, value)| (unescaped(name), value.to_vec()))
                .collect(),
            first_name: Vec::new(),
        };
        tree.insert(path, seen);
    }
    for (path, ino) in inodes {
        tree.get_mut(&path).unwrap().first_name = first_names[&ino].clone();
    }
    tree
}

/// The name under which overlayfs shows an attribute.
fn unescaped(name: &[u8]) -> Vec<u8> {
    match name.strip_prefix(b"trusted.overlay.overlay.") {
        Some(rest) => [b"trusted.overlay.", rest].concat(),
        None => name.to_vec(),
    }
}

/// Bytes of the merged data space.
fn bytes(merged: &Merged, layers: &[Arc<FakeLayer>], offset: u64, len: u64) -> Vec<u8> {
    let mut start = 0;
    for (size, layer) in merged.devices.iter().zip(layers) {
        if len > 0 && (start..start + size).contains(&offset) {
            return content(layer, offset - start, len);
        }
        start += size.next_multiple_of(512);
    }
    assert_eq!(len, 0, "a file lies in no layer");
    Vec::new()
}

/// Compares a chain, the lowest layer first; tells how many names the kernel lists that it does not find.
fn compare(what: &str, layers: &[Arc<FakeLayer>]) -> Option<usize> {
    let mut disk = Disk::new()?;
    let mut lower = Vec::new();
    for (at, layer) in layers.iter().enumerate() {
        lower.insert(0, disk.path(&at.to_string()));
        write(layer, &lower[0]);
    }
    if layers.len() == 1 {
        // Overlayfs wants two lower directories when there is no upper one.
        lower.push(disk.path("empty"));
        fs::create_dir(disk.path("empty")).unwrap();
    }
    let root = disk.overlay(&lower);
    let names: Vec<_> = layers.iter().map(|layer| layer.names().unwrap()).collect();
    let indexes: Vec<&LayerIndex> = names.iter().map(|names| &**names).collect();
    let whole = merge(&indexes, None).unwrap();
    let (expected, ghosts) = kernel(&root);
    let mut found = merged(&whole, layers);
    for (path, seen) in &expected {
        let shown = path.escape_ascii();
        let found = found
            .remove(path)
            .unwrap_or_else(|| panic!("{what}: {shown} is missing; expected {seen:?}"));
        let links = seen.links.and(found.links);
        assert_eq!(&Seen { links, ..found }, seen, "{what}: {shown}");
    }
    let more: Vec<_> = found.keys().map(|path| path.escape_ascii().to_string()).collect();
    assert!(more.is_empty(), "{what}: overlayfs does not show {more:?}");
    Some(ghosts)
}

#[test]
fn everything_that_layers_do_to_each_other() {
    let mut low = Layout::new();
    low.dir("d", 0o700)
        .xattr("d", "user.low", b"l")
        .file("d/kept", 0o644, b"low")
        .file("d/replaced", 0o644, b"low")
        .file("d/gone", 0o644, b"")
        .hard_link("d/kept2", "d/kept")
        .dir("d/sub", 0o755)
        .file("d/sub/x", 0o644, b"x");
    for dir in ["dir-then-file", "cleared", "ended", "came-back", "through-a-file"] {
        low.dir(dir, 0o755).file(format!("{dir}/low"), 0o600, dir.as_bytes());
    }
    low.file("file-then-dir", 0o644, b"f").symlink("link", "d");
    let mut middle = Layout::new();
    middle
        .set("", |root| (root.mode, root.mtime) = (mode::DIR | 0o711, 77))
        .xattr("", "trusted.overlay.opaque", b"y")
        .whiteout("came-back")
        .file("through-a-file", 0o644, b"")
        .dir("cleared", 0o755)
        .xattr("cleared", "trusted.overlay.opaque", b"y")
        .file("cleared/middle", 0o644, b"m")
        .dir("only-here", 0o755)
        .whiteout("only-here/nothing");
    let mut high = Layout::new();
    high.dir("d", 0o1777)
        .xattr("d", "user.high", b"h")
        .xattr("d", "trusted.high", b"h")
        .xattr("d", "user.overlay.opaque", b"y")
        .set("d", |inode| (inode.mtime, inode.mtime_nsec) = (-5, 250_000_000))
        .file("d/replaced", 0o4755, b"high")
        .hard_link("d/other", "d/replaced")
        .whiteout("d/gone")
        .dir("d/sub", 0o2750)
        .whiteout("d/sub/y")
        .file("dir-then-file", 0o644, b"")
        .symlink("link", "elsewhere");
    for dir in ["file-then-dir", "came-back", "through-a-file", "cleared"] {
        high.dir(dir, 0o755).file(format!("{dir}/high"), 0o600, dir.as_bytes());
    }
    high.whiteout("ended")
        .special("null", mode::CHR | 0o666, 1, 3)
        .special("disk", mode::BLK | 0o660, 0, 0)
        .special("pipe", mode::FIFO | 0o640, 0, 0)
        .special("socket", mode::SOCK | 0o755, 0, 0);
    let layers = [low.build("low"), middle.build("middle"), high.build("high")];
    let Some(ghosts) = compare("by hand", &layers) else {
        return;
    };
    assert_eq!(ghosts, 1, "only-here/nothing");
    for layer in layers {
        compare("one layer", &[layer]);
    }
}

/// Numbers that look random.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % end
    }
}

/// A layer of few names, so that layers meet.
fn random_layer(random: &mut Random, entries: usize, name: &str) -> Arc<FakeLayer> {
    let mut layout = Layout::new();
    let (mut dirs, mut taken, mut files) = (vec![String::new()], vec![String::new()], Vec::new());
    for entry in 0..entries {
        let dir = dirs[random.below(dirs.len())].clone();
        let path = format!("{dir}{}", ["a", "b", "c", "d"][random.below(4)]);
        if taken.contains(&path) {
            continue;
        }
        taken.push(path.clone());
        let permissions = [0o644, 0o755, 0o1777, 0o4711, 0o2750, 0][random.below(6)];
        match random.below(16) {
            0..=6 => {
                layout.dir(&path, permissions);
                dirs.push(format!("{path}/"));
                if random.below(4) == 0 {
                    layout.xattr(&path, "trusted.overlay.opaque", b"y");
                }
            }
            7..=9 => {
                let size = [0, 1, 511, 512, 5000][random.below(5)];
                layout.file(&path, permissions, &fake::content(size, entry as u32));
                files.push(path.clone());
            }
            10 if !files.is_empty() => {
                layout.hard_link(&path, &files[random.below(files.len())]);
                continue;
            }
            10 | 11 => {
                layout.symlink(&path, format!("to/{entry}"));
                files.push(path);
                continue;
            }
            12 => {
                layout.special(&path, mode::CHR | permissions, random.below(2) as u32, 3);
            }
            13 => {
                let kind = [mode::FIFO, mode::SOCK, mode::BLK][random.below(3)];
                layout.special(&path, kind | permissions, 0, 0);
                files.push(path);
                continue;
            }
            _ => {
                layout.whiteout(&path);
                continue;
            }
        }
        let time = random.below(2_000_000_000) as i64 - 1_000_000_000;
        layout.set(&path, |inode| {
            (inode.uid, inode.gid) = (time as u32 % 3, entry as u32);
            (inode.mtime, inode.mtime_nsec) = (time, 5 * entry as u32);
        });
        match random.below(4) {
            0 => layout.xattr(&path, "trusted.mark", name.as_bytes()),
            1 => layout.xattr(&path, "security.mark", b""),
            _ => &mut layout,
        };
    }
    layout.build(name)
}

#[test]
fn random_chains() {
    let mut random = Random(SEED);
    let mut ghosts = 0;
    for round in 0..60 {
        let mut layers: Vec<Arc<FakeLayer>> = Vec::new();
        for at in 0..1 + random.below(7) {
            let entries = 5 + random.below(60);
            layers.push(match random.below(8) {
                // The same layer again.
                0 if at > 0 => Arc::clone(&layers[random.below(at)]),
                _ => random_layer(&mut random, entries, &format!("{round} {at}")),
            });
        }
        let Some(more) = compare(&format!("round {round}"), &layers) else {
            return;
        };
        ghosts += more;
    }
    assert!(ghosts > 0, "no chain had a whiteout in a directory of one layer");
}

#[test]
fn as_many_layers_as_overlayfs_takes() {
    let mut random = Random(SEED);
    let layers: Vec<_> = (0..MAX_LAYERS)
        .map(|at| random_layer(&mut random, 12, &at.to_string()))
        .collect();
    compare("500 layers", &layers);
}

#[test]
fn escaped_marks_are_shown() {
    if !skip::is_kernel(6, 7) {
        skipped(Ability::EscapedMarks, "overlayfs has escaped marks since Linux 6.7");
        return;
    }
    let mut low = Layout::new();
    low.dir("d", 0o755).file("d/low", 0o644, b"");
    let mut high = Layout::new();
    high.dir("d", 0o755)
        .xattr("d", "trusted.overlay.overlay.opaque", b"y")
        .file("d/high", 0o644, b"")
        .xattr("d/high", "trusted.overlay.overlay.overlay.x", b"twice");
    compare("escaped marks", &[low.build("low"), high.build("high")]);
}
