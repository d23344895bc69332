//! A snapshots service on a real unix socket, fake layers, and real mounts.

use std::collections::{HashMap, HashSet};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, mpsc};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use lazuli::catalog::containerd::Containerd;
use lazuli::catalog::loader::Refusal;
use lazuli::catalog::{
    Agreement, Application, Applied, LayerRequest, Layers, Lowers, Needed, Question, Released, Resolution,
};
use lazuli::layer::Digest;
use lazuli::metrics::Metrics;
use lazuli::proto::diff::v1::diff_client::DiffClient;
use lazuli::proto::diff::v1::{ApplyRequest, ApplyResponse};
use lazuli::proto::snapshots::v1::snapshots_client::SnapshotsClient;
use lazuli::proto::snapshots::v1::{
    CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest,
    StatSnapshotRequest, UsageRequest, UsageResponse, ViewSnapshotRequest,
};
use lazuli::proto::types::{Descriptor, Mount};
use lazuli::snapshots::{Again, Differ, Service};
use lazuli::store::Store;
use lazuli::sync::blocking;
use redb::TableDefinition;
use rustix::mount::{MountFlags, UnmountFlags};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Code, Status};

/// Label of the chain id that is asked for.
pub const REF: &str = "containerd.io/snapshot.ref";

/// Longest wait for something that happens in the background.
const DEADLINE: Duration = Duration::from_secs(20);

/// Size from which on containerd shortens mount options, as it does it: a page, less some room.
const LONG_OPTIONS: usize = 4096 - 512;

/// Layers that are plain directories.
pub struct FakeLayers {
    root: tempfile::TempDir,
    state: Mutex<FakeState>,
    /// Resolving waits while this is true.
    pub held: watch::Sender<bool>,
    /// How many of the next resolved layers are released at once, as if a release came just then.
    pub lost: AtomicUsize,
    /// How many of the next questions for a layer end in a panic.
    pub panics: AtomicUsize,
    /// Whether several layers are shown as one directory.
    pub merges: AtomicBool,
    /// While this is held, releases that were decided are not carried out.
    pub letting_go: Arc<Mutex<()>>,
    /// While this is held, the next directories that are asked for do not come.
    pub slow_mounts: Arc<Mutex<()>>,
    /// How many are asked for.
    pub mounting: AtomicUsize,
    /// Why owners cannot be mapped, if they cannot.
    pub no_mapped_owners: Mutex<Option<String>>,
    /// Which question for that waits.
    pub slow_owners: Mutex<Option<Held>>,
}

/// A question that waits for the test.
pub struct Held {
    /// How many are answered before it.
    pub before: usize,
    /// Told when it has come.
    pub reached: mpsc::Sender<()>,
    /// Its answer waits for this.
    pub go: mpsc::Receiver<()>,
}

#[derive(Default)]
struct FakeState {
    known: HashMap<String, (Digest, PathBuf)>,
    live: HashSet<Digest>,
    resolved: Vec<LayerRequest>,
    retained: Vec<Needed>,
    expected: Vec<Vec<Digest>>,
    /// What images say of chain ids: the layers below, and whether that is proven.
    said: HashMap<String, (Vec<Option<Digest>>, bool)>,
    questions: Vec<Question>,
    applied: Vec<Application>,
    agreement: Option<Agreement>,
    differ_was_asked: Vec<bool>,
}

impl FakeLayers {
    pub fn new() -> Arc<Self> {
        Arc::new(FakeLayers {
            root: tempfile::tempdir().unwrap(),
            state: Mutex::default(),
            held: watch::channel(false).0,
            lost: AtomicUsize::new(0),
            panics: AtomicUsize::new(0),
            merges: AtomicBool::new(false),
            letting_go: Arc::default(),
            slow_mounts: Arc::default(),
            mounting: AtomicUsize::new(0),
            no_mapped_owners: Mutex::default(),
            slow_owners: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, FakeState> {
        self.state.lock().unwrap()
    }

    /// A layer with this chain id, which holds one file with its own name. The same `content` is the same layer.
    pub fn add(&self, chain_id: &str, content: &str) -> Digest {
        let directory = self.root.path().join(content);
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join(content), content).unwrap();
        // Whatever umask another test has set for a moment.
        std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o755)).unwrap();
        let digest = Digest::of(content.as_bytes());
        self.state().known.insert(chain_id.to_owned(), (digest, directory));
        digest
    }

    /// No longer knows the chain id; what is live stays live.
    pub fn forget(&self, chain_id: &str) {
        let forgotten = self.state().known.remove(chain_id);
        let (_, path) = forgotten.unwrap();
        self.keep(path.file_name().unwrap().to_str().unwrap());
    }

    /// Makes the layer with this content known, though no chain id names it (any more).
    pub fn keep(&self, content: &str) {
        let layer = (Digest::of(content.as_bytes()), self.root.path().join(content));
        self.state().known.insert(format!("kept {content}"), layer);
    }

    /// From now on the image of this chain id says that of the layers below.
    pub fn say(&self, chain_id: &str, below: &[Option<Digest>], proven: bool) {
        self.state().said.insert(chain_id.to_owned(), (below.to_vec(), proven));
    }

    /// No image says anything of this chain id any more.
    pub fn unsay(&self, chain_id: &str) {
        self.state().said.remove(chain_id);
    }

    /// From now on that is what images agree on.
    pub fn agree_on(&self, agreement: Agreement) {
        self.state().agreement = Some(agreement);
    }

    /// What was to be applied.
    pub fn applied(&self) -> Vec<Application> {
        self.state().applied.clone()
    }

    /// What was told of layers that are left to containerd: whether the differ was asked for them.
    pub fn differ_was_asked(&self) -> Vec<bool> {
        self.state().differ_was_asked.clone()
    }

    /// What was asked about agreement.
    pub fn questions(&self) -> Vec<Question> {
        self.state().questions.clone()
    }

    pub fn release(&self, layer: &Digest) {
        self.state().live.remove(layer);
    }

    pub fn revive(&self, layer: &Digest) {
        self.state().live.insert(*layer);
    }

    pub fn is_live(&self, layer: &Digest) -> bool {
        self.state().live.contains(layer)
    }

    pub fn requests(&self) -> Vec<LayerRequest> {
        self.state().resolved.clone()
    }

    pub fn last_retained(&self) -> Option<Needed> {
        self.state().retained.last().cloned()
    }

    /// Layers on which containers were said to be made, topmost first.
    pub fn expected(&self) -> Vec<Vec<Digest>> {
        self.state().expected.clone()
    }

    /// The directory of a live layer.
    pub fn path(&self, layer: &Digest) -> Option<PathBuf> {
        let state = self.state();
        let known = state.known.values().find(|(digest, _)| digest == layer);
        known
            .filter(|_| state.live.contains(layer))
            .map(|(_, path)| path.clone())
    }

    /// One directory with the files of all these.
    fn merged(&self, paths: &[PathBuf]) -> PathBuf {
        let names: Vec<_> = paths
            .iter()
            .map(|path| path.file_name().unwrap().to_str().unwrap())
            .collect();
        let merged = self
            .root
            .path()
            .join(format!("chain {}", Digest::of(names.join(" ").as_bytes()).hex()));
        for path in paths {
            std::fs::create_dir_all(&merged).unwrap();
            for entry in std::fs::read_dir(path).unwrap() {
                let entry = entry.unwrap();
                std::fs::copy(entry.path(), merged.join(entry.file_name())).unwrap();
            }
        }
        std::fs::set_permissions(&merged, std::fs::Permissions::from_mode(0o755)).unwrap();
        merged
    }
}

impl Layers for FakeLayers {
    fn resolve(&self, request: LayerRequest) -> BoxFuture<'_, Resolution> {
        async move {
            self.state().resolved.push(request.clone());
            let mut held = self.held.subscribe();
            held.wait_for(|held| !held).await.unwrap();
            let panics = self
                .panics
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |panics| panics.checked_sub(1));
            assert!(panics.is_err(), "a bug that the test wants");
            let mut state = self.state();
            if let Some((below, proven)) = state.said.get(&request.chain_id).cloned() {
                let layer = state.known[&request.chain_id].0;
                state.live.extend(below.iter().flatten().copied().chain([layer]));
                return Resolution::Live {
                    layer,
                    below,
                    proven,
                    is_top: request.chain_id.ends_with("top"),
                };
            }
            let Some((layer, _)) = state.known.get(&request.chain_id).cloned() else {
                return Resolution::Refused(format!("{} is not known", request.chain_id));
            };
            let lost = self
                .lost
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |lost| lost.checked_sub(1));
            if lost.is_err() {
                state.live.insert(layer);
            }
            Resolution::Live {
                layer,
                // It has no opinion on what is below: what is the same for everybody is shown.
                below: vec![None; request.below.len()],
                proven: true,
                is_top: request.chain_id.ends_with("top"),
            }
        }
        .boxed()
    }

    fn apply(&self, application: Application) -> BoxFuture<'_, Result<Applied, Refusal>> {
        async move {
            let mut state = self.state();
            let known = state.known.get(&application.chain_id).cloned();
            state.applied.push(application);
            let (layer, _) = known.ok_or_else(|| Refusal::unresolved("not known", false))?;
            state.live.insert(layer);
            Ok(Applied {
                layer,
                tar: Digest::of(layer.as_bytes()),
                tar_size: 512,
                proven: true,
                is_top: false,
            })
        }
        .boxed()
    }

    fn agree(&self, question: Question) -> BoxFuture<'_, Agreement> {
        async move {
            let mut state = self.state();
            state.questions.push(question);
            state.agreement.clone().unwrap_or(Agreement::Shown)
        }
        .boxed()
    }

    fn is_live(&self, layer: &Digest) -> bool {
        self.path(layer).is_some()
    }

    fn lowers(&self, layers: &[Digest], merged: bool) -> Result<Lowers, Digest> {
        self.mounting.fetch_add(1, Ordering::SeqCst);
        if self.mounting.load(Ordering::SeqCst) == 1 {
            drop(self.slow_mounts.lock());
        }
        let paths = layers.iter().map(|layer| self.path(layer).ok_or(*layer));
        let paths = paths.collect::<Result<Vec<_>, _>>()?;
        Ok(match merged && self.merges.load(Ordering::Relaxed) && paths.len() > 1 {
            true => Lowers::Segments(vec![(0, self.merged(&paths))]),
            false => Lowers::Stacked(paths),
        })
    }

    fn expect(&self, layers: &[Digest]) {
        self.state().expected.push(layers.to_vec());
    }

    fn differ_was_asked(&self, was_asked: bool) {
        self.state().differ_was_asked.push(was_asked);
    }

    fn no_mapped_owners(&self) -> Option<String> {
        let held = {
            let mut slow = self.slow_owners.lock().unwrap();
            match &mut *slow {
                Some(held) if held.before > 0 => {
                    held.before -= 1;
                    None
                }
                _ => slow.take(),
            }
        };
        if let Some(Held { reached, go, .. }) = held {
            reached.send(()).unwrap();
            go.recv_timeout(DEADLINE).expect("the test lets it go");
        }
        self.no_mapped_owners.lock().unwrap().clone()
    }

    fn usage(&self, layer: &Digest) -> Option<(u64, u64)> {
        self.path(layer).map(|_| (4711, 42))
    }

    fn mark(&self) -> u64 {
        0
    }

    fn retain(&self, needed: Needed, _: u64) -> BoxFuture<'_, Released> {
        let mut state = self.state();
        state.live.retain(|layer| needed.layers.contains(layer));
        state.retained.push(needed);
        let turn = Arc::clone(&self.letting_go);
        async move { Box::new(move || drop(turn.lock())) as Released }.boxed()
    }
}

/// A running service and its client.
pub struct Daemon {
    pub client: SnapshotsClient<Channel>,
    pub layers: Arc<FakeLayers>,
    pub metrics: Arc<Metrics>,
    pub store: Arc<Store>,
    pub dir: tempfile::TempDir,
    server: tokio::task::JoinHandle<()>,
    stop: CancellationToken,
}

impl Daemon {
    pub async fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), FakeLayers::new(), true).await
    }

    pub async fn start_in(dir: tempfile::TempDir, layers: Arc<FakeLayers>, releases: bool) -> Self {
        let root = dir.path().join("root");
        std::fs::create_dir_all(&root).unwrap();
        let metrics = Arc::new(Metrics::new());
        let before = layers.state().retained.len();
        let (of_root, fake, counts) = (root.clone(), Arc::clone(&layers), Arc::clone(&metrics));
        let service = blocking(move || {
            let store = Arc::new(Store::open(&of_root.join("metadata.redb")).unwrap());
            let service = Service::new(&of_root, Arc::clone(&store), fake, counts).unwrap();
            (service, store)
        });
        let (service, store) = service.await;
        if releases {
            // It is part of the start; later it would only make some layers be resolved twice.
            eventually("layers are released at start", || {
                layers.state().retained.len() > before
            })
            .await;
        }
        let socket = dir.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let stop = CancellationToken::new();
        let (stopped, of_differ) = (stop.clone(), root.clone());
        let server = tokio::spawn(async move {
            // Nobody listens there.
            let containerd = Containerd::new(&of_differ.join("containerd.sock"));
            Server::builder()
                .add_service(Differ::new(service.clone(), containerd, Again::never()).into_server())
                .add_service(service.into_server())
                .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stopped.cancelled())
                .await
                .unwrap();
        });
        Daemon {
            client: connect(socket).await,
            layers,
            metrics,
            store,
            dir,
            server,
            stop,
        }
    }

    /// Ends the service, and starts another one over the same root.
    pub async fn restart(self) -> Self {
        let (dir, layers) = self.stop().await;
        Self::start_in(dir, layers, true).await
    }

    /// Ends the service, damages the record of a snapshot, and starts another service over the same root.
    pub async fn restart_with_damaged(self, key: &str) -> Self {
        const SNAPSHOTS: TableDefinition<&str, &[u8]> = TableDefinition::new("snapshots");
        let (dir, layers) = self.stop().await;
        let database = redb::Database::open(dir.path().join("root/metadata.redb")).unwrap();
        let transaction = database.begin_write().unwrap();
        transaction
            .open_table(SNAPSHOTS)
            .unwrap()
            .insert(key, b"{".as_slice())
            .unwrap();
        transaction.commit().unwrap();
        drop(database);
        // Without knowing all that is referred to, nothing is released.
        Self::start_in(dir, layers, false).await
    }

    async fn stop(self) -> (tempfile::TempDir, Arc<FakeLayers>) {
        let Daemon {
            client,
            layers,
            dir,
            server,
            stop,
            store,
            ..
        } = self;
        drop((client, store));
        stop.cancel();
        server.await.unwrap();
        std::fs::remove_file(dir.path().join("socket")).unwrap();
        // Work in the background may hold the database a little longer.
        let database = dir.path().join("root/metadata.redb");
        eventually("the database is closed", || {
            std::thread::scope(|scope| scope.spawn(|| Store::open(&database).is_ok()).join().unwrap())
        })
        .await;
        (dir, layers)
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// A client with a connection of its own.
    pub async fn another_client(&self) -> SnapshotsClient<Channel> {
        connect(self.socket()).await
    }

    /// A connection for messages of any form.
    pub async fn raw(&self) -> tonic::client::Grpc<Channel> {
        tonic::client::Grpc::new(channel(self.socket()).await)
    }

    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// Ids of the directories of snapshots.
    pub fn directories(&self) -> usize {
        std::fs::read_dir(self.root().join("snapshots")).unwrap().count()
    }

    pub async fn prepare_with(&self, key: &str, parent: &str, labels: &[(&str, &str)]) -> Result<Vec<Mount>, Status> {
        let request = PrepareSnapshotRequest {
            snapshotter: "lazuli".to_owned(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: strings(labels),
        };
        Ok(self.client.clone().prepare(request).await?.into_inner().mounts)
    }

    pub async fn prepare(&self, key: &str, parent: &str) -> Result<Vec<Mount>, Status> {
        self.prepare_with(key, parent, &[]).await
    }

    pub async fn view(&self, key: &str, parent: &str) -> Result<Vec<Mount>, Status> {
        self.view_with(key, parent, &[]).await
    }

    pub async fn view_with(&self, key: &str, parent: &str, labels: &[(&str, &str)]) -> Result<Vec<Mount>, Status> {
        let request = ViewSnapshotRequest {
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: strings(labels),
            ..Default::default()
        };
        Ok(self.client.clone().view(request).await?.into_inner().mounts)
    }

    pub async fn mounts(&self, key: &str) -> Result<Vec<Mount>, Status> {
        let request = MountsRequest {
            key: key.to_owned(),
            ..Default::default()
        };
        Ok(self.client.clone().mounts(request).await?.into_inner().mounts)
    }

    pub async fn commit_on(&self, name: &str, key: &str, parent: &str) -> Result<(), Status> {
        let request = CommitSnapshotRequest {
            name: name.to_owned(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            ..Default::default()
        };
        self.client.clone().commit(request).await.map(drop)
    }

    pub async fn commit(&self, name: &str, key: &str) -> Result<(), Status> {
        self.commit_on(name, key, "").await
    }

    /// Applies a layer of these bytes to a snapshot.
    pub async fn apply(&self, mounts: Vec<Mount>) -> Result<ApplyResponse, Status> {
        let request = ApplyRequest {
            diff: Some(Descriptor {
                media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
                digest: Digest::of(b"blob").to_string(),
                size: 4,
                ..Descriptor::default()
            }),
            mounts,
            ..ApplyRequest::default()
        };
        let mut client = DiffClient::new(channel(self.socket()).await);
        Ok(client.apply(request).await?.into_inner())
    }

    pub async fn remove(&self, key: &str) -> Result<(), Status> {
        let request = RemoveSnapshotRequest {
            key: key.to_owned(),
            ..Default::default()
        };
        self.client.clone().remove(request).await.map(drop)
    }

    pub async fn stat(&self, key: &str) -> Result<Info, Status> {
        let request = StatSnapshotRequest {
            key: key.to_owned(),
            ..Default::default()
        };
        Ok(self.client.clone().stat(request).await?.into_inner().info.unwrap())
    }

    pub async fn usage(&self, key: &str) -> Result<UsageResponse, Status> {
        let request = UsageRequest {
            key: key.to_owned(),
            ..Default::default()
        };
        Ok(self.client.clone().usage(request).await?.into_inner())
    }

    pub async fn cleanup(&self) -> Result<(), Status> {
        self.client
            .clone()
            .cleanup(lazuli::proto::snapshots::v1::CleanupRequest::default())
            .await
            .map(drop)
    }

    pub async fn list(&self, filters: &[&str]) -> Result<Vec<Info>, Status> {
        let request = ListSnapshotsRequest {
            filters: filters.iter().map(|&filter| filter.to_owned()).collect(),
            ..Default::default()
        };
        let mut stream = self.client.clone().list(request).await?.into_inner();
        let mut infos = Vec::new();
        while let Some(message) = stream.message().await? {
            infos.extend(message.info);
        }
        Ok(infos)
    }

    /// What containerd's metadata layer does for a layer: Prepare, and after AlreadyExists a search. Returns the
    /// backend's name.
    pub async fn pull(&self, key: &str, parent: &str, chain_id: &str) -> String {
        let status = self.prepare_with(key, parent, &[(REF, chain_id)]).await.unwrap_err();
        assert_eq!(status.code(), Code::AlreadyExists, "{status}");
        let filter = format!(r#"labels."{REF}"=={chain_id},parent=="{parent}""#);
        let found = self.list(&[&filter]).await.unwrap();
        let [info] = found.as_slice() else {
            panic!("not one snapshot for {filter}: {found:?}")
        };
        assert_eq!(info.kind(), lazuli::proto::snapshots::v1::Kind::Committed);
        assert_eq!(info.parent, parent);
        assert_eq!(info.labels[REF], chain_id);
        info.name.clone()
    }

    /// Mounts what `mounts` says, somewhere new.
    pub fn mount(&self, mounts: &[Mount]) -> Mounted {
        let target = tempfile::tempdir_in(self.dir.path()).unwrap().keep();
        Mounted::new(mounts, target)
    }

    /// Prepares, writes one file that has the name and content `file`, and commits.
    pub async fn layer(&self, name: &str, parent: &str, file: &str) {
        let key = format!("preparing {name}");
        let mounted = self.mount(&self.prepare(&key, parent).await.unwrap());
        std::fs::write(mounted.path().join(file), file).unwrap();
        drop(mounted);
        self.commit(name, &key).await.unwrap();
    }
}

async fn connect(socket: PathBuf) -> SnapshotsClient<Channel> {
    SnapshotsClient::new(channel(socket).await).max_decoding_message_size(16 << 20)
}

async fn channel(socket: PathBuf) -> Channel {
    // The address is not used, but has to be one.
    let endpoint = Endpoint::from_static("http://localhost");
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
    });
    endpoint.connect_with_connector(connector).await.unwrap()
}

/// A mount that ends with this value.
pub struct Mounted(PathBuf);

impl Mounted {
    fn new(mounts: &[Mount], target: PathBuf) -> Self {
        let [mount] = mounts else {
            panic!("not one mount: {mounts:?}")
        };
        let data: Vec<_> = mount
            .options
            .iter()
            .map(String::as_str)
            .filter(|option| !matches!(*option, "ro" | "rw" | "rbind"))
            .collect();
        let read_only = mount.options.iter().any(|option| option == "ro");
        match mount.r#type.as_str() {
            "bind" => {
                assert!(data.is_empty(), "{data:?}");
                rustix::mount::mount_bind_recursive(&mount.source, &target).unwrap();
                if read_only {
                    rustix::mount::mount_remount(&target, MountFlags::BIND | MountFlags::RDONLY, c"").unwrap();
                }
            }
            "overlay" => mount_overlay(data, &target),
            other => panic!("mount of type {other}"),
        }
        Mounted(target)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Names in the root, sorted.
    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// Whether nothing can be written.
    pub fn is_read_only(&self) -> bool {
        let error = std::fs::write(self.0.join("written"), "").err();
        error.is_some_and(|error| error.kind() == std::io::ErrorKind::ReadOnlyFilesystem)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, UnmountFlags::DETACH).unwrap();
    }
}

/// Mounts as containerd does: options that would not fit into a page are made relative to the lower directories' common
/// directory.
fn mount_overlay(options: Vec<&str>, target: &Path) {
    /// The working directory belongs to the whole process.
    static WORKING_DIRECTORY: Mutex<()> = Mutex::new(());

    let length: usize = options.iter().map(|option| option.len()).sum();
    if length < LONG_OPTIONS {
        return mount_plainly(&options, target);
    }
    let lowers = options.iter().find_map(|option| option.strip_prefix("lowerdir="));
    let lowers: Vec<_> = lowers.unwrap().split(':').collect();
    let (first, last) = (lowers.iter().min().unwrap(), lowers.iter().max().unwrap());
    let common = first.bytes().zip(last.bytes()).take_while(|(a, b)| a == b).count();
    let common = &first[..=first[..common].rfind('/').unwrap()];
    let relative: Vec<_> = lowers.iter().map(|lower| &lower[common.len()..]).collect();
    let relative = format!("lowerdir={}", relative.join(":"));
    let others = options
        .iter()
        .copied()
        .filter(|option| !option.starts_with("lowerdir="));
    let options: Vec<_> = others.chain([relative.as_str()]).collect();
    let _lock = WORKING_DIRECTORY.lock().unwrap();
    let before = std::env::current_dir().unwrap();
    std::env::set_current_dir(common).unwrap();
    mount_plainly(&options, target);
    std::env::set_current_dir(before).unwrap();
}

fn mount_plainly(options: &[&str], target: &Path) {
    let data = std::ffi::CString::new(options.join(",")).unwrap();
    assert!(data.as_bytes().len() < 4096, "the options do not fit into a page");
    rustix::mount::mount("overlay", target, "overlay", MountFlags::empty(), data.as_c_str()).unwrap();
}

/// Waits for something that happens in the background.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    assert!(
        tokio::time::timeout(DEADLINE, wait).await.is_ok(),
        "not in time: {what}"
    );
}

pub fn strings(labels: &[(&str, &str)]) -> HashMap<String, String> {
    labels
        .iter()
        .map(|&(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

/// The directories in the option `lowerdir`, topmost first.
pub fn lowers(mounts: &[Mount]) -> Vec<String> {
    let lowers = mounts[0]
        .options
        .iter()
        .find_map(|option| option.strip_prefix("lowerdir="));
    lowers.unwrap().split(':').map(str::to_owned).collect()
}

pub fn names(infos: &[Info]) -> Vec<&str> {
    infos.iter().map(|info| info.name.as_str()).collect()
}
