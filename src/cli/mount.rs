//! `lazuli mount`: an image as a read-only directory tree, without containerd and without a daemon.
//!
//! The layers are shown by the same faces as the daemon's, in a private directory, merged where that is possible, and mounted with overlayfs.
//! What can fail fails first: the directories and FUSE before a byte is fetched.
//!
//! Everything is taken away in the opposite order, at the signal that ends the command or when something fails: the overlay, the faces with
//! the FUSE session, the cache, the threads, the private directory. The overlay's source in the list of mounts is that directory, so that
//! what a killed command leaves can be told from what is somebody else's (`scratch.rs`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use futures::future::try_join_all;

use crate::cache::Cache;
use crate::catalog::images::plan_layers;
use crate::catalog::loader::{Asked, Loaded, Loader};
use crate::catalog::toc::TocImage;
use crate::catalog::variants;
use crate::config::Config;
use crate::daemon::MOUNT_DEADLINE;
use crate::fetch::{Fetcher, LayerData};
use crate::fs::{Faces, FacesOptions, FsError, Session, SessionOptions};
use crate::layer::Digest;
use crate::metrics::Metrics;
use crate::registry::image::{ImageConfig, Manifest, resolve};
use crate::registry::layout::OciLayout;
use crate::registry::{Registry, Source};
use crate::sync::Budget;
use crate::sys::mount::{Unmount, overlay_from, unmount};
use crate::sys::mountinfo::mount_at;

use super::names::SourceName;
use super::scratch::Scratch;
use super::work::Worker;
use super::{MountArgs, files, output};

pub(super) fn run(args: MountArgs) -> anyhow::Result<()> {
    let config = args.config.load()?;
    crate::daemon::init_logs(&config.log);
    let worker = Worker::threads()?;
    // FUSE is mounted in this directory, which only root can enter, whatever the cache directory is. Also takes away what a killed command
    // has left at the mount point.
    let scratch = Scratch::new()?;
    if !args.mountpoint.is_dir() {
        bail!("{} is not a directory; make it first", args.mountpoint.display());
    }
    if let Some(cache) = &args.cache {
        std::fs::create_dir_all(cache).with_context(|| format!("{} cannot be made", cache.display()))?;
        files::check_output(cache)?;
    }
    let result = mount(&config, &args, &worker, scratch.path());
    // Before the directory goes: threads may still write into it.
    drop(worker);
    result
}

fn mount(config: &Config, args: &MountArgs, worker: &Worker, private: &Path) -> anyhow::Result<()> {
    let metrics = Arc::new(Metrics::new());
    let source = worker.block_on(async { open_source(config, &args.source, &metrics) })?;
    let options = SessionOptions {
        threads: config.fuse.threads,
        read_deadline: config.fetch.read_deadline,
        source_name: "lazuli".to_owned(),
    };
    let session = Session::mount(&private.join("fuse"), options, worker.handle(), Arc::clone(&metrics))?;
    let options = FacesOptions {
        choice: config.fuse.face,
        dir: private.join("faces"),
        deadline: MOUNT_DEADLINE,
    };
    let faces = Faces::open(session, options, Arc::clone(&metrics))?;
    let root = args.cache.clone().unwrap_or_else(|| private.join("cache"));
    let cache = Cache::open(&root, &config.cache, Arc::clone(&metrics))?;
    let fetched = worker.run(fetch(config, &args.source, source, &cache, &metrics));
    let shown = match &fetched {
        Ok(image) => show(image, &faces, worker, private, &args.mountpoint),
        Err(_) => Ok(()),
    };
    let closed = faces.close();
    // Layers first.
    let fetched = fetched.map(drop);
    cache.close();
    fetched.and(shown).and(closed.map_err(Into::into))
}

/// An image whose layers can be read.
struct Fetched {
    manifest: Digest,
    layers: Vec<Loaded>,
}

impl Drop for Fetched {
    fn drop(&mut self) {
        for loaded in &self.layers {
            loaded.layer.close();
        }
    }
}

async fn fetch(
    config: &Config,
    name: &SourceName,
    (source, reference): (Arc<dyn Source>, String),
    cache: &Arc<Cache>,
    metrics: &Arc<Metrics>,
) -> anyhow::Result<Fetched> {
    let image = resolve(source.as_ref(), &reference)
        .await
        .with_context(|| format!("resolving {name}"))?;
    let layers = plan_layers(
        &Manifest::parse(&image.manifest_bytes)?,
        &ImageConfig::parse(&image.config_bytes)?,
    )?;
    let fetcher = Fetcher::new(
        &config.fetch,
        Budget::new(config.memory.budget.0),
        Arc::clone(cache),
        tokio::runtime::Handle::current(),
        Arc::clone(metrics),
    );
    let loader = Loader::new(Arc::clone(cache), fetcher, config.formats.clone());
    let toc_image = reference
        .parse::<Digest>()
        .is_err()
        .then(|| TocImage::beside(Arc::clone(&source), &reference));
    let toc_images = toc_image.as_slice();
    let judged: Vec<_> = layers.iter().map(|layer| loader.alone(&layer.spec)).collect();
    let loads = layers.iter().zip(&judged).map(|(layer, judged)| {
        loader.load(
            &layer.spec,
            source.blob(layer.spec.digest, layer.spec.size),
            toc_images,
            Asked::default(),
            judged,
        )
    });
    Ok(Fetched {
        manifest: image.manifest_digest,
        layers: try_join_all(loads).await?,
    })
}

/// Shows the image at `mountpoint` until a signal comes.
fn show(image: &Fetched, faces: &Faces, worker: &Worker, private: &Path, mountpoint: &Path) -> anyhow::Result<()> {
    let layers: Vec<_> = image.layers.iter().map(|loaded| Arc::clone(&loaded.layer)).collect();
    let mut lower_dirs = lower_dirs(faces, variants::on_each_other(&layers)?)?;
    // overlayfs wants at least two directories.
    for name in ["empty", "empty-too"]
        .into_iter()
        .take(2_usize.saturating_sub(lower_dirs.len()))
    {
        let empty = private.join(name);
        std::fs::create_dir(&empty).context("a temporary directory")?;
        lower_dirs.push(empty);
    }
    worker.block_on(async {
        for loaded in &image.layers {
            loaded.layer.prefetch(0, loaded.prefetch);
        }
    });
    let at = || format!("mounting on {}", mountpoint.display());
    // As the kernel writes it in the list of mounts.
    let mountpoint = mountpoint.canonicalize().with_context(at)?;
    overlay_from(private.as_os_str(), &lower_dirs, &mountpoint).with_context(at)?;
    let told = output::print(&format!(
        "{} is mounted on {}; interrupt to unmount\n",
        image.manifest,
        mountpoint.display()
    ));
    if told.is_ok() {
        worker.wait_for_signal();
    }
    told.and(take_away(&mountpoint, private))
}

/// Unmounts the image, unless somebody has done that already; what else is mounted there by now is not ours.
fn take_away(mountpoint: &Path, private: &Path) -> anyhow::Result<()> {
    let at = || format!("unmounting {}", mountpoint.display());
    match mount_at(mountpoint).with_context(at)? {
        Some(mount) if Path::new(&mount.source) == private => unmount(mountpoint, Unmount::Detach).with_context(at),
        _ => Ok(()),
    }
}

/// Directories that show the layers, which come lowest first: one where they can be merged, else one for each, the uppermost first.
fn lower_dirs(faces: &Faces, layers: Vec<Arc<dyn LayerData>>) -> Result<Vec<PathBuf>, FsError> {
    let mut slots = Vec::with_capacity(layers.len());
    for (slot, layer) in (1..).zip(layers) {
        faces.attach(slot, layer)?;
        slots.push(slot);
    }
    if let [_, .., last] = slots[..] {
        let chain = last + 1;
        match faces.build_chain(chain, &slots, &[]) {
            Ok(()) => {
                if let Some(path) = faces.chain_path(chain, &slots) {
                    return Ok(vec![path]);
                }
            }
            Err(error) => tracing::warn!(%error, "layers cannot be merged, and are stacked"),
        }
    }
    slots.iter().rev().map(|slot| faces.layer_path(*slot)).collect()
}

/// The source that is named, and the tag or digest to ask it for.
pub(super) fn open_source(
    config: &Config,
    name: &SourceName,
    metrics: &Arc<Metrics>,
) -> anyhow::Result<(Arc<dyn Source>, String)> {
    match name {
        SourceName::Registry(reference) => {
            let registry = Registry::new(&config.registry, Arc::clone(metrics))?;
            let source = registry.repository(&reference.host, &reference.repository);
            Ok((source, reference.manifest_reference()))
        }
        SourceName::Layout { directory, tag } => Ok((OciLayout::open(directory)?, tag.clone())),
    }
}
