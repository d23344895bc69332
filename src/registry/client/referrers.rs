//! Lists: the artifacts about a manifest, and the tags of a repository, page by page.

use std::collections::HashSet;
use std::sync::Arc;

use bytes::Bytes;
use http::header;
use serde::Deserialize;
use url::Url;

use super::exchange::{Ask, Place};
use super::{Operation, Repository, read_document};
use crate::layer::Digest;
use crate::registry::artifact::{MAX_REFERRERS, ReferrersIndex, fallback_tag};
use crate::registry::attempts::Failure;
use crate::registry::hosts::wire::Response;
use crate::registry::image::{OCI_INDEX, json_problem};
use crate::registry::{Referrer, RegistryError, json};

/// Pages of one list that are read.
const MAX_PAGES: usize = 64;
/// Most tags that are read: ten thousand layers and their images in one repository are a large cluster's.
const MAX_TAGS: usize = 20_000;

/// One page of a list, and where the next one is.
struct Page {
    host: String,
    bytes: Bytes,
    next: Option<Place>,
}

impl Repository {
    /// Artifacts about `subject`; see [`crate::registry::Source::referrers`].
    pub(super) async fn referrers(
        self: Arc<Self>,
        subject: Digest,
        artifact_type: &str,
    ) -> Result<Vec<Referrer>, RegistryError> {
        let what = format!("list of artifacts about {subject} in {}", self.name);
        let mut ask = Ask {
            accept: Some(OCI_INDEX),
            by_tag: true,
            ..Ask::get("referrers", subject.to_string(), what.clone())
        };
        if !artifact_type.is_empty() {
            ask.query.push(("artifactType", artifact_type.to_owned()));
        }
        let (mut found, mut known) = (Vec::new(), HashSet::new());
        for _ in 0..MAX_PAGES {
            let page = match self.clone().page(ask.clone()).await {
                Ok(page) => page,
                Err(error) if found.is_empty() && ask.at.is_none() && is_missing(&error) => {
                    return self.fallback(subject, artifact_type).await;
                }
                Err(error) => return Err(error),
            };
            let list = ReferrersIndex::parse(&page.bytes).map_err(|problem| RegistryError::Protocol {
                host: page.host,
                what: what.clone(),
                problem,
            })?;
            // Registries may leave the filter to us.
            for entry in list.manifests.into_iter().filter(|entry| is_of(entry, artifact_type)) {
                // A list that changes between two pages may have an entry on both.
                if known.insert(entry.digest) {
                    found.push(entry);
                }
            }
            if found.len() >= MAX_REFERRERS || page.next.is_none() {
                break;
            }
            ask.at = page.next;
        }
        found.truncate(MAX_REFERRERS);
        Ok(found)
    }

    /// Artifacts about `subject` that are listed under its tag.
    async fn fallback(self: Arc<Self>, subject: Digest, artifact_type: &str) -> Result<Vec<Referrer>, RegistryError> {
        let mut found = self.tagged_referrers(subject).await?;
        found.retain(|entry| is_of(entry, artifact_type));
        Ok(found)
    }

    /// The whole list under the tag of `subject`; empty if there is none.
    pub(super) async fn tagged_referrers(self: Arc<Self>, subject: Digest) -> Result<Vec<Referrer>, RegistryError> {
        let (host, tag) = (self.host.clone(), fallback_tag(&subject));
        let list = match self.manifest(&tag).await {
            Ok(list) => list,
            Err(RegistryError::NotFound { .. }) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let list = ReferrersIndex::parse(&list.bytes).map_err(|problem| RegistryError::Protocol {
            host,
            what: format!("list of artifacts under the tag {tag}"),
            problem,
        })?;
        Ok(list.manifests)
    }

    /// The tags of the repository; see [`crate::registry::Source::tags`].
    pub(super) async fn tags(self: Arc<Self>) -> Result<Vec<String>, RegistryError> {
        #[derive(Deserialize)]
        struct Tags {
            #[serde(default)]
            tags: Vec<json::Loose<String>>,
        }
        let what = format!("list of tags of {}", self.name);
        let mut ask = Ask {
            by_tag: true,
            ..Ask::get("tags", "list".to_owned(), what.clone())
        };
        let mut found = Vec::new();
        for _ in 0..MAX_PAGES {
            let page = match self.clone().page(ask.clone()).await {
                Ok(page) => page,
                // A repository without any is not there yet.
                Err(RegistryError::NotFound { .. }) if ask.at.is_none() => break,
                Err(error) => return Err(error),
            };
            let tags: Tags = json::from_slice(&page.bytes).map_err(|error| RegistryError::Protocol {
                host: page.host,
                what: what.clone(),
                problem: json_problem(&error),
            })?;
            found.extend(tags.tags.into_iter().filter_map(|tag| tag.0.ok()));
            if found.len() >= MAX_TAGS || page.next.is_none() {
                break;
            }
            ask.at = page.next;
        }
        found.truncate(MAX_TAGS);
        Ok(found)
    }

    async fn page(self: Arc<Self>, ask: Ask) -> Result<Page, RegistryError> {
        let mut operation = Operation::new(self, ask).await?;
        loop {
            let (place, mut answer) = operation.respond().await?;
            let next = match next_page(&operation, place, &answer) {
                Ok(next) => next,
                Err(problem) => {
                    let failure = Failure::new(operation.protocol(place, problem), "protocol");
                    operation.failed(place, failure);
                    continue;
                }
            };
            match read_document(&operation, place, &mut answer).await {
                Ok(bytes) => {
                    operation.succeeded(place);
                    let host = operation.endpoint(place);
                    return Ok(Page { host, bytes, next });
                }
                Err(failure) => operation.failed(place, failure),
            }
        }
    }
}

/// Where an answer says that its list goes on: at the same host, or nowhere.
fn next_page(operation: &Operation, place: usize, answer: &Response) -> Result<Option<Place>, String> {
    let Some(target) = answer
        .headers()
        .get_all(header::LINK)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .find_map(next_link)
    else {
        return Ok(None);
    };
    let Some(base) = operation.base(place) else {
        return Ok(None);
    };
    let url: Url = answer
        .url()
        .join(target)
        .map_err(|_| "a Link to what is no address".to_owned())?;
    if url.origin() != base.origin() {
        return Err("a Link to another host".to_owned());
    }
    Ok(Some(Place { base, url }))
}

/// The target of a `Link` header (RFC 8288) whose relation is `next`.
fn next_link(header: &str) -> Option<&str> {
    let mut rest = header;
    while let Some((_, after)) = rest.split_once('<') {
        let (target, after) = after.split_once('>')?;
        let (parameters, following) = match after.find(",<").or_else(|| after.find(", <")) {
            Some(end) => after.split_at(end),
            None => (after, ""),
        };
        let is_next = parameters.split(';').any(|parameter| {
            let Some((key, value)) = parameter.split_once('=') else {
                return false;
            };
            key.trim().eq_ignore_ascii_case("rel") && value.trim().trim_matches('"').split(' ').any(|rel| rel == "next")
        });
        if is_next {
            return Some(target);
        }
        rest = following;
    }
    None
}

fn is_of(entry: &Referrer, artifact_type: &str) -> bool {
    artifact_type.is_empty() || entry.artifact_type.is_empty() || entry.artifact_type == artifact_type
}

/// Whether a registry answers so because it lacks the referrers API.
fn is_missing(error: &RegistryError) -> bool {
    match error {
        RegistryError::NotFound { .. } => true,
        RegistryError::Status { status, .. } => matches!(status, 400 | 405 | 406 | 501),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::next_link;

    #[test]
    fn links_to_the_next_page() {
        assert_eq!(
            next_link(r#"</v2/a/tags/list?n=2&last=b>; rel="next""#),
            Some("/v2/a/tags/list?n=2&last=b")
        );
        assert_eq!(next_link("<x>; rel=prev, <y>; title=z; rel=next"), Some("y"));
        assert_eq!(next_link(r#"<x>; rel="last next""#), Some("x"));
        for text in ["", "<", "<x", "<x>", "<x>; rel=prev", "x; rel=next", "<x>; rel"] {
            assert_eq!(next_link(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_link_ends(text in "(<|>|;|,| |rel|=|next|\"|\\PC){0,40}") {
            let _ = next_link(&text);
        }
    }
}
