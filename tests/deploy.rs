//! `deploy/`: the installer against a host that is a directory, and the configuration files against the programs that read them.
//!
//! The host's containerd is the real one, in a mount namespace where `/etc/containerd` is the fake host's; systemd is a script
//! that notes what it was told. Needs root, for the mount namespace, and containerd.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use lazuli::config::Config;

/// A configuration as a host may have it: settings, comments, another snapshotter.
const EXISTING_V2: &str = r#"# Managed by the platform team.
version = 2
oom_score = -500

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.internal/pause:3.9" # ours
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "crun"

[proxy_plugins.other]
  type = "snapshot"
  address = "/run/other.sock"
"#;

const EXISTING_V3: &str = r#"# Managed by the platform team.
version = 3
oom_score = -500

[plugins.'io.containerd.cri.v1.images']
  discard_unpacked_layers = true
  [plugins.'io.containerd.cri.v1.images'.registry]
    config_path = '/srv/certs.d'

[plugins.'io.containerd.transfer.v1.local']
  max_concurrent_downloads = 7

[proxy_plugins.other]
  type = 'snapshot'
  address = '/run/other.sock'
"#;

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The containerds that can be had: each with the configuration an administrator may have written for it.
fn containerds() -> Vec<(PathBuf, &'static str)> {
    let installed = Command::new("sh")
        .args(["-c", "command -v containerd"])
        .output()
        .unwrap();
    assert!(
        installed.status.success(),
        "containerd is not installed: deploy/setup test"
    );
    let installed = PathBuf::from(String::from_utf8(installed.stdout).unwrap().trim());
    let beside = std::env::var_os("LAZULI_CONTAINERD2").map(|dir| Path::new(&dir).join("usr/bin/containerd"));
    [Some(installed), beside]
        .into_iter()
        .flatten()
        .map(|program| {
            let existing = if is_first_generation(&program) {
                EXISTING_V2
            } else {
                EXISTING_V3
            };
            (program, existing)
        })
        .collect()
}

fn is_first_generation(containerd: &Path) -> bool {
    let version = Command::new(containerd).arg("--version").output().unwrap();
    let version = String::from_utf8(version.stdout).unwrap();
    let number = version
        .split_whitespace()
        .nth(2)
        .unwrap()
        .trim_start_matches('v')
        .to_owned();
    number.starts_with("1.")
}

/// A directory that is the root of a host.
struct Host {
    dir: tempfile::TempDir,
    // Lazuli's socket; it is there while this lives.
    _socket: UnixListener,
}

impl Host {
    fn new(containerd: &Path, config: Option<&str>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        for sub in ["etc/containerd", "run/lazuli", "etc/systemd/system"] {
            fs::create_dir_all(root.join(sub)).unwrap();
        }
        if let Some(config) = config {
            fs::write(root.join("etc/containerd/config.toml"), config).unwrap();
        }
        fs::write(root.join("systemctl.log"), "").unwrap();
        fs::write(root.join("mountinfo"), "").unwrap();
        let exec = format!(
            r#"#!/bin/sh
set -eu
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
root={root}
case $1 in
    systemctl)
        shift
        echo "$*" >>"$root/systemctl.log"
        case $* in
            'is-active --quiet lazuli') test -e "$root/active" ;;
            'start lazuli') : >"$root/active" ;;
        esac ;;
    containerd)
        shift
        exec unshare -m sh -c 'mount --bind "$0" /etc/containerd && exec "$@"' "$root/etc/containerd" {containerd} "$@" ;;
    cat) cat "$root/mountinfo" ;;
    /usr/local/bin/lazuli)
        echo "$*" >>"$root/systemctl.log"
        test ! -e "$root/stuck" ;;
    # What is left mounted is looked for on the host; this one has nothing mounted.
    sh) : ;;
    *) echo "unexpected: $*" >&2; exit 99 ;;
esac
"#,
            root = root.display(),
            containerd = containerd.display()
        );
        fs::write(root.join("exec"), exec).unwrap();
        fs::set_permissions(root.join("exec"), fs::Permissions::from_mode(0o755)).unwrap();
        let socket = UnixListener::bind(root.join("run/lazuli/lazuli.sock")).unwrap();
        // The mount point of the namespace; containerd's package has it.
        fs::create_dir_all("/etc/containerd").unwrap();
        Host { dir, _socket: socket }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path.trim_start_matches('/'))
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    fn run(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Output {
        Command::new(repository().join("deploy/install"))
            .args(arguments)
            .env("HOST_ROOT", self.dir.path())
            .env("HOST_EXEC", self.path("exec"))
            .env("LAZULI_BINARY", env!("CARGO_BIN_EXE_lazuli"))
            .envs(environment.iter().copied())
            .output()
            .unwrap()
    }

    #[track_caller]
    fn install(&self) -> String {
        let output = self.run(&[], &[]);
        assert!(output.status.success(), "{}", text(&output));
        text(&output)
    }

    /// What systemd was told since the last call, without questions.
    fn told(&self) -> Vec<String> {
        let log = self.read("systemctl.log");
        fs::write(self.path("systemctl.log"), "").unwrap();
        log.lines()
            .filter(|line| !line.starts_with("is-active"))
            .map(str::to_owned)
            .collect()
    }

    /// What containerd makes of its configuration.
    #[track_caller]
    fn effective(&self) -> String {
        let output = Command::new(self.path("exec"))
            .args([
                "containerd",
                "--config",
                "/etc/containerd/config.toml",
                "config",
                "dump",
            ])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", text(&output));
        // 1.x writes double quotes, 2.x single ones.
        String::from_utf8(output.stdout).unwrap().replace('\'', "\"")
    }

    /// Every file under `etc` and `usr` with its inode and change time: equal if nothing was written.
    fn state(&self) -> Vec<(PathBuf, u64, i64, i64)> {
        let mut found = Vec::new();
        let mut dirs = vec![self.path("etc"), self.path("usr")];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let entry = entry.unwrap();
                let meta = entry.metadata().unwrap();
                if meta.is_dir() {
                    dirs.push(entry.path());
                } else {
                    found.push((entry.path(), meta.ino(), meta.ctime(), meta.ctime_nsec()));
                }
            }
        }
        found.sort();
        found
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn a_second_run_changes_nothing() {
    for (containerd, _) in containerds() {
        let host = Host::new(&containerd, None);
        host.install();
        assert_eq!(
            host.told(),
            [
                "daemon-reload",
                "enable --quiet lazuli",
                "start lazuli",
                "restart containerd"
            ]
        );
        assert!(host.effective().contains("[proxy_plugins.lazuli]"));
        assert_eq!(
            fs::read(host.path("usr/local/bin/lazuli")).unwrap(),
            fs::read(env!("CARGO_BIN_EXE_lazuli")).unwrap()
        );

        let before = host.state();
        host.install();
        assert_eq!(host.state(), before);
        assert_eq!(host.told(), ["enable --quiet lazuli"]);
    }
}

#[test]
fn an_existing_configuration_survives_and_comes_back() {
    for (containerd, existing) in containerds() {
        let host = Host::new(&containerd, Some(existing));
        let before = host.effective();
        host.install();
        let config = host.read("etc/containerd/config.toml");
        let (added, rest) = config.split_once('\n').unwrap();
        assert!(added.starts_with("imports = ["), "{added}");
        assert_eq!(rest, existing);

        let after = host.effective();
        assert!(after.contains("[proxy_plugins.lazuli]"), "{after}");
        for line in before.lines().filter(|line| !line.trim_start().starts_with("imports")) {
            assert!(after.contains(line), "{line} is lost");
        }

        let output = host.run(&["--remove"], &[]);
        assert!(output.status.success(), "{}", text(&output));
        assert_eq!(host.read("etc/containerd/config.toml"), existing);
        assert!(!host.path("etc/containerd/conf.d/lazuli.toml").exists());
        assert!(!host.path("usr/local/bin/lazuli").exists());
        assert!(host.path("etc/lazuli/config.toml").exists());
        let told = host.told();
        assert!(told.contains(&"disable --quiet --now lazuli".to_owned()), "{told:?}");
    }
}

/// The image of the DaemonSet has no other tools.
#[test]
fn the_installer_needs_nothing_but_busybox() {
    let (containerd, existing) = containerds().remove(0);
    let host = Host::new(&containerd, Some(existing));
    let tools = tempfile::tempdir().unwrap();
    let installed = Command::new("busybox")
        .args(["--install", "-s"])
        .arg(tools.path())
        .status();
    assert!(installed.unwrap().success());
    for arguments in [&[][..], &[], &["--remove"]] {
        let output = Command::new(tools.path().join("sh"))
            .arg(repository().join("deploy/install"))
            .args(arguments)
            .env("PATH", tools.path())
            .env("HOST_ROOT", host.dir.path())
            .env("HOST_EXEC", host.path("exec"))
            .env("LAZULI_BINARY", env!("CARGO_BIN_EXE_lazuli"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", text(&output));
        assert!(!text(&output).contains("not found"), "{}", text(&output));
    }
    let restarts = host.told().iter().filter(|line| *line == "restart containerd").count();
    assert_eq!(restarts, 2, "one for the installation, one for the removal");
    assert_eq!(host.read("etc/containerd/config.toml"), existing);
}

#[test]
fn what_cannot_be_done_safely_is_refused_and_undone() {
    for (containerd, existing) in containerds() {
        let elsewhere = format!("imports = [\"/srv/containerd.d/*.toml\"]\n{existing}");
        for (config, expected) in [
            (elsewhere.as_str(), "has imports, but not of /etc/containerd/conf.d"),
            (
                "version = 2\n[plugins\n",
                "does not accept /etc/containerd/config.toml as it is",
            ),
        ] {
            let host = Host::new(&containerd, Some(config));
            let output = host.run(&[], &[]);
            assert!(!output.status.success(), "{}", text(&output));
            assert!(text(&output).contains(expected), "{}", text(&output));
            assert_eq!(host.read("etc/containerd/config.toml"), config);
            assert!(!host.path("etc/containerd/conf.d/lazuli.toml").exists());
            assert!(!host.told().contains(&"restart containerd".to_owned()));
        }
    }
}

#[test]
fn lazuli_becomes_the_default_only_where_a_drop_in_can_say_so() {
    for (containerd, existing) in containerds() {
        let host = Host::new(&containerd, Some(existing));
        let output = host.run(&[], &[("LAZULI_DEFAULT", "yes")]);
        if is_first_generation(&containerd) {
            assert!(
                text(&output).contains("LAZULI_DEFAULT needs containerd 2.x"),
                "{}",
                text(&output)
            );
            assert_eq!(host.read("etc/containerd/config.toml"), existing);
        } else {
            assert!(output.status.success(), "{}", text(&output));
            let effective = host.effective();
            assert!(effective.contains("snapshotter = \"lazuli\"\n"), "{effective}");
            assert!(effective.contains("config_path = \"/srv/certs.d\""), "{effective}");
        }
    }
}

#[test]
fn an_interrupted_run_is_finished_by_the_next() {
    let (containerd, existing) = containerds().remove(0);
    let host = Host::new(&containerd, Some(existing));
    host.install();
    host.told();
    fs::write(host.path("etc/lazuli/.containerd-restart-pending"), "").unwrap();
    host.install();
    assert!(host.told().contains(&"restart containerd".to_owned()));
    host.install();
    assert!(!host.told().contains(&"restart containerd".to_owned()));
}

#[test]
fn a_running_daemon_and_its_configuration_are_left_alone() {
    let (containerd, existing) = containerds().remove(0);
    let host = Host::new(&containerd, Some(existing));
    host.install();
    host.told();
    let own = "[log]\nlevel = \"debug\"\n";
    fs::write(host.path("etc/lazuli/config.toml"), own).unwrap();
    fs::write(host.path("usr/local/bin/lazuli"), "an older version").unwrap();
    let said = host.install();
    assert!(said.contains("has taken over"), "{said}");
    assert_eq!(host.told(), ["enable --quiet lazuli", "/usr/local/bin/lazuli upgrade"]);
    fs::write(host.path("usr/local/bin/lazuli"), "an older version").unwrap();
    fs::write(host.path("stuck"), "").unwrap();
    let said = host.install();
    assert!(said.contains("goes on as it was"), "{said}");
    assert!(!host.told().iter().any(|command| command.contains("restart")));
    assert_eq!(host.read("etc/lazuli/config.toml"), own);

    // Containers that read through it also keep it from being removed.
    fs::write(
        host.path("mountinfo"),
        "99 1 0:99 / /run/x rw - overlay overlay rw,lowerdir=l/1,upperdir=/var/lib/containerd/io.containerd.snapshotter.v1.lazuli/snapshots/2/fs\n",
    )
    .unwrap();
    let refused = host.run(&["--remove"], &[]);
    assert!(!refused.status.success(), "{}", text(&refused));
    assert!(host.path("etc/containerd/conf.d/lazuli.toml").exists());
}

#[test]
fn the_sample_configuration_is_the_default_and_is_complete() {
    let text = fs::read_to_string(repository().join("deploy/config.toml")).unwrap();
    let path = Path::new("deploy/config.toml");
    assert_eq!(Config::parse(&text, path).unwrap(), Config::default());

    // With every option switched on it still says the defaults, but for the three that have none.
    let mut all = String::new();
    for line in text.lines() {
        match line.strip_prefix('#') {
            Some(option) if !option.starts_with(' ') => all.push_str(option),
            _ => all.push_str(line),
        }
        all.push('\n');
    }
    let mut config = Config::parse(&all, path).unwrap();
    assert!(config.registry.docker_config.take().is_some());
    assert!(!std::mem::take(&mut config.registry.hosts).is_empty());
    assert!(!std::mem::take(&mut config.registry.credentials).is_empty());
    assert_eq!(config, Config::default());

    let options: toml::Table = toml::from_str(&all).unwrap();
    let defaults = toml::Table::try_from(Config::default()).unwrap();
    for (key, value) in &defaults {
        let there = options.get(key).unwrap_or_else(|| panic!("{key} is missing"));
        for inner in value.as_table().into_iter().flatten().map(|(inner, _)| inner) {
            assert!(there.get(inner).is_some(), "{key}.{inner} is missing");
        }
    }
}

#[test]
fn containerd_accepts_the_whole_configuration_files() {
    for (containerd, _) in containerds() {
        let name = if is_first_generation(&containerd) {
            "v2.toml"
        } else {
            "v3.toml"
        };
        let config = fs::read_to_string(repository().join("deploy/containerd").join(name)).unwrap();
        let host = Host::new(&containerd, Some(&config));
        fs::create_dir(host.path("etc/containerd/conf.d")).unwrap();
        if name == "v3.toml" {
            fs::copy(
                repository().join("deploy/containerd/lazuli.toml"),
                host.path("etc/containerd/conf.d/lazuli.toml"),
            )
            .unwrap();
        }
        let effective = host.effective();
        assert!(
            effective.contains("address = \"/run/lazuli/lazuli.sock\""),
            "{effective}"
        );
    }
}
