//! What a compiled Python module imports when it is loaded, as its bytecode says.
//!
//! ```text
//! 0   magic   4   version of the bytecode, "\r\n"
//! 4   flags   4
//! 8           8   time and size of the source, or its digest
//! 16  code        an object as the module `marshal` writes it
//! ```
//! `import` is one instruction, before which the level and the names are loaded as constants. Only the code of the module itself is read, not that of
//! its functions. Versions from 3.8 to 3.14 are known; of others nothing is said.

use super::array;
use super::python::{Import, MAX_IMPORTS, MAX_NAMES};

/// Longest compiled module that is read, in bytes.
pub const MAX_MODULE: u64 = 1 << 20;
/// Most objects of a module: the largest ones have some ten thousand, and one takes 32 bytes where it took one in the file.
const MAX_OBJECTS: u32 = 1 << 17;
/// Objects within objects.
const MAX_DEPTH: u32 = 64;
/// Where the code begins.
const HEADER: usize = 16;
/// Versions of the bytecode from which on code has fewer counts and names its variables in one list.
const WITH_PLACES: u16 = 3450;

/// Numbers of instructions. Each takes two bytes, the second of which is the argument, or its last byte.
struct Instructions {
    load_const: u8,
    /// Its argument is the number itself; 0 where there is none.
    load_small: u8,
    import_name: u8,
    extended_arg: u8,
}

impl Instructions {
    fn of(version: u16) -> Option<Self> {
        let [load_const, load_small, import_name, extended_arg] = match version {
            // 3.8 (with arguments by position only) to 3.12.
            3410..3540 => [100, 0, 108, 144],
            // 3.13, and 3.14 as it was released.
            3550..3600 => [83, 0, 75, 71],
            3620..3640 => [82, 94, 73, 69],
            _ => return None,
        };
        Some(Instructions {
            load_const,
            load_small,
            import_name,
            extended_arg,
        })
    }
}

/// What an instruction has loaded.
#[derive(Clone, Copy)]
enum Loaded {
    Constant(usize),
    Small(usize),
}

/// An object, as far as anything is made of it.
#[derive(Debug, Clone)]
enum Object {
    Number(i64),
    Text(String),
    Bytes(Vec<u8>),
    Tuple(Vec<Object>),
    Other,
}

/// The imports of a compiled module; `None` if it cannot be understood.
pub fn imports(module: &[u8]) -> Option<Vec<Import>> {
    let version = u16::from_le_bytes(array(module, 0)?);
    let known = Instructions::of(version)?;
    if module.get(2..4)? != b"\r\n" {
        return None;
    }
    let mut reader = Reader {
        bytes: module.get(..module.len().min(MAX_MODULE as usize))?,
        at: HEADER,
        version,
        known: Vec::new(),
        left: MAX_MODULE,
        objects: 0,
    };
    let (code, constants, names) = reader.module()?;
    let text = |object: &Object| match object {
        Object::Text(text) => Some(text.clone()),
        _ => None,
    };
    let mut found = Vec::new();
    let (mut argument, mut loaded) = (0_usize, [None, None]);
    for instruction in code.chunks_exact(2) {
        argument = (argument << 8) | usize::from(instruction[1]);
        match instruction[0] {
            operation if operation == known.extended_arg => {
                argument &= 0xff_ffff;
                continue;
            }
            operation if operation == known.load_const => loaded = [loaded[1], Some(Loaded::Constant(argument))],
            // 0 is no instruction that loads: it is what fills the place of a cache.
            operation if operation == known.load_small && operation != 0 => {
                loaded = [loaded[1], Some(Loaded::Small(argument))];
            }
            operation if operation == known.import_name && found.len() < MAX_IMPORTS => {
                let level = match loaded[0] {
                    Some(Loaded::Small(level)) => u32::try_from(level).unwrap_or(0),
                    Some(Loaded::Constant(at)) => match constants.get(at) {
                        Some(&Object::Number(level)) => u32::try_from(level).unwrap_or(0),
                        _ => 0,
                    },
                    None => 0,
                };
                let from = match loaded[1] {
                    Some(Loaded::Constant(at)) => match constants.get(at) {
                        Some(Object::Tuple(names)) => names.as_slice(),
                        _ => &[],
                    },
                    _ => &[],
                };
                found.push(Import {
                    level,
                    module: names.get(argument).and_then(text).unwrap_or_default(),
                    names: from.iter().take(MAX_NAMES).filter_map(text).collect(),
                });
            }
            _ => {}
        }
        argument = 0;
    }
    Some(found)
}

/// Reads objects.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    version: u16,
    /// Objects that are referred to later, and bytes that may still be copied for that.
    known: Vec<Object>,
    left: u64,
    /// Objects so far.
    objects: u32,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let taken = self.bytes.get(self.at..self.at.checked_add(len)?)?;
        self.at += len;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn number(&mut self) -> Option<i32> {
        Some(i32::from_le_bytes(array(self.take(4)?, 0)?))
    }

    fn len(&mut self) -> Option<usize> {
        usize::try_from(self.number()?).ok()
    }

    /// The code of the module: its instructions, constants and names.
    fn module(&mut self) -> Option<(Vec<u8>, Vec<Object>, Vec<Object>)> {
        let kind = self.byte()?;
        if kind & 0x7f != b'c' {
            return None;
        }
        if kind & 0x80 != 0 {
            self.known.push(Object::Other);
        }
        let found = self.code(0)?;
        match found {
            (Object::Bytes(code), Object::Tuple(constants), Object::Tuple(names)) => Some((code, constants, names)),
            _ => None,
        }
    }

    /// The fields of a code object, of which these are needed.
    fn code(&mut self, depth: u32) -> Option<(Object, Object, Object)> {
        let has_places = self.version >= WITH_PLACES;
        // Counts: of arguments, and before 3.11 of variables; the size of the stack, and flags.
        self.take(if has_places { 5 } else { 6 } * 4)?;
        let code = self.object(depth)?;
        let constants = self.object(depth)?;
        let names = self.object(depth)?;
        // Variables (and their kinds, or those that are free and in cells), the name of the file, and the names of the function.
        for _ in 0..5 {
            self.object(depth)?;
        }
        self.number()?;
        // Lines, and what handles exceptions.
        for _ in 0..if has_places { 2 } else { 1 } {
            self.object(depth)?;
        }
        Some((code, constants, names))
    }

    fn text(&mut self, len: usize) -> Option<Object> {
        let bytes = self.take(len)?;
        Some(Object::Text(String::from_utf8_lossy(bytes).into_owned()))
    }

    fn object(&mut self, depth: u32) -> Option<Object> {
        let depth = depth + 1;
        self.objects += 1;
        if depth > MAX_DEPTH || self.objects > MAX_OBJECTS {
            return None;
        }
        let byte = self.byte()?;
        let (kind, is_known) = (byte & 0x7f, byte & 0x80 != 0);
        // Its number comes before those of what is in it.
        let number = self.known.len();
        if is_known {
            self.known.push(Object::Other);
        }
        let object = match kind {
            b'N' | b'F' | b'T' | b'S' | b'.' => Object::Other,
            b'i' => Object::Number(self.number()?.into()),
            b'I' | b'g' => {
                self.take(8)?;
                Object::Other
            }
            b'y' => {
                self.take(16)?;
                Object::Other
            }
            b'l' => {
                let len = self.number()?.unsigned_abs() as usize;
                self.take(len.checked_mul(2)?)?;
                Object::Other
            }
            b's' => {
                let len = self.len()?;
                Object::Bytes(self.take(len)?.to_vec())
            }
            b'u' | b't' | b'a' | b'A' => {
                let len = self.len()?;
                self.text(len)?
            }
            b'z' | b'Z' => {
                let len = self.byte()?.into();
                self.text(len)?
            }
            b')' => {
                let len = self.byte()?.into();
                self.tuple(len, depth)?
            }
            b'(' | b'[' | b'<' | b'>' => {
                let len = self.len()?;
                self.tuple(len, depth)?
            }
            b'c' => {
                self.code(depth)?;
                Object::Other
            }
            b'r' => {
                let number = self.len()?;
                let known = self.known.get(number)?;
                // A tuple that refers to others that refer to others takes no more memory than the file.
                self.left = self.left.checked_sub(size(known))?;
                known.clone()
            }
            _ => return None,
        };
        if is_known && let Some(known) = self.known.get_mut(number) {
            self.left = self.left.checked_sub(size(&object))?;
            *known = object.clone();
        }
        Some(object)
    }

    fn tuple(&mut self, len: usize, depth: u32) -> Option<Object> {
        // Each takes a byte at least.
        if len > self.bytes.len() - self.at {
            return None;
        }
        (0..len)
            .map(|_| self.object(depth))
            .collect::<Option<_>>()
            .map(Object::Tuple)
    }
}

/// What a copy of an object costs.
fn size(object: &Object) -> u64 {
    match object {
        Object::Number(_) | Object::Other => 1,
        Object::Text(text) => 1 + text.len() as u64,
        Object::Bytes(bytes) => 1 + bytes.len() as u64,
        Object::Tuple(objects) => 1 + objects.iter().map(size).sum::<u64>(),
    }
}
