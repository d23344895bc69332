//! `lazuli pull`: makes an image in containerd without downloading its layers, on every containerd from 1.6 on.
//!
//! It is a client of containerd's own API and does what containerd's unpacker does: manifest and config go into the content store
//! with the labels that garbage collection follows, every layer is asked of the snapshotter (which answers that it exists already),
//! and at last the image gets its name. A layer that the snapshotter does not take is downloaded and unpacked by containerd. A lease
//! holds everything until the image has its name; if the pull dies, garbage collection removes what it left.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use futures::{Stream, TryStreamExt};
use tonic::transport::Channel;
use tonic::{Code, Request};

use crate::catalog::containerd::{
    BlobWriter, CONFIG_LABEL, Containerd, Ingest, IngestError, LEASE_HEADER, MAX_MESSAGE, header, layer_label,
    layer_reference, source_label,
};
use crate::config::Config;
use crate::layer::Digest;
use crate::proto::content::v1::content_client::ContentClient;
use crate::proto::diff::v1::diff_client::DiffClient;
use crate::proto::images::v1::images_client::ImagesClient;
use crate::proto::snapshots::v1::snapshots_client::SnapshotsClient;
use crate::proto::types::{Descriptor, Mount};
use crate::proto::{content, diff, images, snapshots};
use crate::registry::image::{Image, LayerDescriptor};
use crate::registry::{Reference, Registry, Source};

use super::failure::Interrupted;
use super::progress::Progress;
use super::status;
use super::summary::{Outcome, summary};
use super::work::Worker;
use super::{PullArgs, output, unique};

const LABEL_REF: &str = "containerd.io/snapshot.ref";
/// Longest wait for one layer: a layer that has to be streamed or unpacked is downloaded as a whole meanwhile.
const LAYER_DEADLINE: Duration = Duration::from_secs(3600);
/// How long containerd keeps the parts of a pull that died, in hours.
const LEASE_HOURS: u64 = 24;
/// Longest time for taking away what an interrupted pull has begun. The lease expires anyway; this only tidies up sooner.
const TIDYING: Duration = Duration::from_secs(5);
/// How often the progress bar asks the daemon how far streams have come.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);
/// How long containerd may take to reach a daemon that was restarted: its connection backs off to 3 s.
const RECONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// How often that is tried.
const RECONNECT_INTERVAL: Duration = Duration::from_millis(200);
/// How often it is looked whether another writer of a blob has ended.
const TAKEN_INTERVAL: Duration = Duration::from_millis(200);
/// Most bytes of labels that list an image's layers; containerd refuses labels over 4096 bytes with their keys.
const LAYERS_LABEL_MAX: usize = 4000;

pub(super) fn run(args: PullArgs) -> anyhow::Result<()> {
    let mut config = args.config.load()?;
    if let Some(address) = &args.containerd_address {
        config.containerd_address = address.clone();
    }
    let worker = Worker::client()?;
    let pull = worker.run(prepare(&config, &args))?;
    let progress = Progress::new(args.quiet, &pull.image.layers);
    let pulled = worker.run(async {
        tokio::select! {
            result = pull.run(&progress) => result,
            () = watch(&config.address, &progress) => unreachable!("the progress bar is watched until the pull ends"),
        }
    });
    progress.finish();
    if pulled.as_ref().is_err_and(|error| error.is::<Interrupted>()) {
        let tidied = worker.block_on(async { tokio::time::timeout(TIDYING, pull.delete_lease(true)).await });
        if !matches!(tidied, Ok(Ok(()))) {
            output::tell(&format!(
                "containerd removes what was pulled in {LEASE_HOURS} hours, with the lease {}",
                pull.lease
            ));
        }
    }
    let outcomes = pulled?;
    let status = worker.block_on(status::fetch(&config.address));
    output::print(&summary(&pull.reference, &pull.image, &outcomes, &status))
}

/// Finds out what is to be pulled.
async fn prepare(config: &Config, args: &PullArgs) -> anyhow::Result<Pull> {
    let reference = args.reference.clone();
    let registry = Registry::new(&config.registry, Default::default())?;
    let source = registry.repository(&reference.host, &reference.repository);
    let image = crate::registry::image::resolve(source.as_ref(), &reference.manifest_reference())
        .await
        .with_context(|| format!("resolving {reference}"))?;
    Ok(Pull {
        containerd: Containerd::new(&config.containerd_address),
        namespace: args.namespace.clone(),
        snapshotter: args.snapshotter.clone(),
        lease: format!("lazuli-pull-{}", unique()),
        reference,
        image,
        source,
    })
}

/// Shows what the daemon streams, as long as it is polled.
async fn watch(address: &std::path::Path, progress: &Progress) {
    loop {
        tokio::time::sleep(PROGRESS_INTERVAL).await;
        if progress.is_hidden() {
            continue;
        }
        match status::fetch(address).await {
            Ok(status) => progress.streams(&status.loading),
            Err(_) => progress.cannot_ask(),
        }
    }
}

struct Pull {
    containerd: Containerd,
    namespace: String,
    snapshotter: String,
    lease: String,
    reference: Reference,
    image: Image,
    source: std::sync::Arc<dyn Source>,
}

impl Pull {
    /// Pulls the image, and tells how each layer came to be there.
    async fn run(&self, progress: &Progress) -> anyhow::Result<Vec<Outcome>> {
        self.containerd.version().await?;
        self.create_lease().await?;
        let result = self.run_leased(progress).await;
        let deleted = self.delete_lease(false).await;
        let outcomes = result?;
        deleted?;
        Ok(outcomes)
    }

    /// What containerd calls the writer of a blob.
    fn writer(&self, digest: &Digest) -> String {
        format!("{}-{digest}", self.lease)
    }

    async fn run_leased(&self, progress: &Progress) -> anyhow::Result<Vec<Outcome>> {
        let image = &self.image;
        self.write(&image.config.digest, image.config_bytes.clone(), HashMap::new())
            .await?;
        let mut labels = HashMap::from([(CONFIG_LABEL.to_owned(), image.config.digest.to_string())]);
        for (i, layer) in image.layers.iter().enumerate() {
            labels.insert(layer_label(i), layer.digest.to_string());
        }
        self.write(&image.manifest_digest, image.manifest_bytes.clone(), labels)
            .await?;

        let mut outcomes = Vec::new();
        let mut parent = String::new();
        for (i, chain_id) in image.chain_ids.iter().enumerate() {
            let chain_id = chain_id.to_string();
            outcomes.push(self.layer(i, &parent, &chain_id, progress).await?);
            parent = chain_id;
            progress.done(i);
        }
        let top = format!("containerd.io/gc.ref.snapshot.{}", self.snapshotter);
        self.label(&image.config.digest, &top, &parent).await?;
        self.name_image().await?;
        Ok(outcomes)
    }

    /// Makes one layer exist.
    async fn layer(&self, i: usize, parent: &str, chain_id: &str, progress: &Progress) -> anyhow::Result<Outcome> {
        // Before it is looked for: containerd adds to a lease what is made under it, not what is found, which may lose its last image or
        // container at any moment until this image has its name.
        self.hold(chain_id).await?;
        if self.exists(chain_id).await? {
            return Ok(Outcome::Present);
        }
        let mut client = self.snapshots();
        let snapshotter = || self.snapshotter.clone();
        let key = format!("extract-{} {chain_id}", unique());
        let prepare = snapshots::v1::PrepareSnapshotRequest {
            snapshotter: snapshotter(),
            key: key.clone(),
            parent: parent.to_owned(),
            labels: self.snapshot_labels(i, chain_id),
        };
        let mut request = self.request(prepare)?;
        request.set_timeout(LAYER_DEADLINE);
        match client.prepare(request).await {
            Err(status) if status.code() == Code::AlreadyExists => Ok(Outcome::Taken),
            Err(status) => Err(self.failed(
                format!("prepare layer {} of {}", i + 1, self.image.layers.len()),
                status,
            )),
            Ok(answer) => {
                let mounts = answer.into_inner().mounts;
                let unpacked = self.unpack(i, chain_id, &key, mounts, progress).await;
                if unpacked.is_err() {
                    let remove = snapshots::v1::RemoveSnapshotRequest {
                        snapshotter: snapshotter(),
                        key,
                    };
                    // The lease expires anyway; this only tidies up sooner.
                    let _ = client.remove(self.request(remove)?).await;
                }
                unpacked.map(|()| Outcome::Unpacked)
            }
        }
    }

    /// Whether there is a snapshot of this name. Waits for a daemon that was restarted just now: containerd takes a few seconds to
    /// notice that it is back.
    async fn exists(&self, name: &str) -> anyhow::Result<bool> {
        let begin = Instant::now();
        loop {
            let stat = snapshots::v1::StatSnapshotRequest {
                snapshotter: self.snapshotter.clone(),
                key: name.to_owned(),
            };
            match self.snapshots().stat(self.request(stat)?).await {
                Ok(_) => return Ok(true),
                Err(status) if status.code() == Code::NotFound => return Ok(false),
                Err(status) if status.code() == Code::Unavailable && begin.elapsed() < RECONNECT_DEADLINE => {
                    tokio::time::sleep(RECONNECT_INTERVAL).await;
                }
                Err(status) if status.code() == Code::Unavailable => {
                    let hint = format!(
                        "containerd does not reach its snapshotter {:?}; is `lazuli serve` running?",
                        self.snapshotter
                    );
                    return Err(self.failed(format!("describe snapshot {name}"), status).context(hint));
                }
                Err(status) => return Err(self.failed(format!("describe snapshot {name}"), status)),
            }
        }
    }

    /// Downloads a layer into containerd's content store and has containerd unpack it.
    async fn unpack(
        &self,
        i: usize,
        chain_id: &str,
        key: &str,
        mounts: Vec<Mount>,
        progress: &Progress,
    ) -> anyhow::Result<()> {
        let layer = &self.image.layers[i];
        self.download(layer, |received| progress.downloaded(i, received))
            .await?;
        let apply = diff::v1::ApplyRequest {
            diff: Some(descriptor(layer)),
            mounts,
            ..diff::v1::ApplyRequest::default()
        };
        let mut request = self.request(apply)?;
        request.set_timeout(LAYER_DEADLINE);
        let mut client = DiffClient::new(self.containerd.channel());
        let applied = client
            .apply(request)
            .await
            .map_err(|s| self.failed(format!("unpack layer {}", layer.digest), s))?;
        let applied = applied.into_inner().applied.map(|d| d.digest).unwrap_or_default();
        let expected = self.image.diff_ids[i].to_string();
        if applied != expected {
            bail!(
                "layer {} unpacks to {applied}, but the image promises {expected}",
                layer.digest
            );
        }
        let commit = snapshots::v1::CommitSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            name: chain_id.to_owned(),
            key: key.to_owned(),
            labels: HashMap::from([(LABEL_REF.to_owned(), chain_id.to_owned())]),
            parent: String::new(),
        };
        let committed = self.snapshots().commit(self.request(commit)?).await;
        committed
            .map(|_| ())
            .map_err(|s| self.failed(format!("commit snapshot {chain_id}"), s))
    }

    /// Writes a layer into the content store. Its writer is called as containerd calls its own, so that two of them do not write the same: while
    /// another one does, perhaps Lazuli itself with what it streams, that one is waited for.
    async fn download(&self, layer: &LayerDescriptor, arrived: impl Fn(u64)) -> anyhow::Result<()> {
        let begin = Instant::now();
        arrived(0);
        loop {
            let ingest = Ingest {
                namespace: &self.namespace,
                lease: &self.lease,
                reference: layer_reference(&layer.digest, &layer.annotations),
                digest: layer.digest,
                size: layer.size,
                labels: self.source_labels(),
            };
            let blob = self.source.blob(layer.digest, layer.size);
            let read = |range| async move { blob.read(range).await };
            match self.containerd.ingest(ingest, read, &arrived).await {
                Ok(_) => return Ok(()),
                Err(IngestError::Taken { .. }) if begin.elapsed() < LAYER_DEADLINE => {
                    tokio::time::sleep(TAKEN_INTERVAL).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn snapshot_labels(&self, i: usize, chain_id: &str) -> HashMap<String, String> {
        let image = &self.image;
        let mut above = String::new();
        for layer in &image.layers[i..] {
            let digest = layer.digest.to_string();
            if above.len() + digest.len() + 1 > LAYERS_LABEL_MAX {
                break;
            }
            if !above.is_empty() {
                above.push(',');
            }
            above.push_str(&digest);
        }
        let label = |name: &str| format!("containerd.io/snapshot/cri.{name}");
        HashMap::from([
            (LABEL_REF.to_owned(), chain_id.to_owned()),
            (label("image-ref"), self.reference.to_string()),
            (label("manifest-digest"), image.manifest_digest.to_string()),
            (label("layer-digest"), image.layers[i].digest.to_string()),
            (label("image-layers"), above),
        ])
    }

    async fn name_image(&self) -> anyhow::Result<()> {
        let image = images::v1::Image {
            name: self.reference.to_string(),
            labels: HashMap::new(),
            target: Some(Descriptor {
                media_type: self.image.manifest_media_type.clone(),
                digest: self.image.manifest_digest.to_string(),
                size: self.image.manifest_bytes.len() as i64,
                annotations: HashMap::new(),
            }),
            created_at: None,
            updated_at: None,
        };
        let mut client = ImagesClient::new(self.containerd.channel());
        let create = images::v1::CreateImageRequest {
            image: Some(image.clone()),
        };
        match client.create(self.request(create)?).await {
            Ok(_) => return Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => {}
            Err(status) => return Err(self.failed(format!("create image {}", self.reference), status)),
        }
        let mask = prost_types::FieldMask {
            paths: vec!["target".to_owned()],
        };
        let update = images::v1::UpdateImageRequest {
            image: Some(image),
            update_mask: Some(mask),
        };
        let updated = client.update(self.request(update)?).await;
        updated
            .map(|_| ())
            .map_err(|s| self.failed(format!("update image {}", self.reference), s))
    }

    /// Writes a small blob into the content store.
    async fn write(&self, digest: &Digest, bytes: Bytes, mut labels: HashMap<String, String>) -> anyhow::Result<()> {
        labels.extend(self.source_labels());
        let mut writer = BlobWriter::new(self.writer(digest), digest, bytes.len() as u64, labels.clone());
        let messages = vec![writer.piece(bytes), writer.commit()];
        if !self.store(digest, tokio_stream::iter(messages)).await? {
            // It is there already, perhaps from another pull: it needs our labels all the same.
            for (key, value) in labels {
                self.label(digest, &key, &value).await?;
            }
        }
        Ok(())
    }

    /// The labels that tell where content came from.
    fn source_labels(&self) -> HashMap<String, String> {
        HashMap::from([source_label(&self.reference.host, &self.reference.repository)])
    }

    /// Makes one `Content.Write` call; `false` if the blob was there already.
    async fn store(
        &self,
        digest: &Digest,
        messages: impl Stream<Item = content::v1::WriteContentRequest> + Send + 'static,
    ) -> anyhow::Result<bool> {
        let mut request = self.request(messages)?;
        request.set_timeout(LAYER_DEADLINE);
        let answer = match self.content().write(request).await {
            Ok(answers) => answers.into_inner().try_collect::<Vec<_>>().await.map(|_| ()),
            Err(status) => Err(status),
        };
        match answer {
            Ok(()) => Ok(true),
            Err(status) if status.code() == Code::AlreadyExists => Ok(false),
            Err(status) => Err(self.failed(format!("store {digest}"), status)),
        }
    }

    async fn label(&self, digest: &Digest, key: &str, value: &str) -> anyhow::Result<()> {
        Ok(self.containerd.label(&self.namespace, digest, key, value).await?)
    }

    async fn create_lease(&self) -> anyhow::Result<()> {
        Ok(self
            .containerd
            .create_lease(&self.namespace, &self.lease, LEASE_HOURS)
            .await?)
    }

    /// Has the lease hold the snapshot of this name from now on, whether it is there yet or not.
    async fn hold(&self, name: &str) -> anyhow::Result<()> {
        let kind = format!("snapshots/{}", self.snapshotter);
        Ok(self
            .containerd
            .add_to_lease(&self.namespace, &self.lease, &kind, name)
            .await?)
    }

    /// Lets go of what the pull has made; with `collect`, containerd removes what nothing else refers to before it answers.
    async fn delete_lease(&self, collect: bool) -> anyhow::Result<()> {
        Ok(self
            .containerd
            .delete_lease(&self.namespace, &self.lease, collect)
            .await?)
    }

    fn request<T>(&self, message: T) -> anyhow::Result<Request<T>> {
        let mut request = self.containerd.request(&self.namespace, message)?;
        request.metadata_mut().insert(LEASE_HEADER, header(&self.lease)?);
        Ok(request)
    }

    fn failed(&self, action: impl Into<String>, status: tonic::Status) -> anyhow::Error {
        let hint = match status.code() {
            Code::NotFound | Code::InvalidArgument if status.message().contains("snapshotter") => format!(
                "; does containerd's configuration have a [proxy_plugins.{}] entry, and is the daemon running?",
                self.snapshotter
            ),
            _ => String::new(),
        };
        let error = anyhow::Error::from(self.containerd.error(action, status));
        if hint.is_empty() {
            error
        } else {
            error.context(format!("pulling {} failed{hint}", self.reference))
        }
    }

    fn snapshots(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.containerd.channel()).max_decoding_message_size(MAX_MESSAGE)
    }

    fn content(&self) -> ContentClient<Channel> {
        ContentClient::new(self.containerd.channel()).max_decoding_message_size(MAX_MESSAGE)
    }
}

fn descriptor(layer: &LayerDescriptor) -> Descriptor {
    Descriptor {
        media_type: layer.media_type.clone(),
        digest: layer.digest.to_string(),
        size: layer.size as i64,
        annotations: layer.annotations.clone().into_iter().collect(),
    }
}
