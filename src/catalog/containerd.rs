//! A small client of containerd's own API: reading manifests and configs out of its content store, and (for `lazuli pull`)
//! writing images into it.
//!
//! The connection is made when it is first needed and again after containerd restarts. Every call has a deadline. Only read calls
//! may be made while containerd waits for an answer of ours: Commit and Update run inside containerd's write transaction.

use std::collections::{HashMap, HashSet};
use std::error::Error as _;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use hyper_util::rt::TokioIo;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::net::UnixStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Status, Streaming};

use crate::layer::Digest;
use crate::proto::containers::v1 as containers;
use crate::proto::containers::v1::containers_client::ContainersClient;
use crate::proto::content::v1 as content;
use crate::proto::content::v1::content_client::ContentClient;
use crate::proto::diff::v1 as diff;
use crate::proto::diff::v1::diff_client::DiffClient;
use crate::proto::images::v1 as images;
use crate::proto::images::v1::images_client::ImagesClient;
use crate::proto::leases::v1 as leases;
use crate::proto::leases::v1::leases_client::LeasesClient;
use crate::proto::namespaces::v1 as namespaces;
use crate::proto::namespaces::v1::namespaces_client::NamespacesClient;
use crate::proto::version::v1::version_client::VersionClient;
use crate::registry::image::Command;

mod gathered;
mod ingest;
mod plugins;

use gathered::Gathered;
pub use ingest::{BlobWriter, Ingest, IngestError, IngestWriter, Ingested, layer_reference};

/// Longest wait for one answer of containerd. Its own bolt transactions take milliseconds; a node under heavy load, seconds.
pub(super) const CALL_DEADLINE: Duration = Duration::from_secs(20);
/// Longest wait for the socket.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// What may be under way on one stream, in bytes: with HTTP/2's own 64 KiB, blobs would come at a fraction of what the socket can do.
const WINDOW: u32 = 4 << 20;
/// What may be under way on a connection, in bytes: the most there can be. Everything that is asked of containerd shares one, and a blob that is
/// read as slowly as its layer is packed must not hold up the question that a container waits for.
const CONNECTION_WINDOW: u32 = (1 << 31) - 1;
/// Largest message, both ways: what containerd itself allows.
pub const MAX_MESSAGE: usize = 16 << 20;
/// Largest manifest or config that is read, in bytes: what containerd itself accepts from a registry.
const MAX_DOCUMENT: u64 = 8 << 20;

/// Header that names the namespace of a call.
pub const NAMESPACE_HEADER: &str = "containerd-namespace";
/// Label that says that content came from a repository of a host.
pub fn source_label(host: &str, repository: &str) -> (String, String) {
    let host = host.rsplit_once(':').map_or(host, |(host, _)| host);
    (format!("{SOURCE_LABEL}{host}"), repository.to_owned())
}

/// Label of a manifest that keeps the layer at a position.
pub fn layer_label(at: usize) -> String {
    format!("{CONTENT_LABEL}.l.{at}")
}

/// Header that names the lease of a call.
pub const LEASE_HEADER: &str = "containerd-lease";
/// Prefix of labels that name content which is kept with what they are on.
pub const CONTENT_LABEL: &str = "containerd.io/gc.ref.content";
/// Label of a manifest that names its config; it tells image manifests from everything else in a content store.
pub const CONFIG_LABEL: &str = "containerd.io/gc.ref.content.config";
/// Prefix of the labels that say where content came from; a host name without its port follows, the value lists repositories.
pub const SOURCE_LABEL: &str = "containerd.io/distribution.source.";

/// A call to containerd that failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ContainerdError {
    /// containerd cannot be reached.
    #[error("cannot reach containerd at {address}: {what}")]
    Unreachable {
        /// The socket.
        address: PathBuf,
        /// The cause.
        what: String,
    },
    /// containerd answered with an error.
    #[error("containerd refuses to {action}: {what}")]
    Refused {
        /// What was asked for.
        action: String,
        /// Its gRPC code.
        code: Code,
        /// Its words.
        what: String,
    },
    /// What containerd holds is not what it should be.
    #[error("{what}")]
    Content {
        /// What is wrong.
        what: String,
    },
}

impl ContainerdError {
    /// The gRPC code, if containerd answered at all.
    pub fn code(&self) -> Option<Code> {
        match self {
            ContainerdError::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }
}

/// What the content store says of a blob.
#[derive(Debug, Clone)]
pub struct ContentInfo {
    /// Its digest, as containerd writes it.
    pub digest: String,
    /// Its size in bytes.
    pub size: u64,
    /// Its labels.
    pub labels: HashMap<String, String>,
    /// When its record was last changed, in nanoseconds since the epoch.
    pub updated: i128,
}

/// What a container was made of and for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Started {
    /// Name of its image.
    pub image: String,
    /// Its snapshot.
    pub snapshot_key: String,
    /// What it runs: the program and its arguments.
    pub args: Vec<String>,
    /// Its environment.
    pub env: Vec<String>,
    /// The directory that it begins in.
    pub directory: String,
}

impl Started {
    /// What it runs, as an image would say it.
    pub fn command(&self) -> Command {
        Command {
            args: self.args.clone(),
            env: self.env.clone(),
            directory: self.directory.clone(),
        }
    }
}

/// The part of an OCI runtime specification that tells what is run.
#[derive(serde::Deserialize)]
struct RuntimeSpec {
    process: RuntimeProcess,
}

#[derive(serde::Deserialize)]
struct RuntimeProcess {
    args: Vec<String>,
    #[serde(default)]
    env: Vec<String>,
    #[serde(default)]
    cwd: String,
}

/// A client of one containerd. Cheap to clone.
#[derive(Clone)]
pub struct Containerd {
    address: PathBuf,
    channel: Channel,
}

impl Containerd {
    /// A client of the containerd at the unix socket `address`. Nothing is connected yet; must be called within a tokio runtime.
    pub fn new(address: &Path) -> Self {
        Containerd {
            address: address.to_owned(),
            channel: unix_channel(address),
        }
    }

    /// The connection, for clients of further services.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Turns a gRPC status into an error that says what was being done.
    pub fn error(&self, action: impl Into<String>, status: Status) -> ContainerdError {
        match status.code() {
            Code::Unavailable => ContainerdError::Unreachable {
                address: self.address.clone(),
                what: io_cause(&status).map_or_else(|| status.message().to_owned(), io::Error::to_string),
            },
            code => ContainerdError::Refused {
                action: action.into(),
                code,
                what: status.message().to_owned(),
            },
        }
    }

    /// containerd's version.
    ///
    /// # Errors
    /// [`ContainerdError`] if it does not answer.
    pub async fn version(&self) -> Result<String, ContainerdError> {
        let mut request = Request::new(());
        request.set_timeout(CALL_DEADLINE);
        let answer = VersionClient::new(self.channel()).version(request).await;
        Ok(answer
            .map_err(|s| self.error("tell its version", s))?
            .into_inner()
            .version)
    }

    /// All image manifests in `namespace`.
    ///
    /// # Errors
    /// [`ContainerdError`] if the content store cannot be listed.
    pub async fn manifests(&self, namespace: &str) -> Result<Vec<ContentInfo>, ContainerdError> {
        let filters = vec![format!("labels.\"{CONFIG_LABEL}\"")];
        let request = self.request(namespace, content::ListContentRequest { filters })?;
        let failed = |s| self.error("list its content", s);
        let mut stream = self.content().list(request).await.map_err(failed)?.into_inner();
        let mut found = Vec::new();
        while let Some(message) = stream.message().await.map_err(failed)? {
            found.extend(message.info.into_iter().map(content_info));
        }
        Ok(found)
    }

    /// What is recorded of one blob, or `None` if it is not there.
    ///
    /// # Errors
    /// [`ContainerdError`] if containerd does not answer.
    pub async fn info(&self, namespace: &str, digest: &Digest) -> Result<Option<ContentInfo>, ContainerdError> {
        let request = self.request(
            namespace,
            content::InfoRequest {
                digest: digest.to_string(),
            },
        )?;
        match self.content().info(request).await {
            Ok(answer) => Ok(answer.into_inner().info.map(content_info)),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(self.error(format!("describe {digest}"), status)),
        }
    }

    /// A manifest or config, verified.
    ///
    /// # Errors
    /// [`ContainerdError`] if it is absent, too large or damaged.
    pub async fn read(&self, namespace: &str, digest: &Digest) -> Result<Vec<u8>, ContainerdError> {
        let read = content::ReadContentRequest {
            digest: digest.to_string(),
            offset: 0,
            size: 0,
        };
        let failed = |s| self.error(format!("read {digest}"), s);
        let mut stream = self
            .content()
            .read(self.request(namespace, read)?)
            .await
            .map_err(failed)?
            .into_inner();
        let mut bytes = Vec::new();
        while let Some(message) = stream.message().await.map_err(failed)? {
            if bytes.len() + message.data.len() > MAX_DOCUMENT as usize {
                let what = format!("{digest} has more than {MAX_DOCUMENT} bytes, too many for a manifest or config");
                return Err(ContainerdError::Content { what });
            }
            bytes.extend_from_slice(&message.data);
        }
        if Digest::of(&bytes) != *digest {
            let what = format!("containerd's copy of {digest} is damaged; remove and pull the image again");
            return Err(ContainerdError::Content { what });
        }
        Ok(bytes)
    }

    /// Sets one label of a blob.
    ///
    /// # Errors
    /// [`ContainerdError`] if it is not there, or containerd does not answer.
    pub async fn label(&self, namespace: &str, digest: &Digest, key: &str, value: &str) -> Result<(), ContainerdError> {
        let info = content::Info {
            digest: digest.to_string(),
            labels: HashMap::from([(key.to_owned(), value.to_owned())]),
            ..Default::default()
        };
        let mask = prost_types::FieldMask {
            paths: vec![format!("labels.{key}")],
        };
        let update = content::UpdateRequest {
            info: Some(info),
            update_mask: Some(mask),
        };
        let updated = self.content().update(self.request(namespace, update)?).await;
        updated
            .map(drop)
            .map_err(|status| self.error(format!("label {digest}"), status))
    }

    /// Digests of all blobs in `namespace`.
    ///
    /// # Errors
    /// [`ContainerdError`] if the content store cannot be listed.
    pub async fn digests(&self, namespace: &str) -> Result<HashSet<String>, ContainerdError> {
        let request = self.request(namespace, content::ListContentRequest::default())?;
        let failed = |status| self.error("list its content", status);
        let mut stream = self.content().list(request).await.map_err(failed)?.into_inner();
        let mut found = HashSet::new();
        while let Some(message) = stream.message().await.map_err(failed)? {
            found.extend(message.info.into_iter().map(|info| info.digest));
        }
        Ok(found)
    }

    /// Digest of what an image's name stands for, a manifest or an index; `None` if there is no such image.
    ///
    /// # Errors
    /// [`ContainerdError`] if containerd does not answer, or answers something else.
    pub async fn image(&self, namespace: &str, name: &str) -> Result<Option<Digest>, ContainerdError> {
        let request = images::GetImageRequest { name: name.to_owned() };
        match self.images().get(self.request(namespace, request)?).await {
            Ok(answer) => {
                let target = answer.into_inner().image.and_then(|image| image.target);
                let digest = target.unwrap_or_default().digest;
                let malformed = |error| ContainerdError::Content {
                    what: format!("image {name:?} has the target {digest:?}: {error}"),
                };
                digest.parse().map(Some).map_err(malformed)
            }
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(self.error(format!("describe image {name}"), status)),
        }
    }

    /// What the container `id` runs, or `None` if there is none (yet), or it does not say.
    ///
    /// # Errors
    /// [`ContainerdError`] if containerd does not answer.
    pub async fn container(&self, namespace: &str, id: &str) -> Result<Option<Started>, ContainerdError> {
        let request = self.request(namespace, containers::GetContainerRequest { id: id.to_owned() })?;
        let mut client = ContainersClient::new(self.channel()).max_decoding_message_size(MAX_MESSAGE);
        let container = match client.get(request).await {
            Ok(answer) => answer.into_inner().container,
            Err(status) if status.code() == Code::NotFound => None,
            Err(status) => return Err(self.error(format!("describe container {id}"), status)),
        };
        let Some(container) = container else { return Ok(None) };
        let spec = container.spec.unwrap_or_default().value;
        // Not every runtime has a specification of this kind.
        let spec = serde_json::from_slice::<RuntimeSpec>(&spec).ok();
        Ok(spec.map(|spec| Started {
            image: container.image,
            snapshot_key: container.snapshot_key,
            args: spec.process.args,
            env: spec.process.env,
            directory: spec.process.cwd,
        }))
    }

    /// Makes a lease that ends after `hours` unless it is deleted before; one that is there is as good.
    ///
    /// # Errors
    /// [`ContainerdError`] if containerd refuses.
    pub async fn create_lease(&self, namespace: &str, id: &str, hours: u64) -> Result<(), ContainerdError> {
        let expire = SystemTime::now() + Duration::from_secs(hours * 3600);
        let expire = OffsetDateTime::from(expire).format(&Rfc3339);
        let expire = expire.map_err(|error| ContainerdError::Content {
            what: error.to_string(),
        })?;
        let create = leases::CreateRequest {
            id: id.to_owned(),
            labels: HashMap::from([("containerd.io/gc.expire".to_owned(), expire)]),
        };
        let request = self.request(namespace, create)?;
        match LeasesClient::new(self.channel()).create(request).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => Ok(()),
            Err(status) => Err(self.error("create a lease", status)),
        }
    }

    /// Has a lease hold a resource of this kind (`content`, `snapshots/NAME`) from now on, whether it is there yet or not.
    ///
    /// # Errors
    /// [`ContainerdError`] if containerd refuses.
    pub async fn add_to_lease(
        &self,
        namespace: &str,
        id: &str,
        kind: &str,
        resource: &str,
    ) -> Result<(), ContainerdError> {
        let add = leases::AddResourceRequest {
            id: id.to_owned(),
            resource: Some(leases::Resource {
                id: resource.to_owned(),
                r#type: kind.to_owned(),
            }),
        };
        let added = LeasesClient::new(self.channel())
            .add_resource(self.request(namespace, add)?)
            .await;
        added
            .map(drop)
            .map_err(|status| self.error(format!("keep {resource}"), status))
    }

    /// Ends a lease; with `collect`, containerd removes what nothing else refers to before it answers.
    ///
    /// # Errors
    /// [`ContainerdError`] if containerd refuses.
    pub async fn delete_lease(&self, namespace: &str, id: &str, collect: bool) -> Result<(), ContainerdError> {
        let delete = leases::DeleteRequest {
            id: id.to_owned(),
            sync: collect,
        };
        let deleted = LeasesClient::new(self.channel())
            .delete(self.request(namespace, delete)?)
            .await;
        deleted
            .map(drop)
            .map_err(|status| self.error("delete the lease", status))
    }

    /// Names of all images in `namespace`.
    ///
    /// # Errors
    /// [`ContainerdError`] if containerd does not answer.
    pub async fn image_names(&self, namespace: &str) -> Result<Vec<String>, ContainerdError> {
        let request = self.request(namespace, images::ListImagesRequest { filters: Vec::new() })?;
        let answer = self
            .images()
            .list(request)
            .await
            .map_err(|s| self.error("list its images", s))?;
        Ok(answer.into_inner().images.into_iter().map(|image| image.name).collect())
    }

    /// All namespaces.
    ///
    /// # Errors
    /// [`ContainerdError`] if containerd does not answer.
    pub async fn namespaces(&self) -> Result<Vec<String>, ContainerdError> {
        let mut request = Request::new(namespaces::ListNamespacesRequest {});
        request.set_timeout(CALL_DEADLINE);
        let listed = NamespacesClient::new(self.channel()).list(request).await;
        let listed = listed.map_err(|status| self.error("list its namespaces", status))?;
        let names = listed.into_inner().namespaces.into_iter();
        Ok(names.map(|namespace| namespace.name).collect())
    }

    /// Bytes of a blob from `offset` on, `size` of them, in messages of containerd's own choice; not verified. There is no deadline for all of
    /// them: whoever reads them has one for each.
    ///
    /// # Errors
    /// [`ContainerdError`] if containerd does not have it, or does not answer.
    pub async fn blob(
        &self,
        namespace: &str,
        digest: &Digest,
        offset: u64,
        size: u64,
    ) -> Result<Streaming<content::ReadContentResponse>, ContainerdError> {
        let in_range = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let mut request = Request::new(content::ReadContentRequest {
            digest: digest.to_string(),
            offset: in_range(offset),
            size: in_range(size),
        });
        request.metadata_mut().insert(NAMESPACE_HEADER, header(namespace)?);
        let answer = self.content().read(request).await;
        let answer = answer.map_err(|status| self.error(format!("read {digest}"), status))?;
        Ok(answer.into_inner())
    }

    /// Has containerd apply a layer by the differs that it has. Takes as long as that takes.
    ///
    /// # Errors
    /// containerd's answer, as it is.
    pub async fn apply(&self, namespace: &str, request: diff::ApplyRequest) -> Result<diff::ApplyResponse, Status> {
        let namespace = header(namespace).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let mut request = Request::new(request);
        request.metadata_mut().insert(NAMESPACE_HEADER, namespace);
        let answer = DiffClient::new(self.channel()).apply(request).await;
        answer.map(tonic::Response::into_inner)
    }

    /// A request in `namespace`, with a deadline.
    ///
    /// # Errors
    /// [`ContainerdError::Content`] if the namespace cannot be sent as a header.
    pub fn request<T>(&self, namespace: &str, message: T) -> Result<Request<T>, ContainerdError> {
        let mut request = Request::new(message);
        request.set_timeout(CALL_DEADLINE);
        request.metadata_mut().insert(NAMESPACE_HEADER, header(namespace)?);
        Ok(request)
    }

    fn content(&self) -> ContentClient<Channel> {
        ContentClient::new(self.channel()).max_decoding_message_size(MAX_MESSAGE)
    }

    fn images(&self) -> ImagesClient<Channel> {
        ImagesClient::new(self.channel()).max_decoding_message_size(MAX_MESSAGE)
    }
}

/// A lazily made, self-healing connection to a unix socket.
pub fn unix_channel(address: &Path) -> Channel {
    let address = address.to_owned();
    // The URI only fills the HTTP/2 authority; the connector decides where the bytes go.
    Endpoint::from_static("http://localhost")
        .connect_timeout(CONNECT_DEADLINE)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            let address = address.clone();
            async move {
                let socket = UnixStream::connect(address).await?;
                Ok::<_, io::Error>(TokioIo::new(Gathered::new(socket)))
            }
        }))
}

/// The system's own word on why a call did not reach the other side: no such socket, nobody who listens, not permitted.
pub fn io_cause(status: &Status) -> Option<&io::Error> {
    let mut cause = status.source();
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref() {
            return Some(error);
        }
        cause = error.source();
    }
    None
}

/// A header value.
///
/// # Errors
/// [`ContainerdError::Content`] if the text has characters that no header can carry.
pub fn header(text: &str) -> Result<MetadataValue<Ascii>, ContainerdError> {
    text.parse().map_err(|_| ContainerdError::Content {
        what: format!("{text:?} cannot be sent to containerd"),
    })
}

fn content_info(info: content::Info) -> ContentInfo {
    let updated = info.updated_at.or(info.created_at).unwrap_or_default();
    ContentInfo {
        digest: info.digest,
        size: u64::try_from(info.size).unwrap_or(0),
        labels: info.labels,
        updated: i128::from(updated.seconds) * 1_000_000_000 + i128::from(updated.nanos),
    }
}
