//! Clients that send what no client should: the service refuses it, or the connection ends, and everybody else is served on.

use lazuli::proto::snapshots::v1::snapshots_client::SnapshotsClient;
use lazuli::proto::snapshots::v1::{
    ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest, StatSnapshotRequest, StatSnapshotResponse,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::support::*;

/// Calls that are under way at once.
const PARALLEL: usize = 10_000;
/// Connections that they come over.
const CONNECTIONS: usize = 250;
/// What every HTTP/2 client says first.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A message in which the fields of the real ones have other types.
#[derive(Clone, PartialEq, prost::Message)]
struct Other {
    #[prost(fixed64, tag = "1")]
    one: u64,
    #[prost(double, repeated, tag = "2")]
    two: Vec<f64>,
    #[prost(int32, tag = "3")]
    three: i32,
    #[prost(bytes = "vec", tag = "15")]
    unknown: Vec<u8>,
}

/// Whether the service answers as ever.
async fn serves(daemon: &Daemon, key: &str) {
    assert_eq!(daemon.prepare(key, "").await.unwrap().len(), 1, "{key}");
    daemon.remove(key).await.unwrap();
}

#[tokio::test]
async fn bytes_that_are_no_requests() {
    let daemon = Daemon::start().await;
    let mut noise = vec![0_u8; 100_000];
    let mut state = 1_u32;
    noise.fill_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    });
    // Frames: a length of 16 MiB, settings of a wrong size, a window update of 0, a header block of nonsense, data for no stream.
    let frames: [&[u8]; 5] = [
        &[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1],
        &[0, 0, 5, 4, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5],
        &[0, 0, 4, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[0, 0, 6, 1, 5, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f],
        &[0, 0, 1, 0, 1, 0, 0, 0, 9, 0],
    ];
    let settings = &[0, 0, 0, 4, 0, 0, 0, 0, 0];
    let mut inputs = vec![
        noise.clone(),
        Vec::new(),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        [PREFACE, &noise].concat(),
        [PREFACE, settings, &noise].concat(),
    ];
    inputs.extend(frames.map(|frame| [PREFACE, settings, frame].concat()));
    for (at, input) in inputs.iter().enumerate() {
        let mut stream = UnixStream::connect(daemon.socket()).await.unwrap();
        // It may have hung up already.
        let _ = stream.write_all(input).await;
        let _ = stream.shutdown().await;
        let _ = stream.read_to_end(&mut Vec::new()).await;
        serves(&daemon, &format!("after {at}")).await;
    }
    // Who says nothing at all takes no other's place.
    let mut silent = Vec::new();
    for _ in 0..500 {
        silent.push(UnixStream::connect(daemon.socket()).await.unwrap());
    }
    serves(&daemon, "beside the silent").await;
}

#[tokio::test]
async fn messages_of_other_types() {
    let daemon = Daemon::start().await;
    let mut grpc = daemon.raw().await;
    let other = Other {
        one: 1,
        two: vec![1.0; 100],
        three: -1,
        unknown: vec![7; 1000],
    };
    for call in [
        "Prepare", "View", "Mounts", "Commit", "Remove", "Stat", "Update", "Usage",
    ] {
        grpc.ready().await.unwrap();
        let path = format!("/containerd.services.snapshots.v1.Snapshots/{call}");
        let codec = tonic_prost::ProstCodec::<Other, StatSnapshotResponse>::default();
        let answer = grpc
            .unary(Request::new(other.clone()), path.parse().unwrap(), codec)
            .await;
        assert_eq!(answer.unwrap_err().code(), Code::Internal, "{call}");
    }
    grpc.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<Other, StatSnapshotResponse>::default();
    let path = "/containerd.services.snapshots.v1.Snapshots/Nothing".parse().unwrap();
    let answer = grpc.unary(Request::new(other), path, codec).await;
    assert_eq!(answer.unwrap_err().code(), Code::Unimplemented);
    serves(&daemon, "after them").await;
}

#[tokio::test]
async fn labels_and_names_of_any_size() {
    let daemon = Daemon::start().await;
    let long = "x".repeat(17 << 20);
    // Larger than any message may be.
    let refused = daemon.prepare_with("large", "", &[("l", &long)]).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
    assert_eq!(daemon.stat(&long).await.unwrap_err().code(), Code::OutOfRange);
    let many: Vec<(String, String)> = (0..100_000).map(|at| (format!("label-{at}"), at.to_string())).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|(key, value)| (&key[..], &value[..])).collect();
    let _ = daemon.prepare_with("many", "", &many).await;
    let unknown = daemon.stat(&"k".repeat(1 << 20)).await.unwrap_err();
    assert!(
        unknown.message().len() < 10_000,
        "a message repeats {} bytes",
        unknown.message().len()
    );
    for key in ["", "\0", "../../etc", "a\nb", &"/".repeat(5000)] {
        let _ = daemon.prepare(key, "").await;
    }
    let nested = format!("{}x", "labels.".repeat(10_000));
    assert!(daemon.list(&[&nested]).await.is_ok_and(|found| found.is_empty()) || daemon.list(&[]).await.is_ok());
    serves(&daemon, "after them").await;
}

/// The call with this number, and its error.
async fn call(mut client: SnapshotsClient<Channel>, number: usize) -> Option<Status> {
    let (base, none, one) = ("base".to_owned(), "none".to_owned(), "one".to_owned());
    match number % 4 {
        0 => {
            let request = StatSnapshotRequest {
                key: base,
                ..Default::default()
            };
            client.stat(request).await.err()
        }
        1 => match client.list(ListSnapshotsRequest::default()).await {
            Ok(stream) => stream.into_inner().message().await.err(),
            Err(status) => Some(status),
        },
        2 => {
            let request = MountsRequest {
                key: none,
                ..Default::default()
            };
            client.mounts(request).await.err()
        }
        _ => {
            let request = PrepareSnapshotRequest {
                key: one,
                parent: base,
                ..Default::default()
            };
            client.prepare(request).await.err()
        }
    }
}

/// More calls at once than any node makes: all are answered. They come over many connections, because the server's HTTP/2 ends one with very
/// many small messages that it has not looked at yet, if these do not end with their frame (as tonic sends them, and gRPC for Go does not).
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_calls_at_once() {
    let daemon = Daemon::start().await;
    daemon.layer("base", "", "file").await;
    let mut clients = Vec::new();
    for _ in 0..CONNECTIONS {
        clients.push(daemon.another_client().await);
    }
    let calls = (0..PARALLEL).map(|at| call(clients[at % CONNECTIONS].clone(), at / CONNECTIONS));
    let answers: Vec<Option<Status>> = futures::future::join_all(calls).await;
    let codes = [None, Some(Code::NotFound), Some(Code::AlreadyExists)];
    let code = |answer: &Option<Status>| answer.as_ref().map(Status::code);
    let other = answers.iter().find(|answer| !codes.contains(&code(answer)));
    assert!(other.is_none(), "{other:?}");
    let count = |wanted: Option<Code>| answers.iter().filter(|answer| code(answer) == wanted).count();
    // One of those that prepared, and whoever looked.
    assert_eq!(count(None), PARALLEL / 2 + 1);
    assert_eq!(count(Some(Code::NotFound)), PARALLEL / 4);
    assert_eq!(count(Some(Code::AlreadyExists)), PARALLEL / 4 - 1);
    serves(&daemon, "after them").await;
    // All of them over one connection: that may be ended, and the others go on.
    let one = daemon.another_client().await;
    futures::future::join_all((0..PARALLEL).map(|_| call(one.clone(), 0))).await;
    serves(&daemon, "after a flood").await;
}
