use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::config::Credential;

fn password(username: &str, password: &str) -> Secret {
    Secret::Password {
        username: username.to_owned(),
        password: password.to_owned(),
    }
}

fn of_file(path: &Path) -> Credentials {
    Credentials::new(&RegistryConfig {
        docker_config: Some(path.to_owned()),
        ..RegistryConfig::default()
    })
}

async fn look_up(json: &str, host: &str) -> Lookup {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), json).unwrap();
    of_file(file.path()).find(host).await
}

async fn find(json: &str, host: &str) -> Option<Secret> {
    look_up(json, host).await.secret
}

#[tokio::test]
async fn the_table_wins_and_a_missing_file_is_nothing() {
    let credentials = Credentials::new(&RegistryConfig {
        docker_config: Some("/nonexistent/config.json".into()),
        credentials: [(
            "r.example:5000".to_owned(),
            Credential {
                username: "u".to_owned(),
                password: "p".to_owned(),
            },
        )]
        .into(),
        ..RegistryConfig::default()
    });
    assert_eq!(
        credentials.find("r.example:5000").await.secret,
        Some(password("u", "p"))
    );
    assert_eq!(credentials.find("r.example").await.secret, None);
    assert_eq!(credentials.problems(), [""; 0]);
}

#[tokio::test]
async fn entries_of_config_json() {
    // alice:wonder:land, without and with padding
    let json = r#"{"AUTHS": {
        "a.example": {"auth": "YWxpY2U6d29uZGVyOmxhbmQ"},
        "https://b.example:5000/v2/": {"username": "bob", "password": "x"},
        "https://index.docker.io/v1/": {"auth": "YWxpY2U6\nd29uZGVyOmxhbmQ="},
        "c.example": {"identitytoken": "refresh", "Auth": "MDAwOg=="},
        "d.example": {},
        "e.example": {"auth": "!!"},
        "f.example": {"auth": null, "username": "bob", "password": "x", "email": 7},
        "g.example": null,
        "h.example": {"auth": "wrong", "auth": "YWxpY2U6d29uZGVyOmxhbmQ"}
    }, "HttpHeaders": {"x": "y"}, "credsStore": null, "credHelpers": null} trailing"#;
    let alice = Some(password("alice", "wonder:land"));
    assert_eq!(find(json, "a.example").await, alice);
    assert_eq!(find(json, "b.example:5000").await, Some(password("bob", "x")));
    assert_eq!(find(json, "registry-1.docker.io").await, alice);
    assert_eq!(
        find(json, "c.example").await,
        Some(Secret::IdentityToken("refresh".to_owned()))
    );
    assert_eq!(find(json, "f.example").await, Some(password("bob", "x")));
    assert_eq!(find(json, "h.example").await, alice);
    for host in ["d.example", "e.example", "g.example", "a.example:1", "example"] {
        assert_eq!(find(json, host).await, None, "{host}");
    }
    for nothing in ["", "null", "{}", r#"{"auths": null}"#] {
        assert_eq!(find(nothing, "a.example").await, None, "{nothing}");
    }
}

#[tokio::test]
async fn what_is_wrong_is_told_without_secrets() {
    for (json, host, part) in [
        (
            r#"{"auths": {"a": {"auth": {"s3cret": 1}}}}"#,
            "a",
            "the entry for a holds no credentials",
        ),
        (r#"{"auths": {"a": {"auth": "s3cret"}}}"#, "a", "base64"),
        (r#"{"auths": {"a": ["s3cret"]}}"#, "a", "another form"),
        (r#"{"auths": {"a": {"auth": "s3cr"#, "a", "line 1"),
        (r#"{"auths": ["s3cret"]}"#, "a", "not a docker config.json"),
        (r#"{"credsStore": "../../bin/x"}"#, "a", "not the name of a program"),
        (
            r#"{"credHelpers": {"a": "lazuli-not-installed"}}"#,
            "a",
            "docker-credential-lazuli-not-installed cannot be run",
        ),
    ] {
        let found = look_up(json, host).await;
        assert_eq!(found.secret, None, "{json}");
        let [problem] = &found.problems[..] else {
            panic!("{json}: {:?}", found.problems)
        };
        assert!(problem.contains(part) && !problem.contains("s3cr"), "{json}: {problem}");
        assert!(problem.starts_with('/'), "{problem}");
    }
    // Who does not need the broken part hears nothing of it.
    assert!(
        look_up(r#"{"auths": {"a": {"auth": 1}}}"#, "b")
            .await
            .problems
            .is_empty()
    );
    // With a store, docker leaves entries empty.
    let found = look_up(r#"{"auths": {"a": {}}, "credsStore": "lazuli-not-installed"}"#, "a").await;
    assert_eq!(found.problems.len(), 1, "{:?}", found.problems);
    assert!(!format!("{:?}", password("user", "s3cret")).contains("s3cret"));
}

#[tokio::test]
async fn a_broken_helper_gives_way_to_the_entry() {
    let json = r#"{"credHelpers": {"a.example": "lazuli-not-installed"}, "auths": {"a.example": {"auth": "YTpi"}}}"#;
    let found = look_up(json, "a.example").await;
    assert_eq!(found.secret, Some(password("a", "b")));
    assert_eq!(found.problems.len(), 1);
}

#[tokio::test]
async fn a_file_that_is_being_written_keeps_its_last_good_state() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    let credentials = of_file(&path);
    let found = async || credentials.find("a").await.secret;
    assert_eq!(found().await, None);
    let good = r#"{"auths": {"a": {"auth": "YTpi"}}}"#;
    std::fs::write(&path, good).unwrap();
    assert_eq!(found().await, Some(password("a", "b")));
    assert!(credentials.problems().is_empty());
    // Half written, empty, gone, a directory in its place.
    std::fs::write(&path, &good[..20]).unwrap();
    assert_eq!(found().await, Some(password("a", "b")));
    assert!(
        credentials.problems()[0].contains("last good state"),
        "{:?}",
        credentials.problems()
    );
    std::fs::write(&path, "").unwrap();
    assert_eq!(found().await, Some(password("a", "b")));
    std::fs::remove_file(&path).unwrap();
    assert_eq!(found().await, Some(password("a", "b")));
    assert!(
        credentials.problems()[0].contains("not there"),
        "{:?}",
        credentials.problems()
    );
    std::fs::create_dir(&path).unwrap();
    assert_eq!(found().await, Some(password("a", "b")));
    assert!(
        credentials.problems()[0].contains("no file"),
        "{:?}",
        credentials.problems()
    );
    std::fs::remove_dir(&path).unwrap();
    // A file of the same size and age, in another place.
    std::fs::write(&path, good.replace("YTpi", "YTpj")).unwrap();
    assert_eq!(found().await, Some(password("a", "c")));
    assert!(credentials.problems().is_empty());
    // One that stays away is believed in the end.
    std::fs::remove_file(&path).unwrap();
    assert_eq!(found().await, Some(password("a", "c")));
    credentials.file.as_ref().unwrap().outlive_gone();
    assert_eq!(found().await, None);
    assert!(credentials.problems().is_empty());
}

#[tokio::test]
async fn a_file_is_read_again_only_when_it_looks_different() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    let write = |text: &str, age: u64| {
        std::fs::write(&path, text).unwrap();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(age))
            .unwrap();
    };
    write(r#"{"auths": {"a": {"auth": "YTpi"}}}"#, 1_000_000);
    let credentials = of_file(&path);
    assert_eq!(credentials.find("a").await.secret, Some(password("a", "b")));
    let stamp = credentials.stamp().await;
    // The same size and time: it cannot be told from what was read.
    write(r#"{"auths": {"a": {"auth": "YTpj"}}}"#, 1_000_000);
    assert_eq!(credentials.find("a").await.secret, Some(password("a", "b")));
    assert_eq!(credentials.stamp().await, stamp);
    write(r#"{"auths": {"a": {"auth": "YTpj"}}}"#, 1_000_001);
    assert_eq!(credentials.find("a").await.secret, Some(password("a", "c")));
    assert_ne!(credentials.stamp().await, stamp);
}

/// Helpers that are found in a directory of their own.
fn helpers(dir: &Path, script: &str) -> Helpers {
    let helper = dir.join("docker-credential-lazulitest");
    std::fs::write(&helper, script).unwrap();
    std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
    Helpers {
        search_path: Some(format!("{}:/usr/bin:/bin", dir.display()).into()),
        ..Helpers::default()
    }
}

#[tokio::test]
async fn helpers_are_asked() {
    let dir = tempfile::tempdir().unwrap();
    let helpers = helpers(
        dir.path(),
        "#!/bin/sh\nread host\ncase $host in\n good) echo '{\"ServerURL\":null,\"username\":\"u\",\"Secret\":\"'$host'\"}';;\n token) \
         echo '{\"Username\":\"<token>\",\"Secret\":\"t\"}';;\n none) echo credentials not found in native keychain; exit 1;;\n \
         text) echo s3cret;;\n *) echo boom s3cret; exit 3;;\nesac\n",
    );
    let ask = async |host: &str| helpers.ask("lazulitest", &format!("{host}\n")).await;
    assert_eq!(ask("good").await, Ok(Some(password("u", "good"))));
    assert_eq!(ask("token").await, Ok(Some(Secret::IdentityToken("t".to_owned()))));
    assert_eq!(ask("none").await, Ok(None));
    for host in ["bad", "text"] {
        let text = ask(host).await.unwrap_err();
        assert!(!text.contains("s3cret"), "{text}");
    }
    assert!(helpers.ask("../../bin/sh", "x").await.is_err());
}

#[tokio::test]
async fn a_helper_that_hangs_is_waited_for_once() {
    let dir = tempfile::tempdir().unwrap();
    let runs = dir.path().join("runs");
    let script = format!("#!/bin/sh\necho run >> {}\nexec sleep 60\n", runs.display());
    let mut helpers = helpers(dir.path(), &script);
    helpers.timeout = Duration::from_millis(500);
    for _ in 0..2 {
        let text = helpers.ask("lazulitest", "a\n").await.unwrap_err();
        assert!(text.contains("did not answer"), "{text}");
    }
    assert_eq!(std::fs::read_to_string(&runs).unwrap().lines().count(), 1);
}

/// Runs itself again, as a service would: without `HOME`.
#[test]
fn without_home_the_user_database_tells_where_the_file_is() {
    const AGAIN: &str = "LAZULI_TEST_WITHOUT_HOME";
    if std::env::var_os(AGAIN).is_some() {
        println!("path={}", default_docker_config().unwrap().display());
        return;
    }
    let uid = rustix::process::getuid().as_raw().to_string();
    let users = std::fs::read_to_string("/etc/passwd").unwrap();
    let home = users
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.get(2) == Some(&uid.as_str()))
        .map(|fields| fields[5].to_owned());
    // A user whom the database does not know has no home.
    let Some(home) = home else { return };
    let name = "registry::auth::credentials::tests::without_home_the_user_database_tells_where_the_file_is";
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env_remove("HOME")
        .env_remove("DOCKER_CONFIG")
        .env(AGAIN, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains(&format!("path={home}/.docker/config.json")), "{text}");
}

proptest! {
    #[test]
    fn any_text_is_parsed_or_refused(text in "\\PC{0,60}") {
        let _ = parse_docker_config(&text);
    }
}
