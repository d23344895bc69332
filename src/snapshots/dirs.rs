//! Directories of snapshots.
//!
//! ```text
//! <root>/                       0700
//!   snapshots/<id>/             0700
//!     fs/                       a local snapshot's own files: the upper directory, and later a lower one
//!     work/                     overlayfs' work directory, of an active snapshot
//!     lower/                    of a container in a user namespace: its lower directories with mapped owners (mapped.rs)
//!     fs -> <layer directory>   of a remote snapshot, in place of a directory, once something was made on it
//!     chain -> <directory>      of a remote snapshot: its layer merged with all below it, once something was made on that
//!     fs.<n>, chain.<n>         the same for those who are shown another layer, or others below it
//!   new/<random>/               being made, before its id is known; moved to snapshots/<id> within the transaction
//!   trash/<id>.<n>+0/           removed; deleted in the background (sync/trash.rs)
//! ```
//!
//! Ids, not keys, are names: keys hold slashes and blanks. All lower directories are `snapshots/<id>/fs` or
//! `snapshots/<id>/chain`, or one of those beside them (with `/.` behind it if remote), or all in `snapshots/<id>/lower`, so that containerd, which
//! changes into their common directory when the option string is too long for one page, can mount 128 of them.
//!
//! The `/.` makes a program that looks at a lower directory without following symlinks, as BuildKit's overlay differ
//! does, see a directory.

use std::collections::HashSet;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, lchown, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tonic::Code;

use super::limits::Limits;
use super::users::Mapping;
use super::{SnapshotsError, mapped};
use crate::metrics::Metrics;
use crate::store::Kind;
use crate::sync::Trash;

/// Mode of everything that holds snapshots: other users of the host have no business with images.
const PRIVATE: u32 = 0o700;
/// Mode of the root of an empty snapshot.
const ROOT_MODE: u32 = 0o755;
/// Mode of overlayfs' work directory.
const WORK_MODE: u32 = 0o711;
/// Bits of a mode that belong to its directory, without the file type.
const MODE_BITS: u32 = 0o7777;

/// Most links of one kind beside the snapshot's own: so many different things can be shown in its place.
const OTHER_LINKS: usize = 64;

/// Owner and mode that the root of a new snapshot takes over from its parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RootAttributes {
    uid: u32,
    gid: u32,
    mode: u32,
}

/// What a new snapshot's directory holds.
pub(super) enum Content {
    /// A directory of its own, and a work directory if it is active.
    Local(Kind, Option<RootAttributes>),
    /// Nothing yet: a layer is linked when something is made on it.
    Remote,
}

/// Name of the directory of a snapshot's own files.
const OWN: &str = "fs";
/// Name of overlayfs' work directory.
const WORK: &str = "work";
/// Name of the link to the layer of a remote snapshot.
const LAYER: &str = "fs";
/// What the names of links to segments begin with that end with the layer of a remote snapshot; the name of what shows the segment follows.
const SEGMENT: &str = "chain";

/// A snapshot's directory that has no id yet; deleted unless it is placed.
pub(super) struct Built {
    dir: TempDir,
    /// Of one whose size may be limited.
    limits: Option<Arc<Limits>>,
}

impl Built {
    /// The directories of its own files and of overlayfs'.
    fn upper(&self) -> [PathBuf; 2] {
        [OWN, WORK].map(|name| self.dir.path().join(name))
    }
}

impl Drop for Built {
    fn drop(&mut self) {
        // Nothing is there if it was placed: it has another name by then.
        if let Err(error) = mapped::take_away(self.dir.path()) {
            tracing::warn!(%error, "what was mounted for a snapshot that was not made stays until the next start");
        }
        let [own, _] = self.upper();
        if let Some(limits) = self.limits.take() {
            limits.end(&own);
        }
    }
}

/// The directories below one root.
pub(super) struct Dirs {
    snapshots: PathBuf,
    new: PathBuf,
    trash: Arc<Trash>,
    /// How large snapshots may become.
    pub limits: Arc<Limits>,
}

impl Dirs {
    /// Makes the directories; what an earlier process left unfinished is deleted in the background.
    pub fn open(root: &Path, metrics: &Arc<Metrics>) -> Result<Self, SnapshotsError> {
        // They go into mount options, which are text with these separators.
        if root.to_str().is_none_or(|text| text.contains([',', ':', '\\', '"'])) || !root.is_absolute() {
            return Err(SnapshotsError::Root {
                path: root.to_owned(),
                problem: "it has to be an absolute path in UTF-8 without comma, colon, backslash and quote, \
                          because overlayfs is told of it in mount options"
                    .to_owned(),
            });
        }
        let [snapshots, new, trash] = ["snapshots", "new", "trash"].map(|name| root.join(name));
        for path in [root, &snapshots, &new, &trash] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(PRIVATE)
                .create(path)
                .map_err(SnapshotsError::io("create", path))?;
            set_mode(path, PRIVATE)?;
        }
        let entries = metrics.trash_entries.with_label_values(&["snapshots"]);
        let trash = Trash::open(&trash, entries).map_err(SnapshotsError::io("open", &trash))?;
        let limits = Arc::new(Limits::open(&new, Arc::clone(metrics)));
        let dirs = Dirs {
            snapshots,
            new,
            trash,
            limits,
        };
        for name in names(&dirs.new)? {
            dirs.throw_away(&dirs.new.join(name), "new")?;
        }
        dirs.check_file_types()?;
        Ok(dirs)
    }

    /// overlayfs needs directory entries with types, which old XFS file systems do not have.
    fn check_file_types(&self) -> Result<(), SnapshotsError> {
        let probe = match self.build(&Content::Local(Kind::View, None)) {
            // A full disk is no reason not to serve what is there; and what is there was made by one that knew of this.
            Err(error) if error.code() == Code::ResourceExhausted => {
                tracing::warn!(%error, "the disk is full: whether its directories have types is not looked at");
                return Ok(());
            }
            probe => probe?,
        };
        let path = probe.dir.path();
        let io = |error: rustix::io::Errno| SnapshotsError::io("list", path)(error.into());
        let listed = rustix::fs::Dir::read_from(fs::File::open(path).map_err(SnapshotsError::io("open", path))?);
        for entry in listed.map_err(io)? {
            if entry.map_err(io)?.file_type() == rustix::fs::FileType::Unknown {
                return Err(SnapshotsError::Root {
                    path: self.snapshots.clone(),
                    problem: "its file system has no types in directory entries, which overlayfs needs \
                              (XFS: make it with ftype=1)"
                        .to_owned(),
                });
            }
        }
        Ok(())
    }

    /// Makes the directory of a new snapshot.
    pub fn build(&self, content: &Content) -> Result<Built, SnapshotsError> {
        // Its mode is 0700 whatever the umask.
        let dir = TempDir::new_in(&self.new).map_err(SnapshotsError::io("create a directory in", &self.new))?;
        match content {
            Content::Remote => {}
            Content::Local(kind, attributes) => fill(dir.path(), *kind, *attributes)?,
        }
        Ok(Built { dir, limits: None })
    }

    /// Makes the directory of a new local snapshot over `lowers`, which it sees with mapped owners.
    pub fn build_mapped(&self, kind: Kind, lowers: &[PathBuf], mapping: &Mapping) -> Result<Built, SnapshotsError> {
        let built = self.build(&Content::Remote)?;
        let dir = built.dir.path();
        mapped::show(dir, lowers, mapping)?;
        let attributes = match lowers.first() {
            // Its owner as it is mapped.
            Some(lower) => RootAttributes::of(&mapped::path(dir, lower))?,
            None => {
                let (uid, gid) = mapping.root();
                let mode = ROOT_MODE;
                RootAttributes { uid, gid, mode }
            }
        };
        fill(dir, kind, Some(attributes))?;
        Ok(built)
    }

    /// Limits what an active snapshot that is being made may take, in bytes.
    pub fn limit(&self, built: &mut Built, bytes: u64) -> Result<(), SnapshotsError> {
        built.limits = Some(Arc::clone(&self.limits));
        let [own, work] = built.upper();
        self.limits.give(&own, &work, bytes)
    }

    /// Shows a snapshot `lowers` with mapped owners, unless it sees them already.
    pub fn map(&self, id: u64, lowers: &[PathBuf], mapping: &Mapping) -> Result<(), SnapshotsError> {
        mapped::show(&self.dir(id), lowers, mapping)
    }

    /// Takes away what a snapshot sees with mapped owners.
    pub fn unmap(&self, id: u64) -> Result<(), SnapshotsError> {
        mapped::take_away(&self.dir(id))
    }

    /// Where a snapshot sees `lowers` with mapped owners.
    pub fn mapped(&self, id: u64, lowers: &[PathBuf]) -> Vec<PathBuf> {
        let dir = self.dir(id);
        lowers.iter().map(|lower| mapped::path(&dir, lower)).collect()
    }

    /// Gives a directory its id. Call it within the transaction that allocated `id`, as its last step.
    pub fn place(&self, mut built: Built, id: u64) -> Result<(), SnapshotsError> {
        let path = self.dir(id);
        // Nothing can have this id, unless a commit failed after the directory was placed.
        if path.symlink_metadata().is_ok() {
            self.discard(id)?;
        }
        fs::rename(built.dir.path(), &path).map_err(SnapshotsError::io("move into place", &path))?;
        // It has another name now, under which it stays, with its limit.
        built.dir.disable_cleanup(true);
        Ok(())
    }

    /// Makes the names of all directories durable.
    pub fn sync(&self) -> Result<(), SnapshotsError> {
        fs::File::open(&self.snapshots)
            .and_then(|snapshots| snapshots.sync_all())
            .map_err(SnapshotsError::io("sync", &self.snapshots))
    }

    /// Moves a snapshot's directory, if there is one, to the trash.
    pub fn discard(&self, id: u64) -> Result<(), SnapshotsError> {
        self.throw_away(&self.dir(id), &id.to_string())
    }

    fn throw_away(&self, path: &Path, name: &str) -> Result<(), SnapshotsError> {
        // What stays mounted in it only keeps it from being deleted.
        if let Err(error) = mapped::take_away(path) {
            tracing::warn!(%error, "what was mounted for a snapshot that is gone stays");
        }
        self.limits.end(&path.join(OWN));
        let moved = self.trash.discard(path, name, 0).map(drop);
        moved.map_err(SnapshotsError::io("move to the trash", path))
    }

    /// Moves directories without a snapshot to the trash. Call it while no snapshot can be made or removed.
    pub fn discard_all_but(&self, ids: &HashSet<u64>) -> Result<(), SnapshotsError> {
        for name in names(&self.snapshots)? {
            if let Some(id) = name.to_str().and_then(|name| name.parse().ok())
                && !ids.contains(&id)
            {
                self.discard(id)?;
            }
        }
        Ok(())
    }

    /// Waits until what is in the trash now is deleted, or cannot be, or the time is over; whether it is.
    pub fn empty_trash(&self, patience: Duration) -> bool {
        self.trash.empty(patience)
    }

    /// Points the link of a remote snapshot at what shows its layer, and gives its path. Where the link points there already, nothing is
    /// written.
    pub fn link(&self, id: u64, target: &Path) -> Result<PathBuf, SnapshotsError> {
        self.link_as(id, LAYER, target)
    }

    /// A link of a remote snapshot to what shows its layer together with some of those below. It never points anywhere else: containers that
    /// are made later may see other segments, and mounts are made of links after they were given out.
    pub fn segment(&self, id: u64, target: &Path) -> Result<PathBuf, SnapshotsError> {
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        self.link_as(id, &format!("{SEGMENT}.{name}"), target)
    }

    fn link_as(&self, id: u64, name: &str, target: &Path) -> Result<PathBuf, SnapshotsError> {
        let path = self.dir(id).join(name);
        if !fs::read_link(&path).is_ok_and(|now| now == target) {
            self.ensure(id)?;
            let built = self.build(&Content::Remote)?;
            let new = built.dir.path().join("link");
            symlink(target, &new).map_err(SnapshotsError::io("create", &new))?;
            fs::rename(&new, &path).map_err(SnapshotsError::io("replace", &path))?;
        }
        Ok(path.join("."))
    }

    /// A link beside that to its layer to something else, which never points anywhere else: mounts are made of links after they were given out.
    pub fn other_link(&self, id: u64, target: &Path) -> Result<PathBuf, SnapshotsError> {
        self.ensure(id)?;
        let mut path = self.dir(id);
        for number in 1..=OTHER_LINKS {
            path = self.dir(id).join(format!("{LAYER}.{number}"));
            match symlink(target, &path) {
                Ok(()) => return Ok(path.join(".")),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(SnapshotsError::io("create", &path)(error)),
            }
            if fs::read_link(&path).is_ok_and(|now| now == target) {
                return Ok(path.join("."));
            }
        }
        Err(SnapshotsError::io("create", &path)(ErrorKind::QuotaExceeded.into()))
    }

    /// Makes the directory of a remote snapshot if it is missing.
    pub fn ensure(&self, id: u64) -> Result<(), SnapshotsError> {
        match self.dir(id).is_dir() {
            true => Ok(()),
            false => self.place(self.build(&Content::Remote)?, id),
        }
    }

    /// Whose directory of its own files this is.
    pub fn id_of(&self, own: &Path) -> Option<u64> {
        let id = own
            .strip_prefix(&self.snapshots)
            .ok()?
            .iter()
            .next()?
            .to_str()?
            .parse()
            .ok()?;
        (self.own(id) == own).then_some(id)
    }

    /// The directory of a snapshot's own files.
    pub fn own(&self, id: u64) -> PathBuf {
        self.dir(id).join(OWN)
    }

    /// The directory of overlayfs' own.
    pub fn work(&self, id: u64) -> PathBuf {
        self.dir(id).join(WORK)
    }

    fn dir(&self, id: u64) -> PathBuf {
        self.snapshots.join(id.to_string())
    }
}

impl RootAttributes {
    /// Those of the directory at `path`.
    pub fn of(path: &Path) -> Result<Self, SnapshotsError> {
        let metadata = fs::metadata(path).map_err(SnapshotsError::io("look at", path))?;
        Ok(RootAttributes {
            uid: metadata.uid(),
            gid: metadata.gid(),
            mode: metadata.mode() & MODE_BITS,
        })
    }
}

/// Makes the directories of a local snapshot in `dir`.
fn fill(dir: &Path, kind: Kind, attributes: Option<RootAttributes>) -> Result<(), SnapshotsError> {
    let own = dir.join(OWN);
    make(&own, attributes.map_or(ROOT_MODE, |attributes| attributes.mode))?;
    if let Some(attributes) = attributes {
        lchown(&own, Some(attributes.uid), Some(attributes.gid))
            .map_err(SnapshotsError::io("change the owner of", &own))?;
        // A change of owner may clear set-user-id and set-group-id bits.
        set_mode(&own, attributes.mode)?;
    }
    if kind == Kind::Active {
        make(&dir.join(WORK), WORK_MODE)?;
    }
    Ok(())
}

fn make(path: &Path, mode: u32) -> Result<(), SnapshotsError> {
    fs::create_dir(path).map_err(SnapshotsError::io("create", path))?;
    set_mode(path, mode)
}

/// Sets a mode that no umask can change.
fn set_mode(path: &Path, mode: u32) -> Result<(), SnapshotsError> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(SnapshotsError::io("set the mode of", path))
}

fn names(path: &Path) -> Result<Vec<std::ffi::OsString>, SnapshotsError> {
    fs::read_dir(path)
        .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect())
        .map_err(SnapshotsError::io("list", path))
}
