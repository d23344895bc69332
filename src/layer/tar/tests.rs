//! Tests of the tar reader: dialects, extended headers, sparse files, what is tolerated and what is not.

use proptest::prelude::*;

use super::*;
use crate::layer::testing::{
    GNU, Head, Tar, V7, data_space, index, layout, picture, put_binary, put_octal, put_size, record, seal,
};

/// Content of the regular file at `path`.
fn content(tar: &Tar, path: &str) -> Vec<u8> {
    let layout = tar.layout().unwrap();
    let data = data_space(&tar.0, &layout);
    let index = index(layout);
    let inode = index.inode(index.lookup_path(path.as_bytes()).unwrap()).unwrap();
    data[inode.data as usize..(inode.data + inode.size) as usize].to_vec()
}

#[test]
fn an_empty_tar_is_an_empty_layer() {
    for tar in [&[][..], &[0; 512], &[0; 1024], &[0; 10240]] {
        let layout = layout(tar).unwrap();
        assert_eq!(
            (layout.tar_size, layout.data_size),
            (tar.len() as u64, tar.len() as u64)
        );
        assert_eq!(picture(&index(layout)), "/ dir 755 0:0 x2\n");
    }
}

#[test]
fn contents_are_at_their_offsets_in_the_tar() {
    let mut tar = Tar::default();
    tar.file("a", b"alpha")
        .file("b", &[7; 1024])
        .file("empty", b"")
        .file("c", b"gamma")
        .end();
    for (path, bytes) in [("a", &b"alpha"[..]), ("b", &[7; 1024]), ("empty", b""), ("c", b"gamma")] {
        assert_eq!(content(&tar, path), bytes, "{path}");
    }
    let index = tar.index();
    for inode in index.inodes().iter().filter(|inode| inode.is_reg()) {
        assert_eq!(inode.data % 512, 0);
    }
    assert_eq!(tar.layout().unwrap().copies, []);
    assert_eq!(index.data_size(), tar.0.len() as u64);
}

#[test]
fn all_types_and_their_fields() {
    let mut tar = Tar::default();
    let owned = Head {
        uid: 1000,
        gid: 4_000_000_000,
        mtime: 1_700_000_000,
        ..Head::default()
    };
    tar.add(
        Head {
            name: b"bin",
            kind: b'5',
            mode: 0o41777,
            ..owned.clone()
        },
        b"",
    )
    .add(
        Head {
            name: b"bin/su",
            mode: 0o104755,
            size: 3,
            ..owned.clone()
        },
        b"abc",
    )
    .add(
        Head {
            name: b"bin/old",
            kind: 0,
            magic: V7,
            ..owned.clone()
        },
        b"",
    )
    .add(
        Head {
            name: b"olddir/",
            kind: 0,
            magic: V7,
            mode: 0o700,
            ..owned.clone()
        },
        b"",
    )
    .add(
        Head {
            name: b"bin/contiguous",
            kind: b'7',
            size: 1,
            ..owned.clone()
        },
        b"c",
    )
    .add(
        Head {
            name: b"bin/link",
            kind: b'2',
            link: b"../x\xff",
            size: 77,
            ..owned.clone()
        },
        b"",
    )
    .add(
        Head {
            name: b"bin/hard",
            kind: b'1',
            link: b"./bin/su",
            mode: 0o755,
            ..owned.clone()
        },
        b"",
    )
    .add(
        Head {
            name: b"null",
            kind: b'3',
            major: 1,
            minor: 3,
            ..owned.clone()
        },
        b"",
    )
    .add(
        Head {
            name: b"disk",
            kind: b'4',
            major: 8,
            minor: 259,
            ..owned.clone()
        },
        b"",
    )
    .add(
        Head {
            name: b"pipe",
            kind: b'6',
            prefix: b"run",
            ..owned.clone()
        },
        b"",
    )
    .end();
    assert_eq!(
        picture(&tar.index()),
        "/ dir 755 0:0 x5
/bin dir 1777 1000:4000000000 x2 @1700000000.000000000
/bin/contiguous file 644 1000:4000000000 x1 1 @1700000000.000000000
/bin/hard file 755 1000:4000000000 x2 #3 3 @1700000000.000000000
/bin/link link 777 1000:4000000000 x1 -> ../x\\xff @1700000000.000000000
/bin/old file 644 1000:4000000000 x1 0 @1700000000.000000000
/bin/su file 755 1000:4000000000 x2 #3 3 @1700000000.000000000
/disk block 644 1000:4000000000 x1 8:259 @1700000000.000000000
/null char 644 1000:4000000000 x1 1:3 @1700000000.000000000
/olddir dir 700 1000:4000000000 x2 @1700000000.000000000
/run dir 755 0:0 x2
/run/pipe fifo 644 1000:4000000000 x1 @1700000000.000000000
"
    );
}

#[test]
fn pax_records_override_header_fields() {
    let long = "n".repeat(200);
    let mut tar = Tar::default();
    tar.extended(b'g', &record("path", b"global headers are ignored"));
    tar.pax(&[
        ("path", format!("dir/{long}\u{e9}").as_bytes()),
        ("size", b"5"),
        ("uid", b"3000000"),
        ("gid", b"7"),
        ("mtime", b"1500000000.123456789"),
        ("SCHILY.xattr.user.bin", b"\0\xff\n="),
        ("SCHILY.xattr.security.capability", b"cap"),
        ("LIBARCHIVE.xattr.user.other", b"aWdub3JlZA"),
        ("comment", b"ignored"),
    ]);
    tar.add(
        Head {
            size: 0,
            ..Head::default()
        },
        b"12345",
    );
    tar.pax(&[("linkpath", "t".repeat(300).as_bytes()), ("path", b"")]);
    tar.symlink("plain", "short").end();
    assert_eq!(
        picture(&tar.index()),
        format!(
            "/ dir 755 0:0 x3\n/dir dir 755 0:0 x2\n\
             /dir/{long}\\xc3\\xa9 file 644 3000000:7 x1 5 @1500000000.123456789 security.capability=cap \
             user.bin=\\x00\\xff\\n=\n/plain link 777 0:0 x1 -> {}\n",
            "t".repeat(300)
        )
    );
    assert_eq!(content(&tar, &format!("dir/{long}\u{e9}")), b"12345");
}

#[test]
fn a_global_header_ends_what_came_before_it() {
    let mut tar = Tar::default();
    tar.pax(&[("path", b"lost")])
        .extended(b'g', &record("comment", b"c"))
        .file("kept", b"")
        .end();
    assert_eq!(picture(&tar.index()), "/ dir 755 0:0 x2\n/kept file 644 0:0 x1 0\n");
}

#[test]
fn gnu_long_names_and_numbers() {
    let (name, link) = ("\u{fc}".repeat(120), "l".repeat(150));
    let mut tar = Tar::default();
    tar.extended(b'K', format!("{link}\0").as_bytes());
    tar.extended(b'L', format!("{name}\0after the end").as_bytes());
    tar.add(
        Head {
            kind: b'2',
            magic: GNU,
            ..Head::default()
        },
        b"",
    );
    let mut block = Head {
        name: b"n",
        magic: GNU,
        ..Head::default()
    }
    .block();
    put_binary(&mut block[136..148], -1);
    put_binary(&mut block[108..116], 1 << 31);
    put_binary(&mut block[124..136], 4);
    seal(&mut block);
    tar.block(&block).content(b"four").end();
    let escaped: String = name.bytes().map(|c| format!("\\x{c:02x}")).collect();
    assert_eq!(
        picture(&tar.index()),
        format!("/ dir 755 0:0 x2\n/{escaped} link 777 0:0 x1 -> {link}\n/n file 644 2147483648:0 x1 4\n")
    );
    assert_eq!(content(&tar, "n"), b"four");
}

#[test]
fn prefixes_of_other_dialects() {
    let mut star = Head {
        prefix: &[b'p'; 131],
        ..Head::default()
    }
    .block();
    star[476..488].copy_from_slice(b"00000000001\0");
    star[508..].copy_from_slice(b"tar\0");
    seal(&mut star);
    let old_go = Head {
        magic: GNU,
        prefix: b"old/go",
        ..Head::default()
    }
    .block();
    let mut with_times = Head {
        name: b"times",
        magic: GNU,
        ..Head::default()
    }
    .block();
    put_octal(&mut with_times[345..357], 1);
    put_octal(&mut with_times[357..369], 2);
    seal(&mut with_times);
    let mut tar = Tar::default();
    tar.block(&star).block(&old_go).block(&with_times).end();
    let index = tar.index();
    for path in [&format!("{}/file", "p".repeat(131)), "old/go/file", "times"] {
        assert!(index.lookup_path(path.as_bytes()).is_some(), "{path}");
    }
}

#[test]
fn signed_checksums_are_taken() {
    let mut block = Head {
        name: b"\xff\xfe\xfd",
        ..Head::default()
    }
    .block();
    block[148..156].fill(b' ');
    let sum: i64 = block.iter().map(|&byte| i64::from(byte as i8)).sum();
    put_octal(&mut block[148..155], sum as u64);
    let mut tar = Tar::default();
    tar.block(&block).end();
    assert!(tar.index().lookup_path(b"\xff\xfe\xfd").is_some());
}

/// A header of an old GNU sparse file.
fn gnu_sparse(name: &[u8], stored: u64, size: u64, map: &[(u64, u64)], more: bool) -> [u8; 512] {
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

fn extension(map: &[(u64, u64)], more: bool) -> [u8; 512] {
    let mut block = [0; 512];
    for (entry, (offset, len)) in block[..504].chunks_exact_mut(24).zip(map) {
        put_octal(&mut entry[..12], *offset);
        put_octal(&mut entry[12..], *len);
    }
    block[504] = more.into();
    block
}

/// A map, the stored bytes, and the file that they make.
fn holey(parts: &[(u64, u64)], size: u64) -> (Vec<(u64, u64)>, Vec<u8>, Vec<u8>) {
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

#[test]
fn errors_say_what_and_where() {
    let mut tar = Tar::default();
    tar.file("fine", b"1");
    let broken = |change: &dyn Fn(&mut Tar)| {
        let mut broken = Tar(tar.0.clone());
        change(&mut broken);
        broken.error()
    };
    let with = |head: Head<'static>, at: usize, field: &'static [u8]| {
        broken(&move |tar| {
            let mut block = head.block();
            block[at..at + field.len()].copy_from_slice(field);
            seal(&mut block);
            tar.block(&block);
        })
    };
    let head = || Head {
        name: b"bad",
        ..Head::default()
    };
    for (error, expected) in [
        (
            broken(&|tar| tar.0.extend([b'x'; 512])),
            "malformed tar at 1024: the checksum is not a number",
        ),
        (
            broken(&|tar| {
                let mut block = Head::default().block();
                block[0] ^= 1;
                tar.block(&block);
            }),
            "malformed tar at 1024: the header's checksum is ",
        ),
        (
            with(head(), 124, b"9"),
            "malformed tar at 1024: the field size is not a number: \"90000000000\\x00\"",
        ),
        (
            with(head(), 124, &[0xff; 12]),
            "malformed tar at 1024: entry \"bad\" has a negative size",
        ),
        (with(head(), 124, b"\x80\0\0\0\x70"), "size of a file is "),
        (
            with(head(), 108, b"\xff\xff\xff\xff\xff\xff\xff\xff"),
            "malformed tar at 1024: entry \"bad\": no user has the number -1",
        ),
        (
            with(head(), 116, b"\x80\0\0\0\xff\xff\xff\xff"),
            "malformed tar at 1024: entry \"bad\": no group has the number 4294967295",
        ),
        (
            with(Head { kind: b'3', ..head() }, 329, b"7777777"),
            "malformed tar at 1024: entry \"bad\": no device can have the number 2097151:0",
        ),
        (
            with(Head { kind: b'V', ..head() }, 0, b""),
            "type 'V' of the tar entry \"bad\" is not supported",
        ),
        (
            with(Head { kind: b'2', ..head() }, 0, b""),
            "malformed tar at 1024: entry \"bad\": a symlink's target has 0 bytes",
        ),
        (
            with(
                Head {
                    kind: b'1',
                    link: b"no",
                    ..head()
                },
                0,
                b"",
            ),
            "malformed tar at 1024: entry \"bad\": it is a hard link to \"no\", which no entry before it made",
        ),
        (
            with(
                Head {
                    name: b"fine/x",
                    ..head()
                },
                0,
                b"",
            ),
            "malformed tar at 1024: entry \"fine/x\": \"fine\" on the way to it is not a directory",
        ),
        (
            broken(&|tar| {
                tar.extended(b'x', b"9 size=x\n");
            }),
            "malformed tar at 1536: record \"size\" has the value \"x\"",
        ),
        (
            broken(&|tar| {
                tar.extended(b'g', b"9 path=a\nx");
            }),
            "malformed tar at 1545: a record has no length",
        ),
        (
            broken(&|tar| {
                tar.extended(b'L', &[b'n'; 256]).file("", b"");
            }),
            "a component of its path has 256 bytes, over the limit of 255",
        ),
        (
            broken(&|tar| {
                tar.extended(b'L', &b"n/".repeat(3000)).file("", b"");
            }),
            "its path has 5999 bytes, over the limit of 4095",
        ),
        (
            broken(&|tar| {
                tar.extended(b'x', &vec![b' '; (1 << 20) + 1]);
            }),
            "length of an extended tar header is 1048577, over the limit of 1048576",
        ),
        (
            broken(&|tar| {
                tar.0.extend([0; 512]);
                tar.file("x", b"");
            }),
            "malformed tar at 1536: a single block of zeros is in the middle",
        ),
    ] {
        assert!(error.contains(expected), "{error}\n{expected}");
    }
}

#[test]
fn an_error_stays() {
    let mut indexer = TarIndexer::new();
    let error = indexer.push(&[b'x'; 512]).unwrap_err();
    assert_eq!(indexer.push(&[0; 1024]), Err(error.clone()));
    assert_eq!(indexer.finish(), Err(error));
}

#[test]
fn what_may_be_missing_at_the_end_and_what_may_not() {
    let mut tar = Tar::default();
    tar.file("a", &[1; 700]).pax(&[("path", b"long")]).file("b", b"bb");
    tar.block(&gnu_sparse(b"s", 1, 10, &[(0, 1)], true))
        .block(&extension(&[], false))
        .content(b"s")
        .end();
    // The tar may end between entries, and in the padding of contents.
    let good = |len: usize| {
        let ends = [
            0..=0,
            1212..=1536,
            2061..=2560,
            3074..=3584,
            4609..=5120,
            5632..=5632,
            6144..=6144,
        ];
        ends.iter().any(|range| range.contains(&len))
    };
    for len in 0..=tar.0.len() {
        match layout(&tar.0[..len]) {
            Ok(layout) => assert!(good(len) && layout.tar_size == len as u64, "{len}"),
            Err(LayerError::Truncated { length, .. }) => assert!(!good(len) && length == len as u64, "{len}"),
            Err(other) => panic!("{len}: {other}"),
        }
    }
    tar.0.extend(b"anything at all, also half a block");
    assert_eq!(tar.layout().unwrap().tar_size, tar.0.len() as u64);
}

#[test]
fn a_file_of_many_gigabytes_needs_no_memory() {
    let size = 9 << 30;
    let mut indexer = TarIndexer::new();
    indexer
        .push(
            &Head {
                size,
                ..Head::default()
            }
            .block(),
        )
        .unwrap();
    let zeros = vec![0; 64 << 20];
    for _ in 0..size / zeros.len() as u64 {
        indexer.push(&zeros).unwrap();
    }
    indexer
        .push(
            &Head {
                name: b"after",
                ..Head::default()
            }
            .block(),
        )
        .unwrap();
    let index = index(indexer.finish().unwrap());
    let after = index.inode(index.lookup_path(b"after").unwrap()).unwrap();
    assert_eq!(after.data, size + 1024);
}

/// Real archives, made by the tar and python3 of this machine from a real tree, are what that tree is.
#[test]
fn archives_of_real_tools() {
    use std::os::unix::fs::{FileExt, MetadataExt, symlink};
    use std::process::Command;
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    std::fs::create_dir_all(root.join("sub/deep")).unwrap();
    std::fs::write(root.join("sub/file"), b"content").unwrap();
    std::fs::hard_link(root.join("sub/file"), root.join("sub/deep/hard")).unwrap();
    symlink("../".repeat(60) + "etc/passwd", root.join("sub/link")).unwrap();
    std::fs::write(root.join("sub").join("n".repeat(140)), vec![3; 10_000]).unwrap();
    let sparse = std::fs::File::create(root.join("sparse")).unwrap();
    for at in 0..12u64 {
        sparse.write_all_at(b"island", at << 17).unwrap();
    }
    sparse.set_len(2 << 20).unwrap();
    drop(sparse);
    let tar = |args: &[&str], out: &str| {
        let mut command = Command::new("tar");
        command
            .args(args)
            .arg("-cf")
            .arg(dir.path().join(out))
            .arg("-C")
            .arg(&root)
            .arg(".");
        command
    };
    let python = |format: &str, out: &str| {
        let mut command = Command::new("python3");
        let script = format!(
            "import sys, tarfile; tarfile.open(sys.argv[1], 'w', format=tarfile.{format}).add(sys.argv[2], '.')"
        );
        command.arg("-c").arg(script).arg(dir.path().join(out)).arg(&root);
        command
    };
    let mut tried = 0;
    for (out, mut command) in [
        ("gnu", tar(&["--format=gnu"], "gnu")),
        ("gnu-sparse", tar(&["--format=gnu", "--sparse"], "gnu-sparse")),
        ("pax", tar(&["--format=pax"], "pax")),
        (
            "sparse-0.0",
            tar(&["--format=pax", "--sparse-version=0.0"], "sparse-0.0"),
        ),
        (
            "sparse-0.1",
            tar(&["--format=pax", "--sparse-version=0.1"], "sparse-0.1"),
        ),
        (
            "sparse-1.0",
            tar(&["--format=pax", "--sparse-version=1.0"], "sparse-1.0"),
        ),
        ("python-gnu", python("GNU_FORMAT", "python-gnu")),
        ("python-pax", python("PAX_FORMAT", "python-pax")),
    ] {
        match command.status() {
            Ok(status) if status.success() => {}
            other => {
                eprintln!("SKIPPED: {out}: the tool gave {other:?}");
                continue;
            }
        }
        tried += 1;
        let bytes = std::fs::read(dir.path().join(out)).unwrap();
        let layout = layout(&bytes).unwrap_or_else(|error| panic!("{out}: {error}"));
        assert_eq!(layout.copies.is_empty(), !out.contains("sparse"), "{out}");
        let data = data_space(&bytes, &layout);
        let index = index(layout);
        let nanoseconds = out == "pax" || out.starts_with("sparse");
        let mut names = 0;
        let mut todo = vec![root.clone()];
        while let Some(path) = todo.pop() {
            names += 1;
            let real = path.symlink_metadata().unwrap();
            let name = path.strip_prefix(&root).unwrap().as_os_str().as_encoded_bytes();
            let inode = index.inode(index.lookup_path(name).unwrap()).unwrap();
            if !name.is_empty() {
                assert_eq!(
                    (inode.mode, inode.uid, inode.gid),
                    (real.mode(), real.uid(), real.gid()),
                    "{out} {path:?}"
                );
            }
            assert_eq!(inode.mtime, real.mtime(), "{out} {path:?}");
            if nanoseconds {
                assert_eq!(i64::from(inode.mtime_nsec), real.mtime_nsec(), "{out} {path:?}");
            }
            if real.is_dir() {
                todo.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            } else if real.is_symlink() {
                assert_eq!(
                    index.target(inode),
                    std::fs::read_link(&path).unwrap().as_os_str().as_encoded_bytes()
                );
            } else {
                assert_eq!(u64::from(inode.nlink), real.nlink(), "{out} {path:?}");
                let bytes = &data[inode.data as usize..(inode.data + inode.size) as usize];
                assert!(bytes == std::fs::read(&path).unwrap(), "{out} {path:?}");
            }
        }
        assert_eq!(names, index.inodes().len() + 1, "{out}: one name is a hard link");
    }
    if tried == 0 {
        eprintln!("SKIPPED: neither tar nor python3 is here");
    }
}

/// Names for random tars, so few that they meet.
const NAMES: [&str; 16] = [
    "a",
    "b",
    "c",
    "a/a",
    "a/b",
    "b/a",
    "a/b/a",
    "b/a/c",
    "c/c",
    ".wh.a",
    ".wh.b",
    "a/.wh..wh..opq",
    "b/.wh.a",
    "./../a",
    "a/b/",
    ".",
];

/// Entries of a random tar.
fn random_tar() -> impl Strategy<Value = Vec<u8>> {
    let name = || prop::sample::select(&NAMES[..]);
    let content = (any::<u8>(), 0..1200usize).prop_map(|(byte, len)| vec![byte; len]);
    let entry = (0..9u8, name(), name(), content);
    proptest::collection::vec(entry, 0..20).prop_map(|entries| {
        let mut tar = Tar::default();
        for (what, name, other, content) in entries {
            match what {
                0 => tar.dir(name, 0o750),
                1 => tar.symlink(name, other),
                2 => tar.hardlink(name, other),
                3 => tar.pax(&[("path", other.as_bytes()), ("SCHILY.xattr.user.a", name.as_bytes())]),
                4 => tar.extended(b'L', other.as_bytes()),
                5 => {
                    let (map, stored, _) = holey(&[(3, 700), (2000, 1 + content.len() as u64)], 4000);
                    let size = stored.len() as u64;
                    tar.block(&gnu_sparse(name.as_bytes(), size, 4000, &map, true));
                    tar.block(&extension(&[], false)).content(&stored)
                }
                _ => tar.file(name, &content),
            };
        }
        tar.end().0.clone()
    })
}

proptest! {
    #[test]
    fn the_cuts_make_no_difference(tar in random_tar(), cuts in proptest::collection::vec(1..2000usize, 0..40)) {
        let whole = layout(&tar);
        let mut indexer = TarIndexer::new();
        let (mut rest, mut result) = (&tar[..], Ok(()));
        for cut in cuts.into_iter().chain([usize::MAX]) {
            let (piece, more) = rest.split_at(cut.min(rest.len()));
            result = result.and(indexer.push(piece));
            rest = more;
        }
        let pieces = result.and_then(|()| indexer.finish());
        prop_assert_eq!(&whole, &pieces);
        if let Ok(layout) = whole {
            // `LayerIndex::new` checks that the tree holds together.
            prop_assert!(layout.into_index(Access::Stream, Codec::None, Vec::new(), 0).is_ok());
        }
    }

    #[test]
    fn every_byte_may_be_wrong(tar in random_tar(), changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let mut tar = tar;
        for (at, byte) in changes {
            let at = at.index(tar.len());
            tar[at] = byte;
            // Otherwise most changes would stop at the checksum.
            let header = at / 512 * 512;
            let block = tar[header..].first_chunk_mut::<512>();
            if let Some(block) = block.filter(|block| &block[257..262] == b"ustar") {
                seal(block);
            }
        }
        if let Ok(layout) = layout(&tar) {
            prop_assert!(layout.into_index(Access::Stream, Codec::None, Vec::new(), 0).is_ok());
        }
    }
}
