//! Programs: found as the kernel and a shell find them, and what they are made of.
//!
//! Of an ELF file the loader and the libraries follow, in the order in which the loader looks for them: the file's own directories, those of the
//! environment, the loader's cache, or the directories that it looks in by itself. Of a large file only parts are read: by the loader its headers, symbols
//! and relocations, and what is relocated; then its code.

use super::{Step, WHOLE, Walk};
use crate::layer::entry::elf::{Elf, HEAD_LEN};
use crate::layer::entry::view::{File, join, parent};
use crate::layer::entry::{libraries, script, text_at};

/// What is looked for in without a `PATH`, as containerd sets it.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Directories of a list that are looked in.
const DIRECTORIES: usize = 64;
/// Of a segment of a large file, so much is wished for: of data it is the beginning that is read, of code nearly all, in pieces as large as those in
/// which it is fetched.
const SEGMENT_MOST: u64 = 4 << 20;
const CODE_MOST: u64 = 32 << 20;
/// Files of configurations of the loader that are read.
const MAX_CONFIGURATIONS: usize = 32;
/// What OpenSSL reads when it is loaded, in various distributions.
const OPENSSL: [&str; 3] = [
    "/usr/lib/ssl/openssl.cnf",
    "/etc/ssl/openssl.cnf",
    "/etc/pki/tls/openssl.cnf",
];
const LOADER_CACHE: &str = "/etc/ld.so.cache";
const LOADER_CONFIGURATION: &str = "/etc/ld.so.conf";

/// Programs that run another one, which is among their arguments.
const WRAPPERS: [&str; 16] = [
    "catatonit",
    "chrt",
    "docker-init",
    "dumb-init",
    "env",
    "gosu",
    "ionice",
    "nice",
    "nohup",
    "runuser",
    "setpriv",
    "setsid",
    "stdbuf",
    "su-exec",
    "tini",
    "timeout",
];

/// A library that is needed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Library {
    /// Its name, or its path.
    pub name: String,
    /// Directories that come first.
    pub own: Vec<String>,
    /// Directories that only count for what needs it itself.
    pub near: Vec<String>,
    /// The machine, and whether its words have 64 bits.
    pub machine: (u16, bool),
    /// Whether musl loads it.
    pub is_musl: bool,
}

/// Files that nearly every start reads: containerd does, to know who the user is, and the C library, to load others.
pub(super) fn usual() -> impl Iterator<Item = &'static str> {
    ["/etc/passwd", "/etc/group", LOADER_CACHE].into_iter()
}

impl Walk {
    /// Where a program is that is called so: in `PATH`, unless it is a path.
    pub(super) fn find_program(&self, name: &str) -> Option<(String, File)> {
        let is_program = |path: String| {
            let file = self.find(&path)?;
            file.is_executable.then_some((path, file))
        };
        if name.contains('/') {
            return is_program(name.to_owned());
        }
        if name.is_empty() || name.len() > 255 {
            return None;
        }
        let path = self.variable("PATH").unwrap_or(PATH);
        path.split(':')
            .take(DIRECTORIES)
            .find_map(|dir| is_program(join(dir, name)))
    }

    /// A program is run.
    pub(super) async fn program(&self, args: Vec<String>) -> Option<Vec<Step>> {
        let (path, file) = self.find_program(args.first()?)?;
        self.wish_whole(&file);
        let head = self.read_head(&file, HEAD_LEN).await?;
        if let Some((interpreter, argument)) = script::interpreter(&head) {
            self.wish(&file, 0..script::MAX_SCRIPT);
            let mut next = vec![interpreter.to_owned()];
            next.extend(argument.map(str::to_owned));
            next.push(path);
            next.extend(args.into_iter().skip(1));
            return Some(vec![Step::Program(next)]);
        }
        let mut next = Vec::new();
        if Elf::parse(&head).is_some() {
            // What it is loaded with is found as of a library, and what it runs does not wait for that.
            next.push(Step::Library(Library {
                name: file.path.clone(),
                own: Vec::new(),
                near: Vec::new(),
                machine: (0, true),
                is_musl: false,
            }));
        }
        let called = path.rsplit('/').next().unwrap_or_default();
        next.extend(self.family(called, &path, &file, &args).await);
        Some(next)
    }

    /// What a program does by what it is.
    async fn family(&self, called: &str, path: &str, file: &File, args: &[String]) -> Vec<Step> {
        match called {
            "sh" | "bash" | "dash" | "ash" => self.shell(args).await,
            _ if WRAPPERS.contains(&called) => self.wrapped(args),
            "node" | "nodejs" => self.node(args),
            "java" => self.java(file),
            _ if called.starts_with("python") || file.name().starts_with("python") => {
                self.python_program(path, file, args).await
            }
            _ => Vec::new(),
        }
    }

    /// The program among the arguments of another one.
    fn wrapped(&self, args: &[String]) -> Vec<Step> {
        let mut rest = args.get(1..).unwrap_or_default().to_vec();
        // A script's first line has all of it as one argument.
        if let Some(first) = rest.first()
            && let Some(words) = first
                .strip_prefix("-S")
                .or_else(|| first.strip_prefix("--split-string="))
        {
            let words = script::split_words(words);
            rest.splice(0..1, words);
        }
        let is_program =
            |word: &String| !word.starts_with('-') && !word.contains('=') && self.find_program(word).is_some();
        match rest.iter().position(is_program) {
            Some(at) => vec![Step::Program(rest.split_off(at))],
            None => Vec::new(),
        }
    }

    /// What an ELF file needs; `needed` is what it is needed as.
    async fn elf(&self, file: &File, elf: &Elf, origin: &str, needed: &Library) -> Option<Vec<Step>> {
        if file.size > WHOLE {
            self.wish(file, 0..HEAD_LEN);
            for segment in elf.loaded() {
                let most = if segment.is_code() { CODE_MOST } else { SEGMENT_MOST };
                let len = segment.len.min(most);
                self.wish(file, segment.offset..segment.offset.saturating_add(len));
            }
        }
        let mut next = Vec::new();
        let mut is_musl = needed.is_musl;
        if let Some(range) = elf.interpreter() {
            let bytes = self.read(file, range).await?;
            let loader = text_at(&bytes, 0)?.to_owned();
            is_musl |= loader.contains("ld-musl");
            // It is a library of itself, and needs none.
            next.push(Step::Library(Library {
                name: loader,
                own: Vec::new(),
                near: Vec::new(),
                machine: (elf.machine, elf.is_wide),
                is_musl,
            }));
        }
        let dynamic = self.read(file, elf.dynamic()?).await?;
        let links = elf.links(&dynamic)?;
        if links.needed.is_empty() {
            return Some(next);
        }
        let used = links.used();
        let texts = self.read(file, used.clone()).await?;
        let text = |at: u64| text_at(&texts, links.texts.0.checked_add(at)?.checked_sub(used.start)?);
        let directories = |at: Option<u64>| {
            let list = at.and_then(text).unwrap_or_default();
            let list = list.split(':').filter(|dir| !dir.is_empty()).take(DIRECTORIES);
            list.map(|dir| dir.replace("${ORIGIN}", origin).replace("$ORIGIN", origin))
                .collect::<Vec<_>>()
        };
        let near = directories(links.runpath);
        let inherited = needed.own.clone();
        // The older kind does not count where there is the other one.
        let own = match links.runpath {
            Some(_) => inherited,
            None => [directories(links.rpath), inherited].concat(),
        };
        let own: Vec<String> = own.into_iter().take(DIRECTORIES).collect();
        let libraries = links.needed.iter().filter_map(|&at| text(at));
        next.extend(libraries.map(|name| {
            Step::Library(Library {
                name: name.to_owned(),
                own: own.clone(),
                near: near.clone(),
                machine: (elf.machine, elf.is_wide),
                is_musl,
            })
        }));
        Some(next)
    }

    /// A library is loaded.
    pub(super) async fn library(&self, library: Library) -> Option<Vec<Step>> {
        let (path, file) = self.find_library(&library).await?;
        if !self.is_first(&file) {
            return None;
        }
        self.wish_whole(&file);
        if file.name().starts_with("libcrypto.so") {
            let configurations = OPENSSL.iter().filter_map(|path| self.find(path));
            configurations.for_each(|file| self.wish_whole(&file));
        }
        let head = self.read_head(&file, HEAD_LEN).await?;
        let elf = Elf::parse(&head)?;
        self.elf(&file, &elf, parent(&path), &library).await
    }

    async fn find_library(&self, library: &Library) -> Option<(String, File)> {
        let at = |path: String| self.find(&path).map(|file| (path, file));
        let name = &library.name;
        if name.contains('/') {
            return at(name.clone());
        }
        let of_environment = self.variable("LD_LIBRARY_PATH").unwrap_or_default();
        let of_environment = of_environment
            .split([':', ';'])
            .filter(|dir| !dir.is_empty())
            .take(DIRECTORIES);
        let first = library.own.iter().map(String::as_str);
        let first = first
            .chain(of_environment)
            .chain(library.near.iter().map(String::as_str));
        if let Some(found) = first.into_iter().find_map(|dir| at(join(dir, name))) {
            return Some(found);
        }
        let (machine, is_wide) = library.machine;
        if !library.is_musl
            && let Some(cache) = self.loader_cache().await
        {
            let listed = libraries::find(&cache, name, machine, is_wide);
            if let Some(found) = listed.into_iter().find_map(|path| at(path.to_owned())) {
                return Some(found);
            }
        }
        let configured = self.configured(library).await;
        let usual = usual_directories(library);
        configured.into_iter().chain(usual).find_map(|dir| at(join(&dir, name)))
    }

    /// The loader's cache, read once.
    async fn loader_cache(&self) -> Option<bytes::Bytes> {
        let read = self.cache.get_or_init(async || {
            let file = self.find(LOADER_CACHE)?;
            self.wish_whole(&file);
            self.read_head(&file, libraries::MAX_CACHE).await
        });
        read.await.clone()
    }

    /// Directories that the loader is told of, where it has no cache.
    async fn configured(&self, library: &Library) -> Vec<String> {
        let first = match library.is_musl {
            true => format!("/etc/ld-musl-{}.path", machine_name(library.machine)),
            false if self.cache.get().is_some_and(Option::is_some) => return Vec::new(),
            false => LOADER_CONFIGURATION.to_owned(),
        };
        let (mut pending, mut directories, mut read) = (vec![first], Vec::new(), 0);
        while let Some(path) = pending.pop() {
            read += 1;
            if read > MAX_CONFIGURATIONS {
                break;
            }
            let Some(file) = self.find(&path) else { continue };
            let Some(text) = self.read_head(&file, libraries::MAX_CACHE.min(file.size)).await else {
                continue;
            };
            let found = libraries::configured(&text);
            directories.extend(found.directories.iter().map(|dir| (*dir).to_owned()));
            for pattern in found.includes {
                // Nobody writes another pattern than `DIRECTORY/*.conf`.
                let Some((dir, "*.conf")) = pattern.rsplit_once('/') else {
                    continue;
                };
                let names = self.view.names(dir, MAX_CONFIGURATIONS);
                let names = names.into_iter().rev().filter(|name| name.ends_with(".conf"));
                pending.extend(names.map(|name| join(dir, &name)));
            }
        }
        directories.truncate(DIRECTORIES);
        directories
    }
}

/// What a machine is called in names of files.
pub(super) fn machine_name((machine, is_wide): (u16, bool)) -> &'static str {
    match (machine, is_wide) {
        (62, true) => "x86_64",
        (183, true) => "aarch64",
        (3, _) => "i386",
        (40, _) => "armhf",
        (243, true) => "riscv64",
        (22, true) => "s390x",
        (21, true) => "powerpc64le",
        _ => "unknown",
    }
}

/// Directories that a loader looks in by itself.
fn usual_directories(library: &Library) -> Vec<String> {
    if library.is_musl {
        return ["/lib", "/usr/local/lib", "/usr/lib"].map(str::to_owned).to_vec();
    }
    let name = machine_name(library.machine);
    let abi = if name == "armhf" {
        "arm-linux-gnueabihf".to_owned()
    } else {
        format!("{name}-linux-gnu")
    };
    let wide = if library.machine.1 { "64" } else { "" };
    vec![
        format!("/lib/{abi}"),
        format!("/usr/lib/{abi}"),
        format!("/lib{wide}"),
        format!("/usr/lib{wide}"),
        "/lib".to_owned(),
        "/usr/lib".to_owned(),
    ]
}
