//! Many containers: a steady coming and going of them, and thousands that are there at once.
//!
//! *Storm* begins a container every so often, however long the last one takes: Prepare, Mounts (which the runtime asks again when it starts a task),
//! the mount, and after its life the unmount and Remove. containerd collects garbage meanwhile, as it does by itself after removals, and with
//! that has the snapshotter delete what was removed. *Crowd* makes snapshots without mounting them, and times what is asked about them.
//! Both print one JSON line with the seconds of each call.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use lazuli::catalog::containerd::Containerd;
use lazuli::proto::snapshots;
use lazuli::proto::snapshots::v1::snapshots_client::SnapshotsClient;
use rustix::mount::{UnmountFlags, unmount};
use tonic::transport::Channel;

use super::{LONG_OPTIONS, ROOT_LABEL, mount_overlay, request};

/// Snapshots of a crowd that are made and removed at once.
const SIDE_BY_SIDE: usize = 8;
/// Snapshots of a crowd that are asked about one by one.
const STATS: usize = 1000;
/// Times that all of a crowd are listed.
const LISTS: usize = 5;

#[derive(Args)]
pub struct Storm {
    /// Chain ids of the images, used in turn.
    #[arg(long, required = true, value_delimiter = ',')]
    parents: Vec<String>,
    /// Containers.
    #[arg(long, default_value_t = 200)]
    count: u32,
    /// Containers that begin in a second.
    #[arg(long, default_value_t = 10)]
    rate: u32,
    /// Seconds that each is there.
    #[arg(long, default_value_t = 2)]
    life: u64,
    /// Directory in which they are mounted.
    #[arg(long)]
    target: PathBuf,
}

#[derive(Args)]
pub struct Crowd {
    /// Chain id of the image.
    #[arg(long)]
    parent: String,
    /// Snapshots.
    #[arg(long, default_value_t = 10_000)]
    count: u32,
    /// What is done with them.
    #[arg(long, value_enum)]
    what: What,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum What {
    /// They are made.
    Make,
    /// They are listed, all and by a filter, and asked about.
    Ask,
    /// They are removed.
    Remove,
}

/// Seconds of the calls of all containers, by the name of the call.
#[derive(Default)]
struct Times(Mutex<std::collections::BTreeMap<&'static str, Vec<f64>>>);

impl Times {
    fn add(&self, call: &'static str, since: Instant) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(call).or_default().push(since.elapsed().as_secs_f64());
    }

    fn print(&self) -> anyhow::Result<()> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        println!("{}", serde_json::to_string(&*all)?);
        Ok(())
    }
}

pub async fn storm(containerd: &Containerd, snapshotter: &str, options: &Storm) -> anyhow::Result<()> {
    let times = Arc::new(Times::default());
    let interval = Duration::from_secs(1) / options.rate.max(1);
    let begin = tokio::time::Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..options.count {
        tokio::time::sleep_until(begin + interval * number).await;
        let parent = options.parents[number as usize % options.parents.len()].clone();
        let (client, snapshotter) = (SnapshotsClient::new(containerd.channel()), snapshotter.to_owned());
        let (key, life) = (format!("storm-{number}"), Duration::from_secs(options.life));
        let target = options.target.join(&key);
        let times = Arc::clone(&times);
        tasks.spawn(async move {
            let one = One {
                client,
                snapshotter,
                key,
                times,
            };
            one.live(parent, target, life).await
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    times.print()
}

/// One container.
struct One {
    client: SnapshotsClient<Channel>,
    snapshotter: String,
    key: String,
    times: Arc<Times>,
}

impl One {
    async fn live(mut self, parent: String, target: PathBuf, life: Duration) -> anyhow::Result<()> {
        std::fs::create_dir_all(&target)?;
        let whole = Instant::now();
        self.prepare(parent).await?;
        let begin = Instant::now();
        let mounts = request(snapshots::v1::MountsRequest {
            snapshotter: self.snapshotter.clone(),
            key: self.key.clone(),
        })?;
        let mounts = self.client.mounts(mounts).await.context("Mounts")?.into_inner().mounts;
        self.times.add("mounts", begin);
        let [overlay] = &mounts[..] else {
            bail!("{} mounts instead of one: {mounts:?}", mounts.len());
        };
        if overlay.options.iter().map(String::len).sum::<usize>() >= LONG_OPTIONS {
            // The working directory belongs to all.
            bail!("too many lower directories for containers side by side");
        }
        let (overlay, place) = (overlay.clone(), target.clone());
        let begin = Instant::now();
        tokio::task::spawn_blocking(move || mount_overlay(&overlay, &place)).await??;
        self.times.add("mount", begin);
        self.times.add("create", whole);
        tokio::time::sleep(life).await;
        tokio::task::spawn_blocking(move || leave(&target)).await??;
        self.remove().await
    }

    async fn prepare(&mut self, parent: String) -> anyhow::Result<()> {
        let message = request(snapshots::v1::PrepareSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: self.key.clone(),
            parent,
            labels: [(ROOT_LABEL.to_owned(), "benchmark".to_owned())].into(),
        })?;
        let begin = Instant::now();
        self.client.prepare(message).await.context("Prepare")?;
        self.times.add("prepare", begin);
        Ok(())
    }

    async fn remove(&mut self) -> anyhow::Result<()> {
        let message = request(snapshots::v1::RemoveSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: self.key.clone(),
        })?;
        let begin = Instant::now();
        self.client.remove(message).await.context("Remove")?;
        self.times.add("remove", begin);
        Ok(())
    }
}

fn leave(target: &Path) -> anyhow::Result<()> {
    unmount(target, UnmountFlags::empty()).with_context(|| format!("unmounting {}", target.display()))?;
    Ok(std::fs::remove_dir(target)?)
}

pub async fn crowd(containerd: &Containerd, snapshotter: &str, options: &Crowd) -> anyhow::Result<()> {
    let times = Arc::new(Times::default());
    let one = |number: u32| One {
        client: SnapshotsClient::new(containerd.channel()),
        snapshotter: snapshotter.to_owned(),
        key: format!("crowd-{number}"),
        times: Arc::clone(&times),
    };
    let whole = Instant::now();
    let all = stream::iter(0..options.count);
    match options.what {
        What::Make => {
            let make = |number| {
                let (mut one, parent) = (one(number), options.parent.clone());
                async move { one.prepare(parent).await }
            };
            all.map(make).buffer_unordered(SIDE_BY_SIDE).try_collect::<()>().await?;
        }
        What::Ask => {
            let mut client = SnapshotsClient::new(containerd.channel());
            for (call, filter) in [
                ("list", None),
                ("list_filtered", Some(format!("parent=={}", options.parent))),
            ] {
                for _ in 0..LISTS {
                    let begin = Instant::now();
                    let listed = list(&mut client, snapshotter, filter.clone()).await?;
                    times.add(call, begin);
                    if listed < options.count as usize {
                        bail!("{listed} snapshots are listed, not {}", options.count);
                    }
                }
            }
            let step = (options.count as usize / STATS).max(1);
            for number in (0..options.count).step_by(step) {
                let message = request(snapshots::v1::StatSnapshotRequest {
                    snapshotter: snapshotter.to_owned(),
                    key: format!("crowd-{number}"),
                })?;
                let begin = Instant::now();
                client.stat(message).await.context("Stat")?;
                times.add("stat", begin);
            }
        }
        What::Remove => {
            let remove = |number| {
                let mut one = one(number);
                async move { one.remove().await }
            };
            all.map(remove)
                .buffer_unordered(SIDE_BY_SIDE)
                .try_collect::<()>()
                .await?;
        }
    }
    times.add("whole", whole);
    times.print()
}

/// How many snapshots are listed.
async fn list(
    client: &mut SnapshotsClient<Channel>,
    snapshotter: &str,
    filter: Option<String>,
) -> anyhow::Result<usize> {
    let message = request(snapshots::v1::ListSnapshotsRequest {
        snapshotter: snapshotter.to_owned(),
        filters: filter.into_iter().collect(),
    })?;
    let answers = client.list(message).await.context("List")?.into_inner();
    let counts = answers.map_ok(|answer| answer.info.len());
    Ok(counts.try_fold(0, |sum, count| async move { Ok(sum + count) }).await?)
}
