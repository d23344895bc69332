//! How a layer is compressed: media types, magic numbers, and decoders whose memory has a bound.
//!
//! A whole layer is read through [`decoder`], one chunk of it through [`decode_member`]. Both read any number of gzip members or zstd
//! frames as one stream; skippable zstd frames give nothing; zeros after the last gzip member are padding.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::GzDecoder;

use super::index::MAX_CHUNK_LEN;
use super::{Codec, LayerError};

/// Compressed bytes that a decoder reads at a time.
const INPUT_BUFFER: usize = 128 << 10;
/// Largest zstd window, as a power of two: 128 MiB, what `zstd -d` accepts without being asked, and the largest level's default.
pub(super) const ZSTD_WINDOW_LOG_MAX: u32 = 27;
/// Bytes that decide what [`Compression::sniff`] answers.
pub const MAGIC_LEN: usize = 4;
/// Uncompressed bytes that are decoded, and forgotten, at a time.
const SKIP_BUFFER: usize = 32 << 10;

/// How a whole layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all: a tar.
    None,
    /// gzip.
    Gzip,
    /// Zstandard.
    Zstd,
}

impl Compression {
    /// What the first bytes of a layer show. What has no magic number is a tar. `None`: fewer than [`MAGIC_LEN`] bytes say nothing.
    pub fn sniff(head: &[u8]) -> Option<Compression> {
        Some(match head.first_chunk::<MAGIC_LEN>()? {
            [0x1f, 0x8b, 0x08, _] => Compression::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd] => Compression::Zstd,
            // A skippable frame, with which zstd:chunked layers may begin.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18] => Compression::Zstd,
            _ => Compression::None,
        })
    }
}

impl From<Compression> for Codec {
    fn from(compression: Compression) -> Codec {
        match compression {
            Compression::None => Codec::None,
            Compression::Gzip => Codec::Gzip,
            Compression::Zstd => Codec::Zstd,
        }
    }
}

/// What a media type says of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerMedia {
    /// How it says the layer is compressed; `None` where it leaves that open (Docker's `rootfs.diff.tar`). Registries hold layers
    /// whose type is wrong, so containerd looks at the first bytes ([`Compression::sniff`]) whenever the type names a compression.
    pub compression: Option<Compression>,
    /// Whether it is of a type that need not be distributed by registries. If the descriptor also has `urls`, the layer is
    /// [`Refusal::Foreign`].
    pub nondistributable: bool,
}

/// Why a layer is left to containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// It is encrypted.
    Encrypted,
    /// Its bytes are not in the registry.
    Foreign,
    /// It is in a format of nydus.
    Nydus,
    /// Its media type is not known.
    MediaType,
}

impl Refusal {
    /// A short word that never changes, for the label of a metric.
    pub fn word(self) -> &'static str {
        match self {
            Refusal::Encrypted => "encrypted",
            Refusal::Foreign => "foreign",
            Refusal::Nydus => "nydus",
            Refusal::MediaType => "media-type",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refusal::Encrypted => "an encrypted layer",
            Refusal::Foreign => "a foreign layer, whose bytes are not in the registry,",
            Refusal::Nydus => "a layer in a format of nydus",
            Refusal::MediaType => "a layer of unknown type",
        })
    }
}

/// Longest part of a media type that an error repeats, in characters.
const QUOTED_LEN: usize = 200;
/// Annotations that make a layer of any type a part of a nydus image.
const NYDUS_ANNOTATIONS: [&str; 2] = [
    "containerd.io/snapshot/nydus-bootstrap",
    "containerd.io/snapshot/nydus-blob",
];

/// Reads the media type of a layer. Parameters (`; charset=...`) are ignored.
///
/// # Errors
/// [`LayerError::Unsupported`] with the reason. [`refusal`] has the same reason as a word.
pub fn media_type(text: &str) -> Result<LayerMedia, LayerError> {
    classify(text).map_err(|refusal| {
        let text: String = text.chars().take(QUOTED_LEN).collect();
        LayerError::Unsupported {
            what: format!("{refusal} ({text:?})"),
        }
    })
}

/// Why a layer of this media type is left to containerd, if it is.
pub fn refusal(media_type: &str) -> Option<Refusal> {
    classify(media_type).err()
}

/// Why a layer with these annotations is left to containerd, if it is. Only their keys count.
pub fn annotations_refusal<'a>(mut keys: impl Iterator<Item = &'a str>) -> Option<Refusal> {
    keys.any(|key| NYDUS_ANNOTATIONS.contains(&key))
        .then_some(Refusal::Nydus)
}

fn classify(text: &str) -> Result<LayerMedia, Refusal> {
    let essence = text.split(';').next().unwrap_or_default().trim();
    let (compression, nondistributable) = match essence {
        "application/vnd.oci.image.layer.v1.tar" => (Some(Compression::None), false),
        "application/vnd.oci.image.layer.v1.tar+gzip" => (Some(Compression::Gzip), false),
        "application/vnd.oci.image.layer.v1.tar+zstd" => (Some(Compression::Zstd), false),
        "application/vnd.oci.image.layer.nondistributable.v1.tar" => (Some(Compression::None), true),
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip" => (Some(Compression::Gzip), true),
        "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd" => (Some(Compression::Zstd), true),
        "application/vnd.docker.image.rootfs.diff.tar" => (None, false),
        "application/vnd.docker.image.rootfs.diff.tar.gzip" => (Some(Compression::Gzip), false),
        "application/vnd.docker.image.rootfs.diff.tar.zstd" => (Some(Compression::Zstd), false),
        "application/vnd.docker.image.rootfs.foreign.diff.tar" => (None, true),
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip" => (Some(Compression::Gzip), true),
        "application/vnd.docker.image.rootfs.foreign.diff.tar.zstd" => (Some(Compression::Zstd), true),
        _ if essence.split('+').skip(1).any(|suffix| suffix == "encrypted") => return Err(Refusal::Encrypted),
        _ if essence.contains(".nydus.") => return Err(Refusal::Nydus),
        _ => return Err(Refusal::MediaType),
    };
    Ok(LayerMedia {
        compression,
        nondistributable,
    })
}

/// Reads `input` uncompressed. Errors of `input` pass through; an error in its bytes is [`io::ErrorKind::InvalidData`] or
/// [`io::ErrorKind::InvalidInput`], and an early end [`io::ErrorKind::UnexpectedEof`].
///
/// Nothing is read before the first read. A zstd frame that asks for a window of more than 128 MiB is refused.
pub fn decoder(compression: Compression, input: impl Read + Send + 'static) -> Box<dyn Read + Send> {
    match compression {
        Compression::None => Box::new(input),
        Compression::Gzip => Box::new(GzipMembers::new(BufReader::with_capacity(INPUT_BUFFER, input))),
        Compression::Zstd => match zstd_frames(BufReader::with_capacity(INPUT_BUFFER, input)) {
            Ok(frames) => Box::new(frames),
            Err(error) => Box::new(Failed(Some(error))),
        },
    }
}

/// The `len` uncompressed bytes after the first `skip` of `compressed`. No more than those are decoded, nor memory for more taken.
///
/// # Errors
/// [`LayerError::TooLarge`] when `skip` or `len` is over [`MAX_CHUNK_LEN`]; [`LayerError::Truncated`] when `compressed` has not so many
/// bytes, and [`LayerError::Malformed`] when it cannot be decoded.
pub fn decode_member(codec: Codec, compressed: &[u8], skip: u32, len: u32) -> Result<Vec<u8>, LayerError> {
    for (what, value) in [("length of a chunk", len), ("bytes in front of a chunk", skip)] {
        if value > MAX_CHUNK_LEN {
            return Err(LayerError::TooLarge {
                what,
                value: value.into(),
                limit: MAX_CHUNK_LEN.into(),
            });
        }
    }
    let (format, result) = match codec {
        Codec::None => ("chunk", take(compressed, skip, len)),
        Codec::Gzip => ("gzip", take(GzipMembers::new(compressed), skip, len)),
        Codec::Zstd => (
            "zstd",
            zstd_frames(compressed).and_then(|frames| take(frames, skip, len)),
        ),
        Codec::GzipSpans => {
            return Err(LayerError::malformed(
                "gzip span",
                0,
                "it cannot be decoded without its checkpoint",
            ));
        }
    };
    result.map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => LayerError::Truncated {
            format,
            length: compressed.len() as u64,
            what: format!("a chunk of {len} bytes after {skip}"),
        },
        _ => LayerError::malformed(format, 0, error.to_string()),
    })
}

/// The gzip members in `compressed`, uncompressed, as one stream.
pub(super) fn gzip_members(compressed: &[u8]) -> impl Read {
    GzipMembers::new(compressed)
}

fn take(mut stream: impl Read, skip: u32, len: u32) -> io::Result<Vec<u8>> {
    let mut left = skip as usize;
    let mut scratch = [0; SKIP_BUFFER];
    while left > 0 {
        let part = left.min(SKIP_BUFFER);
        stream.read_exact(&mut scratch[..part])?;
        left -= part;
    }
    let mut bytes = vec![0; len as usize];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// The zstd frames in `input`, uncompressed, as one stream.
pub(super) fn zstd_frames<R: BufRead>(input: R) -> io::Result<zstd::Decoder<'static, R>> {
    zstd_frames_within(input, ZSTD_WINDOW_LOG_MAX)
}

/// The same, of frames that ask for a window of no more than two to the power of `window_log` bytes: that much a decoder allocates.
pub(super) fn zstd_frames_within<R: BufRead>(input: R, window_log: u32) -> io::Result<zstd::Decoder<'static, R>> {
    let mut frames = zstd::Decoder::with_buffer(input)?;
    frames.window_log_max(window_log)?;
    Ok(frames)
}

/// Any number of gzip members, but at least one; then zeros, or nothing.
struct GzipMembers<R> {
    state: Gzip<R>,
    /// Whether a member was read: at the beginning, the end of the input is an error.
    begun: bool,
}

enum Gzip<R> {
    /// The next byte belongs to a member's header, or to the padding.
    Between(R),
    Member(Box<GzDecoder<R>>),
    End,
}

impl<R: BufRead> GzipMembers<R> {
    fn new(input: R) -> Self {
        GzipMembers {
            state: Gzip::Between(input),
            begun: false,
        }
    }

    /// Whether there is another member. Reads padding up to its end.
    fn next_member(input: &mut R, begun: bool) -> io::Result<bool> {
        loop {
            let bytes = match input.fill_buf() {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            match bytes.first() {
                None if begun => return Ok(false),
                Some(0) if begun => {
                    let len = bytes.len();
                    if bytes.iter().any(|&c| c != 0) {
                        return Err(io::Error::new(
                            io::ErrorKind::InvalidData,
                            "there is something after the last gzip member that is neither a member nor zeros",
                        ));
                    }
                    input.consume(len);
                }
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
                Some(_) => return Ok(true),
            }
        }
    }
}

impl<R: BufRead> Read for GzipMembers<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            match &mut self.state {
                Gzip::Between(input) => {
                    let more = Self::next_member(input, self.begun)?;
                    let Gzip::Between(input) = std::mem::replace(&mut self.state, Gzip::End) else {
                        return Ok(0);
                    };
                    if more {
                        self.begun = true;
                        self.state = Gzip::Member(Box::new(GzDecoder::new(input)));
                    }
                }
                Gzip::Member(member) => match member.read(buf)? {
                    0 => {
                        let Gzip::Member(member) = std::mem::replace(&mut self.state, Gzip::End) else {
                            return Ok(0);
                        };
                        self.state = Gzip::Between(member.into_inner());
                    }
                    len => return Ok(len),
                },
                Gzip::End => return Ok(0),
            }
        }
    }
}

/// A decoder that could not be made: its first read says why.
struct Failed(Option<io::Error>);

impl Read for Failed {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(self.0.take().unwrap_or_else(|| io::ErrorKind::InvalidInput.into()))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd_frame(data: &[u8]) -> Vec<u8> {
        zstd::encode_all(data, 1).unwrap()
    }

    const SKIPPABLE: &[u8] = &[0x53, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3];

    fn decoded(compression: Compression, bytes: Vec<u8>) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        decoder(compression, io::Cursor::new(bytes)).read_to_end(&mut out)?;
        Ok(out)
    }

    /// Gives one byte at a time, and is interrupted before each.
    struct Trickle(Vec<u8>, bool);

    impl Read for Trickle {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            self.1 = !self.1;
            if self.1 {
                return Err(io::ErrorKind::Interrupted.into());
            }
            if self.0.is_empty() || buf.is_empty() {
                return Ok(0);
            }
            buf[0] = self.0.remove(0);
            Ok(1)
        }
    }

    #[test]
    fn magic_numbers() {
        assert_eq!(Compression::sniff(&gzip(b"")), Some(Compression::Gzip));
        assert_eq!(Compression::sniff(&zstd_frame(b"")), Some(Compression::Zstd));
        assert_eq!(Compression::sniff(SKIPPABLE), Some(Compression::Zstd));
        assert_eq!(Compression::sniff(b"etc/passwd\0"), Some(Compression::None));
        assert_eq!(Compression::sniff(&[0x1f, 0x8b, 8]), None);
    }

    #[test]
    fn media_types() {
        for (text, compression, nondistributable) in [
            ("application/vnd.oci.image.layer.v1.tar", Some(Compression::None), false),
            (
                "application/vnd.oci.image.layer.v1.tar+gzip",
                Some(Compression::Gzip),
                false,
            ),
            (
                "application/vnd.oci.image.layer.v1.tar+zstd; x=y",
                Some(Compression::Zstd),
                false,
            ),
            (
                "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
                Some(Compression::Gzip),
                true,
            ),
            ("application/vnd.docker.image.rootfs.diff.tar", None, false),
            (
                "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
                Some(Compression::Gzip),
                true,
            ),
        ] {
            let expected = LayerMedia {
                compression,
                nondistributable,
            };
            assert_eq!(media_type(text), Ok(expected), "{text}");
            assert_eq!(refusal(text), None);
        }
        for (text, word) in [
            ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "encrypted"),
            ("application/vnd.oci.image.layer.nydus.blob.v1", "nydus"),
            ("application/vnd.oci.image.layer.v1.erofs", "media-type"),
            ("", "media-type"),
        ] {
            assert_eq!(refusal(text).map(Refusal::word), Some(word), "{text}");
            let error = media_type(text).unwrap_err().to_string();
            assert!(error.contains(text) && error.ends_with("is not supported"), "{error}");
        }
        let keys = ["containerd.io/snapshot/nydus-bootstrap", "other"];
        assert_eq!(annotations_refusal(keys.into_iter()), Some(Refusal::Nydus));
        assert_eq!(annotations_refusal(["other"].into_iter()), None);
    }

    #[test]
    fn members_frames_and_padding_are_one_stream() {
        let members = [gzip(b"ab"), gzip(b""), gzip(b"cd")].concat();
        assert_eq!(decoded(Compression::Gzip, members.clone()).unwrap(), b"abcd");
        let padded = [&members[..], &[0; 3000]].concat();
        assert_eq!(decoded(Compression::Gzip, padded.clone()).unwrap(), b"abcd");
        let frames = [SKIPPABLE, &zstd_frame(b"ab"), SKIPPABLE, &zstd_frame(b"cd"), SKIPPABLE].concat();
        assert_eq!(decoded(Compression::Zstd, frames.clone()).unwrap(), b"abcd");
        assert_eq!(decoded(Compression::None, b"abcd".to_vec()).unwrap(), b"abcd");
        for (compression, bytes) in [(Compression::Gzip, padded), (Compression::Zstd, frames)] {
            let mut out = Vec::new();
            let mut stream = decoder(compression, Trickle(bytes, false));
            stream.read_to_end(&mut out).unwrap();
            assert_eq!(out, b"abcd");
            assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0, "the end stays the end");
        }
    }

    #[test]
    fn damage_and_early_ends_are_errors() {
        let gz = gzip(&b"some text ".repeat(100));
        let frame = zstd_frame(&b"some text ".repeat(100));
        for len in 0..gz.len() {
            let error = decoded(Compression::Gzip, gz[..len].to_vec()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{len}: {error}");
        }
        // A zstd stream of no frames is empty; its diff id still has to be right.
        for len in 1..frame.len() {
            assert!(decoded(Compression::Zstd, frame[..len].to_vec()).is_err(), "{len}");
        }
        for at in [0, 1, 12, gz.len() - 8, gz.len() - 1] {
            let mut bytes = gz.clone();
            bytes[at] ^= 0x55;
            assert!(decoded(Compression::Gzip, bytes).is_err(), "{at}");
        }
        assert!(decoded(Compression::Gzip, [&gz[..], b"\0\0x"].concat()).is_err());
        assert!(decoded(Compression::Gzip, [&gz[..], b"x"].concat()).is_err());
        assert!(decoded(Compression::Zstd, [&frame[..], b"garbage"].concat()).is_err());
    }

    #[test]
    fn a_window_over_the_limit_is_refused() {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.include_contentsize(false).unwrap();
        encoder.window_log(28).unwrap();
        encoder.write_all(&[7; 1000]).unwrap();
        let error = decoded(Compression::Zstd, encoder.finish().unwrap()).unwrap_err();
        assert!(error.to_string().contains("much memory"), "{error}");
    }

    #[test]
    fn one_chunk_of_a_member() {
        let data: Vec<u8> = (0..200_000u32).map(|i| (i / 7) as u8).collect();
        let (a, b) = data.split_at(70_000);
        for (codec, bytes) in [
            (Codec::None, data.clone()),
            (Codec::Gzip, [gzip(a), gzip(b)].concat()),
            (Codec::Zstd, [zstd_frame(a), zstd_frame(b)].concat()),
        ] {
            for (skip, len) in [(0, 1), (0, 200_000), (65_000, 10_000), (199_999, 1), (200_000, 0)] {
                let chunk = decode_member(codec, &bytes, skip, len).unwrap();
                assert_eq!(chunk, &data[skip as usize..][..len as usize], "{codec:?} {skip}+{len}");
            }
            for (skip, len) in [(0, 200_001), (200_001, 0), (150_000, 60_000)] {
                let error = decode_member(codec, &bytes, skip, len).unwrap_err();
                assert!(matches!(error, LayerError::Truncated { .. }), "{error}");
            }
            let error = decode_member(codec, &bytes, 0, MAX_CHUNK_LEN + 1).unwrap_err();
            assert!(matches!(error, LayerError::TooLarge { .. }), "{error}");
        }
        // What comes after the chunk is not looked at.
        let gz = gzip(&data);
        assert_eq!(
            decode_member(Codec::Gzip, &gz[..gz.len() - 20], 0, 1000).unwrap(),
            &data[..1000]
        );
        assert!(matches!(
            decode_member(Codec::Gzip, b"not gzip at all", 0, 1),
            Err(LayerError::Malformed { format: "gzip", .. })
        ));
    }
}
