//! How large a container may become: the label in which a client says so, and the project quota that holds it to it.
//!
//! The label is a hint (containerd 2.4): who cannot enforce it may ignore it. So where the root directory's file system has no project quotas, the
//! snapshot is made without a limit, which the log, a metric and `lazuli status` tell. What is no number is refused all the same: the client meant
//! something. On what a layer is unpacked in the label means nothing, since it may be an annotation of an image.
//!
//! An active snapshot's upper and work directories are in one project, with all that is made in them: overlayfs moves files from one to the other,
//! which the kernel allows within a project only. Which one, the directories know themselves ([`quota::project_of`]), so that nothing has to
//! be recorded. A project is free as long as the file system counts no file in it and has no limit for it, whoever may have given it: a second Lazuli
//! on the same file system, or files in the trash that still belong to it. The lowest free one is taken, because xfs keeps room for every
//! project that ever was.
//!
//! The limit goes with Remove and with Commit: a layer does not grow. Its files stay in the project, without a limit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::SnapshotsError;
use super::error::quoted;
use super::rules::REF_LABEL;
use crate::metrics::Metrics;
use crate::store::Kind;
use crate::sys::{SysError, quota};

/// Label of the size, in bytes.
const SIZE_LABEL: &str = "containerd.io/snapshot/max-size";

/// Projects that Lazuli gives: as many as there will never be containers, in a range that nobody else is known to use. (kubelet counts up from
/// 1048576, systemd gives those from 2147483648 on, and people start with small numbers.)
const FIRST_PROJECT: u32 = 0x4c00_0000;
const PROJECTS: u32 = 1 << 24;
/// How many projects in a row are looked at for a free one: each container that was committed keeps one as long as its layer is there.
const TRIES: u32 = 1 << 16;
/// Files of a project that was just given: the two directories.
const DIRECTORIES: u64 = 2;

/// What the labels of a snapshot say of its size, in bytes; `None` if it has no limit.
pub(super) fn size(kind: Kind, labels: &BTreeMap<String, String>) -> Result<Option<u64>, SnapshotsError> {
    if kind != Kind::Active || labels.contains_key(REF_LABEL) {
        return Ok(None);
    }
    let Some(text) = labels.get(SIZE_LABEL) else {
        return Ok(None);
    };
    // As it is parsed where containerd itself does.
    match text.parse::<i64>().ok().and_then(|size| u64::try_from(size).ok()) {
        None | Some(0) => Err(SnapshotsError::invalid(format!(
            "label {SIZE_LABEL} is {:?}: it has to be a number of bytes, from 1 to {}",
            quoted(text),
            i64::MAX
        ))),
        size => Ok(size),
    }
}

/// The same of a snapshot that is recorded: a version that did not know the label kept whatever it said, and such a one has no limit.
pub(super) fn recorded(kind: Kind, labels: &BTreeMap<String, String>) -> Option<u64> {
    size(kind, labels).unwrap_or_else(|error| {
        tracing::warn!(%error, "a snapshot from an older version has no limit of size");
        None
    })
}

/// The label itself, whatever it says.
pub(super) fn label(labels: &BTreeMap<String, String>) -> Option<&str> {
    labels.get(SIZE_LABEL).map(String::as_str)
}

/// The projects on one file system.
pub(super) struct Limits {
    /// Any directory there that stays.
    place: PathBuf,
    /// Why nothing can be limited, if so.
    missing: Option<String>,
    /// Below this one no project is known to be free. Held while projects and limits change.
    next: Mutex<u32>,
    metrics: Arc<Metrics>,
}

/// Limits do not change meanwhile.
pub(super) struct Turn<'a>(MutexGuard<'a, u32>);

impl Limits {
    /// Those on the file system of the directory `place`.
    pub fn open(place: &Path, metrics: Arc<Metrics>) -> Self {
        Limits {
            place: place.to_owned(),
            missing: quota::missing(place),
            next: Mutex::new(FIRST_PROJECT),
            metrics,
        }
    }

    pub fn turn(&self) -> Turn<'_> {
        Turn(self.next.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Limits what the empty directories `own` and `work` may take together. Where that cannot be, they have no limit.
    pub fn give(&self, own: &Path, work: &Path, bytes: u64) -> Result<(), SnapshotsError> {
        if let Some(reason) = &self.missing {
            self.unlimited(bytes, reason);
            return Ok(());
        }
        let mut turn = self.turn();
        let given = self
            .take_free(&mut turn, own, work)
            .and_then(|project| project.map(|id| quota::set_limit(&self.place, id, bytes)).transpose());
        match given.map_err(SnapshotsError::Limit)? {
            Some(()) => self.count("limited"),
            None => self.unlimited(bytes, "no project is free"),
        }
        Ok(())
    }

    /// Puts two directories into a free project; `None` if there is none.
    fn take_free(&self, turn: &mut Turn<'_>, own: &Path, work: &Path) -> Result<Option<u32>, SysError> {
        for _ in 0..TRIES {
            let id = *turn.0;
            *turn.0 = match id.checked_sub(FIRST_PROJECT) {
                Some(at) if at + 1 < PROJECTS => id + 1,
                _ => FIRST_PROJECT,
            };
            if quota::project(&self.place, id)? != quota::Project::default() {
                continue;
            }
            quota::set_project(own, id)?;
            quota::set_project(work, id)?;
            // Another process may have taken it in the same moment.
            if quota::project(&self.place, id)?.inodes == DIRECTORIES {
                return Ok(Some(id));
            }
        }
        for dir in [own, work] {
            quota::set_project(dir, 0)?;
        }
        Ok(None)
    }

    /// Sets the limit of a snapshot whose own files are in `own`; `None`: it has none any more. A snapshot that is in no project cannot get a limit:
    /// what was written into it is not counted.
    pub fn set(&self, turn: &mut Turn<'_>, own: &Path, bytes: Option<u64>) -> Result<(), SnapshotsError> {
        let project = match &self.missing {
            None => given(own),
            Some(_) => None,
        };
        match (project, bytes) {
            (None, None) => Ok(()),
            (None, Some(bytes)) => {
                let reason = self.missing.as_deref();
                self.unlimited(bytes, reason.unwrap_or("it was made without a limit"));
                Ok(())
            }
            (Some(id), bytes) => {
                quota::set_limit(&self.place, id, bytes.unwrap_or(0)).map_err(SnapshotsError::Limit)?;
                if bytes.is_none() {
                    // It is free when its files are gone.
                    *turn.0 = id.min(*turn.0);
                }
                Ok(())
            }
        }
    }

    /// The same, for what has no limit any more because it is no active snapshot any more.
    pub fn end(&self, own: &Path) {
        let mut turn = self.turn();
        if let Err(error) = self.set(&mut turn, own, None) {
            tracing::warn!(%error, "the file system keeps the limit of a snapshot that is active no more");
        }
    }

    fn unlimited(&self, bytes: u64, reason: &str) {
        self.count("unlimited");
        tracing::warn!(
            bytes,
            reason,
            "the size of a snapshot is not limited, though a client asks for that"
        );
    }

    fn count(&self, outcome: &str) {
        self.metrics.size_limits_total.with_label_values(&[outcome]).inc();
    }
}

/// The project that Lazuli has put a directory into.
fn given(own: &Path) -> Option<u32> {
    // What shows a layer is a link, which is in no project.
    let id = quota::project_of(own).ok()?;
    let at = id.checked_sub(FIRST_PROJECT)?;
    (at < PROJECTS).then_some(id)
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    fn labels(size: &str) -> BTreeMap<String, String> {
        [(SIZE_LABEL.to_owned(), size.to_owned())].into()
    }

    #[test]
    fn sizes_are_numbers_of_bytes() {
        assert_eq!(size(Kind::Active, &BTreeMap::new()).unwrap(), None);
        assert_eq!(size(Kind::Active, &labels("268435456")).unwrap(), Some(268_435_456));
        assert_eq!(
            size(Kind::Active, &labels(&i64::MAX.to_string())).unwrap(),
            Some(i64::MAX as u64)
        );
        for bad in ["0", "-1", "100MB", "1e9", " 1", "9223372036854775808", "x"] {
            let error = size(Kind::Active, &labels(bad)).unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument, "{error}");
            assert!(error.to_string().contains(bad), "{error}");
            // Nobody can write into it, or it may be an image that says so.
            assert_eq!(size(Kind::View, &labels(bad)).unwrap(), None);
            let mut of_layer = labels(bad);
            of_layer.insert(REF_LABEL.to_owned(), "sha256:1".to_owned());
            assert_eq!(size(Kind::Active, &of_layer).unwrap(), None);
            assert_eq!(recorded(Kind::Active, &labels(bad)), None, "it was taken once");
        }
    }

    #[test]
    fn where_nothing_can_be_limited_it_is_counted() {
        let metrics = Arc::new(Metrics::new());
        let limits = Limits::open(Path::new("/proc"), Arc::clone(&metrics));
        let dir = tempfile::tempdir().unwrap();
        limits.give(dir.path(), dir.path(), 1).unwrap();
        limits.set(&mut limits.turn(), dir.path(), Some(1)).unwrap();
        limits.end(dir.path());
        let count = |outcome| metrics.size_limits_total.with_label_values(&[outcome]).get();
        assert_eq!((count("limited"), count("unlimited")), (0, 2));
    }
}
