//! Files that commands write for people: under their final name, they are always whole.
//!
//! A file is written under a temporary name beside its place, verified by whoever writes it, made durable, and renamed. Until then it goes
//! when it is dropped. What a killed command has left is told by its lock, as in `scratch.rs`, and goes when the next one writes there.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use bytes::Bytes;

use crate::layer::Digest;

/// How the temporary names begin.
const PART: &str = ".lazuli-part-";
/// How they begin until the file is locked.
const UNCLAIMED: &str = ".lazuli-new-";
/// Mode of files, before the umask.
const MODE: u32 = 0o666;

/// A file in the making.
pub(super) struct Part {
    temporary: PathBuf,
    target: PathBuf,
    file: File,
}

impl Part {
    /// Begins the file that will be `target`, whose directory must exist.
    pub(super) fn begin(target: PathBuf) -> anyhow::Result<Self> {
        Self::create(&target).with_context(|| format!("{} cannot be written", target.display()))
    }

    fn create(target: &Path) -> io::Result<Self> {
        let dir = directory_of(target);
        let new = tempfile::Builder::new().prefix(UNCLAIMED).make_in(dir, |path| {
            File::options().write(true).create_new(true).mode(MODE).open(path)
        })?;
        // Where nothing can be locked, nobody clears up after a command that was killed.
        let _ = new.as_file().try_lock();
        let name = new.path().file_name().unwrap_or_default().to_string_lossy();
        let temporary = dir.join(name.replacen(UNCLAIMED, PART, 1));
        let file = new.persist(&temporary).map_err(|error| error.error)?;
        Ok(Part {
            temporary,
            target: target.to_owned(),
            file,
        })
    }

    /// Adds bytes.
    pub(super) fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        let written = self.file.write_all(bytes);
        written.with_context(|| format!("{} cannot be written", self.target.display()))
    }

    /// Gives the file its name. It is whole, and durable together with its directory ([`sync_directory`]).
    pub(super) fn publish(self) -> anyhow::Result<()> {
        let published = self.file.sync_all();
        let published = published.and_then(|()| fs::rename(&self.temporary, &self.target));
        published.with_context(|| format!("{} cannot be written", self.target.display()))
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // After it was published there is nothing.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// Makes the names in a directory durable.
pub(super) fn sync_directory(dir: &Path) -> anyhow::Result<()> {
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.with_context(|| format!("{} cannot be written", dir.display()))
}

/// Finds out whether files can be written into the directory, before there is any work to be lost. Also removes what killed commands left.
pub(super) fn check_output(dir: &Path) -> anyhow::Result<()> {
    if !dir.is_dir() {
        bail!("{} is not a directory; make it first", dir.display());
    }
    clear(dir);
    let tried = Part::create(&dir.join(PART));
    tried
        .map(drop)
        .with_context(|| format!("{} cannot be written", dir.display()))
}

/// Removes files that dead processes have left half written.
fn clear(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let is_part = entry.file_name().to_string_lossy().starts_with(PART);
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if is_part
            && is_file
            && let Ok(file) = File::open(entry.path())
            && file.try_lock().is_ok()
        {
            // If it cannot go, it is in nobody's way.
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

/// An OCI layout that is written, or that gets another image. It appears as a whole: a layout that was complete before stays complete, and
/// of one that is given up nothing is left.
pub(super) struct LayoutWriter {
    dir: PathBuf,
    blobs: Vec<Part>,
    /// Directories that were made for it, the uppermost first.
    made: Vec<PathBuf>,
}

impl LayoutWriter {
    /// Makes the directories, and finds out whether they can be written.
    pub(super) fn begin(dir: &Path) -> anyhow::Result<Self> {
        let mut layout = LayoutWriter {
            dir: dir.to_owned(),
            blobs: Vec::new(),
            made: Vec::new(),
        };
        let blobs = layout.blobs_dir();
        for missing in blobs.ancestors().collect::<Vec<_>>().into_iter().rev() {
            if missing.as_os_str().is_empty() || missing.is_dir() {
                continue;
            }
            let made = match missing.exists() {
                true => Err(io::Error::from(io::ErrorKind::NotADirectory)),
                false => fs::create_dir(missing),
            };
            made.with_context(|| format!("{} cannot be made: {}", dir.display(), missing.display()))?;
            layout.made.push(missing.to_owned());
        }
        check_output(&layout.dir)?;
        check_output(&blobs)?;
        Ok(layout)
    }

    /// A blob to be written and verified; to be given back to [`LayoutWriter::add`].
    pub(super) fn blob(&self, digest: &Digest) -> anyhow::Result<Part> {
        Part::begin(self.blobs_dir().join(digest.hex()))
    }

    /// Adds a blob that has the digest it is named by.
    pub(super) fn add(&mut self, blob: Part) {
        self.blobs.push(blob);
    }

    /// Adds a blob.
    pub(super) fn add_bytes(&mut self, bytes: &Bytes) -> anyhow::Result<()> {
        let mut blob = self.blob(&Digest::of(bytes))?;
        blob.write(bytes)?;
        self.add(blob);
        Ok(())
    }

    /// Shows it all, `index` (the text of `index.json`) at last.
    pub(super) fn finish(mut self, index: &str) -> anyhow::Result<()> {
        let mut marker = Part::begin(self.dir.join("oci-layout"))?;
        marker.write(br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        let mut root = Part::begin(self.dir.join("index.json"))?;
        root.write(index.as_bytes())?;
        for blob in std::mem::take(&mut self.blobs) {
            blob.publish()?;
        }
        sync_directory(&self.blobs_dir())?;
        marker.publish()?;
        root.publish()?;
        self.made.clear();
        sync_directory(&self.dir)
    }

    fn blobs_dir(&self) -> PathBuf {
        self.dir.join("blobs/sha256")
    }
}

impl Drop for LayoutWriter {
    fn drop(&mut self) {
        self.blobs.clear();
        for dir in self.made.iter().rev() {
            // Unless somebody else has put something there.
            let _ = fs::remove_dir(dir);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_file_appears_when_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("file");
        fs::write(&target, "old").unwrap();
        let mut part = Part::begin(target.clone()).unwrap();
        part.write(b"ne").unwrap();
        drop(part);
        assert_eq!(
            (names(dir.path()), fs::read(&target).unwrap()),
            (vec!["file".to_owned()], b"old".to_vec())
        );
        let mut part = Part::begin(target.clone()).unwrap();
        part.write(b"new").unwrap();
        part.publish().unwrap();
        assert_eq!(
            (names(dir.path()), fs::read(&target).unwrap()),
            (vec!["file".to_owned()], b"new".to_vec())
        );
    }

    #[test]
    fn a_place_that_cannot_be_written_is_named_by_its_own_name() {
        let error = check_output(Path::new("/proc")).unwrap_err();
        let text = super::super::failure::text(&error);
        assert!(
            text.starts_with("/proc cannot be written: ") && !text.contains(".lazuli"),
            "{text}"
        );
    }

    #[test]
    fn what_the_dead_have_left_is_cleared() {
        let dir = tempfile::tempdir().unwrap();
        let living = Part::begin(dir.path().join("file")).unwrap();
        fs::write(dir.path().join(format!("{PART}dead")), "half").unwrap();
        check_output(dir.path()).unwrap();
        assert_eq!(
            names(dir.path()),
            [living.temporary.file_name().unwrap().to_str().unwrap()]
        );
    }

    #[test]
    fn a_layout_is_there_as_a_whole_or_not_at_all() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("a/b");
        let mut layout = LayoutWriter::begin(&dir).unwrap();
        layout.add_bytes(&Bytes::from_static(b"blob")).unwrap();
        drop(layout);
        assert_eq!(names(base.path()), Vec::<String>::new());
        let mut layout = LayoutWriter::begin(&dir).unwrap();
        layout.add_bytes(&Bytes::from_static(b"blob")).unwrap();
        layout.finish("{}").unwrap();
        let blob = dir.join("blobs/sha256").join(Digest::of(b"blob").hex());
        assert_eq!(fs::read(blob).unwrap(), b"blob");
        assert_eq!(names(&dir).len(), 3, "{:?}", names(&dir));
    }
}
