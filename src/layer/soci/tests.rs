//! Indexes that SOCI's own tool made of two layers, ones made here, and damaged ones.

use std::io::Read;

use flate2::read::MultiGzDecoder;
use proptest::prelude::*;

use super::*;
use crate::layer::checkpoint::tests::{content, gzip, members};
use crate::layer::checkpoint::{decode, verify};
use crate::layer::testing::{Tar, picture};
use crate::layer::{Compression, TarIndexer};

/// Name of the tool in the zTOCs of the vectors.
const TOOL: &str = "AWS SOCI CLI v0.2";

struct Vector {
    blob: &'static [u8],
    tar: Vec<u8>,
    /// zTOCs with the span size each was made with.
    ztocs: [(u64, &'static [u8]); 2],
}

fn vectors() -> [Vector; 2] {
    macro_rules! blob {
        ($dir:literal, $hex:literal) => {
            include_bytes!(concat!(
                "../../../tests/vectors/soci/",
                $dir,
                "/blobs/sha256/",
                $hex
            ))
            .as_slice()
        };
    }
    let vector = |blob: &'static [u8], v1, v2| {
        let mut tar = Vec::new();
        MultiGzDecoder::new(blob).read_to_end(&mut tar).unwrap();
        Vector {
            blob,
            tar,
            ztocs: [(131_072, v1), (65_536, v2)],
        }
    };
    [
        vector(
            blob!("v2", "c0f1ef42ac411f82bee5baa80e626073690699f05561a1c25bb4d6a4b8de3aeb"),
            blob!("v1", "da691f31c9ac9004b0bb2ea85ed4ea80225913470dd4a0ab1ece1a726acbd7dd"),
            blob!("v2", "f03434983abd22f2d08d118c13f6a40c2fffc2af2a383408aecfd4d5edbe2f88"),
        ),
        vector(
            blob!("v2", "0d9219c355de9bb426e38b176495e018c1d1c0a018a3a13ff0cde2e4c68ebfbd"),
            blob!("v1", "1c5a9414425f1b258e2254978056a351d9bea0d12ac148e70f7ca3b14e188681"),
            blob!("v2", "beb334392bcc917317fc89af8fe5a691da27b1229d2c5b3f76920901b72234a5"),
        ),
    ]
}

/// The index as the tar itself gives it.
fn own(tar: &[u8]) -> String {
    let mut indexer = TarIndexer::new();
    indexer.push(tar).unwrap();
    let index = indexer
        .finish()
        .unwrap()
        .into_index(Access::Ranges, Codec::None, Vec::new(), 0);
    picture(&index.unwrap())
}

/// The bytes of a chunk, verified as they are when they are fetched.
fn fetch(index: &LayerIndex, windows: &Windows, chunk: &Chunk, blob: &[u8]) -> Result<Vec<u8>, LayerError> {
    let bytes = &blob[chunk.blob_offset as usize..chunk.blob_end() as usize];
    if index.codec() == Codec::None {
        assert_eq!(Digest::of(bytes), chunk.digest);
        return Ok(bytes.to_vec());
    }
    let (at, checkpoint) = index.checkpoint(chunk).unwrap();
    verify(checkpoint, bytes)?;
    decode(
        checkpoint.entry,
        bytes,
        &windows.window(at, checkpoint)?,
        chunk.skip,
        chunk.data_len,
    )
}

/// The whole data space.
fn all(index: &LayerIndex, windows: &Windows, blob: &[u8]) -> Vec<u8> {
    let mut data = Vec::new();
    for chunk in index.chunks() {
        assert_eq!(chunk.data_offset, data.len() as u64, "spans leave nothing out");
        data.extend(fetch(index, windows, chunk, blob).unwrap());
    }
    assert_eq!(data.len() as u64, index.data_size());
    data
}

fn build(blob: &[u8], compression: Compression, span_size: u64, piece: usize) -> Result<Vec<u8>, LayerError> {
    let mut builder = ZtocBuilder::new(compression, span_size, TOOL).unwrap();
    for bytes in blob.chunks(piece) {
        builder.push(bytes)?;
    }
    builder.finish()
}

#[test]
fn indexes_of_socis_own_tool_give_every_byte_and_name() {
    for vector in vectors() {
        for (span_size, bytes) in vector.ztocs {
            let (index, windows) = index_from_ztoc(bytes, vector.blob.len() as u64, true).unwrap();
            assert!(index.chunks().len() > 3, "{span_size}");
            let data = all(&index, &windows, vector.blob);
            assert!(data == vector.tar[..data.len()]);
            assert!(
                vector.tar[data.len()..].iter().all(|&byte| byte == 0),
                "behind the end of the archive"
            );
            assert_eq!(picture(&index), own(&vector.tar));
        }
    }
}

#[test]
fn random_ranges_of_the_vectors() {
    let mut seed = 7u64;
    for vector in vectors() {
        let (index, windows) = index_from_ztoc(vector.ztocs[1].1, vector.blob.len() as u64, true).unwrap();
        let chunks: Vec<Vec<u8>> = index
            .chunks()
            .iter()
            .map(|chunk| fetch(&index, &windows, chunk, vector.blob).unwrap())
            .collect();
        for _ in 0..500 {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let offset = (seed >> 20) % index.data_size();
            let len = ((seed >> 8) & 0xf_ffff).min(index.data_size() - offset);
            let mut read = vec![0; len as usize];
            for at in index.chunks_at(offset, len) {
                let chunk = &index.chunks()[at];
                let (from, to) = (chunk.data_offset.max(offset), chunk.data_end().min(offset + len));
                read[(from - offset) as usize..(to - offset) as usize].copy_from_slice(
                    &chunks[at][(from - chunk.data_offset) as usize..(to - chunk.data_offset) as usize],
                );
            }
            assert!(
                read == vector.tar[offset as usize..(offset + len) as usize],
                "{offset}+{len}"
            );
        }
    }
}

#[test]
fn what_is_written_here_is_what_socis_own_tool_writes() {
    for vector in vectors() {
        for (span_size, theirs) in vector.ztocs {
            let theirs_read = Ztoc::parse(theirs).unwrap();
            let tool = String::from_utf8(theirs_read.tool.to_vec()).unwrap();
            assert_eq!(tool, TOOL);
            assert!(write::encode(&theirs_read) == theirs, "the layout");
            for piece in [1 << 20, 977] {
                let ours = build(vector.blob, Compression::Gzip, span_size, piece).unwrap();
                let read = Ztoc::parse(&ours).unwrap();
                assert_eq!(read.files, theirs_read.files);
                assert_eq!(read.digests, theirs_read.digests);
                assert!(ours == theirs, "{span_size}");
            }
        }
    }
}

/// A tar with something of everything, and `data` as its contents.
fn sample(data: &[u8]) -> Vec<u8> {
    let mut tar = Tar::default();
    tar.dir("etc/", 0o755).dir("opt/", 0o700);
    for (at, part) in data.chunks(50_000).enumerate() {
        tar.file(&format!("opt/{at}"), part);
    }
    tar.pax(&[
        ("SCHILY.xattr.user.note", b"lazuli"),
        ("mtime", b"1700000000.5"),
        ("path", "opt/\u{e4}".as_bytes()),
    ]);
    tar.file("opt/a", b"with an attribute");
    tar.symlink("opt/link", "0").hardlink("opt/hard", "opt/0");
    tar.file("etc/.wh.gone", b"").file("opt/0", b"replaced").end();
    tar.0.clone()
}

#[test]
fn layers_of_other_writers_come_back() {
    let tar = sample(&content(1 << 20, 11));
    let blobs = [
        (Compression::Gzip, gzip(&tar, 6)),
        (Compression::Gzip, gzip(&tar, 1)),
        (Compression::Gzip, members(&tar, 300_000)),
        (Compression::Gzip, [gzip(&tar, 9), vec![0; 700]].concat()),
        (Compression::None, tar.clone()),
    ];
    for (compression, blob) in blobs {
        let ztoc = build(&blob, compression, 200_000, 70_001).unwrap();
        let (index, windows) = index_from_ztoc(&ztoc, blob.len() as u64, true).unwrap();
        let data = all(&index, &windows, &blob);
        assert!(data[..] == tar[..data.len()]);
        assert_eq!(picture(&index), own(&tar));
        assert!(picture(&index).contains("user.note"));
        let (bare, _) = index_from_ztoc(&ztoc, blob.len() as u64, false).unwrap();
        assert!(!picture(&bare).contains("user.note"));
    }
}

#[test]
fn what_soci_does_not_read_is_not_written() {
    let mut sparse = Tar::default();
    sparse.pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0")]);
    sparse.file("a", b"").end();
    let mut global = Tar::default();
    global.extended(b'g', b"").file("a", b"").end();
    for tar in [&sparse.0, &global.0] {
        let error = build(tar, Compression::None, 1 << 20, 1 << 20).unwrap_err();
        assert!(matches!(error, LayerError::Unsupported { .. }), "{error}");
    }
    assert!(ZtocBuilder::new(Compression::Zstd, SPAN_SIZE, TOOL).is_err());
    assert!(ZtocBuilder::new(Compression::Gzip, 0, TOOL).is_err());
    let blob = gzip(&sample(b"x"), 6);
    assert!(build(&blob[..blob.len() - 20], Compression::Gzip, SPAN_SIZE, 100).is_err());
    assert!(build(b"", Compression::Gzip, SPAN_SIZE, 100).is_err());
}

/// A zTOC of one of the vectors, changed.
fn changed(change: impl FnOnce(&mut Ztoc<'_>)) -> Result<(LayerIndex, Windows), LayerError> {
    let [vector, _] = vectors();
    let mut ztoc = Ztoc::parse(vector.ztocs[0].1).unwrap();
    change(&mut ztoc);
    index_from_ztoc(&write::encode(&ztoc), vector.blob.len() as u64, true)
}

#[test]
fn lies_are_refused_or_harmless() {
    type Change = fn(&mut Ztoc<'_>);
    let refused: [Change; 19] = [
        |z| z.files[3].uid = u32::MAX,
        |z| z.files[3].gid = u32::MAX,
        |z| z.compressed_size += 1,
        |z| z.uncompressed_size = u64::MAX >> 1,
        |z| z.uncompressed_size = 0,
        |z| z.last_span += 1,
        |z| z.last_span = -1,
        |z| drop(z.digests.pop()),
        |z| z.digests[1] = Cow::Borrowed(b"sha256:0"),
        |z| z.digests[1] = Cow::Borrowed(b"\xff"),
        |z| z.zinfo.to_mut()[0] += 1,
        |z| z.zinfo.to_mut().truncate(20),
        // The second checkpoint: in front of the first, behind the blob, with nine bits.
        |z| z.zinfo.to_mut()[12 + 32785..][..8].fill(0),
        |z| z.zinfo.to_mut()[12 + 32785 + 5] = 1,
        |z| z.zinfo.to_mut()[12 + 32785 + 16] = 9,
        |z| z.files[3].offset += 1,
        |z| z.files[3].size = u64::MAX >> 1,
        |z| z.files[3].kind = Cow::Borrowed(b"socket"),
        |z| z.files[3].time = Cow::Borrowed(b"yesterday"),
    ];
    assert!(changed(|_| {}).is_ok());
    for (at, change) in refused.into_iter().enumerate() {
        assert!(changed(change).is_err(), "change {at}");
    }
    // Swapped names make another tree, and nothing else.
    let (index, _) = changed(|z| {
        let name = z.files[1].name.clone();
        z.files[1].name = std::mem::replace(&mut z.files[2].name, name);
    })
    .unwrap();
    assert!(index.lookup_path(b"etc/hosts").is_some());
    // Names that go up stay inside.
    let (index, _) = changed(|z| z.files[1].name = Cow::Borrowed(b"../../x/../y")).unwrap();
    assert!(index.lookup_path(b"y").is_some());
}

#[test]
fn a_wrong_window_or_digest_gives_an_error_or_other_bytes_of_the_same_length() {
    let [vector, _] = vectors();
    let (index, windows) = changed(|z| {
        let second = 12 + 32785 + 17;
        z.zinfo.to_mut()[second..second + 32768].fill(b'?');
    })
    .unwrap();
    let chunk = &index.chunks()[1];
    if let Ok(bytes) = fetch(&index, &windows, chunk, vector.blob) {
        assert_eq!(bytes.len(), chunk.data_len as usize);
    }
    let (index, windows) = changed(|z| z.digests.swap(1, 2)).unwrap();
    let error = fetch(&index, &windows, &index.chunks()[1], vector.blob).unwrap_err();
    assert!(matches!(error, LayerError::DigestMismatch { .. }), "{error}");
}

#[test]
fn truncated_and_damaged_buffers_end_in_errors_or_indexes() {
    let [_, vector] = vectors();
    let (blob_size, ztoc) = (vector.blob.len() as u64, vector.ztocs[0].1);
    let head = 4000.min(ztoc.len());
    for len in (0..head).step_by(97).chain((head..ztoc.len()).step_by(9973)) {
        let _ = index_from_ztoc(&ztoc[..len], blob_size, true);
    }
    // References, lengths and lists of fields are in front of and between the texts; the windows are skipped over.
    let places: Vec<usize> = (0..400)
        .step_by(3)
        .chain((ztoc.len() - 3000..ztoc.len()).step_by(37))
        .collect();
    for at in places {
        for value in [0xff, ztoc[at] ^ 1] {
            let mut bad = ztoc.to_vec();
            bad[at] = value;
            let _ = index_from_ztoc(&bad, blob_size, true);
        }
    }
}

#[test]
fn a_table_that_is_referred_to_again_and_again_is_refused() {
    // A list of a million entries that are all the same table would make a million files of a few bytes.
    let count = 1_000_000u32;
    let mut bytes = Vec::new();
    let put = |bytes: &mut Vec<u8>, words: &[u32]| bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    // 4: list of the root's fields (slots 0, 4, 5), 16 bytes long; the root follows at 20.
    put(&mut bytes, &[20]);
    for field in [16u16, 16, 4, 0, 0, 0, 8, 12] {
        bytes.extend(field.to_le_bytes());
    }
    // 20: the root: list at 4; references to the version, the table of contents and the spans.
    let root = 20u32;
    assert_eq!(bytes.len() as u32, root);
    let (version, toc_list, toc, spans_list, spans, vector) = (36u32, 44u32, 52u32, 60u32, 64u32, 68u32);
    put(
        &mut bytes,
        &[16, version - (root + 4), toc - (root + 8), spans - (root + 12)],
    );
    put(&mut bytes, &[3]);
    bytes.extend(b"0.9\0");
    for field in [6u16, 8, 4, 0] {
        bytes.extend(field.to_le_bytes());
    }
    put(&mut bytes, &[toc - toc_list, vector - (toc + 4)]);
    for field in [4u16, 4] {
        bytes.extend(field.to_le_bytes());
    }
    put(&mut bytes, &[spans - spans_list, count]);
    for at in 0..count {
        // No reference points back: each points on to the table behind the vector.
        put(&mut bytes, &[4 * (count - at)]);
    }
    // An empty table, whose list is the one of `spans`.
    let table = bytes.len() as u32;
    put(&mut bytes, &[table - spans_list]);
    let error = index_from_ztoc(&bytes, 0, true).unwrap_err();
    assert!(error.to_string().contains("number of files is 1000000"), "{error}");
}

proptest! {
    #[test]
    fn any_bytes_end(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = index_from_ztoc(&bytes, 1000, true);
    }

    #[test]
    fn any_change_ends(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut in any::<bool>()) {
        let mut tar = Tar::default();
        tar.dir("d/", 0o755).file("d/f", b"text").pax(&[("SCHILY.xattr.user.a", b"b")]).file("x", b"").end();
        let mut ztoc = build(&tar.0, Compression::None, 1 << 20, 1 << 20).unwrap();
        for (at, value) in &changes {
            let at = at.index(ztoc.len());
            ztoc[at] = *value;
        }
        if cut {
            ztoc.truncate(changes[0].0.index(ztoc.len()));
        }
        if let Ok((index, _)) = index_from_ztoc(&ztoc, tar.0.len() as u64, true) {
            prop_assert!(index.data_size() >= 1024);
        }
    }

}

proptest! {
    // Each case compresses a layer.
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn any_layer_is_read_as_it_was_written(seed in 1u64.., len in 0usize..400_000, span in 32u64 << 10..200_000, piece in 1usize..90_000) {
        let tar = sample(&content(len, seed));
        let blob = gzip(&tar, 1 + (seed % 9) as u32);
        let ztoc = build(&blob, Compression::Gzip, span, piece).unwrap();
        let (index, windows) = index_from_ztoc(&ztoc, blob.len() as u64, true).unwrap();
        let data = all(&index, &windows, &blob);
        prop_assert!(data[..] == tar[..data.len()]);
        prop_assert_eq!(picture(&index), own(&tar));
    }
}
