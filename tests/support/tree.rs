//! Two directory trees compared in everything a program can see: names, types, modes, owners, sizes, times of change to the nanosecond,
//! extended attributes of all namespaces (root sees `trusted.` and `security.` too), link counts, device numbers, targets of
//! symbolic links, which names are hard links of one file, and contents.
//!
//! What is not compared, and why:
//! - sizes and blocks of directories, blocks of files: they belong to the file system that stores them;
//! - link counts of directories where one side says 1, which by convention means "not counted" (overlayfs says so for merged ones,
//!   ext4 for huge ones), and the root's own;
//! - times of access and of inode change: no archive sets the latter, and reading sets the former;
//! - overlayfs' own attributes (`trusted.overlay.*`, `user.overlay.*`): they are how layers are stacked, not part of the image;
//! - the root's time of change: containerd ignores an archive's entry for the root, so it is the time of unpacking;
//! - what a test passes in [`Options`], with its reason.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Differences that are reported in full; the rest is counted.
const REPORTED: usize = 20;
/// Bytes read at once from each of two files.
const BUFFER: usize = 256 << 10;
/// Largest list or value of extended attributes that Linux has.
const XATTR_MAX: usize = 64 << 10;

/// What two trees may differ in.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Names in the root that only one tree has.
    pub ignored_root_names: Vec<String>,
    /// Times of change are compared to the second: eStargz' index stores no fractions.
    pub whole_seconds: bool,
    /// Directories that no layer has an entry for: their time is the time of unpacking.
    pub implied_dirs: Vec<String>,
    /// The right tree is seen through a mapping of the first 65536 ids to those from this one on.
    pub mapped_to: Option<u32>,
    /// The second in which unpacking began: directories of the left tree that are not older have the time of unpacking.
    pub unpacked_since: Option<i64>,
    /// Names that are listed and then not there are passed over: overlayfs shows whiteouts so in directories that only one layer has.
    pub ghosts: bool,
}

/// Ids that [`Options::mapped_to`] maps.
const MAPPED: u32 = 65_536;
/// What owners outside of a mapping are seen as.
const OVERFLOW: u32 = 65_534;

/// What the kernel shows of an id.
fn mapped(id: u32, first: u32, otherwise: u32) -> u32 {
    if id < MAPPED { first + id } else { otherwise }
}

impl Node {
    /// What it looks like through the mapping: owners, and where ids are in extended attributes, which the kernel translates as well.
    fn mapped_to(&self, first: u32) -> Node {
        let mut node = self.clone();
        node.owner = (
            mapped(self.owner.0, first, OVERFLOW),
            mapped(self.owner.1, first, OVERFLOW),
        );
        for (name, value) in &mut node.xattrs {
            if name == b"security.capability" && value.len() == 20 {
                // `struct vfs_cap_data`, version 2: the same in version 3, which says in whose user namespace it holds.
                value[3] = 3;
                value.extend(first.to_le_bytes());
            }
            if name.starts_with(b"system.posix_acl_") {
                // A header of 4 bytes, then entries: tag, permissions, id. 2 and 8 are named users and groups.
                for entry in value[4..].chunks_exact_mut(8).filter(|entry| matches!(entry[0], 2 | 8)) {
                    let id = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
                    entry[4..].copy_from_slice(&mapped(id, first, u32::MAX).to_le_bytes());
                }
            }
        }
        node
    }
}

/// What stands at one path.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Node {
    kind: &'static str,
    mode: u32,
    owner: (u32, u32),
    size: Option<u64>,
    mtime: (i64, i64),
    links: u64,
    device: Option<u64>,
    target: Option<Vec<u8>>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path of the same file, for files with several names.
    first_name: Option<Vec<u8>>,
}

type Tree = BTreeMap<Vec<u8>, Node>;

/// The result of a comparison.
#[derive(Debug, Default)]
pub struct Comparison {
    /// Paths of the left tree.
    pub entries: usize,
    /// Bytes of regular files that were compared.
    pub bytes: u64,
    /// What differs, one line each.
    pub differences: Vec<String>,
}

impl Comparison {
    /// Panics with the first differences, if there are any; returns itself otherwise.
    pub fn expect_equal(self) -> Self {
        if !self.differences.is_empty() {
            let shown: Vec<&str> = self.differences.iter().take(REPORTED).map(String::as_str).collect();
            panic!(
                "the trees differ in {} places of {} entries; the first:\n  {}",
                self.differences.len(),
                self.entries,
                shown.join("\n  ")
            );
        }
        self
    }
}

/// Compares the trees below `left` (the reference) and `right`.
pub fn compare(left: &Path, right: &Path, options: &Options) -> Comparison {
    let (left_tree, right_tree) = std::thread::scope(|scope| {
        let other = scope.spawn(|| scan(right, options));
        (scan(left, options), other.join().expect("scanning does not panic"))
    });
    let mut differences = Vec::new();
    let mut files = Vec::new();
    let left_tree = take_errors(left_tree, "left", &mut differences);
    let right_tree = take_errors(right_tree, "right", &mut differences);
    for (path, node) in &left_tree {
        let seen;
        let node = match options.mapped_to {
            Some(first) => {
                seen = node.mapped_to(first);
                &seen
            }
            None => node,
        };
        match right_tree.get(path) {
            None => differences.push(format!("{}: only in {} ({})", show(path), left.display(), node.kind)),
            Some(other) => {
                let before = differences.len();
                differ(path, node, other, options, &mut differences);
                // Each file once, under its first name.
                let named_first = node.first_name.as_ref().is_none_or(|first| first == path);
                if before == differences.len() && node.kind == "file" && named_first {
                    files.push(path.clone());
                }
            }
        }
    }
    for (path, node) in right_tree.iter().filter(|(path, _)| !left_tree.contains_key(*path)) {
        differences.push(format!("{}: only in {} ({})", show(path), right.display(), node.kind));
    }
    let (bytes, content) = compare_contents(left, right, &files);
    differences.extend(content);
    Comparison {
        entries: left_tree.len(),
        bytes,
        differences,
    }
}

fn take_errors(scanned: (Tree, Vec<String>), side: &str, differences: &mut Vec<String>) -> Tree {
    differences.extend(scanned.1.into_iter().map(|error| format!("{side}: {error}")));
    scanned.0
}

fn differ(path: &[u8], left: &Node, right: &Node, options: &Options, differences: &mut Vec<String>) {
    let mut say = |what: &str, left: String, right: String| {
        if left != right {
            differences.push(format!("{}: {what} {left} != {right}", show(path)));
        }
    };
    say("type", left.kind.to_owned(), right.kind.to_owned());
    say("mode", format!("{:04o}", left.mode), format!("{:04o}", right.mode));
    say("owner", format!("{:?}", left.owner), format!("{:?}", right.owner));
    say("size", format!("{:?}", left.size), format!("{:?}", right.size));
    let unpacked = options.unpacked_since.is_some_and(|since| left.mtime.0 >= since) && left.kind == "dir";
    let unset = path.is_empty() || unpacked || options.implied_dirs.iter().any(|dir| dir.as_bytes() == path);
    if !unset {
        let time = |node: &Node| {
            if options.whole_seconds {
                (node.mtime.0, 0)
            } else {
                node.mtime
            }
        };
        say("mtime", format!("{:?}", time(left)), format!("{:?}", time(right)));
    }
    let uncounted = left.kind == "dir" && (path.is_empty() || left.links == 1 || right.links == 1);
    if !uncounted {
        say("links", left.links.to_string(), right.links.to_string());
    }
    say("device", format!("{:x?}", left.device), format!("{:x?}", right.device));
    let text = |bytes: &Option<Vec<u8>>| bytes.as_deref().map_or("-".to_owned(), show);
    say("target", text(&left.target), text(&right.target));
    say("first name", text(&left.first_name), text(&right.first_name));
    let attributes = |node: &Node| {
        let each = node
            .xattrs
            .iter()
            .map(|(name, value)| format!("{}={}", show(name), show(value)));
        each.collect::<Vec<_>>().join(" ")
    };
    say("xattrs", attributes(left), attributes(right));
}

/// A readable form of bytes that may be anything; long ones are cut in the middle.
fn show(bytes: &[u8]) -> String {
    let text = bytes.escape_ascii().to_string();
    if text.len() <= 160 {
        return text;
    }
    format!("{}...{} ({} bytes)", &text[..70], &text[text.len() - 70..], bytes.len())
}

fn scan(root: &Path, options: &Options) -> (Tree, Vec<String>) {
    let mut tree = Tree::new();
    let mut errors = Vec::new();
    let mut groups: HashMap<(u64, u64), Vec<Vec<u8>>> = HashMap::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(relative) = pending.pop() {
        let path = if relative.as_os_str().is_empty() {
            root.to_owned()
        } else {
            root.join(&relative)
        };
        let name = relative.as_os_str().as_bytes().to_vec();
        let metadata = match fs::symlink_metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if options.ghosts && error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => {
                errors.push(format!("{}: lstat: {error}", show(&name)));
                continue;
            }
        };
        match node(&path, &metadata) {
            Ok(node) => {
                if metadata.nlink() > 1 && !metadata.is_dir() {
                    groups
                        .entry((metadata.dev(), metadata.ino()))
                        .or_default()
                        .push(name.clone());
                }
                tree.insert(name.clone(), node);
            }
            Err(error) => errors.push(format!("{}: {error}", show(&name))),
        }
        if metadata.is_dir() {
            match list(&path) {
                Ok(names) => pending.extend(
                    names
                        .into_iter()
                        .filter(|name| {
                            let ignored = options.ignored_root_names.iter().any(|other| OsStr::new(other) == name);
                            !(relative.as_os_str().is_empty() && ignored)
                        })
                        .map(|name| relative.join(name)),
                ),
                Err(error) => errors.push(format!("{}: readdir: {error}", show(&name))),
            }
        }
    }
    for mut names in groups.into_values() {
        names.sort();
        for name in &names {
            if let Some(node) = tree.get_mut(name) {
                node.first_name = names.first().cloned();
            }
        }
    }
    (tree, errors)
}

fn list(path: &Path) -> io::Result<Vec<std::ffi::OsString>> {
    fs::read_dir(path)?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect()
}

fn node(path: &Path, metadata: &fs::Metadata) -> io::Result<Node> {
    let kind = metadata.file_type();
    let kind = match () {
        () if kind.is_dir() => "dir",
        () if kind.is_file() => "file",
        () if kind.is_symlink() => "symlink",
        () if kind.is_char_device() => "char",
        () if kind.is_block_device() => "block",
        () if kind.is_fifo() => "fifo",
        () => "socket",
    };
    let target = match kind {
        "symlink" => Some(fs::read_link(path)?.into_os_string().into_vec()),
        _ => None,
    };
    Ok(Node {
        kind,
        mode: metadata.mode() & 0o7777,
        owner: (metadata.uid(), metadata.gid()),
        size: (kind != "dir").then_some(metadata.size()),
        mtime: (metadata.mtime(), metadata.mtime_nsec()),
        links: metadata.nlink(),
        device: matches!(kind, "char" | "block").then_some(metadata.rdev()),
        target,
        xattrs: xattrs(path)?,
        first_name: None,
    })
}

fn xattrs(path: &Path) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut found = BTreeMap::new();
    let length = match rustix::fs::llistxattr_query(path) {
        Ok(length) => length,
        Err(rustix::io::Errno::OPNOTSUPP) => return Ok(found),
        Err(error) => return Err(io::Error::other(format!("listxattr: {error}"))),
    };
    if length == 0 {
        return Ok(found);
    }
    let mut names = vec![0_u8; XATTR_MAX];
    let length = rustix::fs::llistxattr(path, names.as_mut_slice())
        .map_err(|error| io::Error::other(format!("listxattr: {error}")))?;
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        if name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.") {
            continue;
        }
        let mut value = vec![0_u8; XATTR_MAX];
        let length = rustix::fs::lgetxattr(path, name, value.as_mut_slice())
            .map_err(|error| io::Error::other(format!("getxattr {}: {error}", show(name))))?;
        value.truncate(length);
        found.insert(name.to_vec(), value);
    }
    Ok(found)
}

/// Compares files of the same size byte by byte, on as many threads as there are processors.
fn compare_contents(left: &Path, right: &Path, files: &[Vec<u8>]) -> (u64, Vec<String>) {
    let next = AtomicUsize::new(0);
    let results = Mutex::new((0, Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                let mut buffers = (vec![0; BUFFER], vec![0; BUFFER]);
                while let Some(path) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let name = OsStr::from_bytes(path);
                    let result = compare_file(&left.join(name), &right.join(name), &mut buffers);
                    let mut results = results.lock().unwrap();
                    match result {
                        Ok(bytes) => results.0 += bytes,
                        Err(difference) => results.1.push(format!("{}: {difference}", show(path))),
                    }
                }
            });
        }
    });
    let (bytes, mut differences) = results.into_inner().unwrap();
    differences.sort();
    (bytes, differences)
}

fn compare_file(left: &Path, right: &Path, (a, b): &mut (Vec<u8>, Vec<u8>)) -> Result<u64, String> {
    let open = |path: &Path, side| File::open(path).map_err(|error| format!("{side} open: {error}"));
    let (mut left, mut right) = (open(left, "left")?, open(right, "right")?);
    let mut offset = 0;
    loop {
        let count = fill(&mut left, a).map_err(|error| format!("left read at {offset}: {error}"))?;
        let other = fill(&mut right, b).map_err(|error| format!("right read at {offset}: {error}"))?;
        if a[..count] != b[..other] {
            let same = a[..count].iter().zip(&b[..other]).take_while(|(a, b)| a == b).count();
            let at = offset + same as u64;
            return Err(format!("contents differ at byte {at} (read {count} and {other})"));
        }
        offset += count as u64;
        if count < a.len() {
            return Ok(offset);
        }
    }
}

/// Reads until the buffer is full or the file ends.
fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..])? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}
