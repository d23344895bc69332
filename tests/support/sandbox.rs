//! A temporary root for real programs: it owns their directories, processes and mounts, and leaves nothing behind.
//!
//! A [`Sandbox`] is a handle; the last one that goes away cleans up, in this order: shims of containerds below the root and their
//! containers, mounts below the root (longest path first, lazily as a last resort), the directory. Processes are killed when their
//! [`Process`] is dropped, which is earlier, since a `Process` holds a handle. If the thread panics, the end of every log is shown.
//! `LAZULI_E2E_KEEP=1` keeps the directory. Programs die with the test run, and the next run clears what a killed one left.
//!
//! At most [`slots`] sandboxes exist at once, however many threads the test runner has: each holds a containerd, a registry and a daemon.

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, Once};
use std::thread;
use std::time::{Duration, Instant};

mod cleanup;

use cleanup::{UMOUNT_TIMEOUT, clear, end_shims, identity, kill_group, signal, sweep};
pub use cleanup::{mounts_below, unmount_below};

/// Longest wait for something that normally takes milliseconds: a socket, a port, the end of a process.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Longest run of a command that has no reason to be slow; a dead mount below it must not hang the test run.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(120);
/// Pause between two looks at something that is awaited.
const POLL: Duration = Duration::from_millis(10);
/// Bytes of the end of a log that are shown when a test fails.
const LOG_TAIL: u64 = 12_000;

/// How the names of roots begin.
const PREFIX: &str = "lz-";
/// The file in a root that says which process made it.
const OWNER: &str = "owner";

/// A temporary root and everything in it.
#[derive(Clone)]
pub struct Sandbox(Arc<Inner>);

struct Inner {
    root: PathBuf,
    name: String,
    /// Its place among the sandboxes of this machine, or the sandbox that it lies in.
    _held: Held,
}

enum Held {
    Slot { _slot: Slot },
    Within { _outer: Sandbox },
}

impl Sandbox {
    /// Makes a root for the test `name`, after waiting for a free slot. Its path is short, because socket paths have 107 bytes at most.
    pub fn new(name: &str) -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "end-to-end tests mount file systems and start containers: run them as root"
        );
        let slot = Slot::take();
        let base = std::env::temp_dir();
        static SWEPT: Once = Once::new();
        SWEPT.call_once(|| sweep(&base));
        let root = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir_in(&base)
            .unwrap_or_else(|error| panic!("a sandbox cannot be made in {}: {error}", base.display()))
            .keep();
        fs::write(root.join(OWNER), identity(std::process::id()).unwrap_or_default()).unwrap();
        require_upper_dirs(&root);
        fs::create_dir(root.join("logs")).unwrap();
        Sandbox(Arc::new(Inner {
            root,
            name: name.to_owned(),
            _held: Held::Slot { _slot: slot },
        }))
    }

    /// A sandbox within this one, as for a second machine: its own directories, processes and mounts, cleaned up before the outer one.
    pub fn machine(&self, name: &str) -> Self {
        let root = self.path(format!("{}{name}", self.unique()));
        fs::create_dir_all(root.join("logs")).unwrap();
        Sandbox(Arc::new(Inner {
            root,
            name: format!("{} {name}", self.0.name),
            _held: Held::Within { _outer: self.clone() },
        }))
    }

    /// The root directory.
    pub fn root(&self) -> &Path {
        &self.0.root
    }

    /// A path below the root; nothing is made.
    pub fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.0.root.join(relative)
    }

    /// A directory below the root, made if it is missing.
    pub fn dir(&self, relative: impl AsRef<Path>) -> PathBuf {
        let path = self.path(relative);
        fs::create_dir_all(&path).unwrap_or_else(|error| panic!("cannot make {}: {error}", path.display()));
        path
    }

    /// A word that no other sandbox has at this time, for names that are global on a machine (cgroups, runc containers).
    pub fn unique(&self) -> &str {
        self.0.root.file_name().and_then(OsStr::to_str).unwrap_or("lz")
    }

    /// Starts a program in the background, its output in `logs/<name>.log` (appended: a restarted program goes on in the same file).
    pub fn spawn(&self, name: &str, command: &mut Command) -> Process {
        let log = self.path("logs").join(format!("{name}.log"));
        let output = fs::OpenOptions::new().create(true).append(true).open(&log).unwrap();
        let command = &mut with_parent(command);
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            // Its own process group: an interrupt at the terminal reaches the test, which then ends its programs in order.
            .process_group(0);
        let child = command.spawn().unwrap_or_else(|error| {
            panic!("{:?} cannot be started: {error}", command.get_program());
        });
        Process {
            name: name.to_owned(),
            child,
            log,
            shown: LOG_TAIL,
            sandbox: self.clone(),
        }
    }
}

/// The same command, run by `setpriv`, which has the kernel kill it when the thread that starts it ends: an interrupted test run
/// leaves no daemons behind. (What daemons leave, the next run's [`sweep`] removes.)
fn with_parent(command: &Command) -> Command {
    let mut bound = Command::new(require_program("setpriv"));
    bound
        .args(["--pdeathsig", "KILL", "--"])
        // Whoever runs the tests may have signals ignored (nohup, a shell's background), and programs inherit that.
        .args(["env", "--default-signal"])
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => bound.env(name, value),
            None => bound.env_remove(name),
        };
    }
    bound
}

impl Drop for Inner {
    fn drop(&mut self) {
        if std::env::var_os("LAZULI_E2E_KEEP").is_some() {
            end_shims(&self.root);
            unmount_below(&self.root);
            // Without an owner it is not swept either.
            let _ = fs::remove_file(self.root.join(OWNER));
            eprintln!("sandbox of {} kept: {}", self.name, self.root.display());
        } else {
            clear(&self.root);
        }
    }
}

/// overlayfs refuses upper directories on some file systems (overlayfs itself among them: a container's root).
fn require_upper_dirs(root: &Path) {
    let dirs = ["l", "u", "w", "m"].map(|name| root.join("probe").join(name));
    for dir in &dirs {
        fs::create_dir_all(dir).unwrap();
    }
    let [lower, upper, work, target] = &dirs;
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        upper.display(),
        work.display()
    );
    let mut mount = Command::new("mount");
    mount.args(["-t", "overlay", "overlay", "-o", &options]).arg(target);
    let result = run(&mut mount, UMOUNT_TIMEOUT);
    if result.success() {
        unmount_below(&root.join("probe"));
        fs::remove_dir_all(root.join("probe")).unwrap();
    } else {
        let _ = fs::remove_dir_all(root);
        panic!(
            "overlayfs cannot have its upper directory in {}: {}\nset TMPDIR to a directory on ext4, xfs or btrfs",
            root.display(),
            result.stderr.trim()
        );
    }
}

/// A program in the background, killed when this is dropped.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    shown: u64,
    sandbox: Sandbox,
}

impl Process {
    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Shows so many bytes of the log when the test fails, for a program that is talkative and rarely to blame.
    pub fn show(&mut self, bytes: u64) {
        self.shown = bytes;
    }

    /// Its output so far, over all starts under the same name.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Its status, if it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Sends SIGTERM and waits for the end; `None` if it did not end in time, and was killed.
    pub fn terminate(&mut self, timeout: Duration) -> Option<ExitStatus> {
        if let Some(status) = self.ended() {
            return Some(status);
        }
        signal(self.child.id(), rustix::process::Signal::TERM);
        let end = wait_until(timeout, || self.child.try_wait().unwrap());
        if end.is_none() {
            self.kill();
        }
        end
    }

    /// Sends SIGKILL and does not wait.
    pub fn send_kill(&self) {
        signal(self.child.id(), rustix::process::Signal::KILL);
    }

    /// Sends SIGKILL and waits for the end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits until `ready` gives something; panics with the end of the log if the process ends before, or the time is over.
    pub fn wait_ready<T>(&mut self, what: &str, timeout: Duration, ready: impl Fn(&Self) -> Option<T>) -> T {
        let mut ended = None;
        let found = wait_until(timeout, || match ready(self) {
            Some(value) => Some(Some(value)),
            None => {
                ended = self.child.try_wait().unwrap();
                ended.map(|_| None)
            }
        });
        match found.flatten() {
            Some(value) => value,
            None => {
                let state = ended.map_or("still runs".to_owned(), |status| format!("ended with {status}"));
                panic!(
                    "{}: waited for {what}, and it {state}. The end of its log:\n{}",
                    self.name,
                    tail(&self.log, self.shown)
                );
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            eprintln!(
                "---- {}: log of {} ----\n{}----",
                self.sandbox.0.name,
                self.name,
                tail(&self.log, self.shown)
            );
        }
    }
}

fn tail(log: &Path, bytes: u64) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = fs::File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(bytes)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().unwrap_or_else(|error| format!("{}: {error}\n", log.display()))
}

/// What a command left.
#[derive(Debug)]
pub struct Finished {
    /// How it ended; `None` if it was killed because its time was over.
    pub status: Option<ExitStatus>,
    /// Standard output, byte by byte.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: String,
    /// The command, for messages.
    pub command: String,
    /// How long it ran.
    pub elapsed: Duration,
}

impl Finished {
    /// Whether it ended in time and with 0.
    pub fn success(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Itself, after a panic that says everything unless it succeeded.
    pub fn expect_success(self) -> Self {
        assert!(self.success(), "{}", self.describe());
        self
    }

    /// Everything about it, for messages.
    pub fn describe(&self) -> String {
        let how = match self.status {
            Some(status) => status.to_string(),
            None => "killed: it took too long".to_owned(),
        };
        format!(
            "{}\n  after {:.1?}: {how}\n  stdout: {}\n  stderr: {}",
            self.command,
            self.elapsed,
            self.text().trim_end(),
            self.stderr.trim_end()
        )
    }
}

/// Runs a command to its end, or kills it (and its process group) when `timeout` is over.
pub fn run(command: &mut Command, timeout: Duration) -> Finished {
    let started = Instant::now();
    let description = format!("{command:?}");
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let mut child = command.spawn().unwrap_or_else(|error| {
        panic!(
            "{:?} cannot be started: {error}{}",
            command.get_program(),
            package_of(command.get_program())
        );
    });
    let mut stdout = child.stdout.take().unwrap();
    let mut stderr = child.stderr.take().unwrap();
    // The pipes are drained by threads that are not joined when the time is over: a process that is stuck in the kernel holds them.
    let (sender, receiver) = std::sync::mpsc::channel();
    let (out_sender, err_sender) = (sender.clone(), sender);
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stdout.read_to_end(&mut bytes);
        let _ = out_sender.send((true, bytes));
    });
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stderr.read_to_end(&mut bytes);
        let _ = err_sender.send((false, bytes));
    });
    let status = wait_until(timeout, || child.try_wait().unwrap());
    if status.is_none() {
        kill_group(child.id());
        wait_until(Duration::from_secs(5), || child.try_wait().unwrap());
    }
    let mut finished = Finished {
        status,
        stdout: Vec::new(),
        stderr: String::new(),
        command: description,
        elapsed: started.elapsed(),
    };
    for _ in 0..2 {
        // A grandchild that was left in the background may hold the pipes; what was read by then is lost, which shows as a failure.
        match receiver.recv_timeout(Duration::from_secs(20)) {
            Ok((true, bytes)) => finished.stdout = bytes,
            Ok((false, bytes)) => finished.stderr = String::from_utf8_lossy(&bytes).into_owned(),
            Err(_) => {
                finished.stderr.push_str("\n(its output stayed open)");
                break;
            }
        }
    }
    finished
}

/// Runs a command with [`COMMAND_TIMEOUT`]; panics unless it succeeds.
pub fn run_ok(command: &mut Command) -> Finished {
    run(command, COMMAND_TIMEOUT).expect_success()
}

/// The Debian packages of the programs that the tests start.
const PACKAGES: [(&str, &str); 13] = [
    ("containerd", "containerd"),
    ("ctr", "containerd"),
    ("runc", "runc"),
    ("docker-registry", "docker-registry"),
    ("ctr-remote", "stargz-snapshotter"),
    ("skopeo", "skopeo"),
    ("busybox", "busybox-static"),
    ("tar", "tar"),
    ("setfacl", "acl"),
    ("setcap", "libcap2-bin"),
    ("mount", "mount"),
    ("setpriv", "util-linux"),
    ("umount", "mount"),
];

fn package_of(program: &OsStr) -> String {
    let name = Path::new(program).file_name().unwrap_or(program);
    PACKAGES
        .iter()
        .find(|(known, _)| *known == name)
        .map_or(String::new(), |(_, package)| {
            format!("; install it with: apt-get install {package}")
        })
}

/// The path of a program that the tests cannot do without; panics with the name of its package if it is missing.
pub fn require_program(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Not every user's PATH has the directories of system programs, even root's under cron.
    let extra = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(extra)
        .map(|dir| dir.join(name))
        .find(|candidate| candidate.is_file())
        .unwrap_or_else(|| panic!("{name} is missing{}", package_of(OsStr::new(name))))
}

/// Calls `check` until it gives something, or `timeout` is over.
pub fn wait_until<T>(timeout: Duration, mut check: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(value) = check() {
            return Some(value);
        }
        if Instant::now() >= deadline {
            return None;
        }
        thread::sleep(POLL);
    }
}

/// Whether something accepts connections on a unix socket.
pub fn listens_unix(path: &Path) -> Option<()> {
    UnixStream::connect(path).ok().map(drop)
}

/// Whether something accepts connections on a TCP port.
pub fn listens_tcp(address: SocketAddr) -> Option<()> {
    TcpStream::connect_timeout(&address, Duration::from_secs(1))
        .ok()
        .map(drop)
}

/// A port of 127.0.0.1 that was free a moment ago. Prefer port 0 wherever the program can tell which port it got.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// How many sandboxes may exist at once: one per processor, for each keeps about one busy.
fn slots() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

static USED: Mutex<usize> = Mutex::new(0);
static FREED: Condvar = Condvar::new();

/// The right to have a sandbox.
struct Slot;

impl Slot {
    fn take() -> Self {
        let used = USED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut used = FREED
            .wait_while(used, |used| *used >= slots())
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        *used += 1;
        Slot
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *USED.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) -= 1;
        FREED.notify_one();
    }
}
