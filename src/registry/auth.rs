//! Authentication of requests: which `Authorization` header a host wants for a repository, and how to get a new one.
//!
//! A [`Gate`] stands for one endpoint, one repository, and reading or writing there. All requests there share its header; whoever meets a
//! 401 first renews it, and the others wait and take the new one. A token is also renewed a little before it ends. Secrets live in memory
//! only, are marked sensitive in headers, and are sent to the endpoint and to the token service it names, nowhere else.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use lru::LruCache;
use serde::Deserialize;
use url::Url;

use super::hosts::Endpoint;
use super::{RegistryError, lock};
use crate::metrics::Metrics;

pub mod challenge;
pub mod credentials;

pub use challenge::{Challenge, parse_challenges};
pub use credentials::{Credentials, Secret};

/// Gates that are remembered; the one unused longest is forgotten first.
const MAX_GATES: NonZeroUsize = NonZeroUsize::new(4096).unwrap();
/// Validity of a token that states none (distribution token specification).
const DEFAULT_EXPIRY: Duration = Duration::from_secs(60);
/// A token is renewed this long before it ends, or after three quarters of its life if that is later.
const RENEW_BEFORE: Duration = Duration::from_secs(15);
/// Longest validity that is believed.
const MAX_EXPIRY: Duration = Duration::from_secs(24 * 3600);
/// Longest wait for a token in all: every reader of the repository waits for it.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest answer of a token service, in bytes.
const MAX_TOKEN_ANSWER: usize = 1 << 20;
/// Name of this program towards OAuth 2 token services.
const CLIENT_ID: &str = "lazuli";

/// What a request is for. Readers never carry a token that may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// To read.
    Pull,
    /// To write or to delete.
    Push,
}

impl Purpose {
    /// Scope to ask a token for, where a challenge states none.
    fn scope(self, repository: &str) -> String {
        match self {
            Purpose::Pull => format!("repository:{repository}:pull"),
            Purpose::Push => format!("repository:{repository}:pull,push"),
        }
    }
}

/// All gates of a daemon.
pub struct Gates {
    credentials: Credentials,
    metrics: Arc<Metrics>,
    gates: Mutex<LruCache<(String, String, Purpose), Arc<Gate>>>,
}

/// One endpoint and repository.
pub struct Gate {
    purpose: Purpose,
    state: tokio::sync::Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Counts renewals, so that only the first of several requests that met the same 401 renews.
    generation: u64,
    pass: Pass,
}

#[derive(Default)]
enum Pass {
    /// Ask without; the host says so if that is not enough.
    #[default]
    Anonymous,
    Basic(HeaderValue),
    Bearer {
        header: HeaderValue,
        renew_at: Instant,
        challenge: Challenge,
    },
}

/// A header to send, and which renewal it came from.
pub struct Authorization {
    /// Value of `Authorization`; `None` to ask anonymously.
    pub header: Option<HeaderValue>,
    generation: u64,
}

impl Gates {
    /// Gates that take credentials from `credentials`, and count their requests in `metrics`.
    pub fn new(credentials: Credentials, metrics: Arc<Metrics>) -> Self {
        Gates {
            credentials,
            metrics,
            gates: Mutex::new(LruCache::new(MAX_GATES)),
        }
    }

    /// The gate of `repository` at `endpoint`.
    pub fn gate(&self, endpoint: &Endpoint, repository: &str, purpose: Purpose) -> Arc<Gate> {
        let key = (endpoint.base.to_string(), repository.to_owned(), purpose);
        let new = || {
            Arc::new(Gate {
                purpose,
                state: tokio::sync::Mutex::default(),
            })
        };
        lock(&self.gates).get_or_insert(key, new).clone()
    }

    /// The header to send now. Renews a token that is about to end.
    ///
    /// # Errors
    /// [`RegistryError`] of the token service or of the credentials.
    pub async fn authorization(
        &self,
        gate: &Gate,
        endpoint: &Endpoint,
        repository: &str,
    ) -> Result<Authorization, RegistryError> {
        let mut state = gate.state.lock().await;
        if let Pass::Bearer {
            renew_at, challenge, ..
        } = &state.pass
            && *renew_at <= Instant::now()
        {
            let challenge = challenge.clone();
            state.pass = self.pass(gate.purpose, endpoint, repository, &[challenge]).await?;
            state.generation += 1;
        }
        Ok(Authorization {
            header: state.pass.header(),
            generation: state.generation,
        })
    }

    /// Answers a 401 that a request with `used` met. `Ok`: ask again. Does nothing if another request has renewed since.
    ///
    /// # Errors
    /// [`RegistryError::Denied`] if there is nothing better to offer; errors of the token service or of the credentials.
    pub async fn renew(
        &self,
        gate: &Gate,
        endpoint: &Endpoint,
        repository: &str,
        used: &Authorization,
        answer: &HeaderMap,
    ) -> Result<(), RegistryError> {
        let challenges: Vec<Challenge> = answer
            .get_all(header::WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(parse_challenges)
            .collect();
        let mut state = gate.state.lock().await;
        if state.generation != used.generation {
            return Ok(());
        }
        let pass = self.pass(gate.purpose, endpoint, repository, &challenges).await?;
        // The same user name and password again would be refused again.
        if let (Pass::Basic(old), Pass::Basic(new)) = (&state.pass, &pass)
            && old == new
        {
            return Err(denied(endpoint, repository));
        }
        state.pass = pass;
        state.generation += 1;
        Ok(())
    }

    /// Fulfils the first challenge that can be.
    async fn pass(
        &self,
        purpose: Purpose,
        endpoint: &Endpoint,
        repository: &str,
        challenges: &[Challenge],
    ) -> Result<Pass, RegistryError> {
        let secret = self.credentials.find(&endpoint.name).await?;
        for challenge in challenges {
            match (challenge, &secret) {
                (Challenge::Bearer { realm, service, scope }, secret) => {
                    let request = TokenRequest {
                        metrics: &self.metrics,
                        endpoint,
                        realm,
                        service: service.as_deref(),
                        scope: scope.clone().unwrap_or_else(|| purpose.scope(repository)),
                    };
                    let (header, renew_at) = request.fetch(secret.as_ref()).await?;
                    return Ok(Pass::Bearer {
                        header,
                        renew_at,
                        challenge: challenge.clone(),
                    });
                }
                (Challenge::Basic, Some(Secret::Password { username, password })) => {
                    return Ok(Pass::Basic(basic(username, password)?));
                }
                _ => {}
            }
        }
        Err(denied(endpoint, repository))
    }
}

impl Pass {
    fn header(&self) -> Option<HeaderValue> {
        match self {
            Pass::Anonymous => None,
            Pass::Basic(header) | Pass::Bearer { header, .. } => Some(header.clone()),
        }
    }
}

fn denied(endpoint: &Endpoint, repository: &str) -> RegistryError {
    RegistryError::Denied {
        host: endpoint.name.clone(),
        what: repository.to_owned(),
        status: StatusCode::UNAUTHORIZED.as_u16(),
    }
}

fn basic(username: &str, password: &str) -> Result<HeaderValue, RegistryError> {
    let text = base64::engine::general_purpose::STANDARD.encode(format!("{username}:{password}"));
    sensitive(&format!("Basic {text}"))
}

fn sensitive(text: &str) -> Result<HeaderValue, RegistryError> {
    let mut value = HeaderValue::from_str(text).map_err(|_| RegistryError::Config {
        path: "credentials".to_owned(),
        problem: "a token holds characters that cannot be sent".to_owned(),
    })?;
    value.set_sensitive(true);
    Ok(value)
}

struct TokenRequest<'a> {
    metrics: &'a Metrics,
    endpoint: &'a Endpoint,
    realm: &'a str,
    service: Option<&'a str>,
    scope: String,
}

#[derive(Deserialize)]
struct TokenAnswer {
    #[serde(default)]
    token: String,
    #[serde(default)]
    access_token: String,
    expires_in: Option<f64>,
    issued_at: Option<String>,
}

impl TokenRequest<'_> {
    /// A token, and when to renew it.
    async fn fetch(&self, secret: Option<&Secret>) -> Result<(HeaderValue, Instant), RegistryError> {
        let protocol = |problem: &str| RegistryError::Protocol {
            host: self.endpoint.name.clone(),
            what: "the request for a token".to_owned(),
            problem: problem.to_owned(),
        };
        let realm = Url::parse(self.realm).map_err(|_| protocol("its token service has no valid address"))?;
        if !matches!(realm.scheme(), "http" | "https") {
            return Err(protocol("its token service has no http address"));
        }
        if secret.is_some() && realm.scheme() == "http" && self.endpoint.base.scheme() == "https" {
            return Err(protocol("its token service wants credentials without TLS"));
        }
        let host = super::hosts::authority(&realm);
        let client = &self.endpoint.client;
        let request = match secret {
            Some(Secret::IdentityToken(token)) => {
                let mut form = url::form_urlencoded::Serializer::new(String::new());
                form.append_pair("grant_type", "refresh_token")
                    .append_pair("client_id", CLIENT_ID)
                    .append_pair("service", self.service.unwrap_or_default())
                    .append_pair("scope", &self.scope)
                    .append_pair("refresh_token", token);
                client
                    .post(realm)
                    .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
                    .body(form.finish())
            }
            other => {
                let mut url = realm;
                {
                    let mut query = url.query_pairs_mut();
                    if let Some(service) = self.service {
                        query.append_pair("service", service);
                    }
                    for scope in self.scope.split_whitespace() {
                        query.append_pair("scope", scope);
                    }
                }
                let request = client.get(url);
                match other {
                    Some(Secret::Password { username, password }) => {
                        request.header(header::AUTHORIZATION, basic(username, password)?)
                    }
                    _ => request,
                }
            }
        };
        let unreachable = |error: reqwest::Error| RegistryError::Unreachable {
            host: host.clone(),
            what: super::hosts::transport::chain(&error.without_url()),
        };
        let outcome = request.timeout(TOKEN_TIMEOUT).send().await;
        super::count_request(self.metrics, outcome.as_ref().ok().map(|answer| answer.status()));
        let mut answer = outcome.map_err(unreachable)?;
        let what = format!("a token for {}", self.scope);
        let status = answer.status();
        match status {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                return Err(RegistryError::Denied {
                    host,
                    what,
                    status: status.as_u16(),
                });
            }
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                return Err(RegistryError::Busy {
                    host,
                    what,
                    status: status.as_u16(),
                    retry_after: super::attempts::retry_after(answer.headers()),
                });
            }
            other => {
                return Err(RegistryError::Status {
                    host,
                    what,
                    status: other.as_u16(),
                });
            }
        }
        let mut body = Vec::new();
        while let Some(piece) = answer.chunk().await.map_err(unreachable)? {
            if body.len() + piece.len() > MAX_TOKEN_ANSWER {
                return Err(protocol("the token service's answer is too long"));
            }
            body.extend_from_slice(&piece);
        }
        // Nothing of the answer is repeated in an error: it holds the token.
        let answer: TokenAnswer =
            serde_json::from_slice(&body).map_err(|_| protocol("the token service's answer is not valid"))?;
        let token = if answer.token.is_empty() {
            &answer.access_token
        } else {
            &answer.token
        };
        if token.is_empty() {
            return Err(protocol("the token service's answer holds no token"));
        }
        let header = sensitive(&format!("Bearer {token}"))?;
        let lifetime = remaining(
            answer.expires_in,
            answer.issued_at.as_deref(),
            time::OffsetDateTime::now_utc(),
        );
        Ok((header, Instant::now() + renew_after(lifetime)))
    }
}

/// How long a token is still good.
fn remaining(expires_in: Option<f64>, issued_at: Option<&str>, now: time::OffsetDateTime) -> Duration {
    let lifetime = expires_in
        .filter(|seconds| *seconds > 0.0)
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .unwrap_or(DEFAULT_EXPIRY)
        .min(MAX_EXPIRY);
    let age = issued_at
        .and_then(|text| time::OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339).ok())
        .and_then(|issued| Duration::try_from(now - issued).ok());
    match age {
        // An age beyond the lifetime is a difference of clocks: nobody hands out tokens that have ended.
        Some(age) if age < lifetime => lifetime - age,
        _ => lifetime,
    }
}

fn renew_after(lifetime: Duration) -> Duration {
    lifetime.saturating_sub(RENEW_BEFORE).max(lifetime / 4 * 3)
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    #[test]
    fn tokens_are_renewed_before_they_end() {
        let now = datetime!(2026-01-01 12:00 UTC);
        let seconds = Duration::from_secs;
        assert_eq!(remaining(None, None, now), DEFAULT_EXPIRY);
        assert_eq!(remaining(Some(300.0), None, now), seconds(300));
        assert_eq!(remaining(Some(300.0), Some("2026-01-01T11:59:00Z"), now), seconds(240));
        // From the future, or long ago: clocks differ.
        assert_eq!(remaining(Some(300.0), Some("2026-01-01T13:00:00Z"), now), seconds(300));
        assert_eq!(remaining(Some(300.0), Some("2025-01-01T00:00:00Z"), now), seconds(300));
        assert_eq!(remaining(Some(300.0), Some("yesterday"), now), seconds(300));
        assert_eq!(remaining(Some(-1.0), None, now), DEFAULT_EXPIRY);
        assert_eq!(remaining(Some(f64::MAX), None, now), DEFAULT_EXPIRY);
        assert_eq!(remaining(Some(1e9), None, now), MAX_EXPIRY);
        assert_eq!(renew_after(seconds(300)), seconds(285));
        assert_eq!(renew_after(seconds(4)), seconds(3));
    }

    #[test]
    fn secrets_do_not_show_in_headers() {
        let header = basic("user", "s3cret").unwrap();
        assert!(!format!("{header:?}").contains("dXNlc"));
        assert!(header.is_sensitive());
    }
}
