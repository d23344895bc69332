//! FUSE requests, answered from the indexes of the attached layers and from their data.
//!
//! # What the kernel keeps
//! Names, absence, attributes, symlink targets, directory listings and pages are kept for ever, except what is in the root, whose
//! names are asked for each time. OPENDIR is answered with ENOSYS once, whereupon the kernel opens all directories by itself, with
//! FOPEN_CACHE_DIR. So is OPEN (the kernel goes on with FOPEN_KEEP_CACHE), unless data files are to be opened past the page cache,
//! which only an answer to OPEN can say: then each OPEN is answered. File handles are 0 in either case. FORGET means nothing, since inodes
//! are never made: they are places in an index.
//!
//! # Panics
//! A panic in one request is a bug. It must not end the thread, or after a few of them nobody would answer: it is caught, logged, and
//! its reply, dropped on the way, says EIO.
//!
//! # Not implemented, on purpose
//! ACCESS (the kernel checks permissions), LSEEK (a file is all data, which is what the kernel then says), FLUSH, FSYNC, POLL, BMAP,
//! locks: after one ENOSYS the kernel does them alone. Everything that writes is EROFS; the mount is read-only, so it does not come.

use std::ffi::OsStr;
use std::io;
use std::ops::Deref;
use std::os::unix::ffi::OsStrExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::attr::{self, IO_SIZE};
use super::awaited::Awaited;
use super::counters::Counters;
use super::image::Entry;
use super::read::Reads;
use super::readdir;
use super::tree::{self, Place, Tree};
use crate::layer::index::MAX_NAME_LEN;

/// How long the kernel keeps what never changes: 136 years, which no kernel's clock arithmetic overflows at.
pub(super) const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);
/// How long the kernel keeps what may change at any time.
pub(super) const NEVER: Duration = Duration::ZERO;

/// Requests of read-ahead and asynchronous reads that the kernel sends before it waits for answers, over all images. EROFS reads files
/// of this file system asynchronously, so that each reader counts: with fuser's 16, or some hundreds, the readers of one image whose registry
/// hangs would stop those of all others, also where nothing has to be fetched. Twice as many as [`waiting`](super::waiting) lets wait.
pub(super) const MAX_BACKGROUND: u16 = 2 * super::waiting::PLACES as u16;
/// At how many of them the kernel begins to leave read-ahead out: three quarters, as it does by default.
const CONGESTION_THRESHOLD: u16 = MAX_BACKGROUND / 4 * 3;
/// fuser derives the largest *read* from the largest write, so a read-only file system states one: 1 MiB, the kernel's own limit.
const MAX_TRANSFER: u32 = 1 << 20;

/// What is asked of the kernel where it has it.
const CAPABILITIES: InitFlags = InitFlags::FUSE_ASYNC_READ
    .union(InitFlags::FUSE_ASYNC_DIO)
    .union(InitFlags::FUSE_PARALLEL_DIROPS)
    // Always, not FUSE_READDIRPLUS_AUTO: a listing below overlayfs is followed by look-ups, and the two measured the same.
    .union(InitFlags::FUSE_DO_READDIRPLUS)
    .union(InitFlags::FUSE_CACHE_SYMLINKS)
    .union(InitFlags::FUSE_NO_OPEN_SUPPORT)
    .union(InitFlags::FUSE_NO_OPENDIR_SUPPORT)
    // Data changes only when Lazuli says so, i.e. never; not when an attribute looks different.
    .union(InitFlags::FUSE_EXPLICIT_INVAL_DATA)
    .union(InitFlags::FUSE_MAX_PAGES)
    .union(InitFlags::FUSE_POSIX_ACL)
    // Overlayfs finds the origin of a copied-up file by its handle; with this, also after the inode left the kernel's memory.
    .union(InitFlags::FUSE_EXPORT_SUPPORT)
    // For the take-over of the session by a new process.
    .union(InitFlags::FUSE_HAS_RESEND)
    .union(InitFlags::FUSE_ALLOW_IDMAP);

/// Bit of a request's number that the kernel sets when it sends it once more (`FUSE_UNIQUE_RESEND` of linux/fuse.h).
const RESENT: u64 = 1 << 63;

/// Answers requests.
#[derive(Clone)]
pub(super) struct Face {
    shared: Arc<Shared>,
}

/// What it takes to answer.
pub(super) struct Shared {
    pub(super) tree: Arc<Tree>,
    pub(super) reads: Reads,
    pub(super) counters: Arc<Counters>,
    /// Whether data files are opened past the page cache.
    pub(super) direct: Arc<AtomicBool>,
    pub(super) awaited: Arc<Awaited>,
}

impl Deref for Face {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.shared
    }
}

impl Face {
    pub(super) fn new(shared: Shared) -> Self {
        Face {
            shared: Arc::new(shared),
        }
    }

    /// Answers a request about the inode `ino` by `body`: now, or when the layer is there that it belongs to.
    fn answer(&self, request: &Request, op: &'static str, ino: INodeNo, body: impl FnOnce(&Face) + Send + 'static) {
        self.answer_in(request, op, tree::slot_of(ino), body);
    }

    /// The same, where the slot that it is about is known. Of the root directory itself everything is known at any time.
    fn answer_in(
        &self,
        request: &Request,
        op: &'static str,
        slot: Option<u32>,
        body: impl FnOnce(&Face) + Send + 'static,
    ) {
        if request.unique().0 & RESENT != 0 {
            self.counters.resent.inc();
        }
        let Some(slot) = slot.filter(|_| self.awaited.is_any()) else {
            return self.guard(op, || body(self));
        };
        let face = self.clone();
        let answering = Box::new(move || face.guard(op, || body(&face)));
        if let Err(answering) = self.awaited.keep(slot, answering) {
            answering();
        }
    }

    /// Runs the body of a request; see the head of this file.
    fn guard(&self, op: &'static str, body: impl FnOnce()) {
        if catch_unwind(AssertUnwindSafe(body)).is_err() {
            tracing::error!(op, "a FUSE request failed because of a bug in Lazuli");
            self.counters.failed(Errno::EIO);
        }
    }

    fn refuse_write(&self) -> Errno {
        self.counters.write.inc();
        self.counters.failed(Errno::EROFS)
    }

    fn unimplemented(&self) -> Errno {
        self.counters.other.inc();
        self.counters.failed(Errno::ENOSYS)
    }

    fn answer_xattr(&self, value: Result<&[u8], Errno>, size: u32, reply: ReplyXattr) {
        // Values come from a layer's strings, of which there is less than 4 GiB; the kernel gives no more than 64 KiB to anyone.
        match (value, size) {
            (Ok(value), 0) => reply.size(value.len() as u32),
            (Ok(value), _) if value.len() <= size as usize => reply.data(value),
            (Ok(_), _) => reply.error(self.counters.failed(Errno::ERANGE)),
            (Err(errno), _) => reply.error(self.counters.failed(errno)),
        }
    }
}

impl Filesystem for Face {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        if let Err(missing) = config.add_capabilities(CAPABILITIES) {
            tracing::info!(?missing, "this kernel's FUSE lacks some capabilities");
            // What remains is a subset of what the kernel offers.
            let _ = config.add_capabilities(CAPABILITIES.difference(missing));
        }
        // These fail only for 0, and for transfers over fuser's 16 MiB.
        let _ = config.set_max_background(MAX_BACKGROUND);
        let _ = config.set_congestion_threshold(CONGESTION_THRESHOLD);
        let _ = config.set_max_write(MAX_TRANSFER);
        Ok(())
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.counters.lookup.inc();
        let name = name.as_bytes().to_vec();
        let slot = match parent {
            INodeNo::ROOT => Entry::parse(&name).map(|(slot, _)| slot),
            _ => tree::slot_of(parent),
        };
        self.answer_in(req, "lookup", slot, move |face| {
            match face.tree.view().lookup(parent, &name) {
                Ok(Some(found)) => {
                    let ttl = if found.volatile { NEVER } else { FOREVER };
                    reply.entry_with_ttls(&FOREVER, &ttl, &found.attr, found.generation);
                }
                Ok(None) => reply.entry_with_ttls(&NEVER, &FOREVER, &attr::absent(), Generation(0)),
                Err(errno) => reply.error(face.counters.failed(errno)),
            }
        });
    }

    fn forget(&self, _req: &Request, _ino: INodeNo, _nlookup: u64) {
        self.counters.forget.inc();
    }

    fn getattr(&self, req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.counters.getattr.inc();
        self.answer(req, "getattr", ino, move |face| {
            let ttl = if ino == INodeNo::ROOT { NEVER } else { FOREVER };
            match face.tree.view().attr(ino) {
                Ok(attr) => reply.attr(&ttl, &attr),
                Err(errno) => reply.error(face.counters.failed(errno)),
            }
        });
    }

    fn readlink(&self, req: &Request, ino: INodeNo, reply: ReplyData) {
        self.counters.readlink.inc();
        self.answer(req, "readlink", ino, move |face| {
            let view = face.tree.view();
            let target = view.place(ino).and_then(|place| match place {
                Place::Inode(attached, ino) => {
                    let inode = attached.inode(ino)?;
                    match inode.is_symlink() {
                        true => Ok(attached.names()?.target(&inode).to_vec()),
                        false => Err(Errno::EINVAL),
                    }
                }
                _ => Err(Errno::EINVAL),
            });
            match target {
                Ok(target) => reply.data(&target),
                Err(errno) => reply.error(face.counters.failed(errno)),
            }
        });
    }

    fn open(&self, req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.counters.open.inc();
        if !self.direct.load(Ordering::Relaxed) {
            return reply.error(self.counters.failed(Errno::ENOSYS));
        }
        self.answer(req, "open", ino, move |face| {
            let flags = face.tree.view().place(ino).map(|place| match place {
                Place::Data(_) => FopenFlags::FOPEN_DIRECT_IO,
                _ => FopenFlags::FOPEN_KEEP_CACHE,
            });
            match flags {
                Ok(flags) => reply.opened(FileHandle(0), flags),
                Err(errno) => reply.error(face.counters.failed(errno)),
            }
        });
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.counters.opendir.inc();
        reply.error(self.counters.failed(Errno::ENOSYS));
    }

    fn read(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.answer(req, "read", ino, move |face| {
            let view = face.tree.view();
            let place = view.place(ino);
            match place {
                Ok(Place::Data(_)) => face.counters.read_data.inc(),
                Ok(Place::Metadata(..)) => face.counters.read_metadata.inc(),
                _ => face.counters.read.inc(),
            }
            match place {
                Ok(Place::Data(attached)) => face.reads.read_data(&attached.layer, offset, size, reply),
                Ok(Place::Metadata(slot, metadata)) => face.reads.read_metadata(slot, metadata, offset, size, reply),
                Ok(Place::Inode(attached, ino)) => match attached.inode(ino) {
                    Ok(inode) if inode.is_reg() => {
                        face.reads.read_file(&attached.layer, ino, &inode, offset, size, reply);
                    }
                    Ok(_) => reply.error(face.counters.failed(Errno::EISDIR)),
                    Err(errno) => reply.error(face.counters.failed(errno)),
                },
                Ok(Place::Root) => reply.error(face.counters.failed(Errno::EISDIR)),
                Err(errno) => reply.error(face.counters.failed(errno)),
            }
        });
    }

    fn readdir(&self, req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, reply: ReplyDirectory) {
        self.counters.readdir.inc();
        self.answer(req, "readdir", ino, move |face| {
            if let Err((errno, reply)) = readdir::names(&face.tree.view(), ino, offset, reply) {
                reply.error(face.counters.failed(errno));
            }
        });
    }

    fn readdirplus(&self, req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, reply: ReplyDirectoryPlus) {
        self.counters.readdirplus.inc();
        self.answer(req, "readdirplus", ino, move |face| {
            if let Err((errno, reply)) = readdir::entries(&face.tree.view(), ino, offset, reply) {
                reply.error(face.counters.failed(errno));
            }
        });
    }

    fn getxattr(&self, req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        self.counters.getxattr.inc();
        let name = name.as_bytes().to_vec();
        self.answer(req, "getxattr", ino, move |face| {
            let view = face.tree.view();
            let value = view.place(ino).and_then(|place| match place {
                Place::Inode(attached, ino) => {
                    let inode = attached.inode(ino)?;
                    tree::xattr(attached, &inode, &name)?.ok_or(Errno::ENODATA)
                }
                _ => Err(Errno::ENODATA),
            });
            face.answer_xattr(value.as_deref().map_err(|errno| *errno), size, reply);
        });
    }

    fn listxattr(&self, req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        self.counters.listxattr.inc();
        self.answer(req, "listxattr", ino, move |face| {
            let view = face.tree.view();
            let names = view.place(ino).and_then(|place| match place {
                Place::Inode(attached, ino) => tree::xattr_names(attached, &attached.inode(ino)?),
                _ => Ok(Vec::new()),
            });
            face.answer_xattr(names.as_deref().map_err(|errno| *errno), size, reply);
        });
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        self.counters.statfs.inc();
        self.guard("statfs", || {
            let totals = self.tree.view().totals();
            reply.statfs(
                totals.blocks,
                0,
                0,
                totals.inodes,
                0,
                IO_SIZE,
                MAX_NAME_LEN as u32,
                IO_SIZE,
            );
        });
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.error(self.unimplemented());
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.error(self.unimplemented());
    }

    fn fsyncdir(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.error(self.unimplemented());
    }

    fn access(&self, _req: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.error(self.unimplemented());
    }

    fn lseek(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _offset: i64, _whence: i32, reply: ReplyLseek) {
        reply.error(self.unimplemented());
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        self.counters.other.inc();
        // Overlayfs asks for file attributes (chattr) at each copy-up, and takes ENOTTY as "has none".
        reply.error(Errno::ENOTTY);
    }

    fn setattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        _size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(self.refuse_write());
    }

    fn mknod(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        reply.error(self.refuse_write());
    }

    fn mkdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
        reply.error(self.refuse_write());
    }

    fn unlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(self.refuse_write());
    }

    fn rmdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(self.refuse_write());
    }

    fn symlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, _target: &Path, reply: ReplyEntry) {
        reply.error(self.refuse_write());
    }

    fn rename(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _newparent: INodeNo,
        _newname: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(self.refuse_write());
    }

    fn link(&self, _req: &Request, _ino: INodeNo, _newparent: INodeNo, _newname: &OsStr, reply: ReplyEntry) {
        reply.error(self.refuse_write());
    }

    fn create(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(self.refuse_write());
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.error(self.refuse_write());
    }

    fn setxattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(self.refuse_write());
    }

    fn removexattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(self.refuse_write());
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _length: u64,
        _mode: i32,
        reply: ReplyEmpty,
    ) {
        reply.error(self.refuse_write());
    }

    fn copy_file_range(
        &self,
        _req: &Request,
        _ino_in: INodeNo,
        _fh_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _fh_out: FileHandle,
        _offset_out: u64,
        _len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(self.refuse_write());
    }
}
