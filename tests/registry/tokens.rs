//! Token services as they are: they redirect, answer in many forms, and take secrets in one way or the other.

use std::sync::Arc;

use lazuli::config::{Credential, RegistryConfig};
use lazuli::registry::{Blob, RegistryError};
use serde_json::json;

use crate::support::fault_registry::{Auth, Fault, FaultRegistry, On, Seen};
use crate::{Fixture, config, read, source};

/// The token service, with what a GET asks it.
const QUERY: &str = "/token?service=fault+registry&scope=repository%3Ademo%2Fapp%3Apull";

/// A configuration with a password for `host`.
fn with_password(host: &str) -> RegistryConfig {
    RegistryConfig {
        credentials: [(
            host.to_owned(),
            Credential {
                username: "alice".to_owned(),
                password: "s3cret".to_owned(),
            },
        )]
        .into(),
        ..config()
    }
}

fn wants_password() -> Auth {
    Auth::Token("alice".to_owned(), "s3cret".to_owned())
}

/// A registry, and a handle on a blob of it with a password.
async fn private() -> (FaultRegistry, Arc<dyn Blob>) {
    let registry = FaultRegistry::start().await;
    registry.set_auth(wants_password());
    let digest = registry.add_blob(&b"content"[..]);
    let blob = source(&with_password(&registry.host()), &registry.host()).blob(digest, 7);
    (registry, blob)
}

/// The same with a refresh token.
async fn with_identity() -> (FaultRegistry, Arc<dyn Blob>, tempfile::TempDir) {
    let registry = FaultRegistry::start().await;
    registry.set_auth(Auth::IdentityToken("refresh-me".to_owned()));
    let digest = registry.add_blob(&b"content"[..]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    let text = json!({"auths": {registry.host(): {"identitytoken": "refresh-me"}}}).to_string();
    std::fs::write(&path, text).unwrap();
    let config = RegistryConfig {
        docker_config: Some(path),
        ..config()
    };
    let blob = source(&config, &registry.host()).blob(digest, 7);
    (registry, blob, dir)
}

/// Whether a token request carried a secret.
fn carries_secret(seen: &Seen) -> bool {
    seen.authorized() || seen.form.contains_key("password") || seen.form.contains_key("refresh_token")
}

#[tokio::test]
async fn redirects_of_every_kind_are_followed_with_the_secret() {
    for status in [301, 302, 303, 307, 308] {
        let (registry, blob) = private().await;
        registry.fail(On::Token, 1, Fault::RedirectAs(status, QUERY.to_owned()));
        let absolute = format!("http://{}{QUERY}", registry.host());
        registry.fail(On::Token, 9, Fault::RedirectAs(status, absolute));
        assert_eq!(read(&blob, 0..7).await.unwrap(), b"content", "{status}");
        assert_eq!(registry.seen(On::Token).len(), 11, "ten redirects");
        assert!(registry.seen(On::Token).iter().all(carries_secret));
    }
    let (registry, blob) = private().await;
    registry.fail(On::Token, 99, Fault::RedirectAs(302, QUERY.to_owned()));
    let error = read(&blob, 0..7).await.unwrap_err().to_string();
    assert!(
        error.contains("redirects without end") && error.contains("/token"),
        "{error}"
    );
}

#[tokio::test]
async fn a_refresh_token_follows_a_redirect_too() {
    for status in [301, 302, 307, 308] {
        let (registry, blob, _dir) = with_identity().await;
        registry.fail(On::Token, 1, Fault::RedirectAs(status, "/token".to_owned()));
        assert_eq!(read(&blob, 0..7).await.unwrap(), b"content", "{status}");
        let seen = registry.seen(On::Token);
        assert!(seen.len() == 2 && seen.iter().all(carries_secret), "{status}: {seen:?}");
    }
    // This one asks for a GET at the other place, which gets no token without a secret; then it goes on as for a refusal.
    let (registry, blob, _dir) = with_identity().await;
    registry.fail(On::Token, 1, Fault::RedirectAs(303, "/token".to_owned()));
    assert_eq!(read(&blob, 0..7).await.unwrap(), b"content");
}

/// The token service of `other`, under another name than the one that it has itself, or at another port only.
fn elsewhere(other: &FaultRegistry, by_name: bool) -> String {
    match by_name {
        true => format!("http://{}{QUERY}", other.host().replace("127.0.0.1", "localhost")),
        false => format!("http://{}{QUERY}", other.host()),
    }
}

#[tokio::test]
async fn a_secret_does_not_follow_to_another_host() {
    for (by_name, is_identity) in [(true, true), (true, false), (false, true), (false, false)] {
        let (registry, blob, _dir) = match is_identity {
            true => {
                let (registry, blob, dir) = with_identity().await;
                (registry, blob, Some(dir))
            }
            false => {
                let (registry, blob) = private().await;
                (registry, blob, None)
            }
        };
        let other = FaultRegistry::start().await;
        other.set_auth(wants_password());
        registry.fail(On::Token, 99, Fault::RedirectAs(307, elsewhere(&other, by_name)));
        let error = read(&blob, 0..7).await.unwrap_err();
        assert!(matches!(error, RegistryError::Denied { .. }), "{error}");
        let text = error.to_string();
        let realm = format!("http://{}/token", registry.host());
        let place = elsewhere(&other, by_name);
        let place = place.split('?').next().unwrap();
        assert!(text.contains(&realm) && text.contains(place), "{text}");
        assert!(
            text.contains("let the registry name that address as its realm"),
            "{text}"
        );
        assert!(!text.contains("s3cret") && !text.contains("refresh-me"), "{text}");
        assert!(!other.seen(On::Token).is_empty());
        assert!(!other.seen(On::Token).iter().any(carries_secret));
    }
}

#[tokio::test]
async fn what_has_been_elsewhere_brings_no_secret_back() {
    let (registry, blob) = private().await;
    let other = FaultRegistry::start().await;
    registry.fail(On::Token, 1, Fault::RedirectAs(302, elsewhere(&other, true)));
    other.fail(
        On::Token,
        1,
        Fault::RedirectAs(302, format!("http://{}{QUERY}", registry.host())),
    );
    registry.fail(On::Token, 99, Fault::Status(401));
    let error = read(&blob, 0..7).await.unwrap_err();
    assert!(error.to_string().contains("credentials are not sent"), "{error}");
    let asked = registry.seen(On::Token);
    let carried: Vec<_> = asked.iter().map(carries_secret).collect();
    // As the realm, and from elsewhere; as the realm by POST; for nobody in particular.
    assert_eq!(carried, [true, false, true, false]);
}

#[tokio::test]
async fn a_redirect_to_another_host_that_asks_for_nothing_is_fine() {
    let (registry, blob) = private().await;
    registry.set_auth(Auth::AnonymousToken);
    registry.fail(On::Token, 1, Fault::RedirectAs(302, elsewhere(&registry, true)));
    assert_eq!(read(&blob, 0..7).await.unwrap(), b"content");
}

#[tokio::test]
async fn answers_in_many_forms_give_a_token() {
    for (status, body) in [
        (200, r#"{"token": "TOKEN"}"#),
        (201, r#"{"access_token": "TOKEN"}"#),
        (
            202,
            r#"{"token": "TOKEN", "access_token": null, "expires_in": null, "issued_at": null}"#,
        ),
        (203, r#"{"token": "", "access_token": "TOKEN"}"#),
        (200, r#"{"token": "TOKEN", "access_token": ""}"#),
        (200, r#"{"token": "old", "access_token": "TOKEN"}"#),
        (200, r#"{"token": "old", "token": "TOKEN"}"#),
        (
            200,
            r#"{"Access_Token": "TOKEN", "EXPIRES_IN": 300, "Issued_At": "2026-01-01T00:00:00Z"}"#,
        ),
        (200, r#"{"access_token": "TOKEN", "access_token": null}"#),
        (200, r#"{"token": "TOKEN", "expires_in": "300"}"#),
        (
            200,
            r#"{"token": "TOKEN", "expires_in": 299.5, "issued_at": "yesterday"}"#,
        ),
        (200, r#"{"token": "TOKEN", "expires_in": -1, "issued_at": 0}"#),
        (
            200,
            r#"{"token": "TOKEN", "expires_in": 0, "scope": ["x"], "refresh_token": {}}"#,
        ),
        (200, r#"{"token": "TOKEN", "expires_in": 1e99, "not_before": [[]]}"#),
        (200, "\n {\"token\": \"TOKEN\"}\n\n"),
    ] {
        let f = Fixture::new().await;
        f.registry.set_auth(Auth::AnonymousToken);
        f.registry.fail(On::Token, 1, Fault::Answer(status, body.to_owned()));
        f.good(0, 10).await;
        f.good(0, 10).await;
        assert_eq!(f.registry.seen(On::Token).len(), 1, "{body}");
    }
    for body in ["", "{}", "<html>", "null", "[]", r#"{"token": null}"#, r#"{"token": "#] {
        let f = Fixture::new().await;
        f.registry.set_auth(Auth::AnonymousToken);
        f.registry.fail(On::Token, 9, Fault::Answer(200, body.to_owned()));
        let error = f.error(0, 10).await;
        assert!(matches!(error, RegistryError::Protocol { .. }), "{body}: {error}");
        assert!(error.to_string().contains(&f.registry.host()), "{body}: {error}");
    }
}

#[tokio::test]
async fn services_that_know_one_way_only_are_asked_in_that() {
    // No GET with a password, though the specification has it.
    for status in [400, 401, 403, 404, 405, 501] {
        let (registry, blob) = private().await;
        registry.fail(On::Token, 1, Fault::Status(status));
        assert_eq!(read(&blob, 0..7).await.unwrap(), b"content", "{status}");
        let seen = registry.seen(On::Token);
        assert_eq!((seen.len(), seen[1].method.as_str()), (2, "POST"), "{status}");
        assert!(seen[1].query.is_empty(), "secrets are not put into addresses");
    }
    // What was taken once is tried first, and its refusal is believed.
    let (registry, blob) = private().await;
    registry.fail(On::Token, 1, Fault::Status(405));
    read(&blob, 0..7).await.unwrap();
    registry.expire_tokens();
    read(&blob, 0..7).await.unwrap();
    registry.expire_tokens();
    registry.set_auth(Auth::Token("alice".to_owned(), "changed".to_owned()));
    let asked = tokio::time::timeout(std::time::Duration::from_secs(2), read(&blob, 0..7)).await;
    assert!(asked.is_err(), "a reader waits: {asked:?}");
    let methods: Vec<_> = registry
        .seen(On::Token)
        .iter()
        .map(|seen| seen.method.to_string())
        .collect();
    assert_eq!(
        methods,
        ["GET", "POST", "POST", "POST", "GET"],
        "the last one for nobody in particular"
    );
    // No POST with a refresh token.
    for status in [400, 401, 403, 404, 405, 501] {
        let (registry, blob, _dir) = with_identity().await;
        registry.fail(On::Token, 1, Fault::Status(status));
        assert_eq!(read(&blob, 0..7).await.unwrap(), b"content", "{status}");
        let seen = registry.seen(On::Token);
        assert_eq!((seen.len(), seen[1].method.as_str()), (2, "GET"), "{status}");
    }
}

#[tokio::test]
async fn bad_credentials_do_not_hide_a_public_image() {
    for status in [400, 401, 403] {
        let (registry, blob) = private().await;
        registry.set_auth(Auth::AnonymousToken);
        registry.fail(On::Token, 2, Fault::Status(status));
        assert_eq!(read(&blob, 0..7).await.unwrap(), b"content", "{status}");
        assert!(!carries_secret(registry.seen(On::Token).last().unwrap()));
    }
}

#[tokio::test]
async fn a_token_for_nobody_in_particular_is_renewed_ahead_too() {
    let (registry, blob) = private().await;
    registry.set_auth(Auth::AnonymousToken);
    let lifetime = std::time::Duration::from_millis(200);
    registry.set_token_lifetime(lifetime);
    for asked in [3, 6] {
        registry.fail(On::Token, 2, Fault::Status(401));
        assert_eq!(read(&blob, 0..7).await.unwrap(), b"content");
        assert_eq!(registry.seen(On::Token).len(), asked);
        tokio::time::sleep(lifetime).await;
    }
    let refused = registry.seen(On::Blob).iter().filter(|seen| seen.status == 401).count();
    assert_eq!(refused, 1, "the client knew when it ended");
}

#[tokio::test]
async fn a_refusal_by_the_service_names_it_and_what_was_used() {
    let (registry, blob) = private().await;
    registry.set_auth(Auth::Token("alice".to_owned(), "changed".to_owned()));
    let error = read(&blob, 0..7).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, RegistryError::Denied { .. }), "{text}");
    for part in [
        &format!("http://{}/token", registry.host()),
        "registry.credentials",
        "check the credentials",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(
        !text.contains("s3cret") && !format!("{error:?}").contains("s3cret"),
        "{text}"
    );
}

#[tokio::test]
async fn challenges_in_many_forms_are_understood() {
    for headers in [
        &[r#"bearer Realm="REALM",SERVICE="fault registry",Scope="repository:demo/app:pull""#][..],
        &[r#"Bearer realm="/token",service="fault registry""#],
        &[r#"Bearer realm=REALM"#],
        &[r#"Bearer realm="REALM" service="x" scope="repository:demo/app:pull""#],
        &[r#"Bearer realm="HTTP://HOST/token""#],
        &[
            "Negotiate",
            r#"Basic realm="x""#,
            r#"Bearer realm="REALM",error="invalid_token""#,
        ],
        &[r#"Basic realm="x", Bearer realm="REALM", Digest nonce="1""#],
        &["Bearer", r#"Bearer realm="REALM""#],
    ] {
        let f = Fixture::new().await;
        f.registry.set_auth(Auth::AnonymousToken);
        f.registry.set_challenges(headers);
        f.good(0, 10).await;
    }
}

#[tokio::test]
async fn a_password_is_used_where_the_token_service_gives_nothing() {
    let (registry, blob) = private().await;
    registry.set_auth(Auth::Basic("alice".to_owned(), "s3cret".to_owned()));
    registry.set_challenges(&[r#"Bearer realm="REALM""#, r#"Basic realm="x""#]);
    registry.fail(On::Token, 99, Fault::Status(404));
    assert_eq!(read(&blob, 0..7).await.unwrap(), b"content");
}
