//! Which host is asked next, after how long, and when to give up.
//!
//! One [`Attempts`] accompanies one operation: a manifest, or one range of a blob with all its resumptions. Hosts are asked in
//! order; a host that fails in a way that may pass goes behind the others for a time that doubles, a host that gives a definite
//! answer (404, 401, ...) is not asked again. One that refuses connections is asked once more and no further, unless something has come of the operation
//! already: that nobody listens is known at once, and whoever can wait (a reader, in `crate::fetch`) asks again by himself. It knows no sockets and no clock: the caller tells it the time.

use std::time::{Duration, Instant, SystemTime};

use backon::BackoffBuilder;
use backon::{ExponentialBackoff, ExponentialBuilder};
use http::HeaderMap;

use super::RegistryError;

/// First wait before the same host is asked again.
const FIRST_DELAY: Duration = Duration::from_millis(100);
/// Longest wait that is chosen here.
const MAX_DELAY: Duration = Duration::from_secs(5);
/// Longest wait that a host can ask for: a reader hangs meanwhile.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(30);
/// Times that a host refuses connections before it is left alone: once may be between the end of a server and its next start.
const REFUSALS: u32 = 2;
/// Bytes that must have arrived since the last failure for the attempts to start anew: an endless download over a bad line may go
/// on as long as it gets somewhere.
const PROGRESS: u64 = 256 << 10;
/// How long a refusal of what was granted before is waited out, without using up attempts: credentials that have ended are renewed by
/// whoever does that, and a reader hangs meanwhile.
pub(super) const ACCESS_PATIENCE: Duration = Duration::from_secs(60);

/// A failure of one attempt.
#[derive(Debug)]
pub struct Failure {
    /// What happened.
    pub error: RegistryError,
    /// Word for the metric `registry_retries_total`.
    pub cause: &'static str,
    /// The host may succeed if asked again.
    pub passing: bool,
    /// Nobody listens there.
    pub refused: bool,
}

impl Failure {
    /// A failure that `error` classifies itself.
    pub fn new(error: RegistryError, cause: &'static str) -> Self {
        Failure {
            passing: error.retry_helps(),
            refused: false,
            error,
            cause,
        }
    }

    /// The failure of a connection that nobody took.
    pub fn refused(error: RegistryError) -> Self {
        Failure {
            refused: true,
            ..Failure::new(error, "refused")
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match &self.error {
            RegistryError::Busy { retry_after, .. } => *retry_after,
            error => error.access_again(),
        }
    }
}

/// The attempts of one operation.
pub struct Attempts {
    hosts: Vec<HostState>,
    left: u32,
    limit: u32,
    progress: u64,
    /// Whether anything arrived at all.
    has_begun: bool,
    /// Since when access is refused that may be granted again.
    denied_since: Option<Instant>,
}

struct HostState {
    /// Place in the configured order; the greatest is the registry itself.
    place: usize,
    /// `None` once the host has answered for good.
    backoff: Option<ExponentialBackoff>,
    not_before: Option<Instant>,
    /// How often it refused connections, one after the other.
    refusals: u32,
    error: Option<RegistryError>,
}

impl Attempts {
    /// `limit` attempts over hosts; `order` gives their places in the order in which they are to be asked.
    pub fn new(order: Vec<usize>, limit: u32) -> Self {
        let hosts = order.into_iter().map(|place| HostState {
            place,
            backoff: Some(backoff()),
            not_before: None,
            refusals: 0,
            error: None,
        });
        Attempts {
            hosts: hosts.collect(),
            left: limit,
            limit,
            progress: 0,
            has_begun: false,
            denied_since: None,
        }
    }

    /// The place of the host to ask next, and how long to wait before; `None`: give up.
    pub fn next(&self, now: Instant) -> Option<(usize, Duration)> {
        self.next_beside(&[], now)
    }

    /// The same while the hosts at `busy` are being asked: another one than these.
    pub fn next_beside(&self, busy: &[usize], now: Instant) -> Option<(usize, Duration)> {
        if self.left == 0 {
            return None;
        }
        // `min_by_key` takes the first of equals: the order decides among hosts that may be asked at once.
        self.hosts
            .iter()
            .filter(|host| host.backoff.is_some() && !busy.contains(&host.place))
            .filter(|host| self.has_begun || host.refusals < REFUSALS)
            .map(|host| {
                let wait = host.not_before.map(|at| at.saturating_duration_since(now));
                (host.place, wait.unwrap_or_default())
            })
            .min_by_key(|(_, wait)| *wait)
    }

    /// Whether another host than that at `place` has not failed yet.
    pub fn has_fresh_beside(&self, place: usize) -> bool {
        let mut others = self.hosts.iter().filter(|host| host.place != place);
        others.any(|host| host.backoff.is_some() && host.error.is_none())
    }

    /// The host at `place` failed.
    pub fn failed(&mut self, place: usize, failure: Failure, now: Instant) {
        if failure.passing {
            if std::mem::take(&mut self.progress) >= PROGRESS {
                self.left = self.limit;
                for backoff_of_host in self.hosts.iter_mut().filter_map(|host| host.backoff.as_mut()) {
                    *backoff_of_host = backoff();
                }
            }
            if !self.waits_for_access(&failure.error, now) {
                self.left = self.left.saturating_sub(1);
            }
        }
        let Some(host) = self.hosts.iter_mut().find(|host| host.place == place) else {
            return;
        };
        host.refusals = match failure.refused {
            true => host.refusals.saturating_add(1),
            false => 0,
        };
        if failure.passing {
            let chosen = host.backoff.as_mut().and_then(Iterator::next).unwrap_or(MAX_DELAY);
            let asked = failure.retry_after().unwrap_or_default().min(MAX_RETRY_AFTER);
            host.not_before = Some(now + chosen.max(asked));
        } else {
            host.backoff = None;
        }
        host.error = Some(failure.error);
    }

    /// Whether it is access that is waited for, and not for too long yet.
    fn waits_for_access(&mut self, error: &RegistryError, now: Instant) -> bool {
        if error.access_again().is_none() {
            return false;
        }
        let since = *self.denied_since.get_or_insert(now);
        now.saturating_duration_since(since) < ACCESS_PATIENCE
    }

    /// `bytes` arrived.
    pub fn progressed(&mut self, bytes: u64) {
        self.progress = self.progress.saturating_add(bytes);
        self.has_begun |= bytes > 0;
    }

    /// The error to report: that of the host which comes last in the configured order, the registry itself; but with `patient` rather one
    /// that may pass, as whoever waits for what a mirror has wants to wait for the mirror.
    pub fn into_error(self, patient: bool) -> Option<RegistryError> {
        let errors = self
            .hosts
            .into_iter()
            .filter_map(|host| Some((host.place, host.error?)));
        let last = errors.max_by_key(|(place, error)| (patient && error.retry_helps(), *place));
        last.map(|(_, error)| error)
    }
}

fn backoff() -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(FIRST_DELAY)
        .with_max_delay(MAX_DELAY)
        .with_jitter()
        .without_max_times()
        .build()
}

/// The `Retry-After` of an answer.
pub fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(http::header::RETRY_AFTER)?.to_str().ok()?;
    parse_retry_after(text, SystemTime::now())
}

/// Parses a `Retry-After`: seconds, or a date (of which `now` is subtracted).
pub fn parse_retry_after(text: &str, now: SystemTime) -> Option<Duration> {
    let text = text.trim();
    if !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit()) {
        return Some(Duration::from_secs(text.parse().unwrap_or(u64::MAX)));
    }
    let at = httpdate::parse_http_date(text).ok()?;
    Some(at.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn passing() -> Failure {
        Failure::new(
            RegistryError::Status {
                host: "h".to_owned(),
                what: "w".to_owned(),
                status: 500,
            },
            "status",
        )
    }

    fn definite(host: &str) -> Failure {
        Failure::new(
            RegistryError::NotFound {
                host: host.to_owned(),
                what: "w".to_owned(),
            },
            "status",
        )
    }

    #[test]
    fn hosts_take_turns_and_the_attempts_end() {
        let now = Instant::now();
        let mut attempts = Attempts::new(vec![0, 1], 4);
        assert_eq!(attempts.next(now), Some((0, Duration::ZERO)));
        attempts.failed(0, passing(), now);
        assert_eq!(attempts.next(now), Some((1, Duration::ZERO)));
        attempts.failed(1, passing(), now);
        let (_, wait) = attempts.next(now).unwrap();
        assert!(wait >= FIRST_DELAY, "{wait:?}");
        let later = now + Duration::from_secs(10);
        assert_eq!(attempts.next(later), Some((0, Duration::ZERO)));
        attempts.failed(0, passing(), later);
        attempts.failed(1, passing(), later);
        assert_eq!(attempts.next(later + Duration::from_secs(10)), None);
    }

    #[test]
    fn who_can_wait_is_told_of_the_host_that_may_come_back() {
        let now = Instant::now();
        let ended = || {
            let mut attempts = Attempts::new(vec![0, 1], 9);
            attempts.failed(0, passing(), now);
            attempts.failed(1, definite("origin"), now);
            attempts
        };
        assert!(matches!(ended().into_error(true), Some(RegistryError::Status { .. })));
        assert!(matches!(
            ended().into_error(false),
            Some(RegistryError::NotFound { .. })
        ));
    }

    #[test]
    fn who_refuses_connections_is_asked_twice_unless_something_has_come() {
        let now = Instant::now();
        let refused = || {
            Failure::refused(RegistryError::Unreachable {
                host: "h".to_owned(),
                what: "connection refused".to_owned(),
            })
        };
        let asked = |attempts: &mut Attempts| {
            let (mut times, mut waits) = (0, Duration::ZERO);
            let mut now = now;
            while let Some((place, wait)) = attempts.next(now) {
                now += wait;
                waits += wait;
                attempts.failed(place, refused(), now);
                times += 1;
            }
            (times, waits)
        };
        let (times, waits) = asked(&mut Attempts::new(vec![0, 1], 9));
        assert_eq!(times, 2 * REFUSALS);
        assert!(waits <= 2 * FIRST_DELAY, "{waits:?}");
        // In the middle of a body an outage is waited out.
        let mut begun = Attempts::new(vec![0], 9);
        begun.progressed(1);
        assert_eq!(asked(&mut begun).0, 9);
        // Another host that fails in another way has all its attempts.
        let mut attempts = Attempts::new(vec![0, 1], 9);
        for _ in 0..REFUSALS {
            attempts.failed(0, refused(), now);
            attempts.failed(1, passing(), now);
        }
        assert!(attempts.next(now).is_some_and(|(place, _)| place == 1));
        // One that listens again is not taken for one that does not.
        let mut attempts = Attempts::new(vec![0], 9);
        for _ in 0..3 {
            attempts.failed(0, refused(), now);
            attempts.failed(0, passing(), now);
        }
        assert!(attempts.next(now).is_some());
    }

    #[test]
    fn a_definite_answer_ends_a_host_and_the_last_host_gives_the_error() {
        let now = Instant::now();
        let mut attempts = Attempts::new(vec![1, 0], 9);
        attempts.failed(1, definite("origin"), now);
        assert_eq!(attempts.next(now).unwrap().0, 0);
        attempts.failed(0, definite("mirror"), now);
        assert_eq!(attempts.next(now), None);
        assert!(matches!(attempts.into_error(false), Some(RegistryError::NotFound { host, .. }) if host == "origin"));
        assert!(Attempts::new(vec![], 3).next(now).is_none());
    }

    #[test]
    fn a_host_that_is_being_asked_is_not_asked_beside_itself() {
        let now = Instant::now();
        let mut attempts = Attempts::new(vec![0, 1], 9);
        assert_eq!(attempts.next_beside(&[0], now), Some((1, Duration::ZERO)));
        assert_eq!(attempts.next_beside(&[0, 1], now), None);
        assert!(attempts.has_fresh_beside(0) && attempts.has_fresh_beside(1));
        attempts.failed(1, passing(), now);
        assert!(
            attempts
                .next_beside(&[0], now)
                .is_some_and(|(place, wait)| place == 1 && wait >= FIRST_DELAY)
        );
        assert!(!attempts.has_fresh_beside(0) && attempts.has_fresh_beside(1));
    }

    #[test]
    fn progress_gives_attempts_back() {
        let now = Instant::now();
        let mut attempts = Attempts::new(vec![0], 2);
        attempts.failed(0, passing(), now);
        attempts.progressed(PROGRESS);
        attempts.failed(0, passing(), now);
        // The wait begins anew too: at most the first delay and as much jitter.
        assert!(attempts.next(now).is_some_and(|(_, wait)| wait <= FIRST_DELAY * 2));
        attempts.progressed(PROGRESS - 1);
        attempts.failed(0, passing(), now);
        assert!(attempts.next(now).is_none());
    }

    #[test]
    fn a_host_is_left_alone_as_long_as_it_asks_but_not_for_ever() {
        let now = Instant::now();
        for (asked, least) in [(7, 7), (86_400, 30)] {
            let mut attempts = Attempts::new(vec![0], 9);
            let error = RegistryError::Busy {
                host: "h".to_owned(),
                what: "w".to_owned(),
                status: 429,
                retry_after: Some(Duration::from_secs(asked)),
            };
            attempts.failed(0, Failure::new(error, "status"), now);
            assert_eq!(attempts.next(now), Some((0, Duration::from_secs(least))));
        }
    }

    #[test]
    fn access_that_may_be_granted_again_is_waited_for_and_not_for_ever() {
        let again = Duration::from_secs(5);
        let refused = || {
            let error = RegistryError::denied("h".to_owned(), "w".to_owned(), 403, "").waiting(Some(again));
            Failure::new(error, "auth")
        };
        let mut now = Instant::now();
        let begun = now;
        let mut attempts = Attempts::new(vec![0], 2);
        while let Some((_, wait)) = attempts.next(now) {
            now += wait;
            attempts.failed(0, refused(), now);
            assert!(attempts.next(now).is_none_or(|(_, wait)| wait >= again));
        }
        assert!(now - begun >= ACCESS_PATIENCE && now - begun < ACCESS_PATIENCE * 2);
        // Another host is asked meanwhile.
        let mut attempts = Attempts::new(vec![0, 1], 2);
        attempts.failed(0, refused(), now);
        assert_eq!(attempts.next(now), Some((1, Duration::ZERO)));
    }

    #[test]
    fn retry_after_forms() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        let parse = |text| parse_retry_after(text, now);
        assert_eq!(parse("120"), Some(Duration::from_secs(120)));
        assert_eq!(parse("Sun, 06 Nov 1994 08:49:40 GMT"), Some(Duration::from_secs(3)));
        assert_eq!(parse("Sun, 06 Nov 1994 08:49:30 GMT"), Some(Duration::ZERO));
        assert_eq!(parse("99999999999999999999999"), Some(Duration::from_secs(u64::MAX)));
        for text in ["", "-1", "soon", "1.5"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "\\PC{0,40}") {
            let _ = parse_retry_after(&text, SystemTime::now());
        }

        /// However hosts fail, an operation ends, and never returns to a host that answered for good.
        #[test]
        fn operations_end(script in proptest::collection::vec((any::<bool>(), 0..4096u64), 0..200)) {
            let mut now = Instant::now();
            let mut attempts = Attempts::new(vec![0, 1, 2], 5);
            let mut gone = Vec::new();
            let mut passed = 0;
            for (pass, bytes) in script {
                let Some((place, wait)) = attempts.next(now) else { break };
                prop_assert!(!gone.contains(&place));
                now += wait;
                attempts.progressed(bytes);
                if pass {
                    passed += 1;
                    attempts.failed(place, passing(), now);
                } else {
                    gone.push(place);
                    attempts.failed(place, definite("h"), now);
                }
            }
            prop_assert!(passed <= 5 || bytes_allow(passed));
            prop_assert!(gone.len() <= 3);
        }
    }

    /// 200 steps of under 4096 bytes can give the attempts back at most three times.
    fn bytes_allow(passed: u32) -> bool {
        passed <= 5 * 4
    }
}
