//! Faces in a temporary directory, layers that become whole when a test says so, and overlays on top.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use lazuli::cache::Hold;
use lazuli::config::FaceChoice;
use lazuli::fetch::{FetchError, LayerData, LocalFile};
use lazuli::fs::{Face, Faces, FacesOptions, FsError, Legacy, Session};
use lazuli::layer::{BlobIndex, Digest, LayerIndex};
use lazuli::metrics::Metrics;
use lazuli::sys::mount::overlay;
use lazuli::sys::mountinfo::{Mount, mounts};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::fake::FakeLayer;
use crate::harness::{Overlay, options, runtime, within};
use crate::skip::{Ability, skipped};

/// Longest time of one mount call: longer than any takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(30);

/// What counts the holds on a layer's file.
struct Held(Arc<AtomicUsize>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A layer that can be whole.
pub struct Whole {
    pub layer: Arc<FakeLayer>,
    file: Mutex<Option<PathBuf>>,
    holds: Arc<AtomicUsize>,
}

impl Whole {
    pub fn new(layer: Arc<FakeLayer>) -> Arc<Self> {
        Arc::new(Whole {
            layer,
            file: Mutex::default(),
            holds: Arc::default(),
        })
    }

    /// Writes the layer's file into `dir`, unless it is there; from now on the layer is whole.
    pub fn complete(&self, dir: &Path) -> PathBuf {
        let index = self.layer.index();
        let mut data = vec![0; index.data_size() as usize];
        self.layer.read_ready(0, &mut data).unwrap().unwrap();
        data.resize(data.len().next_multiple_of(4096), 0);
        let path = dir.join(self.layer.digest().hex());
        if !path.exists() {
            fs::write(&path, data).unwrap();
        }
        *self.file.lock().unwrap() = Some(path.clone());
        path
    }

    /// How many hold the layer's file.
    pub fn holds(&self) -> usize {
        self.holds.load(Ordering::SeqCst)
    }
}

impl LayerData for Whole {
    fn digest(&self) -> &Digest {
        self.layer.digest()
    }

    fn index(&self) -> &BlobIndex {
        self.layer.index()
    }

    fn names(&self) -> Result<Arc<LayerIndex>, FetchError> {
        self.layer.names()
    }

    fn read_ready(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        self.layer.read_ready(offset, buf)
    }

    fn read(&self, offset: u64, len: u32, deadline: Duration) -> BoxFuture<'static, Result<Bytes, FetchError>> {
        self.layer.read(offset, len, deadline)
    }

    fn present_bytes(&self) -> u64 {
        self.layer.present_bytes()
    }

    fn local_file(&self) -> Option<LocalFile> {
        let path = self.file.lock().unwrap().clone()?;
        self.holds.fetch_add(1, Ordering::SeqCst);
        Some(LocalFile {
            path,
            hold: Hold::new(Held(Arc::clone(&self.holds))),
        })
    }
}

/// Faces, and where they are.
pub struct Rig {
    pub faces: Arc<Faces>,
    pub metrics: Arc<Metrics>,
    /// Where the session and the faces lie.
    pub root: PathBuf,
    // After the faces: their session's tasks run on it.
    _runtime: Runtime,
}

impl Rig {
    /// Faces below `root`. `None`: the kernel has no image face, and a test of it says so.
    pub fn open(root: &Path) -> Option<Rig> {
        let rig = Self::with(root, FaceChoice::Auto, DEADLINE).unwrap();
        match rig.faces.serving().face {
            Face::Image => Some(rig),
            Face::Tree => {
                skipped(Ability::ErofsFiles, &rig.faces.serving().reason);
                None
            }
        }
    }

    pub fn with(root: &Path, choice: FaceChoice, deadline: Duration) -> Result<Rig, FsError> {
        let metrics = Arc::new(Metrics::new());
        let runtime = runtime();
        let session = Session::mount(
            &root.join("fuse"),
            options(2, Duration::from_secs(30)),
            runtime.handle().clone(),
            Arc::clone(&metrics),
        )?;
        Self::on(session, root, choice, deadline, metrics, runtime)
    }

    /// Goes on with a session of another process; it does not answer yet.
    pub fn adopt(root: &Path, legacy: Legacy) -> Rig {
        let metrics = Arc::new(Metrics::new());
        let runtime = runtime();
        let session = Session::adopt(
            &root.join("fuse"),
            legacy,
            &options(2, Duration::from_secs(30)),
            runtime.handle().clone(),
            Arc::clone(&metrics),
        );
        let session = session.unwrap().expect("the session can go on");
        Self::on(session, root, FaceChoice::Auto, DEADLINE, metrics, runtime).unwrap()
    }

    fn on(
        session: Session,
        root: &Path,
        choice: FaceChoice,
        deadline: Duration,
        metrics: Arc<Metrics>,
        runtime: Runtime,
    ) -> Result<Rig, FsError> {
        let options = FacesOptions {
            choice,
            dir: root.join("faces"),
            deadline,
        };
        let faces = Faces::open(session, options, Arc::clone(&metrics))?;
        Ok(Rig {
            faces: Arc::new(faces),
            metrics,
            root: root.to_owned(),
            _runtime: runtime,
        })
    }

    /// Runs `access` on a thread of its own, and aborts the connection if it takes too long.
    pub fn within<T: Send + 'static>(&self, access: impl FnOnce() -> T + Send + 'static) -> T {
        within(self.faces.session().mountpoint(), access)
    }

    pub fn layer_path(&self, slot: u32) -> PathBuf {
        let faces = Arc::clone(&self.faces);
        self.within(move || faces.layer_path(slot)).unwrap()
    }

    pub fn chain_path(&self, slot: u32, layers: &[u32]) -> Option<PathBuf> {
        let (faces, layers) = (Arc::clone(&self.faces), layers.to_vec());
        self.within(move || faces.chain_path(slot, &layers))
    }

    pub fn retain(&self, needed: &[u32]) {
        let (faces, needed) = (Arc::clone(&self.faces), needed.iter().copied().collect::<HashSet<_>>());
        self.within(move || faces.retain(&needed, faces.mark()));
    }

    /// Words for what is shown of a slot.
    pub fn word(&self, slot: u32) -> &'static str {
        self.faces.shown(slot).word
    }

    /// Mounts a read-only overlay of `lower`, the topmost first, called `name`.
    pub fn overlay(&self, name: &str, lower: &[PathBuf]) -> Overlay {
        let target = self.root.join(name);
        fs::create_dir(&target).unwrap();
        let mut lower = lower.to_vec();
        while lower.len() < 2 {
            let empty = self.root.join(format!("{name}-empty"));
            fs::create_dir(&empty).unwrap();
            lower.push(empty);
        }
        let path = target.clone();
        self.within(move || overlay(&lower, &path)).unwrap();
        Overlay(target)
    }

    /// Ends everything in order, and sees to it that nothing stays mounted.
    pub fn close(self) {
        let Rig { faces, root, .. } = self;
        let faces = Arc::into_inner(faces).expect("nobody else has them");
        let mountpoint = faces.session().mountpoint().to_owned();
        within(&mountpoint, move || faces.close()).unwrap();
        let left = mounts_below(&root);
        assert!(left.is_empty(), "still mounted: {left:?}");
    }

    /// EROFS mounts that the metrics tell of, by kind.
    pub fn counted(&self, kind: &str) -> i64 {
        self.metrics.face_mounts.with_label_values(&[kind]).get()
    }

    pub fn failures(&self, cause: &str) -> u64 {
        self.metrics.face_mount_failures_total.with_label_values(&[cause]).get()
    }

    pub fn chains(&self, outcome: &str) -> u64 {
        self.metrics.face_chains_total.with_label_values(&[outcome]).get()
    }
}

/// A temporary directory whose path is the one that the list of mounts has.
pub fn temporary() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap();
    (dir, root)
}

pub fn mounts_below(root: &Path) -> Vec<Mount> {
    let mut all = mounts().unwrap();
    all.retain(|mount| mount.mount_point.starts_with(root));
    all
}

/// Which file system is seen at `path`.
pub fn device(path: &Path) -> u64 {
    fs::metadata(path).unwrap().dev()
}
