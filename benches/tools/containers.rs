//! Makes and removes the file systems of containers, the way containerd does it when it makes one, and times that.
//!
//! *Create* is Prepare, asked of containerd, and the mount of what it answers. *Remove* undoes that, and then has containerd collect its
//! garbage, since containerd tells a snapshotter of a removal only then. Each command prints one JSON line.
//!
//! Many at once are in storm.rs.
//!
//! A tool of its own because a `ctr` takes longer to start than what is timed.

mod storm;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::{Args, Parser, Subcommand};
use lazuli::catalog::containerd::{Containerd, NAMESPACE_HEADER};
use lazuli::proto::leases::v1::leases_client::LeasesClient;
use lazuli::proto::snapshots::v1::snapshots_client::SnapshotsClient;
use lazuli::proto::types::Mount;
use lazuli::proto::{leases, snapshots};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tonic::{Code, Request};

/// Namespace in which `ctr` and `lazuli pull` work unless told otherwise.
const NAMESPACE: &str = "default";
/// Label of what containerd's garbage collection leaves alone.
const ROOT_LABEL: &str = "containerd.io/gc.root";
/// Longest wait for an answer of containerd.
const DEADLINE: Duration = Duration::from_secs(60);
/// How long containerd may take to reach a snapshotter that was restarted: its connection backs off.
const RECONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// How often that is tried.
const RECONNECT_INTERVAL: Duration = Duration::from_millis(20);
/// Length of an overlay's options in bytes from which on containerd names the lower directories relative to the one they have in common:
/// mount(2) takes a page.
const LONG_OPTIONS: usize = 4096 - 512;

/// Makes and removes the file systems of containers.
#[derive(Parser)]
struct Options {
    /// containerd's socket.
    #[arg(long)]
    address: PathBuf,
    /// The snapshotter that is asked for.
    #[arg(long)]
    snapshotter: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Prepares a snapshot and mounts it. Prints the seconds of both, and the lower directories.
    Create(Create),
    /// Unmounts a snapshot and removes it, and waits until it is gone.
    Remove(Remove),
    /// Makes and removes containers at a steady rate. Prints the seconds of each call.
    Storm(storm::Storm),
    /// Makes many snapshots, asks about them, or removes them. Prints the seconds of each call.
    Crowd(storm::Crowd),
}

#[derive(Args)]
struct Create {
    /// Chain id of the image.
    #[arg(long)]
    parent: String,
    /// Name of the snapshot.
    #[arg(long)]
    key: String,
    /// Where it is mounted.
    #[arg(long)]
    target: PathBuf,
}

#[derive(Args)]
struct Remove {
    /// Name of the snapshot.
    #[arg(long)]
    key: String,
    /// Where it is mounted.
    #[arg(long)]
    target: PathBuf,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 1)]
async fn main() -> anyhow::Result<()> {
    let Options {
        address,
        snapshotter,
        command,
    } = Options::parse();
    let containerd = Containerd::new(&address);
    match command {
        Command::Create(create) => make(&containerd, &snapshotter, &create).await,
        Command::Remove(remove) => take_away(&containerd, &snapshotter, &remove).await,
        Command::Storm(storm) => storm::storm(&containerd, &snapshotter, &storm).await,
        Command::Crowd(crowd) => storm::crowd(&containerd, &snapshotter, &crowd).await,
    }
}

fn request<T>(message: T) -> anyhow::Result<Request<T>> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(NAMESPACE_HEADER, NAMESPACE.parse()?);
    request.set_timeout(DEADLINE);
    Ok(request)
}

async fn make(containerd: &Containerd, snapshotter: &str, create: &Create) -> anyhow::Result<()> {
    std::fs::create_dir_all(&create.target)?;
    let mut client = SnapshotsClient::new(containerd.channel());
    // The connections, containerd's own to the snapshotter among them, are not what is timed.
    let stat = snapshots::v1::StatSnapshotRequest {
        snapshotter: snapshotter.to_owned(),
        key: create.parent.clone(),
    };
    let end = Instant::now() + RECONNECT_DEADLINE;
    while let Err(status) = client.stat(request(stat.clone())?).await {
        if status.code() != Code::Unavailable || Instant::now() > end {
            return Err(status).context("the image's snapshot");
        }
        tokio::time::sleep(RECONNECT_INTERVAL).await;
    }

    let prepare = request(snapshots::v1::PrepareSnapshotRequest {
        snapshotter: snapshotter.to_owned(),
        key: create.key.clone(),
        parent: create.parent.clone(),
        labels: [(ROOT_LABEL.to_owned(), "benchmark".to_owned())].into(),
    })?;
    let begin = Instant::now();
    let mounts = client.prepare(prepare).await.context("Prepare")?.into_inner().mounts;
    let prepared = begin.elapsed();
    let [overlay] = &mounts[..] else {
        bail!("{} mounts instead of one: {mounts:?}", mounts.len());
    };
    let begin = Instant::now();
    mount_overlay(overlay, &create.target)?;
    let mounted = begin.elapsed();
    let line = serde_json::json!({
        "prepare": prepared.as_secs_f64(),
        "mount": mounted.as_secs_f64(),
        "lowers": lowers(overlay).unwrap_or_default(),
    });
    println!("{line}");
    Ok(())
}

/// The lower directories, the uppermost first.
fn lowers(overlay: &Mount) -> Option<Vec<&str>> {
    let list = overlay
        .options
        .iter()
        .find_map(|option| option.strip_prefix("lowerdir="))?;
    Some(list.split(':').collect())
}

/// Mounts an overlay as containerd does. Changes the working directory if there are many lower directories.
fn mount_overlay(overlay: &Mount, target: &Path) -> anyhow::Result<()> {
    if overlay.r#type != "overlay" {
        bail!("a mount of type {} instead of an overlay", overlay.r#type);
    }
    let mut options = overlay.options.join(",");
    if options.len() >= LONG_OPTIONS
        && let Some(lowers) = lowers(overlay)
        && let (Some(first), Some(last)) = (lowers.iter().min(), lowers.iter().max())
    {
        let common = first.bytes().zip(last.bytes()).take_while(|(a, b)| a == b).count();
        let common = first[..common].rfind('/').map_or(0, |slash| slash + 1);
        std::env::set_current_dir(&first[..common])?;
        let relative: Vec<&str> = lowers.iter().map(|lower| &lower[common..]).collect();
        let others = overlay
            .options
            .iter()
            .filter(|option| !option.starts_with("lowerdir="))
            .cloned();
        let all: Vec<String> = others.chain([format!("lowerdir={}", relative.join(":"))]).collect();
        options = all.join(",");
    }
    let options = std::ffi::CString::new(options)?;
    mount("overlay", target, "overlay", MountFlags::empty(), options.as_c_str())
        .with_context(|| format!("mounting {options:?} on {}", target.display()))
}

async fn take_away(containerd: &Containerd, snapshotter: &str, remove: &Remove) -> anyhow::Result<()> {
    unmount(&remove.target, UnmountFlags::empty())
        .with_context(|| format!("unmounting {}", remove.target.display()))?;
    let begin = Instant::now();
    let message = snapshots::v1::RemoveSnapshotRequest {
        snapshotter: snapshotter.to_owned(),
        key: remove.key.clone(),
    };
    let mut client = SnapshotsClient::new(containerd.channel());
    client.remove(request(message)?).await.context("Remove")?;
    // Deleted synchronously, a lease makes containerd collect what nobody needs, and wait for that.
    let mut client = LeasesClient::new(containerd.channel());
    let create = leases::v1::CreateRequest {
        id: format!("{}-removed", remove.key),
        ..Default::default()
    };
    client.create(request(create)?).await.context("making a lease")?;
    let delete = leases::v1::DeleteRequest {
        id: format!("{}-removed", remove.key),
        sync: true,
    };
    client.delete(request(delete)?).await.context("collecting garbage")?;
    println!("{}", serde_json::json!({ "remove": begin.elapsed().as_secs_f64() }));
    Ok(())
}
