//! The service manager, if there is one: systemd, or what speaks like it. It is told how things stand (`NOTIFY_SOCKET`), it keeps descriptors over
//! a restart of the whole service (its *fd store*), and gives them back at the next start (`LISTEN_FDS`).

use std::ffi::OsString;
use std::os::fd::BorrowedFd;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use super::link::{Held, NAMES};
use crate::sys::descriptors;

/// The first descriptor that is passed, and the variables that say so.
const FIRST: i32 = 3;
const PID: &str = "LISTEN_PID";
const COUNT: &str = "LISTEN_FDS";
const FD_NAMES: &str = "LISTEN_FDNAMES";
const SOCKET: &str = "NOTIFY_SOCKET";
/// How many descriptors are stored at most; systemd says so since version 254.
const STORE: &str = "FDSTORE";
const WATCHDOG: &str = "WATCHDOG_USEC";
/// Variables that mean this process alone: programs that it starts must not believe them.
pub(super) const OWN_VARIABLES: [&str; 7] = [PID, COUNT, FD_NAMES, SOCKET, STORE, WATCHDOG, "WATCHDOG_PID"];

/// The service manager.
pub(super) struct Manager {
    socket: Option<UnixDatagram>,
    /// Whether it keeps descriptors.
    pub(super) stores: bool,
    /// How often it wants to hear that all is well.
    pub(super) watchdog: Option<Duration>,
}

impl Manager {
    /// The one that has started this process.
    pub(super) fn new() -> Self {
        let number = |name| {
            std::env::var(name)
                .ok()?
                .parse::<u64>()
                .ok()
                .filter(|number| *number > 0)
        };
        let socket = std::env::var_os(SOCKET).and_then(|path| {
            let connected = connect(&path);
            if let Err(error) = &connected {
                tracing::warn!(%error, path = %path.display(), "the service manager cannot be told anything");
            }
            connected.ok()
        });
        Manager {
            stores: socket.is_some() && number(STORE).is_some(),
            watchdog: number(WATCHDOG).map(Duration::from_micros),
            socket,
        }
    }

    /// Tells it something.
    pub(super) fn tell(&self, text: &str, fds: &[BorrowedFd<'_>]) {
        if let Some(socket) = &self.socket
            && let Err(error) = descriptors::send(socket, text.as_bytes(), fds)
        {
            tracing::warn!(%error, text, "the service manager cannot be told");
        }
    }
}

fn connect(path: &OsString) -> std::io::Result<UnixDatagram> {
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(path)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    Ok(socket)
}

/// What the service manager has kept for this process. To be called once, before any other descriptor is opened.
pub(super) fn kept() -> Held {
    let text = |name| std::env::var(name).unwrap_or_default();
    if text(PID) != std::process::id().to_string() {
        return Held::new();
    }
    let count = text(COUNT).parse::<i32>().unwrap_or(0).clamp(0, 1024);
    let names = text(FD_NAMES);
    let names = names
        .split(':')
        .map(str::to_owned)
        .chain(std::iter::repeat(String::new()));
    let mut held = Held::new();
    for (number, name) in (FIRST..FIRST + count).zip(names) {
        match descriptors::inherited(number) {
            Ok(fd) if NAMES.contains(&name.as_str()) => drop(held.insert(name, fd)),
            // What nobody knows is closed.
            _ => {}
        }
    }
    held
}
