//! Scripts: the interpreter in their first line, and what a shell is going to run.
//!
//! Of a shell's language as much is read as tells where a command begins, and which words are as they stand. What depends on anything else (variables,
//! patterns, what a command says) is no name of a file.

/// Bytes of a file in which its first line is looked for, as the kernel does (BINPRM_BUF_SIZE).
pub const LINE_LEN: usize = 256;
/// Bytes of a script that are read: what is further down comes later.
pub const MAX_SCRIPT: u64 = 64 << 10;
/// Commands of a script that are looked at.
const MAX_COMMANDS: usize = 512;
/// Words of a command.
const MAX_WORDS: usize = 64;
/// Texts within a text: `$(...)`.
const MAX_NESTED: usize = 64;

/// The interpreter of a script, and its argument: all that follows, as the kernel gives it.
pub fn interpreter(head: &[u8]) -> Option<(&str, Option<&str>)> {
    let line = head.get(..head.len().min(LINE_LEN))?.strip_prefix(b"#!")?;
    let end = line.iter().position(|&byte| byte == b'\n').unwrap_or(line.len());
    let line = std::str::from_utf8(&line[..end]).ok()?.trim_matches([' ', '\t', '\r']);
    match line.split_once([' ', '\t']) {
        _ if line.is_empty() => None,
        Some((program, argument)) => Some((program, Some(argument.trim_matches([' ', '\t'])))),
        None => Some((line, None)),
    }
}

/// A word of a command.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Word {
    /// Its text, without quotes.
    pub text: String,
    /// Whether the shell makes something else of it.
    pub expands: bool,
}

/// A command: a program and its arguments.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Command {
    /// Its words. The first one is the program, as it stands.
    pub words: Vec<Word>,
    /// Whether the shell becomes it.
    pub is_exec: bool,
}

impl Command {
    /// The words up to the first one that the shell makes something else of.
    pub fn literal(&self) -> Vec<String> {
        let literal = self.words.iter().take_while(|word| !word.expands);
        literal.map(|word| word.text.clone()).collect()
    }

    /// Whether the script's own arguments are given to it, or are it.
    pub fn passes_on(&self) -> bool {
        self.words.iter().any(|word| word.expands && is_arguments(&word.text))
    }
}

/// Whether the word stands for the arguments of the script.
fn is_arguments(text: &str) -> bool {
    matches!(text, "$@" | "${@}" | "$*" | "${@:1}" | "$1")
}

/// Words of a shell that a command may follow.
const KEYWORDS: [&str; 11] = [
    "if", "then", "else", "elif", "do", "while", "until", "!", "{", "time", "builtin",
];
/// Words after which none follows on the same line, or that name no program.
const OTHERS: [&str; 9] = ["for", "case", "esac", "fi", "done", "}", "function", "select", "in"];

/// What a shell runs that is given this text.
pub fn commands(text: &[u8]) -> Vec<Command> {
    let mut texts = vec![String::from_utf8_lossy(text).into_owned()];
    let (mut found, mut nested) = (Vec::new(), 0);
    while let Some(text) = texts.pop() {
        let mut reader = Reader {
            text: text.as_bytes(),
            at: 0,
            commands: Vec::new(),
            command: Vec::new(),
            nested: Vec::new(),
            heredocs: Vec::new(),
        };
        reader.read(MAX_COMMANDS - found.len());
        found.append(&mut reader.commands);
        for inner in reader.nested {
            nested += 1;
            if nested <= MAX_NESTED {
                texts.push(inner);
            }
        }
        if found.len() >= MAX_COMMANDS {
            break;
        }
    }
    found
}

/// Reads the commands of one text.
struct Reader<'a> {
    text: &'a [u8],
    at: usize,
    commands: Vec<Command>,
    /// Words of the command that is being read.
    command: Vec<Word>,
    /// Texts of commands within words.
    nested: Vec<String>,
    /// Ends of the documents that begin with the next line.
    heredocs: Vec<String>,
}

impl Reader<'_> {
    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn read(&mut self, most: usize) {
        while self.commands.len() < most {
            let Some(byte) = self.peek() else { break };
            match byte {
                b' ' | b'\t' | b'\r' => self.at += 1,
                b'\\' if self.text.get(self.at + 1) == Some(&b'\n') => self.at += 2,
                b'\n' => {
                    self.at += 1;
                    self.end();
                    self.skip_documents();
                }
                b'#' => self.skip_line(),
                b'&' if matches!(self.text.get(self.at + 1), Some(b'>')) => self.redirect(),
                b';' | b'&' | b'|' | b'(' | b')' => {
                    self.at += 1;
                    self.end();
                }
                b'<' | b'>' => self.redirect(),
                _ => {
                    let word = self.word();
                    // The number of a descriptor.
                    let is_number = !word.text.is_empty() && word.text.bytes().all(|byte| byte.is_ascii_digit());
                    if is_number && matches!(self.peek(), Some(b'<' | b'>')) {
                        continue;
                    }
                    self.push(word);
                }
            }
        }
        self.end();
    }

    fn skip_line(&mut self) {
        while self.peek().is_some_and(|byte| byte != b'\n') {
            self.at += 1;
        }
    }

    /// Passes over an operator of redirection, and what it redirects to.
    fn redirect(&mut self) {
        let begin = self.at;
        while self
            .peek()
            .is_some_and(|byte| matches!(byte, b'<' | b'>' | b'&' | b'|' | b'-'))
        {
            self.at += 1;
        }
        let operator = &self.text[begin..self.at];
        let is_document = matches!(operator, b"<<" | b"<<-");
        while self.peek().is_some_and(|byte| matches!(byte, b' ' | b'\t')) {
            self.at += 1;
        }
        if self
            .peek()
            .is_some_and(|byte| !matches!(byte, b'\n' | b';' | b'(' | b')'))
        {
            let word = self.word();
            if is_document {
                self.heredocs.push(word.text);
            }
        }
    }

    fn skip_documents(&mut self) {
        for end in std::mem::take(&mut self.heredocs) {
            while self.at < self.text.len() {
                let begin = self.at;
                self.skip_line();
                let line = &self.text[begin..self.at];
                self.at += 1;
                if line.trim_ascii() == end.as_bytes() {
                    break;
                }
            }
        }
    }

    fn word(&mut self) -> Word {
        let mut text = Vec::new();
        let mut expands = false;
        let mut quoted = false;
        let begin = self.at;
        while let Some(byte) = self.peek() {
            match byte {
                b'"' => {
                    quoted = !quoted;
                    self.at += 1;
                }
                b'\'' if !quoted => {
                    self.at += 1;
                    while let Some(byte) = self.peek() {
                        self.at += 1;
                        if byte == b'\'' {
                            break;
                        }
                        text.push(byte);
                    }
                }
                b'\\' => {
                    self.at += 1;
                    text.extend(self.peek());
                    self.at += 1;
                }
                b'$' if self.text.get(self.at + 1) == Some(&b'(') => {
                    expands = true;
                    self.at += 2;
                    self.inner(b')');
                }
                b'`' => {
                    expands = true;
                    self.at += 1;
                    self.inner(b'`');
                }
                b'$' if self.text.get(self.at + 1) == Some(&b'{') => {
                    expands = true;
                    while let Some(byte) = self.peek() {
                        text.push(byte);
                        self.at += 1;
                        if byte == b'}' {
                            break;
                        }
                    }
                }
                b'$' => {
                    expands = true;
                    text.push(byte);
                    self.at += 1;
                }
                _ if quoted => {
                    text.push(byte);
                    self.at += 1;
                }
                b' ' | b'\t' | b'\r' | b'\n' | b';' | b'&' | b'|' | b'(' | b')' | b'<' | b'>' => break,
                b'*' | b'?' | b'[' => {
                    // `[` alone is a command.
                    expands |= byte != b'[' || self.at != begin;
                    text.push(byte);
                    self.at += 1;
                }
                _ => {
                    text.push(byte);
                    self.at += 1;
                }
            }
        }
        if self.at == begin {
            self.at += 1;
        }
        Word {
            text: String::from_utf8_lossy(&text).into_owned(),
            expands,
        }
    }

    /// Takes the text of a command within a word.
    fn inner(&mut self, end: u8) {
        let (begin, mut depth) = (self.at, 0_usize);
        while let Some(byte) = self.peek() {
            match byte {
                _ if byte == end && depth == 0 => break,
                b'(' => depth += 1,
                b')' => depth = depth.saturating_sub(1),
                _ => {}
            }
            self.at += 1;
        }
        if self.nested.len() < MAX_NESTED {
            self.nested
                .push(String::from_utf8_lossy(&self.text[begin..self.at]).into_owned());
        }
        self.at = (self.at + 1).min(self.text.len());
    }

    fn push(&mut self, word: Word) {
        if self.command.is_empty() && KEYWORDS.contains(&word.text.as_str()) && !word.expands {
            return;
        }
        if self.command.len() < MAX_WORDS {
            self.command.push(word);
        }
    }

    /// The command is over.
    fn end(&mut self) {
        let mut words = std::mem::take(&mut self.command);
        let is_assignment = |word: &Word| {
            let name = word.text.split_once('=').map(|(name, _)| name);
            name.is_some_and(|name| {
                let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
                !name.is_empty() && name.bytes().all(is_name) && !name.as_bytes()[0].is_ascii_digit()
            })
        };
        let first = words
            .iter()
            .position(|word| !is_assignment(word))
            .unwrap_or(words.len());
        words.drain(..first);
        let mut is_exec = false;
        while let Some(first) = words.first()
            && matches!(first.text.as_str(), "exec" | "command")
            && !first.expands
        {
            is_exec |= first.text == "exec";
            words.remove(0);
            while words
                .first()
                .is_some_and(|word| word.text.starts_with('-') && !word.expands)
            {
                words.remove(0);
            }
        }
        let Some(first) = words.first() else { return };
        if !OTHERS.contains(&first.text.as_str()) {
            self.commands.push(Command { words, is_exec });
        }
    }
}

/// The arguments that `env` makes of the one argument in a script's first line: with `-S` it is split.
pub fn split_words(text: &str) -> Vec<String> {
    let words = text.split([' ', '\t']).filter(|word| !word.is_empty());
    words.take(MAX_WORDS).map(str::to_owned).collect()
}
