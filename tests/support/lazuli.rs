//! The program under test: its daemon with a configuration of its own, and its commands.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::sandbox::{
    COMMAND_TIMEOUT, Finished, PATIENCE, Process, Sandbox, listens_unix, run, unmount_below, wait_until,
};

/// The name under which containerd knows it.
pub const SNAPSHOTTER: &str = "lazuli";

/// Where the daemon listens; known before it is started, because containerd's configuration names it.
pub fn address_in(sandbox: &Sandbox) -> PathBuf {
    sandbox.path("lazuli.sock")
}

/// The `lazuli` program: `LAZULI_BIN`, or what cargo built for this test.
pub fn program() -> PathBuf {
    std::env::var_os("LAZULI_BIN")
        .map(PathBuf::from)
        .or_else(|| option_env!("CARGO_BIN_EXE_lazuli").map(PathBuf::from))
        .expect("LAZULI_BIN names the program, where cargo does not build it for a test")
}

/// The table that forces a face, for configuration files; without `LAZULI_E2E_FACE` the daemon chooses.
pub fn face_config() -> String {
    std::env::var("LAZULI_E2E_FACE").map_or_else(|_| String::new(), |face| format!("[fuse]\nface = {face:?}\n"))
}

/// A running daemon.
pub struct Lazuli {
    sandbox: Sandbox,
    process: Option<Process>,
    env: Vec<(String, OsString)>,
}

impl Lazuli {
    /// Starts the daemon for the containerd at `containerd`. Bare hosts in content labels are looked up as `hosts` (`127.0.0.1:5000`).
    /// `more` is added to the configuration file: whole tables, or keys of `[registry]` first.
    pub fn start(sandbox: &Sandbox, containerd: &Path, hosts: &[String], more: &str) -> Self {
        let mut lazuli = Lazuli {
            sandbox: sandbox.clone(),
            process: None,
            env: Vec::new(),
        };
        // What is fetched is what a test asks for, unless it wants it otherwise.
        let more = match () {
            () if more.contains("fill =") => more.to_owned(),
            () if more.contains("[fetch]\n") => more.replace("[fetch]\n", "[fetch]\nfill = \"off\"\n"),
            () => format!("{more}\n[fetch]\nfill = \"off\"\n"),
        };
        let text = format!(
            "root = {root:?}\naddress = {address:?}\ncontainerd_address = {containerd:?}\nadmin_address = \"\"\n\
             {log}\
             [registry]\nconfig_path = [{certs:?}]\nhosts = {{ \"127.0.0.1\" = {hosts:?} }}\n{more}\n{face}{cache}",
            // How full the machine's disk is must not decide what a test finds in the cache.
            cache = if more.contains("[cache]") {
                ""
            } else {
                "[cache]\nhigh_percent = 100\n"
            },
            // Of a test of half an hour it would be too much.
            log = if more.contains("[log]") {
                ""
            } else {
                "[log]\nlevel = \"info,lazuli=debug\"\n"
            },
            face = face_config(),
            root = sandbox.dir("lazuli"),
            address = address_in(sandbox),
            certs = sandbox.dir("certs.d"),
        );
        std::fs::write(lazuli.config(), text).unwrap();
        lazuli.restart();
        lazuli
    }

    /// Its configuration file.
    pub fn config(&self) -> PathBuf {
        self.sandbox.path("lazuli.toml")
    }

    /// Its root directory.
    pub fn root(&self) -> PathBuf {
        self.sandbox.path("lazuli")
    }

    /// Sets a variable of the daemon's environment from its next start on.
    pub fn set_env(&mut self, name: &str, value: impl Into<OsString>) {
        self.env.push((name.to_owned(), value.into()));
    }

    /// Starts the daemon again with the same configuration, and waits until it listens.
    pub fn restart(&mut self) {
        self.process = None;
        let address = address_in(&self.sandbox);
        // A worker whose supervisor was killed dies a moment later; until its descriptors are closed, which is the last that happens, its socket
        // still listens.
        let last = std::fs::read_to_string(self.root().join("lock")).unwrap_or_default();
        let exe = || std::fs::read_link(format!("/proc/{}/exe", last.trim()));
        let is_lazuli = || exe().is_ok_and(|path| path.to_string_lossy().contains("lazuli"));
        let is_gone = || (!is_lazuli() && listens_unix(&address).is_none()).then_some(());
        if !last.is_empty() {
            wait_until(PATIENCE, is_gone).expect("the last worker does not end");
        }
        let mut command = Command::new(program());
        command.arg("serve").arg("--config").arg(self.config());
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        let mut process = self.sandbox.spawn("lazuli", &mut command);
        process.wait_ready("its socket", PATIENCE, |_| listens_unix(&address));
        self.process = Some(process);
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        if let Some(process) = &mut self.process {
            process.kill();
        }
    }

    /// `kill -9` while another thread uses its commands; [`Lazuli::restart`] collects it.
    pub fn kill_shared(&self) {
        if let Some(process) = &self.process {
            process.send_kill();
        }
    }

    /// The daemon's supervisor, which is the process that was started.
    pub fn supervisor(&self) -> u32 {
        self.process.as_ref().map_or(0, Process::id)
    }

    /// The process that serves, which is the supervisor's child; `None` between two of them.
    pub fn worker(&self) -> Option<u32> {
        worker_of(self.supervisor())
    }

    /// SIGTERM, and whether it ended by itself with 0.
    pub fn stop(&mut self) -> bool {
        let process = self.process.as_mut();
        let status = process.and_then(|process| process.terminate(PATIENCE));
        status.is_some_and(|status| status.success())
    }

    /// Its log so far, over all restarts.
    pub fn log(&self) -> String {
        self.process.as_ref().map(Process::log).unwrap_or_default()
    }

    /// A `lazuli` command with the daemon's configuration.
    pub fn command(&self, name: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.arg(name).arg("--config").arg(self.config()).args(arguments);
        command
    }

    /// `lazuli pull REFERENCE`.
    pub fn pull(&self, reference: &str) -> Finished {
        run(&mut self.command("pull", &[reference]), 5 * COMMAND_TIMEOUT)
    }

    /// `lazuli status --json`, parsed.
    pub fn status(&self) -> serde_json::Value {
        let finished = run(&mut self.command("status", &["--json"]), PATIENCE).expect_success();
        serde_json::from_slice(&finished.stdout)
            .unwrap_or_else(|error| panic!("lazuli status --json is not JSON: {error}\n{}", finished.describe()))
    }
}

impl Drop for Lazuli {
    fn drop(&mut self) {
        // Politely, so that it unmounts by itself; what it leaves is the sandbox's to clear.
        if let Some(process) = &mut self.process {
            process.terminate(Duration::from_secs(10));
        }
    }
}

/// `lazuli mount`, unmounted and ended when this is dropped.
pub struct Mounted {
    /// Where.
    pub path: PathBuf,
    process: Process,
}

impl Mounted {
    /// Mounts `source` (a reference, or `oci:DIR`) and waits until it can be seen.
    pub fn new(sandbox: &Sandbox, source: &str) -> Self {
        let path = sandbox.dir("mounted");
        let config = sandbox.path("mount.toml");
        let root = sandbox.dir("mount-root");
        let text = format!("root = {root:?}\nadmin_address = \"\"\n{}", face_config());
        std::fs::write(&config, text).unwrap();
        let mut command = Command::new(program());
        command.args(["mount", "--config"]).arg(&config).arg(source).arg(&path);
        let mut process = sandbox.spawn("mount", &mut command);
        let before = device(sandbox.root());
        process.wait_ready("its mount", 4 * PATIENCE, |_| (device(&path) != before).then_some(()));
        Mounted { path, process }
    }

    /// SIGTERM, and whether it ended with 0 and unmounted.
    pub fn stop(mut self) -> bool {
        let status = self.process.terminate(PATIENCE);
        status.is_some_and(|status| status.success()) && super::sandbox::mounts_below(&self.path).is_empty()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.process.terminate(Duration::from_secs(5));
        unmount_below(&self.path);
    }
}

/// The worker of a supervisor.
pub fn worker_of(supervisor: u32) -> Option<u32> {
    let children = std::fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

fn device(path: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(path).ok().map(|metadata| metadata.dev())
}
