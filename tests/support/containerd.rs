//! A containerd of this test alone, and `ctr`.
//!
//! 1.6 is Debian's package on the system. 2.x is unpacked beside it by `tests/support/get-containerd2 DIR`, and found through
//! `LAZULI_CONTAINERD2=DIR`. Both have their root, state and sockets below the sandbox, know the proxy plugin `lazuli`, and have no
//! CRI plugin, so nothing needs a network. `ctr run` needs no further flags with Debian's runc (cgroups v1 or v2, no systemd); ids
//! are unique on the machine, because runc's state (`/run/containerd/runc`) and cgroups are shared by all containerds.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::image::architecture;
use super::sandbox::{
    COMMAND_TIMEOUT, Finished, PATIENCE, Process, Sandbox, listens_unix, require_program, run, run_ok, unmount_below,
};
use super::skip::{Ability, skipped};

/// The variable that names the directory of a containerd 2.x.
pub const CONTAINERD2: &str = "LAZULI_CONTAINERD2";
/// The variable that names the directory of a containerd 2.4 or later: `bin/containerd` below it, as `benches/cold_start/get-containerd DIR` builds it with
/// `CONTAINERD_RELEASE=v2.4.2`, or `usr/bin/containerd`.
pub const CONTAINERD24: &str = "LAZULI_CONTAINERD24";
/// The namespace of everything that `ctr` does unless told otherwise.
pub const NAMESPACE: &str = "default";
/// containerd's own snapshotter, the reference of all comparisons.
pub const REFERENCE: &str = "overlayfs";
/// containerd's own differ.
pub const WALKING: &str = "walking";
/// The daemon as a differ, as 1.7 and later know it.
pub const DIFFER: &str = "lazuli-diff";
/// Plugins that need what a test machine lacks, or a network, or other people's directories.
const DISABLED: [&str; 14] = [
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.images",
    "io.containerd.cri.v1.runtime",
    "io.containerd.podsandbox.controller.v1.podsandbox",
    "io.containerd.grpc.v1.sandbox-controllers",
    "io.containerd.nri.v1.nri",
    "io.containerd.internal.v1.opt",
    "io.containerd.tracing.processor.v1.otlp",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.blockfile",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.erofs",
    "io.containerd.snapshotter.v1.zfs",
];

/// Which containerd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Generation {
    /// The system's 1.6 or 1.7.
    One,
    /// 2.x in this directory (`usr/bin/containerd` or `bin/containerd` below it).
    Two(PathBuf),
}

impl Generation {
    /// 2.x if `LAZULI_CONTAINERD2` names its directory. Without the variable it says so, and returns `None`; with a wrong one it panics.
    pub fn two() -> Option<Self> {
        let Some(dir) = std::env::var_os(CONTAINERD2).filter(|dir| !dir.is_empty()) else {
            skipped(
                Ability::Containerd2,
                format!("run tests/support/get-containerd2 DIR and set {CONTAINERD2}=DIR"),
            );
            return None;
        };
        let dir = PathBuf::from(dir);
        assert!(
            dir.join("usr/bin/containerd").is_file(),
            "{CONTAINERD2}={} has no usr/bin/containerd; fill it with: tests/support/get-containerd2 {}",
            dir.display(),
            dir.display()
        );
        Some(Generation::Two(dir))
    }

    /// 2.4 or later if [`CONTAINERD24`] names its directory. Without the variable it says so, and returns `None`; with a wrong one it panics.
    pub fn two_four() -> Option<Self> {
        let Some(dir) = std::env::var_os(CONTAINERD24).filter(|dir| !dir.is_empty()) else {
            let how = format!(
                "run CONTAINERD_RELEASE=v2.4.2 benches/cold_start/get-containerd DIR and set {CONTAINERD24}=DIR"
            );
            skipped(Ability::Containerd24, how);
            return None;
        };
        let generation = Generation::Two(PathBuf::from(dir));
        let version = generation.version();
        let words: Vec<&str> = version.split_whitespace().collect();
        let numbers = words.get(2).map(|version| version.trim_start_matches('v').split('.'));
        let numbers: Vec<u32> = numbers
            .into_iter()
            .flatten()
            .map_while(|number| number.parse().ok())
            .collect();
        assert!(numbers >= vec![2, 4], "{CONTAINERD24} names {version}");
        Some(generation)
    }

    /// What it says of itself: `containerd github.com/... 2.1.9 revision`.
    pub fn version(&self) -> String {
        run_ok(Command::new(self.program("containerd")).arg("--version")).text()
    }

    /// Whether a directory that is to have a 2.x has a 1.7. It knows differs; `ctr` pulls by itself there (the daemon could over TLS only), and has
    /// them chosen by the service's order.
    fn is_one_seven(&self) -> bool {
        *self != Generation::One && self.version().contains(" 1.7.")
    }

    /// One of its programs.
    pub fn program(&self, name: &str) -> PathBuf {
        match self {
            Generation::One => require_program(name),
            Generation::Two(dir) => {
                let places = ["usr/bin", "bin"].map(|place| dir.join(place).join(name));
                let found = places.iter().find(|program| program.is_file());
                found.unwrap_or(&places[0]).clone()
            }
        }
    }
}

/// A running containerd.
pub struct Containerd {
    /// Its socket.
    pub address: PathBuf,
    /// Which one it is.
    pub generation: Generation,
    sandbox: Sandbox,
    /// Namespace of its commands.
    namespace: String,
    process: Option<Process>,
}

static NEXT: AtomicU32 = AtomicU32::new(0);

impl Containerd {
    /// Starts it; `lazuli` is the socket of the proxy plugin, which need not exist.
    pub fn start(sandbox: &Sandbox, generation: Generation, lazuli: &Path) -> Self {
        let differ = std::env::var("LAZULI_E2E_DIFFER");
        Self::start_with(sandbox, generation, lazuli, differ.as_deref().unwrap_or(WALKING), "")
    }

    /// The same, which has layers of Lazuli's snapshots applied by `differ`, if it is a 2.x; `more` is added to its configuration.
    pub fn start_with(sandbox: &Sandbox, generation: Generation, lazuli: &Path, differ: &str, more: &str) -> Self {
        let dir = sandbox.dir("containerd");
        let config = dir.join("config.toml");
        let text = configuration(&dir, &generation, lazuli, differ, more);
        std::fs::write(&config, text).unwrap();
        let mut containerd = Containerd {
            address: dir.join("c.sock"),
            generation,
            sandbox: sandbox.clone(),
            namespace: NAMESPACE.to_owned(),
            process: None,
        };
        containerd.launch();
        containerd
    }

    /// The same containerd, with commands in another namespace.
    pub fn in_namespace(&self, namespace: &str) -> Self {
        Containerd {
            address: self.address.clone(),
            generation: self.generation.clone(),
            sandbox: self.sandbox.clone(),
            namespace: namespace.to_owned(),
            process: None,
        }
    }

    fn launch(&mut self) {
        let mut command = Command::new(self.generation.program("containerd"));
        command.arg("--config").arg(self.sandbox.path("containerd/config.toml"));
        // Its shim is found by PATH, and so is runc, which is in sbin.
        let bin = self.generation.program("containerd");
        let path = std::env::var("PATH").unwrap_or_default();
        let first = bin.parent().unwrap_or(Path::new("/usr/bin")).display();
        command.env("PATH", format!("{first}:{path}:/usr/sbin:/usr/bin:/sbin:/bin"));
        require_program("runc");
        let mut process = self.sandbox.spawn("containerd", &mut command);
        let address = self.address.clone();
        process.wait_ready("its socket", PATIENCE, |_| listens_unix(&address));
        self.process = Some(process);
    }

    /// Stops it politely and starts it again.
    pub fn restart(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.terminate(PATIENCE);
        }
        self.launch();
    }

    /// The same, with this instead of that in its configuration.
    pub fn reconfigure(&mut self, this: &str, that: &str) {
        let path = self.sandbox.path("containerd/config.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(this), "{this:?} is not in the configuration: {text}");
        std::fs::write(&path, text.replace(this, that)).unwrap();
        self.restart();
    }

    /// Stops its process where it is, until it [goes on](Containerd::go_on).
    pub fn halt(&self) {
        self.signal(rustix::process::Signal::STOP);
    }

    /// Goes on after [`Containerd::halt`].
    pub fn go_on(&self) {
        self.signal(rustix::process::Signal::CONT);
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let id = self.process.as_ref().expect("containerd does not run").id();
        let id = rustix::process::Pid::from_raw(id.cast_signed()).unwrap();
        rustix::process::kill_process(id, signal).unwrap();
    }

    /// `kill -9`, and starts it again.
    pub fn kill_and_restart(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
        self.launch();
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        self.process.as_ref().map(Process::log).unwrap_or_default()
    }

    /// A `ctr` command in its namespace, [`NAMESPACE`] if no other was chosen.
    pub fn ctr(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.generation.program("ctr"));
        command
            .arg("--address")
            .arg(&self.address)
            .args(["--namespace", &self.namespace]);
        command.args(arguments);
        // A default that the caller's environment might have.
        command
            .env_remove("CONTAINERD_SNAPSHOTTER")
            .env_remove("CONTAINERD_NAMESPACE");
        command
    }

    /// Runs `ctr`; panics unless it succeeds.
    pub fn ctr_ok(&self, arguments: &[&str]) -> Finished {
        run_ok(&mut self.ctr(arguments))
    }

    /// `ctr images pull` with a snapshotter chosen by the environment, as a user does it. The slow tests pull for minutes.
    pub fn pull(&self, reference: &str, snapshotter: &str) -> Finished {
        let mut command = self.ctr(&["images", "pull", "--plain-http", reference]);
        run(command.env("CONTAINERD_SNAPSHOTTER", snapshotter), 5 * COMMAND_TIMEOUT)
    }

    /// Downloads an image without unpacking it.
    pub fn fetch(&self, reference: &str) {
        let mut command = self.ctr(&["content", "fetch", "--plain-http", reference]);
        run(&mut command, 5 * COMMAND_TIMEOUT).expect_success();
    }

    /// Runs a shell script in a new container that is removed afterwards.
    pub fn run(&self, reference: &str, snapshotter: &str, script: &str) -> Finished {
        let id = self.new_id();
        let output = Output::new(&self.sandbox, &id);
        let script = output.script(script);
        let flags = [
            "run",
            "--rm",
            "--null-io",
            "--mount",
            &output.mount,
            "--snapshotter",
            snapshotter,
        ];
        let mut command = self.ctr(&flags);
        command.args([reference, &id, "sh", "-c", &script]);
        output.collect(run(&mut command, COMMAND_TIMEOUT))
    }

    /// Runs a shell script in a new container, and returns its output; panics unless it succeeds.
    pub fn sh(&self, reference: &str, snapshotter: &str, script: &str) -> String {
        self.run(reference, snapshotter, script).expect_success().text()
    }

    /// Runs a shell script as root of a user namespace whose ids begin at `first` on the host, as [`Containerd::run`] does. 1.x, which knows no
    /// capabilities of this snapshotter, changes all owners by itself.
    pub fn run_mapped(&self, reference: &str, snapshotter: &str, first: u32, script: &str) -> Finished {
        let id = self.new_id();
        let output = Output::new(&self.sandbox, &id);
        output.open_to_all();
        let script = output.script(script);
        let map = format!("0:{first}:65536");
        let flags = [
            "run",
            "--rm",
            "--null-io",
            "--mount",
            &output.mount,
            "--snapshotter",
            snapshotter,
        ];
        let mut command = self.ctr(&flags);
        command.args(["--uidmap", &map, "--gidmap", &map, "--remap-labels"]);
        command.args([reference, &id, "sh", "-c", &script]);
        output.collect(run(&mut command, COMMAND_TIMEOUT))
    }

    /// Makes a container that is not started, with a snapshot whose owners are mapped to those from `first` on. Its id is the snapshot's key.
    pub fn create_mapped(&self, reference: &str, snapshotter: &str, first: u32) -> String {
        let id = self.new_id();
        let labels = ["uid", "gid"].map(|what| format!("containerd.io/snapshot/{what}mapping=0:{first}:65536"));
        let [users, groups] = &labels;
        let flags = ["containers", "create", "--snapshotter", snapshotter];
        let labels = ["--snapshotter-label", users, "--snapshotter-label", groups];
        run_ok(self.ctr(&flags).args(labels).args([reference, &id, "sh"]));
        id
    }

    /// Starts a container that stays until [`Containerd::remove_container`].
    pub fn start_container(&self, reference: &str, snapshotter: &str) -> String {
        let (id, finished) = self.try_start_container(reference, snapshotter);
        finished.expect_success();
        id
    }

    /// The same, whether it can be started or not.
    pub fn try_start_container(&self, reference: &str, snapshotter: &str) -> (String, Finished) {
        let id = self.new_id();
        let output = Output::new(&self.sandbox, &id);
        let flags = [
            "run",
            "--detach",
            "--null-io",
            "--mount",
            &output.mount,
            "--snapshotter",
            snapshotter,
        ];
        let finished = run(
            self.ctr(&flags).args([reference, &id, "sleep", "100000"]),
            COMMAND_TIMEOUT,
        );
        (id, finished)
    }

    /// Runs a shell script in a running container.
    pub fn exec(&self, id: &str, script: &str) -> Finished {
        self.exec_within(id, script, COMMAND_TIMEOUT)
    }

    /// The same, for a script that may take so long.
    pub fn exec_within(&self, id: &str, script: &str, timeout: Duration) -> Finished {
        let (process, fifos) = (self.new_id(), self.sandbox.dir("fifos").display().to_string());
        // Others may run in the same container.
        let output = Output::of(&self.sandbox, id, &process);
        let flags = ["tasks", "exec", "--fifo-dir", &fifos, "--exec-id", &process];
        let mut command = self.ctr(&flags);
        command.args([id, "sh", "-c", &output.script(script)]);
        output.collect(run(&mut command, timeout))
    }

    /// What a container that was started by [`Containerd::start_container`] sees as `/run/out`.
    pub fn output(&self, id: &str) -> PathBuf {
        self.sandbox.dir(format!("output/{id}"))
    }

    /// Process of a running container's first program.
    pub fn pid(&self, id: &str) -> Option<u32> {
        let tasks = self.ctr_ok(&["tasks", "ls"]).text();
        let line = tasks.lines().find(|line| line.split_whitespace().next() == Some(id))?;
        line.split_whitespace().nth(1)?.parse().ok()
    }

    /// Kills and removes a container, and with it its snapshot.
    pub fn remove_container(&self, id: &str) {
        self.ctr_ok(&["tasks", "rm", "--force", id]);
        self.ctr_ok(&["containers", "rm", id]);
    }

    /// A word that no other container, snapshot or process of the machine has.
    pub fn new_id(&self) -> String {
        format!("{}-{}", self.sandbox.unique(), NEXT.fetch_add(1, Ordering::Relaxed))
    }

    /// The first column of a `ctr ... ls`.
    fn names(&self, arguments: &[&str]) -> Vec<String> {
        let listed = self.ctr_ok(arguments).text();
        let lines = listed.lines().skip(1);
        lines
            .filter_map(|line| line.split_whitespace().next())
            .map(str::to_owned)
            .collect()
    }

    /// References of all images.
    pub fn images(&self) -> Vec<String> {
        self.names(&["images", "ls"])
    }

    /// Digests of all content.
    pub fn content(&self) -> Vec<String> {
        self.names(&["content", "ls"])
    }

    /// Keys of all snapshots of a snapshotter.
    pub fn snapshots(&self, snapshotter: &str) -> Vec<String> {
        self.names(&["snapshots", "--snapshotter", snapshotter, "ls"])
    }

    /// Removes an image and waits for the garbage collection.
    pub fn remove_image(&self, reference: &str) {
        self.ctr_ok(&["images", "rm", "--sync", reference]);
    }

    fn json_content(&self, digest: &str) -> Value {
        let bytes = self.ctr_ok(&["content", "get", digest]).stdout;
        serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("content {digest} is not JSON: {error}"))
    }

    /// The manifest of an image for this machine.
    pub fn manifest(&self, reference: &str) -> Value {
        let listed = self.ctr_ok(&["images", "ls", &format!("name=={reference}")]).text();
        let digest = listed
            .split_whitespace()
            .find(|word| word.starts_with("sha256:"))
            .unwrap_or_else(|| panic!("{reference} is not an image of containerd:\n{listed}"))
            .to_owned();
        let top = self.json_content(&digest);
        match top.get("manifests").and_then(Value::as_array) {
            None => top,
            Some(manifests) => {
                let fits = |manifest: &&Value| manifest["platform"]["architecture"] == architecture();
                let found = manifests.iter().find(fits).or(manifests.first());
                let digest = found.and_then(|manifest| manifest["digest"].as_str());
                self.json_content(digest.unwrap_or_else(|| panic!("the index {digest:?} names no manifest")))
            }
        }
    }

    /// Chain ids of an image's layers, lowest first.
    pub fn chain_ids(&self, reference: &str) -> Vec<String> {
        let manifest = self.manifest(reference);
        let config = self.json_content(manifest["config"]["digest"].as_str().unwrap_or_default());
        let diff_ids = config["rootfs"]["diff_ids"].as_array().cloned().unwrap_or_default();
        chain_ids(diff_ids.iter().filter_map(Value::as_str))
    }

    /// Mounts an image's file system read-only, as its containers see it, until the result is dropped.
    pub fn view(&self, reference: &str, snapshotter: &str) -> View<'_> {
        let top = self
            .chain_ids(reference)
            .pop()
            .unwrap_or_else(|| panic!("{reference} has no layers"));
        let key = self.marked_snapshot("view", snapshotter, &top);
        let view = View {
            containerd: self,
            snapshotter: snapshotter.to_owned(),
            path: self.sandbox.dir(format!("views/{key}")),
            key,
        };
        self.mount_snapshot(snapshotter, &view.key, &view.path);
        view
    }

    /// Makes a snapshot (`how`: `view` or `prepare`) that the garbage collector leaves alone. `ctr` of 1.6 does not mark it when it makes
    /// it, so a collection may come between the two commands.
    pub fn marked_snapshot(&self, how: &str, snapshotter: &str, parent: &str) -> String {
        const TRIES: usize = 5;
        for _ in 0..TRIES {
            let key = self.new_id();
            self.ctr_ok(&["snapshots", "--snapshotter", snapshotter, how, &key, parent]);
            if run(&mut self.ctr(&Self::mark(snapshotter, &key)), COMMAND_TIMEOUT).success() {
                return key;
            }
        }
        panic!("a snapshot of {parent} was collected {TRIES} times before it could be marked");
    }

    /// Has the garbage collector leave a snapshot alone.
    pub fn mark_snapshot(&self, snapshotter: &str, key: &str) {
        self.ctr_ok(&Self::mark(snapshotter, key));
    }

    fn mark<'a>(snapshotter: &'a str, key: &'a str) -> [&'a str; 6] {
        [
            "snapshots",
            "--snapshotter",
            snapshotter,
            "label",
            key,
            "containerd.io/gc.root=test",
        ]
    }

    /// Mounts an active or view snapshot as containerd tells how.
    pub fn mount_snapshot(&self, snapshotter: &str, key: &str, target: &Path) {
        let target = target.display().to_string();
        let mounts = self
            .ctr_ok(&["snapshots", "--snapshotter", snapshotter, "mounts", &target, key])
            .text();
        assert!(mounts.starts_with("mount "), "not a mount command: {mounts}");
        run_ok(Command::new("sh").args(["-ec", &mounts]));
    }

    /// Converts an image that is in the content store with all its layers, by stargz's `ctr-remote images convert --oci`; `options`
    /// are `--estargz`, `--zstdchunked`, `--estargz-chunk-size N`, ...
    pub fn convert(&self, from: &str, to: &str, options: &[&str]) {
        let mut command = Command::new(require_program("ctr-remote"));
        command
            .arg("--address")
            .arg(&self.address)
            .args(["--namespace", NAMESPACE]);
        command
            .args(["images", "convert", "--oci"])
            .args(options)
            .args([from, to]);
        run(&mut command, 3 * COMMAND_TIMEOUT).expect_success();
    }

    /// Pushes an image to the registry that its name begins with. `ctr` of 1.6 loses, rarely, the stream by which it reads a blob of its
    /// own containerd, and gives up: that is no matter of this project, and a new `ctr` begins anew. Any other failure is one.
    pub fn push(&self, reference: &str) {
        const TRIES: usize = 3;
        const STREAM_LOST: &str = "code = Internal desc = unexpected EOF";
        let mut command = self.ctr(&["images", "push", "--plain-http", reference]);
        for _ in 1..TRIES {
            let pushed = run(&mut command, 3 * COMMAND_TIMEOUT);
            if pushed.success() {
                return;
            }
            assert!(pushed.stderr.contains(STREAM_LOST), "{}", pushed.describe());
        }
        run(&mut command, 3 * COMMAND_TIMEOUT).expect_success();
    }
}

/// Chain ids of layers, lowest first: the first is its diff id, each further one the digest of "<chain id> <diff id>".
pub fn chain_ids<'a>(diff_ids: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut chain: Vec<String> = Vec::new();
    for diff_id in diff_ids {
        let next = match chain.last() {
            None => diff_id.to_owned(),
            Some(parent) => {
                let hash = Sha256::digest(format!("{parent} {diff_id}"));
                hash.iter()
                    .fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}"))
            }
        };
        chain.push(next);
    }
    chain
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Politely first: it lets go of its database and mounts. The process is killed by its own drop otherwise.
        if let Some(process) = &mut self.process
            && process.ended().is_none()
        {
            process.terminate(Duration::from_secs(10));
        }
    }
}

/// Where a container's output goes: files in a directory of the host that is mounted at `/run/out`, which is on a tmpfs of every container
/// and so no part of the image. Not through `ctr`, which loses output of short commands when it closes its pipes before it has read them.
struct Output {
    dir: PathBuf,
    /// What its files are called, of those that write there.
    process: String,
    mount: String,
}

impl Output {
    fn new(sandbox: &Sandbox, id: &str) -> Self {
        Self::of(sandbox, id, id)
    }

    fn of(sandbox: &Sandbox, container: &str, process: &str) -> Self {
        let dir = sandbox.dir(format!("output/{container}"));
        let mount = format!("type=bind,src={},dst=/run/out,options=rbind:rw", dir.display());
        let process = process.to_owned();
        Output { dir, process, mount }
    }

    /// Lets everybody write there, down from the sandbox.
    fn open_to_all(&self) {
        use std::os::unix::fs::PermissionsExt as _;
        let set = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        set(&self.dir, 0o777);
        for above in self.dir.ancestors().skip(1).take(2) {
            set(above, 0o711);
        }
    }

    fn script(&self, script: &str) -> String {
        let process = &self.process;
        format!("exec >/run/out/{process}.stdout 2>/run/out/{process}.stderr\n{script}")
    }

    fn collect(self, mut finished: Finished) -> Finished {
        let take = |name| {
            let path = self.dir.join(format!("{}.{name}", self.process));
            let bytes = std::fs::read(&path).unwrap_or_default();
            let _ = std::fs::remove_file(path);
            bytes
        };
        finished.stdout = take("stdout");
        finished.stderr.push_str(&String::from_utf8_lossy(&take("stderr")));
        finished
    }
}

/// An image's file system, mounted until this is dropped.
pub struct View<'a> {
    /// Where.
    pub path: PathBuf,
    containerd: &'a Containerd,
    snapshotter: String,
    key: String,
}

impl Drop for View<'_> {
    fn drop(&mut self) {
        unmount_below(&self.path);
        let remove = ["snapshots", "--snapshotter", &self.snapshotter, "rm", &self.key];
        run(&mut self.containerd.ctr(&remove), PATIENCE);
    }
}

/// What tells containerd of the daemon as a differ.
pub fn differ_proxy(lazuli: &Path) -> String {
    format!(
        "[proxy_plugins.{DIFFER}]\n  type = \"diff\"\n  address = \"{}\"\n",
        lazuli.display()
    )
}

fn configuration(dir: &Path, generation: &Generation, lazuli: &Path, differ: &str, more: &str) -> String {
    let dir = dir.display();
    let socket = lazuli;
    let lazuli = lazuli.display();
    // What is configured is not switched off.
    let disabled = DISABLED.iter().filter(|plugin| !more.contains(*plugin));
    let disabled: Vec<String> = disabled.map(|plugin| format!("\"{plugin}\"")).collect();
    let disabled = disabled.join(", ");
    let is_one_seven = generation.is_one_seven();
    let version = if *generation == Generation::One || is_one_seven {
        2
    } else {
        3
    };
    let mut text = format!(
        r#"version = {version}
root = "{dir}/root"
state = "{dir}/state"
disabled_plugins = [{disabled}]
[grpc]
  address = "{dir}/c.sock"
[ttrpc]
  address = "{dir}/t.sock"
[debug]
  level = "warn"
[proxy_plugins.lazuli]
  type = "snapshot"
  address = "{lazuli}"
  capabilities = ["remap-ids"]
"#
    );
    let proxied = differ_proxy(socket);
    // 1.6 does not start with it.
    if *generation == Generation::One && differ == DIFFER && !generation.version().contains(" 1.6.") {
        text.push_str(&proxied);
    }
    if *generation != Generation::One {
        text.push_str("  [proxy_plugins.lazuli.exports]\n    enable_remote_snapshot_annotations = \"true\"\n");
        text.push_str(&proxied);
        // Any entry replaces the default one, so overlayfs has to be repeated.
        for (snapshotter, differ) in [(REFERENCE, WALKING), ("lazuli", differ)] {
            text.push_str(&format!(
                r#"[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux/{}"
  snapshotter = "{snapshotter}"
  differ = "{differ}"
"#,
                architecture()
            ));
        }
    }
    if is_one_seven && differ == DIFFER {
        text.push_str(&format!(
            "[plugins.\"io.containerd.service.v1.diff-service\"]\n  default = [\"{DIFFER}\", \"{WALKING}\"]\n"
        ));
    }
    text + more
}
