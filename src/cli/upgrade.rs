//! `lazuli upgrade`: asks the daemon's supervisor to go on with another program, after a look at whether that runs at all.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, bail};

use super::UpgradeArgs;
use super::failure::NoSupervisor;
use super::output::print;
use crate::daemon::upgrade;

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

/// Sees whether the program runs on this machine and says that it is Lazuli.
fn try_out(program: &Path) -> anyhow::Result<()> {
    let answer = Command::new(program)
        .arg("--version")
        .output()
        .with_context(|| format!("{} does not run here; nothing was changed", program.display()))?;
    if !answer.status.success() || !answer.stdout.starts_with(b"lazuli ") {
        bail!("{} is not Lazuli; nothing was changed", program.display());
    }
    Ok(())
}
