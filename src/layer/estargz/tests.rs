//! Tests of eStargz, on blobs made by a small writer of our own.

use std::io::Write;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::layer::testing::{Head, Tar, picture};
use crate::layer::{Access, Chunk, LayerIndex, ROOT_INO, decode_member};

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// A blob being written: a member begins at each chunk, or where the last has `min_member` bytes.
struct Writer {
    blob: Vec<u8>,
    member: Vec<u8>,
    entries: Vec<Value>,
    chunk_size: usize,
    min_member: usize,
}

impl Writer {
    fn new(chunk_size: usize, min_member: usize) -> Self {
        let (blob, member, entries) = (Vec::new(), Vec::new(), Vec::new());
        Writer {
            blob,
            member,
            entries,
            chunk_size,
            min_member,
        }
    }

    fn entry(&mut self, entry: Value) -> &mut Self {
        self.member.extend(Head::default().block());
        self.entries.push(entry);
        self
    }

    fn file(&mut self, name: &str, content: &[u8]) -> &mut Self {
        self.member.extend(Head::default().block());
        let digest = Digest::of(content).to_string();
        let mut entry = json!({"name": name, "type": "reg", "size": content.len(), "digest": digest, "mode": 0o644});
        for (i, chunk) in content.chunks(self.chunk_size).enumerate() {
            if self.member.len() >= self.min_member {
                self.flush();
            }
            let map = entry.as_object_mut().unwrap();
            map.insert("offset".into(), self.blob.len().into());
            if !self.member.is_empty() {
                map.insert("innerOffset".into(), self.member.len().into());
            }
            if i > 0 {
                map.insert("chunkOffset".into(), (i * self.chunk_size).into());
            }
            if chunk.len() == self.chunk_size {
                map.insert("chunkSize".into(), chunk.len().into());
            }
            map.insert("chunkDigest".into(), Digest::of(chunk).to_string().into());
            self.member.extend(chunk);
            let next = json!({"name": name, "type": "chunk"});
            self.entries.push(std::mem::replace(&mut entry, next));
        }
        if content.is_empty() {
            self.entries.push(entry);
        }
        self
    }

    fn flush(&mut self) {
        self.blob.extend(gzip(&std::mem::take(&mut self.member)));
    }

    fn finish(&mut self) -> Blob {
        self.flush();
        let json = serde_json::to_vec_pretty(&json!({"version": 1, "entries": self.entries})).unwrap();
        Blob::with_toc(&self.blob, &json)
    }
}

/// A finished blob and the digest of its TOC.
struct Blob {
    bytes: Vec<u8>,
    digest: Digest,
}

impl Blob {
    fn with_toc(contents: &[u8], json: &[u8]) -> Self {
        let mut tar = Tar::default();
        tar.file("stargz.index.json", json).end();
        let mut bytes = [contents, &gzip(&tar.0)].concat();
        bytes.extend([0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 26, 0, b'S', b'G', 22, 0]);
        bytes.extend(format!("{:016x}STARGZ", contents.len()).bytes());
        bytes.extend([1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
        Blob {
            bytes,
            digest: Digest::of(json),
        }
    }

    fn index(&self) -> Result<LayerIndex, LayerError> {
        self.toc_index().map(|toc| toc.index)
    }

    fn toc_index(&self) -> Result<TocIndex, LayerError> {
        let size = self.bytes.len() as u64;
        let tail = &self.bytes[self.bytes.len() - FOOTER_LEN_MAX..];
        let Some(Footer::Inside(toc)) = find_toc(tail, size)? else {
            panic!("the footer is not found")
        };
        let member = &self.bytes[toc.offset as usize..(toc.offset + toc.len) as usize];
        index_from_toc(member, toc.offset, size, &self.digest)
    }

    /// The data space, with every chunk decoded from the blob and verified.
    fn data(&self, index: &LayerIndex) -> Vec<u8> {
        let mut data = vec![0; index.data_size() as usize];
        for chunk in index.chunks() {
            let member = &self.bytes[chunk.blob_offset as usize..chunk.blob_end() as usize];
            let bytes = decode_member(index.codec(), member, chunk.skip, chunk.data_len).unwrap();
            assert_eq!(Digest::of(&bytes), chunk.digest);
            data[chunk.data_offset as usize..chunk.data_end() as usize].copy_from_slice(&bytes);
        }
        data
    }

    fn content(&self, path: &str) -> Vec<u8> {
        let index = self.index().unwrap();
        let inode = index.inode(index.lookup_path(path.as_bytes()).unwrap()).unwrap();
        self.data(&index)[inode.data as usize..][..inode.size as usize].to_vec()
    }
}

/// The error for a TOC of these entries.
fn error(entries: Value) -> String {
    let json = json!({"version": 1, "entries": entries}).to_string();
    Blob::with_toc(&[0; 1000], json.as_bytes())
        .index()
        .unwrap_err()
        .to_string()
}

#[test]
fn files_are_had_chunk_by_chunk() {
    let big: Vec<u8> = (0..10_000u32).map(|i| ((i * i) >> 7) as u8).collect();
    for min_member in [0, 1000, 5000, 1 << 20] {
        let mut writer = Writer::new(1000, min_member);
        writer.entry(json!({"name": "dir/", "type": "dir", "mode": 0o755}));
        writer
            .file("dir/small", b"small")
            .file("big", &big)
            .file("empty", b"")
            .file("exact", &big[..2000]);
        writer
            .file("short", &big[..1001])
            .entry(json!({"name": "link", "type": "hardlink", "linkName": "big"}));
        let blob = writer.finish();
        let index = blob.index().unwrap();
        for (path, content) in [
            ("dir/small", &b"small"[..]),
            ("big", &big),
            ("link", &big),
            ("empty", b""),
            ("exact", &big[..2000]),
            ("short", &big[..1001]),
        ] {
            assert_eq!(blob.content(path), content, "{path}, members of {min_member}");
        }
        assert_eq!(index.chunks().len(), 1 + 10 + 2 + 2);
        assert_eq!((index.access(), index.codec()), (Access::Ranges, Codec::Gzip));
        let inode = |path: &[u8]| *index.inode(index.lookup_path(path).unwrap()).unwrap();
        assert_eq!((inode(b"dir/small").data, inode(b"big").data), (0, 4096));
        assert_eq!(inode(b"exact").data, (4096 + 10_000u64).next_multiple_of(512));
        assert_eq!(inode(b"link").nlink, 2);
        // The last chunk does not reach into the table of contents.
        let ends = index.chunks().iter().map(Chunk::blob_end).max().unwrap();
        assert!(ends < index.blob_size() - 51);
        let skips = index.chunks().iter().filter(|chunk| chunk.skip > 0).count();
        assert_eq!(skips > 0, min_member > 0);
    }
}

#[test]
fn all_types_and_attributes() {
    let mut writer = Writer::new(1000, 0);
    writer.entry(json!({"name": ".no.prefetch.landmark", "type": "reg", "size": 1, "offset": 3, "chunkDigest": Digest::of(b"").to_string()}));
    writer.entry(json!({"name": "./stargz.index.json", "type": "reg"}));
    writer.entry(json!({"name": "d/stargz.index.json", "type": "reg", "modtime": "2020-01-02T03:04:05Z"}));
    writer.entry(json!({"name": "su", "type": "reg", "mode": 0o104755, "uid": 5, "gid": 6, "modtime": "2020-01-02T03:04:05.25+01:00",
        "xattrs": {"security.capability": "AQID", "user.empty": null}, "NumLink": 3, "userName": "<u>"}));
    writer.entry(json!({"name": "null", "type": "char", "devMajor": 1, "devMinor": 3, "mode": 0o666}));
    writer.entry(json!({"name": "disk", "type": "block", "devMajor": 8}));
    writer.entry(json!({"name": "pipe", "type": "fifo"}));
    writer.entry(json!({"name": "sym", "type": "symlink", "linkName": "/a\"\u{e9}"}));
    writer.entry(json!({"name": ".wh.gone", "type": "reg"}));
    writer.entry(json!({"name": "d/.wh..wh..opq", "type": "reg"}));
    writer.entry(json!({"name": "/su2", "type": "hardlink", "linkName": "su", "mode": 0o4755, "uid": 5, "gid": 6}));
    assert_eq!(
        picture(&writer.finish().index().unwrap()),
        "/ dir 755 0:0 x3
/d dir 755 0:0 x2 trusted.overlay.opaque=y
/d/stargz.index.json file 0 0:0 x1 0 @1577934245.000000000
/disk block 0 0:0 x1 8:0
/gone char 0 0:0 x1 0:0
/null char 666 0:0 x1 1:3
/pipe fifo 0 0:0 x1
/su file 4755 5:6 x2 #4 0 user.empty=
/su2 file 4755 5:6 x2 #4 0 user.empty=
/sym link 777 0:0 x1 -> /a\\\"\\xc3\\xa9
"
    );
    let mut writer = Writer::new(1000, 0);
    writer.entry(json!({"name": "f", "type": "reg", "modtime": "2020-01-02T03:04:05.25+01:00", "xattrs": {"security.capability": "AQID"}}));
    assert!(
        picture(&writer.finish().index().unwrap())
            .ends_with("@1577930645.250000000 security.capability=\\x01\\x02\\x03\n")
    );
}

#[test]
fn a_file_of_one_chunk_may_have_only_its_own_digest() {
    let digest = Digest::of(b"x").to_string();
    let entry = json!({"name": "f", "type": "reg", "size": 1, "offset": 3, "digest": digest});
    let toc = json!({"version": 1, "entries": [entry]}).to_string();
    let index = Blob::with_toc(&[0; 1000], toc.as_bytes()).index().unwrap();
    assert_eq!(index.chunks()[0].digest, Digest::of(b"x"));
    let parts = json!([
        {"name": "f", "type": "reg", "size": 2, "offset": 3, "chunkSize": 1, "digest": digest, "chunkDigest": digest},
        {"name": "f", "type": "chunk", "offset": 4, "chunkOffset": 1, "digest": digest},
    ]);
    assert!(error(parts).contains("entry \"f\": a chunk of it has no digest"));
}

#[test]
fn the_table_must_be_the_expected_one() {
    let blob = Writer::new(1000, 0).file("f", b"content").finish();
    let other = Blob {
        digest: Digest::of(b"other"),
        ..blob
    };
    assert!(matches!(other.index(), Err(LayerError::DigestMismatch { .. })));
    // Not even its syntax is looked at before.
    let mut hostile = Blob::with_toc(&[0; 100], b"{ not json");
    hostile.digest = Digest::of(b"other");
    assert!(matches!(hostile.index(), Err(LayerError::DigestMismatch { .. })));
}

#[test]
fn tables_that_cannot_be_used() {
    let d = Digest::of(b"x").to_string();
    for (entries, what) in [
        (
            json!([{"name": "f", "type": "reg", "size": 1, "offset": 3}]),
            "malformed TOC at 0: entry \"f\": a chunk of it has no digest",
        ),
        (
            json!([{"name": "f", "type": "reg", "size": 1, "offset": 3, "chunkDigest": "sha512:00"}]),
            "\"sha512:00\" is not a digest",
        ),
        (
            json!([{"name": "f", "type": "reg", "size": 2, "chunkSize": 1, "offset": 3, "chunkDigest": d}]),
            "entry \"f\": its chunks have 1 of its 2 bytes",
        ),
        (
            json!([{"name": "f", "type": "reg", "size": 1, "chunkSize": 2, "offset": 3, "chunkDigest": d}]),
            "its chunks have 2 of its 1 bytes",
        ),
        (
            json!([{"name": "f", "type": "reg", "size": 2, "chunkOffset": 1, "offset": 3, "chunkDigest": d}]),
            "a chunk of 1 bytes is at 1, where 0 is due",
        ),
        (
            json!([{"name": "f", "type": "reg", "size": 3, "chunkSize": 2, "offset": 3, "chunkDigest": d},
                {"name": "f", "type": "chunk", "chunkOffset": 1, "offset": 4, "chunkDigest": d}]),
            "malformed TOC at 1: entry \"f\": a chunk of 2 bytes is at 1, where 2 is due",
        ),
        (
            json!([{"name": "f", "type": "reg", "size": 3, "chunkSize": 2, "offset": 3, "chunkDigest": d},
                {"name": "f", "type": "chunk", "chunkOffset": 4, "offset": 4, "chunkDigest": d}]),
            "a chunk begins behind its file's end",
        ),
        (
            json!([{"name": "f", "type": "chunk"}]),
            "a chunk comes after something that is no regular file",
        ),
        (
            json!([{"name": "d", "type": "dir"}, {"name": "d", "type": "chunk"}]),
            "a chunk comes after something that is no regular file",
        ),
        (
            json!([{"name": "f", "type": "reg", "size": 1, "offset": 1000, "chunkDigest": d}]),
            "it is at 1000 of the blob, behind what it can hold",
        ),
        (
            json!([{"name": "f", "type": "reg", "size": 1, "offset": u64::MAX, "chunkDigest": d}]),
            "behind what it can hold",
        ),
        (
            json!([{"name": "f", "type": "reg", "size": 1u64 << 40, "chunkDigest": d}]),
            "length of a chunk is 1099511627776, over the limit of 67108864",
        ),
        (
            json!([{"name": "f", "type": "reg", "size": u64::MAX, "chunkDigest": d}]),
            "uncompressed size of the layer is",
        ),
        (
            json!([{"name": "f", "type": "reg", "size": 1, "innerOffset": 1 << 30, "chunkDigest": d}]),
            "bytes in front of a chunk is 1073741824",
        ),
        (
            json!([{"name": "f", "type": "socket"}]),
            "entry \"f\": its type is \"socket\"",
        ),
        (
            json!([{"name": "f", "type": "reg", "uid": -1}]),
            "no user has the number -1",
        ),
        (
            json!([{"name": "f", "type": "reg", "uid": u32::MAX}]),
            "no user has the number 4294967295",
        ),
        (
            json!([{"name": "d", "type": "dir", "gid": u32::MAX}]),
            "no group has the number 4294967295",
        ),
        (
            json!([{"name": "f", "type": "char", "devMajor": -1}]),
            "no device has the number -1",
        ),
        (
            json!([{"name": "f", "type": "reg", "modtime": "yesterday"}]),
            "its time \"yesterday\"",
        ),
        (
            json!([{"name": "f", "type": "reg", "xattrs": {"user.a": "?"}}]),
            "its extended attribute \"user.a\"",
        ),
        (
            json!([{"name": "f", "type": "hardlink", "linkName": "g"}]),
            "a hard link to \"g\", which no entry before it made",
        ),
        (
            json!([{"name": "n\u{fffd}", "type": "reg"}]),
            "has lost the bytes of a name",
        ),
        (
            json!([{"name": "s", "type": "symlink", "linkName": "\u{fffd}"}]),
            "has lost the bytes of a name",
        ),
        (json!([{"name": "f"}]), "missing field `type`"),
        (json!({"name": "f"}), "invalid type"),
    ] {
        let error = error(entries);
        assert!(error.contains(what), "{error}\n{what}");
    }
    let version = Blob::with_toc(b"", b"{\"version\":2,\"entries\":[]}")
        .index()
        .unwrap_err();
    assert!(matches!(version, LayerError::Unsupported { .. }), "{version}");
}

#[test]
fn members_that_hold_no_table() {
    let check = |member: &[u8], what: &str| {
        let error = index_from_toc(member, 0, member.len() as u64, &Digest::of(b""))
            .unwrap_err()
            .to_string();
        assert!(error.contains(what), "{error}\n{what}");
    };
    let mut good = Tar::default();
    good.file("stargz.index.json", b"{\"version\":1}");
    let good_member = gzip(&good.0);
    for len in 0..good_member.len() - 8 {
        let error = index_from_toc(&good_member[..len], 0, 1000, &Digest::of(b"")).unwrap_err();
        assert!(
            matches!(error, LayerError::Truncated { .. } | LayerError::DigestMismatch { .. }),
            "{len}: {error}"
        );
    }
    check(b"plainly no gzip", "malformed TOC at 0: the header of its tar");
    check(&gzip(&[7; 512]), "checksum");
    check(&gzip(&good.0[..515]), "ends after");
    let mut other = Tar::default();
    other.file("other", b"");
    check(&gzip(&other.0), "its tar holds \"other\", not \"stargz.index.json\"");
    let mut dir = Tar::default();
    dir.dir("stargz.index.json", 0o755);
    check(&gzip(&dir.0), "does not begin with a file");
    let mut long = Tar::default();
    long.add(
        Head {
            name: b"stargz.index.json",
            size: (150 << 20) + 1,
            ..Head::default()
        },
        b"",
    );
    check(
        &gzip(&long.0),
        "size of the eStargz table of contents is 157286401, over the limit",
    );
}

#[test]
fn what_the_author_wants_ahead() {
    let big = vec![7; 5000];
    let layer = |landmark: &str, min_member| {
        let mut writer = Writer::new(1000, min_member);
        writer.file("first", &big).file("second", b"second");
        if !landmark.is_empty() {
            writer.file(landmark, b"\x0f");
        }
        writer.file("third", &big).finish()
    };
    for min_member in [0, 100_000] {
        let toc = layer(".prefetch.landmark", min_member).toc_index().unwrap();
        let inode = |path: &[u8]| *toc.index.inode(toc.index.lookup_path(path).unwrap()).unwrap();
        let (second, third) = (inode(b"second"), inode(b"third"));
        assert!(
            (second.data + second.size..=third.data).contains(&toc.prefetch),
            "{}",
            toc.prefetch
        );
        assert!(toc.index.lookup_path(b".prefetch.landmark").is_none());
    }
    for landmark in ["", ".no.prefetch.landmark", "d/.prefetch.landmark"] {
        assert_eq!(layer(landmark, 0).toc_index().unwrap().prefetch, 0, "{landmark}");
    }
    let mut both = Writer::new(1000, 0);
    both.file("f", b"f")
        .file(".prefetch.landmark", b"\x0f")
        .file("./.no.prefetch.landmark", b"\x0f");
    assert_eq!(both.finish().toc_index().unwrap().prefetch, 0);
}

/// A table in another image: the contents end where the footer begins.
#[test]
fn a_table_elsewhere() {
    let blob = Writer::new(1000, 0).file("f", b"content").finish();
    let size = blob.bytes.len() as u64;
    let Some(Footer::Inside(toc)) = find_toc(&blob.bytes, size).unwrap() else {
        panic!("the footer is not found")
    };
    let (contents, rest) = blob.bytes.split_at(toc.offset as usize);
    let mut bytes = contents.to_vec();
    bytes.extend([0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 21, 0, b'S', b'G', 17, 0]);
    bytes.extend(b"STARGZEXTERNALTOC");
    bytes.extend([1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    let size = bytes.len() as u64;
    assert_eq!(find_toc(&bytes, size), Ok(Some(Footer::Elsewhere)));
    let member = &rest[..toc.len as usize];
    let toc = index_from_toc(member, size - EXTERNAL_FOOTER_LEN as u64, size, &blob.digest).unwrap();
    let external = Blob { bytes, ..blob };
    let index = toc.index;
    assert_eq!(index.chunks()[0].blob_end(), size - 46);
    assert_eq!(&external.data(&index)[..7], b"content");
}

/// Any range of the data space of random files, read through chunks, is what the files hold: the bytes that a plain tar has for them.
#[test]
fn random_ranges_equal_the_tar() {
    use crate::layer::testing::{Dice, check_ranges};
    let mut dice = Dice::new(51);
    for (chunk_size, min_member) in [(4096, 0), (1000, 20_000), (100_000, 300_000)] {
        let files = dice.files(40, 60_000);
        let mut writer = Writer::new(chunk_size, min_member);
        for (name, content) in &files {
            writer.file(name, content);
        }
        let blob = writer.finish();
        check_ranges(&blob.index().unwrap(), &blob.bytes, &files, &mut dice, 500);
    }
}

#[test]
fn an_empty_layer() {
    let index = Writer::new(1000, 0).finish().index().unwrap();
    assert_eq!((index.data_size(), index.inodes().len()), (0, 1));
    assert!(index.inode(ROOT_INO).unwrap().is_dir());
}

proptest! {
    #[test]
    fn any_files_in_any_members(
        files in proptest::collection::vec((any::<u8>(), 0..3000usize), 0..12),
        chunk_size in 100..2000usize,
        min_member in 0..6000usize,
    ) {
        let mut writer = Writer::new(chunk_size, min_member);
        for (i, (byte, len)) in files.iter().enumerate() {
            writer.file(&format!("d{}/{i}", i % 3), &vec![*byte; *len]);
        }
        let blob = writer.finish();
        let index = blob.index().unwrap();
        let data = blob.data(&index);
        for (i, (byte, len)) in files.iter().enumerate() {
            let path = format!("d{}/{i}", i % 3);
            let inode = index.inode(index.lookup_path(path.as_bytes()).unwrap()).unwrap();
            prop_assert_eq!(&data[inode.data as usize..(inode.data + inode.size) as usize], &vec![*byte; *len]);
        }
        let stored: usize = files.iter().map(|(_, len)| len).sum();
        prop_assert_eq!(index.stored_size(), stored as u64);
    }

    #[test]
    fn any_numbers_in_a_table(numbers in proptest::collection::vec((0..3u8, any::<[u8; 6]>()), 1..8)) {
        let digest = Digest::of(b"").to_string();
        let small = |byte: u8| if byte == 255 { u64::MAX } else { u64::from(byte % 8) };
        let entries: Vec<Value> = numbers.iter().enumerate().map(|(i, (kind, n))| json!({
            "name": format!("{}", n[5] % 3), "type": (["reg", "chunk", "hardlink"][*kind as usize]), "linkName": format!("{}", i % 3),
            "size": small(n[0]), "offset": small(n[1]), "innerOffset": small(n[2]), "chunkOffset": small(n[3]), "chunkSize": small(n[4]),
            "chunkDigest": digest,
        })).collect();
        let toc = json!({"version": 1, "entries": entries}).to_string();
        // No panic; what comes out was checked by `LayerIndex::new`, and no byte of a file is without a chunk.
        if let Ok(index) = Blob::with_toc(&[0; 100], toc.as_bytes()).index() {
            for inode in index.inodes().iter().filter(|inode| inode.is_reg()) {
                let chunks = &index.chunks()[index.chunks_at(inode.data, inode.size)];
                let covered: u64 = chunks.iter().map(|chunk| u64::from(chunk.data_len)).sum();
                prop_assert!(inode.size == 0 || covered == inode.size);
            }
        }
    }
}
