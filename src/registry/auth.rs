//! Authentication of requests: which `Authorization` header a host wants for a repository, and how to get a new one.
//!
//! A [`Gate`] stands for one host, one repository, and reading or writing there; the host is an endpoint, or one that an endpoint sends
//! readers to and that wants them to be authenticated as well. All requests there share its header. Whoever is refused first renews it:
//! the sources of credentials are asked anew, and the token service; the others wait and take what comes of that. A token is also renewed
//! a little before it ends.
//!
//! A refusal is any 400, 401 or 403 to a request with credentials (registries say "ended" in all these ways), or a challenge to one
//! without. A renewal that brings nothing new is not repeated for a few seconds, or until `config.json` changes: there is no storm on a
//! token service, however many readers there are. What readers had before they lost it may come back, when somebody renews credentials that
//! have ended; their refusals say so, and [`super::attempts`] waits.
//!
//! Secrets live in memory only, are marked sensitive in headers, and are sent to the host that they are for and to the token service it
//! names, nowhere else.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http::HeaderValue;
use lru::LruCache;
use url::Url;

use super::error::CHECK_CREDENTIALS;
use super::hosts::wire::Wire;
use super::hosts::{Endpoint, authority, is_loopback};
use super::{RegistryError, lock};
use crate::metrics::Metrics;

pub mod challenge;
pub mod credentials;
mod gate;
mod token;

pub use challenge::{Challenge, challenges_of, parse_challenges};
use credentials::Lookup;
pub use credentials::{Credentials, Secret};
pub use gate::{Authorization, Gate, Refusal};
use gate::{Granted, Pass, REFUSED_FOR};
use token::TokenRequest;

/// Gates that are remembered; the one unused longest is forgotten first.
const MAX_GATES: NonZeroUsize = NonZeroUsize::new(4096).unwrap();
/// Longest wait for a token while the old one is still good: readers wait with it.
const AHEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// How long after a failure to renew a token ahead of its end that is tried again.
const AHEAD_AGAIN: Duration = Duration::from_secs(5);

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

/// A host that is asked.
pub struct Party<'a> {
    /// `host:port`, for credentials and errors.
    name: String,
    /// Its address: what is relative in its challenges is relative to this.
    url: &'a Url,
    client: &'a Wire,
    /// An endpoint behind TLS has sent us here, to where there is none: no secrets.
    is_downgrade: bool,
    is_endpoint: bool,
}

impl<'a> Party<'a> {
    /// The host that `url` is at, when that is reached from `endpoint`.
    pub fn new(endpoint: &'a Endpoint, url: &'a Url) -> Self {
        let is_endpoint = url.origin() == endpoint.base.origin();
        let name = match is_endpoint {
            true => endpoint.name.clone(),
            false => authority(url),
        };
        let is_downgrade = endpoint.base.scheme() == "https" && url.scheme() == "http" && !is_loopback(&name);
        Party {
            name,
            url: if is_endpoint { &endpoint.base } else { url },
            client: &endpoint.client,
            is_downgrade,
            is_endpoint,
        }
    }

    /// Whether it is the endpoint itself.
    pub fn is_endpoint(&self) -> bool {
        self.is_endpoint
    }

    fn key(&self, repository: &str, purpose: Purpose) -> (String, String, Purpose) {
        let address = match self.is_endpoint {
            true => self.url.to_string(),
            // What was got by way of a registry without TLS is not sent for one behind TLS.
            false if self.is_downgrade => format!("{} (away from TLS)", self.url.origin().ascii_serialization()),
            false => self.url.origin().ascii_serialization(),
        };
        (address, repository.to_owned(), purpose)
    }
}

/// All gates of a daemon.
pub struct Gates {
    credentials: Credentials,
    metrics: Arc<Metrics>,
    gates: Mutex<LruCache<(String, String, Purpose), Arc<Gate>>>,
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

    /// What is wrong with the sources of credentials; see [`Credentials::problems`].
    pub fn problems(&self) -> Vec<String> {
        self.credentials.problems()
    }

    /// The gate of `repository` at `party`.
    pub fn gate(&self, party: &Party<'_>, repository: &str, purpose: Purpose) -> Arc<Gate> {
        let new = || {
            Arc::new(Gate {
                purpose,
                repository: repository.to_owned(),
                turn: tokio::sync::Mutex::default(),
                state: Mutex::default(),
            })
        };
        let key = party.key(repository, purpose);
        lock(&self.gates).get_or_insert(key, new).clone()
    }

    /// The gate of `repository` at `party`, if there is one already: storage services need none.
    pub fn known(&self, party: &Party<'_>, repository: &str, purpose: Purpose) -> Option<Arc<Gate>> {
        lock(&self.gates).get(&party.key(repository, purpose)).cloned()
    }

    /// The header to send now. Renews a token that is about to end; if that fails, the old one is used for as long as the host takes it.
    pub async fn authorization(&self, gate: &Gate, party: &Party<'_>) -> Authorization {
        let due = || lock(&gate.state).pass.due(Instant::now());
        let turn = match due() {
            Some(_) => Some(gate.turn.lock().await),
            None => None,
        };
        // Another one may have renewed it meanwhile.
        if turn.is_some()
            && let Some(challenge) = due()
        {
            let ahead = async {
                let lookup = self.look_up(party).await;
                self.pass(gate, party, &[challenge], &lookup).await
            };
            match tokio::time::timeout(AHEAD_TIMEOUT, ahead).await {
                Ok(Ok(granted)) if !granted.lesser || lock(&gate.state).lesser => lock(&gate.state).take(granted, None),
                outcome => {
                    let error = outcome
                        .ok()
                        .and_then(Result::err)
                        .flatten()
                        .map(|error| error.to_string());
                    tracing::debug!(host = %party.name, ?error, "a token is not renewed ahead of its end");
                    lock(&gate.state).pass.postpone(Instant::now() + AHEAD_AGAIN);
                }
            }
        }
        let state = lock(&gate.state);
        Authorization {
            header: state.pass.header(),
            generation: state.generation,
        }
    }

    /// Finds a better header after a request with `used` was refused. `Ok`: ask again. Does nothing if another request has renewed since,
    /// and takes the failure of one that tried meanwhile.
    ///
    /// # Errors
    /// [`RegistryError::Denied`] if there is nothing better to offer; errors of the token service.
    pub async fn renew(
        &self,
        gate: &Gate,
        party: &Party<'_>,
        used: &Authorization,
        refusal: Refusal<'_>,
    ) -> Result<(), RegistryError> {
        let failures = lock(&gate.state).failures;
        let _turn = gate.turn.lock().await;
        let stamp = self.credentials.stamp().await;
        let challenges = {
            let mut state = lock(&gate.state);
            if state.generation != used.generation {
                return Ok(());
            }
            if state.failures != failures
                && let Some(error) = state.failure.clone()
            {
                return Err(error);
            }
            // A new question may have another answer: a token for another scope, a password in the stead of a token.
            let asks_anew =
                !refusal.challenges.is_empty() && !challenge::ask_alike(&refusal.challenges, &state.challenges);
            if !refusal.challenges.is_empty() {
                state.challenges.clone_from(&refusal.challenges);
            }
            if !asks_anew {
                let now = Instant::now();
                if let Some(refused) = &state.refused
                    && refused.until > now
                    && refused.stamp == stamp
                {
                    let error = match refused.by_service {
                        true => refused.error.clone(),
                        false => self.denied(party, &refusal, refused.error.remedy()),
                    };
                    return Err(error.waiting(state.again(&refusal, now)));
                }
                let just_got = state.since.is_some_and(|since| since.elapsed() < REFUSED_FOR);
                let never_good = state.accepted != Some(state.generation);
                let nothing_new = state.got_with.as_ref() == Some(&stamp);
                if used.header.is_some() && nothing_new && (refusal.repeated || just_got && never_good) {
                    let error = self.denied(party, &refusal, &state.remedy);
                    return Err(state.refuse(error, false, stamp, &refusal));
                }
            }
            match (state.challenges.is_empty(), &state.pass) {
                (true, Pass::Basic(_)) => vec![Challenge::Basic],
                _ => state.challenges.clone(),
            }
        };
        let lookup = self.look_up(party).await;
        let granted = self.pass(gate, party, &challenges, &lookup).await;
        let mut state = lock(&gate.state);
        match granted {
            Ok(granted) if used.header.is_none() || granted.pass.header() != used.header => {
                state.take(granted, Some(stamp));
                Ok(())
            }
            // The same again would be refused again.
            Ok(granted) => {
                let error = self.denied(party, &refusal, &granted.remedy);
                Err(state.refuse(error, false, stamp, &refusal))
            }
            Err(Some(error @ RegistryError::Denied { .. })) => Err(state.refuse(error, true, stamp, &refusal)),
            Err(Some(error)) => {
                state.failures += 1;
                state.failure = Some(error.clone());
                Err(error)
            }
            Err(None) => {
                let error = self.denied(party, &refusal, &remedy(&lookup, None));
                Err(state.refuse(error, false, stamp, &refusal))
            }
        }
    }

    async fn look_up(&self, party: &Party<'_>) -> Lookup {
        if party.is_downgrade {
            return Lookup {
                problems: vec![format!("credentials are not sent to {} without TLS", party.name)],
                ..Lookup::default()
            };
        }
        self.credentials.find(&party.name).await
    }

    /// Fulfils the first challenge that can be. An error of `None`: there is none for which there are credentials.
    async fn pass(
        &self,
        gate: &Gate,
        party: &Party<'_>,
        challenges: &[Challenge],
        lookup: &Lookup,
    ) -> Result<Granted, Option<RegistryError>> {
        let mut failure = None;
        for challenge in challenges {
            match (challenge, &lookup.secret) {
                (Challenge::Bearer { realm, service, scope }, secret) => {
                    let request = TokenRequest {
                        metrics: &self.metrics,
                        party,
                        realm,
                        service: service.as_deref(),
                        scope: scope.clone().unwrap_or_else(|| gate.purpose.scope(&gate.repository)),
                        usual: lock(&gate.state).usual,
                    };
                    match request.fetch(secret.as_ref()).await {
                        Ok(token) => {
                            if token.usual.is_some() {
                                lock(&gate.state).usual = token.usual;
                            }
                            return Ok(Granted {
                                remedy: remedy(lookup, token.note.as_deref()),
                                lesser: token.note.is_some(),
                                pass: Pass::Bearer {
                                    header: token.header,
                                    renew_at: token.renew_at,
                                    challenge: challenge.clone(),
                                },
                            });
                        }
                        Err(error) => {
                            let error = error.explained(|note| remedy(lookup, Some(note)));
                            failure = failure.or(Some(error));
                        }
                    }
                }
                (Challenge::Basic, Some(Secret::Password { username, password })) => {
                    return Ok(Granted {
                        pass: Pass::Basic(basic(username, password)?),
                        remedy: remedy(lookup, None),
                        lesser: false,
                    });
                }
                _ => {}
            }
        }
        Err(failure)
    }

    fn denied(&self, party: &Party<'_>, refusal: &Refusal<'_>, remedy: &str) -> RegistryError {
        let (what, status) = (refusal.what.to_owned(), refusal.status.as_u16());
        RegistryError::denied(party.name.clone(), what, status, remedy)
    }
}

/// What to do about a refusal of what the sources gave.
fn remedy(lookup: &Lookup, note: Option<&str>) -> String {
    let used = match &lookup.secret {
        Some(_) => format!("those of {} were used", lookup.from),
        None => "there are none for it".to_owned(),
    };
    let mut text = format!("{CHECK_CREDENTIALS} ({used})");
    for more in note.into_iter().chain(lookup.problems.iter().map(String::as_str)) {
        text.push_str("; ");
        text.push_str(more);
    }
    text
}

fn basic(username: &str, password: &str) -> Result<HeaderValue, RegistryError> {
    sensitive(&format!("Basic {}", token::basic_text(username, password)))
}

fn sensitive(text: &str) -> Result<HeaderValue, RegistryError> {
    let mut value = HeaderValue::from_str(text).map_err(|_| RegistryError::Config {
        path: "credentials".to_owned(),
        problem: "a token holds characters that cannot be sent".to_owned(),
    })?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::super::hosts::proxy::Proxies;
    use super::super::hosts::{For, HostTable};
    use super::*;

    #[test]
    fn secrets_do_not_show_in_headers() {
        let header = basic("user", "s3cret").unwrap();
        assert!(!format!("{header:?}").contains("dXNlc"));
        assert!(header.is_sensitive());
    }

    /// Where a registry behind TLS sends its readers to a host without TLS, that host gets no credentials, though there are some for it.
    #[tokio::test]
    async fn credentials_do_not_go_from_tls_to_a_host_without() {
        let credential = crate::config::Credential {
            username: "alice".to_owned(),
            password: "s3cret".to_owned(),
        };
        let hosts = ["cdn.test", "127.0.0.1:5000", "secure.test", "plain.test"];
        let config = crate::config::RegistryConfig {
            plain_http: vec!["plain.test".to_owned()],
            credentials: hosts.map(|host| (host.to_owned(), credential.clone())).into(),
            docker_config: Some("/nonexistent/config.json".into()),
            ..Default::default()
        };
        let table = HostTable::new(&config, Proxies::default());
        let gates = Gates::new(Credentials::new(&config), Arc::new(Metrics::new()));
        for (registry, asked, is_told) in [
            ("secure.test", "http://cdn.test/blob", false),
            ("secure.test", "http://secure.test/blob", false),
            ("secure.test", "https://cdn.test/blob", true),
            ("secure.test", "https://secure.test/v2", true),
            // Nobody listens on the way to this machine.
            ("secure.test", "http://127.0.0.1:5000/blob", true),
            // Who has chosen to do without TLS does without, and what he got is his alone.
            ("plain.test", "http://cdn.test/blob", true),
            ("secure.test", "http://cdn.test/blob", false),
        ] {
            let endpoints = table.endpoints(registry, For::Names).unwrap();
            let url = Url::parse(asked).unwrap();
            let party = Party::new(&endpoints[0], &url);
            let gate = gates.gate(&party, "demo", Purpose::Pull);
            let refusal = Refusal {
                what: "a blob",
                status: http::StatusCode::UNAUTHORIZED,
                challenges: vec![Challenge::Basic],
                repeated: false,
                patient: false,
            };
            let renewed = gates.renew(&gate, &party, &Authorization::default(), refusal).await;
            let header = gates.authorization(&gate, &party).await.header;
            assert_eq!((renewed.is_ok(), header.is_some()), (is_told, is_told), "{asked}");
            let said = renewed.map_err(|error| error.to_string());
            assert!(said.is_ok() || said.unwrap_err().contains("without TLS"), "{asked}");
        }
    }
}
