//! Layers that change what is below them: whiteouts, opaque directories, devices, directories without entries.

use super::super::image::{Compression, Layer};
use super::super::tar::{Dialect, Entry};
use super::{Case, case};

/// Devices and fifos.
pub fn devices() -> Case {
    let entries = [
        Entry::dir("dv"),
        Entry::char_device("dv/null", 1, 3).mode(0o666),
        Entry::char_device("dv/high", 511, 1_048_575),
        Entry::block_device("dv/sda", 8, 0).owner(0, 6),
        Entry::block_device("dv/high", 259, 70_000).mode(0o4660),
        Entry::char_device("dv/gnu", 300, 300).dialect(Dialect::Gnu),
        Entry::fifo("dv/fifo").owner(100, 101),
        Entry::char_device("dv/deleted", 1, 7),
        Entry::file("dv/deleted-by-device", "x"),
    ];
    let above = [
        Entry::dir("dv"),
        Entry::whiteout("dv/deleted"),
        // A device 0:0 is overlayfs' whiteout, whoever makes it.
        Entry::char_device("dv/deleted-by-device", 0, 0),
        Entry::block_device("dv/zero", 0, 0),
        Entry::char_device("dv/fifo", 5, 1),
    ];
    case(
        "devices",
        vec![
            Layer::of(Compression::Gzip, entries),
            Layer::of(Compression::Gzip, above),
        ],
    )
}

/// Whiteouts, opaque directories, and changes of type over four layers.
pub fn whiteouts() -> Case {
    let mut below = vec![Entry::dir("w")];
    for dir in [
        "gone",
        "opaque",
        "opaque-late",
        "back",
        "merge",
        "twice",
        "to-file",
        "to-link",
        "deep",
        "deep/a",
        "deep/a/b",
    ] {
        below.push(Entry::dir(format!("w/{dir}")));
        for name in ["one", "two", "three"] {
            below.push(Entry::file(
                format!("w/{dir}/{name}"),
                format!("{dir}/{name} of the lowest layer"),
            ));
        }
    }
    below.extend([
        Entry::file("w/file", "file"),
        Entry::symlink("w/link", "file"),
        Entry::file("w/file-to-dir", "x"),
        Entry::symlink("w/link-to-dir", "merge"),
        Entry::file("w/replaced", "lowest"),
        Entry::file(
            format!("w/{}", "y".repeat(251)),
            "the longest name that a whiteout can delete",
        ),
    ]);
    let second = vec![
        Entry::dir("w"),
        Entry::whiteout("w/gone"),
        Entry::whiteout("w/file"),
        Entry::whiteout("w/link"),
        Entry::whiteout("w/never-was"),
        Entry::whiteout(&format!("w/{}", "y".repeat(251))),
        // Opaque, said before and after the new contents.
        Entry::dir("w/opaque").mode(0o700),
        Entry::opaque("w/opaque"),
        Entry::file("w/opaque/two", "second"),
        Entry::dir("w/opaque-late"),
        Entry::file("w/opaque-late/four", "second"),
        Entry::opaque("w/opaque-late"),
        Entry::whiteout("w/back"),
        Entry::dir("w/merge").mode(0o711),
        Entry::whiteout("w/merge/one"),
        Entry::file("w/merge/four", "second"),
        Entry::dir("w/twice"),
        Entry::whiteout("w/twice/one"),
        Entry::file("w/to-file", "was a directory"),
        Entry::symlink("w/to-link", "merge"),
        Entry::dir("w/file-to-dir"),
        Entry::file("w/file-to-dir/child", "x"),
        Entry::dir("w/link-to-dir"),
        Entry::file("w/link-to-dir/own", "not in merge"),
        // Deleted and made again in one layer: the whiteout comes first.
        Entry::whiteout("w/replaced"),
        Entry::file("w/replaced", "second"),
        Entry::dir("w/deep"),
        Entry::dir("w/deep/a"),
        Entry::opaque("w/deep/a"),
    ];
    let third = vec![
        Entry::dir("w"),
        // Whiteouts of what is whited out already, and things that come back.
        Entry::whiteout("w/gone"),
        Entry::dir("w/back"),
        Entry::file("w/back/new", "third"),
        Entry::file("w/file", "back again"),
        Entry::dir("w/opaque").mode(0o755),
        Entry::whiteout("w/opaque/two"),
        Entry::file("w/opaque/five", "third"),
        Entry::dir("w/twice"),
        Entry::opaque("w/twice"),
        // (A whiteout inside an opaque directory would show a name in listings that cannot be opened: overlayfs does that.)
        Entry::file("w/merge-sibling", "x"),
        Entry::dir("w/to-file"),
        Entry::file("w/to-file/again", "a directory again"),
        Entry::dir("w/deep"),
        Entry::dir("w/deep/a"),
        Entry::dir("w/deep/a/b"),
        Entry::file("w/deep/a/b/new", "third"),
        // A whiteout of a name that begins like a whiteout: aufs left such names in old images.
        Entry::whiteout("w/.wh.aufs"),
    ];
    let fourth = vec![
        Entry::dir("w").mtime(777),
        Entry::dir("w/gone"),
        Entry::file("w/gone/new", "fourth"),
        Entry::whiteout("w/file"),
        Entry::dir("w/merge").mode(0o2755).owner(3, 4).mtime(12_345),
        Entry::dir("w/opaque"),
        Entry::opaque("w/opaque"),
        Entry::dir("w/new-opaque"),
        Entry::opaque("w/new-opaque"),
        Entry::file("w/new-opaque/x", "nothing to hide"),
    ];
    case(
        "whiteouts",
        vec![
            Layer::of(Compression::Gzip, below),
            Layer::of(Compression::Zstd, second),
            Layer::of(Compression::None, third),
            Layer::of(Compression::Gzip, fourth),
        ],
    )
}

/// Whiteouts in a layer that has nothing below: they delete what the same layer had before, and leave nothing themselves.
pub fn base_whiteouts() -> Case {
    let entries = [
        Entry::dir("b"),
        Entry::file("b/kept", "x"),
        Entry::file("b/deleted", "x"),
        Entry::whiteout("b/deleted"),
        Entry::whiteout("b/never-was"),
        Entry::dir("b/opaque"),
        Entry::file("b/opaque/before", "stays: it is of this layer"),
        Entry::opaque("b/opaque"),
        Entry::file("b/opaque/after", "x"),
        Entry::file("b/hard", "x"),
        Entry::hard_link("b/other-name", "b/hard"),
        Entry::whiteout("b/hard"),
        Entry::fifo("b/fifo"),
        Entry::whiteout("b/fifo"),
        // The directory's time is set at the end, whatever was done in it.
        Entry::dir("b").mtime(1_000_000),
    ];
    case("base_whiteouts", vec![Layer::of(Compression::Gzip, entries)])
}

/// What a layer takes over from those below it in other ways than by having no entry: a directory described after its children keeps
/// attributes from below, default access control lists are handed on, links in lower layers lead through names that are not there.
pub fn taken_over() -> Case {
    let default = super::acl(&[
        (0x01, 7, !0),
        (0x02, 5, 1001),
        (0x04, 5, !0),
        (0x10, 7, !0),
        (0x20, 1, !0),
    ]);
    let below = [
        // In a lowest layer what is below a whiteout is made anew.
        Entry::file("deleted", "x"),
        Entry::whiteout("deleted"),
        Entry::file("deleted/again", "x"),
        Entry::dir("t").mode(0o711),
        Entry::dir("t/real").mode(0o1777).owner(3, 4),
        Entry::symlink("t/link", "gone/../real"),
        Entry::symlink("t/absolute", "/gone/../t/./real"),
        Entry::dir("t/late")
            .xattr("user.kept", "below")
            .xattr("user.both", "below"),
        Entry::dir("t/acl")
            .mode(0o750)
            .xattr("user.kept", "below")
            .xattr("system.posix_acl_default", &default),
        Entry::dir("t/acl-late")
            .xattr("system.posix_acl_default", &default)
            .xattr("system.posix_acl_access", &default),
    ];
    let above = [
        Entry::file("t/link/in-link", "x"),
        Entry::file("t/absolute/in-absolute", "x"),
        Entry::file("t/late/child", "x"),
        Entry::dir("t/late")
            .mode(0o2700)
            .owner(5, 6)
            .xattr("user.both", "above"),
        Entry::file("t/acl/file", "x").mode(0o4640),
        Entry::dir("t/acl/dir").mode(0o700),
        Entry::file("t/acl/dir/file", "x").mode(0o606),
        Entry::file("t/acl/implied/file", "x"),
        Entry::symlink("t/acl/link", "file"),
        Entry::char_device("t/acl/device", 1, 3).mode(0o620),
        Entry::file("t/acl-late/file", "x"),
        Entry::dir("t/acl-late").mode(0o705),
    ];
    // Once more on top of that.
    let top = [
        Entry::file("t/acl/implied/deeper/file", "x"),
        Entry::file("t/late/child-too", "x"),
        Entry::dir("t/late").mode(0o755),
    ];
    Case {
        implied_dirs: [
            "deleted",
            "t",
            "t/real",
            "t/link",
            "t/absolute",
            "t/acl",
            "t/acl/implied",
            "t/acl/implied/deeper",
        ]
        .map(str::to_owned)
        .into(),
        ..case(
            "taken_over",
            vec![
                Layer::of(Compression::Gzip, below),
                Layer::of(Compression::Zstd, above),
                Layer::of(Compression::None, top),
            ],
        )
    }
}

/// Directories that a layer uses without an entry for them: they look as in the layer below, or else like 0755 root.
pub fn implied() -> Case {
    let below = [
        Entry::dir("i"),
        Entry::dir("i/secret")
            .mode(0o700)
            .owner(7, 8)
            .mtime(500)
            .xattr("user.mark", "below"),
        Entry::dir("i/secret/inner").mode(0o1770).owner(9, 9),
        Entry::file("i/secret/inner/old", "old"),
        Entry::file("nowhere/described/file", "x"),
    ];
    let above = [
        Entry::file("i/secret/inner/new", "new"),
        Entry::file("i/secret/fresh/dir/file", "x"),
        Entry::whiteout("i/secret/inner/old"),
    ];
    Case {
        implied_dirs: [
            "nowhere",
            "nowhere/described",
            "i",
            "i/secret",
            "i/secret/inner",
            "i/secret/fresh",
            "i/secret/fresh/dir",
        ]
        .map(str::to_owned)
        .into(),
        ..case(
            "implied",
            vec![Layer::of(Compression::Gzip, below), Layer::of(Compression::Gzip, above)],
        )
    }
}
