//! `lazuli index`: building, sharing and looking at indexes without a daemon.

use std::cell::OnceCell;
use std::collections::HashSet;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use bytes::Bytes;

use crate::cache::{Cache, portable_of};
use crate::catalog::images::{PlannedLayer, plan_layers};
use crate::catalog::loader::{Asked, Loader};
use crate::catalog::shared::publish::{Target, push};
use crate::catalog::shared::trust::SigningKey;
use crate::catalog::shared::{
    Candidate, MAX_INDEX, SharedIndexes, WORTH_FROM, candidates, form, layer_of_tag, name_of,
};
use crate::config::Config;
use crate::fetch::Fetcher;
use crate::layer::Digest;
use crate::metrics::Metrics;
use crate::registry::artifact::Artifact;
use crate::registry::image::{Image, ImageConfig, Manifest, resolve};
use crate::registry::{Reference, Registry, Source};
use crate::store::{IndexRecord, LayerSource};
use crate::sync::Budget;

use super::failure::Usage;
use super::files::{self, Part};
use super::names::SourceName;
use super::rows::{Report, Row, row_of, table};
use super::scratch::Scratch;
use super::work::Worker;
use super::{IndexArgs, IndexCommand};
use super::{output, soci};

/// What the names of files end with.
const SUFFIX: &str = ".lazuli-index";

pub(super) fn run(args: IndexArgs) -> anyhow::Result<()> {
    let config = args.config.load()?;
    let report = match &args.command {
        // Only reads a file: a signal may end that as it likes.
        IndexCommand::Inspect { file } => vec![inspect(file)?].into(),
        _ => {
            let worker = Worker::threads()?;
            let scratch = OnceCell::new();
            let report = worker.run(execute(config, &args, &scratch));
            // Before the directory goes: threads may still write into it.
            drop(worker);
            drop(scratch);
            report?
        }
    };
    let Report { rows, nothing, note } = report;
    match args.json {
        true => output::print(&format!("{}\n", serde_json::to_string_pretty(&rows)?))?,
        false => output::print(&table(&rows))?,
    }
    if let Some(note) = note {
        output::tell(&note);
    }
    match nothing {
        Some(why) => bail!("{why}"),
        None => Ok(()),
    }
}

async fn execute(mut config: Config, args: &IndexArgs, scratch: &OnceCell<Scratch>) -> anyhow::Result<Report> {
    if args.plain_http {
        config.registry.plain_http.extend(hosts_named(&args.command));
    }
    let tool = Tool::new(config, scratch)?;
    match &args.command {
        IndexCommand::Build { source, output } => Ok(tool.build(source, output).await?.into()),
        IndexCommand::Push {
            reference,
            repository,
            from,
            signing_key,
        } => {
            let key = signing_key.as_ref().or(tool.config.index.signing_key.as_ref());
            let key = key.map(|file| SigningKey::load(file)).transpose()?;
            tool.push(reference, repository.as_ref(), from.as_deref(), key).await
        }
        IndexCommand::Pull {
            reference,
            repository,
            output,
        } => tool.pull(reference, repository.as_ref(), output).await,
        IndexCommand::Ls {
            reference: Some(reference),
            repository,
        } => Ok(tool.list_image(reference, repository.as_ref()).await?.into()),
        IndexCommand::Ls {
            reference: None,
            repository,
        } => Ok(tool.list_repository(repository.as_ref()).await?.into()),
        IndexCommand::Rm { reference, repository } => tool.remove(reference, repository.as_ref()).await,
        IndexCommand::Export {
            source,
            soci: version,
            output,
            push,
            span_size,
            min_layer_size,
        } => {
            let export = soci::Export {
                version: *version,
                output: output.as_deref(),
                push: push.as_ref(),
                span_size: *span_size,
                min_layer_size: *min_layer_size,
            };
            let begun = export.begin()?;
            let subject = tool.subject(source).await?;
            Ok(begun.run(&tool.registry, &subject).await?.into())
        }
        IndexCommand::Inspect { file } => Ok(vec![inspect(file)?].into()),
    }
}

/// Hosts of references and repositories on the command line.
fn hosts_named(command: &IndexCommand) -> Vec<String> {
    let (reference, repository) = match command {
        IndexCommand::Build { source, .. } => (source.reference(), None),
        IndexCommand::Push {
            reference, repository, ..
        }
        | IndexCommand::Pull {
            reference, repository, ..
        }
        | IndexCommand::Rm { reference, repository } => (Some(reference), repository.as_ref()),
        IndexCommand::Ls { reference, repository } => (reference.as_ref(), repository.as_ref()),
        IndexCommand::Export { source, push, .. } => {
            let hosts = source.reference().into_iter().chain(push);
            return hosts.map(|reference| reference.host.clone()).collect();
        }
        IndexCommand::Inspect { .. } => (None, None),
    };
    let reference = reference.map(|reference| &reference.host);
    let repository = repository.map(|repository| &repository.host);
    reference.into_iter().chain(repository).cloned().collect()
}

/// What the commands work with.
struct Tool<'a> {
    config: Config,
    /// Made when a layer has to be unpacked. It outlives all that is done.
    scratch: &'a OnceCell<Scratch>,
    metrics: Arc<Metrics>,
    registry: Arc<Registry>,
    shared: Arc<SharedIndexes>,
}

/// An image whose layers are to be looked at.
pub(super) struct Subject {
    pub(super) source: Arc<dyn Source>,
    pub(super) place: Option<LayerSource>,
    pub(super) image: Image,
    pub(super) layers: Vec<PlannedLayer>,
}

impl<'a> Tool<'a> {
    fn new(config: Config, scratch: &'a OnceCell<Scratch>) -> anyhow::Result<Self> {
        let metrics = Arc::new(Metrics::new());
        let registry = Registry::new(&config.registry, Arc::clone(&metrics))?;
        let memory = Budget::new(config.memory.budget.0);
        let (copy, counts) = (Arc::clone(&registry), Arc::clone(&metrics));
        let shared = SharedIndexes::new(&config.index, copy, memory, counts)?;
        Ok(Tool {
            config,
            scratch,
            metrics,
            registry,
            shared,
        })
    }

    async fn subject(&self, name: &SourceName) -> anyhow::Result<Subject> {
        let (source, reference) = super::mount::open_source(&self.config, name, &self.metrics)?;
        let image = resolve(source.as_ref(), &reference)
            .await
            .with_context(|| format!("resolving {name}"))?;
        let manifest = Manifest::parse(&image.manifest_bytes)?;
        let layers = plan_layers(&manifest, &ImageConfig::parse(&image.config_bytes)?)?;
        let place = name.reference().map(|reference| LayerSource {
            host: reference.host.clone(),
            repository: reference.repository.clone(),
        });
        Ok(Subject {
            source,
            place,
            image,
            layers,
        })
    }

    /// The index repository that is meant, if one is.
    fn repository(&self, named: Option<&LayerSource>) -> Option<LayerSource> {
        named.or(self.shared.policy().repository()).cloned()
    }

    /// The image in a registry, which commands about its indexes work on.
    async fn image(&self, reference: &Reference) -> anyhow::Result<Subject> {
        self.subject(&SourceName::Registry(reference.clone())).await
    }

    /// Indexes a layer by streaming it into `loader`'s cache; `Err` in the inner result says why it has no index of use.
    async fn index(
        &self,
        loader: &Loader,
        subject: &Subject,
        layer: &PlannedLayer,
    ) -> anyhow::Result<Result<Bytes, String>> {
        let spec = &layer.spec;
        if spec.size < WORTH_FROM {
            return Ok(Err("it is small, and fetched at once".to_owned()));
        }
        let blob = subject.source.blob(spec.digest, spec.size);
        let loaded = match loader
            .load(spec, blob, &[], Asked::default(), &loader.alone(spec))
            .await
        {
            Ok(loaded) => loaded,
            // What the layer is like is a reason; that it cannot be had is a failure.
            Err(refusal) if !refusal.retry_helps && refusal.word != "source" => return Ok(Err(refusal.text)),
            Err(refusal) => return Err(refusal.into()),
        };
        if !matches!(loaded.index, Some(IndexRecord::Built { .. })) {
            return Ok(Err("it is lazy by itself".to_owned()));
        }
        let cached = Arc::clone(loaded.layer.cached());
        let packed = tokio::task::spawn_blocking(move || form::pack(&cached)).await??;
        Ok(packed
            .map(Bytes::from)
            .ok_or_else(|| "its compression allows no ranges".to_owned()))
    }

    /// A loader with a cache of its own in a temporary directory.
    fn loader(&self) -> anyhow::Result<Loader> {
        let dir = match self.scratch.get() {
            Some(dir) => dir,
            None => {
                let dir = Scratch::new()?;
                self.scratch.get_or_init(|| dir)
            }
        };
        let cache = Cache::open(dir.path(), &self.config.cache, Arc::clone(&self.metrics))?;
        let runtime = tokio::runtime::Handle::current();
        let fetcher = Fetcher::new(
            &self.config.fetch,
            Budget::new(self.config.memory.budget.0),
            Arc::clone(&cache),
            runtime,
            Arc::clone(&self.metrics),
        );
        Ok(Loader::new(cache, fetcher, self.config.formats.clone()))
    }

    async fn build(&self, source: &SourceName, output: &Path) -> anyhow::Result<Vec<Row>> {
        files::check_output(output)?;
        let subject = self.subject(source).await?;
        let loader = self.loader()?;
        let (mut rows, mut parts) = (Vec::new(), Vec::new());
        for layer in &subject.layers {
            let mut row = row_of(layer);
            match self.index(&loader, &subject, layer).await? {
                Ok(bytes) => {
                    let path = file_of(output, &layer.spec.digest);
                    parts.push(part_of(&path, &bytes)?);
                    row.index = Some(Digest::of(&bytes).to_string());
                    row.index_bytes = Some(bytes.len() as u64);
                    row.place = Some(path.display().to_string());
                    row.note = "written".to_owned();
                }
                Err(reason) => row.note = reason,
            }
            rows.push(row);
        }
        publish(parts, output)?;
        Ok(rows)
    }

    async fn push(
        &self,
        reference: &Reference,
        repository: Option<&LayerSource>,
        from: Option<&Path>,
        key: Option<SigningKey>,
    ) -> anyhow::Result<Report> {
        if let Some(dir) = from.filter(|dir| !dir.is_dir()) {
            bail!(
                "{} is not a directory; `lazuli index build` writes into one",
                dir.display()
            );
        }
        let subject = self.image(reference).await?;
        let target = match (self.repository(repository), subject.place.clone()) {
            (Some(place), _) => Target::Repository(place),
            (None, Some(place)) => Target::image(&self.registry, place, &subject.image.manifest_digest).await?,
            (None, None) => bail!("{reference} is in no registry; name an index repository with --repository"),
        };
        let built = match from {
            Some(_) => HashSet::new(),
            None => self.built_by_daemon().await,
        };
        let mut loader = None;
        let (mut rows, mut indexes) = (Vec::new(), Vec::new());
        for layer in &subject.layers {
            let mut row = row_of(layer);
            let found = match from {
                Some(dir) => read_file(&file_of(dir, &layer.spec.digest))?.ok_or_else(|| "there is no file".to_owned()),
                None => match self.of_daemon(&built, &layer.spec.digest)? {
                    Some(bytes) => Ok(bytes),
                    None => {
                        let loader = match &loader {
                            Some(loader) => loader,
                            None => loader.insert(self.loader()?),
                        };
                        self.index(loader, &subject, layer).await?
                    }
                },
            };
            match found {
                Ok(bytes) => {
                    // What is pushed will be used elsewhere: nothing goes out that would be refused there.
                    form::Portable::unpack(&layer.spec.digest, layer.spec.size, &bytes)
                        .with_context(|| format!("the index of layer {}", layer.spec.digest))?;
                    row.index = Some(Digest::of(&bytes).to_string());
                    row.index_bytes = Some(bytes.len() as u64);
                    row.place = Some(name_of(target.place()));
                    row.signed = Some(key.is_some());
                    row.note = "pushed".to_owned();
                    indexes.push((layer.spec.digest, bytes));
                }
                Err(reason) => row.note = reason,
            }
            rows.push(row);
        }
        if !indexes.is_empty() {
            push(&self.registry, &target, key.as_ref(), &indexes).await?;
            return Ok(rows.into());
        }
        let (mut nothing, mut note) = (None, None);
        match from {
            Some(dir) => {
                nothing = Some(format!(
                    "nothing was pushed: no file in {} is an index of a layer of {reference}; `lazuli index build` writes them",
                    dir.display()
                ));
            }
            // Each layer has a reason of its own: then all is done.
            None => note = Some(format!("nothing was pushed: no layer of {reference} can use an index")),
        }
        Ok(Report { rows, nothing, note })
    }

    /// Layers whose indexes this machine's daemon has built itself. One that it took from others is not ours to vouch for.
    async fn built_by_daemon(&self) -> HashSet<String> {
        let status = super::status::fetch(&self.config.address).await.unwrap_or_default();
        let own = status.layers.into_iter();
        let own = own.filter(|layer| layer.lazy && layer.index.source == "built");
        own.map(|layer| layer.digest).collect()
    }

    fn of_daemon(&self, built: &HashSet<String>, layer: &Digest) -> anyhow::Result<Option<Bytes>> {
        if !built.contains(&layer.to_string()) {
            return Ok(None);
        }
        Ok(portable_of(&self.config.root, layer)?.map(Bytes::from))
    }

    /// The indexes on offer for a layer: in the index repository, then beside the image.
    async fn offers(
        &self,
        subject: &Subject,
        layer: &Digest,
        repository: Option<&LayerSource>,
    ) -> anyhow::Result<Vec<Candidate>> {
        let mut found = Vec::new();
        if let Some(place) = repository {
            found.extend(self.shared.in_repository(place, layer).await?);
        }
        if let Some(place) = &subject.place {
            let manifest = subject.image.manifest_digest;
            found.extend(self.shared.beside_image(place, manifest, layer).await?);
        }
        Ok(found)
    }

    async fn pull(
        &self,
        reference: &Reference,
        repository: Option<&LayerSource>,
        output: &Path,
    ) -> anyhow::Result<Report> {
        files::check_output(output)?;
        let subject = self.image(reference).await?;
        let repository = self.repository(repository);
        let (mut rows, mut parts) = (Vec::new(), Vec::new());
        for layer in &subject.layers {
            let digest = &layer.spec.digest;
            let mut offers = self.offers(&subject, digest, repository.as_ref()).await?;
            offers.sort_by_key(|offer| self.trust_of(offer).is_none());
            let mut row = row_of(layer);
            row.note = "there is none".to_owned();
            if let Some(offer) = offers.first() {
                self.describe(&mut row, offer);
                let bytes = self.shared.read(offer).await?;
                form::Portable::unpack(digest, layer.spec.size, &bytes)
                    .with_context(|| format!("index {} of layer {digest}", offer.digest))?;
                let path = file_of(output, digest);
                parts.push(part_of(&path, &bytes)?);
                row.note = format!("{}; written to {}", row.note, path.display());
            }
            rows.push(row);
        }
        let nothing = parts
            .is_empty()
            .then(|| format!("nothing was written: there is no index of any layer of {reference}"));
        publish(parts, output)?;
        let note = None;
        Ok(Report { rows, nothing, note })
    }

    async fn list_image(&self, reference: &Reference, repository: Option<&LayerSource>) -> anyhow::Result<Vec<Row>> {
        let subject = self.image(reference).await?;
        let repository = self.repository(repository);
        let mut rows = Vec::new();
        for layer in &subject.layers {
            let offers = self.offers(&subject, &layer.spec.digest, repository.as_ref()).await?;
            if offers.is_empty() {
                let note = "there is none".to_owned();
                rows.push(Row { note, ..row_of(layer) });
            }
            for offer in offers {
                let mut row = row_of(layer);
                self.describe(&mut row, &offer);
                rows.push(row);
            }
        }
        Ok(rows)
    }

    async fn list_repository(&self, repository: Option<&LayerSource>) -> anyhow::Result<Vec<Row>> {
        let Some(place) = self.repository(repository) else {
            let what = "name an image, or an index repository with --repository or index.repository";
            return Err(Usage(what.to_owned()).into());
        };
        let source = self.registry.repository(&place.host, &place.repository);
        let mut rows = Vec::new();
        for tag in source.tags().await? {
            let Some(layer) = layer_of_tag(&tag) else { continue };
            let manifest = source.manifest(&tag).await?;
            let artifact = Artifact::parse(&manifest.bytes)?;
            for offer in candidates(&place, manifest.digest, &artifact, Some(&layer)) {
                let mut row = Row {
                    layer: layer.to_string(),
                    ..Row::default()
                };
                self.describe(&mut row, &offer);
                rows.push(row);
            }
        }
        Ok(rows)
    }

    async fn remove(&self, reference: &Reference, repository: Option<&LayerSource>) -> anyhow::Result<Report> {
        let subject = self.image(reference).await?;
        let repository = self.repository(repository);
        let mut rows = Vec::new();
        for layer in &subject.layers {
            let digest = &layer.spec.digest;
            let offers = match (&repository, &subject.place) {
                (Some(place), _) => self.shared.in_repository(place, digest).await?,
                (None, Some(place)) => {
                    let manifest = subject.image.manifest_digest;
                    self.shared.beside_image(place, manifest, digest).await?
                }
                (None, None) => Vec::new(),
            };
            for offer in offers {
                let Some(artifact) = offer.artifact else { continue };
                let pusher = self.registry.pusher(&offer.place.host, &offer.place.repository);
                // An artifact with several layers is gone with the first of them.
                let was_there = pusher.delete_manifest(artifact, offer.subject).await?;
                let mut row = row_of(layer);
                self.describe(&mut row, &offer);
                row.note = if was_there { "removed" } else { "removed already" }.to_owned();
                rows.push(row);
            }
        }
        let note = rows
            .is_empty()
            .then(|| format!("nothing had to be removed: there is no index of any layer of {reference}"));
        let nothing = None;
        Ok(Report { rows, nothing, note })
    }

    fn trust_of(&self, offer: &Candidate) -> Option<String> {
        let signature = offer.signature.as_deref();
        let policy = self.shared.policy();
        let trust = policy.judge(&offer.place, &offer.layer, &offer.digest, signature, false);
        trust.map(|trust| trust.to_string())
    }

    fn describe(&self, row: &mut Row, offer: &Candidate) {
        row.index = Some(offer.digest.to_string());
        row.index_bytes = Some(offer.size);
        row.place = Some(name_of(&offer.place));
        row.signed = Some(offer.signature.is_some());
        row.trust = self.trust_of(offer);
        row.note = match &row.trust {
            Some(trust) => format!("trusted: {trust}"),
            None => "not trusted by this configuration".to_owned(),
        };
    }
}

fn inspect(file: &Path) -> anyhow::Result<Row> {
    let bytes = read_file(file)?.with_context(|| format!("{}: there is no such file", file.display()))?;
    let (layer, note) = form::describe(&bytes).with_context(|| file.display().to_string())?;
    Ok(Row {
        layer: layer.to_string(),
        index: Some(Digest::of(&bytes).to_string()),
        index_bytes: Some(bytes.len() as u64),
        place: Some(file.display().to_string()),
        note,
        ..Row::default()
    })
}

fn file_of(dir: &Path, layer: &Digest) -> PathBuf {
    dir.join(format!("{}{SUFFIX}", layer.hex()))
}

/// A file that is written, and shown by [`publish`].
fn part_of(path: &Path, bytes: &[u8]) -> anyhow::Result<Part> {
    let mut part = Part::begin(path.to_owned())?;
    part.write(bytes)?;
    Ok(part)
}

/// Shows the files in `dir`, once all of them are whole.
fn publish(parts: Vec<Part>, dir: &Path) -> anyhow::Result<()> {
    parts.into_iter().try_for_each(Part::publish)?;
    files::sync_directory(dir)
}

/// A file as a whole, if it is there and not larger than an index can be.
fn read_file(path: &Path) -> anyhow::Result<Option<Bytes>> {
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| path.display().to_string()),
    };
    let mut bytes = Vec::new();
    file.take(MAX_INDEX + 1)
        .read_to_end(&mut bytes)
        .with_context(|| path.display().to_string())?;
    if bytes.len() as u64 > MAX_INDEX {
        bail!("{}: larger than any index", path.display());
    }
    Ok(Some(bytes.into()))
}
