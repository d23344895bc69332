//! Writing: blobs, manifests, artifacts about manifests, and their removal.
//!
//! A blob is sent in one piece (POST for a place, PUT to it); the blobs that Lazuli writes are indexes of a few MiB. Writes go to the
//! first host of the repository that takes them, as containerd's do, with a token of their own.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use http::{Method, StatusCode, header};
use url::Url;

use super::exchange::{Ask, Payload, Place};
use super::{Operation, Repository};
use crate::layer::Digest;
use crate::registry::artifact::{Artifact, Descriptor, EMPTY, MAX_REFERRERS, ReferrersIndex, fallback_tag};
use crate::registry::hosts::wire::Response;
use crate::registry::image::{MANIFEST_TYPE, OCI_INDEX};
use crate::registry::{Referrer, RegistryError};

/// Times that an upload is begun: a registry may lose the place of one that broke.
const UPLOADS: u32 = 2;
/// Times that a list of artifacts is written until an entry is found in it: another client may have written at the same time.
const LIST_WRITES: u32 = 4;

/// A repository to write to.
pub struct Pusher(pub(super) Arc<Repository>);

impl Pusher {
    /// Name for logs and errors: `registry.example/repo`.
    pub fn describe(&self) -> String {
        self.0.describe()
    }

    /// Whether the blob is there.
    ///
    /// # Errors
    /// [`RegistryError`] if it cannot be told.
    pub async fn has_blob(&self, digest: Digest) -> Result<bool, RegistryError> {
        self.head("blobs", digest.to_string()).await
    }

    /// Whether the manifest (a tag or a digest) is there.
    ///
    /// # Errors
    /// [`RegistryError`] if it cannot be told.
    pub async fn has_manifest(&self, reference: &str) -> Result<bool, RegistryError> {
        self.head("manifests", reference.to_owned()).await
    }

    async fn head(&self, kind: &'static str, name: String) -> Result<bool, RegistryError> {
        let what = format!("{kind}/{name} of {}", self.0.name);
        let ask = Ask {
            method: Method::HEAD,
            accept: (kind == "manifests").then_some(super::ACCEPT_MANIFEST),
            by_tag: true,
            to_push: true,
            ..Ask::get(kind, name, what)
        };
        match self.send(ask).await {
            Ok(_) => Ok(true),
            Err(RegistryError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Stores a blob, unless it is there.
    ///
    /// # Errors
    /// [`RegistryError`]; [`RegistryError::Refused`] if the registry does not take it.
    pub async fn put_blob(&self, bytes: Bytes) -> Result<Digest, RegistryError> {
        let digest = Digest::of(&bytes);
        if self.has_blob(digest).await? {
            return Ok(digest);
        }
        let what = format!("blob {digest} for {}", self.0.name);
        let mut upload = 1;
        loop {
            let begin = Ask {
                method: Method::POST,
                to_push: true,
                ..Ask::get("blobs", "uploads/".to_owned(), what.clone())
            };
            let (base, begun) = self.send(begin).await?;
            let protocol = |problem: &str| RegistryError::Protocol {
                host: self.0.host.clone(),
                what: what.clone(),
                problem: problem.to_owned(),
            };
            let mut url = upload_place(&base, &begun).map_err(protocol)?;
            url.query_pairs_mut().append_pair("digest", &digest.to_string());
            let put = Ask {
                method: Method::PUT,
                to_push: true,
                at: Some(Place { base, url }),
                body: Some(Payload {
                    media_type: "application/octet-stream".to_owned(),
                    bytes: bytes.clone(),
                }),
                ..Ask::get("blobs", String::new(), what.clone())
            };
            match self.send(put).await {
                Ok(_) => return Ok(digest),
                Err(RegistryError::NotFound { .. } | RegistryError::Refused { status: 416, .. })
                    if upload < UPLOADS =>
                {
                    upload += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Stores a manifest under a tag or its digest; whether the registry knows its subject, and lists it there itself.
    ///
    /// # Errors
    /// As [`Pusher::put_blob`].
    pub async fn put_manifest(&self, reference: &str, media_type: &str, bytes: Bytes) -> Result<bool, RegistryError> {
        let digest = Digest::of(&bytes);
        let what = format!("manifest {reference} for {}", self.0.name);
        let ask = Ask {
            method: Method::PUT,
            to_push: true,
            body: Some(Payload {
                media_type: media_type.to_owned(),
                bytes,
            }),
            ..Ask::get("manifests", reference.to_owned(), what.clone())
        };
        let (_, answer) = self.send(ask).await?;
        let header = |name: &str| answer.headers().get(name)?.to_str().ok();
        let stored = header("docker-content-digest").and_then(|text| text.parse::<Digest>().ok());
        if let Some(stored) = stored.filter(|stored| *stored != digest) {
            return Err(RegistryError::Protocol {
                host: self.0.host.clone(),
                what,
                problem: format!("it stored a manifest with digest {stored} instead of {digest}"),
            });
        }
        Ok(header("oci-subject").is_some())
    }

    /// Stores an artifact with the empty config whose blobs are there: under `tag`, or by its digest. If it has a subject, it is listed
    /// there: by the registry, or under the subject's tag.
    ///
    /// # Errors
    /// As [`Pusher::put_blob`].
    pub async fn put_artifact(
        &self,
        artifact_type: &str,
        layers: &[Descriptor],
        subject: Option<&Descriptor>,
        annotations: &BTreeMap<String, String>,
        tag: Option<&str>,
    ) -> Result<Digest, RegistryError> {
        self.put_blob(Bytes::from_static(EMPTY)).await?;
        let manifest = Artifact::manifest(artifact_type, layers, subject, annotations);
        let (digest, size) = (Digest::of(&manifest), manifest.len() as u64);
        let by_digest = digest.to_string();
        let listed = self
            .put_manifest(tag.unwrap_or(&by_digest), MANIFEST_TYPE, manifest)
            .await?;
        if let Some(subject) = subject.filter(|_| !listed) {
            let entry = Referrer {
                media_type: MANIFEST_TYPE.to_owned(),
                digest,
                size,
                artifact_type: artifact_type.to_owned(),
                annotations: annotations.clone(),
            };
            self.list_artifact(subject.digest, entry).await?;
        }
        Ok(digest)
    }

    /// Adds an artifact that is there to the list under the tag of its `subject`, for registries that keep no such lists themselves.
    ///
    /// # Errors
    /// As [`Pusher::put_blob`].
    pub async fn list_artifact(&self, subject: Digest, entry: Referrer) -> Result<(), RegistryError> {
        self.change_list(subject, |list| {
            let known = list.iter().any(|other| other.digest == entry.digest);
            if !known {
                list.push(entry.clone());
            }
            !known
        })
        .await
    }

    /// Removes a manifest, and its entry in the list under the tag of its `subject`. Whether it was there.
    ///
    /// # Errors
    /// As [`Pusher::put_blob`].
    pub async fn delete_manifest(&self, digest: Digest, subject: Option<Digest>) -> Result<bool, RegistryError> {
        let ask = Ask {
            method: Method::DELETE,
            to_push: true,
            ..Ask::get(
                "manifests",
                digest.to_string(),
                format!("the removal of manifest {digest} from {}", self.0.name),
            )
        };
        let was_there = match self.send(ask).await {
            Ok(_) => true,
            Err(RegistryError::NotFound { .. }) => false,
            Err(error) => return Err(error),
        };
        if let Some(subject) = subject {
            let without = |list: &mut Vec<Referrer>| {
                let before = list.len();
                list.retain(|entry| entry.digest != digest);
                list.len() < before
            };
            self.change_list(subject, without).await?;
        }
        Ok(was_there)
    }

    /// Changes the list under the tag of `subject` until `change` finds nothing to be changed.
    async fn change_list(
        &self,
        subject: Digest,
        change: impl Fn(&mut Vec<Referrer>) -> bool,
    ) -> Result<(), RegistryError> {
        let tag = fallback_tag(&subject);
        for _ in 0..LIST_WRITES {
            let mut list = self.0.clone().tagged_referrers(subject).await?;
            if !change(&mut list) {
                return Ok(());
            }
            if list.len() > MAX_REFERRERS {
                break;
            }
            // Plain structs with text keys: serialising them cannot fail.
            let bytes = serde_json::to_vec(&ReferrersIndex::of(list)).unwrap_or_default();
            self.put_manifest(&tag, OCI_INDEX, bytes.into()).await?;
        }
        Err(RegistryError::Protocol {
            host: self.0.host.clone(),
            what: format!("list of artifacts under the tag {tag} of {}", self.0.name),
            problem: "it does not keep what is written to it, or it is full".to_owned(),
        })
    }

    /// Sends a request until it succeeds; the answer, and the base of the endpoint that gave it.
    async fn send(&self, ask: Ask) -> Result<(Url, Response), RegistryError> {
        let what = ask.what.clone();
        let mut operation = Operation::new(self.0.clone(), ask).await?;
        let (place, answer) = operation.respond().await?;
        operation.succeeded(place);
        match operation.base(place) {
            Some(base) => Ok((base, answer)),
            None => Err(RegistryError::Unreachable {
                host: self.0.host.clone(),
                what,
            }),
        }
    }
}

/// Where an upload that was begun goes on.
fn upload_place(base: &Url, begun: &Response) -> Result<Url, &'static str> {
    if begun.status() != StatusCode::ACCEPTED {
        return Err("an upload begins with 202");
    }
    let location = begun
        .headers()
        .get(header::LOCATION)
        .and_then(|value| value.to_str().ok())
        .ok_or("an upload without a Location")?;
    let mut url = begun
        .url()
        .join(location)
        .map_err(|_| "an upload to what is no address")?;
    if base.scheme() == "https" && url.scheme() == "http" {
        // A registry behind a proxy that ends TLS may not know that it is there.
        if url.host_str() != base.host_str() || url.set_scheme("https").is_err() {
            return Err("an upload that leads away from TLS");
        }
        let _ = url.set_port(base.port());
    }
    match url.scheme() {
        "http" | "https" => Ok(url),
        _ => Err("an upload to an address that is not http"),
    }
}
