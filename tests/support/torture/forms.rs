//! Layers whose form is odd: sparse files, archives and compressions with unusual ends, very many entries, a very large file.

use std::fs;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::path::Path;
use std::process::Command;

use super::super::image::{Compression, Layer};
use super::super::sandbox::{require_program, run_ok};
use super::super::tar::{Entry, Header, Magic, Tar, noise, seal};
use super::{Case, case};

/// Sparse files in the three ways of PAX, by GNU tar itself.
pub fn sparse() -> Case {
    let source = SparseFiles::new();
    let layers = ["0.0", "0.1", "1.0"].into_iter().map(|version| {
        let archive = source.archive(&["--format=posix", &format!("--sparse-version={version}")], version);
        Layer::from_tar(Compression::Gzip, &archive)
    });
    case("sparse", layers.collect())
}

/// Sparse files in the way of old GNU tar (type flag `S`), which containerd does not unpack: the reference is GNU tar's own
/// extraction, into `reference`.
pub fn gnu_sparse(reference: &Path) -> Case {
    let archive = SparseFiles::new().archive(&["--format=gnu"], "gnu");
    let file = reference.with_extension("tar");
    fs::write(&file, &archive).unwrap();
    fs::create_dir_all(reference).unwrap();
    let mut tar = Command::new(require_program("tar"));
    run_ok(
        tar.args(["--extract", "--preserve-permissions", "--numeric-owner", "-f"])
            .arg(&file)
            .arg("-C")
            .arg(reference),
    );
    case("gnu_sparse", vec![Layer::from_tar(Compression::Gzip, &archive)])
}

/// A directory with sparse files of several shapes.
struct SparseFiles(tempfile::TempDir);

impl SparseFiles {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("sp");
        fs::create_dir(&source).unwrap();
        let block = 256 << 10;
        let shapes: [(&str, u64, Vec<u64>); 7] = [
            ("only-hole", 1 << 20, vec![]),
            ("data-first", 3 << 20, vec![0]),
            ("data-last", (2 << 20) + 4096, vec![2 << 20]),
            ("odd-end", 777_777, vec![65_536]),
            // More than the 4 regions of an old GNU header, and the 21 of its extension.
            ("many-regions", 16 << 20, (0..60).map(|index| index * block).collect()),
            ("dense", 8192, vec![0, 4096]),
            ("large", 40 << 20, vec![0, 20 << 20, (40 << 20) - 4096]),
        ];
        for (name, length, regions) in &shapes {
            let mut file = fs::File::create(source.join(name)).unwrap();
            file.set_len(*length).unwrap();
            for offset in regions {
                file.seek(SeekFrom::Start(*offset)).unwrap();
                let left = (length - offset).min(4096) as usize;
                file.write_all(&noise(*offset + 1, left)).unwrap();
            }
        }
        fs::write(source.join("ordinary"), "not sparse").unwrap();
        SparseFiles(dir)
    }

    /// A tar archive of them, in a directory with this ending.
    fn archive(&self, options: &[&str], ending: &str) -> Vec<u8> {
        let mut tar = Command::new(require_program("tar"));
        tar.args(["--create", "--sparse", "--sort=name", "--owner=0", "--group=0"])
            .args(options);
        tar.arg(format!("--transform=s,^sp,sparse-{ending},"))
            .arg("-C")
            .arg(self.0.path())
            .arg("sp");
        run_ok(&mut tar).stdout
    }
}

/// Archives and compressions that end, begin or are cut in unusual ways.
pub fn archives() -> Case {
    let tar = |name: &str, end: usize| {
        let mut bytes = Vec::new();
        let mut tar = Tar::new(&mut bytes);
        tar.add(Entry::dir(name)).unwrap();
        tar.add(Entry::file(format!("{name}/file"), noise(9, 100_000))).unwrap();
        bytes.extend(vec![0; end]);
        bytes
    };
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let mut layers = vec![
        Layer::of(Compression::Gzip, []),
        Layer::from_tar(Compression::Gzip, &tar("no-end", 0)),
        Layer::from_tar(Compression::Gzip, &tar("one-block-end", 512)),
        Layer::from_tar(Compression::None, &tar("long-end", 100 * 512)),
    ];
    // Bytes after the end belong to the layer's digest, not to its contents.
    let mut trailing = tar("trailing", 1024);
    trailing.extend(noise(4, 70_000));
    layers.push(Layer::from_tar(Compression::Gzip, &trailing));
    // Several gzip members, one of them empty, cut in the middle of a header.
    let members = tar("members", 1024);
    let mut blob = gzip(&members[..300]);
    blob.extend(gzip(&[]));
    for part in members[300..].chunks(7_001) {
        blob.extend(gzip(part));
    }
    layers.push(Layer::from_blob(Compression::Gzip, blob));
    // A gzip header with every optional field.
    let named = tar("gzip-header", 1024);
    let mut encoder = flate2::GzBuilder::new()
        .filename("layer.tar")
        .comment("a comment")
        .extra(noise(2, 900))
        .mtime(77)
        .write(Vec::new(), flate2::Compression::none());
    encoder.write_all(&named).unwrap();
    layers.push(Layer::from_blob(Compression::Gzip, encoder.finish().unwrap()));
    // zstd: two frames with a skippable one between.
    let frames = tar("frames", 1024);
    let (first, second) = frames.split_at(40_000);
    let mut blob = zstd::encode_all(first, 1).unwrap();
    blob.extend([0x50, 0x2a, 0x4d, 0x18, 5, 0, 0, 0]);
    blob.extend(b"skip!");
    blob.extend(zstd::encode_all(second, 19).unwrap());
    layers.push(Layer::from_blob(Compression::Zstd, blob));
    layers.push(Layer::build(Compression::Gzip, |tar| {
        // Global PAX headers say something about the archive; containerd does not apply them to entries.
        tar.pax(
            b'g',
            &[
                (b"comment".to_vec(), b"of git archive".to_vec()),
                (b"mtime".to_vec(), b"1".to_vec()),
            ],
        )?;
        tar.add(Entry::dir("old"))?;
        // Type flag NUL is a file, and with a slash at the end a directory: tar before POSIX.
        let mut header = Header {
            name: b"old/file".to_vec(),
            typeflag: 0,
            size: 3,
            magic: Magic::V7,
            ..Header::default()
        };
        tar.raw(&header.encode())?;
        tar.data(b"v7!")?;
        header.name = b"old/dir/".to_vec();
        header.size = 0;
        header.mode = 0o755;
        tar.raw(&header.encode())?;
        // Numbers with blanks in front and without a terminator, which several archivers write.
        let mut block = Header {
            name: b"old/blanks".to_vec(),
            size: 5,
            ..Header::default()
        }
        .encode();
        block[100..108].copy_from_slice(b"   640 \0");
        block[108..116].copy_from_slice(b"00001750");
        block[124..136].copy_from_slice(b"          5 ");
        seal(&mut block);
        tar.raw(&block)?;
        tar.data(b"blank")?;
        // A checksum over signed bytes, as some old programs made it, needs a byte over 127 to differ.
        let mut block = Header {
            name: b"old/signed-\xff".to_vec(),
            ..Header::default()
        }
        .encode();
        block[148..156].fill(b' ');
        let sum: i32 = block.iter().map(|byte| i32::from(*byte as i8)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        tar.raw(&block)
    }));
    Case {
        // A global header's own name is in it.
        implied_dirs: vec!["PaxHeaders.0".to_owned()],
        ..case("archives", layers)
    }
}

/// Regular entries of the layer with very many.
pub const MANY: usize = 100_000;

/// One layer with [`MANY`] files in directories of a thousand, and one directory that holds a tenth of them.
pub fn many_entries() -> Case {
    let layer = Layer::build(Compression::Gzip, |tar| {
        tar.add(Entry::dir("many"))?;
        for index in 0..MANY {
            let dir = if index % 10 == 0 {
                "many/wide".to_owned()
            } else {
                format!("many/d{:03}", index / 1000)
            };
            if index % 1000 < 2 && (index % 10 != 0 || index == 0) {
                tar.add(Entry::dir(&dir))?;
            }
            let text = format!("{index}\n");
            tar.add(Entry::file(format!("{dir}/f{index:06}"), text).mtime(1_000_000_000 + index as i64))?;
        }
        Ok(())
    });
    case("many_entries", vec![layer])
}

/// Bytes of the file that is larger than 32 bits count, with a few over.
pub const HUGE: u64 = (3 << 30) + 4321;

/// One layer with one file of [`HUGE`] bytes, which compresses well, between two small ones.
pub fn huge_file() -> Case {
    let layer = Layer::of(
        Compression::Gzip,
        [
            Entry::dir("h"),
            Entry::file("h/before", "before"),
            Entry::pattern("h/huge", 1, HUGE),
            Entry::file("h/after", "after"),
        ],
    );
    case("huge_file", vec![layer])
}
