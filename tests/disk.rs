//! The cache and the database on a real, small file system: one that fills up, one that fails (disk/bad.rs), one whose power is cut
//! (disk/power.rs), one on which nothing can be begun (disk/starts.rs); and files of the cache that the real kernel has mounted.
//!
//! Needs root, to mount.

#[path = "disk/bad.rs"]
mod bad;
#[path = "support/device.rs"]
mod device;
#[path = "disk/power.rs"]
mod power;
#[allow(dead_code)]
#[path = "support/skip.rs"]
mod skip;
#[path = "disk/starts.rs"]
mod starts;

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lazuli::cache::{Cache, CachedLayer, Stored};
use lazuli::config::{ByteSize, CacheConfig};
use lazuli::layer::erofs::{self, Addressing, Device};
use lazuli::layer::index::{IndexParts, Inode, mode};
use lazuli::layer::{Access, Chunk, Codec, Digest, LayerIndex, Verify};
use lazuli::metrics::Metrics;
use lazuli::sys::erofs::ErofsOptions;
use lazuli::sys::mount::{Unmount, overlay, unmount};

/// Longest wait for what happens in the background: much longer than it takes.
const PATIENCE: Duration = Duration::from_secs(60);
const CHUNK: usize = 1 << 20;

/// A file system of its own, unmounted when dropped.
struct Disk {
    dir: tempfile::TempDir,
}

impl Disk {
    /// One of `mib` MiB, of a type that mkfs knows, or in memory.
    fn new(kind: &str, mib: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (image, root) = (dir.path().join("image"), dir.path().join("root"));
        fs::create_dir(&root).unwrap();
        let mut mount = Command::new("mount");
        if kind == "tmpfs" {
            mount.args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "lazuli-test"]);
        } else {
            File::create(&image).unwrap().set_len(mib << 20).unwrap();
            run(Command::new("mkfs").args(["-t", kind, "-q"]).arg(&image));
            mount.args(["-o", "loop"]).arg(&image);
        }
        run(mount.arg(&root));
        Disk { dir }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// How full it is, as kubelet reckons.
    fn percent(&self) -> f64 {
        let stat = rustix::fs::statvfs(self.root()).unwrap();
        100.0 - stat.f_bavail as f64 * 100.0 / stat.f_blocks as f64
    }

    /// Writes a file of somebody else, so that it becomes so full.
    fn fill_to(&self, percent: f64) {
        let mut file = File::create(self.root().join("somebody-elses")).unwrap();
        while self.percent() < percent {
            file.write_all(&vec![1; 256 << 10]).unwrap();
            file.sync_all().unwrap();
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = unmount(&self.root(), Unmount::Detach);
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
}

fn bytes(name: &str, chunk: usize) -> Vec<u8> {
    let seed = Digest::of(format!("{name} {chunk}").as_bytes());
    seed.as_bytes().iter().copied().cycle().take(CHUNK).collect()
}

/// A layer of `count` MiB, all of it there.
fn layer(cache: &Arc<Cache>, name: &str, count: usize) -> Arc<CachedLayer> {
    let chunks = (0..count).map(|at| Chunk {
        data_offset: (at * CHUNK) as u64,
        data_len: CHUNK as u32,
        blob_offset: (at * CHUNK) as u64,
        blob_len: CHUNK as u32,
        skip: 0,
        digest: Digest::of(&bytes(name, at)),
    });
    let root = Inode {
        mode: mode::DIR | 0o755,
        nlink: 2,
        parent: 1,
        ..Inode::default()
    };
    let index = LayerIndex::new(IndexParts {
        access: Access::Ranges,
        codec: Codec::None,
        data_size: (count * CHUNK) as u64,
        blob_size: (count * CHUNK) as u64,
        inodes: vec![root],
        dirents: Vec::new(),
        xattrs: Vec::new(),
        chunks: chunks.collect(),
        verify: Verify::Content,
        checkpoints: Vec::new(),
        strings: Vec::new(),
    });
    let cached = cache.insert(&Digest::of(name.as_bytes()), index.unwrap()).unwrap();
    for at in 0..count {
        assert_eq!(cached.store(at, &bytes(name, at)).unwrap(), Stored::Cached);
    }
    cached
}

fn until(what: &str, mut check: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !check() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A node whose disk is one hundredth of 20 GiB, with six images and no configuration: at 86 percent kubelet would remove images and find
/// that it gains nothing, if their bytes were kept.
#[test]
fn removing_images_brings_a_full_disk_below_80_percent() {
    for kind in ["tmpfs", "ext4"] {
        let disk = Disk::new(kind, 200);
        let config = CacheConfig {
            // As small as the disk is.
            min_free: ByteSize(CacheConfig::default().min_free.0 / 100),
            ..CacheConfig::default()
        };
        let cache = Cache::open(&disk.root(), &config, Arc::new(Metrics::new())).unwrap();
        let names = ["a", "b", "c", "d", "e", "f"];
        let layers = names.map(|name| layer(&cache, name, 14));
        let mut in_use = layers.each_ref().map(|layer| Some(layer.pin()));
        cache.tend().unwrap();
        disk.fill_to(86.0);
        assert_eq!(cache.tidy(), 0);
        assert!(disk.percent() >= 86.0, "{kind}: snapshots refer to all of it");
        assert!(layers.iter().all(|layer| layer.is_complete()));
        // The catalog lets go of two layers that were young, and of two that were not.
        let [a, b, c, d, ..] = &mut in_use;
        for young in [a, b] {
            young.as_ref().unwrap().idle_from(Instant::now());
        }
        for old in [c, d] {
            drop(old.take());
        }
        until("the disk stays full", || disk.percent() < 80.0);
        cache.tidy();
        let complete = layers.each_ref().map(|layer| layer.is_complete());
        assert_eq!(complete[4..], [true, true], "{kind}: in use");
        let gone = complete[..4].iter().filter(|complete| !**complete).count();
        assert!(
            (1..4).contains(&gone),
            "{kind}: no more than the mark asks for: {complete:?}"
        );
        assert!(disk.percent() > 60.0, "{kind}");
    }
}

/// The EROFS mount of a layer's file, which an overlay keeps when it is taken away.
#[test]
fn the_kernels_mounts_are_seen_however_they_are_hidden() {
    let dir = tempfile::tempdir().unwrap();
    let config = CacheConfig {
        high_percent: 100,
        min_free: ByteSize(0),
        ..CacheConfig::default()
    };
    let cache = Cache::open(dir.path(), &config, Arc::new(Metrics::new())).unwrap();
    let cached = layer(&cache, "a", 2);
    let digest = *cached.digest();
    let device = Device {
        tag: digest,
        size: cached.index().data_size(),
    };
    let image = erofs::write(&cached.names().unwrap(), &[device], Addressing::Chunks).unwrap();
    let [meta, lower, empty, merged] = ["meta", "lower", "empty", "merged"].map(|name| dir.path().join(name));
    fs::write(&meta, image.bytes).unwrap();
    for dir in [&lower, &empty, &merged] {
        fs::create_dir(dir).unwrap();
    }
    let (path, hold) = cached.hold().unwrap();
    let options = ErofsOptions {
        direct_io: false,
        read_ahead_kib: None,
    };
    let mount = match lazuli::sys::erofs::mount(&meta, std::slice::from_ref(&path), options) {
        Ok(mount) => mount,
        Err(error) => {
            skip::skipped(skip::Ability::ErofsFiles, error);
            return;
        }
    };
    mount.attach(&lower).unwrap();
    drop(hold);
    assert_eq!(cache.held_bytes(), cached.allocated_bytes(), "mounted");
    overlay(&[lower.clone(), empty], &merged).unwrap();
    let _merged = Unmounted(&merged);
    unmount(&lower, Unmount::Detach).unwrap();
    cache.tidy();
    assert_eq!(cache.held_bytes(), cached.allocated_bytes(), "in an overlay alone");
    let bytes = cached.present_bytes();
    // The layer goes, and its file stays until the overlay has gone.
    drop(cached);
    assert!(cache.forget(&digest));
    cache.tidy();
    assert_eq!((cache.replaced_bytes(), cache.used_bytes()), (bytes, bytes));
    unmount(&merged, Unmount::Detach).unwrap();
    until("the file stays", || {
        cache.tidy();
        cache.replaced_bytes() == 0
    });
    assert_eq!(cache.used_bytes(), 0);
}

/// Unmounts in any case.
struct Unmounted<'a>(&'a Path);

impl Drop for Unmounted<'_> {
    fn drop(&mut self) {
        let _ = unmount(self.0, Unmount::Detach);
    }
}
