//! containerd's filter language, for List.
//!
//! ```text
//! filter    := "" | selector ("," selector)*      all selectors have to match; an empty filter matches everything
//! selector  := fieldpath (operator value)?        without an operator: the field is there
//! fieldpath := field ("." field)*
//! field     := quoted | [A-Za-z0-9_]+
//! operator  := "==" | "!=" | "~="
//! value     := quoted | [^\s,]+
//! quoted    := a Go string literal in double quotes; after "~=" also in slashes or bars
//! ```
//!
//! Of several filters one has to match; no filter at all matches everything. White space may stand before any token.
//!
//! An absent field compares as the empty text in `!=` and `~=`, and never equals anything in `==`, exactly as in
//! containerd. Go's literals can hold any bytes, so texts are byte strings here. The one deliberate difference: a bad
//! regular expression is an error, where containerd logs it and lets it match nothing.

use std::str::Chars;

use regex::bytes::{Regex, RegexBuilder};

/// Largest compiled regular expression, in bytes.
const REGEX_LIMIT: usize = 1 << 20;

/// Longest part of a filter that an error repeats, in characters.
const QUOTED_LEN: usize = 200;

/// A filter that does not follow the grammar.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("filter {filter:?}, at byte {offset}: {problem}")]
pub struct FilterError {
    filter: String,
    offset: usize,
    problem: String,
}

/// What filters look at. `None` is an absent field.
pub trait Fields {
    /// The value of the field at `path`.
    fn field(&self, path: &[Vec<u8>]) -> Option<&[u8]>;
}

/// Filters, of which one has to match.
#[derive(Debug)]
pub struct Filters(Vec<Filter>);

/// Selectors, all of which have to match.
#[derive(Debug)]
struct Filter(Vec<Selector>);

#[derive(Debug)]
struct Selector {
    path: Vec<Vec<u8>>,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(Vec<u8>),
    NotEqual(Vec<u8>),
    Matches(Regex),
}

impl Filters {
    /// Parses the filters of a request.
    ///
    /// # Errors
    /// [`FilterError`] that says where the first bad filter is wrong.
    pub fn parse(filters: &[String]) -> Result<Self, FilterError> {
        let parsed: Result<_, _> = filters.iter().map(|filter| Parser::new(filter).filter()).collect();
        Ok(Filters(parsed?))
    }

    /// Whether one of the filters matches.
    pub fn matches(&self, fields: &impl Fields) -> bool {
        self.0.is_empty() || self.0.iter().any(|filter| filter.matches(fields))
    }

    /// The text that the field `name` equals in everything that matches, if the filters say so: a hint for an index.
    pub fn equals(&self, name: &str) -> Option<&str> {
        let [filter] = self.0.as_slice() else { return None };
        filter
            .0
            .iter()
            .find_map(|selector| match (selector.path.as_slice(), &selector.test) {
                ([field], Test::Equal(value)) if field == name.as_bytes() => std::str::from_utf8(value).ok(),
                _ => None,
            })
    }
}

impl Filters {
    /// The texts that these fields equal, if the filters say so, and nothing else.
    pub fn equal_exactly<'f>(&'f self, fields: &[&[&str]]) -> Option<Vec<&'f str>> {
        let [Filter(selectors)] = self.0.as_slice() else {
            return None;
        };
        if selectors.len() != fields.len() {
            return None;
        }
        let value = |field: &&[&str]| {
            let is_it = |path: &[Vec<u8>]| {
                path.iter()
                    .map(Vec::as_slice)
                    .eq(field.iter().map(|part| part.as_bytes()))
            };
            selectors.iter().find_map(|selector| match &selector.test {
                Test::Equal(value) if is_it(&selector.path) => std::str::from_utf8(value).ok(),
                _ => None,
            })
        };
        fields.iter().map(value).collect()
    }
}

impl Filter {
    fn matches(&self, fields: &impl Fields) -> bool {
        self.0.iter().all(|selector| selector.matches(fields))
    }
}

impl Selector {
    fn matches(&self, fields: &impl Fields) -> bool {
        let value = fields.field(&self.path);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(expected) => value == Some(expected),
            Test::NotEqual(other) => value.unwrap_or_default() != other,
            Test::Matches(regex) => regex.is_match(value.unwrap_or_default()),
        }
    }
}

/// A recursive-descent parser over one filter.
struct Parser<'a> {
    input: &'a str,
    rest: Chars<'a>,
}

impl<'a> Parser<'a> {
    fn new(input: &'a str) -> Self {
        Parser {
            input,
            rest: input.chars(),
        }
    }

    fn error(&self, problem: impl Into<String>) -> FilterError {
        FilterError {
            filter: self.input.chars().take(QUOTED_LEN).collect(),
            offset: self.input.len() - self.rest.as_str().len(),
            problem: problem.into(),
        }
    }

    fn peek(&self) -> Option<char> {
        self.rest.clone().next()
    }

    /// Takes the characters that satisfy `wanted`.
    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest.as_str();
        let end = rest.find(|c| !wanted(c)).unwrap_or(rest.len());
        let (taken, left) = rest.split_at(end);
        self.rest = left.chars();
        taken
    }

    fn skip_space(&mut self) {
        self.take_while(char::is_whitespace);
    }

    fn filter(mut self) -> Result<Filter, FilterError> {
        if self.input.is_empty() {
            return Ok(Filter(Vec::new()));
        }
        let mut selectors = vec![self.selector()?];
        loop {
            match self.peek() {
                None => return Ok(Filter(selectors)),
                Some(',') => {
                    self.rest.next();
                    selectors.push(self.selector()?);
                }
                Some(c) => return Err(self.error(format!("expected a comma or the end, found {c:?}"))),
            }
        }
    }

    fn selector(&mut self) -> Result<Selector, FilterError> {
        let mut path = vec![self.field()?];
        while self.peek() == Some('.') {
            self.rest.next();
            path.push(self.field()?);
        }
        if matches!(self.peek(), None | Some(',')) {
            return Ok(Selector {
                path,
                test: Test::Present,
            });
        }
        self.skip_space();
        let test = match self.take_while(|c| matches!(c, '=' | '!' | '~')) {
            "==" => Test::Equal(self.value(false)?),
            "!=" => Test::NotEqual(self.value(false)?),
            "~=" => Test::Matches(self.regex()?),
            "" => return Err(self.error("expected one of the operators ==, != and ~=")),
            other => {
                let problem = format!("there is no operator {other:?}, only ==, != and ~=");
                return Err(self.error(problem));
            }
        };
        Ok(Selector { path, test })
    }

    fn field(&mut self) -> Result<Vec<u8>, FilterError> {
        self.skip_space();
        if self.peek() == Some('"') {
            return self.quoted();
        }
        match self.take_while(|c| c.is_ascii_alphanumeric() || c == '_') {
            "" => Err(self.error("expected the name of a field")),
            name => Ok(name.as_bytes().to_vec()),
        }
    }

    fn value(&mut self, pattern: bool) -> Result<Vec<u8>, FilterError> {
        self.skip_space();
        match self.peek() {
            Some('"') => self.quoted(),
            Some('/' | '|') if pattern => self.quoted(),
            Some('/' | '|') => Err(self.error("only a regular expression, after ~=, may be quoted like this")),
            // Characters that begin another token; within a value they are like any other.
            None | Some('.' | ',' | '=' | '!' | '~') => Err(self.error("expected a value")),
            Some(_) => match self.take_while(|c| c != ',' && !c.is_whitespace() && !c.is_control()) {
                "" => Err(self.error("expected a value")),
                value => Ok(value.as_bytes().to_vec()),
            },
        }
    }

    fn regex(&mut self) -> Result<Regex, FilterError> {
        let pattern = self.value(true)?;
        let pattern = std::str::from_utf8(&pattern).map_err(|_| self.error("the regular expression is not UTF-8"))?;
        RegexBuilder::new(pattern)
            .size_limit(REGEX_LIMIT)
            .build()
            .map_err(|error| {
                // Its last line says what is wrong; those before draw a picture of it.
                let text = error.to_string();
                self.error(format!(
                    "bad regular expression: {}",
                    text.lines().last().unwrap_or_default()
                ))
            })
    }

    /// A Go string literal; its first character, which is also its last, is next.
    fn quoted(&mut self) -> Result<Vec<u8>, FilterError> {
        let quote = self.rest.next().unwrap_or('"');
        let mut value = Vec::new();
        loop {
            match self.rest.next() {
                None | Some('\n') => return Err(self.error("the quoted text does not end")),
                Some(c) if c == quote => return Ok(value),
                Some('\0') => return Err(self.error("unexpected NUL")),
                Some('\\') => self.escape(quote, &mut value)?,
                Some(c) => push(&mut value, c),
            }
        }
    }

    /// An escape sequence of a Go string literal, after its backslash.
    fn escape(&mut self, quote: char, value: &mut Vec<u8>) -> Result<(), FilterError> {
        let byte = match self.rest.next() {
            Some('a') => 0x07,
            Some('b') => 0x08,
            Some('f') => 0x0c,
            Some('n') => b'\n',
            Some('r') => b'\r',
            Some('t') => b'\t',
            Some('v') => 0x0b,
            Some('\\') => b'\\',
            Some(c) if c == quote => {
                push(value, c);
                return Ok(());
            }
            Some(c @ '0'..='7') => {
                let first = c.to_digit(8).unwrap_or_default();
                let number = first << 6 | self.digits(8, 2)?;
                u8::try_from(number).map_err(|_| self.error("an octal escape is over \\377"))?
            }
            Some('x') => self.digits(16, 2)? as u8,
            Some('u') => return self.code_point(4, value),
            Some('U') => return self.code_point(8, value),
            _ => return Err(self.error("there is no such escape sequence")),
        };
        value.push(byte);
        Ok(())
    }

    fn code_point(&mut self, digits: u32, value: &mut Vec<u8>) -> Result<(), FilterError> {
        let number = self.digits(16, digits)?;
        if number > u32::from(char::MAX) {
            return Err(self.error("an escape is over \\U0010FFFF"));
        }
        // As Go does, for halves of surrogate pairs.
        push(value, char::from_u32(number).unwrap_or(char::REPLACEMENT_CHARACTER));
        Ok(())
    }

    /// Exactly `count` digits.
    fn digits(&mut self, base: u32, count: u32) -> Result<u32, FilterError> {
        let mut number: u32 = 0;
        for _ in 0..count {
            let digit = self.rest.next().and_then(|c| c.to_digit(base));
            let digit = digit.ok_or_else(|| self.error(format!("expected {count} digits of base {base}")))?;
            // Eight hexadecimal digits are all that fit.
            number = number.wrapping_mul(base) | digit;
        }
        Ok(number)
    }
}

fn push(value: &mut Vec<u8>, c: char) {
    value.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}

#[cfg(test)]
mod tests;
