//! A tar, read as a stream, into names, attributes and the places of contents.
//!
//! [`TarIndexer`] takes the uncompressed bytes of a layer in pieces of any size. It keeps no content: a file's place is its offset
//! in the tar, so that the tar itself, byte for byte, is the layer's data space ([`super::index`]). Only files that a tar stores in
//! pieces (sparse ones) get a place of their own, behind the tar:
//!
//! ```text
//! 0 ........................ tar_size ... 4096-aligned ........................ data_size
//! the tar, with all contents  (zeros)    sparse files, expanded: 4096-aligned
//!                                        (512 if smaller than 4096)
//! ```
//!
//! [`TarLayout::copies`] says which bytes of the tar belong where there; all others are holes.
//!
//! Read are v7, ustar, star, PAX and GNU archives: long names and numbers, extended attributes, all four forms of sparse files. What
//! Go's reader, and so containerd, tolerates is tolerated: no end marker, no padding after the last content, anything after
//! the end marker, global PAX headers (ignored). Types that containerd does not unpack are refused, except for contiguous files.
//!
//! Memory: the tree ([`super::tree`]), 48 bytes for each piece of a sparse file, and, for the member at hand, at most 40 MiB: extended
//! headers of 1 MiB each, and the map of one sparse file.

pub(super) mod header;
mod member;
pub(super) mod pax;
mod sparse;

#[cfg(test)]
mod tests;

use super::index::MAX_DATA_SIZE;
use super::tree::{Entry, EntryKind, Tree, TreeBuilder};
use super::{Access, Checkpoint, Chunk, Codec, LayerError, LayerIndex};
use header::{BLOCK, Block, Header};
use member::{Member, Pending, SparseFile, Sparseness, checked_size};
use pax::SparseRecords;
use sparse::{Segment, TextMap};

const FORMAT: &str = "tar";
/// Longest extended header, in bytes, as in Go's reader.
const MAX_EXTENDED: u64 = 1 << 20;
/// Most pieces of sparse files that any layer may have: 1 GiB in single pages.
const MAX_COPIES: u64 = 256 << 10;
/// One more for so many bytes of the tar: no file system has smaller holes.
const BYTES_PER_COPY: u64 = 512;
/// Bytes that the list of pieces takes for one, while it grows.
const COPY_COST: u64 = 2 * size_of::<Copy>() as u64;
/// Alignment, in bytes, of expanded files of at least that size: what a page cache maps.
const PAGE: u64 = 4096;
/// A place marked with this bit is relative to the area of expanded files, whose beginning is known at the end.
const IN_AREA: u64 = 1 << 63;

/// Bytes of the tar that have to be copied to another place in the data space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copy {
    /// Where they are in the tar.
    pub from: u64,
    /// Where they belong in the data space, behind the tar.
    pub to: u64,
    /// How many there are.
    pub len: u64,
}

/// What is known of a tar at its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TarLayout {
    /// Names and attributes.
    pub tree: Tree,
    /// Bytes of the tar.
    pub tar_size: u64,
    /// Bytes of the data space.
    pub data_size: u64,
    /// What makes the area of expanded files, in order of `from` and of `to`.
    pub copies: Vec<Copy>,
}

impl TarLayout {
    /// The index of a layer with this tar. `chunks` are those of the whole data space, `blob_size` is in bytes.
    ///
    /// # Errors
    /// [`LayerError`] when the chunks do not fit the data space or the blob.
    pub fn into_index(
        self,
        access: Access,
        codec: Codec,
        chunks: Vec<Chunk>,
        blob_size: u64,
    ) -> Result<LayerIndex, LayerError> {
        self.into_index_with(access, codec, chunks, Vec::new(), blob_size)
    }

    /// Like [`TarLayout::into_index`], with the checkpoints that the chunks are decoded from.
    ///
    /// # Errors
    /// [`LayerError`] when the chunks do not fit the data space, the blob or the checkpoints.
    pub fn into_index_with(
        self,
        access: Access,
        codec: Codec,
        chunks: Vec<Chunk>,
        checkpoints: Vec<Checkpoint>,
        blob_size: u64,
    ) -> Result<LayerIndex, LayerError> {
        let mut parts = self.tree.into_parts(access, codec);
        parts.data_size = self.data_size;
        parts.blob_size = blob_size;
        parts.chunks = chunks;
        parts.checkpoints = checkpoints;
        LayerIndex::new(parts)
    }
}

/// Reads a tar that comes in pieces.
///
/// How the tar is cut into pieces makes no difference. After an error every further call fails with the same error.
pub struct TarIndexer {
    /// Bytes taken in.
    offset: u64,
    state: State,
    /// The block being filled, and how much of it is there.
    block: Block,
    filled: usize,
    /// Body of the extended header being read.
    body: Vec<u8>,
    pending: Pending,
    tree: TreeBuilder,
    copies: Vec<Copy>,
    /// Bytes of the area of expanded files so far.
    area: u64,
    failed: Option<LayerError>,
}

/// What the next bytes are.
#[derive(Debug)]
enum State {
    /// A header.
    Header,
    /// The block after a block of zeros.
    SecondZero,
    /// The body of an extended header, and its padding.
    Extended { kind: u8, left: u64, padding: u64 },
    /// An extension block of a sparse file's header.
    Extension(Box<SparseFile>),
    /// The map in front of a sparse file's data.
    Map(Box<SparseFile>, TextMap),
    /// Content that need not be looked at, and its padding.
    Content { left: u64, padding: u64 },
    /// Anything: the archive has ended.
    End,
}

impl Default for TarIndexer {
    fn default() -> Self {
        Self::new()
    }
}

impl TarIndexer {
    /// At the beginning of a tar.
    pub fn new() -> Self {
        Self::with_memory(u64::MAX)
    }

    /// At the beginning of a tar of which the names and attributes may take so many bytes.
    pub fn with_memory(limit: u64) -> Self {
        TarIndexer {
            offset: 0,
            state: State::Header,
            block: [0; BLOCK],
            filled: 0,
            body: Vec::new(),
            pending: Pending::default(),
            tree: TreeBuilder::with_memory(FORMAT, limit),
            copies: Vec::new(),
            area: 0,
            failed: None,
        }
    }

    /// Bytes of memory that what was read so far takes, or will take when it is finished: rather too many than too few.
    pub fn memory(&self) -> u64 {
        self.tree.memory() + COPY_COST * self.copies.len() as u64
    }

    /// Takes in the next bytes.
    ///
    /// # Errors
    /// [`LayerError`] when they are not those of a tar that can be read; it says where, and names the entry.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), LayerError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.take(bytes).inspect_err(|error| self.failed = Some(error.clone()))
    }

    fn take(&mut self, mut bytes: &[u8]) -> Result<(), LayerError> {
        if self.offset + bytes.len() as u64 > MAX_DATA_SIZE {
            return Err(LayerError::TooLarge {
                what: "uncompressed size of the layer",
                value: self.offset + bytes.len() as u64,
                limit: MAX_DATA_SIZE,
            });
        }
        while !bytes.is_empty() {
            let taken = match &mut self.state {
                State::End => bytes.len(),
                State::Content { left, padding } => {
                    let taken = (*left + *padding).min(bytes.len() as u64);
                    let content = taken.min(*left);
                    *left -= content;
                    *padding -= taken - content;
                    if *left + *padding == 0 {
                        self.state = State::Header;
                    }
                    taken as usize
                }
                State::Extended { left, .. } => {
                    let taken = (*left).min(bytes.len() as u64);
                    *left -= taken;
                    self.body.extend_from_slice(&bytes[..taken as usize]);
                    taken as usize
                }
                _ => {
                    let taken = (BLOCK - self.filled).min(bytes.len());
                    self.block[self.filled..self.filled + taken].copy_from_slice(&bytes[..taken]);
                    self.filled += taken;
                    taken
                }
            };
            self.offset += taken as u64;
            bytes = &bytes[taken..];
            if self.filled == BLOCK {
                self.filled = 0;
                self.block_complete()?;
            }
            // An extended header may be empty: its end comes with no byte of its own.
            if let State::Extended { kind, left: 0, padding } = self.state {
                self.extended_complete(kind)?;
                self.skip(0, padding);
            }
        }
        Ok(())
    }

    fn skip(&mut self, left: u64, padding: u64) {
        self.state = match left + padding {
            0 => State::Header,
            _ => State::Content { left, padding },
        };
    }

    fn block_complete(&mut self) -> Result<(), LayerError> {
        let at = self.offset - BLOCK as u64;
        match std::mem::replace(&mut self.state, State::Header) {
            State::SecondZero => {
                if self.block.iter().any(|&c| c != 0) {
                    return Err(malformed(at, "a single block of zeros is in the middle"));
                }
                self.state = State::End;
                Ok(())
            }
            State::Extension(mut file) => {
                let more = sparse::from_extension(&self.block, &mut file.map);
                match more.map_err(|problem| file.error(problem))? {
                    true => self.state = State::Extension(file),
                    false => self.sparse_complete(*file, 0)?,
                }
                Ok(())
            }
            State::Map(file, mut map) => {
                let done = map.push(&self.block).map_err(|problem| file.error(problem))?;
                self.map_continues(file, map, done)
            }
            _ if self.block.iter().all(|&c| c == 0) => {
                self.state = State::SecondZero;
                Ok(())
            }
            _ => {
                let header = header::parse(&self.block).map_err(|what| malformed(at, what))?;
                self.header(at, header)
            }
        }
    }

    fn header(&mut self, at: u64, header: Header) -> Result<(), LayerError> {
        if matches!(header.kind, b'x' | b'g' | b'L' | b'K') {
            let left = checked_size(at, &header.name, header.size)?;
            if left > MAX_EXTENDED {
                return Err(LayerError::TooLarge {
                    what: "length of an extended tar header",
                    value: left,
                    limit: MAX_EXTENDED,
                });
            }
            self.body.clear();
            if header.kind == b'g' {
                self.pending.global = header.name;
            }
            self.state = State::Extended {
                kind: header.kind,
                left,
                padding: padding(left),
            };
            return Ok(());
        }
        let gnu = header.gnu;
        let (member, records) = std::mem::take(&mut self.pending).apply(at, header)?;
        match member.kind {
            0 | b'0' | b'7' => self.regular(member, records),
            b'S' if !gnu => Err(member.error("it is sparse in another way than GNU tar's")),
            b'S' => {
                let mut file = Box::new(SparseFile {
                    member,
                    size: 0,
                    map: Vec::new(),
                });
                let (map, size, more) = sparse::from_header(&self.block).map_err(|problem| file.error(problem))?;
                (file.map, file.size) = (map, size);
                if more {
                    self.state = State::Extension(file);
                    return Ok(());
                }
                self.sparse_complete(*file, 0)
            }
            _ => {
                self.tree.add(at, &member.entry(member.special()?))?;
                self.skip(member.stored, padding(member.stored));
                Ok(())
            }
        }
    }

    fn regular(&mut self, mut member: Member, records: SparseRecords) -> Result<(), LayerError> {
        let sparseness = Sparseness::of(&records);
        let size = member.stored;
        if sparseness == Sparseness::None {
            let data = self.offset;
            self.tree
                .add(member.at, &member.entry(EntryKind::File { size, data }))?;
            self.skip(size, padding(size));
            return Ok(());
        }
        if !records.name.is_empty() {
            member.name = records.name;
        }
        let mut file = Box::new(SparseFile {
            member,
            size: records.size.or(records.real_size).unwrap_or(size),
            map: Vec::new(),
        });
        if sparseness == Sparseness::MapInData {
            return self.map_continues(file, TextMap::default(), None);
        }
        file.map = sparse::from_records(&records.count, &records.map).map_err(|problem| file.error(problem))?;
        self.sparse_complete(*file, 0)
    }

    fn extended_complete(&mut self, kind: u8) -> Result<(), LayerError> {
        let begin = self.offset - self.body.len() as u64;
        match kind {
            b'L' => self.pending.name = Some(header::text(&self.body).to_vec()).filter(|name| !name.is_empty()),
            b'K' => self.pending.link = Some(header::text(&self.body).to_vec()).filter(|link| !link.is_empty()),
            _ => {
                let pax = pax::parse(&self.body).map_err(|(at, what)| malformed(begin + at as u64, what))?;
                match kind {
                    // A global header is an entry to Go's reader, and ends what came before it.
                    b'g' => {
                        let path = pax.path.unwrap_or(std::mem::take(&mut self.pending).global);
                        self.tree.add(begin - BLOCK as u64, &nothing(&path))?;
                    }
                    _ => self.pending.pax = pax,
                }
            }
        }
        Ok(())
    }

    /// After a block of the map in front of a sparse file's data: with the map if it is complete.
    fn map_continues(
        &mut self,
        file: Box<SparseFile>,
        map: TextMap,
        done: Option<Vec<Segment>>,
    ) -> Result<(), LayerError> {
        let before = self.offset - file.member.at - BLOCK as u64;
        if let Some(map) = done {
            return self.sparse_complete(SparseFile { map, ..*file }, before);
        }
        if file.member.stored < before + BLOCK as u64 {
            return Err(file.error("its map does not end".into()));
        }
        self.state = State::Map(file, map);
        Ok(())
    }

    /// Adds a sparse file of which everything is known; its stored bytes come next, after `before` bytes of map.
    fn sparse_complete(&mut self, mut file: SparseFile, before: u64) -> Result<(), LayerError> {
        let stored = file.member.stored.saturating_sub(before);
        if let Err(problem) = sparse::check(&mut file.map, file.size, stored) {
            return Err(file.error(problem));
        }
        let size = file.size;
        let whole = size == stored;
        let data = if whole {
            self.offset
        } else {
            IN_AREA | self.expand(&file)?
        };
        self.tree
            .add(file.member.at, &file.member.entry(EntryKind::File { size, data }))?;
        self.skip(stored, padding(stored));
        Ok(())
    }

    /// Makes room for a sparse file; its place in the area of expanded files.
    fn expand(&mut self, file: &SparseFile) -> Result<u64, LayerError> {
        let align = if file.size < PAGE { BLOCK as u64 } else { PAGE };
        let place = self.area.next_multiple_of(align);
        let end = place.checked_add(file.size).filter(|end| *end <= MAX_DATA_SIZE);
        self.area = end.ok_or(LayerError::TooLarge {
            what: "size of all sparse files",
            value: place.saturating_add(file.size),
            limit: MAX_DATA_SIZE,
        })?;
        let copies = (self.copies.len() + file.map.len()) as u64;
        let limit = MAX_COPIES + self.offset / BYTES_PER_COPY;
        if copies > limit {
            return Err(LayerError::TooLarge {
                what: "number of pieces of sparse files, for the bytes so far,",
                value: copies,
                limit,
            });
        }
        let mut from = self.offset;
        for segment in &file.map {
            self.copies.push(Copy {
                from,
                to: place + segment.offset,
                len: segment.len,
            });
            from += segment.len;
        }
        Ok(place)
    }

    /// At the end of the tar.
    ///
    /// # Errors
    /// [`LayerError::Truncated`] when something is missing, [`LayerError::TooLarge`] when the data space is.
    pub fn finish(self) -> Result<TarLayout, LayerError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let missing = match &self.state {
            State::Header | State::SecondZero if self.filled > 0 => Some("a header"),
            State::Extended { .. } => Some("an extended header"),
            State::Extension(_) | State::Map(..) => Some("the map of a sparse file"),
            State::Content { left: 1.., .. } => Some("a file's content"),
            _ => None,
        };
        if let Some(what) = missing {
            return Err(LayerError::Truncated {
                format: FORMAT,
                length: self.offset,
                what: what.to_owned(),
            });
        }
        let (tar_size, mut copies) = (self.offset, self.copies);
        let mut tree = self.tree.finish();
        let mut data_size = tar_size;
        if self.area > 0 {
            let base = tar_size.next_multiple_of(PAGE);
            data_size = base + self.area;
            copies.iter_mut().for_each(|copy| copy.to += base);
            for inode in tree.inodes.iter_mut().filter(|inode| inode.is_reg()) {
                if inode.data & IN_AREA != 0 {
                    inode.data = (inode.data & !IN_AREA) + base;
                }
            }
        }
        if data_size > MAX_DATA_SIZE {
            return Err(LayerError::TooLarge {
                what: "uncompressed size of the layer",
                value: data_size,
                limit: MAX_DATA_SIZE,
            });
        }
        Ok(TarLayout {
            tree,
            tar_size,
            data_size,
            copies,
        })
    }
}

/// Name and size of the one file in a tar whose header this is.
pub(super) fn file_header(block: &[u8; 512]) -> Result<(Vec<u8>, u64), String> {
    let header = header::parse(block)?;
    match (header.kind, u64::try_from(header.size)) {
        (0 | b'0', Ok(size)) => Ok((header.name, size)),
        _ => Err("its tar does not begin with a file".to_owned()),
    }
}

/// A global header as an entry: it describes nothing, and yet takes its name's place.
fn nothing(path: &[u8]) -> Entry<'_> {
    Entry {
        path,
        kind: EntryKind::Nothing,
        mode: 0,
        uid: 0,
        gid: 0,
        mtime: 0,
        mtime_nsec: 0,
        xattrs: Vec::new(),
    }
}

fn malformed(at: u64, what: impl Into<String>) -> LayerError {
    LayerError::malformed(FORMAT, at, what)
}

fn padding(size: u64) -> u64 {
    size.next_multiple_of(BLOCK as u64) - size
}
