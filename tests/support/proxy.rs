//! An HTTP proxy before a registry: it counts requests and bytes by path, and makes the link as slow as is wanted.
//!
//! It is a reverse proxy with an address of its own: images are named by it (`127.0.0.1:PORT/demo/app:1`), and it passes the `Host` on,
//! so that a registry's redirects and upload locations lead through it as well. Bodies are streamed and counted as they are sent, and damaged on
//! the way where a test wants that.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::response::Response;
use futures::{StreamExt as _, TryStreamExt as _};
use http::{HeaderMap, StatusCode, header};

use super::registry::client;

/// The link between the client and the registry.
#[derive(Debug, Clone, Copy, Default)]
pub struct Link {
    /// Added to the time to the first byte of every answer: one round trip.
    pub latency: Duration,
    /// Bytes of bodies per second, over all connections; `None` for no limit.
    pub bytes_per_second: Option<u64>,
}

impl Link {
    /// 20 ms and 100 Mbit/s: a registry in the same region.
    pub const SHAPED: Link = Link {
        latency: Duration::from_millis(20),
        bytes_per_second: Some(100_000_000 / 8),
    };
}

/// One request that went through.
#[derive(Debug, Clone)]
pub struct Exchange {
    /// Method.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// The `Range` header.
    pub range: Option<String>,
    /// Who asked: the `User-Agent` header.
    pub agent: String,
    /// The status of the answer.
    pub status: u16,
    /// Bytes of the answer's body that were sent so far.
    pub bytes: u64,
}

impl Exchange {
    /// Whether it asked for a blob (a layer or a configuration).
    pub fn is_blob(&self) -> bool {
        self.method == "GET" && self.path.contains("/blobs/sha256:")
    }
}

/// One wrong byte in some bodies.
#[derive(Debug, Clone)]
struct Damage {
    /// A part of their path.
    path: String,
    /// What they are asked by is not called so.
    spared: &'static str,
    /// Where the byte is in the body.
    at: u64,
    /// How many more of them.
    times: usize,
}

/// The proxy, which ends when this is dropped.
pub struct Proxy {
    /// Where it listens.
    pub address: SocketAddr,
    shared: Arc<Shared>,
    runtime: Option<tokio::runtime::Runtime>,
}

struct Shared {
    upstream: SocketAddr,
    client: reqwest::Client,
    link: Mutex<Link>,
    /// Each is shared with the body that is still being sent.
    exchanges: Mutex<Vec<Arc<Mutex<Exchange>>>>,
    /// When the link has sent all that it accepted.
    free_at: Mutex<Instant>,
    damage: Mutex<Option<Damage>>,
}

impl Proxy {
    /// Starts a proxy before `upstream`.
    pub fn start(upstream: SocketAddr, link: Link) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("proxy")
            .enable_all()
            .build()
            .expect("a runtime can be built");
        let shared = Arc::new(Shared {
            upstream,
            client: client(),
            link: Mutex::new(link),
            exchanges: Mutex::new(Vec::new()),
            free_at: Mutex::new(Instant::now()),
            damage: Mutex::default(),
        });
        let router = Router::new().fallback(forward).with_state(shared.clone());
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        runtime.spawn(async move { axum::serve(listener, router).await });
        Proxy {
            address,
            shared,
            runtime: Some(runtime),
        }
    }

    /// `127.0.0.1:PORT`.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// Changes the link for all that comes.
    pub fn set_link(&self, link: Link) {
        *self.shared.link.lock().unwrap() = link;
    }

    /// Of the next `times` bodies whose path has this part, and which are asked for as a whole by a client that is not called `spared`, the byte
    /// at this offset is wrong.
    pub fn damage(&self, path: &str, spared: &'static str, at: u64, times: usize) {
        let path = path.to_owned();
        *self.shared.damage.lock().unwrap() = Some(Damage {
            path,
            spared,
            at,
            times,
        });
    }

    /// All requests so far.
    pub fn exchanges(&self) -> Vec<Exchange> {
        copies(&self.shared.exchanges.lock().unwrap())
    }

    /// Forgets the requests so far, and returns them.
    pub fn take(&self) -> Vec<Exchange> {
        copies(&std::mem::take(&mut *self.shared.exchanges.lock().unwrap()))
    }
}

fn copies(exchanges: &[Arc<Mutex<Exchange>>]) -> Vec<Exchange> {
    exchanges
        .iter()
        .map(|exchange| exchange.lock().unwrap().clone())
        .collect()
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Bytes of all bodies of some requests.
pub fn total_bytes(exchanges: &[Exchange]) -> u64 {
    exchanges.iter().map(|exchange| exchange.bytes).sum()
}

/// Headers of one connection, which are not passed on.
fn end_to_end(headers: &HeaderMap) -> HeaderMap {
    let mut headers = headers.clone();
    for name in [
        header::CONNECTION,
        header::TRANSFER_ENCODING,
        header::TE,
        header::UPGRADE,
    ] {
        headers.remove(name);
    }
    headers
}

async fn forward(State(shared): State<Arc<Shared>>, request: Request) -> Result<Response, Infallible> {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    let text = |name| Some(parts.headers.get(name)?.to_str().ok()?.to_owned());
    let exchange = Arc::new(Mutex::new(Exchange {
        method: parts.method.to_string(),
        path: path.clone(),
        range: text(header::RANGE),
        agent: text(header::USER_AGENT).unwrap_or_default(),
        status: 0,
        bytes: 0,
    }));
    shared.exchanges.lock().unwrap().push(exchange.clone());
    let link = *shared.link.lock().unwrap();
    tokio::time::sleep(link.latency).await;
    let outgoing = shared
        .client
        .request(parts.method.clone(), format!("http://{}{path}", shared.upstream))
        .headers(end_to_end(&parts.headers))
        .body(reqwest::Body::wrap_stream(body.into_data_stream()));
    let answer = match outgoing.send().await {
        Ok(answer) => answer,
        Err(error) => {
            let mut response = Response::new(Body::from(format!("the registry does not answer: {error}")));
            *response.status_mut() = StatusCode::BAD_GATEWAY;
            return Ok(response);
        }
    };
    let (status, headers) = (answer.status(), end_to_end(answer.headers()));
    exchange.lock().unwrap().status = status.as_u16();
    let wrong = shared.wrong_byte(&exchange.lock().unwrap());
    let stream = answer.bytes_stream().map_err(std::io::Error::other).then(move |chunk| {
        let (shared, exchange) = (shared.clone(), exchange.clone());
        async move {
            let chunk: Bytes = chunk?;
            shared.pay(chunk.len() as u64).await;
            let mut exchange = exchange.lock().unwrap();
            let begin = exchange.bytes;
            exchange.bytes += chunk.len() as u64;
            Ok::<_, std::io::Error>(match wrong {
                Some(at) if (begin..exchange.bytes).contains(&at) => {
                    let mut damaged = chunk.to_vec();
                    damaged[(at - begin) as usize] ^= 0x55;
                    damaged.into()
                }
                _ => chunk,
            })
        }
    });
    let empty = parts.method == http::Method::HEAD;
    let mut response = Response::new(if empty {
        Body::empty()
    } else {
        Body::from_stream(stream)
    });
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    Ok(response)
}

impl Shared {
    /// Where the body of an exchange is to be wrong.
    fn wrong_byte(&self, exchange: &Exchange) -> Option<u64> {
        let mut damage = self.damage.lock().unwrap();
        let damage = damage.as_mut().filter(|damage| damage.times > 0)?;
        let is_meant = exchange.method == "GET"
            && exchange.status == 200
            && exchange.path.contains(&damage.path)
            && !exchange.agent.contains(damage.spared);
        is_meant.then(|| damage.times -= 1)?;
        Some(damage.at)
    }

    /// Waits until the link has room for so many bytes.
    async fn pay(&self, bytes: u64) {
        let Some(rate) = self.link.lock().unwrap().bytes_per_second.filter(|rate| *rate > 0) else {
            return;
        };
        let until = {
            let mut free_at = self.free_at.lock().unwrap();
            *free_at = (*free_at).max(Instant::now()) + Duration::from_secs_f64(bytes as f64 / rate as f64);
            *free_at
        };
        tokio::time::sleep_until(until.into()).await;
    }
}
