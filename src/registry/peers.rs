//! What the connections to a host bring beside each other, so that one that brings much less than the others of the same time is found out.
//!
//! A connection may be throttled, routed badly or lossy while others to the same host are not; its bytes go on dripping, so that no silence
//! tells. What is usual is what the others brought in just that time: on a link that is full, or at a host that is slow with everything, all
//! bring little, and nobody is slow. Where there are no others, nothing is known.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::health::SLOW;
use super::lock;

/// How many times as much as a connection the others must bring. On a full link shares vary by two or three times.
const SLOWER: f64 = 8.0;
/// What one wait counts at most: a reader that pauses in the middle of one waits for nobody.
const LONGEST: Duration = Duration::from_secs(1);
/// How long others must have been there, together: less says nothing.
const ENOUGH: Duration = Duration::from_secs(1);

/// The connections to a host.
#[derive(Debug)]
pub struct Peers(Mutex<State>);

#[derive(Debug)]
struct State {
    /// Bytes that all of them have brought.
    bytes: u64,
    /// How long they were there, together.
    time: Duration,
    now: Instant,
    connections: u32,
}

/// One of them.
#[derive(Debug)]
pub struct Peer {
    peers: Arc<Peers>,
    begun: Instant,
    /// What all had brought, and how long they had been there, when it began.
    before: (u64, Duration),
    brought: u64,
    waited: Duration,
}

impl Peers {
    pub(super) fn new(now: Instant) -> Self {
        Peers(Mutex::new(State {
            bytes: 0,
            time: Duration::ZERO,
            now,
            connections: 0,
        }))
    }

    /// A connection begins to bring something.
    pub fn join(self: &Arc<Self>, now: Instant) -> Peer {
        let mut state = lock(&self.0);
        state.pass(now);
        state.connections += 1;
        Peer {
            peers: Arc::clone(self),
            begun: now,
            before: (state.bytes, state.time),
            brought: 0,
            waited: Duration::ZERO,
        }
    }
}

impl State {
    fn pass(&mut self, now: Instant) {
        self.time += now.saturating_duration_since(self.now) * self.connections;
        self.now = self.now.max(now);
    }
}

impl Peer {
    /// It has brought `bytes`, for which its reader waited so long.
    pub fn brought(&mut self, bytes: usize, waited: Duration) {
        self.brought += bytes as u64;
        self.waited += waited.min(LONGEST);
        lock(&self.peers.0).bytes += bytes as u64;
    }

    /// Whether it brings much less than the others do meanwhile.
    pub fn is_slow(&self, now: Instant) -> bool {
        if self.waited < SLOW {
            return false;
        }
        let mut state = lock(&self.peers.0);
        state.pass(now);
        let bytes = (state.bytes - self.before.0).saturating_sub(self.brought);
        let mine = now.saturating_duration_since(self.begun);
        let time = (state.time - self.before.1).saturating_sub(mine);
        let rate = self.brought as f64 / self.waited.as_secs_f64();
        time >= ENOUGH && rate * SLOWER < bytes as f64 / time.as_secs_f64()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let mut state = lock(&self.peers.0);
        let now = state.now.max(Instant::now());
        state.pass(now);
        state.connections -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A second with connections that bring so many bytes each.
    fn second(peers: &mut [(Peer, usize)], now: &mut Instant) {
        *now += Duration::from_secs(1);
        for (peer, bytes) in peers {
            peer.brought(*bytes, Duration::from_secs(1));
        }
    }

    fn slow(rates: &[usize]) -> Vec<bool> {
        let mut now = Instant::now();
        let all = Arc::new(Peers::new(now));
        let mut peers: Vec<_> = rates.iter().map(|rate| (all.join(now), *rate)).collect();
        for _ in 0..3 {
            second(&mut peers, &mut now);
            assert!(peers.iter().all(|(peer, _)| !peer.is_slow(now)), "it is too early");
        }
        second(&mut peers, &mut now);
        peers.iter().map(|(peer, _)| peer.is_slow(now)).collect()
    }

    #[test]
    fn one_that_brings_much_less_than_the_others_is_slow() {
        assert_eq!(slow(&[16_000, 1_000_000]), [true, false]);
        assert_eq!(slow(&[16_000, 100_000, 200_000]), [true, false, false]);
    }

    #[test]
    fn where_all_are_slow_or_nobody_else_is_there_none_is() {
        assert_eq!(slow(&[16_000]), [false]);
        assert_eq!(slow(&[16_000, 17_000, 50_000]), [false; 3]);
        assert_eq!(slow(&[0, 0]), [false; 2]);
    }

    #[test]
    fn only_what_others_bring_in_the_same_time_counts() {
        let mut now = Instant::now();
        let all = Arc::new(Peers::new(now));
        let mut fast = [(all.join(now), 10_000_000)];
        for _ in 0..10 {
            second(&mut fast, &mut now);
        }
        drop(fast);
        let mut alone = [(all.join(now), 16_000)];
        for _ in 0..10 {
            second(&mut alone, &mut now);
        }
        assert!(!alone[0].0.is_slow(now));
    }

    #[test]
    fn a_reader_that_pauses_makes_nobody_slow() {
        let mut now = Instant::now();
        let all = Arc::new(Peers::new(now));
        let (mut pauses, mut other) = (all.join(now), all.join(now));
        for _ in 0..3 {
            now += Duration::from_secs(60);
            pauses.brought(64_000, Duration::from_secs(60));
            other.brought(600_000_000, Duration::from_secs(1));
        }
        assert!(!pauses.is_slow(now));
    }
}
