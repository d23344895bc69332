//! Shells: what a text that is given to them runs, and what a script becomes.

use super::{Step, Walk};
use crate::layer::entry::script::{self, Command};

/// Programs of one script that are followed.
const PROGRAMS: usize = 16;
/// What shells do by themselves.
const BUILT_IN: [&str; 36] = [
    ".", ":", "[", "alias", "break", "cd", "command", "continue", "declare", "echo", "eval", "exit", "export", "false",
    "getopts", "hash", "let", "local", "popd", "printf", "pushd", "pwd", "read", "readonly", "return", "set", "shift",
    "shopt", "source", "test", "trap", "true", "type", "ulimit", "umask", "unset",
];

impl Walk {
    /// A shell with these arguments.
    pub(super) async fn shell(&self, args: &[String]) -> Vec<Step> {
        let mut rest = args.iter().skip(1);
        let mut is_text = false;
        while let Some(arg) = rest.next() {
            match arg.strip_prefix(['-', '+']) {
                Some("") | Some("-") | None => {
                    if arg.starts_with('-') {
                        continue;
                    }
                    if is_text {
                        return self.commands(&script::commands(arg.as_bytes()), &[], true);
                    }
                    let arguments: Vec<String> = rest.cloned().collect();
                    return self.script(arg, &arguments).await.unwrap_or_default();
                }
                Some(options) if options.starts_with('-') => {}
                Some(options) => {
                    is_text |= options.contains('c') && arg.starts_with('-');
                    if options.ends_with('o') {
                        rest.next();
                    }
                }
            }
        }
        Vec::new()
    }

    /// A script is read by a shell, which gives it these arguments.
    async fn script(&self, path: &str, arguments: &[String]) -> Option<Vec<Step>> {
        let file = self.find(path)?;
        self.wish(&file, 0..script::MAX_SCRIPT);
        let text = self.read_head(&file, script::MAX_SCRIPT).await?;
        let commands = script::commands(&text);
        // One that becomes nothing else runs what it names.
        let runs = !commands.iter().any(|command| command.is_exec || command.passes_on());
        Some(self.commands(&commands, arguments, runs))
    }

    /// A script is read by another one.
    pub(super) async fn sourced(&self, path: &str) -> Option<Vec<Step>> {
        self.script(path, &[]).await
    }

    /// What of these commands is run: all of them, or what the shell becomes.
    fn commands(&self, commands: &[Command], arguments: &[String], all: bool) -> Vec<Step> {
        let mut next = Vec::new();
        for command in commands {
            if next.len() >= PROGRAMS {
                break;
            }
            let mut words = command.literal();
            let name = words.first().map(String::as_str);
            if let Some("." | "source") = name {
                next.extend(words.get(1).map(|path| Step::Sourced(path.clone())));
                continue;
            }
            if command.passes_on() && (command.is_exec || name.is_none()) {
                words.extend_from_slice(arguments);
            } else if !all && !command.is_exec {
                continue;
            }
            let step = words.first().is_some_and(|name| !BUILT_IN.contains(&name.as_str()));
            if step {
                next.push(Step::Program(words));
            }
        }
        next
    }
}
