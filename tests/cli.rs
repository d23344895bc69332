//! The command line as a person meets it: help, mistakes, exit codes.
//!
//! ```text
//! rig      a registry that fails on demand, a place for files, and commands that work there
//! usage    what is wrong with a command line is exit code 2, and found before anything is done
//! outputs  what is written is there as a whole or not at all, and places are looked at first
//! prints   nobody reads, the disk is full
//! ends     every command ended in its middle
//! ```

use std::path::Path;

use assert_cmd::Command;

mod support;

#[path = "cli/ends.rs"]
mod ends;
#[path = "cli/outputs.rs"]
mod outputs;
#[path = "cli/prints.rs"]
mod prints;
#[path = "cli/rig.rs"]
mod rig;
#[path = "cli/usage.rs"]
mod usage;

fn lazuli(args: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_lazuli"))
        .args(args)
        .env_remove("CONTAINERD_NAMESPACE")
        .timeout(std::time::Duration::from_secs(60))
        .output()
        .expect("lazuli runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.code().unwrap_or(-1),
        text(&output.stdout),
        text(&output.stderr),
    )
}

fn config(dir: &Path, text: &str) -> String {
    let path = dir.join("config.toml");
    std::fs::write(&path, text).expect("the temporary directory can be written");
    path.display().to_string()
}

#[test]
fn help_names_every_command() {
    let (code, out, _) = lazuli(&["--help"]);
    assert_eq!(code, 0);
    for command in ["serve", "upgrade", "pull", "mount", "status", "index", "check-config"] {
        assert!(out.contains(command), "{out}");
        let (code, out, _) = lazuli(&[command, "--help"]);
        assert_eq!(code, 0, "{command}");
        assert!(out.contains("--config"), "{command}: {out}");
    }
}

#[test]
fn index_commands_are_explained() {
    let (code, out, _) = lazuli(&["index", "--help"]);
    assert_eq!(code, 0);
    for command in ["build", "push", "pull", "ls", "rm", "inspect"] {
        assert!(out.contains(command), "{out}");
    }
    let (code, _, err) = lazuli(&["index", "ls"]);
    assert_eq!(code, 2);
    assert!(err.contains("--repository"), "{err}");
    let (code, _, err) = lazuli(&["index", "ls", "--repository", "r.example/a:tag"]);
    assert_eq!(code, 2);
    assert!(err.contains("neither tag nor digest"), "{err}");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    let name = file.display().to_string();
    let (code, _, err) = lazuli(&["index", "inspect", &name]);
    assert!(code == 1 && err.contains("no such file"), "{err}");
    std::fs::write(&file, "no index").unwrap();
    let (code, _, err) = lazuli(&["index", "inspect", &name]);
    assert!(
        code == 1 && err.contains(&name) && err.contains("portable index"),
        "{err}"
    );
    let path = config(dir.path(), &format!("[index]\npublic_keys = [{name:?}]\n"));
    let (code, _, err) = lazuli(&["index", "--config", &path, "ls", "r.example/a:1"]);
    assert!(code == 1 && err.contains("BEGIN PUBLIC KEY"), "{err}");
}

#[test]
fn check_config_prints_what_results() {
    let dir = tempfile::tempdir().unwrap();
    let path = config(dir.path(), "root = \"/srv/lazuli\"\n[cache]\nmax_size = \"1GiB\"\n");
    let (code, out, err) = lazuli(&["check-config", "--config", &path]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(
        out.contains("root = \"/srv/lazuli\"") && out.contains("max_size = 1073741824"),
        "{out}"
    );
}

#[test]
fn a_wrong_configuration_is_exit_code_2() {
    let dir = tempfile::tempdir().unwrap();
    let path = config(dir.path(), "[cache]\nmax_sise = 1\n");
    for command in [
        vec!["check-config"],
        vec!["status"],
        vec!["serve"],
        vec!["pull", "r.example/a:1"],
    ] {
        let mut args = command.clone();
        args.extend(["--config", &path]);
        let (code, _, err) = lazuli(&args);
        assert_eq!(code, 2, "{command:?}: {err}");
        assert!(err.contains("max_sise") && err.contains(&path), "{command:?}: {err}");
    }
    let (code, _, err) = lazuli(&["check-config", "--config", "/nonexistent/config.toml"]);
    assert_eq!(code, 2, "{err}");
    assert!(err.contains("/nonexistent/config.toml"), "{err}");
    assert_eq!(err.matches("os error 2").count(), 1, "its cause is told twice: {err}");
    let (code, _, _) = lazuli(&["frobnicate"]);
    assert_eq!(code, 2);
}

#[test]
fn a_daemon_that_is_not_there_is_exit_code_3() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("none.sock").display().to_string();
    let (code, _, err) = lazuli(&["status", "--address", &socket]);
    assert_eq!(code, 3, "{err}");
    assert!(err.contains(&socket) && err.contains("lazuli serve"), "{err}");
    assert!(err.contains("no such socket") && !err.contains("containerd"), "{err}");
    // A socket that a dead daemon has left.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let (code, _, err) = lazuli(&["status", "--address", &socket]);
    assert!(code == 3 && err.contains("nobody listens there"), "{code} {err}");
}

#[test]
fn a_wrong_reference_is_named() {
    let (code, _, err) = lazuli(&["pull", "Not A Reference"]);
    assert_eq!(code, 2, "{err}");
    assert!(err.contains("Not A Reference"), "{err}");
}

#[test]
fn mount_says_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let (code, _, err) = lazuli(&["mount", "oci:/nonexistent", "/nonexistent/mountpoint"]);
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("/nonexistent/mountpoint"), "{err}");
    let mountpoint = dir.path().display().to_string();
    let (code, _, err) = lazuli(&["mount", "oci:/nonexistent/layout", &mountpoint]);
    assert_ne!(code, 0, "{err}");
    assert!(err.contains("/nonexistent/layout"), "{err}");
}

/// Neither what says nothing nor what never stops to talk is waited for, and nothing of it stays.
#[test]
fn upgrade_does_not_wait_for_a_program_that_is_not_lazuli() {
    let dir = tempfile::tempdir().unwrap();
    let program = |name: &str, script: &str| {
        use std::os::unix::fs::PermissionsExt as _;
        let path = dir.path().join(name);
        std::fs::write(&path, format!("#!/bin/sh\necho $$ >{}.pid\n{script}\n", path.display())).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path.display().to_string()
    };
    let root = dir.path().display().to_string();
    for (name, script, word) in [
        ("silent", "exec sleep 1000", "did not say its version"),
        ("endless", "exec yes 'lazuli 9.9.9'", "is not Lazuli"),
    ] {
        let binary = program(name, script);
        let (code, _, err) = lazuli(&["upgrade", "--root", &root, "--binary", &binary]);
        assert_eq!(code, 1, "{err}");
        assert!(err.contains(word) && err.contains("nothing was changed"), "{err}");
        let pid = std::fs::read_to_string(format!("{binary}.pid")).unwrap();
        let command = std::fs::read(format!("/proc/{}/cmdline", pid.trim())).unwrap_or_default();
        assert!(command.is_empty(), "{name} still runs");
    }
}
