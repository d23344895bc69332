//! What a start reads is learned: the next start of the image finds it here, or under way, before it asks.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;

use ::lazuli::layer::trace::Trace;
use ::lazuli::store::Store;

use crate::shared::{Ground, Machine};
use crate::stage::{Stage, subject};
use crate::support::containerd::Generation;
use crate::support::image::{Compression, Flavour, Image, Layer, base_entries, digest_of};
use crate::support::lazuli::SNAPSHOTTER;
use crate::support::proxy::{Exchange, total_bytes};
use crate::support::sandbox::{COMMAND_TIMEOUT, PATIENCE, run, run_ok, wait_until};
use crate::support::tar::{Entry, noise};

/// Directories of the layer with content, files in each, and bytes of a file: too large to be taken along with a neighbour, too small to
/// be several requests.
const DIRS: usize = 10;
const FILES: usize = 16;
const FILE_LEN: usize = 150_000;
/// What an entry point reads: all files of these directories, the last file first, so that nothing of it is read ahead by itself.
const ONE: [usize; 2] = [2, 7];
const OTHER: [usize; 1] = [4];
/// Bytes that both images cost besides: tables of contents, the shell.
const BESIDES: u64 = 1_400_000;

fn name(dir: usize, file: usize) -> String {
    name_in("data", dir, file)
}

/// The same below another directory.
fn name_in(top: &str, dir: usize, file: usize) -> String {
    format!("{top}/d{dir}/f{file:02}")
}

fn content(dir: usize, file: usize) -> Vec<u8> {
    noise((dir * FILES + file + 1) as u64, FILE_LEN)
}

/// An image with `more` in the layer with content.
fn image(more: &[Entry]) -> Image {
    image_of("data", content, more)
}

/// The same below another directory, with other contents.
fn image_of(top: &str, content: impl Fn(usize, usize) -> Vec<u8>, more: &[Entry]) -> Image {
    let mut entries = vec![Entry::dir(top)];
    entries.extend((0..DIRS).map(|dir| Entry::dir(format!("{top}/d{dir}"))));
    for dir in 0..DIRS {
        entries.extend((0..FILES).map(|file| Entry::file(name_in(top, dir, file), content(dir, file))));
    }
    entries.extend(more.iter().cloned());
    let layers = vec![
        Layer::of(Compression::Gzip, base_entries()),
        Layer::of(Compression::Gzip, entries),
    ];
    Image::new(Flavour::Oci, layers)
}

/// A command that reads all files of some directories and fails if they are not what they should be.
fn script(dirs: &[usize]) -> String {
    script_of("/data", content, dirs)
}

/// The same for those below another directory (or what a shell makes one of), with other contents.
fn script_of(top: &str, content: impl Fn(usize, usize) -> Vec<u8>, dirs: &[usize]) -> String {
    let (mut names, mut bytes) = (Vec::new(), Vec::new());
    for &dir in dirs {
        for file in (0..FILES).rev() {
            names.push(name_in(top, dir, file));
            bytes.extend(content(dir, file));
        }
    }
    let sum = digest_of(&bytes);
    format!(
        "cat {} | sha256sum | grep -q {}",
        names.join(" "),
        &sum["sha256:".len()..]
    )
}

/// Bytes of the files in these directories.
fn len(dirs: &[usize]) -> u64 {
    (dirs.len() * FILES * FILE_LEN) as u64
}

struct Node {
    stage: Stage,
}

impl Node {
    fn new(name: &str) -> Option<Self> {
        Self::with(name, "")
    }

    fn with(name: &str, config: &str) -> Option<Self> {
        let generation = Generation::two().unwrap_or(Generation::One);
        let stage = Stage::with(name, generation, config, |_| {});
        (subject() == SNAPSHOTTER).then_some(Node { stage })
    }

    /// Runs a command in a new container that is removed afterwards. Its arguments are the same each time.
    fn start(&self, reference: &str, script: &str) {
        let id = self.stage.containerd.new_id();
        let flags = ["run", "--rm", "--null-io", "--snapshotter", SNAPSHOTTER];
        let mut command = self.stage.containerd.ctr(&flags);
        command.args([reference, &id, "sh", "-c", script]);
        run(&mut command, COMMAND_TIMEOUT).expect_success();
    }

    /// One that tells its metrics.
    fn with_metrics(name: &str) -> Option<Self> {
        let mut node = Self::new(name)?;
        assert!(node.stage.lazuli().stop());
        let config = fs::read_to_string(node.stage.lazuli().config()).unwrap();
        let config = config.replace("admin_address = \"\"", "admin_address = \"127.0.0.1:0\"");
        fs::write(node.stage.lazuli().config(), config).unwrap();
        node.stage.restart_daemon();
        Some(node)
    }

    /// Files that were carried to another image, by how they were found there.
    fn carried(&self) -> BTreeMap<&'static str, u64> {
        let log = self.stage.lazuli.as_ref().unwrap().log();
        let (_, address) = log.rsplit_once("metrics and health address=").unwrap();
        let url = format!("http://{}/metrics", address.split_whitespace().next().unwrap());
        let text = run_ok(Command::new("curl").args(["-fsS", "--noproxy", "*", &url])).text();
        let count = |how: &str| {
            let name = format!("lazuli_trace_carried_files_total{{found=\"{how}\"}} ");
            let found = text.lines().find_map(|line| line.strip_prefix(&name));
            found.map_or(0, |count| count.parse().unwrap())
        };
        ["same", "changed", "moved", "gone"].map(|how| (how, count(how))).into()
    }

    /// Starts that are learned in all.
    fn count_learned(&self) -> usize {
        let log = self.stage.lazuli.as_ref().unwrap().log();
        log.matches("it is known what this reads").count()
    }

    /// Waits until so many starts are learned in all.
    fn learned(&self, count: usize) {
        let learned = || self.count_learned();
        let is_learned = || (learned() >= count).then_some(());
        wait_until(PATIENCE, is_learned).unwrap_or_else(|| panic!("{} starts are learned, not {count}", learned()));
    }

    /// Requests for blobs since the last call.
    fn taken(&self) -> Vec<Exchange> {
        let taken = self.stage.proxy.take();
        taken.into_iter().filter(Exchange::is_blob).collect()
    }

    /// Pulls an image, and waits until `bytes` of blobs have come for it.
    fn pull(&self, reference: &str, bytes: u64) {
        self.stage.pull(reference);
        let fetched = || total_bytes(&self.stage.blob_requests());
        let is_here = || (fetched() >= bytes).then_some(());
        wait_until(PATIENCE, is_here).unwrap_or_else(|| panic!("{} bytes came ahead, not {bytes}", fetched()));
    }

    /// Takes the image away, and all that is here of its bytes. What was learned stays. `meanwhile` is called while no daemon runs.
    fn forget(&mut self, reference: &str, meanwhile: impl FnOnce(&Store)) {
        self.stage.containerd.remove_image(reference);
        assert!(self.stage.lazuli().stop());
        let root = self.stage.lazuli().root();
        fs::remove_dir_all(root.join("layers")).unwrap();
        meanwhile(&Store::open(&root.join("metadata.redb")).unwrap());
        self.stage.restart_daemon();
        self.stage.proxy.take();
    }

    /// Pushes an image and has a first start of it learned, of which nothing else is left; its reference.
    fn known(&mut self, name: &str, dirs: &[usize]) -> String {
        let reference = self.stage.push_converted(&image(&[]), name, &["--estargz"]);
        self.stage.pull(&reference);
        self.start(&reference, &script(dirs));
        self.learned(1);
        self.forget(&reference, |_| {});
        reference
    }

    /// What is known of starts.
    fn traces(&mut self) -> Vec<Trace> {
        assert!(self.stage.lazuli().stop());
        let store = Store::open(&self.stage.lazuli().root().join("metadata.redb")).unwrap();
        let mut traces = Vec::new();
        store.each_trace(None, |trace| traces.push(trace)).unwrap();
        drop(store);
        self.stage.restart_daemon();
        traces
    }
}

/// Directories with files in a trace.
fn dirs(trace: &Trace) -> BTreeSet<String> {
    let data = trace.files.iter().filter_map(|file| file.path.strip_prefix("data/"));
    data.filter_map(|path| Some(path.split_once('/')?.0.to_owned()))
        .collect()
}

fn named(dirs: &[usize]) -> BTreeSet<String> {
    dirs.iter().map(|dir| format!("d{dir}")).collect()
}

/// The second start of an image, after all of it was forgotten but what it read.
#[test]
fn a_second_start_finds_what_the_first_one_read() {
    let Some(mut node) = Node::new("a_second_start_finds_what_the_first_one_read") else {
        return;
    };
    let reference = node.stage.push_converted(&image(&[]), "trace/app:1", &["--estargz"]);
    node.stage.pull(&reference);
    node.start(&reference, &script(&ONE));
    let first = node.taken();
    assert!(first.len() > 2 * FILES, "each file was a request: {first:#?}");
    node.learned(1);
    node.forget(&reference, |_| {});

    node.pull(&reference, len(&ONE));
    let pulled = node.taken();
    node.start(&reference, &script(&ONE));
    let started = node.taken();
    let bytes = total_bytes(&pulled) + total_bytes(&started);
    eprintln!(
        "first start: {} requests, {} bytes; second: {} of the pull and {} of the start, {bytes} bytes",
        first.len(),
        total_bytes(&first),
        pulled.len(),
        started.len()
    );
    assert!(pulled.len() * 3 < first.len(), "requests are large: {pulled:#?}");
    assert!(started.is_empty(), "all of it was here: {started:#?}");
    assert!(bytes * 10 <= (len(&ONE) + BESIDES) * 11, "{bytes} bytes came");
    node.learned(2);
    let traces = node.traces();
    assert_eq!(traces.len(), 1);
    assert_eq!((traces[0].starts, dirs(&traces[0])), (2, named(&ONE)));
    assert!(traces[0].wishes.iter().all(|wish| wish.missed == 0), "{traces:#?}");
}

/// Two entry points of one image have traces of their own.
#[test]
fn entry_points_do_not_poison_each_other() {
    let Some(mut node) = Node::new("entry_points_do_not_poison_each_other") else {
        return;
    };
    let reference = node.known("trace/app:1", &ONE);
    // What the first one reads comes ahead, and the other reads right.
    node.pull(&reference, len(&ONE));
    node.start(&reference, &script(&OTHER));
    node.learned(2);
    // Of both, the last one is played. Nothing of the first one is read any more, and none of its bytes come.
    node.forget(&reference, |_| {});
    node.pull(&reference, len(&OTHER));
    let pulled = total_bytes(&node.taken());
    node.start(&reference, &script(&OTHER));
    let started = node.taken();
    assert!(started.is_empty(), "all of it was here: {started:#?}");
    assert!(pulled * 10 <= (len(&OTHER) + BESIDES) * 11, "{pulled} bytes came");
    node.learned(3);
    // Side by side in one cache, where the pages of one are there when the other starts.
    node.start(&reference, &script(&ONE));
    node.learned(4);
    let mut traces = node.traces();
    traces.sort_by_key(|trace| dirs(trace).len());
    let found: Vec<_> = traces.iter().map(dirs).collect();
    assert_eq!(found, [named(&OTHER), named(&ONE)]);
}

/// The next tag of a repository, one of whose layers is another.
#[test]
fn a_new_tag_is_fetched_by_what_is_known_of_the_old_one() {
    let Some(mut node) = Node::new("a_new_tag_is_fetched_by_what_is_known_of_the_old_one") else {
        return;
    };
    node.known("trace/app:1", &ONE);
    let more = [
        Entry::file("data/d2/a new file", noise(4711, FILE_LEN)),
        Entry::file("data/d0/new", "x"),
    ];
    let new = node.stage.push_converted(&image(&more), "trace/app:2", &["--estargz"]);
    node.pull(&new, len(&ONE));
    let pulled = node.taken();
    node.start(&new, &script(&ONE));
    let started = node.taken();
    assert!(started.is_empty(), "all of it was here: {started:#?}");
    let bytes = total_bytes(&pulled);
    assert!(bytes * 10 <= (len(&ONE) + BESIDES) * 13, "{bytes} bytes came");
    // And what is known of the new one is all of it.
    node.learned(2);
    let mut traces = node.traces();
    traces.sort_by_key(|trace| trace.starts);
    let found: Vec<_> = traces.iter().map(|trace| (trace.starts, dirs(trace))).collect();
    assert_eq!(found, [(1, named(&ONE)), (2, named(&ONE))]);
    assert_ne!(traces[0].manifest, traces[1].manifest);
}

/// The same files in a directory with another name are found by what is in them. The command names neither directory, as one that has a link to the
/// newest release does not.
#[test]
fn a_renamed_directory_is_found_by_its_content() {
    let Some(mut node) = Node::with_metrics("a_renamed_directory_is_found_by_its_content") else {
        return;
    };
    for (flavour, options) in [("estargz", "--estargz"), ("zstd", "--zstdchunked")] {
        let repository = format!("trace/{flavour}");
        let read = script_of("/release-*", content, &ONE);
        let old = image_of("release-41", content, &[]);
        let old = node.stage.push_converted(&old, &format!("{repository}:41"), &[options]);
        node.stage.pull(&old);
        let learned = node.count_learned();
        node.start(&old, &read);
        node.learned(learned + 1);
        node.forget(&old, |_| {});

        let extra = [Entry::file("release-42/changes", noise(4711, FILE_LEN))];
        let new = image_of("release-42", content, &extra);
        let new = node.stage.push_converted(&new, &format!("{repository}:42"), &[options]);
        let before = node.carried();
        node.pull(&new, len(&ONE));
        let pulled = node.taken();
        node.start(&new, &read);
        let started = node.taken();
        eprintln!(
            "{flavour}: {} requests of the pull, {} of the start",
            pulled.len(),
            started.len()
        );
        assert!(started.is_empty(), "{flavour}: all of it was here: {started:#?}");
        let bytes = total_bytes(&pulled);
        assert!(
            bytes * 10 <= (len(&ONE) + BESIDES) * 13,
            "{flavour}: {bytes} bytes came"
        );
        let carried = node.carried();
        let files = (ONE.len() * FILES) as u64;
        assert_eq!(carried["moved"] - before["moved"], files, "{flavour}: {carried:?}");
        // What is known of the new one is where it is now, each file once.
        node.learned(learned + 2);
        let traces = node
            .traces()
            .into_iter()
            .filter(|trace| trace.repository.ends_with(&repository));
        let newest = traces.max_by_key(|trace| trace.starts).unwrap();
        let paths = newest.files.iter().filter(|file| file.path.starts_with("release-"));
        let paths: Vec<_> = paths.map(|file| file.path.clone()).collect();
        assert_eq!(
            (newest.starts, paths.len()),
            (2, ONE.len() * FILES),
            "{flavour}: {paths:?}"
        );
        assert!(
            paths.iter().all(|path| path.starts_with("release-42/")),
            "{flavour}: {paths:?}"
        );
        node.stage.containerd.remove_image(&new);
    }
}

/// Files of the same size with another content are the next version of those that were read, at their path; their old content is not followed to a
/// backup under another name.
#[test]
fn the_same_size_with_another_content_is_another_file() {
    let Some(mut node) = Node::with_metrics("the_same_size_with_another_content_is_another_file") else {
        return;
    };
    node.known("trace/app:1", &OTHER);
    let changed = |dir: usize, file: usize| match dir == OTHER[0] && file < FILES / 2 {
        true => noise((100_000 + file) as u64, FILE_LEN),
        false => content(dir, file),
    };
    // The old content of a file that has changed, kept as a backup under another name.
    let more = [Entry::file("data/d0/backup", content(OTHER[0], 0))];
    let new = image_of("data", changed, &more);
    let new = node.stage.push_converted(&new, "trace/app:2", &["--estargz"]);
    let before = node.carried();
    node.pull(&new, len(&OTHER));
    let pulled = node.taken();
    node.start(&new, &script_of("/data", changed, &OTHER));
    let started = node.taken();
    assert!(started.is_empty(), "all of it was here: {started:#?}");
    let bytes = total_bytes(&pulled);
    assert!(bytes * 10 <= (len(&OTHER) + BESIDES) * 11, "{bytes} bytes came");
    let carried = node.carried();
    let files = |how: &str| carried[how] - before[how];
    let half = FILES as u64 / 2;
    assert_eq!((files("changed"), files("moved")), (half, 0), "{carried:?}");
    assert!(files("same") >= half, "{carried:?}");
}

/// Another repository learns nothing of it.
#[test]
fn another_repository_is_not_fetched_by_it() {
    let Some(mut node) = Node::new("another_repository_is_not_fetched_by_it") else {
        return;
    };
    node.known("trace/app:1", &ONE);
    let other = node.stage.push_converted(&image(&[]), "trace/other:1", &["--estargz"]);
    node.stage.pull(&other);
    node.start(&other, &script(&OTHER));
    let taken = node.taken();
    let (bytes, most) = (total_bytes(&taken), len(&OTHER) + BESIDES);
    assert!(bytes < most, "{bytes} bytes came: {taken:#?}");
}

/// Whatever stands in the database, the image starts.
#[test]
fn a_damaged_trace_is_not_used() {
    let Some(mut node) = Node::new("a_damaged_trace_is_not_used") else {
        return;
    };
    let reference = node.known("trace/app:1", &ONE);
    assert!(node.stage.lazuli().stop());
    let path = node.stage.lazuli().root().join("metadata.redb");
    {
        const TRACES: redb::TableDefinition<'_, &[u8], &[u8]> = redb::TableDefinition::new("traces");
        use redb::ReadableTable as _;
        let db = redb::Database::open(&path).unwrap();
        let transaction = db.begin_write().unwrap();
        {
            let mut table = transaction.open_table(TRACES).unwrap();
            let entries: Vec<_> = table
                .iter()
                .unwrap()
                .map(|entry| {
                    entry
                        .map(|(key, value)| (key.value().to_vec(), value.value().to_vec()))
                        .unwrap()
                })
                .collect();
            assert_eq!(entries.len(), 1);
            for (key, mut value) in entries {
                let middle = value.len() / 2;
                value[middle] ^= 1;
                table.insert(key.as_slice(), value.as_slice()).unwrap();
            }
        }
        transaction.commit().unwrap();
    }
    node.stage.restart_daemon();
    node.stage.pull(&reference);
    node.start(&reference, &script(&ONE));
    let log = node.stage.lazuli().log();
    assert!(log.contains("a trace is damaged and not used"), "{log}");
    // It is replaced by what this start has read.
    node.learned(2);
    let traces = node.traces();
    assert_eq!(traces.len(), 1);
    assert_eq!((traces[0].starts, dirs(&traces[0])), (1, named(&ONE)));
}

/// A container that goes on has started when it reads nothing new; and what is known is shown, and forgotten where that is wanted.
#[test]
fn a_start_is_over_when_it_has_settled() {
    let Some(node) = Node::with("a_start_is_over_when_it_has_settled", "[trace]\nsettle = 1\n") else {
        return;
    };
    let reference = node.stage.push_converted(&image(&[]), "trace/app:1", &["--estargz"]);
    node.stage.pull(&reference);
    let id = node.stage.containerd.start_container(&reference, SNAPSHOTTER);
    node.stage.containerd.exec(&id, &script(&OTHER)).expect_success();
    node.learned(1);
    // The start is over: this is its work.
    node.stage.containerd.exec(&id, &script(&ONE)).expect_success();
    node.stage.containerd.remove_container(&id);
    let lazuli = node.stage.lazuli.as_ref().unwrap();
    let trace = |arguments: &[&str]| {
        let finished = run(&mut lazuli.command("trace", arguments), PATIENCE).expect_success();
        finished.text()
    };
    let repository = reference.rsplit_once(':').unwrap().0;
    let shown = trace(&["--json", "show", repository, "--reads"]);
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    let traces = shown["traces"].as_array().unwrap();
    assert_eq!(traces.len(), 1, "{shown:#}");
    assert_eq!(
        (&traces[0]["repository"], &traces[0]["starts"]),
        (&repository.into(), &1.into())
    );
    let reads = traces[0]["reads"].as_array().unwrap();
    let paths: BTreeSet<&str> = reads.iter().map(|read| read["path"].as_str().unwrap()).collect();
    assert!(
        (0..FILES).all(|file| paths.contains(name(OTHER[0], file).as_str())),
        "{shown:#}"
    );
    assert!(
        (0..FILES).all(|file| !paths.contains(name(ONE[0], file).as_str())),
        "{shown:#}"
    );
    // Each of these files is one chunk, and its content the beginning of its own digest.
    for file in 0..FILES {
        let read = |read: &&serde_json::Value| read["path"] == name(OTHER[0], file).as_str();
        let known = reads.iter().find(read).unwrap()["content"].as_str();
        let digest = digest_of(&content(OTHER[0], file));
        assert_eq!(known, digest.get("sha256:".len()..).and_then(|hex| hex.get(..16)));
    }
    assert!(trace(&["show"]).contains(repository));
    assert_eq!(trace(&["rm", &format!("{repository}/other")]), "0 traces are removed\n");
    assert_eq!(trace(&["rm", repository]), "1 traces are removed\n");
    assert_eq!(trace(&["show", repository]), "nothing is known of starts\n");
}

/// What one machine has learned serves another that trusts it, and no stranger: published by itself, or by hand.
#[test]
fn machines_share_what_they_have_learned() {
    if subject() != SNAPSHOTTER {
        return;
    }
    let ground = Ground::new("machines_share_what_they_have_learned");
    let image = image(&[]);
    let trusting = "trusted_repositories = [\"REGISTRY/trace/*\"]\n";
    let cluster = "repository = \"REGISTRY/cluster/index\"\n";
    let start = |machine: &Machine, reference: &str, dirs: &[usize]| {
        let id = machine.containerd.new_id();
        let flags = ["run", "--rm", "--null-io", "--snapshotter", SNAPSHOTTER];
        let mut command = machine.containerd.ctr(&flags);
        command.args([reference, &id, "sh", "-c", &script(dirs)]);
        run(&mut command, COMMAND_TIMEOUT).expect_success();
    };
    let said = |machine: &Machine, text: &str| {
        let is_said = || machine.lazuli.log().contains(text).then_some(());
        wait_until(PATIENCE, is_said).unwrap_or_else(|| panic!("it does not say {text:?}: {}", machine.lazuli.log()));
    };
    for (at, (by_itself, place)) in [(true, cluster), (false, trusting)].into_iter().enumerate() {
        let publish = if by_itself { "publish = true\n" } else { "" };
        let first = ground.machine(&format!("first{at}"), &format!("{place}{publish}"));
        let plain = ground.push(&image, &format!("trace/plain{at}:1"));
        let reference = format!("{}/trace/app{at}:1", ground.proxy.host());
        first.containerd.fetch(&plain);
        first.containerd.convert(&plain, &reference, &["--estargz"]);
        first.containerd.push(&reference);
        first.containerd.remove_image(&plain);
        first.containerd.remove_image(&reference);
        first.pull(&reference);
        start(&first, &reference, &OTHER);
        said(&first, "it is known what this reads");
        if !by_itself {
            let repository = reference.rsplit_once(':').unwrap().0;
            let pushed = run(&mut first.lazuli.command("trace", &["push", repository]), PATIENCE).expect_success();
            assert_eq!(pushed.text(), "1 traces are published\n");
        }
        said(&first, "what is known of its starts is shared");

        let second = ground.machine(&format!("second{at}"), place);
        ground.proxy.take();
        second.pull(&reference);
        said(&second, "fit=\"shared\"");
        said(&second, "what was to be fetched ahead is under way");
        let fetched = || total_bytes(&ground.proxy.exchanges());
        let is_here = || (fetched() >= len(&OTHER)).then_some(());
        wait_until(PATIENCE, is_here).unwrap_or_else(|| panic!("{} bytes came ahead", fetched()));
        ground.proxy.take();
        start(&second, &reference, &OTHER);
        // Documents are read as wholes, content of these layers in ranges.
        let is_content = |exchange: &Exchange| exchange.is_blob() && exchange.range.is_some();
        let started: Vec<_> = ground.proxy.take().into_iter().filter(is_content).collect();
        assert!(started.is_empty(), "all of it was here: {started:#?}");

        let stranger = ground.machine(&format!("stranger{at}"), "");
        ground.proxy.take();
        stranger.pull(&reference);
        start(&stranger, &reference, &OTHER);
        let asked = ground.proxy.take();
        assert!(
            !asked
                .iter()
                .any(|asked| asked.path.contains("/referrers/") || asked.path.contains("/manifests/sha256-")),
            "whom it does not trust it does not ask: {asked:#?}"
        );
        assert!(!stranger.lazuli.log().contains("fit=\"shared\""));
    }
}

/// A daemon that is killed while it records has learned nothing, and lost nothing.
#[test]
fn killed_while_it_records() {
    let Some(mut node) = Node::new("killed_while_it_records") else {
        return;
    };
    let reference = node.stage.push_converted(&image(&[]), "trace/app:1", &["--estargz"]);
    node.stage.pull(&reference);
    let id = node.stage.containerd.start_container(&reference, SNAPSHOTTER);
    node.stage.containerd.exec(&id, &script(&ONE)).expect_success();
    let lazuli = node.stage.lazuli.as_ref().unwrap();
    let worker = lazuli.worker().unwrap();
    run_ok(Command::new("kill").args(["-9", &worker.to_string()]));
    let is_back = || lazuli.worker().filter(|other| *other != worker);
    wait_until(PATIENCE, is_back).expect("no worker takes over");
    node.stage.containerd.exec(&id, &script(&OTHER)).expect_success();
    node.stage.containerd.remove_container(&id);
    assert_eq!(node.traces(), []);
    node.start(&reference, &script(&ONE));
    node.learned(1);
    assert_eq!(node.traces().len(), 1);
}
