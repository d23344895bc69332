//! Layers that containerd has fetched and has applied: what the snapshot is before its commit and after it.

use std::sync::atomic::Ordering;

use lazuli::layer::Digest;
use lazuli::proto::snapshots::v1::Kind;
use tonic::Code;

use crate::support::*;

const ONE: &str = "sha256:1111111111111111111111111111111111111111111111111111111111111111";
const TWO: &str = "sha256:2222222222222222222222222222222222222222222222222222222222222222";

fn extraction(number: u32, chain_id: &str) -> String {
    format!("default/{number}/extract-{number} {chain_id}")
}

#[tokio::test]
async fn what_is_applied_is_shown_and_not_unpacked() {
    let daemon = Daemon::start().await;
    let one = daemon.layers.add(ONE, "one");
    daemon.layers.add(TWO, "two");
    let key = extraction(1, ONE);
    let mounts = daemon.prepare(&key, "").await.unwrap();
    let answer = daemon.apply(mounts).await.unwrap().applied.unwrap();
    assert_eq!(answer.digest, Digest::of(one.as_bytes()).to_string());
    let name = format!("default/2/{ONE}");
    daemon.commit(&name, &key).await.unwrap();
    assert_eq!(daemon.stat(&name).await.unwrap().kind(), Kind::Committed);
    assert_eq!(
        daemon.usage(&name).await.unwrap().size,
        4711,
        "it is the layer that takes room"
    );

    // On what is applied, something that is applied, between which the daemon ends.
    let key = extraction(3, TWO);
    let mounts = daemon.prepare(&key, &name).await.unwrap();
    daemon.apply(mounts.clone()).await.unwrap();
    let below: Vec<_> = daemon.layers.applied().into_iter().map(|of| of.below).collect();
    assert_eq!(below, [vec![], vec![Some(one)]]);
    let daemon = daemon.restart().await;
    // containerd may try once more.
    daemon.apply(daemon.mounts(&key).await.unwrap()).await.unwrap();
    let top = format!("default/4/{TWO}");
    daemon.commit(&top, &key).await.unwrap();
    let container = daemon.mount(&daemon.prepare("default/5/container", &top).await.unwrap());
    assert_eq!(container.names(), ["one", "two"]);
    drop(container);
    let daemon = daemon.restart().await;
    let view = daemon.mount(&daemon.view("default/6/view", &top).await.unwrap());
    assert_eq!(view.names(), ["one", "two"]);
}

#[tokio::test]
async fn nothing_is_merged_for_a_layer_that_is_unpacked() {
    let daemon = Daemon::start().await;
    daemon.layers.merges.store(true, Ordering::Relaxed);
    for (chain_id, content) in [(ONE, "one"), (TWO, "two")] {
        daemon.layers.add(chain_id, content);
    }
    let one = daemon.pull(&extraction(1, ONE), "", ONE).await;
    let two = daemon.pull(&extraction(2, TWO), &one, TWO).await;
    let unpacked_on = daemon.prepare(&extraction(3, "sha256:3"), &two).await.unwrap();
    assert_eq!(lowers(&unpacked_on).len(), 2);
    let container = daemon.prepare("default/4/container", &two).await.unwrap();
    assert_eq!(lowers(&container).len(), 1);
}

#[tokio::test]
async fn what_is_given_up_lets_go_of_its_layer() {
    let daemon = Daemon::start().await;
    let one = daemon.layers.add(ONE, "one");
    let key = extraction(1, ONE);
    daemon.apply(daemon.prepare(&key, "").await.unwrap()).await.unwrap();
    let daemon = daemon.restart().await;
    assert_eq!(
        daemon.layers.last_retained().unwrap().layers,
        [one],
        "it may still be committed"
    );
    daemon.remove(&key).await.unwrap();
    eventually("the layer is let go of", || {
        daemon.layers.last_retained().unwrap().layers.is_empty()
    })
    .await;
    assert_eq!(daemon.directories(), 0);
}

#[tokio::test]
async fn a_snapshot_shows_a_layer_or_has_files_of_its_own() {
    let daemon = Daemon::start().await;
    daemon.layers.add(ONE, "one");
    let key = extraction(1, ONE);
    let mounts = daemon.prepare(&key, "").await.unwrap();
    daemon.apply(mounts.clone()).await.unwrap();
    let own = std::path::Path::new(&mounts[0].source).join("file");
    std::fs::write(&own, "own").unwrap();
    let refused = daemon.commit("default/2/name", &key).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    // A layer on top of files is containerd's to unpack, which is not there.
    let given_back = daemon.apply(mounts).await.unwrap_err();
    assert_eq!(given_back.code(), Code::Unavailable, "{given_back}");
    std::fs::remove_file(&own).unwrap();
    // As after a commit that was cut off: its directory is a remote snapshot's already, and the record is not.
    std::fs::remove_dir(own.parent().unwrap()).unwrap();
    daemon.commit("default/2/name", &key).await.unwrap();
}

#[tokio::test]
async fn what_is_not_shown_is_unpacked_elsewhere() {
    let daemon = Daemon::start().await;
    // A container's, whose layer has to be in it at once; one whose layer Lazuli cannot show.
    for key in ["default/1/container", &extraction(2, TWO)] {
        let given_back = daemon.apply(daemon.prepare(key, "").await.unwrap()).await.unwrap_err();
        assert_eq!(given_back.code(), Code::Unavailable, "{key}: {given_back}");
        daemon.commit(&format!("default/9/{key}"), key).await.unwrap();
    }
    // Nobody's.
    let view = daemon
        .view("default/3/view", &format!("default/9/{}", extraction(2, TWO)))
        .await
        .unwrap();
    let mut elsewhere = view.clone();
    elsewhere[0].options = vec!["rw".to_owned(), "rbind".to_owned()];
    elsewhere[0].source = daemon.dir.path().to_str().unwrap().to_owned();
    for mounts in [vec![], view, elsewhere] {
        let declined = daemon.apply(mounts).await.unwrap_err();
        assert_eq!(declined.code(), Code::Unimplemented, "{declined}");
    }
}

/// A differ that containerd knows and does not ask is of no use for what it is lent.
#[tokio::test]
async fn it_is_noticed_whether_containerd_asks_the_differ() {
    let daemon = Daemon::start().await;
    daemon.layers.add(ONE, "one");
    let key = extraction(1, ONE);
    let mounts = daemon.prepare(&key, "").await.unwrap();
    daemon.apply(mounts).await.unwrap();
    let name = format!("default/2/{ONE}");
    daemon.commit(&name, &key).await.unwrap();
    assert_eq!(daemon.layers.differ_was_asked(), [true]);
    // Unpacked by containerd itself; a container that is committed was never to be applied.
    let key = extraction(3, TWO);
    let mounted = daemon.mount(&daemon.prepare(&key, &name).await.unwrap());
    std::fs::write(mounted.path().join("file"), "file").unwrap();
    drop(mounted);
    daemon.commit(&format!("default/4/{TWO}"), &key).await.unwrap();
    daemon.prepare("default/5/container", &name).await.unwrap();
    daemon.commit("default/6/image", "default/5/container").await.unwrap();
    assert_eq!(daemon.layers.differ_was_asked(), [true, false]);
    // The differ was asked, and gave it back; what is removed was neither.
    let key = extraction(7, TWO);
    let mounts = daemon.prepare(&key, &name).await.unwrap();
    daemon.apply(mounts).await.unwrap_err();
    daemon.commit(&format!("default/8/{TWO}"), &key).await.unwrap();
    let key = extraction(9, TWO);
    daemon.prepare(&key, &name).await.unwrap();
    daemon.remove(&key).await.unwrap();
    assert_eq!(daemon.layers.differ_was_asked(), [true, false, true]);
}
