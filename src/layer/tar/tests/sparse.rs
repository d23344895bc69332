//! Sparse files in all their forms.

use super::content;
use crate::layer::tar::Copy;
use crate::layer::testing::{GNU, Head, Tar, index, put_size, record, seal};

/// A header of an old GNU sparse file.
pub(super) fn gnu_sparse(name: &[u8], stored: u64, size: u64, map: &[(u64, u64)], more: bool) -> [u8; 512] {
    let mut block = Head {
        kind: b'S',
        name,
        size: stored,
        magic: GNU,
        ..Head::default()
    }
    .block();
    for (entry, (offset, len)) in block[386..482].chunks_exact_mut(24).zip(map) {
        put_size(&mut entry[..12], *offset);
        put_size(&mut entry[12..], *len);
    }
    block[482] = more.into();
    put_size(&mut block[483..495], size);
    seal(&mut block);
    block
}

pub(super) fn extension(map: &[(u64, u64)], more: bool) -> [u8; 512] {
    let mut block = [0; 512];
    for (entry, (offset, len)) in block[..504].chunks_exact_mut(24).zip(map) {
        put_size(&mut entry[..12], *offset);
        put_size(&mut entry[12..], *len);
    }
    block[504] = more.into();
    block
}

/// A map, the stored bytes, and the file that they make.
pub(super) fn holey(parts: &[(u64, u64)], size: u64) -> (Vec<(u64, u64)>, Vec<u8>, Vec<u8>) {
    let (mut stored, mut file) = (Vec::new(), vec![0; size as usize]);
    for (i, &(offset, len)) in parts.iter().enumerate() {
        let bytes: Vec<u8> = (0..len).map(|at| (at + 3 * i as u64) as u8 | 1).collect();
        file[offset as usize..(offset + len) as usize].copy_from_slice(&bytes);
        stored.extend(bytes);
    }
    // As GNU tar ends a map.
    let map = parts.iter().copied().chain([(size, 0)]).collect();
    (map, stored, file)
}

#[test]
fn all_four_forms_of_sparse_files() {
    let parts: Vec<(u64, u64)> = (0..30).map(|i| (i * 1000 + 7, 1 + i * 10)).collect();
    let (map, stored, file) = holey(&parts, 40_000);
    let list = |separator: &str| {
        let numbers: Vec<String> = map
            .iter()
            .map(|(offset, len)| format!("{offset}{separator}{len}"))
            .collect();
        numbers.join(separator)
    };
    let size = stored.len() as u64;
    let head = Head {
        size,
        ..Head::default()
    };

    let mut old = Tar::default();
    old.block(&gnu_sparse(b"file", size, 40_000, &map[..4], true));
    old.block(&extension(&map[4..25], true))
        .block(&extension(&map[25..], false))
        .content(&stored);

    let mut v00 = Tar::default();
    let mut body = [
        record("GNU.sparse.size", b"40000"),
        record("GNU.sparse.numblocks", b"31"),
    ]
    .concat();
    for (offset, len) in &map {
        body.extend(record("GNU.sparse.offset", offset.to_string().as_bytes()));
        body.extend(record("GNU.sparse.numbytes", len.to_string().as_bytes()));
    }
    v00.extended(b'x', &body).add(head.clone(), &stored);

    let mut v01 = Tar::default();
    v01.pax(&[
        ("GNU.sparse.major", b"0"),
        ("GNU.sparse.minor", b"1"),
        ("GNU.sparse.name", b"file"),
        ("GNU.sparse.size", b"40000"),
        ("GNU.sparse.numblocks", b"31"),
        ("GNU.sparse.map", list(",").as_bytes()),
    ]);
    v01.add(
        Head {
            name: b"GNUSparseFile.1/file",
            ..head.clone()
        },
        &stored,
    );

    let mut v10 = Tar::default();
    let mut text = format!("31\n{}\n", list("\n")).into_bytes();
    text.resize(text.len().next_multiple_of(512), 0);
    assert!(text.len() > 512 - 200, "the map should be long");
    v10.pax(&[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"file"),
        ("GNU.sparse.realsize", b"40000"),
    ]);
    let name = b"GNUSparseFile.1/file";
    v10.add(
        Head {
            name,
            size: size + text.len() as u64,
            ..Head::default()
        },
        &[&text[..], &stored].concat(),
    );

    for (form, tar) in [
        ("old", &mut old),
        ("0.0", &mut v00),
        ("0.1", &mut v01),
        ("1.0", &mut v10),
    ] {
        tar.file("after", b"still in step").end();
        assert_eq!(content(tar, "file"), file, "{form}");
        assert_eq!(content(tar, "after"), b"still in step", "{form}");
        let layout = tar.layout().unwrap();
        assert_eq!(layout.copies.len(), 30, "{form}");
        assert_eq!(
            layout.copies[0].to,
            layout.tar_size.next_multiple_of(4096) + 7,
            "{form}"
        );
        assert!(layout.copies.is_sorted_by_key(|copy| (copy.from, copy.to)), "{form}");
        assert_eq!(index(layout).inodes().len(), 3, "{form}");
    }
}

#[test]
fn sparse_files_of_all_hole_and_of_none() {
    let mut tar = Tar::default();
    tar.block(&gnu_sparse(b"hole", 0, 100 << 30, &[(100 << 30, 0)], false));
    tar.block(&gnu_sparse(b"small", 1, 10, &[(9, 1)], false)).content(b"!");
    tar.block(&gnu_sparse(b"big", 1, 5000, &[(0, 1)], false)).content(b"?");
    tar.block(&gnu_sparse(b"whole", 3, 3, &[(0, 3)], false))
        .content(b"abc")
        .end();
    let layout = tar.layout().unwrap();
    let base = layout.tar_size.next_multiple_of(4096);
    let small = base + (100 << 30);
    assert_eq!(
        layout.copies,
        [
            Copy {
                from: 1024,
                to: small + 9,
                len: 1
            },
            Copy {
                from: 2048,
                to: small + 4096,
                len: 1
            }
        ]
    );
    assert_eq!(layout.data_size, small + 4096 + 5000);
    let index = index(layout);
    let file = |path: &[u8]| *index.inode(index.lookup_path(path).unwrap()).unwrap();
    assert_eq!((file(b"hole").data, file(b"hole").size), (base, 100 << 30));
    assert_eq!((file(b"small").data, file(b"big").data), (small, small + 4096));
    assert_eq!(file(b"whole").data, 3072, "a file without holes stays in the tar");
}

#[test]
fn wrong_maps_are_refused() {
    let sparse = |stored, size, map: &[(u64, u64)]| {
        let mut tar = Tar::default();
        tar.block(&gnu_sparse(b"file", stored, size, map, false))
            .content(&vec![1; stored as usize])
            .end();
        tar.error()
    };
    for (stored, size, map) in [
        (2, 10, &[(5, 1), (4, 1)][..]),
        (4, 10, &[(5, 2), (6, 2)]),
        (2, 10, &[(9, 2)]),
        (2, 10, &[(u64::MAX >> 1, 2)]),
        (3, 10, &[(0, 2)]),
        (1, 10, &[(0, 2)]),
    ] {
        let error = sparse(stored, size, map);
        assert!(error.starts_with("malformed tar at 0: entry \"file\": "), "{error}");
    }
    for (records, what) in [
        (vec![("GNU.sparse.map", &b"0,1"[..])], "not a number"),
        (
            vec![("GNU.sparse.map", b"0,1"), ("GNU.sparse.numblocks", b"2")],
            "a map of 1 parts",
        ),
        (
            vec![("GNU.sparse.map", b"0,1,2"), ("GNU.sparse.numblocks", b"2")],
            "not a number",
        ),
        (
            vec![("GNU.sparse.map", b"0,x"), ("GNU.sparse.numblocks", b"1")],
            "not a number",
        ),
        (
            vec![("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0")],
            "its map does not end",
        ),
    ] {
        let mut tar = Tar::default();
        let error = tar.pax(&records).file("f", b"").end().error();
        assert!(error.contains("entry \"f\": ") && error.contains(what), "{error}");
    }
    for map in ["x\n", "1\n2\n", "99999999\n"] {
        let mut tar = Tar::default();
        tar.pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0")]);
        tar.file("f", map.as_bytes());
        assert!(tar.end().layout().is_err(), "{map:?}");
    }
    let mut tar = Tar::default();
    tar.block(
        &Head {
            kind: b'S',
            ..Head::default()
        }
        .block(),
    );
    assert!(tar.error().contains("sparse in another way"), "{}", tar.error());
}
