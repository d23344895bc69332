//! The mounts there are: what each slot shows, made and taken away one at a time.
//!
//! Each slot has a state behind a lock of its own, which is held while the kernel mounts or unmounts it. Nobody who answers FUSE requests
//! takes such a lock: the kernel asks this very process for the files that it is to mount.
//!
//! A path that was handed out stays as it is until [`Mounts::retain`]: when a layer becomes complete, its mount over files of the cache
//! comes beside the one over FUSE, not in its place.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::calls::{CallError, Calls};
use super::places::{Kind, Places, make_mount_point};
use super::stored::{Part, Uuid};
use super::{FsError, Shown};
use crate::cache::Hold;
use crate::fs::waiting::{Showing, Waiting};
use crate::layer::Digest;
use crate::metrics::Metrics;
use crate::sys::erofs::{self, ErofsOptions};
use crate::sys::mount::{Unmount, unmount};
use crate::sys::mountinfo;

/// How every image is mounted.
pub(super) const OPTIONS: ErofsOptions = ErofsOptions {
    direct_io: false,
    read_ahead_kib: None,
};
/// How long nothing is tried again after a mount failed.
const RETRY_AFTER: Duration = Duration::from_secs(60);
/// Most mounts that are taken away from one mount point; more can only mean that something makes new ones.
const STACKED_MAX: usize = 64;

/// The image of a layer or chain: a file, and what it was made of.
#[derive(Debug, Clone)]
pub(super) struct Metadata {
    /// The file that the kernel mounts.
    pub(super) source: PathBuf,
    pub(super) uuid: Uuid,
    /// The layers, the lowest first.
    pub(super) parts: Vec<Part>,
}

/// A mount that exists.
struct Mounted {
    path: PathBuf,
    kind: Kind,
    /// Device number of its file system, to know it by.
    device: u64,
    /// What keeps the files of the cache in place that it shows.
    _holds: Vec<Hold>,
    /// What it reads through the session.
    showing: Option<Showing>,
}

/// What a mount is made of.
pub(super) struct Source {
    /// The files and where they are: data files of the session, or files of the cache.
    pub(super) paths: Vec<PathBuf>,
    /// What keeps the latter in place.
    pub(super) holds: Vec<Hold>,
    /// The layers of the former, by their ids.
    pub(super) read: Vec<Digest>,
}

/// Why the image cannot be shown.
#[derive(Debug)]
pub(super) struct Trouble {
    pub(super) cause: Cause,
    pub(super) reason: String,
    /// When it may be tried again; `None`: it would be the same for ever.
    pub(super) until: Option<Instant>,
}

/// Kinds of trouble, as the metrics name them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// EROFS cannot express the tree.
    Index,
    /// The image cannot be stored.
    Disk,
    /// The kernel refused.
    Mount,
    /// The kernel did not answer.
    Deadline,
}

impl Cause {
    fn word(self) -> &'static str {
        match self {
            Cause::Index => "index",
            Cause::Disk => "disk",
            Cause::Mount => "mount",
            Cause::Deadline => "deadline",
        }
    }
}

impl Trouble {
    /// One that may pass.
    pub(super) fn passing(cause: Cause, reason: String) -> Self {
        Trouble {
            cause,
            reason,
            until: Instant::now().checked_add(RETRY_AFTER),
        }
    }

    /// One that stays.
    pub(super) fn lasting(cause: Cause, reason: String) -> Self {
        Trouble {
            cause,
            reason,
            until: None,
        }
    }
}

impl From<CallError> for Trouble {
    fn from(error: CallError) -> Self {
        let cause = if error.is_silence() {
            Cause::Deadline
        } else {
            Cause::Mount
        };
        Trouble::passing(cause, error.to_string())
    }
}

impl From<FsError> for Trouble {
    fn from(error: FsError) -> Self {
        Trouble::passing(Cause::Disk, error.to_string())
    }
}

/// What a slot shows.
#[derive(Default)]
pub(super) struct State {
    pub(super) metadata: Option<Metadata>,
    file: Option<Mounted>,
    image: Option<Mounted>,
    /// A mount of an earlier process over files of the cache is at its place. What is said to hold those files, since the layer was
    /// attached, goes with it.
    pub(super) leftover: Option<Vec<Hold>>,
    /// A mount of an earlier process over the session, which goes on, is at its place.
    leftover_image: Option<Showing>,
    /// What mounts read that somebody else has taken out of sight: overlays may still use them.
    strays: Vec<Showing>,
    pub(super) trouble: Option<Trouble>,
    /// The mark at which a path of it was given out last.
    pub(super) given: u64,
}

impl State {
    fn place(&mut self, kind: Kind) -> &mut Option<Mounted> {
        match kind {
            Kind::File => &mut self.file,
            Kind::Image => &mut self.image,
        }
    }

    /// Where it is mounted in this way.
    pub(super) fn path(&self, kind: Kind) -> Option<PathBuf> {
        let mounted = match kind {
            Kind::File => &self.file,
            Kind::Image => &self.image,
        };
        mounted.as_ref().map(|mounted| mounted.path.clone())
    }

    /// Whether there is trouble that must not be looked for again yet.
    pub(super) fn is_troubled(&self) -> bool {
        self.trouble
            .as_ref()
            .is_some_and(|trouble| trouble.until.is_none_or(|until| Instant::now() < until))
    }

    /// What there is, where nothing else is known: `fallback` and the trouble.
    fn shown(&self, fallback: &'static str) -> Shown {
        let mounted = [&self.file, &self.image].into_iter().flatten().next();
        match (mounted, &self.trouble) {
            (Some(mounted), _) => Shown {
                word: mounted.kind.word(),
                reason: None,
                mounted: true,
            },
            (None, Some(trouble)) => Shown {
                word: fallback,
                reason: Some(trouble.reason.clone()),
                mounted: false,
            },
            (None, None) => Shown {
                word: Kind::Image.word(),
                reason: None,
                mounted: false,
            },
        }
    }
}

/// A slot.
#[derive(Default)]
pub(super) struct Entry {
    state: Mutex<State>,
    /// What the state said last, to be read while that is locked.
    shown: Mutex<Option<Shown>>,
}

impl Entry {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers what is shown now; `fallback` is the word for what is shown without a mount.
    pub(super) fn tell(&self, state: &State, fallback: &'static str) {
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = Some(state.shown(fallback));
    }

    pub(super) fn shown(&self) -> Option<Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// All slots. Dropped, everything is unmounted.
pub(super) struct Mounts {
    pub(super) places: Places,
    pub(super) calls: Calls,
    /// Whether mounts stay when this is dropped: this process has not begun yet to go on with what an earlier one has mounted.
    stay: AtomicBool,
    entries: Mutex<HashMap<u32, Arc<Entry>>>,
    /// Mounts that could not be taken away: what they show must stay in place.
    lost: Mutex<Vec<Mounted>>,
    waiting: Arc<Waiting>,
    metrics: Arc<Metrics>,
}

impl Mounts {
    /// Takes mounts of earlier processes away, but for those that need no process, or, if `goes_on`, whose session goes on: they wait to be
    /// adopted.
    pub(super) fn open(
        places: Places,
        deadline: Duration,
        goes_on: bool,
        waiting: Arc<Waiting>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, FsError> {
        let mounts = Mounts {
            stay: AtomicBool::new(goes_on),
            calls: Calls::new(deadline, metrics.face_calls_left_behind.clone()),
            places,
            entries: Mutex::default(),
            lost: Mutex::default(),
            waiting,
            metrics,
        };
        let stale = |source| FsError::Stale {
            mountpoint: mounts.places.dir().to_owned(),
            source,
        };
        let (mut kept, mut removed) = (0, 0);
        for mount in mountinfo::mounts().map_err(stale)? {
            if !mount.mount_point.starts_with(mounts.places.dir()) {
                continue;
            }
            match mounts.places.parse(&mount.mount_point) {
                Some((slot, Kind::File)) if mount.fs_type == erofs::FS_TYPE => {
                    mounts.entry(slot).lock().leftover = Some(Vec::new());
                    kept += 1;
                }
                Some((slot, Kind::Image)) if goes_on && mount.fs_type == erofs::FS_TYPE => {
                    mounts.entry(slot).lock().leftover_image = Some(mounts.waiting.show_unknown());
                    kept += 1;
                }
                // Of a mount at the directory itself or deeper, somebody else must know.
                None if mount.mount_point.parent() != Some(mounts.places.dir()) => {}
                _ => {
                    if let Err(error) = mounts.unmount(mount.mount_point.clone()) {
                        tracing::error!("cannot unmount {}: {error}", mount.mount_point.display());
                    }
                    removed += 1;
                }
            }
        }
        if kept + removed > 0 {
            tracing::info!(kept, removed, "mounts of an earlier process were found");
        }
        Ok(mounts)
    }

    /// From now on this process answers for what is mounted.
    pub(super) fn begin(&self) {
        self.stay.store(false, Ordering::Relaxed);
    }

    /// Slots with a mount of an earlier process over the session.
    pub(super) fn leftover_images(&self) -> Vec<u32> {
        let all = self.all().into_iter();
        all.filter_map(|(slot, entry)| entry.lock().leftover_image.is_some().then_some(slot))
            .collect()
    }

    /// The entry of `slot`, made if it is missing.
    pub(super) fn entry(&self, slot: u32) -> Arc<Entry> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(entries.entry(slot).or_default())
    }

    /// The entry of `slot`, if there is one.
    pub(super) fn find(&self, slot: u32) -> Option<Arc<Entry>> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.get(&slot).cloned()
    }

    fn all(&self) -> Vec<(u32, Arc<Entry>)> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.iter().map(|(slot, entry)| (*slot, Arc::clone(entry))).collect()
    }

    /// Forgets mounts that somebody else has taken away.
    pub(super) fn look(&self, state: &mut State) {
        for kind in Kind::ALL {
            let gone = state
                .place(kind)
                .take_if(|mounted| !erofs::device(&mounted.path).is_ok_and(|device| device == mounted.device));
            if let Some(mounted) = gone {
                tracing::warn!("{} was unmounted by somebody else", mounted.path.display());
                state.strays.extend(mounted.showing);
                self.count(mounted.kind, -1);
            }
        }
    }

    /// Mounts an image for `slot`; `local` says whether none of its bytes has to be fetched. Returns its path.
    pub(super) fn mount(
        &self,
        slot: u32,
        state: &mut State,
        kind: Kind,
        local: bool,
        source: Source,
    ) -> Result<PathBuf, Trouble> {
        let Some(metadata) = state.metadata.clone() else {
            return Err(Trouble::lasting(Cause::Index, "there is no image".to_owned()));
        };
        let path = self.places.mount_point(slot, kind);
        make_mount_point(&path)?;
        let options = ErofsOptions {
            // As far as in files of that disk. What has yet to be fetched is read ahead by the kernel's small default.
            read_ahead_kib: match local {
                true => erofs::read_ahead_at(self.places.dir()),
                false => None,
            },
            ..OPTIONS
        };
        let device = self.mount_at(&path, metadata.source, source.paths, options)?;
        *state.place(kind) = Some(Mounted {
            path: path.clone(),
            kind,
            device,
            _holds: source.holds,
            showing: Some(self.waiting.show(source.read)),
        });
        state.trouble = None;
        self.count(kind, 1);
        Ok(path)
    }

    /// Mounts the image `source` at the directory `path`, and gives the device number of the mount.
    pub(super) fn mount_at(
        &self,
        path: &Path,
        source: PathBuf,
        devices: Vec<PathBuf>,
        options: ErofsOptions,
    ) -> Result<u64, CallError> {
        let mount = self.calls.run(move || erofs::mount(&source, &devices, options))?;
        // Neither asks who serves it: the mount point is a directory of the local disk, and the root of an image is in memory.
        mount.attach(path)?;
        Ok(erofs::device(path)?)
    }

    /// Takes over the mount of an earlier process, if it shows the very image that this process would mount.
    pub(super) fn adopt(&self, slot: u32, state: &mut State, kind: Kind, source: Source) -> Result<PathBuf, Source> {
        let is_left = match kind {
            Kind::File => state.leftover.is_some(),
            Kind::Image => state.leftover_image.is_some(),
        };
        let Some(metadata) = state.metadata.as_ref().filter(|_| is_left) else {
            return Err(source);
        };
        let path = self.places.mount_point(slot, kind);
        let uuid = metadata.uuid;
        // With metadata from FUSE, it may ask this very process.
        let look = {
            let path = path.clone();
            move || Ok((erofs::uuid(&path)?, erofs::device(&path)?))
        };
        let device = match self.calls.run(look) {
            Ok((there, device)) if there == Some(uuid) => device,
            _ => return Err(source),
        };
        *state.place(kind) = Some(Mounted {
            path: path.clone(),
            kind,
            device,
            _holds: source.holds,
            showing: Some(self.waiting.show(source.read)),
        });
        match kind {
            Kind::File => state.leftover = None,
            Kind::Image => state.leftover_image = None,
        }
        self.count(kind, 1);
        tracing::info!(slot, kind = kind.word(), "the mount of an earlier process goes on");
        Ok(path)
    }

    /// Takes away all mounts of `slot`. What cannot be taken away stays, and what it shows stays in place.
    pub(super) fn dismount(&self, slot: u32, state: &mut State) -> Result<(), CallError> {
        let mut result = Ok(());
        state.strays.clear();
        if state.leftover.take().is_some() && state.file.is_none() {
            result = self.unmount(self.places.mount_point(slot, Kind::File));
        }
        if state.leftover_image.take().is_some() && state.image.is_none() {
            result = result.and(self.unmount(self.places.mount_point(slot, Kind::Image)));
        }
        for kind in Kind::ALL {
            let Some(mut mounted) = state.place(kind).take() else {
                continue;
            };
            self.count(kind, -1);
            // The kernel waits for reads of what it takes away.
            mounted.showing = None;
            let unmounted = self.unmount(mounted.path.clone());
            if unmounted.is_err() {
                self.lost.lock().unwrap_or_else(PoisonError::into_inner).push(mounted);
            }
            result = result.and(unmounted);
        }
        if let Err(error) = &result {
            tracing::error!(slot, "cannot unmount: {error}");
        }
        result
    }

    /// Removes every mount at `path`, and the mount point.
    pub(super) fn unmount(&self, path: PathBuf) -> Result<(), CallError> {
        self.calls.run(move || {
            for _ in 0..STACKED_MAX {
                match unmount(&path, Unmount::Detach) {
                    Ok(()) => {}
                    // Nothing is mounted there (any more), or there is no such directory.
                    Err(error) if matches!(error.source.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => break,
                    Err(error) => return Err(error),
                }
            }
            // It is in nobody's way if it stays.
            let _ = std::fs::remove_dir(&path);
            Ok(())
        })
    }

    /// Takes away the mounts of all slots that are not in `needed` and were not given out after `mark`, and tells `gone` of each.
    pub(super) fn retain(&self, needed: &HashSet<u32>, mark: u64, gone: impl Fn(u32, &Entry, &mut State)) {
        for (slot, entry) in self.all() {
            if needed.contains(&slot) {
                continue;
            }
            let mut state = entry.lock();
            if state.given > mark {
                continue;
            }
            let result = self.dismount(slot, &mut state);
            gone(slot, &entry, &mut state);
            if result.is_err_and(|error| error.is_silence()) {
                return;
            }
        }
    }

    /// Forgets `slot`; its mounts must have been taken away.
    pub(super) fn remove(&self, slot: u32) {
        self.entries
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&slot);
    }

    /// Notes a failure, in the log and in the metrics.
    pub(super) fn fail(&self, slot: u32, state: &mut State, trouble: Trouble) {
        self.metrics
            .face_mount_failures_total
            .with_label_values(&[trouble.cause.word()])
            .inc();
        tracing::warn!(slot, "it cannot be shown as an image: {}", trouble.reason);
        state.trouble = Some(trouble);
    }

    fn count(&self, kind: Kind, change: i64) {
        self.metrics.face_mounts.with_label_values(&[kind.word()]).add(change);
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        if self.stay.load(Ordering::Relaxed) {
            return;
        }
        self.retain(&HashSet::new(), u64::MAX, |_, _, _| {});
    }
}
