//! Credentials that end: a reader does not notice, or waits until somebody has renewed them.

use std::sync::Arc;
use std::time::Duration;

use lazuli::config::RegistryConfig;
use lazuli::layer::Digest;
use lazuli::registry::{Blob, RegistryError};
use serde_json::json;

use crate::support::fault_registry::{Auth, Fault, FaultRegistry, On};
use crate::{Fixture, config, read, source};

/// Longest that a reader may wait for what a test renews at once or in a moment: well below what it waits for access in all.
const PATIENCE: Duration = Duration::from_secs(30);

/// A `config.json` that a test rewrites.
pub struct Login {
    _dir: tempfile::TempDir,
    pub config: RegistryConfig,
    host: String,
}

impl Login {
    /// One that knows `alice` with this password at `host`.
    pub fn new(host: &str, password: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = RegistryConfig {
            docker_config: Some(dir.path().join("config.json")),
            ..config()
        };
        let login = Login {
            _dir: dir,
            config,
            host: host.to_owned(),
        };
        login.write(password);
        login
    }

    /// Writes another password.
    pub fn write(&self, password: &str) {
        self.write_text(&json!({"auths": {&self.host: {"username": "alice", "password": password}}}).to_string());
    }

    /// Writes anything.
    pub fn write_text(&self, text: &str) {
        std::fs::write(self.config.docker_config.as_ref().unwrap(), text).unwrap();
    }
}

/// A registry with one blob behind a login.
struct Private {
    registry: FaultRegistry,
    login: Login,
    blob: Arc<dyn Blob>,
    bytes: Vec<u8>,
}

impl Private {
    async fn new(auth: fn(String, String) -> Auth) -> Self {
        let registry = FaultRegistry::start().await;
        registry.set_auth(auth("alice".to_owned(), "first".to_owned()));
        let login = Login::new(&registry.host(), "first");
        let bytes = crate::noise(100_000);
        let digest = registry.add_blob(bytes.clone());
        let blob = source(&login.config, &registry.host()).blob(digest, bytes.len() as u64);
        Private {
            registry,
            login,
            blob,
            bytes,
        }
    }

    async fn good(&self) {
        let read = tokio::time::timeout(PATIENCE, read(&self.blob, 10..60_000)).await;
        assert!(read.expect("the reader hangs").unwrap() == self.bytes[10..60_000]);
    }

    fn tokens(&self) -> usize {
        self.registry.seen(On::Token).len()
    }
}

#[tokio::test]
async fn a_password_that_ended_is_looked_for_again_however_the_registry_says_so() {
    for status in [400, 401, 403] {
        let p = Private::new(Auth::Basic).await;
        p.good().await;
        p.registry.refuse_with(status);
        p.registry
            .set_auth(Auth::Basic("alice".to_owned(), "second".to_owned()));
        p.login.write("second");
        let before = p.registry.seen(On::Blob).len();
        p.good().await;
        assert_eq!(
            p.registry.seen(On::Blob).len(),
            before + 2,
            "{status}: refused once, then let in"
        );
    }
}

#[tokio::test]
async fn a_token_that_the_registry_forgot_is_renewed_however_it_says_so() {
    for status in [400, 401, 403] {
        let f = Fixture::new().await;
        f.registry.set_auth(Auth::AnonymousToken);
        f.good(0, 10).await;
        f.registry.refuse_with(status);
        f.registry.expire_tokens();
        futures::future::join_all((0..16).map(|n| f.good(n * 100, n * 100 + 5000))).await;
        assert_eq!(
            f.registry.seen(On::Token).len(),
            2,
            "{status}: one renewal for all readers"
        );
    }
}

#[tokio::test]
async fn a_reader_waits_until_somebody_has_renewed_the_password() {
    for auth in [Auth::Basic as fn(String, String) -> Auth, Auth::Token] {
        let p = Private::new(auth).await;
        p.good().await;
        p.registry.refuse_with(403);
        p.registry.set_auth(auth("alice".to_owned(), "second".to_owned()));
        p.registry.expire_tokens();
        let before = (p.registry.seen(On::Blob).len(), p.tokens());
        let (_, ()) = tokio::join!(p.good(), async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            // Half written, as a job without care would.
            p.login.write_text("{\"auths\": {");
            tokio::time::sleep(Duration::from_millis(100)).await;
            p.login.write("second");
        });
        let asked = (p.registry.seen(On::Blob).len() - before.0, p.tokens() - before.1);
        assert!(asked.0 <= 6 && asked.1 <= 8, "a storm: {asked:?}");
    }
}

#[tokio::test]
async fn access_that_never_was_is_refused_at_once_and_remembered() {
    for auth in [Auth::Basic as fn(String, String) -> Auth, Auth::Token] {
        let p = Private::new(auth).await;
        p.login.write("wrong");
        let mut asked = None;
        for _ in 0..5 {
            let error = read(&p.blob, 0..9).await.unwrap_err();
            assert!(
                matches!(error, RegistryError::Denied { .. }) && !error.retry_helps(),
                "{error}"
            );
            let text = error.to_string();
            assert!(text.contains("config.json") && !text.contains("wrong\""), "{text}");
            asked = asked.or(Some(p.tokens()));
        }
        assert_eq!(asked, Some(p.tokens()), "the token service is left alone for a moment");
        // What is new is tried at once.
        p.login.write("first");
        p.good().await;
    }
}

#[tokio::test]
async fn a_refused_renewal_is_not_repeated_by_every_reader() {
    let p = Private::new(Auth::Token).await;
    p.good().await;
    // Tokens are handed out, and good for nothing.
    p.registry.fail(On::Blob, 1000, Fault::Status(403));
    let before = p.tokens();
    let readers = (0..32).map(|_| tokio::time::timeout(Duration::from_secs(3), read(&p.blob, 0..9)));
    for ended in futures::future::join_all(readers).await {
        // Those who wait longer may be lucky.
        assert!(ended.is_err_and(|_| true));
    }
    assert!(p.tokens() - before <= 2, "{} tokens", p.tokens() - before);
    p.registry.heal();
    p.good().await;
}

#[tokio::test]
async fn a_400_that_means_what_it_says_stays_what_it_is() {
    let f = Fixture::new().await;
    f.registry.set_auth(Auth::AnonymousToken);
    f.good(0, 10).await;
    f.registry.fail(On::Referrers, 99, Fault::Status(400));
    let about = Digest::of(b"an image");
    for _ in 0..4 {
        assert!(f.source.referrers(about, "").await.unwrap().is_empty());
    }
    assert!(
        f.registry.seen(On::Token).len() <= 3,
        "{}",
        f.registry.seen(On::Token).len()
    );
    // Nobody was harmed.
    f.good(0, 10).await;
}

#[tokio::test]
async fn a_token_that_cannot_be_renewed_ahead_is_used_until_it_ends() {
    let f = Fixture::new().await;
    f.registry.set_auth(Auth::AnonymousToken);
    let lifetime = Duration::from_millis(200);
    f.registry.set_token_lifetime(lifetime);
    f.good(0, 10).await;
    // It is due for renewal after three quarters of its life.
    tokio::time::sleep(lifetime).await;
    f.registry.fail(On::Token, 1, Fault::Status(500));
    f.good(0, 10).await;
}
