//! What layers have in common, although they are different layers: how much less would be fetched, stored and cached if the same files, or the
//! same chunks of files, were there once.
//!
//! Its input is a list with a line for each image: a name, and the directories of its layers, the lowest first. The same directory is the same
//! layer. It prints a table in Markdown: of all layers once each, the bytes, and the part of them that another layer on the list has as well;
//! by whole files, by pieces of files as eStargz cuts them, and by chunks that the content delimits. Compressed bytes are those of each file or
//! chunk by itself, as lazily read formats have them.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Parser;
use flate2::Compression;
use flate2::write::ZlibEncoder;
use lazuli::layer::Digest;

/// Bytes of a file in one piece: what stargz puts into a chunk.
const PIECE: usize = 4 << 20;
/// Bits of the rolling hash that end a chunk when they are zeros: 64 KiB on average, as in zstd:chunked.
const BOUNDARY: u64 = (1 << 16) - 1;
/// Bounds of a chunk that the content delimits.
const CHUNK: std::ops::Range<usize> = 16 << 10..512 << 10;

/// Tells what layers have in common.
#[derive(Parser)]
struct Options {
    /// The list of images.
    list: PathBuf,
    /// Leave out files with this ending.
    #[arg(long)]
    without: Option<String>,
}

/// Cuts a file.
type Cut = fn(&[u8]) -> Vec<&[u8]>;

/// How files are cut.
const CUTS: [(&str, Cut); 3] = [
    ("whole files", |bytes| vec![bytes]),
    ("pieces of 4 MiB", |bytes| bytes.chunks(PIECE).collect()),
    ("chunks of 64 KiB by content", by_content),
];

#[derive(Default, Clone, Copy)]
struct Sum {
    bytes: u64,
    compressed: u64,
}

impl Sum {
    fn add(&mut self, bytes: u64, compressed: u64) {
        self.bytes += bytes;
        self.compressed += compressed;
    }
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let text = std::fs::read_to_string(&options.list).context("the list of images")?;
    let images: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    let layers: BTreeSet<&str> = images.iter().flat_map(|image| image.iter().skip(1)).copied().collect();
    let (mut all, mut once) = ([Sum::default(); CUTS.len()], [Sum::default(); CUTS.len()]);
    let mut seen: [HashMap<Digest, u64>; CUTS.len()] = Default::default();
    let mut files = 0_u64;
    for layer in &layers {
        // What a layer has twice is there once in some formats; it is not what is looked for.
        let mut own: [HashSet<Digest>; CUTS.len()] = Default::default();
        let mut pending = vec![PathBuf::from(layer)];
        while let Some(dir) = pending.pop() {
            for entry in std::fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
                let (entry, path) = entry.map(|entry| (entry.file_type(), entry.path()))?;
                match entry? {
                    kind if kind.is_dir() => pending.push(path),
                    kind if kind.is_file() && !is_left_out(&path, options.without.as_deref()) => {
                        files += 1;
                        let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
                        for (at, (_, cut)) in CUTS.iter().enumerate() {
                            for part in cut(&bytes).into_iter().filter(|part| !part.is_empty()) {
                                let digest = Digest::of(part);
                                if !own[at].insert(digest) {
                                    continue;
                                }
                                let (len, known) = (part.len() as u64, seen[at].get(&digest).copied());
                                let compressed = match known {
                                    Some(compressed) => compressed,
                                    None => compressed_len(part)?,
                                };
                                all[at].add(len, compressed);
                                if known.is_none() {
                                    once[at].add(len, compressed);
                                    seen[at].insert(digest, compressed);
                                }
                            }
                        }
                    }
                    _ => {}
                }
            }
        }
    }
    println!("{} images, {} layers, {files} files\n", images.len(), layers.len());
    println!(
        "| cut into | MB | of which another layer has | MB compressed | of which another layer has |\n|---|---|---|---|---|"
    );
    for ((name, _), (all, once)) in CUTS.iter().zip(all.iter().zip(&once)) {
        println!(
            "| {name} | {} | {:.1} % | {} | {:.1} % |",
            all.bytes / 1_000_000,
            percent(all.bytes - once.bytes, all.bytes),
            all.compressed / 1_000_000,
            percent(all.compressed - once.compressed, all.compressed)
        );
    }
    Ok(())
}

fn is_left_out(path: &Path, ending: Option<&str>) -> bool {
    ending.is_some_and(|ending| path.to_string_lossy().ends_with(ending))
}

fn percent(part: u64, of: u64) -> f64 {
    part as f64 * 100.0 / of.max(1) as f64
}

fn compressed_len(bytes: &[u8]) -> anyhow::Result<u64> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?.len() as u64)
}

/// Cuts where a rolling hash of the last bytes says so.
fn by_content(bytes: &[u8]) -> Vec<&[u8]> {
    let (mut parts, mut begin, mut hash) = (Vec::new(), 0, 0_u64);
    for (at, &byte) in bytes.iter().enumerate() {
        // Each byte leaves by the top after 64 steps.
        hash = (hash << 1).wrapping_add(spread(byte));
        let len = at + 1 - begin;
        if len >= CHUNK.end || (len >= CHUNK.start && (hash >> 32) & BOUNDARY == 0) {
            parts.push(&bytes[begin..=at]);
            (begin, hash) = (at + 1, 0);
        }
    }
    parts.push(&bytes[begin..]);
    parts
}

/// A number for a byte in which all bits depend on it.
fn spread(byte: u8) -> u64 {
    let mixed = (u64::from(byte) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}
