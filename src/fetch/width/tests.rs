//! The choice in virtual time, over links that hold back each connection, or all of them together.

use super::*;

const LOOK: Duration = Duration::from_millis(50);
const MB: f64 = 1e6;

/// A link of `all` bytes per second, of which each connection gets `each` at most, and which `others` share.
#[derive(Clone, Copy)]
struct World {
    all: f64,
    each: f64,
    others: usize,
    /// Connections beside the streams' own that can be had.
    places: usize,
    /// After how long those that are newly allowed are in use.
    late: Duration,
    hungry: bool,
}

/// A run of it.
struct Run {
    width: Width,
    now: Duration,
    bytes: f64,
    /// Connections, of all looks together.
    connections: usize,
    /// Those beside the streams' own that are in use, and since when more are allowed.
    used: usize,
    allowed: Duration,
}

impl Run {
    fn new(most: usize) -> Self {
        Run {
            width: Width::new(most),
            now: Duration::from_secs(100),
            bytes: 0.0,
            connections: 0,
            used: 0,
            allowed: Duration::ZERO,
        }
    }

    /// Bytes per second over `time`, and connections on average, the streams' own included.
    fn go(&mut self, world: World, streams: usize, time: Duration) -> (f64, f64) {
        let (before, mut looks) = (self.bytes, 0_usize);
        self.connections = 0;
        let end = self.now + time;
        while self.now < end {
            let could = self.width.extra.min(world.places);
            if could <= self.used {
                self.allowed = self.now;
            }
            if could < self.used || self.now - self.allowed >= world.late {
                self.used = could;
            }
            let used = self.used;
            let connections = streams + used;
            let share = world.all / (connections + world.others) as f64;
            self.bytes += connections as f64 * share.min(world.each) * LOOK.as_secs_f64();
            self.now += LOOK;
            looks += 1;
            self.connections += connections;
            self.width.see(&Seen {
                now: self.now,
                bytes: self.bytes as u64,
                streams,
                used,
                hungry: world.hungry,
            });
        }
        let rate = (self.bytes - before) / time.as_secs_f64();
        (rate, self.connections as f64 / looks as f64)
    }
}

const CAPPED: World = World {
    all: 250.0 * MB,
    each: 31.25 * MB,
    others: 0,
    places: 12,
    late: Duration::ZERO,
    hungry: true,
};

const SHARED: World = World {
    all: 12.5 * MB,
    each: f64::INFINITY,
    ..CAPPED
};

#[test]
fn where_each_connection_is_held_back_the_link_is_filled_within_a_second_and_a_half() {
    let mut run = Run::new(11);
    run.go(CAPPED, 1, Duration::from_millis(1500));
    let (rate, _) = run.go(CAPPED, 1, Duration::from_millis(500));
    assert!(rate > 0.95 * CAPPED.all, "{rate}");
    let (rate, _) = run.go(CAPPED, 1, Duration::from_secs(60));
    assert!(rate > 0.95 * CAPPED.all, "{rate}");
    let (rate, _) = Run::new(0).go(CAPPED, 1, Duration::from_secs(10));
    assert!(rate < 1.01 * CAPPED.each, "none is allowed: {rate}");
}

#[test]
fn where_twice_as_many_are_too_many_half_of_those_may_be_right() {
    let world = World {
        all: 170.0 * MB,
        ..CAPPED
    };
    let mut run = Run::new(11);
    run.go(world, 1, Duration::from_secs(3));
    let (rate, connections) = run.go(world, 1, Duration::from_secs(2));
    assert!(rate > 0.95 * world.all, "{rate}");
    assert!(connections < 7.0, "{connections}");
}

#[test]
fn what_is_in_use_late_is_measured_from_then_on() {
    let late = Duration::from_millis(400);
    let mut run = Run::new(11);
    run.go(World { late, ..CAPPED }, 1, Duration::from_secs(3));
    let (rate, _) = run.go(World { late, ..CAPPED }, 1, Duration::from_secs(2));
    assert!(rate > 0.95 * CAPPED.all, "{rate}");
}

#[test]
fn where_the_link_is_full_there_is_one_connection_but_for_trials() {
    for streams in [1, 5] {
        let (_, connections) = Run::new(11).go(SHARED, streams, Duration::from_secs(60));
        assert!(connections < 1.06 * streams as f64, "{connections}");
    }
    // Where somebody else is on the link, more connections would take it from him.
    for others in [1, 2, 4] {
        let (_, connections) = Run::new(11).go(World { others, ..SHARED }, 1, Duration::from_secs(60));
        assert!(connections < 1.0 + 11.0 / 3.0, "{connections} beside {others}");
    }
}

#[test]
fn a_link_that_changes_is_noticed() {
    let mut run = Run::new(11);
    run.go(CAPPED, 1, Duration::from_secs(10));
    assert!(run.width.extra >= 7, "{}", run.width.extra);
    run.go(SHARED, 1, Duration::from_secs(120));
    assert!(run.width.extra <= 1, "{}", run.width.extra);
    run.go(CAPPED, 1, Duration::from_secs(40));
    assert!(run.width.extra >= 7, "{}", run.width.extra);
}

#[test]
fn who_does_not_wait_for_the_source_tries_nothing() {
    let world = World {
        hungry: false,
        ..CAPPED
    };
    let (_, connections) = Run::new(11).go(world, 1, Duration::from_secs(10));
    assert!(connections <= 1.0);
}

#[test]
fn what_cannot_be_had_is_not_allowed_for() {
    let mut run = Run::new(11);
    run.go(World { places: 3, ..CAPPED }, 1, Duration::from_secs(10));
    assert!(run.width.extra <= 3 + 1 + 3, "{}", run.width.extra);
    let (rate, _) = run.go(World { places: 3, ..CAPPED }, 1, Duration::from_secs(10));
    assert!(rate > 0.9 * 4.0 * CAPPED.each, "{rate}");
}

#[test]
fn streams_that_come_and_go_void_a_trial() {
    let mut run = Run::new(11);
    for round in 0..40 {
        run.go(SHARED, 1 + round % 2, Duration::from_millis(600));
        assert!(run.width.extra <= 2, "{}", run.width.extra);
    }
}

#[tokio::test(start_paused = true)]
async fn a_host_is_remembered_for_a_while_and_extras_are_given_back() {
    let (links, host) = (Links::fixed(1), Arc::<str>::from("host"));
    let stream = links.join(&host);
    let extra = stream.extra().expect("one is allowed");
    assert!(stream.extra().is_none());
    let other = links.join(&host);
    assert!(other.extra().is_none(), "it is the host's");
    drop(extra);
    assert!(other.extra().is_some());
    drop((stream, other));
    tokio::time::advance(REMEMBERED / 2).await;
    drop(links.join(&"another".into()));
    assert_eq!(links.links.lock().unwrap().len(), 2);
    tokio::time::advance(REMEMBERED).await;
    let _another = links.join(&"another".into());
    assert_eq!(links.links.lock().unwrap().len(), 1);
}

/// Streams look side by side; a look that was late to be taken is none that ends a stream.
#[test]
fn a_look_from_before_the_last_one_says_nothing() {
    let mut width = Width::new(8);
    let mut see = |ms: u64| {
        width.see(&Seen {
            now: Duration::from_millis(ms),
            bytes: 0,
            streams: 1,
            used: 0,
            hungry: true,
        });
    };
    for ms in [0, 10_000, 9_999, 20_000] {
        see(ms);
    }
}
