//! Images as odd as containerd itself still unpacks: its overlayfs snapshotter is the reference, and every image here is one that it
//! accepts (`tests/e2e/trees.rs` fails if it does not). What it refuses (old GNU sparse files, unknown type flags, a whiteout beside the entry it
//! deletes, paths over 4095 bytes, negative sizes) belongs to the unit tests of the parsers, not here.
//!
//! Each function makes one image about one subject, so that a failing comparison says what it is about. All directories have
//! entries of their own, except where a missing entry is the subject ([`implied`]).

mod forms;
mod random;
mod stacks;

pub use forms::{archives, gnu_sparse, huge_file, many_entries, sparse};
pub use random::chain;
pub use stacks::{base_whiteouts, devices, implied, taken_over, whiteouts};

use super::image::{Compression, Flavour, Image, Layer};
use super::tar::{Dialect, Entry, noise};

/// An image, and what its comparison has to know.
pub struct Case {
    /// What it is about.
    pub name: &'static str,
    /// The image.
    pub image: Image,
    /// Directories that no entry describes, whose time of change is that of unpacking.
    pub implied_dirs: Vec<String>,
}

fn case(name: &'static str, layers: Vec<Layer>) -> Case {
    Case {
        name,
        image: Image::new(Flavour::Oci, layers),
        implied_dirs: Vec::new(),
    }
}

/// Long names in every dialect, names that are not UTF-8, names that need cleaning.
pub fn names() -> Case {
    let mut entries = vec![
        Entry::dir("n"),
        Entry::dir("n/deep"),
        Entry::dir("n/long"),
        Entry::dir("n/odd"),
    ];
    let longest = |letter: &str| letter.repeat(255);
    entries.push(Entry::file(
        format!("n/long/{}", longest("p")),
        "a name of 255 bytes, in PAX",
    ));
    entries.push(Entry::file(format!("n/long/{}", longest("g")), "a name of 255 bytes, in GNU").dialect(Dialect::Gnu));
    entries.push(
        Entry::file(format!("n/long/{}", "h".repeat(100 - 7)), "a path of exactly 100 bytes").dialect(Dialect::V7),
    );
    entries.push(Entry::file(format!("n/long/{}", "u".repeat(99)), "prefix and name").dialect(Dialect::Ustar));
    entries.push(Entry::symlink(
        format!("n/long/{}", longest("s")),
        format!("{}/{}", longest("t"), longest("t")),
    ));
    entries.push(Entry::symlink("n/long/gnu-link", longest("k")).dialect(Dialect::Gnu));
    entries.push(Entry::symlink("n/long/longest-target", "x/".repeat(2047)));
    // 14 directories of 250 bytes: 3500 bytes of path, below the 4095 that a path may have when the snapshot's own comes before.
    let mut path = "n/deep".to_owned();
    for depth in 0..14_u8 {
        path = format!("{path}/{}", char::from(b'a' + depth).to_string().repeat(249));
        let dialect = if depth % 2 == 0 { Dialect::Pax } else { Dialect::Gnu };
        entries.push(Entry::dir(&path).dialect(dialect));
    }
    entries.push(Entry::file(format!("{path}/end"), "deep"));
    for (name, dialect) in [
        (&b"n/odd/latin1-\xe4\xf6\xfc"[..], Dialect::Ustar),
        (b"n/odd/pax-\xff\xfe", Dialect::Pax),
        (b"n/odd/gnu-\x80\x81", Dialect::Gnu),
        (b"n/odd/control-\x01\x7f\x1b[31m", Dialect::Pax),
        (b"n/odd/line\nend", Dialect::Pax),
        (b"n/odd/tab\tand space ", Dialect::Ustar),
        (b"n/odd/back\\slash\"quote'comma,colon:percent%", Dialect::Ustar),
        (b"n/odd/-rf", Dialect::Ustar),
        (b"n/odd/...", Dialect::Ustar),
        (b"n/odd/.wh", Dialect::Ustar),
        (b"n/odd/.whout", Dialect::Ustar),
        ("n/odd/日本語-🦀-e\u{301}".as_bytes(), Dialect::Pax),
    ] {
        entries.push(Entry::file(name, name).dialect(dialect));
    }
    let mut long_bytes = b"n/odd/".to_vec();
    long_bytes.extend([0xe9; 200]);
    entries.push(Entry::file(&long_bytes, "200 bytes of Latin-1, in GNU").dialect(Dialect::Gnu));
    entries.push(Entry::symlink("n/odd/to-bytes", b"latin1-\xe4\xf6\xfc"));
    let clean = [
        Entry::dir("./"),
        Entry::dir("./dot"),
        Entry::file("./dot/file", "dot"),
        Entry::dir("/absolute"),
        Entry::file("/absolute/file", "absolute"),
        Entry::file("//absolute//double", "double"),
        Entry::dir("absolute/./sub/"),
        Entry::file("absolute/./sub/./file", "dots"),
        Entry::file("absolute/sub/../up", "up"),
        Entry::hard_link("./dot/hard", "./dot/file"),
        Entry::hard_link("/absolute/hard", "/absolute/file"),
        Entry::hard_link("absolute/hard2", "./absolute/sub/../file"),
        Entry::file("../outside", "stays inside"),
    ];
    case(
        "names",
        vec![
            Layer::of(Compression::Gzip, entries),
            Layer::of(Compression::Zstd, clean),
        ],
    )
}

/// Symbolic and hard links: dangling, looping, through links, to files that are replaced or deleted later.
pub fn links() -> Case {
    let below = [
        Entry::dir("l"),
        Entry::dir("l/real"),
        Entry::file("l/real/a", "first"),
        Entry::hard_link("l/real/b", "l/real/a"),
        Entry::hard_link("l/c", "l/real/b"),
        // The entry of a hard link carries attributes of its own: they are set on the one file.
        Entry::hard_link("l/d", "l/real/a")
            .mode(0o4750)
            .owner(12, 34)
            .mtime(1_234_567),
        // POSIX lets a link's header repeat the size of the file; no data follow.
        {
            let mut entry = Entry::hard_link("l/e", "l/real/a").mode(0o640);
            entry.header.mtime = 7;
            entry
        },
        // A link to a name whose file is then replaced: the link keeps the first file.
        Entry::file("l/replaced", "old"),
        Entry::hard_link("l/keeps-old", "l/replaced"),
        Entry::file("l/replaced", "new, and longer"),
        // A link to a symbolic link is a second name of that, not of its target.
        Entry::symlink("l/soft", "real/a"),
        Entry::hard_link("l/soft-too", "l/soft"),
        Entry::symlink("l/dangling", "nowhere/at/all"),
        Entry::symlink("l/absolute", "/l/real/a"),
        Entry::symlink("l/self", "self"),
        Entry::symlink("l/ping", "pong"),
        Entry::symlink("l/pong", "ping"),
        // Parents are followed through symbolic links, inside the layer.
        Entry::symlink("l/dir-link", "real"),
        Entry::file("l/dir-link/through", "through a link"),
        Entry::symlink("l/root-link", "/../../l/real"),
        Entry::file("l/root-link/through-root", "through an absolute link"),
        Entry::hard_link("l/hard-through", "l/dir-link/through"),
        Entry::fifo("l/fifo"),
        Entry::hard_link("l/fifo-too", "l/fifo"),
        Entry::char_device("l/null", 1, 3),
        Entry::hard_link("l/null-too", "l/null"),
        Entry::file("l/empty", ""),
        Entry::hard_link("l/empty-too", "l/empty"),
    ];
    let middle = [
        Entry::dir("l"),
        Entry::dir("l/real"),
        // One name goes; the file stays under the other, and still counts both.
        Entry::whiteout("l/real/a"),
        Entry::whiteout("l/soft"),
        Entry::file("m-original", "of the middle layer"),
        Entry::hard_link("m-link", "m-original"),
        Entry::hard_link("m-link2", "m-link"),
    ];
    let above = [
        Entry::whiteout("m-original"),
        Entry::dir("l"),
        Entry::whiteout("l/fifo"),
    ];
    case(
        "links",
        vec![
            Layer::of(Compression::Gzip, below),
            Layer::of(Compression::None, middle),
            Layer::of(Compression::Gzip, above),
        ],
    )
}

/// Names that occur more than once in one layer, with every change of type.
pub fn duplicates() -> Case {
    let entries = [
        Entry::dir("d"),
        Entry::file("d/file", noise(1, 5000)),
        Entry::file("d/file", "the last one counts").mode(0o600),
        Entry::file("./d/file2", "a"),
        Entry::file("d/file2", "ab").owner(5, 5),
        Entry::file("/d/./file2", "abc"),
        // A directory that comes twice keeps its children and gets the last attributes.
        Entry::dir("d/dir").mode(0o700),
        Entry::file("d/dir/kept", "kept"),
        Entry::file("d/to-dir", "a file first"),
        Entry::dir("d/to-dir"),
        Entry::file("d/to-dir/child", "child"),
        // A directory that becomes a file loses its children. (containerd fails if a directory is among them: it sets the times of
        // all directories at the end, those that are gone included.)
        Entry::dir("d/to-file").mtime(4711),
        Entry::file("d/to-file/lost", "lost"),
        Entry::file("d/to-file", "now a file"),
        Entry::dir("d/to-link"),
        Entry::file("d/to-link/lost", "lost"),
        Entry::symlink("d/to-link", "dir"),
        // Goes through the link that the directory has become.
        Entry::file("d/to-link/through", "in d/dir"),
        Entry::symlink("d/from-link", "file"),
        Entry::file("d/from-link", "no link any more"),
        Entry::file("d/to-fifo", "x"),
        Entry::fifo("d/to-fifo"),
        Entry::file("d/one", "one"),
        Entry::hard_link("d/two", "d/one"),
        Entry::hard_link("d/two", "d/file"),
        Entry::file("d/gone-and-back", "first"),
        Entry::dir("d/gone-and-back"),
        Entry::file("d/gone-and-back/x", "x"),
        Entry::file("d/gone-and-back", "a file again"),
        // Last, because containerd sets the times of directories at the end, in the order of the entries, and through links.
        Entry::dir("d/dir").mode(0o751).owner(1, 2).mtime(99),
        Entry::dir("d").mode(0o711).mtime(4242),
    ];
    case("duplicates", vec![Layer::of(Compression::Gzip, entries)])
}

/// Modes, owners and times.
pub fn metadata() -> Case {
    let mut entries = vec![Entry::dir("m").mode(0o1777), Entry::dir("m/t"), Entry::dir("m/o")];
    for mode in [
        0, 0o1, 0o400, 0o644, 0o777, 0o1644, 0o2755, 0o4755, 0o6755, 0o7777, 0o4000,
    ] {
        entries.push(Entry::file(format!("m/file-{mode:04o}"), format!("{mode}")).mode(mode));
        entries.push(Entry::dir(format!("m/dir-{mode:04o}")).mode(mode));
        entries.push(Entry::fifo(format!("m/fifo-{mode:04o}")).mode(mode));
    }
    // Bits of the file type in the mode, as old archivers wrote them.
    entries.push(Entry::file("m/typed", "x").mode(0o100_755));
    for (index, id) in [0, 1, 65_534, 2_097_151, 2_097_152, 4_294_967_294_u64]
        .into_iter()
        .enumerate()
    {
        entries.push(Entry::file(format!("m/o/pax{index}"), "x").owner(id, id / 2));
        entries.push(
            Entry::file(format!("m/o/gnu{index}"), "x")
                .owner(id, id / 2)
                .dialect(Dialect::Gnu),
        );
        entries.push(Entry::symlink(format!("m/o/link{index}"), "x").owner(id / 3, id));
        entries.push(Entry::dir(format!("m/o/dir{index}")).owner(id / 3, id).mode(0o2755));
    }
    for (index, (seconds, nanoseconds)) in [
        (0, 0),
        (0, 1),
        (1, 999_999_999),
        (1_700_000_000, 123_456_789),
        (1_700_000_000, 100_000_000),
        // Beyond 2038, 2106, and what 34 bits of ext4 still hold.
        (2_147_483_648, 5),
        (4_294_967_296, 6),
        (9_000_000_000, 7),
        // Before 1970: containerd shows them as 1970.
        (-1, 250_000_000),
        (-1_000_000_000, 0),
        (-2_147_483_648, 0),
    ]
    .into_iter()
    .enumerate()
    {
        entries.push(Entry::file(format!("m/t/file{index}"), "x").mtime_ns(seconds, nanoseconds));
        entries.push(Entry::symlink(format!("m/t/link{index}"), "x").mtime_ns(seconds, nanoseconds));
        entries.push(Entry::dir(format!("m/t/dir{index}")).mtime_ns(seconds, nanoseconds));
        entries.push(Entry::fifo(format!("m/t/fifo{index}")).mtime_ns(seconds, nanoseconds));
        entries.push(
            Entry::file(format!("m/t/gnu{index}"), "x")
                .mtime(seconds)
                .dialect(Dialect::Gnu),
        );
    }
    entries.push(Entry::file("m/t/digits3", "x").record("mtime", "1600000000.125"));
    entries.push(Entry::file("m/t/digits12", "x").record("mtime", "1600000000.123456789999"));
    entries.push(Entry::file("m/t/point", "x").record("mtime", "1600000000."));
    entries.push(
        Entry::file("m/t/atime", "x")
            .record("atime", "1700000000.5")
            .record("ctime", "1700000001.5"),
    );
    // A PAX record wins over the header, and the last of two records over the first.
    entries.push(Entry::file("m/header-name", "x").record("path", "m/pax-name"));
    entries.push(
        Entry::file("m/two-records", "x")
            .record("uid", "1")
            .record("uid", "2")
            .record("gid", "77"),
    );
    entries.push(
        Entry::file("m/names", "x")
            .record("uname", "nobody")
            .record("gname", "games"),
    );
    entries.push(
        Entry::file("m/unknown-record", "x")
            .record("VENDOR.key", "value")
            .record("comment", "nothing"),
    );
    entries.push(Entry::file("m/size-record", "x").record("size", "1"));
    case("metadata", vec![Layer::of(Compression::Gzip, entries)])
}

/// A `struct posix_acl_xattr` of these tags, permissions and numbers.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// Extended attributes: of users, file capabilities, access control lists; on every type that can have them.
pub fn xattrs() -> Case {
    // struct vfs_cap_data, revision 2, effective: CAP_NET_RAW and CAP_NET_BIND_SERVICE permitted.
    let capability: Vec<u8> = [0x0200_0001_u32, (1 << 13) | (1 << 10), 0, 0, 0]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    // user::rw-, user:1000:rwx, group::r--, mask::rwx, other::---
    let access = acl(&[
        (0x01, 6, !0),
        (0x02, 7, 1000),
        (0x04, 4, !0),
        (0x10, 7, !0),
        (0x20, 0, !0),
    ]);
    let default = acl(&[
        (0x01, 7, !0),
        (0x02, 5, 1001),
        (0x04, 5, !0),
        (0x10, 5, !0),
        (0x20, 5, !0),
    ]);
    let entries = [
        Entry::dir("x").xattr("user.on.dir", "dir"),
        Entry::file("x/user", "x")
            .xattr("user.one", "1")
            .xattr("user.two", [0, 255, b'\n', b'=']),
        Entry::file("x/empty-value", "x").xattr("user.empty", ""),
        Entry::file("x/big-value", "x").xattr("user.big", noise(3, 3000)),
        Entry::file("x/many", "x"),
        Entry::file("x/capability", "x")
            .mode(0o755)
            .xattr("security.capability", &capability),
        Entry::hard_link("x/capability-too", "x/capability")
            .mode(0o755)
            .xattr("security.capability", &capability),
        Entry::file("x/acl", "x")
            .mode(0o670)
            .xattr("system.posix_acl_access", &access),
        Entry::dir("x/acl-dir")
            .mode(0o755)
            .xattr("system.posix_acl_default", &default),
        // What is made in it gets its list, which the mode then changes; what has a list of its own keeps that.
        Entry::file("x/acl-dir/file", "x").mode(0o640),
        Entry::file("x/acl-dir/own", "x")
            .mode(0o604)
            .xattr("system.posix_acl_access", &access),
        Entry::dir("x/acl-dir/dir").mode(0o2770),
        Entry::fifo("x/acl-dir/dir/fifo").mode(0o600),
        Entry::symlink("x/acl-dir/link", "file"),
        Entry::hard_link("x/acl-dir/hard", "x/user").mode(0o644),
        Entry::file("x/acl-dir/implied/file", "x"),
        // No more than a mode says, and nothing.
        Entry::file("x/minimal", "x").xattr(
            "system.posix_acl_access",
            acl(&[(0x01, 7, !0), (0x04, 7, !0), (0x20, 7, !0)]),
        ),
        Entry::file("x/acl-dir/none", "x").xattr("system.posix_acl_access", acl(&[])),
        Entry::file("x/trusted", "x").xattr("trusted.lazuli", "root only"),
        Entry::fifo("x/fifo").xattr("trusted.fifo", "1"),
        Entry::symlink("x/link", "user").xattr("trusted.link", "1"),
        // Not allowed on a link, and skipped by containerd with a warning.
        Entry::symlink("x/link-user", "user").xattr("user.link", "1"),
        // libarchive's own form is not read by containerd.
        Entry::file("x/libarchive", "x").record("LIBARCHIVE.xattr.user.k", "dg=="),
        Entry::char_device("x/device", 1, 5).xattr("trusted.device", "1"),
    ];
    let mut many = Entry::file("x/many", "x");
    for index in 0..40 {
        many = many.xattr(&format!("user.number-{index}"), format!("{index}"));
    }
    let above = [
        Entry::dir("x").xattr("user.on.dir", "changed"),
        many,
        Entry::file("x/user", "without"),
        Entry::file("x/capability", "loses it").mode(0o755),
    ];
    Case {
        implied_dirs: vec!["x/acl-dir/implied".to_owned()],
        ..case(
            "xattrs",
            vec![
                Layer::of(Compression::Gzip, entries),
                Layer::of(Compression::Gzip, above),
            ],
        )
    }
}

/// Files around every border: blocks, pages, read sizes, chunks.
pub fn sizes() -> Case {
    let mut entries = vec![Entry::dir("s")];
    for border in [512, 4096, 128 << 10, 1 << 20, 4 << 20] {
        for length in [border - 1, border, border + 1] {
            entries.push(Entry::file(format!("s/{length}"), noise(length as u64, length)));
        }
    }
    for length in [0, 1, 2, 511] {
        entries.push(Entry::file(format!("s/{length}"), noise(length as u64, length)));
    }
    for index in 0..300 {
        entries.push(Entry::file(format!("s/empty{index}"), ""));
    }
    entries.push(Entry::file("s/zeros", vec![0; 3 << 20]));
    case("sizes", vec![Layer::of(Compression::Gzip, entries)])
}
