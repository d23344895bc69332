//! Trees to write: indexes made step by step, with the bytes of their devices.

use lazuli::layer::erofs::Device;
use lazuli::layer::index::{Xattr, mode};
use lazuli::layer::{Access, Codec, Digest, Dirent, IndexParts, Ino, Inode, LayerIndex, ROOT_INO};
use proptest::prelude::*;

/// Bytes of a block.
const BLOCK: usize = 512;

/// A tree being made.
pub struct Trees {
    inodes: Vec<Inode>,
    names: Vec<(Ino, Vec<u8>, Ino)>,
    xattrs: Vec<(Ino, Vec<u8>, Vec<u8>)>,
    strings: Vec<u8>,
    devices: Vec<Content>,
}

/// Content of a device, and which files are on it: inode, offset.
type Content = (Vec<u8>, Vec<(Ino, usize)>);

/// A finished tree.
pub struct Made {
    pub index: LayerIndex,
    pub devices: Vec<Device>,
    /// What each device holds: whole blocks, zero behind its end.
    pub data: Vec<Vec<u8>>,
}

impl Trees {
    pub fn new(devices: usize) -> Self {
        let root = Inode {
            mode: mode::DIR | 0o755,
            parent: ROOT_INO,
            nlink: 2,
            ..Inode::default()
        };
        Trees {
            inodes: vec![root],
            names: Vec::new(),
            xattrs: Vec::new(),
            strings: Vec::new(),
            devices: vec![(Vec::new(), Vec::new()); devices],
        }
    }

    pub fn inode(&mut self, ino: Ino) -> &mut Inode {
        &mut self.inodes[ino as usize - 1]
    }

    /// Adds a name for `ino`.
    pub fn name(&mut self, dir: Ino, name: &[u8], ino: Ino) {
        self.names.push((dir, name.to_vec(), ino));
        self.inode(ino).nlink += 1;
    }

    fn add(&mut self, dir: Ino, name: &[u8], mode: u32) -> Ino {
        self.inodes.push(Inode {
            mode,
            ..Inode::default()
        });
        let ino = self.inodes.len() as Ino;
        self.name(dir, name, ino);
        ino
    }

    pub fn dir(&mut self, dir: Ino, name: &[u8], permissions: u32) -> Ino {
        let ino = self.add(dir, name, mode::DIR | permissions);
        self.inode(ino).parent = dir;
        self.inode(ino).nlink = 2;
        self.inode(dir).nlink += 1;
        ino
    }

    pub fn symlink(&mut self, dir: Ino, name: &[u8], target: &[u8]) -> Ino {
        let ino = self.add(dir, name, mode::LNK | 0o777);
        let data = self.text(target);
        let inode = self.inode(ino);
        (inode.size, inode.data) = (target.len() as u64, data.into());
        ino
    }

    /// A device, fifo or socket.
    pub fn special(&mut self, dir: Ino, name: &[u8], mode: u32, major: u32, minor: u32) -> Ino {
        let ino = self.add(dir, name, mode);
        let inode = self.inode(ino);
        (inode.rdev_major, inode.rdev_minor) = (major, minor);
        ino
    }

    /// A file with content of `size` bytes on one of the devices, after `gap` blocks of something else.
    pub fn file(&mut self, dir: Ino, name: &[u8], size: usize, device: usize, gap: usize) -> Ino {
        let ino = self.add(dir, name, mode::REG | 0o644);
        self.inode(ino).size = size as u64;
        let (bytes, files) = &mut self.devices[device];
        let at = bytes.len().next_multiple_of(BLOCK) + gap * BLOCK;
        // What lies before must not be read as content.
        bytes.resize(at, 0xee);
        let seed = ino.wrapping_mul(0x9e37_79b9) | 1;
        bytes.extend((0..size as u32).map(|i| (i.wrapping_mul(seed) >> 13) as u8));
        files.push((ino, at));
        ino
    }

    pub fn xattr(&mut self, ino: Ino, name: &[u8], value: &[u8]) {
        let same = self
            .xattrs
            .iter()
            .any(|(other, there, _)| *other == ino && there == name);
        if !same {
            self.xattrs.push((ino, name.to_vec(), value.to_vec()));
        }
    }

    fn text(&mut self, text: &[u8]) -> u32 {
        let at = self.strings.len() as u32;
        self.strings.extend_from_slice(text);
        at
    }

    pub fn finish(mut self) -> Made {
        let mut start = 0;
        let mut made = (Vec::new(), Vec::new());
        let mut data_size = 0;
        for (number, (mut bytes, files)) in std::mem::take(&mut self.devices).into_iter().enumerate() {
            for (ino, at) in files {
                self.inode(ino).data = (start + at) as u64;
            }
            made.0.push(Device {
                tag: Digest::of(&number.to_le_bytes()),
                size: bytes.len() as u64,
            });
            data_size = (start + bytes.len()) as u64;
            bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
            start += bytes.len();
            made.1.push(bytes);
        }
        self.names.sort();
        let mut dirents = Vec::new();
        for (dir, name, ino) in std::mem::take(&mut self.names) {
            let entry = Dirent {
                name: self.text(&name),
                name_len: name.len() as u32,
                ino,
            };
            let dir = self.inode(dir);
            if dir.count == 0 {
                dir.data = dirents.len() as u64;
            }
            dir.count += 1;
            dirents.push(entry);
        }
        let mut xattrs = Vec::new();
        let mut all = std::mem::take(&mut self.xattrs);
        all.sort_by_key(|(ino, _, _)| *ino);
        for (ino, name, value) in all {
            let xattr = Xattr {
                name: self.text(&name),
                name_len: name.len() as u32,
                value: self.text(&value),
                value_len: value.len() as u32,
            };
            let inode = self.inode(ino);
            if inode.xattr_count == 0 {
                inode.xattr_first = xattrs.len() as u32;
            }
            inode.xattr_count += 1;
            xattrs.push(xattr);
        }
        let parts = IndexParts {
            access: Access::Stream,
            codec: Codec::None,
            data_size,
            blob_size: 0,
            inodes: self.inodes,
            dirents,
            xattrs,
            chunks: Vec::new(),
            checkpoints: Vec::new(),
            verify: lazuli::layer::Verify::Content,
            strings: self.strings,
        };
        Made {
            index: LayerIndex::new(parts).unwrap(),
            devices: made.0,
            data: made.1,
        }
    }
}

/// An ACL that names a user.
pub fn acl() -> Vec<u8> {
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [
        (1u16, 6u16, u32::MAX),
        (2, 4, 1234),
        (4, 4, u32::MAX),
        (16, 4, u32::MAX),
        (32, 0, u32::MAX),
    ] {
        acl.extend(tag.to_le_bytes());
        acl.extend(permissions.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    acl
}

/// Everything odd at once.
pub fn torture() -> Made {
    let mut t = Trees::new(3);
    let root = ROOT_INO;
    // Names around `.` and `..`, which lie between them in byte order.
    let dir = t.dir(root, b"names", 0o1777);
    for name in [
        &b"!"[..],
        b"-",
        b"-x",
        b".-",
        b"...",
        b"..!",
        b".a",
        b"..a",
        b"..\x01",
        b".\x01",
        b"\xff\xfe",
        b"a b\n",
        b"\x7f",
        b"\x01",
    ] {
        t.file(dir, name, name.len(), 0, 0);
    }
    for byte in 1..=255u8 {
        if byte != b'/' {
            t.symlink(dir, &[byte; 255], &[byte, b'x']);
        }
    }
    // Directories whose data is about whole blocks long: the tail is 0, 1 or 511 bytes, or none.
    let sizes = t.dir(root, b"sizes", 0o755);
    for len in 400..=600usize {
        // `.` and `..` take 27 bytes, every entry 12 and its name.
        let dir = t.dir(sizes, format!("d{len}").as_bytes(), 0o700);
        let (a, b) = ((len - 27 - 24) / 2, (len - 27 - 24).div_ceil(2));
        t.file(dir, &vec![b'a'; a.clamp(1, 255)], 0, 1, 0);
        t.file(dir, &vec![b'b'; b.clamp(1, 255)], 1, 1, 1);
    }
    t.dir(sizes, b"empty", 0o000);
    // Symlinks of all lengths around what fits behind an inode.
    let links = t.dir(root, b"links", 0o755);
    for len in (1..40)
        .chain(420..530)
        .chain(1000..1050)
        .chain([2047, 2048, 2049, 4094, 4095])
    {
        let link = t.symlink(links, format!("l{len}").as_bytes(), &vec![b'a' + (len % 26) as u8; len]);
        if len % 3 == 0 {
            t.xattr(link, b"trusted.t", &vec![b'v'; len % 200]);
        }
    }
    // Files around block and page sizes, on all devices.
    let files = t.dir(root, b"files", 0o755);
    for (at, size) in [
        0,
        1,
        511,
        512,
        513,
        4095,
        4096,
        4097,
        65536,
        100_000,
        1 << 20,
        3_000_001,
    ]
    .into_iter()
    .enumerate()
    {
        for device in 0..3 {
            let file = t.file(files, format!("f{size}-{device}").as_bytes(), size, device, at % 3);
            (t.inode(file).uid, t.inode(file).gid) = (u32::MAX - 1, 70_000);
            t.inode(file).mode = mode::REG | [0o644, 0o4755, 0o2755, 0o6711][at % 4];
        }
    }
    // Hard links, in many directories, and more than 65,535 of them.
    let file = t.file(root, b"linked", 5, 2, 0);
    let hard = t.dir(root, b"hard", 0o755);
    t.name(dir, b"also linked", file);
    for at in 0..70_000 {
        t.name(hard, format!("{at}").as_bytes(), file);
    }
    let special = t.dir(root, b"special", 0o755);
    t.special(special, b"null", mode::CHR | 0o666, 1, 3);
    t.special(special, b"sda", mode::BLK | 0o660, 8, 0);
    t.special(special, b"large", mode::BLK | 0o660, 4095, 0xfffff);
    t.special(special, b"middle", mode::CHR | 0o660, 0x123, 0x45678);
    t.special(special, b"fifo", mode::FIFO | 0o600, 0, 0);
    t.special(special, b"socket", mode::SOCK | 0o755, 0, 0);
    t.special(special, b"whiteout", mode::CHR, 0, 0);
    let linked = t.special(special, b"deleted", mode::CHR, 0, 0);
    t.name(root, b"deleted as well", linked);
    // Times.
    for (at, (mtime, nsec)) in [
        (-1, 999_999_999),
        (i64::from(i32::MIN) - 5, 0),
        (1 << 33, 1),
        (-(1 << 40), 7),
        (9_223_372_036, 854_775_807),
    ]
    .into_iter()
    .enumerate()
    {
        let file = t.file(root, format!("time{at}").as_bytes(), 3, 0, 0);
        (t.inode(file).mtime, t.inode(file).mtime_nsec) = (mtime, nsec);
    }
    (t.inode(root).mtime, t.inode(root).mtime_nsec) = (1_700_000_000, 123_456_789);
    // Xattrs: empty, large, many, of every kind.
    let xattrs = t.dir(root, b"xattrs", 0o755);
    t.xattr(xattrs, b"system.posix_acl_default", &acl());
    t.xattr(xattrs, b"trusted.overlay.opaque", b"y");
    let file = t.file(xattrs, b"file", 1000, 1, 0);
    t.xattr(file, b"system.posix_acl_access", &acl());
    t.xattr(file, b"user.empty", b"");
    t.xattr(file, &[&b"user."[..], &[b'n'; 250]].concat(), b"long name");
    t.xattr(file, b"security.something", &[0, 255, 0]);
    for at in 0..100 {
        t.xattr(file, format!("user.{at}").as_bytes(), &vec![at; usize::from(at) * 7]);
    }
    let large = t.file(xattrs, b"large", 1, 1, 0);
    t.xattr(large, b"user.large", &vec![b'L'; 65535]);
    for len in 0..530 {
        let dir = t.dir(xattrs, format!("opaque{len}").as_bytes(), 0o755);
        t.xattr(dir, b"trusted.overlay.opaque", b"y");
        t.xattr(dir, b"trusted.v", &vec![b'v'; len]);
        t.symlink(dir, b"l", &vec![b't'; 530 - len]);
    }
    // Deep.
    let mut dir = root;
    for at in 0..300 {
        dir = t.dir(dir, b"deep", 0o755);
        t.file(dir, b"file", at, 2, 0);
    }
    t.finish()
}

/// One step of a random tree: what, where, under which name, and numbers to take attributes from.
pub type Step = (u8, u16, u16, u64);

/// Steps of a random tree.
pub fn steps() -> impl Strategy<Value = Vec<Step>> {
    proptest::collection::vec(any::<Step>(), 0..120)
}

/// The tree that steps make. Every list of steps makes one.
pub fn random(devices: usize, steps: &[Step]) -> Made {
    let mut t = Trees::new(devices);
    let mut dirs = vec![ROOT_INO];
    let mut others = Vec::new();
    let mut taken = std::collections::HashSet::new();
    for &(what, place, name, noise) in steps {
        let dir = dirs[usize::from(place) % dirs.len()];
        let name = random_name(name);
        if !taken.insert((dir, name.clone())) {
            continue;
        }
        let small = (noise >> 8) as usize;
        let ino = match what % 16 {
            0..=3 => {
                let ino = t.dir(dir, &name, noise as u32 & 0o7777);
                dirs.push(ino);
                ino
            }
            4 | 5 => t.symlink(
                dir,
                &name,
                &vec![b'a' + (noise % 26) as u8; 1 + small % [20, 600, 4095][small % 3]],
            ),
            6 if !others.is_empty() => {
                let ino = others[small % others.len()];
                t.name(dir, &name, ino);
                continue;
            }
            7 => t.special(dir, &name, mode::CHR, 0, 0),
            8 => t.special(dir, &name, mode::BLK | 0o600, noise as u32 & 0xfff, noise as u32 >> 12),
            9 => t.special(dir, &name, mode::FIFO | 0o644, 0, 0),
            _ => {
                let ino = t.file(
                    dir,
                    &name,
                    small % [1, 700, 5000, 70_000][small % 4],
                    small % devices,
                    small % 3,
                );
                t.inode(ino).mode = mode::REG | (noise as u32 & 0o7777);
                ino
            }
        };
        if !dirs.contains(&ino) {
            others.push(ino);
        }
        let inode = t.inode(ino);
        (inode.uid, inode.gid) = (noise as u32 >> 1, (noise >> 33) as u32);
        inode.mtime = (noise as i64) >> 20;
        inode.mtime_nsec = (noise % 1_000_000_000) as u32;
        if noise & 7 == 0 {
            t.xattr(ino, b"trusted.overlay.opaque", b"y");
            t.xattr(ino, b"security.x", &vec![7; small % 900]);
        }
        if noise & 24 == 0 {
            t.xattr(ino, b"trusted.a", &noise.to_le_bytes()[..small % 9]);
        }
    }
    t.finish()
}

/// Short names that meet, names around the dots, and the longest.
fn random_name(seed: u16) -> Vec<u8> {
    let byte = (seed >> 8) as u8;
    let byte = if matches!(byte, 0 | b'/' | b'.') { b'-' } else { byte };
    match seed % 4 {
        0 => vec![b'a' + byte % 26],
        1 => vec![b'.', byte],
        2 => vec![byte; 1 + usize::from(byte) % 255],
        _ => vec![byte, b'.', b'0' + (seed / 4 % 10) as u8],
    }
}
