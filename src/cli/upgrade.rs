//! `lazuli upgrade`: asks the daemon's supervisor to go on with another program, after a look at whether that runs at all.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;

use super::UpgradeArgs;
use super::failure::NoSupervisor;
use super::output::print;
use super::work::Worker;
use crate::daemon::upgrade;

/// How long a program may take to say its version: it may come from a slow disk, but it does nothing else.
const TRY_WAIT: Duration = Duration::from_secs(10);
/// Longest version that is listened to, in bytes.
const VERSION_MAX: u64 = 4096;

pub(super) fn run(args: &UpgradeArgs) -> anyhow::Result<()> {
    let config = args.config.load()?;
    let root = args.root.as_ref().unwrap_or(&config.root);
    let program = match &args.binary {
        Some(binary) => binary
            .canonicalize()
            .with_context(|| format!("{} cannot be used", binary.display()))?,
        None => std::env::current_exe().context("it cannot be told which program this is; name one with --binary")?,
    };
    try_out(&program)?;
    let answer = upgrade(root, &program).map_err(|source| NoSupervisor {
        root: root.clone(),
        source,
    })?;
    match answer {
        Ok(text) => print(&format!("{}: {text}\n", program.display())),
        Err(reason) => bail!(reason),
    }
}

/// Sees whether the program runs on this machine and says that it is Lazuli. What runs meanwhile knows nothing of it.
fn try_out(program: &Path) -> anyhow::Result<()> {
    let shown = program.display();
    let within = Worker::client()?.run(async { Ok(tokio::time::timeout(TRY_WAIT, version(program)).await) })?;
    let version = match within {
        Ok(version) => version.with_context(|| format!("{shown} does not run here; nothing was changed"))?,
        Err(_) => bail!(
            "{shown} did not say its version within {} s; nothing was changed",
            TRY_WAIT.as_secs()
        ),
    };
    if !version.is_some_and(|text| text.starts_with(b"lazuli ")) {
        bail!("{shown} is not Lazuli; nothing was changed");
    }
    Ok(())
}

/// How a program's answer to `--version` begins; `None` if it fails. Dropped, it kills the program.
async fn version(program: &Path) -> std::io::Result<Option<Vec<u8>>> {
    let mut child = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let mut text = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        // What has more to say is not Lazuli, and finds nobody who listens.
        stdout.take(VERSION_MAX).read_to_end(&mut text).await?;
    }
    Ok(child.wait().await?.success().then_some(text))
}
