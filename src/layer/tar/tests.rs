//! Tests of the tar reader: dialects, extended headers, sparse files, what is tolerated and what is not.

mod random;
mod sparse;
mod tools;

use self::sparse::{extension, gnu_sparse};
use super::TarIndexer;
use crate::layer::LayerError;
use crate::layer::testing::{
    GNU, Head, Tar, V7, data_space, index, layout, picture, put_binary, put_octal, record, seal,
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
