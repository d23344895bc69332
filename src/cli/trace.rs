//! `lazuli trace`: what the daemon has learned of starts, as a table for people or as JSON for programs; and the end of it.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};

use crate::catalog::containerd::{MAX_MESSAGE, unix_channel};
use crate::catalog::traces::show::{Learned, TraceStatus};
use crate::config::ByteSize;
use crate::proto::control::control_client::ControlClient;
use crate::proto::control::{PushTracesRequest, RemoveTracesRequest, TracesRequest};
use crate::registry::Reference;

use super::status::{NoDaemon, short};
use super::work::Worker;
use super::{TraceArgs, TraceCommand, output};

/// Longest wait for the daemon's answer, which comes from its database.
const DEADLINE: Duration = Duration::from_secs(30);
/// Longest wait for what is published: a few megabytes.
const PUSH_DEADLINE: Duration = Duration::from_secs(300);

pub(super) fn run(args: &TraceArgs) -> anyhow::Result<()> {
    let config = args.config.load()?;
    let address = args.address.as_ref().unwrap_or(&config.address);
    let worker = Worker::client()?;
    match &args.command {
        TraceCommand::Show { reference, reads } => {
            let (repository, manifest) = names(reference.as_ref());
            let request = TracesRequest {
                repository,
                manifest,
                reads: *reads,
            };
            let json = worker.run(async { Ok(show(address, request).await?) })?;
            if args.json {
                return output::print(&format!("{json}\n"));
            }
            let learned =
                serde_json::from_str(&json).context("the daemon's answer cannot be read; is it another version?")?;
            output::print(&table(&learned))
        }
        TraceCommand::Push { reference } => {
            let (repository, manifest) = names(Some(reference));
            let request = PushTracesRequest { repository, manifest };
            let pushed = worker.run(push(address, request))?;
            output::print(&match args.json {
                true => format!("{}\n", serde_json::json!({ "pushed": pushed })),
                false => format!("{pushed} traces are published\n"),
            })
        }
        TraceCommand::Rm { reference } => {
            let (repository, manifest) = names(Some(reference));
            let request = RemoveTracesRequest { repository, manifest };
            let removed = worker.run(async { Ok(remove(address, request).await?) })?;
            output::print(&match args.json {
                true => format!("{}\n", serde_json::json!({ "removed": removed })),
                false => format!("{removed} traces are removed\n"),
            })
        }
    }
}

/// The repository and the manifest that are meant; empty: all.
fn names(reference: Option<&Reference>) -> (String, String) {
    let Some(reference) = reference else {
        return Default::default();
    };
    let manifest = reference.digest.map(|digest| digest.to_string());
    (
        format!("{}/{}", reference.host, reference.repository),
        manifest.unwrap_or_default(),
    )
}

async fn show(address: &Path, request: TracesRequest) -> Result<String, NoDaemon> {
    let mut client = ControlClient::new(unix_channel(address)).max_decoding_message_size(MAX_MESSAGE);
    let asked = tokio::time::timeout(DEADLINE, client.traces(request)).await;
    let answer = asked.unwrap_or_else(|_| Err(tonic::Status::deadline_exceeded("")));
    let answer = answer.map_err(|status| NoDaemon::new(address, &status))?;
    Ok(answer.into_inner().json)
}

async fn push(address: &Path, request: PushTracesRequest) -> anyhow::Result<u64> {
    let mut client = ControlClient::new(unix_channel(address));
    let asked = tokio::time::timeout(PUSH_DEADLINE, client.push_traces(request)).await;
    let answer = asked.unwrap_or_else(|_| Err(tonic::Status::deadline_exceeded("")));
    match answer {
        Ok(answer) => Ok(answer.into_inner().pushed),
        // The daemon has tried.
        Err(status) if status.code() == tonic::Code::FailedPrecondition => bail!("{}", status.message()),
        Err(status) => Err(NoDaemon::new(address, &status).into()),
    }
}

async fn remove(address: &Path, request: RemoveTracesRequest) -> Result<u64, NoDaemon> {
    let mut client = ControlClient::new(unix_channel(address));
    let asked = tokio::time::timeout(DEADLINE, client.remove_traces(request)).await;
    let answer = asked.unwrap_or_else(|_| Err(tonic::Status::deadline_exceeded("")));
    let answer = answer.map_err(|status| NoDaemon::new(address, &status))?;
    Ok(answer.into_inner().removed)
}

fn table(learned: &Learned) -> String {
    let mut out = String::new();
    // Writing into a String cannot fail.
    if learned.traces.is_empty() {
        let _ = writeln!(out, "nothing is known of starts");
    }
    let mut image = None;
    for trace in &learned.traces {
        let of = (&trace.repository, &trace.manifest);
        if image != Some(of) {
            let _ = writeln!(out, "{} {}", trace.repository, short(&trace.manifest));
            image = Some(of);
        }
        let _ = writeln!(out, "  {}", describe(trace));
        for read in &trace.reads {
            let missed = match read.missed {
                0 => String::new(),
                times => format!("  not read in the last {times} starts"),
            };
            let content = match read.content.as_str() {
                "" => String::new(),
                known => format!("  content {known}"),
            };
            let _ = writeln!(
                out,
                "    {:>6} ms  {} /{} from {}: {}{content}{missed}",
                read.milliseconds,
                short(&read.layer),
                read.path,
                read.offset,
                ByteSize(read.bytes)
            );
        }
    }
    if learned.left_out > 0 {
        let _ = writeln!(out, "and {} more; name a repository to see its own", learned.left_out);
    }
    out
}

fn describe(trace: &TraceStatus) -> String {
    format!(
        "{}: {} starts, {} files, {} ({})",
        trace.program,
        trace.starts,
        trace.files,
        ByteSize(trace.bytes),
        short(&trace.entry)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::traces::show::ReadStatus;

    #[test]
    fn a_table_has_a_line_for_each_entry_point() {
        let trace = |program: &str, reads| TraceStatus {
            repository: "r.example/app".to_owned(),
            manifest: "sha256:0123456789abcdef".to_owned(),
            program: program.to_owned(),
            entry: "sha256:fedcba9876543210".to_owned(),
            starts: 3,
            recorded: 7,
            files: 2,
            bytes: 4096,
            reads,
        };
        let read = ReadStatus {
            layer: "sha256:aaaaaaaaaaaaaaaa".to_owned(),
            path: "bin/app".to_owned(),
            offset: 512,
            bytes: 1024,
            milliseconds: 12,
            missed: 1,
            content: "ba7816bf8f01cfea".to_owned(),
        };
        let learned = Learned {
            traces: vec![trace("/bin/a", Vec::new()), trace("/bin/b", vec![read])],
            left_out: 1,
        };
        let lines: Vec<String> = table(&learned).lines().map(str::to_owned).collect();
        assert_eq!(lines[0], "r.example/app 0123456789ab");
        assert_eq!(lines[1], "  /bin/a: 3 starts, 2 files, 4.0 KiB (fedcba987654)");
        assert!(lines[2].starts_with("  /bin/b"));
        assert_eq!(
            lines[3],
            "        12 ms  aaaaaaaaaaaa /bin/app from 512: 1.0 KiB  content ba7816bf8f01cfea  not read in the last 1 starts"
        );
        assert_eq!(
            (lines[4].as_str(), lines.len()),
            ("and 1 more; name a repository to see its own", 5)
        );
        assert_eq!(table(&Learned::default()), "nothing is known of starts\n");
    }
}
