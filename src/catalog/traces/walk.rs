//! The very first start: what an image will read is guessed from what it says it runs.
//!
//! Where nothing is known of an image, its config names a program. That is looked up as the kernel will, in what the container will see
//! ([`View`]), and what it says of itself is followed: the loader and the libraries of an ELF file ([`program`]), the interpreter of a script and
//! what the script becomes ([`shell`]), the modules that a program for Python or Node loads ([`python`], [`node`]), the parts of a Java
//! runtime ([`java`]). What is found is wished for as what is known is ([`super::waves`]).
//!
//! A step of a walk reads a little of a file and names others, and steps go side by side: it takes as many round trips as files name each other in
//! a row, while containerd still prepares the container. Everything is read as everybody reads it, verified, behind what containers wait for.
//! Nobody waits for a walk, and nothing can fail by it: whatever is not found, not understood or too large is left to the container. What an image
//! may have a node do by it is bounded: in steps, files, bytes that are read and wished for, and time.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::future::{BoxFuture, join_all};
use futures::stream::FuturesUnordered;
use tokio::sync::OnceCell;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::time::Instant;

use super::play::{Coming, LONGEST, LOOK_EVERY, Played};
use crate::catalog::Catalog;
use crate::catalog::images::ImagePlan;
use crate::fetch::{Layer, LayerData as _};
use crate::layer::entry::view::{File, View, join};
use crate::layer::trace::Entry;
use crate::layer::{Digest, Ino};
use crate::registry::image::Command;
use crate::sync::blocking;

mod asks;
mod java;
mod library;
mod node;
mod program;
mod python;
mod shell;

use asks::{Ask, Asks, Waiting};
use program::Library;

/// Bytes that are wished for in all: large programs read some ten to start.
const WISHED_BYTES: u64 = 128 << 20;
/// Files that are wished for: a Python program with a large library loads a thousand modules.
const WISHED_FILES: usize = 4096;
/// Bytes that are read for it.
const READ_BYTES: u64 = 48 << 20;
/// Images that are walked at a time: a walk holds [`STEPS_AT_ONCE`] parts of files, and the names of all layers.
pub(super) const WALKS: usize = 4;
/// Longest part of a file that is read at once.
const READ_MOST: u64 = 1 << 20;
/// Steps in all, and in a row: a program runs a program that loads a library.
const STEPS: usize = 8192;
const DEPTH: u32 = 64;
/// Steps side by side: each holds a part of a file.
const STEPS_AT_ONCE: usize = 32;
/// Bytes of the names and arguments of all steps: a script may hand on what it was given, and more each time.
const STEPS_BYTES: usize = 4 << 20;
/// How long what can wait is gathered: a few rows of names, each of which takes a round trip, so that neighbours among them share requests.
const HELD: Duration = Duration::from_millis(50);
/// Longest wait for bytes that are read for it: the container has started meanwhile.
const READ_DEADLINE: Duration = Duration::from_secs(5);
/// A file of up to so many bytes is wished for as a whole: libraries and modules are read in several places, and what lies between comes with them.
const WHOLE: u64 = 4 << 20;

/// One step: something that was named.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Step {
    /// A program, with its arguments, of which the first one is its name.
    Program(Vec<String>),
    /// A library.
    Library(Library),
    /// A file that is read as a whole.
    File(String),
    /// A script that a shell reads.
    Sourced(String),
    /// A module of Python.
    Python(python::Module),
    /// What a module of Python says that it imports, where that is known already as far as another version tells.
    PythonImports(python::Module),
    /// A file of Node's.
    Node(String),
}

impl Step {
    /// Bytes of its names and arguments.
    fn len(&self) -> usize {
        match self {
            Step::Program(args) => args.iter().map(String::len).sum(),
            Step::Library(library) => {
                let dirs = library.own.iter().chain(&library.near);
                library.name.len() + dirs.map(String::len).sum::<usize>()
            }
            Step::File(path)
            | Step::Sourced(path)
            | Step::Node(path)
            | Step::Python(python::Module(path))
            | Step::PythonImports(python::Module(path)) => path.len(),
        }
    }
}

/// A part of a file that is wished for.
struct Found {
    layer: usize,
    data: u64,
    len: u64,
    /// Whether it can wait for others like it: nothing that the walk wants to know depends on it.
    can_wait: bool,
}

/// A walk under way.
struct Walk {
    view: View,
    /// The topmost first.
    layers: Vec<Arc<Layer>>,
    command: Command,
    played: Arc<Played>,
    found: UnboundedSender<Found>,
    /// Where what steps want to read is asked for.
    asks: UnboundedSender<Ask>,
    /// Steps that wait for what they read.
    waiting: Waiting,
    state: Mutex<State>,
    /// The loader's cache, once it was read.
    cache: OnceCell<Option<Bytes>>,
    /// Where Python's modules are, once that is known.
    python: OnceCell<python::Places>,
}

#[derive(Default)]
struct State {
    steps: HashSet<Step>,
    /// Files that are wished for, and whether that is as a whole; and those that were looked at.
    files: HashMap<(usize, Ino), bool>,
    seen: HashSet<(usize, Ino)>,
    wished: u64,
    read: u64,
    /// Bytes of all steps.
    text: usize,
}

impl Catalog {
    /// Walks through an image of which nothing is known and whose layers are coming, the lowest first.
    pub(super) async fn walk_for(self: &Arc<Self>, plan: &ImagePlan, coming: Vec<Coming>) {
        if !self.traces.config.walk {
            return;
        }
        let command = self.images.command(plan).await;
        Arc::clone(self).walk(plan.manifest, command, coming).await;
    }

    /// The same, for a command.
    pub(super) async fn walk(self: Arc<Self>, manifest: Digest, command: Option<Command>, coming: Vec<Coming>) {
        if !self.traces.config.walk {
            return;
        }
        let count = |outcome: &str| self.metrics.walks_total.with_label_values(&[outcome]).inc();
        let Some(command) = command.filter(|command| !command.args.is_empty()) else {
            return count("unknown");
        };
        let entry = Entry::of(&command.args);
        let program = entry.program.clone();
        let Some(played) = self.begin_play(manifest, entry, true) else {
            return;
        };
        let end = played.end.clone();
        let walked = async {
            let layers = join_all(coming).await.into_iter().rev();
            let layers: Option<Vec<_>> = layers.map(|layer| layer.map(|(_, layer)| layer)).collect();
            // One that containerd unpacks may hide anything below it.
            let layers = layers?;
            if layers.iter().all(|layer| layer.cached().is_complete()) {
                return Some((0, 0));
            }
            // Not before the layers are there: whoever waits for a registry holds up no other.
            let _one = self.traces.walks.acquire().await.ok()?;
            let _first = played.goes_first();
            let walk = blocking(move || {
                let names = layers.iter().map(|layer| layer.names().ok());
                let view = View::new(names.collect::<Option<_>>()?);
                Some((view, layers))
            });
            let (view, layers) = walk.await?;
            let (found, coming) = mpsc::unbounded_channel();
            let (asks, asked) = mpsc::unbounded_channel();
            let walk = Arc::new(Walk {
                view,
                layers,
                command,
                played: Arc::clone(&played),
                found,
                asks,
                waiting: Waiting::default(),
                state: Mutex::default(),
                cache: OnceCell::new(),
                python: OnceCell::new(),
            });
            let waves = self.waves(&played, WISHED_BYTES);
            Some(run(walk, coming, Asks::new(asked), waves).await)
        };
        let walked = tokio::select! {
            walked = tokio::time::timeout(LONGEST, walked) => walked.ok().flatten(),
            () = end.cancelled() => None,
        };
        let Some((files, bytes)) = walked else {
            return count("given-up");
        };
        self.metrics.walk_files_total.inc_by(files);
        self.metrics.walk_wished_bytes_total.inc_by(bytes);
        count(if files > 0 { "walked" } else { "unknown" });
        tracing::info!(%manifest, program, files, bytes, "what it runs tells what it will read, which is fetched ahead");
    }
}

/// Walks to the end, or until it is cancelled; files, and bytes that were not here.
async fn run(
    walk: Arc<Walk>,
    mut found: UnboundedReceiver<Found>,
    mut asks: Asks,
    mut waves: super::waves::Waves,
) -> (u64, u64) {
    let end = walk.played.end.clone();
    let mut steps: FuturesUnordered<BoxFuture<'static, (u32, Vec<Step>)>> = FuturesUnordered::new();
    let first = [Step::Program(walk.command.args.clone())].into_iter();
    let first = first.chain(program::usual().map(|path| Step::File(path.to_owned())));
    let mut queued = Queued::default();
    queued.extend(&walk, 0, first);
    let mut place = 0..;
    let mut add = |waves: &mut super::waves::Waves, part: Found| {
        let range = place.next().map(|place| (place, (part.data, part.len)));
        waves.add(Arc::clone(&walk.layers[part.layer]), range.into_iter());
    };
    let (mut bytes, mut held, mut held_until) = (0, Vec::new(), None);
    loop {
        while let Ok(part) = found.try_recv() {
            match part.can_wait {
                true => held.push(part),
                false => {
                    add(&mut waves, part);
                    asks.begin();
                }
            }
        }
        if !held.is_empty() {
            let until = *held_until.get_or_insert_with(|| Instant::now() + HELD);
            if until <= Instant::now() || (steps.is_empty() && queued.naming.is_empty()) {
                held.drain(..).for_each(|part| add(&mut waves, part));
                held_until = None;
                asks.begin();
            }
        }
        while steps.len() < STEPS_AT_ONCE
            && let Some((depth, step)) = queued.pop(held.is_empty())
        {
            let walk = Arc::clone(&walk);
            steps.push(Box::pin(async move { (depth + 1, walk.step(step).await) }));
        }
        // A step that works may want what lies beside what others want.
        if steps.len() <= walk.waiting.count() || asks.are_late() {
            bytes += asks.ask(&walk, &mut waves);
        }
        let is_over = waves.are_over() && held.is_empty() && found.is_empty();
        if steps.is_empty() && is_over {
            let state = walk.state();
            return (state.files.len() as u64, bytes);
        }
        tokio::select! {
            biased;
            () = end.cancelled() => {
                waves.take_back();
                return (0, bytes);
            }
            Some((depth, next)) = steps.next(), if !steps.is_empty() => {
                queued.extend(&walk, depth, next.into_iter());
            }
            () = asks.gather() => {}
            () = tokio::time::sleep(LOOK_EVERY), if !is_over => {}
        }
    }
}

/// Steps that are to be made, with how many came before each.
#[derive(Default)]
struct Queued {
    /// Those that name files.
    naming: VecDeque<(u32, Step)>,
    /// Those that only look into what is wished for: after all others, so that what is named is asked for together.
    looking: VecDeque<(u32, Step)>,
}

impl Queued {
    /// What is not new, or one too many, does not even wait.
    fn extend(&mut self, walk: &Walk, depth: u32, steps: impl Iterator<Item = Step>) {
        for step in steps.filter(|step| depth < DEPTH && walk.is_new(step)) {
            match step {
                Step::PythonImports(_) => self.looking.push_back((depth, step)),
                _ => self.naming.push_back((depth, step)),
            }
        }
    }

    fn pop(&mut self, may_look: bool) -> Option<(u32, Step)> {
        match self.naming.pop_front() {
            None if may_look => self.looking.pop_front(),
            step => step,
        }
    }
}

impl Walk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a step was not made yet, and may be.
    fn is_new(&self, step: &Step) -> bool {
        let mut state = self.state();
        state.text = state.text.saturating_add(step.len());
        state.steps.len() < STEPS && state.text <= STEPS_BYTES && state.steps.insert(step.clone())
    }

    /// Makes a step; those that follow from it.
    async fn step(self: Arc<Self>, step: Step) -> Vec<Step> {
        let next = match step {
            Step::Program(args) => self.program(args).await,
            Step::Library(library) => self.library(library).await,
            Step::File(path) => self.find(&path).map(|file| {
                self.wish_whole(&file);
                Vec::new()
            }),
            Step::Sourced(path) => self.sourced(&path).await,
            Step::Python(module) => self.python_module(module).await,
            Step::PythonImports(module) => self.python_imports(module).await,
            Step::Node(path) => self.node_file(&path).await,
        };
        next.unwrap_or_default()
    }

    /// The file at a path, from the directory in which the program begins.
    fn find(&self, path: &str) -> Option<File> {
        let directory = match self.command.directory.is_empty() {
            true => "/",
            false => &self.command.directory,
        };
        self.view.file(&join(directory, path))
    }

    /// The value of a variable of the environment.
    fn variable(&self, name: &str) -> Option<&str> {
        let entries = self.command.env.iter().rev();
        entries
            .filter_map(|entry| entry.split_once('='))
            .find(|(known, _)| *known == name)
            .map(|(_, value)| value)
    }

    /// Wishes for a part of a file.
    fn wish(&self, file: &File, part: Range<u64>) {
        self.wish_when(file, part, false);
    }

    fn wish_when(&self, file: &File, part: Range<u64>, can_wait: bool) {
        let end = part.end.min(file.size);
        let len = end.saturating_sub(part.start);
        {
            let mut state = self.state();
            let is_whole = state.files.entry((file.layer, file.ino)).or_default();
            *is_whole |= len == file.size;
            if len == 0 || state.files.len() > WISHED_FILES || state.wished >= WISHED_BYTES {
                return;
            }
            state.wished += len;
        }
        tracing::trace!(path = file.path, start = part.start, len, "will be read");
        // Whoever took it is over.
        let _ = self.found.send(Found {
            layer: file.layer,
            data: file.data.saturating_add(part.start),
            len,
            can_wait,
        });
    }

    /// Wishes for a file, unless it is large.
    fn wish_whole(&self, file: &File) {
        self.wish_whole_when(file, false);
    }

    /// The same for a file that is not looked into before it is there.
    fn wish_whole_later(&self, file: &File) {
        self.wish_whole_when(file, true);
    }

    fn wish_whole_when(&self, file: &File, can_wait: bool) {
        let is_new = !self.state().files.contains_key(&(file.layer, file.ino));
        if is_new && file.size <= WHOLE {
            self.wish_when(file, 0..file.size, can_wait);
        }
    }

    /// Whether a file is looked at for the first time, under whatever name.
    fn is_first(&self, file: &File) -> bool {
        self.state().seen.insert((file.layer, file.ino))
    }

    /// A part of a file, as far as there is one. It is asked for at once, whatever else is wished for, with what other steps want now; and with what
    /// is beside the file, if it is one of many that are used together.
    async fn read_part(&self, file: &File, part: Range<u64>, is_one_of_many: bool) -> Option<Bytes> {
        let layer = self.layers.get(file.layer)?;
        let end = part.end.min(file.size);
        let len = end.checked_sub(part.start)?;
        if len == 0 || len > READ_MOST {
            return None;
        }
        let is_wished = {
            let mut state = self.state();
            state.read += len;
            if state.read > READ_BYTES {
                return None;
            }
            state
                .files
                .get(&(file.layer, file.ino))
                .is_some_and(|&is_whole| is_whole)
        };
        let data = file.data.checked_add(part.start)?;
        let _waits = self.waiting.begin();
        if !layer.cached().is_ready(data, len) {
            // What is wished for anyway comes in the same request.
            let wish = match is_wished {
                true => (file.data, file.size),
                false => (data, len),
            };
            let (ask, asked) = Ask::new(file.layer, wish, is_one_of_many);
            self.asks.send(ask).ok()?;
            asked.await.ok()?;
        }
        let read = layer.read_ahead(data, u32::try_from(len).ok()?, READ_DEADLINE).await;
        match read {
            Ok(bytes) => Some(bytes),
            Err(error) => {
                tracing::debug!(path = file.path, %error, "it cannot be seen what this will read");
                None
            }
        }
    }

    /// A part of a file that is used by itself.
    async fn read(&self, file: &File, part: Range<u64>) -> Option<Bytes> {
        self.read_part(file, part, false).await
    }

    /// The beginning of a file that is one of many which are used together, up to so many bytes.
    async fn read_module(&self, file: &File, most: u64) -> Option<Bytes> {
        self.read_part(file, 0..most.min(file.size), true).await
    }

    /// The beginning of a file, up to so many bytes.
    async fn read_head(&self, file: &File, most: u64) -> Option<Bytes> {
        self.read(file, 0..most.min(file.size)).await
    }
}
