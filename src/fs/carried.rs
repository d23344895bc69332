//! What a process has to know of a FUSE connection that an earlier one has opened: the descriptor alone does not tell.
//!
//! # The handshake of the next process
//! The kernel sends INIT once, to the first process, and both keep what they agreed on. fuser begins each session with that handshake. So it
//! is always had over a pair of sockets, on which this room plays the kernel: it sends the INIT that the kernel sent, and takes fuser's answer.
//! The first process passes the answer on to the kernel; a later one compares it with the first one's. Then the number of fuser's descriptor
//! is made to mean the connection itself ([`sys::fuse::replace`]).
//!
//! # What cannot be carried
//! A connection on which requests were read and not answered, where the kernel cannot send them once more (before Linux 6.9): who waits for
//! them would wait for ever. It is ended, as without a take-over.

use std::os::fd::{AsFd as _, OwnedFd};

use fuser::{Config, SessionACL};
use serde::{Deserialize, Serialize};

use super::face::Face;
use super::faces::Serving;
use crate::sys::mountinfo::{Mount, mount_at};
use crate::sys::{self, descriptors};

/// Version of [`Carried`]. One of another version is not used: the connection is ended then.
const VERSION: u32 = 1;

/// What is to be known of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carried {
    version: u32,
    /// The kernel's INIT request, and the answer.
    pub(super) init: Vec<u8>,
    pub(super) answer: Vec<u8>,
    /// Device number of the file system: its number in `/sys/fs/fuse/connections`.
    pub(super) major: u32,
    pub(super) minor: u32,
    /// Whether the opening of files is answered. Once it is not, the kernel never asks again.
    pub(super) direct: bool,
    /// Which face serves, as the first process found out.
    pub(super) serving: Serving,
    /// Whether files of the cache can be mounted.
    pub(super) files: bool,
}

impl Carried {
    pub(super) fn new(hands: &Handshake, mount: &Mount, direct: bool, serving: Serving, files: bool) -> Self {
        Carried {
            version: VERSION,
            init: hands.init.clone(),
            answer: hands.answer.clone(),
            major: mount.major,
            minor: mount.minor,
            direct,
            serving,
            files,
        }
    }

    /// Why the connection `device` cannot go on at the mount point `mountpoint`, if it cannot.
    pub(super) fn obstacle(&self, device: &OwnedFd, mountpoint: &std::path::Path) -> Option<String> {
        if self.version != VERSION {
            return Some(format!("another version of Lazuli has carried it ({})", self.version));
        }
        if !sys::fuse::is_connected(device) {
            return Some("it has ended".to_owned());
        }
        match mount_at(mountpoint) {
            Ok(Some(there)) if (there.major, there.minor) == (self.major, self.minor) => {}
            Ok(_) => return Some(format!("it is not mounted at {} any more", mountpoint.display())),
            Err(error) => return Some(error.to_string()),
        }
        if sys::fuse::can_resend(&self.init) {
            return None;
        }
        match sys::fuse::waiting(self.major, self.minor) {
            Ok(0) => None,
            Ok(count) => Some(format!(
                "{count} requests were under way, and this kernel cannot send them once more (it takes Linux 6.9)"
            )),
            Err(error) => Some(error.to_string()),
        }
    }
}

/// What was agreed on with the kernel.
#[derive(Debug)]
pub(super) struct Handshake {
    pub(super) init: Vec<u8>,
    pub(super) answer: Vec<u8>,
}

impl Handshake {
    /// Makes a session of `face`, which believes that the kernel has sent `init`. It reads from a socket yet.
    pub(super) fn had(face: Face, config: Config, init: Vec<u8>) -> std::io::Result<(Self, fuser::Session<Face>)> {
        let (ours, theirs) = descriptors::pair()?;
        descriptors::send(&ours, &init, &[])?;
        let session = fuser::Session::from_fd(face, theirs, SessionACL::All, config)?;
        let (answer, _) = descriptors::receive(ours.as_fd(), false)?;
        Ok((Handshake { init, answer }, session))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::faces;

    #[test]
    fn what_is_carried_comes_back() {
        let carried = Carried {
            version: VERSION,
            init: vec![1, 2, 255],
            answer: vec![3],
            major: 0,
            minor: 77,
            direct: true,
            serving: Serving {
                face: faces::Face::Image,
                reason: "a reason".to_owned(),
                metadata_through_fuse: true,
                no_mapped_owners: Some("another reason".to_owned()),
            },
            files: false,
        };
        let text = serde_json::to_vec(&carried).unwrap();
        assert_eq!(serde_json::from_slice::<Carried>(&text).unwrap(), carried);
    }
}
