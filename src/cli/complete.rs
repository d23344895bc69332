//! `lazuli complete`: has the daemon write what is missing of images into containerd's content store, and tells how far it is.

use std::error::Error as _;
use std::io::{IsTerminal as _, stderr};
use std::time::{Duration, Instant};

use anyhow::bail;

use crate::catalog::containerd::unix_channel;
use crate::config::ByteSize;
use crate::proto::control::control_client::ControlClient;
use crate::proto::control::{CompleteRequest, CompleteResponse};

use super::failure::{Incomplete, Interrupted, Paused};
use super::status::NoDaemon;
use super::work::Worker;
use super::{CompleteArgs, output};

/// How often a word about progress is said.
const EVERY: Duration = Duration::from_secs(5);

pub(super) fn run(args: &CompleteArgs) -> anyhow::Result<()> {
    let config = args.config.load()?;
    let address = args.address.as_ref().unwrap_or(&config.address);
    let worker = Worker::client()?;
    let mut failed = Vec::new();
    for image in &args.images {
        let completed = worker.run(complete(address, args, image));
        match completed.map_err(|error| match error.downcast::<Interrupted>() {
            Ok(Interrupted(signal)) => Paused(signal).into(),
            Err(error) => error,
        })? {
            Ok(done) => output::print(&line(image, &done))?,
            Err(problem) => {
                output::tell(&format!("{image}: {problem}"));
                failed.push(image.clone());
            }
        }
    }
    match failed.is_empty() {
        true => Ok(()),
        false => bail!(Incomplete(failed)),
    }
}

/// What was done in the end, or why the image is not complete.
async fn complete(
    address: &std::path::Path,
    args: &CompleteArgs,
    image: &str,
) -> anyhow::Result<Result<CompleteResponse, String>> {
    let request = CompleteRequest {
        namespace: args.namespace.clone(),
        image: image.to_owned(),
    };
    let mut answers = match ControlClient::new(unix_channel(address)).complete(request).await {
        Ok(answers) => answers.into_inner(),
        Err(status) => return Err(NoDaemon::new(address, &status).into()),
    };
    let mut told = Instant::now();
    loop {
        match answers.message().await {
            Ok(Some(answer)) if answer.is_complete => return Ok(Ok(answer)),
            Ok(Some(step)) if step.waits => {
                if !args.quiet {
                    output::tell(&format!("{image}: waits until another image is complete"));
                }
            }
            Ok(Some(step)) => {
                if !args.quiet && stderr().is_terminal() && told.elapsed() >= EVERY {
                    told = Instant::now();
                    let (done, total) = (ByteSize(step.done), ByteSize(step.total));
                    output::tell(&format!("{image}: {done} of {total} of {}", step.layer));
                }
            }
            // What the daemon itself says has no cause on this side.
            Err(status) if status.source().is_none() => return Ok(Err(status.message().to_owned())),
            Ok(None) | Err(_) => {
                let problem = "the daemon ended; ask again, and it goes on where it was";
                return Ok(Err(problem.to_owned()));
            }
        }
    }
}

fn line(image: &str, done: &CompleteResponse) -> String {
    match done.written {
        0 => format!("{image} is complete: all its {} layers were there\n", done.layers),
        written => format!(
            "{image} is complete: {written} of {} layers written, {} read\n",
            done.layers,
            ByteSize(done.bytes)
        ),
    }
}
