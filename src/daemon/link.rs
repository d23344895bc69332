//! What a worker and its supervisor say to each other, and what both say to systemd: the words of sd_notify(3).
//!
//! Between supervisor and worker is a pair of sockets. The first message goes to the worker: what is known of its predecessor, and the
//! descriptors that outlived it, by name. After that the worker speaks, in lines `NAME=value`, one state per message: `READY=1`,
//! `WATCHDOG=1`, `FDSTORE=1` with `FDNAME=` and a descriptor, `FDSTOREREMOVE=1` with `FDNAME=`. The supervisor keeps what is stored, and
//! passes every message on to systemd.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use crate::sys::descriptors;

/// Descriptors by their names.
pub(super) type Held = BTreeMap<String, OwnedFd>;

/// Names of what outlives a worker: the FUSE connection, containerd's socket, and what is to be known of both.
pub(super) const FUSE: &str = "lazuli-fuse";
pub(super) const SOCKET: &str = "lazuli-socket";
pub(super) const STATE: &str = "lazuli-state";
pub(super) const NAMES: [&str; 3] = [FUSE, SOCKET, STATE];

/// A message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Message {
    /// The worker serves.
    Ready,
    /// It is well.
    Watchdog,
    /// Keep the descriptor that comes with it.
    Store(String),
    /// Forget a descriptor.
    Forget(String),
}

impl Message {
    pub(super) fn text(&self) -> String {
        match self {
            Message::Ready => "READY=1".to_owned(),
            Message::Watchdog => "WATCHDOG=1".to_owned(),
            Message::Store(name) => format!("FDSTORE=1\nFDNAME={name}"),
            Message::Forget(name) => format!("FDSTOREREMOVE=1\nFDNAME={name}"),
        }
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        let name = || field("FDNAME").map(str::to_owned);
        if field("FDSTORE").is_some() {
            return name().map(Message::Store);
        }
        if field("FDSTOREREMOVE").is_some() {
            return name().map(Message::Forget);
        }
        match (field("READY"), field("WATCHDOG")) {
            (Some("1"), _) => Some(Message::Ready),
            (_, Some("1")) => Some(Message::Watchdog),
            _ => None,
        }
    }
}

/// What a worker is told at first.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Hello {
    /// Workers that the supervisor has started before this one.
    pub(super) before: u64,
    /// When the last of them died, by the clock of [`now`].
    pub(super) died: Option<Duration>,
    /// How often systemd wants to hear that all is well, if it does.
    pub(super) watchdog: Option<Duration>,
}

impl Hello {
    pub(super) fn send(&self, link: impl AsFd, held: &Held) -> io::Result<()> {
        let micros = |time: Option<Duration>| time.map_or_else(String::new, |time| time.as_micros().to_string());
        let names: Vec<&str> = held.keys().map(String::as_str).collect();
        let text = format!(
            "BEFORE={}\nDIED={}\nWATCHDOG={}\nNAMES={}",
            self.before,
            micros(self.died),
            micros(self.watchdog),
            names.join(":")
        );
        let fds: Vec<BorrowedFd<'_>> = held.values().map(AsFd::as_fd).collect();
        descriptors::send(link, text.as_bytes(), &fds)
    }

    fn parse(text: &str, fds: Vec<OwnedFd>) -> (Self, Held) {
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        let micros = |name: &str| Some(Duration::from_micros(field(name)?.parse().ok()?));
        let names = field("NAMES").unwrap_or_default().split(':').map(str::to_owned);
        let hello = Hello {
            before: field("BEFORE").and_then(|text| text.parse().ok()).unwrap_or(0),
            died: micros("DIED"),
            watchdog: micros("WATCHDOG"),
        };
        (hello, names.zip(fds).collect())
    }
}

/// The worker's end.
pub struct Link {
    socket: OwnedFd,
    pub(super) hello: Hello,
}

impl Link {
    /// Takes the supervisor's word and what it holds.
    ///
    /// # Errors
    /// When there is no supervisor (any more).
    pub(super) fn open(socket: OwnedFd) -> io::Result<(Self, Held)> {
        let (text, fds) = descriptors::receive(&socket, true)?;
        if text.is_empty() {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        let (hello, held) = Hello::parse(&String::from_utf8_lossy(&text), fds);
        Ok((Link { socket, hello }, held))
    }

    /// Says something. A supervisor that is gone takes this process with it; there is nothing to do about that here.
    pub(super) fn say(&self, message: &Message, fd: Option<BorrowedFd<'_>>) {
        if let Err(error) = descriptors::send(&self.socket, message.text().as_bytes(), fd.as_slice()) {
            tracing::warn!(%error, ?message, "the supervisor cannot be told");
        }
    }

    /// Has the supervisor keep a descriptor under this name, instead of what it has under it.
    pub(super) fn store(&self, name: &str, fd: BorrowedFd<'_>) {
        self.say(&Message::Forget(name.to_owned()), None);
        self.say(&Message::Store(name.to_owned()), Some(fd));
    }

    /// Has it forget everything: what comes next begins anew.
    pub(super) fn forget_all(&self) {
        for name in NAMES {
            self.say(&Message::Forget(name.to_owned()), None);
        }
    }
}

/// Time since the machine was started, the same for all processes.
pub(super) fn now() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = Duration::from_secs(u64::try_from(time.tv_sec).unwrap_or(0));
    seconds + Duration::from_nanos(u64::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_those_of_sd_notify() {
        for message in [
            Message::Ready,
            Message::Watchdog,
            Message::Store("a-b".to_owned()),
            Message::Forget("c".to_owned()),
        ] {
            assert_eq!(Message::parse(&message.text()), Some(message));
        }
        assert_eq!(Message::parse("READY=1\n"), Some(Message::Ready));
        for text in ["", "READY=0", "FDSTORE=1", "STATUS=READY=1", "nonsense"] {
            assert_eq!(Message::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_worker_learns_what_outlived_its_predecessor() {
        let (ours, theirs) = descriptors::pair().unwrap();
        let hello = Hello {
            before: 3,
            died: Some(Duration::from_micros(1234)),
            watchdog: None,
        };
        let held: Held = ["x", "y"]
            .map(|name| (name.to_owned(), descriptors::memory(name, name.as_bytes()).unwrap()))
            .into();
        hello.send(&ours, &held).unwrap();
        let (link, got) = Link::open(theirs).unwrap();
        assert_eq!(link.hello, hello);
        assert_eq!(got.len(), 2);
        for (name, fd) in got {
            assert_eq!(descriptors::read_memory(fd, 10).unwrap(), name.as_bytes());
        }
        link.store("z", ours.as_fd());
        let texts: Vec<_> = (0..2).map(|_| descriptors::receive(&ours, false).unwrap()).collect();
        assert_eq!(texts.iter().map(|(_, fds)| fds.len()).collect::<Vec<_>>(), [0, 1]);

        Hello::default().send(&ours, &Held::new()).unwrap();
        drop(link);
        let (ours, theirs) = descriptors::pair().unwrap();
        drop(ours);
        assert!(Link::open(theirs).is_err());
    }
}
