use proptest::prelude::*;
use serde_json::json;

use super::*;

fn digest(text: &str) -> String {
    Digest::of(text.as_bytes()).to_string()
}

fn bytes(value: serde_json::Value) -> Vec<u8> {
    serde_json::to_vec(&value).unwrap()
}

fn manifest(layers: usize) -> serde_json::Value {
    let layers: Vec<_> = (0..layers)
        .map(|n| json!({"digest": digest(&n.to_string()), "size": n, "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip"}))
        .collect();
    json!({"schemaVersion": 2, "config": {"digest": digest("c"), "size": 1, "mediaType": OCI_CONFIG}, "layers": layers})
}

fn config(diff_ids: usize) -> serde_json::Value {
    let ids: Vec<_> = (0..diff_ids).map(|n| digest(&format!("diff{n}"))).collect();
    json!({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": ids}, "history": [{"empty_layer": true}]})
}

fn served(value: serde_json::Value) -> ManifestBytes {
    let bytes = bytes(value);
    ManifestBytes {
        media_type: String::new(),
        digest: Digest::of(&bytes),
        bytes: bytes.into(),
    }
}

#[test]
fn chain_ids_are_those_of_the_specification() {
    let diff_ids = [Digest::of(b"a"), Digest::of(b"b"), Digest::of(b"c")];
    let chain = chain_ids(&diff_ids);
    assert_eq!(chain[0], diff_ids[0]);
    assert_eq!(
        chain[1],
        Digest::of(format!("{} {}", diff_ids[0], diff_ids[1]).as_bytes())
    );
    assert_eq!(chain[2], Digest::of(format!("{} {}", chain[1], diff_ids[2]).as_bytes()));
    assert_eq!(chain_ids(&[]), []);
}

#[test]
fn an_image_is_put_together() {
    let image = Image::assemble(served(manifest(3)), bytes(config(3)).into()).unwrap();
    assert_eq!(image.layers.len(), 3);
    assert_eq!(image.layers[2].size, 2);
    assert_eq!(image.chain_ids, chain_ids(&image.diff_ids));
}

#[test]
fn documents_that_disagree_are_refused() {
    let error = Image::assemble(served(manifest(3)), bytes(config(2)).into()).unwrap_err();
    assert!(error.to_string().contains("3 layers, its config 2 diff ids"), "{error}");
    assert!(!error.retry_helps());
}

#[test]
fn what_go_leaves_empty_is_empty() {
    let parsed = Manifest::parse(&bytes(json!({
        "config": {"digest": digest("c"), "size": 0, "annotations": null, "urls": null},
        "layers": null, "annotations": null, "manifests": null,
    })))
    .unwrap();
    assert!(parsed.layers.is_empty() && parsed.annotations.is_empty());
}

#[test]
fn malformed_documents_are_named() {
    let entry = json!({"digest": digest("m"), "size": 1});
    for (document, part) in [
        (json!({}), "neither"),
        (json!("x"), "expected a manifest"),
        (json!({"manifests": [entry], "config": entry}), "both"),
        (json!({"manifests": [entry]}), "index of manifests"),
        (
            json!({"manifests": [entry], "mediaType": "application/x"}),
            "application/x",
        ),
        (json!({"schemaVersion": 1, "fsLayers": []}), "first form"),
        (json!({"config": {"digest": "sha512:00", "size": 1}}), "sha512:00"),
        (json!({"config": {"digest": digest("c"), "size": -1}}), "-1"),
    ] {
        let error = Manifest::parse(&bytes(document.clone())).unwrap_err().to_string();
        assert!(error.contains(part), "{document}: {error}");
    }
    assert!(ImageConfig::parse(b"{}").is_err());
    assert!(ImageConfig::parse(b"{\"rootfs\": {\"diff_ids\": [\"x\"]}}").is_err());
}

/// What an image runs is its entry point and what follows it; whatever else is in that place says nothing, and spoils nothing.
#[test]
fn a_config_says_what_is_run() {
    let command = |document: serde_json::Value| Command::parse(&bytes(document));
    let found = command(json!({"config": {
        "Entrypoint": ["/entry", "-x"], "cmd": ["app"], "Env": ["PATH=/bin", "A=b"], "WorkingDir": "/srv", "Labels": {"a": 1}
    }}));
    let texts = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
    let found = found.unwrap();
    assert_eq!(found.args, texts(&["/entry", "-x", "app"]));
    assert_eq!(
        (found.env, found.directory),
        (texts(&["PATH=/bin", "A=b"]), "/srv".to_owned())
    );
    let only = command(json!({"config": {"Entrypoint": null, "Cmd": ["sh"], "Env": 7}})).unwrap();
    assert_eq!((only.args, only.env.len()), (texts(&["sh"]), 0));
    for nothing in [
        json!({}),
        json!({"config": null}),
        json!({"config": {"Cmd": []}}),
        json!({"config": {"Cmd": "sh"}}),
        json!({"config": [[]]}),
    ] {
        assert_eq!(command(nothing.clone()), None, "{nothing}");
    }
    assert_eq!(Command::parse(b"nothing"), None);
}

#[test]
fn an_index_gives_the_platform_that_runs() {
    let entry = |name: &str, platform: serde_json::Value| {
        let mut entry = json!({"digest": digest(name), "size": 1});
        if !platform.is_null() {
            entry["platform"] = platform;
        }
        entry
    };
    let index = json!({"manifests": [
        entry("attestation", json!({"os": "unknown", "architecture": "unknown"})),
        entry("windows", json!({"os": "windows", "architecture": "arm", "os.version": "10"})),
        entry("v6", json!({"os": "linux", "architecture": "arm", "variant": "v6"})),
        entry("v7", json!({"os": "linux", "architecture": "arm", "variant": "v7"})),
        entry("v7 again", json!({"os": "linux", "architecture": "arm", "variant": "v7"})),
        entry("amd64", json!({"os": "linux", "architecture": "amd64"})),
    ]});
    let Document::Index(index) = Document::parse(&bytes(index)).unwrap() else {
        panic!("it is an index");
    };
    let host = |architecture: &str, variant: &str| Platform {
        os: "linux".to_owned(),
        architecture: architecture.to_owned(),
        variant: variant.to_owned(),
    };
    let best = |platform: Platform| index.best(&platform).map(|entry| entry.descriptor.digest.to_string());
    assert_eq!(best(host("arm", "v7")), Some(digest("v7")));
    assert_eq!(best(host("arm", "v6")), Some(digest("v6")));
    assert_eq!(best(host("amd64", "")), Some(digest("amd64")));
    assert_eq!(best(host("s390x", "")), None);
    assert!(index.platforms().contains("linux/arm/v6"));
}

proptest! {
    #[test]
    fn any_bytes_are_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Document::parse(&bytes);
        let _ = ImageConfig::parse(&bytes);
        let _ = Command::parse(&bytes);
    }

    #[test]
    fn any_change_of_a_document_is_parsed_or_refused(at in 0..600usize, byte: u8, layers in 0..4usize) {
        let mut document = bytes(manifest(layers));
        let at = at % document.len();
        document[at] = byte;
        let _ = Document::parse(&document);
        let mut document = bytes(config(layers));
        let at = at % document.len();
        document[at] = byte;
        let _ = ImageConfig::parse(&document);
    }
}
