//! What a worker leaves to the next one, and what it finds.
//!
//! Three descriptors, kept by the supervisor and by systemd: the FUSE connection, containerd's socket, and a file in memory that says what is to be
//! known of both, as JSON. Without that file the others are worth nothing; it is stored last. The socket is worth something only while its
//! path leads to it.

use std::fs::Metadata;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::link::{FUSE, Held, Link, SOCKET, STATE};
use crate::fs::{Carried, Faces, Legacy};
use crate::sys::descriptors;

/// Most bytes of the file in memory; it takes some hundred.
const STATE_MAX: u64 = 1 << 20;

/// What is to be known of the descriptors.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    fuse: Carried,
    socket: Place,
}

/// Where a socket is seen: its path, and which file that is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Place {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Place {
    fn of(path: &Path) -> io::Result<Self> {
        let file: Metadata = std::fs::symlink_metadata(path)?;
        Ok(Place {
            path: path.to_owned(),
            device: file.dev(),
            inode: file.ino(),
        })
    }
}

/// What an earlier worker has left.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// The FUSE connection.
    pub(super) fuse: Option<Legacy>,
    /// The listening socket, if it is at the path where it is wanted.
    pub(super) socket: Option<UnixListener>,
}

impl Found {
    /// What is in `held`. What cannot be used is closed, and the reason logged.
    pub(super) fn new(mut held: Held, address: &Path) -> Self {
        let Some(state) = held.remove(STATE) else {
            return Found::default();
        };
        let read =
            || -> io::Result<State> { Ok(serde_json::from_slice(&descriptors::read_memory(&state, STATE_MAX)?)?) };
        let state = match read() {
            Ok(state) => state,
            Err(error) => {
                tracing::error!(%error, "what an earlier process has left cannot be read, and is given up");
                return Found::default();
            }
        };
        let is_there = Place::of(address).is_ok_and(|place| place == state.socket);
        let socket = held.remove(SOCKET).filter(|_| is_there).map(UnixListener::from);
        let fuse = held.remove(FUSE).map(|device| Legacy {
            device,
            carried: state.fuse,
        });
        Found { fuse, socket }
    }
}

/// Stores with the supervisor what the next worker needs.
pub(super) fn leave(link: &Link, faces: &Faces, socket: &UnixListener, address: &Path) -> io::Result<()> {
    let Some((device, fuse)) = faces.carry() else {
        return Err(io::Error::other("the FUSE mount is not to be seen"));
    };
    let state = State {
        fuse,
        socket: Place::of(address)?,
    };
    let state = descriptors::memory(STATE, &serde_json::to_vec(&state)?)?;
    link.store(SOCKET, socket.as_fd());
    link.store(FUSE, device);
    link.store(STATE, state.as_fd());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_known_by_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        assert!(Place::of(&path).is_err());
        let _first = UnixListener::bind(&path).unwrap();
        let place = Place::of(&path).unwrap();
        assert_eq!(Place::of(&path).unwrap(), place);
        std::fs::rename(&path, dir.path().join("kept")).unwrap();
        let _second = UnixListener::bind(&path).unwrap();
        assert_ne!(Place::of(&path).unwrap(), place);
    }

    #[test]
    fn what_cannot_be_read_is_given_up() {
        let state = descriptors::memory(STATE, b"{\"fuse\": 7}").unwrap();
        let fuse = descriptors::memory(FUSE, b"").unwrap();
        let held: Held = [(STATE.to_owned(), state), (FUSE.to_owned(), fuse)].into();
        let found = Found::new(held, Path::new("/nowhere"));
        assert!(found.fuse.is_none() && found.socket.is_none());
        assert!(Found::new(Held::new(), Path::new("/nowhere")).fuse.is_none());
    }
}
