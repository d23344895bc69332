//! Writes the parts of an image to the places that they have in its plan.

use super::format::{
    BLOCK, BLOCK_BITS, CHUNK_ADDRESSES, CHUNKED, COMPAT, DEVICE, DIRENT, INCOMPAT_CHUNKS, INCOMPAT_DEVICES, INLINE,
    INODE, MAGIC, NO_BLOCK, PLAIN, SLOT, SUPER, TABLE, VOLUME,
};
use super::layout::{Place, Plan, Target, data_len, entry_len, names};
use super::{Device, Extents, FORMAT, Span, xattrs};
use crate::layer::index::mode;
use crate::layer::{Ino, Inode, LayerError, LayerIndex, ROOT_INO};

/// Largest device major and minor numbers of Linux.
const MAX_MAJOR: u32 = (1 << 12) - 1;
const MAX_MINOR: u32 = (1 << 20) - 1;
/// Permission, setuid, setgid and sticky bits.
const PERMISSIONS: u32 = 0o7777;

fn put(to: &mut [u8], at: usize, bytes: &[u8]) {
    to[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Writes all inodes with what lies behind them, and the blocks of directories and symlinks.
pub(super) fn inodes(
    index: &LayerIndex,
    plan: &Plan,
    extents: &Extents<'_>,
    image: &mut [u8],
) -> Result<(), LayerError> {
    let mut data = Vec::new();
    for (number, &ino) in (1u32..).zip(&plan.order) {
        let Some(inode) = index.inode(ino) else { continue };
        let place = plan.place(ino);
        let at = place.nid as usize * SLOT as usize;
        let tail = at + INODE as usize + place.xattrs as usize;
        let count = xattrs::put(index, inode, &mut image[at + INODE as usize..tail]);
        let size = match inode.file_type() {
            mode::REG => inode.size,
            mode::DIR | mode::LNK => data_len(index, inode),
            _ => 0,
        };
        if place.chunked {
            let extent = extents.find(u64::from(ino) - 1, inode)?;
            put(image, at + place.chunk() as usize, &extent.chunk());
        }
        let head = head(inode, ino, &place, extents)?;
        let head = Head {
            number,
            count,
            size,
            ..head
        };
        put(image, at, &head.bytes(inode));
        match inode.file_type() {
            mode::DIR => entries(index, plan, ino, inode, &mut data),
            mode::LNK => data.extend_from_slice(index.target(inode)),
            _ => continue,
        }
        // The tail behind the inode, the rest in blocks.
        let blocks = if place.inline {
            data.len() - data.len() % BLOCK as usize
        } else {
            data.len()
        };
        put(image, place.block as usize * BLOCK as usize, &data[..blocks]);
        put(image, tail, &data[blocks..]);
        data.clear();
    }
    Ok(())
}

/// What an inode says that is not in the index as such.
struct Head {
    format: u16,
    count: u16,
    size: u64,
    /// First block, form of the chunks, or device number.
    unit: u32,
    number: u32,
}

impl Head {
    fn bytes(&self, inode: &Inode) -> [u8; INODE as usize] {
        let mut to = [0; INODE as usize];
        put(&mut to, 0, &self.format.to_le_bytes());
        put(&mut to, 2, &self.count.to_le_bytes());
        let mode = inode.file_type() | (inode.mode & PERMISSIONS);
        put(&mut to, 4, &(mode as u16).to_le_bytes());
        put(&mut to, 8, &self.size.to_le_bytes());
        put(&mut to, 16, &self.unit.to_le_bytes());
        put(&mut to, 20, &self.number.to_le_bytes());
        put(&mut to, 24, &inode.uid.to_le_bytes());
        put(&mut to, 28, &inode.gid.to_le_bytes());
        put(&mut to, 32, &inode.mtime.to_le_bytes());
        put(&mut to, 40, &inode.mtime_nsec.to_le_bytes());
        put(&mut to, 44, &inode.nlink.to_le_bytes());
        to
    }
}

fn head(inode: &Inode, ino: Ino, place: &Place, extents: &Extents<'_>) -> Result<Head, LayerError> {
    let at = u64::from(ino) - 1;
    let unit = match inode.file_type() {
        mode::REG if inode.size == 0 => NO_BLOCK,
        mode::REG if place.chunked => CHUNK_ADDRESSES | chunk_bits(inode.size),
        mode::REG => extents.find(at, inode)?.unified,
        mode::CHR | mode::BLK => device_number(inode, at)?,
        mode::DIR | mode::LNK if place.block == 0 => NO_BLOCK,
        mode::DIR | mode::LNK => place.block,
        _ => 0,
    };
    let format = match place {
        Place { chunked: true, .. } => CHUNKED,
        Place { inline: true, .. } => INLINE,
        _ => PLAIN,
    };
    Ok(Head {
        format,
        count: 0,
        size: 0,
        unit,
        number: 0,
    })
}

/// Binary logarithm of the blocks of the smallest chunk that `size` bytes fit into.
fn chunk_bits(size: u64) -> u32 {
    size.div_ceil(BLOCK).next_power_of_two().ilog2()
}

/// A device number in the kernel's form of 32 bits.
fn device_number(inode: &Inode, at: u64) -> Result<u32, LayerError> {
    let (major, minor) = (inode.rdev_major, inode.rdev_minor);
    if major > MAX_MAJOR || minor > MAX_MINOR {
        return Err(LayerError::malformed(
            FORMAT,
            at,
            format!("no device can have the number {major}:{minor}"),
        ));
    }
    Ok((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

/// A directory's entries as whole blocks but for the last, which ends where its names end.
fn entries(index: &LayerIndex, plan: &Plan, ino: Ino, dir: &Inode, data: &mut Vec<u8>) {
    let mut block: Vec<(&[u8], Target)> = Vec::new();
    let mut used = 0;
    let mut flush = |block: &mut Vec<(&[u8], Target)>| {
        // The names of the block before end with zeros up to its end.
        data.resize(data.len().next_multiple_of(BLOCK as usize), 0);
        let mut name_at = block.len() * DIRENT as usize;
        for (name, target) in block.iter() {
            let target = match target {
                Target::Own => ino,
                // A root's parent is itself.
                Target::Parent => dir.parent,
                Target::Inode(ino) => *ino,
            };
            data.extend_from_slice(&u64::from(plan.place(target).nid).to_le_bytes());
            data.extend_from_slice(&(name_at as u16).to_le_bytes());
            data.extend_from_slice(&[index.inode(target).map_or(0, kind), 0]);
            name_at += name.len();
        }
        block.drain(..).for_each(|(name, _)| data.extend_from_slice(name));
    };
    for (name, target) in names(index, dir) {
        let len = entry_len(name);
        if used + len > BLOCK {
            flush(&mut block);
            used = 0;
        }
        used += len;
        block.push((name, target));
    }
    flush(&mut block);
}

/// File type of a directory entry.
fn kind(inode: &Inode) -> u8 {
    match inode.file_type() {
        mode::REG => 1,
        mode::DIR => 2,
        mode::CHR => 3,
        mode::BLK => 4,
        mode::FIFO => 5,
        mode::SOCK => 6,
        mode::LNK => 7,
        _ => 0,
    }
}

/// Writes the device table.
pub(super) fn devices(devices: &[Device], spans: &[Span], base: u64, image: &mut [u8]) {
    let slots = image[TABLE as usize..].chunks_exact_mut(DEVICE as usize);
    for ((device, span), slot) in devices.iter().zip(spans).zip(slots) {
        put(slot, 0, device.tag.hex().as_bytes());
        put(slot, 64, &(span.size.div_ceil(BLOCK) as u32).to_le_bytes());
        put(slot, 68, &((base + span.data / BLOCK) as u32).to_le_bytes());
    }
}

/// Writes the superblock but for its checksum and the UUID.
pub(super) fn superblock(plan: &Plan, devices: usize, image: &mut [u8]) {
    let blocks = (image.len() as u64 / BLOCK) as u32;
    let to = &mut image[SUPER..];
    put(to, 0, &MAGIC.to_le_bytes());
    put(to, 8, &COMPAT.to_le_bytes());
    to[12] = BLOCK_BITS;
    put(to, 14, &(plan.place(ROOT_INO).nid as u16).to_le_bytes());
    put(to, 16, &(plan.order.len() as u64).to_le_bytes());
    put(to, 36, &blocks.to_le_bytes());
    put(to, 64, VOLUME);
    if devices > 0 {
        let chunks = plan.order.iter().any(|&ino| plan.place(ino).chunked);
        let chunks = if chunks { INCOMPAT_CHUNKS } else { 0 };
        put(to, 80, &(INCOMPAT_DEVICES | chunks).to_le_bytes());
        put(to, 86, &(devices as u16).to_le_bytes());
        put(to, 88, &((TABLE / DEVICE) as u16).to_le_bytes());
    }
}

/// Writes the UUID, and then the checksum over the superblock's block.
pub(super) fn seal(uuid: [u8; 16], image: &mut [u8]) {
    put(image, SUPER + 48, &uuid);
    let sum = crc32c(&image[SUPER..SUPER + BLOCK as usize]);
    put(image, SUPER + 4, &sum.to_le_bytes());
}

/// CRC-32C as the kernel computes it: without the inversion at the end. Bit by bit: it is one block.
pub(super) fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            crc >> 1 ^ if crc & 1 == 1 { POLYNOMIAL } else { 0 }
        })
    })
}
