//! nginx in front of a registry, and the certificates that people make for such things with `openssl`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::sandbox::{PATIENCE, Process, Sandbox, free_port, listens_tcp, require_program, run_ok};

/// An nginx of this test alone. It ends when dropped.
pub struct Nginx {
    _process: Process,
}

impl Nginx {
    /// Starts it with these `server` blocks, and waits until it listens at `addresses`. Its access log is `NAME.access` in the sandbox.
    pub fn start(sandbox: &Sandbox, name: &str, servers: &str, addresses: &[SocketAddr]) -> Self {
        let dir = sandbox.dir(name);
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {}/{kind};\n", dir.display()))
            .concat();
        let text = format!(
            "user root;\nworker_processes 1;\ndaemon off;\npid {dir}/pid;\nerror_log stderr;\nevents {{}}\n\
             http {{\naccess_log {log};\n{temporary}proxy_buffering off;\nproxy_http_version 1.1;\n{servers}}}\n",
            dir = dir.display(),
            log = sandbox.path(format!("{name}.access")).display(),
        );
        let config = dir.join("nginx.conf");
        std::fs::write(&config, text).unwrap();
        let mut command = Command::new(require_program("nginx"));
        command.arg("-c").arg(&config).arg("-p").arg(&dir);
        let mut process = sandbox.spawn(name, &mut command);
        for address in addresses {
            process.wait_ready("its ports", PATIENCE, |_| listens_tcp(*address));
        }
        Nginx { _process: process }
    }
}

/// A free address of this machine.
pub fn free_address() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], free_port()))
}

/// A certificate and its key.
pub struct Certificate {
    /// PEM.
    pub certificate: PathBuf,
    /// PEM, PKCS #8.
    pub key: PathBuf,
}

impl Certificate {
    /// What `openssl req -x509` makes for 127.0.0.1: signed by itself, and a CA by its own word. `key` is an argument of `-newkey` and
    /// what follows it.
    pub fn signed_by_itself(dir: &Path, name: &str, key: &[&str]) -> Self {
        let made = Certificate {
            certificate: dir.join(format!("{name}.crt")),
            key: dir.join(format!("{name}.key")),
        };
        let mut command = Command::new(require_program("openssl"));
        command.args(["req", "-x509", "-nodes", "-days", "2", "-subj", &format!("/CN={name}")]);
        command
            .args(["-addext", "subjectAltName=IP:127.0.0.1", "-newkey"])
            .args(key);
        command.arg("-keyout").arg(&made.key).arg("-out").arg(&made.certificate);
        run_ok(&mut command);
        made
    }
}
