//! The `lazuli` command: parse, run, and turn an error into one readable message and an exit code.

#![deny(unsafe_code, clippy::print_stdout, clippy::print_stderr)]

use std::process::ExitCode;

fn main() -> ExitCode {
    lazuli::cli::main()
}
