//! Node: the modules that a program requires, found as Node finds them: beside the file, in `node_modules` of the directories above it, in
//! `NODE_PATH`, and where Debian has its packages.

use super::program::Library;
use super::{Step, Walk};
use crate::layer::entry::javascript::{self, MAX_MODULE, MAX_PACKAGE};
use crate::layer::entry::view::{File, join, parent};

/// Directories above a file that are looked in.
const MAX_LEVELS: usize = 32;
/// Where Debian's Node looks besides.
const DEBIAN: [&str; 3] = [
    "/usr/share/nodejs",
    "/usr/lib/nodejs",
    "/usr/lib/x86_64-linux-gnu/nodejs",
];
/// Modules that are part of Node, and that Debian's reads from files when it starts.
const PARTS: [&str; 5] = [
    "/usr/share/nodejs/acorn/dist/acorn.js",
    "/usr/share/nodejs/acorn-walk/dist/walk.js",
    "/usr/share/nodejs/cjs-module-lexer/lexer.js",
    "/usr/share/nodejs/cjs-module-lexer/dist/lexer.js",
    "/usr/share/nodejs/undici/undici-fetch.js",
];
/// Options that name a module which is loaded first.
const REQUIRING: [&str; 4] = ["-r", "--require", "--import", "--loader"];

impl Walk {
    /// Node with these arguments.
    pub(super) fn node(&self, args: &[String]) -> Vec<Step> {
        let directory = match self.command.directory.as_str() {
            "" => "/",
            directory => directory,
        };
        let mut next: Vec<Step> = PARTS.map(|path| Step::File(path.to_owned())).into();
        let mut rest = args.iter().skip(1);
        while let Some(arg) = rest.next() {
            if REQUIRING.contains(&arg.as_str()) {
                let name = rest.next().map_or("", String::as_str);
                next.extend(self.required(directory, name));
            } else if !arg.starts_with('-') {
                next.extend(self.node_path(&join(directory, arg)).map(Step::Node));
                break;
            }
        }
        next
    }

    /// A file is loaded.
    pub(super) async fn node_file(&self, path: &str) -> Option<Vec<Step>> {
        let file = self.find(path)?;
        if !self.is_first(&file) {
            return None;
        }
        let mut next = self.scope(&file);
        if file.name().ends_with(".node") {
            next.push(Step::Library(Library {
                name: file.path,
                own: Vec::new(),
                near: Vec::new(),
                machine: (0, true),
                is_musl: false,
            }));
            return Some(next);
        }
        self.wish_whole(&file);
        if file.name() == "package.json" {
            // It was named as a package: what it names is loaded.
            let package = self.read_module(&file, MAX_PACKAGE).await?;
            let main = javascript::main(&package).unwrap_or_else(|| "index".to_owned());
            let main = self.node_path(&join(parent(&file.path), &main));
            let main = main.or_else(|| self.node_path(&join(parent(&file.path), "index")));
            next.extend(main.map(Step::Node));
        } else if !file.name().ends_with(".json") {
            let text = self.read_module(&file, MAX_MODULE).await?;
            let names = javascript::required(&text);
            for name in &names {
                // Each takes some hundred look-ups.
                tokio::task::yield_now().await;
                next.extend(self.required(parent(&file.path), name));
            }
        }
        Some(next)
    }

    /// The description of the package that a file is in: Node reads it to know what kind of module the file is.
    fn scope(&self, file: &File) -> Vec<Step> {
        let mut dir = parent(&file.path);
        for _ in 0..MAX_LEVELS {
            if dir == "/" || dir.ends_with("/node_modules") {
                break;
            }
            let description = join(dir, "package.json");
            if self.find(&description).is_some() {
                return vec![Step::File(description)];
            }
            dir = parent(dir);
        }
        Vec::new()
    }

    /// What a name means in a file of this directory.
    fn required(&self, dir: &str, name: &str) -> Option<Step> {
        if name.starts_with("node:") || name.is_empty() {
            return None;
        }
        if name.starts_with(['.', '/']) {
            return self.node_path(&join(dir, name)).map(Step::Node);
        }
        let mut dirs = Vec::new();
        let mut above = dir;
        for _ in 0..MAX_LEVELS {
            if !above.ends_with("/node_modules") {
                dirs.push(join(above, "node_modules"));
            }
            if above == "/" {
                break;
            }
            above = parent(above);
        }
        let of_environment = self.variable("NODE_PATH").unwrap_or_default();
        dirs.extend(
            of_environment
                .split(':')
                .filter(|dir| !dir.is_empty())
                .take(MAX_LEVELS)
                .map(str::to_owned),
        );
        dirs.extend(DEBIAN.map(str::to_owned));
        dirs.into_iter()
            .find_map(|dir| self.node_path(&join(&dir, name)))
            .map(Step::Node)
    }

    /// The file that is loaded for a path: itself, with an extension, or what a directory names.
    fn node_path(&self, path: &str) -> Option<String> {
        let endings = [
            "",
            ".js",
            ".json",
            ".node",
            ".mjs",
            ".cjs",
            "/package.json",
            "/index.js",
            "/index.json",
        ];
        endings
            .iter()
            .find_map(|ending| self.find(&format!("{path}{ending}")))
            .map(|file| file.path)
    }
}
