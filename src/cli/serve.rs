//! `lazuli serve`: the supervisor, and its workers, which are this program with the same arguments and one more.

use std::ffi::OsString;

use super::ServeArgs;
use super::failure::WorkerEnded;
use crate::daemon::{self, RESUME_OPTION, Supervision};

pub(super) fn run(args: ServeArgs) -> anyhow::Result<()> {
    let mut config = args.config.load()?;
    config.root = args.root.unwrap_or(config.root);
    config.address = args.address.unwrap_or(config.address);
    config.containerd_address = args.containerd_address.unwrap_or(config.containerd_address);
    config.log.level = args.log_level.unwrap_or(config.log.level);
    config.check()?;
    if let Some(link) = args.worker {
        return Ok(daemon::work(config, link)?);
    }
    daemon::init_logs(&config.log);
    let code = daemon::supervise(Supervision {
        args: own_arguments(std::env::args_os()),
        drain: args.drain,
        root: config.root,
        resume: args.resume,
    })?;
    match code {
        0 => Ok(()),
        // It has said why.
        code => Err(WorkerEnded(code).into()),
    }
}

/// The arguments of this program, without its name and what the program before it has added.
fn own_arguments(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    args.skip(1).take_while(|argument| argument != RESUME_OPTION).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_get_what_the_user_said() {
        let args = |words: &[&str]| own_arguments(words.iter().map(OsString::from));
        let own = ["serve", "--config", "x"].map(OsString::from);
        assert_eq!(args(&["lazuli", "serve", "--config", "x"]), own);
        assert_eq!(
            args(&["/new", "serve", "--config", "x", RESUME_OPTION, "worker=1"]),
            own
        );
    }
}
