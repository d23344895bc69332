//! docker's credential helpers: programs `docker-credential-<name>` that are asked for one host and answer on their output.
//!
//! Nothing that a helper prints is repeated anywhere: it may be a secret. One that hangs is not asked again for a while, so that readers
//! wait for it once and not with every token.

use std::collections::HashMap;
use std::ffi::OsString;
use std::process::Stdio;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::Secret;
use crate::registry::{json, lock};

/// Longest run of a credential helper: it may ask a cloud's metadata service, never a person.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How long a helper that did not answer in time is passed over.
const HUNG_FOR: Duration = Duration::from_secs(60);
/// Most bytes read of a helper's answer.
const MAX_OUTPUT: u64 = 1 << 20;
/// What a helper answers as the user name of an identity token.
const TOKEN_USER: &str = "<token>";

/// The helpers of a daemon.
pub(super) struct Helpers {
    pub(super) timeout: Duration,
    /// Where they are searched for, if not in this process' own PATH.
    pub(super) search_path: Option<OsString>,
    /// Those that hung, and when.
    pub(super) hung: Mutex<HashMap<String, Instant>>,
}

impl Default for Helpers {
    fn default() -> Self {
        Helpers {
            timeout: TIMEOUT,
            search_path: None,
            hung: Mutex::default(),
        }
    }
}

/// The program of a helper.
pub(super) fn program(name: &str) -> String {
    format!("docker-credential-{name}")
}

impl Helpers {
    /// Asks the helper `name` about `key`. `None`: it knows nothing.
    ///
    /// # Errors
    /// What went wrong, to be read after its name.
    pub(super) async fn ask(&self, name: &str, key: &str) -> Result<Option<Secret>, String> {
        // It becomes the name of a program.
        if name.contains('/') {
            return Err("is not the name of a program".to_owned());
        }
        let late = || format!("did not answer within {} s", self.timeout.as_secs());
        if lock(&self.hung).get(name).is_some_and(|at| at.elapsed() < HUNG_FOR) {
            return Err(late());
        }
        let (status, output) = match tokio::time::timeout(self.timeout, self.run(name, key)).await {
            Ok(ended) => {
                lock(&self.hung).remove(name);
                ended.map_err(|error| format!("cannot be run: {error}"))?
            }
            Err(_) => {
                lock(&self.hung).insert(name.to_owned(), Instant::now());
                return Err(late());
            }
        };
        if !status.success() {
            let output = String::from_utf8_lossy(&output).to_ascii_lowercase();
            if output.contains("credentials not found") {
                return Ok(None);
            }
            return Err(format!("failed ({status}); run it by hand to see why"));
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Answer {
            #[serde(default)]
            username: String,
            #[serde(default)]
            secret: String,
        }
        let answer: Answer = json::from_start(&output).map_err(|_| "gave an answer that is not valid".to_owned())?;
        Ok(match answer.username.as_str() {
            _ if answer.secret.is_empty() => None,
            // An empty name means the same to containerd.
            TOKEN_USER | "" => Some(Secret::IdentityToken(answer.secret)),
            _ => Some(Secret::Password {
                username: answer.username,
                password: answer.secret,
            }),
        })
    }

    async fn run(&self, name: &str, key: &str) -> std::io::Result<(std::process::ExitStatus, Vec<u8>)> {
        let mut command = tokio::process::Command::new(program(name));
        if let Some(search_path) = &self.search_path {
            command.env("PATH", search_path);
        }
        // A service has none, and helpers look for their own files there.
        if std::env::var_os("HOME").is_none()
            && let Some(home) = std::env::home_dir()
        {
            command.env("HOME", home);
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
            stdout.take(MAX_OUTPUT).read_to_end(&mut output).await?;
        }
        Ok((child.wait().await?, output))
    }
}
