//! The bytes of small images, and what is refused. Whole trees are compared in `tests/erofs`.

use super::format::{MAX_XATTRS, SUPER};
use super::*;
use crate::layer::index::{Dirent, Inode, Xattr, mode};
use crate::layer::{Access, Codec, IndexParts};

/// A root with entries `a`, `b`, ... and as many bytes of data as an index can have.
fn parts(inodes: &[Inode]) -> IndexParts {
    let root = Inode {
        mode: mode::DIR | 0o755,
        parent: 1,
        nlink: 2,
        count: inodes.len() as u32,
        ..Inode::default()
    };
    let name = |at: u32| Dirent {
        name: at,
        name_len: 1,
        ino: at + 2,
    };
    IndexParts {
        access: Access::Stream,
        codec: Codec::None,
        data_size: crate::layer::index::MAX_DATA_SIZE,
        blob_size: 0,
        inodes: [&[root], inodes].concat(),
        dirents: (0..inodes.len() as u32).map(name).collect(),
        xattrs: Vec::new(),
        chunks: Vec::new(),
        checkpoints: Vec::new(),
        verify: crate::layer::Verify::Content,
        strings: (b'a'..=b'z').collect(),
    }
}

fn file(data: u64, size: u64) -> Inode {
    Inode {
        mode: mode::REG | 0o640,
        nlink: 1,
        data,
        size,
        ..Inode::default()
    }
}

fn device(size: u64) -> Device {
    Device {
        tag: Digest::of(b"layer"),
        size,
    }
}

fn written(parts: IndexParts, devices: &[Device]) -> Result<Image, LayerError> {
    write(&LayerIndex::new(parts).unwrap(), devices, Addressing::Unified)
}

fn error(inodes: &[Inode], devices: &[Device]) -> String {
    written(parts(inodes), devices).unwrap_err().to_string()
}

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len]
        .iter()
        .rev()
        .fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[test]
fn an_image_has_these_bytes() {
    let mut one = file(1024, 700);
    (one.uid, one.gid, one.mtime, one.mtime_nsec) = (7, 1 << 20, -2, 5);
    let image = written(parts(&[one]), &[device(1000), device(2000)]).unwrap();
    let bytes = &image.bytes;
    assert_eq!((bytes.len(), image.inodes, image.dropped_xattrs), (2048, 2, 0));
    // Superblock: magic, features, size of a block, root, inodes, blocks, devices.
    assert_eq!(number(bytes, SUPER, 4), 0xe0f5_e1e2);
    assert_eq!(number(bytes, SUPER + 8, 4), 3);
    assert_eq!(number(bytes, SUPER + 12, 4), 9 | (1408 / 32) << 16);
    assert_eq!((number(bytes, SUPER + 16, 8), number(bytes, SUPER + 36, 4)), (2, 4));
    assert_eq!(&bytes[SUPER + 64..SUPER + 80], b"lazuli\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(
        (number(bytes, SUPER + 80, 4), number(bytes, SUPER + 84, 8)),
        (8, 2 << 16 | 9 << 32)
    );
    // Devices: blocks, and where they begin behind the four of the image.
    assert_eq!(&bytes[1152..1216], Digest::of(b"layer").hex().as_bytes());
    assert_eq!((number(bytes, 1216, 4), number(bytes, 1220, 4)), (2, 4));
    assert_eq!((number(bytes, 1344, 4), number(bytes, 1348, 4)), (4, 6));
    // Root: extended, its entries behind it; three of them.
    let root = &bytes[1408..];
    assert_eq!(
        (number(root, 0, 8), number(root, 8, 8)),
        (5 | 0o40755 << 32, 3 * 12 + 4)
    );
    assert_eq!((number(root, 16, 4), number(root, 44, 4)), (0xffff_ffff, 2));
}

#[test]
fn an_inode_has_these_bytes() {
    let mut one = file(1024, 700);
    (one.uid, one.gid, one.mtime, one.mtime_nsec, one.nlink) = (7, 1 << 20, -2, 5, 70_000);
    let image = written(parts(&[one]), &[device(1000), device(2000)]).unwrap();
    let bytes = &image.bytes;
    // The root has its place where its entries fit behind it.
    let root = number(bytes, SUPER + 14, 2) as usize * 32;
    let entries = &bytes[root + 64..root + 104];
    assert_eq!(&entries[36..], b"...a");
    let at = number(entries, 24, 8) as usize * 32;
    let inode = &bytes[at..at + 64];
    assert_eq!(number(inode, 0, 8), 1 | 0o100640 << 32);
    assert_eq!(number(inode, 8, 8), 700);
    assert_eq!(
        number(inode, 16, 8),
        6 | 2 << 32,
        "block 0 of the second device, second inode"
    );
    assert_eq!(number(inode, 24, 8), 7 | 1 << 52);
    assert_eq!(number(inode, 32, 8) as i64, -2);
    assert_eq!(number(inode, 40, 8), 5 | 70_000 << 32);
    assert_eq!(inode[48..], [0; 16]);
}

#[test]
fn a_chunk_has_these_bytes() {
    let files = [file(1024, 5000), file(8192, 4096), file(8192, 4097)];
    let index = LayerIndex::new(parts(&files)).unwrap();
    let image = write(&index, &[device(1000), device(20_000)], Addressing::Chunks).unwrap();
    let bytes = &image.bytes;
    assert_eq!(number(bytes, SUPER + 80, 4), 8 | 4, "chunks are a feature");
    // The entries behind the root: `.`, `..`, and the files.
    let root = number(bytes, SUPER + 14, 2) as usize * 32;
    let inode = |entry: usize| number(&bytes[root + 64..], entry * 12, 8) as usize * 32;
    let first = &bytes[inode(2)..];
    assert_eq!(number(first, 0, 2), 1 | 4 << 1);
    // 10 blocks: chunks of 16. Its address: the second device, from its beginning.
    assert_eq!(number(first, 16, 4), 0x20 | 4);
    assert_eq!(number(first, 64, 8), 2 << 16);
    // One page has nothing to join.
    assert_eq!(number(&bytes[inode(3)..], 0, 2), 1);
    let third = &bytes[inode(4)..];
    assert_eq!(
        (number(third, 0, 2), number(third, 64, 8)),
        (1 | 4 << 1, 2 << 16 | 14 << 32)
    );
    // A file that no chunk is large enough for.
    let large = LayerIndex::new(parts(&[file(0, MAX_CHUNK), file(0, MAX_CHUNK + 1)])).unwrap();
    let bytes = write(&large, &[device(MAX_CHUNK + 512)], Addressing::Chunks)
        .unwrap()
        .bytes;
    let root = number(&bytes, SUPER + 14, 2) as usize * 32;
    let inode = |entry: usize| number(&bytes[root + 64..], entry * 12, 8) as usize * 32;
    assert_eq!(number(&bytes[inode(2)..], 16, 4), 0x20 | 31);
    assert_eq!(number(&bytes[inode(3)..], 0, 2), 1);
    // Without devices there are no chunks.
    let empty = LayerIndex::new(parts(&[])).unwrap();
    assert_eq!(
        number(&write(&empty, &[], Addressing::Chunks).unwrap().bytes, SUPER + 80, 4),
        0
    );
}

#[test]
fn a_file_lies_inside_one_device() {
    for (data, size, sizes) in [
        (0, 1000, &[1000][..]),
        (512, 488, &[1000]),
        (1024, 1, &[1000, 1]),
        (0, 1, &[0, 1]),
        (1 << 40, 1 << 39, &[1 << 40, 1 << 39]),
        // Empty files have no extent.
        (77, 0, &[]),
    ] {
        let devices: Vec<_> = sizes.iter().map(|&size| device(size)).collect();
        assert!(
            written(parts(&[file(data, size)]), &devices).is_ok(),
            "{data} {size} {sizes:?}"
        );
    }
    for (data, size, sizes) in [
        (0, 1001, &[1000][..]),
        (512, 489, &[1000]),
        (512, 600, &[1000, 1000]),
        (1024, 1, &[1000, 0]),
        (1024, 1, &[1000]),
        (0, 1, &[]),
        (0, 513, &[512, 512]),
    ] {
        let devices: Vec<_> = sizes.iter().map(|&size| device(size)).collect();
        let error = error(&[file(data, size)], &devices);
        assert!(error.contains("does not lie inside one device"), "{error}");
    }
    assert!(error(&[file(256, 1)], &[device(1000)]).contains("does not begin at a whole block"));
}

#[test]
fn limits_are_named() {
    let space = MAX_BLOCK * BLOCK;
    assert!(error(&[], &[device(space)]).contains("unified address space"));
    assert!(error(&[], &[device(space + 1)]).contains("size of a device"));
    assert!(error(&[], &vec![device(0); MAX_DEVICES as usize + 1]).contains("number of devices"));
    assert!(written(parts(&[]), &vec![device(512); MAX_DEVICES as usize]).is_ok());
    assert!(written(parts(&[]), &[device(space - 10 * BLOCK)]).is_ok());
    assert!(error(&[Inode { nlink: 0, ..file(0, 0) }], &[]).contains("no link"));
    let device = |rdev_major, rdev_minor| Inode {
        mode: mode::BLK,
        nlink: 1,
        rdev_major,
        rdev_minor,
        ..Inode::default()
    };
    assert!(written(parts(&[device(4095, (1 << 20) - 1)]), &[]).is_ok());
    assert!(error(&[device(4096, 0)], &[]).contains("no device can have the number 4096:0"));
    assert!(error(&[device(0, 1 << 20)], &[]).contains("no device can have the number 0:1048576"));
}

#[test]
fn shared_parts_cannot_make_it_large() {
    // Inodes that share entries or xattrs: a small index of a large tree.
    let value = vec![b'v'; 60_000];
    let mut shared = parts(&vec![file(0, 0); 20]);
    shared.strings.extend_from_slice(b"user.x");
    shared.strings.extend(&value);
    let xattr = Xattr {
        name: 26,
        name_len: 6,
        value: 32,
        value_len: 60_000,
    };
    shared.xattrs = vec![xattr; 4];
    for inode in &mut shared.inodes[1..] {
        inode.xattr_count = 4;
    }
    let error = LayerIndex::new(shared.clone()).unwrap_err().to_string();
    assert!(error.contains("inodes share extended attributes"), "{error}");
    // Values may be shared: 20 x 240,000 bytes are fine; 8,000 times as many would not be.
    shared.xattrs = vec![xattr; 80];
    for (inode, first) in shared.inodes[1..].iter_mut().zip((0..).step_by(4)) {
        inode.xattr_first = first;
    }
    assert!(written(shared.clone(), &[]).is_ok());
    shared.xattrs = vec![xattr; 32_000];
    let names: Vec<_> = (0..8000u32).map(|at| at.to_string()).collect();
    shared.inodes.truncate(1);
    shared.dirents.clear();
    for (at, name) in (0..).zip(&names) {
        shared.dirents.push(Dirent {
            name: shared.strings.len() as u32,
            name_len: name.len() as u32,
            ino: at + 2,
        });
        shared.strings.extend_from_slice(name.as_bytes());
        shared.inodes.push(Inode {
            xattr_first: 4 * at,
            xattr_count: 4,
            ..file(0, 0)
        });
    }
    let strings = shared.strings.clone();
    shared
        .dirents
        .sort_by_key(|entry| strings[entry.name as usize..][..entry.name_len as usize].to_vec());
    shared.inodes[0].count = 8000;
    let error = written(shared, &[]).unwrap_err().to_string();
    assert!(
        error.contains("length of the extended attributes of all inodes"),
        "{error}"
    );
}

#[test]
fn an_inode_takes_as_many_xattrs_as_fit() {
    let mut many = parts(&[file(0, 0)]);
    let value = many.strings.len() as u32;
    many.strings.extend(vec![b'y'; 65_536]);
    let mut add = |name: &str, value_len: u32| {
        let at = many.strings.len() as u32;
        many.strings.extend_from_slice(name.as_bytes());
        many.xattrs.push(Xattr {
            name: at,
            name_len: name.len() as u32,
            value,
            value_len,
        });
    };
    for name in ["user.a", "user.b", "user.c", "user.d", "user.e"] {
        add(name, 65_535);
    }
    add("user.too-long", 65_536);
    add("user.", 1);
    add("system.nfs4_acl", 1);
    add("user.small", 1);
    add("trusted.overlay.opaque", 1);
    many.inodes[1].xattr_count = many.xattrs.len() as u32;
    let image = written(many, &[]).unwrap();
    // The fourth and fifth large one have no room any more, since the mark of an opaque directory is there first.
    assert_eq!(image.dropped_xattrs, 5);
    const { assert!(MAX_XATTRS < 12 + 4 * 65_540) };
    let find = |text: &[u8]| image.bytes.windows(text.len()).position(|window| window == text);
    assert!(find(b"overlay.opaque").unwrap() < find(b"small").unwrap());
    assert!(find(b"too-long").is_none());
}

#[test]
fn inodes_that_no_name_leads_to_are_not_written() {
    // Two directories that hold each other: every reference is right, but no way leads there.
    let dir = |parent, data| Inode {
        mode: mode::DIR,
        nlink: 3,
        parent,
        data,
        count: 1,
        ..Inode::default()
    };
    let mut odd = parts(&[]);
    odd.inodes.extend([dir(3, 0), dir(2, 1)]);
    odd.dirents = vec![
        Dirent {
            name: 0,
            name_len: 1,
            ino: 3,
        },
        Dirent {
            name: 1,
            name_len: 1,
            ino: 2,
        },
    ];
    assert_eq!(written(odd, &[]).unwrap().inodes, 1);
}

#[test]
fn the_checksum_is_the_one_of_the_kernel() {
    // The usual check value, without the inversion at the end.
    assert_eq!(!emit::crc32c(b"123456789"), 0xe306_9283);
}
