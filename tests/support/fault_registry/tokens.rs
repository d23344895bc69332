//! Who may ask: Basic, tokens, the challenge, and the token service.

use std::time::{Duration, Instant};

use axum::body::Body;
use axum::response::Response;
use base64::Engine;
use http::{HeaderMap, Method, header};
use serde_json::json;

use super::answer::{Asked, status, with};
use super::target::Target;
use super::{Inner, Shared};

/// How long tokens are good, whatever is said.
const LIFETIME: Duration = Duration::from_secs(300);

/// How requests have to be authenticated.
#[derive(Debug, Clone, Default)]
pub enum Auth {
    /// Not at all.
    #[default]
    None,
    /// User name and password.
    Basic(String, String),
    /// A token, which anybody gets.
    AnonymousToken,
    /// A token for a user name and password.
    Token(String, String),
    /// A token for an OAuth 2 refresh token.
    IdentityToken(String),
}

impl Inner {
    pub(super) fn authorized(&self, target: &Target, method: &Method, headers: &HeaderMap) -> bool {
        let given = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        match &self.auth {
            Auth::None => true,
            Auth::Basic(user, password) => given == basic(user, password),
            _ => {
                let token = given.strip_prefix("Bearer ").unwrap_or_default();
                self.tokens.get(token).is_some_and(|(scope, until)| {
                    let scoped = matches!(target, Target::Version) || *scope == scope_of(target, method);
                    scoped && *until > Instant::now()
                })
            }
        }
    }

    pub(super) fn challenge(&self, shared: &Shared, target: &Target, method: &Method, headers: &HeaderMap) -> Response {
        if let Some(refusal) = self.refusal
            && headers.contains_key(header::AUTHORIZATION)
        {
            return status(refusal);
        }
        let realm = format!("http://{}/token", shared.origin);
        if let Some(challenges) = &self.challenges {
            let mut response = status(401);
            for challenge in challenges {
                let challenge = challenge.replace("REALM", &realm);
                let challenge = challenge.replace("HOST", &shared.origin.to_string());
                response
                    .headers_mut()
                    .append(header::WWW_AUTHENTICATE, challenge.parse().unwrap());
            }
            return response;
        }
        let challenge = match &self.auth {
            Auth::None | Auth::Basic(..) => r#"Basic realm="fault registry""#.to_owned(),
            _ => format!(
                r#"Bearer realm="{realm}",service="fault registry",scope="{}""#,
                scope_of(target, method)
            ),
        };
        with(status(401), header::WWW_AUTHENTICATE, &challenge)
    }

    pub(super) fn hand_out(&mut self, asked: &Asked<'_>) -> Response {
        let given = asked
            .headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        let form = |name: &str| asked.form.get(name).map(String::as_str).unwrap_or_default();
        let by_post = *asked.method == Method::POST;
        let good = match &self.auth {
            Auth::Token(user, password) if by_post => {
                form("grant_type") == "password" && form("username") == user && form("password") == password
            }
            Auth::Token(user, password) => given == basic(user, password),
            Auth::IdentityToken(token) if by_post => {
                form("grant_type") == "refresh_token"
                    && form("refresh_token") == token
                    && form("service") == "fault registry"
            }
            Auth::IdentityToken(token) => given == basic("", token),
            _ => true,
        };
        if !good {
            return status(401);
        }
        let token = self.issue(asked);
        let lifetime = self.lifetime();
        let answer = json!({"access_token": token, "expires_in": lifetime.as_secs_f64()});
        let response = Response::new(Body::from(answer.to_string()));
        with(response, header::CONTENT_TYPE, "application/json")
    }

    /// A new token for the scope that is asked for.
    pub(super) fn issue(&mut self, asked: &Asked<'_>) -> String {
        let scope = asked.query.get("scope").or(asked.form.get("scope")).cloned();
        self.issued += 1;
        let token = format!("token-{}", self.issued);
        let until = Instant::now() + LIFETIME.max(self.lifetime());
        self.tokens.insert(token.clone(), (scope.unwrap_or_default(), until));
        token
    }

    fn lifetime(&self) -> Duration {
        self.token_lifetime.unwrap_or(LIFETIME)
    }
}

fn scope_of(target: &Target, method: &Method) -> String {
    let actions = match *method {
        Method::GET | Method::HEAD => "pull",
        Method::DELETE => "delete",
        _ => "pull,push",
    };
    format!("repository:{}:{actions}", target.repository())
}

fn basic(user: &str, password: &str) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    format!("Basic {text}")
}
