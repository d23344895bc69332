//! Tests of zstd:chunked, on blobs made by a small writer of our own in each dialect.

use std::io::Write as _;

use serde_json::{Value, json};

use super::*;
use crate::layer::testing::{Dice, Head, check_ranges};
use crate::layer::{Access, LayerIndex, decode_member};

/// Who wrote the blob.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Author {
    Stargz,
    /// containers/storage before 2024.
    OldStorage,
    Storage,
}

const AUTHORS: [Author; 3] = [Author::Stargz, Author::OldStorage, Author::Storage];

fn frame(data: &[u8]) -> Vec<u8> {
    zstd::encode_all(data, 1).unwrap()
}

fn skippable(content: &[u8]) -> Vec<u8> {
    [
        &[0x50, 0x2a, 0x4d, 0x18][..],
        &(content.len() as u32).to_le_bytes(),
        content,
    ]
    .concat()
}

/// A blob being written.
struct Writer {
    author: Author,
    blob: Vec<u8>,
    headers: Vec<u8>,
    entries: Vec<Value>,
}

impl Writer {
    fn new(author: Author) -> Self {
        let (blob, headers, entries) = (Vec::new(), Vec::new(), Vec::new());
        Writer {
            author,
            blob,
            headers,
            entries,
        }
    }

    fn entry(&mut self, entry: Value) -> &mut Self {
        self.headers.extend(Head::default().block());
        self.entries.push(entry);
        self
    }

    /// Ends the frame with headers.
    fn flush(&mut self) {
        if !self.headers.is_empty() {
            let headers = std::mem::take(&mut self.headers);
            self.blob.extend(frame(&headers));
        }
    }

    /// Adds a file in chunks of these lengths; what remains is the last one. containers/storage marks zeros.
    fn file(&mut self, name: &str, content: &[u8], lengths: &[usize]) -> &mut Self {
        self.headers.extend(Head::default().block());
        if content.is_empty() {
            self.entries.push(json!({"name": name, "type": "reg"}));
            return self;
        }
        self.flush();
        let (first, mut at) = (self.entries.len(), 0);
        let ends = lengths.iter().scan(0, |end, len| {
            *end += len;
            Some(*end)
        });
        let ends: Vec<usize> = ends
            .take_while(|end| *end < content.len())
            .chain([content.len()])
            .collect();
        for &end in &ends {
            let chunk = &content[at..end];
            let kind = if at == 0 { "reg" } else { "chunk" };
            let mut entry = json!({"name": name, "type": kind, "offset": self.blob.len()});
            let map = entry.as_object_mut().unwrap();
            if at == 0 {
                map.insert("size".into(), content.len().into());
                map.insert("digest".into(), Digest::of(content).to_string().into());
                map.insert("modtime".into(), "2024-05-06T07:08:09.25Z".into());
                map.insert("accesstime".into(), "0001-01-01T00:00:00Z".into());
            } else {
                map.insert("chunkOffset".into(), at.into());
            }
            let zeros = self.author != Author::Stargz && ends.len() > 1 && chunk.iter().all(|&byte| byte == 0);
            if ends.len() > 1 || self.author == Author::Stargz {
                map.insert("chunkSize".into(), chunk.len().into());
                map.insert("chunkDigest".into(), Digest::of(chunk).to_string().into());
            }
            if zeros {
                map.insert("chunkType".into(), "zeros".into());
            }
            // Their data is in the blob all the same, but in the newest writer, which the format allows.
            if !zeros || self.author == Author::OldStorage {
                self.blob.extend(frame(chunk));
            }
            self.entries.push(entry);
            at = end;
        }
        if self.author != Author::Stargz {
            self.entries[first]["endOffset"] = self.blob.len().into();
        }
        self
    }

    fn finish(&mut self) -> Blob {
        self.flush();
        let json = json!({"version": 1, "entries": self.entries, "tarSplitDigest": "sha256:00"});
        Blob::with_toc(self.author, &self.blob, json.to_string().as_bytes())
    }
}

/// A finished blob, with the annotations of its descriptor.
struct Blob {
    bytes: Vec<u8>,
    annotations: BTreeMap<String, String>,
}

impl Blob {
    fn with_toc(author: Author, contents: &[u8], json: &[u8]) -> Self {
        let table = frame(json);
        let offset = contents.len() + 8;
        let mut numbers = vec![offset, table.len(), json.len(), 1];
        let mut bytes = [contents, &skippable(&table)].concat();
        let prefix = match author {
            Author::Storage => "io.github.containers.zstd-chunked",
            _ => "io.containers.zstd-chunked",
        };
        let mut annotations = BTreeMap::from([
            (format!("{prefix}.manifest-checksum"), Digest::of(&table).to_string()),
            (
                format!("{prefix}.manifest-position"),
                format!("{offset}:{}:{}:1", table.len(), json.len()),
            ),
        ]);
        let mut magic = b"GnUlInUx";
        match author {
            Author::Stargz => {
                annotations.insert(TOC_DIGEST_ANNOTATION.into(), Digest::of(json).to_string());
            }
            Author::OldStorage => {}
            Author::Storage => {
                magic = b"GNUlInUx";
                numbers.extend([bytes.len() + 8, 9, 100]);
                bytes.extend(skippable(b"tar-split"));
            }
        }
        let footer: Vec<u8> = numbers
            .iter()
            .flat_map(|number| (*number as u64).to_le_bytes())
            .collect();
        bytes.extend(skippable(&[&footer[..], magic].concat()));
        Blob { bytes, annotations }
    }

    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn promise(&self) -> Promise {
        promise(&self.annotations, self.size()).unwrap().unwrap()
    }

    fn index_with(&self, promise: &Promise) -> Result<TocIndex, LayerError> {
        let place = match promise.place {
            Some(place) => place,
            None => find_toc(&self.bytes, self.size())?.unwrap(),
        };
        let table = &self.bytes[place.offset as usize..(place.offset + place.len) as usize];
        index_from_toc(table, &place, self.size(), promise)
    }

    fn index(&self) -> LayerIndex {
        self.index_with(&self.promise()).unwrap().index
    }
}

fn content(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| ((i * i) >> 7) as u8).collect()
}

#[test]
fn files_are_had_chunk_by_chunk() {
    for author in AUTHORS {
        let mut holed = content(9000);
        holed[2000..6000].fill(0);
        let files = [
            ("d/small".to_owned(), b"small".to_vec()),
            ("big".to_owned(), content(10_000)),
            ("empty".to_owned(), Vec::new()),
            ("holed".to_owned(), holed.clone()),
            ("zeros".to_owned(), vec![0; 5000]),
        ];
        let mut writer = Writer::new(author);
        writer
            .entry(json!({"name": "d/", "type": "dir", "mode": 0o755}))
            .file("d/small", &files[0].1, &[])
            .file("big", &files[1].1, &[1000, 5000, 17])
            .entry(json!({"name": "link", "type": "hardlink", "linkName": "big"}))
            .file("empty", b"", &[])
            .file("holed", &holed, &[2000, 4000])
            .file("zeros", &files[4].1, &[1000, 2000]);
        let blob = writer.finish();
        let index = blob.index();
        assert_eq!((index.access(), index.codec()), (Access::Ranges, Codec::Zstd));
        check_ranges(&index, &blob.bytes, &files, &mut Dice::new(1), 500);
        let chunks = if author == Author::Stargz {
            1 + 4 + 3 + 3
        } else {
            1 + 4 + 2
        };
        assert_eq!(index.chunks().len(), chunks, "{author:?}");
        let inode = |path: &[u8]| *index.inode(index.lookup_path(path).unwrap()).unwrap();
        assert_eq!(inode(b"link").nlink, 2);
        assert_eq!(
            (inode(b"holed").mtime, inode(b"holed").mtime_nsec),
            (1_714_979_289, 250_000_000)
        );
        // No chunk reaches into the table, nor, where ends of files are said, into the next headers.
        let table = blob.promise().place.unwrap().offset - 8;
        assert!(index.chunks().iter().all(|chunk| chunk.blob_end() <= table));
        let big = index.chunks()[index.chunks_at(inode(b"big").data, 10_000)]
            .last()
            .unwrap();
        let member = &blob.bytes[big.blob_offset as usize..big.blob_end() as usize];
        let longer = decode_member(Codec::Zstd, member, 0, big.data_len + 1);
        assert_eq!(longer.is_err(), author != Author::Stargz, "{author:?}");
    }
}

#[test]
fn the_footer_tells_the_same_place() {
    for author in AUTHORS {
        let blob = Writer::new(author).file("f", b"content", &[]).finish();
        let promise = blob.promise();
        assert_eq!(find_toc(&blob.bytes, blob.size()), Ok(promise.place), "{author:?}");
        let placeless = Promise { place: None, ..promise };
        assert_eq!(blob.index_with(&placeless).unwrap().index, blob.index());
    }
}

#[test]
fn the_table_must_be_the_promised_one() {
    let other = Some(Digest::of(b"other"));
    for author in AUTHORS {
        let blob = Writer::new(author).file("f", b"content", &[]).finish();
        let promise = blob.promise();
        let mismatch = |promise: Promise| {
            let error = blob.index_with(&promise).unwrap_err();
            assert!(matches!(error, LayerError::DigestMismatch { .. }), "{error}");
        };
        mismatch(Promise {
            compressed: other,
            ..promise
        });
        mismatch(Promise {
            compressed: None,
            raw: other,
            ..promise
        });
        let mut longer = promise;
        longer.place.as_mut().unwrap().raw_len += 1;
        let error = blob.index_with(&longer).unwrap_err();
        assert!(matches!(error, LayerError::Malformed { .. }), "{error}");
        longer.place.as_mut().unwrap().raw_len -= 2;
        assert!(blob.index_with(&longer).is_err());
        let nothing = Promise {
            compressed: None,
            raw: None,
            ..promise
        };
        assert!(matches!(blob.index_with(&nothing), Err(LayerError::Unsupported { .. })));
    }
    // Not even its syntax is looked at before.
    let blob = Blob::with_toc(Author::Stargz, &[0; 100], b"{ not json");
    let error = blob
        .index_with(&Promise {
            compressed: other,
            ..blob.promise()
        })
        .unwrap_err();
    assert!(matches!(error, LayerError::DigestMismatch { .. }), "{error}");
    assert!(matches!(
        blob.index_with(&blob.promise()),
        Err(LayerError::Malformed { .. })
    ));
}

#[test]
fn a_table_that_is_cut_or_bloated() {
    let blob = Writer::new(Author::Storage).file("f", &content(5000), &[]).finish();
    let place = blob.promise().place.unwrap();
    let table = &blob.bytes[place.offset as usize..][..place.len as usize];
    for len in 0..table.len() {
        let cut = &table[..len];
        let promise = Promise {
            compressed: Some(Digest::of(cut)),
            ..blob.promise()
        };
        assert!(index_from_toc(cut, &place, blob.size(), &promise).is_err(), "{len}");
    }
    // Few bytes that are very many: no more than promised are decoded.
    let bomb = frame(&vec![b' '; 10 << 20]);
    let promise = Promise {
        compressed: Some(Digest::of(&bomb)),
        ..blob.promise()
    };
    assert!(index_from_toc(&bomb, &place, blob.size(), &promise).is_err());
}

/// An encoder that does not know how much will come asks for all of its window, 32 MiB in containers/storage.
#[test]
fn a_small_table_in_a_frame_with_a_large_window() {
    let framed = |window_log| {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(window_log).unwrap();
        encoder.write_all(b"{}").unwrap();
        unpack(&encoder.finish().unwrap(), 2)
    };
    assert_eq!(framed(25).unwrap(), b"{}");
    assert!(framed(26).is_err(), "this would be 64 MiB for two bytes");
}

#[test]
fn annotations() {
    let digest = Digest::of(b"x").to_string();
    let of = |pairs: &[(&str, &str)]| {
        let annotations = pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        promise(&annotations, 2000)
    };
    let (checksum, place) = (
        "io.github.containers.zstd-chunked.manifest-checksum",
        "io.github.containers.zstd-chunked.manifest-position",
    );
    assert_eq!(of(&[]), Ok(None));
    assert_eq!(of(&[(TOC_DIGEST_ANNOTATION, &digest)]), Ok(None));
    assert_eq!(of(&[(place, "1000:10:20:1")]), Ok(None));
    assert_eq!(of(&[(checksum, &digest)]).unwrap().unwrap().place, None);
    let found = of(&[(checksum, &digest), (place, "1000:10:20:1")]).unwrap().unwrap();
    assert_eq!(
        found.place,
        Some(TocPlace {
            offset: 1000,
            len: 10,
            raw_len: 20
        })
    );
    assert_eq!((found.compressed, found.raw), (Some(Digest::of(b"x")), None));
    for wrong in [
        "",
        "1000:10:20",
        "1000:10:20:2",
        "1000:1001:20:1",
        "-1:10:20:1",
        "+1000:10:20:1",
        "1000::20:1",
        "18446744073709551616:10:20:1",
        "18446744073709551615:10:20:1",
        "1000:0:20:1",
        "1000:10:99999999999:1",
        "a:b:c:d",
    ] {
        assert!(of(&[(checksum, &digest), (place, wrong)]).is_err(), "{wrong}");
    }
    assert!(of(&[(checksum, "md5:00")]).is_err());
}

/// Files for snapshotters are hidden where stargz wrote the table, and are files like others elsewhere.
#[test]
fn landmarks_are_stargz_own() {
    for author in AUTHORS {
        let mut writer = Writer::new(author);
        writer
            .file("first", &content(5000), &[])
            .file(".prefetch.landmark", b"\x0f", &[])
            .file("last", b"last", &[]);
        let blob = writer.finish();
        let toc = blob.index_with(&blob.promise()).unwrap();
        let shown = toc.index.lookup_path(b".prefetch.landmark").is_some();
        assert_eq!(shown, author != Author::Stargz);
        assert_eq!(toc.prefetch > 0, author == Author::Stargz);
    }
}

#[test]
fn tables_that_lie() {
    let digest = Digest::of(b"x").to_string();
    for (entries, what) in [
        (
            json!([{"name": "f", "type": "reg", "size": 9, "chunkSize": 4, "chunkType": "zeros", "offset": 1},
                {"name": "f", "type": "chunk", "chunkOffset": 4, "chunkSize": 4, "chunkType": "zeros", "offset": 1}]),
            "its chunks have 8 of its 9 bytes",
        ),
        (
            json!([{"name": "f", "type": "reg", "size": 1, "chunkType": "ones", "chunkDigest": digest}]),
            "its chunk is of type \"ones\"",
        ),
        (
            json!([{"name": "f", "type": "reg", "size": u64::MAX, "chunkType": "zeros"}]),
            "uncompressed size of the layer is",
        ),
        (
            json!([{"name": "f", "type": "reg", "size": 1, "offset": 100, "endOffset": 100, "chunkDigest": digest}]),
            "behind what it can hold",
        ),
        (
            json!([{"name": "../../etc", "type": "socket"}]),
            "its type is \"socket\"",
        ),
    ] {
        for author in AUTHORS {
            let toc = json!({"version": 1, "entries": entries}).to_string();
            let blob = Blob::with_toc(author, &[0; 100], toc.as_bytes());
            let error = blob.index_with(&blob.promise()).unwrap_err().to_string();
            assert!(error.contains(what), "{error}\n{what}");
        }
    }
    // An end before the beginning, or far away, is passed over: what is read has to have the digest.
    for end in [1, u64::MAX] {
        let entries =
            json!([{"name": "../f", "type": "reg", "size": 1, "offset": 10, "endOffset": end, "digest": digest}]);
        let toc = json!({"version": 1, "entries": entries}).to_string();
        let index = Blob::with_toc(Author::Storage, &[0; 100], toc.as_bytes()).index();
        assert_eq!((index.chunks()[0].blob_offset, index.chunks()[0].blob_end()), (10, 100));
        assert!(index.lookup_path(b"f").is_some());
    }
}

/// Any range of the data space of random files, read through chunks, is what the files hold: the bytes that a plain tar has for them.
#[test]
fn random_ranges_equal_the_tar() {
    for (seed, author) in AUTHORS.into_iter().enumerate() {
        let mut dice = Dice::new(seed as u64);
        let files = dice.files(40, 60_000);
        let mut writer = Writer::new(author);
        for (name, content) in &files {
            let lengths: Vec<usize> = (0..dice.below(20)).map(|_| 1 + dice.below(9000)).collect();
            writer.file(name, content, &lengths);
        }
        let blob = writer.finish();
        check_ranges(&blob.index(), &blob.bytes, &files, &mut dice, 500);
    }
}
