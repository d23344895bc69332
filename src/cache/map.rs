//! The map file: which chunks of a layer are ready.
//!
//! # On disk
//! All integers are little-endian.
//!
//! ```text
//! 0   magic     8   "LZLREADY"
//! 8   version   4   1
//! 12  sealed    4   1: the bits are true and the data durable; 0: the bits are hints
//! 16  chunks    8   number of chunks
//! 24  index     32  digest of the index file that the bits belong to
//! 56  bits crc  4   CRC-32 of the bits; has a meaning only under a seal
//! 60  head crc  4   CRC-32 of bytes 0 to 59
//! 64  bits      8 * ceil(chunks / 64): words, least significant bit first
//! ```

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::bitmap::{Bitmap, WORD};
use crate::layer::Digest;

const MAGIC: &[u8; 8] = b"LZLREADY";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 64;
/// Bytes of a word of bits.
const WORD_LEN: usize = WORD / 8;

/// What a map file says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Saved {
    /// Whether the bits can be believed.
    pub sealed: bool,
    /// The bits.
    pub words: Vec<u64>,
}

/// A whole map file.
pub(super) fn encode(sealed: bool, chunks: usize, index: &Digest, words: &[u64]) -> Vec<u8> {
    let bits: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut out = Vec::with_capacity(HEADER_LEN + bits.len());
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&u32::from(sealed).to_le_bytes());
    out.extend_from_slice(&(chunks as u64).to_le_bytes());
    out.extend_from_slice(index.as_bytes());
    out.extend_from_slice(&crc32fast::hash(&bits).to_le_bytes());
    out.extend_from_slice(&crc32fast::hash(&out).to_le_bytes());
    out.extend_from_slice(&bits);
    out
}

/// Reads a map file that belongs to an index with `chunks` chunks and digest `index`; the error says what is wrong with it.
pub(super) fn decode(bytes: &[u8], chunks: usize, index: &Digest) -> Result<Saved, &'static str> {
    let (header, bits) = bytes.split_at_checked(HEADER_LEN).ok_or("its header is cut off")?;
    let u32_at = |at: usize| {
        header
            .get(at..at + 4)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u32::from_le_bytes)
    };
    if header.get(..8) != Some(MAGIC.as_slice()) {
        return Err("its magic number is missing");
    }
    if u32_at(8) != VERSION {
        return Err("its version is another");
    }
    if crc32fast::hash(&header[..60]) != u32_at(60) {
        return Err("the checksum of its header does not match");
    }
    if header.get(16..24) != Some((chunks as u64).to_le_bytes().as_slice())
        || header.get(24..56) != Some(index.as_bytes().as_slice())
    {
        return Err("it belongs to another index");
    }
    if bits.len() != chunks.div_ceil(WORD) * WORD_LEN {
        return Err("it has the wrong length");
    }
    let sealed = u32_at(12) == 1;
    if sealed && crc32fast::hash(bits) != u32_at(56) {
        return Err("the checksum of its bits does not match");
    }
    let words = bits
        .chunks_exact(WORD_LEN)
        .map(|word| word.try_into().map_or(0, u64::from_le_bytes))
        .collect();
    Ok(Saved { sealed, words })
}

/// The open map file of a layer.
pub(super) struct MapFile {
    file: File,
    chunks: usize,
    index: Digest,
    sealed: bool,
}

impl MapFile {
    /// Takes over a file of which [`decode`] or [`encode`] told that it is sealed or not.
    pub fn new(file: File, chunks: usize, index: Digest, sealed: bool) -> Self {
        MapFile {
            file,
            chunks,
            index,
            sealed,
        }
    }

    /// Breaks the seal, durably, before the first change of the data.
    pub fn unseal(&mut self) -> io::Result<()> {
        if self.sealed {
            let header = encode(false, self.chunks, &self.index, &[]);
            self.file.write_all_at(&header, 0)?;
            self.file.sync_data()?;
            self.sealed = false;
        }
        Ok(())
    }

    /// Writes the word of bits at position `at`. The map has to be without a seal.
    pub fn write_word(&self, at: usize, word: u64) -> io::Result<()> {
        self.file
            .write_all_at(&word.to_le_bytes(), (HEADER_LEN + at * WORD_LEN) as u64)
    }

    /// Writes all bits and a seal, durably. The data has to be durable already.
    pub fn seal(&mut self, ready: &Bitmap) -> io::Result<()> {
        if !self.sealed {
            let words: Vec<u64> = (0..ready.words()).map(|at| ready.word(at)).collect();
            // The bits first: a seal over older bits would be taken for damage, which costs more than bits without a seal.
            let bytes = encode(true, self.chunks, &self.index, &words);
            self.file.write_all_at(&bytes[HEADER_LEN..], HEADER_LEN as u64)?;
            self.file.sync_data()?;
            self.file.write_all_at(&bytes[..HEADER_LEN], 0)?;
            self.file.sync_data()?;
            self.sealed = true;
        }
        Ok(())
    }

    /// Whether the bits on disk can be believed after a crash.
    pub fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// Notes in the file's modification time that the layer was used now; the order of use outlives a restart that way.
    pub fn touch(&self) -> io::Result<()> {
        self.file.set_modified(std::time::SystemTime::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_is_read_back() {
        let index = Digest::of(b"index");
        let words = [5, u64::MAX];
        for sealed in [false, true] {
            let saved = decode(&encode(sealed, 100, &index, &words), 100, &index).unwrap();
            assert_eq!((saved.sealed, saved.words.as_slice()), (sealed, words.as_slice()));
        }
    }

    #[test]
    fn damage_is_noticed() {
        let index = Digest::of(b"index");
        let good = encode(true, 100, &index, &[5, 7]);
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 4;
            assert!(decode(&bad, 100, &index).is_err(), "byte {at}");
        }
        for len in 0..good.len() {
            assert!(decode(&good[..len], 100, &index).is_err(), "length {len}");
        }
        assert!(decode(&good, 99, &index).is_err());
        assert!(decode(&good, 100, &Digest::of(b"other")).is_err());
    }

    #[test]
    fn a_seal_is_broken_and_made() {
        let index = Digest::of(b"index");
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), encode(true, 3, &index, &[0])).unwrap();
        let handle = File::options().write(true).open(file.path()).unwrap();
        let mut map = MapFile::new(handle, 3, index, true);
        let read = || decode(&std::fs::read(file.path()).unwrap(), 3, &index).unwrap();
        map.unseal().unwrap();
        map.write_word(0, 2).unwrap();
        assert_eq!(
            read(),
            Saved {
                sealed: false,
                words: vec![2]
            }
        );
        map.seal(&Bitmap::from_words(3, &[6])).unwrap();
        assert_eq!(
            read(),
            Saved {
                sealed: true,
                words: vec![6]
            }
        );
    }
}
