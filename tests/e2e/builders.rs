//! Programs that build images on containerd, or do with them what docker does: nerdctl and BuildKit, on a lazy base. They are skipped, and counted, where
//! they are not installed.

use std::path::Path;
use std::process::Command;

use crate::stage::{Stage, subject};
use crate::support::containerd::{Generation, NAMESPACE};
use crate::support::image::{Compression, Flavour, ordinary};
use crate::support::lazuli::SNAPSHOTTER;
use crate::support::proxy::total_bytes;
use crate::support::sandbox::{COMMAND_TIMEOUT, PATIENCE, Process, listens_unix, run, run_ok};
use crate::support::skip::{Ability, skipped};

/// Whether all these programs are in `PATH`.
fn have(ability: Ability, programs: &[&str]) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let there = |program: &&str| std::env::split_paths(&path).any(|dir| dir.join(program).is_file());
    let missing: Vec<&str> = programs.iter().copied().filter(|program| !there(program)).collect();
    if !missing.is_empty() {
        skipped(ability, format!("{} is not in PATH", missing.join(", ")));
    }
    missing.is_empty()
}

/// A lazy image that is not pulled yet, its reference and the size of its blobs.
fn stage(name: &str) -> Option<(Stage, String, u64)> {
    let generation = Generation::two()?;
    if subject() != SNAPSHOTTER {
        return None;
    }
    let stage = Stage::new(name, generation);
    let lazy = stage.converted(&ordinary(Flavour::Oci, Compression::Gzip), &["--estargz"]);
    let size = lazy.layers.iter().map(|layer| layer.blob.bytes.len() as u64).sum();
    let reference = stage.push(&lazy, "builders/base:1");
    stage.proxy.take();
    Some((stage, reference, size))
}

/// A command that finds the containerd of the stage, its shim and runc.
fn command(stage: &Stage, program: &str) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let containerd = stage.containerd.generation.program("containerd");
    let first = containerd.parent().unwrap_or(Path::new("/usr/bin")).display();
    let mut command = Command::new(program);
    command.env("PATH", format!("{first}:{path}:/usr/sbin:/usr/bin:/sbin:/bin"));
    command
}

fn nerdctl(stage: &Stage, arguments: &[&str]) -> Command {
    let data = stage.sandbox.dir("nerdctl");
    let mut nerdctl = command(stage, "nerdctl");
    nerdctl.arg("--address").arg(&stage.containerd.address);
    nerdctl.args([
        "--namespace",
        NAMESPACE,
        "--snapshotter",
        SNAPSHOTTER,
        "--insecure-registry",
    ]);
    nerdctl
        .args([
            "--cgroup-manager",
            "cgroupfs",
            "--cni-path",
            "/nonexistent",
            "--data-root",
        ])
        .arg(data);
    nerdctl.args(arguments);
    nerdctl
}

#[test]
fn nerdctl_on_a_lazy_image() {
    if !have(Ability::Nerdctl, &["nerdctl"]) {
        return;
    }
    let Some((stage, reference, size)) = stage("nerdctl_on_a_lazy_image") else {
        return;
    };
    let nerdctl_ok = |arguments: &[&str]| {
        let finished = run(&mut nerdctl(&stage, arguments), 2 * COMMAND_TIMEOUT);
        finished.expect_success().text()
    };
    nerdctl_ok(&["pull", "--quiet", &reference]);
    let bytes = total_bytes(&stage.blob_requests());
    assert!(bytes < size / 2, "{bytes} bytes of {size} came for the pull");
    let run_it = |image: &str, script: &str| nerdctl_ok(&["run", "--rm", "--net", "none", image, "sh", "-c", script]);
    let sum = run_it(&reference, "sha256sum < /app/data/large.bin");
    // It fetches what is missing by itself.
    let file = stage.sandbox.path("saved.tar");
    nerdctl_ok(&["save", "--output", file.to_str().unwrap(), &reference]);
    let name = stage.containerd.new_id();
    let change = "echo new > /app/data/new; rm /app/data/large.bin";
    nerdctl_ok(&["run", "--name", &name, "--net", "none", &reference, "sh", "-c", change]);
    let committed = format!("{}/builders/committed:1", stage.proxy.host());
    nerdctl_ok(&["commit", &name, &committed]);
    assert_eq!(
        run_it(
            &committed,
            "cat /app/data/new; test ! -e /app/data/large.bin && echo gone"
        ),
        "new\ngone\n"
    );
    nerdctl_ok(&["push", &committed]);
    nerdctl_ok(&["rm", &name]);
    nerdctl_ok(&["rmi", &reference, &committed]);
    nerdctl_ok(&["load", "--input", file.to_str().unwrap()]);
    assert_eq!(run_it(&reference, "sha256sum < /app/data/large.bin"), sum);
}

/// BuildKit fetches a base as a whole, whatever the snapshotter, unless that has a name that it knows; but builds on it, also on what is there lazily.
#[test]
fn buildkit_on_a_lazy_base() {
    if !have(Ability::Buildkit, &["buildkitd", "buildctl"]) {
        return;
    }
    let Some((stage, reference, _)) = stage("buildkit_on_a_lazy_base") else {
        return;
    };
    let dir = stage.sandbox.dir("buildkit");
    let address = dir.join("b.sock");
    let config = dir.join("buildkitd.toml");
    let text = format!(
        r#"root = "{dir}/root"
[grpc]
  address = ["unix://{address}"]
[worker.oci]
  enabled = false
[worker.containerd]
  enabled = true
  address = "{containerd}"
  namespace = "{NAMESPACE}"
  snapshotter = "{SNAPSHOTTER}"
  [worker.containerd.networkConfig]
    mode = "host"
[registry."{registry}"]
  http = true
"#,
        dir = dir.display(),
        address = address.display(),
        containerd = stage.containerd.address.display(),
        registry = stage.proxy.host(),
    );
    std::fs::write(&config, text).unwrap();
    let mut buildkitd = command(&stage, "buildkitd");
    let mut buildkitd: Process = stage.sandbox.spawn("buildkitd", buildkitd.arg("--config").arg(&config));
    buildkitd.wait_ready("its socket", PATIENCE, |_| listens_unix(&address));
    // The base is there already, as a container has it.
    stage.pull(&reference);
    let sum = stage.sh(&reference, "sha256sum < /app/data/large.bin");

    let context = stage.sandbox.dir("context");
    std::fs::write(context.join("file"), "copied").unwrap();
    let script = "sha256sum < /app/data/large.bin > /app/data/sum; rm /app/data/large.bin";
    std::fs::write(
        context.join("Dockerfile"),
        format!("FROM {reference}\nRUN [\"sh\", \"-c\", \"{script}\"]\nCOPY file /app/file\n"),
    )
    .unwrap();
    let built = format!("{}/builders/built:1", stage.proxy.host());
    let build = |output: &str| {
        let mut build = command(&stage, "buildctl");
        build.arg("--addr").arg(format!("unix://{}", address.display()));
        build.args(["build", "--progress", "plain", "--frontend", "dockerfile.v0"]);
        for local in ["context", "dockerfile"] {
            build.arg("--local").arg(format!("{local}={}", context.display()));
        }
        run(build.args(["--output", output]), 4 * COMMAND_TIMEOUT).expect_success()
    };
    build(&format!("type=image,name={built},push=true"));
    let layout = stage.sandbox.path("built.tar");
    build(&format!("type=oci,dest={}", layout.display()));
    let listed = run_ok(Command::new("tar").arg("-tf").arg(&layout)).text();
    assert!(listed.contains("oci-layout"), "{listed}");
    stage.pull(&built);
    assert_eq!(
        stage.sh(
            &built,
            "cat /app/data/sum /app/file; test ! -e /app/data/large.bin && echo gone"
        ),
        format!("{sum}copiedgone\n")
    );
    let mut prune = command(&stage, "buildctl");
    prune
        .arg("--addr")
        .arg(format!("unix://{}", address.display()))
        .args(["prune", "--all"]);
    run(&mut prune, COMMAND_TIMEOUT).expect_success();
    assert_eq!(stage.sh(&reference, "sha256sum < /app/data/large.bin"), sum);
    buildkitd.terminate(PATIENCE);
}
