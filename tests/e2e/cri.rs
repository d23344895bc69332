//! Pods: containerd's CRI plugin on Lazuli, asked as kubelet asks it (`crictl`).
//!
//! `make test-cri` builds what Debian lacks (crictl, and a runc that knows pods in user namespaces) and names their directory in `LAZULI_CRI`.
//! Nothing else runs these tests: building takes minutes. Pods have a network of their own, of a pair of interfaces and addresses that are meant for
//! documentation, and no way out.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::apply::private_registry;
use crate::stage::Stage;
use crate::support::containerd::{Containerd, DIFFER, Generation};
use crate::support::image::{Compression, Flavour, Image, Layer, base_entries, ordinary};
use crate::support::lazuli::{self, Lazuli};
use crate::support::sandbox::{
    COMMAND_TIMEOUT, Finished, PATIENCE, Sandbox, mounts_below, require_program, run, run_ok, wait_until,
};
use crate::support::tar::{Entry, noise};

/// What containerd calls the namespace of pods.
const NAMESPACE: &str = "k8s.io";
/// The image of sandboxes.
const PAUSE: &str = "pause.example/pause:1";
/// Where ids of pods begin on the host.
const FIRST: u32 = 200_000;
/// Files of the image, and bytes of each, that do not compress.
const FILES: u64 = 50;
const FILE: usize = 1_000_000;
/// Bytes that a container may have of its own before it writes anything.
const COPIED_MAX: u64 = 1 << 20;

/// Where the programs are.
fn program(name: &str) -> PathBuf {
    let dir = std::env::var_os("LAZULI_CRI").expect("LAZULI_CRI names a directory with crictl and runc: make test-cri");
    PathBuf::from(dir).join(name)
}

/// The containerd of these tests: a newer one than Debian's, which knows user namespaces of pods.
fn generation() -> Generation {
    Generation::two().expect("pods need containerd 2.x")
}

/// What containerd is told of pods. Plugins that are named here are not switched off.
fn configuration(sandbox: &Sandbox) -> String {
    let networks = sandbox.dir("networks");
    let network = json!({
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [{
            "type": "ptp",
            "ipam": {
                "type": "host-local",
                "subnet": "192.0.2.0/24",
                "dataDir": sandbox.dir("addresses"),
            },
        }],
    });
    std::fs::write(networks.join("10-pods.conflist"), network.to_string()).unwrap();
    format!(
        r#"
[plugins."io.containerd.grpc.v1.cri"]
  disable_tcp_service = true
[plugins."io.containerd.podsandbox.controller.v1.podsandbox"]
[plugins."io.containerd.grpc.v1.sandbox-controllers"]
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "{snapshotter}"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "{PAUSE}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "{networks}"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
      BinaryName = "{runc}"
"#,
        snapshotter = lazuli::SNAPSHOTTER,
        networks = networks.display(),
        runc = program("runc").display(),
    )
}

/// `crictl` at a containerd.
struct Pods<'a> {
    containerd: &'a Containerd,
    sandbox: &'a Sandbox,
    /// Pods that are there.
    ids: Vec<String>,
}

impl<'a> Pods<'a> {
    fn new(containerd: &'a Containerd, sandbox: &'a Sandbox) -> Self {
        let ready = wait_until(PATIENCE, || {
            let info = run(&mut crictl(containerd, &["info"]), PATIENCE);
            let info: Value = serde_json::from_slice(&info.stdout).unwrap_or_default();
            let conditions = info["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let is_ready = |wanted| conditions.iter().any(|is| is["type"] == wanted && is["status"] == true);
            (is_ready("RuntimeReady") && is_ready("NetworkReady")).then_some(())
        });
        assert!(ready.is_some(), "the CRI plugin is not ready: {}", containerd.log());
        Pods {
            containerd,
            sandbox,
            ids: Vec::new(),
        }
    }

    fn pull(&self, reference: &str, more: &[&str]) -> Finished {
        let arguments = [&["pull"], more, &[reference]].concat();
        run(&mut crictl(self.containerd, &arguments), COMMAND_TIMEOUT)
    }

    /// What both a pod and its container are told.
    fn security(first: Option<u32>) -> Value {
        let Some(first) = first else {
            return json!({ "namespace_options": { "pid": 1 } });
        };
        let ids = json!([{ "host_id": first, "container_id": 0, "length": 65536 }]);
        json!({ "namespace_options": { "pid": 1, "userns_options": { "mode": 0, "uids": ids, "gids": ids } } })
    }

    fn write(&self, name: &str, value: &Value) -> PathBuf {
        let path = self.sandbox.path(name);
        std::fs::write(&path, value.to_string()).unwrap();
        path
    }

    /// Runs a pod with a container that runs a script and stays; the id of the container, and where its output goes.
    fn run(&mut self, reference: &str, first: Option<u32>, script: &str) -> (String, PathBuf) {
        let name = self.containerd.new_id();
        let logs = self.sandbox.dir(format!("logs/{name}"));
        let pod = json!({
            "metadata": { "name": name, "namespace": "test", "uid": name, "attempt": 1 },
            "log_directory": logs,
            "linux": { "security_context": Self::security(first) },
        });
        let container = json!({
            "metadata": { "name": "one" },
            "image": { "image": reference },
            "command": ["sh", "-c", format!("{script}; echo done; exec sleep 100000")],
            "log_path": "one.log",
            "linux": { "security_context": Self::security(first) },
        });
        let pod = self.write("pod.json", &pod).display().to_string();
        let container = self.write("container.json", &container).display().to_string();
        let id = run_ok(&mut crictl(self.containerd, &["runp", &pod]))
            .text()
            .trim()
            .to_owned();
        self.ids.push(id.clone());
        let made = run_ok(&mut crictl(self.containerd, &["create", &id, &container, &pod]));
        let made = made.text().trim().to_owned();
        run_ok(&mut crictl(self.containerd, &["start", &made]));
        (made, logs.join("one.log"))
    }

    fn end(&mut self) {
        for id in self.ids.drain(..) {
            run_ok(&mut crictl(self.containerd, &["rmp", "--force", &id]));
        }
    }
}

impl Drop for Pods<'_> {
    fn drop(&mut self) {
        // After a failure; interfaces and shims of pods go with them only.
        for id in &self.ids {
            run(&mut crictl(self.containerd, &["rmp", "--force", id]), PATIENCE);
        }
    }
}

fn crictl(containerd: &Containerd, arguments: &[&str]) -> Command {
    let mut command = Command::new(program("crictl"));
    let address = format!("unix://{}", containerd.address.display());
    command.args(["--config", "/dev/null", "--timeout", "60s"]);
    command.args(["--runtime-endpoint", &address, "--image-endpoint", &address]);
    command.args(arguments);
    command
}

/// What a container has said, line by line, when it is done.
fn said(log: &Path) -> Vec<String> {
    let done = wait_until(PATIENCE, || {
        let text = std::fs::read_to_string(log).unwrap_or_default();
        // "<time> stdout F <line>"
        let lines: Vec<String> = text
            .lines()
            .map(|line| line.splitn(4, ' ').nth(3).unwrap_or_default().to_owned())
            .collect();
        (lines.last().map(String::as_str) == Some("done")).then_some(lines)
    });
    let mut lines = done.unwrap_or_else(|| panic!("the container is not done: {:?}", std::fs::read_to_string(log)));
    lines.pop();
    lines
}

/// Has the image of sandboxes come out of a file, as a node has it that was made with it.
fn import_pause(stage: &Sandbox, containerd: &Containerd) {
    let image = Image::running(
        Flavour::Oci,
        vec![Layer::of(Compression::Gzip, base_entries())],
        &["sleep", "100000"],
    );
    let (layout, file) = (stage.dir("pause"), stage.path("pause.tar"));
    image.write_layout(&layout, PAUSE);
    run_ok(
        Command::new(require_program("tar"))
            .arg("-C")
            .arg(&layout)
            .arg("-cf")
            .arg(&file)
            .arg("."),
    );
    let file = file.display().to_string();
    let import = ["images", "import", "--snapshotter", lazuli::SNAPSHOTTER, &file];
    containerd.in_namespace(NAMESPACE).ctr_ok(&import);
}

fn until_nothing_is_mapped(lazuli: &Lazuli) {
    let snapshots = lazuli.root().join("snapshots");
    let mapped = || {
        let mounts = mounts_below(&snapshots).into_iter();
        mounts
            .filter(|path| path.parent().is_some_and(|parent| parent.ends_with("lower")))
            .collect::<Vec<_>>()
    };
    let gone = wait_until(PATIENCE, || mapped().is_empty().then_some(()));
    assert!(gone.is_some(), "still mounted: {:?}", mapped());
}

#[test]
#[ignore = "make test-cri"]
fn a_pod_in_a_user_namespace_copies_nothing_and_fetches_what_it_reads() {
    let stage = Stage::configured("a_pod_in_a_user_namespace", generation(), configuration, "");
    import_pause(&stage.sandbox, &stage.containerd);
    let files = (0..FILES).map(|at| Entry::file(format!("data/{at}"), noise(at, FILE)).owner(1000, 50));
    let mut entries = vec![Entry::dir("data")];
    entries.extend(files);
    entries.push(Entry::file("data/beyond", "beyond").owner(70_000, 65_536));
    let layers = [base_entries(), entries].map(|entries| Layer::of(Compression::Gzip, entries));
    let image = Image::new(Flavour::Oci, layers.into());
    let reference = stage.push_converted(&image, "cri/users:1", &["--estargz"]);
    let mut pods = Pods::new(&stage.containerd, &stage.sandbox);
    pods.pull(&reference, &[]).expect_success();
    let lazuli = stage.lazuli.as_ref().unwrap();
    let script = "cat /proc/self/uid_map; stat -c '%u %g' / /data/7 /data/beyond; sha256sum </data/7; echo mine >/data/mine; stat -c '%u %g' /data/mine";
    let mut seen = Vec::new();
    for first in [None, Some(FIRST), Some(FIRST + 65_536)] {
        let (id, log) = pods.run(&reference, first, script);
        let mut lines = said(&log);
        let map = lines.remove(0);
        let map: Vec<u32> = map.split_whitespace().map(|id| id.parse().unwrap()).collect();
        assert_eq!(map[..2], [0, first.unwrap_or(0)], "{map:?}");
        if first.is_some() {
            // Ids outside of the mapping.
            assert_eq!(lines.remove(2), "65534 65534");
            let usage = stage.containerd.in_namespace(NAMESPACE);
            let usage = usage.ctr_ok(&["snapshots", "--snapshotter", lazuli::SNAPSHOTTER, "usage", "-b", &id]);
            let usage = usage.text();
            let bytes = usage.lines().nth(1).and_then(|line| line.split_whitespace().nth(1));
            let bytes: u64 = bytes.unwrap_or_else(|| panic!("no usage: {usage}")).parse().unwrap();
            assert!(bytes < COPIED_MAX, "{bytes} bytes were copied");
        } else {
            assert_eq!(lines.remove(2), "70000 65536");
        }
        seen.push(lines);
    }
    assert_eq!(seen[0][..2], ["0 0", "1000 50"]);
    assert!(seen.iter().all(|lines| *lines == seen[0]), "{seen:?}");
    let fetched: u64 = lazuli.status()["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|layer| layer["fetched_bytes"].as_u64().unwrap_or(0))
        .sum();
    assert!(
        fetched < FILES * FILE as u64 / 5,
        "{fetched} bytes of {FILES} MB were fetched"
    );
    pods.end();
    until_nothing_is_mapped(lazuli);
}

#[test]
#[ignore = "make test-cri"]
fn a_private_image_that_only_kubelet_has_the_password_of() {
    let sandbox = Sandbox::new("a_private_image_of_a_pod");
    let image = ordinary(Flavour::Oci, Compression::Gzip);
    let (_runtime, registry) = private_registry(&image);
    let address = lazuli::address_in(&sandbox);
    let more = configuration(&sandbox);
    let containerd = Containerd::start_with(&sandbox, generation(), &address, DIFFER, &more);
    let lazuli = Lazuli::start(&sandbox, &containerd.address, &[registry.host()], "");
    import_pause(&sandbox, &containerd);
    let reference = format!("{}/private/app:1", registry.host());
    let mut pods = Pods::new(&containerd, &sandbox);
    assert!(!pods.pull(&reference, &[]).success(), "the registry is open");
    pods.pull(&reference, &["--creds", "someone:s3cret"]).expect_success();
    let (_, log) = pods.run(&reference, None, "sha256sum < /app/data/large.bin");
    assert_eq!(said(&log)[0].len(), 64 + "  -".len());
    // Its layers are Lazuli's, and so are those of the image of sandboxes: nothing is unpacked.
    let log = lazuli.log();
    assert!(!log.contains("is unpacked by containerd's own differ"), "{log}");
    let status = lazuli.status();
    let live: Vec<&str> = status["layers"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|layer| layer["digest"].as_str())
        .collect();
    let is_live = |layer: &Layer| live.contains(&layer.blob.digest.as_str());
    assert!(image.layers.iter().all(is_live), "{live:?}");
    pods.end();
}

/// A node whose image of sandboxes is there from the beginning, and a registry that takes connections and never says a word.
#[test]
#[ignore = "make test-cri"]
fn a_sandbox_of_an_image_that_is_there_asks_nobody() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    silent.set_nonblocking(true).unwrap();
    let sandbox = Sandbox::new("a_sandbox_asks_nobody");
    let address = lazuli::address_in(&sandbox);
    let more = configuration(&sandbox);
    let containerd = Containerd::start_with(&sandbox, generation(), &address, DIFFER, &more);
    let host = PAUSE.split('/').next().unwrap();
    let lazuli = Lazuli::start(&sandbox, &containerd.address, &[host.to_owned()], "");
    let hosts = sandbox.dir("certs.d").join(host);
    std::fs::create_dir_all(&hosts).unwrap();
    let server = format!("server = \"http://{}\"\n", silent.local_addr().unwrap());
    std::fs::write(hosts.join("hosts.toml"), server).unwrap();
    import_pause(&sandbox, &containerd);
    let mut pods = Pods::new(&containerd, &sandbox);
    let (_, log) = pods.run(PAUSE, None, "echo here");
    assert_eq!(said(&log), ["here"]);
    assert_eq!(lazuli.status()["layers"].as_array().map_or(0, Vec::len), 1);
    let asked = silent.accept().map(|(_, from)| from);
    assert!(asked.is_err(), "the registry was asked");
    pods.end();
}
