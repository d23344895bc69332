//! Where user names and passwords come from: the configuration's table, then docker's `config.json` and its credential helpers.
//!
//! In `config.json`, as docker does: the host's helper (`credHelpers`), its entry in `auths`, the general helper (`credsStore`). A source
//! that is broken is passed over, down to asking for nothing in particular: many images are public, and of those that are not, a refusal
//! tells what was wrong. Every problem is logged when it appears, and can be asked for ([`Credentials::problems`]).
//!
//! Nothing is remembered of secrets: they are looked for whenever a registry wants some, so that a `docker login` counts at once. What
//! `docker` keeps of the file is its last good state, see [`docker`].

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use crate::config::RegistryConfig;
use crate::registry::lock;

mod docker;
mod helper;

pub use docker::{DockerConfig, parse_docker_config};
use docker::{DockerFile, Step};
use helper::Helpers;

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

/// What the sources say about a host.
#[derive(Debug, Default)]
pub struct Lookup {
    /// The credentials, or `None` to ask anonymously.
    pub secret: Option<Secret>,
    /// Where they come from, for people.
    pub from: String,
    /// What is wrong with sources that were passed over. No secrets.
    pub problems: Vec<String>,
}

/// The sources of credentials of a daemon.
pub struct Credentials {
    table: HashMap<String, Secret>,
    file: Option<Arc<DockerFile>>,
    helpers: Helpers,
    /// What is wrong now, by the part of the sources that it concerns.
    problems: Mutex<BTreeMap<String, String>>,
}

/// How `config.json` looked: another value means that it may say something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp(Option<docker::Stamp>);

impl Credentials {
    /// The sources that `config` names. Nothing is read yet.
    pub fn new(config: &RegistryConfig) -> Self {
        let table = config.credentials.iter().map(|(host, credential)| {
            let secret = Secret::Password {
                username: credential.username.clone(),
                password: credential.password.clone(),
            };
            (host.clone(), secret)
        });
        let path = config.docker_config.clone().or_else(default_docker_config);
        Credentials {
            table: table.collect(),
            file: path.map(|path| Arc::new(DockerFile::new(path))),
            helpers: Helpers::default(),
            problems: Mutex::default(),
        }
    }

    /// The credentials for `host` (`host:port`). May run a helper, each at most once.
    pub async fn find(&self, host: &str) -> Lookup {
        let names = aliases(host);
        if let Some(secret) = names.iter().find_map(|name| self.table.get(name)) {
            return Lookup {
                secret: Some(secret.clone()),
                from: "registry.credentials in Lazuli's configuration".to_owned(),
                problems: Vec::new(),
            };
        }
        let Some(file) = self.file.clone() else {
            return Lookup::default();
        };
        let path = file.path().display().to_string();
        let reader = Arc::clone(&file);
        let state = tokio::task::spawn_blocking(move || reader.read())
            .await
            .unwrap_or_default();
        if state.changed {
            // What was wrong with its parts may be so no longer, and the parts may be gone.
            lock(&self.problems).clear();
        }
        let mut lookup = Lookup::default();
        self.note("file", state.problem, &mut lookup);
        for step in state.config.steps(&names) {
            let (part, outcome, from) = match step {
                Step::Secret(host, secret) => (format!("entry {host}"), Ok(Some(secret)), path.clone()),
                Step::Problem(host, problem) => (format!("entry {host}"), Err(problem), String::new()),
                Step::Helper { name, key } => {
                    let program = helper::program(&name);
                    let outcome = self.helpers.ask(&name, &key).await;
                    let outcome = outcome.map_err(|problem| format!("the credential helper {program} {problem}"));
                    (
                        format!("helper {name}"),
                        outcome,
                        format!("the credential helper {program}"),
                    )
                }
            };
            let (secret, problem) = match outcome {
                Ok(secret) => (secret, None),
                Err(problem) => (None, Some(format!("{path}: {problem}"))),
            };
            self.note(&part, problem, &mut lookup);
            if secret.is_some() {
                return Lookup { secret, from, ..lookup };
            }
        }
        lookup
    }

    /// How `config.json` looks now.
    pub async fn stamp(&self) -> Stamp {
        let Some(file) = self.file.clone() else {
            return Stamp(None);
        };
        Stamp(
            tokio::task::spawn_blocking(move || file.stamp())
                .await
                .unwrap_or_default(),
        )
    }

    /// What was wrong with the sources when they were asked last, each with its file, without secrets.
    pub fn problems(&self) -> Vec<String> {
        lock(&self.problems).values().cloned().collect()
    }

    /// Notes what is wrong with a part of the sources now: once in the log for as long as it stays so.
    fn note(&self, part: &str, problem: Option<String>, lookup: &mut Lookup) {
        let mut problems = lock(&self.problems);
        let Some(problem) = problem else {
            problems.remove(part);
            return;
        };
        if problems.get(part) != Some(&problem) {
            tracing::warn!(%problem, "a source of credentials cannot be used; going on without it");
            problems.insert(part.to_owned(), problem.clone());
        }
        lookup.problems.push(problem);
    }
}

/// `$DOCKER_CONFIG/config.json`, or the one of the user that Lazuli runs as: services have no `HOME`, so that the user database tells.
fn default_docker_config() -> Option<PathBuf> {
    match std::env::var_os("DOCKER_CONFIG") {
        Some(dir) if !dir.is_empty() => Some(PathBuf::from(dir).join("config.json")),
        _ => std::env::home_dir().map(|home| home.join(".docker/config.json")),
    }
}

/// The names under which credentials of `host` may be filed.
fn aliases(host: &str) -> Vec<String> {
    let names: &[&str] = match host {
        "docker.io" | "registry-1.docker.io" | "index.docker.io" => {
            &[DOCKER_IO_KEY, "docker.io", "index.docker.io", "registry-1.docker.io"]
        }
        other => &[other],
    };
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[cfg(test)]
mod tests;
