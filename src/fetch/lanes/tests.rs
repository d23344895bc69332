//! Lanes over a network in virtual time: links that hold back each connection or all of them, and sources that cut, refuse, fall silent, drip
//! and have no ranges. Everything follows from a seed.

use std::sync::Mutex;

use super::*;
use crate::fetch::schedule::{Class, Limits, Scheduler};
use crate::fetch::tests::fake::noise;
use crate::fetch::width::Links;
use crate::metrics::Metrics;
use crate::registry::Origin;

mod net;

use net::{Fate, Handle, MIB, Net, PIECE};

const PATIENCE: Duration = Duration::from_secs(60);
const SEEDS: u64 = 100;

/// What lanes are given.
struct Given {
    memory: Arc<Budget>,
    ahead: Arc<Budget>,
    scheduler: Arc<Scheduler>,
    links: Arc<Links>,
    metrics: Metrics,
    wishes: watch::Sender<Wishes>,
    shape: Shape,
    progress: Arc<AtomicU64>,
    arrived: Arc<AtomicU64>,
}

impl Given {
    fn new(links: Links) -> Self {
        Given {
            memory: Budget::new(32 * MIB),
            ahead: Budget::new(32 * MIB),
            scheduler: Scheduler::new(Limits {
                requests: 16,
                streams: 4,
                memory: 256 * MIB,
            }),
            links: Arc::new(links),
            metrics: Metrics::new(),
            wishes: watch::Sender::new(Wishes::default()),
            shape: Shape::default(),
            progress: Arc::default(),
            arrived: Arc::default(),
        }
    }

    fn lanes(&self, net: &Arc<Net>) -> Lanes {
        let progress = Arc::clone(&self.progress);
        Lanes::new(
            Arc::new(Handle(Arc::clone(net))),
            Resources {
                memory: Arc::clone(&self.memory),
                ahead: Arc::clone(&self.ahead),
                patience: PATIENCE,
                wishes: self.wishes.subscribe(),
                progress: Box::new(move |bytes| {
                    progress.fetch_add(bytes, Ordering::Relaxed);
                }),
                arrived: Box::new({
                    let arrived = Arc::clone(&self.arrived);
                    move |bytes| {
                        arrived.fetch_max(bytes, Ordering::Relaxed);
                    }
                }),
                grows: Box::new(|_| {}),
                fetched: self.metrics.fetched_bytes_total.with_label_values(&["stream"]),
                stream_ranges: self.metrics.stream_ranges_total.clone(),
                origin: Origin::new("host", "image"),
                class: Class::Prefetch,
                scheduler: Arc::clone(&self.scheduler),
                links: Arc::clone(&self.links),
                wide: true,
                spool: None,
                shape: self.shape,
            },
        )
    }

    fn outcome(&self, word: &str) -> u64 {
        self.metrics.stream_ranges_total.with_label_values(&[word]).get()
    }

    /// Reads all of it; how long that took.
    async fn read(&self, net: &Arc<Net>) -> Duration {
        let begin = Instant::now();
        let (mut lanes, mut at) = (self.lanes(net), 0);
        while let Some(piece) = lanes.next().await.unwrap() {
            assert!(piece.bytes == net.data[at..at + piece.bytes.len()], "at {at}");
            at += piece.bytes.len();
        }
        assert_eq!(at, net.data.len());
        begin.elapsed()
    }
}

const MB: u64 = 1_000_000;

#[tokio::test(start_paused = true)]
async fn where_each_connection_is_held_back_several_bring_several_times_as_much() {
    let net = || Net::new(400 * MB, 31 * MB, 250 * MB, |_, _| Fate::Good);
    let one = Given::new(Links::new(0)).read(&net()).await;
    let given = Given::new(Links::new(11));
    let several = given.read(&net()).await;
    assert!(several * 3 < one, "{several:?} instead of {one:?}");
    // What was found out is known to the next one.
    let again = given.read(&net()).await;
    assert!(again * 4 < one, "{again:?} instead of {one:?}");
}

#[tokio::test(start_paused = true)]
async fn where_the_link_is_full_trials_cost_next_to_nothing() {
    let net = || Net::new(160 * MB, u64::MAX / 4 / MB, 12_500_000, |_, _| Fate::Good);
    let (alone, tried) = (net(), net());
    let one = Given::new(Links::new(0)).read(&alone).await;
    let given = Given::new(Links::new(11));
    let several = given.read(&tried).await;
    assert!(several < one * 103 / 100, "{several:?} instead of {one:?}");
    let (least, sent) = (alone.sent.load(Ordering::Relaxed), tried.sent.load(Ordering::Relaxed));
    assert!(sent < least * 103 / 100, "{sent} bytes instead of {least}");
    assert!(tried.besides() > 0, "it was tried");
}

/// Connections that share a link bring less in order, and no less in all: whoever judges the pace has to know.
#[tokio::test(start_paused = true)]
async fn what_comes_before_its_turn_has_arrived() {
    const RATE: u64 = 12_500_000;
    let net = Net::new(160 * MB, u64::MAX / 4 / MB, RATE, |_, _| Fate::Good);
    let given = Given::new(Links::new(11));
    let marks = Mutex::new(Vec::new());
    let watch = async {
        loop {
            let now = [&given.arrived, &given.progress].map(|bytes| bytes.load(Ordering::Relaxed));
            marks.lock().unwrap().push(now);
            sleep(Duration::from_millis(500)).await;
        }
    };
    tokio::select! {
        _ = given.read(&net) => {}
        () = watch => {}
    }
    let marks = marks.into_inner().unwrap();
    // Without the beginning, in which the first request is under way, and the end.
    let paces = |which: usize| {
        marks[1..marks.len() - 1]
            .windows(2)
            .map(move |two| two[1][which] - two[0][which])
    };
    let least = |which| paces(which).min().unwrap();
    assert!(least(0) > RATE / 2 * 8 / 10, "{:?}", paces(0).collect::<Vec<_>>());
    assert!(
        least(1) < RATE / 2 * 6 / 10,
        "it shows nothing: {:?}",
        paces(1).collect::<Vec<_>>()
    );
}

#[tokio::test(start_paused = true)]
async fn a_source_without_ranges_is_read_over_one_connection() {
    let fate = |_, how| match how {
        How::Plain => Fate::Good,
        How::Beside => Fate::NoRanges,
    };
    let net = Net::new(60 * MB, 5 * MB, 250 * MB, fate);
    let given = Given::new(Links::fixed(8));
    given.read(&net).await;
    assert_eq!(net.sent.load(Ordering::Relaxed), net.data.len() as u64, "no byte twice");
    assert!(net.besides() <= 8, "{}", net.besides());
}

/// Whatever becomes of the requests, the bytes come once and in order, and no more of them are held than may be.
#[tokio::test(start_paused = true)]
async fn any_mixture_of_answers_gives_the_bytes_once_and_in_order() {
    for seed in 0..SEEDS {
        let random = move |number: usize| noise(seed * 1000 + number as u64, 8);
        let fate = move |number, how| {
            let random = random(number);
            match (how, random[0] % 12) {
                (How::Plain, _) => Fate::Good,
                (_, 0) => Fate::Refused,
                (_, 1) if random[2] % 4 == 0 => Fate::NoRanges,
                (_, 2) => Fate::Cut(u64::from(random[1]) * 3000),
                (_, 3) => Fate::Silent(u64::from(random[1]) * 3000),
                (_, 4) => Fate::Drips,
                _ => Fate::Good,
            }
        };
        let choice = noise(seed, 8);
        let len = 2 * MIB + u64::from(choice[0]) * 40_000;
        let net = Net::new(len, (1 + u64::from(choice[1] % 16)) * MB, 20 * MB, fate);
        let extra = usize::from(choice[2] % 9);
        let mut given = Given::new(Links::fixed(extra));
        given.shape = Shape {
            least: MIB / 4,
            most: MIB,
        };
        let part = (given.memory.total() / OWN_PART).max(PART_MIN);
        let (mut lanes, mut at) = (given.lanes(&net), 0);
        // Decompression is slow at times.
        let mut kept = VecDeque::new();
        while let Some(piece) = lanes.next().await.unwrap() {
            assert!(
                piece.bytes == net.data[at..at + piece.bytes.len()],
                "at {at}, seed {seed}"
            );
            at += piece.bytes.len();
            kept.push_back(piece);
            if choice[3].is_multiple_of(2) || kept.len() > 20 {
                sleep(Duration::from_millis(u64::from(choice[4] % 8))).await;
                kept.pop_front();
            }
        }
        assert_eq!(at as u64, len, "seed {seed}");
        assert_eq!(given.progress.load(Ordering::Relaxed), len);
        let most = net.live.most.load(Ordering::Relaxed);
        // Each request has a piece in its hands that waits for its memory.
        let bound = part + given.ahead.total() / 4 * EXTRA_QUARTERS + (extra as u64 + 3) * PIECE as u64;
        assert!(most <= bound, "{most} of {bound}, seed {seed}");
        drop((lanes, kept));
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(given.memory.held() + given.ahead.held(), 0, "seed {seed}");
        assert_eq!(given.scheduler.counts(), (0, 0), "seed {seed}");
        assert_eq!(net.underway.load(Ordering::Relaxed), 0, "seed {seed}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_range_that_is_slower_than_its_peers_is_asked_for_twice() {
    let fate = |number, _| if number == 3 { Fate::Drips } else { Fate::Good };
    let net = Net::new(60 * MB, 5 * MB, 250 * MB, fate);
    let given = Given::new(Links::fixed(4));
    let took = given.read(&net).await;
    assert_eq!(given.outcome("overtaken"), 1);
    assert!(took < Duration::from_secs(5), "{took:?}");
    // One that says nothing is no different.
    let fate = |number, _| if number == 5 { Fate::Silent(10_000) } else { Fate::Good };
    let net = Net::new(60 * MB, 5 * MB, 250 * MB, fate);
    let took = given.read(&net).await;
    assert_eq!(given.outcome("overtaken"), 2);
    assert!(took < Duration::from_secs(5), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_range_that_fails_is_asked_for_once_more_and_then_that_is_an_error() {
    let fails = |until: usize| {
        move |number: usize, _| match number {
            2 => Fate::Cut(300_000),
            3.. if number < until => Fate::Refused,
            _ => Fate::Good,
        }
    };
    let net = Net::new(20 * MB, 5 * MB, 250 * MB, fails(3));
    let given = Given::new(Links::fixed(2));
    given.read(&net).await;
    assert_eq!(given.outcome("failed"), 1);
    let net = Net::new(20 * MB, 5 * MB, 250 * MB, fails(usize::MAX));
    let mut lanes = given.lanes(&net);
    let fault = loop {
        match lanes.next().await {
            Ok(piece) => assert!(piece.is_some(), "the end has not come"),
            Err(fault) => break fault,
        }
    };
    assert!(matches!(fault, Fault::Source(_)), "{fault:?}");
    drop(lanes);
    assert_eq!(given.ahead.held(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_pause_begins_nothing_and_lets_ranges_end() {
    let net = Net::new(200 * MB, 5 * MB, 250 * MB, |_, _| Fate::Good);
    let given = Given::new(Links::fixed(4));
    let mut lanes = given.lanes(&net);
    let read = async |lanes: &mut Lanes, time| {
        let end = Instant::now() + time;
        while let Ok(Ok(piece)) = tokio::time::timeout_at(end, lanes.next()).await {
            assert!(piece.is_some());
        }
    };
    read(&mut lanes, Duration::from_secs(1)).await;
    assert!(net.underway.load(Ordering::Relaxed) > 3);
    given.wishes.send_modify(|wishes| wishes.pauses = 1);
    read(&mut lanes, Duration::from_secs(3)).await;
    let (asked, sent) = (net.asked.lock().unwrap().len(), net.sent.load(Ordering::Relaxed));
    assert_eq!(given.scheduler.counts(), (0, 0), "places are free");
    read(&mut lanes, PATIENCE * 2).await;
    assert_eq!(net.asked.lock().unwrap().len(), asked);
    assert_eq!(net.sent.load(Ordering::Relaxed), sent);
    given.wishes.send_modify(|wishes| wishes.pauses = 0);
    read(&mut lanes, Duration::from_secs(1)).await;
    assert!(net.sent.load(Ordering::Relaxed) > sent + 10 * MB);
}

/// What nobody reads would fill buffers, on a link that somebody else is to have.
#[tokio::test(start_paused = true)]
async fn a_stream_that_pauses_gives_its_connection_up_and_goes_on_where_it_was() {
    for (fate, more) in [(Fate::Good, 0), (Fate::NoRanges, 1)] {
        let fate = move |_, how| if how == How::Beside { fate } else { Fate::Good };
        let net = Net::new(100 * MB, 5 * MB, 250 * MB, fate);
        let given = Given::new(Links::new(0));
        let mut lanes = given.lanes(&net);
        let mut at = 0;
        let mut read = async |time| {
            let end = Instant::now() + time;
            while let Ok(piece) = tokio::time::timeout_at(end, lanes.next()).await {
                let Some(piece) = piece.unwrap() else { break };
                assert!(piece.bytes == net.data[at..at + piece.bytes.len()], "at {at}");
                at += piece.bytes.len();
            }
            at as u64
        };
        let pause = |pauses| given.wishes.send_modify(|wishes| wishes.pauses = pauses);
        let mut gave_up = 0;
        for _ in 0..GIVES_WAY + 2 {
            read(Duration::from_secs(2)).await;
            pause(1);
            let before = read(Duration::from_secs(30)).await;
            gave_up += u64::from(net.underway.load(Ordering::Relaxed) == 0);
            assert_eq!(read(Duration::from_secs(30)).await, before, "nothing comes");
            pause(0);
        }
        assert_eq!(read(PATIENCE).await, 100 * MB);
        // A source without ranges sends all of it again, once.
        assert_eq!(gave_up, if more == 0 { u64::from(GIVES_WAY) } else { 1 });
        let sent = net.sent.load(Ordering::Relaxed);
        let least = 100 * MB + more * 20 * MB;
        assert!(
            sent <= least + (gave_up + 1) * PIECE as u64,
            "{sent} bytes for {gave_up}"
        );
        assert_eq!(given.outcome("gave_way"), gave_up);
    }
}

/// The same with lanes further ahead, some of which have begun, and whatever becomes of the requests.
#[tokio::test(start_paused = true)]
async fn pauses_at_any_time_lose_no_byte_and_repeat_few() {
    for seed in 0..SEEDS {
        let choice = noise(seed, 64);
        let fate = {
            let choice = choice.clone();
            move |number: usize, how| match (how, choice[number % 64] % 16) {
                (How::Beside, 0) => Fate::Refused,
                (How::Beside, 1) => Fate::Cut(u64::from(choice[1]) * 3000),
                _ => Fate::Good,
            }
        };
        let net = Net::new(60 * MB, 5 * MB, (5 + u64::from(choice[2] % 4) * 5) * MB, fate);
        let given = Given::new(Links::fixed(usize::from(choice[3] % 5)));
        let pauses = async {
            for times in choice[4..].chunks(2) {
                sleep(Duration::from_millis(u64::from(times[0]) * 8)).await;
                given.wishes.send_modify(|wishes| wishes.pauses = 1);
                sleep(Duration::from_millis(u64::from(times[1]) * 8)).await;
                given.wishes.send_modify(|wishes| wishes.pauses = 0);
            }
        };
        tokio::join!(given.read(&net), pauses);
        let sent = net.sent.load(Ordering::Relaxed);
        assert!(sent < 80 * MB, "{sent}, seed {seed}");
        assert_eq!(given.memory.held() + given.ahead.held(), 0, "seed {seed}");
    }
}

/// Streams that share memory, places and a host, with faults, pauses and decompression that is slow at times: nobody waits for ever.
#[tokio::test(start_paused = true)]
async fn streams_side_by_side_all_come_to_their_ends() {
    /// Far above what the slowest of them needs.
    const END: Duration = Duration::from_secs(3600);
    for seed in 0..SEEDS / 2 {
        let choice = noise(seed, 64);
        let first = Given::new(match choice[0] % 3 {
            0 => Links::new(11),
            extra => Links::fixed(usize::from(extra) * 3),
        });
        let streams = (0..2 + u64::from(choice[1] % 4)).map(|stream| {
            let choice = noise(seed * 100 + stream, 64);
            let given = Given {
                memory: Arc::clone(&first.memory),
                ahead: Arc::clone(&first.ahead),
                scheduler: Arc::clone(&first.scheduler),
                links: Arc::clone(&first.links),
                ..Given::new(Links::new(0))
            };
            let fates = choice.clone();
            let fate = move |number: usize, how| match (how, fates[number % 64] % 20) {
                (How::Plain, _) => Fate::Good,
                (_, 0) => Fate::Refused,
                (_, 1) => Fate::Cut(u64::from(fates[1]) * 30_000),
                (_, 2) => Fate::Silent(u64::from(fates[2]) * 30_000),
                (_, 3) => Fate::Drips,
                (_, 4) if fates[3].is_multiple_of(4) => Fate::NoRanges,
                _ => Fate::Good,
            };
            let net = Net::new(u64::from(choice[4]) * 200_000 + MIB, 6 * MB, 30 * MB, fate);
            async move {
                let (mut lanes, mut at) = (given.lanes(&net), 0);
                let reads = async {
                    let mut kept = VecDeque::new();
                    while let Some(piece) = lanes.next().await.unwrap() {
                        assert!(piece.bytes == net.data[at..at + piece.bytes.len()], "at {at}");
                        at += piece.bytes.len();
                        kept.push_back(piece);
                        if choice[5].is_multiple_of(2) || kept.len() > 8 {
                            sleep(Duration::from_millis(u64::from(choice[6] % 32))).await;
                            kept.pop_front();
                        }
                    }
                };
                let pauses = async {
                    for times in choice[8..].chunks(2) {
                        sleep(Duration::from_millis(u64::from(times[0]) * 40)).await;
                        given
                            .wishes
                            .send_modify(|wishes| wishes.pauses = usize::from(times[0] % 2));
                        sleep(Duration::from_millis(u64::from(times[1]) * 40)).await;
                        given.wishes.send_modify(|wishes| wishes.pauses = 0);
                    }
                };
                tokio::select! {
                    () = reads => {}
                    () = async { pauses.await; std::future::pending().await } => {}
                }
                assert_eq!(at, net.data.len());
            }
        });
        let all = futures::future::join_all(streams);
        assert!(tokio::time::timeout(END, all).await.is_ok(), "seed {seed} hangs");
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(first.memory.held() + first.ahead.held(), 0, "seed {seed}");
        assert_eq!(first.scheduler.counts(), (0, 0), "seed {seed}");
    }
}

/// On a link that all of them share, all lanes are slow, and none of them is asked for twice.
#[tokio::test(start_paused = true)]
async fn ranges_that_are_all_slow_are_not_asked_for_twice() {
    let net = Net::new(100 * MB, u64::MAX / 4 / MB, 5 * MB, |_, _| Fate::Good);
    let given = Given::new(Links::fixed(6));
    given.read(&net).await;
    assert!(given.outcome("done") > 5, "it shows nothing");
    let asked = net.asked.lock().unwrap();
    let mut starts: Vec<_> = asked.iter().map(|(_, range)| range.start).collect();
    starts.sort_unstable();
    assert!(starts.windows(2).all(|two| two[0] != two[1]), "{asked:?}");
    let sent = net.sent.load(Ordering::Relaxed);
    assert!(sent <= 102 * MB, "{sent}");
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_bytes_of_the_host_has_it_to_himself() {
    let net = Net::new(100 * MB, 5 * MB, 250 * MB, |_, _| Fate::Good);
    let given = Given::new(Links::fixed(8));
    let demand = Wish {
        owner: Origin::new("host", "another"),
        class: Class::Demand,
        kind: Kind::Request,
        bytes: 1000,
        deadline: Duration::ZERO,
    };
    let place = given.scheduler.enter(demand).await;
    let took = given.read(&net).await;
    assert_eq!(net.besides(), 0);
    drop(place);
    let alone = given.read(&net).await;
    assert!(alone * 3 < took, "{alone:?} instead of {took:?}");
}
