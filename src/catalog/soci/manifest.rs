//! The documents around zTOCs, as SOCI's own tool writes them: fields in its order, without spaces.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::layer::Digest;
use crate::registry::artifact::{Descriptor, EMPTY};
use crate::registry::image::{MANIFEST_TYPE, OCI_INDEX};

/// Media type of the config of an index that says which image it is about.
pub const TYPE_V1: &str = "application/vnd.amazon.soci.index.v1+json";
/// Media type of the config of an index that the image's manifest names.
pub const TYPE_V2: &str = "application/vnd.amazon.soci.index.v2+json";
/// Media type of a zTOC.
pub const ZTOC_TYPE: &str = "application/octet-stream";
/// Media type of a list of spans to fetch ahead.
pub const PREFETCH_TYPE: &str = "application/vnd.amazon.soci.prefetch.v1+json";
/// Annotation of an image's manifest: the digest of its index.
pub const INDEX_DIGEST: &str = "com.amazon.soci.index-digest";
/// Annotation of a blob in an index: the digest of its layer.
pub const LAYER_DIGEST: &str = "com.amazon.soci.image-layer-digest";
/// Annotation of a zTOC: no file of its layer has extended attributes.
pub const DISABLE_XATTRS: &str = "com.amazon.soci.disable-xattrs";
/// Annotation of a zTOC: the media type of its layer.
const LAYER_TYPE: &str = "com.amazon.soci.image-layer-mediaType";
/// Annotation of a zTOC: bytes of a span at least.
const SPAN_SIZE: &str = "com.amazon.soci.span-size";
/// Annotation of an index: who made it.
const TOOL: &str = "com.amazon.soci.build-tool-identifier";
/// Annotation of an index in a list of manifests: the digest of its image's manifest.
const MANIFEST_DIGEST: &str = "com.amazon.soci.image-manifest-digest";

/// The entry of a zTOC in an index. `bytes` is the zTOC, of a layer with this digest and media type.
pub fn entry(bytes: &[u8], layer: &Digest, media_type: &str, span_size: u64) -> Descriptor {
    Descriptor {
        media_type: ZTOC_TYPE.to_owned(),
        digest: Digest::of(bytes),
        size: bytes.len() as u64,
        annotations: BTreeMap::from([
            (LAYER_DIGEST.to_owned(), layer.to_string()),
            (LAYER_TYPE.to_owned(), media_type.to_owned()),
            (SPAN_SIZE.to_owned(), span_size.to_string()),
        ]),
    }
}

/// The manifest of an index made by `tool`; one with a subject is of v1.
pub fn index(entries: &[Descriptor], subject: Option<&Descriptor>, tool: &str) -> Bytes {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Raw<'a> {
        schema_version: u64,
        media_type: &'a str,
        config: Descriptor,
        layers: &'a [Descriptor],
        #[serde(skip_serializing_if = "Option::is_none")]
        subject: Option<&'a Descriptor>,
        annotations: BTreeMap<&'a str, &'a str>,
    }
    let raw = Raw {
        schema_version: 2,
        media_type: MANIFEST_TYPE,
        config: Descriptor {
            media_type: if subject.is_some() { TYPE_V1 } else { TYPE_V2 }.to_owned(),
            digest: Digest::of(EMPTY),
            size: EMPTY.len() as u64,
            annotations: BTreeMap::new(),
        },
        layers: entries,
        subject,
        annotations: BTreeMap::from([(TOOL, tool)]),
    };
    // Plain structs with text keys: serialising them cannot fail.
    serde_json::to_vec(&raw).unwrap_or_default().into()
}

/// The manifest of an image that names its index; docker's media types become OCI's.
///
/// # Errors
/// What is wrong with the manifest, for people.
pub fn with_index(manifest: &[u8], index: &Digest) -> Result<Bytes, String> {
    let mut fields: Map<String, Value> = serde_json::from_slice(manifest).map_err(|error| error.to_string())?;
    let annotations = fields.entry("annotations").or_insert_with(|| json!({}));
    if annotations.is_null() {
        *annotations = json!({});
    }
    let annotations = annotations.as_object_mut().ok_or("its annotations are none")?;
    annotations.insert(INDEX_DIGEST.to_owned(), Value::from(index.to_string()));
    let oci = |descriptor: &mut Value| {
        let from_docker = match descriptor.get("mediaType").and_then(Value::as_str) {
            Some("application/vnd.docker.container.image.v1+json") => "application/vnd.oci.image.config.v1+json",
            Some("application/vnd.docker.image.rootfs.diff.tar.gzip") => "application/vnd.oci.image.layer.v1.tar+gzip",
            Some("application/vnd.docker.image.rootfs.diff.tar") => "application/vnd.oci.image.layer.v1.tar",
            _ => return,
        };
        descriptor["mediaType"] = Value::from(from_docker);
    };
    fields.get_mut("config").map(oci);
    if let Some(layers) = fields.get_mut("layers").and_then(Value::as_array_mut) {
        layers.iter_mut().for_each(oci);
    }
    fields.insert("mediaType".to_owned(), Value::from(MANIFEST_TYPE));
    Ok(ordered(Value::Object(fields)).into())
}

/// The list of an image, with this platform, and its index.
pub fn list(manifest: &[u8], index: &[u8], platform: &Value) -> Bytes {
    let index_digest = Digest::of(index).to_string();
    let manifest_digest = Digest::of(manifest).to_string();
    ordered(json!({
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [
            {
                "mediaType": MANIFEST_TYPE, "digest": manifest_digest, "size": manifest.len(),
                "annotations": { INDEX_DIGEST: index_digest }, "platform": platform,
            },
            {
                "mediaType": MANIFEST_TYPE, "digest": index_digest, "size": index.len(),
                "annotations": { MANIFEST_DIGEST: manifest_digest }, "platform": platform, "artifactType": TYPE_V2,
            },
        ],
    }))
    .into()
}

/// Fields of documents and descriptors in the order of the specification; others come after them, by name.
const ORDER: [&str; 15] = [
    "schemaVersion",
    "mediaType",
    "config",
    "layers",
    "manifests",
    "digest",
    "size",
    "urls",
    "subject",
    "annotations",
    "data",
    "platform",
    "architecture",
    "os",
    "artifactType",
];

/// JSON with its fields in [`ORDER`].
fn ordered(value: Value) -> Vec<u8> {
    fn write(value: &Value, out: &mut Vec<u8>) {
        let separated = |out: &mut Vec<u8>, at: usize| {
            if at > 0 {
                out.push(b',');
            }
        };
        match value {
            Value::Object(fields) => {
                let rank = |key: &str| ORDER.iter().position(|known| *known == key).unwrap_or(ORDER.len());
                let mut fields: Vec<_> = fields.iter().collect();
                fields.sort_by(|(a, _), (b, _)| (rank(a), a).cmp(&(rank(b), b)));
                out.push(b'{');
                for (at, (key, value)) in fields.into_iter().enumerate() {
                    separated(out, at);
                    out.extend_from_slice(Value::from(key.as_str()).to_string().as_bytes());
                    out.push(b':');
                    write(value, out);
                }
                out.push(b'}');
            }
            Value::Array(values) => {
                out.push(b'[');
                for (at, value) in values.iter().enumerate() {
                    separated(out, at);
                    write(value, out);
                }
                out.push(b']');
            }
            other => out.extend_from_slice(other.to_string().as_bytes()),
        }
    }
    let mut out = Vec::new();
    write(&value, &mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::artifact::Artifact;

    macro_rules! blob {
        ($name:literal) => {
            include_bytes!(concat!("../../../tests/vectors/soci/", $name)).as_slice()
        };
    }

    const IMAGE: &[u8] = blob!("v2/blobs/sha256/839455020035c41508cfbeee382320826ed70264c4b17d01175fd3537b014ce7");
    const IMAGE_V2: &[u8] = blob!("v2/blobs/sha256/cb67ab0ccdf4c81de930532d24f46064601b92ae0063c93e7ccab1986de2fb02");
    const INDEX_V2: &[u8] = blob!("v2/blobs/sha256/808f1958ff17c2adf2c4ea87964373fbe7ef7dc9f866cb3bdfbef6b26b115d19");
    const LIST_V2: &[u8] = blob!("v2/blobs/sha256/7bffb7d10d0de1ebd7dd097d8131b46bc3304e189591c6c556e050704f89e7fb");
    const INDEX_V1: &[u8] = blob!("v1/blobs/sha256/ab92ea014e31bc8d14f4c0badb6be752916730228d650d261f04b508e9e6fd08");

    #[test]
    fn documents_are_those_of_socis_own_tool() {
        for theirs in [INDEX_V1, INDEX_V2] {
            let artifact = Artifact::parse(theirs).unwrap();
            let descriptor = |of: &crate::registry::image::LayerDescriptor| Descriptor {
                media_type: of.media_type.clone(),
                digest: of.digest,
                size: of.size,
                annotations: of.annotations.clone(),
            };
            let entries: Vec<_> = artifact.layers.iter().map(descriptor).collect();
            let subject = artifact.subject.as_ref().map(descriptor);
            let ours = index(&entries, subject.as_ref(), "AWS SOCI CLI v0.2");
            assert_eq!(std::str::from_utf8(&ours), std::str::from_utf8(theirs));
        }
        let ours = with_index(IMAGE, &Digest::of(INDEX_V2)).unwrap();
        assert_eq!(std::str::from_utf8(&ours), std::str::from_utf8(IMAGE_V2));
        let platform = json!({"os": "linux", "architecture": "amd64"});
        let ours = list(IMAGE_V2, INDEX_V2, &platform);
        assert_eq!(std::str::from_utf8(&ours), std::str::from_utf8(LIST_V2));
    }

    #[test]
    fn what_is_no_manifest_is_not_changed() {
        for bytes in [&b"[]"[..], b"{", br#"{"annotations":[]}"#] {
            assert!(with_index(bytes, &Digest::of(b"")).is_err());
        }
        assert!(with_index(br#"{"annotations":null}"#, &Digest::of(b"")).is_ok());
    }
}
