//! Any bytes as each of what is read of programs to guess what they will read: ELF files, the loader's cache, scripts, modules. None panics, and what
//! they name is bounded.

#![no_main]

use lazuli::layer::entry::{elf, javascript, libraries, pyc, python, script, text_at};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    if let Some(elf) = elf::Elf::parse(input) {
        let inside = |range: std::ops::Range<u64>| input.get(range.start as usize..range.end as usize).unwrap_or(input);
        for range in [elf.interpreter(), elf.dynamic()].into_iter().flatten() {
            if let Some(links) = elf.links(inside(range)) {
                assert!(links.needed.len() <= 256);
                let _ = links.needed.iter().filter_map(|&at| text_at(input, at)).count();
            }
        }
    }
    for path in libraries::find(input, "libc.so.6", 62, true) {
        assert!(path.len() < input.len());
    }
    let _ = libraries::configured(input);
    let _ = script::interpreter(input);
    let commands = script::commands(input);
    assert!(commands.len() <= 512);
    assert!(
        commands
            .iter()
            .all(|command| !command.words.is_empty() && command.words.len() <= 64)
    );
    for imports in [Some(python::imports(input)), pyc::imports(input)]
        .into_iter()
        .flatten()
    {
        assert!(imports.len() <= 512);
        assert!(imports.iter().all(|import| import.names.len() <= 256));
    }
    assert!(javascript::required(input).len() <= 512);
    let _ = javascript::main(input);
});
