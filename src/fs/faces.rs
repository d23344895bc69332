//! The faces of layers and chains: which of them the kernel is shown, and the mounts this takes.
//!
//! *Image*: EROFS metadata of a layer, written here from its index, mounted with the layer's data space as its device. The data space is
//! a file in the FUSE session, or, once the layer is whole, its file in the cache: then no process is needed to read it. *Tree*:
//! directories of the FUSE session. The image serves where the kernel can do it (probe.rs tries), and a layer whose image cannot be made
//! or mounted is shown as a tree all the same. A chain of layers can be merged into one image (chains.rs).
//!
//! # What is trusted
//! The kernel trusts metadata. Those of a layer are written at its first mount in this process, from an index that was checked;
//! what a chain's file holds is believed only together with its digest and the fingerprints of the indexes (stored.rs).
//!
//! # Never in a reader's way
//! A mount makes the kernel ask this very session for files, and the kernel may not answer at all. So each mount call has a thread of
//! its own and a deadline (calls.rs), and no lock that a FUSE request needs is held meanwhile.
//!
//! # After a restart
//! Mounts over a dead session are taken away at once. Those over files of the cache alone go on, and if the session goes on
//! ([`Session::adopt`]), those over it as well, also for containers: such a mount is adopted when its layer is asked for, if it shows the very
//! image that would be mounted now, and taken away when no snapshot needs it. Which face serves was found out by the first process of a
//! session; a later one has to show what is in use as it is.

mod calls;
mod chains;
mod mounts;
mod places;
mod probe;
mod stored;
mod users;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use self::mounts::{Cause, Metadata, Mounts, Source, State, Trouble};
use self::places::{Kind, Places};
use self::stored::{Part, Uuid};
use super::{Carried, FsError, Session};
use crate::config::FaceChoice;
use crate::fetch::{LayerData, LocalFile};
use crate::layer::erofs::{self, Addressing};
use crate::metrics::Metrics;

/// How faces are shown.
#[derive(Debug, Clone)]
pub struct FacesOptions {
    /// What the configuration asks for.
    pub choice: FaceChoice,
    /// Directory of mount points and metadata, which is made if it is missing, with mode 0700.
    pub dir: PathBuf,
    /// Longest time that one mount call may take.
    pub deadline: Duration,
}

/// A face.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Face {
    /// EROFS metadata over the layer's bytes.
    Image,
    /// FUSE directories.
    Tree,
}

impl Face {
    /// Its name in the configuration, in logs and in the status document.
    pub fn word(self) -> &'static str {
        match self {
            Face::Image => "image",
            Face::Tree => "tree",
        }
    }
}

/// Which face serves, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Serving {
    /// The face.
    pub face: Face,
    /// Why, for people.
    pub reason: String,
    /// Whether EROFS metadata come through FUSE, because the kernel mounts no EROFS file from where they lie.
    pub metadata_through_fuse: bool,
    /// Why layers cannot be shown with mapped owners, to containers in user namespaces; `None`: they can.
    pub no_mapped_owners: Option<String>,
}

/// What is shown of a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// `file`: EROFS over files in the cache; `image`: EROFS with FUSE below; `tree`: FUSE directories; `stack`: the layers of a chain one
    /// by one.
    pub word: &'static str,
    /// Why it is no image, if the image face serves.
    pub reason: Option<String>,
    /// Whether an EROFS mount of it exists. If not, the word tells what a container would get now.
    pub mounted: bool,
}

/// A layer as a device of an image.
struct Device {
    slot: u32,
    layer: Arc<dyn LayerData>,
}

/// Shows layers and chains. Owns the FUSE session. Dropped, everything is unmounted.
///
/// Methods block for system calls, and at most about the deadline of one mount call more than once: not for asynchronous tasks.
pub struct Faces {
    // Before the session: these mounts are on top of it.
    mounts: Mounts,
    session: Session,
    serving: Serving,
    /// Whether files of the cache can be mounted.
    files: bool,
    /// How images say where bytes are.
    addressing: Addressing,
    /// Images that an earlier process has mounted and whose metadata are read through the session, by slot.
    inherited: HashMap<u32, Uuid>,
    layers: RwLock<HashMap<u32, Arc<dyn LayerData>>>,
    /// Held while a layer comes or goes, in the session and in `layers`.
    changing: Mutex<()>,
    /// Counts what is given out: see [`Faces::mark`].
    given: AtomicU64,
    /// Held while a chain's image is made.
    building: Mutex<()>,
    metrics: Arc<Metrics>,
}

impl Faces {
    /// Takes away what an earlier process left mounted, and finds out which face can serve: where the image may, by a real mount.
    ///
    /// # Errors
    /// [`FsError::Files`], [`FsError::Stale`], and [`FsError::NoImage`] if nothing but the image will do and that is not possible.
    pub fn open(session: Session, options: FacesOptions, metrics: Arc<Metrics>) -> Result<Faces, FsError> {
        let goes_on = session.is_adopted();
        let places = Places::open(&options.dir, goes_on)?;
        let (waiting, counts) = (Arc::clone(session.waiting()), Arc::clone(&metrics));
        let mounts = Mounts::open(places, options.deadline, goes_on, waiting, counts)?;
        if let Some((serving, files)) = session.inherited() {
            return Self::go_on(session, mounts, serving, files, options.choice, metrics);
        }
        // Read through the page cache, one large file for a whole layer would be read ahead across its files: bytes would be fetched that
        // nobody wants. The image reads ahead within each file.
        session.open_directly(options.choice != FaceChoice::Tree);
        let kernel = rustix::system::uname();
        let release = kernel.release().to_string_lossy();
        let addressing = probe::addressing(&release);
        let probed = match options.choice {
            FaceChoice::Tree => Err("fuse.face is \"tree\" in the configuration".to_owned()),
            FaceChoice::Auto | FaceChoice::Image => probe::probe(&session, &mounts, addressing),
        };
        let (mut serving, files) = match probed {
            Ok(probed) => {
                if let Some(reason) = &probed.no_files {
                    tracing::info!("layers that are wholly in the cache are shown through FUSE as well: {reason}");
                }
                let through = match probed.metadata_through_fuse {
                    true => ", but not from the file system of the root directory: metadata go through FUSE",
                    false => "",
                };
                let serving = Serving {
                    face: Face::Image,
                    reason: format!("Linux {release} mounts EROFS from files{through}"),
                    metadata_through_fuse: probed.metadata_through_fuse,
                    no_mapped_owners: None,
                };
                (serving, probed.no_files.is_none())
            }
            Err(reason) if options.choice == FaceChoice::Image => return Err(FsError::NoImage { reason }),
            Err(reason) => {
                session.open_directly(false);
                let serving = Serving {
                    face: Face::Tree,
                    reason,
                    metadata_through_fuse: false,
                    no_mapped_owners: None,
                };
                (serving, false)
            }
        };
        let tree = (serving.face == Face::Tree).then(|| session.mountpoint());
        serving.no_mapped_owners = users::probe(&mounts, tree).err();
        if let Some(reason) = &serving.no_mapped_owners {
            tracing::warn!("containers in user namespaces cannot be served (capability only-remap-ids): {reason}");
        }
        tracing::info!(
            face = serving.face.word(),
            "layers are shown by this face: {}",
            serving.reason
        );
        Ok(Self::with(session, mounts, serving, files, addressing, metrics))
    }

    fn with(
        session: Session,
        mounts: Mounts,
        serving: Serving,
        files: bool,
        addressing: Addressing,
        metrics: Arc<Metrics>,
    ) -> Faces {
        session.deadlines().explain(serving.face);
        Faces {
            mounts,
            session,
            serving,
            files,
            addressing,
            inherited: HashMap::new(),
            layers: RwLock::default(),
            changing: Mutex::default(),
            given: AtomicU64::new(0),
            building: Mutex::default(),
            metrics,
        }
    }

    /// Goes on with what an earlier process shows.
    fn go_on(
        session: Session,
        mounts: Mounts,
        serving: Serving,
        files: bool,
        choice: FaceChoice,
        metrics: Arc<Metrics>,
    ) -> Result<Faces, FsError> {
        let wanted = match choice {
            FaceChoice::Auto => serving.face,
            FaceChoice::Image => Face::Image,
            FaceChoice::Tree => Face::Tree,
        };
        if wanted != serving.face {
            tracing::warn!(
                face = serving.face.word(),
                "fuse.face says otherwise, but containers use this face; it is chosen anew when Lazuli is stopped with --drain"
            );
        }
        let addressing = probe::addressing(&rustix::system::uname().release().to_string_lossy());
        let mut faces = Self::with(session, mounts, serving, files, addressing, metrics);
        if !faces.serving.metadata_through_fuse {
            return Ok(faces);
        }
        // These are read through the session as well.
        for slot in faces.mounts.leftover_images() {
            let paths = [faces.mounts.places.chain(slot), faces.mounts.places.metadata(slot)];
            let Some((path, file)) = paths.iter().find_map(|path| Some((path, File::open(path).ok()?))) else {
                tracing::error!(slot, "the metadata of an earlier process are gone");
                continue;
            };
            let uuid = stored::uuid_of(&file).map_err(|source| places::files_error(path, source))?;
            faces.inherited.insert(slot, uuid);
            faces.session.attach_metadata(slot, file)?;
        }
        Ok(faces)
    }

    /// Begins to answer, where an earlier process has shown things: what it had in use is attached or expected by now.
    ///
    /// # Errors
    /// [`FsError::Start`].
    pub fn begin(&self) -> Result<(), FsError> {
        self.session.begin()?;
        self.mounts.begin();
        Ok(())
    }

    /// What a later process has to know to go on, and the descriptor for it.
    pub fn carry(&self) -> Option<(BorrowedFd<'_>, Carried)> {
        self.session.carry(self.serving.clone(), self.files)
    }

    /// Which face serves, and why.
    pub fn serving(&self) -> &Serving {
        &self.serving
    }

    /// Puts `layer` into `slot`. The same layer may be attached again, and its new reader replaces the old one. If its index is another
    /// one, mounts made of the old index are taken away.
    ///
    /// # Errors
    /// [`FsError::SlotZero`], [`FsError::SlotTaken`].
    pub fn attach(&self, slot: u32, layer: Arc<dyn LayerData>) -> Result<(), FsError> {
        let changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.session.attach(slot, Arc::clone(&layer))?;
        let mut layers = self.layers.write().unwrap_or_else(PoisonError::into_inner);
        layers.insert(slot, Arc::clone(&layer));
        drop(layers);
        drop(changing);
        if let Some(entry) = self.mounts.find(slot) {
            let mut state = entry.lock();
            if let Some(metadata) = &state.metadata
                && metadata.parts != [Part::of(layer.index())]
            {
                tracing::info!(slot, layer = %layer.digest(), "the layer has another index now");
                let _ = self.mounts.dismount(slot, &mut state);
                self.drop_metadata(slot, &mut state);
            }
            state.trouble = None;
            // A mount of an earlier process shows the layer's file: it has to stay, and to be verified before the mount is adopted.
            if let (Some(holds), Some(file)) = (&mut state.leftover, layer.local_file()) {
                holds.push(file.hold);
            }
            entry.tell(&state, Face::Tree.word());
        }
        Ok(())
    }

    /// Takes the layer in `slot` and all its mounts away. Tells whether there was one.
    pub fn detach(&self, slot: u32) -> bool {
        self.detach_if(slot, |_| true)
    }

    /// The same, if it is this very reader that is in `slot`: the layer may have come back with another one.
    pub fn detach_layer(&self, slot: u32, layer: &Arc<dyn LayerData>) -> bool {
        self.detach_if(slot, |there| std::ptr::addr_eq(Arc::as_ptr(there), Arc::as_ptr(layer)))
    }

    fn detach_if(&self, slot: u32, is_it: impl Fn(&Arc<dyn LayerData>) -> bool) -> bool {
        let changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.layer(slot).is_some_and(|there| is_it(&there)) {
            return false;
        }
        let mut layers = self.layers.write().unwrap_or_else(PoisonError::into_inner);
        layers.remove(&slot);
        drop(layers);
        let there = self.session.detach(slot);
        drop(changing);
        if let Some(entry) = self.mounts.find(slot) {
            let mut state = entry.lock();
            // Another reader may have come to the slot meanwhile; then its mounts are good.
            if self.layer(slot).is_none() {
                let _ = self.mounts.dismount(slot, &mut state);
                self.drop_metadata(slot, &mut state);
                self.mounts.remove(slot);
            }
        }
        there
    }

    /// The directory that shows the layer in `slot`, mounted now if it is not. A layer that cannot be shown as an image is shown as a
    /// tree; [`Faces::shown`] says why.
    ///
    /// # Errors
    /// [`FsError::NotAttached`].
    pub fn layer_path(&self, slot: u32) -> Result<PathBuf, FsError> {
        let layer = self.layer(slot).ok_or(FsError::NotAttached { slot })?;
        if self.serving.face == Face::Tree {
            return Ok(self.session.path(slot));
        }
        let entry = self.mounts.entry(slot);
        let mut state = entry.lock();
        state.given = self.given.load(Ordering::SeqCst);
        let path = self.show(slot, &mut state, &[Device { slot, layer }]);
        entry.tell(&state, Face::Tree.word());
        Ok(path.unwrap_or_else(|| self.session.path(slot)))
    }

    /// A mark in time: paths that are given out from now on are later. For [`Faces::retain`].
    pub fn mark(&self) -> u64 {
        self.given.fetch_add(1, Ordering::SeqCst)
    }

    /// Unmounts every layer and chain that is not in `needed`, and of which no path was given out after `mark`. They stay attached, and are
    /// mounted again when they are asked for.
    ///
    /// Paths that were handed out for slots in `needed` stay. An overlay goes on with what it was made of, but files of the cache may then
    /// be evicted below it: a slot is needed until no overlay uses it.
    pub fn retain(&self, needed: &HashSet<u32>, mark: u64) {
        self.mounts.retain(needed, mark, |slot, entry, state| {
            let fallback = match self.layer(slot) {
                Some(_) => {
                    self.drop_metadata(slot, state);
                    Face::Tree.word()
                }
                None => chains::STACK,
            };
            entry.tell(state, fallback);
        });
    }

    /// What is shown of the layer or chain in `slot`.
    pub fn shown(&self, slot: u32) -> Shown {
        let nothing = || {
            let layer = self.layer(slot).is_some();
            Shown {
                word: match (self.serving.face, layer) {
                    (Face::Image, true) => Kind::Image.word(),
                    (Face::Tree, true) => Face::Tree.word(),
                    (_, false) => chains::STACK,
                },
                reason: None,
                mounted: false,
            }
        };
        match self.serving.face {
            Face::Image => self
                .mounts
                .find(slot)
                .and_then(|entry| entry.shown())
                .unwrap_or_else(nothing),
            Face::Tree => nothing(),
        }
    }

    /// The FUSE session.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Unmounts everything, and ends the session.
    ///
    /// # Errors
    /// [`FsError::Unmount`], [`FsError::Stuck`].
    pub fn close(self) -> Result<(), FsError> {
        let Faces { mounts, session, .. } = self;
        drop(mounts);
        session.unmount()
    }

    fn layer(&self, slot: u32) -> Option<Arc<dyn LayerData>> {
        let layers = self.layers.read().unwrap_or_else(PoisonError::into_inner);
        layers.get(&slot).cloned()
    }

    /// Where the image of `devices` is mounted, which happens now if it is not: over files of the cache if all of them are whole.
    /// `None`: it cannot be, and the state says why.
    fn show(&self, slot: u32, state: &mut State, devices: &[Device]) -> Option<PathBuf> {
        self.mounts.look(state);
        if let Some(path) = state.path(Kind::File) {
            return Some(path);
        }
        let files = self.files_of(devices);
        let shown = state.path(Kind::Image);
        if (files.is_none() && shown.is_some()) || state.is_troubled() {
            return shown;
        }
        let begun = Instant::now();
        if state.metadata.is_none() {
            match self.write_layer(slot, devices) {
                Ok(metadata) => state.metadata = Some(metadata),
                Err(trouble) => {
                    self.mounts.fail(slot, state, trouble);
                    return None;
                }
            }
        }
        let (mut mounted, with_files) = match files {
            Some(files) => (self.mount_files(slot, state, files), true),
            None => self.mount_image(slot, state, devices, true),
        };
        if mounted.is_none() && with_files && shown.is_none() {
            // Without files of the cache, there is still FUSE.
            let trouble = state.trouble.take();
            mounted = match &trouble {
                Some(trouble) if trouble.cause == Cause::Deadline => None,
                _ => self.mount_image(slot, state, devices, false).0,
            };
            // Not before a while is the first way tried again.
            state.trouble = state.trouble.take().or(trouble);
        }
        if mounted.is_some() {
            self.metrics.face_mount_seconds.observe(begun.elapsed().as_secs_f64());
        }
        mounted.or(shown)
    }

    /// Mounts over files of the cache alone.
    fn mount_files(&self, slot: u32, state: &mut State, files: Vec<LocalFile>) -> Option<PathBuf> {
        let (paths, holds): (Vec<_>, Vec<_>) = files.into_iter().map(|file| (file.path, file.hold)).unzip();
        let read = Vec::new();
        let source = match self
            .mounts
            .adopt(slot, state, Kind::File, Source { paths, holds, read })
        {
            Ok(path) => return Some(path),
            Err(source) => source,
        };
        match self.mounts.mount(slot, state, Kind::File, true, source) {
            Ok(path) => Some(path),
            Err(trouble) => {
                self.mounts.fail(slot, state, trouble);
                None
            }
        }
    }

    /// Mounts over FUSE, but for layers that are whole in the cache if `files` may be used; tells whether any was.
    fn mount_image(&self, slot: u32, state: &mut State, devices: &[Device], files: bool) -> (Option<PathBuf>, bool) {
        let (mut holds, mut read) = (Vec::new(), Vec::new());
        let mut paths = Vec::with_capacity(devices.len());
        for device in devices {
            let file = match files && self.files {
                true => device.layer.local_file(),
                false => None,
            };
            match file {
                Some(file) => {
                    holds.push(file.hold);
                    paths.push(file.path);
                }
                None => {
                    read.push(*device.layer.id());
                    paths.push(self.session.data_path(device.slot));
                }
            }
        }
        let with_files = !holds.is_empty();
        let source = match self
            .mounts
            .adopt(slot, state, Kind::Image, Source { paths, holds, read })
        {
            Ok(path) => return (Some(path), with_files),
            Err(source) => source,
        };
        let local = devices.iter().all(|device| device.layer.is_local());
        match self.mounts.mount(slot, state, Kind::Image, local, source) {
            Ok(path) => (Some(path), with_files),
            Err(trouble) => {
                self.mounts.fail(slot, state, trouble);
                (None, with_files)
            }
        }
    }

    /// The files of all devices, if all are whole in the cache.
    fn files_of(&self, devices: &[Device]) -> Option<Vec<LocalFile>> {
        match self.files {
            true => devices.iter().map(|device| device.layer.local_file()).collect(),
            false => None,
        }
    }

    /// Writes the metadata of the one layer in `devices`. (A chain comes with its own.)
    fn write_layer(&self, slot: u32, devices: &[Device]) -> Result<Metadata, Trouble> {
        let [Device { layer, .. }] = devices else {
            return Err(Trouble::lasting(Cause::Index, "the chain has no image".to_owned()));
        };
        let index = layer
            .names()
            .map_err(|error| Trouble::passing(Cause::Disk, error.to_string()))?;
        let device = erofs::Device {
            tag: *layer.id(),
            size: index.data_size(),
        };
        let image = erofs::write(&index, &[device], self.addressing)
            .map_err(|error| Trouble::lasting(Cause::Index, error.to_string()))?;
        self.count_dropped(slot, image.dropped_xattrs);
        let path = self.mounts.places.metadata(slot);
        self.mounts.places.write(&path, &[&image.bytes], false)?;
        Ok(Metadata {
            source: self.source(slot, path)?,
            uuid: stored::uuid(&image.bytes),
            parts: vec![Part::of(layer.index())],
        })
    }

    /// What the kernel mounts for the metadata in the file `path`.
    fn source(&self, slot: u32, path: PathBuf) -> Result<PathBuf, FsError> {
        if !self.serving.metadata_through_fuse {
            return Ok(path);
        }
        let file = File::open(&path).map_err(|source| places::files_error(&path, source))?;
        if let Some(inherited) = self.inherited.get(&slot) {
            let uuid = stored::uuid_of(&file).map_err(|source| places::files_error(&path, source))?;
            if uuid != *inherited {
                let source =
                    io::Error::other("an earlier version has mounted another image there, which containers may use");
                return Err(FsError::Metadata { slot, source });
            }
        }
        self.session.attach_metadata(slot, file)?;
        Ok(self.session.metadata_path(slot))
    }

    /// Forgets the metadata of a layer.
    fn drop_metadata(&self, slot: u32, state: &mut State) {
        if state.metadata.take().is_some() {
            self.session.detach_metadata(slot);
            self.mounts.places.remove(&self.mounts.places.metadata(slot));
        }
    }

    fn count_dropped(&self, slot: u32, count: u64) {
        if count > 0 {
            tracing::warn!(
                slot,
                count,
                "extended attributes are left out, since EROFS cannot express them"
            );
            self.metrics.face_dropped_xattrs_total.inc_by(count);
        }
    }
}
