//! What was written, read back by a reader that shares nothing with the writer.

use std::collections::{BTreeMap, HashMap};

use lazuli::layer::erofs::{self, Addressing, Image};
use lazuli::layer::index::mode;
use lazuli::layer::{Digest, Ino, LayerIndex, ROOT_INO};
use proptest::prelude::*;

use super::reader::{self, Read};
use super::trees::{self, Made};

/// Both ways to say where bytes are.
pub const ADDRESSINGS: [Addressing; 2] = [Addressing::Unified, Addressing::Chunks];

/// Every name of an index with its inode, as the reader has them.
pub fn names(index: &LayerIndex) -> BTreeMap<Vec<u8>, Ino> {
    let mut all = BTreeMap::from([(Vec::new(), ROOT_INO)]);
    let mut dirs = vec![(Vec::new(), ROOT_INO)];
    while let Some((path, dir)) = dirs.pop() {
        for entry in index.entries(index.inode(dir).unwrap()) {
            let path = [&path[..], b"/", index.name(entry)].concat();
            if index.inode(entry.ino).unwrap().is_dir() {
                dirs.push((path.clone(), entry.ino));
            }
            all.insert(path, entry.ino);
        }
    }
    all
}

/// Compares an image with what it was made of.
fn compare(made: &Made, image: &Image, read: &Read) {
    let index = &made.index;
    let expected = names(index);
    assert!(read.names.keys().eq(expected.keys()));
    assert_eq!(
        (read.inodes, image.inodes),
        (index.inodes().len() as u64, index.inodes().len() as u64)
    );
    assert_eq!(image.dropped_xattrs, 0);
    let mut starts = vec![0];
    for device in &made.data {
        starts.push(starts[starts.len() - 1] + device.len() as u64);
    }
    let mut nids: HashMap<u64, Ino> = HashMap::new();
    for (path, node) in &read.names {
        let ino = expected[path];
        let inode = index.inode(ino).unwrap();
        assert_eq!(*nids.entry(node.nid).or_insert(ino), ino, "two inodes are one");
        let attributes = (node.mode, node.uid, node.gid, node.nlink, node.mtime, node.mtime_nsec);
        assert_eq!(
            attributes,
            (
                inode.mode,
                inode.uid,
                inode.gid,
                inode.nlink,
                inode.mtime,
                inode.mtime_nsec
            )
        );
        let xattrs: BTreeMap<_, _> = index
            .xattrs(inode)
            .map(|(name, value)| (name.to_vec(), value.to_vec()))
            .collect();
        assert_eq!(node.xattrs, xattrs);
        assert_eq!(node.target, index.target(inode));
        match inode.file_type() {
            mode::REG => {
                assert_eq!(node.size, inode.size);
                let data = node.extent.map(|(device, at)| starts[device] + at);
                assert_eq!(data, (inode.size > 0).then_some(inode.data));
            }
            mode::CHR | mode::BLK => {
                let rdev = rustix::fs::makedev(inode.rdev_major, inode.rdev_minor);
                let decoded = rustix::fs::makedev(node.rdev >> 8 & 0xfff, node.rdev & 0xff | node.rdev >> 12 & 0xfff00);
                assert_eq!(decoded, rdev);
            }
            _ => {}
        }
    }
    assert_eq!(nids.len(), index.inodes().len());
    assert!(
        read.devices.iter().eq(made
            .data
            .iter()
            .map(|data| data.len() as u64 / 512)
            .collect::<Vec<_>>()
            .iter())
    );
}

fn round_trip(made: &Made) {
    for addressing in ADDRESSINGS {
        let image = erofs::write(&made.index, &made.devices, addressing).unwrap();
        assert_eq!(
            erofs::write(&made.index, &made.devices, addressing).unwrap(),
            image,
            "two times are two images"
        );
        compare(made, &image, &reader::read(&image.bytes).unwrap());
    }
}

#[test]
fn everything_odd_comes_back() {
    round_trip(&trees::torture());
}

#[test]
fn an_image_needs_no_device() {
    let image = erofs::write(&trees::Trees::new(0).finish().index, &[], Addressing::Chunks).unwrap();
    let read = reader::read(&image.bytes).unwrap();
    assert_eq!((read.inodes, read.devices.len(), image.bytes.len()), (1, 0, 1536));
}

#[test]
fn a_directory_of_a_hundred_thousand_entries_comes_back() {
    let mut t = trees::Trees::new(1);
    let dir = t.dir(ROOT_INO, b"many", 0o755);
    for at in 0..100_000usize {
        t.file(dir, format!("name-{at}").as_bytes(), at % 3, 0, 0);
    }
    round_trip(&t.finish());
}

#[test]
fn overlayfs_tells_images_apart() {
    let uuid = |made: Made| {
        let image = erofs::write(&made.index, &made.devices, Addressing::Chunks).unwrap();
        reader::read(&image.bytes).unwrap().uuid
    };
    let one = |name: &[u8]| {
        let mut t = trees::Trees::new(1);
        t.file(ROOT_INO, name, 1, 0, 0);
        t.finish()
    };
    assert_eq!(uuid(one(b"a")), uuid(one(b"a")));
    assert_ne!(uuid(one(b"a")), uuid(one(b"b")));
    let mut other = one(b"a");
    other.devices[0].tag = Digest::of(b"another layer with such a tree");
    assert_ne!(uuid(one(b"a")), uuid(other));
}

proptest! {
    #[test]
    fn random_trees_come_back(devices in 1..5usize, steps in trees::steps()) {
        round_trip(&trees::random(devices, &steps));
    }

    /// Devices that are not those of the index: an image whose extents lie inside, or an error.
    #[test]
    fn no_extent_lies_outside(steps in trees::steps(), sizes in proptest::collection::vec(0..100_000u64, 0..5)) {
        let made = trees::random(3, &steps);
        let devices: Vec<_> = sizes.iter().map(|&size| erofs::Device { tag: made.devices[0].tag, size }).collect();
        for addressing in ADDRESSINGS {
            if let Ok(image) = erofs::write(&made.index, &devices, addressing) {
                reader::read(&image.bytes).unwrap();
            }
        }
    }

    /// Indexes with damaged fields that still are valid: a sound image or an error.
    #[test]
    fn no_index_makes_an_unsound_image(
        steps in trees::steps(),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let made = trees::random(2, &steps);
        let mut bytes = made.index.encode();
        let body = bytes.len() - Digest::LEN;
        for (at, byte) in damage {
            bytes[at.index(body)] = byte;
        }
        let digest = Digest::of(&bytes[..body]);
        bytes[body..].copy_from_slice(digest.as_bytes());
        for addressing in ADDRESSINGS {
            if let Ok(index) = LayerIndex::decode(&bytes)
                && let Ok(image) = erofs::write(&index, &made.devices, addressing)
            {
                prop_assert_eq!(reader::read(&image.bytes).unwrap().inodes, image.inodes);
            }
        }
    }
}
