//! One request to one endpoint: authentication, redirects, and what the status means.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, StatusCode, header};
use serde::Deserialize;
use url::Url;

use super::Repository;
use crate::layer::Digest;
use crate::registry::attempts::{Failure, retry_after};
use crate::registry::auth::{Authorization, Party, Purpose, Refusal, challenges_of};
use crate::registry::error::CHECK_CREDENTIALS;
use crate::registry::hosts::wire::Response;
use crate::registry::hosts::{Endpoint, authority};
use crate::registry::range::range_header;
use crate::registry::{RegistryError, count_request, json};

/// Renewals of authentication within one exchange: one for what has ended, the others for what other requests renewed meanwhile.
const MAX_RENEWALS: u32 = 3;
/// Redirects that are followed, as many as Go and containerd follow.
const MAX_REDIRECTS: u32 = 10;

/// Bytes of a refusal that are read for its message.
const MAX_REFUSAL: usize = 8 << 10;
/// Characters of it that an error repeats.
const MAX_MESSAGE: usize = 200;

/// What is asked for.
#[derive(Clone)]
pub(super) struct Ask {
    /// `GET`, `HEAD`, or one that writes.
    pub method: Method,
    /// `manifests`, `blobs`, `referrers` or `tags`.
    pub kind: &'static str,
    /// Tag or digest, or what else the path ends with.
    pub name: String,
    /// Parameters.
    pub query: Vec<(&'static str, String)>,
    /// A place that an earlier answer named, in the stead of `kind`, `name` and `query`.
    pub at: Option<Place>,
    /// What is sent.
    pub body: Option<Payload>,
    /// For logs and errors.
    pub what: String,
    /// Value of `Accept`.
    pub accept: Option<&'static str>,
    /// Bytes wanted; `None` for all.
    pub range: Option<Range<u64>>,
    /// The blob, whose redirect target may be remembered.
    pub blob: Option<Digest>,
    /// Only hosts that resolve tags may be asked, and nothing proves that the answer is right.
    pub by_tag: bool,
    /// The host that is written to is asked.
    pub to_push: bool,
    /// Over another connection than what is asked for at the same time.
    pub beside: bool,
}

/// An address that an endpoint named: where an upload goes on, or the next page of a list.
#[derive(Clone)]
pub(super) struct Place {
    /// Base of the endpoint: only that one is asked.
    pub base: Url,
    /// The address.
    pub url: Url,
}

/// A body to send.
#[derive(Clone)]
pub(super) struct Payload {
    /// Its media type.
    pub media_type: String,
    /// Its bytes.
    pub bytes: Bytes,
}

impl Ask {
    /// A `GET` of `kind`/`name`, called `what` in errors.
    pub(super) fn get(kind: &'static str, name: String, what: String) -> Self {
        Ask {
            method: Method::GET,
            kind,
            name,
            query: Vec::new(),
            at: None,
            body: None,
            what,
            accept: None,
            range: None,
            blob: None,
            by_tag: false,
            to_push: false,
            beside: false,
        }
    }

    /// Whether it changes anything.
    pub(super) fn writes(&self) -> bool {
        !matches!(self.method, Method::GET | Method::HEAD)
    }
}

impl Repository {
    /// Sends `ask` to `endpoint`. The answer has a success status, and an unread body.
    pub(super) async fn exchange(&self, endpoint: &Endpoint, ask: &Ask) -> Result<Response, Failure> {
        if let Some(answer) = self.at_remembered_target(endpoint, ask).await? {
            return Ok(answer);
        }
        let mut url = match &ask.at {
            Some(place) => place.url.clone(),
            None => self.url(endpoint, ask),
        };
        for _ in 0..=MAX_REDIRECTS {
            let answer = self.ask(endpoint, &url, ask).await?;
            let status = answer.status();
            let home = url.origin() == endpoint.base.origin();
            if is_redirect(status) && ask.writes() && !matches!(status.as_u16(), 307 | 308) {
                // Any other kind asks for the method to be changed.
                return Err(self.protocol(endpoint, ask, format!("a redirect ({status}) of what is written")));
            }
            if is_redirect(status) {
                url = target(&url, &answer, ask).map_err(|problem| self.protocol(endpoint, ask, problem))?;
                continue;
            }
            // A range that is not there is judged by who asked for it.
            if status.is_success() || (status == StatusCode::RANGE_NOT_SATISFIABLE && ask.range.is_some()) {
                if let Some(blob) = ask.blob
                    && !home
                    && status.is_success()
                {
                    self.locations.put(endpoint.base.as_str(), blob, url);
                }
                return Ok(answer);
            }
            let mut failure = self.status_failure(endpoint, &url, ask, &answer);
            if ask.writes() {
                failure.error = refused(failure.error, answer).await;
                failure.passing &= !matches!(failure.error, RegistryError::Refused { .. });
            }
            // A storage service that refuses an address made a moment ago may take the next one.
            failure.passing |= !home && matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
            return Err(failure);
        }
        Err(self.protocol(endpoint, ask, format!("more than {MAX_REDIRECTS} redirects")))
    }

    /// Sends `ask` to `url`, which `endpoint` stands for or has sent us to, with what is needed to be let in there. An answer of any status
    /// that has nothing to do with that.
    async fn ask(&self, endpoint: &Endpoint, url: &Url, ask: &Ask) -> Result<Response, Failure> {
        let party = Party::new(endpoint, url);
        let home = party.is_endpoint();
        let purpose = if ask.writes() { Purpose::Push } else { Purpose::Pull };
        let gates = &self.shared.gates;
        let mut gate = match home {
            true => Some(gates.gate(&party, &self.name, purpose)),
            // Most other hosts are storage services, which know us by their address.
            false => gates.known(&party, &self.name, purpose),
        };
        let reads_blob = ask.blob.is_some() && !ask.writes();
        let mut renewals = 0;
        loop {
            let used = match &gate {
                Some(gate) => gates.authorization(gate, &party).await,
                None => Authorization::default(),
            };
            let answer = self.send(endpoint, url.clone(), home, used.header.clone(), ask).await?;
            let status = answer.status();
            if status.is_success() || is_redirect(status) {
                if let Some(gate) = &gate {
                    gate.accepted(&used, reads_blob);
                }
                return Ok(answer);
            }
            let challenges = challenges_of(answer.headers());
            let is_refusal = match status.as_u16() {
                400 => used.header.is_some(),
                401 => used.header.is_some() || home || !challenges.is_empty(),
                403 => used.header.is_some() || !challenges.is_empty(),
                _ => false,
            };
            if !is_refusal {
                return Ok(answer);
            }
            if renewals == MAX_RENEWALS {
                // Others renew it all the time: this one has had no luck yet.
                let error = RegistryError::denied(authority(url), ask.what.clone(), status.as_u16(), CHECK_CREDENTIALS);
                return Err(Failure::new(
                    error.waiting(reads_blob.then_some(Duration::ZERO)),
                    "auth",
                ));
            }
            let gate = gate.get_or_insert_with(|| gates.gate(&party, &self.name, purpose));
            let refusal = Refusal {
                what: &ask.what,
                status,
                challenges,
                repeated: renewals > 0,
                patient: reads_blob,
            };
            match gates.renew(gate, &party, &used, refusal).await {
                Ok(()) => {
                    renewals += 1;
                    self.retried("auth");
                    tracing::debug!(host = %endpoint.name, what = %ask.what, "authentication is renewed");
                }
                // It may mean what it says: a request that this registry does not understand, or may not do this for us.
                Err(RegistryError::Denied { .. }) if status != StatusCode::UNAUTHORIZED && ask.writes() => {
                    return Ok(answer);
                }
                Err(RegistryError::Denied { .. }) if status == StatusCode::BAD_REQUEST && !reads_blob => {
                    return Ok(answer);
                }
                Err(error) => return Err(Failure::new(error, "auth")),
            }
        }
    }

    /// Asks where the last reader of the blob was sent. `None`: there is no such place (any more), ask the endpoint.
    async fn at_remembered_target(&self, endpoint: &Endpoint, ask: &Ask) -> Result<Option<Response>, Failure> {
        let Some(blob) = ask.blob else { return Ok(None) };
        let Some(url) = self.locations.get(endpoint.base.as_str(), blob) else {
            return Ok(None);
        };
        let outcome = self.ask(endpoint, &url, ask).await;
        if let Ok(answer) = &outcome
            && answer.status().is_success()
        {
            return outcome.map(Some);
        }
        self.locations.forget(endpoint.base.as_str(), blob);
        let status = match outcome {
            Ok(answer) => {
                let status = answer.status();
                if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
                    return Err(self.status_failure(endpoint, &url, ask, &answer));
                }
                status.as_u16()
            }
            // What that host wants, the endpoint may know another way around.
            Err(failure) if failure.cause == "auth" => StatusCode::UNAUTHORIZED.as_u16(),
            Err(failure) => return Err(failure),
        };
        self.retried("status");
        tracing::debug!(host = %authority(&url), what = %ask.what, status, "the redirect target has ended");
        Ok(None)
    }

    fn url(&self, endpoint: &Endpoint, ask: &Ask) -> Url {
        let mut url = endpoint.base.clone();
        // Fails only for addresses without a host, which `hosts` refuses. Segments are escaped, and `..` is dropped.
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty()
                .extend(self.name.split('/'))
                .push(ask.kind)
                .extend(ask.name.split('/'));
        }
        if !ask.query.is_empty() {
            url.query_pairs_mut().extend_pairs(&ask.query);
        }
        if let Some(namespace) = &endpoint.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        url
    }

    async fn send(
        &self,
        endpoint: &Endpoint,
        url: Url,
        home: bool,
        authorization: Option<HeaderValue>,
        ask: &Ask,
    ) -> Result<Response, Failure> {
        let host = authority(&url);
        let mut request = reqwest::Request::new(ask.method.clone(), url);
        let headers = request.headers_mut();
        if home {
            headers.extend(endpoint.headers.clone());
        }
        if let Some(authorization) = authorization {
            headers.insert(header::AUTHORIZATION, authorization);
        }
        headers.insert(header::ACCEPT, HeaderValue::from_static(ask.accept.unwrap_or("*/*")));
        // Digests and ranges are those of the stored bytes.
        headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if let Some(range) = &ask.range
            && let Ok(value) = HeaderValue::from_str(&range_header(range))
        {
            headers.insert(header::RANGE, value);
        }
        if let Some(payload) = &ask.body {
            if let Ok(value) = HeaderValue::from_str(&payload.media_type) {
                headers.insert(header::CONTENT_TYPE, value);
            }
            *request.body_mut() = Some(payload.bytes.clone().into());
        } else if ask.writes() {
            headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
        }
        self.requests.fetch_add(1, Ordering::Relaxed);
        let proxy = self.shared.hosts.proxy(request.url());
        let apart = request.try_clone().filter(|_| ask.beside);
        let outcome = match apart {
            Some(apart) => match endpoint.beside.execute(apart).await {
                // It may know no HTTP/1.1, or take no more connections.
                Err(error) if error.is_connect() => endpoint.client.execute(request).await,
                outcome => outcome,
            },
            None => endpoint.client.execute(request).await,
        };
        count_request(
            &self.shared.metrics,
            outcome.as_ref().ok().map(|answer| answer.status()),
        );
        outcome.map_err(|cut| {
            let what = match proxy {
                Some(proxy) => format!("{cut} (through the proxy {proxy})"),
                None => cut.to_string(),
            };
            let error = RegistryError::Unreachable { host, what };
            match cut.is_refused() {
                true => Failure::refused(error),
                false => Failure::new(error, "connection"),
            }
        })
    }

    /// What a status that is neither success nor redirect means.
    fn status_failure(&self, endpoint: &Endpoint, url: &Url, ask: &Ask, answer: &Response) -> Failure {
        let host = authority(url);
        let host = match endpoint.name == host {
            true => host,
            false => format!("{host} (for {})", endpoint.name),
        };
        let what = ask.what.clone();
        let status = answer.status().as_u16();
        let error = match answer.status() {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                RegistryError::denied(host, what, status, CHECK_CREDENTIALS)
            }
            StatusCode::NOT_FOUND | StatusCode::GONE => RegistryError::NotFound { host, what },
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => RegistryError::Busy {
                host,
                what,
                status,
                retry_after: retry_after(answer.headers()),
            },
            StatusCode::PROXY_AUTHENTICATION_REQUIRED => RegistryError::Unreachable {
                host,
                what: format!(
                    "the proxy {} wants a user name and a password (HTTP 407), or others than HTTP_PROXY or HTTPS_PROXY have",
                    self.shared.hosts.proxy(url).unwrap_or_default()
                ),
            },
            _ => RegistryError::Status { host, what, status },
        };
        let mut failure = Failure::new(error, "status");
        failure.passing |= answer.status() == StatusCode::REQUEST_TIMEOUT;
        failure
    }

    pub(super) fn protocol(&self, endpoint: &Endpoint, ask: &Ask, problem: String) -> Failure {
        let error = RegistryError::Protocol {
            host: endpoint.name.clone(),
            what: ask.what.clone(),
            problem,
        };
        Failure::new(error, "protocol")
    }

    /// Counts a repetition.
    pub(super) fn retried(&self, cause: &str) {
        self.shared
            .metrics
            .registry_retries_total
            .with_label_values(&[cause])
            .inc();
    }
}

/// What a registry says of a request to write that it does not fulfil.
async fn refused(error: RegistryError, mut answer: Response) -> RegistryError {
    let (host, what, status) = match error {
        RegistryError::Denied {
            host,
            what,
            status: 403,
            ..
        } => (host, what, 403),
        RegistryError::Status { host, what, status } if status < 500 || status == 507 => (host, what, status),
        other => return other,
    };
    let problem = match status {
        403 => "the credentials may not write there, or a quota is used up",
        405 => "it is read-only, or this operation is switched off there",
        413 => "it is larger than the registry takes",
        507 => "the registry has no room left",
        _ => "the registry refuses it",
    };
    let mut body = Vec::new();
    while let Ok(Some(piece)) = answer.chunk().await {
        let room = MAX_REFUSAL - body.len();
        body.extend_from_slice(&piece[..piece.len().min(room)]);
        if body.len() == MAX_REFUSAL {
            break;
        }
    }
    let problem = match message(&body) {
        Some(message) => format!("{problem}: {message}"),
        None => problem.to_owned(),
    };
    RegistryError::Refused {
        host,
        what,
        status,
        problem,
    }
}

/// The first message of an error document of the distribution specification, fit to be shown.
fn message(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Errors {
        errors: Vec<One>,
    }
    #[derive(Deserialize)]
    struct One {
        #[serde(default, deserialize_with = "json::loose")]
        code: String,
        #[serde(default, deserialize_with = "json::loose")]
        message: String,
    }
    let errors: Errors = json::from_start(body).ok()?;
    let first = errors.errors.into_iter().next()?;
    let text = format!("{} {}", first.code, first.message);
    let text: String = text
        .trim()
        .chars()
        .filter(|c| !c.is_control())
        .take(MAX_MESSAGE)
        .collect();
    (!text.is_empty()).then_some(text)
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// Where a redirect leads.
fn target(from: &Url, answer: &Response, ask: &Ask) -> Result<Url, String> {
    let location = answer
        .headers()
        .get(header::LOCATION)
        .and_then(|value| value.to_str().ok())
        .ok_or("a redirect without a Location")?;
    let url = from
        .join(location)
        .map_err(|_| "a redirect to what is no address".to_owned())?;
    match (from.scheme(), url.scheme()) {
        // A digest proves a blob over any line; nothing proves what a tag means.
        ("https", "http") if ask.by_tag => Err("a redirect away from TLS".to_owned()),
        (_, "http" | "https") => Ok(url),
        (_, scheme) => Err(format!("a redirect to a {scheme} address")),
    }
}
