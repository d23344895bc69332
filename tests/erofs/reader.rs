//! An independent reader of images: everything is checked that a kernel could stumble over. Pure; errors are text.

use std::collections::{BTreeMap, HashMap};

/// A file as the image has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub nid: u64,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub nlink: u32,
    pub mtime: i64,
    pub mtime_nsec: u32,
    pub size: u64,
    pub rdev: u32,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Regular file that is not empty: device, and where in it.
    pub extent: Option<(usize, u64)>,
    pub target: Vec<u8>,
}

/// All of an image.
pub struct Read {
    /// Every name, as a path with a `/` before each component; the root is empty.
    pub names: BTreeMap<Vec<u8>, Node>,
    pub uuid: [u8; 16],
    /// Size in blocks of each device.
    pub devices: Vec<u64>,
    pub inodes: u64,
}

struct Image<'a> {
    bytes: &'a [u8],
    /// First block and number of blocks.
    devices: Vec<(u64, u64)>,
    /// Whether files may be in chunks.
    chunks: bool,
    /// Which bytes belong to an inode or a directory: none may twice.
    taken: BTreeMap<u64, u64>,
}

type Fault = String;

fn check(ok: bool, what: impl FnOnce() -> String) -> Result<(), Fault> {
    if ok { Ok(()) } else { Err(what()) }
}

impl Image<'_> {
    fn bytes(&self, at: u64, len: u64) -> Result<&[u8], Fault> {
        let end = at.checked_add(len).ok_or("address overflows")?;
        self.bytes
            .get(at as usize..end as usize)
            .ok_or_else(|| format!("{at}+{len} lies outside"))
    }

    fn number(&self, at: u64, len: u64) -> Result<u64, Fault> {
        Ok(self
            .bytes(at, len)?
            .iter()
            .rev()
            .fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    fn take(&mut self, at: u64, len: u64) -> Result<(), Fault> {
        if len == 0 {
            return Ok(());
        }
        let before = self.taken.range(..at + len).next_back();
        check(before.is_none_or(|(_, end)| *end <= at), || {
            format!("{at}+{len} is taken twice")
        })?;
        self.taken.insert(at, at + len);
        Ok(())
    }

    /// Data of a directory or symlink.
    fn data(&mut self, inode: u64, layout: u64, size: u64, tail: u64) -> Result<Vec<u8>, Fault> {
        let start = self.number(inode + 16, 4)?;
        let blocks = if layout == 2 { size / 512 } else { size.div_ceil(512) };
        let mut data = Vec::new();
        if blocks > 0 {
            check(start != u64::from(u32::MAX), || "no block".into())?;
            data = self.bytes(start * 512, blocks * 512)?.to_vec();
            self.take(start * 512, blocks * 512)?;
            data.truncate(size as usize);
        }
        if layout == 2 {
            let rest = size % 512;
            check(rest > 0, || "an inline tail of nothing".into())?;
            check(tail / 512 == (tail + rest - 1) / 512, || {
                format!("the tail at {tail} crosses a block")
            })?;
            data.extend_from_slice(self.bytes(tail, rest)?);
        }
        Ok(data)
    }

    fn node(&mut self, nid: u64) -> Result<(Node, Vec<u8>), Fault> {
        let at = nid * 32;
        let format = self.number(at, 2)?;
        check([1, 5, 9].contains(&format), || format!("inode format {format}"))?;
        let layout = format >> 1;
        let count = self.number(at + 2, 2)?;
        let xattr_len = if count == 0 { 0 } else { 12 + 4 * (count - 1) };
        let mode = self.number(at + 4, 2)? as u32;
        let size = self.number(at + 8, 8)?;
        let kind = mode & 0o170000;
        let tail = at + 64 + xattr_len;
        let inline = if layout == 2 { size % 512 } else { 0 };
        let chunk = tail.next_multiple_of(8);
        let len = if layout == 4 {
            chunk + 8 - at
        } else {
            64 + xattr_len + inline
        };
        self.take(at, len)?;
        let mut node = Node {
            nid,
            mode,
            uid: self.number(at + 24, 4)? as u32,
            gid: self.number(at + 28, 4)? as u32,
            nlink: self.number(at + 44, 4)? as u32,
            mtime: self.number(at + 32, 8)? as i64,
            mtime_nsec: self.number(at + 40, 4)? as u32,
            size,
            rdev: 0,
            xattrs: self.xattrs(at + 64, xattr_len)?,
            extent: None,
            target: Vec::new(),
        };
        let unit = self.number(at + 16, 4)?;
        let mut data = Vec::new();
        match kind {
            0o040000 => data = self.data(at, layout, size, tail)?,
            0o120000 => node.target = self.data(at, layout, size, tail)?,
            0o100000 => {
                check(layout != 2, || "a file has a tail".into())?;
                if layout == 4 {
                    check(self.chunks, || "chunks are not among the features".into())?;
                    check(unit & !0x1f == 0x20 && size <= 512 << (unit & 0x1f), || {
                        format!("more than one chunk, or none with an address: {unit:x}, {size}")
                    })?;
                    check(self.number(chunk, 2)? == 0, || "a block of 48 bits".into())?;
                    let (device, block) = (self.number(chunk + 2, 2)?, self.number(chunk + 4, 4)?);
                    let (_, blocks) = device
                        .checked_sub(1)
                        .and_then(|device| self.devices.get(device as usize))
                        .ok_or_else(|| format!("a chunk on device {device}"))?;
                    check(block + size.div_ceil(512) <= *blocks, || {
                        "a chunk lies outside its device".into()
                    })?;
                    node.extent = Some((device as usize - 1, block * 512));
                } else if size > 0 {
                    let inside =
                        |&(first, blocks): &(u64, u64)| unit >= first && unit + size.div_ceil(512) <= first + blocks;
                    let device = self
                        .devices
                        .iter()
                        .position(inside)
                        .ok_or("an extent lies outside every device")?;
                    node.extent = Some((device, (unit - self.devices[device].0) * 512));
                }
            }
            0o020000 | 0o060000 => node.rdev = unit as u32,
            0o010000 | 0o140000 => {}
            _ => return Err(format!("mode {mode:o}")),
        }
        Ok((node, data))
    }

    fn xattrs(&self, at: u64, len: u64) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, Fault> {
        let mut all = BTreeMap::new();
        if len == 0 {
            return Ok(all);
        }
        check(len > 12, || "xattrs of nothing".into())?;
        check(self.bytes(at, 12)?.iter().all(|byte| *byte == 0), || {
            "the head of xattrs".into()
        })?;
        let mut here = at + 12;
        while here < at + len {
            let (name, prefix, value) = (
                self.number(here, 1)?,
                self.number(here + 1, 1)?,
                self.number(here + 2, 2)?,
            );
            let prefix = match prefix {
                1 => "user.",
                2 => "system.posix_acl_access",
                3 => "system.posix_acl_default",
                4 => "trusted.",
                6 => "security.",
                _ => return Err(format!("xattr prefix {prefix}")),
            };
            let full = [prefix.as_bytes(), self.bytes(here + 4, name)?].concat();
            let value_bytes = self.bytes(here + 4 + name, value)?.to_vec();
            all.insert(full, value_bytes);
            here += (4 + name + value).next_multiple_of(4);
        }
        check(here == at + len, || "xattrs do not end where they should".into())?;
        Ok(all)
    }
}

/// Entries of a directory: name, number, type.
fn entries(data: &[u8]) -> Result<Vec<(Vec<u8>, u64, u8)>, Fault> {
    let mut all: Vec<(Vec<u8>, u64, u8)> = Vec::new();
    let blocks = data.len().div_ceil(512);
    for (number, block) in data.chunks(512).enumerate() {
        let u16_at = |at: usize| {
            block
                .get(at..at + 2)
                .map(|b| usize::from(u16::from_le_bytes([b[0], b[1]])))
                .ok_or("an entry outside")
        };
        let first = u16_at(8)?;
        check(first >= 12 && first.is_multiple_of(12) && first < block.len(), || {
            format!("first name at {first}")
        })?;
        let count = first / 12;
        for at in 0..count {
            let from = u16_at(at * 12 + 8)?;
            let last = at + 1 == count;
            let end = if last { block.len() } else { u16_at(at * 12 + 20)? };
            let name = block.get(from..end).ok_or("a name outside")?;
            // The last name of a block ends with it, or with a zero.
            let len = name
                .iter()
                .position(|byte| *byte == 0)
                .filter(|_| last && number + 1 < blocks)
                .unwrap_or(name.len());
            let name = name[..len].to_vec();
            check(
                !name.is_empty() && name.len() <= 255 && !name.contains(&0) && !name.contains(&b'/'),
                || format!("name {name:?}"),
            )?;
            check(all.last().is_none_or(|(before, _, _)| *before < name), || {
                "names are not in order".into()
            })?;
            let nid = block[at * 12..at * 12 + 8]
                .iter()
                .rev()
                .fold(0, |nid, byte| nid << 8 | u64::from(*byte));
            check(block[at * 12 + 11] == 0, || "reserved byte".into())?;
            all.push((name, nid, block[at * 12 + 10]));
        }
    }
    Ok(all)
}

/// CRC-32C without its last inversion, another way than the writer's.
fn checksum(bytes: &[u8]) -> u32 {
    let table: Vec<u32> = (0..256u32)
        .map(|n| (0..8).fold(n, |c, _| if c & 1 == 1 { c >> 1 ^ 0x82f6_3b78 } else { c >> 1 }))
        .collect();
    bytes
        .iter()
        .fold(!0, |c, byte| table[((c ^ u32::from(*byte)) & 255) as usize] ^ c >> 8)
}

/// Reads a whole image.
pub fn read(bytes: &[u8]) -> Result<Read, Fault> {
    check(bytes.len().is_multiple_of(512), || "not whole blocks".into())?;
    let mut image = Image {
        bytes,
        devices: Vec::new(),
        chunks: false,
        taken: BTreeMap::new(),
    };
    check(image.number(1024, 4)? == 0xe0f5_e1e2, || "magic".into())?;
    let mut sealed = image.bytes(1024, 512)?.to_vec();
    sealed[4..8].fill(0);
    check(u64::from(checksum(&sealed)) == image.number(1028, 4)?, || {
        "checksum".into()
    })?;
    check(image.number(1032, 4)? == 3 && image.number(1036, 2)? == 9, || {
        "features".into()
    })?;
    check(image.number(1060, 4)? * 512 == bytes.len() as u64, || {
        "number of blocks".into()
    })?;
    check(image.number(1064, 4)? == 0, || "address of inodes".into())?;
    let uuid: [u8; 16] = image.bytes(1072, 16)?.try_into().map_err(|_| "uuid")?;
    let count = image.number(1110, 2)?;
    let features = image.number(1104, 4)?;
    image.chunks = count > 0 && features & 4 != 0;
    check(features & !4 == if count > 0 { 8 } else { 0 }, || {
        "incompatible features".into()
    })?;
    let table = image.number(1112, 2)? * 128;
    let mut end = bytes.len() as u64 / 512;
    for device in 0..count {
        let slot = table + device * 128;
        check(image.number(slot, 1)? != 0, || "a device without tag".into())?;
        let (blocks, first) = (image.number(slot + 64, 4)?, image.number(slot + 68, 4)?);
        check(first >= end, || "devices overlap".into())?;
        end = first + blocks;
        image.devices.push((first, blocks));
    }
    check(end < u64::from(u32::MAX), || "the address space is too small".into())?;
    image.take(0, 1152)?;
    image.take(table, count * 128)?;

    let root = image.number(1038, 2)?;
    let mut names = BTreeMap::new();
    let mut known: HashMap<u64, Node> = HashMap::new();
    let (node, data) = image.node(root)?;
    known.insert(root, node.clone());
    names.insert(Vec::new(), node);
    let mut dirs = vec![(Vec::new(), root, root, data)];
    while let Some((path, nid, parent, data)) = dirs.pop() {
        let all = entries(&data)?;
        check(
            all.iter()
                .filter(|entry| entry.0 == b"." && entry.1 == nid && entry.2 == 2)
                .count()
                == 1,
            || "dot".into(),
        )?;
        check(
            all.iter()
                .filter(|entry| entry.0 == b".." && entry.1 == parent && entry.2 == 2)
                .count()
                == 1,
            || "dots".into(),
        )?;
        for (name, child, kind) in all {
            if name == b"." || name == b".." {
                continue;
            }
            let path = [&path[..], b"/", &name[..]].concat();
            let node = match known.get(&child) {
                Some(node) => {
                    check(kind != 2, || "a directory has two names".into())?;
                    node.clone()
                }
                None => {
                    let (node, data) = image.node(child)?;
                    known.insert(child, node.clone());
                    if kind == 2 {
                        dirs.push((path.clone(), child, nid, data));
                    }
                    node
                }
            };
            let expected = match node.mode & 0o170000 {
                0o100000 => 1,
                0o040000 => 2,
                0o020000 => 3,
                0o060000 => 4,
                0o010000 => 5,
                0o140000 => 6,
                _ => 7,
            };
            check(kind == expected, || {
                format!("type {kind} of a file of mode {:o}", node.mode)
            })?;
            names.insert(path, node);
        }
    }
    check(known.len() as u64 == image.number(1040, 8)?, || {
        "number of inodes".into()
    })?;
    let devices = image.devices.iter().map(|(_, blocks)| *blocks).collect();
    Ok(Read {
        names,
        uuid,
        devices,
        inodes: known.len() as u64,
    })
}
