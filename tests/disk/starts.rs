//! Starts of the program on a disk that has no room, or takes nothing: it serves, or says what is wrong and ends; and makes nothing worse, so that it
//! starts when the disk is well.

use std::fs;
use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::bad::fill_up;
use super::skip::{Ability, skipped};
use super::{Disk, run, until};

/// MiB of a disk; xfs is not made any smaller.
const SIZE: u64 = 320;

/// The daemon with its root directory on a disk, and everything else beside it.
struct Daemon {
    child: Child,
    socket: PathBuf,
}

impl Daemon {
    fn start(disk: &Disk) -> Self {
        let beside = disk.dir.path();
        let (config, socket) = (beside.join("config.toml"), beside.join("lazuli.sock"));
        let text = format!(
            "root = {:?}\naddress = {socket:?}\ncontainerd_address = {:?}\nadmin_address = \"\"\n[registry]\nconfig_path = []\n",
            disk.root().join("lazuli"),
            beside.join("containerd.sock"),
        );
        fs::write(&config, text).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_lazuli"));
        command.arg("serve").arg("--config").arg(&config);
        let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        Daemon { child, socket }
    }

    /// Waits until it serves, and ends it in order.
    fn serves(mut self, what: &str) {
        until(what, || {
            assert_eq!(self.child.try_wait().unwrap(), None, "{what}: it has ended");
            UnixStream::connect(&self.socket).is_ok()
        });
        run(Command::new("kill").args(["-s", "TERM", &self.child.id().to_string()]));
        assert!(self.child.wait().unwrap().success(), "{what}");
    }

    /// Waits until it ends by itself; what it said at last.
    fn refuses(mut self, what: &str) -> String {
        until(what, || self.child.try_wait().unwrap().is_some());
        assert_eq!(self.child.wait().unwrap().code(), Some(1), "{what}");
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        said.lines().last().unwrap_or_default().to_owned()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The file systems on disks that there are.
fn kinds() -> impl Iterator<Item = &'static str> {
    ["ext4", "xfs"].into_iter().filter(|kind| {
        let mkfs = format!("mkfs.{kind}");
        let is_there = Command::new(&mkfs).arg("-V").output().is_ok();
        if !is_there {
            skipped(Ability::Xfs, format!("there is no {mkfs}"));
        }
        is_there
    })
}

fn remount(root: &Path, how: &str) {
    run(Command::new("mount").args(["-o", &format!("remount,{how}")]).arg(root));
}

#[test]
fn a_start_on_a_full_disk_serves_or_says_so_and_the_next_one_serves() {
    for kind in kinds() {
        let disk = Disk::new(kind, SIZE);
        fill_up(&disk.root());
        // There is nothing yet, and no room to begin.
        for _ in 0..2 {
            let said = Daemon::start(&disk).refuses(kind);
            assert!(said.contains("No space left on device"), "{kind}: {said}");
            assert!(
                said.contains(disk.root().join("lazuli").to_str().unwrap()),
                "{kind}: {said}"
            );
            assert!(!said.contains("begin anew"), "{kind}: {said}");
        }
        fs::remove_file(disk.root().join("somebody-elses")).unwrap();
        Daemon::start(&disk).serves(kind);
        // What there is, is enough.
        fill_up(&disk.root());
        Daemon::start(&disk).serves(kind);
    }
}

#[test]
fn a_start_on_a_disk_that_is_read_only_says_so_and_the_next_one_serves() {
    for kind in kinds() {
        let disk = Disk::new(kind, SIZE);
        for round in ["new", "used"] {
            remount(&disk.root(), "ro");
            let said = Daemon::start(&disk).refuses(kind);
            assert!(said.contains("Read-only file system"), "{kind}, {round}: {said}");
            assert!(
                said.contains(disk.root().join("lazuli").to_str().unwrap()),
                "{kind}, {round}: {said}"
            );
            assert!(!said.contains("begin anew"), "{kind}, {round}: {said}");
            remount(&disk.root(), "rw");
            Daemon::start(&disk).serves(kind);
        }
    }
}
