//! A blob from its beginning to its end, over as many connections as help.
//!
//! What reads it gets the bytes in order ([`Lanes::next`]). They come over *lanes*: requests for neighbouring ranges, each moved by a task of
//! its own.
//! ```text
//!             handed on | own lane ........... | extra | extra | extra |  not asked for yet
//!                       ^ position
//! ```
//! - The *own* lane has the stream's own place. It is asked for all of the blob at once, without a range, and where nothing else helps (or the
//!   source has no ranges) that is all there ever is.
//! - *Extra* lanes are ranges of one to four MiB further ahead, as many as [`super::width`] finds to be of use at this host, and only while the
//!   stream waits for its source rather than for its own decompression. Each is a wish of its own at the scheduler, which grants none while
//!   somebody waits for bytes of that host. When the first of them has begun to arrive, the own lane ends where it begins; before
//!   that it goes on past it, so that nobody waits for ranges that never come.
//! - While there are extra lanes, the own lane goes on with ranges as well, else with all of the rest.
//!
//! *Memory.* What an own lane has brought and nobody has read is bounded by a part of `fetch.stream_memory`, for which it waits. An extra lane
//! has all it will hold before it is asked for, out of the other half, for which nobody waits: so what is first in order can always go on.
//!
//! *Faults.* A lane that fails is asked for once more from where it was cut, as the only one: from then on the stream has one connection. One that
//! everything waits for and that brings much less than its peers is asked for a second time beside; whichever is first goes on. A
//! body that ends early ends the stream, as it does with one connection: the blob's digest tells.
//!
//! *Pauses* keep extra lanes from beginning; ranges that have begun come to their ends, as they hold places. The own lane gives up its
//! connection, and goes on with the rest afterwards: a host sends on into the buffers of a connection that nobody reads (6 MiB are usual, on
//! each), which takes the link from whom the pause is for, and over HTTP/2 those of a few streams are all that the others may have. Where that
//! cannot be, or was done often, it only reads no further.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Buf, Bytes};
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep};
use tokio_util::task::AbortOnDropHandle;

use super::flights::Wishes;
use super::pipeline::{Fault, Resources};
use super::schedule::{Kind, Place, Wish};
use super::width::{Extra, Stream};
use crate::registry::Blob;
use crate::sync::{Budget, Share};

mod room;
mod task;

pub(super) use room::Piece;
use room::{Memory, Room, Unread};
use task::{Report, Run, Task};

/// Of the memory between download and decompression, the own lane has at most this part, but never less than [`PART_MIN`] bytes: its
/// decompression may be slow on purpose.
const OWN_PART: u64 = 8;
const PART_MIN: u64 = 64 << 10;
/// Of the memory for extra lanes, one stream has at most so many quarters.
const EXTRA_QUARTERS: u64 = 3;
/// How often it is looked whether more lanes are of use.
const LOOK: Duration = Duration::from_millis(50);
/// After how long a stream that has one connection still is not said to be waiting for more: whoever waits for it has to know.
const TOLD: Duration = Duration::from_millis(1500);
/// Least time that everything waits for a lane before it is asked for a second time, and it would still take by itself; and how many times as
/// much as it its peers must bring. (On a link that all share, all bring little: then another question would only add to that.)
const SLOW: Duration = Duration::from_millis(500);
const SLOWER: f64 = 2.0;
/// How often a stream gives up its connection for a pause: each costs a request.
const GIVES_WAY: u32 = 2;

/// How long ranges are, in bytes: a request costs a round trip, and memory for what it brings.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub least: u64,
    pub most: u64,
}

impl Default for Shape {
    fn default() -> Self {
        Shape {
            least: 1 << 20,
            most: 4 << 20,
        }
    }
}

/// Bytes that a lane has brought, and where they begin.
struct Arrived {
    at: u64,
    bytes: Bytes,
    memory: Memory,
}

struct Lane {
    range: Range<u64>,
    /// Whether it has the stream's own place.
    own: bool,
    /// Whether it was asked for to the end of the blob.
    open: bool,
    room: Room,
    run: Run,
    /// Whether it has given up its connection before its end.
    gave_way: bool,
    /// The same once more, if it was too slow.
    twin: Option<Run>,
    doubled: bool,
    begin: Instant,
    /// Whether it was asked for as a part beside others, for which a plain request is another way.
    beside: bool,
}

impl Lane {
    /// One that begins now.
    fn new(range: Range<u64>, own: bool, open: bool, how: How, room: Room, run: Run) -> Self {
        Lane {
            range,
            own,
            open,
            room,
            run,
            gave_way: false,
            twin: None,
            doubled: false,
            begin: Instant::now(),
            beside: how == How::Beside,
        }
    }

    /// Bytes per second that it has brought so far.
    fn rate(&self, now: Instant) -> f64 {
        let brought = self.run.position().saturating_sub(self.range.start);
        let time = self.run.took().unwrap_or(now - self.begin);
        brought as f64 / time.as_secs_f64().max(0.001)
    }
}

/// How a lane is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// As the only one.
    Plain,
    /// As a part beside others.
    Beside,
}

/// A blob that is read.
pub(super) struct Lanes {
    blob: Arc<dyn Blob>,
    size: u64,
    resources: Resources,
    /// The next byte that is handed on.
    position: u64,
    lanes: VecDeque<Lane>,
    /// Memory of own lanes, and of this stream's extra ones.
    part: Arc<Budget>,
    quarters: Arc<Budget>,
    stream: Stream,
    /// Whether there may be extra lanes.
    wide: bool,
    /// An extra lane that waits for its place.
    waiting: Option<BoxFuture<'static, (Place, Extra, [Share; 2])>>,
    wake: Arc<Notify>,
    begin: Instant,
    looked: Option<Instant>,
    /// When there was an extra lane under way last.
    extras_at: Option<Instant>,
    hungry: bool,
    unread: Arc<AtomicU64>,
    /// How often it has given way.
    gave_way: u32,
}

impl Lanes {
    /// Begins to read `blob`.
    pub(super) fn new(blob: Arc<dyn Blob>, resources: Resources) -> Self {
        let part = Budget::new((resources.memory.total() / OWN_PART).max(PART_MIN));
        let quarters = Budget::new(resources.ahead.total() / 4 * EXTRA_QUARTERS);
        let mut lanes = Lanes {
            size: blob.size(),
            stream: resources.links.join(&resources.origin.host),
            wide: resources.wide,
            blob,
            resources,
            position: 0,
            lanes: VecDeque::new(),
            part,
            quarters,
            waiting: None,
            wake: Arc::default(),
            begin: Instant::now(),
            looked: None,
            extras_at: None,
            hungry: false,
            unread: Arc::default(),
            gave_way: 0,
        };
        let lane = lanes.own(0..lanes.size, true, How::Plain);
        lanes.lanes.push_back(lane);
        lanes
    }

    /// The next bytes; `None` at the end, or where the source ended early.
    pub(super) async fn next(&mut self) -> Result<Option<Piece>, Fault> {
        loop {
            self.leave_behind();
            if self.position >= self.size {
                return Ok(None);
            }
            self.go_ahead();
            let position = self.position;
            let Some(head) = self.lanes.front_mut().filter(|lane| lane.range.start <= position) else {
                // It pauses.
                sleep(LOOK).await;
                continue;
            };
            let twin = async {
                match &mut head.twin {
                    Some(twin) => twin.arrivals.recv().await,
                    None => std::future::pending().await,
                }
            };
            let place = async {
                match &mut self.waiting {
                    Some(waiting) => waiting.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                arrived = head.run.arrivals.recv() => match arrived {
                    Some(Ok(arrived)) => {
                        if let Some(piece) = self.accept(arrived) {
                            return Ok(Some(piece));
                        }
                    }
                    Some(Err(fault)) => self.again(fault)?,
                    None if head.gave_way => {
                        self.lanes.pop_front();
                    }
                    // It ended before its end, and not by a fault.
                    None => return Ok(None),
                },
                arrived = twin => {
                    let twin = head.twin.take();
                    if let (Some(Ok(arrived)), Some(twin)) = (arrived, twin) {
                        // It was quicker.
                        head.run = twin;
                        self.resources.ranges("overtaken");
                        if let Some(piece) = self.accept(arrived) {
                            return Ok(Some(piece));
                        }
                    }
                }
                (place, extra, kept) = place => {
                    self.waiting = None;
                    self.begin_extra(place, extra, kept);
                }
                () = self.wake.notified() => {}
                () = sleep(LOOK) => {}
            }
        }
    }

    /// Takes bytes over, as far as they are wanted.
    fn accept(&mut self, arrived: Arrived) -> Option<Piece> {
        let Arrived { at, mut bytes, memory } = arrived;
        // A lane that another one has passed begins with what was handed on already. There are never any missing: lanes bring their
        // bytes in order, and each begins where the one before it ends.
        let passed = self.position.saturating_sub(at).min(bytes.len() as u64);
        bytes.advance(passed as usize);
        if bytes.is_empty() || at > self.position {
            return None;
        }
        let count = bytes.len() as u64;
        self.position += count;
        (self.resources.progress)(count);
        self.unread.fetch_add(count, Ordering::Relaxed);
        Some(Piece {
            bytes,
            _memory: memory,
            _unread: Unread(Arc::clone(&self.unread), count),
        })
    }

    /// Ends lanes that are passed.
    fn leave_behind(&mut self) {
        // An open lane ends where the next one begins, once that has.
        for at in 1..self.lanes.len() {
            let (lane, next) = (&self.lanes[at - 1], &self.lanes[at]);
            if lane.open && next.run.has_begun() {
                lane.run.report.limit.store(next.range.start, Ordering::Release);
            }
        }
        while let Some(head) = self.lanes.front() {
            let end = match (head.open, self.lanes.get(1)) {
                (true, Some(next)) if next.run.has_begun() => next.range.start,
                _ => head.range.end,
            };
            if self.position < end {
                break;
            }
            if !head.open {
                self.resources.ranges("done");
            }
            self.lanes.pop_front();
        }
        // What an open lane has passed while it did not come.
        while let Some(next) = self.lanes.get(1)
            && next.range.end <= self.position
        {
            self.lanes.remove(1);
            self.resources.ranges("passed");
        }
    }

    /// Begins lanes that are of use, and says whether more of them may be.
    fn go_ahead(&mut self) {
        let now = Instant::now();
        if self.looked.is_none_or(|at| now - at >= LOOK) {
            self.looked = Some(now);
            self.look(now);
        }
        if self.lanes.iter().any(|lane| !lane.own && !lane.run.has_ended()) {
            self.extras_at = Some(now);
        }
        if self.pauses() {
            self.waiting = None;
            self.give_way();
            return;
        }
        // What one was to bring that has given way, before others that have begun.
        if let Some(next) = self.lanes.front().map(|lane| lane.range.start)
            && next > self.position
        {
            let lane = self.own(self.position..next, false, How::Beside);
            self.lanes.push_front(lane);
        }
        // The own lane goes on as soon as it has ended. One that failed will be asked for again: the next one could have all the memory by then, and
        // keep it.
        let last = self.lanes.back().map_or(self.position, |lane| lane.range.end);
        let goes_on = |lane: &Lane| lane.own && (!lane.run.has_ended() || lane.run.has_failed());
        if last < self.size && !self.lanes.iter().any(goes_on) {
            // Extra lanes come and go.
            let narrow = self.extras_at.is_none_or(|at| now - at > LOOK * 4);
            let end = if narrow { self.size } else { self.end_of(last) };
            let lane = self.own(last..end, narrow, How::Beside);
            self.lanes.push_back(lane);
        }
        if !self.wide || !self.hungry {
            self.waiting = None;
        } else if self.waiting.is_none()
            && let Some(range) = self.next_extra(u64::MAX)
            && let Some(extra) = self.stream.extra()
            && let Some(kept) = self.keep(range.end - range.start)
        {
            let wish = Wish {
                owner: self.resources.origin.clone(),
                class: self.resources.class,
                kind: Kind::Part,
                bytes: range.end - range.start,
                deadline: self.resources.scheduler.deadline(self.resources.patience),
            };
            let ticket = self.resources.scheduler.ask(wish);
            self.waiting = Some(async move { (ticket.place().await, extra, kept) }.boxed());
        }
    }

    fn pauses(&self) -> bool {
        self.resources.wishes.borrow().pauses()
    }

    /// Gives up the connection of the own lane, if more is to come over it than is worth a request.
    fn give_way(&mut self) {
        let rest = self.size - self.position;
        let can = self.wide && self.gave_way < GIVES_WAY && rest > self.resources.shape.most;
        if let Some(lane) = self.lanes.front_mut()
            && can
            && lane.open
            && !lane.gave_way
        {
            // What it has brought is still read.
            lane.run.end();
            lane.gave_way = true;
            self.gave_way += 1;
            self.resources.ranges("gave_way");
        }
    }

    fn look(&mut self, now: Instant) {
        let ahead = self.lanes.iter().map(|lane| {
            let from = lane.range.start.max(self.position);
            lane.run.position().saturating_sub(from)
        });
        (self.resources.arrived)(self.position.saturating_add(ahead.sum()));
        if self.lanes.iter().any(|lane| lane.run.has_failed()) {
            self.wide = false;
        }
        let extras = self.lanes.iter().any(|lane| !lane.own);
        // What came out of order is handed on in bursts.
        let room = match extras {
            true => self.quarters.total() / 2,
            false => self.part.total() / 2,
        };
        self.hungry = self.unread.load(Ordering::Relaxed) < room;
        let hungry = self.hungry && self.wide && self.size - self.position > self.resources.shape.most;
        let grows = self.stream.look(hungry, !self.pauses());
        let soon = now - self.begin < TOLD || self.stream.allowed() > 0;
        (self.resources.grows)(grows && soon && self.wide);
        let Some(head) = self.lanes.front() else { return };
        let late = head.beside && !head.open && !head.doubled && !head.run.has_ended() && now - head.begin > SLOW;
        if late && self.hungry && self.is_slower(head, now) {
            let how = if self.wide { How::Beside } else { How::Plain };
            let twin = self.run(self.position..head.range.end, how, head.room.clone(), None);
            if let Some(head) = self.lanes.front_mut() {
                head.twin = Some(twin);
                head.doubled = true;
            }
        }
    }

    /// Whether `head` brings much less than the lanes beside it, and has long to go.
    fn is_slower(&self, head: &Lane, now: Instant) -> bool {
        let peers = self.lanes.iter().skip(1).filter(|lane| lane.run.has_begun());
        let rates: Vec<f64> = peers.map(|lane| lane.rate(now)).collect();
        let (rate, usual) = (head.rate(now), rates.iter().sum::<f64>() / rates.len().max(1) as f64);
        let rest = head.range.end.saturating_sub(head.run.position());
        rate * SLOWER < usual && rest as f64 > rate * SLOW.as_secs_f64()
    }

    /// How long ranges are now.
    fn length(&self) -> u64 {
        let Shape { least, most } = self.resources.shape;
        let lanes = self.stream.allowed() as u64 + 1;
        (self.quarters.total() / lanes).clamp(least, most)
    }

    /// The end of a range that begins at `start`; a small rest goes with it.
    fn end_of(&self, start: u64) -> u64 {
        let end = start.saturating_add(self.length());
        match self.size.saturating_sub(end) < self.resources.shape.least / 2 {
            true => self.size,
            false => end,
        }
    }

    /// The range of the next extra lane, of `most` bytes at most.
    fn next_extra(&self, most: u64) -> Option<Range<u64>> {
        // One that has given way ends nobody knows where.
        let last = self.lanes.back().filter(|lane| !lane.gave_way)?;
        let start = match last.open {
            // It goes on for as long as the other one takes.
            true => last.run.position().max(self.position) + self.length(),
            false => last.range.end,
        };
        let rest = self.size.saturating_sub(start);
        (rest >= self.resources.shape.least).then(|| start..self.end_of(start).min(start.saturating_add(most)))
    }

    /// Memory for a range, if there is some now.
    fn keep(&self, length: u64) -> Option<[Share; 2]> {
        // A share of more than there is would be all there is.
        if length > self.quarters.total() || length > self.resources.ahead.total() {
            return None;
        }
        Some([self.quarters.try_take(length)?, self.resources.ahead.try_take(length)?])
    }

    fn begin_extra(&mut self, place: Place, extra: Extra, kept: [Share; 2]) {
        let Some(range) = self.next_extra(kept[0].bytes()) else {
            return;
        };
        let room = Room::Kept(Arc::new(kept));
        let run = self.run(range.clone(), How::Beside, room.clone(), Some((place, extra)));
        self.lanes
            .push_back(Lane::new(range, false, false, How::Beside, room, run));
    }

    fn own(&self, range: Range<u64>, open: bool, how: How) -> Lane {
        let room = Room::Own {
            part: Arc::clone(&self.part),
            all: Arc::clone(&self.resources.memory),
        };
        let pauses = open.then(|| self.resources.wishes.clone());
        let run = self.start(range.clone(), how, room.clone(), None, pauses);
        Lane::new(range, true, open, how, room, run)
    }

    /// The lane that is waited for has failed: it is asked for once more, plainly.
    fn again(&mut self, fault: Fault) -> Result<(), Fault> {
        self.wide = false;
        let Some(head) = self.lanes.front_mut() else {
            return Err(fault);
        };
        if let Some(twin) = head.twin.take() {
            head.run = twin;
            return Ok(());
        }
        if !head.beside || matches!(fault, Fault::Disk(_)) {
            return Err(fault);
        }
        tracing::debug!(
            blob = self.blob.describe(),
            ?fault,
            "a range beside others failed; on over one connection"
        );
        self.resources.ranges("failed");
        let (end, room, open) = (head.range.end, head.room.clone(), head.open);
        let pauses = open.then(|| self.resources.wishes.clone());
        let run = self.start(self.position..end, How::Plain, room, None, pauses);
        if let Some(head) = self.lanes.front_mut() {
            head.run = run;
            head.beside = false;
            head.gave_way = false;
        }
        Ok(())
    }

    fn run(&self, range: Range<u64>, how: How, room: Room, held: Option<(Place, Extra)>) -> Run {
        self.start(range, how, room, held, None)
    }

    fn start(
        &self,
        range: Range<u64>,
        how: How,
        room: Room,
        held: Option<(Place, Extra)>,
        pauses: Option<watch::Receiver<Wishes>>,
    ) -> Run {
        let report = Arc::new(Report {
            position: AtomicU64::new(range.start),
            limit: AtomicU64::new(range.end),
            begun: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            took: AtomicU64::new(0),
        });
        let (out, arrivals) = mpsc::unbounded_channel();
        let task = Task {
            blob: Arc::clone(&self.blob),
            range,
            how,
            room,
            report: Arc::clone(&report),
            pauses,
            patience: self.resources.patience,
            link: Arc::clone(self.stream.link()),
            traffic: self.resources.scheduler.traffic(&self.resources.origin.host),
            fetched: self.resources.fetched.clone(),
            wake: Arc::clone(&self.wake),
        };
        Run {
            arrivals,
            report,
            task: AbortOnDropHandle::new(tokio::spawn(task.run(out, held))),
        }
    }
}

#[cfg(test)]
mod tests;
