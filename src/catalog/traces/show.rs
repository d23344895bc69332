//! What `lazuli trace` shows of what was learned.

use serde::{Deserialize, Serialize};

use crate::catalog::Catalog;
use crate::catalog::containerd::MAX_MESSAGE;
use crate::layer::Digest;
use crate::layer::trace::Trace;
use crate::store::StoreError;

/// Most traces in one answer, and most bytes of their reads: what fits into a message.
const SHOWN_MAX: usize = 4096;
const READS_BYTES: usize = MAX_MESSAGE / 2;
/// Bytes of a read but for its path; and of each byte of a path at most, as JSON writes it.
const READ_BYTES: usize = 256;
const PATH_FACTOR: usize = 6;

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
    /// The beginning of a digest of the file's content, of the content itself if the layer has it as one chunk; empty if it is not known.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub content: String,
}

impl TraceStatus {
    /// With as many of its reads as fit into `room` bytes, which they take.
    fn of(trace: &Trace, room: &mut usize) -> Self {
        let read = |wish: &crate::layer::trace::Wish| {
            let file = trace.files.get(wish.file as usize)?;
            Some(ReadStatus {
                layer: trace.layers.get(file.layer as usize)?.to_string(),
                path: file.path.clone(),
                offset: wish.offset,
                bytes: wish.len,
                milliseconds: wish.at,
                missed: wish.missed,
                content: file.content.map(|content| content.to_string()).unwrap_or_default(),
            })
        };
        let mut fits = |read: &ReadStatus| {
            let left = room.checked_sub(READ_BYTES + PATH_FACTOR * read.path.len());
            *room = left.unwrap_or(0);
            left.is_some()
        };
        let reads = trace
            .wishes
            .iter()
            .filter_map(read)
            .take_while(|read| fits(read))
            .collect();
        TraceStatus {
            repository: trace.repository.clone(),
            manifest: trace.manifest.to_string(),
            program: trace.entry.program.clone(),
            entry: trace.entry.id.to_string(),
            starts: trace.starts,
            recorded: trace.recorded,
            files: trace.files.len() as u64,
            bytes: trace.bytes(),
            reads,
        }
    }
}

impl Catalog {
    /// What was learned of all images, of those of a repository, or of one of these. Blocks for the database.
    ///
    /// # Errors
    /// An error of the database.
    pub fn learned(&self, repository: &str, manifest: Option<&Digest>, reads: bool) -> Result<Learned, StoreError> {
        let repository = Some(repository).filter(|name| !name.is_empty());
        let mut learned = Learned::default();
        let mut room = if reads { READS_BYTES } else { 0 };
        self.store.each_trace(repository, |trace| {
            if manifest.is_some_and(|manifest| trace.manifest != *manifest) {
                return;
            }
            match learned.traces.len() < SHOWN_MAX {
                true => learned.traces.push(TraceStatus::of(&trace, &mut room)),
                false => learned.left_out += 1,
            }
        })?;
        let name = |shown: &TraceStatus| (shown.repository.clone(), shown.manifest.clone(), shown.program.clone());
        learned.traces.sort_by_cached_key(name);
        Ok(learned)
    }

    /// Forgets what was learned of a repository, or of one image of it; how many traces that were. Blocks for the database.
    ///
    /// # Errors
    /// An error of the database.
    pub fn forget_learned(&self, repository: &str, manifest: Option<&Digest>) -> Result<usize, StoreError> {
        self.store.remove_traces(repository, manifest)
    }
}
