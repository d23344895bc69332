//! Containers whose size is limited, on real file systems with project quotas: ext4 and xfs, on loop devices.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use lazuli::sys::mount::{Unmount, unmount};
use lazuli::sys::quota;
use tonic::Code;

use crate::local::update;
use crate::skip::{Ability, skipped};
use crate::support::*;

const SIZE: &str = "containerd.io/snapshot/max-size";
const USERS: (&str, &str) = ("containerd.io/snapshot/uidmapping", "0:100000:65536");
const GROUPS: (&str, &str) = ("containerd.io/snapshot/gidmapping", "0:200000:65536");
/// The first project that Lazuli gives, as docs/OPERATIONS.md has it.
const FIRST: u32 = 0x4c00_0000;
/// How many are looked at: more than any of these tests needs.
const SOME: u32 = 40;
const MIB: u64 = 1 << 20;
/// Of the file system: xfs is not made much smaller.
const DISK_MIB: u64 = 512;

/// A file system with project quotas; unmounted when dropped.
struct Disk {
    dir: tempfile::TempDir,
}

impl Disk {
    /// `None`: the machine has none, which is said.
    fn new(kind: &str) -> Option<Self> {
        let (ability, make): (_, &[&str]) = match kind {
            "xfs" => (Ability::XfsProjectQuotas, &["-q"]),
            _ => (
                Ability::Ext4ProjectQuotas,
                &["-q", "-O", "quota,project", "-E", "quotatype=prjquota"],
            ),
        };
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        File::create(&image).unwrap().set_len(DISK_MIB * MIB).unwrap();
        let disk = Disk { dir };
        fs::create_dir(disk.path()).unwrap();
        let steps = [
            Command::new(format!("mkfs.{kind}")).args(make).arg(&image).output(),
            Command::new("mount")
                .args(["-t", kind, "-o", "loop,prjquota"])
                .arg(&image)
                .arg(disk.path())
                .output(),
        ];
        for step in steps {
            match step {
                Ok(output) if output.status.success() => {}
                Ok(output) => {
                    skipped(ability, String::from_utf8_lossy(&output.stderr).trim());
                    return None;
                }
                Err(error) => {
                    skipped(ability, error);
                    return None;
                }
            }
        }
        assert_eq!(quota::missing(&disk.path()), None, "it has them");
        Some(disk)
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("mounted")
    }

    async fn daemon(&self) -> Daemon {
        Daemon::start_in(tempfile::tempdir_in(self.path()).unwrap(), FakeLayers::new(), true).await
    }

    /// Projects with a limit, and what that is in bytes.
    fn limits(&self) -> Vec<(u32, u64)> {
        let all = (FIRST..FIRST + SOME).map(|id| (id, quota::project(&self.path(), id).unwrap().limit));
        all.filter(|(_, limit)| *limit > 0).collect()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = unmount(&self.path(), Unmount::Detach);
    }
}

/// Writes files of a MiB each until that cannot be, at most `most`; how many there are.
fn fill(root: &Path, most: u64) -> u64 {
    for at in 0..most {
        let written = File::create(root.join(format!("file-{at}"))).and_then(|mut file| {
            file.write_all(&vec![7; MIB as usize])?;
            file.sync_all()
        });
        if let Err(error) = written {
            let full = [io::ErrorKind::QuotaExceeded, io::ErrorKind::StorageFull];
            assert!(full.contains(&error.kind()), "{error}");
            return at;
        }
    }
    most
}

fn mib(mib: u64) -> String {
    (mib * MIB).to_string()
}

/// A layer that containerd unpacked, and one of Lazuli's on it.
async fn image(daemon: &Daemon) -> String {
    daemon.layer("a/1/base", "", "base").await;
    daemon.layers.add("sha256:1", "one");
    daemon.pull("a/2/x sha256:1", "a/1/base", "sha256:1").await
}

#[tokio::test]
async fn a_container_cannot_become_larger_than_it_may() {
    for kind in ["ext4", "xfs"] {
        let Some(disk) = Disk::new(kind) else { continue };
        let daemon = disk.daemon().await;
        let top = image(&daemon).await;
        let small = daemon
            .prepare_with("a/9/small", &top, &[(SIZE, &mib(8))])
            .await
            .unwrap();
        let large = daemon
            .prepare_with("a/9/large", &top, &[(SIZE, &mib(64))])
            .await
            .unwrap();
        let free = daemon.mount(&daemon.prepare("a/9/free", &top).await.unwrap());
        assert_eq!(disk.limits(), [(FIRST, 8 * MIB), (FIRST + 1, 64 * MIB)], "{kind}");
        let (small, large) = (daemon.mount(&small), daemon.mount(&large));
        // What `df` says in the container.
        let stat = rustix::fs::statvfs(small.path()).unwrap();
        assert_eq!(stat.f_blocks * stat.f_frsize, 8 * MIB, "{kind}");
        let written = fill(small.path(), 64);
        assert!((6..=8).contains(&written), "{kind}: {written} MiB");
        // Nobody else feels that.
        assert_eq!(fill(large.path(), 16), 16, "{kind}");
        assert_eq!(fill(free.path(), 16), 16, "{kind}");
        let usage = daemon.usage("a/9/small").await.unwrap();
        assert!(
            (6 * MIB as i64..=8 * MIB as i64).contains(&usage.size),
            "{kind}: {usage:?}"
        );

        // What overlayfs does with files, it does within the project.
        let at = |name: &str| large.path().join(name);
        fs::rename(at("base"), at("renamed")).unwrap();
        fs::write(at("one"), "copied up").unwrap();
        fs::remove_file(at("renamed")).unwrap();
        fs::create_dir(at("directory")).unwrap();
        fs::rename(at("one"), at("directory/one")).unwrap();
        fs::remove_dir_all(at("directory")).unwrap();
        fs::hard_link(at("file-0"), at("link")).unwrap();

        // It holds in the next process; and who has deleted something may write again as much.
        let daemon = daemon.restart().await;
        fs::remove_file(small.path().join("file-0")).unwrap();
        fs::remove_file(small.path().join("file-1")).unwrap();
        fs::create_dir(small.path().join("more")).unwrap();
        let more = fill(&small.path().join("more"), 64);
        assert!((1..=3).contains(&more), "{kind}: {more} MiB");

        // It can be made another, and taken away.
        let path = &[format!("labels.{SIZE}")];
        let path: Vec<&str> = path.iter().map(String::as_str).collect();
        update(&daemon, "a/9/small", &[(SIZE, &mib(32))], &path).await.unwrap();
        fs::create_dir(small.path().join("again")).unwrap();
        let again = fill(&small.path().join("again"), 64);
        assert!((20..=26).contains(&again), "{kind}: {again} MiB");
        update(&daemon, "a/9/small", &[], &path).await.unwrap();
        assert_eq!(disk.limits(), [(FIRST + 1, 64 * MIB)], "{kind}");
        fs::create_dir(small.path().join("free")).unwrap();
        assert_eq!(fill(&small.path().join("free"), 10), 10, "{kind}");
        let status = update(&daemon, "a/9/large", &[(SIZE, "much")], &path)
            .await
            .unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert_eq!(disk.limits(), [(FIRST + 1, 64 * MIB)], "{kind}");

        drop((small, large, free));
        for key in ["a/9/small", "a/9/large", "a/9/free"] {
            daemon.remove(key).await.unwrap();
        }
        assert_eq!(disk.limits(), [], "{kind}");
        daemon.cleanup().await.unwrap();
        for id in FIRST..FIRST + 2 {
            assert_eq!(
                quota::project(&disk.path(), id).unwrap(),
                quota::Project::default(),
                "{kind}"
            );
        }
    }
}

#[tokio::test]
async fn a_layer_keeps_no_limit_and_its_project_is_not_given_again() {
    for kind in ["ext4", "xfs"] {
        let Some(disk) = Disk::new(kind) else { continue };
        let daemon = disk.daemon().await;
        let labels = [(SIZE, &*mib(8))];
        let told = daemon.prepare_with("a/1/base", "", &labels).await.unwrap();
        fs::write(Path::new(&told[0].source).join("base"), vec![1; MIB as usize]).unwrap();
        assert_eq!(disk.limits(), [(FIRST, 8 * MIB)], "{kind}");
        daemon.commit("a/2/base", "a/1/base").await.unwrap();
        assert_eq!(disk.limits(), [], "{kind}");
        // The file is not written before it has to be; what is counted until then is enough.
        File::open(disk.path())
            .and_then(|root| Ok(rustix::fs::syncfs(&root)?))
            .unwrap();
        assert!(quota::project(&disk.path(), FIRST).unwrap().bytes >= MIB, "{kind}");
        // What is made on it has a limit of its own, of which the layer takes nothing.
        let labels = [labels[0], USERS, GROUPS];
        let told = daemon.prepare_with("a/3/container", "a/2/base", &labels).await.unwrap();
        assert_eq!(disk.limits(), [(FIRST + 1, 8 * MIB)], "{kind}");
        let mounted = daemon.mount(&told);
        let written = fill(mounted.path(), 64);
        assert!((6..=8).contains(&written), "{kind}: {written} MiB, in a user namespace");
        drop(mounted);
        daemon.remove("a/3/container").await.unwrap();
        daemon.remove("a/2/base").await.unwrap();
        daemon.cleanup().await.unwrap();
        assert_eq!(disk.limits(), [], "{kind}");
    }
}

#[tokio::test]
async fn nothing_is_limited_that_is_no_container_and_what_breaks_off_leaves_no_limit() {
    for kind in ["ext4", "xfs"] {
        let Some(disk) = Disk::new(kind) else { continue };
        // Somebody else has the first projects, with a limit or with files.
        let theirs = disk.path().join("theirs");
        fs::create_dir(&theirs).unwrap();
        quota::set_limit(&disk.path(), FIRST, MIB).unwrap();
        quota::set_project(&theirs, FIRST + 1).unwrap();
        let others = [(FIRST, MIB)];

        let daemon = disk.daemon().await;
        let top = image(&daemon).await;
        daemon.view_with("a/9/view", &top, &[(SIZE, "1")]).await.unwrap();
        // An annotation of an image.
        let unpacked = [(SIZE, "x"), (REF, "sha256:unknown")];
        daemon
            .prepare_with("a/9/extract-1 sha256:unknown", &top, &unpacked)
            .await
            .unwrap();
        for bad in ["0", "-1", "100MB", "99999999999999999999"] {
            let status = daemon.prepare_with("a/9/bad", &top, &[(SIZE, bad)]).await.unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument, "{status}");
            assert!(status.message().contains(SIZE), "{status}");
        }
        daemon.prepare("a/9/taken", &top).await.unwrap();
        let status = daemon
            .prepare_with("a/9/taken", &top, &[(SIZE, &mib(8))])
            .await
            .unwrap_err();
        assert_eq!(status.code(), Code::AlreadyExists, "{status}");
        assert_eq!(disk.limits(), others, "{kind}");
        assert_eq!(fs::read_dir(daemon.root().join("new")).unwrap().count(), 0, "{kind}");

        let told = daemon
            .prepare_with("a/9/container", &top, &[(SIZE, &mib(8))])
            .await
            .unwrap();
        let upper = told[0]
            .options
            .iter()
            .find_map(|option| option.strip_prefix("upperdir="));
        let upper = Path::new(upper.unwrap()).to_owned();
        assert_eq!(quota::project_of(&upper).unwrap(), FIRST + 2, "{kind}");
        assert_eq!(
            quota::project_of(&upper.with_file_name("work")).unwrap(),
            FIRST + 2,
            "{kind}"
        );
        daemon
            .prepare_with("a/9/committed", &top, &[(SIZE, &mib(9))])
            .await
            .unwrap();
        daemon.commit("a/10/committed", "a/9/committed").await.unwrap();

        // Of processes that were killed: while one made a snapshot, before it could remove one, before it could free a layer, and before it
        // could limit anything anew after somebody had taken all limits away.
        let root = daemon.root();
        for (dir, id) in [("new/half", FIRST + 10), ("snapshots/4711", FIRST + 11)] {
            let own = root.join(dir).join("fs");
            fs::create_dir_all(&own).unwrap();
            quota::set_project(&own, id).unwrap();
            quota::set_limit(&root, id, MIB).unwrap();
        }
        quota::set_limit(&root, FIRST + 3, MIB).unwrap();
        quota::set_limit(&root, FIRST + 2, 0).unwrap();
        let daemon = daemon.restart().await;
        assert_eq!(disk.limits(), [others[0], (FIRST + 2, 8 * MIB)], "{kind}");
        daemon.remove("a/9/container").await.unwrap();
        assert_eq!(disk.limits(), others, "{kind}");
        assert_eq!(quota::project_of(&theirs).unwrap(), FIRST + 1, "{kind}");

        // A project is given again once its files are gone, and not before.
        daemon.cleanup().await.unwrap();
        daemon.prepare_with("a/9/next", &top, &[(SIZE, &mib(8))]).await.unwrap();
        assert_eq!(disk.limits(), [others[0], (FIRST + 2, 8 * MIB)], "{kind}");
    }
}

/// Many at once get a project each.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn each_container_has_a_project_of_its_own() {
    const CONTAINERS: usize = 16;
    for kind in ["ext4", "xfs"] {
        let Some(disk) = Disk::new(kind) else { continue };
        let daemon = disk.daemon().await;
        let (keys, size) = (
            (0..CONTAINERS).map(|at| format!("a/9/{at}")).collect::<Vec<_>>(),
            mib(4),
        );
        let labels = [(SIZE, &*size)];
        let made = futures::future::join_all(keys.iter().map(|key| daemon.prepare_with(key, "", &labels))).await;
        let projects: std::collections::HashSet<_> = made
            .into_iter()
            .map(|told| quota::project_of(Path::new(&told.unwrap()[0].source)).unwrap())
            .collect();
        assert_eq!(
            (projects.len(), disk.limits().len()),
            (CONTAINERS, CONTAINERS),
            "{kind}"
        );
        futures::future::join_all(keys.iter().map(|key| daemon.remove(key))).await;
        assert_eq!(disk.limits(), [], "{kind}");
    }
}

/// A root directory whose file system has no such quotas: the label is a hint, and the container is made.
#[tokio::test]
async fn where_sizes_cannot_be_limited_a_container_is_made_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    // In memory there are none.
    let place = dir.path().join("mounted");
    fs::create_dir(&place).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "lazuli-test"])
        .arg(&place)
        .status()
        .unwrap();
    assert!(mounted.success());
    let daemon = Daemon::start_in(tempfile::tempdir_in(&place).unwrap(), FakeLayers::new(), true).await;
    daemon
        .prepare_with("a/9/container", "", &[(SIZE, &mib(8))])
        .await
        .unwrap();
    let count = |outcome| daemon.metrics.size_limits_total.with_label_values(&[outcome]).get();
    assert_eq!((count("limited"), count("unlimited")), (0, 1));
    let status = daemon.prepare_with("a/9/bad", "", &[(SIZE, "8MiB")]).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    let reason = quota::missing(&place).unwrap();
    assert!(
        reason.contains("project quotas") && reason.contains(place.to_str().unwrap()),
        "{reason}"
    );
    let daemon = daemon.restart().await;
    daemon.commit("a/10/layer", "a/9/container").await.unwrap();
    daemon.remove("a/10/layer").await.unwrap();
    drop(daemon);
    unmount(&place, Unmount::Detach).unwrap();
}
