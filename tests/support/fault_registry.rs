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

use std::collections::{BTreeMap, HashMap, HashSet};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{ConnectInfo, Request, State};
use axum::response::Response;
use base64::Engine;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream;
use http::{HeaderMap, Method, StatusCode, header};
use lazuli::layer::Digest;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// Size of the pieces of a body, in bytes.
const PIECE: usize = 16 << 10;
/// Longest form of a token request, in bytes.
const MAX_FORM: usize = 64 << 10;
/// Longest blob or manifest that is taken, in bytes.
const MAX_WRITTEN: usize = 64 << 20;
/// Entries on a page of a list.
const PAGE: usize = 2;

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
    /// The answer begins this much later.
    Delay(Duration),
    /// This `Content-Encoding` is claimed.
    Encoding(&'static str),
    /// A redirect to this place.
    Redirect(String),
    /// A list with this `Link`.
    Link(String),
}

/// How requests have to be authenticated.
#[derive(Debug, Clone, Default)]
pub enum Auth {
    /// Not at all.
    #[default]
    None,
    /// User name and password.
    Basic(String, String),
    /// A token, which anybody gets.
    AnonymousToken,
    /// A token for a user name and password.
    Token(String, String),
    /// A token for an OAuth 2 refresh token.
    IdentityToken(String),
}

/// A request as it was seen.
#[derive(Debug, Clone)]
pub struct Seen {
    /// What was asked for; `None` for anything else.
    pub on: Option<On>,
    pub method: Method,
    pub path: String,
    pub query: BTreeMap<String, String>,
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

    /// Forgets a blob.
    pub fn remove_blob(&self, digest: Digest) {
        self.inner().blobs.remove(&digest);
    }

    /// Wants requests authenticated.
    pub fn set_auth(&self, auth: Auth) {
        self.inner().auth = auth;
    }

    /// Lifetime of tokens handed out from now on, stated and kept.
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

    /// Takes back all faults that have not happened.
    pub fn heal(&self) {
        self.inner().faults.clear();
    }

    /// What was asked until now.
    pub fn log(&self) -> Vec<Seen> {
        self.inner().log.clone()
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
            true => inner.challenge(&shared, &target, &method),
            false => inner.answer(&shared, &target, &asked, fault),
        };
        inner.log.push(Seen {
            on,
            method: method.clone(),
            path,
            query: query.clone(),
            headers: headers.clone(),
            peer,
            status: answer.status().as_u16(),
        });
        (answer, delay)
    };
    if let Some(delay) = delay {
        tokio::time::sleep(delay).await;
    }
    answer
}

enum Target {
    Version,
    Manifest {
        repository: String,
        reference: String,
    },
    Blob {
        repository: String,
        digest: Option<Digest>,
    },
    Upload {
        repository: String,
        begun: bool,
    },
    Referrers {
        repository: String,
        subject: Option<Digest>,
    },
    Tags {
        repository: String,
    },
    Cdn {
        digest: Option<Digest>,
    },
    Token,
    Other,
}

impl Target {
    fn parse(path: &str, is_cdn: bool) -> Self {
        if is_cdn {
            return Target::Cdn {
                digest: path.trim_start_matches('/').parse().ok(),
            };
        }
        match path {
            "/token" => return Target::Token,
            "/v2" | "/v2/" => return Target::Version,
            _ => {}
        }
        let Some(rest) = path.strip_prefix("/v2/") else {
            return Target::Other;
        };
        if let Some((repository, reference)) = rest.rsplit_once("/manifests/") {
            return Target::Manifest {
                repository: repository.to_owned(),
                reference: reference.to_owned(),
            };
        }
        if let Some((repository, place)) = rest.rsplit_once("/blobs/uploads/") {
            return Target::Upload {
                repository: repository.to_owned(),
                begun: !place.is_empty(),
            };
        }
        if let Some((repository, subject)) = rest.rsplit_once("/referrers/") {
            return Target::Referrers {
                repository: repository.to_owned(),
                subject: subject.parse().ok(),
            };
        }
        if let Some(repository) = rest.strip_suffix("/tags/list") {
            return Target::Tags {
                repository: repository.to_owned(),
            };
        }
        match rest.rsplit_once("/blobs/") {
            Some((repository, digest)) => Target::Blob {
                repository: repository.to_owned(),
                digest: digest.parse().ok(),
            },
            None => Target::Other,
        }
    }

    fn on(&self, method: &Method) -> Option<On> {
        match self {
            Target::Manifest { .. } if matches!(*method, Method::PUT | Method::DELETE) => Some(On::Write),
            Target::Manifest { .. } => Some(On::Manifest),
            Target::Upload { .. } => Some(On::Upload),
            Target::Referrers { .. } => Some(On::Referrers),
            Target::Blob { .. } => Some(On::Blob),
            Target::Cdn { .. } => Some(On::Cdn),
            Target::Token => Some(On::Token),
            Target::Version | Target::Tags { .. } | Target::Other => None,
        }
    }

    fn needs_auth(&self) -> bool {
        !matches!(self, Target::Cdn { .. } | Target::Token | Target::Other)
    }

    fn repository(&self) -> &str {
        match self {
            Target::Manifest { repository, .. }
            | Target::Blob { repository, .. }
            | Target::Upload { repository, .. }
            | Target::Referrers { repository, .. }
            | Target::Tags { repository } => repository,
            _ => "",
        }
    }
}

struct Asked<'a> {
    method: &'a Method,
    headers: &'a HeaderMap,
    query: &'a BTreeMap<String, String>,
    form: &'a BTreeMap<String, String>,
    sent: &'a Bytes,
}

fn status(status: u16) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response
}

fn with(mut response: Response, name: header::HeaderName, value: &str) -> Response {
    response.headers_mut().insert(name, value.parse().unwrap());
    response
}

impl Inner {
    fn take_fault(&mut self, on: On) -> Option<Fault> {
        let at = self
            .faults
            .iter()
            .position(|(kind, times, _)| *kind == on && *times > 0)?;
        let (_, times, fault) = &mut self.faults[at];
        *times -= 1;
        let fault = fault.clone();
        if self.faults[at].1 == 0 {
            self.faults.remove(at);
        }
        Some(fault)
    }

    fn answer(&mut self, shared: &Shared, target: &Target, asked: &Asked<'_>, fault: Option<Fault>) -> Response {
        match &fault {
            Some(Fault::Status(code)) => return status(*code),
            Some(Fault::RetryAfter(code, value)) => return with(status(*code), header::RETRY_AFTER, value),
            Some(Fault::Refuse(code, message)) => {
                let document = json!({"errors": [{"code": "DENIED", "message": message}]});
                let mut response = status(*code);
                *response.body_mut() = Body::from(document.to_string());
                return response;
            }
            Some(Fault::Unauthorized) => return self.challenge(shared, target, asked.method),
            Some(Fault::Redirect(to)) => return with(status(307), header::LOCATION, to),
            _ => {}
        }
        match target {
            Target::Version => status(200),
            Target::Other => status(404),
            Target::Token => self.hand_out(asked),
            Target::Upload { begun, .. } => self.upload(asked, *begun),
            Target::Referrers { subject, .. } => {
                let list = self.list_referrers(asked, *subject);
                match fault {
                    Some(Fault::Link(to)) => with(list, header::LINK, &to),
                    _ => list,
                }
            }
            Target::Tags { repository } => self.list_tags(asked, repository),
            Target::Manifest { repository, reference } if *asked.method == Method::PUT => {
                self.put_manifest(asked, repository, reference)
            }
            Target::Manifest { reference, .. } if *asked.method == Method::DELETE => {
                let removed = reference.parse::<Digest>().ok().and_then(|digest| {
                    self.tags.retain(|_, meant| *meant != digest);
                    self.manifests.remove(&digest)
                });
                status(if removed.is_some() { 202 } else { 404 })
            }
            Target::Manifest { repository, reference } => {
                let digest = match reference.parse::<Digest>() {
                    Ok(digest) => Some(digest),
                    Err(_) => self.tags.get(&(repository.clone(), reference.clone())).copied(),
                };
                match digest.and_then(|digest| Some((digest, self.manifests.get(&digest)?))) {
                    Some((digest, (media_type, bytes))) => {
                        let response = content(bytes, asked, fault, false);
                        let response = with(response, header::CONTENT_TYPE, media_type);
                        let name = header::HeaderName::from_static("docker-content-digest");
                        with(response, name, &digest.to_string())
                    }
                    None => status(404),
                }
            }
            Target::Blob { digest, .. } => match self.blob(digest) {
                None => status(404),
                Some((digest, _)) if self.redirects => {
                    let mut to = format!("http://{}/{digest}?generation={}", shared.cdn, self.generation);
                    if let Some(lifetime) = self.redirect_lifetime {
                        let end = std::time::SystemTime::now() + lifetime;
                        let seconds = end.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
                        to.push_str(&format!("&Expires={seconds}"));
                    }
                    with(status(307), header::LOCATION, &to)
                }
                Some((_, bytes)) => content(&bytes, asked, fault, true),
            },
            Target::Cdn { digest } => {
                if asked.query.get("generation") != Some(&self.generation.to_string()) {
                    return status(403);
                }
                match self.blob(digest) {
                    Some((_, bytes)) => content(&bytes, asked, fault, true),
                    None => status(404),
                }
            }
        }
    }

    fn upload(&mut self, asked: &Asked<'_>, begun: bool) -> Response {
        if !begun {
            self.uploads += 1;
            let place = format!("{}-{}?state=x%2Fy", "place", self.uploads);
            return with(status(202), header::LOCATION, &place);
        }
        let stated = asked.query.get("digest").and_then(|text| text.parse::<Digest>().ok());
        if stated != Some(Digest::of(asked.sent)) || asked.query.get("state").map(String::as_str) != Some("x/y") {
            return status(400);
        }
        self.blobs.insert(Digest::of(asked.sent), asked.sent.clone());
        status(201)
    }

    fn put_manifest(&mut self, asked: &Asked<'_>, repository: &str, reference: &str) -> Response {
        let digest = Digest::of(asked.sent);
        let Ok(document) = serde_json::from_slice::<serde_json::Value>(asked.sent) else {
            return status(400);
        };
        let blobs = document["layers"]
            .as_array()
            .into_iter()
            .flatten()
            .chain(document.get("config"));
        let missing = |blob: &serde_json::Value| {
            let digest = blob["digest"].as_str().and_then(|text| text.parse::<Digest>().ok());
            !digest.is_some_and(|digest| self.blobs.contains_key(&digest))
        };
        let by_digest = reference.parse::<Digest>().ok();
        if blobs.into_iter().any(missing) || by_digest.is_some_and(|named| named != digest) {
            return status(400);
        }
        if by_digest.is_none() {
            self.tags.insert((repository.to_owned(), reference.to_owned()), digest);
        }
        let media_type = asked.headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok());
        let media_type = media_type.unwrap_or_default().to_owned();
        self.manifests.insert(digest, (media_type, asked.sent.clone()));
        let name = header::HeaderName::from_static("docker-content-digest");
        let response = with(status(201), name, &digest.to_string());
        match document["subject"]["digest"].as_str() {
            Some(subject) if self.referrers.is_some() => {
                with(response, header::HeaderName::from_static("oci-subject"), subject)
            }
            _ => response,
        }
    }

    fn list_referrers(&self, asked: &Asked<'_>, subject: Option<Digest>) -> Response {
        let (Some(filters), Some(subject)) = (self.referrers, subject) else {
            return status(404);
        };
        let subject = subject.to_string();
        let mut found: Vec<_> = self
            .manifests
            .iter()
            .filter_map(|(digest, (media_type, bytes))| {
                let document: serde_json::Value = serde_json::from_slice(bytes).ok()?;
                // What says nothing of its own type has that of its config.
                let artifact_type = document["artifactType"].as_str();
                let artifact_type = artifact_type.or(document["config"]["mediaType"].as_str());
                let artifact_type = artifact_type.unwrap_or_default();
                let wanted = asked.query.get("artifactType");
                let about = document["subject"]["digest"] == subject.as_str();
                let of_type = !filters || wanted.is_none_or(|wanted| wanted == artifact_type);
                (about && of_type).then(|| {
                    json!({
                        "mediaType": media_type, "digest": digest, "size": bytes.len(),
                        "artifactType": artifact_type, "annotations": document["annotations"],
                    })
                })
            })
            .collect();
        found.sort_by_key(|entry| entry["digest"].to_string());
        paged(
            asked,
            found,
            |page| json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": page}),
        )
    }

    fn list_tags(&self, asked: &Asked<'_>, repository: &str) -> Response {
        let tags: Vec<_> = self
            .tags
            .keys()
            .filter(|(of, _)| of == repository)
            .map(|(_, tag)| json!(tag))
            .collect();
        match tags.is_empty() {
            true => status(404),
            false => paged(asked, tags, |page| json!({"name": repository, "tags": page})),
        }
    }

    fn blob(&self, digest: &Option<Digest>) -> Option<(Digest, Bytes)> {
        let digest = (*digest)?;
        if self.missing.contains(&digest) {
            return None;
        }
        Some((digest, self.blobs.get(&digest)?.clone()))
    }

    fn authorized(&self, target: &Target, method: &Method, headers: &HeaderMap) -> bool {
        let given = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        match &self.auth {
            Auth::None => true,
            Auth::Basic(user, password) => given == basic(user, password),
            _ => {
                let token = given.strip_prefix("Bearer ").unwrap_or_default();
                self.tokens.get(token).is_some_and(|(scope, until)| {
                    let scoped = matches!(target, Target::Version) || *scope == scope_of(target, method);
                    scoped && *until > Instant::now()
                })
            }
        }
    }

    fn challenge(&self, shared: &Shared, target: &Target, method: &Method) -> Response {
        let challenge = match &self.auth {
            Auth::None | Auth::Basic(..) => r#"Basic realm="fault registry""#.to_owned(),
            _ => format!(
                r#"Bearer realm="http://{}/token",service="fault registry",scope="{}""#,
                shared.origin,
                scope_of(target, method)
            ),
        };
        with(status(401), header::WWW_AUTHENTICATE, &challenge)
    }

    fn hand_out(&mut self, asked: &Asked<'_>) -> Response {
        let given = asked
            .headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        let form = |name: &str| asked.form.get(name).map(String::as_str).unwrap_or_default();
        let (good, scope) = match &self.auth {
            Auth::Token(user, password) => (given == basic(user, password), asked.query.get("scope").cloned()),
            Auth::IdentityToken(token) => (
                asked.method == Method::POST
                    && form("grant_type") == "refresh_token"
                    && form("refresh_token") == token
                    && form("service") == "fault registry",
                asked.form.get("scope").cloned(),
            ),
            _ => (true, asked.query.get("scope").cloned()),
        };
        if !good {
            return status(401);
        }
        self.issued += 1;
        let token = format!("token-{}", self.issued);
        let lifetime = self.token_lifetime.unwrap_or(Duration::from_secs(300));
        self.tokens
            .insert(token.clone(), (scope.unwrap_or_default(), Instant::now() + lifetime));
        let answer = json!({"access_token": token, "expires_in": lifetime.as_secs_f64()});
        let response = Response::new(Body::from(answer.to_string()));
        with(response, header::CONTENT_TYPE, "application/json")
    }
}

fn scope_of(target: &Target, method: &Method) -> String {
    let actions = match *method {
        Method::GET | Method::HEAD => "pull",
        Method::DELETE => "delete",
        _ => "pull,push",
    };
    format!("repository:{}:{actions}", target.repository())
}

/// One page of a list, with a Link to the next one.
fn paged(
    asked: &Asked<'_>,
    list: Vec<serde_json::Value>,
    document: impl Fn(Vec<serde_json::Value>) -> serde_json::Value,
) -> Response {
    let page: usize = asked.query.get("page").and_then(|page| page.parse().ok()).unwrap_or(0);
    let more = list.len() > (page + 1) * PAGE;
    let entries = list.into_iter().skip(page * PAGE).take(PAGE).collect();
    let response = Response::new(Body::from(document(entries).to_string()));
    match more {
        true => {
            let mut query = asked.query.clone();
            query.insert("page".to_owned(), (page + 1).to_string());
            let query = url::form_urlencoded::Serializer::new(String::new())
                .extend_pairs(&query)
                .finish();
            // Relative to the list itself.
            with(response, header::LINK, &format!("<?{query}>; rel=\"next\""))
        }
        false => response,
    }
}

fn basic(user: &str, password: &str) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    format!("Basic {text}")
}

/// Bytes with 200, or a range of them with 206, and whatever goes wrong with that.
fn content(bytes: &Bytes, asked: &Asked<'_>, fault: Option<Fault>, ranges: bool) -> Response {
    let size = bytes.len();
    let range = match asked.headers.get(header::RANGE) {
        Some(value) if ranges && !matches!(fault, Some(Fault::IgnoreRange)) => {
            match parse_range(value.to_str().unwrap_or_default(), size) {
                Some(range) => Some(range),
                None => return status(416),
            }
        }
        _ => None,
    };
    let kept = range.clone().unwrap_or(0..size);
    let mut body = bytes.slice(kept.clone());
    if let Some(Fault::Corrupt(offset)) = fault
        && kept.contains(&offset)
    {
        let mut copy = body.to_vec();
        copy[offset - kept.start] ^= 0x55;
        body = copy.into();
    }
    let mut response = status(if range.is_some() { 206 } else { 200 });
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, "application/octet-stream".parse().unwrap());
    if ranges {
        headers.insert(header::ACCEPT_RANGES, "bytes".parse().unwrap());
    }
    if !matches!(fault, Some(Fault::Short(_) | Fault::Long(_))) {
        headers.insert(header::CONTENT_LENGTH, body.len().into());
    }
    if let Some(range) = &range {
        let stated = match &fault {
            Some(Fault::ContentRange(text)) => Some(text.clone()),
            Some(Fault::NoContentRange) => None,
            _ => Some(format!("bytes {}-{}/{size}", range.start, range.end - 1)),
        };
        if let Some(stated) = stated {
            headers.insert(header::CONTENT_RANGE, stated.parse().unwrap());
        }
    }
    if let Some(Fault::Encoding(encoding)) = fault {
        headers.insert(header::CONTENT_ENCODING, encoding.parse().unwrap());
    }
    if asked.method != Method::HEAD {
        *response.body_mut() = faulty_body(body, fault);
    }
    response
}

fn faulty_body(body: Bytes, fault: Option<Fault>) -> Body {
    let whole = |bytes: Bytes| stream::iter(pieces(bytes).into_iter().map(Ok::<_, Infallible>));
    match fault {
        Some(Fault::Cut(after)) => {
            let pieces = pieces(body.slice(..after.min(body.len()))).into_iter().map(Ok);
            // Let what came before be sent: an error at once would take it along.
            let end = stream::once(async {
                tokio::time::sleep(Duration::from_millis(20)).await;
                Err(std::io::Error::other("cut"))
            });
            Body::from_stream(stream::iter(pieces).chain(end))
        }
        Some(Fault::Short(after)) => Body::from_stream(whole(body.slice(..after.min(body.len())))),
        Some(Fault::Long(more)) => Body::from_stream(whole(body).chain(whole(vec![0; more].into()))),
        Some(Fault::Stall(after)) => {
            Body::from_stream(whole(body.slice(..after.min(body.len()))).chain(stream::pending()))
        }
        _ => Body::from_stream(whole(body)),
    }
}

fn pieces(bytes: Bytes) -> Vec<Bytes> {
    (0..bytes.len())
        .step_by(PIECE)
        .map(|start| bytes.slice(start..bytes.len().min(start + PIECE)))
        .collect()
}

fn parse_range(text: &str, size: usize) -> Option<Range<usize>> {
    let (start, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let start: usize = start.parse().ok()?;
    let end = match last {
        "" => size,
        last => last.parse::<usize>().ok()?.checked_add(1)?.min(size),
    };
    (start < end).then_some(start..end)
}
