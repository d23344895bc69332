//! Standard output and standard error: the only place of the program that writes to them.
//!
//! `print!` and `eprintln!` panic when nobody reads or the disk is full. Here a closed pipe ends the command quietly, as SIGPIPE would (but
//! with everything tidied up), a full disk is a failure with a message, and a message that nobody can be told is let go. Clippy denies the
//! macros in the whole crate, so that it stays so.

use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::Context as _;

use super::failure::{ClosedPipe, USAGE, WorkerEnded, exit_code, text};

/// Writes text that ends with a newline to standard output, at once.
///
/// # Errors
/// [`ClosedPipe`] if nobody reads it any more; else why it cannot be written.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    written(out.write_all(text.as_bytes()).and_then(|()| out.flush()))
}

/// Writes a message to standard error.
pub(super) fn tell(message: &str) {
    // Where messages cannot be written, there is nobody to be told so; the exit code remains.
    let _ = writeln!(io::stderr(), "lazuli: {message}");
}

/// Ends a command: tells what went wrong, and gives the exit code.
pub(super) fn end(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if !error.is::<ClosedPipe>() && !error.is::<WorkerEnded>() {
                tell(&text(&error));
            }
            ExitCode::from(exit_code(&error))
        }
    }
}

/// Ends a command line that clap answers by itself: with help, the version, or what is wrong with it.
pub(super) fn end_of_parsing(answer: &clap::Error) -> ExitCode {
    let printed = answer.print();
    if answer.use_stderr() {
        return ExitCode::from(USAGE);
    }
    match written(printed.and_then(|()| io::stdout().flush())) {
        Ok(()) => ExitCode::SUCCESS,
        error => end(error),
    }
}

fn written(result: io::Result<()>) -> anyhow::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(ClosedPipe.into()),
        result => result.context("standard output cannot be written"),
    }
}
