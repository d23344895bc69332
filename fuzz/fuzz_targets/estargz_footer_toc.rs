//! Any bytes as the end of an eStargz blob, and any bytes as its table of contents; and a table made of any numbers, in which digests and
//! places are such that its files are read. An index that comes out has a chunk for each byte.

#![no_main]

use std::io::Write;

use lazuli::layer::Digest;
use lazuli::layer::estargz::{Footer, find_toc, index_from_toc_within};
use libfuzzer_sys::fuzz_target;

/// Size of the blob that the table is said to be in, in bytes, and where.
const BLOB_SIZE: u64 = 1 << 20;
const TOC_OFFSET: u64 = BLOB_SIZE / 2;
/// Bytes of memory that reading a table may take, whatever its header says.
const MEMORY: u64 = 16 << 20;

fn member(json: &[u8]) -> Vec<u8> {
    let mut header = [0; 512];
    header[..17].copy_from_slice(b"stargz.index.json");
    header[124..136].copy_from_slice(format!("{:011o}\0", json.len()).as_bytes());
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::none());
    gzip.write_all(&header)
        .and_then(|()| gzip.write_all(json))
        .expect("a Vec takes all");
    gzip.finish().expect("a Vec takes all")
}

fuzz_target!(|input: (u64, &[u8])| {
    let (blob_size, bytes) = input;
    if let Ok(Some(Footer::Inside(toc) | Footer::Legacy(toc))) = find_toc(bytes, blob_size) {
        assert!(toc.len > 0 && toc.offset + toc.len <= blob_size);
    }
    let digest = Digest::of(bytes);
    let _ = index_from_toc_within(bytes, TOC_OFFSET, BLOB_SIZE, &digest, MEMORY);
    if let Ok(toc) = index_from_toc_within(&member(bytes), TOC_OFFSET, BLOB_SIZE, &digest, MEMORY) {
        let index = toc.index;
        assert!(toc.prefetch <= index.data_size());
        for inode in index.inodes().iter().filter(|inode| inode.is_reg() && inode.size > 0) {
            let chunks = &index.chunks()[index.chunks_at(inode.data, inode.size)];
            let covered: u64 = chunks.iter().map(|chunk| u64::from(chunk.data_len)).sum();
            // Less where chunks of zeros have no record.
            assert!(covered <= inode.size);
            assert!(chunks.iter().all(|chunk| chunk.blob_end() <= TOC_OFFSET));
        }
    }
    let table = table(bytes);
    if let Ok(toc) = index_from_toc_within(
        &member(table.as_bytes()),
        TOC_OFFSET,
        BLOB_SIZE,
        &Digest::of(table.as_bytes()),
        MEMORY,
    ) {
        let index = toc.index;
        for inode in index.inodes().iter().filter(|inode| inode.is_reg() && inode.size > 0) {
            let chunks = &index.chunks()[index.chunks_at(inode.data, inode.size)];
            let covered: u64 = chunks.iter().map(|chunk| u64::from(chunk.data_len)).sum();
            assert_eq!(covered, inode.size, "{table}");
        }
    }
});

/// A table in which every nine bytes are an entry: what it is, its name, its size, its chunks, how far its member is from the last.
fn table(bytes: &[u8]) -> String {
    let digest = Digest::of(b"");
    let mut entries = Vec::new();
    let mut offset = 1_u64;
    for entry in bytes.as_chunks::<9>().0 {
        let [kind, name, s0, s1, c0, c1, step, mode, more] = *entry;
        let (size, chunk) = (u16::from_le_bytes([s0, s1]), u16::from_le_bytes([c0, c1]));
        let name = format!("{}{}", ["", "d/", "d/e/", "../"][usize::from(name >> 6)], name & 7);
        let mode = u32::from(mode) << 4;
        let common = format!(r#""name":"{name}","mode":{mode},"uid":{more},"gid":{step}"#);
        match kind % 8 {
            0 => entries.push(format!(r#"{{"type":"dir",{common}}}"#)),
            1 => entries.push(format!(r#"{{"type":"hardlink","linkName":"{}",{common}}}"#, more & 7)),
            2 => entries.push(format!(r#"{{"type":"symlink","linkName":"d/{}",{common}}}"#, more & 7)),
            _ => {
                let chunk = if chunk == 0 { size } else { chunk.max(1 + size / 8) };
                let mut at = 0_u16;
                while at < size || at == 0 {
                    let (kind, length) = if at == 0 {
                        ("reg", chunk)
                    } else {
                        ("chunk", chunk.min(size - at))
                    };
                    let length = if length >= size - at { 0 } else { length };
                    entries.push(format!(
                        r#"{{"type":"{kind}","size":{size},"offset":{offset},"chunkOffset":{at},"chunkSize":{length},"digest":"{digest}","chunkDigest":"{digest}",{common}}}"#
                    ));
                    offset += 1 + u64::from(step);
                    if chunk == 0 {
                        break;
                    }
                    at = at.saturating_add(chunk);
                }
            }
        }
    }
    format!(r#"{{"version":1,"entries":[{}]}}"#, entries.join(","))
}
