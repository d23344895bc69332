//! The FUSE session: mounting or taking over, the threads that answer, layers that come and go, and the end.
//!
//! Lazuli mounts by itself (`fsopen`) and hands fuser the descriptor: the mount appears at its place only when it is answered, and
//! the descriptor may as well come from an earlier process (carried.rs). Then nothing is read from it before [`Session::begin`]: until then
//! the layers that are in use have to be attached or expected.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fuser::{INodeNo, Notifier, SessionACL};
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::awaited::Awaited;
use super::carried::{Carried, Handshake};
use super::counters::Counters;
use super::deadlines::Deadlines;
use super::face::{Face, Shared};
use super::faces::Serving;
use super::image::Entry;
use super::mountpoint::{SUBTYPE, clear, make, place_of, remove};
use super::read::Reads;
use super::tree::{self, Tree};
use super::waiting::Waiting;
use super::{FsError, awaited};
use crate::fetch::LayerData;
use crate::metrics::Metrics;
use crate::sys;
use crate::sys::mountinfo::{Mount, mount_at};

/// Least and most threads when the number is left to Lazuli: one per processor between them. They answer what is local, so more would
/// only wait for each other; but what is local may have to come from a disk, and that does several reads at once.
const THREADS_MIN: usize = 4;
const THREADS_MAX: usize = 8;
/// How far the kernel reads ahead in a file, in KiB: as much as one FUSE request can carry.
const READ_AHEAD_KIB: u32 = 1024;
/// How long the threads may take to end after the unmount, and again after the connection is aborted.
const END_WAIT: Duration = Duration::from_secs(2);

/// How a session works.
#[derive(Debug, Clone)]
pub struct SessionOptions {
    /// Threads that answer the kernel; 0 means one per processor, at least 4 and at most 8.
    pub threads: usize,
    /// Longest time a reader waits for bytes that have to be fetched, before it gets EIO.
    pub read_deadline: Duration,
    /// Source of the mount in the list of mounts.
    pub source_name: String,
}

/// How often it is looked for requests that have waited for their layer for too long.
const OVERDUE_EVERY: Duration = Duration::from_secs(1);

/// A mounted FUSE file system with its threads. Dropped, it is unmounted, unless it was taken over and never began.
pub struct Session {
    tree: Arc<Tree>,
    awaited: Arc<Awaited>,
    /// The connection to the kernel.
    device: OwnedFd,
    hands: Handshake,
    /// The threads that answer, until they are started.
    idle: Mutex<Option<Idle>>,
    /// What an earlier process has found out, if one has opened the connection: which face serves, and whether files can be mounted.
    inherited: Option<(Serving, bool)>,
    mountpoint: PathBuf,
    notifier: Notifier,
    runtime: Handle,
    /// Whether data files are opened past the page cache.
    direct: Arc<AtomicBool>,
    deadlines: Deadlines,
    /// The reads that wait.
    waiting: Arc<Waiting>,
    /// The mount, until it is unmounted.
    mount: Option<Mount>,
    /// Tells when all threads have ended.
    ended: Mutex<Receiver<io::Result<()>>>,
    over: watch::Receiver<bool>,
}

/// What becomes the threads that answer.
struct Idle {
    engine: fuser::Session<Face>,
    ended: mpsc::Sender<io::Result<()>>,
    over: watch::Sender<bool>,
}

/// A connection that an earlier process has opened, and what it said of it.
#[derive(Debug)]
pub struct Legacy {
    /// The descriptor.
    pub device: OwnedFd,
    /// What is to be known of it.
    pub carried: Carried,
}

impl Session {
    /// Mounts at the directory `mountpoint`, which is made if it is missing, and begins to answer. A mount of Lazuli's that is there
    /// already is what a process left behind that did not end cleanly: it is aborted and removed.
    ///
    /// The mount lets every user in, as the processes of containers are of any user; it is the caller's duty that `mountpoint`'s
    /// parent directory has mode 0700. Cold reads run on `runtime`; once that is shut down, they fail.
    ///
    /// Blocks for a few system calls.
    ///
    /// # Errors
    /// [`FsError`]; nothing is left mounted then.
    pub fn mount(
        mountpoint: &Path,
        options: SessionOptions,
        runtime: Handle,
        metrics: Arc<Metrics>,
    ) -> Result<Session, FsError> {
        let mountpoint = place_of(mountpoint)?;
        clear(&mountpoint)?;
        make(&mountpoint)?;
        let mount_error = |source| FsError::Mount {
            mountpoint: mountpoint.clone(),
            source,
        };
        let (device, detached) = sys::fuse::open(sys::fuse::FuseOptions {
            source: &options.source_name,
            subtype: SUBTYPE,
        })
        .map_err(mount_error)?;
        let init = sys::fuse::read_init(&device).map_err(mount_error)?;
        let direct = Arc::new(AtomicBool::new(false));
        let mut session = Self::with(mountpoint.clone(), device, init, direct, &options, runtime, metrics)?;
        rustix::io::write(&session.device, &session.hands.answer).map_err(|error| session.start_error(error.into()))?;
        // If anything fails from here on, the session is dropped, and with it the connection: the threads end by themselves.
        session.begin()?;
        detached.attach(&mountpoint).map_err(mount_error)?;
        session.mount = mount_at(&mountpoint).map_err(mount_error)?;
        if let Some(mount) = &session.mount
            && let Err(error) = sys::fuse::set_read_ahead(mount.major, mount.minor, READ_AHEAD_KIB)
        {
            tracing::info!("read-ahead stays at the kernel's default: {error}");
        }
        Ok(session)
    }

    /// Takes over a session that an earlier process has mounted at `mountpoint`, and that nobody answers any more. Nobody is answered before
    /// [`Session::begin`].
    ///
    /// `None`: it cannot go on, which is logged. [`Session::mount`] takes it away.
    ///
    /// # Errors
    /// [`FsError`]; then as well.
    pub fn adopt(
        mountpoint: &Path,
        legacy: Legacy,
        options: &SessionOptions,
        runtime: Handle,
        metrics: Arc<Metrics>,
    ) -> Result<Option<Session>, FsError> {
        let mountpoint = place_of(mountpoint)?;
        let Legacy { device, carried } = legacy;
        if let Some(obstacle) = carried.obstacle(&device, &mountpoint) {
            tracing::error!(
                "the FUSE connection of an earlier process is given up: {obstacle}; who uses it gets errors"
            );
            // It may not be what is mounted there: nobody is to wait in it. Once it has ended, its number may be somebody else's.
            if sys::fuse::is_connected(&device) {
                let _ = sys::fuse::abort(carried.major, carried.minor);
            }
            return Ok(None);
        }
        let direct = Arc::new(AtomicBool::new(carried.direct));
        let mount = mount_at(&mountpoint).ok().flatten();
        let mut session = Self::with(mountpoint, device, carried.init, direct, options, runtime, metrics)?;
        if session.hands.answer != carried.answer {
            tracing::info!(
                "this version would agree with the kernel on other things; what was agreed on at first stays"
            );
            session.hands.answer = carried.answer;
        }
        session.inherited = Some((carried.serving, carried.files));
        session.mount = mount;
        Ok(Some(session))
    }

    /// A session on `device`, on which the kernel has sent `init`.
    fn with(
        mountpoint: PathBuf,
        device: OwnedFd,
        init: Vec<u8>,
        direct: Arc<AtomicBool>,
        options: &SessionOptions,
        runtime: Handle,
        metrics: Arc<Metrics>,
    ) -> Result<Session, FsError> {
        let counters = Arc::new(Counters::new(Arc::clone(&metrics)));
        let deadlines = Deadlines::new(
            options.read_deadline,
            sys::fuse::request_timeout(),
            sys::limits::hung_task_timeout(),
        );
        let waiting = Waiting::new(metrics.waiting_reads.clone());
        let (tree, awaited) = (Arc::new(Tree::new()), Arc::new(Awaited::default()));
        let face = Face::new(Shared {
            tree: Arc::clone(&tree),
            reads: Reads::new(
                runtime.clone(),
                deadlines,
                Arc::clone(&waiting),
                Arc::clone(&counters),
                &metrics,
            ),
            counters,
            direct: Arc::clone(&direct),
            awaited: Arc::clone(&awaited),
        });
        let mut config = fuser::Config::default();
        config.n_threads = Some(threads(options.threads));
        // One descriptor for all threads: a later process can take over one, not as many as there are threads.
        config.clone_fd = false;
        config.acl = SessionACL::All;
        let (hands, engine) = Handshake::had(face, config, init).map_err(|source| FsError::Start {
            mountpoint: mountpoint.clone(),
            source,
        })?;
        let notifier = engine.notifier();
        let ((ended, receiver), (over, is_over)) = (mpsc::channel(), watch::channel(false));
        Ok(Session {
            tree,
            awaited,
            device,
            hands,
            idle: Mutex::new(Some(Idle { engine, ended, over })),
            inherited: None,
            mountpoint,
            notifier,
            runtime,
            direct,
            deadlines,
            waiting,
            mount: None,
            ended: Mutex::new(receiver),
            over: is_over,
        })
    }

    /// Begins to answer, if it does not yet. What an earlier process has read and not answered is answered as well.
    ///
    /// # Errors
    /// [`FsError::Start`].
    pub fn begin(&self) -> Result<(), FsError> {
        let Some(idle) = self.idle.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return Ok(());
        };
        let Idle { engine, ended, over } = idle;
        sys::fuse::replace(&engine, &self.device).map_err(|error| self.start_error(error.source))?;
        if self.is_adopted() && sys::fuse::can_resend(&self.hands.init) {
            sys::fuse::resend(&self.device).map_err(|error| self.start_error(error.source))?;
        }
        if self.awaited.is_any() {
            self.watch_overdue();
        }
        let work = move || {
            let result = engine.run();
            match &result {
                Ok(()) => tracing::info!("the FUSE session has ended"),
                Err(error) => tracing::error!("the FUSE session ended: {error}"),
            }
            // Nobody listens any more when the session is dropped.
            let _ = ended.send(result);
            over.send_replace(true);
        };
        let thread = std::thread::Builder::new().name("fuse-session".to_owned());
        thread.spawn(work).map_err(|error| self.start_error(error))?;
        Ok(())
    }

    fn start_error(&self, source: io::Error) -> FsError {
        FsError::Start {
            mountpoint: self.mountpoint.clone(),
            source,
        }
    }

    /// Whether an earlier process has opened the connection, and it goes on.
    pub fn is_adopted(&self) -> bool {
        self.inherited.is_some()
    }

    /// What that process has found out: which face serves, and whether files of the cache can be mounted.
    pub(super) fn inherited(&self) -> Option<(Serving, bool)> {
        self.inherited.clone()
    }

    /// What a later process has to know to go on with this session, and the descriptor for it. `None`: it cannot, as it is not mounted.
    pub(super) fn carry(&self, serving: Serving, files: bool) -> Option<(BorrowedFd<'_>, Carried)> {
        let mount = self.mount.as_ref()?;
        let direct = self.direct.load(Ordering::Relaxed);
        let carried = Carried::new(&self.hands, mount, direct, serving, files);
        Some((self.device.as_fd(), carried))
    }

    /// Ends when the session does, whoever ends it.
    pub fn over(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut over = self.over.clone();
        async move {
            // The sender says so before it goes.
            let _ = over.wait_for(|over| *over).await;
        }
    }

    /// From now on, requests for `slot` wait until a layer is attached to it, or [`Session::give_up`].
    pub fn expect(&self, slot: u32) {
        self.awaited.expect(slot);
    }

    /// No layer will come to `slot`.
    pub fn give_up(&self, slot: u32) {
        self.settle(slot);
    }

    /// Answers what has waited for `slot`.
    fn settle(&self, slot: u32) {
        let requests = self.awaited.settle(slot);
        if !requests.is_empty() {
            tracing::info!(slot, requests = requests.len(), "requests waited for this layer");
            answer_all(&self.runtime, requests);
        }
    }

    /// Answers requests that have waited for their layer for as long as a read may wait; until no layer is awaited.
    fn watch_overdue(&self) {
        // Only what was taken over is awaited.
        let serving = self.inherited.as_ref().map(|(serving, _)| serving.face);
        let limit = self.deadlines.of(serving.unwrap_or(super::faces::Face::Tree));
        let (awaited, runtime) = (Arc::clone(&self.awaited), self.runtime.clone());
        self.runtime.spawn(async move {
            while awaited.is_any() {
                tokio::time::sleep(OVERDUE_EVERY).await;
                answer_all(&runtime, awaited.overdue(limit));
            }
        });
    }

    /// Whether data files are opened past the page cache (FOPEN_DIRECT_IO) from now on; if nothing is said, they are not.
    ///
    /// To say so, the session has to answer the opening of each file, also in the tree face, which costs a round trip each. Once the
    /// kernel was told that this is not needed, it never asks again: `true` has to be said before the first file is opened.
    pub fn open_directly(&self, direct: bool) {
        self.direct.store(direct, Ordering::Relaxed);
    }

    /// Shows `layer` at [`Session::path`] of `slot`, and its data space at [`Session::data_path`]. The same layer may be attached again,
    /// and its new reader replaces the old one.
    ///
    /// # Errors
    /// [`FsError::SlotZero`], [`FsError::SlotTaken`].
    pub fn attach(&self, slot: u32, layer: Arc<dyn LayerData>) -> Result<(), FsError> {
        self.tree.attach(slot, layer)?;
        self.settle(slot);
        self.forget(None, slot, &[]);
        Ok(())
    }

    /// Takes the layer in `slot` away. Its directory and its data file disappear; what is still open in it fails with ESTALE as far as the kernel has
    /// to ask, and reads under way are answered. Tells whether there was a layer.
    pub fn detach(&self, slot: u32) -> bool {
        let there = self.tree.detach(slot);
        if there {
            self.forget(None, slot, &[Entry::Tree, Entry::Data]);
        }
        there
    }

    /// Shows `file`, a regular file that nobody changes any more, at [`Session::metadata_path`] of `slot`, in place of what was there.
    /// The slot need not have a layer.
    ///
    /// # Errors
    /// [`FsError::Metadata`]: the slot is 0, or the file is not a regular one.
    pub fn attach_metadata(&self, slot: u32, file: File) -> Result<(), FsError> {
        self.tree.attach_metadata(slot, file)?;
        self.forget(Some(Entry::Metadata), slot, &[]);
        Ok(())
    }

    /// Takes the metadata in `slot` away; what the kernel does not have of it fails with ESTALE. Tells whether there was any.
    pub fn detach_metadata(&self, slot: u32) -> bool {
        let there = self.tree.detach_metadata(slot);
        if there {
            self.forget(None, slot, &[Entry::Metadata]);
        }
        there
    }

    /// The directory that shows the layer in `slot`.
    pub fn path(&self, slot: u32) -> PathBuf {
        self.mountpoint.join(Entry::Tree.name(slot))
    }

    /// The file that shows the data space of the layer in `slot`, and zeros behind it up to a whole page of 4096 bytes.
    pub fn data_path(&self, slot: u32) -> PathBuf {
        self.mountpoint.join(Entry::Data.name(slot))
    }

    /// The file that shows the metadata attached to `slot`.
    pub fn metadata_path(&self, slot: u32) -> PathBuf {
        self.mountpoint.join(Entry::Metadata.name(slot))
    }

    /// Where the session is mounted: absolute, without symbolic links.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// After how long reads are answered at the latest.
    pub fn deadlines(&self) -> Deadlines {
        self.deadlines
    }

    /// The reads that wait, for those who mount what the session shows.
    pub(super) fn waiting(&self) -> &Arc<Waiting> {
        &self.waiting
    }

    /// Whether the session still answers. It ends on its own only when somebody unmounts it or aborts its connection.
    pub fn is_alive(&self) -> bool {
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        // The kernel knows first; the threads have to be woken.
        matches!(ended.try_recv(), Err(mpsc::TryRecvError::Empty)) && sys::fuse::is_connected(&self.device)
    }

    /// What is wrong with the mount, in words for people; `None` if it is seen where it should be, and answered. Asks the kernel's list of
    /// mounts, and so does not wait for an answer of the session.
    pub fn problem(&self) -> Option<String> {
        let at = self.mountpoint.display();
        let what = match (self.is_alive(), mount_at(&self.mountpoint), &self.mount) {
            (false, ..) => {
                format!("the FUSE connection of {at} has ended: somebody unmounted it, or aborted the connection")
            }
            (true, Err(error), _) => return Some(error.to_string()),
            // By the number of the file system: the same one may have been mounted again.
            (true, Ok(Some(there)), Some(own)) if (there.major, there.minor) == (own.major, own.minor) => return None,
            (true, Ok(Some(other)), _) => format!(
                "{} is mounted at {at}, over the FUSE mount",
                other.fs_type.to_string_lossy()
            ),
            (true, Ok(None), _) => format!("nothing is mounted at {at}: somebody unmounted it"),
        };
        Some(format!(
            "{what}; new containers cannot be started until lazuli is restarted"
        ))
    }

    /// Unmounts, and waits until all threads have ended: at most a few seconds, since a mount that is in use is detached, and a
    /// connection that is held (by an overlay, say) is aborted.
    ///
    /// # Errors
    /// [`FsError::Unmount`], [`FsError::Stuck`].
    pub fn unmount(mut self) -> Result<(), FsError> {
        self.close()
    }

    fn close(&mut self) -> Result<(), FsError> {
        let Some(mount) = self.mount.take() else {
            return Ok(());
        };
        let mountpoint = self.mountpoint.clone();
        if self
            .idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
            .is_some()
        {
            // Nobody has begun to answer.
            self.abort(&mount);
        }
        // Somebody may have unmounted it, or mounted something else over it; that is not ours to remove.
        let ours = matches!(mount_at(&mountpoint), Ok(Some(there)) if there == mount);
        let unmounted = match ours {
            true => remove(&mountpoint),
            false => Ok(()),
        };
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(ended.recv_timeout(END_WAIT), Err(RecvTimeoutError::Timeout)) {
            self.abort(&mount);
            if matches!(ended.recv_timeout(END_WAIT), Err(RecvTimeoutError::Timeout)) {
                return Err(FsError::Stuck { mountpoint });
            }
        }
        unmounted.map_err(|source| FsError::Unmount { mountpoint, source })
    }

    /// Ends the connection, if that has not happened yet: after it, its number may be that of somebody else's.
    fn abort(&self, mount: &Mount) {
        if !sys::fuse::is_connected(&self.device) {
            return;
        }
        tracing::info!(mountpoint = %self.mountpoint.display(), "the FUSE mount is still in use; its connection is aborted");
        if let Err(error) = sys::fuse::abort(mount.major, mount.minor) {
            tracing::warn!("{error}");
        }
    }

    /// Makes the kernel forget the listing of the root directory, the content of one of a slot's entries, and the names of others with
    /// what is below them.
    ///
    /// Not here but later, on a thread that may block: the kernel takes the root directory's lock for it, which somebody may hold who
    /// waits for an answer of this session. Correctness does not depend on it, since names in the root are asked for each time, and a
    /// slot has the same content for ever.
    fn forget(&self, content: Option<Entry>, slot: u32, gone: &'static [Entry]) {
        if self.idle.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
            // What the kernel knows of this slot is right.
            return;
        }
        let notifier = self.notifier.clone();
        self.runtime.spawn_blocking(move || {
            let mut result = notifier.inval_inode(INodeNo::ROOT, 0, 0);
            if let Some(entry) = content {
                let known = notifier.inval_inode(INodeNo(tree::number(slot, entry.ino())), 0, 0);
                // Nobody has looked at it yet.
                result = result.and(known.or_else(|error| match error.kind() {
                    io::ErrorKind::NotFound => Ok(()),
                    _ => Err(error),
                }));
            }
            for entry in gone {
                result = result.and(notifier.inval_entry(INodeNo::ROOT, OsStr::new(&entry.name(slot))));
            }
            if let Err(error) = result {
                tracing::debug!("the kernel did not take an invalidation: {error}");
            }
        });
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let is_idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        if self.is_adopted() && is_idle {
            // This process could not go on with it. The next one may.
            return;
        }
        if let Err(error) = self.close() {
            tracing::error!("{error}");
        }
    }
}

/// Answers requests that have waited, where threads may block.
fn answer_all(runtime: &Handle, requests: Vec<awaited::Answering>) {
    for request in requests {
        runtime.spawn_blocking(request);
    }
}

fn threads(configured: usize) -> usize {
    match configured {
        0 => std::thread::available_parallelism()
            .map_or(1, usize::from)
            .clamp(THREADS_MIN, THREADS_MAX),
        threads => threads,
    }
}
