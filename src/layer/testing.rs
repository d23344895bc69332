//! What the tests of this room share: a writer of tars that can be wrong on purpose, and a readable picture of an index.

use super::index::mode;
use super::{Access, Codec, IndexParts, Ino, LayerError, LayerIndex, ROOT_INO, TarIndexer, TarLayout};

/// A tar being written.
#[derive(Default)]
pub(crate) struct Tar(pub Vec<u8>);

/// A header; fields are as tar has them. Written in the ustar dialect unless `magic` is changed.
#[derive(Clone)]
pub(crate) struct Head<'a> {
    pub kind: u8,
    pub name: &'a [u8],
    pub link: &'a [u8],
    pub size: u64,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: u64,
    pub major: u32,
    pub minor: u32,
    pub magic: &'a [u8; 8],
    pub prefix: &'a [u8],
}

pub(crate) const USTAR: &[u8; 8] = b"ustar\x0000";
pub(crate) const GNU: &[u8; 8] = b"ustar  \0";
pub(crate) const V7: &[u8; 8] = &[0; 8];

impl Default for Head<'_> {
    fn default() -> Self {
        Head {
            kind: b'0',
            name: b"file",
            link: b"",
            size: 0,
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: 0,
            major: 0,
            minor: 0,
            magic: USTAR,
            prefix: b"",
        }
    }
}

/// Writes an octal number with a NUL after it.
pub(crate) fn put_octal(field: &mut [u8], value: u64) {
    let digits = field.len() - 1;
    field[..digits].copy_from_slice(format!("{value:0digits$o}").as_bytes());
    field[digits] = 0;
}

/// Writes a number of up to 63 bits into 12 bytes.
pub(crate) fn put_size(field: &mut [u8], value: u64) {
    if value < 1 << 33 {
        put_octal(field, value);
    } else {
        put_binary(field, value as i64);
    }
}

/// Writes a number in GNU's base 256.
pub(crate) fn put_binary(field: &mut [u8], value: i64) {
    let fill = if value < 0 { 0xff } else { 0 };
    field.fill(fill);
    let from = field.len() - 8.min(field.len());
    let bytes = value.to_be_bytes();
    let len = field.len();
    field[from..].copy_from_slice(&bytes[8 - (len - from)..]);
    field[0] |= 0x80;
}

impl Head<'_> {
    /// The 512 bytes, with a right checksum.
    pub fn block(&self) -> [u8; 512] {
        let mut block = [0; 512];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, self.name);
        put(157, self.link);
        put(257, self.magic);
        put(345, self.prefix);
        block[156] = self.kind;
        put_octal(&mut block[100..108], self.mode.into());
        for (at, id) in [(108, self.uid), (116, self.gid)] {
            if id < 1 << 21 {
                put_octal(&mut block[at..at + 8], id.into());
            } else {
                put_binary(&mut block[at..at + 8], id.into());
            }
        }
        put_size(&mut block[124..136], self.size);
        put_octal(&mut block[136..148], self.mtime);
        if self.magic != V7 {
            put_octal(&mut block[329..337], self.major.into());
            put_octal(&mut block[337..345], self.minor.into());
        }
        seal(&mut block);
        block
    }
}

/// Sets the checksum.
pub(crate) fn seal(block: &mut [u8; 512]) {
    block[148..156].fill(b' ');
    let sum: u64 = block.iter().map(|&byte| u64::from(byte)).sum();
    put_octal(&mut block[148..155], sum);
}

/// One PAX record.
pub(crate) fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut len = rest;
    while len.to_string().len() + rest != len {
        len = len.to_string().len() + rest;
    }
    [format!("{len} {key}=").as_bytes(), value, b"\n"].concat()
}

impl Tar {
    /// Adds a header, and `content` with its padding.
    pub fn add(&mut self, head: Head<'_>, content: &[u8]) -> &mut Self {
        self.block(&head.block()).content(content)
    }

    pub fn block(&mut self, block: &[u8; 512]) -> &mut Self {
        self.0.extend_from_slice(block);
        self
    }

    pub fn content(&mut self, content: &[u8]) -> &mut Self {
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub fn dir(&mut self, name: &str, mode: u32) -> &mut Self {
        let name = name.as_bytes();
        self.add(
            Head {
                kind: b'5',
                name,
                mode,
                ..Head::default()
            },
            b"",
        )
    }

    pub fn file(&mut self, name: &str, content: &[u8]) -> &mut Self {
        let (name, size) = (name.as_bytes(), content.len() as u64);
        self.add(
            Head {
                name,
                size,
                ..Head::default()
            },
            content,
        )
    }

    pub fn symlink(&mut self, name: &str, target: &str) -> &mut Self {
        let (name, link) = (name.as_bytes(), target.as_bytes());
        self.add(
            Head {
                kind: b'2',
                name,
                link,
                mode: 0o777,
                ..Head::default()
            },
            b"",
        )
    }

    pub fn hardlink(&mut self, name: &str, target: &str) -> &mut Self {
        let (name, link) = (name.as_bytes(), target.as_bytes());
        self.add(
            Head {
                kind: b'1',
                name,
                link,
                ..Head::default()
            },
            b"",
        )
    }

    /// An extended header of type `kind` (`x`, `g`, `L`, `K`).
    pub fn extended(&mut self, kind: u8, body: &[u8]) -> &mut Self {
        let size = body.len() as u64;
        self.add(
            Head {
                kind,
                name: b"extended",
                size,
                ..Head::default()
            },
            body,
        )
    }

    pub fn pax(&mut self, records: &[(&str, &[u8])]) -> &mut Self {
        let body: Vec<u8> = records.iter().flat_map(|(key, value)| record(key, value)).collect();
        self.extended(b'x', &body)
    }

    pub fn end(&mut self) -> &mut Self {
        self.0.resize(self.0.len() + 1024, 0);
        self
    }

    pub fn layout(&self) -> Result<TarLayout, LayerError> {
        layout(&self.0)
    }

    pub fn index(&self) -> LayerIndex {
        index(self.layout().unwrap())
    }

    /// The error that the whole tar gives, as text.
    pub fn error(&self) -> String {
        self.layout().unwrap_err().to_string()
    }
}

/// Reads a whole tar at once.
pub(crate) fn layout(tar: &[u8]) -> Result<TarLayout, LayerError> {
    let mut indexer = TarIndexer::new();
    indexer.push(tar)?;
    indexer.finish()
}

/// An index without chunks.
pub(crate) fn index(layout: TarLayout) -> LayerIndex {
    layout.into_index(Access::Stream, Codec::None, Vec::new(), 0).unwrap()
}

/// The data space that a tar and its layout make.
pub(crate) fn data_space(tar: &[u8], layout: &TarLayout) -> Vec<u8> {
    let mut data = tar.to_vec();
    data.resize(layout.data_size as usize, 0);
    for copy in &layout.copies {
        let from = copy.from as usize..(copy.from + copy.len) as usize;
        data[copy.to as usize..(copy.to + copy.len) as usize].copy_from_slice(&tar[from]);
    }
    data
}

/// A picture of all names of a layer in order, a line each: `PATH TYPE MODE UID:GID LINKS ...`. Names of one inode show its number, as
/// `#NUMBER`.
pub(crate) fn picture(index: &LayerIndex) -> String {
    let mut lines = vec![line(index, b"/", ROOT_INO)];
    let mut dirs = vec![(ROOT_INO, Vec::new())];
    while let Some((dir, path)) = dirs.pop() {
        let inode = index.inode(dir).unwrap();
        for entry in index.entries(inode) {
            let path = [&path, &b"/"[..], index.name(entry)].concat();
            lines.push(line(index, &path, entry.ino));
            if index.inode(entry.ino).unwrap().is_dir() {
                dirs.push((entry.ino, path));
            }
        }
    }
    lines.sort();
    lines.join("\n") + "\n"
}

fn line(index: &LayerIndex, path: &[u8], ino: Ino) -> String {
    let i = index.inode(ino).unwrap();
    let kind = match i.file_type() {
        mode::DIR => "dir",
        mode::REG => "file",
        mode::LNK => "link",
        mode::CHR => "char",
        mode::BLK => "block",
        mode::FIFO => "fifo",
        _ => "?",
    };
    let mut line = format!(
        "{} {kind} {:o} {}:{} x{}",
        path.escape_ascii(),
        i.mode & 0o7777,
        i.uid,
        i.gid,
        i.nlink
    );
    if i.nlink > 1 && !i.is_dir() {
        line += &format!(" #{ino}");
    }
    if i.is_reg() {
        line += &format!(" {}", i.size);
    }
    if matches!(i.file_type(), mode::CHR | mode::BLK) {
        line += &format!(" {}:{}", i.rdev_major, i.rdev_minor);
    }
    if i.is_symlink() {
        line += &format!(" -> {}", index.target(i).escape_ascii());
    }
    if (i.mtime, i.mtime_nsec) != (0, 0) {
        line += &format!(" @{}.{:09}", i.mtime, i.mtime_nsec);
    }
    let mut xattrs: Vec<_> = index.xattrs(i).collect();
    xattrs.sort();
    for (name, value) in xattrs {
        line += &format!(" {}={}", name.escape_ascii(), value.escape_ascii());
    }
    line
}

/// A valid index with a bit of everything.
pub(crate) fn sample_parts() -> IndexParts {
    let mut tar = Tar::default();
    tar.dir("d/", 0o755)
        .pax(&[("SCHILY.xattr.user.k", b"v"), ("mtime", b"7.5")]);
    tar.file("d/f", &[1; 5000])
        .pax(&[("mtime", b"7.5")])
        .hardlink("g", "d/f");
    tar.symlink("l", "d").file("h", b"x").end();
    let layout = tar.layout().unwrap();
    let chunk = super::Chunk {
        data_offset: 0,
        data_len: layout.data_size as u32,
        blob_offset: 0,
        blob_len: 0,
        skip: 0,
        digest: super::Digest::of(&tar.0),
    };
    let mut parts = layout.tree.into_parts(Access::Stream, Codec::Gzip);
    (parts.data_size, parts.blob_size, parts.chunks) = (layout.data_size, 100, vec![chunk]);
    parts
}

/// Random numbers that are the same in every run.
pub(crate) struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Dice(seed)
    }

    /// A number below `limit` (splitmix64).
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % limit.max(1) as u64) as usize
    }

    /// Files with names of their own, of up to `len` bytes; some parts of them are zeros.
    pub fn files(&mut self, count: usize, len: usize) -> Vec<(String, Vec<u8>)> {
        let mut files = Vec::new();
        for i in 0..count {
            let mut content: Vec<u8> = (0..self.below(len)).map(|_| self.below(256) as u8).collect();
            if self.below(3) == 0 {
                let from = self.below(content.len());
                let to = from + self.below(content.len() - from);
                content[from..to].fill(0);
            }
            files.push((format!("d{}/f{i}", i % 3), content));
        }
        files
    }
}

/// Reads `count` random ranges of the index's data space by way of its chunks, as the fetcher does, and compares them with `files`.
pub(crate) fn check_ranges(
    index: &LayerIndex,
    blob: &[u8],
    files: &[(String, Vec<u8>)],
    dice: &mut Dice,
    count: usize,
) {
    let mut space = vec![0; index.data_size() as usize];
    for (name, content) in files {
        let inode = index.inode(index.lookup_path(name.as_bytes()).unwrap()).unwrap();
        assert_eq!(inode.size, content.len() as u64, "{name}");
        space[inode.data as usize..][..content.len()].copy_from_slice(content);
    }
    for _ in 0..count {
        let from = dice.below(space.len());
        let to = from + dice.below((space.len() - from).min(200_000));
        let mut bytes = vec![0; to - from];
        for chunk in &index.chunks()[index.chunks_at(from as u64, (to - from) as u64)] {
            let member = &blob[chunk.blob_offset as usize..chunk.blob_end() as usize];
            let data = super::decode_member(index.codec(), member, chunk.skip, chunk.data_len).unwrap();
            assert_eq!(super::Digest::of(&data), chunk.digest);
            let (begin, end) = (chunk.data_offset as usize, chunk.data_end() as usize);
            let (first, last) = (begin.max(from), end.min(to));
            bytes[first - from..last - from].copy_from_slice(&data[first - begin..last - begin]);
        }
        assert!(bytes == space[from..to], "{from}..{to}");
    }
}
