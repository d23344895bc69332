//! Tests of what entries do to a tree. They come as tars: that is how they come in life.

use crate::layer::testing::{Head, Tar, picture, record};

/// The picture of a tar's tree, without the line of the root.
fn tree(tar: &mut Tar) -> String {
    let picture = picture(&tar.end().index());
    picture.split_once('\n').map(|(_, rest)| rest.to_owned()).unwrap()
}

#[test]
fn names_are_cleaned_and_stay_inside_the_root() {
    let mut tar = Tar::default();
    tar.dir("./", 0o700)
        .dir("a//b/", 0o755)
        .file("./a/./b/x", b"")
        .file("/abs", b"")
        .file("../../up", b"");
    tar.file("a/../../side", b"").file("a/b/..", b"").add(
        Head {
            name: b"raw\xff\x01",
            ..Head::default()
        },
        b"",
    );
    assert_eq!(
        tree(&mut tar),
        "/a file 644 0:0 x1 0
/abs file 644 0:0 x1 0
/raw\\xff\\x01 file 644 0:0 x1 0
/side file 644 0:0 x1 0
/up file 644 0:0 x1 0
"
    );
}

#[test]
fn the_entry_of_the_root_sets_only_its_time() {
    let mut tar = Tar::default();
    tar.pax(&[("SCHILY.xattr.user.k", b"v")]);
    tar.add(
        Head {
            kind: b'5',
            name: b"./",
            mode: 0o700,
            uid: 7,
            mtime: 99,
            ..Head::default()
        },
        b"",
    )
    .end();
    assert_eq!(picture(&tar.index()), "/ dir 755 0:0 x2 @99.000000000\n");
}

#[test]
fn missing_parents_are_made_and_may_be_described_later() {
    let mut tar = Tar::default();
    tar.file("a/b/c", b"").dir("a/b", 0o711);
    tar.add(
        Head {
            kind: b'5',
            name: b"g",
            mode: 0o2755,
            gid: 5,
            ..Head::default()
        },
        b"",
    )
    .file("g/h/i", b"");
    assert_eq!(
        tree(&mut tar),
        "/a dir 755 0:0 x3
/a/b dir 711 0:0 x2
/a/b/c file 644 0:0 x1 0
/g dir 2755 0:5 x3
/g/h dir 755 0:5 x2
/g/h/i file 644 0:0 x1 0
"
    );
    let index = tar.index();
    let implied = |path: &[u8]| index.inode(index.lookup_path(path).unwrap()).unwrap().is_implied();
    assert_eq!([&b"a"[..], b"a/b", b""].map(implied), [true, false, false]);
}

#[test]
fn the_last_of_two_entries_counts() {
    let mut tar = Tar::default();
    // A directory over a directory: children and attributes that are not given again stay.
    tar.pax(&[("SCHILY.xattr.user.a", b"1"), ("SCHILY.xattr.user.b", b"1")])
        .dir("d", 0o700)
        .file("d/kept", b"");
    tar.pax(&[("SCHILY.xattr.user.b", b"2"), ("SCHILY.xattr.user.c", b"2")])
        .dir("d", 0o755);
    // A file over a directory, over a file, over a symlink; a directory over a file.
    tar.file("gone/sub/x", b"").file("gone", b"now a file");
    tar.file("f", b"1")
        .pax(&[("SCHILY.xattr.user.x", b"")])
        .file("f", b"22")
        .file("f", b"333");
    tar.symlink("l", "d").file("l", b"");
    tar.file("n", b"").dir("n", 0o700).file("n/x", b"");
    assert_eq!(
        tree(&mut tar),
        "/d dir 755 0:0 x2 user.a=1 user.b=2 user.c=2
/d/kept file 644 0:0 x1 0
/f file 644 0:0 x1 3
/gone file 644 0:0 x1 10
/l file 644 0:0 x1 0
/n dir 700 0:0 x2
/n/x file 644 0:0 x1 0
"
    );
    assert_eq!(tar.index().inode(1).unwrap().nlink, 4);
}

#[test]
fn a_replaced_directory_comes_back_empty() {
    let mut tar = Tar::default();
    tar.file("d/sub/x", b"")
        .file("d/y", b"")
        .symlink("d", "nowhere")
        .dir("d", 0o755)
        .dir("d/sub", 0o755);
    assert_eq!(tree(&mut tar), "/d dir 755 0:0 x3\n/d/sub dir 755 0:0 x2\n");
    assert_eq!(tar.index().inodes().len(), 3);
}

#[test]
fn hard_links_outlive_the_name_they_were_made_of() {
    let mut tar = Tar::default();
    tar.file("dir/first", b"abc")
        .hardlink("second", "dir/first")
        .hardlink("/third", "./dir/../second");
    tar.file("dir", b"").file("second", b"");
    assert_eq!(
        tree(&mut tar),
        "/dir file 644 0:0 x1 0\n/second file 644 0:0 x1 0\n/third file 644 0:0 x1 3\n"
    );
}

#[test]
fn hard_links_bring_their_attributes() {
    let mut tar = Tar::default();
    tar.pax(&[
        ("SCHILY.xattr.security.capability", b"cap"),
        ("SCHILY.xattr.user.a", b"1"),
        ("SCHILY.xattr.user.b", b"2"),
    ]);
    tar.file("a", b"").symlink("l", "a");
    tar.add(
        Head {
            kind: b'1',
            name: b"b",
            link: b"a",
            mode: 0o4755,
            uid: 5,
            mtime: 9,
            ..Head::default()
        },
        b"",
    );
    tar.add(
        Head {
            kind: b'1',
            name: b"m",
            link: b"l",
            mode: 0o600,
            uid: 6,
            ..Head::default()
        },
        b"",
    );
    assert_eq!(
        tree(&mut tar),
        "/a file 4755 5:0 x2 #2 0 @9.000000000 user.a=1 user.b=2
/b file 4755 5:0 x2 #2 0 @9.000000000 user.a=1 user.b=2
/l link 777 6:0 x2 #3 -> a
/m link 777 6:0 x2 #3 -> a
"
    );
}

#[test]
fn hard_links_to_what_is_not_there() {
    for (target, what) in [
        ("missing", "a hard link to \"missing\", which no entry before it made"),
        ("d/missing", "which no entry before it made"),
        ("nodir/f", "which no entry before it made"),
        ("self", "which no entry before it made"),
        ("nodir/../d/./", "a hard link to \"nodir/../d/./\", a directory"),
        (".", "a directory"),
        ("", "a directory"),
    ] {
        let mut tar = Tar::default();
        tar.dir("d", 0o755).file("self", b"").hardlink("self", target);
        let error = tar.error();
        assert!(
            error.contains("entry \"self\"") && error.contains(what),
            "{target}: {error}"
        );
    }
    let mut tar = Tar::default();
    tar.file("x/gone", b"").file("x", b"").hardlink("link", "x/gone");
    let error = tar.error();
    assert!(
        error.contains("entry \"link\": \"x\" on the way to it is not a directory"),
        "{error}"
    );
}

#[test]
fn symlinks_among_parents_are_followed_inside_the_root() {
    let mut tar = Tar::default();
    tar.dir("real/deep", 0o755)
        .symlink("abs", "/real")
        .symlink("real/rel", "deep/../../../real/./deep");
    tar.symlink("chain", "abs/rel").symlink("dangling", "made/here");
    tar.file("abs/a", b"")
        .file("real/rel/b", b"")
        .file("chain/c", b"")
        .file("dangling/d", b"")
        .hardlink("e", "chain/c");
    assert_eq!(
        tree(&mut tar),
        "/abs link 777 0:0 x1 -> /real
/chain link 777 0:0 x1 -> abs/rel
/dangling link 777 0:0 x1 -> made/here
/e file 644 0:0 x2 #10 0
/made dir 755 0:0 x3
/made/here dir 755 0:0 x2
/made/here/d file 644 0:0 x1 0
/real dir 755 0:0 x3
/real/a file 644 0:0 x1 0
/real/deep dir 755 0:0 x2
/real/deep/b file 644 0:0 x1 0
/real/deep/c file 644 0:0 x2 #10 0
/real/rel link 777 0:0 x1 -> deep/../../../real/./deep
"
    );
    let mut tar = Tar::default();
    tar.symlink("a", "b").symlink("b", "a").file("a/x", b"");
    assert!(
        tar.error().contains("entry \"a/x\": more than 255 symlinks"),
        "{}",
        tar.error()
    );
}

#[test]
fn whiteouts_are_devices_and_opaque_marks_are_attributes() {
    let mut tar = Tar::default();
    tar.add(
        Head {
            name: b"d/.wh.gone",
            uid: 3,
            gid: 4,
            mode: 0o644,
            ..Head::default()
        },
        b"",
    );
    tar.file("o/.wh..wh..opq", b"")
        .dir("o", 0o700)
        .file("o/new", b"")
        .file(".wh..wh.plnk", b"")
        .file(".wh.x.wh.y", b"");
    // Already what a whiteout becomes.
    tar.add(
        Head {
            name: b"dev",
            kind: b'3',
            ..Head::default()
        },
        b"",
    );
    assert_eq!(
        tree(&mut tar),
        "/.wh.plnk char 0 0:0 x1 0:0
/d dir 755 0:0 x2
/d/gone char 0 3:4 x1 0:0
/dev char 644 0:0 x1 0:0
/o dir 700 0:0 x2 trusted.overlay.opaque=y
/o/new file 644 0:0 x1 0
/x.wh.y char 0 0:0 x1 0:0
"
    );
    let index = tar.index();
    assert!(
        index
            .inode(index.lookup_path(b"d/gone").unwrap())
            .unwrap()
            .is_whiteout()
    );
}

#[test]
fn of_a_whiteout_and_its_name_the_later_counts() {
    let mut tar = Tar::default();
    tar.file("f", b"gone")
        .file(".wh.f", b"")
        .file("d/x", b"gone")
        .file(".wh.d", b"")
        .file(".wh.w", b"");
    tar.add(
        Head {
            name: b".wh.w",
            uid: 9,
            ..Head::default()
        },
        b"",
    );
    tar.file(".wh.r", b"")
        .file("r", b"replaced")
        .file(".wh.s", b"")
        .dir("s", 0o755);
    assert_eq!(
        tree(&mut tar),
        "/d char 0 0:0 x1 0:0
/f char 0 0:0 x1 0:0
/r file 644 0:0 x1 8
/s dir 755 0:0 x2
/w char 0 9:0 x1 0:0
"
    );
    for name in [".wh.", ".wh..", ".wh..."] {
        let mut tar = Tar::default();
        assert!(tar.file(name, b"").error().contains("a whiteout of no name"), "{name}");
    }
}

#[test]
fn extended_attributes_that_files_take() {
    let all: &[(&str, &[u8])] = &[
        ("SCHILY.xattr.user.a", b"u"),
        ("SCHILY.xattr.security.selinux", b"s"),
        ("SCHILY.xattr.system.posix_acl_access", b"\x02\0\0\0"),
        ("SCHILY.xattr.system.posix_acl_default", b""),
        // A version that no kernel has.
        ("SCHILY.xattr.system.posix_acl_access", b"\x03\0\0\0"),
        ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        ("SCHILY.xattr.com.apple.quarantine", b"q"),
    ];
    let mut tar = Tar::default();
    tar.pax(all)
        .dir("d", 0o755)
        .pax(all)
        .file("f", b"")
        .pax(all)
        .symlink("l", "t");
    tar.pax(all).add(
        Head {
            kind: b'6',
            name: b"p",
            ..Head::default()
        },
        b"",
    );
    assert_eq!(
        tree(&mut tar),
        "/d dir 755 0:0 x2 security.selinux=s user.a=u
/f file 644 0:0 x1 0 security.selinux=s user.a=u
/l link 777 0:0 x1 -> t security.selinux=s
/p fifo 644 0:0 x1 security.selinux=s
"
    );
    let value = vec![1; 65537];
    let long = format!("SCHILY.xattr.user.{}", "n".repeat(251));
    for (key, value, what) in [
        (
            "SCHILY.xattr.user.",
            &b""[..],
            "no extended attribute can be called \"user.\"",
        ),
        (&long, b"", "no extended attribute can be called"),
        (
            "SCHILY.xattr.user.a",
            &value,
            "has 65537 bytes, over the limit of 65536",
        ),
    ] {
        let mut tar = Tar::default();
        let error = tar.pax(&[(key, value)]).file("f", b"").error();
        assert!(error.contains("entry \"f\"") && error.contains(what), "{error}");
    }
    let many: Vec<(String, &[u8])> = (0..1025)
        .map(|i| (format!("SCHILY.xattr.user.{i}"), &b""[..]))
        .collect();
    let many: Vec<(&str, &[u8])> = many.iter().map(|(key, value)| (&key[..], *value)).collect();
    assert!(
        Tar::default()
            .pax(&many)
            .file("f", b"")
            .error()
            .contains("more than 1024 extended attributes")
    );
    let mut tar = Tar::default();
    let index = tar.pax(&many[..1024]).file("f", b"").end().index();
    assert_eq!(index.xattrs(index.inode(2).unwrap()).count(), 1024);
}

#[test]
fn times_out_of_range_become_the_epoch() {
    let mut tar = Tar::default();
    for (name, time) in [
        ("a", "-1"),
        ("b", "-0.5"),
        ("c", "9223372036.5"),
        ("d", "9223372035.999999999"),
        ("e", "0.5"),
    ] {
        tar.pax(&[("mtime", time.as_bytes())]).file(name, b"");
    }
    assert_eq!(
        tree(&mut tar),
        "/a file 644 0:0 x1 0\n/b file 644 0:0 x1 0\n/c file 644 0:0 x1 0\n\
         /d file 644 0:0 x1 0 @9223372035.999999999\n/e file 644 0:0 x1 0 @0.500000000\n"
    );
}

#[test]
fn devices_that_cannot_be() {
    for (major, minor) in [(4096, 0), (0, 1 << 20)] {
        let mut tar = Tar::default();
        tar.add(
            Head {
                kind: b'4',
                major,
                minor,
                ..Head::default()
            },
            b"",
        );
        assert!(tar.error().contains("no device can have the number"), "{}", tar.error());
    }
}

#[test]
fn deep_and_wide_trees() {
    let mut tar = Tar::default();
    let deep = "d/".repeat(1000);
    tar.extended(b'L', format!("{deep}leaf").as_bytes()).file("", b"");
    // A way into greater depth than one name can tell.
    tar.extended(b'K', &deep.as_bytes()[..1999]).add(
        Head {
            kind: b'2',
            name: b"s",
            ..Head::default()
        },
        b"",
    );
    tar.extended(b'L', format!("s/{deep}leaf").as_bytes()).file("", b"");
    for i in 0..5000 {
        tar.file(&format!("wide/{i}"), b"");
    }
    let index = tar.end().index();
    assert_eq!(index.inodes().len(), 1 + 2000 + 2 + 1 + 1 + 5000);
    assert!(index.lookup_path(b"wide/4999").is_some());
    // All of it goes at once.
    let mut tar = Tar(tar.0[..tar.0.len() - 1024].to_vec());
    tar.file("d", b"").file("wide", b"");
    assert_eq!(tree(&mut tar).lines().count(), 3);
}

#[test]
fn global_headers_are_nothing_and_take_its_place() {
    let global = |tar: &mut Tar, name: &[u8], body: &[u8]| {
        let size = body.len() as u64;
        tar.add(
            Head {
                kind: b'g',
                name,
                size,
                ..Head::default()
            },
            body,
        );
    };
    let mut tar = Tar::default();
    tar.file("replaced", b"").file("named", b"").dir("d", 0o700);
    global(&mut tar, b"headers/one", &record("comment", b"x"));
    global(&mut tar, b"replaced", &record("mtime", b"5"));
    global(&mut tar, b"other", &record("path", b"named"));
    for name in [&b"./"[..], b"d/.wh.gone", b"free"] {
        global(&mut tar, name, &[]);
    }
    assert_eq!(
        tree(&mut tar),
        "/d dir 700 0:0 x2
/d/gone char 0 0:0 x1 0:0
/headers dir 755 0:0 x2
"
    );
}

/// `user::rwx user:1001:r-x group::r-x mask::MASK other::OTHER`, as PAX has it, with the owner's permissions.
fn acl(user: u16, mask: u16, other: u16) -> Vec<u8> {
    crate::layer::acl::tests::list(&[
        (1, user, u32::MAX),
        (2, 5, 1001),
        (4, 5, u32::MAX),
        (16, mask, u32::MAX),
        (32, other, u32::MAX),
    ])
}

#[test]
fn a_default_list_is_handed_on_and_fits_the_mode() {
    let mut tar = Tar::default();
    tar.pax(&[("SCHILY.xattr.system.posix_acl_default", &acl(7, 7, 7))])
        .dir("d", 0o755)
        .dir("d/sub", 0o750)
        .file("d/sub/made/f", b"")
        .symlink("d/l", "f");
    let own = crate::layer::acl::tests::list(&[(1, 7, u32::MAX), (4, 5, u32::MAX), (32, 0, u32::MAX)]);
    tar.pax(&[("SCHILY.xattr.system.posix_acl_access", &own)])
        .file("d/own", b"");
    let index = tar.end().index();
    let list = |path: &str, name: &str| {
        let inode = index.inode(index.lookup_path(path.as_bytes()).unwrap()).unwrap();
        index
            .xattr(inode, format!("system.posix_acl_{name}").as_bytes())
            .map(<[u8]>::to_vec)
    };
    assert_eq!(list("d", "access"), None);
    for (path, access) in [
        ("d/sub", acl(7, 5, 0)),
        ("d/sub/made", acl(7, 5, 5)),
        ("d/sub/made/f", acl(6, 4, 4)),
    ] {
        assert_eq!(list(path, "access"), Some(access), "{path}");
        let default = (path != "d/sub/made/f").then(|| acl(7, 7, 7));
        assert_eq!(list(path, "default"), default, "{path}");
    }
    // A symlink has none, and three entries are a mode.
    assert_eq!([list("d/l", "access"), list("d/own", "access")], [None, None]);
    let mut tar = Tar::default();
    tar.pax(&[("SCHILY.xattr.system.posix_acl_access", b"\x02\0\0\0\x01")])
        .file("f", b"");
    assert!(tar.error().contains("is no access control list"), "{}", tar.error());
}

#[test]
fn below_a_whiteout_everything_is_new() {
    let mut tar = Tar::default();
    tar.file(".wh.d", b"").file("d/sub/f", b"").file("gone/.wh.x", b"");
    assert_eq!(
        tree(&mut tar),
        "/d dir 755 0:0 x3 trusted.overlay.opaque=y
/d/sub dir 755 0:0 x2
/d/sub/f file 644 0:0 x1 0
/gone dir 755 0:0 x2
/gone/x char 0 0:0 x1 0:0
"
    );
}

#[test]
fn the_time_of_a_replaced_directory_goes_to_what_has_its_name() {
    let mut tar = Tar::default();
    let timed = |tar: &mut Tar, kind: u8, name: &[u8], link: &[u8], mtime: u64| {
        tar.add(
            Head {
                kind,
                name,
                link,
                mtime,
                ..Head::default()
            },
            b"",
        );
    };
    timed(&mut tar, b'5', b"file", b"", 1);
    timed(&mut tar, b'0', b"file", b"", 2);
    // The directory that the link leads to is described before, or after.
    timed(&mut tar, b'5', b"before", b"", 3);
    for name in [&b"to-before"[..], b"to-after"] {
        timed(&mut tar, b'5', name, b"", 4);
    }
    timed(&mut tar, b'5', b"after", b"", 5);
    timed(&mut tar, b'2', b"to-before", b"before", 6);
    timed(&mut tar, b'2', b"to-after", b"after", 6);
    let times = |tar: &Tar| {
        let index = tar.index();
        ["file", "before", "after", "to-after"]
            .map(|name| index.inode(index.lookup_path(name.as_bytes()).unwrap()).unwrap().mtime)
    };
    tar.end();
    assert_eq!(times(&tar), [1, 4, 5, 6]);
    // In a directory that goes as a whole, by a whiteout too.
    let mut tar = Tar::default();
    timed(&mut tar, b'5', b"d/sub", b"", 1);
    timed(&mut tar, b'0', b".wh.d", b"", 2);
    timed(&mut tar, b'0', b"d/sub", b"", 3);
    let index = tar.end().index();
    assert_eq!(index.inode(index.lookup_path(b"d/sub").unwrap()).unwrap().mtime, 1);
}
