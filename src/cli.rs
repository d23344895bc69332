//! The command line: what can be asked for, and what comes back: text on standard output, one readable message on standard error,
//! and an exit code that means something.
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | it failed; the message says what, why, and what can be done |
//! | 2 | the command line or the configuration is wrong |
//! | 3 | a service that is needed (the daemon, containerd, the registry) cannot be reached |
//! | 129, 130, 143 | SIGHUP, SIGINT or SIGTERM ended it before it was done; nothing is left of it |
//! | 141 | nobody reads its output any more (128 and the number of SIGPIPE, as of any program that does not look) |
//!
//! How commands end is the matter of `output` (what they print), `failure` (the message and the code), `work` (signals), `scratch` (temporary
//! directories) and `files` (what they write).

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use clap::{Args, Parser, Subcommand};

use crate::catalog::shared::trust::parse_repository;
use crate::config::{Config, ConfigError};
use crate::layer::soci::{SPAN_SIZE, SPAN_SIZE_MAX, SPAN_SIZE_MIN};
use crate::registry::Reference;
use crate::store::LayerSource;

mod complete;
mod failure;
mod files;
mod index;
mod mount;
mod names;
mod output;
mod progress;
mod pull;
mod rows;
mod scratch;
mod serve;
mod soci;
mod status;
mod summary;
mod trace;
mod upgrade;
mod work;

use names::SourceName;

/// Starts containers before their images are pulled: a lazy-pull remote snapshotter for containerd.
#[derive(Parser)]
#[command(
    name = "lazuli",
    version,
    after_help = "Exit codes: 0 done; 1 failed; 2 wrong command line or configuration; 3 a needed service cannot be reached; 128 and the number of the signal that ended it."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the daemon: serve containerd's snapshots API on a unix socket, and image layers through FUSE.
    ///
    /// Needs root, /dev/fuse and overlayfs. Tells systemd when it is ready. containerd finds it through a [proxy_plugins.lazuli] entry;
    /// `deploy/containerd/` has examples for every version.
    ///
    /// A crash leaves running containers their files: another process goes on at once. SIGTERM does so as well where systemd keeps file
    /// descriptors (`FileDescriptorStoreMax=`); everywhere else, and at SIGINT and SIGHUP, everything is unmounted.
    Serve(ServeArgs),
    /// Have a new program take over from the daemon that runs; running containers go on.
    ///
    /// If the new program does not start, the old one goes on.
    Upgrade(UpgradeArgs),
    /// Pull an image into containerd lazily: only manifests, configurations and layer indexes are downloaded.
    ///
    /// Works with every containerd from 1.6 on. (From 2.0.1 on, plain `CONTAINERD_SNAPSHOTTER=lazuli ctr images pull REF` does the
    /// same.) At the end it lists which layers are lazy, and why the others are not.
    Pull(PullArgs),
    /// Show an image as a read-only directory tree, without containerd, until interrupted.
    ///
    /// SOURCE is an image reference (registry.example/repo:tag) or an OCI layout on disk (oci:DIRECTORY[:TAG]).
    Mount(MountArgs),
    /// Ask the daemon what it serves: images, layers, their formats, and how much of them is on this machine.
    Status(StatusArgs),
    /// Write the layers of lazily pulled images into containerd's content store, exactly as their registry has them.
    ///
    /// Then an image can be exported, pushed, converted and scanned as any other, and needs its registry no more. The daemon does it, behind
    /// everything that somebody waits for; interrupted, it goes on where it was.
    Complete(CompleteArgs),
    /// Look at what the daemon has learned of starts, publish it, or have it forgotten.
    ///
    /// What a container reads while it starts is recorded, and fetched ahead when its image is pulled again, or the next one of its
    /// repository. Nobody has to do anything for it.
    Trace(TraceArgs),
    /// Build, share and look at indexes: who has a layer's index starts it without streaming it first.
    ///
    /// An index lies beside its image (as a referrer of the manifest), or in an index repository (--repository, or `index.repository` of
    /// the configuration). The daemon uses what it may trust, and publishes what it builds, as [index] of its configuration says.
    Index(IndexArgs),
    /// Check the configuration file, and print the configuration that results (without passwords).
    CheckConfig(ConfigArgs),
}

/// Where the configuration comes from.
#[derive(Args, Clone, Default)]
struct ConfigArgs {
    /// Configuration file [default: /etc/lazuli/config.toml, if it exists]
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ConfigArgs {
    fn load(&self) -> Result<Config, ConfigError> {
        Config::load(self.config.as_deref())
    }
}

#[derive(Args)]
struct ServeArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Directory of everything Lazuli keeps (overrides `root`)
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Unix socket to serve on (overrides `address`)
    #[arg(long, value_name = "SOCKET")]
    address: Option<PathBuf>,
    /// Unix socket of containerd (overrides `containerd_address`)
    #[arg(long, value_name = "SOCKET")]
    containerd_address: Option<PathBuf>,
    /// Log level or filter, such as debug or info,lazuli::fetch=debug (overrides `log.level`)
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// Unmount everything also at SIGTERM: running containers lose their files
    #[arg(long)]
    drain: bool,
    /// This is the worker of a supervisor
    #[arg(long, hide = true, value_name = "DESCRIPTOR", conflicts_with = "resume")]
    worker: Option<i32>,
    /// This is a supervisor that goes on after an upgrade
    #[arg(long, hide = true, value_name = "WHAT")]
    resume: Option<String>,
}

#[derive(Args)]
struct UpgradeArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Directory of everything Lazuli keeps (overrides `root`)
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// The new program [default: the one that runs this command]
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

#[derive(Args)]
struct PullArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Image to pull, such as registry.example/repo:tag
    #[arg(value_name = "REF", value_parser = Reference::parse)]
    reference: Reference,
    /// containerd namespace
    #[arg(long, short, env = "CONTAINERD_NAMESPACE", default_value = "default", value_parser = names::namespace)]
    namespace: String,
    /// Unix socket of containerd (overrides `containerd_address`)
    #[arg(long, value_name = "SOCKET")]
    containerd_address: Option<PathBuf>,
    /// Name under which containerd knows Lazuli
    #[arg(long, value_name = "NAME", default_value = "lazuli")]
    snapshotter: String,
    /// No progress bar
    #[arg(long, short)]
    quiet: bool,
}

#[derive(Args)]
struct MountArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// registry.example/repo:tag or oci:DIRECTORY[:TAG]
    source: SourceName,
    /// An existing directory
    mountpoint: PathBuf,
    /// Keep what is fetched in this directory for the next time [default: a temporary one, removed at the end]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
}

#[derive(Args)]
struct StatusArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Unix socket of the daemon (overrides `address`)
    #[arg(long, value_name = "SOCKET")]
    address: Option<PathBuf>,
    /// Print the whole document as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct CompleteArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Images, by the names that containerd has for them
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<String>,
    /// containerd namespace
    #[arg(long, short, env = "CONTAINERD_NAMESPACE", default_value = "default", value_parser = names::namespace)]
    namespace: String,
    /// Unix socket of the daemon (overrides `address`)
    #[arg(long, value_name = "SOCKET")]
    address: Option<PathBuf>,
    /// No word about progress
    #[arg(long, short)]
    quiet: bool,
}

#[derive(Args)]
struct TraceArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Unix socket of the daemon (overrides `address`)
    #[arg(long, value_name = "SOCKET")]
    address: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    command: TraceCommand,
}

#[derive(Subcommand)]
enum TraceCommand {
    /// List what is known: by repository, image and entry point.
    Show {
        /// Of this repository alone (registry.example/repo), or of one image of it (registry.example/repo@sha256:...)
        #[arg(value_name = "REPO", value_parser = Reference::parse)]
        reference: Option<Reference>,
        /// List the files and ranges as well, in the order in which they are read
        #[arg(long)]
        reads: bool,
    },
    /// Publish what the daemon knows, for other machines: where its indexes go, signed with its key.
    Push {
        /// registry.example/repo, or one image of it: registry.example/repo@sha256:...
        #[arg(value_name = "REPO", value_parser = Reference::parse)]
        reference: Reference,
    },
    /// Forget what is known of a repository, or of one image of it.
    Rm {
        /// registry.example/repo, or registry.example/repo@sha256:...
        #[arg(value_name = "REPO", value_parser = Reference::parse)]
        reference: Reference,
    },
}

#[derive(Args)]
struct IndexArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Speak plain HTTP with the registries named on the command line
    #[arg(long)]
    plain_http: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    command: IndexCommand,
}

#[derive(Subcommand)]
enum IndexCommand {
    /// Download an image's layers, index them, and write the indexes to files.
    ///
    /// Layers that are lazy by themselves, are too small, or cannot be read in ranges are left out. The layers are unpacked below
    /// $TMPDIR meanwhile.
    Build {
        /// registry.example/repo:tag or oci:DIRECTORY[:TAG]
        source: SourceName,
        /// An existing directory for the files
        #[arg(long, short, value_name = "DIR")]
        output: PathBuf,
    },
    /// Put indexes of an image's layers into a registry: those of this machine's daemon, or of files, or else built anew.
    Push {
        /// registry.example/repo:tag
        #[arg(value_name = "REF", value_parser = Reference::parse)]
        reference: Reference,
        /// Index repository to put them into [default: `index.repository`, else beside the image]
        #[arg(long, value_name = "REPO", value_parser = parse_repository)]
        repository: Option<LayerSource>,
        /// Directory of files that `lazuli index build` has written
        #[arg(long, value_name = "DIR")]
        from: Option<PathBuf>,
        /// File of the ed25519 key to sign them with (overrides `index.signing_key`)
        #[arg(long, value_name = "FILE")]
        signing_key: Option<PathBuf>,
    },
    /// Download the indexes of an image's layers into files.
    Pull {
        /// registry.example/repo:tag
        #[arg(value_name = "REF", value_parser = Reference::parse)]
        reference: Reference,
        /// Index repository to look in beside the image's own [default: `index.repository`]
        #[arg(long, value_name = "REPO", value_parser = parse_repository)]
        repository: Option<LayerSource>,
        /// An existing directory for the files
        #[arg(long, short, value_name = "DIR")]
        output: PathBuf,
    },
    /// List the indexes of an image's layers, and whether this configuration trusts them; or all in an index repository.
    Ls {
        /// registry.example/repo:tag; without it, everything in the index repository is listed
        #[arg(value_name = "REF", value_parser = Reference::parse)]
        reference: Option<Reference>,
        /// Index repository to look in beside the image's own [default: `index.repository`]
        #[arg(long, value_name = "REPO", value_parser = parse_repository)]
        repository: Option<LayerSource>,
    },
    /// Remove the indexes of an image's layers from a registry.
    Rm {
        /// registry.example/repo:tag
        #[arg(value_name = "REF", value_parser = Reference::parse)]
        reference: Reference,
        /// Index repository to remove them from [default: `index.repository`, else those beside the image]
        #[arg(long, value_name = "REPO", value_parser = parse_repository)]
        repository: Option<LayerSource>,
    },
    /// Write an image's index in another project's format: SOCI, for nodes that run its snapshotter.
    ///
    /// The layers are downloaded. Indexes of version 1 say which image they are about, those of version 2 are named by a new manifest of
    /// the image, with another digest.
    #[command(group(clap::ArgGroup::new("place").args(["output", "push"]).required(true).multiple(true)))]
    Export {
        /// registry.example/repo:tag or oci:DIRECTORY[:TAG]
        source: SourceName,
        /// Which version of SOCI's index
        #[arg(long, value_enum, value_name = "VERSION")]
        soci: soci::Version,
        /// A new or empty directory for an OCI layout: the index, and for v2 the image with it
        #[arg(long, short, value_name = "DIR")]
        output: Option<PathBuf>,
        /// Push it: for v1 to the repository of registry.example/repo, for v2 as registry.example/repo:tag
        #[arg(long, value_name = "REF", value_parser = Reference::parse)]
        push: Option<Reference>,
        /// Uncompressed bytes of a span at least
        #[arg(
            long,
            value_name = "BYTES",
            default_value_t = SPAN_SIZE,
            value_parser = clap::value_parser!(u64).range(SPAN_SIZE_MIN..=SPAN_SIZE_MAX)
        )]
        span_size: u64,
        /// Layers whose blobs are smaller are left out
        #[arg(long, value_name = "BYTES", default_value_t = soci::MIN_LAYER_SIZE)]
        min_layer_size: u64,
    },
    /// Show what is in a file that `lazuli index build` or `pull` has written.
    Inspect {
        /// The file
        file: PathBuf,
    },
}

/// Runs the command line.
pub fn main() -> ExitCode {
    // Before the first secret is read. Without a log yet, and no reason not to serve.
    let _ = crate::sys::limits::forbid_core_dumps();
    match Cli::try_parse() {
        Ok(cli) => output::end(run(cli.command)),
        Err(answer) => output::end_of_parsing(&answer),
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve(args) => serve::run(args),
        Command::Upgrade(args) => upgrade::run(&args),
        Command::Pull(args) => pull::run(args),
        Command::Mount(args) => mount::run(args),
        Command::Status(args) => status::run(&args),
        Command::Complete(args) => complete::run(&args),
        Command::Trace(args) => trace::run(&args),
        Command::Index(args) => index::run(args),
        Command::CheckConfig(args) => {
            let config = args.load()?;
            output::print(&toml::to_string(&config)?)
        }
    }
}

/// A text that nothing else on this machine is named by.
fn unique() -> String {
    /// Tells those of one process apart.
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    format!(
        "{nanos}-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
