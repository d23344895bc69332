//! A correct overlay snapshotter for everything that is not lazy.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use lazuli::proto::snapshots::v1::{Info, Kind, ListSnapshotsRequest, UpdateSnapshotRequest};
use prost_types::{FieldMask, Timestamp};
use tonic::{Code, Status};

use crate::support::*;

/// An Update as containerd's metadata layer sends it: name and labels, and junk.
pub async fn update(daemon: &Daemon, name: &str, labels: &[(&str, &str)], paths: &[&str]) -> Result<Info, Status> {
    /// Seconds of Go's zero time.
    const ZERO_TIME: i64 = -62_135_596_800;
    let zero = Some(Timestamp {
        seconds: ZERO_TIME,
        nanos: 0,
    });
    let request = UpdateSnapshotRequest {
        snapshotter: "lazuli".to_owned(),
        info: Some(Info {
            name: name.to_owned(),
            parent: "junk".to_owned(),
            kind: Kind::Committed.into(),
            created_at: zero,
            updated_at: zero,
            labels: strings(labels),
        }),
        update_mask: Some(FieldMask {
            paths: paths.iter().map(|&path| path.to_owned()).collect(),
        }),
    };
    Ok(daemon.client.clone().update(request).await?.into_inner().info.unwrap())
}

#[tokio::test]
async fn errors_have_containerds_codes_and_texts() {
    let daemon = Daemon::start().await;
    daemon.layer("base", "", "file").await;
    daemon.prepare("active", "base").await.unwrap();
    daemon.view("view", "base").await.unwrap();

    let check = |status: Status, code: Code, text: &str| {
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().ends_with(&format!(": {text}")), "{status}");
        status.message().to_owned()
    };
    let exists = "already exists";
    check(
        daemon.prepare("active", "").await.unwrap_err(),
        Code::AlreadyExists,
        exists,
    );
    check(
        daemon.view("active", "").await.unwrap_err(),
        Code::AlreadyExists,
        exists,
    );
    check(
        daemon.prepare("base", "").await.unwrap_err(),
        Code::AlreadyExists,
        exists,
    );
    check(
        daemon.commit("base", "active").await.unwrap_err(),
        Code::AlreadyExists,
        exists,
    );

    let missing = "not found";
    check(daemon.prepare("x", "none").await.unwrap_err(), Code::NotFound, missing);
    check(daemon.mounts("none").await.unwrap_err(), Code::NotFound, missing);
    check(daemon.stat("none").await.unwrap_err(), Code::NotFound, missing);
    check(daemon.usage("none").await.unwrap_err(), Code::NotFound, missing);
    check(daemon.remove("none").await.unwrap_err(), Code::NotFound, missing);
    check(daemon.commit("x", "none").await.unwrap_err(), Code::NotFound, missing);
    check(
        update(&daemon, "none", &[], &[]).await.unwrap_err(),
        Code::NotFound,
        missing,
    );

    let invalid = "invalid argument";
    check(
        daemon.prepare("x", "active").await.unwrap_err(),
        Code::InvalidArgument,
        invalid,
    );
    check(
        daemon.view("x", "view").await.unwrap_err(),
        Code::InvalidArgument,
        invalid,
    );
    check(
        daemon.prepare("", "").await.unwrap_err(),
        Code::InvalidArgument,
        invalid,
    );
    check(
        daemon.commit("", "active").await.unwrap_err(),
        Code::InvalidArgument,
        invalid,
    );
    check(
        daemon.list(&["name=="]).await.unwrap_err(),
        Code::InvalidArgument,
        invalid,
    );

    let state = "failed precondition";
    check(
        daemon.mounts("base").await.unwrap_err(),
        Code::FailedPrecondition,
        state,
    );
    check(
        daemon.commit("x", "view").await.unwrap_err(),
        Code::FailedPrecondition,
        state,
    );
    check(
        daemon.commit("x", "base").await.unwrap_err(),
        Code::FailedPrecondition,
        state,
    );
    let message = check(
        daemon.remove("base").await.unwrap_err(),
        Code::FailedPrecondition,
        state,
    );
    assert!(message.contains("remove"), "{message}");

    let text = daemon.metrics.text();
    for line in [
        r#"lazuli_snapshots_requests_total{code="Ok",rpc="View"} 1"#,
        r#"lazuli_snapshots_requests_total{code="FailedPrecondition",rpc="Remove"} 1"#,
        r#"lazuli_snapshots_request_seconds_count{rpc="Mounts"} 2"#,
    ] {
        assert!(text.contains(line), "no {line} in {text}");
    }
}

#[tokio::test]
async fn a_commit_may_name_the_parent_it_has_and_no_other() {
    let daemon = Daemon::start().await;
    daemon.layer("a", "", "a").await;
    daemon.layer("b", "", "b").await;
    daemon.prepare("on a", "a").await.unwrap();
    let status = daemon.commit_on("c", "on a", "b").await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    daemon.commit_on("c", "on a", "a").await.unwrap();
    assert_eq!(daemon.stat("c").await.unwrap().parent, "a");
    daemon.prepare("on none", "").await.unwrap();
    let status = daemon.commit_on("d", "on none", "a").await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
}

#[tokio::test]
async fn labels_are_updated_by_mask_and_nothing_else_is() {
    let daemon = Daemon::start().await;
    let labels = [("l1", "v1"), ("a.b/c", "v2"), ("empty", "")];
    daemon.prepare_with("k", "", &labels).await.unwrap();
    let before = daemon.stat("k").await.unwrap();
    assert_eq!(before.labels, strings(&[("l1", "v1"), ("a.b/c", "v2")]));
    assert_eq!(before.created_at, before.updated_at);

    let info = update(
        &daemon,
        "k",
        &[("l1", "new"), ("l4", "v4")],
        &["labels.l1", "labels.a.b/c"],
    )
    .await
    .unwrap();
    assert_eq!(info.labels, strings(&[("l1", "new")]));
    let info = update(&daemon, "k", &[("x", "y")], &["labels"]).await.unwrap();
    assert_eq!(info.labels, strings(&[("x", "y")]));
    let info = update(&daemon, "k", &[("z", "")], &["labels.z"]).await.unwrap();
    assert_eq!(info.labels, strings(&[("x", "y")]));
    let info = update(&daemon, "k", &[("all", "of them")], &[]).await.unwrap();
    assert_eq!(info.labels, strings(&[("all", "of them")]));
    assert_eq!((info.kind(), info.parent.as_str()), (Kind::Active, ""));
    assert_eq!(info.created_at, before.created_at);
    assert_ne!(info.updated_at, before.updated_at);
    assert_eq!(daemon.stat("k").await.unwrap(), info);

    for field in ["parent", "kind", "name", "created_at", "labels_", "label"] {
        let status = update(&daemon, "k", &[], &["labels", field]).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{field}: {status}");
    }
    assert_eq!(daemon.stat("k").await.unwrap(), info);
}

#[tokio::test]
async fn a_list_is_streamed_and_locks_nothing() {
    let daemon = Daemon::start().await;
    for number in 0..130 {
        daemon.view(&format!("ns/{number}/v"), "").await.unwrap();
    }
    let mut stream = daemon
        .client
        .clone()
        .list(ListSnapshotsRequest::default())
        .await
        .unwrap()
        .into_inner();
    let first = stream.message().await.unwrap().unwrap();
    assert_eq!(first.info.len(), 100);
    // While the list is open, everything goes on.
    assert_eq!(daemon.stat(&first.info[7].name).await.unwrap(), first.info[7]);
    daemon.remove("ns/0/v").await.unwrap();
    daemon.prepare("new", "").await.unwrap();
    let second = stream.message().await.unwrap().unwrap();
    assert_eq!(second.info.len(), 30);
    assert!(stream.message().await.unwrap().is_none());

    let found = daemon.list(&["name==ns/5/v", "kind==active"]).await.unwrap();
    assert_eq!(names(&found), ["new", "ns/5/v"]);
}

#[tokio::test]
async fn large_messages_are_taken_and_sent() {
    const LARGE: usize = 5 << 20;
    let daemon = Daemon::start().await;
    let value = "x".repeat(LARGE);
    for key in ["a", "b", "c", "d"] {
        daemon.prepare_with(key, "", &[("large", &value)]).await.unwrap();
    }
    // Together they would be too large for one message.
    assert_eq!(daemon.list(&[]).await.unwrap().len(), 4);
}

#[tokio::test]
async fn garbage_is_collected_children_first() {
    let daemon = Daemon::start().await;
    daemon.layer("a", "", "a").await;
    daemon.layer("b", "a", "b").await;
    daemon.layer("c", "b", "c").await;
    daemon.prepare("container", "c").await.unwrap();
    daemon.view("view", "b").await.unwrap();
    let mut remaining = daemon.list(&[]).await.unwrap();
    while !remaining.is_empty() {
        let mut next = Vec::new();
        for info in &remaining {
            let is_parent = remaining.iter().any(|other| other.parent == info.name);
            match daemon.remove(&info.name).await {
                Ok(()) => assert!(!is_parent || next.iter().all(|other: &Info| other.parent != info.name)),
                Err(status) => {
                    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
                    next.push(info.clone());
                }
            }
        }
        assert!(next.len() < remaining.len());
        remaining = next;
    }
    daemon.cleanup().await.unwrap();
    assert_eq!(daemon.directories(), 0);
    assert_eq!(std::fs::read_dir(daemon.root().join("trash")).unwrap().count(), 0);
}

#[tokio::test]
async fn leftovers_are_cleaned_up_and_nothing_else_is() {
    let daemon = Daemon::start().await;
    daemon.layer("kept", "", "file").await;
    let leave = |path: &str| {
        let path = daemon.root().join(path);
        std::fs::create_dir_all(path.join("fs/deep")).unwrap();
        std::fs::write(path.join("fs/deep/file"), "x").unwrap();
    };
    leave("snapshots/9999");
    leave("trash/5.0");
    daemon.cleanup().await.unwrap();
    assert_eq!(daemon.directories(), 1);
    leave("snapshots/9999");
    leave("new/.tmpXYZ");
    leave("trash/6.0");
    // A directory with the next id: of a transaction that never was committed.
    leave("snapshots/2");
    let daemon = daemon.restart().await;
    assert_eq!(daemon.directories(), 1);
    for empty in ["new", "trash"] {
        let count = || std::fs::read_dir(daemon.root().join(empty)).unwrap().count();
        eventually(empty, || count() == 0).await;
    }
    let leave = daemon.root().join("snapshots/2/fs");
    std::fs::create_dir_all(&leave).unwrap();
    std::fs::write(leave.join("stale"), "x").unwrap();
    let mounted = daemon.mount(&daemon.prepare("next", "kept").await.unwrap());
    assert_eq!(mounted.names(), ["file"]);
}

#[tokio::test]
async fn missing_directories_are_made_again_where_nothing_was_in_them() {
    let daemon = Daemon::start().await;
    daemon.layer("base", "", "file").await;
    let active = daemon.prepare("active", "base").await.unwrap();
    let view = daemon.view("view", "").await.unwrap();
    for id in [2, 3] {
        std::fs::remove_dir_all(daemon.root().join(format!("snapshots/{id}"))).unwrap();
    }
    let daemon = daemon.restart().await;
    assert_eq!(daemon.mount(&active).names(), ["file"]);
    assert!(daemon.mount(&view).names().is_empty());
    // What was committed had content; an empty directory would be a lie.
    std::fs::remove_dir_all(daemon.root().join("snapshots/1")).unwrap();
    let daemon = daemon.restart().await;
    assert!(!daemon.root().join("snapshots/1").exists());
    let status = daemon.prepare("x", "base").await.unwrap_err();
    assert_eq!(status.code(), Code::Internal, "{status}");
}

#[tokio::test]
async fn a_damaged_record_is_kept_and_stops_nothing() {
    let daemon = Daemon::start().await;
    daemon.layer("bad", "", "file").await;
    daemon.layer("good", "", "file").await;
    let daemon = daemon.restart_with_damaged("bad").await;
    assert_eq!(names(&daemon.list(&[]).await.unwrap()), ["good"]);
    for status in [
        daemon.stat("bad").await.unwrap_err(),
        daemon.prepare("x", "bad").await.unwrap_err(),
        daemon.remove("bad").await.unwrap_err(),
    ] {
        assert_eq!(status.code(), Code::DataLoss, "{status}");
        assert!(status.message().contains(r#"damaged record "bad""#), "{status}");
    }
    // Its directory is not known to be its own, so that nothing is cleaned up.
    daemon.cleanup().await.unwrap();
    assert_eq!(daemon.directories(), 2);
    daemon.prepare("x", "good").await.unwrap();
    daemon.remove("x").await.unwrap();
}

#[tokio::test]
async fn keys_are_no_paths() {
    let daemon = Daemon::start().await;
    for key in ["../../etc", "/", ".", "a/../b c", "\u{0}", "é\n", &"long".repeat(5000)] {
        let mounted = daemon.mount(&daemon.prepare(key, "").await.unwrap());
        assert!(mounted.names().is_empty());
        drop(mounted);
        assert_eq!(daemon.stat(key).await.unwrap().name, key);
        let status = daemon.prepare(key, "").await.unwrap_err();
        assert_eq!(status.code(), Code::AlreadyExists, "{status}");
        daemon.remove(key).await.unwrap();
    }
}

#[tokio::test]
async fn views_are_read_only() {
    let daemon = Daemon::start().await;
    daemon.layer("a", "", "a").await;
    daemon.layer("b", "a", "b").await;
    for (key, parent, expected) in [("0", "", &[] as &[&str]), ("1", "a", &["a"]), ("2", "b", &["a", "b"])] {
        let mounted = daemon.mount(&daemon.view(key, parent).await.unwrap());
        assert_eq!(mounted.names(), expected);
        assert!(mounted.is_read_only(), "view of {parent:?}");
        assert_eq!(daemon.stat(key).await.unwrap().kind(), Kind::View);
    }
}

/// BuildKit compares a snapshot with its parent by the upper directory alone, if the options of both tell it that it
/// may.
#[tokio::test]
async fn the_difference_of_two_snapshots_can_be_read_from_their_mounts() {
    let daemon = Daemon::start().await;
    daemon.layer("run 1", "", "one").await;
    daemon.layer("run 2", "run 1", "two").await;
    daemon.layer("run 3", "run 2", "three").await;
    let lower = lowers(&daemon.view("lower", "run 2").await.unwrap());
    let upper = daemon.view("upper", "run 3").await.unwrap();
    let known = |option: &String| option == "index=off" || option == "userxattr" || option.starts_with("lowerdir=");
    assert!(upper[0].options.iter().all(known), "{upper:?}");
    let upper = lowers(&upper);
    assert_eq!(upper[1..], lower);
    assert!(Path::new(&upper[0]).join("three").exists());
    // The bottommost: one bind mount against nothing, or against an overlay.
    let one = daemon.view("bottom", "run 1").await.unwrap();
    assert_eq!(
        (one[0].r#type.as_str(), one[0].source.as_str()),
        ("bind", lower[1].as_str())
    );
    // An active snapshot shows the same lower directories.
    let active = daemon.prepare("run 4", "run 3").await.unwrap();
    assert_eq!(lowers(&active), upper);
    assert_eq!(daemon.mounts("run 4").await.unwrap(), active);
}

#[tokio::test]
async fn modes_and_owners_do_not_depend_on_the_umask() {
    let daemon = Daemon::start().await;
    let umask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let mounts = daemon.prepare("a", "").await;
    rustix::process::umask(umask);
    let mounted = daemon.mount(&mounts.unwrap());
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(mounted.path()), 0o755);
    for private in ["", "snapshots", "new", "trash", "snapshots/1"] {
        assert_eq!(mode(&daemon.root().join(private)), 0o700, "{private}");
    }
    // What the root of a snapshot is, is also the root of the next one.
    std::os::unix::fs::chown(mounted.path(), Some(12), Some(34)).unwrap();
    std::fs::set_permissions(mounted.path(), std::fs::Permissions::from_mode(0o2711)).unwrap();
    drop(mounted);
    daemon.commit("b", "a").await.unwrap();
    let mounted = daemon.mount(&daemon.prepare("c", "b").await.unwrap());
    let root = std::fs::metadata(mounted.path()).unwrap();
    assert_eq!((root.uid(), root.gid(), mode(mounted.path())), (12, 34, 0o2711));
}

#[tokio::test]
async fn usage_is_that_of_the_snapshot_alone() {
    const SIZE: usize = 1 << 20;
    let daemon = Daemon::start().await;
    let mounted = daemon.mount(&daemon.prepare("a", "").await.unwrap());
    let empty = daemon.usage("a").await.unwrap();
    assert_eq!(empty.inodes, 1);
    std::fs::write(mounted.path().join("file"), vec![1; SIZE]).unwrap();
    std::fs::hard_link(mounted.path().join("file"), mounted.path().join("link")).unwrap();
    let file = std::fs::File::open(mounted.path().join("file")).unwrap();
    // Blocks are allocated late.
    file.sync_all().unwrap();
    drop((mounted, file));
    let active = daemon.usage("a").await.unwrap();
    assert_eq!(active.inodes, 2);
    assert!(
        (SIZE as i64..2 * SIZE as i64).contains(&(active.size - empty.size)),
        "{active:?}"
    );
    daemon.commit("b", "a").await.unwrap();
    assert_eq!(daemon.usage("b").await.unwrap(), active);
    daemon.prepare("c", "b").await.unwrap();
    assert_eq!(daemon.usage("c").await.unwrap().inodes, 1);
    daemon.view("v", "b").await.unwrap();
    assert_eq!(daemon.usage("v").await.unwrap().inodes, 0);
    // It is known without looking.
    let daemon = daemon.restart().await;
    assert_eq!(daemon.usage("b").await.unwrap(), active);
}

#[tokio::test]
async fn a_root_that_mount_options_cannot_name_is_refused() {
    use std::sync::Arc;

    use lazuli::metrics::Metrics;
    use lazuli::snapshots::Service;
    use lazuli::store::Store;

    let dir = tempfile::tempdir().unwrap();
    for name in ["a,b", "a:b"] {
        let root = dir.path().join(name);
        std::fs::create_dir(&root).unwrap();
        let error = lazuli::sync::blocking(move || {
            let store = Arc::new(Store::open(&root.join("metadata.redb")).unwrap());
            Service::new(&root, store, FakeLayers::new(), Arc::new(Metrics::new())).err()
        });
        let error = error.await.unwrap();
        assert!(error.to_string().contains("comma, colon"), "{error}");
    }
}
