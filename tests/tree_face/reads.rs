//! Reads that are slow, late, or fail.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use tokio::sync::Semaphore;

use crate::fake::{Cold, content, slow_and_fast};
use crate::harness::{Mounted, read_file};

/// What a failed read says.
const EIO: Option<i32> = Some(libc::EIO);

#[test]
fn slow_reads_hold_no_thread() {
    const SLOW: usize = 40;
    let gate = Arc::new(Semaphore::new(0));
    let layer = slow_and_fast(SLOW, &Cold::Gate(Arc::clone(&gate)));
    let mounted = Mounted::with(2, Duration::from_secs(50));
    mounted.session.attach(1, layer).unwrap();
    let root = mounted.session.path(1);
    let readers: Vec<_> = (0..SLOW)
        .map(|i| {
            let path = root.join(format!("slow-{i}"));
            std::thread::spawn(move || read_file(&path))
        })
        .collect();
    // All slow reads are with the session before the fast one begins.
    mounted.within({
        let metrics = Arc::clone(&mounted.metrics);
        move || {
            while metrics.fuse_requests_total.with_label_values(&["read"]).get() < SLOW as u64 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
    let path = root.join("fast");
    assert_eq!(mounted.within(move || read_file(&path)).unwrap(), content(200_000, 5));
    assert!(readers.iter().all(|reader| !reader.is_finished()));

    gate.add_permits(1);
    for (i, reader) in readers.into_iter().enumerate() {
        let bytes = mounted.within(move || reader.join()).unwrap().unwrap();
        assert_eq!(bytes, content(5000, i as u32));
    }
    assert_eq!(mounted.metrics.cold_read_seconds.get_sample_count(), SLOW as u64);
}

#[test]
fn a_read_ends_by_its_deadline() {
    let layer = slow_and_fast(2, &Cold::Gate(Arc::new(Semaphore::new(0))));
    layer.set_cold("slow-1", Some(Cold::Hang));
    let mounted = Mounted::with(1, Duration::from_millis(50));
    mounted.session.attach(1, Arc::clone(&layer) as _).unwrap();
    for (name, seed) in [("slow-0", 0), ("slow-1", 1)] {
        let path = mounted.session.path(1).join(name);
        let cold = path.clone();
        let error = mounted.within(move || read_file(&cold)).unwrap_err();
        assert_eq!(error.raw_os_error(), EIO, "{name}");
        // The failure is not kept.
        layer.set_cold(name, None);
        assert_eq!(mounted.within(move || read_file(&path)).unwrap(), content(5000, seed));
    }
}

#[test]
fn a_read_that_failed_succeeds_when_the_bytes_can_be_had() {
    let layer = slow_and_fast(1, &Cold::Fail(1));
    let mounted = Mounted::new();
    mounted.session.attach(1, layer).unwrap();
    let path = mounted.session.path(1).join("slow-0");
    mounted.within(move || {
        // Around the page cache: with it the kernel asks again by itself when read-ahead fails, and the failure may stay unseen.
        let flags = OFlags::RDONLY | OFlags::DIRECT;
        let file = File::from(rustix::fs::open(&path, flags, Mode::empty()).unwrap());
        let mut bytes = vec![0; 5000];
        let error = file.read_exact_at(&mut bytes, 0).unwrap_err();
        assert_eq!(error.raw_os_error(), EIO);
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, content(5000, 0));
    });
    let errors = mounted.metrics.fuse_errors_total.with_label_values(&["EIO"]).get();
    assert_eq!(errors, 1);
}

#[test]
fn a_failing_disk_and_a_bug_are_survived() {
    let layer = slow_and_fast(2, &Cold::DiskError);
    layer.set_cold("slow-1", Some(Cold::Panic));
    let mounted = Mounted::with(1, Duration::from_secs(30));
    mounted.session.attach(1, Arc::clone(&layer) as _).unwrap();
    let root = mounted.session.path(1);
    mounted.within(move || {
        assert_eq!(read_file(&root.join("slow-0")).unwrap(), content(5000, 0));
        for _ in 0..3 {
            let error = read_file(&root.join("slow-1")).unwrap_err();
            assert_eq!(error.raw_os_error(), EIO);
        }
        // The one thread is still there.
        assert_eq!(read_file(&root.join("fast")).unwrap(), content(200_000, 5));
    });
    assert!(mounted.session.is_alive());
}
