//! One answer: the fault that is due, or what a good registry says.

use std::collections::BTreeMap;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, header};
use lazuli::layer::Digest;
use serde_json::json;

use super::content::content;
use super::target::Target;
use super::{Fault, Inner, On, Shared};

pub(super) struct Asked<'a> {
    pub(super) method: &'a Method,
    pub(super) headers: &'a HeaderMap,
    pub(super) query: &'a BTreeMap<String, String>,
    pub(super) form: &'a BTreeMap<String, String>,
    pub(super) sent: &'a Bytes,
}

pub(super) fn status(status: u16) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response
}

pub(super) fn with(mut response: Response, name: header::HeaderName, value: &str) -> Response {
    response.headers_mut().insert(name, value.parse().unwrap());
    response
}

impl Inner {
    pub(super) fn take_fault(&mut self, on: On) -> Option<Fault> {
        let at = self
            .faults
            .iter()
            .position(|(kind, times, _)| *kind == on && *times > 0)?;
        let (_, times, fault) = &mut self.faults[at];
        *times -= 1;
        let fault = fault.clone();
        if self.faults[at].1 == 0 {
            self.faults.remove(at);
        }
        Some(fault)
    }

    pub(super) fn answer(
        &mut self,
        shared: &Shared,
        target: &Target,
        asked: &Asked<'_>,
        fault: Option<Fault>,
    ) -> Response {
        match &fault {
            Some(Fault::Status(code)) => return status(*code),
            Some(Fault::RetryAfter(code, value)) => return with(status(*code), header::RETRY_AFTER, value),
            Some(Fault::Refuse(code, message)) => {
                let document = json!({"errors": [{"code": "DENIED", "message": message}]});
                let mut response = status(*code);
                *response.body_mut() = Body::from(document.to_string());
                return response;
            }
            Some(Fault::Unauthorized) => return self.challenge(shared, target, asked.method, asked.headers),
            Some(Fault::Redirect(to)) => return with(status(307), header::LOCATION, to),
            Some(Fault::RedirectAs(code, to)) => return with(status(*code), header::LOCATION, to),
            Some(Fault::Answer(code, body)) => {
                let mut response = status(*code);
                let body = match target {
                    Target::Token => body.replace("TOKEN", &self.issue(asked)),
                    _ => body.clone(),
                };
                *response.body_mut() = Body::from(body);
                return response;
            }
            _ => {}
        }
        match target {
            Target::Version => status(200),
            Target::Other => status(404),
            Target::Token => self.hand_out(asked),
            Target::Upload { begun, .. } => self.upload(asked, *begun),
            Target::Referrers { subject, .. } => {
                let list = self.list_referrers(asked, *subject);
                match fault {
                    Some(Fault::Link(to)) => with(list, header::LINK, &to),
                    _ => list,
                }
            }
            Target::Tags { repository } => self.list_tags(asked, repository),
            Target::Manifest { repository, reference } if *asked.method == Method::PUT => {
                self.put_manifest(asked, repository, reference)
            }
            Target::Manifest { reference, .. } if *asked.method == Method::DELETE => {
                let removed = reference.parse::<Digest>().ok().and_then(|digest| {
                    self.tags.retain(|_, meant| *meant != digest);
                    self.manifests.remove(&digest)
                });
                status(if removed.is_some() { 202 } else { 404 })
            }
            Target::Manifest { repository, reference } => {
                let digest = match reference.parse::<Digest>() {
                    Ok(digest) => Some(digest),
                    Err(_) => self.tags.get(&(repository.clone(), reference.clone())).copied(),
                };
                match digest.and_then(|digest| Some((digest, self.manifests.get(&digest)?))) {
                    Some((digest, (media_type, bytes))) => {
                        let response = content(bytes, asked, fault, false);
                        let response = with(response, header::CONTENT_TYPE, media_type);
                        let name = header::HeaderName::from_static("docker-content-digest");
                        with(response, name, &digest.to_string())
                    }
                    None => status(404),
                }
            }
            Target::Blob { digest, .. } => match self.blob(digest) {
                None => status(404),
                Some((digest, _)) if self.redirects => {
                    let mut to = format!("http://{}/{digest}?generation={}", shared.cdn, self.generation);
                    if let Some(lifetime) = self.redirect_lifetime {
                        let end = std::time::SystemTime::now() + lifetime;
                        let seconds = end.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
                        to.push_str(&format!("&Expires={seconds}"));
                    }
                    with(status(307), header::LOCATION, &to)
                }
                Some((_, bytes)) => content(&bytes, asked, fault, true),
            },
            Target::Cdn { digest } => {
                if asked.query.get("generation") != Some(&self.generation.to_string()) {
                    return status(403);
                }
                match self.blob(digest) {
                    Some((_, bytes)) => content(&bytes, asked, fault, true),
                    None => status(404),
                }
            }
        }
    }

    pub(super) fn blob(&self, digest: &Option<Digest>) -> Option<(Digest, Bytes)> {
        let digest = (*digest)?;
        if self.missing.contains(&digest) {
            return None;
        }
        Some((digest, self.blobs.get(&digest)?.clone()))
    }
}
