//! Places that deliver, fail, lie, hang, break off and stall.

use bytes::Bytes;
use futures::TryStreamExt;
use tokio::time::Instant;

use super::*;

/// What a place does when it is asked.
#[derive(Clone)]
enum Does {
    Deliver(&'static [u8]),
    Fail(RegistryError),
    Hang,
    /// Delivers one byte, then ends with an error, or never.
    Break,
    Stall,
}

struct Place {
    does: Does,
    origin: Origin,
    asked: AtomicUsize,
}

impl Blob for Place {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let part = |bytes: &'static [u8]| Ok(Bytes::from_static(&bytes[range.start as usize..range.end as usize]));
        let first = Ok(Bytes::from_static(b"abcdef").slice(range.start as usize..range.start as usize + 1));
        let answer = match &self.does {
            Does::Deliver(bytes) => Ok(stream::iter([part(bytes)]).boxed()),
            Does::Fail(error) => Err(error.clone()),
            Does::Hang => return std::future::pending().boxed(),
            Does::Break => Ok(stream::iter([first, Err(unreachable_host())]).boxed()),
            Does::Stall => Ok(stream::iter([first]).chain(stream::pending()).boxed()),
        };
        async move { answer }.boxed()
    }
    fn size(&self) -> u64 {
        6
    }
    fn describe(&self) -> String {
        format!("{}/{}", self.origin.host, self.origin.repository)
    }
    /// As often as it was asked.
    fn refusals(&self, host: &str) -> Option<u64> {
        (*self.origin.host == *host).then(|| self.asked.load(Ordering::Relaxed) as u64)
    }
    fn origin(&self) -> Origin {
        self.origin.clone()
    }
}

fn unreachable_host() -> RegistryError {
    RegistryError::Unreachable {
        host: "a".into(),
        what: "refused".into(),
    }
}

fn failing() -> RegistryError {
    RegistryError::Status {
        host: "b".into(),
        what: "blob".into(),
        status: 503,
    }
}

fn missing() -> RegistryError {
    RegistryError::NotFound {
        host: "b".into(),
        what: "blob".into(),
    }
}

struct Rig {
    places: Vec<Arc<Place>>,
    blob: Arc<dyn Blob>,
    standings: Arc<Standings>,
    layer: Digest,
}

impl Rig {
    fn new(places: &[(&str, Does)]) -> Self {
        let places: Vec<_> = places
            .iter()
            .enumerate()
            .map(|(at, (host, does))| {
                Arc::new(Place {
                    does: does.clone(),
                    origin: Origin::new(host, &format!("r{at}")),
                    asked: AtomicUsize::new(0),
                })
            })
            .collect();
        let standings = Arc::<Standings>::default();
        let layer = Digest::of(b"layer");
        let blobs = places.iter().map(|place| Arc::clone(place) as Arc<dyn Blob>).collect();
        Rig {
            blob: Failover::over(layer, blobs, Arc::clone(&standings)).unwrap(),
            places,
            standings,
            layer,
        }
    }

    async fn read(&self, range: Range<u64>) -> Result<Vec<u8>, RegistryError> {
        let parts: Vec<Bytes> = self.blob.read(range).await?.try_collect().await?;
        Ok(parts.concat())
    }

    fn asked(&self) -> Vec<usize> {
        self.places
            .iter()
            .map(|place| place.asked.swap(0, Ordering::Relaxed))
            .collect()
    }
}

const GOOD: Does = Does::Deliver(b"abcdef");

#[tokio::test(start_paused = true)]
async fn the_place_that_works_is_found_and_remembered() {
    let rig = Rig::new(&[
        ("a", Does::Fail(unreachable_host())),
        ("b", Does::Fail(missing())),
        ("c", GOOD),
    ]);
    assert_eq!(rig.read(1..3).await.unwrap(), b"bc");
    rig.blob.verified();
    assert_eq!((rig.asked(), rig.blob.describe()), (vec![1, 1, 1], "c/r2".to_owned()));
    assert_eq!(rig.read(0..6).await.unwrap(), b"abcdef");
    assert_eq!(
        (rig.asked(), rig.blob.origin()),
        (vec![0, 0, 1], Origin::new("c", "r2"))
    );
}

/// Whoever was asked first may not be any more.
#[tokio::test(start_paused = true)]
async fn what_a_host_refuses_is_told_of_it_alone() {
    let rig = Rig::new(&[("a", Does::Fail(failing())), ("b", GOOD)]);
    for _ in 0..2 {
        rig.read(1..3).await.unwrap();
        rig.blob.verified();
    }
    assert_eq!(&*rig.blob.origin().host, "b");
    let refusals = ["a", "b", "elsewhere"].map(|host| rig.blob.refusals(host));
    assert_eq!(refusals, [Some(1), Some(2), None]);
}

#[tokio::test]
async fn the_more_telling_failure_is_reported() {
    // One that may pass: a reader wants to wait for it.
    for errors in [[unreachable_host(), missing()], [missing(), unreachable_host()]] {
        let rig = Rig::new(&errors.map(|error| ("a", Does::Fail(error))));
        let error = rig.read(0..1).await.unwrap_err();
        assert!(error.retry_helps(), "{error}");
    }
    // Of such, that of a host which answered.
    for errors in [[unreachable_host(), failing()], [failing(), unreachable_host()]] {
        let rig = Rig::new(&errors.map(|error| ("a", Does::Fail(error))));
        let error = rig.read(0..1).await.unwrap_err();
        assert!(matches!(error, RegistryError::Status { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_place_that_sent_damaged_bytes_is_asked_last() {
    let rig = Rig::new(&[("a", Does::Deliver(b"xxxxxx")), ("a", GOOD)]);
    assert_eq!(rig.read(0..3).await.unwrap(), b"xxx");
    rig.blob.verified();
    rig.blob.distrust();
    assert_eq!(rig.read(0..3).await.unwrap(), b"abc");
}

#[tokio::test(start_paused = true)]
async fn a_silent_host_costs_one_wait_and_is_asked_again_later() {
    let rig = Rig::new(&[("a", Does::Hang), ("a", GOOD), ("b", GOOD)]);
    let began = Instant::now();
    assert_eq!(rig.read(0..6).await.unwrap(), b"abcdef");
    // The other repository of the silent host was not asked meanwhile.
    assert_eq!((rig.asked(), began.elapsed()), (vec![1, 0, 1], SILENT));
    rig.blob.verified();
    let began = Instant::now();
    for _ in 0..10 {
        rig.read(0..6).await.unwrap();
    }
    assert_eq!((rig.asked(), began.elapsed()), (vec![0, 0, 10], Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn a_body_that_breaks_or_stalls_goes_on_elsewhere() {
    for does in [Does::Break, Does::Stall] {
        let rig = Rig::new(&[("a", does), ("b", GOOD)]);
        assert_eq!(rig.read(1..6).await.unwrap(), b"bcdef");
        assert_eq!(rig.asked(), [1, 1]);
    }
    // Where nobody else has it, the error is that of the place that had it.
    let rig = Rig::new(&[("a", Does::Break), ("b", Does::Fail(missing()))]);
    assert!(matches!(rig.read(0..6).await, Err(RegistryError::Unreachable { .. })));
}

fn source(name: &str) -> LayerSource {
    LayerSource {
        host: "h".to_owned(),
        repository: name.to_owned(),
    }
}

#[test]
fn what_has_delivered_stays_in_front_however_many_others_are_named() {
    let rig = Rig::new(&[("h", GOOD)]);
    let (standings, layer) = (&rig.standings, &rig.layer);
    standings.delivered(layer, &origin(&source("old")));
    standings.delivered(layer, &origin(&source("good")));
    let mut known = vec![source("good"), source("old")];
    for at in 0..20 {
        let new = source(&at.to_string());
        known = standings.arrange(layer, &known, std::slice::from_ref(&new), 8);
        assert_eq!(known[..3], [source("good"), source("old"), new]);
        assert!(known.len() <= 8);
    }
    // Even while it cannot be reached.
    standings.failed(layer, &origin(&source("good")));
    known = standings.arrange(layer, &known, &[source("x"), source("y")], 3);
    assert_eq!(known, [source("good"), source("old"), source("x")]);
    // What sent false bytes has not.
    standings.lied(layer, &origin(&source("good")));
    known = standings.arrange(layer, &known, &[source("x")], 3);
    assert_eq!(known, [source("old"), source("x"), source("good")]);
}

#[test]
fn no_places_no_blob() {
    assert!(Failover::over(Digest::of(b""), Vec::new(), Arc::default()).is_none());
}
