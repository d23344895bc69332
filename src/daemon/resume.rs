//! How a supervisor goes on as another program: `exec` keeps the process, its child and the descriptors that are let through, and an option
//! says which is which.
//!
//! ```text
//! --resume worker=4711,link=5,client=6,started=3,fd=7:lazuli-fuse,fd=8:lazuli-state
//! ```
//! This is read by the *new* program, of whatever version: fields that it does not know are passed over, and none may change its meaning.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd, RawFd};

use rustix::process::Pid;

use super::link::Held;
use crate::sys::descriptors;

/// The hidden option.
pub const RESUME_OPTION: &str = "--resume";

/// What the program before this one has left.
#[derive(Debug)]
pub(super) struct Resume {
    pub(super) worker: Pid,
    pub(super) link: OwnedFd,
    pub(super) client: OwnedFd,
    pub(super) started: u64,
    pub(super) held: Held,
}

/// The value of the option.
pub(super) fn text(worker: Pid, link: BorrowedFd<'_>, client: BorrowedFd<'_>, started: u64, held: &Held) -> OsString {
    let mut text = format!(
        "worker={},link={},client={},started={started}",
        worker.as_raw_nonzero(),
        link.as_raw_fd(),
        client.as_raw_fd()
    );
    for (name, fd) in held {
        text.push_str(&format!(",fd={}:{name}", fd.as_raw_fd()));
    }
    text.into()
}

impl Resume {
    /// Takes over what the option says. To be called once, before any other descriptor is opened.
    pub(super) fn take(text: &str) -> io::Result<Self> {
        let odd = || io::Error::new(io::ErrorKind::InvalidInput, format!("{RESUME_OPTION} {text}"));
        let fields = || text.split(',').filter_map(|field| field.split_once('='));
        let number = |name: &str| {
            let (_, value) = fields().find(|(field, _)| *field == name).ok_or_else(odd)?;
            value.parse::<i32>().map_err(|_| odd())
        };
        let fd = |number: RawFd| descriptors::inherited(number);
        let mut held = Held::new();
        for (_, value) in fields().filter(|(field, _)| *field == "fd") {
            let (number, name) = value.split_once(':').ok_or_else(odd)?;
            held.insert(name.to_owned(), fd(number.parse().map_err(|_| odd())?)?);
        }
        Ok(Resume {
            worker: Pid::from_raw(number("worker")?).ok_or_else(odd)?,
            link: fd(number("link")?)?,
            client: fd(number("client")?)?,
            started: number("started")?.unsigned_abs().into(),
            held,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd as _, IntoRawFd as _};

    use super::*;

    #[test]
    fn what_is_left_is_found() {
        let open = || descriptors::memory("x", b"x").unwrap();
        let (link, client) = (open(), open());
        let held: Held = ["b", "a"].map(|name| (name.to_owned(), open())).into();
        let pid = Pid::from_raw(4711).unwrap();
        let text = text(pid, link.as_fd(), client.as_fd(), 3, &held);
        let text = format!("{},later=news", text.to_str().unwrap());
        // As `exec` would: the numbers stay, and nobody owns them.
        for fd in held.into_values().chain([link, client]) {
            let _ = fd.into_raw_fd();
        }
        let resume = Resume::take(&text).unwrap();
        assert_eq!((resume.worker, resume.started), (pid, 3));
        assert_eq!(resume.held.keys().collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "worker=1",
            "worker=x,link=1,client=1,started=1",
            "worker=1,link=999999,client=1,started=1",
        ] {
            assert!(Resume::take(text).is_err(), "{text}");
        }
    }
}
