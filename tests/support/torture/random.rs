//! Small chains of layers made by chance from a seed: entries over each other in any order, of every type, with odd modes, owners, names and
//! ways to write them, whiteouts and opaque marks, links of both kinds, access control lists and other attributes.
//!
//! Many are such that containerd gives up, which is no failure: it has then nothing to compare with. What overlayfs or containerd
//! do to a chain that is not asked of Lazuli is not made: see [`Chain::layer`].

use super::super::image::{Compression, Flavour, Image, Layer};
use super::super::tar::{Dialect, Entry, noise};

/// Most layers of a chain, and entries of a layer.
const LAYERS: u64 = 4;
const ENTRIES: u64 = 14;
/// Names of directories, of files, and of links; what is one in a layer mostly is so in the others.
const DIRS: [&str; 4] = ["a", "b", "c", "Z \u{e9}"];
const FILES: [&str; 4] = ["f", "g", "h", "-x"];
const LINKS: [&str; 2] = ["l", "m"];
const MODES: [u32; 9] = [0, 0o644, 0o755, 0o700, 0o1777, 0o2755, 0o4711, 0o7777, 0o100_640];
const OWNERS: [u64; 6] = [0, 0, 1, 1000, 65_535, 4_294_967_294];
const TARGETS: [&str; 9] = [
    "a",
    "b/c",
    "../b",
    "/a/b",
    "gone/../a",
    "./f",
    "/../c",
    "gone",
    "a/../../c",
];
/// Numbers of tags in access control lists, in the order in which they come in [`acl`].
const NOBODY: u32 = u32::MAX;

/// Numbers that are always the same for a seed (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }

    fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    fn of<T: Copy>(&mut self, choice: &[T]) -> T {
        choice[self.below(choice.len() as u64) as usize]
    }
}

/// The chain of a seed.
pub fn chain(seed: u64) -> Image {
    let mut chain = Chain {
        random: Random(seed.wrapping_mul(0x2545_f491_4f6c_dd1d)),
        files: Vec::new(),
    };
    let count = 1 + chain.random.below(LAYERS);
    Image::new(Flavour::Oci, (0..count).map(|number| chain.layer(number)).collect())
}

struct Chain {
    random: Random,
    /// Paths of files of the layer at hand, for hard links.
    files: Vec<String>,
}

impl Chain {
    /// Not made is an opaque mark in a lowest layer over what is there already: containerd removes of that what has no entry.
    fn layer(&mut self, number: u64) -> Layer {
        self.files.clear();
        let mut entries = Vec::new();
        for _ in 0..2 + self.random.below(ENTRIES - 1) {
            self.entry(number, &mut entries);
        }
        Layer::of(
            self.random
                .of(&[Compression::Gzip, Compression::None, Compression::Zstd]),
            entries,
        )
    }

    fn path(&mut self, last: &[&str]) -> String {
        let mut parts = Vec::new();
        for _ in 0..self.random.below(4) {
            parts.push(match self.random.one_in(8) {
                true => self.random.of(&LINKS),
                false => self.random.of(&DIRS),
            });
        }
        parts.push(self.random.of(last));
        parts.join("/")
    }

    fn entry(&mut self, number: u64, entries: &mut Vec<Entry>) {
        let odd_type = self.random.one_in(12);
        let of = |names: &'static [&'static str]| if odd_type { &["a", "f", "l"] } else { names };
        let kind = self.random.below(20);
        let path = match kind {
            0..6 => self.path(of(&FILES)),
            6..12 => self.path(of(&DIRS)),
            12..14 => self.path(of(&LINKS)),
            14 => self.path(&["hard"]),
            15 => self.path(&["fifo", "device"]),
            _ => match self.random.one_in(2) {
                true => self.path(&FILES),
                false => self.path(&DIRS),
            },
        };
        let written = self.written(&path);
        let entry = match kind {
            0..6 => {
                self.files.push(path.clone());
                let length = self.random.below(3000) as usize;
                Entry::file(&written, noise(self.random.below(1 << 40), length))
            }
            6..12 => Entry::dir(&written),
            12..14 => {
                let target = self.random.of(&TARGETS);
                entries.push(Entry::symlink(&written, target).mtime(self.mtime()));
                return;
            }
            14 => {
                let Some(target) = (!self.files.is_empty()).then(|| {
                    let at = self.random.below(self.files.len() as u64) as usize;
                    self.files[at].clone()
                }) else {
                    return;
                };
                let entry = Entry::hard_link(&written, &target).mtime(self.mtime());
                entries.push(entry.mode(self.random.of(&MODES)));
                return;
            }
            15 if self.random.one_in(2) => Entry::fifo(&written),
            15 => Entry::char_device(&written, self.random.below(3) as u32, self.random.below(3) as u32),
            16..19 => {
                entries.push(Entry::whiteout(&path).mtime(self.mtime()));
                // Deleted and made anew.
                if self.random.one_in(3) {
                    let below = format!("{path}/{}", self.random.of(&FILES));
                    entries.push(Entry::file(&below, below.as_bytes()).mtime(self.mtime()));
                }
                return;
            }
            _ => {
                if number > 0 {
                    entries.push(Entry::opaque(&path));
                }
                return;
            }
        };
        let (mode, uid, gid) = (self.random.of(&MODES), self.random.of(&OWNERS), self.random.of(&OWNERS));
        let entry = entry.mode(mode).owner(uid, gid).mtime(self.mtime());
        let entry = self.attributes(entry, kind);
        entries.push(entry);
    }

    /// A time of change, long past.
    fn mtime(&mut self) -> i64 {
        1_000_000 + self.random.below(1_000_000) as i64
    }

    /// One of the ways to write a path.
    fn written(&mut self, path: &str) -> String {
        match self.random.below(12) {
            0 => format!("./{path}"),
            1 => format!("/{path}"),
            2 => format!("../../{path}"),
            3 => path.replace('/', "//"),
            4 => path.replace('/', "/./"),
            5 => format!("gone/../{path}"),
            _ => path.to_owned(),
        }
    }

    fn attributes(&mut self, mut entry: Entry, kind: u64) -> Entry {
        if self.random.one_in(6) && kind < 12 {
            entry = entry.xattr(
                self.random.of(&["user.one", "user.two"]),
                self.random.of(&["1", "", "two"]),
            );
        }
        if self.random.one_in(8) {
            entry = entry.xattr("trusted.not", "1");
        }
        if self.random.one_in(8) {
            let list = self.acl();
            entry = entry.xattr("system.posix_acl_access", list);
        }
        if (6..12).contains(&kind) && self.random.one_in(4) {
            let list = self.acl();
            entry = entry.xattr("system.posix_acl_default", list);
        }
        match self.random.one_in(10) && kind < 6 {
            true => entry.dialect(Dialect::Pax).record("comment", "x"),
            false => entry,
        }
    }

    /// An access control list: of three entries, which a mode says as well, of five, or of none.
    fn acl(&mut self) -> Vec<u8> {
        let mut bits = || self.random.below(8) as u16;
        let (user, group, other, named, mask) = (bits(), bits(), bits(), bits(), bits());
        let entries = match self.random.below(5) {
            0 => vec![],
            1 => vec![(1, user, NOBODY), (4, group, NOBODY), (0x20, other, NOBODY)],
            _ => vec![
                (1, user, NOBODY),
                (2, named, 1001),
                (4, group, NOBODY),
                (8, named, 7),
                (0x10, mask, NOBODY),
                (0x20, other, NOBODY),
            ],
        };
        super::acl(&entries)
    }
}
