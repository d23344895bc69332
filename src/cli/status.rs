//! `lazuli status`: the daemon's status document, as a table for people or as JSON for programs.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;

use crate::catalog::containerd::{ContainerdError, MAX_MESSAGE, unix_channel};
use crate::catalog::status::{LayerStatus, Status};
use crate::config::ByteSize;
use crate::proto::control::StatusRequest;
use crate::proto::control::control_client::ControlClient;

use super::StatusArgs;

/// Longest wait for the daemon's answer, which comes from its memory.
const DEADLINE: Duration = Duration::from_secs(10);
/// Hex digits of a digest that a table shows.
const SHORT_DIGEST: usize = 12;

pub(super) fn run(args: &StatusArgs) -> anyhow::Result<()> {
    let config = args.config.load()?;
    let address = args.address.as_ref().unwrap_or(&config.address);
    let json = super::client_runtime()?.block_on(fetch_json(address))?;
    if args.json {
        println!("{json}");
    } else {
        let status: Status =
            serde_json::from_str(&json).context("the daemon's answer cannot be read; is it another version?")?;
        print!("{}", table(&status));
    }
    Ok(())
}

/// The status of the daemon at `address`.
pub(super) async fn fetch(address: &Path) -> anyhow::Result<Status> {
    Ok(serde_json::from_str(&fetch_json(address).await?)?)
}

async fn fetch_json(address: &Path) -> anyhow::Result<String> {
    let mut client = ControlClient::new(unix_channel(address)).max_decoding_message_size(MAX_MESSAGE);
    let mut request = tonic::Request::new(StatusRequest {});
    request.set_timeout(DEADLINE);
    match client.status(request).await {
        Ok(answer) => Ok(answer.into_inner().json),
        Err(status) if status.code() == tonic::Code::Unavailable => {
            let cause = ContainerdError::Unreachable {
                address: address.to_owned(),
                what: status.message().to_owned(),
            };
            // The same exit code as for containerd itself, with a text of its own.
            Err(anyhow::Error::from(cause).context(format!(
                "the daemon does not answer at {}; is `lazuli serve` running?",
                address.display()
            )))
        }
        Err(status) => Err(anyhow::anyhow!(
            "the daemon at {} answers: {}",
            address.display(),
            status.message()
        )),
    }
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
    for image in &status.images {
        let _ = writeln!(out, "\n{} [{}] {}", image.name, image.namespace, short(&image.manifest));
        for layer in &image.layers {
            let line = match status.layers.iter().find(|live| live.digest == layer.digest) {
                Some(live) => describe(live),
                None => match &layer.refused {
                    Some(reason) => format!("left to containerd: {reason}"),
                    None => "not in use".to_owned(),
                },
            };
            let _ = writeln!(out, "  {}  {line}", short(&layer.digest));
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
    for layer in &status.loading {
        let (received, all) = (ByteSize(layer.received_bytes), ByteSize(layer.blob_bytes));
        let _ = writeln!(out, "\nloading {}: {received} of {all}", short(&layer.digest));
    }
    out
}

/// One line on a live layer.
pub(super) fn describe(layer: &LayerStatus) -> String {
    let kind = if layer.lazy { "lazy" } else { "streamed" };
    let reason = layer.not_lazy.as_deref();
    let reason = reason.map(|reason| format!("; not lazy: {reason}")).unwrap_or_default();
    format!(
        "{kind} {}: {} of {} here, {} requests, {} fetched{reason}",
        layer.format,
        ByteSize(layer.present_bytes),
        ByteSize(layer.total_bytes),
        layer.requests,
        ByteSize(layer.fetched_bytes),
    )
}

/// A digest shortened for people.
pub(super) fn short(digest: &str) -> &str {
    let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
    hex.get(..SHORT_DIGEST).unwrap_or(hex)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::status::{ImageLayerStatus, ImageStatus, LoadingStatus};

    #[test]
    fn table_tells_lazy_refused_and_loading() {
        let digest = |c: char| format!("sha256:{}", c.to_string().repeat(64));
        let status = Status {
            version: "1".into(),
            root: "/r".into(),
            cache_bytes: 3 << 20,
            images: vec![ImageStatus {
                name: "r.example/a:1".into(),
                namespace: "default".into(),
                manifest: digest('f'),
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
                ],
            }],
            layers: vec![
                LayerStatus {
                    digest: digest('a'),
                    format: "estargz".into(),
                    lazy: true,
                    requests: 3,
                    ..Default::default()
                },
                LayerStatus {
                    digest: digest('c'),
                    format: "tar+gzip".into(),
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

        r.example/a:1 [default] ffffffffffff
          aaaaaaaaaaaa  lazy estargz: 0 B of 0 B here, 3 requests, 0 B fetched
          bbbbbbbbbbbb  left to containerd: it is encrypted

        other layers
          cccccccccccc  streamed tar+gzip: 0 B of 0 B here, 0 requests, 0 B fetched; not lazy: its manifest names no table of contents

        loading dddddddddddd: 5 B of 10 B
        ");
    }
}
