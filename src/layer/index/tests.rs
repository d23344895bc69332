//! Tests of the index: what `new` refuses, and what becomes of bytes on disk.

use proptest::prelude::*;

use super::*;
use crate::layer::checkpoint::Entry;
use crate::layer::testing::sample_parts;

fn sample() -> LayerIndex {
    LayerIndex::new(sample_parts()).unwrap()
}

/// The bytes with a right checksum again.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let body = bytes.len() - Digest::LEN;
    let digest = Digest::of(&bytes[..body]);
    bytes[body..].copy_from_slice(digest.as_bytes());
    bytes
}

#[test]
fn names_are_found() {
    let index = sample();
    let root = index.inode(ROOT_INO).unwrap();
    let names: Vec<&[u8]> = index.entries(root).iter().map(|entry| index.name(entry)).collect();
    assert_eq!(names, [b"d", b"g", b"h", b"l"]);
    let file = index.lookup_path(b"/d//f").unwrap();
    assert_eq!(index.lookup(root, b"g"), Some(file));
    assert_eq!(index.lookup_path(b"d/none"), None);
    assert_eq!(index.lookup_path(b"g/none"), None);
    let file = index.inode(file).unwrap();
    assert_eq!(
        (file.nlink, file.size, file.mtime, file.mtime_nsec),
        (2, 5000, 7, 500_000_000)
    );
    assert_eq!(index.xattr(file, b"user.k"), Some(&b"v"[..]));
    assert_eq!(index.xattr(file, b"user.other"), None);
    let link = index.inode(index.lookup_path(b"l").unwrap()).unwrap();
    assert_eq!(index.target(link), b"d");
    assert!(index.entries(link).is_empty() && index.target(file).is_empty());
    assert!(index.inode(0).is_none() && index.inode(99).is_none());
}

#[test]
fn chunks_of_a_range() {
    let mut parts = sample_parts();
    let chunk = |data_offset, data_len| Chunk {
        data_offset,
        data_len,
        ..parts.chunks[0]
    };
    parts.chunks = vec![chunk(0, 10), chunk(10, 10), chunk(30, 5)];
    let index = LayerIndex::new(parts).unwrap();
    for (offset, len, range) in [
        (0, 1, 0..1),
        (9, 2, 0..2),
        (10, 10, 1..2),
        (20, 10, 2..2),
        (0, 100, 0..3),
        (34, 1, 2..3),
        (35, 9, 3..3),
        (5, u64::MAX, 0..3),
    ] {
        assert_eq!(index.chunks_at(offset, len), range, "{offset}+{len}");
    }
    assert_eq!(index.stored_size(), 25);
}

#[test]
fn parts_that_make_no_layer_are_refused() {
    type Change = (&'static str, fn(&mut IndexParts));
    let changes: [Change; 33] = [
        ("the first inode is not a root directory", |p| p.inodes.clear()),
        ("the first inode is not a root directory", |p| {
            p.inodes[0].mode = mode::REG
        }),
        ("the first inode is not a root directory", |p| p.inodes[0].parent = 2),
        ("an inode's extended attributes lie outside", |p| {
            p.inodes[2].xattr_first = 1
        }),
        ("an inode's extended attributes lie outside", |p| {
            p.inodes[2].xattr_count = u32::MAX
        }),
        ("an inode's nanoseconds are a second or more", |p| {
            p.inodes[2].mtime_nsec = 1_000_000_000
        }),
        ("an inode's flags are unknown", |p| p.inodes[1].flags = 32),
        ("an inode has an owner that nobody is", |p| p.inodes[2].uid = u32::MAX),
        ("an inode has an owner that nobody is", |p| p.inodes[0].gid = u32::MAX),
        ("do not go with its type", |p| p.inodes[1].flags = flags::WHITEOUT),
        ("a directory's entries lie outside", |p| p.inodes[0].count = 99),
        ("a directory's entries lie outside", |p| p.inodes[0].data = u64::MAX),
        ("a name lies outside", |p| p.dirents[0].name = u32::MAX),
        ("a directory entry has a name that no file can have", |p| {
            p.dirents[0].name_len = 0
        }),
        ("a directory's names are not in order", |p| p.dirents.swap(0, 1)),
        ("a directory entry names no inode", |p| p.dirents[1].ino = 0),
        ("a directory entry names no inode", |p| p.dirents[1].ino = 99),
        ("a directory has two parents", |p| p.dirents[1].ino = 2),
        ("a directory has two parents", |p| p.inodes[1].parent = 2),
        ("a directory has two parents", |p| p.dirents[4].ino = ROOT_INO),
        ("a file's content lies outside the data space", |p| {
            p.inodes[2].size = u64::MAX
        }),
        ("a symlink has no valid target", |p| p.inodes[3].size = 0),
        ("a symlink has no valid target", |p| p.inodes[3].data = 1 << 40),
        ("inodes share extended attributes", |p| {
            (p.inodes[1].xattr_first, p.inodes[1].xattr_count) = (p.inodes[2].xattr_first, p.inodes[2].xattr_count)
        }),
        ("directories share entries", |p| {
            (p.inodes[1].data, p.inodes[1].count) = (p.inodes[0].data, p.inodes[0].count);
            p.dirents.truncate(p.inodes[0].count as usize);
        }),
        ("names share their texts", |p| {
            (p.inodes[3].data, p.inodes[3].size) = (0, p.strings.len() as u64)
        }),
        ("an inode has no file type", |p| p.inodes[2].mode = 0o644),
        ("an inode has no name", |p| p.dirents[2].ino = 3),
        ("an extended attribute has no valid name or value", |p| {
            p.xattrs[0].name_len = 0
        }),
        ("a chunk's length is 0 or over the limit", |p| p.chunks[0].data_len = 0),
        ("chunks overlap or are not in order", |p| p.chunks.push(p.chunks[0])),
        ("a chunk lies outside the data space", |p| p.chunks[0].data_offset = 1),
        ("a chunk's place in the blob does not fit", |p| {
            p.access = Access::Ranges
        }),
    ];
    for (i, (what, change)) in changes.iter().enumerate() {
        let mut parts = sample_parts();
        change(&mut parts);
        let error = LayerIndex::new(parts).unwrap_err().to_string();
        assert!(error.contains(what), "{i}: {error}\n{what}");
    }
    let mut parts = sample_parts();
    parts.access = Access::Ranges;
    parts.chunks[0].blob_len = 101;
    assert!(
        LayerIndex::new(parts)
            .unwrap_err()
            .to_string()
            .contains("a chunk lies outside the blob")
    );
    let mut parts = sample_parts();
    parts.data_size = MAX_DATA_SIZE + 1;
    assert!(matches!(LayerIndex::new(parts), Err(LayerError::TooLarge { .. })));
}

#[test]
fn the_disk_form_round_trips() {
    let index = sample();
    let bytes = index.encode();
    assert_eq!(LayerIndex::decode(&bytes), Ok(index.clone()));
    assert_eq!(LayerIndex::decode(&bytes).unwrap().encode(), bytes);
    let mut parts = sample_parts();
    (parts.access, parts.codec, parts.chunks[0].blob_len) = (Access::Ranges, Codec::Zstd, 99);
    let index = LayerIndex::new(parts).unwrap();
    assert_eq!(LayerIndex::decode(&index.encode()), Ok(index));
}

#[test]
fn damage_is_noticed() {
    let bytes = sample().encode();
    for len in 0..bytes.len() {
        assert!(LayerIndex::decode(&bytes[..len]).is_err(), "{len}");
    }
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        assert!(LayerIndex::decode(&damaged).is_err(), "{at}");
    }
    let error = |at: usize, byte: u8| {
        let mut other = bytes.clone();
        other[at] = byte;
        LayerIndex::decode(&sealed(other)).unwrap_err()
    };
    assert!(matches!(error(8, 1), LayerError::Unsupported { .. }));
    assert_eq!(
        error(12, 2).to_string(),
        "malformed layer index at 12: unknown access kind 2"
    );
    assert_eq!(error(13, 4).to_string(), "malformed layer index at 13: unknown codec 4");
    assert_eq!(
        error(14, 2).to_string(),
        "malformed layer index at 14: unknown way to verify 2"
    );
    let longer = sealed([&bytes[..], &[0]].concat());
    assert!(
        LayerIndex::decode(&longer)
            .unwrap_err()
            .to_string()
            .contains("after its strings")
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn any_bytes_are_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(LayerIndex::decode(&bytes).is_err());
        let with_head = sealed([&b"LZLINDEX\x02\0\0\0"[..], &bytes, &[0; 32]].concat());
        let _ = LayerIndex::decode(&with_head);
    }

    #[test]
    fn what_a_changed_index_decodes_to_is_valid(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut bytes = sample().encode();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(index) = LayerIndex::decode(&sealed(bytes)) {
            // Every accessor works on everything.
            for inode in index.inodes() {
                for entry in index.entries(inode) {
                    prop_assert!(index.inode(entry.ino).is_some());
                    prop_assert_eq!(index.lookup(inode, index.name(entry)), Some(entry.ino));
                }
                prop_assert_eq!(index.xattrs(inode).count() as u32, inode.xattr_count);
                prop_assert_eq!(index.target(inode).is_empty(), !inode.is_symlink());
            }
            prop_assert_eq!(LayerIndex::decode(&index.encode()), Ok(index));
        }
    }
}

#[test]
fn a_fingerprint_is_that_of_the_form_on_disk() {
    let index = sample();
    let fingerprint = index.fingerprint();
    let bytes = index.encode();
    assert_eq!(&bytes[bytes.len() - Digest::LEN..], fingerprint.as_bytes());
    assert_eq!(LayerIndex::decode(&bytes).unwrap().fingerprint(), fingerprint);
    assert_eq!(index, sample(), "whether it was asked for makes no difference");
    let mut parts = sample_parts();
    parts.inodes[0].uid += 1;
    assert_ne!(LayerIndex::new(parts).unwrap().fingerprint(), fingerprint);
}

/// The sample as two spans, the second of which begins within a byte.
fn spans() -> IndexParts {
    let mut parts = sample_parts();
    let whole = parts.chunks[0];
    let half = whole.data_len / 2;
    (parts.access, parts.codec) = (Access::Ranges, Codec::GzipSpans);
    let first = Checkpoint {
        data_offset: 0,
        data_len: half,
        blob_offset: 0,
        blob_len: 50,
        entry: Entry::Member,
        digest: Digest::of(b"span"),
    };
    let second = Checkpoint {
        data_offset: half.into(),
        data_len: whole.data_len - half,
        blob_offset: 50,
        blob_len: 51,
        entry: Entry::Block { bits: 3, window: 100 },
        ..first
    };
    parts.checkpoints = vec![first, second];
    let chunk = |of: Checkpoint, skip, data_len| Chunk {
        data_offset: of.data_offset + u64::from(skip),
        data_len,
        blob_offset: of.start(),
        blob_len: of.blob_len,
        skip,
        ..whole
    };
    parts.chunks = vec![chunk(first, 0, half), chunk(second, 10, 20), chunk(second, 30, 40)];
    parts
}

#[test]
fn spans_are_found_and_read_back() {
    let index = LayerIndex::new(spans()).unwrap();
    let at = |chunk: usize| index.checkpoint(&index.chunks()[chunk]).map(|(at, _)| at);
    assert_eq!((at(0), at(1), at(2)), (Some(0), Some(1), Some(1)));
    assert_eq!(LayerIndex::decode(&index.encode()), Ok(index.clone()));
    let mut foreign = spans();
    foreign.verify = Verify::Span;
    foreign
        .chunks
        .iter_mut()
        .for_each(|c| c.digest = Digest::from_bytes([0; 32]));
    let foreign = LayerIndex::new(foreign).unwrap();
    assert_eq!(LayerIndex::decode(&foreign.encode()), Ok(foreign));
}

#[test]
fn wrong_spans_are_refused() {
    type Change = fn(&mut IndexParts);
    let changes: [Change; 16] = [
        |p| p.access = Access::Stream,
        |p| p.codec = Codec::Gzip,
        |p| p.verify = Verify::Span,
        |p| p.chunks[1].digest = Digest::from_bytes([0; 32]),
        |p| p.checkpoints[0].data_len = 0,
        |p| p.checkpoints[0].blob_len = MAX_CHUNK_LEN + 1,
        |p| p.checkpoints[1].entry = Entry::Block { bits: 8, window: 0 },
        |p| {
            p.checkpoints[1].entry = Entry::Block {
                bits: 1,
                window: 32_769,
            }
        },
        |p| p.checkpoints[0].entry = Entry::Block { bits: 1, window: 0 },
        |p| p.checkpoints[1].data_offset -= 1,
        |p| p.checkpoints.swap(0, 1),
        |p| p.checkpoints[1].blob_offset = u64::MAX,
        |p| p.checkpoints[1].blob_len += 1,
        |p| p.checkpoints[1].data_len += 1,
        |p| p.chunks[2].skip = p.checkpoints[1].data_len - 39,
        |p| p.chunks[2].blob_offset += 1,
    ];
    for (i, change) in changes.iter().enumerate() {
        let mut parts = spans();
        change(&mut parts);
        assert!(LayerIndex::new(parts).is_err(), "change {i}");
    }
}

#[test]
fn the_version_without_spans_is_still_read() {
    let index = sample();
    let new = index.encode();
    // Without the four bytes for the number of checkpoints and four zeros.
    let old = [&new[..8], &[2, 0, 0, 0], &new[12..56], &new[64..]].concat();
    let old = sealed(old);
    assert_eq!(LayerIndex::decode(&old), Ok(index.clone()));
    let stored = index.blob_stored(std::sync::Arc::new(old)).unwrap();
    assert_eq!(stored, index.blob(), "its chunks lie elsewhere");
}

proptest! {
    #[test]
    fn chunks_on_disk_are_those_in_memory(
        lens in proptest::collection::vec((0_u32..3, 1_u32..50), 0..60),
        places in proptest::collection::vec((0_u64..3000, 0_u64..200), 20),
    ) {
        let mut parts = sample_parts();
        let chunk = parts.chunks[0];
        parts.chunks.clear();
        let mut end = 0;
        for (gap, len) in lens {
            let data_offset = end + u64::from(gap);
            end = data_offset + u64::from(len);
            parts.chunks.push(Chunk { data_offset, data_len: len, digest: Digest::of(&data_offset.to_le_bytes()), ..chunk });
        }
        parts.data_size = parts.data_size.max(end);
        let index = LayerIndex::new(parts).unwrap();
        let (here, bytes) = (index.blob(), index.encode());
        let there = index.blob_stored(std::sync::Arc::new(bytes.clone())).unwrap();
        prop_assert_eq!(&there, &here);
        prop_assert!(*there.chunks() == *index.chunks());
        prop_assert_eq!(there.chunks().get(index.chunks().len()), None);
        for (offset, len) in places {
            let expected = index.chunks_at(offset, len);
            prop_assert_eq!(there.chunks_at(offset, len), expected.clone());
            prop_assert_eq!(here.chunks_at(offset, len), expected.clone());
            let found: Vec<Chunk> = there.chunks().range(expected.clone()).collect();
            prop_assert_eq!(&found[..], &index.chunks()[expected]);
        }
        // Of other bytes, the places of the records are not known.
        let shorter = bytes[..bytes.len() - 1].to_vec();
        prop_assert!(index.blob_stored(std::sync::Arc::new(shorter)).is_none());
        prop_assert!(index.blob_stored(std::sync::Arc::new(Vec::new())).is_none());
    }
}
