//! Redirect targets: registries send readers of blobs to a storage service, with an address that is good for some minutes. Asking
//! there at once saves a round trip per range.

use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use lru::LruCache;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use time::macros::format_description;
use url::Url;

use super::lock;
use crate::layer::Digest;

/// Targets remembered per repository.
const MAX_LOCATIONS: NonZeroUsize = NonZeroUsize::new(1024).unwrap();
/// How long a target is used that does not say how long it is good.
const UNSTATED: Duration = Duration::from_secs(60);
/// Longest use of any target.
const MAX_USE: Duration = Duration::from_secs(3600);
/// A target is given up this long before it ends: a request takes time, and clocks differ.
const MARGIN: Duration = Duration::from_secs(10);

/// Remembered targets of the blobs of one repository, by endpoint.
pub struct Locations(Mutex<LruCache<(String, Digest), Location>>);

struct Location {
    url: Url,
    until: Instant,
}

impl Default for Locations {
    fn default() -> Self {
        Locations(Mutex::new(LruCache::new(MAX_LOCATIONS)))
    }
}

impl Locations {
    /// Where `endpoint` sent the last reader of `blob`, if that is still good.
    pub fn get(&self, endpoint: &str, blob: Digest) -> Option<Url> {
        let key = (endpoint.to_owned(), blob);
        let mut locations = lock(&self.0);
        let location = locations.get(&key)?;
        if location.until > Instant::now() {
            return Some(location.url.clone());
        }
        locations.pop(&key);
        None
    }

    /// Remembers that `endpoint` sends readers of `blob` to `url`, which works.
    pub fn put(&self, endpoint: &str, blob: Digest, url: Url) {
        let good_for = match parse_expiry(&url, OffsetDateTime::now_utc()) {
            Some(left) => left.saturating_sub(MARGIN).min(MAX_USE),
            None => UNSTATED,
        };
        if good_for.is_zero() {
            return;
        }
        let until = Instant::now() + good_for;
        lock(&self.0).put((endpoint.to_owned(), blob), Location { url, until });
    }

    /// Forgets the target of `blob`: it failed.
    pub fn forget(&self, endpoint: &str, blob: Digest) {
        lock(&self.0).pop(&(endpoint.to_owned(), blob));
    }

    /// Forgets all targets of `blob`: what came from there was bad.
    pub fn forget_all(&self, blob: Digest) {
        let mut locations = lock(&self.0);
        let keys: Vec<_> = locations
            .iter()
            .map(|(key, _)| key)
            .filter(|key| key.1 == blob)
            .cloned()
            .collect();
        for key in keys {
            locations.pop(&key);
        }
    }
}

/// How long a signed address is still good, read from its query: S3 (`X-Amz-Date`, `X-Amz-Expires`), Google Cloud Storage
/// (`X-Goog-...`), CloudFront and older S3 (`Expires`, in seconds since 1970), Azure (`se`, a date). Zero if it has ended, `None`
/// if it does not say.
pub fn parse_expiry(url: &Url, now: OffsetDateTime) -> Option<Duration> {
    let get = |name: &str| {
        url.query_pairs()
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.into_owned())
    };
    let until = |end: OffsetDateTime| Duration::try_from(end - now).unwrap_or_default();
    for vendor in ["X-Amz", "X-Goog"] {
        if let Some(seconds) = get(&format!("{vendor}-Expires")) {
            let lifetime = Duration::from_secs(seconds.parse().ok()?);
            let format = format_description!("[year][month][day]T[hour][minute][second]Z");
            let signed = get(&format!("{vendor}-Date"))
                .and_then(|date| time::PrimitiveDateTime::parse(&date, format).ok())
                .map(time::PrimitiveDateTime::assume_utc);
            return Some(match signed {
                Some(signed) => signed
                    .checked_add(time::Duration::try_from(lifetime).ok()?)
                    .map(until)
                    .unwrap_or(lifetime)
                    .min(lifetime),
                None => lifetime,
            });
        }
    }
    if let Some(seconds) = get("Expires") {
        return OffsetDateTime::from_unix_timestamp(seconds.parse().ok()?)
            .ok()
            .map(until);
    }
    OffsetDateTime::parse(&get("se")?, &Rfc3339).ok().map(until)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use time::macros::datetime;

    use super::*;

    const NOW: OffsetDateTime = datetime!(2026-01-01 00:00 UTC);

    fn expiry(query: &str) -> Option<Duration> {
        parse_expiry(&Url::parse(&format!("https://cdn.example/x?{query}")).unwrap(), NOW)
    }

    #[test]
    fn each_vendors_form() {
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        assert_eq!(
            expiry("X-Amz-Date=20251231T235900Z&X-Amz-Expires=1200&X-Amz-Signature=x"),
            seconds(1140)
        );
        assert_eq!(expiry("X-Amz-Expires=1200"), seconds(1200));
        // Signed in the future: no longer than its lifetime.
        assert_eq!(expiry("X-Amz-Date=20260101T010000Z&X-Amz-Expires=1200"), seconds(1200));
        assert_eq!(expiry("X-Goog-Date=20260101T000000Z&X-Goog-Expires=60"), seconds(60));
        assert_eq!(expiry("Expires=1767225700&Signature=x"), seconds(100));
        assert_eq!(expiry("Expires=1"), seconds(0));
        assert_eq!(expiry("sv=1&se=2026-01-01T00%3A05%3A00Z&sig=x"), seconds(300));
        for query in ["", "a=b", "Expires=soon", "se=x", "X-Amz-Expires=-1"] {
            assert_eq!(expiry(query), None, "{query}");
        }
    }

    #[test]
    fn targets_are_kept_per_endpoint_until_they_end_or_fail() {
        let locations = Locations::default();
        let blob = Digest::of(b"blob");
        let good = Url::parse("https://cdn.example/x").unwrap();
        locations.put("a", blob, good.clone());
        assert_eq!(locations.get("a", blob), Some(good));
        assert_eq!(locations.get("b", blob), None);
        locations.forget("a", blob);
        assert_eq!(locations.get("a", blob), None);
        let ended = Url::parse("https://cdn.example/x?Expires=1").unwrap();
        locations.put("a", blob, ended);
        assert_eq!(locations.get("a", blob), None);
    }

    proptest! {
        #[test]
        fn any_query_is_parsed_or_ignored(
            key in "(X-Amz-Expires|X-Amz-Date|X-Goog-Expires|Expires|se)",
            value in "([0-9]{0,25}|[0-9TZ:-]{0,25}|\\PC{0,10})",
            other in "X-Amz-Date=[0-9]{8}T[0-9]{6}Z",
        ) {
            let mut url = Url::parse("https://cdn.example/x").unwrap();
            url.set_query(Some(&other));
            url.query_pairs_mut().append_pair(&key, &value);
            let _ = parse_expiry(&url, NOW);
        }
    }
}
