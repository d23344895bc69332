//! Tokens, credentials and redirects.

use std::path::PathBuf;
use std::time::Duration;

use lazuli::config::{Credential, RegistryConfig};
use lazuli::layer::Digest;
use lazuli::registry::RegistryError;
use serde_json::json;

use crate::support::fault_registry::{Auth, Fault, On, Seen};
use crate::{Fixture, REPOSITORY, config, range, read, source};

#[tokio::test]
async fn readers_share_one_token() {
    let f = Fixture::new().await;
    f.registry.set_auth(Auth::AnonymousToken);
    futures::future::join_all((0..16).map(|n| f.good(n * 100, n * 100 + 5000))).await;
    assert_eq!(f.registry.seen(On::Token).len(), 1);
    let token = &f.registry.seen(On::Token)[0];
    assert_eq!(
        token.query.get("scope").map(String::as_str),
        Some("repository:demo/app:pull")
    );
    assert_eq!(token.query.get("service").map(String::as_str), Some("fault registry"));
    assert!(!token.authorized());
    f.good(0, 300_000).await;
    assert_eq!(f.registry.seen(On::Token).len(), 1);
}

#[tokio::test]
async fn an_ended_token_is_renewed_in_the_middle_of_a_body() {
    let f = Fixture::new().await;
    f.registry.set_auth(Auth::AnonymousToken);
    f.good(0, 10).await;
    f.registry.fail(On::Blob, 1, Fault::Cut(100_000));
    f.registry.fail(On::Blob, 1, Fault::Unauthorized);
    f.good(0, 300_000).await;
    assert_eq!(f.registry.seen(On::Token).len(), 2);
    f.registry.expire_tokens();
    futures::future::join_all((0..8).map(|n| f.good(n * 100, n * 100 + 5000))).await;
    assert_eq!(f.registry.seen(On::Token).len(), 3);
}

#[tokio::test]
async fn a_token_is_renewed_before_it_ends() {
    let f = Fixture::new().await;
    f.registry.set_auth(Auth::AnonymousToken);
    let stated = Duration::from_millis(50);
    f.registry.set_token_lifetime(stated);
    f.good(0, 10).await;
    let refused = |seen: Vec<Seen>| seen.iter().filter(|seen| seen.status == 401).count();
    assert_eq!(refused(f.registry.seen(On::Blob)), 1);
    let tokens = f.registry.seen(On::Token).len();
    tokio::time::sleep(stated).await;
    f.good(0, 10).await;
    assert_eq!(refused(f.registry.seen(On::Blob)), 1, "nobody had to tell the client");
    assert!(
        f.registry.seen(On::Token).len() > tokens,
        "the client knew when it ended"
    );
}

#[tokio::test]
async fn a_failing_token_service_is_asked_again() {
    let f = Fixture::new().await;
    f.registry.set_auth(Auth::AnonymousToken);
    f.registry.fail(On::Token, 1, Fault::Status(500));
    f.registry.fail(On::Token, 1, Fault::RetryAfter(429, "0".to_owned()));
    f.good(0, 10).await;
    assert_eq!(f.registry.seen(On::Token).len(), 3);
}

/// A `config.json` in a directory of its own.
fn docker_config(entry: serde_json::Value) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    std::fs::write(&path, entry.to_string()).unwrap();
    (dir, path)
}

#[tokio::test]
async fn credentials_come_from_the_table_or_from_docker() {
    let f = Fixture::new().await;
    let host = f.registry.host();
    let size = f.bytes.len() as u64;
    let digest = Digest::of(&f.bytes);
    let table = RegistryConfig {
        credentials: [(
            host.clone(),
            Credential {
                username: "alice".to_owned(),
                password: "s3cret".to_owned(),
            },
        )]
        .into(),
        ..config()
    };
    // alice:s3cret
    let (_dir, path) = docker_config(json!({"auths": {&host: {"auth": "YWxpY2U6czNjcmV0"}}}));
    let docker = RegistryConfig {
        docker_config: Some(path),
        ..config()
    };
    let (alice, secret) = ("alice".to_owned(), "s3cret".to_owned());
    for auth in [
        Auth::Basic(alice.clone(), secret.clone()),
        Auth::Token(alice.clone(), secret.clone()),
    ] {
        f.registry.set_auth(auth);
        for config in [&table, &docker] {
            let source = source(config, &host);
            let blob = source.blob(digest, size);
            assert!(read(&blob, 7..77).await.unwrap() == f.bytes[7..77]);
        }
        // Nobody in particular is refused.
        let error = f.error(0, 10).await;
        assert!(matches!(error, RegistryError::Denied { status: 401, .. }), "{error}");
    }
    f.registry
        .set_auth(Auth::Basic("alice".to_owned(), "changed".to_owned()));
    let blob = source(&table, &host).blob(digest, size);
    let before = f.registry.seen(On::Blob).len();
    let error = read(&blob, 0..10).await.unwrap_err();
    assert!(matches!(error, RegistryError::Denied { .. }), "{error}");
    assert!(!error.to_string().contains("s3cret") && !format!("{error:?}").contains("s3cret"));
    assert_eq!(
        f.registry.seen(On::Blob).len(),
        before + 2,
        "without, then once with the password"
    );
}

#[tokio::test]
async fn an_identity_token_is_exchanged() {
    let f = Fixture::new().await;
    f.registry.set_auth(Auth::IdentityToken("refresh-me".to_owned()));
    let host = f.registry.host();
    let (_dir, path) = docker_config(json!({"auths": {&host: {"identitytoken": "refresh-me"}}}));
    let config = RegistryConfig {
        docker_config: Some(path),
        ..config()
    };
    let blob = source(&config, &host).blob(Digest::of(&f.bytes), f.bytes.len() as u64);
    assert!(read(&blob, 0..10).await.unwrap() == f.bytes[..10]);
    let token = &f.registry.seen(On::Token)[0];
    assert_eq!(token.method, http::Method::POST);
    assert!(token.query.is_empty(), "secrets are not put into addresses");
}

#[tokio::test]
async fn a_redirect_is_remembered_and_gets_no_credentials() {
    let f = Fixture::new().await;
    f.registry.set_auth(Auth::AnonymousToken);
    f.registry.set_redirects(true, None);
    f.good(0, 1000).await;
    let asked = f.registry.seen(On::Blob).len();
    for n in 1..5 {
        f.good(n * 1000, n * 1000 + 500).await;
    }
    assert_eq!(f.registry.seen(On::Blob).len(), asked, "only the CDN was asked");
    let at_cdn = f.registry.seen(On::Cdn);
    assert_eq!(at_cdn.len(), 5);
    assert!(at_cdn.iter().all(|seen| !seen.authorized()));
    // Another handle on the same blob knows it too.
    let again = f.source.blob(Digest::of(&f.bytes), f.bytes.len() as u64);
    read(&again, 0..10).await.unwrap();
    assert_eq!(f.registry.seen(On::Blob).len(), asked);
}

#[tokio::test]
async fn an_ended_redirect_is_asked_for_anew() {
    let f = Fixture::new().await;
    f.registry.set_redirects(true, None);
    f.good(0, 1000).await;
    f.registry.expire_redirects();
    f.good(1000, 2000).await;
    assert_eq!(
        (f.registry.seen(On::Blob).len(), f.registry.seen(On::Cdn).len()),
        (2, 3)
    );
    // In the middle of a body, too.
    f.registry.fail(On::Cdn, 1, Fault::Cut(100_000));
    f.registry.fail(On::Cdn, 1, Fault::Status(500));
    f.good(0, 300_000).await;
    assert_eq!(f.ranges(On::Cdn).last().unwrap(), &range("100000-299999"));
    // A refusal of a fresh address is not the registry's last word.
    f.registry.expire_redirects();
    f.registry.fail(On::Cdn, 2, Fault::Status(403));
    f.good(0, 10).await;
}

#[tokio::test]
async fn a_redirect_that_says_when_it_ends_is_not_used_longer() {
    let f = Fixture::new().await;
    f.registry.set_redirects(true, Some(Duration::from_secs(5)));
    f.good(0, 1000).await;
    f.good(1000, 2000).await;
    assert_eq!(f.registry.seen(On::Blob).len(), 2, "too short to be worth remembering");
    f.registry.set_redirects(true, Some(Duration::from_secs(600)));
    f.good(0, 1000).await;
    f.good(1000, 2000).await;
    assert_eq!(f.registry.seen(On::Blob).len(), 3);
}

#[tokio::test]
async fn redirects_in_a_circle_end() {
    let f = Fixture::new().await;
    let itself = format!("/v2/{REPOSITORY}/blobs/{}", Digest::of(&f.bytes));
    f.registry.fail(On::Blob, 99, Fault::Redirect(itself));
    let error = f.error(0, 10).await;
    assert!(error.to_string().contains("redirects"), "{error}");
    f.registry.heal();
    f.registry
        .fail(On::Blob, 9, Fault::Redirect("file:///etc/passwd".to_owned()));
    let error = f.error(0, 10).await;
    assert!(matches!(error, RegistryError::Protocol { .. }), "{error}");
}
