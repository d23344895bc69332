//! A tar writer with every header field under control, because the torture layers need archives that no library writes.
//!
//! [`Entry`] is the comfortable face: a path, a kind, attributes, and a [`Dialect`] that decides how what does not fit into the
//! 512-byte header is written (PAX records or GNU's `L`/`K` entries and base-256 numbers). [`Header`] is the raw one.
//!
//! Header layout (offset, length): name 0 100, mode 100 8, uid 108 8, gid 116 8, size 124 12, mtime 136 12, checksum 148 8,
//! typeflag 156 1, linkname 157 100, magic 257 6, version 263 2, uname 265 32, gname 297 32, devmajor 329 8, devminor 337 8,
//! prefix 345 155.

use std::io::{self, Write};

/// Bytes of a header, and the unit that data is padded to.
pub const BLOCK: usize = 512;
/// Largest number of an 12-byte octal field (size, mtime): 8 GiB less one.
const OCTAL_12: u64 = 0o777_7777_7777;
/// Largest number of an 8-byte octal field (uid, gid, device numbers).
const OCTAL_8: u64 = 0o777_7777;

/// A header's magic and version: which of the three families of tar it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Magic {
    /// `ustar\0` `00`: POSIX.
    Ustar,
    /// `ustar  \0`: GNU.
    Gnu,
    /// No magic at all: V7.
    V7,
}

/// How an entry is written when it does not fit into one header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// An `x` entry with PAX records.
    Pax,
    /// `L` and `K` entries, base-256 numbers.
    Gnu,
    /// Only what fits: name and prefix of POSIX ustar.
    Ustar,
    /// Only what fits: the header of 1979.
    V7,
}

/// One raw header. Fields are written as they are: nothing is checked.
#[derive(Debug, Clone)]
pub struct Header {
    /// At most 100 bytes.
    pub name: Vec<u8>,
    /// Permission bits, setuid, setgid, sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Bytes of data that follow.
    pub size: u64,
    /// Seconds since 1970.
    pub mtime: i64,
    /// `0` file, `1` hard link, `2` symbolic link, `3` character device, `4` block device, `5` directory, `6` fifo, ...
    pub typeflag: u8,
    /// At most 100 bytes.
    pub linkname: Vec<u8>,
    /// Family.
    pub magic: Magic,
    /// Device number.
    pub major: u32,
    /// Device number.
    pub minor: u32,
    /// At most 155 bytes; POSIX only.
    pub prefix: Vec<u8>,
}

impl Default for Header {
    fn default() -> Self {
        Header {
            name: Vec::new(),
            mode: 0o644,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: 1_600_000_000,
            typeflag: b'0',
            linkname: Vec::new(),
            magic: Magic::Ustar,
            major: 0,
            minor: 0,
            prefix: Vec::new(),
        }
    }
}

impl Header {
    /// The 512 bytes, with a right checksum.
    pub fn encode(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        put(&mut block[..100], &self.name);
        number(&mut block[100..108], i64::from(self.mode));
        number(&mut block[108..116], self.uid as i64);
        number(&mut block[116..124], self.gid as i64);
        number(&mut block[124..136], self.size as i64);
        number(&mut block[136..148], self.mtime);
        block[156] = self.typeflag;
        put(&mut block[157..257], &self.linkname);
        match self.magic {
            Magic::Ustar => put(&mut block[257..265], b"ustar\x0000"),
            Magic::Gnu => put(&mut block[257..265], b"ustar  \0"),
            Magic::V7 => {}
        }
        if self.magic != Magic::V7 {
            number(&mut block[329..337], i64::from(self.major));
            number(&mut block[337..345], i64::from(self.minor));
        }
        if self.magic == Magic::Ustar {
            put(&mut block[345..500], &self.prefix);
        }
        seal(&mut block);
        block
    }
}

/// Writes the checksum of a header, for those who changed its bytes.
pub fn seal(block: &mut [u8; BLOCK]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    put(&mut block[148..156], format!("{sum:06o}\0 ").as_bytes());
}

fn put(field: &mut [u8], bytes: &[u8]) {
    assert!(
        bytes.len() <= field.len(),
        "{} bytes do not fit into {}",
        bytes.len(),
        field.len()
    );
    field[..bytes.len()].copy_from_slice(bytes);
}

/// Octal with a terminator if it fits, else GNU's base-256: the first bit set, then a big-endian two's complement number.
fn number(field: &mut [u8], value: i64) {
    let digits = field.len() - 1;
    let limit = if digits >= 11 { OCTAL_12 } else { OCTAL_8 };
    if u64::try_from(value).is_ok_and(|value| value <= limit) {
        put(field, format!("{value:0digits$o}").as_bytes());
    } else {
        field.fill(if value < 0 { 0xff } else { 0 });
        let bytes = value.to_be_bytes();
        let start = field.len().saturating_sub(bytes.len());
        let skip = bytes.len().saturating_sub(field.len());
        field[start..].copy_from_slice(&bytes[skip..]);
        field[0] |= 0x80;
    }
}

/// What the data of a regular file is.
#[derive(Debug, Clone)]
pub enum Data {
    /// These bytes.
    Bytes(Vec<u8>),
    /// So many bytes of [`pattern`] with this seed, which are made while they are written.
    Pattern(u64, u64),
}

impl Data {
    fn len(&self) -> u64 {
        match self {
            Data::Bytes(bytes) => bytes.len() as u64,
            Data::Pattern(_, length) => *length,
        }
    }
}

/// Bytes of one block of [`pattern`].
const PATTERN_BLOCK: usize = 64 << 10;

/// Data that compresses a hundredfold and yet differs from block to block, so that a block in the wrong place is seen: each block of
/// 64 KiB is one line repeated, that says the seed and the block's number. Returns block `index`.
pub fn pattern(seed: u64, index: u64) -> Vec<u8> {
    let line = format!("seed {seed:>12} block {index:>12} of a pattern that compresses well\n");
    // Repeated and cut, not byte by byte: gigabytes are made of it, by code without optimization.
    let mut block = line.repeat(PATTERN_BLOCK / line.len() + 1).into_bytes();
    block.truncate(PATTERN_BLOCK);
    block
}

/// Bytes that do not compress and are always the same for a seed (xorshift).
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// One entry: header, extensions, data.
#[derive(Debug, Clone)]
pub struct Entry {
    /// What goes into the header; name, link and size are filled in from the fields below.
    pub header: Header,
    path: Vec<u8>,
    link: Vec<u8>,
    data: Data,
    nanoseconds: Option<u32>,
    pax: Vec<(Vec<u8>, Vec<u8>)>,
    dialect: Dialect,
}

impl Entry {
    fn new(typeflag: u8, path: impl AsRef<[u8]>, mode: u32) -> Self {
        Entry {
            header: Header {
                typeflag,
                mode,
                ..Header::default()
            },
            path: path.as_ref().to_vec(),
            link: Vec::new(),
            data: Data::Bytes(Vec::new()),
            nanoseconds: None,
            pax: Vec::new(),
            dialect: Dialect::Pax,
        }
    }

    /// A regular file, mode 0644.
    pub fn file(path: impl AsRef<[u8]>, data: impl Into<Vec<u8>>) -> Self {
        let mut entry = Self::new(b'0', path, 0o644);
        entry.data = Data::Bytes(data.into());
        entry
    }

    /// A regular file of `length` bytes of [`pattern`].
    pub fn pattern(path: impl AsRef<[u8]>, seed: u64, length: u64) -> Self {
        let mut entry = Self::new(b'0', path, 0o644);
        entry.data = Data::Pattern(seed, length);
        entry
    }

    /// A directory, mode 0755; a `/` is added at its end.
    pub fn dir(path: impl AsRef<[u8]>) -> Self {
        let mut entry = Self::new(b'5', path, 0o755);
        if !entry.path.ends_with(b"/") {
            entry.path.push(b'/');
        }
        entry
    }

    /// A symbolic link.
    pub fn symlink(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        let mut entry = Self::new(b'2', path, 0o777);
        entry.link = target.as_ref().to_vec();
        entry
    }

    /// A hard link to the path of an earlier entry.
    pub fn hard_link(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        let mut entry = Self::new(b'1', path, 0o644);
        entry.link = target.as_ref().to_vec();
        entry
    }

    /// A character device.
    pub fn char_device(path: impl AsRef<[u8]>, major: u32, minor: u32) -> Self {
        let mut entry = Self::new(b'3', path, 0o666);
        (entry.header.major, entry.header.minor) = (major, minor);
        entry
    }

    /// A block device.
    pub fn block_device(path: impl AsRef<[u8]>, major: u32, minor: u32) -> Self {
        let mut entry = Self::new(b'4', path, 0o660);
        (entry.header.major, entry.header.minor) = (major, minor);
        entry
    }

    /// A fifo.
    pub fn fifo(path: impl AsRef<[u8]>) -> Self {
        Self::new(b'6', path, 0o640)
    }

    /// A whiteout: the name `path` of lower layers is deleted.
    pub fn whiteout(path: &str) -> Self {
        let (dir, name) = path.rsplit_once('/').map_or(("", path), |(dir, name)| (dir, name));
        let slash = if dir.is_empty() { "" } else { "/" };
        Self::new(b'0', format!("{dir}{slash}.wh.{name}"), 0o600)
    }

    /// The mark of a directory that hides what lower layers have in it.
    pub fn opaque(dir: &str) -> Self {
        Self::new(b'0', format!("{dir}/.wh..wh..opq"), 0o600)
    }

    /// Sets permission bits, setuid, setgid, sticky.
    pub fn mode(mut self, mode: u32) -> Self {
        self.header.mode = mode;
        self
    }

    /// Sets owner and group.
    pub fn owner(mut self, uid: u64, gid: u64) -> Self {
        (self.header.uid, self.header.gid) = (uid, gid);
        self
    }

    /// Sets the time of change, in whole seconds since 1970.
    pub fn mtime(mut self, seconds: i64) -> Self {
        self.header.mtime = seconds;
        self
    }

    /// Sets the time of change to the nanosecond (PAX only). The header holds the floor of it.
    pub fn mtime_ns(mut self, seconds: i64, nanoseconds: u32) -> Self {
        self.header.mtime = seconds;
        self.nanoseconds = Some(nanoseconds);
        self
    }

    /// Adds an extended attribute (PAX only), as GNU tar and containerd write it.
    pub fn xattr(self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.record(format!("SCHILY.xattr.{name}"), value)
    }

    /// Adds a PAX record.
    pub fn record(mut self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Self {
        self.pax.push((key.as_ref().to_vec(), value.as_ref().to_vec()));
        self
    }

    /// Chooses how it is written.
    pub fn dialect(mut self, dialect: Dialect) -> Self {
        self.dialect = dialect;
        self.header.magic = match dialect {
            Dialect::Pax | Dialect::Ustar => Magic::Ustar,
            Dialect::Gnu => Magic::Gnu,
            Dialect::V7 => Magic::V7,
        };
        self
    }
}

/// Writes a tar archive to anything.
pub struct Tar<'a> {
    out: &'a mut dyn Write,
}

impl<'a> Tar<'a> {
    /// An archive that goes to `out`.
    pub fn new(out: &'a mut dyn Write) -> Self {
        Tar { out }
    }

    /// Writes raw bytes: whole headers, or nonsense.
    pub fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)
    }

    /// Writes data and what is missing to a whole block.
    pub fn data(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.pad(bytes.len() as u64)
    }

    fn pad(&mut self, length: u64) -> io::Result<()> {
        let rest = (length % BLOCK as u64) as usize;
        if rest > 0 {
            self.out.write_all(&[0; BLOCK][rest..])?;
        }
        Ok(())
    }

    /// Writes a PAX header (`x`, or `g` for a global one) with these records.
    pub fn pax(&mut self, typeflag: u8, records: &[(Vec<u8>, Vec<u8>)]) -> io::Result<()> {
        let mut body = Vec::new();
        for (key, value) in records {
            // The length counts itself: "<length> <key>=<value>\n".
            let rest = key.len() + value.len() + 3;
            let mut length = rest;
            while length.to_string().len() + rest != length {
                length = length.to_string().len() + rest;
            }
            body.extend_from_slice(format!("{length} ").as_bytes());
            body.extend_from_slice(key);
            body.push(b'=');
            body.extend_from_slice(value);
            body.push(b'\n');
        }
        // containerd makes the parent directories of every name but those of `x` entries, so a global header has none.
        let name = if typeflag == b'g' {
            "pax_global_header"
        } else {
            "PaxHeaders.0/entry"
        };
        let header = Header {
            name: name.as_bytes().to_vec(),
            size: body.len() as u64,
            typeflag,
            ..Header::default()
        };
        self.raw(&header.encode())?;
        self.data(&body)
    }

    /// Writes a GNU `L` (long name) or `K` (long link) entry.
    pub fn gnu_long(&mut self, typeflag: u8, name: &[u8]) -> io::Result<()> {
        let mut body = name.to_vec();
        body.push(0);
        let header = Header {
            name: b"././@LongLink".to_vec(),
            mode: 0,
            mtime: 0,
            size: body.len() as u64,
            typeflag,
            magic: Magic::Gnu,
            ..Header::default()
        };
        self.raw(&header.encode())?;
        self.data(&body)
    }

    /// Writes an entry.
    pub fn add(&mut self, entry: Entry) -> io::Result<()> {
        let Entry {
            mut header,
            path,
            link,
            data,
            nanoseconds,
            mut pax,
            dialect,
        } = entry;
        header.size = data.len();
        match dialect {
            Dialect::Pax => {
                let text = |bytes: &[u8]| bytes.is_ascii() && bytes.len() <= 100;
                if !text(&path) {
                    pax.push((b"path".to_vec(), path.clone()));
                }
                if !text(&link) {
                    pax.push((b"linkpath".to_vec(), link.clone()));
                }
                if header.size > OCTAL_12 {
                    pax.push((b"size".to_vec(), header.size.to_string().into_bytes()));
                    header.size = 0;
                }
                for (key, value) in [("uid", &mut header.uid), ("gid", &mut header.gid)] {
                    if *value > OCTAL_8 {
                        pax.push((key.as_bytes().to_vec(), value.to_string().into_bytes()));
                        *value = 0;
                    }
                }
                if nanoseconds.is_some() || header.mtime < 0 {
                    pax.push((
                        b"mtime".to_vec(),
                        decimal(header.mtime, nanoseconds.unwrap_or(0)).into_bytes(),
                    ));
                    header.mtime = header.mtime.max(0);
                }
                if !pax.is_empty() {
                    self.pax(b'x', &pax)?;
                }
                header.name = shortened(&path);
                header.linkname = shortened(&link);
            }
            Dialect::Gnu => {
                if link.len() > 100 {
                    self.gnu_long(b'K', &link)?;
                }
                if path.len() > 100 {
                    self.gnu_long(b'L', &path)?;
                }
                header.name = path[..path.len().min(100)].to_vec();
                header.linkname = link[..link.len().min(100)].to_vec();
            }
            Dialect::Ustar => {
                (header.prefix, header.name) = split_prefix(&path);
                header.linkname = link;
            }
            Dialect::V7 => {
                header.name = path;
                header.linkname = link;
            }
        }
        self.raw(&header.encode())?;
        match data {
            Data::Bytes(bytes) => self.data(&bytes),
            Data::Pattern(seed, length) => {
                let mut left = length;
                for index in 0.. {
                    if left == 0 {
                        break;
                    }
                    let block = pattern(seed, index);
                    let part = left.min(block.len() as u64);
                    self.out.write_all(&block[..part as usize])?;
                    left -= part;
                }
                self.pad(length)
            }
        }
    }

    /// Writes the end: two blocks of zeros.
    pub fn finish(self) -> io::Result<()> {
        self.out.write_all(&[0; 2 * BLOCK])
    }
}

/// A name for the header of an entry whose real name stands in a PAX record.
fn shortened(path: &[u8]) -> Vec<u8> {
    let mut bytes: Vec<u8> = path
        .iter()
        .map(|byte| if byte.is_ascii() { *byte } else { b'_' })
        .collect();
    bytes.truncate(100);
    bytes
}

/// POSIX's split of a long path at a `/`: prefix of at most 155 bytes, name of at most 100.
fn split_prefix(path: &[u8]) -> (Vec<u8>, Vec<u8>) {
    if path.len() <= 100 {
        return (Vec::new(), path.to_vec());
    }
    let fits = |at: &usize| path[*at] == b'/' && *at <= 155 && path.len() - at - 1 <= 100;
    let at = (0..path.len())
        .rfind(fits)
        .unwrap_or_else(|| panic!("a path of {} bytes does not fit into a ustar header", path.len()));
    (path[..at].to_vec(), path[at + 1..].to_vec())
}

/// Seconds and nanoseconds as PAX writes them: the sign is in front of the whole number, so -1 s and 250 ms are -0.75.
fn decimal(seconds: i64, nanoseconds: u32) -> String {
    if seconds >= 0 || nanoseconds == 0 {
        format!("{seconds}.{nanoseconds:09}")
    } else {
        format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanoseconds)
    }
}
