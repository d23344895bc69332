//! What `lazuli pull` tells at its end: what became of each layer.

use super::{failure, status};
use crate::catalog::status::Status;
use crate::config::ByteSize;
use crate::registry::{Image, Reference};

/// How a layer came to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It was before.
    Present,
    /// The snapshotter has taken it.
    Taken,
    /// containerd has unpacked it.
    Unpacked,
}

/// What the pull made: one line per layer. Where the daemon cannot be asked, it says so, and nothing that is not known.
pub(super) fn summary(
    reference: &Reference,
    image: &Image,
    outcomes: &[Outcome],
    status: &anyhow::Result<Status>,
) -> String {
    let mut out = format!("{reference} {}\n", image.manifest_digest);
    for (layer, outcome) in image.layers.iter().zip(outcomes) {
        let digest = layer.digest.to_string();
        out.push_str(&format!(
            "  {}  {:>10}  {}\n",
            status::short(&digest),
            ByteSize(layer.size).to_string(),
            what_became_of(&digest, *outcome, status.as_ref().ok())
        ));
    }
    if let Err(error) = status {
        let cause = failure::text(error);
        out.push_str(&format!("How much of them is here cannot be told: {cause}\n"));
    }
    out
}

/// What became of a layer.
fn what_became_of(digest: &str, outcome: Outcome, status: Option<&Status>) -> String {
    let live = status.and_then(|status| status.layers.iter().find(|live| live.digest == digest));
    match (outcome, live) {
        (Outcome::Unpacked, _) => {
            let layers = status.into_iter().flat_map(|status| &status.images);
            let mut layers = layers.flat_map(|image| &image.layers);
            let reason = layers.find_map(|layer| layer.refused.clone().filter(|_| layer.digest == digest));
            let reason = reason.unwrap_or_else(|| "the daemon's log says why".to_owned());
            format!("unpacked by containerd: {reason}")
        }
        (_, Some(live)) => status::describe(live),
        (Outcome::Taken, None) => "taken by the daemon".to_owned(),
        (Outcome::Present, None) => "there already".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::status::{ImageLayerStatus, ImageStatus, LayerStatus};

    #[test]
    fn what_is_not_known_is_not_told() {
        let known = Status {
            layers: vec![LayerStatus {
                digest: "lazy".into(),
                format: "estargz".into(),
                lazy: true,
                ..Default::default()
            }],
            images: vec![ImageStatus {
                layers: vec![ImageLayerStatus {
                    digest: "refused".into(),
                    live: false,
                    refused: Some("it is encrypted".into()),
                }],
                ..Default::default()
            }],
            ..Default::default()
        };
        for (digest, outcome, with_daemon, without) in [
            (
                "lazy",
                Outcome::Taken,
                "lazy estargz: 0 B of 0 B here, 0 requests, 0 B fetched",
                "taken by the daemon",
            ),
            (
                "lazy",
                Outcome::Present,
                "lazy estargz: 0 B of 0 B here, 0 requests, 0 B fetched",
                "there already",
            ),
            (
                "refused",
                Outcome::Unpacked,
                "unpacked by containerd: it is encrypted",
                "unpacked by containerd: the daemon's log says why",
            ),
            ("other", Outcome::Present, "there already", "there already"),
        ] {
            assert_eq!(what_became_of(digest, outcome, Some(&known)), with_daemon);
            assert_eq!(what_became_of(digest, outcome, None), without);
        }
    }
}
