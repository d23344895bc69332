//! Indexes shared by two machines: each has a root, a containerd and a daemon of its own, and only the registry in common.
//!
//! A plain gzip image is pulled on the first machine, which indexes and publishes it; on the second it is lazy from the start.

use std::path::{Path, PathBuf};
use std::time::Duration;

use lazuli::catalog::shared::publish::{Target, push};
use lazuli::config::RegistryConfig;
use lazuli::layer::{Access, Chunk, Codec, Digest, TarIndexer, Windows, portable};
use lazuli::registry::Registry as Client;
use lazuli::store::LayerSource;
use serde_json::Value;

use crate::stage::subject;
use crate::support::containerd::{Containerd, Generation, REFERENCE};
use crate::support::image::{Compression, Flavour, Image, Layer, application_entries, base_entries};
use crate::support::lazuli::{self as program, Lazuli};
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
    pub sandbox: Sandbox,
    pub registry: Registry,
    pub proxy: Proxy,
}

/// One machine. Fields are dropped in this order: users before what they use.
pub struct Machine {
    pub containerd: Containerd,
    pub lazuli: Lazuli,
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

    /// One whose registry has the images of the demonstration; `None`, and a message past the capture of the test runner, without them.
    pub fn with_demo_images(name: &str) -> Option<Self> {
        use std::io::Write as _;
        let Some(storage) = std::env::var_os(IMAGES).filter(|dir| !dir.is_empty()) else {
            let message = format!(
                "\n*** NOT TESTED WITH python and numpy: run make demo, and set {IMAGES}=target/demo-images/1 ***\n"
            );
            let _ = std::io::stderr().write_all(message.as_bytes());
            return None;
        };
        if subject() != program::SNAPSHOTTER {
            return None;
        }
        let mut ground = Ground::new(name);
        let data = ground.sandbox.path("registry/data");
        ground.registry.stop();
        run_ok(
            std::process::Command::new("cp")
                .args(["-a", "-T"])
                .arg(&storage)
                .arg(&data),
        );
        ground.registry.restart();
        Some(ground)
    }

    pub fn machine(&self, name: &str, index: &str) -> Machine {
        self.machine_with(name, index, &[])
    }

    /// One that knows other registries as well.
    pub fn machine_with(&self, name: &str, index: &str, others: &[String]) -> Machine {
        let generation = Generation::two().unwrap_or(Generation::One);
        let sandbox = self.sandbox.machine(name);
        let containerd = Containerd::start(&sandbox, generation, &program::address_in(&sandbox));
        let index = index.replace("REGISTRY", &self.proxy.host());
        let more = format!("[index]\n{index}");
        let hosts = [&[self.proxy.host()], others].concat();
        let lazuli = Lazuli::start(&sandbox, &containerd.address, &hosts, &more);
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
            Generation::Two(_) => self.containerd.pull(reference, program::SNAPSHOTTER),
        }
        .expect_success()
    }

    pub fn sh(&self, reference: &str, script: &str) -> String {
        self.containerd.sh(reference, program::SNAPSHOTTER, script)
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
    if subject() != program::SNAPSHOTTER {
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
        let found = two.containerd.view(&reference, program::SNAPSHOTTER);
        compare(&expected.path, &found.path, &Options::default()).expect_equal();
    }
}

/// A key pair made by openssl.
pub fn keys(dir: &Path, name: &str) -> (PathBuf, PathBuf) {
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
    if subject() != program::SNAPSHOTTER {
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

/// The index of a plain tar with the names of another one.
pub fn false_index(tar: &[u8], names_of: &[u8]) -> Vec<u8> {
    let layer = Digest::of(tar);
    let chunks = tar.chunks(1 << 20).enumerate().map(|(n, bytes)| Chunk {
        data_offset: (n << 20) as u64,
        data_len: bytes.len() as u32,
        blob_offset: (n << 20) as u64,
        blob_len: bytes.len() as u32,
        skip: 0,
        digest: Digest::of(bytes),
    });
    let mut indexer = TarIndexer::new();
    indexer.push(names_of).unwrap();
    let layout = indexer.finish().unwrap();
    let index = layout.into_index(Access::Ranges, Codec::None, chunks.collect(), tar.len() as u64);
    portable::pack(&layer, &index.unwrap(), &Windows::new()).unwrap()
}

#[test]
fn a_false_index_is_found_out_and_not_used_again() {
    if subject() != program::SNAPSHOTTER {
        return;
    }
    let ground = Ground::new("false_index");
    let layer = |name: &str| Layer::of(Compression::None, [Entry::file(name, noise(5, 600_000))]);
    let (right, wrong) = (layer("honest"), layer("forged"));
    let image = Image::new(
        Flavour::Oci,
        vec![Layer::of(Compression::Gzip, base_entries()), right.clone()],
    );
    let (first, second) = (ground.push(&image, "demo/app:1"), ground.push(&image, "demo/other:1"));
    let bytes = false_index(&right.blob.bytes, &wrong.blob.bytes);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let registry = Client::new(&RegistryConfig::default(), Default::default()).unwrap();
        let target = Target::Repository(LayerSource {
            host: ground.registry.host(),
            repository: "cluster/index".to_owned(),
        });
        let indexes = [(Digest::of(&right.blob.bytes), bytes.into())];
        push(&registry, &target, None, &indexes).await.unwrap();
    });
    let mut machine = ground.machine("a", "repository = \"REGISTRY/cluster/index\"");
    machine.pull(&first);
    assert_eq!(machine.layer(&right.blob.digest)["index"]["source"], "shared");
    // It is believed, and shows what it says ...
    assert_eq!(
        machine.sh(
            &first,
            "wc -c < /forged; sha256sum /forged > /dev/null; cat /*ged > /dev/null"
        ),
        "600000\n"
    );
    // ... until all of the layer is here.
    let verified = || machine.layer(&right.blob.digest)["index"]["verified"].as_bool();
    assert_eq!(
        wait_until(3 * PATIENCE, verified),
        Some(false),
        "{}",
        machine.lazuli.log()
    );
    assert!(
        machine.lazuli.log().contains("its shared index is FALSE"),
        "{}",
        machine.lazuli.log()
    );
    // Nothing new is built on it, and the next start reads the layer itself.
    machine.lazuli.restart();
    let source = || {
        let status = machine.lazuli.status();
        let layers = status["layers"].as_array()?;
        let layer = layers.iter().find(|layer| layer["digest"] == right.blob.digest)?;
        (layer["index"]["source"] == "built").then_some(())
    };
    wait_until(PATIENCE, source).unwrap_or_else(|| panic!("{}", machine.lazuli.log()));
    let again = || {
        run(
            &mut machine
                .containerd
                .ctr(&["snapshots", "--snapshotter", program::SNAPSHOTTER, "ls"]),
            PATIENCE,
        )
    };
    wait_until(PATIENCE, || again().success().then_some(())).expect("containerd does not find the daemon again");
    machine.pull(&second);
    assert_eq!(machine.sh(&second, "wc -c < /honest"), "600000\n");
}

#[test]
fn a_python_with_numpy_starts_with_a_fifth_of_its_bytes() {
    let Some(ground) = Ground::with_demo_images("shared_numpy") else {
        return;
    };
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
