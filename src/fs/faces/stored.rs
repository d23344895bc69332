//! A chain's image on disk, and the proof of what it was made of.
//!
//! ```text
//! image      whole blocks of 512 bytes: what the kernel mounts; it does not look behind them
//! parts      40 each: bytes of the layer's data space u64, fingerprint of its index 32; the lowest layer first
//! magic       8  "LZLCHAIN"
//! made by    32  digest of the version of Lazuli that wrote the image, and of the addressing in it: with others, a new one is made
//! image_len   8  bytes of the image
//! dropped     8  extended attributes that the image does not hold
//! parts       4  number of parts
//! sha256     32  of everything before it
//! ```
//! Integers are little-endian. The kernel trusts what it mounts, so after a restart nothing of a file is used before its digest was
//! computed over all of it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::places::files_error;
use crate::fs::FsError;
use crate::layer::digest::Hasher;
use crate::layer::erofs::{Addressing, Image};
use crate::layer::merge::MAX_LAYERS;
use crate::layer::{BlobIndex, Digest};

const MAGIC: &[u8; 8] = b"LZLCHAIN";
const PART_LEN: usize = 8 + Digest::LEN;
/// Bytes of the fixed fields between the parts and the digest.
const FIXED_LEN: usize = 8 + Digest::LEN + 8 + 8 + 4;
/// Bytes that are hashed at a time.
const BUFFER_LEN: usize = 1 << 20;
/// Where in an image its UUID lies, in bytes: at 48 of the superblock, which begins at 1024.
const UUID_AT: usize = 1024 + 48;

/// UUID of an image.
pub(super) type Uuid = [u8; 16];

/// A layer that an image was made of: the bytes of its data space, and the fingerprint of its index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) data_size: u64,
    pub(super) fingerprint: Digest,
}

impl Part {
    pub(super) fn of(index: &BlobIndex) -> Self {
        Part {
            data_size: index.data_size(),
            fingerprint: index.fingerprint(),
        }
    }
}

/// What a stored chain says of itself.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) parts: Vec<Part>,
    pub(super) uuid: Uuid,
    pub(super) dropped_xattrs: u64,
}

/// UUID of the image `bytes`.
pub(super) fn uuid(bytes: &[u8]) -> Uuid {
    let field = bytes.get(UUID_AT..).and_then(|rest| rest.first_chunk::<16>());
    // The writer's images have one.
    field.copied().unwrap_or_default()
}

/// UUID of the image in `file`.
pub(super) fn uuid_of(file: &File) -> io::Result<Uuid> {
    let mut uuid = Uuid::default();
    file.read_exact_at(&mut uuid, UUID_AT as u64)?;
    Ok(uuid)
}

/// What stands behind `image` in its file.
pub(super) fn trailer(image: &Image, addressing: Addressing, parts: &[Part]) -> Vec<u8> {
    let mut out = Vec::with_capacity(parts.len() * PART_LEN + FIXED_LEN + Digest::LEN);
    for part in parts {
        out.extend_from_slice(&part.data_size.to_le_bytes());
        out.extend_from_slice(part.fingerprint.as_bytes());
    }
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(made_by(addressing).as_bytes());
    out.extend_from_slice(&(image.bytes.len() as u64).to_le_bytes());
    out.extend_from_slice(&image.dropped_xattrs.to_le_bytes());
    out.extend_from_slice(&(parts.len() as u32).to_le_bytes());
    let mut hasher = Hasher::new();
    hasher.update(&image.bytes);
    hasher.update(&out);
    out.extend_from_slice(hasher.finish().as_bytes());
    out
}

/// Reads and verifies the file at `path`, which must have been made with `addressing`. `Ok(None)`: there is none. The inner error says what
/// is wrong with it.
pub(super) fn load(path: &Path, addressing: Addressing) -> Result<Option<Result<Stored, &'static str>>, FsError> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(|source| files_error(path, source))?,
    };
    verify(&file, addressing)
        .map(Some)
        .map_err(|source| files_error(path, source))
}

fn verify(file: &File, addressing: Addressing) -> io::Result<Result<Stored, &'static str>> {
    let len = file.metadata()?.len();
    let Some(fixed_at) = len.checked_sub((FIXED_LEN + Digest::LEN) as u64) else {
        return Ok(Err("it is too short"));
    };
    let mut fixed = [0; FIXED_LEN];
    file.read_exact_at(&mut fixed, fixed_at)?;
    let mut rest = fixed.as_slice();
    if take::<8>(&mut rest) != *MAGIC {
        return Ok(Err("it does not end as it should"));
    }
    if take::<{ Digest::LEN }>(&mut rest) != *made_by(addressing).as_bytes() {
        return Ok(Err("another version of Lazuli made it, or one for another kernel"));
    }
    let image_len = u64::from_le_bytes(take(&mut rest));
    let dropped_xattrs = u64::from_le_bytes(take(&mut rest));
    let count = u32::from_le_bytes(take(&mut rest)) as usize;
    if count > MAX_LAYERS || image_len.checked_add((count * PART_LEN) as u64) != Some(fixed_at) {
        return Ok(Err("its length is wrong"));
    }

    let mut hasher = Hasher::new();
    let mut buffer = vec![0; BUFFER_LEN];
    let end = fixed_at + FIXED_LEN as u64;
    let mut at = 0;
    while at < end {
        let part = buffer.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
        file.read_exact_at(&mut buffer[..part], at)?;
        hasher.update(&buffer[..part]);
        at += part as u64;
    }
    let mut digest = [0; Digest::LEN];
    file.read_exact_at(&mut digest, end)?;
    if *hasher.finish().as_bytes() != digest {
        return Ok(Err("its digest is wrong"));
    }

    let mut parts = vec![0; count * PART_LEN];
    file.read_exact_at(&mut parts, image_len)?;
    let parts = parts.chunks_exact(PART_LEN).map(|mut part| Part {
        data_size: u64::from_le_bytes(take(&mut part)),
        fingerprint: Digest::from_bytes(take(&mut part)),
    });
    Ok(Ok(Stored {
        parts: parts.collect(),
        uuid: uuid_of(file)?,
        dropped_xattrs,
    }))
}

fn made_by(addressing: Addressing) -> Digest {
    let version = env!("CARGO_PKG_VERSION");
    Digest::of(format!("{version} {addressing:?}").as_bytes())
}

/// The next bytes of a record whose length is right.
fn take<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
    match bytes.split_first_chunk::<N>() {
        Some((head, tail)) => {
            *bytes = tail;
            *head
        }
        None => [0; N],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> (Vec<u8>, Vec<Part>) {
        let image = Image {
            bytes: (0..4096_u32).map(|i| i as u8).collect(),
            inodes: 1,
            dropped_xattrs: 3,
        };
        let parts: Vec<Part> = (0..5)
            .map(|i| Part {
                data_size: i * 1000,
                fingerprint: Digest::of(&[i as u8]),
            })
            .collect();
        let bytes = [image.bytes.clone(), trailer(&image, Addressing::Chunks, &parts)].concat();
        (bytes, parts)
    }

    fn loaded(bytes: &[u8]) -> Result<Stored, &'static str> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("1.chain");
        std::fs::write(&path, bytes).unwrap();
        load(&path, Addressing::Chunks).unwrap().unwrap()
    }

    #[test]
    fn what_is_stored_comes_back() {
        let (bytes, parts) = sample();
        let stored = loaded(&bytes).unwrap();
        assert_eq!((stored.parts, stored.dropped_xattrs), (parts, 3));
        assert_eq!(stored.uuid, uuid(&bytes));
        assert_eq!(stored.uuid[..4], [48, 49, 50, 51]);
        let load = |path: &str| load(Path::new(path), Addressing::Chunks);
        assert!(load("/nowhere/1.chain").unwrap().is_none());
        assert!(load("/dev/null/1.chain").is_err());
    }

    #[test]
    fn an_image_of_another_addressing_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("1.chain");
        std::fs::write(&path, sample().0).unwrap();
        load(&path, Addressing::Unified).unwrap().unwrap().unwrap_err();
    }

    #[test]
    fn no_byte_may_differ() {
        let (bytes, _) = sample();
        for at in (0..4096).step_by(997).chain(4096..bytes.len()) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x40;
            loaded(&damaged).unwrap_err();
        }
        for len in (0..bytes.len()).step_by(97) {
            loaded(&bytes[..len]).unwrap_err();
        }
        loaded(&[&bytes[..], b"x"].concat()).unwrap_err();
    }
}
