//! The supervisor: what `lazuli serve` is. It holds the descriptors that containers depend on, and keeps a worker running, which does all the work.
//!
//! It has no threads, no runtime and no opinion: it waits in `poll`, and knows nothing of what it holds. A worker stores descriptors with it
//! by sd_notify's words (link.rs), and the next worker gets them. It passes signals and notifications on.
//!
//! | what happens | what it does |
//! |---|---|
//! | the worker dies, and descriptors are held | starts the next one at once; one that keeps dying ever later, 5 s at most |
//! | the worker ends, and none are held | ends with the same code: there is nothing to go on with |
//! | SIGTERM, and the service manager keeps the descriptors | the worker leaves everything as it is (SIGUSR1), both end |
//! | SIGTERM otherwise or with `--drain`; SIGINT, SIGHUP | the worker unmounts everything, both end |
//! | `lazuli upgrade` | see [`upgrade`](super::upgrade): a worker of the new program, and when that serves, `exec` |
//! | it dies itself | the kernel kills the worker (`PR_SET_PDEATHSIG`); with the last descriptor the connection ends |

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;

use super::link::{Held, Hello, Message, now};
use super::manager::{self, Manager};
use super::resume::{self, RESUME_OPTION, Resume};
use super::upgrade::{Client, Door};
use super::worker::{End, Worker};
use super::{DaemonError, io_error};
use crate::sys::descriptors;
use crate::sys::signals::Signals;

/// This very program, whatever has become of the file that it was.
const SELF: &str = "/proc/self/exe";
/// How long it sleeps at most while there is a worker. All news come by descriptors but one: a worker that is dead except for threads
/// which the kernel does not let go.
const TICK: Duration = Duration::from_secs(1);
/// A worker that served for less than this has failed: one that dies of a request does so at once, since that is sent again.
const SHORT: Duration = Duration::from_millis(250);
/// Failures in a row after which the next start waits; how long at first, doubled for each further one; and the longest wait.
const FREE_FAILURES: u32 = 3;
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// How long a worker may take to end when it is told to, before it is killed. It has deadlines of its own, which end before.
const END_WAIT: Duration = Duration::from_secs(20);
/// How long a worker of a new program may take until it serves.
const START_WAIT: Duration = Duration::from_secs(60);

/// What the supervisor is started with.
pub struct Supervision {
    /// Arguments for workers.
    pub args: Vec<OsString>,
    /// Whether SIGTERM unmounts everything.
    pub drain: bool,
    /// The root directory.
    pub root: PathBuf,
    /// What the program before this one has left, after an upgrade.
    pub resume: Option<String>,
}

struct Supervisor {
    options: Supervision,
    manager: Manager,
    signals: Signals,
    held: Held,
    program: PathBuf,
    worker: Option<Worker>,
    /// Since when the worker is dead but for some threads.
    half_dead: Option<Instant>,
    /// Workers that were given up as such, until they can be collected.
    lingering: Vec<Worker>,
    /// Workers started so far.
    started: u64,
    /// When the last one died.
    died: Option<Duration>,
    failures: u32,
    /// When the next worker is started.
    next: Instant,
    stopping: Option<Instant>,
    door: Option<Door>,
    upgrade: Option<Upgrade>,
}

/// An upgrade under way.
struct Upgrade {
    client: Client,
    program: PathBuf,
    /// Whether the new program's worker is started.
    is_started: bool,
    until: Instant,
}

/// Supervises until a signal ends it, or its worker ends with nothing to go on with. Gives the exit code.
///
/// # Errors
/// [`DaemonError::Io`] when it cannot begin.
pub fn supervise(options: Supervision) -> Result<u8, DaemonError> {
    let resumed = options.resume.as_deref().map(Resume::take).transpose();
    let resumed = resumed.map_err(io_error("going on after an upgrade"))?;
    let held = match &resumed {
        Some(_) => Held::new(),
        None => manager::kept(),
    };
    // SIGUSR1 for the worker, which is not to die of it before it listens.
    let mut wanted = vec![libc::SIGTERM, libc::SIGINT, libc::SIGCHLD, libc::SIGUSR1];
    if !super::stop::is_hangup_ignored() {
        wanted.push(libc::SIGHUP);
    }
    let signals = Signals::block(&wanted).map_err(io_error("listening to signals"))?;
    let mut supervisor = Supervisor {
        manager: Manager::new(),
        signals,
        held,
        program: PathBuf::from(SELF),
        worker: None,
        half_dead: None,
        lingering: Vec::new(),
        started: 0,
        died: None,
        failures: 0,
        next: Instant::now(),
        stopping: None,
        door: None,
        upgrade: None,
        options,
    };
    // Older managers do not say that they keep descriptors, but these come from somewhere.
    supervisor.manager.stores |= !supervisor.held.is_empty();
    if let Some(resumed) = resumed {
        supervisor.resume(resumed);
    }
    supervisor.run()
}

impl Supervisor {
    fn run(mut self) -> Result<u8, DaemonError> {
        loop {
            if self.worker.is_none() && self.next <= Instant::now() {
                self.start()?;
            }
            self.wait();
            while let Some(number) = self.signals.next() {
                self.signal(number);
            }
            self.hear();
            self.visit();
            if let Some(end) = self.worker.as_ref().and_then(Worker::ended) {
                // What it said last may be what it has stored.
                self.hear();
                if let Some(code) = self.worker.take().and_then(|worker| self.ended(&worker, end)) {
                    return Ok(self.finish(code));
                }
            }
            if self.worker.is_none() && self.stopping.is_some() {
                return Ok(self.finish(0));
            }
            self.tick();
        }
    }

    fn finish(&mut self, code: u8) -> u8 {
        if let Some(door) = self.door.take() {
            door.close();
        }
        code
    }

    /// Waits for news.
    fn wait(&self) {
        let now = Instant::now();
        let until = |at: Instant| at.saturating_duration_since(now);
        let mut time = match self.worker {
            Some(_) => TICK,
            None => until(self.next),
        };
        if let Some(upgrade) = &self.upgrade {
            time = time.min(until(upgrade.until));
        }
        let time = Timespec {
            tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: time.subsec_nanos().into(),
        };
        let mut fds = vec![PollFd::new(&self.signals, PollFlags::IN)];
        fds.extend(
            self.worker
                .iter()
                .map(|worker| PollFd::new(&worker.link, PollFlags::IN)),
        );
        fds.extend(self.door.iter().map(|door| PollFd::new(door, PollFlags::IN)));
        // Interrupted or not, everything is looked at.
        let _ = poll(&mut fds, Some(&time));
        // A worker that is about to die has closed its end: that would be news without an end.
        let closed = fds.get(1).is_some_and(|fd| fd.revents().contains(PollFlags::HUP));
        if closed && self.worker.is_some() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn start(&mut self) -> Result<(), DaemonError> {
        let hello = Hello {
            before: self.started,
            died: self.died,
            watchdog: self.manager.watchdog,
        };
        match Worker::start(&self.program, &self.options.args, &hello, &self.held) {
            Ok(worker) => {
                tracing::debug!(pid = %worker.pid, "a worker is started");
                self.started += 1;
                self.worker = Some(worker);
                Ok(())
            }
            Err(error) if self.held.is_empty() => Err(io_error("starting a worker")(error)),
            Err(error) => {
                tracing::error!(%error, program = %self.program.display(), "no worker can be started");
                self.fail_upgrade(&format!("it cannot be started: {error}"));
                self.failures += 1;
                self.next = Instant::now() + self.pause();
                Ok(())
            }
        }
    }

    /// How long to wait before the next start.
    fn pause(&self) -> Duration {
        pause_after(self.failures)
    }

    fn signal(&mut self, number: i32) {
        let stop = match number {
            libc::SIGTERM => Signal::TERM,
            libc::SIGINT => Signal::INT,
            libc::SIGHUP => Signal::HUP,
            // Whoever has ended is found without it.
            _ => return,
        };
        if self.stopping.is_none() {
            self.manager.tell("STOPPING=1", &[]);
            self.stopping = Some(Instant::now());
        }
        let hands_over = stop == Signal::TERM && self.manager.stores && !self.options.drain;
        if let Some(worker) = &self.worker {
            worker.send(if hands_over { Signal::USR1 } else { stop });
        }
    }

    /// Takes what the worker says.
    fn hear(&mut self) {
        loop {
            let Some(worker) = &mut self.worker else { return };
            let Ok((text, fds)) = descriptors::receive(&worker.link, false) else {
                return;
            };
            if text.is_empty() {
                return;
            }
            let text = String::from_utf8_lossy(&text).into_owned();
            let borrowed: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
            self.manager.tell(&text, &borrowed);
            match Message::parse(&text) {
                Some(Message::Ready) => {
                    worker.ready = Some(Instant::now());
                    self.is_ready();
                }
                Some(Message::Store(name)) => drop(fds.into_iter().next().map(|fd| self.held.insert(name, fd))),
                Some(Message::Forget(name)) => drop(self.held.remove(&name)),
                Some(Message::Watchdog) | None => {}
            }
        }
    }

    fn is_ready(&mut self) {
        if self.door.is_none() {
            // The root directory is this daemon's by now.
            match Door::open(&self.options.root) {
                Ok(door) => self.door = Some(door),
                Err(error) => tracing::error!(%error, "`lazuli upgrade` cannot reach this daemon"),
            }
        }
        if self.upgrade.as_ref().is_some_and(|upgrade| upgrade.is_started) {
            self.become_new();
        }
    }

    /// Hears who asks for an upgrade, and begins it.
    fn visit(&mut self) {
        let Some(Ok((client, program))) = self.door.as_ref().map(Door::visitor) else {
            return;
        };
        let refuse = |client: Client, reason: &str| client.answer(Err(reason.to_owned()));
        if self.stopping.is_some() {
            return refuse(client, "the daemon ends");
        }
        if self.upgrade.is_some() {
            return refuse(client, "an upgrade is under way");
        }
        tracing::info!(program = %program.display(), "a new program takes over");
        self.upgrade = Some(Upgrade {
            client,
            program,
            is_started: false,
            until: Instant::now() + END_WAIT,
        });
        match &self.worker {
            Some(worker) => worker.send(Signal::USR1),
            None => self.start_new(),
        }
    }

    /// Has the next worker be one of the new program.
    fn start_new(&mut self) {
        if let Some(upgrade) = &mut self.upgrade {
            upgrade.is_started = true;
            upgrade.until = Instant::now() + START_WAIT;
            self.program.clone_from(&upgrade.program);
            self.next = Instant::now();
        }
    }

    /// The old program goes on.
    fn fail_upgrade(&mut self, reason: &str) {
        let Some(upgrade) = self.upgrade.take() else { return };
        let program = upgrade.program.display();
        tracing::error!(%program, reason, "the new program does not take over");
        self.program = PathBuf::from(SELF);
        self.next = Instant::now();
        upgrade.client.answer(Err(format!(
            "{program} does not take over: {reason}; what ran before goes on"
        )));
    }

    /// Decides what comes after a worker; gives the exit code if nothing does.
    fn ended(&mut self, worker: &Worker, end: End) -> Option<u8> {
        self.died = Some(now());
        self.half_dead = None;
        if self.stopping.is_some() {
            return Some(end.code());
        }
        match self.upgrade.as_ref().map(|upgrade| upgrade.is_started) {
            Some(false) => {
                self.start_new();
                return None;
            }
            Some(true) => {
                self.fail_upgrade(&format!("its worker ended with {end} before it served; see the log"));
                return None;
            }
            None => {}
        }
        if self.held.is_empty() {
            return Some(end.code());
        }
        let served = worker.ready.map_or(Duration::ZERO, |since| since.elapsed());
        self.failures = if served < SHORT { self.failures + 1 } else { 0 };
        let pause = self.pause();
        self.next = Instant::now() + pause;
        tracing::error!(%end, pause_seconds = pause.as_secs_f64(), "the worker has ended; the next one goes on");
        None
    }

    fn tick(&mut self) {
        self.lingering.retain(|worker| worker.ended().is_none());
        self.look_for_half_dead();
        let now = Instant::now();
        let Some(worker) = &self.worker else { return };
        if self.stopping.is_some_and(|since| now.duration_since(since) > END_WAIT) {
            worker.send(Signal::KILL);
        }
        let late = self.upgrade.as_ref().filter(|upgrade| upgrade.until <= now);
        match late.map(|upgrade| upgrade.is_started) {
            Some(false) => worker.send(Signal::KILL),
            Some(true) => {
                worker.send(Signal::KILL);
                let reason = format!("it did not serve within {} s", START_WAIT.as_secs());
                self.fail_upgrade(&reason);
            }
            None => {}
        }
    }

    /// A worker whose threads wait in the kernel for its own answers does not end: nobody is told, and nobody can collect it. The next one
    /// answers them.
    fn look_for_half_dead(&mut self) {
        if !self.worker.as_ref().is_some_and(Worker::is_half_dead) {
            self.half_dead = None;
            return;
        }
        let since = *self.half_dead.get_or_insert_with(Instant::now);
        // Every process is for a moment.
        if since.elapsed() < TICK / 2 {
            return;
        }
        tracing::warn!("the worker is dead, but some of its threads wait for answers");
        if let Some(worker) = self.worker.take() {
            // Nothing to end with: without the next worker it would stay for ever.
            let _ = self.ended(&worker, End::Unknown);
            self.lingering.push(worker);
        }
    }

    /// Goes on as the program of an upgrade, whose worker serves by now. Comes back only if that fails.
    fn become_new(&mut self) {
        let (Some(upgrade), Some(worker)) = (self.upgrade.take(), &self.worker) else {
            return;
        };
        let client = upgrade.client.as_fd();
        let text = resume::text(worker.pid, worker.link.as_fd(), client, self.started, &self.held);
        let fds: Vec<_> = self.held.values().map(AsFd::as_fd).collect();
        let fds = || fds.iter().copied().chain([worker.link.as_fd(), client]);
        let all = |through: bool| fds().try_for_each(|fd| descriptors::inherit(fd, through));
        let error = match all(true) {
            Ok(()) => Command::new(&upgrade.program)
                .args(&self.options.args)
                .arg(RESUME_OPTION)
                .arg(text)
                .exec(),
            Err(error) => error,
        };
        let _ = all(false);
        tracing::error!(%error, program = %upgrade.program.display(), "the supervisor stays the old program");
        upgrade.client.answer(Err(format!(
            "the new program serves, but its supervisor is still the old one: {error}"
        )));
    }

    /// Goes on where the program before this one stopped.
    fn resume(&mut self, resumed: Resume) {
        self.held = resumed.held;
        self.started = resumed.started;
        self.worker = Some(Worker {
            pid: resumed.worker,
            link: resumed.link,
            ready: Some(Instant::now()),
        });
        self.is_ready();
        let version = env!("CARGO_PKG_VERSION");
        tracing::info!(version, "the supervisor goes on as the new program");
        Client::from_fd(resumed.client).answer(Ok(format!("version {version} serves")));
    }
}

/// How long to wait after so many workers, one after the other, that have served no time to speak of.
fn pause_after(failures: u32) -> Duration {
    match failures.checked_sub(FREE_FAILURES) {
        None | Some(0) => Duration::ZERO,
        Some(more) => LONGEST_WAIT.min(FIRST_WAIT.saturating_mul(1 << (more - 1).min(16))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kill costs nobody any time, and a loop of crashes no processor.
    #[test]
    fn workers_that_fail_again_and_again_are_started_more_and_more_seldom() {
        let pauses: Vec<Duration> = (0..40).map(pause_after).collect();
        assert_eq!(pauses[..4], [Duration::ZERO; 4], "the first few are free");
        assert_eq!(pauses[4], FIRST_WAIT);
        assert!(pauses.windows(2).all(|two| two[1] >= two[0]));
        assert_eq!(pauses[39], LONGEST_WAIT);
        assert_eq!(pause_after(u32::MAX), LONGEST_WAIT);
    }
}
