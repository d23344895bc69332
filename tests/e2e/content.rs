//! containerd's content store, as Lazuli reads it: over one connection, beside everything else that it asks containerd.

use std::fs::{self, File};
use std::time::Duration;

use ::lazuli::catalog::containerd::Containerd;
use ::lazuli::layer::Digest;

use crate::stage::Stage;
use crate::support::containerd::{Generation, NAMESPACE};

/// Blobs that are read at once, and the bytes of each: more than is under way of one.
const BLOBS: usize = 4;
const LEN: usize = 12_000_000;
/// Where containerd keeps blobs, by their names, below the sandbox.
const BLOBS_AT: &str = "containerd/root/io.containerd.content.v1.content/blobs/sha256";
/// Far above what an answer takes, and below the deadline of a call.
const SOON: Duration = Duration::from_secs(15);

/// Puts a blob into containerd's content store.
fn ingest(stage: &Stage, bytes: &[u8]) -> Digest {
    let path = stage.sandbox.path("blob");
    fs::write(&path, bytes).unwrap();
    let ingested = stage
        .containerd
        .ctr(&["content", "ingest", "blob"])
        .stdin(File::open(&path).unwrap())
        .status()
        .unwrap();
    assert!(ingested.success());
    Digest::of(bytes)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

/// A manifest or config whose file was damaged says nothing of an image.
#[test]
fn a_document_that_is_damaged_on_the_disk_is_not_believed() {
    let stage = Stage::new("damaged document", Generation::One);
    let text = br#"{"rootfs": {"diff_ids": ["sha256:1111"]}}"#;
    let digest = ingest(&stage, text);
    let hex = digest.to_string().replace("sha256:", "");
    let file = stage.sandbox.path(BLOBS_AT).join(hex);
    let read = || {
        let runtime = runtime();
        let containerd = {
            let _entered = runtime.enter();
            Containerd::new(&stage.containerd.address)
        };
        runtime.block_on(containerd.read(NAMESPACE, &digest))
    };
    assert_eq!(read().unwrap(), text);
    fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    fs::write(&file, String::from_utf8_lossy(text).replace("1111", "2222")).unwrap();
    let error = read().unwrap_err().to_string();
    assert!(error.contains("damaged"), "{error}");
}

/// A layer that is packed may have to wait for the disk; a container that is made meanwhile asks containerd about its images.
#[test]
fn blobs_that_nobody_reads_leave_room_for_other_questions() {
    let stage = Stage::new("content", Generation::One);
    let bytes = crate::support::tar::noise(1, LEN);
    let digest = ingest(&stage, &bytes);
    let runtime = runtime();
    runtime.block_on(async {
        let containerd = Containerd::new(&stage.containerd.address);
        let mut standing = Vec::new();
        for _ in 0..BLOBS {
            let blob = containerd.blob(NAMESPACE, &digest, 0, LEN as u64);
            let mut blob = tokio::time::timeout(SOON, blob).await.expect("it begins").unwrap();
            let first = tokio::time::timeout(SOON, blob.message()).await;
            assert!(first.expect("its first bytes come").unwrap().is_some());
            standing.push(blob);
        }
        // Until what may be under way is.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let asked = tokio::time::timeout(SOON, containerd.namespaces()).await;
        let namespaces = asked.expect("there is room for an answer").unwrap();
        assert!(namespaces.iter().any(|name| name == NAMESPACE));
    });
}
