//! What the fuzz targets begin with: small files that pass the checks of headers. `LAZULI_SEEDS=$PWD/fuzz/corpus cargo test --lib seeds`
//! writes them into the tree; without the variable they are made, and thrown away.
//!
//! Those of the targets of texts (`registry_text`, `filters_config`) are written by hand, and `late-damage` was found by a fuzzer.
//! A target that takes several values reads numbers from the front, little-endian, and bytes from what remains.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::fake::{Bench, noise};
use super::spans::{frames, gzip, streamed};
use super::streams::{entry, tar};
use crate::layer::portable::{HEADER_LEN, inspect};
use crate::layer::trace::{Entry, Trace};
use crate::layer::{Digest, LayerIndex, TarIndexer, estargz, portable};

/// The variable that names the directory with a directory for each target.
const DIR: &str = "LAZULI_SEEDS";
/// Magic number and version of an index on disk, which targets put there themselves, as they do with the checksum at its end.
const INDEX_HEAD: usize = 12;
/// Header and record of windows.
const WINDOWS_HEAD: usize = 48;
const RECORD: usize = 44;
/// Size of the blob that the tables of contents speak of, and where they are in it, as in the targets.
const BLOB: u64 = 1 << 20;
/// What separates layers for the target `merge`.
const SEPARATOR: &[u8] = b"\xffLAYER\xff";

fn write(target: &str, name: &str, parts: &[&[u8]]) {
    // What the fuzzer finds is named in hexadecimal digits, and is not kept.
    assert!(!name.starts_with(|first: char| first.is_ascii_hexdigit()), "{name}");
    let Some(dir) = std::env::var_os(DIR) else { return };
    let dir = PathBuf::from(dir).join(target);
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join(name), parts.concat()).unwrap();
}

/// A tar of two spans of text.
fn text() -> Vec<u8> {
    let lines: String = (0..90_000_u32).map(|line| format!("line {line} of a file\n")).collect();
    let mut out = entry("text", b'0', lines.len(), |_| {});
    out.extend_from_slice(lines.as_bytes());
    out.resize(out.len().next_multiple_of(512) + 1024, 0);
    out
}

/// A tar of all types of entries.
fn kinds() -> Vec<u8> {
    let mut out = entry("dir/", b'5', 0, |_| {});
    out.extend(entry("dir/file", b'0', 5, |_| {}));
    out.extend([&b"bytes"[..], &[0; 507]].concat());
    for (name, kind) in [("dir/hard", b'1'), ("dir/soft", b'2')] {
        out.extend(entry(name, kind, 0, |header| {
            header[157..165].copy_from_slice(b"dir/file")
        }));
    }
    out.extend(entry("null", b'3', 0, |header| {
        header[329..345].copy_from_slice(b"0000001\x000000003\0")
    }));
    out.extend(entry("fifo", b'6', 0, |_| {}));
    out.extend(entry(".wh.gone", b'0', 0, |_| {}));
    out.extend(entry("dir/.wh..wh..opq", b'0', 0, |_| {}));
    out.resize(out.len() + 1024, 0);
    out
}

/// A tar with extended headers of both dialects: times, attributes, an access control list that is handed on, long names.
fn attributes() -> Vec<u8> {
    let extended = |kind: u8, body: &[u8]| {
        let mut out = entry("headers", kind, body.len(), |_| {});
        out.extend_from_slice(body);
        out.resize(out.len().next_multiple_of(512), 0);
        out
    };
    // The length counts itself, with two digits or three.
    let record = |key: &str, value: &[u8]| {
        let rest = key.len() + value.len() + 3;
        let length = if rest + 2 < 100 { rest + 2 } else { rest + 3 };
        [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
    };
    let list = |user: u8| {
        [
            &[2, 0, 0, 0][..],
            &[1, 0, user, 0, 255, 255, 255, 255],
            &[2, 0, 5, 0, 9, 0, 0, 0],
            &[4, 0, 5, 0, 255, 255, 255, 255],
            &[16, 0, 7, 0, 255, 255, 255, 255],
            &[32, 0, 0, 0, 255, 255, 255, 255],
        ]
        .concat()
    };
    let records = [
        record("mtime", b"1700000000.5"),
        record("SCHILY.xattr.user.key", b"value"),
        record("SCHILY.xattr.system.posix_acl_default", &list(7)),
    ];
    let mut out = extended(b'x', &records.concat());
    out.extend(entry("dir/", b'5', 0, |_| {}));
    out.extend(entry("dir/made/file", b'0', 0, |_| {}));
    out.extend(entry("dir/made/", b'5', 0, |_| {}));
    out.extend(extended(b'L', &[b"dir/".as_slice(), &[b'n'; 120], b"\0"].concat()));
    out.extend(entry("short", b'0', 0, |_| {}));
    out.extend(extended(b'g', &record("comment", b"for all that follows")));
    out.extend(extended(b'x', &record("path", b"dir/of a record")));
    out.extend(entry("short", b'0', 0, |_| {}));
    out.resize(out.len() + 1024, 0);
    out
}

fn body(index: &LayerIndex) -> Vec<u8> {
    let bytes = index.encode();
    bytes[INDEX_HEAD..bytes.len() - Digest::LEN].to_vec()
}

fn indexed(tar: &[u8]) -> LayerIndex {
    let mut indexer = TarIndexer::new();
    indexer.push(tar).unwrap();
    let layout = indexer.finish().unwrap();
    let (access, codec) = (crate::layer::Access::Stream, crate::layer::Codec::None);
    layout.into_index(access, codec, Vec::new(), 0).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn seeds() {
    let (small, text) = (kinds(), text());
    for (name, tar, bytes) in [
        ("spans", &text, gzip(&text, usize::MAX)),
        ("members", &small, gzip(&small, 1000)),
        ("tar", &small, small.clone()),
        ("zstd", &text, frames(&text)),
    ] {
        let bench = Bench::new();
        let (_, cached, _) = streamed(&bench, &bytes, tar).await;
        let packed = cached.portable().unwrap();
        let summary = inspect(&packed).unwrap();
        let index = body(&cached.names().unwrap());
        let windows = &packed[summary.index_end() as usize..];
        let table = &windows[WINDOWS_HEAD..][..RECORD * summary.checkpoints as usize];
        let compressed = &windows[WINDOWS_HEAD + table.len() + Digest::LEN..];
        let len = |part: &[u8]| (part.len() as u16).to_le_bytes();
        write(
            "portable",
            name,
            &[
                &packed[12..16],
                &packed[48..80],
                &summary.checkpoints.to_le_bytes(),
                &[0; 4],
                &len(&index),
                &index,
                &len(table),
                table,
                compressed,
            ],
        );
        assert_eq!(HEADER_LEN, 200, "the places of what is taken from the header");
        assert!(portable::unpack(&Digest::of(&bytes), &packed).is_ok());
        write("index_decode", name, &[&index]);
        write("erofs", name, &[&[1], &(8_u32 << 20).to_le_bytes(), &[0; 8], &index]);
    }
    let kinds = body(&indexed(&small));
    write("index_decode", "kinds", &[&kinds]);
    write("erofs", "kinds", &[&[0; 13], &kinds]);
    let sparse = tar(&[10]);
    let attributes = attributes();
    for (name, tar) in [("kinds", &small), ("sparse", &sparse), ("headers", &attributes)] {
        indexed(tar);
        write("tar", name, &[&511_u16.to_le_bytes(), tar]);
    }
    write(
        "merge",
        "headers",
        &[&attributes, SEPARATOR, &attributes, SEPARATOR, &small],
    );
    write("merge", "kinds", &[&small, SEPARATOR, &small]);
    write("merge", "index", &[&small, SEPARATOR, b"I", &kinds, SEPARATOR, &sparse]);

    let entered = |bits: u8, window: u16, skip: u16, len: u16| {
        let numbers = [window, skip, len].map(u16::to_le_bytes).concat();
        [&[bits][..], &numbers].concat()
    };
    let mixed = [&text[..6000], &noise(5, 3000), &text[4000..8000]].concat();
    let whole = gzip(&mixed, usize::MAX);
    write("inflate_span", "gzip", &[&entered(0, 0, 10, 2000), &whole]);
    write(
        "inflate_span",
        "members",
        &[&entered(0, 0, 10, 2000), &gzip(&mixed, 3000)],
    );
    // 10 bytes of header, and the name.
    write("inflate_span", "inner", &[&entered(0, 32_768, 3, 500), &whole[20..]]);
    write(
        "inflate_span",
        "zstd",
        &[&entered(3, 100, 0, 9), &zstd::encode_all(&mixed[..], 3).unwrap()],
    );
    let parts = mixed.chunks(4000).flat_map(|part| zstd::encode_all(part, 1).unwrap());
    write(
        "inflate_span",
        "zstd-frames",
        &[&entered(0, 0, 0, 9), &parts.collect::<Vec<u8>>()],
    );

    let part = |skip: u16, len: u16| [skip, len].map(u16::to_le_bytes).concat();
    write("compression_decode", "gzip", &[&part(10, 2000), &gzip(&mixed, 3000)]);
    let frame = zstd::encode_all(&mixed[..], 3).unwrap();
    write("compression_decode", "zstd", &[&part(10, 2000), &frame]);
    write("compression_decode", "plain", &[&part(10, 2000), &mixed]);

    tables();
    let (layer, entry) = (Digest::of(b"layer"), Entry::of(&["/bin/app".to_owned()]));
    let file = |path: &str| json!({"layer": 0, "path": path, "size": 100});
    let trace = json!({"repository": "r/app", "manifest": Digest::of(b"manifest"), "entry": entry, "starts": 2, "recorded": 7,
        "layers": [layer], "files": [file("bin/app"), file("lib/one")],
        "wishes": [[0, 0, 100, 3, 0], [1, 10, 20, 40, 1], [1, 50, 50, 60, 0]]});
    let document = serde_json::to_vec(&trace).unwrap();
    assert!(serde_json::from_slice::<Trace>(&document).is_ok());
    write("trace", "small", &[&document]);
}

/// Tables of contents in their dialects, and footers.
fn tables() {
    let sum = |seed: u64| Digest::of(&noise(seed, 10)).to_string();
    let file = |name: &str, more: Value| {
        let mut entry = json!({"name": name, "type": "reg", "size": 70, "mode": 420, "modtime": "2024-01-02T03:04:05Z",
            "uid": 1, "gid": 2, "digest": sum(1), "chunkDigest": sum(1)});
        entry.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        entry
    };
    let others = [
        json!({"name": "dir/", "type": "dir", "mode": 493, "xattrs": {"user.a": "YQ=="}}),
        json!({"name": "dir/soft", "type": "symlink", "linkName": "file"}),
        json!({"name": "dir/hard", "type": "hardlink", "linkName": "whole"}),
        json!({"name": "null", "type": "char", "devMajor": 1, "devMinor": 3}),
        json!({"name": "fifo", "type": "fifo"}),
        json!({"name": "dir/.wh..wh..opq", "type": "reg"}),
    ];
    let chunk = |offset: u64, more: Value| {
        let mut entry =
            json!({"name": "parts", "type": "chunk", "offset": offset, "chunkOffset": 40, "chunkDigest": sum(3)});
        entry.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        entry
    };
    let table = |files: Vec<Value>| {
        let entries = [files, others.to_vec()].concat();
        json!({"version": 1, "entries": entries}).to_string()
    };

    let landmark = json!({"name": ".prefetch.landmark", "type": "reg", "size": 1, "offset": 500, "digest": sum(2), "chunkDigest": sum(2)});
    let stargz = table(vec![
        file("whole", json!({"offset": 100})),
        landmark,
        file("inner", json!({"offset": 700, "innerOffset": 600})),
        file("parts", json!({"offset": 1000, "chunkSize": 40})),
        chunk(1200, json!({})),
    ]);
    let size = BLOB.to_le_bytes();
    write("estargz_footer_toc", "json", &[&size, stargz.as_bytes()]);
    let mut footer = vec![0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 26, 0, b'S', b'G', 22, 0];
    footer.extend(format!("{:016x}STARGZ", BLOB / 2).bytes());
    footer.extend([1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert!(matches!(
        estargz::find_toc(&footer, BLOB),
        Ok(Some(estargz::Footer::Inside(_)))
    ));
    write("estargz_footer_toc", "tail", &[&size, &footer]);
    let mut legacy = vec![0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 22, 0];
    legacy.extend(format!("{:016x}STARGZ", BLOB / 2).bytes());
    legacy.extend([1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert!(matches!(
        estargz::find_toc(&legacy, BLOB),
        Ok(Some(estargz::Footer::Legacy(_)))
    ));
    write("estargz_footer_toc", "legacy", &[&size, &legacy]);

    let chunked = table(vec![
        file("whole", json!({"offset": 100, "endOffset": 160})),
        file("parts", json!({"offset": 200, "chunkSize": 40, "endOffset": 400})),
        chunk(300, json!({"chunkSize": 30, "endOffset": 400})),
        file("zeros", json!({"chunkType": "zeros", "chunkSize": 70})),
    ]);
    let position = format!("{}:100:1000:1", BLOB / 2);
    let texts = format!("{}\n{position}\n", sum(4));
    let head = [&size[..], &1000_u16.to_le_bytes(), texts.as_bytes()].concat();
    write("zchunked_toc", "json", &[&head, chunked.as_bytes()]);
    write("zchunked_toc", "stargz", &[&head, stargz.as_bytes()]);
    for (name, magic, more) in [("old", b"GnUlInUx", 0), ("newer", b"GNUlInUx", 3)] {
        let numbers = [BLOB / 2, 100, 1000, 1, BLOB / 2 + 200, 9, 100];
        let numbers: Vec<u8> = numbers[..4 + more]
            .iter()
            .flat_map(|number| number.to_le_bytes())
            .collect();
        let footer = [&numbers, &magic[..]].concat();
        let frame = [
            &[0x50, 0x2a, 0x4d, 0x18][..],
            &(footer.len() as u32).to_le_bytes(),
            &footer,
        ]
        .concat();
        assert!(
            crate::layer::zchunked::find_toc(&frame, BLOB).unwrap().is_some(),
            "{name}"
        );
        write("zchunked_toc", &format!("tail-{name}"), &[&head, &frame]);
    }
}
