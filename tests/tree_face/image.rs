//! The files that the image face is made of: data spaces and metadata, in the root of the session.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lazuli::fetch::LayerData as _;
use lazuli::fs::FsError;
use lazuli::metrics::Metrics;
use rustix::fs::{Mode, OFlags};
use tokio::sync::Semaphore;

use crate::fake::{Cold, FakeLayer, Layout, content, slow_and_fast};
use crate::harness::{Mounted, names, read_file};

/// Sizes of the files in [`layer`]: below a sector, a page, more, and nothing.
const SIZES: [usize; 5] = [100, 4096, 70_001, 0, 513];

/// A layer, and its data space as the data file has to show it.
fn layer() -> (Arc<FakeLayer>, Vec<u8>) {
    let mut layout = Layout::new();
    let mut space = Vec::new();
    for (i, size) in SIZES.into_iter().enumerate() {
        let content = content(size, i as u32);
        layout.file(format!("file-{i}"), 0o644, &content);
        space.extend_from_slice(&content);
        space.resize(space.len().next_multiple_of(512), 0);
    }
    let layer = layout.build("image");
    assert_eq!(space.len() as u64, layer.index().data_size());
    assert_ne!(space.len() % 4096, 0, "the last page has to be filled up");
    space.resize(space.len().next_multiple_of(4096), 0);
    (layer, space)
}

/// A file with `bytes` in the directory of the session.
fn local_file(mounted: &Mounted, name: &str, bytes: &[u8]) -> File {
    let path = mounted.dir.path().join(name);
    File::create(&path).unwrap().write_all(bytes).unwrap();
    File::open(&path).unwrap()
}

fn open_direct(path: &Path) -> File {
    File::from(rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECT, Mode::empty()).unwrap())
}

#[test]
fn the_data_file_is_the_data_space() {
    for direct in [false, true] {
        let (layer, space) = layer();
        let mounted = Mounted::new();
        mounted.session.open_directly(direct);
        mounted.session.attach(3, layer).unwrap();
        let path = mounted.session.data_path(3);
        assert_eq!(path, mounted.session.mountpoint().join("3.data"));
        let tree = mounted.session.path(3);
        mounted.within(move || {
            let stat = fs::symlink_metadata(&path).unwrap();
            assert!(stat.is_file());
            assert_eq!(
                (stat.mode() & 0o7777, stat.nlink(), stat.uid()),
                (0o400, 1, rustix::process::geteuid().as_raw())
            );
            assert_eq!((stat.len(), stat.ino()), (space.len() as u64, 3 << 32 | 0xffff_ffff));
            assert_eq!(read_file(&path).unwrap(), space);
            for file in [File::open(&path).unwrap(), open_direct(&path)] {
                for (offset, len) in [
                    (0, 1),
                    (99, 5000),
                    (4096, 8192),
                    (space.len() - 4096, 4096),
                    (space.len() - 5, 5),
                ] {
                    let mut bytes = vec![1; len];
                    file.read_exact_at(&mut bytes, offset as u64).unwrap();
                    assert!(bytes == space[offset..offset + len], "{len} bytes at {offset}");
                }
                // Behind the end is nothing, not zeros for ever.
                assert_eq!(file.read_at(&mut [0; 10], space.len() as u64).unwrap(), 0);
                assert_eq!(file.read_at(&mut [0; 10], space.len() as u64 - 3).unwrap(), 3);
            }
            for error in [
                File::options().write(true).open(&path).unwrap_err(),
                fs::remove_file(&path).unwrap_err(),
                fs::read(path.join("x")).unwrap_err(),
            ] {
                let code = error.raw_os_error();
                assert!([Some(libc::EROFS), Some(libc::ENOTDIR)].contains(&code), "{error}");
            }
            assert_eq!(fs::read(tree.join("file-2")).unwrap(), content(SIZES[2], 2));
        });
        assert!(mounted.requests("read_data") > 0);
        assert_eq!(mounted.requests("read"), 1);
        // Without an answer to OPEN the kernel asks once.
        assert_eq!(mounted.requests("open") > 1, direct);
    }
}

#[test]
fn the_page_cache_is_used_or_not() {
    for direct in [false, true] {
        let (layer, space) = layer();
        let mounted = Mounted::new();
        mounted.session.open_directly(direct);
        mounted.session.attach(1, layer).unwrap();
        for _ in 0..2 {
            let (path, space) = (mounted.session.data_path(1), space.clone());
            mounted.within(move || assert_eq!(read_file(&path).unwrap(), space));
        }
        let first = mounted.requests("read_data");
        let path = mounted.session.data_path(1);
        mounted.within(move || read_file(&path).unwrap());
        assert_eq!(mounted.requests("read_data") > first, direct);
    }
}

#[test]
fn an_empty_layer_has_an_empty_data_file() {
    let mounted = Mounted::new();
    mounted.session.attach(1, Layout::new().build("empty")).unwrap();
    let path = mounted.session.data_path(1);
    mounted.within(move || {
        assert_eq!(fs::metadata(&path).unwrap().len(), 0);
        assert_eq!(read_file(&path).unwrap(), b"");
    });
}

#[test]
fn a_cold_data_file_is_fetched_or_fails() {
    const OFFSET: u64 = 200_192;
    let gate = Arc::new(Semaphore::new(0));
    let layer = slow_and_fast(3, &Cold::Gate(Arc::clone(&gate)));
    let start = |name: &str| {
        let ino = layer.names().unwrap().lookup_path(name.as_bytes()).unwrap();
        layer.names().unwrap().inode(ino).unwrap().data
    };
    assert_eq!(start("slow-0"), OFFSET);
    let (second, third) = (start("slow-1"), start("slow-2"));
    layer.set_cold("slow-1", Some(Cold::Fail(1)));
    layer.set_cold("slow-2", Some(Cold::Hang));
    let mounted = Mounted::with(1, Duration::from_millis(500));
    mounted.session.open_directly(true);
    mounted.session.attach(1, Arc::clone(&layer) as _).unwrap();
    let path = mounted.session.data_path(1);
    let (failures, failed) = std::sync::mpsc::channel();
    let metrics = Arc::clone(&mounted.metrics);
    let errors = |metrics: &Metrics| metrics.fuse_errors_total.with_label_values(&["EIO"]).get();
    mounted.within(move || {
        let file = File::open(path).unwrap();
        let read = |offset| {
            let mut bytes = vec![0; 5000];
            file.read_exact_at(&mut bytes, offset).map(|()| bytes)
        };
        let failed = |error: io::Error| error.raw_os_error() == Some(libc::EIO);
        // The deadline passes, and then the bytes come.
        assert!(read(OFFSET).is_err_and(failed));
        gate.add_permits(1);
        assert_eq!(read(OFFSET).unwrap(), content(5000, 0));
        assert!(read(second).is_err_and(failed));
        assert_eq!(read(second).unwrap(), content(5000, 1));
        assert!(read(third).is_err_and(failed));
        layer.set_cold("slow-2", None);
        assert_eq!(read(third).unwrap(), content(5000, 2));
        layer.set_cold("slow-0", Some(Cold::DiskError));
        assert_eq!(read(OFFSET).unwrap(), content(5000, 0));
        layer.set_cold("slow-0", Some(Cold::Panic));
        assert!(read(OFFSET).is_err_and(failed));
        // The last page: some of it is cold, and some is behind the data space.
        layer.set_cold("slow-0", None);
        layer.set_cold("slow-2", Some(Cold::Fail(1)));
        let end = layer.index().data_size().next_multiple_of(4096);
        let mut bytes = vec![1; (end - third) as usize];
        assert!(failed(file.read_exact_at(&mut bytes, third).unwrap_err()));
        layer.set_cold("slow-2", Some(Cold::Gate(gate)));
        failures.send(errors(&metrics)).unwrap();
        // What took its time to fail is tried again after a while; the watchdog ends this if it never is.
        while file.read_exact_at(&mut bytes, third).is_err() {
            std::thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(bytes[..5000], content(5000, 2));
        assert!(bytes[5000..].iter().all(|byte| *byte == 0));
    });
    assert_eq!(failed.recv().unwrap(), 5);
}

#[test]
fn metadata_comes_and_goes() {
    let mounted = Mounted::new();
    let session = &mounted.session;
    let bytes = content(100_352, 9);
    session.attach_metadata(5, local_file(&mounted, "a", &bytes)).unwrap();
    session.attach(6, layer().0).unwrap();
    session.attach_metadata(6, local_file(&mounted, "b", b"short")).unwrap();
    let zero = session.attach_metadata(0, local_file(&mounted, "c", b""));
    assert!(matches!(zero, Err(FsError::Metadata { slot: 0, .. })));
    let directory = session.attach_metadata(7, File::open(mounted.dir.path()).unwrap());
    assert!(matches!(directory, Err(FsError::Metadata { slot: 7, .. })));

    let (root, path) = (session.mountpoint().to_owned(), session.metadata_path(5));
    let listed = |expected: &[&str]| {
        let root = root.clone();
        let expected: BTreeSet<Vec<u8>> = expected.iter().map(|name| name.as_bytes().to_vec()).collect();
        // The kernel keeps listings until it was told, which is soon; single names it asks for each time.
        mounted.within(move || {
            while names(&root).unwrap() != expected {
                std::thread::sleep(Duration::from_millis(1));
            }
        });
    };
    listed(&["5.meta", "6", "6.data", "6.meta"]);
    let other = session.metadata_path(6);
    let open = mounted.within(move || {
        let stat = fs::symlink_metadata(&path).unwrap();
        assert_eq!((stat.mode(), stat.len()), (0o100_400, 100_352));
        assert_eq!(stat.ino(), 5 << 32 | 0xffff_fffe);
        assert_eq!(read_file(&path).unwrap(), bytes);
        assert_eq!(read_file(&other).unwrap(), b"short");
        open_direct(&path)
    });
    assert!(mounted.requests("read_metadata") > 0);

    // The layer goes, its metadata stays; and the other way round.
    assert!(session.detach(6));
    listed(&["5.meta", "6.meta"]);
    assert!(session.detach_metadata(5));
    assert!(!session.detach_metadata(5));
    assert!(!session.detach(5));
    listed(&["6.meta"]);
    let path = session.metadata_path(5);
    mounted.within(move || {
        assert_eq!(fs::metadata(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        let error = open.read_at(&mut [0; 10], 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESTALE));
    });

    // What was shown before is not what is shown now, as soon as the kernel was told.
    session
        .attach_metadata(6, local_file(&mounted, "d", b"another"))
        .unwrap();
    let path = session.metadata_path(6);
    mounted.within(move || while read_file(&path).unwrap() != b"another" {});
}

#[test]
fn a_layer_goes_under_open_data_files() {
    let (layer, space) = layer();
    let mounted = Mounted::new();
    mounted.session.open_directly(true);
    mounted.session.attach(1, Arc::clone(&layer) as _).unwrap();
    let path = mounted.session.data_path(1);
    let open = mounted.within({
        let path = path.clone();
        move || File::open(path).unwrap()
    });
    let read = || {
        let file = open.try_clone().unwrap();
        mounted.within(move || {
            let mut bytes = vec![0; 4096];
            file.read_exact_at(&mut bytes, 0).map(|()| bytes)
        })
    };
    assert_eq!(read().unwrap(), space[..4096]);
    assert!(mounted.session.detach(1));
    assert_eq!(read().unwrap_err().raw_os_error(), Some(libc::ESTALE));
    mounted.within(move || assert_eq!(fs::metadata(path).unwrap_err().kind(), io::ErrorKind::NotFound));
    mounted.session.attach(1, layer).unwrap();
    assert_eq!(read().unwrap(), space[..4096]);

    // The session ends, and whoever still has the file open gets an error, not silence.
    let Mounted { session, .. } = mounted;
    session.unmount().unwrap();
    let error = open.read_at(&mut [0; 10], 0).unwrap_err();
    assert!(
        [Some(libc::ENOTCONN), Some(libc::ECONNABORTED)].contains(&error.raw_os_error()),
        "{error}"
    );
}
