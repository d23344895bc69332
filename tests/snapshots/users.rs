//! Containers in user namespaces: labels say which owners they see, and the mounts show them.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::Duration;

use lazuli::proto::types::Mount as ToMount;
use lazuli::sys::mountinfo::{self, Mount};
use rustix::mount::UnmountFlags;
use tonic::{Code, Status};

use crate::local::update;
use crate::support::*;

const USERS: &str = "containerd.io/snapshot/uidmapping";
const GROUPS: &str = "containerd.io/snapshot/gidmapping";
/// What containerd says of a pod in a user namespace.
const LABELS: [(&str, &str); 2] = [(USERS, "0:100000:65536"), (GROUPS, "0:200000:65536")];
/// What an id outside of a mapping is seen as.
const OVERFLOW: u32 = 65_534;

fn owner(path: impl AsRef<Path>) -> (u32, u32) {
    let metadata = fs::symlink_metadata(path).unwrap();
    (metadata.uid(), metadata.gid())
}

/// Mount points below the root directory of the daemon.
fn mounts(daemon: &Daemon) -> Vec<PathBuf> {
    let mounts = mounted(daemon).into_iter();
    mounts.map(|mount| mount.mount_point).collect()
}

/// What is mounted below the daemon's root, by what. The machine's other mounts are not this test's.
fn mounted(daemon: &Daemon) -> Vec<Mount> {
    let root = daemon.root().canonicalize().unwrap();
    let mounts = mountinfo::mounts().unwrap().into_iter();
    mounts.filter(|mount| mount.mount_point.starts_with(&root)).collect()
}

fn entries(path: &Path) -> usize {
    fs::read_dir(path).unwrap().count()
}

/// The value of an option of an overlay.
fn option(mounts: &[lazuli::proto::types::Mount], name: &str) -> PathBuf {
    let found = mounts[0].options.iter().find_map(|option| option.strip_prefix(name));
    found.unwrap().into()
}

/// How a snapshot ends.
#[derive(Debug, Clone, Copy)]
enum End {
    Removed,
    Committed,
}

/// Time in which who does not wait for his turn would be done.
const TURN: Duration = Duration::from_millis(200);

/// Has a snapshot end while its mounts are asked for, whose missing lower directories are to be mounted: the question stops when it asks for the
/// mapping, after it has done so `before` times. Gives the answer to it.
async fn end_in_the_middle(daemon: &Daemon, key: &str, before: usize, end: End) -> Result<Vec<ToMount>, Status> {
    let ((reached, came), (go, gone)) = (mpsc::channel(), mpsc::channel());
    *daemon.layers.slow_owners.lock().unwrap() = Some(Held {
        before,
        reached,
        go: gone,
    });
    let ended = async {
        tokio::task::spawn_blocking(move || came.recv().unwrap()).await.unwrap();
        let end = async {
            match end {
                End::Removed => daemon.remove(key).await,
                End::Committed => daemon.commit("a/10/committed", key).await,
            }
        };
        let let_go = async {
            // From then on the record says so; the rest may have to wait.
            while daemon.stat(key).await.is_ok() {
                tokio::task::yield_now().await;
            }
            tokio::time::sleep(TURN).await;
            go.send(()).unwrap();
        };
        let (ended, ()) = tokio::join!(end, let_go);
        ended.unwrap();
    };
    let (answer, ()) = tokio::join!(daemon.mounts(key), ended);
    answer
}

/// A layer that containerd unpacked, and two of Lazuli on it, with files of several owners. Returns the name of the topmost snapshot.
async fn image(daemon: &Daemon) -> String {
    let key = "preparing base";
    let mounted = daemon.mount(&daemon.prepare(key, "").await.unwrap());
    for (name, uid, gid) in [("root", 0, 0), ("user", 1000, 65_535), ("beyond", 65_536, 70_000)] {
        fs::write(mounted.path().join(name), name).unwrap();
        chown(mounted.path().join(name), Some(uid), Some(gid)).unwrap();
    }
    drop(mounted);
    daemon.commit("a/1/base", key).await.unwrap();
    let mut top = "a/1/base".to_owned();
    for (chain_id, content) in [("sha256:1", "one"), ("sha256:2", "two")] {
        let layer = daemon.layers.add(chain_id, content);
        top = daemon.pull(&format!("a/2/x {chain_id}"), &top, chain_id).await;
        let directory = daemon.layers.path(&layer).unwrap();
        chown(directory.join(content), Some(33), Some(0)).unwrap();
        chown(&directory, Some(7), Some(8)).unwrap();
    }
    top
}

fn check_owners(root: &Path) {
    assert_eq!(owner(root), (100_007, 200_008), "the root is as its layer has it");
    assert_eq!(owner(root.join("root")), (100_000, 200_000));
    assert_eq!(owner(root.join("user")), (101_000, 265_535));
    assert_eq!(owner(root.join("beyond")), (OVERFLOW, OVERFLOW));
    assert_eq!(owner(root.join("one")), (100_033, 200_000));
    assert_eq!(owner(root.join("two")), (100_033, 200_000));
}

#[tokio::test]
async fn a_container_sees_mapped_owners_and_nothing_is_copied() {
    let daemon = Daemon::start().await;
    let top = image(&daemon).await;
    let told = daemon.prepare_with("a/9/container", &top, &LABELS).await.unwrap();
    // Below one directory of the snapshot, each a mount point.
    let places: Vec<PathBuf> = lowers(&told).into_iter().map(PathBuf::from).collect();
    let upper = option(&told, "upperdir=");
    let own = upper.parent().unwrap().join("lower");
    assert_eq!(places.len(), 3);
    assert!(places.iter().all(|place| place.parent() == Some(&own)), "{places:?}");
    let mut listed = mounts(&daemon);
    listed.sort();
    let mut expected: Vec<_> = places.iter().map(|place| place.canonicalize().unwrap()).collect();
    expected.sort();
    assert_eq!(listed, expected);

    let mounted = daemon.mount(&told);
    check_owners(mounted.path());
    assert_eq!(entries(&upper), 0, "nothing was copied");
    // What is copied up has the owner that it was seen with.
    fs::write(mounted.path().join("user"), "changed").unwrap();
    assert_eq!(owner(mounted.path().join("user")), (101_000, 265_535));
    assert_eq!(owner(upper.join("user")), (101_000, 265_535));
    // Nobody else sees any of this.
    let plain = daemon.mount(&daemon.prepare("a/9/plain", &top).await.unwrap());
    assert_eq!(owner(plain.path().join("user")), (1000, 65_535));
    assert_eq!(fs::read_to_string(plain.path().join("user")).unwrap(), "user");
    let other = [(USERS, "0:300000:2000"), (GROUPS, "0:400000:2000")];
    let other = daemon.mount(&daemon.prepare_with("a/9/other", &top, &other).await.unwrap());
    assert_eq!(owner(other.path().join("user")), (301_000, OVERFLOW));

    assert_eq!(daemon.mounts("a/9/container").await.unwrap(), told);
    assert_eq!(mounts(&daemon).len(), 6, "what is there is used again");
    // The mount of the container goes on without what it was made of.
    drop(other);
    daemon.remove("a/9/other").await.unwrap();
    daemon.remove("a/9/container").await.unwrap();
    assert_eq!(mounts(&daemon), [] as [PathBuf; 0]);
    assert_eq!(owner(mounted.path().join("root")), (100_000, 200_000));
    drop(mounted);
    daemon.cleanup().await.unwrap();
    assert!(!own.exists());
    assert_eq!(entries(&daemon.root().join("trash")), 0);
}

#[tokio::test]
async fn views_and_snapshots_without_parents_are_mapped() {
    let daemon = Daemon::start().await;
    let top = image(&daemon).await;
    let view = daemon.mount(&daemon.view_with("a/9/view", &top, &LABELS).await.unwrap());
    check_owners(view.path());
    assert!(view.is_read_only());
    // One directory is a bind mount.
    let told = daemon.view_with("a/9/base", "a/1/base", &LABELS).await.unwrap();
    assert_eq!(told[0].r#type, "bind");
    let base = daemon.mount(&told);
    assert_eq!(owner(base.path().join("user")), (101_000, 265_535));
    assert!(base.is_read_only());
    // The layers merged into one directory.
    daemon.layers.merges.store(true, Ordering::Relaxed);
    daemon.layers.add("sha256:3", "three");
    daemon.layers.add("sha256:4", "four");
    let three = daemon.pull("a/3/x sha256:3", "", "sha256:3").await;
    let four = daemon.pull("a/3/x sha256:4", &three, "sha256:4").await;
    let merged = daemon.mount(&daemon.view_with("a/9/merged", &four, &LABELS).await.unwrap());
    assert_eq!(merged.names(), ["four", "three"]);
    assert_eq!(owner(merged.path().join("four")), (100_000, 200_000));
    // Nothing below: whoever is root there owns it.
    let told = daemon.prepare_with("a/9/empty", "", &LABELS).await.unwrap();
    assert_eq!(owner(&told[0].source), (100_000, 200_000));
    let before = mounts(&daemon).len();
    assert_eq!(before, 3 + 1 + 1);
    drop((view, base, merged));
    for key in ["a/9/view", "a/9/base", "a/9/merged", "a/9/empty"] {
        daemon.remove(key).await.unwrap();
    }
    assert_eq!(mounts(&daemon), [] as [PathBuf; 0]);
}

#[tokio::test]
async fn mapped_mounts_outlive_the_daemon_and_are_found_again() {
    let daemon = Daemon::start().await;
    let top = image(&daemon).await;
    let told = daemon.prepare_with("a/9/container", &top, &LABELS).await.unwrap();
    let before = mounted(&daemon);
    let daemon = daemon.restart().await;
    assert_eq!(mounted(&daemon), before);
    // Whoever got its answer before mounts it now.
    check_owners(daemon.mount(&told).path());
    assert_eq!(daemon.mounts("a/9/container").await.unwrap(), told);
    assert_eq!(mounts(&daemon).len(), 3, "the mounts are adopted");

    // After a reboot there are only empty mount points.
    for place in mounts(&daemon) {
        rustix::mount::unmount(&place, UnmountFlags::DETACH).unwrap();
    }
    let daemon = daemon.restart().await;
    assert_eq!(daemon.mounts("a/9/container").await.unwrap(), told);
    check_owners(daemon.mount(&told).path());

    // What shows something else is not used: a layer that came back elsewhere.
    let place = mounts(&daemon).remove(0);
    rustix::mount::mount_bind(daemon.root().join("new"), &place).unwrap();
    assert_eq!(daemon.mounts("a/9/container").await.unwrap(), told);
    check_owners(daemon.mount(&told).path());
    daemon.remove("a/9/container").await.unwrap();
    assert_eq!(mounts(&daemon), [] as [PathBuf; 0]);
}

#[tokio::test]
async fn what_fails_or_breaks_off_leaves_no_mounts() {
    let daemon = Daemon::start().await;
    let top = image(&daemon).await;
    daemon.prepare("a/9/taken", &top).await.unwrap();
    let status = daemon.prepare_with("a/9/taken", &top, &LABELS).await.unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists, "{status}");
    assert_eq!(mounts(&daemon), [] as [PathBuf; 0]);
    assert_eq!(entries(&daemon.root().join("new")), 0);

    // Of a process that was killed while it made a snapshot, and before it could remove one.
    let root = daemon.root();
    for dir in ["new/half", "snapshots/4711"] {
        let place = root.join(dir).join("lower/1.fs");
        fs::create_dir_all(&place).unwrap();
        rustix::mount::mount_bind(root.join("trash"), &place).unwrap();
    }
    assert_eq!(mounts(&daemon).len(), 2);
    let daemon = daemon.restart().await;
    assert_eq!(mounts(&daemon), [] as [PathBuf; 0]);
    daemon.cleanup().await.unwrap();
    for dir in ["new", "trash"] {
        assert_eq!(entries(&root.join(dir)), 0, "{dir}");
    }
    assert!(!root.join("snapshots/4711").exists());

    // Committed, it has no mounts any more.
    daemon.prepare_with("a/9/active", &top, &LABELS).await.unwrap();
    assert_eq!(mounts(&daemon).len(), 3);
    daemon.commit("a/9/committed", "a/9/active").await.unwrap();
    assert_eq!(mounts(&daemon), [] as [PathBuf; 0]);
}

#[tokio::test]
async fn bad_mappings_are_refused() {
    let daemon = Daemon::start().await;
    let top = image(&daemon).await;
    let long = "0:100000:65536,".repeat(300);
    for (users, groups, reason) in [
        ("0:100000", "0:1:1", "host id"),
        ("0:100000:10", "0:x:10", "host id"),
        ("0:100000:10,5:200000:10", "0:1:1", "overlap"),
        ("1:100000:10", "0:1:1", "id 0"),
        (long.as_str(), "0:1:1", "longer"),
        ("0:100000:10", "", "both are needed"),
    ] {
        let labels = [(USERS, users), (GROUPS, groups)];
        for result in [
            daemon.prepare_with("a/9/bad", &top, &labels).await,
            daemon.view_with("a/9/bad", &top, &labels).await,
        ] {
            let status = result.unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument, "{status}");
            assert!(status.message().contains(reason), "{status}");
            assert!(status.message().ends_with(": invalid argument"), "{status}");
        }
    }
    assert_eq!(mounts(&daemon), [] as [PathBuf; 0]);
    // Annotations of an image come with the labels of what its layers are unpacked in.
    let labels = [LABELS[0], (GROUPS, "nonsense"), (REF, "sha256:unknown")];
    let told = daemon
        .prepare_with("a/9/extract-1 sha256:unknown", &top, &labels)
        .await
        .unwrap();
    let mounted = daemon.mount(&told);
    assert_eq!(owner(mounted.path().join("user")), (1000, 65_535));
}

#[tokio::test]
async fn the_mapping_of_a_snapshot_does_not_change() {
    let daemon = Daemon::start().await;
    let top = image(&daemon).await;
    let told = daemon.prepare_with("a/9/container", &top, &LABELS).await.unwrap();
    for (labels, paths) in [
        (vec![], vec![]),
        (vec![(USERS, "0:1:1")], vec!["labels.containerd.io/snapshot/uidmapping"]),
        (vec![], vec!["labels.containerd.io/snapshot/gidmapping"]),
        (vec![(REF, "sha256:1")], vec!["labels.containerd.io/snapshot.ref"]),
    ] {
        let status = update(&daemon, "a/9/container", &labels, &paths).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    }
    update(&daemon, "a/9/container", &[("l", "v")], &["labels.l"])
        .await
        .unwrap();
    assert_eq!(daemon.mounts("a/9/container").await.unwrap(), told);
    daemon.remove("a/9/container").await.unwrap();
}

#[tokio::test]
async fn a_machine_that_cannot_says_so_instead_of_showing_wrong_owners() {
    let daemon = Daemon::start().await;
    let top = image(&daemon).await;
    *daemon.layers.no_mapped_owners.lock().unwrap() = Some("the moon is full".to_owned());
    let status = daemon.prepare_with("a/9/container", &top, &LABELS).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    for part in ["the moon is full", "only-remap-ids", "a/9/container"] {
        assert!(status.message().contains(part), "{status}");
    }
    assert!(status.message().ends_with(": failed precondition"), "{status}");
    daemon.prepare("a/9/container", &top).await.unwrap();
}

/// What containerd does without the capability.
#[tokio::test]
async fn owners_that_containerd_changed_are_not_mapped_again() {
    let daemon = Daemon::start().await;
    let top = image(&daemon).await;
    // Also where nothing could be mapped.
    *daemon.layers.no_mapped_owners.lock().unwrap() = Some("the moon is full".to_owned());
    let mounted = daemon.mount(&daemon.prepare("a/9/sha256:5-remap", &top).await.unwrap());
    chown(mounted.path(), Some(100_000), Some(200_000)).unwrap();
    chown(mounted.path().join("user"), Some(101_000), Some(265_535)).unwrap();
    drop(mounted);
    daemon.commit("a/10/sha256:5", "a/9/sha256:5-remap").await.unwrap();
    let daemon = daemon.restart().await;
    let told = daemon
        .prepare_with("a/11/container", "a/10/sha256:5", &LABELS)
        .await
        .unwrap();
    assert_eq!(mounts(&daemon), [] as [PathBuf; 0]);
    let mounted = daemon.mount(&told);
    assert_eq!(owner(mounted.path()), (100_000, 200_000));
    assert_eq!(owner(mounted.path().join("user")), (101_000, 265_535));
    assert_eq!(owner(option(&told, "upperdir=")), (100_000, 200_000));
    drop(mounted);
    // What containers add to such an image keeps its owners too.
    daemon.commit("a/12/added", "a/11/container").await.unwrap();
    let mounted = daemon.mount(&daemon.prepare_with("a/13/c", "a/12/added", &LABELS).await.unwrap());
    assert_eq!(owner(mounted.path().join("user")), (101_000, 265_535));
}

/// More lower directories than their paths fit into a page.
#[tokio::test]
async fn many_layers_are_mapped() {
    const LAYERS: usize = 128;
    let daemon = Daemon::start().await;
    let mut parent = String::new();
    for number in 0..LAYERS {
        let name = format!("a/1/{number}");
        daemon.layer(&name, &parent, &format!("file-{number}")).await;
        parent = name;
    }
    let told = daemon.prepare_with("a/9/container", &parent, &LABELS).await.unwrap();
    assert_eq!(mounts(&daemon).len(), LAYERS);
    let mounted = daemon.mount(&told);
    assert_eq!(mounted.names().len(), LAYERS);
    assert_eq!(owner(mounted.path().join("file-0")), (100_000, 200_000));
    drop(mounted);
    daemon.remove("a/9/container").await.unwrap();
    assert_eq!(mounts(&daemon), [] as [PathBuf; 0]);
}

/// Answers that race with the removal of what they are about leave nothing behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn mounts_that_race_with_removal_leave_nothing() {
    const ROUNDS: usize = 20;
    let daemon = Daemon::start().await;
    let top = image(&daemon).await;
    for round in 0..ROUNDS {
        let key = format!("a/9/{round}");
        daemon.prepare_with(&key, &top, &LABELS).await.unwrap();
        // So that they have something to do.
        for place in mounts(&daemon) {
            rustix::mount::unmount(&place, UnmountFlags::DETACH).unwrap();
        }
        let asked = (0..4).map(|_| daemon.mounts(&key));
        let (answers, removed) = tokio::join!(futures::future::join_all(asked), daemon.remove(&key));
        removed.unwrap();
        for answer in answers {
            assert!(answer.is_ok() || answer.unwrap_err().code() == Code::NotFound);
        }
        assert_eq!(mounts(&daemon), [] as [PathBuf; 0], "round {round}");
    }
    daemon.cleanup().await.unwrap();
    assert_eq!(entries(&daemon.root().join("trash")), 0);
}

/// In whatever order the two come: what is gone is not mounted, and what is mounted goes.
#[tokio::test]
async fn a_snapshot_that_ends_while_it_is_mounted_leaves_nothing() {
    for end in [End::Removed, End::Committed] {
        for before in [0, 1] {
            let daemon = Daemon::start().await;
            let top = image(&daemon).await;
            let key = "a/9/container";
            daemon.prepare_with(key, &top, &LABELS).await.unwrap();
            for place in mounts(&daemon) {
                rustix::mount::unmount(&place, UnmountFlags::DETACH).unwrap();
            }
            let answer = end_in_the_middle(&daemon, key, before, end).await;
            assert_eq!(
                mounts(&daemon),
                [] as [PathBuf; 0],
                "{end:?} {before}: mounts of what is gone"
            );
            // Who has asked first gets his answer.
            let is_told = answer.map_or_else(|status| status.code() == Code::NotFound, |_| before == 1);
            assert!(is_told, "{end:?} {before}");
        }
    }
}
