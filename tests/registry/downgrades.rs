//! From a host behind TLS to one without: what may go there, and what stays.

use lazuli::config::{Credential, RegistryConfig};
use lazuli::layer::Digest;
use lazuli::registry::{RegistryError, Source};

use crate::support::fault_registry::{Auth, Fault, FaultRegistry, On, Seen};
use crate::support::openssl::{Pki, write_hosts};
use crate::support::tls_front::TlsFront;
use crate::{REPOSITORY, config, read, source};

/// Media type of what is asked for.
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// A host that is one registry for those who ask with TLS, and another one for those who ask without.
struct TwoFaced {
    secure: FaultRegistry,
    plain: FaultRegistry,
    host: String,
    config: RegistryConfig,
    _root: tempfile::TempDir,
    _front: TlsFront,
}

impl TwoFaced {
    async fn new() -> Self {
        let (secure, plain) = (FaultRegistry::start().await, FaultRegistry::start().await);
        let pki = Pki::default();
        pki.self_signed("own", "P-256", &["-addext", "subjectAltName=IP:127.0.0.1"]);
        let front = TlsFront::start(&pki, "own", secure.host(), plain.host());
        let (host, root) = (front.host(), tempfile::tempdir().unwrap());
        std::fs::copy(pki.path("own.crt"), root.path().join("own.crt")).unwrap();
        let ca = root.path().join("own.crt").display().to_string();
        write_hosts(root.path(), &host, &format!("ca = {ca:?}"));
        let credential = Credential {
            username: "alice".to_owned(),
            password: "s3cret".to_owned(),
        };
        let config = RegistryConfig {
            config_path: vec![root.path().to_owned()],
            credentials: [(host.clone(), credential)].into(),
            attempts: 1,
            ..config()
        };
        TwoFaced {
            secure,
            plain,
            host,
            config,
            _root: root,
            _front: front,
        }
    }

    fn source(&self) -> std::sync::Arc<dyn Source> {
        source(&self.config, &self.host)
    }

    /// Has the registry behind TLS ask for tokens from its own host.
    fn wants_tokens(&self) {
        let auth = || Auth::Token("alice".to_owned(), "s3cret".to_owned());
        self.secure.set_auth(auth());
        self.plain.set_auth(auth());
        let challenge = format!(
            r#"Bearer realm="https://{}/token",service="fault registry",scope="repository:{REPOSITORY}:pull""#,
            self.host
        );
        self.secure.set_challenges(&[&challenge]);
    }
}

fn carries_secret(seen: &Seen) -> bool {
    seen.authorized() || seen.form.contains_key("password")
}

/// Otherwise nothing below would show anything.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_service_behind_tls_gets_the_password() {
    let registry = TwoFaced::new().await;
    registry.wants_tokens();
    let digest = registry.secure.add_blob(&b"content"[..]);
    assert_eq!(
        read(&registry.source().blob(digest, 7), 0..7).await.unwrap(),
        b"content"
    );
    assert!(registry.secure.seen(On::Token).iter().any(carries_secret));
    assert!(registry.plain.log().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_does_not_follow_away_from_tls() {
    for status in [302, 307] {
        let registry = TwoFaced::new().await;
        registry.wants_tokens();
        let digest = registry.secure.add_blob(&b"content"[..]);
        // The same host and port, so that nothing but TLS is another.
        let to = format!(
            "http://{}/token?service=fault+registry&scope=repository%3A{}%3Apull",
            registry.host,
            REPOSITORY.replace('/', "%2F")
        );
        registry.secure.fail(On::Token, 99, Fault::RedirectAs(status, to));
        let error = read(&registry.source().blob(digest, 7), 0..7).await.unwrap_err();
        assert!(matches!(error, RegistryError::Denied { .. }), "{status}: {error}");
        let text = error.to_string();
        assert!(text.contains("without TLS") && !text.contains("s3cret"), "{text}");
        let asked = registry.plain.seen(On::Token);
        assert!(!asked.is_empty(), "it is asked for nobody in particular");
        assert!(!asked.iter().any(carries_secret), "{status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_tag_means_is_not_asked_away_from_tls() {
    let registry = TwoFaced::new().await;
    let good = registry.secure.add_manifest(MANIFEST, &b"{\"good\":1}"[..]);
    let false_one = registry.plain.add_manifest(MANIFEST, &b"{\"good\":0}"[..]);
    registry.plain.add_manifest(MANIFEST, &b"{\"good\":1}"[..]);
    for meant in [&registry.secure, &registry.plain] {
        meant.tag(REPOSITORY, "1", false_one);
    }
    registry.secure.tag(REPOSITORY, "1", good);
    let to = |reference: &str| {
        let to = format!("http://{}/v2/{REPOSITORY}/manifests/{reference}", registry.host);
        registry.secure.fail(On::Manifest, 1, Fault::Redirect(to));
    };
    to("1");
    let error = registry.source().manifest("1").await.unwrap_err();
    assert!(error.to_string().contains("away from TLS"), "{error}");
    assert!(registry.plain.log().is_empty(), "nobody asked there");
    registry.secure.heal();
    assert_eq!(registry.source().manifest("1").await.unwrap().digest, good);
    // What a digest proves may come over any line.
    to(&good.to_string());
    let manifest = registry.source().manifest(&good.to_string()).await.unwrap();
    assert_eq!(manifest.digest, Digest::of(&manifest.bytes));
    assert_eq!(registry.plain.seen(On::Manifest).len(), 1);
}
