//! Names on disk: which mount or file stands where, and how a file gets there.
//!
//! ```text
//! <dir>/7.file     mount point: layer or chain of slot 7, over files of the cache alone
//! <dir>/7.image    mount point: the same, with FUSE below
//! <dir>/7.meta     the layer's metadata, as this process wrote them, or one before it whose session it has taken over
//! <dir>/9.chain    a chain's metadata, with what they were made of (stored.rs); outlives the process
//! <dir>/probe.*    what the probe at the start needs
//! ```

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use crate::fs::FsError;

/// What a mount lies on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Files of the cache alone: it needs no process.
    File,
    /// FUSE, in part or whole.
    Image,
}

impl Kind {
    pub(super) const ALL: [Kind; 2] = [Kind::File, Kind::Image];

    /// How it is called, in names on disk and everywhere else.
    pub(super) fn word(self) -> &'static str {
        match self {
            Kind::File => "file",
            Kind::Image => "image",
        }
    }
}

/// Prefix of files that are being written.
const TEMPORARY: &str = ".new-";
/// Prefix of what the probe at the start needs.
pub(super) const PROBE: &str = "probe.";
/// Suffixes of files.
const METADATA: &str = "meta";
const CHAIN: &str = "chain";

/// The directory.
pub(super) struct Places {
    dir: PathBuf,
}

impl Places {
    /// Makes `dir` if it is missing. Of files in it, chains stay; and layers' metadata if `goes_on`: mounts that go on may be made of them.
    pub(super) fn open(dir: &Path, goes_on: bool) -> Result<Self, FsError> {
        let fail = |source| files_error(dir, source);
        match DirBuilder::new().mode(0o700).create(dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(fail(error)),
            _ => {}
        }
        // Names in the list of mounts have no symbolic links.
        let dir = dir.canonicalize().map_err(fail)?;
        for entry in fs::read_dir(&dir).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let suffix = name.rsplit_once('.').map(|(_, suffix)| suffix);
            let leftover =
                name.starts_with(TEMPORARY) || name.starts_with(PROBE) || (suffix == Some(METADATA) && !goes_on);
            // Not asked of the file: a mount point may be that of a dead server.
            let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
            if leftover
                && is_file
                && let Err(error) = fs::remove_file(entry.path())
            {
                tracing::warn!("cannot remove {}: {error}", entry.path().display());
            }
        }
        Ok(Places { dir })
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where a mount of `slot` stands.
    pub(super) fn mount_point(&self, slot: u32, kind: Kind) -> PathBuf {
        self.dir.join(format!("{slot}.{}", kind.word()))
    }

    /// The metadata of the layer in `slot`.
    pub(super) fn metadata(&self, slot: u32) -> PathBuf {
        self.dir.join(format!("{slot}.{METADATA}"))
    }

    /// The metadata of the chain in `slot`.
    pub(super) fn chain(&self, slot: u32) -> PathBuf {
        self.dir.join(format!("{slot}.{CHAIN}"))
    }

    /// Which mount stands at `path`: the inverse of [`Places::mount_point`].
    pub(super) fn parse(&self, path: &Path) -> Option<(u32, Kind)> {
        if path.parent() != Some(&self.dir) {
            return None;
        }
        let (slot, word) = path.file_name()?.to_str()?.split_once('.')?;
        let kind = Kind::ALL.into_iter().find(|kind| kind.word() == word)?;
        let slot = slot.parse().ok()?;
        (self.mount_point(slot, kind) == path).then_some((slot, kind))
    }

    /// Writes the file `path` of the directory, in place of one that is there: all of it or nothing. With `durable`, it is there after a
    /// power cut as well.
    pub(super) fn write(&self, path: &Path, parts: &[&[u8]], durable: bool) -> Result<(), FsError> {
        let write = || {
            let mut file = tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(&self.dir)?;
            for part in parts {
                file.write_all(part)?;
            }
            if durable {
                file.as_file().sync_all()?;
            }
            file.persist(path).map_err(|error| error.error)?;
            if durable {
                File::open(&self.dir)?.sync_all()?;
            }
            Ok(())
        };
        write().map_err(|source| files_error(path, source))
    }

    /// Removes the file `path`, if it is there.
    pub(super) fn remove(&self, path: &Path) {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("cannot remove {}: {error}", path.display());
            }
            _ => {}
        }
    }
}

/// Makes the mount point `path`, unless it is there. What is mounted there is not asked.
pub(super) fn make_mount_point(path: &Path) -> Result<(), FsError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(files_error(path, error)),
        _ => Ok(()),
    }
}

pub(super) fn files_error(path: &Path, source: io::Error) -> FsError {
    FsError::Files {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_recognised_by_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let places = Places::open(&dir.path().join("faces"), false).unwrap();
        for slot in [1, 77, u32::MAX] {
            for kind in Kind::ALL {
                assert_eq!(places.parse(&places.mount_point(slot, kind)), Some((slot, kind)));
            }
        }
        for name in ["7", "07.file", "7.meta", "probe.file", "7.file.x", "+7.file", ".file"] {
            assert_eq!(places.parse(&places.dir().join(name)), None, "{name}");
        }
        assert_eq!(places.parse(&dir.path().join("7.file")), None);
        assert_eq!(places.parse(&places.dir().join("x/7.file")), None);
    }

    #[test]
    fn a_file_is_written_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let places = Places::open(&dir.path().join("faces"), false).unwrap();
        let (meta, chain) = (places.metadata(3), places.chain(4));
        places.write(&meta, &[b"one", b"two"], false).unwrap();
        places.write(&meta, &[b"three"], false).unwrap();
        places.write(&chain, &[b"kept"], true).unwrap();
        assert_eq!(fs::read(&meta).unwrap(), b"three");
        assert!(places.write(&places.dir().join("no/where"), &[b"x"], false).is_err());
        let names = fs::read_dir(places.dir()).unwrap().count();
        assert_eq!(names, 2, "nothing is left of a file that could not be put in its place");

        fs::write(places.dir().join(format!("{TEMPORARY}x")), "half").unwrap();
        let places = Places::open(places.dir(), true).unwrap();
        assert!(meta.exists() && chain.exists());
        let places = Places::open(places.dir(), false).unwrap();
        assert!(!meta.exists() && chain.exists());
        assert_eq!(fs::read_dir(places.dir()).unwrap().count(), 1);
        places.remove(&chain);
        places.remove(&chain);
    }
}
