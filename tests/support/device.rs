//! A disk under a real file system, which remembers what was written to it and can be told to fail.
//!
//! It is a file of a small FUSE file system that this process serves, under a loop device on which there is ext4: the kernel treats it as any
//! disk, with its page cache, journal, flushes and errors. Two things are asked of it:
//! - *Power cuts* ([`Device::tape`]): it records every write and every flush. What was flushed is on the disk; of what was not, each sector may be, but
//!   for the first block: see [`after_power_cut`].
//! - *Errors*: some blocks cannot be read ([`Device::lose`]), or nothing can be written.
//!
//! Needs root, FUSE and loop devices. Everything is unmounted when it is dropped.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request,
    WriteFlags,
};
use lazuli::sys::mount::{Unmount, unmount};

/// Block of the file system, in bytes; mkfs.ext4 is told.
pub const BLOCK: usize = 4096;
/// What a disk writes as a whole or not at all, in bytes.
const SECTOR: usize = 512;
/// How long the kernel may keep what it knows of the file: its length never changes.
const TTL: Duration = Duration::from_secs(3600);
/// The file.
const NAME: &str = "disk";
const FILE: INodeNo = INodeNo(2);

/// What was done to a disk.
#[derive(Debug, Clone)]
pub enum Op {
    /// Bytes at an offset.
    Write(usize, Vec<u8>),
    /// All that was written before is durable.
    Flush,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    /// Blocks that cannot be read.
    lost: HashSet<usize>,
    /// Whether nothing can be written.
    refuses: bool,
    /// Everything since recording began.
    tape: Option<Vec<Op>>,
}

type Shared = Arc<Mutex<State>>;

fn lock(state: &Shared) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The FUSE file system.
struct Server(Shared);

impl Server {
    fn attr(&self, ino: INodeNo) -> FileAttr {
        let (kind, size) = match ino {
            FILE => (FileType::RegularFile, lock(&self.0).bytes.len() as u64),
            _ => (FileType::Directory, BLOCK as u64),
        };
        FileAttr {
            ino,
            size,
            blocks: size.div_ceil(SECTOR as u64),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm: 0o700,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: BLOCK as u32,
            flags: 0,
        }
    }
}

impl Filesystem for Server {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name == NAME {
            true => reply.entry(&TTL, &self.attr(FILE), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attr(ino));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // Every read and write of the loop device comes here, and none is answered from memory.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let state = lock(&self.0);
        let start = (offset as usize).min(state.bytes.len());
        let end = (start + size as usize).min(state.bytes.len());
        match (start / BLOCK..end.div_ceil(BLOCK)).any(|block| state.lost.contains(&block)) {
            true => reply.error(Errno::EIO),
            false => reply.data(&state.bytes[start..end]),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut state = lock(&self.0);
        let offset = offset as usize;
        if state.refuses {
            return reply.error(Errno::EIO);
        }
        let Some(place) = state.bytes.get_mut(offset..offset + data.len()) else {
            return reply.error(Errno::ENOSPC);
        };
        place.copy_from_slice(data);
        if let Some(tape) = &mut state.tape {
            tape.push(Op::Write(offset, data.to_vec()));
        }
        reply.written(data.len() as u32);
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let mut state = lock(&self.0);
        if state.refuses {
            return reply.error(Errno::EIO);
        }
        if let Some(tape) = &mut state.tape {
            tape.push(Op::Flush);
        }
        reply.ok();
    }
}

/// A disk with ext4 on it, mounted.
pub struct Device {
    state: Shared,
    /// Ends before its directory goes.
    session: Option<BackgroundSession>,
    dir: tempfile::TempDir,
}

impl Device {
    /// An empty one of so many MiB.
    pub fn new(mib: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        File::create(&image).unwrap().set_len((mib as u64) << 20).unwrap();
        // What would be written later by itself is written now.
        let options = "lazy_itable_init=0,lazy_journal_init=0,nodiscard";
        run(Command::new("mkfs.ext4")
            .args(["-q", "-b", "4096", "-E", options])
            .arg(&image));
        Self::of(fs::read(&image).unwrap())
    }

    /// One that holds these bytes, such as what a power cut has left.
    pub fn of(bytes: Vec<u8>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let state = Arc::new(Mutex::new(State {
            bytes,
            ..State::default()
        }));
        for name in ["fuse", "root"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("lazuli-test-disk".to_owned())];
        let session = fuser::spawn_mount(Server(Arc::clone(&state)), dir.path().join("fuse"), &config).unwrap();
        let device = Device {
            state,
            session: Some(session),
            dir,
        };
        let file = device.dir.path().join("fuse").join(NAME);
        // The file system goes on after errors: what the daemon does then is what is looked at.
        let options = "loop,errors=continue,noatime";
        run(Command::new("mount")
            .args(["-t", "ext4", "-o", options])
            .arg(file)
            .arg(device.root()));
        device
    }

    /// Where the file system is mounted.
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// From now on blocks that hold what a file has cannot be read; how many that are. The file has to be on the disk, and what the kernel has of
    /// it in memory goes, unless somebody has it mapped.
    pub fn lose(&self, path: &Path) -> usize {
        let (file, content) = (File::open(path).unwrap(), fs::read(path).unwrap());
        file.sync_all().unwrap();
        let mut found = 0;
        {
            let mut state = lock(&self.state);
            let State { bytes, lost, .. } = &mut *state;
            for part in content.chunks(BLOCK) {
                let mut part = part.to_vec();
                part.resize(BLOCK, 0);
                if part.iter().all(|byte| *byte == 0) {
                    continue;
                }
                // A block of a file is a block of the disk.
                for (at, block) in bytes.chunks_exact(BLOCK).enumerate() {
                    if block == part {
                        lost.insert(at);
                        found += 1;
                    }
                }
            }
        }
        self.forget_pages(path);
        found
    }

    /// Takes what the kernel has of a file out of memory, as far as nobody has it mapped.
    pub fn forget_pages(&self, path: &Path) {
        let file = File::open(path).unwrap();
        rustix::fs::fadvise(file.as_fd(), 0, None, rustix::fs::Advice::DontNeed).unwrap();
    }

    /// Whether nothing can be written from now on.
    pub fn refuse_writes(&self, refuses: bool) {
        lock(&self.state).refuses = refuses;
    }

    /// Begins to record, and gives what is on the disk now.
    pub fn record(&self) -> Vec<u8> {
        // What is not on the disk yet would be missing.
        let root = File::open(self.root()).unwrap();
        rustix::fs::syncfs(&root).unwrap();
        let mut state = lock(&self.state);
        state.tape = Some(Vec::new());
        state.bytes.clone()
    }

    /// How many operations were recorded.
    pub fn recorded(&self) -> usize {
        lock(&self.state).tape.as_ref().map_or(0, Vec::len)
    }

    /// What was recorded, which ends.
    pub fn tape(&self) -> Vec<Op> {
        lock(&self.state).tape.take().unwrap_or_default()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Not lazily if it can be helped: the loop device goes with the mount.
        self.refuse_writes(false);
        if unmount(&self.root(), Unmount::IfIdle).is_err() {
            let _ = unmount(&self.root(), Unmount::Detach);
        }
        drop(self.session.take());
        let _ = unmount(&self.dir.path().join("fuse"), Unmount::Detach);
    }
}

/// How much of what was not flushed is on the disk when the power is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Nothing of it.
    Nothing,
    /// Some writes, as they came.
    Some,
    /// Some sectors.
    Torn,
    /// The first of it.
    First,
}

/// All of them.
pub const CUTS: [Cut; 4] = [Cut::Nothing, Cut::Some, Cut::Torn, Cut::First];

/// What is on a disk that held `before` when the power is cut after the first `done` operations; `below(n)` gives numbers below n without a
/// pattern.
pub fn after_power_cut(
    before: &[u8],
    tape: &[Op],
    done: usize,
    cut: Cut,
    below: &mut impl FnMut(usize) -> usize,
) -> Vec<u8> {
    let mut bytes = before.to_vec();
    let done = &tape[..done];
    let flushed = done.iter().rposition(|op| matches!(op, Op::Flush)).unwrap_or(0);
    let (durable, pending) = done.split_at(flushed);
    for op in durable {
        if let Op::Write(offset, data) = op {
            bytes[*offset..*offset + data.len()].copy_from_slice(data);
        }
    }
    let first = below(pending.len() + 1);
    for (at, op) in pending.iter().enumerate() {
        let Op::Write(offset, data) = op else { continue };
        let (mut from, end) = (*offset, offset + data.len());
        while from < end {
            let to = match cut {
                // ext4's superblock has two sectors and a checksum over both; that it is written whole is what ext4 counts on.
                Cut::Torn if from < BLOCK => BLOCK,
                Cut::Torn => from + SECTOR,
                _ => end,
            };
            let to = to.min(end);
            let kept = match cut {
                Cut::Nothing => false,
                Cut::First => at < first,
                Cut::Some | Cut::Torn => below(2) == 0,
            };
            if kept {
                bytes[from..to].copy_from_slice(&data[from - offset..to - offset]);
            }
            from = to;
        }
    }
    bytes
}

fn run(command: &mut Command) {
    let output: io::Result<_> = command.output();
    let output = output.unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
}
