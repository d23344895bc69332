//! Content encodings. Lazuli asks for none; some hosts claim one all the same.
//!
//! Most claims are wrong: storage services keep the name that a blob was uploaded with (`aws-chunked`, `x-gzip` for a tar.gz), and the
//! bytes are the blob's. Where a proxy really has compressed a body, its length is another than the blob's, or only the digest tells.

use std::io::{self, Write};

use http::{HeaderMap, header};

/// Words that stand in this header and change no bytes.
const PLAIN: [&str; 11] = [
    "",
    "identity",
    "none",
    "null",
    "binary",
    "utf-8",
    "utf8",
    "7bit",
    "8bit",
    "application/octet-stream",
    "aws-chunked",
];

/// What an answer claims to be encoded with, in the order in which that was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Encodings(Vec<String>);

impl Encodings {
    /// What the head of an answer claims; `None` if that is nothing that changes bytes.
    pub(super) fn of(headers: &HeaderMap) -> Option<Self> {
        let names: Vec<String> = headers
            .get_all(header::CONTENT_ENCODING)
            .iter()
            .flat_map(|value| value.to_str().unwrap_or("?").split(','))
            .map(|name| name.trim().to_ascii_lowercase())
            .filter(|name| !PLAIN.contains(&name.as_str()))
            .collect();
        (!names.is_empty()).then_some(Encodings(names))
    }

    /// As the header has it.
    pub(super) fn text(&self) -> String {
        self.0.join(", ")
    }

    /// What undoes them.
    ///
    /// # Errors
    /// The name of one that is not known here.
    pub(super) fn decoder(&self) -> Result<Decoder, String> {
        let stages: Result<Vec<Stage>, String> = self.0.iter().rev().map(|name| Stage::new(name)).collect();
        stages.map(Decoder)
    }

    /// All of a small body, decoded; `None` if it is not so encoded, or has more than `limit` bytes then.
    pub(super) fn decode(&self, body: &[u8], limit: u64) -> Option<Vec<u8>> {
        let mut decoder = self.decoder().ok()?;
        let mut decoded = Vec::new();
        for piece in body.chunks(PIECE) {
            decoded.extend(decoder.push(piece).ok()?);
            if decoded.len() as u64 > limit {
                return None;
            }
        }
        Some(decoded)
    }
}

/// Bytes of a small body that are decoded at a time: they can become a thousand times as many.
const PIECE: usize = 4 << 10;

/// Undoes encodings, piece by piece.
pub(super) struct Decoder(Vec<Stage>);

enum Stage {
    Gzip(flate2::write::MultiGzDecoder<Vec<u8>>),
    Zlib(flate2::write::ZlibDecoder<Vec<u8>>),
    Zstd(zstd::stream::write::Decoder<'static, Vec<u8>>),
}

impl Decoder {
    /// What comes of the next bytes of the body.
    ///
    /// # Errors
    /// When the body is not so encoded.
    pub(super) fn push(&mut self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut stages = self.0.iter_mut();
        let Some(first) = stages.next() else {
            return Ok(bytes.to_vec());
        };
        stages.try_fold(first.push(bytes)?, |bytes, stage| stage.push(&bytes))
    }
}

impl Stage {
    fn new(name: &str) -> Result<Self, String> {
        match name {
            "gzip" | "x-gzip" => Ok(Stage::Gzip(flate2::write::MultiGzDecoder::new(Vec::new()))),
            "deflate" => Ok(Stage::Zlib(flate2::write::ZlibDecoder::new(Vec::new()))),
            "zstd" => zstd::stream::write::Decoder::new(Vec::new())
                .map(Stage::Zstd)
                .map_err(|_| name.to_owned()),
            other => Err(other.to_owned()),
        }
    }

    fn push(&mut self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        match self {
            Stage::Gzip(gzip) => {
                gzip.write_all(bytes)?;
                gzip.flush()?;
                Ok(std::mem::take(gzip.get_mut()))
            }
            Stage::Zlib(zlib) => {
                zlib.write_all(bytes)?;
                zlib.flush()?;
                Ok(std::mem::take(zlib.get_mut()))
            }
            Stage::Zstd(zstd) => {
                zstd.write_all(bytes)?;
                zstd.flush()?;
                Ok(std::mem::take(zstd.get_mut()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claimed(values: &[&str]) -> Option<Encodings> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(header::CONTENT_ENCODING, value.parse().unwrap());
        }
        Encodings::of(&headers)
    }

    #[test]
    fn words_that_change_nothing_are_no_encoding() {
        for values in [
            &[][..],
            &[""],
            &["identity"],
            &["None"],
            &["binary", "UTF-8"],
            &["aws-chunked"],
            &["aws-chunked,identity"],
        ] {
            assert_eq!(claimed(values), None, "{values:?}");
        }
        assert_eq!(claimed(&["X-GZIP"]).unwrap().text(), "x-gzip");
        assert_eq!(claimed(&["aws-chunked, gzip", "zstd"]).unwrap().text(), "gzip, zstd");
    }

    #[test]
    fn what_is_encoded_is_decoded_in_pieces() {
        let text: Vec<u8> = (0..100_000u32).flat_map(|n| (n / 3).to_le_bytes()).collect();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&text).unwrap();
        let gzip = gzip.finish().unwrap();
        let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
        zlib.write_all(&text).unwrap();
        let zlib = zlib.finish().unwrap();
        let zstd = zstd::encode_all(&text[..], 1).unwrap();
        let both = zstd::encode_all(&gzip[..], 1).unwrap();
        for (name, body) in [
            ("gzip", &gzip),
            ("deflate", &zlib),
            ("zstd", &zstd),
            ("gzip, zstd", &both),
        ] {
            let encodings = claimed(&[name]).unwrap();
            let mut decoder = encodings.decoder().unwrap();
            let decoded: Vec<u8> = body
                .chunks(777)
                .flat_map(|piece| decoder.push(piece).unwrap())
                .collect();
            assert!(decoded == text, "{name}");
            assert!(encodings.decode(body, text.len() as u64).unwrap() == text, "{name}");
            assert_eq!(encodings.decode(body, 1000), None, "{name} is bounded");
            assert!(encodings.decode(&text, u64::MAX).is_none(), "{name} is claimed only");
        }
        assert_eq!(claimed(&["br"]).unwrap().decoder().err(), Some("br".to_owned()));
    }
}
