//! `lazuli upgrade`: a new program takes over from the one that runs.
//!
//! The command asks the supervisor, through a socket in the root directory, which works also while no worker does. The supervisor answers when
//! the new program serves, or the old one does again.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Name of the socket in the root directory, which only root may look into.
const NAME: &str = "supervisor.sock";
/// How a question begins.
const QUESTION: &str = "upgrade ";
/// How an answer begins that is good news.
const DONE: &str = "done: ";
/// Longest question, in bytes, and longest time that it may take.
const QUESTION_MAX: u64 = 8192;
const QUESTION_WAIT: Duration = Duration::from_secs(1);
/// Longest time that an answer may take: the old program ends, the new one starts, and perhaps the old one starts again.
const ANSWER_WAIT: Duration = Duration::from_secs(180);

/// Where the supervisor is asked.
pub(super) struct Door {
    listener: UnixListener,
    path: PathBuf,
}

impl Door {
    /// Opens it below `root`, in place of one that a supervisor left which is no more.
    pub(super) fn open(root: &Path) -> io::Result<Self> {
        let path = root.join(NAME);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        Ok(Door { listener, path })
    }

    /// Somebody who asks, and for which program.
    pub(super) fn visitor(&self) -> io::Result<(Client, PathBuf)> {
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(QUESTION_WAIT))?;
        stream.set_write_timeout(Some(QUESTION_WAIT))?;
        let mut line = Vec::new();
        BufReader::new((&stream).take(QUESTION_MAX)).read_until(b'\n', &mut line)?;
        match line
            .strip_prefix(QUESTION.as_bytes())
            .and_then(|rest| rest.strip_suffix(b"\n"))
        {
            Some(path) => Ok((
                Client(stream),
                PathBuf::from(std::ffi::OsString::from_vec(path.to_vec())),
            )),
            None => Err(io::Error::from(io::ErrorKind::InvalidData)),
        }
    }

    /// Closes it.
    pub(super) fn close(self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl AsFd for Door {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// Who has asked for an upgrade.
pub(super) struct Client(UnixStream);

impl Client {
    pub(super) fn from_fd(fd: OwnedFd) -> Self {
        Client(UnixStream::from(fd))
    }

    /// Tells how it went. Who does not wait any more does not learn it.
    pub(super) fn answer(mut self, result: Result<String, String>) {
        let text = match result {
            Ok(text) => format!("{DONE}{text}"),
            Err(text) => text,
        };
        let _ = self.0.write_all(text.as_bytes());
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Asks the supervisor that works at `root` to go on with the program `program`. Tells what it said.
///
/// # Errors
/// When there is no supervisor, or it does not answer; and, as the inner result, when the new program does not take over.
pub fn upgrade(root: &Path, program: &Path) -> io::Result<Result<String, String>> {
    let mut stream = UnixStream::connect(root.join(NAME))?;
    stream.set_read_timeout(Some(ANSWER_WAIT))?;
    stream.write_all(&[QUESTION.as_bytes(), program.as_os_str().as_bytes(), b"\n"].concat())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(match text.strip_prefix(DONE) {
        Some(text) => Ok(text.to_owned()),
        None if text.is_empty() => Err("the supervisor has ended".to_owned()),
        None => Err(text),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_heard_and_answered() {
        let dir = tempfile::tempdir().unwrap();
        assert!(upgrade(dir.path(), Path::new("/x")).is_err(), "nobody is there");
        let door = Door::open(dir.path()).unwrap();
        let answers: [Result<String, String>; 2] = [Ok("good".to_owned()), Err("bad".to_owned())];
        for answer in answers {
            let root = dir.path().to_owned();
            let asking = std::thread::spawn(move || upgrade(&root, Path::new("/new program")).unwrap());
            let (client, program) = loop {
                match door.visitor() {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                    visitor => break visitor.unwrap(),
                }
            };
            assert_eq!(program, Path::new("/new program"));
            client.answer(answer.clone());
            assert_eq!(asking.join().unwrap(), answer);
        }
        let mut nonsense = UnixStream::connect(dir.path().join(NAME)).unwrap();
        nonsense.write_all(b"who is there\n").unwrap();
        assert!(door.visitor().is_err());
        door.close();
        assert!(!dir.path().join(NAME).exists());
    }
}
