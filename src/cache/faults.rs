//! Where the disk may fail, for tests: nothing of this is in the program.
//!
//! A test says what happens at each of these points ([`Cache::fail_with`](super::Cache::fail_with)); everywhere else the calls are those of the
//! file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// What is done to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(test), expect(dead_code, reason = "which point it is matters to tests alone"))]
pub(crate) enum Point {
    /// Files of a layer are read when it is opened.
    Open,
    /// Bytes of a layer are read.
    Read,
    /// They are written.
    Write,
    /// A map is written.
    Map,
    /// Something is made durable.
    Sync,
}

/// What happens at a point.
#[cfg(test)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The call fails.
    Error(rustix::io::Errno),
    /// A part of what is written comes to the disk, and then there is no room.
    Short,
}

/// Nothing fails but what the disk does.
#[cfg(not(test))]
#[derive(Default)]
pub(super) struct Faults {}

#[cfg(not(test))]
impl Faults {
    #[inline(always)]
    #[expect(clippy::unused_self, reason = "tests have a list of faults here")]
    pub fn at(&self, _: Point) -> io::Result<()> {
        Ok(())
    }
}

/// What decides.
#[cfg(test)]
pub(crate) type Decide = Box<dyn FnMut(Point) -> Option<Fault> + Send>;

/// What a test wants.
#[cfg(test)]
#[derive(Default)]
pub(super) struct Faults(std::sync::Mutex<Option<Decide>>);

#[cfg(test)]
impl Faults {
    pub fn set(&self, decide: Decide) {
        *self.0.lock().unwrap() = Some(decide);
    }

    fn decide(&self, point: Point) -> Option<Fault> {
        self.0.lock().unwrap().as_mut().and_then(|decide| decide(point))
    }

    pub fn at(&self, point: Point) -> io::Result<()> {
        match self.decide(point) {
            Some(Fault::Error(errno)) => Err(errno.into()),
            Some(Fault::Short) => Err(rustix::io::Errno::NOSPC.into()),
            None => Ok(()),
        }
    }
}

impl Faults {
    /// Writes all of `bytes`.
    pub fn write(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        #[cfg(test)]
        match self.decide(Point::Write) {
            Some(Fault::Error(errno)) => return Err(errno.into()),
            Some(Fault::Short) => {
                file.write_all_at(&bytes[..bytes.len() / 2], offset)?;
                return Err(rustix::io::Errno::NOSPC.into());
            }
            None => {}
        }
        file.write_all_at(bytes, offset)
    }

    /// Fills `buf`.
    pub fn read(&self, file: &File, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.at(Point::Read)?;
        file.read_exact_at(buf, offset)
    }
}
