//! What a container read while it started: files and ranges of them, in the order in which they were first read.
//!
//! A trace belongs to a repository, an image in it, and what was started (its entry point). It names files by layer and path, not by
//! offsets: so it stays right when the same layer is read by another index, and most of it is right for the next image of the repository.
//! It is made of ranges of data spaces ([`observe`]), merged with what earlier starts have shown ([`Trace::merged`]), turned into ranges of data
//! spaces again ([`Trace::found_in`]), and carried to another image by what of it was found there, by path or by content ([`Carried`],
//! [`Trace::moved`]).
//!
//! # Merging
//! What a start reads is wished for the next one. What it did not read is *missed*: it is forgotten after [`FORGET_AFTER`] starts in a row, of
//! those that show what is not read. A start does not show it where the kernel had pages of the layer already, or reads it without
//! Lazuli, or where others read the same layer meanwhile ([`Sight::Blurred`]); what is seen there for the first time may be another's
//! read, and is forgotten by the first clear start that misses it.
//!
//! # Form
//! ```text
//! 0   magic    8   "LZLTRACE"
//! 8   version  4   1, little-endian
//! 12  raw_len  4   bytes of the document
//! 16  document     JSON, compressed with zstd
//!     sum      32  SHA-256 of all before
//! ```
//! A trace is only a wish: it decides what is fetched early, never what anybody reads. Whoever wrote it, its bytes are bounded and checked
//! here, and what cannot be is no trace.

use std::collections::HashMap;
use std::io::Read as _;

use serde::{Deserialize, Serialize};

use super::compression::zstd_frames_within;
use super::{Digest, LayerError};

mod carry;
mod content;
mod elsewhere;
mod merge;
mod places;
#[cfg(test)]
mod tests;

pub use carry::{Carried, Counts, Found, Placed};
pub use content::Content;
pub use places::{Looked, Seen, Sight, observe};

const MAGIC: &[u8; 8] = b"LZLTRACE";
const VERSION: u32 = 1;
const FORMAT: &str = "trace";
/// Bytes before the document.
const HEADER_LEN: usize = 16;
/// Most ranges of a trace. The start of a large Java server reads some ten thousand.
pub const MAX_WISHES: usize = 65_536;
/// Most layers: as many as an image can have.
const MAX_LAYERS: usize = 512;
/// Most bytes that the ranges of a trace have together. What reads more than this is not starting.
pub const MAX_BYTES: u64 = 4 << 30;
/// Largest document, in bytes: a hundred for each range.
const MAX_RAW_LEN: usize = 8 << 20;
/// Largest trace as it is stored, in bytes.
pub const MAX_LEN: usize = 2 << 20;
/// Window of the compressed document, as a power of two: as large as the document may be.
const WINDOW_LOG: u32 = 23;
/// zstd's level: a trace is written once for each start.
const LEVEL: i32 = 3;
/// Longest name of a program or repository, in bytes.
const MAX_NAME_LEN: usize = 512;
/// Longest path, in bytes: what a program can name.
const MAX_PATH_LEN: usize = 4096;
/// Starts in a row that have to miss something for it to be forgotten: one may have been unusual.
pub const FORGET_AFTER: u8 = 2;

/// What was started.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Entry {
    /// Digest of the whole command: arguments may be secret, and are kept nowhere.
    pub id: Digest,
    /// Its program, for people.
    pub program: String,
}

/// Programs that run whatever their arguments say.
const SHELLS: [&str; 5] = ["sh", "bash", "dash", "ash", "busybox"];

impl Entry {
    /// Whether it is the same program with other arguments, so that it reads much of the same.
    pub fn resembles(&self, other: &Entry) -> bool {
        let name = self.program.rsplit('/').next().unwrap_or_default();
        self.program == other.program && !name.is_empty() && !SHELLS.contains(&name)
    }

    /// That of a container which runs `args`.
    pub fn of(args: &[String]) -> Self {
        let mut bytes = Vec::new();
        for arg in args {
            bytes.extend_from_slice(&(arg.len() as u64).to_le_bytes());
            bytes.extend_from_slice(arg.as_bytes());
        }
        let program = args.first().map_or("", String::as_str);
        let mut name: String = program.chars().filter(|c| !c.is_control()).collect();
        name.truncate(name.floor_char_boundary(MAX_NAME_LEN));
        Entry {
            id: Digest::of(&bytes),
            program: name,
        }
    }
}

/// A file that was read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Position of its layer in the trace.
    pub layer: u32,
    /// Its path below the layer's root.
    pub path: String,
    /// Bytes of the file.
    pub size: u64,
    /// Its content, where the layer's index knew it. Who does not know this field leaves it out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<Content>,
}

/// A range of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u32, u64, u64, u32, u8)", into = "(u32, u64, u64, u32, u8)")]
pub struct Wish {
    /// Position of the file in the trace.
    pub file: u32,
    /// First byte of the file.
    pub offset: u64,
    /// Bytes of the file, never 0.
    pub len: u64,
    /// Milliseconds from the container's making to the first read.
    pub at: u32,
    /// Starts in a row that did not read it.
    pub missed: u8,
}

impl Wish {
    /// The first byte of the file after it.
    fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }
}

impl From<(u32, u64, u64, u32, u8)> for Wish {
    fn from((file, offset, len, at, missed): (u32, u64, u64, u32, u8)) -> Self {
        Wish {
            file,
            offset,
            len,
            at,
            missed,
        }
    }
}

impl From<Wish> for (u32, u64, u64, u32, u8) {
    fn from(wish: Wish) -> Self {
        (wish.file, wish.offset, wish.len, wish.at, wish.missed)
    }
}

/// What starts of one image with one entry point have read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// The repository, with its host; empty if the image came from none.
    pub repository: String,
    /// Digest of the image's manifest.
    pub manifest: Digest,
    /// What was started.
    pub entry: Entry,
    /// Starts that it was made of.
    pub starts: u32,
    /// When the last one was, in seconds since the epoch.
    pub recorded: u64,
    /// Digests of the blobs of layers.
    pub layers: Vec<Digest>,
    /// Files of them.
    pub files: Vec<File>,
    /// What was read, in the order of the first read.
    pub wishes: Vec<Wish>,
}

impl Trace {
    /// Bytes that it wishes for.
    pub fn bytes(&self) -> u64 {
        self.wishes.iter().map(|wish| wish.len).fold(0, u64::saturating_add)
    }

    fn file(&self, wish: &Wish) -> Option<(&File, Digest)> {
        let file = self.files.get(wish.file as usize)?;
        Some((file, *self.layers.get(file.layer as usize)?))
    }

    /// Puts wishes into their order, and leaves out the last ones that are too many.
    fn tidy(&mut self) {
        self.wishes.sort_by_key(|wish| wish.at);
        self.wishes.truncate(MAX_WISHES);
        let mut left = MAX_BYTES;
        let mut fits = |wish: &Wish| {
            let fits = wish.len <= left;
            left = left.saturating_sub(wish.len);
            fits
        };
        let count = self.wishes.iter().take_while(|wish| fits(wish)).count();
        self.wishes.truncate(count);
    }

    /// As it is stored and given to others; shorter if it would be too long: first without contents, which make it right for other images only.
    pub fn encode(&self) -> Vec<u8> {
        let mut trace = self.clone();
        let mut has_contents = true;
        loop {
            let raw = serde_json::to_vec(&trace.compact()).unwrap_or_default();
            let packed = zstd::bulk::compress(&raw, LEVEL).unwrap_or_default();
            if raw.len() <= MAX_RAW_LEN && packed.len() + HEADER_LEN + Digest::LEN <= MAX_LEN {
                let mut out = Vec::with_capacity(HEADER_LEN + packed.len() + Digest::LEN);
                out.extend_from_slice(MAGIC);
                out.extend_from_slice(&VERSION.to_le_bytes());
                out.extend_from_slice(&(raw.len() as u32).to_le_bytes());
                out.extend_from_slice(&packed);
                let sum = Digest::of(&out);
                out.extend_from_slice(sum.as_bytes());
                return out;
            }
            match has_contents {
                true => trace.files.iter_mut().for_each(|file| file.content = None),
                false => trace.wishes.truncate(trace.wishes.len() / 2),
            }
            has_contents = false;
        }
    }

    /// The same without files and layers that nothing is wished of.
    fn compact(&self) -> Trace {
        let mut trace = Trace {
            layers: Vec::new(),
            files: Vec::new(),
            wishes: Vec::new(),
            ..self.clone()
        };
        let (mut files, mut layers) = (HashMap::new(), HashMap::new());
        for wish in &self.wishes {
            let Some((file, digest)) = self.file(wish) else {
                continue;
            };
            let number = *files.entry(wish.file).or_insert_with(|| {
                let layer = *layers.entry(digest).or_insert_with(|| {
                    trace.layers.push(digest);
                    trace.layers.len() as u32 - 1
                });
                trace.files.push(File { layer, ..file.clone() });
                trace.files.len() as u32 - 1
            });
            trace.wishes.push(Wish { file: number, ..*wish });
        }
        trace
    }

    /// Reads one that may come from anywhere.
    ///
    /// # Errors
    /// [`LayerError`] when it is damaged, of another version, or larger than any that is written.
    pub fn decode(bytes: &[u8]) -> Result<Trace, LayerError> {
        let malformed = |at: usize, what: &str| LayerError::malformed(FORMAT, at as u64, what);
        limit("length of the trace", bytes.len(), MAX_LEN)?;
        let Some((covered, sum)) = bytes.split_last_chunk::<{ Digest::LEN }>() else {
            return Err(malformed(0, "it is too short"));
        };
        let Some((header, packed)) = covered.split_first_chunk::<HEADER_LEN>() else {
            return Err(malformed(0, "it is too short"));
        };
        let number = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        if !header.starts_with(MAGIC) {
            return Err(malformed(0, "the magic number is missing"));
        }
        if number(8) != VERSION {
            return Err(LayerError::Unsupported {
                what: format!("version {} of the trace", number(8)),
            });
        }
        if Digest::of(covered).as_bytes() != sum {
            return Err(malformed(covered.len(), "the checksum does not match"));
        }
        let raw_len = number(12) as usize;
        limit("length of the document", raw_len, MAX_RAW_LEN)?;
        let undecodable = |error: std::io::Error| LayerError::malformed(FORMAT, HEADER_LEN as u64, error.to_string());
        let mut raw = Vec::new();
        // One byte more shows that there is more.
        let stream = zstd_frames_within(packed, WINDOW_LOG).map_err(undecodable)?;
        let read = stream.take(raw_len as u64 + 1).read_to_end(&mut raw);
        if read.map_err(undecodable)? != raw_len {
            return Err(malformed(HEADER_LEN, "the document has another length"));
        }
        let trace: Trace = serde_json::from_slice(&raw)
            .map_err(|error| LayerError::malformed(FORMAT, HEADER_LEN as u64, error.to_string()))?;
        trace.check()?;
        Ok(trace)
    }

    fn check(&self) -> Result<(), LayerError> {
        let malformed = |what: &str| Err(LayerError::malformed(FORMAT, HEADER_LEN as u64, what));
        limit("number of wishes", self.wishes.len(), MAX_WISHES)?;
        limit("number of files", self.files.len(), self.wishes.len())?;
        limit("number of layers", self.layers.len(), MAX_LAYERS)?;
        for name in [&self.repository, &self.entry.program] {
            limit("length of a name", name.len(), MAX_NAME_LEN)?;
        }
        for file in &self.files {
            limit("length of a path", file.path.len(), MAX_PATH_LEN)?;
            if file.layer as usize >= self.layers.len() {
                return malformed("a file is in no layer");
            }
        }
        let mut bytes = 0u64;
        for wish in &self.wishes {
            let Some(file) = self.files.get(wish.file as usize) else {
                return malformed("a range is in no file");
            };
            let end = wish.offset.checked_add(wish.len);
            if wish.len == 0 || end.is_none_or(|end| end > file.size) {
                return malformed("a range is not in its file");
            }
            bytes = bytes.saturating_add(wish.len);
        }
        match bytes <= MAX_BYTES {
            true => Ok(()),
            false => malformed("it wishes for too many bytes"),
        }
    }
}

fn limit(what: &'static str, found: usize, max: usize) -> Result<(), LayerError> {
    match found > max {
        true => Err(LayerError::TooLarge {
            what,
            value: found as u64,
            limit: max as u64,
        }),
        false => Ok(()),
    }
}
