//! ELF files, as far as the kernel and the dynamic loader read them: program headers, and the dynamic section.
//!
//! Only these say what is mapped and which libraries are needed; section headers are for linkers, and may be missing.

use std::ops::Range;

use super::array;

/// Bytes of a file that its program headers are looked for in: the header is followed by them in every file that a linker makes.
pub const HEAD_LEN: u64 = 4096;
/// Most program headers: linkers write about a dozen.
const MAX_SEGMENTS: usize = 128;
/// Longest dynamic section that is read, in bytes. There are about 30 entries of 16 bytes, and one more for each library.
pub const MAX_DYNAMIC: u64 = 64 << 10;
/// Libraries of one file that are followed.
const MAX_NEEDED: usize = 256;
/// Longest name of a library, or list of directories, in bytes.
const MAX_TEXT: u64 = 4096;
/// Most bytes of a table of texts that are read.
const MAX_TEXTS: u64 = 1 << 20;
/// Longest path of a loader, in bytes.
pub const MAX_INTERPRETER: u64 = 4096;

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
/// The flag of a segment that is executable.
const PF_X: u32 = 1;

const DT_NULL: u64 = 0;
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;
const DT_STRSZ: u64 = 10;
const DT_RPATH: u64 = 15;
const DT_RUNPATH: u64 = 29;

/// An ELF file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Elf {
    /// The machine that it is for (`e_machine`).
    pub machine: u16,
    /// Whether its words have 64 bits.
    pub is_wide: bool,
    is_big_endian: bool,
    segments: Vec<Segment>,
}

/// A part of the file that has a meaning at run time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    kind: u32,
    flags: u32,
    /// First byte in the file.
    pub offset: u64,
    /// Bytes in the file.
    pub len: u64,
    address: u64,
}

impl Segment {
    /// Whether it is code.
    pub fn is_code(&self) -> bool {
        self.flags & PF_X != 0
    }
}

/// What the dynamic section says: positions in the table of texts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Links {
    /// Names of libraries, in the order in which they are loaded.
    pub needed: Vec<u64>,
    /// Directories to look in, of the older kind.
    pub rpath: Option<u64>,
    /// Directories to look in.
    pub runpath: Option<u64>,
    /// Where the table of texts is in the file, and its bytes.
    pub texts: (u64, u64),
}

impl Links {
    /// Where in the file the texts are that it names. The table has the names of all symbols too, and may be megabytes of which these are a part: at its
    /// beginning or at its end, as the linker likes.
    pub fn used(&self) -> Range<u64> {
        let (start, len) = self.texts;
        let end = start.saturating_add(len);
        let named = self.needed.iter().chain(&self.rpath).chain(&self.runpath);
        let first = named.clone().min().map_or(end, |&at| start.saturating_add(at));
        let last = named.max().map_or(end, |&at| start.saturating_add(at));
        let used = first..last.saturating_add(MAX_TEXT).min(end);
        match used.end.checked_sub(used.start) {
            Some(1..=MAX_TEXTS) => used,
            _ => start..end.min(start.saturating_add(MAX_TEXTS)),
        }
    }
}

/// Reads the words of a file.
struct Words<'a> {
    bytes: &'a [u8],
    is_wide: bool,
    is_big_endian: bool,
}

impl Words<'_> {
    fn half(&self, at: usize) -> Option<u16> {
        let bytes = array(self.bytes, at)?;
        Some(if self.is_big_endian {
            u16::from_be_bytes(bytes)
        } else {
            u16::from_le_bytes(bytes)
        })
    }

    fn word(&self, at: usize) -> Option<u32> {
        let bytes = array(self.bytes, at)?;
        Some(if self.is_big_endian {
            u32::from_be_bytes(bytes)
        } else {
            u32::from_le_bytes(bytes)
        })
    }

    /// A word as wide as the file's.
    fn long(&self, at: usize) -> Option<u64> {
        if !self.is_wide {
            return self.word(at).map(u64::from);
        }
        let bytes = array(self.bytes, at)?;
        Some(if self.is_big_endian {
            u64::from_be_bytes(bytes)
        } else {
            u64::from_le_bytes(bytes)
        })
    }
}

impl Elf {
    /// The file that begins with `head`; `None` if that is none, or its program headers are not within it.
    pub fn parse(head: &[u8]) -> Option<Self> {
        let is_wide = match head.get(..6)? {
            [0x7f, b'E', b'L', b'F', 1, _] => false,
            [0x7f, b'E', b'L', b'F', 2, _] => true,
            _ => return None,
        };
        let is_big_endian = match head[5] {
            1 => false,
            2 => true,
            _ => return None,
        };
        let words = Words {
            bytes: head,
            is_wide,
            is_big_endian,
        };
        let (at, entry_len, count) = match is_wide {
            true => (words.long(32)?, words.half(54)?, words.half(56)?),
            false => (words.long(28)?, words.half(42)?, words.half(44)?),
        };
        let least = if is_wide { 56 } else { 32 };
        let (entry_len, count) = (usize::from(entry_len), usize::from(count));
        if entry_len < least || count > MAX_SEGMENTS {
            return None;
        }
        let at = usize::try_from(at).ok()?;
        let segment = |number: usize| {
            let at = at.checked_add(number.checked_mul(entry_len)?)?;
            Some(match is_wide {
                true => Segment {
                    kind: words.word(at)?,
                    flags: words.word(at.checked_add(4)?)?,
                    offset: words.long(at.checked_add(8)?)?,
                    address: words.long(at.checked_add(16)?)?,
                    len: words.long(at.checked_add(32)?)?,
                },
                false => Segment {
                    kind: words.word(at)?,
                    offset: words.long(at.checked_add(4)?)?,
                    address: words.long(at.checked_add(8)?)?,
                    len: words.long(at.checked_add(16)?)?,
                    flags: words.word(at.checked_add(24)?)?,
                },
            })
        };
        Some(Elf {
            machine: words.half(18)?,
            is_wide,
            is_big_endian,
            segments: (0..count).map(segment).collect::<Option<_>>()?,
        })
    }

    /// Segments that are mapped.
    pub fn loaded(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter().filter(|segment| segment.kind == PT_LOAD)
    }

    /// Where in the file the path of its loader is, with the zero at its end.
    pub fn interpreter(&self) -> Option<Range<u64>> {
        self.range(PT_INTERP, MAX_INTERPRETER)
    }

    /// Where in the file its dynamic section is.
    pub fn dynamic(&self) -> Option<Range<u64>> {
        self.range(PT_DYNAMIC, MAX_DYNAMIC)
    }

    fn range(&self, kind: u32, most: u64) -> Option<Range<u64>> {
        let segment = self.segments.iter().find(|segment| segment.kind == kind)?;
        let end = segment.offset.checked_add(segment.len)?;
        (segment.len > 0 && segment.len <= most).then_some(segment.offset..end)
    }

    /// Where in the file the byte at `address` is.
    fn place(&self, address: u64) -> Option<u64> {
        self.loaded().find_map(|segment| {
            let inside = address.checked_sub(segment.address)?;
            (inside < segment.len)
                .then(|| segment.offset.checked_add(inside))
                .flatten()
        })
    }

    /// What the bytes of the dynamic section say.
    pub fn links(&self, dynamic: &[u8]) -> Option<Links> {
        let words = Words {
            bytes: dynamic,
            is_wide: self.is_wide,
            is_big_endian: self.is_big_endian,
        };
        let width = if self.is_wide { 8 } else { 4 };
        let mut links = Links::default();
        let (mut texts, mut texts_len) = (None, 0);
        for entry in 0..dynamic.len() / (2 * width) {
            let at = entry * 2 * width;
            let (tag, value) = (words.long(at)?, words.long(at + width)?);
            match tag {
                DT_NULL => break,
                DT_NEEDED if links.needed.len() < MAX_NEEDED => links.needed.push(value),
                DT_STRTAB => texts = Some(value),
                DT_STRSZ => texts_len = value,
                DT_RPATH => links.rpath = Some(value),
                DT_RUNPATH => links.runpath = Some(value),
                _ => {}
            }
        }
        links.texts = (self.place(texts?)?, texts_len);
        Some(links)
    }
}
