//! The same chain id, and images that do not believe the same of it.

use lazuli::catalog::Agreement;
use lazuli::layer::Digest;
use tonic::Code;

use crate::support::*;

/// Files that something made on a snapshot shows.
async fn shows(daemon: &Daemon, key: &str, name: &str) -> Vec<String> {
    daemon.mount(&daemon.prepare(key, name).await.unwrap()).names()
}

#[tokio::test]
async fn what_is_vouched_for_is_a_snapshot_of_its_own() {
    let daemon = Daemon::start().await;
    daemon.layers.add("sha256:1", "false");
    daemon.layers.say("sha256:1", &[], false);
    let hostile = daemon.pull("a/1/x", "", "sha256:1").await;
    daemon.layers.add("sha256:1", "true");
    daemon.layers.keep("false");
    daemon.layers.say("sha256:1", &[], true);
    let honest = daemon.pull("b/1/x", "", "sha256:1").await;
    assert_ne!(hostile, honest);
    assert_eq!(shows(&daemon, "a/2/c", &hostile).await, ["false"]);
    assert_eq!(shows(&daemon, "b/2/c", &honest).await, ["true"]);
    // The one that the last Prepare was about is found; after a restart, until the next, both are.
    assert_eq!(daemon.pull("b/3/x", "", "sha256:1").await, honest);
    let filter = format!(r#"labels."{REF}"==sha256:1,parent=="""#);
    assert_eq!(names(&daemon.list(&[&filter]).await.unwrap()), [honest.as_str()]);
    assert_eq!(
        daemon
            .list(&[&format!("{filter},kind==committed")])
            .await
            .unwrap()
            .len(),
        2
    );
    let daemon = daemon.restart().await;
    assert_eq!(daemon.list(&[&filter]).await.unwrap().len(), 2);
    assert_eq!(daemon.pull("b/4/x", "", "sha256:1").await, honest);
    // One that is gone is not waited for.
    daemon.remove("b/2/c").await.unwrap();
    daemon.remove(&honest).await.unwrap();
    assert_eq!(names(&daemon.list(&[&filter]).await.unwrap()), [hostile.as_str()]);
}

#[tokio::test]
async fn what_is_proven_does_not_take_the_place_of_what_is_not() {
    let daemon = Daemon::start().await;
    // Under the plain name, as a database of an older version may have it.
    daemon.layers.add("sha256:1", "proven");
    let plain = daemon.pull("a/1/x", "", "sha256:1").await;
    daemon.layers.add("sha256:1", "vouched");
    daemon.layers.keep("proven");
    daemon.layers.say("sha256:1", &[], false);
    let vouched = daemon.pull("a/2/x", "", "sha256:1").await;
    assert_ne!(plain, vouched);
    // Where nothing can be resolved, only what is the same for everybody is there.
    daemon.layers.say("sha256:1", &[], true);
    daemon.layers.forget("sha256:1");
    daemon.layers.unsay("sha256:1");
    assert_eq!(daemon.pull("a/3/x", "", "sha256:1").await, plain);
    daemon.remove(&plain).await.unwrap();
    daemon.prepare_with("a/4/x", "", &[(REF, "sha256:1")]).await.unwrap();
}

#[tokio::test]
async fn an_image_on_a_base_that_another_one_brought_is_shown_its_own_base() {
    let daemon = Daemon::start().await;
    daemon.layers.add("sha256:base", "false");
    daemon.layers.say("sha256:base", &[], false);
    let base = daemon.pull("a/1/x", "", "sha256:base").await;
    assert_eq!(shows(&daemon, "a/2/c", &base).await, ["false"]);
    // containerd has the base: it asks for the upper layer of the other image alone.
    daemon.layers.add("sha256:true", "true");
    daemon.layers.add("sha256:top", "upper");
    let own = [Some(Digest::of(b"true"))];
    daemon.layers.say("sha256:top", &own, true);
    let top = daemon.pull("a/3/x", &base, "sha256:top").await;
    assert_eq!(shows(&daemon, "a/4/c", &top).await, ["true", "upper"]);
    // What is made on the base by itself, before or after, is not changed by that.
    assert_eq!(shows(&daemon, "a/5/c", &base).await, ["false"]);
    let mounts = daemon.mounts("a/4/c").await.unwrap();
    assert_eq!(daemon.mount(&mounts).names(), ["true", "upper"]);
    // By the pull, and by each container.
    let (base, image) = (
        vec![Digest::of(b"false")],
        vec![Digest::of(b"upper"), Digest::of(b"true")],
    );
    assert_eq!(daemon.layers.expected(), [base.clone(), image.clone(), image, base]);
    // What it refers to is needed, also after a restart.
    let daemon = daemon.restart().await;
    eventually("the base is named", || {
        let needed = daemon.layers.last_retained().unwrap();
        needed.layers.contains(&Digest::of(b"true"))
            && needed.bases.contains(&vec![Digest::of(b"upper"), Digest::of(b"true")])
    })
    .await;
    assert_eq!(
        daemon.mount(&daemon.mounts("a/4/c").await.unwrap()).names(),
        ["true", "upper"]
    );
    // Merged or not.
    daemon.layers.merges.store(true, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(
        daemon.mount(&daemon.mounts("a/4/c").await.unwrap()).names(),
        ["true", "upper"]
    );
    assert_eq!(shows(&daemon, "a/6/c", &top).await, ["true", "upper"]);
}

#[tokio::test]
async fn what_an_image_cannot_have_is_not_taken_from_another() {
    let daemon = Daemon::start().await;
    daemon.layers.add("sha256:base", "false");
    daemon.layers.say("sha256:base", &[], false);
    let base = daemon.pull("a/1/x", "", "sha256:base").await;
    daemon.layers.add("sha256:top", "upper");
    daemon.layers.say("sha256:top", &[None], true);
    let unpacked = daemon.prepare_with("a/2/x", &base, &[(REF, "sha256:top")]).await;
    unpacked.expect("it is left to containerd");
    // What is the same for everybody may stay.
    let other = Daemon::start().await;
    other.layers.add("sha256:base", "base");
    let base = other.pull("a/1/x", "", "sha256:base").await;
    other.layers.add("sha256:top", "upper");
    other.layers.say("sha256:top", &[None], true);
    let top = other.pull("a/2/x", &base, "sha256:top").await;
    assert_eq!(shows(&other, "a/3/c", &top).await, ["base", "upper"]);
}

#[tokio::test]
async fn containers_are_shown_what_images_agree_on() {
    let daemon = Daemon::start().await;
    daemon.layers.add("sha256:base", "base");
    let base = daemon.pull("ns/1/x", "", "sha256:base").await;
    daemon.prepare("ns/2/c", &base).await.unwrap();
    assert!(daemon.layers.questions().is_empty(), "it is the same for everybody");
    daemon.layers.add("sha256:top", "false");
    daemon.layers.say("sha256:top", &[Some(Digest::of(b"base"))], false);
    let top = daemon.pull("ns/3/x", &base, "sha256:top").await;
    assert_eq!(shows(&daemon, "ns/4/c", &top).await, ["base", "false"]);
    let question = daemon.layers.questions().pop().unwrap();
    assert_eq!(
        (question.namespace.as_str(), question.chain_id.as_str()),
        ("ns", "sha256:top")
    );
    let (id, own) = (Digest::of(b"base"), Digest::of(b"false"));
    assert_eq!(question.shown, [Some(id), Some(own)]);
    // A layer is unpacked by containerd on what is there, without a question.
    daemon
        .prepare_with("ns/5/x", &top, &[(REF, "sha256:unknown")])
        .await
        .unwrap();
    assert_eq!(daemon.layers.questions().len(), 1);

    daemon
        .layers
        .agree_on(Agreement::Open("a and b do not agree".to_owned()));
    for status in [
        daemon.prepare("ns/6/c", &top).await.unwrap_err(),
        daemon.view("ns/6/v", &top).await.unwrap_err(),
    ] {
        assert_eq!(
            (status.code(), status.message()),
            (Code::Unavailable, "a and b do not agree: unavailable")
        );
    }
    // Everybody's, from now on, for what is made from now on: also on what containerd has unpacked on it.
    daemon.layers.add("sha256:true", "true");
    daemon.layers.revive(&Digest::of(b"true"));
    daemon
        .layers
        .agree_on(Agreement::Instead(vec![Some(id), Some(Digest::of(b"true"))]));
    assert_eq!(shows(&daemon, "ns/7/c", &top).await, ["base", "true"]);
    assert_eq!(
        daemon.mount(&daemon.mounts("ns/4/c").await.unwrap()).names(),
        ["base", "false"]
    );
    assert_eq!(
        daemon.mount(&daemon.view("ns/8/v", &top).await.unwrap()).names(),
        ["base", "true"]
    );
    let name = format!("ns/9/{}", Digest::of(b"a chain id"));
    daemon.layer(&name, &top, "local").await;
    let question = daemon.layers.questions().pop().unwrap();
    assert_eq!(question.chain_id, "sha256:top");
    daemon
        .layers
        .agree_on(Agreement::Instead(vec![Some(id), Some(Digest::of(b"true")), None]));
    assert_eq!(shows(&daemon, "ns/10/c", &name).await, ["base", "local", "true"]);
    let question = daemon.layers.questions().pop().unwrap();
    assert_eq!(
        (question.chain_id, question.shown[2]),
        (Digest::of(b"a chain id").to_string(), None)
    );
    daemon.remove("ns/4/c").await.unwrap();
    eventually("what a container is shown is needed", || {
        let needed = daemon.layers.last_retained();
        needed.is_some_and(|needed| needed.layers.contains(&Digest::of(b"true")))
    })
    .await;
}
