//! eStargz: a tar.gz of many gzip members with a table of contents (TOC), from which single files can be had.
//!
//! A blob is: gzip members with the entries of a tar (a member begins where a file's content or a chunk of it begins), the member with
//! the TOC (a tar of one file, `stargz.index.json`), and a footer that says where the TOC is ([`find_toc`]). The digest of the TOC's
//! JSON is in the image's manifest ([`TOC_DIGEST_ANNOTATION`]). What the JSON means is told in [`super::toc`].
//!
//! The member with the TOC may also be in another image of the same repository, whose tag has [`EXTERNAL_TOC_SUFFIX`] at its end: there
//! it is the layer whose annotation [`EXTERNAL_TOC_LAYER_ANNOTATION`] names the layer that it belongs to.

mod footer;

#[cfg(test)]
mod tests;

use std::io::Read;

use super::compression::gzip_members;
use super::toc::{self, Dialect, MAX_TOC_LEN, TOC_NAME, TocIndex, TocLocation};
use super::tree::quoted;
use super::{Codec, Digest, LayerError, tar};
pub use footer::{EXTERNAL_FOOTER_LEN, FOOTER_LEN_MAX, Footer, find_toc};

const FORMAT: &str = "TOC";
/// Annotation of a layer's descriptor with the digest of the JSON of its table of contents.
pub const TOC_DIGEST_ANNOTATION: &str = "containerd.io/snapshot/stargz/toc.digest";
/// What a tag has at its end, after the tag of an image, if it names the image with the tables of contents of that image's layers.
pub const EXTERNAL_TOC_SUFFIX: &str = "-esgztoc";
/// Annotation in such an image: digest of the layer whose table of contents this layer is.
pub const EXTERNAL_TOC_LAYER_ANNOTATION: &str = "containerd.io/snapshot/stargz/layer.digest";

/// The index of an eStargz layer, from the gzip `member` that holds the table of contents. The contents end at `end` of a blob of
/// `blob_size` bytes: where the member is, or, if it is elsewhere, where the footer is. `expected` is the digest of the table's JSON, as
/// the image's manifest has it.
///
/// # Errors
/// [`LayerError::DigestMismatch`] when the table is not the expected one, [`LayerError::Truncated`] when the member ends early;
/// another [`LayerError`] when the table cannot be used: then the layer can still be read as a tar.
pub fn index_from_toc(member: &[u8], end: u64, blob_size: u64, expected: &Digest) -> Result<TocIndex, LayerError> {
    index_from_toc_within(member, end, blob_size, expected, u64::MAX)
}

/// The same, with no more than `memory` bytes besides the member.
///
/// # Errors
/// As [`index_from_toc`], and [`LayerError::TooLarge`] when it takes more.
pub fn index_from_toc_within(
    member: &[u8],
    end: u64,
    blob_size: u64,
    expected: &Digest,
    memory: u64,
) -> Result<TocIndex, LayerError> {
    let (mut tar, size) = open(member)?;
    let memory = toc::memory_beside(size, memory)?;
    let json = unpack(member, &mut tar, size)?;
    toc::check_digest("the eStargz table of contents", &json, expected)?;
    let dialect = Dialect {
        codec: Codec::Gzip,
        stargz: true,
    };
    toc::index(&json, &dialect, end, blob_size, memory)
}

/// Bytes of memory that [`index_from_toc`] takes for a member besides the member itself, as the header of its tar says.
///
/// # Errors
/// [`LayerError`] when it does not begin with a table of contents.
pub fn memory_for(member: &[u8]) -> Result<u64, LayerError> {
    let (_, size) = open(member)?;
    Ok(toc::memory_for(size))
}

fn failed(member: &[u8], what: &str, error: std::io::Error) -> LayerError {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => LayerError::Truncated {
            format: FORMAT,
            length: member.len() as u64,
            what: what.to_owned(),
        },
        _ => LayerError::malformed(FORMAT, 0, format!("{what}: {error}")),
    }
}

/// The tar in the member behind its header, and the length of the JSON that comes next.
fn open(member: &[u8]) -> Result<(impl Read, u64), LayerError> {
    let mut tar = gzip_members(member);
    let mut header = [0; 512];
    tar.read_exact(&mut header)
        .map_err(|error| failed(member, "the header of its tar", error))?;
    let (name, size) = tar::file_header(&header).map_err(|what| LayerError::malformed(FORMAT, 0, what))?;
    if name != TOC_NAME {
        let what = format!("its tar holds {}, not {}", quoted(&name), quoted(TOC_NAME));
        return Err(LayerError::malformed(FORMAT, 0, what));
    }
    toc::check_len("size of the eStargz table of contents", size)?;
    Ok((tar, size))
}

/// The JSON in the member. It is not to be trusted yet.
fn unpack(member: &[u8], tar: impl Read, size: u64) -> Result<Vec<u8>, LayerError> {
    let mut json = Vec::with_capacity(size as usize);
    tar.take(size)
        .read_to_end(&mut json)
        .map_err(|error| failed(member, "its JSON", error))?;
    if (json.len() as u64) < size {
        return Err(failed(member, "its JSON", std::io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(json)
}
