//! Calls that may not come back: each on a thread of its own, and waited for until a deadline.
//!
//! A mount opens files that this very process serves, and an unmount may end a file system: if the daemon or the kernel has a bug there,
//! the call waits where no signal reaches it. It is then left behind with its thread. What it makes after all is dropped, which unmounts
//! a [`DetachedMount`](crate::sys::mount::DetachedMount).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use prometheus::IntGauge;

use crate::sys::SysError;

/// Calls left behind at which no further one is made: something is broken that more threads do not mend.
const LEFT_MAX: usize = 8;

/// Why a call gave nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// It failed.
    #[error("{0}")]
    Failed(#[from] SysError),
    /// There is no thread for it.
    #[error("no thread for a mount call: {0}")]
    Thread(std::io::Error),
    /// It panicked, which is a bug.
    #[error("a mount call panicked")]
    Panicked,
    /// It did not come back.
    #[error("the kernel did not answer a mount call within {} s", .0.as_secs())]
    Late(Duration),
    /// Too many did not come back.
    #[error("{0} mount calls did not come back; no more are made until one does")]
    Left(usize),
}

impl CallError {
    /// The error number, if the kernel gave one.
    pub(super) fn errno(&self) -> Option<i32> {
        match self {
            CallError::Failed(error) => error.source.raw_os_error(),
            _ => None,
        }
    }

    /// Whether the kernel does not answer, so that another call is not worth its wait.
    pub(super) fn is_silence(&self) -> bool {
        matches!(self, CallError::Late(_) | CallError::Left(_))
    }
}

/// Makes calls.
pub(super) struct Calls {
    deadline: Duration,
    left: Arc<AtomicUsize>,
    gauge: IntGauge,
}

impl Calls {
    /// Every call may take `deadline`; `gauge` shows how many were left behind.
    pub(super) fn new(deadline: Duration, gauge: IntGauge) -> Self {
        Calls {
            deadline,
            left: Arc::default(),
            gauge,
        }
    }

    /// Makes a call on a thread of its own, and gives what it gave.
    pub(super) fn run<T: Send + 'static>(
        &self,
        call: impl FnOnce() -> Result<T, SysError> + Send + 'static,
    ) -> Result<T, CallError> {
        let behind = self.left.load(Ordering::Relaxed);
        if behind >= LEFT_MAX {
            return Err(CallError::Left(behind));
        }
        // Without room in it: a value is either taken by the receiver, or comes back to the thread that made it.
        let (sender, receiver) = sync_channel(0);
        let (left, gauge) = (Arc::clone(&self.left), self.gauge.clone());
        std::thread::Builder::new()
            .name("mount".to_owned())
            .spawn(move || {
                let result = call();
                if sender.send(result).is_err() {
                    left.fetch_sub(1, Ordering::Relaxed);
                    gauge.dec();
                    tracing::warn!("a mount call came back after its deadline; what it made is dropped");
                }
            })
            .map_err(CallError::Thread)?;
        match receiver.recv_timeout(self.deadline) {
            Ok(result) => result.map_err(CallError::Failed),
            Err(RecvTimeoutError::Disconnected) => Err(CallError::Panicked),
            Err(RecvTimeoutError::Timeout) => {
                // Before the receiver goes, and with it the thread's chance to be taken off this number.
                self.left.fetch_add(1, Ordering::Relaxed);
                self.gauge.inc();
                drop(receiver);
                Err(CallError::Late(self.deadline))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::mpsc::channel;

    use super::*;

    fn calls(deadline: Duration) -> Calls {
        Calls::new(deadline, IntGauge::new("left", "left").unwrap())
    }

    /// Waits for what another thread is about to do.
    fn eventually(what: impl Fn() -> bool) {
        for _ in 0..5000 {
            if what() {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("it did not happen in 5 s");
    }

    #[test]
    fn what_comes_back_in_time_is_given() {
        let calls = calls(Duration::from_secs(60));
        assert_eq!(calls.run(|| Ok(7)).unwrap(), 7);
        let failed = || SysError::new("mount", Path::new("/x"), std::io::Error::from_raw_os_error(15));
        let error = calls.run(move || Err::<(), _>(failed())).unwrap_err();
        assert_eq!(error.errno(), Some(15));
        assert!(!error.is_silence());
        assert!(matches!(
            calls.run::<()>(|| panic!("on purpose")),
            Err(CallError::Panicked)
        ));
        assert_eq!(calls.gauge.get(), 0);
    }

    #[test]
    fn what_does_not_come_back_is_left_behind_and_its_work_dropped() {
        struct Made(std::sync::mpsc::Sender<()>);
        impl Drop for Made {
            fn drop(&mut self) {
                let _ = self.0.send(());
            }
        }
        let calls = calls(Duration::from_millis(1));
        let (dropped, drops) = channel();
        let mut gates = Vec::new();
        for behind in 1..=LEFT_MAX {
            let (open, gate) = channel::<()>();
            let dropped = dropped.clone();
            let call = move || {
                let _ = gate.recv();
                Ok(Made(dropped))
            };
            assert!(matches!(calls.run(call), Err(CallError::Late(_))));
            assert_eq!(calls.gauge.get(), behind as i64);
            gates.push(open);
        }
        let error = calls.run(|| Ok(())).unwrap_err();
        assert!(
            error.is_silence() && error.to_string().contains("8 mount calls"),
            "{error}"
        );
        drop(gates);
        for _ in 0..LEFT_MAX {
            drops.recv_timeout(Duration::from_secs(60)).unwrap();
        }
        eventually(|| calls.gauge.get() == 0);
        eventually(|| calls.run(|| Ok(())).is_ok());
    }
}
