//! A zTOC as bytes, laid out as SOCI's own tool does it, so that the same layer gives the same digest there and here.
//!
//! A FlatBuffer is built from its end to its beginning. What decides its bytes is the order in which parts are made (files last to first,
//! texts of a file in the order of their fields, then its records, then the table) and of the fields in a table; that a field
//! with its default is left out; that lists of fields end with the last field that is there; and that the newest equal list is used
//! again, whatever the lengths of the two tables.

use super::ztoc::{File, VERSION, Ztoc};

/// The bytes of a zTOC.
pub(super) fn encode(ztoc: &Ztoc<'_>) -> Vec<u8> {
    let mut b = Builder::default();
    let version = b.text(VERSION);
    let tool = b.text(&ztoc.tool);
    let mut files: Vec<u32> = ztoc.files.iter().rev().map(|entry| file(&mut b, entry)).collect();
    files.reverse();
    let files = b.references(&files);
    let mut table = b.table();
    table.reference(&mut b, 0, files);
    let toc = table.end(&mut b);
    let zinfo = b.bytes(&ztoc.zinfo);
    let digests: Vec<u32> = ztoc.digests.iter().map(|digest| b.text(digest)).collect();
    let digests = b.references(&digests);
    let mut table = b.table();
    table.number(&mut b, 1, &ztoc.last_span.to_le_bytes());
    table.reference(&mut b, 2, digests);
    table.reference(&mut b, 3, zinfo);
    if ztoc.algorithm.byte() != 1 {
        table.number(&mut b, 0, &[ztoc.algorithm.byte()]);
    }
    let info = table.end(&mut b);
    let mut table = b.table();
    table.reference(&mut b, 0, version);
    table.reference(&mut b, 1, tool);
    table.reference(&mut b, 4, toc);
    table.number(&mut b, 2, &ztoc.compressed_size.to_le_bytes());
    table.number(&mut b, 3, &ztoc.uncompressed_size.to_le_bytes());
    table.reference(&mut b, 5, info);
    let root = table.end(&mut b);
    b.finish(root)
}

fn file(b: &mut Builder, file: &File<'_>) -> u32 {
    let texts = [&file.name, &file.kind, &file.link, &file.user, &file.group, &file.time];
    let [name, kind, link, user, group, time] = texts.map(|text| b.text(text));
    let record = |(key, value): &(super::ztoc::Text<'_>, super::ztoc::Text<'_>)| {
        let (key, value) = (b.text(key), b.text(value));
        let mut table = b.table();
        table.reference(b, 0, key);
        table.reference(b, 1, value);
        table.end(b)
    };
    let records: Vec<u32> = file.records.iter().map(record).collect();
    let records = b.references(&records);
    let mut table = b.table();
    table.reference(b, 0, name);
    table.reference(b, 1, kind);
    table.number(b, 2, &file.offset.to_le_bytes());
    table.number(b, 3, &file.size.to_le_bytes());
    table.reference(b, 4, link);
    table.number(b, 5, &file.mode.to_le_bytes());
    table.number(b, 6, &file.uid.to_le_bytes());
    table.number(b, 7, &file.gid.to_le_bytes());
    table.reference(b, 8, user);
    table.reference(b, 9, group);
    table.reference(b, 10, time);
    table.number(b, 11, &file.major.to_le_bytes());
    table.number(b, 12, &file.minor.to_le_bytes());
    table.reference(b, 13, records);
    table.end(b)
}

/// Most slots of a table here.
const SLOTS: usize = 14;

/// A buffer that grows at its front. Places are counted from its end, so that they stay when it grows.
#[derive(Default)]
struct Builder {
    /// The bytes, the last one first.
    reversed: Vec<u8>,
    /// Largest alignment that was asked for.
    align: usize,
    /// Lists of fields: place, and what is in them.
    lists: Vec<(u32, List)>,
}

/// Places of the fields relative to the table's, 0 for those that are not there.
type List = Vec<u16>;

impl Builder {
    fn place(&self) -> u32 {
        // zTOCs are far smaller; what is larger cannot be written in the format at all.
        self.reversed.len() as u32
    }

    /// Fills up so that after `more` bytes the place is a multiple of `size`.
    fn align(&mut self, size: usize, more: usize) {
        self.align = self.align.max(size);
        let end = (self.reversed.len() + more).next_multiple_of(size) - more;
        self.reversed.resize(end, 0);
    }

    fn put(&mut self, bytes: &[u8]) {
        self.reversed.extend(bytes.iter().rev());
    }

    fn number(&mut self, bytes: &[u8]) {
        self.align(bytes.len(), 0);
        self.put(bytes);
    }

    fn reference(&mut self, to: u32) {
        self.align(4, 0);
        let distance = self.place() + 4 - to;
        self.put(&distance.to_le_bytes());
    }

    fn text(&mut self, text: &[u8]) -> u32 {
        self.align(4, text.len() + 1);
        self.put(&[0]);
        self.put(text);
        self.put(&(text.len() as u32).to_le_bytes());
        self.place()
    }

    fn bytes(&mut self, bytes: &[u8]) -> u32 {
        self.align(4, bytes.len());
        self.put(bytes);
        self.put(&(bytes.len() as u32).to_le_bytes());
        self.place()
    }

    fn references(&mut self, to: &[u32]) -> u32 {
        self.align(4, 4 * to.len());
        for to in to.iter().rev() {
            self.reference(*to);
        }
        self.put(&(to.len() as u32).to_le_bytes());
        self.place()
    }

    fn table(&self) -> Open {
        Open {
            begin: self.place(),
            fields: [0; SLOTS],
        }
    }

    fn finish(mut self, root: u32) -> Vec<u8> {
        let align = self.align;
        self.align(align, 4);
        self.reference(root);
        self.reversed.reverse();
        self.reversed
    }
}

/// A table being made: nothing but its fields comes in between.
struct Open {
    begin: u32,
    /// Places of the fields, 0 for those that are not there.
    fields: [u32; SLOTS],
}

impl Open {
    fn number(&mut self, b: &mut Builder, slot: usize, bytes: &[u8]) {
        if bytes.iter().any(|&byte| byte != 0) {
            b.number(bytes);
            self.fields[slot] = b.place();
        }
    }

    fn reference(&mut self, b: &mut Builder, slot: usize, to: u32) {
        b.reference(to);
        self.fields[slot] = b.place();
    }

    fn end(self, b: &mut Builder) -> u32 {
        b.number(&[0; 4]);
        let place = b.place();
        let used = self
            .fields
            .iter()
            .rposition(|&field| field != 0)
            .map_or(0, |last| last + 1);
        let distance = |&field: &u32| if field == 0 { 0 } else { (place - field) as u16 };
        let list: List = self.fields[..used].iter().map(distance).collect();
        let known = b.lists.iter().rev().find(|(_, other)| *other == list);
        let at = match known {
            Some((at, _)) => *at,
            None => {
                for field in list.iter().rev() {
                    b.number(&field.to_le_bytes());
                }
                b.number(&((place - self.begin) as u16).to_le_bytes());
                b.number(&((list.len() as u16 + 2) * 2).to_le_bytes());
                let at = b.place();
                b.lists.push((at, list));
                at
            }
        };
        let back = (i64::from(at) - i64::from(place)) as i32;
        for (n, byte) in back.to_le_bytes().into_iter().enumerate() {
            b.reversed[place as usize - 1 - n] = byte;
        }
        place
    }
}
