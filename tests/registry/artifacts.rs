//! Artifacts about an image: stored, listed and removed, on a registry with the referrers API and on those without it.

use std::collections::BTreeMap;
use std::sync::Arc;

use lazuli::config::RegistryConfig;
use lazuli::layer::Digest;
use lazuli::metrics::Metrics;
use lazuli::registry::artifact::{Artifact, Descriptor, fallback_tag};
use lazuli::registry::image::MANIFEST_TYPE;
use lazuli::registry::{Pusher, Registry, RegistryError, Source};

use crate::real::DockerRegistry;
use crate::support::fault_registry::{Auth, Fault, FaultRegistry, On};
use crate::{REPOSITORY, config, noise, read};

const KIND: &str = "application/vnd.example.index.v1+json";

struct Ends {
    source: Arc<dyn Source>,
    pusher: Pusher,
}

fn ends_of(config: &RegistryConfig, host: &str) -> Ends {
    let registry = Registry::new(config, Arc::new(Metrics::new())).unwrap();
    Ends {
        source: registry.repository(host, REPOSITORY),
        pusher: registry.pusher(host, REPOSITORY),
    }
}

fn ends(host: &str) -> Ends {
    ends_of(&config(), host)
}

fn descriptor(media_type: &str, bytes: &[u8], note: &str) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest: Digest::of(bytes),
        size: bytes.len() as u64,
        annotations: BTreeMap::from([("note".to_owned(), note.to_owned())]),
    }
}

impl Ends {
    /// Stores an artifact of one blob about `subject`.
    async fn attach(&self, subject: &Descriptor, kind: &str, blob: &[u8], note: &str) -> Result<Digest, RegistryError> {
        self.pusher.put_blob(blob.to_vec().into()).await?;
        let notes = BTreeMap::from([("note".to_owned(), note.to_owned())]);
        let layers = [descriptor("application/octet-stream", blob, note)];
        self.pusher
            .put_artifact(kind, &layers, Some(subject), &notes, None)
            .await
    }

    /// The notes of the artifacts of a kind about `subject`, sorted.
    async fn notes(&self, subject: &Descriptor, kind: &str) -> Vec<String> {
        let list = self.source.referrers(subject.digest, kind).await.unwrap();
        let mut notes: Vec<_> = list.iter().map(|entry| entry.annotations["note"].clone()).collect();
        notes.sort();
        notes
    }
}

/// What every registry has to do.
async fn check(ends: &Ends) {
    // An image stands in for any manifest: an artifact that is about nothing.
    let image = Artifact::manifest("application/x", &[], None, &BTreeMap::new());
    let image_of = descriptor(MANIFEST_TYPE, &image, "image");
    let subject = Descriptor {
        annotations: BTreeMap::new(),
        ..image_of
    };
    assert_eq!(ends.notes(&subject, KIND).await, [""; 0]);
    ends.pusher.put_blob((&b"{}"[..]).into()).await.unwrap();
    ends.pusher.put_manifest("image", MANIFEST_TYPE, image).await.unwrap();
    assert_eq!(ends.notes(&subject, KIND).await, [""; 0]);

    let blobs: Vec<Vec<u8>> = (1..6).map(|n| noise(n * 100_000)).collect();
    let mut stored = Vec::new();
    for (n, blob) in blobs.iter().enumerate() {
        stored.push(ends.attach(&subject, KIND, blob, &n.to_string()).await.unwrap());
    }
    ends.attach(&subject, "application/vnd.other", b"other", "other")
        .await
        .unwrap();
    // The same once more changes nothing.
    assert_eq!(ends.attach(&subject, KIND, &blobs[0], "0").await.unwrap(), stored[0]);
    assert_eq!(ends.notes(&subject, KIND).await, ["0", "1", "2", "3", "4"]);
    assert_eq!(ends.notes(&subject, "application/vnd.other").await, ["other"]);
    assert_eq!(ends.notes(&subject, "").await.len(), 6);

    let bytes = ends.source.manifest(&stored[3].to_string()).await.unwrap().bytes;
    let artifact = Artifact::parse(&bytes).unwrap();
    assert_eq!(artifact.artifact_type, KIND);
    assert_eq!(artifact.subject.unwrap().digest, subject.digest);
    let layer = &artifact.layers[0];
    let blob = ends.source.blob(layer.digest, layer.size);
    assert!(read(&blob, 0..layer.size).await.unwrap() == blobs[3]);
    assert!(ends.pusher.has_blob(layer.digest).await.unwrap());
    assert!(!ends.pusher.has_blob(Digest::of(b"absent")).await.unwrap());

    let tags = ["a", "b", "c", "d"];
    for tag in tags {
        let layers = [descriptor("application/octet-stream", &blobs[1], tag)];
        let none = BTreeMap::new();
        ends.pusher
            .put_artifact(KIND, &layers, None, &none, Some(tag))
            .await
            .unwrap();
    }
    let found = ends.source.tags().await.unwrap();
    assert!(
        tags.iter().all(|tag| found.iter().any(|found| found == tag)),
        "{found:?}"
    );
    assert!(ends.pusher.has_manifest("a").await.unwrap());
    assert!(!ends.pusher.has_manifest("z").await.unwrap());

    assert!(
        ends.pusher
            .delete_manifest(stored[0], Some(subject.digest))
            .await
            .unwrap()
    );
    assert!(
        !ends
            .pusher
            .delete_manifest(stored[0], Some(subject.digest))
            .await
            .unwrap()
    );
    assert_eq!(ends.notes(&subject, KIND).await, ["1", "2", "3", "4"]);
    assert!(ends.source.manifest(&stored[0].to_string()).await.is_err());
}

#[tokio::test]
async fn with_the_referrers_api() {
    for filters in [true, false] {
        let registry = FaultRegistry::start().await;
        registry.set_referrers(filters);
        check(&ends(&registry.host())).await;
        let lists = registry.seen(On::Referrers);
        assert!(
            lists.iter().any(|seen| seen.query.contains_key("page")),
            "several pages were read"
        );
        assert!(
            lists
                .iter()
                .any(|seen| seen.query.get("artifactType").is_some_and(|kind| kind == KIND))
        );
    }
}

#[tokio::test]
async fn without_it_the_list_is_kept_under_a_tag() {
    let registry = FaultRegistry::start().await;
    check(&ends(&registry.host())).await;
    // Another client may have kept the type to the artifact itself: it is for the caller to look there.
    let subject = Digest::of(b"someone else's");
    let entry = serde_json::json!({"digest": Digest::of(b"x"), "size": 1, "mediaType": MANIFEST_TYPE});
    let list = serde_json::json!({"schemaVersion": 2, "manifests": [entry]}).to_string();
    let list = registry.add_manifest("application/vnd.oci.image.index.v1+json", list);
    registry.tag(REPOSITORY, &fallback_tag(&subject), list);
    let found = ends(&registry.host()).source.referrers(subject, KIND).await.unwrap();
    assert_eq!((found.len(), found[0].artifact_type.as_str()), (1, ""));
}

#[tokio::test]
async fn on_a_real_registry() {
    if let Some(registry) = DockerRegistry::start_with(None, "  delete:\n    enabled: true\n").await {
        check(&ends(&registry.host)).await;
    }
}

#[tokio::test]
async fn a_real_registry_that_is_read_only_says_so() {
    let storage = "  maintenance:\n    readonly:\n      enabled: true\n";
    let Some(registry) = DockerRegistry::start_with(None, storage).await else {
        return;
    };
    let ends = ends(&registry.host);
    let error = ends.pusher.put_blob((&b"{}"[..]).into()).await.unwrap_err();
    assert!(matches!(error, RegistryError::Refused { status: 405, .. }), "{error}");
    assert!(error.to_string().contains("read-only"), "{error}");
}

#[tokio::test]
async fn a_real_registry_that_deletes_nothing_says_so() {
    let Some(registry) = DockerRegistry::start(None).await else {
        return;
    };
    let ends = ends(&registry.host);
    let none = BTreeMap::new();
    let stored = ends
        .pusher
        .put_artifact(KIND, &[], None, &none, Some("a"))
        .await
        .unwrap();
    let error = ends.pusher.delete_manifest(stored, None).await.unwrap_err();
    assert!(matches!(error, RegistryError::Refused { status: 405, .. }), "{error}");
    assert!(error.to_string().contains("switched off"), "{error}");
}

#[tokio::test]
async fn refusals_say_why_and_are_not_repeated() {
    let registry = FaultRegistry::start().await;
    let ends = ends(&registry.host());
    for (on, status, word) in [
        (On::Upload, 403, "quota"),
        (On::Upload, 405, "read-only"),
        (On::Upload, 413, "larger"),
        (On::Upload, 507, "no room"),
        (On::Write, 403, "credentials"),
    ] {
        registry.heal();
        registry.fail(on, 9, Fault::Refuse(status, "adding 3 MiB exceeds the quota\u{7}"));
        let before = registry.seen(on).len();
        let blob = noise(usize::from(status));
        let error = ends
            .attach(&descriptor(MANIFEST_TYPE, b"s", ""), KIND, &blob, "")
            .await
            .unwrap_err();
        let text = error.to_string();
        assert!(
            matches!(error, RegistryError::Refused { .. }) && !error.retry_helps(),
            "{text}"
        );
        assert!(
            text.contains(word) && text.contains("DENIED adding 3 MiB exceeds the quota"),
            "{text}"
        );
        assert!(!text.contains('\u{7}'), "{text:?}");
        assert_eq!(registry.seen(on).len(), before + 1, "{text}");
    }
    registry.heal();
    registry.fail(On::Upload, 9, Fault::Refuse(403, ""));
    let error = ends.pusher.put_blob(noise(9).into()).await.unwrap_err();
    assert!(error.to_string().contains("DENIED"), "{error}");
    registry.heal();
    registry.fail(On::Upload, 9, Fault::Status(403));
    let error = ends.pusher.put_blob(noise(9).into()).await.unwrap_err();
    assert!(error.to_string().ends_with("quota is used up"), "{error}");
}

#[tokio::test]
async fn failures_that_pass_are_repeated() {
    let registry = FaultRegistry::start().await;
    let ends = ends(&registry.host());
    registry.fail(On::Upload, 1, Fault::Status(500));
    registry.fail(On::Write, 1, Fault::Status(502));
    let none = BTreeMap::new();
    let stored = ends
        .pusher
        .put_artifact(KIND, &[], None, &none, Some("a"))
        .await
        .unwrap();
    assert_eq!(registry.tagged(REPOSITORY, "a"), Some(stored));
    // The place of the upload is lost after its begin: it is begun anew.
    registry.fail(On::Upload, 1, Fault::Delay(std::time::Duration::ZERO));
    registry.fail(On::Upload, 1, Fault::Status(404));
    let digest = ends.pusher.put_blob(noise(1000).into()).await.unwrap();
    assert!(registry.has_blob(digest));
    registry.fail(On::Upload, 99, Fault::Status(500));
    let error = ends.pusher.put_blob(noise(1001).into()).await.unwrap_err();
    assert!(matches!(error, RegistryError::Status { status: 500, .. }), "{error}");
}

#[tokio::test]
async fn writers_have_a_token_of_their_own() {
    let registry = FaultRegistry::start().await;
    registry.set_auth(Auth::Token("user".to_owned(), "secret".to_owned()));
    let mut config = config();
    let credential = lazuli::config::Credential {
        username: "user".to_owned(),
        password: "secret".to_owned(),
    };
    config.credentials.insert(registry.host(), credential);
    let ends = ends_of(&config, &registry.host());
    ends.pusher.put_blob(noise(10).into()).await.unwrap();
    ends.pusher
        .put_artifact(KIND, &[], None, &BTreeMap::new(), Some("a"))
        .await
        .unwrap();
    ends.source.manifest("a").await.unwrap();
    let scopes: Vec<_> = registry
        .seen(On::Token)
        .iter()
        .map(|seen| seen.query["scope"].clone())
        .collect();
    assert_eq!(scopes, ["repository:demo/app:pull", "repository:demo/app:pull,push"]);
    for seen in registry.seen(On::Manifest) {
        assert!(seen.authorized());
    }
    // Who may only read is told so.
    let anonymous = self::ends(&registry.host());
    let error = anonymous.pusher.put_blob(noise(11).into()).await.unwrap_err();
    assert!(matches!(error, RegistryError::Denied { status: 401, .. }), "{error}");
}

#[tokio::test]
async fn only_a_host_that_takes_pushes_is_written_to() {
    let registry = FaultRegistry::start().await;
    let mirror = FaultRegistry::start().await;
    let dir = tempfile::tempdir().unwrap();
    let hosts = dir.path().join(registry.host());
    std::fs::create_dir(&hosts).unwrap();
    let write = |capabilities: &str| {
        let text = format!(
            "server = \"http://{}\"\n[host.\"http://{}\"]\ncapabilities = [{capabilities}]\n",
            registry.host(),
            mirror.host()
        );
        std::fs::write(hosts.join("hosts.toml"), text).unwrap();
    };
    let config = RegistryConfig {
        config_path: vec![dir.path().to_owned()],
        ..config()
    };
    write("\"pull\", \"resolve\"");
    let none = BTreeMap::new();
    let first = ends_of(&config, &registry.host());
    first
        .pusher
        .put_artifact(KIND, &[], None, &none, Some("a"))
        .await
        .unwrap();
    assert!(registry.tagged(REPOSITORY, "a").is_some() && mirror.tagged(REPOSITORY, "a").is_none());
    write("\"pull\", \"resolve\", \"push\"");
    let second = ends_of(&config, &registry.host());
    second
        .pusher
        .put_artifact(KIND, &[], None, &none, Some("b"))
        .await
        .unwrap();
    assert!(registry.tagged(REPOSITORY, "b").is_none() && mirror.tagged(REPOSITORY, "b").is_some());
}

#[tokio::test]
async fn lists_that_lie_are_bounded() {
    let registry = FaultRegistry::start().await;
    registry.set_referrers(true);
    let source = ends(&registry.host()).source;
    let subject = Digest::of(b"s");
    registry.fail(On::Referrers, 9, Fault::Status(500));
    assert!(
        source.referrers(subject, KIND).await.is_err(),
        "a failure is not taken for an absence"
    );
    registry.heal();
    // A page after the other without end, each the same: the number of pages is bounded, and nothing is counted twice.
    let attached = ends(&registry.host());
    let about = descriptor(MANIFEST_TYPE, b"s", "");
    for note in ["1", "2", "3"] {
        attached.attach(&about, KIND, note.as_bytes(), note).await.unwrap();
    }
    registry.fail(On::Referrers, 99, Fault::Link("<?page=0>; rel=\"next\"".to_owned()));
    let before = registry.seen(On::Referrers).len();
    assert_eq!(source.referrers(subject, KIND).await.unwrap().len(), 2);
    assert!(registry.seen(On::Referrers).len() - before <= 64);
    registry.heal();
    // The next page is never asked of another host.
    registry.fail(
        On::Referrers,
        9,
        Fault::Link(format!("<http://{}/x>; rel=next", registry.cdn())),
    );
    let error = source.referrers(subject, KIND).await.unwrap_err();
    assert!(error.to_string().contains("another host"), "{error}");
    assert!(registry.seen(On::Cdn).is_empty());
    registry.heal();
    registry.fail(On::Referrers, 9, Fault::Status(401));
    let error = source.referrers(subject, KIND).await.unwrap_err();
    assert!(matches!(error, RegistryError::Denied { .. }), "{error}");
}
