//! What serving a ready layer costs: through a real mount, and in the process alone.
//!
//! The layer's bytes lie in one file, as in the cache, and are in the page cache of the file system below: what is measured is the
//! way, not a disk. To reach the session at all, what the kernel keeps has to be avoided:
//!
//! - reads open the file with O_DIRECT, so that each one is a FUSE request;
//! - look-ups take the name of a slot, which the kernel may not keep;
//! - listings drop the directory's pages (POSIX_FADV_DONTNEED) before each pass.
//!
//! Needs root and /dev/fuse. `cargo bench --bench read_path`.

#[path = "../tests/tree_face/fake.rs"]
mod fake;

use std::fs::{self, File};
use std::hint::black_box;
use std::io::{self, IoSlice, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput};
use fake::{FakeLayer, Layout};
use futures::future::BoxFuture;
use lazuli::fetch::{FetchError, LayerData};
use lazuli::fs::read::{Answer, answer_ready};
use lazuli::fs::{Session, SessionOptions};
use lazuli::layer::{BlobIndex, Digest, LayerIndex};
use lazuli::metrics::Metrics;
use rustix::fs::{Advice, Mode, OFlags};

/// Sizes of reads, in bytes: a page fault, and what the kernel reads ahead by default.
const SIZES: [usize; 2] = [4 << 10, 128 << 10];
/// Length of the file that is read, in bytes.
const FILE_LEN: usize = 16 << 20;
/// Entries of the directory that is listed.
const ENTRIES: usize = 10_000;
/// Alignment that O_DIRECT may ask for, in bytes.
const ALIGNMENT: usize = 4096;

/// A layer whose bytes are all ready, in one file.
struct FileLayer {
    names: Arc<FakeLayer>,
    data: File,
}

impl LayerData for FileLayer {
    fn digest(&self) -> &Digest {
        self.names.digest()
    }

    fn index(&self) -> &BlobIndex {
        self.names.index()
    }

    fn names(&self) -> Result<Arc<LayerIndex>, FetchError> {
        self.names.names()
    }

    fn read_ready(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        Some(self.data.read_exact_at(buf, offset))
    }

    fn read(&self, offset: u64, len: u32, deadline: Duration) -> BoxFuture<'static, Result<Bytes, FetchError>> {
        self.names.read(offset, len, deadline)
    }

    fn present_bytes(&self) -> u64 {
        self.names.present_bytes()
    }
}

fn layer(dir: &Path) -> Arc<FileLayer> {
    let mut layout = Layout::new();
    layout.file("file", 0o644, &vec![0x5a; FILE_LEN]).dir("many", 0o755);
    for i in 0..ENTRIES {
        layout.file(format!("many/entry-{i:05}"), 0o644, b"");
    }
    let names = layout.build("bench");
    let path = dir.join("data");
    fs::write(&path, vec![0x5a; FILE_LEN]).expect("the temporary directory is writable");
    let data = File::open(&path).expect("the file was just written");
    Arc::new(FileLayer { names, data })
}

/// Answers into /dev/null with the system call that FUSE needs: a header of 16 bytes and the data.
struct Null<'a>(&'a File);

impl Answer for Null<'static> {
    fn data(self, bytes: &[u8]) {
        let mut file = self.0;
        let parts = [IoSlice::new(&[0; 16]), IoSlice::new(bytes)];
        black_box(file.write_vectored(&parts)).expect("/dev/null takes everything");
    }

    fn error(self, errno: fuser::Errno) {
        panic!("{errno:?}");
    }
}

fn in_process(criterion: &mut Criterion, layer: &Arc<FileLayer>) {
    let null: &'static File = Box::leak(Box::new(
        File::options()
            .write(true)
            .open("/dev/null")
            .expect("every Linux has /dev/null"),
    ));
    let mut group = criterion.benchmark_group("in process");
    for size in SIZES {
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(format!("hit {} KiB", size >> 10), |bencher| {
            let mut offset = 0;
            bencher.iter(|| {
                offset = (offset + size) % FILE_LEN;
                let answered = answer_ready(layer.as_ref(), offset as u64, size as u32, Null(null));
                assert!(answered.is_ok());
            });
        });
    }
    group.throughput(Throughput::Elements(1));
    group.bench_function("look-up among 10,000", |bencher| {
        let index = layer.names().unwrap();
        let many = index.lookup_path(b"many").and_then(|ino| index.inode(ino)).copied();
        let many = many.expect("the directory is there");
        let mut i = 0;
        bencher.iter_batched(
            || {
                i = (i + 7919) % ENTRIES;
                format!("entry-{i:05}")
            },
            |name| assert!(index.lookup(&many, name.as_bytes()).is_some()),
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

fn mounted(criterion: &mut Criterion, root: &Path) {
    let mut group = criterion.benchmark_group("mounted");
    let direct = rustix::fs::open(
        root.join("file"),
        OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map(File::from)
    .expect("FUSE files can be opened with O_DIRECT");
    for size in SIZES {
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(format!("read {} KiB", size >> 10), |bencher| {
            let mut buffer = vec![0; size + ALIGNMENT];
            let start = buffer.as_ptr().align_offset(ALIGNMENT);
            let mut offset = 0;
            bencher.iter(|| {
                offset = (offset + size) % FILE_LEN;
                let bytes = &mut buffer[start..start + size];
                direct.read_exact_at(bytes, offset as u64).expect("the file is ready");
            });
        });
    }
    group.throughput(Throughput::Elements(1));
    group.bench_function("look-up", |bencher| {
        bencher.iter(|| rustix::fs::lstat(root).expect("the slot is attached"));
    });
    group.throughput(Throughput::Elements(ENTRIES as u64));
    group.bench_function("list 10,000", |bencher| {
        let dir = root.join("many");
        bencher.iter(|| {
            let file = File::open(&dir).expect("the directory is there");
            rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).expect("FUSE directories have pages");
            assert_eq!(fs::read_dir(&dir).expect("it is a directory").count(), ENTRIES);
        });
    });
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let dir = tempfile::tempdir().expect("there is a temporary directory");
    let layer = layer(dir.path());
    in_process(&mut criterion, &layer);

    let runtime = tokio::runtime::Runtime::new().expect("tokio starts");
    let metrics = Arc::new(Metrics::new());
    let session = Session::mount(
        &dir.path().join("layers"),
        SessionOptions {
            threads: 0,
            read_deadline: Duration::from_secs(10),
            source_name: "lazuli-bench".to_owned(),
        },
        runtime.handle().clone(),
        Arc::clone(&metrics),
    )
    .expect("FUSE can be mounted");
    session.attach(1, layer).expect("the slot is free");
    mounted(&mut criterion, &session.path(1));
    for op in ["read", "lookup", "readdirplus", "readdir"] {
        let count = metrics.fuse_requests_total.with_label_values(&[op]).get();
        println!("{op} requests that reached the session: {count}");
    }
    session.unmount().expect("nobody uses the mount any more");
    criterion.final_summary();
}
