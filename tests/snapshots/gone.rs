//! Clients that go away while they wait for an answer.

use std::sync::Arc;
use std::sync::mpsc;

use lazuli::proto::snapshots::v1::{PrepareSnapshotRequest, StatSnapshotRequest, ViewSnapshotRequest};
use lazuli::snapshots::SnapshotsError;
use tonic::Code;

use crate::support::*;

/// Requests after which a server has noticed that one before them, on the same connection, was withdrawn.
const ROUND_TRIPS: usize = 20;

fn entries(daemon: &Daemon, dir: &str) -> usize {
    std::fs::read_dir(daemon.root().join(dir)).unwrap().count()
}

/// What a client was not told of is taken back, and a repetition of its call works as if there had been none before.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_a_client_was_not_told_of_is_taken_back() {
    let daemon = Daemon::start().await;
    daemon.layer("a/1/base", "", "base").await;
    let layer = daemon.layers.add("sha256:1", "one");
    let top = daemon.pull("a/2/x sha256:1", "a/1/base", "sha256:1").await;
    let before = daemon.list(&[]).await.unwrap();
    let directories = daemon.directories();
    for (key, chain_id, is_view) in [
        ("a/3/extract-1 sha256:2", Some("sha256:2"), false),
        ("a/4/container", None, false),
        ("a/5/view", None, true),
    ] {
        // The disk is slow: nothing is recorded until `go_on` is dropped.
        let (go_on, gone_on) = mpsc::channel::<()>();
        let (began, has_begun) = mpsc::channel();
        let store = Arc::clone(&daemon.store);
        let slow = std::thread::spawn(move || {
            store.write_snapshots(move |_| {
                began.send(()).unwrap();
                let _ = gone_on.recv();
                Ok::<_, SnapshotsError>(())
            })
        });
        has_begun.recv().unwrap();
        let mut client = daemon.another_client().await;
        let (mut calling, parent) = (client.clone(), top.clone());
        let labels = chain_id.map(|id| (REF.to_owned(), id.to_owned())).into_iter().collect();
        let call = tokio::spawn(async move {
            let key = key.to_owned();
            match is_view {
                true => {
                    let request = ViewSnapshotRequest {
                        key,
                        parent,
                        ..ViewSnapshotRequest::default()
                    };
                    calling.view(request).await.map(drop)
                }
                false => {
                    let request = PrepareSnapshotRequest {
                        key,
                        parent,
                        labels,
                        ..PrepareSnapshotRequest::default()
                    };
                    calling.prepare(request).await.map(drop)
                }
            }
        });
        eventually("the snapshot is made, and not recorded", || {
            entries(&daemon, "new") == 1
        })
        .await;
        call.abort();
        assert!(call.await.unwrap_err().is_cancelled());
        for _ in 0..ROUND_TRIPS {
            let request = StatSnapshotRequest {
                key: "nothing".to_owned(),
                ..StatSnapshotRequest::default()
            };
            assert_eq!(client.stat(request).await.unwrap_err().code(), Code::NotFound);
        }
        drop(go_on);
        slow.join().unwrap().unwrap();
        let is_recorded = || tokio::task::block_in_place(|| daemon.store.snapshot(key).unwrap().is_some());
        eventually("the snapshot is taken back", || {
            entries(&daemon, "new") == 0 && !is_recorded() && daemon.directories() == directories
        })
        .await;
        assert_eq!(daemon.list(&[]).await.unwrap(), before, "{key}");
        assert!(daemon.store.unpacking().is_empty());
        assert!(daemon.layers.is_live(&layer));
        // The same call once more, which is answered.
        let told = match (is_view, chain_id) {
            (true, _) => daemon.view(key, &top).await,
            (false, None) => daemon.prepare(key, &top).await,
            (false, Some(id)) => daemon.prepare_with(key, &top, &[(REF, id)]).await,
        };
        assert_eq!(daemon.mount(&told.unwrap()).names(), ["base", "one"]);
        daemon.stat(key).await.unwrap();
        daemon.remove(key).await.unwrap();
    }
}
