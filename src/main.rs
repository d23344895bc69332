//! The `lazuli` command: parse, run, and turn an error into one readable message and an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    lazuli::cli::main()
}
