//! Lists that come in pages: referrers and tags.

use axum::body::Body;
use axum::response::Response;
use http::header;
use lazuli::layer::Digest;
use serde_json::json;

use super::Inner;
use super::answer::{Asked, status, with};

/// Entries on a page of a list.
const PAGE: usize = 2;

impl Inner {
    pub(super) fn list_referrers(&self, asked: &Asked<'_>, subject: Option<Digest>) -> Response {
        let (Some(filters), Some(subject)) = (self.referrers, subject) else {
            return status(404);
        };
        let subject = subject.to_string();
        let mut found: Vec<_> = self
            .manifests
            .iter()
            .filter_map(|(digest, (media_type, bytes))| {
                let document: serde_json::Value = serde_json::from_slice(bytes).ok()?;
                // What says nothing of its own type has that of its config.
                let artifact_type = document["artifactType"].as_str();
                let artifact_type = artifact_type.or(document["config"]["mediaType"].as_str());
                let artifact_type = artifact_type.unwrap_or_default();
                let wanted = asked.query.get("artifactType");
                let about = document["subject"]["digest"] == subject.as_str();
                let of_type = !filters || wanted.is_none_or(|wanted| wanted == artifact_type);
                (about && of_type).then(|| {
                    json!({
                        "mediaType": media_type, "digest": digest, "size": bytes.len(),
                        "artifactType": artifact_type, "annotations": document["annotations"],
                    })
                })
            })
            .collect();
        found.sort_by_key(|entry| entry["digest"].to_string());
        paged(
            asked,
            found,
            |page| json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": page}),
        )
    }

    pub(super) fn list_tags(&self, asked: &Asked<'_>, repository: &str) -> Response {
        let tags: Vec<_> = self
            .tags
            .keys()
            .filter(|(of, _)| of == repository)
            .map(|(_, tag)| json!(tag))
            .collect();
        match tags.is_empty() {
            true => status(404),
            false => paged(asked, tags, |page| json!({"name": repository, "tags": page})),
        }
    }
}

/// One page of a list, with a Link to the next one.
fn paged(
    asked: &Asked<'_>,
    list: Vec<serde_json::Value>,
    document: impl Fn(Vec<serde_json::Value>) -> serde_json::Value,
) -> Response {
    let page: usize = asked.query.get("page").and_then(|page| page.parse().ok()).unwrap_or(0);
    let more = list.len() > (page + 1) * PAGE;
    let entries = list.into_iter().skip(page * PAGE).take(PAGE).collect();
    let response = Response::new(Body::from(document(entries).to_string()));
    match more {
        true => {
            let mut query = asked.query.clone();
            query.insert("page".to_owned(), (page + 1).to_string());
            let query = url::form_urlencoded::Serializer::new(String::new())
                .extend_pairs(&query)
                .finish();
            // Relative to the list itself.
            with(response, header::LINK, &format!("<?{query}>; rel=\"next\""))
        }
        false => response,
    }
}
