//! What a container will see: its layers on each other, looked into one path at a time.
//!
//! The rules are overlayfs' ([`super::super::merge`] has all of them): of a name the topmost layer decides, a whiteout means that there is nothing, and
//! a directory is merged with those below it until one is opaque. Merging all layers takes long where they are large, and a walk asks for a few
//! hundred paths.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::layer::tree::OPAQUE_XATTR;
use crate::layer::{Ino, LayerIndex, ROOT_INO};

/// Symbolic links on the way to one file, as the kernel counts them.
const MAX_LINKS: usize = 40;
/// Names on the way to one file, links included.
const MAX_NAMES: usize = 256;
/// Names that are looked up in all, in each layer that may have them. Each takes some hundred nanoseconds.
const MAX_LOOKED: u64 = 8 << 20;

/// Layers on each other.
pub struct View {
    /// The topmost first.
    layers: Vec<Arc<LayerIndex>>,
    looked: AtomicU64,
}

/// A directory: those that it is merged of, the topmost first.
#[derive(Debug, Clone)]
struct Dir(Vec<(usize, Ino)>);

/// What a name stands for.
enum Node {
    Dir(Dir),
    Link(String),
    File(usize, Ino),
}

/// A regular file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Its layer, counted from the topmost.
    pub layer: usize,
    /// Its inode there.
    pub ino: Ino,
    /// Bytes.
    pub size: u64,
    /// First byte in the data space.
    pub data: u64,
    /// Whether anybody may execute it.
    pub is_executable: bool,
    /// Its path from the root, without links.
    pub path: String,
}

impl File {
    /// Its name.
    pub fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or_default()
    }
}

/// The directory that holds a path.
pub fn parent(path: &str) -> &str {
    match path.rsplit_once('/') {
        Some(("", _)) | None => "/",
        Some((parent, _)) => parent,
    }
}

/// A path below a directory, unless it begins at the root.
pub fn join(dir: &str, path: &str) -> String {
    match path.starts_with('/') {
        true => path.to_owned(),
        false => format!("{}/{path}", dir.trim_end_matches('/')),
    }
}

impl View {
    /// That of these layers, the topmost first.
    pub fn new(layers: Vec<Arc<LayerIndex>>) -> Self {
        View {
            layers,
            looked: AtomicU64::new(0),
        }
    }

    /// The regular file at a path from the root.
    pub fn file(&self, path: &str) -> Option<File> {
        match self.walk(path)? {
            (Node::File(layer, ino), path) => {
                let inode = self.layers[layer].inode(ino)?;
                inode.is_reg().then_some(File {
                    layer,
                    ino,
                    size: inode.size,
                    data: inode.data,
                    is_executable: inode.mode & 0o111 != 0,
                    path,
                })
            }
            _ => None,
        }
    }

    /// Whether there is a directory at a path from the root.
    #[cfg(test)]
    pub fn is_dir(&self, path: &str) -> bool {
        matches!(self.walk(path), Some((Node::Dir(_), _)))
    }

    /// Names in a directory, in order, up to so many; none, if there is no directory.
    pub fn names(&self, path: &str, most: usize) -> Vec<String> {
        let Some((Node::Dir(dir), _)) = self.walk(path) else {
            return Vec::new();
        };
        let mut names: Vec<String> = Vec::new();
        for &(layer, ino) in &dir.0 {
            let names_of = &self.layers[layer];
            let Some(inode) = names_of.inode(ino) else { continue };
            let entries = names_of.entries(inode).iter().take(most.saturating_sub(names.len()));
            names.extend(entries.filter_map(|entry| String::from_utf8(names_of.name(entry).to_vec()).ok()));
        }
        names.sort_unstable();
        names.dedup();
        // What a whiteout hides is listed with it.
        names.retain(|name| self.entry(&dir, name.as_bytes()).is_some());
        names
    }

    /// What is at a path from the root, and its path without links.
    fn walk(&self, path: &str) -> Option<(Node, String)> {
        let mut pending: Vec<String> = parts(path);
        let mut dirs: Vec<(String, Dir)> = Vec::new();
        let root = Dir((0..self.layers.len()).map(|layer| (layer, ROOT_INO)).collect());
        let (mut links, mut names) = (0, 0);
        let shown = |dirs: &[(String, Dir)], last: Option<&str>| {
            let names = dirs.iter().map(|(name, _)| name.as_str()).chain(last);
            names.fold(String::new(), |path, name| path + "/" + name)
        };
        while let Some(name) = pending.pop() {
            names += 1;
            if names > MAX_NAMES {
                return None;
            }
            if name == ".." {
                dirs.pop();
                continue;
            }
            let here = dirs.last().map_or(&root, |(_, dir)| dir);
            match self.entry(here, name.as_bytes())? {
                Node::Dir(dir) => dirs.push((name, dir)),
                Node::Link(target) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return None;
                    }
                    if target.starts_with('/') {
                        dirs.clear();
                    }
                    pending.extend(parts(&target));
                }
                file @ Node::File(..) => {
                    return pending.is_empty().then(|| (file, shown(&dirs, Some(&name))));
                }
            }
        }
        let path = shown(&dirs, None);
        let dir = dirs.pop().map_or(root, |(_, dir)| dir);
        Some((Node::Dir(dir), path))
    }

    /// What a directory has of that name.
    fn entry(&self, dir: &Dir, name: &[u8]) -> Option<Node> {
        let looked = self.looked.fetch_add(dir.0.len() as u64, Ordering::Relaxed);
        if looked > MAX_LOOKED {
            return None;
        }
        let mut merged = Vec::new();
        for &(layer, dir) in &dir.0 {
            let index = &self.layers[layer];
            let Some(ino) = index.inode(dir).and_then(|dir| index.lookup(dir, name)) else {
                continue;
            };
            let inode = index.inode(ino)?;
            if inode.is_dir() {
                merged.push((layer, ino));
                if index.xattr(inode, OPAQUE_XATTR.0).is_some() {
                    break;
                }
                continue;
            }
            if !merged.is_empty() || inode.is_whiteout() {
                break;
            }
            return Some(match inode.is_symlink() {
                true => Node::Link(String::from_utf8(index.target(inode).to_vec()).ok()?),
                false => Node::File(layer, ino),
            });
        }
        (!merged.is_empty()).then_some(Node::Dir(Dir(merged)))
    }
}

/// The names of a path, the last one first.
fn parts(path: &str) -> Vec<String> {
    let names = path.split('/').filter(|name| !name.is_empty() && *name != ".");
    let mut names: Vec<_> = names.take(MAX_NAMES + 1).map(str::to_owned).collect();
    names.reverse();
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::index::mode;
    use crate::layer::merge::merge;
    use crate::layer::testing::Tar;

    fn layer(fill: impl FnOnce(&mut Tar)) -> LayerIndex {
        let mut tar = Tar::default();
        fill(&mut tar);
        tar.end().index()
    }

    /// Layers that do everything to each other, the lowest first.
    fn layers() -> Vec<LayerIndex> {
        let low = layer(|tar| {
            tar.dir("usr", 0o755)
                .dir("usr/bin", 0o755)
                .file("usr/bin/app", b"low")
                .file("usr/bin/kept", b"kept");
            tar.dir("gone", 0o755)
                .file("gone/x", b"")
                .dir("opaque", 0o755)
                .file("opaque/below", b"");
            tar.dir("file-then-dir-then-file", 0o755)
                .file("file-then-dir-then-file/x", b"");
            tar.symlink("bin", "usr/bin").file("file", b"");
        });
        let middle = layer(|tar| {
            tar.file(".wh.gone", b"")
                .dir("opaque", 0o755)
                .file("opaque/.wh..wh..opq", b"")
                .file("opaque/above", b"");
            tar.dir("usr", 0o755)
                .dir("usr/bin", 0o755)
                .file("usr/bin/app", b"middle")
                .file("file-then-dir-then-file", b"f");
            tar.dir("file", 0o755).file("file/now-below", b"1");
        });
        let high = layer(|tar| {
            tar.dir("usr", 0o755)
                .dir("usr/bin", 0o755)
                .file("usr/bin/.wh.kept", b"")
                .file("usr/bin/new", b"new");
            tar.dir("gone", 0o755).file("gone/again", b"").dir("links", 0o755);
            tar.symlink("links/up", "../bin/new")
                .symlink("links/root", "/links/../../bin/app")
                .symlink("links/loop", "loop");
            tar.symlink("links/round", "/links/round/x")
                .symlink("links/out", "../../../../usr/bin/app");
        });
        vec![low, middle, high]
    }

    fn view() -> View {
        View::new(layers().into_iter().rev().map(Arc::new).collect())
    }

    /// Every path of the merged layers, and every path of any of them, is what merging them says.
    #[test]
    fn it_shows_what_merging_shows() {
        let layers = layers();
        let merged = merge(&layers.iter().collect::<Vec<_>>(), None).unwrap().index;
        let view = view();
        let mut seen = 0;
        for index in layers.iter().chain([&merged]) {
            let mut dirs = vec![(ROOT_INO, String::new())];
            while let Some((dir, path)) = dirs.pop() {
                for entry in index.entries(index.inode(dir).unwrap()) {
                    let path = format!("{path}/{}", std::str::from_utf8(index.name(entry)).unwrap());
                    let kind = merged
                        .lookup_path(path.as_bytes())
                        .and_then(|ino| merged.inode(ino))
                        .map(|inode| inode.mode & mode::TYPE);
                    if kind != Some(mode::LNK) {
                        assert_eq!(view.is_dir(&path), kind == Some(mode::DIR), "{path}");
                        assert_eq!(view.file(&path).is_some(), kind == Some(mode::REG), "{path}");
                    }
                    seen += 1;
                    if index.inode(entry.ino).unwrap().is_dir() {
                        dirs.push((entry.ino, path));
                    }
                }
            }
        }
        assert!(seen > 40);
        assert_eq!(view.names("/usr/bin", 10), ["app", "new"]);
        assert_eq!(view.names("/opaque", 10), ["above"]);
        assert_eq!(view.names("/nowhere", 10), [""; 0]);
    }

    #[test]
    fn links_are_followed_within_the_root() {
        let view = view();
        let file = |path: &str| view.file(path).map(|file| (file.layer, file.path));
        assert_eq!(file("/bin/app"), Some((1, "/usr/bin/app".to_owned())));
        assert_eq!(file("/links/up"), Some((0, "/usr/bin/new".to_owned())));
        assert_eq!(file("//links/./root"), Some((1, "/usr/bin/app".to_owned())));
        assert_eq!(file("/links/out"), Some((1, "/usr/bin/app".to_owned())));
        for path in [
            "/links/loop",
            "/links/round",
            "/usr/bin/app/x",
            "/usr/bin",
            "",
            "/bin/../../../etc",
        ] {
            assert_eq!(file(path), None, "{path}");
        }
        assert!(view.is_dir("/") && view.is_dir("/bin/.."));
        let long = "/usr/..".repeat(MAX_NAMES);
        assert_eq!(file(&format!("{long}/usr/bin/app")), None);
    }

    #[test]
    fn paths_are_put_together() {
        assert_eq!((parent("/a/b"), parent("/a"), parent("a")), ("/a", "/", "/"));
        assert_eq!(join("/a/", "b/c"), "/a/b/c");
        assert_eq!(join("/", "b"), "/b");
        assert_eq!(join("/a", "/b"), "/b");
    }
}
