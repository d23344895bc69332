//! What `lazuli trace` shows of what was learned.

use serde::{Deserialize, Serialize};

use crate::catalog::Catalog;
use crate::layer::Digest;
use crate::layer::trace::Trace;
use crate::store::StoreError;

/// Most traces in one answer, and most reads: what fits into a message.
const SHOWN_MAX: usize = 4096;
const READS_MAX: usize = 40_000;

/// What was learned of starts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Learned {
    /// By repository, image and program.
    pub traces: Vec<TraceStatus>,
    /// How many there are besides.
    pub left_out: u64,
}

/// What was learned of one entry point of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceStatus {
    /// The repository, with its host; empty if the image came from none.
    pub repository: String,
    /// Digest of the image's manifest.
    pub manifest: String,
    /// The program that is started.
    pub program: String,
    /// Digest of the whole command.
    pub entry: String,
    /// Starts that it was learned from.
    pub starts: u32,
    /// When the last one was, in seconds since the epoch.
    pub recorded: u64,
    /// Files that are read.
    pub files: u64,
    /// Bytes of them that are read.
    pub bytes: u64,
    /// What is read, in that order; empty unless it was asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reads: Vec<ReadStatus>,
}

/// A range of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadStatus {
    /// Digest of the layer's blob.
    pub layer: String,
    /// Path below its root.
    pub path: String,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
    /// Milliseconds from the container's making to the first read.
    pub milliseconds: u32,
    /// Starts in a row that did not read it.
    pub missed: u8,
}

impl TraceStatus {
    fn of(trace: &Trace, with_reads: usize) -> Self {
        let read = |wish: &crate::layer::trace::Wish| {
            let file = trace.files.get(wish.file as usize)?;
            Some(ReadStatus {
                layer: trace.layers.get(file.layer as usize)?.to_string(),
                path: file.path.clone(),
                offset: wish.offset,
                bytes: wish.len,
                milliseconds: wish.at,
                missed: wish.missed,
            })
        };
        TraceStatus {
            repository: trace.repository.clone(),
            manifest: trace.manifest.to_string(),
            program: trace.entry.program.clone(),
            entry: trace.entry.id.to_string(),
            starts: trace.starts,
            recorded: trace.recorded,
            files: trace.files.len() as u64,
            bytes: trace.bytes(),
            reads: trace.wishes.iter().take(with_reads).filter_map(read).collect(),
        }
    }
}

impl Catalog {
    /// What was learned of all images, of those of a repository, or of one of these. Blocks for the database.
    ///
    /// # Errors
    /// An error of the database.
    pub fn learned(&self, repository: &str, manifest: Option<&Digest>, reads: bool) -> Result<Learned, StoreError> {
        let mut traces = match repository {
            "" => self.store.traces()?,
            repository => self.store.traces_of(repository)?,
        };
        traces.retain(|trace| manifest.is_none_or(|manifest| trace.manifest == *manifest));
        let name = |trace: &Trace| (trace.repository.clone(), trace.manifest, trace.entry.program.clone());
        traces.sort_by_cached_key(name);
        let left_out = traces.len().saturating_sub(SHOWN_MAX) as u64;
        let mut left = if reads { READS_MAX } else { 0 };
        let shown = traces.iter().take(SHOWN_MAX).map(|trace| {
            let shown = TraceStatus::of(trace, left);
            left -= shown.reads.len();
            shown
        });
        let traces = shown.collect();
        Ok(Learned { traces, left_out })
    }

    /// Forgets what was learned of a repository, or of one image of it; how many traces that were. Blocks for the database.
    ///
    /// # Errors
    /// An error of the database.
    pub fn forget_learned(&self, repository: &str, manifest: Option<&Digest>) -> Result<usize, StoreError> {
        self.store.remove_traces(repository, manifest)
    }
}
