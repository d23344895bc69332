//! What the hosts of a repository were found to do with single blobs, and answers that are kept for who needs all of one.
//!
//! A pull-through cache that does not have a blob yet (Harbor, Artifactory) often answers a range with the whole of it, and has ranges as soon
//! as it has the blob. So what is remembered is remembered for one blob at one host, and for a time: [`RANGELESS`] at first, twice as
//! long each time that it turns out to be still so. The whole blob that such a host has begun to send is not thrown away: it is *parked*,
//! unread, and whoever asks for the whole blob next goes on with it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use super::encoding::Encodings;
use crate::layer::Digest;
use crate::registry::hosts::wire::Response;
use crate::registry::lock;

/// How long a host is taken to have no ranges of a blob, when that is seen first: about as long as a pull-through cache takes to get a layer.
pub(super) const RANGELESS: Duration = Duration::from_secs(30);
/// The longest time: a proxy may be mended, or the host replaced.
const RANGELESS_MAX: Duration = Duration::from_secs(3600);
/// How long an answer is kept for somebody: who needs it has to get a place for a stream first. Its host waits meanwhile.
const PARKED: Duration = Duration::from_secs(20);
/// Parts that are not what they say, until the host is taken to have none: one may be damaged on its way, or be a bad copy.
const FALSE_PARTS: u32 = 2;
/// Blobs that something is remembered of; more than a node has layers under way.
const MAX_BLOBS: usize = 4096;

/// What is remembered of the hosts of one repository.
#[derive(Default)]
pub(super) struct Quirks {
    blobs: Mutex<HashMap<(String, Digest), Quirk>>,
    parked: Mutex<Vec<Parked>>,
}

/// What one host does with one blob.
#[derive(Default)]
struct Quirk {
    /// Until when it is taken to have no ranges, and for how long that was.
    rangeless: Option<(Instant, Duration)>,
    /// Whether the encoding that it claims is real.
    encoded: bool,
    /// Parts of it that were not what they said.
    false_parts: u32,
}

/// A whole blob that a host has begun to send.
struct Parked {
    blob: Digest,
    base: String,
    since: Instant,
    response: Response,
}

/// What an answer was taken for, to be judged when its bytes turn out wrong.
#[derive(Debug, Clone)]
pub(super) struct Served {
    /// Base address of the host.
    pub base: String,
    /// Encodings that it claimed and that were not undone, or were.
    pub claimed: Option<Encodings>,
    /// It was taken for a part.
    pub part: bool,
    /// It did not even say so.
    pub guessed: bool,
}

impl Quirks {
    /// Whether the host has lately shown that it has no ranges of the blob.
    pub(super) fn is_rangeless(&self, base: &str, blob: Digest, now: Instant) -> bool {
        let blobs = lock(&self.blobs);
        let quirk = blobs.get(&(base.to_owned(), blob));
        quirk.is_some_and(|quirk| quirk.rangeless.is_some_and(|(until, _)| until > now))
    }

    /// Whether that is so of any host and blob.
    pub(super) fn any_rangeless(&self, now: Instant) -> bool {
        let blobs = lock(&self.blobs);
        blobs
            .values()
            .any(|quirk| quirk.rangeless.is_some_and(|(until, _)| until > now))
    }

    /// The host has no ranges of the blob; whether that is news.
    pub(super) fn no_ranges(&self, base: &str, blob: Digest, now: Instant) -> bool {
        self.change(base, blob, |quirk| match quirk.rangeless {
            Some((until, _)) if until > now => false,
            before => {
                let wait = before.map_or(RANGELESS, |(_, wait)| (wait * 2).min(RANGELESS_MAX));
                quirk.rangeless = Some((now + wait, wait));
                before.is_none()
            }
        })
    }

    /// The host has sent a range of the blob; or says so, which is not believed of one whose parts were false.
    pub(super) fn has_ranges(&self, base: &str, blob: Digest) {
        if let Some(quirk) = lock(&self.blobs).get_mut(&(base.to_owned(), blob))
            && quirk.false_parts < FALSE_PARTS
        {
            quirk.rangeless = None;
        }
    }

    /// Whether the encoding that the host claims for the blob is to be undone though its length does not tell.
    pub(super) fn is_encoded(&self, base: &str, blob: Digest) -> bool {
        lock(&self.blobs)
            .get(&(base.to_owned(), blob))
            .is_some_and(|quirk| quirk.encoded)
    }

    /// The bytes of an answer were not the blob's. Whether there is another way to read the same host, which is taken from now on: where it
    /// claims an encoding, the claim may be true after all (or not); where it did not say which part it sent, it may have been another.
    pub(super) fn another_way(&self, served: &Served, blob: Digest, now: Instant) -> bool {
        let (no_parts, turned) = self.change(&served.base, blob, |quirk| {
            quirk.false_parts += u32::from(served.part);
            quirk.encoded ^= served.claimed.is_some() && !served.part;
            let no_parts =
                served.part && (served.guessed || served.claimed.is_some() || quirk.false_parts >= FALSE_PARTS);
            if no_parts {
                quirk.false_parts = FALSE_PARTS;
            }
            (no_parts, quirk.encoded && !served.part)
        });
        if no_parts {
            self.no_ranges(&served.base, blob, now);
        }
        no_parts || turned
    }

    fn change<T>(&self, base: &str, blob: Digest, change: impl FnOnce(&mut Quirk) -> T) -> T {
        let mut blobs = lock(&self.blobs);
        if blobs.len() >= MAX_BLOBS {
            // What is forgotten is found out again with one request.
            blobs.clear();
        }
        change(blobs.entry((base.to_owned(), blob)).or_default())
    }

    /// Keeps an answer that begins to bring all of the blob, for a while.
    pub(super) fn park(self: &Arc<Self>, blob: Digest, base: &str, response: Response) {
        let since = Instant::now();
        let mut parked = lock(&self.parked);
        // One is enough: the others are closed at once, before their hosts have sent much.
        if parked.iter().any(|parked| parked.blob == blob) {
            return;
        }
        parked.push(Parked {
            blob,
            base: base.to_owned(),
            since,
            response,
        });
        let me: Weak<Quirks> = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep(PARKED).await;
            if let Some(me) = me.upgrade() {
                lock(&me.parked).retain(|parked| parked.since != since);
            }
        });
    }

    /// An answer that was kept for who needs all of the blob, and the base address of its host.
    pub(super) fn take_parked(&self, blob: Digest) -> Option<(String, Response)> {
        let mut parked = lock(&self.parked);
        let at = parked.iter().position(|parked| parked.blob == blob)?;
        let parked = parked.swap_remove(at);
        Some((parked.base, parked.response))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = "http://mirror.example/v2";

    #[test]
    fn ranges_are_tried_again_after_a_time_that_grows() {
        let (quirks, blob, mut now) = (Quirks::default(), Digest::of(b"blob"), Instant::now());
        assert!(!quirks.is_rangeless(BASE, blob, now));
        assert!(quirks.no_ranges(BASE, blob, now), "it is news");
        assert!(!quirks.no_ranges(BASE, blob, now));
        let mut wait = RANGELESS;
        for _ in 0..12 {
            assert!(quirks.is_rangeless(BASE, blob, now + wait - Duration::from_millis(1)));
            now += wait;
            assert!(!quirks.is_rangeless(BASE, blob, now));
            assert!(!quirks.no_ranges(BASE, blob, now));
            wait = (wait * 2).min(RANGELESS_MAX);
        }
        assert!(quirks.any_rangeless(now) && !quirks.is_rangeless(BASE, Digest::of(b"other"), now));
        assert!(!quirks.is_rangeless("http://other.example/v2", blob, now));
        quirks.has_ranges(BASE, blob);
        assert!(!quirks.any_rangeless(now));
        assert!(quirks.no_ranges(BASE, blob, now), "it begins anew");
        assert!(!quirks.is_rangeless(BASE, blob, now + RANGELESS));
    }

    #[test]
    fn what_was_only_claimed_or_guessed_has_another_way() {
        let (quirks, blob, now) = (Quirks::default(), Digest::of(b"blob"), Instant::now());
        let mut headers = http::HeaderMap::new();
        headers.insert(http::header::CONTENT_ENCODING, "gzip".parse().unwrap());
        let mut served = Served {
            base: BASE.to_owned(),
            claimed: None,
            part: false,
            guessed: false,
        };
        assert!(!quirks.another_way(&served, blob, now));
        served.claimed = Encodings::of(&headers);
        assert!(quirks.another_way(&served, blob, now));
        assert!(quirks.is_encoded(BASE, blob) && !quirks.any_rangeless(now));
        assert!(!quirks.another_way(&served, blob, now), "both ways have been tried");
        assert!(!quirks.is_encoded(BASE, blob));
        // A part of what may be encoded cannot be decoded.
        served.part = true;
        assert!(quirks.another_way(&served, blob, now) && quirks.any_rangeless(now));
    }

    #[test]
    fn a_host_whose_parts_are_false_has_none() {
        let (quirks, blob, now) = (Quirks::default(), Digest::of(b"blob"), Instant::now());
        let mut served = Served {
            base: BASE.to_owned(),
            claimed: None,
            part: true,
            guessed: false,
        };
        assert!(!quirks.another_way(&served, blob, now), "one may be damaged on its way");
        assert!(quirks.another_way(&served, blob, now));
        assert!(quirks.is_rangeless(BASE, blob, now));
        // Another answer that was under way meanwhile is no better.
        quirks.has_ranges(BASE, blob);
        assert!(quirks.is_rangeless(BASE, blob, now));
        // What did not say which part it is is believed less.
        let other = Digest::of(b"other");
        served.guessed = true;
        assert!(quirks.another_way(&served, other, now) && quirks.is_rangeless(BASE, other, now));
        quirks.has_ranges(BASE, other);
        assert!(quirks.is_rangeless(BASE, other, now));
    }
}
