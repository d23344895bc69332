//! What is written: uploads of blobs, and manifests.

use axum::response::Response;
use http::header;
use lazuli::layer::Digest;

use super::Inner;
use super::answer::{Asked, status, with};

impl Inner {
    pub(super) fn upload(&mut self, asked: &Asked<'_>, begun: bool) -> Response {
        if !begun {
            self.uploads += 1;
            let place = format!("{}-{}?state=x%2Fy", "place", self.uploads);
            return with(status(202), header::LOCATION, &place);
        }
        let stated = asked.query.get("digest").and_then(|text| text.parse::<Digest>().ok());
        if stated != Some(Digest::of(asked.sent)) || asked.query.get("state").map(String::as_str) != Some("x/y") {
            return status(400);
        }
        self.blobs.insert(Digest::of(asked.sent), asked.sent.clone());
        status(201)
    }

    pub(super) fn put_manifest(&mut self, asked: &Asked<'_>, repository: &str, reference: &str) -> Response {
        let digest = Digest::of(asked.sent);
        let Ok(document) = serde_json::from_slice::<serde_json::Value>(asked.sent) else {
            return status(400);
        };
        let blobs = document["layers"]
            .as_array()
            .into_iter()
            .flatten()
            .chain(document.get("config"));
        let missing = |blob: &serde_json::Value| {
            let digest = blob["digest"].as_str().and_then(|text| text.parse::<Digest>().ok());
            !digest.is_some_and(|digest| self.blobs.contains_key(&digest))
        };
        let by_digest = reference.parse::<Digest>().ok();
        if blobs.into_iter().any(missing) || by_digest.is_some_and(|named| named != digest) {
            return status(400);
        }
        if by_digest.is_none() {
            self.tags.insert((repository.to_owned(), reference.to_owned()), digest);
        }
        let media_type = asked.headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok());
        let media_type = media_type.unwrap_or_default().to_owned();
        self.manifests.insert(digest, (media_type, asked.sent.clone()));
        let name = header::HeaderName::from_static("docker-content-digest");
        let response = with(status(201), name, &digest.to_string());
        match document["subject"]["digest"].as_str() {
            Some(subject) if self.referrers.is_some() => {
                with(response, header::HeaderName::from_static("oci-subject"), subject)
            }
            _ => response,
        }
    }
}
