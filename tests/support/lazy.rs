//! Layers with a table of contents, made byte by byte: eStargz and zstd:chunked, each file in members of its own.

use std::collections::BTreeMap;
use std::io::Write as _;

use lazuli::layer::Digest;
use serde_json::{Value, json};

/// Bytes of a file per member.
const CHUNK: usize = 64 << 10;

/// A layer with a table of contents.
pub struct Lazy {
    /// The compressed bytes.
    pub blob: Vec<u8>,
    /// The uncompressed tar.
    pub tar: Vec<u8>,
    /// Annotations of its descriptor.
    pub annotations: BTreeMap<String, String>,
    /// Its media type.
    pub media_type: &'static str,
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(bytes).unwrap();
    gzip.finish().unwrap()
}

/// A header of a regular file.
fn header(name: &str, size: usize) -> Vec<u8> {
    let mut header = vec![0; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..108].copy_from_slice(b"0000644\0");
    header[108..116].copy_from_slice(b"0000000\0");
    header[116..124].copy_from_slice(b"0000000\0");
    header[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    header[136..148].copy_from_slice(b"00000000000\0");
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

/// The members of files, the tar that they make, and the entries of their table.
fn members(files: &[(&str, Vec<u8>)], compress: fn(&[u8]) -> Vec<u8>) -> (Vec<u8>, Vec<u8>, Vec<Value>) {
    let (mut blob, mut tar, mut entries) = (Vec::new(), Vec::new(), Vec::new());
    for (name, content) in files {
        // A header is in a member with the padding of the file before.
        let padding = vec![0; tar.len().next_multiple_of(512) - tar.len()];
        let head = [padding, header(name, content.len())].concat();
        blob.extend(compress(&head));
        tar.extend(head);
        for (number, chunk) in content.chunks(CHUNK).enumerate() {
            let mut entry = json!({
                "name": name, "type": "chunk", "offset": blob.len(), "chunkOffset": number * CHUNK,
                "chunkSize": chunk.len(), "chunkDigest": Digest::of(chunk),
            });
            if number == 0 {
                entry["type"] = "reg".into();
                entry["size"] = content.len().into();
                entry["mode"] = 0o644.into();
                entry["digest"] = json!(Digest::of(content));
            }
            let member = compress(chunk);
            entry["endOffset"] = (blob.len() + member.len()).into();
            entries.push(entry);
            blob.extend(member);
            tar.extend(chunk);
        }
    }
    let padding = vec![0; tar.len().next_multiple_of(512) - tar.len()];
    if !padding.is_empty() {
        blob.extend(compress(&padding));
        tar.extend(padding);
    }
    (blob, tar, entries)
}

/// An eStargz layer with these files.
pub fn estargz(files: &[(&str, Vec<u8>)]) -> Lazy {
    let (mut blob, mut tar, entries) = members(files, gzip);
    let table = json!({"version": 1, "entries": entries}).to_string().into_bytes();
    let mut end = header("stargz.index.json", table.len());
    end.extend(&table);
    end.resize(end.len().next_multiple_of(512) + 1024, 0);
    let at = blob.len();
    blob.extend(gzip(&end));
    tar.extend(end);
    let extra = [b"SG\x16\0", format!("{at:016x}STARGZ").as_bytes()].concat();
    blob.extend([0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff]);
    blob.extend((extra.len() as u16).to_le_bytes());
    blob.extend(extra);
    blob.extend([1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    let digest = (
        "containerd.io/snapshot/stargz/toc.digest",
        Digest::of(&table).to_string(),
    );
    Lazy {
        blob,
        tar,
        annotations: [digest].map(|(key, value)| (key.to_owned(), value)).into(),
        media_type: "application/vnd.oci.image.layer.v1.tar+gzip",
    }
}

/// A zstd:chunked layer with these files.
pub fn zstd_chunked(files: &[(&str, Vec<u8>)]) -> Lazy {
    let compress = |bytes: &[u8]| zstd::encode_all(bytes, 1).unwrap();
    let (mut blob, mut tar, entries) = members(files, compress);
    blob.extend(compress(&[0; 1024]));
    tar.extend([0; 1024]);
    let json = json!({"version": 1, "entries": entries}).to_string().into_bytes();
    let table = zstd::encode_all(&json[..], 1).unwrap();
    let skippable = |content: &[u8]| {
        let len = (content.len() as u32).to_le_bytes();
        [&[0x50, 0x2a, 0x4d, 0x18][..], &len, content].concat()
    };
    let at = blob.len() + 8;
    blob.extend(skippable(&table));
    let numbers = [at, table.len(), json.len(), 1].map(|number| (number as u64).to_le_bytes());
    blob.extend(skippable(&[numbers.concat().as_slice(), b"GnUlInUx"].concat()));
    let annotations = [
        ("manifest-checksum", Digest::of(&table).to_string()),
        ("manifest-position", format!("{at}:{}:{}:1", table.len(), json.len())),
    ];
    Lazy {
        blob,
        tar,
        annotations: annotations
            .map(|(key, value)| (format!("io.github.containers.zstd-chunked.{key}"), value))
            .into(),
        media_type: "application/vnd.oci.image.layer.v1.tar+zstd",
    }
}
