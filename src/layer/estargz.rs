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
    let json = unpack(member)?;
    toc::check_digest("the eStargz table of contents", &json, expected)?;
    let dialect = Dialect {
        codec: Codec::Gzip,
        stargz: true,
    };
    toc::index(&json, &dialect, end, blob_size)
}

/// The JSON in the member. It is not to be trusted yet.
fn unpack(member: &[u8]) -> Result<Vec<u8>, LayerError> {
    let failed = |what: &str, error: std::io::Error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => LayerError::Truncated {
            format: FORMAT,
            length: member.len() as u64,
            what: what.to_owned(),
        },
        _ => LayerError::malformed(FORMAT, 0, format!("{what}: {error}")),
    };
    let mut tar = gzip_members(member);
    let mut header = [0; 512];
    tar.read_exact(&mut header)
        .map_err(|error| failed("the header of its tar", error))?;
    let (name, size) = tar::file_header(&header).map_err(|what| LayerError::malformed(FORMAT, 0, what))?;
    if name != TOC_NAME {
        let what = format!("its tar holds {}, not {}", quoted(&name), quoted(TOC_NAME));
        return Err(LayerError::malformed(FORMAT, 0, what));
    }
    toc::check_len("size of the eStargz table of contents", size)?;
    let mut json = Vec::new();
    tar.take(size)
        .read_to_end(&mut json)
        .map_err(|error| failed("its JSON", error))?;
    if (json.len() as u64) < size {
        return Err(failed("its JSON", std::io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(json)
}
