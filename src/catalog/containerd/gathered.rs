//! A socket on which frames are written together.
//!
//! HTTP/2 sends a message in frames of 16 KiB, which is what containerd's server takes, and the library writes and flushes each of them by
//! itself: of a blob of a gigabyte these are 65,000 writes, each of which may wake up the other side. Here they are gathered: the first flush behind
//! a write is put off until the connection's task has its next turn, and by then what it had to send is together. What is put off is written
//! when more comes than the buffer holds, with the next flush or read, and at the end; no turn of the task goes without one of these.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes that are gathered: eight frames. A unix socket holds 208 KiB, as it is set up.
const GATHERED: usize = 128 << 10;

/// What is written to `inner` goes together.
pub(super) struct Gathered<S> {
    inner: S,
    /// What was gathered, and how much of it is written.
    buffer: Vec<u8>,
    written: usize,
    /// Whether something was written that no flush has followed.
    is_new: bool,
}

impl<S: AsyncWrite + Unpin> Gathered<S> {
    pub(super) fn new(inner: S) -> Self {
        Gathered {
            inner,
            buffer: Vec::new(),
            written: 0,
            is_new: false,
        }
    }

    /// Writes all that was gathered.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.buffer.len() {
            let rest = &self.buffer[self.written..];
            let written = ready!(Pin::new(&mut self.inner).poll_write(cx, rest))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += written;
        }
        self.buffer.clear();
        self.written = 0;
        self.is_new = false;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gathered<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let me = self.get_mut();
        if me.buffer.len() >= GATHERED {
            ready!(me.poll_drain(cx))?;
        }
        let mut taken = 0;
        for slice in slices {
            let count = slice.len().min(GATHERED - me.buffer.len());
            me.buffer.extend_from_slice(&slice[..count]);
            taken += count;
        }
        me.is_new = taken > 0;
        Poll::Ready(Ok(taken))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let me = self.get_mut();
        if std::mem::take(&mut me.is_new) {
            // There is a next turn, whatever else happens.
            cx.waker().wake_by_ref();
            return Poll::Ready(Ok(()));
        }
        ready!(me.poll_drain(cx))?;
        Pin::new(&mut me.inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let me = self.get_mut();
        ready!(me.poll_drain(cx))?;
        Pin::new(&mut me.inner).poll_shutdown(cx)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Gathered<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let me = self.get_mut();
        // What cannot be written now wakes the task when it can; what comes is read all the same, since the other side may wait for that, or have
        // said why it takes nothing more. The next write or flush has the same error.
        let _ = me.poll_drain(cx);
        Pin::new(&mut me.inner).poll_read(cx, buf)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::time::timeout;

    use super::*;

    /// What has arrived by now.
    async fn arrived(other: &mut DuplexStream) -> Vec<u8> {
        let mut bytes = vec![0; 4 * GATHERED];
        let read = timeout(Duration::ZERO, other.read(&mut bytes)).await;
        bytes.truncate(read.map_or(0, Result::unwrap));
        bytes
    }

    #[tokio::test]
    async fn frames_of_one_turn_arrive_together() {
        let (near, mut far) = duplex(4 * GATHERED);
        let mut near = Gathered::new(near);
        for frame in [&b"one "[..], b"two ", b"three"] {
            near.write_all(frame).await.unwrap();
            near.flush().await.unwrap();
            assert!(arrived(&mut far).await.is_empty());
        }
        near.flush().await.unwrap();
        assert_eq!(arrived(&mut far).await, b"one two three");
        // More than is gathered does not wait, and none of it is lost.
        let much = vec![7; 3 * GATHERED / 2];
        near.write_all(&much).await.unwrap();
        assert_eq!(arrived(&mut far).await.len(), GATHERED);
        near.shutdown().await.unwrap();
        assert_eq!(arrived(&mut far).await.len(), GATHERED / 2);
    }

    /// Whoever writes, flushes and waits for the answer gets it.
    #[tokio::test]
    async fn a_question_is_sent_before_its_answer_is_waited_for() {
        let (near, mut far) = duplex(64);
        let mut near = Gathered::new(near);
        tokio::spawn(async move {
            let mut question = [0; 100];
            far.read_exact(&mut question).await.unwrap();
            far.write_all(&question[..5]).await.unwrap();
        });
        // More than the socket holds at a time.
        near.write_all(&[3; 100]).await.unwrap();
        near.flush().await.unwrap();
        let mut answer = [0; 5];
        timeout(Duration::from_secs(30), near.read_exact(&mut answer))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(answer, [3; 5]);
    }

    /// What the other side has said before it went is read, though it takes nothing more.
    #[tokio::test]
    async fn the_last_word_of_the_other_side_is_read() {
        let (near, mut far) = duplex(64);
        let mut near = Gathered::new(near);
        near.write_all(b"more").await.unwrap();
        far.write_all(b"no").await.unwrap();
        drop(far);
        let mut word = Vec::new();
        near.read_to_end(&mut word).await.unwrap();
        assert_eq!(word, b"no");
        near.flush().await.unwrap();
        let error = near.flush().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    /// A task that neither reads nor writes any more, but looks after its connection when it is woken.
    #[tokio::test]
    async fn a_flush_that_is_put_off_has_the_task_woken() {
        let (near, mut far) = duplex(64);
        let mut near = Gathered::new(near);
        let mut turns = 0;
        near.write_all(b"last").await.unwrap();
        let turn = poll_fn(|cx| {
            turns += 1;
            let flushed = Pin::new(&mut near).poll_flush(cx);
            if turns < 2 { Poll::Pending } else { flushed }
        });
        timeout(Duration::from_secs(30), turn).await.unwrap().unwrap();
        assert_eq!(arrived(&mut far).await, b"last");
    }
}
