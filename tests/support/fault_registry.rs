//! A registry that fails on demand: the distribution protocol on one port, a storage service ("CDN") that it may redirect
//! to on another, and a token service on the first. Everything it was asked is in its log.
//!
//! ```text
//! /v2/                                  version check
//! /v2/<repository>/manifests/<ref>      GET, HEAD, PUT, DELETE
//! /v2/<repository>/blobs/<digest>       GET, HEAD, ranges; 307 to the CDN if redirects are on
//! /v2/<repository>/blobs/uploads/       POST, then PUT to the place it names
//! /v2/<repository>/referrers/<digest>   GET, in pages, if referrers are on
//! /v2/<repository>/tags/list            GET, in pages
//! /token                                GET with Basic, POST with a refresh token
//! CDN: /<digest>?generation=N&Expires=T good until `expire_redirects` or T
//! ```
//!
//! Its faults are kept by kind: `tokens` who may ask, `content` and `odd` bodies and ranges, `lists` pages, `writes` uploads; `answer` puts
//! them together for a `target`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{ConnectInfo, Request, State};
use axum::response::Response;
use bytes::Bytes;
use futures::TryStreamExt as _;
use http::{HeaderMap, Method, header};
use lazuli::layer::Digest;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

mod answer;
mod content;
mod lists;
mod odd;
mod target;
mod tokens;
mod writes;

use answer::Asked;
pub use odd::{Odd, OddBody};
use target::Target;
pub use tokens::Auth;

/// Longest form of a token request, in bytes.
const MAX_FORM: usize = 64 << 10;
/// Longest blob or manifest that is taken, in bytes.
const MAX_WRITTEN: usize = 64 << 20;

/// Which requests a fault meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum On {
    /// Manifests, by tag or digest.
    Manifest,
    /// Blobs at the registry itself.
    Blob,
    /// Blobs at the CDN.
    Cdn,
    /// The token service.
    Token,
    /// The referrers API.
    Referrers,
    /// Uploads of blobs: their begin and their end.
    Upload,
    /// Manifests that are written or deleted.
    Write,
}

/// What goes wrong with one request.
#[derive(Debug, Clone)]
pub enum Fault {
    /// This status and no more.
    Status(u16),
    /// This status with a `Retry-After`.
    RetryAfter(u16, String),
    /// This status with an error document that has this message.
    Refuse(u16, &'static str),
    /// 401 with the usual challenge, however good the token.
    Unauthorized,
    /// The connection ends after this many bytes of the body.
    Cut(usize),
    /// The body ends properly after this many bytes, without having had a length.
    Short(usize),
    /// This many zeros follow the body, which has no length.
    Long(usize),
    /// The whole blob with 200, whatever range was asked for.
    IgnoreRange,
    /// 206 with this `Content-Range`.
    ContentRange(String),
    /// 206 without one.
    NoContentRange,
    /// The byte at this offset of the blob or manifest is wrong, if it is within what was asked for.
    Corrupt(usize),
    /// Nothing comes after this many bytes of the body.
    Stall(usize),
    /// So many bytes come at a time, and so much time is between them.
    Drip(usize, Duration),
    /// Nothing comes until the registry is healed; then the connection ends.
    Silent(Healing),
    /// The answer begins this much later.
    Delay(Duration),
    /// An answer to a range with another head, or another body.
    Odd(Odd),
    /// This `Content-Encoding` is claimed.
    Encoding(&'static str),
    /// A redirect to this place.
    Redirect(String),
    /// A redirect of this kind to this place.
    RedirectAs(u16, String),
    /// This status with this body. At the token service, `TOKEN` in it becomes a token that is good.
    Answer(u16, String),
    /// A list with this `Link`.
    Link(String),
}

/// Knows when the registry is healed.
pub type Healing = tokio::sync::watch::Receiver<u64>;

/// A request as it was seen.
#[derive(Debug, Clone)]
pub struct Seen {
    /// What was asked for; `None` for anything else.
    pub on: Option<On>,
    pub method: Method,
    pub path: String,
    pub query: BTreeMap<String, String>,
    /// What was sent as a form.
    pub form: BTreeMap<String, String>,
    pub headers: HeaderMap,
    /// The caller's end of the connection.
    pub peer: SocketAddr,
    /// Status of the answer.
    pub status: u16,
}

impl Seen {
    /// A header as text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The `Range` header.
    pub fn range(&self) -> Option<&str> {
        self.header("range")
    }

    /// Whether it was authenticated somehow.
    pub fn authorized(&self) -> bool {
        self.headers.contains_key(header::AUTHORIZATION)
    }

    /// The `ns` parameter.
    pub fn ns(&self) -> Option<&str> {
        self.query.get("ns").map(String::as_str)
    }
}

#[derive(Default)]
struct Inner {
    blobs: HashMap<Digest, Bytes>,
    manifests: HashMap<Digest, (String, Bytes)>,
    tags: BTreeMap<(String, String), Digest>,
    /// Whether there is a referrers API, and whether it heeds the filter.
    referrers: Option<bool>,
    uploads: u64,
    auth: Auth,
    /// Status for bad credentials, without a challenge.
    refusal: Option<u16>,
    /// `WWW-Authenticate` headers, in the stead of the usual one.
    challenges: Option<Vec<String>>,
    /// Tokens that are good: for which scope, until when.
    tokens: HashMap<String, (String, Instant)>,
    issued: u64,
    token_lifetime: Option<Duration>,
    redirects: bool,
    redirect_lifetime: Option<Duration>,
    generation: u64,
    missing: HashSet<Digest>,
    faults: Vec<(On, usize, Fault)>,
    log: Vec<Seen>,
}

struct Shared {
    origin: SocketAddr,
    cdn: SocketAddr,
    inner: Mutex<Inner>,
    /// How often it was healed.
    healed: tokio::sync::watch::Sender<u64>,
    /// Bytes of blobs that were sent.
    sent: Arc<AtomicU64>,
}

/// The registry. It ends when dropped.
pub struct FaultRegistry {
    shared: Arc<Shared>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for FaultRegistry {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl FaultRegistry {
    /// Starts one on two free ports of 127.0.0.1. It has no content and no faults.
    pub async fn start() -> Self {
        let origin = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let cdn = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let shared = Arc::new(Shared {
            origin: origin.local_addr().unwrap(),
            cdn: cdn.local_addr().unwrap(),
            inner: Mutex::default(),
            healed: tokio::sync::watch::Sender::new(0),
            sent: Arc::default(),
        });
        let mut tasks = Vec::new();
        for (listener, is_cdn) in [(origin, false), (cdn, true)] {
            let app = Router::new()
                .fallback(move |shared, peer, request| serve(shared, peer, request, is_cdn))
                .with_state(shared.clone())
                .into_make_service_with_connect_info::<SocketAddr>();
            tasks.push(tokio::spawn(async move {
                axum::serve(listener, app).await.unwrap();
            }));
        }
        FaultRegistry { shared, tasks }
    }

    /// `127.0.0.1:port`.
    pub fn host(&self) -> String {
        self.shared.origin.to_string()
    }

    /// `127.0.0.1:port` of the CDN.
    pub fn cdn(&self) -> String {
        self.shared.cdn.to_string()
    }

    /// Adds a blob, to every repository.
    pub fn add_blob(&self, bytes: impl Into<Bytes>) -> Digest {
        let bytes = bytes.into();
        let digest = Digest::of(&bytes);
        self.inner().blobs.insert(digest, bytes);
        digest
    }

    /// Serves these bytes as the blob with a digest that they do not have.
    pub fn add_false_blob(&self, digest: Digest, bytes: impl Into<Bytes>) {
        self.inner().blobs.insert(digest, bytes.into());
    }

    /// Adds a manifest or index, to every repository.
    pub fn add_manifest(&self, media_type: &str, bytes: impl Into<Bytes>) -> Digest {
        let bytes = bytes.into();
        let digest = Digest::of(&bytes);
        self.inner().manifests.insert(digest, (media_type.to_owned(), bytes));
        digest
    }

    /// Lets `repository:tag` mean `manifest`.
    pub fn tag(&self, repository: &str, tag: &str, manifest: Digest) {
        self.inner()
            .tags
            .insert((repository.to_owned(), tag.to_owned()), manifest);
    }

    /// Has a referrers API from now on, which heeds the filter or leaves that to the client.
    pub fn set_referrers(&self, filters: bool) {
        self.inner().referrers = Some(filters);
    }

    /// What `repository:tag` means.
    pub fn tagged(&self, repository: &str, tag: &str) -> Option<Digest> {
        self.inner().tags.get(&(repository.to_owned(), tag.to_owned())).copied()
    }

    /// The bytes of a manifest.
    pub fn manifest(&self, digest: Digest) -> Option<Bytes> {
        self.inner().manifests.get(&digest).map(|(_, bytes)| bytes.clone())
    }

    /// Whether it has a blob.
    pub fn has_blob(&self, digest: Digest) -> bool {
        self.inner().blobs.contains_key(&digest)
    }

    /// All its blobs.
    pub fn blobs(&self) -> Vec<Bytes> {
        self.inner().blobs.values().cloned().collect()
    }

    /// Forgets a blob.
    pub fn remove_blob(&self, digest: Digest) {
        self.inner().blobs.remove(&digest);
    }

    /// Wants requests authenticated.
    pub fn set_auth(&self, auth: Auth) {
        self.inner().auth = auth;
    }

    /// Answers bad credentials with this status and no challenge, as if the reason could be guessed.
    pub fn refuse_with(&self, status: u16) {
        self.inner().refusal = Some(status);
    }

    /// Asks for authentication with these headers. `REALM` in them is the address of the token service, `HOST` that of the registry.
    pub fn set_challenges(&self, headers: &[&str]) {
        let headers = headers.iter().map(|header| (*header).to_owned()).collect();
        self.inner().challenges = Some(headers);
    }

    /// Lifetime that tokens handed out from now on are said to have. They are good for much longer, so that a slow machine is not told by
    /// a refusal what the client has to know by itself.
    pub fn set_token_lifetime(&self, lifetime: Duration) {
        self.inner().token_lifetime = Some(lifetime);
    }

    /// Refuses all tokens handed out until now, before their stated end.
    pub fn expire_tokens(&self) {
        self.inner().tokens.clear();
    }

    /// Redirects readers of blobs to the CDN, with an address that states how long it is good, or does not.
    pub fn set_redirects(&self, on: bool, lifetime: Option<Duration>) {
        let mut inner = self.inner();
        (inner.redirects, inner.redirect_lifetime) = (on, lifetime);
    }

    /// Ends all addresses at the CDN handed out until now.
    pub fn expire_redirects(&self) {
        self.inner().generation += 1;
    }

    /// Answers 404 for a blob that it would have.
    pub fn lose(&self, blob: Digest) {
        self.inner().missing.insert(blob);
    }

    /// The next `times` requests of this kind fail so. Faults of one kind come one after another, in the order in which they were
    /// added. A request that is challenged because it is not authenticated meets none.
    pub fn fail(&self, on: On, times: usize, fault: Fault) {
        self.inner().faults.push((on, times, fault));
    }

    /// Takes back all faults that have not happened, and ends those that last.
    pub fn heal(&self) {
        self.inner().faults.clear();
        self.shared.healed.send_modify(|times| *times += 1);
    }

    /// A fault that lasts until the registry is healed.
    pub fn silent(&self) -> Fault {
        Fault::Silent(self.shared.healed.subscribe())
    }

    /// What was asked until now.
    pub fn log(&self) -> Vec<Seen> {
        self.inner().log.clone()
    }

    /// Forgets what was asked until now, for tests that ask for very long; tells how much that was.
    pub fn take_log(&self) -> usize {
        std::mem::take(&mut self.inner().log).len()
    }

    /// Bytes of blobs that were sent until now, also to those who did not read them.
    pub fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::Relaxed)
    }

    /// What was asked of one kind until now.
    pub fn seen(&self, on: On) -> Vec<Seen> {
        self.log().into_iter().filter(|seen| seen.on == Some(on)).collect()
    }

    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.shared.inner.lock().unwrap()
    }
}

async fn serve(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
    is_cdn: bool,
) -> Response {
    let path = request.uri().path().to_owned();
    let query: BTreeMap<String, String> =
        url::form_urlencoded::parse(request.uri().query().unwrap_or_default().as_bytes())
            .into_owned()
            .collect();
    let target = Target::parse(&path, is_cdn);
    let (method, headers) = (request.method().clone(), request.headers().clone());
    let (mut form, mut sent) = (BTreeMap::new(), Bytes::new());
    match &target {
        Target::Token => {
            let body = to_bytes(request.into_body(), MAX_FORM).await.unwrap_or_default();
            form = url::form_urlencoded::parse(&body).into_owned().collect();
        }
        _ if method == Method::PUT => {
            sent = to_bytes(request.into_body(), MAX_WRITTEN).await.unwrap_or_default();
        }
        _ => {}
    }
    let on = target.on(&method);
    let (answer, delay) = {
        let mut inner = shared.inner.lock().unwrap();
        let challenged = target.needs_auth() && !inner.authorized(&target, &method, &headers);
        let fault = on.filter(|_| !challenged).and_then(|on| inner.take_fault(on));
        let delay = match &fault {
            Some(Fault::Delay(delay)) => Some(*delay),
            _ => None,
        };
        let asked = Asked {
            method: &method,
            headers: &headers,
            query: &query,
            form: &form,
            sent: &sent,
        };
        let answer = match challenged {
            true => inner.challenge(&shared, &target, &method, &headers),
            false => inner.answer(&shared, &target, &asked, fault),
        };
        inner.log.push(Seen {
            on,
            method: method.clone(),
            path,
            query: query.clone(),
            form: form.clone(),
            headers: headers.clone(),
            peer,
            status: answer.status().as_u16(),
        });
        (answer, delay)
    };
    if let Some(delay) = delay {
        tokio::time::sleep(delay).await;
    }
    if !matches!(on, Some(On::Blob | On::Cdn)) {
        return answer;
    }
    let count = shared.sent.clone();
    answer.map(|body| {
        Body::from_stream(body.into_data_stream().inspect_ok(move |piece| {
            count.fetch_add(piece.len() as u64, Ordering::Relaxed);
        }))
    })
}
