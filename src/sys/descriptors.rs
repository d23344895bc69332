//! Descriptors that outlive a process: passed to a program that is started or replaces this one, sent through a socket, and memory that
//! is a descriptor.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read as _, Seek as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use rustix::fs::MemfdFlags;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

/// Most descriptors in one message; the kernel takes 253.
pub const MESSAGE_DESCRIPTORS_MAX: usize = 16;
/// Most bytes of one message; what this program and service managers say to each other is far shorter.
const MESSAGE_MAX: usize = 16 << 10;

/// Takes over a descriptor that this program was started with, by its number. It is closed in programs that this one starts.
///
/// # Errors
/// EBADF when no such descriptor is open, or it is one of the standard ones.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    if number <= libc::STDERR_FILENO {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: only a number is looked at; one that is not open is refused.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open. The caller was told its number by whoever started this program, so nothing else here has made or owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Whether programs that are started from now on, or replace this one, get the descriptor.
///
/// # Errors
/// Never for an open descriptor.
pub fn inherit(fd: impl AsFd, inherit: bool) -> io::Result<()> {
    let flags = match inherit {
        true => FdFlags::empty(),
        false => FdFlags::CLOEXEC,
    };
    Ok(fcntl_setfd(fd, flags)?)
}

/// Two sockets that are connected with each other, for whole messages; an end that is gone is noticed.
///
/// # Errors
/// When the kernel has no descriptors to give.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC;
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// Sends one message with descriptors, and never waits for room.
///
/// # Errors
/// When nobody receives any more (EPIPE), there is no room (EAGAIN), or there are too many descriptors.
pub fn send(socket: impl AsFd, text: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MESSAGE_DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::from(io::ErrorKind::ArgumentListTooLong));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    sendmsg(socket, &[IoSlice::new(text)], &mut control, flags)?;
    Ok(())
}

/// Receives one message with its descriptors. No text and no descriptor: the other end is gone.
///
/// # Errors
/// EAGAIN when there is none and `wait` is not set.
pub fn receive(socket: impl AsFd, wait: bool) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut text = vec![0; MESSAGE_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MESSAGE_DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut flags = RecvFlags::CMSG_CLOEXEC;
    if !wait {
        flags |= RecvFlags::DONTWAIT;
    }
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut text)], &mut control, flags)?;
    text.truncate(received.bytes);
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(some) = message {
            fds.extend(some);
        }
    }
    Ok((text, fds))
}

/// A file in memory with these bytes. `name` is seen in `/proc/<pid>/fd`.
///
/// # Errors
/// When there is no memory or no descriptor.
pub fn memory(name: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    Ok(file.into())
}

/// All bytes of a file in memory, up to `limit`.
///
/// # Errors
/// When it is no such file, or is longer.
pub fn read_memory(fd: impl AsFd, limit: u64) -> io::Result<Vec<u8>> {
    let mut file = File::from(fd.as_fd().try_clone_to_owned()?);
    file.rewind()?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > limit {
        true => Err(io::Error::from(io::ErrorKind::FileTooLarge)),
        false => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_brings_its_descriptors() {
        let (a, b) = pair().unwrap();
        let memory = memory("test", b"what is in it").unwrap();
        send(&a, b"text", &[memory.as_fd(), memory.as_fd()]).unwrap();
        send(&a, b"alone", &[]).unwrap();
        drop(memory);
        let (text, fds) = receive(&b, true).unwrap();
        assert_eq!((text.as_slice(), fds.len()), (&b"text"[..], 2));
        assert_eq!(read_memory(&fds[1], 100).unwrap(), b"what is in it");
        assert_eq!(read_memory(&fds[0], 100).unwrap(), b"what is in it");
        assert!(read_memory(&fds[0], 5).is_err());
        assert_eq!(receive(&b, false).unwrap().0, b"alone");
        let error = receive(&b, false).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(a);
        assert_eq!(receive(&b, false).unwrap().0, b"");
        assert!(send(&b, b"x", &[]).is_err());
    }

    #[test]
    fn nothing_that_is_not_open_is_inherited() {
        for number in [-1, 0, 2, 1_000_000] {
            assert!(inherited(number).is_err(), "{number}");
        }
    }
}
