//! `lazuli upgrade`: a new program takes over from the one that runs.
//!
//! The command asks the supervisor, through a socket in the root directory, which works also while no worker does. The supervisor answers when
//! the new program serves, or the old one does again.

use std::ffi::OsString;
use std::io::{self, BufReader, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Name of the socket in the root directory, which only root may look into.
const NAME: &str = "supervisor.sock";
/// How a question begins that ends with its line.
const QUESTION: &[u8] = b"upgrade ";
/// How a question begins about a path that has line ends in it, and how it ends: no path has a NUL. Supervisors from before this form refuse
/// it, as it is none of theirs; all other paths are asked for in the form that they know.
const LONG_QUESTION: &[u8] = b"upgrade-path ";
const LONG_END: &[u8] = b"\0\n";
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
        let program = heard(BufReader::new((&stream).take(QUESTION_MAX)))?;
        Ok((Client(stream), program))
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

/// A question for `program`.
fn question(program: &Path) -> Vec<u8> {
    let path = program.as_os_str().as_bytes();
    match path.contains(&b'\n') {
        true => [LONG_QUESTION, path, LONG_END].concat(),
        false => [QUESTION, path, b"\n"].concat(),
    }
}

/// The program that a question is about.
fn heard(mut from: impl io::BufRead) -> io::Result<PathBuf> {
    let mut question = Vec::new();
    from.read_until(b'\n', &mut question)?;
    while question.starts_with(LONG_QUESTION) && !question.ends_with(LONG_END) {
        if from.read_until(b'\n', &mut question)? == 0 {
            break;
        }
    }
    let path = match question.strip_prefix(LONG_QUESTION) {
        Some(rest) => rest.strip_suffix(LONG_END),
        None => question
            .strip_prefix(QUESTION)
            .and_then(|rest| rest.strip_suffix(b"\n")),
    };
    let path = path.ok_or(io::ErrorKind::InvalidData)?;
    Ok(PathBuf::from(OsString::from_vec(path.to_vec())))
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
    stream.write_all(&question(program))?;
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
        // Line ends, and what a path without them would end with.
        let programs = ["/new program", "/a\nupgrade /b\n"].map(Path::new);
        for (answer, program) in answers.into_iter().zip(programs) {
            let root = dir.path().to_owned();
            let asking = std::thread::spawn(move || upgrade(&root, program).unwrap());
            let (client, wanted) = loop {
                match door.visitor() {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                    visitor => break visitor.unwrap(),
                }
            };
            assert_eq!(wanted, program);
            client.answer(answer.clone());
            assert_eq!(asking.join().unwrap(), answer);
        }
        let mut nonsense = UnixStream::connect(dir.path().join(NAME)).unwrap();
        nonsense.write_all(b"who is there\n").unwrap();
        assert!(door.visitor().is_err());
        door.close();
        assert!(!dir.path().join(NAME).exists());
    }

    #[test]
    fn a_path_is_asked_for_as_earlier_supervisors_know_it() {
        assert_eq!(question(Path::new("/usr/bin/lazuli")), b"upgrade /usr/bin/lazuli\n");
    }

    #[test]
    fn a_question_that_breaks_off_is_none() {
        for text in [
            "",
            "upgrade /a",
            "upgrade-path /a\n",
            "upgrade-path /a\nb",
            "upgrade-path /a\0",
        ] {
            assert!(heard(text.as_bytes()).is_err(), "{text:?}");
        }
    }
}
