//! Where user names and passwords come from: the configuration's table, then docker's `config.json` and its credential helpers.
//!
//! `config.json` is read for every look-up (a token lasts for minutes, so that is rare): a `docker login` counts at once. In it, as
//! docker does: the host's helper (`credHelpers`), else its entry in `auths`, else the general helper (`credsStore`).

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::config::RegistryConfig;
use crate::registry::RegistryError;

/// Longest run of a credential helper: it may ask a cloud's metadata service, never a person.
const HELPER_TIMEOUT: Duration = Duration::from_secs(30);
/// Most bytes read of a helper's answer.
const MAX_HELPER_OUTPUT: u64 = 1 << 20;
/// Largest `config.json`, in bytes.
const MAX_CONFIG: u64 = 4 << 20;
/// What a helper answers as the user name of an identity token.
const TOKEN_USER: &str = "<token>";
/// Key of docker.io in `auths`, for historical reasons.
const DOCKER_IO_KEY: &str = "https://index.docker.io/v1/";

/// Something that proves who asks. Its `Debug` form shows no secret.
#[derive(Clone, PartialEq, Eq)]
pub enum Secret {
    /// A user name and a password.
    Password {
        /// User name.
        username: String,
        /// Password, or an access token in its place.
        password: String,
    },
    /// An OAuth 2 refresh token.
    IdentityToken(String),
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Secret::Password { .. } => f.write_str("Password(..)"),
            Secret::IdentityToken(_) => f.write_str("IdentityToken(..)"),
        }
    }
}

/// The sources of credentials of a daemon.
pub struct Credentials {
    table: HashMap<String, Secret>,
    docker_config: Option<PathBuf>,
    helper_timeout: Duration,
    /// Where helpers are searched for, if not in this process' own PATH.
    search_path: Option<OsString>,
}

impl Credentials {
    /// The sources that `config` names.
    pub fn new(config: &RegistryConfig) -> Self {
        let table = config.credentials.iter().map(|(host, credential)| {
            let secret = Secret::Password {
                username: credential.username.clone(),
                password: credential.password.clone(),
            };
            (host.clone(), secret)
        });
        Credentials {
            table: table.collect(),
            docker_config: config.docker_config.clone().or_else(default_docker_config),
            helper_timeout: HELPER_TIMEOUT,
            search_path: None,
        }
    }

    /// The credentials for `host` (`host:port`), or `None` to ask anonymously.
    ///
    /// # Errors
    /// [`RegistryError::Config`] if `config.json` cannot be read or a helper fails otherwise than by knowing nothing.
    pub async fn find(&self, host: &str) -> Result<Option<Secret>, RegistryError> {
        let names = aliases(host);
        if let Some(secret) = names.iter().find_map(|name| self.table.get(*name)) {
            return Ok(Some(secret.clone()));
        }
        let Some(path) = self.docker_config.clone() else {
            return Ok(None);
        };
        let problem = |problem: String| RegistryError::Config {
            path: path.display().to_string(),
            problem,
        };
        let mut text = String::new();
        match tokio::fs::File::open(&path).await {
            Ok(file) => file
                .take(MAX_CONFIG)
                .read_to_string(&mut text)
                .await
                .map_err(|error| problem(format!("cannot be read: {error}")))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(problem(format!("cannot be read: {error}"))),
        };
        match parse_docker_config(&text).map_err(problem)?.find(&names) {
            Found::Nothing => Ok(None),
            Found::Secret(secret) => Ok(Some(secret)),
            Found::Helper { name, key } => self.ask_helper(&name, &key, &path).await,
        }
    }

    /// Asks the helper `name` about `key`; `path` is the file that names it, for messages.
    async fn ask_helper(&self, name: &str, key: &str, path: &Path) -> Result<Option<Secret>, RegistryError> {
        let program = format!("docker-credential-{name}");
        let problem = |problem: String| RegistryError::Config {
            path: path.display().to_string(),
            problem: format!("the credential helper {program} {problem}"),
        };
        // It becomes the name of a program.
        if name.contains('/') {
            return Err(problem("is not the name of a program".to_owned()));
        }
        let run = async {
            let mut command = tokio::process::Command::new(&program);
            if let Some(search_path) = &self.search_path {
                command.env("PATH", search_path);
            }
            let mut child = command
                .arg("get")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .kill_on_drop(true)
                .spawn()?;
            if let Some(mut stdin) = child.stdin.take() {
                // A helper that does not read its input may still answer.
                let _ = stdin.write_all(key.as_bytes()).await;
            }
            let mut output = Vec::new();
            if let Some(stdout) = child.stdout.take() {
                stdout.take(MAX_HELPER_OUTPUT).read_to_end(&mut output).await?;
            }
            Ok::<_, std::io::Error>((child.wait().await?, output))
        };
        // Neither output nor errors of a helper are repeated: they may hold secrets.
        let (status, output) = tokio::time::timeout(self.helper_timeout, run)
            .await
            .map_err(|_| problem(format!("did not answer within {} s", self.helper_timeout.as_secs())))?
            .map_err(|error| problem(format!("cannot be run: {error}")))?;
        if !status.success() {
            let output = String::from_utf8_lossy(&output).to_ascii_lowercase();
            if output.contains("credentials not found") {
                return Ok(None);
            }
            return Err(problem(format!("failed ({status}); run it by hand to see why")));
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Answer {
            username: String,
            secret: String,
        }
        let answer: Answer =
            serde_json::from_slice(&output).map_err(|_| problem("gave an answer that is not valid".to_owned()))?;
        Ok(match answer.username.as_str() {
            _ if answer.secret.is_empty() => None,
            TOKEN_USER => Some(Secret::IdentityToken(answer.secret)),
            _ => Some(Secret::Password {
                username: answer.username,
                password: answer.secret,
            }),
        })
    }
}

fn default_docker_config() -> Option<PathBuf> {
    match std::env::var_os("DOCKER_CONFIG") {
        Some(dir) if !dir.is_empty() => Some(PathBuf::from(dir).join("config.json")),
        _ => std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".docker/config.json")),
    }
}

/// The names under which credentials of `host` may be filed.
fn aliases(host: &str) -> Vec<&str> {
    match host {
        "docker.io" | "registry-1.docker.io" | "index.docker.io" => {
            vec![DOCKER_IO_KEY, "docker.io", "index.docker.io", "registry-1.docker.io"]
        }
        other => vec![other],
    }
}

/// The parts of `config.json` that matter here.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct DockerConfig {
    auths: HashMap<String, Entry>,
    creds_store: String,
    cred_helpers: HashMap<String, String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Entry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
}

enum Found {
    Nothing,
    Secret(Secret),
    Helper { name: String, key: String },
}

/// Parses a `config.json`.
///
/// # Errors
/// What is wrong and where; nothing of the text is repeated.
pub fn parse_docker_config(text: &str) -> Result<DockerConfig, String> {
    if text.trim().is_empty() {
        return Ok(DockerConfig::default());
    }
    serde_json::from_str(text).map_err(|error| {
        // The message itself could quote a password.
        format!(
            "line {}, column {}: it is not a docker config.json",
            error.line(),
            error.column()
        )
    })
}

impl DockerConfig {
    fn find(&self, names: &[&str]) -> Found {
        let key = || names.first().copied().unwrap_or_default().to_owned();
        let helper = names
            .iter()
            .find_map(|name| Some((*name, self.cred_helpers.get(*name)?)));
        if let Some((name, helper)) = helper
            && !helper.is_empty()
        {
            return Found::Helper {
                name: helper.clone(),
                key: name.to_owned(),
            };
        }
        let exact = names.iter().find_map(|name| self.auths.get(*name));
        let entry = exact.or_else(|| {
            // A `HashMap` has no order: among several spellings the first in the alphabet is as good as any, and always the same.
            let mut keys: Vec<_> = self.auths.keys().collect();
            keys.sort();
            let key = keys.into_iter().find(|key| names.contains(&hostname(key)))?;
            self.auths.get(key)
        });
        if let Some(secret) = entry.and_then(Entry::secret) {
            return Found::Secret(secret);
        }
        if self.creds_store.is_empty() {
            Found::Nothing
        } else {
            Found::Helper {
                name: self.creds_store.clone(),
                key: key(),
            }
        }
    }
}

impl Entry {
    fn secret(&self) -> Option<Secret> {
        if !self.identitytoken.is_empty() {
            return Some(Secret::IdentityToken(self.identitytoken.clone()));
        }
        let (username, password) = match self.decoded() {
            Some(pair) => pair,
            None => (self.username.clone(), self.password.clone()),
        };
        (!username.is_empty() || !password.is_empty()).then_some(Secret::Password { username, password })
    }

    fn decoded(&self) -> Option<(String, String)> {
        let config = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
        let bytes = GeneralPurpose::new(&STANDARD, config).decode(&self.auth).ok()?;
        let text = String::from_utf8(bytes).ok()?;
        let (username, password) = text.split_once(':')?;
        Some((username.to_owned(), password.trim_end_matches('\0').to_owned()))
    }
}

/// `host:port` of a key of `auths`, which may be an address with scheme and path.
fn hostname(key: &str) -> &str {
    let rest = key
        .strip_prefix("https://")
        .or_else(|| key.strip_prefix("http://"))
        .unwrap_or(key);
    rest.split_once('/').map_or(rest, |(host, _)| host)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;

    use super::*;
    use crate::config::Credential;

    fn password(username: &str, password: &str) -> Secret {
        Secret::Password {
            username: username.to_owned(),
            password: password.to_owned(),
        }
    }

    async fn find(json: &str, host: &str) -> Result<Option<Secret>, RegistryError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), json).unwrap();
        Credentials::new(&RegistryConfig {
            docker_config: Some(file.path().to_owned()),
            ..RegistryConfig::default()
        })
        .find(host)
        .await
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
            credentials.find("r.example:5000").await.unwrap(),
            Some(password("u", "p"))
        );
        assert_eq!(credentials.find("r.example").await.unwrap(), None);
    }

    #[tokio::test]
    async fn entries_of_config_json() {
        // alice:wonder:land, without and with padding
        let json = r#"{"auths": {
            "a.example": {"auth": "YWxpY2U6d29uZGVyOmxhbmQ"},
            "https://b.example:5000/v2/": {"username": "bob", "password": "x"},
            "https://index.docker.io/v1/": {"auth": "YWxpY2U6d29uZGVyOmxhbmQ="},
            "c.example": {"identitytoken": "refresh", "auth": "MDAwOg=="},
            "d.example": {},
            "e.example": {"auth": "!!"}
        }, "HttpHeaders": {"x": "y"}}"#;
        let alice = Some(password("alice", "wonder:land"));
        assert_eq!(find(json, "a.example").await.unwrap(), alice);
        assert_eq!(find(json, "b.example:5000").await.unwrap(), Some(password("bob", "x")));
        assert_eq!(find(json, "registry-1.docker.io").await.unwrap(), alice);
        assert_eq!(
            find(json, "c.example").await.unwrap(),
            Some(Secret::IdentityToken("refresh".to_owned()))
        );
        for host in ["d.example", "e.example", "a.example:1", "example"] {
            assert_eq!(find(json, host).await.unwrap(), None, "{host}");
        }
        assert_eq!(find("", "a.example").await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_broken_file_is_an_error_that_repeats_nothing() {
        let text = find(r#"{"auths": {"a": {"auth": {"s3cret": 1}}}}"#, "a")
            .await
            .unwrap_err()
            .to_string();
        assert!(text.contains("line 1") && !text.contains("s3cret"), "{text}");
        assert!(!format!("{:?}", password("user", "s3cret")).contains("s3cret"));
    }

    #[tokio::test]
    async fn helpers_are_asked() {
        let dir = tempfile::tempdir().unwrap();
        let helper = dir.path().join("docker-credential-lazulitest");
        std::fs::write(
            &helper,
            "#!/bin/sh\nread host\ncase $host in\n good) echo '{\"Username\":\"u\",\"Secret\":\"'$host'\"}';;\n token) echo \
             '{\"Username\":\"<token>\",\"Secret\":\"t\"}';;\n none) echo credentials not found in native keychain; exit 1;;\n \
             slow) exec sleep 60;;\n *) echo boom s3cret; exit 3;;\nesac\n",
        )
        .unwrap();
        std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
        let mut credentials = Credentials::new(&RegistryConfig::default());
        credentials.search_path = Some(format!("{}:/usr/bin:/bin", dir.path().display()).into());
        credentials.helper_timeout = Duration::from_millis(500);
        let ask = async |host: &str| {
            let line = format!("{host}\n");
            credentials
                .ask_helper("lazulitest", &line, Path::new("config.json"))
                .await
        };
        credentials_eq(ask("good").await, Some(password("u", "good")));
        credentials_eq(ask("token").await, Some(Secret::IdentityToken("t".to_owned())));
        credentials_eq(ask("none").await, None);
        let text = ask("bad").await.unwrap_err().to_string();
        assert!(
            text.contains("docker-credential-lazulitest") && !text.contains("s3cret"),
            "{text}"
        );
        let text = ask("slow").await.unwrap_err().to_string();
        assert!(text.contains("did not answer"), "{text}");
        let text = find(r#"{"credHelpers": {"a.example": "lazuli-not-installed"}}"#, "a.example")
            .await
            .unwrap_err()
            .to_string();
        assert!(text.contains("docker-credential-lazuli-not-installed"), "{text}");
        assert!(find(r#"{"credsStore": "../../bin/x"}"#, "a.example").await.is_err());
    }

    fn credentials_eq(found: Result<Option<Secret>, RegistryError>, expected: Option<Secret>) {
        assert_eq!(found.unwrap(), expected);
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "\\PC{0,60}") {
            let _ = parse_docker_config(&text);
        }
    }
}
