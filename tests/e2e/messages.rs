//! What people and probes are told while something is wrong, and how commands of a real machine end in their middle.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use ::lazuli::sys::mountinfo::mount_at;

use crate::stage::{Stage, subject};
use crate::support::containerd::Generation;
use crate::support::image::{Compression, Flavour, Image, Layer, base_entries};
use crate::support::lazuli::{self, Lazuli, SNAPSHOTTER};
use crate::support::proxy::Link;
use crate::support::sandbox::{COMMAND_TIMEOUT, PATIENCE, Process, Sandbox, mounts_below, run, run_ok, wait_until};
use crate::support::tar::{Entry, noise};

/// A daemon whose HTTP face can be asked.
struct Node {
    lazuli: Lazuli,
    sandbox: Sandbox,
}

impl Node {
    fn new(name: &str) -> Self {
        let sandbox = Sandbox::new(name);
        let mut lazuli = Lazuli::start(&sandbox, &sandbox.path("no-containerd.sock"), &[], "");
        assert!(lazuli.stop());
        let config = std::fs::read_to_string(lazuli.config()).unwrap();
        let config = config.replace("admin_address = \"\"", "admin_address = \"127.0.0.1:0\"");
        std::fs::write(lazuli.config(), config).unwrap();
        lazuli.restart();
        Node { lazuli, sandbox }
    }

    /// Status and body of the answer to a GET.
    fn get(&self, path: &str) -> (u16, String) {
        let log = self.lazuli.log();
        let (_, address) = log.rsplit_once("metrics and health address=").unwrap();
        let address = address.split_whitespace().next().unwrap();
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    /// Waits until it is found out, and looks at all places that tell of it.
    fn expect_problem(&self, word: &str) {
        let unhealthy = || (self.get("/healthz").0 == 503).then_some(());
        wait_until(PATIENCE, unhealthy).expect("it is healthy without its mount");
        for path in ["/healthz", "/readyz"] {
            let (status, body) = self.get(path);
            assert!(
                status == 503 && body.contains(word) && body.contains("restart"),
                "{path}: {status} {body}"
            );
        }
        let problems = self.lazuli.status()["problems"].to_string();
        assert!(problems.contains(word), "{problems}");
        let text = run_ok(&mut self.lazuli.command("status", &[])).text();
        assert!(text.contains("PROBLEM: ") && text.contains(word), "{text}");
    }

    fn expect_well(&self) {
        assert_eq!(self.get("/healthz"), (200, "ok\n".to_owned()));
        assert_eq!(self.get("/readyz"), (200, "ready\n".to_owned()));
        assert_eq!(self.lazuli.status()["problems"], serde_json::json!([]));
    }

    fn mountpoint(&self) -> PathBuf {
        self.lazuli.root().join("fuse").canonicalize().unwrap()
    }
}

#[test]
fn health_knows_that_the_mount_is_gone() {
    let mut node = Node::new("health_knows_that_the_mount_is_gone");
    node.expect_well();
    run_ok(Command::new("umount").arg("-l").arg(node.mountpoint()));
    node.expect_problem("unmounted");
    assert!(node.lazuli.stop());
    node.lazuli.restart();
    node.expect_well();
}

/// The mount is out of sight, but somebody is in it: its connection goes on.
#[test]
fn health_knows_that_the_mount_is_out_of_sight() {
    let node = Node::new("health_knows_that_the_mount_is_out_of_sight");
    let inside = std::fs::File::open(node.mountpoint()).unwrap();
    run_ok(Command::new("umount").arg("-l").arg(node.mountpoint()));
    node.expect_problem("nothing is mounted");
    drop(inside);
}

#[test]
fn health_knows_that_something_is_mounted_over_the_mount() {
    let node = Node::new("health_knows_that_something_is_mounted_over_the_mount");
    run_ok(
        Command::new("mount")
            .args(["-t", "tmpfs", "tmpfs"])
            .arg(node.mountpoint()),
    );
    node.expect_problem("tmpfs is mounted");
    run_ok(Command::new("umount").arg(node.mountpoint()));
    node.expect_well();
}

#[test]
fn health_knows_that_the_connection_was_aborted() {
    let mut node = Node::new("health_knows_that_the_connection_was_aborted");
    let control = node.sandbox.dir("connections");
    run_ok(Command::new("mount").args(["-t", "fusectl", "fusectl"]).arg(&control));
    let mount = mount_at(&node.mountpoint()).unwrap().unwrap();
    std::fs::write(control.join(mount.minor.to_string()).join("abort"), "1").unwrap();
    node.expect_problem("aborted");
    assert!(node.lazuli.stop());
    node.lazuli.restart();
    node.expect_well();
}

/// Many ask at once, as a kubelet with several probes does: nobody gets a wrong answer because somebody else asks.
#[test]
fn probes_at_the_same_time_get_the_same_answer() {
    let node = Node::new("probes_at_the_same_time_get_the_same_answer");
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                for _ in 0..20 {
                    node.expect_well_by("/healthz");
                    node.expect_well_by("/readyz");
                }
            });
        }
    });
}

impl Node {
    fn expect_well_by(&self, path: &str) {
        assert_eq!(self.get(path).0, 200, "{path}");
    }
}

#[test]
fn the_daemon_ends_well_at_every_signal() {
    for signal in ["TERM", "INT", "HUP"] {
        let sandbox = Sandbox::new("the_daemon_ends_well_at_every_signal");
        let lazuli = Lazuli::start(&sandbox, &sandbox.path("no-containerd.sock"), &[], "");
        drop(lazuli);
        // Once more, by hand: with a log that cannot be written.
        let mut command = Command::new("env");
        command.arg("--default-signal").arg(lazuli::program());
        command.arg("serve").arg("--config").arg(sandbox.path("lazuli.toml"));
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let mut daemon = command.stderr(full).stdout(Stdio::null()).spawn().unwrap();
        let address = lazuli::address_in(&sandbox);
        let mut status = Command::new(lazuli::program());
        status.args(["status", "--address"]).arg(&address);
        let up = wait_until(PATIENCE, || run(&mut status, PATIENCE).success().then_some(()));
        up.expect("a log that cannot be written ends the daemon");
        // What is asked of it may be read by nobody, too.
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut closed = Command::new(lazuli::program());
        closed.args(["status", "--address"]).arg(&address).stdout(writer);
        assert_eq!(closed.status().unwrap().code(), Some(141));
        run_ok(Command::new("kill").args(["-s", signal, &daemon.id().to_string()]));
        let ended = wait_until(PATIENCE, || daemon.try_wait().unwrap());
        assert_eq!(ended.and_then(|status| status.code()), Some(0), "SIG{signal}");
        assert_eq!(mounts_below(sandbox.root()), Vec::<PathBuf>::new(), "SIG{signal}");
        assert!(!address.exists());
    }
}

#[test]
fn the_daemon_ends_well_while_it_starts() {
    let sandbox = Sandbox::new("the_daemon_ends_well_while_it_starts");
    // Writes its configuration.
    drop(Lazuli::start(&sandbox, &sandbox.path("no-containerd.sock"), &[], ""));
    for milliseconds in [0, 2, 5, 10, 20, 40, 80, 160] {
        let mut command = Command::new(lazuli::program());
        command.arg("serve").arg("--config").arg(sandbox.path("lazuli.toml"));
        let mut daemon = command.stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(milliseconds));
        run_ok(Command::new("kill").arg(daemon.id().to_string()));
        wait_until(PATIENCE, || daemon.try_wait().unwrap()).expect("it does not end");
        assert_eq!(
            mounts_below(sandbox.root()),
            Vec::<PathBuf>::new(),
            "after {milliseconds} ms"
        );
    }
}

/// An image with one layer that takes some seconds at `Link` below.
fn large() -> Image {
    let file = Entry::file("data/large", noise(7, 12_000_000));
    let layers = vec![
        Layer::of(Compression::Gzip, base_entries()),
        Layer::of(Compression::Gzip, [Entry::dir("data"), file]),
    ];
    Image::new(Flavour::Oci, layers)
}

const SLOW: Link = Link {
    latency: Duration::ZERO,
    bytes_per_second: Some(3_000_000),
};

/// Numbers of bytes that a bar has shown, as texts.
fn shown(text: &str) -> BTreeSet<String> {
    let before_slash = text.split('/').filter_map(|part| {
        let mut words = part.rsplit(' ');
        let (unit, number) = (words.next()?, words.next()?);
        (unit.ends_with("iB") && number.parse::<f64>().is_ok()).then(|| format!("{number} {unit}"))
    });
    before_slash.collect()
}

#[test]
fn the_bar_moves_by_bytes() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let stage = Stage::new("the_bar_moves_by_bytes", Generation::One);
    let reference = stage.push(&large(), "demo/large:1");
    stage.proxy.set_link(SLOW);
    // `script` gives it a terminal.
    let pull = format!(
        "stty cols 150; {} pull --config {} {reference}",
        lazuli::program().display(),
        stage.lazuli.as_ref().unwrap().config().display()
    );
    let mut script = Command::new("script");
    script.args(["-q", "-e", "-c", &pull, "/dev/null"]).env("TERM", "xterm");
    let text = run(&mut script, COMMAND_TIMEOUT).expect_success().text();
    assert!(shown(&text).len() >= 5, "{:?} in {text}", shown(&text));
    assert!(
        text.contains("iB/s, ") && text.contains(" left"),
        "neither rate nor time: {text}"
    );
    assert!(
        text.contains("1 of 2 layers") || text.contains("0 of 2 layers"),
        "{text}"
    );
}

#[test]
fn a_pull_says_that_the_daemon_cannot_be_asked() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let stage = Stage::new("a_pull_says_that_the_daemon_cannot_be_asked", Generation::One);
    let reference = stage.push(&large(), "demo/large:1");
    let lazuli = stage.lazuli.as_ref().unwrap();
    let config = std::fs::read_to_string(lazuli.config()).unwrap();
    let address = lazuli::address_in(&stage.sandbox).display().to_string();
    let elsewhere = stage.sandbox.path("elsewhere.sock").display().to_string();
    let path = stage.sandbox.path("elsewhere.toml");
    std::fs::write(&path, config.replace(&address, &elsewhere)).unwrap();
    let pull = |path: &Path| {
        let mut command = Command::new(lazuli::program());
        command.arg("pull").arg("--config").arg(path).arg(&reference);
        run(&mut command, COMMAND_TIMEOUT).expect_success().text()
    };
    let text = pull(&path);
    assert!(
        text.contains("taken by the daemon") && !text.contains("there already"),
        "{text}"
    );
    assert!(text.contains("cannot be told") && text.contains(&elsewhere), "{text}");
    let text = pull(&path);
    assert!(
        text.contains("there already") && text.contains("cannot be told"),
        "{text}"
    );
    let text = pull(&lazuli.config());
    assert!(!text.contains("cannot be told") && text.contains(" here, "), "{text}");
}

#[test]
fn a_pull_that_is_ended_leaves_nothing_in_containerd() {
    if subject() != SNAPSHOTTER {
        return;
    }
    for (signal, code) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
        let stage = Stage::new("a_pull_that_is_ended_leaves_nothing_in_containerd", Generation::One);
        let reference = stage.push(&large(), "demo/large:1");
        stage.proxy.set_link(SLOW);
        let lazuli = stage.lazuli.as_ref().unwrap();
        let mut pull: Process = stage.sandbox.spawn("pull", &mut lazuli.command("pull", &[&reference]));
        let loads = || {
            lazuli.status()["loading"]
                .as_array()
                .is_some_and(|all| !all.is_empty())
                .then_some(())
        };
        wait_until(PATIENCE, loads).expect("nothing is loaded");
        run_ok(Command::new("kill").args(["-s", signal, &pull.id().to_string()]));
        let ended = wait_until(PATIENCE, || pull.ended());
        assert_eq!(ended.and_then(|status| status.code()), Some(code), "{}", pull.log());
        assert!(pull.log().contains(&format!("SIG{signal}")), "{}", pull.log());
        let leases = stage.containerd.ctr_ok(&["leases", "ls", "-q"]).text();
        assert!(!leases.contains("lazuli-pull"), "{leases}");
        assert_eq!(stage.containerd.content(), Vec::<String>::new());
        assert_eq!(stage.containerd.snapshots(SNAPSHOTTER), Vec::<String>::new());
        // And is no hindrance to the next.
        stage.proxy.set_link(Link::default());
        lazuli.pull(&reference).expect_success();
    }
}
