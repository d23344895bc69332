//! An OCI image layout as a [`Source`]: a directory with `oci-layout`, `index.json` and `blobs/sha256/<digest>`.
//!
//! An image is named by the annotation `org.opencontainers.image.ref.name` of its entry in `index.json`. An empty name means the
//! only image there; if there are several, and they state their platforms, `index.json` itself is the index to choose from, else
//! the first of them. File names are made of digests only, so nothing in the directory can name a file outside of `blobs`.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt};

use super::image::{Document, Index};
use super::{Blob, Body, MAX_MANIFEST, ManifestBytes, Origin, RegistryError, Source, SourceStats};
use crate::layer::Digest;

/// Annotation that names an image of a layout.
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Media type of `index.json`.
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Bytes read at once: enough to keep a disk busy, little enough for many readers.
const PIECE: u64 = 1 << 20;
/// Largest `oci-layout`, in bytes.
const MAX_MARKER: u64 = 4096;

/// An OCI image layout.
pub struct OciLayout(Arc<Layout>);

struct Layout {
    dir: PathBuf,
    files_read: AtomicU64,
    bytes: AtomicU64,
}

impl OciLayout {
    /// The layout in `dir`. Reads its `oci-layout`, a few bytes.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`] or [`RegistryError::Image`] if `dir` is no layout, or one of another version.
    pub fn open(dir: &Path) -> Result<Arc<Self>, RegistryError> {
        let layout = Layout {
            dir: dir.to_owned(),
            files_read: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        };
        let marker = layout.read_whole(&dir.join("oci-layout"), MAX_MARKER)?;
        let version = serde_json::from_slice::<serde_json::Value>(&marker)
            .ok()
            .and_then(|value| Some(value.get("imageLayoutVersion")?.as_str()?.to_owned()));
        match version {
            Some(version) if version.starts_with("1.") => Ok(Arc::new(OciLayout(Arc::new(layout)))),
            other => Err(RegistryError::Image {
                what: format!("{}", dir.display()),
                problem: format!(
                    "it is an OCI layout of version {}, not 1",
                    other.as_deref().unwrap_or("unknown")
                ),
            }),
        }
    }
}

impl Source for OciLayout {
    fn manifest<'a>(&'a self, reference: &'a str) -> BoxFuture<'a, Result<ManifestBytes, RegistryError>> {
        let (layout, reference) = (self.0.clone(), reference.to_owned());
        Box::pin(run(self.0.clone(), move || layout.manifest(&reference)))
    }

    fn blob(&self, digest: Digest, size: u64) -> Arc<dyn Blob> {
        Arc::new(FileBlob {
            layout: self.0.clone(),
            digest,
            size,
        })
    }

    fn read_small(&self, digest: Digest, size: u64, limit: u64) -> BoxFuture<'_, Result<Bytes, RegistryError>> {
        let layout = self.0.clone();
        Box::pin(run(self.0.clone(), move || {
            if size > limit {
                return Err(RegistryError::Image {
                    what: format!("{digest} of {}", layout.dir.display()),
                    problem: format!("it has {size} bytes, more than the {limit} that are read of such a blob"),
                });
            }
            layout.verified(digest, limit)
        }))
    }

    fn describe(&self) -> String {
        format!("oci:{}", self.0.dir.display())
    }

    fn stats(&self) -> SourceStats {
        SourceStats {
            requests: self.0.files_read.load(Ordering::Relaxed),
            bytes: self.0.bytes.load(Ordering::Relaxed),
            ignores_ranges: false,
        }
    }
}

/// Runs file work off the async workers.
async fn run<T: Send + 'static>(
    layout: Arc<Layout>,
    work: impl FnOnce() -> Result<T, RegistryError> + Send + 'static,
) -> Result<T, RegistryError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(RegistryError::Unreadable {
            path: layout.dir.display().to_string(),
            what: format!("reading ended: {error}"),
        })
    })
}

impl Layout {
    fn manifest(&self, reference: &str) -> Result<ManifestBytes, RegistryError> {
        if reference.contains(':')
            && let Ok(digest) = reference.parse::<Digest>()
        {
            return self.manifest_blob(digest, String::new());
        }
        let path = self.dir.join("index.json");
        let bytes = self.read_whole(&path, MAX_MANIFEST)?;
        let Document::Index(index) = Document::parse(&bytes)? else {
            return Err(RegistryError::Image {
                what: path.display().to_string(),
                problem: "it is not an index".to_owned(),
            });
        };
        let entry = if reference.is_empty() {
            if index.manifests.len() > 1 && index.manifests.iter().all(|entry| entry.platform.is_some()) {
                return Ok(ManifestBytes {
                    media_type: OCI_INDEX.to_owned(),
                    digest: Digest::of(&bytes),
                    bytes: bytes.into(),
                });
            }
            index.manifests.first()
        } else {
            index
                .manifests
                .iter()
                .find(|entry| entry.descriptor.annotations.get(REF_NAME).map(String::as_str) == Some(reference))
        };
        let entry = entry.ok_or_else(|| RegistryError::NotFound {
            host: self.dir.display().to_string(),
            what: match (reference, names(&index)) {
                ("", _) => "image".to_owned(),
                (name, there) if there.is_empty() => format!("image named {name:?}, its images have no names"),
                (name, there) => format!("image named {name:?}; it has {there}"),
            },
        })?;
        self.manifest_blob(entry.descriptor.digest, entry.descriptor.media_type.clone())
    }

    fn manifest_blob(&self, digest: Digest, media_type: String) -> Result<ManifestBytes, RegistryError> {
        let bytes = self.verified(digest, MAX_MANIFEST)?;
        let media_type = match media_type.is_empty() {
            false => media_type,
            true => serde_json::from_slice::<serde_json::Value>(&bytes)
                .ok()
                .and_then(|value| Some(value.get("mediaType")?.as_str()?.to_owned()))
                .unwrap_or_default(),
        };
        Ok(ManifestBytes {
            media_type,
            digest,
            bytes,
        })
    }

    /// A whole blob of at most `limit` bytes, verified.
    fn verified(&self, digest: Digest, limit: u64) -> Result<Bytes, RegistryError> {
        let bytes = self.read_whole(&self.path(digest), limit)?;
        let actual = Digest::of(&bytes);
        if actual != digest {
            return Err(RegistryError::Image {
                what: self.path(digest).display().to_string(),
                problem: format!("its bytes have digest {actual}"),
            });
        }
        Ok(bytes.into())
    }

    fn path(&self, digest: Digest) -> PathBuf {
        self.dir.join("blobs/sha256").join(digest.hex())
    }

    fn read_whole(&self, path: &Path, limit: u64) -> Result<Vec<u8>, RegistryError> {
        let (file, size) = open(path)?;
        if size > limit {
            return Err(RegistryError::Image {
                what: path.display().to_string(),
                problem: format!("it has {size} bytes, more than the {limit} that are read of such a file"),
            });
        }
        // At most `limit`, which callers keep within memory.
        let mut bytes = vec![0; size as usize];
        file.read_exact_at(&mut bytes, 0)
            .map_err(|error| io_error(path, &error))?;
        self.files_read.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(size, Ordering::Relaxed);
        Ok(bytes)
    }
}

/// Opens a regular file, and gives its size.
fn open(path: &Path) -> Result<(File, u64), RegistryError> {
    // Non-blocking: opening a fifo would wait for its writer.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(|error| io_error(path, &error))?;
    let meta = file.metadata().map_err(|error| io_error(path, &error))?;
    if !meta.is_file() {
        return Err(RegistryError::Image {
            what: path.display().to_string(),
            problem: "it is not a regular file".to_owned(),
        });
    }
    Ok((file, meta.len()))
}

fn io_error(path: &Path, error: &io::Error) -> RegistryError {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
            let (dir, name) = (path.parent().unwrap_or(path), path.file_name().unwrap_or_default());
            RegistryError::NotFound {
                host: dir.display().to_string(),
                what: format!("file {}", name.to_string_lossy()),
            }
        }
        _ => RegistryError::Unreadable {
            path: path.display().to_string(),
            what: error.to_string(),
        },
    }
}

fn names(index: &Index) -> String {
    const SHOWN: usize = 12;
    let names: Vec<_> = index
        .manifests
        .iter()
        .filter_map(|entry| entry.descriptor.annotations.get(REF_NAME))
        .take(SHOWN)
        .map(String::as_str)
        .collect();
    names.join(", ")
}

struct FileBlob {
    layout: Arc<Layout>,
    digest: Digest,
    size: u64,
}

impl Blob for FileBlob {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        Box::pin(self.open(range))
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn describe(&self) -> String {
        format!("oci:{}@{}", self.layout.dir.display(), self.digest)
    }

    /// A directory is a host of its own: a disk that hangs is no registry's matter.
    fn origin(&self) -> Origin {
        Origin::new("oci:", &self.layout.dir.to_string_lossy())
    }
}

impl FileBlob {
    async fn open(&self, range: Range<u64>) -> Result<Body, RegistryError> {
        let path = self.layout.path(self.digest);
        if range.start > range.end || range.end > self.size {
            return Err(RegistryError::Image {
                what: self.describe(),
                problem: format!(
                    "bytes {}..{} were asked for, it has {}",
                    range.start, range.end, self.size
                ),
            });
        }
        let expected = self.size;
        let opened = path.clone();
        let file = run(self.layout.clone(), move || {
            let (file, size) = open(&opened)?;
            if size != expected {
                return Err(RegistryError::Image {
                    what: opened.display().to_string(),
                    problem: format!("it has {size} bytes, its descriptor says {expected}"),
                });
            }
            Ok(file)
        })
        .await?;
        self.layout.files_read.fetch_add(1, Ordering::Relaxed);
        let state = (self.layout.clone(), Arc::new(file), Arc::new(path), range.start);
        let body = stream::try_unfold(state, move |(layout, file, path, position)| async move {
            let len = range.end.saturating_sub(position).min(PIECE);
            if len == 0 {
                return Ok(None);
            }
            let (source, name) = (file.clone(), path.clone());
            let piece = run(layout.clone(), move || {
                // At most `PIECE`.
                let mut piece = vec![0; len as usize];
                source
                    .read_exact_at(&mut piece, position)
                    .map_err(|error| io_error(&name, &error))?;
                Ok(Bytes::from(piece))
            })
            .await?;
            layout.bytes.fetch_add(len, Ordering::Relaxed);
            Ok(Some((piece, (layout, file, path, position + len))))
        });
        Ok(body.boxed())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use futures::TryStreamExt;
    use serde_json::json;

    use super::*;
    use crate::registry::image;

    struct Fixture {
        dir: tempfile::TempDir,
    }

    impl Fixture {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
            fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
            Fixture { dir }
        }

        fn blob(&self, bytes: &[u8]) -> serde_json::Value {
            let digest = Digest::of(bytes);
            fs::write(self.dir.path().join("blobs/sha256").join(digest.hex()), bytes).unwrap();
            json!({"digest": digest.to_string(), "size": bytes.len()})
        }

        fn image(&self, layer: &[u8]) -> serde_json::Value {
            let config = json!({
                "os": "linux", "architecture": image::Platform::host().architecture,
                "rootfs": {"type": "layers", "diff_ids": [Digest::of(layer).to_string()]},
            });
            let config = self.blob(config.to_string().as_bytes());
            let manifest = json!({"schemaVersion": 2, "config": config, "layers": [self.blob(layer)]});
            self.blob(manifest.to_string().as_bytes())
        }

        fn index(&self, manifests: serde_json::Value) {
            let index = json!({"schemaVersion": 2, "manifests": manifests});
            fs::write(self.dir.path().join("index.json"), index.to_string()).unwrap();
        }

        fn open(&self) -> Arc<OciLayout> {
            OciLayout::open(self.dir.path()).unwrap()
        }
    }

    fn named(mut entry: serde_json::Value, name: &str) -> serde_json::Value {
        entry["annotations"] = json!({ REF_NAME: name });
        entry
    }

    #[tokio::test]
    async fn images_are_found_by_name_or_alone() {
        let fixture = Fixture::new();
        let (one, two) = (fixture.image(b"layer one"), fixture.image(b"layer two"));
        fixture.index(json!([named(one, "1"), named(two, "2")]));
        let layout = fixture.open();
        for (reference, layer) in [("", &b"layer one"[..]), ("1", b"layer one"), ("2", b"layer two")] {
            let image = image::resolve(&*layout, reference).await.unwrap();
            assert_eq!(image.layers[0].digest, Digest::of(layer), "{reference}");
            let blob = layout.blob(image.layers[0].digest, image.layers[0].size);
            let body: Vec<Bytes> = blob.read(2..7).await.unwrap().try_collect().await.unwrap();
            assert_eq!(body.concat(), layer[2..7]);
        }
        let error = image::resolve(&*layout, "3").await.unwrap_err().to_string();
        assert!(error.contains("it has 1, 2"), "{error}");
        assert!(layout.stats().requests > 0 && layout.stats().bytes > 0);
    }

    #[tokio::test]
    async fn an_index_by_platform_is_chosen_from() {
        let fixture = Fixture::new();
        let (mut one, mut two) = (fixture.image(b"layer one"), fixture.image(b"layer two"));
        one["platform"] = json!({"os": "plan9", "architecture": "mips"});
        two["platform"] = json!({"os": "linux", "architecture": image::Platform::host().architecture});
        fixture.index(json!([one, two]));
        let image = image::resolve(&*fixture.open(), "").await.unwrap();
        assert_eq!(image.layers[0].digest, Digest::of(b"layer two"));
    }

    #[tokio::test]
    async fn large_blobs_come_in_pieces() {
        let fixture = Fixture::new();
        let bytes: Vec<u8> = (0..PIECE as usize * 2 + 5).map(|n| (n % 251) as u8).collect();
        fixture.blob(&bytes);
        let blob = fixture.open().blob(Digest::of(&bytes), bytes.len() as u64);
        let body: Vec<Bytes> = blob.read(0..blob.size()).await.unwrap().try_collect().await.unwrap();
        assert_eq!(body.len(), 3);
        assert_eq!(body.concat(), bytes);
        assert!(blob.read(3..3).await.unwrap().next().await.is_none());
        assert!(blob.read(3..blob.size() + 1).await.is_err());
    }

    #[tokio::test]
    async fn what_is_damaged_or_missing_is_named() {
        let fixture = Fixture::new();
        fixture.index(json!([fixture.image(b"layer")]));
        let layout = fixture.open();
        let good = fixture.blob(b"good");
        let digest: Digest = good["digest"].as_str().unwrap().parse().unwrap();
        let path = fixture.dir.path().join("blobs/sha256").join(digest.hex());
        fs::write(&path, b"evil").unwrap();
        let error = layout.read_small(digest, 4, 100).await.unwrap_err();
        assert!(
            matches!(&error, RegistryError::Image { problem, .. } if problem.contains("digest")),
            "{error}"
        );
        assert!(layout.read_small(digest, 101, 100).await.is_err());
        fs::write(&path, b"longer").unwrap();
        assert!(layout.blob(digest, 4).read(0..4).await.is_err());
        fs::remove_file(&path).unwrap();
        let error = layout.blob(digest, 4).read(0..4).await.err().unwrap();
        assert!(matches!(error, RegistryError::NotFound { .. }), "{error}");
        fs::create_dir(&path).unwrap();
        assert!(layout.blob(digest, 4).read(0..4).await.is_err());
        assert!(matches!(
            OciLayout::open(Path::new("/nonexistent")).err().unwrap(),
            RegistryError::NotFound { .. }
        ));
        fs::write(
            fixture.dir.path().join("oci-layout"),
            r#"{"imageLayoutVersion":"2.0.0"}"#,
        )
        .unwrap();
        assert!(OciLayout::open(fixture.dir.path()).is_err());
    }
}
