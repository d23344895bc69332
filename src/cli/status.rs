//! `lazuli status`: the daemon's status document, as a table for people or as JSON for programs.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;

use crate::catalog::containerd::{MAX_MESSAGE, io_cause, unix_channel};
use crate::catalog::status::{ChainStatus, HostStatus, LayerStatus, Status};
use crate::config::ByteSize;
use crate::proto::control::StatusRequest;
use crate::proto::control::control_client::ControlClient;

use super::work::Worker;
use super::{StatusArgs, output};

/// Longest wait for the daemon's answer, which comes from its memory.
const DEADLINE: Duration = Duration::from_secs(10);
/// Hex digits of a digest that a table shows.
const SHORT_DIGEST: usize = 12;

/// The daemon cannot be asked.
#[derive(Debug, thiserror::Error)]
#[error("the daemon does not answer at {}: {problem}", address.display())]
pub(super) struct NoDaemon {
    /// Its socket.
    address: PathBuf,
    /// Why, and what to do.
    problem: String,
}

impl NoDaemon {
    pub(super) fn new(address: &Path, status: &tonic::Status) -> Self {
        let problem = match io_cause(status).map(io::Error::kind) {
            Some(io::ErrorKind::NotFound) => {
                "there is no such socket; is `lazuli serve` running, and with this address? \
                (--address, or `address` in the configuration)"
                    .to_owned()
            }
            Some(io::ErrorKind::ConnectionRefused) => {
                "nobody listens there any more; is `lazuli serve` running?".to_owned()
            }
            Some(io::ErrorKind::PermissionDenied) => {
                "its socket is for root alone; ask as root (sudo lazuli ...)".to_owned()
            }
            _ => match status.code() {
                tonic::Code::Cancelled | tonic::Code::DeadlineExceeded => {
                    format!("nothing came for {} s; its log may say why", DEADLINE.as_secs())
                }
                tonic::Code::Unimplemented => "somebody else listens there, or another version of lazuli".to_owned(),
                _ => format!("{}; is `lazuli serve` running?", status.message()),
            },
        };
        NoDaemon {
            address: address.to_owned(),
            problem,
        }
    }
}

pub(super) fn run(args: &StatusArgs) -> anyhow::Result<()> {
    let config = args.config.load()?;
    let address = args.address.as_ref().unwrap_or(&config.address);
    let json = Worker::client()?.run(async { Ok(fetch_json(address).await?) })?;
    if args.json {
        output::print(&format!("{json}\n"))
    } else {
        output::print(&table(&parse(&json)?))
    }
}

/// The status of the daemon at `address`.
pub(super) async fn fetch(address: &Path) -> anyhow::Result<Status> {
    parse(&fetch_json(address).await?)
}

fn parse(json: &str) -> anyhow::Result<Status> {
    serde_json::from_str(json).context("the daemon's answer cannot be read; is it another version?")
}

async fn fetch_json(address: &Path) -> Result<String, NoDaemon> {
    let mut client = ControlClient::new(unix_channel(address)).max_decoding_message_size(MAX_MESSAGE);
    let asked = tokio::time::timeout(DEADLINE, client.status(StatusRequest {})).await;
    let answer = asked.unwrap_or_else(|_| Err(tonic::Status::deadline_exceeded("")));
    answer
        .map(|answer| answer.into_inner().json)
        .map_err(|status| NoDaemon::new(address, &status))
}

fn table(status: &Status) -> String {
    let mut out = String::new();
    let limit = match status.cache_max_bytes {
        0 => "no limit".to_owned(),
        bytes => format!("at most {}", ByteSize(bytes)),
    };
    // Writing into a String cannot fail.
    let _ = writeln!(
        out,
        "lazuli {} at {}; cache {} ({limit})",
        status.version,
        status.root,
        ByteSize(status.cache_bytes)
    );
    let _ = writeln!(
        out,
        "layers are shown by the {} face: {}",
        status.face.face, status.face.reason
    );
    if let Some(reason) = &status.face.no_mapped_owners {
        let _ = writeln!(
            out,
            "no containers in user namespaces (capability only-remap-ids): {reason}"
        );
    }
    if let Some(reason) = &status.no_size_limits {
        let _ = writeln!(out, "sizes of containers cannot be limited: {reason}");
    }
    let kernel = match status.reads.kernel_limit_seconds {
        Some(limit) => format!("the kernel gives all images up after {limit} s"),
        None => "the kernel has no limit of its own".to_owned(),
    };
    let _ = writeln!(
        out,
        "{} reads wait, none longer than {} s ({kernel})",
        status.reads.waiting, status.reads.deadline_seconds
    );
    for host in &status.hosts {
        let HostStatus {
            host,
            requests,
            request_limit,
            request_limit_max,
        } = host;
        let _ = writeln!(
            out,
            "{host} is asked for {requests} ranges now, for {request_limit} at once at most (its link may raise that to {request_limit_max})"
        );
    }
    if status.takeovers > 0 {
        let _ = writeln!(
            out,
            "it has taken over from another process {} times since `lazuli serve` was started",
            status.takeovers
        );
    }
    if status.cache_held_bytes > 0 {
        let held = ByteSize(status.cache_held_bytes);
        let _ = writeln!(
            out,
            "{held} of the cache are mounted as files, and stay while containers use them"
        );
    }
    if status.cache_replaced_bytes > 0 {
        let replaced = ByteSize(status.cache_replaced_bytes);
        let _ = writeln!(
            out,
            "{replaced} of them are of layers that are here no more, and go when they are unmounted"
        );
    }
    for problem in &status.problems {
        let _ = writeln!(out, "PROBLEM: {problem}");
    }
    for image in &status.images {
        let complete = match image.complete {
            Some(true) => ", complete in containerd",
            Some(false) => ", not complete in containerd (see `lazuli complete`)",
            None => "",
        };
        let manifest = short(&image.manifest);
        let _ = writeln!(out, "\n{} [{}] {manifest}{complete}", image.name, image.namespace);
        for layer in &image.layers {
            // Other images may believe something else of the same blob.
            let live: Vec<_> = status
                .layers
                .iter()
                .filter(|live| live.digest == layer.digest)
                .collect();
            let line = match (live.as_slice(), &layer.refused) {
                ([live], _) => describe(live),
                ([], Some(reason)) => format!("left to containerd: {reason}"),
                ([], None) => "not in use".to_owned(),
                (all, _) => format!("known by {} indexes, for different images", all.len()),
            };
            let _ = writeln!(out, "  {}  {line}", short(&layer.digest));
            for live in live.iter().filter(|_| live.len() > 1) {
                let trust = live.index.trust.as_deref().unwrap_or("built here");
                let _ = writeln!(out, "    {}  {trust}: {}", short(&live.id), describe(live));
            }
        }
    }
    let of_images = |digest: &str| {
        status
            .images
            .iter()
            .any(|i| i.layers.iter().any(|l| l.digest == digest))
    };
    let others: Vec<_> = status.layers.iter().filter(|layer| !of_images(&layer.digest)).collect();
    if !others.is_empty() {
        let _ = writeln!(out, "\nother layers");
        for layer in others {
            let _ = writeln!(out, "  {}  {}", short(&layer.digest), describe(layer));
        }
    }
    if !status.chains.is_empty() {
        let _ = writeln!(out, "\nmerged layers");
        for chain in &status.chains {
            let _ = writeln!(out, "  {}  {}", short(&chain.digest), describe_chain(chain));
        }
    }
    for layer in &status.loading {
        let (received, all) = (ByteSize(layer.received_bytes), ByteSize(layer.blob_bytes));
        let _ = writeln!(out, "\nloading {}: {received} of {all}", short(&layer.digest));
    }
    out
}

/// One line on a live layer.
pub(super) fn describe(layer: &LayerStatus) -> String {
    let kind = if layer.lazy { "lazy" } else { "streamed" };
    let index = match (&layer.index.from, layer.index.verified, &layer.index.published) {
        (Some(from), Some(false), _) => format!(", FALSE index from {from}"),
        (Some(from), ..) => format!(", index from {from}"),
        (None, _, Some(place)) => format!(", index published in {place}"),
        (None, _, None) => String::new(),
    };
    let reason = layer.not_lazy.as_deref();
    let reason = reason.map(|reason| format!("; not lazy: {reason}")).unwrap_or_default();
    let mut line = format!(
        "{kind} {}: {} of {} here, {} requests, {} fetched{index}{reason}",
        layer.format,
        ByteSize(layer.present_bytes),
        ByteSize(layer.total_bytes),
        layer.requests,
        ByteSize(layer.fetched_bytes),
    );
    if layer.mounted || layer.face_reason.is_some() {
        let _ = write!(
            line,
            "; {}",
            shown(&layer.face, layer.mounted, layer.face_reason.as_deref())
        );
    }
    line
}

/// One line on a chain.
fn describe_chain(chain: &ChainStatus) -> String {
    let layers = match chain.is_upper {
        true => format!("{} layers on others", chain.layers.len()),
        false => format!("{} layers", chain.layers.len()),
    };
    let reason = chain.reason.as_deref();
    match chain.state.as_str() {
        "stored" => {
            let names = ByteSize(chain.bytes);
            format!(
                "{layers}, {names} of names; {}",
                shown(&chain.face, chain.mounted, reason)
            )
        }
        "failed" => format!("{layers}, stacked: {}", reason.unwrap_or("they cannot be merged")),
        state => format!("{layers}, {state}"),
    }
}

/// By what something is shown.
fn shown(face: &str, mounted: bool, reason: Option<&str>) -> String {
    let mounted = if mounted { "mounted" } else { "not mounted" };
    match reason {
        Some(reason) => format!("{face}: {reason}"),
        None => format!("{face}, {mounted}"),
    }
}

/// A digest shortened for people.
pub(super) fn short(digest: &str) -> &str {
    let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
    hex.get(..SHORT_DIGEST).unwrap_or(hex)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::status::{FaceStatus, ImageLayerStatus, ImageStatus, IndexStatus, LoadingStatus, ReadsStatus};

    #[test]
    fn table_tells_lazy_refused_and_loading() {
        let digest = |c: char| format!("sha256:{}", c.to_string().repeat(64));
        let chain = |c, state: &str, reason: Option<&str>| ChainStatus {
            digest: digest(c),
            layers: vec![digest('a'), digest('c')],
            is_upper: false,
            state: state.into(),
            face: if state == "stored" {
                "file".into()
            } else {
                String::new()
            },
            reason: reason.map(str::to_owned),
            mounted: state == "stored",
            bytes: 1 << 10,
        };
        let chains = vec![
            chain('1', "stored", None),
            chain('2', "waiting", None),
            chain('3', "failed", Some("too many names")),
        ];
        let status = Status {
            version: "1".into(),
            root: "/r".into(),
            takeovers: 2,
            cache_bytes: 3 << 20,
            cache_held_bytes: 1 << 20,
            cache_replaced_bytes: 1 << 19,
            face: FaceStatus {
                face: "image".into(),
                reason: "Linux 6.18 mounts EROFS from files".into(),
                metadata_through_fuse: false,
                no_mapped_owners: Some("FUSE cannot be mapped".into()),
            },
            reads: ReadsStatus {
                waiting: 2,
                deadline_seconds: 115,
                kernel_limit_seconds: Some(120),
            },
            hosts: vec![HostStatus {
                host: "r.example".into(),
                requests: 3,
                request_limit: 8,
                request_limit_max: 64,
            }],
            chains,
            no_size_limits: Some("no project quotas".into()),
            problems: vec!["/etc/x/hosts.toml: it is half written; its last good state is used".into()],
            images: vec![ImageStatus {
                name: "r.example/a:1".into(),
                namespace: "default".into(),
                manifest: digest('f'),
                complete: Some(false),
                layers: vec![
                    ImageLayerStatus {
                        digest: digest('a'),
                        live: true,
                        refused: None,
                    },
                    ImageLayerStatus {
                        digest: digest('b'),
                        live: false,
                        refused: Some("it is encrypted".into()),
                    },
                    ImageLayerStatus {
                        digest: digest('e'),
                        live: true,
                        refused: None,
                    },
                ],
            }],
            layers: vec![
                LayerStatus {
                    digest: digest('a'),
                    format: "estargz".into(),
                    lazy: true,
                    requests: 3,
                    face: "image".into(),
                    mounted: true,
                    index: IndexStatus {
                        source: "shared".into(),
                        from: Some("r.example/index".into()),
                        ..Default::default()
                    },
                    ..Default::default()
                },
                LayerStatus {
                    digest: digest('e'),
                    id: digest('e'),
                    format: "tar".into(),
                    ..Default::default()
                },
                LayerStatus {
                    digest: digest('e'),
                    id: digest('9'),
                    format: "tar".into(),
                    lazy: true,
                    index: IndexStatus {
                        source: "soci".into(),
                        trust: Some("named by the manifest".into()),
                        ..Default::default()
                    },
                    ..Default::default()
                },
                LayerStatus {
                    digest: digest('c'),
                    format: "tar+gzip".into(),
                    face: "tree".into(),
                    face_reason: Some("a name is too long".into()),
                    not_lazy: Some("its manifest names no table of contents".into()),
                    ..Default::default()
                },
            ],
            loading: vec![LoadingStatus {
                digest: digest('d'),
                blob_bytes: 10,
                received_bytes: 5,
            }],
            ..Default::default()
        };
        insta::assert_snapshot!(table(&status), @r"
        lazuli 1 at /r; cache 3.0 MiB (no limit)
        layers are shown by the image face: Linux 6.18 mounts EROFS from files
        no containers in user namespaces (capability only-remap-ids): FUSE cannot be mapped
        sizes of containers cannot be limited: no project quotas
        2 reads wait, none longer than 115 s (the kernel gives all images up after 120 s)
        r.example is asked for 3 ranges now, for 8 at once at most (its link may raise that to 64)
        it has taken over from another process 2 times since `lazuli serve` was started
        1.0 MiB of the cache are mounted as files, and stay while containers use them
        512.0 KiB of them are of layers that are here no more, and go when they are unmounted
        PROBLEM: /etc/x/hosts.toml: it is half written; its last good state is used

        r.example/a:1 [default] ffffffffffff, not complete in containerd (see `lazuli complete`)
          aaaaaaaaaaaa  lazy estargz: 0 B of 0 B here, 3 requests, 0 B fetched, index from r.example/index; image, mounted
          bbbbbbbbbbbb  left to containerd: it is encrypted
          eeeeeeeeeeee  known by 2 indexes, for different images
            eeeeeeeeeeee  built here: streamed tar: 0 B of 0 B here, 0 requests, 0 B fetched
            999999999999  named by the manifest: lazy tar: 0 B of 0 B here, 0 requests, 0 B fetched

        other layers
          cccccccccccc  streamed tar+gzip: 0 B of 0 B here, 0 requests, 0 B fetched; not lazy: its manifest names no table of contents; tree: a name is too long

        merged layers
          111111111111  2 layers, 1.0 KiB of names; file, mounted
          222222222222  2 layers, waiting
          333333333333  2 layers, stacked: too many names

        loading dddddddddddd: 5 B of 10 B
        ");
    }
}
