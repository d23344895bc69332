//! Remote snapshots: the AlreadyExists protocol, its names, restarts, and the release of layers.

use std::os::unix::fs::MetadataExt as _;
use std::sync::atomic::Ordering;

use lazuli::catalog::Needed;
use lazuli::layer::Digest;
use lazuli::proto::snapshots::v1::Kind;
use tonic::Code;

use crate::local::update;
use crate::support::*;

#[tokio::test]
async fn a_pull_finds_every_layer_and_a_container_sees_them() {
    let daemon = Daemon::start().await;
    daemon.layers.add("sha256:1", "one");
    daemon.layers.add("sha256:2", "two");
    let one = daemon.pull("default/1/extract-1 sha256:1", "", "sha256:1").await;
    let two = daemon.pull("default/2/extract-2 sha256:2", &one, "sha256:2").await;
    // The key of a remote Prepare leaves nothing behind.
    assert_eq!(daemon.list(&[]).await.unwrap().len(), 2);

    let mounted = daemon.mount(&daemon.prepare("default/3/container", &two).await.unwrap());
    assert_eq!(mounted.names(), ["one", "two"]);
    std::fs::remove_file(mounted.path().join("one")).unwrap();
    std::fs::write(mounted.path().join("three"), "3").unwrap();
    assert_eq!(mounted.names(), ["three", "two"]);
    let view = daemon.mount(&daemon.view("default/4/view", &two).await.unwrap());
    assert_eq!(view.names(), ["one", "two"]);
    assert!(view.is_read_only());

    let request = &daemon.layers.requests()[1];
    assert_eq!(request.namespace, "default");
    assert_eq!(request.chain_id, "sha256:2");
    assert_eq!(request.labels, strings(&[(REF, "sha256:2")]));
}

/// A bug in one request is an error of that request: the others, and those after it on the same connection, go on.
#[tokio::test]
async fn a_panic_is_an_error_of_one_request() {
    let daemon = Daemon::start().await;
    daemon.layers.add("sha256:1", "one");
    daemon.layers.held.send_replace(true);
    daemon.layers.panics.store(1, Ordering::Relaxed);
    let asked = ["a/1/x", "a/2/x", "a/3/x"].map(|key| daemon.prepare_with(key, "", &[(REF, "sha256:1")]));
    let answers = futures::future::join_all(asked);
    let release = async {
        while daemon.layers.requests().len() < 3 {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        daemon.layers.held.send_replace(false);
    };
    let (answers, ()) = futures::join!(answers, release);
    let codes: Vec<Code> = answers.into_iter().map(|answer| answer.unwrap_err().code()).collect();
    let count = |code| codes.iter().filter(|one| **one == code).count();
    assert_eq!((count(Code::Internal), count(Code::AlreadyExists)), (1, 2), "{codes:?}");
    let one = daemon.pull("a/4/x", "", "sha256:1").await;
    assert_eq!(daemon.prepare("a/5/container", &one).await.unwrap().len(), 1);
}

/// A containerd that would give a snapshot its parent when it is committed does not do so where it exists already: all below it would be lost.
#[tokio::test]
async fn a_layer_on_nothing_is_not_one_of_an_image() {
    let daemon = Daemon::start().await;
    daemon.layers.add("sha256:1", "one");
    daemon.layers.add("sha256:2", "two");
    daemon.layers.add("sha256:3", "three");
    let one = daemon.pull("a/1/x", "", "sha256:1").await;
    let above = ("containerd.io/snapshot/parent-chain-id", "sha256:1");
    let refused = |status: tonic::Status| {
        assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
        assert!(status.message().contains("rebase"), "{status}");
    };
    refused(
        daemon
            .prepare_with("a/2/x", "", &[(REF, "sha256:2"), above])
            .await
            .unwrap_err(),
    );
    // Earlier ones have no such label.
    daemon.layers.say("sha256:3", &[None], true);
    refused(
        daemon
            .prepare_with("a/3/x", "", &[(REF, "sha256:3")])
            .await
            .unwrap_err(),
    );
    assert_eq!(names(&daemon.list(&[]).await.unwrap()), [one.as_str()]);
    let status = daemon
        .prepare_with("a/4/x", &one, &[(REF, "sha256:2"), above])
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists);
}

#[tokio::test]
async fn labels_of_the_request_stay_on_the_snapshot() {
    let daemon = Daemon::start().await;
    daemon.layers.add("sha256:1", "one");
    let label = ("containerd.io/snapshot/cri.image-ref", "registry.example/app:1");
    let status = daemon
        .prepare_with("k8s.io/1/x", "", &[(REF, "sha256:1"), label])
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists);
    let infos = daemon.list(&["kind==committed"]).await.unwrap();
    assert_eq!(infos[0].labels, strings(&[(REF, "sha256:1"), label]));
    assert_eq!(infos[0].created_at, infos[0].updated_at);
}

#[tokio::test]
async fn a_chain_id_on_two_parents_is_two_snapshots() {
    let daemon = Daemon::start().await;
    daemon.layers.add("sha256:base", "base");
    let layer = daemon.layers.add("sha256:top", "top");
    let remote = daemon.pull("a/1/x", "", "sha256:base").await;
    // In another namespace containerd unpacked the base layer itself.
    daemon.layer("b/1/sha256:base", "", "base").await;
    let on_remote = daemon.pull("a/2/x", &remote, "sha256:top").await;
    let on_local = daemon.pull("b/2/x", "b/1/sha256:base", "sha256:top").await;
    assert_ne!(on_remote, on_local);
    for (key, parent) in [("a/3/c", &on_remote), ("b/3/c", &on_local)] {
        let mounted = daemon.mount(&daemon.prepare(key, parent).await.unwrap());
        assert_eq!(mounted.names(), ["base", "top"]);
    }
    // The layer stays while one of them needs it.
    daemon.remove("a/3/c").await.unwrap();
    daemon.remove(&on_remote).await.unwrap();
    let base = Digest::of(b"base");
    let expected = || {
        daemon
            .layers
            .last_retained()
            .is_some_and(|kept| kept.layers.len() == 2 && kept.layers.contains(&base))
    };
    eventually("the layers are counted again", expected).await;
    assert!(daemon.layers.is_live(&layer));
}

#[tokio::test]
async fn the_same_layer_is_one_snapshot_for_all_namespaces() {
    let daemon = Daemon::start().await;
    daemon.layers.add("sha256:1", "one");
    let first = daemon.pull("a/1/x", "", "sha256:1").await;
    assert_eq!(daemon.pull("b/7/y", "", "sha256:1").await, first);
    // Even if it can no longer be resolved: it is there.
    daemon.layers.forget("sha256:1");
    assert_eq!(daemon.pull("c/9/z", "", "sha256:1").await, first);
}

#[tokio::test]
async fn the_same_content_may_come_as_another_blob() {
    let daemon = Daemon::start().await;
    let gzip = daemon.layers.add("sha256:1", "gzip");
    let name = daemon.pull("a/1/x", "", "sha256:1").await;
    // While the one that is there can be shown, it stays.
    let zstd = daemon.layers.add("sha256:1", "zstd");
    daemon.layers.keep("gzip");
    assert_eq!(daemon.pull("a/2/x", "", "sha256:1").await, name);
    assert_eq!(
        daemon.mount(&daemon.view("a/3/v", &name).await.unwrap()).names(),
        ["gzip"]
    );
    // Otherwise the other one takes its place.
    daemon.layers.release(&gzip);
    assert_eq!(daemon.pull("a/4/x", "", "sha256:1").await, name);
    assert_eq!(
        daemon.mount(&daemon.view("a/5/v", &name).await.unwrap()).names(),
        ["zstd"]
    );
    assert!(daemon.layers.is_live(&zstd));
}

#[tokio::test]
async fn a_snapshot_whose_label_was_taken_away_is_found_again() {
    let daemon = Daemon::start().await;
    daemon.layers.add("sha256:1", "one");
    let name = daemon.pull("a/1/x", "", "sha256:1").await;
    update(&daemon, &name, &[("other", "label")], &[]).await.unwrap();
    assert_eq!(daemon.pull("b/1/x", "", "sha256:1").await, name);
    let labels = daemon.stat(&name).await.unwrap().labels;
    assert_eq!(labels, strings(&[(REF, "sha256:1"), ("other", "label")]));
}

#[tokio::test]
async fn a_refused_layer_is_left_to_containerd() {
    let daemon = Daemon::start().await;
    let labels = [(REF, "sha256:unknown")];
    let mounts = daemon.prepare_with("default/1/x", "", &labels).await.unwrap();
    assert_eq!(mounts[0].r#type, "bind");
    let info = daemon.stat("default/1/x").await.unwrap();
    assert_eq!(info.kind(), Kind::Active);
    assert_eq!(info.labels, strings(&labels));
    daemon.commit("default/2/sha256:unknown", "default/1/x").await.unwrap();
}

#[tokio::test]
async fn a_remote_prepare_fails_as_any_other() {
    let daemon = Daemon::start().await;
    daemon.layers.add("sha256:1", "one");
    let labels = [(REF, "sha256:1")];
    let code = async |key: &str, parent: &str| daemon.prepare_with(key, parent, &labels).await.unwrap_err().code();
    assert_eq!(code("k", "none").await, Code::NotFound);
    daemon.prepare("active", "").await.unwrap();
    assert_eq!(code("k", "active").await, Code::InvalidArgument);
    assert_eq!(code("", "").await, Code::InvalidArgument);
    // Nobody was asked for a layer that could not be used.
    assert!(daemon.layers.requests().is_empty());
}

#[tokio::test]
async fn a_slow_layer_keeps_nobody_waiting() {
    let daemon = Daemon::start().await;
    daemon.layers.add("sha256:1", "one");
    daemon.layers.held.send_replace(true);
    let first = daemon.pull("a/1/x", "", "sha256:1");
    let second = daemon.pull("b/1/x", "", "sha256:1");
    let others = async {
        eventually("both are being resolved", || daemon.layers.requests().len() == 2).await;
        daemon.layer("c/1/local", "", "file").await;
        assert_eq!(daemon.list(&[]).await.unwrap().len(), 1);
        daemon.remove("c/1/local").await.unwrap();
        daemon.cleanup().await.unwrap();
        daemon.layers.held.send_replace(false);
    };
    let (first, second, ()) = tokio::join!(first, second, others);
    assert_eq!(first, second);
    assert_eq!(daemon.directories(), 1);
}

#[tokio::test]
async fn everything_is_back_after_a_restart() {
    let daemon = Daemon::start().await;
    daemon.layers.add("sha256:1", "one");
    let one = daemon.pull("default/1/x", "", "sha256:1").await;
    daemon.layer("default/2/local", &one, "two").await;
    daemon.prepare("default/3/c", "default/2/local").await.unwrap();
    let before = daemon.list(&[]).await.unwrap();
    let mounts = daemon.mounts("default/3/c").await.unwrap();

    let daemon = daemon.restart().await;
    assert_eq!(daemon.list(&[]).await.unwrap(), before);
    assert_eq!(daemon.mounts("default/3/c").await.unwrap(), mounts);
    let mounted = daemon.mount(&mounts);
    assert_eq!(mounted.names(), ["one", "two"]);
    // No layer was resolved for that, and the ones in use were named.
    assert_eq!(daemon.layers.requests().len(), 1);
    let one_layer = vec![Digest::of(b"one")];
    let needed = Needed {
        layers: one_layer.clone(),
        bases: vec![one_layer],
    };
    let kept = || daemon.layers.last_retained().as_ref() == Some(&needed);
    eventually("unused layers are released at start", kept).await;
    assert_eq!(daemon.pull("default/4/x", "", "sha256:1").await, one);
}

#[tokio::test]
async fn links_to_layers_are_restored_and_follow_them() {
    let daemon = Daemon::start().await;
    let layer = daemon.layers.add("sha256:1", "one");
    let one = daemon.pull("default/1/x", "", "sha256:1").await;
    let directory = std::fs::read_dir(daemon.root().join("snapshots"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    std::fs::remove_dir_all(&directory).unwrap();
    let daemon = daemon.restart().await;
    assert!(directory.is_dir());
    // Even one that points elsewhere.
    std::os::unix::fs::symlink("/nowhere", directory.join("fs")).unwrap();
    let mounted = daemon.mount(&daemon.view("default/2/v", &one).await.unwrap());
    assert_eq!(mounted.names(), ["one"]);
    drop(mounted);

    // A layer that is not there is an error that says so, and no empty directory.
    daemon.layers.release(&layer);
    let status = daemon.prepare("default/3/c", &one).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().contains(&layer.to_string()), "{status}");
    assert_eq!(
        daemon.mounts("default/2/v").await.unwrap_err().code(),
        Code::Unavailable
    );
    let daemon = daemon.restart().await;
    daemon.layers.revive(&layer);
    daemon.mounts("default/2/v").await.unwrap();
}

#[tokio::test]
async fn a_layer_released_before_it_is_recorded_is_resolved_again() {
    let daemon = Daemon::start().await;
    daemon.layers.add("sha256:1", "one");
    daemon.layers.lost.store(2, Ordering::Relaxed);
    daemon.pull("default/1/x", "", "sha256:1").await;
    assert_eq!(daemon.layers.requests().len(), 3);
    // If that never ends, containerd unpacks.
    daemon.layers.add("sha256:2", "two");
    daemon.layers.lost.store(usize::MAX, Ordering::Relaxed);
    daemon
        .prepare_with("default/2/x", "", &[(REF, "sha256:2")])
        .await
        .unwrap();
}

#[tokio::test]
async fn layers_are_released_when_the_last_snapshot_goes() {
    let daemon = Daemon::start().await;
    let one = daemon.layers.add("sha256:1", "one");
    let two = daemon.layers.add("sha256:2", "two");
    let first = daemon.pull("default/1/x", "", "sha256:1").await;
    let second = daemon.pull("default/2/x", &first, "sha256:2").await;
    assert_eq!(
        daemon.remove(&first).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    daemon.remove(&second).await.unwrap();
    eventually("the upper layer is released", || !daemon.layers.is_live(&two)).await;
    assert!(daemon.layers.is_live(&one));
    daemon.remove(&first).await.unwrap();
    eventually("the lower layer is released", || !daemon.layers.is_live(&one)).await;
    eventually("their directories are gone", || daemon.directories() == 0).await;
    // The layers themselves are not the snapshotter's to delete.
    assert_eq!(daemon.pull("default/3/x", "", "sha256:1").await, first);
    let view = daemon.mount(&daemon.view("default/4/v", &first).await.unwrap());
    assert_eq!(view.names(), ["one"]);
}

/// A release may take long: a kernel that does not answer an unmount, a disk that is slow. Nobody waits for it.
#[tokio::test]
#[expect(
    clippy::await_holding_lock,
    reason = "the release that wants it is held up on purpose, on a thread that runs no tasks"
)]
async fn nothing_waits_for_what_is_let_go() {
    let daemon = Daemon::start().await;
    daemon.layers.add("sha256:1", "one");
    daemon.layers.add("sha256:2", "two");
    let one = daemon.pull("default/1/x", "", "sha256:1").await;
    let two = daemon.pull("default/2/x", "", "sha256:2").await;
    eventually("the release of the start is over", || {
        daemon.layers.last_retained().is_some()
    })
    .await;
    let letting_go = std::sync::Arc::clone(&daemon.layers.letting_go);
    let held = letting_go.lock().unwrap();
    daemon.remove(&two).await.unwrap();
    let without_two = || {
        daemon
            .layers
            .last_retained()
            .is_some_and(|needed| needed.layers.len() == 1)
    };
    eventually("a release has been decided", without_two).await;
    daemon.prepare("default/3/c", &one).await.unwrap();
    daemon.view("default/4/v", &one).await.unwrap();
    daemon.mounts("default/3/c").await.unwrap();
    daemon.remove("default/3/c").await.unwrap();
    daemon.layers.add("sha256:3", "three");
    daemon.pull("default/5/x", &one, "sha256:3").await;
    drop(held);
}

/// A release waits for what is being mounted when it begins, since nothing refers to that yet; nobody else does.
#[tokio::test]
async fn a_slow_mount_delays_a_release_and_nobody_else() {
    let daemon = Daemon::start().await;
    daemon.layers.add("sha256:1", "one");
    daemon.layers.add("sha256:2", "two");
    let one = daemon.pull("default/1/x", "", "sha256:1").await;
    let two = daemon.pull("default/2/x", "", "sha256:2").await;
    eventually("the release of the start is over", || {
        daemon.layers.last_retained().is_some()
    })
    .await;
    let before = daemon.layers.last_retained();
    let slow_mounts = std::sync::Arc::clone(&daemon.layers.slow_mounts);
    let held = slow_mounts.lock().unwrap();
    let slow = daemon.prepare("default/3/slow", &one);
    let others = async {
        let mounting = || daemon.layers.mounting.load(Ordering::SeqCst) == 1;
        eventually("a container is being made", mounting).await;
        daemon.remove(&two).await.unwrap();
        // Past the moment in which nothing is let go of.
        tokio::time::sleep(std::time::Duration::from_secs(4)).await;
        daemon.prepare("default/4/quick", &one).await.unwrap();
        daemon.mounts("default/4/quick").await.unwrap();
        assert_eq!(
            daemon.layers.last_retained(),
            before,
            "the release waits for the slow one"
        );
        drop(held);
    };
    let (slow, ()) = tokio::join!(slow, others);
    slow.unwrap();
    let base = vec![Digest::of(b"one")];
    let decided = || {
        daemon
            .layers
            .last_retained()
            .is_some_and(|needed| needed.bases == [base.clone()])
    };
    eventually("the release knows what was made", decided).await;
}

#[tokio::test]
async fn a_layer_that_occurs_twice_can_be_mounted() {
    let daemon = Daemon::start().await;
    let mut parent = String::new();
    for (number, content) in ["empty", "base", "empty", "empty", "top", "empty"]
        .into_iter()
        .enumerate()
    {
        let chain_id = format!("sha256:{number}");
        daemon.layers.add(&chain_id, content);
        parent = daemon.pull(&format!("default/{number}/x"), &parent, &chain_id).await;
    }
    let mounts = daemon.prepare("default/9/c", &parent).await.unwrap();
    assert_eq!(lowers(&mounts).len(), 3);
    assert_eq!(daemon.mount(&mounts).names(), ["base", "empty", "top"]);
}

#[tokio::test]
async fn a_chain_of_128_layers_of_both_kinds_can_be_mounted() {
    let daemon = Daemon::start().await;
    let mut parent = String::new();
    for number in 0..128 {
        let file = format!("file-{number:03}");
        if number % 2 == 0 {
            let chain_id = format!("sha256:{number}");
            daemon.layers.add(&chain_id, &file);
            parent = daemon.pull(&format!("default/{number}/x"), &parent, &chain_id).await;
        } else {
            let name = format!("default/{number}/local");
            daemon.layer(&name, &parent, &file).await;
            parent = name;
        }
    }
    for mounts in [
        daemon.prepare("default/200/c", &parent).await.unwrap(),
        daemon.view("default/201/v", &parent).await.unwrap(),
    ] {
        assert_eq!(lowers(&mounts).len(), 128);
        let mounted = daemon.mount(&mounts);
        let expected: Vec<_> = (0..128).map(|number| format!("file-{number:03}")).collect();
        assert_eq!(mounted.names(), expected);
    }
}

#[tokio::test]
async fn lower_directories_are_directories_for_those_who_do_not_follow_links() {
    let daemon = Daemon::start().await;
    daemon.layers.add("sha256:1", "one");
    let one = daemon.pull("default/1/x", "", "sha256:1").await;
    daemon.layer("default/2/local", &one, "two").await;
    let mounts = daemon.prepare("default/3/c", "default/2/local").await.unwrap();
    let snapshots = daemon.root().join("snapshots");
    for lower in lowers(&mounts) {
        assert!(std::path::Path::new(&lower).starts_with(&snapshots), "{lower}");
        assert!(std::fs::symlink_metadata(&lower).unwrap().is_dir(), "{lower}");
    }
}

#[tokio::test]
async fn a_containers_root_is_as_its_image_has_it() {
    let daemon = Daemon::start().await;
    daemon.layers.add("sha256:1", "one");
    let one = daemon.pull("default/1/x", "", "sha256:1").await;
    let view = daemon.mount(&daemon.view("default/2/v", &one).await.unwrap());
    std::os::unix::fs::chown(view.path(), Some(1234), Some(5678)).unwrap_err();
    drop(view);
    // The layer itself has the owner.
    let layer = std::fs::read_link(daemon.root().join("snapshots/1/fs")).unwrap();
    std::os::unix::fs::chown(&layer, Some(1234), Some(5678)).unwrap();
    let mounted = daemon.mount(&daemon.prepare("default/3/c", &one).await.unwrap());
    let root = std::fs::metadata(mounted.path()).unwrap();
    assert_eq!((root.uid(), root.gid(), root.mode() & 0o7777), (1234, 5678, 0o755));
}

#[tokio::test]
async fn usage_of_a_remote_snapshot_is_its_layers() {
    let daemon = Daemon::start().await;
    let layer = daemon.layers.add("sha256:1", "one");
    let one = daemon.pull("default/1/x", "", "sha256:1").await;
    let usage = daemon.usage(&one).await.unwrap();
    assert_eq!((usage.size, usage.inodes), (4711, 42));
    daemon.layers.release(&layer);
    let usage = daemon.usage(&one).await.unwrap();
    assert_eq!((usage.size, usage.inodes), (0, 0));
}

#[tokio::test]
async fn nothing_is_mounted_for_a_pull_and_links_come_with_the_first_use() {
    let daemon = Daemon::start().await;
    daemon.layers.add("sha256:1", "one");
    let one = daemon.pull("default/1/x", "", "sha256:1").await;
    let snapshots = daemon.root().join("snapshots");
    assert_eq!(std::fs::read_dir(snapshots.join("1")).unwrap().count(), 0);
    daemon.prepare("default/2/c", &one).await.unwrap();
    assert!(std::fs::read_link(snapshots.join("1/fs")).unwrap().ends_with("one"));
}

#[tokio::test]
async fn remote_layers_are_one_directory_where_they_are_merged() {
    let daemon = Daemon::start().await;
    daemon.layers.merges.store(true, Ordering::Relaxed);
    let mut parent = String::new();
    let mut layers = Vec::new();
    // The same layer twice is in the chain once, where it is topmost.
    for (chain_id, content) in [("sha256:1", "empty"), ("sha256:2", "two"), ("sha256:top", "empty")] {
        layers.push(daemon.layers.add(chain_id, content));
        parent = daemon.pull(&format!("default/1/{chain_id}"), &parent, chain_id).await;
    }
    let base = vec![layers[2], layers[1]];
    assert_eq!(
        daemon.layers.expected(),
        std::slice::from_ref(&base),
        "for the topmost layer alone"
    );

    let mounts = daemon.prepare("default/2/c", &parent).await.unwrap();
    // Named for what shows it, so that it never points anywhere else.
    let links = daemon.root().join("snapshots/3/chain.").display().to_string();
    let chain = lowers(&mounts)[0].clone();
    assert!(chain.starts_with(&links) && chain.ends_with("/."), "{chain}");
    assert_eq!(lowers(&mounts), std::slice::from_ref(&chain));
    assert_eq!(daemon.mount(&mounts).names(), ["empty", "two"]);
    // A view of one directory is a bind mount.
    let view = daemon.view("default/3/v", &parent).await.unwrap();
    assert_eq!(
        (view[0].r#type.as_str(), view[0].source.as_str()),
        ("bind", chain.as_str())
    );
    let mounted = daemon.mount(&view);
    assert_eq!(mounted.names(), ["empty", "two"]);
    assert!(mounted.is_read_only());
    drop(mounted);

    // What is local stays on it.
    daemon.layer("default/4/local", &parent, "local").await;
    let mounts = daemon.prepare("default/5/c", "default/4/local").await.unwrap();
    assert_eq!(lowers(&mounts).len(), 2);
    assert_eq!(lowers(&mounts)[1], chain);
    assert_eq!(daemon.mount(&mounts).names(), ["empty", "local", "two"]);
    // Above it nothing can be merged, as whiteouts would be lost.
    let top = daemon.layers.add("sha256:5", "five");
    let on_local = daemon.pull("default/6/x", "default/4/local", "sha256:5").await;
    let six = daemon.layers.add("sha256:6", "six");
    let on_local = daemon.pull("default/6/y", &on_local, "sha256:6").await;
    let mounts = daemon.prepare("default/7/c", &on_local).await.unwrap();
    assert_eq!(lowers(&mounts).len(), 4);
    assert_eq!(daemon.mount(&mounts).names(), ["empty", "five", "local", "six", "two"]);

    // What is needed is what is in use, and no more once it is removed.
    daemon.remove("default/2/c").await.unwrap();
    let layers = &daemon.layers;
    let needed = |bases: &[Vec<Digest>]| {
        let mut bases = bases.to_vec();
        bases.sort();
        move || layers.last_retained().is_some_and(|needed| needed.bases == bases)
    };
    eventually("bases are named", needed(&[base.clone(), vec![top], vec![six]])).await;
    for key in ["default/7/c", "default/5/c", "default/3/v"] {
        daemon.remove(key).await.unwrap();
    }
    eventually("no base is needed", needed(&[])).await;
    assert!(daemon.layers.is_live(&top));
}

#[tokio::test]
async fn a_snapshot_follows_its_layers_from_one_form_to_the_other() {
    let daemon = Daemon::start().await;
    daemon.layers.add("sha256:1", "one");
    daemon.layers.add("sha256:2", "two");
    let one = daemon.pull("default/1/x", "", "sha256:1").await;
    let two = daemon.pull("default/2/x", &one, "sha256:2").await;
    let stacked = daemon.prepare("default/3/c", &two).await.unwrap();
    assert_eq!(lowers(&stacked).len(), 2);
    daemon.layers.merges.store(true, Ordering::Relaxed);
    let merged = daemon.mounts("default/3/c").await.unwrap();
    assert_eq!(lowers(&merged).len(), 1);
    for mounts in [&stacked, &merged] {
        assert_eq!(daemon.mount(mounts).names(), ["one", "two"]);
    }
    let daemon = daemon.restart().await;
    daemon.layers.merges.store(false, Ordering::Relaxed);
    assert_eq!(daemon.mounts("default/3/c").await.unwrap(), stacked);
}
