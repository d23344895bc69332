//! `lazuli mount`: an image as a read-only directory tree, without containerd and without a daemon.
//!
//! The layers are shown by the same faces as the daemon's, in a private directory, merged where that is possible, and mounted with overlayfs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use futures::future::try_join_all;
use tokio::signal::unix::{SignalKind, signal};

use crate::cache::Cache;
use crate::catalog::images::plan_layers;
use crate::catalog::loader::Loader;
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
use crate::registry::{Reference, Registry, Source};
use crate::sync::Budget;
use crate::sys::mount::Unmount;

use super::MountArgs;

/// Prefix of a source that is an OCI layout on disk.
const LAYOUT_PREFIX: &str = "oci:";

pub(super) fn run(args: MountArgs) -> anyhow::Result<()> {
    let config = args.config.load()?;
    crate::daemon::init_logs(&config.log);
    if !args.mountpoint.is_dir() {
        bail!("{} is not a directory; make it first", args.mountpoint.display());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(mount(&config, &args))
}

async fn mount(config: &Config, args: &MountArgs) -> anyhow::Result<()> {
    let metrics = Arc::new(Metrics::new());
    let (source, reference) = open_source(config, &args.source, &metrics)?;
    let image = resolve(source.as_ref(), &reference)
        .await
        .with_context(|| format!("resolving {}", args.source))?;
    let layers = plan_layers(
        &Manifest::parse(&image.manifest_bytes)?,
        &ImageConfig::parse(&image.config_bytes)?,
    )?;

    // The FUSE mount lies in a directory that only root can enter, whatever the cache directory is.
    let private = tempfile::Builder::new()
        .prefix("lazuli-mount-")
        .tempdir()
        .context("a temporary directory")?;
    let root: PathBuf = args.cache.clone().unwrap_or_else(|| private.path().join("cache"));
    std::fs::create_dir_all(&root).with_context(|| format!("cache directory {}", root.display()))?;
    let cache = Cache::open(&root, &config.cache, Arc::clone(&metrics))?;
    let runtime = tokio::runtime::Handle::current();
    let memory = Budget::new(config.memory.budget.0);
    let fetcher = Fetcher::new(
        &config.fetch,
        memory,
        Arc::clone(&cache),
        runtime.clone(),
        Arc::clone(&metrics),
    );
    let loader = Loader::new(Arc::clone(&cache), fetcher, config.formats.clone());
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
            None,
            judged,
        )
    });
    let loaded = try_join_all(loads).await?;
    let layers: Vec<_> = loaded.iter().map(|loaded| Arc::clone(&loaded.layer)).collect();

    let options = SessionOptions {
        threads: config.fuse.threads,
        read_deadline: config.fetch.read_deadline,
        source_name: "lazuli".to_owned(),
    };
    let session = Session::mount(&private.path().join("fuse"), options, runtime, Arc::clone(&metrics))?;
    let options = FacesOptions {
        choice: config.fuse.face,
        dir: private.path().join("faces"),
        deadline: MOUNT_DEADLINE,
    };
    let on_each_other = variants::on_each_other(&layers)?;
    // These block, for mounts that this process itself serves.
    let opened = tokio::task::spawn_blocking(move || {
        let faces = Faces::open(session, options, metrics)?;
        let lower_dirs = lower_dirs(&faces, on_each_other)?;
        Ok::<_, FsError>((faces, lower_dirs))
    });
    let (faces, mut lower_dirs) = opened.await??;
    // overlayfs wants at least two directories.
    for name in ["empty", "empty-too"]
        .into_iter()
        .take(2_usize.saturating_sub(lower_dirs.len()))
    {
        let empty = private.path().join(name);
        std::fs::create_dir(&empty).context("a temporary directory")?;
        lower_dirs.push(empty);
    }
    for loaded in &loaded {
        loaded.layer.prefetch(0, loaded.prefetch);
    }
    let result = show(&lower_dirs, &args.mountpoint, &image.manifest_digest.to_string()).await;
    let unmounted = tokio::task::spawn_blocking(move || faces.close()).await?;
    for layer in layers {
        layer.close();
    }
    cache.close();
    result.and(unmounted.map_err(Into::into))
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

/// Mounts the stack, waits for a signal, and unmounts it.
async fn show(lower_dirs: &[PathBuf], mountpoint: &Path, what: &str) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    crate::sys::mount::overlay(lower_dirs, mountpoint)
        .with_context(|| format!("mounting on {}", mountpoint.display()))?;
    println!("{what} is mounted on {}; interrupt to unmount", mountpoint.display());
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    crate::sys::mount::unmount(mountpoint, Unmount::Detach)
        .with_context(|| format!("unmounting {}", mountpoint.display()))
}

/// The source that the text names, and the tag or digest to ask it for.
pub(super) fn open_source(
    config: &Config,
    text: &str,
    metrics: &Arc<Metrics>,
) -> anyhow::Result<(Arc<dyn Source>, String)> {
    let Some(layout) = text.strip_prefix(LAYOUT_PREFIX) else {
        let reference = Reference::parse(text)?;
        let registry = Registry::new(&config.registry, Arc::clone(metrics))?;
        let source = registry.repository(&reference.host, &reference.repository);
        return Ok((source, reference.manifest_reference()));
    };
    let (directory, tag) = match layout.rsplit_once(':') {
        Some((directory, tag)) if !tag.contains('/') => (directory, tag),
        _ => (layout, ""),
    };
    Ok((OciLayout::open(Path::new(directory))?, tag.to_owned()))
}
