//! A bounded reader of FlatBuffers, as far as a zTOC needs them: tables, numbers, texts, and vectors of bytes and of references.
//!
//! Nothing is believed: every place is looked up with its bounds checked. Tables are read along the schema, which has no recursion, so
//! that references in a circle end by themselves; what they could still do is to make many readers of the same bytes. A writer refers to
//! each thing once, so that all that is read together is no longer than the buffer: that is the budget ([`Flat::spend`]).

use std::cell::Cell;

use super::{FORMAT, malformed};
use crate::layer::LayerError;

/// Bytes of a reference, and of the length in front of a vector.
const REFERENCE: usize = 4;

/// A buffer.
pub(super) struct Flat<'a> {
    bytes: &'a [u8],
    /// Bytes that may still be read.
    budget: Cell<usize>,
}

/// A table in it.
pub(super) struct Table<'f, 'a> {
    flat: &'f Flat<'a>,
    at: usize,
    /// Places of the fields relative to the table, 16 bits each; 0 for a field that has its default.
    slots: &'a [u8],
    /// Bytes of the table itself.
    len: usize,
}

impl<'a> Flat<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Flat {
            bytes,
            budget: Cell::new(bytes.len()),
        }
    }

    pub(super) fn root(&self) -> Result<Table<'_, 'a>, LayerError> {
        self.table(self.follow(0)?)
    }

    fn spend(&self, count: usize) -> Result<(), LayerError> {
        let left = self.budget.get().checked_sub(count);
        self.budget
            .set(left.ok_or_else(|| malformed(0, "parts of it are referred to again and again"))?);
        Ok(())
    }

    fn array<const N: usize>(&self, at: usize) -> Result<[u8; N], LayerError> {
        let bytes = self.bytes.get(at..).and_then(|rest| rest.first_chunk());
        bytes.copied().ok_or_else(|| LayerError::Truncated {
            format: FORMAT,
            length: self.bytes.len() as u64,
            what: format!("what it says is at {at}"),
        })
    }

    fn u32(&self, at: usize) -> Result<usize, LayerError> {
        // At least 32 bits are what a place in memory has here.
        Ok(u32::from_le_bytes(self.array(at)?) as usize)
    }

    fn u16(&self, at: usize) -> Result<usize, LayerError> {
        Ok(u16::from_le_bytes(self.array(at)?).into())
    }

    /// The place that the reference at `at` names.
    fn follow(&self, at: usize) -> Result<usize, LayerError> {
        at.checked_add(self.u32(at)?)
            .ok_or_else(|| malformed(at, "a reference points nowhere"))
    }

    fn table(&self, at: usize) -> Result<Table<'_, 'a>, LayerError> {
        self.spend(REFERENCE)?;
        let back = i32::from_le_bytes(self.array(at)?);
        let outside = || malformed(at, "a table's list of fields lies outside");
        let list = i64::try_from(at).ok().and_then(|at| at.checked_sub(back.into()));
        let list = list.and_then(|list| usize::try_from(list).ok()).ok_or_else(outside)?;
        let (list_len, len) = (self.u16(list)?, self.u16(list.saturating_add(2))?);
        // Lists of fields are shared by tables, but no table is by those that refer to it.
        self.spend(len.saturating_sub(REFERENCE))?;
        let slots = self.bytes.get(list..).and_then(|rest| rest.get(4..list_len));
        Ok(Table {
            flat: self,
            at,
            slots: slots.ok_or_else(outside)?,
            len,
        })
    }

    /// Where a vector's elements begin, and how many there are.
    fn vector(&self, at: usize, element: usize) -> Result<(usize, usize), LayerError> {
        let count = self.u32(at)?;
        let len = count.checked_mul(element);
        let begin = at.saturating_add(REFERENCE);
        let fits = len.filter(|len| self.bytes.get(begin..).is_some_and(|rest| rest.len() >= *len));
        let len = fits.ok_or_else(|| malformed(at, format!("a vector of {count} elements lies outside")))?;
        self.spend(REFERENCE + len)?;
        Ok((begin, count))
    }

    fn bytes(&self, at: usize) -> Result<&'a [u8], LayerError> {
        let (begin, count) = self.vector(at, 1)?;
        Ok(self
            .bytes
            .get(begin..)
            .and_then(|rest| rest.get(..count))
            .unwrap_or_default())
    }
}

impl<'f, 'a> Table<'f, 'a> {
    /// The field in `slot`, of `N` bytes; `None` if it has its default.
    fn field<const N: usize>(&self, slot: usize) -> Result<Option<(usize, [u8; N])>, LayerError> {
        let offset = self.slots.get(slot * 2..).and_then(|rest| rest.first_chunk());
        let offset: usize = offset.map_or(0, |offset| u16::from_le_bytes(*offset).into());
        if offset == 0 {
            return Ok(None);
        }
        if offset + N > self.len {
            return Err(malformed(self.at, "a field lies outside its table"));
        }
        let at = self.at.saturating_add(offset);
        Ok(Some((at, self.flat.array(at)?)))
    }

    pub(super) fn i64(&self, slot: usize) -> Result<i64, LayerError> {
        Ok(self.field(slot)?.map_or(0, |(_, bytes)| i64::from_le_bytes(bytes)))
    }

    pub(super) fn i32(&self, slot: usize) -> Result<i32, LayerError> {
        Ok(self.field(slot)?.map_or(0, |(_, bytes)| i32::from_le_bytes(bytes)))
    }

    pub(super) fn u32(&self, slot: usize) -> Result<u32, LayerError> {
        Ok(self.field(slot)?.map_or(0, |(_, bytes)| u32::from_le_bytes(bytes)))
    }

    pub(super) fn u8(&self, slot: usize, default: u8) -> Result<u8, LayerError> {
        Ok(self.field(slot)?.map_or(default, |(_, [byte])| byte))
    }

    /// What the field refers to.
    fn target(&self, slot: usize) -> Result<Option<usize>, LayerError> {
        match self.field::<REFERENCE>(slot)? {
            Some((at, _)) => self.flat.follow(at).map(Some),
            None => Ok(None),
        }
    }

    /// A text or a vector of bytes; empty if there is none.
    pub(super) fn bytes(&self, slot: usize) -> Result<&'a [u8], LayerError> {
        self.target(slot)?.map_or(Ok(&[][..]), |at| self.flat.bytes(at))
    }

    pub(super) fn table(&self, slot: usize) -> Result<Option<Table<'f, 'a>>, LayerError> {
        self.target(slot)?.map(|at| self.flat.table(at)).transpose()
    }

    /// The tables of a vector.
    pub(super) fn tables(
        &self,
        slot: usize,
    ) -> Result<impl ExactSizeIterator<Item = Result<Table<'f, 'a>, LayerError>>, LayerError> {
        let flat = self.flat;
        Ok(self.references(slot)?.map(move |at| flat.table(flat.follow(at)?)))
    }

    /// The texts of a vector.
    pub(super) fn texts(
        &self,
        slot: usize,
    ) -> Result<impl ExactSizeIterator<Item = Result<&'a [u8], LayerError>>, LayerError> {
        let flat = self.flat;
        Ok(self.references(slot)?.map(move |at| flat.bytes(flat.follow(at)?)))
    }

    /// Where the references of a vector are.
    fn references(&self, slot: usize) -> Result<impl ExactSizeIterator<Item = usize> + use<>, LayerError> {
        let (begin, count) = match self.target(slot)? {
            Some(at) => self.flat.vector(at, REFERENCE)?,
            None => (0, 0),
        };
        // Within the buffer, as `vector` has checked.
        Ok((0..count).map(move |n| begin + n * REFERENCE))
    }
}
