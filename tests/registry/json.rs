//! Documents as registries and tools write them: null, fields twice, other cases of letters, and entries that are not for this machine.

use lazuli::layer::Digest;
use lazuli::registry::{RegistryError, image};

use crate::support::fault_registry::{Auth, Fault, On};
use crate::{Fixture, REPOSITORY};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// Serves an image whose documents are made from these texts: `CONFIG`, `LAYER` and `MANIFEST` in them are the descriptors' digest and size,
/// `DIFF` the diff id, `ARCH` this machine. Gives what it is resolved to.
async fn resolve(config: &str, manifest: &str, index: &str) -> Result<image::Image, RegistryError> {
    let f = Fixture::new().await;
    let layer = b"layer";
    let fields = |bytes: &[u8]| format!("\"digest\": \"{}\", \"size\": {}", Digest::of(bytes), bytes.len());
    let architecture = image::Platform::host().architecture;
    let config = config
        .replace("DIFF", &Digest::of(layer).to_string())
        .replace("ARCH", &architecture);
    f.registry.add_blob(&layer[..]);
    f.registry.add_blob(config.clone());
    let manifest = manifest
        .replace("CONFIG", &fields(config.as_bytes()))
        .replace("LAYER", &fields(layer));
    f.registry.add_manifest(MANIFEST, manifest.clone());
    let index = index
        .replace("MANIFEST", &fields(manifest.as_bytes()))
        .replace("ARCH", &architecture);
    let index = f.registry.add_manifest(INDEX, index);
    f.registry.tag(REPOSITORY, "1", index);
    image::resolve(&*f.source, "1").await
}

const PLAIN_CONFIG: &str =
    r#"{"os": "linux", "architecture": "ARCH", "rootfs": {"type": "layers", "diff_ids": ["DIFF"]}}"#;
const PLAIN_MANIFEST: &str = r#"{"schemaVersion": 2, "config": {CONFIG}, "layers": [{LAYER}]}"#;
const PLAIN_INDEX: &str =
    r#"{"schemaVersion": 2, "manifests": [{MANIFEST, "platform": {"os": "linux", "architecture": "ARCH"}}]}"#;

#[tokio::test]
async fn manifests_are_read_as_go_reads_them() {
    for manifest in [
        PLAIN_MANIFEST,
        r#"{"SchemaVersion": 2, "Config": {CONFIG, "MediaType": null}, "LaYeRs": [{LAYER}], "annotations": null, "subject": null}"#,
        r#"{"schemaVersion": "2", "config": {"size": 1, CONFIG}, "layers": null, "layers": [{"digest": 7, LAYER}], "manifests": null}"#,
        r#"{"config": {}, "layers": [], "mediaType": 4, "config": {CONFIG, "annotations": null, "urls": null}, "layers": [{LAYER}]}"#,
        r#"{"config": {CONFIG, "data": {"x": []}}, "layers": [{LAYER, "annotations": {"a": null, "b": 7}, "urls": "x", "platform": 1}], "manifests": []}"#,
        r#"{"config": {CONFIG}, "layers": [{LAYER}], "config": null, "annotations": [1], "x": {"y": [{}]}}"#,
    ] {
        let image = resolve(PLAIN_CONFIG, manifest, PLAIN_INDEX).await.unwrap();
        assert_eq!(image.layers[0].digest, Digest::of(b"layer"), "{manifest}");
    }
    for (manifest, said) in [
        (r#"{"config": null, "layers": []}"#, "neither a config"),
        (
            r#"{"config": {CONFIG}, "layers": [{"digest": "sha512:00", "size": 1}]}"#,
            "sha512:00",
        ),
        (r#"{"config": {CONFIG}, "layers": [{LAYER, "size": -1}]}"#, "size"),
    ] {
        let error = resolve(PLAIN_CONFIG, manifest, PLAIN_INDEX)
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains(said), "{manifest}: {error}");
    }
}

#[tokio::test]
async fn configs_are_read_as_go_reads_them() {
    for config in [
        r#"{"OS": "linux", "Architecture": "ARCH", "RootFS": {"Diff_IDs": ["DIFF"]}, "history": null, "config": null}"#,
        r#"{"os": null, "os": "linux", "os": "linux", "architecture": "x", "architecture": "ARCH", "rootfs": {"diff_ids": null, "diff_ids": ["DIFF"]}}"#,
        r#"{"os": 7, "variant": null, "rootfs": {"diff_ids": ["DIFF"]}, "rootfs": null, "created": 5, "author": ["x"]}"#,
    ] {
        let image = resolve(config, PLAIN_MANIFEST, PLAIN_INDEX).await.unwrap();
        assert_eq!(image.diff_ids, [Digest::of(b"layer")], "{config}");
    }
}

#[tokio::test]
async fn entries_for_other_machines_are_not_judged() {
    let own = r#"{MANIFEST, "platform": {"os": "linux", "architecture": "ARCH"}}"#;
    for other in [
        r#"{"digest": "sha512:00", "size": 1, "platform": {"os": "linux", "architecture": "s390x"}}"#,
        r#"{"digest": "sha256:short", "size": 1, "platform": {"os": "linux", "architecture": "s390x"}}"#,
        r#"{"digest": null, "size": null, "platform": {"os": "linux", "architecture": "s390x"}}"#,
        r#"{"size": -1, "platform": {"os": "linux", "architecture": "s390x"}}"#,
        r#"{"digest": 7, "size": "big", "platform": {"os": ["linux"], "architecture": null}}"#,
        r#"{"platform": "linux/s390x"}"#,
        r#"{"digest": "sha512:00", "size": 1, "platform": null}"#,
        r#"{"digest": "sha512:00"}"#,
        "{}",
        "null",
        "7",
        "[[]]",
    ] {
        for index in [
            format!("{{\"manifests\": [{other}, {own}]}}"),
            format!("{{\"Manifests\": [{own}, {other}], \"annotations\": null, \"layers\": null}}"),
        ] {
            resolve(PLAIN_CONFIG, PLAIN_MANIFEST, &index)
                .await
                .unwrap_or_else(|error| panic!("{other}: {error}"));
        }
    }
    // What is meant for this machine is.
    let index = r#"{"manifests": [{"digest": "sha512:00", "size": 1, "platform": {"os": "linux", "architecture": "ARCH"}}, {MANIFEST}]}"#;
    let error = resolve(PLAIN_CONFIG, PLAIN_MANIFEST, index)
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("sha512:00") && error.contains("its entry for linux/"),
        "{error}"
    );
}

#[tokio::test]
async fn lists_are_read_as_go_reads_them() {
    let f = Fixture::new().await;
    let digest = Digest::of(b"artifact");
    for list in [
        format!(
            "{{\"SchemaVersion\": 2, \"Manifests\": [{{\"digest\": \"sha512:00\", \"size\": 1}}, {{\"Digest\": \"{digest}\", \"size\": 9}}]}}"
        ),
        format!(
            "{{\"schemaVersion\": 2, \"manifests\": [{{\"digest\": \"{digest}\", \"size\": 9, \"artifactType\": null, \"annotations\": {{\"a\": null}}}}], \"annotations\": null}}"
        ),
        format!(
            "{{\"schemaVersion\": 1, \"schemaVersion\": 2, \"mediaType\": null, \"manifests\": null, \"manifests\": [null, {{\"size\": 1, \"size\": 9, \"digest\": \"{digest}\"}}]}}"
        ),
    ] {
        f.registry.fail(On::Referrers, 1, Fault::Answer(200, list.clone()));
        let found = f.source.referrers(Digest::of(b"image"), "").await.unwrap();
        assert_eq!(
            found.iter().map(|entry| (entry.digest, entry.size)).collect::<Vec<_>>(),
            [(digest, 9)],
            "{list}"
        );
    }
    // Whoever has to log in for it.
    f.registry.set_auth(Auth::AnonymousToken);
    f.registry.fail(
        On::Referrers,
        1,
        Fault::Answer(200, "{\"schemaVersion\": 2, \"manifests\": null}".to_owned()),
    );
    assert!(f.source.referrers(Digest::of(b"image"), "").await.unwrap().is_empty());
}
