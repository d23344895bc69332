//! docker's `config.json`: what it says about a host, and its last good state.
//!
//! The file is read for page faults of running containers, while people and cron jobs rewrite it. One that cannot be read, or is half
//! written, changes nothing: what it said before stays in use. One that is empty or gone, which it is for a moment when it is written
//! without care, says nothing only when it stays so for [`GONE_FOR`].

use std::collections::HashMap;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::Deserialize;

use super::Secret;
use crate::registry::{json, lock};

/// Largest `config.json`, in bytes.
const MAX_CONFIG: u64 = 4 << 20;
/// How long a file that is empty or gone still means what it said before.
const GONE_FOR: Duration = Duration::from_secs(10);
/// A file that was changed less than this before it was read may change again without looking different.
const SETTLED_AFTER: Duration = Duration::from_secs(2);

/// A `config.json` on disk.
pub(super) struct DockerFile {
    path: PathBuf,
    state: Mutex<State>,
}

/// How a file looked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    modified: SystemTime,
    len: u64,
    inode: u64,
}

#[derive(Default)]
struct State {
    /// The file that `config` or `problem` comes from, if it cannot have changed unseen since.
    read: Option<Stamp>,
    /// The last good state, or nothing.
    config: Arc<DockerConfig>,
    gone_since: Option<Instant>,
    problem: Option<String>,
}

/// What a file says now.
#[derive(Default)]
pub(super) struct Reading {
    pub config: Arc<DockerConfig>,
    /// What is wrong with the file, with its path.
    pub problem: Option<String>,
    /// It says something else than when it was read last, perhaps.
    pub changed: bool,
}

/// Why a file cannot be taken as it is.
enum Unusable {
    /// It is empty, or not there.
    Gone(&'static str),
    /// It cannot be read, or is no `config.json`.
    Broken(String),
}

impl DockerFile {
    pub(super) fn new(path: PathBuf) -> Self {
        DockerFile {
            path,
            state: Mutex::default(),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// How it looks now; `None` if it is not there.
    pub(super) fn stamp(&self) -> Option<Stamp> {
        Stamp::of(&std::fs::metadata(&self.path).ok()?)
    }

    /// What it says. Reads it if it may have changed.
    pub(super) fn read(&self) -> Reading {
        let mut state = lock(&self.state);
        let stamp = self.stamp();
        let known = stamp.is_some() && state.read == stamp;
        if !known {
            self.refresh(&mut state, stamp);
        }
        Reading {
            config: Arc::clone(&state.config),
            problem: state.problem.clone(),
            changed: !known,
        }
    }

    fn refresh(&self, state: &mut State, stamp: Option<Stamp>) {
        let path = self.path.display();
        let was_there = !state.config.is_empty();
        match self.parse() {
            Ok(config) => {
                *state = State {
                    config: Arc::new(config),
                    ..State::default()
                };
            }
            Err(Unusable::Gone(how)) if was_there => {
                let since = *state.gone_since.get_or_insert_with(Instant::now);
                let believed = since.elapsed() >= GONE_FOR;
                if believed {
                    *state = State::default();
                } else {
                    state.problem = Some(format!(
                        "{path}: {how}; what it said before is still used, for a few seconds"
                    ));
                }
                // It has to be looked at again when that time is over.
                state.read = None;
                return;
            }
            Err(Unusable::Gone(_)) => *state = State::default(),
            Err(Unusable::Broken(problem)) => {
                let rest = match was_there {
                    true => "its last good state stays in use",
                    false => "nothing of it is used",
                };
                state.gone_since = None;
                state.problem = Some(format!("{path}: {problem}; {rest}"));
            }
        }
        let settled = |stamp: &Stamp| stamp.modified.elapsed().is_ok_and(|age| age >= SETTLED_AFTER);
        state.read = stamp.filter(settled);
    }

    fn parse(&self) -> Result<DockerConfig, Unusable> {
        let broken = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => Unusable::Gone("it is not there"),
            _ => Unusable::Broken(format!("it cannot be read: {error}")),
        };
        // Opening a pipe would wait for its other end.
        if !std::fs::metadata(&self.path).map_err(broken)?.is_file() {
            return Err(Unusable::Broken("it is no file".to_owned()));
        }
        let mut bytes = Vec::new();
        let file = std::fs::File::open(&self.path).map_err(broken)?;
        file.take(MAX_CONFIG + 1).read_to_end(&mut bytes).map_err(broken)?;
        if bytes.len() as u64 > MAX_CONFIG {
            return Err(Unusable::Broken(format!("it has more than {MAX_CONFIG} bytes")));
        }
        let text = String::from_utf8_lossy(&bytes);
        if text.trim().is_empty() {
            return Err(Unusable::Gone("it is empty"));
        }
        parse_docker_config(&text).map_err(Unusable::Broken)
    }
}

impl Stamp {
    fn of(meta: &std::fs::Metadata) -> Option<Self> {
        Some(Stamp {
            modified: meta.modified().ok()?,
            len: meta.len(),
            inode: meta.ino(),
        })
    }
}

/// The parts of `config.json` that matter here.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct DockerConfig {
    auths: HashMap<String, json::Loose<Entry>>,
    #[serde(deserialize_with = "json::loose")]
    creds_store: String,
    #[serde(deserialize_with = "json::texts")]
    cred_helpers: std::collections::BTreeMap<String, String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Entry {
    #[serde(deserialize_with = "json::loose")]
    auth: String,
    #[serde(deserialize_with = "json::loose")]
    username: String,
    #[serde(deserialize_with = "json::loose")]
    password: String,
    #[serde(deserialize_with = "json::loose")]
    identitytoken: String,
}

/// A source of credentials for a host, in the order in which they are asked.
pub(super) enum Step {
    /// An entry, under this key, has them.
    Secret(String, Secret),
    /// An entry, under this key, cannot be used.
    Problem(String, String),
    /// A helper may have them.
    Helper {
        /// Its name, without the prefix of its program.
        name: String,
        /// What to ask it for.
        key: String,
    },
}

/// Parses a `config.json`.
///
/// # Errors
/// What is wrong and where; nothing of the text is repeated.
pub fn parse_docker_config(text: &str) -> Result<DockerConfig, String> {
    if text.trim().is_empty() {
        return Ok(DockerConfig::default());
    }
    json::from_start(text.as_bytes()).map_err(|error| match error.line() {
        // The message itself could quote a password.
        0 => "it is not a docker config.json".to_owned(),
        line => format!("line {line}, column {}: it is not a docker config.json", error.column()),
    })
}

impl DockerConfig {
    fn is_empty(&self) -> bool {
        self.auths.is_empty() && self.creds_store.is_empty() && self.cred_helpers.is_empty()
    }

    /// The sources for a host that may be filed under these names.
    pub(super) fn steps(&self, names: &[String]) -> Vec<Step> {
        let mut steps = Vec::new();
        let general = Some(&self.creds_store).filter(|name| !name.is_empty());
        if let Some((key, helper)) = found(names, self.cred_helpers.iter())
            && !helper.is_empty()
        {
            steps.push(Step::Helper {
                name: helper.clone(),
                key: key.clone(),
            });
        }
        if let Some((key, entry)) = found(names, self.auths.iter()) {
            match entry
                .0
                .as_ref()
                .map_err(|_| "has another form than docker's")
                .and_then(Entry::secret)
            {
                Ok(secret) => steps.push(Step::Secret(key.clone(), secret)),
                // With a helper, docker leaves entries empty.
                Err(_) if general.is_some() || !steps.is_empty() => {}
                Err(problem) => steps.push(Step::Problem(key.clone(), format!("the entry for {key} {problem}"))),
            }
        }
        if let Some(helper) = general {
            let key = names.first().cloned().unwrap_or_default();
            steps.push(Step::Helper {
                name: helper.clone(),
                key,
            });
        }
        steps
    }
}

/// The entry of one of these names: first as it is, then as an address with scheme and path. A `HashMap` has no order: among several
/// spellings the first in the alphabet is as good as any, and always the same.
fn found<'a, V>(
    names: &[String],
    entries: impl Iterator<Item = (&'a String, &'a V)> + Clone,
) -> Option<(&'a String, &'a V)> {
    let exact = names
        .iter()
        .find_map(|name| entries.clone().find(|(key, _)| *key == name));
    exact.or_else(|| {
        entries
            .filter(|(key, _)| names.iter().any(|name| name == hostname(key)))
            .min_by_key(|(key, _)| *key)
    })
}

impl Entry {
    fn secret(&self) -> Result<Secret, &'static str> {
        if !self.identitytoken.is_empty() {
            return Ok(Secret::IdentityToken(self.identitytoken.clone()));
        }
        let plain = (self.username.clone(), self.password.clone());
        let (username, password) = match self.auth.is_empty() {
            true => plain,
            false => match self.decoded() {
                Some(pair) => pair,
                None if !plain.1.is_empty() => plain,
                None => return Err("has an `auth` that is no user name and password in base64; log in again"),
            },
        };
        match username.is_empty() && password.is_empty() {
            true => Err("holds no credentials; log in again"),
            false => Ok(Secret::Password { username, password }),
        }
    }

    fn decoded(&self) -> Option<(String, String)> {
        let config = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
        // `base64` breaks lines, and people paste them.
        let text: String = self.auth.chars().filter(|c| !c.is_ascii_whitespace()).collect();
        let bytes = GeneralPurpose::new(&STANDARD, config).decode(text).ok()?;
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
impl DockerFile {
    /// Lets the time in which a file that is gone still counts be over.
    pub(super) fn outlive_gone(&self) {
        if let Some(since) = &mut lock(&self.state).gone_since {
            *since -= GONE_FOR;
        }
    }
}
