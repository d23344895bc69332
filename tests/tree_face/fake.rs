//! A layer in memory: its tree is written down in the test, and each of its files can be made slow or broken.

#![allow(dead_code, reason = "the tests and the benchmark each use a part of it")]

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use lazuli::fetch::{FetchError, LayerData};
use lazuli::layer::index::{Dirent, IndexParts, Xattr, mode};
use lazuli::layer::{Access, BlobIndex, Codec, Digest, Ino, Inode, LayerIndex, ROOT_INO};
use lazuli::registry::RegistryError;
use tokio::sync::Semaphore;

/// Alignment of files in the data space, in bytes.
const ALIGNMENT: usize = 512;

/// A tree under construction.
pub struct Layout {
    nodes: Vec<Node>,
    data: Vec<u8>,
    strings: Vec<u8>,
}

#[derive(Default)]
struct Node {
    inode: Inode,
    children: BTreeMap<Vec<u8>, Ino>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Layout {
    /// A root directory with nothing in it.
    pub fn new() -> Self {
        let root = Node {
            inode: Inode {
                mode: mode::DIR | 0o755,
                nlink: 2,
                parent: ROOT_INO,
                ..Inode::default()
            },
            ..Node::default()
        };
        Layout {
            nodes: vec![root],
            data: Vec::new(),
            strings: Vec::new(),
        }
    }

    fn find(&self, path: &[u8]) -> Ino {
        path.split(|&c| c == b'/')
            .filter(|name| !name.is_empty())
            .fold(ROOT_INO, |ino, name| self.nodes[ino as usize - 1].children[name])
    }

    fn link(&mut self, path: &[u8], ino: Ino) {
        let split = path.iter().rposition(|&c| c == b'/');
        let (parent, name) = match split {
            Some(at) => (&path[..at], &path[at + 1..]),
            None => (&b""[..], path),
        };
        let parent = self.find(parent);
        let node = &mut self.nodes[ino as usize - 1].inode;
        if node.is_dir() {
            node.parent = parent;
            self.nodes[parent as usize - 1].inode.nlink += 1;
        }
        let previous = self.nodes[parent as usize - 1].children.insert(name.to_vec(), ino);
        assert_eq!(previous, None, "a name is given twice");
    }

    fn add(&mut self, path: &[u8], inode: Inode) -> Ino {
        self.nodes.push(Node {
            inode,
            ..Node::default()
        });
        let ino = self.nodes.len() as Ino;
        self.link(path, ino);
        ino
    }

    /// Adds a directory; its parent must be there.
    pub fn dir(&mut self, path: impl AsRef<[u8]>, permissions: u32) -> &mut Self {
        let inode = Inode {
            mode: mode::DIR | permissions,
            nlink: 2,
            ..Inode::default()
        };
        self.add(path.as_ref(), inode);
        self
    }

    /// Adds a regular file.
    pub fn file(&mut self, path: impl AsRef<[u8]>, permissions: u32, content: &[u8]) -> &mut Self {
        let data = self.data.len() as u64;
        self.data.extend_from_slice(content);
        self.data.resize(self.data.len().next_multiple_of(ALIGNMENT), 0);
        let inode = Inode {
            mode: mode::REG | permissions,
            nlink: 1,
            size: content.len() as u64,
            data,
            ..Inode::default()
        };
        self.add(path.as_ref(), inode);
        self
    }

    /// Adds another name of a file.
    pub fn hard_link(&mut self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> &mut Self {
        let ino = self.find(target.as_ref());
        self.nodes[ino as usize - 1].inode.nlink += 1;
        self.link(path.as_ref(), ino);
        self
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> &mut Self {
        let target = target.as_ref();
        let inode = Inode {
            mode: mode::LNK | 0o777,
            nlink: 1,
            size: target.len() as u64,
            data: self.string(target).into(),
            ..Inode::default()
        };
        self.add(path.as_ref(), inode);
        self
    }

    /// Adds a device, fifo or socket.
    pub fn special(&mut self, path: impl AsRef<[u8]>, mode: u32, major: u32, minor: u32) -> &mut Self {
        let inode = Inode {
            mode,
            nlink: 1,
            rdev_major: major,
            rdev_minor: minor,
            ..Inode::default()
        };
        self.add(path.as_ref(), inode);
        self
    }

    /// Adds what overlayfs takes as a deleted name.
    pub fn whiteout(&mut self, path: impl AsRef<[u8]>) -> &mut Self {
        self.special(path, mode::CHR, 0, 0)
    }

    /// Changes attributes.
    pub fn set(&mut self, path: impl AsRef<[u8]>, change: impl FnOnce(&mut Inode)) -> &mut Self {
        let ino = self.find(path.as_ref());
        change(&mut self.nodes[ino as usize - 1].inode);
        self
    }

    /// Adds an extended attribute.
    pub fn xattr(&mut self, path: impl AsRef<[u8]>, name: &str, value: &[u8]) -> &mut Self {
        let ino = self.find(path.as_ref());
        let node = &mut self.nodes[ino as usize - 1];
        node.xattrs.push((name.as_bytes().to_vec(), value.to_vec()));
        self
    }

    fn string(&mut self, text: &[u8]) -> u32 {
        let at = self.strings.len() as u32;
        self.strings.extend_from_slice(text);
        at
    }

    /// The finished layer; `name` makes its digest.
    pub fn build(mut self, name: &str) -> Arc<FakeLayer> {
        let mut dirents = Vec::new();
        let mut xattrs = Vec::new();
        let mut nodes = std::mem::take(&mut self.nodes);
        for node in &mut nodes {
            if node.inode.is_dir() {
                node.inode.data = dirents.len() as u64;
                node.inode.count = node.children.len() as u32;
            }
            for (name, ino) in &node.children {
                dirents.push(Dirent {
                    name: self.string(name),
                    name_len: name.len() as u32,
                    ino: *ino,
                });
            }
            node.inode.xattr_first = xattrs.len() as u32;
            node.inode.xattr_count = node.xattrs.len() as u32;
            for (name, value) in &node.xattrs {
                xattrs.push(Xattr {
                    name: self.string(name),
                    name_len: name.len() as u32,
                    value: self.string(value),
                    value_len: value.len() as u32,
                });
            }
        }
        let index = LayerIndex::new(IndexParts {
            access: Access::Stream,
            codec: Codec::None,
            data_size: self.data.len() as u64,
            blob_size: self.data.len() as u64,
            inodes: nodes.into_iter().map(|node| node.inode).collect(),
            dirents,
            xattrs,
            chunks: Vec::new(),
            checkpoints: Vec::new(),
            verify: lazuli::layer::Verify::Content,
            strings: self.strings,
        })
        .expect("the layout of a test is valid");
        Arc::new(FakeLayer {
            digest: Digest::of(name.as_bytes()),
            bytes_of: index.blob(),
            index: Arc::new(index),
            data: Bytes::from(self.data),
            cold: Mutex::new(BTreeMap::new()),
        })
    }
}

/// What happens to the bytes of a file that is not ready.
#[derive(Clone)]
pub enum Cold {
    /// They come when the gate has a permit, which is given back; or the deadline passes.
    Gate(Arc<Semaphore>),
    /// They never come, and no error either: `fetch` has a bug.
    Hang,
    /// That many attempts fail, and then the file is ready.
    Fail(u32),
    /// The disk fails when it is read on the FUSE thread; a fetch brings the bytes.
    DiskError,
    /// Reading on the FUSE thread panics.
    Panic,
}

/// A layer whose bytes are in memory.
pub struct FakeLayer {
    digest: Digest,
    index: Arc<LayerIndex>,
    bytes_of: BlobIndex,
    data: Bytes,
    /// By offset of the file in the data space.
    cold: Mutex<BTreeMap<u64, Cold>>,
}

impl FakeLayer {
    /// Makes the file at `path` cold, or with `None` ready.
    pub fn set_cold(&self, path: &str, cold: Option<Cold>) {
        let ino = self.index.lookup_path(path.as_bytes()).expect("the file is there");
        let offset = self.index.inode(ino).expect("the inode is there").data;
        let mut map = self.cold.lock().unwrap();
        match cold {
            Some(cold) => map.insert(offset, cold),
            None => map.remove(&offset),
        };
    }

    fn cold_at(&self, offset: u64) -> Option<Cold> {
        let file = self
            .index
            .inodes()
            .iter()
            .find(|inode| inode.is_reg() && (inode.data..inode.data + inode.size).contains(&offset))?;
        self.cold.lock().unwrap().get(&file.data).cloned()
    }

    fn bytes(&self, offset: u64, len: usize) -> Bytes {
        self.data.slice(offset as usize..offset as usize + len)
    }

    fn is_warm(&self) -> bool {
        self.cold.lock().unwrap().is_empty()
    }
}

impl LayerData for FakeLayer {
    fn digest(&self) -> &Digest {
        &self.digest
    }

    fn index(&self) -> &BlobIndex {
        &self.bytes_of
    }

    fn names(&self) -> Result<Arc<LayerIndex>, FetchError> {
        Ok(Arc::clone(&self.index))
    }

    fn read_ready(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        if !self.is_warm() {
            match self.cold_at(offset) {
                None => {}
                Some(Cold::DiskError) => return Some(Err(io::Error::from_raw_os_error(5))),
                Some(Cold::Panic) => panic!("a bug that the test wants"),
                Some(_) => return None,
            }
        }
        buf.copy_from_slice(&self.data[offset as usize..offset as usize + buf.len()]);
        Some(Ok(()))
    }

    fn read(&self, offset: u64, len: u32, deadline: Duration) -> BoxFuture<'static, Result<Bytes, FetchError>> {
        let bytes = self.bytes(offset, len as usize);
        let layer = self.digest;
        let cold = self.cold_at(offset);
        if let Some(Cold::Fail(times)) = cold {
            let mut map = self.cold.lock().unwrap();
            let start = *map.range(..=offset).next_back().expect("it is in there").0;
            match times {
                1 => map.remove(&start),
                _ => map.insert(start, Cold::Fail(times - 1)),
            };
        }
        async move {
            match cold {
                None | Some(Cold::DiskError | Cold::Panic) => Ok(bytes),
                Some(Cold::Hang) => std::future::pending().await,
                Some(Cold::Fail(_)) => Err(FetchError::Source {
                    layer,
                    source: RegistryError::Status {
                        host: "registry.example".to_owned(),
                        what: "a blob".to_owned(),
                        status: 500,
                    },
                }),
                Some(Cold::Gate(gate)) => match tokio::time::timeout(deadline, gate.acquire()).await {
                    Ok(_) => Ok(bytes),
                    Err(_) => Err(FetchError::Deadline { layer, after: deadline }),
                },
            }
        }
        .boxed()
    }

    fn present_bytes(&self) -> u64 {
        self.data.len() as u64
    }
}

/// A layer with a cold file `slow-<i>` for each `i` below `slow`, and a ready file `fast`.
pub fn slow_and_fast(slow: usize, cold: &Cold) -> Arc<FakeLayer> {
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

/// Bytes that differ from one `seed` and place to the next.
pub fn content(len: usize, seed: u32) -> Vec<u8> {
    (0..len as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8)
        .collect()
}
