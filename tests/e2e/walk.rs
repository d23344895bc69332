//! The first start of an image of which nothing is known: what it says it runs is here, or under way, before a container is made.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::stage::{Stage, subject};
use crate::support::containerd::Generation;
use crate::support::image::{Compression, Flavour, Image, Layer, base_entries};
use crate::support::lazuli::SNAPSHOTTER;
use crate::support::proxy::{Exchange, Link, total_bytes};
use crate::support::sandbox::{COMMAND_TIMEOUT, PATIENCE, run, run_ok, wait_until};
use crate::support::tar::{Entry, noise};

/// A program of this machine with libraries of its own.
const PROGRAM: &str = "/usr/bin/ls";
/// Bytes of files that lie between those that are read: too large to be taken along with a neighbour.
const BETWEEN: usize = 1_500_000;
/// Most bytes of the base's shell.
const SHELL: u64 = 4 << 20;
/// What is said of a walk that is over.
const WALKED: &str = "what it runs tells what it will read";

/// The program and all that it loads, by their paths.
fn closure() -> BTreeSet<String> {
    let listed = run_ok(Command::new("ldd").arg(PROGRAM)).text();
    let words = listed.split_whitespace().filter(|word| word.starts_with('/'));
    let mut paths: BTreeSet<String> = words.map(str::to_owned).collect();
    assert!(paths.len() > 2, "{listed}");
    paths.insert(PROGRAM.to_owned());
    paths
}

/// The directories above a path, the root's first.
fn above(path: &str) -> Vec<String> {
    let ends = path.match_indices('/').map(|(at, _)| at).filter(|&at| at > 0);
    ends.map(|at| path[1..at].to_owned()).collect()
}

/// Layers in which a script becomes the program: found by way of links, over what other layers have removed.
fn layers() -> Vec<Layer> {
    let between = |number: u64| Entry::file(format!("between/{number}"), noise(number, BETWEEN));
    let mut directories: BTreeSet<String> = BTreeSet::new();
    let mut entries = Vec::new();
    for (number, path) in (0..).zip(closure()) {
        directories.extend(above(&path));
        entries.push(Entry::file(&path[1..], fs::read(&path).unwrap()).mode(0o755));
        entries.push(between(number));
    }
    directories.insert("between".to_owned());
    let dirs = directories.iter().map(Entry::dir).collect::<Vec<_>>();
    let low = [dirs, entries].concat();
    // Before the right one in PATH, and gone above.
    let decoy = vec![
        Entry::dir("usr"),
        Entry::dir("usr/bin"),
        between(50),
        Entry::file("usr/bin/tool", noise(99, BETWEEN)).mode(0o755),
        between(51),
    ];
    let high = vec![
        Entry::dir("usr"),
        Entry::dir("usr/bin"),
        Entry::whiteout("usr/bin/tool"),
        Entry::dir("bin"),
        Entry::symlink("bin/tool", "../opt/now/start"),
        Entry::dir("opt"),
        Entry::symlink("opt/now", "v1"),
        Entry::dir("opt/v1"),
        Entry::file("opt/v1/start", "#!/bin/sh\nset -e\nexec /usr/bin/ls \"$@\"\n").mode(0o755),
    ];
    let layer = |entries: Vec<Entry>| Layer::of(Compression::Gzip, entries);
    vec![layer(base_entries()), layer(low), layer(decoy), layer(high)]
}

fn stage(name: &str, config: &str) -> Option<Stage> {
    let generation = Generation::two().unwrap_or(Generation::One);
    let mut stage = Stage::with(name, generation, config, |_| {});
    if subject() != SNAPSHOTTER {
        return None;
    }
    // With its metrics.
    assert!(stage.lazuli().stop());
    let config = fs::read_to_string(stage.lazuli().config()).unwrap();
    let config = config.replace("admin_address = \"\"", "admin_address = \"127.0.0.1:0\"");
    fs::write(stage.lazuli().config(), config).unwrap();
    stage.restart_daemon();
    Some(stage)
}

/// Requests for parts of layers since the last call.
fn taken(stage: &Stage) -> Vec<Exchange> {
    let taken = stage.proxy.take();
    taken
        .into_iter()
        .filter(|exchange| exchange.is_blob() && exchange.range.is_some())
        .collect()
}

/// Runs what the image says.
fn start(stage: &Stage, reference: &str) {
    let id = stage.containerd.new_id();
    let flags = ["run", "--rm", "--null-io", "--snapshotter", SNAPSHOTTER];
    let mut command = stage.containerd.ctr(&flags);
    command.args([reference, &id]);
    run(&mut command, COMMAND_TIMEOUT).expect_success();
}

/// Waits until the walk from this program is over.
fn walked(stage: &Stage, program: &str) {
    let log = || stage.lazuli.as_ref().unwrap().log();
    // What is logged of a long name is its beginning.
    let named = format!("program=\"{}", &program[..program.len().min(100)]);
    let is_over = || {
        log()
            .lines()
            .any(|line| line.contains(WALKED) && line.contains(&named))
            .then_some(())
    };
    wait_until(PATIENCE, is_over).unwrap_or_else(|| panic!("no walk from {program:?} is over: {}", log()));
    // What was asked for has come.
    let idle = || {
        let before = total_bytes(&stage.blob_requests());
        std::thread::sleep(Duration::from_millis(300));
        (total_bytes(&stage.blob_requests()) == before).then_some(())
    };
    wait_until(PATIENCE, idle).expect("bytes come on and on");
}

/// Makes a container of a command that the image does not name; its id.
fn create(stage: &Stage, reference: &str, args: &[&str]) -> String {
    let id = stage.containerd.new_id();
    let flags = ["containers", "create", "--snapshotter", SNAPSHOTTER];
    let mut command = stage.containerd.ctr(&flags);
    command.args([reference, &id]).args(args);
    run(&mut command, COMMAND_TIMEOUT).expect_success();
    id
}

/// Makes a container of a command that the image does not name, and starts it once what that reads is here.
fn is_walked_and_waits_for_nothing(stage: &Stage, reference: &str, args: &[&str]) {
    let id = create(stage, reference, args);
    walked(stage, args[0]);
    taken(stage);
    run(
        stage.containerd.ctr(&["tasks", "start", "--null-io"]).arg(&id),
        COMMAND_TIMEOUT,
    )
    .expect_success();
    let started = taken(stage);
    assert!(started.is_empty(), "all of it was here: {started:#?}");
}

/// What a metric says.
fn metric(stage: &Stage, name: &str) -> u64 {
    let log = stage.lazuli.as_ref().unwrap().log();
    let (_, address) = log.rsplit_once("metrics and health address=").unwrap();
    let url = format!("http://{}/metrics", address.split_whitespace().next().unwrap());
    let text = run_ok(Command::new("curl").args(["-fsS", "--noproxy", "*", &url])).text();
    let line = text
        .lines()
        .find(|line| line.starts_with(name) && line[name.len()..].starts_with(' '));
    line.unwrap_or_else(|| panic!("{name} is not in {text}"))[name.len() + 1..]
        .parse()
        .unwrap()
}

/// Bytes of the layers' files that the program loads.
fn len_of(paths: &BTreeSet<String>) -> u64 {
    paths
        .iter()
        .map(|path| fs::metadata(Path::new(path)).unwrap().len())
        .sum()
}

#[test]
fn what_an_image_runs_is_here_before_its_container() {
    let Some(stage) = stage("what_an_image_runs_is_here", "") else {
        return;
    };
    let image = Image::running(Flavour::Oci, layers(), &["tool", "/opt"]);
    let reference = stage.push_converted(&image, "walk/app:1", &["--estargz"]);
    stage.pull(&reference);
    walked(&stage, "tool");
    let pulled = taken(&stage);
    start(&stage, &reference);
    let started = taken(&stage);
    eprintln!("pull: {} requests, {} bytes", pulled.len(), total_bytes(&pulled));
    assert!(started.is_empty(), "all of it was here: {started:#?}");
    let files = closure();
    // The shell, the script, what the script becomes, and who its user is.
    assert_eq!(metric(&stage, "lazuli_walk_files_total"), files.len() as u64 + 4);
    let wished = metric(&stage, "lazuli_walk_wished_bytes_total");
    assert!(
        wished <= len_of(&files) + SHELL,
        "{wished} bytes, of files of {}",
        len_of(&files)
    );
    assert!(
        total_bytes(&pulled) < wished,
        "compressed, and nothing between: {pulled:#?}"
    );
}

/// Most requests for [`modules`]: one for each directory, and as many again for the program, tables, and directories that are asked for from two sides.
const MOST_FOR_MODULES: usize = 2 * DIRECTORIES;
/// Directories of modules, and modules in each.
const DIRECTORIES: usize = 12;
const MODULES: usize = 10;

/// Something like a program for Node: modules that name each other in long rows, each two that lie in other directories.
fn modules() -> Layer {
    let path = |at: usize| format!("app/{}/{at}.js", at % DIRECTORIES);
    let of = |at: usize| {
        let named = [2 * at + 1, 2 * at + 2];
        let named = named.iter().filter(|&&at| at < DIRECTORIES * MODULES);
        let lines = named.map(|&at| format!("require(\"/{}\");\n", path(at)));
        let filling: String = noise(at as u64, 2000)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Entry::file(path(at), format!("{}// {filling}\n", lines.collect::<String>()))
    };
    let program = fs::read(PROGRAM).unwrap();
    let mut entries = vec![
        Entry::dir("usr"),
        Entry::dir("usr/bin"),
        Entry::file("usr/bin/node", program).mode(0o755),
        Entry::dir("app"),
    ];
    for directory in 0..DIRECTORIES {
        entries.push(Entry::dir(format!("app/{directory}")));
        entries.extend((0..MODULES).map(|at| of(directory + at * DIRECTORIES)));
        entries.push(Entry::file(
            format!("app/{directory}/large"),
            noise(500 + directory as u64, BETWEEN / 4),
        ));
    }
    Layer::of(Compression::Gzip, entries)
}

/// Looking into modules one after the other does not mean to ask for them one by one.
#[test]
fn modules_that_name_each_other_are_fetched_in_few_requests() {
    let Some(stage) = stage("modules_that_name_each_other", "") else {
        return;
    };
    let layers = vec![Layer::of(Compression::Gzip, base_entries()), modules()];
    let image = Image::running(Flavour::Oci, layers, &["node", "/app/0/0.js"]);
    let reference = stage.push_converted(&image, "walk/modules:1", &["--estargz"]);
    stage.pull(&reference);
    walked(&stage, "node");
    let pulled = taken(&stage);
    eprintln!("{} requests, {} bytes", pulled.len(), total_bytes(&pulled));
    assert!(metric(&stage, "lazuli_walk_files_total") >= (DIRECTORIES * MODULES) as u64);
    // One for each directory, and some for the program and its tables: not one for each module.
    assert!(
        pulled.len() <= MOST_FOR_MODULES,
        "{} requests: {pulled:#?}",
        pulled.len()
    );
}

/// The same without it: each file is asked for when it is read.
#[test]
fn without_a_walk_each_file_is_waited_for() {
    let Some(stage) = stage("without_a_walk", "[trace]\nwalk = false\n") else {
        return;
    };
    let image = Image::running(Flavour::Oci, layers(), &["tool", "/opt"]);
    let reference = stage.push_converted(&image, "walk/app:1", &["--estargz"]);
    stage.pull(&reference);
    std::thread::sleep(std::time::Duration::from_secs(1));
    taken(&stage);
    start(&stage, &reference);
    let started = taken(&stage);
    assert!(started.len() >= closure().len(), "{started:#?}");
    assert!(!stage.lazuli.as_ref().unwrap().log().contains(WALKED));
}

/// A container that runs something else than its image says, on a node that knows nothing of it.
#[test]
fn what_a_container_runs_instead_is_walked_as_well() {
    let Some(stage) = stage("what_a_container_runs_instead", "") else {
        return;
    };
    let image = Image::running(Flavour::Oci, layers(), &["/nowhere"]);
    let reference = stage.push_converted(&image, "walk/app:1", &["--estargz"]);
    stage.pull(&reference);
    is_walked_and_waits_for_nothing(&stage, &reference, &["tool", "/opt"]);
}

/// Nothing is guessed.
const UNWALKED: &str = "[trace]\nwalk = false\n";

/// Has a start of an image learned, of which nothing else is left, and things guessed from now on.
fn learn_and_forget(stage: &mut Stage, reference: &str) {
    stage.pull(reference);
    start(stage, reference);
    wait_until(PATIENCE, || said(stage, "it is known what this reads")).expect("its start is learned");
    stage.containerd.remove_image(reference);
    assert!(stage.lazuli().stop());
    fs::remove_dir_all(stage.lazuli().root().join("layers")).unwrap();
    let config = fs::read_to_string(stage.lazuli().config()).unwrap();
    fs::write(stage.lazuli().config(), config.replace(UNWALKED, "")).unwrap();
    stage.restart_daemon();
}

fn said(stage: &Stage, what: &str) -> Option<()> {
    stage.lazuli.as_ref().unwrap().log().contains(what).then_some(())
}

/// The layers, and one in which the program is another name of the shell, beside `more`.
fn layers_and(more: Vec<Entry>) -> Vec<Layer> {
    let env = vec![
        Entry::dir("usr"),
        Entry::dir("usr/bin"),
        Entry::symlink("usr/bin/env", "/bin/busybox"),
    ];
    [layers(), vec![Layer::of(Compression::Gzip, [env, more].concat())]].concat()
}

/// What is known of a start with the same program goes on, and what that does not tell is walked.
#[test]
fn what_is_known_of_the_same_program_does_not_keep_other_arguments_from_being_walked() {
    let Some(mut stage) = stage("the_same_program_with_other_arguments", UNWALKED) else {
        return;
    };
    let image = Image::running(Flavour::Oci, layers_and(Vec::new()), &["env", "echo"]);
    let reference = stage.push_converted(&image, "walk/app:1", &["--estargz"]);
    learn_and_forget(&mut stage, &reference);
    stage.pull(&reference);
    wait_until(PATIENCE, || said(&stage, "fit=\"same\"")).expect("it is played");
    is_walked_and_waits_for_nothing(&stage, &reference, &["env", "tool", "/opt"]);
}

/// Over a narrow link, what only the known command reads waits until what the other arguments read has its requests, and comes then.
#[test]
fn what_is_known_of_the_same_program_waits_for_what_other_arguments_read() {
    /// Files, of which every other one is read, and their length: too large to be taken along with a neighbour, and more of them than requests may be
    /// under way.
    const FILES: u64 = 192;
    const FILE_LEN: usize = 150_000;
    /// All that is known takes ten seconds.
    const NARROW: Link = Link {
        latency: Duration::from_millis(20),
        bytes_per_second: Some(1_500_000),
    };
    let Some(mut stage) = stage("the_same_program_waits", UNWALKED) else {
        return;
    };
    let files = (0..FILES).map(|file| Entry::file(format!("data/{file:03}"), noise(1000 + file, FILE_LEN)));
    let data = [vec![Entry::dir("data")], files.collect()].concat();
    let image = Image::running(
        Flavour::Oci,
        layers_and(data),
        &["env", "sh", "-c", "cat /data/*[02468] >/dev/null"],
    );
    let reference = stage.push_converted(&image, "walk/app:1", &["--estargz"]);
    learn_and_forget(&mut stage, &reference);
    stage.proxy.set_link(NARROW);
    stage.pull(&reference);
    wait_until(PATIENCE, || said(&stage, "fit=\"same\"")).expect("it is played");
    taken(&stage);
    create(&stage, &reference, &["env", "tool", "/opt"]);
    walked(&stage, "env");
    let taken = taken(&stage);
    let manifest = stage.containerd.manifest(&reference);
    let of = |layer: usize| {
        let digest = manifest["layers"][layer]["digest"].as_str().unwrap();
        let asked = taken.iter().enumerate();
        let asked = asked.filter(|(_, exchange)| exchange.path.ends_with(digest));
        asked.map(|(at, _)| at).collect::<Vec<_>>()
    };
    let (low, data) = (of(1), of(4));
    let walk = *low.first().expect("it was walked")..*low.last().unwrap();
    let between: Vec<_> = data.iter().filter(|at| walk.contains(at)).collect();
    assert!(walk.len() > 3 && between.is_empty(), "{walk:?}, {data:?} of {taken:#?}");
    assert!(
        data.iter().any(|&at| at > walk.end),
        "it is given up: {data:?} of {taken:#?}"
    );
}

/// Whatever an image says that it runs, little is fetched for it, and it can be used.
#[test]
fn an_image_that_leads_astray_costs_little() {
    let Some(stage) = stage("an_image_that_leads_astray", "") else {
        return;
    };
    let mut insane = fs::read(PROGRAM).unwrap()[..4096].to_vec();
    // As many program headers as there can be, anywhere.
    insane[32..40].copy_from_slice(&0x7fff_ffff_ffff_f000_u64.to_le_bytes());
    insane[56..58].copy_from_slice(&u16::MAX.to_le_bytes());
    insane.resize(8 << 20, 7);
    let mut script = b"#!/bin/sh\n".to_vec();
    script.extend_from_slice("exec $(x) ; ".repeat(1 << 20).as_bytes());
    script.resize(256 << 20, b'\n');
    let hostile = vec![
        Entry::dir("h"),
        Entry::symlink("h/loop", "loop"),
        Entry::symlink("h/round", "/h/there/round"),
        Entry::symlink("h/there", "../h/../h"),
        Entry::file("h/insane", insane).mode(0o755),
        Entry::file("h/self", "#!/h/self\n").mode(0o755),
        Entry::file("h/ping", "#!/bin/sh\n. /h/pong\nexec /h/ping x \"$@\"\n").mode(0o755),
        Entry::file("h/pong", "#!/bin/sh\n. /h/ping\n. /h/pong\n").mode(0o755),
        Entry::file("h/large", script).mode(0o755),
    ];
    let layers = vec![
        Layer::of(Compression::Gzip, base_entries()),
        Layer::of(Compression::Gzip, hostile),
    ];
    let long = "/h/..".repeat(10_000) + "/h/loop";
    let commands: [&[&str]; 9] = [
        &["/h/loop"],
        &["/h/round"],
        &["/h/insane"],
        &["/h/self", "x"],
        &["/h/ping"],
        &["/h/large"],
        &[&long],
        &[""],
        &["env", "-S", "env -S env -S env"],
    ];
    for (at, command) in commands.into_iter().enumerate() {
        let image = Image::running(Flavour::Oci, layers.clone(), command);
        let reference = stage.push_converted(&image, &format!("walk/hostile{at}:1"), &["--estargz"]);
        let before = metric(&stage, "lazuli_walk_wished_bytes_total");
        stage.pull(&reference);
        walked(&stage, command[0]);
        let wished = metric(&stage, "lazuli_walk_wished_bytes_total") - before;
        // The shell, and a chunk of a large file.
        assert!(wished < 8 << 20, "{command:?}: {wished} bytes");
        assert_eq!(stage.sh(&reference, "echo here").trim(), "here");
        stage.containerd.remove_image(&reference);
    }
}
