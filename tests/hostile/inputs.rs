//! The inputs, and what each may take.

use std::io::{Read as _, Write as _};

use lazuli::layer::checkpoint::Scanner;
use lazuli::layer::index::{flags, mode};
use lazuli::layer::tree::memory_for_blob;
use lazuli::layer::variant::on_top_of;
use lazuli::layer::zchunked::{Promise, TocPlace};
use lazuli::layer::{
    Access, Codec, Compression, Dirent, IndexParts, Inode, LayerError, LayerIndex, ROOT_INO, TarIndexer, Verify,
    decoder, erofs, estargz, merge, portable, soci, zchunked,
};
use lazuli::layer::{Digest, index::Xattr};

use super::{Case, MIB, Work};

pub const CASES: &[Case] = &[
    Case {
        name: "self-test address space",
        mib: 8,
        error: "",
        prepare: || taking(|| Vec::with_capacity(16 << 20)),
    },
    Case {
        name: "self-test resident",
        mib: 8,
        error: "",
        prepare: || taking(|| vec![1; 16 << 20]),
    },
    Case {
        name: "self-test modest",
        mib: 8,
        error: "",
        prepare: || taking(|| vec![1; 7 << 20]),
    },
    // Layers.
    Case {
        name: "1,600 PAX paths of 4 KB in a layer of 30 KB",
        mib: 8,
        error: "number of directories without an entry",
        prepare: || {
            let mut tar = Vec::new();
            for i in 0..1600 {
                pax(
                    &mut tar,
                    &[("path", format!("{i:06}/{}f", "d/".repeat(2043)).as_bytes())],
                );
                entry(&mut tar, b'0', "f", "", 0);
            }
            let blob = gzip(&tar);
            assert!(blob.len() < 100 << 10, "{}", blob.len());
            Box::new(move || streamed(Compression::Gzip, blob))
        },
    },
    Case {
        name: "as many implied directories as there may be",
        mib: 50,
        error: "",
        prepare: || {
            let mut tar = Vec::new();
            for i in 0..15_000 {
                entry(&mut tar, b'0', &format!("{i}/a/b/c/d/e/f/g/file"), "", 0);
            }
            Box::new(move || indexed(&tar))
        },
    },
    Case {
        name: "the same in a blob of 70 KB",
        mib: 8,
        error: "memory of names and attributes in bytes",
        prepare: || {
            let mut tar = Vec::new();
            for i in 0..15_000 {
                entry(&mut tar, b'0', &format!("{i}/a/b/c/d/e/f/g/file"), "", 0);
            }
            let blob = gzip(&tar);
            assert!(blob.len() < 80 << 10);
            Box::new(move || streamed(Compression::Gzip, blob))
        },
    },
    Case {
        name: "numbered empty files, which are honest",
        mib: 32,
        error: "",
        prepare: || {
            let mut tar = Vec::new();
            for i in 0..100_000 {
                entry(&mut tar, b'0', &format!("d/{i}"), "", 0);
            }
            let blob = zstd::encode_all(&tar[..], 3).unwrap();
            Box::new(move || streamed(Compression::Zstd, blob))
        },
    },
    Case {
        name: "symlinks that imply directories",
        mib: 8,
        error: "number of directories without an entry",
        prepare: || {
            let mut tar = Vec::new();
            for i in 0..40 {
                let target = format!("{i}/{}t{}", "d/".repeat(2000), i + 1);
                pax(&mut tar, &[("linkpath", target.as_bytes())]);
                entry(&mut tar, b'2', &format!("s{i}"), "", 0);
            }
            for i in 0..40 {
                entry(&mut tar, b'0', &format!("s{i}/x"), "", 0);
            }
            Box::new(move || indexed(&tar))
        },
    },
    Case {
        name: "long ways through symlinks",
        mib: 8,
        error: "length of all paths through symlinks",
        prepare: || {
            let mut tar = Vec::new();
            for i in 1..40 {
                let target = format!("{}s{}", "./".repeat(2000), i + 1);
                pax(&mut tar, &[("linkpath", target.as_bytes())]);
                entry(&mut tar, b'2', &format!("s{i}"), "", 0);
            }
            entry(&mut tar, b'5', "s40", "", 0);
            for i in 0..5000 {
                entry(&mut tar, b'0', &format!("s1/x{i}"), "", 0);
            }
            Box::new(move || indexed(&tar))
        },
    },
    Case {
        name: "hard links that move a thousand attributes each",
        mib: 8,
        error: "number of extended attributes, for those given so far",
        prepare: || {
            let names: Vec<String> = (0..1000).map(|i| format!("SCHILY.xattr.user.{i}")).collect();
            let records: Vec<(&str, &[u8])> = names.iter().map(|name| (&name[..], &b""[..])).collect();
            let mut tar = Vec::new();
            for file in ["a", "b"] {
                pax(&mut tar, &records);
                entry(&mut tar, b'0', file, "", 0);
            }
            for i in 0..16_000 {
                pax(&mut tar, &[("SCHILY.xattr.security.capability", b"x")]);
                entry(&mut tar, b'1', "link", ["a", "b"][i % 2], 0);
            }
            Box::new(move || indexed(&tar))
        },
    },
    Case {
        name: "a header of nothing but attributes",
        mib: 8,
        error: "records of extended attributes",
        prepare: || {
            let mut tar = Vec::new();
            pax(&mut tar, &vec![("SCHILY.xattr.user.", &b""[..]); 45_000]);
            entry(&mut tar, b'0', "f", "", 0);
            Box::new(move || indexed(&tar))
        },
    },
    Case {
        name: "global headers and long names of a megabyte",
        mib: 24,
        error: "its path has",
        prepare: || {
            let mut tar = Vec::new();
            for kind in [b'g', b'x', b'L', b'K'].repeat(4) {
                let body = match kind {
                    b'x' | b'g' => record("comment", &vec![b'c'; (1 << 20) - 20]),
                    _ => b"d/".repeat((1 << 19) - 10),
                };
                entry(&mut tar, kind, "long", "", body.len());
                content(&mut tar, &body);
            }
            entry(&mut tar, b'0', "f", "", 0);
            Box::new(move || indexed(&tar))
        },
    },
    Case {
        name: "sparse files of a million pieces",
        mib: 16,
        error: "number of pieces of sparse files",
        prepare: || {
            let (mut tar, mut map, pieces) = (Vec::new(), String::new(), 100_000);
            map += &format!("{pieces}\n");
            (0..pieces).for_each(|i| map += &format!("{}\n1\n", 2 * i));
            map += &"\0".repeat(map.len().next_multiple_of(512) - map.len());
            for i in 0..9 {
                let name = format!("sparse{i}");
                pax(
                    &mut tar,
                    &[
                        ("GNU.sparse.major", b"1"),
                        ("GNU.sparse.minor", b"0"),
                        ("GNU.sparse.name", name.as_bytes()),
                        ("GNU.sparse.realsize", b"1000000"),
                    ],
                );
                entry(&mut tar, b'0', "s", "", map.len() + pieces);
                tar.extend_from_slice(map.as_bytes());
                content(&mut tar, &vec![1; pieces]);
            }
            Box::new(move || indexed(&tar))
        },
    },
    Case {
        name: "a map of one number without an end",
        mib: 8,
        error: "length of the map of a sparse file",
        prepare: || {
            let mut tar = Vec::new();
            let records: &[(&str, &[u8])] = &[
                ("GNU.sparse.major", b"1"),
                ("GNU.sparse.minor", b"0"),
                ("GNU.sparse.name", b"s"),
                ("GNU.sparse.realsize", b"1000000"),
            ];
            pax(&mut tar, records);
            entry(&mut tar, b'0', "s", "", 48 << 20);
            content(&mut tar, &vec![b'0'; 48 << 20]);
            Box::new(move || indexed(&tar))
        },
    },
    Case {
        name: "a map of a million parts in GNU's own form",
        mib: 40,
        error: "number of parts of a sparse file",
        prepare: || {
            let mut tar = Vec::new();
            let mut head = header(b'S', "f", "", 0);
            head[257..265].copy_from_slice(b"ustar  \0");
            head[345..369].fill(0);
            head[386..398].copy_from_slice(b"00000000000\0");
            head[398..410].copy_from_slice(b"00000000000\0");
            head[482] = 1;
            head[483..495].copy_from_slice(b"00000000000\0");
            tar.extend_from_slice(&sealed(head));
            let mut extension = b"00000000000\0".repeat(42);
            extension.resize(512, 0);
            extension[504] = 1;
            tar.extend_from_slice(&extension.repeat(51_000));
            Box::new(move || indexed(&tar))
        },
    },
    Case {
        name: "a gzip bomb in one long span",
        mib: 60,
        error: "",
        prepare: || {
            let blob = gzip(&vec![0; 200 << 20]);
            Box::new(move || scanned(Compression::Gzip, blob))
        },
    },
    // Tables of contents.
    Case {
        name: "a million attributes in an entry of a table",
        mib: 32,
        error: "of extended attributes over the limit of",
        prepare: || {
            let xattrs: Vec<String> = (0..1_000_000).map(|i| format!("\"{i:07}\":\"\"")).collect();
            let xattrs = xattrs.join(",");
            let json = format!(r#"{{"version":1,"entries":[{{"name":"f","type":"reg","xattrs":{{{xattrs}}}}}]}}"#);
            estargz_table(json, u64::MAX)
        },
    },
    Case {
        name: "a table of spaces of 149 MiB in 150 KB",
        mib: 4,
        error: "size of the table of contents, beside what is in memory",
        prepare: || estargz_table(" ".repeat(149 << 20), 100 * MIB),
    },
    Case {
        name: "a table of small entries",
        mib: 17 + 4 + 8 * 17,
        error: "",
        prepare: || {
            let mut json = String::from(r#"{"version":1,"entries":["#);
            let rest = r#""type":"dir","modtime":"2024-01-01T00:00:00Z","mode":493"#;
            (0..200_000).for_each(|i| json += &format!(r#"{{"name":"{i:06}/",{rest}}},"#));
            json += r#"{"name":"","type":"dir"}]}"#;
            assert!(json.len() < 17 << 20);
            estargz_table(json, u64::MAX)
        },
    },
    Case {
        name: "a table of entries that imply what they can",
        mib: 10 + 4 + 8 * 10,
        error: "memory of names and attributes",
        prepare: || {
            let mut json = String::from(r#"{"version":1,"entries":["#);
            (0..200_000).for_each(|i| json += &format!(r#"{{"name":"{i}/a/b/c/d/e/f/g","type":"dir"}},"#));
            json += r#"{"name":"","type":"dir"}]}"#;
            assert!(json.len() < 10 << 20);
            estargz_table(json, u64::MAX)
        },
    },
    Case {
        name: "a table of chunks",
        mib: 3 * 33,
        error: "",
        prepare: || estargz_table(chunks(), u64::MAX),
    },
    Case {
        name: "a table of chunks with a share that they do not fit into",
        mib: 33 + 24,
        error: "memory of the table of contents in bytes",
        prepare: || estargz_table(chunks(), (33 + 24) * MIB),
    },
    Case {
        name: "a table that asks for a window of 128 MiB",
        mib: 16,
        error: "memory",
        prepare: || {
            let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
            encoder.include_contentsize(false).unwrap();
            encoder.window_log(27).unwrap();
            encoder.write_all(br#"{"version":1}"#).unwrap();
            let table = encoder.finish().unwrap();
            let place = TocPlace {
                offset: 8,
                len: table.len() as u64,
                raw_len: 13,
            };
            let promise = Promise {
                place: Some(place),
                compressed: Some(Digest::of(&table)),
                raw: None,
            };
            Box::new(move || zchunked::index_from_toc(&table, &place, 1 << 20, &promise).map(drop))
        },
    },
    Case {
        name: "a zTOC of one table that is referred to 16 million times",
        mib: 8,
        error: "number of files",
        prepare: || {
            let ztoc = ztoc(16_000_000);
            Box::new(move || soci::index_from_ztoc(&ztoc, 0, true).map(drop))
        },
    },
    Case {
        name: "a zTOC of as many references as it has room for",
        mib: 5 * 31,
        error: "its last span has the number 0",
        prepare: || {
            let ztoc = roomy_ztoc();
            Box::new(move || soci::index_from_ztoc(&ztoc, 0, true).map(drop))
        },
    },
    Case {
        name: "the same with a share of 8 MiB",
        mib: 4,
        error: "memory for the zTOC in bytes",
        prepare: || {
            let ztoc = roomy_ztoc();
            Box::new(move || soci::index_from_ztoc_within(&ztoc, 0, true, 8 * MIB).map(drop))
        },
    },
    // Our own formats.
    Case {
        name: "a portable index that unpacks to 512 MiB",
        mib: 4,
        error: "memory for the portable index",
        prepare: || {
            let packed = zstd::bulk::compress(&vec![0; 511 << 20], 1).unwrap();
            let file = portable_of(&packed, 511 << 20);
            let layer = Digest::of(b"layer");
            assert!(file.len() < 1 << 20);
            let memory = portable::inspect(&file).unwrap().memory();
            assert!(memory > 1 << 30);
            Box::new(move || portable::unpack_within(&layer, &file, 100 * MIB).map(drop))
        },
    },
    Case {
        name: "directories that share a million entries",
        mib: 8,
        error: "directories share entries",
        prepare: || {
            let mut parts = empty();
            let names = 100_000u32;
            for i in 0..names {
                let dir = Inode {
                    mode: mode::DIR | 0o755,
                    parent: ROOT_INO,
                    nlink: 2,
                    data: u64::from(names),
                    count: 1_000_000,
                    ..Inode::default()
                };
                let name = format!("{i:06}");
                parts.dirents.push(named(&mut parts.strings, name.as_bytes(), i + 2));
                parts.inodes.push(dir);
            }
            parts.inodes[0].count = names;
            let file = parts.inodes.len() as u32 + 1;
            parts.inodes.push(Inode {
                mode: mode::FIFO,
                nlink: 1,
                ..Inode::default()
            });
            for i in 0..1_000_000 {
                let name = format!("{i:07}");
                parts.dirents.push(named(&mut parts.strings, name.as_bytes(), file));
            }
            Box::new(move || LayerIndex::new(parts).map(drop))
        },
    },
    Case {
        name: "attribute values that overlap, merged",
        mib: 16,
        error: "length of names and attributes",
        prepare: || {
            let mut parts = empty();
            let name = parts.strings.len() as u32;
            parts.strings.extend_from_slice(b"user.x");
            let value = parts.strings.len() as u32;
            parts
                .strings
                .extend((0..128 << 10).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8));
            for i in 0..60_000 {
                parts.xattrs.push(Xattr {
                    name,
                    name_len: 6,
                    value: value + i,
                    value_len: 65_536,
                });
                let file = Inode {
                    mode: mode::FIFO,
                    nlink: 1,
                    xattr_first: i,
                    xattr_count: 1,
                    ..Inode::default()
                };
                parts.inodes.push(file);
                let text = format!("{i:06}");
                parts.dirents.push(named(&mut parts.strings, text.as_bytes(), i + 2));
            }
            parts.inodes[0].count = 60_000;
            let index = LayerIndex::new(parts).unwrap();
            Box::new(move || merge::merge(&[&index], None).map(drop))
        },
    },
    Case {
        name: "one attribute of 64 KB in a thousand inodes, as EROFS",
        mib: 16,
        error: "length of the extended attributes of all inodes",
        prepare: || {
            let mut tar = Vec::new();
            for i in 0..1000 {
                pax(&mut tar, &[("SCHILY.xattr.user.x", &[b'v'; 65_000])]);
                entry(&mut tar, b'0', &format!("{i}"), "", 0);
            }
            let index = index(&tar);
            Box::new(move || {
                let device = erofs::Device {
                    tag: Digest::of(b""),
                    size: index.data_size(),
                };
                erofs::write(&index, &[device], erofs::Addressing::Unified).map(drop)
            })
        },
    },
    // Layers on others.
    Case {
        name: "60,000 directories over 400 tiny layers",
        mib: 24,
        error: "",
        prepare: || {
            let below: Vec<LayerIndex> = (0..400).map(|i| tiny(&format!("{i}/x"))).collect();
            let mut tar = Vec::new();
            for i in 0..60_000 {
                entry(&mut tar, b'0', &format!("{i}/f"), "", 0);
            }
            let top = index(&tar);
            assert!(
                top.inodes()
                    .iter()
                    .filter(|inode| inode.flags & flags::IMPLIED != 0)
                    .count()
                    == 60_000
            );
            Box::new(move || {
                let below: Vec<_> = below.iter().map(Some).collect();
                on_top_of(&top, &below).map(drop)
            })
        },
    },
    Case {
        name: "one deep path in 400 layers that each have all of it",
        mib: 24,
        error: "in the layers below",
        prepare: || {
            // Each name leads back to where it is, so that a tiny layer has every depth.
            let below: Vec<LayerIndex> = (0..400)
                .map(|_| {
                    let mut tar = Vec::new();
                    entry(&mut tar, b'2', "d", ".", 0);
                    index(&tar)
                })
                .collect();
            let mut tar = Vec::new();
            let (mut path, mut at) = ("d/".repeat(1000), 0);
            while at < 9 {
                // A symlink for each thousand: a path is no longer than 4 KB.
                pax(&mut tar, &[("linkpath", format!("/{path}").as_bytes())]);
                entry(&mut tar, b'2', &format!("s{at}"), "", 0);
                path = format!("s{at}/{}", "d/".repeat(1000));
                at += 1;
            }
            for i in 0..1500 {
                entry(&mut tar, b'0', &format!("f{i}"), "", 0);
            }
            pax(&mut tar, &[("path", format!("{path}f").as_bytes())]);
            entry(&mut tar, b'0', "f", "", 0);
            let top = index(&tar);
            Box::new(move || {
                let below: Vec<_> = below.iter().map(Some).collect();
                on_top_of(&top, &below).map(drop)
            })
        },
    },
];

/// Work that takes memory for nothing.
fn taking(take: fn() -> Vec<u8>) -> Work {
    Box::new(move || {
        drop(std::hint::black_box(take()));
        Ok(())
    })
}

fn sealed(mut block: [u8; 512]) -> [u8; 512] {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

fn header(kind: u8, name: &str, link: &str, size: usize) -> [u8; 512] {
    let mut block = [0; 512];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[100..108].copy_from_slice(b"0000644\0");
    block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    block[156] = kind;
    block[157..157 + link.len()].copy_from_slice(link.as_bytes());
    block[257..263].copy_from_slice(b"ustar\0");
    sealed(block)
}

fn entry(tar: &mut Vec<u8>, kind: u8, name: &str, link: &str, size: usize) {
    tar.extend_from_slice(&header(kind, name, link, size));
}

fn content(tar: &mut Vec<u8>, content: &[u8]) {
    tar.extend_from_slice(content);
    tar.resize(tar.len().next_multiple_of(512), 0);
}

fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut len = rest;
    while len.to_string().len() + rest != len {
        len = len.to_string().len() + rest;
    }
    [format!("{len} {key}=").as_bytes(), value, b"\n"].concat()
}

fn pax(tar: &mut Vec<u8>, records: &[(&str, &[u8])]) {
    let body: Vec<u8> = records.iter().flat_map(|(key, value)| record(key, value)).collect();
    entry(tar, b'x', "pax", "", body.len());
    content(tar, &body);
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Names of a layer that comes compressed, as a stream.
fn streamed(compression: Compression, blob: Vec<u8>) -> Result<(), LayerError> {
    let mut indexer = TarIndexer::with_memory(memory_for_blob(blob.len() as u64));
    let mut stream = decoder(compression, std::io::Cursor::new(blob));
    let mut piece = vec![0; 64 << 10];
    loop {
        match stream.read(&mut piece).unwrap() {
            0 => return finished(indexer),
            len => indexer.push(&piece[..len])?,
        }
    }
}

/// The spans of a layer.
fn scanned(compression: Compression, blob: Vec<u8>) -> Result<(), LayerError> {
    let mut scanner = Scanner::new(compression, std::io::Cursor::new(blob)).unwrap();
    let mut out = Vec::new();
    loop {
        scanner.read(&mut out, 1 << 20).unwrap();
        drop(scanner.spans());
        if out.is_empty() {
            return Ok(());
        }
    }
}

fn indexed(tar: &[u8]) -> Result<(), LayerError> {
    let mut indexer = TarIndexer::new();
    indexer.push(tar)?;
    finished(indexer)
}

fn finished(indexer: TarIndexer) -> Result<(), LayerError> {
    let layout = indexer.finish()?;
    layout.into_index(Access::Stream, Codec::None, Vec::new(), 0).map(drop)
}

fn index(tar: &[u8]) -> LayerIndex {
    let mut indexer = TarIndexer::new();
    indexer.push(tar).unwrap();
    let layout = indexer.finish().unwrap();
    layout.into_index(Access::Stream, Codec::None, Vec::new(), 0).unwrap()
}

/// A layer of one empty file.
fn tiny(path: &str) -> LayerIndex {
    let mut tar = Vec::new();
    entry(&mut tar, b'0', path, "", 0);
    index(&tar)
}

/// A table of one file of 400,000 chunks, in 33 MiB.
fn chunks() -> String {
    let mut json = String::from(
        r#"{"version":1,"entries":[{"name":"f","type":"reg","size":800000,"chunkSize":1,"chunkType":"zeros"}"#,
    );
    (1..400_000).for_each(|i| {
        json += &format!(r#",{{"name":"","type":"chunk","chunkOffset":{i},"chunkSize":1,"chunkType":"zeros"}}"#)
    });
    json += r#",{"name":"","type":"chunk","chunkOffset":400000,"chunkSize":400000,"chunkType":"zeros"}]}"#;
    assert!(json.len() < 33 << 20, "{}", json.len());
    json
}

/// Reading of an eStargz table.
fn estargz_table(json: String, memory: u64) -> Work {
    let digest = Digest::of(json.as_bytes());
    let mut tar = header(b'0', "stargz.index.json", "", json.len()).to_vec();
    content(&mut tar, json.as_bytes());
    let member = gzip(&tar);
    drop((json, tar));
    Box::new(move || estargz::index_from_toc_within(&member, 0, 1 << 20, &digest, memory).map(drop))
}

/// A zTOC of a list of `count` references to one empty table.
fn ztoc(count: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let put = |bytes: &mut Vec<u8>, words: &[u32]| bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    put(&mut bytes, &[20]);
    for field in [16u16, 16, 4, 0, 0, 0, 8, 12] {
        bytes.extend(field.to_le_bytes());
    }
    let (root, version, toc_list, toc, spans_list, spans, vector) = (20u32, 36u32, 44u32, 52u32, 60u32, 64u32, 68u32);
    put(
        &mut bytes,
        &[16, version - (root + 4), toc - (root + 8), spans - (root + 12), 3],
    );
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
        put(&mut bytes, &[4 * (count - at)]);
    }
    let table = bytes.len() as u32;
    put(&mut bytes, &[table - spans_list]);
    bytes
}

/// One that is as long as it must be for its references to be files.
fn roomy_ztoc() -> Vec<u8> {
    let mut ztoc = ztoc(500_000);
    ztoc.resize(500_000 * 64, 0);
    ztoc
}

/// A portable index of the layer "layer" that holds `packed`, with all its checksums right.
fn portable_of(packed: &[u8], raw_len: u64) -> Vec<u8> {
    let mut head = b"LZLSHARE\x01\0\0\0\x01\0\0\0".to_vec();
    head.extend_from_slice(Digest::of(b"layer").as_bytes());
    head.extend_from_slice(&[0; 32]);
    head.extend_from_slice(&raw_len.to_le_bytes());
    for part in [packed, &[]] {
        head.extend_from_slice(&(part.len() as u64).to_le_bytes());
        head.extend_from_slice(Digest::of(part).as_bytes());
    }
    let sum = Digest::of(&head);
    [&head[..], sum.as_bytes(), packed].concat()
}

/// An index of a root directory.
fn empty() -> IndexParts {
    IndexParts {
        access: Access::Stream,
        codec: Codec::None,
        data_size: 0,
        blob_size: 0,
        inodes: vec![Inode {
            mode: mode::DIR | 0o755,
            parent: ROOT_INO,
            nlink: 2,
            ..Inode::default()
        }],
        dirents: Vec::new(),
        xattrs: Vec::new(),
        chunks: Vec::new(),
        verify: Verify::Content,
        checkpoints: Vec::new(),
        strings: Vec::new(),
    }
}

fn named(strings: &mut Vec<u8>, name: &[u8], ino: u32) -> Dirent {
    let at = strings.len() as u32;
    strings.extend_from_slice(name);
    Dirent {
        name: at,
        name_len: name.len() as u32,
        ino,
    }
}
