//! `lazuli index export --soci`: indexes for nodes that run SOCI's own snapshotter.

use std::path::Path;

use anyhow::bail;
use bytes::Bytes;
use clap::ValueEnum;
use futures::TryStreamExt;
use serde_json::{Value, json};

use super::failure::Usage;
use super::files::LayoutWriter;
use super::index::Subject;
use super::rows::{Row, row_of};
use super::status::short;
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
    pub push: Option<&'a Reference>,
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

/// An export whose places are found to be possible.
pub(super) struct Begun<'a> {
    export: Export<'a>,
    layout: Option<LayoutWriter>,
}

impl<'a> Export<'a> {
    /// Makes the output, before anything is downloaded.
    pub(super) fn begin(self) -> anyhow::Result<Begun<'a>> {
        if let (Version::V2, Some(reference)) = (self.version, self.push)
            && reference.digest.is_some()
        {
            let what = format!("--push {reference}: the image gets a new manifest, with another digest; name a tag");
            return Err(Usage(what).into());
        }
        let layout = self.output.map(LayoutWriter::begin).transpose()?;
        Ok(Begun { export: self, layout })
    }
}

impl Begun<'_> {
    pub(super) async fn run(mut self, registry: &Registry, subject: &Subject) -> anyhow::Result<Vec<Row>> {
        let push = self.export.push;
        let pusher = push.map(|reference| registry.pusher(&reference.host, &reference.repository));
        if let Some(pusher) = &pusher {
            self.export.check_target(pusher, subject).await?;
        }
        let (mut rows, mut entries, mut blobs) = (Vec::new(), Vec::new(), Vec::new());
        for layer in &subject.layers {
            let mut row = row_of(layer);
            match self.export.ztoc(&mut self.layout, subject, layer).await? {
                Ok(ztoc) => {
                    let media_type = match self.export.version {
                        Version::V1 => &layer.spec.media_type,
                        Version::V2 => oci_type(&layer.spec.media_type),
                    };
                    let entry = manifest::entry(&ztoc, &layer.spec.digest, media_type, self.export.span_size);
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
            let reasons = rows.iter().map(|row| format!("{} ({})", short(&row.layer), row.note));
            let reasons = reasons.collect::<Vec<_>>().join(", ");
            bail!("no layer of the image can be indexed: {reasons}");
        }
        blobs.push(Bytes::from_static(EMPTY));
        let documents = self.export.documents(subject, &entries, blobs)?;
        if let Some(layout) = self.layout {
            self.export.write(layout, subject, &documents)?;
        }
        if let (Some(pusher), Some(reference)) = (&pusher, push) {
            self.export.send(pusher, reference, subject, &documents).await?;
        }
        let digest = Digest::of(documents.image.as_ref().unwrap_or(&documents.index));
        let what = match self.export.version {
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
}

impl Export<'_> {
    /// Finds out whether a new manifest of the image could be pushed there: its layers are not pushed with it.
    async fn check_target(&self, pusher: &Pusher, subject: &Subject) -> anyhow::Result<()> {
        if self.version == Version::V1 {
            return Ok(());
        }
        for layer in &subject.layers {
            if !pusher.has_blob(layer.spec.digest).await? {
                let place = pusher.describe();
                bail!(
                    "{place} does not have layer {}: push the image there first",
                    layer.spec.digest
                );
            }
        }
        Ok(())
    }

    /// The zTOC of a layer; `Err` in the inner result says why there is none. The layer is written to the output on its way.
    async fn ztoc(
        &self,
        layout: &mut Option<LayoutWriter>,
        subject: &Subject,
        layer: &crate::catalog::images::PlannedLayer,
    ) -> anyhow::Result<Result<Vec<u8>, String>> {
        let spec = &layer.spec;
        let compression = match media_type(&spec.media_type) {
            Ok(media) => media.compression.unwrap_or(Compression::None),
            Err(error) => return Ok(Err(error.to_string())),
        };
        let mut layout = layout.as_mut().filter(|_| self.version == Version::V2);
        let mut builder = match ZtocBuilder::new(compression, self.span_size, TOOL) {
            _ if spec.size < self.min_layer_size => Err(format!("it has less than {} bytes", self.min_layer_size)),
            Ok(builder) => Ok(builder),
            Err(error) => Err(error.to_string()),
        };
        if builder.is_err() && layout.is_none() {
            return Ok(builder.map(|_| Vec::new()));
        }
        let file = layout.as_ref().map(|layout| layout.blob(&spec.digest));
        let mut file = file.transpose()?;
        let blob = subject.source.blob(spec.digest, spec.size);
        let mut body = blob.read(0..spec.size).await?;
        let mut hash = crate::layer::digest::Hasher::new();
        while let Some(bytes) = body.try_next().await? {
            hash.update(&bytes);
            if let Some(file) = &mut file {
                file.write(&bytes)?;
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
        if let (Some(layout), Some(file)) = (&mut layout, file) {
            layout.add(file);
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
    fn write(&self, mut layout: LayoutWriter, subject: &Subject, documents: &Documents) -> anyhow::Result<()> {
        for blob in documents.blobs.iter().chain([&documents.index]) {
            layout.add_bytes(blob)?;
        }
        for blob in documents.image.iter().chain(&documents.list) {
            layout.add_bytes(blob)?;
        }
        if self.version == Version::V2 {
            layout.add_bytes(&subject.image.config_bytes)?;
        }
        let root = match &documents.list {
            Some(list) => json!({ "mediaType": OCI_INDEX, "digest": Digest::of(list).to_string(), "size": list.len() }),
            None => json!({
                "mediaType": MANIFEST_TYPE, "digest": Digest::of(&documents.index).to_string(), "size": documents.index.len(),
                "artifactType": manifest::TYPE_V1,
            }),
        };
        let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [root] });
        layout.finish(&index.to_string())
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
