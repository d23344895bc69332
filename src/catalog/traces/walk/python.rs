//! Python: the modules that the interpreter loads to start, and those that a program imports.
//!
//! Modules are found as the interpreter finds them: beside the program, in `PYTHONPATH`, in its library, and in the directories of packages, those of
//! Debian and of virtual environments included. Of a module its compiled form is read if there is one, which the interpreter takes if its source has
//! not changed (it looks at the source's attributes, and those cost nothing here). What a module imports when it is loaded is followed; what its
//! functions import is not.

use super::program::{Library, machine_name};
use super::{Step, Walk, library};
use crate::layer::entry::pyc;
use crate::layer::entry::python::{self, Import, MAX_MODULE};
use crate::layer::entry::view::{File, join, parent};

/// Modules that are part of the interpreter itself from 3.11 on, and read from nowhere.
const FROZEN: [&str; 17] = [
    "_collections_abc",
    "_sitebuiltins",
    "abc",
    "codecs",
    "genericpath",
    "importlib",
    "importlib._bootstrap",
    "importlib._bootstrap_external",
    "importlib.machinery",
    "importlib.util",
    "io",
    "ntpath",
    "os",
    "posixpath",
    "runpy",
    "site",
    "stat",
];
const FROZEN_SINCE: u32 = 11;
/// Modules that it loads to start: those that are frozen later, and those for text.
const STARTS: [&str; 14] = [
    "encodings",
    "encodings.aliases",
    "encodings.utf_8",
    "codecs",
    "io",
    "abc",
    "site",
    "os",
    "stat",
    "posixpath",
    "genericpath",
    "_collections_abc",
    "_sitebuiltins",
    "sitecustomize",
];
/// What the C library reads for it: the characters of the locale that it takes where none is chosen, and the time zone; and tables of characters, in a
/// directory with the machine's name ([`CHARACTERS`]).
const READS: [&str; 2] = ["/usr/lib/locale/C.utf8/LC_CTYPE", "/etc/localtime"];
const CHARACTERS: &str = "gconv/gconv-modules.cache";
/// Names in a directory of packages among which files are looked for that say more directories.
const MAX_LISTED: usize = 4096;
/// Those files.
const MAX_PTH: usize = 16;
/// Modules that one module loads: large packages load a few hundred.
const MAX_LOADED: usize = 1024;
/// Options of the interpreter that have a value.
const VALUED: [&str; 3] = ["-W", "-X", "--check-hash-based-pycs"];

/// A module, by its whole name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Module(pub String);

/// Where modules are.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// Directories, in order.
    directories: Vec<String>,
    /// The interpreter's own library.
    library: String,
    /// The version of the interpreter: 3.x.
    minor: u32,
    machine: (u16, bool),
}

/// A module that was found.
struct Located {
    file: File,
    /// Whether it is a package.
    is_package: bool,
}

impl Walk {
    /// An interpreter with these arguments; it is `file`, called as `path`.
    pub(super) async fn python_program(&self, path: &str, file: &File, args: &[String]) -> Vec<Step> {
        let prefix = parent(parent(&file.path)).to_owned();
        let Some((library, minor)) = self.python_library(&prefix, file.name()) else {
            return Vec::new();
        };
        let run = Run::of(args);
        let mut directories = match &run {
            Run::Script(script) => self
                .find(script)
                .map(|file| parent(&file.path).to_owned())
                .into_iter()
                .collect(),
            Run::Text(_) | Run::Module(_) => vec![self.command.directory.clone()],
            Run::Nothing => Vec::new(),
        };
        let of_environment = self.variable("PYTHONPATH").unwrap_or_default();
        directories.extend(
            of_environment
                .split(':')
                .filter(|dir| !dir.is_empty())
                .take(16)
                .map(str::to_owned),
        );
        directories.push(library.clone());
        directories.push(format!("{library}/lib-dynload"));
        // An environment is where the interpreter is called, not where it is.
        let environment = parent(parent(path)).to_owned();
        let configuration = [join(parent(path), "pyvenv.cfg"), join(&environment, "pyvenv.cfg")];
        let configuration = configuration.into_iter().find_map(|path| self.find(&path));
        let packages = match &configuration {
            Some(_) => vec![format!("{environment}/lib/python3.{minor}/site-packages")],
            None => vec![
                format!("{prefix}/lib/python3.{minor}/site-packages"),
                format!("/usr/local/lib/python3.{minor}/dist-packages"),
                "/usr/lib/python3/dist-packages".to_owned(),
            ],
        };
        let mut next: Vec<Step> = configuration.map(|file| Step::File(file.path)).into_iter().collect();
        for dir in &packages {
            let names = self.view.names(dir, MAX_LISTED);
            let more = names.iter().filter(|name| name.ends_with(".pth")).take(MAX_PTH);
            next.extend(more.map(|name| Step::File(join(dir, name))));
        }
        directories.extend(packages);
        let machine = match self.read_head(file, crate::layer::entry::elf::HEAD_LEN).await {
            Some(head) => crate::layer::entry::elf::Elf::parse(&head).map(|elf| (elf.machine, elf.is_wide)),
            None => None,
        };
        let machine = machine.unwrap_or_default();
        let machine_name = machine_name(machine);
        let places = Places {
            directories,
            library,
            minor,
            machine,
        };
        if self.python.set(places).is_err() {
            // There is an interpreter already: what this one imports may be of another version.
            return Vec::new();
        }
        next.extend(READS.map(|path| Step::File(path.to_owned())));
        next.push(Step::File(format!("/usr/lib/{machine_name}-linux-gnu/{CHARACTERS}")));
        next.extend(STARTS.map(|name| Step::Python(Module(name.to_owned()))));
        next.extend(match run {
            Run::Text(text) => self.imported("", false, &python::imports(text.as_bytes())).await,
            Run::Module(name) => vec![
                Step::Python(Module("runpy".to_owned())),
                Step::Python(Module(name.clone())),
                Step::Python(Module(format!("{name}.__main__"))),
            ],
            Run::Script(script) => self.python_script(&script).await.unwrap_or_default(),
            Run::Nothing => Vec::new(),
        });
        next
    }

    async fn python_script(&self, path: &str) -> Option<Vec<Step>> {
        let file = self.find(path)?;
        self.wish_whole(&file);
        let text = self.read_module(&file, MAX_MODULE).await?;
        Some(self.imported("", false, &python::imports(&text)).await)
    }

    /// The directory of the library of an interpreter, and its version.
    fn python_library(&self, prefix: &str, name: &str) -> Option<(String, u32)> {
        let roots = [
            format!("{prefix}/lib"),
            format!("{prefix}/lib64"),
            "/usr/lib".to_owned(),
            "/usr/local/lib".to_owned(),
        ];
        let version = |name: &str| {
            name.strip_prefix("python3.")
                .and_then(|minor| minor.parse::<u32>().ok())
        };
        let named = version(name);
        roots.iter().find_map(|root| {
            let minor = named.or_else(|| self.view.names(root, MAX_LISTED).iter().find_map(|name| version(name)))?;
            let library = format!("{root}/python3.{minor}");
            let has_library = self.find(&format!("{library}/encodings/__init__.py")).is_some();
            has_library.then_some((library, minor))
        })
    }

    /// A module is loaded.
    pub(super) async fn python_module(&self, module: Module) -> Option<Vec<Step>> {
        let places = self.python.get()?;
        if places.minor >= FROZEN_SINCE && FROZEN.contains(&module.0.as_str()) {
            return None;
        }
        let Located { file, .. } = self.locate(places, &module.0)?;
        if file.name().ends_with(".so") {
            return Some(vec![Step::Library(Library {
                name: file.path,
                own: Vec::new(),
                near: Vec::new(),
                machine: places.machine,
                is_musl: false,
            })]);
        }
        let known = self
            .is_own(places, &file)
            .then(|| library::imported(&module.0))
            .flatten();
        let Some(known) = known else {
            return self.python_imports(module).await;
        };
        self.wish_whole_later(&self.compiled(places, &file).unwrap_or(file));
        let mut next = Vec::new();
        known.for_each(|name| add(&mut next, name));
        // It may be of another version.
        next.push(Step::PythonImports(module));
        Some(next)
    }

    /// Whether a file belongs to the interpreter's own library: not to the packages that may lie below it.
    fn is_own(&self, places: &Places, file: &File) -> bool {
        let inside = file.path.strip_prefix(&places.library);
        inside.is_some_and(|path| path.starts_with('/') && !path.contains("-packages/"))
    }

    /// The compiled form of a module.
    fn compiled(&self, places: &Places, file: &File) -> Option<File> {
        let stem = file.name().strip_suffix(".py")?;
        let compiled = format!(
            "{}/__pycache__/{stem}.cpython-3{}.pyc",
            parent(&file.path),
            places.minor
        );
        self.find(&compiled)
    }

    /// What a module says that it imports.
    pub(super) async fn python_imports(&self, module: Module) -> Option<Vec<Step>> {
        let places = self.python.get()?;
        let Located { file, is_package } = self.locate(places, &module.0)?;
        // Of the library little is needed, and mostly known; of the directory of another package, most.
        let with_neighbours = !self.is_own(places, &file);
        let imports = match self.compiled(places, &file) {
            Some(compiled) => {
                self.wish_whole(&compiled);
                let most = pyc::MAX_MODULE.min(compiled.size);
                pyc::imports(&self.read_part(&compiled, 0..most, with_neighbours).await?)?
            }
            None => {
                self.wish_whole(&file);
                let most = MAX_MODULE.min(file.size);
                python::imports(&self.read_part(&file, 0..most, with_neighbours).await?)
            }
        };
        Some(self.imported(&module.0, is_package, &imports).await)
    }

    /// The modules that these imports load, in a module of this name.
    async fn imported(&self, module: &str, is_package: bool, imports: &[Import]) -> Vec<Step> {
        let Some(places) = self.python.get() else {
            return Vec::new();
        };
        let mut next = Vec::new();
        for import in imports {
            if next.len() >= MAX_LOADED {
                break;
            }
            let base = match import.level {
                0 => Some(""),
                level => ancestor(module, level as usize - usize::from(is_package)),
            };
            let Some(base) = base else { continue };
            let name = match (base, import.module.as_str()) {
                ("", name) => name.to_owned(),
                (base, "") => base.to_owned(),
                (base, name) => format!("{base}.{name}"),
            };
            if name.is_empty() {
                continue;
            }
            add(&mut next, &name);
            for part in import.names.iter().filter(|part| *part != "*") {
                // Each takes some look-ups.
                tokio::task::yield_now().await;
                let part = format!("{name}.{part}");
                // What is no module is something in one.
                if self.locate(places, &part).is_some() {
                    add(&mut next, &part);
                }
            }
        }
        next
    }

    /// Where a module is.
    fn locate(&self, places: &Places, name: &str) -> Option<Located> {
        let path = name.replace('.', "/");
        let extensions = [
            format!(".cpython-3{}-{}.so", places.minor, multiarch(places.machine)),
            ".abi3.so".to_owned(),
            ".so".to_owned(),
        ];
        let is_native = places.machine != (0, false);
        for dir in &places.directories {
            let base = join(dir, &path);
            if let Some(file) = self.find(&format!("{base}/__init__.py")) {
                return Some(Located { file, is_package: true });
            }
            let extensions = extensions.iter().filter(|_| is_native);
            let native = extensions
                .into_iter()
                .find_map(|extension| self.find(&format!("{base}{extension}")));
            if let Some(file) = native.or_else(|| self.find(&format!("{base}.py"))) {
                return Some(Located {
                    file,
                    is_package: false,
                });
            }
        }
        None
    }
}

/// Adds a module, and before it the packages that it is in: whoever loads it loads them.
fn add(steps: &mut Vec<Step>, name: &str) {
    let ends = name.match_indices('.').map(|(at, _)| at).chain([name.len()]);
    for end in ends {
        let step = Step::Python(Module(name[..end].to_owned()));
        if !steps.contains(&step) {
            steps.push(step);
        }
    }
}

/// The package that is so many levels above a name.
fn ancestor(name: &str, levels: usize) -> Option<&str> {
    (0..levels).try_fold(name, |name, _| name.rsplit_once('.').map(|(package, _)| package))
}

/// What a machine is called in names of compiled modules.
fn multiarch((machine, _): (u16, bool)) -> &'static str {
    match machine {
        62 => "x86_64-linux-gnu",
        183 => "aarch64-linux-gnu",
        3 => "i386-linux-gnu",
        40 => "arm-linux-gnueabihf",
        _ => "unknown",
    }
}

/// What an interpreter is to run.
enum Run {
    Text(String),
    Module(String),
    Script(String),
    Nothing,
}

impl Run {
    fn of(args: &[String]) -> Self {
        let mut rest = args.iter().skip(1);
        while let Some(arg) = rest.next() {
            if VALUED.contains(&arg.as_str()) {
                rest.next();
                continue;
            }
            let Some(options) = arg.strip_prefix('-') else {
                return Run::Script(arg.clone());
            };
            if options.starts_with('-') || options.starts_with(['W', 'X']) {
                continue;
            }
            // Options of one letter may stand together, and the last one may be followed by its value.
            let Some((at, kind)) = options.char_indices().find(|(_, option)| matches!(option, 'c' | 'm')) else {
                continue;
            };
            let value = match &options[at + 1..] {
                "" => rest.next().cloned().unwrap_or_default(),
                value => value.to_owned(),
            };
            return if kind == 'c' {
                Run::Text(value)
            } else {
                Run::Module(value)
            };
        }
        Run::Nothing
    }
}
