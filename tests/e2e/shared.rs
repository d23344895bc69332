//! Indexes shared by two machines: each has a root, a containerd and a daemon of its own, and only the registry in common.
//!
//! A plain gzip image is pulled on the first machine, which indexes and publishes it; on the second it is lazy from the start.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::stage::subject;
use crate::support::containerd::{Containerd, Generation, REFERENCE};
use crate::support::image::{Compression, Flavour, Image, Layer, application_entries, base_entries};
use crate::support::lazuli::{self, Lazuli};
use crate::support::proxy::{Exchange, Link, Proxy, total_bytes};
use crate::support::registry::Registry;
use crate::support::sandbox::{COMMAND_TIMEOUT, Finished, PATIENCE, Sandbox, run, run_ok, wait_until};
use crate::support::tar::{Entry, noise};
use crate::support::tree::{Options, compare};

/// The variable that names the storage directory of a registry with the image `demo/python:plain`, as `make demo` leaves it
/// (`target/demo-images/1`).
const IMAGES: &str = "LAZULI_DEMO_IMAGES";
/// Bytes of the file that nobody reads.
const BALLAST: usize = 24 << 20;

/// The registry that the machines have in common.
pub struct Ground {
    sandbox: Sandbox,
    registry: Registry,
    pub proxy: Proxy,
}

/// One machine. Fields are dropped in this order: users before what they use.
pub struct Machine {
    pub containerd: Containerd,
    lazuli: Lazuli,
    _sandbox: Sandbox,
}

impl Ground {
    pub fn new(name: &str) -> Self {
        let sandbox = Sandbox::new(name);
        let registry = Registry::start(&sandbox);
        let proxy = Proxy::start(registry.address, Link::default());
        Ground {
            sandbox,
            registry,
            proxy,
        }
    }

    pub fn machine(&self, name: &str, index: &str) -> Machine {
        let generation = Generation::two().unwrap_or(Generation::One);
        let sandbox = self.sandbox.machine(name);
        let containerd = Containerd::start(&sandbox, generation, &lazuli::address_in(&sandbox));
        let index = index.replace("REGISTRY", &self.proxy.host());
        let more = format!("[index]\n{index}");
        let lazuli = Lazuli::start(&sandbox, &containerd.address, &[self.proxy.host()], &more);
        Machine {
            containerd,
            lazuli,
            _sandbox: sandbox,
        }
    }

    pub fn push(&self, image: &Image, name: &str) -> String {
        self.registry.push(image, name);
        format!("{}/{name}", self.proxy.host())
    }

    /// Bytes of blobs that came from the registry since the last time.
    pub fn blob_bytes(&self) -> u64 {
        let exchanges = self.proxy.take().into_iter();
        total_bytes(&exchanges.filter(Exchange::is_blob).collect::<Vec<_>>())
    }
}

impl Machine {
    /// Stock `ctr` where that is lazy, `lazuli pull` elsewhere.
    pub fn pull(&self, reference: &str) -> Finished {
        match self.containerd.generation {
            Generation::One => self.lazuli.pull(reference),
            Generation::Two(_) => self.containerd.pull(reference, lazuli::SNAPSHOTTER),
        }
        .expect_success()
    }

    pub fn sh(&self, reference: &str, script: &str) -> String {
        self.containerd.sh(reference, lazuli::SNAPSHOTTER, script)
    }

    pub fn layer(&self, digest: &str) -> Value {
        let status = self.lazuli.status();
        let layers = status["layers"].as_array().cloned().unwrap_or_default();
        let layer = layers.into_iter().find(|layer| layer["digest"] == digest);
        layer.unwrap_or_else(|| panic!("status has no layer {digest}: {status}"))
    }

    /// Waits until the index of a layer is published.
    fn wait_published(&self, digest: &str) -> String {
        let published = || self.layer(digest)["index"]["published"].as_str().map(str::to_owned);
        wait_until(PATIENCE, published).unwrap_or_else(|| panic!("not published: {}", self.lazuli.log()))
    }

    /// `lazuli index ...` with the daemon's configuration.
    fn index(&self, arguments: &[&str]) -> Finished {
        run(&mut self.lazuli.command("index", arguments), COMMAND_TIMEOUT)
    }

    pub fn index_json(&self, arguments: &[&str]) -> Vec<Value> {
        let finished = self.index(&[&["--json"], arguments].concat()).expect_success();
        serde_json::from_slice(&finished.stdout).unwrap_or_else(|error| panic!("{error}: {}", finished.describe()))
    }
}

/// A base, and an application with a large file that nobody reads.
pub fn image() -> Image {
    let ballast = Entry::file("app/data/ballast.bin", noise(77, BALLAST));
    let entries = application_entries().into_iter().chain([ballast]);
    Image::new(
        Flavour::Docker,
        vec![
            Layer::of(Compression::Gzip, base_entries()),
            Layer::of(Compression::Gzip, entries),
        ],
    )
}

#[test]
fn a_second_machine_starts_with_the_index_of_the_first() {
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    for (what, first, second) in [
        (
            "in an index repository",
            "repository = \"REGISTRY/cluster/index\"\npublish = true",
            "repository = \"REGISTRY/cluster/index\"",
        ),
        (
            "beside the image",
            "publish = true\ntrusted_repositories = [\"REGISTRY/demo/*\"]",
            "trusted_repositories = [\"REGISTRY/demo/*\"]",
        ),
    ] {
        let ground = Ground::new("shared_index");
        let image = image();
        let reference = ground.push(&image, "demo/app:1");
        let large = &image.layers[1].blob;
        let mut one = ground.machine("a", first);
        one.pull(&reference);
        let place = one.wait_published(&large.digest);
        assert!(place.contains(&ground.proxy.host()), "{what}: {place}");
        assert_eq!(one.layer(&large.digest)["index"]["source"], "built", "{what}");
        // After a restart it is known to be there.
        ground.proxy.take();
        one.lazuli.restart();
        std::thread::sleep(Duration::from_secs(1));
        let writes = ground
            .proxy
            .take()
            .into_iter()
            .filter(|exchange| exchange.method == "PUT");
        assert_eq!(writes.count(), 0, "{what}");
        assert_eq!(one.layer(&large.digest)["index"]["published"], place, "{what}");
        drop(one);

        ground.proxy.take();
        let two = ground.machine("b", second);
        two.pull(&reference);
        let listed = two.sh(
            &reference,
            "cat /app/lib/p3/m8.txt | head -n 1; find /app -type f | wc -l",
        );
        assert_eq!(listed, "module 3008\n325\n", "{what}");
        let (fetched, whole) = (
            ground.blob_bytes(),
            image.layers.iter().map(|l| l.blob.bytes.len() as u64).sum::<u64>(),
        );
        let status = two.layer(&large.digest);
        assert_eq!(
            (&status["index"]["source"], &status["lazy"]),
            (&Value::from("shared"), &Value::from(true)),
            "{what}: {status}"
        );
        assert!(
            status["index"]["from"].as_str().is_some_and(|from| place == from),
            "{what}: {status}"
        );
        assert!(fetched < whole / 5, "{what}: {fetched} of {whole} bytes were fetched");

        two.containerd.pull(&reference, REFERENCE).expect_success();
        let expected = two.containerd.view(&reference, REFERENCE);
        let found = two.containerd.view(&reference, lazuli::SNAPSHOTTER);
        compare(&expected.path, &found.path, &Options::default()).expect_equal();
    }
}

/// A key pair made by openssl.
fn keys(dir: &Path, name: &str) -> (PathBuf, PathBuf) {
    let (private, public) = (dir.join(format!("{name}.key")), dir.join(format!("{name}.pub")));
    let mut openssl = std::process::Command::new("openssl");
    run_ok(openssl.args(["genpkey", "-algorithm", "ed25519", "-out"]).arg(&private));
    let mut openssl = std::process::Command::new("openssl");
    run_ok(
        openssl
            .args(["pkey", "-pubout", "-in"])
            .arg(&private)
            .arg("-out")
            .arg(&public),
    );
    (private, public)
}

#[test]
fn indexes_are_pushed_listed_pulled_and_removed_by_hand() {
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    let ground = Ground::new("index_commands");
    let image = image();
    let reference = ground.push(&image, "demo/app:1");
    let large = &image.layers[1].blob;
    let dir = ground.sandbox.dir("keys");
    let (private, public) = keys(&dir, "right");
    let (_, wrong) = keys(&dir, "wrong");
    let trusting = |key: &Path| format!("public_keys = [{key:?}]");
    let one = ground.machine("a", &trusting(&public));

    // Built and pushed by the command, beside the image, signed.
    let key = private.display().to_string();
    let pushed = one.index_json(&["push", &reference, "--signing-key", &key]);
    let row = pushed.iter().find(|row| row["layer"] == large.digest).unwrap();
    assert_eq!(row["note"], "pushed", "{row}");
    let bytes = row["index_bytes"].as_u64().unwrap();
    assert!(
        bytes < large.bytes.len() as u64 / 20,
        "the index has {bytes} of {} bytes",
        large.bytes.len()
    );
    let listed = one.index_json(&["ls", &reference]);
    let row = listed.iter().find(|row| row["layer"] == large.digest).unwrap();
    assert!(row["note"].as_str().unwrap().contains("right.pub"), "{row}");

    // Files: pulled, looked at, and pushed from.
    let files = ground.sandbox.dir("files").display().to_string();
    one.index_json(&["pull", &reference, "--output", &files]);
    let file = format!("{files}/{}.lazuli-index", &large.digest["sha256:".len()..]);
    let facts = one.index(&["inspect", &file]).expect_success().text();
    assert!(
        facts.contains(&large.digest["sha256:".len()..][..12]) && facts.contains("checkpoints"),
        "{facts}"
    );
    let built = ground.sandbox.dir("built").display().to_string();
    one.index_json(&["build", &reference, "--output", &built]);
    let name = Path::new(&file).file_name().unwrap();
    assert!(
        std::fs::read(&file).unwrap() == std::fs::read(Path::new(&built).join(name)).unwrap(),
        "not the same each time"
    );
    let repository = format!("{}/cluster/index", ground.proxy.host());
    one.index_json(&["push", &reference, "--repository", &repository, "--from", &built]);
    let all = one.index_json(&["ls", "--repository", &repository]);
    assert!(
        all.iter()
            .any(|row| row["layer"] == large.digest && row["signed"] == false),
        "{all:?}"
    );

    // Whom the key is known to, starts lazily; whom it is not, streams.
    one.pull(&reference);
    assert_eq!(one.layer(&large.digest)["index"]["source"], "shared");
    drop(one);
    let two = ground.machine("b", &trusting(&wrong));
    two.pull(&reference);
    assert_eq!(
        two.layer(&large.digest)["index"]["source"],
        "built",
        "{}",
        two.lazuli.log()
    );
    assert!(two.lazuli.log().contains("is not believed"), "{}", two.lazuli.log());
    // The registry of these tests deletes nothing, and says so.
    let removed = two.index(&["rm", &reference]);
    assert!(
        !removed.success() && removed.stderr.contains("switched off"),
        "{}",
        removed.describe()
    );
}

#[test]
fn a_python_with_numpy_starts_with_a_fifth_of_its_bytes() {
    use std::io::Write as _;
    let Some(storage) = std::env::var_os(IMAGES).filter(|dir| !dir.is_empty()) else {
        let message = format!(
            "\n*** NOT TESTED WITH python and numpy: run make demo, and set {IMAGES}=target/demo-images/1 ***\n"
        );
        let _ = std::io::stderr().write_all(message.as_bytes());
        return;
    };
    if subject() != lazuli::SNAPSHOTTER {
        return;
    }
    let mut ground = Ground::new("shared_numpy");
    let data = ground.sandbox.path("registry/data");
    ground.registry.stop();
    run_ok(
        std::process::Command::new("cp")
            .args(["-a", "-T"])
            .arg(&storage)
            .arg(&data),
    );
    ground.registry.restart();
    let reference = format!("{}/demo/python:plain", ground.proxy.host());
    let index = "repository = \"REGISTRY/cluster/index\"";
    let one = ground.machine("a", &format!("{index}\npublish = true"));
    one.pull(&reference);
    let manifest = one.containerd.manifest(&reference);
    let layers = manifest["layers"].as_array().unwrap();
    let size = |layer: &Value| layer["size"].as_u64().unwrap();
    for layer in layers.iter().filter(|layer| size(layer) >= 256 << 10) {
        one.wait_published(layer["digest"].as_str().unwrap());
    }
    drop(one);

    ground.proxy.take();
    let two = ground.machine("b", index);
    two.pull(&reference);
    let said = two.sh(
        &reference,
        "python3 -c 'import numpy; print(int(numpy.arange(1000).sum()))'",
    );
    assert_eq!(said, "499500\n");
    let (fetched, whole) = (ground.blob_bytes(), layers.iter().map(size).sum::<u64>());
    eprintln!(
        "python with numpy: {fetched} of {whole} bytes, {:.1} %",
        fetched as f64 * 100.0 / whole as f64
    );
    assert!(fetched < whole / 5, "{fetched} of {whole} bytes were fetched");
}
