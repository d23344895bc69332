//! A client whose answers may be silent for so long, and no longer, counted while somebody listens.
//!
//! A stream may be paused, or wait for memory or a disk, for any time, and its bytes wait in the buffers of its connection meanwhile. That is no
//! silence of the host. reqwest's own `read_timeout` counts it as one (it looks at its clock before it looks at the body), so that what was
//! paused for longer would fail, be asked for anew, and what waited in the buffers, several MiB, come over the network again. Here what has
//! arrived comes first, and the clock only counts for who waits for more.

use std::fmt;
use std::ops::Deref;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;

use super::transport::chain;

/// What an upload makes of a slow line, in bytes per second: nothing is heard of a host until all has been sent.
const LEAST_RATE: u64 = 64 << 10;

/// How long an answer may take to begin to a request that sends so many bytes.
fn answered_within(silence: Duration, sent: usize) -> Duration {
    silence + Duration::from_secs(sent as u64 / LEAST_RATE)
}

/// One way to ask a host.
#[derive(Debug, Clone)]
pub struct Wire {
    client: reqwest::Client,
    silence: Duration,
}

/// An answer; its head is reqwest's.
#[derive(Debug)]
pub struct Response {
    head: reqwest::Response,
    silence: Duration,
}

/// Why there is no answer, or no more of it. It names no address: a signed one would be a secret in a log.
#[derive(Debug)]
pub struct Cut {
    what: String,
    is_connect: bool,
    is_refused: bool,
}

impl Wire {
    pub(super) fn new(client: reqwest::Client, silence: Duration) -> Self {
        Wire { client, silence }
    }

    /// A request that is still to be [sent](Wire::send).
    pub fn get(&self, url: url::Url) -> reqwest::RequestBuilder {
        self.client.get(url)
    }

    /// The same, of another method.
    pub fn post(&self, url: url::Url) -> reqwest::RequestBuilder {
        self.client.post(url)
    }

    /// # Errors
    /// [`Cut`], also if nothing is answered for too long.
    pub async fn send(&self, request: reqwest::RequestBuilder) -> Result<Response, Cut> {
        self.execute(request.build().map_err(Cut::from)?).await
    }

    /// # Errors
    /// [`Cut`], also if nothing is answered for too long.
    pub async fn execute(&self, request: reqwest::Request) -> Result<Response, Cut> {
        let sent = request.body().and_then(reqwest::Body::as_bytes).map_or(0, <[u8]>::len);
        let patience = answered_within(self.silence, sent);
        match timeout(patience, self.client.execute(request)).await {
            Ok(Ok(head)) => Ok(Response {
                head,
                silence: self.silence,
            }),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(Cut::silent(patience)),
        }
    }
}

impl Response {
    /// The next bytes of the body, or `None` after the last.
    ///
    /// # Errors
    /// [`Cut`], also if nothing comes for too long.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, Cut> {
        // What has arrived is looked at before the clock.
        match timeout(self.silence, self.head.chunk()).await {
            Ok(piece) => Ok(piece?),
            Err(_) => Err(Cut::silent(self.silence)),
        }
    }
}

impl Deref for Response {
    type Target = reqwest::Response;

    fn deref(&self) -> &reqwest::Response {
        &self.head
    }
}

impl Cut {
    fn silent(silence: Duration) -> Self {
        Cut {
            what: format!("nothing came for {} s", silence.as_secs()),
            is_connect: false,
            is_refused: false,
        }
    }

    /// Whether there was no connection.
    pub fn is_connect(&self) -> bool {
        self.is_connect
    }

    /// Whether nobody listens there.
    pub fn is_refused(&self) -> bool {
        self.is_refused
    }
}

impl From<reqwest::Error> for Cut {
    fn from(error: reqwest::Error) -> Self {
        Cut {
            is_connect: error.is_connect(),
            is_refused: is_refused(&error),
            what: chain(&error.without_url()),
        }
    }
}

fn is_refused(error: &reqwest::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>()
            && io.kind() == std::io::ErrorKind::ConnectionRefused
        {
            return true;
        }
        cause = error.source();
    }
    false
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_has_its_own_time() {
        let silence = Duration::from_secs(30);
        assert_eq!(answered_within(silence, 0), silence);
        // A megabyte over half a megabit.
        assert_eq!(answered_within(silence, 1 << 20), silence + Duration::from_secs(16));
    }
}
