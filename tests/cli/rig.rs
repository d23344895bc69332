//! A registry with an image, a place for files, and commands that find both.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tokio::runtime::Runtime;

use crate::support::fault_registry::{FaultRegistry, On};
use crate::support::image::{Compression, Flavour, Image, Layer};
use crate::support::sandbox::{Finished, PATIENCE, mounts_below, run, unmount_below, wait_until};
use crate::support::tar::{Entry, noise};

/// Bytes of each layer's one file: enough to be worth an index, and to be cut in the middle.
pub const FILE: usize = 1_000_000;

/// What a test needs; it goes with it.
pub struct Rig {
    pub registry: FaultRegistry,
    pub reference: String,
    pub image: Image,
    dir: tempfile::TempDir,
    _runtime: Runtime,
}

impl Rig {
    pub fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let registry = runtime.block_on(FaultRegistry::start());
        let lower = [Entry::dir("data"), Entry::file("data/file", noise(1, FILE))];
        let upper = [Entry::file("other", noise(2, FILE))];
        let layers = vec![Layer::of(Compression::Gzip, lower), Layer::of(Compression::Gzip, upper)];
        let image = Image::new(Flavour::Oci, layers);
        for blob in image.blobs() {
            registry.add_blob(blob.bytes.as_slice().to_vec());
        }
        let manifest = registry.add_manifest(image.media_type, image.manifest.bytes.as_slice().to_vec());
        registry.tag("demo/app", "1", manifest);
        let dir = tempfile::tempdir().unwrap();
        for name in ["tmp", "out", "mountpoint"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        // Neither the machine's daemon and containerd, nor how full its disk is, are any matter here.
        let config = format!(
            "root = \"{0}/root\"\naddress = \"{0}/lazuli.sock\"\ncontainerd_address = \"{0}/containerd.sock\"\nadmin_address = \"\"\n\
             [registry]\nconfig_path = []\n[cache]\nhigh_percent = 100\n[log]\nlevel = \"error\"\n",
            dir.path().display()
        );
        fs::write(dir.path().join("config.toml"), config).unwrap();
        Rig {
            reference: format!("{}/demo/app:1", registry.host()),
            registry,
            image,
            dir,
            _runtime: runtime,
        }
    }

    /// A path in the rig's place.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command; in its arguments REF is the image, and DIR the rig's place.
    pub fn command(&self, line: &str) -> Command {
        let mut words = line.split_whitespace();
        // Whoever runs the tests may have signals ignored (nohup, a shell's background), and programs inherit that.
        let mut command = Command::new("env");
        command.args(["--default-signal", env!("CARGO_BIN_EXE_lazuli")]);
        command.arg(words.next().unwrap());
        if !line.contains("--help") {
            command.arg("--config").arg(self.path("config.toml"));
        }
        let dir = self.dir.path().display().to_string();
        command.args(words.map(|word| word.replace("REF", &self.reference).replace("DIR", &dir)));
        command
            .env("TMPDIR", self.path("tmp"))
            .env_remove("CONTAINERD_NAMESPACE")
            .stdin(Stdio::null());
        command
    }

    /// Runs a command to its end.
    pub fn run(&self, line: &str) -> Finished {
        run(&mut self.command(line), PATIENCE)
    }

    /// Starts a command, and waits until the registry was asked for something such.
    pub fn begin(&self, line: &str, on: On) -> Child {
        let child = self
            .command(line)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        wait_until(PATIENCE, || (!self.registry.seen(on).is_empty()).then_some(()))
            .unwrap_or_else(|| panic!("{line}: {on:?} is never asked for"));
        child
    }

    /// What is left of commands: temporary files, and mounts.
    pub fn left(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("tmp")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mounts = mounts_below(self.dir.path());
        names
            .chain(mounts.iter().map(|mount| format!("mounted: {mount:?}")))
            .collect()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // If a test has failed.
        unmount_below(self.dir.path());
    }
}

/// Sends a signal: `INT`, `TERM`, `HUP`, `KILL`.
pub fn send(child: &Child, signal: &str) {
    let sent = Command::new("kill")
        .args(["-s", signal, &child.id().to_string()])
        .status();
    assert!(sent.unwrap().success());
}

/// Waits for the end of a program; gives its exit code (or `-signal`), and what it wrote to standard error.
pub fn end_of(mut child: Child) -> (i32, String) {
    let ended = wait_until(PATIENCE + Duration::from_secs(5), || child.try_wait().unwrap());
    let Some(status) = ended else {
        let _ = child.kill();
        panic!("it does not end");
    };
    let mut text = String::new();
    if let Some(mut err) = child.stderr.take() {
        std::io::Read::read_to_string(&mut err, &mut text).unwrap();
    }
    let code = status.code().unwrap_or_else(|| -status.signal().unwrap_or_default());
    (code, text)
}

/// All files below a directory, with their bytes.
pub fn tree(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => pending.push(path),
                false => drop(found.insert(path.clone(), fs::read(&path).unwrap())),
            }
        }
    }
    found
}

/// Whether file systems can be mounted here; tests of what needs that are left out elsewhere.
pub fn can_mount() -> bool {
    rustix::process::geteuid().is_root() && Path::new("/dev/fuse").exists()
}
