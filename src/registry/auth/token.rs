//! Token services: how a token is asked for, and what their answers mean.
//!
//! The service is asked in the ways that containerd's client and the distribution specification know, one after another until one is not
//! refused: with a user name and a password by GET, else by POST; with a refresh token by POST, else by GET (from then on first in the way
//! that was taken); and at last for nobody in particular, since most images are public even where the credentials are bad.
//!
//! Redirects are followed. A secret goes along to the same host, to those below its name, and from http to https there, but never from
//! https to http, and not over http for a registry that is asked over https. (Go's client takes another port for the same host; here a host
//! is a name and a port, as everywhere.) Where a secret stays behind and that ends in a refusal, the error says so.

use std::time::{Duration, Instant};

use base64::Engine;
use http::{HeaderValue, StatusCode, header};
use serde::Deserialize;
use url::Url;

use super::Party;
use super::credentials::Secret;
use crate::metrics::Metrics;
use crate::registry::hosts::wire::Response;
use crate::registry::hosts::{authority, is_loopback};
use crate::registry::{RegistryError, attempts, count_request, json};

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
/// Redirects that are followed, as many as Go's client follows.
const MAX_REDIRECTS: u32 = 10;
/// Name of this program towards OAuth 2 token services.
const CLIENT_ID: &str = "lazuli";

/// A token that is wanted.
pub(super) struct TokenRequest<'a> {
    pub(super) metrics: &'a Metrics,
    /// Who wants it.
    pub(super) party: &'a Party<'a>,
    /// Address of the token service, which may be relative to the party's.
    pub(super) realm: &'a str,
    pub(super) service: Option<&'a str>,
    /// What access is needed; several separated by spaces.
    pub(super) scope: String,
    /// In which way a secret was taken before.
    pub(super) usual: Option<Usual>,
}

/// A way in which a token service takes secrets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Usual {
    Get,
    Post,
}

/// A token.
#[derive(Debug)]
pub(super) struct Token {
    pub(super) header: HeaderValue,
    pub(super) renew_at: Instant,
    /// Why it is a token for nobody in particular although there are credentials.
    pub(super) note: Option<String>,
    /// In which way a secret was taken, if one was.
    pub(super) usual: Option<Usual>,
}

/// One way to ask.
#[derive(Clone, Copy)]
enum Way<'a> {
    /// By GET, with this user name and password, or for nobody in particular.
    Get(Option<(&'a str, &'a str)>),
    /// By POST, with these fields.
    Post(&'a [(&'a str, &'a str)]),
}

/// What one way led to.
enum Outcome {
    Token(Token),
    Refused(Refusal),
}

/// What a service answers that does not give a token in one way.
struct Refusal {
    status: StatusCode,
    host: String,
    /// Why the secret stayed behind, if it did.
    kept: Option<String>,
}

impl Refusal {
    /// Whether it says that the credentials do not do, rather than that this is no way to ask.
    fn is_denial(&self) -> bool {
        matches!(self.status.as_u16(), 400 | 401 | 403)
    }

    /// The one of two that tells more.
    fn or(self, other: Refusal) -> Refusal {
        let kept = self.kept.clone().or_else(|| other.kept.clone());
        let told = if self.is_denial() || !other.is_denial() {
            self
        } else {
            other
        };
        Refusal { kept, ..told }
    }
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct TokenAnswer {
    #[serde(deserialize_with = "json::loose")]
    token: String,
    #[serde(deserialize_with = "json::loose")]
    access_token: String,
    #[serde(deserialize_with = "json::loose")]
    expires_in: serde_json::Value,
    #[serde(deserialize_with = "json::loose")]
    issued_at: String,
}

impl TokenRequest<'_> {
    /// A token, and when to renew it.
    ///
    /// # Errors
    /// [`RegistryError::Denied`] if the service refuses the credentials and asking without; whatever else goes wrong with it.
    pub(super) async fn fetch(&self, secret: Option<&Secret>) -> Result<Token, RegistryError> {
        let realm = Url::parse(self.realm)
            .or_else(|_| self.party.url.join(self.realm))
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https"))
            .ok_or_else(|| self.protocol("its token service has no http address"))?;
        let all = self.ask_in_all_ways(&realm, secret);
        tokio::time::timeout(TOKEN_TIMEOUT, all).await.unwrap_or_else(|_| {
            Err(RegistryError::Unreachable {
                host: authority(&realm),
                what: format!("no token within {} s", TOKEN_TIMEOUT.as_secs()),
            })
        })
    }

    async fn ask_in_all_ways(&self, realm: &Url, secret: Option<&Secret>) -> Result<Token, RegistryError> {
        let nobody = Way::Get(None);
        let Some(secret) = secret else {
            return match self.ask(realm, nobody).await? {
                Outcome::Token(token) => Ok(token),
                Outcome::Refused(refusal) => Err(self.refused(realm, refusal)),
            };
        };
        let form = match secret {
            Secret::Password { username, password } => {
                vec![
                    ("grant_type", "password"),
                    ("username", username.as_str()),
                    ("password", password),
                ]
            }
            Secret::IdentityToken(token) => vec![("grant_type", "refresh_token"), ("refresh_token", token.as_str())],
        };
        let basic = match secret {
            Secret::Password { username, password } => (username.as_str(), password.as_str()),
            Secret::IdentityToken(token) => ("", token.as_str()),
        };
        let (get, post) = ((Usual::Get, Way::Get(Some(basic))), (Usual::Post, Way::Post(&form)));
        let get_first = match (self.usual, secret) {
            (Some(usual), _) => usual == Usual::Get,
            (None, Secret::Password { .. }) => true,
            (None, Secret::IdentityToken(_)) => false,
        };
        let mut refusal: Option<Refusal> = None;
        for (name, way) in if get_first { [get, post] } else { [post, get] } {
            match self.ask(realm, way).await? {
                Outcome::Token(token) => {
                    let usual = Some(name).filter(|_| token.note.is_none());
                    return Ok(Token { usual, ..token });
                }
                Outcome::Refused(other) => {
                    // In the usual way, these are about the secret. Every other refusal may be about the way.
                    let is_final = self.usual == Some(name) && matches!(other.status.as_u16(), 401 | 403);
                    refusal = Some(match refusal {
                        Some(refusal) => refusal.or(other),
                        None => other,
                    });
                    if is_final {
                        break;
                    }
                }
            }
        }
        let Some(refusal) = refusal else {
            return Err(self.protocol("its token service was not asked"));
        };
        if refusal.is_denial()
            && let Ok(Outcome::Token(mut token)) = self.ask(realm, nobody).await
        {
            let Refusal { status, host, kept } = refusal;
            let why = || format!("its token service {host} refuses them (HTTP {})", status.as_u16());
            token.note = Some(kept.unwrap_or_else(why));
            return Ok(token);
        }
        Err(self.refused(realm, refusal))
    }

    fn refused(&self, realm: &Url, refusal: Refusal) -> RegistryError {
        let is_denial = refusal.is_denial();
        let Refusal { status, host, kept } = refusal;
        let what = format!("a token for {}", self.scope);
        let status = status.as_u16();
        if !is_denial {
            return RegistryError::Status { host, what, status };
        }
        let place = || format!("it is the token service of {} at {}", self.party.name, shown(realm));
        RegistryError::denied(host, what, status, kept.unwrap_or_else(place))
    }

    /// Asks in one way, through redirects.
    async fn ask(&self, realm: &Url, way: Way<'_>) -> Result<Outcome, RegistryError> {
        let mut url = realm.clone();
        if let Way::Get(_) = way {
            let mut query = url.query_pairs_mut();
            if let Some(service) = self.service {
                query.append_pair("service", service);
            }
            for scope in self.scope.split_whitespace() {
                query.append_pair("scope", scope);
            }
        }
        let has_secret = !matches!(way, Way::Get(None));
        let mut by_get = matches!(way, Way::Get(_));
        let (mut astray, mut was_secure) = (None, false);
        for _ in 0..=MAX_REDIRECTS {
            if astray.is_none() && !is_same_host(&url, realm) {
                astray = Some(shown(&url));
            }
            let is_safe = url.scheme() == "https" || !was_secure && self.allows_plain(&url);
            was_secure |= url.scheme() == "https";
            let kept = match &astray {
                _ if !has_secret => None,
                Some(other) => Some(format!(
                    "its token service {} redirects to {other}, to which credentials are not sent: let the registry name that address as its realm",
                    shown(realm)
                )),
                None if !is_safe => Some(format!(
                    "its token service {} wants credentials without TLS at {}: let the registry name an https address as its realm",
                    shown(realm),
                    shown(&url)
                )),
                None => None,
            };
            let carries = has_secret && kept.is_none();
            let request = match way {
                Way::Post(form) if !by_get => self.post(url.clone(), if carries { form } else { &[] }),
                Way::Get(Some((username, password))) if carries => {
                    let header = super::basic(username, password)?;
                    self.party.client.get(url.clone()).header(header::AUTHORIZATION, header)
                }
                _ => self.party.client.get(url.clone()),
            };
            let host = authority(&url);
            let request = request.header(header::ACCEPT, "application/json, */*;q=0.5");
            let outcome = self.party.client.send(request).await;
            count_request(self.metrics, outcome.as_ref().ok().map(|answer| answer.status()));
            let answer = outcome.map_err(|cut| RegistryError::Unreachable {
                host: host.clone(),
                what: cut.to_string(),
            })?;
            let status = answer.status();
            match status.as_u16() {
                301 | 302 | 303 | 307 | 308 => {
                    let location = answer
                        .headers()
                        .get(header::LOCATION)
                        .and_then(|value| value.to_str().ok());
                    url = location
                        .and_then(|location| url.join(location).ok())
                        .filter(|url| matches!(url.scheme(), "http" | "https"))
                        .ok_or_else(|| self.protocol("its token service redirects to what is no http address"))?;
                    // Others mean the same request at another place, whatever browsers make of them.
                    by_get |= status == StatusCode::SEE_OTHER;
                }
                200..=299 => return Ok(Outcome::Token(self.token(answer, kept).await?)),
                400 | 401 | 403 | 404 | 405 | 501 => return Ok(Outcome::Refused(Refusal { status, host, kept })),
                429 | 503 => {
                    return Err(RegistryError::Busy {
                        host,
                        what: format!("a token for {}", self.scope),
                        status: status.as_u16(),
                        retry_after: attempts::retry_after(answer.headers()),
                    });
                }
                status => {
                    let what = format!("a token for {}", self.scope);
                    return Err(RegistryError::Status { host, what, status });
                }
            }
        }
        Err(self.protocol(&format!("its token service {} redirects without end", shown(realm))))
    }

    fn post(&self, url: Url, secrets: &[(&str, &str)]) -> reqwest::RequestBuilder {
        let form = url::form_urlencoded::Serializer::new(String::new())
            .append_pair("client_id", CLIENT_ID)
            .append_pair("service", self.service.unwrap_or_default())
            .append_pair("scope", &self.scope)
            .extend_pairs(secrets)
            .finish();
        let request = self.party.client.post(url);
        request
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
            .body(form)
    }

    /// The token of an answer. Nothing of the answer is repeated in an error: it holds the token.
    async fn token(&self, mut answer: Response, note: Option<String>) -> Result<Token, RegistryError> {
        let host = authority(answer.url());
        let mut body = Vec::new();
        loop {
            let piece = answer.chunk().await.map_err(|cut| RegistryError::Unreachable {
                host: host.clone(),
                what: cut.to_string(),
            })?;
            let Some(piece) = piece else { break };
            if body.len() + piece.len() > MAX_TOKEN_ANSWER {
                return Err(self.protocol(&format!("the answer of its token service {host} is too long")));
            }
            body.extend_from_slice(&piece);
        }
        let answer: TokenAnswer = json::from_start(&body)
            .map_err(|_| self.protocol(&format!("the answer of its token service {host} is not valid")))?;
        // Both mean the same; containerd takes this one where they differ.
        let token = match answer.access_token.is_empty() {
            true => answer.token.trim(),
            false => answer.access_token.trim(),
        };
        if token.is_empty() {
            return Err(self.protocol(&format!("the answer of its token service {host} holds no token")));
        }
        let lifetime = remaining(
            seconds(&answer.expires_in),
            &answer.issued_at,
            time::OffsetDateTime::now_utc(),
        );
        Ok(Token {
            header: super::sensitive(&format!("Bearer {token}"))?,
            renew_at: Instant::now() + renew_after(lifetime),
            note,
            usual: None,
        })
    }

    /// Whether a secret may go over plain http: where the registry itself is asked so, or where it does not leave the machine.
    fn allows_plain(&self, url: &Url) -> bool {
        self.party.url.scheme() == "http" || is_loopback(&authority(url))
    }

    fn protocol(&self, problem: &str) -> RegistryError {
        RegistryError::Protocol {
            host: self.party.name.to_owned(),
            what: "the request for a token".to_owned(),
            problem: problem.to_owned(),
        }
    }
}

/// Whether a secret for `realm` may go to `url`: to the same host and port, to a host below its name, or to TLS at the same host.
fn is_same_host(url: &Url, realm: &Url) -> bool {
    let (Some(host), Some(of)) = (url.host_str(), realm.host_str()) else {
        return false;
    };
    let is_name = matches!(realm.host(), Some(url::Host::Domain(_)));
    let below = || host.strip_suffix(of).is_some_and(|rest| rest.ends_with('.'));
    let is_upgrade = realm.scheme() == "http" && url.scheme() == "https";
    let same_port = url.port_or_known_default() == realm.port_or_known_default();
    (host == of || is_name && below()) && (same_port || is_upgrade)
}

/// An address without what could be a secret.
fn shown(url: &Url) -> String {
    format!("{}://{}{}", url.scheme(), authority(url), url.path())
}

/// A number of seconds, however it is written.
fn seconds(value: &serde_json::Value) -> Option<f64> {
    match value {
        serde_json::Value::String(text) => text.trim().parse().ok(),
        other => other.as_f64(),
    }
}

/// How long a token is still good.
fn remaining(expires_in: Option<f64>, issued_at: &str, now: time::OffsetDateTime) -> Duration {
    let lifetime = expires_in
        .filter(|seconds| *seconds > 0.0)
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .unwrap_or(DEFAULT_EXPIRY)
        .min(MAX_EXPIRY);
    let age = time::OffsetDateTime::parse(issued_at, &time::format_description::well_known::Rfc3339)
        .ok()
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

/// Base64 of `username:password`, as Basic wants it.
pub(super) fn basic_text(username: &str, password: &str) -> String {
    base64::engine::general_purpose::STANDARD.encode(format!("{username}:{password}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use time::macros::datetime;

    use super::*;

    #[test]
    fn tokens_are_renewed_before_they_end() {
        let now = datetime!(2026-01-01 12:00 UTC);
        let whole = Duration::from_secs;
        assert_eq!(remaining(None, "", now), DEFAULT_EXPIRY);
        assert_eq!(remaining(Some(300.0), "", now), whole(300));
        assert_eq!(remaining(Some(300.0), "2026-01-01T11:59:00Z", now), whole(240));
        // From the future, or long ago: clocks differ.
        assert_eq!(remaining(Some(300.0), "2026-01-01T13:00:00Z", now), whole(300));
        assert_eq!(remaining(Some(300.0), "2025-01-01T00:00:00Z", now), whole(300));
        assert_eq!(remaining(Some(300.0), "yesterday", now), whole(300));
        assert_eq!(remaining(Some(-1.0), "", now), DEFAULT_EXPIRY);
        assert_eq!(remaining(Some(f64::MAX), "", now), DEFAULT_EXPIRY);
        assert_eq!(remaining(Some(1e9), "", now), MAX_EXPIRY);
        assert_eq!(renew_after(whole(300)), whole(285));
        assert_eq!(renew_after(whole(4)), whole(3));
    }

    #[test]
    fn answers_in_all_their_forms() {
        let parse = |text: &str| json::from_start::<TokenAnswer>(text.as_bytes()).ok();
        for text in [
            r#"{"token": "t"}"#,
            r#"{"access_token": null, "token": "t", "expires_in": null, "issued_at": null}"#,
            r#"{"Token": "x", "token": "t", "token": null, "issued_at": 7, "scope": ["a"]}"#,
            r#"{"token": "t", "expires_in": "soon", "refresh_token": 1} <html>"#,
        ] {
            assert_eq!(parse(text).unwrap().token, "t", "{text}");
        }
        assert!(parse("<html>").is_none() && parse("").is_none() && parse("[]").is_none());
        for (value, expected) in [
            (json!(300), Some(300.0)),
            (json!(1.5), Some(1.5)),
            (json!("300"), Some(300.0)),
            (json!(" 60 "), Some(60.0)),
            (json!(null), None),
            (json!("soon"), None),
            (json!([1]), None),
        ] {
            assert_eq!(seconds(&value), expected, "{value}");
        }
    }

    #[test]
    fn secrets_stay_at_their_host() {
        let same = |to: &str, from: &str| is_same_host(&Url::parse(to).unwrap(), &Url::parse(from).unwrap());
        assert!(same("https://a.example/x", "http://a.example/y"));
        assert!(same("https://a.example:8443/x", "http://A.example:5000/"));
        assert!(same("https://a.example:443/x", "https://a.example/y"));
        assert!(same("https://eu.a.example/", "https://a.example/"));
        assert!(!same("https://a.example:8443/x", "https://a.example/"));
        assert!(!same("http://127.0.0.1:1/", "http://127.0.0.1:2/"));
        assert!(!same("https://a.example/", "https://eu.a.example/"));
        assert!(!same("https://bad-a.example/", "https://a.example/"));
        assert!(!same("https://a.1.example/", "https://[::1]/"));
        assert!(!same("http://127.0.0.1:1/", "http://localhost:1/"));
    }
}
