//! A stand-in for systemd, as far as a service sees it: `NOTIFY_SOCKET`, a store for descriptors, and `LISTEN_FDS` at the next start. As systemd
//! does, it keeps what is stored while the service is down, and adds a descriptor to those of the same name until they are removed.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lazuli::sys::descriptors;

use crate::stage::Stage;
use crate::support::lazuli::{self as program, address_in};
use crate::support::sandbox::{PATIENCE, listens_unix, wait_until};

/// What is stored, in order, by name.
type Store = Arc<Mutex<Vec<(String, OwnedFd)>>>;

/// The daemon as a service.
pub struct Service {
    child: Option<Child>,
    arguments: Vec<String>,
    config: PathBuf,
    address: PathBuf,
    log: PathBuf,
    notify: PathBuf,
    store: Store,
    ready: Arc<AtomicBool>,
}

impl Service {
    /// Takes the stage's daemon down, and starts it as a service.
    pub fn start(stage: &mut Stage) -> Self {
        Self::with(stage, &[])
    }

    /// The same, with more arguments.
    pub fn with(stage: &mut Stage, arguments: &[&str]) -> Self {
        assert!(stage.lazuli().stop());
        let notify = stage.sandbox.path("notify");
        let socket = UnixDatagram::bind(&notify).unwrap();
        let (store, ready) = (Store::default(), Arc::new(AtomicBool::new(false)));
        let (kept, told) = (Arc::clone(&store), Arc::clone(&ready));
        std::thread::spawn(move || listen(&socket, &kept, &told));
        let mut service = Service {
            child: None,
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
            config: stage.lazuli().config(),
            address: address_in(&stage.sandbox),
            log: stage.sandbox.path("logs/service.log"),
            notify,
            store,
            ready,
        };
        service.restart();
        stage.await_containerd();
        service
    }

    /// Names of what is stored.
    pub fn stored(&self) -> Vec<String> {
        let mut names: Vec<_> = self
            .store
            .lock()
            .unwrap()
            .iter()
            .map(|(name, _)| name.clone())
            .collect();
        names.sort();
        names
    }

    /// Starts it, with what is stored.
    pub fn restart(&mut self) {
        let log = File::options().create(true).append(true).open(&self.log).unwrap();
        let stored: Vec<(String, OwnedFd)> = {
            let store = self.store.lock().unwrap();
            store
                .iter()
                .map(|(name, fd)| (name.clone(), fd.try_clone().unwrap()))
                .collect()
        };
        let names: Vec<&str> = stored.iter().map(|(name, _)| name.as_str()).collect();
        // Descriptors are passed as the standard ones, which nobody else inherits, and put in their place by the shell.
        let count = stored.len();
        assert!(count <= 3, "{names:?}");
        let moves: String = (0..count).map(|number| format!("{}<&{number} ", number + 3)).collect();
        let script = format!(
            "exec {moves}; exec 0</dev/null 1>>{log} 2>&1; LISTEN_PID=$$ LISTEN_FDS={count} LISTEN_FDNAMES={names} exec \"$@\"",
            log = self.log.display(),
            names = names.join(":")
        );
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "sh", "-c", &script, "sh"]);
        command
            .arg(program::program())
            .args(["serve", "--config"])
            .arg(&self.config);
        command.args(&self.arguments);
        command.env("NOTIFY_SOCKET", &self.notify).env("FDSTORE", "16");
        let mut standard = stored.into_iter().map(|(_, fd)| Stdio::from(fd));
        let mut next = || standard.next().unwrap_or_else(|| Stdio::from(log.try_clone().unwrap()));
        command.stdin(next()).stdout(next()).stderr(next());
        self.ready.store(false, Ordering::SeqCst);
        self.child = Some(command.spawn().unwrap());
        let (ready, address) = (Arc::clone(&self.ready), self.address.clone());
        let is_ready = || (ready.load(Ordering::SeqCst)).then(|| listens_unix(&address)).flatten();
        wait_until(PATIENCE, is_ready).unwrap_or_else(|| {
            panic!(
                "the service is not ready:\n{}",
                std::fs::read_to_string(&self.log).unwrap_or_default()
            )
        });
    }

    /// SIGTERM, as `systemctl restart` does; gives the exit code.
    pub fn stop(&mut self) -> Option<i32> {
        self.end(rustix::process::Signal::TERM)?.code()
    }

    /// SIGINT.
    pub fn interrupt(&mut self) -> Option<i32> {
        self.end(rustix::process::Signal::INT)?.code()
    }

    /// SIGKILL to the supervisor.
    pub fn kill(&mut self) {
        self.end(rustix::process::Signal::KILL);
    }

    fn end(&mut self, signal: rustix::process::Signal) -> Option<ExitStatus> {
        let mut child = self.child.take()?;
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, signal).unwrap();
        wait_until(PATIENCE, || child.try_wait().unwrap())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.interrupt();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(80).collect();
            eprintln!("---- service ----");
            tail.into_iter().rev().for_each(|line| eprintln!("{line}"));
        }
    }
}

/// Hears what the service says, and keeps what it stores.
fn listen(socket: &UnixDatagram, store: &Store, ready: &AtomicBool) {
    loop {
        let Ok((text, fds)) = descriptors::receive(socket, true) else {
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        let text = String::from_utf8_lossy(&text).into_owned();
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        let name = field("FDNAME").unwrap_or("stored").to_owned();
        let mut store = store.lock().unwrap();
        if field("FDSTOREREMOVE") == Some("1") {
            store.retain(|(stored, _)| *stored != name);
        }
        if field("FDSTORE") == Some("1") {
            store.extend(fds.into_iter().map(|fd| (name.clone(), fd)));
        }
        if field("READY") == Some("1") {
            ready.store(true, Ordering::SeqCst);
        }
    }
}
