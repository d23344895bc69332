//! Redirects to another registry, which wants its own token.

use lazuli::config::{Credential, RegistryConfig};
use lazuli::registry::RegistryError;

use crate::support::fault_registry::{Auth, Fault, FaultRegistry, On};
use crate::{REPOSITORY, config, noise, read, source};

const SIZE: u64 = 100_000;

/// Two registries: the first sends readers of the blob to the second.
struct Pair {
    first: FaultRegistry,
    second: FaultRegistry,
    config: RegistryConfig,
    bytes: Vec<u8>,
    target: String,
}

fn password(password: &str) -> Credential {
    Credential {
        username: "alice".to_owned(),
        password: password.to_owned(),
    }
}

impl Pair {
    async fn new() -> Self {
        let (first, second) = (FaultRegistry::start().await, FaultRegistry::start().await);
        let bytes = noise(SIZE as usize);
        let digest = first.add_blob(bytes.clone());
        second.add_blob(bytes.clone());
        let target = format!("http://{}/v2/team/mirror/blobs/{digest}", second.host());
        first.set_auth(Auth::Basic("alice".to_owned(), "first".to_owned()));
        first.fail(On::Blob, 99, Fault::Redirect(target.clone()));
        let config = RegistryConfig {
            credentials: [(first.host(), password("first"))].into(),
            ..config()
        };
        Pair {
            first,
            second,
            config,
            bytes,
            target,
        }
    }

    /// Reads the blob twice: by the redirect, and at the remembered target.
    async fn read(&self) -> Result<(), RegistryError> {
        let blob = source(&self.config, &self.first.host()).blob(lazuli::layer::Digest::of(&self.bytes), SIZE);
        for range in [0..1000, 500..SIZE] {
            let part = self.bytes[range.start as usize..range.end as usize].to_vec();
            assert!(read(&blob, range).await? == part);
        }
        Ok(())
    }

    /// What the second registry was told of secrets.
    fn headers(&self) -> Vec<String> {
        let seen = self.second.log().into_iter();
        seen.filter_map(|seen| seen.header("authorization").map(str::to_owned))
            .collect()
    }
}

#[tokio::test]
async fn the_target_gives_a_token_to_anybody() {
    let pair = Pair::new().await;
    pair.second.set_auth(Auth::AnonymousToken);
    pair.read().await.unwrap();
    let tokens = pair.second.seen(On::Token);
    assert_eq!(tokens.len(), 1);
    assert_eq!(tokens[0].query["scope"], "repository:team/mirror:pull");
    assert!(!tokens[0].authorized());
    assert!(
        pair.headers().iter().all(|header| header.starts_with("Bearer ")),
        "{:?}",
        pair.headers()
    );
    let asked = pair.first.seen(On::Blob).len();
    assert_eq!(asked, 2, "a challenge, a redirect; then the target is remembered");
    // Forgotten there, too.
    pair.second.expire_tokens();
    pair.read().await.unwrap();
}

#[tokio::test]
async fn the_target_wants_credentials_of_its_own() {
    for auth in [Auth::Basic as fn(String, String) -> Auth, Auth::Token] {
        let mut pair = Pair::new().await;
        pair.second.set_auth(auth("alice".to_owned(), "second".to_owned()));
        let host = pair.second.host();
        pair.config.credentials.insert(host.clone(), password("second"));
        pair.read().await.unwrap();
        // Without: the refusal names the target.
        pair.config.credentials.insert(host.clone(), password("wrong"));
        let error = pair.read().await.unwrap_err();
        assert!(matches!(error, RegistryError::Denied { .. }), "{error}");
        assert!(error.to_string().contains(&host), "{error}");
    }
}

#[tokio::test]
async fn ten_redirects_are_followed_and_not_eleven() {
    for (more, ok) in [(9, true), (10, false)] {
        let pair = Pair::new().await;
        pair.first.heal();
        let itself = format!("/v2/{REPOSITORY}/blobs/{}", lazuli::layer::Digest::of(&pair.bytes));
        pair.first.fail(On::Blob, more, Fault::RedirectAs(302, itself));
        pair.first.fail(On::Blob, 1, Fault::Redirect(pair.target.clone()));
        pair.second.set_auth(Auth::AnonymousToken);
        let blob = source(&pair.config, &pair.first.host()).blob(lazuli::layer::Digest::of(&pair.bytes), SIZE);
        let outcome = read(&blob, 0..10).await;
        assert_eq!(pair.second.seen(On::Blob).is_empty(), !ok, "{outcome:?}");
        assert!(outcome.is_ok(), "a new attempt goes another way: {outcome:?}");
    }
}

#[tokio::test]
async fn a_target_that_refuses_is_asked_for_anew() {
    let pair = Pair::new().await;
    pair.second.set_auth(Auth::AnonymousToken);
    pair.read().await.unwrap();
    let blob = source(&pair.config, &pair.first.host()).blob(lazuli::layer::Digest::of(&pair.bytes), SIZE);
    read(&blob, 0..10).await.unwrap();
    // It is for others now; the first registry has the blob itself.
    pair.second.set_auth(Auth::Basic("bob".to_owned(), "x".to_owned()));
    pair.first.heal();
    assert!(read(&blob, 5..SIZE).await.unwrap() == pair.bytes[5..]);
}

/// Who knows a signed address may read what it leads to: it is in no error, however asking there fails.
#[tokio::test]
async fn a_signed_address_is_in_no_error() {
    let bytes = noise(SIZE as usize);
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = nobody.local_addr().unwrap();
    drop(nobody);
    let signed = |host: &str| format!("http://{host}/x?X-Amz-Signature=s1gned");
    for fault in [
        None,
        Some(Fault::Status(403)),
        Some(Fault::Status(500)),
        Some(Fault::Cut(10)),
        Some(Fault::Stall(10)),
    ] {
        let (first, second) = (FaultRegistry::start().await, FaultRegistry::start().await);
        let digest = first.add_blob(bytes.clone());
        second.add_blob(bytes.clone());
        let to = match &fault {
            None => signed(&address.to_string()),
            Some(_) => format!(
                "http://{}/v2/{REPOSITORY}/blobs/{digest}?X-Amz-Signature=s1gned",
                second.host()
            ),
        };
        first.fail(On::Blob, 99, Fault::Redirect(to));
        if let Some(fault) = &fault {
            second.fail(On::Blob, 99, fault.clone());
        }
        let config = RegistryConfig {
            idle_timeout: std::time::Duration::from_millis(500),
            ..config()
        };
        let error = read(&source(&config, &first.host()).blob(digest, SIZE), 0..SIZE).await;
        let text = format!("{0} {0:?}", error.unwrap_err());
        assert!(!text.contains("s1gned"), "{fault:?}: {text}");
        let asked = second.seen(On::Blob);
        assert!(fault.is_none() || asked.iter().any(|seen| seen.query.contains_key("X-Amz-Signature")));
    }
}
