//! Why a command ends without having done its work: as one message, and as an exit code.

use crate::catalog::containerd::ContainerdError;
use crate::catalog::shared::trust::IndexError;
use crate::config::ConfigError;
use crate::daemon::{DaemonError, StopSignal};
use crate::registry::{RegistryError, causes};

use super::status::NoDaemon;

/// Exit code of a failure.
pub(super) const FAILED: u8 = 1;
/// Exit code of a mistake in the command line (as clap's own) or the configuration.
pub(super) const USAGE: u8 = 2;
/// Exit code when a needed service cannot be reached.
pub(super) const UNREACHABLE: u8 = 3;
/// What shells add to the number of a signal that has ended a program.
pub(super) const SIGNALLED: u8 = 128;

/// The command line asks for what cannot be, which clap alone cannot see.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Usage(pub(super) String);

/// A signal has ended the command before its work was done. What it had begun is taken away again.
#[derive(Debug, thiserror::Error)]
#[error("ended by {}; what was begun is removed", .0.name)]
pub(super) struct Interrupted(pub(super) StopSignal);

/// A signal has ended the command before its work was done; asked for again, it goes on.
#[derive(Debug, thiserror::Error)]
#[error("ended by {}; what was written stays, and the next time goes on from there", .0.name)]
pub(super) struct Paused(pub(super) StopSignal);

/// Images could not be completed; why was told.
#[derive(Debug, thiserror::Error)]
#[error("not complete: {}", .0.join(", "))]
pub(super) struct Incomplete(pub(super) Vec<String>);

/// Nobody reads standard output any more. That is no mistake, and nobody wants to be told.
#[derive(Debug, thiserror::Error)]
#[error("nobody reads standard output any more")]
pub(super) struct ClosedPipe;

/// The daemon's worker has ended with this code, after it has told why.
#[derive(Debug, thiserror::Error)]
#[error("the daemon has ended with code {0}")]
pub(super) struct WorkerEnded(pub(super) u8);

/// No supervisor can be asked.
#[derive(Debug, thiserror::Error)]
#[error("no daemon can be reached that works in {}: {source}; does `lazuli serve` run, and serve?", root.display())]
pub(super) struct NoSupervisor {
    /// Its root directory.
    pub(super) root: std::path::PathBuf,
    /// The cause.
    pub(super) source: std::io::Error,
}

/// The whole message: what failed, and its causes, none of them twice.
pub(super) fn text(error: &anyhow::Error) -> String {
    causes(error.as_ref())
}

pub(super) fn exit_code(error: &anyhow::Error) -> u8 {
    error.chain().find_map(code_of).unwrap_or(FAILED)
}

fn code_of(cause: &(dyn std::error::Error + 'static)) -> Option<u8> {
    if cause.is::<ConfigError>() || cause.is::<Usage>() {
        return Some(USAGE);
    }
    if cause.is::<ClosedPipe>() {
        return Some(SIGNALLED + libc::SIGPIPE as u8);
    }
    if let Some(Interrupted(signal)) = cause.downcast_ref() {
        return Some(SIGNALLED + signal.number);
    }
    if let Some(Paused(signal)) = cause.downcast_ref() {
        return Some(SIGNALLED + signal.number);
    }
    if let Some(WorkerEnded(code)) = cause.downcast_ref() {
        return Some(*code);
    }
    if cause.is::<NoDaemon>()
        || cause.is::<NoSupervisor>()
        || matches!(cause.downcast_ref(), Some(ContainerdError::Unreachable { .. }))
    {
        return Some(UNREACHABLE);
    }
    match cause.downcast_ref() {
        Some(RegistryError::Unreachable { .. }) => return Some(UNREACHABLE),
        Some(RegistryError::InvalidReference { .. }) => return Some(USAGE),
        _ => {}
    }
    // Keys are files, which may be missing or damaged; everything else stands in the configuration itself.
    let index = match cause.downcast_ref() {
        Some(DaemonError::Index(error)) => Some(error),
        _ => cause.downcast_ref(),
    };
    match index {
        Some(IndexError::Repository { .. } | IndexError::Soci { .. }) => Some(USAGE),
        Some(IndexError::Key { .. }) | None => None,
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    #[test]
    fn exit_codes_tell_the_kind_of_failure() {
        let code = |error: anyhow::Error| exit_code(&error);
        let config = Config::parse("nonsense = 1", Path::new("x")).unwrap_err();
        assert_eq!(code(config.into()), USAGE);
        let gone = ContainerdError::Unreachable {
            address: "/x".into(),
            what: "no such file".into(),
        };
        assert_eq!(code(anyhow::Error::from(gone).context("pulling")), UNREACHABLE);
        assert_eq!(code(anyhow::anyhow!("other")), FAILED);
        assert_eq!(code(anyhow::Error::from(Usage("no".into())).context("more")), USAGE);
        assert_eq!(code(ClosedPipe.into()), 141);
        let terminated = StopSignal {
            name: "SIGTERM",
            number: 15,
        };
        assert_eq!(code(Interrupted(terminated).into()), 143);
        let repository = IndexError::Repository {
            name: "x".into(),
            problem: "y".into(),
        };
        assert_eq!(code(DaemonError::Index(repository).into()), USAGE);
    }

    #[test]
    fn no_cause_is_told_twice() {
        let error = ConfigError::Read {
            path: "/x".into(),
            source: io::Error::from_raw_os_error(libc::ENOENT),
        };
        let error = anyhow::Error::from(error).context("starting");
        let text = text(&error);
        assert_eq!(
            text,
            "starting: cannot read the configuration /x: No such file or directory (os error 2)"
        );
    }
}
