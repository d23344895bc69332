//! Images made in memory: layers from [`Tar`]s with a chosen compression, OCI or Docker manifests, and OCI layouts of them.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::sandbox::require_program;
use super::tar::{Entry, Tar, noise};

/// How a layer's tar is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// A plain tar.
    None,
    /// One gzip member.
    Gzip,
    /// One zstd frame.
    Zstd,
}

/// Which family of media types a manifest uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    /// `application/vnd.oci.*`.
    Oci,
    /// `application/vnd.docker.*`; has no media type for zstd.
    Docker,
}

/// Bytes with their digest and media type.
#[derive(Debug, Clone)]
pub struct Blob {
    /// `sha256:<hex>`.
    pub digest: String,
    /// The bytes.
    pub bytes: Arc<Vec<u8>>,
}

impl Blob {
    /// Bytes that name themselves.
    pub fn new(bytes: Vec<u8>) -> Self {
        Blob {
            digest: digest_of(&bytes),
            bytes: Arc::new(bytes),
        }
    }
}

/// `sha256:<hex>` of bytes.
pub fn digest_of(bytes: &[u8]) -> String {
    named(Sha256::digest(bytes).as_slice())
}

fn named(hash: &[u8]) -> String {
    let mut text = String::from("sha256:");
    for byte in hash {
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// A layer.
#[derive(Debug, Clone)]
pub struct Layer {
    /// The compressed bytes.
    pub blob: Blob,
    /// Digest of the uncompressed tar.
    pub diff_id: String,
    /// How it is compressed.
    pub compression: Compression,
    /// A media type other than the compression's own, to see what happens to it.
    pub media_type: Option<String>,
    /// Other places of the blob, for foreign layers.
    pub urls: Vec<String>,
    /// Annotations of its descriptor.
    pub annotations: BTreeMap<String, String>,
}

impl Layer {
    /// A layer of what `fill` writes; the end of the archive is added.
    pub fn build(compression: Compression, fill: impl FnOnce(&mut Tar) -> io::Result<()>) -> Self {
        Self::written(compression, |out| {
            let mut tar = Tar::new(out);
            fill(&mut tar)?;
            tar.finish()
        })
    }

    /// A layer of these entries.
    pub fn of(compression: Compression, entries: impl IntoIterator<Item = Entry>) -> Self {
        Self::build(compression, |tar| {
            entries.into_iter().try_for_each(|entry| tar.add(entry))
        })
    }

    /// A layer of a whole tar archive.
    pub fn from_tar(compression: Compression, tar: &[u8]) -> Self {
        Self::written(compression, |out| out.write_all(tar))
    }

    /// A layer of a blob that exists already.
    pub fn from_blob(compression: Compression, blob: Vec<u8>) -> Self {
        let mut reader: Box<dyn io::Read> = match compression {
            Compression::None => Box::new(blob.as_slice()),
            Compression::Gzip => Box::new(flate2::read::MultiGzDecoder::new(blob.as_slice())),
            Compression::Zstd => Box::new(zstd::Decoder::new(blob.as_slice()).unwrap()),
        };
        let diff_id = hashed(&mut io::sink(), |out| io::copy(&mut reader, out).map(drop));
        drop(reader);
        Layer {
            blob: Blob::new(blob),
            diff_id,
            compression,
            media_type: None,
            urls: Vec::new(),
            annotations: BTreeMap::new(),
        }
    }

    fn written(compression: Compression, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Self {
        let mut bytes = Vec::new();
        let diff_id = match compression {
            Compression::None => hashed(&mut bytes, fill),
            Compression::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(&mut bytes, flate2::Compression::new(4));
                let digest = hashed(&mut encoder, fill);
                encoder.finish().unwrap();
                digest
            }
            Compression::Zstd => {
                let mut encoder = zstd::Encoder::new(&mut bytes, 3).unwrap();
                let digest = hashed(&mut encoder, fill);
                encoder.finish().unwrap();
                digest
            }
        };
        Layer {
            blob: Blob::new(bytes),
            diff_id,
            compression,
            media_type: None,
            urls: Vec::new(),
            annotations: BTreeMap::new(),
        }
    }

    /// The media type of its descriptor.
    pub fn media_type(&self, flavour: Flavour) -> String {
        let base = match (flavour, self.compression) {
            (Flavour::Docker, Compression::None) => "application/vnd.docker.image.rootfs.diff.tar",
            // Docker never named zstd; this is what registries and containerd accept.
            (Flavour::Docker, Compression::Gzip) => "application/vnd.docker.image.rootfs.diff.tar.gzip",
            (Flavour::Docker, Compression::Zstd) => "application/vnd.docker.image.rootfs.diff.tar.zstd",
            (Flavour::Oci, Compression::None) => "application/vnd.oci.image.layer.v1.tar",
            (Flavour::Oci, Compression::Gzip) => "application/vnd.oci.image.layer.v1.tar+gzip",
            (Flavour::Oci, Compression::Zstd) => "application/vnd.oci.image.layer.v1.tar+zstd",
        };
        self.media_type.clone().unwrap_or_else(|| base.to_owned())
    }
}

fn hashed<W: Write>(out: &mut W, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> String {
    struct Hashing<'a, W> {
        out: &'a mut W,
        hash: Sha256,
    }
    impl<W: Write> Write for Hashing<'_, W> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let count = self.out.write(bytes)?;
            self.hash.update(&bytes[..count]);
            Ok(count)
        }
        fn flush(&mut self) -> io::Result<()> {
            self.out.flush()
        }
    }
    let hashing = Hashing {
        out,
        hash: Sha256::new(),
    };
    let mut buffered = io::BufWriter::with_capacity(256 << 10, hashing);
    fill(&mut buffered).unwrap();
    buffered.flush().unwrap();
    named(buffered.get_ref().hash.clone().finalize().as_slice())
}

/// A whole image for linux/amd64 (or what this machine is).
#[derive(Debug, Clone)]
pub struct Image {
    /// Layers, lowest first.
    pub layers: Vec<Layer>,
    /// The configuration.
    pub config: Blob,
    /// The manifest.
    pub manifest: Blob,
    /// The manifest's media type.
    pub media_type: &'static str,
}

/// The name of this machine's processor in an image.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

impl Image {
    /// An image of these layers, lowest first.
    pub fn new(flavour: Flavour, layers: Vec<Layer>) -> Self {
        Self::running(flavour, layers, &["sh"])
    }

    /// The same, of which containers run this command unless they are told otherwise.
    pub fn running(flavour: Flavour, layers: Vec<Layer>, command: &[&str]) -> Self {
        let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
        let config = json!({
            "architecture": architecture(),
            "os": "linux",
            "created": "2024-01-01T00:00:00Z",
            "config": { "Env": ["PATH=/usr/bin:/bin"], "Cmd": command, "WorkingDir": "/" },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = Blob::new(config.to_string().into_bytes());
        let (media_type, config_type) = match flavour {
            Flavour::Oci => (
                "application/vnd.oci.image.manifest.v1+json",
                "application/vnd.oci.image.config.v1+json",
            ),
            Flavour::Docker => (
                "application/vnd.docker.distribution.manifest.v2+json",
                "application/vnd.docker.container.image.v1+json",
            ),
        };
        let descriptors: Vec<Value> = layers
            .iter()
            .map(|layer| {
                let mut descriptor = json!({
                    "mediaType": layer.media_type(flavour),
                    "digest": layer.blob.digest,
                    "size": layer.blob.bytes.len(),
                });
                if !layer.urls.is_empty() {
                    descriptor["urls"] = json!(layer.urls);
                }
                if !layer.annotations.is_empty() {
                    descriptor["annotations"] = json!(layer.annotations);
                }
                descriptor
            })
            .collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": { "mediaType": config_type, "digest": config.digest, "size": config.bytes.len() },
            "layers": descriptors,
        });
        Image {
            layers,
            config,
            manifest: Blob::new(manifest.to_string().into_bytes()),
            media_type,
        }
    }

    /// Every blob that the manifest names.
    pub fn blobs(&self) -> impl Iterator<Item = &Blob> {
        self.layers.iter().map(|layer| &layer.blob).chain([&self.config])
    }

    /// Compressed bytes of all layers.
    pub fn layer_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.blob.bytes.len() as u64).sum()
    }

    /// Writes an OCI layout with this image as `tag`.
    pub fn write_layout(&self, dir: &Path, tag: &str) {
        let blobs = dir.join("blobs/sha256");
        fs::create_dir_all(&blobs).unwrap();
        for blob in self.blobs().chain([&self.manifest]) {
            fs::write(
                blobs.join(blob.digest.trim_start_matches("sha256:")),
                blob.bytes.as_slice(),
            )
            .unwrap();
        }
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [{
                "mediaType": self.media_type,
                "digest": self.manifest.digest,
                "size": self.manifest.bytes.len(),
                "annotations": { "org.opencontainers.image.ref.name": tag },
            }],
        });
        fs::write(dir.join("index.json"), index.to_string()).unwrap();
    }
}

/// Entries of a base file system in which containers can run `sh`, `find`, `cat`, `sha256sum`, `stat`: Debian's static busybox
/// with its usual names.
pub fn base_entries() -> Vec<Entry> {
    let busybox = fs::read(require_program("busybox")).unwrap();
    let dynamic = busybox.windows(16).any(|bytes| bytes == b"/lib64/ld-linux-");
    assert!(
        !dynamic,
        "busybox is not static; install it with: apt-get install busybox-static"
    );
    let mut entries: Vec<Entry> = ["bin", "dev", "etc", "proc", "root", "sys", "usr", "usr/bin"]
        .map(Entry::dir)
        .into();
    entries.push(Entry::dir("tmp").mode(0o1777));
    entries.push(Entry::file("bin/busybox", busybox).mode(0o755));
    for name in [
        "sh",
        "ls",
        "find",
        "cat",
        "sha256sum",
        "stat",
        "echo",
        "sleep",
        "mkdir",
        "rm",
        "mv",
        "ln",
        "wc",
        "head",
        "sort",
        "test",
        "touch",
        "id",
        "chmod",
        "readlink",
        "dd",
        "sync",
        "true",
    ] {
        entries.push(Entry::symlink(format!("bin/{name}"), "busybox"));
    }
    entries.push(Entry::file(
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
    ));
    entries.push(Entry::file("etc/group", "root:x:0:\nnogroup:x:65534:\n"));
    entries
}

/// Entries of an "application": a few hundred small files, some large ones that do not compress, links; deterministic.
pub fn application_entries() -> Vec<Entry> {
    let mut entries = vec![Entry::dir("app"), Entry::dir("app/lib"), Entry::dir("app/data")];
    for dir in 0..8 {
        entries.push(Entry::dir(format!("app/lib/p{dir}")));
        for file in 0..40_u64 {
            let seed = dir * 1000 + file;
            let text = format!("module {seed}\n").repeat((seed % 97) as usize);
            entries.push(Entry::file(format!("app/lib/p{dir}/m{file}.txt"), text).mtime(1_500_000_000 + seed as i64));
        }
    }
    for (name, length) in [
        ("small.bin", 70_000),
        ("middle.bin", 1_500_000),
        ("large.bin", 9_000_001),
    ] {
        entries.push(Entry::file(format!("app/data/{name}"), noise(length as u64, length)));
    }
    entries.push(Entry::symlink("app/current", "data/large.bin"));
    entries.push(Entry::hard_link("app/data/again.bin", "app/data/small.bin"));
    entries
}

/// Two layers: the base and the application.
pub fn ordinary(flavour: Flavour, compression: Compression) -> Image {
    Image::new(
        flavour,
        vec![
            Layer::of(compression, base_entries()),
            Layer::of(compression, application_entries()),
        ],
    )
}
