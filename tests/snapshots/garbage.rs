//! Clients that send what no client should: the service refuses it, or the connection ends, and everybody else is served on.

use futures::StreamExt as _;
use lazuli::proto::snapshots::v1::StatSnapshotResponse;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tonic::{Code, Request, Status};

use crate::support::*;

/// Calls that are under way at once.
const PARALLEL: usize = 10_000;
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

/// More calls at once than any node makes: all are answered.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_calls_at_once() {
    let daemon = Daemon::start().await;
    daemon.layer("base", "", "file").await;
    let calls = futures::stream::iter(0..PARALLEL).map(|at| {
        let daemon = &daemon;
        async move {
            match at % 4 {
                0 => daemon.stat("base").await.map(drop),
                1 => daemon.list(&["kind==committed"]).await.map(drop),
                2 => daemon.mounts("none").await.map(drop),
                _ => daemon.prepare("one", "base").await.map(drop),
            }
            .err()
        }
    });
    let answers: Vec<Option<Status>> = calls.buffer_unordered(PARALLEL).collect().await;
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
}
