//! A source behind a link, in virtual time.

use std::sync::Mutex;

use futures::{StreamExt, stream};

use super::*;
use crate::fetch::tests::fake::noise;
use crate::registry::{Body, Origin, RegistryError};

/// Bytes per piece of a body.
pub(super) const PIECE: usize = 64 << 10;
pub(super) const MIB: u64 = 1 << 20;
/// How far a sender may lag behind the clock and still catch up: timers are not exact.
pub(super) const SLACK: Duration = Duration::from_millis(5);
pub(super) const RTT: Duration = Duration::from_millis(20);

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Good,
    Refused,
    NoRanges,
    /// It breaks after that many bytes.
    Cut(u64),
    /// Nothing comes after that many bytes.
    Silent(u64),
    /// It brings 16 KB in a second.
    Drips,
}

/// The bytes that a source has sent and nobody has dropped.
#[derive(Default)]
pub(super) struct Live {
    pub(super) now: AtomicU64,
    pub(super) most: AtomicU64,
}

pub(super) struct Tracked(Bytes, Arc<Live>);

impl AsRef<[u8]> for Tracked {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        self.1.now.fetch_sub(self.0.len() as u64, Ordering::Relaxed);
    }
}

/// A source behind a link.
pub(super) struct Net {
    pub(super) data: Bytes,
    /// Bytes per second that each connection has at most, and all of them together.
    pub(super) each: u64,
    pub(super) all: u64,
    pub(super) idle_at: Mutex<Instant>,
    pub(super) fate: Box<dyn Fn(usize, How) -> Fate + Send + Sync>,
    pub(super) asked: Mutex<Vec<(How, Range<u64>)>>,
    pub(super) underway: Arc<AtomicU64>,
    pub(super) sent: AtomicU64,
    pub(super) live: Arc<Live>,
}

pub(super) struct Underway(Arc<AtomicU64>);

impl Drop for Underway {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

pub(super) fn sends(next: &mut Instant, len: u64, rate: u64) -> Instant {
    let now = Instant::now();
    let earliest = now.checked_sub(SLACK).unwrap_or(now);
    *next = (*next).max(earliest) + Duration::from_nanos(len * 1_000_000_000 / rate);
    *next
}

/// That many bytes, in which none lie where they would lie after a slip of any likely length. (To make noise takes a while in a debug build.)
pub(super) fn bytes(len: u64) -> Vec<u8> {
    let unit = noise(len, 1_000_003);
    let mut bytes = unit.repeat((len as usize).div_ceil(unit.len()));
    bytes.truncate(len as usize);
    bytes
}

impl Net {
    pub(super) fn new(
        len: u64,
        each: u64,
        all: u64,
        fate: impl Fn(usize, How) -> Fate + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Net {
            data: bytes(len).into(),
            each,
            all,
            idle_at: Mutex::new(Instant::now()),
            fate: Box::new(fate),
            asked: Mutex::default(),
            underway: Arc::default(),
            sent: AtomicU64::new(0),
            live: Arc::default(),
        })
    }

    pub(super) fn besides(&self) -> usize {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|(how, _)| *how == How::Beside).count()
    }

    async fn open(self: Arc<Self>, range: Range<u64>, how: How) -> Result<Body, RegistryError> {
        let number = {
            let mut asked = self.asked.lock().unwrap();
            asked.push((how, range.clone()));
            asked.len() - 1
        };
        self.underway.fetch_add(1, Ordering::Relaxed);
        let guard = Underway(Arc::clone(&self.underway));
        sleep(RTT).await;
        let error = || RegistryError::Unreachable {
            host: "host".to_owned(),
            what: "on purpose".to_owned(),
        };
        let fate = (self.fate)(number, how);
        match fate {
            Fate::Refused => return Err(error()),
            Fate::NoRanges => {
                return Err(RegistryError::NoRanges {
                    host: "host".to_owned(),
                    what: "on purpose".to_owned(),
                });
            }
            _ => {}
        }
        let each = if fate == Fate::Drips { 16_000 } else { self.each };
        let state = (self, range.clone(), Instant::now(), guard);
        let body = stream::unfold(state, move |(me, rest, mut next, guard)| async move {
            let done = rest.start - range.start;
            let mut len = (rest.end - rest.start).min(PIECE as u64);
            if fate == Fate::Drips {
                len = len.min(16_000);
            }
            match fate {
                Fate::Cut(at) if done >= at => {
                    let nothing = rest.end..rest.end;
                    return (!rest.is_empty()).then(|| (Err(error()), (me, nothing, next, guard)));
                }
                Fate::Silent(at) if done >= at => std::future::pending().await,
                Fate::Cut(at) | Fate::Silent(at) => len = len.min(at - done),
                _ => {}
            }
            if len == 0 {
                return None;
            }
            let own = sends(&mut next, len, each);
            let shared = sends(&mut me.idle_at.lock().unwrap(), len, me.all);
            tokio::time::sleep_until(own.max(shared)).await;
            let bytes = me.data.slice(rest.start as usize..(rest.start + len) as usize);
            me.sent.fetch_add(len, Ordering::Relaxed);
            let now = me.live.now.fetch_add(len, Ordering::Relaxed) + len;
            me.live.most.fetch_max(now, Ordering::Relaxed);
            let bytes = Bytes::from_owner(Tracked(bytes, Arc::clone(&me.live)));
            let rest = rest.start + len..rest.end;
            Some((Ok(bytes), (me, rest, next, guard)))
        });
        Ok(body.boxed())
    }
}

/// The handle that lanes have.
pub(super) struct Handle(pub(super) Arc<Net>);

impl Blob for Handle {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        Arc::clone(&self.0).open(range, How::Plain).boxed()
    }

    fn read_beside(&self, range: Range<u64>) -> BoxFuture<'_, Result<Body, RegistryError>> {
        Arc::clone(&self.0).open(range, How::Beside).boxed()
    }

    fn size(&self) -> u64 {
        self.0.data.len() as u64
    }

    fn describe(&self) -> String {
        "a blob".to_owned()
    }

    fn origin(&self) -> Origin {
        Origin::new("host", "image")
    }
}
