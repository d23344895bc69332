//! Sources of credentials that are broken: public images do not suffer, and a refusal tells what was wrong.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lazuli::config::RegistryConfig;
use lazuli::metrics::Metrics;
use lazuli::registry::{Registry, RegistryError};

use crate::support::fault_registry::{Auth, FaultRegistry, On};
use crate::{REPOSITORY, config, read};

/// A directory with a `config.json` made by `make`, which is told its path.
fn with_config(make: impl FnOnce(&Path)) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    make(&path);
    (dir, path)
}

/// Makes a broken `config.json` at a path, for a host.
type Breakage = fn(&Path, &str);

/// Ways in which sources are broken, and a part of what is said about each.
const BROKEN: [(&str, Breakage); 9] = [
    ("it is no file", |path, _| std::fs::create_dir(path).unwrap()),
    ("not a docker config.json", |path, host| {
        std::fs::write(path, format!("{{\"auths\": {{\"{host}\": {{\"auth\": \"c2Vj")).unwrap();
    }),
    ("not a docker config.json", |path, _| {
        std::fs::write(path, "[\"s3cret\"]").unwrap()
    }),
    ("holds no credentials", |path, host| {
        write(path, host, "{\"email\": \"a@b\"}")
    }),
    ("holds no credentials", |path, host| {
        write(path, host, "{\"auth\": null}")
    }),
    ("base64", |path, host| write(path, host, "{\"auth\": \"!!s3cret!!\"}")),
    ("cannot be run", |path, _| {
        std::fs::write(path, r#"{"auths": null, "credsStore": "lazuli-not-installed"}"#).unwrap();
    }),
    ("cannot be run", |path, host| {
        std::fs::write(
            path,
            format!("{{\"credHelpers\": {{\"{host}\": \"lazuli-not-installed\"}}}}"),
        )
        .unwrap();
    }),
    ("cannot be read", |path, _| {
        std::os::unix::fs::symlink(path, path).unwrap()
    }),
];

fn write(path: &Path, host: &str, entry: &str) {
    std::fs::write(path, format!("{{\"auths\": {{\"{host}\": {entry}}}}}")).unwrap();
}

fn client(path: &Path) -> Arc<Registry> {
    let config = RegistryConfig {
        docker_config: Some(path.to_owned()),
        ..config()
    };
    Registry::new(&config, Arc::new(Metrics::new())).unwrap()
}

#[tokio::test]
async fn a_public_image_is_read_whatever_is_wrong() {
    for (said, breakage) in BROKEN {
        let registry = FaultRegistry::start().await;
        registry.set_auth(Auth::AnonymousToken);
        let digest = registry.add_blob(&b"content"[..]);
        let (_dir, path) = with_config(|path| breakage(path, &registry.host()));
        let client = client(&path);
        let blob = client.repository(&registry.host(), REPOSITORY).blob(digest, 7);
        assert_eq!(read(&blob, 0..7).await.unwrap(), b"content", "{said}");
        assert_eq!(registry.seen(On::Token).len(), 1);
        let problems = client.problems();
        assert!(
            problems.iter().any(|problem| problem.contains(said)),
            "{said}: {problems:?}"
        );
        assert!(
            problems
                .iter()
                .all(|problem| problem.contains(&path.display().to_string())),
            "{problems:?}"
        );
    }
}

#[tokio::test]
async fn a_refusal_tells_what_was_wrong() {
    for (said, breakage) in BROKEN {
        for auth in [Auth::Basic as fn(String, String) -> Auth, Auth::Token] {
            let registry = FaultRegistry::start().await;
            registry.set_auth(auth("alice".to_owned(), "s3cret".to_owned()));
            let digest = registry.add_blob(&b"content"[..]);
            let (_dir, path) = with_config(|path| breakage(path, &registry.host()));
            let client = client(&path);
            let blob = client.repository(&registry.host(), REPOSITORY).blob(digest, 7);
            let error = read(&blob, 0..7).await.unwrap_err();
            assert!(matches!(error, RegistryError::Denied { .. }), "{error}");
            let text = error.to_string();
            assert!(
                text.contains(said) && text.contains(&path.display().to_string()),
                "{said}: {text}"
            );
            assert!(!text.contains("s3cret") && !text.contains("c2Vj"), "{text}");
        }
    }
}

#[tokio::test]
async fn what_is_repaired_is_used_at_once_and_no_problem_any_more() {
    let registry = FaultRegistry::start().await;
    registry.set_auth(Auth::Basic("alice".to_owned(), "s3cret".to_owned()));
    let digest = registry.add_blob(&b"content"[..]);
    let (_dir, path) = with_config(|path| std::fs::write(path, "{\"auths\": ").unwrap());
    let client = client(&path);
    let blob = client.repository(&registry.host(), REPOSITORY).blob(digest, 7);
    read(&blob, 0..7).await.unwrap_err();
    assert_eq!(client.problems().len(), 1);
    write(&path, &registry.host(), "{\"auth\": \"YWxpY2U6czNjcmV0\"}");
    assert_eq!(read(&blob, 0..7).await.unwrap(), b"content");
    assert_eq!(client.problems(), [""; 0]);
}

/// Where this process looks for programs a helper cannot be put, so the table stands in for the source that is left.
#[tokio::test]
async fn the_table_is_not_spoiled_by_a_broken_file() {
    let registry = FaultRegistry::start().await;
    registry.set_auth(Auth::Basic("alice".to_owned(), "s3cret".to_owned()));
    let digest = registry.add_blob(&b"content"[..]);
    let (_dir, path) = with_config(|path| std::fs::create_dir(path).unwrap());
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000)).unwrap();
    let config = RegistryConfig {
        docker_config: Some(path),
        credentials: [(
            registry.host(),
            lazuli::config::Credential {
                username: "alice".to_owned(),
                password: "s3cret".to_owned(),
            },
        )]
        .into(),
        ..config()
    };
    let client = Registry::new(&config, Arc::new(Metrics::new())).unwrap();
    let blob = client.repository(&registry.host(), REPOSITORY).blob(digest, 7);
    assert_eq!(read(&blob, 0..7).await.unwrap(), b"content");
    assert_eq!(client.problems(), [""; 0]);
}
