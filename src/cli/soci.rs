//! `lazuli index export --soci`: indexes for nodes that run SOCI's own snapshotter.

use std::path::Path;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use clap::ValueEnum;
use futures::TryStreamExt;
use serde_json::{Value, json};

use super::index::{Row, Subject, row_of};
use crate::catalog::soci::manifest;
use crate::layer::compression::media_type;
use crate::layer::soci::ZtocBuilder;
use crate::layer::{Compression, Digest};
use crate::registry::artifact::{Descriptor, EMPTY, Referrer};
use crate::registry::image::{MANIFEST_TYPE, OCI_INDEX};
use crate::registry::{Pusher, Reference, Registry};

/// Bytes below which SOCI's tool leaves a layer out unless it is told otherwise.
pub(super) const MIN_LAYER_SIZE: u64 = 10 << 20;
/// What an index says of who made it: what SOCI's tool writes, so that the same layer has one zTOC, whoever made it.
const TOOL: &str = "AWS SOCI CLI v0.2";

/// Which index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Version {
    /// An artifact about the image
    V1,
    /// Named by a new manifest of the image
    V2,
}

/// What to export, and to where.
pub(super) struct Export<'a> {
    pub version: Version,
    pub output: Option<&'a Path>,
    pub push: Option<&'a str>,
    pub span_size: u64,
    pub min_layer_size: u64,
}

/// What an export consists of.
struct Documents {
    /// zTOCs and the config.
    blobs: Vec<Bytes>,
    index: Bytes,
    /// What the index is about, for v1.
    subject: Descriptor,
    /// The image's new manifest, for v2.
    image: Option<Bytes>,
    list: Option<Bytes>,
}

impl Export<'_> {
    pub(super) async fn run(&self, registry: &Registry, subject: &Subject) -> anyhow::Result<Vec<Row>> {
        if self.output.is_none() && self.push.is_none() {
            bail!("say where it is to go: --output DIR, --push REF, or both");
        }
        let push = self.push.map(Reference::parse).transpose()?;
        if let Some(output) = self.output {
            std::fs::create_dir_all(output.join("blobs/sha256")).with_context(|| output.display().to_string())?;
        }
        let (mut rows, mut entries, mut blobs) = (Vec::new(), Vec::new(), Vec::new());
        for layer in &subject.layers {
            let mut row = row_of(layer);
            match self.ztoc(subject, layer).await? {
                Ok(ztoc) => {
                    let media_type = match self.version {
                        Version::V1 => &layer.spec.media_type,
                        Version::V2 => oci_type(&layer.spec.media_type),
                    };
                    let entry = manifest::entry(&ztoc, &layer.spec.digest, media_type, self.span_size);
                    row.index = Some(entry.digest.to_string());
                    row.index_bytes = Some(entry.size);
                    row.note = "exported".to_owned();
                    entries.push(entry);
                    blobs.push(Bytes::from(ztoc));
                }
                Err(reason) => row.note = reason,
            }
            rows.push(row);
        }
        if entries.is_empty() {
            bail!("no layer of the image can be indexed");
        }
        blobs.push(Bytes::from_static(EMPTY));
        let documents = self.documents(subject, &entries, blobs)?;
        if let Some(output) = self.output {
            self.write(output, subject, &documents)?;
        }
        if let Some(reference) = push {
            let pusher = registry.pusher(&reference.host, &reference.repository);
            self.send(&pusher, &reference, subject, &documents).await?;
        }
        let digest = Digest::of(documents.image.as_ref().unwrap_or(&documents.index));
        let what = match self.version {
            Version::V1 => "the index",
            Version::V2 => "the image's new manifest",
        };
        rows.push(Row {
            layer: digest.to_string(),
            note: what.to_owned(),
            ..Row::default()
        });
        Ok(rows)
    }

    /// The zTOC of a layer; `Err` in the inner result says why there is none. The layer is written to the output on its way.
    async fn ztoc(
        &self,
        subject: &Subject,
        layer: &crate::catalog::images::PlannedLayer,
    ) -> anyhow::Result<Result<Vec<u8>, String>> {
        use std::io::Write as _;
        let spec = &layer.spec;
        let compression = match media_type(&spec.media_type) {
            Ok(media) => media.compression.unwrap_or(Compression::None),
            Err(error) => return Ok(Err(error.to_string())),
        };
        let whole = self.output.is_some() && self.version == Version::V2;
        let mut builder = match ZtocBuilder::new(compression, self.span_size, TOOL) {
            _ if spec.size < self.min_layer_size => Err(format!("it has less than {} bytes", self.min_layer_size)),
            Ok(builder) => Ok(builder),
            Err(error) => Err(error.to_string()),
        };
        if builder.is_err() && !whole {
            return Ok(builder.map(|_| Vec::new()));
        }
        let mut file = match self.output.filter(|_| whole) {
            Some(output) => {
                let path = blob_path(output, &spec.digest);
                Some(std::fs::File::create(&path).with_context(|| path.display().to_string())?)
            }
            None => None,
        };
        let blob = subject.source.blob(spec.digest, spec.size);
        let mut body = blob.read(0..spec.size).await?;
        let mut hash = crate::layer::digest::Hasher::new();
        while let Some(bytes) = body.try_next().await? {
            hash.update(&bytes);
            if let Some(file) = &mut file {
                file.write_all(&bytes)?;
            }
            let Ok(mut building) = builder else { continue };
            // It decodes and hashes: not for the threads that wait for the network.
            builder = tokio::task::spawn_blocking(move || building.push(&bytes).map(|()| building))
                .await?
                .map_err(|error| error.to_string());
        }
        let actual = hash.finish();
        if actual != spec.digest {
            bail!("layer {} came with digest {actual}", spec.digest);
        }
        let built = match builder {
            Ok(builder) => tokio::task::spawn_blocking(move || builder.finish()).await?,
            Err(reason) => return Ok(Err(reason)),
        };
        Ok(built.map_err(|error| error.to_string()))
    }

    fn documents(&self, subject: &Subject, entries: &[Descriptor], blobs: Vec<Bytes>) -> anyhow::Result<Documents> {
        let image = &subject.image;
        let about = Descriptor {
            media_type: image.manifest_media_type.clone(),
            digest: image.manifest_digest,
            size: image.manifest_bytes.len() as u64,
            annotations: Default::default(),
        };
        let index = manifest::index(entries, (self.version == Version::V1).then_some(&about), TOOL);
        let (mut named, mut list) = (None, None);
        if self.version == Version::V2 {
            let new = manifest::with_index(&image.manifest_bytes, &Digest::of(&index)).map_err(anyhow::Error::msg)?;
            let config: Value = serde_json::from_slice(&image.config_bytes)?;
            let known = ["architecture", "os", "variant"].into_iter();
            let platform = known.filter_map(|key| Some((key.to_owned(), config.get(key)?.clone())));
            list = Some(manifest::list(&new, &index, &Value::Object(platform.collect())));
            named = Some(new);
        }
        Ok(Documents {
            blobs,
            index,
            subject: about,
            image: named,
            list,
        })
    }

    /// Writes an OCI layout.
    fn write(&self, output: &Path, subject: &Subject, documents: &Documents) -> anyhow::Result<()> {
        let mut blobs: Vec<&Bytes> = documents.blobs.iter().chain([&documents.index]).collect();
        blobs.extend(documents.image.iter().chain(&documents.list));
        if self.version == Version::V2 {
            blobs.push(&subject.image.config_bytes);
        }
        for bytes in blobs {
            let path = blob_path(output, &Digest::of(bytes));
            std::fs::write(&path, bytes).with_context(|| path.display().to_string())?;
        }
        let root = match &documents.list {
            Some(list) => json!({ "mediaType": OCI_INDEX, "digest": Digest::of(list).to_string(), "size": list.len() }),
            None => json!({
                "mediaType": MANIFEST_TYPE, "digest": Digest::of(&documents.index).to_string(), "size": documents.index.len(),
                "artifactType": manifest::TYPE_V1,
            }),
        };
        let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [root] });
        std::fs::write(output.join("index.json"), index.to_string())?;
        std::fs::write(output.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        Ok(())
    }

    /// Pushes the index, and for v2 the image's new manifest.
    async fn send(
        &self,
        pusher: &Pusher,
        reference: &Reference,
        subject: &Subject,
        documents: &Documents,
    ) -> anyhow::Result<()> {
        for blob in &documents.blobs {
            pusher.put_blob(blob.clone()).await?;
        }
        let digest = Digest::of(&documents.index);
        let listed = pusher
            .put_manifest(&digest.to_string(), MANIFEST_TYPE, documents.index.clone())
            .await?;
        let (Some(image), Some(list)) = (&documents.image, &documents.list) else {
            if !listed {
                let entry = Referrer {
                    media_type: MANIFEST_TYPE.to_owned(),
                    digest,
                    size: documents.index.len() as u64,
                    artifact_type: manifest::TYPE_V1.to_owned(),
                    annotations: Default::default(),
                };
                pusher.list_artifact(documents.subject.digest, entry).await?;
            }
            return Ok(());
        };
        for layer in &subject.layers {
            if !pusher.has_blob(layer.spec.digest).await? {
                let place = pusher.describe();
                bail!(
                    "{place} does not have layer {}: push the image there first",
                    layer.spec.digest
                );
            }
        }
        pusher.put_blob(subject.image.config_bytes.clone()).await?;
        let by_digest = Digest::of(image).to_string();
        pusher.put_manifest(&by_digest, MANIFEST_TYPE, image.clone()).await?;
        let tag = reference.tag.as_deref().unwrap_or("latest");
        pusher.put_manifest(tag, OCI_INDEX, list.clone()).await?;
        Ok(())
    }
}

/// The media type that a layer has in an image with a SOCI v2 index: OCI's.
fn oci_type(media_type: &str) -> &str {
    match media_type {
        "application/vnd.docker.image.rootfs.diff.tar.gzip" => "application/vnd.oci.image.layer.v1.tar+gzip",
        "application/vnd.docker.image.rootfs.diff.tar" => "application/vnd.oci.image.layer.v1.tar",
        other => other,
    }
}

fn blob_path(output: &Path, digest: &Digest) -> std::path::PathBuf {
    output.join("blobs/sha256").join(digest.hex())
}
