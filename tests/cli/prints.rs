//! Nobody reads the output, or the disk behind it is full: no command panics.

use std::fs::File;
use std::process::Stdio;

use crate::rig::{Rig, end_of};

/// Commands that print something.
const COMMANDS: [&str; 17] = [
    "--help",
    "--version",
    "help",
    "help index build",
    "serve --help",
    "pull --help",
    "mount --help",
    "status --help",
    "check-config --help",
    "index --help",
    "index export --help",
    "check-config",
    "index inspect DIR/index",
    "index build REF -o DIR/out",
    "index ls REF",
    "index --json ls REF",
    "index export REF --soci v1 --min-layer-size 0 -o DIR/layout",
];

fn rig() -> Rig {
    let rig = Rig::new();
    rig.run("index build REF -o DIR/out").expect_success();
    for file in crate::rig::tree(&rig.path("out")).into_keys() {
        std::fs::rename(file, rig.path("index")).unwrap();
    }
    rig
}

/// The command; for those that clap answers, without a configuration.
fn command(rig: &Rig, line: &str) -> std::process::Command {
    match line.starts_with("--") || line.starts_with("help") {
        true => {
            let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_lazuli"));
            command.args(line.split_whitespace());
            command
        }
        false => rig.command(line),
    }
}

#[test]
fn a_closed_pipe_ends_every_command_quietly() {
    let rig = rig();
    for line in COMMANDS {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let child = command(&rig, line)
            .stdout(writer)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        assert_eq!(end_of(child), (141, String::new()), "{line}");
    }
}

#[test]
fn a_full_disk_is_a_failure_with_a_message() {
    let rig = rig();
    for line in COMMANDS {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let child = command(&rig, line).stdout(full).stderr(Stdio::piped()).spawn().unwrap();
        let (code, said) = end_of(child);
        assert_eq!(code, 1, "{line}: {said}");
        assert!(
            said.contains("standard output") && said.contains("No space left"),
            "{line}: {said}"
        );
        assert!(!said.contains("panicked"), "{line}: {said}");
    }
}

#[test]
fn messages_that_cannot_be_told_change_no_exit_code() {
    let rig = rig();
    for (line, expected) in [
        ("--frobnicate", 2),
        ("index ls", 2),
        ("status", 3),
        ("index push REF --from DIR/out", 1),
    ] {
        for closed in [false, true] {
            let (reader, writer) = std::io::pipe().unwrap();
            drop(reader);
            let mut command = command(&rig, line);
            match closed {
                true => command.stderr(writer),
                false => command.stderr(File::options().write(true).open("/dev/full").unwrap()),
            };
            let child = command.stdout(Stdio::null()).spawn().unwrap();
            assert_eq!(end_of(child).0, expected, "{line}, closed: {closed}");
        }
    }
}
