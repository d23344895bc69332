//! What is remembered of one host and repository: the header that lets requests in, whether it ever did, and renewals that brought nothing.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use http::{HeaderValue, StatusCode};

use super::Purpose;
use super::challenge::Challenge;
use super::credentials::Stamp;
use super::token::Usual;
use crate::registry::attempts::ACCESS_PATIENCE;
use crate::registry::{RegistryError, lock};

/// How long a renewal that brought nothing is not tried again: short, since a reader may be waiting for credentials that are renewed now.
pub(super) const REFUSED_FOR: Duration = Duration::from_secs(5);

/// One host and repository.
pub struct Gate {
    pub(super) purpose: Purpose,
    pub(super) repository: String,
    /// Held by the one who renews.
    pub(super) turn: tokio::sync::Mutex<()>,
    pub(super) state: Mutex<State>,
}

/// What may change. Locked for moments only.
#[derive(Default)]
pub(super) struct State {
    /// Counts renewals, so that only the first of several requests that met the same refusal renews.
    pub(super) generation: u64,
    pub(super) pass: Pass,
    /// How `config.json` looked when the pass was got after a refusal.
    pub(super) got_with: Option<Stamp>,
    /// When the pass was got.
    pub(super) since: Option<Instant>,
    /// The generation that was accepted last.
    pub(super) accepted: Option<u64>,
    /// Whether readers of blobs ever got through.
    pub(super) served: bool,
    /// What the host asked for last.
    pub(super) challenges: Vec<Challenge>,
    /// In which way the token service takes secrets.
    pub(super) usual: Option<Usual>,
    /// What to tell people if the pass is refused.
    pub(super) remedy: String,
    /// The pass is less than what the credentials should have given.
    pub(super) lesser: bool,
    /// The last renewal that brought nothing, as long as nothing has been accepted since.
    pub(super) refused: Option<Refused>,
    pub(super) refused_since: Option<Instant>,
    /// Counts renewals that failed, and how the last one did: for those who waited for it.
    pub(super) failures: u64,
    pub(super) failure: Option<RegistryError>,
}

/// What requests are let in with.
#[derive(Default)]
pub(super) enum Pass {
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

/// A renewal that brought nothing.
pub(super) struct Refused {
    pub(super) until: Instant,
    /// How `config.json` looked then.
    pub(super) stamp: Stamp,
    /// The token service refused, not the host itself.
    pub(super) by_service: bool,
    pub(super) error: RegistryError,
}

/// A header to send, and which renewal it came from.
#[derive(Default)]
pub struct Authorization {
    /// Value of `Authorization`; `None` to ask anonymously.
    pub header: Option<HeaderValue>,
    pub(super) generation: u64,
}

/// A request that was refused.
pub struct Refusal<'a> {
    /// What was asked for.
    pub what: &'a str,
    /// 400, 401 or 403.
    pub status: StatusCode,
    /// What the answer asks for.
    pub challenges: Vec<Challenge>,
    /// The same request was refused before, and its authentication renewed.
    pub repeated: bool,
    /// A reader of a blob waits: rather later than not at all.
    pub patient: bool,
}

/// A pass that was got.
pub(super) struct Granted {
    pub(super) pass: Pass,
    /// What to tell people if it is refused.
    pub(super) remedy: String,
    /// It is less than what the credentials should have given.
    pub(super) lesser: bool,
}

impl Gate {
    /// The host took `used`; for a reader of a blob if `served`.
    pub fn accepted(&self, used: &Authorization, served: bool) {
        let mut state = lock(&self.state);
        if state.generation == used.generation {
            state.accepted = Some(used.generation);
            state.refused_since = None;
        }
        state.served |= served;
    }
}

impl State {
    /// From now on requests are let in with this, got when `config.json` looked so.
    pub(super) fn take(&mut self, granted: Granted, got_with: Option<Stamp>) {
        self.generation += 1;
        self.got_with = got_with;
        self.pass = granted.pass;
        self.since = Some(Instant::now());
        self.remedy = granted.remedy;
        self.lesser = granted.lesser;
        self.refused = None;
        self.failure = None;
    }

    /// Remembers that a renewal brought nothing. Gives `error` as it is to be returned.
    pub(super) fn refuse(
        &mut self,
        error: RegistryError,
        by_service: bool,
        stamp: Stamp,
        refusal: &Refusal<'_>,
    ) -> RegistryError {
        let now = Instant::now();
        self.refused_since.get_or_insert(now);
        self.refused = Some(Refused {
            until: now + REFUSED_FOR,
            stamp,
            by_service,
            error: error.clone(),
        });
        let error = error.waiting(self.again(refusal, now));
        self.failures += 1;
        self.failure = Some(error.clone());
        error
    }

    /// After how long it makes sense to ask again, if at all.
    pub(super) fn again(&self, refusal: &Refusal<'_>, now: Instant) -> Option<Duration> {
        let lately = |since: Instant| now.saturating_duration_since(since) < ACCESS_PATIENCE;
        let waits = refusal.patient && self.served && self.refused_since.is_some_and(lately);
        let left = self
            .refused
            .as_ref()
            .map(|refused| refused.until.saturating_duration_since(now));
        left.filter(|_| waits)
    }
}

impl Pass {
    pub(super) fn header(&self) -> Option<HeaderValue> {
        match self {
            Pass::Anonymous => None,
            Pass::Basic(header) | Pass::Bearer { header, .. } => Some(header.clone()),
        }
    }

    /// The challenge to answer anew, if that is due.
    pub(super) fn due(&self, now: Instant) -> Option<Challenge> {
        match self {
            Pass::Bearer {
                renew_at, challenge, ..
            } if *renew_at <= now => Some(challenge.clone()),
            _ => None,
        }
    }

    pub(super) fn postpone(&mut self, until: Instant) {
        if let Pass::Bearer { renew_at, .. } = self {
            *renew_at = until;
        }
    }
}
