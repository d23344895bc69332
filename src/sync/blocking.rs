//! The border between tasks, which may not wait for the disk, and threads that may.
//!
//! The runtime has as many workers as the machine has processors: two that wait for an fsync stop every read of every container. So what
//! blocks says so with [`may_block`], which fails in a debug build where it is called from a task, and tasks call it through [`blocking`].

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

use super::primitives::{joined, spawn_blocking};

/// To be called by what waits for the disk. In a debug build it panics on a thread that runs tasks.
#[track_caller]
pub fn may_block() {
    #[cfg(debug_assertions)]
    {
        // tokio tells by a panic of its own where a thread must not block; the value is there, so that nothing waits.
        let (answer, answered) = tokio::sync::oneshot::channel();
        let _ = answer.send(());
        let _ = answered.blocking_recv();
    }
}

/// Runs what blocks on a thread where it may. It is finished even if the caller goes away.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    joined(spawn_blocking(work)).await
}

/// Waits for a future on a thread that may block.
#[track_caller]
pub fn wait<F: Future>(future: F) -> F::Output {
    may_block();
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(value) => return value,
            Poll::Pending => thread::park(),
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_future_is_waited_for() {
        let (answer, answered) = tokio::sync::oneshot::channel();
        let answering = thread::spawn(move || answer.send(7).unwrap());
        assert_eq!(wait(answered), Ok(7));
        answering.join().unwrap();
    }

    #[tokio::test]
    async fn what_blocks_is_found_out_in_a_task() {
        blocking(may_block).await;
        let in_a_task = tokio::spawn(async { may_block() }).await;
        assert_eq!(in_a_task.is_err(), cfg!(debug_assertions));
    }

    #[tokio::test]
    async fn a_panic_goes_on_where_it_is_waited_for() {
        let task = tokio::spawn(async { blocking(|| panic!("on purpose")).await });
        assert!(task.await.unwrap_err().is_panic());
    }
}
