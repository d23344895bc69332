//! Artifacts: manifests of something else than an image, which may be *about* an image (their subject), as the OCI image and
//! distribution specifications 1.1 define them.
//!
//! A registry with the referrers API lists the artifacts about a manifest itself. For one without it, whoever pushes an artifact keeps
//! that list, as an index under the tag `sha256-<hex of the subject>` ([`fallback_tag`]).

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::image::{LayerDescriptor, MANIFEST_TYPE, OCI_INDEX, json_problem};
use super::{RegistryError, json};
use crate::layer::Digest;

/// Media type of the empty descriptor, whose blob is [`EMPTY`].
pub const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";
/// The empty blob of the specification: an artifact that needs no config has this one.
pub const EMPTY: &[u8] = b"{}";
/// Most artifacts about one manifest that are looked at. Signatures, documents and indexes of an image are a handful each.
pub const MAX_REFERRERS: usize = 1000;

/// An entry of a list of artifacts about a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Referrer {
    /// Media type of the artifact's manifest.
    #[serde(default, deserialize_with = "json::loose")]
    pub media_type: String,
    /// Digest of the artifact's manifest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// What kind of artifact it is, or an empty text.
    #[serde(default, deserialize_with = "json::loose", skip_serializing_if = "String::is_empty")]
    pub artifact_type: String,
    /// Annotations of the artifact's manifest.
    #[serde(
        default,
        deserialize_with = "json::texts",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub annotations: BTreeMap<String, String>,
}

/// A list of artifacts as a registry gives it, or as it is kept under the fallback tag.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ReferrersIndex {
    schema_version: u64,
    media_type: String,
    /// The artifacts.
    pub manifests: Vec<Referrer>,
}

impl ReferrersIndex {
    /// A list of these.
    pub fn of(manifests: Vec<Referrer>) -> Self {
        ReferrersIndex {
            schema_version: 2,
            media_type: OCI_INDEX.to_owned(),
            manifests,
        }
    }

    /// Parses a list. At most [`MAX_REFERRERS`] are kept, of those that can be used: one with another kind of digest is somebody else's.
    ///
    /// # Errors
    /// What is wrong, for people.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase", expecting = "an index of artifacts")]
        struct Raw {
            #[serde(default, deserialize_with = "json::loose")]
            schema_version: Option<u64>,
            manifests: Option<Vec<json::Loose<Referrer>>>,
        }
        let raw: Raw = json::from_slice(bytes).map_err(|error| json_problem(&error))?;
        if raw.manifests.is_none() && raw.schema_version.is_none() {
            return Err("it is no index of artifacts".to_owned());
        }
        let entries = raw.manifests.into_iter().flatten().filter_map(|entry| entry.0.ok());
        Ok(Self::of(entries.take(MAX_REFERRERS).collect()))
    }
}

/// A descriptor in an artifact, with what Lazuli writes of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Media type of the blob.
    pub media_type: String,
    /// Digest of the blob.
    pub digest: Digest,
    /// Size of the blob in bytes.
    pub size: u64,
    /// Annotations.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// The manifest of an artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    /// What kind of artifact it is.
    pub artifact_type: String,
    /// Its blobs.
    pub layers: Vec<LayerDescriptor>,
    /// The manifest that it is about.
    pub subject: Option<LayerDescriptor>,
    /// Annotations of the whole.
    pub annotations: BTreeMap<String, String>,
}

impl Artifact {
    /// Parses the manifest of an artifact.
    ///
    /// # Errors
    /// [`RegistryError::Image`] says what is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self, RegistryError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase", expecting = "the manifest of an artifact")]
        struct Raw {
            #[serde(default, deserialize_with = "json::loose")]
            artifact_type: String,
            config: LayerDescriptor,
            #[serde(default)]
            layers: Vec<LayerDescriptor>,
            subject: Option<LayerDescriptor>,
            #[serde(default, deserialize_with = "json::texts")]
            annotations: BTreeMap<String, String>,
        }
        let raw: Raw = json::from_slice(bytes).map_err(|error| RegistryError::Image {
            what: format!("artifact {}", Digest::of(bytes)),
            problem: json_problem(&error),
        })?;
        // Older artifacts say it with the type of their config.
        let artifact_type = match raw.artifact_type.is_empty() {
            true => raw.config.media_type,
            false => raw.artifact_type,
        };
        Ok(Artifact {
            artifact_type,
            layers: raw.layers,
            subject: raw.subject,
            annotations: raw.annotations,
        })
    }

    /// The manifest of an artifact with the empty config. The same artifact always gives the same bytes.
    pub fn manifest(
        artifact_type: &str,
        layers: &[Descriptor],
        subject: Option<&Descriptor>,
        annotations: &BTreeMap<String, String>,
    ) -> Bytes {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Raw<'a> {
            schema_version: u64,
            media_type: &'a str,
            artifact_type: &'a str,
            config: Descriptor,
            layers: &'a [Descriptor],
            #[serde(skip_serializing_if = "Option::is_none")]
            subject: Option<&'a Descriptor>,
            #[serde(skip_serializing_if = "BTreeMap::is_empty")]
            annotations: &'a BTreeMap<String, String>,
        }
        let raw = Raw {
            schema_version: 2,
            media_type: MANIFEST_TYPE,
            artifact_type,
            config: Descriptor {
                media_type: EMPTY_TYPE.to_owned(),
                digest: Digest::of(EMPTY),
                size: EMPTY.len() as u64,
                annotations: BTreeMap::new(),
            },
            layers,
            subject,
            annotations,
        };
        // Plain structs with text keys: serialising them cannot fail.
        serde_json::to_vec(&raw).unwrap_or_default().into()
    }
}

/// The tag under which artifacts about `subject` are listed where the referrers API is missing.
pub fn fallback_tag(subject: &Digest) -> String {
    format!("sha256-{}", subject.hex())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_comes_back() {
        let layer = Descriptor {
            media_type: "application/x".to_owned(),
            digest: Digest::of(b"x"),
            size: 1,
            annotations: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
        };
        let subject = Descriptor {
            media_type: MANIFEST_TYPE.to_owned(),
            digest: Digest::of(b"s"),
            size: 7,
            annotations: BTreeMap::new(),
        };
        let bytes = Artifact::manifest("application/y", &[layer], Some(&subject), &BTreeMap::new());
        let artifact = Artifact::parse(&bytes).unwrap();
        assert_eq!(artifact.artifact_type, "application/y");
        assert_eq!(artifact.layers[0].digest, Digest::of(b"x"));
        assert_eq!(artifact.layers[0].annotations["a"], "b");
        assert_eq!(artifact.subject.unwrap().digest, Digest::of(b"s"));
        assert!(
            super::super::Manifest::parse(&bytes).is_ok(),
            "registries take it for an OCI manifest"
        );
    }

    #[test]
    fn the_type_of_the_config_counts_where_nothing_else_does() {
        let text = format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"application/old","digest":"{}","size":2}},"layers":null}}"#,
            Digest::of(EMPTY)
        );
        let artifact = Artifact::parse(text.as_bytes()).unwrap();
        assert_eq!(
            (artifact.artifact_type.as_str(), artifact.layers.len()),
            ("application/old", 0)
        );
        assert!(Artifact::parse(b"{}").is_err());
        assert!(Artifact::parse(b"[").is_err());
    }

    #[test]
    fn lists_are_bounded_and_tags_are_those_of_the_specification() {
        let one = Referrer {
            media_type: String::new(),
            digest: Digest::of(b""),
            size: 1,
            artifact_type: String::new(),
            annotations: BTreeMap::new(),
        };
        let list = serde_json::to_vec(&ReferrersIndex::of(vec![one; MAX_REFERRERS + 1])).unwrap();
        assert_eq!(ReferrersIndex::parse(&list).unwrap().manifests.len(), MAX_REFERRERS);
        assert!(ReferrersIndex::parse(b"{}").is_err());
        assert_eq!(
            fallback_tag(&Digest::of(b"")),
            "sha256-e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }
}
